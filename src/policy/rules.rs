//! Rules that decide: the last that matches wins, for each path.

use std::fmt;

use ignore::gitignore::{Gitignore, GitignoreBuilder};

use super::acl::{Acl, InvalidAcl};
use super::mode::{InvalidMode, Mode, SPECIAL_BITS};
use super::{PolicySpec, RuleSpec, merge};
use crate::error::Escaped;
use crate::filter::{GLOBS_BYTES_MAX, check_glob};
use crate::path::RelPath;

/// A policy that cannot be used. Rules count from 1.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum PolicyError {
    #[error("rule {rule} ('{pattern}'): the pattern is not a glob as in gitignore(5): {reason}")]
    Pattern { rule: usize, pattern: String, reason: String },
    #[error("rule {rule} ('{pattern}')")]
    Mode { rule: usize, pattern: String, source: InvalidMode },
    #[error("rule {rule} ('{pattern}'): execute is '{value}', but can only be 'after-verify' or 'never'")]
    Execute { rule: usize, pattern: String, value: String },
    #[error("rule {rule} ('{pattern}'): {field} is empty; leave the line out to keep the receiver's")]
    EmptyName { rule: usize, pattern: String, field: &'static str },
    #[error("rule {rule} ('{pattern}')")]
    Acl { rule: usize, pattern: String, source: InvalidAcl },
    #[error(
        "rule {rule} ('{pattern}'): mode {mode} would cut down the ACL entry {entry}, because its group digit is the \
         list's mask; widen the digit, and write 'group::---' where the owning group is to have less"
    )]
    Masked { rule: usize, pattern: String, mode: String, entry: String },
    #[error(
        "there are {rule} rules, and both sides together may have 1000, with globs of 512 KiB in all; join some by {{a,b}}"
    )]
    TooMany { rule: usize },
}

impl PolicyError {
    /// The rule that is wrong, counted from 1.
    pub fn rule(&self) -> usize {
        match self {
            PolicyError::Pattern { rule, .. }
            | PolicyError::Mode { rule, .. }
            | PolicyError::Execute { rule, .. }
            | PolicyError::EmptyName { rule, .. }
            | PolicyError::Acl { rule, .. }
            | PolicyError::Masked { rule, .. }
            | PolicyError::TooMany { rule } => *rule,
        }
    }
}

#[derive(Debug, Clone)]
struct Rule {
    text: String,
    pattern: Gitignore,
    directories: bool,
    mode: Option<Mode>,
    owner: Option<String>,
    group: Option<String>,
    acl: Option<Acl>,
    never_execute: bool,
}

/// A compiled policy.
#[derive(Debug, Clone, Default)]
pub struct Policy {
    rules: Vec<Rule>,
    /// So many rules, the first, are those of a peer: they may not grant everything.
    foreign: usize,
    /// The receiver has rules of its own: a peer's may only say the nine permission bits.
    sovereign: bool,
    /// A peer's may not say owners and groups.
    keeps_owners: bool,
}

/// Whose the sender's rules are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sender {
    /// Whoever runs this.
    Oneself,
    /// Somebody who has the account at this machine, and may do what it may.
    Peer,
    /// Somebody who may do things in one directory only.
    Confined,
}

/// What a path gets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Decision {
    /// The exact mode, 0 to 0o7777.
    pub mode: u32,
    /// Name or number; `None` for whoever the receiver runs as.
    pub owner: Option<String>,
    /// Name or number, likewise.
    pub group: Option<String>,
    /// What else is granted; `None` and an empty list both remove what a path inherited.
    pub acl: Option<Acl>,
    /// Which rule decided, counted from 0; `None` for the default.
    pub rule: Option<usize>,
    /// What the sender asked for and does not get, for the audit log.
    pub withheld: Vec<String>,
}

impl Decision {
    /// Whether a file may be executed by anybody: then what lies on the disk is hashed before it gets its mode.
    pub fn executable(&self) -> bool {
        self.mode & 0o111 != 0
    }
}

/// Each is compiled by itself, and a sender's are compiled here too.
const RULES_MAX: usize = 1000;
/// Of a wish so many bytes are told.
const WISH_MAX: usize = 200;

/// What a sender wished for, for logs: it may be as long as a message, and is told once for each path.
fn wished(text: &str) -> String {
    Escaped(&text.as_bytes()[..text.len().min(WISH_MAX)]).to_string()
}

impl Policy {
    /// Checks and compiles rules.
    ///
    /// # Errors
    /// [`PolicyError`] with the rule that is wrong.
    pub fn compile(spec: &PolicySpec) -> Result<Policy, PolicyError> {
        let bytes = spec.rules.iter().fold(0, |sum: usize, rule| sum.saturating_add(rule.pattern.len()));
        if spec.rules.len() > RULES_MAX || bytes > GLOBS_BYTES_MAX {
            return Err(PolicyError::TooMany { rule: spec.rules.len() });
        }
        let rules = spec.rules.iter().enumerate().map(|(at, rule)| compile(at + 1, rule)).collect::<Result<_, _>>()?;
        Ok(Policy { rules, ..Policy::default() })
    }

    /// The rules of both sides. The receiver's come after the sender's, and so win.
    ///
    /// Where the sender is somebody else its rules grant less: no set-ID or sticky bits for files; and where
    /// the receiver has rules of its own, no such bits at all, and no owner, group or ACL. A peer that is confined to a
    /// directory gives nothing away to others there: no owner and no group, whatever the rights of the server.
    ///
    /// # Errors
    /// [`PolicyError`] with the rule that is wrong, the sender's counted first.
    pub fn of_both(receiver: &PolicySpec, sender: &PolicySpec, sent_by: Sender) -> Result<Policy, PolicyError> {
        let policy = Policy::compile(&merge(receiver, sender))?;
        let foreign = if sent_by == Sender::Oneself { 0 } else { sender.rules.len() };
        let sovereign = !receiver.rules.is_empty();
        Ok(Policy { foreign, sovereign, keeps_owners: sovereign || sent_by == Sender::Confined, ..policy })
    }

    /// Whether a rule has ACL entries, which not every file system keeps.
    pub fn grants_by_acl(&self) -> bool {
        self.rules.iter().any(|rule| rule.acl.as_ref().is_some_and(|acl| !acl.is_empty()))
    }

    /// Whether it has no rule.
    pub fn is_empty(&self) -> bool {
        self.rules.is_empty()
    }

    /// What `path` gets, when its sender has it with `asked_mode`.
    ///
    /// Where no rule matches: the sender's mode without special bits. A symbolic mode starts from that too. Special bits
    /// are given only by a rule that names them.
    pub fn decide(&self, path: &RelPath, directory: bool, asked_mode: u32) -> Decision {
        let asked = asked_mode & 0o777;
        let found = self.rules.iter().enumerate().rev().find(|(_, rule)| rule.matches(path, directory));
        let mut decision = match found {
            None => Decision { mode: asked, owner: None, group: None, acl: None, rule: None, withheld: Vec::new() },
            Some((at, rule)) => {
                let (owner, group, acl) = (rule.owner.clone(), rule.group.clone(), rule.acl.clone());
                Decision {
                    mode: rule.mode_for(asked, directory),
                    owner,
                    group,
                    acl,
                    rule: Some(at),
                    withheld: Vec::new(),
                }
            }
        };
        if decision.rule.is_some_and(|at| at < self.foreign) {
            self.limit(&mut decision, directory);
        }
        let dropped = asked_mode & SPECIAL_BITS & !decision.mode;
        if dropped != 0 {
            decision.withheld.push(format!("the special bits of its mode {:04o} at the sender", asked_mode & 0o7777));
        }
        decision
    }

    /// Takes back what a peer's rule may not grant.
    fn limit(&self, decision: &mut Decision, directory: bool) {
        let special = decision.mode & SPECIAL_BITS;
        if special != 0 && (self.sovereign || !directory) {
            decision.withheld.push(format!("the special bits of mode {:04o}", decision.mode));
            decision.mode &= !SPECIAL_BITS;
        }
        if self.keeps_owners {
            for (field, name) in [("owner", decision.owner.take()), ("group", decision.group.take())] {
                decision.withheld.extend(name.map(|name| format!("{field} {}", wished(&name))));
            }
        }
        if self.sovereign
            && let Some(acl) = decision.acl.take().filter(|acl| !acl.is_empty())
        {
            decision.withheld.push(format!("ACL {}", wished(&acl.to_string())));
        }
    }

    /// The same as [`decide`](Self::decide), with the rules that led there.
    pub fn explain(&self, path: &RelPath, directory: bool, asked_mode: u32) -> Explanation {
        let matching = self.rules.iter().enumerate().filter(|(_, rule)| rule.matches(path, directory));
        let mut matching: Vec<_> = matching.map(|(at, rule)| (at, rule.text.clone())).collect();
        let deciding = matching.pop();
        Explanation { decision: self.decide(path, directory, asked_mode), deciding, overridden: matching }
    }
}

/// Why a path gets what it gets. Rules count from 0 here and from 1 where it is shown.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Explanation {
    /// What it gets.
    pub decision: Decision,
    /// The rule that decided, with its pattern; `None` for the default.
    pub deciding: Option<(usize, String)>,
    /// Earlier rules that match too.
    pub overridden: Vec<(usize, String)>,
}

impl fmt::Display for Explanation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Decision { mode, owner, group, acl, .. } = &self.decision;
        write!(f, "mode {mode:04o}")?;
        for (field, name) in [("owner", owner), ("group", group)] {
            if let Some(name) = name {
                write!(f, ", {field} {}", Escaped(name.as_bytes()))?;
            }
        }
        if let Some(acl) = acl.as_ref().filter(|acl| !acl.is_empty()) {
            write!(f, ", acl {}", Escaped(acl.to_string().as_bytes()))?;
        }
        match &self.deciding {
            Some((at, pattern)) => write!(f, "; by rule {} ('{}')", at + 1, Escaped(pattern.as_bytes()))?,
            None => f.write_str("; no rule matches: the sender's mode without special bits")?,
        }
        for (at, pattern) in &self.overridden {
            write!(f, "; rule {} ('{}') matches too, but comes earlier", at + 1, Escaped(pattern.as_bytes()))?;
        }
        Ok(())
    }
}

impl Rule {
    /// The mode of a path that its sender has with `asked`, which holds no special bits.
    fn mode_for(&self, asked: u32, directory: bool) -> u32 {
        let mode = match &self.mode {
            None => asked,
            Some(mode) if mode.names_special_bits() => mode.apply(asked, directory, 0),
            Some(mode) => mode.apply(asked, directory, 0) & !SPECIAL_BITS,
        };
        if self.never_execute && !directory { mode & !0o111 } else { mode }
    }

    /// Files and directories apart: a mode that is right for one is wrong for the other. A pattern with a trailing slash
    /// is for the directory alone; what it holds has rules of its own.
    fn matches(&self, path: &RelPath, directory: bool) -> bool {
        self.directories == directory && self.pattern.matched(path.as_path(), directory).is_ignore()
    }
}

fn compile(number: usize, spec: &RuleSpec) -> Result<Rule, PolicyError> {
    let pattern = || spec.pattern.clone();
    let glob =
        glob(&spec.pattern).map_err(|reason| PolicyError::Pattern { rule: number, pattern: pattern(), reason })?;
    let mode = spec.mode.as_deref().map(str::parse).transpose().map_err(|source| PolicyError::Mode {
        rule: number,
        pattern: pattern(),
        source,
    })?;
    let never_execute = match spec.execute.as_deref() {
        None | Some("after-verify") => false,
        Some("never") => true,
        Some(value) => return Err(PolicyError::Execute { rule: number, pattern: pattern(), value: value.into() }),
    };
    for (field, name) in [("owner", &spec.owner), ("group", &spec.group)] {
        if name.as_deref() == Some("") {
            return Err(PolicyError::EmptyName { rule: number, pattern: pattern(), field });
        }
    }
    let acl = spec.acl.as_deref().map(Acl::parse).transpose().map_err(|source| PolicyError::Acl {
        rule: number,
        pattern: pattern(),
        source,
    })?;
    // A symbolic mode depends on the path; an octal one cuts the same for all, and nobody means that.
    let octal = spec.mode.as_deref().filter(|mode| mode.bytes().all(|byte| byte.is_ascii_digit()));
    if let (Some(acl), Some(text), Some(compiled)) = (&acl, octal, &mode) {
        let compiled: &Mode = compiled;
        if let Some(entry) = acl.cut_by(compiled.apply(0, false, 0), spec.pattern.ends_with('/')) {
            return Err(PolicyError::Masked { rule: number, pattern: pattern(), mode: text.into(), entry });
        }
    }
    let (owner, group) = (spec.owner.clone(), spec.group.clone());
    let directories = spec.pattern.ends_with('/');
    Ok(Rule { text: pattern(), pattern: glob, directories, mode, owner, group, acl, never_execute })
}

fn glob(pattern: &str) -> Result<Gitignore, String> {
    if pattern.is_empty() || pattern.starts_with(['!', '#']) {
        return Err("it is empty, or starts with '!' or '#'".into());
    }
    check_glob(pattern)?;
    let mut builder = GitignoreBuilder::new("");
    builder.add_line(None, pattern).map_err(|error| error.to_string())?;
    builder.build().map_err(|error| error.to_string())
}

/// Rules for rsync's `--chmod`: comma-separated modes, each for all paths, or after `D` for directories, `F` for files.
///
/// # Errors
/// [`InvalidMode`] with the part that is wrong.
pub fn chmod_rules(text: &str) -> Result<Vec<RuleSpec>, InvalidMode> {
    let mut files: Vec<&str> = Vec::new();
    let mut directories: Vec<&str> = Vec::new();
    for part in text.split(',') {
        let (part, for_files, for_directories) = match part.split_at_checked(1) {
            Some(("D", rest)) => (rest, false, true),
            Some(("F", rest)) => (rest, true, false),
            _ => (part, true, true),
        };
        part.parse::<Mode>()?;
        // An octal mode cannot stand in a list of clauses: it replaces what came before, and what follows it adds.
        let octal = part.bytes().all(|byte| byte.is_ascii_digit());
        for (list, wanted) in [(&mut files, for_files), (&mut directories, for_directories)] {
            if wanted {
                if octal {
                    list.clear();
                }
                list.push(part);
            }
        }
    }
    let joined = |list: &[&str]| -> Option<String> {
        let mut clauses = list.iter().map(|part| match part.bytes().all(|byte| byte.is_ascii_digit()) {
            true if list.len() > 1 => format!("={part}"),
            _ => (*part).to_owned(),
        });
        let first = clauses.next()?;
        Some(clauses.fold(first, |text, part| text + "," + &part))
    };
    let rule = |pattern: &str, mode| RuleSpec { pattern: pattern.into(), mode: Some(mode), ..RuleSpec::default() };
    let files = joined(&files).map(|mode| rule("**", mode));
    let directories = joined(&directories).map(|mode| rule("**/", mode));
    Ok(files.into_iter().chain(directories).collect())
}

/// Rules for rsync's `--chown`: `USER:GROUP`, `USER` or `:GROUP`, for files and for directories.
pub fn chown_rules(text: &str) -> [RuleSpec; 2] {
    let (user, group) = text.split_once(':').unwrap_or((text, ""));
    let name = |name: &str| (!name.is_empty()).then(|| name.to_owned());
    ["**", "**/"].map(|pattern| RuleSpec {
        pattern: pattern.into(),
        owner: name(user),
        group: name(group),
        ..RuleSpec::default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rule(pattern: &str, mode: &str) -> RuleSpec {
        RuleSpec { pattern: pattern.into(), mode: Some(mode.into()), ..RuleSpec::default() }
    }

    fn decide(rules: &[RuleSpec], path: &str, asked: u32) -> Decision {
        let policy = Policy::compile(&PolicySpec { rules: rules.to_vec() }).unwrap();
        let directory = path.ends_with('/');
        policy.decide(&RelPath::new(path.trim_end_matches('/')).unwrap(), directory, asked)
    }

    #[test]
    fn more_rules_than_a_sender_can_need_are_refused_before_they_are_compiled() {
        let rule = |pattern: String| RuleSpec { pattern, mode: Some("600".into()), ..RuleSpec::default() };
        let many = |count: usize, length: usize| PolicySpec { rules: vec![rule("x".repeat(length)); count] };
        for (spec, good) in [(many(1000, 1), true), (many(1001, 1), false), (many(100, 8000), false)] {
            assert_eq!(Policy::of_both(&PolicySpec::default(), &spec, Sender::Peer).is_ok(), good);
        }
        assert!(Policy::of_both(&many(600, 1), &many(600, 1), Sender::Peer).is_err());
        let nested = rule("{a,".repeat(50_000) + "b" + &"}".repeat(50_000));
        assert!(Policy::compile(&PolicySpec { rules: vec![nested] }).is_err());
    }

    #[test]
    fn s05_to_s09_modes_by_glob_files_and_directories_apart_and_the_last_wins() {
        let rules = [
            rule("**/*.safetensors", "600"),
            rule("labels.txt", "600"),
            rule("train.py", "750"),
            rule("dataset/", "770"),
            rule("logs/", "1774"),
            rule("/inference/*.log", "640"),
            rule("shared/**", "775"),
            rule("*.sh", "+x"),
            rule("public.safetensors", "644"),
        ];
        for (path, asked, mode) in [
            ("a/model.safetensors", 0o644, 0o600),
            ("deep/labels.txt", 0o666, 0o600),
            ("train.py", 0o600, 0o750),
            ("dataset/", 0o755, 0o770),
            ("dataset/file", 0o644, 0o644),
            ("dataset", 0o644, 0o644),
            ("shared/a/", 0o755, 0o755),
            ("x.sh/", 0o644, 0o644),
            ("run/logs/", 0o755, 0o1774),
            ("inference/x.log", 0o600, 0o640),
            ("inference/deep/x.log", 0o600, 0o600),
            ("shared/a/b", 0o600, 0o775),
            ("distributed_train.sh", 0o644, 0o755),
            ("public.safetensors", 0o600, 0o644),
        ] {
            assert_eq!(format!("{:04o}", decide(&rules, path, asked).mode), format!("{mode:04o}"), "{path}");
        }
    }

    #[test]
    fn h45_special_bits_come_only_from_a_rule_that_names_them() {
        let dropped = decide(&[], "tool", 0o4755);
        assert_eq!((dropped.mode, dropped.withheld.len()), (0o755, 1));
        assert_eq!(decide(&[rule("tool", "a+r")], "tool", 0o4711).mode, 0o755);
        assert_eq!(decide(&[rule("tool", "4755")], "tool", 0o644).mode, 0o4755);
        assert_eq!(decide(&[rule("tool", "u+s")], "tool", 0o755).mode, 0o4755);
        assert_eq!(decide(&[rule("t/", "+t")], "t/", 0o755).mode, 0o1755);
    }

    #[test]
    fn h45_h46_a_peers_rules_grant_less_than_the_receivers() {
        let generous = |pattern: &str, mode: &str| RuleSpec {
            owner: Some("root".into()),
            acl: Some(vec!["user:guest:r".into()]),
            ..rule(pattern, mode)
        };
        let sender = PolicySpec { rules: vec![generous("**", "6755"), generous("**/", "3775")] };
        let both =
            |rules: &[RuleSpec], by| Policy::of_both(&PolicySpec { rules: rules.to_vec() }, &sender, by).unwrap();
        let decide =
            |policy: &Policy, path: &str, directory| policy.decide(&RelPath::new(path).unwrap(), directory, 0o644);

        let own = decide(&both(&[], Sender::Oneself), "x", false);
        assert_eq!((own.mode, own.owner.as_deref(), own.withheld.len()), (0o6755, Some("root"), 0));

        let open = both(&[], Sender::Peer);
        let file = decide(&open, "x", false);
        assert_eq!((file.mode, file.owner.as_deref()), (0o755, Some("root")));
        assert_eq!(file.withheld, ["the special bits of mode 6755"]);
        assert_eq!(decide(&open, "d", true).mode, 0o3775);

        let confined = decide(&both(&[], Sender::Confined), "x", false);
        assert_eq!((confined.mode, confined.owner, confined.acl.is_some()), (0o755, None, true));
        assert_eq!(confined.withheld, ["the special bits of mode 6755", "owner root"]);

        let closed = both(&[rule("tool", "4711")], Sender::Peer);
        assert_eq!(decide(&closed, "tool", false).mode, 0o4711);
        let file = decide(&closed, "x", false);
        assert_eq!((file.mode, file.owner, file.acl), (0o755, None, None));
        assert_eq!(file.withheld, ["the special bits of mode 6755", "owner root", "ACL user:guest:r--"]);
        assert_eq!(decide(&closed, "d", true).mode, 0o775);
    }

    #[test]
    fn s03_s04_owner_group_or_both() {
        let decision = decide(&chown_rules("alice:ai_team"), "model.log", 0o644);
        assert_eq!((decision.owner.as_deref(), decision.group.as_deref()), (Some("alice"), Some("ai_team")));
        let decision = decide(&chown_rules(":researchers"), "data/", 0o755);
        assert_eq!((decision.owner, decision.group.as_deref()), (None, Some("researchers")));
        assert_eq!(decide(&chown_rules("bob"), "x", 0o644).group, None);
    }

    #[test]
    fn chmod_takes_what_rsync_takes() {
        for (text, file, directory) in [
            ("600", 0o600, 0o600),
            ("D755,F644", 0o644, 0o755),
            ("Dg+s,ug+w,Fo-w,+X", 0o664, 0o2775),
            ("go-rwx", 0o600, 0o700),
            ("F600", 0o600, 0o755),
            ("D700", 0o644, 0o700),
        ] {
            let rules = chmod_rules(text).unwrap();
            assert_eq!(format!("{:04o}", decide(&rules, "f", 0o644).mode), format!("{file:04o}"), "{text} file");
            assert_eq!(format!("{:04o}", decide(&rules, "d/", 0o755).mode), format!("{directory:04o}"), "{text} dir");
        }
        assert!(chmod_rules("u+q").is_err() && chmod_rules("").is_err());
    }

    #[test]
    fn a_rule_that_is_wrong_is_named() {
        let compiled = |rule: RuleSpec| {
            Policy::compile(&PolicySpec { rules: vec![RuleSpec { pattern: "ok".into(), ..RuleSpec::default() }, rule] })
        };
        for wrong in [
            rule("a", "999"),
            rule("", "600"),
            rule("!a", "600"),
            RuleSpec { execute: Some("always".into()), ..rule("a", "600") },
            RuleSpec { owner: Some(String::new()), ..rule("a", "600") },
            RuleSpec { acl: Some(vec!["user:a".into()]), ..rule("a", "600") },
            RuleSpec { acl: Some(vec!["user:a:r".into()]), ..rule("a", "600") },
        ] {
            let error = compiled(wrong).unwrap_err();
            assert!(error.to_string().contains("rule 2") && error.rule() == 2);
        }
    }

    #[test]
    fn s12_a_rule_grants_by_acl_and_says_why() {
        let acl = vec!["group:ops:rwx".into(), "default:group:ops:rwx".into()];
        let rules =
            [rule("**/", "700"), RuleSpec { acl: Some(acl), group: Some("ops".into()), ..rule("logs/", "1774") }];
        let policy = Policy::compile(&PolicySpec { rules: rules.to_vec() }).unwrap();
        let without = Policy::compile(&PolicySpec { rules: rules[..1].to_vec() }).unwrap();
        assert!(policy.grants_by_acl() && !without.grants_by_acl());
        let explained = policy.explain(&RelPath::new("run/logs").unwrap(), true, 0o755);
        assert_eq!(explained.decision, decide(&rules, "run/logs/", 0o755));
        assert_eq!(
            explained.to_string(),
            "mode 1774, group ops, acl group:ops:rwx,default:group:ops:rwx; by rule 2 ('logs/'); \
             rule 1 ('**/') matches too, but comes earlier"
        );
        let default = Policy::default().explain(&RelPath::new("x").unwrap(), false, 0o4755);
        assert_eq!(default.to_string(), "mode 0755; no rule matches: the sender's mode without special bits");
    }
}
