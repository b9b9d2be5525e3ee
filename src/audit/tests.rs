//! Lines that are written, read back, tampered with, signed and rotated.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use ssh_key::PrivateKey;
use ssh_key::private::{Ed25519Keypair, KeypairData};

use super::event::{Event, Query};
use super::*;
use crate::root::Root;

fn key(seed: u8) -> PrivateKey {
    PrivateKey::new(KeypairData::Ed25519(Ed25519Keypair::from_seed(&[seed; 32])), "").unwrap()
}

fn of(path: &str) -> AuditRecord {
    AuditRecord { action: "publish".into(), path: path.into(), ..AuditRecord::default() }
}

fn log(paths: &[&str]) -> (tempfile::TempDir, Root) {
    written(paths, &Settings::default())
}

fn written(paths: &[&str], settings: &Settings) -> (tempfile::TempDir, Root) {
    let at = tempfile::tempdir().unwrap();
    let root = Root::open(at.path()).unwrap();
    more(&root, paths, settings);
    (at, root)
}

fn more(root: &Root, paths: &[&str], settings: &Settings) {
    for path in paths {
        let mut log = AuditLog::open_with(root, Arc::new(settings.clone())).unwrap();
        log.append(&[of(path), of(path)]).unwrap();
    }
}

/// Signs after so many lines.
fn signing(lines: u64) -> Settings {
    let signing = Signing { key: key(1), lines, every: Duration::from_secs(3600) };
    Settings { signing: Some(signing), ..Settings::default() }
}

/// A new file for each time that it is opened.
fn rotating(keep: Option<u32>) -> Settings {
    Settings { rotation: Rotation { bytes: Some(1), age: None, keep }, ..Settings::default() }
}

fn said(root: &Root) -> String {
    verify(root).unwrap_err().to_string()
}

fn at(directory: &Path, name: &str) -> std::path::PathBuf {
    directory.join(".lockstep").join(name)
}

#[test]
fn s13_lines_are_chained_over_runs() {
    let (_at, root) = log(&["a", "b\\n{}", "c"]);
    assert_eq!(verify(&root).unwrap().lines, 6);
}

#[test]
fn a_line_says_when_to_the_millisecond_and_since_which_boot_and_nothing_that_does_not_apply() {
    let (at, _root) = log(&["a"]);
    let text = std::fs::read_to_string(at.path().join(LOG)).unwrap();
    let line = text.lines().next().unwrap();
    let time = chrono::DateTime::parse_from_rfc3339(&Event::parse(line.as_bytes()).unwrap().time).unwrap();
    assert!((chrono::Utc::now() - time.to_utc()).num_seconds() < 60);
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
    let before = line.split("\"action\"").next().unwrap();
    assert!(before.ends_with(&format!("Z\",\"boot\":\"{}\",", boot.trim())), "{line}");
    assert_eq!(before.rsplit_once('.').unwrap().1.find('Z'), Some(3), "{line}");
    assert!(line.contains("\"action\":\"publish\",\"path\":\"a\",\"previous\":"), "{line}");
}

#[test]
fn h60_each_kind_of_tampering_names_the_line() {
    type Damage = fn(&mut Vec<String>);
    let cases: [(Damage, u64); 5] = [
        (|lines| lines[2] = lines[2].replace("publish", "nothing"), 3),
        (|lines| drop(lines.remove(1)), 2),
        (|lines| lines.swap(3, 4), 4),
        (|lines| drop(lines.pop()), 6),
        (|lines| lines.clear(), 1),
    ];
    for (damage, expected) in cases {
        let (at, root) = log(&["a", "b", "c"]);
        let path = at.path().join(LOG);
        let text = std::fs::read_to_string(&path).unwrap();
        let mut lines: Vec<String> = text.lines().map(|line| format!("{line}\n")).collect();
        damage(&mut lines);
        std::fs::write(&path, lines.concat()).unwrap();
        match verify(&root) {
            Err(AuditError::Broken { line, .. }) => assert_eq!(line, expected),
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn h60_a_cut_line_is_named_and_a_torn_one_that_was_never_acknowledged_is_dropped() {
    let (at, root) = log(&["a"]);
    let path = at.path().join(LOG);
    let text = std::fs::read(&path).unwrap();
    std::fs::write(&path, &text[..text.len() - 5]).unwrap();
    assert!(matches!(verify(&root), Err(AuditError::Broken { line: 2, .. })));
    assert!(AuditLog::open(&root).is_err());
    std::fs::write(&path, [&text[..], b"{\"sequence\":3"].concat()).unwrap();
    // Before anybody writes again it is told, and is no tampering.
    let seen = inspect(&root, &mut |_, _| {}).unwrap();
    assert!(seen.unfinished && seen.head.lines == 2);
    // Who only opens it writes nothing.
    drop(AuditLog::open(&root).unwrap());
    let mut again = AuditLog::open(&root).unwrap();
    again.append(&[of("b")]).unwrap();
    again.append(&[of("c")]).unwrap();
    drop(again);
    let mut actions = Vec::new();
    let seen = inspect(&root, &mut |_, line| actions.push(Event::parse(line).unwrap().action)).unwrap();
    assert!(!seen.unfinished);
    assert_eq!(actions[2..], ["gap", &actions[3], &actions[4]]);
    assert_eq!(actions.len(), 5);
    // One that was acknowledged is missed, however it is cut.
    let text = std::fs::read(&path).unwrap();
    std::fs::write(&path, &text[..text.len() - 5]).unwrap();
    assert!(matches!(verify(&root), Err(AuditError::Broken { line: 5, .. })));
}

#[test]
fn h60_a_head_that_is_signed_does_not_go_behind_a_torn_line() {
    let (at, root) = log(&["a"]);
    let path = at.path().join(LOG);
    let mut text = std::fs::read(&path).unwrap();
    text.extend(b"{\"sequ");
    std::fs::write(&path, text).unwrap();
    let mut again = AuditLog::open_with(&root, Arc::new(signing(1))).unwrap();
    again.append_last([]).unwrap();
    drop(again);
    let mut actions = Vec::new();
    inspect(&root, &mut |_, line| actions.push(Event::parse(line).unwrap().action)).unwrap();
    assert_eq!(actions[actions.len() - 2..], ["gap", "head"]);
}

#[test]
fn lines_of_before_are_read_and_gone_on_with() {
    let at = tempfile::tempdir().unwrap();
    let root = Root::open(at.path()).unwrap();
    std::fs::create_dir(at.path().join(".lockstep")).unwrap();
    // As version 0.1.0 has written them.
    let old = include_str!("old.jsonl");
    std::fs::write(at.path().join(LOG), old).unwrap();
    assert_eq!(verify(&root).unwrap().lines, 3);
    let event = Event::parse(old.lines().next().unwrap().as_bytes()).unwrap();
    assert_eq!((event.path.as_deref(), event.boot), (Some("weights.bin"), None));
    more(&root, &["new"], &signing(1));
    let verified = inspect(&root, &mut |_, _| {}).unwrap();
    assert_eq!((verified.head.lines, verified.signed.len(), verified.backwards), (6, 1, Vec::new()));
}

#[test]
fn h39_a_clock_that_was_set_back_is_told_and_no_error() {
    let (at, root) = log(&["a"]);
    let path = at.path().join(LOG);
    let text = std::fs::read_to_string(&path).unwrap();
    let head = head_of(text.as_bytes(), true).unwrap().0;
    // A day later, as this clock has it; the line after it is of today again.
    let (line, head) = lines(head, [of("b")]).unwrap();
    let year = &text[text.find("\"time\":\"").unwrap() + 8..][..4];
    let later = String::from_utf8(line).unwrap().replacen(&format!("\"time\":\"{year}"), "\"time\":\"2999", 1);
    let body = later.split(",\"hash\"").next().unwrap();
    let hash = crate::manifest::Digest(<sha2::Sha256 as sha2::Digest>::digest(body.as_bytes()).into());
    let later = format!("{body},\"hash\":\"{hash}\"}}\n");
    let (last, head) = lines(Head { lines: head.lines, hash }, [of("c")]).unwrap();
    std::fs::write(&path, [text.as_bytes(), later.as_bytes(), &last].concat()).unwrap();
    std::fs::write(at.path().join(HEAD), head.encode()).unwrap();
    let verified = inspect(&root, &mut |_, _| {}).unwrap();
    assert_eq!(verified.head.lines, 4);
    assert_eq!(verified.backwards.len(), 1);
    assert_eq!((verified.backwards[0].line, verified.backwards[0].before.starts_with("2999")), (4, true));
}

#[test]
fn h60_heads_are_signed_at_intervals_and_at_the_end_and_count_by_their_key_alone() {
    let (_at, root) = written(&["a", "b", "c"], &signing(4));
    let signed = || inspect(&root, &mut |_, _| {}).unwrap().signed;
    // The first one since there was none, then after four lines.
    assert_eq!(signed().iter().map(|one| one.line).collect::<Vec<_>>(), [3, 8]);
    let settings = Arc::new(signing(4));
    AuditLog::open_with(&root, Arc::clone(&settings)).unwrap().append_last([of("d")]).unwrap();
    AuditLog::open_with(&root, settings).unwrap().append_last([]).unwrap();
    let signed = signed();
    assert_eq!(signed.iter().map(|one| one.line).collect::<Vec<_>>(), [3, 8, 10], "what is signed is not signed again");
    let trusted = |seed: u8| Trusted::Key(Box::new(key(seed).public_key().key_data().clone()));
    for one in &signed {
        assert!(trusted(1).judge(one.head, &one.signature, one.time).is_ok());
        assert!(trusted(2).judge(one.head, &one.signature, one.time).is_err(), "another key");
        let other = Head { lines: one.head.lines + 1, ..one.head };
        assert!(trusted(1).judge(other, &one.signature, one.time).is_err(), "another head");
    }
}

#[test]
fn h60_a_signature_of_a_manifest_signs_no_log() {
    let (own, head) = (key(1), Head::EMPTY);
    let text = head.encode();
    let made = ssh_key::SshSig::sign(&own, crate::signature::NAMESPACE, ssh_key::HashAlg::Sha512, text.as_bytes());
    let made = made.unwrap().to_pem(ssh_key::LineEnding::LF).unwrap();
    let trusted = Trusted::Key(Box::new(own.public_key().key_data().clone()));
    let refused = trusted.judge(head, &made, 0).unwrap_err()[0].to_string();
    assert!(refused.contains("for something else than an audit log"), "{refused}");
}

#[test]
fn the_chain_goes_on_over_files_that_are_rotated() {
    let (at, root) = written(&["a", "b", "c"], &rotating(None));
    let verified = inspect(&root, &mut |_, _| {}).unwrap();
    assert_eq!(verified.files, ["audit-000001.jsonl", "audit-000002.jsonl", "audit.jsonl"]);
    assert_eq!((verified.head.lines, verified.removed), (8, None));
    let mut seen = Vec::new();
    raw(&root, &mut |line| seen.push(Event::parse(line).unwrap().sequence)).unwrap();
    assert_eq!(seen, (1..=8).collect::<Vec<_>>());
    for (gone, what) in [
        ("audit-000001.jsonl", "line 2: 'audit-000001.jsonl' is not there, and no line says that it was removed"),
        ("audit-000002.jsonl", "line 3: 'audit-000002.jsonl' is not there, and the log goes on from it"),
        ("audit.jsonl", "'audit.jsonl' is not there, and rotated files are"),
    ] {
        let kept = std::fs::read(self::at(at.path(), gone)).unwrap();
        std::fs::remove_file(self::at(at.path(), gone)).unwrap();
        assert!(said(&root).contains(what), "{gone}: {}", said(&root));
        std::fs::write(self::at(at.path(), gone), kept).unwrap();
    }
    assert!(verify(&root).is_ok());
    more(&root, &["d"], &rotating(None));
    std::fs::remove_file(self::at(at.path(), "audit-000002.jsonl")).unwrap();
    assert!(said(&root).contains("'audit-000002.jsonl' is not there, and later files are"), "{}", said(&root));
}

#[test]
fn files_that_are_too_much_go_after_the_log_says_so() {
    let (at, root) = written(&["a", "b", "c", "d"], &rotating(Some(1)));
    let verified = inspect(&root, &mut |_, _| {}).unwrap();
    assert_eq!(verified.files, ["audit-000003.jsonl", "audit.jsonl"]);
    assert_eq!(verified.removed.unwrap().path, "audit-000002.jsonl");
    // What was there at the start of the check is removed by hand: nothing says so of the third.
    std::fs::remove_file(self::at(at.path(), "audit-000003.jsonl")).unwrap();
    assert!(said(&root).contains("'audit-000003.jsonl' is not there"), "{}", said(&root));
}

#[test]
fn a_file_is_rotated_by_the_age_of_its_first_line() {
    let day = Duration::from_secs(86_400);
    let rotation = Rotation { age: Some(day), ..Rotation::default() };
    let (_at, root) = log(&["a"]);
    let file = root.open_read(&crate::path::RelPath::new(LOG).unwrap(), crate::root::Follow::Never).unwrap();
    let now = std::time::SystemTime::now();
    assert!(!rotate::due(&rotation, &file, 100, now));
    assert!(rotate::due(&rotation, &file, 100, now + day + day));
    assert!(!rotate::due(&rotation, &file, 0, now + day + day), "an empty file stays");
}

#[test]
fn a_rotation_that_was_cut_off_is_taken_back() {
    let (at, root) = log(&["a"]);
    let (log, early) = (at.path().join(LOG), self::at(at.path(), "audit-000001.jsonl"));
    std::fs::hard_link(&log, &early).unwrap();
    std::fs::write(self::at(at.path(), "audit.jsonl.new"), "half a li").unwrap();
    assert_eq!(inspect(&root, &mut |_, _| {}).unwrap().files, ["audit.jsonl"]);
    more(&root, &["b"], &Settings::default());
    assert!(!early.exists());
    assert_eq!(verify(&root).unwrap().lines, 4);
    more(&root, &["c"], &rotating(None));
    assert_eq!(verify(&root).unwrap().lines, 7);
}

#[test]
fn who_waited_for_a_file_that_was_rotated_writes_to_the_new_one() {
    let (_at, root) = log(&["a"]);
    let (root, settings) = (Arc::new(root), Arc::new(rotating(None)));
    let threads: Vec<_> = (0..8)
        .map(|number| {
            let (root, settings) = (Arc::clone(&root), Arc::clone(&settings));
            std::thread::spawn(move || {
                for _ in 0..10 {
                    let mut log = AuditLog::open_with(&root, Arc::clone(&settings)).unwrap();
                    log.append(&[of(&number.to_string())]).unwrap();
                }
            })
        })
        .collect();
    threads.into_iter().for_each(|thread| thread.join().unwrap());
    let verified = inspect(&root, &mut |_, _| {}).unwrap();
    assert_eq!((verified.head.lines, verified.files.len()), (2 + 160, 81));
}

#[test]
fn what_is_wanted_of_the_lines_is_found_by_who_what_when_and_what_came_of_it() {
    let event = Event {
        time: "2026-01-31T06:59:02.123Z".into(),
        actor: Some("ana@gpu01".into()),
        key: Some("SHA256:abc".into()),
        action: "publish".into(),
        path: Some("a/b".into()),
        ..Event::default()
    };
    let time = |text: &str| Some(chrono::DateTime::parse_from_rfc3339(text).unwrap().to_utc());
    let some = |text: &str| Some(text.to_owned());
    let all = Query::default();
    for (query, wanted) in [
        (all.clone(), true),
        (Query { since: time("2026-01-31T06:59:02.123Z"), ..all.clone() }, true),
        (Query { until: time("2026-01-31T06:59:02.123Z"), ..all.clone() }, false),
        (Query { since: time("2026-02-01T00:00:00Z"), ..all.clone() }, false),
        (Query { actor: some("ana"), ..all.clone() }, true),
        (Query { actor: some("SHA256:ab"), ..all.clone() }, true),
        (Query { actor: some("bob"), ..all.clone() }, false),
        (Query { actions: vec!["remove".into(), "publish".into()], ..all.clone() }, true),
        (Query { actions: vec!["remove".into()], ..all.clone() }, false),
        (Query { path: some("a/"), ..all.clone() }, true),
        (Query { path: some("a/b/c"), ..all.clone() }, false),
        (Query { path: some("a/"), result: Some(Outcome::Failure), ..all.clone() }, false),
    ] {
        assert_eq!(query.admits(&event), wanted, "{query:?}");
    }
}
