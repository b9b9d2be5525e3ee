//! Owner, ACL, mode and time of what is there already, and of directories that are about to be.

use std::collections::HashMap;

use rustix::fs::RenameFlags;

use super::put::Put;
use super::target::{Run, io, rel, stage_failure};
use crate::access::{AclLists, Inode};
use crate::endpoint::Error;
use crate::manifest::{Content, Digest, Entry};
use crate::path::RelPath;
use crate::root::{FileKind, Fingerprint, Root};
use crate::scan::names;
use crate::staging::{Permissions, apply, hash_of};

/// The name in the staging directory of a copy that takes the place of a file with names elsewhere.
const COPY: &str = "detached";
const CHANGED: &str = "it was changed by somebody else after it was compared; the next run looks at it again";

/// The ACLs that rules give to paths whose permissions are set after they are published. They are no part of the
/// manifest, and whoever finishes an interrupted run has to know them.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Acls(HashMap<RelPath, AclLists>);

impl Acls {
    /// Remembers what the rules say of an entry; nothing where no rule matches.
    pub(super) fn add(&mut self, run: &Run, entry: &Entry) -> Result<(), Error> {
        if self.0.contains_key(&entry.path) || matches!(entry.content, Content::Symlink { .. }) {
            return Ok(());
        }
        if let (permissions, true) = run.decided(entry)? {
            self.0.insert(entry.path.clone(), permissions.acl.unwrap_or_default());
        }
        Ok(())
    }

    /// One path a line: its bytes, the access list and the default list in hexadecimal, `-` for none.
    pub(super) fn encode(&self) -> String {
        let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
        let list = |list: &Option<Vec<u8>>| list.as_deref().map_or_else(|| "-".to_owned(), hex);
        let line = |(path, lists): (&RelPath, &AclLists)| {
            format!("{} {} {}\n", hex(path.as_bytes()), list(&lists.access), list(&lists.default))
        };
        self.0.iter().map(line).collect()
    }

    pub(super) fn parse(text: &str) -> Option<Acls> {
        let bytes = |hex: &str| -> Option<Vec<u8>> {
            (0..hex.len().div_ceil(2)).map(|at| u8::from_str_radix(hex.get(2 * at..2 * at + 2)?, 16).ok()).collect()
        };
        let list = |field: &str| if field == "-" { Some(None) } else { bytes(field).map(Some) };
        let line = |line: &str| {
            let mut fields = line.split(' ');
            let path = RelPath::new(bytes(fields.next()?)?).ok()?;
            let lists = AclLists { access: list(fields.next()?)?, default: list(fields.next()?)? };
            fields.next().is_none().then_some((path, lists))
        };
        text.lines().map(line).collect::<Option<_>>().map(Acls)
    }
}

/// Gives a staged directory its permissions; what it inherited goes.
pub(super) fn apply_directory(root: &Root, path: &RelPath, wanted: &Permissions) -> Result<(), Error> {
    let inode = Inode::open(root, Some(path)).map_err(io)?;
    apply(&inode, wanted).map_err(|error| stage_failure(&error, root))
}

/// Whether what has the name has other ACLs than its rule says. One that cannot be read counts as another: setting it
/// will say why.
pub(super) fn acl_differs(root: &Root, path: &RelPath, wanted: &AclLists) -> bool {
    Inode::open(root, Some(path)).ok().and_then(|inode| inode.acls().ok()).is_none_or(|found| found != *wanted)
}

pub(super) fn failed(root: &Root, path: &RelPath, operation: &'static str, source: std::io::Error) -> Error {
    Error::Io { operation, path: crate::error::shown(&root.shown().join(path.as_path())).to_string(), source }
}

/// What the files at these paths were when it was found out what they hold; `None` where that is not known any more, as of a run that
/// is finished by another.
pub(super) type Compared<'a> = dyn Fn(&RelPath) -> Option<Fingerprint> + 'a;

/// What has to be known to change what is there already.
pub(super) struct Existing<'a> {
    root: &'a Root,
    staging: &'a Root,
    acls: &'a Acls,
    compared: &'a Compared<'a>,
    /// The further names in the tree of each file that has some.
    names: HashMap<RelPath, Vec<RelPath>>,
}

impl<'a> Existing<'a> {
    pub(super) fn new(
        root: &'a Root,
        staging: &'a Root,
        put: &Put<'_>,
        acls: &'a Acls,
        compared: &'a Compared<'a>,
    ) -> Existing<'a> {
        let mut names: HashMap<RelPath, Vec<RelPath>> = HashMap::new();
        for (path, first) in put.hard_links() {
            names.entry(first.clone()).or_default().push(path.clone());
        }
        Existing { root, staging, acls, compared, names }
    }

    /// The same as [`apply`](Existing::apply) of what was compared and keeps its content: if it is not what it was, or may not be, it is
    /// read once more, since its new time would hide what somebody else did to it.
    pub(super) fn apply_compared(&self, entry: &Entry) -> Result<(), Error> {
        let (root, path) = (self.root, &entry.path);
        if matches!(entry.content, Content::Symlink { .. } | Content::HardLink { .. }) {
            return Ok(());
        }
        let inode = Inode::open(root, Some(path)).map_err(io)?;
        if let Content::File { size, digest: Some(digest) } = entry.content
            && let Some(compared) = (self.compared)(path)
        {
            let now = inode.metadata().map_err(|source| failed(root, path, "look at", source))?;
            if Fingerprint::from(&now) != compared && !holds(&inode, size, digest) {
                return Err(failed(root, path, "set the permissions of", std::io::Error::other(CHANGED)));
            }
        }
        // RACE: who writes to it from here on gives it another time, unless that is before it gets this one.
        self.apply_to(entry, inode)
    }

    /// Gives what is published already the entry's permissions and time.
    ///
    /// ACLs are what a rule says of them. Where none does they stay, unless the mode changes: it would be the new mask
    /// of what they grant, and nobody has said that this is meant. A file that has names outside of the tree is replaced
    /// by a copy first, because they would change too.
    pub(super) fn apply(&self, entry: &Entry) -> Result<(), Error> {
        // A further name has what the first has.
        if matches!(entry.content, Content::Symlink { .. } | Content::HardLink { .. }) {
            return Ok(());
        }
        self.apply_to(entry, Inode::open(self.root, Some(&entry.path)).map_err(io)?)
    }

    fn apply_to(&self, entry: &Entry, mut inode: Inode) -> Result<(), Error> {
        let (root, path) = (self.root, &entry.path);
        let now = inode.metadata().map_err(|source| failed(root, path, "look at", source))?;
        let others = self.names.get(path).map_or(&[][..], Vec::as_slice);
        let detach = now.kind == FileKind::Regular && now.links as usize > 1 + others.len();
        if detach {
            inode = self.copy(entry, &inode)?;
        }
        let is = inode.metadata().map_err(|source| failed(root, path, "look at", source))?;
        let uid = names::user_id(&entry.owner).unwrap_or(now.uid);
        let gid = names::group_id(&entry.group).unwrap_or(now.gid);
        let ruled = self.acls.0.get(path).cloned();
        let wanted = Permissions {
            mode: entry.mode,
            uid: Some(uid).filter(|&uid| uid != is.uid),
            gid: Some(gid).filter(|&gid| gid != is.gid),
            acl: ruled.or_else(|| (is.mode != entry.mode).then(AclLists::default)),
            mtime: entry.mtime,
        };
        if let Content::File { size, digest: Some(digest) } = entry.content
            && entry.mode & 0o6111 & !is.mode != 0
        {
            verify(root, path, &inode, size, digest)?;
        }
        apply(&inode, &wanted).map_err(|error| stage_failure(&error, root))?;
        if detach { self.replace(path, others, &inode) } else { Ok(()) }
    }

    /// A copy of the file in the staging directory, which is proven to be the entry's content.
    fn copy(&self, entry: &Entry, inode: &Inode) -> Result<Inode, Error> {
        let unread = |source| failed(self.root, &entry.path, "copy", source);
        let copy = rel(COPY)?;
        self.staging.remove_tree(&copy).map_err(io)?;
        let mut to = self.staging.create_new(&copy, 0o600).map_err(io)?;
        let mut from = inode.readable().ok_or_else(|| unread(std::io::ErrorKind::PermissionDenied.into()))?;
        std::io::copy(&mut from, &mut to).map_err(unread)?;
        let to = Inode::from(to);
        if let Content::File { size, digest: Some(digest) } = entry.content {
            verify(self.root, &entry.path, &to, size, digest)?;
        }
        Ok(to)
    }

    /// Puts the copy in the file's place, under all names that it has in the tree.
    fn replace(&self, path: &RelPath, others: &[RelPath], copy: &Inode) -> Result<(), Error> {
        // DURABILITY: a name must not lead to content that is not stored.
        let file = copy.readable().map_or(Ok(()), std::fs::File::sync_all);
        file.map_err(|source| failed(self.root, path, "write to stable storage", source))?;
        self.staging.rename_to(&rel(COPY)?, self.root, path, RenameFlags::empty()).map_err(io)?;
        let link = rel(COPY)?;
        for other in others {
            self.root.hard_link_to(path, self.staging, &link).map_err(io)?;
            self.staging.rename_to(&link, self.root, other, RenameFlags::empty()).map_err(io)?;
        }
        Ok(())
    }
}

/// Whether it holds that, and nothing changed about it while it was read.
fn holds(inode: &Inode, size: u64, listed: Digest) -> bool {
    let read = || {
        let before = inode.metadata().ok()?;
        let found = hash_of(inode.readable()?, size).ok()?;
        let same = inode.metadata().ok()?.same_content(&before) && before.size == size;
        Some(same && found == listed)
    };
    read().unwrap_or(false)
}

/// Reads what lies on the disk: nothing becomes executable, and nothing is copied, on the word of a size and a time.
fn verify(root: &Root, path: &RelPath, inode: &Inode, size: u64, listed: Digest) -> Result<(), Error> {
    let unverified = |reason: String| {
        let reason = format!("its content has to be verified for that, and {reason}; remove it, and push again");
        failed(root, path, "set the permissions of", std::io::Error::other(reason))
    };
    let file = inode.readable().ok_or_else(|| unverified("it cannot be read".into()))?;
    let found = hash_of(file, size).map_err(|error| unverified(crate::error::chain(&error)))?;
    if found == listed { Ok(()) } else { Err(unverified(format!("its SHA-256 is {found}, not {listed}"))) }
}

/// Removes the ACLs that a new root inherited from the directory it is in.
pub(super) fn disinherit(root: &Root) -> Result<(), Error> {
    let inode = Inode::open(root, None).map_err(io)?;
    let path = crate::error::shown(root.shown()).to_string();
    inode.set_acls(&AclLists::default()).map_err(|source| Error::Io {
        operation: "remove the inherited ACL of",
        path,
        source,
    })
}

/// Refuses rules with ACL entries where they could not be set, before anything is sent.
pub(super) fn check_support(root: &Root) -> Result<(), Error> {
    let shown = || crate::error::shown(root.shown()).to_string();
    let keeps = Inode::open(root, None).map_err(io)?.keeps_acls().map_err(|source| Error::Io {
        operation: "read the ACL of",
        path: shown(),
        source,
    })?;
    if keeps {
        return Ok(());
    }
    let reason = "the policy has ACL entries, and its file system keeps none; mount it with ACLs, or leave 'acl' out";
    Err(Error::Refused { by: format!("'{}'", shown()), reason: reason.into() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn acls_are_read_as_they_were_written() {
        let lists = AclLists { access: Some(vec![2, 0, 255]), default: None };
        let acls = Acls(HashMap::from([
            (rel("a b\n").unwrap(), lists),
            (rel("d/e").unwrap(), AclLists { access: None, default: Some(vec![]) }),
        ]));
        assert_eq!(Acls::parse(&acls.encode()), Some(acls));
        for damaged in ["61", "61 -", "6 - -", "61 - - -", "2e2e - -", "zz - -", "61 0 -"] {
            assert_eq!(Acls::parse(damaged), None, "{damaged}");
        }
    }
}
