//! Looks at the first packet of a client before the SSH library does: who does not offer strict key exchange (the
//! answer to Terrapin, CVE-2023-48795), or only algorithms that are not good enough, is told so and let go.
//!
//! The library uses strict key exchange where both ends offer it, and has no way to require it of a client.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use russh::Preferred;
use russh::keys::Algorithm;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::watch;

use crate::wire::buffer::Writer;
use crate::wire::kexinit::{KexInit, agreed, is_marker};

const STRICT: &str = "kex-strict-c-v00@openssh.com";
/// Longest first line (RFC 4253, section 4.2).
const LINE_MAX: usize = 255;
const DISCONNECT: u8 = 1;
const KEY_EXCHANGE_FAILED: u32 = 3;

/// Why a client was refused; nothing while it was not.
pub type Refusal = watch::Receiver<Option<String>>;

/// Names of what this server agrees to.
#[derive(Debug, Clone)]
pub struct Offered {
    strict: bool,
    exchanges: Vec<String>,
    host_keys: Vec<String>,
    ciphers: Vec<String>,
}

impl Offered {
    /// From the lists that the library is given, and the types of the host keys; `strict` requires strict key exchange.
    pub fn new(preferred: &Preferred, host_keys: &[Algorithm], strict: bool) -> Offered {
        Offered {
            strict,
            exchanges: preferred.kex.iter().map(|name| name.as_ref().to_owned()).collect(),
            // A client may want certificates alone; whether there is one that fits is the library's to say.
            host_keys: host_keys.iter().flat_map(|name| [name.to_string(), name.to_certificate_type()]).collect(),
            ciphers: preferred.cipher.iter().map(|name| name.as_ref().to_owned()).collect(),
        }
    }
}

/// A stream that carries nothing to the library from a client that is refused.
pub struct StrictStream<S> {
    inner: S,
    state: State,
    offered: Arc<Offered>,
    refusal: watch::Sender<Option<String>>,
}

enum State {
    /// What was read so far.
    Looking(Vec<u8>),
    Good,
    /// What is left to send of the farewell; then the client's end is waited for, for a socket that is closed with
    /// unread bytes takes back what was sent.
    Refused(Vec<u8>),
}

enum Seen {
    More,
    Good,
    Bad(String),
}

impl<S> StrictStream<S> {
    /// Wraps a stream; a reason for refusing appears in the second.
    pub fn new(inner: S, offered: Arc<Offered>) -> (Self, Refusal) {
        let (sender, refusal) = watch::channel(None);
        (Self { inner, state: State::Looking(Vec::new()), offered, refusal: sender }, refusal)
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> StrictStream<S> {
    fn poll_refused(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let State::Refused(farewell) = &mut self.state else { return Poll::Ready(Ok(())) };
        while !farewell.is_empty() {
            match ready!(Pin::new(&mut self.inner).poll_write(cx, farewell)) {
                Ok(0) | Err(_) => farewell.clear(),
                Ok(count) => drop(farewell.drain(..count)),
            }
        }
        let _ = ready!(Pin::new(&mut self.inner).poll_shutdown(cx));
        let mut rest = [0; 4096];
        loop {
            let mut buffer = ReadBuf::new(&mut rest);
            if ready!(Pin::new(&mut self.inner).poll_read(cx, &mut buffer)).is_err() || buffer.filled().is_empty() {
                return Poll::Ready(Err(io::ErrorKind::ConnectionAborted.into()));
            }
        }
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncRead for StrictStream<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        let State::Looking(seen) = &mut this.state else {
            ready!(this.poll_refused(cx))?;
            return Pin::new(&mut this.inner).poll_read(cx, buf);
        };
        let before = buf.filled().len();
        ready!(Pin::new(&mut this.inner).poll_read(cx, buf))?;
        seen.extend_from_slice(&buf.filled()[before..]);
        match examine(seen, &this.offered) {
            Seen::More => Poll::Ready(Ok(())),
            Seen::Good => {
                this.state = State::Good;
                Poll::Ready(Ok(()))
            }
            Seen::Bad(reason) => {
                buf.set_filled(before);
                this.state = State::Refused(disconnect(&reason));
                this.refusal.send_replace(Some(reason));
                ready!(this.poll_refused(cx))?;
                Poll::Ready(Err(io::ErrorKind::ConnectionAborted.into()))
            }
        }
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncWrite for StrictStream<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write(cx, data)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}

fn examine(seen: &[u8], offered: &Offered) -> Seen {
    let Some(end) = seen.iter().take(LINE_MAX + 1).position(|&byte| byte == b'\n') else {
        let too_long = seen.len() > LINE_MAX;
        return if too_long { Seen::Bad("it does not speak SSH".into()) } else { Seen::More };
    };
    if !seen.starts_with(b"SSH-2.0-") {
        return Seen::Bad("it does not speak SSH 2".into());
    }
    match KexInit::of_packet(&seen[end + 1..]) {
        Ok(None) => Seen::More,
        Ok(Some(theirs)) => judge(&theirs, offered).map_or(Seen::Good, Seen::Bad),
        Err(wrong) => Seen::Bad(wrong.to_string()),
    }
}

/// A reason to refuse a client that can do this.
fn judge(theirs: &KexInit, offered: &Offered) -> Option<String> {
    if offered.strict && !theirs.exchanges.iter().any(|name| name == STRICT) {
        let what = "it does not offer strict key exchange (kex-strict-c-v00@openssh.com), the protection against \
                    Terrapin, CVE-2023-48795; update the client";
        return Some(what.into());
    }
    for (kind, theirs, ours) in [
        ("key exchange", &theirs.exchanges, &offered.exchanges),
        ("host key type", &theirs.host_keys, &offered.host_keys),
        ("cipher", &theirs.ciphers_to_server, &offered.ciphers),
        ("cipher", &theirs.ciphers_to_client, &offered.ciphers),
    ] {
        if agreed(theirs, ours).is_none() {
            let named = |names: &[String]| {
                names.iter().map(String::as_str).filter(|name| !is_marker(name)).collect::<Vec<_>>().join(",")
            };
            let theirs: String = named(theirs).chars().take(300).collect();
            return Some(format!("no {kind} that it offers ({theirs}) is good enough; known: {}", named(ours)));
        }
    }
    None
}

/// The packet that says goodbye, as it looks before there are keys.
fn disconnect(reason: &str) -> Vec<u8> {
    let text: String = format!("lockstep: {reason}").chars().filter(char::is_ascii).collect();
    let mut packet = Writer::new(DISCONNECT);
    let payload = packet.u32(KEY_EXCHANGE_FAILED).string(text.as_bytes()).string(b"").finish().split_off(4);
    // Length, padding's length, payload and padding make up whole blocks of 8; at least 4 of padding.
    let padding = 4 + (8 - (4 + 1 + payload.len() + 4) % 8) % 8;
    let mut packet = u32::try_from(1 + payload.len() + padding).unwrap_or(0).to_be_bytes().to_vec();
    packet.push(u8::try_from(padding).unwrap_or(4));
    packet.extend(payload);
    packet.resize(packet.len() + padding, 0);
    packet
}

#[cfg(test)]
mod tests {
    use super::*;

    fn offered() -> Offered {
        let list = |names: &[&str]| names.iter().map(ToString::to_string).collect();
        Offered {
            strict: true,
            exchanges: list(&["curve25519-sha256", "kex-strict-s-v00@openssh.com"]),
            host_keys: list(&["ssh-ed25519"]),
            ciphers: list(&["aes128-gcm@openssh.com"]),
        }
    }

    fn start(lists: [&str; 4]) -> Vec<u8> {
        let mut payload = vec![20];
        payload.extend([7; 16]);
        for list in lists.iter().chain(&["hmac-sha2-256"; 2]).chain(&["none"; 2]).chain(&[""; 2]) {
            payload.extend((list.len() as u32).to_be_bytes());
            payload.extend(list.as_bytes());
        }
        payload.extend([0; 5]);
        let mut stream = b"SSH-2.0-test\r\n".to_vec();
        stream.extend((payload.len() as u32 + 1 + 6).to_be_bytes());
        stream.push(6);
        stream.extend(payload);
        stream.extend([0; 6]);
        stream
    }

    #[test]
    fn h57_what_is_refused_and_why() {
        let kex = "curve25519-sha256,kex-strict-c-v00@openssh.com";
        let (key, cipher) = ("ssh-ed25519", "aes128-gcm@openssh.com");
        for (lists, part) in [
            ([kex, key, cipher, cipher], None),
            (["curve25519-sha256", key, cipher, cipher], Some("strict key exchange")),
            (
                ["kex-strict-c-v00@openssh.com,kex-strict-s-v00@openssh.com", key, cipher, cipher],
                Some("no key exchange"),
            ),
            (["diffie-hellman-group1-sha1,kex-strict-c-v00@openssh.com", key, cipher, cipher], Some("group1-sha1")),
            ([kex, "ssh-rsa", cipher, cipher], Some("no host key type that it offers (ssh-rsa)")),
            ([kex, key, "3des-cbc", cipher], Some("no cipher that it offers (3des-cbc)")),
            ([kex, key, cipher, "3des-cbc"], Some("no cipher")),
        ] {
            let stream = start(lists);
            for end in 0..stream.len() {
                assert!(matches!(examine(&stream[..end], &offered()), Seen::More), "{lists:?} {end}");
            }
            match (examine(&stream, &offered()), part) {
                (Seen::Good, None) => {}
                (Seen::Bad(reason), Some(part)) => assert!(reason.contains(part), "{reason}"),
                _ => panic!("{lists:?}"),
            }
        }
        let lenient = Offered { strict: false, ..offered() };
        assert!(matches!(examine(&start(["curve25519-sha256", key, cipher, cipher]), &lenient), Seen::Good));
        let mut other = start([kex, key, cipher, cipher]);
        other[b"SSH-2.0-test\r\n".len() + 5] = 90;
        let cases = [
            (other, "begin with the key exchange"),
            (b"GET / HTTP/1.1\r\n".to_vec(), "SSH 2"),
            (vec![b'x'; 300], "SSH"),
            (b"SSH-2.0-x\r\n\xff\xff\xff\xff".to_vec(), "longer"),
            (b"SSH-2.0-x\r\n\0\0\0\0".to_vec(), "empty"),
            (b"SSH-2.0-x\r\n\0\0\0\x05\x04\x14\0\0\0".to_vec(), "cut short"),
            (b"SSH-2.0-x\r\n\0\0\0\x02\x09\x14".to_vec(), "cut short"),
        ];
        for (stream, part) in cases {
            let Seen::Bad(reason) = examine(&stream, &offered()) else { panic!("{part}") };
            assert!(reason.contains(part), "{reason}");
        }
    }

    #[test]
    fn the_farewell_is_a_packet() {
        for text in ["", "a", "ab", "abc", "abcd", "abcde", "abcdef", "abcdefg", "é"] {
            let packet = disconnect(text);
            assert_eq!(packet.len() % 8, 0);
            assert_eq!(packet.len(), 4 + u32::from_be_bytes(*packet.first_chunk().unwrap()) as usize);
            assert!(packet[4] >= 4 && packet[5] == DISCONNECT);
        }
    }
}
