//! Several runs over one source, at every speed and with every accident.

use std::fs::File;
use std::io::Write as _;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::time::Duration;

use proptest::prelude::{any, prop, proptest};
use proptest::test_runner::Config;
use sha2::{Digest as _, Sha256};

use super::*;
use crate::endpoint::{BLOCK_BYTES, Block, Fetch, Produced, SMALL_FILE_BYTES};
use crate::monitor::Silent;
use crate::root::{Fingerprint, Metadata};

const BLOCK: u64 = BLOCK_BYTES as u64;

fn sha256(data: &[u8]) -> Digest {
    Digest(Sha256::digest(data).into())
}

fn noise(size: usize) -> Vec<u8> {
    (0..size as u64).map(|at| ((at * 2_654_435_761) >> 13) as u8).collect()
}

/// Files of a source, which are old enough to be shared.
fn files(at: &Path, files: &[(&str, &[u8])]) {
    for (name, content) in files {
        std::fs::write(at.join(name), content).unwrap();
    }
    settle();
}

fn settle() {
    std::thread::sleep(crate::scan::cache::GRANULARITY * 2);
}

fn view(shared: &SharedSource, at: &Path) -> View {
    shared.view(LocalSource::new(at, None).unwrap(), Instant::now())
}

fn scanned(view: &View) -> Arc<Tree> {
    Arc::new(view.scan(&ScanOptions::default(), &Silent::default()).unwrap().tree)
}

fn identity(path: &Path) -> Fingerprint {
    Fingerprint::from(&Metadata::of(&File::open(path).unwrap()).unwrap())
}

/// What a run has been given of one file so far.
struct Taker<'a> {
    reader: Box<dyn Reader + 'a>,
    from: u64,
    content: Vec<u8>,
    /// Its blocks, which keep their places in memory.
    blocks: Vec<Block>,
    digest: Option<Digest>,
    same: bool,
    failed: Option<(String, bool)>,
}

impl<'a> Taker<'a> {
    fn new(view: &'a View, tree: &Arc<Tree>, fetch: Fetch) -> Taker<'a> {
        let mut reader = view.reader(Arc::clone(tree)).unwrap();
        reader.push(fetch);
        let (content, blocks) = (Vec::new(), Vec::new());
        Taker { reader, from: fetch.from, content, blocks, digest: None, same: false, failed: None }
    }

    fn whole(view: &'a View, tree: &Arc<Tree>) -> Taker<'a> {
        Taker::new(view, tree, Fetch::of(0))
    }

    /// Takes a piece; false at the end.
    fn step(&mut self) -> bool {
        match self.reader.next().unwrap() {
            None => return false,
            Some(Produced::Whole { block, digest, .. }) => {
                self.content.extend_from_slice(block.data());
                self.blocks.push(block);
                self.digest = Some(digest);
            }
            Some(Produced::Data { offset, block, .. }) => {
                assert_eq!(offset, self.from + self.content.len() as u64);
                self.content.extend_from_slice(block.data());
                self.blocks.push(block);
            }
            Some(Produced::Hole { offset, length, .. }) => {
                assert_eq!(offset, self.from + self.content.len() as u64);
                self.content.resize(self.content.len() + length as usize, 0);
            }
            Some(Produced::End { digest, .. }) => self.digest = Some(digest),
            Some(Produced::Same { digest, .. }) => (self.digest, self.same) = (Some(digest), true),
            Some(Produced::Failed { message, retry, .. }) => self.failed = Some((message, retry)),
            Some(Produced::Copy { .. }) => panic!("nobody compares"),
        }
        true
    }

    fn rest(mut self) -> Self {
        while self.step() {}
        self
    }

    /// Where its blocks lie.
    fn places(&self) -> Vec<*const u8> {
        self.blocks.iter().map(|block| block.data().as_ptr()).collect()
    }

    #[track_caller]
    fn has(&self, data: &[u8]) {
        assert_eq!((&self.failed, self.digest), (&None, Some(sha256(data))));
        assert!(self.content == data[self.from as usize..]);
    }
}

#[test]
fn what_one_has_read_the_others_take_from_memory_however_slow_they_are() {
    let at = tempfile::tempdir().unwrap();
    let data = noise(5 * BLOCK_BYTES + 77);
    files(at.path(), &[("f", &data)]);
    let shared = SharedSource::new(3);
    let views = [(); 3].map(|()| view(&shared, at.path()));
    let tree = scanned(&views[0]);
    let [mut slow, mut middle, fast] = [0, 1, 2].map(|number| Taker::whole(&views[number], &tree));
    assert!(slow.step());
    let fast = fast.rest();
    assert!(middle.step() && middle.step() && slow.step());
    let (slow, middle) = (slow.rest(), middle.rest());
    for taker in [&slow, &middle, &fast] {
        taker.has(&data);
    }
    assert!(slow.places() == fast.places() && middle.places() == fast.places(), "each block lies in memory once");
    assert_eq!(shared.common.flows.kept_bytes(), 0, "what all have had is not kept");
}

#[test]
fn small_files_are_read_once_and_a_run_that_is_over_is_not_waited_for() {
    let at = tempfile::tempdir().unwrap();
    files(at.path(), &[("a", b"content"), ("b", b"")]);
    let shared = SharedSource::new(3);
    let [first, second, third] = [(); 3].map(|()| view(&shared, at.path()));
    let tree = scanned(&first);
    for (index, content) in [(0, &b"content"[..]), (1, b"")] {
        let fetch = Fetch::of(index);
        let takers = [&first, &second, &third].map(|view| Taker::new(view, &tree, fetch).rest());
        takers.iter().for_each(|taker| taker.has(content));
        assert!(takers.iter().all(|taker| taker.places() == takers[0].places()));
        assert_eq!(shared.common.flows.kept_bytes(), 0);
    }
    for (index, content) in [(0, &b"content"[..]), (1, b"")] {
        let fetch = Fetch::of(index);
        let same = Taker::new(&first, &tree, Fetch { unless: Some(sha256(content)), ..fetch }).rest();
        assert!(same.same && same.content.is_empty());
        Taker::new(&first, &tree, Fetch { unless: Some(sha256(b"other")), ..fetch }).rest().has(content);
    }
    assert!(shared.common.flows.kept_bytes() > 0, "the others may still want it");
    drop((second, third));
    let fetch = Fetch::of(0);
    Taker::new(&first, &tree, fetch).rest().has(b"content");
    drop(first);
    assert_eq!(shared.common.flows.kept_bytes(), 0, "nobody is there who could want anything");
}

#[test]
fn one_that_dies_in_the_middle_harms_nobody_and_one_that_comes_late_need_not_hash() {
    let at = tempfile::tempdir().unwrap();
    let data = noise(4 * BLOCK_BYTES);
    files(at.path(), &[("f", &data)]);
    let shared = SharedSource::new(3);
    let views = [(); 3].map(|()| view(&shared, at.path()));
    let tree = scanned(&views[0]);
    let mut dies = Taker::whole(&views[0], &tree);
    let mut lives = Taker::whole(&views[1], &tree);
    assert!(lives.step() && dies.step() && dies.step() && dies.step());
    drop(dies);
    lives.rest().has(&data);
    Taker::whole(&views[2], &tree).rest().has(&data);
    // What is known of the file is believed; by whoever found that it was wrong it is not.
    let shared = SharedSource::new(2);
    let views = [(); 2].map(|()| view(&shared, at.path()));
    shared.common.flows.learn(identity(&at.path().join("f")), Digest([7; 32]));
    let fetch = Fetch::of(0);
    let mut late = Taker::new(&views[0], &tree, fetch);
    while late.step() {}
    assert!(late.digest == Some(Digest([7; 32])) && late.content == data);
    late.reader.push(fetch);
    late.content.clear();
    late.rest().has(&data);
}

#[test]
fn h36_a_file_that_changes_while_it_is_read_fails_in_every_run() {
    type Edit = fn(&File);
    let edits: [Edit; 3] = [
        |file| file.write_all_at(b"y", 5).unwrap(),
        |file| file.set_len(BLOCK + 1).unwrap(),
        |file| file.write_all_at(b"z", 6 * BLOCK).unwrap(),
    ];
    for (number, edit) in edits.into_iter().enumerate() {
        let at = tempfile::tempdir().unwrap();
        files(at.path(), &[("f", &noise(4 * BLOCK_BYTES))]);
        let shared = SharedSource::new(4);
        let views = [(); 4].map(|()| view(&shared, at.path()));
        let tree = scanned(&views[0]);
        let [mut ahead, mut behind, mut done, late] = [0, 1, 2, 3].map(|number| Taker::whole(&views[number], &tree));
        assert!(behind.step() && ahead.step() && ahead.step() && ahead.step());
        // It has had everything but the end when the file is changed.
        (0..4).for_each(|_| assert!(done.step()));
        settle();
        edit(&File::options().write(true).open(at.path().join("f")).unwrap());
        for taker in [ahead, behind, done, late].map(Taker::rest) {
            assert!(matches!(&taker.failed, Some((message, true)) if message.contains("changed")), "{number}");
            assert_eq!(taker.digest, None);
        }
        assert!(shared.common.flows.digest(identity(&at.path().join("f"))).is_none());
    }
}

#[test]
fn no_more_is_kept_than_may_be_and_who_falls_behind_reads_from_the_disk() {
    let at = tempfile::tempdir().unwrap();
    let (first, second) = (noise(12 * BLOCK_BYTES), noise(9 * BLOCK_BYTES + 5));
    files(at.path(), &[("a", &first), ("b", &second), ("c", &first)]);
    let most = 7 * BLOCK_BYTES;
    let shared = SharedSource::keeping(3, most);
    let views = [(); 3].map(|()| view(&shared, at.path()));
    let tree = scanned(&views[0]);
    // A run that hangs at another file.
    let mut hangs = Taker::new(&views[2], &tree, Fetch::of(2));
    assert!(hangs.step());
    for (index, data) in [(0, &first), (1, &second)] {
        let fetch = Fetch::of(index);
        let mut ahead = Taker::new(&views[0], &tree, fetch);
        let mut behind = Taker::new(&views[1], &tree, fetch);
        while ahead.step() {
            assert!(shared.common.flows.kept_bytes() <= most);
        }
        assert!(behind.step());
        let behind = behind.rest();
        assert!(shared.common.flows.kept_bytes() <= most);
        ahead.has(data);
        behind.has(data);
        let in_common = behind.places().iter().filter(|place| ahead.places().contains(place)).count();
        assert!((1..behind.blocks.len()).contains(&in_common), "{in_common} of {}", behind.blocks.len());
    }
    hangs.rest().has(&first);
}

#[test]
fn two_that_are_behind_share_what_they_read() {
    let at = tempfile::tempdir().unwrap();
    let data = noise(6 * BLOCK_BYTES);
    files(at.path(), &[("f", &data)]);
    let shared = SharedSource::keeping(3, 5 * BLOCK_BYTES);
    let views = [(); 3].map(|()| view(&shared, at.path()));
    let tree = scanned(&views[0]);
    let [fast, mut one, mut other] = [0, 1, 2].map(|number| Taker::whole(&views[number], &tree));
    assert!(one.step() && other.step());
    fast.rest().has(&data);
    while one.step() && other.step() {}
    let (one, other) = (one.rest(), other.rest());
    one.has(&data);
    other.has(&data);
    assert_eq!(one.places(), other.places());
}

#[test]
fn a_comparison_is_made_once_and_what_differs_is_sent_from_the_start() {
    let at = tempfile::tempdir().unwrap();
    let data = noise(3 * BLOCK_BYTES + 1);
    files(at.path(), &[("f", &data)]);
    let shared = SharedSource::new(2);
    let views = [(); 2].map(|()| view(&shared, at.path()));
    let tree = scanned(&views[0]);
    let fetch = |from, unless| Fetch { from, unless, ..Fetch::of(0) };
    let same = Taker::new(&views[0], &tree, fetch(0, Some(sha256(&data)))).rest();
    assert!(same.same && same.content.is_empty() && same.digest == Some(sha256(&data)));
    let other = Taker::new(&views[1], &tree, fetch(0, Some(sha256(b"other")))).rest();
    other.has(&data);
    // One that was changed since it was hashed is not the same.
    let views = [(); 2].map(|()| view(&shared, at.path()));
    File::options().append(true).open(at.path().join("f")).unwrap().write_all(b"x").unwrap();
    let changed = Taker::new(&views[0], &tree, fetch(0, Some(sha256(&data)))).rest();
    assert!(matches!(changed.failed, Some((_, true))) && !changed.same);
}

#[test]
fn one_that_is_alone_keeps_nothing() {
    let at = tempfile::tempdir().unwrap();
    let data = noise(3 * BLOCK_BYTES);
    files(at.path(), &[("f", &data)]);
    for targets in [1, 2] {
        let shared = SharedSource::new(targets);
        let only = view(&shared, at.path());
        let mut taker = Taker::whole(&only, &scanned(&only));
        while taker.step() {
            assert_eq!(shared.common.flows.kept_bytes(), 0, "nobody else is there");
        }
        taker.has(&data);
    }
}

#[test]
fn runs_that_begin_together_share_a_scan_and_none_takes_one_that_is_too_old() {
    let at = tempfile::tempdir().unwrap();
    std::fs::write(at.path().join("a"), "a").unwrap();
    let shared = SharedSource::new(4);
    let ready = Instant::now();
    let of = |ready| shared.view(LocalSource::new(at.path(), None).unwrap(), ready);
    let (first, second, third) = (of(ready), of(ready), of(ready));
    let names = |view: &View, options: &ScanOptions| {
        let tree = view.scan(options, &Silent::default()).unwrap().tree;
        tree.entries().iter().map(|entry| entry.path.to_string()).collect::<Vec<_>>()
    };
    let usual = ScanOptions::default();
    assert_eq!(names(&first, &usual), ["a"]);
    std::fs::write(at.path().join("b"), "b").unwrap();
    assert_eq!(names(&second, &usual), ["a"], "what became ready before the scan is served by it");
    let reader = second.reader(scanned(&second)).unwrap();
    drop(reader);
    let mut other = usual.clone();
    other.filter.rules.push("c".into());
    assert_eq!(names(&third, &other), ["a", "b"], "another filter is another scan");
    let later = of(Instant::now());
    assert_eq!(names(&later, &usual), ["a", "b"], "what became ready after the scan began is not");
    // Nor does anybody take a scan of another directory, or one that is over for long.
    let elsewhere = tempfile::tempdir().unwrap();
    let there = shared.view(LocalSource::new(elsewhere.path(), None).unwrap(), ready);
    assert!(names(&there, &usual).is_empty());
    std::fs::write(at.path().join("c"), "c").unwrap();
    std::thread::sleep(Duration::from_millis(550));
    assert_eq!(names(&of(ready), &usual), ["a", "b", "c"]);
}

#[test]
fn digests_are_stored_once_for_all_runs() {
    let (at, state) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    files(at.path(), &[("a", b"a"), ("b", b"b")]);
    let shared = SharedSource::new(2);
    let ready = Instant::now();
    let of = || shared.view(LocalSource::new(at.path(), Some(state.path())).unwrap(), ready);
    let (first, second) = (of(), of());
    let (tree, again) = (scanned(&first), scanned(&second));
    first.remember(&tree, &[(0, sha256(b"a"))]);
    let databases = || std::fs::read_dir(state.path()).unwrap().map(|entry| entry.unwrap().path()).collect::<Vec<_>>();
    assert_eq!(databases().len(), 1);
    let known = |view: &View| {
        let tree = view.scan(&ScanOptions::default(), &Silent::default()).unwrap().tree;
        tree.entries().iter().map(|entry| entry.file().unwrap().1.is_some()).collect::<Vec<_>>()
    };
    let later = || shared.view(LocalSource::new(at.path(), Some(state.path())).unwrap(), Instant::now());
    assert_eq!(known(&later()), [true, false]);
    std::fs::remove_file(&databases()[0]).unwrap();
    second.remember(&again, &[(0, sha256(b"a"))]);
    assert!(databases().is_empty(), "there was nothing new to store");
    second.remember(&again, &[(0, sha256(b"a")), (1, sha256(b"b"))]);
    assert_eq!(known(&later()), [false, true]);
}

#[derive(Debug, Clone)]
struct Run {
    from: u64,
    unless: Option<bool>,
    dies_after: Option<usize>,
}

/// A file with holes, as the places of its blocks say.
fn sparse(path: &Path, size: usize, holes: u16) -> Vec<u8> {
    let mut data = noise(size);
    let file = File::create(path).unwrap();
    file.set_len(size as u64).unwrap();
    for (number, block) in data.chunks_mut(BLOCK_BYTES / 2).enumerate() {
        match holes & (1 << (number % 16)) {
            0 => file.write_all_at(block, (number * BLOCK_BYTES / 2) as u64).unwrap(),
            _ => block.fill(0),
        }
    }
    data
}

proptest! {
    #![proptest_config(Config { cases: 60, failure_persistence: None, ..Config::default() })]

    #[test]
    fn every_run_gets_what_the_file_holds_in_whatever_order_they_read(
        size in SMALL_FILE_BYTES as usize + 1..6 * BLOCK_BYTES,
        holes in any::<u16>(),
        kept in prop::sample::select(vec![0, 2 * BLOCK_BYTES, 5 * BLOCK_BYTES, 64 * BLOCK_BYTES]),
        runs in prop::collection::vec((0..4_u8, any::<u32>(), prop::option::of(any::<bool>()), prop::option::of(0..8_usize)), 1..5),
        order in prop::collection::vec(any::<prop::sample::Index>(), 80),
    ) {
        let at = tempfile::tempdir().unwrap();
        let data = sparse(&at.path().join("f"), size, holes);
        settle();
        let shared = SharedSource::keeping(4, kept);
        let runs: Vec<Run> = runs.into_iter().map(|(where_, at, unless, dies_after)| {
            let from = match where_ { 0 => u64::from(at) % (size as u64 + 1), 1 => u64::from(at) % size as u64 / BLOCK * BLOCK, _ => 0 };
            Run { from, unless: unless.filter(|_| from == 0), dies_after }
        }).collect();
        let views: Vec<View> = runs.iter().map(|_| view(&shared, at.path())).collect();
        let tree = scanned(&views[0]);
        let mut takers: Vec<Option<Taker<'_>>> = runs.iter().zip(&views).map(|(run, view)| {
            let unless = run.unless.map(|same| sha256(if same { &data } else { b"other" }));
            Some(Taker::new(view, &tree, Fetch { from: run.from, unless, ..Fetch::of(0) }))
        }).collect();
        let mut steps = vec![0; runs.len()];
        for index in order {
            let number = index.index(runs.len());
            steps[number] += 1;
            if runs[number].dies_after.is_some_and(|most| steps[number] > most) {
                takers[number] = None;
            } else if let Some(taker) = &mut takers[number] {
                taker.step();
            }
            assert!(shared.common.flows.kept_bytes() <= kept);
        }
        for (run, taker) in runs.iter().zip(takers) {
            let Some(taker) = taker.map(Taker::rest) else { continue };
            match run.unless {
                Some(true) => assert!(taker.same && taker.content.is_empty()),
                _ => taker.has(&data),
            }
        }
        drop(views);
        assert_eq!(shared.common.flows.kept_bytes(), 0);
    }
}

#[test]
fn many_threads_read_at_once_and_all_get_the_same() {
    let at = tempfile::tempdir().unwrap();
    let large: Vec<Vec<u8>> = (0..3).map(|number| noise((3 + number) * BLOCK_BYTES + number)).collect();
    for (number, data) in large.iter().enumerate() {
        std::fs::write(at.path().join(number.to_string()), data).unwrap();
    }
    let small: Vec<Vec<u8>> = (0..200).map(|number| noise(number * 97)).collect();
    for (number, data) in small.iter().enumerate() {
        std::fs::write(at.path().join(format!("s{number:03}")), data).unwrap();
    }
    settle();
    let shared = SharedSource::keeping(5, 8 * BLOCK_BYTES);
    let views = [(); 5].map(|()| view(&shared, at.path()));
    let tree = scanned(&views[0]);
    std::thread::scope(|scope| {
        for (number, view) in views.iter().enumerate() {
            let (tree, large, small) = (&tree, &large, &small);
            scope.spawn(move || {
                for turn in 0..tree.entries().len() {
                    // Not all in the same order.
                    let index = (turn + number * 7) % tree.entries().len();
                    let data = large.get(index).unwrap_or_else(|| &small[index - large.len()]);
                    let fetch = Fetch::of(index as u32);
                    Taker::new(view, tree, fetch).rest().has(data);
                }
            });
        }
    });
}
