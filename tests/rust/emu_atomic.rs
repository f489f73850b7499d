//! Failures of the real driver: a guest that runs on after each of them computes the same and sees nothing.

use std::time::Duration;

use vmitap::arch::amd64::AddressContext;
use vmitap::core::VmiCore;
use vmitap::driver::emu::EmuDriver;
use vmitap::driver::{VmiProtection, VmiRead, VmiWrite};
use vmitap::image::Image;
use vmitap::session::{EventSet, Limits, Poll, Session, TapId, TapKind, TapSpec};
use vmitap::symbols::SymbolTable;
use vmitap::tap::{Breakpoint, BreakpointManager, OnWrite};
use vmitap::{MemoryAccess, Pa, Result, Va, VcpuId, View};

use super::atomic::Panicking;
use super::guest::{assemble, library, options};
use super::harness::{Faulty, World, each_call_failing_on_one, each_call_panicking_on_one};
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

/// A manager with a controller of its own in a view of the session.
struct Managed {
    vmi: VmiCore<Faulty<EmuDriver>>,
    c: Panicking,
    m: BreakpointManager<u32, ()>,
    context: AddressContext,
    view: View,
    at: [Va; 3],
}

impl Managed {
    fn points(&self) -> Vec<Breakpoint<u32, ()>> {
        let point = |(key, va)| Breakpoint { view: self.view, va, context: self.context, key, tag: (), global: false };
        (0..).zip(self.at).map(point).collect()
    }
}

impl World for Managed {
    type Driver = EmuDriver;

    fn driver(&self) -> Faulty<EmuDriver> {
        self.vmi.driver().clone()
    }

    fn books(&self) -> Vec<String> {
        let mut books: Vec<_> = self.m.iter().map(|found| format!("{found:?}")).collect();
        books.sort();
        books.push(self.c.inner.shadow_frames().to_string());
        books
    }
}

/// Every operation of a manager, with a controller that panics and with calls that fail; in the end nothing of it is left.
fn manage(lab: &Lab, view: View, at: [Va; 3]) {
    let vmi = VmiCore::new(Box::new(lab.w.driver.clone()));
    let mut w = Managed { vmi, c: Panicking::default(), m: BreakpointManager::new(), context: lab.w.context, view, at };
    let before = w.driver().seen();
    let arm = |w: &mut Managed, n: usize| std::mem::replace(&mut w.c.left, n) == 0;
    let insert = |w: &mut Managed| {
        let points = w.points();
        w.m.insert_many(&mut w.vmi, &mut w.c, points).map(drop)
    };
    let remove = |w: &mut Managed| {
        let point = w.points()[1];
        assert!(w.m.remove(&mut w.vmi, &mut w.c, point.view, point.va, point.context.root, &point.key)?);
        Ok(())
    };
    let rest = |w: &mut Managed| w.m.remove_by_view(&mut w.vmi, &mut w.c, w.view).map(drop);
    for round in 0..2 {
        for op in [&insert as &dyn Fn(&mut Managed) -> Result<()>, &remove, &rest] {
            let calls =
                if round == 0 { each_call_panicking_on_one(&mut w, op, arm) } else { each_call_failing_on_one(&mut w, op) };
            println!("managed: {calls} calls");
        }
        assert!(w.m.is_empty());
        assert_eq!(w.driver().seen().differences(&before), "");
    }
    w.c.inner.clear(&mut w.vmi).unwrap();
}

/// What is compared after a failure shows the smallest difference.
fn assert_differences_show(driver: &Faulty<EmuDriver>, view: View) {
    let (seen, at) = (driver.seen(), Pa(0x20_0123));
    let differs = |what: &str| {
        let differences = driver.seen().differences(&seen);
        assert!(differences.contains(what), "{what}: {differences}");
    };
    let mut byte = [0];
    driver.inner().read(at, &mut byte).unwrap();
    driver.inner().write(at, &[!byte[0]]).unwrap();
    differs("memory");
    driver.inner().write(at, &byte).unwrap();
    let found = driver.inner().memory_access(view, at.gfn()).unwrap();
    driver.inner().set_memory_access(view, at.gfn(), MemoryAccess::R).unwrap();
    differs("access");
    driver.inner().set_memory_access(view, at.gfn(), found).unwrap();
    assert_eq!(driver.seen().differences(&seen), "");
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
    let pending = TapSpec { va: Va(0x7000_0000_0000), global: false, ..f };
    let set = EventSet { registers: [true, true, false], msrs: [Some(0x10); 8], cpuid: true, ..EventSet::default() };
    let monitor = TapSpec { kind: TapKind::Monitor(set), ..f };
    let of_cpuid = TapSpec { kind: TapKind::Monitor(EventSet { cpuid: true, ..EventSet::default() }), ..f };
    let data = Pa(lab.va("f_sum").page().0.wrapping_sub(lab.offset));
    let ops: [(&str, Operation); 20] = [
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
        (
            "write_pa",
            Box::new(move |w| {
                let mut bytes = vec![0; 0x1000];
                w.driver.inner().read(data, &mut bytes)?;
                w.session.write_pa(data, &bytes)
            }),
        ),
        ("monitor", Box::new(move |w| w.session.add_many(&[monitor, of_cpuid]).map(drop))),
        ("disable a monitor", Box::new(|w| w.session.disable(TapId(4)))),
        ("enable a monitor", Box::new(|w| w.session.enable(TapId(4)))),
        ("remove one monitor", Box::new(|w| w.session.remove_many(&[TapId(4), TapId(1)]))),
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
        ("remove many", Box::new(|w| w.session.remove_many(&[TapId(0), TapId(2), TapId(5)]))),
        // With nothing else there, the tables are watched for it alone.
        ("add what waits", Box::new(move |w| w.session.add_many(&[pending, TapSpec { global: true, ..pending }]).map(drop))),
        ("disable what waits", Box::new(|w| w.session.disable(TapId(9)))),
        ("enable what waits", Box::new(|w| w.session.enable(TapId(9)))),
        ("remove what waits", Box::new(|w| w.session.remove_many(&[TapId(8), TapId(9)]))),
        ("add again", Box::new(move |w| w.session.add_many(&[f, g, h]).map(drop))),
    ];
    for (name, op) in &ops {
        let calls = each_call_failing_on_one(&mut lab.w, op);
        println!("{name}: {calls} calls");
        if *name == "create" {
            let view = lab.w.session.views()[2];
            assert_differences_show(&lab.w.driver, view);
            manage(&lab, view, [f.va, h.va, Va(lab.va("f_sum").0)]);
        }
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
