//! A status as metrics, in the text format of Prometheus 0.0.4:
//! <https://prometheus.io/docs/instrumenting/exposition_formats/>.
//!
//! No series is written twice, whatever the configuration says: Prometheus would refuse all of them.

use std::collections::HashSet;
use std::fmt::{Display, Write as _};
use std::io::Write as _;
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::path::Path;

use super::status::{JobStatus, State, Status, TargetStatus};

/// What an HTTP answer says that it is.
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

type Gauge<T> = (&'static str, &'static str, fn(&T) -> Option<u64>);

/// Of each target: name, help, value. What ends in `_total` counts since the daemon was started.
const OF_TARGET: &[Gauge<TargetStatus>] = &[
    ("lockstep_target_lag_units", "Units (files where a job has none) finished at the source and not there.", |t| {
        Some(t.lag_units)
    }),
    ("lockstep_target_lag_bytes", "Bytes that the present run has still to bring there.", |t| Some(t.lag_bytes)),
    ("lockstep_target_lag_seconds", "Since when the target is behind; 0 in step.", |t| Some(t.lag_seconds)),
    ("lockstep_target_last_success_timestamp_seconds", "When the last run succeeded.", |t| t.last_success),
    ("lockstep_target_next_try_timestamp_seconds", "When it is tried again after a failure.", |t| t.next_try),
    (
        "lockstep_target_failures_in_a_row",
        "How often the present failure was seen; 0 where the last run succeeded.",
        |t| Some(t.last_error.as_ref().map_or(0, |error| error.times.max(1))),
    ),
    ("lockstep_target_generation", "The generation of what was published last.", |t| t.generation),
    ("lockstep_target_run_done_bytes", "Bytes that the present run has brought there.", |t| {
        Some(t.progress.as_ref()?.done_bytes)
    }),
    ("lockstep_target_run_size_bytes", "Bytes that the present run has to bring there.", |t| {
        Some(t.progress.as_ref()?.total_bytes)
    }),
    ("lockstep_target_run_bytes_per_second", "How fast the present run is.", |t| {
        Some(t.progress.as_ref()?.bytes_per_second)
    }),
    ("lockstep_target_runs_total", "Runs, failed ones too.", |t| Some(t.runs)),
    ("lockstep_target_failures_total", "Runs that failed.", |t| Some(t.failures)),
    ("lockstep_target_published_files_total", "Paths that were published.", |t| Some(t.published_files)),
    ("lockstep_target_transferred_bytes_total", "Bytes of content that were transferred.", |t| {
        Some(t.transferred_bytes)
    }),
    ("lockstep_target_wire_bytes_total", "Bytes that went over the network for it, compressed.", |t| {
        Some(t.wire_bytes)
    }),
];

/// Of each job.
const OF_JOB: &[Gauge<JobStatus>] = &[
    ("lockstep_job_paused", "Whether a person paused the job.", |j| Some(j.paused.into())),
    ("lockstep_job_halted", "Whether nothing is sent at all: the source is gone, for instance.", |j| {
        Some(j.halted.is_some().into())
    }),
    ("lockstep_job_unfinished", "Units or files that changed and are not finished yet.", |j| Some(j.unfinished_count)),
    ("lockstep_job_polling", "Whether changes are found by looking now and then, and not by events.", |j| {
        Some((j.watching.mode == "polling").into())
    }),
    ("lockstep_job_last_scan_timestamp_seconds", "When the source was looked at as a whole.", |j| j.watching.last_scan),
    ("lockstep_watched_directories", "Directories of which events are had.", |j| Some(j.watching.directories)),
];

/// The metrics of a status, for an answer over HTTP.
pub fn render(status: &Status) -> String {
    let mut text = for_textfile(status);
    let start = "process_start_time_seconds";
    head(&mut text, start, "When the process was started.");
    line(&mut text, start, "", status.started);
    text
}

/// Without those of the process: node_exporter has some of the same name of its own, and would refuse both.
fn for_textfile(status: &Status) -> String {
    let mut text = String::new();
    let mut one = |name: &str, help: &str, labels: &str, value: u64| {
        head(&mut text, name, help);
        line(&mut text, name, labels, value);
    };
    let build = format!("{{version=\"{}\"}}", Label(&status.version));
    one("lockstep_up", "Whether the daemon runs.", "", 1);
    one("lockstep_build_info", "The version.", &build, 1);
    one("lockstep_start_timestamp_seconds", "When the daemon was started.", "", status.started);
    one("lockstep_status_timestamp_seconds", "When this was written.", "", status.now);
    let refused = u64::from(status.config_error.is_some());
    one(
        "lockstep_config_refused",
        "Whether a new configuration was wrong, so that the one of before stays.",
        "",
        refused,
    );
    let cpu = "lockstep_source_cpu_seconds_total";
    head(&mut text, cpu, "Seconds of a processor that content of the sources has cost: to read, to hash, to compress.");
    let spent = &status.source_cpu;
    for (stage, seconds) in
        [("read", spent.read_seconds), ("hash", spent.hash_seconds), ("compress", spent.compress_seconds)]
    {
        line(&mut text, cpu, &format!("{{stage=\"{stage}\"}}"), seconds);
    }
    let (jobs, targets) = labelled(status);
    for (name, help, value) in OF_JOB {
        let values: Vec<_> = jobs.iter().filter_map(|(labels, job)| Some((labels, value(job)?))).collect();
        series(&mut text, name, help, &values);
    }
    head(&mut text, "lockstep_target_state", "What the target is at: 1 for its state, 0 for the others.");
    for (labels, target) in &targets {
        for state in State::ALL {
            let labels = format!("{},state=\"{}\"}}", labels.trim_end_matches('}'), state.name());
            line(&mut text, "lockstep_target_state", &labels, u8::from(target.state == state));
        }
    }
    for (name, help, value) in OF_TARGET {
        let values: Vec<_> = targets.iter().filter_map(|(labels, target)| Some((labels, value(target)?))).collect();
        series(&mut text, name, help, &values);
    }
    text
}

type Labelled<'a, T> = Vec<(String, &'a T)>;

/// Jobs and targets with their labels; each name once.
fn labelled(status: &Status) -> (Labelled<'_, JobStatus>, Labelled<'_, TargetStatus>) {
    let mut seen = HashSet::new();
    let (mut jobs, mut targets) = (Vec::new(), Vec::new());
    for job in &status.jobs {
        let labels = format!("{{job=\"{}\"}}", Label(&job.name));
        if seen.insert(labels.clone()) {
            jobs.push((labels, job));
        }
        for target in &job.targets {
            let labels = format!("{{job=\"{}\",target=\"{}\"}}", Label(&job.name), Label(&target.target));
            if seen.insert(labels.clone()) {
                targets.push((labels, target));
            }
        }
    }
    (jobs, targets)
}

fn series(text: &mut String, name: &str, help: &str, values: &[(&String, u64)]) {
    if !values.is_empty() {
        head(text, name, help);
        values.iter().for_each(|(labels, value)| line(text, name, labels, value));
    }
}

fn head(text: &mut String, name: &str, help: &str) {
    let kind = if name.ends_with("_total") { "counter" } else { "gauge" };
    // Writing to a String never fails.
    let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} {kind}");
}

fn line(text: &mut String, name: &str, labels: &str, value: impl Display) {
    let _ = writeln!(text, "{name}{labels} {value}");
}

/// The value of a label, as the format has it: backslash, double quote and line feed are escaped, all else stands as it is.
struct Label<'a>(&'a str);

impl Display for Label<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for c in self.0.chars() {
            match c {
                '\\' => f.write_str("\\\\")?,
                '"' => f.write_str("\\\"")?,
                '\n' => f.write_str("\\n")?,
                c => f.write_char(c)?,
            }
        }
        Ok(())
    }
}

/// Writes the metrics for the textfile collector of node_exporter, which never sees half of them. Everybody may read the
/// file. It stays when the daemon ends: `lockstep_status_timestamp_seconds` says how old it is.
///
/// # Errors
/// When the file cannot be written; then the one of before is still there.
pub fn write_textfile(path: &Path, status: &Status) -> std::io::Result<()> {
    let name = path.file_name().ok_or(std::io::ErrorKind::InvalidInput)?;
    let mut hidden = std::ffi::OsString::from(".");
    hidden.push(name);
    // The collector reads `*.prom` alone.
    hidden.push(".new");
    let new = path.with_file_name(hidden);
    // What an earlier daemon left: a link there is not followed.
    match std::fs::remove_file(&new) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut file = std::fs::File::options().write(true).create_new(true).mode(0o644).open(&new)?;
    let written = file
        .write_all(for_textfile(status).as_bytes())
        // Whatever the umask is.
        .and_then(|()| file.set_permissions(std::fs::Permissions::from_mode(0o644)))
        .and_then(|()| std::fs::rename(&new, path));
    if written.is_err() {
        let _ = std::fs::remove_file(&new);
    }
    written
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_are_escaped_as_the_format_says() {
        assert_eq!(Label("a\\b\"c\nd\u{1b}é{}").to_string(), "a\\\\b\\\"c\\nd\u{1b}é{}");
    }
}
