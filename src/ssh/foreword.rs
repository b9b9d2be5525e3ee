//! What a host says before its version, which is where one that has too many connections says so (RFC 4253, section 4.2: such
//! lines are allowed; sshd's MaxStartups and lockstep's limits use them).

use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::dial::Stream;
use super::lock;

/// No more of it is kept.
const MOST: usize = 1024;
/// For how long a host that says that it is full is asked again.
const FULL: Duration = Duration::from_secs(120);
/// The same for one that hangs up without a word, as sshd may when it is full, and others for other reasons.
const SILENT: Duration = Duration::from_secs(3);

/// What was heard so far.
#[derive(Debug, Default)]
pub(super) struct Foreword(Mutex<Vec<u8>>);

impl Foreword {
    /// A stream that is listened to.
    pub(super) fn of(stream: Stream) -> (Stream, Arc<Foreword>) {
        let heard = Arc::new(Foreword::default());
        (Box::new(Listened { stream, heard: Some(Arc::clone(&heard)) }), heard)
    }

    /// What the host said instead of its version, made safe to print; nothing where it came to its version.
    pub(super) fn words(&self) -> Option<String> {
        let heard = lock(&self.0);
        let text = heard.trim_ascii();
        (!has_version(&heard) && !text.is_empty()).then(|| crate::error::said(text))
    }

    /// For how long it is worth asking again, after a handshake that failed.
    pub(super) fn patience(&self) -> Duration {
        let heard = lock(&self.0);
        if has_version(&heard) {
            return Duration::ZERO;
        }
        match heard.trim_ascii() {
            b"" => SILENT,
            text if text.starts_with(b"lockstep: too many ") || text.starts_with(b"Exceeded MaxStartups") => FULL,
            _ => Duration::ZERO,
        }
    }

    /// Takes what came; whether more is of interest.
    fn hear(&self, bytes: &[u8]) -> bool {
        let mut heard = lock(&self.0);
        let room = MOST - heard.len();
        heard.extend_from_slice(&bytes[..bytes.len().min(room)]);
        heard.len() < MOST && !has_version(&heard)
    }
}

fn has_version(heard: &[u8]) -> bool {
    heard.split(|&byte| byte == b'\n').any(|line| line.starts_with(b"SSH-"))
}

/// A stream whose first bytes are noted.
struct Listened {
    stream: Stream,
    /// Nothing once the version came.
    heard: Option<Arc<Foreword>>,
}

impl AsyncRead for Listened {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let read = Pin::new(&mut self.stream).poll_read(cx, buf);
        if let Some(heard) = &self.heard
            && !heard.hear(&buf.filled()[before..])
        {
            self.heard = None;
        }
        read
    }
}

impl AsyncWrite for Listened {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, data)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        data: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, data)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_is_full_is_asked_again_and_who_is_not_is_not() {
        type Case<'a> = (&'a [&'a [u8]], Duration, Option<&'a str>);
        let cases: [Case<'_>; 7] = [
            (&[b""], SILENT, None),
            (&[b"Exceeded MaxStartups\r\n"], FULL, Some("Exceeded MaxStartups")),
            (
                &[b"lockstep: too many conn", b"ections; try again later\r\n"],
                FULL,
                Some("lockstep: too many connections; try again later"),
            ),
            (
                &[b"lockstep: this address failed too often; try again later\r\n"],
                Duration::ZERO,
                Some("lockstep: this address failed too often; try again later"),
            ),
            (&[b"Not allowed at this time\r\n"], Duration::ZERO, Some("Not allowed at this time")),
            (&[b"HTTP/1.1 400 Bad Request\r\n"], Duration::ZERO, Some("HTTP/1.1 400 Bad Request")),
            (&[b"a greeting\r\nSS", b"H-2.0-x\r\n"], Duration::ZERO, None),
        ];
        for (pieces, patience, words) in cases {
            let foreword = Foreword::default();
            for piece in pieces {
                foreword.hear(piece);
            }
            assert_eq!((foreword.patience(), foreword.words().as_deref()), (patience, words), "{pieces:?}");
        }
        let endless = Foreword::default();
        assert!((0..100).map(|_| endless.hear(&[b'x'; 100])).filter(|&more| more).count() < 11);
        assert_eq!(lock(&endless.0).len(), MOST);
    }
}
