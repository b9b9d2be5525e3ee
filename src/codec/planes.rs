//! Byte planes: the bytes of numbers that have the same place in each, together, so that each kind is coded for what it is.
//!
//! The exponents of weights take few values, and their mantissas are noise. A number is rotated by one bit first, which
//! puts the exponent of a bf16 or an fp32 into a byte of its own, and the sign to the mantissa; of an fp16 the five bits of
//! the exponent share a byte with three of the mantissa. `docs/protocol.md` has the format.
//!
//! What always holds: nothing is allocated for a frame but what the declared length asks for.

use std::cell::RefCell;

use zstd::zstd_safe::{CParameter, ParamSwitch, min_c_level};

use super::{CodecError, compress_by, decompress};

/// A plane that is there as it is.
const STORED: u8 = 0;
/// A plane in a zstd frame.
const CODED: u8 = 1;
/// Bits of entropy in a byte beyond which coding a plane is not worth the reader's time.
const NOISE_BITS: f64 = 7.75;
/// How many bytes of a plane are counted for that, at the least.
const COUNTED: usize = 4096;

/// Where the numbers of a block lie, and what they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Layout {
    width: u8,
    phase: u8,
    rotated: bool,
}

impl Layout {
    /// Numbers of `width` (1, 2 or 4) bytes, of which the first begins at byte `phase`, rotated by one bit or not. `None` when
    /// there is no such layout: a phase is less than the width, and single bytes are not rotated.
    pub fn new(width: usize, phase: usize, rotated: bool) -> Option<Layout> {
        let is_one = matches!(width, 1 | 2 | 4) && phase < width && !(width == 1 && rotated);
        is_one.then_some(Layout { width: width as u8, phase: phase as u8, rotated })
    }

    /// Bytes of a number.
    pub fn width(self) -> usize {
        usize::from(self.width)
    }

    /// Bytes in front of the first whole number.
    pub fn phase(self) -> usize {
        usize::from(self.phase)
    }

    /// The same numbers in a block that begins `distance` bytes further on, modulo 2^64.
    #[must_use]
    pub fn moved(self, distance: u64) -> Layout {
        let phase = u64::from(self.phase).wrapping_sub(distance) % u64::from(self.width);
        Layout { phase: phase as u8, ..self }
    }

    /// Bits 0 and 1: the logarithm of the width; bit 2: rotated; bits 4 and 5: the phase.
    fn to_byte(self) -> u8 {
        self.width.trailing_zeros() as u8 | u8::from(self.rotated) << 2 | self.phase << 4
    }

    fn of_byte(byte: u8) -> Option<Layout> {
        let layout = Layout::new(1 << (byte & 3), usize::from(byte >> 4), byte & 4 != 0)?;
        (layout.to_byte() == byte).then_some(layout)
    }

    /// How many whole numbers `length` bytes hold.
    fn count(self, length: usize) -> Option<usize> {
        length.checked_sub(self.phase()).map(|rest| rest / self.width())
    }
}

thread_local! {
    /// Planes, one after the other.
    static PLANES: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
    static LITERALS: RefCell<Option<zstd::bulk::Compressor<'static>>> = const { RefCell::new(None) };
}

/// Appends `data` in planes of this layout to `out`.
///
/// # Errors
/// [`CodecError::Compress`]: `data` is shorter than the phase, or memory is short.
pub fn encode(data: &[u8], layout: Layout, out: &mut Vec<u8>) -> Result<(), CodecError> {
    let count = layout.count(data.len()).ok_or(CodecError::Compress)?;
    let (head, rest) = data.split_at(layout.phase());
    let (numbers, tail) = rest.split_at(count * layout.width());
    out.push(layout.to_byte());
    out.extend_from_slice(head);
    out.extend_from_slice(tail);
    if layout.width == 1 {
        return put_plane(numbers, out);
    }
    PLANES.with_borrow_mut(|planes| {
        planes.resize(numbers.len(), 0);
        match layout.width {
            2 => split_2(numbers, layout.rotated, planes),
            _ => split_4(numbers, layout.rotated, planes),
        }
        (0..layout.width()).try_for_each(|at| put_plane(&planes[at * count..(at + 1) * count], out))
    })
}

/// Appends a plane: how it is coded, its length, and its bytes.
fn put_plane(plane: &[u8], out: &mut Vec<u8>) -> Result<(), CodecError> {
    let start = out.len();
    out.push(CODED);
    out.extend_from_slice(&[0; 4]);
    if !is_noise(plane) {
        put_literals(plane, out)?;
    }
    let mut length = out.len() - start - 5;
    if length == 0 || length > plane.len() - plane.len() / 32 {
        out.truncate(start + 5);
        out.extend_from_slice(plane);
        out[start] = STORED;
        length = plane.len();
    }
    out[start + 1..start + 5].copy_from_slice(&(length as u32).to_be_bytes());
    Ok(())
}

/// Appends a zstd frame in which nothing is searched for: Huffman codes and nothing else, four times as fast as level 1 on
/// exponents, and smaller, since the short matches that are found there take more than they save.
fn put_literals(plane: &[u8], out: &mut Vec<u8>) -> Result<(), CodecError> {
    LITERALS.with_borrow_mut(|slot| {
        if slot.is_none() {
            let failed = |_| CodecError::Compress;
            let mut made = zstd::bulk::Compressor::new(min_c_level()).map_err(failed)?;
            made.include_checksum(true).map_err(failed)?;
            made.include_contentsize(true).map_err(failed)?;
            made.set_parameter(CParameter::LiteralCompressionMode(ParamSwitch::Enable)).map_err(failed)?;
            *slot = Some(made);
        }
        compress_by(slot.as_mut().ok_or(CodecError::Compress)?, plane, out)
    })
}

/// Appends the content of `frame`, which its message says is `raw_length` bytes, to `out`.
///
/// # Errors
/// [`CodecError`]. The caller has bounded `raw_length`.
pub fn decode(frame: &[u8], raw_length: usize, out: &mut Vec<u8>) -> Result<(), CodecError> {
    let (&byte, rest) = frame.split_first().ok_or(CodecError::Planes)?;
    let layout = Layout::of_byte(byte).ok_or(CodecError::Layout)?;
    let count = layout.count(raw_length).ok_or(CodecError::Planes)?;
    let (head, rest) = rest.split_at_checked(layout.phase()).ok_or(CodecError::Planes)?;
    let tail = raw_length - layout.phase() - count * layout.width();
    let (tail, mut rest) = rest.split_at_checked(tail).ok_or(CodecError::Planes)?;
    let mut found = [(STORED, &[][..]); 4];
    for plane in &mut found[..layout.width()] {
        *plane = take_plane(&mut rest, count)?;
    }
    if !rest.is_empty() {
        return Err(CodecError::Planes);
    }
    PLANES.with_borrow_mut(|decoded| {
        decoded.clear();
        for (_, data) in found.iter().filter(|(method, _)| *method == CODED) {
            decompress(data, count, decoded)?;
        }
        let mut decoded = decoded.as_slice();
        let planes = found.map(|(method, data)| if method == CODED { take(&mut decoded, count) } else { data });
        out.reserve(raw_length);
        out.extend_from_slice(head);
        let start = out.len();
        match layout.width {
            1 => out.extend_from_slice(planes[0]),
            width => {
                out.resize(start + count * usize::from(width), 0);
                let numbers = &mut out[start..];
                if width == 2 {
                    merge_2(planes, layout.rotated, numbers)
                } else {
                    merge_4(planes, layout.rotated, numbers)
                }
            }
        }
        out.extend_from_slice(tail);
        Ok(())
    })
}

/// Takes a plane of `count` bytes off the front: how it is coded, and what it is coded as.
fn take_plane<'a>(rest: &mut &'a [u8], count: usize) -> Result<(u8, &'a [u8]), CodecError> {
    let (&[method, length @ ..], data) = rest.split_first_chunk::<5>().ok_or(CodecError::Planes)?;
    let length = u32::from_be_bytes(length) as usize;
    let (data, left) = data.split_at_checked(length).ok_or(CodecError::Planes)?;
    *rest = left;
    match method {
        STORED if length == count => Ok((method, data)),
        STORED => Err(CodecError::Planes),
        CODED => Ok((method, data)),
        _ => Err(CodecError::Layout),
    }
}

/// Takes what was put there.
fn take<'a>(decoded: &mut &'a [u8], count: usize) -> &'a [u8] {
    let (plane, left) = decoded.split_at(count);
    *decoded = left;
    plane
}

/// What shifts a number of `bits` bits left and right so that it is rotated by one, or is itself.
fn shifts(rotated: bool, bits: u32) -> (u32, u32) {
    if rotated { (1, bits - 1) } else { (0, 0) }
}

// Loops that the compiler makes vector instructions of: they count, over slices whose lengths it knows to be the same.

fn split_2(numbers: &[u8], rotated: bool, planes: &mut [u8]) {
    let numbers = numbers.as_chunks::<2>().0;
    let (by, back) = shifts(rotated, u16::BITS);
    let (low, high) = planes.split_at_mut(numbers.len());
    let high = &mut high[..numbers.len()];
    for at in 0..numbers.len() {
        let number = u16::from_le_bytes(numbers[at]);
        let number = number << by | number >> back;
        low[at] = number as u8;
        high[at] = (number >> 8) as u8;
    }
}

fn split_4(numbers: &[u8], rotated: bool, planes: &mut [u8]) {
    let numbers = numbers.as_chunks::<4>().0;
    let (by, back) = shifts(rotated, u32::BITS);
    let (first, rest) = planes.split_at_mut(numbers.len());
    let (second, rest) = rest.split_at_mut(numbers.len());
    let (third, fourth) = rest.split_at_mut(numbers.len());
    let fourth = &mut fourth[..numbers.len()];
    for at in 0..numbers.len() {
        let number = u32::from_le_bytes(numbers[at]);
        let number = number << by | number >> back;
        first[at] = number as u8;
        second[at] = (number >> 8) as u8;
        third[at] = (number >> 16) as u8;
        fourth[at] = (number >> 24) as u8;
    }
}

fn merge_2([low, high, ..]: [&[u8]; 4], rotated: bool, numbers: &mut [u8]) {
    let numbers = numbers.as_chunks_mut::<2>().0;
    let (by, back) = shifts(rotated, u16::BITS);
    let (low, high) = (&low[..numbers.len()], &high[..numbers.len()]);
    for at in 0..numbers.len() {
        let number = u16::from_le_bytes([low[at], high[at]]);
        numbers[at] = (number >> by | number << back).to_le_bytes();
    }
}

fn merge_4(planes: [&[u8]; 4], rotated: bool, numbers: &mut [u8]) {
    let numbers = numbers.as_chunks_mut::<4>().0;
    let (by, back) = shifts(rotated, u32::BITS);
    let [first, second, third, fourth] = planes.map(|plane| &plane[..numbers.len()]);
    for at in 0..numbers.len() {
        let number = u32::from_le_bytes([first[at], second[at], third[at], fourth[at]]);
        numbers[at] = (number >> by | number << back).to_le_bytes();
    }
}

/// How often each byte is there.
type Counts = [u32; 256];

/// Bits of entropy in a byte of those that were counted.
fn bits(counts: &Counts) -> f64 {
    let total = f64::from(counts.iter().sum::<u32>().max(1));
    let each = counts.iter().filter(|&&count| count > 0).map(|&count| f64::from(count));
    each.map(|count| count / total * (total / count).log2()).sum()
}

/// Whether a plane is not worth coding: by bytes all over it.
fn is_noise(plane: &[u8]) -> bool {
    let mut counts = [0; 256];
    // Odd, so that it has no period in common with rows of a matrix.
    let step = (plane.len() / COUNTED).saturating_sub(1) | 1;
    plane.iter().step_by(step).for_each(|&byte| counts[usize::from(byte)] += 1);
    // Few bytes have less entropy than what they were drawn from.
    plane.len() >= COUNTED && bits(&counts) > NOISE_BITS
}

/// The layout in which `sample` has the least entropy, and what it comes to then as a fraction of its size. `None` for noise.
pub fn guess(sample: &[u8]) -> Option<(Layout, f64)> {
    let mut single = [0; 256];
    sample.iter().for_each(|&byte| single[usize::from(byte)] += 1);
    if bits(&single) > 7.9 {
        return None;
    }
    let one = Layout::new(1, 0, false).map(|layout| (layout, bits(&single) / 8.0));
    let wider = [(2, 0), (2, 1), (4, 0), (4, 1), (4, 2), (4, 3)].into_iter().filter_map(|(width, phase)| {
        let layout = Layout::new(width, phase, true)?;
        Some((layout, fraction(sample, layout)))
    });
    // Two narrow numbers look like a wide one: that has to be better.
    let rank = |(layout, ratio): &(Layout, f64)| ratio + 0.002 * f64::from(layout.width);
    one.into_iter().chain(wider).min_by(|one, other| rank(one).total_cmp(&rank(other)))
}

fn fraction(sample: &[u8], layout: Layout) -> f64 {
    let numbers = sample.get(layout.phase()..).unwrap_or_default();
    let mut counts = [[0; 256]; 4];
    let mut count = |planes: &[u8]| {
        planes.iter().zip(&mut counts).for_each(|(&byte, counts)| counts[usize::from(byte)] += 1);
    };
    if layout.width == 2 {
        numbers
            .as_chunks::<2>()
            .0
            .iter()
            .for_each(|&number| count(&u16::from_le_bytes(number).rotate_left(1).to_le_bytes()));
    } else {
        numbers
            .as_chunks::<4>()
            .0
            .iter()
            .for_each(|&number| count(&u32::from_le_bytes(number).rotate_left(1).to_le_bytes()));
    }
    let each = counts[..layout.width()].iter().map(bits).map(|bits| if bits > NOISE_BITS { 8.0 } else { bits });
    each.sum::<f64>() / (8 * layout.width()) as f64
}

#[cfg(test)]
mod tests;
