//! A root in which somebody swaps directories for links that lead out of it, and what lies out there: it must neither be
//! changed nor show in anything that a server answers.

use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{AtFlags, CWD, Mode, OFlags, RenameFlags, openat, renameat, renameat_with};
use sha2::Digest as _;

/// Is in the content of every file outside, in names there and in what a link there leads to.
pub(super) const SECRET: &str = "only-the-outside-has-this";
/// A name that at first only the outside has, and that a client asks for.
pub(super) const GUESSED: &str = "guessed";
/// When everything outside was modified last, in seconds: it would show in attributes.
const SECRET_TIME: u32 = 1_234_567_891;

/// Rounds of a test; `LOCKSTEP_ATTACK_ROUNDS` multiplies them for a long run by hand.
pub(super) fn rounds(usual: u32) -> u32 {
    let factor = std::env::var("LOCKSTEP_ATTACK_ROUNDS").map_or(1, |text| text.parse().unwrap());
    usual * factor
}

/// `root`, with a directory `d` that gets swapped, and `outside` beside it, with the same names.
pub(super) struct Field {
    at: tempfile::TempDir,
    root: OwnedFd,
    /// The directory itself, by whatever name it is found.
    directory: OwnedFd,
    portrait: Vec<String>,
    /// What must be in no answer.
    needles: Vec<Vec<u8>>,
}

/// What a swapped directory must not lead to: content, names, modes, owners and times of everything there.
pub(super) fn portrait(at: &Path) -> Vec<String> {
    let entries = walkdir::WalkDir::new(at).sort_by_file_name().into_iter().map(Result::unwrap);
    let line = |entry: walkdir::DirEntry| {
        let found = entry.path().symlink_metadata().unwrap();
        let content = if found.is_file() { fs::read(entry.path()).unwrap() } else { Vec::new() };
        let (mode, owner, times) = (found.mode(), found.uid(), (found.mtime(), found.ctime(), found.ctime_nsec()));
        format!("{} {mode:o} {owner} {times:?} {} {content:?}", entry.path().display(), found.nlink())
    };
    entries.map(line).collect()
}

fn directory(at: &Path) -> OwnedFd {
    rustix::fs::open(at, OFlags::DIRECTORY | OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).unwrap()
}

impl Field {
    pub(super) fn new() -> Field {
        // In memory where that is to be had: runs sync their file system, and what others write to a disk is not waited for.
        let memory = Path::new("/dev/shm");
        let at = if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() }.unwrap();
        let path = |name: &str| at.path().join(name);
        for name in ["root", "outside/sub"] {
            fs::create_dir_all(path(name)).unwrap();
        }
        let secret = SECRET.repeat(50);
        for name in ["f", "g", "sub/h", GUESSED, SECRET] {
            fs::write(path("outside").join(name), &secret).unwrap();
            fs::set_permissions(path("outside").join(name), PermissionsExt::from_mode(0o640)).unwrap();
        }
        symlink(format!("/{SECRET}"), path("outside/l")).unwrap();
        let touched = ["f", "g", "sub/h", GUESSED, SECRET, "l", "sub", "."].map(|name| path("outside").join(name));
        let time = format!("@{SECRET_TIME}");
        assert!(Command::new("touch").args(["-h", "-d", &time]).args(touched).status().unwrap().success());
        let needles = vec![
            SECRET.as_bytes().to_vec(),
            SECRET_TIME.to_be_bytes().to_vec(),
            sha2::Sha256::digest(&secret).to_vec(),
        ];
        let (root, below) = (directory(&path("root")), directory(&path("root")));
        let portrait = portrait(&path("outside"));
        let mut field = Field { at, root, directory: below, portrait, needles };
        field.lay_out();
        field
    }

    /// The directories and links anew: a run that finds a link where a directory is to be replaces it, and it would be no
    /// danger any more.
    pub(super) fn lay_out(&mut self) {
        for name in ["root/d", "root/p", "root/aside", "root/e", "link", "far"] {
            let path = self.path(name);
            if path.symlink_metadata().is_ok() && fs::remove_file(&path).is_err() {
                fs::remove_dir_all(&path).unwrap();
            }
        }
        fs::create_dir(self.path("root/d")).unwrap();
        fs::create_dir(self.path("root/p")).unwrap();
        symlink("../outside", self.path("link")).unwrap();
        symlink("/proc", self.path("far")).unwrap();
        self.directory = directory(&self.path("root/d"));
        self.mend();
    }

    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.at.path().join(name)
    }

    /// Puts back what a round took from the directory: over its descriptor, since its name may be the link's.
    pub(super) fn mend(&self) {
        let _ = rustix::fs::mkdirat(&self.directory, "sub", Mode::from_raw_mode(0o755));
        for name in ["f", "g", "sub/h"] {
            let flags = OFlags::CREATE | OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            if let Ok(file) = openat(&self.directory, name, flags, Mode::from_raw_mode(0o644)) {
                let _ = rustix::io::write(&file, b"of the root");
            }
        }
        let _ = rustix::fs::symlinkat("f", &self.directory, "l");
        let flags = OFlags::CREATE | OFlags::WRONLY | OFlags::CLOEXEC;
        let _ = openat(&self.root, "file", flags, Mode::from_raw_mode(0o644));
    }

    /// Removes what rounds have left in the directory and the root, so that both stay small.
    pub(super) fn tidy(&self) {
        for name in fs::read_dir(self.path("root")).unwrap().flatten().map(|entry| entry.file_name()) {
            let name = name.to_str().unwrap();
            if !matches!(name, "d" | "p" | "e" | "aside" | "file" | ".lockstep") {
                let _ = rustix::fs::unlinkat(&self.root, name, AtFlags::empty());
                let _ = rustix::fs::unlinkat(&self.root, name, AtFlags::REMOVEDIR);
            }
        }
    }

    /// The server of this root, with openat2 or as where there is none (h63). Without Landlock, which would hide that the first
    /// wall had a hole.
    pub(super) fn server(&self, openat2: bool) -> Command {
        let lacking = if openat2 { "landlock_create_ruleset" } else { "openat2,landlock_create_ruleset" };
        let mut strace = Command::new("strace");
        strace.args(["--seccomp-bpf", "-f", "-qq", "-e", &format!("trace={lacking}")]);
        strace.args(["-e", &format!("inject={lacking}:error=ENOSYS"), "-o"]).arg(self.path("calls"));
        strace.args([env!("CARGO_BIN_EXE_lockstep"), "sftp-server", "--root"]).arg(self.path("root"));
        strace
    }

    /// Whether it was made to do without openat2; it did without Landlock.
    pub(super) fn went_without(&self) -> bool {
        let calls = fs::read_to_string(self.path("calls")).unwrap();
        let refused = |call: &str| calls.lines().any(|line| line.contains(call) && line.contains("ENOSYS"));
        assert!(refused("landlock_create_ruleset("), "{calls}");
        refused("openat2(")
    }

    /// Swaps while `work` goes on: the directory and a link change places in one step and in several, and a directory below
    /// moves up and back.
    pub(super) fn while_swapping<T>(&self, work: impl FnOnce() -> T) -> T {
        let (d, link, p, far) = (self.path("root/d"), self.path("link"), self.path("root/p"), self.path("far"));
        let aside = self.path("root/aside");
        let stop = AtomicBool::new(false);
        let swap = || {
            let exchange = |a: &Path, b: &Path| renameat_with(CWD, a, CWD, b, RenameFlags::EXCHANGE).ok();
            let rename = |a: &Path, b: &Path| renameat(CWD, a, CWD, b).ok();
            while !stop.load(Ordering::Relaxed) {
                for _ in 0..4 {
                    exchange(&d, &link);
                    exchange(&p, &far);
                    std::thread::yield_now();
                }
                for (from, to) in [(&d, &aside), (&link, &d), (&d, &link), (&aside, &d)] {
                    rename(from, to);
                    std::thread::yield_now();
                }
                let _ = renameat(&self.directory, "sub", &self.root, "e");
                std::thread::yield_now();
                let _ = renameat(&self.root, "e", &self.directory, "sub");
            }
        };
        std::thread::scope(|scope| {
            let swapping = scope.spawn(swap);
            // A test that fails in between is to fail, not to swap for ever.
            let done = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work));
            stop.store(true, Ordering::Relaxed);
            swapping.join().unwrap();
            done.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// An answer does not say where on the machine the root lies.
    #[track_caller]
    pub(super) fn names_no_place(&self, asked: &str, answer: &[u8]) {
        let place = self.at.path().as_os_str().as_encoded_bytes();
        let shows = answer.windows(place.len()).any(|window| window == place);
        assert!(!shows, "{asked} shows where the root lies: {}", String::from_utf8_lossy(answer));
    }

    /// Nothing of the outside is in an answer.
    #[track_caller]
    pub(super) fn is_silent(&self, asked: &str, answer: &[u8]) {
        for needle in &self.needles {
            let shows = answer.windows(needle.len()).any(|window| window == needle);
            assert!(!shows, "{asked} shows what lies outside: {}", String::from_utf8_lossy(answer));
        }
    }

    /// What lies outside is as it was, and nothing of it has come into the root.
    #[track_caller]
    pub(super) fn is_untouched(&self) {
        assert_eq!(portrait(&self.path("outside")), self.portrait);
        for entry in walkdir::WalkDir::new(self.path("root")).into_iter().flatten() {
            if entry.file_type().is_file() {
                let content = fs::read(entry.path()).unwrap();
                let has = content.windows(SECRET.len()).any(|window| window == SECRET.as_bytes());
                assert!(!has || entry.path().ends_with(".lockstep/audit.jsonl"), "{}", entry.path().display());
            }
        }
    }
}
