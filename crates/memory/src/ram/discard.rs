// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Pages that go back to the host while their block stays as it is: those in a guest's balloon, and
//! those it reports as free.

use std::ops::Range;

use super::{Plugged, RamBlock};
use crate::Error;

/// What became of a range that was to be discarded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Discard {
    /// Its pages are the host's. The next access finds zeroes, or what a private file holds.
    Done,
    /// Somebody disables discards that nobody is told of: nothing has changed.
    Disabled,
    /// It is not all plugged, or cannot be written: nothing has changed.
    NotThere,
}

impl RamBlock {
    /// Gives the pages of `range` (bytes, whole pages of the backing) back to the host without
    /// telling anybody: an uncoordinated discard. The range stays accessible. May block for as long
    /// as the host takes to free the pages; whoever disables discards waits meanwhile, and when
    /// that is disabled no such discard is under way.
    ///
    /// Pins are not waited for: their memory stays mapped where it is, but loses its contents, and
    /// what a device writes at that time is lost or not. It is for memory that the guest itself
    /// says it does not use.
    ///
    /// # Errors
    /// `BadRange` for what is not whole pages of the block; `Host` when the host refuses.
    pub fn discard_pages(&self, range: Range<u64>) -> Result<Discard, Error> {
        let page = self.page_size_bytes();
        let whole = range.start.is_multiple_of(page) && range.end.is_multiple_of(page);
        if !whole || range.start >= range.end || range.end > self.size_bytes() {
            return Err(Error::BadRange {
                name: self.name().to_owned(),
                start: range.start,
                end: range.end,
                block_size: page,
            });
        }
        let freed = self.discards().uncoordinated(|| {
            // What is not plugged has no pages; what is read-only is not the guest's to empty.
            if self.is_readonly() || self.plugged(range.clone()) != Plugged::All {
                return Ok(Discard::NotThere);
            }
            self.mapping().free_pages(range.clone())?;
            Ok(Discard::Done)
        });
        freed.unwrap_or(Ok(Discard::Disabled))
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use crate::{Backing, Gpa, Memory, MemoryConfig, RamSpec, Region};

    use super::*;

    fn spec(name: &str, backing: Backing, block_size_bytes: Option<u64>) -> RamSpec {
        RamSpec {
            name: name.into(),
            size_bytes: 4 << 20,
            max_size_bytes: 4 << 20,
            backing,
            prefault: false,
            block_size_bytes,
        }
    }

    #[test]
    fn discarded_pages_are_zero_and_their_neighbours_are_not() {
        for backing in [Backing::Anon { thp: false }, Backing::Memfd { thp: false }] {
            let memory = Memory::new(MemoryConfig::default()).unwrap();
            let block = memory.ram().add(spec("ram", backing, None)).unwrap();
            let root = Region::container("system", 1 << 40);
            let space = memory.address_space("memory", &root).unwrap();
            let region = Region::ram("ram", &block);
            memory.update(|t| t.add(&root, &region, 0, 0)).unwrap();
            let reader = memory.register();
            let page = block.page_size_bytes();
            let guard = space.read(&reader);
            for at in 0..4 {
                guard.write_bytes(Gpa(at * page), &[7; 4096]).unwrap();
            }
            let pin = guard.pin(Gpa(page), 8, crate::Access::ReadWrite).unwrap();
            let token = memory.discards().disable("gpu0").unwrap();
            assert_eq!(
                block.discard_pages(page..2 * page).unwrap(),
                Discard::Disabled
            );
            drop(token);
            let token = memory.discards().disable_uncoordinated("gpu0").unwrap();
            assert_eq!(
                block.discard_pages(page..2 * page).unwrap(),
                Discard::Disabled
            );
            drop(token);
            assert_eq!(guard.read::<u8>(Gpa(page)).unwrap(), 7);
            assert_eq!(block.discard_pages(page..3 * page).unwrap(), Discard::Done);
            let bytes = [0, 1, 2, 3].map(|at| guard.read::<u8>(Gpa(at * page)).unwrap());
            assert_eq!(bytes, [7, 0, 0, 7]);
            // A pin's memory is where it was.
            pin.write_at(0, &[9; 8]).unwrap();
            assert_eq!(guard.read::<u8>(Gpa(page)).unwrap(), 9);
            for wrong in [0..0, 1..page, page..page + 1, 0..5 << 20] {
                assert!(block.discard_pages(wrong).is_err());
            }
        }
    }

    #[test]
    fn what_is_not_plugged_is_left_alone() {
        let memory = Memory::new(MemoryConfig::default()).unwrap();
        let sparse = spec("dimm", Backing::Anon { thp: false }, Some(2 << 20));
        let block = memory.ram().add(sparse).unwrap();
        block.plug(0..2 << 20, false).unwrap();
        assert_eq!(block.discard_pages(0..8192).unwrap(), Discard::Done);
        let border = (2 << 20) - 4096..(2 << 20) + 4096;
        assert_eq!(block.discard_pages(border).unwrap(), Discard::NotThere);
        let seal = block.seal(0..2 << 20).unwrap();
        assert_eq!(block.discard_pages(0..8192).unwrap(), Discard::NotThere);
        seal.undo();
    }
}
