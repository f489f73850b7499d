//! A local APIC as far as the boot contract goes: x2APIC registers through MSRs (Intel SDM vol. 3, 11.12), fixed interrupts between
//! vCPUs, and a timer that counts virtual time.

/// First MSR of the x2APIC.
pub const FIRST_MSR: u32 = 0x800;
/// Last MSR of the x2APIC.
pub const LAST_MSR: u32 = 0x8ff;
/// `IA32_APIC_BASE`.
pub const BASE_MSR: u32 = 0x1b;

const ID: u32 = 0x802;
const VERSION: u32 = 0x803;
const TPR: u32 = 0x808;
const EOI: u32 = 0x80b;
const SPURIOUS: u32 = 0x80f;
const ICR: u32 = 0x830;
const LVT_TIMER: u32 = 0x832;
const INITIAL_COUNT: u32 = 0x838;
const CURRENT_COUNT: u32 = 0x839;
const DIVIDE: u32 = 0x83e;

const MASKED: u32 = 1 << 16;
const PERIODIC: u32 = 1 << 17;

/// A set of vectors.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
struct Vectors([u64; 4]);

impl Vectors {
    fn set(&mut self, vector: u8, on: bool) {
        if let Some(word) = self.0.get_mut(usize::from(vector >> 6)) {
            let bit = 1 << (vector & 63);
            *word = if on { *word | bit } else { *word & !bit };
        }
    }

    #[inline]
    const fn is_empty(&self) -> bool {
        let [a, b, c, d] = self.0;
        a | b | c | d == 0
    }

    fn highest(&self) -> Option<u8> {
        self.0
            .iter()
            .enumerate()
            .rev()
            .find(|(_, word)| **word != 0)
            .map(|(index, word)| (index as u32 * 64 + 63 - word.leading_zeros()) as u8)
    }
}

/// Where an interrupt sent by a write to the ICR goes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Ipi {
    pub vector: u8,
    pub to: Target,
}

/// The destination of an [`Ipi`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Target {
    Vcpu(u32),
    Itself,
    All,
    Others,
}

/// What came of a write to a register.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Written {
    /// There is no such register: a #GP for the guest.
    NoRegister,
    Done,
    /// Done, and an interrupt is to be sent.
    Sends(Ipi),
}

/// The local APIC of one vCPU.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Apic {
    id: u32,
    requested: Vectors,
    in_service: Vectors,
    tpr: u8,
    spurious: u32,
    lvt_timer: u32,
    initial: u32,
    /// Virtual time at which the timer fires.
    due: Option<u64>,
}

impl Apic {
    /// After reset, enabled.
    pub const fn new(id: u32) -> Self {
        Self {
            id,
            requested: Vectors([0; 4]),
            in_service: Vectors([0; 4]),
            tpr: 0,
            spurious: 0x1ff,
            lvt_timer: MASKED,
            initial: 0,
            due: None,
        }
    }

    /// Reads a register; `None` for one that does not exist, which is a #GP for the guest.
    pub fn read(&self, msr: u32, now: u64) -> Option<u64> {
        Some(match msr {
            ID => self.id.into(),
            VERSION => 0x0005_0014,
            TPR => self.tpr.into(),
            SPURIOUS => self.spurious.into(),
            LVT_TIMER => self.lvt_timer.into(),
            INITIAL_COUNT => self.initial.into(),
            CURRENT_COUNT => self.due.map_or(0, |due| due.saturating_sub(now)),
            ICR | DIVIDE => 0,
            _ => return None,
        })
    }

    /// Writes a register.
    pub fn write(&mut self, msr: u32, value: u64, now: u64) -> Written {
        match msr {
            EOI => {
                if let Some(vector) = self.in_service.highest() {
                    self.in_service.set(vector, false);
                }
            }
            TPR => self.tpr = value as u8,
            SPURIOUS => self.spurious = value as u32,
            LVT_TIMER => {
                self.lvt_timer = value as u32;
                if self.lvt_timer & MASKED != 0 {
                    self.due = None;
                } else if self.due.is_none() && self.initial != 0 {
                    self.due = Some(now + u64::from(self.initial));
                }
            }
            INITIAL_COUNT => {
                self.initial = value as u32;
                self.due = (self.initial != 0 && self.lvt_timer & MASKED == 0).then(|| now + u64::from(self.initial));
            }
            DIVIDE => {}
            ICR => {
                // Delivery modes other than fixed (bits 8 to 10) start processors; every vCPU runs already.
                if value >> 8 & 7 != 0 {
                    return Written::Done;
                }
                let to = match value >> 18 & 3 {
                    0 => Target::Vcpu((value >> 32) as u32),
                    1 => Target::Itself,
                    2 => Target::All,
                    _ => Target::Others,
                };
                return Written::Sends(Ipi { vector: value as u8, to });
            }
            _ => return Written::NoRegister,
        }
        Written::Done
    }

    /// Requests an interrupt.
    pub fn request(&mut self, vector: u8) {
        self.requested.set(vector, true);
    }

    /// When the timer fires next.
    pub const fn due(&self) -> Option<u64> {
        self.due
    }

    /// Lets the timer fire if its time has come.
    pub fn tick(&mut self, now: u64) {
        if self.due.is_some_and(|due| due <= now) {
            self.request(self.lvt_timer as u8);
            self.due = (self.lvt_timer & PERIODIC != 0).then(|| now + u64::from(self.initial.max(1)));
        }
    }

    /// The interrupt that would be delivered now, if interrupts are enabled.
    #[inline]
    pub fn pending(&self) -> Option<u8> {
        // Hardly ever is there one, and it is asked for before every run.
        if self.requested.is_empty() {
            return None;
        }
        let vector = self.requested.highest()?;
        let busy = self.in_service.highest().unwrap_or(0) >> 4;
        (vector >> 4 > busy && vector >> 4 > self.tpr >> 4).then_some(vector)
    }

    /// The interrupt given by [`Apic::pending`] is being delivered.
    pub fn accept(&mut self, vector: u8) {
        self.requested.set(vector, false);
        self.in_service.set(vector, true);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_timer_fires_once_or_again_and_again() {
        let mut apic = Apic::new(0);
        assert_eq!(apic.write(LVT_TIMER, 0x40, 0), Written::Done);
        assert_eq!(apic.write(INITIAL_COUNT, 100, 0), Written::Done);
        apic.tick(99);
        assert_eq!(apic.pending(), None);
        apic.tick(100);
        assert_eq!(apic.pending(), Some(0x40));
        assert_eq!(apic.due(), None, "one-shot");
        apic.accept(0x40);
        assert_eq!(apic.write(EOI, 0, 100), Written::Done);
        assert_eq!(apic.write(LVT_TIMER, u64::from(PERIODIC) | 0x41, 100), Written::Done);
        assert_eq!(apic.due(), Some(200));
        apic.tick(205);
        assert_eq!((apic.pending(), apic.due()), (Some(0x41), Some(305)));
    }

    #[test]
    fn a_lower_class_waits_until_the_higher_one_is_done() {
        let mut apic = Apic::new(0);
        apic.request(0x50);
        apic.accept(0x50);
        apic.request(0x4f);
        assert_eq!(apic.pending(), None);
        apic.request(0x60);
        assert_eq!(apic.pending(), Some(0x60));
        assert_eq!(apic.write(EOI, 0, 0), Written::Done);
        apic.accept(0x60);
        assert_eq!(apic.write(EOI, 0, 0), Written::Done);
        assert_eq!(apic.pending(), Some(0x4f));
    }

    #[test]
    fn an_interrupt_to_another_vcpu_names_it() {
        let mut apic = Apic::new(0);
        assert_eq!(apic.write(ICR, 3 << 32 | 0x55, 0), Written::Sends(Ipi { vector: 0x55, to: Target::Vcpu(3) }));
        assert_eq!(apic.write(ICR, 3 << 18 | 0x55, 0), Written::Sends(Ipi { vector: 0x55, to: Target::Others }));
        assert_eq!(apic.write(0x8ff, 0, 0), Written::NoRegister);
    }
}
