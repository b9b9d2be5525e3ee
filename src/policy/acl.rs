//! POSIX access control lists: entries as setfacl(1) writes them, and the bytes the kernel takes (`acl(5)`, and
//! `linux/posix_acl_xattr.h` for the layout).
//!
//! The rule's mode stays what it says: its group digit is the list's mask, as after chmod(1). So a list names further
//! users and groups, and `group::` where the owning group is to get less than the mask lets through.

use std::fmt;

/// The extended attribute of an access list.
pub const ACCESS_XATTR: &str = "system.posix_acl_access";
/// The extended attribute of a directory's default list.
pub const DEFAULT_XATTR: &str = "system.posix_acl_default";

const VERSION: u32 = 2;
const NO_ID: u32 = u32::MAX;
const USER_OBJ: u16 = 0x01;
const USER: u16 = 0x02;
const GROUP_OBJ: u16 = 0x04;
const GROUP: u16 = 0x08;
const MASK: u16 = 0x10;
const OTHER: u16 = 0x20;

/// Entries that cannot be a list.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("ACL entry '{entry}': {reason}")]
pub struct InvalidAcl {
    entry: String,
    reason: &'static str,
}

/// Whose number is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Principal {
    /// A user's.
    User,
    /// A group's.
    Group,
}

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
enum Tag {
    UserObject,
    GroupObject,
    Mask,
    Other,
    Named(Principal, String),
}

/// `r`, `w` and `x` as 4, 2 and 1; `X` is an `x` for directories and for what somebody may execute.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Permissions {
    bits: u16,
    execute_if_sensible: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Entry {
    tag: Tag,
    permissions: Permissions,
}

/// What a rule grants beyond owner, group and others.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Acl {
    access: Vec<Entry>,
    default: Vec<Entry>,
}

impl Acl {
    /// Reads entries: `[default:]user:NAME:rwx`, `group:NAME:r-x`, `group::r`, with setfacl's short forms (`d:u:…`).
    ///
    /// # Errors
    /// [`InvalidAcl`] with the entry that is wrong.
    pub fn parse<S: AsRef<str>>(entries: &[S]) -> Result<Acl, InvalidAcl> {
        let mut acl = Acl::default();
        for text in entries.iter().map(AsRef::as_ref) {
            let wrong = |reason| InvalidAcl { entry: text.to_owned(), reason };
            let (default, entry) = parse_entry(text).map_err(wrong)?;
            let list = if default { &mut acl.default } else { &mut acl.access };
            if list.iter().any(|earlier| earlier.tag == entry.tag) {
                return Err(wrong("another entry is for the same user or group"));
            }
            list.push(entry);
        }
        Ok(acl)
    }

    /// Whether there is nothing to set: then what a path inherited is removed.
    pub fn is_empty(&self) -> bool {
        self.access.is_empty() && self.default.is_empty()
    }

    /// The first entry that a mode's group digit would cut down, with what it would lose.
    ///
    /// `mode` has the group's bits as the mask of the list, as chmod(1) makes it; `directory` says what `X` means.
    pub fn cut_by(&self, mode: u32, directory: bool) -> Option<String> {
        let mask = (mode >> 3 & 0o7) as u16;
        let executable = directory || mode & 0o111 != 0;
        let bits =
            |entry: &Entry| entry.permissions.bits | u16::from(entry.permissions.execute_if_sensible && executable);
        let named = self.access.iter().filter(|entry| matches!(entry.tag, Tag::Named(..)));
        named.filter(|entry| bits(entry) & !mask != 0).map(Entry::to_string).next()
    }

    /// The value of [`ACCESS_XATTR`] for a path of this `mode`; `None` means that the attribute is to be removed.
    /// `resolve` finds numbers.
    ///
    /// # Errors
    /// What `resolve` fails with.
    pub fn access_xattr<E>(
        &self,
        mode: u32,
        directory: bool,
        resolve: impl Fn(Principal, &str) -> Result<u32, E>,
    ) -> Result<Option<Vec<u8>>, E> {
        if self.access.is_empty() {
            return Ok(None);
        }
        let executable = directory || mode & 0o111 != 0;
        encode(&self.access, mode, Some((mode >> 3 & 0o7) as u16), executable, resolve).map(Some)
    }

    /// The value of [`DEFAULT_XATTR`] for a directory of this `mode`; `None` means that the attribute is to be removed.
    /// What the entries do not say about owner, group and others comes from `mode`.
    ///
    /// # Errors
    /// What `resolve` fails with.
    pub fn default_xattr<E>(
        &self,
        mode: u32,
        resolve: impl Fn(Principal, &str) -> Result<u32, E>,
    ) -> Result<Option<Vec<u8>>, E> {
        if self.default.is_empty() {
            return Ok(None);
        }
        encode(&self.default, mode, None, true, resolve).map(Some)
    }
}

/// `mask` is given by the mode, or else by the entries: theirs, or the union of what they grant.
fn encode<E>(
    entries: &[Entry],
    mode: u32,
    mask: Option<u16>,
    executable: bool,
    resolve: impl Fn(Principal, &str) -> Result<u32, E>,
) -> Result<Vec<u8>, E> {
    let digit = |shift: u32| (mode >> shift & 0o7) as u16;
    let mut rows = vec![(USER_OBJ, NO_ID, digit(6)), (GROUP_OBJ, NO_ID, digit(3)), (OTHER, NO_ID, digit(0))];
    let mut wanted_mask = mask;
    for entry in entries {
        let bits = entry.permissions.bits | u16::from(entry.permissions.execute_if_sensible && executable);
        let (tag, id) = match &entry.tag {
            Tag::UserObject => (USER_OBJ, NO_ID),
            Tag::GroupObject => (GROUP_OBJ, NO_ID),
            Tag::Other => (OTHER, NO_ID),
            Tag::Mask => {
                wanted_mask = Some(bits);
                continue;
            }
            Tag::Named(Principal::User, name) => (USER, resolve(Principal::User, name)?),
            Tag::Named(Principal::Group, name) => (GROUP, resolve(Principal::Group, name)?),
        };
        match rows.iter_mut().find(|row| (row.0, row.1) == (tag, id)) {
            Some(row) if id == NO_ID => row.2 = bits,
            // Two names of one number: only what both grant.
            Some(row) => row.2 &= bits,
            None => rows.push((tag, id, bits)),
        }
    }
    let union = || rows.iter().filter(|row| [USER, GROUP_OBJ, GROUP].contains(&row.0)).fold(0, |all, row| all | row.2);
    let mask = wanted_mask.unwrap_or_else(union);
    rows.push((MASK, NO_ID, mask));
    // The kernel wants the tags in order, and the numbers of one tag too.
    rows.sort_unstable();
    let mut bytes = VERSION.to_le_bytes().to_vec();
    for (tag, id, bits) in rows {
        bytes.extend_from_slice(&tag.to_le_bytes());
        bytes.extend_from_slice(&bits.to_le_bytes());
        bytes.extend_from_slice(&id.to_le_bytes());
    }
    Ok(bytes)
}

/// Whom a row of a list in the kernel's form is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[allow(missing_docs)]
pub enum RowTag {
    UserObject,
    User,
    GroupObject,
    Group,
    Mask,
    Other,
}

/// A row of a list in the kernel's form.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct AclRow {
    /// Whom it is for.
    pub tag: RowTag,
    /// The number of a named user or group.
    pub id: u32,
    /// `r`, `w` and `x` as 4, 2 and 1.
    pub bits: u32,
}

/// Reads the kernel's form; `None` when it is none.
pub fn rows(value: &[u8]) -> Option<Vec<AclRow>> {
    let rows = value.strip_prefix(&VERSION.to_le_bytes())?;
    let row = |row: &[u8]| {
        let (tag, bits) = (u16::from_le_bytes([row[0], row[1]]), u16::from_le_bytes([row[2], row[3]]));
        let tag = match tag {
            USER_OBJ => RowTag::UserObject,
            USER => RowTag::User,
            GROUP_OBJ => RowTag::GroupObject,
            GROUP => RowTag::Group,
            MASK => RowTag::Mask,
            OTHER => RowTag::Other,
            _ => return None,
        };
        Some(AclRow { tag, id: u32::from_le_bytes([row[4], row[5], row[6], row[7]]), bits: u32::from(bits & 7) })
    };
    if rows.len() % 8 != 0 { None } else { rows.chunks_exact(8).map(row).collect() }
}

fn parse_entry(text: &str) -> Result<(bool, Entry), &'static str> {
    let mut fields: Vec<&str> = text.split(':').collect();
    let default = fields.len() > 1 && ["d", "default"].contains(&fields[0]);
    if default {
        fields.remove(0);
    }
    let (kind, name, permissions) = match fields[..] {
        [kind, name, permissions] => (kind, name, permissions),
        [kind @ ("m" | "mask" | "o" | "other"), permissions] => (kind, "", permissions),
        _ => return Err("write it as user:NAME:rwx or group:NAME:r-x, with 'default:' in front for what is inherited"),
    };
    if name.bytes().any(|byte| byte.is_ascii_control() || byte == b',') {
        return Err("a name holds a comma or a control character");
    }
    let tag = match (kind, name) {
        ("u" | "user", "") => Tag::UserObject,
        ("g" | "group", "") => Tag::GroupObject,
        ("u" | "user", name) => Tag::Named(Principal::User, name.into()),
        ("g" | "group", name) => Tag::Named(Principal::Group, name.into()),
        ("m" | "mask", "") => Tag::Mask,
        ("o" | "other", "") => Tag::Other,
        ("m" | "mask" | "o" | "other", _) => return Err("'mask' and 'other' take no name"),
        _ => return Err("it must start with 'user', 'group' or 'default'"),
    };
    if !default && matches!(tag, Tag::UserObject | Tag::Other | Tag::Mask) {
        return Err("the rule's mode says this already: owner, others, and the group's digit as the mask");
    }
    Ok((default, Entry { tag, permissions: permissions_of(permissions)? }))
}

fn permissions_of(text: &str) -> Result<Permissions, &'static str> {
    if let [digit @ b'0'..=b'7'] = text.as_bytes() {
        return Ok(Permissions { bits: u16::from(digit - b'0'), execute_if_sensible: false });
    }
    let mut found = Permissions { bits: 0, execute_if_sensible: false };
    for c in text.chars() {
        match c {
            'r' => found.bits |= 4,
            'w' => found.bits |= 2,
            'x' => found.bits |= 1,
            'X' => found.execute_if_sensible = true,
            '-' => {}
            _ => return Err("permissions are made of r, w, x, X and -, or are one digit"),
        }
    }
    if text.is_empty() { Err("the permissions are missing; '---' grants nothing") } else { Ok(found) }
}

impl fmt::Display for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (kind, name) = match &self.tag {
            Tag::UserObject => ("user", ""),
            Tag::GroupObject => ("group", ""),
            Tag::Mask => ("mask", ""),
            Tag::Other => ("other", ""),
            Tag::Named(Principal::User, name) => ("user", name.as_str()),
            Tag::Named(Principal::Group, name) => ("group", name.as_str()),
        };
        let bit = |bit: u16, letter: char| if self.permissions.bits & bit != 0 { letter } else { '-' };
        let execute = if self.permissions.execute_if_sensible { 'X' } else { bit(1, 'x') };
        write!(f, "{kind}:{name}:{}{}{execute}", bit(4, 'r'), bit(2, 'w'))
    }
}

impl fmt::Display for Acl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let entries = self.access.iter().map(|entry| ("", entry));
        for (at, (prefix, entry)) in entries.chain(self.default.iter().map(|entry| ("default:", entry))).enumerate() {
            write!(f, "{}{prefix}{entry}", if at == 0 { "" } else { "," })?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resolve(who: Principal, name: &str) -> Result<u32, String> {
        match (who, name) {
            (Principal::User, "alice") => Ok(1000),
            (Principal::Group, "ops") => Ok(50),
            (_, name) => name.parse().map_err(|_| format!("unknown {name}")),
        }
    }

    fn rows(bytes: &[u8]) -> Vec<(u16, u16, u32)> {
        assert_eq!(bytes[..4], [2, 0, 0, 0]);
        let number = |bytes: &[u8]| u16::from_le_bytes([bytes[0], bytes[1]]);
        let row = |row: &[u8]| (number(row), number(&row[2..]), u32::from_le_bytes(row[4..8].try_into().unwrap()));
        bytes[4..].chunks_exact(8).map(row).collect()
    }

    #[test]
    fn s12_the_bytes_are_those_the_kernel_takes() {
        let acl = Acl::parse(&["group:ops:rwx", "user:2000:r", "u:alice:rX", "default:group:ops:rx"]).unwrap();
        let access = acl.access_xattr(0o1774, true, resolve).unwrap().unwrap();
        let none = u32::MAX;
        let named = [(2, 5, 1000), (2, 4, 2000), (4, 7, none), (8, 7, 50), (16, 7, none), (32, 4, none)];
        assert_eq!(rows(&access), [&[(1, 7, none)][..], &named].concat());
        let default = acl.default_xattr(0o770, resolve).unwrap().unwrap();
        assert_eq!(rows(&default), [(1, 7, none), (4, 7, none), (8, 5, 50), (16, 7, none), (32, 0, none)]);
        let file = Acl::parse(&["u:alice:rX", "g::-"]).unwrap().access_xattr(0o640, false, resolve).unwrap().unwrap();
        assert_eq!(rows(&file), [(1, 6, none), (2, 4, 1000), (4, 0, none), (16, 4, none), (32, 0, none)]);
    }

    #[test]
    fn the_kernel_takes_them_and_the_mode_stays() {
        use std::os::unix::fs::PermissionsExt as _;
        let directory = tempfile::tempdir().unwrap();
        let file = std::fs::File::create(directory.path().join("f")).unwrap();
        file.set_permissions(std::fs::Permissions::from_mode(0o640)).unwrap();
        let acl = Acl::parse(&["u:2000:r", "g:50:r", "g::---"]).unwrap();
        let value = acl.access_xattr(0o640, false, resolve).unwrap().unwrap();
        rustix::fs::fsetxattr(&file, ACCESS_XATTR, &value, rustix::fs::XattrFlags::empty()).unwrap();
        assert_eq!(file.metadata().unwrap().permissions().mode() & 0o7777, 0o640);
        let mut read = vec![0; 256];
        let length = rustix::fs::fgetxattr(&file, ACCESS_XATTR, &mut read[..]).unwrap();
        assert_eq!(read[..length], value);
    }

    #[test]
    fn h48_an_unknown_name_is_an_error() {
        let acl = Acl::parse(&["user:nobody-here:r", "default:group:gone:r"]).unwrap();
        assert_eq!(acl.access_xattr(0o640, false, resolve).unwrap_err(), "unknown nobody-here");
        assert_eq!(acl.default_xattr(0o750, resolve).unwrap_err(), "unknown gone");
    }

    #[test]
    fn nothing_to_set_means_that_the_attribute_goes() {
        let acl = Acl::parse::<&str>(&[]).unwrap();
        assert!(acl.is_empty());
        assert_eq!(acl.access_xattr(0o640, false, resolve), Ok(None));
        assert_eq!(acl.default_xattr(0o640, resolve), Ok(None));
    }

    #[test]
    fn two_names_of_one_number_get_what_both_grant() {
        let acl = Acl::parse(&["u:alice:rw", "u:1000:r"]).unwrap();
        let value = acl.access_xattr(0o660, false, resolve).unwrap().unwrap();
        assert_eq!(rows(&value)[1], (2, 4, 1000));
        assert_eq!(rows(&value).len(), 5);
    }

    #[test]
    fn entries_that_are_wrong_are_refused_with_their_text() {
        for wrong in [
            "",
            "user",
            "user:alice",
            "user:alice:rwz",
            "user:alice:",
            "user:alice:8",
            "user:alice:77",
            "x:alice:r",
            "user::rw",
            "other::r",
            "o:r",
            "mask::r",
            "default:mask:a:r",
            "user:a:r:w",
            "d:d:u:a:r",
            "user:a,b:r",
            "user:a\nb:r",
            "default:",
            "d",
        ] {
            let error = Acl::parse(&[wrong]).unwrap_err();
            assert_eq!(error.entry, wrong);
        }
        assert!(Acl::parse(&["u:alice:r", "user:alice:w"]).is_err());
        assert!(Acl::parse(&["u:alice:r", "d:u:alice:r", "d:m:r", "d:other::0"]).is_ok());
    }

    #[test]
    fn a_list_shows_as_it_is_written_and_says_what_a_mode_cuts() {
        let acl = Acl::parse(&["u:alice:7", "g:ops:rX", "d:o::-"]).unwrap();
        assert_eq!(acl.to_string(), "user:alice:rwx,group:ops:r-X,default:other::---");
        assert_eq!(acl.cut_by(0o740, false).as_deref(), Some("user:alice:rwx"));
        assert_eq!(acl.cut_by(0o770, false), None);
        // What X stands for is cut down, too.
        let sensible = Acl::parse(&["user:alice:rX"]).unwrap();
        let cut = [(0o740, true), (0o640, true), (0o740, false), (0o640, false), (0o750, true)];
        let cut = cut.map(|(mode, directory)| sensible.cut_by(mode, directory).is_some());
        assert_eq!(cut, [true, true, true, false, false]);
    }
}
