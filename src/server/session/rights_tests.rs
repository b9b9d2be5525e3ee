//! What each right allows a plain client: every request, with everything that may be done by it to what is there.

use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use super::tests::Kept;
use super::*;
use crate::audit::Login;
use crate::config::Rights;
use crate::wire::sftp::open;

const RIGHTS: [(char, &str); 5] = [('l', "list"), ('r', "read"), ('w', "write"), ('o', "write-once"), ('d', "delete")];

/// A request, what is done by it, the rights of which each is enough for it, and its fields.
struct Row(u8, &'static str, &'static str, &'static str, fn(&mut Writer) -> &mut Writer);

/// A handle that nobody has: what is allowed fails for that, and not for its rights.
const NONE: &[u8] = b"12345678";

fn opening<'a>(w: &'a mut Writer, path: &str, flags: u32) -> &'a mut Writer {
    w.string(path.as_bytes()).u32(flags).u32(0)
}

fn two<'a>(w: &'a mut Writer, first: &str, second: &str) -> &'a mut Writer {
    w.string(first.as_bytes()).string(second.as_bytes())
}

const X: u8 = packet::EXTENDED;

/// `there` and `link` to it, `dir/inner` and `empty` are there; whatever is called `new` is not.
const ROWS: &[Row] = &[
    Row(packet::OPEN, "", "to read", "r", |w| opening(w, "there", open::READ)),
    Row(packet::OPEN, "", "without a flag", "r", |w| opening(w, "there", 0)),
    Row(packet::OPEN, "", "to write what is there", "w", |w| opening(w, "there", open::WRITE)),
    Row(packet::OPEN, "", "to append", "w", |w| opening(w, "there", open::WRITE | open::APPEND)),
    Row(packet::OPEN, "", "to append alone", "w", |w| opening(w, "there", open::APPEND)),
    Row(packet::OPEN, "", "to empty", "w", |w| opening(w, "there", open::WRITE | open::TRUNCATE)),
    Row(packet::OPEN, "", "to empty alone", "w", |w| opening(w, "there", open::TRUNCATE)),
    Row(packet::OPEN, "", "to replace", "w", |w| opening(w, "there", open::WRITE | open::CREATE | open::TRUNCATE)),
    Row(packet::OPEN, "", "to go on", "w", |w| opening(w, "there", open::WRITE | open::CREATE)),
    Row(packet::OPEN, "", "to go on at the end", "w", |w| {
        opening(w, "there", open::WRITE | open::CREATE | open::APPEND)
    }),
    Row(packet::OPEN, "", "by a link", "w", |w| opening(w, "link", open::WRITE | open::CREATE | open::TRUNCATE)),
    Row(packet::OPEN, "", "to make", "wo", |w| opening(w, "new", open::WRITE | open::CREATE | open::TRUNCATE)),
    Row(packet::OPEN, "", "to make alone", "wo", |w| opening(w, "new", open::WRITE | open::CREATE | open::EXCLUSIVE)),
    Row(packet::OPEN, "", "to make in a directory", "wo", |w| opening(w, "dir/new", open::WRITE | open::CREATE)),
    Row(packet::OPEN, "", "to read and make", "", |w| opening(w, "new", open::READ | open::WRITE | open::CREATE)),
    Row(packet::CLOSE, "", "", "lrwod", |w| w.string(NONE)),
    Row(packet::READ, "", "", "r", |w| w.string(NONE).u64(0).u32(10)),
    Row(packet::WRITE, "", "", "wo", |w| w.string(NONE).u64(0).string(b"x")),
    Row(packet::LSTAT, "", "", "lr", |w| w.string(b"link")),
    Row(packet::FSTAT, "", "", "lrwod", |w| w.string(NONE)),
    Row(packet::SETSTAT, "", "mode", "w", |w| w.string(b"there").u32(4).u32(0o600)),
    Row(packet::SETSTAT, "", "size", "w", |w| w.string(b"there").u32(1).u64(1)),
    Row(packet::SETSTAT, "", "a larger size", "w", |w| w.string(b"there").u32(1).u64(100)),
    Row(packet::SETSTAT, "", "times", "w", |w| w.string(b"there").u32(8).u32(1).u32(2)),
    Row(packet::SETSTAT, "", "times of a directory", "w", |w| w.string(b"dir").u32(8).u32(1).u32(2)),
    Row(packet::SETSTAT, "", "times of the top", "w", |w| w.string(b"/").u32(8).u32(1).u32(2)),
    Row(packet::FSETSTAT, "", "", "wo", |w| w.string(NONE).u32(4).u32(0o600)),
    Row(packet::OPENDIR, "", "", "l", |w| w.string(b"dir")),
    Row(packet::READDIR, "", "", "l", |w| w.string(NONE)),
    Row(packet::REMOVE, "", "a file", "d", |w| w.string(b"there")),
    Row(packet::REMOVE, "", "a link", "d", |w| w.string(b"link")),
    Row(packet::MKDIR, "", "", "wo", |w| w.string(b"new").u32(0)),
    Row(packet::RMDIR, "", "", "d", |w| w.string(b"empty")),
    Row(packet::REALPATH, "", "", "lrwod", |w| w.string(b"link")),
    Row(packet::STAT, "", "", "lr", |w| w.string(b"there")),
    Row(packet::RENAME, "", "to a new name", "w", |w| two(w, "there", "new")),
    Row(packet::RENAME, "", "a directory", "w", |w| two(w, "dir", "new")),
    Row(packet::RENAME, "", "the other way", "w", |w| two(w, "dir/inner", "new")),
    Row(packet::READLINK, "", "", "lr", |w| w.string(b"link")),
    Row(packet::SYMLINK, "", "", "wo", |w| two(w, "there", "new")),
    Row(X, "posix-rename@openssh.com", "over a file", "w", |w| two(w, "dir/inner", "there")),
    Row(X, "posix-rename@openssh.com", "over a link", "w", |w| two(w, "there", "link")),
    Row(X, "posix-rename@openssh.com", "over a directory", "w", |w| two(w, "dir", "empty")),
    Row(X, "statvfs@openssh.com", "", "lr", |w| w.string(b"/")),
    Row(X, "fstatvfs@openssh.com", "", "lrwod", |w| w.string(NONE)),
    Row(X, "hardlink@openssh.com", "", "wo", |w| two(w, "there", "new")),
    Row(X, "fsync@openssh.com", "", "wo", |w| w.string(NONE)),
    Row(X, "lsetstat@openssh.com", "mode", "w", |w| w.string(b"there").u32(4).u32(0o600)),
    Row(X, "lsetstat@openssh.com", "times of a link", "w", |w| w.string(b"link").u32(8).u32(1).u32(2)),
    Row(X, "limits@openssh.com", "", "lrwod", |w| w),
    Row(X, "expand-path@openssh.com", "", "lrwod", |w| w.string(b"~/x")),
    Row(X, "copy-data", "", "wo", |w| w.string(NONE).u64(0).u64(0).string(NONE).u64(0)),
    Row(X, "home-directory", "", "lrwod", |w| w.string(b"")),
    Row(X, "users-groups-by-id@openssh.com", "", "lr", |w| w.string(b"").string(b"")),
];

/// Of each path below a directory: all that may change. The number of its names may.
fn snapshot(at: &Path) -> BTreeMap<String, String> {
    let mut found = BTreeMap::new();
    for entry in walkdir::WalkDir::new(at).min_depth(1) {
        let entry = entry.unwrap();
        let name = entry.path().strip_prefix(at).unwrap().to_str().unwrap().to_owned();
        if name.starts_with(".lockstep") {
            continue;
        }
        let (is, kind) = (entry.metadata().unwrap(), entry.file_type());
        let content = if kind.is_file() { std::fs::read_to_string(entry.path()).unwrap() } else { String::new() };
        let target = std::fs::read_link(entry.path()).unwrap_or_default();
        // What is made in a directory moves its time, whoever may.
        let time = if kind.is_dir() { 0 } else { is.mtime_nsec() + is.mtime() };
        let what = format!("{} {:o} {} {} {time} {content:?} {target:?}", is.ino(), is.mode(), is.uid(), is.gid());
        found.insert(name, what);
    }
    found
}

struct Client {
    at: tempfile::TempDir,
    kept: Arc<Kept>,
    session: Session,
}

impl Client {
    fn new(rights: &str) -> Client {
        let at = tempfile::tempdir().unwrap();
        let path = |name: &str| at.path().join(name);
        std::fs::write(path("there"), "what is there").unwrap();
        std::os::unix::fs::symlink("there", path("link")).unwrap();
        std::fs::create_dir(path("dir")).unwrap();
        std::fs::write(path("dir/inner"), "inner").unwrap();
        std::fs::create_dir(path("empty")).unwrap();
        let (rights, policy) = (rights.parse::<Rights>().unwrap(), PolicySpec::default());
        let (root, actor) = (at.path().to_owned(), "someone".to_owned());
        let kept = Arc::new(Kept::default());
        let config = SessionConfig { root, confine: true, rights, quota: None, policy, actor, login: Login::default() };
        let mut session = Session::new(config, kept.clone(), None).unwrap();
        session.feed(&Writer::new(packet::INIT).u32(3).finish()).unwrap();
        Client { at, kept, session }
    }

    fn version(&self) -> Vec<u8> {
        self.kept.0.lock().unwrap()[0].clone()
    }

    /// The type of the answer, and what follows the number.
    fn ask(&mut self, kind: u8, name: &str, fields: impl FnOnce(&mut Writer) -> &mut Writer) -> (u8, Vec<u8>) {
        let mut request = Writer::new(kind);
        request.u32(7);
        if kind == X {
            request.string(name.as_bytes());
        }
        fields(&mut request);
        self.session.feed(&request.finish()).unwrap();
        self.session.lanes.wait();
        let reply = self.kept.0.lock().unwrap().pop().unwrap();
        (reply[4], reply[9..].to_vec())
    }

    fn status(&mut self, kind: u8, name: &str, fields: impl FnOnce(&mut Writer) -> &mut Writer) -> Status {
        let (kind, body) = self.ask(kind, name, fields);
        match kind {
            packet::STATUS => Status::from_code(Reader(&body).u32().unwrap()),
            _ => Status::Ok,
        }
    }

    fn made(&mut self, path: &str) -> Vec<u8> {
        let (kind, body) = self.ask(packet::OPEN, "", |w| opening(w, path, open::WRITE | open::CREATE));
        assert_eq!(kind, packet::HANDLE);
        Reader(&body).string().unwrap().to_vec()
    }
}

#[test]
fn each_request_is_allowed_by_its_rights_alone_and_touches_nothing_else() {
    for request in &REQUESTS {
        assert!(
            ROWS.iter().any(|row| row.0 == request.kind && row.1 == request.name),
            "no row for the request {} {}",
            request.kind,
            request.name
        );
    }
    for Row(kind, name, what, allowed, fields) in ROWS {
        for (letter, right) in RIGHTS {
            let mut client = Client::new(right);
            let before = snapshot(client.at.path());
            let status = client.status(*kind, name, fields);
            let case = format!("{kind} {name} {what} with {right}: {status:?}");
            assert_eq!(status != Status::PermissionDenied, allowed.contains(letter), "{case}");
            client.session.finish();
            let after = snapshot(client.at.path());
            let kept = before.iter().all(|(path, was)| after.get(path) == Some(was));
            let made = after.keys().any(|path| !before.contains_key(path));
            match letter {
                'w' => {}
                'o' => assert!(kept, "{case}: {before:#?} became {after:#?}"),
                'd' => assert!(after.iter().all(|(path, is)| before.get(path) == Some(is)), "{case}"),
                _ => assert!(kept && !made, "{case}"),
            }
            if !allowed.contains(letter) {
                assert!(kept && !made, "{case} was refused and done");
            }
        }
    }
}

#[test]
fn what_is_advertised_is_what_is_allowed() {
    for (letter, right) in RIGHTS {
        let version = Client::new(right).version();
        let mut names = Vec::new();
        let mut fields = Reader(&version[9..]);
        while let Ok(name) = fields.string() {
            names.push(name);
            fields.string().unwrap();
        }
        let advertised = |name: &str| names.contains(&name.as_bytes());
        for Row(_, name, what, allowed, _) in ROWS.iter().filter(|row| row.0 == X) {
            assert_eq!(advertised(name), allowed.contains(letter), "{name} {what} with {right}");
        }
    }
}

#[test]
fn what_was_made_is_filled_until_it_is_closed_and_never_after() {
    let mut client = Client::new("list,read,write-once");
    let handle = client.made("new");
    assert_eq!(client.status(packet::WRITE, "", |w| w.string(&handle).u64(0).string(b"data")), Status::Ok);
    for fields in [[4_u32, 0o640].as_slice(), &[8, 1, 2]] {
        let set = |w: &mut Writer| {
            w.string(&handle);
            for field in fields {
                w.u32(*field);
            }
        };
        let status = client.status(packet::FSETSTAT, "", |w| {
            set(w);
            w
        });
        assert_eq!(status, Status::Ok);
    }
    assert_eq!(client.status(packet::CLOSE, "", |w| w.string(&handle)), Status::Ok);
    let before = snapshot(client.at.path());
    assert!(before["new"].contains("\"data\"") && before["new"].contains("640"), "{before:?}");
    // A handle to read by is none to change by.
    let (_, body) = client.ask(packet::OPEN, "", |w| opening(w, "new", open::READ));
    let reading = Reader(&body).string().unwrap().to_vec();
    let denied = Status::PermissionDenied;
    assert_eq!(client.status(packet::FSETSTAT, "", |w| w.string(&reading).u32(4).u32(0o777)), denied);
    assert_eq!(client.status(packet::FSETSTAT, "", |w| w.string(&reading).u32(1).u64(0)), denied);
    assert_ne!(client.status(packet::WRITE, "", |w| w.string(&reading).u64(0).string(b"x")), Status::Ok);
    let other = client.made("other");
    let copy = |from: &[u8], to: &[u8], client: &mut Client| {
        client.status(X, "copy-data", |w| w.string(from).u64(0).u64(0).string(to).u64(0))
    };
    assert_eq!(copy(&reading, &other, &mut client), Status::Ok);
    assert_ne!(copy(&other, &reading, &mut client), Status::Ok);
    // A further name does not open it.
    assert_eq!(client.status(X, "hardlink@openssh.com", |w| two(w, "new", "name")), Status::Ok);
    assert_eq!(client.status(packet::OPEN, "", |w| opening(w, "name", open::WRITE | open::CREATE)), denied);
    let Client { at, mut session, .. } = client;
    session.finish();
    // With it the log is complete.
    drop(session);
    let after = snapshot(at.path());
    assert_eq!(after["new"], before["new"]);
    assert_eq!(std::fs::read_to_string(at.path().join("other")).unwrap(), "data");
    let log = std::fs::read_to_string(at.path().join(crate::audit::LOG)).unwrap();
    assert!(log.contains("write-once") && log.contains("\"path\":\"name\""), "{log}");
}

#[test]
fn who_may_not_look_learns_nothing_by_a_path() {
    let mut client = Client::new("write-once");
    let real = |path: &str, client: &mut Client| {
        let (kind, body) = client.ask(packet::REALPATH, "", |w| w.string(path.as_bytes()));
        assert_eq!(kind, packet::NAME);
        String::from_utf8(Reader(&body[4..]).string().unwrap().to_vec()).unwrap()
    };
    for (path, shown) in [(".", "/"), ("link", "/link"), ("a/../../b//./c", "/b/c"), ("dir/inner/..", "/dir")] {
        assert_eq!(real(path, &mut client), shown, "{path}");
    }
}

/// A session with a quota of 100,000 bytes and 8 files.
fn limited(at: &Path, kept: &Arc<Kept>) -> Session {
    let config = SessionConfig {
        root: at.to_owned(),
        confine: true,
        rights: Rights::FULL,
        quota: Some(Quota { bytes: Some(100_000), files: Some(8) }),
        policy: PolicySpec::default(),
        actor: String::new(),
        login: Login::default(),
    };
    let mut session = Session::new(config, kept.clone(), None).unwrap();
    session.feed(&Writer::new(packet::INIT).u32(3).finish()).unwrap();
    session
}

#[test]
fn a_quota_is_of_what_lies_there_by_whichever_handle_and_session_it_came() {
    let Client { at, kept, session } = Client::new("list,read,write,delete");
    drop(session);
    let session = limited(at.path(), &kept);
    let mut client = Client { at, kept, session };
    let write = |handle: &[u8], client: &mut Client| {
        client.status(packet::WRITE, "", |w| w.string(handle).u64(0).string(&vec![7; 60_000]))
    };
    let close = |handle: &[u8], client: &mut Client| client.status(packet::CLOSE, "", |w| w.string(handle));
    let emptied = |name: &str, client: &mut Client| {
        let (kind, body) = client.ask(packet::OPEN, "", |w| opening(w, name, open::WRITE | open::TRUNCATE));
        assert_eq!(kind, packet::HANDLE);
        Reader(&body).string().unwrap().to_vec()
    };
    let (one, other) = (client.made("one"), client.made("other"));
    assert_eq!(write(&one, &mut client), Status::Ok);
    // Another handle gives its room back; what is written then takes it anew.
    let again = emptied("one", &mut client);
    assert_eq!(write(&one, &mut client), Status::Ok);
    assert_eq!(write(&again, &mut client), Status::Ok, "what is written over is not new");
    assert_eq!(write(&other, &mut client), Status::Failure);
    assert_eq!(client.status(packet::SETSTAT, "", |w| w.string(b"one").u32(1).u64(0)), Status::Ok);
    assert_eq!(write(&one, &mut client), Status::Ok);
    assert_eq!(write(&other, &mut client), Status::Failure);
    // What this session removes is empty, though it has it open, and takes nothing more.
    let said = |kind: u8, name: &str, client: &mut Client| {
        let (_, said) = client.ask(kind, "", |w| w.string(name.as_bytes()));
        String::from_utf8_lossy(&said).into_owned()
    };
    assert_eq!(client.status(packet::REMOVE, "", |w| w.string(b"one")), Status::Ok);
    let (_, refused) = client.ask(packet::WRITE, "", |w| w.string(&again).u64(0).string(b"more"));
    assert!(String::from_utf8_lossy(&refused).contains("it was removed by this session"));
    assert_eq!(client.status(packet::FSETSTAT, "", |w| w.string(&one).u32(1).u64(50_000)), Status::Failure);
    assert_eq!(write(&other, &mut client), Status::Ok);
    assert_eq!((close(&one, &mut client), close(&again, &mut client)), (Status::Ok, Status::Ok));
    // So does what is replaced.
    let replaced = client.made("replaced");
    assert_eq!(client.status(X, "posix-rename@openssh.com", |w| two(w, "link", "replaced")), Status::Ok);
    assert_eq!(write(&replaced, &mut client), Status::Failure);
    // A file with another name takes its room still.
    assert_eq!(client.status(X, "hardlink@openssh.com", |w| two(w, "other", "twice")), Status::Ok);
    assert_eq!(client.status(packet::REMOVE, "", |w| w.string(b"other")), Status::Ok);
    assert_eq!(client.status(packet::RENAME, "", |w| two(w, "twice", "other")), Status::Ok);
    let full = client.made("full");
    assert_eq!(write(&full, &mut client), Status::Failure);
    assert_eq!(close(&full, &mut client), Status::Ok);
    assert_eq!(client.status(packet::REMOVE, "", |w| w.string(b"full")), Status::Ok);
    // Nor does a second session help: one at a time writes to a file.
    let kept = Arc::new(Kept::default());
    let Client { at, kept: own, session } = client;
    let mut second = Client { session: limited(at.path(), &kept), at: tempfile::tempdir().unwrap(), kept };
    let mut client = Client { at, kept: own, session };
    let busy = "another session, or a program there, is writing to it";
    assert!(said(packet::REMOVE, "other", &mut second).contains(busy));
    assert_eq!(second.status(X, "posix-rename@openssh.com", |w| two(w, "there", "other")), Status::Failure);
    assert_eq!(second.status(packet::SETSTAT, "", |w| w.string(b"other").u32(1).u64(0)), Status::Failure);
    for flags in [open::WRITE, open::WRITE | open::TRUNCATE, open::READ | open::WRITE] {
        assert_eq!(second.status(packet::OPEN, "", |w| opening(w, "other", flags)), Status::Failure);
    }
    assert_eq!(std::fs::metadata(client.at.path().join("other")).unwrap().len(), 60_000);
    let third = second.made("third");
    assert_eq!(write(&third, &mut second), Status::Failure);
    assert_eq!(close(&other, &mut client), Status::Ok);
    drop(emptied("other", &mut second));
    assert_eq!(write(&third, &mut second), Status::Ok);
}

/// Notes how much of what was taken from a quota is not there when the session asks whether its client still is.
struct Watching {
    at: std::path::PathBuf,
    kept: Kept,
    most_ahead: Mutex<u64>,
}

impl Output for Watching {
    fn send(&self, packet: Vec<u8>) {
        self.kept.send(packet);
    }

    fn is_gone(&self) -> bool {
        let usage = std::fs::read_to_string(self.at.join(".lockstep/usage")).unwrap();
        let taken: u64 = usage.split(' ').nth(4).unwrap().parse().unwrap();
        let stored = std::fs::metadata(self.at.join("to")).unwrap().len();
        let mut most = self.most_ahead.lock().unwrap();
        *most = most.max(taken - stored);
        false
    }
}

#[test]
fn a_copy_takes_no_more_of_a_quota_at_once_than_what_is_sent() {
    use crate::server::quota::STEP_BYTES;
    let at = tempfile::tempdir().unwrap();
    let size = 50 * STEP_BYTES + 1000;
    std::fs::File::create(at.path().join("from")).unwrap().set_len(size).unwrap();
    let output = Arc::new(Watching { at: at.path().to_owned(), kept: Kept::default(), most_ahead: Mutex::default() });
    let config = SessionConfig {
        root: at.path().to_owned(),
        confine: true,
        rights: Rights::FULL,
        quota: Some(Quota { bytes: Some(3 * size), files: None }),
        policy: PolicySpec::default(),
        actor: String::new(),
        login: Login::default(),
    };
    let mut session = Session::new(config, output.clone(), None).unwrap();
    session.feed(&Writer::new(packet::INIT).u32(3).finish()).unwrap();
    let mut ask = |request: &mut Writer| {
        session.feed(&request.finish()).unwrap();
        session.lanes.wait();
        let reply = output.kept.0.lock().unwrap().pop().unwrap();
        reply[9..].to_vec()
    };
    let mut opened = |path: &str, flags: u32| {
        let body = ask(opening(Writer::new(packet::OPEN).u32(7), path, flags));
        Reader(&body).string().unwrap().to_vec()
    };
    let (from, to) = (opened("from", open::READ), opened("to", open::WRITE | open::CREATE));
    let mut copy = |length: u64, to_at: u64| {
        let mut request = Writer::new(X);
        let said = ask(request.u32(7).string(b"copy-data").string(&from).u64(0).u64(length).string(&to).u64(to_at));
        Status::from_code(Reader(&said).u32().unwrap())
    };
    assert_eq!(copy(0, 0), Status::Ok);
    let stored = || std::fs::metadata(at.path().join("to")).unwrap().len();
    assert_eq!(stored(), size);
    let most = *output.most_ahead.lock().unwrap();
    assert!(most > 0 && most <= STEP_BYTES, "{most}");
    // As much as there is, and no more; what does not fit is not begun.
    assert_eq!(copy(size + 1, 0), Status::EndOfFile);
    assert_eq!(copy(0, size + 1), Status::Failure);
    assert_eq!(stored(), size);
}

#[test]
fn a_quota_is_taken_from_before_anything_is_stored() {
    let Client { at, kept, session } = Client::new("list,read,write,delete");
    drop(session);
    let session = limited(at.path(), &kept);
    let mut client = Client { at, kept, session };
    // There are 5 entries of 18 bytes.
    let handle = client.made("new");
    let write = |offset: u64, length: usize, client: &mut Client| {
        client.ask(packet::WRITE, "", |w| w.string(&handle).u64(offset).string(&vec![7; length]))
    };
    let ok = |answer: &(u8, Vec<u8>)| answer.1.starts_with(&[0, 0, 0, 0]);
    assert!(ok(&write(0, 90_000, &mut client)));
    assert!(ok(&write(0, 90_000, &mut client)), "what is written over is not new");
    let refused = write(90_000, 10_000, &mut client);
    let said = String::from_utf8_lossy(&refused.1);
    assert!(!ok(&refused) && said.contains("of 100.0 kB are used"), "{said}");
    assert_eq!(std::fs::metadata(client.at.path().join("new")).unwrap().len(), 90_000);
    let size =
        |size: u64, client: &mut Client| client.status(packet::SETSTAT, "", |w| w.string(b"there").u32(1).u64(size));
    assert_eq!(size(20_000, &mut client), Status::Failure);
    assert_eq!(size(5_000, &mut client), Status::Ok);
    let copied = client.status(X, "copy-data", |w| w.string(&handle).u64(0).u64(0).string(&handle).u64(0));
    assert_ne!(copied, Status::Ok);
    // Names: 6 of 8.
    let make = |name: &str, client: &mut Client| client.status(packet::MKDIR, "", |w| w.string(name.as_bytes()).u32(0));
    assert_eq!([make("d1", &mut client), make("d2", &mut client)], [Status::Ok, Status::Ok]);
    assert_eq!(make("d3", &mut client), Status::Failure);
    assert_eq!(client.status(packet::SYMLINK, "", |w| two(w, "there", "s")), Status::Failure);
    assert_eq!(client.status(X, "hardlink@openssh.com", |w| two(w, "there", "h")), Status::Failure);
    assert_eq!(client.status(packet::OPEN, "", |w| opening(w, "f", open::WRITE | open::CREATE)), Status::Failure);
    assert!(!client.at.path().join("f").exists());
    // What goes makes room, whichever way.
    assert_eq!(client.status(packet::RMDIR, "", |w| w.string(b"d1")), Status::Ok);
    assert_eq!(make("d3", &mut client), Status::Ok);
    assert_eq!(client.status(X, "posix-rename@openssh.com", |w| two(w, "there", "link")), Status::Ok);
    assert_eq!(make("d4", &mut client), Status::Ok);
    assert_eq!(client.status(packet::CLOSE, "", |w| w.string(&handle)), Status::Ok);
    assert_eq!(client.status(packet::REMOVE, "", |w| w.string(b"new")), Status::Ok);
    let handle = client.made("again");
    assert_eq!(client.status(packet::WRITE, "", |w| w.string(&handle).u64(0).string(&vec![7; 90_000])), Status::Ok);
    let (_, body) = client.ask(X, "statvfs@openssh.com", |w| w.string(b"/"));
    let mut fields = Reader(&body);
    let [_, block, blocks, free] = std::array::from_fn(|_| fields.u64().unwrap());
    assert!(blocks * block <= 100_000 && free * block <= 10_000, "{blocks} {free} of {block}");
}
