// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Clients come and go.

use std::sync::Arc;

use super::DirtyClient;
use crate::{Error, Memory, RamBlock};

/// The dirty log of a [`Memory`]: who follows what changes. What has changed is asked of the
/// blocks, see [`RamBlock::snapshot_and_clear`].
///
/// All calls take the map's writer lock, as listeners are told.
#[derive(Clone, Copy)]
pub struct DirtyLog<'m> {
    memory: &'m Memory,
}

impl<'m> DirtyLog<'m> {
    pub(crate) fn new(memory: &'m Memory) -> DirtyLog<'m> {
        DirtyLog { memory }
    }

    /// Starts a client for all RAM blocks, those that are yet to come included. To the client all
    /// RAM is dirty at first: what is used or plugged now, and what is added, grown or plugged
    /// later. A client that is on already has all of it dirty again.
    ///
    /// # Errors
    /// `DirtyBitmap` when the host has no room for a bitmap, `Listener` when an external tracker
    /// refuses: the client is then off. `Reentrant` from within a change of the map.
    pub fn start(&self, client: DirtyClient) -> Result<(), Error> {
        self.start_for(client, None)
    }

    /// Stops a client that was started for all blocks. Blocks that it was started for one by one
    /// it keeps.
    ///
    /// # Errors
    /// `Reentrant` from within a change of the map.
    pub fn stop(&self, client: DirtyClient) -> Result<(), Error> {
        self.stop_for(client, None)
    }

    /// As [`DirtyLog::start`], for one block.
    ///
    /// # Errors
    /// As [`DirtyLog::start`]; `Foreign` when the block belongs to another memory, `Unplugged`.
    pub fn start_block(&self, client: DirtyClient, block: &Arc<RamBlock>) -> Result<(), Error> {
        self.memory.check_block(block)?;
        if !block.is_live() {
            return Err(Error::Unplugged(block.name().to_owned()));
        }
        self.start_for(client, Some(block))
    }

    /// Stops a client that was started for one block.
    ///
    /// # Errors
    /// `Reentrant` from within a change of the map; `Foreign`.
    pub fn stop_block(&self, client: DirtyClient, block: &Arc<RamBlock>) -> Result<(), Error> {
        self.memory.check_block(block)?;
        self.stop_for(client, Some(block))
    }

    /// Has the external trackers merge what they know into the blocks. What a guest has written
    /// before this call is dirty when it returns.
    ///
    /// # Errors
    /// `Reentrant` from within a change of the map.
    pub fn sync(&self) -> Result<(), Error> {
        let mut guard = self.memory.lock_tree()?;
        guard.tree.log_sync(&|_| true);
        Ok(())
    }

    /// As [`DirtyLog::sync`], for one block.
    ///
    /// # Errors
    /// `Reentrant` from within a change of the map; `Foreign`.
    pub fn sync_block(&self, block: &Arc<RamBlock>) -> Result<(), Error> {
        self.memory.check_block(block)?;
        let mut guard = self.memory.lock_tree()?;
        guard.tree.log_sync(&|other| Arc::ptr_eq(other, block));
        Ok(())
    }

    fn start_for(&self, client: DirtyClient, only: Option<&RamBlock>) -> Result<(), Error> {
        let mut guard = self.memory.lock_tree()?;
        let only = only.map(RamBlock::log_key);
        let hub = self.memory.grace_worker().hub();
        let fresh = hub.start_client(client, only)?;
        guard.tree.log_start(&fresh).inspect_err(|_| {
            // Those that were told have been told to stop.
            hub.stop_client(client, only);
        })
    }

    fn stop_for(&self, client: DirtyClient, only: Option<&RamBlock>) -> Result<(), Error> {
        let mut guard = self.memory.lock_tree()?;
        let only = only.map(RamBlock::log_key);
        let hub = self.memory.grace_worker().hub();
        let idle = hub.stop_client(client, only);
        guard.tree.log_stop(&idle);
        Ok(())
    }
}
