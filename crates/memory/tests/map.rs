// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! DMA to RAM, ROM and registers: mapped directly, bounced, waited for, refused.
#![cfg(not(loom))]

mod setup;

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll, Wake, Waker};

use ebbtide_gate::Gate;
use ebbtide_memory::{
    Access, AccessError, BounceWait, Dma, Gpa, Mapping, Mmio, Reader, Region, Registers,
};
use setup::{Map, Scratch};

const RAM: u64 = 0;
const BAR: u64 = 0x100_0000;
const ROM: u64 = 0x200_0000;

struct Board {
    map: Map,
    bar: Arc<Scratch>,
    bar_gate: Arc<Gate>,
    reader: Reader,
    dma: Dma,
}

/// 64 KiB of RAM, ROM, and the BAR of another device; the DMA of a disk.
fn board() -> Board {
    let map = Map::new();
    map.add(&map.ram("ram", 0x1_0000), RAM);
    map.add(&Region::rom("rom", &map.block("rom", 0x1000)), ROM);
    let (bar, bar_gate) = (Scratch::new(1 << 20), Gate::new("gpu"));
    let registers = Registers::new(Arc::clone(&bar) as Arc<dyn Mmio>).gate(&bar_gate);
    map.add(&Region::registers("bar", 1 << 20, registers), BAR);
    let reader = map.memory.register();
    let dma = Dma::new(&map.space, &Gate::new("disk"));
    Board {
        map,
        bar,
        bar_gate,
        reader,
        dma,
    }
}

/// What a device does with its buffers: it writes `value` everywhere.
fn fill(mapping: &Mapping, value: u8) {
    for iovec in mapping.iovecs() {
        // SAFETY: mapped for writing, and valid until the mapping is completed.
        unsafe {
            iovec
                .iov_base
                .cast::<u8>()
                .write_bytes(value, iovec.iov_len)
        };
    }
}

fn contents(mapping: &Mapping) -> Vec<u8> {
    let part = |iovec: &libc::iovec| {
        // SAFETY: mapped, and valid until the mapping is completed.
        unsafe { std::slice::from_raw_parts(iovec.iov_base.cast::<u8>(), iovec.iov_len) }.to_vec()
    };
    mapping.iovecs().iter().flat_map(part).collect()
}

#[derive(Default)]
struct Count(AtomicUsize);

impl Wake for Count {
    fn wake(self: Arc<Self>) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

fn poll<F: Future + Unpin>(future: &mut F, count: &Arc<Count>) -> Poll<F::Output> {
    let waker = Waker::from(Arc::clone(count));
    Pin::new(future).poll(&mut Context::from_waker(&waker))
}

fn is_ready<F: Future + Unpin>(future: &mut F) -> bool {
    poll(future, &Arc::default()).is_ready()
}

#[test]
fn a_scatter_list_over_ram_and_registers_is_one_mapping() {
    let b = board();
    let ranges = [
        (Gpa(0xfff8), 8),
        (Gpa(BAR + 0x10), 0),
        (Gpa(BAR + 0x10), 16),
        (Gpa(0x100), 4),
        (Gpa(BAR + 0x40), 8),
    ];
    let mapping = b.dma.map(&b.reader, &ranges, Access::Write).unwrap();
    let lengths: Vec<_> = mapping.iovecs().iter().map(|iovec| iovec.iov_len).collect();
    assert_eq!((lengths, mapping.total_len()), (vec![8, 16, 4, 8], 36));
    assert_eq!(b.dma.bounced_bytes(), 24);
    fill(&mapping, 0x5a);
    assert!(b.bar.take_seen().is_empty(), "written back before the end");
    // The device says it wrote 30 bytes: all of the first range of registers, 2 of the last.
    mapping.complete(&b.reader, 30).unwrap();
    assert_eq!(b.dma.bounced_bytes(), 0);
    assert_eq!(
        b.bar.take_seen(),
        [
            (true, 0x10, 8, 0x5a5a_5a5a_5a5a_5a5a),
            (true, 0x18, 8, 0x5a5a_5a5a_5a5a_5a5a),
            (true, 0x40, 2, 0x5a5a)
        ]
    );
    assert_eq!(
        b.map.space.load(&b.reader, 0xfff8, 8),
        0x5a5a_5a5a_5a5a_5a5a
    );
    // Read: the registers are asked once, when mapped; the end writes nothing.
    let mapping = b.dma.map(&b.reader, &ranges[2..], Access::Read).unwrap();
    let mut wanted = vec![0x5a; 16 + 4 + 2];
    wanted.extend([0; 6]);
    assert_eq!(contents(&mapping), wanted);
    b.bar.take_seen();
    mapping.complete(&b.reader, 28).unwrap();
    assert!(b.bar.take_seen().is_empty());
}

#[test]
fn a_dropped_mapping_writes_nothing_and_gives_its_bytes_back() {
    let b = board();
    let mapping = b
        .dma
        .map(&b.reader, &[(Gpa(BAR), 64)], Access::ReadWrite)
        .unwrap();
    fill(&mapping, 1);
    b.bar.take_seen();
    drop(mapping);
    assert!(b.bar.take_seen().is_empty());
    assert_eq!(b.dma.bounced_bytes(), 0);
    // Nor does a request that failed.
    let mapping = b
        .dma
        .map(&b.reader, &[(Gpa(BAR), 64)], Access::Write)
        .unwrap();
    fill(&mapping, 1);
    mapping.complete(&b.reader, 0).unwrap();
    assert!(b.bar.take_seen().is_empty());
}

#[test]
fn a_mapping_is_completed_on_another_thread() {
    let b = board();
    let mapping = b
        .dma
        .map(
            &b.reader,
            &[(Gpa(BAR + 4), 4), (Gpa(RAM), 4)],
            Access::Write,
        )
        .unwrap();
    let memory = Arc::clone(&b.map.memory);
    std::thread::spawn(move || {
        fill(&mapping, 7);
        mapping.complete(&memory.register(), 8).unwrap();
    })
    .join()
    .unwrap();
    assert_eq!(b.bar.take_seen(), [(true, 4, 4, 0x0707_0707)]);
    assert_eq!(b.map.space.load(&b.reader, RAM, 4), 0x0707_0707);
}

#[test]
fn what_cannot_be_mapped_is_named_and_nothing_is_kept() {
    let b = board();
    let map = |ranges: &[(Gpa, u32)], access| b.dma.map(&b.reader, ranges, access).unwrap_err();
    let hole = [(Gpa(BAR), 8), (Gpa(0x8000_0000), 8)];
    let gpa = Gpa(0x8000_0000);
    assert_eq!(
        map(&hole, Access::Write),
        AccessError::Unmapped { gpa, len: 8 }
    );
    let gpa = Gpa(BAR);
    let (len, limit) = ((1 << 20) + 1, 1 << 20);
    let much = [(Gpa(BAR), 1 << 20), (Gpa(RAM), 9), (Gpa(BAR), 1)];
    assert_eq!(
        map(&much, Access::Write),
        AccessError::BounceLimit { gpa, len, limit }
    );
    let end = [(Gpa(BAR), 8), (Gpa(u64::MAX), 8)];
    assert!(matches!(
        map(&end, Access::Read),
        AccessError::Unmapped { .. }
    ));
    b.bar_gate.close();
    assert_eq!(
        map(&[(Gpa(BAR), 8)], Access::Read),
        AccessError::Refused { gpa, len: 8 }
    );
    assert_eq!(b.dma.bounced_bytes(), 0);
    // To be written later: the error comes with the bytes.
    let late = b
        .dma
        .map(&b.reader, &[(Gpa(BAR), 8)], Access::Write)
        .unwrap();
    let refused = AccessError::Refused { gpa, len: 8 };
    assert_eq!(late.complete(&b.reader, 8), Err(refused));
    assert_eq!(b.dma.bounced_bytes(), 0);
}

/// ROM written through DMA, by every way there is.
#[test]
fn rom_is_not_written_by_dma() {
    let b = board();
    let read_only = |len| AccessError::ReadOnly { gpa: Gpa(ROM), len };
    assert_eq!(b.dma.write(&b.reader, Gpa(ROM), &[1; 4]), Err(read_only(4)));
    for access in [Access::Write, Access::ReadWrite] {
        let error = b.dma.map(&b.reader, &[(Gpa(ROM), 4)], access).unwrap_err();
        assert_eq!(error, read_only(4));
        let guard = b.map.space.read(&b.reader);
        assert_eq!(guard.pin(Gpa(ROM), 4, access).unwrap_err(), read_only(4));
        assert_eq!(guard.write_bytes(Gpa(ROM), &[1; 4]), Err(read_only(4)));
    }
    b.map.space.store(&b.reader, ROM, 4, 1);
    let mapping = b
        .dma
        .map(&b.reader, &[(Gpa(ROM), 4)], Access::Read)
        .unwrap();
    assert!(matches!(mapping, Mapping::Direct(_)));
    assert_eq!(contents(&mapping), [0; 4]);
}

fn granted(b: &Board, wait: &mut BounceWait, at: u32, count: &Arc<Count>) -> Mapping {
    let Poll::Ready(grant) = poll(wait, count) else {
        panic!("request {at} is not served in its turn")
    };
    let ranges = [(Gpa(BAR + u64::from(at) * 0x1000), 0x1_0000)];
    b.dma
        .map_granted(&b.reader, &ranges, Access::Write, grant)
        .unwrap()
}

/// Bounce exhaustion: 256 requests of 64 KiB to a BAR, sixteen times what may be bounced. None
/// fails, each is served in its turn, and each one's bytes arrive.
#[test]
fn requests_that_exhaust_the_bounce_buffer_are_served_in_order() {
    let b = board();
    let (mut running, mut waiting) = (Vec::new(), std::collections::VecDeque::new());
    for at in 0..256u32 {
        let place = Gpa(BAR + u64::from(at % 240) * 0x1000);
        match b.dma.map(&b.reader, &[(place, 0x1_0000)], Access::Write) {
            Ok(Mapping::Wait(wait)) => waiting.push_back((at, wait, Arc::<Count>::default())),
            Ok(mapping @ Mapping::Bounce(_)) => running.push((at, mapping)),
            other => panic!("request {at}: {other:?}"),
        }
    }
    assert_eq!((running.len(), waiting.len()), (16, 240));
    assert_eq!(b.dma.bounced_bytes(), Dma::BOUNCE_BYTES);
    for (_, wait, count) in &mut waiting {
        assert!(poll(wait, count).is_pending());
    }
    // RAM needs no bounce buffer, and does not queue.
    let direct = b
        .dma
        .map(&b.reader, &[(Gpa(RAM), 64)], Access::Write)
        .unwrap();
    assert!(matches!(direct, Mapping::Direct(_)));
    let mut order = Vec::new();
    while !running.is_empty() {
        let (at, mapping) = running.remove(0);
        fill(&mapping, at as u8);
        mapping.complete(&b.reader, 0x1_0000).unwrap();
        order.push(at);
        let offset = (at % 240) as usize * 0x1000;
        let bytes = b.bar.bytes.lock().unwrap()[offset..offset + 0x1_0000].to_vec();
        assert!(bytes.iter().all(|byte| *byte == at as u8), "request {at}");
        if let Some((at, mut wait, count)) = waiting.pop_front() {
            assert_eq!(
                count.0.load(Ordering::SeqCst),
                1,
                "woken once, for its turn"
            );
            running.push((at, granted(&b, &mut wait, at % 240, &count)));
        }
    }
    assert_eq!(order, (0..256).collect::<Vec<_>>());
    assert_eq!(b.dma.bounced_bytes(), 0);
}

fn wait_for(b: &Board, dma: &Dma, len: u32) -> BounceWait {
    match dma.map(&b.reader, &[(Gpa(BAR), len)], Access::Write) {
        Ok(Mapping::Wait(wait)) => wait,
        other => panic!("{len} bytes: {other:?}"),
    }
}

#[test]
fn a_large_request_is_not_overtaken_and_one_that_gives_up_is_skipped() {
    let b = board();
    let dma = Dma::with_bounce_bytes(&b.map.space, &Gate::new("disk"), 0x1000);
    let take = |len| {
        dma.map(&b.reader, &[(Gpa(BAR), len)], Access::Write)
            .unwrap()
    };
    let (first, second) = (take(0x600), take(0x600));
    let (mut large, mut small) = (wait_for(&b, &dma, 0x1000), wait_for(&b, &dma, 0x100));
    let mut last = wait_for(&b, &dma, 0x100);
    drop(first);
    assert!(
        !is_ready(&mut large) && !is_ready(&mut small),
        "the small one overtook"
    );
    // Who came first gives up: the others fit now.
    drop(large);
    assert!(is_ready(&mut small) && is_ready(&mut last));
    drop((small, last, second));
    assert_eq!(dma.bounced_bytes(), 0);
    // One that was served and is dropped without having been asked gives its turn on.
    let all = take(0x1000);
    let (served, mut next) = (wait_for(&b, &dma, 0x1000), wait_for(&b, &dma, 0x1000));
    drop(all);
    drop(served);
    assert!(is_ready(&mut next));
    // Another device has a budget of its own.
    assert!(matches!(
        b.dma.map(&b.reader, &[(Gpa(BAR), 8)], Access::Write),
        Ok(Mapping::Bounce(_))
    ));
}

#[test]
fn a_request_that_waited_sees_the_map_of_its_turn() {
    let b = board();
    let dma = Dma::with_bounce_bytes(&b.map.space, &Gate::new("disk"), 0x1000);
    let ranges = [(Gpa(BAR), 0x1000)];
    let first = dma.map(&b.reader, &ranges, Access::Write).unwrap();
    let mut waiting = Box::pin(dma.mapped(&b.reader, &ranges, Access::Write));
    assert!(poll(&mut waiting, &Arc::default()).is_pending());
    // Memory comes in front of the registers meanwhile.
    let front = b.map.ram("front", 0x1000);
    b.map.change(|t| t.add(&b.map.root, &front, BAR, 1));
    drop(first);
    let Poll::Ready(mapping) = poll(&mut waiting, &Arc::default()) else {
        panic!("not its turn")
    };
    assert!(matches!(mapping.unwrap(), Mapping::Direct(_)));
    assert_eq!(dma.bounced_bytes(), 0);
}

/// What waits for bounce buffer holds no pin: the RAM of its list can be unplugged meanwhile.
#[test]
fn a_request_that_waits_holds_up_no_unplug() {
    let b = board();
    let dma = Dma::with_bounce_bytes(&b.map.space, &Gate::new("disk"), 8);
    let dimm = b.map.ram("dimm", 0x1000);
    b.map.add(&dimm, 0x1000_0000);
    let ranges = [(Gpa(0x1000_0000), 8), (Gpa(BAR), 8)];
    let first = dma.map(&b.reader, &ranges, Access::Write).unwrap();
    let mut waiting = Box::pin(dma.mapped(&b.reader, &ranges, Access::Write));
    assert!(!is_ready(&mut waiting));
    let ticket = b.map.change(|t| t.unplug(&dimm));
    b.map.memory.synchronize();
    assert!(ticket.destroy().is_err_and(|(ticket, _)| {
        assert_eq!(
            ticket
                .holders()
                .iter()
                .map(|holder| holder.count)
                .sum::<u64>(),
            1
        );
        // The pin of the request that runs, and nothing else.
        drop(first);
        let start = std::time::Instant::now();
        while !is_ready(&mut Box::pin(ticket.drained())) {
            assert!(start.elapsed() < std::time::Duration::from_secs(60));
            std::thread::yield_now();
        }
        ticket.destroy().is_ok()
    }));
    let Poll::Ready(Err(error)) = poll(&mut waiting, &Arc::default()) else {
        panic!("its turn came, its memory went")
    };
    assert!(matches!(error, AccessError::Unmapped { .. }), "{error}");
    assert_eq!(dma.bounced_bytes(), 0);
}

/// Nine read guards at once, each on another view: every one sees the map as it was when it was
/// opened, and what they show stays until the last of them is gone.
#[test]
fn nine_guards_are_held_at_once() {
    let b = board();
    let reader = &b.reader;
    let bar = b.map.ram("wanderer", 0x1000);
    b.map.add(&bar, 0x1000_0000);
    let place = |at: u64| 0x1000_0000 + at * 0x10_0000;
    let mut guards = Vec::new();
    for at in 0..9 {
        b.map.change(|t| t.set_offset(&bar, place(at)));
        guards.push(b.map.space.read(reader));
    }
    let ticket = b.map.change(|t| t.unplug(&bar));
    for (at, guard) in guards.iter().enumerate() {
        for other in 0..9 {
            let found = guard.lookup(Gpa(place(other))).is_some();
            assert_eq!(found, other == at as u64, "guard {at}, place {other}");
        }
        guard.write(Gpa(place(at as u64)), at as u64).unwrap();
        assert_eq!(guards[8].read::<u64>(Gpa(place(8))), Ok(at as u64));
    }
    let mut drained = Box::pin(ticket.drained());
    for guard in guards {
        std::thread::sleep(std::time::Duration::from_millis(5));
        assert!(!is_ready(&mut drained), "drained under a guard");
        drop(guard);
    }
    let start = std::time::Instant::now();
    while !is_ready(&mut drained) {
        assert!(start.elapsed() < std::time::Duration::from_secs(60));
        std::thread::yield_now();
    }
    ticket.destroy().map_err(|(_, error)| error).unwrap();
}
