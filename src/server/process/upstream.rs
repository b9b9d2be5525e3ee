//! What the process of a connection asks and tells the listener.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use tokio::io::AsyncWriteExt as _;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{mpsc, oneshot};

use super::message::{
    Answer, Asked, FROM_PROCESS_MAX, Frames, FromProcess, Granted, Level, Shown, ToProcess, frame, key_text,
};
use super::own::Own;
use crate::scan::names::{Found, Question};
use crate::server::access::Proof;
use crate::server::confine::Confinement;
use crate::server::live::short;
use crate::server::penalties::Fault;
use russh::keys::ssh_key::public::KeyData;

/// Lines of the log that wait to be sent; what comes beyond is counted.
const LINES_WAITING: usize = 512;
/// Of one line so many characters.
const LINE_MAX: usize = 8000;
/// No user's name is longer: one that is cut off is nobody's.
const NAME_MAX: usize = 1000;

const GONE: &str = "the server is gone";

enum Sent {
    Message(Vec<u8>),
    /// A line of the log, which is counted.
    Line(Vec<u8>),
    /// Somebody waits until all before it is sent.
    Flush(oneshot::Sender<()>),
}

/// The way to the listener. Messages are sent in the order in which they were given.
#[derive(Clone)]
pub struct Upstream {
    out: mpsc::UnboundedSender<Sent>,
    shared: Arc<Waiting>,
}

#[derive(Default)]
struct Waiting {
    answers: Mutex<HashMap<u64, oneshot::Sender<Answer>>>,
    number: AtomicU64,
    lines: AtomicUsize,
    lost: AtomicUsize,
}

impl Waiting {
    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<u64, oneshot::Sender<Answer>>> {
        self.answers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What [`Upstream`] was given, until there are tasks to send it.
pub struct Outgoing(mpsc::UnboundedReceiver<Sent>);

impl Upstream {
    /// Takes messages from now on; they are sent when the process runs.
    pub fn new() -> (Upstream, Outgoing) {
        let (out, outgoing) = mpsc::unbounded_channel();
        (Upstream { out, shared: Arc::default() }, Outgoing(outgoing))
    }

    fn tell(&self, message: &FromProcess) {
        match frame(message) {
            Ok(bytes) if bytes.len() <= FROM_PROCESS_MAX => drop(self.out.send(Sent::Message(bytes))),
            // Texts are cut before; a client's key may still be too long.
            _ => tracing::error!("a message to the listener is too long"),
        }
    }

    fn question(&self, asked: Asked) -> oneshot::Receiver<Answer> {
        let (sender, answer) = oneshot::channel();
        let number = self.shared.number.fetch_add(1, Ordering::Relaxed);
        if let Ok(bytes) = frame(&FromProcess::Asked(number, asked))
            && bytes.len() <= FROM_PROCESS_MAX
        {
            self.shared.lock().insert(number, sender);
            let _ = self.out.send(Sent::Message(bytes));
        }
        // Else the sender is dropped, which is an answer too.
        answer
    }

    async fn ask(&self, asked: Asked) -> Result<Answer, String> {
        match self.question(asked).await {
            Ok(Answer::No(reason)) => Err(reason),
            Ok(answer) => Ok(answer),
            Err(_) => Err(GONE.into()),
        }
    }

    /// Whether a signature with this key is worth a client's while.
    pub(super) async fn offered(&self, user: &str, key: &KeyData) -> Result<(), String> {
        let (user, key) = (short(user, NAME_MAX), key_text(key)?);
        self.ask(Asked::Offered { user, key }).await.map(drop)
    }

    /// For whom this process is from now on, if the client that has proven this may log in.
    pub(super) async fn proven(&self, user: &str, proof: &Proof) -> Result<Granted, String> {
        let (user, shown) = (short(user, NAME_MAX), Shown::of(proof)?);
        match self.ask(Asked::Proven { user, shown }).await? {
            Answer::Granted(granted) => Ok(*granted),
            _ => Err(GONE.into()),
        }
    }

    /// Whether the login is recorded, and the client may go on.
    pub(super) async fn confined(&self, result: Result<Confinement, String>) -> Result<(), String> {
        self.ask(Asked::Confined(result)).await.map(drop)
    }

    /// A place for a session: its number.
    pub(super) async fn session(&self) -> Result<u64, String> {
        match self.ask(Asked::Session).await? {
            Answer::Place(number) => Ok(number),
            _ => Err(GONE.into()),
        }
    }

    /// Whether the process that has this run works for this one from now on; blocks.
    pub(super) fn attach(&self, token: &[u8]) -> bool {
        matches!(self.question(Asked::Attach(token.to_vec())).blocking_recv(), Ok(Answer::Yes))
    }

    /// Asks about users and groups; blocks.
    pub(super) fn look_up(&self, question: Question) -> Found {
        match self.question(Asked::Name(question)).blocking_recv() {
            Ok(Answer::Name(found)) => found,
            _ => Found::Nothing,
        }
    }

    /// Something about the client was refused.
    pub fn refused(&self, reason: &str) {
        self.tell(&FromProcess::Refused(short(reason, 1000)));
    }

    pub(super) fn not_allowed(&self, what: &str, detail: &str) {
        self.tell(&FromProcess::NotAllowed { what: what.into(), detail: short(detail, 200) });
    }

    pub(super) fn no_session(&self, number: u64, reason: &str) {
        self.tell(&FromProcess::NoSession { number, reason: short(reason, LINE_MAX) });
    }

    pub(super) fn session_ended(&self, number: u64, received: u64, sent: u64, error: Option<String>) {
        let error = error.map(|error| short(&error, LINE_MAX));
        self.tell(&FromProcess::SessionEnded { number, received, sent, error });
    }

    pub(super) fn ended(&self, fault: Option<Fault>, why: Option<String>) {
        self.tell(&FromProcess::Ended { fault, why: why.map(|why| short(&why, LINE_MAX)) });
    }

    /// A line for the log.
    pub fn say(&self, level: Level, text: &str) {
        if self.shared.lines.load(Ordering::Relaxed) >= LINES_WAITING {
            self.shared.lost.fetch_add(1, Ordering::Relaxed);
            return;
        }
        let mut text = short(text, LINE_MAX);
        match self.shared.lost.swap(0, Ordering::Relaxed) {
            0 => {}
            lost => text.push_str(&format!(" (and {lost} lines before it that came too fast)")),
        }
        if let Ok(bytes) = frame(&FromProcess::Said { level, text }) {
            self.shared.lines.fetch_add(1, Ordering::Relaxed);
            let _ = self.out.send(Sent::Line(bytes));
        }
    }

    /// Waits until all that was given is sent.
    pub(super) async fn flush(&self) {
        let (sender, sent) = oneshot::channel();
        if self.out.send(Sent::Flush(sender)).is_ok() {
            let _ = sent.await;
        }
    }

    /// Sends until the listener is gone.
    pub(super) async fn send(&self, outgoing: Outgoing, mut to: OwnedWriteHalf) {
        let Outgoing(mut messages) = outgoing;
        while let Some(sent) = messages.recv().await {
            let bytes = match sent {
                Sent::Message(bytes) => bytes,
                Sent::Line(bytes) => {
                    self.shared.lines.fetch_sub(1, Ordering::Relaxed);
                    bytes
                }
                Sent::Flush(waiting) => {
                    let _ = waiting.send(());
                    continue;
                }
            };
            if to.write_all(&bytes).await.is_err() {
                return;
            }
        }
    }

    /// Does what the listener says, until it is gone.
    pub(super) async fn follow(&self, mut frames: Frames<OwnedReadHalf>, own: Arc<Own>) {
        while let Ok(Some(message)) = frames.next().await {
            match message {
                ToProcess::Answer(number, answer) => {
                    if let Some(waiting) = self.shared.lock().remove(&number) {
                        let _ = waiting.send(answer);
                    }
                }
                ToProcess::HowQuiet(number) => {
                    let milliseconds = u64::try_from(own.quiet().as_millis()).unwrap_or(u64::MAX);
                    self.tell(&FromProcess::Quiet { number, milliseconds });
                }
                ToProcess::Channels(channels) => own.allow(channels),
                ToProcess::End(reason) => own.end(&reason),
            }
        }
        // Who waits for an answer gets none.
        self.shared.lock().clear();
    }
}
