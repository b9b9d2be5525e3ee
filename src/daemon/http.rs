//! Serves the page, the metrics and the status over HTTP/1.1 on a loopback address. It answers GET and HEAD, and changes nothing.
//!
//! Who asks is not known, so that nobody but this machine may ask: the address has to be a loopback one, and a request that was
//! meant for another host is refused, because a page of that host may have sent it (DNS rebinding). What arrives is bounded in
//! size, time and number.

use std::io::{Error, ErrorKind, Read as _, Write as _};
use std::net::{IpAddr, Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::samples::History;
use super::status::Status;
use super::{metrics, page};

/// More is no request for a page.
const HEAD_BYTES: usize = 16 * 1024;
/// A request has so long to arrive, and so long to be read by whoever sent it, as a whole.
const ARRIVAL: Duration = Duration::from_secs(10);
const DEPARTURE: Duration = Duration::from_secs(30);
const CONNECTIONS: usize = 32;
/// How much of what was sent after a request is read, so that the answer is not lost to a reset.
const REST_BYTES: usize = 64 * 1024;
const REST: Duration = Duration::from_secs(1);

const HTML: &str = "text/html; charset=utf-8";
const PLAIN: &str = "text/plain; charset=utf-8";
const JSON: &str = "application/json";

/// How things stand.
pub type Watcher = dyn Fn() -> Status + Send + Sync;

/// A server; it ends when this is dropped.
#[derive(Debug)]
pub struct Server {
    address: SocketAddr,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    /// Where it listens; the port is the one that the system chose where 0 was asked for.
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        // Wakes the thread, which waits in accept. Where this fails it would wait for ever, and is left alone.
        let woken = TcpStream::connect_timeout(&self.address, Duration::from_secs(1)).is_ok();
        if let Some(thread) = self.thread.take().filter(|_| woken) {
            let _ = thread.join();
        }
    }
}

struct Shared {
    status: Arc<Watcher>,
    history: Arc<History>,
    open: AtomicUsize,
}

/// Listens on a loopback address until the server is dropped.
///
/// # Errors
/// When the address is not a loopback one, or cannot be listened on.
pub fn serve(listen: SocketAddr, status: Arc<Watcher>, history: Arc<History>) -> std::io::Result<Server> {
    if !listen.ip().is_loopback() {
        let why = "others can reach it, and the page asks nobody who he is; name a loopback address, as 127.0.0.1";
        return Err(Error::new(ErrorKind::InvalidInput, why));
    }
    let listener = TcpListener::bind(listen)?;
    let address = listener.local_addr()?;
    let stop = Arc::new(AtomicBool::new(false));
    let heard = Arc::clone(&stop);
    let shared = Arc::new(Shared { status, history, open: AtomicUsize::new(0) });
    let accept = move || accept(&listener, &heard, &shared);
    let thread = Some(std::thread::Builder::new().name("page".into()).spawn(accept)?);
    Ok(Server { address, stop, thread })
}

/// One connection of the number that is allowed; also where its thread panics.
struct Slot(Arc<Shared>);

impl Drop for Slot {
    fn drop(&mut self) {
        self.0.open.fetch_sub(1, Ordering::SeqCst);
    }
}

fn accept(listener: &TcpListener, stop: &AtomicBool, shared: &Arc<Shared>) {
    for stream in listener.incoming() {
        if stop.load(Ordering::SeqCst) {
            return;
        }
        let Ok(mut stream) = stream else {
            // Out of descriptors, most likely: it passes.
            std::thread::sleep(Duration::from_millis(100));
            continue;
        };
        shared.open.fetch_add(1, Ordering::SeqCst);
        let slot = Slot(Arc::clone(shared));
        if shared.open.load(Ordering::SeqCst) > CONNECTIONS {
            // It fits the buffer of the socket: nobody is waited for.
            let _ = stream.set_nonblocking(true);
            let _ = stream.write_all(&Answer::says(503, "too many ask at once; try again").bytes(false));
            continue;
        }
        let talk = move || talk(&stream, &slot.0);
        if std::thread::Builder::new().name("page-asked".into()).spawn(talk).is_err() {
            tracing::warn!("a request for the page was not answered: no thread could be started");
        }
    }
}

/// One request, one answer.
fn talk(stream: &TcpStream, shared: &Shared) {
    let (answer, body) = match head(stream) {
        Head::Gone => return,
        Head::TooLarge => (Answer::says(431, "the request is too large"), true),
        Head::Whole(head) => match Request::parse(&head) {
            Ok(request) => (shared.answer(&request), request.method != "HEAD"),
            Err(answer) => (answer, true),
        },
    };
    // Whoever went away is owed nothing.
    let _ = send(stream, &answer.bytes(body));
    let _ = stream.shutdown(Shutdown::Write);
    let until = Instant::now() + REST;
    let (mut left, mut buffer) = (REST_BYTES, [0; 4096]);
    while left > 0 {
        match read(stream, &mut buffer, until) {
            Ok(read) if read > 0 => left = left.saturating_sub(read),
            _ => return,
        }
    }
}

enum Head {
    Whole(Vec<u8>),
    TooLarge,
    /// It ended or came too slowly.
    Gone,
}

/// Reads up to the empty line.
fn head(stream: &TcpStream) -> Head {
    let until = Instant::now() + ARRIVAL;
    let (mut head, mut buffer) = (Vec::new(), [0; 4096]);
    loop {
        match read(stream, &mut buffer, until) {
            Ok(read) if read > 0 => head.extend_from_slice(&buffer[..read]),
            _ => return Head::Gone,
        }
        if let Some(end) = end_of_head(&head).filter(|&end| end <= HEAD_BYTES) {
            head.truncate(end);
            return Head::Whole(head);
        }
        if head.len() > HEAD_BYTES {
            return Head::TooLarge;
        }
    }
}

/// Where the empty line is; a lone line feed ends a line too.
fn end_of_head(bytes: &[u8]) -> Option<usize> {
    let ends = |at: usize| bytes[at..].starts_with(b"\n\n") || bytes[at..].starts_with(b"\n\r\n");
    (0..bytes.len()).find(|&at| ends(at))
}

fn read(mut stream: &TcpStream, buffer: &mut [u8], until: Instant) -> std::io::Result<usize> {
    loop {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(ErrorKind::TimedOut.into());
        }
        stream.set_read_timeout(Some(left))?;
        match stream.read(buffer) {
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            other => return other,
        }
    }
}

fn send(mut stream: &TcpStream, mut bytes: &[u8]) -> std::io::Result<()> {
    let until = Instant::now() + DEPARTURE;
    while !bytes.is_empty() {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(ErrorKind::TimedOut.into());
        }
        stream.set_write_timeout(Some(left))?;
        match stream.write(bytes) {
            Ok(0) => return Err(ErrorKind::WriteZero.into()),
            Ok(written) => bytes = &bytes[written..],
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

struct Request<'a> {
    method: &'a str,
    /// Without the query.
    path: &'a str,
}

impl<'a> Request<'a> {
    fn parse(head: &'a [u8]) -> Result<Request<'a>, Answer> {
        let bad = |why| Answer::says(400, why);
        let head = std::str::from_utf8(head).map_err(|_| bad("this is no request of HTTP"))?;
        let mut lines = head.split('\n').map(|line| line.strip_suffix('\r').unwrap_or(line));
        let words: Vec<&str> = lines.next().unwrap_or_default().split(' ').collect();
        let &[method, target, version] = words.as_slice() else { return Err(bad("this is no request of HTTP")) };
        if method.is_empty() || !method.bytes().all(|byte| byte.is_ascii_alphabetic() || byte == b'-') {
            return Err(bad("this is no request of HTTP"));
        }
        match version {
            "HTTP/1.1" | "HTTP/1.0" => {}
            _ if version.starts_with("HTTP/") => return Err(Answer::says(505, "only HTTP/1.1 is spoken here")),
            _ => return Err(bad("this is no request of HTTP")),
        }
        let mut host = None;
        for line in lines {
            let (name, value) = line.split_once(':').ok_or_else(|| bad("a line of the request has no colon"))?;
            if name.is_empty() || name.contains([' ', '\t']) {
                return Err(bad("a line of the request has no name"));
            }
            if name.eq_ignore_ascii_case("host") && host.replace(value.trim()).is_some() {
                return Err(bad("the request names two hosts"));
            }
        }
        // As a proxy is asked; the host in it counts (RFC 9112, 3.2.2).
        let (host, path) = match target.strip_prefix("http://") {
            Some(rest) => {
                let (host, path) = rest.split_at(rest.find(['/', '?']).unwrap_or(rest.len()));
                (Some(host), if path.is_empty() { "/" } else { path })
            }
            None => (host, target),
        };
        // Of before hosts had to be named; every browser names one.
        let host = host.or_else(|| (version == "HTTP/1.0").then_some("localhost"));
        let host = host.ok_or_else(|| bad("the request does not say which host it is for"))?;
        if !is_here(host) {
            let why = "this is served as localhost alone: open it under that name; a proxy has to put it into 'Host'";
            return Err(Answer::says(403, why));
        }
        if !path.starts_with('/') {
            return Err(bad("the request names no path"));
        }
        Ok(Request { method, path: path.split(['?', '#']).next().unwrap_or_default() })
    }
}

/// Whether a `Host` is a name of this machine for itself. The port may be any: somebody may have forwarded his own.
fn is_here(host: &str) -> bool {
    let name = match host.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        Some((address, port)) if port.is_empty() || is_port(port) => {
            return address.parse::<Ipv6Addr>().is_ok_and(|address| address.is_loopback());
        }
        Some(_) => return false,
        None => match host.split_once(':') {
            Some((name, port)) if is_port(&format!(":{port}")) => name,
            Some(_) => return false,
            None => host,
        },
    };
    name.eq_ignore_ascii_case("localhost") || name.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}

fn is_port(text: &str) -> bool {
    text.strip_prefix(':').is_some_and(|digits| digits.len() <= 5 && digits.bytes().all(|byte| byte.is_ascii_digit()))
}

struct Answer {
    status: u16,
    kind: &'static str,
    body: Vec<u8>,
}

impl Answer {
    fn good(kind: &'static str, body: impl Into<Vec<u8>>) -> Answer {
        Answer { status: 200, kind, body: body.into() }
    }

    fn says(status: u16, words: &str) -> Answer {
        Answer { status, kind: PLAIN, body: format!("{words}\n").into_bytes() }
    }

    fn bytes(&self, with_body: bool) -> Vec<u8> {
        let reason = match self.status {
            200 => "OK",
            400 => "Bad Request",
            403 => "Forbidden",
            404 => "Not Found",
            405 => "Method Not Allowed",
            431 => "Request Header Fields Too Large",
            503 => "Service Unavailable",
            505 => "HTTP Version Not Supported",
            _ => "Internal Server Error",
        };
        let allow = if self.status == 405 { "Allow: GET, HEAD\r\n" } else { "" };
        // Nothing is loaded from anywhere, nothing runs, nobody puts it in a frame or keeps it.
        let head = format!(
            "HTTP/1.1 {} {reason}\r\nContent-Type: {}\r\nContent-Length: {}\r\n{allow}\
             Content-Security-Policy: default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; \
             frame-ancestors 'none'\r\nX-Content-Type-Options: nosniff\r\nX-Frame-Options: DENY\r\n\
             Referrer-Policy: no-referrer\r\nCross-Origin-Resource-Policy: same-origin\r\nCache-Control: no-store\r\n\
             Connection: close\r\n\r\n",
            self.status,
            self.kind,
            self.body.len(),
        );
        let mut bytes = head.into_bytes();
        if with_body {
            bytes.extend_from_slice(&self.body);
        }
        bytes
    }
}

impl Shared {
    fn answer(&self, request: &Request<'_>) -> Answer {
        if !matches!(request.path, "/" | "/metrics" | "/status.json" | "/healthz") {
            return Answer::says(404, "there is nothing here; there are /, /metrics, /status.json and /healthz");
        }
        if !matches!(request.method, "GET" | "HEAD") {
            return Answer::says(405, "this can only be looked at: GET or HEAD");
        }
        let status = (self.status)();
        match request.path {
            "/" => Answer::good(HTML, page::render(&status, &self.history)),
            "/metrics" => Answer::good(metrics::CONTENT_TYPE, metrics::render(&status)),
            "/status.json" => match serde_json::to_vec(&status) {
                Ok(body) => Answer::good(JSON, body),
                Err(error) => Answer::says(500, &error.to_string()),
            },
            // That it has a status says that none of its locks is held for ever.
            _ => Answer::says(200, "ok"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(head: &str) -> u16 {
        Request::parse(head.as_bytes()).map_or_else(|answer| answer.status, |_| 200)
    }

    #[test]
    fn only_requests_for_this_machine_are_taken() {
        for host in ["localhost", "LOCALHOST:9478", "127.0.0.1", "127.8.9.1:80", "localhost:", "[::1]", "[::1]:9478"] {
            assert!(is_here(host), "{host}");
            assert_eq!(parsed(&format!("GET / HTTP/1.1\r\nHost: {host}\r")), 200, "{host}");
        }
        for host in [
            "",
            "evil.example",
            "localhost.evil.example",
            "127.0.0.1.evil.example",
            "10.0.0.1",
            "0.0.0.0",
            "localhost:80:80",
            "localhost:123456",
            "[::1]x",
            "[::2]",
            "[",
            "::1",
            "user@localhost",
            "127.1",
        ] {
            assert!(!is_here(host), "{host}");
        }
        assert_eq!(parsed("GET http://evil.example/ HTTP/1.1\r\nHost: localhost\r"), 403);
        assert_eq!(parsed("GET http://localhost:1 HTTP/1.1\r\nHost: evil.example\r"), 200);
    }

    #[test]
    fn what_is_no_request_is_answered_as_that() {
        for (head, status) in [
            ("", 400),
            ("GET /", 400),
            ("GET / HTTP/1.1\r", 400),
            ("GET  / HTTP/1.1\r\nHost: localhost\r", 400),
            ("G\tT / HTTP/1.1\r\nHost: localhost\r", 400),
            ("GET / HTTP/2.0\r\nHost: localhost\r", 505),
            ("GET / SMTP\r\nHost: localhost\r", 400),
            ("GET / HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r", 400),
            ("GET / HTTP/1.1\r\nHost: localhost\r\nnothing\r", 400),
            ("GET / HTTP/1.1\r\nHost : localhost\r", 400),
            ("GET / HTTP/1.1\r\nHost: localhost\r\n: x\r", 400),
            ("GET metrics HTTP/1.1\r\nHost: localhost\r", 400),
            ("GET /metrics?a=b HTTP/1.0\nhost:localhost", 200),
        ] {
            assert_eq!(parsed(head), status, "{head:?}");
        }
        assert!(Request::parse(b"GET /\xff HTTP/1.1\r\nHost: localhost\r").is_err());
        assert_eq!(end_of_head(b"a\r\n\r\nb"), Some(2));
        assert_eq!(end_of_head(b"a\n\nb"), Some(1));
        assert_eq!(end_of_head(b"\r\n\r"), None);
    }
}
