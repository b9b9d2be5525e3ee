//! TCP ports of this machine, and what becomes of them.

use std::collections::HashSet;
use std::fs;
use std::net::TcpListener;
use std::ops::RangeInclusive;

/// So many ports that nobody has, below those that the system gives to whoever connects.
pub(crate) fn free(count: u16) -> RangeInclusive<u16> {
    let random = u16::from_ne_bytes(*blake3::hash(&nonce()).as_bytes().first_chunk().unwrap());
    let mut first = 20000 + random % 12000;
    loop {
        let ports = first..=first + count - 1;
        if ports.clone().all(|port| TcpListener::bind(("0.0.0.0", port)).is_ok()) {
            return ports;
        }
        first = 20000 + (first - 20000 + 97) % 12000;
    }
}

fn nonce() -> Vec<u8> {
    format!("{} {:?} {:?}", std::process::id(), std::thread::current().id(), std::time::Instant::now()).into_bytes()
}

/// As `--data-ports` takes them.
pub(crate) fn named(ports: &RangeInclusive<u16>) -> String {
    format!("{}-{}", ports.start(), ports.end())
}

/// How many sockets there are in this state at one of the ports, as proc(5) has them.
fn sockets(ports: &RangeInclusive<u16>, state: &str) -> usize {
    let table = fs::read_to_string("/proc/net/tcp").unwrap();
    let fields = table.lines().skip(1).map(|line| line.split_whitespace().collect::<Vec<_>>());
    let ours = |fields: &Vec<&str>| {
        let port = u16::from_str_radix(fields[1].split(':').next_back().unwrap(), 16).unwrap();
        fields[3] == state && ports.contains(&port)
    };
    // What comes while the table is read can make it tell another twice.
    let ends = fields.filter(ours).map(|fields| (fields[1].to_owned(), fields[2].to_owned()));
    ends.collect::<HashSet<_>>().len()
}

/// How many of them are listened on.
pub(crate) fn listening(ports: &RangeInclusive<u16>) -> usize {
    sockets(ports, "0A")
}

/// How many connections there are to them.
pub(crate) fn connected(ports: &RangeInclusive<u16>) -> usize {
    sockets(ports, "01")
}

/// Processes with these words in their command line.
pub(crate) fn processes(words: &str) -> Vec<i32> {
    let all = fs::read_dir("/proc").unwrap().flatten();
    let numbers = all.filter_map(|process| process.file_name().to_str()?.parse::<i32>().ok());
    let line = |process: &i32| fs::read(format!("/proc/{process}/cmdline")).unwrap_or_default();
    let has = |line: Vec<u8>| String::from_utf8_lossy(&line).replace('\0', " ").contains(words);
    numbers.filter(|process| has(line(process))).collect()
}

/// Those that these have started.
pub(crate) fn children(of: &[i32]) -> Vec<i32> {
    let parent = |process: &i32| -> Option<i32> {
        let stat = fs::read_to_string(format!("/proc/{process}/stat")).ok()?;
        stat.rsplit(')').next()?.split_whitespace().nth(1)?.parse().ok()
    };
    processes("").into_iter().filter(|process| parent(process).is_some_and(|parent| of.contains(&parent))).collect()
}

/// Who listens and hands over, at these ports.
pub(crate) fn openers(ports: &RangeInclusive<u16>) -> Vec<i32> {
    processes(&format!("hand-over-connections 127.0.0.1 127.0.0.1 {}", named(ports)))
}
