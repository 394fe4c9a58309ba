// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A sparse block as a source of discards.

use std::ops::Range;
use std::sync::Arc;

use super::RamBlock;
use crate::discard::Veto;
use crate::{DiscardListener, DiscardSubscription, Error};

impl RamBlock {
    pub(super) fn vetoed(&self, veto: Veto) -> Error {
        let Veto {
            listener,
            range: Range { start, end },
            source,
        } = veto;
        Error::PopulateVetoed {
            name: self.name().to_owned(),
            listener,
            start,
            end,
            source: Box::new(source),
        }
    }

    /// Has `listener` follow which blocks of `range` (bytes, whole blocks) are populated. It is
    /// told at once of those that are.
    ///
    /// # Errors
    /// `NotSparse`, `BadRange`, `Unplugged`; `PopulateVetoed` when it refuses a part of what is
    /// populated: it has then been told that the rest is discarded.
    pub fn subscribe(
        self: &Arc<Self>,
        range: Range<u64>,
        listener: Box<dyn DiscardListener>,
    ) -> Result<DiscardSubscription, Error> {
        let sparse = self.sparse()?;
        self.whole_blocks(sparse, &range)?;
        let gone = || Error::Unplugged(self.name().to_owned());
        if !self.is_live() {
            return Err(gone());
        }
        let id = sparse.listeners.subscribe(range, listener);
        let id = id.ok_or_else(gone)?.map_err(|veto| self.vetoed(veto))?;
        Ok(DiscardSubscription::new(self, id))
    }

    pub(crate) fn unsubscribe(&self, id: u64) -> Option<Box<dyn DiscardListener>> {
        self.sparse().ok()?.listeners.unsubscribe(id)
    }

    /// The runs of blocks of `range` (bytes, whole blocks) that are populated, for discard
    /// listeners: plugged, or sealed and not yet discarded.
    ///
    /// # Errors
    /// `NotSparse`, `BadRange`.
    pub fn populated(&self, range: Range<u64>) -> Result<Vec<Range<u64>>, Error> {
        let sparse = self.sparse()?;
        self.whole_blocks(sparse, &range)?;
        Ok(sparse.listeners.replay(&range, true))
    }

    /// The runs of blocks of `range` (bytes, whole blocks) that are discarded: all others.
    ///
    /// # Errors
    /// `NotSparse`, `BadRange`.
    pub fn discarded(&self, range: Range<u64>) -> Result<Vec<Range<u64>>, Error> {
        let sparse = self.sparse()?;
        self.whole_blocks(sparse, &range)?;
        Ok(sparse.listeners.replay(&range, false))
    }

    /// Whether anybody listens to its discards: plugs and discards then take as long as those
    /// take. Never waits.
    pub fn has_discard_listeners(&self) -> bool {
        let sparse = self.sparse().ok();
        sparse.is_some_and(|sparse| sparse.listeners.has_listeners())
    }

    /// Who listens to its discards.
    pub fn discard_listeners(&self) -> Vec<String> {
        let sparse = self.sparse().ok();
        sparse.map_or_else(Vec::new, |sparse| sparse.listeners.listeners())
    }
}
