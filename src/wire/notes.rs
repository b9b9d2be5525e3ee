//! What the serving side reports while it handles a request, carried at the end of the reply.
//!
//! What always holds: there are at most [`NOTES_MAX`] of them in a reply, and what is read is escaped before it is told.

use std::sync::{Mutex, PoisonError};

use super::extension::{Fields, WireError, put_string};
use crate::error::SAID_MAX;
use crate::monitor::{Counters, Event, Monitor, Problem, Severity};
use crate::path::RelPath;

/// More notes of one request are counted, not carried.
pub const NOTES_MAX: usize = 200;

#[derive(Debug)]
struct Note {
    kind: u8,
    path: Vec<u8>,
    message: String,
}

const DETAIL: u8 = 0;
const WARNING: u8 = 1;
const SKIPPED: u8 = 2;
const FAILED: u8 = 3;

/// A monitor that keeps what it is told for the reply.
#[derive(Default)]
pub struct Notes {
    counters: Counters,
    /// Whether whoever asked has gone.
    gone: Option<Box<dyn Fn() -> bool + Send + Sync>>,
    /// What is carried, and how many more there were.
    kept: Mutex<(Vec<Note>, u32)>,
}

impl Monitor for Notes {
    fn event(&self, event: Event<'_>) {
        let note = |kind, path: &[u8], message: &str| {
            let message = message.chars().take(SAID_MAX).collect();
            Note { kind, path: path.to_vec(), message }
        };
        let note = match event {
            Event::Phase(_) => return,
            Event::Detail(text) => note(DETAIL, b"", text),
            Event::Warning(text) => note(WARNING, b"", text),
            Event::Problem(problem) => {
                let kind = if problem.severity == Severity::Failed { FAILED } else { SKIPPED };
                note(kind, problem.path.as_ref().map_or(b"", |path| path.as_bytes()), &problem.message)
            }
        };
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.0.len() < NOTES_MAX {
            kept.0.push(note);
        } else {
            kept.1 = kept.1.saturating_add(1);
        }
    }

    fn counters(&self) -> &Counters {
        &self.counters
    }

    fn stopped(&self) -> bool {
        self.gone.as_ref().is_some_and(|gone| gone())
    }
}

impl Notes {
    /// No notes yet, for somebody who may go: what takes long ends then.
    pub fn until(gone: impl Fn() -> bool + Send + Sync + 'static) -> Notes {
        Notes { gone: Some(Box::new(gone)), ..Notes::default() }
    }

    /// Appends the list to a reply, each message as `told` gives it.
    pub fn put(&self, body: &mut Vec<u8>, told: impl Fn(&str) -> String) {
        let kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        body.extend_from_slice(&(kept.0.len() as u32).to_be_bytes());
        for note in &kept.0 {
            body.push(note.kind);
            put_string(body, &note.path);
            put_string(body, told(&note.message).as_bytes());
        }
        body.extend_from_slice(&kept.1.to_be_bytes());
    }
}

/// Tells `monitor` what a reply of `host` ends with.
///
/// # Errors
/// When it is not a list of notes, or is longer than allowed.
pub fn tell(mut fields: Fields<'_>, host: &str, monitor: &dyn Monitor) -> Result<(), WireError> {
    let count = fields.u32()? as usize;
    if count > NOTES_MAX {
        return Err(WireError::Range("the number of notes"));
    }
    for _ in 0..count {
        let (kind, path) = (fields.u8()?, fields.string()?);
        let message = fields.said()?;
        let path = if path.is_empty() {
            None
        } else {
            Some(RelPath::new(path).map_err(|_| WireError::Range("the path of a note"))?)
        };
        let problem = |severity| Problem { path: path.clone(), message: format!("at {host}: {message}"), severity };
        match kind {
            DETAIL => monitor.event(Event::Detail(&format!("{host}: {message}"))),
            WARNING => monitor.event(Event::Warning(&format!("{host}: {message}"))),
            SKIPPED => monitor.event(Event::Problem(&problem(Severity::Skipped))),
            FAILED => monitor.event(Event::Problem(&problem(Severity::Failed))),
            _ => return Err(WireError::Range("the kind of a note")),
        }
    }
    let more = fields.u32()?;
    if more > 0 {
        monitor.event(Event::Warning(&format!("{host}: {more} more messages were left out")));
    }
    fields.end()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Default)]
    struct Said(Mutex<Vec<String>>, Counters);
    impl Monitor for Said {
        fn event(&self, event: Event<'_>) {
            self.0.lock().unwrap().push(format!("{event:?}"));
        }
        fn counters(&self) -> &Counters {
            &self.1
        }
    }

    #[test]
    fn what_was_said_is_told_escaped_bounded_and_with_its_weight() {
        let notes = Notes::default();
        notes.event(Event::Warning("the clock\u{1b}[2J"));
        notes.event(Event::Detail("chosen"));
        let problem =
            Problem { path: RelPath::new("a/b").ok(), message: "unreadable".into(), severity: Severity::Failed };
        notes.event(Event::Problem(&problem));
        for _ in 0..NOTES_MAX {
            notes.event(Event::Detail("again"));
        }
        let mut body = Vec::new();
        notes.put(&mut body, str::to_owned);
        let said = Said::default();
        tell(Fields(&body), "h", &said).unwrap();
        let said = said.0.into_inner().unwrap();
        assert!(said[0].starts_with("Warning(\"h: the clock") && !said[0].contains("\\u{1b}"), "{}", said[0]);
        assert_eq!(said[1], "Detail(\"h: chosen\")");
        assert!(said[2].contains("a/b") && said[2].contains("at h: unreadable"), "{}", said[2]);
        assert_eq!(said.len(), NOTES_MAX + 1);
        assert!(said[NOTES_MAX].contains("3 more messages"), "{}", said[NOTES_MAX]);
        for length in 0..body.len() {
            assert!(tell(Fields(&body[..length]), "h", &Said::default()).is_err(), "{length}");
        }
        let many = (NOTES_MAX as u32 + 1).to_be_bytes();
        assert!(tell(Fields(&many), "h", &Said::default()).is_err());
    }
}
