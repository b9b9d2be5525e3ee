//! What is agreed to with other implementations of SSH, and what they say of ours.

use std::process::{Command, Output};

use serde_json::Value;

use crate::kit::ends;
use crate::kit::python::python;
use crate::kit::served::Served;
use crate::kit::sshd::Sshd;

/// What may be said against the listener, with what docs/security.md says to it.
const EXPLAINED: [(&str, &str); 2] = [
    ("curve25519-sha256", "does not provide protection against post-quantum attacks"),
    ("curve25519-sha256@libssh.org", "does not provide protection against post-quantum attacks"),
];

#[test]
fn h57_ssh_audit_finds_nothing_against_the_listener_that_is_not_explained() {
    let served = Served::start("", "");
    let port = served.port.to_string();
    let tool = ["-m", "ssh_audit.ssh_audit", "-p", &port, "--skip-rate-test", "-jj", "127.0.0.1"];
    let output = python("ssh_audit").args(tool).output().unwrap();
    let found: Value = serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {output:?}"));
    let (mut seen, mut against) = (0, Vec::new());
    for kind in ["kex", "key", "enc", "mac"] {
        for one in found[kind].as_array().unwrap() {
            seen += 1;
            let name = one["algorithm"].as_str().unwrap();
            for level in ["fail", "warn"] {
                for said in one["notes"][level].as_array().into_iter().flatten() {
                    let said = said.as_str().unwrap();
                    if !EXPLAINED.contains(&(name, said)) {
                        against.push(format!("{name}: {level}: {said}"));
                    }
                }
            }
        }
    }
    assert!(seen >= 8, "{found}");
    assert_eq!(against, Vec::<String>::new());
    assert_eq!(found["cves"], serde_json::json!([]), "{found}");
    assert_eq!(found["banner"]["software"], concat!("lockstep_", env!("CARGO_PKG_VERSION")), "{found}");
    assert_eq!(found["kex"][0]["algorithm"], "mlkem768x25519-sha256");
    let security = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/docs/security.md")).unwrap();
    for (name, _) in EXPLAINED {
        assert!(security.contains(name), "{name} is not explained");
    }
}

#[test]
fn the_doctor_says_what_a_login_would_agree_to_and_trusts_nobody() {
    let served = Served::start("", "");
    let at = served.at();
    let run = |arguments: &[&str]| -> Output {
        Command::new(crate::kit::area::lockstep()).args(arguments).current_dir(at).env("HOME", at).output().unwrap()
    };
    let doctor = |port: u16, known: &str, more: &[&str]| {
        let port = port.to_string();
        let base = [
            "doctor",
            "--ssh",
            "sync@127.0.0.1",
            "-P",
            &port,
            "-F",
            "none",
            "--known-hosts",
            known,
            "--identity",
            "sync.key",
        ];
        run(&[&base[..], more].concat())
    };
    ends(
        &doctor(served.port, "known", &[]),
        0,
        &[
            "host: SSH-2.0-lockstep",
            "key exchange: mlkem768x25519-sha256",
            "aes128-gcm@openssh.com",
            "is known",
            "nothing is wrong",
        ],
    );
    ends(&doctor(served.port, "none", &[]), 0, &["is not known here", "keys scan-host --add", "2 warnings"]);
    ends(&doctor(served.port, "none", &["--strict"]), 4, &["2 warnings"]);
    assert!(!at.join("none").exists(), "the host was trusted");
    assert!(!served.log().contains("logged in"), "{}", served.log());
    ends(&run(&["doctor", "-P", "22"]), 2, &["-P says how to reach the host of --ssh"]);
    ends(&doctor(1, "known", &[]), 75, &["cannot connect"]);

    let old = Sshd::only(
        "KexAlgorithms diffie-hellman-group14-sha1,curve25519-sha256\nCiphers aes128-cbc,aes128-gcm@openssh.com\nMACs hmac-sha1",
    );
    let output = doctor(old.port, "none", &[]);
    let wanted = [
        "key exchange: curve25519-sha256: who records the connection today",
        "weak algorithms: with other clients it would agree to diffie-hellman-group14-sha1, aes128-cbc, hmac-sha1",
    ];
    ends(&output, 0, &wanted);
    drop(old);
    let bad = Sshd::only("KexAlgorithms diffie-hellman-group14-sha256\nCiphers aes128-ctr");
    let wanted = [
        "error    key exchange: it has none that is strong enough",
        "error    cipher to it",
        "KexAlgorithms of its sshd_config",
    ];
    ends(&doctor(bad.port, "none", &[]), 4, &wanted);
}
