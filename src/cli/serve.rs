//! `lockstep serve`: lockstep's own SSH server.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;

use super::Failure;
use crate::error::{Exit, chain};
use crate::server::agent::{Agent, Extensions};
use crate::server::channel::FedSession;
use crate::server::listener::{self, ServeConfig, ServeUser, SessionFactory};
use crate::server::session::{Session, SessionConfig};

/// Listens for SSH connections of one user: public keys only, file transfer only.
#[derive(Debug, clap::Args)]
pub(super) struct Serve {
    /// Address and port to listen on
    #[arg(long, value_name = "ADDRESS:PORT", default_value = "127.0.0.1:2222")]
    listen: SocketAddr,
    /// The name that clients log in with
    #[arg(long, value_name = "NAME")]
    user: String,
    /// The directory that the user sees as '/'
    #[arg(long, value_name = "DIR")]
    root: PathBuf,
    /// The keys that may log in, as OpenSSH's authorized_keys
    #[arg(long, value_name = "FILE")]
    authorized_keys: PathBuf,
    /// The server's own key; made at the first start
    #[arg(long, value_name = "FILE")]
    host_key: PathBuf,
    /// Address ranges that the user may come from [default: any]
    #[arg(long, value_name = "RANGE")]
    from: Vec<String>,
    /// Refuse everything that writes
    #[arg(long)]
    read_only: bool,
    /// A file of [[rule]] tables: owner and permissions of what arrives
    #[arg(long, value_name = "FILE")]
    policy_file: Option<PathBuf>,
    /// End when the process that started this one ends
    #[arg(long)]
    die_with_parent: bool,
}

impl Serve {
    pub(super) fn run(self) -> Result<Exit, Failure> {
        if self.die_with_parent {
            let end = Some(rustix::process::Signal::TERM);
            rustix::process::set_parent_process_death_signal(end)
                .map_err(|errno| Failure::usage(format!("--die-with-parent: {errno}")))?;
        }
        let policy = super::transfer::read_policy(self.policy_file.as_deref())?;
        let factory: SessionFactory = Arc::new(move |start, output| {
            let config = SessionConfig {
                root: start.root.clone(),
                confine: true,
                read_only: start.read_only,
                policy: policy.clone(),
                actor: format!("{}@{} ({})", start.user, start.peer.ip(), start.fingerprint),
            };
            let sides = super::sftp_server::factory(start.root.clone(), true, start.read_only, policy.clone());
            let agent: Arc<dyn Extensions> = Arc::new(Agent::new(Arc::new(sides)));
            let session = Session::new(config, output, Some(agent)).map_err(|error| chain(&error))?;
            Ok(Box::new(session) as Box<dyn FedSession>)
        });
        let user = ServeUser {
            name: self.user,
            root: self.root,
            read_only: self.read_only,
            authorized_keys: self.authorized_keys,
            from: self.from,
        };
        let config = ServeConfig::new(self.listen, self.host_key, vec![user]);
        let failed = |exit, message: String| Failure::Plain { exit, message };
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .enable_all()
            .build()
            .map_err(|error| failed(Exit::Io, format!("no threads to serve with: {error}")))?;
        runtime.block_on(async {
            let listener = listener::bind(config).await.map_err(|error| failed(Exit::Usage, chain(&error)))?;
            eprintln!("lockstep: listening on {}, host key {}", listener.local_addr(), listener.fingerprint);
            let (stop, stopped) = tokio::sync::watch::channel(false);
            tokio::spawn(async move {
                use tokio::signal::unix::{SignalKind, signal};
                match (signal(SignalKind::terminate()), signal(SignalKind::interrupt())) {
                    (Ok(mut terminate), Ok(mut interrupt)) => {
                        tokio::select! { _ = terminate.recv() => {}, _ = interrupt.recv() => {} }
                    }
                    // Without signals there is nothing to wait for but the end of the process.
                    _ => std::future::pending().await,
                }
                let _ = stop.send(true);
            });
            listener.run(factory, stopped).await;
            Ok(Exit::Done)
        })
    }
}
