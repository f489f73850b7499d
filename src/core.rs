//! `VmiCore`: a driver with the reads, writes and translations every tool needs.

use crate::addr::{Pa, Va};
use crate::driver::VmiDriver;
use crate::error::Result;

/// A driver, and what is built on its reads and writes.
pub struct VmiCore<D: VmiDriver + ?Sized> {
    driver: Box<D>,
}

impl<D: VmiDriver + ?Sized> VmiCore<D> {
    /// Takes over a driver.
    pub fn new(driver: Box<D>) -> Self {
        Self { driver }
    }

    /// The driver.
    pub fn driver(&self) -> &D {
        &self.driver
    }

    /// The driver, to change the guest with.
    pub fn driver_mut(&mut self) -> &mut D {
        &mut self.driver
    }

    /// The physical address `va` has under `root`, with `levels` (4 or 5) levels of tables.
    pub fn translate(&self, va: Va, root: Pa, levels: u8) -> Result<Pa> {
        let _ = (va, root, levels);
        todo!("core helper")
    }
}
