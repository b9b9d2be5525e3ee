//! In which order a stock server is asked for what has to be on its disk, and what may go before an answer.

use std::fs;
use std::io::Write as _;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use lockstep::audit::{self, AuditLog, AuditRecord, Rotation, Settings};
use lockstep::endpoint::Error;
use lockstep::root::Root;

use super::stock_faults::version;
use super::stock_pipes::{Hook, Pair, nothing};
use crate::kit::until;

const VERSION: u8 = 2;
const WRITE: u8 = 6;
const LSTAT: u8 = 7;
const FSETSTAT: u8 = 10;
const READDIR: u8 = 12;
const RENAME: u8 = 18;
const EXTENDED: u8 = 200;

/// The string that starts here, and what follows it.
fn string(bytes: &[u8]) -> (&[u8], &[u8]) {
    let (length, rest) = bytes.split_at(4);
    rest.split_at(u32::from_be_bytes(length.try_into().unwrap()) as usize)
}

/// What is asked for, as far as it concerns what is on the disk, in its order.
#[derive(Debug, PartialEq)]
enum Asked {
    /// The handle, and the end of what is written.
    Write(Vec<u8>, Vec<u8>),
    Sync(Vec<u8>),
    Rename(String),
}

#[test]
fn h33_each_file_is_on_the_disk_before_it_is_named_and_what_points_to_it_comes_after() {
    let pair = Pair::new();
    version(&pair, 1);
    pair.push(nothing(), nothing(), false).unwrap();
    version(&pair, 2);
    let asked = Arc::new(Mutex::new(Vec::new()));
    let log = Arc::clone(&asked);
    let watch: Hook = Arc::new(move |packet| {
        let noted = match packet[0] {
            WRITE => {
                let (handle, rest) = string(&packet[5..]);
                let data = string(&rest[8..]).0;
                Some(Asked::Write(handle.to_vec(), data[data.len().saturating_sub(8)..].to_vec()))
            }
            EXTENDED => match string(&packet[5..]) {
                (b"fsync@openssh.com", rest) => Some(Asked::Sync(string(rest).0.to_vec())),
                (b"posix-rename@openssh.com", rest) => {
                    let to = string(string(rest).1).0;
                    Some(Asked::Rename(String::from_utf8_lossy(to).into_owned()))
                }
                _ => None,
            },
            RENAME => Some(Asked::Rename(String::from_utf8_lossy(string(string(&packet[5..]).1).0).into_owned())),
            _ => None,
        };
        log.lock().unwrap().extend(noted);
        true
    });
    pair.push(watch, nothing(), false).unwrap();
    pair.in_step();
    let asked = asked.lock().unwrap();
    let renamed = |name: &str| -> usize {
        let found = asked.iter().rposition(|one| matches!(one, Asked::Rename(to) if to.ends_with(name)));
        found.unwrap_or_else(|| panic!("nothing is named {name}: {asked:?}"))
    };
    let record = renamed("/commit");
    for (content, name) in
        [(&b"22222222"[..], "target/checkpoint-2"), (b", longer", "target/config"), (b"2", "target/latest")]
    {
        let mut found = 0;
        for (at, one) in asked.iter().enumerate() {
            let Asked::Write(handle, data) = one else { continue };
            if data != content {
                continue;
            }
            found += 1;
            let synced = asked[at..].iter().position(|later| *later == Asked::Sync(handle.clone())).map(|by| at + by);
            let synced = synced.unwrap_or_else(|| panic!("what {name} holds is never brought to the disk"));
            assert!(synced < record && record < renamed(name), "{name} is named at {}: {asked:?}", renamed(name));
        }
        assert!(found > 0, "{name}: {asked:?}");
    }
    let pointer = renamed("target/latest");
    assert!(renamed("target/checkpoint-2") < pointer && renamed("target/config") < pointer, "{asked:?}");
    assert!(pointer < renamed(".lockstep/manifest"), "the manifest lists what has no name yet: {asked:?}");
    // The record and the manifest are on the disk before they have their names.
    for name in ["/commit", ".lockstep/manifest"] {
        let before = &asked[..renamed(name)];
        let written = before.iter().rposition(|one| matches!(one, Asked::Write(..))).unwrap();
        let last = before.iter().rposition(|one| matches!(one, Asked::Sync(_))).unwrap();
        assert!(written < last, "{name}: {asked:?}");
    }
}

#[test]
fn h33_what_an_earlier_run_had_not_brought_to_the_disk_is_brought_there() {
    let syncs = |pair: &Pair| {
        let counter = Arc::new(AtomicUsize::new(0));
        let counts = Arc::clone(&counter);
        let hook: Hook = Arc::new(move |packet| {
            let is_sync = packet[0] == EXTENDED && string(&packet[5..]).0 == b"fsync@openssh.com";
            counts.fetch_add(usize::from(is_sync), Ordering::Relaxed);
            true
        });
        assert!(pair.push(hook, nothing(), false).unwrap().is_complete());
        pair.in_step();
        counter.load(Ordering::Relaxed)
    };
    let pairs = [Pair::new(), Pair::new()];
    for pair in &pairs {
        pair.write("large", vec![7; 400_000]);
    }
    let staged = pairs[1].at(".target.lockstep/.lockstep/staging/sftp/tree/large");
    let lying = staged.clone();
    let cut: Hook = Arc::new(move |packet| {
        let is_sync = packet[0] == EXTENDED && string(&packet[5..]).0 == b"fsync@openssh.com";
        if !is_sync || !lying.exists() {
            return true;
        }
        until("all of it is there", || fs::metadata(&lying).unwrap().len() == 400_000);
        false
    });
    assert!(pairs[1].push(cut, nothing(), false).is_err());
    assert_eq!(fs::metadata(&staged).unwrap().len(), 400_000);
    assert_eq!(syncs(&pairs[0]), syncs(&pairs[1]));
}

#[test]
fn h14_nothing_is_made_behind_a_link_that_stands_where_lockstep_keeps_its_own_things() {
    for (name, above) in [
        ("target/.lockstep", Some("target")),
        (".target.lockstep", None),
        ("target/.lockstep/staging", Some("target/.lockstep")),
        ("target/.lockstep/staging/sftp", Some("target/.lockstep/staging")),
    ] {
        let pair = Pair::new();
        pair.write("file", "content");
        fs::create_dir(pair.at("elsewhere")).unwrap();
        if let Some(above) = above {
            fs::create_dir_all(pair.at(above)).unwrap();
        }
        std::os::unix::fs::symlink(pair.at("elsewhere"), pair.at(name)).unwrap();
        let touched = Arc::new(Mutex::new(false));
        let (seen, elsewhere) = (Arc::clone(&touched), pair.at("elsewhere"));
        // What is asked next finds what was made by the request before, however short it was there.
        let watch: Hook = Arc::new(move |_| {
            *seen.lock().unwrap() |= fs::read_dir(&elsewhere).unwrap().next().is_some();
            true
        });
        let refused = pair.push(Arc::clone(&watch), watch, false).unwrap_err();
        assert!(refused.to_string().contains("is not a directory"), "{refused}");
        assert!(!*touched.lock().unwrap() && fs::read_dir(pair.at("elsewhere")).unwrap().next().is_none(), "{name}");
    }
}

#[test]
fn h35_a_lock_that_was_taken_over_is_left_alone_by_a_run_that_has_nothing_to_do() {
    let pair = Pair::new();
    pair.write("file", "content");
    let hour_ago = std::time::SystemTime::now() - std::time::Duration::from_secs(3600);
    fs::File::options().write(true).open(pair.at("source/file")).unwrap().set_modified(hour_ago).unwrap();
    pair.push(nothing(), nothing(), false).unwrap();
    let lock = pair.at("target/.lockstep/lock.sftp");
    let thief = r#"{"actor":"thief@there","machine":"","pid":1,"started":1,"token":"t"}"#;
    let stolen = lock.clone();
    let steal: Hook = Arc::new(move |packet| {
        if packet[0] == READDIR {
            fs::remove_file(&stolen).ok();
            fs::write(&stolen, thief).unwrap();
        }
        true
    });
    let done = pair.push(steal, nothing(), false).unwrap().committed.unwrap();
    assert_eq!((done.generation, done.published), (1, 0));
    assert_eq!(fs::read_to_string(&lock).unwrap(), thief);
    // Its own it gives up, with what it wrote to find out that it is its own.
    fs::remove_file(&lock).unwrap();
    pair.push(nothing(), nothing(), false).unwrap();
    assert!(!lock.exists());
}

/// A target that has the file `file`, whose time proves it.
fn pushed() -> Pair {
    let pair = Pair::new();
    pair.write("file", "content");
    let hour_ago = std::time::SystemTime::now() - std::time::Duration::from_secs(3600);
    fs::File::options().write(true).open(pair.at("source/file")).unwrap().set_modified(hour_ago).unwrap();
    pair.push(nothing(), nothing(), false).unwrap();
    pair
}

/// Does something once, before what has its name given by a request that ends like this.
fn before_named(end: &'static str, act: impl Fn() + Send + Sync + 'static) -> Hook {
    let done = AtomicBool::new(false);
    Arc::new(move |packet| {
        let renames = packet.windows(12).any(|bytes| bytes == b"posix-rename") && packet.ends_with(end.as_bytes());
        if renames && !done.swap(true, Ordering::Relaxed) {
            act();
        }
        true
    })
}

#[test]
fn h35_what_another_staged_who_took_the_lock_over_is_left_alone_by_a_run_that_has_nothing_to_do() {
    let pair = pushed();
    let staging = pair.at("target/.lockstep/staging/sftp");
    fs::create_dir_all(staging.join("tree")).unwrap();
    let (lock, theirs) = (pair.at("target/.lockstep/lock.sftp"), ["commit", "manifest", "tree/theirs"]);
    let at = staging.clone();
    let steal = before_named("staging/sftp/plan", move || {
        fs::remove_file(&lock).unwrap();
        fs::write(&lock, r#"{"actor":"thief@there","machine":"","pid":1,"started":1,"token":"t"}"#).unwrap();
        theirs.iter().for_each(|name| fs::write(at.join(name), "theirs").unwrap());
    });
    let refused = pair.push(steal, nothing(), false).unwrap_err();
    assert!(matches!(&refused, Error::Locked { holder, .. } if holder.contains("thief@there")), "{refused}");
    theirs.iter().for_each(|name| assert_eq!(fs::read_to_string(staging.join(name)).unwrap(), "theirs", "{name}"));
}

#[test]
fn h32_a_run_whose_manifest_is_taken_from_it_has_not_published() {
    let pair = pushed();
    pair.write("file", "other content");
    let manifest = pair.at("target/.lockstep/staging/sftp/manifest");
    // One that an earlier run left is gone before this one gives its own the name.
    fs::create_dir_all(manifest.parent().unwrap()).unwrap();
    fs::write(&manifest, "stale").unwrap();
    let (left, stale) = (Arc::new(AtomicBool::new(true)), manifest.clone());
    let seen = Arc::clone(&left);
    let look = before_named("staging/sftp/manifest", move || seen.store(stale.exists(), Ordering::Relaxed));
    let gone = before_named("target/.lockstep/manifest", move || fs::remove_file(&manifest).unwrap());
    let both: Hook = Arc::new(move |packet| look(packet) && gone(packet));
    let refused = pair.push(both, nothing(), false).unwrap_err();
    assert!(refused.to_string().contains("put in force"), "{refused}");
    assert!(!left.load(Ordering::Relaxed));
    pair.push(nothing(), nothing(), false).unwrap();
    pair.in_step();
}

#[test]
fn h32_what_cannot_be_looked_at_is_not_taken_for_missing() {
    for name in ["staging/current/commit", "staging", "staging/sftp", "staging/sftp/commit"] {
        let pair = pushed();
        pair.write("file", "other content");
        let number = Arc::new(Mutex::new(None));
        let (noted, end) = (Arc::clone(&number), format!(".lockstep/{name}"));
        let note: Hook = Arc::new(move |packet| {
            if packet[0] == LSTAT && packet.ends_with(end.as_bytes()) {
                noted.lock().unwrap().get_or_insert(packet[1..5].to_vec());
            }
            true
        });
        let refuse: Hook = Arc::new(move |packet| {
            if number.lock().unwrap().as_ref().is_some_and(|number| packet[1..5] == number[..]) {
                let code = 3_u32.to_be_bytes();
                *packet = [&[101], &packet[1..5], &code[..], &[0; 8]].concat();
            }
            true
        });
        let refused = pair.push(note, refuse, false).unwrap_err();
        assert!(matches!(refused, Error::Io { operation: "look at", .. }), "{name}: {refused}");
        assert_eq!(fs::read(pair.at("target/file")).unwrap(), b"content");
    }
}

/// A server that has no fsync.
fn no_fsync() -> Hook {
    Arc::new(|packet| {
        let name = packet.windows(17).position(|bytes| bytes == b"fsync@openssh.com");
        if let Some(at) = name.filter(|_| packet[0] == VERSION) {
            packet[at] = b'F';
        }
        true
    })
}

/// Writes a line to the log of a target, as who is there may at any time.
fn tell(target: &Path, rotated: bool) {
    let root = Root::open(target).unwrap();
    let rotation = Rotation { bytes: rotated.then_some(1), ..Rotation::default() };
    let mut log = AuditLog::open_with(&root, Arc::new(Settings { rotation, ..Settings::default() })).unwrap();
    log.append(&[AuditRecord { action: "check".into(), ..AuditRecord::default() }]).unwrap();
}

#[test]
fn h35_lines_that_others_write_to_the_log_meanwhile_stay_in_it() {
    for rotated in [false, true] {
        for at in ["staging/sftp/plan", "staging/sftp/commit", "target/file"] {
            let pair = pushed();
            pair.write("file", "other content");
            let target = pair.at("target");
            let told = before_named(at, move || tell(&target, rotated));
            // The log is closed after each writing where that is all that brings it to the disk.
            pair.push(told, if rotated { no_fsync() } else { nothing() }, false).unwrap();
            pair.in_step();
            audit::verify(&Root::open(&pair.at("target")).unwrap()).unwrap();
            let log = fs::read_to_string(pair.at("target/.lockstep/audit.jsonl")).unwrap();
            assert_eq!(log.matches(r#""action":"check""#).count(), 1, "{at}, {rotated}: {log}");
            assert_eq!(log.matches(r#""action":"publish""#).count(), if rotated { 1 } else { 2 }, "{at}: {log}");
        }
    }
}

#[test]
fn h60_only_what_a_crash_left_of_a_line_is_cut_off_from_the_log() {
    for left in ["", r#"{"half"#] {
        let pair = pushed();
        pair.write("file", "other content");
        let log = pair.at("target/.lockstep/audit.jsonl");
        fs::File::options().append(true).open(&log).unwrap().write_all(left.as_bytes()).unwrap();
        let cuts = Arc::new(AtomicUsize::new(0));
        let counts = Arc::clone(&cuts);
        // With nothing but a size.
        let count: Hook = Arc::new(move |packet| {
            let cut = packet[0] == FSETSTAT && string(&packet[5..]).1.starts_with(&1_u32.to_be_bytes());
            counts.fetch_add(usize::from(cut), Ordering::Relaxed);
            true
        });
        pair.push(count, nothing(), false).unwrap();
        assert_eq!(cuts.load(Ordering::Relaxed), usize::from(!left.is_empty()));
        audit::verify(&Root::open(&pair.at("target")).unwrap()).unwrap();
        let text = fs::read_to_string(&log).unwrap();
        assert!(!text.contains(r#"{"half{"#));
        assert_eq!(text.matches(r#""action":"gap""#).count(), usize::from(!left.is_empty()), "{text}");
    }
}
