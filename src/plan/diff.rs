//! Compares two trees: a merge of two sorted lists.

use std::collections::HashSet;

use super::{Action, Change, Compare, Differences, Need, Plan, Removal};
use crate::manifest::{Content, Entry, Name, Timestamp, Tree};
use crate::path::RelPath;

/// The permissions that a path is to have at the target.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Desired {
    /// Mode with special bits, 0 to 0o7777.
    pub mode: u32,
    /// Owner as the target names it; `None` leaves whoever has it.
    pub owner: Option<Name>,
    /// Group likewise.
    pub group: Option<Name>,
    /// What is there has another ACL than it is to have.
    pub acl_differs: bool,
}

/// What has to be done to make `target` like `source`. `desired` gives the permissions of the source's entries by index.
///
/// Two files are the same when their digests are known and equal. Where the source's digest is not known, a size and a
/// time equal to those of a target whose digest is known count as the same, unless `compare.checksum` says otherwise.
/// A target whose digest is not known proves nothing, and its content is replaced.
pub fn diff(source: &Tree, target: &Tree, desired: &dyn Fn(usize, &Entry) -> Desired, compare: Compare) -> Plan {
    let mut plan = Plan { target_entries: target.entries().len() as u64, ..Plan::default() };
    let mut actions = Vec::new();
    // Of interest for what further names are of.
    let linked = source.entries().iter().any(|entry| matches!(entry.content, Content::HardLink { .. }));
    let mut replaced: HashSet<&RelPath> = HashSet::new();
    let mut theirs = target.entries().iter().peekable();
    for (index, entry) in source.entries().iter().enumerate() {
        while let Some(extra) = theirs.next_if(|other| other.path < entry.path) {
            plan.removals.push(Removal { path: extra.path.clone(), directory: extra.is_directory() });
        }
        let old = theirs.next_if(|other| other.path == entry.path);
        let action = match old {
            None => Some(added(index, entry)),
            Some(old) => compared(index, entry, old, desired, compare, &replaced),
        };
        if let Some(action) = action {
            if linked && action.change != Change::MetadataOnly {
                replaced.insert(&entry.path);
            }
            actions.push(action);
        }
    }
    plan.removals.extend(theirs.map(|extra| Removal { path: extra.path.clone(), directory: extra.is_directory() }));
    plan.actions = actions.into();
    with_further_names(&mut plan, source);
    plan
}

/// A file that is to be compared may turn out to be another, and gets a new inode then: its further names have to follow.
fn with_further_names(plan: &mut Plan, source: &Tree) {
    let compared = |action: &Action| matches!(action.need, Need::Compare { .. });
    if !plan.actions.iter().any(compared) {
        return;
    }
    for (index, entry) in source.entries().iter().enumerate() {
        let Content::HardLink { first } = &entry.content else { continue };
        let at = |index: usize| plan.actions.binary_search_by_key(&(index as u32), |action| action.index);
        let follows = source.position(first).is_some_and(|first| at(first).is_ok_and(|at| compared(&plan.actions[at])));
        if let (true, Err(at)) = (follows, at(index)) {
            let differences = Differences { content: true, ..Differences::default() };
            let action = Action { index: index as u32, change: Change::Modified, differences, need: Need::Nothing };
            plan.actions.insert(at, action);
        }
    }
}

/// Has the content of files compared that a plan would leave for their size and time alone: `doubtful` are indices of
/// `target`'s files whose digest is known, but was never compared with that of a source.
pub fn require_proof(plan: &mut Plan, source: &Tree, target: &Tree, doubtful: &[usize]) {
    for entry in doubtful.iter().map(|&at| &target.entries()[at]) {
        let (Some((size, Some(digest))), Some(index)) = (entry.file(), source.position(&entry.path)) else { continue };
        if source.entries()[index].file() != Some((size, None)) {
            continue;
        }
        let need = Need::Compare { digest: Box::new(digest) };
        match plan.actions.binary_search_by_key(&(index as u32), |action| action.index) {
            Ok(at) if plan.actions[at].need == Need::Nothing => plan.actions[at].need = need,
            Ok(_) => {}
            Err(at) => {
                let (change, differences) = (Change::MetadataOnly, Differences::default());
                plan.actions.insert(at, Action { index: index as u32, change, differences, need });
            }
        }
    }
    with_further_names(plan, source);
}

fn added(index: usize, entry: &Entry) -> Action {
    let file = entry.file().is_some();
    Action {
        index: index as u32,
        change: Change::Added,
        differences: Differences { content: true, size: file, time: true, mode: true, owner: true, group: true },
        need: if file { Need::Content { resume_at: 0 } } else { Need::Nothing },
    }
}

fn compared(
    index: usize,
    entry: &Entry,
    old: &Entry,
    desired: &dyn Fn(usize, &Entry) -> Desired,
    compare: Compare,
    replaced: &HashSet<&RelPath>,
) -> Option<Action> {
    if kind(&entry.content) != kind(&old.content) {
        // What is there only has the same name.
        return Some(added(index, entry));
    }
    let same_time = same_time(entry.mtime, old.mtime, compare.whole_seconds);
    let (content, size, need) = content(entry, old, same_time, compare, replaced);
    let link = matches!(entry.content, Content::Symlink { .. });
    let hard_link = matches!(entry.content, Content::HardLink { .. });
    let want = desired(index, entry);
    // A hard link shares its inode with the first name, which carries the metadata; a symbolic link has no mode.
    let differences = Differences {
        content,
        size,
        time: compare.times && !hard_link && !link && !same_time,
        mode: !hard_link && !link && (want.mode != old.mode || want.acl_differs),
        owner: !hard_link && want.owner.is_some_and(|owner| owner != old.owner),
        group: !hard_link && want.group.is_some_and(|group| group != old.group),
    };
    if !differences.any() && need == Need::Nothing {
        return None;
    }
    let change = match need {
        Need::Content { .. } => Change::Modified,
        _ if content => Change::Modified,
        _ => Change::MetadataOnly,
    };
    Some(Action { index: index as u32, change, differences, need })
}

/// What an entry is on a disk: a hard link is a regular file.
fn kind(content: &Content) -> u8 {
    match content {
        Content::File { .. } | Content::HardLink { .. } => 0,
        Content::Directory => 1,
        Content::Symlink { .. } => 2,
    }
}

/// Whether the content differs, whether the size does, and what is needed.
fn content(
    entry: &Entry,
    old: &Entry,
    same_time: bool,
    compare: Compare,
    replaced: &HashSet<&RelPath>,
) -> (bool, bool, Need) {
    let whole = Need::Content { resume_at: 0 };
    match (&entry.content, &old.content) {
        (Content::File { size, digest }, Content::File { size: old_size, digest: old_digest }) => {
            match (digest, old_digest) {
                _ if size != old_size => (true, true, whole),
                (Some(digest), Some(old_digest)) if digest == old_digest => (false, false, Need::Nothing),
                (Some(_), Some(_)) | (_, None) => (true, false, whole),
                (None, Some(_)) if same_time && !compare.checksum => (false, false, Need::Nothing),
                (None, Some(old_digest)) => (false, false, Need::Compare { digest: Box::new(*old_digest) }),
            }
        }
        (Content::File { .. }, _) => (true, true, whole),
        (Content::Directory, Content::Directory) => (false, false, Need::Nothing),
        (Content::Symlink { target }, Content::Symlink { target: old_target }) => {
            (target != old_target, false, Need::Nothing)
        }
        // When the first name gets a new inode its other names have to follow.
        (Content::HardLink { first }, Content::HardLink { first: old_first }) => {
            (first != old_first || replaced.contains(first), false, Need::Nothing)
        }
        _ => (true, false, Need::Nothing),
    }
}

fn same_time(a: Timestamp, b: Timestamp, whole_seconds: bool) -> bool {
    a.seconds == b.seconds && (whole_seconds || a.nanoseconds == b.nanoseconds)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::manifest::Digest;
    use crate::plan::Actions;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    fn rel(path: &str) -> RelPath {
        RelPath::new(path).unwrap()
    }

    fn entry(path: &str, content: Content, seconds: i64) -> Entry {
        let mtime = Timestamp { seconds, nanoseconds: 5 };
        Entry { path: rel(path), content, mtime, mode: 0o644, owner: "u".into(), group: "g".into() }
    }

    fn file(path: &str, size: u64, digest: Option<u8>, seconds: i64) -> Entry {
        entry(path, Content::File { size, digest: digest.map(|byte| Digest([byte; 32])) }, seconds)
    }

    fn as_sent(_: usize, entry: &Entry) -> Desired {
        Desired { mode: entry.mode, owner: None, group: None, acl_differs: false }
    }

    fn plan(source: Vec<Entry>, target: Vec<Entry>, compare: Compare) -> Plan {
        diff(&Tree::new(source).unwrap(), &Tree::new(target).unwrap(), &as_sent, compare)
    }

    #[test]
    fn one_file_in_every_combination() {
        const QUICK: Compare = Compare { checksum: false, whole_seconds: false, times: true };
        const CHECKSUM: Compare = Compare { checksum: true, whole_seconds: false, times: true };
        let whole = Need::Content { resume_at: 0 };
        let ask = Need::Compare { digest: Box::new(Digest([1; 32])) };
        let cases = [
            ("equal digests", (Some(1), 9, 1), (Some(1), 9, 1), QUICK, None),
            ("equal digests, other time", (Some(1), 9, 2), (Some(1), 9, 1), QUICK, Some(Need::Nothing)),
            ("other digest, same size and time", (Some(2), 9, 1), (Some(1), 9, 1), QUICK, Some(whole.clone())),
            ("other size", (None, 8, 1), (Some(1), 9, 1), QUICK, Some(whole.clone())),
            ("unknown at the source, same time", (None, 9, 1), (Some(1), 9, 1), QUICK, None),
            ("unknown at the source, asked to prove", (None, 9, 1), (Some(1), 9, 1), CHECKSUM, Some(ask.clone())),
            ("unknown at the source, other time", (None, 9, 2), (Some(1), 9, 1), QUICK, Some(ask)),
            ("unknown at the target proves nothing", (None, 9, 1), (None, 9, 1), QUICK, Some(whole)),
        ];
        for (name, (digest, size, time), (old, old_size, old_time), compare, expected) in cases {
            let plan = plan(vec![file("f", size, digest, time)], vec![file("f", old_size, old, old_time)], compare);
            assert_eq!(plan.actions.first().map(|action| action.need.clone()), expected, "{name}");
        }
    }

    #[test]
    fn what_was_never_compared_is_not_believed_for_its_size_and_time() {
        let source = Tree::new(vec![
            file("a", 9, None, 1),
            file("b", 9, None, 2),
            file("c", 9, Some(1), 1),
            file("d", 8, None, 1),
        ]);
        let target = ["a", "b", "c", "d"].map(|name| file(name, 9, Some(1), 1)).to_vec();
        let (source, target) = (source.unwrap(), Tree::new(target).unwrap());
        let mut plan = diff(&source, &target, &as_sent, Compare::default());
        let needs =
            |plan: &Plan| -> Vec<_> { plan.actions.iter().map(|action| (action.index, action.need.clone())).collect() };
        let ask = Need::Compare { digest: Box::new(Digest([1; 32])) };
        let whole = Need::Content { resume_at: 0 };
        assert_eq!(needs(&plan), [(1, ask.clone()), (3, whole.clone())]);
        require_proof(&mut plan, &source, &target, &[0, 1, 2, 3]);
        assert_eq!(needs(&plan), [(0, ask.clone()), (1, ask), (3, whole)]);
    }

    #[test]
    fn kinds_links_and_removals() {
        let link = |target: &str| Content::Symlink { target: target.as_bytes().into() };
        let hard = || Content::HardLink { first: rel("a") };
        let result = plan(
            vec![file("a", 1, Some(2), 1), entry("b", hard(), 1), entry("c", link("x"), 1), file("d", 1, None, 1)],
            vec![
                file("a", 1, Some(1), 1),
                entry("b", hard(), 1),
                entry("c", link("y"), 1),
                entry("d", Content::Directory, 1),
                file("d/e", 1, None, 1),
                file("z", 1, None, 1),
            ],
            Compare::default(),
        );
        let changed: Vec<_> = result.actions.iter().map(|action| (action.index, action.change)).collect();
        let modified = Change::Modified;
        assert_eq!(changed, [(0, modified), (1, modified), (2, modified), (3, Change::Added)]);
        let removed: Vec<_> = result.removals.iter().map(|removal| removal.path.to_string()).collect();
        assert_eq!(removed, ["d/e", "z"]);
    }

    #[test]
    fn permissions_that_a_policy_wants_are_compared_with_what_is_there() {
        let tree = Tree::new(vec![file("f", 1, Some(1), 1)]).unwrap();
        let want =
            |mode, owner: Option<&str>| Desired { mode, owner: owner.map(Into::into), group: None, acl_differs: false };
        let acl = diff(&tree, &tree, &|_, _| Desired { acl_differs: true, ..want(0o644, None) }, Compare::default());
        assert!(acl.actions[0].change == Change::MetadataOnly && acl.actions[0].differences.mode);
        assert_eq!(diff(&tree, &tree, &|_, _| want(0o644, Some("u")), Compare::default()).actions, Actions::default());
        let result = diff(&tree, &tree, &|_, _| want(0o600, Some("trainer")), Compare::default());
        let action = &result.actions[0];
        assert_eq!((action.change, &action.need), (Change::MetadataOnly, &Need::Nothing));
        assert!(action.differences.mode && action.differences.owner && !action.differences.group);
    }

    fn trees() -> impl Strategy<Value = Vec<Entry>> {
        prop::collection::btree_map("[ab]{1,2}", (0..4u8, 0..3u64, 0..2i64, 0..2u32), 0..12).prop_map(|entries| {
            let entries = entries.into_iter().map(|(name, (kind, size, time, mode))| {
                let content = match kind {
                    0 => Content::Directory,
                    1 => Content::Symlink { target: vec![b'0' + size as u8].into() },
                    _ => Content::File { size, digest: Some(Digest([size as u8; 32])) },
                };
                let mut entry = entry(&name, content, time);
                entry.mode = 0o600 + mode;
                if matches!(entry.content, Content::Symlink { .. }) {
                    (entry.mode, entry.mtime) = (0o777, Timestamp::default());
                }
                entry
            });
            entries.collect()
        })
    }

    proptest! {
        #[test]
        fn applying_the_plan_makes_the_target_like_the_source(source in trees(), target in trees()) {
            let source = Tree::new(source).unwrap();
            let target = Tree::new(target).unwrap();
            let plan = diff(&source, &target, &as_sent, Compare::default());
            let mut result: BTreeMap<RelPath, Entry> =
                target.entries().iter().map(|entry| (entry.path.clone(), entry.clone())).collect();
            for removal in &plan.removals {
                result.remove(&removal.path);
            }
            for action in &plan.actions {
                let entry = &source.entries()[action.index as usize];
                result.insert(entry.path.clone(), entry.clone());
            }
            prop_assert_eq!(Tree::new(result.into_values().collect()).unwrap(), source.clone());
            prop_assert_eq!(diff(&source, &source, &as_sent, Compare::default()).actions, Actions::default());
        }
    }
}
