//! Putting breakpoints, watches and monitors in.

use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;
use pyo3::types::{PyInt, PyString};

use super::breakpoint::{Breakpoint, Common, Given};
use super::convert::{optional, small};
use super::errors::invalid;
use super::expression::{Captured, condition};
use super::handle::Handle;
use crate::addr::{MemoryAccess, Va, View};
use crate::capture::Abi;
use crate::session::{EventSet, MAX_MSRS, TapKind, TapSpec, WriteRule};
use crate::tap::OnWrite;

/// What is put in.
#[derive(Clone, Copy)]
pub enum Kind {
    Breakpoint { view: Option<View>, on_write: Option<OnWrite>, enabled: bool, once: bool },
    Watch { len: u64, access: MemoryAccess },
    Monitor(EventSet),
}

/// Checks what Python gave.
#[expect(clippy::too_many_arguments, reason = "what the signatures Python sees have in common")]
pub fn given(
    py: Python<'_>,
    handler: Option<Py<PyAny>>,
    ask: Option<Py<PyAny>>,
    key: Option<&Bound<'_, PyAny>>,
    tag: Option<Py<PyAny>>,
    (deadline, root): (Option<f64>, Option<&Bound<'_, PyAny>>),
    (filter, captured, abi): (Option<&Bound<'_, PyAny>>, Option<Captured>, Abi),
    budget: Option<&Bound<'_, PyAny>>,
) -> PyResult<Given> {
    for (function, name) in [(&handler, "a handler"), (&ask, "what is given as ask=")] {
        if function.as_ref().is_some_and(|function| !function.bind(py).is_callable()) {
            return Err(PyTypeError::new_err(format!("{name} must be callable")));
        }
    }
    if let Some(deadline) = deadline.filter(|deadline| deadline.is_nan() || *deadline < 0.0) {
        return Err(invalid("deadline", format!("{deadline} is not a length of time")));
    }
    let root = optional("root", root)?;
    let key = key.map_or_else(|| py.None(), |key| key.clone().unbind());
    let budget = budget.map(|budget| self::budget(budget)).transpose()?;
    let condition = condition("where", filter, abi)?;
    let filter = filter.map(|filter| filter.clone().unbind());
    Ok(Given {
        handler,
        ask,
        key,
        tag: tag.unwrap_or_else(|| py.None()),
        deadline,
        root,
        filter,
        condition,
        captured,
        abi,
        budget,
    })
}

/// The registers a monitor is for, one or several each, and the rest as given.
pub fn event_set(cr: Option<&Bound<'_, PyAny>>, msr: Option<&Bound<'_, PyAny>>, mut set: EventSet) -> PyResult<EventSet> {
    const NAMES: [&str; 3] = ["cr0", "cr3", "cr4"];
    let mut add = |name: &Bound<'_, PyAny>| {
        let name: String = name.extract()?;
        let found = set.registers.iter_mut().zip(NAMES).find(|(_, known)| *known == name).map(|(on, _)| *on = true);
        found.ok_or_else(|| invalid("cr", format!("{name:?} is none of \"cr0\", \"cr3\" and \"cr4\"")))
    };
    match cr {
        None => {}
        Some(one) if one.is_instance_of::<PyString>() => add(one)?,
        Some(several) => several.try_iter()?.try_for_each(|each| add(&each?))?,
    }
    let mut slots = set.msrs.iter_mut();
    let mut add = |msr: &Bound<'_, PyAny>| {
        let msr = small("msr", msr, u32::MAX.into())?;
        let slot = slots.next().ok_or_else(|| invalid("msr", format!("one monitor is for {MAX_MSRS} at most")))?;
        *slot = Some(msr);
        PyResult::Ok(())
    };
    match msr {
        None => {}
        Some(one) if one.is_instance_of::<PyInt>() => add(one)?,
        Some(several) => several.try_iter()?.try_for_each(|each| add(&each?))?,
    }
    Ok(set)
}

/// A `Budget` argument.
fn budget(budget: &Bound<'_, PyAny>) -> PyResult<u64> {
    let class = budget.py().import("vmitap.policy")?.getattr("Budget")?;
    if !budget.is_instance(&class)? {
        return Err(PyTypeError::new_err("expected a vmitap.Budget"));
    }
    budget.getattr("per_second")?.extract()
}

/// Puts them in: all or none.
pub fn plant(
    py: Python<'_>,
    vm: &Handle,
    vas: &[Va],
    given: &Given,
    kind: Kind,
    write_rules: &[WriteRule],
) -> PyResult<Vec<Py<Breakpoint>>> {
    let shared = vm.open()?;
    let key = given.key.bind(py);
    let key = if key.is_none() { None } else { Some(shared.intern(py, key)?) };
    let (tap_view, is_journaled) = shared.quick(py, |inner| (inner.session.tap_view(), inner.session.flight().is_some()));
    let (view, length, access) = match kind {
        Kind::Breakpoint { view, .. } => (view.unwrap_or(tap_view), 1, MemoryAccess::X),
        Kind::Watch { len, access } => (tap_view, len, access),
        Kind::Monitor(_) => (tap_view, 0, MemoryAccess::NONE),
    };
    // Made before the lock is taken: making an object can run the collector, and with it any Python code.
    let events = if let Kind::Monitor(set) = kind { Some(set) } else { None };
    let common = Py::new(py, Common::new(py, shared, given, (length, access, events), view))?;
    let make = |va: &Va| Py::new(py, Breakpoint::new(py, &common, *va, given.handler.as_ref()));
    let objects = vas.iter().map(make).collect::<PyResult<Vec<_>>>()?;
    let kept: Vec<_> = objects.iter().map(|object| object.clone_ref(py)).collect();
    let name = |object: &Py<Breakpoint>| object.get().label(py);
    let labels: Vec<String> =
        if given.captured.is_some() || is_journaled { objects.iter().map(name).collect() } else { Vec::new() };
    let everybody = shared.listeners.lock().iter().any(|listener| listener.taps.is_none());
    let wanted = given.handler.is_some() || everybody;
    shared.open_released(py, |session| {
        let context = vm.context(session, given.root)?;
        let spec = |va: &Va| {
            let (kind, on_write, enabled) = match kind {
                Kind::Breakpoint { on_write, enabled, .. } => (TapKind::Breakpoint, on_write, enabled),
                Kind::Watch { len, access } => (TapKind::Watch { len, access }, None, true),
                Kind::Monitor(set) => (TapKind::Monitor(set), None, true),
            };
            TapSpec { kind, va: *va, context, global: given.root.is_none(), view, on_write, key, wanted, enabled }
        };
        let specs: Vec<TapSpec> = vas.iter().map(spec).collect();
        if let Some(captured) = &given.captured {
            session.check_capture(&captured.entry, captured.on_return.as_ref())?;
        }
        let ids = session.add_many(&specs)?;
        if matches!(kind, Kind::Breakpoint { once: true, .. }) {
            for id in &ids {
                session.set_once(*id);
            }
        }
        if let Some(Captured { entry, on_return }) = &given.captured {
            for (id, label) in ids.iter().zip(&labels) {
                session.set_capture(*id, entry.clone(), on_return.clone(), label)?;
            }
        }
        if is_journaled {
            for (id, label) in ids.iter().zip(&labels) {
                session.name_in_flight(*id, label);
            }
        }
        if !write_rules.is_empty() {
            ids.iter().try_for_each(|id| session.set_write_rules(*id, write_rules))?;
        }
        if given.budget.is_some() {
            for id in &ids {
                session.set_budget(*id, given.budget);
            }
        }
        if let Some(program) = &given.condition.program {
            // No event can come in between: the loop needs this lock.
            ids.iter().try_for_each(|id| session.set_filter(*id, Some(program)))?;
        }
        // Before the lock is let go of: the loop may run in another thread and is to find the object of each hit.
        let mut taps = shared.taps.lock();
        let room = ids.last().map_or(0, |last| (last.0 as usize + 1).saturating_sub(taps.len()));
        taps.reserve(room);
        for (id, object) in ids.into_iter().zip(kept) {
            object.get().set_id(id);
            let index = id.0 as usize;
            if taps.len() <= index {
                taps.resize_with(index + 1, || None);
            }
            if let Some(slot) = taps.get_mut(index) {
                *slot = Some(object);
            }
        }
        Ok(())
    })?;
    Ok(objects)
}
