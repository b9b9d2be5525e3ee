//! The agent and its client as a pair, over a link within the process.

use std::collections::BTreeMap;

use bytes::Bytes;
use crossbeam_channel::{Receiver, unbounded};
use sha2::Digest as _;

use super::*;
use crate::codec::CompressOptions;
use crate::endpoint::agent::{AgentTarget, Lanes};
use crate::endpoint::client::{Client, ClientOptions};
use crate::endpoint::link::{Link, LinkError};
use crate::endpoint::{BeginOptions, Block, CommitOptions, Committed, ScanOptions, Staged, WriteFailure, Writer};
use crate::manifest::{Content, Digest, Entry, Timestamp};
use crate::monitor::{Monitor, Severity, Silent};
use crate::path::RelPath;
use crate::plan::Plan;

#[derive(Default)]
pub(super) struct Memory(pub(super) Mutex<BTreeMap<u32, Vec<u8>>>);
struct MemoryWriter<'a>(&'a Memory, Vec<Staged>);

pub(super) fn digest(data: &[u8]) -> Digest {
    Digest(sha2::Sha256::digest(data).into())
}

impl Target for Memory {
    fn describe(&self) -> String {
        "memory".into()
    }
    fn begin(&self, _: &BeginOptions, _: &dyn Monitor) -> Result<(), Error> {
        Ok(())
    }
    fn diff(&self, source: &Arc<Tree>, _: &dyn Monitor) -> Result<Plan, Error> {
        Ok(Plan { target_entries: source.entries().len() as u64, ..Plan::default() })
    }
    fn writer(&self) -> Result<Box<dyn Writer + '_>, Error> {
        Ok(Box::new(MemoryWriter(self, Vec::new())))
    }
    fn commit(&self, _: &CommitOptions, _: &dyn Monitor) -> Result<Committed, Error> {
        let manifest_digest = digest(b"").to_string();
        Ok(Committed { published: locked(&self.0).len() as u64, manifest_digest, ..Committed::default() })
    }
    fn abort(&self) {}
    fn verification(&self) -> String {
        String::new()
    }
}

impl Writer for MemoryWriter<'_> {
    fn put(&mut self, index: u32, block: Block, digest: Digest) -> Result<(), Error> {
        locked(&self.0.0).insert(index, block.data().to_vec());
        self.finish(index, digest)
    }
    fn open(&mut self, index: u32, resume_at: u64) -> Result<(), Error> {
        locked(&self.0.0).entry(index).or_default().resize(resume_at as usize, b'r');
        Ok(())
    }
    fn write(&mut self, index: u32, offset: u64, block: Block) -> Result<(), Error> {
        let mut files = locked(&self.0.0);
        let file = files.entry(index).or_default();
        file.resize(offset as usize, 0);
        file.extend_from_slice(block.data());
        Ok(())
    }
    fn hole(&mut self, index: u32, offset: u64, length: u64) -> Result<(), Error> {
        locked(&self.0.0).entry(index).or_default().resize((offset + length) as usize, 0);
        Ok(())
    }
    fn finish(&mut self, index: u32, wanted: Digest) -> Result<(), Error> {
        let good = locked(&self.0.0).get(&index).is_some_and(|data| digest(data) == wanted);
        let failure = WriteFailure { message: "the digest differs".into(), retry: true };
        self.1.push(Staged { index, result: if good { Ok(()) } else { Err(failure) } });
        Ok(())
    }
    fn keep(&mut self, index: u32, _: Digest) -> Result<(), Error> {
        self.1.push(Staged { index, result: Ok(()) });
        Ok(())
    }
    fn discard(&mut self, _: u32) -> Result<(), Error> {
        Ok(())
    }
    fn completions(&mut self, _: bool) -> Result<Vec<Staged>, Error> {
        Ok(std::mem::take(&mut self.1))
    }
}

/// The server's end of an in-process link.
struct Near {
    agent: Agent,
    output: Arc<dyn Output>,
    answers: Receiver<Bytes>,
    end: Sender<Bytes>,
}
struct Queue(Sender<Bytes>);
impl Output for Queue {
    fn send(&self, packet: Vec<u8>) {
        let _ = self.0.send(packet.into());
    }
    fn is_gone(&self) -> bool {
        false
    }
}
impl Link for Near {
    fn send(&self, packet: Bytes) -> Result<(), LinkError> {
        let mut fields = Fields(&packet[4..]);
        if fields.u8().unwrap() == 1 {
            let mut body = vec![2, 0, 0, 0, 3];
            for (name, version) in self.agent.names() {
                extension::put_string(&mut body, name.as_bytes());
                extension::put_string(&mut body, version.as_bytes());
            }
            let mut packet = (body.len() as u32).to_be_bytes().to_vec();
            packet.extend_from_slice(&body);
            self.output.send(packet);
            return Ok(());
        }
        let id = fields.u32().unwrap();
        assert!(self.agent.handle(id, extension::Message::new(packet.to_vec(), 9), &self.output));
        Ok(())
    }
    fn recv(&self) -> Result<Option<Bytes>, LinkError> {
        Ok(self.answers.recv().ok().filter(|bytes| !bytes.is_empty()))
    }
    fn close(&self) {
        let _ = self.end.send(Bytes::new());
    }
}

pub(super) fn client(target: &Arc<Memory>) -> Client {
    client_with(target, ClientOptions::default())
}

pub(super) fn client_with(target: &Arc<Memory>, options: ClientOptions) -> Client {
    let shared = Arc::clone(target);
    let factory = Factory {
        target: Box::new(move |_| Ok(Arc::clone(&shared) as SharedTarget)),
        source: Box::new(|_| Err(Error::Usage("no source".into()))),
        veil: Veil::default(),
    };
    let (end, answers) = unbounded();
    let near = Near { agent: Agent::new(Arc::new(factory)), output: Arc::new(Queue(end.clone())), answers, end };
    Client::connect(Arc::new(near), "memory", options).unwrap()
}

pub(super) fn tree(sizes: &[u64]) -> Arc<Tree> {
    let entry = |(at, &size): (usize, &u64)| Entry {
        path: RelPath::new(format!("f{at:03}")).unwrap(),
        content: Content::File { size, digest: None },
        mtime: Timestamp::default(),
        mode: 0o644,
        owner: "o".into(),
        group: "g".into(),
    };
    Arc::new(Tree::new(sizes.iter().enumerate().map(entry).collect()).unwrap())
}

#[test]
fn files_go_through_two_lanes_and_a_wrong_digest_fails_alone() {
    let memory = Arc::new(Memory::default());
    let another = Arc::clone(&memory);
    let compress = CompressOptions { level: Some(1), enabled: true };
    let lanes = Lanes::over(client(&memory), 2, Box::new(move |_| Some(client(&another))), b"/x", compress);
    let target = AgentTarget::new(lanes.unwrap());
    target.begin(&BeginOptions::default(), &Silent::default()).unwrap();
    let plan = target.diff(&tree(&[5, 5, 700_000, 100]), &Silent::default()).unwrap();
    assert_eq!(plan.target_entries, 4);
    let large: Vec<u8> = (0..700_000_u32).map(|n| (n / 1000) as u8).collect();
    let (mut first, mut second) = (target.writer().unwrap(), target.writer().unwrap());
    first.put(0, Block::copy_of(b"hello"), digest(b"hello")).unwrap();
    first.put(1, Block::copy_of(b"wrong"), digest(b"right")).unwrap();
    second.open(2, 0).unwrap();
    second.write(2, 0, Block::copy_of(&large[..400_000])).unwrap();
    second.write(2, 400_000, Block::copy_of(&large[400_000..])).unwrap();
    second.finish(2, digest(&large)).unwrap();
    let resumed = [&[b'r'; 60][..], &[b'x'; 20], &[0; 20]].concat();
    second.open(3, 60).unwrap();
    second.write(3, 60, Block::copy_of(&[b'x'; 20])).unwrap();
    second.hole(3, 80, 20).unwrap();
    second.finish(3, digest(&resumed)).unwrap();
    let done = first.completions(true).unwrap();
    assert!(done.iter().any(|staged| staged.index == 0 && staged.result.is_ok()));
    assert!(done.iter().any(|staged| staged.index == 1 && staged.result.as_ref().is_err_and(|f| f.retry)));
    let done = second.completions(true).unwrap();
    assert_eq!(done.iter().filter(|staged| staged.result.is_ok()).count(), 2);
    drop((first, second));
    assert_eq!(locked(&memory.0)[&2], large);
    assert_eq!(target.commit(&CommitOptions::default(), &Silent::default()).unwrap().published, 4);
    assert!(target.commit(&CommitOptions::default(), &Silent::default()).is_err());
}

/// What asks an agent, and says how it was answered.
pub(super) fn asked(memory: &Arc<Memory>) -> impl Fn(&str, &[u8]) -> u8 + use<> {
    let client = client(memory);
    move |name: &str, body: &[u8]| {
        let mut packet = extension::request(name);
        packet.extend_from_slice(body);
        client.call(packet, false).unwrap().kind
    }
}

/// Begins a run with one file of ten bytes.
pub(super) fn compared(call: &impl Fn(&str, &[u8]) -> u8) {
    let mut begin = Vec::new();
    extension::put_string(&mut begin, b"/x");
    extension::put_string(&mut begin, &serde_json::to_vec(&BeginOptions::default()).unwrap());
    assert_eq!(call("begin", &begin), extension::EXTENDED_REPLY);
    let (mut raw, mut entries) = (Vec::new(), Vec::new());
    tree(&[10]).entries().iter().for_each(|entry| extension::put_entry(&mut raw, entry));
    extension::put_frame(&mut entries, &raw, None);
    assert_eq!(call("entries", &entries), extension::EXTENDED_REPLY);
    assert_eq!(call("diff", &[]), extension::EXTENDED_REPLY);
}

pub(super) fn block(index: u32, offset: u64, length: u32) -> Vec<u8> {
    let mut body = index.to_be_bytes().to_vec();
    body.extend_from_slice(&offset.to_be_bytes());
    body.push(0);
    body.extend_from_slice(&length.to_be_bytes());
    body.extend_from_slice(&[1; 4]);
    body
}

#[test]
fn h23_messages_out_of_order_or_bounds_are_refused() {
    let memory = Arc::new(Memory::default());
    let call = asked(&memory);
    for name in ["diff", "commit", "write", "put", "finish", "plan", "list", "next", "fetch", "attach", "begin", "scan"]
    {
        assert_eq!(call(name, &[0; 3]), extension::STATUS, "{name}");
    }
    // Where nothing was begun there is nothing to give up.
    compared(&call);
    assert_eq!(call("open", &[0; 12]), extension::EXTENDED_REPLY);
    assert_eq!(call("write", &block(0, 0, 4)), extension::EXTENDED_REPLY);
    assert_eq!(call("write", &block(0, 6, 4)), extension::EXTENDED_REPLY);

    let bad: Vec<(&str, Vec<u8>)> = [(9, 0, 4), (0, u64::MAX, 4), (0, 8, 4), (0, 0, 3), (0, 0, 5), (0, 0, 1 << 31)]
        .into_iter()
        .chain([(0, 0, u32::MAX)])
        .map(|(index, offset, length)| ("write", block(index, offset, length)))
        .chain([("put", u32::MAX.to_be_bytes().to_vec()), ("open", vec![0xff; 12]), ("begin", vec![0; 3])])
        .collect();
    for (name, body) in bad {
        let memory = Arc::new(Memory::default());
        let call = asked(&memory);
        compared(&call);
        assert_eq!(call("open", &[0; 12]), extension::EXTENDED_REPLY);
        assert_eq!(call("write", &block(0, 0, 4)), extension::EXTENDED_REPLY);
        assert_eq!(call(name, &body), extension::STATUS, "{name} {body:?}");
        // It is as if nothing had been sent, then and afterwards.
        assert_eq!(locked(&memory.0)[&0], [1; 4], "{name} {body:?}");
        assert_eq!(call("write", &block(0, 4, 4)), extension::STATUS, "{name} {body:?}");
        let mut commit = Vec::new();
        extension::put_string(&mut commit, &serde_json::to_vec(&CommitOptions::default()).unwrap());
        assert_eq!(call("commit", &commit), extension::STATUS, "{name} {body:?}");
        assert_eq!(locked(&memory.0)[&0], [1; 4], "{name} {body:?}");
    }
    for (body, why) in [(block(0, 0, 4), "not open"), (block(0, 6, 4), "not open")] {
        let call = asked(&Arc::new(Memory::default()));
        compared(&call);
        assert_eq!(call("write", &body), extension::STATUS, "{why}");
    }
    let call = asked(&Arc::new(Memory::default()));
    compared(&call);
    assert_eq!(call("open", &[0; 12]), extension::EXTENDED_REPLY);
    assert_eq!(call("write", &block(0, 6, 4)), extension::EXTENDED_REPLY);
    assert_eq!(call("write", &block(0, 0, 4)), extension::STATUS, "descends");
}

/// Remembers how it was begun.
#[derive(Default)]
struct Begun(Memory, Mutex<Option<BeginOptions>>);
impl Target for Begun {
    fn describe(&self) -> String {
        self.0.describe()
    }
    fn begin(&self, options: &BeginOptions, _: &dyn Monitor) -> Result<(), Error> {
        *locked(&self.1) = Some(options.clone());
        Ok(())
    }
    fn diff(&self, source: &Arc<Tree>, monitor: &dyn Monitor) -> Result<Plan, Error> {
        self.0.diff(source, monitor)
    }
    fn writer(&self) -> Result<Box<dyn Writer + '_>, Error> {
        self.0.writer()
    }
    fn commit(&self, options: &CommitOptions, monitor: &dyn Monitor) -> Result<Committed, Error> {
        self.0.commit(options, monitor)
    }
    fn abort(&self) {}
    fn verification(&self) -> String {
        String::new()
    }
}

fn limited(target: &Arc<Begun>, limits: Limits) -> Client {
    let shared = Arc::clone(target);
    let factory = Factory {
        target: Box::new(move |_| Ok(Arc::clone(&shared) as SharedTarget)),
        source: Box::new(|_| Err(Error::Usage("no source".into()))),
        veil: Veil::default(),
    };
    let (end, answers) = unbounded();
    let agent = Agent::limited(Arc::new(factory), limits, Rights::FULL);
    let near = Near { agent, output: Arc::new(Queue(end.clone())), answers, end };
    Client::connect(Arc::new(near), "limited", ClientOptions::default()).unwrap()
}

#[test]
fn what_a_client_asks_for_without_measure_it_gets_in_measure() {
    let begun = Arc::new(Begun::default());
    let roomy = Limits { all_entries_bytes: usize::MAX, ..Limits::default() };
    let compress = CompressOptions { level: None, enabled: false };
    let begin = |limits, wait_seconds| {
        let lanes = Lanes::over(limited(&begun, limits), 1, Box::new(|_| None), b"/x", compress).unwrap();
        let target = AgentTarget::new(lanes);
        target.begin(&BeginOptions { wait_seconds, ..BeginOptions::default() }, &Silent::default()).unwrap();
        target
    };
    for (asked, given) in [(u64::MAX, 24 * 60 * 60), (60, 60)] {
        begin(roomy, asked);
        assert_eq!(locked(&begun.1).as_ref().unwrap().wait_seconds, given);
    }
    let files = |count: usize| tree(&vec![1; count]);
    let few = Limits { entries_bytes: 100_000, ..roomy };
    begin(few, 0).diff(&files(100), &Silent::default()).unwrap();
    let error = begin(few, 0).diff(&files(999), &Silent::default()).unwrap_err();
    assert!(error.to_string().contains("100000 bytes of memory"), "{error}");
    // Together they have what all may have, for as long as they last.
    let shared = Limits { all_entries_bytes: 1_000_000, ..roomy };
    let first = begin(shared, 0);
    first.diff(&files(900), &Silent::default()).unwrap();
    let error = (0..20).map(|_| begin(shared, 0)).collect::<Vec<_>>();
    let error = error.iter().find_map(|target| target.diff(&files(900), &Silent::default()).err()).unwrap();
    assert!(matches!(error, Error::Remote { exit: crate::error::Exit::TryAgain, .. }), "{error}");
}

struct Files(Arc<Tree>);
struct FilesReader(std::collections::VecDeque<crate::endpoint::Fetch>);
impl Source for Files {
    fn describe(&self) -> String {
        "files".into()
    }
    fn scan(&self, _: &ScanOptions, _: &dyn Monitor) -> Result<crate::endpoint::Scan, Error> {
        let problem = crate::monitor::Problem { path: None, message: "a socket".into(), severity: Severity::Skipped };
        Ok(crate::endpoint::Scan { tree: (*self.0).clone(), problems: vec![problem] })
    }
    fn reader(&self, _: Arc<Tree>) -> Result<Box<dyn crate::endpoint::Reader + '_>, Error> {
        Ok(Box::new(FilesReader(Default::default())))
    }
    fn remember(&self, _: &Tree, _: &[(u32, Digest)]) {}
}
impl crate::endpoint::Reader for FilesReader {
    fn wants_more(&self) -> bool {
        true
    }
    fn push(&mut self, fetch: crate::endpoint::Fetch) {
        self.0.push_back(fetch);
    }
    fn next(&mut self) -> Result<Option<crate::endpoint::Produced>, Error> {
        Ok(self.0.pop_front().map(|fetch| {
            let data = vec![fetch.index as u8; 5];
            let (block, digest) = (Block::copy_of(&data), digest(&data));
            crate::endpoint::Produced::Whole { index: fetch.index, block, digest }
        }))
    }
}

/// A link to an agent that has these files, and what ends it.
fn near_files(listed: &Arc<Tree>) -> (Near, crossbeam_channel::Sender<Bytes>) {
    let served = Arc::clone(listed);
    let factory = Factory {
        target: Box::new(|_| Err(Error::Usage("no target".into()))),
        source: Box::new(move |_| Ok(Arc::new(Files(Arc::clone(&served))) as SharedSource)),
        veil: Veil::default(),
    };
    let (end, answers) = unbounded();
    let (agent, output) = (Agent::new(Arc::new(factory)), Arc::new(Queue(end.clone())));
    (Near { agent, output, answers, end: end.clone() }, end)
}

pub(super) fn files_client(listed: &Arc<Tree>) -> Client {
    Client::connect(Arc::new(near_files(listed).0), "files", ClientOptions::default()).unwrap()
}

#[test]
fn a_pull_lists_and_reads_every_file_and_a_lost_link_ends_it() {
    let listed = tree(&[5; 300]);
    let (near, cut) = near_files(&listed);
    let client = Client::connect(Arc::new(near), "files", ClientOptions::default()).unwrap();
    let lanes =
        Lanes::over(client, 1, Box::new(|_| None), b"/x", CompressOptions { level: Some(1), enabled: true }).unwrap();
    let source = crate::endpoint::agent::AgentSource::new(lanes);
    let scan = source.scan(&ScanOptions::default(), &Silent::default()).unwrap();
    assert_eq!((scan.tree.entries(), scan.problems.len()), (listed.entries(), 1));
    let mut reader = source.reader(Arc::clone(&listed)).unwrap();
    for index in 0..300 {
        reader.push(crate::endpoint::Fetch::of(index));
    }
    let mut seen = 0;
    while let Some(produced) = reader.next().unwrap() {
        let crate::endpoint::Produced::Whole { index, block, .. } = produced else { panic!("{produced:?}") };
        assert_eq!(block.data(), vec![index as u8; 5]);
        seen += 1;
    }
    assert_eq!(seen, 300);
    cut.send(Bytes::new()).unwrap();
    // The receiving thread notices on its own; from then on every read fails.
    let lost = (0..1000).find_map(|_| {
        std::thread::sleep(std::time::Duration::from_millis(2));
        reader.push(crate::endpoint::Fetch::of(0));
        reader.next().err()
    });
    assert!(matches!(lost, Some(Error::Disconnected { .. })), "{lost:?}");
}
