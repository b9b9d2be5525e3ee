//! `lockstep inspect`: checkpoints of every layout, whole and with each kind of damage.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::{Command, Output};

use lockstep::layout::{self, Kind, Options, Report};
use lockstep::root::Root;
use proptest::prelude::*;

use super::kit::{ends, text};

fn inspect(at: &Path, more: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_lockstep")).arg("inspect").arg(at).args(more).output().unwrap()
}

fn put(at: &Path, name: &str, content: impl AsRef<[u8]>) {
    let path = at.join(name);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, content).unwrap();
}

fn cut(at: &Path, name: &str, bytes: usize) {
    let content = fs::read(at.join(name)).unwrap();
    fs::write(at.join(name), &content[..content.len() - bytes]).unwrap();
}

fn tensors(names: &[&str]) -> Vec<u8> {
    let entry = |(at, name): (usize, &&str)| {
        format!(r#""{name}":{{"dtype":"F32","shape":[2,3],"data_offsets":[{},{}]}}"#, at * 24, at * 24 + 24)
    };
    let header = format!("{{{}}}", names.iter().enumerate().map(entry).collect::<Vec<_>>().join(","));
    [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &vec![7; names.len() * 24]].concat()
}

/// A zip file with one stored entry.
pub(crate) fn archive() -> Vec<u8> {
    let (name, data) = (b"archive/data.pkl", [7_u8; 40]);
    let sizes = [&40_u32.to_le_bytes()[..], &40_u32.to_le_bytes(), &(name.len() as u16).to_le_bytes()].concat();
    let mut zip = [&b"PK\x03\x04\x0a\0"[..], &[0; 12], &sizes, &[0; 2], name, &data].concat();
    let offset = zip.len() as u32;
    zip.extend([&b"PK\x01\x02\x0a\0\x0a\0"[..], &[0; 12], &sizes, &[0; 16], name].concat());
    let length = zip.len() as u32 - offset;
    zip.extend(
        [&b"PK\x05\x06\0\0\0\0\x01\0\x01\0"[..], &length.to_le_bytes(), &offset.to_le_bytes(), &[0; 2]].concat(),
    );
    zip
}

fn pickle(names: &[&str]) -> Vec<u8> {
    let mut bytes = b"\x80\x04".to_vec();
    for name in names {
        bytes.extend([b"\x8c", &[name.len() as u8][..], name.as_bytes(), b"\x94"].concat());
    }
    bytes.push(b'.');
    bytes
}

const INDEX: &str = "checkpoint-500/model.safetensors.index.json";
const SHARDS: [&str; 2] = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"];

fn hugging_face(at: &Path) {
    let map = format!(r#"{{"weight_map":{{"a":"{}","b":"{}","c":"{}"}}}}"#, SHARDS[0], SHARDS[0], SHARDS[1]);
    put(at, INDEX, map);
    put(at, &format!("checkpoint-500/{}", SHARDS[0]), tensors(&["a", "b"]));
    put(at, &format!("checkpoint-500/{}", SHARDS[1]), tensors(&["c"]));
    put(at, "checkpoint-500/optimizer.pt", archive());
    put(at, "checkpoint-500/training_args.bin", archive());
    put(at, "checkpoint-500/trainer_state.json", "{}");
}

fn megatron(at: &Path) {
    put(at, "latest_checkpointed_iteration.txt", "100\n");
    for rank in ["00", "01"] {
        put(at, &format!("iter_0000100/mp_rank_{rank}/model_optim_rng.pt"), archive());
    }
}

fn deepspeed(at: &Path) {
    put(at, "latest", "global_step9");
    for rank in 0..2 {
        put(at, &format!("global_step9/zero_pp_rank_{rank}_mp_rank_00_model_states.pt"), archive());
        put(at, &format!("global_step9/bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"), archive());
    }
    for layer in [1, 3] {
        put(at, &format!("global_step9/layer_{layer:02}-model_00-model_states.pt"), archive());
        put(at, &format!("global_step9/layer_{layer:02}-model_01-model_states.pt"), archive());
    }
}

fn dcp(at: &Path) {
    put(at, "__0_0.distcp", [archive(), archive()].concat());
    put(at, "__2_0.distcp", archive());
    put(at, ".metadata", pickle(&["__0_0.distcp", "__2_0.distcp"]));
}

fn nemo(at: &Path) {
    put(at, "last/weights/common.pt", archive());
    put(at, "last/context/io.json", "{}");
}

type Make = fn(&Path);
type Change<'a> = &'a dyn Fn(&Path);

/// What is done to a whole checkpoint, how `inspect` then ends, and words that it says.
fn damage(make: Make, cases: &[(&str, Change<'_>, i32, &[&str])]) {
    let at = tempfile::tempdir().unwrap();
    make(at.path());
    ends(&inspect(at.path(), &[]), 0, &["complete by its layout"]);
    for (name, change, code, words) in cases {
        let at = tempfile::tempdir().unwrap();
        make(at.path());
        change(at.path());
        let output = inspect(at.path(), &[]);
        assert_eq!(output.status.code(), Some(*code), "{name}: {}", text(&output));
        ends(&output, *code, words);
    }
}

fn remove(name: &str) -> impl Fn(&Path) {
    move |at| fs::remove_file(at.join(name)).unwrap()
}

fn write(name: &str, content: impl AsRef<[u8]>) -> impl Fn(&Path) {
    move |at| put(at, name, &content)
}

#[test]
fn hugging_face_whole_and_damaged() {
    let first = format!("checkpoint-500/{}", SHARDS[0]);
    let mut holed = archive();
    let entry = holed.windows(4).position(|window| window == b"PK\x01\x02").unwrap();
    holed[entry] = 0;
    let listed = |shard: &str| format!(r#"{{"weight_map":{{"a":"{shard}"}}}}"#);
    damage(
        hugging_face,
        &[
            ("a shard is missing", &remove(&first), 4, &[SHARDS[0], "is missing (unfinished)", "lists it"]),
            ("a shard is cut off", &|at| cut(at, &first, 1), 1, &[SHARDS[0], "cut off: its tensors take 48 bytes"]),
            ("a header is cut off", &write(&first, b"\x09\0\0\0\0\0\0\0{}"), 1, &["only 2 bytes follow"]),
            ("a shard is empty", &write(&first, ""), 1, &["is damaged"]),
            ("a header is huge", &write(&first, [0xff; 64]), 1, &["no header is longer"]),
            ("the index is missing", &remove(INDEX), 4, &["'checkpoint-500/model.safetensors.index.json' is missing"]),
            ("the index is cut off", &|at| cut(at, INDEX, 9), 1, &["is no index of shards"]),
            ("the index leads out", &write(INDEX, listed("../x")), 1, &["'../x', which is no path within"]),
            ("the index is absolute", &write(INDEX, listed("/etc/passwd")), 1, &["is no path within"]),
            ("the index lists some", &write(INDEX, listed(SHARDS[0])), 1, &["lists only some: 1 of 2"]),
            ("names of control bytes", &write(INDEX, listed("\\u001b[31m")), 4, &["\\x1b[31m"]),
            ("deep JSON", &write(INDEX, format!(r#"{{"x":{}"#, "[".repeat(100_000))), 1, &["no index"]),
            (
                "a torch file is cut off",
                &|at| cut(at, "checkpoint-500/optimizer.pt", 1),
                1,
                &["optimizer.pt", "cut off"],
            ),
            (
                "two archives in one",
                &write("checkpoint-500/optimizer.pt", [archive(), archive()].concat()),
                1,
                &["bytes behind where it should be"],
            ),
            (
                "no entry where the directory is",
                &write("checkpoint-500/optimizer.pt", holed),
                1,
                &["not where the end"],
            ),
            ("zeros", &write("checkpoint-500/rng_state.pth", [0; 64]), 1, &["begins with zeros"]),
            ("no state", &remove("checkpoint-500/trainer_state.json"), 4, &["no 'trainer_state.json'"]),
            ("a save goes on", &write("tmp-checkpoint-600/x", ""), 4, &["'tmp-checkpoint-600' is unfinished"]),
            (
                "an empty checkpoint",
                &|at| fs::create_dir(at.join("checkpoint-9")).unwrap(),
                4,
                &["'checkpoint-9' is empty"],
            ),
            ("a download", &write("checkpoint-500/a.incomplete", ""), 4, &["a.incomplete' is unfinished"]),
        ],
    );
}

#[test]
fn megatron_whole_and_damaged() {
    let pointer = "latest_checkpointed_iteration.txt";
    damage(
        megatron,
        &[
            ("names what is not there", &write(pointer, "200"), 4, &["names 'iter_0000200', which is not there"]),
            ("release is not there", &write(pointer, "release"), 4, &["names 'release', which is not there"]),
            ("empty pointer", &write(pointer, ""), 1, &["it is empty"]),
            ("odd pointer", &write(pointer, "../100"), 1, &["neither a number nor 'release'"]),
            ("long pointer", &write(pointer, [b'1'; 5000]), 1, &["longer than 4096 bytes"]),
            ("no pointer", &remove(pointer), 4, &["'iter_0000100' is unfinished"]),
            ("newer", &write("iter_0000101/x", "x"), 4, &["'iter_0000101' is unfinished", "newer than"]),
            (
                "a rank is missing",
                &|at| fs::remove_dir_all(at.join("iter_0000100/mp_rank_00")).unwrap(),
                4,
                &["'mp_rank_#' that with 0 is missing"],
            ),
            ("a rank is empty", &remove("iter_0000100/mp_rank_01/model_optim_rng.pt"), 4, &["mp_rank_01' is empty"]),
            (
                "nothing in it",
                &|at| {
                    fs::remove_dir_all(at.join("iter_0000100")).unwrap();
                    fs::create_dir_all(at.join("iter_0000100/mp_rank_00")).unwrap();
                },
                4,
                &["names 'iter_0000100', which is empty"],
            ),
            ("no end of a distributed save", &write("iter_0000100/common.pt", archive()), 4, &["no 'metadata.json'"]),
        ],
    );
}

#[test]
fn deepspeed_whole_and_damaged() {
    let optimizer = "global_step9/bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt";
    damage(
        deepspeed,
        &[
            (
                "names what is not there",
                &write("latest", "global_step8"),
                4,
                &["names 'global_step8', which is not there"],
            ),
            ("empty pointer", &write("latest", ""), 1, &["'latest' is no pointer", "it is empty"]),
            ("pointer leads out", &write("latest", "../../etc"), 1, &["is no name of a directory beside it"]),
            ("no pointer", &remove("latest"), 4, &["'global_step9' is unfinished"]),
            ("newer", &write("global_step10/x", "x"), 4, &["'global_step10' is unfinished"]),
            ("the last rank", &remove(optimizer), 4, &["rank 1, 0 has no states of its optimizer"]),
            (
                "the first rank",
                &remove("global_step9/zero_pp_rank_0_mp_rank_00_model_states.pt"),
                4,
                &["with 0, 0 is missing"],
            ),
            ("a layer", &remove("global_step9/layer_03-model_01-model_states.pt"), 4, &["layer 3 lacks"]),
            ("cut off", &|at| cut(at, optimizer, 30), 1, &["cut off"]),
            (
                "no model",
                &|at| {
                    fs::remove_dir_all(at.join("global_step9")).unwrap();
                    put(at, "global_step9/x", "");
                },
                4,
                &["no file in it ends in 'model_states.pt'"],
            ),
        ],
    );
    // A file of this name that has nothing to do with it.
    let at = tempfile::tempdir().unwrap();
    put(at.path(), "latest", "v1.2/x");
    put(at.path(), "model.safetensors", tensors(&["a"]));
    let output = inspect(at.path(), &[]);
    ends(&output, 0, &["huggingface: ."]);
    assert!(!text(&output).contains("deepspeed"), "{}", text(&output));
}

#[test]
fn torch_dcp_whole_and_damaged() {
    damage(
        dcp,
        &[
            ("no metadata", &remove(".metadata"), 4, &["there is no '.metadata' file"]),
            ("a part is missing", &remove("__2_0.distcp"), 4, &["'__2_0.distcp' is missing"]),
            ("a part is empty", &write("__2_0.distcp", ""), 1, &["'__2_0.distcp' is empty"]),
            ("a part is cut off", &|at| cut(at, "__0_0.distcp", 1), 1, &["cut off"]),
            ("metadata is cut off", &|at| cut(at, ".metadata", 1), 1, &["does not end as a pickle does"]),
            ("metadata is empty", &write(".metadata", ""), 1, &["cut off"]),
            (
                "metadata leads out",
                &write(".metadata", pickle(&["../x.distcp"])),
                1,
                &["'../x.distcp', which is no path"],
            ),
            (
                "all parts are missing",
                &|at| {
                    fs::remove_file(at.join("__0_0.distcp")).unwrap();
                    fs::remove_file(at.join("__2_0.distcp")).unwrap();
                },
                4,
                &["'__0_0.distcp' is missing"],
            ),
            ("a save goes on", &write(".metadata.tmp", ""), 4, &["'.metadata.tmp' is there"]),
            (
                "numbers alone",
                &|at| {
                    put(at, ".metadata", pickle(&[]));
                    put(at, "__2_2.distcp", archive());
                },
                4,
                &["'__2_#.distcp' that with 1 is missing"],
            ),
        ],
    );
    // The name stands where two pieces meet.
    for before in (1 << 20) - 16..(1 << 20) + 2 {
        let at = tempfile::tempdir().unwrap();
        dcp(at.path());
        let mut metadata = vec![b'x'; before];
        metadata[0] = 0x80;
        metadata.extend(b"\x8c\x0c__5_0.distcp\x94.");
        put(at.path(), ".metadata", metadata);
        ends(&inspect(at.path(), &[]), 4, &["'__5_0.distcp' is missing"]);
    }
}

#[test]
fn nemo_ray_and_markers() {
    damage(
        nemo,
        &[
            ("a mark", &write("last-unfinished", ""), 4, &["'last-unfinished' marks an unfinished"]),
            (
                "ray",
                &write("checkpoint_tmp_1/x", ""),
                4,
                &["ray: checkpoint_tmp_1", "'checkpoint_tmp_1' is unfinished"],
            ),
        ],
    );
    let at = tempfile::tempdir().unwrap();
    hugging_face(at.path());
    ends(&inspect(at.path(), &["--marker", "_SUCCESS"]), 4, &["'checkpoint-500' is not marked as complete"]);
    put(at.path(), "checkpoint-500/_SUCCESS", "");
    ends(&inspect(at.path(), &["--marker", "_SUCCESS"]), 0, &["complete"]);
    ends(&inspect(at.path(), &["--marker", "../x"]), 2, &["--marker"]);
}

#[test]
fn one_layout_none_and_what_is_not_known() {
    let at = tempfile::tempdir().unwrap();
    hugging_face(at.path());
    put(at.path(), "tmp-checkpoint-600/x", "");
    ends(&inspect(at.path(), &["--layout", "huggingface"]), 4, &["tmp-checkpoint-600"]);
    ends(&inspect(at.path(), &["--layout", "megatron"]), 4, &["holds no megatron checkpoint"]);
    ends(&inspect(at.path(), &["--layout", "none"]), 0, &["as it says of itself (4 files looked into)"]);
    let whole = inspect(&at.path().join("checkpoint-500"), &["--json"]);
    ends(&whole, 0, &[r#""event":"layout","layout":"huggingface","path":".""#, r#""good":true"#]);
    fs::remove_file(at.path().join("checkpoint-500/trainer_state.json")).unwrap();
    let output = inspect(&at.path().join("checkpoint-500"), &["--json"]);
    ends(&output, 4, &[r#""event":"unfinished""#, r#""exit":4"#]);
    for line in String::from_utf8(output.stdout).unwrap().lines() {
        serde_json::from_str::<serde_json::Value>(line).unwrap();
    }
    let empty = tempfile::tempdir().unwrap();
    ends(&inspect(empty.path(), &[]), 4, &["no layout of a checkpoint is recognised"]);
    ends(&inspect(empty.path(), &["--layout", "none"]), 4, &["there is no safetensors or torch file"]);
    ends(&inspect(&empty.path().join("x"), &[]), 5, &["No such file"]);
    ends(&inspect(&at.path().join(INDEX), &[]), 2, &["is no directory"]);
    put(empty.path(), "old.pt", b"\x80\x02\x8a\x0al\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19.");
    put(empty.path(), "pytorch_model.bin", archive());
    ends(&inspect(empty.path(), &[]), 0, &["1 file of weights is in a format that does not tell"]);
}

#[test]
fn h13_links_are_followed_in_the_tree_and_nothing_outside_is_read() {
    let outer = tempfile::tempdir().unwrap();
    let at = outer.path().join("tree");
    hugging_face(&at);
    let shard = at.join("checkpoint-500").join(SHARDS[1]);
    // Cut off outside: were it read, it would be damaged.
    put(outer.path(), "blob", &tensors(&["c"])[..9]);
    put(&at, "blobs/good", tensors(&["c"]));
    for (target, code, word) in [
        ("../blobs/good", 0, "complete"),
        ("../../blob", 4, "is not in the tree"),
        ("/etc/passwd", 4, "is not in the tree"),
        ("nothing", 4, "is not in the tree"),
    ] {
        fs::remove_file(&shard).unwrap();
        symlink(target, &shard).unwrap();
        ends(&inspect(&at, &[]), code, &[word]);
    }
    fs::remove_file(&shard).unwrap();
    ends(&Command::new("mkfifo").arg(&shard).output().unwrap(), 0, &[]);
    ends(&inspect(&at, &[]), 1, &["is no file"]);
    // Names that are not UTF-8.
    let odd = std::ffi::OsStr::new("caf").to_owned();
    let odd = [odd.as_encoded_bytes(), b"\xe9.safetensors"].concat();
    fs::write(at.join(<std::ffi::OsStr as std::os::unix::ffi::OsStrExt>::from_bytes(&odd)), "x").unwrap();
    ends(&inspect(&at, &[]), 1, &["'caf\\xe9.safetensors' is damaged"]);
}

#[test]
fn findings_are_bounded() {
    let at = tempfile::tempdir().unwrap();
    let map: Vec<String> = (0..layout::FINDINGS_MAX + 5).map(|at| format!(r#""t{at}":"s{at}""#)).collect();
    put(at.path(), "model.safetensors.index.json", format!(r#"{{"weight_map":{{{}}}}}"#, map.join(",")));
    let report = look(at.path());
    assert_eq!((report.findings.len(), report.more), (layout::FINDINGS_MAX, 5));
    assert_eq!(report.count(Kind::Unfinished), layout::FINDINGS_MAX as u64 + 5);
}

fn look(at: &Path) -> Report {
    layout::inspect(&Root::open(at).unwrap(), &Options::default()).unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever the bytes, and whatever is changed in what is whole: no panic, and no byte less goes unnoticed.
    #[test]
    fn random_bytes_and_changes_never_panic(
        bytes in prop::collection::vec(any::<u8>(), 0..300),
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        less in any::<prop::sample::Index>(),
    ) {
        let at = tempfile::tempdir().unwrap();
        let names = ["a.safetensors", "a.pt", "a.bin", "a.distcp", ".metadata", "model.safetensors.index.json", "latest",
            "latest_checkpointed_iteration.txt", "zero_to_fp32.py"];
        for (number, prefix) in [&b""[..], b"PK\x03\x04", b"\x20\0\0\0\0\0\0\0{", b"\x80", b"{\"weight_map\":{"].iter().enumerate() {
            for name in names {
                put(at.path(), &format!("{number}/{name}"), [prefix, &bytes[..]].concat());
            }
        }
        for (name, whole) in [("s.safetensors", tensors(&["a", "b"])), ("s.pt", archive()), ("s.distcp", archive())] {
            let mut changed = whole.clone();
            for (index, byte) in &changes {
                *index.get_mut(&mut changed) = *byte;
            }
            put(at.path(), &format!("changed/{name}"), changed);
            put(at.path(), &format!("less/{name}"), &whole[..4.max(less.index(whole.len()))]);
        }
        let report = look(at.path());
        for name in ["s.safetensors", "s.pt", "s.distcp"] {
            let path = lockstep::path::RelPath::new(format!("less/{name}")).unwrap();
            prop_assert!(report.findings.iter().any(|finding| finding.path.as_ref() == Some(&path)), "{name}");
        }
    }
}

/// What Python's own modules write, zip files of 64 bits and pickles of each protocol, is read as it is meant.
#[test]
fn what_python_writes_is_understood() {
    let script = "
import os, pickle, zipfile
with zipfile.ZipFile('many.pt', 'w') as z:
    for i in range(66000): z.writestr(f'a/{i}', b'')
with zipfile.ZipFile('__0_0.distcp', 'w') as z: z.writestr('a', b'x' * 1000)
for protocol in (2, 3, 4, 5):
    os.mkdir(str(protocol))
    names = {f'w{i}': (f'__{i}_0.distcp', i) for i in range(3)}
    with open(f'{protocol}/.metadata', 'wb') as f: pickle.dump(names, f, protocol=protocol)
    for i in range(3): os.link('__0_0.distcp', f'{protocol}/__{i}_0.distcp')
os.remove('__0_0.distcp')
";
    let at = tempfile::tempdir().unwrap();
    let python = Command::new("python3").args(["-c", script]).current_dir(at.path()).output();
    ends(&python.expect("python3 is not installed: Debian package python3"), 0, &[]);
    ends(&inspect(at.path(), &[]), 0, &["torch-dcp: 2", "torch-dcp: 5", "13 files looked into"]);
    for protocol in ["2", "3", "4", "5"] {
        fs::remove_file(at.path().join(protocol).join("__2_0.distcp")).unwrap();
        ends(&inspect(at.path(), &[]), 4, &[&format!("'{protocol}/__2_0.distcp' is missing")]);
    }
    cut(at.path(), "many.pt", 1);
    ends(&inspect(at.path(), &[]), 1, &["'many.pt' is damaged"]);
}
