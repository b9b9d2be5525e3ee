//! How fast the parts of a run are, each on one core: `cargo bench --bench parts`.
//!
//! Machines differ, and others use them meanwhile; so each part is told as a multiple of what SHA-256 of 1 MiB takes in the same run, by
//! the fastest of many runs. `benches/parts.tsv` keeps these multiples; a part that takes more than half as long again is marked, or so
//! much less: where many do, SHA-256 itself has become slower.
//! `cargo bench --bench parts -- --keep` keeps those of this run.

#![allow(clippy::print_stdout, clippy::unwrap_used, reason = "it is a benchmark, of what is known to be right")]

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::hint::black_box;
use std::path::Path;
use std::time::{Duration, Instant};

use lockstep::codec::chunks::{self, Chunk};
use lockstep::codec::{self, Coding, Layout};
use lockstep::endpoint::local::LocalSource;
use lockstep::endpoint::{ScanOptions, Source as _};
use lockstep::manifest::{Content, Digest, Entry, Manifest, Timestamp, Tree, format};
use lockstep::monitor::Silent;
use lockstep::path::RelPath;
use lockstep::plan::{Compare, Desired, diff};
use lockstep::scan::blocks::BlockSums;
use lockstep::wire::buffer::Writer;
use lockstep::wire::entries::EntryList;
use lockstep::wire::extension;
use lockstep::wire::sftp::{DATA_MAX, Frames, packet};
use sha2::{Digest as _, Sha256};

#[path = "../tests/kit/weights.rs"]
mod weights;

const MIB: usize = 1 << 20;
const KEPT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/benches/parts.tsv");
/// A part that takes so many times what was kept is marked.
const SLOWER: f64 = 1.5;
const FILES: usize = 20_000;
const ENTRIES: usize = 100_000;

/// The least that `work` takes, of what a second has room for, and of three at the least.
fn fastest<T>(mut work: impl FnMut() -> T) -> Duration {
    let begun = Instant::now();
    let (mut least, mut times) = (Duration::MAX, 0);
    while times < 3 || begun.elapsed() < Duration::from_secs(1) {
        let started = Instant::now();
        black_box(work());
        least = least.min(started.elapsed());
        times += 1;
    }
    least
}

fn entry(at: usize) -> Entry {
    Entry {
        path: RelPath::new(format!("shard-{:03}/sample-{at:06}.bin", at / 1000)).unwrap(),
        content: Content::File { size: at as u64, digest: Some(Digest(Sha256::digest(at.to_be_bytes()).into())) },
        mtime: Timestamp { seconds: 1_700_000_000 + at as i64, nanoseconds: 5 },
        mode: 0o644,
        owner: "owner".into(),
        group: "group".into(),
    }
}

/// A tree of so many files, with the directories that they are in; each of `changed` has other content.
fn tree(count: usize, changed: impl Fn(usize) -> bool) -> Tree {
    let mut entries: Vec<Entry> = (0..count).map(entry).collect();
    for (at, entry) in entries.iter_mut().enumerate().filter(|(at, _)| changed(*at)) {
        entry.content = Content::File { size: at as u64 + 1, digest: Some(Digest([7; 32])) };
    }
    let directories = (0..count.div_ceil(1000)).map(|at| Entry {
        path: RelPath::new(format!("shard-{at:03}")).unwrap(),
        content: Content::Directory,
        mode: 0o755,
        ..entry(0)
    });
    entries.extend(directories);
    Tree::new(entries).unwrap()
}

/// What is done, how long it takes, and of how many things of which kind.
struct Part(&'static str, Duration, f64, &'static str);

fn content() -> Vec<Part> {
    let data = weights::noise(8 * MIB);
    let chunk = |cut: &dyn Fn(&[u8]) -> usize| {
        let mut left = &data[..];
        while !left.is_empty() {
            left = &left[cut(left).min(left.len())..];
        }
    };
    let cut = |left: &[u8]| Chunk::first_of(left).map_or(left.len(), |chunk| chunk.length as usize);
    vec![
        Part("SHA-256", fastest(|| Sha256::digest(black_box(&data))), 8.0, "MiB"),
        Part("FastCDC and BLAKE3 of each chunk", fastest(|| chunk(&cut)), 8.0, "MiB"),
        Part(
            "BLAKE3 of blocks of 64 KiB",
            fastest(|| {
                chunk(&|left| {
                    let block = &left[..left.len().min(64 << 10)];
                    black_box(chunks::ChunkId::content_of(block));
                    block.len()
                })
            }),
            8.0,
            "MiB",
        ),
        Part(
            "CRC-32 of blocks of 64 KiB",
            fastest(|| {
                let mut sums = BlockSums::by(64 << 10, 1 << 30).unwrap();
                sums.update(black_box(&data));
                sums.finish()
            }),
            8.0,
            "MiB",
        ),
    ]
}

fn codings() -> Vec<Part> {
    let (text, weights) = (weights::text(512 << 10), weights::bf16(256 << 10));
    let planes = Layout::new(2, 0, true).map(Coding::Planes).unwrap();
    let mut parts = Vec::new();
    for (names, coding, data) in [
        (["zstd, level 1, of text", "the same back"], Coding::Zstd(1), &text),
        (["byte planes of bf16", "those back"], planes, &weights),
    ] {
        let (mut frame, mut back) = (Vec::with_capacity(2 * MIB), Vec::with_capacity(2 * MIB));
        let encode = fastest(|| {
            frame.clear();
            coding.encode(black_box(data), &mut frame).unwrap();
        });
        let decode = fastest(|| {
            back.clear();
            match coding {
                Coding::Zstd(_) => codec::decompress(black_box(&frame), data.len(), &mut back).unwrap(),
                Coding::Planes(_) => codec::planes::decode(black_box(&frame), data.len(), &mut back).unwrap(),
            }
        });
        assert!(back == *data);
        parts.extend([Part(names[0], encode, 0.5, "MiB"), Part(names[1], decode, 0.5, "MiB")]);
    }
    parts
}

/// What carries content: requests in pieces as they come from SSH.
fn wire() -> Vec<Part> {
    let content = weights::noise(DATA_MAX);
    let packet = Writer::new(packet::WRITE).u32(1).string(b"handle").u64(0).string(&content).finish();
    let stream = packet.repeat(32);
    let take = || {
        let (mut frames, mut count) = (Frames::default(), 0);
        for mut piece in black_box(&stream).chunks(32 << 10) {
            while frames.take(&mut piece).unwrap().is_some() {
                count += 1;
            }
        }
        assert_eq!(count, 32);
    };
    vec![Part("SFTP packets of 255 KiB taken apart", fastest(take), stream.len() as f64 / MIB as f64, "MiB")]
}

fn trees() -> Vec<Part> {
    let count = ENTRIES as f64;
    let (source, target) = (tree(ENTRIES, |_| false), tree(ENTRIES, |at| at % 1000 == 7));
    let wanted = |_: usize, entry: &Entry| Desired {
        mode: entry.mode,
        owner: Some(entry.owner.clone()),
        group: Some(entry.group.clone()),
        acl_differs: false,
    };
    let plan = diff(&source, &target, &wanted, Compare::default());
    assert_eq!(plan.actions.len(), ENTRIES / 1000);
    let encode = || {
        let mut raw = Vec::new();
        source.entries().iter().for_each(|entry| extension::put_entry(&mut raw, entry));
        raw
    };
    let raw = encode();
    let read = || {
        let mut list = EntryList::new(usize::MAX);
        list.read(black_box(&raw)).unwrap();
        list.into_entries().len()
    };
    let manifest = Manifest { generation: 3, created: Timestamp { seconds: 9, nanoseconds: 0 }, tree: source.clone() };
    let text = format::encode(&manifest);
    let scanned = tempfile::tempdir().unwrap();
    fill(scanned.path());
    let source = || LocalSource::new(&scanned.path().join("tree"), Some(&scanned.path().join("state"))).unwrap();
    let scan = || source().scan(&ScanOptions::default(), &Silent::default()).unwrap().tree.entries().len();
    assert_eq!(scan(), FILES + FILES / 1000);
    vec![
        Part(
            "plan of a tree, 1 of 1000 changed",
            fastest(|| diff(source_of(&manifest), &target, &wanted, Compare::default())),
            count,
            "entry",
        ),
        Part("entries onto the wire", fastest(encode), count, "entry"),
        Part("entries from the wire", fastest(read), count, "entry"),
        Part("manifest written", fastest(|| format::encode(black_box(&manifest))), count, "entry"),
        Part("manifest read", fastest(|| format::decode(black_box(&text)).unwrap()), count, "entry"),
        Part("scan of small files", fastest(scan), FILES as f64, "file"),
    ]
}

fn source_of(manifest: &Manifest) -> &Tree {
    &manifest.tree
}

fn fill(at: &Path) {
    for number in 0..FILES {
        let path = at.join(format!("tree/{:02}/{number:05}", number / 1000));
        if number % 1000 == 0 {
            fs::create_dir_all(path.parent().unwrap()).unwrap();
        }
        fs::write(path, [0; 10]).unwrap();
    }
}

fn kept() -> BTreeMap<String, f64> {
    let text = fs::read_to_string(KEPT).unwrap_or_default();
    let line = |line: &str| line.split_once('\t').and_then(|(name, of)| Some((name.to_owned(), of.parse().ok()?)));
    text.lines().filter_map(line).collect()
}

fn main() {
    let parts: Vec<Part> = content().into_iter().chain(codings()).chain(wire()).chain(trees()).collect();
    let mebibyte = parts[0].1.as_secs_f64() / parts[0].2;
    let kept = kept();
    let mut text = String::new();
    println!("{:36} {:>14} {:>26} {:>10}", "part", "time", "of SHA-256 of 1 MiB", "kept");
    for Part(name, taken, count, unit) in parts {
        let one = taken.as_secs_f64() / count;
        let ratio = one / mebibyte;
        let before = kept.get(name);
        let mark = match before {
            Some(before) if ratio > SLOWER * before => "  slower",
            // If many are, it is SHA-256 that takes longer.
            Some(before) if ratio < before / SLOWER => "  faster",
            _ => "",
        };
        let before = before.map_or_else(String::new, |before| format!("{before:.7}"));
        println!("{name:36} {:>9.3} us/{unit:5} {ratio:20.7} {before:>10}{mark}", one * 1e6);
        let _ = writeln!(text, "{name}\t{ratio:.8}");
    }
    if std::env::args().any(|argument| argument == "--keep") {
        fs::write(KEPT, text).unwrap();
        println!("kept in {KEPT}");
    }
}
