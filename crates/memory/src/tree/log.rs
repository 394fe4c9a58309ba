// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Tells the external trackers of writes what to follow.

use std::sync::Arc;

use super::Tree;
use crate::flat::Flat;
use crate::{Error, Listener, RamBlock};

impl Tree {
    /// Has all listeners follow the sections that show the blocks of `slots` (ascending). When
    /// one refuses, those told are told to stop.
    pub(crate) fn log_start(&mut self, slots: &[u32]) -> Result<(), Error> {
        let mut told = 0;
        let result = self.each_of(&in_slots(slots), |space, listener, flat| {
            listener
                .log_start(&flat.section)
                .map_err(|source| Error::Listener {
                    space: space.to_owned(),
                    source,
                })?;
            told += 1;
            Ok(())
        });
        if result.is_err() {
            let _ = self.each_of(&in_slots(slots), |_, listener, flat| {
                if told > 0 {
                    told -= 1;
                    listener.log_stop(&flat.section);
                }
                Ok(())
            });
        }
        result
    }

    /// Has all listeners stop.
    pub(crate) fn log_stop(&mut self, slots: &[u32]) {
        let _ = self.each_of(&in_slots(slots), |_, listener, flat| {
            listener.log_stop(&flat.section);
            Ok(())
        });
    }

    /// Has all listeners merge what they know of the logged blocks that are `wanted`.
    pub(crate) fn log_sync(&mut self, wanted: &dyn Fn(&Arc<RamBlock>) -> bool) {
        let wanted = |block: &Arc<RamBlock>| wanted(block) && block.is_logged();
        for space in &mut self.spaces {
            for (_, _, listener) in &mut space.listeners {
                listener.log_sync_begin();
            }
        }
        let _ = self.each_of(&wanted, |_, listener, flat| {
            listener.log_sync(&flat.section);
            Ok(())
        });
    }

    /// Calls `f` with every listener, the name of its space, and each section of a block that is
    /// `wanted`, until an error.
    fn each_of(
        &mut self,
        wanted: &dyn Fn(&Arc<RamBlock>) -> bool,
        mut f: impl FnMut(&str, &mut dyn Listener, &Flat) -> Result<(), Error>,
    ) -> Result<(), Error> {
        for space in &mut self.spaces {
            for flat in space
                .flats
                .iter()
                .filter(|flat| flat.block().is_some_and(wanted))
            {
                for (_, _, listener) in &mut space.listeners {
                    f(&space.name, &mut **listener, flat)?;
                }
            }
        }
        Ok(())
    }
}

fn in_slots(slots: &[u32]) -> impl Fn(&Arc<RamBlock>) -> bool {
    |block| slots.binary_search(&block.slot()).is_ok()
}
