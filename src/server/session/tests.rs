//! What a session answers, packet by packet.

use super::*;
use std::sync::Mutex;

use crate::wire::sftp::open;

#[derive(Default)]
struct Kept(Mutex<Vec<Vec<u8>>>);

impl Output for Kept {
    fn send(&self, packet: Vec<u8>) {
        self.0.lock().unwrap().push(packet);
    }
}

fn session(read_only: bool) -> (tempfile::TempDir, Arc<Kept>, Session) {
    let directory = tempfile::tempdir().unwrap();
    let root = directory.path().to_owned();
    let (policy, actor) = (PolicySpec::default(), String::new());
    let config = SessionConfig { root, confine: true, read_only, policy, actor };
    let kept = Arc::new(Kept::default());
    let mut session = Session::new(config, kept.clone(), None).unwrap();
    session.feed(&Writer::new(packet::INIT).u32(3).finish()).unwrap();
    (directory, kept, session)
}

fn ask(session: &mut Session, kept: &Kept, mut request: Writer) -> Vec<u8> {
    session.feed(&request.finish()).unwrap();
    session.lanes.wait();
    kept.0.lock().unwrap().pop().unwrap()
}

fn create(mode: u32) -> Writer {
    let mut request = Writer::new(packet::OPEN);
    request.u32(1).string(b"/../f").u32(open::WRITE | open::CREATE).u32(4).u32(mode);
    request
}

#[test]
fn h45_special_bits_are_dropped() {
    use std::os::unix::fs::PermissionsExt as _;
    let (directory, kept, mut session) = session(false);
    assert_eq!(ask(&mut session, &kept, create(0o4755))[4], packet::HANDLE);
    let mode = std::fs::metadata(directory.path().join("f")).unwrap().permissions().mode();
    assert_eq!(mode & 0o7000, 0);
}

#[test]
fn a_read_only_session_changes_nothing() {
    let (directory, kept, mut session) = session(true);
    assert_eq!(ask(&mut session, &kept, create(0o644)), Status::PermissionDenied.packet(1));
    assert!(!directory.path().join("f").exists());
}

#[test]
fn h40_h44_unknown_handles_and_requests_get_an_answer() {
    let (_directory, kept, mut session) = session(false);
    let mut close = Writer::new(packet::CLOSE);
    close.u32(1).string(b"12345678");
    assert_eq!(ask(&mut session, &kept, close), Status::Failure.packet(1));
    let mut unknown = Writer::new(99);
    unknown.u32(1);
    assert_eq!(ask(&mut session, &kept, unknown), Status::Unsupported.packet(1));
}
