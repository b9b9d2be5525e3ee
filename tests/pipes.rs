//! Servers at the end of a pipe instead of a network: what an endpoint sees of a host, without SSH.

use std::io::{Read, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use lockstep::endpoint::link::{ConnectError, Link, LinkError, Remote, Way};

/// A host that runs lockstep's and OpenSSH's servers.
pub(crate) struct Pipes;

struct Pipe {
    child: Mutex<Child>,
    input: Mutex<Option<ChildStdin>>,
    output: Mutex<ChildStdout>,
}

fn start(command: &mut Command) -> Arc<dyn Link> {
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("sftp-server is not installed: Debian package openssh-sftp-server");
    let (input, output) = (child.stdin.take(), child.stdout.take().unwrap());
    Arc::new(Pipe { child: Mutex::new(child), input: Mutex::new(input), output: Mutex::new(output) })
}

impl Remote for Pipes {
    fn open(&self, way: &Way, _: usize) -> Result<Arc<dyn Link>, ConnectError> {
        Ok(match way {
            Way::SftpSubsystem => start(&mut Command::new("/usr/lib/openssh/sftp-server")),
            _ => start(Command::new(env!("CARGO_BIN_EXE_lockstep")).arg("sftp-server")),
        })
    }

    fn exec(&self, command: &str, _: usize) -> Result<Arc<dyn Link>, ConnectError> {
        Ok(start(Command::new("sh").args(["-c", command])))
    }

    fn describe(&self) -> String {
        "pipes".into()
    }
}

impl Link for Pipe {
    fn send(&self, packet: Bytes) -> Result<(), LinkError> {
        let mut input = self.input.lock().unwrap();
        let input = input.as_mut().ok_or_else(|| LinkError("closed".into()))?;
        input.write_all(&packet).map_err(|error| LinkError(error.to_string()))
    }

    fn recv(&self) -> Result<Option<Bytes>, LinkError> {
        let mut buffer = vec![0; 64 << 10];
        let read = self.output.lock().unwrap().read(&mut buffer).map_err(|error| LinkError(error.to_string()))?;
        buffer.truncate(read);
        Ok((read > 0).then(|| buffer.into()))
    }

    fn close(&self) {
        self.input.lock().unwrap().take();
    }
}

impl Drop for Pipe {
    fn drop(&mut self) {
        self.close();
        let _ = self.child.lock().unwrap().wait();
    }
}
