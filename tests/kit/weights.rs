//! Blocks to compress: weights as they are after training, noise and text. The same each time.
#![allow(
    dead_code,
    missing_docs,
    reason = "tests of the library, of the program and the benchmark take what they need"
)]

/// Numbers that are the same each time (xorshift64*).
pub(crate) struct Numbers(pub(crate) u64);

impl Numbers {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub(crate) fn below(&mut self, end: usize) -> usize {
        (self.next() % end.max(1) as u64) as usize
    }

    fn uniform(&mut self) -> f64 {
        ((self.next() >> 11) as f64 + 0.5) / (1_u64 << 53) as f64
    }

    /// Of a normal distribution about 0 (Box and Muller).
    fn weight(&mut self) -> f32 {
        let (radius, angle) = ((-2.0 * self.uniform().ln()).sqrt(), std::f64::consts::TAU * self.uniform());
        (0.02 * radius * angle.cos()) as f32
    }
}

fn weights(count: usize) -> impl Iterator<Item = f32> {
    let mut numbers = Numbers(0x9e37_79b9_7f4a_7c15);
    (0..count).map(move |_| numbers.weight())
}

pub(crate) fn fp32(count: usize) -> Vec<u8> {
    weights(count).flat_map(f32::to_le_bytes).collect()
}

pub(crate) fn bf16(count: usize) -> Vec<u8> {
    weights(count).flat_map(|weight| ((weight.to_bits() + 0x8000) >> 16).to_le_bytes()[..2].to_vec()).collect()
}

/// Rounded towards zero; what is too small for an exponent of its own becomes zero.
pub(crate) fn fp16(count: usize) -> Vec<u8> {
    let half = |weight: f32| {
        let (sign, magnitude) = (weight.to_bits() >> 16 & 0x8000, weight.to_bits() & 0x7fff_ffff);
        (sign | (magnitude >> 13).saturating_sub(112 << 10)) as u16
    };
    weights(count).flat_map(|weight| half(weight).to_le_bytes()).collect()
}

/// E5M2: what an fp16 begins with.
pub(crate) fn fp8(count: usize) -> Vec<u8> {
    fp16(count).iter().skip(1).step_by(2).copied().collect()
}

pub(crate) fn noise(length: usize) -> Vec<u8> {
    let mut numbers = Numbers(1);
    (0..length).map(|_| (numbers.next() >> 56) as u8).collect()
}

/// Lines of a log.
pub(crate) fn text(length: usize) -> Vec<u8> {
    let mut numbers = Numbers(2);
    let words = ["step", "loss", "gradient", "norm", "rank", "the", "epoch", "learning", "rate", "saved"];
    let mut text = Vec::with_capacity(length + 64);
    while text.len() < length {
        let number = numbers.next();
        let (one, two) = (words[(number >> 60) as usize % 10], words[(number >> 32) as usize % 10]);
        text.extend(format!("{one} {} {two} 0.{}\n", number % 5000, (number >> 16) % 10_000).into_bytes());
    }
    text.truncate(length);
    text
}
