//! The index that lists which shard holds which tensor (`model.safetensors.index.json` and its kin), and the numbers in
//! the names of shards. Nothing here reads a file, and nothing panics on any bytes.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::fmt;

use serde::Deserialize;
use serde::de::{self, MapAccess, Visitor};

use super::safetensors::{Text, words};
use crate::error::Escaped;

/// The largest index that is read, in bytes.
pub const INDEX_MAX: u64 = 50_000_000;
/// The most shards that an index may list.
pub const SHARDS_MAX: usize = 100_000;

#[derive(Deserialize)]
struct Index {
    weight_map: Shards,
}

struct Shards(BTreeSet<String>);

impl<'de> Deserialize<'de> for Shards {
    fn deserialize<D: de::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Map;
        impl<'de> Visitor<'de> for Map {
            type Value = Shards;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of tensors and their shards")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Shards, A::Error> {
                let (mut shards, mut tensors) = (BTreeSet::new(), HashSet::new());
                while let Some((tensor, shard)) = map.next_entry::<Text<'de>, Text<'de>>()? {
                    if !shards.contains(&*shard.0) {
                        if shards.len() == SHARDS_MAX {
                            return Err(de::Error::custom(format!("it lists more than {SHARDS_MAX} shards")));
                        }
                        shards.insert(shard.0.into_owned());
                    }
                    if let Some(twice) = tensors.replace(tensor) {
                        let name = Escaped(twice.0.as_bytes()).to_string();
                        return Err(de::Error::custom(format!("tensor '{name}' is listed twice")));
                    }
                }
                Ok(Shards(shards))
            }
        }
        deserializer.deserialize_map(Map)
    }
}

/// The shards that an index lists, each once.
///
/// # Errors
/// What is wrong, for people.
pub fn shards(index: &[u8]) -> Result<BTreeSet<String>, String> {
    let index: Index = serde_json::from_slice(index).map_err(|error| words(&error))?;
    if index.weight_map.0.is_empty() { Err("it lists no tensor".into()) } else { Ok(index.weight_map.0) }
}

/// A numbered shard: `model-00001-of-00004.safetensors`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Numbered {
    /// What stands around the numbers: `model` and `.safetensors`.
    pub set: (Vec<u8>, Vec<u8>),
    /// Its number, from 1.
    pub number: u64,
    /// How many there are.
    pub total: u64,
}

/// Takes the numbers out of the name of a shard of weights; `None` where it has none.
pub fn numbered(name: &[u8]) -> Option<Numbered> {
    let stem = name.strip_suffix(b".safetensors").or_else(|| name.strip_suffix(b".bin"))?;
    let suffix = &name[stem.len()..];
    let of = stem.windows(4).rposition(|window| window == b"-of-")?;
    let dash = stem[..of].iter().rposition(|&byte| byte == b'-')?;
    let total = super::names::decimal(&stem[of + 4..])?;
    let number = super::names::decimal(&stem[dash + 1..of])?;
    Some(Numbered { set: (stem[..dash].to_vec(), suffix.to_vec()), number, total })
}

/// What does not fit in the numbers of shards that belong together: missing ones (an incomplete set), or what cannot be of
/// one set (`Err`).
pub fn gaps(names: &[Numbered]) -> Result<Vec<String>, String> {
    let mut sets: BTreeMap<_, BTreeMap<u64, BTreeSet<u64>>> = BTreeMap::new();
    for name in names {
        let numbers = sets.entry(&name.set).or_default().entry(name.total).or_default();
        if !numbers.insert(name.number) {
            return Err(format!("shard {} of {} is there twice", name.number, name.total));
        }
    }
    let mut missing = Vec::new();
    for totals in sets.values() {
        if totals.len() > 1 {
            let totals: Vec<String> = totals.keys().map(u64::to_string).take(4).collect();
            return Err(format!("shards of different sets are mixed: of {}", totals.join(" and of ")));
        }
        for (&total, numbers) in totals {
            if numbers.iter().any(|&number| number == 0 || number > total) {
                return Err(format!("a shard is numbered outside 1 to {total}"));
            }
            if let Some(first) = (1..=total).find(|number| !numbers.contains(number)) {
                let there = numbers.len();
                missing.push(format!("{there} of {total} shards are there; the first that is missing is {first}"));
            }
        }
    }
    Ok(missing)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_index_lists_its_shards_once_and_tensors_once() {
        let index = br#"{"metadata":{"total_size":9},"weight_map":{"a":"s1","b":"s2","c":"s1"}}"#;
        assert_eq!(shards(index).unwrap(), ["s1".to_owned(), "s2".into()].into());
        for (bad, said) in [
            (r#"{"weight_map":{"a":"s1","a":"s2"}}"#, "tensor 'a' is listed twice"),
            (r#"{"weight_map":{"a":"s"},"weight_map":{"b":"t"}}"#, "duplicate field"),
            (r#"{"weight_map":{}}"#, "lists no tensor"),
            (r#"{"metadata":{}}"#, "weight_map"),
            (r#"{"weight_map":{"a":["s"]}}"#, "invalid type"),
            (r#"{"weight_map":{"a":"s1"#, "EOF"),
            ("", "EOF"),
        ] {
            let error = shards(bad.as_bytes()).unwrap_err();
            assert!(error.contains(said), "{bad}: {error}");
        }
        assert!(shards(format!("{{\"x\":{}", "[".repeat(200_000)).as_bytes()).is_err());
        assert!(shards(b"{\"weight_map\":{\"a\":\"\xff\"}}").is_err());
        let many = |count: usize| {
            let map: Vec<String> = (0..count).map(|at| format!("\"{at}\":\"{at}\"")).collect();
            shards(format!("{{\"weight_map\":{{{}}}}}", map.join(",")).as_bytes())
        };
        assert_eq!(many(SHARDS_MAX).unwrap().len(), SHARDS_MAX);
        assert!(many(SHARDS_MAX + 1).unwrap_err().contains("more than 100000 shards"));
    }

    #[test]
    fn numbers_of_shards_have_no_gap() {
        let of = |names: &[&str]| gaps(&names.iter().filter_map(|name| numbered(name.as_bytes())).collect::<Vec<_>>());
        assert_eq!(of(&["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]), Ok(vec![]));
        assert_eq!(of(&["a-1-of-1.bin", "b-1-of-1.bin", "b-of-1.bin", "x.bin", "b-x-of-2.bin"]), Ok(vec![]));
        let missing = of(&["model-00001-of-00003.safetensors", "model-00003-of-00003.safetensors"]).unwrap();
        assert_eq!(missing, ["2 of 3 shards are there; the first that is missing is 2"]);
        assert!(of(&["m-1-of-2.bin", "m-01-of-2.bin"]).unwrap_err().contains("twice"));
        assert!(of(&["m-1-of-2.bin", "m-2-of-3.bin"]).unwrap_err().contains("mixed: of 2 and of 3"));
        assert!(of(&["m-3-of-2.bin"]).unwrap_err().contains("outside"));
        assert!(of(&["m-0-of-2.bin"]).unwrap_err().contains("outside"));
        assert_eq!(numbered(b"m-1-of-99999999999999999999999.bin"), None);
        let far = of(&["m-1-of-18446744073709551615.bin"]).unwrap();
        assert!(far[0].contains("missing is 2"), "{far:?}");
    }
}
