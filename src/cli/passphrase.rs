//! Asking for the passphrase of a key, at the terminal and nowhere else. Nothing else is ever asked for so.

use std::fs::{File, OpenOptions};
use std::io::{Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::termios::{LocalModes, OptionalActions, SpecialCodeIndex, Termios, tcgetattr, tcsetattr};

use super::display;
use crate::error::shown;
use crate::ssh::{Passphrase, SigningKey};

/// A terminal that shows nothing of what is typed, until this is dropped.
struct Silent {
    terminal: File,
    before: Termios,
}

impl Silent {
    fn open() -> Option<Silent> {
        let terminal = OpenOptions::new().read(true).write(true).open("/dev/tty").ok()?;
        let before = tcgetattr(&terminal).ok()?;
        let mut silent = before.clone();
        // Signals too: an interrupt must not leave the terminal mute.
        silent.local_modes.remove(LocalModes::ECHO | LocalModes::ECHONL | LocalModes::ICANON | LocalModes::ISIG);
        silent.special_codes[SpecialCodeIndex::VMIN] = 1;
        silent.special_codes[SpecialCodeIndex::VTIME] = 0;
        tcsetattr(&terminal, OptionalActions::Flush, &silent).ok()?;
        Some(Silent { terminal, before })
    }

    /// A line; `None` when it was interrupted.
    fn line(&mut self) -> Option<Vec<u8>> {
        let (mut line, mut byte) = (Vec::new(), [0]);
        loop {
            if self.terminal.read(&mut byte).ok()? == 0 {
                return None;
            }
            match byte[0] {
                b'\n' | b'\r' => return Some(line),
                // Ctrl-C, Ctrl-D, Ctrl-\
                3 | 4 | 28 => return None,
                8 | 127 => _ = line.pop(),
                // Ctrl-U
                21 => line.clear(),
                byte => line.push(byte),
            }
        }
    }
}

impl Drop for Silent {
    fn drop(&mut self) {
        let _ = tcsetattr(&self.terminal, OptionalActions::Flush, &self.before);
        let _ = self.terminal.write_all(b"\n");
    }
}

/// Asks; `None` without a terminal, or when it was interrupted.
pub(super) fn ask(question: &str) -> Option<String> {
    let _pause = display::pause();
    let mut silent = Silent::open()?;
    silent.terminal.write_all(format!("\r\x1b[K{question}").as_bytes()).ok()?;
    String::from_utf8(silent.line()?).ok()
}

/// Asks for that of a key file.
pub(super) fn of_keys() -> Passphrase {
    Arc::new(|key| ask(&format!("Passphrase for {}: ", shown(key))))
}

/// The key of a file that is to sign something, with its passphrase asked for, or at the agent of SSH_AUTH_SOCK.
pub(super) fn signing_key(file: &Path) -> Result<SigningKey, String> {
    let agent = std::env::var_os("SSH_AUTH_SOCK").filter(|socket| !socket.is_empty()).map(PathBuf::from);
    SigningKey::find(file, agent.as_deref(), &of_keys())
}
