//! A stream over a channel: blocking threads on one side, two tasks on the other.
//!
//! The reading task never waits for the writing one, nor for whoever consumes: both directions may be full of bulk at
//! once. What bounds the inbox is the number of requests its user has in flight; beyond [`IN_LIMIT`] the link breaks.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use bytes::{Bytes, BytesMut};
use russh::client::Msg;
use russh::{Channel, ChannelMsg, ChannelWriteHalf};
use tokio::sync::{mpsc, oneshot};

use super::credit::Credit;
use super::remote::Connection;
use crate::endpoint::link::{Link, LinkError};
use crate::error::said;

/// Packets are sent together up to this size, which is that of the largest packet sshd takes.
const TOGETHER_BYTES: usize = 32 << 10;
/// Senders wait while more than this is queued.
const OUT_LIMIT: usize = 8 << 20;
/// A peer that sends this much unasked is cut off.
const IN_LIMIT: usize = 512 << 20;
/// How much of the other end's standard error is kept for messages.
const COMPLAINT_LIMIT: usize = 2048;

#[derive(Default)]
struct State {
    inbox: VecDeque<Bytes>,
    in_bytes: usize,
    out_bytes: usize,
    /// Nothing more comes and nothing more can be sent.
    ended: bool,
    /// Why it ended, when that is not simply the end.
    broken: Option<String>,
    /// The other end's standard error.
    complaint: Vec<u8>,
    exit_status: Option<u32>,
    /// Nobody receives any more.
    abandoned: bool,
    /// Where packets go to the writing task; gone once closed.
    queue: Option<mpsc::UnboundedSender<Bytes>>,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    received: Condvar,
    sent: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn end(&self, broken: Option<String>) {
        let mut state = self.lock();
        if !state.ended {
            state.ended = true;
            state.broken = broken;
            state.queue = None;
        }
        drop(state);
        self.received.notify_all();
        self.sent.notify_all();
    }
}

impl State {
    fn failure(&self, host: &str) -> LinkError {
        let complaint = said(self.complaint.trim_ascii());
        let mut text = match (&self.broken, self.exit_status) {
            (Some(reason), _) => format!("{host}: {reason}"),
            (None, Some(status)) => format!("{host}: the other end ended with status {status}"),
            (None, None) => format!("{host}: the other end ended the stream"),
        };
        if !complaint.is_empty() {
            text.push_str(": ");
            text.push_str(&complaint);
        }
        LinkError(text)
    }
}

/// A [`Link`] over a channel.
pub(super) struct ChannelLink {
    shared: Arc<Shared>,
    host: String,
    // Once dropped the channel is closed, whether or not the other end heeds the end of its input.
    _in_use: oneshot::Sender<()>,
    // The stream lives no longer than its connection.
    _connection: Arc<Connection>,
}

impl ChannelLink {
    /// Starts the tasks; must be called within the runtime. `early` is what arrived already.
    pub(super) async fn start(
        channel: Channel<Msg>,
        connection: Arc<Connection>,
        host: String,
        early: Vec<Bytes>,
    ) -> Self {
        let (queue, mut packets) = mpsc::unbounded_channel::<Bytes>();
        let (in_use, dropped) = oneshot::channel::<()>();
        let shared = Arc::new(Shared::default());
        {
            let mut state = shared.lock();
            state.queue = Some(queue);
            state.in_bytes = early.iter().map(Bytes::len).sum();
            state.inbox = early.into();
        }
        let (mut reader, writer) = channel.split();
        // Who takes larger packets than sshd does is not sshd, and needs no sparing.
        let like_sshd = writer.writable_packet_size().await <= TOGETHER_BYTES;
        let credit = Arc::new(Credit::new(connection.is_near() && like_sshd));
        let sent_credit = Arc::clone(&credit);
        let sending = Arc::clone(&shared);
        let write = tokio::spawn(async move {
            while let Some(packet) = packets.recv().await {
                let packet = with_what_waits(packet, &mut packets);
                let length = packet.len();
                let sent = paced(&writer, packet, &sent_credit).await;
                sending.lock().out_bytes -= length;
                sending.sent.notify_all();
                if sent.is_err() {
                    // The reading task finds out why, and ends the link.
                    return;
                }
            }
            let _ = writer.eof().await;
            let _ = dropped.await;
            let _ = writer.close().await;
        });
        let receiving = Arc::clone(&shared);
        let last_words = connection.last_words();
        tokio::spawn(async move {
            let mut whole = false;
            while let Some(message) = reader.wait().await {
                if let ChannelMsg::WindowAdjusted { new_size } = message {
                    credit.given_back(new_size);
                    continue;
                }
                let mut state = receiving.lock();
                match message {
                    ChannelMsg::Data { .. } if state.abandoned => {}
                    ChannelMsg::Data { data } => {
                        state.in_bytes += data.len();
                        state.inbox.push_back(data);
                        if state.in_bytes > IN_LIMIT {
                            drop(state);
                            receiving.end(Some("the other end sent more than was asked for".into()));
                            break;
                        }
                        drop(state);
                        receiving.received.notify_all();
                    }
                    ChannelMsg::ExtendedData { data, .. } => {
                        let room = COMPLAINT_LIMIT.saturating_sub(state.complaint.len());
                        state.complaint.extend_from_slice(&data[..data.len().min(room)]);
                    }
                    ChannelMsg::ExitStatus { exit_status } => state.exit_status = Some(exit_status),
                    ChannelMsg::ExitSignal { .. } => state.broken = Some("the other end was killed".into()),
                    ChannelMsg::Eof => whole = true,
                    ChannelMsg::Close => {
                        whole = true;
                        break;
                    }
                    _ => {}
                }
            }
            let broken = receiving.lock().broken.clone();
            let lost = || match last_words.said() {
                Some(reason) => format!("the connection was lost: {reason}"),
                None => "the connection was lost".to_owned(),
            };
            receiving.end(if whole { broken } else { broken.or_else(|| Some(lost())) });
            write.abort();
        });
        ChannelLink { shared, host, _in_use: in_use, _connection: connection }
    }
}

/// Sends a packet as far as there is credit for it, and then the rest.
async fn paced(writer: &ChannelWriteHalf<Msg>, mut packet: Bytes, credit: &Credit) -> Result<(), russh::Error> {
    while !packet.is_empty() {
        let now = credit.take(packet.len()).await;
        writer.data_bytes(packet.split_to(now)).await?;
    }
    Ok(())
}

/// A small packet together with those that wait behind it: each packet of SSH costs a cipher's start, a system call and
/// the waking of whoever reads at the other end.
fn with_what_waits(packet: Bytes, packets: &mut mpsc::UnboundedReceiver<Bytes>) -> Bytes {
    if packet.len() >= TOGETHER_BYTES {
        return packet;
    }
    let Ok(next) = packets.try_recv() else { return packet };
    let mut together = BytesMut::with_capacity(2 * TOGETHER_BYTES);
    together.extend_from_slice(&packet);
    together.extend_from_slice(&next);
    while together.len() < TOGETHER_BYTES
        && let Ok(next) = packets.try_recv()
    {
        together.extend_from_slice(&next);
    }
    together.freeze()
}

impl Link for ChannelLink {
    fn send(&self, packet: Bytes) -> Result<(), LinkError> {
        let mut state = self.shared.lock();
        while state.out_bytes > OUT_LIMIT && !state.ended {
            state = self.shared.sent.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        let length = packet.len();
        match &state.queue {
            Some(queue) if !state.ended && queue.send(packet).is_ok() => {
                state.out_bytes += length;
                Ok(())
            }
            _ => Err(state.failure(&self.host)),
        }
    }

    fn recv(&self) -> Result<Option<Bytes>, LinkError> {
        let mut state = self.shared.lock();
        loop {
            if let Some(bytes) = state.inbox.pop_front() {
                state.in_bytes -= bytes.len();
                return Ok(Some(bytes));
            }
            if state.ended {
                let good = state.broken.is_none() && state.exit_status.unwrap_or(0) == 0;
                return if good { Ok(None) } else { Err(state.failure(&self.host)) };
            }
            state = self.shared.received.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn close(&self) {
        self.shared.lock().queue = None;
        self.shared.sent.notify_all();
    }
}

impl Drop for ChannelLink {
    fn drop(&mut self) {
        self.close();
        let mut state = self.shared.lock();
        state.abandoned = true;
        state.inbox.clear();
    }
}
