//! Signatures of OpenSSF Model Signing, with its own implementation, model_signing, on the other side.

use std::fs;
use std::io::{Read as _, Write as _};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::kit::python::python;
use crate::kit::{done, ends, key, public, text};

/// `data`, which was published to `there`; `model`, which nobody published; and a key.
struct Models {
    at: TempDir,
}

impl Models {
    fn new() -> Models {
        let made = Models { at: tempfile::tempdir().unwrap() };
        for directory in ["data/deep/er", "data/empty", "data/.github"] {
            fs::create_dir_all(made.path(directory)).unwrap();
        }
        let names = ["weights", "deep/er/shard", "deep-1", "deep/caf\u{e9} \u{1b}\"\n", ".gitattributes", ".github/x"];
        for name in names {
            fs::write(made.path("data").join(name), format!("what is in {name}")).unwrap();
        }
        fs::hard_link(made.path("data/weights"), made.path("data/same")).unwrap();
        done(&made.run(&["push", "data", "there"]));
        done(&made.command("cp", &["-r", "data", "model"]).output().unwrap());
        made.key("key", &["ecparam", "-name", "prime256v1", "-genkey"]);
        made
    }

    fn path(&self, name: &str) -> PathBuf {
        self.at.path().join(name)
    }

    fn command(&self, program: impl AsRef<std::ffi::OsStr>, arguments: &[&str]) -> Command {
        let mut command = Command::new("setsid");
        // Without a terminal nothing can be asked for.
        command.arg("-w").arg(program.as_ref()).args(arguments).current_dir(self.at.path()).stdin(Stdio::null());
        command.env("HOME", self.at.path()).env_remove("SSH_AUTH_SOCK").env_remove("LOCKSTEP_CONFIG");
        command
    }

    fn run(&self, arguments: &[&str]) -> Output {
        self.command(env!("CARGO_BIN_EXE_lockstep"), arguments).output().unwrap()
    }

    fn openssl(&self, arguments: &[&str]) {
        let output = self.command("openssl", arguments).output().unwrap();
        assert!(output.status.success(), "openssl (Debian package openssl) {arguments:?}: {}", text(&output));
    }

    /// `NAME.pem` and `NAME.pub`.
    fn key(&self, name: &str, make: &[&str]) {
        let (private, public) = (format!("{name}.pem"), format!("{name}.pub"));
        self.openssl(&[make, &["-out", &private]].concat());
        self.private(&private);
        self.openssl(&["pkey", "-in", &private, "-passin", "pass:open sesame", "-pubout", "-out", &public]);
    }

    fn private(&self, name: &str) {
        fs::set_permissions(self.path(name), fs::Permissions::from_mode(0o600)).unwrap();
    }

    fn sign(&self, more: &[&str]) -> Output {
        self.run(&[&["manifest", "sign", "--format", "oms", "--key", "key.pem"], more].concat())
    }

    fn model_signing(&self, arguments: &[&str]) -> Output {
        let mut command = python("model_signing");
        command.args(["-m", "model_signing"]).args(arguments).current_dir(self.at.path()).env("HOME", self.at.path());
        command.output().unwrap()
    }

    fn they_sign(&self, more: &[&str]) {
        let sign = ["sign", "key", "model", "--private_key", "key.pem", "--signature", "model/model.sig"];
        done(&self.model_signing(&[&sign[..], more].concat()));
    }

    /// The command of docs/check.md.
    fn they_verify(&self, directory: &str, signature: &str, public_key: &str) -> Output {
        self.model_signing(&["verify", "key", directory, "--signature", signature, "--public_key", public_key])
    }

    fn check(&self, more: &[&str]) -> Output {
        self.run(&[&["check", "--require-signature", "--oms-key", "key.pub"], more].concat())
    }

    fn verify(&self, more: &[&str]) -> Output {
        self.run(&[&["manifest", "verify", "--require-signature", "--oms-key", "key.pub"], more].concat())
    }

    /// Refused for want of trust by both commands, and before anything was compared.
    #[track_caller]
    fn refuses(&self, more: &[&str], words: &[&str]) {
        for output in [self.check(more), self.verify(more)] {
            ends(&output, 3, words);
            assert_eq!(String::from_utf8_lossy(&output.stdout), "");
        }
    }

    /// Changes a signature's bundle.
    fn change(&self, file: &str, change: impl Fn(&mut Value)) {
        let mut bundle: Value = serde_json::from_slice(&fs::read(self.path(file)).unwrap()).unwrap();
        change(&mut bundle);
        fs::write(self.path(file), serde_json::to_vec(&bundle).unwrap()).unwrap();
    }
}

#[test]
fn what_lockstep_signs_model_signing_accepts_and_what_is_damaged_it_refuses() {
    let models = Models::new();
    // A root within the root has a state of its own, which model_signing takes for a part of the model.
    done(&models.run(&["push", "data", "there/deep"]));
    fs::remove_dir_all(models.path("there")).unwrap();
    done(&models.run(&["push", "data", "there"]));
    fs::create_dir(models.path("there/deep/.lockstep")).unwrap();
    fs::write(models.path("there/deep/.lockstep/manifest"), "").unwrap();

    let signature = "there/.lockstep/model.sig";
    let made = models.sign(&["there"]);
    ends(&made, 0, &["(5 files)", "not signed", "'.gitattributes', '.github/x'", signature]);
    ends(&models.they_verify("there", signature, "key.pub"), 0, &["Verification succeeded"]);
    ends(&models.check(&["there"]), 0, &["5 files are signed with the key", "good"]);
    ends(&models.verify(&["there"]), 0, &["11 paths verified"]);
    // A check keeps its verdict there, and the next run what it knows: the signature stays good.
    ends(&models.they_verify("there", signature, "key.pub"), 0, &["Verification succeeded"]);

    // In the tree, beside it, to standard output; and under another name of the directory.
    for file in ["there/model.sig", "elsewhere.sig"] {
        done(&models.sign(&["--output", file, "there"]));
        ends(&models.they_verify("there", file, "key.pub"), 0, &["Verification succeeded"]);
        ends(&models.check(&["--signature", file, "there"]), 0, &["good"]);
        ends(&models.verify(&["--signature", file, "there"]), 0, &["11 paths verified"]);
        let _ = fs::remove_file(models.path("there/model.sig"));
    }
    let written = models.sign(&["--output", "-", "there"]);
    assert_eq!(String::from_utf8_lossy(&written.stdout), fs::read_to_string(models.path("elsewhere.sig")).unwrap());
    fs::rename(models.path("there"), models.path("renamed")).unwrap();
    ends(&models.they_verify("renamed", "elsewhere.sig", "key.pub"), 0, &["Verification succeeded"]);
    fs::rename(models.path("renamed"), models.path("there")).unwrap();

    // Damage, each told by both.
    let weights = models.path("there/weights");
    let good = fs::read(&weights).unwrap();
    fs::write(&weights, "other").unwrap();
    ends(&models.they_verify("there", signature, "key.pub"), 1, &["Signature mismatch", "Hash mismatch for"]);
    ends(&models.check(&["there"]), 1, &["wrong-size: weights"]);
    ends(&models.verify(&["there"]), 1, &["weights: differs"]);
    fs::write(&weights, good).unwrap();
    fs::write(models.path("there/more"), "").unwrap();
    ends(&models.they_verify("there", signature, "key.pub"), 1, &["Extra files", "more"]);
    ends(&models.check(&["there"]), 1, &["unlisted: more"]);
    fs::rename(models.path("there/deep-1"), models.path("there/more")).unwrap();
    ends(&models.they_verify("there", signature, "key.pub"), 1, &["Missing files", "deep-1"]);
    ends(&models.check(&["there"]), 1, &["missing: deep-1"]);
    fs::rename(models.path("there/more"), models.path("there/deep-1")).unwrap();
    ends(&models.check(&["there"]), 0, &["good"]);
    models.key("other", &["ecparam", "-name", "prime256v1", "-genkey"]);
    ends(&models.they_verify("there", signature, "other.pub"), 1, &["Key mismatch"]);
    models.change(signature, |bundle| {
        let payload = bundle["dsseEnvelope"]["payload"].as_str().unwrap().replacen('B', "C", 1);
        bundle["dsseEnvelope"]["payload"] = payload.into();
    });
    ends(&models.they_verify("there", signature, "key.pub"), 1, &["Verification failed"]);
    models.refuses(&["there"], &["does not fit", "'there/.lockstep/model.sig' does not count"]);
}

#[test]
fn s30_a_model_that_was_downloaded_with_its_signature_is_checked_by_it() {
    let models = Models::new();
    models.they_sign(&[]);
    let good = models.check(&["model"]);
    ends(&good, 0, &["5 files are signed with the key", "'model/model.sig'", "'model': good", "leaves out 2 paths"]);
    ends(&models.verify(&["model"]), 0, &["5 paths verified"]);
    // The first check left no state behind that the next trips over.
    ends(&models.check(&["--quick", "model"]), 0, &["good"]);
    ends(&models.check(&["--verdict", "verdict", "model"]), 0, &["good"]);
    let cached = ["--cached", "--max-age", "1d", "--verdict", "verdict", "model"];
    ends(&models.check(&cached), 0, &["good"]);
    let exec = ["exec", "--require-signature", "--oms-key", "key.pub", "--check", "model", "--", "touch", "started"];
    done(&models.run(&exec));
    assert!(models.path("started").exists());

    // Damage: all of it is told, and by the other side as well.
    fs::write(models.path("model/weights"), "what is in WEIGHTS").unwrap();
    fs::remove_file(models.path("model/deep-1")).unwrap();
    fs::write(models.path("model/more"), "").unwrap();
    symlink("more", models.path("model/link")).unwrap();
    fs::remove_file(models.path("model/deep/er/shard")).unwrap();
    fs::create_dir(models.path("model/deep/er/shard")).unwrap();
    // Nobody said anything of these.
    fs::write(models.path("model/.gitattributes"), "other").unwrap();
    fs::create_dir(models.path("model/nothing")).unwrap();
    let told = [
        "modified: weights",
        "missing: deep-1",
        "unlisted: more",
        "unlisted: link",
        "wrong-kind: deep/er/shard",
        "bad",
    ];
    let bad = models.check(&["model"]);
    ends(&bad, 1, &told);
    assert_eq!(String::from_utf8_lossy(&bad.stdout).lines().count(), 5, "{}", text(&bad));
    let told = ["weights: differs", "deep-1: missing", "more: not listed", "link: not listed", "shard: differs"];
    ends(&models.verify(&["model"]), 1, &told);
    ends(&models.they_verify("model", "model/model.sig", "key.pub"), 1, &["Verification failed"]);
    fs::remove_file(models.path("started")).unwrap();
    ends(&models.run(&exec), 1, &["bad"]);
    assert!(!models.path("started").exists());
    // What is signed has no generation.
    ends(&models.check(&["--min-generation", "1", "model"]), 1, &["old-generation"]);
    ends(&models.verify(&["--min-generation", "1", "model"]), 1, &["has no generation"]);
}

#[test]
fn h12_h26_their_signatures_that_were_changed_or_are_of_another_kind_are_refused() {
    let models = Models::new();
    models.refuses(
        &["model"],
        &["'model' is not signed", "nor 'model/model.sig': there is none", "--signature", "model_signing sign key"],
    );
    models.they_sign(&[]);
    let good = fs::read(models.path("model/model.sig")).unwrap();
    type Change = fn(&mut Value);
    let cases: [(Change, &str); 6] = [
        (|b| b["verificationMaterial"]["publicKey"]["hint"] = "00".into(), "made with another key: 00"),
        (|b| b["dsseEnvelope"]["signatures"][0]["keyid"] = "00".into(), "names its key '00'"),
        (|b| b["verificationMaterial"]["tlogEntries"] = json!([{}]), "transparency log"),
        (|b| b["verificationMaterial"] = json!({"certificate": {}}), "'keyless'"),
        (|b| b["dsseEnvelope"]["payload"] = "e30=".into(), "does not fit"),
        (|b| b["dsseEnvelope"]["payloadType"] = "x".into(), "of the type 'x'"),
    ];
    for (change, words) in cases {
        models.change("model/model.sig", change);
        models.refuses(&["model"], &["the signature 'model/model.sig' does not count", words]);
        fs::write(models.path("model/model.sig"), &good).unwrap();
    }
    models.key("other", &["ecparam", "-name", "prime256v1", "-genkey"]);
    let other = ["check", "--require-signature", "--oms-key", "other.pub", "model"];
    ends(&models.run(&other), 3, &["made with another key", "name it instead of 'other.pub'"]);

    // By what the library offers beside the command: digests of another kind, and of parts of files.
    for (how, words) in [
        ("use_file_serialization(hashing_algorithm='blake2')", "the kind 'blake2b'"),
        ("use_shard_serialization(shard_size=8)", "the method 'shards'"),
    ] {
        let script = format!(
            "import model_signing as m; m.signing.Config().use_elliptic_key_signer(private_key='key.pem')\
             .set_hashing_config(m.hashing.Config().set_ignored_paths(paths=['model.sig']).{how}).sign('model', 'other.sig')"
        );
        let mut command = python("model_signing");
        done(&command.args(["-c", &script]).current_dir(models.at.path()).output().unwrap());
        models.refuses(&["--signature", "other.sig", "model"], &[words]);
    }
    // One that signs what lockstep keeps there.
    let over = ["sign", "key", "there", "--private_key", "key.pem", "--signature", "over.sig"];
    done(&models.model_signing(&over));
    models.refuses(&["--signature", "over.sig", "there"], &["lockstep's own", "--ignore-paths"]);
    // The other command of docs/check.md.
    let inside = ["--private_key", "key.pem", "--signature", "there/.lockstep/model.sig"];
    let ignore = ["--ignore-paths", "there/.lockstep"];
    done(&models.model_signing(&[&["sign", "key", "there"][..], &inside, &ignore].concat()));
    ends(&models.check(&["there"]), 0, &["good"]);

    // A link that somebody planted is not followed, and an SSH signature is none of these.
    fs::rename(models.path("model/model.sig"), models.path("moved.sig")).unwrap();
    symlink("../moved.sig", models.path("model/model.sig")).unwrap();
    models.refuses(&["model"], &["is not signed"]);
    fs::remove_file(models.path("model/model.sig")).unwrap();
    ends(&models.check(&["--signature", "moved.sig", "model"]), 0, &["good"]);
    key(models.at.path(), "alice");
    done(&models.run(&["manifest", "sign", "--key", "alice", "there"]));
    models.refuses(&["--signature", "there/.lockstep/manifest.sig", "there"], &["not a signature of OpenSSF"]);
    fs::write(models.path("allowed"), format!("alice@x {}\n", public(&models.path("alice.pub")))).unwrap();
    let ssh = ["check", "--require-signature", "--allowed-signers", "allowed", "--signature", "moved.sig", "there"];
    ends(&models.run(&ssh), 3, &["not an SSH signature"]);
    // As a list it is nothing that can be trusted.
    ends(&models.run(&["check", "--against", "moved.sig", "model"]), 1, &["manifest-damaged", "--oms-key"]);
}

#[test]
fn h25_h26_a_manifest_and_a_signature_have_to_agree() {
    let models = Models::new();
    done(&models.sign(&["there"]));
    // A newer publication; then the manifest of another data set, whose own digest is good.
    fs::write(models.path("data/weights"), "newer").unwrap();
    fs::write(models.path("data/added"), "newer").unwrap();
    fs::remove_file(models.path("data/deep-1")).unwrap();
    done(&models.run(&["push", "--delete", "data", "there"]));
    let told = [
        "'there/.lockstep/manifest' is not what 'there/.lockstep/model.sig' signs",
        "'added' is listed but not signed",
        "'deep-1' is signed but not listed",
        "and 1 more",
        "have it signed again",
    ];
    models.refuses(&["there"], &told);
    ends(&models.check(&["--cached", "--max-age", "1d", "there"]), 3, &told);
    done(&models.sign(&["there"]));
    ends(&models.check(&["there"]), 0, &["good"]);
    ends(&models.check(&["--cached", "--max-age", "1d", "there"]), 0, &["good"]);
    // What the manifest says beyond the signature is compared too.
    fs::set_permissions(models.path("there/added"), fs::Permissions::from_mode(0o604)).unwrap();
    ends(&models.check(&["there"]), 1, &["wrong-mode: added"]);
    ends(&models.check(&["--min-generation", "3", "--ignore-permissions", "there"]), 1, &["old-generation"]);
    let good = models.check(&["--min-generation", "2", "--ignore-permissions", "there"]);
    ends(&good, 0, &["good", "left out by the signature: '.gitattributes', '.github/x'"]);

    // A link would bring in what nobody has signed.
    symlink("/etc/passwd", models.path("data/link")).unwrap();
    done(&models.run(&["push", "--links=all", "data", "there"]));
    models.refuses(&["there"], &["'link' is a link, which is not signed"]);
    fs::remove_file(models.path("data/link")).unwrap();
    done(&models.run(&["push", "--delete", "data", "there"]));

    // A list of sha256sum, and a manifest in a file.
    let sums = "cd there && find . -path ./.lockstep -prune -o -type f -print0 | xargs -0 sha256sum > ../sums";
    done(&models.command("sh", &["-c", sums]).output().unwrap());
    ends(&models.check(&["--against", "sums", "there"]), 0, &["good"]);
    done(&models.run(&["manifest", "create", "-o", "list", "there"]));
    ends(&models.verify(&["--manifest", "list", "there"]), 0, &["verified"]);
    let text = fs::read_to_string(models.path("sums")).unwrap();
    fs::write(models.path("sums"), text.replacen("./added", "./other", 1)).unwrap();
    ends(&models.check(&["--against", "sums", "there"]), 3, &["'sums' is not what", "'added' is signed"]);
    // Without the manifest the signature is the list.
    done(&models.command("cp", &["-a", "there", "copy"]).output().unwrap());
    fs::remove_file(models.path("copy/.lockstep/manifest")).unwrap();
    ends(&models.check(&["copy"]), 0, &["good"]);
    ends(&models.verify(&["copy"]), 0, &["5 paths verified"]);
    ends(&models.check(&["--cached", "--max-age", "1d", "copy"]), 0, &["good"]);
    fs::copy(models.path("copy/.lockstep/model.sig"), models.path("copy/.lockstep/other")).unwrap();
    fs::rename(models.path("copy/.lockstep/other"), models.path("copy/.lockstep/model.sig")).unwrap();
    ends(&models.check(&["--cached", "--max-age", "1d", "copy"]), 1, &["no verdict stands for it"]);
}

#[test]
fn links_count_where_the_signature_says_so_and_within_the_tree() {
    let models = Models::new();
    symlink("weights", models.path("model/to-file")).unwrap();
    symlink("deep", models.path("model/to-directory")).unwrap();
    let plain = ["sign", "key", "model", "--private_key", "key.pem", "--signature", "model/model.sig"];
    ends(&models.model_signing(&plain), 1, &["symlink"]);
    models.they_sign(&["--allow_symlinks"]);
    ends(&models.check(&["model"]), 0, &["good", "6 files are signed"]);
    ends(&models.verify(&["model"]), 0, &["6 paths verified"]);
    symlink("weights", models.path("model/another")).unwrap();
    ends(&models.check(&["model"]), 1, &["unlisted: another"]);
    ends(&models.verify(&["model"]), 1, &["another: not listed"]);
    fs::remove_file(models.path("model/another")).unwrap();
    // The same content, and out of the tree.
    fs::copy(models.path("model/weights"), models.path("outside")).unwrap();
    fs::remove_file(models.path("model/to-file")).unwrap();
    symlink("../outside", models.path("model/to-file")).unwrap();
    ends(&models.check(&["model"]), 1, &["unreadable: to-file"]);
    // Signed without links, a link is no file.
    fs::remove_file(models.path("model/to-file")).unwrap();
    fs::remove_file(models.path("model/to-directory")).unwrap();
    models.they_sign(&[]);
    fs::rename(models.path("model/weights"), models.path("model/.github/weights")).unwrap();
    symlink(".github/weights", models.path("model/weights")).unwrap();
    ends(&models.check(&["model"]), 1, &["wrong-kind: weights"]);
    ends(&models.verify(&["model"]), 1, &["weights: differs"]);
}

#[test]
fn nothing_is_signed_that_is_not_there_or_that_the_format_cannot_hold() {
    let models = Models::new();
    let nothing = || assert!(!models.path("there/.lockstep/model.sig").exists());
    ends(&models.sign(&["data"]), 2, &["'data' has no manifest", "push to it first"]);
    ends(&models.sign(&["there/.lockstep/manifest"]), 2, &["is no directory"]);
    ends(&models.run(&["manifest", "sign", "--format", "oms", "there"]), 2, &["--key"]);
    ends(&models.sign(&["--output", "there/deep-1", "there"]), 2, &["'deep-1' belongs to what was published"]);

    // Not as listed: changed, put there, gone. Modes are not signed.
    fs::set_permissions(models.path("there/weights"), fs::Permissions::from_mode(0o640)).unwrap();
    let good = fs::read(models.path("there/deep-1")).unwrap();
    fs::write(models.path("there/deep-1"), b"WHAT is in deep-1").unwrap();
    ends(&models.sign(&["there"]), 1, &["is not what its manifest says", "'deep-1' is modified", "lockstep check"]);
    fs::write(models.path("there/deep-1"), &good).unwrap();
    fs::write(models.path("there/more"), "").unwrap();
    ends(&models.sign(&["there"]), 1, &["'more' is unlisted"]);
    fs::rename(models.path("there/more"), models.path("more")).unwrap();
    fs::rename(models.path("there/deep-1"), models.path("deep-1")).unwrap();
    ends(&models.sign(&["there"]), 1, &["'deep-1' is missing"]);
    fs::rename(models.path("deep-1"), models.path("there/deep-1")).unwrap();
    fs::create_dir_all(models.path("there/.lockstep/staging/x")).unwrap();
    fs::write(models.path("there/.lockstep/staging/x/y"), "part").unwrap();
    ends(&models.sign(&["there"]), 4, &["is unfinished"]);
    fs::remove_dir_all(models.path("there/.lockstep/staging")).unwrap();
    nothing();
    done(&models.sign(&["there"]));
    fs::remove_file(models.path("there/.lockstep/model.sig")).unwrap();

    // What the format does not hold.
    let odd = Path::new(std::ffi::OsStr::from_bytes(b"data/caf\xe9"));
    fs::write(models.at.path().join(odd), "").unwrap();
    done(&models.run(&["push", "data", "there"]));
    ends(&models.sign(&["there"]), 2, &["'caf\\xe9' has a name that is not UTF-8"]);
    fs::remove_file(models.at.path().join(odd)).unwrap();
    symlink("weights", models.path("data/link")).unwrap();
    done(&models.run(&["push", "--delete", "data", "there"]));
    ends(&models.sign(&["there"]), 2, &["'link' is a symbolic link", "model_signing refuses"]);
    nothing();
}

#[test]
fn keys_as_openssl_makes_them_sign_and_others_are_refused_as_what_they_are() {
    let models = Models::new();
    let sign = |key: &str| models.run(&["manifest", "sign", "--format", "oms", "--key", key, "there"]);
    let check = |key: &str| models.run(&["check", "--require-signature", "--oms-key", key, "there"]);
    let p256 = ["genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256"];
    models.key("pkcs8", &p256);
    models.key("bare", &["ecparam", "-name", "prime256v1", "-genkey", "-noout"]);
    for name in ["key", "pkcs8", "bare"] {
        done(&sign(&format!("{name}.pem")));
        ends(&check(&format!("{name}.pub")), 0, &["good"]);
        let theirs = models.they_verify("there", "there/.lockstep/model.sig", &format!("{name}.pub"));
        ends(&theirs, 0, &["Verification succeeded"]);
    }
    // With a passphrase, asked for at the terminal alone.
    models.key("locked", &[&p256[..], &["-aes256", "-pass", "pass:open sesame"]].concat());
    ends(&sign("locked.pem"), 3, &["'locked.pem': it needs a passphrase, and there is no terminal"]);
    assert!(at_a_terminal(&models, "locked.pem", "wrong\n").contains("the passphrase is wrong"));
    assert!(at_a_terminal(&models, "locked.pem", "open sesame\n").contains("signed 'there'"));
    ends(&check("locked.pub"), 0, &["good"]);

    models.key("p384", &["ecparam", "-name", "secp384r1", "-genkey"]);
    models.key("k256", &["ecparam", "-name", "secp256k1", "-genkey"]);
    models.key("p384-8", &["genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-384"]);
    models.key("ed", &["genpkey", "-algorithm", "ed25519"]);
    for name in ["p384", "k256", "p384-8", "ed"] {
        ends(&sign(&format!("{name}.pem")), 3, &["is not a private key on the curve P-256"]);
        ends(&check(&format!("{name}.pub")), 2, &["is not a public key on the curve P-256"]);
    }
    models.openssl(&["ec", "-in", "key.pem", "-aes256", "-passout", "pass:open sesame", "-out", "old.pem"]);
    models.private("old.pem");
    ends(&sign("old.pem"), 3, &["in the old way of PEM", "openssl pkcs8 -topk8"]);
    key(models.at.path(), "alice");
    ends(&sign("alice"), 3, &["it is a key of OpenSSH", "openssl genpkey"]);
    ends(&check("alice.pub"), 2, &["is not a key in PEM"]);
    models.private("key.pub");
    ends(&sign("key.pub"), 3, &["it is a public key"]);
    ends(&check("key.pem"), 2, &["it is a private key", "openssl pkey -pubout"]);
    ends(&sign("nowhere"), 3, &["cannot read 'nowhere'", "No such file"]);
    ends(&check("nowhere"), 5, &["cannot read 'nowhere'"]);
    // Files that others have a hand in.
    fs::set_permissions(models.path("key.pem"), fs::Permissions::from_mode(0o640)).unwrap();
    ends(&sign("key.pem"), 3, &["can be read by others (mode 0640)", "chmod 600"]);
    fs::set_permissions(models.path("key.pub"), fs::Permissions::from_mode(0o664)).unwrap();
    ends(&check("key.pub"), 3, &["others may write this key (mode 0664)", "chmod go-w"]);
    // Options that would be without effect.
    ends(&models.run(&["check", "--oms-key", "key.pub", "there"]), 2, &["--require-signature"]);
    ends(&models.check(&["--signer", "a", "there"]), 2, &["cannot be used with"]);
    ends(&models.check(&["--allowed-signers", "a", "there"]), 2, &["cannot be used with"]);
    ends(&models.verify(&["--sums", "a", "there"]), 2, &["cannot be used with"]);
    ends(&models.run(&["check", "--require-signature", "there"]), 2, &["--oms-key"]);
}

/// Signs at a terminal of its own, and types when it is asked. All that was said.
fn at_a_terminal(models: &Models, key: &str, typed: &str) -> String {
    let command = format!("{} manifest sign --format oms --key {key} there", env!("CARGO_BIN_EXE_lockstep"));
    let mut child = Command::new("script")
        .args(["-qec", &command, "/dev/null"])
        .current_dir(models.at.path())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("script is not installed: Debian package bsdutils");
    let (mut input, mut output) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
    let (mut seen, mut buffer, mut typed) = (Vec::new(), [0; 1024], Some(typed));
    while let Ok(count @ 1..) = output.read(&mut buffer) {
        seen.extend_from_slice(&buffer[..count]);
        if String::from_utf8_lossy(&seen).contains("Passphrase for ")
            && let Some(typed) = typed.take()
        {
            input.write_all(typed.as_bytes()).unwrap();
        }
    }
    child.wait().unwrap();
    String::from_utf8_lossy(&seen).into_owned()
}

#[test]
fn what_a_signature_lists_is_had_again_from_a_good_copy() {
    let models = Models::new();
    done(&models.sign(&["there"]));
    fs::copy(models.path("there/.lockstep/model.sig"), models.path("model/model.sig")).unwrap();
    fs::write(models.path("model/weights"), "bad").unwrap();
    fs::remove_dir_all(models.path("model/deep")).unwrap();
    ends(&models.check(&["model", "--repair", "data"]), 0, &["repaired 3 files", "good"]);
    assert_eq!(
        fs::read(models.path("model/deep/er/shard")).unwrap(),
        fs::read(models.path("data/deep/er/shard")).unwrap()
    );
    for at in ["model/weights", "data/weights"] {
        fs::write(models.path(at), "bad").unwrap();
    }
    ends(&models.check(&["model", "--repair", "data"]), 1, &["the good copy's SHA-256 is", "1 path not repaired"]);
}
