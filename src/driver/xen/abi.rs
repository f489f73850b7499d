//! What differs between Xen 4.14 and 4.22, in one place. Wherever something can be asked (a symbol, a capability bit, an error number) it is
//! asked instead, and has no row here.
//!
//! | what | releases | how it is told | source (Xen's tree) |
//! |---|---|---|---|
//! | layout of an event | 6: 4.14; 7: 4.15 to 4.22 | `xc_vm_event_get_version` | public/vm_event.h |
//! | domain info | 104 bytes to 4.15, 112 from 4.16 | not needed: the prefix is the same and the buffer larger | public/domctl.h |
//! | XENMEM_access_default | 10 to 4.19, 11 from 4.20 | not needed: only plain rights are sent | public/memory.h |
//! | view's default rights | used for pages met later only from 4.19 on (7e5b662b28) | not needed: views begin with all rights, and pages are set one by one | arch/x86/mm/p2m.c |
//! | switching views on | at run time to 4.18; when the domain is made from 4.19 on (0291089f6e) | `xc_hvm_param_set` says EEXIST, also to the 0 that is there | arch/x86/hvm/hvm.c |
//! | most views | 10 with the default one to 4.20; `altp2m_count=` from 4.21 on (06cf6cdab4) | [`Abi::max_views`]; there is no query | asm-x86/domain.h |
//! | fast step without the single-step monitor | broken to 4.18 (410ef33439) | not needed: the monitor is always on | arch/x86/hvm/monitor.c |
//! | fast step left over after stepping was switched off | 4.14 to 4.16, 4.17.0 to 4.17.3, 4.18.0 (897def94b5) | not needed: steps are let end before a view is left | arch/x86/hvm/hvm.c |
//! | VM-exit and port monitors | from 4.17, from 4.18 | the library's symbol | xenctrl.h |

use std::mem::offset_of;

use xen_sys::types::{EventHead, EventV6, EventV7, RegsV6, RegsV7, RingHead};

/// Bytes of the longest event.
pub const MAX_EVENT: usize = size_of::<EventV7>();

/// Where the parts of an event lie. What is in front of the segments lies at the same place in every version.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Layout {
    /// The version of the ring.
    pub version: u32,
    /// Bytes of an event, and of a slot of the ring.
    pub size: usize,
    /// How far the segments lie behind where version 6 has them.
    pub shift: usize,
}

impl Layout {
    /// Version 6: Xen 4.14.
    pub const V6: Self = Self { version: 6, size: size_of::<EventV6>(), shift: 0 };
    /// Version 7: Xen 4.15 and later.
    pub const V7: Self =
        Self { version: 7, size: size_of::<EventV7>(), shift: offset_of!(RegsV7, cs_base) - offset_of!(RegsV6, cs_base) };

    /// The layout of a version; `None` if it is not known.
    pub const fn of(version: u32) -> Option<Self> {
        match version {
            6 => Some(Self::V6),
            7 => Some(Self::V7),
            _ => None,
        }
    }

    /// Slots of a ring of one page: a power of two (io/ring.h).
    pub const fn slots(self) -> u32 {
        let room = (xen_sys::types::PAGE_SIZE - size_of::<RingHead>()) / self.size;
        1 << room.ilog2()
    }
}

// What the codec takes to be the same in both versions is.
const _: () = assert!(offset_of!(RegsV6, gdtr_base) == offset_of!(RegsV7, gdtr_base));
const _: () = assert!(Layout::V7.shift == offset_of!(RegsV7, gs_sel) - offset_of!(RegsV6, gs_sel));
const _: () = assert!(size_of::<EventHead>() == offset_of!(EventV7, regs));

/// What was found out about the running Xen.
#[derive(Clone, Debug)]
pub struct Abi {
    /// Major and minor number.
    pub release: (u32, u32),
    /// What follows them in the version, `".5"`.
    pub extra: String,
    /// The layout of events.
    pub layout: Layout,
}

impl Abi {
    /// Most views beside the default one. From 4.21 on it is what the hypervisor was started with, at most this.
    pub const fn max_views(&self) -> u16 {
        if self.release.0 == 4 && self.release.1 <= 20 { 9 } else { 511 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ring_has_eight_slots_in_every_version() {
        assert_eq!((Layout::V6.slots(), Layout::V7.slots()), (8, 8));
        assert_eq!(Layout::V7.shift, 16);
    }
}
