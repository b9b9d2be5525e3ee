//! What a service tells systemd, and the sockets that it gets from there. Outside of systemd all of it does nothing.
//!
//! The environment that says so stays as it is: children could speak too, but the units let only the main process be heard.

use std::net::{SocketAddr, TcpListener};
use std::time::{Duration, Instant};

use listenfd::ListenFd;
use sd_notify::NotifyState;

use super::Failure;
use crate::error::in_words;

/// Longer is cut off: it is one line of `systemctl status`.
const MAX_STATUS_CHARS: usize = 400;
/// How often a status that has changed is told.
const PACE: Duration = Duration::from_secs(1);

fn notify(state: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(state) {
        tracing::warn!("systemd cannot be told of this service's state: {}", in_words(&error));
    }
}

/// What was asked for runs.
pub(super) fn ready() {
    notify(&[NotifyState::Ready]);
}

/// The line that `systemctl status` shows.
pub(super) fn status(text: &str) {
    notify(&[NotifyState::Status(&line(text))]);
}

/// A reload has begun; [`ready`] ends it.
pub(super) fn reloading() {
    match NotifyState::monotonic_usec_now() {
        Ok(now) => notify(&[NotifyState::Reloading, now]),
        Err(_) => notify(&[NotifyState::Reloading]),
    }
}

/// It stops from here on.
pub(super) fn stopping() {
    notify(&[NotifyState::Stopping]);
}

/// Within which time systemd wants to hear that this process works; `None` where it does not ask.
pub(super) fn watchdog_interval() -> Option<Duration> {
    sd_notify::watchdog_enabled().filter(|interval| !interval.is_zero())
}

/// It works.
pub(super) fn alive() {
    notify(&[NotifyState::Watchdog]);
}

/// Whether standard error is the journal, which has the time of each line by itself.
pub(super) fn to_journal() -> bool {
    let Ok(stream) = std::env::var("JOURNAL_STREAM") else { return false };
    // The variable is inherited by children whose standard error is something else.
    rustix::fs::fstat(std::io::stderr()).is_ok_and(|found| stream == format!("{}:{}", found.st_dev, found.st_ino))
}

/// One line without control characters: a line end would begin another message.
fn line(text: &str) -> String {
    let text =
        text.split(char::is_control).map(str::trim).filter(|part| !part.is_empty()).collect::<Vec<_>>().join(" ");
    if text.chars().count() <= MAX_STATUS_CHARS {
        return text;
    }
    text.chars().take(MAX_STATUS_CHARS - 1).chain(['…']).collect()
}

/// Tells from time to time that a service works and what it does.
pub(super) struct Pulse {
    watchdog: Option<Duration>,
    beaten: Option<Instant>,
    looked: Option<Instant>,
    told: String,
}

impl Pulse {
    pub(super) fn new() -> Pulse {
        // Half of the time is what sd_watchdog_enabled(3) asks for; a third leaves room for a machine that is busy.
        let watchdog = watchdog_interval().map(|interval| interval / 3);
        Pulse { watchdog, beaten: None, looked: None, told: String::new() }
    }

    /// To be called often, while the service works and only then.
    pub(super) fn beat(&mut self, status_text: impl FnOnce() -> String) {
        let due = |last: Option<Instant>, every: Duration| last.is_none_or(|last| last.elapsed() >= every);
        if let Some(every) = self.watchdog
            && due(self.beaten, every)
        {
            alive();
            self.beaten = Some(Instant::now());
        }
        if due(self.looked, PACE) {
            self.looked = Some(Instant::now());
            self.say(status_text());
        }
    }

    /// Tells a status at once, where it is another one.
    pub(super) fn say(&mut self, text: String) {
        if text != self.told {
            status(&text);
            self.told = text;
        }
    }
}

/// The listening sockets of a socket unit, in its order; empty where there is none. To be called once, before there are threads.
///
/// # Errors
/// What was passed is something else.
pub(super) fn sockets() -> Result<Vec<(TcpListener, SocketAddr)>, Failure> {
    let mut passed = ListenFd::from_env();
    let wrong = |number: usize, why: &str| {
        Failure::usage(format!(
            "descriptor {} that systemd passed is not a TCP socket that listens ({why}); the socket unit needs \
             ListenStream=PORT or ADDRESS:PORT, and no Accept=yes",
            number + 3
        ))
    };
    let mut sockets = Vec::new();
    for number in 0..passed.len() {
        let socket = passed.take_tcp_listener(number).map_err(|error| wrong(number, &in_words(&error)))?;
        let socket = socket.ok_or_else(|| wrong(number, "it is taken"))?;
        let address = socket.local_addr().map_err(|error| wrong(number, &in_words(&error)))?;
        let listens = rustix::net::sockopt::socket_acceptconn(&socket).unwrap_or(false);
        if !listens {
            return Err(wrong(number, "it is a connection"));
        }
        socket.set_nonblocking(true).map_err(|error| wrong(number, &in_words(&error)))?;
        sockets.push((socket, address));
    }
    Ok(sockets)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_status_is_one_short_line() {
        assert_eq!(line("a\nREADY=1\r\n\tb \u{1b}[2J"), "a READY=1 b [2J");
        let long = line(&"ä".repeat(1000));
        assert_eq!((long.chars().count(), long.ends_with('…')), (MAX_STATUS_CHARS, true));
    }
}
