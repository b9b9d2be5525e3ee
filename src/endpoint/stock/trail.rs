//! What a stock server keeps for those that pass on what lies there: where it came through, and whether somebody publishes.
//!
//! Which machine it is cannot be told from here: a circle through it is found when it has been gone round once.

use super::at;
use super::read::read_whole;
use super::session::Session;
use super::stage::store;
use super::target::STATE;
use crate::endpoint::Error;
use crate::plan::trail::{self, Stop};
use crate::wire::sftp::packet;

const TRAIL: &str = "trail";

/// What came to `root` came through these.
pub(super) fn load(session: &Session, root: &[u8]) -> Result<Vec<Stop>, Error> {
    let text = read_whole(session, &at(&at(root, STATE), TRAIL))?;
    Ok(text.map(|text| trail::from_text(&text)).unwrap_or_default())
}

/// Remembers that what comes to `root` came through these.
pub(super) fn remember(session: &Session, root: &[u8], now: &[Stop]) -> Result<(), Error> {
    if now.is_empty() {
        return Ok(());
    }
    trail::check(now).map_err(Error::Usage)?;
    let known = load(session, root)?;
    let stops = trail::merged(&known, now);
    match stops == known {
        true => Ok(()),
        false => store(session, &at(root, STATE), TRAIL, &trail::to_text(&stops)),
    }
}

/// Whether a run gives names at `root`, or was interrupted while it did.
pub(super) fn is_publishing(session: &Session, root: &[u8]) -> Result<bool, Error> {
    for area in crate::staging::AREAS {
        let there = |name: &str| Ok::<_, Error>(session.stat(packet::LSTAT, &at(&at(root, area), name))?.is_ok());
        if !there("commit")? {
            continue;
        }
        for name in crate::staging::COMING {
            if there(name)? {
                return Ok(true);
            }
        }
    }
    Ok(false)
}
