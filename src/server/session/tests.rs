//! What a session answers, packet by packet, and what its rules do with what arrives.

use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::sync::Mutex;

use super::*;
use crate::policy::RuleSpec;
use crate::wire::sftp::open;

/// Keeps what is answered.
#[derive(Default)]
pub(super) struct Kept(pub(super) Mutex<Vec<Vec<u8>>>);

impl Output for Kept {
    fn send(&self, packet: Vec<u8>) {
        self.0.lock().unwrap().push(packet);
    }

    fn is_gone(&self) -> bool {
        false
    }
}

/// A session below a directory of its own.
struct Client {
    at: tempfile::TempDir,
    kept: Arc<Kept>,
    session: Session,
}

impl Client {
    fn new(read_only: bool, rules: &[(&str, &str, Option<&str>)]) -> Client {
        let at = tempfile::tempdir().unwrap();
        let rules = rules.iter().map(|(pattern, mode, owner)| RuleSpec {
            pattern: (*pattern).into(),
            mode: (!mode.is_empty()).then(|| (*mode).into()),
            owner: owner.map(str::to_owned),
            ..RuleSpec::default()
        });
        let policy = PolicySpec { rules: rules.collect() };
        let (root, actor) = (at.path().to_owned(), "someone@somewhere".to_owned());
        let rights = if read_only { Rights::READ_ONLY } else { Rights::FULL };
        let login = Login::default();
        let config = SessionConfig { root, confine: true, rights, quota: None, policy, actor, login };
        let kept = Arc::new(Kept::default());
        let mut session = Session::new(config, kept.clone(), None).unwrap();
        session.feed(&Writer::new(packet::INIT).u32(3).finish()).unwrap();
        Client { at, kept, session }
    }

    fn ask(&mut self, kind: u8, fields: impl FnOnce(&mut Writer) -> &mut Writer) -> Vec<u8> {
        let mut request = Writer::new(kind);
        fields(request.u32(1));
        self.session.feed(&request.finish()).unwrap();
        self.session.lanes.wait();
        self.kept.0.lock().unwrap().pop().unwrap()
    }

    fn status(&mut self, kind: u8, fields: impl FnOnce(&mut Writer) -> &mut Writer) -> Status {
        let reply = self.ask(kind, fields);
        assert_eq!(reply[4], packet::STATUS);
        Status::from_code(Reader(&reply[9..]).u32().unwrap())
    }

    fn open(&mut self, path: &str, mode: u32) -> Vec<u8> {
        let flags = open::WRITE | open::CREATE;
        let reply = self.ask(packet::OPEN, |w| w.string(path.as_bytes()).u32(flags).u32(4).u32(mode));
        assert_eq!(reply[4], packet::HANDLE, "{}", String::from_utf8_lossy(&reply));
        Reader(&reply[9..]).string().unwrap().to_vec()
    }

    fn write(&mut self, handle: &[u8], offset: u64, data: &[u8]) {
        assert_eq!(self.status(packet::WRITE, |w| w.string(handle).u64(offset).string(data)), Status::Ok);
    }

    fn close(&mut self, handle: &[u8]) -> Status {
        self.status(packet::CLOSE, |w| w.string(handle))
    }

    fn put(&mut self, path: &str, mode: u32, data: &[u8]) {
        let handle = self.open(path, mode);
        self.write(&handle, 0, data);
        assert_eq!(self.close(&handle), Status::Ok);
    }

    fn pair(&mut self, kind: u8, from: &str, to: &str) -> Status {
        self.status(kind, |w| w.string(from.as_bytes()).string(to.as_bytes()))
    }

    fn setstat(&mut self, path: &str, flags: u32, values: &[u32]) -> Status {
        self.status(packet::SETSTAT, |w| {
            w.string(path.as_bytes()).u32(flags);
            values.iter().fold(w, |w, value| w.u32(*value))
        })
    }

    fn mode(&self, path: &str) -> u32 {
        std::fs::symlink_metadata(self.at.path().join(path)).unwrap().permissions().mode() & 0o7777
    }

    /// Ends the session; the audit log, whose chain holds.
    fn log(mut self) -> String {
        self.session.finish();
        drop(self.session);
        let root = Root::open(self.at.path()).unwrap();
        crate::audit::verify(&root).unwrap();
        std::fs::read_to_string(self.at.path().join(crate::audit::LOG)).unwrap_or_default()
    }
}

fn root() -> bool {
    rustix::process::geteuid().is_root()
}

#[test]
fn h45_special_bits_are_dropped() {
    let mut client = Client::new(false, &[]);
    client.open("/../f", 0o4755);
    assert_eq!(client.mode("f") & 0o7000, 0);
}

#[test]
fn a_read_only_session_changes_nothing() {
    let mut client = Client::new(true, &[]);
    let reply = client.ask(packet::OPEN, |w| w.string(b"/f").u32(open::WRITE | open::CREATE).u32(0));
    let said = "Permission denied: the rights here do not include 'write'";
    assert_eq!(reply, Status::PermissionDenied.packet_saying(1, said));
    assert_eq!(client.log(), "");
}

#[test]
fn h40_h44_unknown_handles_and_requests_get_an_answer() {
    let mut client = Client::new(false, &[]);
    assert_eq!(client.close(b"12345678"), Status::Failure);
    assert_eq!(client.ask(99, |w| w), Status::Unsupported.packet(1));
}

#[test]
fn s08_s10_by_a_plain_client_too_a_file_is_private_until_it_is_closed_and_then_as_the_rule_says() {
    let mut client = Client::new(false, &[("*.log", "640", None), ("tool", "4755", None), ("dir/", "1774", None)]);
    for (name, asked, given) in [("x.log", 0o777, 0o640), ("tool", 0o600, 0o4755), ("other", 0o604, 0o604)] {
        let handle = client.open(name, asked);
        let before = if name == "other" { 0o604 } else { 0o600 };
        assert_eq!(client.mode(name), before, "{name}");
        client.write(&handle, 0, b"data");
        assert_eq!(client.status(packet::FSETSTAT, |w| w.string(&handle).u32(4).u32(0o666)), Status::Ok);
        assert_eq!(client.mode(name), if name == "other" { 0o666 } else { 0o600 }, "{name}");
        assert_eq!(client.close(&handle), Status::Ok);
        assert_eq!(client.mode(name), if name == "other" { 0o666 } else { given }, "{name}");
    }
    // Afterwards a mode is asked for in vain.
    assert_eq!(client.setstat("x.log", 4, &[0o666]), Status::Ok);
    assert_eq!(client.mode("x.log"), 0o640);
    assert_eq!(client.status(packet::MKDIR, |w| w.string(b"/dir").u32(0)), Status::Ok);
    assert_eq!(client.mode("dir"), 0o1774);
    // Nor does another way to the file open it before it is whole: by its path, by a new name, through another handle.
    let handle = client.open("y.log", 0o644);
    client.write(&handle, 0, b"half");
    assert_eq!(client.setstat("y.log", 4, &[0o644]), Status::Ok);
    assert_eq!(client.pair(packet::RENAME, "y.log", "z.log"), Status::Ok);
    let other = client.open("z.log", 0o644);
    client.write(&other, 4, b"more");
    assert_eq!(client.close(&other), Status::Ok);
    assert_eq!(client.mode("z.log"), 0o600);
    assert_eq!(client.close(&handle), Status::Ok);
    assert_eq!(client.mode("z.log"), 0o640);
    // An upload that is cut off stays private.
    let handle = client.open("cut.log", 0o644);
    client.write(&handle, 0, b"half");
    client.session.finish();
    assert_eq!(client.mode("cut.log"), 0o600);
}

#[test]
fn a_rename_brings_what_the_rules_say_of_the_new_name_and_of_all_below_it() {
    let mut client =
        Client::new(false, &[("secret/**", "600", None), ("secret/**/", "700", None), ("*.key", "400", None)]);
    client.put("part", 0o644, b"x");
    assert_eq!(client.pair(packet::RENAME, "part", "a.key"), Status::Ok);
    assert_eq!(client.mode("a.key"), 0o400);
    assert_eq!(client.status(packet::MKDIR, |w| w.string(b"d").u32(0)), Status::Ok);
    client.put("d/file", 0o644, b"x");
    assert_eq!(client.status(packet::MKDIR, |w| w.string(b"secret").u32(0)), Status::Ok);
    assert_eq!(client.pair(packet::RENAME, "d", "secret/d"), Status::Ok);
    assert_eq!((client.mode("secret/d"), client.mode("secret/d/file")), (0o700, 0o600));
    // One file has one mode: two names that differ in it are refused.
    client.put("free", 0o644, b"x");
    let link = |client: &mut Client, to: &str| {
        client.status(packet::EXTENDED, |w| w.string(b"hardlink@openssh.com").string(b"free").string(to.as_bytes()))
    };
    assert_eq!(link(&mut client, "secret/free"), Status::PermissionDenied);
    assert_eq!(link(&mut client, "free2"), Status::Ok);
}

#[test]
fn h46_a_file_with_two_names_gets_no_permissions_by_a_rename_of_one() {
    let mut client = Client::new(false, &[("data/**", "640", None), ("scripts/**", "755", None)]);
    for directory in ["data", "data/d", "scripts", "free"] {
        assert_eq!(client.status(packet::MKDIR, |w| w.string(directory.as_bytes()).u32(0)), Status::Ok);
    }
    let link = |client: &mut Client, from: &str, to: &str| {
        let fields = [&b"hardlink@openssh.com"[..], from.as_bytes(), to.as_bytes()];
        client.status(packet::EXTENDED, |w| fields.iter().fold(w, |w, field| w.string(field)))
    };
    client.put("data/x", 0o644, b"x");
    assert_eq!(link(&mut client, "data/x", "data/d/y"), Status::Ok);
    let denied = Status::PermissionDenied;
    for (from, to) in [("data/d/y", "scripts/y"), ("data/d/y", "free/y"), ("data/d", "scripts/d")] {
        assert_eq!(client.pair(packet::RENAME, from, to), denied, "{from} -> {to}");
        assert_eq!(client.mode("data/x"), 0o640);
    }
    // Where the rules say the same of both it is a rename as any other.
    assert_eq!(client.pair(packet::RENAME, "data/d/y", "data/z"), Status::Ok);
    // Nor while it is private: by its last name it would get what the rule of the first says, or the other way round.
    let handle = client.open("data/open", 0o644);
    client.write(&handle, 0, b"x");
    assert_eq!(link(&mut client, "data/open", "data/too"), Status::Ok);
    assert_eq!(client.pair(packet::RENAME, "data/too", "scripts/too"), denied);
    assert_eq!(client.status(packet::REMOVE, |w| w.string(b"data/too")), Status::Ok);
    assert_eq!(client.pair(packet::RENAME, "data/open", "scripts/open"), Status::Ok);
    assert_eq!(client.close(&handle), Status::Ok);
    assert_eq!(client.mode("scripts/open"), 0o755);
    assert!(client.log().contains("the file has further names"));
}

#[test]
fn h46_what_is_not_renamed_keeps_the_permissions_of_its_name() {
    let rules =
        [("secret/**", "600", None), ("public/**", "644", None), ("public/**/bad", "", Some("no-such-user-here"))];
    let mut client = Client::new(false, &[&rules[..], &[("*/**/", "700", None)]].concat());
    for directory in ["secret", "secret/d", "secret/d/e", "public", "public/full", "public/full/x"] {
        assert_eq!(client.status(packet::MKDIR, |w| w.string(directory.as_bytes()).u32(0)), Status::Ok);
    }
    let files: Vec<String> = (0..20).map(|n| format!("secret/d/{n}")).chain(["secret/d/e/f".into()]).collect();
    files.iter().for_each(|file| client.put(file, 0o644, b"x"));
    let renamed = |client: &mut Client, to: &str| {
        let fields = [&b"posix-rename@openssh.com"[..], b"secret/d", to.as_bytes()];
        client.status(packet::EXTENDED, |w| fields.iter().fold(w, |w, field| w.string(field)))
    };
    let times = |client: &Client| {
        let changed = |file: &String| {
            let found = std::fs::metadata(client.at.path().join(file)).unwrap();
            (std::os::unix::fs::MetadataExt::ctime(&found), std::os::unix::fs::MetadataExt::ctime_nsec(&found))
        };
        files.iter().map(changed).collect::<Vec<_>>()
    };
    // The rules do not say what the last would get: nothing is touched.
    client.put("secret/d/e/bad", 0o644, b"x");
    let before = times(&client);
    assert_eq!(renamed(&mut client, "public/d"), Status::Failure);
    assert!(times(&client) == before, "something was changed before it was known whether all can be");
    assert_eq!(client.status(packet::REMOVE, |w| w.string(b"secret/d/e/bad")), Status::Ok);
    // What is in the way is found by the rename alone.
    assert_eq!(renamed(&mut client, "public/full"), Status::Failure);
    for file in &files {
        assert_eq!(client.mode(file), 0o600, "{file}");
    }
    assert_eq!(renamed(&mut client, "public/d"), Status::Ok);
    assert_eq!(client.mode("public/d/e/f"), 0o644);
    let log = client.log();
    assert!(log.contains("not renamed to 'public/full'"), "{log}");
}

#[test]
fn the_rules_go_by_where_a_file_lies_not_by_the_link_it_was_reached_by() {
    let mut client = Client::new(false, &[("weights", "600", None)]);
    client.put("weights", 0o644, b"x");
    assert_eq!(client.pair(packet::SYMLINK, "weights", "link"), Status::Ok);
    assert_eq!(client.setstat("link", 4, &[0o666]), Status::Ok);
    assert_eq!(client.mode("weights"), 0o600);
    client.put("link", 0o666, b"y");
    assert_eq!(client.mode("weights"), 0o600);
    assert_eq!(std::fs::read(client.at.path().join("weights")).unwrap(), b"y");
}

#[test]
fn h46_h48_owners_are_the_policys() {
    if !root() {
        return; // Nobody else can give files away: the kernel refuses it, whatever the policy.
    }
    use std::os::unix::fs::MetadataExt as _;
    let mut client = Client::new(false, &[("*.bin", "640", Some("games")), ("bad", "600", Some("no-such-user"))]);
    client.put("a.bin", 0o644, b"x");
    let owner = |client: &Client| std::fs::metadata(client.at.path().join("a.bin")).unwrap().uid();
    assert_eq!(owner(&client), 5);
    for (user, expected) in [(4711, Status::PermissionDenied), (0, Status::PermissionDenied), (5, Status::Ok)] {
        assert_eq!(client.setstat("a.bin", 2, &[user, 0]), expected, "{user}");
    }
    assert_eq!(owner(&client), 5);
    // A name that the machine does not know: nothing is made.
    let reply = client.ask(packet::OPEN, |w| w.string(b"bad").u32(open::WRITE | open::CREATE).u32(0));
    assert_eq!((reply[4], client.at.path().join("bad").exists()), (packet::STATUS, false));
    assert!(client.log().contains("decides who owns"));
}

#[test]
fn h46_without_rules_a_confined_client_gives_nothing_away() {
    let mut client = Client::new(false, &[]);
    client.put("f", 0o644, b"x");
    use std::os::unix::fs::MetadataExt as _;
    let found = std::fs::metadata(client.at.path().join("f")).unwrap();
    assert_eq!(client.setstat("f", 2, &[4711, found.gid()]), Status::PermissionDenied);
    assert_eq!(client.setstat("f", 2, &[found.uid(), 4711]), Status::PermissionDenied);
    assert_eq!(client.setstat("f", 2, &[found.uid(), found.gid()]), Status::Ok);
    assert_eq!(std::fs::metadata(client.at.path().join("f")).unwrap().uid(), found.uid());
}

#[test]
fn s13_what_plain_clients_do_is_in_the_audit_log() {
    let mut client = Client::new(false, &[]);
    let handle = client.open("f", 0o644);
    client.write(&handle, 0, b"one ");
    client.write(&handle, 4, b"two");
    assert_eq!(client.close(&handle), Status::Ok);
    // Out of order: no digest, since none is known.
    let handle = client.open("gap", 0o644);
    client.write(&handle, 5, b"x");
    assert_eq!(client.close(&handle), Status::Ok);
    assert_eq!(client.pair(packet::RENAME, "f", "g\n"), Status::Ok);
    assert_eq!(client.status(packet::MKDIR, |w| w.string(b"d").u32(0)), Status::Ok);
    assert_eq!(client.status(packet::RMDIR, |w| w.string(b"d")), Status::Ok);
    assert_eq!(client.status(packet::REMOVE, |w| w.string(b"gap")), Status::Ok);
    assert_eq!(client.setstat("g\n", 4, &[0o4711]), Status::Ok);
    assert_eq!(client.status(packet::REMOVE, |w| w.string(b".lockstep/audit.jsonl")), Status::PermissionDenied);
    let log = client.log();
    let lines: Vec<serde_json::Value> = log.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let shown: Vec<String> =
        lines.iter().map(|line| format!("{} {}", line["action"], line["path"]).replace('"', "")).collect();
    assert_eq!(
        shown,
        [
            "publish f",
            "publish gap",
            "publish g\\\\n",
            "publish d",
            "remove d",
            "remove gap",
            "refuse g\\\\n",
            "metadata g\\\\n",
            "refuse .lockstep/audit.jsonl"
        ]
    );
    assert!(lines.iter().all(|line| line["actor"] == "someone@somewhere"));
    let digest = crate::manifest::Digest(
        sha2::Digest::finalize(sha2::Digest::chain_update(sha2::Sha256::default(), "one two")).into(),
    );
    assert_eq!((&lines[0]["sha256"], &lines[0]["size"]), (&digest.to_string().into(), &7.into()));
    assert!(lines[1]["sha256"].is_null());
    assert_eq!(lines[2]["source"], "sftp: renamed from 'f'");
}

/// The lines of a log.
fn lines(log: &str) -> Vec<serde_json::Value> {
    log.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn sha256(data: &[u8]) -> serde_json::Value {
    let digest: [u8; 32] = <sha2::Sha256 as sha2::Digest>::digest(data).into();
    crate::manifest::Digest(digest).to_string().into()
}

#[test]
fn s13_a_digest_is_of_all_that_the_session_wrote_by_whichever_handle() {
    let mut client = Client::new(false, &[]);
    let (one, two) = (client.open("f", 0o644), client.open("f", 0o644));
    client.write(&one, 0, b"good");
    client.write(&two, 0, b"evil");
    assert_eq!(client.close(&one), Status::Ok);
    // Cut off by another name of it, and by its name.
    for way in 0..3 {
        let one = client.open("g", 0o644);
        client.write(&one, 0, b"good");
        match way {
            0 => drop(client.setstat("g", 1, &[0, 3])),
            1 => drop(client.ask(packet::OPEN, |w| w.string(b"g").u32(open::WRITE | open::TRUNCATE).u32(0))),
            _ => {}
        }
        assert_eq!(client.close(&one), Status::Ok);
        std::fs::remove_file(client.at.path().join("g")).unwrap();
    }
    // In turn, without a gap.
    let (one, two) = (client.open("h", 0o644), client.open("h", 0o644));
    client.write(&one, 0, b"in ");
    client.write(&two, 3, b"turn");
    assert_eq!((client.close(&one), client.close(&two)), (Status::Ok, Status::Ok));
    let log = lines(&client.log());
    let of = |path: &str| -> Vec<serde_json::Value> {
        log.iter().filter(|line| line["path"] == path).map(|line| line["sha256"].clone()).collect()
    };
    let none = serde_json::Value::Null;
    // The second handle is told when the session ends.
    assert_eq!(of("f"), [none.clone(), none.clone()]);
    assert_eq!(of("g").iter().filter(|digest| **digest == sha256(b"good")).count(), 1, "{log:?}");
    assert_eq!(of("h"), [sha256(b"in turn"), sha256(b"in turn")]);
}

#[test]
fn s13_what_is_not_closed_is_told_and_what_was_there_before_it_is_written_to() {
    let mut client = Client::new(false, &[]);
    client.put("emptied", 0o644, b"content");
    client.put("changed", 0o644, b"content");
    client.put("opened", 0o644, b"content");
    client.ask(packet::OPEN, |w| w.string(b"emptied").u32(open::WRITE | open::TRUNCATE).u32(0));
    let handle = client.open("changed", 0o644);
    client.write(&handle, 2, b"XX");
    client.write(&handle, 4, b"XX");
    let handle = client.open("new", 0o644);
    client.write(&handle, 0, b"half");
    // What is neither written to nor made has no line.
    client.open("opened", 0o644);
    let log = lines(&client.log());
    let shown: Vec<String> = log[3..]
        .iter()
        .map(|line| format!("{} {} {}", line["action"], line["path"], line["result"]).replace('"', ""))
        .collect();
    assert_eq!(
        shown,
        [
            "intent emptied null",
            "intent changed null",
            "publish emptied failure",
            "publish changed failure",
            "publish new failure"
        ]
    );
    assert_eq!([&log[4], &log[6], &log[7]].map(|line| line["size"].as_u64()), [Some(7), Some(7), Some(4)]);
    assert!(log[7]["reason"].as_str().unwrap().contains("before it was closed"));
    assert!(log[7]["sha256"].is_null());
}

#[test]
fn s13_nothing_is_attested_that_somebody_else_has_written_to_meanwhile() {
    for (others_first, hides) in [(true, false), (false, false), (false, true)] {
        let mut client = Client::new(false, &[]);
        let handle = client.open("f", 0o644);
        client.write(&handle, 0, b"good ");
        let path = client.at.path().join("f");
        let stamp = std::time::SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(1_000_000);
        let times = |client: &mut Client, handle: &[u8]| {
            client.status(packet::FSETSTAT, |w| w.string(handle).u32(8).u32(1_000_000).u32(1_000_000))
        };
        let others = || {
            // Where a tick of the clock is long it is another one.
            std::thread::sleep(std::time::Duration::from_millis(20));
            let file = std::fs::File::options().write(true).open(&path).unwrap();
            std::os::unix::fs::FileExt::write_all_at(&file, b"evil", 0).unwrap();
            if hides {
                file.set_modified(stamp).unwrap();
            }
        };
        if others_first {
            others();
        }
        client.write(&handle, 5, b"end");
        if hides {
            assert_eq!(times(&mut client, &handle), Status::Ok);
        }
        if !others_first {
            others();
        }
        assert_eq!(client.close(&handle), Status::Ok);
        let log = lines(&client.log());
        let published = log.iter().find(|line| line["action"] == "publish").unwrap();
        assert_eq!(published["sha256"], serde_json::Value::Null, "{log:#?}");
    }
}

#[test]
fn s13_a_path_that_is_too_long_to_be_told_as_a_whole_is_known_by_its_name() {
    let mut client = Client::new(false, &[("**/f*", "640", None)]);
    let directory = vec!["d".repeat(255); 15].join("/");
    std::fs::create_dir_all(client.at.path().join(&directory)).unwrap();
    let path = format!("{directory}/{}", "f".repeat(255));
    assert!(client.at.path().join(&path).as_os_str().len() > crate::path::PATH_MAX);
    client.put(&path, 0o600, b"good");
    let found =
        client.session.site.root.stat(&crate::path::RelPath::new(path.as_str()).unwrap(), Follow::Never).unwrap();
    assert_eq!(found.mode, 0o640);
    let log = lines(&client.log());
    let published = log.iter().find(|line| line["action"] == "publish").unwrap();
    assert_eq!((&published["sha256"], &published["source"]), (&sha256(b"good"), &"sftp".into()));
}

#[test]
fn s13_a_name_that_was_removed_is_told_however_long_it_is() {
    let mut client = Client::new(false, &[]);
    let long = "f".repeat(255);
    let handle = client.open(&long, 0o600);
    client.write(&handle, 0, b"good");
    std::fs::hard_link(client.at.path().join(&long), client.at.path().join("other")).unwrap();
    std::fs::remove_file(client.at.path().join(&long)).unwrap();
    assert_eq!(client.close(&handle), Status::Ok);
    let log = lines(&client.log());
    let published = log.iter().find(|line| line["action"] == "publish").unwrap();
    assert!(published["source"].as_str().unwrap().ends_with("that name was removed before it was closed"));
    assert_eq!(published["sha256"], serde_json::Value::Null);
}

#[test]
fn what_somebody_moves_out_of_the_root_gets_nothing_by_the_rules() {
    let mut client = Client::new(false, &[("*", "644", None)]);
    let outside = tempfile::tempdir().unwrap();
    let moved = outside.path().join("f");
    let handle = client.open("f", 0o600);
    client.write(&handle, 0, b"good");
    std::fs::rename(client.at.path().join("f"), &moved).unwrap();
    let set = client.status(packet::FSETSTAT, |w| w.string(&handle).u32(8).u32(1).u32(2));
    assert_eq!(set, Status::Failure);
    assert_eq!(client.close(&handle), Status::Ok);
    let found = std::fs::metadata(moved).unwrap();
    assert_eq!(found.permissions().mode() & 0o777, 0o600);
    assert!(found.modified().unwrap().elapsed().unwrap() < std::time::Duration::from_secs(3600));
    let log = lines(&client.log());
    let published = log.iter().find(|line| line["action"] == "publish").unwrap();
    assert!(published["source"].as_str().unwrap().ends_with("it was moved out of the root before it was closed"));
    assert_eq!(published["sha256"], serde_json::Value::Null);
}

#[test]
fn s13_what_a_client_does_to_its_own_file_leaves_its_digest_known() {
    let mut client = Client::new(false, &[("*.bin", "640", None)]);
    for name in ["plain", "ruled.bin"] {
        let handle = client.open("part", 0o600);
        client.write(&handle, 0, b"go");
        std::thread::sleep(std::time::Duration::from_millis(10));
        let set = |flags: u32, values: &[u32], client: &mut Client| {
            client.status(packet::FSETSTAT, |w| {
                w.string(&handle).u32(flags);
                values.iter().fold(w, |w, value| w.u32(*value))
            })
        };
        assert_eq!(set(4, &[0o644], &mut client), Status::Ok);
        assert_eq!(set(8, &[1_000_000, 1_000_000], &mut client), Status::Ok);
        assert_eq!(client.setstat("part", 8, &[2_000_000, 2_000_000]), Status::Ok);
        assert_eq!(client.pair(packet::RENAME, "part", name), Status::Ok);
        client.write(&handle, 2, b"od");
        let other = client.open(name, 0o600);
        assert_eq!((client.close(&handle), client.close(&other)), (Status::Ok, Status::Ok));
    }
    let log = lines(&client.log());
    let digests: Vec<&serde_json::Value> = log.iter().map(|line| &line["sha256"]).filter(|it| !it.is_null()).collect();
    assert_eq!(digests, [&sha256(b"good"), &sha256(b"good")], "{log:#?}");
}

#[test]
fn h46_a_name_that_was_removed_meanwhile_does_not_loosen_what_the_rule_of_it_says() {
    let mut client = Client::new(false, &[("*.key", "600", None)]);
    let handle = client.open("a.key", 0o666);
    client.write(&handle, 0, b"secret");
    let linked =
        client.status(packet::EXTENDED, |w| w.string(b"hardlink@openssh.com").string(b"a.key").string(b"b.key"));
    assert_eq!(linked, Status::Ok);
    assert_eq!(client.status(packet::REMOVE, |w| w.string(b"a.key")), Status::Ok);
    assert_eq!(client.status(packet::FSETSTAT, |w| w.string(&handle).u32(4).u32(0o666)), Status::Ok);
    assert_eq!(client.close(&handle), Status::Ok);
    assert_eq!(client.mode("b.key"), 0o600);
    // One that ends as the kernel marks what was removed is a name like any other.
    client.put("c.key (deleted)", 0o640, b"x");
    assert_eq!(client.mode("c.key (deleted)"), 0o640);
    // What has no name any more is told by nobody.
    let handle = client.open("gone", 0o644);
    client.write(&handle, 0, b"x");
    assert_eq!(client.status(packet::REMOVE, |w| w.string(b"gone")), Status::Ok);
    let log = lines(&client.log());
    assert!(
        log.iter()
            .all(|line| !(line["path"] == "gone (deleted)" || line["action"] == "publish" && line["path"] == "gone"))
    );
}

#[test]
fn s13_a_file_that_is_cut_off_by_its_path_is_told_before() {
    let mut client = Client::new(false, &[]);
    client.put("f", 0o644, b"content");
    let handle = client.open("f", 0o644);
    assert_eq!(client.setstat("f", 1, &[0, 3]), Status::Ok);
    client.write(&handle, 0, b"more content");
    assert_eq!(client.close(&handle), Status::Ok);
    // The other handle writes after it was told what the file is.
    let other = client.open("f", 0o644);
    client.put("f", 0o644, b"again");
    client.write(&other, 0, b"A");
    let log = lines(&client.log());
    let actions: Vec<&str> = log.iter().map(|line| line["action"].as_str().unwrap()).collect();
    // What was set is told, so that what follows is announced anew.
    let expected = ["publish", "intent", "metadata", "intent", "publish", "intent", "publish", "intent", "publish"];
    assert_eq!(actions, expected, "{log:#?}");
    // A length that it has already is no change.
    let mut client = Client::new(false, &[]);
    client.put("f", 0o644, b"content");
    let handle = client.open("f", 0o644);
    assert_eq!(client.status(packet::FSETSTAT, |w| w.string(&handle).u32(1).u64(7)), Status::Ok);
    client.write(&handle, 0, b"C");
    let log = lines(&client.log());
    let actions: Vec<&str> = log.iter().map(|line| line["action"].as_str().unwrap()).collect();
    assert_eq!(actions, ["publish", "metadata", "intent", "publish"], "{log:#?}");
}

#[test]
fn h31_what_cannot_be_recorded_is_not_done() {
    for rules in [&[("x", "600", None)][..], &[]] {
        let mut client = Client::new(false, rules);
        std::fs::write(client.at.path().join(".lockstep"), "in the way").unwrap();
        let made = client.status(packet::MKDIR, |w| w.string(b"second").u32(0));
        assert_eq!(made, Status::Failure);
        let flags = open::WRITE | open::CREATE;
        assert_eq!(client.status(packet::OPEN, |w| w.string(b"first").u32(flags).u32(0)), Status::Failure);
        assert_eq!(std::fs::read_dir(client.at.path()).unwrap().count(), 1);
        // It is tried again after a while.
        std::fs::remove_file(client.at.path().join(".lockstep")).unwrap();
        while client.status(packet::MKDIR, |w| w.string(b"second").u32(0)) != Status::Ok {
            std::thread::yield_now();
        }
    }
}

#[test]
fn h63_without_openat2_a_session_is_confined_all_the_same() {
    let mut client = Client::new(false, &[]);
    let walking = Root::open_without_openat2(client.at.path()).unwrap();
    Arc::get_mut(&mut client.session.site).unwrap().root = walking;
    let outside = tempfile::tempdir().unwrap();
    std::fs::write(outside.path().join("secret"), "x").unwrap();
    std::os::unix::fs::symlink(outside.path(), client.at.path().join("out")).unwrap();
    assert_eq!(client.status(packet::STAT, |w| w.string(b"/out/secret")), Status::NoSuchFile);
    assert_eq!(client.status(packet::MKDIR, |w| w.string(b"/out/d").u32(0)), Status::NoSuchFile);
    assert_eq!(client.status(packet::MKDIR, |w| w.string(b"/../d").u32(0)), Status::Ok);
    client.put("/d/../f", 0o644, b"x");
    assert!(Path::new(client.at.path()).join("f").exists() && !outside.path().join("d").exists());
}

#[test]
fn h13_a_confined_client_makes_no_link_that_leads_out() {
    let mut client = Client::new(false, &[]);
    for directory in ["a", "a/b", "a/b/c"] {
        assert_eq!(client.status(packet::MKDIR, |w| w.string(directory.as_bytes()).u32(0)), Status::Ok);
    }
    for (target, path, made) in [
        ("file", "in", true),
        ("../../../a/x", "a/b/c/up", true),
        ("./a//b", "a/b/odd", true),
        ("/etc/passwd", "absolute", false),
        ("..", "top", false),
        ("../../../../x", "a/b/c/over", false),
        ("up/../x", "a/b/c/again", false),
    ] {
        let expected = if made { Status::Ok } else { Status::PermissionDenied };
        assert_eq!(client.pair(packet::SYMLINK, target, path), expected, "{path} -> {target}");
    }
    // Nor does it get there by another name, or with a directory that moves up.
    let denied = Status::PermissionDenied;
    assert_eq!(client.pair(packet::RENAME, "a/b/c/up", "a/up"), denied);
    assert_eq!(client.pair(packet::RENAME, "a/b/c", "c"), denied);
    assert_eq!(client.pair(packet::RENAME, "a/b", "b"), denied);
    let link = client.status(packet::EXTENDED, |w| w.string(b"hardlink@openssh.com").string(b"a/b/c/up").string(b"up"));
    assert_eq!(link, denied);
    assert_eq!(client.pair(packet::RENAME, "a/b", "a/B"), Status::Ok);
    assert_eq!(client.pair(packet::RENAME, "in", "a/B/c/in"), Status::Ok);
    assert!(client.log().contains("lead out of the root"));
}

#[test]
fn h13_no_link_leads_out_where_the_way_to_it_is_too_long_to_be_looked_at() {
    let mut client = Client::new(false, &[]);
    let name = "n".repeat(255);
    let mut deep = "x/x/x/x/x/x/a".to_owned();
    (0..15).for_each(|_| deep = format!("{deep}/{name}"));
    std::fs::create_dir_all(client.at.path().join(&deep)).unwrap();
    let target = format!("{}etc/shadow", "../".repeat(22));
    assert_eq!(client.pair(packet::SYMLINK, &target, &format!("{deep}/L")), Status::Ok);
    // As 'a' the link would lead six directories further up than the root; with a longer name its path is none.
    assert_eq!(client.pair(packet::RENAME, "x/x/x/x/x/x/a", &name), Status::BadMessage);
    assert_eq!(client.pair(packet::RENAME, "x/x/x/x/x/x/a", "a"), Status::PermissionDenied);
    assert_eq!(client.pair(packet::RENAME, "x/x/x/x/x/x/a", "x/x/x/x/x/x/b"), Status::Ok);
}

#[test]
fn h13_sessions_of_one_root_make_links_and_move_them_one_after_the_other() {
    let mut client = Client::new(false, &[]);
    for directory in ["a", "a/b"] {
        assert_eq!(client.status(packet::MKDIR, |w| w.string(directory.as_bytes()).u32(0)), Status::Ok);
    }
    assert_eq!(client.pair(packet::SYMLINK, "file", "link"), Status::Ok);
    type Ask = fn(&mut Client) -> Status;
    let asks: [(Ask, Status); 3] = [
        // Another session made a link in it, where it stays below the root; as 'b' it would not.
        (|client| client.pair(packet::RENAME, "a/b", "b"), Status::PermissionDenied),
        (|client| client.pair(packet::SYMLINK, "file", "new"), Status::Ok),
        (
            |client| {
                client.status(packet::EXTENDED, |w| w.string(b"hardlink@openssh.com").string(b"link").string(b"c"))
            },
            Status::Ok,
        ),
    ];
    for (ask, expected) in asks {
        let root = Root::open(client.at.path()).unwrap();
        let turn = turn::Turn::take(&root).unwrap();
        let link = client.at.path().join("a/b/up");
        std::thread::scope(|scope| {
            let asked = scope.spawn(|| ask(&mut client));
            std::thread::sleep(std::time::Duration::from_millis(200));
            assert!(!asked.is_finished(), "it was done in the turn of another");
            let _ = std::os::unix::fs::symlink("../../file", &link);
            drop(turn);
            assert_eq!(asked.join().unwrap(), expected);
        });
    }
}

#[test]
fn s12_h47_what_arrives_has_the_acl_of_its_rule_and_no_other() {
    let at = tempfile::tempdir().unwrap();
    let rule = |pattern: &str, acl: &[&str]| RuleSpec {
        pattern: pattern.into(),
        mode: Some("640".into()),
        acl: Some(acl.iter().map(|entry| (*entry).to_owned()).collect()),
        ..RuleSpec::default()
    };
    let policy = PolicySpec { rules: vec![rule("*.txt", &["user:games:r", "group::---"]), rule("plain", &[])] };
    let (root, rights, actor) = (at.path().to_owned(), Rights::FULL, String::new());
    let login = Login::default();
    let config = SessionConfig { root, confine: true, rights, quota: None, policy, actor, login };
    let kept = Arc::new(Kept::default());
    let mut session = Session::new(config, kept.clone(), None).unwrap();
    session.feed(&Writer::new(packet::INIT).u32(3).finish()).unwrap();
    // What the directory would hand down.
    let inherit = std::process::Command::new("setfacl").args(["-d", "-m", "u:daemon:rwx"]).arg(at.path()).status();
    assert!(inherit.expect("setfacl is not installed: Debian package acl").success());
    let mut client = Client { at, kept, session };
    for (name, shown) in [
        ("a.txt", "user::rw-,user:games:r--,group::---,mask::r--,other::---"),
        ("plain", "user::rw-,group::r--,other::---"),
    ] {
        client.put(name, 0o666, b"x");
        let output =
            std::process::Command::new("getfacl").args(["-cp"]).arg(client.at.path().join(name)).output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        assert_eq!(text.split_whitespace().collect::<Vec<_>>().join(","), shown, "{name}");
    }
}
