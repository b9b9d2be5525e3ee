//! A small tree as a training run leaves it: weights, an index, a pointer, labels, logs, a script, an update.

use std::fs;
use std::io;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::Path;

const WEIGHT_BYTES: usize = 16 << 20;
const SHARDS: usize = 2;
const SAMPLES: usize = 200;

/// The rules that the sample's receiver enforces, whatever a sender asks for.
pub(super) const POLICY: &str = r#"[[rule]]
match = "**/"
mode = "750"

[[rule]]
match = "*"
mode = "640"

[[rule]]
match = "*.safetensors"      # weights: for their owner alone
mode = "600"

[[rule]]
match = "labels.txt"
mode = "600"

[[rule]]
match = "logs/"              # sticky: only a file's owner deletes it
mode = "1774"

[[rule]]
match = "*.sh"
mode = "750"

[[rule]]
match = "update.bin"         # executable, once what lies on the disk is verified
mode = "744"
execute = "after-verify"
"#;

/// What the sample's paths show in the listing of permissions.
pub(super) const SHOWN: [&str; 6] =
    ["model-00001-of-00002.safetensors", "dataset/labels.txt", "logs", "logs/train.log", "train.sh", "update.bin"];

/// Pseudo-random bits (xorshift64*), the same at each run.
struct Noise(u64);

impl Noise {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// `bytes` of weights in bf16, roughly normally distributed around zero.
    fn weights(&mut self, bytes: usize) -> Vec<u8> {
        let mut out = Vec::with_capacity(bytes);
        while out.len() < bytes {
            let bits = self.next();
            let sum: f32 = (0..4).map(|part| ((bits >> (16 * part)) & 0xffff) as f32 / 65536.0 - 0.5).sum();
            out.extend_from_slice(&(sum * 0.04).to_le_bytes()[2..]);
        }
        out
    }
}

/// Makes the sample at `at`, which is not there yet.
pub(super) fn make(at: &Path) -> io::Result<()> {
    for directory in ["dataset/images", "logs"] {
        fs::create_dir_all(at.join(directory))?;
    }
    let mut noise = Noise(0x9e37_79b9_7f4a_7c15);
    for shard in 1..=SHARDS {
        let name = format!("model-{shard:05}-of-{SHARDS:05}.safetensors");
        fs::write(at.join(name), noise.weights(WEIGHT_BYTES / SHARDS))?;
    }
    let shards: Vec<String> = (1..=SHARDS)
        .map(|shard| format!("  \"layer.{shard}\": \"model-{shard:05}-of-{SHARDS:05}.safetensors\""))
        .collect();
    let index = format!("{{\"weight_map\": {{\n{}\n}}}}\n", shards.join(",\n"));
    fs::write(at.join("model.safetensors.index.json"), index)?;
    let mut labels = String::new();
    for number in 0..SAMPLES {
        let name = format!("images/{number:04}.bin");
        let length = 500 + (noise.next() % 4000) as usize;
        fs::write(at.join("dataset").join(&name), noise.weights(length))?;
        labels.push_str(&format!("{name} {}\n", noise.next() % 10));
    }
    fs::write(at.join("dataset/labels.txt"), labels)?;
    let log: String = (0..50).map(|step| format!("step {step} loss {:.3}\n", 9.0 / f64::from(step + 1))).collect();
    fs::write(at.join("logs/train.log"), log)?;
    fs::write(at.join("train.sh"), "#!/bin/sh\nexec python train.py --resume latest\n")?;
    fs::write(at.join("update.bin"), noise.weights(64 << 10))?;
    fs::set_permissions(at.join("train.sh"), fs::Permissions::from_mode(0o755))?;
    symlink("model.safetensors.index.json", at.join("latest"))
}
