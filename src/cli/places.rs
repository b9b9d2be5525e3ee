//! What can be said of a path of this machine without changing anything.

use std::path::{Path, PathBuf};

use rustix::fs::{Access, AtFlags, CWD, accessat};

use crate::error::{in_words, shown};

/// A path with what is there of it free of links; what is not there yet has none.
pub(super) fn real(path: &Path) -> PathBuf {
    let absolute = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    let there = absolute.ancestors().find_map(|above| {
        let rest = absolute.strip_prefix(above).ok()?;
        Some((above.canonicalize().ok()?, rest.to_owned()))
    });
    match there {
        Some((above, rest)) if rest.as_os_str().is_empty() => above,
        Some((above, rest)) => above.join(rest),
        None => absolute,
    }
}

/// The directory that is there: the path itself, or the nearest one above.
pub(super) fn nearest(path: &Path) -> PathBuf {
    path.ancestors().find(|above| above.exists()).unwrap_or(Path::new("/")).to_owned()
}

fn may(path: &Path, access: Access) -> std::io::Result<()> {
    Ok(accessat(CWD, path, access, AtFlags::EACCESS)?)
}

/// Why a directory cannot be listed.
pub(super) fn unreadable(directory: &Path) -> Option<String> {
    let error = may(directory, Access::READ_OK | Access::EXEC_OK).err()?;
    Some(format!("'{}' cannot be read: {}", shown(directory), in_words(&error)))
}

/// Why nothing can be put into a directory, or why it cannot be made where it is not there.
pub(super) fn unwritable(directory: &Path) -> Option<String> {
    match std::fs::metadata(directory) {
        Ok(found) if !found.is_dir() => Some(format!("'{}' is not a directory", shown(directory))),
        Ok(_) => {
            let error = may(directory, Access::WRITE_OK | Access::EXEC_OK).err()?;
            Some(format!("nothing can be written in '{}': {}", shown(directory), in_words(&error)))
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            let above = nearest(directory);
            if !above.is_dir() {
                return Some(format!("'{}' cannot be made: '{}' is not a directory", shown(directory), shown(&above)));
            }
            let error = may(&above, Access::WRITE_OK | Access::EXEC_OK).err()?;
            let (directory, above) = (shown(directory), shown(&above));
            Some(format!("'{directory}' cannot be made in '{above}': {}", in_words(&error)))
        }
        Err(error) => Some(format!("'{}' cannot be looked at: {}", shown(directory), in_words(&error))),
    }
}

/// Why a program cannot be started.
pub(super) fn not_a_program(program: &Path) -> Option<String> {
    match std::fs::metadata(program) {
        Ok(found) if !found.is_file() => Some(format!("'{}' is not a file", shown(program))),
        Ok(_) => {
            let error = may(program, Access::EXEC_OK).err()?;
            Some(format!("'{}' cannot be started: {}", shown(program), in_words(&error)))
        }
        Err(error) => Some(format!("'{}': {}", shown(program), in_words(&error))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_there_yet_is_judged_by_what_is_above() {
        let at = tempfile::tempdir().unwrap();
        std::fs::write(at.path().join("file"), "").unwrap();
        std::os::unix::fs::symlink(".", at.path().join("link")).unwrap();
        assert_eq!(real(&at.path().join("link/a/b")), at.path().canonicalize().unwrap().join("a/b"));
        assert_eq!(unwritable(&at.path().join("a/b")), None);
        for path in ["file", "file/a"] {
            assert!(unwritable(&at.path().join(path)).unwrap().contains("ot a directory"), "{path}");
        }
        assert!(not_a_program(&at.path().join("file")).unwrap().contains("cannot be started"));
        assert!(not_a_program(at.path()).is_some() && not_a_program(&at.path().join("none")).is_some());
        assert_eq!(not_a_program(Path::new("/bin/sh")), None);
    }
}
