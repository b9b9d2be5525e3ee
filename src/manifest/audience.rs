//! Who may read a manifest: those who may read everything that it lists.
//!
//! It tells names, sizes and digests, so that nobody is to read it who could not find them out by himself. Who can, has
//! to: a training job runs as a user who receives nothing, and checks what it reads.

use super::{Content, Entry, Name, Tree};

const READ: u32 = 0o4;
const READ_AND_ENTER: u32 = 0o5;

/// Who may read all of a tree by mode, owner and group. ACLs are not counted.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Audience {
    /// Everybody.
    pub others: bool,
    /// The members of this group.
    pub group: Option<Name>,
    /// This user.
    pub user: Option<Name>,
}

/// Finds out who may read all of the entries that come one by one.
#[derive(Debug, Default)]
pub struct Readers(Option<Audience>);

impl Readers {
    /// One more.
    pub fn add(&mut self, entry: &Entry) {
        let needed = match entry.content {
            Content::Directory => READ_AND_ENTER,
            Content::File { .. } => READ,
            // Links have no permissions of their own, and a further name has those of the first.
            Content::Symlink { .. } | Content::HardLink { .. } => return,
        };
        let has = |shift: u32| entry.mode >> shift & needed == needed;
        // Whoever is in the group or owns it is not one of the others, and may be kept out by his own digit.
        let others = has(0) && has(3);
        match &mut self.0 {
            None => {
                let (group, user) = (has(3).then(|| entry.group.clone()), has(6).then(|| entry.owner.clone()));
                self.0 = Some(Audience { others, group, user });
            }
            Some(audience) => {
                audience.others &= others;
                audience.group.take_if(|group| *group != entry.group || !has(3));
                audience.user.take_if(|user| *user != entry.owner || !has(6));
            }
        }
    }

    /// Who may read all of them; nobody where there were none.
    pub fn audience(self) -> Audience {
        self.0.unwrap_or_default()
    }
}

impl Audience {
    /// Of all files and directories of `tree`. Of an empty tree nobody.
    pub fn of(tree: &Tree) -> Audience {
        let mut readers = Readers::default();
        tree.entries().iter().for_each(|entry| readers.add(entry));
        readers.audience()
    }

    /// Those of them who may list a directory as well, that of the tree itself: its mode, and the names of its owner and group.
    pub fn within(mut self, mode: u32, owner: &str, group: &str) -> Audience {
        let has = |shift: u32| mode >> shift & READ_AND_ENTER == READ_AND_ENTER;
        let everybody = has(0) && has(3);
        self.others &= everybody;
        self.group = self.group.filter(|of| everybody || **of == *group && has(3));
        self.user = self.user.filter(|of| everybody || **of == *owner && has(6));
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::manifest::{Digest, Entry, Timestamp};
    use crate::path::RelPath;

    fn tree(entries: &[(&str, u32, &str, &str)]) -> Tree {
        let entry = |&(path, mode, owner, group): &(&str, u32, &str, &str)| Entry {
            path: RelPath::new(path.trim_end_matches('/')).unwrap(),
            content: match path.ends_with('/') {
                true => Content::Directory,
                false => Content::File { size: 1, digest: Some(Digest([1; 32])) },
            },
            mtime: Timestamp::default(),
            mode,
            owner: owner.into(),
            group: group.into(),
        };
        Tree::new(entries.iter().map(entry).collect()).unwrap()
    }

    #[test]
    fn who_may_not_list_the_directory_itself_may_not_read_its_manifest() {
        let all = || Audience { others: true, group: Some("ml".into()), user: Some("ana".into()) };
        let none = Audience::default();
        assert_eq!(all().within(0o755, "root", "root"), all());
        assert_eq!(all().within(0o711, "root", "root"), none);
        assert_eq!(all().within(0o750, "root", "ml"), Audience { group: Some("ml".into()), ..Audience::default() });
        assert_eq!(all().within(0o700, "ana", "ml"), Audience { user: Some("ana".into()), ..Audience::default() });
        // One who is in the group is kept out.
        assert_eq!(all().within(0o705, "root", "root"), none);
    }

    #[test]
    fn who_may_read_everything_may_read_the_manifest_and_nobody_else() {
        type Case = (
            &'static [(&'static str, u32, &'static str, &'static str)],
            bool,
            Option<&'static str>,
            Option<&'static str>,
        );
        let cases: [Case; 9] = [
            // A group that is kept out is kept out, although others are not.
            (&[("f", 0o604, "ana", "ml")], false, None, Some("ana")),
            (&[], false, None, None),
            (
                &[("f", 0o644, "ana", "ml"), ("d/", 0o755, "ana", "ml"), ("d/g", 0o444, "ana", "ml")],
                true,
                Some("ml"),
                Some("ana"),
            ),
            (&[("f", 0o644, "ana", "ml"), ("weights", 0o600, "ana", "ml")], false, None, Some("ana")),
            (&[("f", 0o640, "ana", "ml"), ("g", 0o640, "bo", "ml")], false, Some("ml"), None),
            (&[("f", 0o640, "ana", "ml"), ("g", 0o640, "ana", "ops")], false, None, Some("ana")),
            (&[("f", 0o644, "ana", "ml"), ("g", 0o644, "bo", "ops")], true, None, None),
            // To list a directory without being let in is not to read it.
            (&[("d/", 0o744, "ana", "ml"), ("d/f", 0o644, "ana", "ml")], false, None, Some("ana")),
            (&[("f", 0o600, "ana", "ml"), ("g", 0o600, "bo", "ml")], false, None, None),
        ];
        for (entries, others, group, user) in cases {
            let audience = Audience::of(&tree(entries));
            assert_eq!(
                (audience.others, audience.group.as_deref(), audience.user.as_deref()),
                (others, group, user),
                "{entries:?}"
            );
        }
    }
}
