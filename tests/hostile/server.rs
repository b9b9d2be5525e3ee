//! What a client does with an agent that is hostile: a server of the test's own, which answers whatever it likes.

use std::sync::Arc;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use bytes::Bytes;
use crossbeam_channel::{Receiver, Sender, unbounded};
use lockstep::codec::CompressOptions;
use lockstep::endpoint::agent::{AgentSource, AgentTarget, Lanes};
use lockstep::endpoint::client::{Client, ClientOptions};
use lockstep::endpoint::link::{Link, LinkError};
use lockstep::endpoint::{
    BeginOptions, Block, CommitOptions, Committed, Error, Fetch, Produced, ScanOptions, Source as _, Target as _,
};
use lockstep::error::SAID_MAX;
use lockstep::manifest::{Content, Digest, Entry, Timestamp, Tree};
use lockstep::monitor::{Counters, Event, Monitor, Silent};
use lockstep::path::RelPath;
use lockstep::wire::extension::{self, DOMAIN, Fields, NAMES, VERSION, put_entry, put_frame, put_string};

/// What comes back for a request: its name without the domain, and its body.
type Script = Box<dyn Fn(&str, &[u8]) -> Result<Vec<u8>, Vec<u8>> + Send + Sync>;

struct Hostile {
    script: Script,
    /// What it names as its extensions.
    names: Vec<&'static str>,
    answers: (Sender<Bytes>, Receiver<Bytes>),
}

impl Link for Hostile {
    fn send(&self, packet: Bytes) -> Result<(), LinkError> {
        let mut fields = Fields(&packet[4..]);
        let answer = if fields.u8().unwrap() == 1 {
            let mut body = vec![2, 0, 0, 0, 3];
            for name in &self.names {
                put_string(&mut body, name.as_bytes());
                put_string(&mut body, VERSION.as_bytes());
            }
            [&(body.len() as u32).to_be_bytes()[..], &body].concat()
        } else {
            let id = fields.u32().unwrap();
            let name = fields.text().unwrap();
            match (self.script)(name.strip_suffix(DOMAIN).unwrap(), fields.0) {
                Ok(body) => extension::reply(id, &body),
                Err(message) => {
                    let mut packet = extension::status(id, 4, &"x".repeat(message.len()), 4);
                    let at = 4 + 1 + 4 + 4 + 4;
                    packet[at..at + message.len()].copy_from_slice(&message);
                    packet
                }
            }
        };
        let _ = self.answers.0.send(answer.into());
        Ok(())
    }

    fn recv(&self) -> Result<Option<Bytes>, LinkError> {
        Ok(self.answers.1.recv().ok().filter(|bytes| !bytes.is_empty()))
    }

    fn close(&self) {
        let _ = self.answers.0.send(Bytes::new());
    }
}

fn lanes(script: impl Fn(&str, &[u8]) -> Result<Vec<u8>, Vec<u8>> + Send + Sync + 'static) -> Lanes {
    lanes_with(NAMES.to_vec(), script)
}

fn lanes_with(
    names: Vec<&'static str>,
    script: impl Fn(&str, &[u8]) -> Result<Vec<u8>, Vec<u8>> + Send + Sync + 'static,
) -> Lanes {
    let link = Hostile { script: Box::new(script), names, answers: unbounded() };
    let client = Client::connect(Arc::new(link), "hostile", ClientOptions::default()).unwrap();
    let compress = CompressOptions { level: None, enabled: false };
    Lanes::over(client, 1, Box::new(|_| None), b"/x", compress).unwrap()
}

/// Keeps what is told.
#[derive(Default)]
struct Told(Mutex<Vec<String>>, Counters);

impl Monitor for Told {
    fn event(&self, event: Event<'_>) {
        let text = match event {
            Event::Detail(text) | Event::Warning(text) => text.to_owned(),
            Event::Problem(problem) => problem.message.clone(),
            Event::Phase(_) => return,
        };
        self.0.lock().unwrap().push(text);
    }

    fn counters(&self) -> &Counters {
        &self.1
    }
}

fn entry(path: &str, content: Content) -> Entry {
    let (owner, group) = ("o".into(), "g".into());
    Entry { path: RelPath::new(path).unwrap(), content, mtime: Timestamp::default(), mode: 0o644, owner, group }
}

fn file(path: &str, size: u64) -> Entry {
    entry(path, Content::File { size, digest: None })
}

fn link(path: &str, target: &str) -> Entry {
    entry(path, Content::Symlink { target: target.as_bytes().into() })
}

fn frame(raw: &[u8]) -> Vec<u8> {
    let mut body = Vec::new();
    put_frame(&mut body, raw, None);
    body
}

fn no_notes(mut body: Vec<u8>) -> Vec<u8> {
    body.extend([0; 8]);
    body
}

/// Answers a scan: so many entries, so many problems.
fn scanned(entries: u32, problems: u32) -> Vec<u8> {
    let mut body = Vec::new();
    put_string(&mut body, b"");
    body.extend(entries.to_be_bytes());
    body.extend(problems.to_be_bytes());
    no_notes(body)
}

fn piece(kind: u8, fields: &[&[u8]]) -> Vec<u8> {
    [&[kind][..], &0_u32.to_be_bytes(), &fields.concat()].concat()
}

/// Kind 1.
fn data(offset: u64, data: &[u8]) -> Vec<u8> {
    piece(1, &[&offset.to_be_bytes(), &(data.len() as u32).to_be_bytes(), data])
}

/// Kind 2.
fn hole(offset: u64, length: u64) -> Vec<u8> {
    piece(2, &[&offset.to_be_bytes(), &length.to_be_bytes()])
}

/// Reads one file of this size from a server that answers each `next` with these pieces.
fn read(size: u64, fetch: Fetch, pieces: Vec<u8>) -> Result<Vec<Produced>, Error> {
    let source = AgentSource::new(lanes(move |name, _| Ok(if name == "next" { frame(&pieces) } else { Vec::new() })));
    let tree = Tree::new(vec![file("f", size)]).unwrap();
    let mut reader = source.reader(Arc::new(tree)).unwrap();
    reader.push(fetch);
    let started = Instant::now();
    let mut produced = Vec::new();
    while let Some(piece) = reader.next()? {
        produced.push(piece);
        assert!(started.elapsed() < Duration::from_secs(10), "it never ends");
    }
    Ok(produced)
}

#[test]
fn a_server_that_brings_nothing_on_ends_the_pull() {
    let fetch = Fetch::of(0);
    let digest = [7; 32];
    let large = 1 << 50;
    let cases: Vec<(&str, u64, Vec<u8>)> = vec![
        ("nothing", 9, Vec::new()),
        ("data without bytes", 9, data(0, b"")),
        ("a hole without length", 9, hole(0, 0)),
        ("the same again", large, data(0, b"again")),
        ("the same hole again", large, hole(0, 5)),
        ("data beyond the end", 9, data(0, b"0123456789")),
        ("data at the end of the world", 9, data(u64::MAX, b"01")),
        ("a gap", 9, data(4, b"0")),
        ("years of zeros", large, hole(0, large)),
        ("an early end", 9, piece(3, &[&digest])),
        ("what was not asked", 9, piece(4, &[&digest])),
        ("too much", 2, piece(0, &[&digest, &3_u32.to_be_bytes(), b"abc"])),
        ("too little", 4, piece(0, &[&digest, &3_u32.to_be_bytes(), b"abc"])),
        ("another file", 9, [&[5][..], &1_u32.to_be_bytes(), &[0], &[0; 4]].concat()),
    ];
    for (what, size, pieces) in cases {
        let error = read(size, fetch, pieces).map(drop).unwrap_err();
        assert!(matches!(error, Error::Protocol { .. }), "{what}: {error}");
    }
    let other = Fetch { unless: Some(Digest([8; 32])), ..fetch };
    assert!(read(9, other, piece(4, &[&digest])).is_err());
    // What an honest one answers: empty bundles come after everything.
    let good = [data(0, b"01"), hole(2, 7), piece(3, &[&digest])].concat();
    assert_eq!(read(9, fetch, good).unwrap().len(), 3);
    assert_eq!(read(9, Fetch { from: 2, ..fetch }, [hole(2, 7), piece(3, &[&digest])].concat()).unwrap().len(), 2);
    assert_eq!(read(9, Fetch { from: 9, ..fetch }, piece(3, &[&digest])).unwrap().len(), 1);
}

#[test]
fn h13_a_server_that_lists_what_it_was_asked_to_leave_out_ends_the_pull() {
    let cases: [(&str, &[Entry], u32, u32); 8] = [
        ("out", &[link("l", "/etc/passwd")], 1, 0),
        ("above", &[link("d/l", "../../x")], 1, 0),
        ("through a link", &[link("d", "."), link("e", "d/../x")], 2, 0),
        ("the wrong order", &[file("b", 1), file("a", 1)], 2, 0),
        ("twice", &[file("a", 1), file("a", 1)], 2, 0),
        ("more than it said", &[file("a", 1), file("b", 1)], 1, 0),
        ("nothing more", &[], 2, 0),
        ("below a link", &[link("d", "x"), file("d/f", 1)], 2, 0),
    ];
    for (what, entries, count, problems) in cases {
        let mut raw = Vec::new();
        entries.iter().for_each(|entry| put_entry(&mut raw, entry));
        let answer =
            move |name: &str, _: &[u8]| Ok(if name == "scan" { scanned(count, problems) } else { frame(&raw) });
        let error = AgentSource::new(lanes(answer)).scan(&ScanOptions::default(), &Silent::default()).unwrap_err();
        assert!(matches!(error, Error::Protocol { .. }), "{what}: {error}");
    }
    // A list of problems that never ends.
    let mut raw = Vec::new();
    (0..4000).for_each(|_| raw.extend([[0; 4], [0; 4]].concat().into_iter().chain([0])));
    let answer = move |name: &str, _: &[u8]| Ok(if name == "scan" { scanned(0, 10) } else { frame(&raw) });
    assert!(AgentSource::new(lanes(answer)).scan(&ScanOptions::default(), &Silent::default()).is_err());
}

#[test]
fn a_plan_that_does_not_fit_the_tree_or_never_ends_is_refused() {
    let removal = |path: &str| {
        let mut raw = Vec::new();
        put_string(&mut raw, path.as_bytes());
        raw.push(0);
        raw
    };
    let cases: [(&str, Vec<u8>, u32); 4] = [
        ("nothing", Vec::new(), 0),
        ("the wrong order", [removal("b"), removal("a")].concat(), 2),
        ("again and again", removal("a"), 1),
        ("out of the tree", removal("../x"), 1),
    ];
    for (what, raw, count) in cases {
        let answer = move |name: &str, _: &[u8]| {
            Ok(match name {
                "diff" => no_notes([&[0; 8][..], &0_u32.to_be_bytes(), &9_u32.to_be_bytes()].concat()),
                "plan" => [&0_u32.to_be_bytes()[..], &count.to_be_bytes(), &frame(&raw)].concat(),
                _ => Vec::new(),
            })
        };
        let tree = Arc::new(Tree::new(vec![file("f", 1)]).unwrap());
        let error = AgentTarget::new(lanes(answer)).diff(&tree, &Silent::default()).unwrap_err();
        assert!(matches!(error, Error::Protocol { .. }), "{what}: {error}");
    }
}

/// Clears the screen, forges a line, and goes on for long.
fn evil() -> Vec<u8> {
    [&b"\x1b[2J\r\nroot logged in \xff\x9b31m\xe2\x80\xae"[..], &vec![b'A'; 100_000]].concat()
}

#[track_caller]
fn is_safe(text: &str) {
    assert!(!text.chars().any(char::is_control) && !text.contains('\u{202e}'), "{text:?}");
    assert!(text.contains("root logged in"), "{text}");
    assert!(text.chars().count() < SAID_MAX + 300, "{}", text.len());
}

#[test]
fn h09_whatever_a_server_says_is_shown_escaped_and_cut() {
    // As an error, wherever one may come.
    let target = AgentTarget::new(lanes(|_, _| Err(evil())));
    let shown = |error: Error| lockstep::error::chain(&error);
    is_safe(&shown(target.begin(&BeginOptions::default(), &Silent::default()).unwrap_err()));
    is_safe(&shown(target.commit(&CommitOptions::default(), &Silent::default()).unwrap_err()));
    let source = AgentSource::new(lanes(|_, _| Err(evil())));
    is_safe(&shown(source.scan(&ScanOptions::default(), &Silent::default()).unwrap_err()));

    // As a note, and as a problem of the scan.
    let noted = |kind: u8| {
        let mut notes = vec![0, 0, 0, 1, kind];
        put_string(&mut notes, b"");
        put_string(&mut notes, &evil());
        [notes, vec![0; 4]].concat()
    };
    for kind in 0..4 {
        let mut reply = Vec::new();
        put_string(&mut reply, b"");
        put_string(&mut reply, &evil());
        reply.extend(noted(kind));
        let told = Told::default();
        let target = AgentTarget::new(lanes(move |_, _| Ok(reply.clone())));
        target.begin(&BeginOptions::default(), &told).unwrap();
        is_safe(&told.0.into_inner().unwrap()[0]);
    }
    let mut raw = Vec::new();
    put_string(&mut raw, b"f");
    put_string(&mut raw, &evil());
    raw.push(1);
    let answer = move |name: &str, _: &[u8]| Ok(if name == "scan" { scanned(0, 1) } else { frame(&raw) });
    let scan = AgentSource::new(lanes(answer)).scan(&ScanOptions::default(), &Silent::default()).unwrap();
    is_safe(&scan.problems[0].message);

    // As what became of a file.
    let fetch = Fetch::of(0);
    let evil_text = [&(evil().len() as u32).to_be_bytes()[..], &evil()].concat();
    let produced = read(1, fetch, piece(5, &[&[0], &evil_text])).unwrap();
    let Produced::Failed { message, .. } = &produced[0] else { panic!("{produced:?}") };
    is_safe(message);
    let target = AgentTarget::new(lanes(move |_, _| Ok([&[0, 0, 0, 1, 0, 0, 0, 0, 0][..], &evil_text].concat())));
    let mut writer = target.writer().unwrap();
    writer.put(0, Block::copy_of(b"x"), Digest([0; 32])).unwrap();
    is_safe(&writer.completions(true).unwrap()[0].result.as_ref().unwrap_err().message);

    // As what was published.
    let text = String::from_utf8_lossy(&evil()).into_owned();
    let commit = |committed: Committed| {
        let mut reply = Vec::new();
        put_string(&mut reply, &serde_json::to_vec(&committed).unwrap());
        let target = AgentTarget::new(lanes(move |_, _| Ok(no_notes(reply.clone()))));
        target.commit(&CommitOptions::default(), &Silent::default())
    };
    let honest = Committed { manifest_digest: "ab".repeat(32), ..Committed::default() };
    let committed = commit(Committed { problems: vec![(text.clone(), text.clone())], ..honest.clone() }).unwrap();
    is_safe(&committed.problems[0].0);
    is_safe(&committed.problems[0].1);
    let (trash, pair) = (Some(text.clone()), (text.clone(), text.clone()));
    let told = Committed { trash, retired: vec![text.clone()], put_off: vec![pair], ..honest.clone() };
    let committed = commit(told).unwrap();
    is_safe(&committed.trash.unwrap());
    is_safe(&committed.retired[0]);
    is_safe(&committed.put_off[0].0);
    is_safe(&committed.put_off[0].1);
    assert!(commit(Committed { manifest_digest: text, ..honest }).is_err());

    // As what no answer is.
    let mut reply = Vec::new();
    put_string(&mut reply, format!("{{\"generation\": {:?}}}", "\u{1}root logged in".repeat(9999)).as_bytes());
    let target = AgentTarget::new(lanes(move |_, _| Ok(no_notes(reply.clone()))));
    let error = shown(target.commit(&CommitOptions::default(), &Silent::default()).unwrap_err());
    assert!(!error.chars().any(char::is_control) && error.len() < 3 * SAID_MAX, "{error}");
}

#[test]
fn a_server_that_does_not_know_the_trash_is_not_asked_to_remove_anything() {
    let old: Vec<&str> = NAMES.into_iter().filter(|name| *name != extension::TRASH).collect();
    let target = AgentTarget::new(lanes_with(old, |name, _| panic!("it was sent '{name}'")));
    let trash = BeginOptions { trash_seconds: Some(1), ..BeginOptions::default() };
    let refused = |error: lockstep::endpoint::Error| assert!(lockstep::error::chain(&error).contains("is too old"));
    refused(target.begin(&trash, &Silent::default()).unwrap_err());
    let unit = || vec![b"c-1".to_vec()];
    let retire = CommitOptions { retire: unit(), delete: true, ..CommitOptions::default() };
    let spare = CommitOptions { spare: unit(), delete: true, ..CommitOptions::default() };
    for options in [retire, spare] {
        refused(target.commit(&options, &Silent::default()).unwrap_err());
    }
}
