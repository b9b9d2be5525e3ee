//! How a directory of another machine is reached.

use std::path::PathBuf;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use super::Failure;
use super::connections::Connections;
use super::login::{Ssh, connect, failed};
use super::patience::patiently;
use super::transfer::{MOST_TRANSFERS, USUAL_TRANSFERS};
use crate::codec::CompressOptions;
use crate::endpoint::agent::{self, AgentSource, AgentTarget};
use crate::endpoint::link::{ConnectError, Link, Remote, Way};
use crate::endpoint::stock::{self, StockSource, StockTarget, Verify};
use crate::endpoint::{self, Source, Target, Width};
use crate::error::{Escaped, Exit, chain};
use crate::monitor::{Event, Monitor};

const SHAPE: &str = "[USER@]HOST:PATH (an IPv6 address in brackets: [::1]:PATH)";

/// `[user@]host:path`; IPv6 addresses in brackets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Destination {
    pub(super) user: Option<String>,
    pub(super) host: String,
    pub(super) path: String,
}

impl Destination {
    /// `None` for a path of this machine: one without a colon, or with a slash before it.
    pub(super) fn parse(text: &str) -> Result<Option<Destination>, Failure> {
        let (user, rest) = match text.split_once('@') {
            Some((user, rest)) if !user.contains(['/', ':']) => (Some(user.to_owned()), rest),
            _ => (None, text),
        };
        let (host, path) = if let Some(rest) = rest.strip_prefix('[') {
            match rest.split_once("]:") {
                Some(found) => found,
                None if rest.ends_with(']') => return Err(Failure::usage(format!("'{text}' names no path: {SHAPE}"))),
                None => return Ok(None),
            }
        } else {
            match rest.split_once(':') {
                Some((host, path)) if !host.contains('/') => (host, path),
                _ => return Ok(None),
            }
        };
        let wrong = |why: &str| Err(Failure::usage(format!("'{}' {why}", Escaped(text.as_bytes()))));
        if host.is_empty() || user.as_deref() == Some("") {
            return wrong(&format!("is not {SHAPE}"));
        }
        // An empty variable in a script must not mean everything that the account has.
        if path.is_empty() {
            return wrong("names no path; the home directory of the account there is HOST:.");
        }
        let path = match path.strip_prefix('~') {
            None => path,
            // SFTP knows no '~': what is relative starts at the home directory.
            Some("" | "/") => ".",
            Some(rest) => match rest.strip_prefix('/') {
                Some(rest) => rest.trim_start_matches('/'),
                None => {
                    return wrong(
                        "names a home directory by its user, which is not looked up: write the whole path (or HOST:./~NAME)",
                    );
                }
            },
        };
        Ok(Some(Destination { user, host: host.to_owned(), path: path.to_owned() }))
    }
}

/// What starts lockstep at the other end, unless told otherwise.
pub(super) const REMOTE_COMMAND: &str = "lockstep sftp-server";

/// How a directory of another machine is reached.
#[derive(Debug, Clone, clap::Args)]
pub(super) struct Reach {
    /// What is used at the other end: lockstep (its subsystem, or the command of --remote-command), sftp (a stock SFTP
    /// server), or auto: the first of them that is there
    #[arg(long, value_name = "WAY", default_value = "auto")]
    remote: Ways,
    /// The command that starts lockstep at the other end, where it has no subsystem of that name [default: lockstep
    /// sftp-server]
    #[arg(long, value_name = "COMMAND")]
    remote_command: Option<String>,
    /// How it is proven what a stock SFTP server holds: exec (a command there hashes), read-back (it is read back and
    /// hashed here; no command is run), or auto: exec where the account has a shell
    #[arg(long, value_name = "HOW", default_value = "auto")]
    verify: Proof,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Ways {
    Auto,
    Lockstep,
    Subsystem,
    Exec,
    Sftp,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Proof {
    Auto,
    Exec,
    ReadBack,
}

impl Reach {
    /// An option that was given, and that means nothing where no other machine takes part.
    pub(super) fn given(&self) -> Option<&'static str> {
        let given = [
            (self.remote != Ways::Auto, "--remote"),
            (self.remote_command.is_some(), "--remote-command"),
            (self.verify != Proof::Auto, "--verify"),
        ];
        given.into_iter().find(|(given, _)| *given).map(|(_, option)| option)
    }

    /// The ways to try, in this order.
    pub(super) fn ways(&self) -> Vec<Way> {
        let exec = || Way::LockstepExec(self.remote_command.as_deref().unwrap_or(REMOTE_COMMAND).to_owned());
        match self.remote {
            Ways::Auto => vec![Way::LockstepSubsystem, exec(), Way::SftpSubsystem],
            Ways::Lockstep => vec![Way::LockstepSubsystem, exec()],
            Ways::Subsystem => vec![Way::LockstepSubsystem],
            Ways::Exec => vec![exec()],
            Ways::Sftp => vec![Way::SftpSubsystem],
        }
    }

    fn verify(&self) -> Verify {
        match self.verify {
            Proof::Auto => Verify::Auto,
            Proof::Exec => Verify::Exec,
            Proof::ReadBack => Verify::ReadBack,
        }
    }
}

/// What is there at the other end.
enum Reached {
    Agent(agent::Lanes),
    Stock(stock::Lanes),
}

fn named(way: &Way) -> String {
    match way {
        Way::LockstepSubsystem => "the subsystem 'lockstep'".to_owned(),
        Way::LockstepExec(command) => format!("the command '{}'", Escaped(command.as_bytes())),
        Way::SftpSubsystem => "the subsystem 'sftp'".to_owned(),
    }
}

/// What is said of a host that was named already.
fn without(host: &str, text: String) -> String {
    text.strip_prefix(host).and_then(|rest| rest.strip_prefix(": ")).map_or_else(|| text.clone(), str::to_owned)
}

/// How another machine is spoken to.
pub(super) struct Dial<'a> {
    pub(super) ssh: &'a Ssh,
    pub(super) reach: &'a Reach,
    /// Connections at most; `None` for as many as are usual.
    pub(super) count: Option<u8>,
    pub(super) compress: CompressOptions,
    /// Where connections stay between runs.
    pub(super) kept: Option<&'a Connections>,
    /// Where is kept what is known of a target that cannot tell it.
    pub(super) state: Option<PathBuf>,
}

impl Dial<'_> {
    /// Speaks to what answers on `link`, which was opened by `way`.
    fn lanes(
        &self,
        remote: Arc<dyn Remote>,
        way: &Way,
        link: Arc<dyn Link>,
        root: &[u8],
        verify: Verify,
    ) -> Result<Reached, endpoint::Error> {
        match way {
            Way::SftpSubsystem => {
                // A connection takes about a core at each end.
                let few = std::thread::available_parallelism().is_ok_and(|cores| cores.get() < 4);
                let count = self.count.map_or(if few { 1 } else { USUAL_TRANSFERS }, usize::from);
                stock::Lanes::connect(remote, link, self.width(count), root, verify).map(Reached::Stock)
            }
            _ => {
                let count = self.count.map_or(USUAL_TRANSFERS, usize::from);
                let width = self.width(count);
                agent::Lanes::connect(remote, way, link, width, root, self.compress).map(Reached::Agent)
            }
        }
    }

    /// Where workers have one of `workers` connections.
    fn width(&self, workers: usize) -> Width {
        Width { workers, most: self.count.map_or(MOST_TRANSFERS, usize::from) }
    }

    /// Over a connection that is there from before. One that does not serve any more is forgotten.
    fn again(&self, destination: &Destination, verify: Verify) -> Option<Reached> {
        let kept = self.kept?;
        let (remote, way) = kept.get(destination)?;
        let remote: Arc<dyn Remote> = remote;
        let root = destination.path.as_bytes();
        let link = remote.open(&way, 0).ok();
        let reached = link.and_then(|link| self.lanes(remote, &way, link, root, verify).ok());
        if reached.is_none() {
            kept.forget(destination);
        }
        reached
    }
}

/// The subsystem `sftp`, opened while it is not known yet whether there is a lockstep: a command takes its time to say that it is
/// not there.
struct Ahead(JoinHandle<Result<Arc<dyn Link>, ConnectError>>);

impl Ahead {
    fn start(remote: &Arc<dyn Remote>) -> Option<Ahead> {
        let remote = Arc::clone(remote);
        let open = move || remote.open(&Way::SftpSubsystem, 0);
        std::thread::Builder::new().name("sftp-ahead".to_owned()).spawn(open).ok().map(Ahead)
    }

    fn link(self) -> Option<Arc<dyn Link>> {
        self.0.join().ok()?.ok()
    }
}

/// A host may allow one stream at a time, and takes a moment to end the last: this one is opened when that has ended.
fn after_the_last(
    refused: ConnectError,
    open: impl Fn() -> Result<Arc<dyn Link>, ConnectError>,
) -> Result<Arc<dyn Link>, ConnectError> {
    let mut opened = Err(refused);
    for _ in 0..10 {
        match &opened {
            Err(error) if !error.not_offered && error.exit == Exit::TryAgain => {}
            _ => break,
        }
        std::thread::sleep(Duration::from_millis(50));
        opened = open();
    }
    opened
}

/// Opens connections by the first way in that works.
fn reach(
    destination: &Destination,
    dial: &Dial<'_>,
    verify: Verify,
    monitor: &dyn Monitor,
) -> Result<Reached, Failure> {
    if let Some(reached) = dial.again(destination, verify) {
        return Ok(reached);
    }
    let Dial { ssh, reach, .. } = dial;
    let remote = connect(destination, ssh)?;
    remote.notes().iter().for_each(|note| monitor.event(Event::Detail(note)));
    let host = Arc::new(remote);
    let remote: Arc<dyn Remote> = Arc::clone(&host) as Arc<dyn Remote>;
    let root = destination.path.as_bytes();
    let mut reasons: Vec<(String, String)> = Vec::new();
    let mut ahead = None;
    for way in reach.ways() {
        // What keeps a connection to come back to tries again by itself.
        let open = || match dial.kept {
            None => patiently(monitor, || remote.open(&way, 0)),
            Some(_) => remote.open(&way, 0),
        };
        if matches!(way, Way::LockstepExec(_)) && reach.remote == Ways::Auto {
            ahead = Ahead::start(&remote);
        }
        let opened = match &way {
            Way::SftpSubsystem => ahead.take().and_then(Ahead::link).map_or_else(open, Ok),
            _ => open(),
        };
        let mut went_ahead = false;
        let opened = opened.or_else(|refused| {
            if refused.not_offered || reasons.is_empty() || host.was_lost() {
                return Err(refused);
            }
            let link = ahead.take().and_then(Ahead::link);
            went_ahead = link.is_some();
            drop(link);
            after_the_last(refused, open)
        });
        let link = match opened {
            Ok(link) => link,
            Err(error) if error.not_offered => {
                reasons.push((named(&way), "not offered".to_owned()));
                continue;
            }
            // The stream that was opened ahead may take the host longer to end.
            Err(error) if went_ahead && host.was_crowded() && !host.was_lost() => {
                reasons.push((named(&way), without(&host.describe(), error.message)));
                continue;
            }
            Err(error) => return Err(failed(error)),
        };
        match dial.lanes(Arc::clone(&remote), &way, link, root, verify) {
            Ok(reached) => {
                if let Some(kept) = dial.kept {
                    kept.keep(destination, Arc::clone(&host), way.clone());
                }
                let host = remote.describe();
                for (way, reason) in &reasons {
                    monitor.event(Event::Detail(&format!("{host}: {way}: {reason}")));
                }
                monitor.event(Event::Detail(&format!("{host}: connected to {}", named(&way))));
                if matches!(reached, Reached::Agent(_)) && reach.verify != Proof::Auto {
                    monitor.event(Event::Warning(
                        "--verify is for stock SFTP servers; lockstep at the other end hashes for itself",
                    ));
                }
                return Ok(reached);
            }
            Err(error) if error.exit() == Exit::Trust => return Err(Failure::Endpoint(error)),
            // A cut says nothing of what is offered there: another way in would be another kind of target.
            Err(error) if host.was_lost() => return Err(Failure::Endpoint(error)),
            // A command that is not there, a login shell that prints, a forced command that is another server.
            Err(endpoint::Error::Disconnected { source: Some(source), .. }) => {
                reasons.push((named(&way), without(&host.describe(), source.to_string())));
            }
            Err(endpoint::Error::Protocol { what, .. }) => reasons.push((named(&way), what)),
            Err(error) => reasons.push((named(&way), without(&host.describe(), chain(&error)))),
        }
    }
    // What keeps an account from one way in often keeps it from all.
    let reasons = reasons.into_iter().fold(Vec::<(String, String)>::new(), |mut said, (way, reason)| {
        match said.iter_mut().find(|(_, known)| *known == reason) {
            Some((ways, _)) => *ways = format!("{ways}, {way}"),
            None => said.push((way, reason)),
        }
        said
    });
    let reasons: Vec<String> = reasons.into_iter().map(|(ways, reason)| format!("{ways}: {reason}")).collect();
    Err(Failure::Plain {
        exit: Exit::Usage,
        message: format!(
            "{} cannot be used ({}); enable its 'sftp' subsystem, or install lockstep there: 'Subsystem lockstep \
             /usr/bin/lockstep sftp-server' in its sshd_config",
            remote.describe(),
            reasons.join("; ")
        ),
    })
}

/// A directory of another machine as a target.
pub(super) fn target(
    destination: &Destination,
    dial: &Dial<'_>,
    monitor: &dyn Monitor,
) -> Result<Box<dyn Target>, Failure> {
    Ok(match reach(destination, dial, dial.reach.verify(), monitor)? {
        Reached::Agent(lanes) => Box::new(AgentTarget::new(lanes)),
        Reached::Stock(lanes) => Box::new(StockTarget::new(lanes).keeping_sums_in(dial.state.as_deref())),
    })
}

/// A directory of another machine as a source. No command is run there.
pub(super) fn source(
    destination: &Destination,
    dial: &Dial<'_>,
    monitor: &dyn Monitor,
) -> Result<Box<dyn Source>, Failure> {
    Ok(match reach(destination, dial, Verify::ReadBack, monitor)? {
        Reached::Agent(lanes) => Box::new(AgentSource::new(lanes)),
        Reached::Stock(lanes) => {
            if dial.reach.verify != Proof::Auto {
                monitor
                    .event(Event::Warning("--verify is for what is sent; what is fetched is hashed here as it comes"));
            }
            Box::new(StockSource::new(lanes))
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn destinations_are_told_from_paths() {
        let parsed = |text: &str| {
            Destination::parse(text).unwrap().map(|found| (found.user.unwrap_or_default(), found.host, found.path))
        };
        let remote = |user: &str, host: &str, path: &str| Some((user.to_owned(), host.to_owned(), path.to_owned()));
        for (text, expected) in [
            ("gpu02:/data", remote("", "gpu02", "/data")),
            ("sync@gpu02:data/x", remote("sync", "gpu02", "data/x")),
            ("sync@[fe80::1]:/data", remote("sync", "fe80::1", "/data")),
            ("/data/a:b", None),
            ("./a:b", None),
            ("plain", None),
            ("host:a@b", remote("", "host", "a@b")),
            ("host:~", remote("", "host", ".")),
            ("host:~/", remote("", "host", ".")),
            ("host:~/a/b", remote("", "host", "a/b")),
            ("host:~//a", remote("", "host", "a")),
            ("host:./~a", remote("", "host", "./~a")),
            ("host:a~", remote("", "host", "a~")),
        ] {
            assert_eq!(parsed(text), expected, "{text}");
        }
        for wrong in ["host:", ":path", "@host:path", "host:~user/x", "[::1]", "::1:/x"] {
            assert!(Destination::parse(wrong).is_err(), "{wrong}");
        }
    }
}
