//! The machine by tables, and by random steps against what must hold.

use super::*;
use crate::config::Layout;

fn rel(path: &str) -> RelPath {
    RelPath::new(path).unwrap()
}

fn set(paths: &[&str]) -> BTreeSet<RelPath> {
    paths.iter().map(|path| rel(path)).collect()
}

const SETTLE: Duration = Duration::from_secs(2);

/// A machine with a clock of its own, and what it was told when it asks.
struct Table {
    settle: Settle,
    now: Instant,
    held: Held,
    complete: bool,
    names: Option<RelPath>,
    asked: Vec<Ask>,
}

impl Table {
    fn new(settle: Duration, ready: WhenReady) -> Table {
        let rules = Rules::new(settle, ready, Some("ckpt-*/"), &["*.done".into()]).unwrap();
        let rules = rules.growing(&["*.log".into()]).unwrap();
        let (settle, now) = (Settle::new(rules), Instant::now());
        Table { settle, now, held: Held::No, complete: true, names: None, asked: Vec::new() }
    }

    fn settled() -> Table {
        Table::new(SETTLE, WhenReady::Settled)
    }

    fn written(&mut self, path: &str) {
        self.settle.written(&rel(path), self.now);
    }

    fn closed(&mut self, path: &str) {
        self.settle.closed(&rel(path), self.now);
    }

    fn touched(&mut self, path: &str) {
        self.settle.touched(&rel(path), false, self.now);
    }

    fn directory(&mut self, path: &str) {
        self.settle.touched(&rel(path), true, self.now);
    }

    fn gone(&mut self, path: &str) {
        self.settle.gone(&rel(path), self.now);
    }

    fn moved(&mut self, from: &str, to: &str, directory: bool) {
        self.settle.moved(&rel(from), &rel(to), directory, self.now);
    }

    /// What is ready so much later.
    fn after(&mut self, milliseconds: u64) -> BTreeSet<RelPath> {
        self.now += Duration::from_millis(milliseconds);
        for round in 0.. {
            let asks = self.settle.due(self.now);
            if asks.is_empty() {
                break;
            }
            assert!(round < 10, "it asks for ever: {asks:?}");
            for ask in asks {
                match &ask {
                    Ask::Held(paths) => paths.iter().for_each(|path| self.settle.held(path, self.held, self.now)),
                    Ask::Complete(unit) => self.settle.complete(unit, self.complete, self.now),
                    Ask::Names(pointer) => self.settle.names(pointer, self.names.clone(), self.now),
                }
                self.asked.push(ask);
            }
        }
        self.settle.take()
    }

    fn unfinished(&self) -> BTreeSet<RelPath> {
        self.settle.unfinished().cloned().collect()
    }
}

#[test]
fn what_only_grows_is_ready_every_so_often_however_it_is_written() {
    let mut table = Table::settled();
    table.held = Held::Yes;
    for round in 0..3 {
        // Written every half second, and never closed.
        let mut ready = Vec::new();
        for _ in 0..5 {
            table.written("run.log");
            assert!(table.unfinished().is_empty() && !table.settle.is_in_hands(&rel("run.log")));
            ready.push(table.after(500));
        }
        assert_eq!(ready.iter().filter(|ready| **ready == set(&["run.log"])).count(), 1, "{round}: {ready:?}");
        assert_eq!(ready.iter().filter(|ready| ready.is_empty()).count(), 4, "{round}: {ready:?}");
        table.after(2000);
    }
    assert!(table.asked.is_empty());
    // In a unit it is a part of that, and under a temporary name it waits for its own.
    table.written("ckpt-1/run.log");
    table.written("x.tmp/run.log");
    assert!(table.after(10_000).is_empty());
    table.settle.found(&rel("other.log"), false, Duration::ZERO, true, table.now);
    assert_eq!(table.after(2000), set(&["other.log"]));
    table.written("gone.log");
    table.gone("gone.log");
    assert_eq!(table.after(2000), set(&["gone.log"]));
}

#[test]
fn a_file_is_ready_when_it_was_closed_and_left_alone() {
    let mut table = Table::settled();
    table.held = Held::Yes;
    table.written("a");
    assert_eq!(table.after(60_000), set(&[]), "it is still open");
    assert_eq!(table.unfinished(), set(&["a"]));
    table.closed("a");
    assert_eq!(table.after(1_999), set(&[]));
    table.written("a");
    table.closed("a");
    assert_eq!(table.after(1_999), set(&[]), "the time begins again");
    assert_eq!(table.after(1), set(&["a"]));
    assert_eq!(table.unfinished(), set(&[]));
    assert_eq!((table.after(60_000), table.settle.next()), (set(&[]), None), "nothing is due any more");
}

#[test]
fn without_a_time_to_settle_it_is_ready_at_its_close_or_rename() {
    let mut table = Table::new(Duration::ZERO, WhenReady::Settled);
    table.written("a");
    assert_eq!(table.after(0), set(&[]));
    table.closed("a");
    table.touched("link");
    assert_eq!(table.after(0), set(&["a", "link"]));
    table.written("b.tmp");
    table.closed("b.tmp");
    assert_eq!(table.after(0), set(&[]));
    table.moved("b.tmp", "b", false);
    assert_eq!(table.after(0), set(&["b"]), "nobody is told of the temporary name");
    table.moved("b", "c", false);
    assert_eq!(table.after(0), set(&["b", "c"]), "both names of a move");
    table.gone("c");
    assert_eq!(table.after(0), set(&["c"]));
}

#[test]
fn what_is_open_stays_open_under_its_new_name() {
    let mut table = Table::settled();
    table.held = Held::Yes;
    table.written("d/a.tmp");
    table.moved("d/a.tmp", "d/a", false);
    assert_eq!(table.after(5_000), set(&[]));
    table.moved("d", "e", true);
    assert_eq!(table.after(5_000), set(&["d"]), "only the old name is finished with");
    table.closed("e/a");
    assert_eq!(table.after(2_000), set(&["e/a"]));
}

#[test]
fn who_has_a_file_open_is_asked_where_no_close_was_seen() {
    // truncate(2) tells of a change and never of a close.
    let mut table = Table::settled();
    table.written("a");
    assert_eq!(table.after(2_000), set(&["a"]));
    assert_eq!(table.asked, [Ask::Held(vec![rel("a")])]);
    // Where it cannot be told, only long silence counts.
    table.held = Held::Untold;
    table.written("a");
    assert_eq!(table.after(599_000), set(&[]));
    assert_eq!(table.after(61_000), set(&["a"]));
    // What was only found may have been closed long ago.
    table.settle.found_new(&rel("d/f"), true, false, table.now);
    assert_eq!(table.after(2_000), set(&["d/f"]));
    table.held = Held::Yes;
    table.settle.found_new(&rel("d/f"), true, false, table.now);
    assert_eq!(table.after(10_000), set(&[]));
    table.closed("d/f");
    assert_eq!(table.after(2_000), set(&["d/f"]));
}

#[test]
fn a_directory_goes_with_what_is_in_it_or_alone_when_it_is_empty() {
    let mut table = Table::settled();
    table.directory("d");
    assert_eq!(table.after(2_000), set(&["d"]));
    table.directory("d");
    table.directory("d/e");
    table.written("d/e/f");
    table.closed("d/e/f");
    table.written("d/e/g");
    table.held = Held::Yes;
    assert_eq!(table.after(2_000), set(&["d/e/f"]), "the directory would take what is not finished along");
    assert_eq!(table.unfinished(), set(&["d/e/g"]));
    table.directory("x");
    table.written("x/a.tmp");
    assert_eq!(table.after(2_000), set(&[]));
    assert_eq!(table.unfinished(), set(&["d/e/g", "x/a.tmp"]), "the directory is not held back for it");
    table.gone("x/a.tmp");
    assert_eq!(table.after(0), set(&["x"]));
}

#[test]
fn a_unit_is_one_path_and_ready_when_nothing_in_it_changes() {
    let mut table = Table::settled();
    table.directory("ckpt-1");
    table.written("ckpt-1/a");
    table.closed("ckpt-1/a");
    table.after(1_500);
    table.written("ckpt-1/d/b");
    table.held = Held::Yes;
    assert_eq!(table.after(10_000), set(&[]), "b is open");
    table.closed("ckpt-1/d/b");
    table.written("ckpt-1/c.tmp");
    table.closed("ckpt-1/c.tmp");
    assert_eq!(table.after(10_000), set(&[]), "it holds something temporary");
    table.moved("ckpt-1/c.tmp", "ckpt-1/c", false);
    assert_eq!(table.after(1_999), set(&[]));
    assert_eq!(table.after(1), set(&["ckpt-1"]));
    table.gone("ckpt-1/a");
    assert_eq!(table.after(2_000), set(&["ckpt-1"]), "what goes from a unit changes it");
    table.gone("ckpt-1");
    assert_eq!(table.after(2_000), set(&["ckpt-1"]));
}

#[test]
fn a_unit_that_gets_its_name_at_the_end_and_one_that_is_marked_as_unfinished() {
    let mut table = Table::settled();
    table.written("tmp-checkpoint-7/w");
    table.closed("tmp-checkpoint-7/w");
    assert_eq!(table.after(60_000), set(&[]));
    assert_eq!(table.unfinished(), set(&["tmp-checkpoint-7"]));
    table.moved("tmp-checkpoint-7", "ckpt-7", true);
    assert_eq!(table.after(2_000), set(&["ckpt-7"]));
    table.touched("ckpt-8-unfinished");
    table.closed("ckpt-8/w");
    table.touched("m-unfinished");
    table.closed("m.ckpt");
    assert_eq!(table.after(60_000), set(&[]));
    table.gone("ckpt-8-unfinished");
    table.gone("m-unfinished");
    assert_eq!(table.after(0), set(&["ckpt-8", "m.ckpt"]));
}

#[test]
fn a_marker_makes_a_unit_ready_at_once_and_without_it_is_not() {
    let mut table = Table::new(SETTLE, WhenReady::Marker("_SUCCESS".into()));
    table.complete = false;
    table.closed("ckpt-1/a");
    assert_eq!(table.after(60_000), set(&[]));
    assert_eq!(table.unfinished(), set(&["ckpt-1"]));
    table.written("ckpt-1/b");
    table.written("ckpt-1/_SUCCESS");
    table.complete = true;
    table.held = Held::Yes;
    table.closed("ckpt-1/_SUCCESS");
    assert_eq!(table.after(0), set(&[]), "b is still open");
    table.closed("ckpt-1/b");
    table.closed("ckpt-1/_SUCCESS");
    assert_eq!(table.after(0), set(&["ckpt-1"]));
    // What changes after the marker is to be left alone.
    table.closed("ckpt-1/b");
    assert_eq!((table.after(1_999), table.after(1)), (set(&[]), set(&["ckpt-1"])));
    // A file of that name further down is none.
    table.complete = false;
    table.closed("ckpt-1/sub/_SUCCESS");
    assert_eq!(table.after(2_000), set(&[]));
}

#[test]
fn what_is_finished_of_a_unit_may_be_brought_before_the_unit_and_is_forgotten_with_it() {
    let mut table = Table::new(SETTLE, WhenReady::Marker("_SUCCESS".into()));
    (table.complete, table.held) = (false, Held::Yes);
    table.written("ckpt-1/a");
    table.written("ckpt-1/b");
    table.closed("ckpt-1/a");
    table.written("ckpt-1/c.tmp");
    table.closed("ckpt-1/c.tmp");
    table.closed("beside");
    table.touched("ckpt-1/latest");
    assert_eq!(table.after(1_999), set(&[]));
    assert!(table.settle.take_early().is_empty() && table.settle.is_file_in_hands(&rel("ckpt-1/a")));
    assert_eq!(table.after(1), set(&["beside"]));
    assert_eq!(table.settle.take_early(), set(&["ckpt-1/a"]), "what is open, temporary or a pointer waits");
    assert!(!table.settle.is_file_in_hands(&rel("ckpt-1/a")) && table.settle.is_file_in_hands(&rel("ckpt-1/b")));
    assert!(table.settle.is_in_hands(&rel("ckpt-1/a")), "its unit is not finished");
    table.moved("ckpt-1/c.tmp", "ckpt-1/c", false);
    table.closed("ckpt-1/b");
    table.written("ckpt-1/a");
    assert_eq!(table.after(2_000), set(&[]));
    assert_eq!(table.settle.take_early(), set(&["ckpt-1/b", "ckpt-1/c"]), "and what is written again");
    table.closed("ckpt-1/a");
    table.complete = true;
    table.closed("ckpt-1/_SUCCESS");
    assert_eq!(table.after(0), set(&["ckpt-1"]));
    assert_eq!(table.after(10_000), set(&[]));
    assert!(table.settle.take_early().is_empty(), "they went with their unit");
    assert_eq!(table.settle.next(), None);
}

#[test]
fn a_unit_by_its_layout_is_asked_for_again_when_it_or_a_pointer_changes() {
    let mut table = Table::new(SETTLE, WhenReady::Layout(Layout::Megatron));
    table.complete = false;
    table.closed("run/ckpt-1/a");
    table.closed("other/ckpt-1/a");
    assert_eq!(table.after(60_000), set(&[]));
    let asked = table.asked.len();
    assert_eq!((table.after(60_000), table.asked.len()), (set(&[]), asked), "nothing changed since");
    table.complete = true;
    table.names = Some(rel("run/ckpt-1"));
    table.closed("run/latest_checkpointed_iteration.txt");
    assert_eq!(table.after(0), set(&["run/ckpt-1"]), "the pointer comes after it");
    assert_eq!(table.after(2_000), set(&["run/latest_checkpointed_iteration.txt"]));
    assert_eq!(table.unfinished(), set(&["other/ckpt-1"]));
}

#[test]
fn a_pointer_waits_for_what_it_names() {
    let mut table = Table::settled();
    table.held = Held::Yes;
    table.names = Some(rel("ckpt-2"));
    table.written("ckpt-2/a");
    table.closed("latest");
    table.closed("x.done");
    assert_eq!(table.after(10_000), set(&[]));
    table.closed("ckpt-2/a");
    assert_eq!(table.after(2_000), set(&["ckpt-2", "latest", "x.done"]));
    // One that names nothing known waits only for units that are being written.
    table.names = None;
    table.written("ckpt-3/a");
    table.closed("latest");
    assert_eq!(table.after(10_000), set(&[]));
    table.closed("ckpt-3/a");
    assert_eq!(table.after(2_000), set(&["ckpt-3", "latest"]));
    table.names = Some(rel("d"));
    table.closed("d/latest");
    table.written("d/w");
    assert_eq!(table.after(3_000), set(&[]));
    table.closed("d/w");
    assert_eq!(table.after(2_000), set(&["d/latest", "d/w"]));
}

#[test]
fn what_is_found_by_looking_is_judged_by_its_age_and_by_who_holds_it() {
    let mut table = Table::settled();
    let found = |table: &mut Table, path: &str, age: u64, held: bool| {
        let age = Duration::from_millis(age);
        table.settle.found(&rel(path), false, age, held, table.now);
    };
    table.held = Held::Yes;
    found(&mut table, "old", 9_000, false);
    found(&mut table, "young", 1_000, false);
    found(&mut table, "held", 9_000, true);
    found(&mut table, "left.tmp", 99_000_000, false);
    found(&mut table, "ckpt-1/old", 9_000, false);
    found(&mut table, "ckpt-2/old", 9_000, false);
    found(&mut table, "ckpt-2/young", 500, false);
    table.after(0);
    assert_eq!(table.unfinished(), set(&["young", "held", "left.tmp", "ckpt-2"]));
    assert_eq!(table.after(1_000), set(&["young"]));
    table.closed("held");
    assert_eq!(table.after(2_000), set(&["ckpt-2", "held"]));
    // A unit that has to say so itself is asked for, however old it is.
    let mut table = Table::new(SETTLE, WhenReady::Marker("_SUCCESS".into()));
    table.complete = false;
    found(&mut table, "ckpt-1/old", 99_000_000, false);
    table.after(0);
    assert_eq!(table.unfinished(), set(&["ckpt-1"]));
}

#[test]
fn too_many_paths_are_given_up_but_not_units_and_what_is_open() {
    let mut table = Table::settled();
    table.written("open");
    table.closed("ckpt-1/a");
    assert!(!table.settle.shrink());
    for number in 0..=WAITING_MAX {
        table.settle.touched(&rel(&format!("d/{number}")), false, table.now);
    }
    assert!(table.settle.shrink());
    assert_eq!(table.unfinished(), set(&["open", "ckpt-1"]));
}

mod always {
    use super::*;
    use proptest::prelude::*;

    #[derive(Debug, Clone)]
    enum Step {
        Written(usize),
        Closed(usize),
        Gone(usize),
        Moved(usize, usize),
        Wait(u64),
    }

    const PATHS: [&str; 8] = ["a", "a.tmp", "d/b", "d/c", "ckpt-1/x", "ckpt-1/y.tmp", "ckpt-1/sub/z", "latest"];

    fn step() -> impl Strategy<Value = Step> {
        let path = 0..PATHS.len();
        prop_oneof![
            path.clone().prop_map(Step::Written),
            path.clone().prop_map(Step::Closed),
            path.clone().prop_map(Step::Gone),
            (path.clone(), path).prop_map(|(from, to)| Step::Moved(from, to)),
            (0_u64..3_000).prop_map(Step::Wait),
        ]
    }

    fn key(path: &str) -> RelPath {
        rel(if path.starts_with("ckpt-1/") { "ckpt-1" } else { path })
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]
        #[test]
        fn nothing_goes_out_while_it_is_open_or_early_and_everything_goes_out_in_the_end(
            steps in proptest::collection::vec(step(), 0..40),
        ) {
            let mut table = Table::settled();
            table.held = Held::Yes;
            let mut open: BTreeSet<&str> = BTreeSet::new();
            let mut changed: BTreeMap<RelPath, Instant> = BTreeMap::new();
            let mut owed: BTreeSet<RelPath> = BTreeSet::new();
            // What is gone does not go once more.
            let mut absent: BTreeSet<usize> = BTreeSet::new();
            for step in steps {
                let mut note = |path: &'static str, now: Instant| {
                    if path != "a.tmp" {
                        owed.insert(key(path));
                    }
                    changed.insert(key(path), now);
                };
                match step {
                    Step::Written(path) => {
                        absent.remove(&path);
                        table.written(PATHS[path]);
                        open.insert(PATHS[path]);
                        note(PATHS[path], table.now);
                    }
                    Step::Closed(path) => {
                        absent.remove(&path);
                        table.closed(PATHS[path]);
                        open.remove(PATHS[path]);
                        note(PATHS[path], table.now);
                    }
                    Step::Gone(path) if absent.insert(path) => {
                        table.gone(PATHS[path]);
                        open.remove(PATHS[path]);
                        note(PATHS[path], table.now);
                    }
                    Step::Moved(from, to) if from != to && absent.insert(from) => {
                        absent.remove(&to);
                        table.moved(PATHS[from], PATHS[to], false);
                        let was_open = open.remove(PATHS[from]);
                        open.remove(PATHS[to]);
                        if was_open {
                            open.insert(PATHS[to]);
                        }
                        note(PATHS[from], table.now);
                        note(PATHS[to], table.now);
                    }
                    Step::Moved(..) | Step::Gone(_) => {}
                    Step::Wait(milliseconds) => {
                        for path in table.after(milliseconds) {
                            prop_assert!(owed.remove(&path), "{path} was not owed");
                            prop_assert!(!open.iter().any(|open| key(open) == path), "{path} is open");
                            prop_assert!(changed[&path] + SETTLE <= table.now, "{path} is early");
                        }
                    }
                }
            }
            for path in PATHS {
                table.closed(path);
                owed.insert(key(path));
            }
            table.gone("a.tmp");
            table.gone("ckpt-1/y.tmp");
            owed.remove(&rel("a.tmp"));
            let out = table.after(10_000);
            prop_assert_eq!(out, owed);
            prop_assert_eq!(table.unfinished(), set(&[]));
            prop_assert_eq!(table.settle.next(), None);
        }
    }
}
