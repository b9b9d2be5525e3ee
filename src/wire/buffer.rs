//! Big-endian fields, read with bounds checks and written into whole packets.

/// A message ends before its fields do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the message ends too early")]
pub struct Short;

/// Reads fields from the front of bytes; allocates nothing.
#[derive(Debug, Clone, Copy)]
pub struct Reader<'a>(pub &'a [u8]);

impl<'a> Reader<'a> {
    /// The next `count` bytes.
    ///
    /// # Errors
    /// [`Short`], here and below.
    pub fn bytes(&mut self, count: usize) -> Result<&'a [u8], Short> {
        let (head, rest) = self.0.split_at_checked(count).ok_or(Short)?;
        self.0 = rest;
        Ok(head)
    }

    /// `N` bytes.
    ///
    /// # Errors
    /// [`Short`].
    pub fn array<const N: usize>(&mut self) -> Result<[u8; N], Short> {
        self.bytes(N)?.try_into().map_err(|_| Short)
    }

    /// One byte.
    ///
    /// # Errors
    /// [`Short`].
    pub fn u8(&mut self) -> Result<u8, Short> {
        Ok(self.array::<1>()?[0])
    }

    /// Four bytes.
    ///
    /// # Errors
    /// [`Short`].
    pub fn u32(&mut self) -> Result<u32, Short> {
        self.array().map(u32::from_be_bytes)
    }

    /// Eight bytes.
    ///
    /// # Errors
    /// [`Short`].
    pub fn u64(&mut self) -> Result<u64, Short> {
        self.array().map(u64::from_be_bytes)
    }

    /// A length in four bytes, then as many bytes.
    ///
    /// # Errors
    /// [`Short`].
    pub fn string(&mut self) -> Result<&'a [u8], Short> {
        let length = self.u32()?;
        self.bytes(length as usize)
    }
}

/// Writes one packet, its length in front.
///
/// [`Writer::default`] holds fields only, for [`Writer::into_bytes`].
#[derive(Debug, Clone, Default)]
pub struct Writer(Vec<u8>);

impl Writer {
    /// A packet of this type.
    pub fn new(kind: u8) -> Writer {
        Writer(vec![0, 0, 0, 0, kind])
    }

    /// One byte.
    pub fn u8(&mut self, value: u8) -> &mut Self {
        self.bytes(&[value])
    }

    /// Four bytes.
    pub fn u32(&mut self, value: u32) -> &mut Self {
        self.bytes(&value.to_be_bytes())
    }

    /// Eight bytes.
    pub fn u64(&mut self, value: u64) -> &mut Self {
        self.bytes(&value.to_be_bytes())
    }

    /// A length in four bytes, then the bytes.
    pub fn string(&mut self, value: &[u8]) -> &mut Self {
        self.u32(u32::try_from(value.len()).unwrap_or(u32::MAX)).bytes(value)
    }

    /// Bytes as they are.
    pub fn bytes(&mut self, value: &[u8]) -> &mut Self {
        self.0.extend_from_slice(value);
        self
    }

    /// The fields as they are, for a packet they are part of.
    pub fn into_bytes(self) -> Vec<u8> {
        self.0
    }

    /// The whole packet.
    pub fn finish(&mut self) -> Vec<u8> {
        let length = u32::try_from(self.0.len() - 4).unwrap_or(u32::MAX);
        self.0[..4].copy_from_slice(&length.to_be_bytes());
        std::mem::take(&mut self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_round_trip_and_short_ones_are_refused() {
        let packet = Writer::new(7).u32(9).u64(1 << 40).string(b"caf\xe9").finish();
        let mut reader = Reader(&packet);
        assert_eq!(reader.u32(), Ok(packet.len() as u32 - 4));
        assert_eq!((reader.u8(), reader.u32(), reader.u64()), (Ok(7), Ok(9), Ok(1 << 40)));
        assert_eq!((reader.string(), reader.u8()), (Ok(&b"caf\xe9"[..]), Err(Short)));
    }

    #[test]
    fn h41_a_string_longer_than_its_packet_is_refused() {
        assert_eq!(Reader(&[0xff, 0xff, 0xff, 0xff, 1]).string(), Err(Short));
    }
}
