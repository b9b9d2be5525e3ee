//! Reads files for one worker of one run, and takes what another run has read already.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, PoisonError};
use std::time::SystemTime;

use super::flow::{Flows, Look, Member};
use crate::endpoint::local::{LocalReader, LocalSource, Opened, changed, hashed, produced_whole, unreadable};
use crate::endpoint::{Error, Fetch, Produced, Reader, SMALL_FILE_BYTES};
use crate::manifest::{Digest, Tree};
use crate::root::Fingerprint;
use crate::scan::cache::is_settled;

/// The reader of one worker.
pub(super) struct SharedReader<'a> {
    source: &'a LocalSource,
    tree: Arc<Tree>,
    flows: Arc<Flows>,
    /// The run that it is of.
    view: u64,
    waiting: VecDeque<Fetch>,
    current: Option<Following>,
    /// For files that nothing is shared of.
    alone: LocalReader<'a>,
    /// What was asked for already, a bit for each entry.
    asked: Vec<u64>,
}

/// A large file that is being read.
struct Following {
    fetch: Fetch,
    opened: Opened,
    member: Member,
    offset: u64,
}

impl<'a> SharedReader<'a> {
    pub(super) fn new(source: &'a LocalSource, tree: Arc<Tree>, flows: Arc<Flows>, view: u64) -> SharedReader<'a> {
        let alone = source.reads(Arc::clone(&tree));
        let asked = vec![0; tree.entries().len().div_ceil(64)];
        SharedReader { source, tree, flows, view, waiting: VecDeque::new(), current: None, alone, asked }
    }

    /// Whether this was asked for before.
    fn asks_again(&mut self, index: u32) -> bool {
        let Some(word) = self.asked.get_mut(index as usize / 64) else { return false };
        let bit = 1 << (index % 64);
        let before = *word & bit != 0;
        *word |= bit;
        before
    }

    fn start(&mut self, fetch: Fetch) -> Result<Produced, Produced> {
        let index = fetch.index;
        let failed = |error: io::Error| unreadable(index, &error);
        let again = self.asks_again(index);
        let mut opened = self.source.open(&self.tree, index)?;
        // RACE: what is written within the tick of the clock that the file has its time of does not show. Nobody is given
        // what another read then; and who asks again found that what he got was wrong.
        // Of what grows each target may have another beginning.
        if again || opened.grows || !is_settled(&opened.before, SystemTime::now()) {
            drop(opened);
            self.alone.push(fetch);
            let produced = self.alone.next().map_err(|error| unreadable(index, &error))?;
            return produced.ok_or_else(|| changed(index));
        }
        if opened.before.size <= SMALL_FILE_BYTES && fetch.from == 0 {
            return self.whole(fetch, &mut opened).map_err(failed);
        }
        opened.is_read_on();
        let member = self.flows.join(self.view, Fingerprint::from(&opened.before), fetch.from);
        let mut following = Following { fetch, opened, member, offset: fetch.from };
        if let Some(expected) = fetch.unless {
            let Some(digest) = following.hash_all().map_err(failed)? else { return Err(changed(index)) };
            if digest == expected {
                let same = following.opened.is_unchanged().map_err(failed)?;
                return if same { Ok(Produced::Same { index, digest }) } else { Err(changed(index)) };
            }
        }
        Ok(self.follow(following))
    }

    /// A small file: the first who comes reads it.
    fn whole(&self, fetch: Fetch, opened: &mut Opened) -> io::Result<Produced> {
        let identity = Fingerprint::from(&opened.before);
        let slot = self.flows.small(self.view, identity);
        let mut kept = slot.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((block, digest)) = &mut *kept {
            return Ok(produced_whole(fetch, *digest, block.share()));
        }
        let Some(mut block) = opened.whole()? else { return Ok(changed(fetch.index)) };
        let digest = self.flows.digest(identity).unwrap_or_else(|| hashed(&block));
        self.flows.learn(identity, digest);
        *kept = Some((block.share(), digest));
        Ok(produced_whole(fetch, digest, block))
    }

    /// The next piece of a large file, which is gone on with unless that was its end.
    fn follow(&mut self, mut following: Following) -> Produced {
        let produced = following.next().unwrap_or_else(|error| unreadable(following.fetch.index, &error));
        if !matches!(produced, Produced::End { .. } | Produced::Failed { .. }) {
            self.current = Some(following);
        }
        produced
    }
}

impl Following {
    fn next(&mut self) -> io::Result<Produced> {
        let (index, offset) = (self.fetch.index, self.offset);
        let piece = loop {
            match self.member.look(offset) {
                Look::Piece(piece) => break piece,
                Look::Behind(most) => match self.opened.piece(offset, most)? {
                    Some(piece) => break self.member.keep_behind(offset, piece),
                    None => return Ok(self.spoilt()),
                },
                Look::Ahead => {
                    if let Some(piece) = self.member.step(&mut self.opened, offset)? {
                        break piece;
                    }
                }
                // Whoever hashed it has looked, too; but what came here later may be from the time since.
                Look::End(digest) if self.opened.is_unchanged()? => return Ok(Produced::End { index, digest }),
                Look::End(_) | Look::Spoilt => return Ok(self.spoilt()),
            }
        };
        self.offset += piece.length();
        self.member.advance(self.offset);
        Ok(piece.at(index, offset))
    }

    fn spoilt(&self) -> Produced {
        self.member.spoil();
        changed(self.fetch.index)
    }

    /// Sees to it that all is hashed; `None` where the file changed.
    fn hash_all(&mut self) -> io::Result<Option<Digest>> {
        let end = self.opened.before.size;
        loop {
            match self.member.look(end) {
                Look::End(digest) => return Ok(Some(digest)),
                Look::Spoilt => return Ok(None),
                Look::Piece(_) | Look::Behind(_) | Look::Ahead => {}
            }
            self.member.step(&mut self.opened, end)?;
        }
    }
}

impl Reader for SharedReader<'_> {
    fn wants_more(&self) -> bool {
        self.waiting.is_empty() && self.current.is_none() && self.alone.wants_more()
    }

    fn push(&mut self, fetch: Fetch) {
        self.waiting.push_back(fetch);
    }

    fn next(&mut self) -> Result<Option<Produced>, Error> {
        if let Some(produced) = self.alone.next()? {
            return Ok(Some(produced));
        }
        if let Some(following) = self.current.take() {
            return Ok(Some(self.follow(following)));
        }
        let Some(fetch) = self.waiting.pop_front() else { return Ok(None) };
        Ok(Some(self.start(fetch).unwrap_or_else(|failure| failure)))
    }
}
