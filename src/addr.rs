//! Address types. Arithmetic is checked, and no operator turns one kind into another.

use std::fmt;

/// Bytes in a page (4 KiB).
pub const PAGE_SIZE: u64 = 4096;
/// Bits of an address that select the byte inside a page.
pub const PAGE_SHIFT: u32 = 12;
/// Bits of a physical address (Intel SDM vol. 3, 5.1.4).
pub(crate) const PHYSICAL_BITS: u32 = 52;

macro_rules! address {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
        #[repr(transparent)]
        pub struct $name(pub u64);

        impl $name {
            /// The address `count` bytes up, or `None` past the end of the address space.
            pub const fn checked_add(self, count: u64) -> Option<Self> {
                match self.0.checked_add(count) {
                    Some(value) => Some(Self(value)),
                    None => None,
                }
            }

            /// Offset of the address inside its 4 KiB page, in bytes.
            pub const fn page_offset(self) -> u64 {
                self.0 & (PAGE_SIZE - 1)
            }

            /// First address of the 4 KiB page that holds the address.
            #[must_use]
            pub const fn page(self) -> Self {
                Self(self.0 & !(PAGE_SIZE - 1))
            }

            /// Bytes from the address to the end of its page: 1 to 4096.
            pub const fn page_rest(self) -> u64 {
                PAGE_SIZE - self.page_offset()
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:#x}", self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({:#x})"), self.0)
            }
        }
    };
}

address! {
    /// A guest-virtual address.
    Va
}
address! {
    /// A guest-physical address.
    Pa
}

impl Pa {
    /// The guest frame that holds the address.
    pub const fn gfn(self) -> Gfn {
        Gfn(self.0 >> PAGE_SHIFT)
    }
}

impl Va {
    /// Whether the upper bits repeat bit `bits - 1`, as the processor demands; `bits` is 48 or 57 (Intel SDM vol. 1, 3.3.7.1).
    pub const fn is_canonical(self, bits: u32) -> bool {
        let shift = 64 - bits;
        (((self.0 << shift) as i64) >> shift) as u64 == self.0
    }
}

/// A guest frame number: a guest-physical address divided by the page size.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
#[repr(transparent)]
pub struct Gfn(pub u64);

impl Gfn {
    /// The physical address `offset` bytes into the frame. Only the low 12 bits of `offset` count.
    pub const fn pa(self, offset: u64) -> Pa {
        Pa((self.0 << PAGE_SHIFT) | (offset & (PAGE_SIZE - 1)))
    }

    /// The frame `count` frames up, or `None` past the end of the address space.
    pub const fn checked_add(self, count: u64) -> Option<Self> {
        match self.0.checked_add(count) {
            Some(value) => Some(Self(value)),
            None => None,
        }
    }
}

impl fmt::Display for Gfn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

impl fmt::Debug for Gfn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Gfn({:#x})", self.0)
    }
}

/// A view: one alternative map from guest-physical pages to frames and access rights (Xen calls it an altp2m).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Debug)]
#[repr(transparent)]
pub struct View(pub u16);

impl View {
    /// The view the guest runs in when nobody taps it. Nothing is ever hidden there.
    pub const DEFAULT: Self = Self(0);
}

impl fmt::Display for View {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A virtual processor's number, from 0.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Debug)]
#[repr(transparent)]
pub struct VcpuId(pub u16);

impl fmt::Display for VcpuId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Which accesses a page allows, or which ones an event was: any combination of read, write and execute.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
#[repr(transparent)]
pub struct MemoryAccess(u8);

impl MemoryAccess {
    /// No access.
    pub const NONE: Self = Self(0);
    /// Read.
    pub const R: Self = Self(1);
    /// Write.
    pub const W: Self = Self(2);
    /// Execute.
    pub const X: Self = Self(4);
    /// Read and write.
    pub const RW: Self = Self(3);
    /// Read and execute.
    pub const RX: Self = Self(5);
    /// Write and execute.
    pub const WX: Self = Self(6);
    /// Everything.
    pub const RWX: Self = Self(7);

    /// From bits (read 1, write 2, execute 4); `None` if any other bit is set.
    pub const fn from_bits(bits: u8) -> Option<Self> {
        if bits <= 7 { Some(Self(bits)) } else { None }
    }

    /// The bits: read 1, write 2, execute 4.
    pub const fn bits(self) -> u8 {
        self.0
    }

    /// Whether every access in `other` is in `self`.
    pub const fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// Whether any access is in both.
    pub const fn intersects(self, other: Self) -> bool {
        self.0 & other.0 != 0
    }

    /// `self` without the accesses in `other`.
    #[must_use]
    pub const fn without(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }

    /// The accesses that are in both.
    #[must_use]
    pub const fn intersection(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }
}

impl std::ops::BitOr for MemoryAccess {
    type Output = Self;

    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

impl fmt::Display for MemoryAccess {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (bit, letter) in [(Self::R, 'r'), (Self::W, 'w'), (Self::X, 'x')] {
            write!(f, "{}", if self.contains(bit) { letter } else { '-' })?;
        }
        Ok(())
    }
}

impl fmt::Debug for MemoryAccess {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "MemoryAccess({self})")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arithmetic_never_wraps() {
        assert_eq!(Va(u64::MAX).checked_add(1), None);
        assert_eq!(Pa(0xfff).checked_add(1), Some(Pa(0x1000)));
        assert_eq!(Gfn(u64::MAX).checked_add(1), None);
    }

    #[test]
    fn canonical_addresses_repeat_the_sign_bit() {
        assert!(Va(0x7fff_ffff_ffff).is_canonical(48));
        assert!(!Va(0x8000_0000_0000).is_canonical(48));
        assert!(Va(0x8000_0000_0000).is_canonical(57));
        assert!(Va(0xffff_8000_0000_0000).is_canonical(48));
        assert!(!Va(0xfeff_ffff_ffff_ffff).is_canonical(57));
    }

    #[test]
    fn access_rights_print_as_letters() {
        assert_eq!(MemoryAccess::RX.to_string(), "r-x");
        assert_eq!((MemoryAccess::R | MemoryAccess::W).to_string(), "rw-");
        assert_eq!(MemoryAccess::from_bits(8), None);
    }
}
