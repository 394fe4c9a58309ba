// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! MSI-X as a driver programs it.

use super::*;
use crate::pci::fakes::{FakeController, FakeRoute};
use std::sync::atomic::{AtomicBool, Ordering};

const ON: u16 = CONTROL_ENABLE;
const MASK_ALL: u16 = CONTROL_ENABLE | CONTROL_FUNCTION_MASK;
const MESSAGE: MsiMessage = MsiMessage {
    address: 0x1_fee0_1000,
    data: 0x4021,
};

struct Bench {
    controller: FakeController,
    msix: Arc<Msix>,
}

fn bench(vectors: u16) -> Bench {
    let controller = FakeController::default();
    let msix = Msix::new(vectors, &controller).unwrap();
    Bench { controller, msix }
}

impl Bench {
    fn route(&self, vector: usize) -> Arc<FakeRoute> {
        self.controller.route_of(vector)
    }

    fn write_message(&self, vector: u64, message: MsiMessage) {
        self.msix
            .write(vector * 16, 4, message.address & 0xffff_ffff);
        self.msix.write(vector * 16 + 4, 4, message.address >> 32);
        self.msix.write(vector * 16 + 8, 4, message.data.into());
    }

    fn mask(&self, vector: u64, masked: bool) {
        self.msix.write(vector * 16 + 12, 4, masked.into());
    }

    fn signal(&self, vector: u16) {
        self.msix.vector(vector).unwrap().signal();
    }

    fn pending(&self, vector: u64) -> bool {
        let word = self.msix.read(self.msix.half_bytes + vector / 64 * 8, 8);
        word >> (vector % 64) & 1 != 0
    }

    /// On, vector 0 unmasked with `MESSAGE`.
    fn start(&self) {
        self.msix.set_control(ON);
        self.write_message(0, MESSAGE);
        self.mask(0, false);
        self.route(0).programmed();
    }
}

#[test]
fn at_power_on_everything_is_masked_and_zero() {
    let bench = bench(3);
    for vector in 0..3 {
        let dwords: Vec<_> = (0..4)
            .map(|dword| bench.msix.read(vector * 16 + dword * 4, 4))
            .collect();
        assert_eq!(dwords, [0, 0, 0, 1]);
    }
    assert!(!bench.msix.enabled());
    assert_eq!(bench.msix.read(48, 8), 0, "past the last entry");
}

#[test]
fn a_message_is_delivered() {
    let bench = bench(2);
    bench.start();
    assert_eq!(bench.route(0).message(), Some(MESSAGE));
    bench.signal(0);
    bench.signal(0);
    assert_eq!(bench.route(0).delivered(), [MESSAGE, MESSAGE]);
    assert_eq!(bench.route(1).delivered(), []);
    assert!(!bench.pending(0));
}

#[test]
fn a_masked_vector_keeps_its_signal_until_it_is_unmasked() {
    let bench = bench(70);
    bench.start();
    bench.mask(0, true);
    bench.signal(0);
    bench.signal(0);
    bench.signal(69);
    assert_eq!(bench.route(0).delivered(), []);
    assert!(bench.pending(0) && bench.pending(69) && !bench.pending(1));
    bench.mask(0, false);
    assert_eq!(
        bench.route(0).delivered(),
        [MESSAGE],
        "several signals are one"
    );
    assert!(!bench.pending(0));
    assert_eq!(bench.route(0).programmed(), 0, "the message did not change");
}

#[test]
fn the_function_mask_masks_all() {
    let bench = bench(2);
    bench.start();
    bench.msix.set_control(MASK_ALL);
    bench.signal(0);
    assert_eq!(bench.route(0).delivered(), []);
    assert!(bench.pending(0));
    bench.mask(0, true);
    bench.msix.set_control(ON);
    assert!(bench.pending(0), "still masked by itself");
    bench.mask(0, false);
    assert_eq!(bench.route(0).delivered(), [MESSAGE]);
}

#[test]
fn linux_order_of_setup_programs_each_vector_once() {
    let bench = bench(4);
    bench.msix.set_control(MASK_ALL);
    (0..4).for_each(|vector| bench.mask(vector, true));
    bench.write_message(1, MESSAGE);
    bench.mask(1, false);
    bench.msix.set_control(ON);
    let programmed: Vec<_> = (0..4)
        .map(|vector| bench.route(vector).programmed())
        .collect();
    assert_eq!(programmed, [0, 1, 0, 0]);
    bench.signal(1);
    assert_eq!(bench.route(1).delivered(), [MESSAGE]);
}

#[test]
fn a_message_may_change_under_a_mask_or_without() {
    let bench = bench(1);
    bench.start();
    let next = MsiMessage {
        address: 0xfee0_2000,
        data: 0x30,
    };
    bench.mask(0, true);
    bench.write_message(0, next);
    bench.signal(0);
    bench.mask(0, false);
    assert_eq!(bench.route(0).delivered(), [next]);
    assert_eq!(bench.route(0).programmed(), 1);
    bench.msix.write(8, 4, 0x31);
    bench.signal(0);
    assert_eq!(
        bench.route(0).delivered(),
        [MsiMessage { data: 0x31, ..next }]
    );
}

#[test]
fn a_qword_is_written_at_once() {
    let bench = bench(1);
    bench.start();
    bench.msix.write(0, 8, 0x2_fee0_3000);
    assert_eq!(bench.route(0).programmed(), 1);
    assert_eq!(bench.route(0).message().unwrap().address, 0x2_fee0_3000);
    assert_eq!(bench.msix.read(0, 8), 0x2_fee0_3000);
    bench.msix.write(8, 8, 1 << 32 | 0x55);
    assert_eq!(bench.msix.read(8, 8), 1 << 32 | 0x55);
    bench.signal(0);
    assert_eq!(bench.route(0).delivered(), [], "masked in the same write");
}

#[test]
fn reserved_bits_stay_zero() {
    let bench = bench(1);
    bench.write_message(
        0,
        MsiMessage {
            address: 0xfee0_0003,
            data: 7,
        },
    );
    bench.msix.write(12, 4, 0xffff_fffe);
    assert_eq!(bench.msix.read(0, 4), 0xfee0_0000);
    assert_eq!(bench.msix.read(12, 4), 0);
}

#[test]
fn disabled_signals_are_lost_and_nothing_is_kept() {
    let bench = bench(1);
    bench.signal(0);
    bench.start();
    assert_eq!(bench.route(0).delivered(), []);
    bench.mask(0, true);
    bench.signal(0);
    bench.msix.set_control(0);
    assert!(!bench.pending(0));
    assert_eq!(bench.route(0).message(), None);
    bench.mask(0, false);
    bench.msix.set_control(ON);
    assert_eq!(bench.route(0).delivered(), []);
    bench.signal(0);
    assert_eq!(bench.route(0).delivered(), [MESSAGE], "the table is kept");
}

#[test]
fn a_refused_message_is_pending_until_a_good_one_is_written() {
    let bench = bench(1);
    bench.route(0).refuse.store(true, Ordering::SeqCst);
    bench.start();
    bench.signal(0);
    assert!(bench.pending(0));
    bench.route(0).refuse.store(false, Ordering::SeqCst);
    bench.write_message(0, MESSAGE);
    assert_eq!(bench.route(0).delivered(), [MESSAGE]);
    assert!(!bench.pending(0));
}

#[test]
fn reset_is_power_on() {
    let bench = bench(2);
    bench.start();
    bench.mask(0, true);
    bench.signal(0);
    bench.msix.reset();
    assert!(!bench.msix.enabled() && !bench.pending(0));
    let dwords: Vec<_> = (0..4).map(|dword| bench.msix.read(dword * 4, 4)).collect();
    assert_eq!(dwords, [0, 0, 0, 1]);
    assert_eq!(bench.route(0).message(), None);
}

#[test]
fn sizes() {
    let size = |vectors| bench(vectors).msix.bar_size_bytes();
    assert_eq!(
        [size(1), size(128), size(129), size(2048)],
        [4096, 4096, 8192, 65536]
    );
    let controller = FakeController::default();
    assert!(matches!(
        Msix::new(0, &controller),
        Err(PciError::VectorCount(0))
    ));
    assert!(matches!(
        Msix::new(2049, &controller),
        Err(PciError::VectorCount(2049))
    ));
    let controller = FakeController {
        limit: Some(2),
        ..FakeController::default()
    };
    assert!(matches!(Msix::new(3, &controller), Err(PciError::Irq(_))));
    assert!(bench(3).msix.vector(3).is_none());
}

#[test]
fn narrow_reads_see_bytes_and_narrow_writes_do_nothing() {
    let bench = bench(1);
    bench.write_message(
        0,
        MsiMessage {
            address: 0xfee1_2340,
            data: 0,
        },
    );
    assert_eq!(bench.msix.read(1, 1), 0x23);
    assert_eq!(bench.msix.read(2, 2), 0xfee1);
    bench.msix.write(0, 1, 0);
    bench.msix.write(2, 2, 0);
    bench.msix.write(2, 4, 0);
    assert_eq!(bench.msix.read(0, 4), 0xfee1_2340);
}

#[test]
fn any_access_is_harmless() {
    let bench = bench(5);
    let mut seed = 0x2545_f491_4f6c_dd1d_u64;
    for _ in 0..200_000 {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        let offset = if seed & 0x700 == 0 {
            seed
        } else {
            seed % bench.msix.bar_size_bytes()
        };
        let size = [1, 2, 4, 8, 4, 8, 0, 200][(seed >> 20) as usize % 8];
        match seed >> 61 {
            0..=3 => bench.msix.write(offset, size, seed.rotate_left(23)),
            4 => bench.msix.set_control((seed >> 8) as u16),
            5 => bench.signal((seed >> 8) as u16 % 5),
            _ => drop(bench.msix.read(offset, size)),
        }
    }
}

#[test]
fn no_signal_is_lost_while_a_guest_masks_and_unmasks() {
    let bench = bench(1);
    bench.start();
    let stop = AtomicBool::new(false);
    let vector = bench.msix.vector(0).unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::SeqCst) {
                bench.mask(0, true);
                bench.route(0).delivered();
                std::thread::yield_now();
                assert_eq!(
                    bench.route(0).delivered(),
                    [],
                    "a message after the mask was set"
                );
                bench.mask(0, false);
            }
            bench.mask(0, true);
        });
        for _ in 0..20_000 {
            vector.signal();
        }
        stop.store(true, Ordering::SeqCst);
    });
    bench.route(0).delivered();
    vector.signal();
    assert!(bench.pending(0));
    bench.mask(0, false);
    assert_eq!(bench.route(0).delivered(), [MESSAGE]);
}
