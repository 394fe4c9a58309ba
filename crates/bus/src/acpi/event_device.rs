// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The register behind the Generic Event Device (ACPI 6.5, 5.6.9): which events happened since it was last read.

use std::sync::{Arc, Mutex, PoisonError};

use ebbtide_memory::Mmio;

use crate::irq::IrqLine;

/// What can happen to the platform. The value is the event's bit in the register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Event {
    /// A DIMM wants to come or go: look at the memory hot-plug registers.
    Memory = 0,
    /// The power button was pressed.
    PowerButton = 1,
    /// A PCI slot changed: look at the PCI hot-plug registers.
    Pci = 4,
}

impl Event {
    /// The event's bit.
    pub fn mask(self) -> u32 {
        1 << self as u8
    }
}

/// One 32-bit register, cleared by reading it, at offset 0 of four bytes; and a level-triggered line that is high as long
/// as a bit is set. Raising an event that is pending already adds nothing.
pub struct EventDevice {
    line: Arc<dyn IrqLine>,
    pending: Mutex<u32>,
}

impl EventDevice {
    /// Bytes of the register.
    pub const SIZE_BYTES: u64 = 4;

    /// A device without events that drives `line`.
    pub fn new(line: Arc<dyn IrqLine>) -> Self {
        Self {
            line,
            pending: Mutex::new(0),
        }
    }

    /// Tells the guest that `event` happened. Never blocks for the guest.
    pub fn raise(&self, event: Event) {
        self.update(|pending| *pending |= event.mask());
    }

    /// Presses the power button: Linux powers off in order if something in it listens.
    pub fn press_power_button(&self) {
        self.raise(Event::PowerButton);
    }

    /// Power-on state: no event, line low.
    pub fn reset(&self) {
        self.update(|pending| *pending = 0);
    }

    /// The line follows the register under the register's lock, or an event raised while another is read would be left
    /// with a low line.
    fn update<T>(&self, change: impl FnOnce(&mut u32) -> T) -> T {
        let mut pending = self.pending.lock().unwrap_or_else(PoisonError::into_inner);
        let was = *pending != 0;
        let result = change(&mut pending);
        let is = *pending != 0;
        if was != is {
            self.line.set(is);
        }
        result
    }
}

impl Mmio for EventDevice {
    fn read(&self, offset: u64, size: u8) -> u64 {
        let bits = match size {
            1 => 0xff,
            2 => 0xffff,
            4 => u32::MAX,
            _ => return u64::MAX,
        };
        if offset
            .checked_add(size.into())
            .is_none_or(|end| end > Self::SIZE_BYTES)
        {
            return u64::MAX;
        }
        let shift = 8 * offset as u32;
        // Only what is read is cleared: nothing gets lost to a guest that reads bytes.
        let read = self.update(|pending| {
            let read = *pending & (bits << shift);
            *pending &= !read;
            read
        });
        u64::from(read >> shift)
    }

    fn write(&self, _offset: u64, _size: u8, _value: u64) {}
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicBool, Ordering};

    #[derive(Default)]
    struct Line(AtomicBool);
    impl IrqLine for Line {
        fn set(&self, high: bool) {
            self.0.store(high, Ordering::SeqCst);
        }
    }
    impl Line {
        fn high(&self) -> bool {
            self.0.load(Ordering::SeqCst)
        }
    }

    #[test]
    fn button_raises_the_line_until_read() {
        let line = Arc::new(Line::default());
        let device = EventDevice::new(line.clone());
        device.press_power_button();
        device.press_power_button();
        assert!(line.high());
        assert_eq!(device.read(0, 4), 2);
        assert!(!line.high());
        assert_eq!(device.read(0, 4), 0);
    }

    #[test]
    fn reading_a_byte_keeps_the_other_events() {
        let line = Arc::new(Line::default());
        let device = EventDevice::new(line.clone());
        device.raise(Event::Pci);
        device.press_power_button();
        assert_eq!(device.read(1, 1), 0);
        assert!(line.high());
        assert_eq!(device.read(0, 1), 0x12);
        assert!(!line.high());
    }

    #[test]
    fn any_access_is_harmless() {
        let device = EventDevice::new(Arc::new(Line::default()));
        for size in [0, 1, 2, 3, 4, 8, 255] {
            for offset in (0..8).chain([u64::MAX - 1, u64::MAX]) {
                device.write(offset, size, u64::MAX);
                device.read(offset, size);
            }
        }
        assert_eq!(device.read(0, 4), 0);
    }

    #[test]
    fn reset_forgets_events() {
        let line = Arc::new(Line::default());
        let device = EventDevice::new(line.clone());
        device.press_power_button();
        device.reset();
        assert!(!line.high());
        assert_eq!(device.read(0, 4), 0);
    }

    #[test]
    fn no_event_is_lost_between_threads() {
        let line = Arc::new(Line::default());
        let device = Arc::new(EventDevice::new(line.clone()));
        let raiser = {
            let device = device.clone();
            std::thread::spawn(move || (0..10_000).for_each(|_| device.press_power_button()))
        };
        while !raiser.is_finished() {
            device.read(0, 4);
        }
        raiser.join().unwrap();
        // Whatever was raised last is either read already or visible on the line.
        assert_eq!(line.high(), device.read(0, 4) != 0);
        device.press_power_button();
        assert!(line.high());
    }
}
