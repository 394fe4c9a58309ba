// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Registers behind a gate: once it is closed, reads are all ones and writes are dropped, as on a bus without the device.

use std::sync::Arc;

use ebbtide_gate::{Entry, Gate, Handle};
use ebbtide_memory::Mmio;

/// What a read of `size` bytes returns where nothing answers.
pub fn all_ones(size: u8) -> u64 {
    match size {
        1 => 0xff,
        2 => 0xffff,
        4 => 0xffff_ffff,
        _ => u64::MAX,
    }
}

/// Registers that belong to a device with the gate `gate`.
pub fn behind(gate: &Arc<Gate>, registers: Arc<dyn Mmio>) -> Arc<dyn Mmio> {
    Arc::new(Behind {
        gate: Arc::clone(gate),
        registers,
    })
}

struct Behind {
    gate: Arc<Gate>,
    registers: Arc<dyn Mmio>,
}

impl Mmio for Behind {
    fn read(&self, offset: u64, size: u8) -> u64 {
        match self.gate.enter(Entry::Mmio) {
            Some(_lease) => self.registers.read(offset, size),
            None => all_ones(size),
        }
    }

    fn write(&self, offset: u64, size: u8, value: u64) {
        if let Some(_lease) = self.gate.enter(Entry::Mmio) {
            self.registers.write(offset, size, value);
        }
    }

    fn gate(&self) -> Option<&Arc<Gate>> {
        Some(&self.gate)
    }
}

/// The registers of an owned device. A memory region may outlive the device: it does not keep it alive.
pub fn registers<D: Mmio + 'static>(device: Handle<D>) -> Arc<dyn Mmio> {
    Arc::new(Entered(device))
}

struct Entered<D>(Handle<D>);

impl<D: Mmio + 'static> Mmio for Entered<D> {
    fn read(&self, offset: u64, size: u8) -> u64 {
        match self.0.enter(Entry::Mmio) {
            Some(device) => device.read(offset, size),
            None => all_ones(size),
        }
    }

    fn write(&self, offset: u64, size: u8, value: u64) {
        if let Some(device) = self.0.enter(Entry::Mmio) {
            device.write(offset, size, value);
        }
    }

    fn gate(&self) -> Option<&Arc<Gate>> {
        Some(self.0.gate())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ebbtide_gate::Owned;
    use std::sync::atomic::{AtomicU64, Ordering};

    #[derive(Default)]
    struct Scratch(AtomicU64);
    impl Mmio for Scratch {
        fn read(&self, _offset: u64, _size: u8) -> u64 {
            self.0.load(Ordering::SeqCst)
        }
        fn write(&self, _offset: u64, _size: u8, value: u64) {
            self.0.store(value, Ordering::SeqCst);
        }
    }

    fn check(mmio: &dyn Mmio, close: impl FnOnce()) {
        mmio.write(0, 4, 5);
        assert_eq!(mmio.read(0, 4), 5);
        close();
        mmio.write(0, 4, 6);
        assert_eq!(mmio.read(0, 1), 0xff);
        assert_eq!(mmio.read(0, 2), 0xffff);
        assert_eq!(mmio.read(0, 4), 0xffff_ffff);
        assert_eq!(mmio.read(0, 8), u64::MAX);
    }

    #[test]
    fn closed_gate_reads_all_ones_and_drops_writes() {
        let gate = Gate::new("scratch");
        let scratch = Arc::new(Scratch::default());
        check(&*behind(&gate, scratch.clone()), || {
            gate.close();
        });
        assert_eq!(scratch.0.load(Ordering::SeqCst), 5);
    }

    /// What dispatch tells devices apart by, to keep DMA of one out of its own registers.
    #[test]
    fn registers_name_the_gate_of_their_device() {
        let gate = Gate::new("scratch");
        let registers_behind = behind(&gate, Arc::new(Scratch::default()));
        assert!(
            registers_behind
                .gate()
                .is_some_and(|it| Arc::ptr_eq(it, &gate))
        );
        let owned = Owned::new("scratch", Scratch::default());
        let entered = registers(owned.handle());
        assert!(
            entered
                .gate()
                .is_some_and(|it| Arc::ptr_eq(it, owned.gate()))
        );
    }

    #[test]
    fn closed_owner_reads_all_ones_and_drops_writes() {
        let owned = Owned::new("scratch", Scratch::default());
        check(&*registers(owned.handle()), || owned.close());
        assert_eq!(owned.get().0.load(Ordering::SeqCst), 5);
    }
}
