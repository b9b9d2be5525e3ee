//! Names that writers give to what they have not finished. Pure.

/// Whether whoever writes under this name gives it another one, or removes it, when it is done.
pub(super) fn is_temporary(name: &[u8]) -> bool {
    const ENDS: [&[u8]; 8] =
        [b".tmp", b".temp", b".part", b".partial", b".crdownload", b".incomplete", b"-unfinished", b"~"];
    const BEGINS: [&[u8]; 4] = [b"tmp-checkpoint-", b"checkpoint_tmp", b".~", b".nfs"];
    ENDS.iter().any(|end| name.len() > end.len() && name.ends_with(end))
        || BEGINS.iter().any(|begin| name.len() > begin.len() && name.starts_with(begin))
        || (name.len() > 5 && name.starts_with(b".") && name.ends_with(b".swp"))
        || name == b"checkpoint_tmp"
        || is_of_rsync(name)
        // A directory that a run makes whole beside its place.
        || (name.len() > 10 && name.starts_with(b".") && name.ends_with(b".lockstep"))
}

/// `.NAME.XXXXXX`, as mkstemp(3) fills it in. At least one capital letter or digit among the last six: others are names
/// that people give (`.config.backup`).
fn is_of_rsync(name: &[u8]) -> bool {
    let Some(at) = name.len().checked_sub(7) else { return false };
    let random = &name[at + 1..];
    at > 1
        && name[0] == b'.'
        && name[at] == b'.'
        && random.iter().all(u8::is_ascii_alphanumeric)
        && random.iter().any(|byte| byte.is_ascii_uppercase() || byte.is_ascii_digit())
}

/// The names beside `name` that say, while they are there, that it is not finished: NeMo's.
pub(super) fn marks_of(name: &[u8]) -> impl Iterator<Item = Vec<u8>> {
    let mark = |stem: &[u8]| [stem, b"-unfinished"].concat();
    [Some(mark(name)), name.strip_suffix(b".ckpt").map(mark)].into_iter().flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_usual_writers() {
        for name in [
            "a.tmp",
            "a.temp",
            "tmp-checkpoint-500",
            "x.part",
            "x.partial",
            "x.crdownload",
            "weights.incomplete",
            "step_5-unfinished",
            ".~lock.x#",
            ".notes.swp",
            "file~",
            ".nfs000000000123",
            ".model.safetensors.aB3xY9",
            "checkpoint_tmp_000",
            "checkpoint_tmp",
            ".metadata.tmp",
            ".data.lockstep",
        ] {
            assert!(is_temporary(name.as_bytes()), "{name}");
        }
        for name in [
            "a",
            "tmp",
            ".tmp",
            "tmp-checkpoint",
            "part",
            "partial",
            "~",
            ".swp",
            "model.swp",
            ".metadata",
            "checkpoint-500",
            "latest",
            ".config.backup",
            "a.b.aB3xY9",
            ".aB3xY9",
            "..aB3xY9",
            "unfinished",
            "-unfinished",
            "nfs1",
        ] {
            assert!(!is_temporary(name.as_bytes()), "{name}");
        }
        assert!(is_temporary(b"caf\xe9.tmp") && is_temporary(b"two\nlines.tmp"));
        assert_eq!(marks_of(b"a.ckpt").collect::<Vec<_>>(), [b"a.ckpt-unfinished".to_vec(), b"a-unfinished".to_vec()]);
    }
}
