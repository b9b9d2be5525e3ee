//! zstd frames, one a message, and whether making them pays.
//!
//! What always holds: a frame declares its content size, carries a checksum, and is refused before anything is
//! allocated when it asks for more than its message declared or for a window beyond 8 MiB.

use std::cell::RefCell;
use std::sync::OnceLock;
use std::time::Instant;

use serde::{Deserialize, Serialize};

pub mod chunks;

/// The largest window a frame may ask for, in bytes.
pub const WINDOW_MAX: u64 = 8 << 20;
/// How much of a file the chooser looks at.
pub const SAMPLE_BYTES: usize = 64 * 1024;

/// Why a frame is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs)]
pub enum CodecError {
    #[error("not a zstd frame")]
    NotAFrame,
    #[error("the zstd frame has no checksum, no content size, or needs a dictionary")]
    Header,
    #[error("the zstd frame declares another length than its message")]
    Length,
    #[error("the zstd frame asks for a window beyond 8 MiB")]
    Window,
    #[error("the zstd frame is truncated, or is followed by other bytes")]
    Extent,
    #[error("the zstd frame is damaged")]
    Damaged,
    #[error("compression failed")]
    Compress,
}

/// What the user asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct CompressOptions {
    /// A fixed level; `None` to choose by what pays.
    pub level: Option<i32>,
    /// Whether anything is compressed at all.
    pub enabled: bool,
}

impl Default for CompressOptions {
    fn default() -> Self {
        CompressOptions { level: None, enabled: true }
    }
}

thread_local! {
    static COMPRESSOR: RefCell<Option<(i32, zstd::bulk::Compressor<'static>)>> = const { RefCell::new(None) };
    static DECOMPRESSOR: RefCell<Option<zstd::bulk::Decompressor<'static>>> = const { RefCell::new(None) };
}

/// Appends one frame with the content `data` to `out`.
///
/// # Errors
/// [`CodecError::Compress`], which only a lack of memory or an impossible level brings about.
pub fn compress(data: &[u8], level: i32, out: &mut Vec<u8>) -> Result<(), CodecError> {
    COMPRESSOR.with_borrow_mut(|slot| {
        if slot.as_ref().is_none_or(|(has, _)| *has != level) {
            let mut made = zstd::bulk::Compressor::new(level).map_err(|_| CodecError::Compress)?;
            made.include_checksum(true).map_err(|_| CodecError::Compress)?;
            made.include_contentsize(true).map_err(|_| CodecError::Compress)?;
            if level > 15 {
                made.window_log(23).map_err(|_| CodecError::Compress)?;
            }
            *slot = Some((level, made));
        }
        let Some((_, compressor)) = slot else { return Err(CodecError::Compress) };
        let start = out.len();
        out.resize(start + zstd::zstd_safe::compress_bound(data.len()), 0);
        let written = compressor.compress_to_buffer(data, &mut out[start..]).map_err(|_| CodecError::Compress)?;
        out.truncate(start + written);
        Ok(())
    })
}

/// Appends the content of `frame`, which its message says is `raw_length` bytes, to `out`.
///
/// # Errors
/// [`CodecError`]; the length is compared with the frame's header before anything is allocated. The caller has
/// bounded `raw_length`.
pub fn decompress(frame: &[u8], raw_length: usize, out: &mut Vec<u8>) -> Result<(), CodecError> {
    check_header(frame, raw_length as u64)?;
    match zstd::zstd_safe::find_frame_compressed_size(frame) {
        Ok(length) if length == frame.len() => {}
        _ => return Err(CodecError::Extent),
    }
    DECOMPRESSOR.with_borrow_mut(|slot| {
        if slot.is_none() {
            *slot = Some(zstd::bulk::Decompressor::new().map_err(|_| CodecError::Damaged)?);
        }
        let Some(decompressor) = slot else { return Err(CodecError::Damaged) };
        let start = out.len();
        out.resize(start + raw_length, 0);
        match decompressor.decompress_to_buffer(frame, &mut out[start..]) {
            Ok(written) if written == raw_length => Ok(()),
            _ => {
                out.truncate(start);
                Err(CodecError::Damaged)
            }
        }
    })
}

/// Reads the header (RFC 8878, 3.1.1.1) and holds it against the bounds.
fn check_header(frame: &[u8], raw_length: u64) -> Result<(), CodecError> {
    let rest = frame.strip_prefix(&[0x28, 0xb5, 0x2f, 0xfd]).ok_or(CodecError::NotAFrame)?;
    let (&descriptor, mut rest) = rest.split_first().ok_or(CodecError::Extent)?;
    let single_segment = descriptor & 0x20 != 0;
    if descriptor & 0x04 == 0 || descriptor & 0x0b != 0 {
        return Err(CodecError::Header);
    }
    if !single_segment {
        let (&window, after) = rest.split_first().ok_or(CodecError::Extent)?;
        let base = 1_u64 << (10 + (window >> 3));
        if base + base / 8 * u64::from(window & 7) > WINDOW_MAX {
            return Err(CodecError::Window);
        }
        rest = after;
    }
    let width = match (descriptor >> 6, single_segment) {
        (0, false) => return Err(CodecError::Header),
        (0, true) => 1,
        (1, _) => 2,
        (2, _) => 4,
        _ => 8,
    };
    let field = rest.get(..width).ok_or(CodecError::Extent)?;
    let mut size = field.iter().rev().fold(0_u64, |sum, &byte| sum << 8 | u64::from(byte));
    if width == 2 {
        size += 256;
    }
    if size != raw_length {
        return Err(CodecError::Length);
    }
    if single_segment && size > WINDOW_MAX {
        return Err(CodecError::Window);
    }
    Ok(())
}

/// What the compressing of one block has come to, for all who send the same block: the first of them does it.
#[derive(Debug, Default)]
pub struct Once {
    sample: OnceLock<Option<Sample>>,
    frame: OnceLock<Made>,
}

#[derive(Debug)]
struct Made {
    level: i32,
    /// With the room that was left for it: to give that back would be one more copy.
    frame: Result<Vec<u8>, CodecError>,
}

impl Once {
    /// As [`compress`] of `data`, which is always the same. Who wants another level than the first compresses for himself.
    ///
    /// # Errors
    /// As [`compress`].
    pub fn compress(&self, data: &[u8], level: i32, out: &mut Vec<u8>) -> Result<(), CodecError> {
        let made = self.frame.get_or_init(|| {
            let mut frame = Vec::new();
            Made { level, frame: compress(data, level, &mut frame).map(|()| frame) }
        });
        if made.level != level {
            return compress(data, level, out);
        }
        out.extend_from_slice(made.frame.as_deref().map_err(|error| *error)?);
        Ok(())
    }
}

/// What the beginning of a file has shown.
#[derive(Debug, Clone, Copy)]
struct Sample {
    /// What it compressed to, as a fraction of its size.
    ratio: f64,
    /// Bytes a second that compressing took in.
    rate: f64,
}

impl Sample {
    /// `None` where it cannot be compressed.
    fn take(data: &[u8]) -> Option<Sample> {
        let started = Instant::now();
        let mut frame = Vec::new();
        compress(data, 1, &mut frame).ok()?;
        let seconds = started.elapsed().as_secs_f64().max(1e-7);
        Some(Sample { ratio: frame.len() as f64 / data.len() as f64, rate: data.len() as f64 / seconds })
    }
}

/// How content goes to the other side. `None` is what nobody knows yet.
#[derive(Debug, Clone, Copy, Default)]
pub struct Way {
    /// Bytes a second that the link carries.
    pub link_rate: Option<f64>,
    /// Processors of this machine that have nothing to do.
    pub idle_processors: Option<f64>,
}

/// So much of a processor has to be free for compressing.
const IDLE_MIN: f64 = 0.2;

/// Decides for one worker whether a block is compressed.
#[derive(Debug)]
pub struct Chooser {
    options: CompressOptions,
    /// What the last sample compressed to, as a fraction of its size.
    ratio: f64,
    /// Bytes a second that compression takes in here.
    compress_rate: f64,
    file: Option<u32>,
}

impl Chooser {
    /// A chooser that has seen nothing yet.
    pub fn new(options: CompressOptions) -> Chooser {
        Chooser { options, ratio: 1.0, compress_rate: 400e6, file: None }
    }

    /// The level to compress `data` of file `index` with; `None` to send it as it is. `way` is what it goes by; `once` is of the
    /// block, where others send it too.
    pub fn level(&mut self, index: u32, data: &[u8], way: Way, once: Option<&Once>) -> Option<i32> {
        if !self.options.enabled || data.len() < 64 {
            return None;
        }
        if self.file != Some(index) {
            self.file = Some(index);
            let take = || Sample::take(&data[..data.len().min(SAMPLE_BYTES)]);
            self.learn(once.map_or_else(take, |once| *once.sample.get_or_init(take)));
        }
        if self.ratio > 0.95 {
            return None;
        }
        if self.options.level.is_some() {
            return self.options.level;
        }
        // Where no processor is free it is not the link that is waited for, however slow that looks.
        let busy = way.idle_processors.is_some_and(|idle| idle < IDLE_MIN);
        (!busy && pays(self.ratio, self.compress_rate, way)).then_some(1)
    }

    fn learn(&mut self, sample: Option<Sample>) {
        self.ratio = sample.map_or(1.0, |sample| sample.ratio);
        if let Some(Sample { rate, .. }) = sample {
            self.compress_rate = 0.7 * self.compress_rate + 0.3 * rate;
        }
    }
}

/// Whether compressing makes a byte arrive sooner: it and the sending overlap, so the slower of them counts.
pub fn pays(ratio: f64, compress_rate: f64, way: Way) -> bool {
    // A link nobody has measured is taken for a gigabit one.
    let link_rate = way.link_rate.unwrap_or(118e6);
    // Compressing takes the processor from hashing and from the cipher: where it is not known that one is free, it has to be
    // clearly faster than the link.
    let margin = if way.idle_processors.is_some() { 1.2 } else { 2.0 };
    (margin / compress_rate).max(ratio / link_rate) < 1.0 / link_rate
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(data: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        compress(data, 3, &mut out).unwrap();
        out
    }

    #[test]
    fn round_trips_and_appends() {
        for size in [0, 1, 255, 256, 65_791, 524_288] {
            let data = vec![7; size];
            let mut out = b"head".to_vec();
            decompress(&frame(&data), size, &mut out).unwrap();
            assert_eq!(&out[4..], data);
        }
    }

    #[test]
    fn h20_a_bomb_is_stopped_at_the_declared_size() {
        let bomb = frame(&vec![0; 16 << 20]);
        let mut out = Vec::new();
        assert_eq!(decompress(&bomb, 32 * 1024, &mut out), Err(CodecError::Length));
        assert_eq!(out.capacity(), 0);
    }

    #[test]
    fn h21_damaged_frames_are_refused() {
        let data: Vec<u8> = (0..50_000_u32).flat_map(|n| (n * n).to_le_bytes()).collect();
        let good = frame(&data);
        let mut out = Vec::new();
        for length in [0, 3, 4, 5, 8, good.len() / 2, good.len() - 1] {
            assert!(decompress(&good[..length], data.len(), &mut out).is_err(), "{length}");
        }
        let twice = [&good[..], &good[..]].concat();
        assert_eq!(decompress(&twice, data.len(), &mut out), Err(CodecError::Extent));
        assert_eq!(decompress(&[&good[..], b"x"].concat(), data.len(), &mut out), Err(CodecError::Extent));
        for at in (0..good.len()).step_by(97) {
            let mut bad = good.clone();
            bad[at] ^= 0x10;
            assert!(decompress(&bad, data.len(), &mut out).is_err(), "bit at {at}");
        }
        let mut plain = zstd::bulk::Compressor::new(1).unwrap();
        plain.include_checksum(false).unwrap();
        let unchecked = plain.compress(&data).unwrap();
        assert_eq!(decompress(&unchecked, data.len(), &mut out), Err(CodecError::Header));
        assert!(out.is_empty());
    }

    #[test]
    fn h22_a_wide_window_is_refused() {
        // Descriptor: 8-byte size, checksum; window exponent 20: 1 GiB.
        let mut wide = vec![0x28, 0xb5, 0x2f, 0xfd, 0xc4, 20 << 3];
        wide.extend_from_slice(&100_u64.to_le_bytes());
        assert_eq!(decompress(&wide, 100, &mut Vec::new()), Err(CodecError::Window));
    }

    #[test]
    fn a_block_is_compressed_once_for_all_who_want_the_same_level() {
        let data: Vec<u8> = (0..100_000_u32).flat_map(|n| (n / 3).to_le_bytes()).collect();
        let once = Once::default();
        let (mut first, mut second, mut other) = (b"head".to_vec(), Vec::new(), Vec::new());
        once.compress(&data, 1, &mut first).unwrap();
        // What is taken from there is not made again, whatever it is given.
        once.compress(b"not looked at", 1, &mut second).unwrap();
        assert_eq!(first[4..], second);
        once.compress(&data, 9, &mut other).unwrap();
        assert!(other != second);
        for frame in [&second, &other] {
            let mut out = Vec::new();
            decompress(frame, data.len(), &mut out).unwrap();
            assert!(out == data);
        }
        // The sample as well: the second chooser believes the first.
        let mut choosers = [(); 2].map(|()| Chooser::new(CompressOptions::default()));
        let slow = Way { link_rate: Some(1e6), idle_processors: None };
        assert_eq!(choosers[0].level(0, &data, slow, Some(&once)), Some(1));
        assert_eq!(choosers[1].level(0, &[7; 100], slow, Some(&once)), Some(1));
        assert_eq!(choosers[0].ratio.to_bits(), choosers[1].ratio.to_bits());
    }

    #[test]
    fn compresses_only_what_pays() {
        let link = |rate, idle_processors| Way { link_rate: Some(rate), idle_processors };
        assert!(pays(0.5, 500e6, link(100e6, None)));
        assert!(!pays(0.5, 500e6, link(2e9, None)));
        assert!(!pays(1.0, 500e6, link(100e6, None)));
        assert!(!pays(0.5, 500e6, link(300e6, None)));
        assert!(pays(0.5, 500e6, link(300e6, Some(0.5))));
        let slow = Way { link_rate: Some(1e6), idle_processors: Some(1.5) };
        let mut chooser = Chooser::new(CompressOptions { level: None, enabled: true });
        assert_eq!(chooser.level(0, &vec![1; 100_000], Way { idle_processors: Some(0.1), ..slow }, None), None);
        assert_eq!(chooser.level(0, &vec![1; 100_000], slow, None), Some(1));
        let mut seen = [0_u8; 32];
        let random: Vec<u8> = (0..2048_u32)
            .flat_map(|n| {
                use sha2::Digest as _;
                seen = sha2::Sha256::digest([&seen[..], &n.to_be_bytes()].concat()).into();
                seen
            })
            .collect();
        assert_eq!(chooser.level(1, &random, slow, None), None);
        let mut off = Chooser::new(CompressOptions { level: Some(3), enabled: false });
        assert_eq!(off.level(0, &[1; 1000], Way::default(), None), None);
    }
}
