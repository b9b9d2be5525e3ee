//! What a run that publishes has written down: the steps, for whom, and what the audit log is to be told.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use super::append::Former;
use super::moved::Renamed;
use super::put::Put;
use crate::audit::{Before, Login};
use crate::manifest::{Name, Tree};
use crate::path::RelPath;
use crate::plan::publish::Step;

/// What is to be published, for whom.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Record {
    /// Who pushed: `user@host`, for the audit log.
    pub(super) actor: String,
    /// Where the content came from.
    pub(super) source: String,
    /// By what whoever pushed is here.
    pub(super) login: Option<Box<Login>>,
    /// In their order.
    pub(super) steps: Vec<Step>,
    /// What a sender asked for and does not get, for the audit log.
    pub(super) withheld: BTreeMap<RelPath, String>,
    /// The ACLs that rules give, for the audit log.
    pub(super) acls: BTreeMap<RelPath, String>,
    /// Mode, owner and group that paths have until then, separated by tabs.
    pub(super) before: BTreeMap<RelPath, Arc<str>>,
    /// The inodes of directories that are exchanged whole, to know afterwards which of the two is the new one.
    pub(super) inodes: BTreeMap<RelPath, u64>,
    /// What goes of directories that are exchanged whole; what else is missing there came in meanwhile. `None` where that is not known.
    pub(super) goes: Option<BTreeSet<RelPath>>,
    /// What files were of which what is new is put at their end.
    pub(super) grown: BTreeMap<RelPath, Former>,
    /// Files that get another name, by their new one.
    pub(super) renamed: BTreeMap<RelPath, Renamed>,
    /// What is removed or replaced is moved to the directory of this name in the trash.
    pub(super) trash: Option<RelPath>,
    /// What is there is not replaced, and directories that are there stay as they are.
    pub(super) only_new: bool,
    /// It was read back: what it says may be done in part.
    pub(super) again: bool,
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn unhex(text: &str) -> Option<Vec<u8>> {
    (0..text.len().div_ceil(2)).map(|at| u8::from_str_radix(text.get(2 * at..2 * at + 2)?, 16).ok()).collect()
}

/// What the paths of `put`, and those of `steps`, have at the target now. Few texts occur, and are there once.
pub(super) fn before(target: &Tree, put: &Put<'_>, steps: &[Step]) -> BTreeMap<RelPath, Arc<str>> {
    let mut texts: HashMap<(u32, Name, Name), Arc<str>> = HashMap::new();
    let paths = put.paths().chain(steps.iter().map(Step::path));
    let there = paths.filter_map(|path| target.get(path));
    let with_text = there.map(|entry| {
        let key = (entry.mode, entry.owner.clone(), entry.group.clone());
        let text = texts.entry(key).or_insert_with(|| {
            let Before { mode, owner, group } = Before::of(entry);
            format!("{mode}\t{owner}\t{group}").into()
        });
        (entry.path.clone(), Arc::clone(text))
    });
    with_text.collect()
}

impl Record {
    /// One step a line: a letter and the path's bytes in hexadecimal; before them who it is done for, after them what else
    /// the audit log is to be told of a path.
    pub(super) fn encode(&self, gone: &BTreeSet<RelPath>) -> String {
        let mut text = format!("{}\n{}\n", hex(self.actor.as_bytes()), hex(self.source.as_bytes()));
        for step in &self.steps {
            let letter = match step {
                Step::Replace(_) => 'R',
                Step::NewDirectory(_) => 'N',
                Step::Exchange(_) => 'X',
                Step::ApplyMetadata(_) => 'A',
                Step::RemoveFile(_) => 'F',
                Step::RemoveDirectory(_) => 'D',
                Step::TakeAway(_) => 'U',
            };
            text.push(letter);
            text.push_str(&hex(step.path().as_bytes()));
            if let Some(inode) = self.inodes.get(step.path()) {
                text.push_str(&format!(" {inode:x}"));
            }
            text.push('\n');
        }
        if let Some(name) = &self.trash {
            text.push_str(&format!("T{}\n", hex(name.as_bytes())));
        }
        if let Some(login) = self.login.as_ref().and_then(|login| serde_json::to_string(login).ok()) {
            text.push_str(&format!("I{}\n", hex(login.as_bytes())));
        }
        for (path, before) in &self.before {
            text.push_str(&format!("B{} {}\n", hex(path.as_bytes()), hex(before.as_bytes())));
        }
        for (path, former) in &self.grown {
            text.push_str(&format!("P{} {}\n", hex(path.as_bytes()), former.encode()));
        }
        for (path, Renamed { from, former }) in &self.renamed {
            text.push_str(&format!("M{} {} {}\n", hex(path.as_bytes()), hex(from.as_bytes()), former.encode()));
        }
        if self.only_new {
            text.push_str("O\n");
        }
        if let Some(goes) = &self.goes {
            text.push_str("K\n");
            goes.iter().for_each(|path| text.push_str(&format!("V{}\n", hex(path.as_bytes()))));
        }
        for (letter, notes) in [('W', &self.withheld), ('L', &self.acls)] {
            for (path, note) in notes {
                text.push_str(&format!("{letter}{} {}\n", hex(path.as_bytes()), hex(note.as_bytes())));
            }
        }
        for path in gone {
            text.push_str(&format!("G{}\n", hex(path.as_bytes())));
        }
        text
    }

    /// The record, and what the manifest lists no more.
    pub(super) fn parse(text: &str) -> Option<(Record, BTreeSet<RelPath>)> {
        let mut lines = text.strip_suffix('\n')?.split('\n');
        let mut name = || String::from_utf8(unhex(lines.next()?)?).ok();
        let mut record = Record { actor: name()?, source: name()?, again: true, ..Record::default() };
        let mut gone = BTreeSet::new();
        for line in lines {
            let (letter, rest) = line.split_at_checked(1)?;
            if letter == "I" {
                record.login = Some(serde_json::from_slice(&unhex(rest)?).ok()?);
                continue;
            }
            if line == "O" {
                record.only_new = true;
                continue;
            }
            if line == "K" {
                record.goes.get_or_insert_default();
                continue;
            }
            let (path, more) = rest.split_once(' ').map_or((rest, None), |(path, more)| (path, Some(more)));
            let path = RelPath::new(unhex(path)?).ok()?;
            if matches!(letter, "W" | "L") {
                let notes = if letter == "W" { &mut record.withheld } else { &mut record.acls };
                notes.insert(path, String::from_utf8(unhex(more?)?).ok()?);
                continue;
            }
            if letter == "B" {
                record.before.insert(path, String::from_utf8(unhex(more?)?).ok()?.into());
                continue;
            }
            if letter == "P" {
                record.grown.insert(path, Former::parse(more?)?);
                continue;
            }
            if letter == "M" {
                let (from, former) = more?.split_once(' ')?;
                let (from, former) = (RelPath::new(unhex(from)?).ok()?, Former::parse(former)?);
                record.renamed.insert(path, Renamed { from, former });
                continue;
            }
            if letter == "G" {
                gone.insert(path);
                continue;
            }
            if letter == "V" {
                record.goes.get_or_insert_default().insert(path);
                continue;
            }
            if letter == "T" {
                record.trash = Some(path);
                continue;
            }
            if let Some(inode) = more {
                record.inodes.insert(path.clone(), u64::from_str_radix(inode, 16).ok()?);
            }
            record.steps.push(match letter {
                "R" => Step::Replace(path),
                "N" => Step::NewDirectory(path),
                "X" => Step::Exchange(path),
                "A" => Step::ApplyMetadata(path),
                "F" => Step::RemoveFile(path),
                "D" => Step::RemoveDirectory(path),
                "U" => Step::TakeAway(path),
                _ => return None,
            });
        }
        Some((record, gone))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::manifest::Timestamp;

    #[test]
    fn a_record_is_read_back_and_a_damaged_one_is_not() {
        let path = |path: &[u8]| RelPath::new(path).unwrap();
        let steps = vec![
            Step::RemoveFile(path(b"a\n \xff")),
            Step::Replace(path(b"b")),
            Step::NewDirectory(path(b"c/d")),
            Step::Exchange(path(b"e")),
            Step::ApplyMetadata(path(b"f")),
            Step::RemoveDirectory(path(b"g")),
            Step::TakeAway(path(b"h")),
        ];
        let inodes = BTreeMap::from([(path(b"e"), u64::MAX)]);
        let note = |text: &str| BTreeMap::from([(RelPath::new("b \n/c").unwrap(), text.to_owned())]);
        let (withheld, acls) = (note("the special bits of mode 4755"), note("user:ops:r--"));
        let trash = Some(path(b"20260131T065902Z-12"));
        let login = Login { key: Some("SHA256:x".into()), serial: Some(7), ..Login::default() };
        let before = BTreeMap::from([(path(b"b"), "0640\tana\tteam".into())]);
        let (actor, source, login) = ("ana@gpu01".into(), String::new(), Some(Box::new(login)));
        let only_new = true;
        let former = Former { inode: 7, length: 1 << 40, ctime: Timestamp { seconds: -1, nanoseconds: 5 } };
        let grown = BTreeMap::from([(path(b"b"), former)]);
        let renamed = BTreeMap::from([(path(b"c/d/e"), Renamed { from: path(b"a\n \xff"), former })]);
        let goes = Some(BTreeSet::from([path(b"e/f"), path(b"e/g\n")]));
        let again = true;
        let record = Record {
            actor,
            source,
            login,
            steps,
            withheld,
            acls,
            before,
            inodes,
            goes,
            grown,
            renamed,
            trash,
            only_new,
            again,
        };
        let gone = BTreeSet::from([path(b"h\xff"), path(b"i")]);
        assert_eq!(Record::parse(&record.encode(&gone)), Some((record, gone)));
        for damaged in [
            "",
            "\n",
            "61\n62",
            "61\n\nR2e2e\n",
            "61\n\nR6\n",
            "61\n\nZ61\n",
            "61\n\nX61 g\n",
            "61\n\nI6161\n",
            "61\n\nB61\n",
            "61\n\nP61 1 2\n",
            "61\n\nM61 62\n",
            "61\n\nM61 2e2e 1 2 3 4\n",
            "6\n\n",
        ] {
            assert_eq!(Record::parse(damaged), None, "{damaged:?}");
        }
    }
}
