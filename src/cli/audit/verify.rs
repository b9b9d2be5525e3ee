//! `lockstep audit verify`: whether the log is as it was written, and who stands for it.

use std::fmt::Write as _;
use std::path::PathBuf;

use clap::Args;
use russh::keys::PublicKey;

use super::super::manifest::{local, trusted_file};
use super::{Escaped, Exit, Failure, audit, output, shown, verified};
use crate::audit::{Backwards, Head, Removed, SignedHead, Trusted, Verified};
use crate::error::counted;
use crate::signature::{AllowedSigners, Refusal};

#[derive(Debug, Args)]
pub(in crate::cli) struct Verify {
    /// The directory that is published to; of a server that of its 'audit'; of a daemon that of its state
    directory: PathBuf,
    /// A head that was kept elsewhere, "LINES HASH": the log has to hold it
    #[arg(long, value_name = "LINES HASH", value_parser = head)]
    head: Option<Head>,
    /// Whose signatures of heads count, in the format of ssh-keygen(1), ALLOWED SIGNERS; each as of the time of its line
    #[arg(long, value_name = "FILE", group = "trusted")]
    allowed_signers: Option<PathBuf>,
    /// The public key whose signatures of heads count, as that of the server's host key
    #[arg(long, value_name = "FILE", group = "trusted")]
    host_key: Option<PathBuf>,
    /// Fail (exit code 3) where no head is signed by such a key, or more than so many lines came after the last one [without a
    /// number: 1000]
    #[arg(long, value_name = "LINES", num_args = 0..=1, require_equals = true, default_missing_value = "1000")]
    #[arg(requires = "trusted")]
    require_signature: Option<u64>,
}

fn head(text: &str) -> Result<Head, String> {
    Head::decode(text).ok_or_else(|| "it is the number of lines, a blank, and the 64 digits of a hash".to_owned())
}

/// A signature that counts, and who made it.
struct Good<'v> {
    signed: &'v SignedHead,
    who: String,
}

impl Verify {
    pub(super) fn run(self) -> Result<Exit, Failure> {
        let trusted = self.trusted()?;
        let found = verified(&self.directory)?;
        if let Some(kept) = self.head {
            self.holds(kept, &found)?;
        }
        let signed = match &trusted {
            None => None,
            Some(trusted) => self.judged(trusted, &found)?,
        };
        let removal = match (&trusted, &found.removed) {
            (Some(trusted), Some(removed)) => self.removal(trusted, removed)?,
            _ => None,
        };
        let directory = shown(&self.directory);
        let lines = counted(found.head.lines, "line", "lines");
        let mut text = format!("{directory}: {lines}, unbroken; the last is {}\n", found.head.hash);
        if found.files.len() > 1 {
            let _ = writeln!(text, "in {} files, from '{}'", found.files.len(), found.files[0]);
        }
        if let Some(removed) = &found.removed {
            let (lines, last) = (counted(removed.lines, "line", "lines"), &removed.path);
            let by = removal.map(|who| format!(", and {who} has signed")).unwrap_or_default();
            let _ =
                writeln!(text, "the first {lines} are not there any more: removed up to '{last}', as the log says{by}");
        }
        match (&signed, found.signed.last()) {
            (Some(good), _) => {
                let after = found.head.lines - good.signed.line;
                let line = good.signed.head.lines;
                let after = counted(after, "line came", "lines came");
                let _ = writeln!(text, "signed up to line {line} by {}; {after} after that", good.who);
            }
            (None, Some(last)) if trusted.is_none() => {
                let line = last.head.lines;
                let way = "not checked: name --allowed-signers or --host-key";
                let _ = writeln!(text, "a head is signed at line {line} ({way})");
            }
            _ if trusted.is_some() => text.push_str("no head is signed\n"),
            _ => {}
        }
        output(text.as_bytes())?;
        for Backwards { line, time, before } in &found.backwards {
            let (time, before) = (Escaped(time.as_bytes()), Escaped(before.as_bytes()));
            eprintln!("lockstep: note: line {line}: the clock was set back, from {before} to {time}");
        }
        if found.unfinished {
            let line = found.head.lines + 1;
            eprintln!(
                "lockstep: note: line {line} is not finished: whoever wrote it was interrupted, or is at it; the next writer takes it away and says so"
            );
        }
        self.enough(signed.as_ref(), &found)
    }

    fn trusted(&self) -> Result<Option<Trusted>, Failure> {
        if let Some(list) = &self.allowed_signers {
            return Ok(Some(Trusted::Signers(AllowedSigners::parse(&trusted_file(list, "list")?, &local))));
        }
        let Some(file) = &self.host_key else { return Ok(None) };
        let text = String::from_utf8(trusted_file(file, "key")?).unwrap_or_default();
        let key = PublicKey::from_openssh(text.trim()).map_err(|error| {
            let why = Escaped(error.to_string().as_bytes()).to_string();
            Failure::usage(format!("'{}' is not a public key of OpenSSH: {why}", shown(file)))
        })?;
        Ok(Some(Trusted::Key(Box::new(key.key_data().clone()))))
    }

    /// Whether the log holds a head that was kept elsewhere.
    fn holds(&self, kept: Head, found: &Verified) -> Result<(), Failure> {
        let at = shown(&self.directory);
        let bad = |what: String| Failure::bad_data(format!("the audit log of '{at}': {what}"));
        if kept.lines > found.head.lines {
            let (kept, there) = (kept.lines, found.head.lines);
            return Err(bad(format!("it had {kept} lines once, and has {there}: lines were cut off")));
        }
        if found.removed.as_ref().is_some_and(|removed| kept.lines < removed.lines) {
            return Err(bad(format!(
                "line {} was removed with its file, so that --head cannot be compared",
                kept.lines
            )));
        }
        let mut there = kept.lines == 0;
        let root = crate::root::Root::open(&self.directory)?;
        audit::inspect(&root, &mut |head, _| there |= head == kept)?;
        if there {
            return Ok(());
        }
        Err(bad(format!("line {} is another than the one that was kept: the log was written anew", kept.lines)))
    }

    /// The last signature that counts. One by a key that is trusted and does not fit is not passed over.
    fn judged<'v>(&self, trusted: &Trusted, found: &'v Verified) -> Result<Option<Good<'v>>, Failure> {
        let (mut last, mut foreign) = (None, None);
        for signed in &found.signed {
            match trusted.judge(signed.head, &signed.signature, signed.time) {
                Ok(who) => last = Some(Good { signed, who }),
                Err(refusals) => {
                    let reasons: Vec<String> = refusals.iter().map(Refusal::to_string).collect();
                    let reason =
                        format!("the signature in line {} does not count: {}", signed.line, reasons.join("; "));
                    if refusals
                        .iter()
                        .any(|refusal| matches!(refusal, Refusal::Mismatch { .. } | Refusal::Unreadable(_)))
                    {
                        return Err(Failure::bad_data(format!(
                            "the audit log of '{}': {reason}",
                            shown(&self.directory)
                        )));
                    }
                    foreign = Some(reason);
                }
            }
        }
        if let Some(reason) = foreign {
            // After a change of keys the list has to have both.
            let at = shown(&self.directory);
            let way_out = "if that key may sign, add it to the list of signers";
            return Err(untrusted(format!("the audit log of '{at}': {reason}; {way_out}")));
        }
        Ok(last)
    }

    /// Who has signed that lines were removed: whoever may write the log can make such a line.
    fn removal(&self, trusted: &Trusted, removed: &Removed) -> Result<Option<String>, Failure> {
        let at = shown(&self.directory);
        let unsigned = |why: &str| {
            untrusted(format!(
                "the audit log of '{at}': its first {} are not there any more, and {why}",
                counted(removed.lines, "line", "lines")
            ))
        };
        let Some(signature) = &removed.signature else {
            // Who asks for no signatures is told that there is none.
            return match self.require_signature {
                Some(_) => Err(unsigned("nobody has signed that they were removed")),
                None => Ok(None),
            };
        };
        match trusted.judge_removal(removed.head, signature, removed.time) {
            Ok(who) => Ok(Some(who)),
            Err(refusals) => {
                let reasons: Vec<String> = refusals.iter().map(Refusal::to_string).collect();
                let why = reasons.join("; ");
                Err(unsigned(&format!("the signature of the line that says so does not count: {why}")))
            }
        }
    }

    fn enough(&self, signed: Option<&Good<'_>>, found: &Verified) -> Result<Exit, Failure> {
        let Some(most) = self.require_signature else { return Ok(Exit::Done) };
        let at = shown(&self.directory);
        match signed {
            None => Err(untrusted(format!("the audit log of '{at}': no head is signed; set [audit] signing_key"))),
            Some(good) if found.head.lines - good.signed.line > most => {
                let after = counted(found.head.lines - good.signed.line, "line", "lines");
                let message = format!("the audit log of '{at}': {after} came after the last signed head, over {most}");
                Err(untrusted(message))
            }
            Some(_) => Ok(Exit::Done),
        }
    }
}

fn untrusted(message: String) -> Failure {
    Failure::Plain { exit: Exit::Trust, message }
}
