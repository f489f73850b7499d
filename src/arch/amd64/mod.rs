//! x86-64: registers, paging and exceptions. Nothing here touches a guest.

mod exception;
mod paging;
mod register;
mod registers;
mod string;

pub use exception::{Injection, InjectionKind, vector};
pub use paging::{AddressContext, Walk, pte, walk};
pub use register::Register;
pub use registers::{ControlRegister, DescriptorTable, GpRegisters, Registers, Segment, cr0, cr4, efer, rflags};
pub use string::StringStore;
