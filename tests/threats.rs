//! The threat model in `docs/security.md`: each threat has tests, and they are there.

use std::collections::HashSet;
use std::fs;
use std::path::Path;

fn tests() -> HashSet<String> {
    let top = Path::new(env!("CARGO_MANIFEST_DIR"));
    let sources = ["src", "tests"].map(|directory| walkdir::WalkDir::new(top.join(directory)));
    let sources = sources.into_iter().flatten().map(Result::unwrap);
    let sources = sources.filter(|entry| entry.path().extension().is_some_and(|extension| extension == "rs"));
    let mut found = HashSet::new();
    for entry in sources {
        let text = fs::read_to_string(entry.path()).unwrap();
        let mut is_test = false;
        for line in text.lines().map(str::trim) {
            match line.trim_start_matches("async ").strip_prefix("fn ") {
                Some(rest) if is_test => {
                    found.insert(rest.split('(').next().unwrap().to_owned());
                    is_test = false;
                }
                _ => is_test |= line.starts_with("#[test]") || line.starts_with("#[tokio::test"),
            }
        }
    }
    found
}

#[test]
fn each_threat_has_tests_that_are_there() {
    let page = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/security.md")).unwrap();
    let table = page.split("| against | how | tests |\n|---|---|---|\n").nth(1).expect("the table of threats");
    let (tests, mut rows) = (tests(), 0);
    for row in table.lines().take_while(|line| line.starts_with('|')) {
        let cells: Vec<&str> = row.trim_matches('|').split(" | ").collect();
        let [threat, _, named] = cells[..] else { panic!("not three cells: {row}") };
        // What stands behind the semicolon is no test of this kind.
        let names: Vec<&str> = named.split(';').next().unwrap().split('`').skip(1).step_by(2).collect();
        assert!(!names.is_empty(), "{threat}: no test");
        for name in names {
            assert!(tests.contains(name), "{threat}: there is no test '{name}'");
        }
        rows += 1;
    }
    assert!(rows > 25, "{rows}");
}
