//! The Xen driver against the stand-in for Xen's libraries, in every kind whose interfaces differ.

mod attach;
mod bell;
mod dance;
mod end;
mod faults;
mod repair;
mod ring;
mod session;
mod views;

use std::time::Duration;

use vmitap::core::VmiCore;
use vmitap::driver::xen::{Stepping, XenDriver, XenOptions};
use vmitap::driver::{Monitor, VmiEvents, VmiViews, Wait};
use vmitap::event::{EventAction, VmiEvent, VmiEventResponse};
use vmitap::tap::{BreakpointController, TapController};
use vmitap::{MemoryAccess, Pa, View};
use xen_sys::fake::{Answer, Fake, Kind, Reg};

/// Flags of a response (public/vm_event.h).
pub const EMULATE: u32 = 1 << 2;
pub const NOWRITE: u32 = 1 << 3;
pub const TOGGLE: u32 = 1 << 4;
pub const DENY: u32 = 1 << 6;
pub const ALTP2M: u32 = 1 << 7;
pub const SET_REGS: u32 = 1 << 8;
pub const INSN_DATA: u32 = 1 << 9;
pub const FAST: u32 = 1 << 11;
pub const PAUSED: u32 = 1;

/// Where the guest's code is.
pub const CODE: u64 = 0x8000;
/// Where its stack begins.
pub const STACK: u64 = 0x2_0000;

/// A guest whose page tables map every address to itself.
pub fn guest(kind: Kind) -> Fake {
    let fake = Fake::new(kind);
    for (table, next) in [(0, 0x1000_u64), (0x1000, 0x2000), (0x2000, 0x3000)] {
        fake.write(table, &(next | 7).to_le_bytes());
    }
    for page in 0..64 {
        fake.write(0x3000 + page * 8, &(page << 12 | 7).to_le_bytes());
    }
    fake.set_reg(0, Reg::Rip, CODE);
    fake.set_reg(0, Reg::Rsp, STACK);
    fake
}

pub fn options(fake: &Fake) -> XenOptions {
    XenOptions { library: Some(fake.path().to_owned()), ..XenOptions::default() }
}

pub fn attach(fake: &Fake) -> XenDriver {
    XenDriver::attach("guest", &options(fake)).unwrap()
}

/// A guest with code, and a breakpoint on the first instruction.
pub struct Tapped {
    pub fake: Fake,
    pub vmi: VmiCore<XenDriver>,
    pub controller: BreakpointController,
    pub view: View,
}

pub fn tapped_with(kind: Kind, code: &[u8], stepping: Stepping, prepare: impl FnOnce(&Fake)) -> Tapped {
    let fake = guest(kind);
    fake.write(CODE, &[0x90; 4096]);
    fake.write(CODE, code);
    prepare(&fake);
    let driver = XenDriver::attach("guest", &XenOptions { stepping, ..options(&fake) }).unwrap();
    let mut vmi = VmiCore::new(Box::new(driver));
    let view = vmi.driver_mut().create_view(MemoryAccess::RWX).unwrap();
    vmi.driver_mut().monitor(Monitor::Breakpoint, true).unwrap();
    vmi.driver_mut().switch_to_view(view).unwrap();
    let mut controller = BreakpointController::new();
    controller.insert_breakpoint(&mut vmi, Pa(CODE), view).unwrap();
    fake.forget_calls();
    Tapped { fake, vmi, controller, view }
}

pub fn tapped(kind: Kind, code: &[u8]) -> Tapped {
    tapped_with(kind, code, Stepping::Auto, |_| {})
}

impl Tapped {
    /// The event that waits.
    pub fn event(&mut self) -> VmiEvent {
        match self.vmi.driver_mut().wait(Duration::ZERO).unwrap() {
            Wait::Event(event) => event,
            other => panic!("{other:?}"),
        }
    }

    pub fn has_no_event(&mut self) -> bool {
        !matches!(self.vmi.driver_mut().wait(Duration::ZERO).unwrap(), Wait::Event(_))
    }

    /// Answers the event of vCPU 0.
    pub fn answer(&mut self, action: EventAction) {
        let response = VmiEventResponse::action(action).in_view(self.view);
        self.vmi.driver_mut().respond(vmitap::VcpuId(0), &response).unwrap();
    }

    /// Steps over the instruction in the default view.
    pub fn step(&mut self) {
        self.answer(EventAction::FastSingleStep { view: View::DEFAULT });
    }

    pub fn last_answer(&self) -> Answer {
        *self.fake.answers().last().unwrap()
    }

    pub fn view_of_vcpu(&self) -> i64 {
        self.fake.state("view", 0)
    }
}

/// A domain that nobody has touched: what is left after a session.
pub fn is_untouched(fake: &Fake) {
    for (what, expected) in [
        ("maps", 0),
        ("listening", 0),
        ("bound", 0),
        ("monitors", 0),
        ("views", 0),
        ("altp2m", 0),
        ("pauses", 0),
        ("populated", 64),
        ("max_pages", 64),
        ("wiped", 0),
        ("held", 0),
        ("single_step", 0),
        ("view", 0),
        ("uds", 0),
        ("exposures", 0),
    ] {
        assert_eq!(fake.state(what, 0), expected, "{what}");
    }
}
