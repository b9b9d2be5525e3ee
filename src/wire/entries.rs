//! A list of entries that a peer sends in pieces.
//!
//! What always holds: the entries ascend by path, none comes twice, and together they take no more memory than was agreed,
//! give or take one message.

use std::cmp::Ordering;

use super::extension::{Fields, WireError};
use crate::manifest::{Content, Entry, Name, Timestamp};
use crate::path::RelPath;

/// What an entry takes beside the bytes of its names: itself, and what the allocator adds to each of them.
const ENTRY_BYTES: usize = size_of::<Entry>() + 32;
/// What a name of an owner takes beside its bytes, where it is not that of the entry before.
const NAME_BYTES: usize = 64;
const NAME_MAX: usize = 256;

/// See the module.
#[derive(Debug)]
pub struct EntryList {
    entries: Vec<Entry>,
    bytes: usize,
    most: usize,
}

impl EntryList {
    /// An empty list that takes `most` bytes of memory.
    pub fn new(most: usize) -> EntryList {
        EntryList { entries: Vec::new(), bytes: 0, most }
    }

    /// What came so far.
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// What came so far, given up.
    pub fn into_entries(self) -> Vec<Entry> {
        self.entries
    }

    /// About how much memory they take.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Takes the entries of one message.
    ///
    /// # Errors
    /// [`WireError`]; the list is of no more use then.
    pub fn read(&mut self, raw: &[u8]) -> Result<(), WireError> {
        let mut fields = Fields(raw);
        while !fields.0.is_empty() {
            let before = fields.0.len();
            let entry = self.entry(&mut fields)?;
            match self.entries.last().map(|last| last.path.cmp(&entry.path)) {
                None | Some(Ordering::Less) => {}
                Some(Ordering::Equal) => return Err(WireError::Twice { path: entry.path.to_string() }),
                Some(Ordering::Greater) => return Err(WireError::Order { path: entry.path.to_string() }),
            }
            let last = self.entries.last();
            let names = [
                last.is_none_or(|last| !last.owner.is_same(&entry.owner)),
                last.is_none_or(|last| !last.group.is_same(&entry.group)),
            ];
            let names = names.iter().filter(|&&own| own).count() * NAME_BYTES;
            self.bytes += ENTRY_BYTES + names + (before - fields.0.len());
            if self.bytes > self.most {
                return Err(WireError::TooMany { most: self.most });
            }
            self.entries.push(entry);
        }
        Ok(())
    }

    fn entry(&self, fields: &mut Fields<'_>) -> Result<Entry, WireError> {
        let path = RelPath::new(fields.string()?)?;
        let content = match fields.u8()? {
            0 => Content::File { size: fields.u64()?, digest: None },
            1 => Content::File { size: fields.u64()?, digest: Some(fields.digest()?) },
            2 => Content::Directory,
            3 => Content::Symlink { target: fields.string()?.into() },
            4 => Content::HardLink { first: RelPath::new(fields.string()?)? },
            _ => return Err(WireError::Range("the kind of an entry")),
        };
        let mtime = Timestamp { seconds: fields.u64()? as i64, nanoseconds: fields.u32()? };
        let mode = fields.u32()?;
        let last = self.entries.last();
        let owner = name(last.map(|last| &last.owner), &fields.text()?)?;
        let group = name(last.map(|last| &last.group), &fields.text()?)?;
        Ok(Entry { path, content, mtime, mode, owner, group })
    }
}

/// Shares the name with the entry before where they are equal, as they mostly are.
fn name(last: Option<&Name>, text: &str) -> Result<Name, WireError> {
    match last {
        Some(last) if **last == *text => Ok(last.clone()),
        _ if text.len() > NAME_MAX => Err(WireError::Range("the length of a name")),
        _ => Ok(text.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::manifest::Digest;
    use crate::wire::extension::put_entry;

    fn entry(path: &str, content: Content) -> Entry {
        let mtime = Timestamp { seconds: -5, nanoseconds: 3 };
        Entry { path: RelPath::new(path).unwrap(), content, mtime, mode: 0o4755, owner: "a".into(), group: "b".into() }
    }

    fn raw(entries: &[Entry]) -> Vec<u8> {
        let mut raw = Vec::new();
        entries.iter().for_each(|entry| put_entry(&mut raw, entry));
        raw
    }

    #[test]
    fn entries_come_back_as_they_were_and_parts_of_them_do_not() {
        let contents = [
            Content::File { size: 7, digest: None },
            Content::File { size: u64::MAX, digest: Some(Digest([9; 32])) },
            Content::Directory,
            Content::Symlink { target: (*b"x/\xff").into() },
            Content::HardLink { first: RelPath::new("f0").unwrap() },
        ];
        let made: Vec<Entry> =
            contents.into_iter().enumerate().map(|(at, content)| entry(&format!("f{at}"), content)).collect();
        let raw = raw(&made);
        let mut list = EntryList::new(1 << 20);
        list.read(&raw).unwrap();
        assert_eq!(list.entries(), made);
        assert!(list.entries()[0].owner.is_same(&list.entries()[4].owner));
        for length in 1..raw.len() {
            let mut partial = EntryList::new(1 << 20);
            if partial.read(&raw[..length]).is_ok() {
                assert!(partial.entries().len() < made.len());
            }
        }
    }

    #[test]
    fn h07_what_does_not_ascend_is_refused_as_it_comes() {
        for (first, second) in [("b", "a"), ("a", "a"), ("a.b", "a/b")] {
            let [first, second] = [first, second].map(|path| raw(&[entry(path, Content::Directory)]));
            let mut list = EntryList::new(1 << 20);
            list.read(&first).unwrap();
            let refused = list.read(&second);
            assert!(matches!(refused, Err(WireError::Order { .. } | WireError::Twice { .. })), "{refused:?}");
        }
    }

    #[test]
    fn h23_a_list_that_never_ends_is_refused_before_it_fills_the_memory() {
        let most = 1 << 20;
        for target in [0, 4000] {
            let mut list = EntryList::new(most);
            let refused = (0..1_000_000).find_map(|number| {
                let content = Content::Symlink { target: vec![b'x'; target].into() };
                let entry = Entry { owner: number.to_string().into(), ..entry(&format!("{number:09}"), content) };
                list.read(&raw(&[entry])).err()
            });
            assert_eq!(refused, Some(WireError::TooMany { most }));
            assert!(list.entries().len() * (ENTRY_BYTES + target) <= most, "{}", list.entries().len());
        }
    }
}
