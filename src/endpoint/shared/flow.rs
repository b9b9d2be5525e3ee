//! What is kept of the files that are being read: pieces, digests, and who has got how far.
//!
//! One lock for all of it, which is held only to look something up: reading and hashing happen outside, and one file's under
//! a lock of its own.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use sha2::{Digest as _, Sha256};

use crate::endpoint::Block;
use crate::endpoint::local::{Opened, Piece};
use crate::manifest::Digest;
use crate::root::Fingerprint;

/// Digests of files that were read, at most.
const DIGESTS_MAX: usize = 65_536;
/// What a piece costs beside its bytes.
const PIECE_COST: usize = 256;

/// A small file, once somebody has read it.
pub(super) type Slot = Arc<Mutex<Option<(Block, Digest)>>>;

pub(super) struct Flows {
    kept_max: usize,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// The runs that go on.
    views: BTreeSet<u64>,
    flows: HashMap<Fingerprint, Flow>,
    smalls: HashMap<Fingerprint, Small>,
    /// What is kept, by when it came.
    order: BTreeMap<u64, (Fingerprint, Kept)>,
    kept_bytes: usize,
    digests: HashMap<Fingerprint, Known>,
    /// The same, by when they came.
    learnt: VecDeque<Fingerprint>,
    /// Numbers for members and for what is kept.
    next: u64,
}

#[derive(Clone, Copy)]
enum Kept {
    /// At this offset.
    Piece(u64),
    Small,
}

struct Known {
    digest: Digest,
    /// Whether it is in the cache on the disk.
    stored: bool,
}

struct Small {
    slot: Slot,
    number: u64,
    /// The runs that have come for it.
    taken: Vec<u64>,
}

/// A large file that is being read.
struct Flow {
    head: Arc<Mutex<Head>>,
    /// All before this was hashed.
    hashed: u64,
    digest: Option<Digest>,
    /// It is not what it was any more: nobody may send it.
    spoilt: bool,
    pieces: BTreeMap<u64, (u64, Piece)>,
    /// How far each who reads it has got.
    members: HashMap<u64, u64>,
    /// The runs that have begun to read it.
    joined: Vec<u64>,
}

/// Where hashing is. Whoever is ahead of all takes the next step, under this lock.
#[derive(Default)]
struct Head {
    hash: Sha256,
    at: u64,
}

/// What there is for somebody who wants what is at an offset.
pub(super) enum Look {
    Piece(Piece),
    /// Others have passed it and it is not kept: at most so many bytes are to be read from the disk.
    Behind(u64),
    /// Nobody has been here.
    Ahead,
    /// The end, and the digest of the whole.
    End(Digest),
    Spoilt,
}

/// One who reads a large file.
pub(super) struct Member {
    flows: Arc<Flows>,
    identity: Fingerprint,
    number: u64,
    head: Arc<Mutex<Head>>,
}

fn cost(piece: &Piece) -> usize {
    match piece {
        Piece::Data(block) => 2 * block.data().len() + PIECE_COST,
        Piece::Hole(_) => PIECE_COST,
    }
}

fn small_cost(identity: Fingerprint) -> usize {
    2 * usize::try_from(identity.size).unwrap_or(usize::MAX / 4) + PIECE_COST
}

fn note(views: &mut Vec<u64>, view: u64) {
    if !views.contains(&view) {
        views.push(view);
    }
}

/// Whether each run that goes on is one of these: nobody is to come any more.
fn all_in(views: &BTreeSet<u64>, these: &[u64]) -> bool {
    views.iter().all(|view| these.contains(view))
}

impl Flows {
    pub(super) fn new(kept_max: usize) -> Flows {
        Flows { kept_max, state: Mutex::default() }
    }

    /// A run begins: what others read from now on is kept for it.
    pub(super) fn enter(&self) -> u64 {
        let mut state = self.state();
        let view = state.number();
        state.views.insert(view);
        view
    }

    /// A run ends. True where it was the last; then all but digests is forgotten.
    pub(super) fn leave(&self, view: u64) -> bool {
        let state = &mut *self.state();
        state.views.remove(&view);
        if !state.views.is_empty() {
            return false;
        }
        state.smalls.clear();
        state.flows.clear();
        state.order.clear();
        state.kept_bytes = 0;
        true
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A run begins to read a large file at `from`.
    pub(super) fn join(self: &Arc<Self>, view: u64, identity: Fingerprint, from: u64) -> Member {
        let mut state = self.state();
        let number = state.number();
        let digest = state.digests.get(&identity).map(|known| known.digest);
        let flow = state.flows.entry(identity).or_insert_with(|| Flow {
            head: Arc::default(),
            hashed: if digest.is_some() { identity.size } else { 0 },
            digest,
            spoilt: false,
            pieces: BTreeMap::new(),
            members: HashMap::new(),
            joined: Vec::new(),
        });
        flow.members.insert(number, from);
        note(&mut flow.joined, view);
        let head = Arc::clone(&flow.head);
        Member { flows: Arc::clone(self), identity, number, head }
    }

    /// Where a small file is, or is to be put by whoever finds nothing there.
    pub(super) fn small(&self, view: u64, identity: Fingerprint) -> Slot {
        let state = &mut *self.state();
        let (slot, number) = match state.smalls.get_mut(&identity) {
            Some(small) => {
                note(&mut small.taken, view);
                (Arc::clone(&small.slot), small.number)
            }
            None => {
                let slot = Slot::default();
                let number = state.keep(identity, Kept::Small, small_cost(identity));
                state.smalls.insert(identity, Small { slot: Arc::clone(&slot), number, taken: vec![view] });
                (slot, number)
            }
        };
        if state.smalls.get(&identity).is_none_or(|small| all_in(&state.views, &small.taken)) {
            state.drop_kept(number);
        }
        state.shrink(self.kept_max);
        slot
    }

    pub(super) fn digest(&self, identity: Fingerprint) -> Option<Digest> {
        self.state().digests.get(&identity).map(|known| known.digest)
    }

    /// A file was read as a whole.
    pub(super) fn learn(&self, identity: Fingerprint, digest: Digest) {
        self.state().learn(identity, digest);
    }

    /// Whether just this is in the cache on the disk already.
    pub(super) fn is_stored(&self, identity: Fingerprint, digest: Digest) -> bool {
        self.state().digests.get(&identity).is_some_and(|known| known.stored && known.digest == digest)
    }

    pub(super) fn stored(&self, identity: Fingerprint, digest: Digest) {
        let mut state = self.state();
        state.learn(identity, digest);
        if let Some(known) = state.digests.get_mut(&identity) {
            *known = Known { digest, stored: true };
        }
    }

    #[cfg(test)]
    pub(super) fn kept_bytes(&self) -> usize {
        self.state().kept_bytes
    }
}

impl State {
    fn number(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    fn learn(&mut self, identity: Fingerprint, digest: Digest) {
        let State { digests, learnt, .. } = self;
        digests.entry(identity).or_insert_with(|| {
            learnt.push_back(identity);
            Known { digest, stored: false }
        });
        while learnt.len() > DIGESTS_MAX
            && let Some(oldest) = learnt.pop_front()
        {
            digests.remove(&oldest);
        }
    }

    fn keep(&mut self, identity: Fingerprint, what: Kept, cost: usize) -> u64 {
        let number = self.number();
        self.order.insert(number, (identity, what));
        self.kept_bytes += cost;
        number
    }

    fn drop_kept(&mut self, number: u64) {
        let Some((identity, what)) = self.order.remove(&number) else { return };
        match what {
            Kept::Small => {
                self.smalls.remove(&identity);
                self.kept_bytes -= small_cost(identity);
            }
            Kept::Piece(offset) => {
                let Some(flow) = self.flows.get_mut(&identity) else { return };
                if let Some((_, piece)) = flow.pieces.remove(&offset) {
                    self.kept_bytes -= cost(&piece);
                }
                if flow.pieces.is_empty() && flow.members.is_empty() {
                    self.flows.remove(&identity);
                }
            }
        }
    }

    /// Drops the oldest until no more is kept than may be.
    fn shrink(&mut self, most: usize) {
        while self.kept_bytes > most
            && let Some((&oldest, _)) = self.order.first_key_value()
        {
            self.drop_kept(oldest);
        }
    }

    /// Drops the pieces of a file that everybody has passed, and all of it where nobody is left.
    fn prune(&mut self, identity: Fingerprint) {
        let Some(flow) = self.flows.get(&identity) else { return };
        if all_in(&self.views, &flow.joined) {
            let passed = flow.members.values().copied().min().unwrap_or(u64::MAX);
            let old = flow.pieces.iter().take_while(|(offset, (_, piece))| *offset + piece.length() <= passed);
            let old: Vec<u64> = old.map(|(_, (number, _))| *number).collect();
            old.into_iter().for_each(|number| self.drop_kept(number));
        }
        if self.flows.get(&identity).is_some_and(|flow| flow.members.is_empty() && flow.pieces.is_empty()) {
            self.flows.remove(&identity);
        }
    }
}

impl Flow {
    /// How far all but this one are.
    fn others(&self, number: u64) -> impl Iterator<Item = u64> {
        self.members.iter().filter(move |(other, _)| **other != number).map(|(_, at)| *at)
    }
}

impl Member {
    /// What there is at `offset`.
    pub(super) fn look(&self, offset: u64) -> Look {
        let mut state = self.flows.state();
        let Some(flow) = state.flows.get_mut(&self.identity) else { return Look::Spoilt };
        if flow.spoilt {
            return Look::Spoilt;
        }
        if offset >= self.identity.size {
            return flow.digest.map_or(Look::Ahead, Look::End);
        }
        if offset >= flow.hashed {
            return Look::Ahead;
        }
        if let Some((_, piece)) = flow.pieces.get_mut(&offset) {
            return Look::Piece(piece.share());
        }
        // Not into what is kept: from there on it is had without reading.
        let within = flow.pieces.range(..offset).next_back().map(|(start, (_, piece))| start + piece.length());
        let next = flow.pieces.range(offset..).next().map(|(start, _)| *start);
        let end = within.filter(|&end| end > offset).or(next).unwrap_or(flow.hashed);
        Look::Behind(end.min(flow.hashed) - offset)
    }

    /// Everything before `offset` is done with.
    pub(super) fn advance(&self, offset: u64) {
        let mut state = self.flows.state();
        if let Some(at) = state.flows.get_mut(&self.identity).and_then(|flow| flow.members.get_mut(&self.number)) {
            *at = offset;
        }
        state.prune(self.identity);
    }

    /// Keeps a piece for others who will want it. Gives the one that is kept, so that all send the same.
    fn keep(&self, offset: u64, mut piece: Piece, wanted: impl Fn(&State, &Flow) -> bool) -> Piece {
        let state = &mut *self.flows.state();
        let Some(flow) = state.flows.get_mut(&self.identity) else { return piece };
        // RACE: another who is as far behind has read the same meanwhile.
        if let Some((_, kept)) = flow.pieces.get_mut(&offset) {
            return if kept.length() == piece.length() { kept.share() } else { piece };
        }
        if state.flows.get(&self.identity).is_none_or(|flow| !wanted(state, flow)) {
            return piece;
        }
        let shared = piece.share();
        let number = state.keep(self.identity, Kept::Piece(offset), cost(&piece));
        if let Some(flow) = state.flows.get_mut(&self.identity) {
            flow.pieces.insert(offset, (number, piece));
        }
        state.shrink(self.flows.kept_max);
        shared
    }

    /// Keeps what was read where others have passed already: for those who come close behind, since it is not worth what is
    /// kept further ahead.
    pub(super) fn keep_behind(&self, offset: u64, piece: Piece) -> Piece {
        let near = (self.flows.kept_max / 4) as u64;
        self.keep(offset, piece, |_, flow| flow.others(self.number).any(|at| at <= offset && offset - at <= near))
    }

    /// Keeps what nobody has read before: for those who come behind, and for runs that have not begun with the file.
    fn keep_ahead(&self, offset: u64, piece: Piece) -> Piece {
        self.keep(offset, piece, |state, flow| {
            !all_in(&state.views, &flow.joined) || flow.others(self.number).any(|at| at <= offset)
        })
    }

    /// Reads and hashes the next piece of the file, which nobody has been at; `wanted` is where the caller is. Gives the piece
    /// where it is that one.
    pub(super) fn step(&self, opened: &mut Opened, wanted: u64) -> io::Result<Option<Piece>> {
        let Ok(mut head) = self.head.lock() else {
            // Somebody ended in the middle of a step, by a defect of ours.
            self.spoil();
            return Ok(None);
        };
        let offset = head.at;
        // RACE: somebody else has taken the step while this one waited for the lock.
        if offset >= self.identity.size || (offset > wanted) {
            return Ok(None);
        }
        let most = if wanted > offset { wanted - offset } else { u64::MAX };
        let Some(piece) = opened.piece(offset, most)? else {
            self.spoil();
            return Ok(None);
        };
        piece.hash(&mut head.hash);
        head.at += piece.length();
        let piece = self.keep_ahead(offset, piece);
        let mut digest = None;
        if head.at >= self.identity.size {
            let unchanged = opened.is_unchanged();
            if !matches!(unchanged, Ok(true)) {
                self.spoil();
                return unchanged.map(|_| None);
            }
            digest = Some(Digest(std::mem::take(&mut head.hash).finalize().into()));
        }
        self.hashed(head.at, digest);
        Ok((offset == wanted).then_some(piece))
    }

    fn hashed(&self, to: u64, digest: Option<Digest>) {
        let mut state = self.flows.state();
        if let Some(flow) = state.flows.get_mut(&self.identity) {
            (flow.hashed, flow.digest) = (to, digest);
        }
        if let Some(digest) = digest {
            state.learn(self.identity, digest);
        }
    }

    /// The file changed: nobody may send what was read of it.
    pub(super) fn spoil(&self) {
        if let Some(flow) = self.flows.state().flows.get_mut(&self.identity) {
            flow.spoilt = true;
        }
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        let mut state = self.flows.state();
        if let Some(flow) = state.flows.get_mut(&self.identity) {
            flow.members.remove(&self.number);
        }
        state.prune(self.identity);
    }
}
