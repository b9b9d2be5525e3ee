//! Gives paths the permissions that their rules say.
//!
//! What always holds: only the inode that was looked at is changed, never what a link points to, and no file that has a
//! name outside of the tree; and a file gets an execute bit only when its content is that of the manifest.

use std::io::Write as _;
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustix::fs::RenameFlags;

use super::{Drift, DriftError, Findings, MANIFEST, Question, look};
use crate::access::Inode;
use crate::audit::{AuditError, AuditLog, AuditRecord, Before, OnFailure, Outcome, settings};
use crate::error::Escaped;
use crate::manifest::{Manifest, Timestamp, Tree, format};
use crate::monitor::Monitor;
use crate::path::{InvalidPath, RelPath};
use crate::root::{FileKind, Follow, Metadata, Root, RootError};
use crate::scan::names::Names;
use crate::staging::{LockError, RootLock, SET_OWNER, admit, hash_of, open_state};

const STATE: &str = ".lockstep";
const NEW_MANIFEST: &str = ".lockstep/manifest.mended";
/// A file's bits that make it run, or run as somebody else.
const RUN_BITS: u32 = 0o6111;
/// So many paths are changed between two entries in the audit log.
const BATCH: usize = 256;

/// What ends the mending.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum MendError {
    #[error(transparent)]
    Drift(#[from] DriftError),
    #[error(transparent)]
    Root(#[from] RootError),
    #[error(transparent)]
    Lock(#[from] LockError),
    #[error(transparent)]
    Audit(#[from] AuditError),
    #[error(transparent)]
    Path(#[from] InvalidPath),
    #[error("cannot use the manifest of '{root}'")]
    Manifest { root: String, source: std::io::Error },
}

/// How to mend.
#[derive(Debug, Clone, Copy)]
pub struct Mending<'a> {
    /// Who does it, for the lock and the audit log: `user@host`.
    pub actor: &'a str,
    /// Only say what would be done.
    pub dry_run: bool,
}

/// What became of a path.
#[derive(Debug)]
pub struct Mended {
    /// What was found.
    pub drift: Drift,
    /// Why it is not as its rule says; `None` when it is now.
    pub refused: Option<String>,
}

/// Looks at the tree at `path` and mends what differs from the policy. The findings are those from before.
///
/// A root that lockstep publishes to is locked meanwhile, its manifest follows, and its audit log tells.
///
/// # Errors
/// [`MendError`]; single paths that could not be changed are told in the answer.
pub fn mend(
    path: &Path,
    question: &Question<'_>,
    mending: Mending<'_>,
    monitor: &dyn Monitor,
) -> Result<(Findings, Vec<Mended>), MendError> {
    let root = Root::open(path)?;
    let managed = match root.stat(&RelPath::new(STATE)?, Follow::Never) {
        Ok(state) => state.kind == FileKind::Directory,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => false,
        Err(error) => return Err(error.into()),
    };
    let changes = !mending.dry_run && managed;
    let _lock = changes.then(|| RootLock::take(&root, mending.actor, Duration::ZERO, &|| false)).transpose()?;
    let mut findings = look(path, question, monitor)?;
    let drift = std::mem::take(&mut findings.drift);
    let mut manifest = findings.manifest.take();
    let mut mended = Vec::with_capacity(drift.len());
    let mut left = drift.into_iter().peekable();
    while let Some(next) = left.peek() {
        let start = mended.len();
        if changes {
            // What cannot be recorded is not done.
            let bytes = (next.path.as_bytes().len() as u64 + 600) * BATCH as u64;
            or_continue(AuditLog::open(&root).and_then(|log| log.reserve(bytes)))?;
        }
        for drift in left.by_ref().take(BATCH) {
            let refused = one(&root, &drift, manifest.as_ref(), mending.dry_run).err();
            mended.push(Mended { drift, refused });
        }
        if changes {
            or_continue(record(&root, mending.actor, &mended[start..]))?;
        }
    }
    if changes && let Some(manifest) = manifest.take().and_then(|manifest| follow(manifest, &mended)) {
        store(&root, &manifest)?;
    }
    Ok((findings, mended))
}

/// Mends one path, or says why not.
fn one(root: &Root, drift: &Drift, manifest: Option<&Manifest>, dry_run: bool) -> Result<(), String> {
    let failed = |operation: &'static str| {
        move |error: std::io::Error| format!("cannot {operation}: {}", crate::error::chain(&error))
    };
    if let Some(first) = &drift.other {
        return Err(format!(
            "it is a further name of '{first}' (a hard link), and the rules give the two different permissions; put a copy in its place"
        ));
    }
    let inode = Inode::open(root, Some(&drift.path)).map_err(|error| crate::error::chain(&error))?;
    let now = inode.metadata().map_err(failed("look at it"))?;
    // RACE: something else has the name now, or its permissions changed: what was found is not what is there.
    let same = |now: &Metadata| {
        (now.device, now.inode, now.kind, now.ctime)
            == (drift.found.device, drift.found.inode, drift.found.kind, drift.found.ctime)
    };
    if !same(&now) {
        return Err("it changed since it was looked at; run again".into());
    }
    if now.kind == FileKind::Regular && now.links > drift.names {
        return Err(format!(
            "it has {} names, {} of them outside of this tree, which would change too; put a copy in its place first",
            now.links,
            now.links - drift.names
        ));
    }
    let wanted = &drift.wanted;
    let gives_away = wanted.uid.is_some_and(|uid| uid != now.uid) || wanted.gid.is_some_and(|gid| gid != now.gid);
    // Whoever had it until now may have put anything there.
    let runs = wanted.mode & RUN_BITS != 0 && (gives_away || wanted.mode & !now.mode & RUN_BITS != 0);
    if now.kind == FileKind::Regular && runs {
        verify(&inode, &drift.path, manifest)?;
        if !inode.metadata().is_ok_and(|now| same(&now)) {
            return Err("it changed while it was verified; run again".into());
        }
    }
    if dry_run {
        return Ok(());
    }
    let (uid, gid) = (wanted.uid.filter(|&uid| uid != now.uid), wanted.gid.filter(|&gid| gid != now.gid));
    // In this order: chown takes set-ID bits away, and a list that goes later would be woken up by the mode.
    if uid.is_some() || gid.is_some() {
        inode.set_owner(uid, gid).map_err(failed(SET_OWNER))?;
    }
    if let Some(acl) = &wanted.acl {
        inode.set_acls(acl).map_err(failed("set the ACL"))?;
    }
    inode.set_mode(wanted.mode).map_err(failed("set the mode"))
}

/// Only what was published may run: the file has to have the SHA-256 of the manifest.
fn verify(inode: &Inode, path: &RelPath, manifest: Option<&Manifest>) -> Result<(), String> {
    let unverified =
        |why: &str| Err(format!("it may get execute or set-ID bits only when its content is verified, and {why}"));
    let Some(manifest) = manifest else {
        return unverified("this tree has no manifest; push it, so that there is one");
    };
    let listed = manifest.tree.get(path).and_then(crate::manifest::Entry::file);
    let Some((size, Some(digest))) = listed else {
        return unverified("it is not in the manifest; push it");
    };
    let Some(file) = inode.readable() else { return unverified("it cannot be read") };
    match hash_of(file, size) {
        Ok(found) if found == digest && inode.metadata().is_ok_and(|now| now.size == size) => Ok(()),
        Ok(_) => unverified("it is not what the manifest lists; push it again"),
        Err(error) => unverified(&crate::error::chain(&error)),
    }
}

/// A log that cannot be written is a warning where that was asked for.
fn or_continue(result: Result<(), AuditError>) -> Result<(), AuditError> {
    match result {
        Err(error) if settings().on_failure == OnFailure::Continue => {
            tracing::warn!(error = crate::error::chain(&error), "the audit log cannot be written, and has a gap");
            Ok(())
        }
        result => result,
    }
}

fn record(root: &Root, actor: &str, mended: &[Mended]) -> Result<(), AuditError> {
    let mut names = Names::default();
    let records: Vec<AuditRecord> = mended
        .iter()
        .map(|mended| {
            let wanted = |field: &str| {
                let difference = mended.drift.differences.iter().find(|difference| difference.field == field);
                let text = difference.filter(|_| mended.refused.is_none()).map(|difference| &difference.wanted);
                text.map(|text| Escaped(text.as_bytes()).to_string())
            };
            let default = wanted("default acl").map(|text| format!("default: {text}"));
            AuditRecord {
                actor: actor.to_owned(),
                source: "policy apply".into(),
                action: if mended.refused.is_none() { "metadata" } else { "refuse" }.into(),
                path: mended.drift.path.to_string(),
                mode: wanted("mode"),
                owner: wanted("owner"),
                group: wanted("group"),
                acl: wanted("acl").into_iter().chain(default).reduce(|access, default| format!("{access}; {default}")),
                before: Some(Before {
                    mode: format!("{:04o}", mended.drift.found.mode),
                    owner: names.user(mended.drift.found.uid).to_string(),
                    group: names.group(mended.drift.found.gid).to_string(),
                }),
                result: Some(if mended.refused.is_none() { Outcome::Success } else { Outcome::Failure }),
                reason: mended.refused.clone(),
                ..AuditRecord::default()
            }
        })
        .collect();
    if !records.is_empty() {
        AuditLog::open(root)?.append_last(records)?;
    }
    Ok(())
}

/// The manifest with the permissions that the paths have now; `None` when it says so already.
fn follow(manifest: Manifest, mended: &[Mended]) -> Option<Manifest> {
    let mut names = Names::default();
    let mut changed = false;
    let mut entries = manifest.tree.into_entries();
    for done in mended.iter().filter(|mended| mended.refused.is_none()) {
        let Ok(at) = entries.binary_search_by(|entry| entry.path.cmp(&done.drift.path)) else { continue };
        let (entry, wanted) = (&mut entries[at], &done.drift.wanted);
        let owner = wanted.uid.map_or_else(|| entry.owner.clone(), |uid| names.user(uid));
        let group = wanted.gid.map_or_else(|| entry.group.clone(), |gid| names.group(gid));
        changed |= (entry.mode, &entry.owner, &entry.group) != (wanted.mode, &owner, &group);
        (entry.mode, entry.owner, entry.group) = (wanted.mode, owner, group);
    }
    let tree = Tree::new(entries).ok().filter(|_| changed)?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let created = Timestamp { seconds: now.as_secs() as i64, nanoseconds: now.subsec_nanos() };
    Some(Manifest { generation: manifest.generation + 1, created, tree })
}

/// Puts the manifest in force, the old one or the new one whatever happens.
fn store(root: &Root, manifest: &Manifest) -> Result<(), MendError> {
    let new = RelPath::new(NEW_MANIFEST)?;
    root.remove_tree(&new)?;
    let mut file = root.create_new(&new, 0o600)?;
    let written = file.write_all(&format::encode(manifest)).and_then(|()| file.sync_all());
    written.map_err(|source| MendError::Manifest { root: crate::error::shown(root.shown()).to_string(), source })?;
    let audience = crate::staging::audience_of(root, &manifest.tree);
    admit(&file, &audience);
    root.rename(&new, &RelPath::new(MANIFEST)?, RenameFlags::empty())?;
    open_state(root, &audience);
    Ok(root.sync_dir(Some(&RelPath::new(STATE)?))?)
}
