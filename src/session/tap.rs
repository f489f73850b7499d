//! The taps of a session: what every one has, and apart from it what few have. There can be a million of them.

use std::num::NonZeroU32;

use crate::addr::{Pa, Va, View};
use crate::arch::amd64::AddressContext;
use crate::tap::OnWrite;

use super::filter::Filter;
use super::hold::{Budget, Histogram};
use super::record::Capture;
use super::write_policy::WritePolicy;
use super::{TapId, TapKind, TapSpec, TapState};

/// Stands for no [`Rare`].
const NONE: u32 = u32::MAX;

/// A tap as the owner of its breakpoint. Never 0, so that the manager needs no more than four bytes to keep it or none.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Owner(NonZeroU32);

impl Owner {
    #[inline]
    pub const fn tap(self) -> TapId {
        TapId(self.0.get() - 1)
    }
}

impl From<TapId> for Owner {
    /// The last number is never given to a tap: it would be one with that before it.
    fn from(id: TapId) -> Self {
        Self(NonZeroU32::MIN.saturating_add(id.0))
    }
}

/// Bits of [`Tap::flags`].
mod flag {
    pub const GLOBAL: u8 = 1;
    pub const WANTED: u8 = 1 << 1;
    pub const DISABLED: u8 = 1 << 2;
    pub const REMOVED: u8 = 1 << 3;
    /// Its first hit takes it out.
    pub const ONCE: u8 = 1 << 4;
    /// It is looked up under each root that is loaded.
    pub const ROAMS: u8 = 1 << 5;
    /// It has a filter that looks at memory or asks, a capture or a budget.
    pub const SPECIAL: u8 = 1 << 6;
    /// It has a filter.
    pub const FILTERED: u8 = 1 << 7;
}

/// One tap: half a cache line.
pub struct Tap {
    pub va: Va,
    root: Pa,
    /// How often it was hit.
    pub hits: u64,
    /// Where [`Taps`] has the rest, or [`NONE`].
    rare: u32,
    pub view: View,
    levels: u8,
    flags: u8,
}

/// What few taps have.
#[derive(Default)]
pub struct Rare {
    /// What it is, if it is no breakpoint.
    other: Option<Box<TapKind>>,
    pub on_write: Option<OnWrite>,
    key: Option<u64>,
    /// Roots that a global breakpoint is looked up under beside its own.
    pub more: Vec<AddressContext>,
    pub handed: Handed,
    pub filter: Option<Box<Filter>>,
    /// What a write to its byte does, where that depends on the write.
    pub write_policy: Option<Box<WritePolicy>>,
    pub capture: Option<Box<Capture>>,
    pub budget: Option<Box<Budget>>,
    pub holds: Option<Box<Histogram>>,
}

/// Of the hits that were handed out: how many, and how long their vCPUs stood still, in nanoseconds.
#[derive(Clone, Copy, Default)]
pub struct Handed {
    pub count: u64,
    pub total_ns: u64,
    pub max_ns: u64,
}

impl Handed {
    /// One more.
    pub fn add(&mut self, held_ns: u64) {
        self.count += 1;
        self.total_ns += held_ns;
        self.max_ns = self.max_ns.max(held_ns);
    }
}

impl Tap {
    const fn is(&self, flag: u8) -> bool {
        self.flags & flag != 0
    }

    const fn set(&mut self, flag: u8, on: bool) {
        self.flags = if on { self.flags | flag } else { self.flags & !flag };
    }

    /// The page tables its address is looked up in, the first ones of a global breakpoint.
    pub const fn context(&self) -> AddressContext {
        AddressContext { root: self.root, levels: self.levels }
    }

    pub const fn set_context(&mut self, AddressContext { root, levels }: AddressContext) {
        (self.root, self.levels) = (root, levels);
    }

    /// Whether somebody is to be handed its hits.
    pub const fn is_wanted(&self) -> bool {
        self.is(flag::WANTED)
    }

    pub const fn set_wanted(&mut self, wanted: bool) {
        self.set(flag::WANTED, wanted);
    }

    /// Whether its first hit takes it out.
    pub const fn is_once(&self) -> bool {
        self.is(flag::ONCE)
    }

    pub const fn set_once(&mut self) {
        self.set(flag::ONCE, true);
    }

    /// Active also while it waits for its page.
    pub const fn state(&self) -> TapState {
        if self.is(flag::REMOVED) {
            TapState::Removed
        } else if self.is(flag::DISABLED) {
            TapState::Disabled
        } else {
            TapState::Active
        }
    }

    /// Neither disabled nor removed.
    pub const fn is_active(&self) -> bool {
        !self.is(flag::REMOVED | flag::DISABLED)
    }

    pub fn set_state(&mut self, state: TapState) {
        self.set(flag::DISABLED, state == TapState::Disabled);
        self.set(flag::REMOVED, state == TapState::Removed);
    }
}

/// All taps of a session, by number; those that are gone too.
#[derive(Default)]
pub struct Taps {
    list: Vec<Tap>,
    rare: Vec<Rare>,
    roaming: usize,
}

impl Taps {
    pub const fn len(&self) -> usize {
        self.list.len()
    }

    /// Makes room for so many more at once: growing by and by leaves up to twice the room that is needed.
    pub fn reserve(&mut self, count: usize) {
        self.list.reserve(count);
    }

    /// Adds one that is `enabled` or else disabled. `more`: see [`Rare::more`].
    pub fn push(&mut self, spec: &TapSpec, more: Vec<AddressContext>) {
        let TapSpec { kind, va, context, global, view, on_write, key, wanted, enabled } = *spec;
        let mut tap = Tap { va, root: context.root, hits: 0, rare: NONE, view, levels: context.levels, flags: 0 };
        tap.set(flag::GLOBAL, global);
        tap.set(flag::WANTED, wanted);
        tap.set(flag::DISABLED, !enabled);
        self.list.push(tap);
        let other = (kind != TapKind::Breakpoint).then(|| Box::new(kind));
        if other.is_some() || on_write.is_some() || key.is_some() || !more.is_empty() {
            let id = TapId(self.list.len() as u32 - 1);
            if let Some(rare) = self.rare_or_new(id) {
                (rare.other, rare.on_write, rare.key, rare.more) = (other, on_write, key, more);
            }
        }
    }

    #[inline]
    pub fn get(&self, id: TapId) -> Option<&Tap> {
        self.list.get(id.0 as usize)
    }

    #[inline]
    pub fn get_mut(&mut self, id: TapId) -> Option<&mut Tap> {
        self.list.get_mut(id.0 as usize)
    }

    /// Every tap.
    pub fn iter(&self) -> impl Iterator<Item = (TapId, &Tap)> {
        (0..).map(TapId).zip(&self.list)
    }

    pub fn iter_mut(&mut self) -> impl Iterator<Item = &mut Tap> {
        self.list.iter_mut()
    }

    #[inline]
    pub fn rare(&self, id: TapId) -> Option<&Rare> {
        self.rare.get(self.get(id)?.rare as usize)
    }

    #[inline]
    pub fn rare_mut(&mut self, id: TapId) -> Option<&mut Rare> {
        self.rare.get_mut(self.list.get(id.0 as usize)?.rare as usize)
    }

    /// Changes the filter, the capture or the budget of a tap.
    pub fn specialize(&mut self, id: TapId, change: impl FnOnce(&mut Rare)) {
        let Some(rare) = self.rare_or_new(id) else { return };
        change(rare);
        let is_plain = rare.filter.as_ref().is_none_or(|filter| filter.is_plain());
        let (is_special, is_filtered) = (!is_plain || rare.capture.is_some() || rare.budget.is_some(), rare.filter.is_some());
        if let Some(tap) = self.get_mut(id) {
            tap.set(flag::SPECIAL, is_special);
            tap.set(flag::FILTERED, is_filtered);
        }
    }

    /// As [`Self::rare_mut`], made if there is none; `None` if there is no such tap.
    pub fn rare_or_new(&mut self, id: TapId) -> Option<&mut Rare> {
        let tap = self.list.get_mut(id.0 as usize)?;
        if tap.rare == NONE {
            tap.rare = self.rare.len() as u32;
            self.rare.push(Rare::default());
        }
        self.rare.get_mut(tap.rare as usize)
    }

    /// The filter of a tap.
    #[inline]
    pub fn filter_mut(&mut self, id: TapId) -> Option<&mut Filter> {
        if self.get(id)?.is(flag::FILTERED) { self.rare_mut(id)?.filter.as_deref_mut() } else { None }
    }

    /// Whether its hits are counted and nothing else, those that its filter lets pass.
    #[inline]
    pub fn is_only_counted(&self, id: TapId) -> bool {
        self.get(id).is_some_and(|tap| !tap.is(flag::WANTED | flag::ONCE | flag::SPECIAL))
    }

    /// It, if its hits are handed out and nothing else is done with them.
    #[inline]
    pub fn only_handed(&mut self, id: TapId) -> Option<&mut Tap> {
        let others = flag::ONCE | flag::SPECIAL | flag::FILTERED;
        self.get_mut(id).filter(|tap| tap.flags & (flag::WANTED | others) == flag::WANTED)
    }

    /// Counts how long a vCPU stood still for a hit, which stands for so many.
    pub fn add_hold(&mut self, id: TapId, held_ns: u64, times: u32) {
        if let Some(rare) = self.rare_or_new(id) {
            rare.holds.get_or_insert_default().add_times(held_ns, times);
        }
    }

    /// A tap as it was described; its context, and whether it is wanted and enabled, as they are now.
    pub fn spec(&self, id: TapId) -> Option<TapSpec> {
        let (tap, rare) = (self.get(id)?, self.rare(id));
        Some(TapSpec {
            kind: self.kind(id),
            va: tap.va,
            context: tap.context(),
            global: tap.is(flag::GLOBAL),
            view: tap.view,
            on_write: rare.and_then(|rare| rare.on_write),
            key: rare.and_then(|rare| rare.key),
            wanted: tap.is_wanted(),
            enabled: tap.is_active(),
        })
    }

    /// What it looks for.
    pub fn kind(&self, id: TapId) -> TapKind {
        self.rare(id).and_then(|rare| rare.other.as_deref().copied()).unwrap_or(TapKind::Breakpoint)
    }

    /// Roots that it is looked up under beside its own.
    pub fn more(&self, id: TapId) -> &[AddressContext] {
        self.rare(id).map_or(&[], |rare| &rare.more)
    }

    pub fn set_more(&mut self, id: TapId, more: Vec<AddressContext>) {
        if !more.is_empty() {
            if let Some(rare) = self.rare_or_new(id) {
                rare.more = more;
            }
        } else if let Some(rare) = self.rare_mut(id) {
            rare.more = more;
        }
    }

    /// Every root it is looked up under.
    pub fn contexts(&self, id: TapId) -> impl Iterator<Item = AddressContext> {
        self.get(id).map(Tap::context).into_iter().chain(self.more(id).iter().copied())
    }

    // --- global breakpoints that are looked up under each root that is loaded ---

    pub fn set_roams(&mut self, id: TapId, on: bool) {
        let Some(tap) = self.list.get_mut(id.0 as usize).filter(|tap| tap.is(flag::ROAMS) != on) else { return };
        tap.set(flag::ROAMS, on);
        if on {
            self.roaming += 1;
        } else {
            self.roaming -= 1;
        }
    }

    pub fn roams(&self, id: TapId) -> bool {
        self.get(id).is_some_and(|tap| tap.is(flag::ROAMS))
    }

    /// How many roam.
    pub const fn roaming(&self) -> usize {
        self.roaming
    }

    /// Those that roam, in order.
    pub fn all_roaming(&self) -> Vec<TapId> {
        if self.roaming == 0 {
            return Vec::new();
        }
        self.iter().filter(|(_, tap)| tap.is(flag::ROAMS)).map(|(id, _)| id).collect()
    }

    pub fn forget_roaming(&mut self) {
        self.list.iter_mut().for_each(|tap| tap.set(flag::ROAMS, false));
        self.roaming = 0;
    }
}
