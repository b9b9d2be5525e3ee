//! What a host can do, as it says itself before there are keys: nothing is proven, and nothing is sent but our own name.

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use super::dial;
use super::remote::{SshRemote, failed};
use crate::endpoint::algorithms::{End, preferred};
use crate::endpoint::link::ConnectError;
use crate::error::{Escaped, Exit};
use crate::wire::kexinit::KexInit;

/// Lines that a host may say before its name (RFC 4253, section 4.2), in bytes with the first packet: more is not SSH.
const GREETING_MAX: usize = 64 << 10;

/// What a host says first. All of it is escaped.
#[derive(Debug, Clone)]
pub struct Offer {
    /// `SSH-2.0-OpenSSH_9.2p1 Debian-2`.
    pub version: String,
    /// What it can do.
    pub theirs: KexInit,
    /// What lockstep asks for, the best first.
    pub ours: KexInit,
}

impl SshRemote {
    /// Asks the host what it can do, over the same way that a login would take.
    ///
    /// # Errors
    /// When the host cannot be reached, or does not speak SSH 2.
    pub fn offer(&self) -> Result<Offer, ConnectError> {
        self.block_on(async {
            let options = self.options();
            let wrong = |what: String| failed(options, what, Exit::TryAgain);
            let mut below = self.stream(options).await?;
            let stream = &mut below.stream;
            let asking = async {
                stream.write_all(b"SSH-2.0-lockstep\r\n").await?;
                let mut seen = Vec::new();
                loop {
                    match greeting(&seen) {
                        Ok(None) if seen.len() < GREETING_MAX => {}
                        Ok(None) => return Ok(Err("it does not speak SSH".to_owned())),
                        Ok(Some(found)) => return Ok(Ok(found)),
                        Err(reason) => return Ok(Err(reason)),
                    }
                    if stream.read_buf(&mut seen).await? == 0 {
                        return Ok(Err("it hung up before it said what it can do".to_owned()));
                    }
                }
            };
            let asked: Result<std::io::Result<_>, _> = tokio::time::timeout(options.connect_timeout, asking).await;
            let asked = asked.map_err(|_| wrong("it did not say in time what it can do".to_owned()))?;
            let (version, theirs) = asked.map_err(|error| wrong(error.to_string()))?.map_err(wrong)?;
            Ok(Offer { version, theirs, ours: ours() })
        })
    }
}

/// The host's name and its first packet, once both are there.
fn greeting(seen: &[u8]) -> Result<Option<(String, KexInit)>, String> {
    let mut rest = seen;
    while let Some(end) = rest.iter().position(|&byte| byte == b'\n') {
        let line = rest[..end].trim_ascii_end();
        rest = &rest[end + 1..];
        if line.starts_with(b"SSH-2.0-") || line.starts_with(b"SSH-1.99-") {
            let found = KexInit::of_packet(rest).map_err(|wrong| wrong.to_string())?;
            return Ok(found.map(|theirs| (Escaped(line).to_string(), theirs)));
        }
        if line.starts_with(b"SSH-") {
            return Err(format!("it speaks no SSH 2, but {}", crate::error::said(line)));
        }
    }
    Ok(None)
}

fn ours() -> KexInit {
    let preferred = preferred(End::Client);
    let ciphers: Vec<String> = preferred.cipher.iter().map(|name| name.as_ref().to_owned()).collect();
    let macs: Vec<String> = preferred.mac.iter().map(|name| name.as_ref().to_owned()).collect();
    KexInit {
        exchanges: preferred.kex.iter().map(|name| name.as_ref().to_owned()).collect(),
        host_keys: dial::host_keys().iter().map(ToString::to_string).collect(),
        ciphers_to_server: ciphers.clone(),
        ciphers_to_client: ciphers,
        macs_to_server: macs.clone(),
        macs_to_client: macs,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_greeting_is_read_when_all_of_it_is_there() {
        let mut payload = vec![20_u8];
        payload.extend([7; 16]);
        for list in ["a,b", "k", "c", "d", "m", "n"] {
            payload.extend((list.len() as u32).to_be_bytes());
            payload.extend(list.as_bytes());
        }
        let mut stream = b"be welcome\r\nSSH-2.0-x\x1b y\r\n".to_vec();
        stream.extend((payload.len() as u32 + 1 + 4).to_be_bytes());
        stream.push(4);
        stream.extend(&payload);
        stream.extend([0; 4]);
        for end in 0..stream.len() {
            assert_eq!(greeting(&stream[..end]), Ok(None), "{end}");
        }
        let (version, theirs) = greeting(&stream).unwrap().unwrap();
        assert!(version.starts_with("SSH-2.0-x") && !version.contains('\x1b'), "{version}");
        assert_eq!((theirs.exchanges, theirs.macs_to_client), (vec!["a".into(), "b".into()], vec!["n".to_owned()]));
        assert!(greeting(b"SSH-1.5-old\n").unwrap_err().contains("SSH-1.5-old"));
        assert_eq!(greeting(b"HTTP/1.1 400\r\n"), Ok(None));
    }
}
