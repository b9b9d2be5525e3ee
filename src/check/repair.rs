//! What a check found that a good copy can mend: the entries of the list that are to be had again.
//!
//! Pure but for looks at what is there. Nothing is decided here about where they come from.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::os::unix::ffi::OsStrExt as _;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use sha2::{Digest as _, Sha256};

use super::{Finding, Kind, Options, Report};
use crate::error::Escaped;
use crate::manifest::{Content, Digest, Entry, Name, Timestamp, Tree, format, sums};
use crate::path::RelPath;
use crate::policy::rights::Subject;
use crate::root::{FileKind, Follow, Root};
use crate::signature::oms;

const NATIVE: &[u8] = b"lockstep-manifest\t";

/// What is to be made again as the list says.
#[derive(Debug, Default)]
pub struct Wanted {
    /// Its entries, and the directories above them that are not there.
    pub tree: Tree,
    /// The list tells names and digests alone: sizes, times and modes are those of the good copy.
    pub sums: bool,
    /// All that the list has; nothing where it tells digests alone.
    pub listed: Arc<Tree>,
    /// SHA-256 of the tree's own manifest, where that is the list.
    pub manifest: Option<Digest>,
    /// Modes and owners of what is there stay.
    pub as_it_is: bool,
}

/// Why nothing can be mended.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum NotMendable {
    #[error("there is no manifest that says what it should be")]
    NoList,
    #[error("the list was replaced since it was checked; check again")]
    Changed,
}

/// Whether a finding says that somebody may not read something, rather than that it is damaged.
pub fn is_denied(root: &Root, finding: &Finding, subject: Option<&Subject>) -> bool {
    if finding.kind != Kind::Unreadable {
        return false;
    }
    let denied = |message: &str, subject: &Subject| {
        message.starts_with(&format!("{} may not ", Escaped(subject.shown.as_bytes())))
    };
    if subject.is_some_and(|subject| denied(&finding.message, subject)) {
        return true;
    }
    let Ok(path) = RelPath::new(finding.path.as_os_str().as_bytes()) else { return true };
    root.open_read(&path, Follow::Never).is_err_and(|error| error.kind() == std::io::ErrorKind::PermissionDenied)
}

/// The paths that a good copy can mend.
fn mendable(root: &Root, options: &Options, report: &Report) -> BTreeSet<RelPath> {
    let mends = |finding: &&Finding| match finding.kind {
        Kind::Missing | Kind::Modified | Kind::Damaged | Kind::WrongSize | Kind::WrongKind | Kind::WrongLink => true,
        Kind::WrongMode | Kind::WrongOwner | Kind::WrongGroup => true,
        Kind::Unreadable => !is_denied(root, finding, options.subject.as_ref()),
        _ => false,
    };
    let found = report.findings.iter().filter(mends);
    found.filter_map(|finding| RelPath::new(finding.path.as_os_str().as_bytes()).ok()).collect()
}

/// What of the list, whose text this is, has to be had again after `report`.
///
/// # Errors
/// [`NotMendable`] where there is no list that could be gone by.
pub fn wanted(root: &Root, text: &[u8], options: &Options, report: &Report) -> Result<Wanted, NotMendable> {
    let digest = Digest(Sha256::digest(text).into());
    if report.findings.iter().any(|finding| matches!(finding.kind, Kind::ManifestMissing | Kind::ManifestDamaged)) {
        return Err(NotMendable::NoList);
    }
    if report.list != Some(digest) {
        return Err(NotMendable::Changed);
    }
    let paths = mendable(root, options, report);
    let digests = digests(text, options)?;
    let sums = digests.is_some();
    let (listed, mut entries) = if let Some(digests) = digests {
        (Tree::default(), of_digests(root, digests, &paths))
    } else {
        let listed = format::decode(text).map_err(|_| NotMendable::NoList)?.tree;
        let entries = of_manifest(&listed, &paths);
        (listed, entries)
    };
    above(root, &listed, &mut entries);
    let tree = Tree::new(entries.into_values().collect()).map_err(|_| NotMendable::NoList)?;
    let manifest = options.against.is_none().then_some(digest);
    Ok(Wanted { tree, sums, listed: Arc::new(listed), manifest, as_it_is: sums || options.ignore_permissions })
}

/// Names and digests, where a list tells nothing else: that of sha256sum, or the signature of a model.
struct Digests {
    files: Vec<(RelPath, Digest)>,
    /// A link may stand where a file is listed.
    links: bool,
}

fn digests(text: &[u8], options: &Options) -> Result<Option<Digests>, NotMendable> {
    if let Some(key) = &options.key {
        let statement = oms::verify(text, key).map_err(|_| NotMendable::Changed)?;
        return Ok(Some(Digests { links: statement.links, files: statement.files }));
    }
    if options.against.is_none() || text.starts_with(NATIVE) {
        return Ok(None);
    }
    let files = sums::parse(text).map_err(|_| NotMendable::NoList)?;
    Ok(Some(Digests { files, links: true }))
}

/// The paths of a list with this text; none where it cannot be read.
pub fn listed(text: &[u8], options: &Options) -> Vec<RelPath> {
    match digests(text, options) {
        Ok(Some(digests)) => digests.files.into_iter().map(|(path, _)| path).collect(),
        Ok(None) => {
            let tree = format::decode(text).map(|manifest| manifest.tree).unwrap_or_default();
            tree.into_entries().into_iter().map(|entry| entry.path).collect()
        }
        Err(_) => Vec::new(),
    }
}

type Entries = BTreeMap<RelPath, Entry>;

/// The entries at `paths`. The names of one file are had together: they would be two files else.
fn of_manifest(listed: &Tree, paths: &BTreeSet<RelPath>) -> Entries {
    let mut names: HashMap<&RelPath, Vec<&Entry>> = HashMap::new();
    for entry in listed.entries() {
        if let Content::HardLink { first } = &entry.content {
            names.entry(first).or_default().push(entry);
        }
    }
    let mut entries = Entries::new();
    for entry in paths.iter().filter_map(|path| listed.get(path)) {
        let first = match &entry.content {
            Content::HardLink { first } => first,
            _ => &entry.path,
        };
        let further = names.get(first).map_or(&[][..], Vec::as_slice).iter().copied();
        for entry in listed.get(first).into_iter().chain(further) {
            entries.insert(entry.path.clone(), entry.clone());
        }
    }
    entries
}

/// The same of a list of names and digests. A name that leads to a file in the tree stands for that file.
fn of_digests(root: &Root, Digests { files, links }: Digests, paths: &BTreeSet<RelPath>) -> Entries {
    let mut entries = Entries::new();
    for (path, digest) in files {
        if !paths.contains(&path) {
            continue;
        }
        let link = links && root.stat(&path, Follow::Never).is_ok_and(|found| found.kind == FileKind::Symlink);
        let led = || root.path_of(&root.open_read(&path, Follow::Beneath).ok()?).ok().flatten();
        let Some(path) = (if link { led() } else { Some(path) }) else { continue };
        let content = Content::File { size: 0, digest: Some(digest) };
        let owner = "".into();
        entries.insert(
            path.clone(),
            Entry { path, content, mtime: Timestamp::default(), mode: 0o644, group: "".into(), owner },
        );
    }
    entries
}

/// Adds the directories above that are not there.
fn above(root: &Root, listed: &Tree, entries: &mut Entries) {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let mtime = Timestamp { seconds: now.as_secs() as i64, nanoseconds: 0 };
    let above: BTreeSet<RelPath> = entries.keys().flat_map(|path| path.ancestors().collect::<Vec<_>>()).collect();
    // Numbers are names too.
    let owner: Name = rustix::process::geteuid().as_raw().to_string().into();
    let group: Name = rustix::process::getegid().as_raw().to_string().into();
    for path in above {
        if entries.contains_key(&path) || root.stat(&path, Follow::Never).is_ok() {
            continue;
        }
        let new = Entry {
            path: path.clone(),
            content: Content::Directory,
            mtime,
            mode: 0o755,
            owner: owner.clone(),
            group: group.clone(),
        };
        entries.insert(path.clone(), listed.get(&path).cloned().unwrap_or(new));
    }
}
