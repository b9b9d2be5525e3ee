//! The audit trail: who did what, when and from where; signed, rotated, exported, and nothing done that cannot be recorded.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use lockstep::audit::{AuditRecord, Head};
use lockstep::wire::sftp::{Status, packet};
use serde_json::Value;
use sha2::{Digest as _, Sha256};

use crate::daemon::Running;
use crate::kit::area::{contents, lockstep, run_traced, sample};
use crate::kit::pair::{mode_of, run_command};
use crate::kit::raw::Server;
use crate::kit::served::{Served, user, write};
use crate::kit::sshd::Sshd;
use crate::kit::{account, done, ends, key, keygen, public, text, until};

/// A source, a target and a configuration of the audit logs.
struct Place {
    at: tempfile::TempDir,
}

impl Place {
    /// With these lines of `[audit]`; in memory where that is to be had.
    fn new(audit: &str) -> Place {
        let memory = Path::new("/dev/shm");
        let at = if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() };
        let place = Place { at: at.unwrap() };
        key(place.at.path(), "signer");
        place.configure(audit);
        place.write("weights.bin", b"weights");
        place.write("sub/labels.txt", b"labels");
        place
    }

    fn configure(&self, audit: &str) {
        let audit = audit.replace("AT", self.at.path().to_str().unwrap());
        write(&self.path("config.toml"), &format!("[audit]\n{audit}\n"));
    }

    fn path(&self, name: &str) -> PathBuf {
        self.at.path().join(name)
    }

    fn write(&self, path: &str, data: &[u8]) {
        let path = self.path("source").join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, data).unwrap();
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.current_dir(self.at.path()).env("LOCKSTEP_CONFIG", self.path("config.toml"));
        command.env("XDG_STATE_HOME", self.path("state")).env("HOME", self.at.path()).stdin(Stdio::null());
        command
    }

    fn run(&self, arguments: &[&str]) -> Output {
        self.command(lockstep()).args(arguments).output().unwrap()
    }

    fn push(&self) -> Output {
        self.run(&["push", "-q", "source", "target"])
    }

    /// A push whose calls on the log of the target fail.
    fn push_failing(&self, calls: &str, inject: &str) -> Output {
        self.push_failing_at("audit.jsonl", calls, inject)
    }

    fn push_failing_at(&self, file: &str, calls: &str, inject: &str) -> Output {
        let mut strace = self.command("strace");
        strace.args(["-f", "-qq", "-o", "calls", "-P"]).arg(self.path("target/.lockstep").join(file));
        strace.args(["-e", &format!("trace={calls}"), "-e", &format!("inject={calls}:{inject}")]);
        run_traced(strace.args([lockstep(), "push", "-q", "source", "target"]))
    }

    fn verify(&self, more: &[&str]) -> Output {
        self.run(&[&["audit", "verify", "target"], more].concat())
    }

    fn log(&self) -> PathBuf {
        self.path("target/.lockstep/audit.jsonl")
    }

    fn lines(&self) -> Vec<Value> {
        lines(&self.path("target"))
    }
}

/// The lines of a log that was not rotated.
fn lines(root: &Path) -> Vec<Value> {
    let text = fs::read_to_string(root.join(".lockstep/audit.jsonl")).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[track_caller]
fn find<'l>(lines: &'l [Value], action: &str, path: &str) -> &'l Value {
    let wanted = |line: &&Value| line["action"] == action && (path.is_empty() || line["path"] == path);
    lines.iter().rev().find(wanted).unwrap_or_else(|| panic!("no '{action}' of '{path}' in {lines:#?}"))
}

fn sha256(data: &[u8]) -> String {
    Sha256::digest(data).iter().map(|byte| format!("{byte:02x}")).collect()
}

fn fingerprint(key: &Path) -> String {
    let shown = Command::new("ssh-keygen").arg("-lf").arg(key).output().unwrap().stdout;
    String::from_utf8(shown).unwrap().split(' ').nth(1).unwrap().to_owned()
}

fn boot() -> String {
    fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap().trim().to_owned()
}

/// A log whose last line is another one: only the end is looked at before something is appended.
fn edited_at_its_end(log: &str) -> String {
    let at = log.rfind("\"time\":\"").unwrap();
    format!("{}{}", &log[..at], log[at..].replacen("\"time\":\"2", "\"time\":\"3", 1))
}

/// What stock ssh-keygen says of a signed head.
fn keygen_verifies(at: &Path, line: &Value, key: &Path) -> bool {
    fs::write(at.join("allowed"), format!("auditor {}\n", public(key))).unwrap();
    fs::write(at.join("head.sig"), line["signature"].as_str().unwrap()).unwrap();
    fs::write(at.join("head"), format!("{}\n", line["head"].as_str().unwrap())).unwrap();
    let mut command = Command::new("ssh-keygen");
    command.args(["-Y", "verify", "-f", "allowed", "-I", "auditor", "-n", "audit@lockstep.internal", "-s", "head.sig"]);
    command.current_dir(at).stdin(fs::File::open(at.join("head")).unwrap()).output().unwrap().status.success()
}

#[test]
fn s13_a_push_by_certificate_is_found_with_who_when_where_what_and_the_rights_before_and_after() {
    let record = |at: &Path| {
        fs::create_dir(at.join("record")).unwrap();
        keygen(at, &["-t", "ed25519", "-N", "", "-f", "ca"]);
        let ca = format!("cert-authority {}\n", public(&at.join("ca.pub")));
        write(&at.join("sync.keys"), &ca);
        keygen(at, &["-s", "ca", "-I", "the trainer", "-z", "4711", "-n", "sync", "-V", "-1m:+1h", "sync.key.pub"]);
        format!("audit = '{}'", at.join("record").display())
    };
    let served = Served::with(&["sync"], record, "", |at| user(at, "sync", ""));
    fs::create_dir(served.path("source")).unwrap();
    fs::write(served.path("source/weights"), "one").unwrap();
    fs::set_permissions(served.path("source/weights"), PermissionsExt::from_mode(0o600)).unwrap();
    let push = || done(&served.lockstep(&["push", "-q", "source", "sync@127.0.0.1:/m"], "sync"));
    push();
    fs::write(served.path("source/weights"), "other").unwrap();
    fs::set_permissions(served.path("source/weights"), PermissionsExt::from_mode(0o640)).unwrap();
    push();
    fs::set_permissions(served.path("source/weights"), PermissionsExt::from_mode(0o644)).unwrap();
    push();
    let (key, authority) = (fingerprint(&served.path("sync.key.pub")), fingerprint(&served.path("ca.pub")));
    let published = lines(&served.path("sync/m"));
    let of = |action: &str, mode: &str| {
        let all = published.iter().find(|line| line["action"] == action && line["mode"] == mode);
        all.unwrap_or_else(|| panic!("{published:#?}")).clone()
    };
    let (first, second, third) = (of("publish", "0600"), of("publish", "0640"), of("metadata", "0644"));
    let metadata = fs::metadata(served.path("sync/m/weights")).unwrap();
    for (line, content, generation) in [(&first, "one", 1), (&second, "other", 2), (&third, "other", 3)] {
        assert_eq!((&line["path"], &line["size"]), (&"weights".into(), &content.len().into()), "{line}");
        assert_eq!((&line["sha256"], &line["generation"]), (&sha256(content.as_bytes()).into(), &generation.into()));
        assert_eq!((&line["key"], &line["certificate"]), (&key.as_str().into(), &"the trainer".into()), "{line}");
        assert_eq!((&line["serial"], &line["authority"]), (&4711.into(), &authority.as_str().into()), "{line}");
        assert_eq!((&line["boot"], &line["result"]), (&boot().into(), &"success".into()));
        assert!(line["peer"].as_str().unwrap().starts_with("127.0.0.1:"), "{line}");
        assert!(line["actor"].as_str().unwrap().starts_with("sync@127.0.0.1 ("), "{line}");
        assert!(line["time"].as_str().unwrap().len() == "2026-01-31T06:59:02.123Z".len(), "{line}");
    }
    assert!(first.get("mode_before").is_none(), "it was not there: {first}");
    assert_eq!(second["mode_before"], "0600");
    assert_eq!(third["mode_before"], "0640");
    assert_eq!(third["owner_before"], third["owner"]);
    assert_eq!(metadata.mode() & 0o777, 0o644);
    let intent = find(&published, "intent", "");
    assert_eq!((&intent["generation"], &intent["key"]), (&3.into(), &key.as_str().into()), "{intent}");
    // Without a key in the configuration the host's signs, at the end of each run.
    let head = find(&published, "head", "");
    let public = Command::new("ssh-keygen").args(["-y", "-f"]).arg(served.path("host")).output().unwrap().stdout;
    fs::write(served.path("host.pub"), public).unwrap();
    assert_eq!(head["key"], fingerprint(&served.path("host.pub")));
    assert!(keygen_verifies(served.at(), head, &served.path("host.pub")));
    assert!(!keygen_verifies(served.at(), head, &served.path("ca.pub")));
    let verify = |root: &str, key: &str| {
        let mut command = Command::new(lockstep());
        command.current_dir(served.at()).args(["audit", "verify", root, "--host-key", key, "--require-signature=50"]);
        command.output().unwrap()
    };
    ends(&verify("sync/m", "host.pub"), 0, &["signed up to line", "0 lines came after that"]);
    ends(&verify("sync/m", "ca.pub"), 3, &["is not listed"]);
    // At the server: the login, the connection, and what it was configured with.
    let record = || lines(&served.path("record"));
    until("the connections", || record().iter().filter(|line| line["action"] == "connection").count() == 3);
    let login = find(&record(), "login", "").clone();
    assert_eq!((&login["certificate"], &login["serial"]), (&"the trainer".into(), &4711.into()), "{login}");
    let config = served.path("config.toml");
    let told = |text: &str| find(&record(), "configuration", text).clone();
    let started = told(config.to_str().unwrap());
    assert_eq!(started["sha256"], sha256(&fs::read(&config).unwrap()), "{started}");
    served.reload("[serve.limits]", "[serve.limits]\nnonsense = 1");
    until("the refusal", || find(&record(), "configuration", "")["result"] == "failure");
    let refused = told("");
    assert_eq!(refused["sha256"], sha256(&fs::read(&config).unwrap()), "{refused}");
    assert!(refused["reason"].as_str().unwrap().contains("unknown key 'nonsense'"), "{refused}");
    served.signal(rustix::process::Signal::TERM);
    until("the last head", || record().last().unwrap()["action"] == "head");
    ends(&verify("record", "host.pub"), 0, &["signed up to line"]);
}

#[test]
fn s13_what_plain_clients_change_is_told_with_the_rights_before() {
    let served = Served::recording();
    fs::write(served.path("one"), "one").unwrap();
    done(&served.sftp("sync", "sync", "put one\nchmod 600 one\nput one\nrm one\n"));
    let log = lines(&served.path("sync"));
    let key = fingerprint(&served.path("sync.key.pub"));
    let of: Vec<&Value> = log.iter().filter(|line| line["path"] == "one").collect();
    let actions: Vec<&str> = of.iter().map(|line| line["action"].as_str().unwrap()).collect();
    assert_eq!(actions, ["publish", "metadata", "intent", "publish", "remove"], "{log:#?}");
    assert!(of[0].get("mode_before").is_none(), "{}", of[0]);
    assert_eq!((&of[1]["mode"], &of[1]["mode_before"]), (&"0600".into(), &of[0]["mode"]));
    assert!(of[2..].iter().all(|line| line["mode_before"] == "0600"), "{log:#?}");
    let owner = fs::metadata(served.path("sync")).unwrap().uid().to_string();
    assert!(of.iter().all(|line| line["key"] == key && line["peer"].is_string()), "{log:#?}");
    assert!(of[1..].iter().all(|line| line["owner_before"] == owner), "{log:#?}");
    // What was refused before a key was taken is told with the login.
    keygen(served.at(), &["-t", "ed25519", "-N", "", "-f", "stranger"]);
    let mut ssh = served.client("ssh", "-p", "stranger");
    ssh.args(["-i", "sync.key", "-o", "IdentitiesOnly=yes", "sync@127.0.0.1", "-s", "sftp"]);
    fs::copy(served.path("stranger"), served.path("stranger.key")).unwrap();
    assert!(ssh.output().is_ok());
    let stranger = fingerprint(&served.path("stranger.pub"));
    until("the login", || find(&lines(&served.path("record")), "login", "")["reason"].is_string());
    let login = find(&lines(&served.path("record")), "login", "").clone();
    assert!(login["reason"].as_str().unwrap().contains(&stranger), "{login}");
}

#[test]
fn s13_under_sshd_the_key_is_told_where_sshd_tells_it() {
    let sshd = Sshd::with(|_| "ExposeAuthInfo yes".to_owned());
    fs::create_dir(sshd.path("source")).unwrap();
    fs::write(sshd.path("source/file"), "content").unwrap();
    done(&sshd.lockstep(&["push", "-q", "source", &sshd.remote("arrived")]));
    let line = find(&lines(&sshd.path("arrived")), "publish", "file").clone();
    assert_eq!(line["key"], fingerprint(&sshd.path("user.pub")), "{line}");
    assert!(line["peer"].as_str().unwrap().starts_with("127.0.0.1:"), "{line}");
}

#[test]
fn s13_over_a_stock_server_it_is_announced_told_and_signed_by_the_sender() {
    let sshd = Sshd::only("Subsystem sftp internal-sftp");
    fs::create_dir(sshd.path("source")).unwrap();
    fs::write(sshd.path("source/file"), "one").unwrap();
    key(sshd.at.path(), "signer");
    write(&sshd.path("c.toml"), &format!("[audit]\nsigning_key = '{}'\n", sshd.path("signer").display()));
    let push = || {
        let mut command = sshd.command();
        command.env("LOCKSTEP_CONFIG", sshd.path("c.toml")).args(["push", "-q", "source", &sshd.remote("target")]);
        command.args(["-P", &sshd.port.to_string(), "--identity", "user", "--known-hosts", "known"]).output().unwrap()
    };
    done(&push());
    fs::set_permissions(sshd.path("source/file"), PermissionsExt::from_mode(0o600)).unwrap();
    done(&push());
    let log = lines(&sshd.path("target"));
    let actions: Vec<&str> = log.iter().map(|line| line["action"].as_str().unwrap()).collect();
    assert_eq!(actions.iter().filter(|action| **action == "intent").count(), 2, "{actions:?}");
    assert_eq!(actions.last(), Some(&"head"));
    let changed = find(&log, "metadata", "file");
    assert_eq!((&changed["mode"], changed["mode_before"].is_string()), (&"0600".into(), true), "{changed}");
    assert!(keygen_verifies(sshd.at.path(), log.last().unwrap(), &sshd.path("signer.pub")));
    // A log that was cut is not gone on with, and nothing is changed.
    fs::write(sshd.path("source/file"), "other").unwrap();
    let cut = sshd.path("target/.lockstep/audit.jsonl");
    let whole = fs::read_to_string(&cut).unwrap();
    fs::write(&cut, &whole[..=whole[..whole.len() - 1].rfind('\n').unwrap()]).unwrap();
    ends(&push(), 4, &["lines were cut off at its end"]);
    assert_eq!(fs::read_to_string(sshd.path("target/file")).unwrap(), "one");
}

#[test]
fn h60_every_way_of_tampering_is_found_and_named() {
    let place = Place::new("signing_key = 'AT/signer'\nrotate_bytes = 4096");
    fs::write(place.path("allowed"), format!("auditor {}\n", public(&place.path("signer.pub")))).unwrap();
    // Until there are three files.
    for round in 0..40 {
        place.write("weights.bin", format!("weights of round {round}").as_bytes());
        done(&place.push());
        if place.path("target/.lockstep/audit-000002.jsonl").exists() {
            break;
        }
    }
    place.write("weights.bin", b"the last");
    done(&place.push());
    let signers = ["--allowed-signers", "allowed", "--require-signature=0"];
    let good = place.verify(&signers);
    ends(&good, 0, &["unbroken", "in 3 files", "signed up to line", "by auditor with SHA256:", "0 lines came after"]);
    let head = fs::read_to_string(place.path("target/.lockstep/audit.head")).unwrap();
    ends(&place.verify(&["--head", head.trim()]), 0, &[]);
    let saved = place.path("saved");
    run_command("cp", &["-a"], &[&place.path("target/.lockstep"), &saved]);
    let restore = || {
        fs::remove_dir_all(place.path("target/.lockstep")).unwrap();
        run_command("cp", &["-a"], &[&saved, &place.path("target/.lockstep")]);
    };
    let file = |name: &str| place.path("target/.lockstep").join(name);
    let edit = |name: &str, change: &dyn Fn(&mut Vec<String>)| {
        let mut all: Vec<String> =
            fs::read_to_string(file(name)).unwrap().lines().map(|line| format!("{line}\n")).collect();
        change(&mut all);
        fs::write(file(name), all.concat()).unwrap();
    };
    let number = |name: &str, at: usize| {
        let text = fs::read_to_string(saved.join(name)).unwrap();
        let line: Value = serde_json::from_str(text.lines().nth(at).unwrap()).unwrap();
        format!("line {}", line["sequence"])
    };
    for name in ["audit-000001.jsonl", "audit-000002.jsonl", "audit.jsonl"] {
        type Change<'c> = &'c dyn Fn(&mut Vec<String>);
        let cases: [(&str, Change<'_>, usize); 4] = [
            ("edited", &|all| all[1] = all[1].replacen("\"time\":\"2", "\"time\":\"3", 1), 1),
            ("removed", &|all| drop(all.remove(1)), 1),
            ("inserted", &|all| all.insert(1, all[0].clone()), 1),
            ("reordered", &|all| all.swap(1, 2), 1),
        ];
        for (what, change, at) in cases {
            edit(name, change);
            ends(&place.verify(&[]), 1, &[&number(name, at)]);
            assert!(text(&place.verify(&[])).contains("find out who changed it"), "{what} in {name}");
            restore();
        }
        fs::remove_file(file(name)).unwrap();
        ends(&place.verify(&[]), 1, &[name, "is not there"]);
        restore();
    }
    edit("audit.jsonl", &|all| drop(all.pop()));
    ends(&place.verify(&[]), 1, &["lines were cut off or written anew"]);
    // With the head beside it too: a head that was kept elsewhere shows it, and so does the number of lines that are signed.
    fs::remove_file(file("audit.head")).unwrap();
    ends(&place.verify(&["--head", head.trim()]), 1, &["lines were cut off"]);
    ends(&place.verify(&signers), 3, &["came after the last signed head"]);
    restore();
    // Written anew as a whole, with everything that hangs together, but without the key.
    for name in ["audit-000001.jsonl", "audit-000002.jsonl", "audit.jsonl"] {
        fs::remove_file(file(name)).unwrap();
    }
    fs::remove_file(file("audit.head")).unwrap();
    let root = lockstep::root::Root::open(&place.path("target")).unwrap();
    let forged = lockstep::audit::AuditRecord { action: "publish".into(), ..Default::default() };
    lockstep::audit::AuditLog::open(&root).unwrap().append(&vec![forged; 200]).unwrap();
    ends(&place.verify(&[]), 0, &["unbroken"]);
    ends(&place.verify(&signers), 3, &["no head is signed"]);
    ends(&place.verify(&["--head", head.trim()]), 1, &[]);
    // With another key.
    key(place.at.path(), "other");
    place.configure("signing_key = 'AT/other'");
    place.write("weights.bin", b"by another");
    done(&place.push());
    ends(&place.verify(&signers), 3, &["is not listed"]);
    // A signature of something else in its place.
    let stolen =
        serde_json::from_str::<Value>(fs::read_to_string(saved.join("audit.jsonl")).unwrap().lines().last().unwrap());
    let stolen = stolen.unwrap()["signature"].clone();
    let last = place.lines().last().unwrap().clone();
    let (old, new) = (serde_json::to_string(&last["signature"]).unwrap(), serde_json::to_string(&stolen).unwrap());
    edit("audit.jsonl", &|all| {
        let line = all.pop().unwrap().replace(&old, &new);
        let body = line.split(",\"hash\"").next().unwrap().to_owned();
        all.push(format!("{body},\"hash\":\"{}\"}}\n", sha256(body.as_bytes())));
    });
    fs::remove_file(file("audit.head")).unwrap();
    ends(&place.verify(&signers), 1, &["does not fit"]);
}

#[test]
fn h60_lines_that_are_removed_without_the_key_show_where_signatures_are_asked_for() {
    let place = Place::new("signing_key = 'AT/signer'\nrotate_bytes = 4096\nkeep = 1");
    fs::write(place.path("allowed"), format!("auditor {}\n", public(&place.path("signer.pub")))).unwrap();
    let signers = ["--allowed-signers", "allowed", "--require-signature"];
    for round in 0..60 {
        place.write("weights.bin", format!("weights of round {round}").as_bytes());
        done(&place.push());
        if place.path("target/.lockstep/audit-000003.jsonl").exists() {
            break;
        }
    }
    // What is removed by its rules is signed.
    ends(&place.verify(&signers), 0, &["are not there any more", "as the log says, and auditor with SHA256:"]);

    // Whoever may write the log and has no key takes its beginning away, and puts in the line that says so.
    let place = Place::new("signing_key = 'AT/signer'");
    fs::write(place.path("allowed"), format!("auditor {}\n", public(&place.path("signer.pub")))).unwrap();
    for round in 0..3 {
        place.write("weights.bin", format!("weights of round {round}").as_bytes());
        done(&place.push());
    }
    ends(&place.verify(&signers), 0, &["unbroken"]);
    let log = fs::read_to_string(place.log()).unwrap();
    let first: Value = log
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).unwrap())
        .find(|line| line["action"] == "head")
        .unwrap();
    let removed = Head::decode(first["head"].as_str().unwrap()).unwrap();
    let rest: Vec<&str> = log.split_inclusive('\n').skip(removed.lines as usize).collect();
    let last = Head::decode(&fs::read_to_string(place.path("target/.lockstep/audit.head")).unwrap()).unwrap();
    let signature = first["signature"].as_str().unwrap().to_owned();
    for (signature, why) in [(None, "nobody has signed that they were removed"), (Some(signature), "does not count")] {
        let forged = AuditRecord {
            action: "prune".into(),
            path: "audit-000001.jsonl".into(),
            head: Some(removed.to_string()),
            signature,
            ..AuditRecord::default()
        };
        let (line, head) = lockstep::audit::lines(last, [forged]).unwrap();
        fs::write(place.log(), [rest.concat().as_bytes(), &line].concat()).unwrap();
        fs::write(place.path("target/.lockstep/audit.head"), head.encode()).unwrap();
        ends(&place.verify(&signers), 3, &["lines are not there any more", why]);
    }
}

#[test]
fn a_configuration_that_is_named_and_not_there_is_an_error() {
    let place = Place::new("on_failure = \"refuse\"");
    let mut command = place.command(lockstep());
    command.env("LOCKSTEP_CONFIG", place.path("confg.toml")).args(["push", "-q", "source", "target"]);
    ends(&command.output().unwrap(), 2, &["confg.toml"]);
    assert!(!place.path("target").exists());
}

#[test]
fn h39_a_clock_that_was_set_back_is_a_note() {
    let place = Place::new("");
    done(&place.push());
    // A line of tomorrow, made as the log makes them.
    let root = lockstep::root::Root::open(&place.path("target")).unwrap();
    let head = lockstep::audit::verify(&root).unwrap();
    let record = lockstep::audit::AuditRecord { action: "publish".into(), ..Default::default() };
    let (line, _) = lockstep::audit::lines(head, [record]).unwrap();
    let line = String::from_utf8(line).unwrap();
    let year = line.split("\"time\":\"").nth(1).unwrap()[..4].to_owned();
    let line = line.replacen(&format!("\"time\":\"{year}"), "\"time\":\"2999", 1);
    let body = line.split(",\"hash\"").next().unwrap();
    let line = format!("{body},\"hash\":\"{}\"}}\n", sha256(body.as_bytes()));
    let mut log = fs::File::options().append(true).open(place.log()).unwrap();
    std::io::Write::write_all(&mut log, line.as_bytes()).unwrap();
    place.write("weights.bin", b"later, and earlier");
    done(&place.push());
    ends(&place.verify(&[]), 0, &["unbroken", "note: line", "the clock was set back, from"]);
}

#[test]
fn h32_killed_at_any_step_of_a_rotation_no_line_and_no_file_is_missing() {
    let place = Place::new("signing_key = 'AT/signer'\nrotate_bytes = 4096\nkeep = 1");
    // Two rotations, so that the next one removes a file as well; and then as much as makes it due.
    let rotated = |number: u32| place.path(&format!("target/.lockstep/audit-{number:06}.jsonl"));
    for round in 0..60 {
        place.write("weights.bin", format!("round {round}").as_bytes());
        done(&place.push());
        if rotated(2).exists() && fs::metadata(place.log()).unwrap().len() >= 4096 {
            break;
        }
    }
    assert!(rotated(2).exists() && !rotated(1).exists());
    run_command("cp", &["-a"], &[&place.path("target"), &place.path("template")]);
    let before = text(&place.verify(&[]));
    let lines_before: u64 = before.split(": ").nth(1).unwrap().split(' ').next().unwrap().parse().unwrap();
    place.write("weights.bin", b"the next");
    let reset = || {
        fs::remove_dir_all(place.path("target")).unwrap();
        run_command("cp", &["-a"], &[&place.path("template"), &place.path("target")]);
    };
    let within = |call: &str, inject: Option<String>| {
        let mut strace = place.command("strace");
        strace.args(["-f", "-qq", "-y", "-o", "calls", "-e", &format!("trace={call}")]);
        if let Some(inject) = inject {
            strace.args(["-e", &format!("inject={call}:{inject}")]);
        }
        run_traced(strace.args([lockstep(), "push", "-q", "source", "target"]))
    };
    let calls = ["linkat", "renameat", "fsync", "fdatasync", "unlinkat", "write", "openat2"];
    let (mut killed, mut cut_off) = (0, 0);
    for call in calls {
        reset();
        done(&within(call, None));
        let log = fs::read_to_string(place.path("calls")).unwrap();
        let named = |line: &str| line.contains(&format!(" {call}("));
        let all = log.lines().filter(|line| named(line)).count();
        // Those that are about the log, and one behind each of them.
        let mut points: Vec<usize> = log
            .lines()
            .filter(|line| named(line))
            .zip(1..)
            .filter(|(line, _)| line.contains("audit") || line.contains("/target/.lockstep>"))
            .flat_map(|(_, number)| [number, number + 1])
            .filter(|&number| number <= all)
            .collect();
        points.dedup();
        assert!(!points.is_empty(), "{call} is never about the log: {log}");
        let some: Vec<usize> = sample(points.len()).into_iter().map(|at| points[at - 1]).collect();
        let points = if call == "linkat" || call == "renameat" { points } else { some };
        for point in points {
            let when = format!("killed at {call} number {point}");
            reset();
            let ended = within(call, Some(format!("signal=SIGKILL:when={point}")));
            killed += u32::from(!ended.status.success());
            // As it is: a rotation that was cut off is no tampering. A torn line is one that was never acknowledged.
            let seen = place.verify(&[]);
            ends(&seen, 0, &["unbroken"]);
            cut_off += u32::from(fs::metadata(place.log()).unwrap().nlink() == 2);
            done(&place.push());
            let after = place.verify(&[]);
            ends(&after, 0, &["unbroken", "removed up to 'audit-00000"]);
            let now: u64 = text(&after).split(": ").nth(1).unwrap().split(' ').next().unwrap().parse().unwrap();
            assert!(now > lines_before, "{when}: lines are gone");
            assert_eq!(fs::metadata(place.log()).unwrap().nlink(), 1, "{when}");
            assert!(!rotated(4).exists(), "{when}: it was rotated twice");
            assert_eq!(fs::read(place.path("target/weights.bin")).unwrap(), b"the next", "{when}");
        }
    }
    assert!(killed > 10, "only {killed} runs were killed");
    assert!(cut_off > 0, "no run was killed between the two names of the file");
}

#[test]
fn h30_h31_a_log_that_cannot_be_written_keeps_everything_as_it_was() {
    let place = Place::new("");
    done(&place.push());
    let (old, head) = (contents(&place.path("target")), fs::read(place.path("target/.lockstep/audit.head")).unwrap());
    let old_mode = mode_of(&place.path("target/weights.bin"));
    place.write("weights.bin", b"a newer version");
    fs::set_permissions(place.path("source/sub/labels.txt"), PermissionsExt::from_mode(0o600)).unwrap();
    let unchanged = |when: &str| {
        assert!(contents(&place.path("target")) == old, "{when}: something was published");
        assert_eq!(mode_of(&place.path("target/sub/labels.txt")) & 0o777, 0o644, "{when}");
        assert_eq!(mode_of(&place.path("target/weights.bin")), old_mode, "{when}");
        assert_eq!(fs::read(place.path("target/.lockstep/audit.head")).unwrap(), head, "{when}");
    };
    run_command("chmod", &["644"], &[&place.path("target/sub/labels.txt")]);
    for (calls, inject) in [
        // No room for what is to be told, or for the announcement.
        ("fallocate", "error=ENOSPC"),
        ("fallocate", "error=EDQUOT"),
        ("write", "error=ENOSPC"),
        ("write", "error=EIO"),
        ("fdatasync", "error=EIO"),
        ("write", "error=EROFS"),
    ] {
        let failed = place.push_failing(calls, inject);
        ends(&failed, 5, &["audit.jsonl'"]);
        let said = text(&failed);
        assert!(said.contains("nothing was changed"), "{calls} {inject}: {said}");
        unchanged(&format!("{calls} {inject}"));
    }
    let tampered = fs::read_to_string(place.log()).unwrap();
    fs::write(place.log(), edited_at_its_end(&tampered)).unwrap();
    ends(&place.push(), 4, &["it was edited", "nothing was changed"]);
    unchanged("tampered");
    fs::write(place.log(), tampered).unwrap();
    // A file system that cannot take room in advance is no fault.
    done(&place.push_failing("fallocate", "error=EOPNOTSUPP"));
    assert_eq!(fs::read(place.path("target/weights.bin")).unwrap(), b"a newer version");
    ends(&place.verify(&[]), 0, &[]);
}

#[test]
fn h30_lines_that_are_written_are_there_also_where_a_new_head_finds_no_room() {
    let place = Place::new("");
    done(&place.push());
    for (calls, error) in [("write", "ENOSPC"), ("fdatasync", "EIO")] {
        place.write("weights.bin", format!("a newer version, and {error}").as_bytes());
        ends(&place.push_failing_at("audit.head.new", calls, &format!("error={error}")), 0, &[]);
        assert!(fs::read_to_string(place.path("calls")).unwrap().contains("INJECTED"), "{calls}");
        let head = fs::read_to_string(place.path("target/.lockstep/audit.head")).unwrap();
        assert!(head.starts_with(&format!("{} ", place.lines().len())), "{head}");
        assert!(!place.path("target/.lockstep/audit.head.new").exists());
        ends(&place.verify(&[]), 0, &[]);
    }
    assert!(place.lines().iter().all(|line| line["action"] != "gap"));
}

#[test]
fn h30_a_log_that_cannot_be_written_is_a_warning_where_that_was_asked_for() {
    let place = Place::new("on_failure = 'continue'");
    done(&place.push());
    place.write("weights.bin", b"a newer version");
    let pushed = place.push_failing("write", "error=ENOSPC");
    ends(&pushed, 0, &["warning", "the audit log cannot be written, and has a gap"]);
    assert_eq!(fs::read(place.path("target/weights.bin")).unwrap(), b"a newer version");
    ends(&place.verify(&[]), 0, &[]);
}

#[test]
fn h30_room_that_was_taken_holds_when_the_disk_is_full_of_other_things() {
    let place = Place::new("");
    for number in 0..300 {
        place.write(&format!("many/{number:03}-{}", "x".repeat(100)), b"");
    }
    fs::create_dir(place.path("target")).unwrap();
    // A file system of its own; what is left of it is filled while modes are given, before the log is told.
    let script = "mount -t tmpfs -o size=8m tmpfs target && \"$0\" push -q source target || exit 90\n\
                  lockstep=$0\n\
                  chmod 600 source/many/*\n\
                  fill() { cat /dev/zero > target/.lockstep/fill 2>/dev/null; }\n\
                  strace -f -qq -o calls -e trace=fchmod -e inject=fchmod:delay_enter=20000 \
                      \"$lockstep\" push -q source target & pid=$!\n\
                  while ! [ -e target/.lockstep/staging/current/commit ]; do\n\
                      kill -0 $pid 2>/dev/null || exit 91; sleep 0.02\n\
                  done\n\
                  fill; wait $pid; echo ended $?\n\
                  rm target/.lockstep/fill; cp -a target/.lockstep/audit.jsonl told\n\
                  \"$lockstep\" push -q source target; \"$lockstep\" audit verify target";
    let mut unshare = place.command("unshare");
    let who: &[&str] = if rustix::process::geteuid().is_root() { &[] } else { &["--map-root-user"] };
    let ended = unshare.args(who).args(["--mount", "sh", "-c", script, lockstep()]).output().unwrap();
    ends(&ended, 0, &["unbroken"]);
    // All lines are there, though nothing else found room.
    let told = fs::read_to_string(place.path("told")).unwrap();
    let changed = told.lines().filter(|line| line.contains("\"action\":\"metadata\"")).count();
    assert!(changed >= 300, "{changed} of 300: {}", text(&ended));
}

#[test]
fn h30_plain_clients_change_nothing_that_cannot_be_recorded() {
    let served = Served::recording();
    fs::write(served.path("one"), "one").unwrap();
    done(&served.sftp("sync", "sync", "put one\n"));
    let log = served.path("sync/.lockstep/audit.jsonl");
    let whole = fs::read_to_string(&log).unwrap();
    fs::write(&log, edited_at_its_end(&whole)).unwrap();
    for batch in ["put one two\n", "rm one\n", "chmod 600 one\n", "mkdir d\n", "rename one other\n", "symlink one l\n"]
    {
        let refused = served.sftp("sync", "sync", batch);
        assert!(!refused.status.success(), "{batch}: {}", text(&refused));
    }
    let names: Vec<_> = fs::read_dir(served.path("sync")).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(names.len(), 2, "{names:?}");
    served.wait_for("the audit log cannot be written");
    // Reading goes on, and so does everything once the log is right again.
    done(&served.sftp("sync", "sync", "get one got\n"));
    fs::write(&log, whole).unwrap();
    done(&served.sftp("sync", "sync", "put one two\n"));
}

#[test]
fn h30_what_a_session_found_no_room_to_tell_is_missed_by_the_next_one() {
    let at = tempfile::tempdir().unwrap();
    let root = at.path().join("root");
    fs::create_dir(&root).unwrap();
    let mut strace = Command::new("strace");
    strace.args(["-f", "-qq", "-o", "/dev/null", "-P"]).arg(root.join(".lockstep/audit.jsonl"));
    strace.args(["-e", "trace=write", "-e", "inject=write:error=ENOSPC:when=1", lockstep(), "sftp-server", "--root"]);
    let mut server = Server::spawn(strace.arg(&root));
    assert_eq!(server.path(packet::MKDIR, "lost"), Status::Ok);
    drop(server);
    let mut server = Server::confined(&root);
    assert_eq!(server.path(packet::MKDIR, "next"), Status::Ok);
    drop(server);
    let lines = lines(&root);
    let actions: Vec<_> = lines.iter().map(|line| line["action"].as_str().unwrap()).collect();
    assert_eq!(actions, ["gap", "publish"], "{lines:#?}");
    assert_eq!(
        (&lines[0]["reason"], &lines[1]["path"]),
        (&"1 records before this one could not be written".into(), &"next".into())
    );
}

#[test]
fn s30_checks_are_in_the_log_of_what_was_checked() {
    let place = Place::new("");
    done(&place.push());
    done(&place.run(&["check", "target"]));
    let good = find(&place.lines(), "check", "").clone();
    assert_eq!((&good["result"], &good["generation"], &good["reason"]), (&"success".into(), &1.into(), &"good".into()));
    assert!(good["actor"].as_str().unwrap().starts_with(&format!("{}@", account())), "{good}");
    let manifest = fs::read(place.path("target/.lockstep/manifest")).unwrap();
    assert_eq!(good["sha256"], sha256(&manifest), "{good}");
    fs::write(place.path("target/weights.bin"), "damaged").unwrap();
    fs::remove_file(place.path("target/sub/labels.txt")).unwrap();
    ends(&place.run(&["check", "target"]), 1, &[]);
    let bad = find(&place.lines(), "check", "").clone();
    assert_eq!((&bad["result"], &bad["generation"]), (&"failure".into(), &1.into()), "{bad}");
    let reason = bad["reason"].as_str().unwrap();
    assert!(reason.starts_with("bad: ") && reason.contains("1 missing"), "{bad}");
    // A tree that nobody published to gets no log.
    done(&place.run(&["manifest", "create", "source", "-o", "list"]));
    done(&place.run(&["check", "--against", "list", "source"]));
    assert!(!place.path("source/.lockstep/audit.jsonl").exists());
    ends(&place.verify(&[]), 0, &[]);
}

#[test]
fn s13_a_daemon_tells_which_configuration_it_goes_by() {
    let job = "[[job]]\nname = 'j'\nsource = 'AT/source'\ntargets = ['AT/target']\n";
    let running = Running::start(job);
    let state = running.path("state");
    let config = running.path("config.toml");
    let told = || find(&lines(&state), "configuration", "").clone();
    let log = state.join(".lockstep/audit.jsonl");
    until("the first line", || fs::read_to_string(&log).is_ok_and(|text| text.contains("configuration")));
    let started = told();
    assert_eq!(started["sha256"], sha256(&fs::read(&config).unwrap()), "{started}");
    assert_eq!((&started["path"], &started["result"]), (&config.to_str().unwrap().into(), &"success".into()));
    running.configure(&format!("{job}nonsense = 1\n"));
    done(&running.jobs(&["reload"]));
    until("the refusal", || told()["result"] == "failure");
    assert!(told()["reason"].as_str().unwrap().contains("nonsense"), "{}", told());
    key(running.path("").as_path(), "signer");
    running.configure(&format!("{job}[audit]\nsigning_key = 'AT/signer'\n"));
    done(&running.jobs(&["reload"]));
    until("the new one", || told()["result"] == "success" && told()["sha256"] == sha256(&fs::read(&config).unwrap()));
    until("the signature", || lines(&state).last().unwrap()["action"] == "head");
    // What it publishes is signed from then on.
    fs::write(running.path("source/new"), "new").unwrap();
    let target = running.path("target");
    until("the run", || target.join("new").exists() && lines(&target).last().unwrap()["action"] == "head");
    let verified = Command::new(lockstep()).args(["audit", "verify"]).arg(&state).output().unwrap();
    ends(&verified, 0, &["unbroken"]);
}

#[test]
fn s13_lines_are_found_by_who_what_when_and_what_came_of_it() {
    let place = Place::new("signing_key = 'AT/signer'");
    done(&place.push());
    fs::write(place.path("target/weights.bin"), "damaged").unwrap();
    ends(&place.run(&["check", "target"]), 1, &[]);
    let show = |more: &[&str]| {
        let shown = place.run(&[&["audit", "show", "target", "--json"], more].concat());
        done(&shown);
        let text = String::from_utf8(shown.stdout).unwrap();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect::<Vec<Value>>()
    };
    let all = show(&[]);
    assert_eq!(show(&["--action", "publish"]).len(), 3, "{all:#?}");
    assert_eq!(show(&["--action", "publish", "--action", "head"]).len(), 5, "{all:#?}");
    assert_eq!(show(&["--result", "failure"]).len(), 1);
    assert_eq!(show(&["--path", "sub"]).len(), 2);
    assert_eq!(show(&["--actor", &account(), "--action", "check"]).len(), 1);
    assert_eq!(show(&["--actor", "nobody-of-this-name"]).len(), 0);
    assert_eq!(show(&["--actor", &fingerprint(&place.path("signer.pub"))]).len(), 2);
    assert_eq!(show(&["--since", "1h"]).len(), all.len());
    assert_eq!(show(&["--until", "1h"]).len(), 0);
    assert_eq!(show(&["--since", "2001-01-01", "--until", "2001-01-02T00:00:00Z"]).len(), 0);
    ends(&place.run(&["audit", "show", "target", "--since", "yesterday"]), 2, &["2026-01-31T06:59:02Z"]);
    ends(&place.run(&["audit", "show", "target", "--action", "publsh"]), 2, &["there is no such action"]);
    let words = text(&place.run(&["audit", "show", "target", "--action", "check"]));
    assert!(
        words.contains("Z check generation 1 ") && words.contains(" bad: ") && words.contains(" failed by "),
        "{words}"
    );
    // Who follows sees what is added.
    let mut follows = place.command(lockstep());
    let mut follows = follows.args(["audit", "show", "target", "--follow", "--action", "publish"]);
    follows = follows.stdout(fs::File::create(place.path("seen")).unwrap());
    let mut follows = follows.spawn().unwrap();
    let seen = || fs::read_to_string(place.path("seen")).unwrap().lines().count();
    until("what is there", || seen() == 3);
    place.write("weights.bin", b"more");
    done(&place.push());
    until("what is added", || seen() == 4);
    follows.kill().unwrap();
    follows.wait().unwrap();
}

/// The fields of a line of CEF by its rules: seven of the header, then `key=value`.
fn cef(line: &str) -> (Vec<String>, BTreeMap<String, String>) {
    let (mut header, mut field, mut characters) = (Vec::new(), String::new(), line.chars());
    while header.len() < 7 {
        match characters.next().expect("the header ends early") {
            '\\' => field.push(characters.next().unwrap()),
            '|' => header.push(std::mem::take(&mut field)),
            character => field.push(character),
        }
    }
    let rest: Vec<char> = characters.collect();
    // An equals sign without a backslash ends a key, which begins behind the last blank before it.
    let (mut keys, mut at) = (Vec::new(), 0);
    while at < rest.len() {
        match rest[at] {
            '\\' => at += 1,
            '=' => {
                let begin = rest[..at].iter().rposition(|&character| character == ' ').map_or(0, |blank| blank + 1);
                keys.push((begin, at));
            }
            _ => {}
        }
        at += 1;
    }
    let mut fields = BTreeMap::new();
    for (number, &(begin, equals)) in keys.iter().enumerate() {
        let end = keys.get(number + 1).map_or(rest.len(), |&(next, _)| next - 1);
        let (key, raw): (String, &[char]) = (rest[begin..equals].iter().collect(), &rest[equals + 1..end]);
        let (mut value, mut characters) = (String::new(), raw.iter());
        while let Some(&character) = characters.next() {
            match character {
                '\\' => match characters.next().unwrap() {
                    'n' => value.push('\n'),
                    'r' => value.push('\r'),
                    &other => value.push(other),
                },
                other => value.push(other),
            }
        }
        assert!(fields.insert(key.clone(), value).is_none(), "{key} twice in {line}");
    }
    (header, fields)
}

#[test]
fn s13_lines_are_handed_on_as_cef_as_a_table_and_as_they_are() {
    let place = Place::new("");
    let odd = "=HYPERLINK(\"x\"),a|b\\c d=e\n";
    place.write(odd, b"odd");
    done(&place.push());
    fs::set_permissions(place.path("source/weights.bin"), PermissionsExt::from_mode(0o600)).unwrap();
    done(&place.push());
    done(&place.run(&["push", "-q", "source", "second"]));
    let export =
        |format: &str, more: &[&str]| place.run(&[&["audit", "export", "--format", format, "target"], more].concat());
    let lines = place.lines();
    // As they are.
    let same = export("jsonl", &[]);
    done(&same);
    assert_eq!(same.stdout, fs::read(place.log()).unwrap());
    // As a table, by another program's rules.
    let table = export("csv", &["second"]);
    done(&table);
    fs::write(place.path("table.csv"), &table.stdout).unwrap();
    let script = "import csv, json, sys\nprint(json.dumps(list(csv.DictReader(open('table.csv', newline='')))))";
    let read = place.command("python3").args(["-c", script]).output().expect("python3 is not installed");
    done(&read);
    let rows: Vec<BTreeMap<String, String>> = serde_json::from_slice(&read.stdout).unwrap();
    assert_eq!(rows.len(), lines.len() + self::lines(&place.path("second")).len());
    let roots: std::collections::BTreeSet<&str> = rows.iter().map(|row| row["root"].as_str()).collect();
    assert_eq!(roots.len(), 2, "{roots:?}");
    for (row, line) in rows.iter().zip(&lines) {
        for (name, value) in line.as_object().unwrap().iter().filter(|(name, _)| *name != "previous") {
            let text = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
            let guarded = if text.starts_with('=') { format!("'{text}") } else { text };
            assert_eq!(row[name], guarded, "{name} of {line}");
        }
    }
    let text = String::from_utf8(table.stdout).unwrap();
    assert!(text.lines().count() == rows.len() + 1 && text.ends_with("\r\n"), "{text}");
    // For a collector of events.
    let events = export("cef", &["--since", "1d"]);
    done(&events);
    let events = String::from_utf8(events.stdout).unwrap();
    assert_eq!(events.lines().count(), lines.len());
    for (event, line) in events.lines().zip(&lines) {
        let (header, fields) = cef(event);
        assert_eq!(header[..3], ["CEF:0", "lockstep", "lockstep"], "{event}");
        assert_eq!(header[4], line["action"].as_str().unwrap());
        assert!(header[6].parse::<u8>().unwrap() <= 10, "{event}");
        assert_eq!(fields["externalId"], line["sequence"].to_string());
        assert_eq!(fields["suser"], line["actor"].as_str().unwrap());
        assert_eq!((fields["act"].as_str(), fields["outcome"].as_str()), (line["action"].as_str().unwrap(), "success"));
        assert_eq!((fields["cs1Label"].as_str(), fields["cs1"].rsplit('/').next()), ("Root", Some("target")));
        let time = chrono::DateTime::parse_from_rfc3339(line["time"].as_str().unwrap()).unwrap();
        assert_eq!(fields["rt"], time.timestamp_millis().to_string());
        for (key, name) in [
            ("filePath", "path"),
            ("fileHash", "sha256"),
            ("filePermission", "mode"),
            ("oldFilePermission", "mode_before"),
        ] {
            assert_eq!(fields.get(key).map(String::as_str), line.get(name).and_then(Value::as_str), "{key} of {event}");
        }
    }
    assert!(events.lines().any(|event| cef(event).1.get("fname").is_some_and(|name| name.starts_with("=HYPER"))));
    assert!(events.contains("oldFilePermission=0644"), "{events}");
    // One that was tampered with is said loudly.
    let whole = fs::read_to_string(place.log()).unwrap();
    fs::write(place.log(), whole.replacen("weights.bin", "weights.txt", 1)).unwrap();
    for format in ["cef", "csv", "jsonl"] {
        let exported = export(format, &["second"]);
        ends(&exported, 1, &["NOT VERIFIED: ", "it was edited", "proves nothing"]);
        assert!(String::from_utf8(exported.stdout).unwrap().contains("weights.txt"));
    }
    ends(&export("cef", &["source"]), 1, &["NOT VERIFIED: ", "has no audit log"]);
}

#[test]
fn h49_h50_mistakes_in_the_configuration_of_the_log_name_the_place_and_the_way_out() {
    let place = Place::new("");
    for (lines, words) in [
        ("rotate = 1", &["config.toml:2:1", "unknown key 'rotate'"][..]),
        ("keep = 3", &["'keep' counts rotated files", "'rotate_bytes' or 'rotate_days'"]),
        ("rotate_bytes = 10", &["'rotate_bytes' is 10", "4096"]),
        ("rotate_days = 0", &["config.toml:2"]),
        ("signing_key = 'key'", &["'signing_key' is 'key'", "must start with '/'"]),
        ("on_failure = 'ignore'", &["config.toml:2", "refuse"]),
        ("signing_key = 'AT/none'", &["the audit log's signing key", "No such file"]),
        ("signing_key = 'AT/open'", &["is open to others", "chmod 600"]),
        ("signing_key = 'AT/locked'", &["has a passphrase"]),
        ("signing_key = 'AT/signer.pub'", &["is not an OpenSSH private key", "ssh-keygen -t ed25519"]),
    ] {
        fs::copy(place.path("signer"), place.path("open")).unwrap();
        fs::set_permissions(place.path("open"), PermissionsExt::from_mode(0o644)).unwrap();
        fs::set_permissions(place.path("signer.pub"), PermissionsExt::from_mode(0o600)).unwrap();
        if !place.path("locked").exists() {
            keygen(place.at.path(), &["-t", "ed25519", "-N", "secret", "-f", "locked"]);
        }
        place.configure(lines);
        ends(&place.push(), 2, words);
        assert!(!place.path("target").exists(), "{lines}");
    }
}
