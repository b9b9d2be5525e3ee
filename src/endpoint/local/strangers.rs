//! What somebody else put into a directory while it was built anew: after the exchange it lies in the old one, and is brought over.

use std::collections::BTreeSet;
use std::io::ErrorKind;

use rustix::fs::RenameFlags;

use super::metadata::apply_directory;
use super::publish::{close_again, open_up};
use super::target::io;
use super::unit::as_it_is;
use crate::endpoint::Error;
use crate::path::RelPath;
use crate::root::{FileKind, Follow, Metadata, Root, RootError};

/// Moves from `old`, below the root, to `unit` what `unit` has no name for, unless it `goes` in this run. What is there under its name
/// stays there. It is done again without harm. Answers the directories that something came into, which moved their times.
///
/// # Errors
/// When something cannot be moved: then it lies where it was, and nothing is to be cleared away.
pub(super) fn bring_over(
    root: &Root,
    old: &RelPath,
    unit: &RelPath,
    goes: &BTreeSet<RelPath>,
) -> Result<BTreeSet<RelPath>, Error> {
    let mut changed = BTreeSet::new();
    let mut directories = vec![(old.clone(), unit.clone())];
    while let Some((from, to)) = directories.pop() {
        let names = match root.names(Some(&from), Follow::Never) {
            Ok(names) => names,
            Err(error) if error.kind() == ErrorKind::NotFound => continue,
            Err(error) => return Err(io(error)),
        };
        for name in names {
            let long = |error: crate::path::InvalidPath| Error::Usage(error.to_string());
            let (lies, path) = (from.join(&name).map_err(long)?, to.join(&name).map_err(long)?);
            let Some(found) = there(root, &lies)? else { continue };
            let directory = found.kind == FileKind::Directory;
            match there(root, &path)?.map(|now| now.kind) {
                Some(FileKind::Directory) if directory => directories.push((lies, path)),
                Some(_) => {}
                None if goes.contains(&path) && directory => directories.push((lies, path)),
                None if goes.contains(&path) => {}
                None => {
                    make_above(root, (old, unit), &path)?;
                    bring(root, &lies, &path).map_err(|error| Error::Refused {
                        by: crate::error::shown(root.shown()).to_string(),
                        reason: format!(
                            "'{path}' came into a unit while that was built anew, and cannot be moved into the new one ({}); it lies in \
                             '{lies}': move it by hand, then run again",
                            crate::error::in_words(&error.source)
                        ),
                    })?;
                    changed.extend(path.parent());
                }
            }
        }
    }
    Ok(changed)
}

fn there(root: &Root, path: &RelPath) -> Result<Option<Metadata>, Error> {
    match root.stat(path, Follow::Never) {
        Ok(found) => Ok(Some(found)),
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => Ok(None),
        Err(error) => Err(io(error)),
    }
}

/// A directory that goes stays for what came into it.
fn make_above(root: &Root, (old, unit): (&RelPath, &RelPath), path: &RelPath) -> Result<(), Error> {
    let missing: Vec<RelPath> = path.ancestors().filter(|above| above.is_within(unit) && above != unit).collect();
    for above in missing.iter().filter(|above| root.stat(above, Follow::Never).is_err()) {
        let Some(below) = above.strip_prefix(unit) else { continue };
        let before = old.join(below.as_bytes()).map_err(|error| Error::Usage(error.to_string()))?;
        let found = root.stat(&before, Follow::Never).map_err(io)?;
        let wanted = as_it_is(root, &before, &found)?;
        root.mkdir(above, 0o700).map_err(io)?;
        apply_directory(root, above, &wanted)?;
    }
    Ok(())
}

/// Renames, out of and into directories that forbid even their owner to write too.
fn bring(root: &Root, from: &RelPath, to: &RelPath) -> Result<(), RootError> {
    let rename = || match root.rename(from, to, RenameFlags::NOREPLACE) {
        // RACE: something got the name just now, or is gone.
        Err(error) if matches!(error.kind(), ErrorKind::AlreadyExists | ErrorKind::NotFound) => Ok(()),
        result => result,
    };
    match rename() {
        Err(error) if error.kind() == ErrorKind::PermissionDenied => {
            // A directory that is moved has to be open itself, too: the name of the one above is in it.
            let closed = [Some(from.clone()), from.parent(), to.parent()].into_iter().flatten();
            let opened: Vec<_> = closed.filter_map(|at| Some((open_up(root, &at)?, at))).collect();
            let renamed = rename();
            for (mode, at) in opened {
                let at = if at == *from && renamed.is_ok() { to } else { &at };
                // The run gives those above what they are to have.
                let _ = close_again(root, at, mode);
            }
            renamed
        }
        result => result,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::PermissionsExt as _;

    #[test]
    fn what_came_in_meanwhile_is_brought_over_and_what_goes_is_not() {
        let at = tempfile::tempdir().unwrap();
        let root = Root::open(at.path()).unwrap();
        for directory in ["old/kept", "old/gone/deep", "old/came", "old/shut", "unit/kept"] {
            fs::create_dir_all(at.path().join(directory)).unwrap();
        }
        for file in ["both", "goes", "new", "kept/new", "gone/goes", "gone/deep/new", "came/new", "shut/new"]
            .map(|file| format!("old/{file}"))
        {
            fs::write(at.path().join(&file), &file).unwrap();
        }
        fs::write(at.path().join("unit/both"), "of the run").unwrap();
        fs::set_permissions(at.path().join("old/gone"), fs::Permissions::from_mode(0o750)).unwrap();
        for closed in ["old/kept", "old/shut", "unit/kept"] {
            fs::set_permissions(at.path().join(closed), fs::Permissions::from_mode(0o555)).unwrap();
        }
        let path = |path: &str| RelPath::new(path).unwrap();
        let goes: BTreeSet<RelPath> = ["unit/goes", "unit/gone", "unit/gone/goes", "unit/gone/deep"].map(path).into();
        let mut came = Vec::new();
        for _ in 0..2 {
            came.push(bring_over(&root, &path("old"), &path("unit"), &goes).unwrap());
            let holds = |file: &str| fs::read_to_string(at.path().join("unit").join(file)).ok();
            for file in ["new", "kept/new", "gone/deep/new", "came/new", "shut/new"] {
                assert_eq!(holds(file), Some(format!("old/{file}")));
            }
            assert_eq!(holds("both").as_deref(), Some("of the run"));
            assert_eq!((holds("goes"), holds("gone/goes")), (None, None));
        }
        let mode = |path: &str| fs::metadata(at.path().join(path)).unwrap().permissions().mode() & 0o7777;
        assert_eq!((mode("unit/gone"), mode("unit/kept"), mode("unit/shut")), (0o750, 0o555, 0o555));
        assert_eq!(came, [["unit", "unit/gone/deep", "unit/kept"].map(path).into(), BTreeSet::new()]);
        bring_over(&root, &path("nothing"), &path("unit"), &goes).unwrap();
        for closed in ["old/kept", "unit/shut", "unit/kept"] {
            fs::set_permissions(at.path().join(closed), fs::Permissions::from_mode(0o755)).unwrap();
        }
    }
}
