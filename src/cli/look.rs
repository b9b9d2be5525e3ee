//! What lies at a path of another machine, asked before it is decided what an argument means.

use super::Failure;
use super::login::{self, Ssh};
use super::remote::{Destination, Reach};
use crate::endpoint::client::{Client, ClientOptions};
use crate::endpoint::link::Remote as _;
use crate::error::Exit;
use crate::wire::buffer::Reader;
use crate::wire::extension::put_string;
use crate::wire::sftp::{Attributes, Status, packet};

/// What was found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Found {
    Directory,
    File,
    /// Neither, or nothing that may be looked at.
    Other,
    Nothing,
}

/// Asks over a connection of its own, by whatever speaks SFTP at the other end. Symbolic links are followed.
pub(super) fn look(destination: &Destination, ssh: &Ssh, reach: &Reach) -> Result<Found, Failure> {
    let remote = login::connect(destination, ssh)?;
    let host = remote.describe();
    let mut last = None;
    for way in reach.ways() {
        let link = match remote.open(&way, 0) {
            Ok(link) => link,
            Err(error) if error.not_offered => continue,
            Err(error) => return Err(login::failed(error)),
        };
        // A command that is not there shows only now.
        match Client::connect(link, &host, ClientOptions::default()) {
            Ok(client) => return Ok(stat(&client, &destination.path)?),
            Err(error) => last = Some(error),
        }
    }
    Err(last.map_or_else(
        || Failure::Plain { exit: Exit::Usage, message: format!("{host} offers no way to transfer files") },
        Failure::Endpoint,
    ))
}

fn stat(client: &Client, path: &str) -> Result<Found, crate::endpoint::Error> {
    let mut request = vec![0, 0, 0, 0, packet::STAT, 0, 0, 0, 0];
    put_string(&mut request, path.as_bytes());
    let answer = client.call(request, false)?;
    let mut fields = Reader(&answer.body);
    let short = |_| client.protocol("the answer to STAT ends too early");
    match answer.kind {
        packet::ATTRS => Ok(match Attributes::decode(&mut fields).map_err(short)?.mode.unwrap_or(0) & 0o170_000 {
            0o040_000 => Found::Directory,
            0o100_000 => Found::File,
            _ => Found::Other,
        }),
        packet::STATUS if fields.u32().map_err(short)? == Status::NoSuchFile as u32 => Ok(Found::Nothing),
        packet::STATUS => Ok(Found::Other),
        kind => Err(client.protocol(format!("an answer of type {kind} to STAT"))),
    }
}
