//! `lockstep manifest`: lists a tree with the SHA-256 of each file, and checks a tree against such a list.

use std::collections::HashSet;
use std::fmt::Write as _;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

use clap::{Args, Subcommand, ValueEnum};
use sha2::{Digest as _, Sha256};

use super::display::{Display, Verbosity};
use super::whole::replace;
use super::{Failure, output, shown};
use crate::endpoint::local::LocalSource;
use crate::endpoint::{Fetch, Links, Produced, ScanOptions, Source as _};
use crate::error::{Escaped, Exit, chain, counted};
use crate::manifest::{Content, Digest, Entry, Manifest, Timestamp, Tree, format, sums};
use crate::monitor::Severity;
use crate::path::RelPath;
use crate::root::{FileKind, Follow, Metadata, Root};
use crate::signature::oms::Statement;

mod diff;
mod model;
mod sign;

pub(super) use model::Model;
pub(super) use sign::{Trust, listed as trusted_file, local};

/// Where a target keeps the manifest of what was published.
const PUBLISHED: &str = ".lockstep/manifest";

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// List a directory with the SHA-256 of each file
    Create(Create),
    /// Print a manifest in columns: mode, owner, group, size, SHA-256, path
    Show {
        /// A manifest, or a directory that was published to
        path: PathBuf,
    },
    /// Say what differs between two manifests, or what was published to two directories
    ///
    /// Reads the lists alone: whether a directory still holds what its list says is for 'manifest verify'. Each path that
    /// differs is a line on standard output, and the exit code is then 1.
    Diff(diff::Diff),
    /// Sign a manifest with an SSH key, or the files that it lists for OpenSSF Model Signing
    ///
    /// Writes a signature that says who vouches for the list, and so for the content of each file on it: 'check' and 'manifest
    /// verify' check it with --require-signature.
    ///
    /// --format sshsig, the default, is for those who have lockstep or OpenSSH: 'ssh-keygen -Y verify' checks it too, with the
    /// namespace manifest@lockstep.internal. All of the list is signed as it stands; whether the directory holds what it says is
    /// for 'manifest verify', first.
    ///
    /// --format oms is for those who have model_signing (of PyPI): 'model_signing verify key PATH --signature
    /// PATH/.lockstep/model.sig --public_key PUB.pem' checks it. Files alone are signed, by name and SHA-256, and only when
    /// the directory holds what its manifest says.
    Sign(sign::Sign),
    /// Read every file of a directory and compare it with a list
    ///
    /// Each file that differs, is missing, is not listed or cannot be read is a line on standard output, and the exit
    /// code is 1. Owner, permissions and times are not compared. A list in the format of sha256sum says nothing about
    /// directories and symbolic links, so those are not compared with it. What a .lockstepignore leaves out is compared
    /// only where it is listed.
    Verify(Verify),
}

impl Command {
    pub(super) fn run(self) -> Result<Exit, Failure> {
        match self {
            Command::Create(create) => create.run(),
            Command::Show { path } => show(&path),
            Command::Diff(diff) => diff.run(),
            Command::Sign(sign) => sign.run(),
            Command::Verify(verify) => verify.run(),
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Format {
    /// All that lockstep knows: kinds, sizes, times, permissions, owners, links
    Native,
    /// Files alone, as `sha256sum -c` reads it from within the directory
    Sha256sum,
}

#[derive(Debug, Args)]
pub(super) struct Create {
    /// The directory
    path: PathBuf,
    /// How to write the list
    #[arg(long, value_enum, default_value = "native")]
    format: Format,
    /// Write to this file, which is replaced at once when the list is complete, and is not listed itself
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(super) struct Verify {
    /// The directory
    directory: PathBuf,
    /// A native manifest [default: DIRECTORY/.lockstep/manifest, written when the directory was published]
    #[arg(long, value_name = "FILE", conflicts_with = "sums")]
    manifest: Option<PathBuf>,
    /// A list in the format of sha256sum, with names relative to the directory
    #[arg(long, value_name = "FILE", conflicts_with = "require_signature")]
    sums: Option<PathBuf>,
    /// Refuse a manifest of an earlier publication than this one (exit code 1)
    #[arg(long, value_name = "N", conflicts_with = "sums")]
    min_generation: Option<u64>,
    #[command(flatten)]
    trust: sign::Trust,
}

/// A path (`None` for the root) and what is to be said of it.
type Remark = (Option<RelPath>, String);

/// A tree in which all files that could be read have their digests.
struct Hashed {
    tree: Tree,
    /// Files and directories without digest or content, with the reason.
    unreadable: Vec<Remark>,
    /// Sockets, FIFOs and devices: a tree cannot hold them.
    left_out: Vec<Remark>,
}

fn name(path: Option<&RelPath>) -> String {
    path.map_or_else(|| ".".to_owned(), RelPath::to_string)
}

/// Scans and reads everything; nothing is taken from a cache.
fn hash(directory: &Path) -> Result<Hashed, Failure> {
    let source = LocalSource::new(directory, None)?;
    let display = Display::new(Verbosity::Quiet, false);
    let options = ScanOptions { hash_all: true, links: Links::All, ..ScanOptions::default() };
    let scan = source.scan(&options, &display)?;
    let (mut unreadable, mut left_out) = (Vec::new(), Vec::new());
    for problem in scan.problems {
        match problem.severity {
            Severity::Failed => unreadable.push((problem.path, problem.message)),
            Severity::Skipped => left_out.push((problem.path, problem.message)),
        }
    }
    let tree = Arc::new(scan.tree);
    let found = Mutex::new(Vec::new());
    let next = AtomicU32::new(0);
    let workers = std::thread::available_parallelism().map_or(2, usize::from).min(16);
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..workers).map(|_| scope.spawn(|| read(&source, &tree, &next, &found))).collect();
        workers.into_iter().try_for_each(|worker| match worker.join() {
            Ok(result) => result,
            Err(panic) => std::panic::resume_unwind(panic),
        })
    })?;
    let mut tree = Arc::unwrap_or_clone(tree);
    let mut found = found.into_inner().unwrap_or_else(PoisonError::into_inner);
    found.sort_by_key(|&(index, _)| index);
    for (index, result) in found {
        match result {
            Ok(digest) => tree.set_digest(index as usize, digest),
            Err(message) => {
                unreadable.push((tree.entries().get(index as usize).map(|entry| entry.path.clone()), message));
            }
        }
    }
    Ok(Hashed { tree, unreadable, left_out })
}

type Results = Mutex<Vec<(u32, Result<Digest, String>)>>;

/// One worker: takes the next file until there is none.
fn read(source: &LocalSource, tree: &Arc<Tree>, next: &AtomicU32, found: &Results) -> Result<(), Failure> {
    let mut reader = source.reader(Arc::clone(tree))?;
    loop {
        let index = next.fetch_add(1, Ordering::Relaxed);
        let Some(entry) = tree.entries().get(index as usize) else { return Ok(()) };
        if entry.file().is_none() {
            continue;
        }
        reader.push(Fetch::of(index));
        while let Some(produced) = reader.next()? {
            let result = match produced {
                Produced::Data { .. } | Produced::Hole { .. } | Produced::Copy { .. } => continue,
                Produced::Whole { index, digest, .. }
                | Produced::End { index, digest }
                | Produced::Same { index, digest } => (index, Ok(digest)),
                Produced::Failed { index, message, .. } => (index, Err(message)),
            };
            found.lock().unwrap_or_else(PoisonError::into_inner).push(result);
        }
    }
}

/// Where `file` lies below `directory`, if it does: a list neither lists itself nor is unlisted.
fn place_of(file: &Path, directory: &Path) -> Option<RelPath> {
    let name = file.file_name()?;
    let parent = file.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let whole = parent.canonicalize().ok()?.join(name);
    let below = whole.strip_prefix(directory.canonicalize().ok()?).ok()?;
    RelPath::new(below.as_os_str().as_encoded_bytes()).ok()
}

impl Create {
    fn run(self) -> Result<Exit, Failure> {
        let Hashed { mut tree, unreadable, left_out } = hash(&self.path)?;
        for (path, message) in &left_out {
            eprintln!("lockstep: '{}' is left out: {message}", name(path.as_ref()));
        }
        if !unreadable.is_empty() {
            for (path, message) in &unreadable {
                eprintln!("lockstep: '{}': {message}", name(path.as_ref()));
            }
            let message = format!(
                "{} could not be read, so no list was written",
                counted(unreadable.len() as u64, "path", "paths")
            );
            return Err(Failure::Plain { exit: Exit::Incomplete, message });
        }
        if let Some(own) = self.output.as_ref().and_then(|file| place_of(file, &self.path)) {
            let mut entries = tree.into_entries();
            entries.retain(|entry| entry.path != own);
            tree = Tree::new(entries).map_err(|error| Failure::usage(error.to_string()))?;
        }
        let text = match self.format {
            Format::Sha256sum => sums::write(&tree),
            Format::Native => format::encode(&Manifest { generation: 0, created: now(), tree }),
        };
        match &self.output {
            None => output(&text)?,
            Some(file) => replace(file, &text).map_err(Failure::io("write", file))?,
        }
        Ok(Exit::Done)
    }
}

fn now() -> Timestamp {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    Timestamp { seconds: since.as_secs().try_into().unwrap_or(i64::MAX), nanoseconds: since.subsec_nanos() }
}

/// Reads and checks a native manifest: `file`, or that of what was published to `directory`.
fn load(file: Option<&Path>, directory: &Path) -> Result<Manifest, Failure> {
    let (at, text) = read_text(file, directory)?;
    decode(&at, &text)
}

/// The text of a native manifest, and where it is.
pub(super) fn read_text(file: Option<&Path>, directory: &Path) -> Result<(PathBuf, Vec<u8>), Failure> {
    if let Some(file) = file {
        return Ok((file.to_owned(), std::fs::read(file).map_err(Failure::io("read", file))?));
    }
    published(directory)?.ok_or_else(|| {
        Failure::usage(format!(
            "'{}' has no manifest: nothing was published there; name a list with --manifest or --sums",
            shown(directory)
        ))
    })
}

/// The manifest of what was published to a directory, and where it is; `None` where nothing was.
pub(super) fn published(directory: &Path) -> Result<Option<(PathBuf, Vec<u8>)>, Failure> {
    let at = directory.join(PUBLISHED);
    let path = RelPath::new(PUBLISHED).map_err(|error| Failure::usage(error.to_string()))?;
    let mut text = Vec::new();
    match Root::open(directory)?.open_read(&path, Follow::Never) {
        Ok(mut open) => open.read_to_end(&mut text).map_err(Failure::io("read", &at))?,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    Ok(Some((at, text)))
}

fn decode(at: &Path, text: &[u8]) -> Result<Manifest, Failure> {
    format::decode(text).map_err(|error| {
        Failure::bad_data(format!("'{}': {}; get the manifest again from where it came from", shown(at), chain(&error)))
    })
}

fn show(path: &Path) -> Result<Exit, Failure> {
    let directory = std::fs::metadata(path).map_err(Failure::io("read", path))?.is_dir();
    let manifest = load((!directory).then_some(path), path)?;
    let mut text = String::new();
    let (entries, created) = (manifest.tree.entries(), manifest.created.seconds);
    let _ = writeln!(text, "# generation {}, created @{created}, {} entries", manifest.generation, entries.len());
    for entry in entries {
        let (size, digest, kind, more) = match &entry.content {
            Content::File { size, digest } => (size.to_string(), digest.map(|d| d.to_string()), '-', String::new()),
            Content::Directory => ("-".into(), None, 'd', "/".into()),
            Content::Symlink { target } => ("-".into(), None, 'l', format!(" -> {}", Escaped(target))),
            Content::HardLink { first } => ("-".into(), None, 'h', format!(" = {first}")),
        };
        let (mode, digest) = (entry.mode, digest.unwrap_or_else(|| "-".into()));
        let (owner, group) = (Escaped(entry.owner.as_bytes()), Escaped(entry.group.as_bytes()));
        let _ = writeln!(text, "{kind}{mode:04o} {owner} {group} {size:>12} {digest:<64} {}{more}", entry.path);
    }
    output(text.as_bytes())?;
    Ok(Exit::Done)
}

/// What a path was found to be.
#[derive(Debug, PartialEq, Eq)]
enum Found {
    File { size: u64, digest: Digest },
    Directory,
    Symlink(Box<[u8]>),
    Other,
}

impl Found {
    fn name(&self) -> &'static str {
        match self {
            Found::File { .. } => "a file",
            Found::Directory => "a directory",
            Found::Symlink(_) => "a symbolic link",
            Found::Other => "a special file",
        }
    }
}

/// What a directory is compared with.
struct Against {
    expected: Vec<(RelPath, Expected)>,
    /// It tells files alone, by digest.
    files_only: bool,
    /// The signature of a model that is the list.
    signed: Option<Statement>,
}

impl Against {
    fn tree(tree: &Tree) -> Against {
        Against { expected: listed(tree), files_only: false, signed: None }
    }

    fn signed(statement: Statement) -> Against {
        let expected = statement.files.iter().map(|(path, digest)| (path.clone(), Expected::Digest(*digest)));
        Against { expected: expected.collect(), files_only: true, signed: Some(statement) }
    }

    /// Whether a link may stand where a file is listed.
    fn follows(&self) -> bool {
        self.files_only && self.signed.as_ref().is_none_or(|statement| statement.links)
    }

    /// Whether what lies there ought to be listed.
    fn covers(&self, root: &Root, entry: &Entry) -> bool {
        let Some(statement) = &self.signed else {
            return !self.files_only || matches!(entry.content, Content::File { .. } | Content::HardLink { .. });
        };
        // What such a link leads to is signed under its own name.
        let directory = statement.links
            && matches!(entry.content, Content::Symlink { .. })
            && root.stat(&entry.path, Follow::Beneath).is_ok_and(|found| found.kind == FileKind::Directory);
        statement.covers(&entry.path, &entry.content) && !directory
    }
}

impl Verify {
    /// The list, when its signature and its generation are what is asked for.
    fn against(&self) -> Result<Against, Failure> {
        if let Some(file) = &self.sums {
            return Ok(Against { expected: listed_sums(file)?, files_only: true, signed: None });
        }
        let (at, text) = match self.trust.model(&self.directory)? {
            None => {
                let (at, text) = read_text(self.manifest.as_deref(), &self.directory)?;
                // Before anything of it is believed: what is signed is these bytes.
                self.trust.check(self.manifest.as_deref(), &self.directory, &text)?;
                (at, text)
            }
            Some(model) => match model.list(self.manifest.as_deref(), &self.directory)? {
                Some(list) => list,
                None if self.min_generation.is_some() => {
                    let message = "what is signed has no generation, and --min-generation asks for one";
                    return Err(Failure::bad_data(message));
                }
                None => return Ok(Against::signed(model.statement)),
            },
        };
        let manifest = decode(&at, &text)?;
        match self.min_generation {
            Some(least) if manifest.generation < least => Err(Failure::bad_data(format!(
                "'{}' is of generation {}, older than {least}: it was replaced since, and is played again; get the current one",
                shown(&at),
                manifest.generation
            ))),
            _ => Ok(Against::tree(&manifest.tree)),
        }
    }

    fn run(self) -> Result<Exit, Failure> {
        // The list first: a bad one is told before hours of reading.
        let against = self.against()?;
        let expected = &against.expected;
        let list = self.sums.as_ref().or(self.manifest.as_ref());
        let Hashed { tree, unreadable, left_out } = hash(&self.directory)?;
        let root = Root::open(&self.directory)?;
        let mut lines: Vec<Remark> =
            unreadable.into_iter().map(|(path, message)| (path, format!("unreadable: {message}"))).collect();
        let failed: HashSet<RelPath> = lines.iter().filter_map(|(path, _)| path.clone()).collect();
        for (path, expected) in expected.iter().filter(|(path, _)| !failed.contains(path)) {
            let difference = match find(&root, &tree, path, against.follows()) {
                Ok(None) => Some("missing".to_owned()),
                Ok(Some(found)) => expected.difference(&found),
                Err(message) => Some(format!("unreadable: {message}")),
            };
            lines.extend(difference.map(|difference| (Some(path.clone()), difference)));
        }
        let known: HashSet<&RelPath> = expected.iter().map(|(path, _)| path).collect();
        let signature = self.trust.file(self.manifest.as_deref(), &self.directory);
        let own = [list, signature.as_ref()].map(|file| file.and_then(|file| place_of(file, &self.directory)));
        for entry in tree.entries() {
            let excused =
                known.contains(&entry.path) || failed.contains(&entry.path) || own.contains(&Some(entry.path.clone()));
            if !excused && against.covers(&root, entry) {
                lines.push((Some(entry.path.clone()), "not listed".to_owned()));
            }
        }
        // A path that is listed and became a FIFO is told above, as what it is now.
        for (path, _) in left_out {
            let ignored = |path| against.signed.as_ref().is_some_and(|statement| statement.ignores(path));
            if !path.as_ref().is_some_and(|path| known.contains(path) || ignored(path)) {
                lines.push((path, "not listed".to_owned()));
            }
        }
        lines.sort();
        let mut text = String::new();
        for (path, line) in &lines {
            let _ = writeln!(text, "{}: {line}", name(path.as_ref()));
        }
        if lines.is_empty() {
            let _ = writeln!(
                text,
                "{}: {} verified, all as listed",
                shown(&self.directory),
                counted(expected.len() as u64, "path", "paths")
            );
        }
        output(text.as_bytes())?;
        match lines.len() {
            0 => Ok(Exit::Done),
            wrong => Err(Failure::bad_data(format!(
                "'{}' is not as listed: paths that are wrong: {wrong}, paths that are listed: {}; do not use it",
                shown(&self.directory),
                expected.len()
            ))),
        }
    }
}

/// What a list says of a path.
enum Expected {
    Exactly(Found),
    /// A file of any size: lists of sha256sum have none.
    Digest(Digest),
}

impl Expected {
    fn difference(&self, found: &Found) -> Option<String> {
        match (self, found) {
            (Expected::Exactly(expected), found) if expected == found => None,
            (Expected::Digest(expected), Found::File { digest, .. }) if expected == digest => None,
            (Expected::Exactly(Found::File { size: expected, .. }), Found::File { size, .. }) if expected != size => {
                Some(format!("differs: {size} bytes, listed with {expected}"))
            }
            (
                Expected::Exactly(Found::File { digest: expected, .. }) | Expected::Digest(expected),
                Found::File { digest, .. },
            ) => Some(format!("differs: SHA-256 {digest}, listed with {expected}")),
            (Expected::Exactly(Found::Symlink(expected)), Found::Symlink(target)) => {
                Some(format!("differs: points to '{}', listed with '{}'", Escaped(target), Escaped(expected)))
            }
            (Expected::Exactly(expected), found) => {
                Some(format!("differs: {}, listed as {}", found.name(), expected.name()))
            }
            (Expected::Digest(_), found) => Some(format!("differs: {}, listed as a file", found.name())),
        }
    }
}

fn listed(tree: &Tree) -> Vec<(RelPath, Expected)> {
    let paths = tree.entries().iter().map(|entry| entry.path.clone());
    paths.filter_map(|path| content(tree, &path).map(|found| (path, Expected::Exactly(found)))).collect()
}

fn listed_sums(file: &Path) -> Result<Vec<(RelPath, Expected)>, Failure> {
    let text = std::fs::read(file).map_err(Failure::io("read", file))?;
    let sums = sums::parse(&text)
        .map_err(|error| Failure::bad_data(format!("'{}', {}; the list is not used", shown(file), chain(&error))))?;
    if sums.is_empty() {
        return Err(Failure::bad_data(format!("'{}' is empty: it proves nothing", shown(file))));
    }
    Ok(sums.into_iter().map(|(path, digest)| (path, Expected::Digest(digest))).collect())
}

/// What `tree` says of `path`, hard links as the file that they are; `None` where it says nothing.
fn content(tree: &Tree, path: &RelPath) -> Option<Found> {
    match &tree.get(path)?.content {
        Content::File { size, digest } => digest.map(|digest| Found::File { size: *size, digest }),
        Content::Directory => Some(Found::Directory),
        Content::Symlink { target } => Some(Found::Symlink(target.clone())),
        Content::HardLink { first } => content(tree, first),
    }
}

/// What is at `path`: as it was scanned, or else (what an ignore file leaves out of a scan) as it lies on the disk.
/// `follow` symbolic links that stay below the root, as sha256sum does.
fn find(root: &Root, tree: &Tree, path: &RelPath, follow: bool) -> Result<Option<Found>, String> {
    match content(tree, path) {
        Some(Found::Symlink(_)) if follow => {}
        Some(found) => return Ok(Some(found)),
        None => {}
    }
    let rule = if follow { Follow::Beneath } else { Follow::Never };
    let metadata = match root.stat(path, rule) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(chain(&error)),
    };
    Ok(Some(match metadata.kind {
        FileKind::Directory => Found::Directory,
        FileKind::Symlink => Found::Symlink(root.read_link(path).map_err(|error| chain(&error))?.into()),
        FileKind::Regular => {
            let mut file = root.open_read(path, rule).map_err(|error| chain(&error))?;
            // RACE: another file, even a FIFO, may have come to the path since; what is open is what counts.
            if Metadata::of(&file).map_err(|error| error.to_string())?.kind != FileKind::Regular {
                return Ok(Some(Found::Other));
            }
            digest(&mut file).map_err(|error| error.to_string())?
        }
        _ => Found::Other,
    }))
}

fn digest(file: &mut std::fs::File) -> std::io::Result<Found> {
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 256 * 1024];
    let mut size = 0;
    loop {
        match file.read(&mut buffer) {
            Ok(0) => return Ok(Found::File { size, digest: Digest(hash.finalize().into()) }),
            Ok(read) => {
                hash.update(&buffer[..read]);
                size += read as u64;
            }
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}
