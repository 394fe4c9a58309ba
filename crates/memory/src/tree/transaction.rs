// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Changes of the tree, with their undoing.

use std::ops::Range;
use std::sync::Arc;

use super::commit::Tree;
use super::region::{Child, Ioeventfd, Region, RegionKind};
use crate::{Error, Memory, RamBlock, Ticket};

/// A change of the tree under way. See [`Memory::update`].
pub struct Transaction<'a> {
    memory: &'a Memory,
    tree: &'a mut Tree,
    undo: Vec<Undo>,
    /// Address spaces (by number) and the addresses in them that may have changed.
    pub(super) dirty: Vec<(u64, Range<u64>)>,
    /// Blocks on their way out.
    pub(super) unplugged: Vec<(Arc<RamBlock>, Arc<crate::ticket::Drain>)>,
}

enum Undo {
    Add {
        parent: Arc<Region>,
        child: Arc<Region>,
    },
    Remove {
        parent: Arc<Region>,
        child: Child,
        at: usize,
    },
    Move {
        parent: Arc<Region>,
        child: Arc<Region>,
        offset: u64,
    },
    Resize {
        region: Arc<Region>,
        size: u64,
    },
    Enable {
        region: Arc<Region>,
        disabled: bool,
    },
    AddIoeventfd {
        region: Arc<Region>,
        ioeventfd: Ioeventfd,
    },
    RemoveIoeventfd {
        region: Arc<Region>,
        ioeventfd: Ioeventfd,
        at: usize,
    },
    Unplug {
        block: Arc<RamBlock>,
    },
}

impl<'a> Transaction<'a> {
    pub(crate) fn new(memory: &'a Memory, tree: &'a mut Tree) -> Transaction<'a> {
        Transaction {
            memory,
            tree,
            undo: Vec::new(),
            dirty: Vec::new(),
            unplugged: Vec::new(),
        }
    }

    /// Places `child` at `offset` (bytes) of `parent`. Where children overlap, the one of higher
    /// priority hides the other; of the same priority the later added one. Parts that stick out
    /// of the parent are not seen.
    ///
    /// # Errors
    /// `HasParent`, `Cycle`, `Foreign`; `BadPlacement` in an alias or past 2^64; `Unplugged` for
    /// RAM on its way out.
    pub fn add(
        &mut self,
        parent: &Arc<Region>,
        child: &Arc<Region>,
        offset: u64,
        priority: i32,
    ) -> Result<(), Error> {
        self.memory.bind(parent)?;
        self.memory.bind(child)?;
        let bad = |reason| {
            let (child, parent) = (child.name().to_owned(), parent.name().to_owned());
            Err(Error::BadPlacement {
                child,
                parent,
                offset,
                reason,
            })
        };
        if matches!(parent.kind(), RegionKind::Alias { .. }) {
            return bad("an alias has no children of its own");
        }
        if offset.checked_add(child.size()).is_none() {
            return bad("it ends past 2^64");
        }
        if child.parent().is_some() {
            return Err(Error::HasParent(child.name().to_owned()));
        }
        if child.reaches(parent) {
            return Err(Error::Cycle(child.name().to_owned()));
        }
        if let Some(block) = child.ram_block()
            && !block.is_live()
        {
            return Err(Error::Unplugged(block.name().to_owned()));
        }
        let enabled = !child.state().disabled;
        let place = Child {
            region: Arc::clone(child),
            offset,
            size: child.size(),
            priority,
            enabled,
        };
        let at = parent
            .state()
            .children
            .partition_point(|other| other.priority > priority);
        attach(parent, place, at);
        self.undo.push(Undo::Add {
            parent: Arc::clone(parent),
            child: Arc::clone(child),
        });
        self.mark(child, 0..child.size());
        Ok(())
    }

    /// Takes `child` out of its parent. Its RAM block stays, and can be shown again.
    ///
    /// # Errors
    /// `NoParent`.
    pub fn remove(&mut self, child: &Arc<Region>) -> Result<(), Error> {
        let parent = parent_of(child)?;
        self.mark(child, 0..child.size());
        if let Some((place, at)) = detach(&parent, child) {
            self.undo.push(Undo::Remove {
                parent,
                child: place,
                at,
            });
        }
        Ok(())
    }

    /// Takes a RAM or ROM region out of its parent for good: once the change is published, its
    /// block can be destroyed as soon as nobody uses it, of which the ticket tells. The change
    /// fails as a whole when another region or an alias still shows the block.
    ///
    /// # Errors
    /// `NoParent`; `WrongKind` unless RAM or ROM; `Unplugged` when on its way out already.
    pub fn unplug(&mut self, child: &Arc<Region>) -> Result<Ticket, Error> {
        let Some(block) = child.ram_block() else {
            return Err(Error::WrongKind {
                region: child.name().to_owned(),
                wanted: "RAM",
            });
        };
        let block = Arc::clone(block);
        self.remove(child)?;
        self.retire(&block)
    }

    /// As [`Transaction::unplug`], for a block that no region shows (any more).
    ///
    /// # Errors
    /// `Unplugged` when on its way out already; `Foreign`.
    pub fn retire(&mut self, block: &Arc<RamBlock>) -> Result<Ticket, Error> {
        self.memory.check_block(block)?;
        if !block.is_live() {
            return Err(Error::Unplugged(block.name().to_owned()));
        }
        block.set_unplugged(true);
        self.undo.push(Undo::Unplug {
            block: Arc::clone(block),
        });
        let ticket = Ticket::new(block, self.memory.ram().shared());
        self.unplugged
            .push((Arc::clone(block), Arc::clone(ticket.drain())));
        Ok(ticket)
    }

    /// Shows or hides `region` and what it holds, wherever it is shown.
    ///
    /// # Errors
    /// `Foreign`.
    pub fn set_enabled(&mut self, region: &Arc<Region>, enabled: bool) -> Result<(), Error> {
        self.memory.bind(region)?;
        let was_disabled = region.state().disabled;
        if was_disabled == enabled {
            set_disabled(region, !enabled);
            self.undo.push(Undo::Enable {
                region: Arc::clone(region),
                disabled: was_disabled,
            });
            self.mark(region, 0..region.size());
        }
        Ok(())
    }

    /// Moves `child` to `offset` (bytes) of its parent.
    ///
    /// # Errors
    /// `NoParent`; `BadPlacement` past 2^64.
    pub fn set_offset(&mut self, child: &Arc<Region>, offset: u64) -> Result<(), Error> {
        let parent = parent_of(child)?;
        if offset.checked_add(child.size()).is_none() {
            let (child, parent) = (child.name().to_owned(), parent.name().to_owned());
            return Err(Error::BadPlacement {
                child,
                parent,
                offset,
                reason: "it ends past 2^64",
            });
        }
        self.mark(child, 0..child.size());
        let old = with_place(&parent, child, |place| {
            std::mem::replace(&mut place.offset, offset)
        });
        if let Some(old) = old {
            self.undo.push(Undo::Move {
                parent,
                child: Arc::clone(child),
                offset: old,
            });
        }
        self.mark(child, 0..child.size());
        Ok(())
    }

    /// Makes a RAM or ROM region as large as its block is now, after [`crate::RamList::grow`].
    ///
    /// # Errors
    /// `WrongKind` unless RAM or ROM; `BadPlacement` when it would end past 2^64.
    pub fn set_size(&mut self, region: &Arc<Region>) -> Result<(), Error> {
        let Some(block) = region.ram_block() else {
            return Err(Error::WrongKind {
                region: region.name().to_owned(),
                wanted: "RAM",
            });
        };
        self.memory.bind(region)?;
        let (old, new) = (region.size(), block.size_bytes());
        if let Some(parent) = region.parent() {
            let offset = with_place(&parent, region, |place| place.offset).unwrap_or(0);
            if offset.checked_add(new).is_none() {
                let (child, parent) = (region.name().to_owned(), parent.name().to_owned());
                return Err(Error::BadPlacement {
                    child,
                    parent,
                    offset,
                    reason: "it ends past 2^64",
                });
            }
        }
        resize(region, new);
        self.undo.push(Undo::Resize {
            region: Arc::clone(region),
            size: old,
        });
        self.mark(region, 0..old.max(new));
        Ok(())
    }

    /// Adds an ioeventfd to a region of device registers.
    ///
    /// # Errors
    /// `WrongKind`; `DuplicateIoeventfd` when the region has one that matches the same writes;
    /// `BadPlacement` outside the region.
    pub fn add_ioeventfd(
        &mut self,
        region: &Arc<Region>,
        ioeventfd: Ioeventfd,
    ) -> Result<(), Error> {
        self.memory.bind(region)?;
        if !matches!(region.kind(), RegionKind::Mmio(_)) {
            return Err(Error::WrongKind {
                region: region.name().to_owned(),
                wanted: "device registers",
            });
        }
        let offset = ioeventfd.offset;
        let end = offset.checked_add(u64::from(ioeventfd.size.max(1)));
        if end.is_none_or(|end| end > region.size()) || !matches!(ioeventfd.size, 0 | 1 | 2 | 4 | 8)
        {
            let (child, parent) = ("ioeventfd".to_owned(), region.name().to_owned());
            return Err(Error::BadPlacement {
                child,
                parent,
                offset,
                reason: "not a write to the region",
            });
        }
        let mut state = region.state();
        if state
            .ioeventfds
            .iter()
            .any(|other| other.same_place(&ioeventfd))
        {
            return Err(Error::DuplicateIoeventfd {
                region: region.name().to_owned(),
                offset,
            });
        }
        state.ioeventfds.push(ioeventfd.clone());
        drop(state);
        self.undo.push(Undo::AddIoeventfd {
            region: Arc::clone(region),
            ioeventfd,
        });
        self.mark(region, offset..offset + 1);
        Ok(())
    }

    /// Removes an ioeventfd: the one with the same offset, size, value and eventfd.
    ///
    /// # Errors
    /// `NoIoeventfd`.
    pub fn remove_ioeventfd(
        &mut self,
        region: &Arc<Region>,
        ioeventfd: &Ioeventfd,
    ) -> Result<(), Error> {
        let offset = ioeventfd.offset;
        let mut state = region.state();
        let same = |other: &Ioeventfd| {
            other.same_place(ioeventfd) && Arc::ptr_eq(&other.fd, &ioeventfd.fd)
        };
        let Some(at) = state.ioeventfds.iter().position(same) else {
            return Err(Error::NoIoeventfd {
                region: region.name().to_owned(),
                offset,
            });
        };
        let ioeventfd = state.ioeventfds.remove(at);
        drop(state);
        self.undo.push(Undo::RemoveIoeventfd {
            region: Arc::clone(region),
            ioeventfd,
            at,
        });
        self.mark(region, offset..offset + 1);
        Ok(())
    }

    /// Tells listeners and publishes; on an error the caller takes the change back.
    pub(crate) fn commit(&mut self) -> Result<(), Error> {
        self.tree
            .commit(self.memory, &mut self.dirty, &self.unplugged)
    }

    /// Takes everything back, in reverse.
    pub(crate) fn roll_back(&mut self) {
        while let Some(step) = self.undo.pop() {
            step.apply();
        }
    }

    /// Marks a range of `region` (bytes) as changed wherever it is shown.
    fn mark(&mut self, region: &Arc<Region>, range: Range<u64>) {
        mark(region, range, &mut self.dirty);
    }
}

impl Undo {
    fn apply(self) {
        match self {
            Undo::Add { parent, child } => {
                detach(&parent, &child);
            }
            Undo::Remove { parent, child, at } => attach(&parent, child, at),
            Undo::Move {
                parent,
                child,
                offset,
            } => {
                with_place(&parent, &child, |place| place.offset = offset);
            }
            Undo::Resize { region, size } => resize(&region, size),
            Undo::Enable { region, disabled } => set_disabled(&region, disabled),
            Undo::AddIoeventfd { region, ioeventfd } => {
                region
                    .state()
                    .ioeventfds
                    .retain(|other| !other.same_place(&ioeventfd));
            }
            Undo::RemoveIoeventfd {
                region,
                ioeventfd,
                at,
            } => region.state().ioeventfds.insert(at, ioeventfd),
            Undo::Unplug { block } => block.set_unplugged(false),
        }
    }
}

fn parent_of(child: &Arc<Region>) -> Result<Arc<Region>, Error> {
    child
        .parent()
        .ok_or_else(|| Error::NoParent(child.name().to_owned()))
}

fn attach(parent: &Arc<Region>, place: Child, at: usize) {
    let child = Arc::clone(&place.region);
    parent.state().children.insert(at, place);
    child.state().parent = Some(Arc::downgrade(parent));
}

fn detach(parent: &Arc<Region>, child: &Arc<Region>) -> Option<(Child, usize)> {
    let mut state = parent.state();
    let at = state
        .children
        .iter()
        .position(|place| Arc::ptr_eq(&place.region, child))?;
    let place = state.children.remove(at);
    drop(state);
    child.state().parent = None;
    Some((place, at))
}

fn with_place<T>(
    parent: &Arc<Region>,
    child: &Arc<Region>,
    f: impl FnOnce(&mut Child) -> T,
) -> Option<T> {
    let mut state = parent.state();
    state
        .children
        .iter_mut()
        .find(|place| Arc::ptr_eq(&place.region, child))
        .map(f)
}

fn set_disabled(region: &Arc<Region>, disabled: bool) {
    region.state().disabled = disabled;
    if let Some(parent) = region.parent() {
        with_place(&parent, region, |place| place.enabled = !disabled);
    }
}

fn resize(region: &Arc<Region>, size: u64) {
    region.set_size(size);
    if let Some(parent) = region.parent() {
        with_place(&parent, region, |place| place.size = size);
    }
}

/// Follows a range upwards, through parents and aliases, to the address spaces that show it.
/// What hides it on the way is ignored: too much dirt costs time, too little would be wrong.
fn mark(region: &Arc<Region>, range: Range<u64>, out: &mut Vec<(u64, Range<u64>)>) {
    if range.is_empty() {
        return;
    }
    let (spaces, parent, aliases) = {
        let state = region.state();
        (
            state.spaces.clone(),
            state.parent.as_ref().and_then(|p| p.upgrade()),
            state.aliases.clone(),
        )
    };
    out.extend(spaces.into_iter().map(|space| (space, range.clone())));
    if let Some(parent) = parent {
        let offset = with_place(&parent, region, |place| place.offset).unwrap_or(0);
        let end = range.end.saturating_add(offset).min(parent.size());
        mark(
            &parent,
            range.start.saturating_add(offset).min(end)..end,
            out,
        );
    }
    for alias in aliases.iter().filter_map(|alias| alias.upgrade()) {
        if let RegionKind::Alias { offset, .. } = alias.kind() {
            let end = range.end.saturating_sub(*offset).min(alias.size());
            mark(
                &alias,
                range.start.saturating_sub(*offset).min(end)..end,
                out,
            );
        }
    }
}
