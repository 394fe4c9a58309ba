// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The virtio-queue crate on the vm-memory traits, while RAM comes and goes.
#![cfg(not(loom))]

mod setup;

use std::io::{Read, Write};
use std::ops::Deref;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use ebbtide_memory::{DmaSpace, Gpa, LocalSpace, Phase, Region};
use setup::Map;
use virtio_queue::{DescriptorChain, Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemory, Permissions};

const MIB: u64 = 1 << 20;
const SIZE: u16 = 64;
const DESCRIPTORS: u64 = 0x1000;
const AVAIL: u64 = 0x2000;
const USED: u64 = 0x3000;
/// Requests' headers, in RAM that stays.
const HEADERS: u64 = 0x1_0000;
/// RAM that comes and goes.
const DIMM: u64 = 4 << 30;
const DIMM_BYTES: u64 = 2 * MIB;

/// A MiB of RAM at 0.
fn machine() -> Map {
    let map = Map::new();
    plug(&map, "low", 0, MIB);
    map
}

fn plug(map: &Map, name: &str, at: u64, size_bytes: u64) -> Arc<Region> {
    let region = map.ram(name, size_bytes);
    map.add(&region, at);
    region
}

/// The driver of the queue: each request is a header of 8 bytes to read and a buffer to write.
struct Driver {
    machine: Arc<Map>,
    next: u16,
}

impl Driver {
    fn write<T: zerocopy::IntoBytes + zerocopy::Immutable>(&self, at: u64, value: T) {
        let reader = self.machine.memory.register();
        let guard = self.machine.space.read(&reader);
        guard.write(Gpa(at), value).unwrap();
    }

    fn descriptor(&self, at: u16, addr: u64, len: u32, flags: u16, next: u16) {
        let to = DESCRIPTORS + 16 * u64::from(at);
        self.write(to, addr);
        self.write(to + 8, len);
        self.write(to + 12, flags);
        self.write(to + 14, next);
    }

    fn submit(&mut self, tag: u64, buffer: u64, len: u32) {
        const NEXT: u16 = 1;
        const WRITE: u16 = 2;
        let head = 2 * (self.next % (SIZE / 2));
        let header = HEADERS + 8 * u64::from(head);
        self.write(header, tag);
        self.descriptor(head, header, 8, NEXT, head + 1);
        self.descriptor(head + 1, buffer, len, WRITE, 0);
        self.write(AVAIL + 4 + 2 * u64::from(self.next % SIZE), head);
        self.next = self.next.wrapping_add(1);
        let reader = self.machine.memory.register();
        let index = self.machine.space.read(&reader);
        let section = index.lookup(Gpa(AVAIL + 2)).unwrap();
        let host = section.host().unwrap().cast::<u16>();
        // SAFETY: RAM that stays, aligned.
        unsafe { std::sync::atomic::AtomicU16::from_ptr(host.as_ptr()) }
            .store(self.next, Ordering::Release);
    }

    /// How many requests were answered, and the length of the last answer.
    fn used(&self) -> (u16, u32) {
        let reader = self.machine.memory.register();
        let guard = self.machine.space.read(&reader);
        let section = guard.lookup(Gpa(USED + 2)).unwrap();
        let host = section.host().unwrap().cast::<u16>();
        // SAFETY: RAM that stays, aligned.
        let index = unsafe { std::sync::atomic::AtomicU16::from_ptr(host.as_ptr()) }
            .load(Ordering::Acquire);
        let last = u64::from(index.wrapping_sub(1) % SIZE);
        (index, guard.read(Gpa(USED + 4 + 8 * last + 4)).unwrap())
    }
}

fn queue() -> Queue {
    let mut queue = Queue::new(SIZE).unwrap();
    queue.set_size(SIZE);
    queue.set_desc_table_address(Some(DESCRIPTORS as u32), Some(0));
    queue.set_avail_ring_address(Some(AVAIL as u32), Some(0));
    queue.set_used_ring_address(Some(USED as u32), Some(0));
    queue.set_ready(true);
    queue
}

/// Fills the buffer of a request with its tag; the bytes written, or `None` when the buffer is
/// not all there.
fn serve<M>(chain: &DescriptorChain<M>) -> Option<u32>
where
    M: Clone + Deref,
    M::Target: GuestMemory + Sized,
{
    let memory = chain.memory();
    let mut header = [0u8; 8];
    chain
        .clone()
        .reader(memory)
        .ok()?
        .read_exact(&mut header)
        .unwrap();
    let mut writer = chain.clone().writer(memory).ok()?;
    while writer.available_bytes() >= 8 {
        writer.write_all(&header).unwrap();
    }
    Some(writer.bytes_written() as u32)
}

#[test]
fn chains_are_served_by_a_section() {
    let machine = Arc::new(machine());
    let reader = machine.memory.register();
    let local = LocalSpace::new(&machine.space, &reader, None);
    let mut driver = Driver {
        machine: Arc::clone(&machine),
        next: 0,
    };
    let mut queue = queue();
    assert!(queue.is_valid(&*local.memory()));
    assert!(queue.pop_descriptor_chain(local.memory()).is_none());
    driver.submit(0x55, 0x2_0000, 64);
    // Half of it is behind the end of RAM.
    driver.submit(0x66, MIB - 32, 64);
    for wanted in [Some(64), None] {
        let memory = local.memory();
        let chain = queue.pop_descriptor_chain(Clone::clone(&memory)).unwrap();
        let written = serve(&chain);
        assert_eq!(written, wanted);
        queue
            .add_used(&*memory, chain.head_index(), written.unwrap_or(0))
            .unwrap();
        assert_eq!(driver.used().1, written.unwrap_or(0));
    }
    assert!(!reader.in_section());
    let filled: [u64; 9] = machine.space.read(&reader).read(Gpa(0x2_0000)).unwrap();
    assert_eq!(filled, [0x55, 0x55, 0x55, 0x55, 0x55, 0x55, 0x55, 0x55, 0]);
    assert_eq!(driver.used().0, 2);
}

#[test]
fn a_chain_in_flight_keeps_its_buffer_and_no_other() {
    let machine = Arc::new(machine());
    let (mine, other) = (
        plug(&machine, "mine", DIMM, DIMM_BYTES),
        plug(&machine, "other", 2 * DIMM, DIMM_BYTES),
    );
    let mut driver = Driver {
        machine: Arc::clone(&machine),
        next: 0,
    };
    let mut queue = queue();
    let space = DmaSpace::new(&machine.space, None);
    driver.submit(1, DIMM, 4096);
    let chain = queue.pop_descriptor_chain(space.memory()).unwrap();
    assert_eq!(serve(&chain), Some(4096));
    machine.unplug(&other);
    let ticket = machine.memory.update(|t| t.unplug(&mine)).unwrap();
    machine.memory.synchronize();
    assert_eq!(ticket.phase(), Phase::Draining);
    // Gone from the map: not to be had any more, by a new request.
    driver.submit(2, DIMM, 4096);
    let late = queue.pop_descriptor_chain(space.memory()).unwrap();
    assert_eq!(serve(&late), None);
    // The chain ends on another thread.
    thread::spawn(move || drop(chain)).join().unwrap();
    let end = Instant::now() + Duration::from_secs(60);
    while ticket.phase() != Phase::Drained {
        assert!(Instant::now() < end, "{:?}", ticket.holders());
        machine.memory.synchronize();
    }
    ticket
        .destroy()
        .unwrap_or_else(|(_, error)| panic!("{error}"));
}

/// Writes to a buffer, waits until it is likely to be out of the map, and finds it as it was.
fn keep(memory: &impl GuestMemory, buffer: GuestAddress, tag: u64) {
    let mut slices = memory.get_slices(buffer, 8, Permissions::Write).unwrap();
    // Perhaps unplugged since it was served.
    let Some(Ok(slice)) = slices.next() else {
        return;
    };
    slice.write_obj(tag, 0).unwrap();
    thread::sleep(Duration::from_millis(1));
    assert_eq!(slice.read_obj::<u64>(0).unwrap(), tag);
}

#[test]
fn chains_are_served_while_ram_comes_and_goes() {
    const REQUESTS: u64 = 4000;
    let machine = Arc::new(machine());
    let done = Arc::new(AtomicBool::new(false));
    let unplugs = Arc::new(AtomicU64::new(0));
    let plugger = {
        let (machine, done, unplugs) = (
            Arc::clone(&machine),
            Arc::clone(&done),
            Arc::clone(&unplugs),
        );
        thread::spawn(move || {
            for round in 0.. {
                if done.load(Ordering::Acquire) {
                    break;
                }
                let dimm = plug(&machine, &format!("dimm{round}"), DIMM, DIMM_BYTES);
                thread::sleep(Duration::from_micros(300));
                machine.unplug(&dimm);
                unplugs.fetch_add(1, Ordering::Relaxed);
                thread::sleep(Duration::from_micros(200));
            }
        })
    };
    let mut driver = Driver {
        machine: Arc::clone(&machine),
        next: 0,
    };
    let mut queue = queue();
    let space = DmaSpace::new(&machine.space, None);
    let (mut served, mut refused) = (0, 0);
    let end = Instant::now() + Duration::from_secs(60);
    let mut tag = 0;
    // Until each has happened often enough.
    while tag < REQUESTS || served < 100 || refused < 100 || unplugs.load(Ordering::Relaxed) < 50 {
        assert!(Instant::now() < end, "{served} served, {refused} refused");
        tag += 1;
        let buffer = DIMM + (tag * 4096) % (DIMM_BYTES - 4096);
        driver.submit(tag, buffer, 2048);
        let memory = space.memory();
        let chain = queue.pop_descriptor_chain(memory.clone()).unwrap();
        let written = serve(&chain);
        match written {
            Some(written) => {
                assert_eq!(written, 2048);
                served += 1;
                if tag.is_multiple_of(64) {
                    keep(&*memory, GuestAddress(buffer), tag);
                }
            }
            None => refused += 1,
        }
        queue
            .add_used(&*memory, chain.head_index(), written.unwrap_or(0))
            .unwrap();
        assert_eq!(driver.used().0, tag as u16);
    }
    done.store(true, Ordering::Release);
    plugger.join().unwrap();
    assert_eq!(machine.memory.ram().blocks().len(), 1);
}
