//! Numbers for page-table roots, because a page's line has room for ten bits and not for an address.

use crate::addr::Pa;

/// The roots under which the breakpoints of some page alone are hit.
#[derive(Default)]
pub(super) struct Roots(Vec<Root>);

struct Root {
    pa: Pa,
    /// How many pages have that number. Without one it is given to another root.
    pages: u32,
}

impl Roots {
    /// How many have one at most.
    pub(super) const MOST: usize = 1023;

    /// The number of a root for one page more, from 1; `None` if there are too many.
    pub(super) fn take(&mut self, pa: Pa) -> Option<u64> {
        let known = self.0.iter().position(|root| root.pa == pa);
        let at = known.or_else(|| self.0.iter().position(|root| root.pages == 0)).unwrap_or(self.0.len());
        match self.0.get_mut(at) {
            Some(root) => *root = Root { pa, pages: root.pages + 1 },
            None if at < Self::MOST => self.0.push(Root { pa, pages: 1 }),
            None => return None,
        }
        Some(at as u64 + 1)
    }

    pub(super) fn give_back(&mut self, number: u64) {
        if let Some(root) = number.checked_sub(1).and_then(|at| self.0.get_mut(at as usize)) {
            root.pages -= 1;
        }
    }

    /// Whether that is the number of the root; 0 is that of none.
    #[inline]
    pub(super) fn is(&self, number: u64, pa: Pa) -> bool {
        self.0.get((number as usize).wrapping_sub(1)).is_some_and(|root| root.pa == pa)
    }
}
