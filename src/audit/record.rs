//! What a line says.

use serde::{Deserialize, Serialize};

use crate::manifest::Entry;

/// A line takes so much besides the words that are its own.
pub(super) const LINE_BYTES: u64 = 640;

/// One thing that was done, or refused. Names are escaped ([`crate::error::Escaped`]) by whoever makes the record. What does
/// not apply is left out of the line.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct AuditRecord {
    /// Who: `user@host`.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub actor: String,
    /// Where the content came from.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub source: String,
    /// By what the actor logged in, as this machine knows it.
    #[serde(flatten)]
    pub login: Option<Box<Login>>,
    /// One of the actions of docs/format.md.
    pub action: String,
    /// The path below the root, escaped; of `configuration` the file, of `rotate` and `prune` that of the log.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub path: String,
    /// Bytes of a regular file.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub size: Option<u64>,
    /// SHA-256 of a regular file, in hexadecimal.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sha256: Option<String>,
    /// The mode it got, in octal.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mode: Option<String>,
    /// The owner it got.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub owner: Option<String>,
    /// The group it got.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub group: Option<String>,
    /// The ACL entries it got beyond owner, group and others.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub acl: Option<String>,
    /// Why it was refused, or where it was moved.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// What had the name before, if anything.
    #[serde(flatten)]
    pub before: Option<Before>,
    /// The generation of the manifest that it is about.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub generation: Option<u64>,
    /// What came of it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub result: Option<Outcome>,
    /// `LINES HASH`: the head that is signed (`head`), or up to which the log was removed (`prune`).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub head: Option<String>,
    /// The signature over the head, as `ssh-keygen -Y` makes it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub signature: Option<String>,
}

/// Whether it was done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    /// It was; or what was checked is good.
    Success,
    /// It was not, or refused; or what was checked is bad.
    Failure,
}

/// By what somebody is here: what the machine itself has seen, never what the other end says.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Login {
    /// Address, and port where it is known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub peer: Option<String>,
    /// `SHA256:…` of the key that signed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub key: Option<String>,
    /// The id of its certificate, escaped.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub certificate: Option<String>,
    /// The certificate's serial number.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub serial: Option<u64>,
    /// `SHA256:…` of the authority that signed the certificate.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub authority: Option<String>,
}

/// Owner and mode that something had before.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Before {
    /// In octal.
    #[serde(rename = "mode_before")]
    pub mode: String,
    /// Name or number.
    #[serde(rename = "owner_before")]
    pub owner: String,
    /// Name or number.
    #[serde(rename = "group_before")]
    pub group: String,
}

impl Before {
    /// Of an entry that was there.
    #[must_use]
    pub fn of(entry: &Entry) -> Before {
        Before { mode: format!("{:04o}", entry.mode), owner: entry.owner.to_string(), group: entry.group.to_string() }
    }
}

impl AuditRecord {
    /// How long its line gets, and a little more.
    #[must_use]
    pub fn line_bytes(&self) -> u64 {
        LINE_BYTES + serde_json::to_vec(self).map_or(0, |text| text.len() as u64)
    }

    /// That an unfinished line was taken away, which comes before whatever is told next.
    pub fn unfinished() -> AuditRecord {
        let reason = "a line that was not finished was taken away: whoever wrote it was interrupted";
        AuditRecord { action: "gap".into(), reason: Some(reason.into()), ..AuditRecord::default() }
    }

    /// That lines could not be written, which comes before the next one that can.
    pub fn lost(lines: u64) -> AuditRecord {
        let reason = format!("{lines} records before this one could not be written");
        AuditRecord { action: "gap".into(), reason: Some(reason), ..AuditRecord::default() }
    }

    /// What happened to an entry and what it got, by whom this record says.
    #[must_use]
    pub fn of_entry(&self, action: &str, entry: &Entry) -> AuditRecord {
        let file = entry.file();
        AuditRecord {
            action: action.into(),
            path: entry.path.to_string(),
            size: file.map(|(size, _)| size),
            sha256: file.and_then(|(_, digest)| digest).map(|digest| digest.to_string()),
            mode: Some(format!("{:04o}", entry.mode)),
            owner: Some(entry.owner.to_string()),
            group: Some(entry.group.to_string()),
            result: Some(Outcome::Success),
            ..self.clone()
        }
    }
}
