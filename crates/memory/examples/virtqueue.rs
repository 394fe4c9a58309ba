// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A device written for rust-vmm's traits, on memory that is unplugged under it.
//!
//!     cargo run -p ebbtide-memory --example virtqueue
//!
//! The device is generic over `GuestAddressSpace` and knows nothing of this crate. Given a
//! [`DmaSpace`], its views pin what they look up: the DIMM its request goes to drains when the
//! request is over, and not before.

use std::error::Error;
use std::thread;
use std::time::Duration;

use ebbtide_memory::{DmaSpace, Gpa, Memory, MemoryConfig, Phase, RamSpec, Region};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};

type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

const DESCRIPTORS: u64 = 0x1000;
const AVAILABLE: u64 = 0x2000;
const USED: u64 = 0x3000;
const DIMM: u64 = 4 << 30;

/// Fills the buffers it is given.
struct Device<M> {
    space: M,
    queue: Queue,
}

impl<M: GuestAddressSpace> Device<M>
where
    M::T: Clone,
{
    /// Serves one request, which takes `time`. Returns how many bytes it wrote.
    fn serve(&mut self, time: Duration) -> Result<u32> {
        let memory = self.space.memory();
        let Some(mut chain) = self.queue.pop_descriptor_chain(memory.clone()) else {
            return Ok(0);
        };
        let mut written = 0;
        while let Some(descriptor) = chain.next().filter(|d| d.is_write_only()) {
            let data = vec![0xab; descriptor.len() as usize];
            chain.memory().write_slice(&data, descriptor.addr())?;
            written += descriptor.len();
        }
        thread::sleep(time);
        self.queue.add_used(&*memory, chain.head_index(), written)?;
        Ok(written)
        // The views go, and with them the pins.
    }
}

fn main() -> Result<()> {
    let memory = Memory::new(MemoryConfig::default())?;
    let root = Region::container("system", 1 << 64);
    let system = memory.address_space("memory", &root)?;
    let low = memory.ram().add(RamSpec::anon("low", 1 << 20))?;
    let low = Region::ram("low", &low);
    let dimm = memory.ram().add(RamSpec::anon("dimm0", 64 << 20))?;
    let dimm = Region::ram("dimm0", &dimm);
    memory.update(|t| {
        t.add(&root, &low, 0, 0)?;
        t.add(&root, &dimm, DIMM, 0)
    })?;

    // What a driver does: one descriptor, that the device writes to.
    let reader = memory.register();
    let guard = system.read(&reader);
    guard.write(Gpa(DESCRIPTORS), DIMM)?;
    guard.write(Gpa(DESCRIPTORS + 8), 4096u32)?;
    guard.write(Gpa(DESCRIPTORS + 12), 2u16)?;
    guard.write(Gpa(AVAILABLE + 2), 1u16)?;
    drop(guard);

    let mut queue = Queue::new(256)?;
    queue.try_set_desc_table_address(GuestAddress(DESCRIPTORS))?;
    queue.try_set_avail_ring_address(GuestAddress(AVAILABLE))?;
    queue.try_set_used_ring_address(GuestAddress(USED))?;
    queue.set_ready(true);
    let space = DmaSpace::new(&system, None);
    let mut device = Device { space, queue };
    let iothread = thread::Builder::new().name("iothread0".into());
    let serving = iothread.spawn(move || device.serve(Duration::from_millis(300)))?;
    while system.read(&reader).read::<u8>(Gpa(DIMM + 4095))? != 0xab {
        thread::yield_now();
    }

    let ticket = memory.update(|t| t.unplug(&dimm))?;
    if !ticket.wait(Phase::Drained, Duration::from_millis(50)) {
        println!("{}", ticket.report());
    }
    ticket.wait(Phase::Drained, Duration::from_secs(10));
    println!("{}", ticket.report());
    ticket.destroy().map_err(|(_, error)| error)?;
    let served = serving.join().map_err(|_| "the device panicked")??;
    println!(
        "served {served} bytes; {} blocks are left",
        memory.ram().blocks().len()
    );
    Ok(())
}
