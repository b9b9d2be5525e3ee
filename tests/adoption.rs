//! What lies at the target already, brought by other means or edited there.

use std::fs;
use std::sync::atomic::AtomicBool;

use lockstep::endpoint::local::{LocalSource, LocalTarget};
use lockstep::monitor::{Counters, Event, Monitor, Phase};
use lockstep::policy::PolicySpec;
use lockstep::sync::{Options, run};

use crate::kit::pair::{Pair, damage, options, run_command, with};

#[test]
fn a_tree_that_was_filled_by_other_means_is_adopted_and_not_sent_again() {
    for copy in ["-a", "-r"] {
        let pair = Pair::new();
        pair.write("large", &vec![3; 2_000_000]);
        pair.write("d/small", b"small");
        pair.write("d/damaged", b"good data");
        run_command("cp", &[copy], &[&pair.source, &pair.target]);
        fs::write(pair.target.join("more"), "of the target").unwrap();
        if copy == "-a" {
            damage(&pair.target.join("d/damaged"));
        } else {
            fs::write(pair.target.join("d/damaged"), "bad data!").unwrap();
        }
        let (report, sent) = pair.push_counted(&options());
        assert!(report.is_complete(), "{:?}", report.problems);
        assert_eq!(sent, 9, "cp {copy}: only what differs is sent");
        assert_eq!(fs::read(pair.target.join("d/damaged")).unwrap(), b"good data", "cp {copy}");
        for path in ["large", "d/small", "d/damaged"] {
            assert!(pair.listed(path).is_some(), "cp {copy}: {path}");
        }
        assert_eq!(pair.listed("more"), None);
        fs::remove_file(pair.target.join("more")).unwrap();
        assert_eq!(pair.differences(), "");
        let again = pair.push_counted(&options());
        assert_eq!((again.0.plan.actions.as_slice(), again.1), (&[][..], 0));
    }
}

#[test]
fn an_edit_at_the_target_that_put_its_time_back_is_noticed_and_mended() {
    let pair = Pair::new();
    for path in ["a", "b", "c"] {
        pair.write(path, &[b'x'; 1000]);
        // Of another day: the table believes no file whose times are those of this moment.
        let file = fs::File::options().write(true).open(pair.source.join(path)).unwrap();
        file.set_modified(std::time::UNIX_EPOCH + std::time::Duration::from_secs(1_000_000_000)).unwrap();
    }
    pair.push_counted(&options());
    let table = fs::read(pair.target.join(".lockstep/digests")).unwrap();
    let known = lockstep::scan::cache::DigestTable::from_bytes(&table).unwrap();
    assert_eq!(known.len(), 3, "three files are known");
    damage(&pair.target.join("b"));
    let (report, sent) = pair.push_counted(&options());
    assert_eq!((report.plan.actions.len(), sent), (1, 1000), "{:?}", report.plan.actions);
    assert_eq!(pair.differences(), "");
    // Without the table of digests everything is hashed again, and nothing is sent.
    fs::remove_file(pair.target.join(".lockstep/digests")).unwrap();
    let (report, sent) = pair.push_counted(&options());
    assert_eq!((report.plan.actions.as_slice(), sent), (&[][..], 0));
    assert!(pair.target.join(".lockstep/digests").exists());
}

#[test]
fn checksum_hashes_at_the_target_whatever_was_known_of_it() {
    let pair = Pair::new();
    pair.write("a", &[b'x'; 1000]);
    pair.push_counted(&options());
    let table = fs::read(pair.target.join(".lockstep/digests")).unwrap();
    let checksum = with(|begin| begin.checksum = true);
    let (report, sent) = pair.push_counted(&checksum);
    assert_eq!((report.committed.unwrap().generation, sent), (1, 0));
    damage(&pair.target.join("a"));
    // The table claims to know the damaged file: --checksum does not ask it.
    fs::write(pair.target.join(".lockstep/digests"), table).unwrap();
    assert_eq!(pair.push_counted(&checksum).1, 1000);
    assert_eq!(pair.differences(), "");
}

#[test]
fn a_push_of_one_file_leaves_what_is_known_of_its_neighbours() {
    let pair = Pair::new();
    let old = std::time::UNIX_EPOCH + std::time::Duration::from_secs(1_000_000_000);
    for path in ["a", "d/b"] {
        pair.write(path, b"before");
        fs::File::options().write(true).open(pair.source.join(path)).unwrap().set_modified(old).unwrap();
    }
    pair.push_counted(&options());
    let known = || {
        let table = fs::read(pair.target.join(".lockstep/digests")).unwrap();
        lockstep::scan::cache::DigestTable::from_bytes(&table).unwrap().len()
    };
    assert_eq!(known(), 2);
    let file = pair.source.with_file_name("new");
    fs::write(&file, b"another").unwrap();
    fs::File::options().write(true).open(&file).unwrap().set_modified(old).unwrap();
    let push =
        std::process::Command::new(crate::kit::area::lockstep()).arg("push").arg(&file).arg(&pair.target).output();
    crate::kit::done(&push.unwrap());
    assert_eq!(fs::read(pair.target.join("new")).unwrap(), b"another");
    assert_eq!(known(), 3);
}

/// Does something when everything was compared, and nothing is published yet.
struct Then<F>(F, Counters);

impl<F: Fn() + Send + Sync> Monitor for Then<F> {
    fn event(&self, event: Event<'_>) {
        if matches!(event, Event::Phase(Phase::Publishing)) {
            (self.0)();
        }
    }
    fn counters(&self) -> &Counters {
        &self.1
    }
}

#[test]
fn h36_what_is_changed_between_comparing_and_publishing_is_not_taken_for_what_it_was() {
    // By writing to it, also with the time put back; by nothing but a further name, which changes nothing.
    for (how, complete) in [("written", false), ("put back", false), ("linked", true)] {
        let pair = Pair::new();
        pair.write("a", b"of the source");
        pair.write("b", b"of the source");
        fs::create_dir(&pair.target).unwrap();
        for name in ["a", "b"] {
            fs::write(pair.target.join(name), "of the source").unwrap();
        }
        std::thread::sleep(lockstep::scan::cache::GRANULARITY * 2);
        let there = pair.target.join("a");
        let then = || match how {
            "written" => fs::write(&there, "of a stranger").unwrap(),
            "put back" => damage(&there),
            _ => fs::hard_link(&there, pair.target.parent().unwrap().join("further")).unwrap(),
        };
        let source = LocalSource::new(&pair.source, None).unwrap();
        let target = LocalTarget::new(&pair.target, PolicySpec::default());
        let report =
            run(&source, &target, &options(), &Then(then, Counters::default()), &AtomicBool::new(false)).unwrap();
        let told: Vec<_> = report.problems.iter().map(|problem| problem.message.as_str()).collect();
        assert_eq!(report.is_complete(), complete, "{how}: {told:?}");
        assert!(
            complete || told.iter().any(|told| told.contains("changed by somebody else after it was compared")),
            "{told:?}"
        );
        assert!(pair.push(&options()).is_complete());
        assert_eq!(fs::read(&there).unwrap(), b"of the source", "{how}");
        assert_eq!(pair.differences(), "", "{how}");
    }
}

#[test]
fn after_something_that_could_not_be_published_no_pointer_comes_and_nothing_goes() {
    let pair = Pair::new();
    for (path, content) in [("old", "old"), ("latest", "old")] {
        pair.write(path, content.as_bytes());
    }
    assert!(pair.push(&options()).is_complete());
    fs::remove_file(pair.source.join("old")).unwrap();
    for path in ["new", "latest"] {
        pair.write(path, b"new!");
    }
    let mirror = Options { delete: true, ..options() };
    let in_the_way = pair.target.join("new");
    let then = || {
        fs::create_dir(&in_the_way).unwrap();
        fs::write(in_the_way.join("x"), "theirs").unwrap();
    };
    let source = LocalSource::new(&pair.source, None).unwrap();
    let target = LocalTarget::new(&pair.target, PolicySpec::default());
    let report = run(&source, &target, &mirror, &Then(then, Counters::default()), &AtomicBool::new(false)).unwrap();
    assert!(!report.is_complete());
    let read = |path: &str| fs::read_to_string(pair.target.join(path)).unwrap();
    assert_eq!((read("latest").as_str(), read("old").as_str()), ("old", "old"));
    fs::remove_dir_all(&in_the_way).unwrap();
    assert!(pair.push(&mirror).is_complete());
    assert_eq!(pair.differences(), "");
}

#[test]
fn what_new_rules_leave_out_is_not_removed_by_the_run_that_brings_them() {
    for place in ["", "deep/"] {
        let pair = Pair::new();
        pair.write(&format!("{place}kept"), b"kept");
        pair.write(&format!("{place}gone"), b"gone");
        let mirror = Options { delete: true, ..options() };
        assert!(pair.push(&mirror).is_complete());
        let own = pair.target.join(place).join("outputs");
        fs::create_dir(&own).unwrap();
        fs::write(own.join("result"), "of the target").unwrap();
        pair.write(&format!("{place}.lockstepignore"), b"/outputs/\n");
        fs::remove_file(pair.source.join(place).join("gone")).unwrap();
        for left in [true, false] {
            assert!(pair.push(&mirror).is_complete());
            assert_eq!(fs::read_to_string(own.join("result")).unwrap(), "of the target");
            assert_eq!(pair.target.join(place).join("gone").exists(), left);
        }
    }
}

#[test]
fn a_directory_that_goes_stays_for_what_is_left_out_and_that_is_all() {
    let pair = Pair::new();
    for path in ["d/sub/a", "d/b", "e/c", "kept"] {
        pair.write(path, b"x");
    }
    let mut mirror = with(|begin| begin.filter.rules = vec!["*.tmp".into()]);
    mirror.scan.filter.rules = vec!["*.tmp".into()];
    mirror.delete = true;
    mirror.begin.deletes = true;
    assert!(pair.push(&mirror).is_complete());
    fs::write(pair.target.join("d/sub/x.tmp"), "left out").unwrap();
    for directory in ["d", "e"] {
        fs::remove_dir_all(pair.source.join(directory)).unwrap();
    }
    let report = pair.push(&mirror);
    assert!(report.is_complete(), "{:?}", report.problems);
    assert!(pair.target.join("d/sub/x.tmp").exists());
    assert!(
        !pair.target.join("d/sub/a").exists() && !pair.target.join("d/b").exists() && !pair.target.join("e").exists()
    );
    let again = pair.push(&mirror);
    assert_eq!((again.plan.removals.as_slice(), again.is_complete()), (&[][..], true));
}
