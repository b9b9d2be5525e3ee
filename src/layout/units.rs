//! The units of a tree of this machine, and those that a pointer names.

use std::collections::BTreeSet;
use std::io::ErrorKind;

use super::complete::named_by;
use crate::filter::Filter;
use crate::path::RelPath;
use crate::plan::retain::Unit;
use crate::root::{FileKind, Follow, Root, RootError};

/// How units and pointers are told.
#[derive(Debug, Clone, Copy)]
pub struct Rules<'a> {
    /// Leaves out what is no unit: its globs match units, which it does not admit.
    pub unit: &'a Filter,
    /// Does not admit pointers.
    pub pointer: &'a Filter,
    /// What takes part.
    pub admitted: &'a Filter,
}

/// What was found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Units {
    /// In order of their paths.
    pub units: Vec<Unit>,
    /// Units that a symbolic link outside of them, or a file that is a pointer, names: with the link or file.
    pub pointed: BTreeSet<(RelPath, RelPath)>,
}

/// Lists the units below `root`. What lies in a unit is not looked at. What is removed meanwhile is not there.
///
/// # Errors
/// When a directory cannot be listed.
pub fn list(root: &Root, rules: Rules<'_>) -> Result<Units, RootError> {
    let mut found = Units::default();
    let mut named = Vec::new();
    let mut directories = vec![None];
    while let Some(directory) = directories.pop() {
        let names = match root.names(directory.as_ref(), Follow::Never) {
            Ok(names) => names,
            // What may not be looked into is told by the scan.
            Err(error)
                if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::PermissionDenied) && directory.is_some() =>
            {
                continue;
            }
            Err(error) => return Err(error),
        };
        for name in names {
            let path =
                directory.as_ref().map_or_else(|| RelPath::new(&name), |directory: &RelPath| directory.join(&name));
            let Ok(path) = path else { continue };
            let Ok(seen) = root.stat(&path, Follow::Never) else { continue };
            let is_directory = seen.kind == FileKind::Directory;
            if !rules.admitted.admits(&path, is_directory) {
                continue;
            }
            match seen.kind {
                FileKind::Directory if !rules.unit.admits(&path, true) => {
                    found.units.push(Unit { path, mtime: seen.mtime });
                }
                FileKind::Directory => directories.push(Some(path)),
                FileKind::Symlink => {
                    let to = root.read_link(&path).ok().and_then(|target| leads_to(root, &path, &target));
                    named.extend(to.map(|to| (path, to)));
                }
                FileKind::Regular if !rules.pointer.admits(&path, false) => {
                    named.extend(named_by(root, &path).map(|to| (path, to)));
                }
                _ => {}
            }
        }
    }
    found.units.sort_unstable_by(|a, b| a.path.cmp(&b.path));
    let unit_of = |path: RelPath| path.ancestors().chain([path.clone()]).find(|above| !rules.unit.admits(above, true));
    found.pointed = named.into_iter().filter_map(|(pointer, path)| Some((pointer, unit_of(path)?))).collect();
    Ok(found)
}

/// Where a symbolic link leads, by its text alone: below the root, whether it is written from there or from the top.
pub fn leads_to(root: &Root, link: &RelPath, target: &[u8]) -> Option<RelPath> {
    let own = root.shown().as_os_str().as_encoded_bytes();
    let (mut parts, rest): (Vec<Vec<u8>>, &[u8]) = match target.strip_prefix(own).filter(|_| target.starts_with(b"/")) {
        Some(rest) => (Vec::new(), rest),
        None if target.starts_with(b"/") => return None,
        None => {
            let above = link.parent();
            (
                above.iter().flat_map(|above| above.components().map(<[u8]>::to_vec).collect::<Vec<_>>()).collect(),
                target,
            )
        }
    };
    for part in rest.split(|&byte| byte == b'/') {
        match part {
            b"" | b"." => {}
            b".." => drop(parts.pop()?),
            name => parts.push(name.to_vec()),
        }
    }
    RelPath::new(parts.join(&b'/')).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::filter::FilterSpec;

    #[test]
    fn units_are_found_and_what_points_to_them() {
        let at = tempfile::tempdir().unwrap();
        for unit in ["c-1/w", "c-2", "run/c-3", "run/c-4/c-9", "run/c-5", "c-6", "other", "out/c-7"] {
            std::fs::create_dir_all(at.path().join(unit)).unwrap();
        }
        for (pointer, text) in
            [("latest", "c-1\n"), ("run/latest", "c-3"), ("notes", "c-2"), ("other/latest", "nothing")]
        {
            std::fs::write(at.path().join(pointer), text).unwrap();
        }
        let absolute = at.path().join("run/c-4/x").display().to_string();
        for (link, target) in [
            ("best", "./c-2/"),
            ("run/good", absolute.as_str()),
            ("other/up", "../run/c-5"),
            ("away", "/c-6"),
            ("up", "../.."),
        ] {
            std::os::unix::fs::symlink(target, at.path().join(link)).unwrap();
        }
        let filter = |rules: &[&str]| {
            Filter::compile(&FilterSpec { rules: rules.iter().map(|&rule| rule.to_owned()).collect(), only: None })
                .unwrap()
        };
        let (unit, pointer, admitted) = (filter(&["c-*/"]), filter(&["latest"]), filter(&["out/"]));
        let rules = Rules { unit: &unit, pointer: &pointer, admitted: &admitted };
        let found = list(&Root::open(at.path()).unwrap(), rules).unwrap();
        let units: Vec<String> = found.units.iter().map(|unit| unit.path.to_string()).collect();
        assert_eq!(units, ["c-1", "c-2", "c-6", "run/c-3", "run/c-4", "run/c-5"]);
        let pointed: Vec<String> = found.pointed.iter().map(|(from, to)| format!("{from}: {to}")).collect();
        assert_eq!(
            pointed,
            ["best: c-2", "latest: c-1", "other/up: run/c-5", "run/good: run/c-4", "run/latest: run/c-3"]
        );
    }
}
