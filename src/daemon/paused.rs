//! Which jobs are paused, kept over a restart: who rearranges a source is not to find it mirrored in the middle of that.

use std::collections::BTreeSet;
use std::path::Path;

const FILE: &str = "paused.json";

/// The names of those that were paused; none where that cannot be read.
pub(super) fn load(state: &Path) -> BTreeSet<String> {
    let path = state.join(FILE);
    match std::fs::read(&path) {
        Ok(text) => serde_json::from_slice(&text).unwrap_or_else(|error| {
            tracing::warn!("'{}' does not say which jobs are paused: {error}", crate::error::shown(&path));
            BTreeSet::new()
        }),
        Err(_) => BTreeSet::new(),
    }
}

/// Keeps the names. Where that cannot be done a restart begins them again, which is told.
pub(super) fn store(state: &Path, names: &BTreeSet<String>) {
    let (path, new) = (state.join(FILE), state.join(format!("{FILE}.new")));
    let stored = serde_json::to_vec(names)
        .map_err(std::io::Error::from)
        .and_then(|text| std::fs::write(&new, text))
        .and_then(|()| std::fs::rename(&new, &path));
    if let Err(error) = stored {
        let (path, reason) = (crate::error::shown(&path), crate::error::in_words(&error));
        tracing::warn!("a restart would begin paused jobs again: cannot write '{path}': {reason}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_kept_and_what_is_damaged_says_nothing() {
        let at = tempfile::tempdir().unwrap();
        assert!(load(at.path()).is_empty());
        let names = BTreeSet::from(["a \"b\"\n".to_owned(), "data".to_owned()]);
        store(at.path(), &names);
        assert_eq!(load(at.path()), names);
        std::fs::write(at.path().join(FILE), "[1").unwrap();
        assert!(load(at.path()).is_empty());
    }
}
