//! Lets those read the manifest of a root who may read what it lists.

use std::fs::File;

use rustix::process::geteuid;

use crate::access::{AclLists, Inode};
use crate::manifest::{Audience, Tree};
use crate::path::RelPath;
use crate::policy::acl::Acl;
use crate::root::Root;
use crate::scan::names::{Names, group_id, user_id};

const STATE: &str = ".lockstep";
const STAGING: &str = "staging";
const MANIFEST: &str = "manifest";
/// May be entered, so that what lies in it and is meant for somebody can be opened by its name; not listed.
const PASSED: u32 = 0o711;

/// Who may read all of `tree` at `root`.
pub fn audience_of(root: &Root, tree: &Tree) -> Audience {
    audience_at(root, Audience::of(tree))
}

/// Those of the readers of a tree who may reach it at `root`.
pub fn audience_at(root: &Root, readers: Audience) -> Audience {
    let Ok(found) = root.stat_root() else { return Audience::default() };
    let mut names = Names::default();
    readers.within(found.mode, &names.user(found.uid), &names.group(found.gid))
}

/// Lets `audience` read a manifest that is about to be put in force. Best effort: who may not read it is told so when he
/// checks, and it is never readable by more.
pub fn admit(manifest: &File, audience: &Audience) {
    let Ok(inode) = Inode::of(manifest) else { return };
    let _ = grant(&inode, audience);
}

fn grant(inode: &Inode, audience: &Audience) -> std::io::Result<()> {
    // A mode would wake up what it has inherited.
    inode.set_acls(&AclLists::default())?;
    if audience.others {
        return inode.set_mode(0o644);
    }
    let found = inode.metadata()?;
    let mut named = Vec::new();
    let mut mode = 0o600;
    if let Some(gid) = audience.group.as_deref().and_then(|group| group_id(group).ok()) {
        // To a group that one is not a member of nothing can be given but by an ACL.
        match gid == found.gid || inode.set_owner(None, Some(gid)).is_ok() {
            true => mode = 0o640,
            false => named.push(format!("group:{gid}:r--")),
        }
    }
    let user = audience.user.as_deref().and_then(|user| user_id(user).ok());
    named.extend(user.filter(|&uid| uid != geteuid().as_raw()).map(|uid| format!("user:{uid}:r--")));
    inode.set_mode(mode)?;
    if named.is_empty() {
        return Ok(());
    }
    // In a list the group's digit of the mode is the mask, so that the list itself says what the group may.
    named.push(format!("group::{}", if mode == 0o640 { "r--" } else { "---" }));
    let acl = Acl::parse(&named).map_err(std::io::Error::other)?;
    let access = acl.access_xattr(0o640, false, |_, name| name.parse::<u32>()).map_err(std::io::Error::other)?;
    inode.set_acls(&AclLists { access, default: None })
}

/// Gives a file beside the manifest of `root` to those who may read the manifest.
pub fn as_manifest(root: &Root, file: &File) {
    let copy = || -> Option<()> {
        let state = root.subroot(&RelPath::new(STATE).ok()?).ok()?;
        let manifest = Inode::open(&state, Some(&RelPath::new(MANIFEST).ok()?)).ok()?;
        let (found, lists) = (manifest.metadata().ok()?, manifest.acls().ok()?);
        let inode = Inode::of(file).ok()?;
        let own = inode.metadata().ok()?;
        inode.set_acls(&AclLists::default()).ok()?;
        let other_group = found.gid != own.gid && inode.set_owner(None, Some(found.gid)).is_err();
        if other_group && found.mode & 0o044 == 0o040 {
            // To a group that one is not a member of nothing can be given but by an ACL.
            let named = [format!("group:{}:r--", found.gid), "group::---".to_owned()];
            let acl = Acl::parse(&named).ok()?;
            let access = acl.access_xattr(0o640, false, |_, name| name.parse::<u32>()).ok()?;
            inode.set_mode(0o600).ok()?;
            return inode.set_acls(&AclLists { access, default: None }).ok();
        }
        inode.set_mode(found.mode & 0o644).ok()?;
        if lists.access.is_some() { inode.set_acls(&lists).ok() } else { Some(()) }
    };
    // Best effort, as above.
    let _ = copy();
}

/// Lets `audience` come to what it may read in the state directory of `root`.
pub fn open_state(root: &Root, audience: &Audience) {
    let another = |user: &str| user_id(user).is_ok_and(|uid| uid != geteuid().as_raw());
    if !audience.others && audience.group.is_none() && !audience.user.as_deref().is_some_and(another) {
        return;
    }
    let pass = |root: &Root, name: &str| -> Option<Root> {
        let directory = root.subroot(&RelPath::new(name).ok()?).ok()?;
        let inode = Inode::open(&directory, None).ok()?;
        let found = inode.metadata().ok()?;
        if found.mode & 0o777 == 0o700 {
            // Nobody was let in yet: what there is was inherited.
            inode.set_acls(&AclLists::default()).ok()?;
            inode.set_mode(PASSED).ok()?;
        }
        Some(directory)
    };
    if let Some(state) = pass(root, STATE) {
        pass(&state, STAGING);
    }
}
