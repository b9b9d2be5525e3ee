//! `lockstep serve` against clients that no stock program is: packets of SSH by hand (RFC 4252, 4253 and 4254).

use std::fs;
use std::io::{self, BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::time::Duration;

use aws_lc_rs::{aead, agreement, digest, rand, signature};

use crate::kit::served::{Served, user, write};
use crate::kit::{keygen, until};

const KEX: &str = "curve25519-sha256,kex-strict-c-v00@openssh.com";
const CIPHER: &str = "aes128-gcm@openssh.com";
const DISCONNECT: u8 = 1;
const USERAUTH_REQUEST: u8 = 50;
const USERAUTH_FAILURE: u8 = 51;
const USERAUTH_SUCCESS: u8 = 52;
const USERAUTH_PK_OK: u8 = 60;
const CHANNEL_OPEN: u8 = 90;
const CHANNEL_OPEN_CONFIRMATION: u8 = 91;
const CHANNEL_OPEN_FAILURE: u8 = 92;
const CHANNEL_DATA: u8 = 94;
const CHANNEL_REQUEST: u8 = 98;
const CHANNEL_FAILURE: u8 = 100;

fn string(bytes: &[u8]) -> Vec<u8> {
    [&(bytes.len() as u32).to_be_bytes()[..], bytes].concat()
}

fn strings(fields: &[&[u8]]) -> Vec<u8> {
    fields.iter().flat_map(|field| string(field)).collect()
}

/// A number without a sign, as a field.
fn mpint(bytes: &[u8]) -> Vec<u8> {
    let digits = &bytes[bytes.iter().position(|&byte| byte != 0).unwrap_or(bytes.len())..];
    let sign: &[u8] = if digits.first().is_some_and(|&byte| byte >= 128) { &[0] } else { &[] };
    string(&[sign, digits].concat())
}

/// Takes a field off the front.
fn field<'a>(bytes: &mut &'a [u8]) -> &'a [u8] {
    let length = u32::from_be_bytes(*bytes.first_chunk().unwrap()) as usize;
    let (head, rest) = bytes[4..].split_at(length);
    *bytes = rest;
    head
}

/// One direction of AES-128-GCM.
struct Cipher {
    key: aead::LessSafeKey,
    nonce: [u8; 12],
}

impl Cipher {
    fn nonce(&mut self) -> aead::Nonce {
        let nonce = aead::Nonce::assume_unique_for_key(self.nonce);
        let count = u64::from_be_bytes(*self.nonce.last_chunk().unwrap());
        self.nonce[4..].copy_from_slice(&(count + 1).to_be_bytes());
        nonce
    }
}

struct Wire {
    stream: BufReader<TcpStream>,
    ciphers: Option<(Cipher, Cipher)>,
    session: Vec<u8>,
    versions: [Vec<u8>; 2],
}

impl Wire {
    /// Only the versions are exchanged.
    fn connect(served: &Served) -> Wire {
        let stream = TcpStream::connect(("127.0.0.1", served.port)).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        let mut stream = BufReader::new(stream);
        let mut line = Vec::new();
        stream.read_until(b'\n', &mut line).unwrap();
        stream.get_mut().write_all(b"SSH-2.0-wire\r\n").unwrap();
        let versions = [b"SSH-2.0-wire".to_vec(), line.trim_ascii_end().to_vec()];
        Wire { stream, ciphers: None, session: Vec::new(), versions }
    }

    /// With keys, and the authentication service.
    fn secured(served: &Served) -> Wire {
        let mut wire = Wire::connect(served);
        wire.exchange_keys();
        wire.send(&[&[5][..], &string(b"ssh-userauth")].concat());
        assert_eq!(wire.receive().unwrap()[0], 6);
        wire
    }

    fn kexinit(kex: &str, cipher: &str) -> Vec<u8> {
        let lists = [kex, "ssh-ed25519", cipher, cipher, "hmac-sha2-256", "hmac-sha2-256", "none", "none", "", ""];
        [&[20][..], &[7; 16], &strings(&lists.map(str::as_bytes)), &[0; 5]].concat()
    }

    fn exchange_keys(&mut self) {
        let ours = Wire::kexinit(KEX, CIPHER);
        self.send(&ours);
        let theirs = self.receive().unwrap();
        let random = rand::SystemRandom::new();
        let private = agreement::EphemeralPrivateKey::generate(&agreement::X25519, &random).unwrap();
        let public = private.compute_public_key().unwrap().as_ref().to_vec();
        self.send(&[&[30][..], &string(&public)].concat());
        let reply = self.receive().unwrap();
        assert_eq!(reply[0], 31);
        let mut rest = &reply[1..];
        let (host_key, other) = (field(&mut rest), field(&mut rest));
        let peer = agreement::UnparsedPublicKey::new(&agreement::X25519, other);
        let secret = agreement::agree_ephemeral(private, peer, "no agreement", |secret| Ok(mpint(secret))).unwrap();
        let hashed = strings(&[&self.versions[0], &self.versions[1], &ours, &theirs, host_key, &public, other]);
        let hash = digest::digest(&digest::SHA256, &[&hashed[..], &secret].concat()).as_ref().to_vec();
        self.send(&[21]);
        assert_eq!(self.receive().unwrap(), [21]);
        let derive = |letter: u8| {
            digest::digest(&digest::SHA256, &[&secret[..], &hash, &[letter], &hash].concat()).as_ref().to_vec()
        };
        let cipher = |iv, key| Cipher {
            key: aead::LessSafeKey::new(aead::UnboundKey::new(&aead::AES_128_GCM, &derive(key)[..16]).unwrap()),
            nonce: derive(iv)[..12].try_into().unwrap(),
        };
        self.ciphers = Some((cipher(b'A', b'C'), cipher(b'B', b'D')));
        self.session = hash;
    }

    fn send(&mut self, payload: &[u8]) {
        // Whole blocks: of 8 with the length before there are keys, of 16 without it after.
        let (block, counted) = if self.ciphers.is_some() { (16, 1) } else { (8, 5) };
        let padding = 4 + (block - (counted + payload.len() + 4) % block) % block;
        let mut body = [&[padding as u8][..], payload, &vec![0; padding]].concat();
        let length = (body.len() as u32).to_be_bytes();
        if let Some((out, _)) = &mut self.ciphers {
            let nonce = out.nonce();
            out.key.seal_in_place_append_tag(nonce, aead::Aad::from(length), &mut body).unwrap();
        }
        // A server that has hung up shows when its answer is read.
        let _ = self.stream.get_mut().write_all(&[&length[..], &body].concat());
    }

    /// The next packet that says something.
    fn receive(&mut self) -> io::Result<Vec<u8>> {
        loop {
            let mut length = [0; 4];
            self.stream.read_exact(&mut length)?;
            let tag = if self.ciphers.is_some() { 16 } else { 0 };
            let mut body = vec![0; u32::from_be_bytes(length) as usize + tag];
            self.stream.read_exact(&mut body)?;
            if let Some((_, back)) = &mut self.ciphers {
                let nonce = back.nonce();
                let plain = back.key.open_in_place(nonce, aead::Aad::from(length), &mut body).unwrap().len();
                body.truncate(plain);
            }
            let payload = body[1..body.len() - body[0] as usize].to_vec();
            // Ignore, debug, extension information, global requests.
            if ![2, 4, 7, 80].contains(&payload[0]) {
                return Ok(payload);
            }
        }
    }

    /// The type of the answer; nothing when the server hangs up.
    fn ask(&mut self, payload: &[u8]) -> Option<u8> {
        self.send(payload);
        self.receive().ok().map(|answer| answer[0])
    }

    fn open_channel(&mut self, kind: &str, more: &[u8]) -> Option<u8> {
        self.ask(
            &[&[CHANNEL_OPEN][..], &string(kind.as_bytes()), &[0; 4], &[0, 1, 0, 0], &[0, 0, 128, 0], more].concat(),
        )
    }

    /// A request with a key: an offer, or with what is to sign it.
    fn log_in(&mut self, user: &str, key: &Key, signer: Option<&Key>) -> Option<u8> {
        let (mut request, signature) = self.request(user, key, signer);
        request.extend(signature);
        self.ask(&request)
    }

    /// A request for one user with a signature that was made for another.
    fn log_in_signing(&mut self, user: &str, signed_user: &str, key: &Key) -> Option<u8> {
        let (mut request, _) = self.request(user, key, Some(key));
        request.extend(self.request(signed_user, key, Some(key)).1);
        self.ask(&request)
    }

    /// The request without its signature, and that.
    fn request(&self, user: &str, key: &Key, signer: Option<&Key>) -> (Vec<u8>, Vec<u8>) {
        let head = strings(&[user.as_bytes(), b"ssh-connection", b"publickey"]);
        let signed = u8::from(signer.is_some());
        let blob = strings(&[b"ssh-ed25519", &key.public]);
        let request = [&[USERAUTH_REQUEST][..], &head, &[signed], &strings(&[b"ssh-ed25519", &blob])].concat();
        let signature = signer.map_or_else(Vec::new, |signer| {
            let signature = signer.sign(&[&string(&self.session)[..], &request].concat());
            string(&strings(&[b"ssh-ed25519", &signature]))
        });
        (request, signature)
    }
}

struct Key {
    pair: signature::Ed25519KeyPair,
    public: Vec<u8>,
}

impl Key {
    fn read(served: &Served, name: &str) -> Key {
        let key = ssh_key::PrivateKey::read_openssh_file(served.path(name)).unwrap();
        let pair = key.key_data().ed25519().unwrap();
        let public = pair.public.0.to_vec();
        let pair = signature::Ed25519KeyPair::from_seed_and_public_key(&pair.private.to_bytes(), &public).unwrap();
        Key { pair, public }
    }

    fn sign(&self, message: &[u8]) -> Vec<u8> {
        self.pair.sign(message).as_ref().to_vec()
    }
}

#[test]
fn h57_a_client_without_strict_key_exchange_or_with_weak_algorithms_is_told_and_let_go() {
    let served = Served::start("", "");
    for (kex, cipher, part) in [
        ("curve25519-sha256", CIPHER, "strict key exchange"),
        ("diffie-hellman-group1-sha1,kex-strict-c-v00@openssh.com", CIPHER, "no key exchange that it offers"),
        (KEX, "3des-cbc,aes128-cbc", "no cipher that it offers (3des-cbc,aes128-cbc)"),
    ] {
        let mut wire = Wire::connect(&served);
        assert_eq!(wire.receive().unwrap()[0], 20);
        wire.send(&Wire::kexinit(kex, cipher));
        // What comes with it is not waited for.
        wire.send(&[30; 100]);
        let answer = wire.receive().unwrap();
        assert_eq!(answer[0], DISCONNECT);
        assert!(String::from_utf8_lossy(&answer).contains(part), "{}", String::from_utf8_lossy(&answer));
        assert!(wire.receive().is_err());
        served.wait_for(part);
    }
    // As stock clients see it.
    let output = served.ssh("sync", &["-oCiphers=aes128-ctr", "sync@127.0.0.1", "id"]);
    assert!(String::from_utf8_lossy(&output.stderr).contains("no matching cipher found"));
    // The same packets with all that is wanted.
    Wire::secured(&served);
    // Where it is not required, the cipher that needs it is not there.
    let served = Served::start("strict_key_exchange = false", "");
    let mut wire = Wire::connect(&served);
    let offer = wire.receive().unwrap();
    assert!(!String::from_utf8_lossy(&offer).contains("chacha20"));
    wire.send(&Wire::kexinit("curve25519-sha256", CIPHER));
    wire.send(&[&[30][..], &string(&[9; 32])].concat());
    assert_eq!(wire.receive().unwrap()[0], 31);
}

#[test]
fn h58_only_the_key_that_signed_counts() {
    let served = Served::with(
        &["sync", "other"],
        |_| String::new(),
        "auth_tries = 20",
        |at| user(at, "sync", "") + &user(at, "other", ""),
    );
    keygen(served.at(), &["-t", "ed25519", "-N", "", "-f", "stranger.key"]);
    let [sync, other, stranger] = ["sync.key", "other.key", "stranger.key"].map(|name| Key::read(&served, name));
    let mut wire = Wire::secured(&served);
    // Offered, never proven.
    assert_eq!(wire.log_in("sync", &sync, None), Some(USERAUTH_PK_OK));
    wire.send(&[&[CHANNEL_OPEN][..], &string(b"session"), &[0; 4], &[0, 1, 0, 0], &[0, 0, 128, 0]].concat());
    // Proven with another key: a stranger's, or that of another user; for the offered user, or another.
    for signer in [&stranger, &other] {
        assert_eq!(wire.log_in("sync", &sync, None), Some(USERAUTH_PK_OK));
        assert_eq!(wire.log_in("sync", &sync, Some(signer)), Some(USERAUTH_FAILURE));
    }
    assert_eq!(wire.log_in("sync", &sync, None), Some(USERAUTH_PK_OK));
    assert_eq!(wire.log_in("sync", &stranger, Some(&stranger)), Some(USERAUTH_FAILURE));
    assert_eq!(wire.log_in("sync", &sync, None), Some(USERAUTH_PK_OK));
    assert_eq!(wire.log_in("other", &sync, Some(&sync)), Some(USERAUTH_FAILURE));
    assert_eq!(wire.log_in("nobody", &sync, Some(&sync)), Some(USERAUTH_FAILURE));
    // A signature for another connection.
    let mut elsewhere = Wire::secured(&served);
    elsewhere.session = wire.session.clone();
    assert_eq!(elsewhere.log_in("sync", &sync, Some(&sync)), Some(USERAUTH_FAILURE));
    // Whoever offers one key and signs with another of his own is who the second says.
    assert_eq!(wire.log_in("sync", &sync, None), Some(USERAUTH_PK_OK));
    assert_eq!(wire.log_in("other", &other, Some(&other)), Some(USERAUTH_SUCCESS));
    served.wait_for("logged in");
    assert!(served.log().contains("user=\"other\"") && !served.log().contains("user=\"sync\""), "{}", served.log());
    assert_eq!(wire.open_channel("session", &[]), Some(CHANNEL_OPEN_CONFIRMATION));
}

#[test]
fn h58_what_the_offered_key_may_do_is_not_for_the_one_that_signed() {
    let served = Served::start("", "auth_tries = 20");
    keygen(served.at(), &["-q", "-t", "ed25519", "-N", "", "-f", "reader.key"]);
    let line = |name: &str| fs::read_to_string(served.path(name)).unwrap();
    let reader_line = format!("command=\"internal-sftp -R\" {}", line("reader.key.pub"));
    write(&served.path("sync.keys"), &(line("sync.key.pub") + &reader_line));
    let [sync, reader] = ["sync.key", "reader.key"].map(|name| Key::read(&served, name));
    let fingerprint = |name: &str| {
        let key = ssh_key::PublicKey::from_openssh(&line(name)).unwrap();
        key.fingerprint(ssh_key::HashAlg::Sha256).to_string()
    };

    // Each key is offered before the other one signs; and a signature for another user's request is none.
    for (offered, signer, name, may_write) in
        [(&sync, &reader, "reader.key.pub", false), (&reader, &sync, "sync.key.pub", true)]
    {
        let mut wire = Wire::secured(&served);
        assert_eq!(wire.log_in("sync", offered, None), Some(USERAUTH_PK_OK));
        assert_eq!(wire.log_in_signing("sync", "root", signer), Some(USERAUTH_FAILURE));
        assert_eq!(wire.log_in("sync", signer, Some(signer)), Some(USERAUTH_SUCCESS));
        served.wait_for(&format!("key=\"{}\"", fingerprint(name)));
        wire.send(&[&[CHANNEL_OPEN][..], &string(b"session"), &[0; 4], &[0, 1, 0, 0], &[0, 0, 128, 0]].concat());
        let confirmed = wire.receive().unwrap();
        assert_eq!(confirmed[0], CHANNEL_OPEN_CONFIRMATION);
        let channel = &confirmed[5..9];
        wire.send(&[&[CHANNEL_REQUEST][..], channel, &string(b"subsystem"), &[0], &string(b"sftp")].concat());
        let packet = |body: &[u8]| [&[CHANNEL_DATA][..], channel, &string(&string(body))].concat();
        wire.send(&packet(&[1, 0, 0, 0, 3]));
        // SSH_FXP_MKDIR 1; its status is OK or PERMISSION_DENIED.
        wire.send(&packet(&[&[14, 0, 0, 0, 1][..], &string(b"/made"), &[0; 4]].concat()));
        let mut data = Vec::new();
        let status = [101, 0, 0, 0, 1, 0, 0, 0, if may_write { 0 } else { 3 }];
        while !data.windows(status.len()).any(|part| part == status) {
            let message = wire.receive().unwrap();
            if message[0] == CHANNEL_DATA {
                data.extend_from_slice(field(&mut &message[5..]));
            }
        }
        assert_eq!(fs::exists(served.path("sync/made")).unwrap(), may_write);
    }
}

/// Names and certificates may be as long as a packet.
#[test]
fn what_a_stranger_says_of_himself_does_not_fill_the_logs() {
    let served = Served::recording();
    let sync = Key::read(&served, "sync.key");
    for _ in 0..2 {
        let mut wire = Wire::secured(&served);
        assert_eq!(wire.log_in(&"\u{1b}".repeat(30_000), &sync, None), Some(USERAUTH_FAILURE));
    }
    let record = served.path("record/.lockstep/audit.jsonl");
    until("the records", || fs::read_to_string(&record).unwrap().matches("\"refuse\"").count() == 2);
    for text in [fs::read_to_string(&record).unwrap(), served.log()] {
        assert!(text.len() < 5000 && text.contains("x1b") && !text.contains('\u{1b}'), "{text}");
    }
    assert!(served.sftp("sync", "sync", "ls\n").status.success());
}

#[test]
fn h59_a_channel_before_the_login_is_not_opened() {
    let served = Served::start("", "login_grace = '1s'");
    // Before there are keys.
    let mut wire = Wire::connect(&served);
    assert_eq!(wire.receive().unwrap()[0], 20);
    assert!(matches!(wire.open_channel("session", &[]), None | Some(DISCONNECT)));
    // Before the login: nothing answers, no request is taken, and the time runs out.
    let mut wire = Wire::secured(&served);
    wire.send(&[&[CHANNEL_OPEN][..], &string(b"session"), &[0; 4], &[0, 1, 0, 0], &[0, 0, 128, 0]].concat());
    wire.send(&[&[CHANNEL_REQUEST][..], &[0; 4], &string(b"subsystem"), &[1], &string(b"sftp")].concat());
    assert!(matches!(wire.receive().map(|answer| answer[0]), Err(_) | Ok(DISCONNECT)));
    served.wait_for("no login in time");
    assert!(!served.log().contains("session ended"), "{}", served.log());
}

#[test]
fn h55_h58_a_key_alone_or_a_certificate_of_a_host_is_no_users() {
    let served = Served::start("", "");
    for name in ["ca", "alice.key"] {
        keygen(served.at(), &["-t", "ed25519", "-N", "", "-f", name]);
    }
    let authority = fs::read_to_string(served.path("ca.pub")).unwrap();
    write(&served.path("sync.keys"), &format!("cert-authority {authority}"));
    let key = Key::read(&served, "alice.key");
    let kind = b"ssh-ed25519-cert-v01@openssh.com";
    let mut wire = Wire::secured(&served);
    // Where an authority is trusted any key may sign, for a certificate shows itself only then; without one it is nothing.
    assert_eq!(wire.log_in("sync", &key, None), Some(USERAUTH_PK_OK));
    assert_eq!(wire.log_in("sync", &key, Some(&key)), Some(USERAUTH_FAILURE));
    for (sign, answer) in [(&["-h"][..], USERAUTH_FAILURE), (&[], USERAUTH_SUCCESS)] {
        let common = ["-q", "-s", "ca", "-I", "x", "-n", "sync"];
        keygen(served.at(), &[&common[..], sign, &["alice.key.pub"]].concat());
        let text = fs::read_to_string(served.path("alice.key-cert.pub")).unwrap();
        let blob = ssh_key::Certificate::from_openssh(&text).unwrap().to_bytes().unwrap();
        let head = strings(&[b"sync", b"ssh-connection", b"publickey"]);
        let mut request = [&[USERAUTH_REQUEST][..], &head, &[1], &strings(&[kind, &blob])].concat();
        let signature = key.sign(&[&string(&wire.session)[..], &request].concat());
        request.extend(string(&strings(&[b"ssh-ed25519", &signature])));
        assert_eq!(wire.ask(&request), Some(answer), "{sign:?}");
    }
    drop(wire);
    // What was refused before a login is not said after it.
    served.wait_for("connection ended");
    assert!(!served.log().contains("no login"), "{}", served.log());
}

#[test]
fn requests_that_no_stock_client_makes_are_refused_too() {
    let served = Served::start("", "");
    let sync = Key::read(&served, "sync.key");
    let mut wire = Wire::secured(&served);
    assert_eq!(wire.log_in("sync", &sync, Some(&sync)), Some(USERAUTH_SUCCESS));
    let address = [&strings(&[b"127.0.0.1"])[..], &[0, 0, 0, 22], &strings(&[b"127.0.0.1"]), &[0, 0, 0, 9]].concat();
    for (kind, more) in [
        ("direct-tcpip", &address[..]),
        ("forwarded-tcpip", &address),
        ("x11", &address[..13 + 4]),
        ("auth-agent@openssh.com", &[]),
        ("direct-streamlocal@openssh.com", &[0, 0, 0, 2, b'/', b'x', 0, 0, 0, 0, 0, 0, 0, 0]),
        ("tun@openssh.com", &[0; 8]),
    ] {
        assert_eq!(wire.open_channel(kind, more), Some(CHANNEL_OPEN_FAILURE), "{kind}");
    }
    // The library answers twice to types that it does not know.
    let mut answer = wire.open_channel("session", &[]);
    while answer == Some(CHANNEL_OPEN_FAILURE) {
        answer = wire.receive().ok().map(|answer| answer[0]);
    }
    assert_eq!(answer, Some(CHANNEL_OPEN_CONFIRMATION));
    let mut request = |kind: &str, more: &[u8]| {
        // One of them is the channel's number; requests for the others are left out.
        for channel in 0..12_u32 {
            let head = [&[CHANNEL_REQUEST][..], &channel.to_be_bytes()].concat();
            wire.send(&[&head[..], &string(kind.as_bytes()), &[1], more].concat());
        }
        wire.receive().unwrap()[0]
    };
    let env = strings(&[b"LD_PRELOAD", b"/x"]);
    for (kind, more) in [
        ("env", &env[..]),
        ("shell", &[]),
        ("auth-agent-req@openssh.com", &[]),
        ("x11-req", &[&[0][..], &strings(&[b"MIT-MAGIC-COOKIE-1", b"00"]), &[0; 4]].concat()),
        ("eow@openssh.com", &[]),
        ("subsystem", &strings(&[b"shell"])),
        ("exec", &strings(&[b"lockstep sftp-server --root /"])),
    ] {
        assert_eq!(request(kind, more), CHANNEL_FAILURE, "{kind}");
    }
    until("the log", || served.log().contains("port forwarding") && served.log().contains("X11 forwarding"));
}

/// What nobody reads must not hold the connection's place for good.
#[test]
fn a_channel_without_a_session_does_not_take_all_it_is_given() {
    let served = Served::start("", "connections = 1\nidle_timeout = '1s'");
    let sync = Key::read(&served, "sync.key");
    let mut wire = Wire::secured(&served);
    assert_eq!(wire.log_in("sync", &sync, Some(&sync)), Some(USERAUTH_SUCCESS));
    assert_eq!(wire.open_channel("session", &[]), Some(CHANNEL_OPEN_CONFIRMATION));
    for channel in 0..3_u32 {
        let data = [&[CHANNEL_DATA][..], &channel.to_be_bytes(), &string(b"x")].concat();
        (0..6000).for_each(|_| wire.send(&data));
    }
    served.wait_for("nothing was done for too long");
    until("the place", || served.sftp("sync", "sync", "ls\n").status.success());
}
