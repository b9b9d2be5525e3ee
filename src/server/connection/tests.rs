//! A process that was taken over says what it likes.

use tokio::net::UnixStream;
use tokio::process::Command;

use super::*;
use crate::scan::names::Question;
use crate::server::listener::{ServeConfig, bind};

/// A server, and a connection of it whose process is a program that does nothing; what it says is given.
async fn with(said: Vec<u8>, then: impl AsyncFnOnce(&mut UnixStream)) -> (Arc<Server>, Arc<Live>) {
    let at = tempfile::tempdir().unwrap();
    let config = ServeConfig::new(([127, 0, 0, 1], 0).into(), at.path().join("host"), Vec::new());
    let server = bind(config).await.unwrap().start().0.server;
    let live = Arc::new(Live::new(([127, 0, 0, 1], 1).into()));
    let permit = server.limits.admit(live.peer.ip()).unwrap();
    let (own, mut its) = UnixStream::pair().unwrap();
    let (from, to) = own.into_split();
    let connection = Connection {
        server: &server,
        live: &live,
        permit: Some(permit),
        child: Command::new("sleep").arg("600").kill_on_drop(true).spawn().unwrap(),
        frames: Frames::new(from, FROM_PROCESS_MAX),
        to,
        admitted: None,
        start: None,
        sessions: HashMap::new(),
        number: 0,
        said: HashSet::new(),
        messages: Pace::new(MESSAGES),
        lines: Pace::new(LINES),
        told: false,
        late: false,
        deadline: None,
    };
    its.write_all(&said).await.unwrap();
    let both = async { tokio::join!(connection.run(), then(&mut its)) };
    tokio::time::timeout(Duration::from_secs(30), both).await.expect("the process is not killed");
    (server, live)
}

fn asked(asked: Asked) -> FromProcess {
    FromProcess::Asked(1, asked)
}

#[tokio::test]
async fn a_process_that_says_what_it_should_not_is_killed_and_has_got_nothing() {
    for wrong in [
        asked(Asked::Session),
        asked(Asked::Name(Question::UserName(0))),
        asked(Asked::Confined(Ok(Confinement::default()))),
        FromProcess::SessionEnded { number: 1, received: 0, sent: 0, error: None },
    ] {
        // The socket stays open: what ends this is that the process is killed.
        let (server, live) = with(frame(&wrong).unwrap(), async |_| {}).await;
        assert!(live.login.get().is_none());
        assert_eq!((server.limits.connections(), server.limits.sessions()), (0, 0));
    }
    for wrong in [&[0xff, 0xff, 0xff, 0xff][..], &[0, 0, 0, 2, b'{', b'}'], &[0, 0, 0, 1, 0xff]] {
        let (server, _) = with(wrong.to_vec(), async |_| {}).await;
        assert_eq!(server.limits.connections(), 0);
    }
}

#[tokio::test]
async fn a_process_ends_once() {
    let end = frame(&FromProcess::Ended { fault: None, why: None }).unwrap();
    let (server, live) = with([&end[..], &end].concat(), async |_| {}).await;
    assert!(live.is_gone());
    assert_eq!(server.limits.connections(), 0);
}

#[tokio::test]
async fn nobody_logs_in_whom_the_listener_does_not_know() {
    let key = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIFmKmQTLs7FzjcbwA1MQMG9S5sFwKQwJ5w1SLvOMkCQH";
    let shown = super::super::process::message::Shown::Key(key.into());
    let said = frame(&asked(Asked::Proven { user: "root".into(), shown })).unwrap();
    let (_, live) = with(said, async |its| {
        let mut frames = Frames::new(&mut *its, FROM_PROCESS_MAX);
        assert!(frames.next::<super::super::process::message::Setup>().await.unwrap().is_some());
        let answer: Option<ToProcess> = frames.next().await.unwrap();
        assert!(matches!(answer, Some(ToProcess::Answer(1, Answer::No(reason))) if reason.contains("no such user")));
        drop(frames);
        its.shutdown().await.unwrap();
    })
    .await;
    assert!(live.login.get().is_none() && live.refusals().unwrap().contains("no such user"));
}
