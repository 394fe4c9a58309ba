// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The memory device as a driver meets it: every cell of the table of answers (virtio 1.3, 5.15).

mod plugging;

use ebbtide_lab_driver::mem::{Answer, Kind, Request, State, config};
use ebbtide_lab_driver::{Layout, Part, VirtioDriver, block_on, common};
use ebbtide_memory::{AccessError, Gpa};
use ebbtide_virtio::mem::{DriverState, MemError, feature};
use ebbtide_virtio::{features, status};
use plugging::{BASE, BLOCK, GIB, LATER, MIB, Rig};

#[test]
fn configuration_and_features() {
    let rig = Rig::with(8 * GIB, 64 * MIB, |spec| spec.node = Some(2));
    assert_eq!(
        rig.driver.offered() & 0xff,
        feature::UNPLUGGED_INACCESSIBLE | feature::ACPI_PXM
    );
    assert_eq!(rig.driver.read_config_u64(config::BLOCK_SIZE), BLOCK);
    assert_eq!(rig.driver.read_config(config::NODE_ID, 2), 2);
    assert_eq!(rig.driver.read_config_u64(config::ADDR), BASE);
    assert_eq!(rig.driver.read_config_u64(config::REGION_SIZE), 8 * GIB);
    assert_eq!(rig.usable(), 4 * GIB);
    assert_eq!(rig.plugged(), 0);
    assert_eq!(rig.requested(), 64 * MIB);
    assert_eq!(rig.driver.max_queue_size(0), 128);
    assert_eq!(rig.driver.max_queue_size(1), 0);
}

#[test]
fn without_a_node_there_is_none() {
    let rig = Rig::new(GIB, 0);
    assert_eq!(rig.driver.offered() & 0xff, feature::UNPLUGGED_INACCESSIBLE);
    assert_eq!(rig.driver.read_config(config::NODE_ID, 2), 0);
}

#[test]
fn a_driver_that_reads_unplugged_memory_is_refused() {
    let mut rig = Rig::new(GIB, 64 * MIB);
    assert!(rig.driver.negotiate(features::VERSION_1).is_err());
    assert_eq!(rig.driver.status() & status::FEATURES_OK, 0);
    rig.restart();
    rig.assert_works();
}

#[test]
fn the_configuration_cannot_be_written() {
    let rig = Rig::new(GIB, 64 * MIB);
    let read = || {
        (0..64)
            .map(|at| rig.driver.read_config(at, 1))
            .collect::<Vec<_>>()
    };
    let before = read();
    for at in 0..64 {
        rig.driver.write_config(at, 1, 0xff);
    }
    assert_eq!(read(), before);
}

#[test]
fn plugged_memory_is_memory_and_unplugged_is_not() {
    let mut rig = Rig::new(GIB, 64 * MIB);
    assert_eq!(rig.plug(3, 2), Answer::Ack);
    assert_eq!(rig.plugged(), 2 * BLOCK);
    assert_eq!(rig.state(3, 2), Some(State::Plugged));
    let (first, last) = (rig.gpa(3), Gpa(rig.gpa(5).0 - 8));
    rig.board.ram().write(first, b"ebbtide!");
    rig.board.ram().write(last, b"ebbtide!");
    assert_eq!(rig.board.ram().read(last, 8), b"ebbtide!");
    let outside = |gpa: Gpa| {
        let reader = rig.board.memory().register();
        rig.board.space().read(&reader).read_bytes(gpa, &mut [0; 8])
    };
    assert!(matches!(
        outside(rig.gpa(5)),
        Err(AccessError::Unplugged { .. })
    ));
    assert!(matches!(
        outside(Gpa(first.0 - 8)),
        Err(AccessError::Unplugged { .. })
    ));
    assert_eq!(rig.unplug(3, 1), Answer::Ack);
    assert_eq!(rig.plugged(), BLOCK);
    let reader = rig.board.memory().register();
    assert!(
        rig.board
            .space()
            .read(&reader)
            .read_bytes(rig.gpa(3), &mut [0; 8])
            .is_err()
    );
    assert_eq!(
        rig.board.ram().read(last, 8),
        b"ebbtide!",
        "the other block keeps its contents"
    );
    drop(reader);
    assert_eq!(rig.plug(3, 1), Answer::Ack);
    assert_eq!(
        rig.board.ram().read(first, 8),
        [0; 8],
        "what comes back is empty"
    );
}

/// Ranges that are wrong for every request that has one. Usable: 4 GiB of 8.
fn wrong_ranges() -> Vec<(u64, u16)> {
    let usable = 4 * GIB;
    vec![
        (BASE, 0),
        (BASE + 4096, 1),
        (BASE + BLOCK / 2, 1),
        (BASE - BLOCK, 1),
        (BASE - BLOCK, 2),
        (0, 1),
        (BASE + usable, 1),
        (BASE + usable - BLOCK, 2),
        (BASE, u16::MAX),
        (BASE + 8 * GIB, 1),
        (u64::MAX - BLOCK + 1, 1),
        (u64::MAX - BLOCK + 1, 2),
        (u64::MAX, u16::MAX),
    ]
}

#[test]
fn wrong_ranges_are_errors() {
    let mut rig = Rig::new(8 * GIB, 64 * MIB);
    for (addr, count) in wrong_ranges() {
        for kind in [Kind::Plug, Kind::Unplug, Kind::State] {
            assert_eq!(
                rig.ask_at(kind, addr, count),
                Answer::Error,
                "{kind:?} {addr:#x} {count}"
            );
        }
    }
    assert_eq!(rig.plugged(), 0);
    assert_eq!(rig.mem.metrics().plug.error, 13);
}

#[test]
fn blocks_in_the_wrong_state_are_errors() {
    let mut rig = Rig::new(GIB, 64 * MIB);
    assert_eq!(rig.plug(4, 4), Answer::Ack);
    for (first, count) in [(4, 4), (4, 1), (7, 1), (7, 2), (3, 2), (0, 16)] {
        assert_eq!(
            rig.plug(first, count),
            Answer::Error,
            "plug {first} {count}"
        );
    }
    for (first, count) in [(0, 1), (3, 2), (7, 2), (8, 1), (0, 16)] {
        assert_eq!(
            rig.unplug(first, count),
            Answer::Error,
            "unplug {first} {count}"
        );
    }
    assert_eq!(rig.plugged(), 4 * BLOCK);
    assert_eq!(rig.state(4, 4), Some(State::Plugged));
    // The same error for what is over the target, too.
    rig.mem.set_requested(0).unwrap();
    assert_eq!(rig.plug(7, 2), Answer::Error);
}

#[test]
fn over_the_target_is_a_nack_and_nothing_else_is() {
    let mut rig = Rig::new(GIB, 8 * BLOCK);
    assert_eq!(rig.plug(0, 9), Answer::Nack);
    assert_eq!(rig.plug(0, 8), Answer::Ack);
    assert_eq!(rig.plug(8, 1), Answer::Nack);
    rig.mem.set_requested(4 * BLOCK).unwrap();
    assert_eq!(rig.plug(8, 1), Answer::Nack);
    // Unplugging is always welcome, at, above and below the target.
    for (first, count) in [(0, 1), (1, 3), (4, 4)] {
        assert_eq!(rig.unplug(first, count), Answer::Ack);
    }
    assert_eq!(rig.plugged(), 0);
    rig.mem.set_requested(0).unwrap();
    assert_eq!(
        rig.plug(0, 1),
        Answer::Nack,
        "usable does not shrink with the target"
    );
    let metrics = rig.mem.metrics();
    assert_eq!(
        (metrics.plug.ack, metrics.plug.nack, metrics.plug.bytes),
        (1, 4, 8 * BLOCK)
    );
    assert_eq!(
        (
            metrics.unplug.ack,
            metrics.unplug.nack,
            metrics.unplug.bytes
        ),
        (3, 0, 8 * BLOCK)
    );
}

#[test]
fn states() {
    let mut rig = Rig::new(GIB, 64 * MIB);
    assert_eq!(rig.plug(4, 4), Answer::Ack);
    assert_eq!(rig.state(4, 4), Some(State::Plugged));
    assert_eq!(rig.state(0, 4), Some(State::Unplugged));
    assert_eq!(rig.state(8, 400), Some(State::Unplugged));
    assert_eq!(rig.state(3, 2), Some(State::Mixed));
    assert_eq!(rig.state(0, 512), Some(State::Mixed));
    assert_eq!(rig.state(0, 513), None);
}

#[test]
fn unplug_all_empties_and_shrinks_what_is_usable() {
    // No other reason to interrupt than the change itself.
    let mut rig = Rig::with(8 * GIB, 7 * GIB, |spec| spec.pacing.kicks_max = 0);
    assert_eq!(rig.usable(), 8 * GIB);
    assert_eq!(rig.unplug_all(), Answer::Ack, "with nothing plugged");
    for first in [0, 2, 3, 7, 100, 4095] {
        assert_eq!(rig.plug(first, 1), Answer::Ack);
    }
    rig.mem.set_requested(GIB).unwrap();
    assert_eq!(rig.usable(), 8 * GIB);
    let interrupts = rig.config_interrupts();
    assert_eq!(rig.unplug_all(), Answer::Ack);
    assert_eq!(rig.plugged(), 0);
    assert_eq!(rig.state(0, 1024), Some(State::Unplugged));
    assert_eq!(
        rig.usable(),
        4 * GIB,
        "at least what is requested (5.15.6.4)"
    );
    assert!(
        rig.driver
            .wait_interrupt(rig.driver.config_message(), interrupts + 1)
    );
    assert_eq!(rig.plug(0, 512), Answer::Ack);
    rig.mem.set_requested(0).unwrap();
    assert_eq!(rig.unplug_all(), Answer::Ack);
    assert_eq!(rig.usable(), 0);
    assert_eq!(rig.plug(0, 1), Answer::Error, "nothing is usable");
}

fn cut(parts: &[Part], len: u32) -> Vec<Part> {
    let mut pieces = Vec::new();
    for part in parts {
        let mut rest = *part;
        while rest.len > len {
            let [front, back] = rest.split(len);
            pieces.push(front);
            rest = back;
        }
        pieces.push(rest);
    }
    pieces
}

#[test]
fn any_descriptor_layout() {
    let mut rig = Rig::new(GIB, 64 * MIB);
    for piece in [1, 2, 3, 5, 8, 9, 16, 23] {
        for layout in [Layout::Direct, Layout::Indirect, Layout::Mixed(3)] {
            for kind in [Kind::Plug, Kind::Unplug] {
                let request = Request::new(rig.board.ram(), kind, BASE, 4);
                let parts = cut(&request.parts(), piece);
                let used = rig
                    .driver
                    .roundtrip(0, &mut rig.queue, &parts, layout)
                    .unwrap();
                assert_eq!(request.answer(), Answer::Ack, "{piece} {layout:?} {kind:?}");
                assert_eq!(used.written, 10);
            }
        }
    }
}

#[test]
fn longer_buffers_than_needed() {
    let mut rig = Rig::new(GIB, 64 * MIB);
    let ram = rig.board.ram().clone();
    let (request, response) = (ram.alloc(4096, 8), ram.alloc(4096, 8));
    ram.write(request, &[0xff; 4096]);
    ram.write(request, &0_u16.to_le_bytes());
    ram.write(Gpa(request.0 + 8), &BASE.to_le_bytes());
    ram.write(Gpa(request.0 + 16), &1_u16.to_le_bytes());
    ram.write(response, &[0xff; 4096]);
    let parts = [
        Part::readable(request, 4096),
        Part::writable(response, 4096),
    ];
    let used = rig
        .driver
        .roundtrip(0, &mut rig.queue, &parts, Layout::Direct)
        .unwrap();
    assert_eq!(used.written, 10);
    assert_eq!(
        ram.read(response, 12),
        [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff]
    );
    assert_eq!(rig.plugged(), BLOCK);
}

#[test]
fn what_is_no_request_wants_a_reset_and_changes_nothing() {
    let mut rig = Rig::new(GIB, 64 * MIB);
    let ram = rig.board.ram().clone();
    let plug = Request::new(&ram, Kind::Plug, BASE, 1);
    let [request, response] = plug.parts()[..] else {
        panic!("two parts")
    };
    let nowhere = |part: Part| Part {
        gpa: Gpa(1 << 35),
        ..part
    };
    let unknown = Request::raw(&ram, 4, BASE, 1);
    let far = Request::raw(&ram, u16::MAX, BASE, 1);
    let chains = [
        vec![request],
        vec![response],
        vec![Part { len: 23, ..request }, response],
        vec![request, Part { len: 9, ..response }],
        vec![nowhere(request), response],
        vec![request, nowhere(response)],
        unknown.parts(),
        far.parts(),
    ];
    for (at, chain) in chains.iter().enumerate() {
        let used = rig.queue.device_used_idx();
        rig.queue.add(chain, Layout::Direct).unwrap();
        rig.driver.kick(0);
        assert!(rig.driver.wait_needs_reset(), "chain {at}");
        assert_eq!(rig.queue.device_used_idx(), used, "chain {at}");
        assert_eq!(rig.block.plugged_bytes(), 0, "chain {at}");
        assert_eq!(rig.mem.status().driver, DriverState::Broken, "chain {at}");
        rig.restart();
        rig.assert_works();
        assert_eq!(rig.mem.status().driver, DriverState::Ready, "chain {at}");
    }
    assert_eq!(rig.mem.metrics().malformed, 6);
}

#[test]
fn several_requests_at_once_are_answered_in_order() {
    let mut rig = Rig::new(GIB, 64 * MIB);
    let ram = rig.board.ram().clone();
    let requests: Vec<_> = (0..16_u64)
        .map(|i| {
            Request::new(
                &ram,
                if i % 2 == 0 { Kind::Plug } else { Kind::Unplug },
                BASE + i / 4 * BLOCK,
                1,
            )
        })
        .collect();
    let heads: Vec<_> = requests
        .iter()
        .map(|request| rig.queue.add(&request.parts(), Layout::Direct).unwrap())
        .collect();
    rig.driver.kick(0);
    let seen: Vec<_> = heads
        .iter()
        .map(|_| rig.driver.wait_used(&mut rig.queue).unwrap().head)
        .collect();
    assert_eq!(seen, heads);
    assert!(
        requests
            .iter()
            .all(|request| request.answer() == Answer::Ack)
    );
    assert_eq!(rig.plugged(), 0);
}

/// Linux warns when the plugged size it reads after an answer is not what it expects.
#[test]
fn the_plugged_size_is_right_when_the_answer_arrives() {
    let mut rig = Rig::new(GIB, 512 * MIB);
    for round in 0..200_u64 {
        assert_eq!(rig.plug(round, 1), Answer::Ack);
        assert_eq!(rig.plugged(), (round + 1) * BLOCK);
    }
    for round in (0..200_u64).rev() {
        assert_eq!(rig.unplug(round, 1), Answer::Ack);
        assert_eq!(rig.plugged(), round * BLOCK);
    }
}

/// The plugged size has 64 bits, which a driver reads in two halves: only the generation tells it that it has one half
/// of each of two sizes. An interrupt would make Linux begin anew, so there is none for what it asked for itself.
#[test]
fn the_generation_tells_of_a_new_plugged_size_and_no_interrupt_does() {
    let mut rig = Rig::with(GIB, 64 * MIB, |spec| spec.pacing.kicks_max = 0);
    let interrupts = rig.config_interrupts();
    let requests = [
        (Kind::Plug, true),
        (Kind::Unplug, true),
        (Kind::Plug, true),
        (Kind::State, false),
        (Kind::UnplugAll, true),
        (Kind::UnplugAll, false),
    ];
    for (kind, changes) in requests {
        rig.driver.read_config(config::PLUGGED_SIZE, 4);
        let before = rig.driver.read_common(common::GENERATION, 1);
        assert_eq!(rig.ask(kind, 0, 4), Answer::Ack, "{kind:?}");
        let after = rig.driver.read_common(common::GENERATION, 1);
        assert_eq!(before != after, changes, "{kind:?}");
    }
    assert_eq!(rig.usable(), GIB, "it has not shrunk");
    assert_eq!(rig.config_interrupts(), interrupts);
}

#[test]
fn a_device_reset_leaves_memory_as_it_is() {
    let mut rig = Rig::new(GIB, 64 * MIB);
    assert_eq!(rig.plug(0, 8), Answer::Ack);
    rig.board.ram().write(rig.gpa(5), b"ebbtide!");
    rig.driver.reset().unwrap();
    assert_eq!(rig.mem.status().plugged_bytes, 8 * BLOCK);
    rig.restart();
    assert_eq!(rig.plugged(), 8 * BLOCK);
    assert_eq!(rig.state(0, 8), Some(State::Plugged));
    assert_eq!(rig.board.ram().read(rig.gpa(5), 8), b"ebbtide!");
}

#[test]
fn a_system_reset_takes_all_memory_back() {
    let mut rig = Rig::new(8 * GIB, 7 * GIB);
    for first in [0, 1, 5, 4000] {
        assert_eq!(rig.plug(first, 1), Answer::Ack);
    }
    rig.mem.set_requested(64 * MIB).unwrap();
    block_on(rig.function.quiesce(), LATER).unwrap();
    block_on(rig.mem.system_reset(), LATER).unwrap().unwrap();
    assert_eq!(rig.block.plugged_bytes(), 0);
    let status = rig.mem.status();
    assert_eq!(
        (
            status.plugged_bytes,
            status.requested_bytes,
            status.usable_bytes
        ),
        (0, 64 * MIB, 4 * GIB)
    );
}

#[test]
fn a_requested_size_that_cannot_be() {
    let rig = Rig::new(GIB, 64 * MIB);
    let interrupts = rig.config_interrupts();
    for bytes in [BLOCK - 1, MIB, GIB + BLOCK, u64::MAX, u64::MAX - BLOCK + 1] {
        let error = rig.mem.set_requested(bytes).unwrap_err();
        assert!(matches!(error, MemError::Requested { .. }));
        assert!(error.to_string().contains(&bytes.to_string()), "{error}");
    }
    assert_eq!(rig.requested(), 64 * MIB);
    assert_eq!(rig.config_interrupts(), interrupts);
    rig.mem.set_requested(GIB).unwrap();
}

#[test]
fn the_driver_is_told_of_every_request_also_of_the_same() {
    let rig = Rig::new(GIB, 0);
    let message = rig.driver.config_message();
    let before = rig.config_interrupts();
    for (at, bytes) in (1..).zip([64 * MIB, 64 * MIB, 0, 0, GIB]) {
        rig.mem.set_requested(bytes).unwrap();
        assert!(rig.driver.wait_interrupt(message, before + at), "{bytes}");
        assert_eq!(rig.requested(), bytes);
    }
    assert_eq!(rig.config_interrupts(), before + 5);
}

#[test]
fn specifications_that_cannot_be() {
    use ebbtide_memory::{Backing, RamSpec};
    use ebbtide_virtio::mem::{MemSpec, VirtioMem};
    let rig = Rig::new(GIB, 0);
    let blocking = std::sync::Arc::new(ebbtide_iothread::Blocking::new("blocking", 1).unwrap());
    let refuse = |spec: MemSpec| {
        let (events, _hear) = ebbtide_iothread::channel();
        match VirtioMem::new(
            spec,
            rig.board.remote(),
            std::sync::Arc::clone(&blocking),
            events,
        ) {
            Ok(_) => panic!("accepted"),
            Err(error) => error.to_string(),
        }
    };
    let at = |addr| MemSpec::new("vmem1", &rig.block, Gpa(addr));
    assert!(refuse(at(BASE + MIB)).contains("not a multiple of the block size"));
    assert!(refuse(at(u64::MAX - BLOCK + 1)).contains("too high"));
    let mut odd = at(BASE);
    odd.requested_bytes = MIB;
    assert!(refuse(odd).contains("multiple of 2097152 and at most 1073741824"));
    let plain = RamSpec {
        name: "plain".into(),
        size_bytes: 4 * MIB,
        max_size_bytes: 4 * MIB,
        backing: Backing::Anon { thp: false },
        prefault: false,
        block_size_bytes: None,
    };
    let plain = rig.board.memory().ram().add(plain).unwrap();
    assert!(refuse(MemSpec::new("vmem1", &plain, Gpa(BASE))).contains("not sparse"));
    // Of the refused nothing is left: only the first device requires discards.
    let rules = rig.board.memory().discards();
    assert_eq!(rules.counts().coordinated_required, 1);
    let other = plugging::sparse_memory();
    let _never = other.discards().disable("pmem0").unwrap();
    let block = other.ram().by_name("vmem1").unwrap();
    let error = refuse(MemSpec::new("vmem1", &block, Gpa(BASE)));
    assert!(
        error.contains("pmem0 (disable discarding of RAM)"),
        "{error}"
    );
}

#[test]
fn interrupts_for_answers() {
    let mut rig = Rig::new(GIB, 64 * MIB);
    assert!(!rig.queue.enable_interrupts());
    let message = rig.driver.queue_message(0);
    let before = rig.driver.interrupts(message);
    assert_eq!(rig.plug(0, 1), Answer::Ack);
    assert!(rig.driver.wait_interrupt(message, before + 1));
    let _: &VirtioDriver = &rig.driver;
}
