//! Guests of tests/guests on the embedded driver, with breakpoints hidden by hand.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use vmitap::arch::amd64::Register;
use vmitap::driver::emu::{BootOptions, EmuDriver};
use vmitap::driver::{
    Monitor, OnTrap, Trap, VmiEvents, VmiFrames, VmiInfo, VmiProtection, VmiRead, VmiRegisters, VmiViews, VmiWrite, Wait,
};
use vmitap::event::{EventAction, EventReason, VmiEvent, VmiEventResponse};
use vmitap::image::Image;
use vmitap::symbols::SymbolTable;
use vmitap::{Gfn, MemoryAccess, PAGE_SIZE, Pa, Va, View, VmiError};

/// A test that takes longer than this hangs.
const LIMIT: Duration = Duration::from_secs(60);

/// The engine's library, without which these tests cannot say anything.
pub fn library() -> PathBuf {
    let path = std::env::var_os("VMITAP_LIBUNICORN").map(PathBuf::from);
    path.expect("set VMITAP_LIBUNICORN to the libunicorn.so.2 of `pip install unicorn`: these tests run guests on it")
}

/// Assembles a file of tests/guests, or the text of a guest.
pub fn assemble(source: &str) -> Vec<u8> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let guests = root.join("tests/guests");
    // Tests run side by side: each has files of its own.
    let thread = format!("{:?}", std::thread::current().id()).replace(|letter: char| !letter.is_alphanumeric(), "");
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("guest-{}-{thread}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let (input, output) = (folder.join("guest.S"), folder.join("guest.elf"));
    let is_file = !source.contains('\n');
    let text = if is_file { std::fs::read_to_string(guests.join(source)).unwrap() } else { source.to_owned() };
    std::fs::write(&input, text).unwrap();
    let done = Command::new(std::env::var("VMITAP_GUEST_CC").unwrap_or_else(|_| "cc".to_owned()))
        .args(["-nostdlib", "-static", "-no-pie", "-Wl,-z,max-page-size=4096,--build-id=none,--no-warn-rwx-segments"])
        .arg(format!("-Wl,-T,{}", guests.join("guest.ld").display()))
        .arg(format!("-I{}", guests.display()))
        .arg(format!("-I{}", root.join("guests").display()))
        .arg("-o")
        .args([&output, &input])
        .output()
        .expect("the C compiler `cc` is needed to assemble the test guests");
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    let image = std::fs::read(&output).unwrap();
    std::fs::remove_dir_all(&folder).unwrap();
    image
}

/// How a guest is started.
pub fn options(vcpus: u16, command_line: &str) -> BootOptions {
    BootOptions { memory: 8 << 20, vcpus, command_line: command_line.to_owned() }
}

/// One guest and the breakpoints in it.
pub struct Lab {
    pub vm: EmuDriver,
    pub symbols: SymbolTable,
    pub segments: Vec<(u64, u64, u64)>,
    /// The view with the breakpoints; the default one while there is none.
    pub view: View,
    /// Physical addresses of breakpoints, and the shadow frame.
    pub taps: HashMap<u64, Gfn>,
    pub shadows: HashMap<u64, Gfn>,
    pub hits: HashMap<u64, u64>,
    pub reads: u64,
    pub writes: u64,
}

impl Lab {
    pub fn of(source: &str) -> Self {
        Self::with(source, &options(1, ""))
    }

    pub fn with(source: &str, options: &BootOptions) -> Self {
        Self::boot(&assemble(source), options).unwrap()
    }

    pub fn boot(elf: &[u8], options: &BootOptions) -> Result<Self, VmiError> {
        let image = Image::parse("test guest", elf)?;
        let vm = EmuDriver::boot(&library(), "test", &image, options)?;
        let segments = image.segments.iter().map(|part| (part.va.0, part.pa.0, part.memory_size)).collect();
        Ok(Self {
            vm,
            symbols: image.symbols,
            segments,
            view: View::DEFAULT,
            taps: HashMap::new(),
            shadows: HashMap::new(),
            hits: HashMap::new(),
            reads: 0,
            writes: 0,
        })
    }

    pub fn va(&self, name: &str) -> Va {
        self.symbols.resolve(name).unwrap()
    }

    pub fn pa(&self, name: &str) -> Pa {
        let va = self.va(name).0;
        let part = self.segments.iter().find(|(from, _, len)| va >= *from && va <= from + len).unwrap();
        Pa(va - part.0 + part.1)
    }

    pub fn bytes(&self, pa: Pa, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.vm.read(pa, &mut bytes).unwrap();
        bytes
    }

    pub fn words(&self, name: &str, count: usize) -> Vec<u64> {
        let bytes = self.bytes(self.pa(name), count * 8);
        bytes.chunks(8).map(|word| u64::from_le_bytes(word.try_into().unwrap())).collect()
    }

    pub fn word(&self, name: &str) -> u64 {
        self.words(name, 1)[0]
    }

    pub fn set_word(&mut self, name: &str, value: u64) {
        let pa = self.pa(name);
        self.vm.write(pa, &value.to_le_bytes()).unwrap();
    }

    /// Hides breakpoints at these symbols.
    pub fn tap(&mut self, names: &[&str]) {
        for name in names {
            self.tap_with(name, MemoryAccess::X);
        }
    }

    pub fn tap_with(&mut self, name: &str, access: MemoryAccess) {
        if self.view == View::DEFAULT {
            self.view = self.vm.create_view(MemoryAccess::RWX).unwrap();
            self.vm.monitor(Monitor::Breakpoint, true).unwrap();
        }
        let pa = self.pa(name);
        let gfn = pa.gfn();
        let frame = if let Some(frame) = self.shadows.get(&gfn.0) {
            *frame
        } else {
            let frame = self.vm.allocate_frame().unwrap();
            let page = self.bytes(gfn.pa(0), PAGE_SIZE as usize);
            self.vm.write(frame.pa(0), &page).unwrap();
            self.vm.set_memory_access(self.view, gfn, access).unwrap();
            self.vm.remap(self.view, gfn, Some(frame)).unwrap();
            self.shadows.insert(gfn.0, frame);
            frame
        };
        self.vm.write(frame.pa(pa.page_offset()), &[0xcc]).unwrap();
        self.taps.insert(pa.0, frame);
        self.vm.switch_to_view(self.view).unwrap();
    }

    pub fn hits_at(&self, name: &str) -> u64 {
        self.hits.get(&self.pa(name).0).copied().unwrap_or(0)
    }

    /// Copies the page's own bytes into its shadow and plants the breakpoints again.
    pub fn refresh(&mut self, gfn: Gfn) {
        let mut page = self.bytes(gfn.pa(0), PAGE_SIZE as usize);
        for pa in self.taps.keys().filter(|pa| Pa(**pa).gfn() == gfn) {
            page[Pa(*pa).page_offset() as usize] = 0xcc;
        }
        self.vm.write(self.shadows[&gfn.0].pa(0), &page).unwrap();
    }

    /// The physical address of an INT3 event.
    pub fn at(event: &VmiEvent) -> Option<Pa> {
        let EventReason::Breakpoint { gfn, .. } = event.reason else { return None };
        Some(gfn.pa(event.registers.rip().0))
    }

    /// The usual answer: breakpoints are stepped over, the guest's own INT3 goes to the guest, reads and writes are stepped.
    pub fn usual(&mut self, event: &VmiEvent) -> VmiEventResponse {
        let step = VmiEventResponse::action(EventAction::FastSingleStep { view: View::DEFAULT }).in_view(self.view);
        match event.reason {
            EventReason::Breakpoint { .. } => {
                let pa = Self::at(event).unwrap();
                if event.view == Some(self.view) && self.taps.contains_key(&pa.0) {
                    *self.hits.entry(pa.0).or_default() += 1;
                    step
                } else {
                    VmiEventResponse::action(EventAction::Reinject).in_view(self.view)
                }
            }
            EventReason::MemoryAccess { access: MemoryAccess::R, .. } => {
                self.reads += 1;
                step
            }
            EventReason::MemoryAccess { .. } => {
                self.writes += 1;
                step
            }
            _ => VmiEventResponse::CONTINUE,
        }
    }

    /// Runs until nothing can run, with `answer` for each event.
    pub fn run_with(&mut self, mut answer: impl FnMut(&mut Self, &VmiEvent) -> VmiEventResponse) {
        let end = Instant::now() + LIMIT;
        loop {
            match self.vm.wait(Duration::from_millis(500)).unwrap() {
                Wait::Event(event) => {
                    let response = answer(self, &event);
                    self.vm.respond(event.vcpu, &response).unwrap();
                }
                Wait::Idle => return,
                Wait::Taken => panic!("taken by nobody"),
                Wait::Timeout => {}
            }
            assert!(
                Instant::now() < end,
                "the guest hangs after {} reads, {} writes, {:x?}: {:x?}",
                self.reads,
                self.writes,
                self.hits,
                self.vm.registers(vmitap::VcpuId(0)).unwrap().gp
            );
        }
    }

    pub fn run(&mut self) {
        self.run_with(Self::usual);
    }

    /// As [`Self::run`], but that hits are looked at before they are events, and `fate` is what becomes of them.
    pub fn run_sorting(&mut self, fate: OnTrap) {
        let end = Instant::now() + LIMIT;
        loop {
            let Self { vm, taps, hits, view, .. } = self;
            let mut taken = None;
            let mut sort = |trap: &Trap<'_>| {
                let pa = trap.gfn.pa(trap.rip.0);
                let is_ours = trap.view == *view && taps.contains_key(&pa.0);
                *hits.entry(pa.0).or_default() += u64::from(is_ours);
                let all = trap.registers.all();
                for register in Register::ALL {
                    let alone = trap.registers.one(*register);
                    assert!(alone.is_none_or(|value| value == register.of(&all)), "{}: {alone:x?}", register.name());
                }
                taken = Some(trap.vcpu).filter(|_| is_ours);
                if is_ours { fate } else { OnTrap::Raise }
            };
            match vm.wait_sorting(Duration::from_millis(500), &mut sort).unwrap() {
                Wait::Taken => {
                    assert_eq!(fate, OnTrap::Take);
                    let step = VmiEventResponse::action(EventAction::FastSingleStep { view: View::DEFAULT });
                    vm.respond(taken.unwrap(), &step).unwrap();
                }
                Wait::Event(event) => {
                    let is_ours = Self::at(&event).is_some_and(|pa| self.taps.contains_key(&pa.0));
                    assert!(!is_ours || event.view == Some(View::DEFAULT), "{event:x?}");
                    let response = self.usual(&event);
                    self.vm.respond(event.vcpu, &response).unwrap();
                }
                Wait::Idle => return,
                Wait::Timeout => assert!(Instant::now() < end, "the guest hangs: {:x?}", self.hits),
            }
        }
    }

    /// The next event, which there must be.
    pub fn event(&mut self) -> VmiEvent {
        match self.vm.wait(LIMIT).unwrap() {
            Wait::Event(event) => event,
            other => panic!("no event but {other:?}; console: {}", self.console()),
        }
    }

    pub fn respond(&mut self, event: &VmiEvent, action: EventAction) {
        self.vm.respond(event.vcpu, &VmiEventResponse::action(action)).unwrap();
    }

    pub fn console(&self) -> String {
        String::from_utf8(self.vm.console().unwrap()).unwrap()
    }

    /// The guest came to its end, and saw nothing.
    pub fn assert_done(&self) {
        assert_eq!(self.word("done"), 1, "console: {}", self.console());
        assert!(self.vm.has_halted());
    }

    pub fn assert_unseen(&self) {
        self.assert_done();
        assert_eq!(self.words("mismatches", 10), [0; 10], "kinds of reads that saw it");
        assert!(self.word("checks") > 0);
    }
}
