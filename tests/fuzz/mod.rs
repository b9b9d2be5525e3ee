//! The fuzzer's targets with the corpus that is kept, and with what comes of it at random: the same each time. The fuzzer
//! itself is `scripts/fuzz`.

use std::fs;
use std::path::Path;

use crate::kit::weights::Numbers;

mod targets;

/// What breaks parsers most often.
const TOKENS: [&[u8]; 12] =
    [b"", b"\0", b"\n", b"..", b"/", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\"", b"=", b"\r\n", b"%", b"\xc3\x28"];

fn changed(seed: &[u8], other: &[u8], numbers: &mut Numbers) -> Vec<u8> {
    let mut data = seed.to_vec();
    for _ in 0..=numbers.below(4) {
        let at = numbers.below(data.len() + 1);
        match numbers.below(6) {
            0 if !data.is_empty() => {
                let at = numbers.below(data.len());
                data[at] ^= 1 << numbers.below(8);
            }
            1 if !data.is_empty() => {
                let at = numbers.below(data.len());
                data[at] = u8::try_from(numbers.below(256)).unwrap();
            }
            2 => data.truncate(at),
            3 => {
                data.drain(at..(at + numbers.below(16)).min(data.len()));
            }
            4 => {
                let from = numbers.below(other.len() + 1);
                let piece = &other[from..(from + numbers.below(64)).min(other.len())];
                data.splice(at..at, piece.iter().copied());
            }
            _ => {
                data.splice(at..at, TOKENS[numbers.below(TOKENS.len())].iter().copied());
            }
        }
    }
    data
}

/// What a target is given: the corpus first, then so many things made of it.
fn run(name: &str, rounds: usize) {
    let (_, target) = targets::ALL.iter().find(|(known, _)| *known == name).expect("a target of that name");
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz/corpus").join(name);
    let mut seeds: Vec<_> = fs::read_dir(&corpus).unwrap().map(|entry| entry.unwrap().path()).collect();
    seeds.sort();
    let seeds: Vec<Vec<u8>> = seeds.into_iter().map(|path| fs::read(path).unwrap()).collect();
    assert!(!seeds.is_empty(), "no corpus in '{}'", corpus.display());
    let tried = |data: &[u8]| {
        if std::panic::catch_unwind(|| target(data)).is_err() {
            let kept = std::env::temp_dir().join(format!("lockstep-fuzz-{name}"));
            fs::write(&kept, data).unwrap();
            panic!("{name}: what it fails with is in '{}'", kept.display());
        }
    };
    seeds.iter().for_each(|seed| tried(seed));
    let mut numbers = Numbers(0x9e37_79b9_7f4a_7c15);
    for _ in 0..rounds {
        let (one, other) = (numbers.below(seeds.len()), numbers.below(seeds.len()));
        tried(&changed(&seeds[one], &seeds[other], &mut numbers));
    }
}

macro_rules! fuzzed {
    ($($name:ident: $rounds:literal,)*) => {
        $(
            #[test]
            fn $name() {
                run(stringify!($name), $rounds);
            }
        )*

        #[test]
        fn every_target_is_run() {
            let run = [$(stringify!($name)),*];
            let all: Vec<&str> = targets::ALL.iter().map(|(name, _)| *name).collect();
            assert_eq!(all, run);
        }
    };
}

fuzzed! {
    packets: 800,
    extensions: 60,
    wire: 10_000,
    manifest: 20_000,
    sums: 20_000,
    policy: 10_000,
    authorized_keys: 5_000,
    known_hosts: 5_000,
    revoked: 5_000,
    config: 3_000,
    layouts: 20_000,
    signatures: 2_000,
    audit: 5_000,
}
