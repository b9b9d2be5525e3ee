//! Certificates of hosts and users, with OpenSSH's server and agent.

use std::fs;
use std::path::Path;
use std::process::Command;

use crate::kit::served::{self, Served, write};
use crate::kit::sshd::{Agent, Sshd};
use crate::kit::{account, done, ends, keygen, public};

/// An authority `ca`, a host certificate with these options of ssh-keygen, and one for `user` that is good.
fn certified(at: &Path, host_options: &[&str]) -> String {
    keygen(at, &["-t", "ed25519", "-N", "", "-f", "ca"]);
    keygen(at, &[&["-s", "ca", "-I", "the host"], host_options, &["host.pub"]].concat());
    keygen(at, &["-s", "ca", "-I", "the user", "-n", &account(), "-V", "-1m:+1h", "user.pub"]);
    fs::write(at.join("authorized"), "").unwrap();
    let show = |name: &str| at.join(name).display().to_string();
    format!("HostCertificate {}\nTrustedUserCAKeys {}", show("host-cert.pub"), show("ca.pub"))
}

const GOOD_HOST: &[&str] = &["-h", "-n", "127.0.0.1", "-V", "-1m:+1h"];

fn trust_authority(sshd: &Sshd) {
    let known = format!("@cert-authority [127.0.0.1]:{} {}\n", sshd.port, public(&sshd.path("ca.pub")));
    fs::write(sshd.path("known"), known).unwrap();
}

#[test]
fn s27_certificates_stand_for_keys_on_both_sides() {
    let sshd = Sshd::with(|at| certified(at, GOOD_HOST));
    trust_authority(&sshd);
    let port = sshd.port.to_string();
    let options = ["-P", &port, "--known-hosts", "known", "--identity", "user", "-F", "none"];
    done(&sshd.push(&options));
    assert!(sshd.log().contains("Accepted certificate ID \"the user\""), "{}", sshd.log());
    // The bare key is accepted nowhere.
    fs::rename(sshd.path("user-cert.pub"), sshd.path("elsewhere")).unwrap();
    ends(&sshd.push(&options), 3, &["not accepted"]);
    let named = [&options[..], &["-o", "CertificateFile=elsewhere"]].concat();
    done(&sshd.push(&named));
    // An RSA key signs for its certificate too, and not with SHA-1.
    keygen(sshd.at.path(), &["-t", "rsa", "-b", "3072", "-N", "", "-f", "rsa"]);
    keygen(sshd.at.path(), &["-s", "ca", "-I", "rsa user", "-n", &account(), "rsa.pub"]);
    done(&sshd.push(&["-P", &port, "--known-hosts", "known", "--identity", "rsa"]));
    assert!(sshd.log().contains("Accepted certificate ID \"rsa user\""), "{}", sshd.log());
}

#[test]
fn s27_the_agent_signs_for_certificates_and_named_keys_come_first() {
    let sshd = Sshd::with(|at| certified(at, GOOD_HOST) + "\nMaxAuthTries 2");
    trust_authority(&sshd);
    let agent = Agent::start(sshd.at.path());
    for number in 0..4 {
        let name = format!("other{number}");
        keygen(sshd.at.path(), &["-t", "ed25519", "-N", "", "-f", &name]);
        agent.add(&name);
    }
    // The agent has the key alone; the certificate is a file, and so is the public half that names the key.
    fs::rename(sshd.path("user-cert.pub"), sshd.path("elsewhere")).unwrap();
    agent.add("user");
    fs::remove_file(sshd.path("user")).unwrap();
    let port = sshd.port.to_string();
    let options = ["-P", &port, "--known-hosts", "known", "-o"];
    let push = |more: &[&str]| {
        let to = sshd.remote("arrived");
        let more = [&["push", ".", &to, "--exclude=*"], &options[..], more].concat();
        sshd.command().env("SSH_AUTH_SOCK", &agent.socket).args(more).output().unwrap()
    };
    ends(&push(&["CertificateFile=none"]), 3, &["ended the login"]);
    done(&push(&["CertificateFile=elsewhere", "--identity", "user.pub"]));
    done(&push(&["CertificateFile=elsewhere", "-o", "IdentitiesOnly=yes"]));
    ends(&push(&["IdentitiesOnly=yes", "--identity", "user.pub"]), 3, &["not accepted"]);
    // The agent has the certificate itself.
    fs::rename(sshd.path("elsewhere"), sshd.path("user-cert.pub")).unwrap();
    let alone = Agent::start(tempfile::tempdir_in(sshd.at.path()).unwrap().keep().as_path());
    drop(agent);
    keygen(sshd.at.path(), &["-t", "ed25519", "-N", "", "-f", "second"]);
    keygen(sshd.at.path(), &["-s", "ca", "-I", "second", "-n", &account(), "second.pub"]);
    let added = Command::new("ssh-add").arg("-q").arg(sshd.path("second")).env("SSH_AUTH_SOCK", &alone.socket).status();
    assert!(added.unwrap().success());
    let to = sshd.remote("arrived");
    let arguments = ["push", ".", &to, "--exclude=*", "-P", &port, "--known-hosts", "known"];
    done(&sshd.command().env("SSH_AUTH_SOCK", &alone.socket).args(arguments).output().unwrap());
    assert!(sshd.log().contains("Accepted certificate ID \"second\""), "{}", sshd.log());
}

#[test]
fn h55_host_certificates_that_are_not_good_are_refused_each_with_its_reason() {
    let cases: [(&[&str], &str); 6] = [
        (&["-h", "-n", "127.0.0.1", "-V", "-2h:-1h"], "it has expired"),
        (&["-h", "-n", "127.0.0.1", "-V", "+1h:+2h"], "not valid yet"),
        (&["-h", "-n", "elsewhere", "-V", "-1m:+1h"], "it is for elsewhere, not for 127.0.0.1"),
        (&["-h", "-V", "-1m:+1h"], "it is for no host at all"),
        (&["-n", "127.0.0.1", "-V", "-1m:+1h"], "user's certificate, not a host's"),
        (&["-h", "-n", "127.0.0.1", "-O", "critical:odd@example.org=x"], "critical option 'odd@example.org'"),
    ];
    for (options, reason) in cases {
        let sshd = Sshd::with(|at| certified(at, options));
        trust_authority(&sshd);
        let port = sshd.port.to_string();
        let output = sshd.push(&["-P", &port, "--known-hosts", "known", "--identity", "user"]);
        ends(&output, 3, &["HOST CERTIFICATE REFUSED", reason]);
        assert!(!sshd.log().contains("Accepted"), "{}", sshd.log());
    }
}

#[test]
fn h55_an_authority_that_is_not_this_hosts_or_is_revoked_counts_for_nothing() {
    let sshd = Sshd::with(|at| certified(at, GOOD_HOST));
    let port = sshd.port.to_string();
    let push = |known: String| {
        fs::write(sshd.path("known"), known).unwrap();
        sshd.push(&["-P", &port, "--known-hosts", "known", "--identity", "user"])
    };
    let (ca, host) = (public(&sshd.path("ca.pub")), public(&sshd.path("host.pub")));
    let other = public(&sshd.path("user.pub"));
    done(&push(format!("@cert-authority * {ca}\n")));
    done(&push(format!("@cert-authority 127.0.0.* {ca}\n")));
    ends(&push(format!("@cert-authority *.example.org {ca}\n")), 3, &["unknown host key"]);
    ends(&push(format!("@cert-authority * {other}\n")), 3, &["unknown host key", "no authority here"]);
    ends(&push(format!("@cert-authority * {ca}\n@revoked * {ca}\n")), 3, &["REVOKED", "known:2"]);
    ends(&push(format!("@cert-authority * {ca}\n@revoked * {host}\n")), 3, &["REVOKED", "known:2"]);
    // The bare key of a certificate by another authority may be on file.
    done(&push(format!("@cert-authority * {other}\n[127.0.0.1]:{port} {host}\n")));
}

#[test]
fn user_certificates_that_cannot_be_good_are_told() {
    let sshd = Sshd::with(|at| certified(at, GOOD_HOST));
    trust_authority(&sshd);
    let port = sshd.port.to_string();
    for (options, reason) in [
        (&["-n", "x", "-V", "-2h:-1h"][..], "the certificate has expired"),
        (&["-n", "x", "-V", "+1h:+2h"], "not valid yet"),
        (&["-h", "-n", "x"], "a host's certificate"),
    ] {
        keygen(sshd.at.path(), &[&["-s", "ca", "-I", "i"], options, &["user.pub"]].concat());
        ends(&sshd.push(&["-P", &port, "--known-hosts", "known", "--identity", "user"]), 3, &[reason, "user-cert.pub"]);
    }
}

#[test]
fn s27_both_ends_ours_and_neither_knows_the_others_key() {
    let served = Served::with(
        &["sync"],
        |at| {
            keygen(at, &["-t", "ed25519", "-N", "", "-f", "ca"]);
            keygen(at, &["-t", "ed25519", "-N", "", "-f", "host"]);
            keygen(at, &[&["-s", "ca", "-I", "the host"], GOOD_HOST, &["host.pub"]].concat());
            keygen(at, &["-s", "ca", "-I", "the user", "-n", "sync", "sync.key.pub"]);
            fs::write(at.join("sync.keys"), format!("cert-authority {}\n", public(&at.join("ca.pub")))).unwrap();
            format!("host_certificate = '{}'", at.join("host-cert.pub").display())
        },
        "",
        |at| served::user(at, "sync", ""),
    );
    let authority = public(&served.path("ca.pub"));
    write(&served.path("known"), &format!("@cert-authority [127.0.0.*]:* {authority}\n"));
    fs::create_dir(served.path("tree")).unwrap();
    fs::write(served.path("tree/file"), "content").unwrap();
    let push = |more: &[&str]| {
        Command::new(env!("CARGO_BIN_EXE_lockstep"))
            .current_dir(served.at())
            .args(["push", "tree", "sync@127.0.0.1:/copy", "-F", "none", "--identity", "sync.key"])
            .args(["--known-hosts", "known", "-P", &served.port.to_string()])
            .args(more)
            .env("XDG_STATE_HOME", served.path("state"))
            .env_remove("SSH_AUTH_SOCK")
            .output()
            .unwrap()
    };
    done(&push(&[]));
    assert!(served.path("sync/copy/file").exists());
    ends(&push(&["-o", "HostKeyAlias=elsewhere"]), 3, &["unknown host key"]);
    fs::remove_file(served.path("sync.key-cert.pub")).unwrap();
    ends(&push(&[]), 3, &["no key was accepted"]);
}
