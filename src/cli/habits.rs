//! Options that people know from rsync and scp: those whose effect lockstep has anyway are accepted, and the others are
//! answered with what does it here.

use clap::error::{ContextKind, ContextValue, ErrorKind};

use crate::error::Escaped;

/// Accepted by push and pull.
#[derive(Debug, Clone, clap::Args)]
#[command(next_help_heading = "Accepted as for rsync and scp: it is what is done anyway")]
pub(super) struct Habits {
    /// Directories whole, links, modes, times (owner and group need --chown or a policy)
    #[arg(short = 'a', long, overrides_with = "archive")]
    archive: bool,
    /// Directories with all that is in them
    #[arg(short = 'r', long, overrides_with = "recursive")]
    recursive: bool,
    /// Modes, unless a policy says otherwise
    #[arg(short = 'p', long, overrides_with = "perms")]
    perms: bool,
    /// Times
    #[arg(short = 't', long, overrides_with = "times")]
    times: bool,
    /// Compression, where lockstep is at the other end
    #[arg(short = 'z', long, overrides_with = "compress", conflicts_with = "no_compress")]
    compress: bool,
}

const ANYWAY: &str = "leave it out: lockstep does that anyway";

/// What to do instead of an option that lockstep does not have.
fn instead(option: &str) -> Option<&'static str> {
    let option = option.split('=').next().unwrap_or(option);
    Some(match option {
        "-H" | "--hard-links" | "-S" | "--sparse" | "--partial" | "--mkpath" | "-d" | "--dirs" | "--fsync" | "-s"
        | "--delay-updates" => ANYWAY,
        "--append" | "--append-verify" => {
            "leave it out: what arrived of a file is gone on with, and verified whole; --append-only GLOB is for logs, \
             which only grow"
        }
        "--human-readable" | "--stats" | "--progress" | "--info" => {
            "leave it out: progress is shown on a terminal and a summary at the end; -v says more"
        }
        "--inplace" | "-T" | "--temp-dir" => {
            "leave it out: content is staged beside the target and renamed when it is proven"
        }
        "-l" | "-L" | "--copy-links" | "-k" | "--copy-dirlinks" | "--safe-links" => {
            "--links=safe (the default), all, skip or refuse; a link that is named as SRC stands for what it points to"
        }
        "-C" | "--cvs-exclude" => "compression (scp) needs no option; files are left out (rsync) by --exclude",
        "-e" | "--rsh" => "SSH is built in: -P PORT, -J HOST, -o KEY=VALUE, --identity FILE and ~/.ssh/config say how",
        "--port" => "-P PORT",
        "--identity-file" => "--identity FILE",
        "--rsync-path" => "--remote-command COMMAND",
        "--timeout" | "--contimeout" => "--connect-timeout SECONDS, and -o ServerAliveInterval=SECONDS",
        "-u" | "--update" | "--ignore-existing" | "--existing" => {
            "the target becomes what the source is: -n -i shows what would be replaced"
        }
        "-I" | "--ignore-times" => "-c hashes every file, whatever its size and time say",
        "-g" | "--group" | "--owner" => "--chown USER:GROUP, or a policy",
        "-A" | "--acls" => "a rule of a policy gives ACLs: acl = [\"group:ops:r\"]",
        "-X" | "--xattrs" => "extended attributes are not carried over",
        "-x" | "--one-file-system" => "leave out what is mounted in the source with --exclude",
        "-b" | "--backup" | "--backup-dir" => {
            "--delete=trash moves old versions and what is removed to .lockstep/trash of the target"
        }
        "-f" | "--filter" | "--exclude-from" | "--include-from" => {
            "--exclude and --include, several times, or a file .lockstepignore in the source"
        }
        "--del" | "--delete-after" | "--delete-before" | "--delete-during" | "--delete-delay" => {
            "--delete, which chooses a safe order by itself"
        }
        _ => return None,
    })
}

/// What to say about an option of a transfer in place of clap's words.
pub(super) fn hint(error: &clap::Error) -> Option<String> {
    let Some(ContextValue::String(option)) = error.get(ContextKind::InvalidArg) else { return None };
    match error.kind() {
        ErrorKind::UnknownArgument => instead(option).map(|hint| format!("there is no {option} here: {hint}")),
        // `-aP`: as for rsync, whose -P takes no value; here the next word became the port.
        ErrorKind::ValueValidation if option.starts_with("--port") => {
            let Some(ContextValue::String(value)) = error.get(ContextKind::InvalidValue) else { return None };
            let number = value.bytes().all(|byte| byte.is_ascii_digit());
            let value = Escaped(value.as_bytes());
            (!number).then(|| {
                format!("'{value}' is no port: -P takes one, as for scp; what -P asks of rsync is done anyway")
            })
        }
        _ => None,
    }
}
