//! Signatures of OpenSSF Model Signing: making one of what was published, and what is asked of one.

use std::fs::File;
use std::io::Read as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use sha2::{Digest as _, Sha256};

use super::super::passphrase;
use super::sign::{Sign, listed, read_signature, store, untrusted};
use super::{Failure, decode, output, place_of, published, replace, shown};
use crate::check::{self, Finding, Outcome};
use crate::cli::check::check_failure;
use crate::cli::display::{Display, Verbosity};
use crate::error::{Escaped, Exit, chain, counted, in_words};
use crate::manifest::{Digest, Tree, format, sums};
use crate::path::RelPath;
use crate::root::{Follow, Root};
use crate::signature::oms::{self, Listed, PrivateKey, PublicKey, Refusal, Statement};

/// Where the signature of what was published lies: where a run that publishes more does not remove it, and no check takes it
/// for a part of the data.
const SIGNATURE: &str = ".lockstep/model.sig";
/// Where that of a model lies which was signed by others.
const BESIDE: &str = "model.sig";
const STATE_DIRECTORY: &str = ".lockstep";
/// More than any key takes.
const MAX_KEY: u64 = 1 << 20;
/// So many of the paths that are wrong are named.
const NAMED: usize = 3;

/// Where the signature is looked for in `directory`.
pub(super) fn usual(directory: &Path) -> PathBuf {
    directory.join(usual_name(directory))
}

fn usual_name(directory: &Path) -> &'static str {
    let there = |name: &str| std::fs::symlink_metadata(directory.join(name)).is_ok();
    if there(SIGNATURE) || !there(BESIDE) { SIGNATURE } else { BESIDE }
}

/// `lockstep manifest sign --format oms`.
pub(super) fn sign(asked: &Sign) -> Result<Exit, Failure> {
    let path = &asked.path;
    if !std::fs::metadata(path).map_err(Failure::io("read", path))?.is_dir() {
        let message =
            "is no directory; with --format oms what is signed are the files, so name where they were published";
        return Err(Failure::usage(format!("'{}' {message}", shown(path))));
    }
    let failed = |reason: &dyn std::fmt::Display| untrusted(format!("cannot sign '{}': {reason}", shown(path)));
    // It cannot be left out: the command line says so.
    let key = private_key(asked.key.as_deref().unwrap_or(Path::new(""))).map_err(|reason| failed(&reason))?;
    let (at, text) = published(path)?.ok_or_else(|| {
        let what = "has no manifest: nothing was published there; push to it first, or sign it with model_signing";
        Failure::usage(format!("'{}' {what}", shown(path)))
    })?;
    let tree = decode(&at, &text)?.tree;
    let file = asked.output.as_deref().filter(|file| file.as_os_str() != "-");
    let own = file.and_then(|file| place_of(file, path));
    if let Some(own) = own.as_ref().filter(|own| tree.get(own).is_some()) {
        let message = "belongs to what was published there, and a signature in its place would change that";
        return Err(Failure::usage(format!("'{own}' {message}; write it to another file")));
    }
    let whole = path.canonicalize().map_err(Failure::io("read", path))?;
    let name = Escaped(whole.file_name().unwrap_or_default().as_encoded_bytes()).to_string();
    let without = without(&Root::open(path)?, &tree, own);
    let statement = Statement::of(name, &tree, &without)
        .map_err(|error| Failure::usage(format!("cannot sign '{}': {error}", shown(path))))?;
    as_listed(path, file, &text)?;
    let made = oms::sign(&statement, &key).map_err(|error| failed(&error))?;
    let to = match file {
        Some(file) => {
            replace(file, made.as_bytes()).map_err(Failure::io("write", file))?;
            shown(file).to_string()
        }
        None if asked.output.is_some() => {
            output(made.as_bytes())?;
            "standard output".to_owned()
        }
        None => shown(&store(path, SIGNATURE, made.as_bytes())?).to_string(),
    };
    let left = left_out(&statement, &oms::listed(&tree));
    if !left.is_empty() {
        eprintln!("lockstep: note: not signed, as model_signing does not look at them: {}", some_of(&left));
    }
    eprintln!(
        "signed '{}' ({}) with P-256 key {}: '{to}'",
        shown(path),
        counted(statement.files.len() as u64, "file", "files"),
        key.public().hint()
    );
    Ok(Exit::Done)
}

fn private_key(path: &Path) -> Result<PrivateKey, String> {
    let name = shown(path);
    let unread = |error| format!("cannot read '{name}': {}", in_words(&error));
    let file = File::open(path).map_err(unread)?;
    // RACE: none; the descriptor that is checked is the one that is read.
    let metadata = file.metadata().map_err(unread)?;
    if metadata.is_file() && metadata.mode() & 0o077 != 0 {
        let mode = metadata.mode() & 0o7777;
        return Err(format!("'{name}' can be read by others (mode {mode:04o}); run chmod 600 on it"));
    }
    let mut text = Vec::new();
    file.take(MAX_KEY).read_to_end(&mut text).map_err(unread)?;
    let ask = || passphrase::ask(&format!("Passphrase for {name}: "));
    PrivateKey::from_pem(&text, &ask).map_err(|error| format!("'{name}': {error}"))
}

/// What has to be left out beside what always is: the signature, and what lockstep keeps in roots further down.
fn without(root: &Root, tree: &Tree, own: Option<RelPath>) -> Vec<RelPath> {
    let directories = tree.entries().iter().filter(|entry| entry.is_directory());
    let states = directories.filter_map(|entry| entry.path.join(STATE_DIRECTORY).ok());
    states.filter(|path| root.stat(path, Follow::Never).is_ok()).chain(own).collect()
}

/// Whether the directory holds what its manifest says: nothing is signed that is not there. Files that were hashed before and
/// did not move are not read again.
fn as_listed(path: &Path, signature: Option<&Path>, text: &[u8]) -> Result<(), Failure> {
    // The signature says nothing of permissions.
    let own = signature.map(Path::to_owned).into_iter().collect();
    let options = check::Options { ignore_permissions: true, own, ..check::Options::default() };
    let mut display = Display::new(Verbosity::Normal, false);
    let report = check::check(path, &options, &display);
    display.finish();
    let report = report.map_err(|error| check_failure(&error))?;
    if report.list != Some(Digest(Sha256::digest(text).into())) {
        let message = format!("'{}': something was published there meanwhile; try again", shown(path));
        return Err(Failure::Plain { exit: Exit::TryAgain, message });
    }
    let exit = match report.outcome() {
        Outcome::Good => return Ok(()),
        Outcome::Unfinished => Exit::Incomplete,
        Outcome::Bad => Exit::BadData,
    };
    let told = |finding: &Finding| format!("'{}' is {}", shown(&finding.path), finding.kind.name());
    let told: Vec<String> = report.findings.iter().map(told).collect();
    let message = format!(
        "'{}' is not what its manifest says, so that nothing is signed: {}; 'lockstep check' says more",
        shown(path),
        some_of(&told)
    );
    Err(Failure::Plain { exit, message })
}

/// What is listed and not signed.
fn left_out(statement: &Statement, listed: &Listed) -> Vec<String> {
    listed.keys().filter(|path| statement.ignores(path)).map(|path| format!("'{path}'")).collect()
}

/// The first few.
fn some_of(all: &[String]) -> String {
    let more = all.len().saturating_sub(NAMED);
    let first = all[..all.len() - more].join(", ");
    if more == 0 { first } else { format!("{first}, and {more} more") }
}

/// A signature that counts.
pub(in crate::cli) struct Model {
    /// Where it is.
    pub(in crate::cli) at: PathBuf,
    /// Of its file.
    pub(in crate::cli) digest: Digest,
    /// Who made it.
    pub(in crate::cli) key: PublicKey,
    pub(super) statement: Statement,
}

impl Model {
    /// Reads the signature `file`, or that of `directory`, which has to be by the key of the file `key`; says by whom it is.
    pub(super) fn read(key: &Path, file: Option<&Path>, directory: &Path) -> Result<Model, Failure> {
        let wrong = |error| Failure::usage(format!("'{}' cannot be trusted: {error}", shown(key)));
        let trusted = PublicKey::from_pem(&listed(key, "key")?).map_err(wrong)?;
        let published = file.is_none().then(|| usual_name(directory));
        let at = file.map_or_else(|| usual(directory), Path::to_owned);
        let text = read_signature(&at, published, directory, oms::MAX_BYTES).map_err(|reason| {
            let beside = published.filter(|name| *name == SIGNATURE).map(|_| directory.join(BESIDE));
            let beside = beside.map(|at| format!(", nor '{}'", shown(&at))).unwrap_or_default();
            untrusted(format!(
                "'{}' is not signed: '{}'{beside}: {reason}; name the signature with --signature, or have it signed \
                 (lockstep manifest sign --format oms, model_signing sign key)",
                shown(directory),
                shown(&at)
            ))
        })?;
        let statement = oms::verify(&text, &trusted).map_err(|refusal| refused(&at, key, &refusal))?;
        let files = counted(statement.files.len() as u64, "file is", "files are");
        eprintln!("{files} signed with the key {} of '{}' ('{}')", trusted.hint(), shown(key), shown(&at));
        Ok(Model { at, digest: Digest(Sha256::digest(&text).into()), key: trusted, statement })
    }

    /// The list `file`, or the manifest of `directory`, which has to list just what is signed; `None` where there is none.
    pub(in crate::cli) fn list(
        &self,
        file: Option<&Path>,
        directory: &Path,
    ) -> Result<Option<(PathBuf, Vec<u8>)>, Failure> {
        let (at, text) = match file {
            Some(file) => (file.to_owned(), std::fs::read(file).map_err(Failure::io("read", file))?),
            None => match published(directory)? {
                Some(found) => found,
                None => return Ok(None),
            },
        };
        let listed = files(&at, &text)?;
        let own = place_of(&self.at, directory);
        let wrong = oms::disagreements(&self.statement, &listed, own.as_ref());
        if wrong.is_empty() {
            let left = left_out(&self.statement, &listed);
            if !left.is_empty() {
                eprintln!("lockstep: note: listed, and left out by the signature: {}", some_of(&left));
            }
            return Ok(Some((at, text)));
        }
        Err(untrusted(format!(
            "'{}' is not what '{}' signs: {}; if it was published since it was signed, have it signed again; else do not \
             use the data",
            shown(&at),
            shown(&self.at),
            some_of(&wrong)
        )))
    }
}

/// The files of a list: a manifest, or what sha256sum writes.
fn files(at: &Path, text: &[u8]) -> Result<Listed, Failure> {
    let wrong = |error: &dyn std::error::Error| {
        Failure::bad_data(format!("'{}', {}; the list is not used", shown(at), chain(error)))
    };
    if text.starts_with(b"lockstep-manifest\t") {
        return Ok(oms::listed(&format::decode(text).map_err(|error| wrong(&error))?.tree));
    }
    Ok(sums::parse(text)
        .map_err(|error| wrong(&error))?
        .into_iter()
        .map(|(path, digest)| (path, Some(digest)))
        .collect())
}

fn refused(at: &Path, key: &Path, refusal: &Refusal) -> Failure {
    let way_out = match refusal {
        Refusal::OtherKey { .. } | Refusal::KeyId { .. } => {
            format!("if that key is to be trusted, name it instead of '{}'", shown(key))
        }
        Refusal::Certificate | Refusal::Logged | Refusal::Statement(_) => {
            "have it signed by 'model_signing sign key' or 'lockstep manifest sign --format oms'".to_owned()
        }
        Refusal::Mismatch => "do not use the data before it is signed again".to_owned(),
        _ => "get the signature again from where it came from".to_owned(),
    };
    untrusted(format!("the signature '{}' does not count: {refusal}; {way_out}", shown(at)))
}
