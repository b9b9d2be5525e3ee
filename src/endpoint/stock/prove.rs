//! Proves what the other end holds: the SHA-256 of files that lie there, by a command or by reading them back.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use crossbeam_channel::{Sender, unbounded};
use sha2::{Digest as _, Sha256};

use super::read::{Piece, ReadQueue, Wanted};
use super::session::Session;
use super::shell::{Job, Shell, Spare};
use super::target::{Permissions, locked};
use super::{BORN_MODE, Lanes, Verify};
use crate::endpoint::Error;
use crate::endpoint::spread::Spread;
use crate::manifest::Digest;

/// A file at the other end.
#[derive(Debug)]
pub(super) struct Unproven {
    /// Comes back with the digest.
    pub(super) id: u64,
    pub(super) path: Vec<u8>,
    pub(super) size: u64,
    /// What its owner and mode are to be when this is its digest, where a command can give them.
    pub(super) grant: Option<(Digest, Permissions)>,
}

/// What a file was found to be.
#[derive(Debug, Clone, Copy)]
pub(super) struct Found {
    pub(super) digest: Digest,
    /// It has the owner and mode that it was to have.
    pub(super) granted: bool,
}

/// What was found by `id`, or why nothing was.
pub(super) type Proven = Vec<(u64, Result<Found, String>)>;
/// What becomes of a batch.
pub(super) type Answer = Result<Proven, Error>;
/// The command that does what is asked for once in a while; whoever finds it idle may use it.
pub(super) type SharedShell = Arc<Mutex<Spare>>;

struct Batch {
    files: Vec<Unproven>,
    answer: Sender<Answer>,
}

/// A thread that hashes batches of files, while its users go on sending.
struct Prover {
    batches: Sender<Batch>,
    /// Batches that are not done.
    waiting: Arc<AtomicUsize>,
}

/// Several of them. The first uses the run's own command; the others start one each, with their first batch.
#[derive(Default)]
pub(super) struct Provers {
    provers: Vec<Prover>,
    shared: SharedShell,
}

impl Provers {
    /// Starts `count` threads.
    ///
    /// # Errors
    /// When there is no thread.
    pub(super) fn start(
        lanes: &Arc<Lanes>,
        shared: &SharedShell,
        verify: Verify,
        count: usize,
    ) -> Result<Provers, Error> {
        let provers = (0..count).map(|number| Prover::start(number, Arc::clone(lanes), Arc::clone(shared), verify));
        Ok(Provers { provers: provers.collect::<Result<_, _>>()?, shared: Arc::clone(shared) })
    }

    /// A dry run starts no threads.
    pub(super) fn is_empty(&self) -> bool {
        self.provers.is_empty()
    }

    /// Has files hashed by whoever has the least to do; what is found is sent to `answer` as one message.
    pub(super) fn submit(&self, files: Vec<Unproven>, answer: &Sender<Answer>) {
        let shared_is_idle = self.shared.try_lock().is_ok();
        let waiting = |(number, prover): &(usize, &Prover)| {
            let waiting = prover.waiting.load(Ordering::Relaxed);
            // The run's own command may follow a large file for a long time.
            if *number == 0 && !shared_is_idle { waiting + 2 } else { waiting }
        };
        if let Some((_, prover)) = self.provers.iter().enumerate().min_by_key(waiting) {
            prover.waiting.fetch_add(1, Ordering::Relaxed);
            // The thread ends after its last user.
            let _ = prover.batches.send(Batch { files, answer: answer.clone() });
        }
    }
}

impl Prover {
    fn start(number: usize, lanes: Arc<Lanes>, shared: SharedShell, verify: Verify) -> Result<Prover, Error> {
        let (batches, received) = unbounded::<Batch>();
        let waiting = Arc::new(AtomicUsize::new(0));
        let done = Arc::clone(&waiting);
        let host = lanes.control().client.host().to_owned();
        std::thread::Builder::new()
            .name("prove".to_owned())
            .spawn(move || {
                let mut own = match verify {
                    Verify::ReadBack => Spare::default(),
                    _ => Spare::new(None, Arc::clone(&lanes.remote), lanes.nearest(number)),
                };
                for Batch { files, answer } in received {
                    let spread = || lanes.spread(number);
                    let proven = if number == 0 {
                        prove(&mut locked(&shared), &spread, files)
                    } else {
                        prove(&mut own, &spread, files)
                    };
                    done.fetch_sub(1, Ordering::Relaxed);
                    // Whoever asked may have gone.
                    let _ = answer.send(proven);
                }
            })
            .map_err(|source| Error::Io { operation: "start a thread for", path: host, source })?;
        Ok(Prover { batches, waiting })
    }
}

/// Hashes by the command first, and reads back over `spread` what it could not hash.
///
/// # Errors
/// When the connection ends.
pub(super) fn prove(
    shell: &mut Spare,
    spread: &dyn Fn() -> Spread<Session>,
    files: Vec<Unproven>,
) -> Result<Proven, Error> {
    let paths: Vec<&[u8]> = files.iter().map(|file| &*file.path).collect();
    let digests = match shell.running().map(|shell| shell.hash(&paths)) {
        Some(Ok(digests)) => digests,
        Some(Err(_)) => {
            shell.lose();
            Vec::new()
        }
        None => Vec::new(),
    };
    let mut by_id: HashMap<u64, Found> = HashMap::new();
    for (file, digest) in files.iter().zip(digests) {
        by_id.extend(digest.map(|digest| (file.id, Found { digest, granted: false })));
    }
    if !by_id.is_empty()
        && let Some(shell) = shell.running()
    {
        grant(shell, &files, &mut by_id);
    }
    let mut proven = Proven::with_capacity(files.len());
    let mut left = Vec::new();
    for file in files {
        match by_id.remove(&file.id) {
            Some(found) => proven.push((file.id, Ok(found))),
            None => left.push(file),
        }
    }
    if !left.is_empty() {
        proven.extend(read_back(spread(), left)?);
    }
    Ok(proven)
}

/// Mode, owner and group.
type Wish = (u32, Option<u32>, Option<u32>);

/// Gives owner and mode to those that are what was sent. What cannot be given here is given, or refused with a reason,
/// file by file over SFTP.
fn grant(shell: &mut Shell, files: &[Unproven], found: &mut HashMap<u64, Found>) {
    let mut wishes: BTreeMap<Wish, Vec<&Unproven>> = BTreeMap::new();
    for file in files {
        if let Some((announced, wanted)) = &file.grant
            && found.get(&file.id).is_some_and(|found| found.digest == *announced)
        {
            wishes.entry((wanted.mode, wanted.uid, wanted.gid)).or_default().push(file);
        }
    }
    // The owner first: to change it takes special bits away, and the right to set a mode may go with it.
    let wishes: Vec<(Wish, Vec<&Unproven>)> = wishes.into_iter().collect();
    let owned = wishes.iter().map(
        |((_, uid, gid), _)| {
            if uid.is_none() && gid.is_none() { None } else { Some(Job::Owner(*uid, *gid)) }
        },
    );
    let owned = all(shell, &wishes, owned);
    let modes = wishes.iter().zip(&owned).map(
        |(((mode, ..), _), owned)| {
            if *owned && *mode != BORN_MODE { Some(Job::Mode(*mode)) } else { None }
        },
    );
    let given = all(shell, &wishes, modes);
    for ((_, files), _) in wishes.iter().zip(owned.iter().zip(given)).filter(|(_, (owned, given))| **owned && *given) {
        for file in files {
            if let Some(found) = found.get_mut(&file.id) {
                found.granted = true;
            }
        }
    }
}

/// Has one job done for the files of each wish, none of which waits for another; those that need none have it done.
fn all(shell: &mut Shell, wishes: &[(Wish, Vec<&Unproven>)], jobs: impl Iterator<Item = Option<Job>>) -> Vec<bool> {
    let jobs: Vec<Option<Job>> = jobs.collect();
    let due = wishes.iter().zip(&jobs).filter_map(|((_, files), job)| {
        let paths: Vec<&[u8]> = files.iter().map(|file| &*file.path).collect();
        Some(((*job)?, paths))
    });
    let due: Vec<(Job, Vec<&[u8]>)> = due.collect();
    let mut done = shell.run_all(&due).into_iter();
    jobs.iter().map(|job| job.is_none() || done.next().unwrap_or(false)).collect()
}

/// Reads files and hashes them here.
///
/// # Errors
/// When the connection ends.
fn read_back(spread: Spread<Session>, files: Vec<Unproven>) -> Result<Proven, Error> {
    let mut queue = ReadQueue::new(spread);
    let mut hashes: HashMap<u64, (Sha256, u64)> = HashMap::new();
    for Unproven { id, path, size, .. } in files {
        hashes.insert(id, (Sha256::new(), size));
        // What is found is compared with what was sent: of two files mixed it would not be that.
        queue.push(Wanted { id, path, from: 0, size, alone: true });
    }
    let mut proven = Proven::new();
    while let Some(piece) = queue.next()? {
        match piece {
            Piece::Data { id, data, .. } => {
                if let Some((hash, _)) = hashes.get_mut(&id) {
                    hash.update(&data);
                }
            }
            Piece::End { id, after, .. } => {
                let Some((hash, size)) = hashes.remove(&id) else { continue };
                let found = match after.size {
                    Some(now) if now != size => Err(format!("{now} bytes lie at the other end, {size} were sent")),
                    _ => Ok(Found { digest: Digest(hash.finalize().into()), granted: false }),
                };
                proven.push((id, found));
            }
            Piece::Failed { id, why } => {
                let reason =
                    why.map_or_else(|refusal| refusal.text, |()| "it is shorter than what was sent".to_owned());
                proven.push((id, Err(format!("it could not be read back: {reason}"))));
            }
        }
    }
    Ok(proven)
}
