//! zstd frames, one a message, byte planes of numbers ([`planes`]), and whether making either pays ([`choose`]).
//!
//! What always holds: a zstd frame declares its content size, carries a checksum, and is refused before anything is
//! allocated when it asks for more than its message declared or for a window beyond 8 MiB.

use std::cell::RefCell;

use serde::{Deserialize, Serialize};

pub mod choose;
pub mod chunks;
pub mod planes;
pub mod sums;
#[cfg(test)]
#[path = "../../tests/kit/weights.rs"]
mod weights;

pub use choose::{Chooser, Once, PLANES_RATE, Place, Way, ZSTD_RATE, level_elsewhere, pays};
pub use planes::Layout;

/// The largest window a frame may ask for, in bytes.
pub const WINDOW_MAX: u64 = 8 << 20;
/// What the codecs are called, each at its number.
pub const NAMES: [&str; 3] = ["raw", "zstd", PLANES];
/// By which a peer says that it reads byte planes.
pub const PLANES: &str = "planes";
/// The number of byte planes.
pub const PLANES_NUMBER: u8 = 2;

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
    #[error("the byte planes have a layout, or a plane is coded in a way, that there is not")]
    Layout,
    #[error(
        "the byte planes are truncated, are followed by other bytes, or have another length than their message says"
    )]
    Planes,
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

/// How content is coded that is not sent as it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Coding {
    /// In one zstd frame of this level.
    Zstd(i32),
    /// In byte planes.
    Planes(Layout),
}

impl Coding {
    /// What a message says for it: the place of its name in [`NAMES`].
    pub fn number(self) -> u8 {
        match self {
            Coding::Zstd(_) => 1,
            Coding::Planes(_) => PLANES_NUMBER,
        }
    }

    /// Appends `data`, coded, to `out`.
    ///
    /// # Errors
    /// [`CodecError::Compress`], as [`compress`] and [`planes::encode`].
    pub fn encode(self, data: &[u8], out: &mut Vec<u8>) -> Result<(), CodecError> {
        match self {
            Coding::Zstd(level) => compress(data, level, out),
            Coding::Planes(layout) => planes::encode(data, layout, out),
        }
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
        compress_by(compressor, data, out)
    })
}

fn compress_by(compressor: &mut zstd::bulk::Compressor<'_>, data: &[u8], out: &mut Vec<u8>) -> Result<(), CodecError> {
    let start = out.len();
    out.resize(start + zstd::zstd_safe::compress_bound(data.len()), 0);
    let written = compressor.compress_to_buffer(data, &mut out[start..]).map_err(|_| CodecError::Compress)?;
    out.truncate(start + written);
    Ok(())
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
}
