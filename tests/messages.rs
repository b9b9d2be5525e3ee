//! docs/messages.md names what the program says, and leaves out no warning of the services.

use std::fs;
use std::path::Path;

/// Files below a directory.
fn sources(directory: &Path, found: &mut Vec<String>) {
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let text = fs::read_to_string(&path).unwrap();
            // Without tests, and with strings that go over several lines in one piece.
            let code = text.split("#[cfg(test)]").next().unwrap().to_owned();
            found.push(code.split("\\\n").map(str::trim_start).collect());
        }
    }
}

fn program(parts: &[&str]) -> Vec<String> {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut found = Vec::new();
    parts.iter().for_each(|part| sources(&src.join(part), &mut found));
    found
}

fn page() -> String {
    fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/messages.md")).unwrap()
}

/// What stands in backquotes in the first column of the tables, in pieces between what changes.
fn named(page: &str) -> Vec<Vec<String>> {
    let ours = page.split("## What the system says").next().unwrap();
    let columns = ours.lines().filter_map(|line| line.strip_prefix("| `")?.split(" |").next());
    let messages = columns.flat_map(|column| column.split('`').step_by(2));
    let pieces =
        |message: &str| message.split('…').map(|piece| piece.trim_matches('\'').to_owned()).collect::<Vec<_>>();
    messages.map(pieces).collect()
}

#[test]
fn every_message_of_the_page_is_one_of_the_program() {
    let (code, named) = (program(&["."]), named(&page()));
    assert!(named.len() > 70, "the tables are not read: {named:?}");
    let said = |piece: &String| code.iter().any(|code| code.contains(piece.as_str()));
    let gone: Vec<_> = named.iter().filter(|pieces| !pieces.iter().all(said)).collect();
    assert!(gone.is_empty(), "no source file says: {gone:#?}");
}

/// The text of each record of this level: the longest string of the call.
fn records(code: &str, level: &str) -> Vec<String> {
    let begin = format!("tracing::{level}!(");
    code.split(&begin).skip(1).filter_map(|call| strings(call).into_iter().max_by_key(String::len)).collect()
}

/// The strings up to the end of the call that the text begins with.
fn strings(call: &str) -> Vec<String> {
    let (mut depth, mut string, mut found) = (1, None::<String>, Vec::new());
    for c in call.chars() {
        match (&mut string, c) {
            (Some(_), '"') => found.extend(string.take()),
            (Some(string), c) => string.push(c),
            (None, '"') => string = Some(String::new()),
            (None, '(') => depth += 1,
            (None, ')') => depth -= 1,
            _ => {}
        }
        if depth == 0 {
            break;
        }
    }
    found
}

#[test]
fn every_warning_of_the_services_is_on_the_page() {
    let page = page();
    let mut missing = Vec::new();
    for code in program(&["daemon", "server"]) {
        for record in ["warn", "error"].iter().flat_map(|level| records(&code, level)) {
            // What is a message of somebody else with names around it.
            let pieces = record.split(['{', '}']).step_by(2).filter(|piece| piece.len() > 6);
            // What comes from elsewhere as a whole: `{problem}`.
            let Some(longest) = pieces.max_by_key(|piece| piece.len()) else { continue };
            let words = longest.trim_matches([' ', ':', ',', '\'']);
            let on_page = |part: &str| part.len() >= 8 && page.contains(part);
            if !on_page(words) && !words.split([',', ';', ':']).any(|part| on_page(part.trim())) {
                missing.push(record);
            }
        }
    }
    assert!(missing.is_empty(), "docs/messages.md leaves out: {missing:#?}");
}
