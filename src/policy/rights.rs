//! Whom the kernel lets do what: owner, ACL, group, others, in the order of path_resolution(7) and acl(5).
//!
//! Capabilities (but for root's), security modules, mount options and the rules of network file systems are not seen here.

use std::fmt;

use super::acl::{AclRow, RowTag, rows};
use crate::error::Escaped;

/// What is asked for, as in a mode's digit.
pub const READ: u32 = 4;
/// To pass through a directory.
pub const SEARCH: u32 = 1;
/// To list a directory, and to look at what it holds.
pub const LIST: u32 = READ | SEARCH;

/// Whose rights are asked about.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Subject {
    /// For messages: `alice (uid 1003, groups 1003, ai_team)`.
    pub shown: String,
    /// The user; `None` for any member of the groups who is not named otherwise.
    pub uid: Option<u32>,
    /// All groups.
    pub groups: Vec<u32>,
}

/// What decides about a file or directory.
#[derive(Debug, Clone, Copy)]
pub struct Object<'a> {
    /// Whether it is a directory.
    pub directory: bool,
    /// Mode with special bits.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// The value of `system.posix_acl_access`.
    pub acl: Option<&'a [u8]>,
}

/// Which entry spoke against it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum By {
    /// The mode's first digit.
    Owner,
    /// The owning group's bits: the mode's second digit, or `group::` of an ACL with its mask.
    Group {
        /// What is granted before the mask, where there is an ACL.
        entry: Option<u32>,
    },
    /// An ACL entry for a user by number, or for groups, none of which grants it.
    Named {
        /// The user, or `None` for a group.
        user: bool,
        /// The number.
        id: u32,
        /// What it grants before the mask.
        entry: u32,
    },
    /// The mode's last digit.
    Others,
    /// No x bit for anybody: not even root executes it.
    Root,
}

/// A request that would be refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Denial {
    /// The bits that are missing.
    pub missing: u32,
    /// Who did not grant them.
    pub by: By,
}

/// Whether `subject` gets all bits of `wanted`.
///
/// # Errors
/// [`Denial`] with what is missing.
pub fn may(subject: &Subject, object: &Object<'_>, wanted: u32) -> Result<(), Denial> {
    let granted = |bits: u32, by: By| match wanted & !bits {
        0 => Ok(()),
        missing => Err(Denial { missing, by }),
    };
    if subject.uid == Some(0) {
        let execute = u32::from(object.directory || object.mode & 0o111 != 0);
        return granted(6 | execute, By::Root);
    }
    let digit = |shift: u32| object.mode >> shift & 7;
    if subject.uid == Some(object.uid) {
        return granted(digit(6), By::Owner);
    }
    // The kernel does not look at the ACL of an inode whose group digit, the mask, is 0.
    if let Some(acl) = object.acl.and_then(rows)
        && digit(3) != 0
    {
        return by_acl(subject, object.gid, &acl, wanted);
    }
    if subject.groups.contains(&object.gid) {
        return granted(digit(3), By::Group { entry: None });
    }
    granted(digit(0), By::Others)
}

fn by_acl(subject: &Subject, owning: u32, acl: &[AclRow], wanted: u32) -> Result<(), Denial> {
    let find = |tag: RowTag| acl.iter().find(|row| row.tag == tag).map(|row| row.bits);
    let mask = find(RowTag::Mask).unwrap_or(7);
    let denied = |row: &AclRow| {
        let by = match row.tag {
            RowTag::User => By::Named { user: true, id: row.id, entry: row.bits },
            RowTag::Group => By::Named { user: false, id: row.id, entry: row.bits },
            _ => By::Group { entry: Some(row.bits) },
        };
        Denial { missing: wanted & !(row.bits & mask), by }
    };
    let grants = |row: &AclRow| wanted & !(row.bits & mask) == 0;
    let own = |row: &&AclRow| row.tag == RowTag::User && subject.uid == Some(row.id);
    if let Some(row) = acl.iter().find(own) {
        return if grants(row) { Ok(()) } else { Err(denied(row)) };
    }
    // Of the groups one that grants everything is enough.
    let member = |row: &&AclRow| match row.tag {
        RowTag::GroupObject => subject.groups.contains(&owning),
        RowTag::Group => subject.groups.contains(&row.id),
        _ => false,
    };
    let mut groups = acl.iter().filter(member).peekable();
    if let Some(&first) = groups.peek() {
        return if groups.any(grants) { Ok(()) } else { Err(denied(first)) };
    }
    match wanted & !find(RowTag::Other).unwrap_or(0) {
        0 => Ok(()),
        missing => Err(Denial { missing, by: By::Others }),
    }
}

/// Bits as `r-x`.
pub fn letters(bits: u32) -> String {
    [(4, 'r'), (2, 'w'), (1, 'x')].iter().map(|&(bit, letter)| if bits & bit != 0 { letter } else { '-' }).collect()
}

impl Denial {
    /// Why, with the names of who decides: `mode 0600, owner trainer, group ai_team: others have no r`.
    pub fn explain(
        &self,
        object: &Object<'_>,
        user: &mut dyn FnMut(u32) -> String,
        group: &mut dyn FnMut(u32) -> String,
    ) -> String {
        let missing: String = letters(self.missing).chars().filter(|&c| c != '-').collect();
        let mask = letters(object.mode >> 3 & 7);
        let through_mask = |entry: u32| {
            if self.missing & entry == 0 { String::new() } else { format!(", which the mask {mask} cuts") }
        };
        let why = match &self.by {
            By::Owner => format!("the owner has no {missing}"),
            By::Group { entry: None } => format!("the group has no {missing}"),
            By::Group { entry: Some(entry) } => {
                format!("the ACL entry group::{}{} gives no {missing}", letters(*entry), through_mask(*entry))
            }
            By::Named { user: kind, id, entry } => {
                let (kind, name) = if *kind { ("user", user(*id)) } else { ("group", group(*id)) };
                let name = Escaped(name.as_bytes());
                format!("the ACL entry {kind}:{name}:{}{} gives no {missing}", letters(*entry), through_mask(*entry))
            }
            By::Others => format!("others have no {missing}"),
            By::Root => format!("nobody has {missing}"),
        };
        let (owner, group) = (user(object.uid), group(object.gid));
        let (owner, group) = (Escaped(owner.as_bytes()), Escaped(group.as_bytes()));
        format!("owner {owner}, group {group}, mode {:04o}: {why}", object.mode)
    }
}

impl fmt::Display for Subject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.shown)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::acl::{Acl, Principal};

    fn subject(uid: Option<u32>, groups: &[u32]) -> Subject {
        Subject { shown: "somebody".into(), uid, groups: groups.to_vec() }
    }

    fn list(entries: &[&str], mode: u32) -> Vec<u8> {
        let number = |_: Principal, name: &str| name.parse::<u32>();
        Acl::parse(entries).unwrap().access_xattr(mode, false, number).unwrap().unwrap()
    }

    #[test]
    fn s11_the_first_class_that_fits_decides_alone() {
        let file = |mode| Object { directory: false, mode, uid: 5, gid: 50, acl: None };
        let by = |subject, mode, wanted| may(&subject, &file(mode), wanted).map_err(|denial| denial.by);
        assert_eq!(by(subject(Some(5), &[50]), 0o077, READ), Err(By::Owner));
        assert_eq!(by(subject(Some(6), &[50]), 0o707, READ), Err(By::Group { entry: None }));
        assert_eq!(by(subject(Some(6), &[51]), 0o770, READ), Err(By::Others));
        assert_eq!(by(subject(None, &[50]), 0o040, READ), Ok(()));
        assert_eq!(by(subject(Some(0), &[]), 0o000, READ), Ok(()));
        assert_eq!(by(subject(Some(0), &[]), 0o666, SEARCH), Err(By::Root));
    }

    #[test]
    fn s11_an_acl_is_read_with_its_mask_and_not_at_all_without_group_bits() {
        let judge = |entries: &[&str], mode: u32, who: Subject| {
            let acl = list(entries, mode);
            let object = Object { directory: false, mode, uid: 5, gid: 50, acl: Some(&acl) };
            may(&who, &object, READ)
                .map_err(|denial| denial.explain(&object, &mut |id| id.to_string(), &mut |id| id.to_string()))
        };
        assert_eq!(judge(&["u:7:r"], 0o640, subject(Some(7), &[])), Ok(()));
        let cut = "owner 5, group 50, mode 0620: the ACL entry user:7:r--, which the mask -w- cuts gives no r";
        assert_eq!(judge(&["u:7:r"], 0o620, subject(Some(7), &[])), Err(cut.into()));
        assert_eq!(
            judge(&["u:7:-"], 0o644, subject(Some(7), &[50])).unwrap_err().split(": ").nth(1).unwrap(),
            "the ACL entry user:7:--- gives no r"
        );
        assert_eq!(judge(&["g::-", "g:60:r"], 0o640, subject(Some(7), &[50, 60])), Ok(()));
        assert!(judge(&["g::-", "g:60:r"], 0o640, subject(Some(7), &[50])).is_err());
        assert!(judge(&["g:60:-"], 0o644, subject(Some(7), &[60])).is_err());
        assert_eq!(judge(&["u:7:-"], 0o604, subject(Some(7), &[])), Ok(()));
    }
}
