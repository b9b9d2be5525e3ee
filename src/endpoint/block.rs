//! [`Block`]: content on its way from a reader to a writer.

use std::sync::Arc;

use crate::codec::Once;

/// Plain content bytes, with room in front for a message header so that they need not be copied to be sent. One that goes
/// to several targets is shared by all of them ([`Block::share`]).
#[derive(Debug)]
pub struct Block {
    bytes: Arc<Bytes>,
    start: usize,
    shared: bool,
}

#[derive(Debug)]
struct Bytes {
    buffer: Vec<u8>,
    /// What those who share the block leave for each other.
    once: Once,
}

impl Clone for Bytes {
    fn clone(&self) -> Self {
        Bytes { buffer: self.buffer.clone(), once: Once::default() }
    }
}

impl Block {
    /// Free bytes in front of the data of a block that is made here.
    pub const HEADROOM: usize = 64;

    /// An empty block with room for `capacity` data bytes.
    pub fn with_capacity(capacity: usize) -> Block {
        let mut buffer = Vec::with_capacity(Self::HEADROOM + capacity);
        buffer.resize(Self::HEADROOM, 0);
        Block::within(buffer, Self::HEADROOM)
    }

    /// A block with a copy of `data`.
    pub fn copy_of(data: &[u8]) -> Block {
        let mut block = Block::with_capacity(data.len());
        block.buffer_mut().extend_from_slice(data);
        block
    }

    /// The bytes of `buffer` from `start` on, which are not copied.
    pub fn within(buffer: Vec<u8>, start: usize) -> Block {
        let start = start.min(buffer.len());
        Block { bytes: Arc::new(Bytes { buffer, once: Once::default() }), start, shared: false }
    }

    /// The data.
    pub fn data(&self) -> &[u8] {
        &self.bytes.buffer[self.start..]
    }

    /// The whole buffer, headroom included; data may be appended, and must not be cut below the headroom. Where others have
    /// the block too, a copy is made first.
    pub fn buffer_mut(&mut self) -> &mut Vec<u8> {
        &mut Arc::make_mut(&mut self.bytes).buffer
    }

    /// One more block of the same bytes, which are not copied.
    #[must_use]
    pub fn share(&mut self) -> Block {
        self.shared = true;
        Block { bytes: Arc::clone(&self.bytes), start: self.start, shared: true }
    }

    /// Where those who share the block leave what compressing it comes to; `None` for one that was never shared.
    pub fn once(&self) -> Option<&Once> {
        self.shared.then_some(&self.bytes.once)
    }

    /// Gives the buffer up with `header` right in front of the data, and says where it begins. What others have too is copied.
    pub fn headed(self, header: &[u8]) -> (Vec<u8>, usize) {
        let start = self.start;
        match (Arc::try_unwrap(self.bytes), start.checked_sub(header.len())) {
            (Ok(Bytes { mut buffer, .. }), Some(at)) => {
                buffer[at..start].copy_from_slice(header);
                (buffer, at)
            }
            (Ok(Bytes { buffer, .. }), None) => ([header, &buffer[start..]].concat(), 0),
            (Err(shared), _) => ([header, &shared.buffer[start..]].concat(), 0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shared_block_has_the_same_bytes_for_everybody_and_none_changes_those_of_others() {
        let mut first = Block::copy_of(b"content");
        assert!(first.once().is_none());
        let (mut second, third) = (first.share(), first.share());
        assert!(std::ptr::eq(first.data(), third.data()) && second.once().is_some());
        second.buffer_mut().extend_from_slice(b" and more");
        assert_eq!((second.data(), first.data()), (&b"content and more"[..], &b"content"[..]));
        // The last who has it gives the buffer away, others a copy.
        for (block, copied) in [(first, true), (third, false)] {
            let before = block.data().as_ptr();
            let (buffer, start) = block.headed(b"head");
            assert_eq!(&buffer[start..], b"headcontent");
            assert_eq!(buffer[start + 4..].as_ptr() != before, copied);
        }
        let (buffer, start) = Block::within(b"xdata".to_vec(), 1).headed(b"long header ");
        assert_eq!(&buffer[start..], b"long header data");
    }
}
