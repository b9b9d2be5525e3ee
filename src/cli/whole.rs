//! Files that are written whole or not at all.

use std::io::Write as _;
use std::path::{Path, PathBuf};

/// Puts `text` in the place of `file`, whole or not at all; a device or pipe is written to.
pub(super) fn replace(file: &Path, text: &[u8]) -> std::io::Result<()> {
    if std::fs::metadata(file).is_ok_and(|metadata| !metadata.is_file()) {
        return std::fs::OpenOptions::new().write(true).open(file)?.write_all(text);
    }
    let mut new = file.as_os_str().to_owned();
    new.push(format!(".{}.new", std::process::id()));
    let new = PathBuf::from(new);
    let written = std::fs::File::create_new(&new)
        .and_then(|mut open| open.write_all(text).and_then(|()| open.sync_all()))
        .and_then(|()| std::fs::rename(&new, file));
    if written.is_err() {
        let _ = std::fs::remove_file(&new);
    }
    written
}
