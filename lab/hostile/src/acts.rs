// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What it does, one act after the other.

use crate::functions::{Function, Functions};
use crate::queues::{self, COMMON_BYTES};
use crate::{Board, Random, Width, map};

/// Ports of the hot-plug registers, first and count (docs/hot-plug.md of the VMM names the rest).
const PCI_HOTPLUG: (u16, u16) = (0xae00, 0x18);
const PCI_EJECT: u16 = 0xae08;
const PCI_BUS: u16 = 0xae10;
const MEMORY_HOTPLUG: (u16, u16) = (0xa00, 0x18);
/// Bit 3 of the control register ejects.
const MEMORY_CONTROL: u16 = 0xa14;
const MEMORY_EJECT: u32 = 1 << 3;
/// ACPI events. The sleep register before them turns the machine off: that would end the test.
const EVENTS: (u16, u16) = (0x604, 4);
const CONFIG_ADDRESS: u16 = 0xcf8;
const CONFIG_DATA: u16 = 0xcfc;
const RESET_CONTROL: u16 = 0xcf9;
const KEYBOARD: u16 = 0x64;
/// I/O ports of PCI, first and count.
const PCI_PORTS: (u16, u16) = (0xc000, 0x4000);
/// Slot control and status in the PCI Express capability.
const SLOT_CONTROL: u64 = 0x18;
/// Power off, both indicators off: the guest lets go of what is in the slot.
const LET_GO: u64 = 0x07c0;
/// How often everything is mended and looked for: acts between.
const MEND: u64 = 512;
/// How often, in acts, the guest ends its life.
const LIFE: u64 = 4_000;

/// A guest.
pub struct Hostile {
    random: Random,
    functions: Functions,
    acts: u64,
}

impl Hostile {
    /// One that goes by `seed`.
    pub fn new(seed: u64) -> Hostile {
        Hostile {
            random: Random::new(seed),
            functions: Functions::none(u64::MAX, map::HOLE),
            acts: 0,
        }
    }

    /// How much it has done.
    pub fn acts(&self) -> u64 {
        self.acts
    }

    /// Does the next thing.
    pub fn act<B: Board>(&mut self, board: &mut B) {
        if self.acts.is_multiple_of(MEND) {
            self.functions.refresh(board);
        }
        self.acts += 1;
        if self.random.once_in(LIFE) {
            return self.end(board);
        }
        match self.random.below(64) {
            0..=7 => self.eject_by_acpi(board),
            8..=11 => self.any_port(board, PCI_HOTPLUG),
            12..=14 => self.eject_memory(board),
            15..=18 => self.any_port(board, MEMORY_HOTPLUG),
            19 => self.any_port(board, EVENTS),
            20..=25 => self.slot(board),
            26..=28 => self.configuration(board),
            29 => self.configuration_by_ports(board),
            30 => self.anything_behind_a_bridge(board),
            31..=33 => self.messages(board),
            34 => self.any_port(board, PCI_PORTS),
            35..=39 => self.registers(board),
            40..=42 => self.common(board),
            43 => self.anywhere(board),
            44..=46 => {
                if let Some(function) = self.virtio() {
                    queues::bring_up(board, &mut self.random, &function);
                }
            }
            _ => {
                if let Some(function) = self.virtio() {
                    queues::kick(board, &mut self.random, &function);
                }
            }
        }
    }

    fn some(&mut self, of: impl Fn(&Function) -> bool) -> Option<Function> {
        let matching = self.functions.known().iter().filter(|f| of(f));
        let count = matching.clone().count() as u64;
        let index = self.random.below(count) as usize;
        let mut matching = self.functions.known().iter().filter(|f| of(f));
        matching.nth(index).copied()
    }

    fn virtio(&mut self) -> Option<Function> {
        self.some(|f| f.common != 0)
    }

    /// Slots nobody asked for, and those somebody did.
    fn eject_by_acpi<B: Board>(&mut self, board: &mut B) {
        let bus = if self.random.once_in(4) {
            self.random.value() as u32
        } else {
            0
        };
        board.port_write(PCI_BUS, Width::Dword, bus);
        let slots = match self.random.below(8) {
            0 => u32::MAX,
            1 => self.random.any() as u32,
            2 => board.port_read(PCI_HOTPLUG.0 + 4, Width::Dword),
            _ => 1 << self.random.below(32),
        };
        board.port_write(PCI_EJECT, Width::Dword, slots);
    }

    fn any_port<B: Board>(&mut self, board: &mut B, ports: (u16, u16)) {
        let port = ports.0 + self.random.below(u64::from(ports.1)) as u16;
        let width = self.random.port_width();
        if self.random.once_in(3) {
            board.port_read(port, width);
        } else {
            board.port_write(port, width, self.random.value() as u32);
        }
    }

    fn eject_memory<B: Board>(&mut self, board: &mut B) {
        let slot = self.random.below(8) as u32;
        board.port_write(MEMORY_HOTPLUG.0, Width::Dword, slot);
        if self.random.once_in(4) {
            // _OST: source, then status.
            board.port_write(0xa04, Width::Dword, self.random.of(&[3, 0x103, 0, 0x200]));
            board.port_write(0xa08, Width::Dword, self.random.of(&[0x82, 0x84, 0, 1]));
        }
        board.port_write(MEMORY_CONTROL, Width::Byte, MEMORY_EJECT);
    }

    fn slot<B: Board>(&mut self, board: &mut B) {
        let Some(port) = self.some(|f| f.bridge && f.express != 0) else {
            return;
        };
        let register = port.config + u64::from(port.express) + SLOT_CONTROL;
        if self.random.once_in(2) {
            return board.write(register, Width::Word, LET_GO);
        }
        let offset = self.random.below(8);
        let width = self.random.width();
        board.write(register - 2 + offset, width, self.random.value());
    }

    fn configuration<B: Board>(&mut self, board: &mut B) {
        let Some(function) = self.some(|_| true) else {
            return;
        };
        let at = match self.random.below(4) {
            0 => self.random.below(0x1000),
            1 => 0x10 + self.random.below(0x18),
            _ => self.random.below(0x100),
        };
        let width = self.random.width();
        if self.random.once_in(3) {
            board.read(function.config + at, width);
        } else {
            board.write(function.config + at, width, self.random.value());
        }
    }

    /// By CONFIG_ADDRESS and CONFIG_DATA, of a function that may not be there.
    fn configuration_by_ports<B: Board>(&mut self, board: &mut B) {
        let address = 0x8000_0000 | self.random.below(1 << 18) as u32;
        let width = self.random.port_width();
        // The byte above the address is the register that resets: left for the end of a life.
        board.port_write(CONFIG_ADDRESS, Width::Dword, address & !3);
        let port = CONFIG_DATA + self.random.below(4) as u16;
        if self.random.once_in(2) {
            board.port_read(port, width);
        } else {
            board.port_write(port, width, self.random.value() as u32);
        }
    }

    /// Bus numbers and windows.
    fn anything_behind_a_bridge<B: Board>(&mut self, board: &mut B) {
        let Some(bridge) = self.some(|f| f.bridge) else {
            return;
        };
        let at = 0x18 + self.random.below(0x18);
        let width = self.random.width();
        board.write(bridge.config + at, width, self.random.value());
        // And what answers through it now.
        let bus = self.random.below(0x40) << 20;
        board.read(
            map::ECAM + bus + (self.random.below(32) << 15),
            Width::Dword,
        );
    }

    /// MSI-X: its control word, or its table.
    fn messages<B: Board>(&mut self, board: &mut B) {
        let Some(function) = self.some(|f| f.msix != 0) else {
            return;
        };
        let control = function.config + u64::from(function.msix) + 2;
        let table = board.read(control + 2, Width::Dword);
        let base = function.bars.get((table & 7) as usize).copied();
        let Some(base) = base.filter(|base| *base != 0 && base & 1 == 0) else {
            return;
        };
        if self.random.once_in(4) {
            return board.write(control, Width::Word, self.random.value());
        }
        let entry = base + (table & !7) + self.random.below(8) * 16;
        // A fixed interrupt for the first processor, which takes none; now and then anything.
        let wild = self.random.once_in(64);
        let address = if wild { self.random.any() } else { 0xfee0_0000 };
        let data = if wild {
            self.random.any()
        } else {
            0x20 + self.random.below(0xd0)
        };
        board.write(entry, Width::Dword, address);
        board.write(entry + 8, Width::Dword, data);
        board.write(entry + 12, Width::Dword, self.random.below(2));
    }

    /// Registers in BARs.
    fn registers<B: Board>(&mut self, board: &mut B) {
        let Some(function) = self.some(|f| f.bars.iter().any(|bar| *bar != 0)) else {
            return;
        };
        let bar = self.random.of(&function.bars);
        let offset = match self.random.below(3) {
            0 => self.random.below(0x40),
            1 => self.random.below(0x1000),
            _ => self.random.below(0x8000),
        };
        let reads = self.random.once_in(3);
        if bar & 1 != 0 {
            let port = ((bar & 0xfffc) as u16).saturating_add((offset & 0x3f) as u16);
            let width = self.random.port_width();
            if reads {
                board.port_read(port, width);
            } else {
                board.port_write(port, width, self.random.value() as u32);
            }
        } else if bar != 0 && bar + offset < map::END {
            let width = self.random.width();
            if reads {
                board.read(bar + offset, width);
            } else {
                board.write(bar + offset, width, self.random.value());
            }
        }
    }

    /// The registers by which a driver and a virtio device come to terms.
    fn common<B: Board>(&mut self, board: &mut B) {
        let Some(function) = self.virtio() else {
            return;
        };
        let at = function.common + self.random.below(COMMON_BYTES);
        let width = self.random.width();
        board.write(at, width, self.random.value());
    }

    /// Where nothing may be.
    fn anywhere<B: Board>(&mut self, board: &mut B) {
        let window = map::WINDOW.end - map::WINDOW.start;
        let at = match self.random.below(4) {
            0 => map::ECAM + self.random.below(0x1000_0000),
            1 => map::END - 8 - self.random.below(0x4_0000_0000),
            _ => map::WINDOW.start + self.random.below(window),
        };
        let width = self.random.width();
        if self.random.once_in(2) {
            board.read(at, width);
        } else {
            board.write(at, width, self.random.value());
        }
    }

    /// Ends this life; the machine resets.
    fn end<B: Board>(&mut self, board: &mut B) {
        match self.random.below(3) {
            0 => board.port_write(RESET_CONTROL, Width::Byte, 6),
            1 => board.port_write(KEYBOARD, Width::Byte, 0xfe),
            _ => board.fault(),
        }
    }
}
