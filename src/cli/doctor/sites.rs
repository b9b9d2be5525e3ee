//! The file systems that sources, targets, roots and state lie on.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, RenameFlags, StatVfsMountFlags};
use rustix::io::Errno;

use crate::cli::finding::Finding;
use crate::cli::places::{nearest, unwritable};
use crate::cli::{control, daemon};
use crate::config::{Config, fixed_part};
use crate::daemon::filesystem;
use crate::error::shown;
use crate::policy::PolicySpec;

/// Numbers of statfs(2) that are worth a name, beside those that [`filesystem`] knows.
const KINDS: [(u32, &str); 13] = [
    (0xef53, "ext4"),
    (0x5846_5342, "XFS"),
    (0x9123_683e, "Btrfs"),
    (0x2fc1_2fc1, "ZFS"),
    (0xf2f5_2010, "F2FS"),
    (0xca45_1a4e, "bcachefs"),
    (0x0102_1994, "tmpfs"),
    (0x8584_58f6, "ramfs"),
    (0x794c_7630, "overlayfs"),
    (0x4d44, "FAT"),
    (0x2011_bab0, "exFAT"),
    (0x5346_544e, "NTFS"),
    (0x7366_746e, "NTFS"),
];
/// Those that end with the machine.
const FLEETING: [&str; 2] = ["tmpfs", "ramfs"];
/// Those that know neither owners nor modes, and take 'a' and 'A' for one name.
const FOREIGN: [&str; 3] = ["FAT", "exFAT", "NTFS"];
/// Less room than this part of the whole is soon none.
const SCARCE_PERCENT: u64 = 5;

/// What a directory is for.
#[derive(Debug, Clone, Copy, Default)]
struct Use {
    /// It is published to.
    written: bool,
    /// It is the state of the daemon.
    state: bool,
    /// Units are exchanged in it.
    units: bool,
    /// Rules for it have ACLs.
    acl: bool,
    /// Rules for it make files executable.
    execute: bool,
}

/// All of it: each directory once.
pub(super) fn look(config: &Config) -> Vec<Finding> {
    let mut sites: BTreeMap<PathBuf, Use> = BTreeMap::new();
    let policy = |name: &Option<String>| name.as_ref().and_then(|name| config.policies.get(name));
    for job in &config.jobs {
        if job.remote_source().is_none() {
            sites.entry(job.source.clone()).or_default();
        }
        for target in job.targets.iter().filter(|target| target.starts_with('/')) {
            let site = sites.entry(PathBuf::from(target)).or_default();
            site.written = true;
            site.units |= job.unit.is_some();
            site.asks(policy(&job.policy));
        }
    }
    for user in config.serve.iter().flat_map(|serve| &serve.users) {
        let own = user.keys.iter().filter_map(|key| Some((key.root.as_ref()?, key.rights.unwrap_or(user.rights()))));
        for (root, rights) in own.chain([(&user.root, user.rights())]) {
            let site = sites.entry(fixed_part(root)).or_default();
            (site.written, site.units) = (site.written || rights.writes(), true);
            site.asks(policy(&user.policy));
        }
    }
    if !config.jobs.is_empty() {
        let socket = control::socket_of(config).ok().and_then(|socket| Some(socket.parent()?.to_owned()));
        for directory in daemon::state_of(config).ok().into_iter().chain(socket) {
            sites.entry(directory).or_default();
        }
        if let Ok(state) = daemon::state_of(config) {
            sites.entry(state).or_default().state = true;
        }
    }
    sites.into_iter().flat_map(|(path, site)| site.look(&path)).collect()
}

impl Use {
    fn asks(&mut self, policy: Option<&PolicySpec>) {
        for rule in policy.iter().flat_map(|policy| &policy.rules) {
            self.acl |= rule.acl.as_ref().is_some_and(|acl| !acl.is_empty());
            self.execute |= rule.mode.as_ref().is_some_and(|mode| mode.contains(['x', '1', '3', '5', '7']));
        }
    }

    fn look(self, path: &Path) -> Vec<Finding> {
        let about = shown(path).to_string();
        let there = nearest(path);
        let Ok(directory) = File::open(&there) else {
            let says = "it cannot be opened by this user, so that its file system is not known";
            return vec![Finding::warning(&about, says, "ask as the user of the service")];
        };
        let mut findings = Vec::new();
        let kind = kind(&directory);
        if self.written || self.state {
            findings.extend(self.of_kind(&about, &directory, &kind));
            findings.extend(room(&about, &directory));
        }
        if self.written && unwritable(path).is_none() {
            findings.extend(self.tried(&about, &there));
        }
        if findings.is_empty() {
            findings.push(Finding::ok(&about, format!("on {kind}")));
        }
        findings
    }

    /// What its kind and the way it is mounted mean.
    fn of_kind(self, about: &str, directory: &File, kind: &str) -> Vec<Finding> {
        let mut findings = Vec::new();
        if FLEETING.contains(&kind) {
            let what = if self.state { "digests and the history" } else { "what was brought there" };
            let says = format!("on {kind}: {what} is gone when the machine is started anew");
            findings.push(Finding::warning(about, says, "use a directory on a disk"));
        }
        if FOREIGN.contains(&kind) {
            let says = format!("on {kind}, which has neither owners nor modes, and takes 'a' and 'A' for one name");
            findings.push(Finding::error(about, says, "use ext4, XFS or another file system of Linux"));
        }
        if let Some(network) = filesystem::silent(directory) {
            let says = if self.state {
                format!("on {network}: a lock and a database on it depend on its server")
            } else {
                format!(
                    "on {network}: locks, ACLs and the exchange of units depend on its server, and others may write there"
                )
            };
            findings.push(Finding::warning(about, says, "docs/network-file-systems.md says what works"));
        }
        let Ok(mount) = rustix::fs::fstatvfs(directory) else { return findings };
        if mount.f_flag.contains(StatVfsMountFlags::RDONLY) {
            findings.push(Finding::error(
                about,
                "it is mounted read-only",
                "mount it anew; dmesg says whether the disk fails",
            ));
        }
        if self.execute && mount.f_flag.contains(StatVfsMountFlags::NOEXEC) {
            let says = "it is mounted noexec: what rules make executable cannot be started there";
            findings.push(Finding::warning(about, says, "mount it anew with exec, where it is meant to be"));
        }
        findings
    }

    /// What the file system can do, tried in a directory of its own.
    fn tried(self, about: &str, there: &Path) -> Vec<Finding> {
        let attempt = match Attempt::new(there) {
            Ok(attempt) => attempt,
            Err(error) => {
                let says = format!("nothing could be tried there: {}", crate::error::in_words(&error));
                return vec![Finding::error(
                    about,
                    says,
                    "see that the user of the service may write there, and that there is room",
                )];
            }
        };
        let mut findings = Vec::new();
        if !attempt.exchanges() && self.units {
            let says = "two directories cannot be exchanged in one step (renameat2): a unit that is there and changes cannot be replaced";
            findings.push(Finding::error(about, says, "use ext4, XFS or Btrfs, or give each unit a new name"));
        }
        if attempt.folds() {
            let says = "it takes 'a' and 'A' for one name: paths that differ in case alone are refused";
            findings.push(Finding::warning(about, says, "use a directory without casefold (chattr -F)"));
        }
        if !attempt.has_acls() && self.acl {
            let says = "rules ask for ACLs, which its file system does not have: runs are refused";
            findings.push(Finding::error(about, says, "mount it with ACLs, or leave 'acl' out of the rules"));
        }
        if !attempt.links() {
            let says = "it has no hard links: a file that has several names at the source cannot be made there";
            findings.push(Finding::warning(about, says, "use ext4, XFS or Btrfs"));
        }
        findings
    }
}

fn kind(directory: &File) -> String {
    if let Some(name) = filesystem::silent(directory) {
        return name.to_owned();
    }
    let Ok(found) = rustix::fs::fstatfs(directory) else { return "an unknown file system".to_owned() };
    let magic = found.f_type as u32;
    let name = KINDS.iter().find(|(number, _)| *number == magic).map(|(_, name)| (*name).to_owned());
    name.unwrap_or_else(|| format!("a file system of the number {magic:#x}"))
}

fn room(about: &str, directory: &File) -> Vec<Finding> {
    let Ok(found) = rustix::fs::fstatvfs(directory) else { return Vec::new() };
    let scarce = |free: u64, all: u64| all > 0 && free.saturating_mul(100) < all.saturating_mul(SCARCE_PERCENT);
    let mut findings = Vec::new();
    if scarce(found.f_bavail, found.f_blocks) {
        let free = indicatif::DecimalBytes(found.f_bavail.saturating_mul(found.f_frsize));
        let says =
            format!("{free} are free, less than {SCARCE_PERCENT} %: what is replaced needs its room twice for a while");
        findings.push(Finding::warning(about, says, "make room: df says what there is"));
    }
    if scarce(found.f_favail, found.f_files) {
        let says = format!("{} inodes are free, less than {SCARCE_PERCENT} %", found.f_favail);
        findings.push(Finding::warning(about, says, "remove small files: df -i says what there is"));
    }
    findings
}

/// A directory to try things in, which is removed at the end.
struct Attempt(PathBuf);

impl Attempt {
    fn new(above: &Path) -> std::io::Result<Attempt> {
        let path = above.join(format!(".lockstep-doctor-{}", std::process::id()));
        std::fs::create_dir(&path)?;
        let attempt = Attempt(path);
        for name in ["a", "b"] {
            std::fs::create_dir(attempt.0.join(name))?;
        }
        std::fs::write(attempt.0.join("name"), "")?;
        Ok(attempt)
    }

    fn exchanges(&self) -> bool {
        let [a, b] = ["a", "b"].map(|name| self.0.join(name));
        rustix::fs::renameat_with(CWD, a, CWD, b, RenameFlags::EXCHANGE).is_ok()
    }

    fn folds(&self) -> bool {
        self.0.join("NAME").exists()
    }

    fn has_acls(&self) -> bool {
        let mut buffer = [0; 0];
        let found = rustix::fs::getxattr(self.0.join("name"), "system.posix_acl_access", &mut buffer);
        !matches!(found, Err(Errno::NOTSUP))
    }

    fn links(&self) -> bool {
        std::fs::hard_link(self.0.join("name"), self.0.join("link")).is_ok()
    }
}

impl Drop for Attempt {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_tried_leaves_nothing() {
        let at = tempfile::tempdir().unwrap();
        let attempt = Attempt::new(at.path()).unwrap();
        assert!(attempt.exchanges() && attempt.links() && !attempt.folds());
        drop(attempt);
        assert_eq!(std::fs::read_dir(at.path()).unwrap().count(), 0);
    }
}
