//! What is particular to a processor architecture.

pub mod amd64;
