// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The core object: readers, grace worker, RAM list, region tree, address spaces.

use std::future::Future;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::{self, JoinHandle};

use crate::grace::{Grace, Job, Worker};
use crate::index::View;
use crate::ram::arena::Arena;
use crate::reader::barrier::Barrier;
use crate::reader::row::make_token;
use crate::reader::wake::Level;
use crate::sweeper::Sweeper;
use crate::tree::{RegionKind, Tree};
use crate::turns::{Turn, Turns};
use crate::{
    AddressSpace, DirtyLog, DiscardRules, Error, RamBlock, RamList, Reader, Region, Transaction,
    fault,
};

/// How a [`Memory`] is made.
#[derive(Clone, Debug)]
pub struct MemoryConfig {
    /// Address space reserved for RAM blocks, in bytes. It costs nothing but address space and is
    /// never used twice: take several times what will ever be plugged at once.
    pub arena_bytes: u64,
}

impl Default for MemoryConfig {
    /// 8 TiB: a sixteenth of what a process has.
    fn default() -> MemoryConfig {
        MemoryConfig {
            arena_bytes: 8 << 40,
        }
    }
}

/// The memory of one virtual machine.
///
/// Dropping it ends the grace worker; should pins still be out then, their memory and the worker
/// stay until the last one is gone.
pub struct Memory {
    id: u64,
    grace: Arc<Grace>,
    ram: RamList,
    /// Whose turn it is to hold `tree`: no vCPU keeps another, or the control thread, from it.
    turns: Turns,
    /// Never waited for.
    tree: Mutex<Tree>,
    /// Token of the thread that holds `tree`, or 0.
    writer: AtomicU64,
    /// Address spaces that were dropped, with their last views; forgotten with the next change.
    dropped: Mutex<Vec<(u64, Box<View>)>>,
    /// Whether there are any. Changed under the lock of `dropped`.
    any_dropped: AtomicBool,
    sweeper: Arc<Sweeper>,
    worker: Option<JoinHandle<()>>,
}

impl Memory {
    /// Makes an empty memory and starts its grace worker and its sweeper. The first one in a process also begins
    /// to receive SIGSEGV and SIGBUS, so that memory the host does not provide is an error: what
    /// did not come from a copy here goes to whoever received the signals before. Receivers that
    /// come later must hand on what is not theirs.
    ///
    /// # Errors
    /// `Reserve` when the address space cannot be had, `Thread`, `FaultSignals`.
    pub fn new(config: MemoryConfig) -> Result<Arc<Memory>, Error> {
        Memory::with_barrier(config, Barrier::choose())
    }

    fn with_barrier(config: MemoryConfig, barrier: Barrier) -> Result<Arc<Memory>, Error> {
        let memory = Memory::with_worker(config, barrier, |worker, arena| {
            let run = move || {
                worker.run();
                // Until here pins may have pointed into it.
                drop(arena);
            };
            let name = "memory-grace";
            let thread = thread::Builder::new().name(name.to_owned()).spawn(run);
            let source = |source| Error::Thread { name, source };
            thread.map(Some).map_err(source)
        })?;
        let name = Sweeper::NAME;
        let source = |source| Error::Thread { name, source };
        memory.sweeper.start().map_err(source)?;
        Ok(memory)
    }

    /// With the worker handed to `start`, which has it run as long as there may be pins, with the
    /// arena kept.
    pub(crate) fn with_worker(
        config: MemoryConfig,
        barrier: Barrier,
        start: impl FnOnce(Worker, Arc<Arena>) -> Result<Option<JoinHandle<()>>, Error>,
    ) -> Result<Arc<Memory>, Error> {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        fault::install().map_err(Error::FaultSignals)?;
        let arena = Arc::new(Arena::new(config.arena_bytes)?);
        let grace = Grace::new(barrier);
        let worker = start(Worker::new(Arc::clone(&grace)), Arc::clone(&arena))?;
        let sweeper = Arc::default();
        Ok(Arc::new(Memory {
            id: NEXT.fetch_add(1, Ordering::Relaxed),
            ram: RamList::new(&grace, &sweeper, arena),
            grace,
            turns: Turns::new(),
            tree: Mutex::default(),
            writer: AtomicU64::new(0),
            dropped: Mutex::default(),
            any_dropped: AtomicBool::new(false),
            sweeper,
            worker,
        }))
    }

    /// This thread's reader. Every call on one thread gives the same row; keep one reader for as
    /// long as the thread uses the memory.
    pub fn register(self: &Arc<Self>) -> Reader {
        Reader::new(Arc::clone(self), self.grace.hub())
    }

    /// The RAM blocks.
    pub fn ram(&self) -> &RamList {
        &self.ram
    }

    /// Who requires and who disables discarding of RAM.
    pub fn discards(&self) -> &DiscardRules {
        self.ram.discards()
    }

    /// Who follows what changes in RAM.
    pub fn dirty_log(&self) -> DirtyLog<'_> {
        DirtyLog::new(self)
    }

    /// Makes an address space that shows `root` and what is put below it.
    ///
    /// # Errors
    /// `Foreign` when `root` belongs to another memory, `Reentrant` from a listener; `Unplugged` when
    /// it would show RAM on its way out.
    pub fn address_space(
        self: &Arc<Self>,
        name: &str,
        root: &Arc<Region>,
    ) -> Result<Arc<AddressSpace>, Error> {
        self.bind(root)?;
        let mut tree = self.lock_tree()?;
        let id = tree.tree.add_space(name, root)?;
        let Some(state) = tree.tree.space(id) else {
            return Err(Error::Foreign(name.to_owned()));
        };
        let space = AddressSpace::new(Arc::clone(self), id, name, state.view());
        state.set_space(&space);
        Ok(space)
    }

    /// Changes the tree: `f` makes the changes, which are then rendered, told to the listeners
    /// and published as one. Readers see the old views or the new ones. Never waits for readers.
    ///
    /// Calls are served one by one in the order they come; `f` and the listeners run under the
    /// writer's lock and must make no blocking call.
    ///
    /// # Errors
    /// What `f` returns; `Listener` when a listener refuses; `StillMapped` when RAM that was
    /// unplugged is still shown; `Reentrant` from within a change. Nothing has changed then.
    pub fn update<T>(
        &self,
        f: impl FnOnce(&mut Transaction<'_>) -> Result<T, Error>,
    ) -> Result<T, Error> {
        let mut guard = self.lock_tree()?;
        let mut transaction = Change {
            inner: Transaction::new(self, &mut guard.tree),
            done: false,
        };
        let value = f(&mut transaction.inner)?;
        transaction.inner.commit()?;
        transaction.done = true;
        Ok(value)
    }

    /// Ready once every read section that is open now has ended.
    pub fn grace(&self) -> impl Future<Output = ()> + Send + 'static {
        let level = Level::new(0);
        self.grace.submit(Job::Grace(Arc::clone(&level)));
        level.reached(1)
    }

    /// Waits on this thread until every read section that is open now has ended.
    ///
    /// # Panics
    /// Inside a read section of this thread: it would wait for itself.
    pub fn synchronize(self: &Arc<Self>) {
        assert!(
            !self.register().in_section(),
            "a read section waits for itself"
        );
        let level = Level::new(0);
        self.grace.submit(Job::Grace(Arc::clone(&level)));
        level.wait(1);
    }

    /// The tree, or the flat views, as text.
    pub fn mtree(&self, flat: bool) -> String {
        match self.lock_tree() {
            Ok(guard) => guard.tree.text(flat),
            Err(error) => format!("{error}\n"),
        }
    }

    // --- for the crate ----------------------------------------------------------------------

    pub(crate) fn grace_worker(&self) -> &Arc<Grace> {
        &self.grace
    }

    pub(crate) fn sweeper(&self) -> &Arc<Sweeper> {
        &self.sweeper
    }

    /// Makes `region` part of this memory, and what it is an alias of, or refuses when it is part of another.
    pub(crate) fn bind(&self, region: &Region) -> Result<(), Error> {
        if let Some(block) = region.ram_block() {
            self.check_block(block)?;
        }
        if let RegionKind::Alias { target, .. } = region.kind() {
            self.bind(target)?;
        }
        region.bind(self.id)
    }

    /// Refuses a region that is part of another memory.
    pub(crate) fn check_region(&self, region: &Region) -> Result<(), Error> {
        match region.is_foreign(self.id) {
            true => Err(Error::Foreign(format!("region {}", region.name()))),
            false => Ok(()),
        }
    }

    pub(crate) fn check_block(&self, block: &RamBlock) -> Result<(), Error> {
        if Arc::ptr_eq(block.grace(), &self.grace) {
            return Ok(());
        }
        Err(Error::Foreign(format!("RAM block {}", block.name())))
    }

    /// The writer's lock, with the address spaces that were dropped meanwhile forgotten.
    pub(crate) fn lock_tree(&self) -> Result<TreeGuard<'_>, Error> {
        let token = make_token();
        if self.writer.load(Ordering::Relaxed) == token {
            return Err(Error::Reentrant);
        }
        let mut guard = self.enter_tree(self.turns.take(), token);
        self.forget_dropped(&mut guard.tree);
        Ok(guard)
    }

    /// The writer's lock for the thread of `token`, whose turn it is.
    fn enter_tree<'a>(&'a self, turn: Turn<'a>, token: u64) -> TreeGuard<'a> {
        let tree = self
            .tree
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner());
        self.writer.store(token, Ordering::Relaxed);
        TreeGuard {
            tree,
            writer: &self.writer,
            _turn: turn,
        }
    }

    /// Takes note that an address space is gone.
    pub(crate) fn space_dropped(&self, id: u64, view: Box<View>) {
        let mut dropped = self.lock_dropped();
        dropped.push((id, view));
        self.any_dropped.store(true, Ordering::Release);
        drop(dropped);
        // Whoever holds the lock, perhaps this thread, is followed by somebody who does it.
        if let Some(turn) = self.turns.try_take() {
            let mut guard = self.enter_tree(turn, make_token());
            self.forget_dropped(&mut guard.tree);
        }
    }

    fn lock_dropped(&self) -> MutexGuard<'_, Vec<(u64, Box<View>)>> {
        let dropped = self.dropped.lock();
        dropped.unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn forget_dropped(&self, tree: &mut Tree) {
        if !self.any_dropped.load(Ordering::Acquire) {
            return;
        }
        let mut dropped = self.lock_dropped();
        self.any_dropped.store(false, Ordering::Relaxed);
        let gone = std::mem::take(&mut *dropped);
        drop(dropped);
        for (id, view) in gone {
            let Some(space) = tree.remove_space(id) else {
                continue;
            };
            let sweeper = Arc::clone(&self.sweeper);
            let (flats, index) = space.into_old();
            self.grace.submit(Job::Retire(Box::new(move || {
                drop((view, index));
                flats
                    .into_iter()
                    .for_each(|flat| sweeper.drop_section(flat));
            })));
        }
    }
}

/// A transaction that is taken back unless it was committed, also when `f` panics.
struct Change<'a> {
    inner: Transaction<'a>,
    done: bool,
}

impl Drop for Change<'_> {
    fn drop(&mut self) {
        if !self.done {
            self.inner.roll_back();
        }
    }
}

/// The held writer's lock.
pub(crate) struct TreeGuard<'a> {
    pub(crate) tree: MutexGuard<'a, Tree>,
    writer: &'a AtomicU64,
    /// Last: whose turn is next finds the lock free.
    _turn: Turn<'a>,
}

impl Drop for TreeGuard<'_> {
    fn drop(&mut self) {
        self.writer.store(0, Ordering::Relaxed);
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // Every address space holds the memory: they are all dropped, some perhaps not forgotten.
        if let Ok(mut guard) = self.lock_tree() {
            self.forget_dropped(&mut guard.tree);
        }
        let hub = self.grace.hub();
        let pinned: Vec<u32> = (0..hub.slots())
            .filter(|slot| hub.outstanding(*slot, &[0, 1]) != 0)
            .collect();
        self.grace.close();
        let Some(worker) = self.worker.take() else {
            return;
        };
        if !pinned.is_empty() {
            let holders: Vec<_> = pinned.iter().flat_map(|slot| hub.holders(*slot)).collect();
            tracing::warn!(
                ?holders,
                "memory dropped with pins out: it stays until they are gone"
            );
            return;
        }
        // A future or a device may have owned the last handle on the memory.
        if worker.thread().id() != thread::current().id() && worker.join().is_err() {
            tracing::error!("the grace worker panicked");
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use crate::{Access, Backing, Gpa, RamSpec};

    /// Four threads change the map all the time, as vCPUs do that move BARs: whoever comes then
    /// waits for those before it, each of them once.
    #[test]
    fn writers_take_turns() {
        const WRITERS: u64 = 4;
        let memory = Memory::new(MemoryConfig {
            arena_bytes: 1 << 30,
        })
        .unwrap();
        let (changes, stop) = (AtomicU64::new(0), AtomicU64::new(0));
        thread::scope(|scope| {
            for _ in 0..WRITERS {
                scope.spawn(|| {
                    while stop.load(Ordering::Relaxed) == 0 {
                        let change = || changes.fetch_add(1, Ordering::Relaxed);
                        memory.update(|_| Ok(change())).unwrap();
                    }
                });
            }
            let wait_for = |queued| {
                while memory.turns.queued() != queued {
                    thread::yield_now();
                }
            };
            for _ in 0..50 {
                let guard = memory.lock_tree().unwrap();
                wait_for(1 + WRITERS);
                let before = changes.load(Ordering::Relaxed);
                let (memory, changes) = (&memory, &changes);
                let since = move || changes.load(Ordering::Relaxed) - before;
                let control = scope.spawn(move || memory.update(|_| Ok(since())).unwrap());
                wait_for(2 + WRITERS);
                drop(guard);
                assert_eq!(control.join().unwrap(), WRITERS);
            }
            stop.store(1, Ordering::Relaxed);
        });
    }

    /// A process without `membarrier`: readers use real fences.
    #[test]
    fn sections_pins_and_seals_without_membarrier() {
        let config = MemoryConfig {
            arena_bytes: 1 << 30,
        };
        let memory = Memory::with_barrier(config, Barrier::Fence).unwrap();
        let root = Region::container("root", 1 << 30);
        let space = memory.address_space("memory", &root).unwrap();
        let spec = RamSpec {
            name: "ram".into(),
            size_bytes: 4 << 20,
            max_size_bytes: 4 << 20,
            backing: Backing::Anon { thp: false },
            prefault: false,
            block_size_bytes: Some(1 << 20),
        };
        let block = memory.ram().add(spec).unwrap();
        block.plug(0..4 << 20, false).unwrap();
        memory
            .update(|t| t.add(&root, &Region::ram("ram", &block), 0, 0))
            .unwrap();
        let reader = memory.register();
        {
            let outer = space.read(&reader);
            let inner = space.read(&reader);
            drop(outer);
            assert!(reader.in_section() && inner.lookup(Gpa(0)).is_some());
        }
        assert!(!reader.in_section());
        let pin = space.read(&reader).pin(Gpa(0), 8, Access::Write).unwrap();
        let seal = block.seal(0..1 << 20).unwrap();
        memory.synchronize();
        assert!(!seal.is_drained());
        thread::spawn(move || drop(pin)).join().unwrap();
        while !seal.is_drained() {
            memory.synchronize();
        }
        seal.discard()
            .unwrap_or_else(|(_, error)| panic!("{error}"));
    }
}
