//! An authority by lockstep's own commands: certificates that OpenSSH takes, and revocations that it honours.

use std::fs;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use crate::kit::served::{Served, user, write};
use crate::kit::sshd::{Agent, Sshd};
use crate::kit::{account, done, ends, keygen, text};

fn keys(at: &Path, arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_lockstep"))
        .current_dir(at)
        .arg("keys")
        .args(arguments)
        .env("HOME", at.join("home"))
        .env_remove("SSH_AUTH_SOCK")
        .env_remove("LOCKSTEP_CONFIG")
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

fn printed(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

/// What ssh-keygen says of a file.
fn told(at: &Path, arguments: &[&str]) -> String {
    let output = Command::new("ssh-keygen").current_dir(at).args(arguments).output().unwrap();
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

/// A server that trusts what `keys certify` prints for the key `alice`, and has an empty list of what is revoked.
fn served(certify: &[&str]) -> Served {
    Served::with(
        &["sync", "alice"],
        |at| {
            keygen(at, &["-t", "ed25519", "-N", "", "-f", "ca"]);
            let certified = keys(at, &[&["certify", "--ca", "ca"], certify, &["alice.key.pub"]].concat());
            done(&certified);
            write(&at.join("sync.keys"), &printed(&certified));
            write(&at.join("revoked"), "");
            format!("revoked_keys = '{}'", at.join("revoked").display())
        },
        "",
        |at| user(at, "sync", ""),
    )
}

#[test]
fn s27_a_certificate_of_ours_lets_in_where_its_authority_is_trusted() {
    let served = served(&["--principal", "sync,ops", "--from", "127.0.0.0/8", "--valid", "2d", "--serial", "42"]);
    let shown = told(served.at(), &["-Lf", "alice.key-cert.pub"]);
    for part in [
        "user certificate",
        "Key ID: \"alice\"",
        "Serial: 42",
        "sync",
        "ops",
        "source-address 127.0.0.0/8",
        "Extensions: (none)",
    ] {
        assert!(shown.contains(part), "{part}: {shown}");
    }
    done(&served.sftp("sync", "alice", "ls\n"));
    served.wait_for("certificate 'alice' (serial 42) of SHA256:");
    // A new one takes the place of the old one; what is something else stays.
    let again = keys(served.at(), &["certify", "--ca", "ca", "--principal", "sync", "alice.key.pub"]);
    ends(&again, 0, &["good from ", "user certificate 'alice'", "authorized_keys"]);
    assert!(!told(served.at(), &["-Lf", "alice.key-cert.pub"]).contains("Serial: 42"));
    fs::copy(served.path("sync.key.pub"), served.path("alice.key-cert.pub")).unwrap();
    let kept = keys(served.at(), &["certify", "--ca", "ca", "--principal", "sync", "alice.key.pub"]);
    ends(&kept, 2, &["alice.key-cert.pub", "move it away"]);
}

#[test]
fn s27_sshd_takes_a_certificate_that_the_agent_signed() {
    let sshd = Sshd::with(|at| {
        keygen(at, &["-t", "rsa", "-b", "3072", "-N", "", "-f", "ca"]);
        fs::write(at.join("authorized"), "").unwrap();
        format!("TrustedUserCAKeys {0}/ca.pub\nRevokedKeys {0}/krl", at.display())
    });
    let at = sshd.at.path();
    let agent = Agent::start(at);
    agent.add("ca");
    fs::rename(at.join("ca"), at.join("elsewhere")).unwrap();
    // Without the agent there is no other half.
    let alone = keys(at, &["certify", "--ca", "ca.pub", "--principal", &account(), "user.pub"]);
    ends(&alone, 3, &["--ca", "is a public key", "SSH_AUTH_SOCK"]);
    assert!(!at.join("user-cert.pub").exists());
    let certify = ["keys", "certify", "--ca", "ca.pub", "--principal", &account(), "--id", "the user", "user.pub"];
    let certified =
        sshd.command().args(certify).env("SSH_AUTH_SOCK", &agent.socket).stdin(Stdio::null()).output().unwrap();
    done(&certified);
    fs::write(at.join("krl"), "").unwrap();
    let port = sshd.port.to_string();
    let push = || sshd.push(&["-P", &port, "--identity", "user", "--known-hosts", "known", "-F", "none"]);
    done(&push());
    assert!(sshd.log().contains("Accepted certificate ID \"the user\""), "{}", sshd.log());
    // What we revoke, sshd refuses.
    done(&keys(at, &["revoke", "--list", "krl", "user-cert.pub"]));
    ends(&push(), 3, &["not accepted"]);
    assert!(sshd.log().contains("revoked by file"), "{}", sshd.log());
}

#[test]
fn s27_a_hosts_certificate_of_ours_is_what_clients_know_a_server_by() {
    let certified = |at: &Path| {
        keygen(at, &["-t", "ed25519", "-N", "", "-f", "ca"]);
        keygen(at, &["-t", "ed25519", "-N", "", "-C", "gpu02", "-f", "host"]);
        keys(at, &["certify", "--ca", "ca", "--host", "--principal", "127.0.0.1,gpu02", "host"])
    };
    let served = Served::with(
        &["sync"],
        |at| {
            let made = certified(at);
            done(&made);
            write(&at.join("known.ca"), &printed(&made));
            format!("host_certificate = '{}/host-cert.pub'", at.display())
        },
        "",
        |at| user(at, "sync", ""),
    );
    fs::copy(served.path("known.ca"), served.path("known")).unwrap();
    let line = fs::read_to_string(served.path("known")).unwrap();
    assert!(line.starts_with("@cert-authority 127.0.0.1,gpu02 ssh-ed25519 "), "{line}");
    done(&served.sftp("sync", "sync", "ls\n"));
    fs::create_dir(served.path("tree")).unwrap();
    fs::write(served.path("tree/file"), "x").unwrap();
    let push = || served.lockstep(&["push", "tree", "sync@127.0.0.1:/arrived"], "sync");
    done(&push());
    // The authority is taken from it; the one before gets no further.
    let revoke = || keys(served.at(), &["revoke", "--host", "--known-hosts", "known", "ca.pub"]);
    ends(&revoke(), 0, &["revoked ssh-ed25519 SHA256:", "for all hosts"]);
    ends(&push(), 3, &["revoke"]);
    assert!(!served.sftp("sync", "sync", "ls\n").status.success());
    let before = fs::read_to_string(served.path("known")).unwrap();
    ends(&revoke(), 0, &["revoked already"]);
    assert_eq!(fs::read_to_string(served.path("known")).unwrap(), before);
}

#[test]
fn h56_what_is_revoked_by_us_is_refused_by_all_and_ends_what_is_open() {
    let served = served(&["--principal", "sync", "--serial", "7"]);
    let at = served.at();
    let mut held = served.hold("sync", &["-i", "alice.key", "-o", "CertificateFile=alice.key-cert.pub"]);
    let mut held_at = |part: &str| {
        let words = held.ended();
        assert!(words.contains(part), "{words}");
    };
    done(&served.sftp("sync", "alice", "ls\n"));
    // Another number, another authority's: nothing to this one.
    keygen(at, &["-t", "ed25519", "-N", "", "-f", "other"]);
    let config = served.path("config.toml").display().to_string();
    let revoke = |what: &[&str]| keys(at, &[&["revoke", "--config", &config], what].concat());
    for what in [&["--serial", "8-9", "--authority", "ca.pub"][..], &["--serial", "7", "--authority", "other.pub"]] {
        ends(&revoke(what), 0, &["revoked the certificate", "in '"]);
        done(&served.sftp("sync", "alice", "ls\n"));
        assert!(!told(at, &["-Qf", "revoked", "alice.key-cert.pub"]).contains("REVOKED"));
    }
    ends(&revoke(&["alice.key-cert.pub"]), 0, &["revoked the certificate with the serial number 7"]);
    assert!(!served.sftp("sync", "alice", "ls\n").status.success());
    served.wait_for("the certificate with the serial number 7 is revoked");
    held_at("the certificate with the serial number 7 is revoked");
    served.wait_for("keys have changed");
    assert!(told(at, &["-Qf", "revoked", "alice.key-cert.pub"]).contains("REVOKED"));
    assert!(!told(at, &["-Qf", "revoked", "alice.key.pub"]).contains("REVOKED"));
    ends(&revoke(&["alice.key-cert.pub"]), 0, &["revoked already"]);
    // By name, by key, by fingerprint.
    ends(&revoke(&["--id", "bob"]), 0, &["key id 'bob'"]);
    ends(&revoke(&["alice.key.pub"]), 0, &["revoked ssh-ed25519 SHA256:"]);
    assert!(told(at, &["-Qf", "revoked", "alice.key.pub"]).contains("REVOKED"));
    let print = told(at, &["-lf", "sync.key.pub"]).split(' ').nth(1).unwrap().to_owned();
    ends(&revoke(&[&print]), 0, &["revoked SHA256:"]);
    assert!(told(at, &["-Qf", "revoked", "sync.key.pub"]).contains("REVOKED"));
    let listed = told(at, &["-Ql", "-f", "revoked"]);
    assert!(listed.contains("serial: 7") && listed.contains("id: bob"), "{listed}");
}

#[test]
fn s27_what_cannot_be_certified_or_revoked_says_why_and_changes_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let at = directory.path();
    keygen(at, &["-t", "ed25519", "-N", "", "-f", "ca"]);
    keygen(at, &["-t", "ed25519", "-N", "", "-C", "", "-f", "bare"]);
    keygen(at, &["-t", "rsa", "-b", "2048", "-N", "", "-f", "weak"]);
    keygen(at, &["-t", "ed25519", "-N", "", "-C", "alice", "-f", "alice"]);
    done(&keys(at, &["certify", "--ca", "ca", "--principal", "sync", "alice.pub"]));
    for (arguments, part) in [
        (&["--principal", "sync", "bare.pub"][..], "no comment"),
        (&["--principal", "sync", "weak.pub"], "2048 bits is too weak"),
        (&["--principal", "sync", "alice-cert.pub"], "it is a certificate"),
        (&["--principal", "sync", "ca.pub"], "own key"),
        (&["--principal", "sync", "missing.pub"], "missing.pub"),
        (&["--principal", "a b", "alice.pub"], "cannot be a name"),
        (&["--principal", "sync", "--from", "10.*", "alice.pub"], "no wildcards"),
        (&["--principal", "sync", "--from", "gpu02", "alice.pub"], "names of hosts are not looked up"),
        (&["--principal", "sync", "--valid", "1y", "alice.pub"], "12h, 90d or 52w"),
        (&["--principal", "sync", "--serial", "7", "alice.pub", "bare.pub"], "for one key"),
        (&["alice.pub"], "--principal"),
    ] {
        let output = keys(at, &[&["certify", "--ca", "ca"], arguments].concat());
        ends(&output, 2, &[part]);
    }
    let made: Vec<_> = fs::read_dir(at).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert!(made.iter().filter(|name| name.to_string_lossy().ends_with("-cert.pub")).count() == 1, "{made:?}");
    write(
        &at.join("config.toml"),
        "[serve]\nlisten = '127.0.0.1:0'\nhost_key = '/h'\n[[serve.user]]\nname = 'u'\nroot = '/'\nauthorized_keys = '/k'\n",
    );
    for (arguments, code, part) in [
        (&["--config", "config.toml", "alice.pub"][..], 2, "set revoked_keys"),
        (&["--list", "list", "SHA256:short"], 2, "not a fingerprint"),
        (&["--list", "list", "missing"], 2, "missing"),
        (&["--list", "list", "--serial", "7"], 2, "--authority"),
        (&["--list", "list", "--serial", "9-7", "--authority", "ca.pub"], 2, "two as 5-9"),
        (&["--list", "list"], 2, "required"),
        (&["--list", "gone/list", "alice.pub"], 3, "gone/list"),
    ] {
        ends(&keys(at, &[&["revoke"], arguments].concat()), code, &[part]);
    }
    assert!(!at.join("list").exists());
    // A list that others may write is not added to.
    fs::write(at.join("list"), "").unwrap();
    fs::set_permissions(at.join("list"), std::os::unix::fs::PermissionsExt::from_mode(0o666)).unwrap();
    let output = keys(at, &["revoke", "--list", "list", "alice.pub"]);
    ends(&output, 3, &["written by others"]);
    assert_eq!(fs::read(at.join("list")).unwrap(), b"", "{}", text(&output));
}
