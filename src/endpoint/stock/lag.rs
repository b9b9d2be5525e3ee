//! How far what is written of a file over several connections may be behind its end: then a run that goes on with what another has
//! left knows how much of that is sure.
//!
//! What always holds: whatever a run has written, the next one has at least two thirds of it, so that each gets further.

/// Never more than this,
const MOST: u64 = 32 << 20;
/// and so much where little is written.
const LEAST: u64 = 2 << 20;

/// How many bytes may be sent behind the first that is not written, where a run has written so many from its beginning on.
pub(super) fn allowed(written: u64) -> u64 {
    (written / 2).clamp(LEAST, MOST)
}

/// How many bytes a run has written at least, where its last lies so many behind its beginning.
pub(super) fn sure(length: u64) -> u64 {
    let third = (length / 3).max(length.min(LEAST)).min(MOST);
    length - third
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_sure_is_written_and_two_thirds_of_it_are() {
        let lengths = (0..400_u64).map(|n| n * 400_003).chain((0..40).map(|n| LEAST - 20 + n));
        for written in lengths {
            let end = written + allowed(written);
            for length in [written, end, end - 1, (written + end) / 2] {
                assert!(sure(length) <= written, "{length} of {written}");
                assert!(length < 3 * LEAST || sure(length) >= length - length / 3 - 1);
                assert!(sure(length) + MOST >= length);
            }
        }
    }
}
