//! The kernel, the limits and rights of a process, the clock, and the programs beside lockstep.

use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use rustix::process::{Resource, Rlimit, getrlimit};

use crate::cli::finding::Finding;
use crate::config::{Config, Confine};
use crate::error::Escaped;
use crate::policy::PolicySpec;
use crate::server::confine::{Available, trial::Trial};

/// CAP_CHOWN, CAP_FOWNER and CAP_FSETID of capabilities(7).
const GIVING: [(u32, &str); 3] = [(0, "CAP_CHOWN"), (3, "CAP_FOWNER"), (4, "CAP_FSETID")];
/// Open files of a daemon without any target.
const FILES_BASE: u64 = 256;
/// Open files for each target: connections, files in work, directories.
const FILES_PER_TARGET: u64 = 64;

/// All of it.
pub(super) fn look(config: &Config) -> Vec<Finding> {
    let mut findings = vec![kernel(), confinement(config), processor(), open_files(config), umask(), clock()];
    findings.extend(rights(config));
    findings.extend(programs());
    findings
}

fn kernel() -> Finding {
    let release = rustix::system::uname().release().to_string_lossy().into_owned();
    let release = Escaped(release.as_bytes()).to_string();
    if crate::root::has_openat2() {
        return Finding::ok("kernel", format!("{release}, with openat2(2)"));
    }
    Finding::warning(
        "kernel",
        format!("{release} gives no openat2(2): paths are looked up name by name, which is as safe and slower"),
        "use Linux 5.6 or newer; under systemd leave RestrictSUIDSGID= and DynamicUser= out, in a container allow it by seccomp",
    )
}

/// Whether sessions of the server can be confined: by what the kernel says it has, and by what a process could do all the same.
fn confinement(config: &Config) -> Finding {
    let about = "confinement";
    let missing = Available::look().missing();
    if !missing.is_empty() {
        let missing = missing.join(" and no ");
        let says = format!(
            "this kernel has no {missing}: sessions of 'lockstep serve' are confined by what is left, and by lockstep itself"
        );
        let remedy = "Linux 5.19 or newer with landlock in /sys/kernel/security/lsm; in a container allow landlock_* and seccomp(2)";
        let required = config.serve.as_ref().is_some_and(|serve| serve.confine == Confine::Require);
        return if required { Finding::error(about, says, remedy) } else { Finding::warning(about, says, remedy) };
    }
    match tried() {
        Ok(trial) if trial.could.is_empty() && trial.could_not.is_empty() => Finding::ok(
            about,
            format!("tried: a session is kept in its root by Landlock {} and seccomp", trial.confinement.landlock),
        ),
        Ok(trial) => {
            let list = |what: &str, list: &[String]| (!list.is_empty()).then(|| format!("{what} {}", list.join(", ")));
            let found = [list("it could", &trial.could), list("it could not", &trial.could_not)];
            let found: Vec<String> = found.into_iter().flatten().collect();
            let says = format!("a process that was confined as a session is: {}", found.join("; "));
            Finding::error(
                about,
                says,
                "compare with 'lockstep doctor' on another machine: something here changes what the kernel does",
            )
        }
        Err(reason) => Finding::warning(
            about,
            format!("it cannot be tried: {reason}"),
            "run it as who runs 'lockstep serve', with a directory for temporary files",
        ),
    }
}

/// Confines a process to an empty directory, and has it try.
fn tried() -> Result<Trial, String> {
    let at = std::env::temp_dir().join(format!("lockstep-doctor-{}", std::process::id()));
    let root = at.join("root");
    let failed = |error: std::io::Error| format!("{}: {}", crate::error::shown(&at), crate::error::in_words(&error));
    let made = std::fs::DirBuilder::new().mode(0o700).create(&at).and_then(|()| std::fs::create_dir(&root));
    let asked = made.and_then(|()| {
        std::fs::write(at.join("beside"), "")?;
        Command::new("/proc/self/exe").arg("try-confinement").arg(&root).stdin(Stdio::null()).output()
    });
    let _ = std::fs::remove_dir_all(&at);
    let asked = asked.map_err(failed)?;
    let said = || Escaped(asked.stderr.trim_ascii()).to_string();
    serde_json::from_slice(&asked.stdout).map_err(|_| said())
}

fn processor() -> Finding {
    let flags = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let has = |name: &str| flags.split_whitespace().any(|word| word == name);
    if !cfg!(any(target_arch = "x86_64", target_arch = "aarch64")) || has("sha_ni") || has("sha2") {
        return Finding::ok("processor", "it has instructions for SHA-256");
    }
    let says = "it has no instructions for SHA-256: hashing takes about four times as long";
    Finding::warning("processor", says, "on a virtual machine pass the processor of the host through")
}

fn open_files(config: &Config) -> Finding {
    let targets: usize = config.jobs.iter().map(|job| job.targets.len()).sum();
    let of_server = config.serve.as_ref().map_or(0, |serve| serve.limits.sessions.get() as u64 * 4);
    let needed = FILES_BASE + FILES_PER_TARGET * targets as u64 + of_server;
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    // The server raises it by itself.
    let limit = if config.serve.is_some() { maximum } else { current }.unwrap_or(u64::MAX);
    let about = "open files";
    if limit >= needed {
        return Finding::ok(about, format!("{limit} may be open, {needed} are enough for this configuration"));
    }
    let remedy = format!("LimitNOFILE={} in the unit (it has 65536), or ulimit -n", needed.next_power_of_two());
    let says =
        format!("{limit} may be open, and this configuration may need {needed}: connections and files would fail");
    Finding::warning(about, says, &remedy)
}

/// A line of proc(5)'s status of this process.
fn of_process(name: &str) -> Option<String> {
    let text = std::fs::read_to_string("/proc/self/status").ok()?;
    text.lines().find_map(|line| Some(line.strip_prefix(name)?.strip_prefix(':')?.trim().to_owned()))
}

fn umask() -> Finding {
    let Some(mask) = of_process("Umask") else { return Finding::ok("umask", "it is not told here") };
    if u32::from_str_radix(&mask, 8).is_ok_and(|mask| mask & 0o022 != 0o022) {
        let says = format!("it is {mask}: files that programs of this user make can be written by others");
        return Finding::warning("umask", says, "022 or 077; what lockstep publishes does not depend on it");
    }
    Finding::ok("umask", format!("it is {mask}; what lockstep publishes does not depend on it"))
}

fn rights(config: &Config) -> Option<Finding> {
    let gives = |policy: &PolicySpec| policy.rules.iter().any(|rule| rule.owner.is_some() || rule.group.is_some());
    let by_name = |name: &Option<String>| name.as_ref().and_then(|name| config.policies.get(name)).is_some_and(gives);
    let here = config.jobs.iter().any(|job| by_name(&job.policy) && job.targets.iter().any(|to| to.starts_with('/')));
    let served = config.serve.as_ref().is_some_and(|serve| serve.users.iter().any(|user| by_name(&user.policy)));
    let effective = u64::from_str_radix(&of_process("CapEff")?, 16).ok()?;
    let missing = GIVING.iter().filter(|(bit, _)| effective & (1 << bit) == 0);
    let missing: Vec<&str> = missing.map(|(_, name)| *name).collect();
    Some(match (missing.is_empty(), here || served) {
        (true, _) => Finding::ok("rights", "files can be given to other owners"),
        (false, false) => {
            Finding::ok("rights", "files cannot be given to other owners, and no rule of this machine asks for it")
        }
        (false, true) => Finding::error(
            "rights",
            format!("rules name owners, and {} is missing: files that get one fail", missing.join(", ")),
            "run it as root, or with AmbientCapabilities= as in the units; or leave owners out",
        ),
    })
}

/// What a program says when asked; both outputs together.
fn said(program: &Path, arguments: &[&str]) -> Option<String> {
    let output = Command::new(program).args(arguments).stdin(Stdio::null()).output().ok()?;
    let text = [output.stdout, output.stderr].concat();
    Some(String::from_utf8_lossy(&text).into_owned())
}

fn find(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let usual = ["/usr/sbin", "/usr/bin", "/usr/local/bin"].map(PathBuf::from);
    std::env::split_paths(&path).chain(usual).map(|directory| directory.join(name)).find(|path| path.is_file())
}

fn clock() -> Finding {
    let about = "clock";
    let right = || Finding::ok(about, "it is kept right by the network");
    let wrong = |by: &str| {
        let says =
            format!("it is not kept right ({by}): certificates, the times of files and of the record may be wrong");
        Finding::warning(about, says, "run chrony or systemd-timesyncd, on every machine")
    };
    if Path::new("/run/systemd/timesync/synchronized").exists() {
        return right();
    }
    let asked = [("timedatectl", &["show", "-p", "NTPSynchronized", "--value"][..]), ("chronyc", &["-n", "tracking"])];
    for (name, arguments) in asked {
        let Some(text) = find(name).and_then(|program| said(&program, arguments)) else { continue };
        match text.trim() {
            "yes" => return right(),
            "no" => return wrong(name),
            text if text.contains("Leap status     : Normal") => return right(),
            text if text.contains("Not synchronised") => return wrong(name),
            // It does not run, or is none of these.
            _ => {}
        }
    }
    let says = "nothing here tells whether it is kept right; certificates and the times of files go by it";
    Finding::warning(about, says, "see that the machine (of a container: its host) runs chrony or systemd-timesyncd")
}

/// `9.2` out of `OpenSSH_9.2p1 Debian-2`.
fn version(text: &str) -> Option<(u32, u32)> {
    let rest = text.split_once("OpenSSH_")?.1;
    let (major, rest) = rest.split_once('.')?;
    let minor = rest.split(|c: char| !c.is_ascii_digit()).next()?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

fn programs() -> Vec<Finding> {
    // sshd says its version with -V from 9.2 on; one before that with its usage.
    [
        ("ssh", "-V", "it is not needed: lockstep connects by itself"),
        ("sshd", "-V", "this machine receives by 'lockstep serve' alone"),
    ]
    .map(|(name, flag, without)| {
        let Some(program) = find(name) else { return Finding::ok(name, format!("it is not there; {without}")) };
        let Some(found) = said(&program, &[flag]).as_deref().and_then(version) else {
            return Finding::ok(name, "it does not say its version");
        };
        let words = format!("OpenSSH {}.{}", found.0, found.1);
        match (name, found) {
            (_, (0..8, _)) => {
                let says = format!("{words} is old, and is not tried with lockstep");
                Finding::warning(name, says, "8.4 and newer are")
            }
            ("sshd", (8, _)) => {
                let says = format!(
                    "{words} copies nothing by itself: targets by SFTP alone get whole files (9.0 has copy-data)"
                );
                Finding::warning(name, says, "install lockstep as its subsystem, or a newer OpenSSH")
            }
            _ => Finding::ok(name, words),
        }
    })
    .into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_found_in_what_openssh_says() {
        for (text, expected) in [
            ("OpenSSH_9.2p1 Debian-2+deb12u3, OpenSSL 3.0.15", Some((9, 2))),
            ("unknown option -- V\nOpenSSH_8.4p1, OpenSSL", Some((8, 4))),
            ("OpenSSH_10.0p2", Some((10, 0))),
            ("Dropbear", None),
        ] {
            assert_eq!(version(text), expected, "{text}");
        }
    }
}
