//! The layers of `docs/architecture.md`: a module uses only those before it.

use std::fs;
use std::path::{Path, PathBuf};

/// From the bottom up. A module may use what stands in an earlier row, and its own.
const LAYERS: &[&[&str]] = &[
    &["error", "monitor"],
    &["path"],
    &["manifest"],
    &["signature"],
    &["filter"],
    &["plan"],
    &["policy"],
    &["codec"],
    &["wire"],
    &["root"],
    &["access"],
    &["audit"],
    &["scan"],
    &["staging"],
    &["drift"],
    &["layout"],
    &["check"],
    &["endpoint"],
    &["sync"],
    &["config"],
    &["trust"],
    &["ssh", "server", "daemon"],
    &["cli"],
];
/// `monitor` speaks of paths; both are leaves.
const ALLOWED: &[(&str, &str)] = &[("monitor", "path"), ("monitor", "error"), ("path", "error")];
const PURE: &[&str] = &["path", "manifest", "signature", "filter", "plan", "policy", "codec", "wire"];

fn rank(module: &str) -> Option<usize> {
    LAYERS.iter().position(|layer| layer.contains(&module))
}

fn sources(directory: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
}

/// Every source file with the module it belongs to and its text up to its tests.
fn modules() -> Vec<(PathBuf, String, String)> {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut found = Vec::new();
    sources(&src, &mut found);
    found
        .into_iter()
        .filter_map(|path| {
            let relative = path.strip_prefix(&src).unwrap().to_str().unwrap().to_owned();
            let module = relative.split('/').next().unwrap().trim_end_matches(".rs").to_owned();
            if module == "lib" || module == "main" {
                return None;
            }
            let text = fs::read_to_string(&path).unwrap();
            let code = text.split("#[cfg(test)]").next().unwrap().to_owned();
            Some((path, module, code))
        })
        .collect()
}

/// The names after each `crate::` in `code`, those of a brace group too.
fn uses(code: &str) -> Vec<String> {
    let mut names = Vec::new();
    for (at, _) in code.match_indices("crate::") {
        let rest = &code[at + "crate::".len()..];
        if let Some(group) = rest.strip_prefix('{') {
            let mut depth = 0;
            let mut start = true;
            for (index, c) in group.char_indices() {
                match c {
                    '{' => depth += 1,
                    '}' if depth == 0 => break,
                    '}' => depth -= 1,
                    ',' if depth == 0 => start = true,
                    c if start && c.is_alphabetic() => {
                        names.push(word(&group[index..]));
                        start = false;
                    }
                    _ => {}
                }
            }
        } else {
            names.push(word(rest));
        }
    }
    names
}

fn word(text: &str) -> String {
    text.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect()
}

#[test]
fn imports_go_only_upward() {
    let mut wrong = Vec::new();
    for (path, module, code) in modules() {
        let own = rank(&module).unwrap_or_else(|| panic!("{module} has no layer: add it to LAYERS"));
        for used in uses(&code) {
            let Some(theirs) = rank(&used) else { continue };
            if used != module && theirs >= own && !ALLOWED.contains(&(module.as_str(), used.as_str())) {
                wrong.push(format!("{}: {module} uses {used}", path.display()));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn the_pure_modules_know_no_files_sockets_or_tasks() {
    let forbidden = ["std::fs", "std::net", "tokio::", "rustix::", "std::thread", "std::process", "std::env"];
    let mut wrong = Vec::new();
    for (path, module, code) in modules().into_iter().filter(|(_, module, _)| PURE.contains(&module.as_str())) {
        for word in forbidden.iter().filter(|word| code.contains(**word)) {
            wrong.push(format!("{}: {module} uses {word}", path.display()));
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn only_the_command_line_prints() {
    let mut wrong = Vec::new();
    for (path, module, code) in modules().into_iter().filter(|(_, module, _)| module != "cli") {
        for word in ["println!", "print!(", "eprint", "dbg!"] {
            if code.lines().any(|line| !line.trim_start().starts_with("//") && line.contains(word)) {
                wrong.push(format!("{}: {module} uses {word}", path.display()));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn every_file_says_what_it_is_for_and_can_be_read_in_one_sitting() {
    for (path, _, _) in modules() {
        let text = fs::read_to_string(&path).unwrap();
        assert!(text.starts_with("//!"), "{} does not start with //!", path.display());
        assert!(text.lines().count() <= 1000, "{} has over 1,000 lines: split it", path.display());
    }
}

#[test]
fn the_check_sees_imports() {
    let code = "use crate::{scan::Scan, wire::{a, b}, path}; fn f() { crate::cli::run() }";
    assert_eq!(uses(code), ["scan", "wire", "path", "cli"]);
}
