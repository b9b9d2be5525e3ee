//! What is fuzzed: everything that reads bytes of a peer, or of a file that somebody else may have written. Each target takes any
//! bytes, and panics when a promise does not hold.
//!
//! The fuzzer (`scripts/fuzz`) and the tests run the same functions.

use std::fs;
use std::net::{IpAddr, Ipv4Addr};
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::sync::{Arc, Mutex};

use lockstep::audit;
use lockstep::codec::{self, Layout, planes};
use lockstep::config::{AddressList, Config, Rights};
use lockstep::endpoint::local::{LocalSource, LocalTarget};
use lockstep::filter::{Filter, FilterSpec};
use lockstep::layout;
use lockstep::manifest::{format, sums};
use lockstep::path::RelPath;
use lockstep::policy::acl::Acl;
use lockstep::policy::mode::Mode;
use lockstep::policy::{Policy, PolicySpec, RuleSpec, chmod_rules, chown_rules};
use lockstep::root::Root;
use lockstep::server::agent::{Agent, Extensions, Factory, Limits, Output, Veil};
use lockstep::server::authorized_keys::{Asked, AuthorizedKeys};
use lockstep::server::session::{Session, SessionConfig};
use lockstep::signature::{self, AllowedSigners, NAMESPACE, oms};
use lockstep::ssh::{SshOptions, judge_hosts};
use lockstep::trust::Credential;
use lockstep::trust::revoked::Revoked;
use lockstep::wire::alike::{read_alike, read_order, read_part};
use lockstep::wire::buffer::Reader;
use lockstep::wire::entries::EntryList;
use lockstep::wire::extension::{EXTENDED, Fields, NAMES, put_string, read_action, read_removal};
use lockstep::wire::kexinit::KexInit;
use lockstep::wire::sftp::{Attributes, Frames};
use russh::keys::PublicKey;

/// A target, by its name.
pub(crate) type Target = (&'static str, fn(&[u8]));

/// All of them; each has a corpus of its name.
pub(crate) const ALL: &[Target] = &[
    ("packets", packets),
    ("extensions", extensions),
    ("wire", wire),
    ("manifest", manifest),
    ("sums", listed_sums),
    ("policy", policy),
    ("authorized_keys", authorized_keys),
    ("known_hosts", known_hosts),
    ("revoked", revoked),
    ("config", config),
    ("layouts", layouts),
    ("signatures", signatures),
    ("audit", audit_lines),
];

const KEY: &str = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJdD7y3aLq454yWBdwLWbieU1ebz9/cu7/QEXn9OIeZJ";

const OMS_KEY: &str = "-----BEGIN PUBLIC KEY-----
MFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAEkGxz9aGGOqC17OOZpjHrkvy0kccm
Y3/vGN36kNGgIi9Gm9SkBX+t2CfHRomJaD7c45GkgsfPrjY1xFRzls5ofw==
-----END PUBLIC KEY-----
";

fn key() -> PublicKey {
    PublicKey::from_openssh(KEY).unwrap()
}

/// Keeps what is answered.
#[derive(Default)]
struct Answers(Mutex<Vec<u8>>);

impl Output for Answers {
    fn send(&self, packet: Vec<u8>) {
        self.0.lock().unwrap().extend(packet);
    }

    fn is_gone(&self) -> bool {
        false
    }
}

/// What nobody may read or change: another one each time, since a fuzzer learns what it is compared with.
fn secret(at: &Path) -> Vec<u8> {
    format!("the secret of {}", at.display()).into_bytes()
}

/// A root with some files, and beside it what must stay as it is.
fn place() -> tempfile::TempDir {
    let shared = Path::new("/dev/shm");
    let at = if shared.is_dir() { tempfile::tempdir_in(shared) } else { tempfile::tempdir() }.unwrap();
    fs::create_dir_all(at.path().join("root/d/sub")).unwrap();
    fs::create_dir(at.path().join("outside")).unwrap();
    fs::write(at.path().join("outside/secret"), secret(at.path())).unwrap();
    fs::set_permissions(at.path().join("outside/secret"), fs::Permissions::from_mode(0o600)).unwrap();
    fs::write(at.path().join("root/f"), "content").unwrap();
    fs::write(at.path().join("root/d/g"), "more content").unwrap();
    std::os::unix::fs::symlink("../outside", at.path().join("root/out")).unwrap();
    std::os::unix::fs::symlink("f", at.path().join("root/in")).unwrap();
    at
}

/// What must hold whatever was asked for.
fn holds(at: &Path, answers: &Answers) {
    let outside: Vec<_> = fs::read_dir(at.join("outside")).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(outside, ["secret"], "something was made or removed outside of the root");
    let (content, secret) = (secret(at), at.join("outside/secret"));
    assert_eq!(fs::read(&secret).unwrap(), content, "a file outside of the root was changed");
    assert_eq!(fs::metadata(&secret).unwrap().permissions().mode() & 0o7777, 0o600, "its mode was changed");
    let answers = answers.0.lock().unwrap();
    assert!(!answers.windows(content.len()).any(|window| window == content), "it was read");
    let mut left = answers.as_slice();
    let mut frames = Frames::default();
    while !left.is_empty() {
        assert!(matches!(frames.take(&mut left), Ok(Some(_))), "an answer is not a packet");
    }
    let mut waiting = vec![at.join("root")];
    while let Some(directory) = waiting.pop() {
        // What a client has made unreadable is not looked into.
        for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
            let metadata = entry.metadata().unwrap();
            if metadata.is_symlink() {
                continue;
            }
            let special = metadata.permissions().mode() & 0o6000;
            assert_eq!(special, 0, "a special bit was given to '{}'", entry.path().display());
            if metadata.is_dir() {
                waiting.push(entry.path());
            }
        }
    }
}

fn session(at: &Path, answers: &Arc<Answers>, extensions: Option<Arc<dyn Extensions>>) -> Session {
    let config = SessionConfig {
        root: at.join("root"),
        confine: true,
        rights: Rights::default(),
        quota: None,
        policy: PolicySpec::default(),
        actor: "fuzz".into(),
        login: audit::Login::default(),
    };
    let output = Arc::clone(answers) as Arc<dyn Output>;
    let mut session = Session::new(config, output, extensions).unwrap();
    session.feed(&[0, 0, 0, 5, 1, 0, 0, 0, 3]).unwrap();
    session
}

/// Packets of SFTP to a session: as they come, and cut into pieces that `data` chooses.
fn packets(data: &[u8]) {
    let at = place();
    let answers = Arc::new(Answers::default());
    let mut session = session(at.path(), &answers, None);
    let Some((&piece, mut left)) = data.split_first() else { return };
    while !left.is_empty() {
        let (now, later) = left.split_at(left.len().min(usize::from(piece) + 1));
        if session.feed(now).is_err() {
            break;
        }
        left = later;
    }
    session.finish();
    // What it records is written by then.
    drop(session);
    holds(at.path(), &answers);
}

/// Requests of the agent. So that what is changed at random gets deep, `data` is the bodies alone: a byte that chooses the name, two of
/// the length, the body.
fn extensions(mut data: &[u8]) {
    let at = place();
    let answers = Arc::new(Answers::default());
    let opened = |root: &Path, path: &[u8]| {
        let root = Arc::new(Root::open(root).unwrap());
        let path = path.strip_prefix(b"/").unwrap_or(path);
        let refused = |error: lockstep::path::InvalidPath| lockstep::endpoint::Error::Usage(error.to_string());
        let path = if path.is_empty() { None } else { Some(RelPath::new(path).map_err(refused)?) };
        Ok::<_, lockstep::endpoint::Error>((root, path))
    };
    let (one, two) = (at.path().join("root"), at.path().join("root"));
    let factory = Factory {
        target: Box::new(move |path| {
            let (root, path) = opened(&one, path)?;
            Ok(Arc::new(LocalTarget::beneath(root, path, PolicySpec::default())))
        }),
        source: Box::new(move |path| {
            let (root, path) = opened(&two, path)?;
            Ok(Arc::new(LocalSource::beneath(root, path, None)?))
        }),
        veil: Veil::default(),
    };
    let agent = Arc::new(Agent::limited(Arc::new(factory), Limits::default(), Rights::default()).alone());
    let mut session = session(at.path(), &answers, Some(Arc::clone(&agent) as Arc<dyn Extensions>));
    let mut id = 0_u32;
    while let [choice, high, low, rest @ ..] = data {
        let (body, later) = rest.split_at(rest.len().min(usize::from(u16::from_be_bytes([*high, *low]))));
        data = later;
        id += 1;
        let name = NAMES[usize::from(*choice) % NAMES.len()];
        let mut packet = vec![EXTENDED];
        packet.extend(id.to_be_bytes());
        put_string(&mut packet, name.as_bytes());
        packet.extend(body);
        let framed = [&u32::try_from(packet.len()).unwrap().to_be_bytes()[..], &packet].concat();
        if session.feed(&framed).is_err() {
            break;
        }
    }
    session.finish();
    drop(session);
    if let Some(agent) = Arc::into_inner(agent) {
        agent.finish();
    }
    holds(at.path(), &answers);
}

/// What the client reads of a server, and both of each other.
fn wire(data: &[u8]) {
    let _ = KexInit::of_packet(data);
    let mut raw = Vec::new();
    if Fields(data).frame(&mut raw).is_ok() {
        let mut entries = EntryList::new(1 << 20);
        let _ = entries.read(&raw);
    }
    let mut entries = EntryList::new(1 << 20);
    let _ = entries.read(data);
    let _ = read_action(&mut Fields(data));
    let _ = read_removal(&mut Fields(data));
    let _ = read_order(Fields(data));
    for part in [read_alike(Fields(data), 0), read_part(Fields(data)).map(|part| part.alike)] {
        // What a peer says that there is lies one behind the other, and does not end beyond what can be counted.
        let chunks = part.ok().flatten().map_or_else(Vec::new, |alike| alike.chunks);
        let _: u64 = chunks.iter().map(|chunk| u64::from(chunk.length)).sum();
    }
    if let Ok(attributes) = Attributes::decode(&mut Reader(data)) {
        let mut writer = lockstep::wire::buffer::Writer::new(0);
        attributes.encode(&mut writer);
        // Behind a length and a type.
        assert_eq!(Attributes::decode(&mut Reader(&writer.into_bytes()[5..])), Ok(attributes));
    }
    // A frame gives so many bytes as it says, or nothing.
    if let Some((length, frame)) = data.split_first_chunk::<2>() {
        let length = usize::from(u16::from_be_bytes(*length));
        let mut out = Vec::new();
        if codec::decompress(frame, length, &mut out).is_ok() {
            assert_eq!(out.len(), length);
        }
        out.clear();
        match planes::decode(frame, length, &mut out) {
            Ok(()) => assert_eq!(out.len(), length),
            Err(_) => assert!(out.is_empty()),
        }
    }
    let layout = |byte: u8| Layout::new(1 << (byte & 3), usize::from(byte >> 4), byte & 4 != 0);
    if let Some(layout) = data.first().and_then(|byte| layout(*byte)) {
        let (mut frame, mut out) = (Vec::new(), Vec::new());
        if planes::encode(data, layout, &mut frame).is_ok() {
            planes::decode(&frame, data.len(), &mut out).unwrap();
            assert_eq!(out, data);
        }
    }
    let mut frame = Vec::new();
    codec::compress(data, 1, &mut frame).unwrap();
    let mut out = Vec::new();
    codec::decompress(&frame, data.len(), &mut out).unwrap();
    assert_eq!(out, data);
}

fn manifest(data: &[u8]) {
    let Ok(read) = format::decode(data) else { return };
    for entry in read.tree.entries() {
        assert!(RelPath::new(entry.path.as_bytes()).is_ok(), "a path that is none");
    }
    let written = format::encode(&read);
    assert_eq!(format::decode(&written).unwrap(), read, "what is written is not what was read");
}

fn listed_sums(data: &[u8]) {
    let Ok(list) = sums::parse(data) else { return };
    for (path, _) in list {
        assert!(RelPath::new(path.as_bytes()).is_ok(), "a path that is none");
    }
}

fn policy(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    let mut lines = text.lines();
    let (first, pattern) = (lines.next().unwrap_or_default(), lines.next().unwrap_or_default());
    if let Ok(mode) = first.parse::<Mode>() {
        let given = mode.apply(0o644, false, 0o022);
        assert_eq!(given & !0o7777, 0, "a mode of more than twelve bits");
        assert_eq!(mode.to_string().parse::<Mode>().unwrap().apply(0o644, false, 0o022), given);
    }
    let _ = chmod_rules(first);
    let _ = chown_rules(first);
    let acl: Vec<String> = lines.map(str::to_owned).collect();
    let parsed = Acl::parse(&acl);
    let rule = RuleSpec {
        pattern: pattern.to_owned(),
        mode: Some(first.to_owned()),
        acl: parsed.is_ok().then_some(acl),
        ..RuleSpec::default()
    };
    if let Ok(policy) = Policy::compile(&PolicySpec { rules: vec![rule] }) {
        let path = RelPath::new("a/b.bin").unwrap();
        let _ = policy.decide(&path, false, 0o755);
        let _ = policy.explain(&path, true, 0o755);
    }
    if let Ok(spec) = toml::from_str::<PolicySpec>(&text) {
        let _ = Policy::compile(&spec);
    }
    let _ = Filter::compile(&FilterSpec { rules: vec![pattern.to_owned()], only: None });
}

fn authorized_keys(data: &[u8]) {
    let keys = AuthorizedKeys::parse(data);
    let key = key();
    let elsewhere = Asked { user: "sync", peer: IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1)), now: 1_700_000_000 };
    let allowed = keys.authorize(Credential::Key(key.key_data()), &elsewhere).is_ok();
    let blob = KEY.split(' ').nth(1).unwrap();
    let is_there = data.windows(blob.len()).any(|window| window == blob.as_bytes());
    assert!(!allowed || is_there, "a key got in that no line has");
    let text = String::from_utf8_lossy(data);
    let _ = AddressList::parse(text.split(','));
}

fn known_hosts(data: &[u8]) {
    let options = SshOptions::new("sync", "gpu02", 2222);
    let _ = judge_hosts(data, &options, &[key()]);
}

fn revoked(data: &[u8]) {
    if let Ok(list) = Revoked::parse(data) {
        let _ = list.check(Credential::Key(key().key_data()));
    }
}

fn config(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    if let Err(error) = Config::parse(Path::new("config.toml"), &text) {
        assert!(!error.to_string().is_empty());
    }
}

/// Headers of checkpoints that somebody else wrote.
fn layouts(data: &[u8]) {
    let _ = layout::safetensors::check(data, data.len() as u64 * 3);
    let _ = layout::zip::directory(data, data.len() as u64);
    if let Ok(shards) = layout::index::shards(data) {
        let names: Vec<_> = shards.iter().filter_map(|name| layout::index::numbered(name.as_bytes())).collect();
        let _ = layout::index::gaps(&names);
    }
    if let Ok(pointer) = RelPath::new("latest") {
        let _ = layout::complete::named(&pointer, data);
    }
}

fn signatures(data: &[u8]) {
    let utc = |time: chrono::NaiveDateTime| Some(time.and_utc().timestamp());
    let signers = AllowedSigners::parse(data, &utc);
    let refused = signature::verify(NAMESPACE, data, b"message", &signers, None, 1_700_000_000);
    assert!(refused.is_err(), "a signature was made by chance");
    if let Ok(key) = oms::PublicKey::from_pem(data) {
        let _ = key.hint();
    }
    let key = oms::PublicKey::from_pem(OMS_KEY.as_bytes()).unwrap();
    assert!(oms::verify(data, &key).is_err(), "a signature was made by chance");
}

fn audit_lines(data: &[u8]) {
    let _ = audit::Head::decode(&String::from_utf8_lossy(data));
    let _ = audit::last_of(data, true);
    for line in data.split(|byte| *byte == b'\n') {
        if let Some(event) = audit::event::Event::parse(line) {
            let (_, _) = (event.moment(), event.outcome());
            // A line of another's making would be a forged event.
            let row = audit::export::csv("/root", &event);
            let bare = row.strip_suffix("\r\n").unwrap().split('"').step_by(2).collect::<String>();
            assert!(!bare.contains(['\r', '\n']), "{row:?}");
            let line = audit::export::cef("/root", &event);
            assert!(!line.trim_end_matches('\n').contains(['\r', '\n']), "{line:?}");
        }
    }
}
