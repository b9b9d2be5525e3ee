//! From nothing to a first push: keys made, trusted and accepted, against OpenSSH's server and lockstep's own.

use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};

use crate::kit::sshd::{Agent, Sshd};
use crate::kit::{account, ends, keygen, public, text};

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o7777
}

/// An sshd that takes the keys of `there/.ssh/authorized_keys` too.
fn sshd() -> Sshd {
    Sshd::with(|at| format!("AuthorizedKeysFile {0}/authorized {0}/there/.ssh/authorized_keys", at.display()))
}

#[test]
fn s18_four_commands_to_the_first_push() {
    let sshd = sshd();
    let port = sshd.port.to_string();
    let account = format!("{}@127.0.0.1", account());
    let to = format!("{account}:{}", sshd.path("arrived").display());
    fs::create_dir(sshd.path("tree")).unwrap();
    fs::write(sshd.path("tree/file"), "content").unwrap();
    let push = || sshd.run(&["push", "tree", &to, "-P", &port]);

    // 1. A key.
    let generated = sshd.run(&["keys", "generate", "--comment", "the sender"]);
    ends(&generated, 0, &["SHA256:", "no passphrase"]);
    let key = sshd.path("home/.ssh/id_ed25519");
    assert_eq!((mode(&key), mode(&sshd.path("home/.ssh"))), (0o600, 0o700));
    let line = fs::read_to_string(sshd.path("home/.ssh/id_ed25519.pub")).unwrap();
    assert_eq!(String::from_utf8_lossy(&generated.stdout), line);
    assert!(line.ends_with(" the sender\n"), "{line}");
    let derived = Command::new("ssh-keygen").arg("-y").arg("-f").arg(&key).output().unwrap();
    assert_eq!(String::from_utf8_lossy(&derived.stdout), line);
    let before = fs::read(&key).unwrap();
    ends(&sshd.run(&["keys", "generate"]), 2, &["never overwritten"]);
    assert_eq!(fs::read(&key).unwrap(), before);

    // 2. The host.
    ends(&push(), 3, &["unknown host key", "keys scan-host --add"]);
    let shown = sshd.run(&["keys", "scan-host", "-P", &port, "127.0.0.1"]);
    ends(&shown, 0, &["# ssh-ed25519 SHA256:"]);
    assert!(!sshd.path("home/.ssh/known_hosts").exists());
    ends(&sshd.run(&["keys", "scan-host", "-P", &port, "--add", "127.0.0.1"]), 0, &["added ssh-ed25519 SHA256:"]);
    let known = fs::read_to_string(sshd.path("home/.ssh/known_hosts")).unwrap();
    assert_eq!(known, format!("[127.0.0.1]:{port} {}\n", public(&sshd.path("host.pub"))));
    assert!(String::from_utf8_lossy(&shown.stdout).ends_with(&known));
    assert_eq!(mode(&sshd.path("home/.ssh/known_hosts")), 0o600);
    // As /etc/ssh, whose keys of hosts all users of the machine go by.
    fs::create_dir(sshd.path("all")).unwrap();
    fs::set_permissions(sshd.path("all"), fs::Permissions::from_mode(0o755)).unwrap();
    let scan = "umask 077; exec \"$0\" keys scan-host -P $1 --add --known-hosts all/ssh_known_hosts 127.0.0.1";
    let mut command = sshd.command();
    let program = std::mem::replace(&mut command, Command::new("sh"));
    command.current_dir(program.get_current_dir().unwrap());
    command.envs(program.get_envs().filter_map(|(name, value)| Some((name, value?))));
    ends(
        &command.args(["-c", scan, env!("CARGO_BIN_EXE_lockstep"), &port]).output().unwrap(),
        0,
        &["added ssh-ed25519 SHA256:"],
    );
    assert_eq!(mode(&sshd.path("all/ssh_known_hosts")), 0o644);
    // Whose file it is decides who is trusted.
    if rustix::process::geteuid().is_root() {
        let of_another = sshd.path("home/.ssh/known_hosts");
        std::os::unix::fs::chown(&of_another, Some(65534), None).unwrap();
        ends(&push(), 3, &["it belongs to user 65534"]);
        std::os::unix::fs::chown(&of_another, Some(0), None).unwrap();
    }

    // 3. The account. As long as nothing logs in, it is said what to do by hand.
    ends(&push(), 3, &["no key was accepted", &format!("lockstep keys enroll -P {port} {account}")]);
    let by_hand = sshd.run(&["keys", "enroll", "-P", &port, &account]);
    ends(&by_hand, 3, &["authorized_keys", &format!("\n{line}"), "ssh-copy-id -i", &format!("-p {port} {account}")]);
    let enroll = || sshd.run(&["keys", "enroll", "-P", &port, &account, "--with", "user"]);
    ends(&enroll(), 0, &["was added to", "there/.ssh/authorized_keys", "logs in"]);
    let authorized = sshd.path("there/.ssh/authorized_keys");
    assert_eq!(fs::read_to_string(&authorized).unwrap(), line);
    assert_eq!((mode(&authorized), mode(&sshd.path("there/.ssh"))), (0o600, 0o700));
    ends(&enroll(), 0, &["already"]);
    assert_eq!(fs::read_to_string(&authorized).unwrap(), line);

    // 4. The data.
    ends(&push(), 0, &[]);
    assert_eq!(fs::read_to_string(sshd.path("arrived/file")).unwrap(), "content");
}

#[test]
fn s18_what_is_in_authorized_keys_stays() {
    let sshd = sshd();
    let port = sshd.port.to_string();
    let account = format!("{}@127.0.0.1", account());
    keygen(sshd.at.path(), &["-t", "ed25519", "-N", "", "-C", "new", "-f", "new"]);
    fs::create_dir(sshd.path("there/.ssh")).unwrap();
    fs::set_permissions(sshd.path("there/.ssh"), fs::Permissions::from_mode(0o750)).unwrap();
    let file = sshd.path("there/real");
    let present =
        format!("# mine\n#{}\nssh-rsa AAAAnot a key", fs::read_to_string(sshd.path("new.pub")).unwrap().trim());
    fs::write(&file, &present).unwrap();
    fs::set_permissions(&file, fs::Permissions::from_mode(0o640)).unwrap();
    let link = sshd.path("there/.ssh/authorized_keys");
    std::os::unix::fs::symlink(&file, &link).unwrap();
    let arguments =
        ["keys", "enroll", "-P", &port, &account, "--with", "user", "--identity", "new", "--known-hosts", "known"];
    ends(&sshd.run(&arguments), 0, &["was added to"]);
    let line = fs::read_to_string(sshd.path("new.pub")).unwrap();
    assert_eq!(fs::read_to_string(&file).unwrap(), format!("{present}\n{line}"));
    assert_eq!((mode(&file), mode(&sshd.path("there/.ssh"))), (0o640, 0o750));
    assert!(link.symlink_metadata().unwrap().is_symlink());
}

#[test]
fn s18_a_restricted_key_transfers_files_below_one_directory_and_no_more() {
    let sshd = sshd();
    let (port, port_option) = (sshd.port.to_string(), format!("-oPort={}", sshd.port));
    let account = format!("{}@127.0.0.1", account());
    keygen(sshd.at.path(), &["-t", "ed25519", "-N", "", "-f", "new"]);
    let inside = sshd.path("in side");
    fs::create_dir(&inside).unwrap();
    fs::write(inside.join("file"), "x").unwrap();
    let directory = inside.display().to_string();
    let login = ["-P", &port, "--identity", "new", "--known-hosts", "known"];
    let command = format!("{} sftp-server", env!("CARGO_BIN_EXE_lockstep"));
    let enroll = ["keys", "enroll", &account, "--with", "user", "--restrict", &directory, "--remote-command", &command];
    ends(&sshd.run(&[&enroll[..], &login].concat()), 0, &["was added to", "logs in"]);
    let line = fs::read_to_string(sshd.path("there/.ssh/authorized_keys")).unwrap();
    assert!(line.starts_with("restrict,command=\"") && line.contains("--root '"), "{line}");
    let push = |to: &str| {
        let to = format!("{account}:{to}");
        sshd.run(&[&["push", &directory, &to][..], &login].concat())
    };
    ends(&push("/copy"), 0, &[]);
    assert!(inside.join("copy/file").exists());
    let shell = Command::new("ssh")
        .current_dir(sshd.at.path())
        .args([
            "-F",
            "none",
            "-i",
            "new",
            "-oUserKnownHostsFile=known",
            "-oBatchMode=yes",
            &port_option,
            &account,
            "id",
        ])
        .stdin(Stdio::null())
        .output()
        .unwrap();
    assert!(!text(&shell).contains("uid="), "{}", text(&shell));
    // The key is there with options that were not asked for now.
    let other = ["keys", "enroll", &account, "--with", "user", "--restrict", "/elsewhere"];
    ends(&sshd.run(&[&other[..], &login].concat()), 4, &["other options"]);
}

#[test]
fn h53_scan_host_replaces_nothing() {
    let sshd = Sshd::with(|at| {
        keygen(at, &["-t", "ecdsa", "-N", "", "-f", "second"]);
        format!("HostKey {}", at.join("second").display())
    });
    let port = sshd.port.to_string();
    let scan = |more: &[&str]| {
        sshd.run(&[&["keys", "scan-host", "-P", &port, "127.0.0.1", "--known-hosts", "known"], more].concat())
    };
    let (first, second) = (public(&sshd.path("host.pub")), public(&sshd.path("second.pub")));
    // A key that is in a list of what is revoked is not new, whatever else is on file.
    fs::write(sshd.path("revoked"), format!("{second}\n")).unwrap();
    ends(&scan(&["-o", "RevokedHostKeys=revoked"]), 3, &["REVOKED HOST KEY"]);
    // One key is on file; the other proves nothing by it, and is added only where it is named.
    let before = fs::read_to_string(sshd.path("known")).unwrap();
    ends(&scan(&["--add"]), 0, &["trusted already"]);
    assert_eq!(fs::read_to_string(sshd.path("known")).unwrap(), before);
    let fingerprint = Command::new("ssh-keygen").arg("-lf").arg(sshd.path("second.pub")).output().unwrap();
    let fingerprint = String::from_utf8(fingerprint.stdout).unwrap().split(' ').nth(1).unwrap().to_owned();
    ends(&scan(&["--add", "--fingerprint", &fingerprint]), 0, &["added ecdsa-sha2-nistp256"]);
    assert_eq!(fs::read_to_string(sshd.path("known")).unwrap(), format!("{before}[127.0.0.1]:{port} {second}\n"));

    for (known, words) in [
        (format!("[127.0.0.1]:{port} {}\n", public(&sshd.path("user.pub"))), ["HOST KEY CHANGED", "known:1"]),
        (format!("@revoked * {first}\n"), ["REVOKED HOST KEY", "known:1"]),
    ] {
        fs::write(sshd.path("known"), &known).unwrap();
        for arguments in [&["--add"][..], &["--add", "--fingerprint", &fingerprint], &[]] {
            ends(&scan(arguments), 3, &words);
            assert_eq!(fs::read_to_string(sshd.path("known")).unwrap(), known);
        }
    }
    // What OpenSSH finds is what is shown.
    fs::remove_file(sshd.path("known")).unwrap();
    ends(&scan(&["--add"]), 0, &["added ssh-ed25519", "added ecdsa-sha2-nistp256"]);
    let theirs = Command::new("ssh-keyscan").args(["-p", &port, "127.0.0.1"]).output().unwrap();
    let sorted = |text: &str| {
        let mut lines: Vec<String> = text.lines().filter(|line| !line.starts_with('#')).map(str::to_owned).collect();
        lines.sort();
        lines
    };
    let ours = fs::read_to_string(sshd.path("known")).unwrap();
    assert_eq!(sorted(&ours), sorted(&String::from_utf8_lossy(&theirs.stdout)));
}

/// Runs lockstep at a terminal of its own, and types.
fn at_a_terminal(sshd: &Sshd, arguments: &[&str], typed: &str) -> Output {
    let command = [&[env!("CARGO_BIN_EXE_lockstep")], arguments].concat().join(" ");
    let mut child = Command::new("script")
        .args(["-qec", &command, "/dev/null"])
        .current_dir(sshd.at.path())
        .env("HOME", sshd.path("home"))
        .env("XDG_STATE_HOME", sshd.path("state"))
        .env_remove("SSH_AUTH_SOCK")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("script is not installed: Debian package bsdutils");
    // What is typed before it is asked for is thrown away: each line waits for its question.
    let mut input = child.stdin.take().unwrap();
    let mut output = child.stdout.take().unwrap();
    let (mut seen, mut buffer) = (Vec::new(), [0; 1024]);
    let mut lines = typed.split_inclusive('\n');
    while let Ok(count @ 1..) = std::io::Read::read(&mut output, &mut buffer) {
        let asked = |seen: &[u8]| {
            let text = String::from_utf8_lossy(seen).into_owned();
            text.matches("ssphrase for ").count() + text.matches("same again").count()
        };
        let before = asked(&seen);
        seen.extend_from_slice(&buffer[..count]);
        for _ in before..asked(&seen) {
            if let Some(line) = lines.next() {
                input.write_all(line.as_bytes()).unwrap();
            }
        }
    }
    let status = child.wait().unwrap();
    Output { status, stdout: seen, stderr: Vec::new() }
}

#[test]
fn a_passphrase_is_asked_for_at_the_terminal_and_nowhere_else() {
    let sshd = sshd();
    let port = sshd.port.to_string();
    let made = at_a_terminal(&sshd, &["keys", "generate", "--passphrase", "locked"], "open sesame\nopen sesame\n");
    ends(&made, 0, &["wrote 'locked'"]);
    assert!(!text(&made).contains("sesame"), "{}", text(&made));
    let derive = |secret: &str| {
        Command::new("ssh-keygen")
            .current_dir(sshd.at.path())
            .args(["-y", "-P", secret, "-f", "locked"])
            .output()
            .unwrap()
    };
    assert!(derive("open sesame").status.success() && !derive("").status.success());

    fs::create_dir(sshd.path("small")).unwrap();
    fs::write(sshd.path("small/file"), "content").unwrap();
    fs::copy(sshd.path("locked.pub"), sshd.path("authorized")).unwrap();
    let to = format!("{}@127.0.0.1:{}", account(), sshd.path("arrived").display());
    let arguments = ["push", "small", &to, "-P", &port, "--identity", "locked", "--known-hosts", "known"];
    ends(&sshd.run(&arguments), 3, &["needs a passphrase", "no terminal", "ssh-add"]);
    let asked = at_a_terminal(&sshd, &arguments, "wrong\nopen sesame\n");
    ends(&asked, 0, &[]);
    // Two connections, one passphrase; it is not shown.
    assert_eq!(text(&asked).matches("Passphrase ").count(), 2, "{}", text(&asked));
    assert!(!text(&asked).contains("sesame"), "{}", text(&asked));
    ends(&at_a_terminal(&sshd, &arguments, "\u{3}\n"), 3, &["needs a passphrase"]);
    let quiet = [&arguments[..], &["-o", "BatchMode=yes"]].concat();
    let asked = at_a_terminal(&sshd, &quiet, "");
    assert!(asked.status.code() == Some(3) && !text(&asked).contains("Passphrase for"), "{}", text(&asked));
    // An agent that has it open spares the question.
    let agent = Agent::start(sshd.at.path());
    fs::copy(sshd.path("locked"), sshd.path("open")).unwrap();
    keygen(sshd.at.path(), &["-p", "-P", "open sesame", "-N", "", "-f", "open"]);
    agent.add("open");
    let spared = sshd.command().env("SSH_AUTH_SOCK", &agent.socket).args(arguments).output().unwrap();
    ends(&spared, 0, &[]);
}

/// lockstep's own server for `sync`, who may use the key `user`.
struct Serve {
    child: Child,
    port: String,
}

impl Serve {
    fn start(sshd: &Sshd) -> Serve {
        fs::create_dir(sshd.path("root")).unwrap();
        let mut child = sshd
            .command()
            .args(["serve", "--listen", "127.0.0.1:0", "--user", "sync", "--root", "root"])
            .args(["--authorized-keys", "user.pub", "--host-key", "serve-key"])
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stderr.take().unwrap()).read_line(&mut line).unwrap();
        let address = line.split("listening on ").nth(1).and_then(|rest| rest.split(',').next()).unwrap();
        Serve { child, port: address.rsplit(':').next().unwrap().trim().to_owned() }
    }
}

impl Drop for Serve {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn s18_with_the_own_server_the_keys_are_its_administrators() {
    let sshd = sshd();
    let server = Serve::start(&sshd);
    let port = server.port.as_str();
    ends(&sshd.run(&["keys", "generate"]), 0, &[]);
    ends(&sshd.run(&["keys", "scan-host", "-P", port, "--add", "127.0.0.1"]), 0, &["added ssh-ed25519"]);
    let line = fs::read_to_string(sshd.path("home/.ssh/id_ed25519.pub")).unwrap();
    let enroll = |more: &[&str]| sshd.run(&[&["keys", "enroll", "-P", port, "sync@127.0.0.1"], more].concat());
    ends(&enroll(&[]), 3, &[&line, "ssh-copy-id"]);
    ends(&enroll(&["--with", "user"]), 3, &[&line, "--authorized-keys"]);
    assert!(!sshd.path("root/.ssh").exists());
    ends(&enroll(&["--identity", "user"]), 0, &["already"]);
    fs::create_dir(sshd.path("tree")).unwrap();
    let push = ["push", "tree", "sync@127.0.0.1:/x", "-P", port];
    ends(&sshd.run(&push), 3, &["no key was accepted"]);
    fs::write(sshd.path("user.pub"), line).unwrap();
    ends(&sshd.run(&push), 0, &[]);
}
