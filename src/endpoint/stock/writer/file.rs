//! What a writer knows of a file on its way.

use std::collections::{BTreeMap, VecDeque};

use bytes::Bytes;

use crate::endpoint::{Block, WriteFailure};
use crate::manifest::Digest;

#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Op {
    Open,
    /// The REMOVE before a second OPEN, and of what failed.
    Clear,
    Write,
    Close,
    Grant,
    /// The LSTAT after special bits were asked for.
    Check,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Stage {
    /// Until the CLOSE is answered.
    Writing,
    /// Its digest is asked for.
    Proving,
    /// Owner, mode and times are on their way.
    Granting,
}

/// How the content of a file gets there.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Route {
    /// By requests of SFTP.
    Sftp,
    /// Small: its blocks are kept until all are here, and go into an archive.
    Pack,
    /// Large: piece by piece, by the command that writes.
    Stream,
}

/// One file that is being staged.
pub(super) struct File {
    pub(super) index: u32,
    pub(super) path: Vec<u8>,
    pub(super) size: u64,
    /// Where the next bytes go.
    pub(super) at: u64,
    pub(super) handle: Option<Bytes>,
    /// Blocks that came before the handle.
    pub(super) queued: VecDeque<(u64, Block)>,
    pub(super) in_flight: usize,
    /// Where the next request begins.
    pub(super) sent: u64,
    /// The WRITEs that are not answered: where each begins, by its tag.
    pub(super) unanswered: BTreeMap<u64, u64>,
    pub(super) stage: Stage,
    pub(super) route: Route,
    /// Some of it is a hole.
    pub(super) has_hole: bool,
    /// It counts as one of the files that are open at the server.
    pub(super) counted: bool,
    /// The last bytes were a hole: the size has to be set.
    pub(super) hole_at_end: bool,
    /// It goes on with what an earlier run staged.
    pub(super) resumed: bool,
    pub(super) opened_again: bool,
    /// Said by `finish`.
    pub(super) digest: Option<Digest>,
    pub(super) closing: bool,
    pub(super) failure: Option<WriteFailure>,
}

impl File {
    /// Whether all or a part of it was given to the command that takes content.
    pub(super) fn is_with_command(&self) -> bool {
        match self.route {
            Route::Sftp => false,
            Route::Pack => self.stage == Stage::Writing && self.closing,
            Route::Stream => self.stage == Stage::Writing,
        }
    }
}
