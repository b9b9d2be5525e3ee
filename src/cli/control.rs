//! Asks a running daemon, by its socket.

use std::io::{BufRead as _, BufReader, ErrorKind, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::Value;

use super::{Failure, shown};
use crate::config::Config;
use crate::error::{Exit, in_words};

const PATIENCE: Duration = Duration::from_secs(10);

/// Where the daemon of this configuration listens.
pub(super) fn socket_of(config: &Config) -> Result<PathBuf, Failure> {
    if let Some(socket) = &config.daemon.socket {
        return Ok(socket.clone());
    }
    let given = std::env::var("RUNTIME_DIRECTORY").ok().and_then(|value| {
        value.split(':').next().filter(|path| path.starts_with('/')).map(|path| Path::new(path).join("daemon.sock"))
    });
    let of_user = || {
        let run = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from).filter(|path| path.is_absolute());
        run.map(|run| run.join("lockstep/daemon.sock"))
    };
    let of_root = || rustix::process::geteuid().is_root().then(|| PathBuf::from("/run/lockstep/daemon.sock"));
    given.or_else(of_root).or_else(of_user).ok_or_else(|| {
        Failure::usage("there is no directory for the control socket; name one in the configuration: [daemon] socket")
    })
}

/// Sends a request and gives the answer.
pub(super) fn request(socket: &Path, request: &Value) -> Result<Value, Failure> {
    let plain = |exit, message| Failure::Plain { exit, message };
    let stream = UnixStream::connect(socket).map_err(|error| match error.kind() {
        ErrorKind::NotFound | ErrorKind::ConnectionRefused => plain(
            Exit::Io,
            format!(
                "no daemon listens on '{}'; start it with 'lockstep daemon', or name its socket with --socket",
                shown(socket)
            ),
        ),
        ErrorKind::PermissionDenied => plain(
            Exit::Io,
            format!("the daemon's socket '{}' is not for this user; ask as root or as its own user", shown(socket)),
        ),
        _ => plain(Exit::Io, format!("cannot ask the daemon at '{}': {}", shown(socket), in_words(&error))),
    })?;
    let failed = |error: std::io::Error| {
        plain(Exit::Io, format!("the daemon at '{}' did not answer: {}", shown(socket), in_words(&error)))
    };
    stream.set_read_timeout(Some(PATIENCE)).map_err(failed)?;
    stream.set_write_timeout(Some(PATIENCE)).map_err(failed)?;
    (&stream).write_all(format!("{request}\n").as_bytes()).map_err(failed)?;
    let mut line = String::new();
    BufReader::new(&stream).read_line(&mut line).map_err(failed)?;
    let answer: Value = serde_json::from_str(&line)
        .map_err(|_| plain(Exit::Io, format!("what listens on '{}' is no daemon of lockstep", shown(socket))))?;
    match answer["error"].as_str() {
        Some(error) => Err(Failure::usage(error.to_owned())),
        None => Ok(answer),
    }
}
