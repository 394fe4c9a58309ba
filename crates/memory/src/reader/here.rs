// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The row of the calling thread, for those who have no [`Reader`] at hand: views that go from
//! thread to thread.
//!
//! A thread keeps a handle on each row it was given here, so that the next call finds the row
//! without a lock. It keeps neither the memory nor the hub from serving another one: a hub counts
//! its lives, and what was kept in an earlier life is forgotten unseen.
//!
//! ```text
//!   kept ──the thread ends──────► disowned, unless the hub has begun another life
//!     └────the memory goes──────► the hub takes the row back (`Hub::give_back`)
//! ```

use std::cell::Cell;
use std::marker::PhantomData;
use std::ptr;

use ebbtide_models::seeded;

use super::Reader;
use super::hub::Hub;
use super::row::Row;

/// A row of the calling thread, good for as long as its memory is borrowed.
#[derive(Clone, Copy)]
pub(crate) struct HomeRow<'m> {
    row: &'static Row,
    hub: &'static Hub,
    _thread: PhantomData<(*const (), &'m ())>,
}

impl<'m> HomeRow<'m> {
    /// The row of a reader.
    pub(crate) fn of(reader: &'m Reader) -> HomeRow<'m> {
        HomeRow {
            row: reader.row,
            hub: reader.hub,
            _thread: PhantomData,
        }
    }

    #[inline(always)]
    pub(crate) fn row(self) -> &'static Row {
        self.row
    }

    #[inline(always)]
    pub(crate) fn hub(self) -> &'static Hub {
        self.hub
    }
}

/// The calling thread's row among those of `hub`, of which the caller borrows the memory. `None`
/// when the thread is about to end, and keeps nothing any more.
#[cfg(not(loom))]
#[inline(always)]
pub(crate) fn row<'m>(hub: &'static Hub) -> Option<HomeRow<'m>> {
    let row = match kept::last(hub) {
        Some(row) => row,
        None => kept::find(hub)?,
    };
    Some(HomeRow {
        row,
        hub,
        _thread: PhantomData,
    })
}

/// Models hand theirs in: what loom keeps for a thread goes after the thread was joined, and so after
/// hub and rows were freed.
#[cfg(loom)]
pub(crate) fn row<'m>(_hub: &'static Hub) -> Option<HomeRow<'m>> {
    None
}

/// A row that a thread has a handle on.
#[derive(Clone, Copy)]
struct Kept {
    hub: &'static Hub,
    /// The hub's life in which the handle was taken.
    life: u64,
    row: &'static Row,
}

impl Kept {
    #[inline(always)]
    fn serves(&self, hub: &'static Hub) -> bool {
        ptr::eq(self.hub, hub) && (self.life == hub.life() || seeded!("kept_in_any_life"))
    }
}

/// What a thread found last.
type Last = Cell<Option<Kept>>;

/// All that a thread has a handle on.
#[derive(Default)]
struct All(Vec<Kept>);

impl All {
    fn find(&mut self, hub: &'static Hub) -> Kept {
        let all = &mut self.0;
        // Those of memories that are gone.
        all.retain(|kept| kept.life == kept.hub.life());

        if let Some(kept) = all.iter().find(|kept| kept.serves(hub)) {
            return *kept;
        }
        let (row, life) = hub.adopt_kept();
        let kept = Kept { hub, life, row };
        all.push(kept);
        kept
    }

    /// Gives the handles back: the thread ends.
    fn give_up(&mut self, last: &Last) {
        if !seeded!("kept_after_the_end") {
            last.set(None);
        }
        for kept in self.0.drain(..) {
            kept.hub.disown_kept(kept.life, kept.row);
        }
    }
}

#[cfg(not(loom))]
mod kept {
    use std::cell::RefCell;

    use super::{All, Last};
    use crate::reader::hub::Hub;
    use crate::reader::row::Row;

    thread_local! {
        /// Needs no destructor, so that finding it is one load.
        static LAST: Last = const { Last::new(None) };
        static ALL: RefCell<Own> = const { RefCell::new(Own(All(Vec::new()))) };
    }

    /// Gives the handles back when the thread ends.
    struct Own(All);

    impl Drop for Own {
        fn drop(&mut self) {
            LAST.with(|last| self.0.give_up(last));
        }
    }

    #[inline(always)]
    pub(super) fn last(hub: &'static Hub) -> Option<&'static Row> {
        let kept = LAST.get()?;
        kept.serves(hub).then_some(kept.row)
    }

    #[cold]
    #[inline(never)]
    pub(super) fn find(hub: &'static Hub) -> Option<&'static Row> {
        let found = ALL.try_with(|all| all.borrow_mut().0.find(hub));
        let kept = found.ok()?;
        LAST.set(Some(kept));
        Some(kept.row)
    }
}

/// What a thread of a model keeps.
#[cfg(loom)]
pub(crate) struct Keepsakes {
    last: Last,
    /// `None` when the thread is about to end.
    all: Cell<Option<All>>,
}

#[cfg(loom)]
impl Keepsakes {
    pub(crate) fn new() -> Keepsakes {
        Keepsakes {
            last: Last::default(),
            all: Cell::new(Some(All::default())),
        }
    }

    /// As [`row`].
    pub(crate) fn row<'m>(&self, hub: &'static Hub) -> Option<HomeRow<'m>> {
        let kept = match self.last.get().filter(|kept| kept.serves(hub)) {
            Some(kept) => kept,
            None => self.find(hub)?,
        };
        Some(HomeRow {
            row: kept.row,
            hub,
            _thread: PhantomData,
        })
    }

    fn find(&self, hub: &'static Hub) -> Option<Kept> {
        let mut all = self.all.take()?;
        let kept = all.find(hub);
        self.all.set(Some(all));
        self.last.set(Some(kept));
        Some(kept)
    }

    /// As the end of the thread.
    pub(crate) fn end(&self) {
        if let Some(mut all) = self.all.take() {
            all.give_up(&self.last);
        }
    }
}
