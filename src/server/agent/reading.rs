//! One worker of a source: streams of a client onto readers. Each `next` is answered with what comes next, bundled.

use std::collections::HashMap;
use std::sync::{Arc, OnceLock};

use crossbeam_channel::Receiver;

use super::{Failure, Job, Veil};
use crate::codec::{Chooser, Coding, CompressOptions, Place};
use crate::endpoint::{BLOCK_BYTES, Error, Fetch, Produced, Reader, Source};
use crate::manifest::{Digest, Tree};
use crate::wire::extension::{FETCH_MAX, Fields, TAKES_PLANES, WireError, put_coded, put_string};

/// At most this many streams a worker.
const STREAMS: usize = 32;

/// So many digests are remembered at once.
const REMEMBERED: usize = 16_384;

/// What stands in front of the data of a piece: kind, index, offset and length.
const DATA_HEAD: u64 = 1 + 4 + 8 + 4;

/// One stream of a client.
struct Stream<'a> {
    reader: Box<dyn Reader + 'a>,
    /// Files that were fetched and are not produced yet.
    waiting: usize,
    /// For a client that reads byte planes.
    chooser: Chooser,
}

pub(super) fn serve(source: &(dyn Source + Send + Sync), tree: &OnceLock<Arc<Tree>>, jobs: &Receiver<Job>) {
    let Some(tree) = tree.get() else { return };
    let mut streams: HashMap<u32, Stream<'_>> = HashMap::new();
    let mut learned = HashMap::new();
    let remember = |learned: &mut HashMap<u32, Digest>| {
        source.remember(tree, &std::mem::take(learned).into_iter().collect::<Vec<_>>());
    };
    for job in jobs {
        match answer(source, tree, &mut streams, &mut learned, &job) {
            Ok(body) => job.reply(&body),
            Err(failure) => job.refuse(&failure),
        }
        if learned.len() >= REMEMBERED {
            remember(&mut learned);
        }
    }
    remember(&mut learned);
}

fn answer<'a>(
    source: &'a (dyn Source + Send + Sync),
    tree: &Arc<Tree>,
    streams: &mut HashMap<u32, Stream<'a>>,
    learned: &mut HashMap<u32, Digest>,
    job: &Job,
) -> Result<Vec<u8>, Failure> {
    if job.output.is_gone() {
        return Err(Failure::gone());
    }
    let mut fields = Fields(job.payload.bytes());
    let stream = fields.u32()?;
    if !matches!(job.name, "fetch" | "next") {
        return Err(Failure::order("this run is a pull"));
    }
    if !streams.contains_key(&stream) {
        if streams.len() >= STREAMS {
            return Err(WireError::Range("the number of streams").into());
        }
        let (reader, chooser) = (source.reader(Arc::clone(tree))?, Chooser::new(CompressOptions::default(), true));
        streams.insert(stream, Stream { reader, waiting: 0, chooser });
    }
    let Some(stream) = streams.get_mut(&stream) else { return Err(Failure::order("no stream")) };
    if job.name == "fetch" {
        let count = fields.u32()? as usize;
        if count > FETCH_MAX - stream.waiting {
            return Err(WireError::Range("the number of files").into());
        }
        let mut fetches = Vec::with_capacity(count);
        for _ in 0..count {
            let (index, from) = (fields.u32()?, fields.u64()?);
            let unless = if fields.u8()? == 0 { None } else { Some(fields.digest()?) };
            let size = tree.entries().get(index as usize).and_then(|entry| entry.file()).map(|file| file.0);
            if size.is_none_or(|size| from > size) {
                return Err(WireError::Range("the index of a file, or the offset").into());
            }
            fetches.push(Fetch { from, unless, ..Fetch::of(index) });
        }
        fields.end()?;
        stream.waiting += count;
        fetches.into_iter().for_each(|fetch| stream.reader.push(fetch));
        return Ok(Vec::new());
    }
    let asked = fields.u8()?;
    let level = i32::from((asked & !TAKES_PLANES).min(19));
    let raw = bundle(stream, learned, &job.veil)?;
    let coding = match (level, asked & TAKES_PLANES) {
        (0, _) => None,
        (_, 0) => Some(Coding::Zstd(level)),
        _ => stream.chooser.smallest(place(&raw), &raw, level).map(|(coding, _)| coding),
    };
    let mut body = Vec::new();
    put_coded(&mut body, &raw, coding);
    Ok(body)
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

fn bundle(stream: &mut Stream<'_>, learned: &mut HashMap<u32, Digest>, veil: &Veil) -> Result<Vec<u8>, Error> {
    let mut raw = Vec::with_capacity(BLOCK_BYTES + 4096);
    while raw.len() < BLOCK_BYTES / 2 {
        let Some(produced) = stream.reader.next()? else { break };
        if !matches!(produced, Produced::Data { .. } | Produced::Hole { .. }) {
            stream.waiting = stream.waiting.saturating_sub(1);
        }
        let mut head = |kind: u8, index: u32| {
            raw.push(kind);
            raw.extend_from_slice(&index.to_be_bytes());
        };
        match produced {
            Produced::Whole { index, block, digest } => {
                head(0, index);
                raw.extend_from_slice(&digest.0);
                put_string(&mut raw, block.data());
                learned.insert(index, digest);
            }
            Produced::Data { index, offset, block } => {
                head(1, index);
                raw.extend_from_slice(&offset.to_be_bytes());
                put_string(&mut raw, block.data());
            }
            Produced::Hole { index, offset, length } => {
                head(2, index);
                raw.extend_from_slice(&offset.to_be_bytes());
                raw.extend_from_slice(&length.to_be_bytes());
            }
            Produced::End { index, digest } => {
                head(3, index);
                raw.extend_from_slice(&digest.0);
                learned.insert(index, digest);
            }
            Produced::Same { index, digest } => {
                head(4, index);
                raw.extend_from_slice(&digest.0);
                learned.insert(index, digest);
            }
            Produced::Failed { index, message, retry } => {
                head(5, index);
                raw.push(u8::from(retry));
                put_string(&mut raw, veil.cover(&message).as_bytes());
            }
        }
    }
    Ok(raw)
}
