//! A published tree against its policy: what has other permissions than the rules say, what somebody cannot read, and
//! the mending of it.
//!
//! Looking changes nothing. Links are neither followed nor judged; of a file with several names in the tree the first
//! decides, as when it is published.

use std::collections::HashMap;
use std::io::Read as _;
use std::path::Path;

use crate::access::{AclLists, Inode};
use crate::filter::{Filter, FilterError, FilterSpec};
use crate::manifest::format::{self, FormatError};
use crate::manifest::{Content, Entry, Manifest};
use crate::monitor::{Monitor, Problem, Severity};
use crate::path::{InvalidPath, RelPath};
use crate::policy::Policy;
use crate::policy::acl::{Principal, RowTag, rows};
use crate::policy::rights::{Subject, letters};
use crate::root::{Follow, Metadata, Root, RootError};
use crate::scan::names::{Names, UnknownName};
use crate::scan::{self, ScanError, ScanRule, Scanned};
use crate::staging::Ids;

mod mend;
mod reach;

pub use mend::{MendError, Mended, Mending, mend};
pub use reach::{Unreadable, subject};

const MANIFEST: &str = ".lockstep/manifest";

/// Why a tree could not be looked at.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum DriftError {
    #[error(transparent)]
    Scan(#[from] ScanError),
    #[error(transparent)]
    Root(#[from] RootError),
    #[error(transparent)]
    Filter(#[from] FilterError),
    #[error(transparent)]
    Path(#[from] InvalidPath),
    #[error("{path}")]
    Name { path: RelPath, source: UnknownName },
}

/// What is asked about a tree.
#[derive(Debug, Clone, Default)]
pub struct Question<'a> {
    /// The rules that hold there.
    pub policy: Option<&'a Policy>,
    /// Who is to be able to read it.
    pub subject: Option<&'a Subject>,
}

/// The answer.
#[derive(Debug, Default)]
pub struct Findings {
    /// Paths with other permissions than their rules say, in order.
    pub drift: Vec<Drift>,
    /// What the subject cannot read.
    pub unreadable: Vec<Unreadable>,
    /// Paths that could not be looked at.
    pub problems: Vec<Problem>,
    /// How many paths were looked at.
    pub entries: u64,
    /// What was published there.
    manifest: Option<Manifest>,
}

/// One thing that is not as it should be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Difference {
    /// `mode`, `owner`, `group`, `acl` or `default acl`.
    pub field: &'static str,
    /// How it is.
    pub found: String,
    /// How the rule wants it.
    pub wanted: String,
}

/// A path that has other permissions than its rule says.
#[derive(Debug, Clone)]
pub struct Drift {
    /// The path.
    pub path: RelPath,
    /// The rule, counted from 0; `None` where none matches.
    pub rule: Option<usize>,
    /// What differs.
    pub differences: Vec<Difference>,
    /// What it was when it was looked at.
    found: Metadata,
    /// How many names of the inode are in the tree.
    names: u32,
    /// It is a further name of a file that is to have other permissions.
    other: Option<RelPath>,
    wanted: Wanted,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Wanted {
    mode: u32,
    uid: Option<u32>,
    gid: Option<u32>,
    acl: Option<AclLists>,
}

/// Looks at the tree at `path` as a whole.
///
/// # Errors
/// When it cannot be listed, or a rule names a user or group that is not known here.
pub fn look(path: &Path, question: &Question<'_>, monitor: &dyn Monitor) -> Result<Findings, DriftError> {
    let root = Root::open(path)?;
    let rule = ScanRule::everything(Filter::compile(&FilterSpec::default())?);
    let scanned = scan::scan(&root, &rule, monitor)?;
    let mut findings = Findings { entries: scanned.tree.entries().len() as u64, ..Findings::default() };
    match published(&root)? {
        None => {}
        Some(Ok(manifest)) => findings.manifest = Some(manifest),
        Some(Err(error)) => {
            let message = format!("the manifest is damaged, {error}; push again to write it anew");
            findings.problems.push(Problem { path: None, message, severity: Severity::Failed });
        }
    }
    let mut look = Look {
        names: Names::default(),
        ids: Ids::default(),
        reach: question.subject.map(|subject| reach::Reach::new(subject, path, &root)),
        inodes: names_of_inodes(&scanned),
        decided: HashMap::new(),
        question,
        findings,
    };
    for (entry, found) in scanned.tree.entries().iter().zip(&scanned.metadata) {
        if !matches!(entry.content, Content::Symlink { .. }) {
            look.at(&root, entry, found)?;
        }
    }
    let mut findings = look.findings;
    findings.unreadable = look.reach.map(reach::Reach::finish).unwrap_or_default();
    findings.problems.extend(scanned.problems);
    Ok(findings)
}

/// The manifest of what was published, if there is one.
fn published(root: &Root) -> Result<Option<Result<Manifest, FormatError>>, DriftError> {
    let mut file = match root.open_read(&RelPath::new(MANIFEST)?, Follow::Never) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        other => other?,
    };
    let mut text = Vec::new();
    file.read_to_end(&mut text).map_err(|source| RootError {
        operation: "read",
        path: root.shown().join(MANIFEST),
        source,
    })?;
    Ok(Some(format::decode(&text)))
}

/// How many names each inode has that has several.
fn names_of_inodes(scanned: &Scanned) -> HashMap<(u64, u64), u32> {
    let mut names = HashMap::new();
    for found in scanned.metadata.iter().filter(|found| found.links > 1) {
        *names.entry((found.device, found.inode)).or_insert(0) += 1;
    }
    names
}

struct Look<'a> {
    names: Names,
    ids: Ids,
    reach: Option<reach::Reach<'a>>,
    inodes: HashMap<(u64, u64), u32>,
    /// Of files with several names, the first that was seen and what it is to have.
    decided: HashMap<(u64, u64), (RelPath, Wanted)>,
    question: &'a Question<'a>,
    findings: Findings,
}

impl Look<'_> {
    fn at(&mut self, root: &Root, entry: &Entry, found: &Metadata) -> Result<(), DriftError> {
        let lists = match Inode::open(root, Some(&entry.path)).and_then(|inode| {
            inode.acls().map_err(|source| RootError {
                operation: "read the ACL of",
                path: root.shown().join(entry.path.as_path()),
                source,
            })
        }) {
            Ok(lists) => lists,
            // RACE: removed since it was listed.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
            Err(error) => {
                let message = crate::error::chain(&error);
                let problem = Problem { path: Some(entry.path.clone()), message, severity: Severity::Failed };
                self.findings.problems.push(problem);
                return Ok(());
            }
        };
        if let Some(reach) = &mut self.reach {
            reach.at(entry, found, lists.access.as_deref(), &mut self.names);
        }
        if let Some(policy) = self.question.policy {
            let drift = self.compare(policy, entry, found, &lists);
            let drift = drift.map_err(|source| DriftError::Name { path: entry.path.clone(), source })?;
            self.findings.drift.extend(drift);
        }
        Ok(())
    }

    fn compare(
        &mut self,
        policy: &Policy,
        entry: &Entry,
        found: &Metadata,
        lists: &AclLists,
    ) -> Result<Option<Drift>, UnknownName> {
        let directory = entry.is_directory();
        let listed = self.findings.manifest.as_ref().and_then(|manifest| manifest.tree.get(&entry.path));
        let asked = listed.filter(|listed| listed.is_directory() == directory).map_or(found.mode, |listed| listed.mode);
        let decision = policy.decide(&entry.path, directory, asked);
        let resolve = |who: Principal, name: &str| match who {
            Principal::User => self.ids.user(name),
            Principal::Group => self.ids.group(name),
        };
        let mode = decision.mode;
        let acl = match (decision.rule, &decision.acl) {
            // A new mode would be the new mask of what the list grants, and nobody has said that this is meant.
            (None, _) => (mode != found.mode).then(AclLists::default),
            (Some(_), None) => Some(AclLists::default()),
            (Some(_), Some(acl)) => Some(AclLists {
                access: acl.access_xattr(mode, directory, resolve)?,
                default: if directory { acl.default_xattr(mode, resolve)? } else { None },
            }),
        };
        let uid = decision.owner.as_deref().map(|name| self.ids.user(name)).transpose()?;
        let gid = decision.group.as_deref().map(|name| self.ids.group(name)).transpose()?;
        let wanted = Wanted { mode, uid, gid, acl };
        let mut other = None;
        if found.links > 1 && !directory {
            let known = self.decided.entry((found.device, found.inode)).or_insert((entry.path.clone(), wanted.clone()));
            if known.0 != entry.path {
                // What both are to have is told, and mended, at the first name.
                if known.1 == wanted {
                    return Ok(None);
                }
                other = Some(known.0.clone());
            }
        }
        let differences = self.differences(&wanted, found, lists);
        if differences.is_empty() {
            return Ok(None);
        }
        let names = self.inodes.get(&(found.device, found.inode)).copied().unwrap_or(1);
        let (path, rule) = (entry.path.clone(), decision.rule);
        Ok(Some(Drift { path, rule, differences, found: *found, names, other, wanted }))
    }

    fn differences(&mut self, wanted: &Wanted, found: &Metadata, lists: &AclLists) -> Vec<Difference> {
        let mut differences = Vec::new();
        let mut differs = |field, found: String, wanted: String| differences.push(Difference { field, found, wanted });
        if let Some(uid) = wanted.uid.filter(|&uid| uid != found.uid) {
            differs("owner", self.names.user(found.uid).to_string(), self.names.user(uid).to_string());
        }
        if let Some(gid) = wanted.gid.filter(|&gid| gid != found.gid) {
            differs("group", self.names.group(found.gid).to_string(), self.names.group(gid).to_string());
        }
        if let Some(acl) = &wanted.acl {
            for (field, found, wanted) in [
                ("acl", granted(&lists.access, false), granted(&acl.access, false)),
                ("default acl", granted(&lists.default, true), granted(&acl.default, true)),
            ] {
                if found != wanted {
                    differs(field, acl_text(found, &mut self.names), acl_text(wanted, &mut self.names));
                }
            }
        }
        if wanted.mode != found.mode {
            differs("mode", format!("{:04o}", found.mode), format!("{:04o}", wanted.mode));
        }
        differences
    }
}

type Granted = Vec<(RowTag, u32, u32)>;

/// What a list says; without `all` what it says beyond the mode, which is compared by itself: the bits of the owner and
/// of others, and the mask.
fn granted(list: &Option<Vec<u8>>, all: bool) -> Option<Granted> {
    let in_mode = |tag| [RowTag::UserObject, RowTag::Other, RowTag::Mask].contains(&tag);
    let rows = list.as_deref().and_then(rows)?;
    let rows = rows.iter().filter(|row| all || !in_mode(row.tag));
    let mut granted: Granted = rows.map(|row| (row.tag, row.id, row.bits)).collect();
    granted.sort_unstable();
    Some(granted)
}

/// Entries as setfacl(1) takes them.
fn acl_text(list: Option<Granted>, names: &mut Names) -> String {
    let entry = |(tag, id, bits): (RowTag, u32, u32)| {
        let (kind, name) = match tag {
            RowTag::UserObject => ("user", None),
            RowTag::User => ("user", Some(names.user(id))),
            RowTag::GroupObject => ("group", None),
            RowTag::Group => ("group", Some(names.group(id))),
            RowTag::Mask => ("mask", None),
            RowTag::Other => ("other", None),
        };
        format!("{kind}:{}:{}", name.as_deref().unwrap_or_default(), letters(bits))
    };
    list.map_or_else(|| "none".into(), |list| list.into_iter().map(entry).collect::<Vec<_>>().join(","))
}
