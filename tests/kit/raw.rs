//! SFTP by hand: single packets to a server on pipes, and what it answers.

use std::io::{Read, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use lockstep::wire::buffer::{Reader, Writer};
use lockstep::wire::sftp::{Attributes, Status, open, packet};

pub(crate) const READ_WRITE_NEW: u32 = open::READ | open::WRITE | open::CREATE | open::TRUNCATE;

/// A server on pipes.
pub(crate) struct Server {
    pub(crate) child: Child,
    pub(crate) input: Option<ChildStdin>,
    output: ChildStdout,
    next: u32,
    pub(crate) version: Vec<u8>,
}

impl Server {
    pub(crate) fn spawn(command: &mut Command) -> Server {
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
        let (input, output) = (child.stdin.take(), child.stdout.take().unwrap());
        let mut server = Server { child, input, output, next: 1, version: Vec::new() };
        server.send(&Writer::new(packet::INIT).u32(3).finish());
        server.version = server.receive().unwrap();
        server
    }

    pub(crate) fn lockstep(arguments: &[&str]) -> Server {
        Server::spawn(Command::new(env!("CARGO_BIN_EXE_lockstep")).arg("sftp-server").args(arguments))
    }

    pub(crate) fn confined(root: &Path) -> Server {
        Server::lockstep(&["--root", root.to_str().unwrap()])
    }

    pub(crate) fn openssh() -> Server {
        let path = "/usr/lib/openssh/sftp-server";
        assert!(Path::new(path).exists(), "{path} is missing: Debian package openssh-sftp-server");
        Server::spawn(&mut Command::new(path))
    }

    pub(crate) fn send(&mut self, bytes: &[u8]) {
        self.input.as_mut().unwrap().write_all(bytes).unwrap();
    }

    /// One packet without its length; `None` when the server has gone.
    pub(crate) fn receive(&mut self) -> Option<Vec<u8>> {
        let mut length = [0; 4];
        self.output.read_exact(&mut length).ok()?;
        let mut body = vec![0; u32::from_be_bytes(length) as usize];
        self.output.read_exact(&mut body).unwrap();
        Some(body)
    }

    /// Sends a request whose fields `fields` writes; its number.
    pub(crate) fn request(&mut self, kind: u8, fields: impl FnOnce(&mut Writer) -> &mut Writer) -> u32 {
        let mut writer = Writer::new(kind);
        self.next += 1;
        fields(writer.u32(self.next));
        self.send(&writer.finish());
        self.next
    }

    /// The answer: its type and what follows the number.
    pub(crate) fn ask(&mut self, kind: u8, fields: impl FnOnce(&mut Writer) -> &mut Writer) -> (u8, Vec<u8>) {
        let id = self.request(kind, fields);
        let reply = self.receive().expect("the server has gone");
        assert_eq!(reply[1..5], id.to_be_bytes());
        (reply[0], reply[5..].to_vec())
    }

    pub(crate) fn status(&mut self, kind: u8, fields: impl FnOnce(&mut Writer) -> &mut Writer) -> Status {
        let (kind, body) = self.ask(kind, fields);
        assert_eq!(kind, packet::STATUS);
        Status::from_code(Reader(&body).u32().unwrap())
    }

    pub(crate) fn opened(&mut self, kind: u8, fields: impl FnOnce(&mut Writer) -> &mut Writer) -> Vec<u8> {
        let (kind, body) = self.ask(kind, fields);
        assert_eq!(kind, packet::HANDLE, "{}", String::from_utf8_lossy(&body));
        Reader(&body).string().unwrap().to_vec()
    }

    pub(crate) fn open(&mut self, path: &str, flags: u32) -> Vec<u8> {
        self.opened(packet::OPEN, |w| w.string(path.as_bytes()).u32(flags).u32(0))
    }

    pub(crate) fn path(&mut self, kind: u8, path: &str) -> Status {
        self.status(kind, |w| w.string(path.as_bytes()).u32(0))
    }

    pub(crate) fn pair(&mut self, kind: u8, first: &str, second: &str) -> Status {
        self.status(kind, |w| w.string(first.as_bytes()).string(second.as_bytes()))
    }

    pub(crate) fn handle(&mut self, kind: u8, handle: &[u8]) -> Status {
        self.status(kind, |w| w.string(handle))
    }

    pub(crate) fn set_mode(&mut self, path: &str, mode: u32) -> Status {
        self.status(packet::SETSTAT, |w| w.string(path.as_bytes()).u32(4).u32(mode))
    }

    pub(crate) fn write(&mut self, handle: &[u8], offset: u64, data: &[u8]) -> Status {
        self.status(packet::WRITE, |w| w.string(handle).u64(offset).string(data))
    }

    pub(crate) fn read(&mut self, handle: &[u8], offset: u64, length: u32) -> Result<Vec<u8>, Status> {
        let (kind, body) = self.ask(packet::READ, |w| w.string(handle).u64(offset).u32(length));
        match kind {
            packet::DATA => Ok(Reader(&body).string().unwrap().to_vec()),
            _ => Err(Status::from_code(Reader(&body).u32().unwrap())),
        }
    }

    /// The first name of a reply with names.
    pub(crate) fn name(&mut self, kind: u8, fields: impl FnOnce(&mut Writer) -> &mut Writer) -> Result<String, Status> {
        let (kind, body) = self.ask(kind, fields);
        let mut reader = Reader(&body);
        let first = reader.u32().unwrap();
        match kind {
            packet::NAME => Ok(String::from_utf8(reader.string().unwrap().to_vec()).unwrap()),
            _ => Err(Status::from_code(first)),
        }
    }

    /// Names and long names of a directory, sorted.
    pub(crate) fn list(&mut self, path: &str) -> Vec<(String, String, Attributes)> {
        let handle = self.opened(packet::OPENDIR, |w| w.string(path.as_bytes()));
        let mut entries = Vec::new();
        loop {
            let (kind, body) = self.ask(packet::READDIR, |w| w.string(&handle));
            let mut reader = Reader(&body);
            let count = reader.u32().unwrap();
            if kind != packet::NAME {
                assert_eq!(Status::from_code(count), Status::EndOfFile);
                break;
            }
            for _ in 0..count {
                let mut text = || String::from_utf8(reader.string().unwrap().to_vec()).unwrap();
                let (name, long) = (text(), text());
                entries.push((name, long, Attributes::decode(&mut reader).unwrap()));
            }
        }
        assert_eq!(self.handle(packet::CLOSE, &handle), Status::Ok);
        entries.sort_by(|a, b| a.0.cmp(&b.0));
        entries
    }

    /// The most memory it has had, in KiB.
    pub(crate) fn peak_kib(&self) -> u64 {
        let text = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = text.lines().find(|line| line.starts_with("VmHWM")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    }

    /// Whether the server ended the session by itself, and otherwise than with success.
    pub(crate) fn broke_off(mut self) -> bool {
        let mut rest = Vec::new();
        self.output.read_to_end(&mut rest).unwrap();
        rest.is_empty() && !self.child.wait().unwrap().success()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        drop(self.input.take());
        let _ = self.child.wait();
    }
}
