//! Lists, manifests and state that were forged: by a peer of the agent, and by somebody who may write in a root.
//!
//! Names, frames, sizes and digests of messages are in `agent_wire`, links in the place of staging in `agent_disk`.

use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink};
use std::path::Path;
use std::process::{Command, Output, Stdio};

use lockstep::endpoint::BeginOptions;
use lockstep::manifest::{Content, Digest, Entry, Manifest, Timestamp, Tree, format};
use lockstep::path::RelPath;
use lockstep::wire::extension::put_entry;
use lockstep::wire::sftp::{open, packet};
use sha2::Digest as _;

use super::agent::{entry, file};
use super::swapping::portrait;
use crate::kit::agent::{Agent, file as of_size, listed, put, string};
use crate::kit::own::Server;
use crate::kit::{raw, text};

fn raw_entries(entries: &[Entry]) -> Vec<u8> {
    let mut out = Vec::new();
    entries.iter().for_each(|entry| put_entry(&mut out, entry));
    out
}

fn hard(path: &str, first: &str) -> Entry {
    entry(path, Content::HardLink { first: RelPath::new(first).unwrap() })
}

#[test]
fn h11_hard_links_to_what_is_no_file_before_them_reject_the_run() {
    let good = file("good", 4);
    let cases: [(&str, Vec<Entry>); 6] = [
        ("'self'", vec![good.clone(), hard("self", "self")]),
        // The target has it, the list does not.
        ("'to-old'", vec![good.clone(), hard("to-old", "old")]),
        ("'to-later'", vec![good.clone(), hard("to-later", "zz"), file("zz", 4)]),
        ("'to-sub'", vec![good.clone(), entry("sub", Content::Directory), hard("to-sub", "sub")]),
        ("'to-link'", vec![good.clone(), super::agent::link("link", "old"), hard("to-link", "link")]),
        ("'second'", vec![good.clone(), hard("link", "good"), hard("second", "link")]),
    ];
    for (path, entries) in cases {
        let mut agent = Agent::new();
        agent.begin("/data").unwrap();
        let answer = agent.entries(&raw_entries(&entries)).and_then(|_| agent.ask("diff", &[]));
        agent.assert_rejected(answer, path, "is a hard link to");
    }
}

#[test]
fn h17_a_group_of_hard_links_takes_no_file_from_outside_into_it() {
    let mut agent = Agent::new();
    fs::write(agent.path("outside"), "outside").unwrap();
    fs::set_permissions(agent.path("outside"), fs::Permissions::from_mode(0o640)).unwrap();
    // Both names are there already, as names of the file outside.
    for name in ["data/first", "data/second"] {
        fs::hard_link(agent.path("outside"), agent.path(name)).unwrap();
    }
    agent.begin("/data").unwrap();
    agent.entries(&raw_entries(&[file("first", 4), hard("second", "first")])).unwrap();
    agent.ask("diff", &[]).unwrap();
    agent.ask("put", &put(&[(0, b"good")])).unwrap();
    agent.commit().unwrap();
    let found = |name: &str| fs::metadata(agent.path(name)).unwrap();
    assert_eq!(fs::read(agent.path("data/second")).unwrap(), b"good");
    assert_eq!(found("data/first").ino(), found("data/second").ino());
    assert_ne!(found("data/first").ino(), found("outside").ino());
    assert_eq!(
        (fs::read(agent.path("outside")).unwrap(), found("outside").mode() & 0o7777),
        (b"outside".to_vec(), 0o640)
    );
}

#[test]
fn h23_metadata_that_nothing_can_have_rejects_the_run_and_what_is_only_odd_does_no_harm() {
    let with = |mode: u32, seconds: i64, nanoseconds: u32| Entry {
        mode,
        mtime: Timestamp { seconds, nanoseconds },
        ..file("odd", 4)
    };
    for wrong in [with(0o10000, 0, 0), with(u32::MAX, 0, 0), with(0o644, 0, 1_000_000_000), with(0o644, 0, u32::MAX)] {
        let mut agent = Agent::new();
        agent.begin("/data").unwrap();
        let answer = agent.entries(&raw_entries(&[wrong])).and_then(|_| agent.ask("diff", &[]));
        agent.assert_rejected(answer, "'odd'", "mode beyond 7777");
    }
    for odd in [with(0o7777, 0, 0), with(0o6755, -1, 999_999_999), with(0, i64::MIN, 0), with(0o644, i64::MAX, 0)] {
        let mut agent = Agent::new();
        agent.begin("/data").unwrap();
        let entries = [odd.clone(), file("plain", 4)];
        let taken = agent.entries(&raw_entries(&entries)).and_then(|_| agent.ask("diff", &[]));
        taken.and_then(|_| agent.ask("put", &put(&[(0, b"good"), (1, b"good")]))).unwrap();
        agent.commit().unwrap();
        // One that cannot be given a time or mode takes none with it, and special bits are nobody's wish.
        assert_eq!(fs::read(agent.path("data/plain")).unwrap(), b"good", "{odd:?}");
        if let Ok(found) = fs::symlink_metadata(agent.path("data/odd")) {
            assert_eq!(found.mode() & 0o7000, 0, "{odd:?}");
        }
    }
}

#[test]
fn h45_h48_a_peer_that_wishes_for_owners_and_special_bits_gets_neither() {
    for owner in ["root", "0", "nobody-of-this-name", "\u{1b}[2J", "-1", "4294967295"] {
        let mut agent = Agent::new();
        let policy = serde_json::json!({"rule": [{"match": "*", "owner": owner, "mode": "6755"}]});
        let mut options = serde_json::to_value(BeginOptions::default()).unwrap();
        options["policy"] = policy;
        let body = [string(b"/data"), string(&serde_json::to_vec(&options).unwrap())].concat();
        // Whether it is told so at once or later: no file comes of it that has them.
        let run = agent
            .ask("begin", &body)
            .and_then(|_| agent.entries(&listed(b"f", of_size(4))))
            .and_then(|_| agent.ask("diff", &[]))
            .and_then(|_| agent.ask("put", &put(&[(0, b"good")])))
            .and_then(|_| agent.commit());
        if let Err(why) = &run {
            assert!(!why.chars().any(char::is_control), "{why:?}");
        }
        if let Ok(found) = fs::symlink_metadata(agent.path("data/f")) {
            assert_eq!(found.mode() & 0o7000, 0, "{owner}: {run:?}");
            assert_eq!(found.uid(), rustix::process::geteuid().as_raw(), "{owner}");
        }
    }
}

#[test]
fn requests_in_any_wrong_order_publish_nothing() {
    let begin = || [string(b"/data"), string(&serde_json::to_vec(&BeginOptions::default()).unwrap())].concat();
    let commit = || string(&serde_json::to_vec(&lockstep::endpoint::CommitOptions::default()).unwrap());
    let entries = |name: &[u8]| crate::kit::agent::frame(&listed(name, of_size(4)));
    let index = |number: u32, rest: usize| [&number.to_be_bytes()[..], &vec![0; rest]].concat();
    let good = || put(&[(0, b"good")]);
    type Request = (&'static str, Vec<u8>);
    let begun = || -> Vec<Request> { vec![("begin", begin()), ("entries", entries(b"f"))] };
    let compared = || -> Vec<Request> { [begun(), vec![("diff", Vec::new())]].concat() };
    // What was right before, what is wrong then, and whether the run goes on after it.
    let cases: Vec<(Vec<Request>, Request)> = vec![
        (vec![], ("commit", commit())),
        (vec![], ("entries", entries(b"f"))),
        (vec![], ("diff", Vec::new())),
        (vec![], ("put", good())),
        (vec![], ("next", index(0, 1))),
        (vec![("begin", begin())], ("commit", commit())),
        (vec![("begin", begin())], ("begin", begin())),
        (vec![("begin", begin())], ("scan", begin())),
        (begun(), ("commit", commit())),
        (begun(), ("put", good())),
        (compared(), ("begin", begin())),
        (compared(), ("entries", entries(b"g"))),
        (compared(), ("diff", Vec::new())),
        (compared(), ("fetch", index(0, 4))),
        (compared(), ("next", index(0, 1))),
        (compared(), ("put", put(&[(0, b"good"), (0, b"good")]))),
        (compared(), ("put", put(&[(1, b"good")]))),
        (compared(), ("put", put(&[(0, b"longer than it was")]))),
        (compared(), ("open", [&index(0, 0)[..], &5_u64.to_be_bytes()].concat())),
        (compared(), ("write", [&index(0, 8)[..], &crate::kit::agent::frame(b"x")].concat())),
        (compared(), ("hole", index(0, 16))),
        (compared(), ("copy", index(0, 28))),
        (compared(), ("copy", index(7, 28))),
        (compared(), ("alike", index(0, 19))),
        (compared(), ("finish", index(0, 32))),
        (compared(), ("finish", index(7, 32))),
        (compared(), ("keep", index(u32::MAX, 32))),
        (compared(), ("discard", index(9, 0))),
    ];
    for (number, (before, (name, body))) in cases.into_iter().enumerate() {
        let mut agent = Agent::new();
        for (name, body) in before {
            agent.ask(name, &body).unwrap();
        }
        assert!(agent.ask(name, &body).is_err(), "{number}: {name} was taken");
        // Nor does anything of the run get published by going on as if nothing had been.
        let _ = agent.ask("put", &good());
        let _ = agent.commit();
        drop(agent.server.take());
        let there = agent.path("data/f").exists();
        assert!(!there, "{number}: {name} is followed by what was refused");
    }
    // What was published once is not published again, nor changed.
    let mut agent = Agent::new();
    for (name, body) in compared() {
        agent.ask(name, &body).unwrap();
    }
    agent.ask("put", &good()).unwrap();
    agent.commit().unwrap();
    for (name, body) in [("put", good()), ("commit", commit()), ("begin", begin()), ("diff", Vec::new())] {
        assert!(agent.ask(name, &body).is_err(), "{name} after the end");
    }
    assert_eq!(fs::read(agent.path("data/f")).unwrap(), b"good");
}

/// A manifest of one file, with its last line right for whatever its text says.
fn manifest(path: &str, becomes: &str, digest: Digest, mtime: Timestamp) -> Vec<u8> {
    assert_eq!(path.len(), becomes.len());
    let content = Content::File { size: 4, digest: Some(digest) };
    let tree = Tree::new(vec![Entry { content, mtime, ..file(path, 4) }]).unwrap();
    let text = format::encode(&Manifest { generation: 7, created: Timestamp::default(), tree });
    let text = String::from_utf8(text).unwrap();
    let (body, _) = text.rsplit_once("end\t").unwrap();
    let body = body.replace(path, becomes);
    let end = Digest(sha2::Sha256::digest(&body).into());
    format!("{body}end\t{end}\n").into_bytes()
}

/// A server, a source `source/f` of four bytes and a root, which pushes go to by the agent and on this machine.
struct Place(Server);

impl Place {
    fn new() -> Place {
        let server = Server::start(&[]);
        let place = Place(server);
        fs::create_dir(place.at().join("source")).unwrap();
        fs::write(place.at().join("source/f"), "good").unwrap();
        for name in ["outside", "outside/sub"] {
            fs::create_dir(place.at().join(name)).unwrap();
        }
        for name in ["outside/f", "outside/sub/g"] {
            fs::write(place.at().join(name), "untouched").unwrap();
        }
        place
    }

    fn at(&self) -> &Path {
        self.0.at.path()
    }

    /// The root as a push left it.
    fn fill(&self) {
        let (root, filled) = (self.at().join("root"), self.at().join("filled"));
        if !filled.exists() {
            let pushed = self.push(false);
            assert!(pushed.status.success(), "{}", text(&pushed));
            fs::rename(&root, &filled).unwrap();
        } else {
            fs::remove_dir_all(&root).unwrap();
        }
        assert!(Command::new("cp").arg("-a").args([&filled, &root]).status().unwrap().success());
    }

    fn push(&self, agent: bool) -> Output {
        if agent {
            return self.0.lockstep(&["push", "--delete", "source", "sync@127.0.0.1:/"], "user");
        }
        Command::new(env!("CARGO_BIN_EXE_lockstep"))
            .args(["push", "--delete", "source", "root"])
            .current_dir(self.at())
            .env("XDG_STATE_HOME", self.at().join("state"))
            .stdin(Stdio::null())
            .output()
            .unwrap()
    }

    /// Pushes; it ends in order, whatever it says.
    fn pushes_in_order(&self, agent: bool, when: &str) -> bool {
        let output = self.push(agent);
        let said = text(&output);
        assert!(matches!(output.status.code(), Some(0 | 3..=6 | 75)), "{when}: {:?} {said}", output.status);
        assert!(!said.contains("panicked") && !said.contains("mistake of the program"), "{when}: {said}");
        output.status.success()
    }
}

#[test]
fn h12_a_manifest_that_was_planted_at_a_target_leads_nowhere_and_is_not_believed() {
    let place = Place::new();
    let before = portrait(&place.at().join("outside"));
    let evil = Digest(sha2::Sha256::digest(b"good").into());
    for agent in [false, true] {
        for (path, becomes) in [
            ("xx/outside/f", "../outside/f"),
            ("xoutside", "/outside"),
            ("xx/manifest-of-others", ".lockstep/audit.jsonl"),
            ("sub/x/f", "sub/../"),
            ("f", "f"),
        ] {
            place.fill();
            let state = place.at().join("root/.lockstep");
            fs::write(state.join("manifest"), manifest(path, becomes, evil, Timestamp::default())).unwrap();
            place.pushes_in_order(agent, becomes);
            assert_eq!(portrait(&place.at().join("outside")), before, "{becomes}, agent: {agent}");
            assert!(state.join("audit.jsonl").is_file(), "{becomes}, agent: {agent}");
        }
        // It says that other content of the same size and time is what the source has.
        place.fill();
        let target = place.at().join("root/f");
        let found = fs::metadata(place.at().join("source/f")).unwrap();
        let mtime = Timestamp { seconds: found.mtime(), nanoseconds: found.mtime_nsec() as u32 };
        fs::write(&target, "evil").unwrap();
        let file = fs::File::options().write(true).open(&target).unwrap();
        file.set_modified(found.modified().unwrap()).unwrap();
        fs::write(place.at().join("root/.lockstep/manifest"), manifest("f", "f", evil, mtime)).unwrap();
        assert!(place.pushes_in_order(agent, "the same size and time"));
        assert_eq!(fs::read(&target).unwrap(), b"good", "agent: {agent}");
    }
}

#[test]
fn h14_h16_links_that_were_planted_in_the_place_of_state_lead_nowhere() {
    let place = Place::new();
    place.fill();
    let mut names: Vec<String> = walkdir::WalkDir::new(place.at().join("root/.lockstep"))
        .into_iter()
        .map(|entry| entry.unwrap().path().strip_prefix(place.at().join("root")).unwrap().to_str().unwrap().to_owned())
        .collect();
    assert!(names.len() > 4, "{names:?}");
    for more in ["staging/current", "staging/current/tree", "staging/current/commit", "trash", "usage", "lock"] {
        names.push(format!(".lockstep/{more}"));
    }
    let before = portrait(&place.at().join("outside"));
    for (name, by) in names.iter().flat_map(|name| ["local", "agent", "sftp"].map(|by| (name, by))) {
        place.fill();
        let planted = place.at().join("root").join(name);
        let is_directory =
            planted.is_dir() || [".lockstep/trash", ".lockstep/staging/current"].contains(&name.as_str());
        if planted.is_dir() {
            fs::remove_dir_all(&planted).unwrap();
        } else {
            let _ = fs::remove_file(&planted);
        }
        fs::create_dir_all(planted.parent().unwrap()).unwrap();
        symlink(place.at().join(if is_directory { "outside" } else { "outside/f" }), &planted).unwrap();
        // So that there is something to be done.
        fs::write(place.at().join("root/more"), "to be removed").unwrap();
        fs::remove_file(place.at().join("root/f")).unwrap();
        let when = format!("{name} is a link, {by}");
        if by == "sftp" {
            let mut plain = raw::Server::confined(&place.at().join("root"));
            let (kind, body) = plain.ask(packet::OPEN, |w| w.string(b"new").u32(open::WRITE | open::CREATE).u32(0));
            if kind == packet::HANDLE {
                plain.write(&body[4..], 0, b"written");
            }
            plain.path(packet::REMOVE, "more");
        } else {
            place.pushes_in_order(by == "agent", &when);
        }
        assert_eq!(portrait(&place.at().join("outside")), before, "{when}");
    }
}
