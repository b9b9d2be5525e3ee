//! What may stand between a client and a server.

use std::io::{Read as _, Write as _};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex};

/// Connects whoever comes with `port`. `pass` sees what comes, of either side, and says how much of it is passed on and
/// whether the connection lives on.
fn between(port: u16, pass: impl Fn(&mut [u8]) -> (usize, bool) + Send + Sync + 'static) -> u16 {
    at("127.0.0.1:0", port, pass)
}

/// The same for who comes to this address.
fn at(address: &str, port: u16, pass: impl Fn(&mut [u8]) -> (usize, bool) + Send + Sync + 'static) -> u16 {
    let listener = TcpListener::bind(address).unwrap();
    let own = listener.local_addr().unwrap().port();
    let pass = Arc::new(pass);
    std::thread::spawn(move || {
        for client in listener.incoming().map_while(Result::ok) {
            let server = TcpStream::connect(("127.0.0.1", port)).unwrap();
            for (mut from, mut to) in [(client.try_clone().unwrap(), server.try_clone().unwrap()), (server, client)] {
                let pass = Arc::clone(&pass);
                std::thread::spawn(move || {
                    let mut buffer = [0; 16384];
                    while let Ok(count @ 1..) = from.read(&mut buffer) {
                        let (passed, lives) = pass(&mut buffer[..count]);
                        if to.write_all(&buffer[..passed]).is_err() || !lives {
                            break;
                        }
                    }
                    let _ = (from.shutdown(Shutdown::Both), to.shutdown(Shutdown::Both));
                });
            }
        }
    });
    own
}

/// Passes everything on from this address, and counts it.
pub(crate) fn counting(address: &str, port: u16) -> (u16, Arc<AtomicUsize>) {
    let carried = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&carried);
    let own = at(address, port, move |data| {
        counted.fetch_add(data.len(), SeqCst);
        (data.len(), true)
    });
    (own, carried)
}

/// Takes so many bytes off `left`: how many there were.
fn take(left: &AtomicUsize, count: usize) -> usize {
    left.fetch_update(SeqCst, SeqCst, |left| Some(left.saturating_sub(count))).unwrap()
}

/// Passes on about as many bytes as are `left`, those of both directions counted, and then swallows all that comes.
pub(crate) fn swallowing(port: u16, left: Arc<AtomicUsize>) -> u16 {
    between(port, move |data| (if take(&left, data.len()) > 0 { data.len() } else { 0 }, true))
}

/// Passes on as many bytes as are `left`, and then cuts every connection, in the middle of a packet as it comes; who connects
/// later is cut at once.
pub(crate) fn cutting(port: u16, left: Arc<AtomicUsize>) -> u16 {
    between(port, move |data| {
        let had = take(&left, data.len());
        (data.len().min(had), had >= data.len())
    })
}

/// The same, but the next byte is passed on with a bit that is another, and so is one of each later part.
pub(crate) fn spoiling(port: u16, left: Arc<AtomicUsize>) -> u16 {
    between(port, move |data| {
        let had = take(&left, data.len());
        if let Some(byte) = data.get_mut(had) {
            *byte ^= 0x20;
        }
        (data.len(), true)
    })
}

/// Passes everything on, and keeps what it saw.
pub(crate) fn listening(port: u16) -> (u16, Arc<Mutex<Vec<u8>>>) {
    let heard = Arc::new(Mutex::new(Vec::new()));
    let keeps = Arc::clone(&heard);
    let own = between(port, move |data| {
        keeps.lock().unwrap().extend_from_slice(data);
        (data.len(), true)
    });
    (own, heard)
}

/// What each connection has carried, both directions counted, in the order in which they came.
pub(crate) type Carried = Arc<Mutex<Vec<u64>>>;

/// Connections by their numbers.
#[derive(Clone, Copy)]
pub(crate) enum Cut {
    Only(usize),
    From(usize),
}

impl Cut {
    fn contains(self, number: usize) -> bool {
        match self {
            Cut::Only(one) => number == one,
            Cut::From(first) => number >= first,
        }
    }
}

/// Passes 16 KiB on every four milliseconds, for each connection on its own: far, and more of them carry more. `cut` says which are cut
/// after how many bytes.
pub(crate) fn narrow(port: u16, cut: Option<(Cut, u64)>) -> (u16, Carried) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let own = listener.local_addr().unwrap().port();
    let carried = Carried::default();
    let counted = Arc::clone(&carried);
    std::thread::spawn(move || {
        for (number, client) in listener.incoming().map_while(Result::ok).enumerate() {
            let server = TcpStream::connect(("127.0.0.1", port)).unwrap();
            counted.lock().unwrap().push(0);
            for (mut from, mut to) in [(client.try_clone().unwrap(), server.try_clone().unwrap()), (server, client)] {
                let counted = Arc::clone(&counted);
                std::thread::spawn(move || {
                    let mut buffer = [0; 16384];
                    while let Ok(count @ 1..) = from.read(&mut buffer) {
                        std::thread::sleep(std::time::Duration::from_millis(4));
                        let so_far = {
                            let mut counted = counted.lock().unwrap();
                            counted[number] += count as u64;
                            counted[number]
                        };
                        let lives = cut.is_none_or(|(which, most)| !which.contains(number) || so_far < most);
                        if !lives || to.write_all(&buffer[..count]).is_err() {
                            break;
                        }
                    }
                    let _ = (from.shutdown(Shutdown::Both), to.shutdown(Shutdown::Both));
                });
            }
        }
    });
    (own, carried)
}
