//! Every request of an SFTP session, while the directory that it names is swapped for a link that leads out of the root.
//!
//! A request that the server knows and that has no row here fails the test.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use lockstep::wire::buffer::{Reader, Writer};
use lockstep::wire::extension::NAMES;
use lockstep::wire::sftp::{Status, open, packet};

use super::swapping::{Field, GUESSED, rounds};
use crate::kit::raw::{READ_WRITE_NEW, Server};

/// A client that may ask for anything.
struct Client<'f> {
    field: &'f Field,
    server: Server,
    /// Requests that were done, and that were refused, by row.
    done: BTreeMap<&'static str, u32>,
    refused: u32,
    round: u32,
    /// The directory, by one of its paths.
    base: &'static str,
}

/// A type of request, or the name of an extension.
#[derive(Clone, Copy)]
enum Asked {
    Kind(u8),
    Named(&'static str),
}

use Asked::{Kind, Named};

/// A request, and what it is called here.
#[derive(Clone, Copy)]
struct Request {
    asked: Asked,
    name: &'static str,
}

const fn request(kind: u8, name: &'static str) -> Request {
    Request { asked: Kind(kind), name }
}

// Those that others need too.
const OPEN: Request = request(packet::OPEN, "open");
const CLOSE: Request = request(packet::CLOSE, "close");
const READ: Request = request(packet::READ, "read");
const OPENDIR: Request = request(packet::OPENDIR, "opendir");
const RMDIR: Request = request(packet::RMDIR, "rmdir");

/// How a request is tried.
type Try = fn(&mut Client<'_>, Request);

struct Row {
    request: Request,
    tries: Try,
}

const fn row(kind: u8, name: &'static str, tries: Try) -> Row {
    Row { request: request(kind, name), tries }
}

const fn named(name: &'static str, tries: Try) -> Row {
    Row { request: Request { asked: Named(name), name }, tries }
}

const WAYS: [u32; 5] = [
    open::READ,
    open::WRITE,
    READ_WRITE_NEW,
    open::WRITE | open::CREATE | open::APPEND,
    open::WRITE | open::CREATE | open::EXCLUSIVE,
];

/// Size, owner, mode and times, as a request has them.
const ATTRIBUTES: [&[u32]; 4] = [&[1, 0, 3], &[2, 1, 1], &[4, 0o777], &[8, 1, 2]];

const ROWS: [Row; 29] = [
    row(packet::OPEN, "open", |c, it| {
        for flags in WAYS {
            for name in ["f", "l", GUESSED] {
                let (path, flags) = (c.below(name), flags.to_be_bytes());
                let new = flags[3] & open::EXCLUSIVE as u8 != 0;
                let path = if new { c.fresh("new") } else { path };
                let handle = c.ask(it, |w| w.string(path.as_bytes()).bytes(&flags).u32(0));
                c.close(handle);
            }
        }
    }),
    row(packet::CLOSE, "close", |c, it| {
        let handle = c.opened("f", open::READ);
        c.with(it, handle, |w| w);
    }),
    row(packet::READ, "read", |c, it| {
        for name in ["f", "l", "sub/h", GUESSED] {
            let handle = c.opened(name, open::READ);
            c.with(it, handle.clone(), |w| w.u64(0).u32(65536));
            c.close(handle);
        }
    }),
    row(packet::WRITE, "write", |c, it| {
        for flags in [open::WRITE, open::WRITE | open::APPEND, READ_WRITE_NEW] {
            let handle = c.opened("f", flags);
            c.with(it, handle.clone(), |w| w.u64(0).string(b"written"));
            c.close(handle);
        }
    }),
    row(packet::LSTAT, "lstat", |c, it| c.paths(it, &["f", "l", "sub", "sub/h", GUESSED])),
    row(packet::STAT, "stat", |c, it| c.paths(it, &["f", "l", "sub", "sub/h", ".", GUESSED])),
    row(packet::FSTAT, "fstat", |c, it| {
        let handle = c.opened("f", open::READ);
        c.with(it, handle.clone(), |w| w);
        c.close(handle);
    }),
    row(packet::SETSTAT, "setstat", |c, it| c.attributes(it, &["f", "l", "sub/h", "."])),
    row(packet::FSETSTAT, "fsetstat", |c, it| {
        for attributes in ATTRIBUTES {
            let handle = c.opened("f", open::WRITE);
            c.with(it, handle.clone(), |w| numbers(w, attributes));
            c.close(handle);
        }
    }),
    row(packet::OPENDIR, "opendir", |c, it| {
        for name in [".", "sub", "l"] {
            let path = c.below(name);
            let handle = c.ask(it, |w| w.string(path.as_bytes()));
            c.close(handle);
        }
    }),
    row(packet::READDIR, "readdir", |c, it| {
        for name in [".", "sub"] {
            let path = c.below(name);
            let handle = c.ask(OPENDIR, |w| w.string(path.as_bytes()));
            for _ in 0..3 {
                c.with(it, handle.clone(), |w| w);
            }
            c.close(handle);
        }
    }),
    row(packet::REMOVE, "remove", |c, it| c.paths(it, &["g", "l", "sub/h", GUESSED])),
    row(packet::MKDIR, "mkdir", |c, it| {
        let path = c.fresh("made");
        c.ask(it, |w| w.string(path.as_bytes()).u32(4).u32(0o755));
        c.paths(RMDIR, &[path.rsplit('/').next().unwrap()]);
    }),
    row(packet::RMDIR, "rmdir", |c, it| c.paths(it, &["sub", "."])),
    row(packet::REALPATH, "realpath", |c, it| c.paths(it, &["f", "l", "sub/..", GUESSED])),
    row(packet::RENAME, "rename", |c, it| c.renames(it)),
    named("posix-rename@openssh.com", |c, it| c.renames(it)),
    row(packet::READLINK, "readlink", |c, it| c.paths(it, &["l", "f"])),
    row(packet::SYMLINK, "symlink", |c, it| {
        let path = c.fresh("link");
        c.ask(it, |w| w.string(b"f").string(path.as_bytes()));
    }),
    named("statvfs@openssh.com", |c, it| {
        c.paths(it, &["f", "."]);
        // This one leads to another file system.
        let answer = c.ask(it, |w| w.string(b"p"));
        assert!(answer.is_none_or(|body| body[16..24] != [0; 8]), "that was /proc");
    }),
    named("fstatvfs@openssh.com", |c, it| {
        let handle = c.opened("f", open::READ);
        c.with(it, handle.clone(), |w| w);
        c.close(handle);
    }),
    named("hardlink@openssh.com", |c, it| {
        let (from, new, round) = (c.below("f"), c.fresh("hard"), c.round);
        let out = format!("hard{round}");
        c.ask(it, |w| w.string(from.as_bytes()).string(out.as_bytes()));
        c.ask(it, |w| w.string(b"file").string(new.as_bytes()));
        // What has got a name in the root can be read there.
        c.reads(&out);
    }),
    named("fsync@openssh.com", |c, it| {
        let handle = c.opened("f", open::WRITE);
        c.with(it, handle.clone(), |w| w);
        c.close(handle);
    }),
    named("lsetstat@openssh.com", |c, it| c.attributes(it, &["f", "l", "sub"])),
    named("limits@openssh.com", |c, it| drop(c.ask(it, |w| w))),
    named("expand-path@openssh.com", |c, it| {
        c.paths(it, &["f", "l", "sub/.."]);
        let path = format!("~/{}", c.below("f"));
        c.ask(it, |w| w.string(path.as_bytes()));
    }),
    named("copy-data", |c, it| {
        let round = c.round;
        for (from, to) in [(c.below("f"), format!("copy{round}")), ("file".to_owned(), c.below("g"))] {
            let (from, to_handle) = (c.opens(&from, open::READ), c.opens(&to, READ_WRITE_NEW));
            if let (Some(from), Some(into)) = (&from, &to_handle) {
                c.ask(it, |w| w.string(from).u64(0).u64(0).string(into).u64(0));
            }
            c.close(from);
            c.close(to_handle);
        }
        c.reads(&format!("copy{round}"));
    }),
    named("home-directory", |c, it| drop(c.ask(it, |w| w.string(b"")))),
    named("users-groups-by-id@openssh.com", |c, it| drop(c.ask(it, |w| w.string(&[0; 4]).string(&[0; 4])))),
];

fn numbers<'w>(writer: &'w mut Writer, numbers: &[u32]) -> &'w mut Writer {
    numbers.iter().fold(writer, |writer, number| writer.u32(*number))
}

impl<'f> Client<'f> {
    fn new(field: &'f Field, openat2: bool) -> Client<'f> {
        let server = Server::spawn(&mut field.server(openat2));
        Client { field, server, done: BTreeMap::new(), refused: 0, round: 0, base: "d" }
    }

    /// A path in the directory that is swapped.
    fn below(&self, name: &str) -> String {
        format!("{}/{name}", self.base)
    }

    /// One that was not there before.
    fn fresh(&self, kind: &str) -> String {
        self.below(&format!("{kind}{}", self.round))
    }

    /// Asks; what was answered is looked at. A handle, or what else the answer holds, when it was done.
    fn ask(&mut self, request: Request, fields: impl FnOnce(&mut Writer) -> &mut Writer) -> Option<Vec<u8>> {
        let (kind, body) = match request.asked {
            Kind(kind) => self.server.ask(kind, fields),
            Named(name) => self.server.ask(packet::EXTENDED, |w| fields(w.string(name.as_bytes()))),
        };
        self.field.is_silent(request.name, &body);
        self.field.names_no_place(request.name, &body);
        let status = || Status::from_code(Reader(&body).u32().unwrap());
        if kind == packet::STATUS && status() != Status::Ok {
            assert_ne!(status(), Status::Unsupported, "{}", request.name);
            self.refused += 1;
            return None;
        }
        *self.done.entry(request.name).or_default() += 1;
        Some(if kind == packet::HANDLE { Reader(&body).string().unwrap().to_vec() } else { body })
    }

    /// Asks about a handle, where there is one.
    fn with(&mut self, request: Request, handle: Option<Vec<u8>>, fields: impl FnOnce(&mut Writer) -> &mut Writer) {
        if let Some(handle) = handle {
            self.ask(request, |w| fields(w.string(&handle)));
        }
    }

    fn opens(&mut self, path: &str, flags: u32) -> Option<Vec<u8>> {
        self.ask(OPEN, |w| w.string(path.as_bytes()).u32(flags).u32(0))
    }

    fn opened(&mut self, name: &str, flags: u32) -> Option<Vec<u8>> {
        let path = self.below(name);
        self.opens(&path, flags)
    }

    fn close(&mut self, handle: Option<Vec<u8>>) {
        self.with(CLOSE, handle, |w| w);
    }

    fn reads(&mut self, path: &str) {
        let handle = self.opens(path, open::READ);
        self.with(READ, handle.clone(), |w| w.u64(0).u32(65536));
        self.close(handle);
    }

    fn paths(&mut self, request: Request, names: &[&str]) {
        for name in names {
            let path = self.below(name);
            self.ask(request, |w| w.string(path.as_bytes()));
        }
    }

    fn attributes(&mut self, request: Request, names: &[&str]) {
        for name in names {
            for attributes in ATTRIBUTES {
                let path = self.below(name);
                self.ask(request, |w| numbers(w.string(path.as_bytes()), attributes));
            }
        }
    }

    /// Out of the directory, into it, and within it.
    fn renames(&mut self, request: Request) {
        let (taken, moved, inside) = (format!("taken{}", self.round), self.fresh("moved"), self.fresh("inside"));
        for (from, to) in [
            (self.below("f"), taken.clone()),
            ("file".into(), moved),
            (self.below("g"), inside),
            (self.below("sub"), taken.clone()),
        ] {
            self.ask(request, |w| w.string(from.as_bytes()).string(to.as_bytes()));
        }
        self.reads(&taken);
    }

    /// Types that have no row are unknown to the server, and so is every extension that it names.
    fn has_all(&mut self) {
        let kinds: BTreeSet<u8> =
            ROWS.iter().filter_map(|row| if let Kind(kind) = row.request.asked { Some(kind) } else { None }).collect();
        for kind in (0..=u8::MAX).filter(|kind| !kinds.contains(kind) && *kind != packet::EXTENDED) {
            assert_eq!(self.server.status(kind, |w| w), Status::Unsupported, "type {kind} has no row");
        }
        let mut version = Reader(&self.server.version[5..]);
        while !version.0.is_empty() {
            let name = String::from_utf8(version.string().unwrap().to_vec()).unwrap();
            version.string().unwrap();
            // Those of the agent have a test of their own.
            let known = NAMES.contains(&name.as_str())
                || ROWS.iter().any(|row| matches!(row.request.asked, Named(known) if known == name));
            assert!(known, "the extension '{name}' has no row");
        }
    }
}

fn every_request(openat2: bool, usual: u32) {
    let field = Field::new();
    let mut client = Client::new(&field, openat2);
    client.has_all();
    let most = rounds(usual);
    let started = Instant::now();
    let missing = |client: &Client<'_>| -> Vec<&str> {
        ROWS.iter().map(|row| row.request.name).filter(|name| !client.done.contains_key(name)).collect()
    };
    field.while_swapping(|| {
        // What is rare is waited for, a while.
        let late = || started.elapsed() > Duration::from_secs(20);
        while client.round < most || !(missing(&client).is_empty() || late()) {
            let row = &ROWS[client.round as usize % ROWS.len()];
            client.base = ["d", "d/sub/..", "./d/../d"][client.round as usize / ROWS.len() % 3];
            (row.tries)(&mut client, row.request);
            client.round += 1;
            field.mend();
            if client.round.is_multiple_of(128) {
                field.tidy();
            }
        }
    });
    assert!(missing(&client).is_empty(), "never done: {:?}", missing(&client));
    assert!(client.refused > most / 10, "the swaps were in nobody's way: {} of {most}", client.refused);
    drop(client);
    field.is_untouched();
    assert_eq!(field.went_without(), !openat2);
}

#[test]
fn h14_no_request_of_a_plain_client_is_led_out_by_a_directory_that_is_swapped() {
    every_request(true, 3000);
}

#[test]
fn h14_h63_nor_where_openat2_is_not_to_be_had() {
    every_request(false, 1500);
}
