//! One channel: bytes in to a session on a thread of its own, packets out, both bounded.
//!
//! What always holds: the reader never waits for the writer, so that a peer that sends and takes at once does not lock
//! up; when the channel is closed nobody waits for it any more.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use russh::server::Msg;
use russh::{Channel, ChannelMsg, ChannelReadHalf, ChannelWriteHalf};
use tokio::sync::{Notify, mpsc, oneshot, watch};

use super::agent::Output;
use crate::endpoint::surplus::Surplus;

/// A session that is fed the bytes of its channel.
pub trait FedSession: Send {
    /// Takes bytes in any pieces.
    ///
    /// # Errors
    /// When they are no packets.
    fn feed(&mut self, bytes: &[u8]) -> Result<(), String>;
    /// Nothing more will come.
    fn finish(&mut self);
}

/// Reading pauses here while the session is at work.
const IN_SOFT: usize = 16 << 20;
/// A client that sends this much and takes no replies is cut off.
const IN_HARD: usize = 256 << 20;
const OUT_LIMIT: usize = 8 << 20;

struct State {
    inbox: VecDeque<Bytes>,
    in_bytes: usize,
    surplus: Surplus,
    /// There is no room for what this client sends beyond its share.
    crowded: bool,
    out_bytes: usize,
    /// No more input.
    ended: bool,
    /// What is sent goes nowhere.
    closed: bool,
    requests: Packets,
    unanswered: i64,
    /// Those of them that wait for the client to say something.
    resting: i64,
    last: Instant,
    received: u64,
    sent: u64,
}

impl State {
    fn count(&mut self) {
        self.crowded = !self.surplus.hold(self.in_bytes);
    }
}

/// What the reader, the session's thread and the writer share.
pub(super) struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    /// The same for the reader, which is a task.
    room: Notify,
    closed: watch::Sender<bool>,
    packets: mpsc::UnboundedSender<Vec<u8>>,
}

/// What went through a session.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Summary {
    /// Bytes from the client.
    pub(super) received: u64,
    /// Bytes to the client.
    pub(super) sent: u64,
    /// Why it ended, unless by its end.
    pub(super) error: Option<String>,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The next piece of input; blocks.
    fn next(&self) -> Option<Bytes> {
        let mut state = self.lock();
        loop {
            if let Some(bytes) = state.inbox.pop_front() {
                state.in_bytes -= bytes.len();
                state.count();
                self.room.notify_one();
                return Some(bytes);
            }
            if state.ended {
                return None;
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// No more input will come; replies still go out.
    fn end(&self) {
        self.lock().ended = true;
        self.changed.notify_all();
        self.room.notify_one();
    }

    /// The channel is gone; what came before is still worked off.
    fn close(&self) {
        let mut state = self.lock();
        (state.ended, state.closed) = (true, true);
        drop(state);
        self.closed.send_replace(true);
        self.changed.notify_all();
        self.room.notify_one();
    }

    /// Nothing more is to be done for this client.
    pub(super) fn abandon(&self) {
        let mut state = self.lock();
        state.inbox.clear();
        state.in_bytes = 0;
        state.count();
        drop(state);
        self.close();
    }

    fn push(&self, data: Bytes) {
        let mut state = self.lock();
        state.last = Instant::now();
        state.received += data.len() as u64;
        if !state.ended {
            let requests = state.requests.count(&data);
            state.unanswered += requests;
            state.in_bytes += data.len();
            state.count();
            state.inbox.push_back(data);
        }
        drop(state);
        self.changed.notify_all();
    }

    /// Waits until more may be read. `false` when the client takes no replies and its requests pile up.
    async fn wait_for_room(&self) -> bool {
        loop {
            {
                let state = self.lock();
                let sending = state.out_bytes > 0;
                if state.ended || state.in_bytes < IN_SOFT || (sending && state.in_bytes < IN_HARD && !state.crowded) {
                    return true;
                }
                if sending {
                    return false;
                }
            }
            self.room.notified().await;
        }
    }

    fn delivered(&self, length: usize) {
        let mut state = self.lock();
        state.out_bytes -= length;
        state.sent += length as u64;
        state.last = Instant::now();
        drop(state);
        self.changed.notify_all();
        self.room.notify_one();
    }

    /// How long nothing has happened. Work on a request counts as something, a client that takes no replies does not.
    pub(super) fn quiet(&self, now: Instant) -> Duration {
        let state = self.lock();
        if state.unanswered > state.resting && state.out_bytes == 0 && !state.ended {
            return Duration::ZERO;
        }
        now.saturating_duration_since(state.last)
    }
}

impl Output for Shared {
    fn send(&self, packet: Vec<u8>) {
        let mut state = self.lock();
        while state.out_bytes > OUT_LIMIT && !state.closed {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.unanswered -= 1;
        if state.closed {
            return;
        }
        state.out_bytes += packet.len();
        let _ = self.packets.send(packet);
        drop(state);
        self.room.notify_one();
    }

    fn is_gone(&self) -> bool {
        self.lock().closed
    }

    fn rests(&self, rests: bool) {
        let mut state = self.lock();
        state.resting += if rests { 1 } else { -1 };
    }
}

/// Counts packets in a stream of them. Each gets one reply.
#[derive(Default)]
struct Packets {
    length: [u8; 4],
    known: usize,
    left: usize,
}

impl Packets {
    /// How many packets end in these bytes.
    fn count(&mut self, mut bytes: &[u8]) -> i64 {
        let mut ended = 0;
        while let Some((&first, rest)) = bytes.split_first() {
            if self.known < 4 {
                self.length[self.known] = first;
                self.known += 1;
                self.left = u32::from_be_bytes(self.length) as usize;
                bytes = rest;
            } else {
                let taken = self.left.min(bytes.len());
                self.left -= taken;
                bytes = &bytes[taken..];
            }
            if self.known == 4 && self.left == 0 {
                self.known = 0;
                ended += 1;
            }
        }
        ended
    }
}

/// Makes the queue of packets of one session.
pub(super) fn queue() -> (Arc<Shared>, mpsc::UnboundedReceiver<Vec<u8>>) {
    let (packets, receiver) = mpsc::unbounded_channel();
    let state = State {
        inbox: VecDeque::new(),
        in_bytes: 0,
        surplus: Surplus::new(IN_SOFT),
        crowded: false,
        out_bytes: 0,
        ended: false,
        closed: false,
        requests: Packets::default(),
        unanswered: 0,
        resting: 0,
        last: Instant::now(),
        received: 0,
        sent: 0,
    };
    let (closed, _) = watch::channel(false);
    let (state, changed, room) = (Mutex::new(state), Condvar::new(), Notify::new());
    (Arc::new(Shared { state, changed, room, closed, packets }), receiver)
}

/// Runs a session over a channel until either ends, and the session's thread with it.
pub(super) async fn run(
    channel: Channel<Msg>,
    shared: Arc<Shared>,
    packets: mpsc::UnboundedReceiver<Vec<u8>>,
    session: Box<dyn FedSession>,
) -> Summary {
    let (reader, writer) = channel.split();
    let mut finished = match start(session, &shared) {
        Ok(finished) => finished,
        Err(error) => {
            let _ = writer.close().await;
            return Summary { received: 0, sent: 0, error: Some(format!("no thread for a session: {error}")) };
        }
    };
    let reading = tokio::spawn(read(reader, Arc::clone(&shared)));
    let mut closed = shared.closed.subscribe();
    let mut ended = None;
    let sending = async {
        send(&writer, packets, &shared, &mut finished, &mut ended).await;
        let failed = ended.as_ref().is_none_or(Option::is_some);
        let _ = writer.eof().await;
        let _ = writer.exit_status(u32::from(failed)).await;
        let _ = writer.close().await;
    };
    // A writer that waits for a window is not woken when its channel goes: the wait ends here.
    tokio::select! {
        () = sending => {}
        _ = closed.wait_for(|closed| *closed) => {}
    }
    shared.close();
    reading.abort();
    let error = match ended {
        Some(error) => error,
        None => outcome(finished.await),
    };
    let state = shared.lock();
    Summary { received: state.received, sent: state.sent, error }
}

/// The session's thread; what comes at its end is why, unless by the end of its input.
fn start(mut session: Box<dyn FedSession>, shared: &Arc<Shared>) -> std::io::Result<oneshot::Receiver<Option<String>>> {
    let (done, finished) = oneshot::channel();
    let shared = Arc::clone(shared);
    std::thread::Builder::new().name("session".into()).spawn(move || {
        let mut error = None;
        while let Some(bytes) = shared.next() {
            if let Err(reason) = session.feed(&bytes) {
                error = Some(format!("not the protocol: {reason}"));
                break;
            }
        }
        session.finish();
        drop(session);
        let _ = done.send(error);
    })?;
    Ok(finished)
}

async fn read(mut reader: ChannelReadHalf, shared: Arc<Shared>) {
    while let Some(message) = reader.wait().await {
        match message {
            ChannelMsg::Data { data } => {
                shared.push(data);
                if !shared.wait_for_room().await {
                    tracing::warn!("session ended: the client takes no replies");
                    break;
                }
            }
            // What it still sends goes nowhere; its close is waited for.
            ChannelMsg::Eof => shared.end(),
            ChannelMsg::Close => break,
            _ => {}
        }
    }
    shared.close();
}

fn outcome(received: Result<Option<String>, oneshot::error::RecvError>) -> Option<String> {
    received.unwrap_or_else(|_| Some("the session's thread is gone".into()))
}

/// Sends replies until the session has ended and all of them are out; `ended` is then how it did.
async fn send(
    writer: &ChannelWriteHalf<Msg>,
    mut packets: mpsc::UnboundedReceiver<Vec<u8>>,
    shared: &Shared,
    finished: &mut oneshot::Receiver<Option<String>>,
    ended: &mut Option<Option<String>>,
) {
    loop {
        let packet = if ended.is_some() {
            packets.try_recv().ok()
        } else {
            tokio::select! {
                biased;
                packet = packets.recv() => packet,
                error = &mut *finished => {
                    *ended = Some(outcome(error));
                    continue;
                }
            }
        };
        let Some(packet) = packet else { return };
        let length = packet.len();
        if writer.data_bytes(packet).await.is_err() {
            return;
        }
        shared.delivered(length);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packets_are_counted_in_any_pieces() {
        let stream = [&[0, 0, 0, 2, 9, 9][..], &[0, 0, 0, 0], &[0, 0, 0, 1, 9], &[0, 0]].concat();
        for size in 1..=stream.len() {
            let mut packets = Packets::default();
            assert_eq!(stream.chunks(size).map(|piece| packets.count(piece)).sum::<i64>(), 3, "{size}");
        }
    }

    #[test]
    fn a_session_is_quiet_unless_it_works_on_a_request() {
        let (shared, _packets) = queue();
        let later = Instant::now() + Duration::from_secs(60);
        assert!(shared.quiet(later) > Duration::from_secs(50));
        shared.push(Bytes::from_static(&[0, 0, 0, 1, 5]));
        assert_eq!(shared.quiet(later), Duration::ZERO);
        shared.send(vec![0; 5]);
        // The reply is not taken.
        assert!(shared.quiet(later) > Duration::from_secs(50));
        shared.delivered(5);
        assert!(shared.quiet(later) > Duration::from_secs(50));
    }

    #[test]
    fn replies_after_the_end_of_input_are_bounded_too() {
        let (shared, mut packets) = queue();
        shared.end();
        let sender = Arc::clone(&shared);
        let thread = std::thread::spawn(move || (0..3).for_each(|_| sender.send(vec![0; OUT_LIMIT])));
        // Two go over the limit; the third waits until one is taken.
        for _ in 0..3 {
            let packet = packets.blocking_recv().unwrap();
            assert!(shared.lock().out_bytes <= 2 * OUT_LIMIT);
            shared.delivered(packet.len());
        }
        thread.join().unwrap();
    }

    #[tokio::test]
    async fn a_client_that_takes_no_replies_is_cut_off_where_many_do() {
        // Others have taken all that there is for those who send more than their share.
        let mut others = Surplus::new(0);
        let mut step = usize::MAX;
        let mut taken = 0_usize;
        while step > 0 {
            match taken.checked_add(step).filter(|&bytes| others.hold(bytes)) {
                Some(bytes) => taken = bytes,
                None => step /= 2,
            }
        }
        let (shared, _packets) = queue();
        shared.send(vec![0; 5]);
        shared.push(Bytes::from(vec![0; IN_SOFT - 1]));
        assert!(shared.wait_for_room().await, "a share is there for everybody");
        shared.push(Bytes::from(vec![0; 2]));
        assert!(!shared.wait_for_room().await);
        drop(others);
        shared.push(Bytes::from(vec![0; 2]));
        assert!(shared.wait_for_room().await);
    }

    #[test]
    fn a_closed_channel_lets_go_whoever_waits_for_it() {
        let (shared, _packets) = queue();
        let sender = Arc::clone(&shared);
        let thread = std::thread::spawn(move || (0..4).for_each(|_| sender.send(vec![0; OUT_LIMIT])));
        while shared.lock().out_bytes <= OUT_LIMIT {
            std::thread::yield_now();
        }
        shared.close();
        thread.join().unwrap();
    }
}
