//! The mock's guest, as data that can be compared.

use std::collections::{BTreeMap, HashSet};

use crate::addr::{Gfn, MemoryAccess, PAGE_SIZE, View};
use crate::arch::amd64::{Injection, Registers};
use crate::driver::Monitor;
use crate::event::VmiEvent;

/// One view, as data.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct MockView {
    /// The rights of every page that is not in `pages`.
    pub access: MemoryAccess,
    /// The pages with other rights.
    pub pages: BTreeMap<Gfn, MemoryAccess>,
    /// The pages that show another frame.
    pub remaps: BTreeMap<Gfn, Gfn>,
}

impl MockView {
    pub(super) fn new(access: MemoryAccess) -> Self {
        Self { access, pages: BTreeMap::new(), remaps: BTreeMap::new() }
    }

    pub(super) fn set_access(&mut self, gfn: Gfn, access: MemoryAccess) {
        if access == self.access {
            self.pages.remove(&gfn);
        } else {
            self.pages.insert(gfn, access);
        }
    }
}

/// One vCPU, as data.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct MockVcpu {
    /// Its registers.
    pub registers: Registers,
    /// The view it is in.
    pub view: View,
    /// The event that holds it.
    pub pending: Option<VmiEvent>,
    /// What is to be delivered to it, in order.
    pub injections: Vec<Injection>,
}

/// Everything a call can change, to be compared with `==`: a call that failed must leave it as it was.
#[derive(Clone, PartialEq, Eq)]
pub struct GuestState {
    pub(super) memory: Vec<u8>,
    pub(super) frames: BTreeMap<Gfn, Vec<u8>>,
    /// The views that exist.
    pub views: BTreeMap<View, MockView>,
    /// The vCPUs.
    pub vcpus: Vec<MockVcpu>,
    /// What is monitored.
    pub monitors: HashSet<Monitor>,
    /// How often the guest is paused.
    pub pauses: u32,
}

impl GuestState {
    /// What differs from `other`, in words; empty if they are equal. For the message of an assertion.
    pub fn differences(&self, other: &Self) -> Vec<String> {
        let mut found = Vec::new();
        let pages = |bytes: &'_ [u8]| bytes.chunks(PAGE_SIZE as usize).map(<[u8]>::to_vec).collect::<Vec<_>>();
        for (index, (mine, theirs)) in pages(&self.memory).iter().zip(&pages(&other.memory)).enumerate() {
            if let Some(offset) = mine.iter().zip(theirs).position(|(a, b)| a != b) {
                found.push(format!("memory page {index:#x} from offset {offset:#x} on"));
            }
        }
        for frame in self.frames.keys().chain(other.frames.keys()).collect::<std::collections::BTreeSet<_>>() {
            match (self.frames.get(frame), other.frames.get(frame)) {
                (Some(_), None) => found.push(format!("frame {frame} is allocated only here")),
                (None, Some(_)) => found.push(format!("frame {frame} is allocated only there")),
                (mine, theirs) if mine != theirs => found.push(format!("content of frame {frame}")),
                _ => {}
            }
        }
        if self.views != other.views {
            found.push(format!("views: {:?} / {:?}", self.views, other.views));
        }
        if self.vcpus != other.vcpus {
            found.push(format!("vCPUs: {:?} / {:?}", self.vcpus, other.vcpus));
        }
        if self.monitors != other.monitors {
            found.push(format!("monitors: {:?} / {:?}", self.monitors, other.monitors));
        }
        if self.pauses != other.pauses {
            found.push(format!("pauses: {} / {}", self.pauses, other.pauses));
        }
        found
    }
}

impl std::fmt::Debug for GuestState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("GuestState")
            .field("memory", &format_args!("{} bytes", self.memory.len()))
            .field("frames", &self.frames.keys())
            .field("views", &self.views)
            .field("pauses", &self.pauses)
            .finish_non_exhaustive()
    }
}
