//! What is signed: the files of a model, as an in-toto statement in JSON.

use std::collections::HashSet;

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::error::Escaped;
use crate::manifest::{Content, Digest, Entry, Tree};
use crate::path::{InvalidPath, RelPath};

const STATEMENT: &str = "https://in-toto.io/Statement/v1";
const PREDICATE: &str = "https://model_signing/signature/v1.0";
const HASH: &str = "sha256";
/// Where lockstep keeps what it knows of a root.
const STATE_DIRECTORY: &str = ".lockstep";
/// What model_signing leaves out at the top of a tree, unless it is told otherwise.
const OF_GIT: [&str; 4] = [".git", ".gitattributes", ".github", ".gitignore"];

/// What a signature says of a model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Statement {
    /// What the directory was called. It proves nothing: a model may be renamed.
    pub name: String,
    /// The files, each once, in the order of the signature.
    pub files: Vec<(RelPath, Digest)>,
    /// Whether a listed file may be a symbolic link to one.
    pub links: bool,
    /// What is not signed, with all that lies below it.
    pub ignored: Vec<RelPath>,
}

/// Why a tree cannot be signed in this format.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs)]
pub enum UnsignableTree {
    #[error("'{0}' has a name that is not UTF-8, which this format cannot hold; rename it")]
    Name(RelPath),
    #[error("'{0}' is a symbolic link, and model_signing refuses a tree that has one; put a file in its place")]
    Link(RelPath),
    #[error("'{0}' has no digest in the manifest")]
    NoDigest(RelPath),
    #[error("there is no file that could be signed")]
    Nothing,
}

/// What is wrong with a text that was signed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs)]
pub enum StatementError {
    #[error("it cannot be read: {0}")]
    Json(String),
    #[error("it is of type '{found}', not '{wanted}'")]
    Type { found: String, wanted: &'static str },
    #[error("it is about {0} subjects, and one is what a signature is about")]
    Subjects(usize),
    #[error("its files are put together by the method '{0}', and 'files' is what is read")]
    Method(String),
    #[error("its digests are of the kind '{0}', and sha256 is what is read")]
    Hash(String),
    #[error("'{name}' has no SHA-256 in 64 lower-case digits")]
    Digest { name: String },
    #[error(transparent)]
    Path(#[from] InvalidPath),
    #[error("it lists '{0}' twice")]
    Twice(RelPath),
    #[error(
        "it lists '{0}', which is lockstep's own and changes; have it signed without (--ignore-paths ROOT/.lockstep)"
    )]
    Own(RelPath),
    #[error("it lists nothing")]
    Nothing,
    #[error("the digest of its list does not fit the list")]
    Root,
}

#[derive(Serialize, Deserialize)]
struct Text {
    #[serde(rename = "_type")]
    kind: String,
    subject: Vec<Subject>,
    #[serde(rename = "predicateType")]
    predicate_type: String,
    predicate: Predicate,
}

/// Of any statement: looked at before the rest, which another kind has in another way.
#[derive(Deserialize)]
struct Kinds {
    #[serde(rename = "_type")]
    kind: String,
    #[serde(rename = "predicateType")]
    predicate_type: String,
}

#[derive(Serialize, Deserialize)]
struct Subject {
    name: String,
    digest: Root,
}

#[derive(Serialize, Deserialize)]
struct Root {
    sha256: String,
}

#[derive(Serialize, Deserialize)]
struct Predicate {
    resources: Vec<Resource>,
    serialization: Serialization,
}

#[derive(Serialize, Deserialize)]
struct Resource {
    name: String,
    algorithm: String,
    digest: String,
}

#[derive(Serialize, Deserialize)]
struct Serialization {
    method: String,
    hash_type: String,
    allow_symlinks: bool,
    #[serde(default)]
    ignore_paths: Vec<String>,
}

impl Statement {
    /// What is to be signed of a tree. Left out are what model_signing leaves out, what lockstep keeps there, and `without`,
    /// as the signature itself.
    ///
    /// # Errors
    /// What the format cannot hold.
    pub fn of(name: String, tree: &Tree, without: &[RelPath]) -> Result<Statement, UnsignableTree> {
        let known = [STATE_DIRECTORY].into_iter().chain(OF_GIT).filter_map(|name| RelPath::new(name).ok());
        let mut ignored: Vec<RelPath> = known.chain(without.iter().cloned()).collect();
        ignored.sort();
        ignored.dedup();
        let mut made = Statement { name, files: Vec::new(), links: false, ignored };
        for entry in tree.entries() {
            // A link is refused wherever it lies: model_signing looks at it before it leaves it out.
            if let Content::Symlink { .. } = entry.content {
                return Err(UnsignableTree::Link(entry.path.clone()));
            }
            if entry.is_directory() || made.ignores(&entry.path) {
                continue;
            }
            if std::str::from_utf8(entry.path.as_bytes()).is_err() {
                return Err(UnsignableTree::Name(entry.path.clone()));
            }
            let digest = digest(tree, entry).ok_or_else(|| UnsignableTree::NoDigest(entry.path.clone()))?;
            made.files.push((entry.path.clone(), digest));
        }
        if made.files.is_empty() { Err(UnsignableTree::Nothing) } else { Ok(made) }
    }

    /// Whether `path` is left out of the signature.
    pub fn ignores(&self, path: &RelPath) -> bool {
        self.ignored.iter().any(|ignored| path.is_within(ignored))
    }

    /// Whether what lies there ought to be listed. Directories are not.
    pub fn covers(&self, path: &RelPath, content: &Content) -> bool {
        !matches!(content, Content::Directory) && !self.ignores(path)
    }

    /// The text that is signed.
    ///
    /// # Errors
    /// None that is known: those of JSON.
    pub(super) fn to_json(&self) -> Result<Vec<u8>, serde_json::Error> {
        let resource = |(path, digest): &(RelPath, Digest)| Resource {
            name: String::from_utf8_lossy(path.as_bytes()).into_owned(),
            algorithm: HASH.to_owned(),
            digest: digest.to_string(),
        };
        let paths = self.ignored.iter().map(|path| String::from_utf8_lossy(path.as_bytes()).into_owned());
        serde_json::to_vec(&Text {
            kind: STATEMENT.to_owned(),
            subject: vec![Subject { name: self.name.clone(), digest: Root { sha256: self.root().to_string() } }],
            predicate_type: PREDICATE.to_owned(),
            predicate: Predicate {
                resources: self.files.iter().map(resource).collect(),
                serialization: Serialization {
                    method: "files".to_owned(),
                    hash_type: HASH.to_owned(),
                    allow_symlinks: self.links,
                    ignore_paths: paths.collect(),
                },
            },
        })
    }

    /// Reads a text whose signature was found good.
    pub(super) fn from_json(text: &[u8]) -> Result<Statement, StatementError> {
        let unreadable = |error: serde_json::Error| StatementError::Json(safe(&error.to_string()));
        let kinds: Kinds = serde_json::from_slice(text).map_err(unreadable)?;
        for (found, wanted) in [(kinds.kind, STATEMENT), (kinds.predicate_type, PREDICATE)] {
            if found != wanted {
                return Err(StatementError::Type { found: safe(&found), wanted });
            }
        }
        let text: Text = serde_json::from_slice(text).map_err(unreadable)?;
        let [subject] = &text.subject[..] else { return Err(StatementError::Subjects(text.subject.len())) };
        let Predicate { resources, serialization } = &text.predicate;
        if serialization.method != "files" {
            return Err(StatementError::Method(safe(&serialization.method)));
        }
        let algorithms = resources.iter().map(|resource| &resource.algorithm);
        if let Some(other) = [&serialization.hash_type].into_iter().chain(algorithms).find(|kind| *kind != HASH) {
            return Err(StatementError::Hash(safe(other)));
        }
        let files = resources.iter().map(file).collect::<Result<Vec<_>, _>>()?;
        let mut seen = HashSet::new();
        if let Some((path, _)) = files.iter().find(|(path, _)| !seen.insert(path)) {
            return Err(StatementError::Twice(path.clone()));
        }
        if files.is_empty() {
            return Err(StatementError::Nothing);
        }
        // One that leads out of the tree, or stands for all of it, excuses nothing.
        let ignored = serialization.ignore_paths.iter().filter_map(|path| RelPath::new(path).ok()).collect();
        let read = Statement { name: safe(&subject.name), files, links: serialization.allow_symlinks, ignored };
        if read.root().to_string() != subject.digest.sha256 {
            return Err(StatementError::Root);
        }
        Ok(read)
    }

    /// The digest of the digests, in the order of the list.
    fn root(&self) -> Digest {
        let mut hash = Sha256::new();
        self.files.iter().for_each(|(_, digest)| hash.update(digest.0));
        Digest(hash.finalize().into())
    }
}

fn file(resource: &Resource) -> Result<(RelPath, Digest), StatementError> {
    let path = RelPath::new(&resource.name)?;
    if path.components().any(|name| name == STATE_DIRECTORY.as_bytes()) {
        return Err(StatementError::Own(path));
    }
    let digest = Digest::from_hex(resource.digest.as_bytes());
    let digest = digest.ok_or_else(|| StatementError::Digest { name: safe(&resource.name) })?;
    Ok((path, digest))
}

/// Of a file under any of its names.
pub(super) fn digest(tree: &Tree, entry: &Entry) -> Option<Digest> {
    match &entry.content {
        Content::File { digest, .. } => *digest,
        Content::HardLink { first } => tree.get(first)?.file()?.1,
        _ => None,
    }
}

fn safe(text: &str) -> String {
    Escaped(text.as_bytes()).to_string()
}
