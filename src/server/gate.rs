//! The one gate: which right a request needs, for plain SFTP and for the agent. What is not allowed is not advertised
//! either.

use crate::config::{Right, Rights};

/// What a request does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Need {
    /// Nothing to the tree: it is about the session, or about something that is open already.
    Nothing,
    /// Looks at one thing by its name.
    Look,
    /// Lists names.
    List,
    /// Reads content.
    Read,
    /// Makes something new, or fills what this session has made and not closed yet.
    Create,
    /// Changes, replaces or renames what is there.
    Change,
    /// Removes what is there.
    Delete,
}

impl Need {
    /// Whether these rights cover it.
    pub const fn allowed(self, rights: Rights) -> bool {
        match self {
            Need::Nothing => true,
            Need::Look => rights.has(Right::List) || rights.has(Right::Read),
            Need::List => rights.has(Right::List),
            Need::Read => rights.has(Right::Read),
            Need::Create => rights.has(Right::Write) || rights.has(Right::WriteOnce),
            Need::Change => rights.has(Right::Write),
            Need::Delete => rights.has(Right::Delete),
        }
    }

    /// Whether it may change something.
    pub const fn writes(self) -> bool {
        matches!(self, Need::Create | Need::Change | Need::Delete)
    }

    /// Why it is refused.
    pub const fn refusal(self, rights: Rights) -> &'static str {
        match self {
            Need::Nothing | Need::Look | Need::List => "the rights here do not include 'list'",
            Need::Read => "the rights here do not include 'read'",
            Need::Change if rights.has(Right::WriteOnce) => {
                "the rights here are 'write-once': what is there is not changed, replaced or renamed"
            }
            Need::Delete if rights.has(Right::WriteOnce) => "the rights here are 'write-once': nothing is removed",
            Need::Create | Need::Change => "the rights here do not include 'write'",
            Need::Delete => "the rights here do not include 'delete'",
        }
    }
}

/// The agent's requests. What a run does with what is there already is decided when it is compared, and again before it is
/// published: see [`Forbidden`](crate::endpoint::Forbidden).
pub const AGENT: [(&str, Need); 28] = [
    ("hello", Need::Nothing),
    ("begin", Need::Create),
    ("attach", Need::Nothing), // Of a run that was begun, by its token.
    ("entries", Need::Create),
    ("diff", Need::Create),
    ("plan", Need::Create),
    ("put", Need::Create),
    ("open", Need::Create),
    ("write", Need::Create),
    ("hole", Need::Create),
    ("finish", Need::Create),
    ("keep", Need::Create),
    ("discard", Need::Create),
    ("commit", Need::Create),
    ("abort", Need::Nothing),
    ("scan", Need::List),
    ("list", Need::List),
    ("fetch", Need::Read),
    ("next", Need::Read),
    ("trash", Need::Nothing), // No request: that it is known.
    ("trail", Need::List),
    ("alike", Need::Read), // What is there shows in it.
    ("copy", Need::Read),
    ("stripe", Need::Create),
    ("turns", Need::Nothing), // No request: that `next` may have a number.
    ("wants", Need::Read),
    ("parts", Need::Read),
    ("listen", Need::Nothing), // Whether there is a port to be had is not for rights to say.
];

/// What a request of the agent needs; nothing is known of others, and they are refused.
pub fn of_agent(name: &str) -> Option<Need> {
    AGENT.iter().find(|(known, _)| *known == name).map(|(_, need)| *need)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::extension::{DOMAIN, NAMES};

    #[test]
    fn each_request_of_the_agent_has_its_need() {
        let names: Vec<&str> = NAMES.iter().map(|name| name.strip_suffix(DOMAIN).unwrap()).collect();
        assert_eq!(AGENT.map(|(name, _)| name).to_vec(), names);
    }

    #[test]
    fn what_each_right_allows() {
        use Need::{Change, Create, Delete, List, Look, Nothing, Read};
        for (rights, allowed) in [
            ("list", &[Nothing, Look, List][..]),
            ("read", &[Nothing, Look, Read]),
            ("write", &[Nothing, Create, Change]),
            ("write-once", &[Nothing, Create]),
            ("delete", &[Nothing, Delete]),
            ("list,read,write,delete", &[Nothing, Look, List, Read, Create, Change, Delete]),
        ] {
            let rights: Rights = rights.parse().unwrap();
            for need in [Nothing, Look, List, Read, Create, Change, Delete] {
                assert_eq!(need.allowed(rights), allowed.contains(&need), "{rights} {need:?}");
            }
        }
    }
}
