//! A driver whose tool dies at a given call: that call and all later ones do nothing but fail, and the guest stays as it is.

use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use vmitap::arch::amd64::{Injection, Registers};
use vmitap::driver::{
    Additions, Caps, Monitor, VmInfo, VmiControl, VmiDriver, VmiEvents, VmiFrames, VmiInfo, VmiInject, VmiProtection, VmiRead,
    VmiRegisters, VmiRepair, VmiViews, VmiWrite, Wait, Waker,
};
use vmitap::event::VmiEventResponse;
use vmitap::{Gfn, MemoryAccess, Pa, VcpuId, View, VmiError};

type Result<T> = std::result::Result<T, VmiError>;

/// When the tool dies.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Death {
    /// Before the n-th call reaches the guest; 1 is the first.
    Before(usize),
    /// After the n-th call changed the guest, and before anybody hears of it.
    After(usize),
}

/// What the tests keep of a guest whose tool has died.
pub struct Fate<D> {
    pub driver: Arc<Mutex<D>>,
    death: Option<Death>,
    /// The names of the calls so far.
    calls: Vec<&'static str>,
    dead: bool,
    /// Done once, at the moment of death.
    last_will: Box<dyn FnMut() + Send>,
}

impl<D> Fate<D> {
    pub fn new(driver: D, death: Option<Death>, last_will: impl FnMut() + Send + 'static) -> Arc<Mutex<Self>> {
        let driver = Arc::new(Mutex::new(driver));
        Arc::new(Mutex::new(Self { driver, death, calls: Vec::new(), dead: false, last_will: Box::new(last_will) }))
    }

    /// The names of the calls there were, and whether the tool is dead.
    pub fn end(&self) -> (Vec<&'static str>, bool) {
        (self.calls.clone(), self.dead)
    }

    fn die(&mut self) -> VmiError {
        if !std::mem::replace(&mut self.dead, true) {
            (self.last_will)();
        }
        VmiError::Driver { op: "any", errno: 5, detail: "the tool is dead".to_owned() }
    }

    fn call<T>(&mut self, name: &'static str, call: impl FnOnce(&mut D) -> Result<T>) -> Result<T> {
        self.calls.push(name);
        let n = self.calls.len();
        if self.dead || self.death == Some(Death::Before(n)) {
            return Err(self.die());
        }
        let result = call(&mut self.driver.lock());
        if self.death == Some(Death::After(n)) { Err(self.die()) } else { result }
    }
}

/// The driver as the tool has it.
pub struct Mortal<D> {
    info: VmInfo,
    waker: Arc<dyn Waker>,
    fate: Arc<Mutex<Fate<D>>>,
}

impl<D: VmiDriver> Mortal<D> {
    pub fn new(fate: &Arc<Mutex<Fate<D>>>) -> Self {
        let (info, waker) = {
            let fate = fate.lock();
            let driver = fate.driver.lock();
            (driver.info().clone(), driver.waker())
        };
        Self { info, waker, fate: fate.clone() }
    }
}

/// Every method that can fail goes through [`Fate::call`].
macro_rules! mortal {
    ($($trait:ident { $(fn $name:ident(&$($self:ident)+ $(, $arg:ident: $type:ty)*) -> $out:ty;)+ } [$($more:item)*])+) => {
        $(impl<D: VmiDriver> $trait for Mortal<D> {
            $(fn $name(&$($self)+ $(, $arg: $type)*) -> $out {
                mortal!(@this $($self)+).fate.lock().call(stringify!($name), |driver| driver.$name($($arg),*))
            })+
            $($more)*
        })+
    };
    (@this mut $self:ident) => { $self };
    (@this $self:ident) => { $self };
}

mortal! {
    VmiRead {
        fn read(&self, pa: Pa, buf: &mut [u8]) -> Result<()>;
    } []
    VmiWrite {
        fn write(&mut self, pa: Pa, bytes: &[u8]) -> Result<()>;
    } []
    VmiRegisters {
        fn registers(&self, vcpu: VcpuId) -> Result<Registers>;
        fn set_registers(&mut self, vcpu: VcpuId, registers: &Registers) -> Result<()>;
    } []
    VmiViews {
        fn create_view(&mut self, access: MemoryAccess) -> Result<View>;
        fn destroy_view(&mut self, view: View) -> Result<()>;
        fn switch_to_view(&mut self, view: View) -> Result<()>;
        fn vcpu_view(&self, vcpu: VcpuId) -> Result<View>;
        fn remap(&mut self, view: View, gfn: Gfn, frame: Option<Gfn>) -> Result<()>;
    } []
    VmiProtection {
        fn memory_access(&self, view: View, gfn: Gfn) -> Result<MemoryAccess>;
        fn set_memory_access(&mut self, view: View, gfn: Gfn, access: MemoryAccess) -> Result<()>;
        fn set_memory_access_multi(&mut self, view: View, pages: &[(Gfn, MemoryAccess)]) -> Result<()>;
    } []
    VmiFrames {
        fn allocate_frames(&mut self, count: usize) -> Result<Vec<Gfn>>;
        fn free_frames(&mut self, frames: &[Gfn]) -> Result<()>;
    } [
        fn frames_in_use(&self) -> usize {
            self.fate.lock().driver.lock().frames_in_use()
        }
    ]
    VmiEvents {
        fn monitor(&mut self, monitor: Monitor, on: bool) -> Result<()>;
        fn wait(&mut self, timeout: Duration) -> Result<Wait>;
        fn respond(&mut self, vcpu: VcpuId, response: &VmiEventResponse) -> Result<()>;
    } [
        fn waker(&self) -> Arc<dyn Waker> {
            self.waker.clone()
        }
    ]
    VmiInject {
        fn inject(&mut self, vcpu: VcpuId, injection: &Injection) -> Result<()>;
    } []
    VmiControl {
        fn pause(&mut self) -> Result<()>;
        fn resume(&mut self) -> Result<()>;
        fn let_go(&mut self) -> Result<()>;
    } []
    VmiRepair {
        fn additions(&self) -> Result<Additions>;
        fn adopt(&mut self, left: &Additions, pauses: u32) -> Result<()>;
        fn release_held(&mut self) -> Result<usize>;
    } []
}

impl<D: VmiDriver> VmiInfo for Mortal<D> {
    fn info(&self) -> &VmInfo {
        &self.info
    }

    fn caps(&self) -> Caps {
        self.fate.lock().driver.lock().caps()
    }

    fn version(&self) -> String {
        self.fate.lock().driver.lock().version()
    }
}
