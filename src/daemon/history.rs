//! What was published and what failed, kept on the disk: `history.jsonl` in the state directory, one JSON object a line, and
//! `history.jsonl.1`, what was in it before it was full.
//!
//! It is told what was done, and nothing is decided by it: a line that cannot be written, or read, is left out.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{BufRead as _, BufReader, Error, ErrorKind, Read as _, Seek as _, SeekFrom, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use super::status::Publication;

/// The file in the state directory.
pub const FILE: &str = "history.jsonl";
const OLD: &str = "history.jsonl.1";
/// A file that is larger becomes the old one; some 20,000 lines.
const LIMIT: u64 = 4 << 20;
/// No line is longer; a message is cut off before.
const LINE: u64 = 64 << 10;

/// Which publications are asked for.
#[derive(Debug, Clone, Default)]
pub struct Filter {
    /// Of this job alone.
    pub job: Option<String>,
    /// To this target alone.
    pub target: Option<String>,
    /// Not before; seconds since 1970.
    pub since: Option<u64>,
    /// The last so many.
    pub limit: Option<usize>,
}

impl Filter {
    fn admits(&self, publication: &Publication) -> bool {
        self.job.as_ref().is_none_or(|job| *job == publication.job)
            && self.target.as_ref().is_none_or(|target| *target == publication.target)
            && self.since.is_none_or(|since| publication.time >= since)
    }
}

/// The file that a daemon writes.
#[derive(Debug)]
pub struct Log {
    state: PathBuf,
    limit: u64,
    file: Option<File>,
}

impl Log {
    /// In a state directory. Nothing is opened before there is something to write.
    pub fn new(state: &Path) -> Log {
        Log { state: state.to_owned(), limit: LIMIT, file: None }
    }

    /// Appends a line.
    ///
    /// # Errors
    /// When it cannot be written; the next one is tried again.
    pub fn add(&mut self, publication: &Publication) -> std::io::Result<()> {
        let mut line = serde_json::to_vec(publication)?;
        if line.len() as u64 >= LINE {
            let error = publication.error.as_ref().map(|error| error.chars().take(2000).collect());
            line = serde_json::to_vec(&Publication { error, ..publication.clone() })?;
        }
        line.push(b'\n');
        let written = self.file().and_then(|mut file| file.write_all(&line));
        if written.is_err() {
            // It is looked at anew, with what is left of this line.
            self.file = None;
        }
        written
    }

    /// The file to append to, with whole lines in it.
    fn file(&mut self) -> std::io::Result<&File> {
        let path = self.state.join(FILE);
        let full = match &self.file {
            Some(file) => file.metadata()?.len() >= self.limit,
            None => std::fs::symlink_metadata(&path).is_ok_and(|found| found.len() >= self.limit),
        };
        if full {
            self.file = None;
            std::fs::rename(&path, self.state.join(OLD))?;
        }
        if self.file.is_none() {
            let mut file = File::options().read(true).append(true).create(true).mode(0o600).open(&path)?;
            // A crash may have torn the last line: what comes now begins one of its own.
            let mut last = [0];
            if file.metadata()?.len() > 0 {
                file.seek(SeekFrom::End(-1))?;
                file.read_exact(&mut last)?;
                if last != *b"\n" {
                    file.write_all(b"\n")?;
                }
            }
            self.file = Some(file);
        }
        self.file.as_ref().ok_or_else(|| Error::from(ErrorKind::NotFound))
    }
}

/// What was published, the oldest first. Lines that are torn or of a later version are left out. A state directory without a
/// history has none.
///
/// # Errors
/// When the files cannot be read.
pub fn publications(state: &Path, filter: &Filter) -> std::io::Result<Vec<Publication>> {
    let mut found = VecDeque::new();
    // RACE: a daemon that puts the file aside between the two is asked for the old one twice or not at all: read the new one
    // first, so that nothing is missed, and see whether it became the old one.
    let new = open(&state.join(FILE))?;
    let old = open(&state.join(OLD))?.filter(|old| new.as_ref().is_none_or(|new| !same(old, new)));
    for file in [old, new].into_iter().flatten() {
        let mut reader = BufReader::new(file);
        let mut line = Vec::new();
        loop {
            line.clear();
            if (&mut reader).take(LINE).read_until(b'\n', &mut line)? == 0 {
                break;
            }
            let Ok(publication) = serde_json::from_slice::<Publication>(&line) else { continue };
            if filter.admits(&publication) {
                found.push_back(publication);
            }
            if filter.limit.is_some_and(|limit| found.len() > limit) {
                found.pop_front();
            }
        }
    }
    Ok(found.into())
}

fn open(path: &Path) -> std::io::Result<Option<File>> {
    match File::open(path) {
        Ok(file) => Ok(Some(file)),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

fn same(a: &File, b: &File) -> bool {
    use std::os::unix::fs::MetadataExt as _;
    let of = |file: &File| file.metadata().map(|found| (found.dev(), found.ino())).ok();
    of(a) == of(b)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn publication(time: u64, job: &str, target: &str) -> Publication {
        Publication {
            time,
            job: job.into(),
            target: target.into(),
            generation: Some(time),
            files: 1,
            bytes: 2,
            milliseconds: 3,
            error: None,
        }
    }

    fn times(state: &Path, filter: &Filter) -> Vec<u64> {
        publications(state, filter).unwrap().iter().map(|found| found.time).collect()
    }

    #[test]
    fn what_is_asked_for_is_found_and_a_torn_line_hurts_no_other() {
        let at = tempfile::tempdir().unwrap();
        assert!(times(at.path(), &Filter::default()).is_empty());
        let mut log = Log::new(at.path());
        log.add(&publication(1, "a", "x")).unwrap();
        log.add(&publication(2, "b", "x")).unwrap();
        let path = at.path().join(FILE);
        let mut torn = std::fs::read(&path).unwrap();
        torn.extend(b"{\"time\":3,\"job\":\"a\",\"tar");
        std::fs::write(&path, torn).unwrap();
        let mut log = Log::new(at.path());
        log.add(&publication(4, "a", "y")).unwrap();
        assert_eq!(times(at.path(), &Filter::default()), [1, 2, 4]);
        assert_eq!(times(at.path(), &Filter { job: Some("a".into()), ..Filter::default() }), [1, 4]);
        assert_eq!(times(at.path(), &Filter { target: Some("x".into()), ..Filter::default() }), [1, 2]);
        assert_eq!(times(at.path(), &Filter { since: Some(2), ..Filter::default() }), [2, 4]);
        assert_eq!(times(at.path(), &Filter { limit: Some(1), ..Filter::default() }), [4]);
    }

    #[test]
    fn the_files_are_bounded_and_what_a_disk_refused_is_not_in_the_way() {
        let at = tempfile::tempdir().unwrap();
        let mut log = Log { limit: 1000, ..Log::new(at.path()) };
        for time in 0..100 {
            log.add(&publication(time, "job", "target")).unwrap();
        }
        let size = |name: &str| std::fs::metadata(at.path().join(name)).unwrap().len();
        assert!(size(FILE) < 1200 && size(OLD) < 1200);
        let found = times(at.path(), &Filter::default());
        assert!(found.len() >= 8 && *found.last().unwrap() == 99, "{found:?}");
        assert!(found.windows(2).all(|two| two[0] + 1 == two[1]), "{found:?}");
        let long = Publication { error: Some("x".repeat(1 << 20)), ..publication(100, "job", "target") };
        log.add(&long).unwrap();
        log.add(&publication(101, "job", "target")).unwrap();
        assert_eq!(times(at.path(), &Filter { limit: Some(2), ..Filter::default() }), [100, 101]);
        // A directory in its place: refused, and written again when it is gone.
        std::fs::remove_file(at.path().join(FILE)).unwrap();
        std::fs::create_dir(at.path().join(FILE)).unwrap();
        let mut log = Log::new(at.path());
        log.add(&publication(102, "job", "target")).unwrap_err();
        std::fs::remove_dir(at.path().join(FILE)).unwrap();
        log.add(&publication(103, "job", "target")).unwrap();
        assert_eq!(times(at.path(), &Filter { limit: Some(1), ..Filter::default() }), [103]);
    }
}
