//! What a writer knows of a file on its way.

use std::collections::{BTreeSet, VecDeque};
use std::sync::Arc;

use bytes::Bytes;

use super::super::alike::Lying;
use super::super::handles::Handles;
use crate::endpoint::delta::Summing;
use crate::endpoint::{Block, WriteFailure};
use crate::manifest::Digest;

#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Op {
    Open,
    /// The OPEN of what is copied from.
    OpenOrigin,
    /// The FSTAT of it.
    LookAtOrigin,
    /// The REMOVE before a second OPEN, and of what failed.
    Clear,
    /// The OPEN over the further connection with this number.
    OpenBeside(usize),
    /// The CLOSE over a further connection.
    CloseBeside,
    /// A WRITE of what begins at this offset.
    Data(u64),
    /// The copy of what begins at this offset, and has this length.
    Copy(u64, u64),
    /// Whatever else is done to content.
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
    /// Large: piece by piece, by the command that writes. Where there is a handle too, what is small or copied goes by that.
    Stream,
}

/// A part of a file that waits: for a handle, or for what comes before it.
pub(super) enum Part {
    /// Bytes, and where they go.
    Data { to: u64, block: Block },
    /// What is to be copied.
    Copy { to: u64, length: u64, from: u64 },
}

impl Part {
    fn to(&self) -> u64 {
        let (Part::Data { to, .. } | Part::Copy { to, .. }) = self;
        *to
    }
}

/// What parts of a file are copied from.
pub(super) struct Origin {
    pub(super) lying: Arc<Lying>,
    pub(super) handle: Option<Bytes>,
}

/// One file that is being staged.
pub(super) struct File {
    pub(super) index: u32,
    pub(super) path: Vec<u8>,
    pub(super) size: u64,
    /// Where this run began.
    pub(super) begun: u64,
    /// Where the next bytes go.
    pub(super) at: u64,
    pub(super) handle: Option<Bytes>,
    /// It goes over further connections too, and their handles of it.
    pub(super) beside: Option<Handles>,
    /// What waits, in the order of the file.
    pub(super) queued: VecDeque<Part>,
    pub(super) in_flight: usize,
    /// Where what was given up to now ends.
    pub(super) sent: u64,
    /// Where the WRITEs and copies begin that are not answered.
    pub(super) unanswered: BTreeSet<u64>,
    /// Bytes in large blocks since the last that was copied or small.
    pub(super) fresh: u64,
    /// Where what the command was given begins and ends, and is not said to be written.
    pub(super) lent: VecDeque<(u64, u64)>,
    pub(super) stage: Stage,
    pub(super) route: Route,
    /// What parts of it are copied from.
    pub(super) origin: Option<Origin>,
    /// It is what is new of a file that is appended to, whose digest as a whole is the other.
    pub(super) grows: Option<(Arc<Lying>, Digest)>,
    /// The sums of its blocks as far as it has come, where they are kept.
    pub(super) summing: Option<Summing>,
    /// Some of it is a hole.
    pub(super) has_hole: bool,
    /// It counts as one of the files that are open at the server.
    pub(super) counted: bool,
    /// The last bytes were a hole: the size has to be set.
    pub(super) hole_at_end: bool,
    /// It goes on with what an earlier run staged.
    pub(super) resumed: bool,
    pub(super) opened_again: bool,
    /// There will be no handle.
    pub(super) never_opens: bool,
    /// Said by `finish`.
    pub(super) digest: Option<Digest>,
    pub(super) closing: bool,
    /// The command has it.
    pub(super) is_with_command: bool,
    /// The command was told its end, and has not answered: one of those in flight.
    pub(super) ending: bool,
    pub(super) failure: Option<WriteFailure>,
}

impl File {
    /// A file of `size` bytes that is gone on with at `resume_at`.
    pub(super) fn new(index: u32, path: Vec<u8>, size: u64, resume_at: u64, route: Route) -> File {
        File {
            index,
            path,
            size,
            begun: resume_at,
            at: resume_at,
            handle: None,
            beside: None,
            queued: VecDeque::new(),
            in_flight: 0,
            sent: resume_at,
            unanswered: BTreeSet::new(),
            fresh: 0,
            lent: VecDeque::new(),
            stage: Stage::Writing,
            route,
            origin: None,
            grows: None,
            summing: None,
            has_hole: false,
            counted: false,
            hole_at_end: false,
            resumed: resume_at > 0,
            opened_again: false,
            never_opens: false,
            digest: None,
            closing: false,
            is_with_command: false,
            ending: false,
            failure: None,
        }
    }

    /// Whether so many bytes go on from where it has come to, which is moved; what does not makes it fail.
    pub(super) fn goes_on(&mut self, offset: u64, length: u64) -> bool {
        match offset.checked_add(length) {
            Some(end) if offset == self.at && end <= self.size => self.at = end,
            _ => {
                let message = format!("{length} bytes at {offset} do not go on from {} of {}", self.at, self.size);
                self.failure.get_or_insert(WriteFailure { message, retry: false });
                return false;
            }
        }
        true
    }

    /// How much waits to be written.
    pub(super) fn queued_bytes(&self) -> usize {
        let data = |part: &Part| if let Part::Data { block, .. } = part { block.data().len() } else { 0 };
        self.queued.iter().map(data).sum()
    }

    /// How much waits to be copied.
    pub(super) fn queued_copies(&self) -> u64 {
        let copied = |part: &Part| if let Part::Copy { length, .. } = part { *length } else { 0 };
        self.queued.iter().map(copied).sum()
    }

    /// The next part that waited and need not any more, with the handles that it takes. Nothing goes before what comes before it: what is
    /// there of a file that is cut off ends where the next run goes on.
    pub(super) fn next_part(&mut self) -> Option<(Part, Bytes, Option<Bytes>)> {
        let handle = self.handle.clone().filter(|_| self.lent.is_empty())?;
        let origin = self.origin.as_ref().and_then(|origin| origin.handle.clone());
        if origin.is_none() && matches!(self.queued.front(), Some(Part::Copy { .. })) {
            return None;
        }
        Some((self.queued.pop_front()?, handle, origin))
    }

    /// Everything before this offset is there.
    pub(super) fn reached(&self) -> u64 {
        let queued = self.queued.front().map(Part::to);
        let lent = self.lent.front().map(|(at, _)| *at);
        let first = [self.unanswered.first().copied(), lent, queued];
        first.into_iter().flatten().min().unwrap_or(self.sent)
    }

    /// The command says that it has written what it was given up to this offset.
    pub(super) fn written_to(&mut self, offset: u64) {
        while self.lent.front().is_some_and(|(_, end)| *end <= offset) {
            self.lent.pop_front();
        }
    }

    /// The command has done what it was given of it.
    pub(super) fn done_by_command(&mut self) {
        self.in_flight -= usize::from(std::mem::take(&mut self.ending));
        self.is_with_command = false;
        self.lent.clear();
    }
}
