//! A session over standard input and output, as sshd starts a subsystem.

use std::io::{self, Read, Write};
use std::sync::{Arc, Mutex, PoisonError};

use super::agent::{Extensions, Output};
use super::session::{Session, SessionConfig};

/// Standard output; packets go out whole. A client that has gone ends the session by the end of its input.
struct Stdout(Mutex<io::Stdout>);

impl Output for Stdout {
    fn send(&self, packet: Vec<u8>) {
        let mut out = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let _ = out.write_all(&packet).and_then(|()| out.flush());
    }
}

/// Serves until the end of the input.
///
/// # Errors
/// When the root cannot be opened, the input cannot be read or is not SFTP.
pub fn run(config: SessionConfig, extensions: Option<Arc<dyn Extensions>>) -> io::Result<()> {
    let output: Arc<dyn Output> = Arc::new(Stdout(Mutex::new(io::stdout())));
    let mut session = Session::new(config, output, extensions).map_err(io::Error::other)?;
    let mut input = io::stdin().lock();
    let mut buffer = vec![0; 256 << 10];
    loop {
        match input.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(count) => session.feed(&buffer[..count]).map_err(io::Error::other)?,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}
