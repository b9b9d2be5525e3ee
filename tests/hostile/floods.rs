//! Floods of connections and clients that take what they can, against a real `lockstep serve`: others are served all the
//! while, memory stays small, and nothing is left when they have gone.

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use lockstep::wire::sftp::{Status, open, packet};

use crate::kit::raw::Server;
use crate::kit::served::Served;
use crate::kit::{text, until};

/// What the listener and all its processes may take together. The tables of a program that is not optimised are 1.2 MiB larger in
/// each process.
const MEMORY_MAX_KIB: u64 = (200 + if cfg!(debug_assertions) { 70 } else { 0 }) << 10;

/// Shared pages count once in all.
fn pss_kib(pid: u32) -> u64 {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap_or_default();
    let line = text.lines().find(|line| line.starts_with("Pss:"));
    line.and_then(|line| line.split_whitespace().nth(1)?.parse().ok()).unwrap_or(0)
}

fn descriptors(pid: u32) -> usize {
    fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count()
}

/// What was seen so often, every 200 ms, counts.
const LOOKS: usize = 3;

/// Looks at the memory of a server while `work` goes on: the most that there was for some time. A process that is just being started or
/// ended may count for more than it has, for one look or two.
fn peak_kib<T>(served: &Served, work: impl FnOnce() -> T) -> (T, u64) {
    let (stop, seen) = (AtomicBool::new(false), Mutex::new(vec![0; LOOKS]));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                let now = pss_kib(served.pid()) + served.connections().into_iter().map(pss_kib).sum::<u64>();
                seen.lock().unwrap().push(now);
                std::thread::sleep(Duration::from_millis(200));
            }
        });
        let done = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work));
        stop.store(true, Ordering::Relaxed);
        let mut seen = seen.lock().unwrap().clone();
        seen.sort_unstable();
        (done.unwrap_or_else(|panic| std::panic::resume_unwind(panic)), seen[seen.len() - LOOKS])
    })
}

/// Processes and descriptors of a server at rest.
struct Rest {
    connections: usize,
    descriptors: usize,
}

impl Rest {
    fn of(served: &Served) -> Rest {
        // The first client makes it open what stays open.
        assert!(served.sftp("sync", "sync", "ls\n").status.success());
        until("the end of the first client", || served.connections().is_empty());
        Rest { connections: 0, descriptors: descriptors(served.pid()) }
    }

    fn is_back(&self, served: &Served) {
        until("the end of all processes", || served.connections().len() == self.connections);
        until("the end of all descriptors", || descriptors(served.pid()) <= self.descriptors);
    }
}

/// A file of this many bytes to be sent, in a directory of its own.
fn source(served: &Served, bytes: usize) -> Vec<u8> {
    let data: Vec<u8> =
        (0..bytes as u32 / 4).flat_map(|number| number.wrapping_mul(2_654_435_761).to_le_bytes()).collect();
    fs::create_dir(served.path("source")).unwrap();
    fs::write(served.path("source/f"), &data).unwrap();
    data
}

fn connect(port: u16, from: [u8; 4]) -> std::io::Result<TcpStream> {
    use rustix::net::{AddressFamily, SocketType, bind, connect, socket};
    let stream = socket(AddressFamily::INET, SocketType::STREAM, None)?;
    bind(&stream, &SocketAddr::from((from, 0)))?;
    connect(&stream, &SocketAddr::from(([127, 0, 0, 1], port)))?;
    let stream = TcpStream::from(stream);
    stream.set_nonblocking(true)?;
    Ok(stream)
}

/// What those of a flood say before they fall silent: nothing, half a version, or the begin of a key exchange.
const FIRST_WORDS: [&[u8]; 3] = [b"", b"SSH-2.0-hal", b"SSH-2.0-half\r\n\0\0\x02\x04\x06\x14"];

/// Holds a thousand connections from forty addresses, and comes back with each that is closed, until `stop`.
fn flood(port: u16, stop: &AtomicBool, made: &AtomicU64) {
    let mut held: Vec<Option<TcpStream>> = (0..1000).map(|_| None).collect();
    while !stop.load(Ordering::Relaxed) {
        for (number, place) in held.iter_mut().enumerate() {
            if let Some(stream) = place {
                let mut words = [0; 256];
                let open = match stream.read(&mut words) {
                    Ok(0) => false,
                    Ok(_) => true,
                    Err(error) => error.kind() == std::io::ErrorKind::WouldBlock,
                };
                if open {
                    continue;
                }
            }
            *place = connect(port, [127, 0, 1, 1 + (number % 40) as u8]).ok();
            if let Some(stream) = place {
                let _ = stream.write_all(FIRST_WORDS[number % 3]);
                made.fetch_add(1, Ordering::Relaxed);
            }
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn h43_a_thousand_connections_that_never_log_in_keep_nobody_out_for_long() {
    let penalties = "penalties = { late = '10s', no_login = '5s', breach = '10s', least = '20s', most = '10m' }";
    let served = Served::start(penalties, "login_grace = '1s'");
    let data = source(&served, 4 << 20);
    let rest = Rest::of(&served);
    // One that is there already.
    let mut before = Client::of(&served);
    let (stop, made) = (AtomicBool::new(false), AtomicU64::new(0));
    let ((), most) = peak_kib(&served, || {
        std::thread::scope(|scope| {
            scope.spawn(|| flood(served.port, &stop, &made));
            let done = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                until("the flood", || made.load(Ordering::Relaxed) >= 1000);
                let started = Instant::now();
                assert_eq!(before.0.path(packet::MKDIR, "during"), Status::Ok);
                assert!(started.elapsed() < Duration::from_secs(5), "who is in is kept waiting");
                // The push comes back by itself; the stock client is started again, as its owner would.
                let pushed = served.lockstep(&["push", "-v", "source", "sync@127.0.0.1:/pushed"], "sync");
                assert!(pushed.status.success(), "{}", text(&pushed));
                until("a stock client", || served.sftp("sync", "sync", "put source/f put\n").status.success());
                assert_eq!(before.0.path(packet::RMDIR, "during"), Status::Ok);
            }));
            stop.store(true, Ordering::Relaxed);
            done.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        });
    });
    assert_eq!(fs::read(served.path("sync/pushed/f")).unwrap(), data);
    assert_eq!(fs::read(served.path("sync/put")).unwrap(), data);
    assert!(most < MEMORY_MAX_KIB, "{most} KiB");
    drop(before);
    rest.is_back(&served);
    let log = served.log();
    assert!(log.contains("too many connections") && log.contains("refused for a while"), "{log}");
    assert!(log.lines().count() < 2000, "{} lines", log.lines().count());
}

/// A stock client with a session that is spoken to by hand. Whoever is killed says no goodbye, and waits for none.
struct Client(Server);

impl Client {
    fn of(served: &Served) -> Client {
        Client(Server::spawn(served.client("ssh", "-p", "sync").args(["-s", "sync@127.0.0.1", "sftp"])))
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        let _ = self.0.child.kill();
    }
}

/// Opens as many files as it may, and keeps them.
fn hoard(Client(client): &mut Client) {
    let mut opened = 0;
    let refused = loop {
        let (kind, body) = client.ask(packet::OPEN, |w| w.string(b"big").u32(open::READ).u32(0));
        if kind != packet::HANDLE {
            break body;
        }
        opened += 1;
        assert!(opened <= 1024, "there is no end of handles");
    };
    assert!(String::from_utf8_lossy(&refused).contains("too many handles"), "{refused:?}");
}

/// Asks for a hundred times more than it ever takes.
fn ask_and_do_not_read(Client(client): &mut Client) {
    let handle = client.open("big", open::READ);
    for number in 0..400_u64 {
        client.request(packet::READ, |w| w.string(&handle).u64(number % 30 * 256_000).u32(256_000));
    }
}

/// A request, as it goes over the wire, without an end.
fn drip(Client(client): &mut Client, number: usize) {
    let request = [0, 0, 1, 0, packet::STAT, 0, 0, 0, 9, 0, 0, 0, 247];
    client.send(&[*request.get(number).unwrap_or(&b'x')]);
}

#[test]
fn h42_h43_clients_that_take_what_they_can_leave_enough_for_others_and_nothing_behind() {
    let served = Served::start("", "");
    fs::write(served.path("sync/big"), vec![7; 8 << 20]).unwrap();
    let data = source(&served, 16 << 20);
    let rest = Rest::of(&served);
    let (clients, most) = peak_kib(&served, || {
        let mut hoarders: Vec<Client> = (0..3).map(|_| Client::of(&served)).collect();
        hoarders.iter_mut().for_each(hoard);
        let mut greedy: Vec<Client> = (0..3).map(|_| Client::of(&served)).collect();
        greedy.iter_mut().for_each(ask_and_do_not_read);
        let mut slow: Vec<Client> = (0..3).map(|_| Client::of(&served)).collect();
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut number = 0;
                while !stop.load(Ordering::Relaxed) {
                    slow.iter_mut().for_each(|client| drip(client, number));
                    number += 1;
                    std::thread::sleep(Duration::from_millis(200));
                }
            });
            let started = Instant::now();
            let pushed = served.lockstep(&["push", "source", "sync@127.0.0.1:/pushed"], "sync");
            let put = served.sftp("sync", "sync", "put source/f put\nget put back\n");
            stop.store(true, Ordering::Relaxed);
            assert!(pushed.status.success() && put.status.success(), "{}{}", text(&pushed), text(&put));
            assert!(started.elapsed() < Duration::from_secs(20), "{:?}", started.elapsed());
        });
        // Nobody was thrown out for it.
        // Nobody was thrown out for it; those who have done what they came for take a moment to go.
        until("the others to be gone", || served.connections().len() <= 9);
        assert_eq!(served.connections().len(), 9);
        (hoarders, greedy, slow)
    });
    for name in ["sync/pushed/f", "sync/put", "back"] {
        assert_eq!(fs::read(served.path(name)).unwrap(), data, "{name}");
    }
    assert!(most < MEMORY_MAX_KIB, "{most} KiB");
    drop(clients);
    rest.is_back(&served);
}
