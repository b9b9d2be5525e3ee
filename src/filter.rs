//! Which paths of a tree take part in a run.

use serde::{Deserialize, Serialize};

/// What a user wrote to leave paths out, in order. It travels to the other side, which compiles it there.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FilterSpec {
    /// gitignore lines: `--exclude GLOB` is the line itself, `--include GLOB` the line with `!` in front.
    pub rules: Vec<String>,
    /// `--files-from`: only these paths (bytes) and what lies below them; `None` for all.
    pub only: Option<Vec<Vec<u8>>>,
}
