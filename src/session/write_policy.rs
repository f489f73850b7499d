//! Policies that look at each write: compiled conditions, and what is done where they hold.

use std::sync::Arc;

use crate::addr::View;
use crate::capture::{Machine, Outcome, Program, Scene, Type};
use crate::driver::VmiDriver;
use crate::error::{Result, VmiError};
use crate::event::{EventReason, VmiEvent};
use crate::tap::OnWrite;

use super::covered::Covered;
use super::{Session, TapId};

/// A condition, and what is done with a write for which it holds, or for which it does not.
#[derive(Clone, Debug)]
pub struct WriteRule {
    /// The condition; it asks nobody.
    pub when: Arc<Program>,
    /// Whether it has to hold. What is unknown does not.
    pub holds: bool,
    /// What is done.
    pub then: OnWrite,
}

/// Rules, of which the first that applies decides. Where none does, [`super::TapSpec::on_write`] does.
pub struct WritePolicy {
    rules: Box<[(WriteRule, Box<[u64]>)]>,
    /// Writes at which memory that a rule looked at could not be read.
    pub faults: u64,
}

impl WritePolicy {
    /// What is done with a write; `None`: no rule applies. `remembers`: it counts for `every` and the like.
    fn judge<D: VmiDriver + ?Sized>(&mut self, scene: &Scene<'_, D>, remembers: bool) -> Option<OnWrite> {
        let mut faults = 0;
        let mut found = None;
        for (rule, state) in &mut self.rules {
            let mut machine = Machine::default();
            let outcome = if remembers {
                machine.run(&rule.when, state, scene)
            } else {
                machine.run(&rule.when, &mut state.clone(), scene)
            };
            faults += machine.faults();
            if (outcome == Outcome::Value(Some(1))) == rule.holds {
                found = Some(rule.then);
                break;
            }
        }
        self.faults += u64::from(remembers && faults > 0);
        found
    }
}

/// What the policies that look at each write say of the one in hand.
#[derive(Default)]
pub(super) struct Judgement {
    said: Vec<(TapId, OnWrite)>,
    is_made: bool,
}

impl Judgement {
    /// Nothing is said yet, of the next write.
    pub fn clear(&mut self) {
        self.said.clear();
        self.is_made = false;
    }

    /// Whether they were asked.
    pub const fn is_made(&self) -> bool {
        self.is_made
    }

    /// What is done over the byte of that tap; `None`: nothing was said.
    pub fn of(&self, id: TapId) -> Option<OnWrite> {
        self.said.iter().find(|(tap, _)| *tap == id).map(|(_, policy)| *policy)
    }
}

impl<D: VmiDriver + ?Sized> Session<D> {
    /// From now on the first of these rules that applies says what a write to the tap's byte does. Without rules, and where none does, its
    /// [`super::TapSpec::on_write`] does.
    ///
    /// # Errors
    /// [`VmiError::InvalidArgument`] if a rule yields a number or asks somebody.
    pub fn set_write_rules(&mut self, id: TapId, rules: &[WriteRule]) -> Result<()> {
        if rules.iter().any(|rule| rule.when.result() != Type::Bool || rule.when.asks()) {
            let reason = "a rule is a condition, and asks nobody".to_owned();
            return Err(VmiError::InvalidArgument { what: "on_write", reason });
        }
        let with_state = |rule: &WriteRule| (rule.clone(), vec![0; rule.when.slots()].into());
        if let Some(rare) = self.taps.rare_or_new(id) {
            let policy = || Box::new(WritePolicy { rules: rules.iter().map(with_state).collect(), faults: 0 });
            rare.write_policy = (!rules.is_empty()).then(policy);
        }
        Ok(())
    }

    /// Puts what the policies of the breakpoints on the pages of a write say of it into `self.judged`, once for each write: what counts
    /// counts once.
    pub(super) fn judge_write(&mut self, event: &VmiEvent, view: View, covered: &Covered) {
        let EventReason::MemoryAccess { va, .. } = event.reason else { return };
        let taps_beside = self.taps_beside(view, covered);
        self.judged.is_made = true;
        let Self { vmi, taps, judged, began, .. } = self;
        let clock = || began.elapsed().as_nanos() as u64;
        let scene = Scene {
            vmi: Some(vmi),
            registers: (&event.registers).into(),
            vcpu: event.vcpu,
            va: va.unwrap_or_default(),
            clock: &clock,
        };
        for (id, pa) in taps_beside {
            let Some(policy) = taps.rare_mut(id).and_then(|rare| rare.write_policy.as_mut()) else { continue };
            // A string instruction may go on to a byte that this write does not cover.
            if let Some(said) = policy.judge(&scene, covered.contains(pa)) {
                judged.said.push((id, said));
            }
        }
    }
}
