//! What the configuration says of audit logs, and what the logs are told of the configuration.

use std::path::{Path, PathBuf};

use russh::keys::PrivateKey;
use sha2::{Digest as _, Sha256};

use super::super::transfer::config_file;
use super::{Failure, Outcome};
use crate::audit::{self, AuditRecord, Settings, Signing};
use crate::config::{Audit, Config, ConfigError, Untrusted};
use crate::error::{chain, shown};
use crate::manifest::Digest;

/// What `[audit]` asks for. Where it names no key that of the host signs, if there is one.
pub(in crate::cli) fn settings(config: &Audit, host_key: Option<&PrivateKey>) -> Result<Settings, Failure> {
    let own = config.signing_key.as_deref().map(audit::load_key).transpose().map_err(Failure::usage)?;
    let key = own.or_else(|| host_key.cloned());
    let (lines, every) = (config.sign_lines.get(), config.sign_every());
    let signing = key.map(|key| Signing { key, lines, every });
    Ok(Settings { signing, rotation: config.rotation(), on_failure: config.on_failure })
}

/// Goes by `[audit]` of a configuration that somebody named.
pub(in crate::cli) fn configure(config: &Audit) -> Result<(), Failure> {
    audit::configure(settings(config, None)?);
    Ok(())
}

/// Goes by `[audit]` of this machine's configuration, where there is one and this user may read it. A key that is kept from him
/// signs nothing of his. What else the configuration says is given back.
pub(in crate::cli) fn configure_as_usual() -> Result<Config, Failure> {
    let found = match Config::load(&config_file(None)) {
        Ok(found) => found,
        // Who names one means it.
        Err(ConfigError::Read { reason, .. })
            if std::env::var_os("LOCKSTEP_CONFIG").is_none_or(|_| reason.kind() != std::io::ErrorKind::NotFound)
                && matches!(reason.kind(), std::io::ErrorKind::NotFound | std::io::ErrorKind::PermissionDenied) =>
        {
            return Ok(Config::default());
        }
        // That of another user's service.
        Err(ConfigError::Untrusted { problem: Untrusted::Owner(_), .. }) => return Ok(Config::default()),
        Err(error) => return Err(Failure::usage(chain(&error))),
    };
    let config = found.audit.clone();
    let kept = |path: &PathBuf| {
        std::fs::File::open(path).is_err_and(|error| error.kind() == std::io::ErrorKind::PermissionDenied)
    };
    let signing_key = config.signing_key.clone().filter(|path| !kept(path));
    configure(&Audit { signing_key, ..config })?;
    Ok(found)
}

/// That a service goes by a configuration, or not: `why` says which, and what is wrong with it.
pub(in crate::cli) fn configuration(file: &Path, result: Outcome, why: &str, actor: String) -> AuditRecord {
    // RACE: what was read and what is hashed here may differ, where somebody writes it just now; then it is read again.
    let text = std::fs::read(file).ok();
    AuditRecord {
        actor,
        action: "configuration".into(),
        path: shown(&std::path::absolute(file).unwrap_or_else(|_| file.to_owned())).to_string(),
        size: text.as_ref().map(|text| text.len() as u64),
        sha256: text.map(|text| Digest(Sha256::digest(&text).into()).to_string()),
        result: Some(result),
        reason: Some(why.to_owned()),
        ..AuditRecord::default()
    }
}
