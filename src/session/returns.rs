//! Return values: a breakpoint at the return address of a function that was entered, shared by all calls from there.
//!
//! A return is that of the call whose stack pointer it has: recursion, several vCPUs and switches between tasks are told apart by it.
//! Calls that never return take a place in a bounded table until they are the oldest.

use std::collections::VecDeque;

use rustc_hash::FxHashMap;

use crate::addr::{Pa, Va};
use crate::arch::amd64::AddressContext;
use crate::capture::{Facts, Row};
use crate::driver::VmiDriver;
use crate::event::VmiEvent;

use super::{Session, TapId, TapKind, TapSpec};

/// Calls that are waited for at once. When there is one more, the oldest is given up.
pub const WAITING: usize = 4096;
/// Return addresses that are tapped at once.
const SITES: usize = 4096;

/// A return address: where, and under which page tables.
type Place = (Va, Pa);

/// One return address.
struct Site {
    tap: TapId,
    calls: Vec<Call>,
}

/// A call that has not returned.
struct Call {
    serial: u64,
    /// The stack pointer once it has returned.
    rsp: u64,
    tap: TapId,
    facts: Facts,
    row: Row,
}

/// The table.
#[derive(Default)]
pub struct Returns {
    sites: FxHashMap<Place, Site>,
    places: FxHashMap<TapId, Place>,
    /// The calls by age; those that returned meanwhile are passed over.
    ages: VecDeque<(u64, Place)>,
    waiting: usize,
    serial: u64,
    lost: u64,
    /// It was said that the oldest call is given up.
    has_told_calls: bool,
    /// It was said that there are too many return addresses.
    has_told_sites: bool,
}

impl Returns {
    /// Whether return addresses are tapped.
    pub fn are_awaited(&self) -> bool {
        !self.places.is_empty()
    }

    /// Calls whose return was given up.
    pub const fn lost(&self) -> u64 {
        self.lost
    }

    fn oldest(&mut self) -> Option<Call> {
        while let Some((serial, place)) = self.ages.pop_front() {
            if let Some(site) = self.sites.get_mut(&place)
                && let Some(index) = site.calls.iter().position(|call| call.serial == serial)
            {
                self.waiting -= 1;
                return Some(site.calls.remove(index));
            }
        }
        None
    }

    fn take(&mut self, keep: impl Fn(&Call) -> bool) -> Vec<Call> {
        let mut taken = Vec::new();
        for site in self.sites.values_mut() {
            taken.extend(site.calls.extract_if(.., |call| !keep(call)));
        }
        taken.sort_by_key(|call| call.serial);
        self.waiting -= taken.len();
        taken
    }
}

impl<D: VmiDriver + ?Sized> Session<D> {
    /// A function was entered: its row waits until it returns.
    pub(super) fn expect_return(&mut self, id: TapId, event: &VmiEvent, facts: Facts, row: Row) {
        let registers = &event.registers;
        let context = AddressContext::from(registers);
        let to = self.vmi.read_u64(Va(registers.gp.rsp), context);
        let Some(place) = to.ok().and_then(|to| self.tap_return(id, Va(to), context)) else {
            self.returns.lost += 1;
            return self.end_row(id, &facts, row, None);
        };
        if self.returns.waiting >= WAITING
            && let Some(Call { tap, facts, row, .. }) = self.returns.oldest()
        {
            if !std::mem::replace(&mut self.returns.has_told_calls, true) {
                log::warn!("{WAITING} calls have not returned: the oldest is given up for each that comes, and counted");
            }
            self.returns.lost += 1;
            self.end_row(tap, &facts, row, None);
        }
        let returns = &mut self.returns;
        let serial = returns.serial;
        if let Some(site) = returns.sites.get_mut(&place) {
            returns.serial += 1;
            returns.waiting += 1;
            returns.ages.push_back((serial, place));
            site.calls.push(Call { serial, rsp: registers.gp.rsp.wrapping_add(8), tap: id, facts, row });
        }
        // Entries of calls that returned are swept out before they are more than the calls there can be.
        if returns.ages.len() > 2 * WAITING {
            let sites = &returns.sites;
            let waits = |(serial, place): &(u64, Place)| {
                sites.get(place).is_some_and(|site| site.calls.iter().any(|call| call.serial == *serial))
            };
            returns.ages.retain(waits);
        }
    }

    /// Has the return address tapped.
    fn tap_return(&mut self, id: TapId, to: Va, context: AddressContext) -> Option<Place> {
        let place = (to, context.root);
        if self.returns.sites.contains_key(&place) {
            return Some(place);
        }
        if self.returns.sites.len() >= SITES {
            self.remove_idle_sites();
        }
        if self.returns.sites.len() >= SITES {
            if !std::mem::replace(&mut self.returns.has_told_sites, true) {
                log::warn!(
                    "{SITES} return addresses are tapped, and calls wait at each: calls from others are not followed, and counted"
                );
            }
            return None;
        }
        let view = self.spec(id)?.view;
        let spec = TapSpec {
            kind: TapKind::Breakpoint,
            va: to,
            context,
            global: false,
            view,
            on_write: None,
            key: None,
            wanted: false,
            enabled: true,
        };
        // Code that is returned to is there; what is not is no return address, and is not waited for.
        let added = self.vmi.translate(to, context).and_then(|_| self.add(&spec));
        let tap = added.inspect_err(|error| log::debug!("the return address {to} is not tapped: {error}")).ok()?;
        self.returns.places.insert(tap, place);
        self.returns.sites.insert(place, Site { tap, calls: Vec::new() });
        Some(place)
    }

    fn remove_idle_sites(&mut self) {
        let idle: Vec<Place> =
            self.returns.sites.iter().filter(|(_, site)| site.calls.is_empty()).map(|(place, _)| *place).collect();
        for place in idle {
            let Some(site) = self.returns.sites.remove(&place) else { continue };
            self.returns.places.remove(&site.tap);
            if let Err(error) = self.remove(site.tap) {
                log::warn!("the return address {} stays tapped: {error}", place.0);
            }
        }
    }

    /// Takes the taps of return addresses out of `self.owners`, and ends the rows of the calls that return here.
    pub(super) fn returned(&mut self, event: &VmiEvent) {
        if !self.returns.are_awaited() {
            return;
        }
        let mut index = 0;
        while let Some(id) = self.owners.get(index).copied() {
            let Some(place) = self.returns.places.get(&id).copied() else {
                index += 1;
                continue;
            };
            self.owners.remove(index);
            let rsp = event.registers.gp.rsp;
            while let Some(site) = self.returns.sites.get_mut(&place)
                && let Some(at) = site.calls.iter().rposition(|call| call.rsp == rsp)
            {
                let Call { tap, facts, row, .. } = site.calls.remove(at);
                self.returns.waiting -= 1;
                self.end_row(tap, &facts, row, Some(event));
            }
        }
    }

    /// A tap goes: its calls are not waited for any more, and return addresses that nobody waits at are let go.
    pub(super) fn forget_returns(&mut self, id: TapId) {
        if self.returns.sites.is_empty() {
            return;
        }
        for Call { tap, facts, row, .. } in self.returns.take(|call| call.tap != id) {
            self.returns.lost += 1;
            self.end_row(tap, &facts, row, None);
        }
        let captures = |id| self.taps.rare(id).and_then(|rare| rare.capture.as_ref()).is_some_and(|c| c.on_return.is_some());
        if !self.taps.iter().any(|(other, tap)| other != id && tap.is_active() && captures(other)) {
            self.remove_idle_sites();
        }
    }

    /// Nobody is waited for any more: the rows that wait are ended without return values.
    pub(super) fn end_waiting_rows(&mut self) {
        for Call { tap, facts, row, .. } in self.returns.take(|_| false) {
            self.returns.lost += 1;
            self.end_row(tap, &facts, row, None);
        }
        let _ = self.recording.settle(0);
    }
}
