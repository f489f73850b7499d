//! Global breakpoints under the page tables that the guest uses.
//!
//! One is looked up under the root that was in use when it was put in. Where that is not enough, writes of CR3 are announced, and it is
//! looked up under each root that is loaded: while its page is not there, and always if its address is in the lower half, where every
//! root has pages of its own. The upper half is the kernel's, which all roots share.

use crate::addr::{Pa, Va, VcpuId, View};
use crate::arch::amd64::{AddressContext, ControlRegister, Registers};
use crate::driver::{Monitor, VmiDriver};
use crate::error::{Result, TranslationFault, VmiError};
use crate::tap::Breakpoint;

use super::{Session, TapId, TapKind, TapSpec, TapState};

/// Roots that are remembered; the one that was loaded first makes room, of those that no vCPU is in. More processes than that do not run at a time.
const MAX_ROOTS: usize = 512;

/// What page tables say of an address. What is not merely absent is not waited for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Mapping {
    There,
    Absent,
    Never,
}

impl<D: VmiDriver + ?Sized> Session<D> {
    /// Whether a breakpoint is to be looked up under each root that is loaded.
    fn roams(spec: &TapSpec, is_planted: bool) -> bool {
        spec.kind == TapKind::Breakpoint && spec.global && (!is_planted || spec.va.0 >> 63 == 0)
    }

    /// What page tables say of an address.
    fn mapping(&self, va: Va, context: AddressContext) -> Result<Mapping> {
        match self.vmi.translate(va, context) {
            Ok(_) => Ok(Mapping::There),
            Err(VmiError::Translation { fault: TranslationFault::NotPresent { .. }, .. }) => Ok(Mapping::Absent),
            Err(VmiError::Translation { .. }) => Ok(Mapping::Never),
            Err(error) => Err(error),
        }
    }

    /// Whether a new breakpoint is to be looked up under each root.
    pub(super) fn starts_to_roam(&self, spec: &TapSpec) -> Result<bool> {
        Ok(spec.global && Self::roams(spec, self.mapping(spec.va, spec.context)? == Mapping::There))
    }

    /// The roots such a one is looked up under beside its own. `in_use` keeps those of the vCPUs from one breakpoint to the next.
    pub(super) fn other_roots(&self, spec: &TapSpec, in_use: &mut Option<Vec<AddressContext>>) -> Result<Vec<AddressContext>> {
        let known = match in_use {
            Some(known) => known,
            None => in_use.insert(self.roots_in_use()?),
        };
        let mut others = Vec::new();
        for other in known.iter().filter(|other| other.root != spec.context.root) {
            if self.mapping(spec.va, *other)? != Mapping::Never {
                others.push(*other);
            }
        }
        Ok(others)
    }

    pub(super) fn roots_in_use(&self) -> Result<Vec<AddressContext>> {
        let mut roots = self.roots.clone();
        for vcpu in (0..self.vcpus.len() as u16).map(VcpuId) {
            let context = AddressContext::from(&self.vmi.driver().registers(vcpu)?);
            if !roots.contains(&context) {
                roots.push(context);
            }
        }
        Ok(roots)
    }

    /// Has writes of CR3 announced, or no longer. Returns whether that is news.
    pub(super) fn track_roots(&mut self, on: bool) -> Result<bool> {
        if self.tracks_roots == on {
            return Ok(false);
        }
        // Not noted while it is asked who else needs it.
        let before = std::mem::replace(&mut self.tracks_roots, false);
        let done = self.announce(Monitor::ControlRegister(ControlRegister::Cr3), on);
        self.tracks_roots = if done.is_ok() { on } else { before };
        done?;
        if !on {
            self.roots.clear();
        }
        Ok(true)
    }

    /// Finds out whether a breakpoint roams now.
    pub(super) fn review_roaming(&mut self, id: TapId) {
        let spec = self.taps.get(id).filter(|tap| tap.is_active()).and_then(|_| self.taps.spec(id));
        let roams = spec.is_some_and(|spec| Self::roams(&spec, self.state(id) == TapState::Active));
        self.taps.set_roams(id, roams);
    }

    /// A vCPU is about to load a root: what roams is looked up under it.
    pub(super) fn note_root(&mut self, registers: &Registers, cr3: u64) -> Result<()> {
        let context = AddressContext::from(&Registers { cr3, ..*registers });
        if !self.tracks_roots || self.roots.contains(&context) {
            return Ok(());
        }
        if self.roots.len() >= MAX_ROOTS {
            self.give_up_a_root()?;
        }
        for tap in self.taps.all_roaming() {
            self.join(tap, context)?;
            self.review_roaming(tap);
        }
        // Only now: a root that failed is looked at again when it is loaded again.
        self.roots.push(context);
        self.track_roots(self.taps.roaming() > 0).map(drop)
    }

    /// The root that was loaded first makes room. Not one that a vCPU is in: breakpoints are put in again where a root is loaded again, and
    /// that one is not.
    fn give_up_a_root(&mut self) -> Result<()> {
        let mut used = Vec::with_capacity(self.vcpus.len());
        for vcpu in (0..self.vcpus.len() as u16).map(VcpuId) {
            used.push(AddressContext::from(&self.vmi.driver().registers(vcpu)?).root);
        }
        let Some(at) = self.roots.iter().position(|known| !used.contains(&known.root)) else { return Ok(()) };
        if let Some(oldest) = self.roots.get(at).copied() {
            self.leave_root(oldest)?;
            self.roots.remove(at);
        }
        if self.stats.roots_given_up == 0 {
            log::warn!("{MAX_ROOTS} page-table roots were loaded: the oldest makes room for each that comes, and is counted");
        }
        self.stats.roots_given_up += 1;
        Ok(())
    }

    /// Looks a global breakpoint up under one more root.
    pub(super) fn join(&mut self, id: TapId, context: AddressContext) -> Result<()> {
        let Some(spec) = self.taps.spec(id) else { return Ok(()) };
        let is_known = self.taps.contexts(id).any(|known| known.root == context.root);
        if is_known || self.mapping(spec.va, context)? == Mapping::Never {
            return Ok(());
        }
        let at = [(spec.va, context)];
        let pa = self.follow(&at)?.pop().flatten();
        let breakpoint = Breakpoint { context, ..Self::breakpoint_of(id, &spec) };
        let inserted = self.manager.insert_with_hint(&mut self.vmi, &mut self.controller, breakpoint, pa);
        inserted.map_err(|cause| self.unfollow_after(&at, cause))?;
        if let Some(rare) = self.taps.rare_or_new(id) {
            rare.more.push(context);
        }
        Ok(())
    }

    /// Whether a root is none any more: no processor can run under tables that do not map the interrupt table.
    fn is_dead(&self, context: AddressContext, registers: &Registers) -> Result<bool> {
        let (idt, here) = (Va(registers.idtr.base), AddressContext::from(registers));
        Ok(self.mapping(idt, here)? == Mapping::There && self.mapping(idt, context)? != Mapping::There)
    }

    /// Drops the roots that a vCPU has just written to and that are none any more.
    pub(super) fn leave_dead_roots(&mut self, vcpu: VcpuId, registers: &Registers) -> Result<()> {
        let is_written = |context: &AddressContext| self.tables.is_dirty_table(vcpu, context.root.gfn());
        let written: Vec<AddressContext> = self.roots.iter().copied().filter(is_written).collect();
        for root in written {
            if self.is_dead(root, registers)? {
                self.leave_root(root)?;
                self.roots.retain(|known| *known != root);
            }
        }
        Ok(())
    }

    /// A global breakpoint is no longer where it was under `context`. Tables that are given up do not mean that the page is, so it is looked
    /// up under those in use, too, and under the others no longer if they are no tables any more.
    pub(super) fn move_on(&mut self, taps: &[TapId], context: AddressContext, registers: &Registers) -> Result<()> {
        let here = AddressContext::from(registers);
        if taps.is_empty() || here.root == context.root {
            return Ok(());
        }
        for tap in taps {
            self.join(*tap, here)?;
        }
        if self.is_dead(context, registers)? { self.leave_root(context) } else { Ok(()) }
    }

    /// No global breakpoint is looked up under this root any more, unless it has no other.
    fn leave_root(&mut self, context: AddressContext) -> Result<()> {
        let concerns = |(id, tap): (TapId, &super::tap::Tap)| {
            let has_others = !self.taps.more(id).is_empty() && self.taps.contexts(id).any(|known| known == context);
            has_others.then_some((id, tap.view, tap.va))
        };
        let taps: Vec<(TapId, View, Va)> = self.taps.iter().filter_map(concerns).collect();
        for (id, view, va) in taps {
            self.manager.page_out(&mut self.vmi, &mut self.controller, va, context.root)?;
            self.unfollow((va, context))?;
            self.forget_root(id, view, va, context.root);
            self.review_roaming(id);
        }
        Ok(())
    }

    fn forget_root(&mut self, id: TapId, view: View, va: Va, root: Pa) {
        self.manager.forget_root(view, va, root, &id.into());
        let is_first = self.taps.get(id).is_some_and(|tap| tap.context().root == root);
        let Some(rare) = self.taps.rare_mut(id) else { return };
        if is_first {
            let next = rare.more.remove(0);
            if let Some(tap) = self.taps.get_mut(id) {
                tap.set_context(next);
            }
        } else {
            rare.more.retain(|known| known.root != root);
        }
    }
}
