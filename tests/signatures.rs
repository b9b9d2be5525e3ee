//! Signatures of manifests, with OpenSSH's ssh-keygen and ssh-agent on the other side.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use tempfile::TempDir;

use crate::kit::sshd::Agent;
use crate::kit::{done, ends, key, keygen, public, text};

const NAMESPACE: &str = "manifest@lockstep.internal";
const KINDS: [&[&str]; 3] = [&["ed25519"], &["ecdsa", "-b", "256"], &["rsa", "-b", "3072"]];

/// A data set that was published, and keys.
struct Signed {
    at: TempDir,
}

impl Signed {
    fn new() -> Signed {
        let at = tempfile::tempdir().unwrap();
        fs::create_dir(at.path().join("data")).unwrap();
        fs::write(at.path().join("data/weights"), "0123456789").unwrap();
        let made = Signed { at };
        done(&made.run(&["push", "data", "there"]));
        key(made.at.path(), "alice");
        made.allow(&format!("alice@x {}\n", public(&made.path("alice.pub"))));
        made
    }

    fn path(&self, name: &str) -> PathBuf {
        self.at.path().join(name)
    }

    fn allow(&self, list: &str) {
        fs::write(self.path("allowed"), list).unwrap();
    }

    fn command(&self, program: impl AsRef<std::ffi::OsStr>, arguments: &[&str]) -> Command {
        let mut command = Command::new("setsid");
        // Without a terminal nothing can be asked for.
        command.arg("-w").arg(program.as_ref()).args(arguments).current_dir(self.at.path()).stdin(Stdio::null());
        command.env("HOME", self.at.path()).env("TZ", "Europe/Berlin");
        command.env_remove("SSH_AUTH_SOCK").env_remove("LOCKSTEP_CONFIG");
        command
    }

    fn run(&self, arguments: &[&str]) -> Output {
        self.command(env!("CARGO_BIN_EXE_lockstep"), arguments).output().unwrap()
    }

    fn sign(&self, key: &str) {
        done(&self.run(&["manifest", "sign", "--key", key, "there"]));
    }

    fn verify(&self, more: &[&str]) -> Output {
        let check = ["manifest", "verify", "--require-signature", "--allowed-signers", "allowed", "there"];
        self.run(&[&check[..], more].concat())
    }

    /// Refused for want of trust, and before anything was compared.
    #[track_caller]
    fn refuses(&self, more: &[&str], words: &[&str]) {
        let output = self.verify(more);
        ends(&output, 3, words);
        assert_eq!(String::from_utf8_lossy(&output.stdout), "");
    }

    fn keygen_sign(&self, key: &str, namespace: &str) {
        let signature = self.path("there/.lockstep/manifest.sig");
        let _ = fs::remove_file(&signature);
        let sign = ["-Y", "sign", "-q", "-f", key, "-n", namespace, "there/.lockstep/manifest"];
        done(&self.command("ssh-keygen", &sign).output().unwrap());
        assert!(signature.exists());
    }

    fn keygen_verify(&self, principal: &str, namespace: &str) -> Output {
        let verify = ["-Y", "verify", "-f", "allowed", "-I", principal, "-n", namespace, "-s"];
        let mut command = self.command("ssh-keygen", &[&verify[..], &["there/.lockstep/manifest.sig"]].concat());
        command.stdin(fs::File::open(self.path("there/.lockstep/manifest")).unwrap()).output().unwrap()
    }
}

#[test]
fn what_lockstep_signs_ssh_keygen_accepts_and_the_reverse() {
    let data = Signed::new();
    let manifest = fs::read(data.path("there/.lockstep/manifest")).unwrap();
    for (number, kind) in KINDS.iter().enumerate() {
        let name = format!("key{number}");
        keygen(data.at.path(), &[&["-N", "", "-f", &name, "-t"], *kind].concat());
        data.allow(&format!(
            "# the team\n*@x,!eve@x namespaces=\"{NAMESPACE}\" {}\n",
            public(&data.path(&format!("{name}.pub")))
        ));
        let fingerprint = Command::new("ssh-keygen").arg("-lf").arg(data.path(&name)).output().unwrap();
        let fingerprint = String::from_utf8(fingerprint.stdout).unwrap().split(' ').nth(1).unwrap().to_owned();

        ends(&data.run(&["manifest", "sign", "--key", &name, "there"]), 0, &["generation 1, 1 path", &fingerprint]);
        ends(&data.keygen_verify("bob@x", NAMESPACE), 0, &["Good", "bob@x", &fingerprint]);
        // It is not taken for what it was not made for.
        ends(&data.keygen_verify("bob@x", "file"), 255, &[]);
        ends(&data.verify(&[]), 0, &["signed by *@x,!eve@x", &fingerprint, "line 2", "1 path verified"]);

        data.keygen_sign(&name, NAMESPACE);
        ends(&data.verify(&["--signer", "bob@x"]), 0, &["signed by bob@x", &fingerprint, "1 path verified"]);
        data.refuses(&["--signer", "eve@x"], &["not of 'eve@x'"]);
    }
    assert_eq!(fs::read(data.path("there/.lockstep/manifest")).unwrap(), manifest);
    // With Ed25519 there is one way to sign: the files are the same.
    data.keygen_sign("key0", NAMESPACE);
    let theirs = fs::read_to_string(data.path("there/.lockstep/manifest.sig")).unwrap();
    ends(&data.run(&["manifest", "sign", "--key", "key0", "--output", "-", "there"]), 0, &[&theirs]);
}

#[test]
fn h26_a_valid_signature_over_other_data_or_of_another_namespace_is_refused() {
    let data = Signed::new();
    // What lies there is damaged too: nobody may get as far as to notice.
    fs::write(data.path("there/weights"), "9876543210").unwrap();
    data.refuses(&[], &["is not signed", "there is none", "lockstep manifest sign"]);

    data.keygen_sign("alice", "file");
    data.refuses(&[], &["in the namespace 'file'"]);
    data.keygen_sign("alice", "manifest@lockstep.internal\u{1b}[2J");
    data.refuses(&[], &["in the namespace 'manifest@lockstep.internal\\x1b[2J'"]);

    // Another data set's, by the same signer.
    fs::write(data.path("data/more"), "x").unwrap();
    done(&data.run(&["push", "data", "other"]));
    done(&data.run(&["manifest", "sign", "--key", "alice", "other"]));
    let signature = data.path("there/.lockstep/manifest.sig");
    fs::copy(data.path("other/.lockstep/manifest.sig"), &signature).unwrap();
    data.refuses(&[], &["signed other data, or what was signed has changed since"]);

    // The right one; then another list under it, whose own digest is good.
    data.sign("alice");
    ends(&data.verify(&[]), 1, &["weights: differs"]);
    let manifest = data.path("there/.lockstep/manifest");
    let good = fs::read(&manifest).unwrap();
    fs::copy(data.path("other/.lockstep/manifest"), &manifest).unwrap();
    data.refuses(&[], &["signed other data"]);
    fs::write(&manifest, good).unwrap();

    // What is no signature, or was changed.
    let text = fs::read_to_string(&signature).unwrap();
    fs::write(&signature, "").unwrap();
    data.refuses(&[], &["not an SSH signature"]);
    fs::write(&signature, &text[..text.len() / 2]).unwrap();
    data.refuses(&[], &["not an SSH signature"]);
    let lines: Vec<&str> = text.lines().collect();
    let last = lines[lines.len() - 2];
    let swapped = if last.starts_with('A') { "B" } else { "A" };
    fs::write(&signature, text.replace(last, &format!("{swapped}{}", &last[1..]))).unwrap();
    data.refuses(&[], &["does not count"]);
    // A link that somebody planted is not followed.
    fs::write(data.path("there/.lockstep/elsewhere"), &text).unwrap();
    fs::remove_file(&signature).unwrap();
    std::os::unix::fs::symlink("elsewhere", &signature).unwrap();
    data.refuses(&[], &["is not signed"]);
    ends(&data.verify(&["--signature", "there/.lockstep/elsewhere"]), 1, &["weights: differs"]);
    // Signing puts a file in its place.
    data.sign("alice");
    assert!(signature.symlink_metadata().unwrap().is_file());
    assert!(fs::read_to_string(data.path("there/.lockstep/elsewhere")).unwrap() == text);
}

#[test]
fn h25_an_older_manifest_played_again_is_refused() {
    let data = Signed::new();
    data.sign("alice");
    for file in ["manifest", "manifest.sig"] {
        fs::copy(data.path(&format!("there/.lockstep/{file}")), data.path(file)).unwrap();
    }
    fs::write(data.path("data/weights"), "a newer one").unwrap();
    done(&data.run(&["push", "data", "there"]));
    data.refuses(&[], &["changed since", "have it signed again"]);
    data.sign("alice");
    ends(&data.verify(&["--min-generation", "2"]), 0, &["1 path verified"]);
    ends(&data.verify(&["--min-generation", "3"]), 1, &["of generation 2, older than 3"]);

    // All of the old: data, manifest, signature.
    fs::write(data.path("there/weights"), "0123456789").unwrap();
    for file in ["manifest", "manifest.sig"] {
        fs::copy(data.path(file), data.path(&format!("there/.lockstep/{file}"))).unwrap();
    }
    ends(&data.verify(&[]), 0, &["1 path verified"]);
    let replayed = data.verify(&["--min-generation", "2"]);
    ends(&replayed, 1, &["of generation 1, older than 2"]);
    assert_eq!(String::from_utf8_lossy(&replayed.stdout), "");
    // Without a signature as well.
    ends(&data.run(&["manifest", "verify", "--min-generation", "2", "there"]), 1, &["older than 2"]);
}

/// One list after another: who is refused, and that ssh-keygen is of the same opinion.
#[test]
fn the_list_of_signers_is_read_as_ssh_keygen_reads_it() {
    let data = Signed::new();
    key(data.at.path(), "bob");
    data.sign("alice");
    let (alice, bob) = (public(&data.path("alice.pub")), public(&data.path("bob.pub")));
    let cases: [(&str, Option<&str>); 24] = [
        ("alice@x ALICE", None),
        ("bob@x BOB\nalice@x ALICE a comment\n", None),
        ("\"bob@x,alice@x\" ALICE", None),
        ("alic?@* ALICE", None),
        ("alice@x BOB", Some("is not listed")),
        ("", Some("is not listed")),
        ("# alice@x ALICE", Some("is not listed")),
        ("bob@x ALICE", Some("line 1: the key is that of 'bob@x', not of 'alice@x'")),
        ("!alice@x,* ALICE", Some("not of 'alice@x'")),
        ("alice@x namespaces=\"file,manifest@*\" ALICE", None),
        ("alice@x NameSpaces=\"*,!file\" ALICE", None),
        ("alice@x namespaces=\"file\" ALICE", Some("counts in the namespaces 'file' alone")),
        ("alice@x namespaces=\"!manifest@*,*\" ALICE", Some("counts in the namespaces")),
        ("alice@x valid-after=\"20200101\" ALICE", None),
        ("alice@x valid-after=\"20990101Z\" ALICE", Some("not valid yet: valid-after 20990101Z")),
        ("alice@x valid-before=\"209901010000\" ALICE", None),
        ("alice@x valid-before=\"20200101000000Z\" ALICE", Some("no longer valid: valid-before 20200101000000Z")),
        ("alice@x valid-after=\"20200101Z\",valid-before=\"20990101Z\",namespaces=\"*\" ALICE", None),
        ("alice@x valid-after=\"20990101Z\",valid-before=\"20200101Z\" ALICE", Some("valid-before is not after")),
        ("alice@x cert-authority ALICE", Some("listed as an authority of certificates")),
        ("alice@x nonsense ALICE", Some("the option nonsense is not understood")),
        ("alice@x namespaces=\"* ALICE", Some("is not listed (not understood: line 1")),
        ("nonsense\nalice@x ALICE", None),
        ("alice@x namespaces=\"file\" ALICE\nalice@x ALICE", None),
    ];
    for (list, refusal) in cases {
        data.allow(&list.replace("ALICE", &alice).replace("BOB", &bob));
        let theirs = data.keygen_verify("alice@x", NAMESPACE);
        assert_eq!(theirs.status.success(), refusal.is_none(), "{list}: {}", text(&theirs));
        match refusal {
            None => ends(&data.verify(&["--signer", "alice@x"]), 0, &["signed by alice@x with SHA256:"]),
            Some(reason) => data.refuses(&["--signer", "alice@x"], &[reason]),
        }
    }
    // Who may write the list decides; others must not.
    data.allow(&format!("alice@x {alice}"));
    fs::set_permissions(data.path("allowed"), fs::Permissions::from_mode(0o664)).unwrap();
    data.refuses(&[], &["others may write this list (mode 0664)", "chmod go-w"]);
}

#[test]
fn certificates_sign_for_their_principals_while_they_are_valid() {
    let data = Signed::new();
    key(data.at.path(), "ca");
    let list = format!("*@x cert-authority {}\n", public(&data.path("ca.pub")));
    let agent = Agent::start(data.at.path());
    // ssh-keygen signs as a certificate with a key that lies beside it.
    let certify = |options: &[&str]| {
        let _ = fs::remove_file(data.path("alice-cert.pub"));
        keygen(data.at.path(), &[&["-s", "ca", "-I", "id"], options, &["alice.pub"]].concat());
        agent.add("alice");
        let _ = fs::remove_file(data.path("there/.lockstep/manifest.sig"));
        let sign = ["-Y", "sign", "-q", "-f", "alice-cert.pub", "-n", NAMESPACE, "there/.lockstep/manifest"];
        done(&data.command("ssh-keygen", &sign).env("SSH_AUTH_SOCK", &agent.socket).output().unwrap());
        let mut delete = Command::new("ssh-add");
        done(&delete.arg("-qD").env("SSH_AUTH_SOCK", &agent.socket).output().unwrap());
    };
    let good = ["-n", "alice@x,carol@y", "-V", "-1m:+1h"];
    certify(&good);
    data.allow(&list);
    ends(&data.keygen_verify("alice@x", NAMESPACE), 0, &[]);
    ends(&data.verify(&[]), 0, &["signed by alice@x with SHA256:"]);
    ends(&data.verify(&["--signer", "alice@x"]), 0, &["signed by alice@x"]);
    data.refuses(&["--signer", "carol@y"], &["that of '*@x', not of 'carol@y'"]);
    data.refuses(&["--signer", "bob@x"], &["the certificate is for alice@x,carol@y, not for bob@x"]);
    data.allow(&list.replace("cert-authority ", ""));
    data.refuses(&[], &["without cert-authority"]);
    // The key of the certificate itself is nobody's.
    data.allow(&format!("alice@x {}", public(&data.path("alice.pub"))));
    data.refuses(&[], &["the certificate's authority SHA256:", "is not listed"]);
    data.allow(&list);
    let bad: [(&[&str], &str); 5] = [
        (&["-n", "alice@x", "-V", "20200101:20200102"], "has expired"),
        (&["-n", "alice@x", "-V", "20980101:20990101"], "is not valid yet"),
        (&["-h", "-n", "alice@x"], "is a host's"),
        (&["-V", "-1m:+1h"], "is for nobody"),
        (&["-n", "alice@x", "-O", "force-command=true"], "critical option force-command"),
    ];
    for (options, reason) in bad {
        certify(options);
        data.refuses(&["--signer", "alice@x"], &["line 1: the certificate ", reason]);
    }
}

#[test]
fn the_agent_signs_with_the_key_that_a_public_half_names() {
    let data = Signed::new();
    keygen(data.at.path(), &["-t", "rsa", "-b", "3072", "-N", "", "-f", "rsa"]);
    keygen(data.at.path(), &["-t", "ed25519", "-N", "open sesame", "-f", "locked"]);
    let sign = |key: &str| data.command(env!("CARGO_BIN_EXE_lockstep"), &["manifest", "sign", "--key", key, "there"]);
    ends(&sign("rsa.pub").output().unwrap(), 3, &["is a public key", "SSH_AUTH_SOCK is not set"]);
    ends(&sign("locked").output().unwrap(), 3, &["needs a passphrase, and there is no terminal"]);
    let agent = Agent::start(data.at.path());
    let mut without = sign("rsa.pub");
    ends(
        &without.env("SSH_AUTH_SOCK", &agent.socket).output().unwrap(),
        3,
        &["does not have the other half; ssh-add it"],
    );
    assert!(!data.path("there/.lockstep/manifest.sig").exists());
    agent.add("rsa");
    // What ssh-add does with a passphrase: the agent has what the file keeps locked.
    fs::copy(data.path("locked"), data.path("open")).unwrap();
    fs::set_permissions(data.path("open"), fs::Permissions::from_mode(0o600)).unwrap();
    keygen(data.at.path(), &["-p", "-P", "open sesame", "-N", "", "-f", "open"]);
    agent.add("open");
    for key in ["rsa.pub", "locked.pub", "locked"] {
        done(&sign(key).env("SSH_AUTH_SOCK", &agent.socket).output().unwrap());
        let listed = format!("{}.pub", key.trim_end_matches(".pub"));
        data.allow(&format!("team@x {}", public(&data.path(&listed))));
        ends(&data.keygen_verify("team@x", NAMESPACE), 0, &["Good"]);
        ends(&data.verify(&["--signer", "team@x"]), 0, &["signed by team@x"]);
    }
}

#[test]
fn what_cannot_be_signed_is_said() {
    let data = Signed::new();
    let sign = |more: &[&str]| data.run(&[&["manifest", "sign"], more].concat());
    ends(&sign(&["--key", "alice", "data"]), 2, &["has no manifest"]);
    ends(&sign(&["there"]), 3, &["cannot sign", ".ssh/id_ed25519", "No such file"]);
    keygen(data.at.path(), &["-t", "rsa", "-b", "2048", "-N", "", "-f", "short"]);
    ends(&sign(&["--key", "short", "there"]), 3, &["2048 bits is too weak"]);
    fs::set_permissions(data.path("alice"), fs::Permissions::from_mode(0o644)).unwrap();
    ends(&sign(&["--key", "alice", "there"]), 3, &["others can read this private key", "chmod 600"]);
    fs::set_permissions(data.path("alice"), fs::Permissions::from_mode(0o600)).unwrap();
    let manifest = data.path("there/.lockstep/manifest");
    let good = fs::read_to_string(&manifest).unwrap();
    fs::write(&manifest, good.replace("weights", "heights")).unwrap();
    ends(&sign(&["--key", "alice", "there"]), 1, &["its digest does not fit"]);
    assert!(!data.path("there/.lockstep/manifest.sig").exists());
    // Options that would be without effect.
    let verify = |more: &[&str]| data.run(&[&["manifest", "verify", "there"], more].concat());
    ends(&verify(&["--require-signature"]), 2, &["--allowed-signers"]);
    ends(&verify(&["--allowed-signers", "allowed"]), 2, &["--require-signature"]);
    ends(&verify(&["--signer", "alice@x"]), 2, &["--require-signature"]);
    ends(&verify(&["--sums", "x", "--min-generation", "1"]), 2, &["cannot be used with"]);
}

#[test]
fn a_list_in_a_file_has_its_signature_beside_it() {
    let data = Signed::new();
    done(&data.run(&["manifest", "create", "-o", "data/list", "data"]));
    done(&data.run(&["manifest", "sign", "--key", "alice", "data/list"]));
    let check =
        ["manifest", "verify", "--manifest", "data/list", "--require-signature", "--allowed-signers", "allowed"];
    let verify = || data.run(&[&check[..], &["data"]].concat());
    ends(&verify(), 0, &["signed by alice@x", "1 path verified"]);
    assert!(Path::new(&data.path("data/list.sig")).is_file());
    fs::write(data.path("data/other.sig"), "").unwrap();
    ends(&verify(), 1, &["other.sig: not listed"]);
}

#[test]
fn s30_training_starts_only_on_what_an_allowed_signer_has_signed() {
    let signed = Signed::new();
    let trust = ["--require-signature", "--allowed-signers", "allowed"];
    let check = |more: &[&str]| signed.run(&[&["check"], &trust[..], more, &["there"]].concat());
    let exec = || signed.run(&[&["exec", "--check", "there"], &trust[..], &["--", "touch", "started"]].concat());
    ends(&check(&[]), 3, &["is not signed"]);
    ends(&exec(), 3, &["is not signed"]);
    assert!(!signed.path("started").exists());
    signed.sign("alice");
    done(&check(&[]));
    done(&check(&["--cached", "--max-age", "1d"]));
    ends(&check(&["--signer", "bob@x"]), 3, &["does not count"]);
    done(&exec());
    assert!(signed.path("started").exists());
    // Signed or not, data that is not what is listed is bad; and a list that was changed is not what was signed.
    fs::write(signed.path("there/weights"), "9876543210").unwrap();
    ends(&check(&[]), 1, &["modified"]);
    done(&signed.run(&["push", "--checksum", "data", "there"]));
    let manifest = signed.path("there/.lockstep/manifest");
    let text = fs::read_to_string(&manifest).unwrap();
    fs::write(&manifest, text.replacen("generation", "generation ", 1)).unwrap();
    for more in [&["--cached", "--max-age", "1d"][..], &[]] {
        ends(&check(more), 3, &["does not count"]);
    }
}
