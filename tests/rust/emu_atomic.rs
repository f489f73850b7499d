//! Failures of the real driver: a guest that runs on after each of them computes the same and sees nothing.

use std::time::Duration;

use vmitap::arch::amd64::AddressContext;
use vmitap::driver::VmiRead;
use vmitap::driver::emu::EmuDriver;
use vmitap::image::Image;
use vmitap::session::{Limits, Poll, Session, TapId, TapKind, TapSpec};
use vmitap::symbols::SymbolTable;
use vmitap::tap::OnWrite;
use vmitap::{MemoryAccess, Pa, Result, Va, VcpuId};

use super::guest::{assemble, library, options};
use super::harness::{Faulty, each_call_failing_on_one};
use super::session_atomic::Tapped;

struct Lab {
    w: Tapped<EmuDriver>,
    symbols: SymbolTable,
    offset: u64,
}

impl Lab {
    fn boot(elf: &[u8], vcpus: u16, command_line: &str) -> Self {
        let image = Image::parse("test guest", elf).unwrap();
        let driver = Faulty::new(EmuDriver::boot(&library(), "test", &image, &options(vcpus, command_line)).unwrap());
        let segment = &image.segments[0];
        let offset = segment.va.0.wrapping_sub(segment.pa.0);
        let session = Session::new(Box::new(driver.clone()), OnWrite::Reapply).unwrap();
        Self { w: Tapped { session, driver, context: AddressContext::new(Pa(0)) }, symbols: image.symbols, offset }
    }

    fn va(&self, name: &str) -> Va {
        self.symbols.resolve(name).unwrap()
    }

    fn word(&self, name: &str) -> u64 {
        let mut word = [0; 8];
        self.w.driver.inner().read(Pa(self.va(name).0.wrapping_sub(self.offset)), &mut word).unwrap();
        u64::from_le_bytes(word)
    }

    fn spec(&self, name: &str) -> TapSpec {
        TapSpec {
            kind: TapKind::Breakpoint,
            va: self.va(name),
            context: self.w.context,
            global: true,
            view: self.w.session.tap_view(),
            on_write: None,
            key: None,
            wanted: false,
            enabled: true,
        }
    }

    /// Lets the guest run until there were `hits` more, or to its end.
    fn run(&mut self, hits: Option<u64>) {
        loop {
            match self.w.session.poll(&Limits { deadline: None, hits }).unwrap() {
                Poll::Timeout => {}
                Poll::Hit(_) => panic!("nobody wants a hit"),
                Poll::Idle | Poll::MaxHits => return,
            }
        }
    }
}

type Operation = Box<dyn Fn(&mut Tapped<EmuDriver>) -> Result<()>>;

#[test]
fn whichever_call_of_the_emulators_driver_fails_the_guest_runs_on_as_if_nothing_had_been() {
    let mut lab = Lab::boot(&assemble("calls.S"), 2, "n=600 every=100");
    // Up to where the guest's page tables are its own.
    while lab.word("golden_done") == 0 {
        assert!(matches!(lab.w.session.wait_raw(Duration::from_millis(1)), Ok(vmitap::driver::Wait::Timeout)));
    }
    lab.w.context = AddressContext::from(&lab.w.session.registers(VcpuId(0)).unwrap());
    let (f, g, h) = (lab.spec("f"), lab.spec("g"), lab.spec("h"));
    let watch = TapSpec { kind: TapKind::Watch { len: 8, access: MemoryAccess::W }, ..lab.spec("f_sum") };
    let ops: [(&str, Operation); 9] = [
        ("add", Box::new(move |w| w.session.add_many(&[f, g, h, watch]).map(drop))),
        ("disable", Box::new(|w| w.session.disable(TapId(1)))),
        ("enable", Box::new(|w| w.session.enable(TapId(1)))),
        (
            "write",
            Box::new(move |w| {
                let mut bytes = [0; 64];
                w.session.vmi().read(f.va, f.context, &mut bytes)?;
                w.session.write(f.va, f.context, &bytes)
            }),
        ),
        ("create", Box::new(|w| w.session.create_view(MemoryAccess::RWX).map(drop))),
        (
            "add there",
            Box::new(move |w| {
                let view = w.session.views()[2];
                w.session.add_many(&[TapSpec { view, ..f }, TapSpec { view, ..h }]).map(drop)
            }),
        ),
        ("switch", Box::new(|w| w.session.switch_to_view(w.session.views()[2]))),
        ("destroy", Box::new(|w| w.session.destroy_view(w.session.views()[2]))),
        ("remove", Box::new(|w| w.session.remove(TapId(3)))),
    ];
    for (name, op) in &ops {
        let calls = each_call_failing_on_one(&mut lab.w, op);
        println!("{name}: {calls} calls");
        lab.run(Some(20));
    }
    lab.run(None);
    assert_eq!((lab.word("done"), lab.word("f_count"), lab.word("f_sum"), lab.word("wrong_results")), (1, 600, 179_700, 0));
    let hits = lab.w.session.stats().hits;
    assert!(hits > 180, "{hits}");
    let mismatches = lab.va("mismatches");
    for kind in 0..10 {
        let mut word = [0; 8];
        lab.w.driver.inner().read(Pa(mismatches.0.wrapping_sub(lab.offset) + 8 * kind), &mut word).unwrap();
        assert_eq!(u64::from_le_bytes(word), 0, "reads of kind {kind} saw a breakpoint");
    }
    assert!(lab.word("checks") > 5 && lab.word("ap_checks") > 0);
    lab.w.session.detach().unwrap();
}
