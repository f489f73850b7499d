//! A driver without a machine: memory, views and registers as plain data. It records every call, fails the calls it is told
//! to fail, and hands out the events it was given. For tests; it runs no guest code.

mod calls;
mod remote;
mod state;
mod tables;

use std::collections::{BTreeMap, HashSet, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use parking_lot::Mutex;

pub use self::calls::{Call, CallKind};
use self::calls::{Counted, Recorder};
pub use self::remote::{Answered, Remote};
pub use self::state::{GuestState, MockVcpu, MockView};
pub use self::tables::PageSize;
use super::{
    Additions, Caps, Monitor, VmInfo, VmiControl, VmiEvents, VmiFrames, VmiInfo, VmiInject, VmiProtection, VmiRead, VmiRegisters,
    VmiRepair, VmiViews, VmiWrite, Wait, Waker,
};
use crate::addr::{Gfn, MemoryAccess, PAGE_SIZE, Pa, VcpuId, View};
use crate::arch::amd64::{Injection, Registers};
use crate::error::{Result, VmiError};
use crate::event::{EventAction, VmiEvent, VmiEventResponse};

/// `errno` of a fault that was asked for without one: EIO.
const DEFAULT_ERRNO: i32 = 5;
/// `errno` when frames or views are used up: ENOMEM.
const ENOMEM: i32 = 12;
/// What a frame is filled with when it is allocated, so that a test sees whoever relies on its content.
const FRAME_FILL: u8 = 0xa5;

/// What [`VmiEvents::wait`] is to return.
enum Scripted {
    Event(Box<VmiEvent>),
    Timeout,
}

struct MockWaker(AtomicBool);

impl Waker for MockWaker {
    fn wake(&self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

/// The driver. Everything in it is deterministic: views and frames get the lowest free number.
pub struct MockDriver {
    info: VmInfo,
    caps: Caps,
    state: GuestState,
    recorder: Arc<Mutex<Recorder>>,
    script: VecDeque<Scripted>,
    remote: Remote,
    waker: Arc<MockWaker>,
    frame_limit: usize,
    frames_peak: usize,
    /// Page tables take the pages from here up.
    tables_from: u64,
}

impl MockDriver {
    /// A guest with `memory_size` bytes of zeroed memory (rounded up to whole pages) and `vcpus` vCPUs, all in the default view.
    pub fn new(memory_size: u64, vcpus: u16) -> Self {
        let memory_size = memory_size.next_multiple_of(PAGE_SIZE);
        let remote = Remote::default();
        Self {
            info: VmInfo { driver: "mock", name: "mock".to_owned(), memory_size, vcpus },
            caps: Caps {
                write: true,
                registers: true,
                views: true,
                max_views: 64,
                events: true,
                single_step: true,
                fast_single_step: true,
                emulate_read: true,
                injection: true,
                pause: true,
                multi_access: true,
            },
            state: GuestState {
                memory: vec![0; memory_size as usize],
                frames: BTreeMap::new(),
                views: BTreeMap::from([(View::DEFAULT, MockView::new(MemoryAccess::RWX))]),
                vcpus: vec![MockVcpu::default(); usize::from(vcpus)],
                monitors: HashSet::new(),
                pauses: 0,
            },
            recorder: remote.recorder.clone(),
            script: VecDeque::new(),
            remote,
            waker: Arc::new(MockWaker(AtomicBool::new(false))),
            frame_limit: usize::MAX,
            frames_peak: 0,
            tables_from: memory_size,
        }
    }

    /// Changes what the driver says it can do; calls of what it cannot do then fail with `NotSupported`.
    pub fn set_caps(&mut self, caps: Caps) {
        self.caps = caps;
    }

    /// Whether reads of memory are recorded too, and counted by [`Self::fail_nth`]. Off at first.
    pub fn record_reads(&mut self, on: bool) {
        self.recorder.lock().record_reads = on;
    }

    /// The calls recorded so far, in order.
    pub fn calls(&self) -> Vec<Call> {
        self.recorder.lock().calls.clone()
    }

    /// How many calls of that kind were recorded so far.
    pub fn count_of(&self, kind: CallKind) -> usize {
        self.recorder.lock().calls.iter().filter(|call| call.kind() == kind).count()
    }

    /// The calls recorded so far, which are forgotten.
    pub fn take_calls(&mut self) -> Vec<Call> {
        std::mem::take(&mut self.recorder.lock().calls)
    }

    /// Makes the `n`-th recorded call from now on fail with errno 5; 1 is the next one. The call is recorded and changes nothing.
    /// Each fault happens once; several can be set, and count independently.
    pub fn fail_nth(&mut self, n: usize) {
        self.fail_nth_with(n, DEFAULT_ERRNO);
    }

    /// As [`Self::fail_nth`], with that errno.
    pub fn fail_nth_with(&mut self, n: usize, errno: i32) {
        self.recorder.lock().fail(Counted::Recorded, n, errno);
    }

    /// Makes the `n`-th call of that kind from now on fail with errno 5; 1 is the next one. Reads count even if they are not recorded.
    pub fn fail_nth_of(&mut self, kind: CallKind, n: usize) {
        self.fail_nth_of_with(kind, n, DEFAULT_ERRNO);
    }

    /// As [`Self::fail_nth_of`], with that errno.
    pub fn fail_nth_of_with(&mut self, kind: CallKind, n: usize, errno: i32) {
        self.recorder.lock().fail(Counted::Of(kind), n, errno);
    }

    /// How many of the faults asked for have not happened yet. A loop over n ends when one is left: there is no n-th call.
    pub fn faults_left(&self) -> usize {
        self.recorder.lock().faults_left()
    }

    /// Forgets the faults that have not happened yet.
    pub fn clear_faults(&mut self) {
        self.recorder.lock().clear_faults();
    }

    /// Lets [`VmiEvents::wait`] hand out this event, after those already given. Events of a vCPU that is held wait for its answer.
    /// The vCPU gets the event's registers and view when it is handed out.
    pub fn push_event(&mut self, event: VmiEvent) {
        self.script.push_back(Scripted::Event(Box::new(event)));
    }

    /// Lets [`VmiEvents::wait`] return a timeout once the events before it are handed out. With nothing left it returns `Idle`.
    pub fn push_timeout(&mut self) {
        self.script.push_back(Scripted::Timeout);
    }

    /// The answers events got so far, in order.
    pub fn answers(&self) -> Vec<(VcpuId, VmiEventResponse)> {
        self.remote.answered().iter().map(|answered| (answered.event.vcpu, answered.response)).collect()
    }

    /// What stays in reach once the driver is given to a session.
    pub fn remote(&self) -> Remote {
        self.remote.clone()
    }

    /// The whole guest, to compare with a later one.
    pub fn snapshot(&self) -> GuestState {
        self.state.clone()
    }

    /// The guest as it is.
    pub fn state(&self) -> &GuestState {
        &self.state
    }

    /// Most frames that can be allocated at once. Unlimited at first.
    pub fn set_frame_limit(&mut self, frames: usize) {
        self.frame_limit = frames;
    }

    /// Most frames that were allocated at once so far.
    pub fn frames_peak(&self) -> usize {
        self.frames_peak
    }

    /// Writes guest memory or a frame without a call: what the guest itself, or a test's set-up, does.
    pub fn poke(&mut self, pa: Pa, bytes: &[u8]) -> Result<()> {
        self.check_range(pa, bytes.len())?;
        let mut at = pa;
        let mut rest = bytes;
        while !rest.is_empty() {
            let (now, later) = rest.split_at(rest.len().min(at.page_rest() as usize));
            let rest_of_page = self.page_mut(at.gfn()).and_then(|page| page.get_mut(at.page_offset() as usize..));
            if let Some(target) = rest_of_page.and_then(|page| page.get_mut(..now.len())) {
                target.copy_from_slice(now);
            }
            at = at.checked_add(now.len() as u64).unwrap_or(at);
            rest = later;
        }
        Ok(())
    }

    /// Reads guest memory or a frame without a call.
    pub fn peek(&self, pa: Pa, len: usize) -> Result<Vec<u8>> {
        let mut bytes = vec![0; len];
        self.copy_out(pa, &mut bytes)?;
        Ok(bytes)
    }

    /// What a vCPU in `view` finds at `pa`, whatever its rights: through the view's remaps. Without a call.
    pub fn peek_in_view(&self, view: View, pa: Pa, len: usize) -> Result<Vec<u8>> {
        self.check_range(pa, len)?;
        let mut bytes = Vec::with_capacity(len);
        let mut at = pa;
        while bytes.len() < len {
            let now = (len - bytes.len()).min(at.page_rest() as usize);
            let frame = self.view(view)?.remaps.get(&at.gfn()).copied().unwrap_or(at.gfn());
            bytes.extend(self.peek(frame.pa(at.page_offset()), now)?);
            at = at.checked_add(now as u64).unwrap_or(at);
        }
        Ok(bytes)
    }

    /// Sets the registers of `vcpu` without a call.
    pub fn poke_registers(&mut self, vcpu: VcpuId, registers: Registers) -> Result<()> {
        self.vcpu_mut(vcpu)?.registers = registers;
        Ok(())
    }

    fn enter(&self, call: Call) -> Result<()> {
        self.recorder.lock().enter(call)
    }

    fn need(offered: bool, capability: &'static str) -> Result<()> {
        if offered { Ok(()) } else { Err(VmiError::NotSupported { driver: "mock", capability }) }
    }

    fn vcpu(&self, vcpu: VcpuId) -> Result<&MockVcpu> {
        let missing = VmiError::VcpuNotFound { vcpu, count: self.info.vcpus };
        self.state.vcpus.get(usize::from(vcpu.0)).ok_or(missing)
    }

    fn vcpu_mut(&mut self, vcpu: VcpuId) -> Result<&mut MockVcpu> {
        let missing = VmiError::VcpuNotFound { vcpu, count: self.info.vcpus };
        self.state.vcpus.get_mut(usize::from(vcpu.0)).ok_or(missing)
    }

    fn view(&self, view: View) -> Result<&MockView> {
        self.state.views.get(&view).ok_or(VmiError::ViewNotFound { view })
    }

    fn view_mut(&mut self, view: View) -> Result<&mut MockView> {
        self.state.views.get_mut(&view).ok_or(VmiError::ViewNotFound { view })
    }

    fn page(&self, gfn: Gfn) -> Option<&[u8]> {
        if let Some(frame) = self.state.frames.get(&gfn) {
            return Some(frame);
        }
        let from = usize::try_from(gfn.0.checked_mul(PAGE_SIZE)?).ok()?;
        self.state.memory.get(from..from.checked_add(PAGE_SIZE as usize)?)
    }

    fn page_mut(&mut self, gfn: Gfn) -> Option<&mut [u8]> {
        if let Some(frame) = self.state.frames.get_mut(&gfn) {
            return Some(frame);
        }
        let from = usize::try_from(gfn.0.checked_mul(PAGE_SIZE)?).ok()?;
        self.state.memory.get_mut(from..from.checked_add(PAGE_SIZE as usize)?)
    }

    /// Whether every page of the range is guest memory or an allocated frame.
    fn check_range(&self, pa: Pa, len: usize) -> Result<()> {
        let out = VmiError::OutOfRange { pa, len: len as u64, end: Pa(self.info.memory_size) };
        let Some(last) = (len as u64).checked_sub(1) else { return Ok(()) };
        let last = pa.checked_add(last).ok_or(out.clone())?;
        let there = (pa.gfn().0..=last.gfn().0).all(|gfn| self.page(Gfn(gfn)).is_some());
        if there { Ok(()) } else { Err(out) }
    }

    /// Whether a view can hold something for `gfn`: guest memory, not a frame.
    fn check_gfn(&self, gfn: Gfn) -> Result<()> {
        let count = self.info.memory_size / PAGE_SIZE;
        if gfn.0 < count {
            return Ok(());
        }
        let pa = Pa(gfn.0.saturating_mul(PAGE_SIZE));
        Err(VmiError::OutOfRange { pa, len: PAGE_SIZE, end: Pa(self.info.memory_size) })
    }

    /// Second-level tables have no rights with W and without R (Intel SDM vol. 3, "EPT Misconfigurations"): no driver can set them.
    fn check_access(view: View, gfn: Gfn, access: MemoryAccess) -> Result<()> {
        if access.contains(MemoryAccess::W) && !access.contains(MemoryAccess::R) {
            return Err(VmiError::BadAccess { view, gfn, access });
        }
        Ok(())
    }

    fn copy_out(&self, pa: Pa, buf: &mut [u8]) -> Result<()> {
        self.check_range(pa, buf.len())?;
        let mut at = pa;
        let mut rest = buf;
        while !rest.is_empty() {
            let len = rest.len().min(at.page_rest() as usize);
            let (now, later) = rest.split_at_mut(len);
            let rest_of_page = self.page(at.gfn()).and_then(|page| page.get(at.page_offset() as usize..));
            if let Some(source) = rest_of_page.and_then(|page| page.get(..len)) {
                now.copy_from_slice(source);
            }
            at = at.checked_add(len as u64).unwrap_or(at);
            rest = later;
        }
        Ok(())
    }
}

impl VmiInfo for MockDriver {
    fn info(&self) -> &VmInfo {
        &self.info
    }

    fn caps(&self) -> Caps {
        self.caps
    }

    fn version(&self) -> String {
        "mock".to_owned()
    }
}

impl VmiRead for MockDriver {
    fn read(&self, pa: Pa, buf: &mut [u8]) -> Result<()> {
        self.enter(Call::Read { pa, len: buf.len() })?;
        self.copy_out(pa, buf)
    }
}

impl VmiWrite for MockDriver {
    fn write(&mut self, pa: Pa, bytes: &[u8]) -> Result<()> {
        self.enter(Call::Write { pa, bytes: bytes.to_vec() })?;
        Self::need(self.caps.write, "writing guest memory")?;
        self.poke(pa, bytes)
    }
}

impl VmiRegisters for MockDriver {
    fn registers(&self, vcpu: VcpuId) -> Result<Registers> {
        self.enter(Call::Registers { vcpu })?;
        Self::need(self.caps.registers, "registers")?;
        Ok(self.vcpu(vcpu)?.registers)
    }

    fn set_registers(&mut self, vcpu: VcpuId, registers: &Registers) -> Result<()> {
        self.enter(Call::SetRegisters { vcpu, registers: Box::new(*registers) })?;
        Self::need(self.caps.registers, "registers")?;
        let held = &mut self.vcpu_mut(vcpu)?.registers;
        let Registers { cs, ss, ds, es, tr, gdtr, idtr, .. } = *held;
        // Of FS and GS the base is settable (WRFSBASE, the MSRs); selector and attributes are not.
        let fs = crate::arch::amd64::Segment { base: registers.fs.base, ..held.fs };
        let gs = crate::arch::amd64::Segment { base: registers.gs.base, ..held.gs };
        *held = Registers { cs, ss, ds, es, fs, gs, tr, gdtr, idtr, ..*registers };
        Ok(())
    }
}

impl VmiViews for MockDriver {
    fn create_view(&mut self, access: MemoryAccess) -> Result<View> {
        self.enter(Call::CreateView { access })?;
        Self::need(self.caps.views, "views")?;
        Self::check_access(View::DEFAULT, Gfn(0), access)?;
        let free = (1..=self.caps.max_views).map(View).find(|view| !self.state.views.contains_key(view));
        let view =
            free.ok_or_else(|| VmiError::Driver { op: "create_view", errno: ENOMEM, detail: "no view is free".to_owned() })?;
        self.state.views.insert(view, MockView::new(access));
        Ok(view)
    }

    fn destroy_view(&mut self, view: View) -> Result<()> {
        self.enter(Call::DestroyView { view })?;
        Self::need(self.caps.views, "views")?;
        if view == View::DEFAULT {
            return Err(VmiError::DefaultView { op: "destroy_view" });
        }
        self.view(view)?;
        if let Some(vcpu) = self.state.vcpus.iter().position(|vcpu| vcpu.view == view) {
            return Err(VmiError::InvalidArgument { what: "view", reason: format!("vCPU {vcpu} is in view {view}") });
        }
        self.state.views.remove(&view);
        Ok(())
    }

    fn switch_to_view(&mut self, view: View) -> Result<()> {
        self.enter(Call::SwitchToView { view })?;
        Self::need(self.caps.views, "views")?;
        self.view(view)?;
        self.state.vcpus.iter_mut().for_each(|vcpu| vcpu.view = view);
        Ok(())
    }

    fn vcpu_view(&self, vcpu: VcpuId) -> Result<View> {
        self.enter(Call::VcpuView { vcpu })?;
        Self::need(self.caps.views, "views")?;
        Ok(self.vcpu(vcpu)?.view)
    }

    fn remap(&mut self, view: View, gfn: Gfn, frame: Option<Gfn>) -> Result<()> {
        self.enter(Call::Remap { view, gfn, frame })?;
        Self::need(self.caps.views, "views")?;
        if view == View::DEFAULT {
            return Err(VmiError::DefaultView { op: "remap" });
        }
        self.view(view)?;
        self.check_gfn(gfn)?;
        if let Some(frame) = frame.filter(|frame| self.page(*frame).is_none()) {
            self.check_gfn(frame)?;
        }
        let remaps = &mut self.view_mut(view)?.remaps;
        match frame.filter(|frame| *frame != gfn) {
            Some(frame) => remaps.insert(gfn, frame),
            None => remaps.remove(&gfn),
        };
        Ok(())
    }
}

impl VmiProtection for MockDriver {
    fn memory_access(&self, view: View, gfn: Gfn) -> Result<MemoryAccess> {
        self.enter(Call::MemoryAccess { view, gfn })?;
        let held = self.view(view)?;
        self.check_gfn(gfn)?;
        Ok(held.pages.get(&gfn).copied().unwrap_or(held.access))
    }

    fn set_memory_access(&mut self, view: View, gfn: Gfn, access: MemoryAccess) -> Result<()> {
        self.enter(Call::SetMemoryAccess { view, gfn, access })?;
        self.view(view)?;
        self.check_gfn(gfn)?;
        Self::check_access(view, gfn, access)?;
        self.view_mut(view)?.set_access(gfn, access);
        Ok(())
    }

    fn set_memory_access_multi(&mut self, view: View, pages: &[(Gfn, MemoryAccess)]) -> Result<()> {
        self.enter(Call::SetMemoryAccessMulti { view, pages: pages.to_vec() })?;
        self.view(view)?;
        for &(gfn, access) in pages {
            self.check_gfn(gfn)?;
            Self::check_access(view, gfn, access)?;
        }
        let held = self.view_mut(view)?;
        for &(gfn, access) in pages {
            held.set_access(gfn, access);
        }
        Ok(())
    }
}

impl VmiFrames for MockDriver {
    fn allocate_frames(&mut self, count: usize) -> Result<Vec<Gfn>> {
        self.enter(Call::AllocateFrames { count })?;
        let held = self.state.frames.len();
        if held.checked_add(count).is_none_or(|all| all > self.frame_limit) {
            return Err(VmiError::Driver {
                op: "allocate_frames",
                errno: ENOMEM,
                detail: format!("{count} frames are not free"),
            });
        }
        let first = self.info.memory_size / PAGE_SIZE;
        let frames = &mut self.state.frames;
        // As long as the lowest ones are taken without a gap, none below has to be looked for.
        let dense = frames.last_key_value().map_or(first, |(last, _)| last.0 + 1) == first + held as u64;
        let from = if dense { first + held as u64 } else { first };
        let free: Vec<Gfn> = (from..).map(Gfn).filter(|frame| !frames.contains_key(frame)).take(count).collect();
        frames.extend(free.iter().map(|frame| (*frame, vec![FRAME_FILL; PAGE_SIZE as usize])));
        self.frames_peak = self.frames_peak.max(frames.len());
        Ok(free)
    }

    fn free_frames(&mut self, frames: &[Gfn]) -> Result<()> {
        self.enter(Call::FreeFrames { frames: frames.to_vec() })?;
        let refuse = |reason: String| Err(VmiError::InvalidArgument { what: "frames", reason });
        let wanted: HashSet<Gfn> = frames.iter().copied().collect();
        if wanted.len() < frames.len() {
            return refuse("one of them is there twice".to_owned());
        }
        if let Some(frame) = frames.iter().find(|frame| !self.state.frames.contains_key(frame)) {
            return refuse(format!("frame {frame} is not allocated"));
        }
        for (view, held) in &self.state.views {
            if let Some(frame) = held.remaps.values().find(|shown| wanted.contains(shown)) {
                return refuse(format!("view {view} still shows frame {frame}"));
            }
        }
        self.state.frames.retain(|frame, _| !wanted.contains(frame));
        Ok(())
    }

    fn frames_in_use(&self) -> usize {
        self.state.frames.len()
    }
}

impl VmiEvents for MockDriver {
    fn monitor(&mut self, monitor: Monitor, on: bool) -> Result<()> {
        self.enter(Call::Monitor { monitor, on })?;
        Self::need(self.caps.events, "events")?;
        if on {
            self.state.monitors.insert(monitor);
        } else {
            self.state.monitors.remove(&monitor);
        }
        Ok(())
    }

    fn wait(&mut self, timeout: Duration) -> Result<Wait> {
        self.enter(Call::Wait { timeout })?;
        Self::need(self.caps.events, "events")?;
        if self.waker.0.swap(false, Ordering::SeqCst) {
            return Ok(Wait::Timeout);
        }
        if self.state.pauses > 0 {
            return Ok(Wait::Idle);
        }
        let vcpus = &self.state.vcpus;
        let held = |vcpu: VcpuId| vcpus.get(usize::from(vcpu.0)).is_some_and(|vcpu| vcpu.pending.is_some());
        let ready = self.script.iter().position(|next| match next {
            Scripted::Event(event) => !held(event.vcpu),
            Scripted::Timeout => true,
        });
        let view_of = |vcpu: VcpuId| vcpus.get(usize::from(vcpu.0)).map(|vcpu| vcpu.view);
        let remote = || {
            let event = self.remote.next(held)?;
            Some(Scripted::Event(Box::new(VmiEvent { view: view_of(event.vcpu), ..event })))
        };
        match ready.and_then(|index| self.script.remove(index)).or_else(remote) {
            None => Ok(Wait::Idle),
            Some(Scripted::Timeout) => Ok(Wait::Timeout),
            Some(Scripted::Event(event)) => {
                let view = event.view.filter(|view| self.state.views.contains_key(view));
                let vcpu = self.vcpu_mut(event.vcpu)?;
                vcpu.registers = event.registers;
                vcpu.view = view.unwrap_or(vcpu.view);
                vcpu.pending = Some(*event);
                Ok(Wait::Event(*event))
            }
        }
    }

    fn respond(&mut self, vcpu: VcpuId, response: &VmiEventResponse) -> Result<()> {
        self.enter(Call::Respond { vcpu, response: *response })?;
        let event = self.vcpu(vcpu)?.pending.ok_or(VmiError::NoPendingEvent { vcpu })?;
        let (step, stays) = match response.action {
            EventAction::SingleStep { view } => (Some(view), true),
            EventAction::FastSingleStep { view } => (Some(view), false),
            EventAction::Continue | EventAction::Reinject | EventAction::Emulate | EventAction::Deny => (None, false),
        };
        for view in [step, response.view].into_iter().flatten() {
            self.view(view)?;
        }
        let held = self.vcpu_mut(vcpu)?;
        held.pending = None;
        held.registers.gp = response.registers.unwrap_or(held.registers.gp);
        held.view = step.filter(|_| stays).or(response.view).unwrap_or(held.view);
        self.remote.note(&Answered { event, response: *response });
        Ok(())
    }

    fn waker(&self) -> Arc<dyn Waker> {
        self.waker.clone()
    }
}

impl VmiInject for MockDriver {
    fn inject(&mut self, vcpu: VcpuId, injection: &Injection) -> Result<()> {
        self.enter(Call::Inject { vcpu, injection: *injection })?;
        Self::need(self.caps.injection, "injection")?;
        self.vcpu_mut(vcpu)?.injections.push(*injection);
        Ok(())
    }
}

impl VmiControl for MockDriver {
    fn pause(&mut self) -> Result<()> {
        self.enter(Call::Pause)?;
        Self::need(self.caps.pause, "pausing")?;
        self.state.pauses += 1;
        Ok(())
    }

    fn resume(&mut self) -> Result<()> {
        self.enter(Call::Resume)?;
        let none = || VmiError::InvalidArgument { what: "resume", reason: "the guest is not paused".to_owned() };
        self.state.pauses = self.state.pauses.checked_sub(1).ok_or_else(none)?;
        Ok(())
    }
}

impl VmiRepair for MockDriver {
    fn additions(&self) -> Result<Additions> {
        self.enter(Call::Additions)?;
        let GuestState { views, frames, pauses, .. } = &self.state;
        let views = views.keys().copied().filter(|view| *view != View::DEFAULT).collect();
        Ok(Additions { views, frames: frames.keys().copied().collect(), is_paused: *pauses > 0 })
    }

    fn adopt(&mut self, left: &Additions, pauses: u32) -> Result<()> {
        self.enter(Call::Adopt { left: left.clone(), pauses })
    }

    fn release_held(&mut self) -> Result<usize> {
        self.enter(Call::ReleaseHeld)?;
        let mut held = 0;
        for vcpu in &mut self.state.vcpus {
            held += usize::from(vcpu.pending.take().is_some());
            vcpu.view = View::DEFAULT;
        }
        Ok(held)
    }
}
