//! What lies on the agent's disk between two of its messages: private, proven as it lies there, and no way out of the root
//! when somebody puts links in its place.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use lockstep::endpoint::Committed;
use lockstep::wire::buffer::Reader;

use crate::kit::agent::{Agent, file, frame, lines, listed, put, sha256, write};

#[test]
fn h14_a_directory_that_becomes_a_link_in_mid_transfer_leads_nowhere_and_its_unit_is_not_published() {
    for units in [vec![], vec!["sub/".to_owned()]] {
        for sent_first in [true, false] {
            let when = format!("units {units:?}, sent first: {sent_first}");
            let mut agent = Agent::new();
            agent.sent(&units);
            let put = put(&[(1, b"new!")]);
            if sent_first {
                agent.ask("put", &put).unwrap();
            }
            agent.swap("data/sub");
            if !sent_first {
                agent.ask("put", &put).unwrap();
            }
            let told = match agent.commit() {
                Ok(reply) => {
                    let text = Reader(&reply).string().unwrap().to_vec();
                    let committed: Committed = serde_json::from_slice(&text).unwrap();
                    let about: Vec<_> = committed.problems.iter().map(|(path, _)| path.as_str()).collect();
                    assert!(about.iter().any(|path| path.starts_with("sub")), "{when}: {about:?}");
                    committed.problems.into_iter().map(|(path, why)| path + ": " + &why).collect()
                }
                Err(refusal) => refusal,
            };
            assert!(told.contains("sub"), "{when}: {told}");
            drop(agent.server.take());
            agent.assert_nothing_outside(&when);
            assert_eq!(fs::read(agent.path("moved/file")).unwrap(), b"old!", "{when}");
            assert!(
                !lines(&agent.path("data"))
                    .iter()
                    .any(|line| line["action"] == "publish" && line["path"].as_str().unwrap().starts_with("sub/")),
                "{when}: it is recorded as published"
            );
        }
    }
}

#[test]
fn h14_a_staging_directory_that_becomes_a_link_leads_nowhere() {
    for name in ["tree/sub", "tree", ""] {
        let mut agent = Agent::new();
        agent.sent(&[]);
        agent.swap(Path::new("data/.lockstep/staging/current").join(name).to_str().unwrap().trim_end_matches('/'));
        let answer = agent.ask("put", &put(&[(1, b"new!")]));
        assert!(
            answer.is_err() || answer.unwrap()[..4] == 1_u32.to_be_bytes() || name.is_empty(),
            "{name} was written to"
        );
        let _ = agent.commit();
        drop(agent.server.take());
        agent.assert_nothing_outside(name);
    }
}

#[test]
fn h17_another_name_of_a_file_outside_that_is_planted_in_staging_is_not_written_through() {
    for in_pieces in [false, true] {
        let mut agent = Agent::new();
        agent.sent(&[]);
        fs::write(agent.path("outside/victim"), "precious").unwrap();
        let planted = agent.path("data/.lockstep/staging/current/tree/sub/file");
        fs::hard_link(agent.path("outside/victim"), &planted).unwrap();
        if in_pieces {
            let index = 1_u32.to_be_bytes();
            agent.ask("open", &[&index[..], &[0; 8]].concat()).unwrap();
            agent.ask("write", &write(0, &frame(b"new!"))).unwrap();
            agent.ask("finish", &[&index[..], &sha256(b"new!").0].concat()).unwrap();
        } else {
            agent.ask("put", &put(&[(1, b"new!")])).unwrap();
        }
        agent.commit().unwrap();
        drop(agent.server.take());
        assert_eq!(fs::read(agent.path("outside/victim")).unwrap(), b"precious");
        assert_eq!(fs::read(agent.path("data/sub/file")).unwrap(), b"new!");
        let links = std::os::unix::fs::MetadataExt::nlink(&fs::metadata(agent.path("outside/victim")).unwrap());
        assert_eq!(links, 1);
    }
}

#[test]
fn h14_a_root_that_becomes_a_link_is_left_where_it_went() {
    let mut agent = Agent::new();
    agent.sent(&[]);
    agent.ask("put", &put(&[(1, b"new!")])).unwrap();
    agent.swap("data");
    let _ = agent.commit();
    drop(agent.server.take());
    agent.assert_nothing_outside("the root");
}

#[test]
fn s08_s10_what_arrives_is_private_until_it_is_proven_on_the_disk() {
    for (meddled, mode, published) in [(false, 0o744, true), (true, 0o744, false)] {
        let mut agent = Agent::new();
        agent.begin("/data").unwrap();
        let mut entry = listed(b"update.bin", file(8));
        let at = entry.windows(4).rposition(|bytes| bytes == 0o644_u32.to_be_bytes()).unwrap();
        entry[at..at + 4].copy_from_slice(&u32::to_be_bytes(mode));
        agent.entries(&entry).unwrap();
        agent.ask("diff", &[]).unwrap();
        agent.ask("open", &[0; 12]).unwrap();
        agent.ask("write", &[&[0; 12][..], &frame(b"harm")].concat()).unwrap();
        let staged = agent.path("data/.lockstep/staging/current/tree/update.bin");
        let mode_of = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o7777;
        // Nobody else may look at it, nor into any directory on the way to it, and it has no name yet.
        assert_eq!(mode_of(&staged), 0o600);
        assert!(staged.ancestors().skip(1).take(3).all(|above| mode_of(above) & 0o077 == 0));
        assert!(!agent.path("data/update.bin").exists());
        agent.ask("write", &[&0_u32.to_be_bytes()[..], &4_u64.to_be_bytes(), &frame(b"less")].concat()).unwrap();
        if meddled {
            // What was written is right, and what lies on the disk is not.
            fs::write(&staged, "harmful!").unwrap();
        }
        let reply = agent.ask("finish", &[&[0; 4][..], &sha256(b"harmless").0].concat()).unwrap();
        assert_eq!(reply[..4] == 0_u32.to_be_bytes(), published);
        agent.commit().unwrap();
        drop(agent.server.take());
        assert_eq!(agent.path("data/update.bin").exists(), published);
        if published {
            assert_eq!(mode_of(&agent.path("data/update.bin")), mode);
        }
    }
}
