//! Takes from a process all that a session does not need: another user's number, capabilities, files outside of its root, system
//! calls. What was taken is not to be had back.
//!
//! What always holds: it is done by the only thread there is, for what the kernel takes is taken from one thread and from those
//! that it starts; and what is said to be in force was taken without an error.

use std::fmt;
use std::path::{Path, PathBuf};

use rustix::thread::{CapabilitySet, CapabilitySets};
use serde::{Deserialize, Serialize};

mod calls;
mod files;
mod identity;
pub mod names;
pub mod trial;

pub use identity::Identity;

/// What a session is to have.
#[derive(Debug, Clone)]
pub struct Wanted<'w> {
    /// All that it may read.
    pub root: &'w Path,
    /// It may not write there either.
    pub read_only: bool,
    /// Whom it runs as; `None` for whoever runs this.
    pub identity: Option<&'w Identity>,
    /// Nothing may be missing.
    pub require: bool,
}

/// What is in force.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Confinement {
    /// The user that the process became.
    pub user: Option<String>,
    /// The capabilities that it has kept.
    pub capabilities: Vec<String>,
    /// The version of Landlock's interface; 0 for none.
    pub landlock: u32,
    /// System calls are filtered.
    pub seccomp: bool,
    /// Paths are resolved by the kernel below the root; else name by name, which is as safe.
    pub openat2: bool,
    /// What this kernel does not have, and why.
    pub missing: Vec<String>,
}

impl fmt::Display for Confinement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("own process")?;
        if let Some(user) = &self.user {
            write!(f, ", user {user}")?;
        }
        match self.capabilities.as_slice() {
            [] => f.write_str(", no capabilities")?,
            kept => write!(f, ", {}", kept.join(" "))?,
        }
        if self.landlock > 0 {
            write!(f, ", Landlock {}", self.landlock)?;
        }
        if self.seccomp {
            f.write_str(", seccomp")?;
        }
        f.write_str(if self.openat2 { ", openat2" } else { ", paths name by name (no openat2)" })?;
        self.missing.iter().try_for_each(|missing| write!(f, "; without {missing}"))
    }
}

/// Why a session cannot be confined as it must be.
#[derive(Debug, thiserror::Error)]
pub enum ConfineError {
    /// There is more than one thread.
    #[error("the process has {0} threads, and only one can be confined; this is a mistake of the program")]
    Threads(usize),
    /// The process cannot be looked at.
    #[error("the number of threads is not told: {0}; mount /proc")]
    Unknown(std::io::Error),
    /// A step failed.
    #[error("{step}: {reason}")]
    Step {
        /// What was to be done.
        step: &'static str,
        /// Why not.
        reason: String,
    },
    /// The kernel lacks something.
    #[error("this kernel has no {0}, and the configuration requires it; see 'confine' in docs/server.md")]
    Missing(String),
}

fn step<E: fmt::Display>(step: &'static str) -> impl FnOnce(E) -> ConfineError {
    move |reason| ConfineError::Step { step, reason: reason.to_string() }
}

/// What this kernel has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Available {
    /// The version of Landlock's interface; 0 for none.
    pub landlock: u32,
    /// System calls can be filtered.
    pub seccomp: bool,
}

impl Available {
    /// Looks, and changes nothing.
    pub fn look() -> Available {
        Available { landlock: files::version(), seccomp: calls::available() }
    }

    /// What is not there, and what that means.
    pub fn missing(&self) -> Vec<&'static str> {
        let landlock = (self.landlock < files::LEAST).then_some("Landlock of Linux 5.19 or newer");
        let seccomp = (!self.seccomp).then_some("filter of system calls (seccomp)");
        landlock.into_iter().chain(seccomp).collect()
    }
}

impl fmt::Display for Available {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let landlock = (self.landlock >= files::LEAST).then(|| format!("Landlock {}", self.landlock));
        let parts: Vec<String> = landlock.into_iter().chain(self.seccomp.then(|| "seccomp".to_owned())).collect();
        if parts.is_empty() { f.write_str("nothing but the process") } else { f.write_str(&parts.join(" and ")) }
    }
}

/// Confines this process, for good. After an error it may be confined in part, and is of no use.
///
/// # Errors
/// [`ConfineError`].
pub fn enter(wanted: &Wanted<'_>) -> Result<Confinement, ConfineError> {
    match threads().map_err(ConfineError::Unknown)? {
        1 => {}
        threads => return Err(ConfineError::Threads(threads)),
    }
    let mut made = Confinement { openat2: crate::root::has_openat2(), ..Confinement::default() };
    let mut lacks = |what: &'static str, reason: String| {
        if wanted.require {
            return Err(ConfineError::Missing(format!("{what} ({reason})")));
        }
        made.missing.push(format!("{what} ({reason})"));
        Ok(())
    };
    // Paths are looked up while that is allowed, and the filter is made while there is nothing to be afraid of.
    let files = match files::Files::new(wanted.root, wanted.read_only) {
        Ok(files) => Some(files),
        Err(files::Error::None(reason)) => lacks("Landlock", reason).map(|()| None)?,
        Err(files::Error::Failed(reason)) => return Err(ConfineError::Step { step: "Landlock", reason }),
    };
    let calls = match calls::Filter::new() {
        Ok(calls) => Some(calls),
        Err(reason) => lacks("seccomp", reason).map(|()| None)?,
    };
    rustix::thread::set_no_new_privs(true).map_err(step("no_new_privs"))?;
    drop_bounding_set()?;
    if let Some(identity) = wanted.identity {
        identity.become_it()?;
        made.user = Some(identity.name.clone());
    }
    made.capabilities = drop_capabilities(wanted)?;
    if let Some(files) = files {
        made.landlock = files.enforce().map_err(step("Landlock"))?;
    }
    if let Some(calls) = calls {
        calls.enforce().map_err(step("seccomp"))?;
        made.seccomp = true;
    }
    Ok(made)
}

/// How many threads this process has, as proc(5) has it.
fn threads() -> std::io::Result<usize> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("Threads:"));
    line.and_then(|count| count.trim().parse().ok()).ok_or_else(|| std::io::ErrorKind::InvalidData.into())
}

/// What serving may need beyond the rights of a user: to give files to those whom rules name, to keep special bits, and to work
/// in directories that were given away.
const SERVING: [(CapabilitySet, &str); 4] = [
    (CapabilitySet::CHOWN, "CAP_CHOWN"),
    (CapabilitySet::DAC_OVERRIDE, "CAP_DAC_OVERRIDE"),
    (CapabilitySet::FOWNER, "CAP_FOWNER"),
    (CapabilitySet::FSETID, "CAP_FSETID"),
];
/// What reading may need.
const READING: [(CapabilitySet, &str); 1] = [(CapabilitySet::DAC_OVERRIDE, "CAP_DAC_OVERRIDE")];

/// So that no program that is started has any; none can be started anyway.
fn drop_bounding_set() -> Result<(), ConfineError> {
    let now = rustix::thread::capabilities(None).map_err(step("capabilities"))?;
    if !now.effective.contains(CapabilitySet::SETPCAP) {
        return Ok(());
    }
    for bit in 0..64 {
        match rustix::thread::remove_capability_from_bounding_set(CapabilitySet::from_bits_retain(1 << bit)) {
            Ok(()) => {}
            // There are no more.
            Err(rustix::io::Errno::INVAL) => break,
            Err(error) => return Err(step("the bounding set of capabilities")(error)),
        }
    }
    Ok(())
}

/// Who runs as a user of his own has none; else what serving needs stays, as far as it is there.
fn drop_capabilities(wanted: &Wanted<'_>) -> Result<Vec<String>, ConfineError> {
    let now = rustix::thread::capabilities(None).map_err(step("capabilities"))?;
    let useful: &[_] = match (wanted.identity, wanted.read_only) {
        (Some(_), _) => &[],
        (None, true) => &READING,
        (None, false) => &SERVING,
    };
    let kept: Vec<_> = useful.iter().filter(|(bit, _)| now.permitted.contains(*bit)).collect();
    let set = kept.iter().fold(CapabilitySet::empty(), |set, (bit, _)| set | *bit);
    let sets = CapabilitySets { effective: set, permitted: set, inheritable: CapabilitySet::empty() };
    // Ambient ones end with the permitted ones that they stand for, and those that stay are of no use without a new program.
    if sets != now {
        rustix::thread::set_capabilities(None, sets).map_err(step("capabilities"))?;
    }
    Ok(kept.iter().map(|(_, name)| (*name).to_owned()).collect())
}

/// The files of control groups that say how many processors this process may use; without them it would start a thread for each
/// processor of the machine.
fn processor_limits() -> Vec<PathBuf> {
    let text = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let (mut found, unified) = (Vec::new(), Path::new("/sys/fs/cgroup"));
    for line in text.lines() {
        let mut fields = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(group)) = (fields.next(), fields.next()) else { continue };
        let (top, names): (_, &[&str]) = match controllers {
            "" => (unified.to_owned(), &["cpu.max"]),
            list if list.split(',').any(|name| name == "cpu") => {
                (unified.join("cpu"), &["cpu.cfs_quota_us", "cpu.cfs_period_us"])
            }
            _ => continue,
        };
        let own = top.join(group.trim_start_matches('/'));
        for above in own.ancestors().take_while(|above| above.starts_with(&top)) {
            found.extend(names.iter().map(|name| above.join(name)));
        }
    }
    found
}
