//! What a run finds at its target: asked for in the flight that takes the lock, and listed while the source is still being read.

use std::sync::Mutex;

use super::list::{Listed, list_from};
use super::manifest_file::manifest_of;
use super::names::Names;
use super::place::{must_be_own, no_directory};
use super::publish::RECORD;
use super::session::{self, Reply, Session, about};
use super::target::{FOREIGN_RECORD, MANIFEST, STAGING, STAGING_ABOVE, STATE, locked};
use super::{DIRECTORY, at, kind_of, lock};
use crate::endpoint::{BeginOptions, Error};
use crate::filter::Filter;
use crate::manifest::{Digest, Manifest};
use crate::monitor::Monitor;
use crate::scan::{LinkRule, ScanRule};
use crate::wire::sftp::{Attributes, open, packet};

/// What lies there, and what its manifest says.
pub(super) struct Looked {
    pub(super) manifest: Manifest,
    /// SHA-256 of the manifest's file; zeros where there is none.
    pub(super) digest: Digest,
    pub(super) listed: Listed,
}

/// What was answered when the manifest and the root were opened.
#[derive(Clone)]
pub(super) struct Opened {
    manifest: Reply,
    root: Reply,
}

impl Opened {
    /// Gives both back: what they hold is about to change.
    pub(super) fn close(self, session: &Session) -> Result<(), Error> {
        for reply in [self.manifest, self.root] {
            if let Reply::Handle(handle) = reply {
                session.forget(about(packet::CLOSE, &handle))?;
            }
        }
        Ok(())
    }
}

/// What the first flight under the lock has shown.
pub(super) struct Found {
    /// Whose what is made there is.
    pub(super) own: (u32, u32),
    /// A run of lockstep's own server was interrupted while it published.
    pub(super) foreign: bool,
    /// There is a staging area of an earlier run.
    pub(super) staging: bool,
    /// An earlier run was interrupted while it published.
    pub(super) record: bool,
    pub(super) opened: Opened,
}

fn opening(root: &[u8]) -> [Vec<u8>; 2] {
    let directory: &[u8] = if root.is_empty() { b"/" } else { root };
    [session::open(&at(root, MANIFEST), open::READ), about(packet::OPENDIR, directory)]
}

/// What is asked by whoever has the lock.
pub(super) fn questions(root: &[u8]) -> Vec<Vec<u8>> {
    let staging = at(root, STAGING);
    let record = at(&staging, RECORD);
    let state = at(root, STATE);
    let whole = if root.is_empty() { b"/" } else { root };
    let above = at(root, STAGING_ABOVE);
    let looks = [&at(&state, lock::LOCK), &state, whole, &at(root, FOREIGN_RECORD), &above, &staging, &record];
    looks.into_iter().map(|path| about(packet::LSTAT, path)).chain(opening(root)).collect()
}

/// The answers. Directories in which others could have written what is believed are refused: the one for lockstep's own things, and
/// with `hidden` the root.
pub(super) fn answers(session: &Session, root: &[u8], hidden: bool, replies: Vec<Reply>) -> Result<Found, Error> {
    let Ok([lock, state, whole, foreign, above, staging, record, manifest, directory]) =
        <[Reply; 9]>::try_from(replies)
    else {
        return Err(session.odd());
    };
    let path = at(root, STATE);
    let directories = [(root, &whole), (path.as_slice(), &state)];
    must_be_own(session, &lock, if hidden { &directories } else { &directories[1..] })?;
    let own = session.attributes(lock)?.ok().and_then(|found| found.owner).unwrap_or_default();
    let foreign = there(session, &at(root, FOREIGN_RECORD), foreign)?.is_some();
    directory_there(session, &at(root, STAGING_ABOVE), above)?;
    let staging_path = at(root, STAGING);
    let staging = directory_there(session, &staging_path, staging)?;
    let record = there(session, &at(&staging_path, RECORD), record)?.is_some();
    Ok(Found { own, foreign, staging, record, opened: Opened { manifest, root: directory } })
}

/// What has this name. That nothing has it is what only one answer says.
fn there(session: &Session, path: &[u8], reply: Reply) -> Result<Option<Attributes>, Error> {
    match session.attributes(reply)? {
        Ok(found) => Ok(Some(found)),
        Err(refusal) if refusal.is_missing() => Ok(None),
        Err(refusal) => Err(session.refused("look at", path, &refusal)),
    }
}

/// Whether there is a directory of ours with this name. What is none, a link above all, is refused before anything goes through it.
fn directory_there(session: &Session, path: &[u8], reply: Reply) -> Result<bool, Error> {
    match there(session, path, reply)? {
        Some(found) if kind_of(&found) != Some(DIRECTORY) => Err(no_directory(session, path)),
        found => Ok(found.is_some()),
    }
}

/// Opens both without a lock, or once more.
pub(super) fn open_both(session: &Session, root: &[u8]) -> Result<Opened, Error> {
    match <[Reply; 2]>::try_from(session.batch(opening(root))?) {
        Ok([manifest, root]) => Ok(Opened { manifest, root }),
        Err(_) => Err(session.odd()),
    }
}

/// Lists the target while its manifest is read.
pub(super) fn look(
    session: &Session,
    root: &[u8],
    options: &BeginOptions,
    opened: Opened,
    names: &Mutex<Names>,
    monitor: &dyn Monitor,
) -> Result<Looked, Error> {
    let filter = Filter::compile(&options.filter).map_err(|error| Error::Usage(crate::error::chain(&error)))?;
    let rule =
        ScanRule { filter, links: LinkRule::All, ignore_files: true, report_special: false, threads: options.threads };
    let (manifest, directory) = (session.handle(opened.manifest)?, session.handle(opened.root)?);
    let (manifest, listed) = std::thread::scope(|scope| {
        let manifest = scope.spawn(|| manifest_of(session, root, manifest, monitor));
        // What could not be opened is asked for once more, and the list says why.
        let listed = list_from(session, root, directory.ok(), &rule, &mut locked(names), monitor);
        let broken = |_| Err(Error::Usage("an internal error stopped the reading of the manifest".into()));
        (manifest.join().unwrap_or_else(broken), listed)
    });
    let (manifest, listed) = (manifest?, listed?);
    let (manifest, digest) = manifest;
    Ok(Looked { manifest, digest, listed })
}
