//! How to log in to another machine: the options of a command line and what stands in for those not given.

use std::path::PathBuf;
use std::time::Duration;

use super::Failure;
use super::remote::Destination;
use crate::endpoint::link::ConnectError;
use crate::ssh::{SshOptions, SshRemote};

/// How to log in.
#[derive(Debug, clap::Args)]
pub(super) struct Ssh {
    /// TCP port of the SSH server
    #[arg(short = 'P', long, value_name = "PORT", default_value_t = 22)]
    port: u16,
    /// Private key to log in with; may be given several times [default: those in ~/.ssh]
    #[arg(long, value_name = "FILE")]
    identity: Vec<PathBuf>,
    /// Trusted host keys [default: ~/.ssh/known_hosts and /etc/ssh/ssh_known_hosts]
    #[arg(long, value_name = "FILE")]
    known_hosts: Vec<PathBuf>,
    /// The command that starts lockstep at the other end, where it has no subsystem of that name
    #[arg(long, value_name = "COMMAND", default_value = "lockstep sftp-server")]
    pub(super) remote_command: String,
    /// Seconds until a connection attempt is given up
    #[arg(long, value_name = "SECONDS", default_value_t = 20)]
    connect_timeout: u64,
}

/// A connection that could not be made ends the command.
pub(super) fn failed(error: ConnectError) -> Failure {
    Failure::Plain { exit: error.exit, message: error.message }
}

/// The host, with the keys to log in with and those to know it by. Nothing is connected yet.
pub(super) fn connect(destination: &Destination, ssh: &Ssh) -> Result<SshRemote, Failure> {
    let home = std::env::home_dir().unwrap_or_default();
    let or = |given: &[PathBuf], usual: &[PathBuf]| if given.is_empty() { usual.to_vec() } else { given.to_vec() };
    let keys: Vec<PathBuf> = ["id_ed25519", "id_ecdsa", "id_rsa"]
        .iter()
        .map(|name| home.join(".ssh").join(name))
        .filter(|path| path.exists())
        .collect();
    let known = [home.join(".ssh/known_hosts"), PathBuf::from("/etc/ssh/ssh_known_hosts")];
    let own = || uzers::get_current_username().map(|name| name.to_string_lossy().into_owned());
    let user = destination.user.clone().or_else(own).unwrap_or_default();
    let options = SshOptions {
        identity_files: or(&ssh.identity, &keys),
        agent_socket: std::env::var_os("SSH_AUTH_SOCK").map(PathBuf::from),
        known_hosts: or(&ssh.known_hosts, &known),
        connect_timeout: Duration::from_secs(ssh.connect_timeout.max(1)),
        ..SshOptions::new(&user, &destination.host, ssh.port)
    };
    SshRemote::new(options).map_err(failed)
}
