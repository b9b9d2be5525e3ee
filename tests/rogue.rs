//! What the client does with servers that are weak, old or hostile: a server of the test's own on loopback.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use lockstep::endpoint::link::{ConnectError, Remote as _, Way};
use lockstep::error::Exit;
use lockstep::ssh::{SshOptions, SshRemote};
use russh::keys::PrivateKey;
use russh::keys::ssh_key::LineEnding;
use russh::keys::ssh_key::private::{Ed25519Keypair, KeypairData};
use russh::server::{Auth, ChannelOpenHandle, Config, Handle, Handler, Msg, Response, Session, VerifiedPublicKey};
use russh::{Channel, ChannelId, MethodKind, Preferred, cipher, kex};

/// What the server saw.
type Seen = Arc<Mutex<BTreeSet<String>>>;

struct Rogue {
    seen: Seen,
    /// A session was started: what the client answered to channels opened towards it.
    answers: std::sync::mpsc::Sender<Vec<String>>,
    handle: Option<Handle>,
    /// Whether keys are let in.
    keys: bool,
}

impl Rogue {
    fn saw(&self, what: &str) {
        self.seen.lock().unwrap().insert(what.to_owned());
    }
}

impl Handler for Rogue {
    type Error = russh::Error;

    async fn auth_none(&mut self, _: &str) -> Result<Auth, russh::Error> {
        self.saw("none");
        Ok(Auth::reject())
    }

    async fn auth_password(&mut self, _: &str, _: &str) -> Result<Auth, russh::Error> {
        self.saw("password");
        Ok(Auth::reject())
    }

    async fn auth_keyboard_interactive<'a>(
        &'a mut self,
        _: &str,
        _: &str,
        _: Option<Response<'a>>,
    ) -> Result<Auth, russh::Error> {
        self.saw("keyboard-interactive");
        Ok(Auth::reject())
    }

    async fn auth_publickey(&mut self, _: &str, _: VerifiedPublicKey<'_>) -> Result<Auth, russh::Error> {
        self.saw("key");
        Ok(if self.keys { Auth::Accept } else { Auth::reject() })
    }

    async fn channel_open_session(
        &mut self,
        _: Channel<Msg>,
        reply: ChannelOpenHandle,
        session: &mut Session,
    ) -> Result<(), russh::Error> {
        self.handle = Some(session.handle());
        reply.accept().await;
        Ok(())
    }

    async fn subsystem_request(&mut self, id: ChannelId, _: &str, session: &mut Session) -> Result<(), russh::Error> {
        session.channel_success(id)?;
        let (Some(handle), answers) = (self.handle.take(), self.answers.clone()) else { return Ok(()) };
        tokio::spawn(async move {
            let mut opened = Vec::new();
            let mut note = |kind: &str, answer: Result<Channel<Msg>, russh::Error>| {
                if !matches!(answer, Err(russh::Error::ChannelOpenFailure(_))) {
                    opened.push(kind.to_owned());
                }
            };
            note("agent", handle.channel_open_agent().await);
            note("session", handle.channel_open_session().await);
            note("direct-tcpip", handle.channel_open_direct_tcpip("h", 1, "o", 2).await);
            note("direct-streamlocal", handle.channel_open_direct_streamlocal("/s").await);
            note("forwarded-tcpip", handle.channel_open_forwarded_tcpip("h", 1, "o", 2).await);
            note("forwarded-streamlocal", handle.channel_open_forwarded_streamlocal("/s").await);
            note("x11", handle.channel_open_x11("o", 2).await);
            let _ = answers.send(opened);
        });
        Ok(())
    }
}

struct Server {
    _runtime: tokio::runtime::Runtime,
    at: tempfile::TempDir,
    port: u16,
    seen: Seen,
    answers: std::sync::mpsc::Receiver<Vec<String>>,
}

fn key(seed: u8) -> PrivateKey {
    PrivateKey::new(KeypairData::Ed25519(Ed25519Keypair::from_seed(&[seed; 32])), "").unwrap()
}

impl Server {
    fn start(methods: &[MethodKind], preferred: Preferred) -> Server {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let seen = Seen::default();
        let (send, answers) = std::sync::mpsc::channel();
        let config = Arc::new(Config {
            methods: methods.into(),
            keys: vec![key(1)],
            auth_rejection_time: Duration::ZERO,
            preferred,
            ..Config::default()
        });
        let listener = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0")).unwrap();
        let port = listener.local_addr().unwrap().port();
        let noted = Arc::clone(&seen);
        let keys = methods.contains(&MethodKind::PublicKey);
        runtime.spawn(async move {
            while let Ok((socket, _)) = listener.accept().await {
                let handler = Rogue { seen: Arc::clone(&noted), answers: send.clone(), handle: None, keys };
                let config = Arc::clone(&config);
                tokio::spawn(async move {
                    if let Ok(session) = russh::server::run_stream(config, socket, handler).await {
                        let _ = session.await;
                    }
                });
            }
        });
        let at = tempfile::tempdir().unwrap();
        let public = key(1).public_key().to_openssh().unwrap();
        fs::write(at.path().join("known"), format!("[127.0.0.1]:{port} {public}\n")).unwrap();
        fs::write(at.path().join("user"), key(2).to_openssh(LineEnding::LF).unwrap().as_bytes()).unwrap();
        fs::set_permissions(at.path().join("user"), fs::Permissions::from_mode(0o600)).unwrap();
        Server { _runtime: runtime, at, port, seen, answers }
    }

    fn options(&self) -> SshOptions {
        SshOptions {
            identity_files: vec![self.at.path().join("user")],
            known_hosts: vec![self.at.path().join("known")],
            ..SshOptions::new("u", "127.0.0.1", self.port)
        }
    }

    fn refusal(&self) -> ConnectError {
        match SshRemote::new(self.options()).unwrap().open(&Way::SftpSubsystem, 0) {
            Ok(_) => panic!("was let in"),
            Err(error) => error,
        }
    }

    fn seen(&self) -> Vec<String> {
        self.seen.lock().unwrap().iter().cloned().collect()
    }
}

fn without_strict() -> Preferred {
    let kex = Preferred::DEFAULT.kex.iter().filter(|name| !name.as_ref().contains("kex-strict")).copied();
    Preferred { kex: kex.collect::<Vec<_>>().into(), ..Preferred::DEFAULT }
}

#[test]
fn h57_a_server_without_strict_key_exchange_is_refused_before_the_login() {
    let server = Server::start(&[MethodKind::PublicKey], without_strict());
    let error = server.refusal();
    assert_eq!(error.exit, Exit::Trust, "{error}");
    assert!(error.message.contains("strict key exchange") && error.message.contains("CVE-2023-48795"), "{error}");
    assert!(server.seen().is_empty(), "{:?}", server.seen());
}

#[test]
fn h57_a_server_with_weak_algorithms_alone_is_refused_and_they_are_named() {
    let strict = |name| vec![name, kex::EXTENSION_OPENSSH_STRICT_KEX_AS_SERVER].into();
    let cases = [
        (
            Preferred { kex: strict(kex::DH_G14_SHA1), ..Preferred::DEFAULT },
            "key exchange",
            "diffie-hellman-group14-sha1",
        ),
        (Preferred { cipher: vec![cipher::AES_256_CTR].into(), ..Preferred::DEFAULT }, "cipher", "aes256-ctr"),
    ];
    for (preferred, kind, name) in cases {
        let server = Server::start(&[MethodKind::PublicKey], preferred);
        let error = server.refusal();
        assert_eq!(error.exit, Exit::Trust, "{error}");
        assert!(error.message.contains(kind) && error.message.contains(name), "{error}");
        assert!(server.seen().is_empty(), "{:?}", server.seen());
    }
}

#[test]
fn h54_a_server_that_wants_a_password_gets_none() {
    for methods in [&[MethodKind::Password][..], &[MethodKind::Password, MethodKind::KeyboardInteractive]] {
        let server = Server::start(methods, Preferred::DEFAULT);
        let error = server.refusal();
        assert_eq!(error.exit, Exit::Trust, "{error}");
        assert!(error.message.contains("takes no keys") && error.message.contains("never"), "{error}");
        assert!(error.message.contains("password") && error.message.contains("PubkeyAuthentication"), "{error}");
        let none = SshOptions { identity_files: Vec::new(), ..server.options() };
        let error = SshRemote::new(none).unwrap().open(&Way::SftpSubsystem, 0).err().unwrap();
        assert!(error.message.contains("takes no keys"), "{error}");
        let sent: Vec<_> = server.seen().into_iter().filter(|what| what != "none" && what != "key").collect();
        assert!(sent.is_empty(), "{sent:?}");
    }
}

#[test]
fn h50_an_exposed_key_is_refused_before_anything_is_connected() {
    let server = Server::start(&[MethodKind::PublicKey], Preferred::DEFAULT);
    for mode in [0o640, 0o604, 0o620] {
        fs::set_permissions(server.at.path().join("user"), fs::Permissions::from_mode(mode)).unwrap();
        let mut options = server.options();
        // A key that would be accepted comes first, and nothing listens here.
        fs::copy(server.at.path().join("user"), server.at.path().join("good")).unwrap();
        fs::set_permissions(server.at.path().join("good"), fs::Permissions::from_mode(0o600)).unwrap();
        options.identity_files.insert(0, server.at.path().join("good"));
        options.port = 1;
        let error = SshRemote::new(options).unwrap().open(&Way::SftpSubsystem, 0).err().unwrap();
        assert_eq!(error.exit, Exit::Trust, "{error}");
        assert!(error.message.contains("chmod 600") && error.message.contains("/user"), "{error}");
    }
    // Public halves may be read by anybody.
    fs::set_permissions(server.at.path().join("user"), fs::Permissions::from_mode(0o600)).unwrap();
    let mut options = server.options();
    fs::write(server.at.path().join("half.pub"), key(3).public_key().to_openssh().unwrap()).unwrap();
    options.identity_files.insert(0, server.at.path().join("half.pub"));
    SshRemote::new(options).unwrap().open(&Way::SftpSubsystem, 0).map(drop).unwrap();
}

#[test]
fn channels_that_a_server_opens_are_refused() {
    let server = Server::start(&[MethodKind::PublicKey], Preferred::DEFAULT);
    let remote = SshRemote::new(server.options()).unwrap();
    let _link = remote.open(&Way::SftpSubsystem, 0).unwrap_or_else(|error| panic!("{error}"));
    let opened = server.answers.recv_timeout(Duration::from_secs(20)).unwrap();
    assert!(opened.is_empty(), "the client accepted {opened:?}");
    assert_eq!(server.seen(), ["key"]);
}
