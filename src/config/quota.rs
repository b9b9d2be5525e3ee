//! How much may lie beneath a root.

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use super::Bandwidth;

/// `{ bytes = "2 TB", files = 1000000 }`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Quota {
    /// The sizes of the files together; one with several names counts once.
    #[serde(default, deserialize_with = "size", serialize_with = "shown", skip_serializing_if = "Option::is_none")]
    pub bytes: Option<u64>,
    /// Files, directories and links together.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub files: Option<u64>,
}

impl Quota {
    pub(super) fn check(&self) -> Result<(), String> {
        if self.bytes.is_none() && self.files.is_none() {
            return Err("'quota' needs 'bytes', 'files' or both, as in { bytes = \"2 TB\", files = 1000000 }".into());
        }
        Ok(())
    }
}

/// Reads `2 TB`, `500 GiB`: powers of 1000, and of 1024 with an `i`.
pub(super) fn parse_size(text: &str) -> Result<u64, String> {
    let wrong = || {
        let text = crate::error::Escaped(text.as_bytes());
        format!("'{text}' is not a size: write it as '2 TB', '500 GiB' or '100 MB'")
    };
    if text.contains('/') {
        return Err(wrong());
    }
    text.parse::<Bandwidth>().map(|Bandwidth(bytes)| bytes).map_err(|_| wrong())
}

fn size<'de, D: Deserializer<'de>>(input: D) -> Result<Option<u64>, D::Error> {
    parse_size(&String::deserialize(input)?).map(Some).map_err(de::Error::custom)
}

fn shown<S: Serializer>(value: &Option<u64>, output: S) -> Result<S::Ok, S::Error> {
    let text = Bandwidth(value.unwrap_or_default()).to_string();
    output.collect_str(text.trim_end_matches("/s"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        for (text, bytes) in [("2 TB", 2_000_000_000_000), ("1 MiB", 1 << 20), ("500kB", 500_000), ("7", 7), ("7 B", 7)]
        {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
        for wrong in ["", "2 TB/s", "much", "-1 GB", "0", "1e9"] {
            assert!(parse_size(wrong).unwrap_err().contains("is not a size"), "{wrong}");
        }
    }
}
