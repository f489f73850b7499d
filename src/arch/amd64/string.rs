//! Repeated string instructions that store: what is still to come of one that is under way.

use std::ops::Range;

use super::{GpRegisters, rflags};

/// A repeated string instruction that stores at RDI: MOVS, STOS or INS. Source: Intel SDM vol. 2, 2.1.1 (prefixes) and REP.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct StringStore {
    /// Bytes of one round.
    size: u64,
    /// Bits of RDI and RCX that count.
    mask: u64,
}

impl StringStore {
    /// From the bytes of an instruction; `None` for every other instruction. `is_64`: it is 64-bit code, and else 32-bit code.
    pub fn decode(bytes: &[u8], is_64: bool) -> Option<Self> {
        let (mut repeats, mut is_short, mut is_wide, mut is_narrow) = (false, false, false, !is_64);
        for byte in bytes {
            let size = match byte {
                0xf2 | 0xf3 => {
                    repeats = true;
                    None
                }
                0x66 => {
                    is_short = true;
                    None
                }
                0x67 => {
                    is_narrow = true;
                    None
                }
                0x40..=0x4f if is_64 => {
                    is_wide = byte & 8 != 0;
                    continue;
                }
                0x26 | 0x2e | 0x36 | 0x3e | 0x64 | 0x65 | 0xf0 => None,
                0x6c | 0xa4 | 0xaa => Some(1),
                0xa5 | 0xab if is_wide => Some(8),
                0x6d | 0xa5 | 0xab => Some(if is_short { 2 } else { 4 }),
                _ => return None,
            };
            if let Some(size) = size {
                let mask = if is_narrow { u32::MAX.into() } else { u64::MAX };
                return repeats.then_some(Self { size, mask });
            }
            // REX counts only right before the opcode.
            is_wide = false;
        }
        None
    }

    /// Where the next round stores.
    pub fn next(&self, gp: &GpRegisters) -> Range<u64> {
        let first = gp.rdi & self.mask;
        first..first.saturating_add(self.size)
    }

    /// Where all rounds to come store.
    pub fn rest(&self, gp: &GpRegisters) -> Range<u64> {
        let next = self.next(gp);
        let more = (gp.rcx & self.mask).saturating_sub(1).saturating_mul(self.size);
        if gp.rflags & rflags::DF == 0 {
            next.start..next.end.saturating_add(more)
        } else {
            next.start.saturating_sub(more)..next.end
        }
    }

    /// Where it has stored, by RDI before and after.
    pub fn done(&self, (from, to): (u64, u64)) -> Range<u64> {
        let (from, to) = (from & self.mask, to & self.mask);
        if to >= from { from..to } else { to.saturating_add(self.size)..from.saturating_add(self.size) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn size(bytes: &[u8]) -> Option<u64> {
        StringStore::decode(bytes, true).map(|string| string.size)
    }

    #[test]
    fn a_repeated_store_is_told_with_the_size_of_its_rounds() {
        for (bytes, expected) in [
            (&[0xf3, 0xa4][..], Some(1)),
            (&[0xf2, 0xaa], Some(1)),
            (&[0xf3, 0x6c], Some(1)),
            (&[0x66, 0xf3, 0xa5], Some(2)),
            (&[0xf3, 0x66, 0xab], Some(2)),
            (&[0xf3, 0xab], Some(4)),
            (&[0xf3, 0x6d], Some(4)),
            (&[0xf3, 0x48, 0x6d], Some(4)),
            (&[0xf3, 0x48, 0xa5], Some(8)),
            (&[0xf3, 0x48, 0xab, 0x90], Some(8)),
            // REX before another prefix is none.
            (&[0x48, 0xf3, 0xab], Some(4)),
            (&[0x65, 0xf3, 0x48, 0xa5], Some(8)),
            // Not repeated; loads; something else; no whole instruction.
            (&[0xa4], None),
            (&[0xf3, 0xac], None),
            (&[0xf3, 0xa6], None),
            (&[0xf3, 0x90], None),
            (&[0xf3, 0x0f, 0xb8, 0xc0], None),
            (&[0xf3], None),
            (&[], None),
        ] {
            assert_eq!(size(bytes), expected, "{bytes:02x?}");
        }
        // INC EBX in 32-bit code, where there is no REX.
        assert_eq!(StringStore::decode(&[0xf3, 0x43, 0xab], false), None);
        assert_eq!(StringStore::decode(&[0xf3, 0xab], false), Some(StringStore { size: 4, mask: 0xffff_ffff }));
    }

    #[test]
    fn what_is_to_come_and_what_is_done_are_ranges_in_either_direction() {
        let string = StringStore::decode(&[0xf3, 0x48, 0xa5], true).unwrap();
        let up = GpRegisters { rdi: 0x1000, rcx: 4, ..GpRegisters::default() };
        assert_eq!((string.next(&up), string.rest(&up)), (0x1000..0x1008, 0x1000..0x1020));
        let down = GpRegisters { rflags: rflags::DF, ..up };
        assert_eq!((string.next(&down), string.rest(&down)), (0x1000..0x1008, 0xfe8..0x1008));
        assert_eq!((string.done((0x1000, 0x1010)), string.done((0x1000, 0x1000))), (0x1000..0x1010, 0x1000..0x1000));
        assert_eq!(string.done((0x1000, 0xff0)), 0xff8..0x1008);
        let far = GpRegisters { rcx: u64::MAX, ..up };
        assert_eq!(string.rest(&far).end, u64::MAX);
        assert_eq!(string.rest(&GpRegisters { rflags: rflags::DF, ..far }).start, 0);
        let narrow = StringStore::decode(&[0x67, 0xf3, 0xaa], true).unwrap();
        let high = GpRegisters { rdi: 0xff_0000_1000, rcx: 0xff_0000_0002, ..up };
        assert_eq!(narrow.rest(&high), 0x1000..0x1002);
    }
}
