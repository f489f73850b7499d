//! Filters of taps: which hits count. Evaluated while the vCPU is held; only a question enters the caller.

use std::sync::Arc;

use crate::capture::{FlightOutcome, Machine, Outcome, Program, Scene};
use crate::driver::VmiDriver;
use crate::error::{Result, VmiError};

use super::pending::Pending;
use super::{Session, TapId};

/// The filter of one tap, with what it remembers from hit to hit.
pub struct Filter {
    program: Arc<Program>,
    state: Box<[u64]>,
    /// Hits it kept back.
    pub filtered: u64,
    /// Hits at which memory it looked at could not be read.
    pub faults: u64,
}

/// A filter that stopped at a question.
#[derive(Debug)]
pub struct Question {
    pub tap: TapId,
    number: u16,
    machine: Machine,
}

/// What a filter says.
enum Admission {
    Passes,
    Filtered,
    Asks(Question),
}

impl Filter {
    pub fn new(program: &Arc<Program>) -> Self {
        let state = vec![0; program.slots()].into();
        Self { program: program.clone(), state, filtered: 0, faults: 0 }
    }

    /// Whether it looks at registers and counters only.
    pub fn is_plain(&self) -> bool {
        !self.program.reads() && !self.program.asks()
    }

    /// For one that is plain: whether the hit counts.
    pub fn passes<D: VmiDriver + ?Sized>(&mut self, tap: TapId, scene: &Scene<'_, D>) -> bool {
        matches!(self.look(tap, Machine::default(), scene), Admission::Passes)
    }

    fn look<D: VmiDriver + ?Sized>(&mut self, tap: TapId, mut machine: Machine, scene: &Scene<'_, D>) -> Admission {
        let outcome = machine.run(&self.program, &mut self.state, scene);
        let value = match outcome {
            Outcome::Ask(number) => return Admission::Asks(Question { tap, number, machine }),
            Outcome::Value(value) => value,
        };
        self.faults += u64::from(machine.faults() > 0);
        // What is unknown is no reason to stop for.
        if value == Some(1) {
            return Admission::Passes;
        }
        self.filtered += 1;
        Admission::Filtered
    }
}

impl<D: VmiDriver + ?Sized> Session<D> {
    /// From now on only hits for which `program` is true count; `None`: all. What the one before remembered is forgotten.
    ///
    /// # Errors
    /// [`VmiError::InvalidArgument`] if the program yields a number.
    pub fn set_filter(&mut self, id: TapId, program: Option<&Arc<Program>>) -> Result<()> {
        if program.is_some_and(|program| program.result() != crate::capture::Type::Bool) {
            return Err(VmiError::InvalidArgument { what: "where", reason: "it is a number and no condition".to_owned() });
        }
        self.taps.specialize(id, |rare| rare.filter = program.map(|program| Box::new(Filter::new(program))));
        Ok(())
    }

    /// Takes those whose filter keeps them back out of `self.owners`, and puts open questions into `self.questions`.
    pub(super) fn filter_owners(
        &mut self,
        registers: &crate::arch::amd64::Registers,
        at: (crate::addr::VcpuId, crate::addr::Va),
    ) {
        let Self { vmi, taps, owners, questions, stats, began, .. } = self;
        questions.clear();
        let clock = || began.elapsed().as_nanos() as u64;
        let scene = Scene { vmi: Some(vmi), registers: registers.into(), vcpu: at.0, va: at.1, clock: &clock };
        owners.retain(|id| {
            let Some(filter) = taps.rare_mut(*id).and_then(|rare| rare.filter.as_mut()) else { return true };
            match filter.look(*id, Machine::default(), &scene) {
                Admission::Passes => true,
                Admission::Filtered => {
                    stats.filtered += 1;
                    false
                }
                Admission::Asks(question) => {
                    questions.push(question);
                    true
                }
            }
        });
    }

    /// Answers a hit with [`super::Hit::question`]. If that lets the filter pass, the hit counts and is handed out next.
    ///
    /// # Errors
    /// [`VmiError::NoPendingEvent`] if there is no such hit; as [`Session::answer`] where this ends the event.
    pub fn answer_question_of_filter(&mut self, value: bool) -> Result<()> {
        let asked = self
            .pending
            .as_mut()
            .filter(|pending| pending.is_out && pending.is_question)
            .and_then(|pending| pending.take_question());
        let Some(Question { tap: id, mut machine, .. }) = asked else {
            return Err(VmiError::NoPendingEvent { vcpu: crate::addr::VcpuId(0) });
        };
        machine.answer(value);
        let Self { vmi, taps, pending, stats, spent, began, .. } = self;
        let Some(pending) = pending else { return Ok(()) };
        (pending.is_out, pending.is_question) = (false, false);
        let clock = || began.elapsed().as_nanos() as u64;
        let hit = &pending.hit;
        let scene = Scene { vmi: Some(vmi), registers: (&hit.registers).into(), vcpu: hit.vcpu, va: hit.va, clock: &clock };
        let filter = taps.rare_mut(id).and_then(|rare| rare.filter.as_mut());
        let said = filter.map(|filter| filter.look(id, machine, &scene));
        let passes = matches!(said, Some(Admission::Passes));
        match said.and_then(|said| Some((said, taps.get_mut(id)?))) {
            Some((Admission::Asks(question), _)) => {
                pending.questions.push(question);
                return Ok(());
            }
            Some((Admission::Passes, tap)) => {
                tap.hits += 1;
                stats.hits += 1;
                if tap.is_once() {
                    spent.push(id);
                }
                let wanted = tap.is_wanted();
                let (event, va) = (pending.event(), pending.hit.va);
                self.capture(id, &event, va);
                if wanted {
                    return Ok(());
                }
            }
            Some((Admission::Filtered, _)) => stats.filtered += 1,
            None => {}
        }
        self.expect_flight(if passes { FlightOutcome::Counted } else { FlightOutcome::Filtered }, Some(id));
        if let Some(pending) = &mut self.pending {
            pending.wanted.remove(pending.told);
        }
        self.go_on_after_answer()
    }
}

impl Pending {
    /// The question that comes before the next hit is handed out.
    pub fn question(&self) -> Option<u16> {
        let tap = self.wanted.get(self.told)?;
        self.questions.iter().find(|question| question.tap == *tap).map(|question| question.number)
    }

    fn take_question(&mut self) -> Option<Question> {
        let tap = self.wanted.get(self.told)?;
        let index = self.questions.iter().position(|question| question.tap == *tap)?;
        Some(self.questions.swap_remove(index))
    }
}
