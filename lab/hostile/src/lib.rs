// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A guest that does to its devices what no driver would, at random but the same for the same seed.
//!
//! It ejects slots nobody asked for, writes hot-plug registers, configuration space and BARs at every width and
//! alignment, moves bridges' buses and windows, rings doorbells of queues whose descriptors point anywhere, and resets
//! the machine in the middle of it. Between that it mends what it broke, so that there is something to break again, and
//! brings disks up properly, so that there is DMA to eject them under.
//!
//! What it does depends on the seed and on what it reads from its devices. This library is all of it but the processor:
//! accesses go through a [`Board`]. The program `ebbtide-hostile` is the guest; a test plays the board.
//!
//! A second guest, `ebbtide-ejector`, does one thing only and keeps to the rules in all else: it ejects disks whose
//! requests are under way, and takes the time of it. It says what it found in lines that [`ejector`] describes.
#![cfg_attr(not(test), no_std)]

mod acts;
#[cfg(feature = "guest")]
pub mod bare;
pub mod disk;
pub mod ejector;
mod functions;
mod queues;
mod random;

#[cfg(test)]
mod tests;

pub use acts::Hostile;
pub use functions::{Function, Functions};
pub use random::Random;

/// How many bytes an access has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Width {
    /// One byte.
    Byte,
    /// Two.
    Word,
    /// Four.
    Dword,
    /// Eight; of memory only.
    Qword,
}

/// The machine as a processor sees it. Values are in the low bits.
pub trait Board {
    /// Reads from an I/O port; never 8 bytes.
    fn port_read(&mut self, port: u16, width: Width) -> u32;
    /// Writes to an I/O port; never 8 bytes.
    fn port_write(&mut self, port: u16, width: Width, value: u32);
    /// Reads from guest-physical memory, at any alignment.
    fn read(&mut self, at: u64, width: Width) -> u64;
    /// Writes to guest-physical memory, at any alignment.
    fn write(&mut self, at: u64, width: Width, value: u64);
    /// Ends this life by an exception that nobody takes: a triple fault.
    fn fault(&mut self);
}

/// Guest-physical addresses.
pub mod map {
    use core::ops::Range;

    /// What DMA may scribble over without harm: neither code nor tables are here.
    pub const ARENA: Range<u64> = 0x200_0000..0x600_0000;
    /// The guest's own code; DMA comes here, too, now and then.
    pub const CODE: u64 = 0x20_0000;
    /// Counts the lives of this guest: memory outlives a reset.
    pub const LIVES: u64 = 0x180_0000;
    /// Configuration space.
    pub const ECAM: u64 = 0xe000_0000;
    /// The 32-bit window of PCI.
    pub const WINDOW: Range<u64> = 0xc000_0000..0xe000_0000;
    /// Above what the VMM itself gives out of it.
    pub const HOLE: u64 = WINDOW.end - (WINDOW.end - WINDOW.start) / 4;
    /// What the page tables reach.
    pub const END: u64 = 512 << 30;
}
