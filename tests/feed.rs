//! From the file system to "this may be sent now": real directories, real writers.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::Write as _;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use lockstep::config::{Layout, Ready as When, Watch};
use lockstep::daemon::feed::{Feed, FeedOptions, Ready};
use lockstep::path::RelPath;

use crate::kit::until;

fn rel(path: &str) -> RelPath {
    RelPath::new(path).unwrap()
}

fn set(paths: &[&str]) -> BTreeSet<RelPath> {
    paths.iter().map(|path| rel(path)).collect()
}

fn options() -> FeedOptions {
    FeedOptions {
        settle: Duration::ZERO,
        unit: Some("ckpt-*/".into()),
        ready: When::Settled,
        last: vec![],
        append_only: vec![],
        exclude: vec!["*.log".into(), "cache/".into()],
        watch: Watch::Events,
        poll: Duration::from_millis(50),
        rescan: Duration::from_secs(3600),
        mount_note: None,
        mounts_note: None,
    }
}

struct Source {
    at: tempfile::TempDir,
    feed: Option<Feed>,
}

impl Source {
    fn new() -> Source {
        let at = tempfile::tempdir().unwrap();
        fs::create_dir(at.path().join("source")).unwrap();
        Source { at, feed: None }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.at.path().join("source").join(name)
    }

    fn write(&self, name: &str, content: &str) {
        fs::write(self.path(name), content).unwrap();
    }

    fn start(&mut self, options: FeedOptions) {
        self.feed = Some(Feed::start(&self.path(""), options).unwrap());
    }

    /// Started, and the first look is done.
    fn started(&mut self, options: FeedOptions) -> BTreeSet<RelPath> {
        self.start(options);
        self.everything()
    }

    fn feed(&self) -> &Feed {
        self.feed.as_ref().unwrap()
    }

    fn next(&self) -> Option<Ready> {
        self.feed().next(Some(Instant::now() + Duration::from_millis(20)))
    }

    /// Waits until everything was looked at, and says what was left out.
    fn everything(&self) -> BTreeSet<RelPath> {
        let mut found = None;
        until("everything to be looked at", || {
            if let Some(Ready::Everything { except }) = self.next() {
                found = Some(except);
            }
            found.is_some()
        });
        found.unwrap()
    }

    /// Waits until all of these became ready, and gives what did.
    #[track_caller]
    fn ready(&self, wanted: &BTreeSet<RelPath>) -> BTreeSet<RelPath> {
        let mut found = BTreeSet::new();
        until(&format!("{wanted:?}"), || {
            match self.next() {
                Some(Ready::Paths(paths)) => found.extend(paths),
                Some(Ready::Everything { except }) => {
                    found.extend(wanted.iter().filter(|path| !except.iter().any(|left| path.is_within(left))).cloned());
                }
                Some(Ready::Early(_)) | None => {}
            }
            wanted.iter().all(|path| found.contains(path))
        });
        found
    }

    #[track_caller]
    fn just(&self, wanted: &[&str]) {
        assert_eq!(self.ready(&set(wanted)), set(wanted));
    }

    fn unfinished(&self) -> Vec<String> {
        self.feed().unfinished().0
    }
}

#[test]
fn what_changes_is_told_by_its_name() {
    let mut source = Source::new();
    source.write("a", "before");
    fs::create_dir_all(source.path("d/e")).unwrap();
    assert_eq!(source.started(options()), set(&[]));
    assert_eq!(source.feed().watching().mode, "events");
    assert_eq!(source.feed().watching().directories, 3);
    source.write("d/e/new", "content");
    source.just(&["d/e/new"]);
    let mut file = File::options().append(true).open(source.path("a")).unwrap();
    file.write_all(b"more").unwrap();
    drop(file);
    source.just(&["a"]);
    source.write("a.tmp", "replaced");
    fs::rename(source.path("a.tmp"), source.path("a")).unwrap();
    source.just(&["a"]);
    fs::rename(source.path("a"), source.path("d/b")).unwrap();
    source.just(&["a", "d/b"]);
    fs::remove_file(source.path("d/b")).unwrap();
    source.just(&["d/b"]);
    std::os::unix::fs::symlink("nowhere", source.path("link")).unwrap();
    source.just(&["link"]);
    fs::hard_link(source.path("d/e/new"), source.path("second")).unwrap();
    source.ready(&set(&["second"]));
    fs::set_permissions(source.path("d/e"), std::os::unix::fs::PermissionsExt::from_mode(0o750)).unwrap();
    source.ready(&set(&["d/e"]));
    // By its name alone it changes, and nobody closes it.
    let program = "import os, sys; os.truncate(sys.argv[1], 1)";
    let python = std::process::Command::new("python3").args(["-c", program]).arg(source.path("d/e/new")).status();
    assert!(python.expect("python3 is not installed: Debian package python3").success());
    source.ready(&set(&["d/e/new"]));
    fs::create_dir(source.path("empty")).unwrap();
    source.just(&["empty"]);
    // What stays out is not told of, wherever it is.
    fs::create_dir_all(source.path("cache/x")).unwrap();
    fs::create_dir_all(source.path("d/.lockstep")).unwrap();
    source.write("cache/x/file", "x");
    source.write("d/.lockstep/file", "x");
    source.write("d/train.log", "x");
    source.write("last", "x");
    source.just(&["last"]);
    assert_eq!((source.feed().unfinished(), source.feed().gone()), ((vec![], 0), None));
}

#[test]
fn names_of_any_bytes() {
    let mut source = Source::new();
    source.started(options());
    let names: [&[u8]; 4] = [b"two\nlines", b"caf\xe9", b" -rf ", b"\x1b[31m"];
    let directory = source.at.path().join("source").join(OsStr::from_bytes(b"d\n\xff"));
    fs::create_dir(&directory).unwrap();
    for name in names {
        fs::write(directory.join(OsStr::from_bytes(name)), "x").unwrap();
    }
    let wanted = names.iter().map(|name| RelPath::new([b"d\n\xff/", *name].concat()).unwrap()).collect();
    source.ready(&wanted);
    let held = File::create(directory.join(OsStr::from_bytes(b"held\n"))).unwrap();
    until("it to be noticed", || source.unfinished() == ["d\\n\\xff/held\\n"]);
    drop(held);
    source.ready(&BTreeSet::from([RelPath::new(b"d\n\xff/held\n").unwrap()]));
}

#[test]
fn a_file_that_is_held_open_waits_for_its_close_however_long_it_rests() {
    let mut source = Source::new();
    let mut before = File::create(source.path("before")).unwrap();
    before.write_all(b"half").unwrap();
    fs::create_dir(source.path("ckpt-1")).unwrap();
    let in_unit = File::create(source.path("ckpt-1/w")).unwrap();
    let options = FeedOptions { settle: Duration::from_millis(50), ..options() };
    assert_eq!(source.started(options), set(&["before", "ckpt-1"]), "what was open at the start is left out");
    let mut file = File::create(source.path("held")).unwrap();
    file.write_all(b"half").unwrap();
    source.write("other", "whole");
    source.just(&["other"]);
    // Long enough for it to be asked whether somebody holds it, more than once.
    let rested = Instant::now() + Duration::from_millis(3500);
    until("it to rest", || {
        assert_eq!(source.next(), None);
        Instant::now() > rested
    });
    assert_eq!(source.unfinished(), ["before", "ckpt-1", "held"]);
    drop(file);
    source.just(&["held"]);
    // What has just become ready may be named once more, when it was asked about at that moment.
    drop(before);
    source.ready(&set(&["before"]));
    drop(in_unit);
    source.ready(&set(&["ckpt-1"]));
}

#[test]
fn whether_a_file_is_being_written_is_known_at_the_moment_of_asking() {
    let mut source = Source::new();
    source.write("a", "x");
    fs::create_dir(source.path("ckpt-1")).unwrap();
    source.write("ckpt-1/w", "x");
    source.write("b.tmp", "x");
    source.started(options());
    let in_hands = |path: &str| source.feed().is_being_written(&rel(path));
    assert!(!in_hands("a") && !in_hands("ckpt-1/w") && in_hands("b.tmp"));
    for round in 0..300 {
        let mut file = File::options().append(true).open(source.path("a")).unwrap();
        file.write_all(b"more").unwrap();
        assert!(in_hands("a"), "{round}");
        assert_eq!(source.feed().held_back(), set(&["a", "b.tmp"]), "{round}");
        drop(file);
        assert!(!in_hands("a"), "{round}");
    }
    let file = File::create(source.path("ckpt-1/v")).unwrap();
    assert!(in_hands("ckpt-1/w"), "the unit changes");
    drop(file);
    assert!(!in_hands("ckpt-1/w"));
}

#[test]
fn directories_that_are_moved_in_out_and_within() {
    let mut source = Source::new();
    let outside = source.at.path().join("outside");
    fs::create_dir_all(outside.join("sub")).unwrap();
    fs::write(outside.join("sub/f"), "x").unwrap();
    source.started(options());
    fs::rename(&outside, source.path("in")).unwrap();
    source.ready(&set(&["in/sub/f"]));
    source.write("in/sub/g", "x");
    source.just(&["in/sub/g"]);
    fs::rename(source.path("in"), source.path("within")).unwrap();
    source.ready(&set(&["in", "within/sub/f", "within/sub/g"]));
    source.write("within/sub/h", "x");
    source.just(&["within/sub/h"]);
    // Both halves, with something new in the place of the old one.
    fs::create_dir_all(source.path("in/sub")).unwrap();
    source.write("in/sub/f", "other");
    source.ready(&set(&["in/sub/f"]));
    fs::rename(source.path("within"), &outside).unwrap();
    source.ready(&set(&["within"]));
    fs::write(outside.join("sub/unseen"), "x").unwrap();
    source.write("last", "x");
    source.just(&["last"]);
    assert_eq!(source.feed().unfinished().1, 0);
    fs::remove_dir_all(source.path("in")).unwrap();
    source.ready(&set(&["in"]));
}

#[test]
fn a_thousand_directories_at_once_leave_no_gap() {
    let mut source = Source::new();
    source.started(options());
    let mut wanted = BTreeSet::new();
    for number in 0..1000 {
        let directory = format!("{}/{}/{number}", number % 10, number % 7);
        fs::create_dir_all(source.path(&directory)).unwrap();
        source.write(&format!("{directory}/f"), "x");
        wanted.insert(rel(&format!("{directory}/f")));
    }
    source.ready(&wanted);
    // Each of them is watched.
    for number in [0, 500, 999] {
        let file = format!("{}/{}/{number}/again", number % 10, number % 7);
        source.write(&file, "x");
        source.ready(&set(&[&file]));
    }
}

#[test]
fn units_by_settling_marker_and_layout() {
    let mut source = Source::new();
    source.started(FeedOptions { settle: Duration::from_millis(300), ..options() });
    fs::create_dir(source.path("ckpt-1")).unwrap();
    for number in 0..10 {
        source.write(&format!("ckpt-1/{number}"), "x");
        std::thread::sleep(Duration::from_millis(50));
    }
    source.write("latest", "ckpt-1");
    source.just(&["ckpt-1", "latest"]);

    let mut source = Source::new();
    let marked = FeedOptions { settle: Duration::from_secs(3600), ready: When::Marker("_SUCCESS".into()), ..options() };
    for unit in ["ckpt-1", "ckpt-2"] {
        fs::create_dir(source.path(unit)).unwrap();
        source.write(&format!("{unit}/w"), "x");
    }
    source.write("ckpt-1/_SUCCESS", "");
    source.write("latest", "ckpt-2");
    let except = source.started(FeedOptions { settle: Duration::ZERO, ..marked.clone() });
    assert_eq!(except, set(&["ckpt-2", "latest"]), "the unit is not marked, and the pointer names it");
    source.write("ckpt-2/v", "x");
    source.write("other", "x");
    source.just(&["other"]);
    source.write("ckpt-2/_SUCCESS", "");
    source.just(&["ckpt-2", "latest"]);
    // The marker alone is enough.
    source.feed = None;
    source.start(marked);
    source.everything();
    fs::create_dir(source.path("ckpt-3")).unwrap();
    source.write("ckpt-3/w", "x");
    source.write("ckpt-3/_SUCCESS", "");
    source.just(&["ckpt-3"]);
}

#[test]
fn units_of_megatron_and_deepspeed_and_hugging_face() {
    let layout = |unit: &str, layout| FeedOptions { unit: Some(unit.into()), ready: When::Layout(layout), ..options() };
    let mut source = Source::new();
    let rank = |source: &Source, iteration: &str| {
        fs::create_dir_all(source.path(&format!("{iteration}/mp_rank_00"))).unwrap();
        source.write(&format!("{iteration}/mp_rank_00/optim.bin"), "x");
    };
    rank(&source, "iter_0000005");
    assert_eq!(source.started(layout("iter_*/", Layout::Megatron)), set(&["iter_0000005"]));
    source.write("latest_checkpointed_iteration.txt", "5");
    source.just(&["iter_0000005", "latest_checkpointed_iteration.txt"]);
    rank(&source, "iter_0000010");
    source.write("other", "x");
    source.just(&["other"]);
    assert_eq!(source.unfinished(), ["iter_0000010"]);
    source.write("latest_checkpointed_iteration.txt", "10");
    source.just(&["iter_0000010", "latest_checkpointed_iteration.txt"]);

    let mut source = Source::new();
    source.started(layout("global_step*/", Layout::DeepSpeed));
    fs::create_dir(source.path("global_step5")).unwrap();
    source.write("global_step5/bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt", "");
    source.write("other", "x");
    source.just(&["other"]);
    assert_eq!(source.unfinished(), ["global_step5"]);

    let mut source = Source::new();
    let shards =
        r#"{"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}"#;
    let safetensors = |name: &str| {
        let header = r#"{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}"#;
        let bytes = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), b"x"].concat();
        fs::write(name, bytes).unwrap();
    };
    source.started(layout("checkpoint-*/", Layout::HuggingFace));
    fs::create_dir(source.path("checkpoint-5")).unwrap();
    source.write("checkpoint-5/model.safetensors.index.json", shards);
    safetensors(source.path("checkpoint-5/model-00001-of-00002.safetensors").to_str().unwrap());
    source.write("other", "x");
    source.just(&["other"]);
    assert_eq!(source.unfinished(), ["checkpoint-5"]);
    safetensors(source.path("checkpoint-5/model-00002-of-00002.safetensors").to_str().unwrap());
    source.just(&["checkpoint-5"]);
    // As older trainers save: under another name until it is whole.
    fs::create_dir(source.path("tmp-checkpoint-6")).unwrap();
    safetensors(source.path("tmp-checkpoint-6/model.safetensors").to_str().unwrap());
    source.write("another", "x");
    source.just(&["another"]);
    fs::rename(source.path("tmp-checkpoint-6"), source.path("checkpoint-6")).unwrap();
    source.just(&["checkpoint-6"]);
}

#[test]
fn polling_sees_what_events_would_tell() {
    let mut source = Source::new();
    source.write("a", "x");
    fs::create_dir_all(source.path("d/e")).unwrap();
    source.write("d/e/f", "x");
    source.write("half.tmp", "x");
    let polling = FeedOptions { watch: Watch::Polling, settle: Duration::from_millis(100), ..options() };
    assert_eq!(source.started(polling), set(&["half.tmp"]));
    let watching = source.feed().watching();
    assert_eq!((watching.mode.as_str(), watching.directories, watching.why.is_some()), ("polling", 3, true));
    source.write("a", "y");
    source.just(&["a"]);
    source.write("d/e/new", "x");
    source.just(&["d/e/new"]);
    fs::rename(source.path("half.tmp"), source.path("whole")).unwrap();
    source.just(&["whole"]);
    fs::create_dir(source.path("ckpt-1")).unwrap();
    source.write("ckpt-1/w", "x");
    source.just(&["ckpt-1"]);
    // What is missing is found by comparing everything.
    fs::remove_file(source.path("d/e/f")).unwrap();
    source.everything();
    fs::remove_dir_all(source.path("d/e")).unwrap();
    source.ready(&set(&["d/e"]));
    // Written to all the time it is not ready, though no look sees it twice the same.
    let mut file = File::create(source.path("growing")).unwrap();
    for _ in 0..30 {
        file.write_all(b"more").unwrap();
        if let Some(Ready::Paths(paths)) = source.next() {
            assert!(!paths.contains(&rel("growing")), "{paths:?}");
        }
    }
    source.ready(&set(&["growing"]));
}

#[test]
fn h38_a_root_that_is_removed_made_again_or_replaced_is_looked_at_from_the_start() {
    for watch in [Watch::Events, Watch::Polling] {
        let mut source = Source::new();
        source.write("a", "x");
        source.started(FeedOptions { watch, ..options() });
        fs::rename(source.path(""), source.at.path().join("elsewhere")).unwrap();
        until("it to be missed", || source.feed().gone().is_some());
        let said = source.feed().gone().unwrap();
        assert!(said.contains("source") && said.contains("No such file"), "{said}");
        while let Some(ready) = source.next() {
            assert!(!matches!(ready, Ready::Everything { .. }), "{ready:?}");
        }
        fs::create_dir(source.path("")).unwrap();
        source.write("b", "x");
        source.everything();
        assert_eq!(source.feed().gone(), None);
        source.write("c", "x");
        source.ready(&set(&["c"]));
        // Replaced in one step.
        let (one, two) = (source.path(""), source.at.path().join("elsewhere"));
        let at = rustix::fs::CWD;
        rustix::fs::renameat_with(at, &one, at, &two, rustix::fs::RenameFlags::EXCHANGE).unwrap();
        source.everything();
        source.write("d", "x");
        source.ready(&set(&["d"]));
        fs::remove_dir_all(source.path("")).unwrap();
        until("it to be missed", || source.feed().gone().is_some());
        fs::write(source.path(""), "a file").unwrap_or(());
    }
    // One that is not there at first.
    let mut source = Source::new();
    fs::remove_dir(source.path("")).unwrap();
    source.start(options());
    until("it to be missed", || source.feed().gone().is_some());
    fs::create_dir(source.path("")).unwrap();
    source.everything();
}

#[test]
fn h38_two_directories_that_are_exchanged_are_both_followed_on() {
    let mut source = Source::new();
    for directory in ["a/in", "b/in"] {
        fs::create_dir_all(source.path(directory)).unwrap();
    }
    source.started(options());
    let at = rustix::fs::CWD;
    let exchange = rustix::fs::RenameFlags::EXCHANGE;
    rustix::fs::renameat_with(at, source.path("a"), at, source.path("b"), exchange).unwrap();
    for name in ["a/new", "b/new", "a/in/new", "b/in/new"] {
        source.write(name, "x");
        source.ready(&set(&[name]));
    }
}

#[test]
fn h38_a_directory_above_the_root_that_is_replaced_is_noticed_though_no_event_tells() {
    for watch in [Watch::Events, Watch::Polling] {
        let mut source = Source::new();
        fs::create_dir_all(source.path("up/root")).unwrap();
        source.feed = Some(Feed::start(&source.path("up/root"), FeedOptions { watch, ..options() }).unwrap());
        source.everything();
        fs::rename(source.path("up"), source.path("away")).unwrap();
        fs::create_dir_all(source.path("up/root")).unwrap();
        source.everything();
        source.write("up/root/a", "x");
        source.ready(&set(&["a"]));
    }
}

#[test]
fn a_feed_ends_and_everything_is_looked_at_every_so_often() {
    let mut source = Source::new();
    source.started(FeedOptions { rescan: Duration::from_millis(200), ..options() });
    source.everything();
    source.everything();
    source.feed().stop();
    assert_eq!(source.feed().next(None), None);
    source.feed = None;
    let wrong = FeedOptions { unit: Some("a[z-b]".into()), ..options() };
    let error = Feed::start(Path::new("/"), wrong).map(drop).unwrap_err();
    assert!(format!("{:?}", error.reason).contains("a[z-b]"), "{error:?}");
}

/// What is left out by files in the source is not watched, sends nothing, and counts again when the file says otherwise.
fn ignore_files_count(watch: Watch) {
    let mut source = Source::new();
    fs::create_dir_all(source.path("sub/scratch/deep")).unwrap();
    fs::create_dir(source.path("plain")).unwrap();
    source.write(".lockstepignore", "/scratch/\n*.bak\n");
    source.write("sub/.lockstepignore", "scratch/\n!keep.bak\n");
    source.write("sub/scratch/old", "x");
    source.started(FeedOptions { watch, ..options() });
    assert_eq!(source.feed().watching().directories, 3, "the top, 'plain' and 'sub'");
    fs::create_dir(source.path("scratch")).unwrap();
    for name in ["sub/scratch/deep/x", "x.bak", "plain/y.bak", "scratch/new"] {
        source.write(name, "left out");
    }
    source.write("sub/keep.bak", "taken in");
    source.just(&["sub/keep.bak"]);
    // The file says otherwise: what it left out is looked at, and followed from then on.
    source.write("sub/.lockstepignore", "!keep.bak\n");
    until("the directories to be followed", || {
        source.next();
        source.feed().watching().directories == 5
    });
    source.write("sub/scratch/deep/x", "taken in");
    source.ready(&set(&["sub/scratch/deep/x"]));
    // And the other way round, by a file that takes the place of another.
    source.write("plain/new.tmp", "*.txt\n");
    fs::rename(source.path("plain/new.tmp"), source.path("plain/.lockstepignore")).unwrap();
    source.ready(&set(&["plain/.lockstepignore"]));
    source.write("plain/a.txt", "left out");
    source.write("plain/b.json", "taken in");
    source.just(&["plain/b.json"]);
    assert_eq!(source.unfinished(), Vec::<String>::new());
}

#[test]
fn ignore_files_of_the_source_count_by_events() {
    ignore_files_count(Watch::Events);
}

#[test]
fn ignore_files_of_the_source_count_by_polling() {
    ignore_files_count(Watch::Polling);
}
