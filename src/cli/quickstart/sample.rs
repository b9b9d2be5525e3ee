//! What the tour shows itself with when no directory is given: a small training run.

use std::fs::{self, File};
use std::io::{self, BufWriter, Write as _};
use std::path::Path;

/// Rules that a server of such data could have. The order counts: the last that matches decides.
pub(super) const POLICY: &str = "\
[[rule]]                    # weights are their owner's alone
match = \"*.safetensors\"
mode = \"600\"

[[rule]]                    # so are annotated labels
match = \"labels.txt\"
mode = \"600\"

[[rule]]                    # the group writes logs, only a file's owner deletes it (sticky)
match = \"logs/\"
mode = \"1774\"

[[rule]]                    # scripts can be run
match = \"*.sh\"
mode = \"755\"

[[rule]]
match = \"*.py\"
mode = \"750\"

[[rule]]                    # an update can be run, but only after its SHA-256 was checked on the receiver's disk
match = \"update.bin\"
mode = \"744\"
";

const SHARDS: u64 = 2;
const SHARD_BYTES: usize = 32 << 20;
/// The file that the second push finds changed.
pub(super) const CHANGED: &str = "dataset/part-042.jsonl";

/// Makes the sample at `at`, which is not there yet.
pub(super) fn make(at: &Path) -> io::Result<()> {
    let checkpoint = at.join("checkpoint-1000");
    for directory in [&checkpoint, &at.join("dataset"), &at.join("logs")] {
        fs::create_dir_all(directory)?;
    }
    for number in 1..=SHARDS {
        shard(&checkpoint.join(format!("model-{number:05}-of-{SHARDS:05}.safetensors")), number)?;
    }
    let map: Vec<String> = (1..=SHARDS)
        .map(|number| format!("\"layers.{number}.weight\": \"model-{number:05}-of-{SHARDS:05}.safetensors\""))
        .collect();
    let index = format!("{{\"weight_map\": {{{}}}}}\n", map.join(", "));
    fs::write(checkpoint.join("model.safetensors.index.json"), index)?;
    fs::write(at.join("latest"), "checkpoint-1000\n")?;
    for part in 0..300_u64 {
        let lines: String = (0..20)
            .map(|line| format!("{{\"id\": {}, \"text\": \"sample {line} of part {part}\"}}\n", part * 20 + line))
            .collect();
        fs::write(at.join(format!("dataset/part-{part:03}.jsonl")), lines)?;
    }
    fs::write(at.join("logs/train.log"), "step 1000 loss 1.92\n")?;
    fs::write(at.join("train.sh"), "#!/bin/sh\nexec python3 train.py --resume checkpoint-1000\n")?;
    fs::write(at.join("train.py"), "print('training')\n")?;
    fs::write(at.join("labels.txt"), "img-0001 cat\nimg-0002 dog\n")?;
    fs::write(at.join("update.bin"), "#!/bin/sh\necho updated\n")
}

/// Numbers as trained weights in bf16 are: sign and mantissa are noise, exponents crowd below one.
fn shard(path: &Path, seed: u64) -> io::Result<()> {
    let mut file = BufWriter::with_capacity(1 << 20, File::create(path)?);
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    for _ in 0..SHARD_BYTES / 4 {
        // xorshift64
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        let weight = |noise: u32| {
            let exponent = 122 - (noise >> 16).trailing_zeros().min(15);
            (noise & 0x807f) | exponent << 7
        };
        let pair = weight(state as u32) | weight((state >> 32) as u32) << 16;
        file.write_all(&pair.to_le_bytes())?;
    }
    file.flush()
}
