//! Adding a key to `authorized_keys` of an account, over SFTP, through a login that works already.
//!
//! Only a line is appended: what is there keeps its content, its mode and its owner.

use russh_sftp::client::SftpSession;
use russh_sftp::client::error::Error;
use russh_sftp::client::fs::Metadata;
use russh_sftp::protocol::{FileAttributes, OpenFlags, StatusCode};
use tokio::io::AsyncWriteExt as _;

use super::remote::{START_TIMEOUT, SshRemote};
use crate::endpoint::link::ConnectError;
use crate::error::{Escaped, Exit};

const DIRECTORY: &str = ".ssh";
const FILE: &str = ".ssh/authorized_keys";
/// Longer than any file that people keep.
const MAX_BYTES: u64 = 4 << 20;

/// What became of the line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Enrolled {
    /// It was added to this file.
    Added(String),
    /// The same line was in this file.
    There(String),
    /// The key is in this file, with other options in front of it.
    Otherwise(String),
    /// The account sees a directory of its own as `/`; the file is out of reach.
    Confined,
}

impl SshRemote {
    /// Adds a line of `authorized_keys` for the key whose base64 text is `blob`.
    ///
    /// # Errors
    /// When the login does not work, the account has no SFTP, or the file cannot be written.
    pub fn enroll(&self, line: &str, blob: &str) -> Result<Enrolled, ConnectError> {
        let connection = self.connection(0)?;
        self.block_on(async {
            let work = async {
                let again = |error: russh::Error| self.failed(format!("no channel: {error}"), Exit::TryAgain);
                let channel = connection.handle.channel_open_session().await.map_err(again)?;
                channel.request_subsystem(true, "sftp").await.map_err(again)?;
                let sftp = SftpSession::new(channel.into_stream()).await.map_err(|error| {
                    self.failed(
                        format!("the account has no SFTP ({}); add the line by hand", told(&error)),
                        Exit::Usage,
                    )
                })?;
                append(&sftp, line, blob).await.map_err(|(what, error)| {
                    self.failed(format!("{what}: {}; add the line by hand", told(&error)), Exit::Io)
                })
            };
            tokio::time::timeout(START_TIMEOUT, work)
                .await
                .unwrap_or_else(|_| Err(self.failed("the host does not answer", Exit::TryAgain)))
        })
    }
}

/// What the other end said, made safe to print.
fn told(error: &Error) -> String {
    let text = match error {
        Error::Status(status) => status.error_message.clone(),
        error => error.to_string(),
    };
    crate::error::said(text.as_bytes())
}

type Failed = (&'static str, Error);

fn mode(mode: u32) -> FileAttributes {
    FileAttributes { permissions: Some(mode), ..FileAttributes::empty() }
}

async fn append(sftp: &SftpSession, line: &str, blob: &str) -> Result<Enrolled, Failed> {
    let home = sftp.canonicalize(".").await.map_err(|error| ("finding the home directory", error))?;
    if home == "/" {
        return Ok(Enrolled::Confined);
    }
    let path = format!("{}/{FILE}", Escaped(home.as_bytes()));
    let text = match directory(sftp).await? {
        true => read(sftp).await?,
        false => None,
    };
    let is_key = |line: &&str| !line.trim_start().starts_with('#') && line.split_whitespace().any(|word| word == blob);
    let present = text.as_deref().unwrap_or_default();
    if let Some(found) = present.lines().find(is_key) {
        let options = |line: &str| line.split_once(blob).map(|(before, _)| before.trim().to_owned());
        return Ok(if options(found) == options(line) { Enrolled::There(path) } else { Enrolled::Otherwise(path) });
    }
    let start = if present.is_empty() || present.ends_with('\n') { "" } else { "\n" };
    let flags = OpenFlags::WRITE | OpenFlags::APPEND | OpenFlags::CREATE;
    let writing = |error| ("writing .ssh/authorized_keys", error);
    let mut file = sftp.open_with_flags_and_attributes(FILE, flags, mode(0o600)).await.map_err(writing)?;
    // One write: a line that is cut in two would let nobody in, and spoil the next one.
    let written = file.write_all(format!("{start}{line}\n").as_bytes()).await.map_err(|error| writing(error.into()));
    let closed = file.close().await.map_err(|error| writing(error.into()));
    written.and(closed)?;
    // The account's umask may have been narrower, never wider.
    if text.is_none() {
        sftp.set_metadata(FILE, mode(0o600)).await.map_err(writing)?;
    }
    match read(sftp).await? {
        Some(text) if text.lines().any(|there| there == line) => Ok(Enrolled::Added(path)),
        _ => {
            Err(("writing .ssh/authorized_keys", Error::UnexpectedBehavior("the line is not there afterwards".into())))
        }
    }
}

/// Whether the directory was there; it is made if not.
async fn directory(sftp: &SftpSession) -> Result<bool, Failed> {
    let making = |error| ("making .ssh", error);
    match stat(sftp, DIRECTORY).await.map_err(making)? {
        Some(found) if found.is_dir() => Ok(true),
        Some(_) => Err(making(Error::UnexpectedBehavior("it is there, and no directory".into()))),
        None => {
            sftp.create_dir(DIRECTORY).await.map_err(making)?;
            sftp.set_metadata(DIRECTORY, mode(0o700)).await.map_err(making)?;
            Ok(false)
        }
    }
}

async fn stat(sftp: &SftpSession, path: &str) -> Result<Option<Metadata>, Error> {
    match sftp.metadata(path).await {
        Ok(found) => Ok(Some(found)),
        Err(Error::Status(status)) if status.status_code == StatusCode::NoSuchFile => Ok(None),
        Err(error) => Err(error),
    }
}

async fn read(sftp: &SftpSession) -> Result<Option<String>, Failed> {
    let reading = |error| ("reading .ssh/authorized_keys", error);
    match stat(sftp, FILE).await.map_err(reading)? {
        None => Ok(None),
        Some(found) if found.size.unwrap_or(0) > MAX_BYTES => {
            Err(reading(Error::UnexpectedBehavior("it is far too large".into())))
        }
        Some(_) => {
            let bytes = sftp.read(FILE).await.map_err(reading)?;
            Ok(Some(String::from_utf8_lossy(&bytes).into_owned()))
        }
    }
}
