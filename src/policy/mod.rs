//! Which owner, mode and ACL a path gets.

pub mod acl;
pub mod mode;
pub mod rights;
mod rules;

pub use rules::{Decision, Explanation, Policy, PolicyError, Sender, chmod_rules, chown_rules};

use serde::{Deserialize, Serialize};

/// A named policy as the configuration writes it: rules in order, the last that matches wins.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PolicySpec {
    /// The rules.
    #[serde(default, rename = "rule")]
    pub rules: Vec<RuleSpec>,
}

/// One rule, not yet checked.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RuleSpec {
    /// A gitignore-style glob; with a trailing slash for directories.
    #[serde(rename = "match")]
    pub pattern: String,
    /// Octal or symbolic, whatever chmod(1) takes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mode: Option<String>,
    /// User name or number.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub owner: Option<String>,
    /// Group name or number.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub group: Option<String>,
    /// ACL entries as setfacl(1) writes them; `Some` of nothing removes ACLs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub acl: Option<Vec<String>>,
    /// `after-verify` (the default), or `never`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub execute: Option<String>,
}

/// Both sides' rules as one policy. The receiver's come later, and so win.
pub fn merge(receiver: &PolicySpec, sender: &PolicySpec) -> PolicySpec {
    PolicySpec { rules: sender.rules.iter().chain(&receiver.rules).cloned().collect() }
}
