//! What somebody cannot read, and what stands in the way: a file's own permissions, or those of a directory above it.

use std::collections::VecDeque;
use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Component, Path, PathBuf};

use crate::access::Inode;
use crate::manifest::Entry;
use crate::path::RelPath;
use crate::policy::acl::ACCESS_XATTR;
use crate::policy::rights::{Denial, LIST, Object, READ, SEARCH, Subject, may};
use crate::root::{Metadata, Root};
use crate::scan::names::{Names, UnknownName, group_id, user_id};

/// Something that the subject cannot read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unreadable {
    /// The whole path.
    pub path: PathBuf,
    /// What is not possible: `read`, `list` or `enter`.
    pub what: &'static str,
    /// Which bit of what is missing.
    pub reason: String,
    /// How many further paths cannot be reached because of it.
    pub beneath: u64,
}

/// Whose rights `user` and `group`, names or numbers, stand for: the user with all groups that this machine knows of and
/// `group` beside them; or without a user anybody who is in `group` alone.
///
/// # Errors
/// [`UnknownName`].
pub fn subject(user: Option<&str>, group: Option<&str>) -> Result<Subject, UnknownName> {
    let further = group.map(group_id).transpose()?;
    let uid = user.map(user_id).transpose()?;
    let known = uid.and_then(uzers::get_user_by_uid);
    let mut groups: Vec<u32> = Vec::new();
    if let Some(known) = &known {
        groups.push(known.primary_group_id());
        let all = uzers::get_user_groups(known.name(), known.primary_group_id()).unwrap_or_default();
        groups.extend(all.iter().map(uzers::Group::gid));
    }
    groups.extend(further);
    let mut seen = std::collections::HashSet::new();
    groups.retain(|&gid| seen.insert(gid));
    let mut names = Names::default();
    let shown_groups: Vec<String> = groups.iter().map(|&gid| names.group(gid).to_string()).collect();
    let shown_groups = shown_groups.join(", ");
    let shown = match uid {
        Some(uid) if groups.is_empty() => format!("{} (uid {uid}, no groups)", names.user(uid)),
        Some(uid) => format!("{} (uid {uid}, groups {shown_groups})", names.user(uid)),
        None => format!("a member of group {shown_groups}"),
    };
    Ok(Subject { shown, uid, groups })
}

/// Follows the tree in order and notes what cannot be read.
pub(super) struct Reach<'a> {
    subject: &'a Subject,
    path: &'a Path,
    found: Vec<Unreadable>,
    blocked: Blocked,
}

/// What is beneath something that cannot be entered: all, or what is within a directory. The last finding counts it.
enum Blocked {
    Nothing,
    All,
    Within(RelPath),
}

impl<'a> Reach<'a> {
    /// Looks at the directories above `path` and at the root itself.
    pub(super) fn new(subject: &'a Subject, path: &'a Path, root: &Root) -> Reach<'a> {
        let mut reach = Reach { subject, path, found: Vec::new(), blocked: Blocked::Nothing };
        let mut names = Names::default();
        for above in passed_through(path) {
            let Ok(found) = std::fs::symlink_metadata(&above) else { continue };
            let acl = access_list(&above);
            let object = Object {
                directory: true,
                mode: found.mode() & 0o7777,
                uid: found.uid(),
                gid: found.gid(),
                acl: acl.as_deref(),
            };
            if let Err(denial) = may(subject, &object, SEARCH) {
                reach.denied(above, "enter", &denial, &object, &mut names);
                reach.blocked = Blocked::All;
                return reach;
            }
        }
        if let (Ok(found), Ok(lists)) = (root.stat_root(), Inode::open(root, None).map(|root| root.acls())) {
            let acl = lists.ok().and_then(|lists| lists.access);
            reach.directory(None, &found, acl.as_deref(), &mut names);
        }
        reach
    }

    pub(super) fn at(&mut self, entry: &Entry, found: &Metadata, acl: Option<&[u8]>, names: &mut Names) {
        let blocked = match &self.blocked {
            Blocked::Nothing => false,
            Blocked::All => true,
            Blocked::Within(directory) => entry.path.is_within(directory),
        };
        if blocked {
            if let Some(last) = self.found.last_mut() {
                last.beneath += 1;
            }
            return;
        }
        if entry.is_directory() {
            return self.directory(Some(&entry.path), found, acl, names);
        }
        let object = Object { directory: false, mode: found.mode, uid: found.uid, gid: found.gid, acl };
        if let Err(denial) = may(self.subject, &object, READ) {
            self.denied(self.path.join(entry.path.as_path()), "read", &denial, &object, names);
        }
    }

    fn directory(&mut self, path: Option<&RelPath>, found: &Metadata, acl: Option<&[u8]>, names: &mut Names) {
        let object = Object { directory: true, mode: found.mode, uid: found.uid, gid: found.gid, acl };
        let whole = path.map_or_else(|| self.path.to_owned(), |path| self.path.join(path.as_path()));
        if let Err(denial) = may(self.subject, &object, SEARCH) {
            self.denied(whole, "enter", &denial, &object, names);
            self.blocked = path.map_or(Blocked::All, |path| Blocked::Within(path.clone()));
        } else if let Err(denial) = may(self.subject, &object, LIST) {
            self.denied(whole, "list", &denial, &object, names);
        }
    }

    fn denied(&mut self, path: PathBuf, what: &'static str, denial: &Denial, object: &Object<'_>, names: &mut Names) {
        let mut groups = Names::default();
        let mut user = |uid| names.user(uid).to_string();
        let reason = denial.explain(object, &mut user, &mut |gid| groups.group(gid).to_string());
        self.found.push(Unreadable { path, what, reason, beneath: 0 });
    }

    pub(super) fn finish(self) -> Vec<Unreadable> {
        self.found
    }
}

fn access_list(path: &Path) -> Option<Vec<u8>> {
    let mut value = vec![0; 64 * 1024];
    let length = rustix::fs::lgetxattr(path, ACCESS_XATTR, &mut value[..]).ok()?;
    value.truncate(length);
    Some(value)
}

/// Every directory that has to be entered to come to `path`, from `/` on, those of links on the way too; not `path` itself.
fn passed_through(path: &Path) -> Vec<PathBuf> {
    let mut left: VecDeque<OsString> = VecDeque::new();
    let parts = |path: &Path| -> Vec<OsString> {
        let normal = |part: Component<'_>| match part {
            Component::Normal(name) => Some(name.to_owned()),
            Component::ParentDir => Some("..".into()),
            _ => None,
        };
        path.components().filter_map(normal).collect()
    };
    let absolute = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    left.extend(parts(&absolute));
    let mut at = PathBuf::from("/");
    let mut passed = vec![at.clone()];
    let mut links = 0;
    while let Some(name) = left.pop_front() {
        if name.as_bytes() == b".." {
            at.pop();
            passed.push(at.clone());
            continue;
        }
        let next = at.join(&name);
        match std::fs::read_link(&next) {
            // As many as the kernel follows.
            Ok(target) if links < 40 => {
                links += 1;
                if target.as_os_str().as_bytes().starts_with(b"/") {
                    at = PathBuf::from("/");
                }
                for part in parts(&target).into_iter().rev() {
                    left.push_front(OsString::from_vec(part.into_vec()));
                }
            }
            _ => {
                at = next;
                passed.push(at.clone());
            }
        }
    }
    let end = at;
    let mut seen = std::collections::HashSet::new();
    passed.retain(|directory| *directory != end && seen.insert(directory.clone()));
    passed
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_directories_above_are_found_through_links() {
        let at = tempfile::tempdir().unwrap();
        let at = at.path().canonicalize().unwrap();
        std::fs::create_dir_all(at.join("real/deep/tree")).unwrap();
        std::fs::create_dir(at.join("other")).unwrap();
        std::os::unix::fs::symlink("../real/deep", at.join("other/link")).unwrap();
        let passed = passed_through(&at.join("other/link/tree"));
        let below: Vec<_> = passed.iter().filter_map(|path| path.strip_prefix(&at).ok()).collect();
        assert_eq!(below, ["", "other", "real", "real/deep"].map(Path::new));
        assert_eq!(passed[0], Path::new("/"));
        assert_eq!(passed_through(Path::new("/")), [] as [PathBuf; 0]);
    }

    #[test]
    fn h48_an_unknown_subject_is_an_error() {
        assert!(subject(Some("no-such-user"), None).is_err() && subject(None, Some("no-such-group")).is_err());
        let root = subject(Some("root"), Some("60")).unwrap();
        assert!(root.uid == Some(0) && root.groups.contains(&60) && root.shown.starts_with("root (uid 0, groups"));
        assert_eq!(subject(None, Some("61234")).unwrap().shown, "a member of group 61234");
        assert_eq!(subject(Some("61234"), None).unwrap().shown, "61234 (uid 61234, no groups)");
    }
}
