//! `lockstep manifest sign`, and what `lockstep manifest verify` asks of a signature.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use chrono::{Local, NaiveDateTime, TimeZone as _};
use clap::{Args, ValueEnum};
use rustix::fs::RenameFlags;

use super::super::passphrase;
use super::model::Model;
use super::{Failure, PUBLISHED, decode, model, output, read_text, replace, shown};
use crate::error::{Escaped, Exit, counted, in_words};
use crate::path::RelPath;
use crate::root::{Follow, Root};
use crate::signature::{self, AllowedSigners, NAMESPACE, Refusal, SignError};

/// Where the signature of what was published lies.
const SIGNATURE: &str = ".lockstep/manifest.sig";
/// More than any list of signers takes.
const MAX_LIST: u64 = 16 << 20;

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum SignatureFormat {
    /// Of the manifest, with an SSH key: for lockstep and ssh-keygen; covers modes, owners, links and directories too
    Sshsig,
    /// Of the files, with a P-256 key in PEM (OpenSSF Model Signing): for model_signing, which knows nothing of lockstep
    Oms,
}

#[derive(Debug, Args)]
pub(in super::super) struct Sign {
    /// A directory that was published to; or a native manifest, for sshsig
    pub(super) path: PathBuf,
    /// What is made, and for whom
    #[arg(long, value_enum, default_value = "sshsig")]
    format: SignatureFormat,
    /// The private key; for sshsig also a public key, whose other half the agent of SSH_AUTH_SOCK has [default for sshsig:
    /// ~/.ssh/id_ed25519]
    #[arg(long, value_name = "FILE", required_if_eq("format", "oms"))]
    pub(super) key: Option<PathBuf>,
    /// Write the signature to this file ('-': to standard output) [default: PATH/.lockstep/manifest.sig, or PATH.sig; for oms:
    /// PATH/.lockstep/model.sig]
    #[arg(short, long, value_name = "FILE")]
    pub(super) output: Option<PathBuf>,
}

/// What a signature must be.
#[derive(Debug, Args)]
pub(in crate::cli) struct Trust {
    /// Read nothing of the list unless an allowed signer, or the key of --oms-key, has signed it (exit code 3)
    #[arg(long, requires = "trusted")]
    require_signature: bool,
    /// Who may sign, in the format of ssh-keygen(1), ALLOWED SIGNERS
    #[arg(long, value_name = "FILE", requires = "require_signature", group = "trusted")]
    allowed_signers: Option<PathBuf>,
    /// The P-256 key in PEM that must have signed, by OpenSSF Model Signing; where there is no manifest, what is signed is the list
    #[arg(long, value_name = "FILE", requires = "require_signature", conflicts_with = "signer", group = "trusted")]
    pub(super) oms_key: Option<PathBuf>,
    /// Who must have signed, as the list of signers names him [default: anybody on it]
    #[arg(long, value_name = "PRINCIPAL", requires = "require_signature")]
    signer: Option<String>,
    /// The signature [default: DIRECTORY/.lockstep/manifest.sig, or that beside the list; with --oms-key:
    /// DIRECTORY/.lockstep/model.sig, else DIRECTORY/model.sig]
    #[arg(long, value_name = "FILE", requires = "require_signature")]
    pub(super) signature: Option<PathBuf>,
}

pub(super) fn untrusted(message: String) -> Failure {
    Failure::Plain { exit: Exit::Trust, message }
}

fn beside(file: &Path) -> PathBuf {
    let mut name = file.as_os_str().to_owned();
    name.push(".sig");
    PathBuf::from(name)
}

impl Sign {
    pub(super) fn run(self) -> Result<Exit, Failure> {
        if self.format == SignatureFormat::Oms {
            return model::sign(&self);
        }
        let directory = std::fs::metadata(&self.path).map_err(Failure::io("read", &self.path))?.is_dir();
        let (at, text) = read_text((!directory).then_some(&*self.path), &self.path)?;
        let manifest = decode(&at, &text)?;
        let file = self.key.unwrap_or_else(|| std::env::home_dir().unwrap_or_default().join(".ssh/id_ed25519"));
        let failed = |reason: &dyn std::fmt::Display| untrusted(format!("cannot sign '{}': {reason}", shown(&at)));
        let not_made = |error: SignError| failed(&crate::error::chain(&error));
        let key = passphrase::signing_key(&file).map_err(|reason| failed(&reason))?;
        let made =
            key.sign(&signature::to_sign(NAMESPACE, &text).map_err(not_made)?).map_err(|reason| failed(&reason))?;
        let made = signature::assemble(NAMESPACE, key.public(), made, &text).map_err(not_made)?;
        let to = match &self.output {
            Some(file) if file.as_os_str() == "-" => {
                output(made.as_bytes())?;
                PathBuf::from("standard output")
            }
            Some(file) => {
                replace(file, made.as_bytes()).map_err(Failure::io("write", file))?;
                file.clone()
            }
            None if directory => store(&self.path, SIGNATURE, made.as_bytes())?,
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

/// Puts a signature beside the manifest of what was published, whole or not at all.
pub(super) fn store(directory: &Path, signature: &str, text: &[u8]) -> Result<PathBuf, Failure> {
    let rel = |path: &str| RelPath::new(path).map_err(|error| Failure::usage(error.to_string()));
    let (root, at) = (Root::open(directory)?, directory.join(signature));
    let new = rel(&format!("{signature}.{}.new", std::process::id()))?;
    let mut file = root.create_new(&new, 0o644)?;
    let written = file.write_all(text).and_then(|()| file.sync_all()).map_err(Failure::io("write", &at));
    let written = written.and_then(|()| Ok(root.rename(&new, &rel(signature)?, RenameFlags::empty())?));
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
    pub(in crate::cli) fn file(&self, manifest: Option<&Path>, directory: &Path) -> Option<PathBuf> {
        let usual = || match (&self.oms_key, manifest) {
            (Some(_), _) => model::usual(directory),
            (None, Some(manifest)) => beside(manifest),
            (None, None) => directory.join(SIGNATURE),
        };
        self.require_signature.then(|| self.signature.clone().unwrap_or_else(usual))
    }

    /// The signature of a model, where one is asked for and it counts.
    pub(in crate::cli) fn model(&self, directory: &Path) -> Result<Option<Model>, Failure> {
        let Some(key) = self.oms_key.as_ref().filter(|_| self.require_signature) else { return Ok(None) };
        Model::read(key, self.signature.as_deref(), directory).map(Some)
    }

    /// Checks that `text`, the manifest `manifest` or that of `directory`, is signed as asked, and says by whom.
    pub(in crate::cli) fn check(&self, manifest: Option<&Path>, directory: &Path, text: &[u8]) -> Result<(), Failure> {
        let (Some(at), Some(list)) = (self.file(manifest, directory), &self.allowed_signers) else { return Ok(()) };
        let of = manifest.map_or_else(|| directory.join(PUBLISHED), Path::to_owned);
        let signers = AllowedSigners::parse(&listed(list, "list")?, &local);
        let published = (self.signature.is_none() && manifest.is_none()).then_some(SIGNATURE);
        let signed = match read_signature(&at, published, directory, signature::MAX_BYTES) {
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
        let signer = signature::verify(NAMESPACE, &signed, text, &signers, self.signer.as_deref(), now)
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

/// A signature's text, of so many bytes at most. That of what was published is read as its manifest is: no link is followed.
pub(super) fn read_signature(
    at: &Path,
    published: Option<&str>,
    directory: &Path,
    most: u64,
) -> Result<Vec<u8>, String> {
    let open = || match published {
        Some(path) => {
            let path = RelPath::new(path).map_err(|error| error.to_string())?;
            let root = Root::open(directory).map_err(|error| crate::error::chain(&error))?;
            root.open_read(&path, Follow::Never).map_err(|error| match error.kind() {
                std::io::ErrorKind::NotFound => "there is none".to_owned(),
                _ => crate::error::chain(&error),
            })
        }
        None => File::open(at).map_err(|error| in_words(&error)),
    };
    let mut text = Vec::new();
    let read = open()?.take(most).read_to_end(&mut text);
    read.map_err(|error| in_words(&error))?;
    Ok(text)
}

/// The list of signers, or the key to be trusted: a file that others may write would let them decide who is trusted.
pub(in crate::cli) fn listed(path: &Path, what: &str) -> Result<Vec<u8>, Failure> {
    let io = || Failure::io("read", path);
    let file = File::open(path).map_err(io())?;
    // RACE: none; the descriptor that is checked is the one that is read.
    let metadata = file.metadata().map_err(io())?;
    if metadata.is_file() && metadata.mode() & 0o022 != 0 {
        return Err(untrusted(format!(
            "'{}': others may write this {what} (mode {:04o}), and so decide who is trusted; run chmod go-w on it",
            shown(path),
            metadata.mode() & 0o7777
        )));
    }
    let mut text = Vec::new();
    let read = file.take(MAX_LIST + 1).read_to_end(&mut text).map_err(io())?;
    if read as u64 > MAX_LIST {
        return Err(Failure::usage(format!("'{}' is no {what}: it is too long", shown(path))));
    }
    Ok(text)
}

/// A time on the clock of this machine.
pub(in crate::cli) fn local(time: NaiveDateTime) -> Option<i64> {
    Local.from_local_datetime(&time).single().map(|time| time.timestamp())
}
