//! What the arguments of push and pull name: where content comes from, and where it goes.
//!
//! One directory becomes the contents of DEST. A file, or one of several SRC, gets a name in DEST, and nothing else in
//! DEST takes part.

use std::ffi::{OsStr, OsString};
use std::fs::Metadata;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, PoisonError};

use super::Failure;
use super::look::{Found, look};
use super::remote::{self, Destination};
use super::shown;
use super::transfer::{How, state_directory};
use crate::endpoint::delta::{Alike, Beginning, Wanted};
use crate::endpoint::local::{LocalSource, LocalTarget};
use crate::endpoint::several::{Part, Several};
use crate::endpoint::{Crew, Error, Reader, Scan, ScanOptions, Source, Target};
use crate::error::{Escaped, Exit, chain};
use crate::filter::Filter;
use crate::manifest::{Digest, Tree};
use crate::monitor::Monitor;
use crate::path::RelPath;
use crate::policy::PolicySpec;

/// Both ends of a run.
pub(super) struct Route {
    pub(super) source: Box<dyn Source>,
    pub(super) target: Box<dyn Target>,
    /// The names in the target that take part; `None` for all of it.
    pub(super) only: Option<Vec<Vec<u8>>>,
    /// The target is on another machine.
    pub(super) sending: bool,
    /// What a single file is called in the target.
    pub(super) called: Option<RelPath>,
}

/// A path of this machine or of another.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Place {
    Here(PathBuf),
    There(Destination),
}

impl Place {
    pub(super) fn parse(argument: &OsStr) -> Result<Place, Failure> {
        // A host's name is UTF-8, and so is what is sent to it; other bytes can only be a path of this machine.
        let remote = argument.to_str().map(Destination::parse).transpose()?.flatten();
        Ok(remote.map_or_else(|| Place::Here(PathBuf::from(argument)), Place::There))
    }

    pub(super) fn source(&self, how: &How, monitor: &dyn Monitor) -> Result<Box<dyn Source>, Failure> {
        Ok(match self {
            Place::Here(path) => Box::new(LocalSource::new(path, state_directory().as_deref())?),
            Place::There(there) => remote::source(there, &how.dial(), monitor)?,
        })
    }

    pub(super) fn target(&self, how: &How, monitor: &dyn Monitor) -> Result<Box<dyn Target>, Failure> {
        Ok(match self {
            Place::Here(path) => Box::new(LocalTarget::new(path, PolicySpec::default())),
            Place::There(there) => remote::target(there, &how.dial(), monitor)?,
        })
    }

    pub(super) fn bytes(&self) -> &[u8] {
        match self {
            Place::Here(path) => path.as_os_str().as_bytes(),
            Place::There(there) => there.path.as_bytes(),
        }
    }

    /// Refuses a path of another machine as `what`.
    pub(super) fn must_be_here(argument: &OsStr, what: &str) -> Result<(), Failure> {
        match Place::parse(argument)? {
            Place::Here(_) => Ok(()),
            Place::There(there) => Err(Failure::usage(format!(
                "'{0}' is a path on host '{1}', but {what}; a path of this machine with a colon is written './{0}'",
                shown(Path::new(argument)),
                Escaped(there.host.as_bytes())
            ))),
        }
    }

    /// The same machine with another path, cut out of this one's.
    fn with_path(&self, path: &[u8]) -> Place {
        match self {
            Place::Here(_) => Place::Here(PathBuf::from(OsStr::from_bytes(path))),
            Place::There(there) => {
                Place::There(Destination { path: String::from_utf8_lossy(path).into_owned(), ..there.clone() })
            }
        }
    }

    /// The directory above and the name in it; `None` where the path ends in no name (`.`, `..`, `/`, `~`).
    fn split(&self) -> Option<(Place, RelPath)> {
        let bytes = self.bytes();
        let end = bytes.iter().rposition(|&byte| byte != b'/')? + 1;
        let start = bytes[..end].iter().rposition(|&byte| byte == b'/').map_or(0, |at| at + 1);
        let name = &bytes[start..end];
        if name == b"~" {
            return None;
        }
        let above: &[u8] = match &bytes[..start] {
            [] => b".",
            slashes if slashes.iter().all(|&byte| byte == b'/') => b"/",
            above => &above[..above.len() - 1],
        };
        Some((self.with_path(above), RelPath::new(name).ok()?))
    }

    fn found(&self, how: &How) -> Result<Found, Failure> {
        match self {
            Place::There(there) => look(there, &how.ssh, &how.reach),
            Place::Here(path) => match std::fs::metadata(path) {
                Ok(metadata) => Ok(found(&metadata)),
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Found::Nothing),
                Err(error) => Err(Failure::io("look at", path)(error)),
            },
        }
    }
}

fn found(metadata: &Metadata) -> Found {
    match metadata {
        _ if metadata.is_dir() => Found::Directory,
        _ if metadata.is_file() => Found::File,
        _ => Found::Other,
    }
}

/// A file or directory that was named, by the directory it lies in.
struct Named {
    above: Place,
    name: RelPath,
    /// What it is to be called.
    called: RelPath,
}

fn named(place: &Place) -> Result<Named, Failure> {
    let nameless = || Failure::usage(format!("'{}' ends in no name to give it at the target", Escaped(place.bytes())));
    let Place::Here(path) = place else {
        let (above, name) = place.split().ok_or_else(nameless)?;
        return Ok(Named { above, called: name.clone(), name });
    };
    // A link that was named stands for what it points to, as for scp.
    let real = path.canonicalize().map_err(Failure::io("open", path))?;
    let (above, name) = Place::Here(real).split().ok_or_else(nameless)?;
    let called = place.split().map_or_else(|| name.clone(), |(_, called)| called);
    Ok(Named { above, name, called })
}

/// A source, and the names that it takes part with.
type Joined = (Box<dyn Source>, Option<Vec<Vec<u8>>>);

/// One source out of what was named, in as few parts as there are directories above.
fn join(named: Vec<Named>, shown: String, how: &How, monitor: &dyn Monitor) -> Result<Joined, Failure> {
    let mut groups: Vec<(Place, Vec<(RelPath, RelPath)>)> = Vec::new();
    let mut only: Vec<Vec<u8>> = Vec::new();
    for Named { above, name, called } in named {
        if only.iter().any(|taken| taken == called.as_bytes()) {
            return Err(Failure::usage(format!("two sources are called '{called}'; push them one after the other")));
        }
        only.push(called.as_bytes().to_vec());
        // One file under two names takes two parts: in each a name stands for one thing.
        let free = |(place, names): &&mut (Place, Vec<(RelPath, RelPath)>)| {
            *place == above && !names.iter().any(|(taken, _)| *taken == name)
        };
        match groups.iter_mut().find(free) {
            Some((_, names)) => names.push((name, called)),
            None => groups.push((above, vec![(name, called)])),
        }
    }
    if how.files_from.is_some() {
        return Err(Failure::usage("--files-from lists paths of one directory: name that directory alone as SRC"));
    }
    let parts: Result<Vec<Part>, Failure> =
        groups.into_iter().map(|(above, names)| Ok(Part { source: above.source(how, monitor)?, names })).collect();
    Ok((Box::new(Several::new(parts?, shown)), Some(only)))
}

fn shown_list(arguments: &[OsString]) -> String {
    let list: Vec<String> = arguments.iter().map(|argument| shown(Path::new(argument)).to_string()).collect();
    list.join(" ")
}

/// Where a single file goes: the directory, and its name there. As for cp and scp, a DEST that is a directory, or ends
/// in a slash, is what it goes into; any other is its new name.
fn place_of_file(file: Named, target: &Place, how: &How) -> Result<(Named, Place), Failure> {
    let into = target.bytes().ends_with(b"/");
    match target.split() {
        Some((above, called)) if !into && target.found(how)? != Found::Directory => {
            Ok((Named { called, ..file }, above))
        }
        _ => Ok((file, target.clone())),
    }
}

/// What the arguments of a run mean. `scan` is how a source of another machine is listed.
pub(super) fn route(
    sources: &[OsString],
    target: &OsStr,
    how: &How,
    scan: &ScanOptions,
    monitor: &dyn Monitor,
) -> Result<Route, Failure> {
    let target = Place::parse(target)?;
    let places: Vec<Place> = sources.iter().map(|source| Place::parse(source)).collect::<Result<_, _>>()?;
    let here = |place: &Place| matches!(place, Place::Here(_));
    if let Some(option) = how.ssh.given().or_else(|| how.reach.given())
        && here(&target)
        && places.iter().all(here)
    {
        let message = format!("{option} is for another machine, and none is named: write it as [USER@]HOST:PATH");
        return Err(Failure::usage(message));
    }
    let shown = shown_list(sources);
    let sending = matches!(target, Place::There(_));
    let [place] = places.as_slice() else {
        let all: Result<Vec<Named>, Failure> = places.iter().map(named).collect();
        let (source, only) = join(all?, shown, how, monitor)?;
        return Ok(Route { source, target: target.target(how, monitor)?, only, sending, called: None });
    };
    if let Some(source) = whole(place, how, scan, monitor)? {
        if let (Place::Here(from), Place::Here(to)) = (place, &target) {
            apart(from, to, how)?;
        }
        return Ok(Route { source, target: target.target(how, monitor)?, only: None, sending, called: None });
    }
    let (file, target) = place_of_file(named(place)?, &target, how)?;
    let called = Some(file.called.clone());
    let (source, only) = join(vec![file], shown, how, monitor)?;
    Ok(Route { source, target: target.target(how, monitor)?, only, sending, called })
}

/// Refuses a directory of this machine as the target of what it holds, which would grow with each run, and a source
/// that its own run would delete.
fn apart(source: &Path, target: &Path, how: &How) -> Result<(), Failure> {
    let absolute = |path: &Path| std::path::absolute(path).map_err(Failure::io("find", path));
    let (from, to) = (source.canonicalize().map_err(Failure::io("open", source))?, absolute(target)?);
    // What is not there yet has no links in it.
    let there = to.ancestors().find_map(|above| Some((above.canonicalize().ok()?, to.strip_prefix(above).ok()?)));
    let to = there
        .map_or_else(|| to.clone(), |(above, rest)| if rest.as_os_str().is_empty() { above } else { above.join(rest) });
    let refused = |message: String| Err(Failure::usage(message));
    let (shown_source, shown_target) = (shown(source), shown(target));
    if from == to {
        return refused(format!("'{shown_source}' and '{shown_target}' are the same directory"));
    }
    if let Ok(below) = to.strip_prefix(&from) {
        let filter = Filter::compile(&how.filter()?).map_err(|error| Failure::usage(chain(&error)))?;
        let path = RelPath::new(below.as_os_str().as_bytes()).map_err(|error| Failure::usage(error.to_string()))?;
        let takes_part = path.ancestors().all(|above| filter.admits(&above, true)) && filter.admits(&path, true);
        if takes_part {
            return refused(format!(
                "'{shown_target}' lies in '{shown_source}', and would be sent into itself; leave it out with --exclude"
            ));
        }
    }
    if how.deletes() && from.starts_with(&to) {
        return refused(format!("--delete would remove '{shown_source}' itself, which lies in '{shown_target}'"));
    }
    Ok(())
}

/// A directory as a source; `None` when the place is a file.
fn whole(
    place: &Place,
    how: &How,
    scan: &ScanOptions,
    monitor: &dyn Monitor,
) -> Result<Option<Box<dyn Source>>, Failure> {
    if let Place::Here(path) = place {
        return match found(&std::fs::metadata(path).map_err(Failure::io("open", path))?) {
            Found::Directory => place.source(how, monitor).map(Some),
            Found::File => Ok(None),
            _ => Err(Failure::usage(format!("'{}' is neither a file nor a directory", shown(path)))),
        };
    }
    // Listed before anything is made at the target. It nearly always is a directory: only when it cannot be listed as
    // one is it looked at, which costs a connection more.
    let source = place.source(how, monitor)?;
    match source.scan(scan, monitor) {
        Ok(scan) => Ok(Some(Box::new(Listed { source, scan: Mutex::new(Some(scan)) }))),
        Err(error) if matches!(error.exit(), Exit::Trust | Exit::TryAgain) => Err(error.into()),
        Err(error) => {
            drop(source);
            match place.found(how)? {
                Found::File => Ok(None),
                // As scp has it done by the shell there.
                Found::Nothing if place.bytes().iter().any(|byte| b"*?[".contains(byte)) => {
                    let message = format!(
                        "there is no '{}'; patterns are not looked up there: name the directory, and what is wanted of it \
                         with --files-from, --exclude and --include",
                        Escaped(place.bytes())
                    );
                    Err(Failure::Plain { exit: error.exit(), message })
                }
                _ => Err(error.into()),
            }
        }
    }
}

/// A source that was listed already.
struct Listed {
    source: Box<dyn Source>,
    scan: Mutex<Option<Scan>>,
}

impl Source for Listed {
    fn describe(&self) -> String {
        self.source.describe()
    }

    fn scan(&self, options: &ScanOptions, monitor: &dyn Monitor) -> Result<Scan, Error> {
        let listed = self.scan.lock().unwrap_or_else(PoisonError::into_inner).take();
        listed.map_or_else(|| self.source.scan(options, monitor), Ok)
    }

    fn reader(&self, tree: Arc<Tree>) -> Result<Box<dyn Reader + '_>, Error> {
        self.source.reader(tree)
    }

    fn remember(&self, tree: &Tree, digests: &[(u32, Digest)]) {
        self.source.remember(tree, digests);
    }

    fn begins_with(&self, tree: &Tree, index: u32, beginning: Beginning) -> bool {
        self.source.begins_with(tree, index, beginning)
    }

    fn wire_bytes(&self) -> u64 {
        self.source.wire_bytes()
    }

    fn crew(&self) -> Crew {
        self.source.crew()
    }

    fn is_far(&self) -> bool {
        self.source.is_far()
    }

    fn compares(&self) -> bool {
        self.source.compares()
    }

    fn compare(&self, index: u32, over: &AtomicBool, ask: &mut dyn FnMut(Wanted) -> Option<Alike>) {
        self.source.compare(index, over, ask);
    }

    fn expect(&self, bytes: u64, files: usize) {
        self.source.expect(bytes, files);
    }

    fn remark(&self, monitor: &dyn Monitor) {
        self.source.remark(monitor);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_is_split_into_the_directory_above_and_a_name() {
        let split = |text: &str| {
            let (above, name) = Place::parse(OsStr::new(text)).unwrap().split()?;
            Some((String::from_utf8(above.bytes().to_vec()).unwrap(), name.to_string()))
        };
        for (path, above, name) in [
            ("a", ".", "a"),
            ("a/", ".", "a"),
            ("/a", "/", "a"),
            ("//a//", "/", "a"),
            ("x/y/a", "x/y", "a"),
            ("h:/models/a.ckpt", "/models", "a.ckpt"),
            ("h:a.ckpt", ".", "a.ckpt"),
            ("u@h:~/a", ".", "a"),
        ] {
            assert_eq!(split(path), Some((above.into(), name.into())), "{path}");
        }
        for path in ["/", ".", "..", "x/..", "h:/", "h:~", "h:."] {
            assert_eq!(split(path), None, "{path}");
        }
    }
}
