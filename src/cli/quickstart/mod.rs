//! `lockstep quickstart`: a tour that runs the real commands on this machine and checks what each of them did.
//!
//! Everything happens in a private temporary directory that is removed at the end. `~/.ssh` is neither read nor
//! written; a directory that the user names is only read.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Write as _};
use std::os::unix::fs::{FileExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use indicatif::{BinaryBytes, HumanCount};
use serde_json::Value;

use super::stop::Stop;
use super::{Failure, shown};
use crate::audit;
use crate::error::{Exit, chain};
use crate::path::RelPath;
use crate::policy::{Policy, PolicySpec};

mod place;
mod sample;

use place::{Place, Ran, Server, USER};

/// See on this machine what lockstep does: nothing to set up, nothing left behind
///
/// Starts a server of its own on a loopback port, pushes a sample (or DIR) to it, and shows what a push proves: only
/// what changed is sent again, permissions are the receiver's, and a single wrong byte is noticed and mended.
#[derive(Debug, clap::Args)]
pub(super) struct Quickstart {
    /// A directory to push instead of the sample; it is only read
    #[arg(value_name = "DIR")]
    directory: Option<PathBuf>,
    /// Keep everything, and say where it is
    #[arg(long)]
    keep: bool,
}

impl Quickstart {
    pub(super) fn run(self) -> Result<Exit, Failure> {
        let stop = Stop::on_signals()?;
        let own = match &self.directory {
            None => None,
            Some(directory) => {
                if !std::fs::metadata(directory).map_err(Failure::io("open", directory))?.is_dir() {
                    let message = format!("'{}' is not a directory; it takes one to show this with", shown(directory));
                    return Err(Failure::usage(message));
                }
                Some(directory.canonicalize().map_err(Failure::io("open", directory))?)
            }
        };
        let place = Place::new(self.keep, stop)?;
        let source = match own {
            None => {
                sample::make(&place.path("sample")).map_err(Failure::io("make", &place.path("sample")))?;
                PathBuf::from("sample")
            }
            Some(directory) => directory,
        };
        place.write("policy.toml", sample::POLICY)?;
        let server = place.serve()?;
        let name = if self.directory.is_some() { "data" } else { "sample" };
        let tour = Tour { place: &place, server: &server, sample: self.directory.is_none(), source, name };
        tour.run().map_err(|failure| match (server.said(), &failure) {
            (said, Failure::Plain { exit: Exit::Incomplete, message }) => {
                Failure::Plain { exit: Exit::Incomplete, message: format!("{message}\nThe server said:\n{said}") }
            }
            _ => failure,
        })?;
        if self.keep {
            say(&format!("\nKept in {}\n", shown(&place.at)))?;
        }
        Ok(Exit::Done)
    }
}

/// Writes to standard output; a reader that has gone ends the tour.
fn say(text: &str) -> Result<(), Failure> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes()).and_then(|()| out.flush()).map_err(Failure::Output)
}

fn files(count: u64) -> String {
    format!("{} {}", HumanCount(count), if count == 1 { "file" } else { "files" })
}

/// The same with digests cut short, so that lines stay readable.
fn short(text: &str) -> String {
    let words = text.split(' ').map(|word| {
        let digest = word.trim_end_matches(',');
        let digits = digest.len() == 64 && digest.bytes().all(|byte| byte.is_ascii_hexdigit());
        if digits { format!("{}…{}", &digest[..12], &word[64..]) } else { word.to_owned() }
    });
    words.collect::<Vec<_>>().join(" ")
}

/// A step that did not do what it said.
fn wrong(step: &str, ran: &Ran) -> Failure {
    let code = ran.code().map_or_else(|| "a signal".to_owned(), |code| format!("exit {code}"));
    let said = format!("{}{}", ran.stdout, ran.stderr);
    Failure::Plain {
        exit: Exit::Incomplete,
        message: format!("{step} did not go as it should: {code}\n{}", said.trim()),
    }
}

struct Tour<'a> {
    place: &'a Place,
    server: &'a Server,
    sample: bool,
    source: PathBuf,
    /// What the copy is called in the server's root.
    name: &'static str,
}

impl Tour<'_> {
    fn run(&self) -> Result<(), Failure> {
        self.introduce()?;
        self.first_push()?;
        self.permissions()?;
        self.second_push()?;
        self.verify()?;
        self.damage()?;
        self.farewell()
    }

    /// What the copy is called from within the place.
    fn copy(&self) -> String {
        format!("server/{}", self.name)
    }

    fn introduce(&self) -> Result<(), Failure> {
        let what = if self.sample {
            "a sample: a checkpoint of 64 MiB, 300 small files, scripts, logs".to_owned()
        } else {
            format!("what '{}' holds, which is only read", shown(&self.source))
        };
        say(&format!(
            "lockstep, shown on this machine in '{}', with {what}.\n\
             \n1. A key, a server that lets only that key in, and the server's key, known from now on\n\
             \x20  $ lockstep keys generate key\n\
             \x20  $ lockstep serve --listen 127.0.0.1:{port} --user {USER} --root server \\\n\
             \x20      --authorized-keys key.pub --host-key host_key --policy-file policy.toml\n\
             \x20  $ lockstep keys scan-host --add 127.0.0.1\n\
             \x20  Public keys only, no shell, nothing but files below 'server'. The options that name this port\n\
             \x20  and these keys (-P, --identity, --known-hosts) are left out of what is shown from here on.\n",
            shown(&self.place.at),
            port = self.server.port
        ))
    }

    /// Pushes, and gives the lines for changed paths and the summary.
    fn push(&self, step: &str) -> Result<(Vec<String>, Value), Failure> {
        let target = format!("{USER}@127.0.0.1:/{}", self.name);
        let source = self.source.to_str().ok_or_else(|| {
            Failure::usage(format!("'{}' is not UTF-8; name a directory that is", shown(&self.source)))
        })?;
        let login = ["-P", &self.server.port, "-F", "none", "--identity", "key", "--known-hosts", "known_hosts"];
        let ran = self.place.lockstep(&[&["push", "--json"], &login[..], &["--", source, &target]].concat(), false)?;
        let (mut changed, mut summary) = (Vec::new(), Value::Null);
        for event in ran.stdout.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok()) {
            match event["event"].as_str() {
                Some("summary") => summary = event,
                Some("change") => {
                    let part = |name: &str| event[name].as_str().unwrap_or_default().to_owned();
                    changed.push(format!("{} {}", part("change"), part("path")));
                }
                _ => {}
            }
        }
        if ran.code() != Some(0) || summary["complete"] != true {
            return Err(wrong(step, &ran));
        }
        Ok((changed, summary))
    }

    fn shown_push(&self) -> String {
        let source = if self.sample { "sample".to_owned() } else { shown(&self.source).to_string() };
        format!("   $ lockstep push {source} {USER}@127.0.0.1:/{}\n", self.name)
    }

    fn first_push(&self) -> Result<(), Failure> {
        say(&format!("\n2. The first push\n{}", self.shown_push()))?;
        let (_, summary) = self.push("the first push")?;
        let count = |name: &str| summary[name].as_u64().unwrap_or(0);
        let (bytes, wire) = (count("verified_bytes"), count("wire_bytes"));
        if count("verified_files") == 0 {
            return Err(Failure::usage(format!("'{}' holds no file to show this with", shown(&self.source))));
        }
        let rate = match (wire * 100).checked_div(bytes) {
            Some(part) if part < 100 => format!(" ({part} %) over the wire, compressed with zstd"),
            _ => " over the wire: this does not compress".to_owned(),
        };
        say(&format!(
            "   {}, {}, sent in {:.1} s; {}{rate}.\n   \
             Each file got its name only after the server's SHA-256 of it equalled ours; all appeared at once.\n",
            files(count("verified_files")),
            BinaryBytes(bytes),
            summary["seconds"].as_f64().unwrap_or(0.0),
            BinaryBytes(wire),
        ))
    }

    /// Compares the mode of every path of the copy with what the policy decides.
    fn permissions(&self) -> Result<(), Failure> {
        say("\n3. Permissions, which the server's policy decides, whatever the sender has\n")?;
        let spec: PolicySpec = toml::from_str(sample::POLICY).map_err(|error| Failure::usage(error.to_string()))?;
        let policy = Policy::compile(&spec).map_err(|error| Failure::usage(chain(&error)))?;
        let root = self.place.path(&self.copy());
        let mut found: BTreeMap<usize, (u32, u64, String, PathBuf)> = BTreeMap::new();
        for entry in walkdir::WalkDir::new(&root).min_depth(1).into_iter().flatten() {
            let below = entry.path().strip_prefix(&root).unwrap_or(entry.path());
            let Ok(path) = RelPath::new(below.as_os_str().as_encoded_bytes()) else { continue };
            let kind = entry.file_type();
            if kind.is_symlink() || path.components().next() == Some(crate::filter::STATE_DIRECTORY) {
                continue;
            }
            let metadata = entry.metadata().map_err(|error| Failure::usage(error.to_string()))?;
            let mode = metadata.permissions().mode() & 0o7777;
            let decision = policy.decide(&path, kind.is_dir(), mode & 0o777);
            let Some(rule) = decision.rule else { continue };
            if decision.mode != mode {
                let message = format!("'{path}' has mode {mode:04o}, but the policy says {:04o}", decision.mode);
                return Err(Failure::Plain { exit: Exit::Incomplete, message });
            }
            found.entry(rule).or_insert_with(|| (mode, 0, path.to_string(), below.to_owned())).1 += 1;
        }
        for (mode, count, shown, first) in found.values() {
            let more = if *count > 1 { format!(" and {} more", count - 1) } else { String::new() };
            let source = self.place.at.join(&self.source).join(first);
            let before = fs::symlink_metadata(&source).map_err(Failure::io("look at", &source))?;
            say(&format!("   {:04o} -> {mode:04o}  {shown}{more}\n", before.permissions().mode() & 0o7777))?;
        }
        if found.is_empty() {
            return say("   No rule of this policy speaks of these files: they keep their modes.\n");
        }
        let first = found.values().next().map_or("", |(_, _, path, _)| path);
        say(&format!(
            "   No file was ever open wider than that, not even while it arrived. Which rule decides, and why:\n   \
             $ lockstep policy explain --policy-file policy.toml {first}\n"
        ))?;
        let ran = self.place.lockstep(&["policy", "explain", "--policy-file", "policy.toml", first], true)?;
        if ran.code() == Some(0) { Ok(()) } else { Err(wrong("policy explain", &ran)) }
    }

    fn second_push(&self) -> Result<(), Failure> {
        if !self.sample {
            say(&format!("\n4. Pushed again\n{}", self.shown_push()))?;
            let (_, summary) = self.push("the second push")?;
            let sent = summary["verified_files"].as_u64().unwrap_or(0);
            return say(&format!("   {} had to be sent: only what changed is.\n", files(sent)));
        }
        let path = self.place.path("sample").join(sample::CHANGED);
        fs::OpenOptions::new()
            .append(true)
            .open(&path)
            .and_then(|mut file| file.write_all(b"{\"id\": 6000, \"text\": \"one more\"}\n"))
            .map_err(Failure::io("change", &path))?;
        say(&format!(
            "\n4. One file changes, and is pushed again\n   $ echo '{{…}}' >> sample/{}\n{}",
            sample::CHANGED,
            self.shown_push()
        ))?;
        let (changed, summary) = self.push("the second push")?;
        if summary["verified_files"] != 1 {
            let message = format!("the second push sent {} files instead of one", summary["verified_files"]);
            return Err(Failure::Plain { exit: Exit::Incomplete, message });
        }
        let line = changed.first().map_or_else(String::new, |line| format!("   {line}\n"));
        say(&format!(
            "{line}   Only that file was sent, {} on the wire.\n",
            BinaryBytes(summary["wire_bytes"].as_u64().unwrap_or(0))
        ))
    }

    /// `manifest verify`, which must end with `code`.
    fn manifest_verify(&self, code: i32) -> Result<Ran, Failure> {
        let ran = self.place.lockstep(&["manifest", "verify", &self.copy()], true)?;
        if ran.code() == Some(code) { Ok(ran) } else { Err(wrong("manifest verify", &ran)) }
    }

    fn verify(&self) -> Result<(), Failure> {
        let copy = self.copy();
        say(&format!(
            "\n5. The check before training: is the copy complete and unchanged?\n   $ lockstep manifest verify {copy}\n"
        ))?;
        let ran = self.manifest_verify(0)?;
        say(&format!("   {}\n   Anybody can check it with stock tools too:\n", ran.stdout.trim_end()))?;
        say(&format!(
            "   $ lockstep manifest create {} --format sha256sum -o sums.txt\n   $ cd {copy} && sha256sum -c ../../sums.txt\n",
            if self.sample { "sample".to_owned() } else { shown(&self.source).to_string() },
        ))?;
        let source = self.source.to_string_lossy();
        let ran = self
            .place
            .lockstep(&["manifest", "create", "--format", "sha256sum", "-o", "sums.txt", "--", &source], true)?;
        if ran.code() != Some(0) {
            return Err(wrong("manifest create", &ran));
        }
        match self.place.other("sha256sum", &["--strict", "-c", "../../sums.txt"], &copy)? {
            None => say("   (sha256sum is not installed here: Debian package coreutils)\n"),
            Some(ran) if ran.code() == Some(0) => {
                say(&format!("   {}: OK\n", files(ran.stdout.lines().count() as u64)))
            }
            Some(ran) => Err(wrong("sha256sum", &ran)),
        }
    }

    /// A file of the copy to damage, the largest: where it is, its path below the copy, its size.
    fn victim(&self) -> Result<(PathBuf, RelPath, u64), Failure> {
        let root = self.place.path(&self.copy());
        let files = walkdir::WalkDir::new(&root).sort_by_file_name().into_iter().filter_entry(|entry| {
            entry.depth() != 1 || entry.file_name().as_encoded_bytes() != crate::filter::STATE_DIRECTORY
        });
        let files = files.flatten().filter(|entry| entry.file_type().is_file());
        let largest =
            files.filter_map(|entry| Some((entry.metadata().ok()?.len(), entry))).max_by_key(|(size, _)| *size);
        match largest {
            Some((size, entry)) if size > 0 => {
                let below = entry.path().strip_prefix(&root).unwrap_or(entry.path());
                let path = RelPath::new(below.as_os_str().as_encoded_bytes());
                let path = path.map_err(|error| Failure::usage(error.to_string()))?;
                Ok((entry.into_path(), path, size))
            }
            _ => Err(Failure::usage("all files are empty: there is no byte to damage".to_owned())),
        }
    }

    fn damage(&self) -> Result<(), Failure> {
        let (copy, (file, path, size)) = (self.copy(), self.victim()?);
        let (path, offset) = (path.to_string(), size / 2);
        flip(&file, offset).map_err(Failure::io("change", &file))?;
        say(&format!(
            "\n6. One of {} bytes goes bad: byte {offset} of {copy}/{path}\n   $ lockstep manifest verify {copy}\n",
            HumanCount(size)
        ))?;
        let ran = self.manifest_verify(1)?;
        if !ran.stdout.lines().any(|line| line.starts_with(&format!("{path}: differs"))) {
            return Err(wrong("the check of a damaged file", &ran));
        }
        for line in ran.stdout.lines() {
            say(&format!("   {}\n", short(line)))?;
        }
        say("   exit 1: with this check in front of it, training does not start.\n")?;

        say(&format!("\n7. Pushed again, it is mended\n{}", self.shown_push()))?;
        let (_, summary) = self.push("the push that mends")?;
        self.manifest_verify(0)?;
        let sent = files(summary["verified_files"].as_u64().unwrap_or(0));
        say(&format!("   {sent} sent; the check says good again. What happened is on record, and tampering shows:\n"))?;
        say(&format!("   $ lockstep audit verify {copy}\n"))?;
        let ran = self.place.lockstep(&["audit", "verify", &copy], true)?;
        if ran.code() != Some(0) {
            return Err(wrong("audit verify", &ran));
        }
        let log = self.place.path(&copy).join(audit::LOG);
        let text = fs::read_to_string(&log).map_err(Failure::io("read", &log))?;
        let records = text.lines().rev().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        let last = records.into_iter().find(|record| record["path"] == path.as_str());
        let record = last.ok_or_else(|| wrong("the record of the push", &ran))?;
        let part = |name: &str| record[name].as_str().unwrap_or("-").to_owned();
        say(&format!(
            "   {}\n   {} {} {path}, SHA-256 {}, mode {}, by {}\n",
            short(ran.stdout.trim_end()),
            part("time"),
            part("action"),
            short(&part("sha256")),
            part("mode"),
            part("actor"),
        ))
    }

    fn farewell(&self) -> Result<(), Failure> {
        say("\nAll of this was checked, not only shown. A real first push takes four commands:\n\
             \x20  $ lockstep keys generate ~/.ssh/id_ed25519        # unless you have a key\n\
             \x20  $ lockstep keys scan-host --add gpu02             # then compare the fingerprint with the server's\n\
             \x20  $ lockstep keys enroll you@gpu02                  # or give the key to whoever runs the server\n\
             \x20  $ lockstep push checkpoint-1000 you@gpu02:/data/checkpoint-1000\n\
             The other server needs sshd, or 'lockstep serve'. Before training: lockstep manifest verify DIR\n")
    }
}

/// Changes one bit of a file, whatever its mode.
fn flip(file: &Path, offset: u64) -> io::Result<()> {
    let permissions = fs::metadata(file)?.permissions();
    fs::set_permissions(file, fs::Permissions::from_mode(permissions.mode() | 0o600))?;
    let open = fs::OpenOptions::new().read(true).write(true).open(file)?;
    let mut byte = [0];
    open.read_exact_at(&mut byte, offset)?;
    byte[0] ^= 1;
    open.write_all_at(&byte, offset)?;
    fs::set_permissions(file, permissions)
}
