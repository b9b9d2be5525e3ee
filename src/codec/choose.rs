//! How a block is coded: by a sample of it, by how fast the link is, and by what the processors have to do.

use std::array::from_fn;
use std::sync::OnceLock;
use std::time::Instant;

use super::{CodecError, Coding, CompressOptions, Layout, planes};

/// How much of a block the chooser looks at.
pub const SAMPLE_BYTES: usize = 64 * 1024;
/// And in how much of that bytes are counted.
const COUNTED_BYTES: usize = 8 * 1024;
/// From how many places.
const PIECES: usize = 8;
/// A block is taken for what another block of its file was so many times at most before one is looked at again.
const TRUSTED: u32 = 16;
/// What is larger than this fraction of itself afterwards is sent as it is.
const WORTHWHILE: f64 = 0.95;

/// What the coding of one block has come to, for all who send the same block: the first of them does it.
#[derive(Debug, Default)]
pub struct Once {
    sample: OnceLock<Option<Sample>>,
    frame: OnceLock<Made>,
}

#[derive(Debug)]
struct Made {
    coding: Coding,
    /// With the room that was left for it: to give that back would be one more copy.
    frame: Result<Vec<u8>, CodecError>,
}

impl Once {
    /// As [`Coding::encode`] of `data`, which is always the same. Who wants another coding than the first does it himself.
    ///
    /// # Errors
    /// As [`Coding::encode`].
    pub fn encode(&self, coding: Coding, data: &[u8], out: &mut Vec<u8>) -> Result<(), CodecError> {
        let made = self.frame.get_or_init(|| {
            let mut frame = Vec::new();
            Made { coding, frame: coding.encode(data, &mut frame).map(|()| frame) }
        });
        if made.coding != coding {
            return coding.encode(data, out);
        }
        out.extend_from_slice(made.frame.as_deref().map_err(|error| *error)?);
        Ok(())
    }
}

/// What coding a sample has come to.
#[derive(Debug, Clone, Copy)]
struct Cost {
    /// The size afterwards, as a fraction of the size before.
    ratio: f64,
    /// Bytes a second that went in.
    rate: f64,
}

impl Cost {
    /// `None` where it cannot be coded.
    fn measure(coding: Coding, data: &[u8]) -> Option<Cost> {
        let mut frame = Vec::with_capacity(data.len() + data.len() / 8 + 1024);
        let started = Instant::now();
        coding.encode(data, &mut frame).ok()?;
        let seconds = started.elapsed().as_secs_f64().max(1e-7);
        Some(Cost { ratio: frame.len() as f64 / data.len() as f64, rate: data.len() as f64 / seconds })
    }
}

/// What a part of a block has shown.
#[derive(Debug, Clone, Copy)]
struct Sample {
    zstd: Cost,
    /// Where byte planes are better than that. The layout is that of the block.
    planes: Option<(Layout, Cost)>,
}

impl Sample {
    fn take(data: &[u8], level: i32) -> Option<Sample> {
        let sample = spread(data, SAMPLE_BYTES);
        let zstd = Cost::measure(Coding::Zstd(level), &sample)?;
        let planes = planes::guess(&spread(&sample, COUNTED_BYTES)).and_then(|(layout, ratio)| {
            // In a whole block zstd finds more to refer to than in a sample: planes have to be clearly better.
            let enough = zstd.ratio - 0.02;
            let cost = if ratio < enough { Cost::measure(Coding::Planes(layout), &sample) } else { None };
            cost.filter(|cost| cost.ratio < enough).map(|cost| (layout, cost))
        });
        Some(Sample { zstd, planes })
    }
}

/// About `wanted` bytes of `data` in pieces from all over it, in which numbers of up to four bytes lie as they do there.
fn spread(data: &[u8], wanted: usize) -> Vec<u8> {
    if data.len() <= wanted {
        return data.to_vec();
    }
    let (piece, step) = (wanted / PIECES, (data.len() - wanted / PIECES) / (PIECES - 1));
    let pieces: [&[u8]; PIECES] = from_fn(|number| &data[number * step / 4 * 4..][..piece]);
    pieces.concat()
}

/// How content goes to the other side. `None` is what nobody knows yet.
#[derive(Debug, Clone, Copy, Default)]
pub struct Way {
    /// Bytes a second that the link carries.
    pub link_rate: Option<f64>,
    /// Processors of this machine that have nothing to do.
    pub idle_processors: Option<f64>,
}

/// By this factor compressing has to be faster than the link where it is known that a processor has nothing else to do.
const MARGIN: f64 = 1.2;
/// And where that is not known, since it takes the processor from hashing and from the cipher.
const MARGIN_BLIND: f64 = 2.0;
/// So much of a processor has to be free for compressing.
const IDLE_MIN: f64 = 0.2;
/// And for more than the least of it.
const IDLE_MIN_HIGHER: f64 = 0.5;
/// Levels of zstd that are taken where the link is what is waited for, from the fastest on.
const HIGHER: [i32; 3] = [3, 6, 9];
/// Bytes a second that they are taken to take in where nobody has measured it.
const HIGHER_RATES: [f64; 3] = [200e6, 80e6, 40e6];
/// A higher level has to bring content over in less than this fraction of the time.
const WORTH_A_LEVEL: f64 = 0.98;

/// A block, and where it lies.
#[derive(Debug, Clone, Copy)]
pub struct Place<'a> {
    /// The number of the file, or any number for what is no part of one.
    pub file: u32,
    /// Where in the file it begins.
    pub offset: u64,
    /// Of the block, where others send it too.
    pub once: Option<&'a Once>,
}

/// What a block of a file has shown, for those that follow it.
#[derive(Debug, Clone, Copy)]
struct Known {
    file: u32,
    /// Where the block began.
    offset: u64,
    sample: Option<Sample>,
    /// The level of zstd that was found best for the link.
    level: Option<i32>,
    /// So many more blocks are taken for the same.
    left: u32,
    /// As many as were, when the block was looked at.
    trusted: u32,
}

/// Decides for one worker how a block is coded.
#[derive(Debug)]
pub struct Chooser {
    options: CompressOptions,
    /// Whether the other side reads byte planes.
    planes: bool,
    /// Bytes a second that zstd takes in here.
    zstd_rate: f64,
    /// And byte planes.
    planes_rate: f64,
    known: Option<Known>,
}

impl Chooser {
    /// A chooser that has seen nothing yet, for an other side that reads byte planes or does not.
    pub fn new(options: CompressOptions, planes: bool) -> Chooser {
        Chooser { options, planes, zstd_rate: ZSTD_RATE, planes_rate: PLANES_RATE, known: None }
    }

    /// How to code `data`, which lies at `place`; `None` to send it as it is. `way` is what it goes by.
    pub fn coding(&mut self, place: Place<'_>, data: &[u8], way: Way) -> Option<Coding> {
        if !self.options.enabled || data.len() < 64 {
            return None;
        }
        if let Some(level) = self.options.level {
            return self.smallest(place, data, level).map(|(coding, _)| coding);
        }
        // Where no processor is free it is not the link that is waited for, however slow that looks.
        if way.idle_processors.is_some_and(|idle| idle < IDLE_MIN) {
            return None;
        }
        let (coding, ratio) = self.smallest(place, data, 1)?;
        let is_planes = matches!(coding, Coding::Planes(_));
        let rate = if is_planes { self.planes_rate } else { self.zstd_rate };
        if !pays(ratio, rate, way) {
            return None;
        }
        Some(if is_planes { coding } else { Coding::Zstd(self.level(data, way)) })
    }

    /// The level of zstd by which content like the block that was just looked at arrives soonest: the slower the link, the higher.
    fn level(&mut self, data: &[u8], way: Way) -> i32 {
        let rate = self.zstd_rate;
        let Some(known) = self.known.as_mut() else { return 1 };
        if let (None, Some(sample)) = (known.level, known.sample) {
            known.level = Some(highest(Cost { rate, ..sample.zstd }, data, way));
        }
        known.level.unwrap_or(1)
    }

    /// What makes `data` smallest, with zstd at `level`, and the fraction that it comes to; `None` where nothing makes it
    /// smaller.
    pub fn smallest(&mut self, place: Place<'_>, data: &[u8], level: i32) -> Option<(Coding, f64)> {
        let Known { offset, sample, .. } = self.look(place, data, level);
        let sample = sample?;
        let planes = sample
            .planes
            .filter(|_| self.planes)
            .map(|(layout, cost)| (Coding::Planes(layout.moved(place.offset.wrapping_sub(offset))), cost.ratio));
        let (coding, ratio) = planes.unwrap_or((Coding::Zstd(level), sample.zstd.ratio));
        (ratio <= WORTHWHILE).then_some((coding, ratio))
    }

    /// What is known of the file that `data` is a block of.
    fn look(&mut self, place: Place<'_>, data: &[u8], level: i32) -> Known {
        let before = self.known.filter(|known| known.file == place.file);
        if let Some(known) = self.known.as_mut().filter(|known| known.file == place.file && known.left > 0) {
            known.left -= 1;
            return *known;
        }
        let take = || Sample::take(data, level);
        let sample = place.once.map_or_else(take, |once| *once.sample.get_or_init(take));
        if let Some(sample) = sample {
            let learn = |rate: &mut f64, cost: Cost| *rate = 0.7 * *rate + 0.3 * cost.rate;
            learn(&mut self.zstd_rate, sample.zstd);
            sample.planes.into_iter().for_each(|(_, cost)| learn(&mut self.planes_rate, cost));
        }
        // A file begins with a header more often than not: the first blocks say little of those that follow.
        let trusted = before.map_or(1, |known| (2 * known.trusted).min(TRUSTED));
        let known = Known { file: place.file, offset: place.offset, sample, level: None, left: trusted - 1, trusted };
        self.known = Some(known);
        known
    }
}

/// The level that is worth its time for content like `data`, of which level 1 costs `least`.
fn highest(least: Cost, data: &[u8], way: Way) -> i32 {
    let idle = way.idle_processors.is_some_and(|idle| idle >= IDLE_MIN_HIGHER);
    let Some(link_rate) = way.link_rate.filter(|_| idle) else { return 1 };
    let (mut best, mut cost, sample) = (1, least, spread(data, SAMPLE_BYTES));
    for level in HIGHER {
        // It is not worth a look where the one before it takes half of the time: each takes twice as long, and more.
        if 2.0 * MARGIN_BLIND / cost.rate > cost.ratio / link_rate {
            break;
        }
        let Some(next) = Cost::measure(Coding::Zstd(level), &sample) else { break };
        let arrives = |cost: Cost| (MARGIN_BLIND / cost.rate).max(cost.ratio / link_rate);
        if arrives(next) < WORTH_A_LEVEL * arrives(cost) {
            (best, cost) = (level, next);
        }
    }
    best
}

/// The level to ask another machine for, whose processors nobody here knows, of content that level 1 makes so small.
pub fn level_elsewhere(ratio: f64, link_rate: f64) -> i32 {
    let waits = |(_, rate): &(i32, f64)| 2.0 * MARGIN_BLIND / rate < ratio / link_rate;
    HIGHER.into_iter().zip(HIGHER_RATES).take_while(waits).last().map_or(1, |(level, _)| level)
}

/// Bytes a second that zstd is taken to take in where nobody has measured it.
pub const ZSTD_RATE: f64 = 400e6;
/// And byte planes.
pub const PLANES_RATE: f64 = 1e9;

/// Whether compressing makes a byte arrive sooner: it and the sending overlap, so the slower of them counts.
pub fn pays(ratio: f64, compress_rate: f64, way: Way) -> bool {
    // A link nobody has measured is taken for a gigabit one.
    let link_rate = way.link_rate.unwrap_or(118e6);
    let margin = if way.idle_processors.is_some() { MARGIN } else { MARGIN_BLIND };
    (margin / compress_rate).max(ratio / link_rate) < 1.0 / link_rate
}

#[cfg(test)]
mod tests;
