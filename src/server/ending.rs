//! The end of a connection that somebody asks for, with the reason.

use tokio::sync::watch;

/// Who waits for it hears of it, and so does who comes later.
pub(super) struct Ending(watch::Sender<Option<String>>);

impl Ending {
    pub(super) fn new() -> Ending {
        Ending(watch::Sender::new(None))
    }

    /// Ends it; the first reason stays.
    pub(super) fn end(&self, reason: &str) {
        self.0.send_if_modified(|end| end.is_none() && end.replace(reason.to_owned()).is_none());
    }

    /// Why it is to end.
    pub(super) async fn ended(&self) -> String {
        let mut end = self.0.subscribe();
        loop {
            if let Some(reason) = end.borrow_and_update().clone() {
                return reason;
            }
            if end.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
        }
    }
}
