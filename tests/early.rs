//! What is staged of a unit before it is finished: nobody sees it, nothing loses it, and it is not sent again.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use lockstep::codec::CompressOptions;
use lockstep::endpoint::agent::{AgentTarget, Lanes};
use lockstep::endpoint::link::{Remote as _, Way};
use lockstep::endpoint::local::LocalSource;
use lockstep::filter::FilterSpec;
use lockstep::monitor::Silent;
use lockstep::policy::PolicySpec;
use lockstep::sync::{Options, SyncReport, run};

use crate::kit::pair::{Pair, damage, mode_of, options, rule};
use crate::pipes::Pipes;

const UNIT: [&str; 2] = ["checkpoint-1/a", "checkpoint-1/deep/b"];
const SIZE: usize = 3 << 20;

fn random(seed: u8) -> Vec<u8> {
    let mut state = u64::from(seed) + 1;
    (0..SIZE)
        .map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 56) as u8
        })
        .collect()
}

fn filtered(rules: &[&str], only: Option<&[&str]>) -> Options {
    let only = only.map(|paths| paths.iter().map(|path| path.as_bytes().to_vec()).collect());
    let filter = FilterSpec { rules: rules.iter().map(|&rule| rule.to_owned()).collect(), only };
    let mut options = options();
    options.begin.units = vec!["checkpoint-*/".into()];
    (options.scan.filter, options.begin.filter) = (filter.clone(), filter);
    options
}

fn early(paths: &[&str]) -> Options {
    let mut options = filtered(&[], Some(paths));
    options.begin.stage_only = true;
    options
}

/// With a unit of which all but the marker was staged.
fn staged() -> Pair {
    let pair = Pair::new();
    UNIT.iter().zip(0..).for_each(|(path, seed)| pair.write(path, &random(seed)));
    pair.write("beside", b"beside");
    // Old enough for digests to be remembered.
    std::thread::sleep(Duration::from_millis(60));
    let report = pair.push(&early(&UNIT));
    assert!(report.committed.is_none() && report.verified_files == 2, "{report:?}");
    pair
}

#[test]
fn what_was_staged_early_is_seen_by_nobody_and_is_published_without_being_sent_again() {
    let pair = staged();
    assert!(!pair.target.exists(), "a root appeared with nothing in it");
    // Staging it once more sends nothing.
    assert_eq!(pair.push(&early(&UNIT)).transferred_bytes, 0);
    pair.write("checkpoint-1/_SUCCESS", b"");
    let report = pair.push(&filtered(&[], None));
    assert_eq!(report.transferred_bytes, 6, "only what was not there: {report:?}");
    assert!(report.is_complete() && report.committed.unwrap().published >= 4);
    assert_eq!(pair.differences(), "");
    for (path, seed) in UNIT.iter().zip(0..) {
        assert_eq!(fs::read(pair.target.join(path)).unwrap(), random(seed));
    }
    assert_eq!(pair.push(&options()).transferred_bytes, 0);
    assert!(!pair.target.join(".lockstep/early").exists(), "nothing is left over");
}

#[test]
fn runs_in_between_neither_publish_it_nor_lose_it_and_a_check_does_not_mind_it() {
    let pair = staged();
    pair.push(&filtered(&["/checkpoint-1"], None));
    pair.write("more", b"more");
    pair.push(&filtered(&[], Some(&["more"])));
    assert!(!pair.target.join("checkpoint-1").exists());
    assert!(pair.target.join("beside").exists() && pair.target.join("more").exists());
    let check = std::process::Command::new(env!("CARGO_BIN_EXE_lockstep")).arg("check").arg(&pair.target).output();
    crate::kit::done(&check.unwrap());
    let private = fs::metadata(pair.target.join(".lockstep/early")).unwrap();
    assert_eq!(private.mode() & 0o777, 0o700);
    pair.write("checkpoint-1/_SUCCESS", b"");
    let report = pair.push(&filtered(&[], Some(&["checkpoint-1"])));
    assert_eq!(report.transferred_bytes, 0, "{report:?}");
    assert_eq!(pair.differences(), "");
}

#[test]
fn a_file_that_changed_since_is_sent_again_and_one_that_was_tampered_with_is_not_believed() {
    let pair = staged();
    pair.write(UNIT[0], &random(7));
    let lies = pair.target.parent().unwrap().join(format!(".target.lockstep/.lockstep/early/tree/{}", UNIT[1]));
    assert!(lies.exists(), "the test looks for it at the wrong place");
    damage(&lies);
    std::thread::sleep(Duration::from_millis(60));
    let report = pair.push(&filtered(&[], None));
    assert!(report.transferred_bytes >= 2 * SIZE as u64, "{report:?}");
    assert_eq!(fs::read(pair.target.join(UNIT[0])).unwrap(), random(7));
    assert_eq!(fs::read(pair.target.join(UNIT[1])).unwrap(), random(1));
    assert_eq!(pair.differences(), "");
}

#[test]
fn the_rules_of_the_moment_of_publishing_hold() {
    let pair = staged();
    let policy = PolicySpec { rules: vec![rule("**/b", "0640")] };
    let report = pair.push_with(&filtered(&[], None), policy).unwrap();
    assert!(report.is_complete(), "{report:?}");
    assert_eq!(mode_of(&pair.target.join(UNIT[1])), 0o640);
    assert_eq!(mode_of(&pair.target.join(UNIT[0])), mode_of(&pair.source.join(UNIT[0])));
    assert_eq!(fs::read(pair.target.join(UNIT[1])).unwrap(), random(1));
}

#[test]
fn an_agent_keeps_what_was_staged_early_for_the_next_connection() {
    let pair = Pair::new();
    UNIT.iter().zip(0..).for_each(|(path, seed)| pair.write(path, &random(seed)));
    std::thread::sleep(Duration::from_millis(60));
    let push = |options: &Options| -> SyncReport {
        let (remote, way) = (Arc::new(Pipes), Way::LockstepSubsystem);
        let first = remote.open(&way, 0).unwrap();
        let root = pair.target.to_str().unwrap().as_bytes();
        let lanes = Lanes::connect(remote, &way, first, 1, root, CompressOptions::default()).unwrap();
        let source = LocalSource::new(&pair.source, Some(&pair.state)).unwrap();
        run(&source, &AgentTarget::new(lanes), options, &Silent::default(), &AtomicBool::new(false)).unwrap()
    };
    assert!(push(&early(&UNIT)).transferred_bytes >= 2 * SIZE as u64);
    pair.write("checkpoint-1/_SUCCESS", b"");
    assert_eq!(push(&filtered(&[], None)).transferred_bytes, 0);
    assert_eq!(pair.differences(), "");
}
