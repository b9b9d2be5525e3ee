//! What the listener decides on logins, for the process of the connection that asks.

use std::net::SocketAddr;
use std::sync::Arc;

use super::access::{Proof, ServeUser};
use super::confine::Identity;
use super::listener::{Server, SessionStart, Settings};
use super::live::{Live, Login, short};
use super::process::message::{Granted, Shown, key_of};
use super::resolve;
use crate::error::Escaped;

/// Who may log in, with the settings that say so.
pub(super) struct Admitted {
    pub(super) login: Login,
    pub(super) granted: Granted,
    pub(super) settings: Arc<Settings>,
}

/// That, or why not.
pub(super) type Decided = Result<Box<Admitted>, String>;

/// Keeps why somebody does not log in who says to be `name` and shows this.
pub(super) fn refuse(live: &Live, name: &str, proof: &Proof, reason: &str) {
    let what = proof.describe();
    let name = short(&Escaped(name.as_bytes()).to_string(), 64);
    tracing::debug!(peer = %live.peer, user = name, what, reason, "key refused");
    live.refuse(&format!("user {name}, {what}: {reason}"), Some((name, proof.login(live.peer))));
}

/// Whether it is worth a client's while to sign with a key. Blocks.
pub(super) fn offered(server: &Server, live: &Live, name: &str, key: &str) -> Result<(), String> {
    let key = key_of(key)?;
    let judged = server.settings().access.worth_signing(name, &key, live.peer);
    judged.inspect_err(|reason| refuse(live, name, &Proof::Key(Box::new(key)), reason))
}

/// Whether a client that has proven to hold this may log in. Blocks.
pub(super) fn proven(server: &Server, live: &Live, name: &str, shown: &Shown) -> Decided {
    let proof = shown.proof()?;
    let settings = server.settings();
    let judged = settings.access.judge(name, &proof, live.peer).and_then(|(user, grant)| {
        resolve::root_is_a_directory(&user)?;
        let identity = user.run_as.as_deref().map(Identity::of).transpose()?;
        Ok((user, grant, identity))
    });
    let (user, grant, identity) = judged.inspect_err(|reason| refuse(live, name, &proof, reason))?;
    let start = start(&user, live.peer, &proof);
    let granted = Granted { start, identity, confine: settings.confine };
    Ok(Box::new(Admitted { login: Login { user, proof, grant }, granted, settings }))
}

fn start(user: &ServeUser, peer: SocketAddr, proof: &Proof) -> SessionStart {
    SessionStart {
        user: user.name.clone(),
        root: user.root.clone(),
        rights: user.rights,
        quota: user.quota,
        policy: user.policy.clone(),
        peer,
        fingerprint: proof.fingerprint(),
        login: proof.login(peer),
        actor: format!("{}@{} ({})", user.name, peer.ip().to_canonical(), proof.describe()),
    }
}
