//! Bytes that came from a guest. They never reach a log or an error message by accident.

use std::fmt;
use std::ops::Deref;

/// Bytes read from a guest. Everything a slice can do; only `Debug` differs: it tells how many bytes there are and what they look
/// like, never what they are. `==` compares the content.
///
/// ```
/// use vmitap::GuestBytes;
/// let secret = GuestBytes::from(b"hunter2".to_vec());
/// assert_eq!(format!("{secret:?}"), "GuestBytes(7 bytes, text)");
/// assert_eq!(&secret[..6], b"hunter");
/// ```
#[derive(Clone, PartialEq, Eq, Hash, Default)]
pub struct GuestBytes(Vec<u8>);

impl GuestBytes {
    /// The bytes, without the wrapper.
    pub fn into_vec(self) -> Vec<u8> {
        self.0
    }

    /// The bytes as UTF-8. What is not UTF-8 becomes U+FFFD.
    pub fn to_utf8_lossy(&self) -> String {
        String::from_utf8_lossy(&self.0).into_owned()
    }

    /// The bytes as little-endian UTF-16. A lone surrogate, and a single byte at the end, become U+FFFD.
    pub fn to_utf16_lossy(&self) -> String {
        let (units, rest) = self.0.as_chunks::<2>();
        let units = units.iter().map(|unit| u16::from_le_bytes(*unit));
        let tail = (!rest.is_empty()).then_some(char::REPLACEMENT_CHARACTER);
        char::decode_utf16(units).map(|unit| unit.unwrap_or(char::REPLACEMENT_CHARACTER)).chain(tail).collect()
    }
}

impl fmt::Debug for GuestBytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let looks = match self.0.as_slice() {
            [] => return f.write_str("GuestBytes(0 bytes)"),
            bytes if bytes.iter().all(|byte| *byte == 0) => "all zero",
            bytes if bytes.iter().all(|byte| matches!(byte, b' '..=b'~' | b'\t' | b'\n' | b'\r')) => "text",
            _ => "binary",
        };
        write!(f, "GuestBytes({} bytes, {looks})", self.0.len())
    }
}

impl Deref for GuestBytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0
    }
}

impl AsRef<[u8]> for GuestBytes {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

impl From<Vec<u8>> for GuestBytes {
    fn from(bytes: Vec<u8>) -> Self {
        Self(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn debug_never_shows_content() {
        let shown = |bytes: &[u8]| format!("{:?}", GuestBytes::from(bytes.to_vec()));
        assert_eq!(shown(b""), "GuestBytes(0 bytes)");
        assert_eq!(shown(&[0; 4]), "GuestBytes(4 bytes, all zero)");
        assert_eq!(shown(b"/etc/shadow\n"), "GuestBytes(12 bytes, text)");
        assert_eq!(shown(&[0, b'E']), "GuestBytes(2 bytes, binary)");
        assert_eq!(shown(&[0x7f, b'E']), "GuestBytes(2 bytes, binary)");
    }

    #[test]
    fn broken_text_is_marked_and_not_dropped() {
        assert_eq!(GuestBytes::from(vec![b'a', 0xff, b'b']).to_utf8_lossy(), "a\u{fffd}b");
        assert_eq!(GuestBytes::from(vec![b'a', 0, 0x00, 0xd8, b'b', 0, 7]).to_utf16_lossy(), "a\u{fffd}b\u{fffd}");
    }
}
