//! The header of a safetensors file, held against the file's length: a file that was cut off is found without a hash.
//!
//! The format (<https://github.com/huggingface/safetensors>): eight bytes, the length of the header, little-endian; the
//! header, a JSON object of tensors with their place in the buffer; the buffer, which they cover without overlap or gap.
//! Nothing here reads a file, and nothing panics on any bytes.

use std::borrow::Cow;
use std::collections::HashSet;
use std::fmt;

use serde::Deserialize;
use serde::de::{self, IgnoredAny, MapAccess, SeqAccess, Visitor};

use crate::error::{Escaped, counted};

/// The longest header that is read, in bytes; the reference implementation has the same limit.
pub const HEADER_MAX: u64 = 100_000_000;

/// The length of the header of a file of `size` bytes that begins with `first`.
///
/// # Errors
/// What is wrong, for people.
pub fn header_length(first: [u8; 8], size: u64) -> Result<u64, String> {
    let length = u64::from_le_bytes(first);
    let room = size.saturating_sub(8);
    if length > HEADER_MAX {
        return Err(format!("its header would be {length} bytes long, and no header is longer than {HEADER_MAX}"));
    }
    if length > room {
        return Err(format!("its header is {length} bytes long, and only {} follow", counted(room, "byte", "bytes")));
    }
    Ok(length)
}

/// Checks `header` against a buffer of `buffer` bytes.
///
/// # Errors
/// What is wrong, for people.
pub fn check(header: &[u8], buffer: u64) -> Result<(), String> {
    if header.first() != Some(&b'{') {
        return Err("its header does not begin with '{'".into());
    }
    let Tensors(mut places) = serde_json::from_slice(header)
        .map_err(|error| format!("its header is not as it must be: {}", words(&error)))?;
    places.sort_unstable();
    let mut end = 0;
    for (from, to) in places {
        if from > end {
            return Err(format!("no tensor covers bytes {end} to {from} of its buffer"));
        }
        if from < end {
            return Err(format!("tensors overlap at byte {from} of its buffer"));
        }
        end = to;
    }
    match buffer.cmp(&end) {
        std::cmp::Ordering::Less => Err(format!(
            "it is cut off: its tensors take {} and {} there",
            counted(end, "byte", "bytes"),
            if buffer == 1 { "1 is".into() } else { format!("{buffer} are") }
        )),
        std::cmp::Ordering::Greater => {
            Err(format!("it has {} more than its tensors take", counted(buffer - end, "byte", "bytes")))
        }
        std::cmp::Ordering::Equal => Ok(()),
    }
}

/// An error of a parser, safe to print and short: it may quote what it read.
pub(super) fn words(error: &serde_json::Error) -> String {
    let text = error.to_string();
    let mut short: String = text.chars().take(200).collect();
    if short.len() < text.len() {
        short.push('…');
    }
    Escaped(short.as_bytes()).to_string()
}

/// Where each tensor lies; the names are compared while reading and not kept.
struct Tensors(Vec<(u64, u64)>);

/// A string that is borrowed where it can be.
#[derive(Deserialize, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[serde(transparent)]
pub(super) struct Text<'a>(#[serde(borrow)] pub(super) Cow<'a, str>);

#[derive(Deserialize)]
struct Tensor<'a> {
    #[serde(borrow)]
    dtype: Text<'a>,
    shape: Count,
    data_offsets: (u64, u64),
}

/// How many elements a shape has; `None` when they are more than can be counted. The numbers are not kept.
struct Count(Option<u64>);

impl<'de> Deserialize<'de> for Count {
    fn deserialize<D: de::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Product;
        impl<'de> Visitor<'de> for Product {
            type Value = Count;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a shape")
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Count, A::Error> {
                let (mut product, mut zero) = (Some(1_u64), false);
                while let Some(size) = seq.next_element::<u64>()? {
                    zero |= size == 0;
                    product = product.and_then(|product| product.checked_mul(size.max(1)));
                }
                Ok(Count(if zero { Some(0) } else { product }))
            }
        }
        deserializer.deserialize_seq(Product)
    }
}

impl<'de> Deserialize<'de> for Tensors {
    fn deserialize<D: de::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Header;
        impl<'de> Visitor<'de> for Header {
            type Value = Tensors;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of tensors")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Tensors, A::Error> {
                let (mut places, mut names) = (Vec::new(), HashSet::new());
                while let Some(name) = map.next_key::<Text<'de>>()? {
                    if name.0 == "__metadata__" {
                        map.next_value::<IgnoredAny>()?;
                    } else {
                        let tensor: Tensor<'de> = map.next_value()?;
                        places.push(place(&tensor).map_err(|what| {
                            de::Error::custom(format!("tensor '{}' {what}", Escaped(name.0.as_bytes())))
                        })?);
                    }
                    if let Some(twice) = names.replace(name) {
                        return Err(de::Error::custom(format!("'{}' is there twice", twice.0)));
                    }
                }
                Ok(Tensors(places))
            }
        }
        deserializer.deserialize_map(Header)
    }
}

fn place(tensor: &Tensor<'_>) -> Result<(u64, u64), String> {
    let (from, to) = tensor.data_offsets;
    let Some(length) = to.checked_sub(from) else {
        return Err(format!("ends at byte {to}, before it begins at {from}"));
    };
    let Some(elements) = tensor.shape.0 else { return Err("has more elements than can be counted".into()) };
    // Types that are not known, of a later version of the format, are not held against their shape.
    if let Some(bits) = bits(&tensor.dtype.0)
        && u128::from(elements) * bits != u128::from(length) * 8
    {
        return Err(format!("has {elements} elements of {bits} bits, and {} bytes for them", length));
    }
    Ok((from, to))
}

fn bits(dtype: &str) -> Option<u128> {
    Some(match dtype {
        "F4" => 4,
        "F6_E2M3" | "F6_E3M2" => 6,
        "BOOL" | "U8" | "I8" | "F8_E4M3" | "F8_E5M2" | "F8_E8M0" => 8,
        "U16" | "I16" | "F16" | "BF16" => 16,
        "U32" | "I32" | "F32" => 32,
        "U64" | "I64" | "F64" | "C64" => 64,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn says(header: &str, buffer: u64, words: &str) {
        let said = check(header.as_bytes(), buffer).expect_err(header);
        assert!(said.contains(words), "'{words}' is not in: {said}");
    }

    fn two(a: (u64, u64), b: (u64, u64)) -> String {
        let tensor = |at: (u64, u64)| {
            format!(r#"{{"dtype":"F16","shape":[{}],"data_offsets":[{},{}]}}"#, (at.1 - at.0) / 2, at.0, at.1)
        };
        format!(r#"{{"__metadata__":{{"format":"pt"}},"b":{},"a":{}}}   "#, tensor(b), tensor(a))
    }

    #[test]
    fn tensors_cover_the_buffer_without_overlap_or_gap() {
        assert_eq!(check(two((0, 4), (4, 10)).as_bytes(), 10), Ok(()));
        assert_eq!(check(two((0, 0), (0, 10)).as_bytes(), 10), Ok(()));
        assert_eq!(check(b"{}", 0), Ok(()));
        says(&two((0, 4), (4, 10)), 9, "cut off: its tensors take 10 bytes and 9 are there");
        says(&two((0, 4), (4, 10)), 11, "1 byte more");
        says(&two((0, 4), (6, 10)), 10, "no tensor covers bytes 4 to 6");
        says(&two((2, 4), (4, 10)), 10, "no tensor covers bytes 0 to 2");
        says(&two((0, 6), (4, 10)), 10, "overlap at byte 4");
    }

    #[test]
    fn h06_headers_that_lie_are_refused() {
        let one = |dtype: &str, shape: &str, at: &str| {
            format!(r#"{{"a":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{at}}}}}"#)
        };
        says(&one("F32", "[3]", "[0,4]"), 4, "has 3 elements of 32 bits, and 4 bytes");
        says(&one("F32", "[1]", "[4,0]"), 4, "before it begins");
        says(&one("F32", "[4294967296,4294967296]", "[0,0]"), 0, "more elements than can be counted");
        says(&one("F32", "[-1]", "[0,4]"), 4, "not as it must be");
        says(&one("F32", "[1]", "[0,4,8]"), 4, "not as it must be");
        says(&one("F32", "[1]", "[0,99999999999999999999999]"), 4, "not as it must be");
        assert_eq!(check(one("F3_NEW", "[9]", "[0,4]").as_bytes(), 4), Ok(()));
        assert_eq!(check(one("F32", "[0,4294967296,4294967296]", "[0,0]").as_bytes(), 0), Ok(()));
        says(r#"{"a\n":1}"#, 0, "not as it must be");
        let twice = one("U8", "[1]", "[0,1]").trim_matches(['{', '}']).to_owned();
        says(&format!("{{{twice}}},{twice}}}}}"), 1, "'a' is there twice");
        says(&"[".repeat(100_000), 0, "does not begin");
        says(&format!("{}{}", r#"{"a":"#, "[".repeat(100_000)), 0, "not as it must be");
        says(&format!("{}{}", r#"{"__metadata__":"#, "[".repeat(100_000)), 0, "not as it must be");
        assert!(check(b"{\"\xff\":1}", 0).is_err());
    }

    #[test]
    fn the_length_of_the_header_is_bounded_by_the_limit_and_the_file() {
        assert_eq!(header_length(2_u64.to_le_bytes(), 10), Ok(2));
        assert!(header_length(3_u64.to_le_bytes(), 10).unwrap_err().contains("only 2 bytes follow"));
        assert!(header_length(u64::MAX.to_le_bytes(), u64::MAX).unwrap_err().contains("no header is longer"));
        assert!(header_length((HEADER_MAX + 1).to_le_bytes(), u64::MAX).is_err());
        assert!(header_length(HEADER_MAX.to_le_bytes(), u64::MAX).is_ok());
    }
}
