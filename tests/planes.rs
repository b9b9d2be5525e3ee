//! Byte planes between a client and an agent: what they save, and that only who reads them gets them.

use std::fs;
use std::path::Path;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use lockstep::codec::{CompressOptions, Layout, planes};
use lockstep::endpoint::agent::{AgentSource, AgentTarget, Lanes};
use lockstep::endpoint::client::{Client, ClientOptions};
use lockstep::endpoint::link::{Link, LinkError, Remote as _, Way};
use lockstep::endpoint::local::{LocalSource, LocalTarget};
use lockstep::monitor::Silent;
use lockstep::policy::PolicySpec;
use lockstep::sync::run;
use lockstep::wire::extension::{DOMAIN, Fields, TAKES_PLANES};

use crate::kit::agent::{Agent, SIZE, write};
use crate::kit::pair::{Pair, options};
use crate::kit::weights;
use crate::pipes::Pipes;

/// An agent whose client is watched.
struct Watched {
    link: Arc<dyn Link>,
    /// Its `hello` is that of an agent that knows no byte planes.
    old: bool,
    /// The codecs of what was written, and the levels of what was asked for.
    seen: Mutex<Vec<u8>>,
}

impl Watched {
    fn start(old: bool) -> Arc<Watched> {
        let link = Pipes.open(&Way::LockstepExec(String::new()), 0).unwrap();
        Arc::new(Watched { link, old, seen: Mutex::default() })
    }

    fn lanes(self: &Arc<Self>, root: &Path) -> Lanes {
        let client = Client::connect(Arc::clone(self) as Arc<dyn Link>, "agent", ClientOptions::default()).unwrap();
        let compress = CompressOptions { level: Some(1), enabled: true };
        Lanes::over(client, 1, Box::new(|_| None), root.as_os_str().as_encoded_bytes(), compress).unwrap()
    }
}

impl Link for Watched {
    fn send(&self, packet: Bytes) -> Result<(), LinkError> {
        let mut fields = Fields(packet.get(9..).unwrap_or_default());
        let name = fields.text().unwrap_or_default();
        match name.strip_suffix(DOMAIN) {
            Some("write") => self.seen.lock().unwrap().push(fields.0[4 + 8]),
            Some("next") => self.seen.lock().unwrap().push(fields.0[4]),
            _ => {}
        }
        self.link.send(packet)
    }

    fn recv(&self) -> Result<Option<Bytes>, LinkError> {
        let Some(bytes) = self.link.recv()? else { return Ok(None) };
        let name = b"\"planes\"";
        match bytes.windows(name.len()).position(|window| window == name) {
            Some(at) if self.old => Ok(Some([&bytes[..at], b"\"planks\"", &bytes[at + name.len()..]].concat().into())),
            _ => Ok(Some(bytes)),
        }
    }

    fn close(&self) {
        self.link.close();
    }
}

/// Pushes the source of a pair to an agent: the codecs that were used, and bytes on the wire.
fn push(pair: &Pair, old: bool) -> (Vec<u8>, u64) {
    let link = Watched::start(old);
    let (source, target) = (LocalSource::new(&pair.source, None).unwrap(), AgentTarget::new(link.lanes(&pair.target)));
    let report = run(&source, &target, &options(), &Silent::default(), &AtomicBool::new(false)).unwrap();
    assert_eq!(pair.differences(), "");
    let seen = std::mem::take(&mut *link.seen.lock().unwrap());
    (seen, report.wire_bytes)
}

/// The same, pulled from the agent: the levels that were asked for.
fn pull(pair: &Pair, old: bool) -> (Vec<u8>, u64) {
    let link = Watched::start(old);
    let source = AgentSource::new(link.lanes(&pair.source));
    let target = LocalTarget::new(&pair.target, PolicySpec::default());
    let report = run(&source, &target, &options(), &Silent::default(), &AtomicBool::new(false)).unwrap();
    assert_eq!(pair.differences(), "");
    let seen = std::mem::take(&mut *link.seen.lock().unwrap());
    (seen, report.wire_bytes)
}

/// A safetensors file whose numbers begin at an odd byte.
fn safetensors() -> Vec<u8> {
    let tensor = weights::bf16(1_500_000);
    let header = format!(r#"{{"w":{{"dtype":"BF16","shape":[1500000],"data_offsets":[0,{}]}}}} "#, tensor.len());
    let header = if header.len().is_multiple_of(2) { header + " " } else { header };
    [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &tensor].concat()
}

#[test]
fn s15_weights_take_two_thirds_of_the_wire_in_both_directions_and_old_servers_get_no_planes() {
    let file = safetensors();
    let size = file.len() as u64;
    for (old, least, most) in [(false, 64, 70), (true, 76, 82)] {
        let pair = Pair::new();
        pair.write("model.safetensors", &file);
        let (codecs, pushed) = push(&pair, old);
        assert_eq!(codecs, vec![if old { 1 } else { 2 }; file.len().div_ceil(512 * 1024)]);
        fs::remove_dir_all(&pair.target).unwrap();
        let (levels, pulled) = pull(&pair, old);
        assert!(levels.iter().all(|level| *level == if old { 1 } else { 1 | TAKES_PLANES }), "{levels:?}");
        for wire in [pushed, pulled] {
            assert!((size * least / 100..size * most / 100).contains(&wire), "old: {old}: {wire} bytes of {size}");
        }
    }
}

#[test]
fn noise_and_text_are_no_planes() {
    for (data, codec, most) in [(weights::noise(1 << 20), 0, 102), (weights::text(1 << 20), 1, 50)] {
        let pair = Pair::new();
        pair.write("file", &data);
        let (codecs, wire) = push(&pair, false);
        assert_eq!(codecs, [codec; 2]);
        assert!(wire < (data.len() * most / 100) as u64, "{wire} bytes");
        fs::remove_dir_all(&pair.target).unwrap();
        let (_, wire) = pull(&pair, false);
        assert!(wire < (data.len() * most / 100) as u64, "{wire} bytes");
    }
}

#[test]
fn small_weights_go_in_planes_too() {
    let pair = Pair::new();
    let data = weights::bf16(200_000);
    data.chunks(100_000).zip(0..).for_each(|(part, number)| pair.write(&format!("{number}.bin"), part));
    let (_, wire) = push(&pair, false);
    fs::remove_dir_all(&pair.target).unwrap();
    let (_, old) = push(&pair, true);
    let hundredth = data.len() as u64 / 100;
    assert!(wire < 70 * hundredth && old > 76 * hundredth, "{wire} and {old} of {}", data.len());
}

#[test]
fn h21_planes_that_are_cut_or_lie_reject_the_run() {
    let data = weights::bf16(SIZE as usize / 2);
    let good = {
        let mut frame = Vec::new();
        planes::encode(&data, Layout::new(2, 0, true).unwrap(), &mut frame).unwrap();
        frame
    };
    let changed = |at: usize, to: u8| {
        let mut frame = good.clone();
        frame[at] = to;
        frame
    };
    let cases = [
        ("cut", good[..good.len() - 1].to_vec(), "truncated"),
        ("empty", Vec::new(), "truncated"),
        ("followed by a byte", [&good[..], b"x"].concat(), "followed by"),
        ("of eight bytes each", changed(0, 3), "layout"),
        ("coded in another way", changed(1, 7), "layout"),
        ("of another length", changed(2, 0xff), "truncated"),
        ("a bit of the exponents flipped", changed(good.len() - 1, good[good.len() - 1] ^ 1), "damaged"),
    ];
    let frame = |data: &[u8]| [&[2][..], &(SIZE as u32).to_be_bytes(), data].concat();
    for (what, bytes, reason) in cases {
        let mut agent = Agent::new();
        agent.opened();
        let answer = agent.ask("write", &write(0, &frame(&bytes)));
        assert!(answer.as_ref().is_err_and(|message| message.contains(reason)), "{what}: {answer:?}");
        agent.assert_rejected(answer, "'sub/file'", reason);
    }
    let mut agent = Agent::new();
    agent.opened();
    agent.ask("write", &write(0, &frame(&good))).unwrap();
}
