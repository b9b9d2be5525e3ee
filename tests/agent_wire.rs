//! The agent's extensions spoken by hand to `lockstep sftp-server`: what breaks the rules is refused whole, with path and
//! reason, leaves the target as it was and nothing in staging, and is in the audit log.

use lockstep::endpoint::Committed;
use lockstep::manifest::Content;
use lockstep::path::RelPath;
use lockstep::wire::buffer::Reader;

use crate::kit::agent::{Agent, SIZE, coded, file, lines, listed, put, sha256, string, write, zstd};
use crate::kit::raw::Server;

/// One name among good ones is refused, and the good ones with it.
#[track_caller]
fn refused_name(name: &[u8], shown: &str, reason: &str) {
    for content in [file(0), Content::Directory, Content::Symlink { target: (*b"old").into() }] {
        let mut agent = Agent::new();
        agent.begin("/data").unwrap();
        let raw = [listed(b"good", file(4)), listed(name, content)].concat();
        let answer = agent.entries(&raw);
        agent.assert_rejected(answer, shown, reason);
    }
    // As what a hard link leads to.
    let mut agent = Agent::new();
    agent.begin("/data").unwrap();
    let first = Content::HardLink { first: RelPath::new("x").unwrap() };
    let linked = listed(b"link", first);
    let at = linked.windows(5).position(|bytes| bytes == b"\0\0\0\x01x").unwrap();
    let raw = [&listed(b"good", file(4)), &linked[..at], &string(name), &linked[at + 5..]].concat();
    let answer = agent.entries(&raw);
    agent.assert_rejected(answer, shown, reason);
}

#[test]
fn h01_h02_h03_h04_names_that_are_none_reject_the_run() {
    for (name, shown, reason) in [
        (&b"../outside"[..], "'../outside'", "'..' component"),
        (b"sub/../../outside", "'sub/../../outside'", "'..' component"),
        (b"..", "'..'", "'..' component"),
        (b"/etc/passwd", "'/etc/passwd'", "absolute"),
        (b"", "''", "empty"),
        (b".", "'.'", "'.' component"),
        (b"a//b", "'a//b'", "empty component"),
        (b"a/", "'a/'", "empty component"),
        (b"a\0b", "'a\\x00b'", "NUL"),
    ] {
        refused_name(name, shown, reason);
    }
}

#[test]
fn h05_names_and_paths_that_are_too_long_reject_the_run() {
    let long = vec![b'n'; 256];
    refused_name(&long, &"n".repeat(256), "longer than 255 bytes");
    let deep = [&b"d/".repeat(2047)[..], b"xy"].concat();
    assert_eq!(deep.len(), 4096);
    refused_name(&deep, "d/d/d", "longer than 4095 bytes");
    // The longest name there may be is taken.
    let mut agent = Agent::new();
    agent.begin("/data").unwrap();
    agent.entries(&listed(&long[1..], file(0))).unwrap();
    agent.ask("diff", &[]).unwrap();
    agent.ask("put", &put(&[(0, b"")])).unwrap();
    agent.commit().unwrap();
    assert!(agent.path("data").join("n".repeat(255)).exists());
}

#[test]
fn h07_h11_a_name_twice_and_a_file_that_is_a_directory_too_reject_the_run() {
    for (rows, path, reason) in [
        (vec![listed(b"good", file(4)), listed(b"twin", file(0)), listed(b"twin", file(9))], "'twin'", "listed twice"),
        (vec![listed(b"twin", file(0)), listed(b"good", file(4)), listed(b"twin", file(9))], "'good'", "do not ascend"),
        (vec![listed(b"twin", file(0)), listed(b"twin", Content::Directory)], "'twin'", "listed twice"),
        (vec![listed(b"both", file(0)), listed(b"both/below", file(0))], "'both/below'", "not a directory"),
        (vec![listed(b"both/a/b", file(0)), listed(b"both", file(0))], "'both'", "do not ascend"),
        (
            vec![listed(b"both", Content::Symlink { target: (*b"/etc").into() }), listed(b"both/f", file(0))],
            "'both/f'",
            "not a directory",
        ),
    ] {
        // In one message, and in one for each row.
        for split in [false, true] {
            let mut agent = Agent::new();
            agent.begin("/data").unwrap();
            let taken = match split {
                false => agent.entries(&rows.concat()),
                true => rows.iter().try_fold(Vec::new(), |_, row| agent.entries(row)),
            };
            let answer = taken.and_then(|_| agent.ask("diff", &[]));
            agent.assert_rejected(answer, path, reason);
        }
    }
}

#[test]
fn what_lockstep_keeps_for_itself_is_no_place_for_a_file() {
    for name in [&b".lockstep/manifest"[..], b"sub/.lockstep"] {
        let mut agent = Agent::new();
        agent.begin("/data").unwrap();
        agent.entries(&listed(name, file(0))).unwrap();
        let refused = agent.ask("diff", &[]).unwrap_err();
        assert!(refused.contains("keeps for itself"), "{refused}");
        assert!(agent.commit().is_err());
        drop(agent.server.take());
        agent.assert_untouched(&refused);
        let log = lines(&agent.path("data"));
        let told = log.iter().any(|line| {
            line["action"] == "refuse" && line["reason"].as_str().unwrap().contains(std::str::from_utf8(name).unwrap())
        });
        assert!(told, "{log:?}");
    }
}

#[test]
fn h01_h02_a_run_on_a_directory_that_is_not_the_clients_is_refused_and_recorded() {
    for (root, reason) in [("/../outside", "'..' component"), ("/data/.lockstep", "keeps for itself")] {
        let mut agent = Agent::new();
        let refused = agent.begin(root).unwrap_err();
        assert!(refused.contains(reason), "{refused}");
        drop(agent.server.take());
        agent.assert_untouched(root);
        let log = lines(agent.at.path());
        let [line] = &log[..] else { panic!("{log:?}") };
        assert_eq!((line["action"].as_str(), line["path"].as_str()), (Some("refuse"), Some(root)));
        assert!(line["reason"].as_str().unwrap().contains(reason), "{line}");
    }
}

#[test]
fn h20_a_bomb_is_refused_before_it_grows() {
    // A gigabyte of zeros in some 32 KiB, in a message that admits to 300,000 bytes, to two megabytes, and to all of it.
    let bomb = {
        let mut encoder = ::zstd::stream::Encoder::new(Vec::new(), 1).unwrap();
        encoder.set_pledged_src_size(Some(1 << 30)).unwrap();
        encoder.include_checksum(true).unwrap();
        let zeros = vec![0; 16 << 20];
        (0..64).for_each(|_| std::io::Write::write_all(&mut encoder, &zeros).unwrap());
        encoder.finish().unwrap()
    };
    assert!(bomb.len() < 64 << 10, "{}", bomb.len());
    for (declared, reason) in [(SIZE as u32, "another length"), (2 << 20, "offset"), (1 << 30, "declared length")] {
        let mut agent = Agent::new();
        agent.opened();
        let before = agent.server.as_ref().unwrap().peak_kib();
        let answer = agent.ask("write", &write(0, &coded(declared, &bomb)));
        let grown = agent.server.as_ref().unwrap().peak_kib() - before;
        assert!(grown < 16 << 10, "{grown} KiB more");
        agent.assert_rejected(answer, if declared == SIZE as u32 { "'sub/file'" } else { "" }, reason);
    }
    // In a list of entries, and in a message with many files.
    let mut agent = Agent::new();
    agent.begin("/data").unwrap();
    let answer = agent.ask("entries", &coded(1000, &bomb));
    agent.assert_rejected(answer, "", "another length");
}

#[test]
fn h21_frames_that_are_cut_doubled_or_damaged_reject_the_run() {
    let data: Vec<u8> = (0..75_000_u32).flat_map(|n| (n.wrapping_mul(n) / 7).to_le_bytes()).collect();
    assert_eq!(data.len() as u64, SIZE);
    let good = zstd(&data);
    let bare = {
        let mut plain = ::zstd::bulk::Compressor::new(3).unwrap();
        plain.include_checksum(false).unwrap();
        plain.compress(&data).unwrap()
    };
    let flipped = |frame: &[u8], at: usize| {
        let mut frame = frame.to_vec();
        frame[at] ^= 0x10;
        frame
    };
    let half = zstd(&data[..150_000]);
    let cases = [
        ("cut in the middle", good[..good.len() / 2].to_vec(), "truncated"),
        ("without its last byte", good[..good.len() - 1].to_vec(), "truncated"),
        ("without any", Vec::new(), "zstd frame"),
        ("two frames", [&half[..], &half].concat(), "another length"),
        ("followed by another", [&good[..], &good].concat(), "followed by"),
        ("followed by a byte", [&good[..], b"x"].concat(), "followed by"),
        ("a bit flipped in the middle", flipped(&good, good.len() / 2), "zstd frame"),
        ("a bit flipped in the checksum", flipped(&good, good.len() - 2), "damaged"),
        ("without a checksum", bare.clone(), "no checksum"),
        ("a bit flipped, without a checksum", flipped(&bare, bare.len() / 2), "no checksum"),
        ("of no known kind", b"not a frame at all".to_vec(), "not a zstd frame"),
    ];
    for (what, bytes, reason) in cases {
        let mut agent = Agent::new();
        agent.opened();
        let answer = agent.ask("write", &write(0, &coded(SIZE as u32, &bytes)));
        assert!(answer.as_ref().is_err_and(|message| message.contains(reason)), "{what}: {answer:?}");
        agent.assert_rejected(answer, "'sub/file'", reason);
    }
}

#[test]
fn h22_a_frame_that_asks_for_a_wide_window_is_refused_before_anything_is_allocated() {
    // By hand (RFC 8878): magic, 4 bytes of content size and a checksum, a window of 1 GiB, the size.
    let head = [&[0x28, 0xb5, 0x2f, 0xfd, 0x84, 20 << 3][..], &(SIZE as u32).to_le_bytes(), &[0; 64]].concat();
    let mut agent = Agent::new();
    agent.opened();
    let before = agent.server.as_ref().unwrap().peak_kib();
    let answer = agent.ask("write", &write(0, &coded(SIZE as u32, &head)));
    let grown = agent.server.as_ref().unwrap().peak_kib() - before;
    assert!(grown < 16 << 10, "{grown} KiB more");
    agent.assert_rejected(answer, "'sub/file'", "window");
}

#[test]
fn h23_sizes_and_offsets_that_were_not_declared_reject_the_run() {
    let raw = |length: u32| [&[0][..], &length.to_be_bytes(), &vec![1; length as usize]].concat();
    let cases = [
        ("beyond the end", write(SIZE - 2, &raw(4)), "offset"),
        ("at the last offset there is", write(u64::MAX, &raw(4)), "offset"),
        ("at 2^63", write(1 << 63, &raw(4)), "offset"),
        ("shorter than it says", write(0, &[&[0][..], &8_u32.to_be_bytes(), &[1; 4]].concat()), "declared length"),
        ("longer than it says", write(0, &[&[0][..], &2_u32.to_be_bytes(), &[1; 4]].concat()), "declared length"),
        ("of 4 GiB", write(0, &[&[0][..], &u32::MAX.to_be_bytes(), &[1; 4]].concat()), "declared length"),
    ];
    for (what, body, reason) in cases {
        let mut agent = Agent::new();
        agent.opened();
        let answer = agent.ask("write", &body);
        assert!(answer.is_err(), "{what}");
        agent.assert_rejected(answer, "'sub/file'", reason);
    }
    // A file of 2^63 bytes has no room here, and none is allocated for it.
    for size in [1 << 63, u64::MAX] {
        let mut agent = Agent::new();
        agent.begin("/data").unwrap();
        agent.entries(&listed(b"huge", file(size))).unwrap();
        let refused = agent.ask("diff", &[]).unwrap_err();
        assert!(refused.contains("free"), "{refused}");
        drop(agent.server.take());
        agent.assert_untouched(&refused);
    }
    // Less than was declared is no file either, but one that may be sent again.
    let mut agent = Agent::new();
    agent.opened();
    agent.ask("write", &write(0, &raw(4))).unwrap();
    let reply = agent.ask("finish", &[&1_u32.to_be_bytes()[..], &sha256(&[1; 4]).0].concat()).unwrap();
    assert_eq!(reply[..4], 1_u32.to_be_bytes());
    assert!(String::from_utf8_lossy(&reply).contains("4 bytes came, 300000 were announced"));
}

#[test]
fn h24_content_that_is_not_what_was_declared_is_not_published_and_recorded() {
    let mut agent = Agent::new();
    agent.begin("/data").unwrap();
    agent.entries(&[listed(b"bad", file(4)), listed(b"good", file(4))].concat()).unwrap();
    agent.ask("diff", &[]).unwrap();
    let mut body = put(&[(0, b"fake"), (1, b"good")]);
    // The digest of other content.
    body[8..40].copy_from_slice(&sha256(b"true").0);
    let reply = agent.ask("put", &body).unwrap();
    assert_eq!(reply[..4], 1_u32.to_be_bytes());
    // A client that does not say that the file failed does not get it published.
    let reply = agent.commit().unwrap();
    let committed: Committed = serde_json::from_slice(Reader(&reply).string().unwrap()).unwrap();
    assert_eq!(committed.published, 1);
    drop(agent.server.take());
    assert!(!agent.path("data/bad").exists() && agent.path("data/good").exists());
    let log = lines(&agent.path("data"));
    let refusal = log.iter().find(|line| line["action"] == "refuse").unwrap();
    assert_eq!(refusal["path"], "bad");
    assert!(refusal["reason"].as_str().unwrap().contains(&sha256(b"true").to_string()), "{refusal}");
    assert!(!log.iter().any(|line| line["action"] == "publish" && line["path"] == "bad"));
}

#[test]
fn h21_what_was_to_become_a_new_directory_is_refused_and_recorded_as_well() {
    let mut agent = Agent::new();
    agent.begin("/new").unwrap();
    agent.entries(&listed(b"file", file(SIZE))).unwrap();
    agent.ask("diff", &[]).unwrap();
    agent.ask("open", &[0; 12]).unwrap();
    let half = vec![7; 150_000];
    agent.ask("write", &[&[0; 12][..], &coded(150_000, &zstd(&half))].concat()).unwrap();
    let next = [&0_u32.to_be_bytes()[..], &150_000_u64.to_be_bytes(), &coded(150_000, b"junk")].concat();
    assert!(agent.ask("write", &next).unwrap_err().contains("'file'"));
    drop(agent.server.take());
    assert!(!agent.path("new").exists() && !agent.path(".new.lockstep/.lockstep/staging/current").exists());
    // The log becomes that of the directory when a run is good.
    assert_eq!(lines(&agent.path(".new.lockstep"))[0]["path"], "file");
    agent.server = Some(Server::confined(agent.at.path()));
    agent.begin("/new").unwrap();
    agent.entries(&listed(b"file", file(4))).unwrap();
    agent.ask("diff", &[]).unwrap();
    agent.ask("put", &put(&[(0, b"good")])).unwrap();
    agent.commit().unwrap();
    drop(agent.server.take());
    let actions: Vec<_> = lines(&agent.path("new")).iter().map(|line| line["action"].to_string()).collect();
    assert_eq!(actions, ["\"refuse\"", "\"intent\"", "\"publish\""]);
}

#[test]
fn a_refusal_that_quotes_its_sender_at_length_does_not_spoil_the_log() {
    let mut agent = Agent::new();
    agent.begin("/data").unwrap();
    agent.entries(&listed(b"good", file(4))).unwrap();
    agent.ask("diff", &[]).unwrap();
    agent.ask("put", &put(&[(0, b"good")])).unwrap();
    // What is wrong is quoted by whoever reads it; control bytes grow when they are written down.
    let quoted = format!(r#"{{"delete":"{}"}}"#, r"\u0001".repeat(150_000));
    agent.ask("commit", &string(quoted.as_bytes())).unwrap_err();
    drop(agent.server.take());
    agent.assert_untouched("a long refusal");
    // A line that is longer than any may be would keep everybody from the log, and so from the target.
    agent.server = Some(Server::confined(agent.at.path()));
    agent.begin("/data").unwrap();
    agent.entries(&listed(b"good", file(4))).unwrap();
    agent.ask("diff", &[]).unwrap();
    agent.ask("put", &put(&[(0, b"good")])).unwrap();
    agent.commit().unwrap();
    drop(agent.server.take());
    let actions: Vec<_> = lines(&agent.path("data")).iter().map(|line| line["action"].to_string()).collect();
    assert_eq!(actions, ["\"refuse\"", "\"intent\"", "\"publish\""]);
}
