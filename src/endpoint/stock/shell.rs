//! Commands at the other end, where the account has a shell.
//!
//! One command is started, and jobs are given to it over its input, so that a job costs no start of a login shell. What always holds:
//! the command line is the constant below; names travel over the input alone, each ended by a NUL byte, to `xargs -0`; and
//! a command that did not take all of its input ends the whole, so that content is never taken for a job.

use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use bytes::Bytes;
use crossbeam_channel::{Receiver, RecvTimeoutError, TryRecvError, unbounded};

use crate::endpoint::link::{Link, Remote};
use crate::error::Escaped;
use crate::manifest::Digest;

/// The outer quotes keep whatever login shell there is from looking at the text: there is no quote, no backslash before
/// one and no `!` in it. `dd` gives each job exactly its input, which `head -c` does not everywhere: where it cannot, all ends before
/// the input is taken for jobs. Of a connection that is cut, the last name may be the beginning of one, and mean a directory above: so
/// what changes paths is done when its input is whole, which ends with the name that it begins with, and a file is made when the
/// line after its name is there.
const SCRIPT: &str = r#"sh -c 'umask 077; t=; for p in openssl sha256sum xargs getent sync setfacl dd tar chmod chown; do command -v $p >/dev/null 2>&1 && t=$t,$p; done; printf "\nlockstep:%s\n" "$t,"; take() { [ "$n" = 0 ] || dd bs="$n" count=1 iflag=fullblock || kill $$; }; w="set -f; IFS=; for l; do :; done; [ \$# -gt 1 ] && [ \$l = \$1 ] && exec \$0 \$p \$o -- \$@"; export p o; while read -r c n o; do case $c in try) take;; openssl) take | xargs -0 -s 500000 openssl dgst -sha256 -r;; sha256sum) take | xargs -0 -s 500000 sha256sum --;; users) take | xargs -0 getent passwd;; groups) take | xargs -0 getent group;; sync) take | xargs -0 sync -f || sync;; acl) p=-b; o=-k; take | xargs -0 -s 500000 sh -c "$w" setfacl;; owner) p=-h; take | xargs -0 -s 500000 sh -c "$w" chown;; mode) p=; take | xargs -0 -s 500000 sh -c "$w" chmod;; follow-openssl) f=$(take); while read -r k m && [ "$m" -gt 0 ]; do dd if="$f" bs=65536 skip=$((k * 16)) count=$((m * 16)); done | openssl dgst -sha256 -r;; follow-sha256sum) f=$(take); while read -r k m && [ "$m" -gt 0 ]; do dd if="$f" bs=65536 skip=$((k * 16)) count=$((m * 16)); done | sha256sum;; new|more) f=$(take); read -r k m || exit 1; [ $c = more ] || (set -C; true >"$f") || exit 1; while [ "$m" -gt 0 ]; do dd of="$f" bs=262144 iflag=fullblock,count_bytes oflag=seek_bytes conv=notrunc seek="$k" count="$m" || exit 1; printf "\nlockstep:%s\n" 0; read -r k m || exit 1; done;; tar) f=$(take); while read -r k && [ "$k" -gt 0 ]; do dd bs=65536 iflag=fullblock,count_bytes count="$k" || kill $$; done | TAR_OPTIONS=-b128 tar -xof - -C "$f";; *) false;; esac 2>/dev/null; printf "\nlockstep:%s\n" "$?"; done'"#;
const MARK: &[u8] = b"\nlockstep:";
/// A login shell may take its time.
const START: Duration = Duration::from_secs(20);
/// A job that writes more is not one of ours.
const OUTPUT_MAX: usize = 64 << 20;

/// What can be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Job {
    /// SHA-256 of files; the input is their names.
    OpenSsl,
    /// The same, four times slower where coreutils are built without OpenSSL.
    Sha256Sum,
    /// Lines of passwd(5) for names of users.
    Users,
    /// Lines of group(5).
    Groups,
    /// Brings the file systems of paths to stable storage.
    Sync,
    /// Takes ACLs and default ACLs away from paths.
    NoAcl,
    /// Gives paths an owner, a group, or both, by number; links are not followed.
    Owner(Option<u32>, Option<u32>),
    /// Gives paths these mode bits.
    Mode(u32),
}

impl Job {
    /// The word for it, the tool that it takes, and what else that is told.
    fn words(self) -> (&'static str, &'static str, String) {
        let number = |id: Option<u32>| id.map_or_else(String::new, |id| id.to_string());
        match self {
            Job::OpenSsl => ("openssl", "openssl", String::new()),
            Job::Sha256Sum => ("sha256sum", "sha256sum", String::new()),
            Job::Users => ("users", "getent", String::new()),
            Job::Groups => ("groups", "getent", String::new()),
            Job::Sync => ("sync", "sync", String::new()),
            Job::NoAcl => ("acl", "setfacl", String::new()),
            Job::Owner(user, None) => ("owner", "chown", number(user)),
            Job::Owner(user, group) => ("owner", "chown", format!("{}:{}", number(user), number(group))),
            Job::Mode(mode) => ("mode", "chmod", format!("{mode:04o}")),
        }
    }

    /// Whether a name that is cut off would do harm.
    fn changes_paths(self) -> bool {
        matches!(self, Job::NoAcl | Job::Owner(..) | Job::Mode(_))
    }
}

/// Bytes and number of the names of what is changed by one command: xargs(1) takes so many at once in any case.
const PORTION_BYTES: usize = 96 << 10;
const PORTION_NAMES: usize = 4000;

/// As many names at a time as one command takes in any case.
fn portions<'a, 'p>(mut input: &'a [&'p [u8]]) -> impl Iterator<Item = &'a [&'p [u8]]> {
    std::iter::from_fn(move || {
        let mut bytes = 0;
        let fits = input.iter().take_while(|argument| {
            bytes += argument.len() + 1;
            bytes <= PORTION_BYTES
        });
        let count = fits.take(PORTION_NAMES).count().max(1).min(input.len());
        let (portion, rest) = input.split_at(count);
        input = rest;
        (!portion.is_empty()).then_some(portion)
    })
}

/// A command that waits for jobs.
pub(super) struct Shell {
    link: Arc<dyn Link>,
    output: Receiver<Result<Bytes, String>>,
    held: Vec<u8>,
    /// No mark begins before this.
    searched: usize,
    tools: String,
}

impl Shell {
    /// Starts it over the connection with this number.
    ///
    /// # Errors
    /// Why the account runs no commands.
    pub(super) fn start(remote: &dyn Remote, connection: usize) -> Result<Shell, String> {
        let link = remote.exec(SCRIPT, connection).map_err(|error| error.message)?;
        let (sender, output) = unbounded();
        let receiving = Arc::clone(&link);
        std::thread::Builder::new()
            .name("shell-receive".to_owned())
            .spawn(move || {
                loop {
                    let received = match receiving.recv() {
                        Ok(Some(bytes)) => Ok(bytes),
                        Ok(None) => Err("the command ended".to_owned()),
                        Err(error) => Err(error.0),
                    };
                    let ended = received.is_err();
                    if sender.send(received).is_err() || ended {
                        return;
                    }
                }
            })
            .map_err(|error| error.to_string())?;
        let mut shell = Shell { link, output, held: Vec::new(), searched: 0, tools: String::new() };
        // A forced internal-sftp takes this for the length of a packet, an absurd one, and ends at once.
        shell.link.send(Bytes::from_static(b"try 1\nxnone 0\n")).map_err(|error| error.0)?;
        // Whatever a login script has printed comes before the mark.
        let (_, tools) = shell.answer(Some(START))?;
        let lacking = |_| "it has no xargs, or no dd that reads all of what it is to".to_owned();
        let (tried, done) = shell.answer(Some(START)).map_err(lacking)?;
        let (_, status) = shell.answer(Some(START)).map_err(lacking)?;
        if !tools.contains(",xargs,") || (&*tried, &*done, &*status) != (b"x".as_slice(), "0", "1") {
            return Err(lacking(String::new()));
        }
        shell.tools = tools;
        Ok(shell)
    }

    /// Whether it brings files to stable storage.
    pub(super) fn syncs(&self) -> bool {
        self.has("sync")
    }

    /// Whether it can take content: files as they are, and small ones in an archive.
    pub(super) fn takes_content(&self) -> bool {
        ["dd", "tar", "sync"].iter().all(|tool| self.has(tool))
    }

    /// Gives it input for a job whose answers are asked for with [`Shell::status`] or [`Shell::try_status`].
    ///
    /// # Errors
    /// When the command has ended.
    pub(super) fn send(&self, bytes: Bytes) -> Result<(), String> {
        self.link.send(bytes).map_err(|error| error.0)
    }

    /// The status of the next job that is done, of a few that try what can be done.
    ///
    /// # Errors
    /// When the command has ended, or does not answer.
    pub(super) fn tried(&mut self) -> Result<String, String> {
        Ok(self.answer(Some(START))?.1)
    }

    /// The status of the next job that is done.
    ///
    /// # Errors
    /// When the command has ended.
    pub(super) fn status(&mut self) -> Result<String, String> {
        Ok(self.answer(None)?.1)
    }

    /// The same, when it is done already.
    ///
    /// # Errors
    /// When the command has ended.
    pub(super) fn try_status(&mut self) -> Result<Option<String>, String> {
        loop {
            if let Some((_, status)) = self.held_answer()? {
                return Ok(Some(status));
            }
            match self.output.try_recv() {
                Ok(received) => self.held.extend_from_slice(&received?),
                Err(TryRecvError::Empty) => return Ok(None),
                Err(TryRecvError::Disconnected) => return Err("the command ended".to_owned()),
            }
        }
    }

    fn has(&self, tool: &str) -> bool {
        self.tools.contains(&format!(",{tool},"))
    }

    /// The job that hashes files, the fastest that is there.
    pub(super) fn hashing(&self) -> Option<Job> {
        match (self.has("openssl"), self.has("sha256sum")) {
            (true, _) => Some(Job::OpenSsl),
            (false, true) => Some(Job::Sha256Sum),
            (false, false) => None,
        }
    }

    /// Does a job and gives what it wrote.
    ///
    /// # Errors
    /// When the command has ended, or has not what the job takes.
    pub(super) fn run(&mut self, job: Job, input: &[&[u8]]) -> Result<Vec<u8>, String> {
        self.give(job, input)?;
        self.taken(job)
    }

    /// Does jobs of which none waits for the one before, and says of each whether it was done.
    pub(super) fn run_all(&mut self, jobs: &[(Job, Vec<&[u8]>)]) -> Vec<bool> {
        let mut parts: Vec<(usize, Job, bool)> = Vec::new();
        for (number, (job, input)) in jobs.iter().enumerate() {
            for part in portions(input) {
                parts.push((number, *job, self.give(*job, part).is_ok()));
            }
        }
        let mut done = vec![true; jobs.len()];
        for (number, job, given) in parts {
            done[number] &= given && self.taken(job).is_ok();
        }
        done
    }

    fn give(&self, job: Job, input: &[&[u8]]) -> Result<(), String> {
        let (word, tool, more) = job.words();
        if !self.has(tool) {
            return Err(format!("it has no {tool}"));
        }
        let last = input.first().filter(|_| job.changes_paths());
        let input = || input.iter().chain(last);
        let length: usize = input().map(|argument| argument.len() + 1).sum();
        let mut bytes = format!("{word} {length} {more}\n").into_bytes();
        for argument in input() {
            bytes.extend_from_slice(argument);
            bytes.push(0);
        }
        self.link.send(bytes.into()).map_err(|error| error.0)
    }

    fn taken(&mut self, job: Job) -> Result<Vec<u8>, String> {
        let (output, status) = self.answer(None)?;
        match (job, status.as_str()) {
            (Job::Sync | Job::Owner(..) | Job::Mode(_), status) if status != "0" => {
                Err(format!("{} ended with status {status}", job.words().1))
            }
            // One file that is gone, or one name that is unknown, makes the status of the others' job.
            _ => Ok(output),
        }
    }

    /// Begins to hash a file in pieces that [`Shell::follow_on`] asks for, in order; [`Shell::followed`] ends it.
    ///
    /// # Errors
    /// When the command has ended, has not what it takes, or cannot be told the name.
    pub(super) fn follow(&mut self, path: &[u8]) -> Result<(), String> {
        let word = match self.hashing() {
            Some(Job::OpenSsl) => "follow-openssl",
            Some(Job::Sha256Sum) => "follow-sha256sum",
            _ => return Err("it has neither openssl nor sha256sum".into()),
        };
        if !self.has("dd") || !is_plain(path) {
            return Err("it has no dd, or the name has line ends".into());
        }
        let mut bytes = format!("{word} {}\n", path.len()).into_bytes();
        bytes.extend_from_slice(path);
        self.link.send(bytes.into()).map_err(|error| error.0)
    }

    /// Has `count` blocks of 1 MiB from block `from` on hashed, or as many as there are.
    ///
    /// # Errors
    /// When the command has ended.
    pub(super) fn follow_on(&mut self, from: u64, count: u64) -> Result<(), String> {
        if count == 0 {
            return Ok(());
        }
        self.link.send(format!("{from} {count}\n").into_bytes().into()).map_err(|error| error.0)
    }

    /// The digest of what was asked for.
    ///
    /// # Errors
    /// When the command has ended.
    pub(super) fn followed(&mut self) -> Result<Option<Digest>, String> {
        self.link.send(Bytes::from_static(b"0 0\n")).map_err(|error| error.0)?;
        let (output, _) = self.answer(None)?;
        Ok(output.get(..64).and_then(Digest::from_hex))
    }

    /// What comes before the next mark, and what stands after it in its line.
    fn answer(&mut self, within: Option<Duration>) -> Result<(Vec<u8>, String), String> {
        loop {
            if let Some(answer) = self.held_answer()? {
                return Ok(answer);
            }
            let received = match within {
                None => self.output.recv().map_err(|_| "the command ended".to_owned())?,
                Some(within) => self.output.recv_timeout(within).map_err(|error| match error {
                    RecvTimeoutError::Timeout => "it does not answer".to_owned(),
                    RecvTimeoutError::Disconnected => "the command ended".to_owned(),
                })?,
            };
            self.held.extend_from_slice(&received?);
        }
    }

    /// The same, when all of it has been received.
    fn held_answer(&mut self) -> Result<Option<(Vec<u8>, String)>, String> {
        let found = find(&self.held, MARK, self.searched);
        if let Some(start) = found
            && let Some(end) = self.held[start + 1..].iter().position(|&byte| byte == b'\n')
        {
            let end = start + 1 + end;
            let word = Escaped(&self.held[start + MARK.len()..end]).to_string();
            let rest = self.held.split_off(end + 1);
            let mut output = std::mem::replace(&mut self.held, rest);
            output.truncate(start);
            self.searched = 0;
            return Ok(Some((output, word)));
        }
        self.searched = found.unwrap_or(self.held.len().saturating_sub(MARK.len()));
        if self.held.len() > OUTPUT_MAX {
            return Err("the command writes without an end".into());
        }
        Ok(None)
    }

    /// SHA-256 of files, in the same order; `None` for those that could not be hashed this way: names that hold a line
    /// end or a backslash are written in a way that differs between tools and versions, and are not asked for.
    ///
    /// # Errors
    /// When the command has ended.
    pub(super) fn hash(&mut self, paths: &[&[u8]]) -> Result<Vec<Option<Digest>>, String> {
        let Some(job) = self.hashing() else { return Err("it has neither openssl nor sha256sum".into()) };
        let asked: Vec<&[u8]> = paths.iter().copied().filter(|path| is_plain(path)).collect();
        let output = if asked.is_empty() { Vec::new() } else { self.run(job, &asked)? };
        Ok(digests(&output, paths))
    }
}

impl Drop for Shell {
    fn drop(&mut self) {
        self.link.close();
    }
}

/// A shell that is started when it is first needed; one that could not be had, or has ended, is not started again.
#[derive(Default)]
pub(super) struct Spare {
    shell: Option<Shell>,
    start: Option<(Arc<dyn Remote>, usize)>,
    /// One that is being started, since the one before was given up.
    next: Option<JoinHandle<Option<Shell>>>,
}

impl Spare {
    /// One that is started over the connection with this number, unless it is running already.
    pub(super) fn new(shell: Option<Shell>, remote: Arc<dyn Remote>, connection: usize) -> Spare {
        Spare { shell, start: Some((remote, connection)), next: None }
    }

    /// The shell.
    pub(super) fn running(&mut self) -> Option<&mut Shell> {
        if let Some(next) = self.next.take() {
            self.shell = next.join().ok().flatten();
        }
        if self.shell.is_none()
            && let Some((remote, connection)) = &self.start
        {
            self.shell = Shell::start(&**remote, *connection).ok();
            if self.shell.is_none() {
                self.start = None;
            }
        }
        self.shell.as_mut()
    }

    /// Gives the running shell up for another use, and has another started: what is sent will have to be proven.
    pub(super) fn take(&mut self) -> Option<Shell> {
        let taken = self.shell.take()?;
        if let Some((remote, connection)) = self.start.clone() {
            let start = move || Shell::start(&*remote, connection).ok();
            self.next = std::thread::Builder::new().name("shell".to_owned()).spawn(start).ok();
        }
        Some(taken)
    }

    /// It has ended.
    pub(super) fn lose(&mut self) {
        *self = Spare::default();
    }
}

/// Whether every tool takes and writes the name in the same way.
pub(super) fn is_plain(path: &[u8]) -> bool {
    path.starts_with(b"/") && !path.iter().any(|byte| b"\\\n\r\0".contains(byte))
}

fn find(text: &[u8], what: &[u8], mut from: usize) -> Option<usize> {
    // Output is long and marks are rare: look only where a line ends.
    while let Some(at) = text.get(from..)?.iter().position(|&byte| byte == b'\n') {
        if text[from + at..].starts_with(what) {
            return Some(from + at);
        }
        from += at + 1;
    }
    None
}

/// Digests by the lines `HEX *NAME` and `HEX  NAME`, which come in the order of `paths` with some left out.
fn digests(output: &[u8], paths: &[&[u8]]) -> Vec<Option<Digest>> {
    let mut lines = output.split(|&byte| byte == b'\n').filter_map(|line| {
        let (hex, rest) = line.split_at_checked(64)?;
        let name = rest.strip_prefix(b" *").or_else(|| rest.strip_prefix(b"  "))?;
        Some((Digest::from_hex(hex)?, name))
    });
    let mut next = lines.next();
    let mut found = Vec::with_capacity(paths.len());
    for &path in paths {
        match next {
            Some((digest, name)) if name == path => {
                found.push(Some(digest));
                next = lines.next();
            }
            _ => found.push(None),
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digests_belong_to_the_names_that_stand_beside_them() {
        let hex = |byte: u8| Digest([byte; 32]).to_string();
        let output = format!("{} */a b\nnoise\n{}  /c\n{} */never asked\n", hex(1), hex(2), hex(3));
        let paths: [&[u8]; 4] = [b"/a b", b"/missing", b"/c", b"/last"];
        let found = digests(output.as_bytes(), &paths);
        assert_eq!(found, [Some(Digest([1; 32])), None, Some(Digest([2; 32])), None]);
    }

    #[test]
    fn the_mark_is_found_only_at_the_start_of_a_line() {
        assert_eq!(find(b"x\nlockstep:0\n", MARK, 0), Some(1));
        assert_eq!(find(b"xlockstep:0\n\n", MARK, 0), None);
    }

    #[test]
    fn content_is_never_taken_for_a_job() {
        let at = tempfile::tempdir().unwrap();
        let (there, evil) = (at.path().join("there"), at.path().join("evil"));
        std::fs::write(&there, "there").unwrap();
        // A tar that gives up at once.
        let (failing, path) = (at.path().join("bin"), std::env::var("PATH").unwrap());
        std::fs::create_dir(&failing).unwrap();
        std::fs::write(failing.join("tar"), "#!/bin/sh\nexit 1\n").unwrap();
        std::fs::set_permissions(failing.join("tar"), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        let failing = format!("{}:{path}", failing.display());
        // What is sent reads as a job that makes a file; more of it than a pipe holds.
        let job = format!("new {}\n{}0 1\nx0 0\n", evil.as_os_str().len(), evil.display());
        let content = job.repeat(1 + (300 << 10) / job.len());
        let named =
            |word: &str, path: &std::path::Path| format!("{word} {}\n{}", path.as_os_str().len(), path.display());
        let new = format!("{}0 {}\n{content}0 0\n", named("new", &there), content.len());
        let tar = format!("{}{}\n{content}0\n", named("tar", at.path()), content.len());
        for (input, path, what) in
            [(&new, &path, "a file that is there"), (&tar, &path, "no archive"), (&tar, &failing, "a tar that fails")]
        {
            answered(input.as_bytes(), at.path(), path);
            assert!(!evil.exists(), "{what}");
        }
        assert_eq!(std::fs::read(&there).unwrap(), b"there");
    }

    /// What the command answers to this input, which ends with it, started in this directory with these programs.
    fn answered(input: &[u8], directory: &std::path::Path, path: &str) -> String {
        use std::io::Write as _;
        let mut shell = std::process::Command::new("sh");
        shell.args(["-c", SCRIPT]).env("PATH", path).current_dir(directory);
        let mut shell = shell.stdin(std::process::Stdio::piped()).stdout(std::process::Stdio::piped()).spawn().unwrap();
        // It may end before it has read everything.
        let _ = shell.stdin.take().unwrap().write_all(input);
        String::from_utf8(shell.wait_with_output().unwrap().stdout).unwrap()
    }

    /// By names that begin in a directory of the test's own: what is cut off must not mean anything outside of it, should this fail.
    #[test]
    fn names_that_are_cut_off_change_nothing() {
        use std::os::unix::fs::PermissionsExt as _;
        let at = tempfile::tempdir().unwrap();
        std::fs::create_dir(at.path().join("deeper")).unwrap();
        let names = ["deeper/one", "deeper/on", "deeper/two  *words\n"];
        names.iter().for_each(|name| std::fs::write(at.path().join(name), "").unwrap());
        let mode = |name: &str| std::fs::metadata(at.path().join(name)).unwrap().permissions().mode() & 0o7777;
        let before = mode("deeper");
        let list: Vec<u8> = names.iter().chain([&names[0]]).flat_map(|name| format!("{name}\0").into_bytes()).collect();
        let whole = [format!("mode {} 0604\n", list.len()).as_bytes(), &list].concat();
        let path = std::env::var("PATH").unwrap();
        for end in whole.len() - list.len()..whole.len() - 1 {
            answered(&whole[..end], at.path(), &path);
            assert_eq!(mode("deeper"), before, "after {end} of {} bytes", whole.len());
        }
        assert!(answered(&whole, at.path(), &path).ends_with("\nlockstep:0\n"));
        names.iter().for_each(|name| assert_eq!(mode(name), 0o604, "{name}"));
        // Nor is a file made whose name is cut off.
        let new = "new 14\ndeeper/another";
        for end in 0..=new.len() {
            answered(&new.as_bytes()[..end], at.path(), &path);
            let found = walkdir::WalkDir::new(at.path()).into_iter().count();
            assert_eq!(found, 5, "after {end} bytes of {new}");
        }
        answered(format!("{new}0 0\n").as_bytes(), at.path(), &path);
        assert!(at.path().join("deeper/another").exists());
    }

    #[test]
    fn many_names_are_given_in_portions_none_of_which_is_empty() {
        let names = vec![vec![b'x'; 4096]; 200];
        let names: Vec<&[u8]> = names.iter().map(Vec::as_slice).collect();
        let counts: Vec<usize> = portions(&names).map(<[_]>::len).collect();
        assert_eq!(counts, [23, 23, 23, 23, 23, 23, 23, 23, 16]);
        let large = vec![b'x'; PORTION_BYTES + 1];
        assert_eq!(portions(&[&large, &large]).map(<[_]>::len).collect::<Vec<_>>(), [1, 1]);
        assert_eq!(portions(&[]).count(), 0);
    }

    #[test]
    fn the_script_is_safe_in_single_quotes() {
        let inside = SCRIPT.strip_prefix("sh -c '").and_then(|rest| rest.strip_suffix('\'')).unwrap();
        assert!(!inside.contains(['\'', '!']) && inside.is_ascii());
        // Some shells take such backslashes away.
        assert!(!inside.contains("\\\\") && !inside.contains("\\\""));
    }
}
