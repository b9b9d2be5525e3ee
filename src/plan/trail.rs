//! Through which directories something came before it is passed on, so that a chain of daemons does not become a circle.
//!
//! A directory is told from others by digests, one for each directory on the way to it: two that lie in each other are seen
//! to, and nobody learns a path that he was not told.

use serde::{Deserialize, Serialize};

use crate::error::said;

/// So many places are remembered at most; a chain that long is no chain any more.
pub const STOPS_MAX: usize = 32;
/// What is taken of a stop that somebody else tells.
const LEVELS_MAX: usize = 128;
const LEVEL_BYTES_MAX: usize = 64;
const NAME_BYTES_MAX: usize = 1024;

/// A directory that something came through.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stop {
    /// A digest of the machine and the path of each directory on the way, from the top to this one.
    pub levels: Vec<String>,
    /// For people: `HOST:/PATH`.
    pub name: String,
}

impl Stop {
    /// Whether the two are one directory, or one lies in the other.
    pub fn touches(&self, other: &Stop) -> bool {
        let within = |inner: &Stop, outer: &Stop| outer.levels.last().is_some_and(|last| inner.levels.contains(last));
        within(self, other) || within(other, self)
    }

    /// Whether nothing of it is longer than it may be.
    fn is_sane(&self) -> bool {
        self.name.len() <= NAME_BYTES_MAX
            && self.levels.len() <= LEVELS_MAX
            && self.levels.iter().all(|level| level.len() <= LEVEL_BYTES_MAX)
    }
}

/// Whether a trail can be one at all.
///
/// # Errors
/// In words, why not.
pub fn check(trail: &[Stop]) -> Result<(), String> {
    if trail.len() > STOPS_MAX {
        return Err(format!("it came through more than {STOPS_MAX} directories, which is no chain any more"));
    }
    match trail.iter().all(Stop::is_sane) {
        true => Ok(()),
        false => Err("the list of directories that it came through is none".to_owned()),
    }
}

/// The file of a trail.
pub fn to_text(stops: &[Stop]) -> Vec<u8> {
    let mut text = serde_json::json!({ "stops": stops }).to_string().into_bytes();
    text.push(b'\n');
    text
}

/// Reads it back; what is no trail is an empty one.
pub fn from_text(text: &[u8]) -> Vec<Stop> {
    #[derive(Deserialize)]
    struct Stored {
        stops: Vec<Stop>,
    }
    let stored: Option<Stored> = serde_json::from_slice(text).ok();
    stored.map(|stored| stored.stops).filter(|stops| check(stops).is_ok()).unwrap_or_default()
}

/// Why nothing is brought to `here`, and what to do about it; `None` where it is no circle.
pub fn refusal(trail: &[Stop], here: &Stop) -> Option<String> {
    let names: Vec<String> = circle(trail, here)?.iter().map(|name| said(name.as_bytes())).collect();
    let from = trail.last().map(|stop| said(stop.name.as_bytes())).unwrap_or_default();
    Some(format!(
        "it would go in a circle: {}; an edit or a removal at one place would be undone by another. Take one of these targets \
         out of its job. Where that was done already, remove '.lockstep/trail' of {from}",
        names.join(" -> ")
    ))
}

/// The circle that would be closed by going to `here` now: the names of the directories on it.
pub fn circle(trail: &[Stop], here: &Stop) -> Option<Vec<String>> {
    let from = trail.iter().position(|stop| stop.touches(here))?;
    let names = trail[from..].iter().map(|stop| stop.name.clone());
    Some(names.chain([here.name.clone()]).collect())
}

/// What is known to have come, and what comes now: each place once, in the order of the newer one.
pub fn merged(known: &[Stop], now: &[Stop]) -> Vec<Stop> {
    let before = known.iter().filter(|stop| now.iter().all(|other| other.levels != stop.levels));
    let all: Vec<Stop> = before.chain(now).cloned().collect();
    // What came last matters most.
    all[all.len().saturating_sub(STOPS_MAX)..].to_vec()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stop(path: &str) -> Stop {
        let levels = path.match_indices('/').skip(1).map(|(at, _)| path[..at].to_owned()).chain([path.to_owned()]);
        Stop { levels: levels.collect(), name: path.to_owned() }
    }

    #[test]
    fn a_circle_is_closed_by_the_same_directory_one_in_it_and_one_around_it() {
        let trail = [stop("/z"), stop("/a/data"), stop("/b/data")];
        for (here, closed) in [
            ("/a/data", true),
            ("/a/data/sub", true),
            ("/a", true),
            ("/b/data", true),
            ("/a/data2", false),
            ("/c/data", false),
            ("/a/dat", false),
        ] {
            assert_eq!(circle(&trail, &stop(here)).is_some(), closed, "{here}");
        }
        assert_eq!(circle(&trail, &stop("/a/data")).unwrap(), ["/a/data", "/b/data", "/a/data"]);
        assert_eq!(circle(&[], &stop("/a")), None);
    }

    #[test]
    fn places_are_remembered_once_and_no_trail_grows_without_an_end() {
        let (a, b, c) = (stop("/a"), stop("/b"), stop("/c"));
        assert_eq!(merged(&[a.clone(), b.clone()], &[b.clone(), c.clone()]), [a.clone(), b.clone(), c.clone()]);
        assert_eq!(merged(&[], std::slice::from_ref(&a)), [a]);
        let many: Vec<Stop> = (0..40).map(|number| stop(&format!("/{number}"))).collect();
        assert_eq!(merged(&many, std::slice::from_ref(&c)).last(), Some(&c));
        assert_eq!(merged(&many, &[c]).len(), STOPS_MAX);
        assert!(check(&many).is_err() && check(&many[..3]).is_ok());
        assert_eq!(from_text(&to_text(&many[..3])), many[..3]);
        assert!(from_text(b"{}").is_empty() && from_text(&to_text(&many)).is_empty());
        assert!(check(&[Stop { name: "x".repeat(2000), ..b }]).is_err());
    }
}
