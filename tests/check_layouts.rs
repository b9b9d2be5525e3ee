//! What the layout of a checkpoint adds to a check, with a manifest and without one.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use crate::kit::area::lockstep;
use crate::kit::pair::{Pair, options};
use crate::kit::{done, ends};

fn check(target: &Path, arguments: &[&str]) -> Output {
    Command::new(lockstep()).arg("check").args(arguments).arg(target).output().unwrap()
}

/// A safetensors file with one tensor of 8 bytes.
fn tensors(name: &str) -> Vec<u8> {
    let header = format!(r#"{{"{name}":{{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}}}"#);
    [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &[1; 8]].concat()
}

const INDEX: &str = "model.safetensors.index.json";
const SHARDS: [&str; 2] = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"];

fn checkpoint(at: &Path) {
    fs::create_dir_all(at).unwrap();
    let index = format!(r#"{{"weight_map":{{"a":"{}","b":"{}"}}}}"#, SHARDS[0], SHARDS[1]);
    fs::write(at.join(INDEX), index).unwrap();
    fs::write(at.join(SHARDS[0]), tensors("a")).unwrap();
    fs::write(at.join(SHARDS[1]), tensors("b")).unwrap();
}

fn cut(file: &Path) {
    let length = fs::metadata(file).unwrap().len();
    fs::File::options().write(true).open(file).unwrap().set_len(length - 1).unwrap();
}

#[test]
fn s30_without_a_manifest_a_layout_that_is_asked_for_decides() {
    let at = tempfile::tempdir().unwrap();
    let tree = at.path().join("checkpoint-500");
    checkpoint(&tree);
    // That it looks complete is not asked for: nothing is known of the content.
    ends(&check(&tree, &[]), 1, &["manifest-missing", "--layout auto asks only whether it is complete"]);
    for layout in ["auto", "huggingface"] {
        let good = check(&tree, &["--layout", layout]);
        ends(&good, 0, &["good, by the layout alone of 3 files", "changed content is not found"]);
    }
    let said = String::from_utf8(check(&tree, &["--layout=auto", "--json"]).stdout).unwrap();
    let verdict: serde_json::Value = serde_json::from_str(said.lines().last().unwrap()).unwrap();
    assert_eq!(verdict["depth"], "layout", "{verdict}");
    assert_eq!((&verdict["layouts"][0], &verdict["unread_files"]), (&"huggingface .".into(), &3.into()), "{verdict}");
    assert!(verdict["manifest_sha256"].is_null());
    // Another layout than the one that is there, and none.
    ends(&check(&tree, &["--layout=megatron"]), 1, &["manifest-missing", "holds no megatron checkpoint"]);
    ends(&check(&tree, &["--layout=none"]), 1, &["manifest-missing"]);
    ends(&check(&tree, &["--layout=auto", "--marker=_SUCCESS"]), 4, &["unfinished: .: is not marked as complete"]);
    fs::write(tree.join("_SUCCESS"), "").unwrap();
    done(&check(&tree, &["--layout=auto", "--marker=_SUCCESS"]));
    ends(&check(&tree, &["--layout=auto", "--marker=../x"]), 2, &["--marker"]);
    // A shard that is cut off shows without a hash; one that is missing is not finished.
    cut(&tree.join(SHARDS[0]));
    ends(&check(&tree, &["--layout=auto"]), 1, &["damaged: model-00001-of-00002.safetensors", "1 damaged"]);
    fs::remove_file(tree.join(SHARDS[0])).unwrap();
    ends(&check(&tree, &["--layout=auto"]), 4, &["unfinished: model-00001-of-00002.safetensors: is missing"]);
    // It never starts anything, nor stands for a check.
    let mut exec = Command::new(lockstep());
    exec.args(["exec", "--check"]).arg(&tree).args(["--layout=auto", "--", "true"]);
    ends(&exec.output().unwrap(), 4, &["is missing"]);
    let data = at.path().join("data");
    fs::create_dir(&data).unwrap();
    fs::write(data.join("part.parquet"), "PAR1").unwrap();
    ends(&check(&data, &["--layout=auto"]), 1, &["manifest-missing"]);
}

#[test]
fn s30_a_checkpoint_that_was_published_incomplete_is_not_good_although_it_is_as_listed() {
    let pair = Pair::new();
    checkpoint(&pair.source.join("checkpoint-500"));
    assert!(pair.push(&options()).is_complete());
    for depth in [&["--quick"][..], &[], &["--sample=100%"], &["--full"]] {
        done(&check(&pair.target, depth));
    }
    let shard = pair.source.join("checkpoint-500").join(SHARDS[1]);
    // The source was cut off before it was sent: the manifest lists it so.
    cut(&shard);
    assert!(pair.push(&options()).is_complete());
    for depth in [&["--quick"][..], &[]] {
        done(&check(&pair.target, depth));
    }
    for depth in [&["--sample=1%"][..], &["--full"]] {
        ends(&check(&pair.target, depth), 1, &["damaged: checkpoint-500/model-00002-of-00002.safetensors"]);
        done(&check(&pair.target, &[depth, &["--layout=none"]].concat()));
    }
    fs::remove_file(&shard).unwrap();
    let deleting = lockstep::sync::Options { delete: true, ..options() };
    assert!(pair.push(&deleting).is_complete());
    for depth in [&["--quick"][..], &[], &["--full"]] {
        ends(&check(&pair.target, depth), 4, &["is missing", "give --layout none"]);
        done(&check(&pair.target, &[depth, &["--layout=none"]].concat()));
    }
    ends(&check(&pair.target, &["--layout=none", "--marker=_SUCCESS"]), 4, &["is not marked as complete"]);
}

#[test]
fn a_file_named_latest_is_a_pointer_only_beside_checkpoints() {
    let pair = Pair::new();
    pair.write("latest", &vec![7; 5000]);
    assert!(pair.push(&options()).is_complete());
    done(&check(&pair.target, &["--full"]));
    pair.write("global_step5/mp_rank_00_model_states.pt", b"PK");
    assert!(pair.push(&options()).is_complete());
    ends(&check(&pair.target, &[]), 1, &["damaged: latest: is no pointer to a checkpoint"]);
}
