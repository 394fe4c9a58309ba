// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Changes of the tree, with their undoing.

use std::ops::Range;
use std::sync::Arc;

use ebbtide_models::seeded;
use smallvec::SmallVec;

use super::commit::Tree;
use super::edit::{
    Dirty, attach, check_change, check_end, detach, displace, mark, parent_of, place, resize,
    set_disabled, with_place,
};
use super::region::{Child, Ioeventfd, Region, RegionKind};
use crate::{Error, Memory, RamBlock, Ticket};

/// A change of the tree under way. See [`Memory::update`].
pub struct Transaction<'a> {
    pub(super) memory: &'a Memory,
    tree: &'a mut Tree,
    pub(super) undo: SmallVec<[Undo; 1]>,
    /// Address spaces (by number) and the addresses in them that may have changed.
    pub(super) dirty: Dirty,
    /// Blocks on their way out.
    pub(super) unplugged: Vec<(Arc<RamBlock>, Arc<crate::ticket::Drain>)>,
}

/// What takes one step back.
pub(super) enum Undo {
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
    AddCoalesced {
        region: Arc<Region>,
        range: Range<u64>,
    },
    RemoveCoalesced {
        region: Arc<Region>,
        range: Range<u64>,
        at: usize,
    },
    Reprioritize {
        parent: Arc<Region>,
        child: Child,
        at: usize,
    },
    Direct {
        region: Arc<Region>,
        direct: bool,
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
            undo: SmallVec::new(),
            dirty: SmallVec::new(),
            unplugged: Vec::new(),
        }
    }

    /// Places `child` at `offset` (bytes) of `parent`. Where children overlap, the one of higher
    /// priority hides the other; of the same priority the later added one. Parts that stick out
    /// of the parent are not seen. RAM of the machine, itself or by an alias, does not overlap
    /// other such RAM at its priority: who hides whom is then to be said.
    ///
    /// # Errors
    /// `HasParent`, `Cycle`, `Foreign`, `Overlap`; `BadPlacement` in an alias, past 2^64, or for
    /// RAM not at a multiple of 4096 bytes; `BadSize` and `BadRules` for what the region was made
    /// with; `Unplugged` for RAM on its way out.
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
        let state = child.state();
        let enabled = !state.disabled;
        let leaf = state.children.is_empty() && !matches!(child.kind(), RegionKind::Alias { .. });
        let placed = state.parent.as_ref();
        let placed = placed.is_some_and(|parent| parent.strong_count() > 0);
        drop(state);
        if placed {
            return Err(Error::HasParent(child.name().to_owned()));
        }
        if Arc::ptr_eq(child, parent) || !leaf && child.reaches(parent) {
            return Err(Error::Cycle(child.name().to_owned()));
        }
        child.ram_block().map_or(Ok(()), check_live)?;
        let new = Child {
            region: Arc::clone(child),
            offset,
            size: child.size(),
            priority,
            enabled,
            machine_ram: child.is_machine_ram(),
        };
        check_end(parent, &new)?;
        place(parent, child, new, &mut self.dirty)?;
        self.undo.push(Undo::Add {
            parent: Arc::clone(parent),
            child: Arc::clone(child),
        });
        Ok(())
    }

    /// Takes `child` out of its parent. Its RAM block stays, and can be shown again.
    ///
    /// # Errors
    /// `NoParent`, `Foreign`.
    pub fn remove(&mut self, child: &Arc<Region>) -> Result<(), Error> {
        self.memory.check_region(child)?;
        let parent = parent_of(child)?;
        if let Some((place, at)) = displace(&parent, child, &mut self.dirty) {
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
    /// `NoParent`, `Foreign`; `WrongKind` unless RAM or ROM; `Unplugged` when on its way out already.
    pub fn unplug(&mut self, child: &Arc<Region>) -> Result<Ticket, Error> {
        let Some(block) = child.ram_block() else {
            return Err(Error::WrongKind {
                region: child.name().to_owned(),
                wanted: "RAM",
            });
        };
        let block = Arc::clone(block);
        // Before the region is looked for where it no longer is.
        check_live(&block)?;
        self.remove(child)?;
        self.retire(&block)
    }

    /// As [`Transaction::unplug`], for a block that no region shows (any more).
    ///
    /// # Errors
    /// `Unplugged` when on its way out already; `Foreign`.
    pub fn retire(&mut self, block: &Arc<RamBlock>) -> Result<Ticket, Error> {
        self.memory.check_block(block)?;
        check_live(block)?;
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
    /// `Foreign`; `Overlap` for RAM of the machine.
    pub fn set_enabled(&mut self, region: &Arc<Region>, enabled: bool) -> Result<(), Error> {
        self.memory.bind(region)?;
        let was_disabled = region.state().disabled;
        if was_disabled == enabled {
            check_change(region, |place| place.enabled = enabled)?;
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
    /// `NoParent`, `Foreign`, `Overlap`; `BadPlacement` past 2^64 or for RAM not at a multiple of 4096 bytes.
    pub fn set_offset(&mut self, child: &Arc<Region>, offset: u64) -> Result<(), Error> {
        self.memory.check_region(child)?;
        let parent = parent_of(child)?;
        check_change(child, |place| place.offset = offset)?;
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
    /// `WrongKind` unless RAM or ROM; `BadPlacement` when it would end past 2^64; `Overlap`.
    pub fn set_size(&mut self, region: &Arc<Region>) -> Result<(), Error> {
        let Some(block) = region.ram_block() else {
            return Err(Error::WrongKind {
                region: region.name().to_owned(),
                wanted: "RAM",
            });
        };
        self.memory.bind(region)?;
        let size = block.size_bytes();
        self.resize_to(region, size)
    }

    /// Makes a region `size` bytes large, at most its maximum (see [`Region::growing_to`]).
    ///
    /// # Errors
    /// `PastMaximum`, `Foreign`; `BadSize` for 0; `WrongKind` for RAM and ROM, which are as large
    /// as their block; `BadPlacement` when it, or what an alias shows, would end past 2^64.
    pub fn resize(&mut self, region: &Arc<Region>, size: u64) -> Result<(), Error> {
        self.memory.bind(region)?;
        let name = || region.name().to_owned();
        if region.ram_block().is_some() {
            return Err(Error::WrongKind {
                region: name(),
                wanted: "of a size of its own",
            });
        }
        let bad = |reason: &str| Error::BadSize {
            region: name(),
            reason: format!("{size:#x} bytes: {reason}"),
        };
        if size == 0 {
            return Err(bad("a region has at least one byte"));
        }
        let max = region.max_size();
        if size > max {
            return Err(Error::PastMaximum {
                region: name(),
                size,
                max,
            });
        }
        if let RegionKind::Alias { offset, .. } = region.kind()
            && offset.checked_add(size).is_none()
        {
            return Err(bad("the alias shows what lies past 2^64"));
        }
        self.resize_to(region, size)
    }

    fn resize_to(&mut self, region: &Arc<Region>, new: u64) -> Result<(), Error> {
        let old = region.size();
        check_change(region, |place| place.size = new)?;
        resize(region, new);
        self.undo.push(Undo::Resize {
            region: Arc::clone(region),
            size: old,
        });
        self.mark(region, 0..old.max(new));
        Ok(())
    }

    /// Gives `child` another priority in its parent. Of its new equals it is the latest.
    ///
    /// # Errors
    /// `NoParent`, `Foreign`, `Overlap`.
    pub fn set_priority(&mut self, child: &Arc<Region>, priority: i32) -> Result<(), Error> {
        self.memory.check_region(child)?;
        let parent = parent_of(child)?;
        check_change(child, |place| place.priority = priority)?;
        let Some((place, at)) = detach(&parent, child) else {
            return Ok(());
        };
        let mut moved = place.clone();
        moved.priority = priority;
        let to = parent
            .state()
            .children
            .partition_point(|other| other.priority > priority);
        attach(&parent, moved, to);
        self.undo.push(Undo::Reprioritize {
            parent,
            child: place,
            at,
        });
        self.mark(child, 0..child.size());
        Ok(())
    }

    /// Lets loads of a ROM device come from its block, or go to its registers as stores do.
    ///
    /// # Errors
    /// `WrongKind`, `Foreign`.
    pub fn set_rom_direct(&mut self, region: &Arc<Region>, direct: bool) -> Result<(), Error> {
        self.memory.bind(region)?;
        if !matches!(region.kind(), RegionKind::RomDevice { .. }) {
            return Err(Error::WrongKind {
                region: region.name().to_owned(),
                wanted: "a ROM device",
            });
        }
        let was = region.is_direct();
        if was != direct {
            region.set_direct(direct);
            self.undo.push(Undo::Direct {
                region: Arc::clone(region),
                direct: was,
            });
            self.mark(region, 0..region.size());
        }
        Ok(())
    }

    /// A change within the change: when `f` fails, what it did is taken back, and the change
    /// around it can go on. Nothing is published before the outermost change is complete.
    ///
    /// # Errors
    /// What `f` returns.
    pub fn nested<T>(
        &mut self,
        f: impl FnOnce(&mut Transaction<'a>) -> Result<T, Error>,
    ) -> Result<T, Error> {
        let (steps, unplugged) = (self.undo.len(), self.unplugged.len());
        let result = f(self);
        if result.is_err() {
            // What was marked stays so: to render too much is not wrong.
            self.undo.drain(steps..).rev().for_each(Undo::apply);
            self.unplugged.truncate(unplugged);
        }
        result
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
    pub(super) fn mark(&mut self, region: &Arc<Region>, range: Range<u64>) {
        mark(region, range, &mut self.dirty);
    }
}

fn check_live(block: &Arc<RamBlock>) -> Result<(), Error> {
    if block.is_live() || seeded!("unplug_twice") {
        return Ok(());
    }
    Err(Error::Unplugged(block.name().to_owned()))
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
            Undo::AddCoalesced { region, range } => {
                region.state().coalesced.retain(|other| *other != range);
            }
            Undo::RemoveCoalesced { region, range, at } => {
                region.state().coalesced.insert(at, range);
            }
            Undo::Reprioritize { parent, child, at } => {
                detach(&parent, &child.region);
                attach(&parent, child, at);
            }
            Undo::Direct { region, direct } => region.set_direct(direct),
            Undo::Unplug { block } => block.set_unplugged(false),
        }
    }
}
