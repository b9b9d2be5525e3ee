//! Looks every few seconds whether a file has changed that decides who may be here, and judges open connections again.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use super::access::Access;
use super::listener::{Server, judge_again};
use super::live::Live;
use crate::audit::{AuditRecord, Outcome};
use crate::error::shown;

/// A file must have been left alone for as long before it counts: what writes it may be half way.
const INTERVAL: Duration = Duration::from_secs(2);

/// What tells one state of a file from another; `None` where there is none.
type Stamp = Option<[i128; 5]>;
type Stamps = BTreeMap<PathBuf, Stamp>;

fn stamp(path: &PathBuf) -> Stamp {
    use std::os::unix::fs::MetadataExt as _;
    let found = std::fs::metadata(path).ok()?;
    let nanoseconds = |seconds: i64, rest: i64| i128::from(seconds) * 1_000_000_000 + i128::from(rest);
    Some([
        found.dev().into(),
        found.ino().into(),
        found.size().into(),
        nanoseconds(found.mtime(), found.mtime_nsec()),
        nanoseconds(found.ctime(), found.ctime_nsec()),
    ])
}

/// The files as they were when connections were judged by them, and when they were looked at last.
#[derive(Debug, Default)]
struct Looked {
    judged: Stamps,
    last: Stamps,
}

impl Looked {
    /// Which files are not those that were judged by, now that they are left alone.
    fn changed(&mut self, now: Stamps) -> Vec<PathBuf> {
        // Files that nobody goes by any more are new when somebody does again: he may have been judged by another state.
        self.judged.retain(|path, _| now.contains_key(path));
        let is_other = |path: &PathBuf, stamp: &Stamp| self.judged.get(path) != Some(stamp);
        let is_left = |path: &PathBuf, stamp: &Stamp| self.last.get(path) == Some(stamp);
        let changed = now.iter().filter(|(path, stamp)| is_other(path, stamp) && is_left(path, stamp));
        let changed: Vec<PathBuf> = changed.map(|(path, _)| path.clone()).collect();
        self.last = now;
        changed
    }

    fn judged(&mut self, files: &[PathBuf]) {
        let last = &self.last;
        self.judged.extend(files.iter().filter_map(|path| Some((path.clone(), *last.get(path)?))));
    }
}

/// Goes on until the server is gone.
pub(super) async fn watch(server: Arc<Server>) {
    let mut looked = Looked::default();
    loop {
        tokio::time::sleep(INTERVAL).await;
        let (access, mut all) = (server.settings().access.clone(), server.live.all());
        all.retain(|live| live.login.get().is_some() && !live.is_gone());
        let look = tokio::task::spawn_blocking(move || {
            let ended = look(&mut looked, &access, &all);
            (looked, ended)
        });
        let Ok((now, found)) = look.await else { return };
        looked = now;
        let Some((files, ended)) = found else { continue };
        tell(&server, &files, ended);
    }
}

/// Looks once; what has changed, and how many connections that ended.
fn look(looked: &mut Looked, access: &Access, all: &[Arc<Live>]) -> Option<(Vec<PathBuf>, usize)> {
    let files = all.iter().filter_map(|live| Some(live.login.get()?.user.authorized_keys.clone()));
    let stamps = files.chain(access.revoked_keys().map(PathBuf::from)).map(|path| (stamp(&path), path));
    let stamps: Stamps = stamps.map(|(stamp, path)| (path, stamp)).collect();
    let known: Vec<PathBuf> = looked.judged.keys().cloned().collect();
    let changed = looked.changed(stamps);
    if changed.is_empty() {
        return None;
    }
    // Nobody can log in by a list that cannot be read. Who is here stays, as when it is loaded by a signal.
    if let Err(reason) = access.look() {
        let list: Vec<PathBuf> =
            changed.into_iter().filter(|path| Some(path.as_path()) == access.revoked_keys()).collect();
        if !list.is_empty() {
            tracing::error!(reason, "nobody can log in; open sessions stay until the list can be read");
        }
        looked.judged(&list);
        return None;
    }
    let ended = judge_again(access, all);
    looked.judged(&changed);
    // That a file is gone by for the first time is no news.
    let news: Vec<PathBuf> = changed.into_iter().filter(|path| known.contains(path)).collect();
    (!news.is_empty() || ended > 0).then_some((news, ended))
}

fn tell(server: &Server, files: &[PathBuf], ended: usize) {
    let names: Vec<String> = files.iter().map(|path| format!("'{}'", shown(path))).collect();
    let names = names.join(", ");
    tracing::info!(files = names, ended, "keys have changed, open sessions were judged again");
    let reason = Some(format!("{names} changed; {ended} open connections ended"));
    let (action, result) = ("configuration".into(), Some(Outcome::Success));
    server.recorder.note(AuditRecord { action, result, reason, ..AuditRecord::default() });
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stamps(of: &[(&str, i128)]) -> Stamps {
        of.iter().map(|(path, stamp)| (PathBuf::from(path), Some([*stamp; 5]))).collect()
    }

    #[test]
    fn h56_a_file_counts_when_it_is_another_one_and_left_alone() {
        let mut looked = Looked::default();
        let mut look = |now: &[(&str, i128)]| {
            let changed = looked.changed(stamps(now));
            looked.judged(&changed);
            changed.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(" ")
        };
        for (now, changed) in [
            (&[("a", 1)][..], ""),
            // Who logged in between two looks is judged once more.
            (&[("a", 1), ("b", 1)], "a"),
            (&[("a", 1), ("b", 1)], "b"),
            (&[("a", 2), ("b", 1)], ""),
            (&[("a", 3), ("b", 1)], ""),
            (&[("a", 3), ("b", 1)], "a"),
            (&[("a", 3), ("b", 1)], ""),
            (&[("a", 3)], ""),
            (&[("a", 3), ("b", 2)], ""),
            (&[("a", 3), ("b", 2)], "b"),
        ] {
            assert_eq!(look(now), changed, "{now:?}");
        }
    }
}
