//! lockstep's own server, with lockstep and with OpenSSH's clients.

use std::fs;
use std::path::Path;

use crate::kit::own::Server;
use crate::kit::text as said;

fn sample(at: &Path) {
    fs::create_dir_all(at.join("source/sub")).unwrap();
    fs::write(at.join("source/big"), vec![3; 4_000_000]).unwrap();
    for number in 0..100 {
        fs::write(at.join(format!("source/sub/{number}")), number.to_string()).unwrap();
    }
}

#[test]
fn s21_s22_push_and_pull_with_the_own_server() {
    let server = Server::start(&[]);
    sample(server.at.path());
    let pushed = server.lockstep(&["push", "source", "sync@127.0.0.1:/models"], "user");
    assert!(pushed.status.success(), "{}", said(&pushed));
    let pulled = server.lockstep(&["pull", "sync@127.0.0.1:/models", "back"], "user");
    assert!(pulled.status.success(), "{}", said(&pulled));
    let same = server.run("diff", &["-r", "--exclude=.lockstep", "source", "back"]);
    assert!(same.status.success(), "{}", said(&same));
    let log = fs::read_to_string(server.at.path().join("root/models/.lockstep/audit.jsonl")).unwrap();
    assert!(log.contains("sub/99"));
}

#[test]
fn h39_what_the_server_has_to_say_reaches_the_user() {
    let server = Server::start(&[]);
    sample(server.at.path());
    let push = ["push", "source", "sync@127.0.0.1:/models"];
    let pushed = server.lockstep(&push, "user");
    assert!(pushed.status.success(), "{}", said(&pushed));
    assert!(!said(&pushed).contains("is published"), "{}", said(&pushed));
    let file = server.at.path().join("root/models/.lockstep/manifest");
    let mut manifest = lockstep::manifest::format::decode(&fs::read(&file).unwrap()).unwrap();
    manifest.created.seconds += 86_400;
    fs::write(&file, lockstep::manifest::format::encode(&manifest)).unwrap();
    fs::write(server.at.path().join("source/big"), b"2").unwrap();
    let pushed = server.lockstep(&[&push[..], &["-v"]].concat(), "user");
    assert!(pushed.status.success(), "{}", said(&pushed));
    assert!(said(&pushed).contains("is the clock of this machine right"), "{}", said(&pushed));
    assert!(said(&pushed).contains("generation 2 is published"), "{}", said(&pushed));
}

#[test]
fn s14_s16_s17_h54_stock_clients_get_files_and_nothing_else() {
    let server = Server::start(&[]);
    sample(server.at.path());
    fs::write(server.at.path().join("batch"), "put source/big file\nls -l\nget file again\n").unwrap();
    let transferred = server.openssh("sftp", "-P", &["-b", "batch", "sync@127.0.0.1"]);
    assert!(transferred.status.success(), "{}", said(&transferred));
    assert_eq!(fs::read(server.at.path().join("again")).unwrap(), vec![3; 4_000_000]);
    let shell = server.openssh("ssh", "-p", &["sync@127.0.0.1", "id"]);
    assert!(!shell.status.success() && !said(&shell).contains("uid="), "{}", said(&shell));
    let password = server.openssh("ssh", "-p", &["-oPreferredAuthentications=password", "sync@127.0.0.1", "id"]);
    assert!(said(&password).contains("(publickey)"), "{}", said(&password));
    let other_key = server.lockstep(&["push", "source", "sync@127.0.0.1:/x"], "other");
    assert_eq!(other_key.status.code(), Some(3), "{}", said(&other_key));
}

#[test]
fn s08_a_named_policy_of_a_configuration_is_asked_for() {
    let server = Server::start(&[]);
    sample(server.at.path());
    let config = "[[policy.weights.rule]]\nmatch = \"big\"\nmode = \"600\"\n";
    fs::write(server.at.path().join("config.toml"), config).unwrap();
    let push = ["push", "--config", "config.toml", "--policy"];
    let pushed = server.lockstep(&[&push[..], &["weights", "source", "sync@127.0.0.1:/m"]].concat(), "user");
    assert!(pushed.status.success(), "{}", said(&pushed));
    let mode = |path: &str| {
        let metadata = fs::metadata(server.at.path().join(path)).unwrap();
        std::os::unix::fs::PermissionsExt::mode(&metadata.permissions()) & 0o7777
    };
    assert_eq!(mode("root/m/big"), 0o600);
    assert_eq!(mode("root/m/sub/1"), mode("source/sub/1"));
    let unknown = server.lockstep(&[&push[..], &["nothing", "source", "sync@127.0.0.1:/m"]].concat(), "user");
    assert_eq!(unknown.status.code(), Some(2), "{}", said(&unknown));
}

#[test]
fn s16_who_comes_from_elsewhere_and_who_may_only_read() {
    let elsewhere = Server::start(&["--from", "192.0.2.0/24"]);
    sample(elsewhere.at.path());
    let refused = elsewhere.lockstep(&["push", "source", "sync@127.0.0.1:/x"], "user");
    // No user may come from here: nothing is exchanged.
    assert_eq!(refused.status.code(), Some(75), "{}", said(&refused));
    let reading = Server::start(&["--read-only"]);
    sample(reading.at.path());
    let refused = reading.lockstep(&["push", "source", "sync@127.0.0.1:/x"], "user");
    assert!(!refused.status.success() && said(&refused).contains("do not include 'write'"), "{}", said(&refused));
    assert!(!reading.at.path().join("root/x").exists());
}

#[test]
fn s21_a_reader_sees_the_old_or_the_new_weights_and_nothing_between() {
    use std::sync::atomic::{AtomicBool, Ordering};
    let server = Server::start(&[]);
    fs::create_dir(server.at.path().join("source")).unwrap();
    let weights = |version: u8| vec![version; 3_000_000];
    let push = |version: u8| {
        fs::write(server.at.path().join("source/model.ckpt"), weights(version)).unwrap();
        let pushed = server.lockstep(&["push", "source", "sync@127.0.0.1:/models"], "user");
        assert!(pushed.status.success(), "{}", said(&pushed));
    };
    push(1);
    let stop = AtomicBool::new(false);
    let seen = std::thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let mut seen = std::collections::BTreeSet::new();
            while !stop.load(Ordering::Relaxed) {
                let data = fs::read(server.at.path().join("root/models/model.ckpt")).unwrap();
                assert!(data == weights(data[0]), "{} bytes, a mix", data.len());
                seen.insert(data[0]);
            }
            seen
        });
        (2..5).for_each(push);
        stop.store(true, Ordering::Relaxed);
        reader.join().unwrap()
    });
    assert!(seen.contains(&1) && seen.len() > 1, "{seen:?}");
}
