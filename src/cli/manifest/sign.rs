//! `lockstep manifest sign`, and what `lockstep manifest verify` asks of a signature.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use chrono::{Local, NaiveDateTime, TimeZone as _};
use clap::Args;
use rustix::fs::RenameFlags;

use super::super::passphrase;
use super::{Failure, PUBLISHED, decode, output, read_text, replace, shown};
use crate::error::{Escaped, Exit, counted, in_words};
use crate::path::RelPath;
use crate::root::{Follow, Root};
use crate::signature::{self, AllowedSigners, NAMESPACE, Refusal, SignError};
use crate::ssh::SigningKey;

/// Where the signature of what was published lies.
const SIGNATURE: &str = ".lockstep/manifest.sig";
/// More than any list of signers takes.
const MAX_LIST: u64 = 16 << 20;

#[derive(Debug, Args)]
pub(in super::super) struct Sign {
    /// A directory that was published to, or a native manifest
    path: PathBuf,
    /// The private key; or a public key, whose other half the agent of SSH_AUTH_SOCK has [default: ~/.ssh/id_ed25519]
    #[arg(long, value_name = "FILE")]
    key: Option<PathBuf>,
    /// Write the signature to this file ('-': to standard output) [default: PATH/.lockstep/manifest.sig, or PATH.sig]
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
}

/// What a signature must be.
#[derive(Debug, Args)]
pub(in crate::cli) struct Trust {
    /// Read nothing of the list unless an allowed signer has signed it (exit code 3)
    #[arg(long, requires = "allowed_signers")]
    require_signature: bool,
    /// Who may sign, in the format of ssh-keygen(1), ALLOWED SIGNERS
    #[arg(long, value_name = "FILE", requires = "require_signature")]
    allowed_signers: Option<PathBuf>,
    /// Who must have signed, as the list of signers names him [default: anybody on it]
    #[arg(long, value_name = "PRINCIPAL", requires = "require_signature")]
    signer: Option<String>,
    /// The signature [default: DIRECTORY/.lockstep/manifest.sig, or that beside the file of --manifest]
    #[arg(long, value_name = "FILE", requires = "require_signature")]
    signature: Option<PathBuf>,
}

fn untrusted(message: String) -> Failure {
    Failure::Plain { exit: Exit::Trust, message }
}

fn beside(file: &Path) -> PathBuf {
    let mut name = file.as_os_str().to_owned();
    name.push(".sig");
    PathBuf::from(name)
}

impl Sign {
    pub(super) fn run(self) -> Result<Exit, Failure> {
        let directory = std::fs::metadata(&self.path).map_err(Failure::io("read", &self.path))?.is_dir();
        let (at, text) = read_text((!directory).then_some(&*self.path), &self.path)?;
        let manifest = decode(&at, &text)?;
        let file = self.key.unwrap_or_else(|| std::env::home_dir().unwrap_or_default().join(".ssh/id_ed25519"));
        let agent = std::env::var_os("SSH_AUTH_SOCK").filter(|socket| !socket.is_empty()).map(PathBuf::from);
        let failed = |reason: &dyn std::fmt::Display| untrusted(format!("cannot sign '{}': {reason}", shown(&at)));
        let not_made = |error: SignError| failed(&crate::error::chain(&error));
        let key =
            SigningKey::find(&file, agent.as_deref(), &passphrase::of_keys()).map_err(|reason| failed(&reason))?;
        let made = key.sign(&signature::to_sign(&text).map_err(not_made)?).map_err(|reason| failed(&reason))?;
        let made = signature::assemble(key.public(), made, &text).map_err(not_made)?;
        let to = match &self.output {
            Some(file) if file.as_os_str() == "-" => {
                output(made.as_bytes())?;
                PathBuf::from("standard output")
            }
            Some(file) => {
                replace(file, made.as_bytes()).map_err(Failure::io("write", file))?;
                file.clone()
            }
            None if directory => store(&self.path, made.as_bytes())?,
            None => {
                let file = beside(&self.path);
                replace(&file, made.as_bytes()).map_err(Failure::io("write", &file))?;
                file
            }
        };
        eprintln!(
            "signed '{}' (generation {}, {}) with {} key {}: '{}'",
            shown(&at),
            manifest.generation,
            counted(manifest.tree.entries().len() as u64, "path", "paths"),
            Escaped(key.public().algorithm().to_string().as_bytes()),
            key.public().fingerprint(russh::keys::HashAlg::Sha256),
            shown(&to)
        );
        Ok(Exit::Done)
    }
}

/// Puts the signature beside the manifest of what was published, whole or not at all.
fn store(directory: &Path, text: &[u8]) -> Result<PathBuf, Failure> {
    let rel = |path: &str| RelPath::new(path).map_err(|error| Failure::usage(error.to_string()));
    let (root, at) = (Root::open(directory)?, directory.join(SIGNATURE));
    let new = rel(&format!("{SIGNATURE}.{}.new", std::process::id()))?;
    let mut file = root.create_new(&new, 0o644)?;
    let written = file.write_all(text).and_then(|()| file.sync_all()).map_err(Failure::io("write", &at));
    let written = written.and_then(|()| Ok(root.rename(&new, &rel(SIGNATURE)?, RenameFlags::empty())?));
    if written.is_err() {
        let _ = root.unlink(&new);
    }
    written.map(|()| at)
}

impl Trust {
    /// Whether one is asked for.
    pub(in crate::cli) fn is_required(&self) -> bool {
        self.require_signature
    }

    /// Where the signature is, if one is asked for.
    pub(super) fn file(&self, manifest: Option<&Path>, directory: &Path) -> Option<PathBuf> {
        let usual = || manifest.map_or_else(|| directory.join(SIGNATURE), beside);
        self.require_signature.then(|| self.signature.clone().unwrap_or_else(usual))
    }

    /// Checks that `text`, the manifest `manifest` or that of `directory`, is signed as asked, and says by whom.
    pub(in crate::cli) fn check(&self, manifest: Option<&Path>, directory: &Path, text: &[u8]) -> Result<(), Failure> {
        let (Some(at), Some(list)) = (self.file(manifest, directory), &self.allowed_signers) else { return Ok(()) };
        let of = manifest.map_or_else(|| directory.join(PUBLISHED), Path::to_owned);
        let signers = AllowedSigners::parse(&listed(list)?, &local);
        let signed = match read_signature(&at, self.signature.is_none() && manifest.is_none(), directory) {
            Ok(signed) => signed,
            Err(reason) => {
                return Err(untrusted(format!(
                    "'{}' is not signed: '{}': {reason}; sign it where it was made, with: lockstep manifest sign",
                    shown(&of),
                    shown(&at)
                )));
            }
        };
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        let signer = signature::verify(&signed, text, &signers, self.signer.as_deref(), now)
            .map_err(|refusals| refused(&of, &at, list, &refusals))?;
        eprintln!(
            "'{}' is signed by {} with {} (line {} of '{}')",
            shown(&of),
            signer.principal,
            signer.fingerprint,
            signer.line,
            shown(list)
        );
        Ok(())
    }
}

fn refused(of: &Path, at: &Path, list: &Path, refusals: &[Refusal]) -> Failure {
    let reasons: Vec<String> = refusals.iter().map(Refusal::to_string).collect();
    let (of, at, list) = (shown(of), shown(at), shown(list));
    let way_out = match refusals.first() {
        Some(Refusal::Mismatch { .. }) => {
            "if it was published since it was signed, have it signed again; else do not use the data".to_owned()
        }
        Some(Refusal::Unreadable(_) | Refusal::Namespace { .. } | Refusal::Weak(_)) | None => {
            format!("sign it with: lockstep manifest sign (or ssh-keygen -Y sign -n {NAMESPACE})")
        }
        Some(_) => format!("if the signer is to be trusted, put this right in '{list}'"),
    };
    untrusted(format!("the signature '{at}' of '{of}' does not count: {}; {way_out}", reasons.join("; ")))
}

/// A signature's text. That of what was published is read as its manifest is: no link is followed.
fn read_signature(at: &Path, published: bool, directory: &Path) -> Result<Vec<u8>, String> {
    let open = || {
        if published {
            let path = RelPath::new(SIGNATURE).map_err(|error| error.to_string())?;
            let root = Root::open(directory).map_err(|error| crate::error::chain(&error))?;
            root.open_read(&path, Follow::Never).map_err(|error| match error.kind() {
                std::io::ErrorKind::NotFound => "there is none".to_owned(),
                _ => crate::error::chain(&error),
            })
        } else {
            File::open(at).map_err(|error| in_words(&error))
        }
    };
    let mut text = Vec::new();
    let read = open()?.take(signature::MAX_BYTES).read_to_end(&mut text);
    read.map_err(|error| in_words(&error))?;
    Ok(text)
}

/// The list of signers: a file that others may write would let them decide who is trusted.
fn listed(path: &Path) -> Result<Vec<u8>, Failure> {
    let io = || Failure::io("read", path);
    let file = File::open(path).map_err(io())?;
    // RACE: none; the descriptor that is checked is the one that is read.
    let metadata = file.metadata().map_err(io())?;
    if metadata.is_file() && metadata.mode() & 0o022 != 0 {
        return Err(untrusted(format!(
            "'{}': others may write this list (mode {:04o}), and so decide who is trusted; run chmod go-w on it",
            shown(path),
            metadata.mode() & 0o7777
        )));
    }
    let mut text = Vec::new();
    let read = file.take(MAX_LIST + 1).read_to_end(&mut text).map_err(io())?;
    if read as u64 > MAX_LIST {
        return Err(Failure::usage(format!("'{}' is no list of signers: it is too long", shown(path))));
    }
    Ok(text)
}

/// A time on the clock of this machine.
fn local(time: NaiveDateTime) -> Option<i64> {
    Local.from_local_datetime(&time).single().map(|time| time.timestamp())
}
