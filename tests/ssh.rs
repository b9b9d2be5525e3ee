//! Push and pull through OpenSSH's server on loopback, with keys and a configuration of its own: who is believed, who
//! is let in, and by which way.

use std::fs;
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

use crate::kit::sshd::Sshd;
use crate::kit::{account, assert_same, done, ends, keygen, proxy, public, text};

fn sample(at: &Path) {
    fs::create_dir_all(at.join("checkpoint-1/shards")).unwrap();
    fs::create_dir(at.join("empty")).unwrap();
    for number in 0..300 {
        fs::write(at.join(format!("checkpoint-1/shards/{number}.txt")), format!("{number}").repeat(number)).unwrap();
    }
    fs::write(at.join("checkpoint-1/model.safetensors"), vec![5; 5_000_000]).unwrap();
    fs::write(at.join("train.py"), "print('x')\n").unwrap();
    fs::set_permissions(at.join("train.py"), fs::Permissions::from_mode(0o755)).unwrap();
    std::os::unix::fs::symlink("checkpoint-1", at.join("latest")).unwrap();
}

#[test]
fn s15_s17_s19_s29_push_and_pull_through_a_subsystem_of_sshd() {
    let sshd = Sshd::start();
    sample(&sshd.path("source"));
    let source = sshd.path("source").display().to_string();
    let pushed = sshd.lockstep(&["push", "-v", &source, &sshd.remote("target")]);
    assert!(pushed.status.success(), "{}", text(&pushed));
    assert!(text(&pushed).contains("subsystem"), "{}", text(&pushed));
    assert_same(&sshd.path("source"), &sshd.path("target"));

    let again = sshd.lockstep(&["push", "-i", &source, &sshd.remote("target")]);
    assert!(again.status.success() && text(&again).contains("nothing to do"), "{}", text(&again));

    // s19: pull, then check.
    let copy = sshd.path("copy").display().to_string();
    let pulled = sshd.lockstep(&["pull", &sshd.remote("target"), &copy]);
    assert!(pulled.status.success(), "{}", text(&pulled));
    assert_same(&sshd.path("source"), &sshd.path("copy"));
    let verified = Command::new(env!("CARGO_BIN_EXE_lockstep")).args(["manifest", "verify", &copy]).output().unwrap();
    assert!(verified.status.success(), "{}", text(&verified));
    fs::write(sshd.path("copy/train.py"), "print('y')\n").unwrap();
    let verified = Command::new(env!("CARGO_BIN_EXE_lockstep")).args(["manifest", "verify", &copy]).output().unwrap();
    assert_eq!(verified.status.code(), Some(1), "{}", text(&verified));
}

#[test]
fn h52_an_unknown_host_is_refused_and_a_wrong_key_too() {
    let sshd = Sshd::start();
    sample(&sshd.path("source"));
    let source = sshd.path("source").display().to_string();
    let known = fs::read(sshd.path("known")).unwrap();
    fs::write(sshd.path("known"), "").unwrap();
    let unknown = sshd.lockstep(&["push", &source, &sshd.remote("target")]);
    assert_eq!(unknown.status.code(), Some(3), "{}", text(&unknown));
    fs::write(sshd.path("known"), known).unwrap();
    fs::write(sshd.path("authorized"), "").unwrap();
    let refused = sshd.lockstep(&["push", &source, &sshd.remote("target")]);
    assert_eq!(refused.status.code(), Some(3), "{}", text(&refused));
    assert!(!sshd.path("target").exists());
}

#[test]
fn h53_a_changed_or_revoked_host_key_is_refused_loudly() {
    let sshd = Sshd::start();
    let (port, host) = (sshd.port, public(&sshd.path("host.pub")));
    let other = public(&sshd.path("user.pub"));
    let with = |known: String| {
        fs::write(sshd.path("known"), known).unwrap();
        let port = port.to_string();
        sshd.push(&[
            "-P",
            &port,
            "--identity",
            "user",
            "--known-hosts",
            "known",
            "-o",
            "StrictHostKeyChecking=accept-new",
        ])
    };
    done(&with(format!("[127.0.0.1]:{port} {host}\n")));
    ends(&with(format!("[127.0.0.1]:{port} {other}\n")), 3, &["HOST KEY CHANGED", "known:1", "ssh-keygen -f"]);
    let revoked = format!("[127.0.0.1]:{port} {host}\n@revoked * {host}\n");
    ends(&with(revoked), 3, &["REVOKED HOST KEY", "known:2"]);
    assert_eq!(fs::read_to_string(sshd.path("known")).unwrap().lines().count(), 2);
}

#[test]
fn h53_a_host_key_that_a_list_revokes_is_refused() {
    let sshd = Sshd::start();
    let port = sshd.port.to_string();
    let at = sshd.path("revoked-hosts");
    let push = |keyword: &str| {
        let option = format!("RevokedHostKeys={keyword}");
        sshd.push(&["-P", &port, "--identity", "user", "--known-hosts", "known", "-o", &option])
    };
    let list = at.to_str().unwrap();
    // Where the list cannot be read no host is trusted, as with ssh.
    ends(&push(list), 3, &["RevokedHostKeys: cannot read", "revoked-hosts"]);
    keygen(sshd.at.path(), &["-q", "-k", "-f", list, "user.pub"]);
    done(&push(list));
    keygen(sshd.at.path(), &["-q", "-k", "-u", "-f", list, "host.pub"]);
    ends(&push(list), 3, &["REVOKED HOST KEY: the key is revoked", "revoked-hosts"]);
    fs::write(&at, format!("# by hand\n{}\n", public(&sshd.path("host.pub")))).unwrap();
    ends(&push(list), 3, &["REVOKED HOST KEY"]);
    done(&push("none"));
    fs::write(&at, "nonsense\n").unwrap();
    ends(&push(list), 3, &["line 1 is neither a public key nor SHA256:"]);
}

#[test]
fn h52_a_line_that_leaves_a_host_out_does_not_vouch_for_it() {
    let sshd = Sshd::start();
    let port = sshd.port.to_string();
    let key = public(&sshd.path("host.pub"));
    let options = ["-P", &port, "--identity", "user", "--known-hosts", "known"];
    for (hosts, trusted) in [
        ("*".to_owned(), true),
        // ssh looks for the name without the port as well.
        (format!("*,![127.0.0.1]:{port},!127.0.0.1"), false),
        ("!*127.0.0.1*,*".to_owned(), false),
        (format!("*,!*]:{port},!127.*"), false),
        (format!("[127.0.0.?]:{port},![127.0.0.2]:{port}"), true),
    ] {
        fs::write(sshd.path("known"), format!("{hosts} {key}\n")).unwrap();
        let stock = Command::new("ssh")
            .current_dir(sshd.at.path())
            .args(["-F", "none", "-i", "user", "-p", &port, "-oBatchMode=yes", "-oUserKnownHostsFile=known"])
            .args(["-oGlobalKnownHostsFile=none", "-oStrictHostKeyChecking=yes", "-oIdentitiesOnly=yes"])
            .args([&format!("{}@127.0.0.1", account()), "true"])
            .output()
            .unwrap();
        assert_eq!(stock.status.success(), trusted, "ssh: {hosts}: {}", text(&stock));
        let pushed = sshd.push(&options);
        if trusted { done(&pushed) } else { ends(&pushed, 3, &["unknown host key"]) }
    }
}

#[test]
fn h52_a_new_host_is_added_where_that_is_asked_for() {
    let sshd = Sshd::start();
    let known = fs::read_to_string(sshd.path("known")).unwrap();
    fs::remove_file(sshd.path("known")).unwrap();
    let port = sshd.port.to_string();
    let options = ["-P", &port, "--identity", "user", "--known-hosts", "known"];
    let refusal = sshd.push(&options);
    ends(&refusal, 3, &["unknown host key", "keys scan-host --add --fingerprint SHA256:"]);
    assert!(!sshd.path("known").exists());
    done(&sshd.push(&[&options[..], &["-o", "StrictHostKeyChecking=accept-new"]].concat()));
    assert_eq!(fs::read_to_string(sshd.path("known")).unwrap(), known);
    done(&sshd.push(&options));

    // The command of the refusal adds the key, and no other one.
    fs::remove_file(sshd.path("known")).unwrap();
    let said = text(&refusal);
    let command = said.split_once("add it with: lockstep ").unwrap().1.trim();
    let words: Vec<&str> = command.split(' ').collect();
    let wrong: Vec<&str> =
        words.iter().map(|word| if word.starts_with("SHA256:") { "SHA256:x" } else { word }).collect();
    ends(&sshd.run(&wrong), 3, &["no key with the fingerprint SHA256:x"]);
    assert!(!sshd.path("known").exists());
    done(&sshd.run(&words));
    done(&sshd.push(&options));
}

#[test]
fn h50_a_key_that_others_can_read_is_not_used() {
    let sshd = Sshd::start();
    let port = sshd.port.to_string();
    let options = ["-P", &port, "--identity", "user", "--known-hosts", "known"];
    fs::set_permissions(sshd.path("user"), fs::Permissions::from_mode(0o640)).unwrap();
    ends(&sshd.push(&options), 3, &["chmod 600 user"]);
    fs::set_permissions(sshd.path("user"), fs::Permissions::from_mode(0o400)).unwrap();
    done(&sshd.push(&options));
}

#[test]
fn s17_h54_a_host_that_takes_only_passwords_gets_none() {
    let sshd = Sshd::with(|_| "PubkeyAuthentication no\nPasswordAuthentication yes".into());
    let port = sshd.port.to_string();
    let output = sshd.push(&["-P", &port, "--identity", "user", "--known-hosts", "known"]);
    ends(&output, 3, &["takes no keys, only: password", "never", "PubkeyAuthentication yes"]);
    assert!(!sshd.log().contains("password"), "{}", sshd.log());
}

#[test]
fn s26_hosts_are_reached_through_others() {
    let (first, second, target) = (Sshd::start(), Sshd::start(), Sshd::start());
    // Each host has a key of its own to log in with, and one of its own to be known by.
    let known = [&first, &second, &target].map(|sshd| fs::read_to_string(sshd.path("known")).unwrap());
    fs::write(target.path("all"), known.concat()).unwrap();
    let config = |name: &str, known: &str, more: &str| {
        let host = |name: &str, sshd: &Sshd, more: &str| {
            format!(
                "Host {name}\n HostName 127.0.0.1\n Port {}\n IdentityFile {}\n IdentitiesOnly yes\n{more}",
                sshd.port,
                sshd.path("user").display()
            )
        };
        let hosts = [
            host("first", &first, ""),
            host("second", &second, " ProxyJump first\n"),
            host("target", &target, more),
            format!("Host *\n User {}\n UserKnownHostsFile {}\n", account(), target.path(known).display()),
        ];
        fs::write(target.path(name), hosts.concat()).unwrap();
    };
    fs::create_dir(target.path("tree")).unwrap();
    fs::write(target.path("tree/file"), vec![7; 3_000_000]).unwrap();
    let arrived = |options: &[&str]| {
        fs::remove_dir_all(target.path("arrived")).ok();
        let to = format!("target:{}", target.path("arrived").display());
        let output = target.run(&[&["push", "tree", &to], options].concat());
        assert_eq!(output.status.success(), target.path("arrived/file").exists(), "{}", text(&output));
        output
    };
    config("by-file", "all", " ProxyJump second\n");
    done(&arrived(&["-F", "by-file"]));
    // The two on the way have let somebody in; so they were passed through.
    assert!(first.log().contains("Accepted publickey") && second.log().contains("Accepted publickey"));

    config("direct", "all", "");
    let logins = |sshd: &Sshd| sshd.log().matches("Accepted publickey").count();
    let before = (logins(&first), logins(&second));
    done(&arrived(&["-F", "direct", "-J", "first", "--transfers", "1"]));
    assert_eq!((logins(&first), logins(&second)), (before.0 + 1, before.1));

    // Every host on the way has to prove itself.
    fs::write(target.path("some"), [&known[1][..], &known[2]].concat()).unwrap();
    config("untrusted", "some", " ProxyJump second\n");
    ends(&arrived(&["-F", "untrusted"]), 3, &["unknown host key", &format!("[127.0.0.1]:{}", first.port)]);
    let own = target.port.to_string();
    let by_command = format!(
        "ProxyCommand=ssh -F by-file -o BatchMode=yes -W %h:%p first -o UserKnownHostsFile={}",
        target.path("all").display()
    );
    done(&arrived(&["-F", "direct", "-o", &by_command, "-P", &own]));
    ends(&arrived(&["-F", "direct", "-o", "ProxyCommand=false"]), 75, &["handshake failed"]);

    // A host on the way whose key has changed or is revoked is not passed through, though it is not the host itself.
    let hop = format!("[127.0.0.1]:{}", first.port);
    for (line, says) in [
        (known[2].replace(&format!("[127.0.0.1]:{own}"), &hop), "HOST KEY CHANGED"),
        (format!("{}@revoked {}", known[0], known[0]), "REVOKED HOST KEY"),
    ] {
        fs::write(target.path("hop"), [&line[..], &known[1], &known[2]].concat()).unwrap();
        config("by-hop", "hop", " ProxyJump second\n");
        let before = (logins(&first), logins(&second));
        ends(&arrived(&["-F", "by-hop"]), 3, &[says, &hop]);
        assert_eq!((logins(&first), logins(&second)), before, "{says}");
    }
}

#[test]
fn s26_a_command_on_the_way_is_run_without_a_shell() {
    let target = Sshd::start();
    let run = |host: &str, command: &str| {
        let hosts = format!(
            "Host *\n HostName 127.0.0.1\n Port {}\n User {}\n ProxyCommand {command}\n",
            target.port,
            account()
        );
        fs::write(target.path("config"), hosts).unwrap();
        fs::create_dir_all(target.path("tree")).unwrap();
        let to = format!("{host}:{}", target.path("arrived").display());
        target.run(&["push", "tree", &to, "-F", "config", "--identity", "user", "--known-hosts", "known"])
    };
    let witness = target.path("witness");
    let through = "python3 relay.py %h %p";
    let relay = "import os,socket,sys,threading\ns=socket.create_connection((sys.argv[1],int(sys.argv[2])))\n\
                 def up():\n while d:=os.read(0,65536): s.sendall(d)\n s.shutdown(1)\nthreading.Thread(target=up,daemon=True).start()\n\
                 while d:=s.recv(65536): os.write(1,d)\n";
    fs::write(target.path("relay.py"), relay).unwrap();
    done(&run("gpu01", through));
    done(&run("gpu01", &format!("exec {through}")));
    ends(&run("gpu01", "nosuchprogram %h"), 2, &["ProxyCommand 'nosuchprogram 127.0.0.1'", "cannot be started"]);
    ends(&run("gpu01", &format!("A=b {through}")), 2, &["'A=b' sets a variable", "put it into a script"]);
    ends(&run("gpu01", &format!("{through} 2>/dev/null")), 2, &["'>' is for a shell", "put it into a script"]);
    for host in ["x$(touch witness)", "x`touch witness`", "x;touch witness", "x'y", "a\ntouch witness", "a b"] {
        ends(&run(host, "echo %n"), 2, &["cannot be part of a command"]);
        assert!(!witness.exists(), "{host}");
    }
}

#[test]
fn s26_a_host_that_forwards_nothing_says_so() {
    let (bastion, target) = (Sshd::with(|_| "AllowTcpForwarding no".into()), Sshd::start());
    let known = [&bastion, &target].map(|sshd| fs::read_to_string(sshd.path("known")).unwrap());
    fs::write(target.path("all"), known.concat()).unwrap();
    fs::copy(target.path("user.pub"), bastion.path("authorized")).unwrap();
    let (port, jump) = (target.port.to_string(), format!("{}@127.0.0.1:{}", account(), bastion.port));
    let options = ["-P", &port, "-J", &jump, "--identity", "user", "--known-hosts", "all"];
    ends(&target.push(&options), 75, &["AllowTcpForwarding", &bastion.port.to_string()]);
}

#[test]
fn s15_connections_that_sshd_has_no_room_for_are_done_without() {
    // Whoever comes while another logs in is turned away.
    let sshd = Sshd::with(|_| "MaxStartups 1:100:1".into());
    fs::create_dir(sshd.path("source")).unwrap();
    for number in 0..16 {
        fs::write(sshd.path(&format!("source/{number}")), vec![number; 1_000_000]).unwrap();
    }
    fs::write(sshd.path("source/large"), crate::kit::noise(1, 30_000_000)).unwrap();
    for far in ["sftp", "auto"] {
        let to = sshd.remote(far);
        done(&sshd.lockstep(&["push", "source", &to, "--transfers", "8", &format!("--remote={far}")]));
        assert_same(&sshd.path("source"), &sshd.path(far));
    }
}

#[test]
fn h34_a_stall_is_noticed() {
    // Both ends have to notice: as long as the other one does not, its agent keeps the target.
    let sshd = Sshd::with(|_| "ClientAliveInterval 1\nClientAliveCountMax 1".into());
    let left = Arc::new(AtomicUsize::new(3_000_000));
    let port = proxy::swallowing(sshd.port, Arc::clone(&left)).to_string();
    fs::write(sshd.path("known"), format!("[127.0.0.1]:{port} {}\n", public(&sshd.path("host.pub")))).unwrap();
    fs::create_dir(sshd.path("source")).unwrap();
    for number in 0..12 {
        fs::write(sshd.path(&format!("source/{number}")), vec![number; 1_000_000]).unwrap();
    }
    let to = sshd.remote("target");
    let push = |more: &[&str]| {
        let login = ["-P", &port, "--identity", "user", "--known-hosts", "known", "--no-compress"];
        sshd.run(&[&["push", "source", &to], &login[..], more].concat())
    };
    let output = push(&["-o", "ServerAliveInterval=1", "-o", "ServerAliveCountMax=1"]);
    ends(&output, 75, &["the host has stopped answering"]);
    assert!(left.load(SeqCst) == 0 && !sshd.path("target/0").exists());
    // Once the way is free again the next run goes on.
    left.store(usize::MAX, SeqCst);
    done(&push(&["--wait", "60"]));
    assert_same(&sshd.path("source"), &sshd.path("target"));
}

#[test]
fn h34_a_host_that_says_nothing_is_given_up() {
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let sshd = Sshd::start();
    let port = silent.local_addr().unwrap().port().to_string();
    let output = sshd.push(&["-P", &port, "--identity", "user", "--known-hosts", "known", "--connect-timeout", "1"]);
    ends(&output, 75, &["took too long"]);
}

#[test]
fn s14_stock_sftp_works_against_the_server() {
    let at = tempfile::tempdir().unwrap();
    fs::write(at.path().join("local"), vec![9; 300_000]).unwrap();
    fs::create_dir(at.path().join("root")).unwrap();
    let batch = "mkdir dir\nput local dir/file\nrename dir/file dir/renamed\nchmod 640 dir/renamed\nls -l dir\n\
                 get dir/renamed back\nsymlink renamed dir/link\nln dir/renamed dir/hard\nrm dir/link\nbye\n";
    fs::write(at.path().join("batch"), batch).unwrap();
    let server = format!("{} sftp-server --root {}", env!("CARGO_BIN_EXE_lockstep"), at.path().join("root").display());
    let output = Command::new("sftp")
        .current_dir(at.path())
        .args(["-b", "batch", "-D", &server])
        .output()
        .expect("sftp is not installed: Debian package openssh-client");
    assert!(output.status.success(), "{}", text(&output));
    assert_eq!(fs::read(at.path().join("back")).unwrap(), fs::read(at.path().join("local")).unwrap());
    let mode = fs::metadata(at.path().join("root/dir/renamed")).unwrap().permissions().mode();
    assert_eq!(mode & 0o7777, 0o640);
    assert!(text(&output).contains("renamed"));
}
