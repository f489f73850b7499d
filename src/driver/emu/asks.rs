//! What an engine asks while it runs.

use super::sys::EngineRef;

/// What an access is for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Access {
    Read,
    Write,
    Fetch,
}

/// An answer to a TLB miss: where the page is and which accesses the entry allows (read 1, write 2, execute 4).
#[derive(Clone, Copy, Debug)]
pub struct Fill {
    pub pa: u64,
    pub rights: u8,
}

/// What an engine asks while it runs. Every method is called on the engine's own thread, inside `Engine::run`.
pub trait Hooks: 'static {
    /// A TLB miss on the page at `va`. `None` ends the run before the instruction has any effect.
    fn fill(&self, engine: EngineRef<'_>, va: u64, access: Access) -> Option<Fill>;
    /// An exception or software interrupt. The run ends.
    fn interrupt(&self, vector: u32);
    /// An access to a physical address that is not mapped. The run ends before the instruction has any effect.
    fn unmapped(&self, pa: u64, len: u32, write: bool);
    /// A store of `len` bytes at `pa` is about to be done (only with `EngineKind::Stepper`).
    fn store(&self, pa: u64, len: u32);
    /// A basic block is entered (only with `EngineKind::Main`). True ends the run before it.
    fn block(&self, engine: EngineRef<'_>) -> bool;
    /// An instruction inside a range given to [`EngineRef::watch_code`] is about to run. True ends the run before it.
    fn code(&self, va: u64) -> bool;
    /// `IN`.
    fn port_in(&self, port: u32, size: u32) -> u32;
    /// `OUT`.
    fn port_out(&self, port: u32, size: u32, value: u32);
}
