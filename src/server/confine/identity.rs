//! The account of this machine that a session runs as.

use rustix::process::{Gid, Uid, getegid, geteuid, getgroups};
use rustix::thread::{CapabilitySet, set_thread_groups, set_thread_res_gid, set_thread_res_uid};
use serde::{Deserialize, Serialize};

use super::{ConfineError, step};
use crate::error::Escaped;
use crate::policy::PolicySpec;

/// Numbers of a user, as the name service had them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// The user's name.
    pub name: String,
    /// The user's number.
    pub uid: u32,
    /// The user's own group.
    pub gid: u32,
    /// All groups of the user.
    pub groups: Vec<u32>,
}

impl Identity {
    /// Looks a user up. Blocks.
    ///
    /// # Errors
    /// Why nobody can run as it.
    pub fn of(name: &str) -> Result<Identity, String> {
        let shown = Escaped(name.as_bytes());
        let unknown =
            || format!("there is no user '{shown}' on this machine to run as; create it, or name another in run_as");
        let user = uzers::get_user_by_name(name).ok_or_else(unknown)?;
        if user.uid() == 0 {
            return Err(
                "run_as = 'root' takes nothing away; leave it out, or name a user who is to own what arrives".into()
            );
        }
        let groups = uzers::get_user_groups(name, user.primary_group_id());
        let groups = groups.ok_or_else(|| format!("the groups of user '{shown}' are not told; see 'id {shown}'"))?;
        let mut groups: Vec<u32> = groups.iter().map(uzers::Group::gid).collect();
        groups.sort_unstable();
        groups.dedup();
        Ok(Identity { name: name.to_owned(), uid: user.uid(), gid: user.primary_group_id(), groups })
    }

    /// This process has its numbers already.
    fn is_own(&self) -> bool {
        (geteuid().as_raw(), getegid().as_raw()) == (self.uid, self.gid)
    }

    /// The groups of this process that the user is not in: systemd's SupplementaryGroups= and others add some.
    fn surplus(&self) -> rustix::io::Result<Vec<u32>> {
        let mut groups: Vec<u32> = getgroups()?.into_iter().map(Gid::as_raw).collect();
        groups.retain(|group| *group != self.gid && !self.groups.contains(group));
        Ok(groups)
    }

    /// Whether this process may become it.
    ///
    /// # Errors
    /// Why not, and what to do.
    pub fn reachable(&self) -> Result<(), String> {
        let held = rustix::thread::capabilities(None).map(|sets| sets.effective).unwrap_or(CapabilitySet::empty());
        if held.contains(CapabilitySet::SETUID | CapabilitySet::SETGID) {
            return Ok(());
        }
        let name = &self.name;
        if self.is_own() {
            let surplus =
                self.surplus().map_err(|error| format!("the groups of this process are not told: {error}"))?;
            if surplus.is_empty() {
                return Ok(());
            }
            let surplus: Vec<String> = surplus.iter().map(u32::to_string).collect();
            return Err(format!(
                "run_as = '{name}' is who this process runs as, but it has groups that '{name}' is not in ({}); start it with the \
                 groups of the account alone, or leave run_as out",
                surplus.join(", ")
            ));
        }
        Err(format!(
            "run_as = '{name}' needs CAP_SETUID and CAP_SETGID, which this process has not; run the server as root, or with the \
             drop-in run-as.conf of the examples for systemd, or leave run_as out"
        ))
    }

    /// Whether files can get what the rules say: it has no more rights than any user.
    ///
    /// # Errors
    /// Which rule cannot be followed.
    pub fn can_follow(&self, policy: &PolicySpec) -> Result<(), String> {
        use crate::scan::names::{group_id, user_id};
        let own = |id: u32| id == self.gid || self.groups.contains(&id);
        for (number, rule) in policy.rules.iter().enumerate() {
            let (number, name, pattern) = (number + 1, &self.name, Escaped(rule.pattern.as_bytes()));
            let cannot = |what: &str, given: &str| {
                format!(
                    "rule {number} of its policy ('{pattern}') gives files to {what} '{}', which who runs as '{name}' may not \
                     do; leave the rule's {what} or run_as out",
                    Escaped(given.as_bytes())
                )
            };
            if let Some(owner) = &rule.owner
                && user_id(owner) != Ok(self.uid)
            {
                return Err(cannot("owner", owner));
            }
            if let Some(group) = &rule.group
                && !group_id(group).is_ok_and(own)
            {
                return Err(cannot("group", group));
            }
        }
        Ok(())
    }

    /// From here on this thread, and those that it starts, are this user.
    pub(super) fn become_it(&self) -> Result<(), ConfineError> {
        if self.is_own() && self.surplus().map_err(step("the groups of the server"))?.is_empty() {
            return Ok(());
        }
        let groups: Vec<Gid> = self.groups.iter().map(|&group| Gid::from_raw(group)).collect();
        let (uid, gid) = (Uid::from_raw(self.uid), Gid::from_raw(self.gid));
        set_thread_groups(&groups).map_err(step("the groups of run_as"))?;
        set_thread_res_gid(gid, gid, gid).map_err(step("the group of run_as"))?;
        set_thread_res_uid(uid, uid, uid).map_err(step("the user of run_as"))?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::RuleSpec;

    #[test]
    fn who_runs_as_a_user_gives_files_to_nobody_else() {
        let alice = Identity { name: "alice".into(), uid: 61001, gid: 61002, groups: vec![61002, 61003] };
        let rule = |owner: Option<&str>, group: Option<&str>| PolicySpec {
            rules: vec![RuleSpec {
                pattern: "*.bin".into(),
                owner: owner.map(str::to_owned),
                group: group.map(str::to_owned),
                ..RuleSpec::default()
            }],
        };
        for good in [rule(None, None), rule(Some("61001"), None), rule(None, Some("61002")), rule(None, Some("61003"))]
        {
            assert_eq!(alice.can_follow(&good), Ok(()));
        }
        for (bad, said) in [
            (rule(Some("root"), None), "owner 'root'"),
            (rule(None, Some("root")), "group 'root'"),
            (rule(Some("no-such-user-here"), None), "owner 'no-such-user-here'"),
        ] {
            let error = alice.can_follow(&bad).unwrap_err();
            assert!(error.contains(said) && error.contains("rule 1") && error.contains("'*.bin'"), "{error}");
        }
    }

    #[test]
    fn nobody_runs_as_root_or_as_who_is_not_there() {
        assert!(Identity::of("root").unwrap_err().contains("takes nothing away"));
        assert!(Identity::of("no-such-user-here").unwrap_err().contains("no-such-user-here"));
    }
}
