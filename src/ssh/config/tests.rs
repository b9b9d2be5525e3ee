//! Compared with what OpenSSH makes of the same files.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::process::Command;

use super::*;

const KEYWORDS: &[Keyword] = &[
    Keyword::CertificateFile,
    Keyword::ConnectTimeout,
    Keyword::GlobalKnownHostsFile,
    Keyword::HostKeyAlias,
    Keyword::HostName,
    Keyword::IdentitiesOnly,
    Keyword::IdentityAgent,
    Keyword::IdentityFile,
    Keyword::Port,
    Keyword::ProxyCommand,
    Keyword::ProxyJump,
    Keyword::ServerAliveCountMax,
    Keyword::ServerAliveInterval,
    Keyword::StrictHostKeyChecking,
    Keyword::User,
    Keyword::UserKnownHostsFile,
];

fn environment() -> Environment {
    // OpenSSH takes the home directory from the user database.
    let user = uzers::get_user_by_uid(uzers::get_current_uid()).unwrap();
    Environment { home: uzers::os::unix::UserExt::home_dir(&user).to_owned(), ..Environment::of_process() }
}

/// What `ssh -G` says, for those keywords that we set; several values of one keyword follow each other.
fn theirs(file: &Path, host: &str, options: &[&str]) -> BTreeMap<String, Vec<String>> {
    let output = Command::new("ssh")
        .arg("-G")
        .arg("-F")
        .arg(file)
        .args(options.iter().flat_map(|option| ["-o", option]))
        .arg("--")
        .arg(host)
        .output()
        .expect("ssh is not installed: Debian package openssh-client");
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{host}: {}", String::from_utf8_lossy(&output.stderr));
    let mut found: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for line in text.lines() {
        let (name, value) = line.split_once(' ').unwrap_or((line, ""));
        found.entry(name.to_owned()).or_default().push(value.to_owned());
    }
    found
}

#[track_caller]
fn same(file: &Path, host: &str, options: &[&str]) {
    let mut given = Given { files: Files::One(file.to_owned()), ..Given::default() };
    for option in options {
        given.option(option).unwrap();
    }
    let environment = environment();
    let mut resolver = Resolver { given: &given, environment: &environment, warnings: Vec::new(), notes: Vec::new() };
    let (settings, name) = resolver.settings(host, Settings::default(), false).unwrap();
    let theirs = theirs(file, host, options);
    assert_eq!(theirs["hostname"], [name], "{host}");
    let yes_no = |text: &str| match text {
        "true" => "yes".to_owned(),
        "false" => "no".to_owned(),
        text => text.to_owned(),
    };
    for keyword in KEYWORDS.iter().filter(|keyword| **keyword != Keyword::HostName) {
        let values = settings.all(*keyword);
        let shown = theirs.get(&keyword.name().to_lowercase()).cloned().unwrap_or_default();
        // Defaults are ours to choose.
        if !values.is_empty() {
            let ours: Vec<String> = values.iter().map(|value| yes_no(&value.words.join(" "))).collect();
            let shown: Vec<String> = shown.iter().map(|value| yes_no(value)).collect();
            assert_eq!(ours, shown, "{host}: {}", keyword.name());
        } else if matches!(keyword, Keyword::ProxyJump | Keyword::ProxyCommand | Keyword::HostKeyAlias) {
            assert_eq!(shown, Vec::<String>::new(), "{host}: {}", keyword.name());
        } else if *keyword == Keyword::Port {
            assert_eq!(shown, ["22"], "{host}");
        }
    }
}

#[test]
fn files_mean_what_they_mean_to_openssh() {
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name);
    fs::write(at("10-a.conf"), "Host inc1\n  Port 1001\nHost *\n  ServerAliveCountMax 7\n").unwrap();
    fs::write(at("20-b.conf"), "Port 1002\nUser b\nHost inc2\nUser c\n").unwrap();
    fs::write(at(".hidden.conf"), "User hidden\n").unwrap();
    fs::write(at("nested"), format!("Include {}/20-*.conf\n", directory.path().display())).unwrap();
    let include = |name: &str| format!("Include {}", at(name).display());
    let mine = uzers::get_current_username().unwrap().into_string().unwrap();
    let cases: Vec<(String, &[&str], &[&str])> = vec![
        ("Host a b\n Port 1\nHost *\n Port 2\n User u\n".into(), &["a", "b", "c"], &[]),
        ("Host *.x !bad.x\n HostName %h.example\n Port=3\n".into(), &["a.x", "bad.x", "x"], &[]),
        ("Host !bad *\n User u\nHost a? b*\n User v\n".into(), &["bad", "ab", "bcd", "abc"], &[]),
        ("Host A\n Port 5\nHost a\n Port 6\n".into(), &["A", "a"], &[]),
        ("HostName h.example\nMatch host h.example\n Port 7\nMatch originalhost a\n User w\n".into(), &["a", "b"], &[]),
        ("Match host a,b,!c*\n Port 8\nMatch !host a\n User notA\n".into(), &["a", "b", "cb"], &[]),
        ("User z\nMatch user z\n Port 9\nMatch user y\n Port 10\n".into(), &["a"], &[]),
        (format!("Match localuser {mine}\n Port 11\nMatch localuser nobody-at-all\n User x\n"), &["a"], &[]),
        ("Match all\n Port 12\n".into(), &["a"], &[]),
        ("Host a\n HostName real\nMatch final host real\n Port 13\nHost real\n User fin\n".into(), &["a", "b"], &[]),
        ("Match final all\n User last\nHost a\n HostName b\nMatch host b final\n Port 14\n".into(), &["a"], &[]),
        ("Match !final host a\n Port 15\n".into(), &["a"], &[]),
        ("IdentityFile ~/.ssh/x\nIdentityFile %d/%r\nIdentityFile ~/.ssh/x\nCertificateFile c1\nCertificateFile c2\n".into(), &["a"], &[]),
        ("IdentityFile \"~/with blank\" # said\nIdentitiesOnly yes\nIdentityAgent none\n".into(), &["a"], &[]),
        ("ProxyJump j1,u@j2:22\nProxyCommand none\n".into(), &["a"], &[]),
        ("ProxyCommand nc -X \"a b\" %h %p\nProxyJump j\n".into(), &["a"], &[]),
        ("UserKnownHostsFile /k1 /k2\nUserKnownHostsFile /k3\nGlobalKnownHostsFile /g\nHostKeyAlias al\n".into(), &["a"], &[]),
        ("ConnectTimeout 7\nServerAliveInterval 3\nServerAliveCountMax 2\nStrictHostKeyChecking accept-new\n".into(), &["a"], &[]),
        ("Port=1\nUser = \"u\"\nHost a # b\n IdentitiesOnly=yes\n".into(), &["a", "b"], &["Port=2", "User v"]),
        (format!("Host inc1\n{}\nHost *\n Port 99\n", include("*.conf")), &["inc1", "inc2", "other"], &[]),
        (format!("{}\nPort 99\n", include("*.conf")), &["inc1", "inc2", "other"], &[]),
        (format!("Host no\n{}\nHost *\n Port 98\n", include("nested")), &["inc2", "no"], &[]),
        (format!("{}\n", include("does-not-exist")), &["a"], &[]),
        ("Host a\n  HostName %h.%%x\n".into(), &["a"], &[]),
        ("\t Host\ta\t b \r\n\tPort\t16\r\n".into(), &["a", "b"], &[]),
    ];
    for (number, (text, hosts, options)) in cases.iter().enumerate() {
        let file = at(&format!("config{number}"));
        fs::write(&file, text).unwrap();
        for host in *hosts {
            same(&file, host, options);
        }
    }
}

fn resolved(text: &str, host: &str, options: &[&str]) -> Result<Resolved, String> {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("config");
    fs::write(&file, text).unwrap();
    let mut given = Given { files: Files::One(file), ..Given::default() };
    for option in options {
        given.option(option).map_err(|error| error.to_string())?;
    }
    let variable = |name: &str| (name == "WHERE").then(|| "/w".to_owned());
    let agent = Some("/agent".into());
    let environment =
        Environment { home: "/home/u".into(), user: "me".into(), uid: 7, node: "n.x".into(), agent, variable };
    resolve(host, None, &given, &environment).map_err(|error| error.to_string())
}

#[test]
fn values_become_options() {
    let text = "HostName %h.example\nPort 2200\nUser r\nIdentityFile ~/k-%r@%h-%n-%p-%u-%i-%L\nIdentityFile ${WHERE}/k\n\
                IdentityAgent ~/a\nUserKnownHostsFile none\nGlobalKnownHostsFile /g1 /g2\nServerAliveInterval 1m30s\n\
                ConnectTimeout 5\nHostKeyAlias al\nIdentitiesOnly yes\nAddressFamily inet\n";
    let options = resolved(text, "h", &["StrictHostKeyChecking=accept-new"]).unwrap().options;
    assert_eq!((options.host.as_str(), options.port, options.user.as_str()), ("h.example", 2200, "r"));
    assert_eq!(options.identity_files, [Path::new("/home/u/k-r@h.example-h-2200-me-7-n"), Path::new("/w/k")]);
    assert_eq!(options.known_hosts, [Path::new("/g1"), Path::new("/g2")]);
    assert_eq!(options.agent_socket.as_deref(), Some(Path::new("/home/u/a")));
    let keepalive = options.keepalive.unwrap();
    assert_eq!((keepalive.interval, keepalive.count), (Duration::from_secs(90), 3));
    assert_eq!(options.connect_timeout, Duration::from_secs(5));
    assert_eq!((options.unknown_host, options.identities_only), (UnknownHost::Add, true));
    assert_eq!(resolved("ServerAliveInterval 0", "h", &[]).unwrap().options.keepalive, None);
    assert_eq!(resolved("IdentityAgent none", "h", &[]).unwrap().options.agent_socket, None);
    let agent = resolved("IdentityAgent SSH_AUTH_SOCK", "h", &[]).unwrap().options.agent_socket;
    assert_eq!(agent.as_deref(), Some(Path::new("/agent")));
}

fn way(options: &SshOptions) -> Vec<String> {
    let mut way = options.jump.as_deref().map(way).unwrap_or_default();
    way.push(options.describe());
    way
}

#[test]
fn s26_hosts_are_jumped_through_in_order() {
    let text = "Host inner\n ProxyJump one,two@[::2]:22,three:33\nHost one\n ProxyJump zero\n User z\nHost three\n \
                HostName drei\nHost plain\n ProxyJump none\nHost *\n IdentityFile /k\n";
    let inner = resolved(text, "inner", &["User=me2"]).unwrap().options;
    assert_eq!(way(&inner), ["me@zero:22", "z@one:22", "two@[::2]:22", "me@drei:33", "me2@inner:22"]);
    // What is suggested takes the same way.
    let jumps = "me@zero:22,z@one:22,two@[::2]:22,me@drei:33";
    assert_eq!(inner.arguments(), format!("-J '{jumps}' "));
    assert_eq!(inner.jump.unwrap().identity_files, [Path::new("/k")]);
    let plain = resolved(text, "plain", &[]).unwrap().options;
    assert_eq!(way(&plain), ["me@plain:22"]);
    let jumped = resolved(text, "plain", &["ProxyJump=j"]).unwrap().options;
    assert_eq!(way(&jumped), ["me@j:22", "me@plain:22"]);
    let error = resolved("ProxyJump bastion", "h", &[]).err().unwrap();
    assert!(error.contains("leads through itself") && error.contains("Host bastion"), "{error}");
}

#[test]
fn what_cannot_be_is_said_with_its_place() {
    for (text, expected) in [
        ("Port none", "config:1: Port: 'none' is not a number"),
        ("Port 0", "config:1: Port"),
        ("\nPort 99999", "config:2: Port"),
        ("User a b", "config:1: User: 'b' is too much"),
        ("User", "config:1: User: a value is missing"),
        ("User \"a", "a quote is not closed"),
        ("HostName %z", "%z"),
        ("IdentitiesOnly perhaps", "is not yes or no"),
        ("ConnectTimeout 5x", "is not a time"),
        ("ProxyJump @x", "is not [USER@]HOST[:PORT]"),
        ("IdentityFile ${NOTHING}/x", "NOTHING is not set"),
        ("Match host", "lacks its pattern"),
        ("Match host a user b all", "stands alone"),
        ("StrictHostKeyChecking perhaps", "is not yes or accept-new"),
    ] {
        let error = resolved(text, "h", &[]).err().unwrap_or_else(|| panic!("{text}"));
        assert!(error.contains(expected), "{text}: {error}");
    }
    for (option, expected) in [
        ("ProxyJmp=x", "did you mean 'ProxyJump'"),
        ("PasswordAuthentication=yes", "never sends a password"),
        ("StrictHostKeyChecking=no", "always checked"),
        ("Port", "write it as"),
    ] {
        let error = resolved("", "h", &[option]).err().unwrap_or_else(|| panic!("{option}"));
        assert!(error.contains(expected), "{option}: {error}");
    }
    assert!(resolved("", "h", &["PasswordAuthentication=no"]).is_ok());
}

#[test]
fn what_is_left_out_is_said() {
    let found = resolved("Match exec \"touch /x\" host h\n Port 5\nForwardAgent yes\nMatch all\n Foo bar\n", "h", &[]);
    let found = found.unwrap();
    assert_eq!(found.options.port, 22);
    assert!(found.warnings.len() == 1 && found.warnings[0].contains("config:1: 'Match exec'"), "{:?}", found.warnings);
    assert!(found.notes.len() == 1 && found.notes[0].contains("'Foo' is left out"), "{:?}", found.notes);
    let unmet = resolved("Match host other exec x\n Port 5\n", "h", &[]).unwrap();
    assert!(unmet.warnings.is_empty(), "{:?}", unmet.warnings);
    let unchecked = resolved("StrictHostKeyChecking no", "h", &[]).unwrap();
    assert_eq!(unchecked.options.unknown_host, UnknownHost::Refuse);
    assert!(unchecked.warnings[0].contains("always checked"), "{:?}", unchecked.warnings);
}

#[test]
fn h50_a_file_that_others_may_write_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("config");
    fs::write(&file, "Port 5\n").unwrap();
    let given = Given { files: Files::One(file.clone()), ..Given::default() };
    for (mode, good) in [(0o644, true), (0o664, false), (0o646, false)] {
        fs::set_permissions(&file, fs::Permissions::from_mode(mode)).unwrap();
        match resolve("h", None, &given, &environment()) {
            Ok(found) => assert!(good && found.options.port == 5),
            Err(error) => assert!(!good && error.to_string().contains("chmod go-w"), "{error}"),
        }
    }
    let missing = Given { files: Files::One(directory.path().join("none")), ..Given::default() };
    assert!(resolve("h", None, &missing, &environment()).is_err());
}
