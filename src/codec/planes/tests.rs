//! Byte planes there and back, what they save, and frames that are damaged or lie.

use proptest::prelude::*;

use super::*;
use crate::codec::weights;

const ALL: [(usize, bool); 5] = [(1, false), (2, false), (2, true), (4, false), (4, true)];

fn layouts() -> impl Iterator<Item = Layout> {
    let phases = |(width, rotated)| (0..width).filter_map(move |phase| Layout::new(width, phase, rotated));
    ALL.into_iter().flat_map(phases)
}

fn encoded(data: &[u8], layout: Layout) -> Vec<u8> {
    let mut frame = Vec::new();
    encode(data, layout, &mut frame).unwrap();
    frame
}

#[track_caller]
fn assert_round_trip(data: &[u8], layout: Layout) {
    let frame = encoded(data, layout);
    let mut out = b"head".to_vec();
    decode(&frame, data.len(), &mut out).unwrap();
    assert!(out[..4] == *b"head" && out[4..] == *data, "{layout:?}, {} bytes", data.len());
}

#[test]
fn there_are_just_these_layouts_and_each_has_a_byte() {
    let bytes: Vec<_> = layouts().map(Layout::to_byte).collect();
    for byte in 0..=u8::MAX {
        let found = Layout::of_byte(byte);
        assert_eq!(found.is_some(), bytes.contains(&byte), "{byte:#x}");
        assert!(found.is_none_or(|layout| layout.to_byte() == byte));
    }
    assert_eq!(bytes.len(), 13);
    assert!(
        Layout::new(2, 2, true).is_none() && Layout::new(3, 0, true).is_none() && Layout::new(1, 0, true).is_none()
    );
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_length_goes_there_and_back_in_every_layout(data in prop::collection::vec(any::<u8>(), 4..300)) {
        layouts().for_each(|layout| assert_round_trip(&data, layout));
    }

    #[test]
    fn a_frame_that_was_changed_gives_nothing_or_the_length_that_was_declared(
        data in prop::collection::vec(any::<u8>(), 4..40),
        layout in 0..13_usize,
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..3),
        longer in prop::option::weighted(0.3, 0..6_usize),
    ) {
        let mut frame = encoded(&data, layouts().nth(layout).unwrap());
        for (at, byte) in changes {
            *at.get_mut(&mut frame) = byte;
        }
        let length = data.len() - 2 + longer.unwrap_or(2);
        let mut out = Vec::new();
        match decode(&frame, length, &mut out) {
            Ok(()) => assert_eq!(out.len(), length),
            Err(_) => assert!(out.is_empty()),
        }
    }
}

#[test]
fn weights_go_there_and_back_from_wherever_a_block_begins() {
    let weights = weights::bf16(20_000);
    for layout in layouts() {
        for (from, to) in [(0, weights.len()), (1, weights.len() - 2), (3, 16_384), (7, 10)] {
            if to - from >= layout.phase() {
                assert_round_trip(&weights[from..to], layout);
            }
        }
    }
    for length in 0..4 {
        let short = &weights[..length];
        for layout in layouts() {
            match encode(short, layout, &mut Vec::new()) {
                Ok(()) => assert_round_trip(short, layout),
                Err(error) => assert!(layout.phase() > length && error == CodecError::Compress),
            }
        }
    }
}

/// So much of it is saved, in hundredths.
fn saved(data: &[u8], layout: Layout) -> usize {
    100 - 100 * encoded(data, layout).len() / data.len()
}

#[test]
fn of_weights_about_as_much_is_saved_as_can_be() {
    let layout = |width| Layout::new(width, 0, width > 1).unwrap();
    let (bf16, fp16, fp32) = (weights::bf16(200_000), weights::fp16(200_000), weights::fp32(100_000));
    assert!(saved(&bf16, layout(2)) >= 33);
    assert!(saved(&fp16, layout(2)) >= 15);
    assert!(saved(&fp32, layout(4)) >= 16);
    assert!(saved(&weights::fp8(200_000), layout(1)) >= 30);
    // Elsewhere a bit of the exponent is apart from the others.
    for (phase, rotated) in [(0, false), (1, true)] {
        let other = Layout::new(2, phase, rotated).unwrap();
        assert!(encoded(&bf16, other).len() > encoded(&bf16, layout(2)).len() + bf16.len() / 200, "{other:?}");
    }
    // What was cut from fp32 leaves planes of zeros.
    let cut: Vec<u8> = bf16.as_chunks::<2>().0.iter().flat_map(|&[low, high]| [0, 0, low, high]).collect();
    assert!(saved(&cut, layout(4)) >= 64);
    // Noise is stored, with 1 + 2 * 5 bytes in front of it.
    assert_eq!(encoded(&weights::noise(100_000), layout(2)).len(), 100_011);
}

#[test]
fn the_layout_of_a_sample_is_found_wherever_it_begins() {
    let kinds = [(weights::bf16(8000), 2, 0.69), (weights::fp16(8000), 2, 0.86), (weights::fp32(4000), 4, 0.85)];
    for (data, width, most) in &kinds {
        for from in 0..*width {
            let sample = &data[from..8192 + from];
            let (layout, ratio) = guess(sample).unwrap();
            assert!(layout.width() == *width && ratio < *most, "{width}, from {from}: {layout:?}, {ratio}");
            // Of an fp16 and an fp32 the exponent is whole at other phases, too.
            let right = Layout::new(*width, (width - from) % width, true).unwrap();
            let (found, best) = (encoded(sample, layout).len(), encoded(sample, right).len());
            assert!(found <= best + sample.len() / 500, "{width}, from {from}: {layout:?}, {found} bytes, not {best}");
            assert!(*most > 0.7 || layout == right, "from {from}: {layout:?}");
        }
    }
    assert_eq!(guess(&weights::fp8(8192)).unwrap().0, Layout::new(1, 0, false).unwrap());
    assert_eq!(guess(&weights::noise(8192)), None);
}

#[test]
fn numbers_stay_where_they_are_when_a_block_begins_elsewhere() {
    for (layout, distance, phase) in
        [((4, 1), 3, 2), ((4, 1), 1, 0), ((4, 3), u64::MAX, 0), ((2, 0), 1, 1), ((1, 0), 9, 0)]
    {
        let [before, after] = [layout.1, phase].map(|phase| Layout::new(layout.0, phase, layout.0 > 1).unwrap());
        assert_eq!(before.moved(distance), after, "{layout:?} by {distance}");
        assert_eq!(after.moved(distance.wrapping_neg()), before, "{layout:?} by {distance}");
    }
}

#[test]
fn h21_damaged_planes_are_refused_or_give_what_was_declared() {
    let data = weights::bf16(3000);
    let layout = Layout::new(2, 1, true).unwrap();
    let aligned = [&[7][..], &data, &[9]].concat();
    let frame = encoded(&aligned, layout);
    let mut out = Vec::new();
    for length in 0..frame.len() {
        assert!(decode(&frame[..length], aligned.len(), &mut out).is_err(), "{length} bytes");
    }
    assert_eq!(decode(&[&frame[..], b"x"].concat(), aligned.len(), &mut out), Err(CodecError::Planes));
    for declared in [0, 1, aligned.len() - 2, aligned.len() - 1, aligned.len() + 1, aligned.len() + 2] {
        assert!(decode(&frame, declared, &mut out).is_err(), "{declared} declared");
    }
    assert!(out.is_empty());
    for at in 0..frame.len() {
        for bit in 0..8 {
            let mut bad = frame.clone();
            bad[at] ^= 1 << bit;
            match decode(&bad, aligned.len(), &mut out) {
                Ok(()) => assert_eq!(out.len(), aligned.len(), "bit {bit} at {at}"),
                Err(_) => assert!(out.is_empty(), "bit {bit} at {at}"),
            }
            out.clear();
        }
    }
    // The exponents are under a checksum of their own.
    let mut bad = frame.clone();
    *bad.last_mut().unwrap() ^= 1;
    assert_eq!(decode(&bad, aligned.len(), &mut out), Err(CodecError::Damaged));
}

/// A frame of pairs by hand.
fn frame(planes: &[(u8, u32, &[u8])]) -> Vec<u8> {
    let planes =
        planes.iter().flat_map(|(method, length, data)| [&[*method][..], &length.to_be_bytes(), data].concat());
    std::iter::once(1).chain(planes).collect()
}

#[test]
fn h20_planes_that_lie_about_their_length_are_refused_before_anything_is_allocated() {
    let stored = (STORED, 4, &b"abcd"[..]);
    let mut out = Vec::new();
    decode(&frame(&[stored, stored]), 8, &mut out).unwrap();
    assert_eq!(out, b"aabbccdd");
    let mut bomb = Vec::new();
    crate::codec::compress(&vec![0; 16 << 20], 1, &mut bomb).unwrap();
    let bomb = (CODED, bomb.len() as u32, &bomb[..]);
    let wrong: [(&[_], CodecError); 7] = [
        (&[stored], CodecError::Planes),
        (&[stored, stored, stored], CodecError::Planes),
        (&[stored, (STORED, 3, b"abc")], CodecError::Planes),
        (&[stored, (STORED, u32::MAX, b"abcd")], CodecError::Planes),
        (&[stored, (2, 4, b"abcd")], CodecError::Layout),
        (&[stored, (CODED, 4, b"abcd")], CodecError::NotAFrame),
        (&[stored, bomb], CodecError::Length),
    ];
    for (planes, error) in wrong {
        let mut out = Vec::new();
        assert_eq!(decode(&frame(planes), 8, &mut out), Err(error));
        assert_eq!(out.capacity(), 0);
    }
    // It is the planes' memory as well: what was decoded before is all that there is.
    let before = PLANES.with_borrow(Vec::capacity);
    assert!(before < 1 << 20, "{before}");
    for byte in [3, 5 << 2, 0x21, 0x11 | 8, 0xc1] {
        assert_eq!(decode(&[byte, 0, 0, 0, 0, 0], 8, &mut out), Err(CodecError::Layout), "{byte:#x}");
    }
}
