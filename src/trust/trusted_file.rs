//! Files that decide who may log in: read only when nobody but root and this process's user can have written them.
//!
//! The rules of sshd's StrictModes, with one difference: a directory with the sticky bit may be writable by all, since
//! nobody can replace in it what belongs to another.

use std::fs::File;
use std::io::{self, Read as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::Path;

use crate::error::{Escaped, in_words};

/// More than any list of keys needs.
const MAX_BYTES: u64 = 4 << 20;

/// Reads a file whole.
///
/// # Errors
/// What is wrong with the file or a directory above it, and what to do.
pub fn read(path: &Path) -> Result<Vec<u8>, String> {
    let shown = show(path);
    let fail = |error: io::Error| format!("cannot read {shown}: {}", in_words(&error));
    // A FIFO must not block here.
    let flags = (rustix::fs::OFlags::NONBLOCK | rustix::fs::OFlags::NOCTTY).bits();
    let flags = i32::try_from(flags).unwrap_or_default();
    let mut file = File::options().read(true).custom_flags(flags).open(path).map_err(fail)?;
    check(&file, path)?;
    let mut bytes = Vec::new();
    file.by_ref().take(MAX_BYTES + 1).read_to_end(&mut bytes).map_err(fail)?;
    if bytes.len() as u64 > MAX_BYTES {
        return Err(format!("{shown} is larger than 4 MiB"));
    }
    Ok(bytes)
}

/// Checks an open file, and the directories that lead to it.
///
/// # Errors
/// As for [`read`].
pub fn check(file: &File, path: &Path) -> Result<(), String> {
    let shown = show(path);
    let fail = |error: io::Error| format!("cannot look at {shown}: {}", in_words(&error));
    let metadata = file.metadata().map_err(fail)?;
    if !metadata.is_file() {
        return Err(format!("{shown} is not a regular file"));
    }
    owned(&shown, &metadata)?;
    if metadata.mode() & 0o022 != 0 {
        return Err(format!(
            "{shown} can be written by others (mode {:03o}); run: chmod go-w {shown}",
            mode(&metadata)
        ));
    }
    // RACE: the name may lead elsewhere meanwhile; then it is another file than the one that is open, and refused.
    let real = path.canonicalize().map_err(fail)?;
    let found = real.symlink_metadata().map_err(fail)?;
    if (found.dev(), found.ino()) != (metadata.dev(), metadata.ino()) {
        return Err(format!("{shown} was replaced while it was read; try again"));
    }
    for directory in real.ancestors().skip(1) {
        let shown = show(directory);
        let metadata =
            directory.symlink_metadata().map_err(|error| format!("cannot look at {shown}: {}", in_words(&error)))?;
        owned(&shown, &metadata)?;
        if metadata.mode() & 0o022 != 0 && metadata.mode() & 0o1000 == 0 {
            let mode = mode(&metadata);
            return Err(format!(
                "directory {shown} can be written by others (mode {mode:03o}); run: chmod go-w {shown}"
            ));
        }
    }
    Ok(())
}

fn owned(shown: &str, metadata: &std::fs::Metadata) -> Result<(), String> {
    let own = rustix::process::geteuid().as_raw();
    if [0, own].contains(&metadata.uid()) {
        return Ok(());
    }
    let uid = metadata.uid();
    Err(format!(
        "{shown} belongs to user number {uid}, but must belong to root or to the server's user; run chown on it"
    ))
}

fn mode(metadata: &std::fs::Metadata) -> u32 {
    metadata.mode() & 0o777
}

fn show(path: &Path) -> String {
    Escaped(path.as_os_str().as_encoded_bytes()).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::{Permissions, set_permissions};
    use std::os::unix::fs::PermissionsExt as _;

    #[test]
    fn h50_a_file_that_others_could_have_written_is_refused() {
        let at = tempfile::tempdir().unwrap();
        let directory = at.path().join("keys");
        std::fs::create_dir(&directory).unwrap();
        let file = directory.join("file");
        std::fs::write(&file, "x").unwrap();
        let link = at.path().join("link");
        std::os::unix::fs::symlink(&file, &link).unwrap();
        let mode = |path: &Path, mode| set_permissions(path, Permissions::from_mode(mode)).unwrap();
        mode(&file, 0o644);
        for path in [&file, &link] {
            assert_eq!(read(path).unwrap(), b"x");
        }
        for bad in [0o664, 0o646] {
            mode(&file, bad);
            assert!(read(&file).unwrap_err().contains("chmod go-w"), "{bad:o}");
        }
        mode(&file, 0o600);
        mode(&directory, 0o777);
        // By a link too it is the real place that counts.
        for path in [&file, &link] {
            assert!(read(path).unwrap_err().contains("directory"), "{}", path.display());
        }
        mode(&directory, 0o1777);
        assert!(read(&file).is_ok());
        mode(&directory, 0o755);
        assert!(read(&directory).unwrap_err().contains("not a regular file"));
        rustix::fs::mkfifoat(rustix::fs::CWD, at.path().join("fifo"), rustix::fs::Mode::from_raw_mode(0o600)).unwrap();
        assert!(read(&at.path().join("fifo")).unwrap_err().contains("not a regular file"));
        // Only root can give a file away.
        if rustix::process::geteuid().is_root() {
            std::os::unix::fs::chown(&file, Some(4711), None).unwrap();
            assert!(read(&file).unwrap_err().contains("4711"));
            std::os::unix::fs::chown(&file, Some(0), None).unwrap();
            std::os::unix::fs::chown(&directory, Some(4711), None).unwrap();
            assert!(read(&file).unwrap_err().contains("4711"));
        }
    }
}
