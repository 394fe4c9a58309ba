// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The PCI functions there are, and how they were before they were broken.

use crate::{Board, Width, map};

/// More than the machine of the test ever has.
const MOST: usize = 64;
/// Devices of a bus.
const DEVICES: u64 = 32;
/// Kinds of ports with a link, behind which there is one device, in the PCI Express capability (PCIe 6.0, 7.5.3.2).
const WITH_LINK: [u8; 2] = [4, 6];
const BARS: usize = 6;

const COMMAND: u16 = 0x04;
const HEADER: u16 = 0x0e;
const BAR0: u16 = 0x10;
/// Primary, secondary, subordinate bus.
const BUS_NUMBERS: u16 = 0x18;
const IO_WINDOW: u16 = 0x1c;
const MEMORY_WINDOW: u16 = 0x20;
const PREFETCHABLE_WINDOW: u16 = 0x24;
const CAPABILITIES: u16 = 0x34;
/// Memory, I/O, bus master.
const ENABLED: u64 = 0x7;

/// Identifier of a capability (PCI code and ID assignment, 2).
const PCI_EXPRESS: u8 = 0x10;
const MSIX: u8 = 0x11;
const VENDOR: u8 = 0x09;
const POWER: u8 = 0x01;
/// A chain of capabilities has no more in 256 bytes.
const CHAIN: usize = 48;

/// One PCI function.
#[derive(Clone, Copy, Debug, Default)]
pub struct Function {
    /// Where its configuration space is.
    pub config: u64,
    /// A bridge with a bus behind it.
    pub bridge: bool,
    /// Its BARs as it was found: 0 where there is none, or an I/O one's ports with bit 0 set.
    pub bars: [u64; BARS],
    /// By bit: which of them have their upper half in the next one's register.
    wide: u8,
    /// What bridges forward, as it was found: bus numbers, and three windows.
    bridge_state: [u64; 4],
    /// The PCI Express capability, or 0.
    pub express: u16,
    /// The MSI-X capability, or 0.
    pub msix: u16,
    /// The power management capability, or 0.
    pub power: u16,
    /// Where virtio's common structure is, in memory, or 0.
    pub common: u64,
    /// Where virtio's doorbells are, or 0.
    pub notify: u64,
    /// How far from each other.
    pub notify_step: u64,
    /// Its device number: virtio-blk is 0x1042.
    pub device: u16,
}

impl Function {
    fn find<B: Board>(board: &mut B, config: u64, reach: u64, hole: &mut u64) -> Option<Function> {
        let ids = board.read(config, Width::Dword) as u32;
        if ids & 0xffff == 0xffff || ids == 0 {
            return None;
        }
        let header = board.read(config + u64::from(HEADER), Width::Byte) as u8;
        let mut function = Function {
            config,
            bridge: header & 0x7f == 1,
            device: (ids >> 16) as u16,
            ..Function::default()
        };
        if function.bridge {
            let registers = [BUS_NUMBERS, IO_WINDOW, MEMORY_WINDOW, PREFETCHABLE_WINDOW];
            for (kept, register) in function.bridge_state.iter_mut().zip(registers) {
                *kept = board.read(config + u64::from(register), Width::Dword);
            }
        }
        function.assign(board, reach, hole);
        function.find_capabilities(board);
        Some(function)
    }

    /// Reads where its BARs are, after those without a place below `reach` were given one from `hole` on.
    fn assign<B: Board>(&mut self, board: &mut B, reach: u64, hole: &mut u64) {
        let count = if self.bridge { 2 } else { BARS };
        let mut index = 0;
        while index < count {
            let at = self.config + u64::from(BAR0) + index as u64 * 4;
            let low = board.read(at, Width::Dword);
            let wide = low & 0x7 == 0x4;
            let mut base = low & !0xf;
            if wide {
                base |= board.read(at + 4, Width::Dword) << 32;
            }
            if low & 1 != 0 {
                base = low;
            } else if base == 0 || base >= reach {
                base = self.place(board, at, low, hole);
                if wide && base != 0 {
                    board.write(at + 4, Width::Dword, 0);
                }
            }
            if let Some(bar) = self.bars.get_mut(index) {
                // What is out of reach is left alone.
                *bar = if base < map::END { base } else { 0 };
            }
            self.wide |= u8::from(wide) << index;
            index += if wide { 2 } else { 1 };
        }
    }

    /// Gives a BAR without an address one, if there is a BAR; its address.
    fn place<B: Board>(&self, board: &mut B, at: u64, kind: u64, hole: &mut u64) -> u64 {
        board.write(at, Width::Dword, u64::from(u32::MAX));
        let mask = board.read(at, Width::Dword) & !0xf;
        board.write(at, Width::Dword, kind);
        let size = (!mask & 0xffff_ffff) + 1;
        if mask == 0 || size > 1 << 24 {
            return 0;
        }
        let base = (*hole + size - 1) & !(size - 1);
        *hole = base + size;
        board.write(at, Width::Dword, base | (kind & 0xf));
        base
    }

    fn find_capabilities<B: Board>(&mut self, board: &mut B) {
        let mut at = self.byte(board, CAPABILITIES) & 0xfc;
        for _ in 0..CHAIN {
            if at == 0 {
                return;
            }
            let offset = u16::from(at);
            match self.byte(board, offset) {
                PCI_EXPRESS => self.express = offset,
                MSIX => self.msix = offset,
                POWER => self.power = offset,
                VENDOR => self.find_structure(board, offset),
                _ => {}
            }
            at = self.byte(board, offset + 1) & 0xfc;
        }
    }

    /// A virtio structure's place (virtio 1.3, 4.1.4).
    fn find_structure<B: Board>(&mut self, board: &mut B, capability: u16) {
        let kind = self.byte(board, capability + 3);
        let bar = usize::from(self.byte(board, capability + 4));
        let base = self.bars.get(bar).copied().unwrap_or(0);
        if base == 0 {
            return;
        }
        let mut dword =
            |offset: u16| board.read(self.config + u64::from(capability + offset), Width::Dword);
        let at = base + dword(8);
        match kind {
            1 => self.common = at,
            2 => {
                let step = dword(16);
                (self.notify, self.notify_step) = (at, step);
            }
            _ => {}
        }
    }

    /// How many devices the bus behind it can have.
    fn devices_behind<B: Board>(&self, board: &mut B) -> u64 {
        let kind = self.byte(board, self.express + 2) >> 4;
        if self.express != 0 && WITH_LINK.contains(&kind) {
            1
        } else {
            DEVICES
        }
    }

    fn byte<B: Board>(&self, board: &mut B, offset: u16) -> u8 {
        board.read(self.config + u64::from(offset), Width::Byte) as u8
    }

    /// Puts back what was broken: buses, windows, BARs, and that it answers at all.
    fn mend<B: Board>(&self, board: &mut B) {
        if self.bridge {
            let registers = [BUS_NUMBERS, IO_WINDOW, MEMORY_WINDOW, PREFETCHABLE_WINDOW];
            for (kept, register) in self.bridge_state.iter().zip(registers) {
                // The upper half next to the I/O window is the status, whose bits are cleared by ones.
                let width = match register {
                    IO_WINDOW => Width::Word,
                    _ => Width::Dword,
                };
                board.write(self.config + u64::from(register), width, *kept);
            }
        }
        for (index, bar) in (0u64..).zip(self.bars) {
            if bar != 0 {
                let at = self.config + u64::from(BAR0) + index * 4;
                board.write(at, Width::Dword, bar & 0xffff_ffff);
                if self.wide >> index & 1 != 0 {
                    board.write(at + 4, Width::Dword, bar >> 32);
                }
            }
        }
        if self.power != 0 {
            board.write(self.config + u64::from(self.power) + 4, Width::Word, 0);
        }
        board.write(self.config + u64::from(COMMAND), Width::Word, ENABLED);
    }
}

/// All functions that were found.
#[derive(Debug)]
pub struct Functions {
    list: [Function; MOST],
    count: usize,
    reach: u64,
    hole: u64,
}

impl Functions {
    /// None yet. BARs that have no place, or one from `reach` on, will be given one from `hole` on.
    pub fn none(reach: u64, hole: u64) -> Functions {
        Functions {
            list: [Function::default(); MOST],
            count: 0,
            reach,
            hole,
        }
    }

    /// Puts back what was broken of the known ones and looks for others.
    pub fn refresh<B: Board>(&mut self, board: &mut B) {
        for function in self.known() {
            function.mend(board);
        }
        self.count = 0;
        let mut hole = self.hole;
        self.look_into(board, 0, DEVICES, &mut hole);
        // Bridges that are found behind bridges are looked behind, too.
        let mut next = 0;
        while let Some(bridge) = self.known().get(next).copied() {
            next += 1;
            let bus = (bridge.bridge_state[0] >> 8) as u8;
            if bridge.bridge && bus != 0 {
                let mut window = (bridge.bridge_state[2] & 0xfff0) << 16;
                let devices = bridge.devices_behind(board);
                self.look_into(board, bus, devices, &mut window);
            }
        }
    }

    fn look_into<B: Board>(&mut self, board: &mut B, bus: u8, devices: u64, hole: &mut u64) {
        for device in 0..devices {
            let config = map::ECAM | u64::from(bus) << 20 | device << 15;
            let Some(function) = Function::find(board, config, self.reach, hole) else {
                continue;
            };
            board.write(config + u64::from(COMMAND), Width::Word, ENABLED);
            if let Some(free) = self.list.get_mut(self.count) {
                *free = function;
                self.count += 1;
            }
        }
    }

    /// Those found.
    pub fn known(&self) -> &[Function] {
        self.list.get(..self.count).unwrap_or(&[])
    }
}
