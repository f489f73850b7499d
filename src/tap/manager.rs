//! Breakpoints by owner: which exist, which are planted, and whose an event is.
//!
//! Bookkeeping comes first and is taken back if the driver fails, so a page's number of breakpoints is known before it is touched.

use std::hash::Hash;

use super::books::{Books, Entry, Mapping, Place, id_hash};
use super::guarded::guarded;
use super::{Left, TapController, TapEvents};
use crate::addr::{Gfn, Pa, Va, View};
use crate::arch::amd64::AddressContext;
use crate::core::VmiCore;
use crate::driver::VmiDriver;
use crate::error::{Result, TranslationFault, VmiError};
use crate::event::{EventReason, VmiEvent};

/// A breakpoint as its owner wants it. What tells it from others: the view, the address with its root, and the key.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Breakpoint<K, T> {
    /// The view it is in.
    pub view: View,
    /// Where.
    pub va: Va,
    /// The page tables `va` is meant under.
    pub context: AddressContext,
    /// Whose it is: several owners can have one at the same address.
    pub key: K,
    /// What the owner wants to be told with it.
    pub tag: T,
    /// Whether it is hit under every root, not only under `context`'s.
    pub global: bool,
}

/// A breakpoint that is there.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Found<'a, K, T> {
    /// The view it is in.
    pub view: View,
    /// Where.
    pub va: Va,
    /// Where it is planted; `None` while its page is not there.
    pub pa: Option<Pa>,
    /// The page tables it was inserted with (the first ones, if it is global and was inserted with several).
    pub context: AddressContext,
    /// Whose it is.
    pub key: &'a K,
    /// What came with it.
    pub tag: &'a T,
    /// Whether it is hit under every root.
    pub global: bool,
}

/// What an insert wrote into the books.
struct Recorded {
    id: u32,
    /// The breakpoint was not there before, under any root.
    is_new: bool,
    /// What is still to be planted.
    at: Option<(View, Pa)>,
}

/// How an insert comes to the physical address.
#[derive(Clone, Copy)]
enum Where {
    Translate,
    Given(Option<Pa>),
}

/// The breakpoints of many owners. Several at one address share what is planted there. Key and tag are cloned for each place at which a
/// breakpoint is planted, so that a hit finds them there: they should be small, or shared, and `Clone` must not panic.
///
/// `insert` and `remove` go to a [`TapController`]; every one of them does all it is asked for, or fails with the guest, the
/// controller and this as they were ([`VmiError::UndoFailed`] says what is not, should undoing fail).
pub struct BreakpointManager<K, T> {
    books: Books<K, T>,
}

impl<K, T> Default for BreakpointManager<K, T> {
    fn default() -> Self {
        Self { books: Books::default() }
    }
}

/// Where an event of a tap happened.
fn address<C: TapEvents + ?Sized>(controller: &C, event: &VmiEvent) -> Option<(View, Pa)> {
    let (view, gfn) = controller.check_event(event)?;
    let pa = match event.reason {
        EventReason::MemoryAccess { pa, .. } => pa,
        _ => gfn.pa(event.registers.rip().page_offset()),
    };
    Some((view, pa))
}

impl<K: Eq + Hash + Clone, T: Clone> BreakpointManager<K, T> {
    /// No breakpoints.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a breakpoint and plants it, if its address is mapped. Where it is not, the breakpoint is kept and waits. Returns
    /// whether it is new: a duplicate changes nothing, makes no driver call, and the first tag stays.
    ///
    /// # Errors
    /// [`VmiError::BreakpointConflict`] if the same one exists with another `global` flag; [`VmiError::Translation`] if the
    /// address is not merely absent; the controller's. Nothing is changed then.
    pub fn insert<D, C>(&mut self, vmi: &mut VmiCore<D>, controller: &mut C, breakpoint: Breakpoint<K, T>) -> Result<bool>
    where
        D: VmiDriver + ?Sized,
        C: TapController<D> + ?Sized,
    {
        self.insert_one(vmi, controller, breakpoint, Where::Translate)
    }

    /// As [`Self::insert`], with the physical address as the caller knows it: `None` if the page is not there.
    ///
    /// # Errors
    /// As [`Self::insert`]; nothing is translated. [`VmiError::InvalidArgument`] if `pa` has more than 52 bits.
    pub fn insert_with_hint<D, C>(
        &mut self,
        vmi: &mut VmiCore<D>,
        controller: &mut C,
        breakpoint: Breakpoint<K, T>,
        pa: Option<Pa>,
    ) -> Result<bool>
    where
        D: VmiDriver + ?Sized,
        C: TapController<D> + ?Sized,
    {
        self.insert_one(vmi, controller, breakpoint, Where::Given(pa))
    }

    /// As [`Self::insert`] for many, all or none, with driver calls by page and not by breakpoint. Returns which are new.
    ///
    /// # Errors
    /// As [`Self::insert`], the first one's.
    pub fn insert_many<D, C>(
        &mut self,
        vmi: &mut VmiCore<D>,
        controller: &mut C,
        breakpoints: Vec<Breakpoint<K, T>>,
    ) -> Result<Vec<bool>>
    where
        D: VmiDriver + ?Sized,
        C: TapController<D> + ?Sized,
    {
        self.insert_all(vmi, controller, breakpoints.into_iter().map(|breakpoint| (breakpoint, Where::Translate)))
    }

    /// As [`Self::insert_many`], with the physical addresses as the caller knows them: `None` where the page is not there.
    ///
    /// # Errors
    /// As [`Self::insert_with_hint`], the first one's.
    pub fn insert_many_with_hints<D, C>(
        &mut self,
        vmi: &mut VmiCore<D>,
        controller: &mut C,
        breakpoints: Vec<(Breakpoint<K, T>, Option<Pa>)>,
    ) -> Result<Vec<bool>>
    where
        D: VmiDriver + ?Sized,
        C: TapController<D> + ?Sized,
    {
        self.insert_all(vmi, controller, breakpoints.into_iter().map(|(breakpoint, pa)| (breakpoint, Where::Given(pa))))
    }

    fn insert_one<D, C>(
        &mut self,
        vmi: &mut VmiCore<D>,
        controller: &mut C,
        breakpoint: Breakpoint<K, T>,
        hint: Where,
    ) -> Result<bool>
    where
        D: VmiDriver + ?Sized,
        C: TapController<D> + ?Sized,
    {
        let Some(Recorded { id, is_new, at }) = self.record_one(vmi, breakpoint, hint)? else { return Ok(false) };
        let Some((view, pa)) = at else { return Ok(true) };
        guarded(controller, |controller| {
            self.plant_one(vmi, controller, view, pa).map(|()| true).inspect_err(|_| self.books.unrecord(id, is_new))
        })
    }

    fn insert_all<D, C>(
        &mut self,
        vmi: &mut VmiCore<D>,
        controller: &mut C,
        wanted: impl ExactSizeIterator<Item = (Breakpoint<K, T>, Where)>,
    ) -> Result<Vec<bool>>
    where
        D: VmiDriver + ?Sized,
        C: TapController<D> + ?Sized,
    {
        self.books.reserve(wanted.len());
        let mut new = Vec::with_capacity(wanted.len());
        let mut recorded = Vec::with_capacity(wanted.len());
        let mut steps = Vec::with_capacity(wanted.len());
        let mut result = Ok(());
        for (breakpoint, hint) in wanted {
            match self.record_one(vmi, breakpoint, hint) {
                Ok(None) => new.push(false),
                Ok(Some(Recorded { id, is_new, at })) => {
                    new.push(true);
                    recorded.push((id, is_new));
                    steps.extend(at);
                }
                Err(error) => {
                    result = Err(error);
                    break;
                }
            }
        }
        guarded(controller, |controller| {
            let Err(error) = result.and_then(|()| self.plant(vmi, controller, &mut steps)) else { return Ok(new) };
            for (id, is_new) in recorded.into_iter().rev() {
                self.books.unrecord(id, is_new);
            }
            Err(error)
        })
    }

    fn record_one<D: VmiDriver + ?Sized>(
        &mut self,
        vmi: &VmiCore<D>,
        breakpoint: Breakpoint<K, T>,
        hint: Where,
    ) -> Result<Option<Recorded>> {
        let place = self.books.place(&breakpoint)?;
        if matches!(place, Place::Duplicate) {
            return Ok(None);
        }
        let pa = match hint {
            Where::Given(pa) => pa,
            Where::Translate => match vmi.translate(breakpoint.va, breakpoint.context) {
                Ok(pa) => Some(pa),
                Err(VmiError::Translation { fault: TranslationFault::NotPresent { .. }, .. }) => None,
                Err(error) => return Err(error),
            },
        };
        Books::<K, T>::check_place(pa)?;
        let (view, is_new) = (breakpoint.view, matches!(place, Place::New));
        let (id, fresh) = match place {
            Place::Joins(id) => {
                let fresh = pa.filter(|pa| !self.books.is_at(id, *pa));
                self.books.join(id, Mapping { context: breakpoint.context, pa });
                if let Some(pa) = fresh {
                    self.books.attach(view, pa, id);
                }
                (id, fresh)
            }
            _ => (self.books.add(breakpoint, pa), pa),
        };
        Ok(Some(Recorded { id, is_new, at: fresh.map(|pa| (view, pa)) }))
    }

    /// Removes a breakpoint, planted or waiting, by what is there and not by what `va` is mapped to today. A global one goes
    /// as a whole, whichever of its roots is given. Returns whether there was one.
    ///
    /// # Errors
    /// The controller's, with nothing changed.
    pub fn remove<D, C>(
        &mut self,
        vmi: &mut VmiCore<D>,
        controller: &mut C,
        view: View,
        va: Va,
        root: Pa,
        key: &K,
    ) -> Result<bool>
    where
        D: VmiDriver + ?Sized,
        C: TapController<D> + ?Sized,
    {
        let Some(id) = self.books.find(view, va, root, key) else { return Ok(false) };
        if let Some(pa) = self.books.only_place(id) {
            guarded(controller, |controller| self.unplant_one(vmi, controller, view, pa))?;
            self.books.forget(id);
        } else {
            self.take_out(vmi, controller, &[id])?;
        }
        Ok(true)
    }

    /// As [`Self::remove`], for a caller who knows where the address is mapped. The hint decides nothing: where a breakpoint is planted is
    /// known, and one that waits, or whose page was mapped elsewhere since, goes too.
    ///
    /// # Errors
    /// As [`Self::remove`].
    #[expect(clippy::too_many_arguments, reason = "an identity has four parts")]
    pub fn remove_with_hint<D, C>(
        &mut self,
        vmi: &mut VmiCore<D>,
        controller: &mut C,
        view: View,
        va: Va,
        root: Pa,
        _pa: Option<Pa>,
        key: &K,
    ) -> Result<bool>
    where
        D: VmiDriver + ?Sized,
        C: TapController<D> + ?Sized,
    {
        self.remove(vmi, controller, view, va, root, key)
    }

    /// As [`Self::remove`] for many, all or none. Returns how many there were.
    ///
    /// # Errors
    /// As [`Self::remove`].
    pub fn remove_many<D, C>(
        &mut self,
        vmi: &mut VmiCore<D>,
        controller: &mut C,
        identities: &[(View, Va, Pa, K)],
    ) -> Result<usize>
    where
        D: VmiDriver + ?Sized,
        C: TapController<D> + ?Sized,
    {
        let found = identities.iter().filter_map(|(view, va, root, key)| self.books.find(*view, *va, *root, key));
        let mut ids: Vec<u32> = found.collect();
        ids.sort_unstable();
        ids.dedup();
        self.take_out(vmi, controller, &ids)?;
        Ok(ids.len())
    }

    /// Removes the breakpoint of `key` that `event` hit, and the same one in every other view, planted or waiting.
    ///
    /// `None`: there is none. `Some(true)`: it was the last on its page of the event's view. `Some(false)`: others remain there.
    ///
    /// # Errors
    /// As [`Self::remove`].
    pub fn remove_by_event<D, C>(
        &mut self,
        vmi: &mut VmiCore<D>,
        controller: &mut C,
        event: &VmiEvent,
        key: &K,
    ) -> Result<Option<bool>>
    where
        D: VmiDriver + ?Sized,
        C: TapController<D> + ?Sized,
    {
        let Some((view, pa)) = address(controller, event) else { return Ok(None) };
        let Some(found) = self.get_by_event(controller, event, key) else { return Ok(None) };
        let (va, root, global) = (found.va, found.context.root, found.global);
        let root = (!global).then_some(root);
        let same = self.books.views.iter().filter_map(|(view, _)| self.books.find_exact(*view, va, root, key));
        let ids: Vec<u32> = same.collect();
        self.take_out(vmi, controller, &ids)?;
        Ok(Some(self.count_on_page(view, pa.gfn()) == 0))
    }

    /// Removes every breakpoint of a view, all or none. Returns how many there were.
    ///
    /// # Errors
    /// As [`Self::remove`].
    pub fn remove_by_view<D, C>(&mut self, vmi: &mut VmiCore<D>, controller: &mut C, view: View) -> Result<usize>
    where
        D: VmiDriver + ?Sized,
        C: TapController<D> + ?Sized,
    {
        let in_view = |(id, entry): (u32, &Option<Entry<(K, T)>>)| entry.as_ref().filter(|entry| entry.view == view).map(|_| id);
        let ids: Vec<u32> = (0..).zip(&self.books.entries).filter_map(in_view).collect();
        self.take_out(vmi, controller, &ids)?;
        Ok(ids.len())
    }

    /// Removes every breakpoint. Not all or nothing: as many as the driver lets go.
    ///
    /// # Errors
    /// [`VmiError::UndoFailed`] with those that could not be removed. They stay here, and calling again tries them.
    pub fn clear<D, C>(&mut self, vmi: &mut VmiCore<D>, controller: &mut C) -> Result<()>
    where
        D: VmiDriver + ?Sized,
        C: TapController<D> + ?Sized,
    {
        let mut left = Left::default();
        for id in (0..self.books.entries.len() as u32).rev() {
            let Some((view, va)) = self.books.entry(id).map(|entry| (entry.view, entry.va)) else { continue };
            left.note(self.take_out(vmi, controller, &[id]), || format!("the breakpoint at {va} in view {view}"));
        }
        left.done()
    }

    /// A page went away: what is at `va` under `root` is no longer planted and waits, in every view. Breakpoints other roots
    /// hold on the same frame stay. Returns how many now wait.
    ///
    /// # Errors
    /// The controller's, with nothing changed.
    pub fn page_out<D, C>(&mut self, vmi: &mut VmiCore<D>, controller: &mut C, va: Va, root: Pa) -> Result<usize>
    where
        D: VmiDriver + ?Sized,
        C: TapController<D> + ?Sized,
    {
        if let Some((id, view, at)) = self.books.only_owner_at(va, root) {
            let Some(pa) = at else { return Ok(0) };
            guarded(controller, |controller| self.unplant_one(vmi, controller, view, pa))?;
            self.books.detach(view, pa, id);
            self.books.set_mapping(id, root, None);
            return Ok(1);
        }
        let moved = self.books.set_mappings(va, root, |pa| pa.is_some(), None);
        // The books still have to say what is on the pages, so only now are the sites given up.
        let mut steps = Vec::new();
        for (id, view, old) in &moved {
            if let Some(pa) = old.filter(|pa| !self.books.is_at(*id, *pa)) {
                steps.push((*view, pa, *id));
            }
        }
        let mut places: Vec<_> = steps.iter().map(|(view, pa, _)| (*view, *pa)).collect();
        guarded(controller, |controller| {
            if let Err(error) = self.unplant(vmi, controller, &mut places) {
                for (id, _, old) in moved {
                    self.books.set_mapping(id, root, old);
                }
                return Err(error);
            }
            for (view, pa, id) in steps {
                self.books.detach(view, pa, id);
            }
            Ok(moved.len())
        })
    }

    /// A page came: what waits at `va` under `root` is planted at `pa`, in every view. Returns how many were planted.
    ///
    /// # Errors
    /// [`VmiError::InvalidArgument`] if `pa` has more than 52 bits; the controller's. All of them still wait then.
    pub fn page_in<D, C>(&mut self, vmi: &mut VmiCore<D>, controller: &mut C, va: Va, root: Pa, pa: Pa) -> Result<usize>
    where
        D: VmiDriver + ?Sized,
        C: TapController<D> + ?Sized,
    {
        Books::<K, T>::check_place(Some(pa))?;
        if let Some((id, view, at)) = self.books.only_owner_at(va, root) {
            if at.is_some() {
                return Ok(0);
            }
            self.books.set_mapping(id, root, Some(pa));
            self.books.attach(view, pa, id);
            return guarded(controller, |controller| {
                self.plant_one(vmi, controller, view, pa).map(|()| 1).inspect_err(|_| {
                    self.books.detach(view, pa, id);
                    self.books.set_mapping(id, root, None);
                })
            });
        }
        let is_there: Vec<u32> = self.books.owners_at(va, root).filter(|id| self.books.is_at(*id, pa)).collect();
        let moved = self.books.set_mappings(va, root, |pa| pa.is_none(), Some(pa));
        let fresh: Vec<_> = moved.iter().filter(|(id, ..)| !is_there.contains(id)).map(|(id, view, _)| (*id, *view)).collect();
        for (id, view) in &fresh {
            self.books.attach(*view, pa, *id);
        }
        let mut steps: Vec<_> = fresh.iter().map(|(_, view)| (*view, pa)).collect();
        guarded(controller, |controller| {
            if let Err(error) = self.plant(vmi, controller, &mut steps) {
                for (id, view) in fresh {
                    self.books.detach(view, pa, id);
                }
                for (id, _, old) in moved {
                    self.books.set_mapping(id, root, old);
                }
                return Err(error);
            }
            Ok(moved.len())
        })
    }

    /// Takes one root of a global breakpoint that has others out of the books, where it waits under that root. Calls no driver. Returns
    /// whether there was such a root.
    pub fn forget_root(&mut self, view: View, va: Va, root: Pa, key: &K) -> bool {
        let id = self.books.find_global(view, va, root, key);
        id.is_some_and(|id| self.books.forget_root(id, root))
    }

    /// The breakpoints at `va` that were inserted with `root`, in every view; a global one is shown as it is under that root.
    pub fn owners(&self, va: Va, root: Pa) -> impl Iterator<Item = Found<'_, K, T>> {
        self.books.owners_at(va, root).filter_map(move |id| {
            let mapping = self.books.mappings(id).find(|mapping| mapping.context.root == root);
            self.books.found(id, mapping.and_then(|mapping| mapping.pa))
        })
    }

    /// The breakpoint with that identity; a global one with any of its roots, and with the first place it is planted at.
    pub fn get(&self, view: View, va: Va, root: Pa, key: &K) -> Option<Found<'_, K, T>> {
        let id = self.books.find(view, va, root, key)?;
        self.books.found(id, self.books.mappings(id).find_map(|mapping| mapping.pa))
    }

    /// The breakpoint of `key` that `event` hit: one of the event's root before a global one.
    pub fn get_by_event<C: TapEvents + ?Sized>(&self, controller: &C, event: &VmiEvent, key: &K) -> Option<Found<'_, K, T>> {
        let (view, pa) = address(controller, event)?;
        let (va, root) = (event.registers.rip(), event.registers.root());
        self.books.hit_at(view, pa, va, root).filter(|found| found.key == key).min_by_key(|found| found.global)
    }

    /// Every breakpoint that `event` hit, whoever's, in the order they were planted.
    pub fn all_by_event<C: TapEvents + ?Sized>(&self, controller: &C, event: &VmiEvent) -> Vec<Found<'_, K, T>> {
        let Some((view, pa)) = address(controller, event) else { return Vec::new() };
        let (va, root) = (event.registers.rip(), event.registers.root());
        self.books.hit_at(view, pa, va, root).collect()
    }

    /// Whether `key` has a breakpoint that `event` hit.
    pub fn contains_by_event<C: TapEvents + ?Sized>(&self, controller: &C, event: &VmiEvent, key: &K) -> bool {
        self.get_by_event(controller, event, key).is_some()
    }

    /// Whether anyone has a breakpoint at `va` in `view` that is hit under `root`, planted or waiting.
    pub fn contains_by_address(&self, va: Va, root: Pa, view: View) -> bool {
        [Some(root), None].into_iter().any(|of| {
            let fits = |e: &Entry<_>| e.view == view && e.va == va && e.index_root() == of;
            self.books.ids.find(id_hash(view, va, of), |id| self.books.entry(*id).is_some_and(fits)).is_some()
        })
    }

    /// Calls `f` for every breakpoint that is hit at `va` under `root` with `pa` in `view`, in the order they were planted.
    /// Allocates nothing. Returns how many breakpoints are at `pa`, hit or not: 0 says that the event is nobody's.
    #[inline]
    pub fn for_each_at(&self, view: View, pa: Pa, va: Va, root: Pa, f: impl FnMut(&K, &T)) -> usize {
        self.books.for_each_at(view, pa, va, root, f)
    }

    /// How many breakpoints there are, planted or waiting. A global one counts once, however many roots it has.
    pub fn len(&self) -> usize {
        self.books.ids.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.books.ids.is_empty()
    }

    /// Every breakpoint, in no particular order; a global one once, with the first place it is planted at.
    pub fn iter(&self) -> impl Iterator<Item = Found<'_, K, T>> {
        let place = |id| self.books.mappings(id).find_map(|mapping| mapping.pa);
        (0..self.books.entries.len() as u32).filter_map(move |id| self.books.found(id, place(id)))
    }

    /// The breakpoints planted on a page of a view, and where.
    pub fn breakpoints_on_page(&self, view: View, gfn: Gfn) -> impl Iterator<Item = (Breakpoint<K, T>, Pa)> {
        self.books.pages.points(view, gfn, 0).filter_map(move |(offset, id)| {
            let Found { view, va, context, key, tag, global, .. } = self.books.found(id, None)?;
            let breakpoint = Breakpoint { view, va, context, key: key.clone(), tag: tag.clone(), global };
            Some((breakpoint, gfn.pa(offset.into())))
        })
    }

    /// How many breakpoints are planted on a page of a view; one of two owners counts twice.
    pub fn count_on_page(&self, view: View, gfn: Gfn) -> usize {
        self.books.pages.count(view, gfn)
    }

    /// Removes the breakpoints from the guest, then from the books.
    fn take_out<D, C>(&mut self, vmi: &mut VmiCore<D>, controller: &mut C, ids: &[u32]) -> Result<()>
    where
        D: VmiDriver + ?Sized,
        C: TapController<D> + ?Sized,
    {
        let mut steps: Vec<_> = ids.iter().flat_map(|id| self.books.places(*id)).collect();
        guarded(controller, |controller| self.unplant(vmi, controller, &mut steps))?;
        for id in ids {
            self.books.forget(*id);
        }
        Ok(())
    }

    fn plant_one<D, C>(&self, vmi: &mut VmiCore<D>, controller: &mut C, view: View, pa: Pa) -> Result<()>
    where
        D: VmiDriver + ?Sized,
        C: TapController<D> + ?Sized,
    {
        let is_first = self.count_on_page(view, pa.gfn()) == 1;
        if is_first {
            controller.monitor(vmi, pa.gfn(), view)?;
        }
        controller.insert_breakpoint(vmi, pa, view).map_err(|cause| {
            let mut left = Left::default();
            if is_first {
                left.note(controller.unmonitor(vmi, pa.gfn(), view), || format!("{} monitored in view {view}", pa.gfn()));
            }
            left.after(cause)
        })
    }

    fn unplant_one<D, C>(&self, vmi: &mut VmiCore<D>, controller: &mut C, view: View, pa: Pa) -> Result<()>
    where
        D: VmiDriver + ?Sized,
        C: TapController<D> + ?Sized,
    {
        controller.remove_breakpoint(vmi, pa, view)?;
        if self.count_on_page(view, pa.gfn()) > 1 {
            return Ok(());
        }
        controller.unmonitor(vmi, pa.gfn(), view).map_err(|cause| {
            let mut left = Left::default();
            left.note(controller.insert_breakpoint(vmi, pa, view), || format!("no breakpoint at {pa} in view {view}"));
            left.after(cause)
        })
    }

    /// Of sorted places, the pages on which the books have nothing else.
    fn whole_pages(&self, steps: &[(View, Pa)]) -> Vec<(View, Gfn)> {
        let pages = steps.chunk_by(|a, b| a.0 == b.0 && a.1.gfn() == b.1.gfn());
        let whole = pages.filter_map(|page| {
            let (view, pa) = page.first()?;
            (self.count_on_page(*view, pa.gfn()) == page.len()).then_some((*view, pa.gfn()))
        });
        whole.collect()
    }

    /// Plants what the books already have at `steps`: pages that had nothing are monitored first.
    fn plant<D, C>(&self, vmi: &mut VmiCore<D>, controller: &mut C, steps: &mut [(View, Pa)]) -> Result<()>
    where
        D: VmiDriver + ?Sized,
        C: TapController<D> + ?Sized,
    {
        if let [(view, pa)] = *steps {
            return self.plant_one(vmi, controller, view, pa);
        }
        steps.sort_unstable();
        let fresh = self.whole_pages(steps);
        controller.monitor_many(vmi, &fresh)?;
        controller.insert_many(vmi, steps).map_err(|cause| {
            let mut left = Left::default();
            left.note(controller.unmonitor_many(vmi, &fresh), || format!("{} pages monitored", fresh.len()));
            left.after(cause)
        })
    }

    /// Removes what the books still have at `steps`: pages that keep nothing are no longer monitored then.
    fn unplant<D, C>(&self, vmi: &mut VmiCore<D>, controller: &mut C, steps: &mut [(View, Pa)]) -> Result<()>
    where
        D: VmiDriver + ?Sized,
        C: TapController<D> + ?Sized,
    {
        if let [(view, pa)] = *steps {
            return self.unplant_one(vmi, controller, view, pa);
        }
        steps.sort_unstable();
        let last = self.whole_pages(steps);
        controller.remove_many(vmi, steps)?;
        controller.unmonitor_many(vmi, &last).map_err(|cause| {
            let mut left = Left::default();
            left.note(controller.insert_many(vmi, steps), || format!("{} breakpoints missing", steps.len()));
            left.after(cause)
        })
    }
}
