//! Sums of the blocks of the large files of a target, in `.lockstep/sums`: by them it is told where a file differs from the one that
//! replaces it, without reading what is there. And states of their hashes, so that what begins as another file is not hashed from its
//! start.
//!
//! What always holds: nothing is decided by them but where content is looked for. They are called by the SHA-256 of what they are of, so
//! that it does not matter where that lies. Where they are missing the file is read; where they are damaged more is sent.

use std::collections::HashSet;
use std::fs::File;
use std::os::unix::fs::FileExt as _;

use crate::codec::chunks::{Alike, BLOCK_LENGTH, Chunk, ChunkId, Cut};
use crate::manifest::Digest;
use crate::path::RelPath;
use crate::root::{FileKind, Follow, Metadata, Root, RootError};
use crate::scan::prefixes::STATE_BYTES;
use crate::staging::{Kept, STATE_EVERY, store_beside_manifest};

const DIRECTORY: &str = ".lockstep/sums";
const MAGIC: &[u8; 16] = b"lockstep sums 1\n";
const SUM_BYTES: usize = 4;
/// So many go into one answer: those of 4 GiB.
const SUMS_MAX: u64 = 1 << 16;

fn path(digest: Digest) -> String {
    format!("{DIRECTORY}/{digest}")
}

/// What stands before the sums.
fn head(size: u64) -> Vec<u8> {
    [&MAGIC[..], &size.to_le_bytes()].concat()
}

fn count(size: u64) -> u64 {
    size.div_ceil(BLOCK_LENGTH as u64)
}

/// Where the states begin, and how long the file is, when it is of a file of `size` bytes.
fn lengths(size: u64) -> (u64, u64) {
    let states = (MAGIC.len() + size_of::<u64>()) as u64 + count(size) * SUM_BYTES as u64;
    (states, states + size / STATE_EVERY * STATE_BYTES as u64)
}

/// The file, where it is there and of a file of `size` bytes.
fn open(root: &Root, digest: Digest, size: u64) -> Option<File> {
    let file = root.open_read(&RelPath::new(path(digest)).ok()?, Follow::Never).ok()?;
    let (head, found) = (head(size), Metadata::of(&file).ok()?);
    let mut start = vec![0; head.len()];
    file.read_exact_at(&mut start, 0).ok()?;
    (found.kind == FileKind::Regular && found.size == lengths(size).1 && start == head).then_some(file)
}

/// Whether something is kept of a file of `size` bytes.
pub(super) fn are_kept(root: &Root, digest: Digest, size: u64) -> bool {
    open(root, digest, size).is_some()
}

/// Keeps the sums of a file of `size` bytes.
pub(super) fn keep(root: &Root, digest: Digest, size: u64, kept: &Kept) -> Result<(), RootError> {
    let invalid = |error: crate::path::InvalidPath| RootError {
        operation: "name",
        path: root.shown().join(DIRECTORY),
        source: std::io::Error::other(error),
    };
    root.mkdir_all(&RelPath::new(DIRECTORY).map_err(invalid)?, 0o700)?;
    let mut bytes = head(size);
    bytes.extend(kept.sums.iter().flat_map(|sum| sum.to_le_bytes()));
    bytes.extend_from_slice(kept.states.as_flattened());
    let (name, new) = (path(digest), format!("{}.new", path(digest)));
    store_beside_manifest(root, &name, &new, &bytes)
}

/// The blocks of a file of `size` bytes from `from` on, which is where one begins, as many as go into an answer; `None` where its sums are
/// not known.
pub(super) fn load(root: &Root, digest: Digest, size: u64, from: u64) -> Option<Alike> {
    let file = open(root, digest, size)?;
    let first = from / BLOCK_LENGTH as u64;
    let sums = read_sums(&file, size, first, count(size).saturating_sub(first).min(SUMS_MAX))?;
    let mut at = from;
    let of = |sum| {
        let length = (size - at).min(BLOCK_LENGTH as u64);
        at += length;
        Chunk { id: ChunkId::Sum(sum), length: length as u32 }
    };
    let chunks = sums.into_iter().map(of).collect();
    Some(Alike { cut: Cut::BySum, chunks, next: (at < size).then_some(at), ..Alike::default() })
}

/// All that is kept of a file of `size` bytes.
pub(super) fn load_all(root: &Root, digest: Digest, size: u64) -> Option<Kept> {
    let file = open(root, digest, size)?;
    let (start, end) = lengths(size);
    let mut states = vec![[0; STATE_BYTES]; usize::try_from((end - start) / STATE_BYTES as u64).ok()?];
    file.read_exact_at(states.as_flattened_mut(), start).ok()?;
    Some(Kept { sums: read_sums(&file, size, 0, count(size))?, states })
}

fn read_sums(file: &File, size: u64, first: u64, count: u64) -> Option<Vec<u32>> {
    let mut sums = vec![[0; SUM_BYTES]; usize::try_from(count).ok()?];
    file.read_exact_at(sums.as_flattened_mut(), head(size).len() as u64 + first * SUM_BYTES as u64).ok()?;
    Some(sums.into_iter().map(u32::from_le_bytes).collect())
}

/// Forgets what is of none of these.
pub(super) fn keep_only(root: &Root, known: &HashSet<Digest>) {
    let Ok(directory) = RelPath::new(DIRECTORY) else { return };
    for name in root.names(Some(&directory), Follow::Never).unwrap_or_default() {
        let digest = Digest::from_hex(&name);
        if digest.is_none_or(|digest| !known.contains(&digest))
            && let Ok(path) = RelPath::new([DIRECTORY.as_bytes(), b"/", &name].concat())
        {
            // What stays is looked at again by the next run.
            let _ = root.remove_tree(&path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DIGEST: Digest = Digest([7; 32]);
    const SIZE: u64 = 2 * BLOCK_LENGTH as u64 + 5;

    fn of(sums: Vec<u32>) -> Kept {
        let count = sums.len() as u64 * BLOCK_LENGTH as u64 / STATE_EVERY;
        Kept { sums, states: (0..count).map(|at| [at as u8; STATE_BYTES]).collect() }
    }

    fn area() -> (tempfile::TempDir, Root) {
        let at = tempfile::tempdir().unwrap();
        let root = Root::open(at.path()).unwrap();
        keep(&root, DIGEST, SIZE, &of(vec![1, 2, 3])).unwrap();
        (at, root)
    }

    #[test]
    fn sums_are_read_back_from_where_was_asked() {
        let (_at, root) = area();
        let all = load(&root, DIGEST, SIZE, 0).unwrap();
        let lengths: Vec<u32> = all.chunks.iter().map(|chunk| chunk.length).collect();
        assert_eq!((lengths, all.next), (vec![BLOCK_LENGTH as u32, BLOCK_LENGTH as u32, 5], None));
        assert_eq!((all.cut, all.chunks[1].id), (Cut::BySum, ChunkId::Sum(2)));
        assert_eq!(load(&root, DIGEST, SIZE, BLOCK_LENGTH as u64).unwrap().chunks, all.chunks[1..]);
        assert_eq!(load(&root, DIGEST, SIZE + 1, 0), None);
        assert_eq!(load(&root, Digest([8; 32]), SIZE, 0), None);
    }

    #[test]
    fn what_is_beyond_an_answer_comes_with_the_next() {
        let (_at, root) = area();
        let (digest, size) = (Digest([9; 32]), (SUMS_MAX + 2) * BLOCK_LENGTH as u64);
        let kept = of((0..SUMS_MAX as u32 + 2).collect());
        keep(&root, digest, size, &kept).unwrap();
        assert_eq!(kept.states.len(), 64);
        assert_eq!(load_all(&root, digest, size), Some(kept));
        assert!(are_kept(&root, digest, size) && !are_kept(&root, digest, size - 1));
        let first = load(&root, digest, size, 0).unwrap();
        assert_eq!((first.chunks.len() as u64, first.next), (SUMS_MAX, Some(SUMS_MAX * BLOCK_LENGTH as u64)));
        let last = load(&root, digest, size, first.next.unwrap()).unwrap();
        let ids: Vec<ChunkId> = last.chunks.iter().map(|chunk| chunk.id).collect();
        assert_eq!((ids, last.next), (vec![ChunkId::Sum(SUMS_MAX as u32), ChunkId::Sum(SUMS_MAX as u32 + 1)], None));
        assert!(load(&root, digest, size, size + (1 << 40)).is_none_or(|none| none.chunks.is_empty()));
    }

    #[test]
    fn a_file_that_is_none_of_sums_is_not_used() {
        let (at, root) = area();
        let file = at.path().join(path(DIGEST));
        let good = std::fs::read(&file).unwrap();
        for length in 0..good.len() {
            std::fs::write(&file, &good[..length]).unwrap();
            assert_eq!(load(&root, DIGEST, SIZE, 0), None, "{length}");
        }
        for place in 0..MAGIC.len() + 8 {
            let mut bad = good.clone();
            bad[place] ^= 1;
            std::fs::write(&file, bad).unwrap();
            assert_eq!(load(&root, DIGEST, SIZE, 0), None, "{place}");
        }
    }

    #[test]
    fn what_is_of_no_file_any_more_goes() {
        let (at, root) = area();
        keep(&root, Digest([8; 32]), 1, &of(vec![9])).unwrap();
        std::fs::write(at.path().join(DIRECTORY).join("torn.new"), "x").unwrap();
        keep_only(&root, &HashSet::from([DIGEST]));
        let left = root.names(Some(&RelPath::new(DIRECTORY).unwrap()), Follow::Never).unwrap();
        assert_eq!(left, [DIGEST.to_string().into_bytes()]);
    }
}
