//! Lines that are read back, and which of them somebody wants to see.

use chrono::{DateTime, Utc};
use serde::Deserialize;

use super::Outcome;
use super::chain::time;

/// A line as it is shown or handed on. What it does not say, as lines of before may not, is `None`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
#[allow(missing_docs)]
pub struct Event {
    pub sequence: u64,
    pub time: String,
    pub boot: Option<String>,
    pub actor: Option<String>,
    pub source: Option<String>,
    pub peer: Option<String>,
    pub key: Option<String>,
    pub certificate: Option<String>,
    pub serial: Option<u64>,
    pub authority: Option<String>,
    pub action: String,
    pub path: Option<String>,
    pub size: Option<u64>,
    pub sha256: Option<String>,
    pub mode: Option<String>,
    pub owner: Option<String>,
    pub group: Option<String>,
    pub acl: Option<String>,
    pub mode_before: Option<String>,
    pub owner_before: Option<String>,
    pub group_before: Option<String>,
    pub generation: Option<u64>,
    pub result: Option<Outcome>,
    pub head: Option<String>,
    pub reason: Option<String>,
    pub hash: String,
}

impl Event {
    /// Reads a line. `None` for what is none.
    #[must_use]
    pub fn parse(line: &[u8]) -> Option<Event> {
        serde_json::from_slice(line).ok()
    }

    /// When it was written.
    #[must_use]
    pub fn moment(&self) -> Option<DateTime<Utc>> {
        time(&self.time)
    }

    /// What came of it, also where lines of before did not say so.
    #[must_use]
    pub fn outcome(&self) -> Outcome {
        self.result.unwrap_or(if self.action == "refuse" { Outcome::Failure } else { Outcome::Success })
    }
}

/// Which lines are wanted; all of what is set has to hold.
#[derive(Debug, Clone, Default)]
pub struct Query {
    /// Not before this.
    pub since: Option<DateTime<Utc>>,
    /// Before this.
    pub until: Option<DateTime<Utc>>,
    /// A part of who did it: of the actor, the key, the certificate's id, or the address.
    pub actor: Option<String>,
    /// One of these actions.
    pub actions: Vec<String>,
    /// This path, and what lies below it.
    pub path: Option<String>,
    /// What came of it.
    pub result: Option<Outcome>,
}

impl Query {
    /// Whether a line is wanted. One without a time is of every time.
    #[must_use]
    pub fn admits(&self, event: &Event) -> bool {
        let moment = event.moment();
        let within = moment.is_none_or(|moment| {
            self.since.is_none_or(|since| moment >= since) && self.until.is_none_or(|until| moment < until)
        });
        let who = [&event.actor, &event.key, &event.certificate, &event.peer];
        // Who was refused before somebody got in is told there.
        let refused = event.reason.as_ref().filter(|_| event.action == "login");
        let who = who.into_iter().filter_map(Option::as_ref).chain(refused);
        let by = |wanted: &str| who.clone().any(|who| who.contains(wanted));
        let below = |wanted: &str| {
            let wanted = wanted.trim_end_matches('/');
            let rest = event.path.as_deref().and_then(|path| path.strip_prefix(wanted));
            rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
        };
        within
            && self.actor.as_deref().is_none_or(by)
            && (self.actions.is_empty() || self.actions.contains(&event.action))
            && self.path.as_deref().is_none_or(below)
            && self.result.is_none_or(|wanted| wanted == event.outcome())
    }
}
