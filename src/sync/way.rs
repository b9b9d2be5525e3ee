//! How a run gives way to others on the same machine.

use std::io;
use std::process::{Command, Stdio};

use rustix::io::Errno;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// A way that cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum WayError {
    /// A nice value.
    #[error(
        "cannot run with nice = {nice}: {}; under systemd the unit has to allow it, as nice.conf of the examples does; a value \
         below its own takes CAP_SYS_NICE or LimitNICE=, too",
        io::Error::from(*errno)
    )]
    Nice {
        /// What was asked for.
        nice: i8,
        /// Why not.
        errno: Errno,
    },
    /// A class of input and output.
    #[error(
        "cannot run with io_class = '{class}': ionice {why}; under systemd the unit has to allow it, as nice.conf of the examples does"
    )]
    Io {
        /// What was asked for.
        class: IoClass,
        /// What ionice(1) said, or why it did not run.
        why: String,
    },
}

/// How reading and writing waits for that of others, as ionice(1) has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IoClass {
    /// Only what nobody else wants.
    Idle,
    /// From 0, before others, to 7, after them.
    BestEffort(u8),
}

impl std::fmt::Display for IoClass {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            IoClass::Idle => f.write_str("idle"),
            IoClass::BestEffort(level) => write!(f, "best-effort:{level}"),
        }
    }
}

impl std::str::FromStr for IoClass {
    type Err = String;

    fn from_str(text: &str) -> Result<IoClass, String> {
        let level = text.strip_prefix("best-effort:").and_then(|level| level.parse().ok()).filter(|level| *level < 8);
        match (text, level) {
            ("idle", _) => Ok(IoClass::Idle),
            (_, Some(level)) => Ok(IoClass::BestEffort(level)),
            _ => Err(format!("'{text}' is neither 'idle' nor 'best-effort:0' to 'best-effort:7'")),
        }
    }
}

impl Serialize for IoClass {
    fn serialize<S: Serializer>(&self, output: S) -> Result<S::Ok, S::Error> {
        output.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for IoClass {
    fn deserialize<D: Deserializer<'de>>(input: D) -> Result<Self, D::Error> {
        String::deserialize(input)?.parse().map_err(de::Error::custom)
    }
}

/// Gives way to others, with this thread and those that it starts from now on, as far as it is asked for; what the system did not allow.
pub fn give_way(nice: Option<i8>, class: Option<IoClass>) -> Vec<WayError> {
    let ways = [nice.map(be_nice), class.map(set_io_class)];
    ways.into_iter().flatten().filter_map(Result::err).collect()
}

/// Gives this thread, and those that it starts from now on, a nice value: -20 (before others) to 19 (after all). On Linux it is of
/// a thread, not of its process.
///
/// # Errors
/// [`WayError`] where the system does not allow it.
fn be_nice(nice: i8) -> Result<(), WayError> {
    rustix::process::setpriority_process(None, nice.into()).map_err(|errno| WayError::Nice { nice, errno })
}

/// Gives this thread, and those that it starts from now on, a class of input and output, by ionice(1) of util-linux. It
/// counts where the disk's scheduler heeds it (BFQ), and for what is read; what is written goes to the disk by the kernel's threads.
///
/// # Errors
/// [`WayError`] where there is no ionice, or the system does not allow it.
fn set_io_class(class: IoClass) -> Result<(), WayError> {
    let failed = |why| WayError::Io { class, why };
    let mut ionice = Command::new("ionice");
    match class {
        IoClass::Idle => ionice.args(["-c", "3"]),
        IoClass::BestEffort(level) => ionice.args(["-c", "2", "-n", &level.to_string()]),
    };
    // The number of a thread does where that of a process is asked for.
    ionice.arg("-p").arg(rustix::thread::gettid().as_raw_nonzero().to_string());
    let done = ionice.stdin(Stdio::null()).output();
    let done = done.map_err(|error| failed(format!("cannot be started: {error}; it is part of util-linux")))?;
    match done.status.success() {
        true => Ok(()),
        false => Err(failed(format!("says: {}", crate::error::said(&done.stderr)))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn classes_are_read_as_they_are_written() {
        for text in ["idle", "best-effort:0", "best-effort:7"] {
            assert_eq!(text.parse::<IoClass>().unwrap().to_string(), text);
        }
        for wrong in ["", "Idle", "best-effort", "best-effort:8", "best-effort:-1", "realtime:0", "3"] {
            assert!(wrong.parse::<IoClass>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_class_is_of_the_thread_and_of_those_that_it_starts() {
        let class_of_this = || {
            let number = rustix::thread::gettid().as_raw_nonzero().to_string();
            let said = Command::new("ionice").args(["-p", &number]).output().unwrap();
            String::from_utf8(said.stdout).unwrap().trim().to_owned()
        };
        let inside = std::thread::spawn(move || {
            set_io_class(IoClass::BestEffort(6)).unwrap();
            (class_of_this(), std::thread::spawn(class_of_this).join().unwrap())
        });
        let wanted = "best-effort: prio 6".to_owned();
        assert_eq!(inside.join().unwrap(), (wanted.clone(), wanted.clone()));
        assert_ne!(class_of_this(), wanted);
    }
}
