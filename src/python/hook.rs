//! The loop as Python sees it, and the only place that calls a handler.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use pyo3::PyTraverseError;
use pyo3::exceptions::{PyException, PyTypeError};
use pyo3::gc::PyVisit;
use pyo3::prelude::*;

use super::breakpoint::Breakpoint;
use super::convert::OnWriteArg;
use super::errors::{DeadlineExceededError, HandlerError, busy};
use super::hit::{Hit, stack_arguments};
use super::shared::{Listener, Running, Shared, count};
use super::verdict::{Said, Verdict};
use crate::addr::VcpuId;
use crate::error::{Result, VmiError};
use crate::session::{self, Histogram, Limits, Poll, Session, Stats};
use crate::tap::OnWrite;

/// Between two moments in which other Python threads get their turn.
const KEEP: Duration = Duration::from_millis(10);
/// Such a moment. A thread that waits for the interpreter takes this long to wake; the loop would have it back long before.
const MOMENT: Duration = Duration::from_micros(100);
/// Between two looks at Python's signals.
const SIGNALS: Duration = Duration::from_millis(100);

/// Why the loop ended.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Reason {
    Timeout,
    MaxHits,
    Stopped,
    Paused,
    Detached,
    Idle,
}

impl Reason {
    pub const fn name(self) -> &'static str {
        match self {
            Self::Timeout => "timeout",
            Self::MaxHits => "max_hits",
            Self::Stopped => "stopped",
            Self::Paused => "paused",
            Self::Detached => "detached",
            Self::Idle => "idle",
        }
    }
}

/// One `run`, or one iteration over hits: what it may do, and what the counters were when it began.
pub struct Course {
    pub begun: Instant,
    deadline: Option<Instant>,
    /// The session's hits at which it ends.
    last_hit: Option<u64>,
    pub before: Stats,
    pub holds_before: Box<Histogram>,
    pub calls_before: u64,
    pub lost_before: u64,
    /// The longest a vCPU stood still, in nanoseconds.
    pub hold_max_ns: u64,
    /// It is made in moments: [`drive`] comes back when there is nothing more for now, with this false, or after [`KEEP`], with this true.
    moments: Option<bool>,
    /// Somebody else awaits a handler; then [`drive`] is to be told what it said.
    held: Option<Held>,
}

impl Course {
    pub fn begin(py: Python<'_>, shared: &Shared, timeout: Option<Duration>, max_hits: Option<u64>) -> Self {
        let (before, holds_before) = shared.quick(py, |inner| (inner.session.stats(), Box::new(inner.session.holds().clone())));
        let begun = Instant::now();
        Self {
            begun,
            deadline: timeout.and_then(|timeout| begun.checked_add(timeout)),
            last_hit: max_hits.map(|hits| before.hits.saturating_add(hits)),
            before,
            holds_before,
            calls_before: shared.calls.load(Ordering::Relaxed),
            lost_before: shared.lost.load(Ordering::Relaxed),
            hold_max_ns: 0,
            moments: None,
            held: None,
        }
    }

    /// Whether there may be more at once, of what is made in moments.
    pub fn has_more(&self) -> bool {
        self.moments == Some(true)
    }

    /// The same, made in moments.
    #[must_use]
    pub fn in_moments(self) -> Self {
        Self { moments: Some(true), ..self }
    }

    /// What the handler of the hit in hand returned, to be awaited; once.
    pub fn awaits(&mut self) -> Option<Py<PyAny>> {
        self.held.as_mut()?.state.awaited.as_mut()?.coroutine.take()
    }

    /// Nobody awaits the handler any more: its event is answered by whoever runs the guest next, or ends the session. To be dropped once no
    /// lock is held.
    pub fn abandon(&mut self) -> Option<Held> {
        self.held.take()
    }

    /// What Python handed in.
    pub fn traverse(&self, visit: &PyVisit<'_>) -> Result<(), PyTraverseError> {
        let Some(Held { state: Loop { told, spare, decider, awaited, .. }, .. }) = &self.held else { return Ok(()) };
        if let Some(Told { breakpoint, handler, .. }) = told {
            visit.call(breakpoint)?;
            visit.call(handler)?;
        }
        visit.call(spare)?;
        visit.call(decider)?;
        if let Some(Awaited { coroutine, breakpoint, hit, .. }) = awaited {
            visit.call(coroutine)?;
            visit.call(breakpoint)?;
            visit.call(hit)?;
        }
        Ok(())
    }
}

/// A loop in the middle of an event, whose handler is awaited elsewhere. It is nobody else's to run meanwhile.
pub struct Held {
    state: Loop,
    running: Running,
    handled: Handled,
}

/// A handler is running, until this is dropped.
struct Handled(Arc<Shared>);

impl Drop for Handled {
    fn drop(&mut self) {
        self.0.next_generation();
    }
}

/// What a handler, or the function that is asked about a write, wants done.
enum Answer {
    Verdict(session::Verdict),
    Write(OnWrite),
    /// Of a question of a filter.
    Admit(bool),
}

/// What a function is called for.
#[derive(Clone, Copy)]
enum Asked {
    Verdict,
    Policy,
    Condition,
}

impl Asked {
    /// What holds if there is no answer.
    const fn unanswered(self) -> Answer {
        match self {
            Self::Verdict => Answer::Verdict(session::Verdict::Continue),
            Self::Policy => Answer::Write(OnWrite::Reapply),
            Self::Condition => Answer::Admit(false),
        }
    }
}

impl Answer {
    fn give(self, session: &mut Session) -> Result<()> {
        match self {
            Self::Verdict(verdict) => session.answer(verdict),
            Self::Write(policy) => session.answer_write(policy),
            Self::Admit(value) => session.answer_question_of_filter(value),
        }
    }
}

/// What one look at the session brought.
enum Turn {
    /// The event in hand is answered, and the loop is to end.
    Answered,
    // Boxed: what is not there most of the time is not to be moved around with every hit.
    Failed(Box<VmiError>),
    Hit(Arc<session::Hit>),
    Timeout,
    Idle,
    MaxHits,
}

/// A look at the session: the answer to the hit in hand is given, and the guest goes on.
struct Look<'a> {
    answer: Option<Answer>,
    /// The loop is to end once the event is answered; at a pause at once.
    ends: bool,
    paused: bool,
    course: &'a mut Course,
}

impl Look<'_> {
    #[expect(clippy::inline_always, reason = "as `Session::poll`")]
    #[inline(always)]
    fn take(&mut self, session: &mut Session, deadline: Option<Instant>) -> Turn {
        if let Some(answer) = self.answer.take() {
            if let Err(error) = answer.give(session) {
                return Turn::Failed(Box::new(error));
            }
            if let Some((answered_at, held_ns)) = session.last_hold_ns() {
                self.course.hold_max_ns = self.course.hold_max_ns.max(held_ns);
                if self.course.deadline.is_some_and(|until| answered_at >= until) && !session.has_pending() {
                    return Turn::Timeout;
                }
            }
        }
        // Others at the same event are told first; a pause alone leaves them for later.
        if self.ends {
            let told = if self.paused { Ok(None) } else { session.tell() };
            return match told {
                Ok(None) => Turn::Answered,
                Ok(Some(hit)) => Turn::Hit(hit),
                Err(error) => Turn::Failed(Box::new(error)),
            };
        }
        let hits = self.course.last_hit.map(|last| last.saturating_sub(session.hits()));
        match session.poll(&Limits { deadline, hits }) {
            Ok(Poll::Hit(hit)) => Turn::Hit(hit),
            Ok(Poll::Timeout) => Turn::Timeout,
            Ok(Poll::Idle) => Turn::Idle,
            Ok(Poll::MaxHits) => Turn::MaxHits,
            Err(error) => Turn::Failed(Box::new(error)),
        }
    }
}

/// The state of one [`drive`].
#[derive(Default)]
struct Loop {
    /// The answer to the hit in hand.
    answer: Option<Answer>,
    /// When it was met.
    met_at: Option<Instant>,
    /// The tap that was hit last.
    told: Option<Told>,
    /// What its handler was given: perhaps to be given again.
    spare: Option<Py<Hit>>,
    /// The first thing that went wrong in a handler.
    raised: Option<PyErr>,
    /// The hit whose handler gave the verdict that counts, until its event is answered.
    decider: Option<Py<Hit>>,
    /// The event of the hit that was met last.
    event: Option<(Instant, VcpuId)>,
    /// A handler may return something to be awaited, and this one did.
    can_await: bool,
    awaited: Option<Awaited>,
    paused: bool,
    detach: bool,
}

/// A call of a handler.
#[derive(Clone, Copy)]
struct Call<'a> {
    breakpoint: &'a Py<Breakpoint>,
    hit: &'a Py<Hit>,
    asked: Asked,
    /// When it began, if that is to be known.
    began: Option<Instant>,
}

/// One that has not said yet what it wants.
struct Awaited {
    coroutine: Option<Py<PyAny>>,
    breakpoint: Py<Breakpoint>,
    hit: Py<Hit>,
    asked: Asked,
    began: Option<Instant>,
}

impl Awaited {
    const fn call(&self) -> Call<'_> {
        let Self { breakpoint, hit, asked, began, .. } = self;
        Call { breakpoint, hit, asked: *asked, began: *began }
    }
}

/// A tap that is hit, and whom its hits are told: looked up once for hits that follow each other.
struct Told {
    tap: session::TapId,
    breakpoint: Py<Breakpoint>,
    handler: Option<Py<PyAny>>,
    /// The number of the handlers there were.
    handlers: u64,
}

impl Told {
    fn find(py: Python<'_>, shared: &Shared, tap: session::TapId) -> Option<Self> {
        let handlers = shared.handlers.load(Ordering::Acquire);
        let breakpoint = shared.breakpoint(py, tap)?;
        let handler = breakpoint.get().handler(py);
        Some(Self { tap, breakpoint, handler, handlers })
    }

    fn is_of(&self, shared: &Shared, tap: session::TapId) -> bool {
        self.tap == tap && self.handlers == shared.handlers.load(Ordering::Acquire)
    }
}

/// Lets the guest run and calls handlers until something ends it, or until a listener has enough or a moment is over, once no event is in
/// hand: then `None`.
///
/// A handler's coroutine is handed out, in moments, with its event in hand: see [`Course::awaits`]. Then `said` is what it returned or
/// raised, and nothing is done but the event answered; without that, whatever is raised, every event has been answered before.
pub fn drive(
    py: Python<'_>,
    shared: &Arc<Shared>,
    course: &mut Course,
    listener: Option<&Listener>,
    said: Option<PyResult<Bound<'_, PyAny>>>,
) -> PyResult<Option<Reason>> {
    let op = if listener.is_some() { "next()" } else { "run" };
    let (running, mut state) = match (course.held.take(), said) {
        (None, None) => (shared.start_run(op)?, Loop { can_await: course.moments.is_some(), ..Loop::default() }),
        (Some(Held { mut state, running, handled }), Some(said)) => {
            state.met_at = None;
            if let Some(awaited) = state.awaited.take() {
                state.answer = Some(hear(py, &mut state, awaited.call(), said));
            }
            drop(handled);
            (running, state)
        }
        (held, _) => {
            course.held = held;
            return Err(busy(op));
        }
    };
    let result = turn_until(py, shared, course, listener, &mut state);
    if state.awaited.is_some() {
        course.held = Some(Held { state, running, handled: Handled(shared.clone()) });
        return result;
    }
    let detached = if shared.is_detach_wanted() { shared.close(py) } else { Ok(()) };
    drop(running);
    let reason = result?;
    detached?;
    Ok(reason)
}

fn turn_until(
    py: Python<'_>,
    shared: &Arc<Shared>,
    course: &mut Course,
    listener: Option<&Listener>,
    state: &mut Loop,
) -> PyResult<Option<Reason>> {
    let mut signals_at = Instant::now();
    let mut yields_at = signals_at + KEEP;
    let moment_ends = course.moments.map(|_| if state.answer.is_some() { signals_at } else { yields_at });
    loop {
        shared.refresh_wanted(py);
        // A hit was met a moment ago, and the clock read.
        let met_at = state.met_at.take();
        let now = met_at.unwrap_or_else(Instant::now);
        if now >= signals_at {
            signals_at = now + SIGNALS;
            if let Err(error) = py.check_signals() {
                state.raised.get_or_insert(error);
            }
        }
        if now >= yields_at {
            yields_at = now + KEEP;
            super::gil::detached(py, || std::thread::sleep(MOMENT));
        }
        let is_late = course.deadline.is_some_and(|deadline| now >= deadline);
        let is_stopped = shared.stop.load(Ordering::Acquire);
        let is_over = moment_ends.is_some_and(|ends| now >= ends);
        let has_enough = is_over || listener.is_some_and(|listener| !listener.queue.lock().is_empty());
        let detach = state.detach || shared.is_detach_wanted();
        let ends = state.raised.is_some() || state.paused || detach || is_late || is_stopped || has_enough;
        let mut look = Look { answer: state.answer.take(), ends, paused: state.paused, course: &mut *course };
        // Hits often come in crowds: after one, the next is first waited for without letting go of the interpreter.
        let (turn, kept) = if met_at.is_some()
            && let Some(turn) = shared.briefly(|inner| look.take(&mut inner.session, Some(now)))
        {
            super::log::flush(py);
            (turn, true)
        } else {
            let limit = if look.course.moments.is_some() { Some(now) } else { look.course.deadline };
            (shared.released(py, |inner| look.take(&mut inner.session, limit)), false)
        };
        match turn {
            Turn::Hit(hit) => {
                // A moment ago, if the interpreter was not waited for and nobody else was told of the event before.
                let is_news = state.event != Some((hit.at, hit.vcpu));
                let met = if kept && is_news { hit.at } else { Instant::now() };
                meet(py, shared, state, &hit, met);
                if state.awaited.is_some() {
                    return Ok(None);
                }
            }
            Turn::Timeout if course.moments.is_some() && !ends => {
                course.moments = Some(false);
                return Ok(None);
            }
            Turn::Timeout => {}
            Turn::Idle => return Ok(Some(Reason::Idle)),
            Turn::MaxHits => return Ok(Some(Reason::MaxHits)),
            Turn::Answered => {
                if let Some(error) = state.raised.take() {
                    return Err(error);
                }
                if detach {
                    shared.want_detach();
                    return Ok(Some(Reason::Detached));
                }
                if state.paused {
                    return Ok(Some(Reason::Paused));
                }
                if has_enough {
                    course.moments = course.moments.map(|_| true);
                    return Ok(None);
                }
                if is_stopped {
                    shared.stop.store(false, Ordering::Release);
                    return Ok(Some(Reason::Stopped));
                }
                return Ok(Some(Reason::Timeout));
            }
            Turn::Failed(error) => return Err(failed(py, state, *error)),
        }
    }
}

/// An event could not be answered as it was to be: what was raised before is told first, then whose verdict it was.
fn failed(py: Python<'_>, state: &mut Loop, error: VmiError) -> PyErr {
    if let Some(raised) = state.raised.take() {
        log::warn!("{error}");
        super::log::flush(py);
        return raised;
    }
    match (state.decider.take(), error) {
        (Some(hit), error @ (VmiError::Translation { .. } | VmiError::OutOfRange { .. })) => {
            HandlerError::new_err((hit, PyErr::from(error).into_value(py)))
        }
        (_, error) => error.into(),
    }
}

/// Tells everybody who wants to know of a hit, and finds the answer to it.
fn meet(py: Python<'_>, shared: &Arc<Shared>, state: &mut Loop, hit: &session::Hit, now: Instant) {
    let asked = match (hit.question, hit.ask) {
        (Some(_), _) => Asked::Condition,
        (None, true) => Asked::Policy,
        (None, false) => Asked::Verdict,
    };
    state.answer = Some(asked.unanswered());
    state.met_at = Some(now);
    if state.event.replace((hit.at, hit.vcpu)) != Some((hit.at, hit.vcpu)) {
        state.decider = None;
    }
    let known = state.told.take().filter(|told| told.is_of(shared, hit.tap));
    let Some(told) = known.or_else(|| Told::find(py, shared, hit.tap)) else { return };
    tell(py, shared, state, &told, hit, now, asked);
    state.told = Some(told);
}

fn tell(py: Python<'_>, shared: &Arc<Shared>, state: &mut Loop, told: &Told, hit: &session::Hit, now: Instant, asked: Asked) {
    let breakpoint = &told.breakpoint;
    let tap = breakpoint.get();
    let listeners = if hit.ask || hit.question.is_some() { Vec::new() } else { listeners_of(shared, hit.tap) };
    let function;
    // After an error nobody is called any more, but no hit is kept back from those who only look.
    let handler = match (state.raised.is_some(), hit.ask, hit.question) {
        (true, ..) => None,
        (false, _, Some(number)) => {
            function = tap.predicate(py, number);
            function.as_ref()
        }
        (false, true, None) => tap.ask(),
        (false, false, None) => told.handler.as_ref(),
    };
    if handler.is_none() && listeners.is_empty() {
        return;
    }
    let generation = if handler.is_some() { shared.next_generation() } else { 0 };
    let stack = stack_arguments(py, tap, hit);
    let renews = |spare: &Py<Hit>| stack.is_none() && Hit::renew(spare.bind(py), hit, now, breakpoint, generation);
    let object = match state.spare.take().filter(renews) {
        Some(object) => object,
        None => match Hit::new(py, hit, now, breakpoint, generation, stack) {
            Ok(object) => object,
            Err(error) => {
                state.raised.get_or_insert(error);
                return;
            }
        },
    };
    for listener in &listeners {
        enqueue(py, shared, listener, &object);
    }
    let Some(handler) = handler else { return };
    let said = call(py, shared, state, breakpoint, handler, &object, asked);
    if let Some(said) = said {
        shared.next_generation();
        state.answer = Some(said);
        state.spare = Some(object);
    }
}

fn listeners_of(shared: &Shared, tap: session::TapId) -> Vec<Arc<Listener>> {
    // An empty vector takes no memory, and hardly ever is there one.
    if !shared.has_listeners.load(Ordering::Acquire) {
        return Vec::new();
    }
    shared.listeners.lock().iter().filter(|listener| listener.wants(tap)).cloned().collect()
}

fn enqueue(py: Python<'_>, shared: &Shared, listener: &Listener, hit: &Py<Hit>) {
    let hit = hit.clone_ref(py);
    let mut queue = listener.queue.lock();
    if queue.len() + listener.elsewhere.load(Ordering::Relaxed) < listener.room {
        queue.push_back(hit);
        return;
    }
    drop(queue);
    if listener.lost.fetch_add(1, Ordering::Relaxed) == 0 {
        log::warn!("{} hits wait in a queue of events() that has no room for more: others are lost, and counted", listener.room);
    }
    shared.lost.fetch_add(1, Ordering::Relaxed);
}

/// Calls a handler: what it wants. `None`: that is still to be awaited.
fn call(
    py: Python<'_>,
    shared: &Shared,
    state: &mut Loop,
    breakpoint: &Py<Breakpoint>,
    handler: &Py<PyAny>,
    hit: &Py<Hit>,
    asked: Asked,
) -> Option<Answer> {
    let tap = breakpoint.get();
    count(&shared.calls);
    tap.count_call();
    let began = tap.deadline().map(|_| Instant::now());
    let returned = handler.bind(py).call1((hit,));
    if let (Asked::Verdict, None, Ok(said)) = (asked, began, &returned)
        && said.is_none()
    {
        // As nearly every time.
        return Some(asked.unanswered());
    }
    if state.can_await
        && let Ok(returned) = &returned
        && returned.get_type().hasattr("__await__").unwrap_or_default()
    {
        let (breakpoint, hit) = (breakpoint.clone_ref(py), hit.clone_ref(py));
        state.awaited = Some(Awaited { coroutine: Some(returned.clone().unbind()), breakpoint, hit, asked, began });
        return None;
    }
    Some(hear(py, state, Call { breakpoint, hit, asked, began }, returned))
}

/// What a handler that has come to its end wants. Notes in `state` what it raised, and what it wants beyond this vCPU.
fn hear(py: Python<'_>, state: &mut Loop, call: Call<'_>, returned: PyResult<Bound<'_, PyAny>>) -> Answer {
    let Call { breakpoint, hit, asked, began } = call;
    // `vmitap.aio` says so of a handler that it has cancelled, because its guest is stopped.
    if returned.as_ref().is_ok_and(|returned| returned.is(py.NotImplemented())) {
        return asked.unanswered();
    }
    let took = began.map(|began| began.elapsed().as_secs_f64());
    let read = |returned: Bound<'_, PyAny>| match asked {
        Asked::Condition => read_condition(&returned),
        Asked::Policy => read_policy(&returned),
        Asked::Verdict => read_verdict(&returned, state, hit),
    };
    let answer = match returned.and_then(read) {
        Ok(answer) => answer,
        Err(error) => {
            state.raised.get_or_insert_with(|| handler_error(py, hit, error));
            return asked.unanswered();
        }
    };
    if let (Some(deadline), Some(took)) = (breakpoint.get().deadline(), took)
        && took > deadline
    {
        state.raised.get_or_insert_with(|| DeadlineExceededError::new_err((hit.clone_ref(py), deadline, took)));
    }
    answer
}

/// An `Exception` is told with its hit; what is none (`KeyboardInterrupt`) goes on as it is.
fn handler_error(py: Python<'_>, hit: &Py<Hit>, error: PyErr) -> PyErr {
    if !error.is_instance_of::<PyException>(py) {
        return error;
    }
    let raised = error.into_value(py);
    HandlerError::new_err((hit.clone_ref(py), raised))
}

fn read_verdict(returned: &Bound<'_, PyAny>, state: &mut Loop, hit: &Py<Hit>) -> PyResult<Answer> {
    let go_on = Answer::Verdict(session::Verdict::Continue);
    if returned.is_none() {
        return Ok(go_on);
    }
    let Ok(verdict) = returned.cast::<Verdict>() else {
        let kind = returned.get_type().name()?;
        return Err(PyTypeError::new_err(format!("a handler returns a Verdict or None, not {kind}")));
    };
    let Said::To(verdict) = &verdict.get().0 else {
        // The first verdict counts, and this one comes too late if there was another.
        state.detach |= state.decider.is_none();
        return Ok(go_on);
    };
    if *verdict != session::Verdict::Continue && state.decider.is_none() {
        state.paused = *verdict == session::Verdict::Pause;
        state.decider = Some(hit.clone_ref(returned.py()));
    }
    Ok(Answer::Verdict(verdict.clone()))
}

fn read_condition(returned: &Bound<'_, PyAny>) -> PyResult<Answer> {
    let refuse = |_| PyTypeError::new_err("the function of a Filter.predicate returns True or False");
    returned.extract::<bool>().map(Answer::Admit).map_err(refuse)
}

fn read_policy(returned: &Bound<'_, PyAny>) -> PyResult<Answer> {
    let policy = returned.extract::<OnWriteArg>().map_err(|_| {
        PyTypeError::new_err("the function given as ask= returns OnWrite.REAPPLY, OnWrite.REMOVE or OnWrite.DENY")
    })?;
    if policy.0 == OnWrite::Ask {
        return Err(PyTypeError::new_err("the function given as ask= cannot return OnWrite.ASK"));
    }
    Ok(Answer::Write(policy.0))
}
