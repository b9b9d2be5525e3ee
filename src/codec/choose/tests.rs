//! What each kind of content is coded as, and when a block is looked at.

use super::*;
use crate::codec::{decompress, weights};

const SLOW: Way = Way { link_rate: Some(1e6), idle_processors: Some(1.5) };
const BLOCK: usize = 512 * 1024;

fn at(file: u32, offset: u64) -> Place<'static> {
    Place { file, offset, once: None }
}

fn chooser(planes: bool) -> Chooser {
    Chooser::new(CompressOptions::default(), planes)
}

fn planes(width: usize, phase: usize) -> Option<Coding> {
    Layout::new(width, phase, width > 1).map(Coding::Planes)
}

#[test]
fn a_block_is_coded_once_for_all_who_want_it_in_the_same_way() {
    let (zstd, layout) = (Coding::Zstd(1), Layout::new(2, 0, true).unwrap());
    let kinds = [(weights::text(50_000), zstd, Coding::Zstd(9)), (weights::bf16(50_000), Coding::Planes(layout), zstd)];
    for (data, coding, others) in kinds {
        let once = Once::default();
        let (mut first, mut second, mut other) = (b"head".to_vec(), Vec::new(), Vec::new());
        once.encode(coding, &data, &mut first).unwrap();
        // What is taken from there is not made again, whatever it is given.
        once.encode(coding, b"not looked at", &mut second).unwrap();
        assert_eq!(first[4..], second);
        once.encode(others, &data, &mut other).unwrap();
        assert!(other != second);
        for (coding, frame) in [(coding, &second), (others, &other)] {
            let mut out = Vec::new();
            match coding {
                Coding::Zstd(_) => decompress(frame, data.len(), &mut out).unwrap(),
                Coding::Planes(_) => planes::decode(frame, data.len(), &mut out).unwrap(),
            }
            assert!(out == data);
        }
    }
}

#[test]
fn a_block_is_looked_at_once_for_all_and_only_those_who_read_planes_get_them() {
    let (data, once) = (weights::bf16(50_000), Once::default());
    let place = Place { once: Some(&once), ..at(0, 0) };
    assert!(matches!(chooser(false).coding(place, &data, SLOW), Some(Coding::Zstd(_))));
    // The second believes the first.
    assert_eq!(chooser(true).coding(place, &[7; 100], SLOW), planes(2, 0));
}

#[test]
fn compresses_only_what_pays() {
    let link = |rate, idle_processors| Way { link_rate: Some(rate), idle_processors };
    assert!(pays(0.5, 500e6, link(100e6, None)));
    assert!(!pays(0.5, 500e6, link(2e9, None)));
    assert!(!pays(1.0, 500e6, link(100e6, None)));
    assert!(!pays(0.5, 500e6, link(300e6, None)));
    assert!(pays(0.5, 500e6, link(300e6, Some(0.5))));
    let mut chooser = chooser(true);
    let constant = vec![1; 100_000];
    assert_eq!(chooser.coding(at(0, 0), &constant, Way { idle_processors: Some(0.1), ..SLOW }), None);
    assert_eq!(chooser.coding(at(0, 0), &constant, SLOW), Some(Coding::Zstd(1)));
    assert_eq!(chooser.coding(at(1, 0), &weights::noise(70_000), SLOW), None);
    let mut off = Chooser::new(CompressOptions { level: Some(3), enabled: false }, true);
    assert_eq!(off.coding(at(0, 0), &[1; 1000], Way::default()), None);
}

#[test]
fn a_faster_codec_pays_on_a_faster_link() {
    let mut chooser = chooser(true);
    let data = weights::bf16(50_000);
    let fast = Way { link_rate: Some(600e6), idle_processors: Some(1.5) };
    chooser.look(at(0, 0), &data, 1);
    (chooser.zstd_rate, chooser.planes_rate) = (400e6, 1e9);
    chooser.known.iter_mut().for_each(|known| known.left = 2);
    assert_eq!(chooser.coding(at(0, 0), &data, fast), planes(2, 0));
    chooser.planes = false;
    assert_eq!(chooser.coding(at(0, 0), &data, fast), None);
}

#[test]
fn each_kind_of_content_gets_what_is_for_it() {
    let kinds = [
        (weights::bf16(BLOCK / 2), planes(2, 0)),
        // Single bytes are one plane, which is better where the matches that zstd finds are too short.
        (weights::bf16(BLOCK).iter().skip(1).step_by(2).copied().collect(), planes(1, 0)),
        (weights::fp8(BLOCK), Some(Coding::Zstd(1))),
        (weights::text(BLOCK), Some(Coding::Zstd(1))),
        (vec![0; BLOCK], Some(Coding::Zstd(1))),
        (weights::noise(BLOCK), None),
        (weights::noise(100), None),
    ];
    for (number, (data, coding)) in kinds.iter().enumerate() {
        // Which level it is goes by the link.
        let found = chooser(true).coding(at(0, 0), data, SLOW).map(|coding| match coding {
            Coding::Zstd(_) => Coding::Zstd(1),
            planes => planes,
        });
        assert_eq!(found, *coding, "kind {number}");
        let zstd = coding.map(|_| Coding::Zstd(1));
        assert_eq!(
            chooser(false).coding(at(0, 0), data, SLOW).is_some(),
            zstd.is_some(),
            "kind {number} to an old server"
        );
        let fixed = Chooser::new(CompressOptions { level: Some(3), enabled: true }, true).coding(at(0, 0), data, SLOW);
        assert_eq!(fixed, coding.map(|coding| if coding == Coding::Zstd(1) { Coding::Zstd(3) } else { coding }));
    }
}

#[test]
fn the_slower_the_link_the_higher_the_level() {
    let (data, level) =
        (weights::text(BLOCK), |way| match chooser(true).coding(at(0, 0), &weights::text(BLOCK), way) {
            Some(Coding::Zstd(level)) => level,
            other => panic!("{other:?} for text"),
        });
    let link = |rate| Way { link_rate: Some(rate), ..SLOW };
    assert_eq!(level(link(200e6)), 1);
    assert!(level(link(0.3e6)) > 1);
    // Nobody knows the link, or nothing is free for more than the least.
    assert_eq!(level(Way { link_rate: None, ..SLOW }), 1);
    assert_eq!(level(Way { link_rate: Some(0.3e6), idle_processors: Some(0.3) }), 1);
    // What is smaller at a higher level is, and what is told to be of one level is of that.
    let size = |level| {
        let mut frame = Vec::new();
        Coding::Zstd(level).encode(&data, &mut frame).unwrap();
        frame.len()
    };
    assert!(size(level(link(0.3e6))) < size(1));
    let mut told = Chooser::new(CompressOptions { level: Some(1), enabled: true }, true);
    assert_eq!(told.coding(at(0, 0), &data, link(0.3e6)), Some(Coding::Zstd(1)));
}

#[test]
fn another_machine_is_asked_for_a_level_that_suits_the_link() {
    let found = [118e6, 12e6, 6e6, 1e6].map(|link_rate| level_elsewhere(0.25, link_rate));
    assert_eq!(found, [1, 3, 3, 9]);
    assert_eq!(level_elsewhere(0.001, 12e6), 1);
}

#[test]
fn other_floats_get_planes_of_their_width() {
    for (data, wanted) in [(weights::fp16(BLOCK / 2), 2), (weights::fp32(BLOCK / 4), 4)] {
        match chooser(true).coding(at(0, 0), &data, SLOW) {
            Some(Coding::Planes(layout)) => assert_eq!(layout.width(), wanted),
            other => panic!("{other:?} for {wanted} bytes"),
        }
    }
}

#[test]
fn what_a_block_is_goes_by_the_block_and_is_looked_at_again() {
    let header = weights::text(40_001);
    let file = [&header[..], &weights::bf16(3 * BLOCK / 2), &weights::noise(BLOCK * 20)].concat();
    let mut chooser = chooser(true);
    let blocks: Vec<_> = file.chunks(BLOCK).collect();
    let mut code = |(number, block): (usize, &&[u8])| chooser.coding(at(0, (number * BLOCK) as u64), block, SLOW);
    let codings: Vec<_> = blocks.iter().enumerate().map(&mut code).collect();
    // The header is no more than a part of the first block.
    assert_eq!(codings[..3], [planes(2, 1); 3]);
    assert_eq!(codings.last(), Some(&None), "noise is found in the end");
    // Neither the file nor the place is that of the last: a block that begins elsewhere has another phase.
    assert_eq!(chooser.coding(at(1, 0), blocks[1], SLOW), planes(2, 1));
    let known = chooser.known.as_mut().unwrap();
    (known.left, known.offset) = (5, 0);
    assert_eq!(chooser.coding(at(1, 3), &blocks[1][3..], SLOW), planes(2, 0));
    assert_eq!(chooser.coding(at(1, 2), &blocks[1][2..], SLOW), planes(2, 1));
}

#[test]
fn most_blocks_are_not_looked_at() {
    let (mut chooser, data) = (chooser(true), weights::noise(1000));
    let looked = (0..100).filter(|_| {
        chooser.look(at(0, 0), &data, 1);
        chooser.known.is_some_and(|known| known.left + 1 == known.trusted)
    });
    // The first, then after 1, 2, 4, 8, 16 and every further 16.
    assert_eq!(looked.count(), 10);
}
