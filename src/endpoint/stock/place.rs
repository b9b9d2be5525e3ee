//! The directory that a run works in, and that nobody else can have a hand in what lockstep keeps there.

use super::session::{self, Reply, Session, about};
use super::target::STATE;
use super::{DIRECTORY, Lanes, at, kind_of};
use crate::endpoint::Error;
use crate::error::Escaped;
use crate::wire::sftp::{Attributes, packet};

/// Where a run works.
pub(super) struct Place {
    pub(super) root: Vec<u8>,
    /// The final path, while the root lies under its hidden name.
    pub(super) rename_to: Option<Vec<u8>>,
}

/// The root, or the hidden directory that will be it, with the directory for lockstep's own things in it; `None` when it is not
/// there and nothing may be made.
pub(super) fn open_root(lanes: &Lanes, dry_run: bool) -> Result<Option<Place>, Error> {
    let (session, root) = (lanes.control(), &lanes.root);
    let state = at(root, STATE);
    let look = about(packet::STAT, &lanes.root_path());
    // Where there is no root there is nothing to make a directory in.
    let own = if dry_run { Vec::new() } else { private(&state).to_vec() };
    let mut replies = session.batch([look].into_iter().chain(own))?.into_iter();
    let found = session.attributes(replies.next().ok_or_else(|| session.odd())?)?;
    match found {
        Ok(found) if kind_of(&found).is_none_or(|kind| kind == DIRECTORY) => {
            if !dry_run {
                must_be_private(session, &state, &mut replies)?;
            }
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
    let above = parent.iter().enumerate().skip(1).filter(|&(_, &byte)| byte == b'/').map(|(at, _)| &parent[..at]);
    let above: Vec<&[u8]> = above.chain([parent]).collect();
    let hidden = [parent, b"/.", name, b".lockstep"].concat();
    let requests = above.iter().map(|path| session::mkdir(path, 0o755)).chain(private(&hidden));
    // Those above that are there already are refused, and that is no fault.
    let mut replies = session.batch(requests)?.into_iter().skip(above.len());
    must_be_private(session, &hidden, &mut replies)?;
    make_private(session, &[&at(&hidden, STATE)])?;
    Ok(Some(Place { root: hidden, rename_to: Some(root.clone()) }))
}

/// The requests for a directory of ours.
pub(super) fn private(path: &[u8]) -> [Vec<u8>; 2] {
    [session::mkdir(path, 0o700), about(packet::LSTAT, path)]
}

/// Directories of ours, which nobody else may enter, from the top. What has the name of one and is no directory, a
/// link above all, is refused.
pub(super) fn make_private(session: &Session, paths: &[&[u8]]) -> Result<(), Error> {
    let mut replies = session.batch(paths.iter().flat_map(|path| private(path)))?.into_iter();
    paths.iter().try_for_each(|path| must_be_private(session, path, &mut replies))
}

/// What was answered to the requests for a directory of ours.
pub(super) fn must_be_private(
    session: &Session,
    path: &[u8],
    replies: &mut impl Iterator<Item = Reply>,
) -> Result<(), Error> {
    match (replies.next(), replies.next()) {
        (Some(Reply::Done | Reply::Refused(_)), Some(Reply::Attributes(found))) => {
            if kind_of(&found) != Some(DIRECTORY) {
                return Err(no_directory(session, path));
            }
            Ok(())
        }
        (Some(Reply::Refused(refusal)), Some(_)) => Err(session.refused("make the directory", path, &refusal)),
        _ => Err(session.odd()),
    }
}

/// What has the name of a directory of ours is none.
pub(super) fn no_directory(session: &Session, path: &[u8]) -> Error {
    Error::Refused {
        by: session.client.host().to_owned(),
        reason: format!("'{}' is not a directory; look at it, then remove it", Escaped(path)),
    }
}

/// What an interrupted run wrote down is done by the next one, with its rights: directories in which others could have
/// written it are refused. Whose they have to be says `own`, what LSTAT says of a file that was made a moment ago.
pub(super) fn must_be_own(session: &Session, own: &Reply, directories: &[(&[u8], &Reply)]) -> Result<(), Error> {
    let own = attributes(session, own)?;
    // A server that keeps owners to itself lets nobody tell.
    let Some((uid, _)) = own.owner else { return Ok(()) };
    // Some file systems know no modes: what counts is what is made.
    let usual = own.mode.unwrap_or_default();
    for (path, found) in directories {
        let found = attributes(session, found)?;
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

fn attributes<'a>(session: &Session, reply: &'a Reply) -> Result<&'a Attributes, Error> {
    match reply {
        Reply::Attributes(found) => Ok(found),
        _ => Err(session.client.protocol("it does not say what it just made")),
    }
}
