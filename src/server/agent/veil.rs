//! What a confined client is not told: where on the machine its root lies.

use std::path::Path;
use std::sync::Arc;

/// Takes a root out of texts for a client that knows it as `/`.
#[derive(Debug, Clone, Default)]
pub struct Veil(Arc<[String]>);

impl Veil {
    /// Over this root, by the name that it was configured with and by its real one.
    pub fn over(root: &Path) -> Veil {
        let real = root.canonicalize().unwrap_or_else(|_| root.to_owned());
        let mut names: Vec<String> = [root, &real].map(|path| crate::error::shown(path).to_string()).into();
        // The longer one first: it may go on where the other one ends.
        names.sort_by_key(|name| std::cmp::Reverse(name.len()));
        names.dedup();
        Veil(
            names
                .into_iter()
                .map(|name| name.trim_end_matches('/').to_owned())
                .filter(|name| !name.is_empty())
                .collect(),
        )
    }

    /// The text as the client may read it: what lies below the root starts with `/`, and the root is `/`.
    pub fn cover(&self, text: &str) -> String {
        self.0.iter().fold(text.to_owned(), |text, name| covered(&text, name))
    }
}

fn covered(text: &str, name: &str) -> String {
    let mut parts = text.split(name);
    let mut covered = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let goes_on = |&c: &char| c.is_alphanumeric() || "-_.\\".contains(c);
        match part.chars().next() {
            Some('/') => {}
            // Another name that begins alike.
            Some(next) if goes_on(&next) => covered.push_str(name),
            _ => covered.push('/'),
        }
        covered.push_str(part);
    }
    covered
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_root_is_taken_out_of_texts_and_what_begins_alike_is_not() {
        let veil = Veil::over(Path::new("/srv/in/"));
        for (text, told) in [
            ("cannot open '/srv/in/a/b': gone", "cannot open '/a/b': gone"),
            ("'/srv/in' is in use by /srv/in/x and /srv/in", "'/' is in use by /x and /"),
            ("/srv/inner/a", "/srv/inner/a"),
            ("/srv/in-2, /srv/in.old and /srv/in: full", "/srv/in-2, /srv/in.old and /: full"),
            ("nothing of it", "nothing of it"),
        ] {
            assert_eq!(veil.cover(text), told);
        }
        assert_eq!(Veil::default().cover("/srv/in/a"), "/srv/in/a");
        assert_eq!(Veil::over(Path::new("/")).cover("/srv/in/a"), "/srv/in/a");
    }

    #[test]
    fn the_real_name_of_a_root_is_taken_out_too() {
        let at = tempfile::tempdir().unwrap();
        let real = at.path().canonicalize().unwrap().join("real");
        std::fs::create_dir(&real).unwrap();
        std::os::unix::fs::symlink(&real, at.path().join("called")).unwrap();
        let veil = Veil::over(&at.path().join("called"));
        let text = format!("{} and {}", real.join("a").display(), at.path().join("called/b").display());
        assert_eq!(veil.cover(&text), "/a and /b");
    }
}
