//! What users and keys may do at a server, by plain SFTP and by lockstep's own protocol; what they may store; and many of
//! them at once, each in a directory of his own.

use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::Path;
use std::process::{Command, Output};

use lockstep::wire::buffer::{Reader, Writer};
use lockstep::wire::extension::{EXTENDED, NAMES};
use lockstep::wire::sftp::{Status, packet};

use crate::kit::agent::{Agent, file, listed, put, string};
use crate::kit::raw::Server;
use crate::kit::served::{Served, user, write};
use crate::kit::{keygen, text as said, until};

/// A server whose user `sync` has these settings; `source` is there to be sent.
fn with(settings: &str) -> Served {
    let served = Served::with(&["sync"], |_| String::new(), "", |at| user(at, "sync", settings));
    fs::create_dir_all(served.path("source/sub")).unwrap();
    fs::write(served.path("source/a"), "first").unwrap();
    fs::write(served.path("source/sub/b"), "second").unwrap();
    served
}

fn push(served: &Served, more: &[&str]) -> Output {
    served.lockstep(&[&["push", "source", "sync@127.0.0.1:/data"], more].concat(), "sync")
}

#[track_caller]
fn refused(output: &Output, parts: &[&str]) {
    let text = said(output);
    assert!(!output.status.success(), "{text}");
    assert!(parts.iter().all(|part| text.contains(part)), "{parts:?}: {text}");
}

#[track_caller]
fn good(output: &Output) {
    assert!(output.status.success(), "{}", said(output));
}

/// Inode, mode, time and content: what a change of any kind would show in.
fn state(path: &Path) -> (u64, u32, i64, i64, String) {
    let found = fs::symlink_metadata(path).unwrap();
    let content = if found.is_file() { fs::read_to_string(path).unwrap() } else { String::new() };
    (found.ino(), found.mode(), found.mtime(), found.mtime_nsec(), content)
}

/// The rights of which each alone is enough for a request of the agent: l(ist), r(ead), w(rite), (write-)o(nce), d(elete).
const REQUESTS: [(&str, &str); 28] = [
    ("hello", "lrwod"),
    ("begin", "wo"),
    ("attach", "lrwod"),
    ("entries", "wo"),
    ("diff", "wo"),
    ("plan", "wo"),
    ("put", "wo"),
    ("open", "wo"),
    ("write", "wo"),
    ("hole", "wo"),
    ("finish", "wo"),
    ("keep", "wo"),
    ("discard", "wo"),
    ("commit", "wo"),
    ("abort", "lrwod"),
    ("scan", "l"),
    ("list", "l"),
    ("fetch", "r"),
    ("next", "r"),
    ("trash", "lrwod"),
    ("trail", "l"),
    ("alike", "r"),
    ("copy", "r"),
    ("stripe", "wo"),
    ("turns", "lrwod"),
    ("wants", "r"),
    ("parts", "r"),
    ("listen", "lrwod"),
];

#[test]
fn each_request_of_the_agent_is_allowed_and_advertised_by_its_rights_alone() {
    for name in NAMES {
        assert!(REQUESTS.iter().any(|(known, _)| name == format!("{known}@lockstep.internal")), "no row for {name}");
    }
    let at = tempfile::tempdir().unwrap();
    for (letter, right) in [('l', "list"), ('r', "read"), ('w', "write"), ('o', "write-once"), ('d', "delete")] {
        let mut server = Server::lockstep(&["--root", at.path().to_str().unwrap(), "--rights", right]);
        let version = server.version.clone();
        for (name, allowed) in REQUESTS {
            let name = format!("{name}@lockstep.internal");
            let advertised = version.windows(name.len()).any(|window| window == name.as_bytes());
            // There is one connection to a process, so that no other can work on its run; and it may not listen for others.
            let expected = allowed.contains(letter);
            let alone = name.starts_with("attach") || name.starts_with("listen");
            assert_eq!(advertised, expected && !alone, "{name} with {right}");
            // What is allowed fails for another reason: nothing was begun, and nothing is well-formed.
            let (kind, body) = server.ask(EXTENDED, |w| w.string(name.as_bytes()));
            let mut fields = Reader(&body);
            let denied = kind == packet::STATUS && fields.u32().unwrap() == Status::PermissionDenied as u32;
            let text = String::from_utf8_lossy(&body).into_owned();
            assert_eq!(denied && text.contains("the rights here"), !expected, "{name} with {right}: {text}");
        }
    }
}

#[test]
fn write_once_takes_what_is_new_and_nothing_else_by_lockstep() {
    let served = with("rights = ['list', 'read', 'write-once']");
    good(&push(&served, &[]));
    good(&push(&served, &[]));
    let there = || {
        [served.path("sync/data/a"), served.path("sync/data/sub/b"), served.path("sync/data/sub")]
            .map(|path| state(&path))
    };
    // New files come into directories that are there, which stay as they are.
    fs::set_permissions(served.path("sync/data/sub"), fs::Permissions::from_mode(0o700)).unwrap();
    fs::write(served.path("source/sub/new"), "new").unwrap();
    let mode = || fs::metadata(served.path("sync/data/sub")).unwrap().permissions().mode() & 0o7777;
    good(&push(&served, &[]));
    assert_eq!((fs::read_to_string(served.path("sync/data/sub/new")).unwrap().as_str(), mode()), ("new", 0o700));
    let before = there();

    // Other content.
    fs::write(served.path("source/a"), "FIRST").unwrap();
    fs::write(served.path("source/more"), "more").unwrap();
    refused(&push(&served, &[]), &["write-once", "1 path: 'a'", "names that are free"]);
    refused(&push(&served, &["--checksum"]), &["write-once", "'a'"]);
    refused(&push(&served, &["--dry-run"]), &["write-once", "'a'"]);
    assert!(!served.path("sync/data/more").exists(), "a plan is refused as a whole");
    fs::write(served.path("source/a"), "first").unwrap();
    // Another time, or mode.
    refused(&push(&served, &[]), &["write-once", "'a'"]);
    let copied = Command::new("cp").args(["-p"]).args([served.path("sync/data/a"), served.path("source/a")]).status();
    assert!(copied.unwrap().success());
    fs::set_permissions(served.path("source/a"), fs::Permissions::from_mode(0o600)).unwrap();
    refused(&push(&served, &[]), &["write-once", "'a'"]);
    fs::set_permissions(served.path("source/a"), fs::Permissions::from_mode(before[0].1 & 0o777)).unwrap();
    good(&push(&served, &[]));
    // Another kind: a link, a directory.
    fs::remove_file(served.path("source/a")).unwrap();
    std::os::unix::fs::symlink("more", served.path("source/a")).unwrap();
    refused(&push(&served, &[]), &["write-once", "'a'"]);
    fs::remove_file(served.path("source/a")).unwrap();
    fs::create_dir(served.path("source/a")).unwrap();
    refused(&push(&served, &[]), &["write-once", "'a'"]);
    fs::remove_dir(served.path("source/a")).unwrap();
    // A unit that is there is exchanged as a whole.
    fs::write(served.path("source/sub/newer"), "newer").unwrap();
    refused(&push(&served, &["--unit", "sub/"]), &["write-once", "'sub'"]);
    // Removing, at once or into the trash.
    refused(&push(&served, &["--delete"]), &["nothing may be removed", "'a'", "'delete'"]);
    refused(&push(&served, &["--delete=trash"]), &["nothing may be removed", "'a'"]);
    good(&push(&served, &[]));
    let after = there();
    assert_eq!((&after[..2], after[2].1), (&before[..2], before[2].1));
    let checked = Command::new(env!("CARGO_BIN_EXE_lockstep"))
        .args(["check", "--full"])
        .arg(served.path("sync/data"))
        .env("XDG_STATE_HOME", served.at())
        .output()
        .unwrap();
    good(&checked);
    let log = fs::read_to_string(served.path("sync/data/.lockstep/audit.jsonl")).unwrap();
    assert!(log.contains("\"refuse\"") && log.contains("is replaced or changed"), "{log}");
}

#[test]
fn write_once_takes_what_is_new_and_nothing_else_by_sftp() {
    let served = with("rights = ['list', 'read', 'write-once']");
    let sftp = |batch: &str| served.sftp("sync", "sync", batch);
    good(&sftp("put source/a a\nmkdir d\nput -p source/sub/b d/b\nget a back\n"));
    let before = [state(&served.path("sync/a")), state(&served.path("sync/d/b"))];
    fs::write(served.path("source/a"), "other").unwrap();
    for batch in [
        "put source/a a",
        "put -a source/a a",
        "rename a c",
        "rename d/b a",
        "rm a",
        "rmdir d",
        "chmod 777 a",
        "chmod 777 d",
        "symlink x a",
        "ln a d/b",
    ] {
        let output = sftp(&format!("{batch}\n"));
        assert!(!output.status.success(), "{batch}: {}", said(&output));
    }
    assert_eq!([state(&served.path("sync/a")), state(&served.path("sync/d/b"))], before);
}

#[test]
fn what_gets_a_name_between_comparing_and_publishing_is_not_replaced() {
    let mut agent = Agent::new();
    let rights = ["--root", agent.at.path().to_str().unwrap(), "--rights", "list,read,write-once"].map(str::to_owned);
    agent.server = Some(Server::lockstep(&rights.each_ref().map(String::as_str)));
    agent.begin("/data").unwrap();
    agent.entries(&[listed(b"good", file(4)), listed(b"taken", file(4))].concat()).unwrap();
    agent.ask("diff", &[]).unwrap();
    agent.ask("put", &put(&[(0, b"good"), (1, b"mine")])).unwrap();
    fs::write(agent.path("data/taken"), "somebody else's").unwrap();
    let committed = String::from_utf8(agent.commit().unwrap()).unwrap();
    assert!(committed.contains("something has got this name meanwhile"), "{committed}");
    assert_eq!(fs::read_to_string(agent.path("data/taken")).unwrap(), "somebody else's");
    assert_eq!(fs::read_to_string(agent.path("data/good")).unwrap(), "good");
}

#[test]
fn who_says_too_late_that_he_removes_is_refused_before_anything_is_published() {
    for (rights, options) in [
        ("list,read,write", r#"{"delete":true,"failed":[]}"#),
        ("list,read,write-once", r#"{"delete":true,"failed":[]}"#),
        // Who does not see what there is cannot mean to remove it.
        ("write,delete", r#"{"delete":true,"failed":[]}"#),
    ] {
        let mut agent = Agent::new();
        let arguments = ["--root", agent.at.path().to_str().unwrap(), "--rights", rights].map(str::to_owned);
        agent.server = Some(Server::lockstep(&arguments.each_ref().map(String::as_str)));
        agent.begin("/data").unwrap();
        agent.entries(&listed(b"good", file(4))).unwrap();
        agent.ask("diff", &[]).unwrap();
        agent.ask("put", &put(&[(0, b"good")])).unwrap();
        let answer = agent.ask("commit", &string(options.as_bytes())).unwrap_err();
        let named = rights.contains("list");
        assert!(answer.contains("nothing may be removed") && answer.contains("'old'") == named, "{rights}: {answer}");
        assert!(agent.path("data/old").exists() && !agent.path("data/good").exists(), "{rights}");
    }
}

#[test]
fn to_write_is_not_to_remove() {
    let served = with("rights = ['list', 'read', 'write']");
    good(&push(&served, &[]));
    fs::write(served.path("source/a"), "changed").unwrap();
    fs::remove_file(served.path("source/sub/b")).unwrap();
    refused(&push(&served, &["--delete"]), &["nothing may be removed", "1 path: 'sub/b'"]);
    assert_eq!(fs::read_to_string(served.path("sync/data/a")).unwrap(), "first");
    // Without anything to remove it is no matter.
    fs::write(served.path("source/sub/b"), "second").unwrap();
    good(&push(&served, &["--delete"]));
    assert_eq!(fs::read_to_string(served.path("sync/data/a")).unwrap(), "changed");
    // A directory in the place of a file, and the other way round, removes what was there.
    fs::remove_dir_all(served.path("source/sub")).unwrap();
    fs::write(served.path("source/sub"), "a file").unwrap();
    refused(&push(&served, &[]), &["nothing may be removed", "'sub'"]);
    for (batch, allowed) in
        [("put source/a a", true), ("rename data/a data/c", true), ("rm a", false), ("rmdir data/sub", false)]
    {
        let output = served.sftp("sync", "sync", &format!("{batch}\n"));
        assert_eq!(output.status.success(), allowed, "{batch}: {}", said(&output));
    }
    // A trash is kept, whatever the sender says of how long.
    let old = served.path("sync/data/.lockstep/trash/20200101T000000Z-1");
    fs::create_dir_all(&old).unwrap();
    fs::remove_file(served.path("source/sub")).unwrap();
    fs::write(served.path("source/a"), "again").unwrap();
    good(&push(&served, &["--delete=trash", "--trash-keep", "1s", "--exclude", "sub", "--exclude", "c"]));
    assert!(old.exists());
}

#[test]
fn a_box_to_drop_into_shows_nothing() {
    let served = with("rights = ['write-once']");
    fs::write(served.path("sync/secret"), "x").unwrap();
    good(&served.sftp("sync", "sync", "put source/a a\n"));
    good(&push(&served, &[]));
    assert!(!said(&served.sftp("sync", "sync", "-ls -1\n-ls -1 /\n-ls secret\n")).contains("\nsecret"));
    for batch in ["get a back", "get secret back", "df"] {
        assert!(!served.sftp("sync", "sync", &format!("{batch}\n")).status.success(), "{batch}");
    }
    let pulled = served.lockstep(&["pull", "sync@127.0.0.1:/", "back"], "sync");
    refused(&pulled, &["do not include 'list'"]);
    assert_eq!(fs::read_to_string(served.path("sync/data/sub/b")).unwrap(), "second");
}

#[test]
fn s27_a_key_and_a_principal_have_what_is_said_of_them_and_others_what_the_user_has() {
    let served = Served::with(
        &["sync", "other", "ca", "guest"],
        |_| String::new(),
        "",
        |at| {
            let here = at.display();
            let print = |key: &str| {
                let output =
                    Command::new("ssh-keygen").args(["-lf", &format!("{here}/{key}.key.pub")]).output().unwrap();
                said(&output).split(' ').nth(1).unwrap().to_owned()
            };
            let key = |name: &str| fs::read_to_string(at.join(format!("{name}.key.pub"))).unwrap();
            let authority = format!("cert-authority,principals=\"sync,trainers,elsewhere\" {}", key("ca"));
            write(&at.join("sync.keys"), &[key("sync"), key("other"), authority].concat());
            fs::create_dir(at.join("models")).unwrap();
            [
                user(at, "sync", ""),
                format!(
                    "[[serve.user.key]]\nfingerprint = '{}'\nroot = '{here}/other'\nrights = ['list']\n",
                    print("other")
                ),
                format!(
                    "[[serve.user.key]]\nprincipal = 'trainers'\nroot = '{here}/models'\nrights = ['list', 'read']\n"
                ),
                "[[serve.user.key]]\nprincipal = 'elsewhere'\nfrom = ['192.0.2.0/24']\n".to_owned(),
                format!(
                    "[[serve.user.key]]\nprincipal = 'admins'\nroot = '{here}/models'\nrights = ['list', 'read']\n"
                ),
            ]
            .concat()
        },
    );
    for directory in ["sync", "other", "models"] {
        fs::write(served.path(directory).join(format!("of-{directory}")), "x").unwrap();
    }
    let sign = |principals: &str| {
        fs::remove_file(served.path("guest.key-cert.pub")).ok();
        keygen(served.at(), &["-q", "-s", "ca.key", "-I", "guest", "-n", principals, "guest.key.pub"]);
    };
    let sees = |key: &str, name: &str| {
        let output = served.sftp("sync", key, "ls -1\n");
        output.status.success() && said(&output).contains(name)
    };
    assert!(sees("sync", "of-sync") && sees("other", "of-other"));
    good(&served.sftp("sync", "sync", "get of-sync back\nrm of-sync\n"));
    assert!(!served.sftp("sync", "other", "get of-other back\n").status.success());
    sign("trainers");
    assert!(sees("guest", "of-models"));
    good(&served.sftp("sync", "guest", "get of-models back\n"));
    assert!(!served.sftp("sync", "guest", "rm of-models\n").status.success());
    // Without a line of its own: the user's. From where its line does not say: not at all.
    fs::write(served.path("sync/of-sync"), "x").unwrap();
    sign("sync");
    assert!(sees("guest", "of-sync"));
    // A principal that the authority's line does not name is none, whatever the authority writes into it.
    sign("admins,sync");
    assert!(sees("guest", "of-sync"));
    sign("sync,elsewhere");
    assert!(!served.sftp("sync", "guest", "ls\n").status.success());
    served.wait_for("the key may not come from this address");
    // A reload that takes rights away ends who has them.
    let mut held = served.hold("sync", &[]);
    assert!(held.speaks());
    served.reload("[[serve.user]]\nname = 'sync'", "[[serve.user]]\nread_only = true\nname = 'sync'");
    assert!(held.ended().contains("the user's settings have changed"));

    let list = |more: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_lockstep"));
        command.args(["keys", "list", "--config"]).arg(served.path("config.toml")).args(more).output().unwrap()
    };
    let table = list(&[]);
    good(&table);
    let text = said(&table);
    for part in
        ["certificate for sync or trainers", "principal trainers", "192.0.2.0/24", "list, read", "anywhere", "/models"]
    {
        assert!(text.contains(part), "{part}: {text}");
    }
    let parsed: serde_json::Value = serde_json::from_slice(&list(&["--json", "sync"]).stdout).unwrap();
    let rows = parsed["rows"].as_array().unwrap();
    let row = |comment: &str| rows.iter().find(|row| row["comment"] == comment).unwrap();
    assert_eq!((&row("other")["rights"], &row("sync")["way"]), (&serde_json::json!(["list"]), &"key".into()));
    assert!(row("ca")["place"].as_str().unwrap().ends_with("sync.keys:3"), "{parsed}");
    assert!(rows.iter().all(|row| row["refused"].is_null()), "{parsed}");
    assert_eq!(list(&["nobody"]).status.code(), Some(2));
}

#[test]
fn keys_that_do_not_get_in_are_listed_with_the_reason() {
    let served = Served::with(
        &["sync", "old", "gone"],
        |at| {
            write(&at.join("revoked"), &fs::read_to_string(at.join("gone.key.pub")).unwrap());
            format!(
                "revoked_keys = '{}/revoked'\nallow = ['sync@127.0.0.0/8']\ndeny = ['*@127.9.0.0/16']",
                at.display()
            )
        },
        "",
        |at| user(at, "sync", "from = ['127.0.0.0/8']\nquota = { bytes = '1 GB' }"),
    );
    let key = |name: &str| fs::read_to_string(served.path(&format!("{name}.key.pub"))).unwrap();
    let lines = format!(
        "{}from=\"127.0.0.1\",command=\"internal-sftp -R\",expiry-time=\"20200101Z\" {}{}tunnel=\"1\" {}rubbish\n",
        key("sync"),
        key("old"),
        key("gone"),
        key("old")
    );
    write(&served.path("sync.keys"), &lines);
    let list = |more: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_lockstep"));
        command.args(["keys", "list", "--config"]).arg(served.path("config.toml")).args(more).output().unwrap()
    };
    let output = list(&["--json"]);
    assert_eq!(output.status.code(), Some(4), "{}", said(&output));
    let parsed: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let of = |at: usize, field: &str| parsed["rows"][at][field].to_string();
    assert_eq!(of(0, "refused"), "null");
    assert!(of(1, "refused").contains("expired at 20200101Z") && of(1, "expires").contains("20200101Z"), "{parsed}");
    assert_eq!(of(1, "from"), "[\"127.0.0.0/8\",\"127.0.0.1\"]");
    assert_eq!((of(2, "refused"), of(0, "quota")), ("\"revoked\"".into(), "{\"bytes\":\"1GB\"}".into()));
    assert!(of(3, "refused").contains("tunnel is not understood"), "{parsed}");
    assert!(parsed["problems"][0].as_str().unwrap().contains("line 5 is left out"), "{parsed}");
    assert!(said(&list(&[])).contains("allow: sync@127.0.0.0/8\ndeny: *@127.9.0.0/16\n"), "{}", said(&list(&[])));
}

/// One section for all parties: each has a file of keys and a directory of its own.
#[test]
fn s23_twenty_parties_send_at_once_and_see_nothing_of_each_other() {
    let names: Vec<String> = (0..20).map(|number| format!("party-{number:02}")).collect();
    let served = Served::with(
        &[],
        |_| String::new(),
        "",
        |at| {
            let here = at.display();
            fs::create_dir(at.join("gather")).unwrap();
            fs::create_dir(at.join("keys")).unwrap();
            for name in &names {
                keygen(at, &["-q", "-t", "ed25519", "-N", "", "-f", &format!("{name}.key")]);
                write(&at.join("keys").join(name), &fs::read_to_string(at.join(format!("{name}.key.pub"))).unwrap());
            }
            format!(
                "[[serve.user]]\nname = 'party-*'\nroot = '{here}/gather/%u'\nauthorized_keys = '{here}/keys/%u'\n\
                 create_root = true\n"
            )
        },
    );
    for name in &names {
        fs::create_dir(served.path(&format!("of-{name}"))).unwrap();
        fs::write(served.path(&format!("of-{name}/gradients-{name}")), name.repeat(10_000)).unwrap();
    }
    std::thread::scope(|scope| {
        for (number, name) in names.iter().enumerate() {
            let served = &served;
            scope.spawn(move || {
                let own = format!("of-{name}/gradients-{name}");
                let output = match number % 2 {
                    0 => served.sftp(
                        name,
                        name,
                        &format!("mkdir round-1\nput {own} round-1/gradients-{name}\nls -1 /\n"),
                    ),
                    _ => served.lockstep(&["push", &format!("of-{name}"), &format!("{name}@127.0.0.1:/round-1")], name),
                };
                good(&output);
                // Neither by a way up nor under another's name.
                let other = format!("party-{:02}", (number + 1) % 20);
                let batch = format!("-get ../{other}/round-1/gradients-{other} stolen-{name}\nls -1a /\nls -1 /..\n");
                let output = served.sftp(name, name, &batch);
                assert!(!said(&output).contains(&format!("gradients-{other}\n")), "{}", said(&output));
                assert!(!served.path(&format!("stolen-{name}")).exists());
                assert!(!served.sftp(&other, name, "ls\n").status.success(), "{name} as {other}");
            });
        }
    });
    for name in &names {
        let root = served.path("gather").join(name);
        assert_eq!(fs::metadata(&root).unwrap().permissions().mode() & 0o7777, 0o700, "{name}");
        let files: Vec<_> =
            fs::read_dir(root.join("round-1")).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        let files: Vec<_> = files.iter().filter(|file| *file != ".lockstep").collect();
        assert_eq!(files, [format!("gradients-{name}").as_str()]);
        assert_eq!(fs::read_to_string(root.join(format!("round-1/gradients-{name}"))).unwrap(), name.repeat(10_000));
    }
    // Who is not of them has no directory made for him.
    for stranger in ["party-99", "party-../x", "other"] {
        assert!(!served.sftp(stranger, "party-00", "ls\n").status.success());
    }
    assert_eq!(fs::read_dir(served.path("gather")).unwrap().count(), 20);
    let listed = Command::new(env!("CARGO_BIN_EXE_lockstep"))
        .args(["keys", "list", "--config"])
        .arg(served.path("config.toml"))
        .output()
        .unwrap();
    good(&listed);
    assert_eq!(said(&listed).matches("/gather/party-").count(), 20, "{}", said(&listed));
}

#[test]
fn s23_s27_nodes_with_certificates_need_no_file_of_keys_each() {
    let served = Served::with(
        &["ca", "node-1", "node-2"],
        |_| String::new(),
        "",
        |at| {
            let here = at.display();
            let key = |name: &str| fs::read_to_string(at.join(format!("{name}.key.pub"))).unwrap();
            fs::create_dir(at.join("gather")).unwrap();
            let authority = format!("cert-authority {}", key("ca"));
            write(&at.join("all.keys"), &[authority, key("node-2")].concat());
            write(&at.join("one.keys"), &format!("cert-authority,principals=\"team-a,team-b\" {}", key("ca")));
            format!(
                "[[serve.user]]\nname = 'node-*'\nroot = '{here}/gather/%u'\nauthorized_keys = '{here}/all.keys'\n\
                 create_root = true\n[[serve.user]]\nname = 'team'\nroot = '{here}/gather/%p'\n\
                 authorized_keys = '{here}/one.keys'\ncreate_root = true\n"
            )
        },
    );
    // A plain key would be good for every node.
    assert!(!served.sftp("node-1", "node-2", "ls\n").status.success());
    served.wait_for("a key would be good for every user that fits 'node-*'");
    let sign = |principals: &str| {
        fs::remove_file(served.path("node-1.key-cert.pub")).ok();
        keygen(served.at(), &["-q", "-s", "ca.key", "-I", "node", "-n", principals, "node-1.key.pub"]);
    };
    fs::write(served.path("file"), "x").unwrap();
    sign("node-1");
    good(&served.sftp("node-1", "node-1", "put file here\n"));
    assert!(served.path("gather/node-1/here").exists());
    for other in ["node-2", "node-", "team"] {
        assert!(!served.sftp(other, "node-1", "ls\n").status.success(), "{other}");
    }
    sign("team-b");
    good(&served.sftp("team", "node-1", "put file here\n"));
    assert!(served.path("gather/team-b/here").exists());
    sign("team-a,team-b");
    assert!(!served.sftp("team", "node-1", "ls\n").status.success());
    served.wait_for("has several that are good here");
    assert_eq!(fs::read_dir(served.path("gather")).unwrap().count(), 2);
}

#[test]
fn a_root_that_is_not_there_is_told_as_that() {
    let served = Served::with(
        &["sync"],
        |_| String::new(),
        "",
        |at| {
            let here = at.display();
            fs::create_dir(at.join("gather")).unwrap();
            format!("[[serve.user]]\nname = 'sync'\nroot = '{here}/gather/%u'\nauthorized_keys = '{here}/sync.keys'\n")
        },
    );
    assert!(!served.sftp("sync", "sync", "ls\n").status.success());
    served.wait_for("gather/sync is not there; make it, or set create_root");
    fs::write(served.path("gather/sync"), "").unwrap();
    assert!(!served.sftp("sync", "sync", "ls\n").status.success());
    served.wait_for("gather/sync is not a directory");
    assert!(!served.log().contains("cannot be confined"), "{}", served.log());
    fs::remove_file(served.path("gather/sync")).unwrap();
    fs::create_dir(served.path("gather/sync")).unwrap();
    good(&served.sftp("sync", "sync", "ls\n"));
}

#[test]
fn a_quota_holds_for_both_protocols_over_restarts_and_says_how_much_is_used() {
    let served = with("quota = { bytes = '1 MB', files = 40 }");
    fs::write(served.path("source/big"), vec![7; 600_000]).unwrap();
    good(&push(&served, &[]));
    // It does not fit, and nothing of it is sent.
    fs::write(served.path("source/bigger"), vec![8; 500_000]).unwrap();
    let output = push(&served, &[]);
    refused(&output, &["the quota is used up: 600.0 kB of 1.0 MB are used and 500.0 kB more are needed"]);
    assert_eq!(output.status.code(), Some(5));
    assert!(!served.path("sync/data/bigger").exists());
    let server = Server::spawn(served.client("ssh", "-p", "sync").args(["-s", "sync@127.0.0.1", "sftp"]));
    let refusal = by_hand(server, 500_000);
    assert!(refusal.contains("of 1.0 MB are used"), "{refusal}");
    let stored = fs::metadata(served.path("sync/by-hand")).unwrap().len();
    assert!(600_011 + stored <= 1_000_000, "{stored}");
    // Many at once do not pass it together.
    good(&served.sftp("sync", "sync", "rm by-hand\n"));
    fs::write(served.path("part"), vec![9; 90_000]).unwrap();
    std::thread::scope(|scope| {
        for number in 0..8 {
            let served = &served;
            scope.spawn(move || served.sftp("sync", "sync", &format!("put part part-{number}\n")));
        }
    });
    let sum = |at: &Path| -> u64 {
        let files = walkdir::WalkDir::new(at).into_iter().filter_map(Result::ok);
        let files =
            files.filter(|entry| entry.file_type().is_file() && !entry.path().to_str().unwrap().contains(".lockstep"));
        files.map(|entry| entry.metadata().unwrap().len()).sum()
    };
    let used = sum(&served.path("sync"));
    assert!((690_000..=1_000_000).contains(&used), "{used}");
    // Another server counts on.
    let again = Command::new(env!("CARGO_BIN_EXE_lockstep"))
        .args(["keys", "list", "--json", "--config"])
        .arg(served.path("config.toml"))
        .output()
        .unwrap();
    good(&again);
    served.reload("files = 40", "files = 5");
    refused(&push(&served, &[]), &["of 5 files are used"]);
    // What goes makes room, also where somebody else removes it.
    fs::remove_dir_all(served.path("sync/data")).unwrap();
    for number in 0..8 {
        fs::remove_file(served.path(&format!("sync/part-{number}"))).ok();
    }
    served.reload("files = 5", "files = 50");
    let usage = served.path("sync/.lockstep/usage");
    fs::write(&usage, "damaged").unwrap();
    good(&push(&served, &["--exclude", "big"]));
    // What the session had not used comes back with its end.
    until("the count", || fs::read_to_string(&usage).unwrap().starts_with("lockstep-usage 1 500011 "));
}

#[test]
fn directories_above_a_target_count_before_they_are_made() {
    let served = with("quota = { files = 40 }");
    fs::create_dir(served.path("empty")).unwrap();
    let push = |to: &str| {
        let target = format!("sync@127.0.0.1:/{to}");
        served.lockstep(&["push", "empty", &target], "sync")
    };
    refused(&push(&"deeper/".repeat(60)), &["of 40 files are used"]);
    assert!(!served.path("sync/deeper").exists());
    good(&push("deeper/few"));
}

/// Writes so many bytes to a new file in pieces, and says why it was stopped.
fn by_hand(mut server: Server, bytes: u64) -> String {
    let handle = server.opened(packet::OPEN, |w| w.string(b"by-hand").u32(0x1a).u32(0));
    for offset in (0..bytes).step_by(50_000) {
        let fields = |w: &mut Writer| {
            w.string(&handle).u64(offset).string(&[5; 50_000]);
        };
        let (_, body) = server.ask(packet::WRITE, |w| {
            fields(w);
            w
        });
        let mut reader = Reader(&body);
        if Status::from_code(reader.u32().unwrap()) != Status::Ok {
            return String::from_utf8(reader.string().unwrap().to_vec()).unwrap();
        }
    }
    String::new()
}

#[test]
fn h24_a_file_that_is_in_hand_is_not_taken_by_another_message() {
    let mut agent = Agent::new();
    let root = agent.at.path().to_str().unwrap().to_owned();
    agent.server = Some(Server::lockstep(&["--root", &root]));
    agent.begin("/data").unwrap();
    agent.entries(&[listed(b"a", file(4)), listed(b"b", file(4))].concat()).unwrap();
    agent.ask("diff", &[]).unwrap();
    agent.ask("open", &[&1_u32.to_be_bytes()[..], &0_u64.to_be_bytes()].concat()).unwrap();
    let refused = agent.ask("put", &put(&[(0, b"good"), (1, b"evil")])).unwrap_err();
    assert!(refused.contains("a file"), "{refused}");
    assert!(agent.commit().is_err() && !agent.path("data/b").exists());
}
