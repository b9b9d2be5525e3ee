//! What of `[daemon]`, `[serve]`, `[sftp_server]` and `[audit]` can be known without starting them.

use std::path::Path;

use russh::keys::HashAlg;

use super::jobs::{about, unknown_owners};
use crate::audit;
use crate::cli::finding::{Finding, Level};
use crate::cli::places::{real, unwritable};
use crate::cli::{control, daemon, serve};
use crate::config::{Config, DataPorts, Serve, fixed_part};
use crate::error::{Escaped, chain, shown};
use crate::server::listener;

/// Ports that only root, or who has CAP_NET_BIND_SERVICE, may listen on.
const LOW_PORTS: u16 = 1024;

/// All of it.
pub(super) fn look(config: &Config) -> Vec<Finding> {
    let mut findings = Vec::new();
    if !config.jobs.is_empty() {
        of_daemon(config, &mut findings);
    }
    if let Some(serve) = &config.serve {
        of_server(config, serve, &mut findings);
    }
    findings.extend(config.sftp_server.data_ports.map(of_ports));
    findings.extend(config.audit.signing_key.as_deref().map(signs));
    findings
}

/// Whoever logs in to sshd listens there as himself.
fn of_ports(ports: DataPorts) -> Finding {
    if *ports.all().start() < LOW_PORTS {
        let says = format!("'data_ports' are {ports}: on those below {LOW_PORTS} root alone can listen");
        return Finding::warning("sftp-server", says, "name ports from 1024 on, below those of ip_local_port_range");
    }
    Finding::ok("sftp-server", format!("a session that sshd starts may listen on one of the ports {ports}"))
}

fn signs(key: &Path) -> Finding {
    match audit::load_key(key) {
        Ok(found) => {
            Finding::ok("audit", format!("its heads are signed by {}", found.public_key().fingerprint(HashAlg::Sha256)))
        }
        Err(reason) => {
            let remedy = "a key that belongs to the user of the service, or root, and that nobody else can read";
            Finding::error("audit", reason, remedy)
        }
    }
}

fn of_daemon(config: &Config, findings: &mut Vec<Finding>) {
    // What is left out is another place under systemd than for whoever looks.
    let level = |named: bool| if named { Level::Error } else { Level::Warning };
    let unit = "the unit gives the service a directory of its own; without it, name one in [daemon]";
    let left_out = |failure| Finding::warning("daemon", chain(&failure), unit);
    match daemon::state_of(config) {
        Err(failure) => findings.push(left_out(failure)),
        Ok(state) => {
            findings.push(place(level(config.daemon.state.is_some()), "its state directory", &state, unit));
            findings.extend(apart(config, "its state directory", &state));
        }
    }
    match control::socket_of(config) {
        Err(failure) => findings.push(left_out(failure)),
        Ok(socket) => {
            let above = socket.parent().unwrap_or(Path::new("/"));
            findings.push(place(level(config.daemon.socket.is_some()), "the directory of its socket", above, unit));
        }
    }
    if let Some(file) = &config.daemon.metrics_file {
        let above = file.parent().unwrap_or(Path::new("/"));
        let remedy = "give it to the group of the service, and name it in ReadWritePaths= of the unit";
        findings.push(place(Level::Error, "the directory of 'metrics_file'", above, remedy));
        findings.extend(apart(config, "'metrics_file'", file));
    }
}

fn place(level: Level, what: &str, directory: &Path, remedy: &str) -> Finding {
    match unwritable(directory) {
        Some(reason) => Finding::new(level, "daemon", format!("{what}: {reason}"), remedy),
        None => Finding::ok("daemon", format!("{what} is '{}'", shown(directory))),
    }
}

/// What the daemon writes by itself must not be a change of a source.
fn apart(config: &Config, what: &str, path: &Path) -> Vec<Finding> {
    let path = real(path);
    let within = config.jobs.iter().filter(|job| job.remote_source().is_none() && path.starts_with(real(&job.source)));
    within
        .map(|job| {
            let says = format!("{what} '{}' lies in the source of {}, and would be sent", shown(&path), about(job));
            Finding::error("daemon", says, "put it elsewhere, or leave it out with 'exclude'")
        })
        .collect()
}

/// Who may own and write its files depends on who serves; root is told, since he would be judged in place of that user.
fn of_another_user(serve: &Serve) -> Option<Finding> {
    use std::os::unix::fs::MetadataExt as _;
    let above = serve.host_key.parent()?;
    let owner = std::fs::metadata(&serve.host_key).or_else(|_| std::fs::metadata(above)).ok()?.uid();
    if owner == 0 || !rustix::process::geteuid().is_root() {
        return None;
    }
    let name = uzers::get_user_by_uid(owner).map(|user| Escaped(user.name().as_encoded_bytes()).to_string());
    let name = name.unwrap_or_else(|| format!("#{owner}"));
    let says = format!("its host key belongs to user {name}, so that it is not judged by what root may");
    let remedy = format!("runuser -u {name} -- lockstep config check");
    Some(Finding::warning("server", says, &remedy))
}

fn of_server(config: &Config, serve: &Serve, findings: &mut Vec<Finding>) {
    let settings = match serve::of_config(config) {
        Ok(settings) => settings,
        Err(failure) => return findings.push(Finding::error("server", chain(&failure), "")),
    };
    if let Some(finding) = of_another_user(serve) {
        return findings.push(finding);
    }
    let (wrong, problems) = listener::look(&settings);
    findings.extend(wrong.iter().map(|error| Finding::error("server", chain(error), "")));
    let remedy = "who is meant by it cannot log in, or can publish nothing";
    findings.extend(problems.into_iter().map(|problem| Finding::warning("server", problem, remedy)));
    if !serve.host_key.exists() {
        findings.extend(serve.host_key.parent().and_then(unwritable).map(|reason| {
            let says = format!("its host key is made at the first start, but {reason}");
            Finding::error("server", says, "let the user of the service write there, or make the key with ssh-keygen")
        }));
    }
    if let Some(reason) = serve.audit.as_deref().and_then(unwritable) {
        let remedy = "let the user of the service write there; without its record it does not start";
        findings.push(Finding::error("server", format!("'audit': {reason}"), remedy));
    }
    for user in &serve.users {
        let about = format!("user {}", Escaped(user.name.as_bytes()));
        // Whether another account may write there is told above.
        let judged = user.run_as.is_none();
        let own = user.keys.iter().filter_map(|key| Some((key.root.as_ref()?, key.rights.unwrap_or(user.rights()))));
        for (root, rights) in own.chain([(&user.root, user.rights())]) {
            let root = fixed_part(root);
            let judged = judged && rights.writes() && root.is_dir();
            if let Some(reason) = Some(root).filter(|_| judged).and_then(|at| unwritable(&at)) {
                let remedy =
                    "let the user of the service write there, and the unit (ReadWritePaths=); or set read_only = true";
                findings.push(Finding::warning(&about, format!("its root: {reason}"), remedy));
            }
        }
        let policy = user.policy.as_ref().and_then(|name| config.policies.get(name));
        findings.extend(policy.map(unknown_owners).into_iter().flatten().map(|name| {
            let says = format!("its policy names {name}, which this machine does not know; files that get it fail");
            Finding::error(&about, says, "create it, or write a number")
        }));
    }
    if let Some(low) = serve.listen.iter().find(|address| (1..LOW_PORTS).contains(&address.port()))
        && !rustix::process::geteuid().is_root()
    {
        let says = format!("{low} has a port that not everybody may listen on");
        let remedy = "name one from 1024 on, let lockstep-serve.socket listen, or give the unit CAP_NET_BIND_SERVICE";
        findings.push(Finding::warning("server", says, remedy));
    }
    if findings.iter().all(|finding| !finding.about.starts_with("server")) {
        findings.push(Finding::ok("server", "its keys, users and roots can be used"));
    }
}
