//! Breakpoints whose pages come and go, on the embedded driver with the guest of tests/guests/paging.S.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use vmitap::arch::amd64::AddressContext;
use vmitap::driver::emu::EmuDriver;
use vmitap::driver::{VmiInfo, VmiProtection};
use vmitap::image::Image;
use vmitap::session::{Hit, Limits, Poll, Session, TapId, TapKind, TapSpec, TapState, Verdict};
use vmitap::symbols::SymbolTable;
use vmitap::tap::OnWrite;
use vmitap::{MemoryAccess, Pa, Va, VcpuId};

use super::guest::{assemble, library, options};

/// The addresses of paging.S.
const KERNEL: u64 = 0xffff_ffff_8000_0000;
const TARGET: Va = Va(0x80_0020_5040);
const FIRST: Va = Va(0x80_0020_0040);
const ROLE1: Va = Va(0x80_0060_0040);
const ROLE3: Va = Va(0x100_0000_3040);

/// A guest under a session.
pub struct Guest {
    pub session: Session<EmuDriver>,
    symbols: SymbolTable,
    /// Virtual address, physical address and length of each.
    segments: Vec<(u64, u64, u64)>,
}

impl Guest {
    pub fn boot(source: &str, vcpus: u16, command_line: &str) -> Self {
        let elf = assemble(source);
        let image = Image::parse("test guest", &elf).unwrap();
        let vm = EmuDriver::boot(&library(), "test", &image, &options(vcpus, command_line)).unwrap();
        let segments = image.segments.iter().map(|part| (part.va.0, part.pa.0, part.memory_size)).collect();
        Self { session: Session::new(Box::new(vm), OnWrite::Reapply).unwrap(), symbols: image.symbols, segments }
    }

    pub fn va(&self, name: &str) -> Va {
        self.symbols.resolve(name).unwrap()
    }

    pub fn word(&self, name: &str) -> u64 {
        let va = self.va(name).0;
        let (from, pa, _) = self.segments.iter().find(|(from, _, len)| (*from..from + len).contains(&va)).unwrap();
        self.session.vmi().read_pa_u64(Pa(va - from + pa)).unwrap()
    }

    pub fn here(&self) -> AddressContext {
        AddressContext::from(&self.session.registers(VcpuId(0)).unwrap())
    }

    /// A global breakpoint that is only counted.
    fn spec(&self, va: Va) -> TapSpec {
        TapSpec {
            kind: TapKind::Breakpoint,
            va,
            context: self.here(),
            global: true,
            view: self.session.tap_view(),
            on_write: None,
            key: None,
            wanted: false,
            enabled: true,
        }
    }

    pub fn tap(&mut self, va: Va, root: Option<AddressContext>, wanted: bool) -> TapId {
        let spec = self.spec(va);
        let spec = TapSpec { context: root.unwrap_or(spec.context), global: root.is_none(), wanted, ..spec };
        self.session.add(&spec).unwrap()
    }

    pub fn tap_under(&mut self, va: Va, on_write: OnWrite) -> TapId {
        self.session.add(&TapSpec { on_write: Some(on_write), ..self.spec(va) }).unwrap()
    }

    /// Runs until nothing can run, with each question about `tap` answered so; nothing else is told. Who wrote, each time.
    pub fn run_asking(&mut self, tap: TapId, answer: OnWrite) -> Vec<u16> {
        let mut writers = Vec::new();
        let end = Instant::now() + Duration::from_secs(60);
        loop {
            assert!(Instant::now() < end, "the guest hangs: {:x?}", self.session.registers(VcpuId(0)).unwrap().gp);
            match self.session.poll(&Limits::default()).unwrap() {
                Poll::Hit(hit) => {
                    assert_eq!((hit.tap, hit.ask, hit.access), (tap, true, MemoryAccess::W));
                    writers.push(hit.vcpu.0);
                    self.session.answer_write(answer).unwrap();
                }
                Poll::Idle => return writers,
                _ => {}
            }
        }
    }

    pub fn watch(&mut self, va: Va, len: u64, access: MemoryAccess) -> TapId {
        self.session.add(&TapSpec { kind: TapKind::Watch { len, access }, ..self.spec(va) }).unwrap()
    }

    /// Runs until nothing can run, with `handler` for each hit that is wanted.
    pub fn run(&mut self, mut handler: impl FnMut(&mut Self, &Hit)) {
        let end = Instant::now() + Duration::from_secs(60);
        loop {
            assert!(Instant::now() < end, "the guest hangs: {:x?}", self.session.registers(VcpuId(0)).unwrap().gp);
            match self.session.poll(&Limits::default()).unwrap() {
                Poll::Hit(hit) => {
                    handler(self, &hit);
                    self.session.answer(Verdict::Continue).unwrap();
                }
                Poll::Idle => return,
                _ => {}
            }
        }
    }

    pub fn hits(&self, tap: TapId) -> u64 {
        self.session.tap_stats(tap).hits
    }

    pub fn console(&self) -> String {
        String::from_utf8(self.session.vmi().driver().console().unwrap()).unwrap()
    }

    /// The guest came to its end, and everything was for it as if nobody looked.
    pub fn assert_done(&self) {
        let words = ["done", "wrong", "mismatches"].map(|name| self.word(name));
        assert_eq!(words, [1, 0, 0], "done, wrong calls, mismatches; console: {}", self.console());
    }
}

/// The guest of paging.S with breakpoints at every address that comes and goes; what it says after each phase.
struct Run {
    guest: Guest,
    taps: BTreeMap<&'static str, TapId>,
    /// Page-ins and page-outs of each phase, and the states of the taps after it.
    phases: BTreeMap<u64, ([u64; 2], BTreeMap<&'static str, TapState>)>,
}

fn run(vcpus: u16, tapped: bool) -> Run {
    let mut guest = Guest::boot("paging.S", vcpus, "");
    let ready = guest.tap(guest.va("ready"), None, true);
    let mark = guest.tap(guest.va("mark"), None, true);
    let (mut taps, mut phases) = (BTreeMap::new(), BTreeMap::new());
    let mut before = [0; 2];
    guest.run(|guest, hit| {
        if hit.tap == ready && tapped {
            let [root1, root2, root3] = ["root1", "root2", "root3"].map(|name| AddressContext::new(Pa(guest.word(name))));
            for (name, va, root) in [
                ("target", TARGET, Some(root1)),
                ("target 2", TARGET, Some(root2)),
                ("target 3", TARGET, Some(root3)),
                ("target global", TARGET, None),
                ("first", FIRST, Some(root1)),
                ("role 1", ROLE1, Some(root1)),
                ("role 3", ROLE3, Some(root3)),
            ] {
                taps.insert(name, guest.tap(va, root, false));
            }
            assert!(taps.values().all(|tap| guest.session.state(*tap) == TapState::Pending));
            let in_table = guest.va("in_table");
            taps.insert("in table", guest.tap(in_table, None, false));
        } else if hit.tap == mark {
            let stats = guest.session.stats();
            let now = [stats.page_ins, stats.page_outs];
            let states = taps.iter().map(|(name, tap)| (*name, guest.session.state(*tap))).collect();
            phases.insert(hit.registers.gp.rdi, ([now[0] - before[0], now[1] - before[1]], states));
            before = now;
        }
    });
    Run { guest, taps, phases }
}

fn assert_each_call_is_a_hit(run: &Run) {
    let guest = &run.guest;
    guest.assert_done();
    let word = |name| guest.word(name);
    for (tap, calls) in [
        ("target", word("made_1")),
        ("target 2", word("made_2")),
        ("target 3", 0),
        ("target global", word("made_1") + word("made_2")),
        ("first", word("made_first")),
        ("role 1", word("made_role1")),
        ("role 3", word("made_role3")),
        ("in table", word("made_in_table")),
    ] {
        assert_eq!(guest.hits(run.taps[tap]), calls, "{tap}");
    }
    assert_eq!(["made_2", "made_first", "made_role1", "made_role3", "made_in_table"].map(word), [3, 3, 2, 2, 3]);
}

/// What the guest itself counts, which must not depend on who looks.
const TRUTH: [&str; 14] = [
    "made_1",
    "made_2",
    "made_first",
    "made_role1",
    "made_role3",
    "made_in_table",
    "ran_a",
    "ran_b",
    "ran_c",
    "ran_d",
    "ran_e",
    "ran_f",
    "ran_g",
    "absent",
];

#[test]
fn every_call_that_happens_while_its_page_is_mapped_is_a_hit_however_the_table_is_written() {
    for vcpus in [1, 2, 3] {
        let (plain, tapped) = (run(vcpus, false), run(vcpus, true));
        plain.guest.assert_done();
        assert_each_call_is_a_hit(&tapped);
        let truth = |run: &Run| TRUTH.map(|name| run.guest.word(name));
        assert_eq!(truth(&tapped), truth(&plain), "{vcpus} vCPUs");
        assert!(tapped.guest.word("made_1") > 30);
        assert_eq!(plain.guest.session.stats().table_writes, 0);
    }
}

#[test]
fn each_change_of_a_mapping_is_told_once_and_nothing_else_is() {
    let run = run(2, true);
    let found: Vec<[u64; 2]> = run.phases.values().map(|(events, _)| *events).collect();
    // Page-ins and page-outs by phase. `target` counts once under root 1, though two breakpoints are there, and once under root 2.
    let expected = [
        [0, 0],   // not mapped yet
        [2, 0],   // mapped, in both roots at once
        [4, 4],   // to another frame and back
        [4, 4],   // halves of an entry; beyond memory is not mapped
        [10, 10], // bytes, bits, exchanges
        [6, 8],   // wide and unaligned stores, and one made of many
        [5, 3],   // string stores, which map `first` too
        [2, 2],   // stores from the page before, to the entry of `first`
        [0, 0],   // accessed and dirty bits, write permission
        [8, 8],   // large pages; the PAT bit moves nothing
        [9, 9], // a split that leaves the frames as they are, and a table no longer used, are nothing; a string store over three tables
        [8, 8], // the levels above, a 1 GiB page, a reserved bit, a table beyond memory
        [4, 4], // from and in the other root
        [4, 4], // one frame in two roles
        [2, 4], // through a root that is its own table
        [6, 4], // a table on a tapped page
        [16, 18], // by another vCPU
    ];
    assert_eq!(found, expected);
    let stats = run.guest.session.stats();
    assert!(stats.table_writes > 60, "{stats:?}");
}

#[test]
fn states_say_what_is_planted_and_nothing_is_left_in_the_end() {
    let mut run = run(1, true);
    let active = |phase: u64| -> Vec<&str> {
        run.phases[&phase].1.iter().filter(|(_, state)| **state == TapState::Active).map(|(name, _)| *name).collect()
    };
    assert_eq!(active(0), ["in table"]);
    assert_eq!(active(1), ["in table", "target", "target 2", "target global"]);
    assert_eq!(active(9), active(1));
    assert_eq!(active(16), active(0));
    let guest = &mut run.guest;
    for tap in run.taps.values() {
        guest.session.remove(*tap).unwrap();
        assert_eq!(guest.session.state(*tap), TapState::Removed);
    }
    let view = guest.session.tap_view();
    for table in ["t_pt", "t_pd", "t_pdpt", "t3_pd", "t_in_code"] {
        let gfn = Pa(guest.va(table).0 - KERNEL).gfn();
        assert_eq!(guest.session.vmi().driver().memory_access(view, gfn).unwrap(), MemoryAccess::RWX, "{table}");
    }
}

#[test]
fn a_global_breakpoint_is_planted_under_each_root_that_comes_to_map_it_though_there_was_none_when_it_was_put_in() {
    let mut guest = Guest::boot("paging.S", 2, "");
    let taps = [TARGET, FIRST, ROLE1, ROLE3].map(|va| guest.tap(va, None, false));
    assert_eq!(taps.map(|tap| guest.session.state(tap)), [TapState::Pending; 4]);
    guest.run(|_, _| {});
    guest.assert_done();
    let calls = ["made_1", "made_2", "made_first", "made_role1", "made_role3"].map(|name| guest.word(name));
    assert_eq!(taps.map(|tap| guest.hits(tap)), [calls[0] + calls[1], calls[2], calls[3], calls[4]]);
}

#[test]
fn a_global_breakpoint_outlives_the_roots_it_is_found_under_and_what_these_become_costs_nothing() {
    let mut guest = Guest::boot("roots.S", 1, "n=20");
    let f = guest.tap(guest.va("f"), None, false);
    let user = guest.tap(Va(0x80_0000_0040), None, false);
    guest.run(|guest, _| assert_eq!(guest.session.state(f), TapState::Active));
    guest.assert_done();
    assert_eq!((guest.hits(f), guest.word("f_calls")), (60, 60));
    assert_eq!((guest.hits(user), guest.word("user_calls"), guest.word("ran_user")), (20, 20, 20));
    let states = [f, user].map(|tap| guest.session.state(tap));
    assert_eq!(states, [TapState::Active; 2]);
    assert_eq!(guest.word("reused"), 20_000);
    // The stores that make an end of a root are seen, those that come after are not.
    let stats = guest.session.stats();
    assert!((20..200).contains(&stats.table_writes), "{stats:?}");
}

#[test]
fn a_breakpoint_that_is_never_mapped_costs_nothing_on_pages_that_were_roots_once() {
    let mut guest = Guest::boot("roots.S", 1, "n=20");
    let never = guest.tap(Va(0x90_0000_0000), None, false);
    guest.run(|_, _| {});
    guest.assert_done();
    assert_eq!((guest.session.state(never), guest.hits(never), guest.word("reused")), (TapState::Pending, 0, 20_000));
    let stats = guest.session.stats();
    assert!((20..200).contains(&stats.table_writes), "{stats:?}");
    guest.session.remove(never).unwrap();
}
