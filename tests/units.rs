//! Directories that are published whole, what is held back when a part failed, and what the manifest then lists.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::AtomicBool;

use lockstep::endpoint::local::{LocalSource, LocalTarget};
use lockstep::manifest::format;
use lockstep::monitor::{Counters, Event, Monitor, Problem};
use lockstep::policy::PolicySpec;
use lockstep::sync::{Options, run};

use crate::kit::pair::{Pair, mode_of, options, run_command, with};

#[test]
fn a_unit_is_exchanged_whole_and_keeps_what_nobody_lists() {
    use std::os::unix::fs::FileTypeExt as _;
    let pair = Pair::new();
    for path in ["ckpt-1/weights", "ckpt-1/same", "ckpt-1/d/mode", "ckpt-1/_SUCCESS", "other"] {
        pair.write(path, path.as_bytes());
    }
    fs::hard_link(pair.source.join("ckpt-1/same"), pair.source.join("ckpt-1/z-link")).unwrap();
    let units = with(|begin| {
        begin.units = vec!["ckpt-*/".into()];
        begin.filter.rules = vec!["*.log".into()];
    });
    assert!(pair.push(&units).is_complete());
    let inode = |path: &str| fs::symlink_metadata(pair.target.join(path)).unwrap().ino();
    let (unit, same, mode) = (inode("ckpt-1"), inode("ckpt-1/same"), inode("ckpt-1/d/mode"));
    let old = fs::File::open(pair.target.join("ckpt-1/weights")).unwrap();
    fs::write(pair.target.join("ckpt-1/d/train.log"), "excluded").unwrap();
    run_command("mkfifo", &[], &[&pair.target.join("ckpt-1/pipe")]);
    pair.write("ckpt-1/weights", b"new weights");
    fs::set_permissions(pair.source.join("ckpt-1/d/mode"), fs::Permissions::from_mode(0o600)).unwrap();
    fs::set_permissions(pair.source.join("ckpt-1"), fs::Permissions::from_mode(0o750)).unwrap();
    let report = pair.push(&units);
    assert!(report.is_complete(), "{:?}", report.problems);
    assert_ne!(inode("ckpt-1"), unit, "the directory was not exchanged");
    assert_eq!(inode("ckpt-1/same"), same, "what stays is not copied");
    assert_eq!(inode("ckpt-1/z-link"), same);
    assert_ne!(inode("ckpt-1/d/mode"), mode, "the old unit would have got the new mode");
    assert_eq!(mode_of(&pair.target.join("ckpt-1/d/mode")), 0o600);
    assert_eq!(mode_of(&pair.target.join("ckpt-1")), 0o750);
    assert_eq!(fs::read(pair.target.join("ckpt-1/d/train.log")).unwrap(), b"excluded");
    assert!(fs::symlink_metadata(pair.target.join("ckpt-1/pipe")).unwrap().file_type().is_fifo());
    let mut text = String::new();
    std::io::Read::read_to_string(&mut &old, &mut text).unwrap();
    assert_eq!(text, "ckpt-1/weights", "who had the old version open reads on in it");
    fs::remove_file(pair.target.join("ckpt-1/d/train.log")).unwrap();
    fs::remove_file(pair.target.join("ckpt-1/pipe")).unwrap();
    // Removing them moved the times of their directories.
    pair.push(&units);
    assert_eq!(pair.differences(), "");
    assert_eq!(pair.push(&units).plan.actions.as_slice(), []);
    // What is removed goes with the exchange, too.
    fs::remove_dir_all(pair.source.join("ckpt-1/d")).unwrap();
    assert!(pair.push(&Options { delete: true, ..units }).is_complete());
    assert_eq!(pair.differences(), "");
}

/// Another size than was scanned: the file fails, as one does that is written to while it is read.
struct Spoil<'a>(&'a Path, Counters);

impl Monitor for Spoil<'_> {
    fn event(&self, event: Event<'_>) {
        if matches!(event, Event::Phase(lockstep::monitor::Phase::Transferring)) {
            fs::write(self.0, "longer than it was").unwrap();
        }
    }
    fn counters(&self) -> &Counters {
        &self.1
    }
}

#[test]
fn h36_a_unit_with_a_file_that_failed_is_held_back_and_so_is_every_marker() {
    let pair = Pair::new();
    for path in ["ckpt-1/weights", "ckpt-1/config", "latest", "ckpt-2/weights", "readme"] {
        pair.write(path, b"old");
    }
    let units = with(|begin| begin.units = vec!["ckpt-*/".into()]);
    pair.push(&units);
    for path in [
        "ckpt-1/weights",
        "ckpt-1/config",
        "ckpt-1/_SUCCESS",
        "latest",
        "ckpt-2/weights",
        "readme",
        "ckpt-3/w",
        "ckpt-3/_SUCCESS",
    ] {
        pair.write(path, b"new!");
    }
    let source = LocalSource::new(&pair.source, None).unwrap();
    let target = LocalTarget::new(&pair.target, PolicySpec::default());
    let spoil = pair.source.join("ckpt-1/weights");
    let monitor = Spoil(&spoil, Counters::default());
    let report = run(&source, &target, &units, &monitor, &AtomicBool::new(false)).unwrap();
    assert!(!report.is_complete());
    let read = |path: &str| fs::read_to_string(pair.target.join(path)).unwrap_or_default();
    assert_eq!([read("ckpt-1/weights"), read("ckpt-1/config"), read("ckpt-1/_SUCCESS")], ["old", "old", ""]);
    assert_eq!(
        [read("latest"), read("ckpt-2/weights"), read("readme"), read("ckpt-3/w")],
        ["old", "new!", "new!", "new!"]
    );
    // One that is whole comes with its marker.
    assert_eq!([read("ckpt-3/w"), read("ckpt-3/_SUCCESS")], ["new!", "new!"]);
    let told: Vec<_> =
        report.problems.iter().filter_map(|problem| problem.path.as_ref()).map(|path| path.to_string()).collect();
    for path in ["ckpt-1", "ckpt-1/weights", "latest"] {
        assert!(told.iter().any(|told| told == path), "{path}: {told:?}");
    }
    let held = pair.listed("ckpt-1/config").unwrap();
    assert_ne!(held, pair.listed("ckpt-2/weights").unwrap(), "the manifest lists what is not there");
    assert!(pair.push(&units).is_complete());
    assert_eq!(pair.differences(), "");
}

#[test]
fn a_unit_that_was_made_anew_waits_when_what_it_had_cannot_be_removed_yet() {
    let pair = Pair::new();
    for path in ["ckpt-1/shard-1", "ckpt-1/shard-2", "ckpt-2/shard-1", "readme"] {
        pair.write(path, b"old");
    }
    let mut units = with(|begin| begin.units = vec!["ckpt-*/".into()]);
    units.delete = true;
    pair.push(&units);
    fs::remove_file(pair.source.join("ckpt-1/shard-2")).unwrap();
    for path in ["ckpt-1/shard-1", "ckpt-2/shard-1", "readme"] {
        pair.write(path, b"new!");
    }
    let source = LocalSource::new(&pair.source, None).unwrap();
    let target = LocalTarget::new(&pair.target, PolicySpec::default());
    let spoil = pair.source.join("readme");
    let report = run(&source, &target, &units, &Spoil(&spoil, Counters::default()), &AtomicBool::new(false)).unwrap();
    let read = |path: &str| fs::read_to_string(pair.target.join(path)).unwrap_or_default();
    assert_eq!([read("ckpt-1/shard-1"), read("ckpt-1/shard-2"), read("ckpt-2/shard-1")], ["old", "old", "new!"]);
    let told = |problem: &Problem| problem.path.as_ref().is_some_and(|path| path.as_bytes() == b"ckpt-1");
    assert!(report.problems.iter().any(told), "{:?}", report.problems);
    assert!(pair.push(&units).is_complete());
    assert_eq!(pair.differences(), "");
}

struct Told(Mutex<Vec<String>>, Counters);

impl Monitor for Told {
    fn event(&self, event: Event<'_>) {
        if let Event::Warning(text) = event {
            self.0.lock().unwrap().push(text.to_owned());
        }
    }
    fn counters(&self) -> &Counters {
        &self.1
    }
}

#[test]
fn h39_a_clock_that_was_put_back_loses_nothing_and_is_told() {
    let pair = Pair::new();
    pair.write("a", b"1");
    pair.push(&options());
    // As if the last run had been a day ahead of this one.
    let file = pair.target.join(".lockstep/manifest");
    let mut manifest = format::decode(&fs::read(&file).unwrap()).unwrap();
    manifest.created.seconds += 86_400;
    fs::write(&file, format::encode(&manifest)).unwrap();
    let far = std::time::SystemTime::now() + std::time::Duration::from_secs(86_400);
    fs::File::options().write(true).open(pair.target.join("a")).unwrap().set_modified(far).unwrap();
    pair.write("a", b"2");
    let source = LocalSource::new(&pair.source, None).unwrap();
    let target = LocalTarget::new(&pair.target, PolicySpec::default());
    let monitor = Told(Mutex::default(), Counters::default());
    let report = run(&source, &target, &options(), &monitor, &AtomicBool::new(false)).unwrap();
    assert_eq!(report.committed.unwrap().generation, 2);
    assert!(monitor.0.lock().unwrap().iter().any(|text| text.contains("is the clock of this machine right")));
    assert_eq!(pair.differences(), "");
}

#[test]
fn h38_a_source_that_is_gone_is_an_error_and_the_target_stays() {
    let pair = Pair::new();
    pair.write("a", b"1");
    pair.push(&options());
    fs::rename(&pair.source, pair.source.with_file_name("moved")).unwrap();
    let pushed = Command::new(env!("CARGO_BIN_EXE_lockstep"))
        .args(["push", "--delete"])
        .args([&pair.source, &pair.target])
        .env("XDG_STATE_HOME", &pair.state)
        .output()
        .unwrap();
    assert_eq!(pushed.status.code(), Some(5), "{pushed:?}");
    assert!(pair.target.join("a").exists());
}

#[test]
fn a_step_that_fails_leaves_the_manifest_true() {
    let pair = Pair::new();
    pair.write("a/b", b"1");
    pair.write("c", b"1");
    pair.push(&options());
    pair.write("c", b"22");
    pair.write("a/b", b"22");
    let source = LocalSource::new(&pair.source, None).unwrap();
    let target = LocalTarget::new(&pair.target, PolicySpec::default());
    /// A directory gets the name of a file between its comparison and its publication.
    struct InTheWay<'a>(&'a Path, Counters);
    impl Monitor for InTheWay<'_> {
        fn event(&self, event: Event<'_>) {
            if matches!(event, Event::Phase(lockstep::monitor::Phase::Publishing)) {
                fs::remove_file(self.0).unwrap();
                fs::create_dir_all(self.0.join("full")).unwrap();
            }
        }
        fn counters(&self) -> &Counters {
            &self.1
        }
    }
    let blocked = pair.target.join("c");
    let monitor = InTheWay(&blocked, Counters::default());
    let report = run(&source, &target, &options(), &monitor, &AtomicBool::new(false)).unwrap();
    let problems: Vec<_> = report.problems.iter().map(|problem| problem.path.clone().unwrap().to_string()).collect();
    assert_eq!(problems, ["c"]);
    assert_eq!(fs::read(pair.target.join("a/b")).unwrap(), b"22");
    let of = |data: &[u8]| -> String {
        use sha2::Digest as _;
        sha2::Sha256::digest(data).iter().map(|byte| format!("{byte:02x}")).collect()
    };
    assert_eq!(pair.listed("a/b"), Some(of(b"22")));
    assert_ne!(pair.listed("c"), Some(of(b"22")), "the manifest lists what was not published");
    assert!(pair.push(&options()).is_complete());
    assert_eq!(pair.differences(), "");
}

#[test]
fn what_somebody_puts_into_a_unit_while_it_is_built_anew_stays_in_it() {
    let mut came = 0;
    for round in 0..5 {
        let pair = Pair::new();
        for number in 0..3000 {
            pair.write(&format!("ckpt-1/{number:04}"), b"same");
        }
        pair.write("ckpt-1/weights", b"old");
        let mut units = with(|begin| begin.units = vec!["ckpt-*/".into()]);
        units.delete = round % 2 == 0;
        assert!(pair.push(&units).is_complete());
        pair.write("ckpt-1/weights", b"new!");
        fs::remove_file(pair.source.join("ckpt-1/0000")).unwrap();
        let (staged, unit) =
            (pair.target.join(".lockstep/staging/current/tree/ckpt-1/0001"), pair.target.join("ckpt-1"));
        let over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let stranger = scope.spawn(|| {
                while !staged.exists() && !over.load(std::sync::atomic::Ordering::Relaxed) {}
                let made = pair.target.join("made");
                fs::create_dir(&made).unwrap();
                fs::write(made.join("results"), "good").unwrap();
                fs::rename(made, unit.join("eval")).unwrap();
            });
            assert!(pair.push(&units).is_complete());
            over.store(true, std::sync::atomic::Ordering::Relaxed);
            stranger.join().unwrap();
        });
        came += usize::from(fs::read(unit.join("eval/results")).is_ok_and(|read| read == b"good"));
        assert_eq!(unit.join("0000").exists(), !units.delete);
        assert_eq!(fs::read(unit.join("weights")).unwrap(), b"new!");
    }
    assert_eq!(came, 5);
}
