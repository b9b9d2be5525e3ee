//! Permissions on arrival, through real pushes: what stat(1) and getfacl(1) then see.

use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// Two directories, a file of rules, and the commands between them.
struct Sides {
    at: tempfile::TempDir,
}

impl Sides {
    fn new() -> Sides {
        let at = tempfile::tempdir().unwrap();
        fs::create_dir(at.path().join("source")).unwrap();
        Sides { at }
    }

    fn source(&self, name: &str) -> PathBuf {
        self.at.path().join("source").join(name)
    }

    fn target(&self, name: &str) -> PathBuf {
        self.at.path().join("target").join(name)
    }

    /// A file at the source.
    fn file(&self, name: &str, mode: u32) {
        let path = self.source(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, format!("content of {name}")).unwrap();
        chmod(&path, mode);
    }

    fn push(&self, rules: &str) -> Output {
        let config = self.at.path().join("config.toml");
        fs::write(&config, rules).unwrap();
        chmod(&config, 0o600);
        let (source, target) = (self.at.path().join("source"), self.at.path().join("target"));
        lockstep(&["push", "--config"], &[&config], &["--policy", "p"], &[&source, &target])
    }

    fn pushed(&self, rules: &str) {
        let output = self.push(rules);
        assert!(output.status.success(), "{}", text(&output));
    }
}

fn lockstep(first: &[&str], paths: &[&Path], more: &[&str], last: &[&Path]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_lockstep"));
    command.args(first).args(paths).args(more).args(last);
    command.env("XDG_STATE_HOME", last.last().unwrap().parent().unwrap().join("state"));
    command.output().unwrap()
}

fn text(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

fn chmod(path: &Path, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}

fn mode(path: &Path) -> String {
    format!("{:04o}", fs::metadata(path).unwrap().mode() & 0o7777)
}

fn run(program: &str, package: &str, arguments: &[&str], path: &Path) -> String {
    let output = Command::new(program).args(arguments).arg(path).output();
    let output = output.unwrap_or_else(|_| panic!("{program} is not installed: Debian package {package}"));
    assert!(output.status.success(), "{program}: {}", text(&output));
    String::from_utf8(output.stdout).unwrap()
}

/// The ACL as getfacl shows it, numbers and effective rights included, in one line.
fn getfacl(path: &Path) -> String {
    let shown = run("getfacl", "acl", &["-cnpE"], path);
    shown.split_whitespace().collect::<Vec<_>>().join(" ")
}

fn setfacl(entries: &str, path: &Path) {
    run("setfacl", "acl", &["-m", entries], path);
}

const EVERYTHING: &str =
    "[[policy.p.rule]]\nmatch = '**'\nmode = '640'\n[[policy.p.rule]]\nmatch = '**/'\nmode = '750'\n";

#[test]
fn s12_acls_are_set_on_arrival_and_follow_the_rules() {
    let sides = Sides::new();
    sides.file("scans/a.dcm", 0o644);
    sides.file("scans/deep/b.dcm", 0o644);
    sides.file("plain", 0o644);
    let rules = |scans: &str, files: &str| {
        format!(
            "{EVERYTHING}[[policy.p.rule]]\nmatch = 'scans/'\nmode = '750'\n{scans}\n[[policy.p.rule]]\nmatch = '*.dcm'\nmode = '640'\n{files}\n"
        )
    };
    let scans = "acl = ['group:games:rx', 'default:group:games:rx', 'default:user:nobody:r']";
    sides.pushed(&rules(scans, "acl = ['group:games:r', 'user:nobody:---']"));
    let (games, nobody) = ("60", "65534");
    let directory = format!(
        "user::rwx group::r-x group:{games}:r-x mask::r-x other::--- default:user::rwx default:user:{nobody}:r-- \
         default:group::r-x default:group:{games}:r-x default:mask::r-x default:other::---"
    );
    let file = format!("user::rw- user:{nobody}:--- group::r-- group:{games}:r-- mask::r-- other::---");
    assert_eq!(getfacl(&sides.target("scans")), directory);
    assert_eq!(getfacl(&sides.target("scans/deep")), "user::rwx group::r-x other::---");
    for name in ["scans/a.dcm", "scans/deep/b.dcm"] {
        assert_eq!(getfacl(&sides.target(name)), file, "{name}");
        assert_eq!(mode(&sides.target(name)), "0640");
    }
    assert_eq!(getfacl(&sides.target("plain")), "user::rw- group::r-- other::---");
    let again = sides.push(&rules(scans, "acl = ['group:games:r', 'user:nobody:---']"));
    assert!(text(&again).contains("nothing to do"), "{}", text(&again));

    // A rule that changed changes what is there; one that lost its entries takes them away.
    sides.pushed(&rules("acl = ['default:group:games:rwx']", ""));
    let directory = "user::rwx group::r-x other::--- default:user::rwx default:group::r-x default:group:60:rwx \
                     default:mask::rwx default:other::---";
    assert_eq!(getfacl(&sides.target("scans")), directory);
    assert_eq!(getfacl(&sides.target("scans/a.dcm")), "user::rw- group::r-- other::---");

    // So does somebody's setfacl on the target.
    setfacl("u:nobody:r", &sides.target("plain"));
    sides.pushed(&rules("", ""));
    assert_eq!(getfacl(&sides.target("plain")), "user::rw- group::r-- other::---");
    assert_eq!(getfacl(&sides.target("scans")), "user::rwx group::r-x other::---");
}

#[test]
fn h47_a_default_acl_of_the_target_gives_nothing_to_what_arrives() {
    for (existing, rules) in [(true, EVERYTHING), (false, EVERYTHING), (true, "[policy.p]\n"), (false, "[policy.p]\n")]
    {
        let sides = Sides::new();
        sides.file("new/file", 0o660);
        chmod(&sides.source("new"), 0o770);
        setfacl("d:u:nobody:rwx,d:g:games:rwx,u:nobody:rwx", sides.at.path());
        if existing {
            fs::create_dir_all(sides.target("")).unwrap();
            assert!(getfacl(&sides.target("")).contains("default:user:65534:rwx"));
        }
        sides.pushed(rules);
        let expected = if rules == EVERYTHING { ("r--", "r-x") } else { ("rw-", "rwx") };
        assert_eq!(getfacl(&sides.target("new/file")), format!("user::rw- group::{} other::---", expected.0));
        assert_eq!(getfacl(&sides.target("new")), format!("user::rwx group::{} other::---", expected.1));
        if !existing {
            assert_eq!(getfacl(&sides.target("")), "user::rwx group::r-x other::r-x");
        }
        // Nothing sleeps in them that a later chmod would wake up.
        chmod(&sides.target("new/file"), 0o666);
        assert_eq!(getfacl(&sides.target("new/file")), "user::rw- group::rw- other::rw-");
    }
}
