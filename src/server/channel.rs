//! One channel: bytes in to a session on a thread of its own, packets out, both bounded.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use russh::server::Msg;
use russh::{Channel, ChannelMsg};
use tokio::sync::mpsc;

use super::agent::Output;

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

#[derive(Default)]
struct State {
    inbox: VecDeque<Bytes>,
    in_bytes: usize,
    out_bytes: usize,
    ended: bool,
}

/// What the reader, the session's thread and the writer share.
pub(super) struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    packets: mpsc::UnboundedSender<Vec<u8>>,
}

impl Shared {
    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn end(&self) {
        self.lock().ended = true;
        self.changed.notify_all();
    }

    fn next(&self) -> Option<Bytes> {
        let mut state = self.lock();
        loop {
            if let Some(bytes) = state.inbox.pop_front() {
                state.in_bytes -= bytes.len();
                return Some(bytes);
            }
            if state.ended {
                return None;
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl Output for Shared {
    fn send(&self, packet: Vec<u8>) {
        let mut state = self.lock();
        while state.out_bytes > OUT_LIMIT && !state.ended {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.out_bytes += packet.len();
        let _ = self.packets.send(packet);
    }
}

/// Makes the queue of packets of one session.
pub(super) fn queue() -> (Arc<Shared>, mpsc::UnboundedReceiver<Vec<u8>>) {
    let (packets, receiver) = mpsc::unbounded_channel();
    (Arc::new(Shared { state: Mutex::default(), changed: Condvar::new(), packets }), receiver)
}

/// Runs a session over a channel until either ends.
pub(super) async fn run(
    channel: Channel<Msg>,
    shared: Arc<Shared>,
    mut packets: mpsc::UnboundedReceiver<Vec<u8>>,
    mut session: Box<dyn FedSession>,
) {
    let (mut reader, writer) = channel.split();
    let (done, mut finished) = tokio::sync::oneshot::channel::<bool>();
    let inbox = Arc::clone(&shared);
    let thread = std::thread::Builder::new().name("session".into()).spawn(move || {
        let mut good = true;
        while let Some(bytes) = inbox.next() {
            if let Err(reason) = session.feed(&bytes) {
                tracing::warn!(%reason, "session ended: not the protocol");
                good = false;
                break;
            }
        }
        session.finish();
        drop(session);
        let _ = done.send(good);
    });
    if let Err(error) = thread {
        tracing::error!(%error, "no thread for a session");
        let _ = writer.close().await;
        return;
    }
    let receiving = Arc::clone(&shared);
    let read = tokio::spawn(async move {
        while let Some(message) = reader.wait().await {
            let data = match message {
                ChannelMsg::Data { data } => data,
                ChannelMsg::Eof | ChannelMsg::Close => break,
                _ => continue,
            };
            {
                let mut state = receiving.lock();
                state.in_bytes += data.len();
                state.inbox.push_back(data);
            }
            receiving.changed.notify_all();
            loop {
                let (waiting, sending, ended) = {
                    let state = receiving.lock();
                    (state.in_bytes, state.out_bytes > 0, state.ended)
                };
                if ended || waiting < IN_SOFT || (sending && waiting < IN_HARD) {
                    break;
                }
                if waiting >= IN_HARD && sending {
                    tracing::warn!("session ended: the client takes no replies");
                    receiving.end();
                    return;
                }
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        }
        receiving.end();
        // What the client still sends goes nowhere, so that its connection does not wait.
        while reader.wait().await.is_some() {}
    });
    let good = loop {
        tokio::select! {
            biased;
            Some(packet) = packets.recv() => {
                let length = packet.len();
                let sent = writer.data_bytes(packet).await;
                shared.lock().out_bytes -= length;
                shared.changed.notify_all();
                if sent.is_err() {
                    shared.end();
                    break false;
                }
            }
            good = &mut finished => break good.unwrap_or(false),
        }
    };
    while let Ok(packet) = packets.try_recv() {
        if writer.data_bytes(packet).await.is_err() {
            break;
        }
    }
    shared.end();
    let _ = writer.eof().await;
    let _ = writer.exit_status(u32::from(!good)).await;
    let _ = writer.close().await;
    read.abort();
}
