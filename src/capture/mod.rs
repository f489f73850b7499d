//! What is looked at while a vCPU stands still: filters that decide whether a hit counts, and plans of what to read.
//!
//! Expressions come as a flat description in postfix order ([`Node`]) and are compiled once into a [`Program`], which evaluates without
//! allocating, locking or calling anybody.

mod filter;
mod flight;
mod machine;
mod output;
mod plan;
mod recording;
mod text;

pub use filter::{Abi, Arith, MAX_ARGUMENT, Node, Program, Test, TextKind, TextTest, Type};
pub use flight::{Flight, FlightEvent, FlightKind, FlightOutcome, FlightRecorder, MAX_SLOTS};
pub use machine::{Machine, Outcome, RegisterSource, Scene};
pub use output::{Format, Output};
pub use plan::{Cell, Column, Kind, MAX_BYTES, MAX_COLUMNS, MAX_FRAMES, Plan, Row, Source};
pub use recording::{Facts, Places, Recording, SCHEMA_VERSION};
