//! What names say: numbers, patterns of ranks, and the names of files within a `.metadata` of PyTorch. Pure.

use std::collections::{BTreeMap, BTreeSet};

/// A number in decimal digits, and nothing else.
pub fn decimal(text: &[u8]) -> Option<u64> {
    if text.is_empty() || !text.iter().all(u8::is_ascii_digit) {
        return None;
    }
    std::str::from_utf8(text).ok()?.parse().ok()
}

/// The number behind `prefix`: `checkpoint-500`.
pub fn numbered(name: &[u8], prefix: &[u8]) -> Option<u64> {
    decimal(name.strip_prefix(prefix)?)
}

/// The digits of a name taken out of it: `mp_rank_00_001` is `mp_rank_#_#` and 0, 1. Digits that follow a letter stay
/// (`bf16_`). `None` where a number is too large.
pub fn pattern(name: &[u8]) -> Option<(Vec<u8>, Vec<u64>)> {
    let (mut pattern, mut numbers, mut at) = (Vec::new(), Vec::new(), 0);
    while at < name.len() {
        let digits = name[at..].iter().take_while(|byte| byte.is_ascii_digit()).count();
        let after_letter = at > 0 && name[at - 1].is_ascii_alphanumeric();
        if digits > 0 && !after_letter {
            numbers.push(decimal(&name[at..at + digits])?);
            pattern.push(b'#');
            at += digits;
        } else {
            let step = digits.max(1);
            pattern.extend_from_slice(&name[at..at + step]);
            at += step;
        }
    }
    Some((pattern, numbers))
}

/// The first tuple that is missing where all combinations of 0 to the largest number of each place have to be there.
/// Every tuple has to have as many numbers; others are ignored.
pub fn missing_rank(ranks: &BTreeSet<Vec<u64>>) -> Option<Vec<u64>> {
    let places = ranks.first()?.len();
    // Counting up from all zeros, the last place first; so many steps at most as there are tuples.
    let mut largest = vec![0; places];
    for tuple in ranks {
        for (largest, number) in largest.iter_mut().zip(tuple) {
            *largest = (*largest).max(*number);
        }
    }
    let mut next = vec![0_u64; places];
    loop {
        if !ranks.contains(&next) {
            return Some(next);
        }
        let place = (0..places).rev().find(|&place| next[place] < largest[place])?;
        next[place] += 1;
        next[place + 1..].fill(0);
    }
}

/// Names grouped by their pattern.
pub fn grouped<'a>(names: impl Iterator<Item = &'a [u8]>) -> BTreeMap<Vec<u8>, BTreeSet<Vec<u64>>> {
    let mut groups: BTreeMap<Vec<u8>, BTreeSet<Vec<u64>>> = BTreeMap::new();
    for (pattern, numbers) in names.filter_map(pattern) {
        groups.entry(pattern).or_default().insert(numbers);
    }
    groups
}

/// The most names that are taken from one `.metadata`.
pub const MENTIONS_MAX: usize = 100_000;
/// A string in a pickle that may be a name ends at most so many bytes behind where its opcode is.
pub const MENTION_LENGTH_MAX: usize = 5 + MENTION_MAX;
/// The longest name, in bytes: longer ones are no file's of this layout.
const MENTION_MAX: usize = 1024;

/// Collects strings of a pickle that end in `.distcp`: the files that a `.metadata` names. It is not unpickled: a pickle is
/// a program. Strings stand in it as an opcode (BINUNICODE or SHORT_BINUNICODE, `pickletools`), a length and their text.
/// False, and the rest is not looked at, where they are more than [`MENTIONS_MAX`].
#[must_use]
pub fn mentions(bytes: &[u8], found: &mut BTreeSet<Vec<u8>>) -> bool {
    const SUFFIX: &[u8] = b".distcp";
    for end in bytes.windows(SUFFIX.len()).enumerate().filter(|(_, window)| *window == SUFFIX).map(|(at, _)| at) {
        let end = end + SUFFIX.len();
        let string = (SUFFIX.len()..=end.min(MENTION_MAX)).find_map(|length| {
            let start = end - length;
            let short = start.checked_sub(2).map(|at| &bytes[at..start]);
            let long = start.checked_sub(5).map(|at| &bytes[at..start]);
            let is_short = short.is_some_and(|op| op[0] == 0x8c && usize::from(op[1]) == length);
            let is_long = long.is_some_and(|op| op[0] == b'X' && op[1..] == (length as u32).to_le_bytes());
            (is_short || is_long).then(|| &bytes[start..end])
        });
        if let Some(string) = string
            && !found.contains(string)
        {
            if found.len() == MENTIONS_MAX {
                return false;
            }
            found.insert(string.to_vec());
        }
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_taken_out_of_names() {
        let of =
            |name: &str| pattern(name.as_bytes()).map(|(text, numbers)| (String::from_utf8(text).unwrap(), numbers));
        assert_eq!(of("mp_rank_00_001"), Some(("mp_rank_#_#".into(), vec![0, 1])));
        assert_eq!(of("bf16_zero_pp_rank_3_mp_rank_01"), Some(("bf16_zero_pp_rank_#_mp_rank_#".into(), vec![3, 1])));
        assert_eq!(of("99999999999999999999999"), None);
        assert_eq!(numbered(b"checkpoint-500", b"checkpoint-"), Some(500));
        for other in ["checkpoint-", "checkpoint-5a", "checkpoint-+5", "xcheckpoint-5"] {
            assert_eq!(numbered(other.as_bytes(), b"checkpoint-"), None, "{other}");
        }
    }

    #[test]
    fn all_combinations_of_ranks_have_to_be_there() {
        let missing = |ranks: &[&[u64]]| missing_rank(&ranks.iter().map(|rank| rank.to_vec()).collect());
        assert_eq!(missing(&[&[0], &[1], &[2]]), None);
        assert_eq!(missing(&[&[1], &[2]]), Some(vec![0]));
        assert_eq!(missing(&[&[0], &[u64::MAX]]), Some(vec![1]));
        assert_eq!(missing(&[&[0, 0], &[0, 1], &[1, 0]]), Some(vec![1, 1]));
        assert_eq!(missing(&[&[0, 0], &[0, 1], &[1, 0], &[1, 1]]), None);
        assert_eq!(missing(&[&[]]), None);
        assert_eq!(missing(&[]), None);
    }

    #[test]
    fn names_are_found_in_a_pickle_without_running_it() {
        let mut found = BTreeSet::new();
        let long = "d/".repeat(150) + "__7_0.distcp";
        let mut pickle = b"\x80\x04\x8c\x0c__0_0.distcp\x94\x8c\x0dx__1_0.distcp\x94X".to_vec();
        pickle.extend((long.len() as u32).to_le_bytes());
        pickle.extend(long.as_bytes());
        // Text that is no string of its own.
        pickle.extend(b"\x8c\x05__9_9.distcp .distcp");
        assert!(mentions(&pickle, &mut found));
        let expected: BTreeSet<Vec<u8>> =
            [&b"__0_0.distcp"[..], b"x__1_0.distcp", long.as_bytes()].map(<[u8]>::to_vec).into();
        assert_eq!(found, expected);
        let string = |at| [b"X\x12\0\0\0", format!("__{at:06}_00.distcp").as_bytes()].concat();
        let many: Vec<u8> = (0..=MENTIONS_MAX).flat_map(string).collect();
        assert!(!mentions(&many, &mut BTreeSet::new()));
        assert!(mentions(&many[..many.len() - 1], &mut BTreeSet::new()));
    }
}
