//! Of what the other end has already nothing is sent: changes within files, renamed files, the next checkpoint beside the last.

use std::fs;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use lockstep::codec::chunks::{Chunk, ChunkId};
use lockstep::endpoint::delta::{Alike, Wanted};
use lockstep::endpoint::local::{LocalSource, LocalTarget};
use lockstep::endpoint::{BeginOptions, CommitOptions, Committed, Error, Target, Writer};
use lockstep::manifest::Tree;
use lockstep::monitor::{Monitor, Silent};
use lockstep::plan::Plan;
use lockstep::policy::PolicySpec;
use lockstep::sync::run;

use crate::kit::area::{contents, options, write};
use crate::kit::served::{Served, user};
use crate::kit::{noise, text};

const MIB: usize = 1 << 20;

/// Pushes the source of `served` to a directory there; how many bytes went over the wire.
fn push(served: &Served, to: &str, more: &[&str]) -> u64 {
    let source = served.path("source").display().to_string();
    let to = format!("sync@127.0.0.1:{to}");
    let output = served.lockstep(&[&["push", "--json", &source, &to], more].concat(), "sync");
    assert!(output.status.success(), "{}", text(&output));
    let summary = text(&output);
    let summary = summary.lines().find(|line| line.contains("\"summary\"")).unwrap();
    let summary: serde_json::Value = serde_json::from_str(summary).unwrap();
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

/// A target that is mistaken about where its chunks lie.
struct Liar(LocalTarget);

impl Target for Liar {
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
        if let Some(alike) = &mut alike {
            // All that follows seems to lie further on than it does.
            alike.chunks.insert(0, Chunk { id: ChunkId::Content([0; 16]), length: 5 });
        }
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
    let report = go(&Liar(local()));
    assert!(report.is_complete() && fs::read(target.join("f")).unwrap() == new);
    // Once as far as that was believed, and once whole.
    let sent = report.transferred_bytes;
    assert!((9 * MIB as u64..11 * MIB as u64).contains(&sent), "{sent}");
}
