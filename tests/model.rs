//! Random trees through the whole engine: what a run promises, held against trees that nobody thought of.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use lockstep::codec::CompressOptions;
use lockstep::endpoint::link::{Remote, Way};
use lockstep::endpoint::local::{LocalSource, LocalTarget};
use lockstep::endpoint::memory::{Memory, Node};
use lockstep::endpoint::{BeginOptions, Error, Links, ScanOptions, Source, Target, agent, stock};
use lockstep::manifest::{Content, Entry, Timestamp};
use lockstep::monitor::Silent;
use lockstep::path::RelPath;
use lockstep::plan::safety::DeleteLimit;
use lockstep::policy::PolicySpec;
use lockstep::sync::{Options, SyncReport, run};
use proptest::prelude::*;

use crate::pipes::Pipes;

fn options(checksum: bool) -> Options {
    Options {
        scan: ScanOptions { links: Links::All, ..ScanOptions::default() },
        begin: BeginOptions { checksum, actor: "model@here".into(), ..BeginOptions::default() },
        delete: true,
        retain: None,
        max_delete: DeleteLimit::Unlimited,
        workers: 1,
        retries: 1,
        bandwidth: lockstep::sync::Rate::default(),
    }
}

fn sync(source: &dyn Source, target: &dyn Target, checksum: bool) -> Result<SyncReport, Error> {
    run(source, target, &options(checksum), &Silent::default(), &AtomicBool::new(false))
}

/// A tree of few names, so that two of them have much in common: kinds collide, directories are in the way of files.
#[derive(Debug, Clone)]
enum Kind {
    File(Vec<u8>),
    Directory,
    Symlink(u8),
}

fn kind() -> impl Strategy<Value = Kind> {
    prop_oneof![
        4 => proptest::collection::vec(prop_oneof![3 => Just(0_u8), 1 => any::<u8>()], 0..60).prop_map(Kind::File),
        3 => Just(Kind::Directory),
        1 => (0..3_u8).prop_map(Kind::Symlink),
    ]
}

fn nodes() -> impl Strategy<Value = Vec<Node>> {
    let name = prop_oneof![Just("a"), Just("b"), Just("c\n\u{fc}"), Just("latest")];
    let path = proptest::collection::vec(name, 1..4).prop_map(|parts| parts.join("/"));
    let times = (0..3_i64, 0..2_u32);
    proptest::collection::btree_map(path, (kind(), 0..8_u32, times), 1..14).prop_map(|paths| {
        let mut made: BTreeMap<RelPath, Node> = BTreeMap::new();
        for (path, (kind, mode, (seconds, nanoseconds))) in paths {
            let path = RelPath::new(path).unwrap();
            let mtime = Timestamp { seconds: 1_000_000 + seconds, nanoseconds };
            let node = |path: &RelPath, content, data, mode| Node {
                entry: Entry { path: path.clone(), content, mtime, mode, owner: "o".into(), group: "g".into() },
                data,
            };
            // What lies above has to be a directory, whatever was drawn for it.
            for above in path.ancestors() {
                made.insert(above.clone(), node(&above, Content::Directory, Vec::new(), 0o755));
            }
            if made.contains_key(&path) {
                continue;
            }
            let made_node = match kind {
                Kind::File(data) => {
                    node(&path, Content::File { size: data.len() as u64, digest: None }, data, 0o600 + mode)
                }
                Kind::Directory => node(&path, Content::Directory, Vec::new(), 0o700 + mode),
                Kind::Symlink(to) => node(&path, Content::Symlink { target: [b'x' + to].into() }, Vec::new(), 0o777),
            };
            made.insert(path, made_node);
        }
        // A name that became a directory for the sake of another is one; files below files are gone.
        made.into_values().collect()
    })
}

/// What two trees have in common when they are in step: symbolic links have no time of their own.
fn in_step(nodes: &BTreeMap<RelPath, Node>) -> Vec<Node> {
    nodes
        .values()
        .cloned()
        .map(|mut node| {
            if matches!(node.entry.content, Content::Symlink { .. }) {
                node.entry.mtime = Timestamp::default();
            }
            node
        })
        .collect()
}

fn lay_out(at: &Path, nodes: &[Node]) {
    for node in nodes {
        let path = at.join(node.entry.path.as_path());
        match &node.entry.content {
            Content::Directory => fs::create_dir(&path).unwrap(),
            Content::Symlink { target } => symlink(String::from_utf8_lossy(target).as_ref(), &path).unwrap(),
            _ => fs::write(&path, &node.data).unwrap(),
        }
    }
    for node in nodes.iter().rev().filter(|node| !matches!(node.entry.content, Content::Symlink { .. })) {
        let path = at.join(node.entry.path.as_path());
        fs::set_permissions(&path, fs::Permissions::from_mode(node.entry.mode)).unwrap();
        let since = std::time::Duration::new(node.entry.mtime.seconds as u64, node.entry.mtime.nanoseconds);
        fs::File::open(&path).unwrap().set_modified(std::time::UNIX_EPOCH + since).unwrap();
    }
}

/// What is found below `at`, in the words of the model.
fn found(at: &Path, like: &[Node]) -> Vec<Node> {
    let mut found = Vec::new();
    let mut directories = vec![at.to_owned()];
    while let Some(directory) = directories.pop() {
        for item in fs::read_dir(&directory).unwrap() {
            let path = item.unwrap().path();
            let name = path.strip_prefix(at).unwrap().as_os_str().as_encoded_bytes().to_vec();
            if name == b".lockstep" {
                continue;
            }
            let metadata = fs::symlink_metadata(&path).unwrap();
            let (content, data) = if metadata.is_dir() {
                directories.push(path.clone());
                (Content::Directory, Vec::new())
            } else if metadata.is_symlink() {
                let target = fs::read_link(&path).unwrap().into_os_string().into_encoded_bytes();
                (Content::Symlink { target: target.into() }, Vec::new())
            } else {
                let data = fs::read(&path).unwrap();
                (Content::File { size: data.len() as u64, digest: None }, data)
            };
            let link = metadata.is_symlink();
            let mtime = match link {
                true => Timestamp::default(),
                false => Timestamp { seconds: metadata.mtime(), nanoseconds: metadata.mtime_nsec() as u32 },
            };
            let (owner, group) = (like[0].entry.owner.clone(), like[0].entry.group.clone());
            let path = RelPath::new(name).unwrap();
            found.push(Node {
                entry: Entry { path, content, mtime, mode: metadata.mode() & 0o7777, owner, group },
                data,
            });
        }
    }
    found.sort_by(|a, b| a.entry.path.cmp(&b.entry.path));
    found
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    /// Applying the difference of two trees to one gives the other, and then there is none.
    #[test]
    fn a_run_makes_any_tree_like_any_other(from in nodes(), to in nodes(), checksum in any::<bool>()) {
        let (source, target) = (Memory::new(from), Memory::new(to));
        let report = sync(&source, &target, checksum).unwrap();
        prop_assert!(report.is_complete(), "{:?}", report.problems);
        // Without --checksum the same size and time count as the same content, as is documented.
        if checksum {
            prop_assert_eq!(in_step(&target.nodes()), in_step(&source.nodes()));
        }
        let again = sync(&source, &target, checksum).unwrap();
        prop_assert!(again.plan.actions.iter().all(|action| checksum && matches!(action.need, lockstep::plan::Need::Compare { .. })),
            "{:?}", again.plan);
        prop_assert_eq!(again.plan.removals, []);
    }

    /// Whatever call fails, a path holds what it held or what it is to hold; a pointer is not new before all else is; and
    /// the same run again ends as if nothing had happened.
    #[test]
    fn h32_a_run_that_fails_at_any_call_leaves_old_or_new_and_converges(from in nodes(), to in nodes(), calls in 0..60_u64) {
        let (source, target) = (Memory::new(from), Memory::new(to.clone()));
        let old = target.nodes();
        target.fail_after(calls);
        let failed = sync(&source, &target, true).is_err();
        target.fail_after(u64::MAX);
        let new = source.nodes();
        if failed {
            let seen = target.nodes();
            for (path, node) in &seen {
                let is = |tree: &BTreeMap<RelPath, Node>| tree.get(path).is_some_and(|other| {
                    other.data == node.data && other.entry.content == node.entry.content
                });
                prop_assert!(is(&old) || is(&new), "{path} holds neither");
            }
            let pointer = |path: &RelPath| path.components().last() == Some(b"latest".as_slice());
            let arrived = seen.iter().any(|(path, node)| {
                pointer(path) && !node.entry.is_directory() && old.get(path) != Some(node) && new.get(path) == Some(node)
                    // One whose content was there before says nothing.
                    && old.get(path).is_none_or(|old| old.data != node.data || old.entry.content != node.entry.content)
            });
            let all_there = new.iter().filter(|(path, node)| !pointer(path) && !node.entry.is_directory()).all(|(path, node)| {
                seen.get(path).is_some_and(|seen| seen.data == node.data && seen.entry.content == node.entry.content)
            });
            prop_assert!(!arrived || all_there, "a pointer came before what it may point to");
        }
        prop_assert!(sync(&source, &target, true).unwrap().is_complete());
        prop_assert_eq!(in_step(&target.nodes()), in_step(&new));
    }
}

/// The kinds of target, for a directory of this machine.
fn target(kind: usize, at: &Path) -> Box<dyn Target> {
    let root = at.as_os_str().as_encoded_bytes();
    let host: Arc<dyn Remote> = Arc::new(Pipes);
    let open = |way: &Way| host.open(way, 0).unwrap();
    let compress = CompressOptions { level: Some(1), enabled: true };
    match kind {
        0 => Box::new(LocalTarget::new(at, PolicySpec::default())),
        1 => {
            let way = Way::LockstepExec(String::new());
            let lanes = agent::Lanes::connect(Arc::clone(&host), &way, open(&way), 1, root, compress);
            Box::new(agent::AgentTarget::new(lanes.unwrap()))
        }
        _ => {
            let verify = if kind == 2 { stock::Verify::Auto } else { stock::Verify::ReadBack };
            let lanes = stock::Lanes::connect(Arc::clone(&host), open(&Way::SftpSubsystem), 1, root, verify);
            Box::new(super::stock_pipes::by_command(lanes.unwrap()))
        }
    }
}

/// The kinds of source, likewise.
fn source(kind: usize, at: &Path) -> Box<dyn Source> {
    let root = at.as_os_str().as_encoded_bytes();
    let host: Arc<dyn Remote> = Arc::new(Pipes);
    let open = |way: &Way| host.open(way, 0).unwrap();
    let compress = CompressOptions { level: None, enabled: true };
    match kind {
        0 => Box::new(LocalSource::new(at, None).unwrap()),
        1 => {
            let way = Way::LockstepExec(String::new());
            let lanes = agent::Lanes::connect(Arc::clone(&host), &way, open(&way), 1, root, compress);
            Box::new(agent::AgentSource::new(lanes.unwrap()))
        }
        _ => {
            let verify = if kind == 2 { stock::Verify::Auto } else { stock::Verify::ReadBack };
            let lanes = stock::Lanes::connect(Arc::clone(&host), open(&Way::SftpSubsystem), 1, root, verify);
            Box::new(stock::StockSource::new(lanes.unwrap()))
        }
    }
}

/// Two unlike trees pushed to one place, one after the other, and a third run that has nothing to do.
fn conform(
    make: impl Fn(&Path, &Path) -> (Box<dyn Source>, Box<dyn Target>),
    trees: [Vec<Node>; 2],
    whole_seconds: bool,
) {
    let at = tempfile::tempdir().unwrap();
    let to = at.path().join("target");
    let [first, mut second] = trees;
    // The same size and time count as the same content, as is documented.
    for node in &mut second {
        let taken_for = |old: &&Node| {
            let times = [&old.entry.mtime, &node.entry.mtime];
            let [old_time, time] = times.map(|time| (time.seconds, if whole_seconds { 0 } else { time.nanoseconds }));
            old.entry.path == node.entry.path && old.data.len() == node.data.len() && old_time == time
        };
        if let Some(data) = first.iter().find(taken_for).map(|old| old.data.clone()) {
            node.data = data;
        }
    }
    for (number, nodes) in [first, second].iter().enumerate() {
        let from = at.path().join(format!("source-{number}"));
        fs::create_dir(&from).unwrap();
        lay_out(&from, nodes);
        for again in [false, true] {
            let (source, target) = make(&from, &to);
            let report = sync(&*source, &*target, false).unwrap();
            assert!(report.is_complete(), "{:?}", report.problems);
            assert!(!again || report.plan.actions.is_empty() && report.plan.removals.is_empty(), "{:?}", report.plan);
        }
        let mut expected = found(&from, nodes);
        for node in expected.iter_mut().filter(|_| whole_seconds) {
            node.entry.mtime.nanoseconds = 0;
        }
        assert_eq!(found(&to, nodes), expected, "push {number}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 12, failure_persistence: None, ..ProptestConfig::default() })]

    /// What holds for trees in memory holds for directories, whatever stands between.
    #[test]
    fn a_directory_of_this_machine_becomes_like_any_tree(first in nodes(), second in nodes()) {
        conform(|from, to| (source(0, from), target(0, to)), [first, second], false);
    }

    #[test]
    fn an_agents_directory_becomes_like_any_tree(first in nodes(), second in nodes()) {
        conform(|from, to| (source(0, from), target(1, to)), [first, second], false);
    }

    #[test]
    fn a_stock_servers_directory_becomes_like_any_tree(first in nodes(), second in nodes(), reads_back in any::<bool>()) {
        conform(|from, to| (source(0, from), target(2 + usize::from(reads_back), to)), [first, second], true);
    }

    #[test]
    fn a_directory_becomes_like_any_tree_of_an_agent(first in nodes(), second in nodes()) {
        conform(|from, to| (source(1, from), target(0, to)), [first, second], false);
    }

    #[test]
    fn a_directory_becomes_like_any_tree_of_a_stock_server(first in nodes(), second in nodes(), reads in any::<bool>()) {
        conform(|from, to| (source(2 + usize::from(reads), from), target(0, to)), [first, second], true);
    }
}
