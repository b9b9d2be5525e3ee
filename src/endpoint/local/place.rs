//! Where a tree of this machine lies: at a path that whoever runs this chose, or beneath a descriptor that a client may
//! not leave.
//!
//! What always holds: of a place beneath a root no component is looked up outside it and none is a symbolic link,
//! whatever is renamed or replaced there meanwhile.

use std::ffi::OsStr;
use std::io::ErrorKind;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{Mode, RenameFlags};

use super::links::Confined;
use crate::endpoint::Error;
use crate::path::RelPath;
use crate::root::{Follow, Root, RootError};
use crate::staging::must_be_own;

/// Where a tree lies.
#[derive(Debug, Clone)]
pub(super) enum Place {
    /// By name; links in it are followed.
    Named(PathBuf),
    /// Below an open directory; `None` is that directory itself.
    Beneath(Arc<Root>, Option<RelPath>),
}

/// A directory that is made under a hidden name beside its own.
#[derive(Debug)]
pub(super) struct Birth {
    above: Root,
    hidden: RelPath,
    name: RelPath,
}

impl Place {
    /// The whole path, for messages.
    pub(super) fn shown(&self) -> PathBuf {
        match self {
            Place::Named(path) => path.clone(),
            Place::Beneath(root, None) => root.shown().to_owned(),
            Place::Beneath(root, Some(path)) => root.shown().join(path.as_path()),
        }
    }

    /// The path that whoever asks for it knows it by.
    pub(super) fn called(&self) -> PathBuf {
        match self {
            Place::Named(path) => path.clone(),
            Place::Beneath(_, path) => Path::new("/").join(path.as_ref().map_or(Path::new(""), RelPath::as_path)),
        }
    }

    /// Where it is below the root that a client is confined to; `None` where nobody is.
    pub(super) fn confined(&self) -> Option<Confined> {
        match self {
            Place::Named(_) => None,
            Place::Beneath(_, path) => Some(Confined(path.clone())),
        }
    }

    /// Opens the directory.
    pub(super) fn open(&self) -> Result<Root, RootError> {
        match self {
            Place::Named(path) => Root::open(path),
            Place::Beneath(root, None) => root.reopen(),
            Place::Beneath(root, Some(path)) => root.subroot(path),
        }
    }

    /// Opens the directory that holds it, which is made where it is missing, and says its name there.
    fn above(&self) -> Result<(Root, &[u8]), Error> {
        let io = super::target::io;
        let nameless = || Error::Usage(format!("'{}' cannot be a target", crate::error::shown(&self.shown())));
        match self {
            Place::Named(path) => {
                let (Some(above), Some(name)) = (path.parent(), path.file_name()) else { return Err(nameless()) };
                let above = if above.as_os_str().is_empty() { Path::new(".") } else { above };
                std::fs::create_dir_all(above).map_err(|source| Error::Io {
                    operation: "make the directory above",
                    path: crate::error::shown(path).to_string(),
                    source,
                })?;
                Ok((Root::open(above).map_err(io)?, name.as_bytes()))
            }
            Place::Beneath(_, None) => Err(nameless()),
            Place::Beneath(root, Some(path)) => {
                let above = match path.parent() {
                    None => root.reopen(),
                    // 0777 less the umask, as mkdir(1) makes them.
                    Some(above) => root.mkdir_all(&above, 0o777).and_then(|()| root.subroot(&above)),
                };
                Ok((above.map_err(io)?, path.name()))
            }
        }
    }

    /// Makes the directory under its hidden name, or finds the one that an interrupted run made.
    pub(super) fn bear(&self) -> Result<(Root, Birth), Error> {
        let io = super::target::io;
        let invalid = |error: crate::path::InvalidPath| Error::Usage(error.to_string());
        let (above, name) = self.above()?;
        let hidden = RelPath::new([b".", name, b".lockstep"].concat()).map_err(invalid)?;
        let name = RelPath::new(name).map_err(invalid)?;
        match above.mkdir(&hidden, 0o700) {
            Err(error) if error.kind() != ErrorKind::AlreadyExists => return Err(io(error)),
            _ => {}
        }
        let root = above.subroot(&hidden).map_err(io)?;
        // Whoever may write in the directory above may have made it, with what is to be carried out in it.
        must_be_own(&root)
            .map_err(|error| Error::Refused { by: "the receiver".into(), reason: crate::error::chain(&error) })?;
        Ok((root, Birth { above, hidden, name }))
    }
}

impl Birth {
    /// Whether the directory, which is `root`, still has its hidden name, and nothing the one it is to have. Whoever waited for
    /// another run may find that this was its birth too.
    pub(super) fn is_due(&self, root: &Root) -> Result<bool, Error> {
        let found = |path| match self.above.stat(path, Follow::Never) {
            Ok(found) => Ok(Some((found.device, found.inode))),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(super::target::io(error)),
        };
        let own = root.stat_root().map_err(super::target::io)?;
        Ok(found(&self.hidden)? == Some((own.device, own.inode)) && found(&self.name)?.is_none())
    }

    /// Gives the directory, which is `root`, its name. Fails when something has got that name meanwhile.
    pub(super) fn appear(&self, root: &Root) -> Result<(), Error> {
        let io = super::target::io;
        let directory = root.open_dir(None, Follow::Never).map_err(io)?;
        rustix::fs::fchmod(&directory, Mode::from_raw_mode(0o755)).map_err(|errno| Error::Io {
            operation: "set the mode of",
            path: crate::error::shown(root.shown()).to_string(),
            source: errno.into(),
        })?;
        let rename = |flags| self.above.rename(&self.hidden, &self.name, flags);
        // FUSE and NFS may not know the flag.
        // RACE: without it an empty directory that somebody makes just now is replaced; nothing else can be.
        let named = rename(RenameFlags::NOREPLACE).or_else(|error| match error.kind() {
            ErrorKind::InvalidInput => rename(RenameFlags::empty()),
            _ => Err(error),
        });
        named.map_err(io)?;
        // DURABILITY: the name of a new tree is on stable storage before the run is said to be done.
        self.above.sync_dir(None).map_err(io)
    }
}

/// A client's path below a root: a leading slash or `~` is the root itself, empty and `.` components do not count.
///
/// # Errors
/// [`Error::Refused`] for `..` and whatever else is no [`RelPath`].
pub fn beneath(path: &[u8]) -> Result<Option<RelPath>, Error> {
    let path = path.strip_prefix(b"~").filter(|rest| rest.is_empty() || rest[0] == b'/').unwrap_or(path);
    let parts: Vec<&[u8]> = path.split(|&byte| byte == b'/').filter(|part| !part.is_empty() && *part != b".").collect();
    if parts.is_empty() {
        return Ok(None);
    }
    let refused =
        |error: crate::path::InvalidPath| Error::Refused { by: "the server".into(), reason: error.to_string() };
    RelPath::new(parts.join(&b'/')).map(Some).map_err(refused)
}

/// A client's path where it is not confined: relative paths, and `~`, start at `home`.
pub fn anywhere(home: &Path, path: &[u8]) -> PathBuf {
    let path = Path::new(OsStr::from_bytes(path));
    home.join(path.strip_prefix("~").unwrap_or(path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn h01_h02_a_clients_path_stays_below_the_root() {
        let cases: [(&str, Option<&str>); 8] = [
            ("/", None),
            ("", None),
            ("~", None),
            ("/a/b", Some("a/b")),
            ("a//b/", Some("a/b")),
            ("~/x", Some("x")),
            ("/etc", Some("etc")),
            ("./~x", Some("~x")),
        ];
        for (asked, found) in cases {
            let found = found.map(|path| RelPath::new(path).unwrap());
            assert_eq!(beneath(asked.as_bytes()).unwrap(), found, "{asked}");
        }
        for asked in ["..", "/../etc", "a/../../b", "a\0b"] {
            assert!(beneath(asked.as_bytes()).is_err(), "{asked}");
        }
    }
}
