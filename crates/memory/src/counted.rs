// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The atomics of [`crate::sync`] with a record of who stores where, for the unit tests: what a
//! request writes that other threads write or read is counted, not believed.

use std::cell::{Cell, RefCell};
use std::sync::atomic::Ordering;

/// Bytes that travel between processors together: a line, and the one that is fetched with it.
pub(crate) const LINE: usize = 128;

/// A store of this thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Store {
    pub(crate) address: usize,
    /// Whether it also reads, as one: an atomic addition, the taking of a lock.
    pub(crate) exchange: bool,
}

impl Store {
    pub(crate) fn line(self) -> usize {
        self.address / LINE
    }
}

thread_local! {
    static RECORDING: Cell<bool> = const { Cell::new(false) };
    static STORES: RefCell<Vec<Store>> = const { RefCell::new(Vec::new()) };
}

/// What the calling thread stores while `f` runs.
pub(crate) fn stores(f: impl FnOnce()) -> Vec<Store> {
    RECORDING.set(true);
    f();
    RECORDING.set(false);
    STORES.take()
}

pub(crate) fn note<T: ?Sized>(at: &T, exchange: bool) {
    // A thread that ends has no record any more.
    if RECORDING.try_with(Cell::get).unwrap_or(false) {
        let address = std::ptr::from_ref(at).addr();
        STORES.with_borrow_mut(|stores| stores.push(Store { address, exchange }));
    }
}

macro_rules! counted {
    ($name:ident $(<$t:ident>)?, $value:ty, $($exchange:ident)*) => {
        #[derive(Debug, Default)]
        #[repr(transparent)]
        pub(crate) struct $name $(<$t>)? (std::sync::atomic::$name $(<$t>)?);

        #[allow(dead_code)]
        impl $(<$t>)? $name $(<$t>)? {
            pub(crate) const fn new(value: $value) -> Self {
                Self(std::sync::atomic::$name::new(value))
            }

            pub(crate) fn load(&self, order: Ordering) -> $value {
                self.0.load(order)
            }

            pub(crate) fn as_ptr(&self) -> *mut $value {
                self.0.as_ptr()
            }

            pub(crate) fn store(&self, value: $value, order: Ordering) {
                note(self, false);
                self.0.store(value, order);
            }

            pub(crate) fn compare_exchange(
                &self,
                current: $value,
                new: $value,
                success: Ordering,
                failure: Ordering,
            ) -> Result<$value, $value> {
                note(self, true);
                self.0.compare_exchange(current, new, success, failure)
            }

            pub(crate) fn compare_exchange_weak(
                &self,
                current: $value,
                new: $value,
                success: Ordering,
                failure: Ordering,
            ) -> Result<$value, $value> {
                note(self, true);
                self.0.compare_exchange_weak(current, new, success, failure)
            }

            $(pub(crate) fn $exchange(&self, value: $value, order: Ordering) -> $value {
                note(self, true);
                self.0.$exchange(value, order)
            })*
        }
    };
}

counted!(AtomicBool, bool, swap fetch_and fetch_or fetch_xor);
counted!(AtomicU8, u8, swap fetch_add fetch_sub fetch_and fetch_or fetch_xor fetch_max);
counted!(AtomicU32, u32, swap fetch_add fetch_sub fetch_and fetch_or fetch_xor fetch_max);
counted!(AtomicU64, u64, swap fetch_add fetch_sub fetch_and fetch_or fetch_xor fetch_max);
counted!(AtomicPtr<T>, *mut T, swap);

mod tests {
    use std::collections::BTreeSet;
    use std::sync::{Arc, Barrier, Mutex};
    use std::thread;

    use super::{Store, stores};
    use crate::{
        Access, AddressSpace, Backing, CachedMap, DirtyClient, Gpa, Memory, MemoryConfig, Pin,
        PinList, RamBlock, RamSpec, Region,
    };

    const THREADS: usize = 64;
    const REQUESTS: usize = 50;
    const MIB: u64 = 1 << 20;

    struct Map {
        memory: Arc<Memory>,
        space: Arc<AddressSpace>,
        sparse: Arc<RamBlock>,
    }

    /// RAM at 0, a virtio-mem block at 16 MiB, both of 4 MiB; all of it dirty to a migration.
    fn map() -> Map {
        let config = MemoryConfig {
            arena_bytes: 1 << 30,
        };
        let memory = Memory::new(config).unwrap();
        let root = Region::container("root", 1 << 40);
        let space = memory.address_space("memory", &root).unwrap();
        let block = |name: &str, block_size_bytes| {
            let spec = RamSpec {
                name: name.into(),
                size_bytes: 4 * MIB,
                max_size_bytes: 4 * MIB,
                backing: Backing::Anon { thp: false },
                prefault: false,
                block_size_bytes,
            };
            memory.ram().add(spec).unwrap()
        };
        let (plain, sparse) = (block("plain", None), block("sparse", Some(MIB)));
        sparse.plug(0..4 * MIB, false).unwrap();
        let regions = [Region::ram("plain", &plain), Region::ram("sparse", &sparse)];
        memory
            .update(|t| {
                t.add(&root, &regions[0], 0, 0)?;
                t.add(&root, &regions[1], 16 * MIB, 0)
            })
            .unwrap();
        let log = memory.dirty_log();
        log.start(DirtyClient::Migration).unwrap();
        // The views of the set-up: the end of a section that a grace period waits for tells so.
        memory.synchronize();
        Map {
            memory,
            space,
            sparse,
        }
    }

    /// What a device does with guest memory for a request, in each of the ways there are.
    fn request(space: &Arc<AddressSpace>, reader: &crate::Reader, ring: &CachedMap) {
        let guard = space.read(reader);
        let index = ring.get(&guard).unwrap();
        let next: u16 = index.read(2).unwrap();
        index.write(2, next).unwrap();
        guard
            .write(Gpa(64), guard.read::<u64>(Gpa(8)).unwrap())
            .unwrap();
        let slice = guard.slice(Gpa(4096), 64, Access::Write).unwrap();
        slice.write(0, 1u32).unwrap();
        let data = guard.pin(Gpa(17 * MIB), 4096, Access::Write).unwrap();
        let mut list = PinList::new();
        guard
            .pin_list(
                &[(Gpa(0), 512), (Gpa(16 * MIB), 512)],
                Access::Read,
                &mut list,
            )
            .unwrap();
        drop(guard);
        data.write_at(0, &[1; 16]).unwrap();
        data.mark_dirty(0, 16).unwrap();
        drop((data.clone(), data, list));
    }

    fn lines(stores: &[Store]) -> BTreeSet<usize> {
        stores.iter().map(|store| store.line()).collect()
    }

    /// Runs `f` on many threads at once, so that none inherits the row of another; what each
    /// stores.
    fn on_threads(map: &Map, f: impl Fn(&crate::Reader) + Sync) -> Vec<Vec<Store>> {
        let gate = Barrier::new(THREADS);
        let run = || {
            let reader = map.memory.register();
            f(&reader);
            gate.wait();
            let stored = stores(|| (0..REQUESTS).for_each(|_| f(&reader)));
            gate.wait();
            stored
        };
        thread::scope(|scope| {
            let threads: Vec<_> = (0..THREADS).map(|_| scope.spawn(run)).collect();
            threads.into_iter().map(|t| t.join().unwrap()).collect()
        })
    }

    #[test]
    fn requests_on_64_threads_write_no_line_in_common() {
        let map = map();
        let written = on_threads(&map, |reader| {
            let ring = CachedMap::new(&map.space, Gpa(8192), 64, Access::ReadWrite);
            request(&map.space, reader, &ring);
        });
        let mut seen = BTreeSet::new();
        for stored in &written {
            // The section opened and shut; four pins taken, a clone and two of the list among
            // them, and let go.
            assert_eq!(stored.len(), 10 * REQUESTS);
            assert!(stored.iter().all(|store| !store.exchange), "{stored:x?}");
            for line in lines(stored) {
                assert!(seen.insert(line), "two threads write to line {line:#x}");
            }
        }
        // The row, and the counters of two neighbouring slots.
        assert!(
            seen.len() >= 2 * THREADS && seen.len() <= 3 * THREADS,
            "{}",
            seen.len()
        );
    }

    /// Each thread's pins end on the next one.
    #[test]
    fn a_pin_that_ends_elsewhere_is_one_addition_to_a_line_that_its_taker_does_not_write() {
        let map = map();
        let slots: Vec<Mutex<Vec<Pin>>> = (0..THREADS).map(|_| Mutex::default()).collect();
        let gate = Barrier::new(THREADS);
        let run = |me: usize| {
            let reader = map.memory.register();
            let pin = || {
                let guard = map.space.read(&reader);
                guard.pin(Gpa(17 * MIB), 4096, Access::Write).unwrap()
            };
            let mut pins = Vec::with_capacity(REQUESTS);
            let taking = stores(|| pins.extend((0..REQUESTS).map(|_| pin())));
            *slots[me].lock().unwrap() = pins;
            gate.wait();
            let theirs = std::mem::take(&mut *slots[(me + 1) % THREADS].lock().unwrap());
            let ending = stores(|| drop(theirs));
            gate.wait();
            (taking, ending)
        };
        let run = &run;
        let all: Vec<_> = thread::scope(|scope| {
            let threads: Vec<_> = (0..THREADS)
                .map(|me| scope.spawn(move || run(me)))
                .collect();
            threads.into_iter().map(|t| t.join().unwrap()).collect()
        });
        let mut seen = BTreeSet::new();
        for (taking, ending) in &all {
            assert_eq!((taking.len(), ending.len()), (3 * REQUESTS, REQUESTS));
            assert!(taking.iter().all(|store| !store.exchange));
            assert!(ending.iter().all(|store| store.exchange));
            assert_eq!(lines(ending).len(), 1);
            for line in lines(taking).into_iter().chain(lines(ending)) {
                assert!(seen.insert(line), "two threads write to line {line:#x}");
            }
        }
    }

    /// What changes the map or seals does write what all read: the record sees it.
    #[test]
    fn a_seal_and_a_publication_are_seen_to_write_what_is_shared() {
        let map = map();
        let sealing = stores(|| map.sparse.seal(0..MIB).unwrap().undo());
        assert!(sealing.iter().any(|store| store.exchange), "{sealing:x?}");
        let publishing = stores(|| {
            let root = Region::container("other", 1 << 20);
            map.memory.address_space("other", &root).unwrap();
        });
        assert!(publishing.iter().any(|store| store.exchange));
    }

    /// A view by vm-memory's traits takes a share in what its space keeps, which is counted by
    /// std: clones of a space do not share it.
    #[test]
    #[cfg(feature = "vm-memory")]
    fn views_for_dma_on_64_threads_write_no_line_in_common() {
        use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};

        let map = map();
        let written = on_threads(&map, |_| {
            let space = crate::DmaSpace::new(&map.space, None);
            let view = space.memory();
            Bytes::write_obj(&*view, 1u32, GuestAddress(17 * MIB)).unwrap();
        });
        let mut seen = BTreeSet::new();
        for stored in &written {
            // Taken, let go, and the section around.
            assert_eq!(stored.len(), 4 * REQUESTS);
            assert!(stored.iter().all(|store| !store.exchange));
            for line in lines(stored) {
                assert!(seen.insert(line), "two threads write to line {line:#x}");
            }
        }
    }
}
