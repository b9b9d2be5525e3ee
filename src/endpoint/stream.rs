//! A socket whose writes never block: what does not fit is kept and flushed from reads too, so that two ends that both
//! write in bulk never wait for each other.

use std::collections::VecDeque;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::oneshot;

use super::surplus::Surplus;

/// A peer that takes nothing while this much waits for it is cut off.
const OVERFLOW_LIMIT: usize = 256 << 20;
/// So much may wait for each, whatever waits for others.
const OVERFLOW_SHARE: usize = 16 << 20;

/// The stream given to the protocol; `kill` ends it from outside.
pub struct OverflowStream<S> {
    inner: S,
    overflow: VecDeque<u8>,
    surplus: Surplus,
    kill: Option<oneshot::Receiver<()>>,
    dead: bool,
}

impl<S: AsyncRead + AsyncWrite + Unpin> OverflowStream<S> {
    /// Wraps a socket; the sender ends the stream when used.
    pub fn new(inner: S) -> (Self, oneshot::Sender<()>) {
        let (sender, receiver) = oneshot::channel();
        let (overflow, surplus) = (VecDeque::new(), Surplus::new(OVERFLOW_SHARE));
        (Self { inner, overflow, surplus, kill: Some(receiver), dead: false }, sender)
    }

    fn check(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        if let Some(kill) = &mut self.kill {
            match Pin::new(kill).poll(cx) {
                Poll::Ready(Ok(())) => {
                    self.kill = None;
                    self.dead = true;
                }
                Poll::Ready(Err(_)) => self.kill = None,
                Poll::Pending => {}
            }
        }
        if self.dead { Err(io::ErrorKind::ConnectionAborted.into()) } else { Ok(()) }
    }

    fn drain(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while !self.overflow.is_empty() {
            let (front, _) = self.overflow.as_slices();
            match Pin::new(&mut self.inner).poll_write(cx, front) {
                Poll::Ready(Ok(0)) => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                Poll::Ready(Ok(n)) => {
                    self.overflow.drain(..n);
                    let _less = self.surplus.hold(self.overflow.len());
                    if self.overflow.is_empty() && self.overflow.capacity() > OVERFLOW_SHARE {
                        self.overflow = VecDeque::new();
                    }
                }
                Poll::Ready(Err(e)) => return Poll::Ready(Err(e)),
                Poll::Pending => return Poll::Pending,
            }
        }
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncRead for OverflowStream<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        self.check(cx)?;
        if let Poll::Ready(Err(e)) = self.drain(cx) {
            return Poll::Ready(Err(e));
        }
        Pin::new(&mut self.inner).poll_read(cx, buf)
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncWrite for OverflowStream<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        self.check(cx)?;
        let mut sent = 0;
        if self.drain(cx)?.is_ready()
            && let Poll::Ready(n) = Pin::new(&mut self.inner).poll_write(cx, data)?
        {
            sent = n;
        }
        let waiting = self.overflow.len() + data.len() - sent;
        if waiting > OVERFLOW_LIMIT || !self.surplus.hold(waiting) {
            return Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, "the peer takes nothing")));
        }
        self.overflow.extend(&data[sent..]);
        Poll::Ready(Ok(data.len()))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.check(cx)?;
        if let Poll::Ready(Err(e)) = self.drain(cx) {
            return Poll::Ready(Err(e));
        }
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.check(cx)?;
        match self.drain(cx) {
            Poll::Ready(Ok(())) => Pin::new(&mut self.inner).poll_shutdown(cx),
            other => other,
        }
    }
}
