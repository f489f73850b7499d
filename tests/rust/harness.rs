//! A driver around any other that fails its n-th call, sees the whole guest, and the loop that tries every n.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::{Debug, Write};
use std::os::fd::OwnedFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::{Mutex, MutexGuard};
use vmitap::arch::amd64::{Injection, Registers};
use vmitap::driver::{
    Additions, Caps, Monitor, VmInfo, VmiControl, VmiDriver, VmiEvents, VmiFrames, VmiInfo, VmiInject, VmiProtection, VmiRead,
    VmiRegisters, VmiRepair, VmiViews, VmiWrite, Wait, Waker,
};
use vmitap::event::{VmiEvent, VmiEventResponse};
use vmitap::{Gfn, MemoryAccess, PAGE_SIZE, Pa, Result, VcpuId, View, VmiError};

/// Everything of a guest that an operation can change, seen through its driver. Which frame shows a page is nobody's business,
/// what it shows is.
#[derive(Clone, PartialEq, Eq, Default)]
pub struct Seen {
    memory: Vec<u8>,
    /// The pages that are not accessible in every way.
    access: BTreeMap<(View, Gfn), MemoryAccess>,
    /// The pages that show a frame, and what that holds.
    shown: BTreeMap<(View, Gfn), Vec<u8>>,
    views: BTreeSet<View>,
    vcpus: Vec<(View, Registers, bool)>,
    monitors: Vec<String>,
    pauses: i64,
    injections: usize,
}

impl Seen {
    /// What differs, in words.
    pub fn differences(&self, other: &Self) -> String {
        let mut text = String::new();
        if let Some(at) = self.memory.iter().zip(&other.memory).position(|(a, b)| a != b) {
            write!(text, "memory from {at:#x} on; ").unwrap();
        }
        let keys: BTreeSet<_> = self.shown.keys().chain(other.shown.keys()).collect();
        for at in keys.into_iter().filter(|at| self.shown.get(at) != other.shown.get(at)) {
            write!(text, "what {at:?} shows; ").unwrap();
        }
        let mut pair = |what: &str, mine: &dyn Debug, theirs: &dyn Debug| {
            let (mine, theirs) = (format!("{mine:?}"), format!("{theirs:?}"));
            if mine != theirs {
                write!(text, "{what}: {mine} / {theirs}; ").unwrap();
            }
        };
        pair("access", &self.access, &other.access);
        pair("views", &self.views, &other.views);
        pair("vCPUs", &self.vcpus, &other.vcpus);
        pair("monitors", &self.monitors, &other.monitors);
        pair("pauses, injections", &(self.pauses, self.injections), &(other.pauses, other.injections));
        text
    }
}

#[derive(Default)]
struct Books {
    /// Calls until one fails; 0: none will.
    left: usize,
    /// What it fails with.
    failure: Failure,
    /// The call that failed last.
    failed: Option<&'static str>,
    remaps: BTreeMap<(View, Gfn), Gfn>,
    views: BTreeSet<View>,
    monitors: BTreeSet<String>,
    held: BTreeSet<VcpuId>,
    pauses: i64,
    injections: usize,
}

/// What the system calls and libraries behind a driver give: EPERM, ESRCH, EINTR, EIO, E2BIG, EAGAIN, ENOMEM, EACCES, EFAULT, EBUSY, EEXIST, ENODEV,
/// EINVAL, ENOSPC, ERANGE, ENOSYS, ENODATA, EOPNOTSUPP.
pub const ERRNOS: [i32; 18] = [1, 3, 4, 5, 7, 11, 12, 13, 14, 16, 17, 19, 22, 28, 34, 38, 61, 95];

/// How a call fails that is to fail.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Failure {
    /// With this errno, once.
    Errno(i32),
    /// Because the guest is gone; and so does each call after it.
    Gone,
}

impl Default for Failure {
    fn default() -> Self {
        Self::Errno(5)
    }
}

type Look<D> = Box<dyn FnMut(&D) + Send>;

/// When a tool dies: from then on no call does anything but fail, and the guest stays as it is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Death {
    /// Before the n-th call reaches the guest; 1 is the first.
    Before(usize),
    /// After the n-th call changed the guest, and before anybody hears of it.
    After(usize),
}

/// A tool that dies, or is watched until its end.
struct Life {
    death: Option<Death>,
    /// The names of the calls so far.
    calls: Vec<&'static str>,
    is_over: bool,
    /// Done once, at the moment of death.
    last_will: Box<dyn FnMut() + Send>,
}

impl Life {
    fn die(&mut self) -> VmiError {
        if !std::mem::replace(&mut self.is_over, true) {
            (self.last_will)();
        }
        VmiError::Driver { op: "any", errno: 5, detail: "the tool is dead".to_owned() }
    }
}

struct Inner<D> {
    driver: Mutex<D>,
    books: Mutex<Books>,
    info: VmInfo,
    /// Looks at the driver after each call.
    look: Mutex<Option<Look<D>>>,
    life: Mutex<Option<Life>>,
}

/// Another driver, whose n-th call fails: any call but those that only tell facts. Clones are of the same driver, so that a test can
/// look at what it has given away.
pub struct Faulty<D>(Arc<Inner<D>>);

impl<D> Clone for Faulty<D> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<D: VmiDriver> Faulty<D> {
    pub fn new(driver: D) -> Self {
        let info = driver.info().clone();
        let books = Books { views: BTreeSet::from([View::DEFAULT]), ..Books::default() };
        Self(Arc::new(Inner {
            driver: Mutex::new(driver),
            books: Mutex::new(books),
            info,
            look: Mutex::new(None),
            life: Mutex::new(None),
        }))
    }

    /// As [`Self::new`], and its tool dies; `last_will` is done at that moment.
    pub fn mortal(driver: D, death: Option<Death>, last_will: impl FnMut() + Send + 'static) -> Self {
        let mortal = Self::new(driver);
        let life = Life { death, calls: Vec::new(), is_over: false, last_will: Box::new(last_will) };
        *mortal.0.life.lock() = Some(life);
        mortal
    }

    /// The names of the calls there were, and whether the tool is dead.
    pub fn end(&self) -> (Vec<&'static str>, bool) {
        self.0.life.lock().as_ref().map(|life| (life.calls.clone(), life.is_over)).unwrap()
    }

    /// The driver, once nobody else has it.
    pub fn into_inner(self) -> D {
        let Ok(inner) = Arc::try_unwrap(self.0) else { panic!("somebody still has the driver") };
        inner.driver.into_inner()
    }

    /// The driver itself, for what a test does behind everybody's back.
    pub fn inner(&self) -> MutexGuard<'_, D> {
        self.0.driver.lock()
    }

    /// Lets `look` see the driver after each call from now on.
    pub fn look_after_each_call(&self, look: impl FnMut(&D) + Send + 'static) {
        *self.0.look.lock() = Some(Box::new(look));
    }

    /// Makes the `n`-th call from now on fail; 0: none.
    pub fn fail_nth(&self, n: usize) {
        self.0.books.lock().left = n;
    }

    /// As [`Self::fail_nth`], in that way.
    pub fn fail_nth_with(&self, n: usize, failure: Failure) {
        let mut books = self.0.books.lock();
        (books.left, books.failure) = (n, failure);
    }

    /// The name of the call that was made to fail last.
    pub fn failed(&self) -> Option<&'static str> {
        self.0.books.lock().failed
    }

    /// Whether a call is still to fail.
    pub fn is_armed(&self) -> bool {
        self.0.books.lock().left > 0
    }

    /// Does something with its `n`-th call failing: what it said, and whether it was through without coming to that call.
    pub fn failing<T>(&self, n: usize, operation: impl FnOnce() -> T) -> (T, bool) {
        self.fail_nth(n);
        let said = operation();
        let is_through = self.is_armed();
        self.fail_nth(0);
        (said, is_through)
    }

    /// The whole guest, without a call that counts.
    pub fn seen(&self) -> Seen {
        let (driver, books) = (self.0.driver.lock(), self.0.books.lock());
        let mut seen = Seen { views: books.views.clone(), pauses: books.pauses, injections: books.injections, ..Seen::default() };
        seen.monitors = books.monitors.iter().cloned().collect();
        seen.memory = vec![0; self.0.info.memory_size as usize];
        driver.read(Pa(0), &mut seen.memory).unwrap();
        for view in &books.views {
            for gfn in (0..self.0.info.memory_size / PAGE_SIZE).map(Gfn) {
                let access = driver.memory_access(*view, gfn).unwrap();
                if access != MemoryAccess::RWX {
                    seen.access.insert((*view, gfn), access);
                }
            }
        }
        for (at, frame) in &books.remaps {
            let mut page = vec![0; PAGE_SIZE as usize];
            driver.read(frame.pa(0), &mut page).unwrap();
            seen.shown.insert(*at, page);
        }
        for vcpu in (0..self.0.info.vcpus).map(VcpuId) {
            seen.vcpus.push((driver.vcpu_view(vcpu).unwrap(), driver.registers(vcpu).unwrap(), books.held.contains(&vcpu)));
        }
        seen
    }

    fn call<T>(&self, op: &'static str, call: impl FnOnce(&mut D) -> Result<T>) -> Result<T> {
        let mut books = self.0.books.lock();
        if books.left > 0 {
            books.left -= 1;
            if books.left == 0 {
                books.failed = Some(op);
                return Err(match books.failure {
                    Failure::Errno(errno) => VmiError::Driver { op, errno, detail: "a fault the test asked for".to_owned() },
                    Failure::Gone => {
                        books.left = 1;
                        VmiError::DomainGone { reason: "the test asked for it".to_owned() }
                    }
                });
            }
        }
        drop(books);
        let mut life = self.0.life.lock();
        let mut death = None;
        if let Some(life) = life.as_mut() {
            life.calls.push(op);
            death = life.death;
            if life.is_over || death == Some(Death::Before(life.calls.len())) {
                return Err(life.die());
            }
        }
        let mut driver = self.0.driver.lock();
        let result = call(&mut driver);
        if let Some(life) = life.as_mut().filter(|life| death == Some(Death::After(life.calls.len()))) {
            return Err(life.die());
        }
        if let Some(look) = self.0.look.lock().as_mut() {
            look(&driver);
        }
        result
    }

    fn note<T>(&self, result: Result<T>, note: impl FnOnce(&mut Books)) -> Result<T> {
        if result.is_ok() {
            note(&mut self.0.books.lock());
        }
        result
    }
}

impl<D: VmiDriver> VmiInfo for Faulty<D> {
    fn info(&self) -> &VmInfo {
        &self.0.info
    }

    fn caps(&self) -> Caps {
        self.inner().caps()
    }

    fn version(&self) -> String {
        self.inner().version()
    }

    fn console(&self) -> Option<Vec<u8>> {
        self.inner().console()
    }
}

impl<D: VmiDriver> VmiRead for Faulty<D> {
    fn read(&self, pa: Pa, buf: &mut [u8]) -> Result<()> {
        self.call("read", |driver| driver.read(pa, buf))
    }
}

impl<D: VmiDriver> VmiWrite for Faulty<D> {
    fn write(&mut self, pa: Pa, bytes: &[u8]) -> Result<()> {
        self.call("write", |driver| driver.write(pa, bytes))
    }
}

impl<D: VmiDriver> VmiRegisters for Faulty<D> {
    fn registers(&self, vcpu: VcpuId) -> Result<Registers> {
        self.call("registers", |driver| driver.registers(vcpu))
    }

    fn set_registers(&mut self, vcpu: VcpuId, registers: &Registers) -> Result<()> {
        self.call("set_registers", |driver| driver.set_registers(vcpu, registers))
    }
}

impl<D: VmiDriver> VmiViews for Faulty<D> {
    fn create_view(&mut self, access: MemoryAccess) -> Result<View> {
        let view = self.call("create_view", |driver| driver.create_view(access))?;
        self.note(Ok(view), |books| _ = books.views.insert(view))
    }

    fn destroy_view(&mut self, view: View) -> Result<()> {
        let done = self.call("destroy_view", |driver| driver.destroy_view(view));
        self.note(done, |books| {
            books.views.remove(&view);
            books.remaps.retain(|at, _| at.0 != view);
        })
    }

    fn switch_to_view(&mut self, view: View) -> Result<()> {
        self.call("switch_to_view", |driver| driver.switch_to_view(view))
    }

    fn vcpu_view(&self, vcpu: VcpuId) -> Result<View> {
        self.call("vcpu_view", |driver| driver.vcpu_view(vcpu))
    }

    fn remap(&mut self, view: View, gfn: Gfn, frame: Option<Gfn>) -> Result<()> {
        let done = self.call("remap", |driver| driver.remap(view, gfn, frame));
        self.note(done, |books| match frame {
            Some(frame) => drop(books.remaps.insert((view, gfn), frame)),
            None => drop(books.remaps.remove(&(view, gfn))),
        })
    }
}

impl<D: VmiDriver> VmiProtection for Faulty<D> {
    fn memory_access(&self, view: View, gfn: Gfn) -> Result<MemoryAccess> {
        self.call("memory_access", |driver| driver.memory_access(view, gfn))
    }

    fn set_memory_access(&mut self, view: View, gfn: Gfn, access: MemoryAccess) -> Result<()> {
        self.call("set_memory_access", |driver| driver.set_memory_access(view, gfn, access))
    }

    fn set_memory_access_multi(&mut self, view: View, pages: &[(Gfn, MemoryAccess)]) -> Result<()> {
        self.call("set_memory_access_multi", |driver| driver.set_memory_access_multi(view, pages))
    }
}

impl<D: VmiDriver> VmiFrames for Faulty<D> {
    fn allocate_frames(&mut self, count: usize) -> Result<Vec<Gfn>> {
        self.call("allocate_frames", |driver| driver.allocate_frames(count))
    }

    fn free_frames(&mut self, frames: &[Gfn]) -> Result<()> {
        self.call("free_frames", |driver| driver.free_frames(frames))
    }

    fn frames_in_use(&self) -> usize {
        self.inner().frames_in_use()
    }
}

impl<D: VmiDriver> VmiEvents for Faulty<D> {
    fn monitor(&mut self, monitor: Monitor, on: bool) -> Result<()> {
        let done = self.call("monitor", |driver| driver.monitor(monitor, on));
        self.note(done, |books| {
            let name = format!("{monitor:?}");
            let _ = if on { books.monitors.insert(name) } else { books.monitors.remove(&name) };
        })
    }

    fn wait(&mut self, timeout: Duration) -> Result<Wait> {
        let wait = self.call("wait", |driver| driver.wait(timeout))?;
        if let Wait::Event(VmiEvent { vcpu, .. }) = wait {
            self.0.books.lock().held.insert(vcpu);
        }
        Ok(wait)
    }

    fn respond(&mut self, vcpu: VcpuId, response: &VmiEventResponse) -> Result<()> {
        let done = self.call("respond", |driver| driver.respond(vcpu, response));
        self.note(done, |books| _ = books.held.remove(&vcpu))
    }

    fn waker(&self) -> Arc<dyn Waker> {
        self.inner().waker()
    }

    fn readiness(&self) -> Result<Option<OwnedFd>> {
        self.inner().readiness()
    }
}

impl<D: VmiDriver> VmiInject for Faulty<D> {
    fn inject(&mut self, vcpu: VcpuId, injection: &Injection) -> Result<()> {
        let done = self.call("inject", |driver| driver.inject(vcpu, injection));
        self.note(done, |books| books.injections += 1)
    }
}

impl<D: VmiDriver> VmiControl for Faulty<D> {
    fn pause(&mut self) -> Result<()> {
        let done = self.call("pause", VmiControl::pause);
        self.note(done, |books| books.pauses += 1)
    }

    fn resume(&mut self) -> Result<()> {
        let done = self.call("resume", VmiControl::resume);
        self.note(done, |books| books.pauses -= 1)
    }

    fn let_go(&mut self) -> Result<()> {
        self.call("let_go", VmiControl::let_go)
    }
}

impl<D: VmiDriver> VmiRepair for Faulty<D> {
    fn additions(&self) -> Result<Additions> {
        self.call("additions", |driver| driver.additions())
    }

    fn adopt(&mut self, left: &Additions, pauses: u32) -> Result<()> {
        let done = self.call("adopt", |driver| driver.adopt(left, pauses));
        self.note(done, |books| {
            books.views.extend(&left.views);
            books.pauses += i64::from(pauses);
        })
    }

    fn release_held(&mut self) -> Result<usize> {
        let held = self.call("release_held", VmiRepair::release_held)?;
        self.note(Ok(held), |books| books.held.clear())
    }
}

/// What operations are done to: a guest behind a driver that can fail, and whatever keeps books of it.
pub trait World {
    type Driver: VmiDriver;

    fn driver(&self) -> Faulty<Self::Driver>;

    /// The bookkeeping, to be compared. Panics if it contradicts the guest.
    fn books(&self) -> Vec<String>;
}

fn both<W: World>(world: &W) -> (Seen, Vec<String>) {
    (world.driver().seen(), world.books())
}

fn assert_same(found: &(Seen, Vec<String>), wanted: &(Seen, Vec<String>), when: &str) {
    assert!(found.0 == wanted.0, "{when}: {}", found.0.differences(&wanted.0));
    assert_eq!(found.1, wanted.1, "{when}");
}

/// Fails each driver call of `op` in turn, reads too. After each failure guest and books are as before and the error names the call;
/// the retry does all of it. Returns how many calls there are.
pub fn each_call_failing<W: World>(make: impl Fn() -> W, op: impl Fn(&mut W) -> Result<()>) -> usize {
    each_call_failing_with(5, make, op)
}

/// The same, with that errno.
pub fn each_call_failing_with<W: World>(errno: i32, make: impl Fn() -> W, op: impl Fn(&mut W) -> Result<()>) -> usize {
    let mut world = make();
    op(&mut world).unwrap();
    let wanted = both(&world);
    for n in 1.. {
        let mut world = make();
        if !fails_whole(&mut world, (n, errno), &op) {
            assert!(n > 1, "it makes no call");
            return n - 1;
        }
        op(&mut world).unwrap();
        assert_same(&both(&world), &wanted, &format!("retry of call {n}"));
    }
    0
}

/// As [`each_call_failing`], with all the failures on one guest, one after the other, and then the retry: for guests that take long
/// to make. Each call fails with another errno.
pub fn each_call_failing_on_one<W: World>(world: &mut W, op: impl Fn(&mut W) -> Result<()>) -> usize {
    let mut n = 1;
    while fails_whole(world, (n, ERRNOS[n % ERRNOS.len()]), &op) {
        n += 1;
    }
    assert!(n > 1, "it makes no call");
    n - 1
}

/// Does `op` with call `n` failing. False if there is no such call: then it is done.
fn fails_whole<W: World>(world: &mut W, (n, errno): (usize, i32), op: impl Fn(&mut W) -> Result<()>) -> bool {
    let before = both(world);
    let driver = world.driver();
    driver.fail_nth_with(n, Failure::Errno(errno));
    let result = op(world);
    let is_done = driver.is_armed();
    driver.fail_nth(0);
    if is_done {
        result.unwrap();
        return false;
    }
    let failed = match &result {
        Err(VmiError::Driver { op, errno: told, .. }) if *told == errno => op,
        other => panic!("call {n} with {errno}: {other:?}"),
    };
    assert_eq!(Some(*failed), driver.failed(), "call {n} is told as another");
    assert_same(&both(world), &before, &format!("call {n}, {failed}"));
    true
}

/// As [`each_call_failing`] for calls of a controller that panic: `arm` makes the n-th one of `op` do so, and says whether it has.
pub fn each_call_panicking<W: World>(
    make: impl Fn() -> W,
    op: impl Fn(&mut W) -> Result<()>,
    arm: impl Fn(&mut W, usize) -> bool,
) {
    let mut world = make();
    op(&mut world).unwrap();
    let wanted = both(&world);
    for n in 1.. {
        let mut world = make();
        if !panics_whole(&mut world, n, &op, &arm) {
            assert!(n > 1, "it makes no call");
            return;
        }
        op(&mut world).unwrap();
        assert_same(&both(&world), &wanted, &format!("retry of call {n}"));
    }
}

/// As [`each_call_panicking`], with all the panics on one guest, and then the retry. Returns how many calls there are.
pub fn each_call_panicking_on_one<W: World>(
    world: &mut W,
    op: impl Fn(&mut W) -> Result<()>,
    arm: impl Fn(&mut W, usize) -> bool,
) -> usize {
    let mut n = 1;
    while panics_whole(world, n, &op, &arm) {
        n += 1;
    }
    assert!(n > 1, "it makes no call");
    n - 1
}

/// Does `op` with a panic in call `n` of the controller. False if there is no such call: then it is done.
fn panics_whole<W: World>(
    world: &mut W,
    n: usize,
    op: impl Fn(&mut W) -> Result<()>,
    arm: impl Fn(&mut W, usize) -> bool,
) -> bool {
    let before = both(world);
    arm(world, n);
    let result = catch_unwind(AssertUnwindSafe(|| op(world)));
    if !arm(world, 0) {
        assert!(matches!(result, Ok(Ok(()))), "{result:?}");
        return false;
    }
    let panic = result.expect_err("the panic was swallowed");
    assert_eq!(panic.downcast_ref::<&str>(), Some(&"a controller that panics"), "call {n}");
    assert_same(&both(world), &before, &format!("panic in call {n}"));
    true
}
