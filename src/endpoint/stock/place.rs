//! The directory that a run works in, and that nobody else can have a hand in what lockstep keeps there.

use super::session::{self, Reply, Session, about};
use super::{DIRECTORY, Lanes, kind_of};
use crate::endpoint::Error;
use crate::error::Escaped;
use crate::wire::sftp::packet;

/// Where a run works.
pub(super) struct Place {
    pub(super) root: Vec<u8>,
    /// The final path, while the root lies under its hidden name.
    pub(super) rename_to: Option<Vec<u8>>,
}

/// The root, or the hidden directory that will be it; `None` when it is not there and nothing may be made.
pub(super) fn open_root(lanes: &Lanes, dry_run: bool) -> Result<Option<Place>, Error> {
    let (session, root) = (lanes.control(), &lanes.root);
    match session.stat(packet::STAT, &lanes.root_path())? {
        Ok(found) if kind_of(&found).is_none_or(|kind| kind == DIRECTORY) => {
            return Ok(Some(Place { root: root.clone(), rename_to: None }));
        }
        Ok(_) => return Err(Error::Usage(format!("{} is not a directory", lanes.describe()))),
        Err(refusal) if !refusal.is_missing() => return Err(session.refused("look at", root, &refusal)),
        Err(_) if dry_run => return Ok(None),
        Err(_) => {}
    }
    let slash = root.iter().rposition(|&byte| byte == b'/').unwrap_or(0);
    let (parent, name) = (&root[..slash], &root[slash + 1..]);
    if name == b".." || name == b"." {
        return Err(Error::Usage(format!("'{}' cannot be a target", lanes.describe())));
    }
    let above: Vec<&[u8]> =
        parent.iter().enumerate().skip(1).filter(|&(_, &byte)| byte == b'/').map(|(at, _)| &parent[..at]).collect();
    // Those that are there already are refused, and that is no fault.
    let _ = session.all(above.into_iter().chain([parent]).map(|path| session::mkdir(path, 0o755)))?;
    let hidden = [parent, b"/.", name, b".lockstep"].concat();
    make_private(session, &[&hidden])?;
    Ok(Some(Place { root: hidden, rename_to: Some(root.clone()) }))
}

/// Directories of ours, which nobody else may enter, from the top. What has the name of one and is no directory, a
/// link above all, is refused.
pub(super) fn make_private(session: &Session, paths: &[&[u8]]) -> Result<(), Error> {
    let both = |path: &&[u8]| [session::mkdir(path, 0o700), about(packet::LSTAT, path)];
    let mut replies = session.batch(paths.iter().flat_map(both))?.into_iter();
    for path in paths {
        match (replies.next(), replies.next()) {
            (Some(Reply::Done | Reply::Refused(_)), Some(Reply::Attributes(found))) => {
                if kind_of(&found) != Some(DIRECTORY) {
                    return Err(Error::Refused {
                        by: session.client.host().to_owned(),
                        reason: format!("'{}' is not a directory; look at it, then remove it", Escaped(path)),
                    });
                }
            }
            (Some(Reply::Refused(refusal)), Some(_)) => {
                return Err(session.refused("make the directory", path, &refusal));
            }
            _ => return Err(session.odd()),
        }
    }
    Ok(())
}

/// What an interrupted run wrote down is done by the next one, with its rights: directories in which others could have
/// written it are refused. Whose they have to be the file at `own` says, which was made a moment ago.
pub(super) fn must_be_own(session: &Session, own: &[u8], paths: impl Iterator<Item = Vec<u8>>) -> Result<(), Error> {
    let paths: Vec<Vec<u8>> = [own.to_vec()].into_iter().chain(paths).collect();
    let found = session.batch(paths.iter().map(|path| about(packet::LSTAT, path)))?;
    let found = found.iter().map(|reply| match reply {
        Reply::Attributes(found) => Ok(found),
        _ => Err(session.client.protocol("it does not say what it just made")),
    });
    let found: Vec<_> = found.collect::<Result<_, _>>()?;
    // A server that keeps owners to itself lets nobody tell.
    let Some((uid, _)) = found[0].owner else { return Ok(()) };
    // Some file systems know no modes: what counts is what is made.
    let usual = found[0].mode.unwrap_or_default();
    for (path, found) in paths.iter().zip(&found).skip(1) {
        let why = match (found.owner, found.mode) {
            (Some((other, _)), _) if other != uid => format!("belongs to user {other}, not to {uid}"),
            (_, Some(mode)) if mode & !usual & 0o022 != 0 => {
                format!("can be written by others (mode {:04o})", mode & 0o7777)
            }
            _ => continue,
        };
        let reason = format!(
            "'{}' {why}: others could have written what it holds; look at it, then remove it or give it to who \
                      runs here",
            Escaped(path)
        );
        return Err(Error::Refused { by: session.client.host().to_owned(), reason });
    }
    Ok(())
}
