// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a queue does with rings no honest driver writes. (Honest ones: `tests/oracle.rs`.)

use std::sync::Arc;

use ebbtide_memory::{AddressSpace, Backing, Gpa, Memory, MemoryConfig, RamSpec, Reader, Region};

use super::*;
use crate::features;

mod in_flight;

const SIZE: u16 = 8;
const RAM_BYTES: u64 = 0x20_0000;
const CONFIG: QueueConfig = QueueConfig {
    size: SIZE,
    desc: Gpa(0x1000),
    avail: Gpa(0x2000),
    used: Gpa(0x3000),
};
const TABLE: u64 = 0x10_0000;
const ALL: u64 = features::RING_INDIRECT_DESC | features::RING_EVENT_IDX;
const NEXT: u16 = Descriptor::NEXT;
const WRITE: u16 = Descriptor::WRITE;
const INDIRECT: u16 = Descriptor::INDIRECT;

struct Rings {
    space: Arc<AddressSpace>,
    reader: Reader,
    queue: Queue,
}

impl Rings {
    fn new(negotiated: u64) -> Self {
        let memory = Memory::new(MemoryConfig {
            arena_bytes: 1 << 30,
        })
        .unwrap();
        let spec = RamSpec {
            name: "ram".into(),
            size_bytes: RAM_BYTES,
            max_size_bytes: RAM_BYTES,
            backing: Backing::Anon { thp: false },
            prefault: false,
            block_size_bytes: None,
        };
        let ram = memory.ram().add(spec).unwrap();
        let root = Region::container("root", 1 << 64);
        memory
            .update(|map| map.add(&root, &Region::ram("ram", &ram), 0, 0))
            .unwrap();
        let space = memory.address_space("memory", &root).unwrap();
        let reader = memory.register();
        let queue = Queue::new(&space, CONFIG, negotiated).unwrap();
        Self {
            space,
            reader,
            queue,
        }
    }

    fn put(&self, gpa: u64, bytes: &[u8]) {
        self.space
            .read(&self.reader)
            .write_bytes(Gpa(gpa), bytes)
            .unwrap();
    }

    fn get_u16(&self, gpa: u64) -> u16 {
        self.space.read(&self.reader).read(Gpa(gpa)).unwrap()
    }

    fn descriptor(&self, table: u64, index: u16, address: u64, length: u32, flags: u16, next: u16) {
        let descriptor = Descriptor::new(address, length, flags, next);
        self.put(
            table + 16 * u64::from(index),
            zerocopy::IntoBytes::as_bytes(&descriptor),
        );
    }

    fn direct(&self, index: u16, address: u64, length: u32, flags: u16, next: u16) {
        self.descriptor(CONFIG.desc.0, index, address, length, flags, next);
    }

    fn make_available(&self, heads: &[u16], index: u16) {
        for (slot, head) in heads.iter().enumerate() {
            self.put(CONFIG.avail.0 + 4 + 2 * slot as u64, &head.to_le_bytes());
        }
        self.put(CONFIG.avail.0 + 2, &index.to_le_bytes());
    }

    fn pop(&mut self) -> Result<Option<Chain>, QueueError> {
        self.queue.pop(&self.space.read(&self.reader))
    }

    /// The error of the first pop; the queue must be broken afterwards.
    fn error(&mut self) -> QueueError {
        let error = self.pop().unwrap_err();
        assert!(
            matches!(self.pop(), Err(QueueError::Broken)),
            "broken after {error}"
        );
        error
    }
}

/// The error for a chain at descriptor 0.
fn error_of(negotiated: u64, write: impl FnOnce(&Rings)) -> QueueError {
    let mut rings = Rings::new(negotiated);
    write(&rings);
    rings.make_available(&[0], 1);
    rings.error()
}

#[test]
fn a_fresh_queue_has_nothing() {
    let mut rings = Rings::new(ALL);
    assert_eq!(rings.pop().unwrap(), None);
    let guard = rings.space.read(&rings.reader);
    assert!(!rings.queue.needs_interrupt(&guard).unwrap());
    assert!(!rings.queue.enable_kick(&guard).unwrap());
}

#[test]
fn sizes_and_alignments_are_checked() {
    let rings = Rings::new(ALL);
    let new = |config| Queue::new(&rings.space, config, ALL).map(|_| ());
    for size in [0, 3, 32769, 65535] {
        assert!(
            matches!(
                new(QueueConfig { size, ..CONFIG }),
                Err(QueueError::Size { .. })
            ),
            "{size}"
        );
    }
    assert!(
        new(QueueConfig {
            size: MAX_SIZE,
            ..CONFIG
        })
        .is_ok()
    );
    for config in [
        QueueConfig {
            desc: Gpa(0x1008),
            ..CONFIG
        },
        QueueConfig {
            avail: Gpa(0x2001),
            ..CONFIG
        },
        QueueConfig {
            used: Gpa(0x3002),
            ..CONFIG
        },
    ] {
        assert!(
            matches!(new(config), Err(QueueError::Misaligned { .. })),
            "{config:?}"
        );
    }
}

#[test]
fn rings_outside_ram_are_found_out() {
    let rings = Rings::new(ALL);
    let guard = rings.space.read(&rings.reader);
    for gpa in [RAM_BYTES, RAM_BYTES - 4, !15, 1 << 63] {
        for config in [
            QueueConfig {
                desc: Gpa(gpa & !15),
                ..CONFIG
            },
            QueueConfig {
                avail: Gpa(gpa),
                ..CONFIG
            },
            QueueConfig {
                used: Gpa(gpa),
                ..CONFIG
            },
        ] {
            let queue = Queue::new(&rings.space, config, ALL).unwrap();
            assert!(
                matches!(queue.check(&guard), Err(QueueError::Access { .. })),
                "{config:?}"
            );
        }
    }
    assert!(rings.queue.check(&guard).is_ok());
}

#[test]
fn an_index_may_be_ahead_by_the_size_and_no_more() {
    let mut rings = Rings::new(0);
    (0..SIZE).for_each(|index| rings.direct(index, 0x8000, 1, 0, 0));
    rings.make_available(&[0, 1, 2, 3, 4, 5, 6, 7], SIZE);
    assert_eq!(rings.pop().unwrap().unwrap().head, 0);

    for index in [SIZE + 1, 0x7fff, 0xffff] {
        let mut rings = Rings::new(0);
        rings.make_available(&[0], index);
        assert!(
            matches!(rings.error(), QueueError::AvailIndexJump { .. }),
            "{index}"
        );
    }
}

#[test]
fn heads_and_links_outside_the_table_are_refused() {
    let mut rings = Rings::new(0);
    rings.make_available(&[SIZE], 1);
    assert!(matches!(
        rings.error(),
        QueueError::DescriptorIndex { index: SIZE, .. }
    ));
    let error = error_of(0, |rings| rings.direct(0, 0x8000, 1, NEXT, 0xffff));
    assert!(matches!(
        error,
        QueueError::DescriptorIndex { index: 0xffff, .. }
    ));
    let error = error_of(ALL, |rings| {
        rings.direct(0, TABLE, 32, INDIRECT, 0);
        rings.descriptor(TABLE, 0, 0x8000, 1, NEXT, 2);
    });
    assert!(matches!(
        error,
        QueueError::DescriptorIndex {
            index: 2,
            entries: 2
        }
    ));
}

#[test]
fn loops_end() {
    let error = error_of(0, |rings| rings.direct(0, 0x8000, 1, NEXT, 0));
    assert!(matches!(error, QueueError::ChainTooLong { .. }));
    let error = error_of(0, |rings| {
        rings.direct(0, 0x8000, 1, NEXT, 5);
        rings.direct(5, 0x8000, 1, NEXT, 0);
    });
    assert!(matches!(error, QueueError::ChainTooLong { .. }));
    let error = error_of(ALL, |rings| {
        rings.direct(0, TABLE, 32, INDIRECT, 0);
        rings.descriptor(TABLE, 0, 0x8000, 0, NEXT, 1);
        rings.descriptor(TABLE, 1, 0x8000, 0, NEXT, 0);
    });
    assert!(matches!(error, QueueError::ChainTooLong { .. }));
}

#[test]
fn a_chain_may_use_the_whole_table() {
    let mut rings = Rings::new(0);
    for index in 0..SIZE {
        rings.direct(
            index,
            0x8000,
            1,
            if index + 1 < SIZE { NEXT } else { 0 },
            index + 1,
        );
    }
    rings.make_available(&[0], 1);
    assert_eq!(
        rings.pop().unwrap().unwrap().readable.len(),
        usize::from(SIZE)
    );
}

#[test]
fn indirect_tables_are_bounded() {
    let table_of = |entries: u32| {
        let mut rings = Rings::new(ALL);
        rings.direct(0, TABLE, 16 * entries, INDIRECT, 0);
        for index in 0..entries {
            let last = index + 1 == entries;
            rings.descriptor(
                TABLE,
                index as u16,
                0x8000,
                1,
                if last { 0 } else { NEXT },
                index as u16 + 1,
            );
        }
        rings.make_available(&[0], 1);
        rings.pop()
    };
    assert_eq!(
        table_of(MAX_INDIRECT_CHAIN)
            .unwrap()
            .unwrap()
            .readable
            .total_len(),
        MAX_INDIRECT_CHAIN
    );
    assert!(matches!(
        table_of(MAX_INDIRECT_CHAIN + 1),
        Err(QueueError::ChainTooLong { .. })
    ));
}

#[test]
fn indirect_rules() {
    let table = |length, flags| {
        error_of(ALL, move |rings: &Rings| {
            rings.direct(0, TABLE, length, flags, 1)
        })
    };
    for length in [0, 8, 17, 31, u32::MAX] {
        assert!(
            matches!(table(length, INDIRECT), QueueError::IndirectLength { .. }),
            "{length}"
        );
    }
    assert!(matches!(
        table(16, INDIRECT | NEXT),
        QueueError::IndirectWithNext { head: 0 }
    ));
    let error = error_of(features::RING_EVENT_IDX, |rings| {
        rings.direct(0, TABLE, 16, INDIRECT, 0)
    });
    assert!(matches!(
        error,
        QueueError::IndirectNotNegotiated { head: 0 }
    ));
    let error = error_of(ALL, |rings| {
        rings.direct(0, TABLE, 16, INDIRECT, 0);
        rings.descriptor(TABLE, 0, TABLE, 16, INDIRECT, 0);
    });
    assert!(matches!(error, QueueError::IndirectNested { head: 0 }));
    let error = error_of(ALL, |rings| rings.direct(0, RAM_BYTES, 16, INDIRECT, 0));
    assert!(matches!(
        error,
        QueueError::Access {
            ring: Ring::Indirect,
            ..
        }
    ));
    let error = error_of(ALL, |rings| rings.direct(0, u64::MAX - 7, 16, INDIRECT, 0));
    assert!(matches!(error, QueueError::AddressOverflow { .. }));
}

#[test]
fn the_write_flag_of_an_indirect_descriptor_means_nothing() {
    let mut rings = Rings::new(ALL);
    rings.direct(0, 0x8000, 5, WRITE | NEXT, 1);
    rings.direct(1, TABLE, 16, INDIRECT, 0);
    rings.descriptor(TABLE, 0, 0x9000, 7, WRITE, 0);
    rings.make_available(&[0], 1);
    let chain = rings.pop().unwrap().unwrap();
    assert_eq!(&*chain.writable, [(Gpa(0x8000), 5), (Gpa(0x9000), 7)]);
    assert!(chain.readable.is_empty());
}

#[test]
fn readable_behind_writable_is_refused() {
    for length in [0, 1] {
        let error = error_of(0, |rings| {
            rings.direct(0, 0x8000, length, WRITE | NEXT, 1);
            rings.direct(1, 0x9000, 1, 0, 0);
        });
        assert!(
            matches!(error, QueueError::ReadableAfterWritable { head: 0 }),
            "{length}"
        );
    }
}

#[test]
fn lengths_are_summed_without_overflow() {
    let error = error_of(0, |rings| {
        rings.direct(0, 0x8000, u32::MAX, NEXT, 1);
        rings.direct(1, 0x8000, 1, WRITE, 0);
    });
    assert!(matches!(error, QueueError::LengthOverflow { head: 0 }));

    let mut rings = Rings::new(0);
    rings.direct(0, 0x8000, u32::MAX - 1, NEXT, 1);
    rings.direct(1, 0x8000, 1, WRITE, 0);
    rings.make_available(&[0], 1);
    let chain = rings.pop().unwrap().unwrap();
    assert_eq!(
        (chain.readable.total_len(), chain.writable.total_len()),
        (u32::MAX - 1, 1)
    );
}

#[test]
fn buffers_do_not_wrap_around_the_address_space() {
    let error = error_of(0, |rings| rings.direct(0, u64::MAX - 3, 5, 0, 0));
    assert!(matches!(error, QueueError::AddressOverflow { .. }));
    let mut rings = Rings::new(0);
    rings.direct(0, u64::MAX - 3, 4, 0, 0);
    rings.make_available(&[0], 1);
    let chain = rings.pop().unwrap().unwrap();
    let guard = rings.space.read(&rings.reader);
    assert!(
        chain.readable.copy_to(&guard, &mut [0; 4]).is_err(),
        "it is not RAM either"
    );
}

#[test]
fn the_driver_can_do_without_interrupts() {
    let mut rings = Rings::new(0);
    rings.direct(0, 0x8000, 1, 0, 0);
    rings.make_available(&[0, 0], 2);
    for (flags, wanted) in [(1u16, false), (0, true)] {
        rings.put(CONFIG.avail.0, &flags.to_le_bytes());
        rings.pop().unwrap().unwrap();
        let guard = rings.space.read(&rings.reader);
        rings.queue.push_used(&guard, 0, 0).unwrap();
        assert_eq!(rings.queue.needs_interrupt(&guard).unwrap(), wanted);
    }
}

#[test]
fn kicks_that_are_on_again_do_not_hide_what_came_before() {
    for negotiated in [0, features::RING_EVENT_IDX] {
        let mut rings = Rings::new(negotiated);
        rings.direct(0, 0x8000, 1, 0, 0);
        let guard = rings.space.read(&rings.reader);
        rings.queue.disable_kick(&guard).unwrap();
        assert!(rings.queue.pop(&guard).unwrap().is_none());
        rings.make_available(&[0], 1);
        assert!(rings.queue.enable_kick(&guard).unwrap());
        assert!(rings.queue.pop(&guard).unwrap().is_some());
        assert!(!rings.queue.enable_kick(&guard).unwrap());
        let event = rings.get_u16(CONFIG.used.0 + 4 + 8 * u64::from(SIZE));
        assert_eq!(event, if negotiated == 0 { 0 } else { 1 });
    }
}

#[test]
fn impossible_saved_indices_are_refused() {
    let rings = Rings::new(ALL);
    let state = QueueState {
        next_avail: 9,
        next_used: 0,
        ..rings.queue.save()
    };
    assert!(matches!(
        Queue::restore(&rings.space, &state),
        Err(QueueError::State { .. })
    ));
    let state = QueueState {
        next_avail: 3,
        next_used: 65534,
        ..state
    };
    assert_eq!(Queue::restore(&rings.space, &state).unwrap().in_flight(), 5);
}

#[test]
fn a_chain_that_is_used_again_keeps_nothing() {
    let mut rings = Rings::new(0);
    rings.direct(0, 0x8000, 3, NEXT, 1);
    rings.direct(1, 0x9000, 4, WRITE, 0);
    rings.direct(2, 0xa000, 5, 0, 0);
    rings.make_available(&[0, 2], 2);
    let guard = rings.space.read(&rings.reader);
    let mut chain = Chain::new(7);
    for head in [0, 2] {
        assert!(rings.queue.pop_into(&guard, &mut chain).unwrap());
        assert_eq!(chain.head, head);
    }
    assert_eq!(&chain.readable[..], [(Gpa(0xa000), 5)]);
    assert_eq!((chain.writable.len(), chain.writable.total_len()), (0, 0));
    assert!(!rings.queue.pop_into(&guard, &mut chain).unwrap());
}

#[test]
fn buffers_split_anywhere() {
    let mut rings = Rings::new(0);
    rings.direct(0, 0x8000, 3, NEXT, 1);
    rings.direct(1, 0x9000, 0, NEXT, 2);
    rings.direct(2, 0xa000, 5, 0, 0);
    rings.put(0x8000, b"abc");
    rings.put(0xa000, b"defgh");
    rings.make_available(&[0], 1);
    let whole = rings.pop().unwrap().unwrap().readable;
    let guard = rings.space.read(&rings.reader);
    let text = |buffers: &Buffers| {
        let mut bytes = vec![0; 16];
        let copied = buffers.copy_to(&guard, &mut bytes).unwrap();
        assert_eq!(copied, buffers.total_len() as usize);
        String::from_utf8(bytes[..copied].to_vec()).unwrap()
    };
    assert_eq!(text(&whole), "abcdefgh");
    for at in 0..=8 {
        let mut back = whole.clone();
        let front = back.split_front(at).unwrap();
        assert_eq!(
            (text(&front), text(&back)),
            (
                "abcdefgh"[..at as usize].into(),
                "abcdefgh"[at as usize..].into()
            )
        );
        let mut front = whole.clone();
        let back = front.split_back(8 - at).unwrap();
        assert_eq!(
            (text(&front), text(&back)),
            (
                "abcdefgh"[..at as usize].into(),
                "abcdefgh"[at as usize..].into()
            )
        );
        assert!(
            front
                .iter()
                .chain(back.iter())
                .all(|(_, length)| *length > 0)
        );
    }
    assert!(whole.clone().split_front(9).is_none() && whole.clone().split_back(9).is_none());
    let (mut front, mut none) = (whole.clone(), whole.clone());
    assert_eq!(front.read_front(&guard).unwrap(), Some(*b"abc"));
    assert_eq!(front.read_front(&guard).unwrap(), Some(*b"de"));
    assert_eq!(text(&front), "fgh");
    assert_eq!(none.read_front::<9>(&guard).unwrap(), None);
    assert_eq!(text(&none), "abcdefgh");
    assert_eq!(none.read_front(&guard).unwrap(), Some(*b"abcdefgh"));
    let mut last = whole.clone();
    for at in [0xa004, 0xa003, 0xa002, 0xa001, 0xa000, 0x8002] {
        assert_eq!(last.pop_byte(), Some(Gpa(at)));
    }
    assert_eq!(text(&last), "ab");
    assert!(last.pop_byte().is_some() && last.pop_byte().is_some());
    assert_eq!((last.pop_byte(), last.total_len()), (None, 0));
    assert_eq!(whole.copy_from(&guard, b"ABCDEFGHI").unwrap(), 8);
    assert_eq!(text(&whole), "ABCDEFGH");
    assert_eq!(whole.copy_from(&guard, b"xy").unwrap(), 2);
    assert_eq!(text(&whole), "xyCDEFGH");
}
