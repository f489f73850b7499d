//! Numbers for page-table roots, because a page's line has room for ten bits and not for an address.

use rustc_hash::FxHashMap;

use crate::addr::Pa;

/// The roots that pages of one root refer to by number, from 1.
#[derive(Default)]
pub(super) struct Roots {
    known: Vec<Root>,
    numbers: FxHashMap<Pa, u16>,
    /// The numbers of roots that no page refers to any more.
    free: Vec<u16>,
}

struct Root {
    pa: Pa,
    /// How many refer to it.
    pages: u32,
}

impl Roots {
    /// How many can have a number at once.
    pub(super) const MOST: u16 = 1023;

    fn root(&mut self, number: u16) -> Option<&mut Root> {
        self.known.get_mut(usize::from(number).checked_sub(1)?)
    }

    /// The number of a root for one page more; `None` if there are too many.
    pub(super) fn take(&mut self, pa: Pa) -> Option<u16> {
        if let Some(number) = self.numbers.get(&pa).copied() {
            self.root(number)?.pages += 1;
            return Some(number);
        }
        let number = if let Some(number) = self.free.pop() {
            *self.root(number)? = Root { pa, pages: 1 };
            number
        } else if self.known.len() < usize::from(Self::MOST) {
            self.known.push(Root { pa, pages: 1 });
            self.known.len() as u16
        } else {
            return None;
        };
        self.numbers.insert(pa, number);
        Some(number)
    }

    /// A page that took the number has no breakpoints any more. Nothing is done for 0.
    pub(super) fn give_back(&mut self, number: u16) {
        let Some(root) = self.root(number) else { return };
        root.pages -= 1;
        if root.pages == 0 {
            let pa = root.pa;
            self.numbers.remove(&pa);
            self.free.push(number);
        }
    }

    /// Whether that is the number of the root; 0 is that of none.
    #[inline]
    pub(super) fn is(&self, number: u64, pa: Pa) -> bool {
        usize::try_from(number).is_ok_and(|number| self.known.get(number.wrapping_sub(1)).is_some_and(|root| root.pa == pa))
    }
}
