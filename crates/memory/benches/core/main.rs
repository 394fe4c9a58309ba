// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The memory core beside vm-memory and a floor, in one run.
//!
//! Prints one JSON object per row: medians of paired runs (the contenders take turns), in
//! nanoseconds per operation; with what every run of ours should stay below where there is such a
//! budget, and that nothing should take longer than vm-memory takes. `lookup` and `pin` are throughput over random addresses, `_dep` is
//! latency: each address depends on the answer before. Arguments other than `--bench` choose the
//! rows whose id contains them.
//!
//! - `lookup/N`: section, look-up, host address; N regions of 1 MiB, one every 2 MiB.
//! - `lookup_pc/N`: a PC's map: 640 KiB, a hole, RAM to 3 GiB, N BARs of 16 KiB in a window of
//!   64 MiB, RAM above 4 GiB, a DIMM that ends at 2^46. Addresses are spread over the regions.
//! - `slice/N`, `slice_dep/N`: section, look-up, a slice of 64 bytes with its bounds checked; N
//!   regions as in `lookup`.
//! - `pin/home/N`: section, look-up, pin with the check of the plugged bitmap, unpin; random
//!   addresses in a virtio-mem region of 8 GiB (blocks of 2 MiB), one of N regions.
//! - `pin/remote/N`: the same, let go on another thread. Both threads run on one CPU, so that it
//!   measures the work and not the transfer of cache lines, which any hand-over pays.
//! - `pin/home2/N`: `pin/home/N` on two threads at once, on all CPUs, each with random addresses in the
//!   same region; per thread.
//! - `pin/remote2/N`: two threads at once take pins, and let go those of the other; per pin.
//! - `view/section/N`, `view/dma/N`: by vm-memory's traits, a view and a slice of 64 bytes, within
//!   a section and pinned; the peer's view is a guard and a share in the map.
//! - `publish/N`: one region added or removed (half each) and the view published.
//! - `publish_beside/N`: the same while there are 8 threads that have looked something up, and sleep.
//! - `read_u64/N`, `write_u64/N`: section, look-up, eight bytes read or written; N regions as in `lookup`.
//! - `write_u64_dirty/N`: the same with a client of the dirty log on (vm-memory: `AtomicBitmap`);
//!   pages are dirty already. The floor has no log.
//! - `dirty_mark`: a page that is dirty already is marked, at random in 1 GiB.
//! - `dirty_harvest_1G`: 16 pages of 1 GiB are marked and harvested.
//! - `drained`: from the last unpin of unplugged RAM until a sleeping thread that waits for it runs;
//!   the floor only wakes a thread.
//! - `destroy_1G/thp|4k|memfd`: 1 GiB that was touched goes back to the host; the floor maps
//!   inaccessible memory over it. Time of the processor, of the thread that does it, which is the caller in
//!   all three.
//! - `gate/enter`: a device's gate is entered for a register access and left; `gate/enter2`: on two threads at once, the
//!   same gate. `gate/lease`: with a lease that a request could keep. The peer is a reference of the device, the floor counts
//!   for itself.
//! - `held/others`: from the removal of memory to its end, while a request of 300 ms is in flight into *other* memory; the
//!   floor is without the request. `held/stall`: the longest time that a thread got nothing done which looks up memory all the
//!   while, as memory goes from under such a request; the peer is one lock that all work under and that a removal takes, as
//!   stopping the machine would; in the floor nothing goes.
//! - `bytes_per_region`: of heap and other private memory, for one more region of 1 MiB, of up to 4096;
//!   guest memory is not counted. The floor is two numbers.
//! - `bytes_per_reader`: the same for one more thread that looks up and pins, of 64.

mod contenders;
mod held;
mod measure;
mod sizes;
mod together;
mod unplug;
mod writes;

use std::hint::black_box;
use std::sync::{Arc, Barrier};
use std::thread;

use contenders::{Direct, Ours, VmMemory};
use ebbtide_memory::{Gpa, Region};
use measure::{Plan, Row, dependent, spread};
use vm_memory::GuestRegionMmap;

const COUNTS: [usize; 5] = [1, 8, 64, 512, 4096];
/// Threads of `publish_beside`: four vCPUs, and four that serve devices.
const READERS: usize = 8;

fn main() {
    let wanted: Vec<String> = std::env::args()
        .skip(1)
        .filter(|a| !a.starts_with("--"))
        .collect();
    let plan = Plan::new(wanted);
    for count in COUNTS {
        let uniform: Vec<(u64, u64)> = (0..count as u64).map(|at| (at << 21, 1 << 20)).collect();
        lookups(&plan, "lookup", count, &uniform, false);
        lookups(&plan, "lookup_dep", count, &uniform, true);
    }
    for count in COUNTS {
        slices(&plan, "slice", count, false);
        slices(&plan, "slice_dep", count, true);
    }
    for count in COUNTS {
        lookups(&plan, "lookup_pc", count, &pc(count as u64), false);
    }
    for count in COUNTS {
        pins(&plan, count);
        together::rows(&plan, count);
    }
    for count in COUNTS {
        views(&plan, count);
    }
    for count in COUNTS {
        publishes(&plan, count);
    }
    writes::rows(&plan);
    unplug::rows(&plan);
    held::rows(&plan);
    for count in COUNTS {
        publishes_beside(&plan, count);
    }
    sizes::rows(&plan);
}

/// Start and length of `count` regions of 1 MiB, one every 2 MiB.
fn uniform(count: usize) -> Vec<(u64, u64)> {
    (0..count as u64).map(|at| (at << 21, 1 << 20)).collect()
}

/// Start and length of a PC's regions.
fn pc(bars: u64) -> Vec<(u64, u64)> {
    let mut regions = vec![(0, 0xa_0000), (0x10_0000, 0xbff0_0000)];
    regions.extend((0..bars).map(|bar| (0xc000_0000 + (bar << 14), 1 << 14)));
    regions.extend([(1 << 32, 4 << 30), ((1 << 46) - (1 << 30), 1 << 30)]);
    regions
}

fn lookups(plan: &Plan, id: &str, count: usize, regions: &[(u64, u64)], dep: bool) {
    let id = format!("{id}/{count}");
    if !plan.wants(&id) {
        return;
    }
    let addresses = spread(regions);
    let ours = Ours::new(regions, None);
    let peer = VmMemory::new(regions);
    let floor = Direct::new(regions);
    let all = addresses.as_slice();
    let mut row = Row::new(&id);
    for _ in 0..plan.rounds {
        row.add(
            each(
                plan,
                all,
                dep,
                |all| ours.lookups(all),
                |at| ours.lookup(at),
            ),
            each(
                plan,
                all,
                dep,
                |all| peer.lookups(all),
                |at| peer.lookup(at),
            ),
            each(
                plan,
                all,
                dep,
                |all| floor.lookups(all),
                |at| floor.lookup(at),
            ),
        );
    }
    row.print();
}

fn slices(plan: &Plan, id: &str, count: usize, dep: bool) {
    let id = format!("{id}/{count}");
    if !plan.wants(&id) {
        return;
    }
    let regions = uniform(count);
    let addresses = spread(&regions);
    let ours = Ours::new(&regions, None);
    let peer = VmMemory::new(&regions);
    let floor = Direct::new(&regions);
    let all = addresses.as_slice();
    let mut row = Row::new(&id);
    for _ in 0..plan.rounds {
        row.add(
            each(plan, all, dep, |all| ours.slices(all), |at| ours.slice(at)),
            each(plan, all, dep, |all| peer.slices(all), |at| peer.slice(at)),
            each(
                plan,
                all,
                dep,
                |all| floor.lookups(all),
                |at| floor.lookup(at),
            ),
        );
    }
    row.print();
}

/// Nanoseconds per look-up of `addresses`, `all` at once or `one` after the other. What is looked
/// up in is an argument of `all`: captured, it would have to be loaded anew for each.
fn each(
    plan: &Plan,
    addresses: &[u64],
    dep: bool,
    all: impl Fn(&[u64]) -> u64,
    one: impl Fn(u64) -> u64,
) -> f64 {
    if dep {
        plan.time(addresses.len(), || dependent(addresses, &one))
    } else {
        plan.time(addresses.len(), || all(addresses))
    }
}

/// `count` regions of which the last is the virtio-mem region whose RAM is pinned.
fn with_device(count: usize) -> (Vec<(u64, u64)>, (u64, u64)) {
    let mut regions = uniform(count);
    let device = (1 << 40, 8 << 30);
    regions[count - 1] = device;
    (regions, device)
}

fn pins(plan: &Plan, count: usize) {
    let (home, remote) = (format!("pin/home/{count}"), format!("pin/remote/{count}"));
    if !plan.wants(&home) && !plan.wants(&remote) {
        return;
    }
    let (regions, device) = with_device(count);
    let addresses = spread(&[device]);
    let ours = Ours::new(&regions, Some(2 << 20));
    ours.check_pins(&addresses);
    let peer = VmMemory::new(&regions);
    let floor = Direct::new(&[device]);
    if plan.wants(&home) {
        let mut row = Row::new(&home);
        for _ in 0..plan.rounds {
            row.add(
                plan.time(addresses.len(), || ours.pins(&addresses)),
                plan.time(addresses.len(), || peer.pins(&addresses)),
                plan.time(addresses.len(), || floor.pins(&addresses)),
            );
        }
        row.print();
    }
    if plan.wants(&remote) {
        let mut row = Row::new(&remote);
        let batch = &addresses[..256];
        measure::on_one_cpu(|| {
            for _ in 0..plan.rounds {
                row.add(
                    plan.time_handover(batch.len(), || ours.pinned(batch)),
                    plan.time_handover(batch.len(), || peer.pinned(batch)),
                    plan.time_handover(batch.len(), || floor.pinned(batch)),
                );
            }
        });
        row.print();
    }
}

fn views(plan: &Plan, count: usize) {
    let (section, dma) = (format!("view/section/{count}"), format!("view/dma/{count}"));
    if !plan.wants(&section) && !plan.wants(&dma) {
        return;
    }
    let regions = uniform(count);
    let addresses = spread(&regions);
    let ours = Ours::new(&regions, None);
    let peer = VmMemory::new(&regions);
    let floor = Direct::new(&regions);
    let run = |look: &dyn Fn(&[u64]) -> u64| plan.time(addresses.len(), || look(&addresses));
    let mut row = Row::new(&section);
    let mut pinned = Row::new(&dma);
    for _ in 0..plan.rounds {
        let direct = run(&|all| floor.lookups(all));
        row.add(
            run(&|all| ours.section_views(all)),
            run(&|all| peer.views(all)),
            direct,
        );
        let peers = run(&|all| peer.pinning_views(all));
        pinned.add(run(&|all| ours.dma_views(all)), peers, direct);
    }
    row.print();
    pinned.print();
}

/// The region that comes and goes.
struct Extra {
    region: (Arc<Region>, u64),
    other: Arc<GuestRegionMmap<()>>,
    floor: Direct,
}

fn publishes(plan: &Plan, count: usize) {
    let id = format!("publish/{count}");
    if plan.wants(&id) {
        let (ours, peer, mut extra) = map_and_extra(count);
        publish(plan, &id, &ours, &peer, &mut extra);
    }
}

/// After the rows of `publishes`, and before those with more threads: what the peer keeps of a thread
/// stays for the next one, and each change of a map looks at it, whether the thread is still there or not.
fn publishes_beside(plan: &Plan, count: usize) {
    let id = format!("publish_beside/{count}");
    if !plan.wants(&id) {
        return;
    }
    let (ours, peer, mut extra) = map_and_extra(count);
    let gate = Barrier::new(READERS + 1);
    let (memory, space, peers) = (&ours.memory, &*ours.space, &peer);
    thread::scope(|scope| {
        for _ in 0..READERS {
            scope.spawn(|| {
                let reader = memory.register();
                black_box(space.read(&reader).lookup(Gpa(0)).is_some());
                black_box(peers.lookup(0));
                gate.wait();
                gate.wait();
            });
        }
        gate.wait();
        publish(plan, &id, &ours, &peer, &mut extra);
        gate.wait();
    });
}

/// A map of `count` regions, and one that goes in the middle of it, between two of them.
fn map_and_extra(count: usize) -> (Ours, VmMemory, Extra) {
    let regions = uniform(count);
    let (ours, peer) = (Ours::new(&regions, None), VmMemory::new(&regions));
    let place = ((count as u64 / 2) << 21) + (1 << 20);
    let extra = Extra {
        region: ours.extra(place),
        other: peer.extra(place),
        floor: Direct::new(&regions),
    };
    (ours, peer, extra)
}

fn publish(plan: &Plan, id: &str, ours: &Ours, peer: &VmMemory, extra: &mut Extra) {
    let Extra {
        region,
        other,
        floor,
    } = extra;
    let mut row = Row::new(id);
    for _ in 0..plan.rounds {
        row.add(
            plan.time(2, || ours.publish_twice(region)),
            plan.time(2, || peer.publish_twice(other)),
            plan.time(2, || floor.copy_twice()),
        );
    }
    row.print();
}
