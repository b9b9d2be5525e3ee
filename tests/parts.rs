//! Runs on a part of a tree: what they leave of the rest, and what they may not do.

use std::fs;
use std::sync::Arc;

use lockstep::endpoint::local::{LocalSource, LocalTarget};
use lockstep::endpoint::{BeginOptions, CommitOptions, Source as _, Target as _};
use lockstep::filter::FilterSpec;
use lockstep::monitor::Silent;
use lockstep::policy::PolicySpec;
use lockstep::sync::Options;

use crate::kit::area::lockstep;
use crate::kit::pair::{Pair, options};
use crate::kit::{done, text};

fn only(paths: &[&str]) -> Options {
    let filter =
        FilterSpec { rules: Vec::new(), only: Some(paths.iter().map(|path| path.as_bytes().to_vec()).collect()) };
    let mut options = options();
    (options.scan.filter, options.begin.filter) = (filter.clone(), filter);
    options
}

fn check(pair: &Pair) -> std::process::Output {
    std::process::Command::new(lockstep()).args(["check", "--full"]).arg(&pair.target).output().unwrap()
}

#[test]
fn further_names_of_a_file_that_is_replaced_alone_are_listed_as_what_they_are() {
    for (changed, same_length) in [("a", true), ("a", false), ("b", true), ("c", false)] {
        let pair = Pair::new();
        pair.write("a", b"AAAA");
        for name in ["b", "c"] {
            fs::hard_link(pair.source.join("a"), pair.source.join(name)).unwrap();
        }
        pair.write("apart", b"apart");
        pair.push(&options());
        done(&check(&pair));
        fs::write(pair.source.join(changed), if same_length { "BBBB" } else { "BBBB, longer" }).unwrap();
        let report = pair.push(&only(&[changed]));
        assert!(report.is_complete());
        for name in ["a", "b", "c"] {
            let expected = if name == changed { fs::read(pair.source.join(name)).unwrap() } else { b"AAAA".to_vec() };
            assert_eq!(fs::read(pair.target.join(name)).unwrap(), expected, "{changed} {name}");
        }
        let output = check(&pair);
        assert_eq!(output.status.code(), Some(0), "{changed}: {}", text(&output));
        let report = pair.push(&options());
        let output = check(&pair);
        assert_eq!(output.status.code(), Some(0), "{changed} {same_length}: {} {:?}", text(&output), report.plan);
        assert_eq!(pair.differences(), "", "{changed}");
    }
}

#[test]
fn a_run_that_the_safety_checks_refuse_leaves_nothing_that_a_check_would_mind() {
    let pair = Pair::new();
    (0..3).for_each(|number| pair.write(&number.to_string(), b"content"));
    pair.push(&options());
    (0..3).for_each(|number| fs::remove_file(pair.source.join(number.to_string())).unwrap());
    let refused = pair.push_with(&Options { delete: true, ..options() }, PolicySpec::default());
    assert!(refused.unwrap_err().to_string().contains("safety"));
    done(&check(&pair));
    assert!(!pair.target.join(".lockstep/staging/current").exists());
}

/// Begins a run with these options and nothing to send, and asks for a commit.
fn commit(pair: &Pair, begin: BeginOptions, commit: &CommitOptions) -> String {
    let monitor = Silent::default();
    let source = LocalSource::new(&pair.source, None).unwrap();
    let target = LocalTarget::new(&pair.target, PolicySpec::default());
    target.begin(&begin, &monitor).unwrap();
    let tree = Arc::new(source.scan(&Options::clone(&options()).scan, &monitor).unwrap().tree);
    target.diff(&tree, &monitor).unwrap();
    target.commit(commit, &monitor).unwrap_err().to_string()
}

#[test]
fn what_is_only_staged_is_not_published_whatever_a_client_asks_for() {
    let pair = Pair::new();
    pair.write("keep", b"content");
    pair.push(&options());
    fs::remove_file(pair.source.join("keep")).unwrap();
    fs::create_dir(pair.source.join("new")).unwrap();
    let begin = BeginOptions { stage_only: true, peer: true, ..BeginOptions::default() };
    let refused = commit(&pair, begin, &CommitOptions { delete: true, ..CommitOptions::default() });
    assert!(refused.contains("publishes nothing"), "{refused}");
    assert!(pair.target.join("keep").exists() && !pair.target.join("new").exists());
    done(&check(&pair));
}

#[test]
fn what_is_locksteps_own_is_no_unit_that_a_client_may_have_taken_away() {
    let pair = Pair::new();
    pair.write("keep", b"content");
    pair.push(&options());
    // A root below the root.
    fs::create_dir_all(pair.target.join("sub/.lockstep")).unwrap();
    fs::write(pair.target.join("sub/.lockstep/manifest"), "x").unwrap();
    for path in ["sub/.lockstep", ".lockstep", "sub/.lockstep/manifest"] {
        let begin = BeginOptions { peer: true, units: vec!["zz/".into()], ..BeginOptions::default() };
        let retire = CommitOptions { retire: vec![path.as_bytes().to_vec()], ..CommitOptions::default() };
        let refused = commit(&pair, begin, &retire);
        assert!(refused.contains("lockstep's own"), "{refused}");
        assert!(pair.target.join("sub/.lockstep/manifest").exists() && pair.target.join(".lockstep/manifest").exists());
    }
}
