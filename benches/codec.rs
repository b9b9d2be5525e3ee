//! How fast the codecs are, and how small they make what, one block after the other on one core: `cargo bench --bench codec`.
//! Speeds are of the fastest of many runs, in bytes before coding; others who use the machine make all of them slower.

#![allow(clippy::print_stdout, reason = "it is what a benchmark is for")]

use std::hint::black_box;
use std::time::{Duration, Instant};

use lockstep::codec::{self, Chooser, Coding, CompressOptions, Layout, Place, Way};

#[path = "../tests/kit/weights.rs"]
mod weights;

const BLOCK: usize = 512 * 1024;

/// The least that `work` takes, of what half a second has room for.
fn fastest(mut work: impl FnMut()) -> Duration {
    let begun = Instant::now();
    let mut least = Duration::MAX;
    while begun.elapsed() < Duration::from_millis(500) {
        let started = Instant::now();
        work();
        least = least.min(started.elapsed());
    }
    least
}

fn gigabytes_a_second(taken: Duration) -> f64 {
    BLOCK as f64 / taken.as_secs_f64() / 1e9
}

fn decode(coding: Coding, frame: &[u8], out: &mut Vec<u8>) {
    out.clear();
    let decoded = match coding {
        Coding::Zstd(_) => codec::decompress(frame, BLOCK, out),
        Coding::Planes(_) => codec::planes::decode(frame, BLOCK, out),
    };
    assert!(decoded.is_ok(), "{decoded:?}");
}

fn main() {
    let planes = |width: usize| Layout::new(width, 0, width > 1).map(Coding::Planes);
    let zstd = [Coding::Zstd(-5), Coding::Zstd(1), Coding::Zstd(3)];
    let kinds = [
        ("random", weights::noise(BLOCK), planes(2)),
        ("bf16", weights::bf16(BLOCK / 2), planes(2)),
        ("fp16", weights::fp16(BLOCK / 2), planes(2)),
        ("fp32", weights::fp32(BLOCK / 4), planes(4)),
        ("fp8", weights::fp8(BLOCK), planes(1)),
        ("text", weights::text(BLOCK), planes(1)),
    ];
    println!("{:8} {:10} {:>6} {:>12} {:>12}", "block", "codec", "ratio", "encode GB/s", "decode GB/s");
    for (kind, data, planes) in &kinds {
        for coding in zstd.into_iter().chain(*planes) {
            let (mut frame, mut out) = (Vec::with_capacity(2 * BLOCK), Vec::with_capacity(2 * BLOCK));
            let encoding = fastest(|| {
                frame.clear();
                assert!(coding.encode(black_box(data), &mut frame).is_ok());
            });
            let decoding = fastest(|| decode(coding, black_box(&frame), &mut out));
            assert!(out == *data, "it came back as something else");
            let name = match coding {
                Coding::Zstd(level) => format!("zstd {level}"),
                Coding::Planes(layout) => format!("planes {}", layout.width()),
            };
            let ratio = frame.len() as f64 / BLOCK as f64;
            let (encode, decode) = (gigabytes_a_second(encoding), gigabytes_a_second(decoding));
            println!("{kind:8} {name:10} {ratio:6.3} {encode:12.2} {decode:12.2}");
        }
    }
    println!("\n{:8} {:>26}", "block", "choosing, us (per 16 blocks)");
    let way = Way { link_rate: Some(1e6), idle_processors: Some(1.0) };
    for (kind, data, _) in &kinds {
        let taken = fastest(|| {
            let mut chooser = Chooser::new(CompressOptions::default(), true);
            black_box(chooser.coding(Place { file: 0, offset: 0, once: None }, black_box(data), way));
        });
        println!("{kind:8} {:26.0}", taken.as_secs_f64() * 1e6);
    }
}
