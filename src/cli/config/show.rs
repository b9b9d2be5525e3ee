//! The configuration as it is understood.

use crate::cli::{Failure, control, daemon, shown};
use crate::config::Config;
use crate::error::Exit;

/// As TOML that is a configuration itself, or as JSON.
pub(super) fn text(config: Config, json: bool) -> Result<String, Failure> {
    let file = shown(&config.path).to_string();
    let whole = filled(config);
    let failed = |error: &dyn std::error::Error| Failure::plain(Exit::Usage, error);
    if json {
        let text = serde_json::to_string_pretty(&whole).map_err(|error| failed(&error))?;
        return Ok(format!("{text}\n"));
    }
    let text = toml::to_string(&whole).map_err(|error| failed(&error))?;
    Ok(format!("# {file}, with what stands in for what it leaves out\n\n{text}"))
}

/// With what depends on who asks: places that systemd gives a service, or else those of the user.
fn filled(mut config: Config) -> Config {
    for job in &mut config.jobs {
        job.quorum.get_or_insert(job.targets.len());
    }
    if !config.jobs.is_empty() {
        config.daemon.state = daemon::state_of(&config).ok();
        config.daemon.socket = control::socket_of(&config).ok();
    }
    config
}
