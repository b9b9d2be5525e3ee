//! The log: lines on standard error, or records of the journal with fields, where standard error is the journal.
//!
//! Records go by the journal's own protocol (<https://systemd.io/JOURNAL_NATIVE_PROTOCOL/>). A message reads as the line would:
//! people see what happened and to what, and `journalctl LOCKSTEP_JOB=…` finds it.

use std::fmt::Write as _;
use std::os::unix::net::UnixDatagram;
use std::path::Path;

use tracing::field::{Field, Visit};
use tracing::{Event, Level, Metadata, Subscriber};
use tracing_subscriber::layer::{Context, Layer};
use tracing_subscriber::prelude::*;
use tracing_subscriber::{EnvFilter, fmt};

use super::notify;

const SOCKET: &str = "/run/systemd/journal/socket";
/// The name of a field has at most so many characters.
const NAME_MAX: usize = 64;
/// A record that the socket does not take is sent again with values of at most so many bytes.
const SHORT: usize = 4096;

/// Begins to log what `filter` lets through; only the first call counts. `further` gets all there is.
pub(super) fn begin<L>(filter: EnvFilter, colour: bool, further: L)
where
    L: Layer<tracing_subscriber::Registry> + Send + Sync,
{
    let to_journal = notify::to_journal();
    let log = match Journal::connect(Path::new(SOCKET)).filter(|_| to_journal) {
        Some(journal) => journal.boxed(),
        None => {
            // A log that nobody reads any more must not end a service.
            let lines = fmt::layer().with_writer(std::io::stderr).with_ansi(colour).with_target(false);
            let lines = lines.log_internal_errors(false);
            if to_journal { lines.without_time().boxed() } else { lines.boxed() }
        }
    };
    let _ = tracing_subscriber::registry().with(further).with(log.with_filter(filter)).try_init();
}

/// A record as it would stand in a line, without its level.
pub(super) fn words(event: &Event<'_>) -> String {
    let line = Record::of(event.metadata(), |record| event.record(record)).line;
    line.trim_start().split_once(' ').map(|(_, words)| words.to_owned()).unwrap_or_default()
}

/// Sends records to the journal.
struct Journal(UnixDatagram);

impl Journal {
    /// `None` where no journal listens.
    fn connect(socket: &Path) -> Option<Journal> {
        let own = UnixDatagram::unbound().ok()?;
        own.connect(socket).ok()?;
        Some(Journal(own))
    }

    fn send(&self, record: &Record) {
        let whole = self.0.send(&record.bytes(usize::MAX));
        if whole.as_ref().is_err_and(|error| error.raw_os_error() == Some(rustix::io::Errno::MSGSIZE.raw_os_error())) {
            let _ = self.0.send(&record.bytes(SHORT));
        } else if whole.is_err() {
            // The journal is started anew: standard error waits for it.
            use std::io::Write as _;
            let _ = writeln!(std::io::stderr(), "{}", record.line);
        }
    }
}

impl<S: Subscriber> Layer<S> for Journal {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        self.send(&Record::of(event.metadata(), |record| event.record(record)));
    }
}

/// One record.
#[derive(Debug)]
struct Record {
    priority: u8,
    /// As it would stand on standard error.
    line: String,
    message: String,
    fields: Vec<Value>,
}

/// A field of a record: its name, how it reads in a line, and what it is.
#[derive(Debug)]
struct Value {
    name: &'static str,
    shown: String,
    plain: String,
}

impl Record {
    fn of(metadata: &Metadata<'_>, fill: impl FnOnce(&mut Record)) -> Record {
        let level = *metadata.level();
        // Of syslog(3): errors, warnings, what an operator may want to know, and the rest.
        let priority = match level {
            Level::ERROR => 3,
            Level::WARN => 4,
            Level::INFO => 6,
            _ => 7,
        };
        let mut record = Record { priority, line: String::new(), message: String::new(), fields: Vec::new() };
        fill(&mut record);
        record.line = format!("{:>5} {}", level.as_str(), record.message);
        for Value { name, shown, .. } in &record.fields {
            let _ = write!(record.line, " {name}={shown}");
        }
        record
    }

    /// As the journal reads it.
    fn bytes(&self, longest: usize) -> Vec<u8> {
        let mut bytes = Vec::new();
        put(&mut bytes, "PRIORITY", &self.priority.to_string(), longest);
        put(&mut bytes, "SYSLOG_IDENTIFIER", "lockstep", longest);
        put(&mut bytes, "MESSAGE", self.line.trim_start(), longest);
        for Value { name, plain, .. } in &self.fields {
            put(&mut bytes, &named(name), plain, longest);
        }
        bytes
    }
}

/// `LOCKSTEP_JOB` of `job`: capital letters, digits and underscores.
fn named(name: &str) -> String {
    let plain = |c: char| if c.is_ascii_alphanumeric() { c.to_ascii_uppercase() } else { '_' };
    let name: String = "LOCKSTEP_".chars().chain(name.chars().map(plain)).collect();
    name.chars().take(NAME_MAX).collect()
}

/// A value with its length in front, so that nothing in it can begin another field.
fn put(bytes: &mut Vec<u8>, name: &str, value: &str, longest: usize) {
    let mut end = value.len().min(longest);
    while !value.is_char_boundary(end) {
        end -= 1;
    }
    bytes.extend_from_slice(name.as_bytes());
    bytes.push(b'\n');
    bytes.extend_from_slice(&(end as u64).to_le_bytes());
    bytes.extend_from_slice(&value.as_bytes()[..end]);
    bytes.push(b'\n');
}

impl Visit for Record {
    fn record_str(&mut self, field: &Field, value: &str) {
        match field.name() {
            "message" => value.clone_into(&mut self.message),
            name => self.fields.push(Value { name, shown: format!("{value:?}"), plain: value.to_owned() }),
        }
    }

    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        let text = format!("{value:?}");
        match field.name() {
            "message" => self.message = text,
            name => self.fields.push(Value { name, shown: text.clone(), plain: text }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What arrives at a journal of ours, by names.
    fn received(socket: &UnixDatagram) -> Vec<(String, String)> {
        let mut buffer = vec![0; 1 << 20];
        let length = socket.recv(&mut buffer).unwrap();
        let (mut rest, mut fields) = (&buffer[..length], Vec::new());
        while let Some(at) = rest.iter().position(|&byte| byte == b'\n') {
            let name = String::from_utf8(rest[..at].to_vec()).unwrap();
            let size = u64::from_le_bytes(rest[at + 1..at + 9].try_into().unwrap()) as usize;
            fields.push((name, String::from_utf8(rest[at + 9..at + 9 + size].to_vec()).unwrap()));
            rest = &rest[at + 9 + size + 1..];
        }
        fields
    }

    #[test]
    fn a_record_has_fields_and_reads_like_a_line() {
        let at = tempfile::tempdir().unwrap();
        let path = at.path().join("socket");
        let socket = UnixDatagram::bind(&path).unwrap();
        let journal = Journal::connect(&path).unwrap();
        let log = tracing_subscriber::registry().with(journal);
        tracing::subscriber::with_default(log, || {
            let job = "a \"b\"\nLOCKSTEP_JOB=forged";
            tracing::info!(job, target = "sync@gpu02:/data", bytes = 7_u64, took.ms = 3, "published");
            tracing::warn!(path = "x".repeat(600_000), "{}", "é".repeat(10_000));
        });
        let line = r#"INFO published job="a \"b\"\nLOCKSTEP_JOB=forged" target="sync@gpu02:/data" bytes=7 took.ms=3"#;
        let expected = [
            ("PRIORITY", "6"),
            ("SYSLOG_IDENTIFIER", "lockstep"),
            ("MESSAGE", line),
            ("LOCKSTEP_JOB", "a \"b\"\nLOCKSTEP_JOB=forged"),
            ("LOCKSTEP_TARGET", "sync@gpu02:/data"),
            ("LOCKSTEP_BYTES", "7"),
            ("LOCKSTEP_TOOK_MS", "3"),
        ];
        assert_eq!(received(&socket), expected.map(|(name, value)| (name.to_owned(), value.to_owned())));
        // What is too much for the socket is cut off, not lost.
        let long = received(&socket);
        assert_eq!((long[0].1.as_str(), long[2].1.len() <= SHORT, long[3].1.len()), ("4", true, SHORT));
        assert!(Journal::connect(&at.path().join("none")).is_none());
    }
}
