//! Configurations that are read, those that are refused, and the examples.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt as _;

use super::*;
use crate::path::RelPath;
use crate::plan::safety::DeleteLimit;

fn parse(text: &str) -> Result<Config, ConfigError> {
    Config::parse(Path::new("/etc/lockstep/config.toml"), text)
}

const JOB: &str = "[[job]]\nname = 'a'\nsource = '/a'\ntargets = ['h:/a']\n";

#[test]
fn a_job_is_read_as_it_is_written() {
    let text = r#"
        [[policy.weights.rule]]
        match = "**/*.safetensors"
        mode  = "600"

        [[job]]
        name    = "checkpoints"
        source  = "/data/checkpoints"
        targets = ["sync@gpu02:/data/checkpoints", "sync@gpu03:/data/checkpoints"]
        unit    = "checkpoint-*/"
        ready   = "huggingface"
        last    = ["latest", "latest_checkpointed_iteration.txt"]
        delete  = "mirror"
        max_delete = "10%"
        policy  = "weights"
        bandwidth = "2 GB/s"
    "#;
    let config = parse(text).unwrap();
    let job = config.job("checkpoints").unwrap();
    assert_eq!((job.targets.len(), &job.ready), (2, &Ready::Layout(Layout::HuggingFace)));
    assert_eq!((job.delete, job.max_delete), (Delete::Mirror, DeleteLimit::Percent(10.0)));
    assert_eq!(job.bandwidth.as_ref().and_then(|rate| rate.at(0)), Some(2_000_000_000));
    assert_eq!(config.policy("weights").unwrap().rules[0].mode.as_deref(), Some("600"));
    let plain = parse(JOB).unwrap().jobs.remove(0);
    assert_eq!((plain.delete, plain.ready, plain.max_delete), (Delete::Never, Ready::Settled, DeleteLimit::Unlimited));
    assert_eq!(parse("").unwrap().serve, None);
}

#[test]
fn h49_an_unknown_key_is_named_with_its_place_and_the_nearest_known() {
    for (text, shown) in [
        ("[[policy.a.rule]]\nmatch = 'x'\nmdoe = '600'\n", ":3:1: unknown key 'mdoe'; did you mean 'mode'?"),
        ("[[policy.a.rules]]\nmatch = 'x'\n", ":1:12: unknown key 'rules'; did you mean 'rule'?"),
        ("\n[[jobs]]\n", ":2:3: unknown key 'jobs'; did you mean 'job'?"),
        ("[serve]\nlisten = '[::]:22'\nhostkey = '/k'\n", ":3:1: unknown key 'hostkey'; did you mean 'host_key'?"),
        ("zzzzzzzz = 1\n", ":1:1: unknown key 'zzzzzzzz'; there are: policy, job, serve, sftp_server, daemon, audit"),
        (&format!("{JOB}  deleet = 'mirror'\n"), ":5:3: unknown key 'deleet'; did you mean 'delete'?"),
    ] {
        let error = parse(text).unwrap_err().to_string();
        assert_eq!(error, format!("/etc/lockstep/config.toml{shown}"));
    }
}

#[test]
fn h49_a_wrong_type_or_value_is_named_with_its_place() {
    for (text, place, part) in [
        ("[[policy.a.rule]]\nmatch = 'x'\nmode = 600\n", ":3:8:", "600"),
        ("[[job]]\nname = 'a'\n", ":1:1:", "source"),
        ("[serve]\nlisten = 'here'\nhost_key = '/k'\n", ":2:10:", "address"),
        ("a = \n", ":1:5:", ""),
        (&format!("{JOB}trash_keep = '7d'\n"), ":", "'trash_keep' is for delete = 'trash'"),
        (&format!("{JOB}delete = 'trash'\ntrash_keep = 'long'\n"), ":6:14:", "'long' is no length of time"),
        (&format!("{JOB}nice = 20\n"), ":", "'nice' is 20, and has to be from -20 to 19"),
        (&format!("{JOB}io_class = 'low'\n"), ":5:12:", "'low' is neither 'idle' nor 'best-effort:0'"),
        (&format!("{JOB}threads = 0\n"), ":5:11:", "nonzero"),
        (&format!("{JOB}connections = 0\n"), ":", "'connections' is 0, and has to be from 1 to 64"),
        (&format!("{JOB}delete = 'all'\n"), ":5:10:", "mirror"),
        (&format!("{JOB}bandwidth = 'fast'\n"), ":5:13:", "'fast' is not a rate"),
        (&format!("{JOB}max_delete = '200%'\n"), ":5:14:", "'200%' is not a limit"),
        (&format!("{JOB}ready = 'a/b'\n"), ":5:9:", "a marker is a file's name"),
    ] {
        let error = parse(text).unwrap_err().to_string();
        assert!(error.starts_with(&format!("/etc/lockstep/config.toml{place}")), "{error}");
        assert!(error.contains(part), "{error}");
    }
}

#[test]
fn what_leads_nowhere_is_refused_where_it_stands() {
    let policy = "[[policy.weights.rule]]\nmatch = 'x'\n";
    let user = "[serve]\nlisten = '[::]:22'\nhost_key = '/k'\n[[serve.user]]\nname = 'u'\nroot = '/r'\n";
    for (text, place, part) in [
        (format!("{policy}[[policy.weights.rule]]\nmatch = 'y'\nmode = '999'\n"), ":3:1:", "rule 2 ('y')"),
        (format!("{policy}{JOB}policy = 'wieghts'\n"), ":3:1:", "did you mean 'weights'?"),
        (format!("{JOB}policy = 'weights'\n"), ":1:1:", "there are none"),
        (format!("{JOB}{JOB}"), ":5:1:", "taken"),
        (JOB.replace("'/a'", "'a'"), ":1:1:", "must start with '/'"),
        (JOB.replace("'h:/a'", ""), ":1:1:", "targets"),
        (JOB.replace("'h:/a'", "'h'"), ":1:1:", "neither [USER@]HOST:PATH nor"),
        (format!("{JOB}exclude = ['a[z-b]']\n"), ":1:1:", "exclude"),
        (format!("{user}authorized_keys = 'keys'\n"), ":4:1:", "must start with '/'"),
        (format!("{user}authorized_keys = '/keys'\npolicy = 'x'\n"), ":4:1:", "no policy 'x'"),
        (format!("{user}authorized_keys = '/keys'\n").replace("'u'", "'u v'"), ":4:1:", "blanks"),
        (user.replace("'/k'", "'k'") + "authorized_keys = '/keys'\n", ":1:1:", "'host_key' is 'k'"),
        (user.replace("[[", "audit = 'log'\n[[") + "authorized_keys = '/keys'\n", ":1:1:", "'audit' is 'log'"),
    ] {
        let error = parse(&text).unwrap_err().to_string();
        assert!(error.starts_with(&format!("/etc/lockstep/config.toml{place}")), "{error}");
        assert!(error.contains(part), "{error}");
    }
    let config = parse(policy).unwrap();
    assert!(config.policy("weight").unwrap_err().to_string().ends_with("did you mean 'weights'?"));
    assert!(config.job("x").unwrap_err().to_string().ends_with("there are none"));
}

#[test]
fn a_listener_is_read_as_it_is_written() {
    let text = "[serve]\nlisten = ['127.0.0.1:22', '[::1]:2222']\nhost_key = '/k'\nrevoked_keys = '/r'\naudit = '/a'\n\
                [serve.limits]\nconnections = 3\nlogin_grace = '5s'\n\
                [[serve.user]]\nname = 'u'\nroot = '/r'\nauthorized_keys = '/keys'\nfrom = ['10.0.0.0/8', '!10.0.0.9']\n";
    let serve = parse(text).unwrap().serve.unwrap();
    assert_eq!(serve.listen, ["127.0.0.1:22".parse().unwrap(), "[::1]:2222".parse().unwrap()]);
    assert_eq!((serve.limits.connections.get(), serve.limits.login_grace.as_secs()), (3, 5));
    assert_eq!(serve.limits.sessions, ServeLimits::default().sessions);
    let from = serve.users[0].from.as_ref().unwrap();
    assert!(from.admits([10, 1, 1, 1].into()) && !from.admits([10, 0, 0, 9].into()));
}

#[test]
fn h51_a_rule_of_the_listener_that_cannot_be_resolved_is_refused_where_it_stands() {
    let serve = "[serve]\nlisten = '[::]:22'\nhost_key = '/k'\n";
    let user = "[[serve.user]]\nname = 'u'\nroot = '/r'\nauthorized_keys = '/keys'\n";
    for (text, place, part) in [
        (format!("{serve}{user}from = ['192.168.1.0/33']\n"), ":8:8:", "at most 32 bits"),
        (format!("{serve}{user}from = ['192.168.1.7/24']\n"), ":8:8:", "write 192.168.1.0/24"),
        (format!("{serve}{user}from = ['10.0.0.0/8', '!gpu09']\n"), ":8:8:", "names of hosts"),
        (format!("{serve}{user}from = []\n"), ":8:8:", "nobody"),
        (format!("{serve}[serve.limits]\nsessions = 0\n"), ":5:12:", "nonzero"),
        (format!("{serve}[serve.limits]\nlogin_grace = '30'\n"), ":5:15:", "'30' is not a length of time"),
        (format!("{serve}[serve.limits]\nsesions = 1\n"), ":5:1:", "did you mean 'sessions'?"),
        (serve.replace("'[::]:22'", "[]"), ":2:10:", "no address"),
        (serve.replace("'[::]:22'", "['0.0.0.0']"), ":2:10:", "'0.0.0.0' is not an address with a port"),
    ] {
        let error = parse(&text).unwrap_err().to_string();
        assert!(error.starts_with(&format!("/etc/lockstep/config.toml{place}")), "{error}");
        assert!(error.contains(part), "{error}");
    }
}

#[test]
fn h50_a_configuration_that_others_may_write_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("config.toml");
    fs::write(&path, JOB).unwrap();
    for (mode, good) in [(0o600, true), (0o644, true), (0o444, true), (0o664, false), (0o646, false), (0o666, false)] {
        fs::set_permissions(&path, Permissions::from_mode(mode)).unwrap();
        let loaded = Config::load(&path);
        assert_eq!(loaded.is_ok(), good, "{mode:o} {loaded:?}");
        if let Err(error) = loaded {
            assert!(error.to_string().contains("chmod go-w"), "{error}");
        }
    }
}

#[test]
fn h50_a_configuration_of_another_user_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("config.toml");
    fs::write(&path, JOB).unwrap();
    fs::set_permissions(&path, Permissions::from_mode(0o644)).unwrap();
    // Only root can give a file away; for others the check of the mode above is what can be tried.
    if rustix::process::geteuid().is_root() {
        std::os::unix::fs::chown(&path, Some(4711), None).unwrap();
        assert!(Config::load(&path).unwrap_err().to_string().contains("4711"));
    }
}

#[test]
fn what_is_no_readable_text_is_refused_and_never_blocks() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    fs::write(path("large"), " ".repeat(MAX_BYTES as usize + 1)).unwrap();
    fs::write(path("binary"), b"\xff\xfe").unwrap();
    rustix::fs::mkfifoat(rustix::fs::CWD, path("fifo"), rustix::fs::Mode::from_raw_mode(0o600)).unwrap();
    for (name, part) in [
        ("large", "1 MiB"),
        ("binary", "UTF-8"),
        ("fifo", "not a regular file"),
        (".", "not a regular file"),
        ("missing", "--config"),
    ] {
        if ["large", "binary"].contains(&name) {
            fs::set_permissions(path(name), Permissions::from_mode(0o600)).unwrap();
        }
        let error = Config::load(&path(name)).unwrap_err().to_string();
        assert!(error.contains(part) && error.contains(directory.path().to_str().unwrap()), "{error}");
    }
}

/// The examples as text: whether a checkout may be written by others says nothing about them.
fn example(name: &str) -> Config {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("config").join(name);
    Config::parse(&path, &fs::read_to_string(&path).unwrap()).unwrap()
}

#[test]
fn all_examples_load() {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("config");
    let mut names: Vec<_> = fs::read_dir(directory)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.ends_with(".toml"))
        .collect();
    names.sort();
    for name in &names {
        example(name);
    }
    let expected =
        ["policy-driving.toml", "policy-medical.toml", "policy-research.toml", "receiver.toml", "sender.toml"];
    assert!(expected.iter().all(|expected| names.iter().any(|name| name == expected)), "{names:?}");
}

#[test]
fn the_examples_grant_what_their_comments_say() {
    for (file, policy, path, asked, wanted) in [
        ("policy-driving.toml", "driving", "fleet/sensor_data/", 0o777, 0o750),
        ("policy-driving.toml", "driving", "fleet/sensor_data/lidar.bin", 0o777, 0o640),
        ("policy-driving.toml", "driving", "var/log/autodrive/", 0o755, 0o1775),
        ("policy-driving.toml", "driving", "ota/update.bin", 0o644, 0o744),
        ("policy-driving.toml", "driving", "perception/model.ckpt", 0o644, 0o600),
        ("policy-medical.toml", "medical", "scans/ct_0001.dcm", 0o644, 0o640),
        ("policy-medical.toml", "medical", "labels.txt", 0o666, 0o600),
        ("policy-medical.toml", "medical", "scans/", 0o777, 0o750),
        ("policy-medical.toml", "medical", "tool", 0o4755, 0o640),
        ("policy-research.toml", "research", "dataset/", 0o755, 0o770),
        ("policy-research.toml", "research", "dataset/a.tar", 0o644, 0o660),
        ("policy-research.toml", "research", "train.py", 0o600, 0o750),
        ("policy-research.toml", "research", "jobs/distributed_train.sh", 0o644, 0o755),
        ("policy-research.toml", "research", "run/logs/", 0o755, 0o1774),
        ("policy-research.toml", "research", "m/model.safetensors", 0o644, 0o600),
        ("receiver.toml", "weights", "checkpoint-1/model.safetensors", 0o666, 0o600),
    ] {
        let policy = Policy::compile(&example(file).policy(policy).unwrap()).unwrap();
        let directory = path.ends_with('/');
        let decision = policy.decide(&RelPath::new(path.trim_end_matches('/')).unwrap(), directory, asked);
        assert_eq!(format!("{:04o}", decision.mode), format!("{wanted:04o}"), "{file} {path}");
    }
}
