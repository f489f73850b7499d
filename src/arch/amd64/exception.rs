//! Exception vectors and what can be injected.

/// Exception vectors (Intel SDM vol. 3, table 6-1).
#[expect(missing_docs, reason = "the names are the manual's")]
pub mod vector {
    pub const DE: u8 = 0;
    pub const DB: u8 = 1;
    pub const BP: u8 = 3;
    pub const UD: u8 = 6;
    pub const DF: u8 = 8;
    pub const TS: u8 = 10;
    pub const NP: u8 = 11;
    pub const SS: u8 = 12;
    pub const GP: u8 = 13;
    pub const PF: u8 = 14;
    pub const AC: u8 = 17;
}

/// What kind of event is injected (Intel SDM vol. 3, 24.8.3).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum InjectionKind {
    /// An external interrupt.
    External,
    /// A hardware exception: the saved RIP is the instruction's own.
    Exception,
    /// A software exception or interrupt (INT3, INT n): the saved RIP is behind the instruction.
    Software,
}

/// An interrupt or exception to be delivered to a vCPU through the guest's IDT before its next instruction.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Injection {
    /// The vector.
    pub vector: u8,
    /// What it is.
    pub kind: InjectionKind,
    /// Error code, for the exceptions that push one.
    pub error_code: Option<u32>,
    /// New value of CR2, for a page fault.
    pub cr2: Option<u64>,
    /// Length of the instruction in bytes, for a software exception: what is added to the saved RIP.
    pub insn_len: u8,
}
