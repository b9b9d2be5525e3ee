//! Which paths of a tree take part in a run: gitignore globs, and lists of paths.

use std::collections::BTreeSet;

use ignore::gitignore::{Gitignore, GitignoreBuilder};
use serde::{Deserialize, Serialize};

use crate::error::said;
use crate::path::{InvalidPath, RelPath};

/// lockstep's own directory at the top of a root; it never takes part, nor does that of a root further down.
pub const STATE_DIRECTORY: &[u8] = b".lockstep";
/// A file of gitignore lines in a directory of the source; they hold for what lies below it.
pub const IGNORE_FILE: &[u8] = b".lockstepignore";

/// All globs of a filter together, or of one file of them.
pub(crate) const GLOBS_BYTES_MAX: usize = 512 << 10;
const GLOB_BYTES_MAX: usize = 8192;
const BRACES_MAX: usize = 64;

/// What a user wrote to leave paths out, in order. It travels to the other side, which compiles it there.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FilterSpec {
    /// gitignore lines: `--exclude GLOB` is the line itself, `--include GLOB` the line with `!` in front.
    pub rules: Vec<String>,
    /// `--files-from`: only these paths (bytes) and what lies below them; `None` for all.
    pub only: Option<Vec<Vec<u8>>>,
}

/// A filter that cannot be used.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum FilterError {
    #[error("'{}' is not a glob as in gitignore(5): {reason}", said(&glob.as_bytes()[..glob.len().min(200)]))]
    Glob { glob: String, reason: String },
    #[error(
        "the globs come to more than 512 KiB, or are too much to be compiled together; use fewer, or a list of files"
    )]
    TooMany,
    #[error("in the list of files")]
    Path(#[from] InvalidPath),
}

/// A compiled [`FilterSpec`].
#[derive(Debug, Clone)]
pub struct Filter {
    /// gitignore files with the directory they hold below, outermost first; the user's rules are the last word.
    nested: Vec<(RelPath, Gitignore)>,
    top: Option<Gitignore>,
    user: Gitignore,
    only: Option<Only>,
}

#[derive(Debug, Clone)]
struct Only {
    listed: BTreeSet<RelPath>,
    above: BTreeSet<RelPath>,
}

impl Only {
    fn reaches(&self, path: &RelPath) -> bool {
        if self.listed.len() <= FEW {
            return self.listed.iter().any(|listed| path.is_within(listed) || listed.is_within(path));
        }
        let below = || path.ancestors().any(|ancestor| self.listed.contains(&ancestor));
        self.listed.contains(path) || self.above.contains(path) || below()
    }
}

/// So many paths are sooner compared one by one than looked up.
const FEW: usize = 8;

/// Globs that say what is meant, where a [`Filter`] says what is left out: the last one that matches decides, and `!` takes out again.
#[derive(Debug, Clone, Default)]
pub struct Globs(Option<Filter>);

impl Globs {
    /// Compiles them; none mean nothing.
    ///
    /// # Errors
    /// As [`Filter::compile`].
    pub fn compile(globs: &[String]) -> Result<Globs, FilterError> {
        let rules = Some(globs).filter(|globs| !globs.is_empty());
        let others = rules.map(|globs| Filter::compile(&FilterSpec { rules: globs.to_vec(), only: None }));
        others.transpose().map(Globs)
    }

    /// Whether they mean a path.
    pub fn mean(&self, path: &RelPath, directory: bool) -> bool {
        self.0.as_ref().is_some_and(|others| !others.admits(path, directory))
    }
}

/// What a list of paths lets take part, whatever the rules say.
#[derive(Debug, Clone, Default)]
pub struct Reach(Option<Only>);

impl Reach {
    /// Whether the path is listed, lies below one that is, or leads to one.
    pub fn reaches(&self, path: &RelPath) -> bool {
        self.0.as_ref().is_none_or(|only| only.reaches(path))
    }
}

impl Filter {
    /// Compiles what a user wrote.
    ///
    /// # Errors
    /// [`FilterError`] with the glob or path that is wrong.
    pub fn compile(spec: &FilterSpec) -> Result<Filter, FilterError> {
        let user = globs(spec.rules.iter().map(String::as_str))?;
        let only = match &spec.only {
            None => None,
            Some(paths) => {
                let listed = paths.iter().map(RelPath::new).collect::<Result<BTreeSet<_>, _>>()?;
                let above = listed.iter().flat_map(|path| path.ancestors().collect::<Vec<_>>()).collect();
                Some(Only { listed, above })
            }
        };
        Ok(Filter { nested: Vec::new(), top: None, user, only })
    }

    /// The same filter with the lines of a `.lockstepignore` in `directory` (`None` is the top).
    ///
    /// # Errors
    /// [`FilterError`] with the glob that is wrong.
    pub fn with_ignore_file(&self, directory: Option<&RelPath>, text: &str) -> Result<Filter, FilterError> {
        let rules = globs(text.lines())?;
        let mut filter = self.clone();
        match directory {
            None => filter.top = Some(rules),
            Some(directory) => filter.nested.push((directory.clone(), rules)),
        }
        Ok(filter)
    }

    /// Whether everything takes part but what is lockstep's own.
    pub fn has_no_rules(&self) -> bool {
        self.only.is_none() && self.user.is_empty() && self.nested.is_empty() && self.top.is_none()
    }

    /// What its list of paths lets take part.
    pub fn reach(&self) -> Reach {
        Reach(self.only.clone())
    }

    /// Whether a path could take part by the list of paths alone: a cheap question before the whole one.
    pub fn may_admit(&self, path: &RelPath) -> bool {
        self.only.as_ref().is_none_or(|only| only.reaches(path))
    }

    /// Whether a path takes part. Ask for a directory before what lies below it: what a directory that does not take
    /// part holds does not either.
    pub fn admits(&self, path: &RelPath, directory: bool) -> bool {
        if path.components().any(|name| name == STATE_DIRECTORY) {
            return false;
        }
        if !self.may_admit(path) {
            return false;
        }
        // As in gitignore(5) the last rule that matches decides, and rules further down and the user's are later.
        let user = self.user.matched(path.as_path(), directory);
        if !user.is_none() {
            return user.is_whitelist();
        }
        for (below, rules) in self.nested.iter().rev() {
            let Some(relative) = path.strip_prefix(below) else { continue };
            let verdict = rules.matched(relative.as_path(), directory);
            if !verdict.is_none() {
                return verdict.is_whitelist();
            }
        }
        let top = self.top.as_ref().map(|rules| rules.matched(path.as_path(), directory));
        !top.is_some_and(|verdict| verdict.is_ignore())
    }
}

/// The gitignore line for just this path. What cannot stand in a line, and is not UTF-8, is matched by `?`, one for each byte: it may leave out more, which then waits for the next time.
pub fn line_for(path: &RelPath) -> String {
    let mut line = String::from("/");
    for chunk in path.as_bytes().utf8_chunks() {
        for c in chunk.valid().chars() {
            // A line ends at a line feed, and blanks at its end are taken away, whatever stands before them; braces are counted.
            if matches!(c, '{' | '}') || (c.is_whitespace() && c != ' ') {
                (0..c.len_utf8()).for_each(|_| line.push('?'));
                continue;
            }
            if matches!(c, '*' | '?' | '[' | ']' | '\\' | '!' | '#' | ' ') {
                line.push('\\');
            }
            line.push(c);
        }
        chunk.invalid().iter().for_each(|_| line.push('?'));
    }
    line
}

fn globs<'a>(lines: impl Iterator<Item = &'a str>) -> Result<Gitignore, FilterError> {
    let mut builder = GitignoreBuilder::new("");
    let mut bytes = 0_usize;
    for line in lines {
        let wrong = |reason: String| FilterError::Glob { glob: line.to_owned(), reason };
        check_glob(line).map_err(|reason| wrong(reason.to_owned()))?;
        bytes = bytes.saturating_add(line.len());
        if bytes > GLOBS_BYTES_MAX {
            return Err(FilterError::TooMany);
        }
        builder.add_line(None, line).map_err(|error| wrong(said(error.to_string().as_bytes())))?;
    }
    // Each is fine by itself; together they are too much for the matcher.
    builder.build().map_err(|_| FilterError::TooMany)
}

/// Refuses a glob that would take the compiler of globs to its end. Anybody's may come here: that of a peer, or of a file
/// in a tree.
///
/// # Errors
/// Why.
pub(crate) fn check_glob(glob: &str) -> Result<(), &'static str> {
    if glob.len() > GLOB_BYTES_MAX {
        return Err("it is longer than 8192 bytes");
    }
    // Braces are read by recursion. Those in brackets or behind a backslash are counted too: a closing one there would
    // hide how deep the others go.
    if glob.matches('{').count() > BRACES_MAX {
        return Err("it has more than 64 '{'");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn h20_globs_that_would_exhaust_the_compiler_are_refused_before_they_reach_it() {
        let compile = |rules: Vec<String>| Filter::compile(&FilterSpec { rules, only: None });
        let nested = |open: &str, count: usize| open.repeat(count) + "b" + &"}".repeat(count);
        for glob in [nested("{a,", 50_000), nested("{[}],", 100), "*a".repeat(5000)] {
            let error = compile(vec![glob.clone()]).map(drop).unwrap_err();
            assert!(error.to_string().len() < 400, "{error}");
            assert!(filter(&[]).with_ignore_file(None, &glob).is_err());
        }
        assert!(compile(vec![nested("{a,", 20)]).is_ok());
        let many = |count: usize| (0..count).map(|number| format!("a*b?c[a-z]d{number}")).collect();
        assert!(matches!(compile(many(60_000)), Err(FilterError::TooMany)));
        assert!(compile(many(1000)).is_ok());
        let error = compile(vec!["a{\u{1b}".into()]).map(drop).unwrap_err().to_string();
        assert!(!error.contains('\u{1b}'), "{error}");
    }

    fn filter(rules: &[&str]) -> Filter {
        Filter::compile(&FilterSpec { rules: rules.iter().map(|&rule| rule.into()).collect(), only: None }).unwrap()
    }

    fn admits(filter: &Filter, path: &[u8]) -> bool {
        let directory = path.ends_with(b"/");
        filter.admits(&RelPath::new(path.strip_suffix(b"/").unwrap_or(path)).unwrap(), directory)
    }

    #[test]
    fn rules_are_those_of_gitignore_and_the_last_wins() {
        let filter = filter(&["*.tmp", "!keep.tmp", "/build/", "logs/**/debug.log"]);
        for path in [
            &b"a.tmp"[..],
            b"deep/a.tmp",
            b"caf\xe9.tmp",
            b"build/",
            b"logs/x/debug.log",
            b".lockstep/manifest",
            b"deep/.lockstep",
        ] {
            assert!(!admits(&filter, path), "{}", String::from_utf8_lossy(path));
        }
        for path in [&b"a.txt"[..], b"keep.tmp", b"deep/keep.tmp", b"build", b"deep/build/"] {
            assert!(admits(&filter, path), "{}", String::from_utf8_lossy(path));
        }
    }

    #[test]
    fn ignore_files_hold_below_their_directory_and_the_user_has_the_last_word() {
        let directory = RelPath::new("sub").unwrap();
        let filter = filter(&["!wanted.log"]).with_ignore_file(None, "*.log\n# comment\n").unwrap();
        let filter = filter.with_ignore_file(Some(&directory), "/local\n!this.log").unwrap();
        assert!(!admits(&filter, b"x.log"));
        assert!(admits(&filter, b"sub/this.log"));
        assert!(!admits(&filter, b"this.log"));
        assert!(admits(&filter, b"wanted.log"));
        assert!(!admits(&filter, b"sub/local"));
        assert!(admits(&filter, b"local"));
    }

    #[test]
    fn a_list_admits_its_paths_what_is_below_and_what_leads_there() {
        let only = Some(vec![b"a/b".to_vec(), b"f".to_vec()]);
        let filter = Filter::compile(&FilterSpec { rules: vec![], only }).unwrap();
        for (path, admitted) in
            [("a/", true), ("a/b/", true), ("a/b/c", true), ("f", true), ("a/x", false), ("g", false)]
        {
            assert_eq!(admits(&filter, path.as_bytes()), admitted, "{path}");
        }
        let bad = FilterSpec { rules: vec![], only: Some(vec![b"../x".to_vec()]) };
        assert!(Filter::compile(&bad).is_err());
    }

    #[test]
    fn a_glob_that_is_none_is_named() {
        let spec = FilterSpec { rules: vec!["a[z-b]".into()], only: None };
        assert!(Filter::compile(&spec).unwrap_err().to_string().contains("a[z-b]"));
    }

    #[test]
    fn a_path_that_is_left_out_is_matched_by_its_rule_and_its_neighbours_are_not() {
        for name in
            ["plain", "a b", "with*star", "que?ry", "[set]", "!bang", "#hash", "tail ", "back\\slash", "{a,b}", "é"]
        {
            for path in [name.to_owned(), format!("d/{name}")] {
                let path = RelPath::new(&path).unwrap();
                let filter = Filter::compile(&FilterSpec { rules: vec![line_for(&path)], only: None }).unwrap();
                assert!(!filter.admits(&path, false) && !filter.admits(&path, true), "{path}");
                for other in ["withXstar", "queXry", "s", "a", "deeper/plain", "plain2"] {
                    assert!(filter.admits(&RelPath::new(other).unwrap(), false), "{path} {other}");
                }
            }
        }
        let braces = "{".repeat(65);
        let blanks = ["x \t", "x\t", "x\u{a0}", "x \u{3000}"];
        let odd = [&b"caf\xe9"[..], b"two\nlines", b"d/\xff\xfe", braces.as_bytes()];
        for odd in odd.into_iter().chain(blanks.map(str::as_bytes)) {
            let path = RelPath::new(odd).unwrap();
            let filter = Filter::compile(&FilterSpec { rules: vec![line_for(&path)], only: None }).unwrap();
            assert!(!filter.admits(&path, false), "{path}");
        }
    }
}
