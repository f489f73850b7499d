//! What the crate's parts do together, on the mock driver.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test that cannot go on panics, also in its helper functions"
)]

mod atomic;
mod capture;
mod core;
#[cfg(feature = "dump")]
mod dump;
#[cfg(feature = "dump")]
mod dump_files;
#[cfg(all(feature = "dump", feature = "emu"))]
mod dump_guest;
#[cfg(feature = "emu")]
mod emu;
#[cfg(feature = "emu")]
mod emu_atomic;
#[cfg(feature = "emu")]
mod emu_direct;
#[cfg(feature = "emu")]
mod emu_guests;
#[cfg(feature = "emu")]
mod failures;
mod filter;
mod flight;
#[cfg(feature = "emu")]
mod guest;
mod harness;
mod image;
mod journal;
mod layering;
mod lines;
mod manager_changes;
mod manager_pages;
mod mock;
mod model;
#[path = "../../benches/common/nothing.rs"]
mod nothing;
mod paging;
#[cfg(feature = "emu")]
mod paging_guest;
mod paging_session;
#[cfg(feature = "emu")]
mod poke_guest;
#[cfg(feature = "emu")]
mod policy_guest;
mod ptm;
mod repair;
mod schedules;
mod session;
mod session_atomic;
mod tap;
mod tap_manager;
mod times;
mod unanswered;
mod watched_writes;
#[cfg(feature = "xen")]
mod xen;
