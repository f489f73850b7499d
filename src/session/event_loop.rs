//! The loop: wait, decide, answer. Each event is answered exactly once, also when something fails on the way.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::addr::{Gfn, MemoryAccess, Pa, Va, VcpuId, View};
use crate::arch::amd64::{AddressContext, ControlRegister, GpRegisters};
use crate::capture::FlightOutcome;
use crate::core::VmiCore;
use crate::driver::{VmiDriver, Wait};
use crate::error::{Result, TranslationFault, VmiError};
use crate::event::{EventAction, EventReason, VmiEvent, VmiEventResponse};
use crate::tap::{BreakpointController, OnWrite, WriteDecision};

use super::covered::Covered;
use super::monitor::can_be_denied;
use super::pending::{Course, Met, Pending, Vcpu, Walk};
use super::tap::Tap;
use super::write::{AfterWrite, is_store};
use super::{Hit, Limits, Poll, Session, TapId, Verdict};

/// The longest [`Session::poll`] goes on without coming back, so that its caller can look at signals.
const PATIENCE: Duration = Duration::from_millis(100);
/// Events between two looks at the clock.
const EVENTS: u32 = 64;

/// What became of an event.
pub(super) enum Sorted {
    /// It is to be answered at once.
    Answer(Course),
    /// Somebody wants it: it is in `Session::pending`.
    Wanted,
}

impl<D: VmiDriver + ?Sized> Session<D> {
    /// Lets the guest run until there is something for the caller, but at most 100 ms.
    ///
    /// A hit that was handed out and not answered is answered with [`Verdict::Continue`] first.
    ///
    /// # Errors
    /// What the driver fails with. Every event that was received has been answered, unless somebody is still to be asked about it.
    #[expect(clippy::inline_always, reason = "see `Engine::resume` of the embedded driver, which this waits for")]
    #[inline(always)]
    pub fn poll(&mut self, limits: &Limits) -> Result<Poll> {
        self.check_open()?;
        let stop_at = limits.hits.map(|hits| self.stats.hits.saturating_add(hits));
        if let Some(hit) = self.tell()? {
            return Ok(Poll::Hit(hit));
        }
        self.catch_up(None)?;
        self.answer_raw()?;
        if self.has_page_changes(None) {
            self.update_pages(None, None)?;
        }
        let now = self.answered_at.take().unwrap_or_else(Instant::now);
        let left_at = |then: Instant| match limits.deadline {
            // The usual case behind a hit, and a difference takes long to find.
            Some(deadline) if deadline <= then => Duration::ZERO,
            Some(deadline) => deadline.saturating_duration_since(then).min(PATIENCE),
            None => PATIENCE,
        };
        let mut timeout = left_at(now);
        let mut left = EVENTS;
        loop {
            if stop_at.is_some_and(|stop_at| self.stats.hits >= stop_at) {
                return Ok(Poll::MaxHits);
            }
            // From the last look at the clock here; the driver looks at it too.
            let wait = self.wait(timeout, stop_at);
            // By reference: an event is large, and this is done once for each.
            let event = match &wait {
                Ok(Wait::Event(event)) => event,
                Ok(Wait::Taken) => match &self.pending {
                    Some(pending) => return Ok(Poll::Hit(Arc::clone(&pending.hit))),
                    None => continue,
                },
                Ok(Wait::Timeout) => return self.flush_followed().map(|()| Poll::Timeout),
                Ok(Wait::Idle) => return self.flush_followed().map(|()| Poll::Idle),
                Err(_) => return wait.map(|_| Poll::Idle),
            };
            if let Some(hit) = self.receive(event)? {
                return Ok(Poll::Hit(hit));
            }
            left -= 1;
            if left == 0 {
                left = EVENTS;
                let then = Instant::now();
                timeout = left_at(then).min(PATIENCE.saturating_sub(then.saturating_duration_since(now)));
                if timeout.is_zero() {
                    self.flush_followed()?;
                    return Ok(Poll::Timeout);
                }
            }
        }
    }

    /// Looks at a new event: the first hit to be told of it, or it is answered. Apart from the loop, which most hits go round without it.
    #[inline(never)]
    fn receive(&mut self, event: &VmiEvent) -> Result<Option<Arc<Hit>>> {
        self.stats.events += 1;
        self.begin_flight(event);
        let home = self.home_of(event);
        match self.take(event, home) {
            Ok(false) => {
                self.end_flight();
                self.end_hold(self.recording.is_unsettled());
                self.settle_captured()?;
                self.enforce_budgets()?;
                Ok(None)
            }
            Ok(true) => self.tell_or_end(),
            Err(error) => {
                let view = event.view.unwrap_or(self.tap_view);
                let denied = self.is_denied(event, view);
                self.rescue(event, home, denied);
                // What was begun at this hit is no matter of the next one.
                self.sampler.in_hand = None;
                if let Err(also) = self.settle() {
                    log::error!("rows of a hit whose handling failed: {also}");
                }
                Err(error)
            }
        }
    }

    /// Answers an event whose handling failed, so that its vCPU does not stand still for ever. A store is followed all the same, and one
    /// that is to be denied is denied.
    fn rescue(&mut self, event: &VmiEvent, home: View, denied: bool) {
        self.note_flight(FlightOutcome::Failed, None);
        let follow = !denied && is_store(event);
        let Some(vcpu) = self.vcpus.get_mut(usize::from(event.vcpu.0)) else { return };
        vcpu.after_write =
            if follow { vcpu.after_write.take().or(vcpu.unfinished.take()).or_else(|| AfterWrite::of(event)) } else { None };
        vcpu.walk = None;
        vcpu.home = Some(home);
        let response = match event.reason {
            _ if denied => VmiEventResponse::action(EventAction::Deny).in_view(home),
            EventReason::Breakpoint { .. } | EventReason::MemoryAccess { .. } => vcpu.step_clean(home),
            // The step is done, and the write to a register is to be.
            _ => VmiEventResponse::CONTINUE.in_view(home),
        };
        match self.vmi.driver_mut().respond(event.vcpu, &response) {
            // It was answered before the failure.
            Ok(()) | Err(VmiError::NoPendingEvent { .. }) => {}
            Err(error) => {
                log::error!("vCPU {} stands still for now: its event could not be answered: {error}", event.vcpu);
                self.unanswered.open(event.vcpu, home);
            }
        }
    }

    /// The view the vCPU of an event is to be in afterwards: during a step in the default view that is another one.
    fn home_of(&mut self, event: &VmiEvent) -> View {
        let view = event.view.unwrap_or(self.tap_view);
        let Some(vcpu) = self.vcpus.get_mut(usize::from(event.vcpu.0)) else { return view };
        if let Some(moved) = vcpu.moved.take() {
            // The event may have been on its way then, and tells of the view that it happened in.
            return moved;
        }
        vcpu.home.filter(|_| view == View::DEFAULT).unwrap_or(view)
    }

    /// Looks at a new event and answers it, unless somebody wants it: whether somebody does.
    fn take(&mut self, event: &VmiEvent, home: View) -> Result<bool> {
        self.judged.clear();
        let index = usize::from(event.vcpu.0);
        let stores = |vcpu: &Vcpu| vcpu.after_write.is_some() || vcpu.unfinished.is_some();
        let has_stored = self.vcpus.get(index).is_some_and(stores);
        let ended = if has_stored { self.end_write(event) } else { Ok(true) };
        if !matches!(ended, Ok(false)) && self.has_page_changes(Some(event.vcpu)) {
            // Also where the store could not be followed further: nobody else would look at the tables.
            self.update_pages(Some(event.vcpu), Some(&event.registers))?;
        }
        ended?;
        match self.sort(event, home)? {
            Sorted::Wanted => Ok(true),
            Sorted::Answer(course) => {
                self.go_on(event.vcpu, home, course, None)?;
                Ok(false)
            }
        }
    }

    fn sort(&mut self, event: &VmiEvent, home: View) -> Result<Sorted> {
        let view = event.view.unwrap_or(self.tap_view);
        let rip = event.registers.rip();
        self.owners.clear();
        match event.reason {
            EventReason::Breakpoint { gfn, insn_len } => {
                let pa = gfn.pa(rip.0);
                let there = if insn_len == 1 { self.find_breakpoints(view, pa, rip, event) } else { 0 };
                if there == 0 {
                    let own = insn_len != 1 || BreakpointController::is_breakpoint(&self.vmi, event)?;
                    self.stats.reinjected += u64::from(own);
                    // No INT3 of ours, and none of the guest's: it was taken out while the event was on its way.
                    return Ok(Sorted::Answer(if own { Course::Reinject } else { Course::StepClean }));
                }
                Ok(self.count(event, home, Course::StepClean, (rip, pa), MemoryAccess::X))
            }
            EventReason::MemoryAccess { pa, va, access, .. } => {
                let va = va.unwrap_or_default();
                let is_hidden = self.controller.is_hidden(view, pa.gfn());
                let is_table = self.tables.watches(view, pa.gfn());
                let is_watched = self.find_watches(event, view)?;
                let (mut course, mut covered, mut failed) = (Course::StepClean, Covered::default(), Ok(()));
                if access.contains(MemoryAccess::X) {
                    // Executed in the default view, the instruction would pass by the INT3 on it.
                    self.find_breakpoints(view, pa, va, event);
                } else if access.contains(MemoryAccess::W) {
                    self.stats.hidden_writes += u64::from(is_hidden);
                    self.stats.table_writes += u64::from(is_table);
                    covered = self.covered(event, view).unwrap_or_else(|error| {
                        failed = Err(error);
                        Covered::here(event)
                    });
                    self.judge_write(event, view, &covered);
                    // Also where nothing is hidden: before the store is done somebody can plant a breakpoint there.
                    course = Course::Write;
                } else if is_hidden {
                    self.stats.hidden_reads += 1;
                    course = Course::Emulate;
                }
                if self.owners.is_empty() && (!is_watched || is_hidden || is_table) && !access.contains(MemoryAccess::X) {
                    // Nobody asked for it: the price of hiding.
                    return if course == Course::Write {
                        failed?;
                        self.sort_write(event, home, &covered)
                    } else {
                        Ok(Sorted::Answer(course))
                    };
                }
                match self.count(event, home, course, (va, pa), access) {
                    Sorted::Answer(Course::Write) => {
                        failed?;
                        self.sort_write(event, home, &covered)
                    }
                    // Whoever watches is told in any case; what the store covers is looked up again then, and what fails is told.
                    sorted => Ok(sorted),
                }
            }
            EventReason::SingleStep { gfn } => Ok(self.sort_step(event, home, gfn)),
            EventReason::WriteControlRegister { register, new, .. } => {
                if register == ControlRegister::Cr3 {
                    self.note_root(&event.registers, new)?;
                }
                Ok(self.sort_announced(event, home))
            }
            EventReason::WriteMsr { .. }
            | EventReason::DebugException { .. }
            | EventReason::Cpuid { .. }
            | EventReason::DescriptorAccess { .. }
            | EventReason::PortIo { .. }
            | EventReason::GuestRequest => Ok(self.sort_announced(event, home)),
        }
    }

    /// Puts the breakpoints an execution hits into `self.owners`; how many there are at that place, hit or not.
    fn find_breakpoints(&mut self, view: View, pa: Pa, va: Va, event: &VmiEvent) -> usize {
        let owners = &mut self.owners;
        self.manager.for_each_at(view, pa, va, event.registers.root(), |owner, ()| owners.push(owner.tap()))
    }

    /// Counts the hits of `self.owners`, and finds out whether somebody wants one of them.
    pub(super) fn count(
        &mut self,
        event: &VmiEvent,
        home: View,
        course: Course,
        (va, pa): (Va, Pa),
        access: MemoryAccess,
    ) -> Sorted {
        if self.owners.is_empty() {
            self.stats.filtered += 1;
            self.expect_flight(FlightOutcome::Filtered, None);
            return Sorted::Answer(course);
        }
        let met = Self::met(event, home, course, (va, pa), access);
        if let [id] = *self.owners.as_slice()
            && !self.returns.are_awaited()
            && let Some(tap) = self.taps.only_handed(id)
        {
            tap.hits += 1;
            self.stats.hits += 1;
            self.pend(event, &met);
            return Sorted::Wanted;
        }
        self.begin_hold();
        self.returned(event);
        let first = self.owners.first().copied();
        self.spend_budgets();
        self.filter_owners(&event.registers, (event.vcpu, va));
        self.capture_owners(event, va);
        let Self { taps, questions, owners, spent, .. } = self;
        let is_asked = |id: &TapId| questions.iter().any(|question| question.tap == *id);
        let mut is_wanted = false;
        for id in &*owners {
            if let Some(tap) = taps.get_mut(*id) {
                let asked = is_asked(id);
                is_wanted |= tap.is_wanted() || asked;
                tap.hits += u64::from(!asked);
                if tap.is_once() && !asked {
                    spent.push(*id);
                }
            }
        }
        self.stats.hits += (owners.len() - questions.len()) as u64;
        if !is_wanted {
            let (outcome, tap) = match (owners.first().copied(), first) {
                (Some(tap), _) => (FlightOutcome::Counted, Some(tap)),
                (None, Some(tap)) => (FlightOutcome::Filtered, Some(tap)),
                // Only returns that were waited for.
                (None, None) => (FlightOutcome::Answered, None),
            };
            self.expect_flight(outcome, tap);
            return Sorted::Answer(course);
        }
        owners.retain(|id| is_asked(id) || taps.get(*id).is_some_and(Tap::is_wanted));
        let questions = std::mem::take(questions);
        self.pend(event, &met).questions = questions;
        Sorted::Wanted
    }

    const fn met(event: &VmiEvent, home: View, course: Course, (va, pa): (Va, Pa), access: MemoryAccess) -> Met {
        Met { vcpu: event.vcpu, view: event.view, home, reason: event.reason, va, pa, access, step: 0, course }
    }

    /// An event for those in `self.owners`.
    fn pend(&mut self, event: &VmiEvent, met: &Met) -> &mut Pending {
        // How long somebody takes is counted by itself.
        self.sampler.in_hand = None;
        let mut pending = self.spare.take().unwrap_or_else(|| Box::new(Pending::place()));
        pending.begin(met, Instant::now(), &mut self.owners, |registers| *registers = event.registers);
        self.pending.insert(pending)
    }

    /// A write to a hidden page that no watch is for.
    fn sort_write(&mut self, event: &VmiEvent, home: View, covered: &Covered) -> Result<Sorted> {
        let EventReason::MemoryAccess { pa, va, access, .. } = event.reason else { return Ok(Sorted::Answer(Course::Retry)) };
        let view = event.view.unwrap_or(self.tap_view);
        match self.decide_write(view, covered) {
            (WriteDecision::Ask, Some(tap)) => {
                let met = Self::met(event, home, Course::Write, (va.unwrap_or_default(), pa), access);
                self.owners.clear();
                self.pend(event, &met).asking = Some(tap);
                Ok(Sorted::Wanted)
            }
            (WriteDecision::Deny, _) => Ok(Sorted::Answer(Course::Deny)),
            _ => {
                self.prepare_write(event, covered, None)?;
                Ok(Sorted::Answer(Course::Write))
            }
        }
    }

    fn prepare_write(&mut self, event: &VmiEvent, covered: &Covered, answer: Option<OnWrite>) -> Result<()> {
        self.tables.mark_store(&self.vmi, event);
        let after = self.before_write(event, event.view.unwrap_or(self.tap_view), covered, answer)?;
        if let Some(vcpu) = self.vcpus.get_mut(usize::from(event.vcpu.0)) {
            vcpu.after_write = after;
        }
        Ok(())
    }

    /// The same once somebody was told: handlers may have changed what is there.
    fn prepare_told(&mut self, event: &VmiEvent, answer: Option<OnWrite>) -> Result<()> {
        let covered = self.covered(event, event.view.unwrap_or(self.tap_view))?;
        self.prepare_write(event, &covered, answer)
    }

    /// A single-step: of a walk, or the end of a store that was followed.
    fn sort_step(&mut self, event: &VmiEvent, home: View, gfn: Option<Gfn>) -> Sorted {
        let rip = event.registers.rip();
        let Some(slot) = self.vcpus.get_mut(usize::from(event.vcpu.0)) else { return Sorted::Answer(Course::Retry) };
        let is_active = |tap: TapId| self.taps.get(tap).is_some_and(Tap::is_active);
        slot.walk = slot.walk.filter(|walk| walk.left > 0 && is_active(walk.tap));
        let Some(walk) = &mut slot.walk else { return Sorted::Answer(Course::Retry) };
        walk.left -= 1;
        walk.done += 1;
        let (tap, done) = (walk.tap, walk.done);
        let pa = gfn.map_or(Pa(0), |gfn| gfn.pa(rip.0));
        let met = Met { step: done, ..Self::met(event, home, Course::Retry, (rip, pa), MemoryAccess::X) };
        self.owners.clear();
        self.owners.push(tap);
        self.pend(event, &met);
        Sorted::Wanted
    }

    /// The next tap to be told of the event in hand.
    fn next_hit(&mut self) -> Option<Arc<Hit>> {
        let pending = self.pending.as_mut()?;
        loop {
            let (tap, ask) = match pending.wanted.get(pending.told) {
                Some(tap) => (*tap, false),
                None => (pending.asking.filter(|_| pending.told == pending.wanted.len())?, true),
            };
            // A handler before may have taken it out, which is meant to take effect at once.
            let gone = !self.taps.get(tap).is_some_and(Tap::is_active);
            let question = if gone || ask { None } else { pending.question() };
            pending.is_question = question.is_some();
            pending.told += usize::from(question.is_none());
            if gone && !ask {
                continue;
            }
            pending.is_out = true;
            if let Some(flight) = &mut self.flight {
                flight.note(FlightOutcome::Handling, Some(tap.0));
                flight.expect(FlightOutcome::Handled, Some(tap.0));
            }
            let hit = &pending.hit;
            if (hit.tap, hit.ask, hit.question) != (tap, ask, question) {
                // Who was told before keeps what they were told.
                let hit = Arc::make_mut(&mut pending.hit);
                (hit.tap, hit.ask, hit.question) = (tap, ask, question);
            }
            return Some(Arc::clone(&pending.hit));
        }
    }

    /// Answers the hit that [`Session::poll`] returned last. Of several taps at one event the first verdict that is not
    /// [`Verdict::Continue`] decides. Once all are told, the vCPU goes on.
    ///
    /// # Errors
    /// [`VmiError::NoPendingEvent`] if there is none; for [`Verdict::Return`] if the stack cannot be read or the return address
    /// is not canonical, and [`VmiError::InvalidArgument`] for a verdict that does not fit the kind of hit: the vCPU goes on as with
    /// `Continue` then.
    pub fn answer(&mut self, verdict: Verdict) -> Result<()> {
        let Some(pending) = self.pending.as_mut().filter(|pending| pending.is_out) else {
            return Err(VmiError::NoPendingEvent { vcpu: VcpuId(0) });
        };
        if pending.is_question {
            return self.answer_question_of_filter(false);
        }
        pending.is_out = false;
        if pending.told > pending.wanted.len() {
            // The question was not answered: as the default policy says.
            return self.answer_question(OnWrite::Reapply);
        }
        let tap = pending.wanted.get(pending.told - 1).copied();
        if let (Some(tap), None) = (tap, &pending.verdict)
            && verdict != Verdict::Continue
        {
            pending.verdict = Some((tap, verdict));
        }
        self.go_on_after_answer()
    }

    /// Ends the event, unless somebody is still to be told or asked.
    pub(super) fn go_on_after_answer(&mut self) -> Result<()> {
        let Some(pending) = &self.pending else { return Ok(()) };
        if pending.told < pending.wanted.len() || matches!(pending.verdict, Some((_, Verdict::Pause))) {
            return Ok(());
        }
        self.conclude()
    }

    /// The next hit of the event in hand, also of one at which a handler paused; `None`: there is none any more, and it is answered. The guest
    /// does not go on. A hit that was handed out and not answered is answered with [`Verdict::Continue`] first.
    ///
    /// # Errors
    /// As [`Session::answer`].
    pub fn tell(&mut self) -> Result<Option<Arc<Hit>>> {
        if self.pending.as_ref().is_some_and(|pending| pending.is_out) {
            self.answer(Verdict::Continue)?;
        }
        self.tell_or_end()
    }

    /// Tells the next one of the event in hand; `None`: nobody is left, and it is answered.
    fn tell_or_end(&mut self) -> Result<Option<Arc<Hit>>> {
        while self.pending.is_some() {
            if let Some(hit) = self.next_hit() {
                return Ok(Some(hit));
            }
            self.conclude()?;
        }
        Ok(None)
    }

    /// Everybody is told: ends the event, unless it is a write that watches were told of. Then the policies decide first, and somebody may be
    /// still to be asked.
    fn conclude(&mut self) -> Result<()> {
        let Some(pending) = &self.pending else { return Ok(()) };
        if pending.course != Course::Write || pending.asking.is_some() {
            return self.finish();
        }
        let (event, view) = (pending.event(), pending.view.unwrap_or(self.tap_view));
        let covered = self.covered(&event, view);
        // It is decided on also where something fails: a policy is not passed by.
        let (decision, asked) = self.decide_write(view, covered.as_ref().unwrap_or(&Covered::here(&event)));
        let failed = covered.map(drop);
        let Some(pending) = &mut self.pending else { return failed };
        match (decision, asked) {
            (WriteDecision::Ask, Some(tap)) => {
                pending.asking = Some(tap);
                return failed;
            }
            (WriteDecision::Deny, _) => pending.course = Course::Deny,
            _ => {}
        }
        self.finish().and(failed)
    }

    /// Answers a hit with [`Hit::ask`]: what is done with the write.
    ///
    /// # Errors
    /// [`VmiError::NoPendingEvent`] if there is no such hit; [`VmiError::InvalidArgument`] for [`OnWrite::Ask`].
    pub fn answer_write(&mut self, policy: OnWrite) -> Result<()> {
        let is_asked = |pending: &&mut Box<Pending>| pending.is_out && pending.told > pending.wanted.len();
        let Some(pending) = self.pending.as_mut().filter(is_asked) else {
            return Err(VmiError::NoPendingEvent { vcpu: VcpuId(0) });
        };
        if policy == OnWrite::Ask {
            let reason = "a question cannot be answered with `ask`".to_owned();
            return Err(VmiError::InvalidArgument { what: "policy", reason });
        }
        pending.is_out = false;
        self.answer_question(policy)
    }

    fn answer_question(&mut self, policy: OnWrite) -> Result<()> {
        let Some(pending) = &mut self.pending else { return Ok(()) };
        if policy == OnWrite::Deny {
            pending.course = Course::Deny;
        } else {
            let (event, home) = (pending.event(), pending.home());
            if let Err(error) = self.prepare_told(&event, Some(policy)) {
                self.pending = None;
                self.rescue(&event, home, false);
                return Err(error);
            }
        }
        self.finish()
    }

    /// Everybody is told: carries the verdict out and answers the event.
    fn finish(&mut self) -> Result<()> {
        let Some(mut pending) = self.pending.take() else { return Ok(()) };
        let done = self.carry_out(&mut pending);
        self.end_flight();
        self.note_hold(&pending);
        if done.is_err() {
            self.rescue(&pending.event(), pending.home(), pending.course == Course::Deny);
        }
        self.spare = Some(pending);
        if done.is_ok() && !self.recording.is_unsettled() && self.over_budget.is_empty() {
            // As nearly always; what an error has room for is not to be moved around.
            return Ok(());
        }
        let (settled, enforced) = (self.settle(), self.enforce_budgets());
        done?;
        settled?;
        enforced
    }

    fn note_hold(&mut self, pending: &Pending) {
        let now = Instant::now();
        let held_ns = now.saturating_duration_since(pending.hit.at).as_nanos() as u64;
        self.answered_at = Some(now);
        self.last_hold_ns = Some((now, held_ns));
        self.held.add(held_ns);
        self.stats.handled += u64::from(pending.told > pending.wanted.len());
        for tap in &pending.wanted {
            self.stats.handled += 1;
            self.holds.add(held_ns);
            if let Some(rare) = self.taps.rare_or_new(*tap) {
                rare.holds.get_or_insert_default().add(held_ns);
                rare.handed.add(held_ns);
            }
        }
    }

    fn carry_out(&mut self, pending: &mut Pending) -> Result<()> {
        if matches!(pending.verdict, Some((_, Verdict::Deny))) && can_be_denied(&pending.hit.reason) {
            // Noted there: if the answer fails, it is denied all the same.
            pending.course = Course::Deny;
        }
        let pending = &*pending;
        let event = &*pending.hit;
        let index = usize::from(event.vcpu.0);
        if pending.course == Course::Write && self.vcpus.get(index).is_some_and(|vcpu| vcpu.after_write.is_none()) {
            self.prepare_told(&pending.event(), None)?;
        }
        if pending.verdict.is_none() && !pending.touched {
            return self.go_on(event.vcpu, pending.home(), pending.course, None);
        }
        let (mut gp, mut failed) = (None, Ok(()));
        if pending.touched {
            gp = Some(self.vmi.driver().registers(event.vcpu)?.gp);
        }
        if let (Some((tap, verdict)), Some(vcpu)) = (&pending.verdict, self.vcpus.get_mut(index)) {
            if event.step > 0 && *verdict != Verdict::Pause {
                vcpu.walk = None;
            }
            match verdict {
                Verdict::Continue | Verdict::Pause => {}
                Verdict::Step(left) => vcpu.walk = Some(Walk { tap: *tap, done: 0, left: *left }),
                Verdict::Deny if pending.course == Course::Deny => {}
                Verdict::Deny => {
                    let reason = "only a register write or a debug exception that a monitor announces can be denied".to_owned();
                    failed = Err(VmiError::InvalidArgument { what: "verdict", reason });
                }
                Verdict::SetRegisters(changes) if event.reason.is_announced() && !changes.moves(event.registers.gp.rip) => {
                    let reason = "an event of a monitor cannot be changed, only left with another rip".to_owned();
                    failed = Err(VmiError::InvalidArgument { what: "verdict", reason });
                }
                Verdict::SetRegisters(changes) => changes.apply(gp.get_or_insert(event.registers.gp)),
                Verdict::Return(value) => {
                    let gp = gp.get_or_insert(event.registers.gp);
                    let context = AddressContext::from(&event.registers);
                    match return_address(&self.vmi, Va(gp.rsp), context) {
                        Ok(to) => {
                            gp.rip = to;
                            gp.rsp = gp.rsp.wrapping_add(8);
                            gp.rax = *value;
                        }
                        Err(error) => failed = Err(error),
                    }
                }
            }
        }
        // With another RIP the instruction is not executed.
        let leaves = gp.is_some_and(|gp| gp.rip != event.registers.gp.rip);
        let course = if leaves { Course::Retry } else { pending.course };
        if leaves && let Some(vcpu) = self.vcpus.get_mut(index) {
            vcpu.after_write = None;
        }
        self.go_on(event.vcpu, pending.home(), course, gp.as_ref())?;
        failed
    }

    /// Answers an event.
    fn go_on(&mut self, id: VcpuId, home: View, course: Course, registers: Option<&GpRegisters>) -> Result<()> {
        if !self.spent.is_empty() {
            self.remove_spent()?;
        }
        let clean = View::DEFAULT;
        let Some(vcpu) = self.vcpus.get_mut(usize::from(id.0)) else { return Ok(()) };
        // What is denied is not stepped, and an INT3 of the guest's own is delivered: a walk ends there.
        if vcpu.walk.is_some_and(|walk| walk.left == 0) || matches!(course, Course::Deny | Course::Reinject) {
            vcpu.walk = None;
        }
        let reports = vcpu.walk.is_some();
        let action = match course {
            Course::Retry if reports => EventAction::SingleStep { view: home },
            Course::Retry => EventAction::Continue,
            Course::Write => EventAction::SingleStep { view: clean },
            Course::StepClean | Course::Emulate if reports => EventAction::SingleStep { view: clean },
            Course::Emulate if self.vmi.driver().caps().emulate_read => EventAction::Emulate,
            Course::StepClean | Course::Emulate => EventAction::FastSingleStep { view: clean },
            Course::Reinject => EventAction::Reinject,
            Course::Deny => EventAction::Deny,
        };
        vcpu.home = matches!(course, Course::StepClean | Course::Emulate | Course::Write | Course::Deny).then_some(home);
        let response = VmiEventResponse { action, view: Some(home), registers: registers.copied() };
        self.vmi.driver_mut().respond(id, &response)
    }
}

/// The return address on top of the stack.
fn return_address<D: VmiDriver + ?Sized>(vmi: &VmiCore<D>, rsp: Va, context: AddressContext) -> Result<u64> {
    let to = vmi.read_u64(rsp, context)?;
    let bits = if context.levels == 5 { 57 } else { 48 };
    if Va(to).is_canonical(bits) {
        return Ok(to);
    }
    Err(VmiError::Translation { va: Va(to), root: context.root, fault: TranslationFault::NonCanonical })
}
