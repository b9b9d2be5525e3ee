//! The bytes below SSH: a socket, or a channel of the host that is jumped through.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::process::Stdio;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use russh::Preferred;
use russh::client::{Config, Handle};
use russh::keys::{Algorithm, EcdsaCurve, HashAlg};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::process::{Child, ChildStdin, ChildStdout};

use super::options::{AddressFamily, SshOptions};
use super::remote::failed;
use super::trust::Trust;
use crate::endpoint::algorithms::{End, preferred};
use crate::endpoint::link::ConnectError;
use crate::error::Exit;

const WINDOW_BYTES: u32 = 64 << 20;
const PACKET_BYTES: u32 = 256 << 10;

/// What a connection runs over.
pub(super) type Stream = Box<dyn Duplex>;

pub(super) trait Duplex: AsyncRead + AsyncWrite + Unpin + Send {}

impl<S: AsyncRead + AsyncWrite + Unpin + Send> Duplex for S {}

/// A socket to this address, and how long it took to get there and back.
pub(super) async fn to(address: SocketAddr) -> io::Result<(Prompt, Duration)> {
    let asked = Instant::now();
    let socket = TcpStream::connect(address).await?;
    let round_trip = asked.elapsed();
    socket.set_nodelay(true)?;
    Ok((Prompt { socket, left: PROMPT_READS }, round_trip))
}

/// A socket to the host itself, how long it took to get there and back, and which of its addresses it was.
pub(super) async fn direct(options: &SshOptions) -> Result<(Stream, Duration, SocketAddr), ConnectError> {
    let SshOptions { host, port, connect_timeout, .. } = options;
    let again = |what: String| failed(options, what, Exit::TryAgain);
    let found = tokio::time::timeout(*connect_timeout, tokio::net::lookup_host((host.as_str(), *port)))
        .await
        .map_err(|_| again("its address was not found in time".into()))?
        .map_err(|error| {
            let error = error.to_string();
            let why = error.strip_prefix("failed to lookup address information: ").unwrap_or(&error);
            again(format!("its name cannot be resolved: {why}; check the name, and HostName in ~/.ssh/config"))
        })?;
    let mut last = "it has no address; check the name".to_owned();
    let wanted = |address: &SocketAddr| match options.address_family {
        AddressFamily::Any => true,
        AddressFamily::V4 => address.is_ipv4(),
        AddressFamily::V6 => address.is_ipv6(),
    };
    for address in found.filter(wanted) {
        match tokio::time::timeout(*connect_timeout, to(address)).await {
            Ok(Ok((stream, round_trip))) => return Ok((Box::new(stream), round_trip, address)),
            Ok(Err(error)) => {
                let why = crate::error::in_words(&error);
                last = format!("cannot connect to {address}: {why}; is its SSH server running, on this port (-P)?");
            }
            Err(_) => {
                let seconds = connect_timeout.as_secs_f32();
                last = format!("{address} did not answer within {seconds} s; is the host up, and no firewall between?");
            }
        }
    }
    Err(again(last))
}

/// How many reads are acknowledged at once: those of key exchange, login and the first requests.
const PROMPT_READS: u32 = 128;

/// A socket that acknowledges at once while a connection is set up. sshd waits for acknowledgements before it sends more
/// (it sets TCP_NODELAY late), and the kernel would wait 40 ms for something to send them with.
pub(super) struct Prompt {
    socket: TcpStream,
    left: u32,
}

impl AsyncRead for Prompt {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let read = Pin::new(&mut self.socket).poll_read(cx, buf);
        if self.left > 0 && read.is_ready() {
            self.left -= 1;
            // It is a wish; without it everything works, later.
            let _ = rustix::net::sockopt::set_tcp_quickack(&self.socket, true);
        }
        read
    }
}

impl AsyncWrite for Prompt {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.socket).poll_write(cx, data)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        data: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.socket).poll_write_vectored(cx, data)
    }

    fn is_write_vectored(&self) -> bool {
        self.socket.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_shutdown(cx)
    }
}

/// The standard input and output of the command that makes the connection; it ends with the stream.
pub(super) fn by_command(command: &[String], options: &SshOptions) -> Result<Stream, ConnectError> {
    let shown = || crate::error::Escaped(command.join(" ").as_bytes()).to_string();
    let wrong = |error: String| failed(options, format!("ProxyCommand '{}': {error}", shown()), Exit::Usage);
    let (program, arguments) = command.split_first().ok_or_else(|| wrong("it names no command".into()))?;
    let mut child = tokio::process::Command::new(program)
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(|error| wrong(format!("it cannot be started: {}", crate::error::in_words(&error))))?;
    let (Some(input), Some(output)) = (child.stdin.take(), child.stdout.take()) else {
        return Err(wrong("it has no input or output".into()));
    };
    Ok(Box::new(Piped { input, output, _child: child }))
}

/// A command in place of a socket.
struct Piped {
    input: ChildStdin,
    output: ChildStdout,
    _child: Child,
}

impl AsyncRead for Piped {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.output).poll_read(cx, buf)
    }
}

impl AsyncWrite for Piped {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.input).poll_write(cx, data)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.input).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.input).poll_shutdown(cx)
    }
}

/// A channel from the host that is jumped through to the one behind it.
pub(super) async fn through(
    handle: &Handle<Trust>,
    jump: &SshOptions,
    options: &SshOptions,
) -> Result<Stream, ConnectError> {
    let again = |what: String| failed(options, format!("through {}: {what}", jump.describe()), Exit::TryAgain);
    let opening = handle.channel_open_direct_tcpip(options.host.clone(), options.port.into(), "127.0.0.1", 0);
    match tokio::time::timeout(options.connect_timeout, opening).await {
        Ok(Ok(channel)) => Ok(Box::new(channel.into_stream())),
        Ok(Err(russh::Error::ChannelOpenFailure(russh::ChannelOpenFailure::AdministrativelyProhibited))) => {
            Err(again("it does not forward connections; its sshd_config needs 'AllowTcpForwarding yes'".into()))
        }
        Ok(Err(error)) => Err(again(format!("it cannot connect: {error}"))),
        Err(_) => Err(again("no answer in time".into())),
    }
}

/// Algorithms and sizes; host keys of the types `on_file` come first.
pub(super) fn config(options: &SshOptions, on_file: &[String]) -> Config {
    let mut keys = host_keys();
    let is_on_file = |key: &Algorithm| match key {
        Algorithm::Rsa { .. } => on_file.iter().any(|name| name == "ssh-rsa"),
        key => on_file.iter().any(|name| name == key.as_str()),
    };
    keys.sort_by_key(|key| !is_on_file(key));
    let preferred = Preferred { key: keys.into(), ..preferred(End::Client) };
    Config {
        window_size: WINDOW_BYTES,
        maximum_packet_size: PACKET_BYTES,
        channel_buffer_size: 4096,
        keepalive_interval: options.keepalive.map(|keepalive| keepalive.interval),
        keepalive_max: options.keepalive.map_or(0, |keepalive| keepalive.count),
        nodelay: true,
        preferred,
        ..Config::default()
    }
}

/// The types of host keys that are taken, the best first: none that sign with SHA-1.
pub(super) fn host_keys() -> Vec<Algorithm> {
    vec![
        Algorithm::Ed25519,
        Algorithm::Ecdsa { curve: EcdsaCurve::NistP256 },
        Algorithm::Ecdsa { curve: EcdsaCurve::NistP384 },
        Algorithm::Ecdsa { curve: EcdsaCurve::NistP521 },
        Algorithm::Rsa { hash: Some(HashAlg::Sha512) },
        Algorithm::Rsa { hash: Some(HashAlg::Sha256) },
    ]
}
