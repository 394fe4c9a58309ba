// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Drops what might block, away from the grace worker.
//!
//! A view can be the last to know a device's registers, or a vCPU that has just been in them; dropping those runs the
//! device's destructor, which may close files; an old set of RAM blocks the last to know a file. The thread
//! starts with the memory: who has old views back may be a thread that must not start others.

use std::io;
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::{self, JoinHandle};

use crate::flat::Flat;
use crate::tree::{Region, RegionKind};
use crate::{FlatSection, RamBlocks};

#[derive(Default)]
pub(crate) struct Sweeper {
    thread: Mutex<Option<Running>>,
}

struct Running {
    things: Sender<Box<dyn Send>>,
    handle: JoinHandle<()>,
}

impl Sweeper {
    /// The name of the thread.
    pub(crate) const NAME: &str = "memory-sweeper";

    /// Starts the thread.
    pub(crate) fn start(&self) -> io::Result<()> {
        let (things, received) = channel::<Box<dyn Send>>();
        let spawned = thread::Builder::new().name(Self::NAME.to_owned());
        let handle = spawned.spawn(move || received.into_iter().for_each(drop))?;
        *self.lock() = Some(Running { things, handle });
        Ok(())
    }

    /// Drops a section of an old view.
    pub(crate) fn drop_section(&self, flat: Arc<Flat>) {
        let Some(flat) = Arc::into_inner(flat) else {
            return;
        };
        let FlatSection { region, kind, .. } = flat.section;
        drop(kind);
        self.let_go(region);
    }

    /// Lets go of a region, which somebody may do at the same time whose thread must not drop a device either: a vCPU that
    /// was in its registers.
    pub(crate) fn let_go(&self, region: Arc<Region>) {
        // Of all who let go exactly one is the last.
        let Some(region) = Arc::into_inner(region) else {
            return;
        };
        let foreign = matches!(
            region.kind(),
            RegionKind::Mmio(_) | RegionKind::RomDevice { .. } | RegionKind::Iommu(_)
        );
        if foreign {
            self.drop_elsewhere(Box::new(region));
        }
    }

    /// Drops an old set of RAM blocks.
    pub(crate) fn drop_blocks(&self, blocks: Arc<RamBlocks>) {
        let Some(blocks) = Arc::into_inner(blocks) else {
            return;
        };
        for block in blocks.iter() {
            // The last one closes the file.
            if block.is_file() && Arc::strong_count(block) == 1 {
                self.drop_elsewhere(Box::new(Arc::clone(block)));
            }
        }
    }

    /// Without the thread, as in models, things are dropped where they are.
    fn drop_elsewhere(&self, thing: Box<dyn Send>) {
        let thread = self.lock();
        if let Some(running) = &*thread {
            // The thread ends only with the sender.
            let _ = running.things.send(thing);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Option<Running>> {
        self.thread
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

impl Drop for Sweeper {
    fn drop(&mut self) {
        let thread = self
            .thread
            .get_mut()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
            .take();
        if let Some(Running { things, handle }) = thread {
            drop(things);
            // A device may own the last handle on the memory that owns this sweeper.
            if handle.thread().id() != thread::current().id() && handle.join().is_err() {
                tracing::error!("the sweeper thread panicked");
            }
        }
    }
}
