//! All that lies below a name, with the paths that it has when the name becomes another.

use super::site::{STATE, Spot};
use super::{Failed, Status};
use crate::path::RelPath;
use crate::root::{FileKind, Follow, Metadata};

/// The name from the spot's directory, the path below the new name, and what it is.
pub(super) type Below = (RelPath, RelPath, Metadata);

/// A spot and all below it, a directory before what is in it. What cannot be looked at is an error, and the rest follows.
pub(super) struct Walk<'s> {
    spot: &'s Spot,
    stack: Vec<(RelPath, RelPath)>,
    /// The directory that came last. It is listed when more is asked for: until then it may have become readable.
    last: Option<(RelPath, RelPath)>,
}

impl Walk<'_> {
    /// With the paths that everything has when the spot is called `new`.
    pub(super) fn new<'s>(spot: &'s Spot, new: &RelPath) -> Walk<'s> {
        Walk { spot, stack: vec![(spot.name.clone(), new.clone())], last: None }
    }

    fn enter(&mut self, name: &RelPath, path: &RelPath) -> Result<(), Failed> {
        let mut whole = Ok(());
        for below in self.spot.holder.names(Some(name), Follow::Never)? {
            match (name.join(&below), path.join(&below)) {
                (Ok(name), Ok(path)) => self.stack.push((name, path)),
                // A shorter name of what holds it makes it reachable again: what was not looked at here would be so for good.
                _ => {
                    whole = Err(Failed::because(Status::BadMessage, "the path of something below it would be too long"))
                }
            }
        }
        whole
    }
}

impl Iterator for Walk<'_> {
    type Item = Result<Below, Failed>;

    fn next(&mut self) -> Option<Self::Item> {
        if let Some((name, path)) = self.last.take()
            && let Err(failed) = self.enter(&name, &path)
        {
            return Some(Err(failed));
        }
        let (name, path) = self.stack.pop()?;
        let found = match self.spot.holder.stat(&name, Follow::Never) {
            Ok(found) => found,
            Err(error) => return Some(Err(error.into())),
        };
        if found.kind == FileKind::Directory && name.name() != STATE {
            self.last = Some((name.clone(), path.clone()));
        }
        Some(Ok((name, path, found)))
    }
}
