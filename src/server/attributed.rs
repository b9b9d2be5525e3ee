//! A target whose records name who really sent: the user who logged in, with the key, not who the sender says it is.

use std::sync::Arc;

use super::agent::SharedTarget;
use super::live::short;
use crate::audit::Login;
use crate::endpoint::delta::{Alike, Wanted};
use crate::endpoint::{BeginOptions, CommitOptions, Committed, Error, Target, Writer};
use crate::error::Escaped;
use crate::manifest::Tree;
use crate::monitor::Monitor;
use crate::plan::Plan;

/// More of what a sender says of itself is cut off: it ends up in every line of the audit log.
const SAID_MAX: usize = 200;

/// See the module.
pub struct Attributed {
    target: SharedTarget,
    actor: String,
    login: Login,
}

impl Attributed {
    /// `actor` is who is at the other end, `login` by what.
    pub fn new(target: SharedTarget, actor: String, login: Login) -> Attributed {
        Attributed { target, actor, login }
    }
}

fn said(text: &str) -> String {
    short(&Escaped(text.as_bytes()).to_string(), SAID_MAX)
}

impl Target for Attributed {
    fn describe(&self) -> String {
        self.target.describe()
    }

    fn begin(&self, options: &BeginOptions, monitor: &dyn Monitor) -> Result<(), Error> {
        let actor = format!("{}, who says {}", self.actor, said(&options.actor));
        let (source, login) = (said(&options.source), Some(Box::new(self.login.clone())));
        let options = BeginOptions { actor, source, login, ..options.clone() };
        self.target.begin(&options, monitor)
    }

    fn diff(&self, source: &Arc<Tree>, monitor: &dyn Monitor) -> Result<Plan, Error> {
        self.target.diff(source, monitor)
    }

    fn writer(&self) -> Result<Box<dyn Writer + '_>, Error> {
        self.target.writer()
    }

    fn commit(&self, options: &CommitOptions, monitor: &dyn Monitor) -> Result<Committed, Error> {
        self.target.commit(options, monitor)
    }

    fn abort(&self) {
        self.target.abort();
    }

    fn reject(&self, path: &[u8], reason: &str) {
        self.target.reject(path, reason);
    }

    fn verification(&self) -> String {
        self.target.verification()
    }

    fn wire_bytes(&self) -> u64 {
        self.target.wire_bytes()
    }

    fn alike(&self, index: u32, wanted: Wanted) -> Result<Option<Alike>, Error> {
        self.target.alike(index, wanted)
    }
}
