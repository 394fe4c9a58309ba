// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What is said on the serial line of the guest that ejects disks.
//!
//! Its other end sends one byte for each thing that is to be done, and gets one line for each: [`LINE`], a word, numbers.
//! Times are ticks of the time stamp counter. The guest's work disk is the one that is there when it begins; all that
//! come later are to be ejected. It says [`READY`] when it can be asked.

/// What its lines begin with.
pub const LINE: &str = "flat: ";

/// It can be asked. With the slot of the work disk.
pub const READY: &str = "ready";
/// It can't go on. With a number that the source tells the meaning of.
pub const FAILED: &str = "failed";

/// Bring up the disks that have come and give a read to each. Answer: how many disks.
pub const SUBMIT: u8 = b's';
/// Begin to work on the work disk, without end. Answer: nothing else.
pub const WORK: u8 = b'w';
/// How the work goes. Answer: operations that have ended, ticks of the longest time in which none ended, errors.
pub const REPORT: u8 = b'r';
/// Write to a hot-plug register what ejects nothing. Answer: ticks it took.
pub const IDLE: u8 = b'i';
/// Eject the next disk. Answer: its slot, ticks it took, the first 4 bytes of its configuration space after that.
pub const EJECT: u8 = b'e';
/// What is in the slots. Answer, by bit for each slot: occupied; read answered with success; with another status.
pub const LOOK: u8 = b'l';
/// What time it is. Answer: the time stamp counter.
pub const CLOCK: u8 = b'c';

/// The word that answers `command`; `None`: there is no such command.
pub fn word(command: u8) -> Option<&'static str> {
    Some(match command {
        SUBMIT => "submitted",
        WORK => "working",
        REPORT => "work",
        IDLE => "idle",
        EJECT => "ejected",
        LOOK => "slots",
        CLOCK => "clock",
        _ => return None,
    })
}

/// Registers of PCI hot-plug through ACPI: which slots are occupied, what ejects, and which bus they speak of.
pub mod registers {
    /// By bit: slots that are occupied. Read.
    pub const UP: u16 = 0xae00;
    /// By bit: slots to be ejected. Written.
    pub const EJECT: u16 = 0xae08;
    /// The bus that the others speak of.
    pub const BUS: u16 = 0xae10;
    /// The root bus in [`BUS`].
    pub const BUS_0: u32 = 0;
}
