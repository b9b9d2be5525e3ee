//! Whether a file that holds a secret is kept from others.
//!
//! systemd gives a service its credentials with an ACL that names the service's user. Of a file with an ACL the group's digit of the
//! mode is the mask, not what the group may.

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt as _;

use super::Inode;
use crate::policy::acl::{RowTag, rows};

/// Whether nobody but root and this user may read or write it.
///
/// # Errors
/// When it cannot be looked at.
pub fn is_kept(file: &File) -> io::Result<bool> {
    let mode = file.metadata()?.mode();
    if mode & 0o077 == 0 {
        return Ok(true);
    }
    let lists = if mode & 0o007 == 0 { Inode::of(file)?.acls()? } else { return Ok(false) };
    let Some(rows) = lists.access.as_deref().and_then(rows) else { return Ok(false) };
    let own = [0, rustix::process::geteuid().as_raw()];
    Ok(rows.iter().all(|row| match row.tag {
        RowTag::UserObject | RowTag::Mask => true,
        RowTag::User => own.contains(&row.id),
        RowTag::GroupObject | RowTag::Group | RowTag::Other => row.bits == 0,
    }))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;
    use std::process::Command;

    use super::*;

    #[test]
    fn a_credential_of_systemd_is_kept_and_what_a_group_or_another_may_read_is_not() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("key");
        std::fs::write(&path, "secret").unwrap();
        let own = rustix::process::geteuid().as_raw();
        for (mode, acl, kept) in [
            (0o400, String::new(), true),
            (0o600, String::new(), true),
            (0o440, String::new(), false),
            (0o404, String::new(), false),
            // As systemd sets it: the group's digit becomes the mask.
            (0o400, format!("u:{own}:r"), true),
            (0o400, format!("u:{own}:r,g:games:r"), false),
            (0o400, "u:nobody:r".to_owned(), false),
            (0o400, format!("u:{own}:r,g::r"), false),
        ] {
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
            let set = |arguments: &[&str]| {
                assert!(Command::new("setfacl").args(arguments).arg(&path).status().unwrap().success())
            };
            set(&["-b"]);
            if !acl.is_empty() {
                set(&["-m", &acl]);
            }
            assert_eq!(is_kept(&File::open(&path).unwrap()).unwrap(), kept, "{mode:o} {acl}");
        }
    }
}
