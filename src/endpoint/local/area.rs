//! Where a root stages: a run brings a new state of the tree, a repair brings back the one that its list tells of.
//!
//! What always holds: the two never touch what the other has staged, so that a push which was interrupted goes on after a
//! repair; and at most one of them has written down what it publishes, since each begins by finishing what the other had.

/// A staging area of a root.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Area {
    /// Of a run: what it publishes comes with a new manifest.
    Run,
    /// Of a repair: the manifest stays as it is.
    Repair,
    /// What is brought before it may be published.
    Early,
}

impl Area {
    pub(super) const ALL: [Area; 2] = [Area::Run, Area::Repair];

    /// Below the root.
    pub(super) const fn in_root(self) -> &'static str {
        match self {
            Area::Run => ".lockstep/staging/current",
            Area::Repair => ".lockstep/staging/repair",
            Area::Early => ".lockstep/early",
        }
    }

    /// Below `.lockstep`.
    pub(super) fn in_state(self) -> &'static str {
        match self {
            Area::Run => "staging/current",
            Area::Repair => "staging/repair",
            Area::Early => "early",
        }
    }
}
