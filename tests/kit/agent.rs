//! The agent's extensions by hand: messages that no client of ours would send, and what is left after they were refused.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use lockstep::codec;
use lockstep::endpoint::{BeginOptions, CommitOptions};
use lockstep::manifest::{Content, Digest, Entry, Timestamp};
use lockstep::path::RelPath;
use lockstep::wire::buffer::{Reader, Writer};
use lockstep::wire::extension::{EXTENDED, EXTENDED_REPLY, STATUS, put_entry, put_frame, put_string};
use sha2::Digest as _;

use super::raw::Server;

pub(crate) const SIZE: u64 = 300_000;

/// A confined agent, and a client of it that may say anything.
pub(crate) struct Agent {
    pub(crate) server: Option<Server>,
    pub(crate) at: tempfile::TempDir,
}

/// What a request came to: the reply, or what the refusal says.
pub(crate) type Answer = Result<Vec<u8>, String>;

impl Agent {
    /// The target `data` is there, with a file of its own, so that a change of it shows.
    pub(crate) fn new() -> Agent {
        let at = tempfile::tempdir().unwrap();
        fs::create_dir_all(at.path().join("data/.lockstep")).unwrap();
        fs::write(at.path().join("data/old"), "old").unwrap();
        Agent { server: Some(Server::confined(at.path())), at }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.at.path().join(name)
    }

    pub(crate) fn ask(&mut self, name: &str, body: &[u8]) -> Answer {
        let server = self.server.as_mut().unwrap();
        let name = format!("{name}@lockstep.internal");
        match server.ask(EXTENDED, |w| w.string(name.as_bytes()).bytes(body)) {
            (EXTENDED_REPLY, reply) => Ok(reply),
            (STATUS, reply) => {
                let mut fields = Reader(&reply);
                assert_ne!(fields.u32().unwrap(), 0, "a refusal that says OK");
                Err(String::from_utf8(fields.string().unwrap().to_vec()).unwrap())
            }
            (kind, _) => panic!("an answer of type {kind}"),
        }
    }

    pub(crate) fn begin(&mut self, root: &str) -> Answer {
        let options = BeginOptions { actor: "mallory@there".into(), ..BeginOptions::default() };
        self.ask("begin", &[string(root.as_bytes()), string(&serde_json::to_vec(&options).unwrap())].concat())
    }

    /// Begins a run with a file below a directory that is there, in a unit or not, and sends it.
    pub(crate) fn sent(&mut self, units: &[String]) {
        fs::create_dir(self.path("outside")).unwrap();
        fs::set_permissions(self.path("outside"), PermissionsExt::from_mode(0o711)).unwrap();
        fs::create_dir(self.path("data/sub")).unwrap();
        fs::write(self.path("data/sub/file"), "old!").unwrap();
        let options = BeginOptions { units: units.to_vec(), ..BeginOptions::default() };
        let options = serde_json::to_vec(&options).unwrap();
        self.ask("begin", &[string(b"/data"), string(&options)].concat()).unwrap();
        self.entries(&[listed(b"sub", Content::Directory), listed(b"sub/file", file(4))].concat()).unwrap();
        self.ask("diff", &[]).unwrap();
    }

    /// Puts a link to the directory outside in the place of one below the root.
    pub(crate) fn swap(&self, name: &str) {
        fs::rename(self.path(name), self.path("moved")).unwrap();
        symlink(self.path("outside"), self.path(name)).unwrap();
    }

    #[track_caller]
    pub(crate) fn assert_nothing_outside(&self, when: &str) {
        assert_eq!(fs::read_dir(self.path("outside")).unwrap().count(), 0, "{when}");
        let mode = fs::metadata(self.path("outside")).unwrap().permissions().mode();
        assert_eq!(mode & 0o7777, 0o711, "{when}: its permissions changed");
    }

    pub(crate) fn entries(&mut self, raw: &[u8]) -> Answer {
        self.ask("entries", &frame(raw))
    }

    /// Begins and compares, for one file `sub/file` of [`SIZE`] bytes beside one that is good, and opens it.
    pub(crate) fn opened(&mut self) {
        self.begin("/data").unwrap();
        self.entries(&[listed(b"good", file(4)), listed(b"sub/file", file(SIZE))].concat()).unwrap();
        self.ask("diff", &[]).unwrap();
        self.ask("put", &put(&[(0, b"good")])).unwrap();
        self.ask("open", &[&1_u32.to_be_bytes()[..], &[0; 8]].concat()).unwrap();
    }

    pub(crate) fn commit(&mut self) -> Answer {
        self.ask("commit", &string(&serde_json::to_vec(&CommitOptions::default()).unwrap()))
    }

    /// The refusal names the path and the reason; whatever is tried then, nothing of the run remains but its record.
    #[track_caller]
    pub(crate) fn assert_rejected(mut self, answer: Answer, path: &str, reason: &str) {
        let message = answer.expect_err("it was taken");
        assert!(message.contains(path) && message.contains(reason), "{message}");
        // Who goes on as if nothing had been said gets nothing of it published.
        let good = listed(b"good", file(4));
        for (name, body) in [("entries", frame(&good)), ("diff", Vec::new()), ("put", put(&[(0, b"good")]))] {
            assert!(self.ask(name, &body).is_err(), "{name} after {message}");
        }
        assert!(self.commit().is_err(), "committed after {message}");
        drop(self.server.take());
        self.assert_untouched(&message);
        let log = lines(&self.path("data"));
        let refusals: Vec<_> = log.iter().filter(|line| line["action"] == "refuse").collect();
        let [refusal] = refusals[..] else { panic!("{log:?}") };
        assert!(refusal["actor"].as_str().unwrap().ends_with("who says mallory@there"), "{refusal}");
        let (named, because) = (refusal["path"].as_str().unwrap_or_default(), refusal["reason"].as_str().unwrap());
        assert!(named.contains(path) || because.contains(path), "{refusal}");
        assert!(because.contains(reason), "{refusal}");
        lockstep::audit::verify(&lockstep::root::Root::open(&self.path("data")).unwrap()).unwrap();
    }

    #[track_caller]
    pub(crate) fn assert_untouched(&self, when: &str) {
        let names = |at: &Path| -> Vec<String> {
            let mut names: Vec<_> =
                fs::read_dir(at).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
            names.sort();
            names
        };
        assert_eq!(names(&self.path("data")), [".lockstep", "old"], "{when}");
        assert_eq!(fs::read(self.path("data/old")).unwrap(), b"old", "{when}");
        let left = walkdir::WalkDir::new(self.path("data/.lockstep/staging")).into_iter().filter_map(Result::ok);
        let left: Vec<_> = left.filter(|entry| !entry.file_type().is_dir()).map(|entry| entry.into_path()).collect();
        assert!(left.is_empty(), "{when}: staging holds {left:?}");
        assert!(!self.path("data/.lockstep/manifest").exists(), "{when}");
    }
}

pub(crate) fn lines(root: &Path) -> Vec<serde_json::Value> {
    let log = fs::read_to_string(root.join(".lockstep/audit.jsonl")).unwrap_or_default();
    log.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

pub(crate) fn string(bytes: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    put_string(&mut out, bytes);
    out
}

pub(crate) fn frame(raw: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    put_frame(&mut out, raw, None);
    out
}

/// A zstd frame that its message says holds `declared` bytes.
pub(crate) fn coded(declared: u32, data: &[u8]) -> Vec<u8> {
    [&[1][..], &declared.to_be_bytes(), data].concat()
}

pub(crate) fn zstd(data: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    codec::compress(data, 3, &mut out).unwrap();
    out
}

pub(crate) fn file(size: u64) -> Content {
    Content::File { size, digest: None }
}

/// An entry as a list has it, under a name that need not be one.
pub(crate) fn listed(name: &[u8], content: Content) -> Vec<u8> {
    let entry = Entry {
        path: RelPath::new("x").unwrap(),
        content,
        mtime: Timestamp::default(),
        mode: 0o644,
        owner: "root".into(),
        group: "root".into(),
    };
    let mut out = Vec::new();
    put_entry(&mut out, &entry);
    [string(name), out[5..].to_vec()].concat()
}

pub(crate) fn sha256(data: &[u8]) -> Digest {
    Digest(sha2::Sha256::digest(data).into())
}

pub(crate) fn put(files: &[(u32, &[u8])]) -> Vec<u8> {
    let mut body = Writer::default();
    body.u32(files.len() as u32);
    for (index, data) in files {
        body.u32(*index).bytes(&sha256(data).0).u32(data.len() as u32);
    }
    [body.into_bytes(), frame(&files.iter().map(|file| file.1).collect::<Vec<_>>().concat())].concat()
}

pub(crate) fn write(offset: u64, frame: &[u8]) -> Vec<u8> {
    [&1_u32.to_be_bytes()[..], &offset.to_be_bytes(), frame].concat()
}
