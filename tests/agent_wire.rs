//! The agent's extensions spoken by hand to `lockstep sftp-server`: what breaks the rules is refused whole, with path and
//! reason, leaves the target as it was and nothing in staging, and is in the audit log.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use lockstep::codec;
use lockstep::endpoint::{BeginOptions, CommitOptions, Committed};
use lockstep::manifest::{Content, Digest, Entry, Timestamp};
use lockstep::path::RelPath;
use lockstep::wire::buffer::{Reader, Writer};
use lockstep::wire::extension::{EXTENDED, EXTENDED_REPLY, STATUS, put_entry, put_frame, put_string};
use sha2::Digest as _;

use crate::kit::raw::Server;

const SIZE: u64 = 300_000;

/// A confined agent, and a client of it that may say anything.
struct Agent {
    server: Option<Server>,
    at: tempfile::TempDir,
}

/// What a request came to: the reply, or what the refusal says.
type Answer = Result<Vec<u8>, String>;

impl Agent {
    /// The target `data` is there, with a file of its own, so that a change of it shows.
    fn new() -> Agent {
        let at = tempfile::tempdir().unwrap();
        fs::create_dir_all(at.path().join("data/.lockstep")).unwrap();
        fs::write(at.path().join("data/old"), "old").unwrap();
        Agent { server: Some(Server::confined(at.path())), at }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.at.path().join(name)
    }

    fn ask(&mut self, name: &str, body: &[u8]) -> Answer {
        let server = self.server.as_mut().unwrap();
        let name = format!("{name}@lockstep.internal");
        match server.ask(EXTENDED, |w| w.string(name.as_bytes()).bytes(body)) {
            (EXTENDED_REPLY, reply) => Ok(reply),
            (STATUS, reply) => {
                let mut fields = Reader(&reply);
                assert_ne!(fields.u32().unwrap(), 0, "a refusal that says OK");
                Err(String::from_utf8(fields.string().unwrap().to_vec()).unwrap())
            }
            (kind, _) => panic!("an answer of type {kind}"),
        }
    }

    fn begin(&mut self, root: &str) -> Answer {
        let options = BeginOptions { actor: "mallory@there".into(), ..BeginOptions::default() };
        self.ask("begin", &[string(root.as_bytes()), string(&serde_json::to_vec(&options).unwrap())].concat())
    }

    /// Begins a run with a file below a directory that is there, in a unit or not, and sends it.
    fn sent(&mut self, units: &[String]) {
        fs::create_dir(self.path("outside")).unwrap();
        fs::set_permissions(self.path("outside"), PermissionsExt::from_mode(0o711)).unwrap();
        fs::create_dir(self.path("data/sub")).unwrap();
        fs::write(self.path("data/sub/file"), "old!").unwrap();
        let options = BeginOptions { units: units.to_vec(), ..BeginOptions::default() };
        let options = serde_json::to_vec(&options).unwrap();
        self.ask("begin", &[string(b"/data"), string(&options)].concat()).unwrap();
        self.entries(&[listed(b"sub", Content::Directory), listed(b"sub/file", file(4))].concat()).unwrap();
        self.ask("diff", &[]).unwrap();
    }

    /// Puts a link to the directory outside in the place of one below the root.
    fn swap(&self, name: &str) {
        fs::rename(self.path(name), self.path("moved")).unwrap();
        symlink(self.path("outside"), self.path(name)).unwrap();
    }

    #[track_caller]
    fn assert_nothing_outside(&self, when: &str) {
        assert_eq!(fs::read_dir(self.path("outside")).unwrap().count(), 0, "{when}");
        let mode = fs::metadata(self.path("outside")).unwrap().permissions().mode();
        assert_eq!(mode & 0o7777, 0o711, "{when}: its permissions changed");
    }

    fn entries(&mut self, raw: &[u8]) -> Answer {
        self.ask("entries", &frame(raw))
    }

    /// Begins and compares, for one file `sub/file` of [`SIZE`] bytes beside one that is good, and opens it.
    fn opened(&mut self) {
        self.begin("/data").unwrap();
        self.entries(&[listed(b"good", file(4)), listed(b"sub/file", file(SIZE))].concat()).unwrap();
        self.ask("diff", &[]).unwrap();
        self.ask("put", &put(&[(0, b"good")])).unwrap();
        self.ask("open", &[&1_u32.to_be_bytes()[..], &[0; 8]].concat()).unwrap();
    }

    fn commit(&mut self) -> Answer {
        self.ask("commit", &string(&serde_json::to_vec(&CommitOptions::default()).unwrap()))
    }

    /// The refusal names the path and the reason; whatever is tried then, nothing of the run remains but its record.
    #[track_caller]
    fn assert_rejected(mut self, answer: Answer, path: &str, reason: &str) {
        let message = answer.expect_err("it was taken");
        assert!(message.contains(path) && message.contains(reason), "{message}");
        // Who goes on as if nothing had been said gets nothing of it published.
        let good = listed(b"good", file(4));
        for (name, body) in [("entries", frame(&good)), ("diff", Vec::new()), ("put", put(&[(0, b"good")]))] {
            assert!(self.ask(name, &body).is_err(), "{name} after {message}");
        }
        assert!(self.commit().is_err(), "committed after {message}");
        drop(self.server.take());
        self.assert_untouched(&message);
        let log = lines(&self.path("data"));
        let refusals: Vec<_> = log.iter().filter(|line| line["action"] == "refuse").collect();
        let [refusal] = refusals[..] else { panic!("{log:?}") };
        assert!(refusal["actor"].as_str().unwrap().ends_with("who says mallory@there"), "{refusal}");
        let (named, because) = (refusal["path"].as_str().unwrap(), refusal["reason"].as_str().unwrap());
        assert!(named.contains(path) || because.contains(path), "{refusal}");
        assert!(because.contains(reason), "{refusal}");
        lockstep::audit::verify(&lockstep::root::Root::open(&self.path("data")).unwrap()).unwrap();
    }

    #[track_caller]
    fn assert_untouched(&self, when: &str) {
        let names = |at: &Path| -> Vec<String> {
            let mut names: Vec<_> =
                fs::read_dir(at).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
            names.sort();
            names
        };
        assert_eq!(names(&self.path("data")), [".lockstep", "old"], "{when}");
        assert_eq!(fs::read(self.path("data/old")).unwrap(), b"old", "{when}");
        let left = walkdir::WalkDir::new(self.path("data/.lockstep/staging")).into_iter().filter_map(Result::ok);
        let left: Vec<_> = left.filter(|entry| !entry.file_type().is_dir()).map(|entry| entry.into_path()).collect();
        assert!(left.is_empty(), "{when}: staging holds {left:?}");
        assert!(!self.path("data/.lockstep/manifest").exists(), "{when}");
    }
}

fn lines(root: &Path) -> Vec<serde_json::Value> {
    let log = fs::read_to_string(root.join(".lockstep/audit.jsonl")).unwrap_or_default();
    log.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn string(bytes: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    put_string(&mut out, bytes);
    out
}

fn frame(raw: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    put_frame(&mut out, raw, None);
    out
}

/// A zstd frame that its message says holds `declared` bytes.
fn coded(declared: u32, data: &[u8]) -> Vec<u8> {
    [&[1][..], &declared.to_be_bytes(), data].concat()
}

fn zstd(data: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    codec::compress(data, 3, &mut out).unwrap();
    out
}

fn file(size: u64) -> Content {
    Content::File { size, digest: None }
}

/// An entry as a list has it, under a name that need not be one.
fn listed(name: &[u8], content: Content) -> Vec<u8> {
    let entry = Entry {
        path: RelPath::new("x").unwrap(),
        content,
        mtime: Timestamp::default(),
        mode: 0o644,
        owner: "root".into(),
        group: "root".into(),
    };
    let mut out = Vec::new();
    put_entry(&mut out, &entry);
    [string(name), out[5..].to_vec()].concat()
}

fn sha256(data: &[u8]) -> Digest {
    Digest(sha2::Sha256::digest(data).into())
}

fn put(files: &[(u32, &[u8])]) -> Vec<u8> {
    let mut body = Writer::default();
    body.u32(files.len() as u32);
    for (index, data) in files {
        body.u32(*index).bytes(&sha256(data).0).u32(data.len() as u32);
    }
    [body.into_bytes(), frame(&files.iter().map(|file| file.1).collect::<Vec<_>>().concat())].concat()
}

fn write(offset: u64, frame: &[u8]) -> Vec<u8> {
    [&1_u32.to_be_bytes()[..], &offset.to_be_bytes(), frame].concat()
}

/// One name among good ones is refused, and the good ones with it.
#[track_caller]
fn refused_name(name: &[u8], shown: &str, reason: &str) {
    for content in [file(0), Content::Directory, Content::Symlink { target: (*b"old").into() }] {
        let mut agent = Agent::new();
        agent.begin("/data").unwrap();
        let raw = [listed(b"good", file(4)), listed(name, content)].concat();
        let answer = agent.entries(&raw);
        agent.assert_rejected(answer, shown, reason);
    }
    // As what a hard link leads to.
    let mut agent = Agent::new();
    agent.begin("/data").unwrap();
    let first = Content::HardLink { first: RelPath::new("x").unwrap() };
    let linked = listed(b"link", first);
    let at = linked.windows(5).position(|bytes| bytes == b"\0\0\0\x01x").unwrap();
    let raw = [&listed(b"good", file(4)), &linked[..at], &string(name), &linked[at + 5..]].concat();
    let answer = agent.entries(&raw);
    agent.assert_rejected(answer, shown, reason);
}

#[test]
fn h01_h02_h03_h04_names_that_are_none_reject_the_run() {
    for (name, shown, reason) in [
        (&b"../outside"[..], "'../outside'", "'..' component"),
        (b"sub/../../outside", "'sub/../../outside'", "'..' component"),
        (b"..", "'..'", "'..' component"),
        (b"/etc/passwd", "'/etc/passwd'", "absolute"),
        (b"", "''", "empty"),
        (b".", "'.'", "'.' component"),
        (b"a//b", "'a//b'", "empty component"),
        (b"a/", "'a/'", "empty component"),
        (b"a\0b", "'a\\x00b'", "NUL"),
    ] {
        refused_name(name, shown, reason);
    }
}

#[test]
fn h05_names_and_paths_that_are_too_long_reject_the_run() {
    let long = vec![b'n'; 256];
    refused_name(&long, &"n".repeat(256), "longer than 255 bytes");
    let deep = [&b"d/".repeat(2047)[..], b"xy"].concat();
    assert_eq!(deep.len(), 4096);
    refused_name(&deep, "d/d/d", "longer than 4095 bytes");
    // The longest name there may be is taken.
    let mut agent = Agent::new();
    agent.begin("/data").unwrap();
    agent.entries(&listed(&long[1..], file(0))).unwrap();
    agent.ask("diff", &[]).unwrap();
    agent.ask("put", &put(&[(0, b"")])).unwrap();
    agent.commit().unwrap();
    assert!(agent.path("data").join("n".repeat(255)).exists());
}

#[test]
fn h07_h11_a_name_twice_and_a_file_that_is_a_directory_too_reject_the_run() {
    for (rows, path, reason) in [
        (vec![listed(b"twin", file(0)), listed(b"good", file(4)), listed(b"twin", file(9))], "'twin'", "listed twice"),
        (vec![listed(b"twin", file(0)), listed(b"twin", Content::Directory)], "'twin'", "listed twice"),
        (vec![listed(b"both", file(0)), listed(b"both/below", file(0))], "'both/below'", "not a directory"),
        (vec![listed(b"both/a/b", file(0)), listed(b"both", file(0))], "'both/a/b'", "not a directory"),
        (
            vec![listed(b"both", Content::Symlink { target: (*b"/etc").into() }), listed(b"both/f", file(0))],
            "'both/f'",
            "not a directory",
        ),
    ] {
        // In one message, and in one for each row.
        for split in [false, true] {
            let mut agent = Agent::new();
            agent.begin("/data").unwrap();
            match split {
                false => drop(agent.entries(&rows.concat()).unwrap()),
                true => rows.iter().for_each(|row| drop(agent.entries(row).unwrap())),
            }
            let answer = agent.ask("diff", &[]);
            agent.assert_rejected(answer, path, reason);
        }
    }
}

#[test]
fn what_lockstep_keeps_for_itself_is_no_place_for_a_file() {
    for name in [&b".lockstep/manifest"[..], b"sub/.lockstep"] {
        let mut agent = Agent::new();
        agent.begin("/data").unwrap();
        agent.entries(&listed(name, file(0))).unwrap();
        let refused = agent.ask("diff", &[]).unwrap_err();
        assert!(refused.contains("keeps for itself"), "{refused}");
        assert!(agent.commit().is_err());
        drop(agent.server.take());
        agent.assert_untouched(&refused);
        let log = lines(&agent.path("data"));
        let told = log.iter().any(|line| {
            line["action"] == "refuse" && line["reason"].as_str().unwrap().contains(std::str::from_utf8(name).unwrap())
        });
        assert!(told, "{log:?}");
    }
}

#[test]
fn h01_h02_a_run_on_a_directory_that_is_not_the_clients_is_refused_and_recorded() {
    for (root, reason) in [("/../outside", "'..' component"), ("/data/.lockstep", "keeps for itself")] {
        let mut agent = Agent::new();
        let refused = agent.begin(root).unwrap_err();
        assert!(refused.contains(reason), "{refused}");
        drop(agent.server.take());
        agent.assert_untouched(root);
        let log = lines(agent.at.path());
        let [line] = &log[..] else { panic!("{log:?}") };
        assert_eq!((line["action"].as_str(), line["path"].as_str()), (Some("refuse"), Some(root)));
        assert!(line["reason"].as_str().unwrap().contains(reason), "{line}");
    }
}

#[test]
fn h20_a_bomb_is_refused_before_it_grows() {
    // A gigabyte of zeros in some 32 KiB, in a message that admits to 300,000 bytes, to two megabytes, and to all of it.
    let bomb = {
        let mut encoder = ::zstd::stream::Encoder::new(Vec::new(), 1).unwrap();
        encoder.set_pledged_src_size(Some(1 << 30)).unwrap();
        encoder.include_checksum(true).unwrap();
        let zeros = vec![0; 16 << 20];
        (0..64).for_each(|_| std::io::Write::write_all(&mut encoder, &zeros).unwrap());
        encoder.finish().unwrap()
    };
    assert!(bomb.len() < 64 << 10, "{}", bomb.len());
    for (declared, reason) in [(SIZE as u32, "another length"), (2 << 20, "offset"), (1 << 30, "declared length")] {
        let mut agent = Agent::new();
        agent.opened();
        let before = agent.server.as_ref().unwrap().peak_kib();
        let answer = agent.ask("write", &write(0, &coded(declared, &bomb)));
        let grown = agent.server.as_ref().unwrap().peak_kib() - before;
        assert!(grown < 16 << 10, "{grown} KiB more");
        agent.assert_rejected(answer, if declared == SIZE as u32 { "'sub/file'" } else { "" }, reason);
    }
    // In a list of entries, and in a message with many files.
    let mut agent = Agent::new();
    agent.begin("/data").unwrap();
    let answer = agent.ask("entries", &coded(1000, &bomb));
    agent.assert_rejected(answer, "", "another length");
}

#[test]
fn h21_frames_that_are_cut_doubled_or_damaged_reject_the_run() {
    let data: Vec<u8> = (0..75_000_u32).flat_map(|n| (n.wrapping_mul(n) / 7).to_le_bytes()).collect();
    assert_eq!(data.len() as u64, SIZE);
    let good = zstd(&data);
    let bare = {
        let mut plain = ::zstd::bulk::Compressor::new(3).unwrap();
        plain.include_checksum(false).unwrap();
        plain.compress(&data).unwrap()
    };
    let flipped = |frame: &[u8], at: usize| {
        let mut frame = frame.to_vec();
        frame[at] ^= 0x10;
        frame
    };
    let half = zstd(&data[..150_000]);
    let cases = [
        ("cut in the middle", good[..good.len() / 2].to_vec(), "truncated"),
        ("without its last byte", good[..good.len() - 1].to_vec(), "truncated"),
        ("without any", Vec::new(), "zstd frame"),
        ("two frames", [&half[..], &half].concat(), "another length"),
        ("followed by another", [&good[..], &good].concat(), "followed by"),
        ("followed by a byte", [&good[..], b"x"].concat(), "followed by"),
        ("a bit flipped in the middle", flipped(&good, good.len() / 2), "zstd frame"),
        ("a bit flipped in the checksum", flipped(&good, good.len() - 2), "damaged"),
        ("without a checksum", bare.clone(), "no checksum"),
        ("a bit flipped, without a checksum", flipped(&bare, bare.len() / 2), "no checksum"),
        ("of no known kind", b"not a frame at all".to_vec(), "not a zstd frame"),
    ];
    for (what, bytes, reason) in cases {
        let mut agent = Agent::new();
        agent.opened();
        let answer = agent.ask("write", &write(0, &coded(SIZE as u32, &bytes)));
        assert!(answer.as_ref().is_err_and(|message| message.contains(reason)), "{what}: {answer:?}");
        agent.assert_rejected(answer, "'sub/file'", reason);
    }
}

#[test]
fn h22_a_frame_that_asks_for_a_wide_window_is_refused_before_anything_is_allocated() {
    // By hand (RFC 8878): magic, 4 bytes of content size and a checksum, a window of 1 GiB, the size.
    let head = [&[0x28, 0xb5, 0x2f, 0xfd, 0x84, 20 << 3][..], &(SIZE as u32).to_le_bytes(), &[0; 64]].concat();
    let mut agent = Agent::new();
    agent.opened();
    let before = agent.server.as_ref().unwrap().peak_kib();
    let answer = agent.ask("write", &write(0, &coded(SIZE as u32, &head)));
    let grown = agent.server.as_ref().unwrap().peak_kib() - before;
    assert!(grown < 16 << 10, "{grown} KiB more");
    agent.assert_rejected(answer, "'sub/file'", "window");
}

#[test]
fn h23_sizes_and_offsets_that_were_not_declared_reject_the_run() {
    let raw = |length: u32| [&[0][..], &length.to_be_bytes(), &vec![1; length as usize]].concat();
    let cases = [
        ("beyond the end", write(SIZE - 2, &raw(4)), "offset"),
        ("at the last offset there is", write(u64::MAX, &raw(4)), "offset"),
        ("at 2^63", write(1 << 63, &raw(4)), "offset"),
        ("shorter than it says", write(0, &[&[0][..], &8_u32.to_be_bytes(), &[1; 4]].concat()), "declared length"),
        ("longer than it says", write(0, &[&[0][..], &2_u32.to_be_bytes(), &[1; 4]].concat()), "declared length"),
        ("of 4 GiB", write(0, &[&[0][..], &u32::MAX.to_be_bytes(), &[1; 4]].concat()), "declared length"),
    ];
    for (what, body, reason) in cases {
        let mut agent = Agent::new();
        agent.opened();
        let answer = agent.ask("write", &body);
        assert!(answer.is_err(), "{what}");
        agent.assert_rejected(answer, "'sub/file'", reason);
    }
    // A file of 2^63 bytes has no room here, and none is allocated for it.
    for size in [1 << 63, u64::MAX] {
        let mut agent = Agent::new();
        agent.begin("/data").unwrap();
        agent.entries(&listed(b"huge", file(size))).unwrap();
        let refused = agent.ask("diff", &[]).unwrap_err();
        assert!(refused.contains("free"), "{refused}");
        drop(agent.server.take());
        agent.assert_untouched(&refused);
    }
    // Less than was declared is no file either, but one that may be sent again.
    let mut agent = Agent::new();
    agent.opened();
    agent.ask("write", &write(0, &raw(4))).unwrap();
    let reply = agent.ask("finish", &[&1_u32.to_be_bytes()[..], &sha256(&[1; 4]).0].concat()).unwrap();
    assert_eq!(reply[..4], 1_u32.to_be_bytes());
    assert!(String::from_utf8_lossy(&reply).contains("4 bytes came, 300000 were announced"));
}

#[test]
fn h24_content_that_is_not_what_was_declared_is_not_published_and_recorded() {
    let mut agent = Agent::new();
    agent.begin("/data").unwrap();
    agent.entries(&[listed(b"bad", file(4)), listed(b"good", file(4))].concat()).unwrap();
    agent.ask("diff", &[]).unwrap();
    let mut body = put(&[(0, b"fake"), (1, b"good")]);
    // The digest of other content.
    body[8..40].copy_from_slice(&sha256(b"true").0);
    let reply = agent.ask("put", &body).unwrap();
    assert_eq!(reply[..4], 1_u32.to_be_bytes());
    // A client that does not say that the file failed does not get it published.
    let reply = agent.commit().unwrap();
    let committed: Committed = serde_json::from_slice(Reader(&reply).string().unwrap()).unwrap();
    assert_eq!(committed.published, 1);
    drop(agent.server.take());
    assert!(!agent.path("data/bad").exists() && agent.path("data/good").exists());
    let log = lines(&agent.path("data"));
    let refusal = log.iter().find(|line| line["action"] == "refuse").unwrap();
    assert_eq!(refusal["path"], "bad");
    assert!(refusal["reason"].as_str().unwrap().contains(&sha256(b"true").to_string()), "{refusal}");
    assert!(!log.iter().any(|line| line["action"] == "publish" && line["path"] == "bad"));
}

#[test]
fn h21_what_was_to_become_a_new_directory_is_refused_and_recorded_as_well() {
    let mut agent = Agent::new();
    agent.begin("/new").unwrap();
    agent.entries(&listed(b"file", file(SIZE))).unwrap();
    agent.ask("diff", &[]).unwrap();
    agent.ask("open", &[0; 12]).unwrap();
    let half = vec![7; 150_000];
    agent.ask("write", &[&[0; 12][..], &coded(150_000, &zstd(&half))].concat()).unwrap();
    let next = [&0_u32.to_be_bytes()[..], &150_000_u64.to_be_bytes(), &coded(150_000, b"junk")].concat();
    assert!(agent.ask("write", &next).unwrap_err().contains("'file'"));
    drop(agent.server.take());
    assert!(!agent.path("new").exists() && !agent.path(".new.lockstep/.lockstep/staging/current").exists());
    // The log becomes that of the directory when a run is good.
    assert_eq!(lines(&agent.path(".new.lockstep"))[0]["path"], "file");
    agent.server = Some(Server::confined(agent.at.path()));
    agent.begin("/new").unwrap();
    agent.entries(&listed(b"file", file(4))).unwrap();
    agent.ask("diff", &[]).unwrap();
    agent.ask("put", &put(&[(0, b"good")])).unwrap();
    agent.commit().unwrap();
    drop(agent.server.take());
    let actions: Vec<_> = lines(&agent.path("new")).iter().map(|line| line["action"].to_string()).collect();
    assert_eq!(actions, ["\"refuse\"", "\"publish\""]);
}

#[test]
fn h14_a_directory_that_becomes_a_link_in_mid_transfer_leads_nowhere_and_its_unit_is_not_published() {
    for units in [vec![], vec!["sub/".to_owned()]] {
        for sent_first in [true, false] {
            let when = format!("units {units:?}, sent first: {sent_first}");
            let mut agent = Agent::new();
            agent.sent(&units);
            let put = put(&[(1, b"new!")]);
            if sent_first {
                agent.ask("put", &put).unwrap();
            }
            agent.swap("data/sub");
            if !sent_first {
                agent.ask("put", &put).unwrap();
            }
            let told = match agent.commit() {
                Ok(reply) => {
                    let text = Reader(&reply).string().unwrap().to_vec();
                    let committed: Committed = serde_json::from_slice(&text).unwrap();
                    let about: Vec<_> = committed.problems.iter().map(|(path, _)| path.as_str()).collect();
                    assert!(about.iter().any(|path| path.starts_with("sub")), "{when}: {about:?}");
                    committed.problems.into_iter().map(|(path, why)| path + ": " + &why).collect()
                }
                Err(refusal) => refusal,
            };
            assert!(told.contains("sub"), "{when}: {told}");
            drop(agent.server.take());
            agent.assert_nothing_outside(&when);
            assert_eq!(fs::read(agent.path("moved/file")).unwrap(), b"old!", "{when}");
            assert!(
                !lines(&agent.path("data"))
                    .iter()
                    .any(|line| line["action"] == "publish" && line["path"].as_str().unwrap().starts_with("sub/")),
                "{when}: it is recorded as published"
            );
        }
    }
}

#[test]
fn h14_a_staging_directory_that_becomes_a_link_leads_nowhere() {
    for name in ["tree/sub", "tree", ""] {
        let mut agent = Agent::new();
        agent.sent(&[]);
        agent.swap(Path::new("data/.lockstep/staging/current").join(name).to_str().unwrap().trim_end_matches('/'));
        let answer = agent.ask("put", &put(&[(1, b"new!")]));
        assert!(
            answer.is_err() || answer.unwrap()[..4] == 1_u32.to_be_bytes() || name.is_empty(),
            "{name} was written to"
        );
        let _ = agent.commit();
        drop(agent.server.take());
        agent.assert_nothing_outside(name);
    }
}

#[test]
fn h17_another_name_of_a_file_outside_that_is_planted_in_staging_is_not_written_through() {
    for in_pieces in [false, true] {
        let mut agent = Agent::new();
        agent.sent(&[]);
        fs::write(agent.path("outside/victim"), "precious").unwrap();
        let planted = agent.path("data/.lockstep/staging/current/tree/sub/file");
        fs::hard_link(agent.path("outside/victim"), &planted).unwrap();
        if in_pieces {
            let index = 1_u32.to_be_bytes();
            agent.ask("open", &[&index[..], &[0; 8]].concat()).unwrap();
            agent.ask("write", &write(0, &frame(b"new!"))).unwrap();
            agent.ask("finish", &[&index[..], &sha256(b"new!").0].concat()).unwrap();
        } else {
            agent.ask("put", &put(&[(1, b"new!")])).unwrap();
        }
        agent.commit().unwrap();
        drop(agent.server.take());
        assert_eq!(fs::read(agent.path("outside/victim")).unwrap(), b"precious");
        assert_eq!(fs::read(agent.path("data/sub/file")).unwrap(), b"new!");
        let links = std::os::unix::fs::MetadataExt::nlink(&fs::metadata(agent.path("outside/victim")).unwrap());
        assert_eq!(links, 1);
    }
}

#[test]
fn h14_a_root_that_becomes_a_link_is_left_where_it_went() {
    let mut agent = Agent::new();
    agent.sent(&[]);
    agent.ask("put", &put(&[(1, b"new!")])).unwrap();
    agent.swap("data");
    let _ = agent.commit();
    drop(agent.server.take());
    agent.assert_nothing_outside("the root");
}

#[test]
fn s08_s10_what_arrives_is_private_until_it_is_proven_on_the_disk() {
    for (meddled, mode, published) in [(false, 0o744, true), (true, 0o744, false)] {
        let mut agent = Agent::new();
        agent.begin("/data").unwrap();
        let mut entry = listed(b"update.bin", file(8));
        let at = entry.windows(4).rposition(|bytes| bytes == 0o644_u32.to_be_bytes()).unwrap();
        entry[at..at + 4].copy_from_slice(&u32::to_be_bytes(mode));
        agent.entries(&entry).unwrap();
        agent.ask("diff", &[]).unwrap();
        agent.ask("open", &[0; 12]).unwrap();
        agent.ask("write", &[&[0; 12][..], &frame(b"harm")].concat()).unwrap();
        let staged = agent.path("data/.lockstep/staging/current/tree/update.bin");
        let mode_of = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o7777;
        // Nobody else may look at it, nor into any directory on the way to it, and it has no name yet.
        assert_eq!(mode_of(&staged), 0o600);
        assert!(staged.ancestors().skip(1).take(3).all(|above| mode_of(above) & 0o077 == 0));
        assert!(!agent.path("data/update.bin").exists());
        agent.ask("write", &[&0_u32.to_be_bytes()[..], &4_u64.to_be_bytes(), &frame(b"less")].concat()).unwrap();
        if meddled {
            // What was written is right, and what lies on the disk is not.
            fs::write(&staged, "harmful!").unwrap();
        }
        let reply = agent.ask("finish", &[&[0; 4][..], &sha256(b"harmless").0].concat()).unwrap();
        assert_eq!(reply[..4] == 0_u32.to_be_bytes(), published);
        agent.commit().unwrap();
        drop(agent.server.take());
        assert_eq!(agent.path("data/update.bin").exists(), published);
        if published {
            assert_eq!(mode_of(&agent.path("data/update.bin")), mode);
        }
    }
}
