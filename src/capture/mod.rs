//! What is looked at while a vCPU stands still: filters that decide whether a hit counts, and plans of what to read.
//!
//! Both come as a flat description in postfix order ([`Node`]) and are compiled once into a [`Program`], which evaluates without
//! allocating, locking or calling anybody.

mod filter;
mod machine;
mod text;

pub use filter::{Abi, Arith, Node, Program, Register, Test, TextKind, TextTest, Type};
pub use machine::{Machine, Outcome, Scene};
