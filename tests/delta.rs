//! Of what the other end has already nothing is sent: changes within files, renamed files, the next checkpoint beside the last.

use std::fs;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use lockstep::codec::chunks::{Chunk, ChunkId};
use lockstep::endpoint::delta::{Alike, Cut, Wanted, Within};
use lockstep::endpoint::local::{LocalSource, LocalTarget};
use lockstep::endpoint::{BeginOptions, Block, CommitOptions, Committed, Error, Source, Target, Writer};
use lockstep::manifest::Tree;
use lockstep::monitor::{Monitor, Silent};
use lockstep::plan::Plan;
use lockstep::policy::PolicySpec;
use lockstep::sync::{Options, run};
use sha2::Digest as _;

use crate::kit::area::{contents, options, write};
use crate::kit::served::{Served, user};
use crate::kit::{noise, summary, text};

const MIB: usize = 1 << 20;

/// Pushes the source of `served` to a directory there; how many bytes went over the wire.
fn push(served: &Served, to: &str, more: &[&str]) -> u64 {
    let source = served.path("source").display().to_string();
    let to = format!("sync@127.0.0.1:{to}");
    let output = served.lockstep(&[&["push", "--json", &source, &to], more].concat(), "sync");
    assert!(output.status.success(), "{}", text(&output));
    let summary = summary(&output);
    let there = served.path("sync").join(to.split_once(":/").unwrap().1);
    let mut found = contents(&there);
    found.retain(|path, _| !path.starts_with(".lockstep"));
    assert!(found == contents(&served.path("source")), "the target is not the source");
    summary["wire_bytes"].as_u64().unwrap()
}

#[test]
fn s25_of_a_file_that_changed_only_what_changed_is_sent() {
    let served = Served::start("", "");
    let source = served.path("source");
    let old = noise(1, 24 * MIB);
    write(&source, "sub/model.bin", &old);
    let wire = push(&served, "/data", &[]);
    assert!(wire > 24 * MIB as u64, "{wire}");
    let mut changed = old.clone();
    changed[9 * MIB..9 * MIB + 1000].fill(7);
    for (what, new, most) in [
        ("bytes in the middle", changed, 2 * MIB),
        ("a longer header", [b"a header", &old[..]].concat(), 2 * MIB),
        ("more at the end", [&old[..], &noise(2, MIB)].concat(), 3 * MIB),
        ("less at the end", old[..20 * MIB].to_vec(), 2 * MIB),
        ("parts that changed places", [&old[12 * MIB..], &old[..12 * MIB]].concat(), 6 * MIB),
    ] {
        write(&source, "sub/model.bin", &new);
        let wire = push(&served, "/data", &[]);
        assert!(wire < most as u64, "{what}: {wire} bytes");
    }
    // What is not alike is sent, and arrives.
    write(&source, "sub/model.bin", &noise(3, 12 * MIB));
    assert!(push(&served, "/data", &[]) > 12 * MIB as u64);
}

#[test]
fn files_are_sent_whole_where_that_is_asked_for() {
    let served = Served::start("", "");
    let source = served.path("source");
    let mut data = noise(1, 8 * MIB);
    write(&source, "model.bin", &data);
    push(&served, "/data", &[]);
    for (option, whole) in [("-W", true), ("--whole-file", true), ("--no-compress", false)] {
        data[9000] ^= 1;
        write(&source, "model.bin", &data);
        fs::rename(source.join("model.bin"), source.join(option.trim_start_matches('-'))).unwrap();
        write(&source, "model.bin", &data);
        let wire = push(&served, "/data", &[option, "--delete"]);
        assert_eq!(wire > data.len() as u64, whole, "{option}: {wire}");
    }
}

#[test]
fn s25_what_is_there_under_another_name_is_not_sent_again() {
    let served = Served::start("", "");
    let source = served.path("source");
    write(&source, "checkpoint-1/a.bin", &noise(1, 6 * MIB));
    write(&source, "checkpoint-1/b.bin", &noise(2, 6 * MIB));
    push(&served, "/data", &[]);
    // The next checkpoint: one layer is frozen, of the other a part has changed.
    let mut b = noise(2, 6 * MIB);
    b[MIB..MIB + 10].fill(0);
    write(&source, "checkpoint-2/a.bin", &noise(1, 6 * MIB));
    write(&source, "checkpoint-2/b.bin", &b);
    let wire = push(&served, "/data", &[]);
    assert!(wire < 2 * MIB as u64, "{wire}");
    // A file that was renamed, and one that moved, whether the others go or not.
    fs::rename(source.join("checkpoint-1/a.bin"), source.join("checkpoint-1/renamed.bin")).unwrap();
    fs::create_dir(source.join("moved")).unwrap();
    fs::rename(source.join("checkpoint-2/b.bin"), source.join("moved/b.bin")).unwrap();
    let wire = push(&served, "/data", &["--delete"]);
    assert!(wire < MIB as u64, "{wire}");
    // Into another directory below the same root, where there is nothing yet, all is sent: a target is what was named.
    assert!(push(&served, "/other", &[]) > 20 * MIB as u64);
}

#[test]
fn sums_of_a_large_file_are_kept_as_long_as_it_is_there() {
    let served = Served::start("", "");
    let source = served.path("source");
    let mut data = noise(1, 70 * MIB);
    let kept = || contents(&served.path("sync/data/.lockstep/sums")).into_keys().collect::<Vec<_>>();
    let name = |data: &[u8]| lockstep::manifest::Digest(sha2::Sha256::digest(data).into()).to_string();
    write(&source, "model.bin", &data);
    write(&source, "small.bin", &noise(2, 30 * MIB));
    push(&served, "/data", &[]);
    assert_eq!(kept(), [name(&data)]);
    for round in 0..2 {
        for at in [3, 44, 69] {
            data[at * MIB + round * 99_999..][..70_000].copy_from_slice(&noise(at as u64, 70_000));
        }
        write(&source, "model.bin", &data);
        let wire = push(&served, "/data", &[]);
        assert!(wire < 2 * MIB as u64, "{wire}");
        // What was replaced goes with the run after this one.
        assert!(kept().contains(&name(&data)) && kept().len() == 2, "{:?}", kept());
    }
    // What begins as the file does that is there is not hashed from its start, and is right all the same.
    for at in [69 * MIB, data.len()] {
        data.truncate(at);
        data.extend(noise(at as u64, 2 * MIB));
        write(&source, "model.bin", &data);
        let wire = push(&served, "/data", &[]);
        assert!(wire < 4 * MIB as u64, "{wire}");
    }
    // Sums of something else cost a second transfer, and nothing more.
    let sums = served.path("sync/data/.lockstep/sums").join(name(&data));
    let mut wrong = fs::read(&sums).unwrap();
    let new = noise(9, 200_000);
    let (first, last) = ((10 * MIB) / 65_536, (10 * MIB + 200_000) / 65_536);
    data[10 * MIB..10 * MIB + 200_000].copy_from_slice(&new);
    for block in first..=last {
        let sum = crc32fast::hash(&data[block * 65_536..][..65_536]);
        wrong[24 + block * 4..][..4].copy_from_slice(&sum.to_le_bytes());
    }
    fs::write(&sums, wrong).unwrap();
    write(&source, "model.bin", &data);
    assert!(push(&served, "/data", &[]) > 70 * MIB as u64);
    fs::remove_file(source.join("model.bin")).unwrap();
    for name in ["one", "two"] {
        write(&source, name, b"");
        push(&served, "/data", &["--delete"]);
    }
    assert!(kept().is_empty(), "{:?}", kept());
}

#[test]
fn a_sparse_file_is_made_of_what_is_there_and_of_holes() {
    let served = Served::start("", "");
    let source = served.path("source");
    let sparse = |seed: u64| {
        use std::os::unix::fs::FileExt as _;
        fs::create_dir_all(&source).unwrap();
        let file = fs::File::create(source.join("image")).unwrap();
        file.set_len(64 * MIB as u64).unwrap();
        file.write_all_at(&noise(1, 5 * MIB), 3 * MIB as u64).unwrap();
        file.write_all_at(&noise(seed, MIB), 40 * MIB as u64).unwrap();
    };
    sparse(2);
    push(&served, "/data", &[]);
    sparse(3);
    let wire = push(&served, "/data", &[]);
    assert!(wire < 3 * MIB as u64, "{wire}");
    use std::os::unix::fs::MetadataExt as _;
    assert!(fs::metadata(served.path("sync/data/image")).unwrap().blocks() * 512 < 20 * MIB as u64);
}

#[test]
fn who_may_not_read_there_is_told_of_nothing_and_sends_all() {
    let served = Served::with(&["sync"], |_| String::new(), "", |at| user(at, "sync", "rights = ['list', 'write']\n"));
    write(&served.path("source"), "f", &noise(1, 8 * MIB));
    push(&served, "/data", &[]);
    let mut changed = noise(1, 8 * MIB);
    changed[0] ^= 1;
    write(&served.path("source"), "f", &changed);
    assert!(push(&served, "/data", &[]) > 8 * MIB as u64);
}

/// A target at which something is done with what it answers about what it has.
struct Odd<F>(LocalTarget, F);

impl<F: Fn(&mut Option<Alike>) + Sync> Target for Odd<F> {
    fn describe(&self) -> String {
        self.0.describe()
    }

    fn begin(&self, options: &BeginOptions, monitor: &dyn Monitor) -> Result<(), Error> {
        self.0.begin(options, monitor)
    }

    fn diff(&self, source: &Arc<Tree>, monitor: &dyn Monitor) -> Result<Plan, Error> {
        self.0.diff(source, monitor)
    }

    fn writer(&self) -> Result<Box<dyn Writer + '_>, Error> {
        self.0.writer()
    }

    fn commit(&self, options: &CommitOptions, monitor: &dyn Monitor) -> Result<Committed, Error> {
        self.0.commit(options, monitor)
    }

    fn abort(&self) {
        self.0.abort();
    }

    fn verification(&self) -> String {
        self.0.verification()
    }

    fn is_far(&self) -> bool {
        true
    }

    fn alike(&self, index: u32, wanted: Wanted) -> Result<Option<Alike>, Error> {
        let mut alike = self.0.alike(index, wanted)?;
        (self.1)(&mut alike);
        Ok(alike)
    }
}

#[test]
fn h24_what_was_made_of_the_wrong_pieces_is_noticed_and_sent_whole() {
    let at = tempfile::tempdir().unwrap();
    let (source, target) = (at.path().join("source"), at.path().join("target"));
    let old = noise(1, 9 * MIB);
    write(&source, "f", &old);
    let go = |target: &dyn Target| {
        let source = LocalSource::new(&source, None).unwrap();
        run(&source, target, &options(), &Silent::default(), &AtomicBool::new(false)).unwrap()
    };
    let local = || LocalTarget::new(&target, PolicySpec::default());
    assert!(go(&local()).is_complete());
    let new = [&old[..], b"more"].concat();
    write(&source, "f", &new);
    // All that follows seems to lie further on than it does.
    let further = |alike: &mut Option<Alike>| {
        if let Some(alike) = alike {
            alike.chunks.insert(0, Chunk { id: ChunkId::Content([0; 16]), length: 5 });
        }
    };
    let report = go(&Odd(local(), further));
    assert!(report.is_complete() && fs::read(target.join("f")).unwrap() == new);
    // Once as far as that was believed, and once whole.
    let sent = report.transferred_bytes;
    assert!((9 * MIB as u64..11 * MIB as u64).contains(&sent), "{sent}");
}

#[test]
fn h24_a_beginning_that_changes_while_it_is_copied_is_noticed() {
    let at = tempfile::tempdir().unwrap();
    let (source, target) = (at.path().join("source"), at.path().join("target"));
    let mut data = noise(1, 70 * MIB);
    write(&source, "log", &data);
    let go = |target: &dyn Target| {
        let source = LocalSource::new(&source, None).unwrap();
        run(&source, target, &options(), &Silent::default(), &AtomicBool::new(false)).unwrap()
    };
    let local = || LocalTarget::new(&target, PolicySpec::default());
    assert!(go(&local()).is_complete());
    data.extend(noise(2, MIB));
    write(&source, "log", &data);
    // Of what is copied, where the beginning is listed no more and the sums say what they said.
    let change = |alike: &mut Option<Alike>| {
        if alike.as_ref().is_some_and(|alike| alike.cut == Cut::BySum) {
            let (file, before) = (target.join("log"), fs::metadata(target.join("log")).unwrap());
            let file = fs::File::options().write(true).open(file).unwrap();
            std::os::unix::fs::FileExt::write_all_at(&file, b"other", 40 << 20).unwrap();
            file.set_modified(before.modified().unwrap()).unwrap();
        }
    };
    let report = go(&Odd(local(), change));
    assert!(report.is_complete() && fs::read(target.join("log")).unwrap() == data);
    assert!(report.transferred_bytes > 70 * MIB as u64, "{}", report.transferred_bytes);
    // Left alone, only what is new is sent.
    data.extend(noise(3, MIB));
    write(&source, "log", &data);
    let report = go(&Odd(local(), |_: &mut _| {}));
    assert!(report.is_complete() && fs::read(target.join("log")).unwrap() == data);
    assert!(report.transferred_bytes < 3 * MIB as u64, "{}", report.transferred_bytes);
}

#[test]
fn h24_a_beginning_that_changes_after_it_was_copied_is_not_believed_to_be_what_it_was() {
    let at = tempfile::tempdir().unwrap();
    let (source, target) = (at.path().join("source"), at.path().join("target"));
    let (options, silent) = (options(), Silent::default());
    let tail = b"what is new";
    for changes in [false, true] {
        let mut data = noise(1, 70 * MIB);
        write(&source, "log", &data);
        let _ = fs::remove_dir_all(&target);
        let from = LocalSource::new(&source, None).unwrap();
        let to = || LocalTarget::new(&target, PolicySpec::default());
        run(&from, &to(), &options, &silent, &AtomicBool::new(false)).unwrap();
        data.extend(tail);
        write(&source, "log", &data);
        let tree = Arc::new(from.scan(&options.scan, &silent).unwrap().tree);
        let index = tree.entries().iter().position(|entry| entry.path.as_bytes() == b"log").unwrap() as u32;
        let to = to();
        to.begin(&BeginOptions { delta: true, ..options.begin.clone() }, &silent).unwrap();
        to.diff(&tree, &silent).unwrap();
        let mut writer = to.writer().unwrap();
        writer.open(index, 0).unwrap();
        let (size, mut done) = (70 * MIB as u64, 0);
        while done < size {
            let length = (size - done).min(8 << 20);
            writer.copy(index, done, length, Within { piece: 0, offset: done }).unwrap();
            done += length;
            if changes && done == 48 << 20 {
                let (file, before) = (target.join("log"), fs::metadata(target.join("log")).unwrap());
                let file = fs::File::options().write(true).open(file).unwrap();
                std::os::unix::fs::FileExt::write_all_at(&file, b"other", 60 << 20).unwrap();
                file.set_modified(before.modified().unwrap()).unwrap();
            }
        }
        writer.write(index, size, Block::copy_of(tail)).unwrap();
        writer.finish(index, lockstep::manifest::Digest(sha2::Sha256::digest(&data).into())).unwrap();
        let staged = writer.completions(true).unwrap();
        assert_eq!(staged[0].result.is_err(), changes, "{:?}", staged[0].result);
    }
}

#[test]
fn h24_what_changes_while_it_is_copied_is_noticed_and_the_file_is_sent() {
    let at = tempfile::tempdir().unwrap();
    let (source, target, state) = (at.path().join("source"), at.path().join("target"), at.path().join("state"));
    let data = noise(1, 9 * MIB);
    write(&source, "a", &data);
    // So that what it holds is known.
    std::thread::sleep(Duration::from_millis(60));
    let go = |target: &dyn Target| {
        let source = LocalSource::new(&source, Some(state.as_path())).unwrap();
        let options = Options { delete: false, ..options() };
        run(&source, target, &options, &Silent::default(), &AtomicBool::new(false)).unwrap()
    };
    let local = || LocalTarget::new(&target, PolicySpec::default());
    assert!(go(&local()).is_complete());
    // With the directory above it the name changes, and nothing of the file.
    write(&source, "sub/b", &data);
    std::thread::sleep(Duration::from_millis(60));
    assert!(go(&local()).is_complete());
    fs::rename(source.join("sub"), source.join("moved")).unwrap();
    let change = |alike: &mut Option<Alike>| {
        assert!(alike.as_ref().unwrap().same);
        for name in ["a", "sub/b"] {
            let (file, before) = (target.join(name), fs::metadata(target.join(name)).unwrap());
            let file = fs::File::options().write(true).open(file).unwrap();
            std::os::unix::fs::FileExt::write_all_at(&file, b"other", 4 << 20).unwrap();
            file.set_modified(before.modified().unwrap()).unwrap();
        }
    };
    let report = go(&Odd(local(), change));
    assert!(report.is_complete(), "{:?}", report.problems);
    assert!(fs::read(target.join("moved/b")).unwrap() == data);
    assert_eq!(report.transferred_bytes, data.len() as u64);
    // And what did not change is not sent.
    fs::rename(source.join("moved"), source.join("again")).unwrap();
    let report = go(&Odd(local(), |_: &mut _| {}));
    assert!(report.is_complete() && fs::read(target.join("again/b")).unwrap() == data);
    assert_eq!(report.transferred_bytes, 0);
}

#[test]
fn h24_what_was_proven_counts_no_more_when_it_is_begun_anew() {
    for end in ["nothing", "discard"] {
        let at = tempfile::tempdir().unwrap();
        let (source, there) = (at.path().join("source"), at.path().join("target"));
        write(&source, "file", b"good");
        write(&source, "other", b"other");
        let source = LocalSource::new(&source, None).unwrap();
        let tree = Arc::new(source.scan(&options().scan, &Silent::default()).unwrap().tree);
        let target = LocalTarget::new(&there, PolicySpec::default());
        target.begin(&options().begin, &Silent::default()).unwrap();
        target.diff(&tree, &Silent::default()).unwrap();
        let digest = |data: &[u8]| lockstep::manifest::Digest(sha2::Sha256::digest(data).into());
        let mut writer = target.writer().unwrap();
        writer.put(1, Block::copy_of(b"other"), digest(b"other")).unwrap();
        writer.put(0, Block::copy_of(b"good"), digest(b"good")).unwrap();
        assert!(writer.completions(true).unwrap().iter().all(|staged| staged.result.is_ok()));
        // Whoever sends does so once more, and never says that this is all.
        writer.open(0, 0).unwrap();
        writer.write(0, 0, Block::copy_of(b"evil")).unwrap();
        if end == "discard" {
            writer.discard(0).unwrap();
        }
        drop(writer);
        let committed = target.commit(&CommitOptions::default(), &Silent::default()).unwrap();
        assert_eq!(committed.published, 1, "{end}: {committed:?}");
        assert_eq!(contents(&there).into_keys().collect::<Vec<_>>(), ["other"], "{end}");
    }
}
