// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Rings whose memory goes away while the device uses them. A ring is no pin: it holds nothing up.

mod support;

use std::sync::Arc;
use std::time::Duration;

use ebbtide_lab_driver::{DriverQueue, GuestRam, Layout, Part, block_on};
use ebbtide_memory::{Backing, Phase, RamBlock, RamSpec, Region};
use ebbtide_virtio::{features, status};
use support::Rig;

const ADDR: u64 = 8 << 30;
const BLOCK_BYTES: u64 = 2 << 20;
const LIMIT: Duration = Duration::from_secs(60);

/// More RAM, at [`ADDR`].
fn add_ram(rig: &Rig, block_size_bytes: Option<u64>) -> (Arc<RamBlock>, Arc<Region>, GuestRam) {
    let spec = RamSpec {
        name: "dimm0".into(),
        size_bytes: BLOCK_BYTES,
        max_size_bytes: BLOCK_BYTES,
        backing: Backing::Anon { thp: false },
        prefault: false,
        block_size_bytes,
    };
    let block = rig.board.memory().ram().add(spec).expect("a block");
    let region = Region::ram("dimm0", &block);
    rig.board
        .memory()
        .update(|map| map.add(rig.board.root(), &region, ADDR, 0))
        .expect("a place");
    let ram = GuestRam::new(rig.board.space(), ADDR..ADDR + BLOCK_BYTES);
    (block, region, ram)
}

/// A working device whose queue 0 lies in `ram`, buffers elsewhere.
fn start(rig: &mut Rig, ram: &GuestRam) -> DriverQueue {
    rig.driver
        .negotiate(features::RING_EVENT_IDX)
        .expect("features");
    let mut queue = DriverQueue::new(ram, 16, true);
    rig.driver.program_queue(0, queue.config());
    rig.driver.write_common(0x1a, 2, 1);
    rig.driver.write_common(0x1c, 2, 1);
    rig.driver.driver_ok().expect("activation");
    let gpa = rig.board.ram().alloc(2, 1);
    let parts = [Part::readable(gpa, 1), Part::writable(gpa, 1)];
    rig.driver
        .roundtrip(0, &mut queue, &parts, Layout::Direct)
        .expect("an echo");
    queue
}

fn assert_found_out_and_mended(rig: &mut Rig) {
    rig.driver.kick(0);
    assert!(rig.driver.wait_needs_reset());
    let mut queue = rig.start(0);
    let gpa = rig.board.ram().alloc(2, 1);
    let parts = [Part::readable(gpa, 1), Part::writable(gpa, 1)];
    rig.driver
        .roundtrip(0, &mut queue, &parts, Layout::Direct)
        .expect("an echo");
    assert_eq!(rig.driver.status() & status::NEEDS_RESET, 0);
}

#[test]
fn ram_with_rings_can_be_unplugged() {
    let mut rig = Rig::new();
    let (block, region, ram) = add_ram(&rig, None);
    let _queue = start(&mut rig, &ram);
    let ticket = rig
        .board
        .memory()
        .update(|map| map.unplug(&region))
        .expect("a ticket");
    block_on(ticket.drained(), LIMIT).expect("rings hold nothing up");
    assert_eq!(ticket.phase(), Phase::Drained);
    drop((block, region));
    ticket.destroy().map_err(|(_, error)| error).expect("gone");
    assert_found_out_and_mended(&mut rig);
}

#[test]
fn blocks_with_rings_can_be_unplugged() {
    let mut rig = Rig::new();
    let (block, _region, ram) = add_ram(&rig, Some(BLOCK_BYTES));
    block.plug(0..BLOCK_BYTES, false).expect("plugged");
    let _queue = start(&mut rig, &ram);
    let seal = block.seal(0..BLOCK_BYTES).expect("sealed");
    block_on(seal.drained(), LIMIT).expect("rings hold nothing up");
    seal.discard()
        .map_err(|(_, error)| error)
        .expect("discarded");
    assert_found_out_and_mended(&mut rig);
}
