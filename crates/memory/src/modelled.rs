// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The protocols as the loom models drive them: the real code, without mappings and threads.

use std::future::Future;
use std::ops::{Deref, Range};
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Wake, Waker};

use crate::grace::{Grace, Job, Worker};
use crate::iommu::{Domain, Flight};
use crate::map::Budget;
use crate::pin::Token;
use crate::ram::fence::{Fence, admit_one};
use crate::reader::barrier::Barrier;
use crate::reader::counters::Lane;
use crate::reader::here;
use crate::reader::hub::Hub;
use crate::reader::published::Published;
use crate::reader::row::{Row, make_token, set_token};
use crate::reader::wake::Level;
use crate::ticket::{Drain, Holds, Phase};
use crate::turns::{Turn, Turns};
use crate::{Access, BounceGrant, BounceWait, Error, Iommu, Memory, MemoryConfig, Translation};

pub use crate::dirty::modelled::Dirty;

/// What a memory has besides its blocks and its tree.
#[derive(Clone)]
pub struct Core {
    grace: Arc<Grace>,
}

impl Default for Core {
    fn default() -> Core {
        Core {
            grace: Grace::new(Barrier::choose()),
        }
    }
}

impl Core {
    pub(crate) fn hub(&self) -> &'static Hub {
        self.grace.hub()
    }

    /// As `Memory::register`.
    pub fn register(&self) -> Thread {
        let hub = self.grace.hub();
        let row = hub.adopt(make_token(), || "model".to_owned());
        Thread {
            home: Home { hub, row },
            _core: self.clone(),
        }
    }

    /// As the end of the memory, and the beginning of the next one on what it leaves.
    pub fn next_memory(&self) {
        self.grace.hub().begin_next_life();
    }

    /// A slot for the pins of a RAM block.
    pub fn slot(&self) -> u32 {
        self.grace.hub().allocate_slot().unwrap()
    }

    /// What a commit does once the new view is in place: the generation, then the old view.
    pub fn published(&self, retire: impl FnOnce() + Send + 'static) {
        self.grace.hub().bump_generation();
        self.grace.submit(Job::Retire(Box::new(retire)));
    }

    /// Wakes the thread that plays the worker, once what it waits for is there.
    pub fn tell(&self) {
        self.grace.hub().wake().signal();
    }

    /// What a commit does that finds many old views: false if they are the worker's.
    pub fn reclaim(&self) -> bool {
        self.grace.reclaim()
    }

    /// As `Memory::grace`.
    pub fn grace(&self) -> Waiting {
        let level = Level::new(0);
        self.grace.submit(Job::Grace(Arc::clone(&level)));
        Waiting { level, wanted: 1 }
    }

    /// As a commit that unplugs the block of `slot`, which nobody maps.
    pub fn unplug(&self, slot: u32) -> Waiting {
        self.unplug_mapped(slot, &self.mapped())
    }

    /// The external mappers of a block: none yet.
    pub fn mapped(&self) -> Mapped {
        Mapped(Holds::new(self.grace.hub()))
    }

    /// As a commit that unplugs the block of `slot`, which `mapped` may map.
    pub fn unplug_mapped(&self, slot: u32, mapped: &Mapped) -> Waiting {
        self.grace.hub().bump_generation();
        let drain = Drain::new(slot, Arc::clone(&mapped.0));
        drain.unpublish();
        self.grace.submit(Job::Drain(Arc::clone(&drain)));
        Waiting {
            level: drain.level(),
            wanted: Phase::Drained as u8,
        }
    }

    /// The plugged blocks of a sparse RAM block, all of them.
    pub fn sparse(&self, slot: u32, blocks: u64) -> Sparse {
        let fence = Fence::new(self.grace.hub(), slot, 0, blocks);
        fence.map().set(0..blocks);
        Sparse {
            fence,
            core: self.clone(),
        }
    }

    /// Plays the worker once.
    pub fn work_once(&self, worker: &mut WorkerThread) {
        worker.0.turn();
    }

    /// Plays the worker until `waiting` is over.
    pub fn work_until(&self, worker: &mut WorkerThread, waiting: &Waiting) {
        // Whoever ends it wakes this thread, which is the worker as well as the one that waits.
        let waker = Waker::from(Arc::new(Signal(self.clone())));
        let mut context = Context::from_waker(&waker);
        let mut reached = pin!(waiting.level.reached(waiting.wanted));
        loop {
            worker.0.turn();
            if reached.as_mut().poll(&mut context).is_ready() {
                return;
            }
            self.grace.hub().wake().wait(None);
        }
    }

    /// Plays the worker until `done`, which a retired job sets.
    pub fn work_while(&self, worker: &mut WorkerThread, mut busy: impl FnMut() -> bool) {
        loop {
            worker.0.turn();
            if !busy() {
                return;
            }
            self.grace.hub().wake().wait(None);
        }
    }

    /// The worker's state.
    pub fn worker(&self) -> WorkerThread {
        WorkerThread(Worker::new(Arc::clone(&self.grace)))
    }

    /// The number cached translations compare.
    pub fn generation(&self) -> u64 {
        self.grace.hub().generation()
    }
}

/// Signals the worker.
struct Signal(Core);

impl Wake for Signal {
    fn wake(self: Arc<Self>) {
        self.0.hub().wake().signal();
    }
}

/// The external mappers of a block.
pub struct Mapped(Arc<Holds>);

impl Mapped {
    /// As `FlatSection::hold`.
    pub fn hold(&self) -> Hold {
        let id = self.0.add("mapper");
        Hold(Arc::clone(&self.0), id)
    }
}

/// As `RegionHold`.
pub struct Hold(Arc<Holds>, u64);

impl Drop for Hold {
    fn drop(&mut self) {
        self.0.remove(self.1);
    }
}

/// Who may change the map.
pub struct MapLock(Turns);

impl Default for MapLock {
    fn default() -> MapLock {
        MapLock(Turns::new())
    }
}

impl MapLock {
    /// As `Memory::update` does first, and undoes when what it gives is dropped.
    pub fn take(&self) -> MapTurn<'_> {
        MapTurn(self.0.take())
    }

    /// As the end of an address space does.
    pub fn try_take(&self) -> Option<MapTurn<'_>> {
        self.0.try_take().map(MapTurn)
    }
}

/// The right to change it.
pub struct MapTurn<'a>(#[allow(dead_code)] Turn<'a>);

/// A memory whose worker is played.
pub fn memory(config: MemoryConfig) -> Result<(Arc<Memory>, WorkerThread), Error> {
    let mut played = None;
    let memory = Memory::with_worker(config, Barrier::choose(), |worker, _| {
        played = Some(WorkerThread(worker));
        Ok(None)
    })?;
    let worker = played.unwrap_or_else(|| unreachable!("handed out above"));
    Ok((memory, worker))
}

/// Has the calling thread be thread number `thread` from here on.
pub fn play(thread: u64) {
    set_token(thread + 1);
}

/// The worker's state.
pub struct WorkerThread(Worker);

impl WorkerThread {
    /// Whether the worker would run.
    pub fn is_woken(&self) -> bool {
        self.0.hub().wake().is_set()
    }

    /// What the worker does when it is woken.
    pub fn turn(&mut self) {
        if self.is_woken() {
            self.0.hub().wake().wait(None);
        }
        self.0.turn();
    }

    /// All that decides what the worker, and a reader, does next.
    pub fn state(&self) -> String {
        let woken = self.is_woken();
        format!("{woken} {} {}", self.0.state(), self.0.hub().state())
    }
}

/// Something that the worker brings about.
pub struct Waiting {
    level: Arc<Level>,
    wanted: u8,
}

impl Waiting {
    /// Whether it has.
    pub fn is_over(&self) -> bool {
        self.level.get() >= self.wanted
    }
}

/// The row of a thread.
pub struct Home {
    hub: &'static Hub,
    row: &'static Row,
}

impl Home {
    /// Opens a section.
    pub fn enter(&self) {
        self.row.enter(self.hub);
    }

    /// Closes it.
    pub fn leave(&self) {
        self.row.leave();
    }

    /// Pins, inside a section.
    pub fn pin(&self, slot: u32, bank: usize) -> PinToken {
        PinToken(Token::count(self.row, Lane::new(slot, bank)))
    }

    /// What the end of a pin asks before it marks what was written.
    pub(crate) fn may_be_logged(&self) -> bool {
        self.row.may_be_logged()
    }

    /// Whether it is that of the calling thread.
    pub fn is_own(&self) -> bool {
        self.row.is_home()
    }
}

/// A registered thread.
pub struct Thread {
    home: Home,
    _core: Core,
}

impl Deref for Thread {
    type Target = Home;

    fn deref(&self) -> &Home {
        &self.home
    }
}

impl Drop for Thread {
    fn drop(&mut self) {
        self.home.hub.disown(self.home.row);
    }
}

/// What a thread keeps of memories that it only knows by views.
pub struct Keepsakes(here::Keepsakes);

impl Default for Keepsakes {
    fn default() -> Keepsakes {
        Keepsakes(here::Keepsakes::new())
    }
}

impl Keepsakes {
    /// As `AddressSpace::home_row`.
    pub fn row(&self, core: &Core) -> Option<Home> {
        let home = self.0.row(core.grace.hub())?;
        Some(Home {
            hub: home.hub(),
            row: home.row(),
        })
    }

    /// As the end of the thread, at which other things of it may still come to look.
    pub fn end(&self) {
        self.0.end();
    }
}

/// A pin.
#[derive(Clone)]
pub struct PinToken(#[allow(dead_code)] Token);

/// A view pointer.
pub struct ViewPointer<T>(Published<T>);

impl<T> ViewPointer<T> {
    /// Starts with `value`.
    pub fn new(value: T) -> ViewPointer<T> {
        ViewPointer(Published::new(Box::new(value)))
    }

    /// Follows it.
    ///
    /// # Safety
    /// Inside a section that lasts as long as `'r`.
    pub unsafe fn get<'r>(&self) -> &'r T {
        // SAFETY: the caller's promise.
        unsafe { self.0.get() }
    }

    /// Replaces it.
    pub fn replace(&self, value: T) -> Box<T> {
        self.0.replace(Box::new(value))
    }
}

/// A sparse RAM block.
pub struct Sparse {
    fence: Arc<Fence>,
    core: Core,
}

impl Sparse {
    /// The bank for a pin of one block, if it is plugged.
    pub fn admit(&self, block: u64) -> Option<usize> {
        // SAFETY: the models ask for blocks they made.
        let step = unsafe {
            admit_one(
                self.core.grace.hub().bank(self.fence.slot()),
                self.fence.map().word_zero(),
                block,
            )
        };
        step.map(|step| (step / Lane::STEP) as usize)
    }

    /// As `RamBlock::seal`.
    pub fn seal(&self, blocks: Range<u64>) -> Waiting {
        let level = Level::new(0);
        if self.fence.seal(blocks, Arc::clone(&level)) {
            self.core.grace.submit(Job::Fence(Arc::clone(&self.fence)));
        }
        Waiting { level, wanted: 1 }
    }

    /// As the end of the block.
    pub fn give_up_slot(&self) {
        self.fence.give_up_slot();
    }
}

/// The bounce buffer of a device.
#[derive(Clone)]
pub struct Bounce(Arc<Budget>);

impl Bounce {
    /// With room for `bytes`.
    pub fn new(bytes: u64) -> Bounce {
        Bounce(Budget::new(bytes))
    }

    /// `bytes` of it at once, or in turn.
    pub fn take(&self, bytes: u64) -> Result<BounceGrant, BounceWait> {
        self.0.take(bytes)
    }

    /// Bytes in use.
    pub fn used(&self) -> u64 {
        self.0.used()
    }
}

/// An IOMMU region, whose table the model keeps.
pub struct Translations(Domain);

/// DMA under way.
pub struct UnderWay(#[allow(dead_code)] Flight);

struct NoTable;

impl Iommu for NoTable {
    fn translate(&self, _: u64, _: Access) -> Option<Translation> {
        None
    }
}

impl Default for Translations {
    fn default() -> Translations {
        Translations(Domain::new(Arc::new(NoTable)))
    }
}

impl Translations {
    /// As DMA to `range` does: `look` asks the table.
    pub fn dma<T>(&self, range: Range<u64>, look: impl FnOnce() -> T) -> (UnderWay, T) {
        let (flight, found) = self.0.fly(range, look);
        (UnderWay(flight), found)
    }

    /// As an invalidation does that has changed the table.
    pub fn unmap(&self, range: Range<u64>) -> impl Future<Output = ()> + Send + use<> {
        self.0.unmap(range)
    }
}
