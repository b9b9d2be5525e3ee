//! What may stand between a client and a server.

use std::io::{Read as _, Write as _};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

/// Passes on to `port` as many bytes as are `left`, and then swallows all that comes, in both directions.
pub(crate) fn swallowing(port: u16, left: Arc<AtomicUsize>) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let own = listener.local_addr().unwrap().port();
    std::thread::spawn(move || {
        for client in listener.incoming() {
            let (client, server) = (client.unwrap(), TcpStream::connect(("127.0.0.1", port)).unwrap());
            for (mut from, mut to) in [(client.try_clone().unwrap(), server.try_clone().unwrap()), (server, client)] {
                let left = Arc::clone(&left);
                std::thread::spawn(move || {
                    let mut buffer = [0; 65536];
                    while let Ok(count @ 1..) = from.read(&mut buffer) {
                        let passed = left.fetch_update(SeqCst, SeqCst, |left| Some(left.saturating_sub(count)));
                        if passed.unwrap() > 0 && to.write_all(&buffer[..count]).is_err() {
                            break;
                        }
                    }
                });
            }
        }
    });
    own
}

/// Passes on to `port` as many bytes as are `left`, those of both directions counted, and then cuts every connection, in the
/// middle of a packet as it comes; who connects later is cut at once.
pub(crate) fn cutting(port: u16, left: Arc<AtomicUsize>) -> u16 {
    ending(port, left, false)
}

/// The same, but the next byte is passed on with a bit that is another, and so is one of each later part.
pub(crate) fn spoiling(port: u16, left: Arc<AtomicUsize>) -> u16 {
    ending(port, left, true)
}

fn ending(port: u16, left: Arc<AtomicUsize>, spoil: bool) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let own = listener.local_addr().unwrap().port();
    std::thread::spawn(move || {
        for client in listener.incoming() {
            let (client, server) = (client.unwrap(), TcpStream::connect(("127.0.0.1", port)).unwrap());
            for (mut from, mut to) in [(client.try_clone().unwrap(), server.try_clone().unwrap()), (server, client)] {
                let left = Arc::clone(&left);
                std::thread::spawn(move || {
                    let mut buffer = [0; 16384];
                    while let Ok(count @ 1..) = from.read(&mut buffer) {
                        let had = left.fetch_update(SeqCst, SeqCst, |left| Some(left.saturating_sub(count))).unwrap();
                        let whole = had >= count;
                        if spoil && !whole {
                            buffer[had] ^= 0x20;
                        }
                        let passed = if spoil { count } else { count.min(had) };
                        if to.write_all(&buffer[..passed]).is_err() || !(whole || spoil) {
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
