//! One connection as the listener sees it: starts its process, answers its questions, and ends it.
//!
//! What always holds: nothing that a process says concerns another connection; the listener never waits for a process but in the
//! task of its connection, and not without end; and a process that says what it should not, or does not end when it must, is killed.

use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;
use std::os::unix::process::ExitStatusExt as _;
use std::pin::Pin;
use std::process::ExitStatus;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::io::AsyncWriteExt as _;
use tokio::net::TcpStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::process::Child;

use super::confine::Confinement;
use super::limits::{Permit, SessionPermit};
use super::listener::{Server, SessionStart};
use super::live::{Live, Refused, reasons, short};
use super::login::{self, Admitted, Decided};
use super::pace::Pace;
use super::penalties::Fault;
use super::process::Level;
use super::process::message::{Answer, Asked, FROM_PROCESS_MAX, Frames, FromProcess, ToProcess, frame, origin};
use super::spawn;
use crate::audit::{AuditRecord, Outcome};
use crate::error::{Escaped, in_words};
use crate::scan::names;

/// How long a process may take to end when its client has gone, or is to go: the client hears why for a second of it.
const END: Duration = Duration::from_secs(3);
/// Why somebody is let go who does not log in.
const LATE: &str = "no login in time";
/// How long a process may take to read what it is told.
const READ: Duration = Duration::from_secs(10);
/// So many messages of one process are looked at in a second.
const MESSAGES: u32 = 5000;
/// So many lines of one process are logged in a second.
const LINES: u32 = 200;
/// So many kinds of requests are told of.
const KINDS: usize = 32;

/// Serves until either side ends it.
pub(super) async fn serve(server: Arc<Server>, socket: TcpStream, peer: SocketAddr, number: u64, permit: Permit) {
    let (child, control, lane) = match spawn::start(socket, peer, number).await {
        Ok(started) => started,
        Err(error) => {
            tracing::error!(%peer, "a connection gets no process: {}", in_words(&error));
            return;
        }
    };
    let live = Arc::new(Live::new(peer, Some(lane)));
    let registered = server.live.add(number, &live);
    let (from, to) = control.into_split();
    let connection = Connection {
        server: &server,
        live: &live,
        permit: Some(permit),
        child,
        frames: Frames::new(from, FROM_PROCESS_MAX),
        to,
        admitted: None,
        start: None,
        sessions: HashMap::new(),
        number: 0,
        said: HashSet::new(),
        messages: Pace::new(MESSAGES),
        lines: Pace::new(LINES),
        told: false,
        late: false,
        deadline: None,
    };
    connection.run().await;
    drop(registered);
}

/// A session that has a place.
struct Place {
    _permit: SessionPermit,
    begun: Instant,
}

/// What is worked out for a question.
enum Worked {
    Offered(Result<(), String>),
    Proven(Decided),
    /// Whether the login is recorded.
    Recorded(Box<Admitted>, Confinement, bool),
    Name(names::Found),
}

type Work = Pin<Box<dyn Future<Output = (u64, Worked)> + Send>>;

/// Why the listener is done with a process.
enum Over {
    /// It has closed its end.
    Closed,
    /// It does what it should not, or does not end.
    Killed(String),
}

struct Connection<'s> {
    server: &'s Arc<Server>,
    live: &'s Arc<Live>,
    permit: Option<Permit>,
    child: Child,
    frames: Frames<OwnedReadHalf>,
    to: OwnedWriteHalf,
    /// Who may log in, until the process is confined and it is recorded.
    admitted: Option<Box<Admitted>>,
    start: Option<SessionStart>,
    sessions: HashMap<u64, Place>,
    number: u64,
    said: HashSet<String>,
    messages: Pace,
    lines: Pace,
    /// The process was told to end.
    told: bool,
    /// That was since nobody had logged in in time.
    late: bool,
    /// When it is killed.
    deadline: Option<Instant>,
}

impl Connection<'_> {
    async fn run(mut self) {
        let over = self.follow().await;
        let killed = match over {
            Over::Closed => None,
            Over::Killed(reason) => {
                let _ = self.child.start_kill();
                Some(reason)
            }
        };
        let status = match tokio::time::timeout(END, self.child.wait()).await {
            Ok(status) => status.ok(),
            Err(_) => {
                let _ = self.child.start_kill();
                self.child.wait().await.ok()
            }
        };
        // Places and what is said of them go before the end of the connection is told.
        for (_, place) in std::mem::take(&mut self.sessions) {
            self.session_ended(&place, 0, 0, Some("its process is gone".into()));
        }
        if !self.live.is_gone() {
            let why = killed.unwrap_or_else(|| how(status));
            tracing::error!(peer = %self.live.peer, why, "the process of a connection ended before it");
            // Whoever brings a process down before a login is not to do so again and again.
            self.punish(Some(Fault::Breach));
            self.report(Some(why));
        }
    }

    /// Does what there is to do until the process is gone or has to go.
    async fn follow(&mut self) -> Over {
        let (server, live) = (self.server, self.live);
        let settings = server.settings();
        if let Err(error) = self.write(&settings.setup).await {
            return error;
        }
        let (late, idle) = (late(live, settings.limits.login_grace), idle(server, live));
        tokio::pin!(late, idle);
        let (mut questions, mut channels) = (live.questions(), server.channels.subscribe());
        let mut work: Option<Work> = None;
        loop {
            let deadline = self.deadline;
            let done = tokio::select! {
                message = self.frames.next(), if work.is_none() => match message {
                    Ok(Some(message)) => self.take(message).await.map(|asked| work = asked),
                    Ok(None) => Err(Over::Closed),
                    Err(error) => Err(Over::Killed(format!("it says what it should not: {}", in_words(&error)))),
                },
                (number, worked) = worked(&mut work) => {
                    work = None;
                    self.answer(number, worked).await
                }
                reason = live.ended(), if !self.told => {
                    (self.told, self.late) = (true, reason == LATE);
                    self.end_by(if live.is_gone() { server.settings().limits.stop_grace } else { END });
                    self.say(&ToProcess::End(reason)).await
                }
                _ = questions.changed() => {
                    let number = *questions.borrow_and_update();
                    self.say(&ToProcess::HowQuiet(number)).await
                }
                _ = channels.changed() => {
                    let number = *channels.borrow_and_update();
                    self.say(&ToProcess::Channels(number)).await
                }
                () = &mut late => Ok(()),
                () = &mut idle => Ok(()),
                () = until(deadline) => Err(Over::Killed("it did not end when it had to".into())),
            };
            if let Err(over) = done {
                return over;
            }
        }
    }

    fn end_by(&mut self, within: Duration) {
        let deadline = Instant::now() + within;
        self.deadline = Some(self.deadline.map_or(deadline, |earlier| earlier.min(deadline)));
    }

    async fn write(&mut self, bytes: &[u8]) -> Result<(), Over> {
        match tokio::time::timeout(READ, self.to.write_all(bytes)).await {
            Ok(Ok(())) => Ok(()),
            // It has gone; what it said last may still be there to be read.
            Ok(Err(_)) => Ok(()),
            Err(_) => Err(Over::Killed("it does not read what it is told".into())),
        }
    }

    async fn say(&mut self, message: &ToProcess) -> Result<(), Over> {
        let bytes = frame(message).map_err(|error| Over::Killed(in_words(&error)))?;
        self.write(&bytes).await
    }

    /// Takes a message; what has to be worked out for it is given back.
    async fn take(&mut self, message: FromProcess) -> Result<Option<Work>, Over> {
        if !self.messages.one() {
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
        match message {
            FromProcess::Asked(number, asked) => return self.asked(number, asked).await,
            FromProcess::Refused(reason) => self.live.refuse(&Escaped(reason.as_bytes()).to_string(), None),
            FromProcess::NotAllowed { what, detail } => self.not_allowed(&what, &detail),
            FromProcess::NoSession { number, reason } => {
                if self.sessions.remove(&number).is_some() {
                    let (user, reason) = (self.user(), clean(&reason));
                    tracing::error!(peer = %self.live.peer, user, reason, "no session");
                }
            }
            FromProcess::SessionEnded { number, received, sent, error } => {
                let place = self.sessions.remove(&number).ok_or_else(|| misplaced("the end of a session"))?;
                self.session_ended(&place, received, sent, error.map(|error| clean(&error)));
                if self.live.is_gone() && self.sessions.is_empty() {
                    self.end_by(END);
                }
            }
            FromProcess::Quiet { number, milliseconds } => {
                self.live.answered(number, Duration::from_millis(milliseconds));
            }
            FromProcess::Said { level, text } => self.log(level, &text),
            FromProcess::Ended { fault, why } => {
                if self.live.is_gone() {
                    return Err(misplaced("its end, twice"));
                }
                self.live.leave();
                self.punish(fault);
                self.report(why.map(|why| clean(&why)));
                if self.sessions.is_empty() {
                    self.end_by(END);
                } else {
                    // The place is another client's; those of the sessions are not.
                    drop(self.permit.take());
                    self.deadline = self.told.then(|| Instant::now() + self.server.settings().limits.stop_grace);
                }
            }
        }
        Ok(None)
    }

    async fn asked(&mut self, number: u64, asked: Asked) -> Result<Option<Work>, Over> {
        let logged_in = self.live.login.get().is_some();
        let (server, peer) = (Arc::clone(self.server), self.live.peer);
        let blocking = |work: Box<dyn FnOnce() -> Worked + Send>| -> Work {
            Box::pin(async move {
                let worked = tokio::task::spawn_blocking(work).await;
                (number, worked.unwrap_or_else(|error| Worked::Offered(Err(error.to_string()))))
            })
        };
        Ok(Some(match asked {
            Asked::Offered { user, key } if !logged_in => {
                let live = Arc::clone(self.live);
                blocking(Box::new(move || Worked::Offered(login::offered(&server, &live, &user, &key))))
            }
            Asked::Proven { user, shown } if !logged_in && self.admitted.is_none() => {
                let live = Arc::clone(self.live);
                blocking(Box::new(move || Worked::Proven(login::proven(&server, &live, &user, &shown))))
            }
            Asked::Confined(result) if !logged_in => {
                let admitted = self.admitted.take().ok_or_else(|| misplaced("that it is confined"))?;
                match result {
                    Ok(confinement) => {
                        // Keys that were refused in this connection before this one was taken.
                        let reason = self.live.refusals().map(|refused| format!("before it: {refused}"));
                        Box::pin(async move {
                            let login = AuditRecord {
                                action: "login".into(),
                                result: Some(Outcome::Success),
                                reason,
                                ..server.record_of(&admitted.granted.start, peer)
                            };
                            let recorded = server.recorder.must(login).await;
                            (number, Worked::Recorded(admitted, confinement, recorded))
                        })
                    }
                    Err(reason) => {
                        let (user, reason) = (&admitted.login.user.name, clean(&reason));
                        tracing::error!(%peer, user, reason, "a session cannot be confined");
                        login::refuse(self.live, user, &admitted.login.proof, &format!("not confined: {reason}"));
                        let reason = "the server cannot confine a session; its log says why".to_owned();
                        return self.say(&ToProcess::Answer(number, Answer::No(reason))).await.map(|()| None);
                    }
                }
            }
            Asked::Session if logged_in && !self.live.is_gone() => {
                let answer = self.session();
                return self.say(&ToProcess::Answer(number, answer)).await.map(|()| None);
            }
            Asked::Attach(token) if logged_in && !self.live.is_gone() => {
                let attached = origin(&token).ok_or("no such run");
                let attached = attached.and_then(|number| self.server.live.attach(self.live, number));
                let answer = attached.map_or_else(|reason| Answer::No(reason.to_owned()), |()| Answer::Yes);
                return self.say(&ToProcess::Answer(number, answer)).await.map(|()| None);
            }
            Asked::Name(question) if logged_in => blocking(Box::new(move || Worked::Name(names::look_up(&question)))),
            _ => return Err(misplaced("a question")),
        }))
    }

    /// A place for a session, where there is one.
    fn session(&mut self) -> Answer {
        let stopping = if self.server.stopping() { Err("the server stops") } else { Ok(()) };
        let user = self.user();
        match stopping.and_then(|()| self.server.limits.session(&user)) {
            Ok(permit) => {
                self.number += 1;
                self.sessions.insert(self.number, Place { _permit: permit, begun: Instant::now() });
                self.live.touch();
                Answer::Place(self.number)
            }
            Err(reason) => Answer::No(reason.to_owned()),
        }
    }

    async fn answer(&mut self, number: u64, worked: Worked) -> Result<(), Over> {
        let answer = match worked {
            Worked::Offered(Ok(())) => Answer::Yes,
            Worked::Offered(Err(reason)) => Answer::No(reason),
            Worked::Proven(Ok(admitted)) => {
                let granted = Box::new(admitted.granted.clone());
                self.admitted = Some(admitted);
                Answer::Granted(granted)
            }
            Worked::Proven(Err(reason)) => Answer::No(reason),
            Worked::Recorded(admitted, confinement, recorded) => self.log_in(*admitted, &confinement, recorded),
            Worked::Name(found) => Answer::Name(found),
        };
        self.say(&ToProcess::Answer(number, answer)).await
    }

    fn log_in(&mut self, admitted: Admitted, confinement: &Confinement, recorded: bool) -> Answer {
        let Admitted { login, granted, settings } = admitted;
        let (peer, user, key) = (self.live.peer, login.user.name.clone(), login.proof.describe());
        if !recorded {
            let reason = "the audit log cannot be written";
            login::refuse(self.live, &user, &login.proof, reason);
            return Answer::No(reason.to_owned());
        }
        if self.live.login.set(login).is_err() {
            return Answer::No("this connection has logged in already".into());
        }
        // RACE: who reloads replaces the settings first and then looks at those that have logged in. Either it saw
        // this login, or the new settings are seen here.
        if !Arc::ptr_eq(&settings, &self.server.settings()) {
            self.live.end("the configuration was reloaded during the login; try again");
        }
        let confined = clean(&confinement.to_string());
        tracing::info!(%peer, user, key, confined, "logged in");
        self.start = Some(granted.start);
        if let Some(permit) = &self.permit {
            permit.logged_in();
        }
        self.live.touch();
        Answer::Yes
    }

    fn user(&self) -> String {
        self.start.as_ref().map(|start| start.user.clone()).unwrap_or_default()
    }

    fn not_allowed(&mut self, what: &str, detail: &str) {
        let Some(start) = &self.start else { return };
        let (what, detail) = (short(&clean(what), 64), short(&clean(detail), 200));
        if self.said.len() >= KINDS || !self.said.insert(what.clone()) {
            return;
        }
        tracing::warn!(peer = %self.live.peer, user = start.user, what, detail, "request refused");
        let reason = Some(if detail.is_empty() { what } else { format!("{what}: {detail}") });
        let (record, result) = (self.server.record_of(start, self.live.peer), Some(Outcome::Failure));
        self.server.recorder.note(AuditRecord { action: "refuse".into(), result, reason, ..record });
    }

    /// Says what went through a session.
    fn session_ended(&self, place: &Place, received: u64, sent: u64, error: Option<String>) {
        self.live.touch();
        let Some(start) = &self.start else { return };
        let seconds = place.begun.elapsed().as_secs_f64();
        let (peer, user) = (self.live.peer, &start.user);
        match &error {
            None => tracing::info!(%peer, user, received, sent, seconds, "session ended"),
            Some(error) => tracing::warn!(%peer, user, received, sent, seconds, error, "session ended"),
        }
        let why = error.map(|error| format!("; {error}")).unwrap_or_default();
        let result = Some(if why.is_empty() { Outcome::Success } else { Outcome::Failure });
        let reason = Some(format!("received {received} and sent {sent} bytes in {seconds:.1} s{why}"));
        let record = self.server.record_of(start, peer);
        self.server.recorder.note(AuditRecord { action: "session".into(), result, reason, ..record });
    }

    /// A line of the process, as one of this connection.
    fn log(&mut self, level: Level, text: &str) {
        if !self.lines.one() {
            return;
        }
        let (peer, text) = (self.live.peer, clean(text));
        let text = match std::mem::take(&mut self.lines.over) {
            0 => text,
            over => format!("{text} (and {over} lines before it that came too fast)"),
        };
        match level {
            Level::Error => tracing::error!(%peer, "{text}"),
            Level::Warn => tracing::warn!(%peer, "{text}"),
            Level::Info => tracing::info!(%peer, "{text}"),
            Level::Debug => tracing::debug!(%peer, "{text}"),
        }
    }

    /// Has an address from which nobody logged in pay for it; but not for what the listener ended by itself.
    fn punish(&self, fault: Option<Fault>) {
        let fault = match (self.told, self.late) {
            (_, true) => Some(Fault::Late),
            (true, false) => None,
            (false, false) => fault,
        };
        if let Some(fault) = fault.filter(|_| self.live.login.get().is_none()) {
            let refused = self.live.refusals().is_some();
            self.server.door.punish(self.live.peer.ip(), if refused { Fault::FailedLogin } else { fault });
        }
    }

    /// One line for a connection: who it was, or why it did not become anybody. In the record each that was refused has its own.
    fn report(&self, why: Option<String>) {
        let (server, live, peer) = (self.server, self.live, self.live.peer);
        if let Some(login) = live.login.get() {
            let why = why.unwrap_or_else(|| "by the client".into());
            tracing::info!(%peer, user = login.user.name, why, "connection ended");
            let actor = format!("{}@{}", login.user.name, peer.ip());
            let (login, reason) =
                (Some(Box::new(login.proof.login(peer))), Some(format!("ended: {}", short(&why, 1000))));
            let record = AuditRecord { action: "connection".into(), login, reason, ..server.record(&actor, peer) };
            server.recorder.note(AuditRecord { result: Some(Outcome::Success), ..record });
            return;
        }
        let mut refused = live.refused();
        if refused.is_empty() {
            let Some(why) = why else {
                tracing::info!(%peer, "connection ended without a login");
                let (result, reason) = (Some(Outcome::Failure), Some("ended without a login".into()));
                let record = AuditRecord { action: "connection".into(), result, reason, ..server.record("", peer) };
                server.recorder.note_stranger([record]);
                return;
            };
            refused.push(Refused { reason: short(&why, 1000), claim: None });
        }
        tracing::warn!(%peer, reason = reasons(&refused), "no login");
        server.recorder.note_stranger(refused.into_iter().map(|Refused { reason, claim }| {
            let (action, result) = ("refuse".into(), Some(Outcome::Failure));
            let record = AuditRecord { action, result, reason: Some(reason), ..server.record("", peer) };
            match claim {
                Some((user, login)) => {
                    let actor = format!("{user}@{}", peer.ip().to_canonical());
                    AuditRecord { actor, login: Some(Box::new(login)), ..record }
                }
                None => record,
            }
        }));
    }
}

fn misplaced(what: &str) -> Over {
    Over::Killed(format!("it says what it should not: {what}"))
}

/// What a process says is text, whatever it holds.
fn clean(text: &str) -> String {
    Escaped(text.as_bytes()).to_string()
}

/// How a process ended that had not said so.
fn how(status: Option<ExitStatus>) -> String {
    match status.map(|status| (status.signal(), status.code())) {
        Some((Some(signal), _)) => format!("its process was ended by signal {signal}"),
        Some((_, Some(code))) => format!("its process ended with code {code}"),
        _ => "its process is gone".to_owned(),
    }
}

async fn worked(work: &mut Option<Work>) -> (u64, Worked) {
    match work {
        Some(work) => work.await,
        None => std::future::pending().await,
    }
}

async fn until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline.into()).await,
        None => std::future::pending().await,
    }
}

/// Ends it when nobody has logged in in time.
async fn late(live: &Live, grace: Duration) {
    tokio::time::sleep(grace).await;
    if live.login.get().is_none() {
        live.end(LATE);
    }
    std::future::pending().await
}

/// Ends it when nothing was done for too long.
async fn idle(server: &Server, live: &Live) {
    loop {
        let limit = server.settings().limits.idle_timeout;
        let quiet = server.live.quiet(live, limit).await;
        if live.login.get().is_some() && quiet >= limit {
            live.end("nothing was done for too long");
            std::future::pending::<()>().await;
        }
        // A reload may have made it shorter.
        let wait = limit.saturating_sub(quiet).clamp(Duration::from_millis(10), Duration::from_secs(10));
        tokio::time::sleep(wait).await;
    }
}

#[cfg(test)]
mod tests;
