//! Bundles and statements, good and bad, made with a key that is known.

use p256::pkcs8::EncodePrivateKey as _;
use serde_json::{Value, json};

use super::*;
use crate::manifest::{Content, Entry, Timestamp};

fn key(seed: u8) -> PrivateKey {
    let pem = p256::SecretKey::from_slice(&[seed; 32]).unwrap().to_pkcs8_pem(p256::pkcs8::LineEnding::LF).unwrap();
    PrivateKey::from_pem(pem.as_bytes(), &|| None).unwrap()
}

fn tree(entries: &[(&[u8], Content)]) -> Tree {
    let entry = |(path, content): &(&[u8], Content)| Entry {
        path: RelPath::new(path).unwrap(),
        content: content.clone(),
        mtime: Timestamp::default(),
        mode: 0o644,
        owner: "u".into(),
        group: "g".into(),
    };
    Tree::new(entries.iter().map(entry).collect()).unwrap()
}

fn contents(digest: u8) -> Content {
    Content::File { size: 1, digest: Some(Digest([digest; 32])) }
}

fn statement() -> Statement {
    let link = Content::HardLink { first: RelPath::new("a").unwrap() };
    let entries: [(&[u8], Content); 6] = [
        (b"a", contents(1)),
        (b"d", Content::Directory),
        ("d/\u{e9}\n".as_bytes(), contents(2)),
        (b"d/.gitignore", contents(3)),
        (b".gitattributes", contents(4)),
        (b"z", link),
    ];
    Statement::of("model".into(), &tree(&entries), &[RelPath::new("model.sig").unwrap()]).unwrap()
}

/// A good signature of `payload`, in a bundle that `change` was at.
fn bundle(payload: &[u8], change: impl Fn(&mut Value)) -> Vec<u8> {
    let key = key(7);
    let made: Signature = key.key.sign(&enveloped(payload));
    let mut bundle: Value = serde_json::from_str(&sign(&statement(), &key).unwrap()).unwrap();
    bundle["dsseEnvelope"]["payload"] = Base64::encode_string(payload).into();
    bundle["dsseEnvelope"]["signatures"][0]["sig"] = Base64::encode_string(made.to_der().as_bytes()).into();
    change(&mut bundle);
    serde_json::to_vec(&bundle).unwrap()
}

fn payload(change: impl Fn(&mut Value)) -> Vec<u8> {
    let mut payload: Value = serde_json::from_slice(&statement().to_json().unwrap()).unwrap();
    change(&mut payload);
    serde_json::to_vec(&payload).unwrap()
}

/// What is said of a well signed text.
fn judged(change: impl Fn(&mut Value)) -> Result<Statement, String> {
    let text = bundle(&payload(change), |_| {});
    verify(&text, key(7).public()).map_err(|refusal| refusal.to_string())
}

#[test]
fn what_is_signed_comes_back_and_covers_what_model_signing_covers() {
    let text = sign(&statement(), &key(7)).unwrap();
    let read = verify(text.as_bytes(), key(7).public()).unwrap();
    assert_eq!(read, statement());
    let paths: Vec<String> = read.files.iter().map(|(path, _)| path.to_string()).collect();
    assert_eq!(paths, ["a", "d/.gitignore", "d/\u{e9}\\n", "z"]);
    assert_eq!(read.files[3].1, Digest([1; 32]));
    let ignored: Vec<String> = read.ignored.iter().map(ToString::to_string).collect();
    assert_eq!(ignored, [".git", ".gitattributes", ".github", ".gitignore", ".lockstep", "model.sig"]);
}

#[test]
fn what_the_format_cannot_hold_is_not_signed() {
    let made = |path: &[u8], content| Statement::of("m".into(), &tree(&[(path, content)]), &[]).unwrap_err();
    assert!(matches!(made(b"caf\xe9", contents(1)), UnsignableTree::Name(_)));
    assert!(matches!(made(b".git", Content::Symlink { target: b"x".as_slice().into() }), UnsignableTree::Link(_)));
    assert!(matches!(made(b"a", Content::File { size: 1, digest: None }), UnsignableTree::NoDigest(_)));
    assert_eq!(made(b".gitignore", contents(1)), UnsignableTree::Nothing);
}

#[test]
fn h26_every_flipped_bit_of_what_was_signed_and_every_other_key_is_refused() {
    let good = payload(|_| {});
    assert!(verify(&bundle(&good, |_| {}), key(7).public()).is_ok());
    for at in (0..good.len()).step_by(7) {
        let mut changed = good.clone();
        changed[at] ^= 1;
        let text = bundle(&good, |bundle| bundle["dsseEnvelope"]["payload"] = Base64::encode_string(&changed).into());
        assert_eq!(verify(&text, key(7).public()), Err(Refusal::Mismatch), "{at}");
    }
    let text = bundle(&good, |_| {});
    assert!(matches!(verify(&text, key(8).public()), Err(Refusal::OtherKey { .. })));
    // One that says that it is by the trusted key.
    let hint = key(8).public().hint().to_string();
    let text = bundle(&good, |bundle| bundle["verificationMaterial"]["publicKey"]["hint"] = hint.clone().into());
    assert_eq!(verify(&text, key(8).public()), Err(Refusal::Mismatch));
    assert!(matches!(verify(&text, key(7).public()), Err(Refusal::OtherKey { .. })));
}

#[test]
fn bundles_of_other_kinds_are_refused_as_what_they_are() {
    type Change = fn(&mut Value);
    let cases: [(Change, &str); 12] = [
        (|b| b["mediaType"] = "application/x\u{1b}".into(), "bundle of the kind 'application/x\\x1b'"),
        (|b| b["verificationMaterial"] = json!({"certificate": {"rawBytes": ""}}), "'keyless'"),
        (|b| b["verificationMaterial"] = json!({"x509CertificateChain": {"certificates": []}}), "'keyless'"),
        (|b| b["verificationMaterial"]["tlogEntries"] = json!([{"logIndex": "1"}]), "transparency log"),
        (|b| b["verificationMaterial"]["publicKey"]["hint"] = "\u{202e}".into(), "another key: \\xe2\\x80\\xae"),
        (|b| b["dsseEnvelope"]["signatures"][0]["keyid"] = "other".into(), "names its key 'other'"),
        (|b| b["dsseEnvelope"]["signatures"] = json!([]), "holds 0 signatures"),
        (|b| b["dsseEnvelope"]["payloadType"] = "text/plain".into(), "of the type 'text/plain'"),
        (|b| b["dsseEnvelope"]["payload"] = "!".into(), "not a signature of OpenSSF Model Signing"),
        (|b| b["dsseEnvelope"]["signatures"][0]["sig"] = "AAAA".into(), "not a signature of OpenSSF Model Signing"),
        (|b| b["dsseEnvelope"] = Value::Null, "not a signature of OpenSSF Model Signing"),
        (|b| *b = json!([]), "not a signature of OpenSSF Model Signing"),
    ];
    for (change, words) in cases {
        let said = verify(&bundle(&payload(|_| {}), change), key(7).public()).unwrap_err().to_string();
        assert!(said.contains(words), "{said}");
    }
    for text in ["", "\0", "{", "-----BEGIN SSH SIGNATURE-----"] {
        assert!(matches!(verify(text.as_bytes(), key(7).public()), Err(Refusal::Unreadable(_))), "{text}");
    }
    // Signatures of early versions say nothing of the key.
    for material in [json!({}), json!({"publicKey": {"rawBytes": "", "keyDetails": ""}, "tlogEntries": []})] {
        let text = bundle(&payload(|_| {}), |bundle| bundle["verificationMaterial"] = material.clone());
        assert!(verify(&text, key(7).public()).is_ok());
        assert_eq!(verify(&text, key(8).public()), Err(Refusal::Mismatch));
    }
}

#[test]
fn h12_well_signed_lists_that_make_no_sense_are_refused() {
    type Change = fn(&mut Value);
    let cases: [(Change, &str); 19] = [
        (|p| p["_type"] = "https://in-toto.io/Statement/v0.1".into(), "of type 'https://in-toto.io/Statement/v0.1'"),
        (|p| p["predicateType"] = "https://model_signing/Digests/v0.1".into(), "not 'https://model_signing/signature"),
        (|p| p["subject"] = json!([]), "about 0 subjects"),
        (|p| p["subject"][0]["digest"] = json!({"sha512": "00"}), "cannot be read: missing field"),
        (|p| p["subject"][0]["digest"]["sha256"] = "00".into(), "digest of its list does not fit"),
        (|p| p["predicate"]["serialization"]["method"] = "shards".into(), "by the method 'shards'"),
        (|p| p["predicate"]["serialization"]["hash_type"] = "blake3".into(), "of the kind 'blake3'"),
        (|p| p["predicate"]["resources"][1]["algorithm"] = "blake2".into(), "of the kind 'blake2'"),
        (|p| p["predicate"]["resources"][1]["digest"] = "AB".repeat(32).into(), "64 lower-case digits"),
        (|p| p["predicate"]["resources"][1]["digest"] = "".into(), "64 lower-case digits"),
        (|p| p["predicate"]["resources"][1]["name"] = "a".into(), "lists 'a' twice"),
        (|p| p["predicate"]["resources"][1]["name"] = "../up".into(), "has a '..' component"),
        (|p| p["predicate"]["resources"][1]["name"] = "/etc/passwd".into(), "is absolute"),
        (|p| p["predicate"]["resources"][1]["name"] = "x/./\u{1b}".into(), "'x/./\\x1b' is not an acceptable path"),
        (|p| p["predicate"]["resources"][1]["name"] = "\0".into(), "holds a NUL byte"),
        (|p| p["predicate"]["resources"][1]["name"] = "d/.lockstep/x".into(), "lockstep's own"),
        (|p| p["predicate"]["resources"] = json!([]), "lists nothing"),
        (|p| p["predicate"]["resources"][1]["digest"] = "00".repeat(32).into(), "digest of its list does not fit"),
        (|p| p["predicate"]["serialization"]["allow_symlinks"] = "no".into(), "cannot be read"),
    ];
    for (change, words) in cases {
        let said = judged(change).unwrap_err();
        assert!(said.contains(words), "{said}");
    }
    // Twice the same field: which of the two counts would be a matter of who reads it.
    let twice = String::from_utf8(payload(|_| {})).unwrap().replacen('{', "{\"subject\":[],", 1);
    let said = verify(&bundle(twice.as_bytes(), |_| {}), key(7).public()).unwrap_err().to_string();
    assert!(said.contains("duplicate field"), "{said}");
}

#[test]
fn another_order_and_more_fields_are_accepted_and_odd_paths_excuse_nothing() {
    let turned = judged(|payload| {
        let list = payload["predicate"]["resources"].as_array_mut().unwrap();
        list.reverse();
        let mut hash = sha2::Sha256::default();
        for resource in list {
            let digest = Digest::from_hex(resource["digest"].as_str().unwrap().as_bytes()).unwrap();
            sha2::Digest::update(&mut hash, digest.0);
        }
        let root = Digest(sha2::Digest::finalize(hash).into()).to_string();
        payload["subject"][0]["digest"]["sha256"] = root.into();
        payload["predicate"]["card"] = json!({"license": "x"});
        payload["predicate"]["serialization"]["ignore_paths"] = json!([".", "..", "/", "../x", "cache"]);
    })
    .unwrap();
    assert_eq!(turned.files.len(), 4);
    assert_eq!(turned.files[0].0, RelPath::new("z").unwrap());
    assert_eq!(turned.ignored, [RelPath::new("cache").unwrap()]);
    assert!(turned.ignores(&RelPath::new("cache/x").unwrap()) && !turned.ignores(&RelPath::new("cached").unwrap()));
}

#[test]
fn a_list_that_contradicts_a_signature_is_told_by_path() {
    let listed = |text: &[(&str, u8)]| {
        let digest = |digest: u8| (digest > 0).then_some(Digest([digest; 32]));
        text.iter().map(|(path, byte)| (RelPath::new(path).unwrap(), digest(*byte))).collect()
    };
    let good = [("a", 1), ("d/\u{e9}\n", 2), ("d/.gitignore", 3), ("z", 1), (".gitattributes", 0), ("own", 9)];
    let own = RelPath::new("own").unwrap();
    assert_eq!(disagreements(&statement(), &listed(&good), Some(&own)), [""; 0]);
    let bad = [("a", 2), ("d/\u{e9}\n", 2), ("d/.gitignore", 0), ("x", 1), ("link", 0), ("own", 9)];
    assert_eq!(
        disagreements(&statement(), &listed(&bad), None),
        [
            "'a' is signed with another digest",
            "'d/.gitignore' is signed as a file and listed as a link",
            "'link' is a link, which is not signed",
            "'own' is listed but not signed",
            "'x' is listed but not signed",
            "'z' is signed but not listed",
        ]
    );
}
