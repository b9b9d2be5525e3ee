//! Who may log in to `lockstep serve`, from where, and what they may do then: with OpenSSH's clients.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::process::Command;

use crate::kit::served::{Served, user, write};
use crate::kit::{keygen, text as said, until};

#[test]
fn s16_a_user_comes_in_only_from_the_ranges_given_for_him() {
    let served = Served::with(
        &["near", "far", "any"],
        |_| String::new(),
        "",
        |at| {
            [
                user(at, "near", "from = ['10.0.0.0/8', '127.0.0.0/8']"),
                user(at, "far", "from = ['192.168.1.0/24']"),
                user(at, "any", "from = ['*', '!127.0.0.1']"),
            ]
            .concat()
        },
    );
    assert!(served.sftp("near", "near", "ls\n").status.success());
    for name in ["far", "any"] {
        let refused = served.sftp(name, name, "ls\n");
        assert!(said(&refused).contains("Permission denied (publickey)"), "{}", said(&refused));
        served.wait_for(&format!("user {name}, SHA256:"));
    }
    assert!(served.log().contains("the user may not come from this address"), "{}", served.log());
    // One user's key is none of another's.
    let wrong = served.sftp("near", "far", "ls\n");
    assert!(!wrong.status.success());
    served.wait_for("the key is not listed");
}

#[test]
fn s16_allow_and_deny_say_who_may_come_from_where_and_deny_wins() {
    let served = Served::with(
        &["sync", "backup"],
        |_| "allow = ['sync@127.0.0.0/16', '*@127.7.0.0/16']\ndeny = ['sync@127.0.0.9', '127.7.7.0/24']".to_owned(),
        "",
        |at| [user(at, "sync", ""), user(at, "backup", "from = ['127.7.0.0/16']")].concat(),
    );
    let from = |name: &str, address: &str| {
        let mut sftp = served.client("sftp", "-P", name);
        sftp.args(["-b", "/dev/null", "-o"]).arg(format!("BindAddress={address}"));
        sftp.arg(format!("{name}@127.0.0.1")).output().unwrap()
    };
    for (name, address, admitted) in [
        ("sync", "127.0.0.1", true),
        ("sync", "127.0.0.9", false),
        ("sync", "127.7.0.1", true),
        ("backup", "127.0.0.1", false),
        ("backup", "127.7.0.1", true),
        ("backup", "127.7.7.1", false),
        ("sync", "127.8.0.1", false),
    ] {
        let output = from(name, address);
        assert_eq!(output.status.success(), admitted, "{name} from {address}: {}", said(&output));
    }
    // Before a key is looked at; and where nobody may come from nothing is said at all.
    served.wait_for("'allow' and 'deny' do not admit the user from this address");
    served.wait_for("no user may come from this address");
    let first = |address: [u8; 4]| {
        use rustix::net::{AddressFamily, SocketType, bind, connect, socket};
        let stream = socket(AddressFamily::INET, SocketType::STREAM, None).unwrap();
        bind(&stream, &std::net::SocketAddr::from((address, 0))).unwrap();
        connect(&stream, &std::net::SocketAddr::from(([127, 0, 0, 1], served.port))).unwrap();
        let mut stream = std::net::TcpStream::from(stream);
        let mut bytes = [0; 8];
        std::io::Read::read(&mut stream, &mut bytes).map_or(0, |count| count)
    };
    assert_eq!((first([127, 8, 0, 1]), first([127, 7, 7, 1])), (0, 0));
    assert!(first([127, 0, 0, 1]) > 0);
    // What a reload does not understand changes nothing; what it does, it does at once.
    served.reload("'sync@127.0.0.9'", "'sync@127.0.0.9/8'");
    served.wait_for("write 127.0.0.0/8");
    assert!(!from("sync", "127.0.0.9").status.success() && from("sync", "127.0.0.1").status.success());
    served.reload("'sync@127.0.0.9/8'", "'sync@127.0.0.1'");
    assert!(from("sync", "127.0.0.9").status.success() && !from("sync", "127.0.0.1").status.success());
}

#[test]
fn h51_an_entry_of_allow_or_deny_that_cannot_be_resolved_ends_the_start_with_its_place() {
    for (lists, place, part) in [
        (
            "allow = ['sync@127.0.0.0/8',\n         'sync@10.1.1.1/8']",
            ":4:9:",
            "'10.1.1.1/8' is not an address range: 10.1.1.1 is in the middle of it; write 10.0.0.0/8",
        ),
        ("deny = ['sync@gpu01']", ":4:8:", "not looked up"),
        ("deny = ['snyc@10.0.0.0/8']", ":1:1:", "there is no user 'snyc'; did you mean 'sync'?"),
        ("allow = ['*@2001:db8::/200']", ":4:9:", "at most 128 bits"),
    ] {
        let at = tempfile::tempdir().unwrap();
        let config = at.path().join("config.toml");
        let head = format!("[serve]\nlisten = '127.0.0.1:0'\nhost_key = '/x'\n{lists}\n");
        write(&config, &format!("{head}{}", user(at.path(), "sync", "")));
        let output =
            Command::new(env!("CARGO_BIN_EXE_lockstep")).arg("serve").arg("--config").arg(&config).output().unwrap();
        let text = said(&output);
        assert_eq!(output.status.code(), Some(2), "{text}");
        assert!(text.contains(&format!("config.toml{place}")) && text.contains(part), "{place} {part}: {text}");
    }
}

#[test]
fn s16_a_key_is_good_only_from_where_its_line_says() {
    let served = Served::start("", "");
    let key = fs::read_to_string(served.path("sync.keys")).unwrap();
    for (from, admitted) in
        [("127.0.0.0/8", true), ("192.0.2.0/24", false), ("127.0.0.0/8,!127.0.0.1", false), ("127.0.0.?", true)]
    {
        write(&served.path("sync.keys"), &format!("from=\"{from}\" {key}"));
        let output = served.sftp("sync", "sync", "pwd\n");
        assert_eq!(output.status.success(), admitted, "{from}: {}", said(&output));
        if !admitted {
            served.wait_for(&format!("from=\\\"{from}\\\" does not admit 127.0.0.1"));
        }
    }
}

#[test]
fn h51_a_range_that_cannot_be_resolved_ends_the_start() {
    let at = tempfile::tempdir().unwrap();
    let config = at.path().join("config.toml");
    let text =
        format!("[serve]\nlisten = '127.0.0.1:0'\nhost_key = '/x'\n{}", user(at.path(), "u", "from = ['10.1.1.1/8']"));
    write(&config, &text);
    let output =
        Command::new(env!("CARGO_BIN_EXE_lockstep")).arg("serve").arg("--config").arg(&config).output().unwrap();
    assert_eq!(output.status.code(), Some(2), "{}", said(&output));
    assert!(
        said(&output).contains("config.toml:8:8: '10.1.1.1/8'") && said(&output).contains("10.0.0.0/8"),
        "{}",
        said(&output)
    );
    // In a file of keys it refuses the key.
    let served = Served::start("", "");
    let key = fs::read_to_string(served.path("sync.key.pub")).unwrap();
    for (options, part) in [("from=\"gpu01\"", "not looked up"), ("from=\"127.0.0.0/8,!gpu01\"", "not looked up")] {
        write(&served.path("sync.keys"), &format!("{options} {key}"));
        assert!(!served.sftp("sync", "sync", "ls\n").status.success());
        served.wait_for(part);
    }
    write(&served.path("sync.keys"), &format!("from=\"127.0.0.0/8\",restrict {key}"));
    assert!(served.sftp("sync", "sync", "ls\n").status.success());
}

#[test]
fn s17_nothing_but_keys_is_offered() {
    let served = Served::start("", "");
    keygen(served.at(), &["-t", "ed25519", "-N", "", "-f", "stranger.key"]);
    let mut ssh = served.client("ssh", "-p", "stranger");
    ssh.args(["-v", "-oBatchMode=no", "-oPreferredAuthentications=password,keyboard-interactive,publickey"]);
    let output = ssh.args(["sync@127.0.0.1", "true"]).env("SSH_ASKPASS_REQUIRE", "never").output().unwrap();
    let offers: Vec<String> =
        said(&output).lines().filter(|line| line.contains("can continue")).map(str::to_owned).collect();
    assert!(!offers.is_empty() && offers.iter().all(|line| line.trim().ends_with("continue: publickey")), "{offers:?}");
    assert!(said(&output).contains("Permission denied (publickey)"), "{}", said(&output));
}

#[test]
fn h50_a_file_of_keys_that_others_can_write_lets_nobody_in() {
    let served = Served::start("", "");
    let mode = |path: &str, mode| fs::set_permissions(served.path(path), fs::Permissions::from_mode(mode)).unwrap();
    mode("sync.keys", 0o666);
    assert!(!served.sftp("sync", "sync", "ls\n").status.success());
    served.wait_for("can be written by others (mode 666); run: chmod go-w");
    mode("sync.keys", 0o600);
    mode(".", 0o777);
    assert!(!served.sftp("sync", "sync", "ls\n").status.success());
    served.wait_for("can be written by others (mode 777)");
    mode(".", 0o700);
    assert!(served.sftp("sync", "sync", "ls\n").status.success());
}

#[test]
fn a_key_that_is_bound_to_something_else_is_refused_and_lines_that_cannot_be_read_are_named() {
    let served = Served::start("", "");
    let key = fs::read_to_string(served.path("sync.key.pub")).unwrap();
    for (options, part) in [
        ("command=\"/usr/bin/rsync --server\"", "is not a file server"),
        ("expiry-time=\"20200101Z\"", "the key expired at 20200101Z"),
        ("tunnel=\"1\"", "option tunnel is not understood"),
        ("cert-authority", "listed as an authority"),
    ] {
        write(&served.path("sync.keys"), &format!("{options} {key}"));
        assert!(!served.sftp("sync", "sync", "ls\n").status.success(), "{options}");
        served.wait_for(part);
    }
    write(&served.path("sync.keys"), &format!("command=\"internal-sftp -R\" {key}"));
    fs::write(served.path("sync/file"), "x").unwrap();
    assert!(served.sftp("sync", "sync", "get file there\n").status.success());
    assert!(!served.sftp("sync", "sync", "rm file\n").status.success());
    assert!(served.path("sync/file").exists());
    write(&served.path("sync.keys"), "# comment\nssh-ed25519 AAAA broken\n");
    served.reload_as_it_is();
    served.wait_for("sync.keys, line 2 is left out");
    assert!(!served.sftp("sync", "sync", "ls\n").status.success());
    served.wait_for("the key is not listed (unreadable lines: 2)");
}

#[test]
fn only_files_are_served() {
    let served = Served::start("", "");
    let ssh = |more: &[&str]| {
        let output = served.ssh("sync", more);
        (output.status.success(), said(&output))
    };
    let to = "sync@127.0.0.1";
    for (arguments, logged) in [
        (vec![to], "\"a shell\""),
        (vec!["-tt", to], "\"a terminal\""),
        (vec![to, "id"], "detail=\"id\""),
        (vec![to, "scp -t /"], "detail=\"scp -t /\""),
        (vec!["-s", to, "netconf"], "detail=\"netconf\""),
        (vec!["-W", "127.0.0.1:22", to], "detail=\"to 127.0.0.1:22\""),
        (vec!["-A", "-oForwardAgent=yes", to, "id"], "detail=\"id\""),
        (vec!["-oExitOnForwardFailure=yes", "-R", "127.0.0.1:0:127.0.0.1:22", "-N", to], "on 127.0.0.1:0"),
        (vec!["-oExitOnForwardFailure=yes", "-R", "/tmp/never:127.0.0.1:22", "-N", to], "/tmp/never"),
        (vec!["-oSetEnv=LD_PRELOAD=/x", to, "id"], "detail=\"id\""),
    ] {
        let (good, said) = ssh(&arguments);
        assert!(!good && !said.contains("uid="), "{arguments:?}: {said}");
        served.wait_for(logged);
    }
    // The server's environment is not a client's to change, and files still are served.
    assert!(served.sftp("sync", "sync", "ls\n").status.success());
}

#[test]
fn h50_what_others_could_have_written_or_read_keeps_the_server_from_starting() {
    let mut served = Served::start("", "");
    served.signal(rustix::process::Signal::TERM);
    served.ended();
    let config = served.path("config.toml");
    let start = || {
        let mut serve = Command::new("timeout");
        serve.args(["20", env!("CARGO_BIN_EXE_lockstep"), "serve", "--config"]).arg(&config);
        serve.output().unwrap()
    };
    let mode = |path: &str, mode| fs::set_permissions(served.path(path), fs::Permissions::from_mode(mode)).unwrap();
    for (path, bad, good, advice) in [
        ("config.toml", 0o666, 0o600, "chmod go-w"),
        ("config.toml", 0o620, 0o600, "chmod go-w"),
        ("host", 0o640, 0o600, "chmod"),
        ("host", 0o604, 0o600, "chmod"),
    ] {
        mode(path, bad);
        let output = start();
        assert_eq!(output.status.code(), Some(2), "{path} {bad:o}: {}", said(&output));
        assert!(said(&output).contains(path) && said(&output).contains(advice), "{path} {bad:o}: {}", said(&output));
        mode(path, good);
    }
    // One who only sends refuses such a configuration too.
    mode("config.toml", 0o666);
    let config = config.to_str().unwrap();
    let pushed = served.lockstep(&["push", "--config", config, "--policy", "p", "sync", "sync@127.0.0.1:/x"], "sync");
    assert_eq!(pushed.status.code(), Some(2), "{}", said(&pushed));
    assert!(said(&pushed).contains("chmod go-w"), "{}", said(&pushed));
}

#[test]
fn s23_many_parties_each_in_a_directory_of_his_own() {
    let names = ["alice", "bob", "carol"];
    let served = Served::with(&names, |_| String::new(), "", |at| names.map(|name| user(at, name, "")).concat());
    for name in names {
        fs::create_dir(served.path(&format!("from-{name}"))).unwrap();
        for number in 0..20 {
            fs::write(served.path(&format!("from-{name}/{number}")), format!("{name} {number}")).unwrap();
        }
    }
    fs::write(served.path("bob/secret"), "of bob").unwrap();
    std::thread::scope(|scope| {
        for name in names {
            let served = &served;
            scope.spawn(move || {
                let pushed =
                    served.lockstep(&["push", &format!("from-{name}"), &format!("{name}@127.0.0.1:/gradients")], name);
                assert!(pushed.status.success(), "{}", said(&pushed));
            });
        }
    });
    for name in names {
        assert_eq!(fs::read_to_string(served.path(&format!("{name}/gradients/7"))).unwrap(), format!("{name} 7"));
    }
    // What is above, and what links lead to, is out of reach.
    std::os::unix::fs::symlink(served.path("bob"), served.path("alice/link")).unwrap();
    let absolute = served.path("bob/secret").display().to_string();
    for path in ["../bob/secret", "/../../bob/secret", "link/secret", &absolute] {
        let got = served.sftp("alice", "alice", &format!("get {path} stolen\n"));
        assert!(!got.status.success() && !served.path("stolen").exists(), "{path}: {}", said(&got));
    }
    let pulled = served.lockstep(&["pull", "alice@127.0.0.1:../bob", "stolen"], "alice");
    assert!(!pulled.status.success() && !served.path("stolen").exists(), "{}", said(&pulled));
}

#[test]
fn s27_h55_certificates_of_an_authority_and_each_refusal_in_the_log() {
    let served = Served::start("", "");
    for name in ["ca", "otherca", "alice.key"] {
        keygen(served.at(), &["-t", "ed25519", "-N", "", "-f", name]);
    }
    let authority = fs::read_to_string(served.path("ca.pub")).unwrap();
    write(&served.path("sync.keys"), &format!("cert-authority,principals=\"trainers,sync\" {authority}"));
    let sign = |name: &str, arguments: &[&str]| {
        let key = format!("{name}.key");
        fs::copy(served.path("alice.key"), served.path(&key)).unwrap();
        fs::copy(served.path("alice.key.pub"), served.path(&format!("{key}.pub"))).unwrap();
        keygen(served.at(), &[&["-I", name], arguments, &[&format!("{key}.pub")]].concat());
    };
    let come = |name: &str| served.sftp("sync", name, "ls\n");
    sign("good", &["-s", "ca", "-n", "trainers", "-z", "42"]);
    let output = come("good");
    assert!(output.status.success(), "{}", said(&output));
    served.wait_for("certificate 'good' (serial 42) of SHA256:");
    let cases = [
        (&["-s", "otherca", "-n", "sync"][..], "the certificate's authority SHA256:"),
        (&["-s", "ca", "-n", "ops"], "it is for ops, not for trainers or sync"),
        (&["-s", "ca"], "it is for nobody"),
        (&["-s", "ca", "-n", "sync", "-O", "source-address=192.0.2.0/24"], "does not admit 127.0.0.1"),
        (&["-s", "ca", "-n", "sync", "-O", "force-command=/bin/sh"], "is not a file server"),
        (&["-s", "ca", "-n", "sync", "-O", "critical:strange@example.org=x"], "strange@example.org is not understood"),
        (&["-s", "ca", "-n", "sync", "-O", "verify-required"], "verify-required is not understood"),
        (&["-s", "ca", "-n", "sync", "-V", "20200101:20200102"], "the certificate has expired or is not valid yet"),
        (&["-s", "ca", "-n", "sync", "-V", "20990101:20990102"], "the certificate has expired or is not valid yet"),
    ];
    std::thread::scope(|scope| {
        for (number, (arguments, _)) in cases.iter().enumerate() {
            let (sign, come) = (&sign, &come);
            scope.spawn(move || {
                sign(&format!("bad{number}"), arguments);
                assert!(!come(&format!("bad{number}")).status.success(), "{arguments:?}");
            });
        }
    });
    for (_, part) in cases {
        served.wait_for(part);
    }
    until("both dates", || served.log().matches("has expired or is not valid yet").count() == 2);
    // Read-only by the certificate.
    fs::write(served.path("sync/file"), "x").unwrap();
    sign(
        "reads",
        &["-s", "ca", "-n", "sync", "-O", "force-command=internal-sftp -R", "-O", "source-address=127.0.0.0/8"],
    );
    assert!(come("reads").status.success());
    assert!(!served.sftp("sync", "reads", "rm file\n").status.success());
    assert!(served.path("sync/file").exists());
}

#[test]
fn s27_the_server_shows_a_certificate_too() {
    let made = |at: &std::path::Path, sign: &[&str]| {
        keygen(at, &["-t", "ed25519", "-N", "", "-f", "hostca"]);
        keygen(at, &["-t", "ed25519", "-N", "", "-f", "host"]);
        keygen(at, &[&["-s", "hostca", "-I", "gpu02"], sign, &["host.pub"]].concat());
    };
    let serve = |at: &std::path::Path| format!("host_certificate = '{}/host-cert.pub'", at.display());
    let served = Served::with(
        &["sync"],
        |at| {
            made(at, &["-h", "-n", "127.0.0.1"]);
            serve(at)
        },
        "",
        |at| user(at, "sync", ""),
    );
    let authority = fs::read_to_string(served.path("hostca.pub")).unwrap();
    // Only the authority is known, not the key.
    write(&served.path("known"), &format!("@cert-authority [127.0.0.1]:* {authority}"));
    let listed = served.sftp("sync", "sync", "ls\n");
    assert!(listed.status.success(), "{}", said(&listed));
    // One that does not fit ends the start.
    let at = tempfile::tempdir().unwrap();
    made(at.path(), &["-n", "127.0.0.1"]);
    fs::create_dir(at.path().join("u")).unwrap();
    let head = format!("[serve]\nlisten = '127.0.0.1:0'\nhost_key = '{}/host'\n", at.path().display());
    write(&at.path().join("config"), &format!("{head}{}\n{}", serve(at.path()), user(at.path(), "u", "")));
    let mut start = Command::new(env!("CARGO_BIN_EXE_lockstep"));
    let output = start.args(["serve", "--config"]).arg(at.path().join("config")).output().unwrap();
    assert_eq!(output.status.code(), Some(2), "{}", said(&output));
    assert!(said(&output).contains("it is a user's"), "{}", said(&output));
}

#[test]
fn h56_a_revoked_key_is_refused_and_its_open_sessions_end() {
    let served = Served::with(
        &["sync", "other"],
        |at| {
            write(&at.join("revoked"), "# none\n");
            format!("revoked_keys = '{}'", at.join("revoked").display())
        },
        "",
        |at| user(at, "sync", "") + &user(at, "other", ""),
    );
    let mut held = served.hold("sync", &[]);
    let mut other = served.hold("other", &[]);
    assert!(held.speaks() && other.speaks());
    fs::copy(served.path("sync.key.pub"), served.path("revoked")).unwrap();
    // From the next login on, without a word to the server.
    assert!(!served.sftp("sync", "sync", "ls\n").status.success());
    served.wait_for("the key is revoked");
    // And soon the session that is open, without one either.
    let last_words = held.ended();
    assert!(last_words.contains("the key is revoked"), "{last_words}");
    // A list that cannot be read refuses everybody, and is not loaded.
    fs::write(served.path("revoked"), "rubbish\n").unwrap();
    assert!(!served.sftp("other", "other", "ls\n").status.success());
    served.wait_for("line 1 is neither a public key nor SHA256:");
    served.wait_for("open sessions stay until the list can be read");
    served.reload_as_it_is();
    served.wait_for("not reloaded");
    assert!(other.speaks() || other.0.try_wait().unwrap().is_none());
}

#[test]
fn a_reload_ends_who_is_no_longer_listed_and_lets_others_go_on() {
    let served = Served::with(
        &["gone", "unlisted", "changed", "stays"],
        |_| String::new(),
        "",
        |at| ["gone", "unlisted", "changed", "stays"].map(|name| user(at, name, "")).concat(),
    );
    let mut held: Vec<_> = ["gone", "unlisted", "changed", "stays"].map(|name| served.hold(name, &[])).into();
    assert!(held.iter_mut().all(|held| held.speaks()));
    write(&served.path("unlisted.keys"), "");
    let changed = user(served.at(), "changed", "");
    let config = fs::read_to_string(served.path("config.toml")).unwrap();
    let config = config
        .replace(&user(served.at(), "gone", ""), "")
        .replace(&changed, &user(served.at(), "changed", "read_only = true"));
    write(&served.path("config.toml"), &config);
    served.reload_as_it_is();
    for (held, part) in held.iter_mut().zip(["there is no such user", "is not listed", "settings have changed"]) {
        let last_words = held.ended();
        assert!(last_words.contains(part), "{part}: {last_words}");
    }
    assert!(held[3].0.try_wait().unwrap().is_none());
    assert!(served.sftp("stays", "stays", "ls\n").status.success());
    // The same key, but from now on for reading alone.
    let key = fs::read_to_string(served.path("stays.key.pub")).unwrap();
    write(&served.path("stays.keys"), &format!("command=\"internal-sftp -R\" {key}"));
    served.reload_as_it_is();
    assert!(held[3].ended().contains("settings have changed"));
    assert!(!served.sftp("changed", "changed", "mkdir x\n").status.success());
    // A configuration with a mistake changes nothing.
    served.reload("[serve.limits]", "[serve.limits]\nnonsense = 1");
    served.wait_for("unknown key 'nonsense'");
    assert!(served.sftp("stays", "stays", "ls\n").status.success());
}

#[test]
fn s13_the_record_names_who_sent_what_from_where_with_which_key() {
    let mut served = Served::recording();
    keygen(served.at(), &["-t", "ed25519", "-N", "", "-f", "stranger.key"]);
    fs::create_dir(served.path("source")).unwrap();
    fs::write(served.path("source/weights"), "w").unwrap();
    assert!(served.lockstep(&["push", "source", "sync@127.0.0.1:/m"], "sync").status.success());
    assert!(!served.sftp("sync", "stranger", "ls\n").status.success());
    assert!(!served.ssh("sync", &["sync@127.0.0.1", "id"]).status.success());
    let fingerprint =
        Command::new("ssh-keygen").args(["-lf"]).arg(served.path("sync.key.pub")).output().unwrap().stdout;
    let fingerprint = String::from_utf8(fingerprint).unwrap().split(' ').nth(1).unwrap().to_owned();
    let who = format!("sync@127.0.0.1 ({fingerprint})");
    // At the root: what was published, and by whom, whatever the sender says of itself.
    let published = fs::read_to_string(served.path("sync/m/.lockstep/audit.jsonl")).unwrap();
    let line = published.lines().find(|line| line.contains("\"path\":\"weights\"")).unwrap();
    assert!(line.contains(&format!("\"actor\":\"{who}, who says ")), "{line}");
    // At the server: logins, sessions, refusals.
    let log = served.path("record/.lockstep/audit.jsonl");
    let record = || fs::read_to_string(&log).unwrap();
    until("the records", || record().matches("\"action\":\"refuse\"").count() == 2 && record().contains("\"session\""));
    let find = |action: &str, part: &str| {
        let action = format!("\"action\":\"{action}\"");
        record().lines().any(|line| line.contains(&action) && line.contains(part))
    };
    assert!(find("login", &format!("\"actor\":\"{who}\",\"source\":\"127.0.0.1:")), "{}", record());
    assert!(find("session", "received "), "{}", record());
    assert!(find("refuse", "user sync, SHA256:") && find("refuse", "a command: id"), "{}", record());
    // Who was refused is found by what he showed, and by the name that he gave.
    let shown = |more: &[&str]| {
        let mut show = Command::new(env!("CARGO_BIN_EXE_lockstep"));
        let output = show.args(["audit", "show", "--action", "refuse"]).args(more).arg(served.path("record"));
        String::from_utf8(output.output().unwrap().stdout).unwrap().matches("user sync, SHA256:").count()
    };
    let stranger =
        Command::new("ssh-keygen").args(["-lf"]).arg(served.path("stranger.key.pub")).output().unwrap().stdout;
    let stranger = String::from_utf8(stranger).unwrap().split(' ').nth(1).unwrap().to_owned();
    assert_eq!((shown(&["--actor", &stranger]), shown(&["--actor", "sync@127.0.0.1"])), (1, 1), "{}", record());
    assert_eq!(shown(&["--actor", &fingerprint]), 0, "{}", record());
    let verified =
        Command::new(env!("CARGO_BIN_EXE_lockstep")).args(["audit", "verify"]).arg(served.path("record")).output();
    assert!(verified.unwrap().status.success());
    // What is written at the last moment is written.
    let sessions = || record().matches("\"action\":\"session\"").count();
    let before = sessions();
    let mut held = served.hold("sync", &[]);
    assert!(held.speaks());
    served.signal(rustix::process::Signal::TERM);
    assert_eq!(served.ended(), Some(0));
    assert_eq!(sessions(), before + 1, "{}", record());
}

#[test]
fn s13_without_a_record_nobody_comes_in() {
    let served = Served::recording();
    assert!(served.sftp("sync", "sync", "ls\n").status.success());
    fs::rename(served.path("record/.lockstep"), served.path("record/elsewhere")).unwrap();
    fs::write(served.path("record/.lockstep"), "in the way").unwrap();
    assert!(!served.sftp("sync", "sync", "ls\n").status.success());
    served.wait_for("the audit log cannot be written");
}
