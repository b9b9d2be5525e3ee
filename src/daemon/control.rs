//! Where a daemon can be asked: a Unix socket, one JSON object a line in, one out.
//!
//! Whoever may connect may ask for anything: the socket is 0600, or 0660 where its directory has another group, so that the file
//! system says who that is.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use serde_json::{Value, json};

/// More is no request.
const REQUEST_BYTES: u64 = 64 * 1024;
/// Whoever asks has so long to say what.
const PATIENCE: Duration = Duration::from_secs(5);
const CONNECTIONS: usize = 16;
/// How long a stop waits for the thread that answers.
const WAKING: Duration = Duration::from_secs(1);

/// Answers a request.
pub(super) type Answer = dyn Fn(&Value) -> Result<Value, String> + Send + Sync;

/// The socket; it goes when this is dropped.
pub(super) struct Control {
    path: PathBuf,
    /// Its device and inode.
    own: (u64, u64),
    stop: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Control {
    /// Listens at `path`. A socket that an earlier daemon left there is removed.
    ///
    /// # Errors
    /// When the socket cannot be made, or another daemon listens there.
    pub(super) fn listen(path: &Path, answer: Arc<Answer>) -> std::io::Result<Control> {
        match std::fs::symlink_metadata(path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
            Ok(found) if !found.file_type().is_socket() => {
                return Err(std::io::Error::other(
                    "something that is no socket has the name; remove it, or name another",
                ));
            }
            // RACE: of two that begin at once the later one has the name.
            Ok(_) if UnixStream::connect(path).is_ok() => {
                return Err(std::io::Error::other("another daemon listens there; stop it, or name another socket"));
            }
            Ok(_) => std::fs::remove_file(path)?,
        }
        // RACE: between bind and chmod the socket has the mode of the umask. Its directory is ours alone, or root's.
        let listener = UnixListener::bind(path)?;
        let found = std::fs::symlink_metadata(path)?;
        let of_directory = found.gid() != rustix::process::getegid().as_raw();
        let mode = if of_directory { 0o660 } else { 0o600 };
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode))?;
        let stop = Arc::new(AtomicBool::new(false));
        let heard = Arc::clone(&stop);
        let serve = move || serve(&listener, &heard, &answer);
        let thread = Some(std::thread::Builder::new().name("control".into()).spawn(serve)?);
        Ok(Control { path: path.to_owned(), own: (found.dev(), found.ino()), stop, thread })
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        // Wakes the thread, which waits in accept. Where the file is gone, or is another's by now, nothing wakes it: it holds
        // nothing, and a stop must not wait for it for ever.
        let woken = UnixStream::connect(&self.path).is_ok();
        let until = std::time::Instant::now() + WAKING;
        if let Some(thread) = self.thread.take() {
            while woken && !thread.is_finished() && std::time::Instant::now() < until {
                std::thread::sleep(Duration::from_millis(5));
            }
            if thread.is_finished() {
                let _ = thread.join();
            }
        }
        if std::fs::symlink_metadata(&self.path).is_ok_and(|found| (found.dev(), found.ino()) == self.own) {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

fn serve(listener: &UnixListener, stop: &AtomicBool, answer: &Arc<Answer>) {
    let open = Arc::new(AtomicUsize::new(0));
    for stream in listener.incoming() {
        if stop.load(Ordering::SeqCst) {
            return;
        }
        let Ok(stream) = stream else {
            // Out of descriptors, most likely: it passes.
            std::thread::sleep(Duration::from_millis(100));
            continue;
        };
        if open.fetch_add(1, Ordering::SeqCst) >= CONNECTIONS {
            open.fetch_sub(1, Ordering::SeqCst);
            continue;
        }
        let (answer, one) = (Arc::clone(answer), Arc::clone(&open));
        let talk = move || {
            // Whoever went away is owed nothing.
            let _ = talk(&stream, &*answer);
            one.fetch_sub(1, Ordering::SeqCst);
        };
        if std::thread::Builder::new().name("asked".into()).spawn(talk).is_err() {
            open.fetch_sub(1, Ordering::SeqCst);
            tracing::warn!("a request was not answered: no thread could be started");
        }
    }
}

fn talk(stream: &UnixStream, answer: &Answer) -> std::io::Result<()> {
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    let mut line = Vec::new();
    let mut reader = BufReader::new(stream.take(REQUEST_BYTES));
    reader.read_until(b'\n', &mut line)?;
    let answered = match serde_json::from_slice::<Value>(&line) {
        Ok(request) => answer(&request).unwrap_or_else(|error| json!({ "error": error })),
        Err(error) => json!({ "error": format!("this is no request: {error}") }),
    };
    let mut stream = stream;
    stream.write_all(format!("{answered}\n").as_bytes())
}
