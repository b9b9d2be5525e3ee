//! What a target has already: `alike` of a push and its answer; `wants` and `parts` of a pull, where it is the source that asks.

use super::extension::{Fields, PART_CHUNKS_MAX, WireError};
use crate::codec::chunks::{
    self, Alike, BLOCK_LENGTH, Beginning, Chunk, ChunkId, Cut, Order, PIECES_MAX, Part, RANGES_MAX, Wanted, Within,
};

/// What an answer begins with.
const NOTHING: u8 = 0;
const PART: u8 = 1;
const SAME: u8 = 2;
const GROWN: u8 = 3;

const CUTS: [Cut; 3] = [Cut::ByContent, Cut::ByLength, Cut::BySum];

fn read_cut(fields: &mut Fields<'_>) -> Result<Cut, WireError> {
    CUTS.get(usize::from(fields.u8()?)).copied().ok_or(WireError::Range("how a file is cut"))
}

/// Appends what is asked for.
pub fn put_wanted(out: &mut Vec<u8>, wanted: &Wanted) {
    out.extend_from_slice(&wanted.from.piece.to_be_bytes());
    out.extend_from_slice(&wanted.from.offset.to_be_bytes());
    out.extend_from_slice(&wanted.to.to_be_bytes());
    out.push(wanted.cut as u8);
}

/// Reads it.
///
/// # Errors
/// [`WireError`].
pub fn read_wanted(fields: &mut Fields<'_>) -> Result<Wanted, WireError> {
    let from = Within { piece: fields.u32()?, offset: fields.u64()? };
    Ok(Wanted { from, to: fields.u64()?, cut: read_cut(fields)? })
}

/// Appends what a target has that a file may be made of.
pub fn put_alike(out: &mut Vec<u8>, alike: Option<&Alike>) {
    let Some(alike) = alike else { return out.push(NOTHING) };
    let kind = match (alike.same, alike.there) {
        (true, _) => SAME,
        (_, Some(_)) => GROWN,
        (_, None) => PART,
    };
    out.extend_from_slice(&[kind, alike.pieces as u8, alike.cut as u8]);
    out.extend_from_slice(&alike.next.unwrap_or(0).to_be_bytes());
    if let Some(there) = alike.there.filter(|_| kind == GROWN) {
        out.extend_from_slice(&there.length.to_be_bytes());
        out.extend_from_slice(&there.digest.0);
    }
    if alike.cut == Cut::BySum {
        let length: u64 = alike.chunks.iter().map(|chunk| u64::from(chunk.length)).sum();
        out.extend_from_slice(&length.to_be_bytes());
    }
    for chunk in &alike.chunks {
        match chunk.id {
            ChunkId::Content(id) => {
                out.extend_from_slice(&id);
                out.extend_from_slice(&chunk.length.to_be_bytes());
            }
            // All are blocks of one length, but for the last.
            ChunkId::Sum(sum) => out.extend_from_slice(&sum.to_be_bytes()),
        }
    }
}

/// Reads it, where it was asked for from `from` on.
///
/// # Errors
/// [`WireError`].
pub fn read_alike(mut fields: Fields<'_>, from: u64) -> Result<Option<Alike>, WireError> {
    let kind = fields.u8()?;
    if kind == NOTHING {
        return fields.end().map(|()| None);
    }
    let same = kind == SAME;
    let pieces = u32::from(fields.u8()?);
    if pieces > PIECES_MAX {
        return Err(WireError::Range("the number of files"));
    }
    let (cut, next) = (read_cut(&mut fields)?, fields.u64()?);
    let there = match kind {
        GROWN => Some(Beginning { length: fields.u64()?, digest: fields.digest()? }),
        _ => None,
    };
    let chunks = if cut == Cut::BySum { read_sums(&mut fields)? } else { read_chunks(&mut fields)? };
    let end = chunks.iter().fold(from, |end, chunk| end.saturating_add(u64::from(chunk.length)));
    // A list that does not go on would never end.
    if next != 0 && (next != end || chunks.is_empty()) || same && !chunks.is_empty() {
        return Err(WireError::Range("the next part of a list"));
    }
    Ok(Some(Alike { same, there, pieces, cut, chunks, next: (next != 0).then_some(next) }))
}

/// Appends what the source of a pull wants to know; `None` where that is nothing more.
pub fn put_order(out: &mut Vec<u8>, order: Option<&Order>) {
    let Some(order) = order else { return out.push(NOTHING) };
    out.push(PART);
    out.extend_from_slice(&order.number.to_be_bytes());
    out.push(order.wanted.len() as u8);
    order.wanted.iter().for_each(|wanted| put_wanted(out, wanted));
}

/// Reads it.
///
/// # Errors
/// [`WireError`].
pub fn read_order(mut fields: Fields<'_>) -> Result<Option<Order>, WireError> {
    let order = match fields.u8()? {
        NOTHING => None,
        PART => {
            let (number, count) = (fields.u32()?, usize::from(fields.u8()?));
            if count > RANGES_MAX {
                return Err(WireError::Range("the number of ranges"));
            }
            let wanted = (0..count).map(|_| read_wanted(&mut fields)).collect::<Result<_, _>>()?;
            Some(Order { number, wanted })
        }
        _ => return Err(WireError::Range("what is wanted")),
    };
    fields.end().map(|()| order)
}

/// Appends what the target has of what was wanted.
pub fn put_part(out: &mut Vec<u8>, part: &Part) {
    out.extend_from_slice(&part.order.to_be_bytes());
    out.extend_from_slice(&part.from.piece.to_be_bytes());
    out.extend_from_slice(&part.from.offset.to_be_bytes());
    put_alike(out, part.alike.as_ref());
}

/// Reads it.
///
/// # Errors
/// [`WireError`].
pub fn read_part(mut fields: Fields<'_>) -> Result<Part, WireError> {
    let (order, from) = (fields.u32()?, Within { piece: fields.u32()?, offset: fields.u64()? });
    let alike = read_alike(fields, from.offset)?;
    if let Some(Alike { chunks, next, .. }) = &alike {
        let short = |chunk: &Chunk| (chunk.length as usize) < BLOCK_LENGTH;
        // The last of a file alone is shorter.
        let before = chunks.split_last().map_or(&[][..], |(_, before)| before);
        if before.iter().any(short)
            || chunks.len() > PART_CHUNKS_MAX
            || next.is_some() && chunks.last().is_some_and(short)
        {
            return Err(WireError::Range("the chunks of a part"));
        }
        let length: u64 = chunks.iter().map(|chunk| u64::from(chunk.length)).sum();
        if from.offset.checked_add(length).is_none_or(|end| end > i64::MAX as u64) {
            return Err(WireError::Range("the place of a part"));
        }
    }
    Ok(Part { order, from, alike })
}

fn read_chunks(fields: &mut Fields<'_>) -> Result<Vec<Chunk>, WireError> {
    let mut chunks = Vec::new();
    while !fields.0.is_empty() {
        let id = ChunkId::Content(fields.bytes(16)?.try_into().map_err(|_| WireError::Short)?);
        let length = fields.u32()?;
        if length == 0 || length as usize > chunks::MAX_BYTES {
            return Err(WireError::Range("the length of a chunk"));
        }
        chunks.push(Chunk { id, length });
    }
    Ok(chunks)
}

fn read_sums(fields: &mut Fields<'_>) -> Result<Vec<Chunk>, WireError> {
    let (mut left, mut chunks) = (fields.u64()?, Vec::new());
    if left.div_ceil(BLOCK_LENGTH as u64) != fields.0.len() as u64 / 4 {
        return Err(WireError::Range("the number of sums"));
    }
    while !fields.0.is_empty() {
        let length = left.min(BLOCK_LENGTH as u64) as u32;
        chunks.push(Chunk { id: ChunkId::Sum(fields.u32()?), length });
        left -= u64::from(length);
    }
    Ok(chunks)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_wanted_round_trips() {
        for cut in CUTS {
            let wanted = Wanted { from: Within { piece: 3, offset: 1 << 40 }, to: u64::MAX, cut };
            let mut raw = Vec::new();
            put_wanted(&mut raw, &wanted);
            assert_eq!(read_wanted(&mut Fields(&raw)).unwrap(), wanted);
            *raw.last_mut().unwrap() = 3;
            assert!(read_wanted(&mut Fields(&raw)).is_err());
        }
    }

    #[test]
    fn what_the_source_wants_and_what_it_is_told_round_trip() {
        let wanted = |offset| Wanted { from: Within { piece: 1, offset }, to: u64::MAX, cut: Cut::BySum };
        let order = |count| Order { number: 7, wanted: (0..count as u64).map(wanted).collect() };
        for order in [None, Some(order(0)), Some(order(RANGES_MAX))] {
            let mut raw = Vec::new();
            put_order(&mut raw, order.as_ref());
            assert_eq!(read_order(Fields(&raw)).unwrap(), order);
            assert!((0..raw.len()).all(|length| read_order(Fields(&raw[..length])).is_err()));
        }
        let mut raw = Vec::new();
        put_order(&mut raw, Some(&order(RANGES_MAX + 1)));
        assert!(read_order(Fields(&raw)).is_err() && read_order(Fields(&[2])).is_err());
        let alike =
            Alike { pieces: 1, chunks: vec![Chunk { id: ChunkId::Content([3; 16]), length: 9 }], ..Alike::default() };
        for alike in [None, Some(alike)] {
            let part = Part { order: 3, from: Within { piece: 2, offset: 5 }, alike };
            let mut raw = Vec::new();
            put_part(&mut raw, &part);
            assert_eq!(read_part(Fields(&raw)).unwrap(), part);
        }
    }

    #[test]
    fn what_files_may_be_made_of_round_trips_and_a_list_that_does_not_go_on_is_refused() {
        let chunk = |length| Chunk { id: ChunkId::Content([7; 16]), length };
        let sum = |length| Chunk { id: ChunkId::Sum(0x0102_0304), length };
        let nothing = Alike::default();
        let some =
            Alike { pieces: 3, chunks: vec![chunk(100), chunk(1 << 20)], next: Some(9 + 100 + (1 << 20)), ..nothing };
        let nothing = || Alike::default();
        let (last, same) = (Alike { next: None, ..some.clone() }, Alike { same: true, ..nothing() });
        let sums = Alike { pieces: 1, cut: Cut::BySum, chunks: vec![sum(65_536), sum(65_536), sum(1)], ..nothing() };
        let no_sums = Alike { cut: Cut::BySum, ..nothing() };
        let by_length = Alike { cut: Cut::ByLength, ..last.clone() };
        for alike in [
            None,
            Some(nothing()),
            Some(some.clone()),
            Some(last),
            Some(same),
            Some(sums.clone()),
            Some(no_sums),
            Some(by_length),
        ] {
            let mut raw = Vec::new();
            put_alike(&mut raw, alike.as_ref());
            assert_eq!(read_alike(Fields(&raw), 9).unwrap(), alike);
            (0..raw.len()).for_each(|length| {
                let _ = read_alike(Fields(&raw[..length]), 9);
            });
        }
        for bad in [
            Alike { next: Some(9), ..nothing() },
            Alike { pieces: 5, ..nothing() },
            Alike { next: Some(10), ..some.clone() },
            Alike { chunks: vec![chunk(0)], ..nothing() },
            Alike { chunks: vec![chunk((1 << 20) + 1)], ..nothing() },
            Alike { chunks: vec![sum(65_536), sum(65_537)], ..sums.clone() },
            Alike { chunks: vec![sum(65_536), sum(0)], ..sums.clone() },
            Alike { same: true, ..sums },
            Alike { same: true, ..some },
        ] {
            let mut raw = Vec::new();
            put_alike(&mut raw, Some(&bad));
            assert!(read_alike(Fields(&raw), 9).is_err(), "{bad:?}");
        }
        // More sums than there are blocks would be lengths of nothing.
        let raw = [&[1, 1, 2][..], &[0; 8], &5_u64.to_be_bytes(), &[0; 8]].concat();
        assert!(read_alike(Fields(&raw), 0).is_err());
        let raw = [&[1, 1, 2][..], &[0; 8], &u64::MAX.to_be_bytes(), &[0; 8]].concat();
        assert!(read_alike(Fields(&raw), 0).is_err());
    }
}
