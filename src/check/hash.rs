//! Reads files on several threads and compares their digests.
//!
//! The kernel is told to read ahead, and that the pages will not be used again; those that were in the cache stay there.

use std::fs::File;
use std::io::{ErrorKind, Read as _};
use std::os::unix::fs::FileExt as _;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::SystemTime;

use rustix::fs::{Advice, fadvise};
use sha2::{Digest as _, Sha256};

use super::compare::Job;
use super::remember::Hashed;
use super::{CheckError, Finding, Kind, Options, Report, Sum};
use crate::manifest::Digest;
use crate::monitor::{Counters, Event, Monitor, Phase};
use crate::root::{Metadata, Root};
use crate::scan::blocks::{BLOCK_BYTES, BlockSum, BlockSums};
use crate::staging::clean_pages;

const BUFFER_BYTES: usize = 512 * 1024;
/// From here on a file is begun early, so that no thread is left alone with it at the end.
const LARGE_BYTES: u64 = 64 << 20;
/// Below, advice costs more than it brings.
const ADVISED_BYTES: u64 = 1 << 20;

enum Read {
    Digest(Digest, Option<Box<[u32]>>),
    /// The blocks that were looked at are what they were when they were hashed; so many bytes.
    Blocks(u64),
    /// The block with this number is not.
    OtherBlock(u64),
    Changed,
    Failed(String),
}

/// Reads what has to be read, adds what differs to the report, and answers what was found.
pub(super) fn run(
    root: &Root,
    options: &Options,
    jobs: &[Job],
    started: u64,
    report: &mut Report,
    monitor: &dyn Monitor,
) -> Result<Vec<Hashed>, CheckError> {
    let mut order: Vec<&Job> = jobs.iter().collect();
    // Large ones first; the others as they probably lie on the disk.
    order.sort_by_key(|job| match job.bytes() {
        size @ LARGE_BYTES.. => (0, u64::MAX - size),
        _ => (1, job.seen.inode),
    });
    let total = jobs.iter().fold(0_u64, |sum, job| sum.saturating_add(job.bytes()));
    Counters::add(&monitor.counters().total_files, jobs.len() as u64);
    Counters::add(&monitor.counters().total_bytes, total);
    monitor.event(Event::Phase(Phase::Transferring));
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let threads = if options.threads == 0 { cores } else { options.threads }.min(jobs.len());
    let (next, found) = (AtomicUsize::new(0), Mutex::new(Vec::with_capacity(jobs.len())));
    let work = || {
        if options.nice != 0 {
            // Of this thread alone. That it may not be is no reason to read nothing.
            let _ = rustix::process::nice(options.nice);
        }
        let mut buffer = vec![0; BUFFER_BYTES];
        while let Some(job) = order.get(next.fetch_add(1, Ordering::Relaxed)) {
            let looked = SystemTime::now();
            let read = read(root, job, &mut buffer, monitor);
            Counters::add(&monitor.counters().done_files, 1);
            found.lock().unwrap_or_else(PoisonError::into_inner).push((*job, read, looked));
        }
    };
    std::thread::scope(|scope| {
        let start = |_| std::thread::Builder::new().name("hash".into()).spawn_scoped(scope, work);
        let workers: Vec<_> = (0..threads).map(start).collect();
        for worker in workers {
            if let Err(panic) = worker.map_err(CheckError::Thread)?.join() {
                std::panic::resume_unwind(panic);
            }
        }
        Ok::<(), CheckError>(())
    })?;
    let found = found.into_inner().unwrap_or_else(PoisonError::into_inner);
    if monitor.stopped() || found.len() != jobs.len() {
        return Err(CheckError::Stopped);
    }
    let (mut sum, mut hashed) = (Sum::default(), Vec::with_capacity(found.len()));
    for (job, read, looked) in found {
        for (name, listed) in &job.names {
            let (kind, message) = match &read {
                Read::Digest(digest, _) => {
                    sum.files += 1;
                    if digest == listed {
                        continue;
                    }
                    (Kind::Modified, format!("its SHA-256 is {digest}, and should be {listed}"))
                }
                Read::Blocks(_) => continue,
                Read::OtherBlock(number) => {
                    let start = number * BLOCK_BYTES;
                    let end = job.seen.size.min(start + BLOCK_BYTES);
                    (Kind::Modified, format!("bytes {start} to {end} are not what they were when it was hashed"))
                }
                Read::Changed => (Kind::Changed, "changed while it was read; let who writes to it end".to_owned()),
                Read::Failed(reason) => (Kind::Unreadable, reason.clone()),
            };
            report.findings.push(Finding { path: name.as_path().to_owned(), kind, message });
        }
        match read {
            Read::Digest(digest, blocks) => {
                hashed.push(Hashed { seen: job.seen, digest, blocks, looked });
                let bytes = job.seen.size.saturating_mul(job.names.len() as u64);
                sum.bytes = sum.bytes.saturating_add(bytes);
            }
            Read::Blocks(bytes) => report.sampled.add(bytes),
            _ => {}
        }
    }
    report.hashed = sum;
    if sum.files > 0 {
        report.oldest = Some(report.oldest.map_or(started, |oldest| oldest.min(started)));
    }
    Ok(hashed)
}

fn read(root: &Root, job: &Job, buffer: &mut [u8], monitor: &dyn Monitor) -> Read {
    let mut file = match root.open_read(&job.path, job.follow) {
        Ok(file) => file,
        // RACE: it was there when the directory was listed.
        Err(error) if error.kind() == ErrorKind::NotFound => return Read::Changed,
        Err(error) => return Read::Failed(crate::error::chain(&error)),
    };
    // RACE: another file, even a FIFO, may have got the name since: nothing else is read.
    match Metadata::of(&file) {
        Ok(found) if found.same_content(&job.seen) && found.kind == job.seen.kind => {}
        Ok(_) => return Read::Changed,
        Err(error) => return Read::Failed(crate::error::in_words(&error)),
    }
    if job.blocks.is_none() {
        clean_pages(&file, &job.seen);
    }
    if job.blocks.is_none() && job.seen.size >= ADVISED_BYTES {
        // Advice: a file system that takes none is read all the same.
        let _ = fadvise(&file, 0, None, Advice::Sequential);
        let _ = fadvise(&file, 0, None, Advice::NoReuse);
    }
    let read = match &job.blocks {
        Some(blocks) => some_blocks(&file, job, blocks, buffer, monitor),
        None => whole(&mut file, job, buffer, monitor),
    };
    match Metadata::of(&file) {
        _ if matches!(read, Read::Failed(_)) => read,
        Ok(found) if found.same_content(&job.seen) => read,
        Ok(_) => Read::Changed,
        Err(error) => Read::Failed(crate::error::in_words(&error)),
    }
}

fn unreadable(error: &std::io::Error) -> Read {
    Read::Failed(format!("cannot be read: {}", crate::error::in_words(error)))
}

fn some_blocks(file: &File, job: &Job, blocks: &[(u64, u32)], buffer: &mut [u8], monitor: &dyn Monitor) -> Read {
    let mut bytes = 0;
    for &(number, sum) in blocks {
        let (mut at, end) = (number * BLOCK_BYTES, job.seen.size.min((number + 1) * BLOCK_BYTES));
        let mut block = BlockSum::default();
        while at < end {
            if monitor.stopped() {
                return Read::Failed("stopped".to_owned());
            }
            let step = usize::try_from(end - at).map_or(buffer.len(), |left| left.min(buffer.len()));
            match file.read_at(&mut buffer[..step], at) {
                Ok(0) => return Read::Changed,
                Ok(count) => {
                    block.update(&buffer[..count]);
                    at += count as u64;
                    bytes += count as u64;
                    Counters::add(&monitor.counters().done_bytes, count as u64);
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return unreadable(&error),
            }
        }
        if block.finish() != sum {
            return Read::OtherBlock(number);
        }
    }
    Read::Blocks(bytes)
}

fn whole(file: &mut File, job: &Job, buffer: &mut [u8], monitor: &dyn Monitor) -> Read {
    let mut hash = Sha256::new();
    let mut sums = BlockSums::of(job.seen.size);
    let mut length = 0_u64;
    loop {
        if monitor.stopped() {
            return Read::Failed("stopped".to_owned());
        }
        match file.read(buffer) {
            Ok(0) => break,
            Ok(count) => {
                hash.update(&buffer[..count]);
                if let Some(sums) = &mut sums {
                    sums.update(&buffer[..count]);
                }
                length = length.saturating_add(count as u64);
                // RACE: one that grows faster than it is read has no end.
                if length > job.seen.size {
                    return Read::Changed;
                }
                Counters::add(&monitor.counters().done_bytes, count as u64);
            }
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return unreadable(&error),
        }
    }
    Read::Digest(Digest(hash.finalize().into()), sums.map(BlockSums::finish))
}
