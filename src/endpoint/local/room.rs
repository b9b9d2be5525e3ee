//! Whether a target has room for what is to come.

use std::io::ErrorKind;

use super::target::io;
use crate::endpoint::Error;
use crate::error::bytes_shown as shown;
use crate::manifest::{Entry, Tree};
use crate::plan::{self, Change, Plan};
use crate::root::Root;

/// What a run is about to store.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Need {
    pub(super) bytes: u64,
    pub(super) inodes: u64,
}

/// Refuses what cannot fit, before a byte of it is sent. What is free may be used by others meanwhile, and quotas are
/// not seen here: a disk that fills up later ends the run just as well.
pub(super) fn check(root: &Root, need: Need) -> Result<(), Error> {
    let free = root.free_space().map_err(io)?;
    let few_inodes = free.inodes.filter(|&inodes| need.inodes > inodes);
    let reason = if need.bytes > free.bytes {
        format!(
            "{} are needed and {} are free; make room, or use --ignore-free-space where files are sparse or the file \
             system compresses",
            shown(need.bytes),
            shown(free.bytes)
        )
    } else if let Some(inodes) = few_inodes {
        format!("{} inodes are needed and {inodes} are free; make room", need.inodes)
    } else {
        return Ok(());
    };
    let source = std::io::Error::new(ErrorKind::StorageFull, reason);
    Err(Error::Io { operation: "make room in", path: crate::error::shown(root.shown()).to_string(), source })
}

/// What to say when a disk has filled up: how much the run needs in all, and what is free now.
pub(super) fn filled(root: &Root, need: Need) -> String {
    match root.free_space() {
        Ok(free) => format!("the run stores {} in all, and {} are free", shown(need.bytes), shown(free.bytes)),
        Err(_) => format!("the run stores {} in all", shown(need.bytes)),
    }
}

/// What is not staged yet, where `there` says how much is there of a file that is appended to, and `moves` which only gets another name.
pub(super) fn needed(
    source: &Tree,
    plan: &Plan,
    there: &dyn Fn(&Entry) -> Option<u64>,
    moves: &dyn Fn(u32, &Entry) -> bool,
) -> Need {
    let mut need = Need::default();
    for action in plan.actions.iter().filter(|action| action.change != Change::MetadataOnly) {
        let entry = &source.entries()[action.index as usize];
        let size = entry.file().map_or(0, |(size, _)| size);
        let (bytes, inodes) = match &action.need {
            _ if moves(action.index, entry) => (0, 0),
            plan::Need::Content { resume_at } => {
                let left = size.saturating_sub(*resume_at);
                // What is new of it lies twice there until it is published.
                let appended = there(entry).map(|there| size.saturating_sub(there).saturating_mul(2));
                (appended.map_or(left, |appended| appended.min(left)), u64::from(*resume_at == 0))
            }
            plan::Need::Nothing => (0, 1),
            // It may turn out to be there.
            plan::Need::Compare { .. } => (0, 0),
        };
        need.bytes = need.bytes.saturating_add(bytes);
        need.inodes += inodes;
    }
    need
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn h30_what_cannot_fit_is_refused_with_numbers() {
        let at = tempfile::tempdir().unwrap();
        let root = Root::open(at.path()).unwrap();
        check(&root, Need { bytes: 1, inodes: 1 }).unwrap();
        let error = check(&root, Need { bytes: u64::MAX - 1, inodes: 0 }).unwrap_err();
        assert_eq!(error.exit(), crate::error::Exit::Io);
        let text = crate::error::chain(&error);
        assert!(text.contains("18446.7 PB are needed") && text.contains("are free"), "{text}");
        if root.free_space().unwrap().inodes.is_some() {
            assert!(check(&root, Need { bytes: 0, inodes: u64::MAX }).is_err());
        }
    }
}
