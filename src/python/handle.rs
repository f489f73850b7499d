//! What `Vm` and its parts hold: the session they belong to, and whether it may still be used.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use pyo3::prelude::*;

use super::errors::stale;
use super::shared::Shared;
use crate::addr::{Pa, VcpuId};
use crate::arch::amd64::AddressContext;
use crate::error::Result;
use crate::session::Session;

/// What [`Handle::open_for`] is asked for in more than one place.
pub const RUNNING: &str = "running";
pub const WRITING: &str = "writing guest memory";

/// The hit a `hit.vm` belongs to.
#[derive(Clone, Copy)]
pub struct Scope {
    pub vcpu: VcpuId,
    pub context: AddressContext,
    pub generation: u64,
}

/// What a `Vm` and its parts know: the session, and the hit it is seen from.
#[derive(Clone)]
pub struct Handle {
    pub(super) shared: Arc<Shared>,
    pub(super) scope: Option<Scope>,
}

impl Handle {
    /// What is shared, if this `hit.vm` is still valid.
    pub fn current(&self) -> PyResult<&Arc<Shared>> {
        match self.scope {
            Some(scope) if self.shared.generation.load(Ordering::Acquire) != scope.generation => Err(stale("hit.vm")),
            _ => Ok(&self.shared),
        }
    }

    /// The same, if the session is open too.
    pub fn open(&self) -> PyResult<&Arc<Shared>> {
        let shared = self.current()?;
        shared.check_open()?;
        Ok(shared)
    }

    /// The same, if the guest can do more than be looked at too: asked for before anything else is.
    pub fn open_for(&self, capability: &'static str) -> PyResult<&Arc<Shared>> {
        let shared = self.open()?;
        shared.caps.check_events(shared.info.driver, capability)?;
        Ok(shared)
    }

    /// The page tables meant by `root`.
    pub fn context(&self, session: &Session, root: Option<u64>) -> Result<AddressContext> {
        let base = match (self.scope, root) {
            (Some(scope), _) => scope.context,
            // Nothing tells how many levels they have; nearly all have four.
            (None, Some(root)) if !self.shared.caps.registers => return Ok(AddressContext::new(Pa(root))),
            (None, _) => AddressContext::from(&session.registers(VcpuId(0))?),
        };
        Ok(root.map_or(base, |root| AddressContext { root: Pa(root), ..base }))
    }
}
