//! Proves what the other end holds: the SHA-256 of files that lie there, by a command or by reading them back.

use std::collections::HashMap;
use std::sync::Arc;

use crossbeam_channel::{Sender, unbounded};
use sha2::{Digest as _, Sha256};

use super::Verify;
use super::read::{Piece, ReadQueue, Wanted};
use super::session::Session;
use super::shell::Shell;
use crate::endpoint::Error;
use crate::endpoint::link::Remote;
use crate::manifest::Digest;

/// A file at the other end.
#[derive(Debug)]
pub(super) struct Unproven {
    /// Comes back with the digest.
    pub(super) id: u64,
    pub(super) path: Vec<u8>,
    pub(super) size: u64,
}

/// Digests by `id`, or why there is none.
pub(super) type Proven = Vec<(u64, Result<Digest, String>)>;
/// What becomes of a batch.
pub(super) type Answer = Result<Proven, Error>;

struct Batch {
    files: Vec<Unproven>,
    answer: Sender<Answer>,
}

/// A thread that hashes batches of files, while its users go on sending.
pub(super) struct Prover {
    batches: Sender<Batch>,
}

impl Prover {
    /// Starts it; its command is started with the first batch.
    ///
    /// # Errors
    /// When there is no thread.
    pub(super) fn start(remote: Arc<dyn Remote>, session: Arc<Session>, verify: Verify) -> Result<Prover, Error> {
        let (batches, waiting) = unbounded::<Batch>();
        let host = session.client.host().to_owned();
        std::thread::Builder::new()
            .name("prove".to_owned())
            .spawn(move || {
                let mut shell: Option<Option<Shell>> = (verify == Verify::ReadBack).then_some(None);
                for Batch { files, answer } in waiting {
                    let shell = shell.get_or_insert_with(|| Shell::start(&*remote).ok());
                    // Whoever asked may have gone.
                    let _ = answer.send(prove(shell, &session, files));
                }
            })
            .map_err(|source| Error::Io { operation: "start a thread for", path: host, source })?;
        Ok(Prover { batches })
    }

    /// Has files hashed; what is found is sent to `answer` as one message.
    pub(super) fn submit(&self, files: Vec<Unproven>, answer: &Sender<Answer>) {
        // The thread ends after its last user.
        let _ = self.batches.send(Batch { files, answer: answer.clone() });
    }
}

/// Hashes by the command first, and reads back what it could not hash.
fn prove(shell: &mut Option<Shell>, session: &Arc<Session>, files: Vec<Unproven>) -> Result<Proven, Error> {
    let mut proven = Proven::with_capacity(files.len());
    let mut left = Vec::new();
    let paths: Vec<&[u8]> = files.iter().map(|file| &*file.path).collect();
    match shell.as_mut().map(|shell| shell.hash(&paths)) {
        Some(Ok(digests)) => {
            for (file, digest) in files.into_iter().zip(digests) {
                match digest {
                    Some(digest) => proven.push((file.id, Ok(digest))),
                    None => left.push(file),
                }
            }
        }
        found => {
            if found.is_some() {
                // A command that ended is not started again.
                *shell = None;
            }
            left = files;
        }
    }
    proven.extend(read_back(session, left)?);
    Ok(proven)
}

/// Reads files and hashes them here.
///
/// # Errors
/// When the connection ends.
pub(super) fn read_back(session: &Arc<Session>, files: Vec<Unproven>) -> Result<Proven, Error> {
    let mut queue = ReadQueue::new(Arc::clone(session));
    let mut hashes: HashMap<u64, (Sha256, u64)> = HashMap::new();
    for Unproven { id, path, size } in files {
        hashes.insert(id, (Sha256::new(), size));
        queue.push(Wanted { id, path, from: 0, size });
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
                    _ => Ok(Digest(hash.finalize().into())),
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
