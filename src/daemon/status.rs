//! What a daemon says of itself: for `lockstep status`, for metrics and for the page. Times are seconds since 1970.

use serde::{Deserialize, Serialize};

use crate::monitor::cpu::{self, Stage};

/// The version of this format.
pub const FORMAT: &str = "lockstep-status 1";

/// The daemon.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct Status {
    pub format: String,
    /// Of lockstep.
    pub version: String,
    pub host: String,
    pub pid: u32,
    pub started: u64,
    pub now: u64,
    /// The configuration file that is in force, and why the last one that was to be read is not.
    pub config: String,
    pub config_error: Option<String>,
    pub jobs: Vec<JobStatus>,
    /// What was published last, the newest first.
    pub recent: Vec<Publication>,
    #[serde(default)]
    pub source_cpu: SourceCpu,
}

/// Seconds of a processor that content of the sources has cost, since the daemon was started.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct SourceCpu {
    pub read_seconds: f64,
    pub hash_seconds: f64,
    pub compress_seconds: f64,
}

impl SourceCpu {
    /// Of this process.
    pub fn spent() -> SourceCpu {
        let seconds = |stage| cpu::spent(stage).as_secs_f64();
        SourceCpu {
            read_seconds: seconds(Stage::Read),
            hash_seconds: seconds(Stage::Hash),
            compress_seconds: seconds(Stage::Compress),
        }
    }
}

/// A job.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct JobStatus {
    pub name: String,
    pub source: String,
    pub paused: bool,
    pub watching: Watching,
    /// What changed and is not finished yet: units or files, the first few of them.
    pub unfinished: Vec<String>,
    pub unfinished_count: u64,
    /// Why nothing is sent at all: the source is gone, for instance.
    pub halted: Option<Trouble>,
    pub targets: Vec<TargetStatus>,
}

/// How changes are noticed.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct Watching {
    /// `events`, `polling`, or `starting`.
    pub mode: String,
    pub directories: u64,
    /// Why it polls, or what it was told of the system.
    pub why: Option<String>,
    pub last_scan: Option<u64>,
    /// Where in the source a file system was mounted and is not: what it held stays at the targets. The first few.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub unmounted: Vec<String>,
}

/// What a target is doing.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[allow(missing_docs)]
pub enum State {
    /// In step.
    #[default]
    Idle,
    Connecting,
    Scanning,
    Comparing,
    Transferring,
    Publishing,
    /// The last try failed; the next is at `next_try`.
    Retrying,
    Paused,
    /// Nothing is tried until a person does something.
    Halted,
}

impl State {
    /// As it is written.
    pub fn name(self) -> &'static str {
        match self {
            State::Idle => "idle",
            State::Connecting => "connecting",
            State::Scanning => "scanning",
            State::Comparing => "comparing",
            State::Transferring => "transferring",
            State::Publishing => "publishing",
            State::Retrying => "retrying",
            State::Paused => "paused",
            State::Halted => "halted",
        }
    }

    /// Every state, for whoever lists them all.
    pub const ALL: [State; 9] = [
        State::Idle,
        State::Connecting,
        State::Scanning,
        State::Comparing,
        State::Transferring,
        State::Publishing,
        State::Retrying,
        State::Paused,
        State::Halted,
    ];
}

/// One target of a job.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct TargetStatus {
    /// As the configuration names it.
    pub target: String,
    pub state: State,
    /// How far it is behind: what is finished at the source and not published there. Units, or files where a job has none.
    pub lag_units: u64,
    pub lag_bytes: u64,
    /// Since when it is behind, in seconds; 0 where it is in step.
    pub lag_seconds: u64,
    pub progress: Option<Progress>,
    pub last_success: Option<u64>,
    pub last_error: Option<Trouble>,
    pub next_try: Option<u64>,
    /// Of what it published last.
    pub generation: Option<u64>,
    /// Since the daemon was started.
    pub runs: u64,
    pub failures: u64,
    pub published_files: u64,
    pub transferred_bytes: u64,
    pub wire_bytes: u64,
}

/// What a run is at.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct Progress {
    pub done_files: u64,
    pub total_files: u64,
    pub done_bytes: u64,
    pub total_bytes: u64,
    /// Since the run began.
    pub bytes_per_second: u64,
    pub seconds: u64,
}

/// Something that went wrong, in words.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct Trouble {
    pub time: u64,
    pub message: String,
    /// What to do about it, where more is known than the message says.
    pub hint: Option<String>,
    /// How often in a row.
    pub times: u64,
}

/// A run that published something, or failed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct Publication {
    pub time: u64,
    pub job: String,
    pub target: String,
    pub generation: Option<u64>,
    pub files: u64,
    pub bytes: u64,
    pub milliseconds: u64,
    /// Why it failed.
    pub error: Option<String>,
}
