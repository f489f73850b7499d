//! The registers of one vCPU, as a snapshot.

use std::sync::atomic::{AtomicU64, Ordering};

use pyo3::prelude::*;
use pyo3::types::{PyDict, PyTuple};

use crate::arch::amd64;

macro_rules! registers {
    ($($(#[doc = $doc:literal])* $name:ident = $($path:ident).+),* $(,)?) => {
        /// The registers of one vCPU, as a snapshot.
        // Atomic, so that the snapshot of a hit that nobody has kept can be written over with the next one (`hit.rs`); it takes no longer.
        #[pyclass(frozen, eq, hash, module = "vmitap._native", name = "Registers")]
        #[derive(Default)]
        pub struct Registers {
            $($name: AtomicU64,)*
        }

        impl Registers {
            /// Writes all of them over.
            #[allow(clippy::useless_conversion, reason = "some are 64 bits wide already")]
            pub fn set(&self, all: &amd64::Registers) {
                $(self.$name.store(u64::from(all.$($path).+), Ordering::Relaxed);)*
            }

            /// As the driver has them, but for what no name is given below.
            #[allow(trivial_numeric_casts, clippy::unnecessary_cast, reason = "some are 64 bits wide already")]
            pub fn all(&self) -> amd64::Registers {
                let mut all = amd64::Registers::default();
                $(all.$($path).+ = self.$name.load(Ordering::Relaxed) as _;)*
                all
            }

            /// Every register by name.
            fn named(&self) -> [(&'static str, u64); NAMES.len()] {
                [$((stringify!($name), self.$name.load(Ordering::Relaxed)),)*]
            }

            fn from_named(values: &[u64]) -> Option<Self> {
                let mut values = values.iter().copied();
                Some(Self { $($name: AtomicU64::new(values.next()?),)* })
            }
        }

        const NAMES: &[&str] = &[$(stringify!($name),)*];

        #[pymethods]
        impl Registers {
            $(
                $(#[doc = $doc])*
                #[getter]
                fn $name(&self) -> u64 {
                    self.$name.load(Ordering::Relaxed)
                }
            )*

            /// The page-table root: CR3 without PCID and flag bits.
            #[getter]
            fn root(&self) -> u64 {
                self.page_root()
            }

            /// The privilege level, 0 to 3 (Intel SDM vol. 3, 5.5).
            #[getter]
            fn cpl(&self) -> u8 {
                self.ring()
            }

            /// Every register by name, in the order above; without the derived `root` and `cpl`.
            fn to_dict<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
                let dict = PyDict::new(py);
                for (name, value) in self.named() {
                    dict.set_item(name, value)?;
                }
                Ok(dict)
            }

            fn __repr__(&self) -> String {
                let shown: Vec<_> = self.named().iter().take(18).map(|(name, value)| format!("{name}={value:#x}")).collect();
                format!("<Registers {}>", shown.join(" "))
            }

            fn __reduce__<'py>(slf: &Bound<'py, Self>) -> PyResult<(Bound<'py, PyAny>, (Bound<'py, PyTuple>,))> {
                let py = slf.py();
                let values = PyTuple::new(py, slf.get().named().map(|(_, value)| value))?;
                Ok((py.import("vmitap._native")?.getattr("_registers")?, (values,)))
            }
        }
    };
}

registers! {
    rax = gp.rax, rbx = gp.rbx, rcx = gp.rcx, rdx = gp.rdx, rsi = gp.rsi, rdi = gp.rdi, rsp = gp.rsp, rbp = gp.rbp,
    r8 = gp.r8, r9 = gp.r9, r10 = gp.r10, r11 = gp.r11, r12 = gp.r12, r13 = gp.r13, r14 = gp.r14, r15 = gp.r15,
    rip = gp.rip, rflags = gp.rflags, cr0 = cr0, cr2 = cr2, cr3 = cr3, cr4 = cr4, efer = efer,
    /// The selector, as are `ss`, `ds`, `es`, `fs`, `gs` and `tr`.
    cs = cs.selector, ss = ss.selector, ds = ds.selector, es = es.selector, fs = fs.selector, gs = gs.selector,
    tr = tr.selector, fs_base = fs.base, gs_base = gs.base,
    /// What SWAPGS exchanges with `gs_base`.
    kernel_gs_base = kernel_gs_base, tr_base = tr.base,
    gdtr_base = gdtr.base, gdtr_limit = gdtr.limit, idtr_base = idtr.base, idtr_limit = idtr.limit,
    star = star, lstar = lstar, sfmask = sfmask,
}

impl From<&amd64::Registers> for Registers {
    fn from(all: &amd64::Registers) -> Self {
        let registers = Self::default();
        registers.set(all);
        registers
    }
}

impl PartialEq for Registers {
    fn eq(&self, other: &Self) -> bool {
        self.named() == other.named()
    }
}

impl Eq for Registers {}

impl std::hash::Hash for Registers {
    fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
        self.named().hash(state);
    }
}

impl Registers {
    /// The page-table root: CR3 without PCID and flag bits.
    pub fn page_root(&self) -> u64 {
        self.all().root().0
    }

    /// The privilege level.
    pub fn ring(&self) -> u8 {
        self.all().cpl()
    }
}

/// Makes registers from what `__reduce__` gave.
#[pyfunction]
#[expect(clippy::needless_pass_by_value, reason = "arguments from Python are owned")]
pub fn _registers(values: Vec<u64>) -> PyResult<Registers> {
    Registers::from_named(&values).ok_or_else(|| super::errors::invalid("values", "too few for the registers of a vCPU"))
}
