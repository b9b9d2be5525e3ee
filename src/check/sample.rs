//! Which part of a tree a sample looks at.

use std::collections::HashSet;

/// So many per cent of `count`, rounded up, each with the same chance. Who damages a file cannot know which are read: the
/// choice starts from what the system gives for hashing.
pub(super) fn choose(count: usize, percent: f64) -> HashSet<usize> {
    use std::hash::{BuildHasher as _, Hasher as _};
    let state = std::collections::hash_map::RandomState::new();
    let wanted = ((count as f64 * percent / 100.0).ceil() as usize).min(count);
    let mut all: Vec<usize> = (0..count).collect();
    for at in 0..wanted {
        let mut hasher = state.build_hasher();
        hasher.write_usize(at);
        let left = (count - at) as u64;
        all.swap(at, at + (hasher.finish() % left) as usize);
    }
    all.truncate(wanted);
    all.into_iter().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sample_has_the_size_asked_for_and_every_file_its_chance() {
        for (count, percent, wanted) in [(0, 50.0, 0), (1, 1.0, 1), (200, 1.0, 2), (200, 1.2, 3), (7, 100.0, 7)] {
            let chosen = choose(count, percent);
            assert_eq!(chosen.len(), wanted, "{count} {percent}");
            assert!(chosen.iter().all(|&index| index < count));
        }
        // 20 of 200, 100 times: each index is left out of all with a chance of 1 in 40,000.
        let seen: HashSet<usize> = (0..100).flat_map(|_| choose(200, 10.0)).collect();
        assert!(seen.len() > 190, "{}", seen.len());
    }
}
