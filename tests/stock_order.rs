//! In which order a stock server is asked for what has to be on its disk, and what may go before an answer.

use std::fs;
use std::sync::{Arc, Mutex};

use super::stock_faults::version;
use super::stock_pipes::{Hook, Pair, nothing};

const WRITE: u8 = 6;
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
fn h14_nothing_is_made_behind_a_link_that_stands_where_lockstep_keeps_its_own_things() {
    for (name, root) in [("target/.lockstep", true), (".target.lockstep", false)] {
        let pair = Pair::new();
        pair.write("file", "content");
        fs::create_dir(pair.at("elsewhere")).unwrap();
        if root {
            fs::create_dir(pair.at("target")).unwrap();
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
