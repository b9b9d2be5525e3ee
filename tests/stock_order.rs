//! In which order a stock server is asked for what has to be on its disk.

use std::sync::{Arc, Mutex};

use super::stock_faults::version;
use super::stock_pipes::{Hook, Pair, nothing};

const WRITE: u8 = 6;
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
