//! What is found of a file, whatever was done to it, and whatever the other end says.

use super::super::list;
use super::*;
use crossbeam_channel::unbounded;
use proptest::prelude::*;

use crate::wire::alike::{put_part, read_part};
use crate::wire::extension::Fields;

fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof().fill(&mut bytes);
    bytes
}

/// What a target lists of `data`, so many chunks; with or without sums.
fn part(data: &[u8], wanted: Wanted, count: usize, pieces: u32, sums: bool) -> Alike {
    let cut = if wanted.cut == Cut::BySum && !sums { Cut::ByLength } else { wanted.cut };
    let (mut alike, mut at) = (Alike { pieces, cut, ..Alike::default() }, wanted.from.offset as usize);
    let end = data.len().min(usize::try_from(wanted.to).unwrap());
    while alike.chunks.len() < count && at < end {
        let rest = &data[at..];
        let block = &rest[..(end - at).min(BLOCK_LENGTH)];
        let chunk = match cut {
            Cut::ByContent => Chunk::first_of(rest).unwrap(),
            Cut::ByLength => Chunk::of(block),
            Cut::BySum => Chunk { id: ChunkId::Sum(crc32fast::hash(block)), length: block.len() as u32 },
        };
        alike.chunks.push(chunk);
        at += chunk.length as usize;
    }
    alike.next = (at < data.len()).then_some(at as u64);
    alike
}

/// What a target that has `there`, and lists so many chunks at once, makes of `new`, which is fed in blocks of so many bytes; how
/// many bytes were sent, and how many the target listed: by content, by length, and by sums.
fn made(there: &[&[u8]], new: &[u8], block: usize, each: usize, sums: bool) -> (Vec<u8>, usize, [u64; 3]) {
    std::thread::scope(|scope| {
        let ((orders, ordered), (sender, parts)) = (unbounded(), unbounded());
        let lists = scope.spawn(move || {
            let mut looked = [0; 3];
            let ask = |wanted: Wanted| -> Result<_, ()> {
                let part = part(there[wanted.from.piece as usize], wanted, each, there.len() as u32, sums);
                looked[part.cut as usize] += part.chunks.iter().map(|chunk| u64::from(chunk.length)).sum::<u64>();
                Ok(Some(part))
            };
            list(&mut (ordered, sender), ask).unwrap();
            looked
        });
        let mut matcher = Matcher::new(0, Box::new((orders, parts)));
        let mut steps = Vec::new();
        for bytes in new.chunks(block) {
            matcher.feed(Block::copy_of(bytes), &mut steps);
        }
        matcher.flush(&mut steps);
        drop(matcher);
        let (mut made, mut sent) = (Vec::new(), 0);
        for step in steps {
            match step {
                Step::Copy { offset, length, from } => {
                    assert!(offset == made.len() as u64 && length <= COPY_MAX);
                    made.extend_from_slice(&there[from.piece as usize][from.offset as usize..][..length as usize]);
                }
                Step::Data { offset, block } => {
                    assert_eq!(offset, made.len() as u64);
                    sent += block.data().len();
                    made.extend_from_slice(block.data());
                }
            }
        }
        (made, sent, lists.join().unwrap())
    })
}

#[test]
fn h42_a_list_without_an_end_is_listened_to_for_so_long_alone() {
    let ((orders, ordered), (sender, parts)) = (unbounded(), crossbeam_channel::bounded(4));
    let asked = std::thread::spawn(move || {
        let mut asked = 0_u64;
        let ask = |wanted: Wanted| -> Result<_, ()> {
            asked += 1;
            let id = |at: u64| ChunkId::Content(std::array::from_fn(|byte| (at >> (byte % 8 * 8)) as u8));
            let chunks = (0..10_000).map(|at| Chunk { id: id(wanted.from.offset + at), length: 1 }).collect();
            Ok(Some(Alike { pieces: 1, chunks, next: Some(wanted.from.offset + 10_000), ..Alike::default() }))
        };
        list(&mut (ordered, sender), ask).unwrap();
        asked
    });
    let (mut matcher, mut steps) = (Matcher::new(0, Box::new((orders, parts))), Vec::new());
    for bytes in noise(1, 8 << 20).chunks(1 << 20) {
        matcher.feed(Block::copy_of(bytes), &mut steps);
        assert!(matcher.known.len() <= KNOWN_MAX + 10_000);
    }
    matcher.flush(&mut steps);
    drop(matcher);
    let sent: usize =
        steps.iter().map(|step| if let Step::Data { block, .. } = step { block.data().len() } else { 0 }).sum();
    assert_eq!(sent, 8 << 20);
    let asked = asked.join().unwrap();
    assert!(asked <= KNOWN_MAX as u64 / 10_000 + 10, "asked {asked} times");
}

#[test]
fn only_what_the_target_does_not_have_is_sent() {
    let old = noise(1, 30 << 20);
    let insert = |at: usize| [&old[..at], b"a header that was longer", &old[at..]].concat();
    let mut changed = old.clone();
    changed[10 << 20] ^= 1;
    let mut replaced = old.clone();
    replaced[5 << 20..9 << 20].copy_from_slice(&noise(4, 4 << 20));
    let moved = [&old[20 << 20..], &old[..20 << 20]].concat();
    for (what, new, most) in [
        ("the same", old.clone(), 0),
        ("a byte in the middle", changed, 1 << 20),
        ("4 MiB in the middle", replaced, 6 << 20),
        ("something at the front", insert(0), 1 << 20),
        ("something in the middle", insert(15 << 20), 3 << 20),
        ("more at the end", [&old[..], &noise(2, 1 << 20)].concat(), 2 << 20),
        ("the end cut off", old[..20 << 20].to_vec(), 1 << 20),
        ("parts that changed places", moved, 3 << 20),
        ("nothing of it", noise(3, 10 << 20), 10 << 20),
    ] {
        for (block, each, sums) in
            [(1 << 20, 16, true), (1 << 20, 16, false), (100_000, 16, true), (1 << 20, 1000, false)]
        {
            let (result, sent, _) = made(&[&old], &new, block, each, sums);
            assert!(result == new && sent <= most, "{what}: {sent} bytes were sent");
        }
    }
    assert_eq!(made(&[&[]], &old, 1 << 20, 1, false).1, old.len());
}

#[test]
fn what_follows_on_what_was_found_is_compared_by_blocks_of_one_length() {
    let old = noise(1, 200 << 20);
    let mut changed = [b"header", &old[..]].concat();
    changed[150 << 20] ^= 1;
    let (result, sent, [by_content, by_length, _]) = made(&[&old], &changed, 1 << 20, 32, false);
    assert!(result == changed && sent < 2 << 20, "{sent} bytes were sent");
    assert!(by_content < 80 << 20 && by_length > 150 << 20, "{by_content} {by_length}");
    // Where sums were kept, the file itself is hardly looked at.
    let (result, sent, [by_content, by_length, by_sum]) = made(&[&old], &changed, 1 << 20, 32, true);
    assert!(result == changed && sent < 2 << 20, "{sent} bytes were sent");
    assert!(by_content < 80 << 20 && by_length < 1 << 20 && by_sum > 150 << 20, "{by_content} {by_length} {by_sum}");
}

#[test]
fn of_several_files_each_is_looked_into() {
    let there: Vec<Vec<u8>> = (1..4).map(|seed| noise(seed, 20 << 20)).collect();
    let there: Vec<&[u8]> = there.iter().map(|data| &data[..]).collect();
    for (new, most) in [(there[1].to_vec(), 0), ([there[2], there[0]].concat(), 2 << 20)] {
        let (result, sent, _) = made(&there, &new, 1 << 20, 30, true);
        assert!(result == new && sent <= most, "{sent} bytes were sent");
    }
}

#[test]
fn a_list_that_breaks_off_costs_only_what_it_does_not_have() {
    let old = noise(1, 20 << 20);
    for cut in [Cut::ByContent, Cut::ByLength] {
        let ((orders, ordered), (sender, parts)) = (unbounded(), unbounded());
        let mut matcher = Matcher::new(0, Box::new((orders, parts)));
        let listed = |cut| {
            let wanted = Wanted { from: Within::default(), to: u64::MAX, cut };
            Some(part(&old, wanted, 20, 1, true))
        };
        sender.send(Part { order: 1, from: Within::default(), alike: listed(Cut::ByContent) }).unwrap();
        if cut == Cut::ByContent {
            drop(ordered);
        } else {
            sender.send(Part { order: 2, from: Within::default(), alike: listed(cut) }).unwrap();
        }
        drop(sender);
        let (mut steps, mut at) = (Vec::new(), 0);
        old.chunks(1 << 20).for_each(|bytes| matcher.feed(Block::copy_of(bytes), &mut steps));
        matcher.flush(&mut steps);
        for step in &steps {
            let length = match step {
                Step::Copy { length, .. } => *length,
                Step::Data { block, .. } => block.data().len() as u64,
            };
            let (Step::Copy { offset, .. } | Step::Data { offset, .. }) = step;
            assert_eq!(*offset, at);
            at += length;
        }
        assert_eq!(at, old.len() as u64);
        assert!(matches!(steps[0], Step::Copy { .. }) && matches!(steps.last(), Some(Step::Data { .. })));
    }
}

#[test]
fn a_file_of_which_nothing_is_found_is_not_looked_at_to_its_end() {
    let ((orders, _ordered), (sender, parts)) = (unbounded(), unbounded());
    let chunks = vec![Chunk { id: ChunkId::Content([0; 16]), length: 100_000 }];
    let part = |alike| Part { order: 1, from: Within::default(), alike };
    sender.send(part(Some(Alike { pieces: 1, chunks, ..Alike::default() }))).unwrap();
    sender.send(part(None)).unwrap();
    let mut matcher = Matcher::new(0, Box::new((orders, parts)));
    let (mut steps, block) = (Vec::new(), vec![7; 1 << 20]);
    for _ in 0..FRUITLESS_BYTES / (1 << 20) + 8 {
        matcher.feed(Block::copy_of(&block), &mut steps);
    }
    assert!(matches!(matcher.mode, Mode::Vain));
    matcher.flush(&mut steps);
    let mut at = 0;
    for step in steps {
        let Step::Data { offset, block } = step else { panic!("{step:?}") };
        assert_eq!(offset, at);
        at += block.data().len() as u64;
    }
    assert_eq!(at, FRUITLESS_BYTES + (8 << 20));
}

#[derive(Debug, Clone)]
enum Edit {
    Insert(usize, usize),
    Remove(usize, usize),
    Replace(usize, usize),
    Move(usize, usize, usize),
}

fn edit() -> impl Strategy<Value = Edit> {
    let (at, length) = (0_usize..(6 << 20), 0_usize..(1 << 20));
    prop_oneof![
        (at.clone(), length.clone()).prop_map(|(at, length)| Edit::Insert(at, length)),
        (at.clone(), length.clone()).prop_map(|(at, length)| Edit::Remove(at, length)),
        (at.clone(), length.clone()).prop_map(|(at, length)| Edit::Replace(at, length)),
        (at.clone(), length, at).prop_map(|(at, length, to)| Edit::Move(at, length, to)),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]
    #[test]
    fn whatever_was_edited_the_target_makes_the_same_file(
        edits in prop::collection::vec(edit(), 0..6), block in 1_000_usize..2_000_000, each in 1_usize..40, seed in any::<u64>(),
        sums in any::<bool>(),
    ) {
        let old = noise(9, 6 << 20);
        let mut new = old.clone();
        for edit in edits {
            let within = |at: usize, new: &Vec<u8>| at.min(new.len());
            match edit {
                Edit::Insert(at, length) => {
                    let at = within(at, &new);
                    new.splice(at..at, noise(seed, length));
                }
                Edit::Remove(at, length) => {
                    let at = within(at, &new);
                    let end = within(at + length, &new);
                    new.drain(at..end);
                }
                Edit::Replace(at, length) => {
                    let at = within(at, &new);
                    let end = within(at + length, &new);
                    new.splice(at..end, noise(seed ^ 1, end - at));
                }
                Edit::Move(at, length, to) => {
                    let at = within(at, &new);
                    let end = within(at + length, &new);
                    let moved: Vec<u8> = new.drain(at..end).collect();
                    let to = within(to, &new);
                    new.splice(to..to, moved);
                }
            }
        }
        let other = noise(8, 3 << 20);
        for there in [&[&old[..]][..], &[&other, &old]] {
            prop_assert!(made(there, &new, block, each, sums).0 == new);
        }
    }
}

/// A chunk that a target may say it has: one of the file, its length right or wrong, or one of nothing.
fn listed() -> impl Strategy<Value = (usize, u8, u32)> {
    (0_usize..40, 0_u8..4, 1_u32..chunks::MAX_BYTES as u32)
}

/// Its order, piece, offset, kind, what it lists, and where it goes on.
type Said = (u32, u32, u64, u8, Vec<(usize, u8, u32)>, Option<u64>);

/// What a target may say, all of it wrong; as it is read from the wire.
fn wrong(said: Said, own: &[Chunk]) -> Option<Part> {
    let (order, piece, offset, kind, listed, next) = said;
    let cut = [Cut::ByContent, Cut::ByLength, Cut::BySum][usize::from(kind % 3)];
    let chunks = listed.into_iter().map(|(at, how, length)| {
        let mut chunk = own[at % own.len()];
        if how & 1 != 0 {
            chunk.length = length;
        }
        if how & 2 != 0 {
            chunk.id = ChunkId::Content([at as u8; 16]);
        }
        if cut == Cut::BySum {
            chunk = Chunk { id: ChunkId::Sum(length), length: BLOCK_LENGTH as u32 };
        }
        chunk
    });
    let chunks = chunks.collect();
    let there = (kind & 8 != 0).then_some(Beginning { length: offset, digest: Default::default() });
    let alike = Alike { pieces: u32::from(kind) % (PIECES_MAX + 1), cut, next, chunks, same: kind & 16 != 0, there };
    let mut said = Vec::new();
    let alike = (kind & 32 == 0).then_some(alike);
    put_part(&mut said, &Part { order, from: Within { piece, offset }, alike });
    read_part(Fields(&said)).ok()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    /// What is made of it may be wrong, which its SHA-256 shows; but it is all of the file, once, and nothing of it is asked of the target
    /// that cannot be counted.
    #[test]
    fn h42_whatever_the_other_end_says_all_of_a_file_is_decided_once(
        said in prop::collection::vec(
            (0_u32..4, 0_u32..5, prop_oneof![0_u64..8 << 20, any::<u64>()], any::<u8>(), prop::collection::vec(listed(), 0..60),
             prop::option::of(prop_oneof![0_u64..8 << 20, any::<u64>()])),
            0..12,
        ),
        block in 10_000_usize..2_000_000, in_place in any::<bool>(), hole in prop::option::of(1_u64..1 << 40),
    ) {
        let new = noise(5, 5 << 20);
        let (mut own, mut at) = (Vec::new(), 0);
        while let Some(chunk) = Chunk::first_of(&new[at..]) {
            own.push(chunk);
            own.push(Chunk::of(&new[at..][..BLOCK_LENGTH.min(new.len() - at)]));
            at += chunk.length as usize;
            if at >= new.len() {
                break;
            }
        }
        let ((orders, _ordered), (sender, parts)) = (unbounded(), unbounded());
        let read: Vec<Part> = said.into_iter().filter_map(|said| wrong(said, &own)).collect();
        read.into_iter().for_each(|part| sender.send(part).unwrap());
        drop(sender);
        let mut matcher = Matcher::new(0, Box::new((orders, parts)));
        if in_place {
            matcher.expect_in_place();
        }
        let (mut steps, mut skipped) = (Vec::new(), None);
        for (number, bytes) in new.chunks(block).enumerate() {
            if let Some(hole) = hole.filter(|_| number == 1) {
                matcher.skip(hole, &mut steps);
                skipped = Some((block as u64, hole));
            }
            matcher.feed(Block::copy_of(bytes), &mut steps);
        }
        matcher.flush(&mut steps);
        let (mut at, mut fed) = (0, 0_usize);
        for step in steps {
            if let Some((_, hole)) = skipped.filter(|(offset, _)| *offset == at) {
                at += hole;
                skipped = None;
            }
            match step {
                Step::Copy { offset, length, from } => {
                    prop_assert_eq!(offset, at);
                    prop_assert!(length > 0 && length <= COPY_MAX && from.offset.checked_add(length).is_some());
                    at += length;
                    fed += length as usize;
                }
                Step::Data { offset, block } => {
                    prop_assert_eq!(offset, at);
                    prop_assert!(block.data() == &new[fed..][..block.data().len()]);
                    at += block.data().len() as u64;
                    fed += block.data().len();
                }
            }
        }
        prop_assert_eq!(fed, new.len());
    }
}
