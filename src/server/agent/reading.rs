//! One worker of a source: streams of a client onto readers. Each `next` is answered with what comes next, bundled.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use crossbeam_channel::Receiver;

use super::comparing::Comparing;
use super::{Failure, Job, Run};
use crate::codec::{Chooser, Coding, CompressOptions, Place};
use crate::endpoint::{BLOCK_BYTES, Fetch, Produced, Reader, Source};
use crate::manifest::{Digest, Tree};
use crate::sync::delta::{Delta, Piece};
use crate::wire::extension::{
    AHEAD_NEXT_MAX, COMPARES, FETCH_MAX, Fields, HAS_DIGEST, TAKES_PLANES, WireError, put_coded, put_string,
};

/// At most this many streams a worker.
const STREAMS: usize = 32;

/// So many digests are remembered at once.
const REMEMBERED: usize = 16_384;

/// So much of a file is said in one answer, at most, once that says anything.
const COVERED_MAX: u64 = 64 << 20;

/// What stands in front of the data of a piece: kind, index, offset and length.
const DATA_HEAD: u64 = 1 + 4 + 8 + 4;

/// One stream of a client.
struct Stream<'a> {
    reader: Box<dyn Reader + 'a>,
    /// Files that were fetched and are not produced yet.
    waiting: usize,
    /// For a client that reads byte planes.
    chooser: Chooser,
    /// Of what is read what the client has already is found out, by the index of the file.
    deltas: HashMap<u32, Delta>,
    /// What was made of that, and is not sent yet.
    pieces: VecDeque<(u32, Piece)>,
    /// The end of the file that they are of.
    ended: Option<Produced>,
    /// The number of the `next` whose turn it is, and those that came before theirs.
    turn: u64,
    early: BTreeMap<u64, Job>,
}

/// One worker with its streams.
struct Worker<'a> {
    source: &'a (dyn Source + Send + Sync),
    tree: &'a Arc<Tree>,
    comparing: &'a Arc<Comparing>,
    streams: HashMap<u32, Stream<'a>>,
    /// Digests that the source is yet to be told.
    learned: HashMap<u32, Digest>,
}

pub(super) fn serve(run: &Run, source: &(dyn Source + Send + Sync), jobs: &Receiver<Job>) {
    let Some(tree) = run.tree.get() else { return };
    let comparing = &run.comparing;
    let mut worker = Worker { source, tree, comparing, streams: HashMap::new(), learned: HashMap::new() };
    for job in jobs {
        run.queued.fetch_sub(job.queued_bytes(), Ordering::Relaxed);
        if let Some(job) = worker.in_turn(job) {
            worker.handle(&job);
        }
        if worker.learned.len() >= REMEMBERED {
            worker.remember();
        }
    }
    worker.remember();
    for job in worker.streams.into_values().flat_map(|stream| stream.early.into_values()) {
        job.refuse(&Failure::order("what stands before it was not asked for"));
    }
}

/// The stream that a request is about, and its number where it has one.
fn turn_of(job: &Job) -> Option<(u32, u64)> {
    let mut fields = Fields(job.payload.bytes());
    let (stream, _, number) = (fields.u32().ok()?, fields.u8().ok()?, fields.u64().ok()?);
    // What has more is refused at once, and takes no room until its turn.
    fields.end().ok().filter(|()| job.name == "next").map(|()| (stream, number))
}

impl<'a> Worker<'a> {
    fn remember(&mut self) {
        self.source.remember(self.tree, &std::mem::take(&mut self.learned).into_iter().collect::<Vec<_>>());
    }

    /// Keeps what came before its turn; else gives it back.
    fn in_turn(&mut self, job: Job) -> Option<Job> {
        let Some((stream, number)) = turn_of(&job) else { return Some(job) };
        let Some(stream) = self.streams.get_mut(&stream).filter(|stream| number > stream.turn) else {
            return Some(job);
        };
        if stream.early.len() >= AHEAD_NEXT_MAX || stream.early.contains_key(&number) {
            job.refuse(&WireError::Range("the number of a request").into());
        } else {
            stream.early.insert(number, job);
        }
        None
    }

    /// Answers a request, and those whose turn it is then.
    fn handle(&mut self, job: &Job) {
        self.reply(job);
        let Some((number, _)) = turn_of(job) else { return };
        while let Some(stream) = self.streams.get_mut(&number)
            && let Some(job) = stream.early.remove(&stream.turn)
        {
            self.reply(&job);
        }
    }

    fn reply(&mut self, job: &Job) {
        match self.answer(job) {
            Ok(body) => job.reply(&body),
            Err(failure) => job.refuse(&failure),
        }
    }

    fn answer(&mut self, job: &Job) -> Result<Vec<u8>, Failure> {
        if job.output.is_gone() {
            return Err(Failure::gone());
        }
        let mut fields = Fields(job.payload.bytes());
        let number = fields.u32()?;
        if !matches!(job.name, "fetch" | "next") {
            return Err(Failure::order("this run is a pull"));
        }
        if !self.streams.contains_key(&number) {
            if self.streams.len() >= STREAMS {
                return Err(WireError::Range("the number of streams").into());
            }
            let reader = self.source.reader(Arc::clone(self.tree))?;
            let chooser = Chooser::new(CompressOptions::default(), true);
            let (deltas, pieces, early) = (HashMap::new(), VecDeque::new(), BTreeMap::new());
            self.streams
                .insert(number, Stream { reader, waiting: 0, chooser, deltas, pieces, ended: None, turn: 0, early });
        }
        let Some(stream) = self.streams.get_mut(&number) else { return Err(Failure::order("no stream")) };
        if job.name == "fetch" {
            let count = fields.u32()? as usize;
            if count > FETCH_MAX - stream.waiting {
                return Err(WireError::Range("the number of files").into());
            }
            let mut fetches = Vec::with_capacity(count);
            for _ in 0..count {
                let (index, from) = (fields.u32()?, fields.u64()?);
                let flags = fields.u8()?;
                if flags & !(HAS_DIGEST | COMPARES) != 0 {
                    return Err(WireError::Range("what is said of a file").into());
                }
                let unless = if flags & HAS_DIGEST == 0 { None } else { Some(fields.digest()?) };
                let size = self.tree.entries().get(index as usize).and_then(|entry| entry.file()).map(|file| file.0);
                if size.is_none_or(|size| from > size) {
                    return Err(WireError::Range("the index of a file, or the offset").into());
                }
                fetches.push(Fetch { from, unless, compare: flags & COMPARES != 0, ..Fetch::of(index) });
            }
            fields.end()?;
            stream.waiting += count;
            for mut fetch in fetches {
                if fetch.compare
                    && let Some(matcher) = self.comparing.matcher(fetch.index, fetch.from)
                {
                    // It is read once, and compared by its parts.
                    stream.deltas.insert(fetch.index, Delta::new(matcher, fetch.unless.take()));
                }
                stream.reader.push(Fetch { compare: false, ..fetch });
            }
            return Ok(Vec::new());
        }
        let asked = fields.u8()?;
        if !fields.0.is_empty() {
            if fields.u64()? != stream.turn {
                return Err(WireError::Range("the number of a request").into());
            }
            fields.end()?;
            stream.turn += 1;
        }
        let level = i32::from((asked & !TAKES_PLANES).min(19));
        let raw = bundle(stream, &mut self.learned, job)?;
        let coding = match (level, asked & TAKES_PLANES) {
            (0, _) => None,
            (_, 0) => Some(Coding::Zstd(level)),
            _ => stream.chooser.smallest(place(&raw), &raw, level).map(|(coding, _)| coding),
        };
        let mut body = Vec::new();
        put_coded(&mut body, &raw, coding);
        Ok(body)
    }
}

/// Where a bundle lies, as if the data that it begins with went on to the front; what begins with other pieces lies nowhere.
fn place(raw: &[u8]) -> Place<'static> {
    let mut fields = Fields(raw);
    let begun = (|| Ok::<_, WireError>((fields.u8()?, fields.u32()?, fields.u64()?, fields.string()?.len())))();
    match begun {
        Ok((1, file, offset, length)) if length > raw.len() / 2 => {
            Place { file, offset: offset.wrapping_sub(DATA_HEAD), once: None }
        }
        _ => Place { file: u32::MAX, offset: 0, once: None },
    }
}

/// What comes next of a stream, as far as it goes into one answer.
fn bundle(stream: &mut Stream<'_>, learned: &mut HashMap<u32, Digest>, job: &Job) -> Result<Vec<u8>, Failure> {
    let mut raw = Vec::with_capacity(BLOCK_BYTES + 4096);
    // What is copied takes little room, and time all the same.
    let mut covered = 0;
    while raw.len() < BLOCK_BYTES / 2 && (raw.is_empty() || covered < COVERED_MAX) {
        if let Some((index, piece)) = stream.pieces.pop_front() {
            covered += piece.length();
            put_piece(&mut raw, index, &piece);
            continue;
        }
        let produced = match stream.ended.take() {
            Some(ended) => ended,
            None if job.output.is_gone() => return Err(Failure::gone()),
            None => match stream.reader.next()? {
                Some(produced) => match stream.compared(produced) {
                    Some(produced) => produced,
                    None => continue,
                },
                None => break,
            },
        };
        if !matches!(produced, Produced::Data { .. } | Produced::Hole { .. } | Produced::Copy { .. }) {
            stream.waiting = stream.waiting.saturating_sub(1);
        }
        match produced {
            Produced::Whole { index, block, digest } => {
                head(&mut raw, 0, index);
                raw.extend_from_slice(&digest.0);
                put_string(&mut raw, block.data());
                learned.insert(index, digest);
            }
            Produced::Data { index, offset, block } => put_piece(&mut raw, index, &Piece::Data { offset, block }),
            Produced::Hole { index, offset, length } => put_piece(&mut raw, index, &Piece::Hole { offset, length }),
            Produced::Copy { index, offset, length, from } => {
                put_piece(&mut raw, index, &Piece::Copy { offset, length, from });
            }
            Produced::End { index, digest } => {
                head(&mut raw, 3, index);
                raw.extend_from_slice(&digest.0);
                learned.insert(index, digest);
            }
            Produced::Same { index, digest } => {
                head(&mut raw, 4, index);
                raw.extend_from_slice(&digest.0);
                learned.insert(index, digest);
            }
            Produced::Failed { index, message, retry } => {
                head(&mut raw, 5, index);
                raw.push(u8::from(retry));
                put_string(&mut raw, job.veil.cover(&message).as_bytes());
            }
        }
    }
    Ok(raw)
}

fn head(raw: &mut Vec<u8>, kind: u8, index: u32) {
    raw.push(kind);
    raw.extend_from_slice(&index.to_be_bytes());
}

fn put_piece(raw: &mut Vec<u8>, index: u32, piece: &Piece) {
    let kind = match piece {
        Piece::Data { .. } => 1,
        Piece::Hole { .. } => 2,
        Piece::Copy { .. } => 6,
    };
    head(raw, kind, index);
    let (Piece::Data { offset, .. } | Piece::Hole { offset, .. } | Piece::Copy { offset, .. }) = piece;
    raw.extend_from_slice(&offset.to_be_bytes());
    match piece {
        Piece::Data { block, .. } => put_string(raw, block.data()),
        Piece::Hole { length, .. } => raw.extend_from_slice(&length.to_be_bytes()),
        Piece::Copy { length, from, .. } => {
            raw.extend_from_slice(&length.to_be_bytes());
            raw.extend_from_slice(&from.piece.to_be_bytes());
            raw.extend_from_slice(&from.offset.to_be_bytes());
        }
    }
}

impl Stream<'_> {
    /// Holds what was read of a file against what the client has of it. What is made of that waits in `pieces`; `None` where that is all.
    fn compared(&mut self, produced: Produced) -> Option<Produced> {
        let (index, pieces) = match produced {
            Produced::Data { index, offset, block } => match self.deltas.get_mut(&index) {
                Some(delta) => (index, delta.feed(block)),
                None => return Some(Produced::Data { index, offset, block }),
            },
            Produced::Hole { index, offset, length } => match self.deltas.get_mut(&index) {
                Some(delta) => (index, delta.skip(offset, length)),
                None => return Some(Produced::Hole { index, offset, length }),
            },
            Produced::End { index, digest } => {
                let Some(delta) = self.deltas.remove(&index) else { return Some(Produced::End { index, digest }) };
                let Some(pieces) = delta.end(digest) else { return Some(Produced::Same { index, digest }) };
                self.pieces.extend(pieces.into_iter().map(|piece| (index, piece)));
                // Once those are sent.
                self.ended = Some(Produced::End { index, digest });
                return None;
            }
            Produced::Whole { index, .. } | Produced::Failed { index, .. } | Produced::Same { index, .. } => {
                self.deltas.remove(&index);
                return Some(produced);
            }
            Produced::Copy { .. } => return Some(produced),
        };
        self.pieces.extend(pieces.into_iter().map(|piece| (index, piece)));
        None
    }
}
