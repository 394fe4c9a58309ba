// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A function's configuration space: header of type 0 or 1, capabilities, 4 KiB (PCI 3.0, 6; PCIe 5.0, 7.5).

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ebbtide_gate::Gate;
use ebbtide_memory::Region;

use super::bar::{BAR_COUNT, BRIDGE_BAR_COUNT, Bar, BarInfo, BarSpace, BarSpec};
use super::bridge::{Bridge, HEADER_BRIDGE};
use super::msix::{CONTROL_ENABLE, CONTROL_FUNCTION_MASK, Msix};
use super::registers::{
    BAR0, CACHE_LINE, CAPABILITIES, COMMAND, EXTENDED, HEADER_END, HEADER_TYPE, INTERRUPT_LINE,
    INTERRUPT_PIN, REVISION, Registers, STATUS, STATUS_ERRORS, SUBSYSTEM_VENDOR, VENDOR, touches,
};
use super::{BarKind, CONFIG_SIZE_BYTES, Devfn, InterruptPin, IntxWires, PciError};
use crate::gated;
use crate::log_limit::LogLimit;

/// Capability ids of MSI-X and of a bridge's subsystem ids (PCI-to-PCI Bridge 1.2, 3.2.5.13).
const CAPABILITY_MSIX: u8 = 0x11;
const CAPABILITY_SUBSYSTEM: u8 = 0x0d;
/// STATUS bit: there is a capability list.
const STATUS_CAPABILITIES: u16 = 1 << 4;
/// STATUS bit: the function asserts its interrupt pin.
const STATUS_INTERRUPT: u16 = 1 << 3;
/// HEADER_TYPE bit: functions 1 to 7 may exist.
const MULTIFUNCTION: u8 = 0x80;
/// Bytes from the first BAR on that say what is decoded: BARs, or BARs, bus numbers and windows.
const ADDRESSES: u16 = 0x20;

/// What a function is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ids {
    /// Vendor id.
    pub vendor: u16,
    /// Device id.
    pub device: u16,
    /// Revision id.
    pub revision: u8,
    /// Base class, sub-class and programming interface in bits 23 to 0.
    pub class: u32,
    /// Subsystem vendor id.
    pub subsystem_vendor: u16,
    /// Subsystem id.
    pub subsystem: u16,
}

/// The COMMAND register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Command(pub u16);

impl Command {
    /// I/O BARs are decoded.
    pub const IO: u16 = 1 << 0;
    /// Memory BARs are decoded.
    pub const MEMORY: u16 = 1 << 1;
    /// The function may access memory and send messages.
    pub const MASTER: u16 = 1 << 2;
    /// Parity error response.
    const PARITY: u16 = 1 << 6;
    /// SERR# enable.
    const SERR: u16 = 1 << 8;
    /// The interrupt pin is not to be used.
    pub const INTX_DISABLE: u16 = 1 << 10;
    /// What a guest may set. I/O decoding joins them with the first I/O BAR.
    const WRITABLE: u16 =
        Self::MEMORY | Self::MASTER | Self::PARITY | Self::SERR | Self::INTX_DISABLE;

    /// Whether memory BARs are decoded.
    pub fn memory(self) -> bool {
        self.0 & Self::MEMORY != 0
    }

    /// Whether the interrupt pin is kept from its wire.
    pub fn intx_disable(self) -> bool {
        self.0 & Self::INTX_DISABLE != 0
    }

    /// Whether the function is a bus master.
    pub fn master(self) -> bool {
        self.0 & Self::MASTER != 0
    }
}

/// A function's configuration space.
///
/// It is built with `&mut self` and then shared: [`read`](Self::read) and [`write`](Self::write) are what a guest does,
/// from any thread. When a write to a BAR or to COMMAND returns, the BAR's region has moved in the memory map.
pub struct Config {
    gate: Arc<Gate>,
    msix: Option<(Arc<Msix>, u16)>,
    bridge: Option<Bridge>,
    /// Offsets of the PCI Express capability and of advanced error reporting.
    pub(super) express: Option<u16>,
    pub(super) errors: Option<u16>,
    interrupt_pin: Option<Arc<InterruptPin>>,
    state: Mutex<State>,
    refused: LogLimit,
    /// Vendor and device id as they read while the gate is closed.
    kept_identity: AtomicU32,
    enumerated: Arc<AtomicBool>,
}

struct State {
    registers: Registers,
    bars: Vec<Bar>,
    /// Set while the function is on a bus.
    space: Option<BarSpace>,
    /// Where the next capability goes, and the byte that will point to it.
    next_capability: u16,
    capability_link: u16,
    /// The same for the extended space; the link is a header's offset.
    next_extended: u16,
    extended_link: Option<u16>,
}

impl Config {
    /// The configuration space of the device whose lifetime `gate` guards; its name is the gate's.
    pub fn new(gate: &Arc<Gate>, ids: Ids) -> Self {
        let mut registers = Self::common_header(ids);
        registers.define(SUBSYSTEM_VENDOR, &ids.subsystem_vendor.to_le_bytes(), &[]);
        registers.define(SUBSYSTEM_VENDOR + 2, &ids.subsystem.to_le_bytes(), &[]);
        Self::with(gate, registers, None)
    }

    /// The configuration space of a bridge to `bridge`'s bus: a type 1 header. Subsystem ids that are not 0 become a
    /// capability.
    ///
    /// # Errors
    /// [`PciError::CapabilitySpace`].
    pub(super) fn new_bridge(gate: &Arc<Gate>, ids: Ids, bridge: Bridge) -> Result<Self, PciError> {
        let mut registers = Self::common_header(ids);
        registers.define(HEADER_TYPE, &[HEADER_BRIDGE], &[]);
        Bridge::define(&mut registers);
        let mut config = Self::with(gate, registers, Some(bridge));
        if ids.subsystem_vendor != 0 {
            let [vendor, device] = [ids.subsystem_vendor, ids.subsystem].map(u16::to_le_bytes);
            let body = [0, 0, vendor[0], vendor[1], device[0], device[1]];
            config.add_capability(CAPABILITY_SUBSYSTEM, &body, &[])?;
        }
        Ok(config)
    }

    /// What both types of header have.
    fn common_header(ids: Ids) -> Registers {
        let mut registers = Registers::new();
        registers.define(VENDOR, &ids.vendor.to_le_bytes(), &[]);
        registers.define(VENDOR + 2, &ids.device.to_le_bytes(), &[]);
        registers.define(COMMAND, &[0; 2], &Command::WRITABLE.to_le_bytes());
        registers.define_write_one_clears(STATUS, &STATUS_ERRORS.to_le_bytes());
        let [interface, subclass, class, _] = ids.class.to_le_bytes();
        registers.define(REVISION, &[ids.revision, interface, subclass, class], &[]);
        registers.define(CACHE_LINE, &[0], &[0xff]);
        registers.define(INTERRUPT_LINE, &[0], &[0xff]);
        registers
    }

    fn with(gate: &Arc<Gate>, registers: Registers, bridge: Option<Bridge>) -> Self {
        Self {
            gate: Arc::clone(gate),
            msix: None,
            bridge,
            express: None,
            errors: None,
            interrupt_pin: None,
            state: Mutex::new(State {
                registers,
                bars: Vec::new(),
                space: None,
                next_capability: HEADER_END,
                capability_link: CAPABILITIES,
                next_extended: EXTENDED,
                extended_link: None,
            }),
            refused: LogLimit::default(),
            kept_identity: AtomicU32::new(u32::MAX),
            enumerated: Arc::default(),
        }
    }

    /// Adds BAR `index`, which shows `region` (of the BAR's size) wherever the guest puts it. The region's registers
    /// should be behind the device's gate: [`gated::behind`].
    ///
    /// # Errors
    /// [`PciError::BadBar`].
    pub fn add_bar(
        &mut self,
        index: u8,
        spec: BarSpec,
        region: Arc<Region>,
    ) -> Result<(), PciError> {
        let name = self.gate.name().to_owned();
        let count = match self.bridge {
            Some(_) => BRIDGE_BAR_COUNT,
            None => BAR_COUNT,
        };
        let state = self.state_mut();
        let first_free = |bar: &Bar| bar.index + 1 + u8::from(bar.spec.kind.is_64bit());
        let overlaps = |bar: &Bar| {
            index < first_free(bar) && bar.index <= index + u8::from(spec.kind.is_64bit())
        };
        let fault = match spec.fault(index, count) {
            Some(fault) => Some(fault),
            None if state.bars.iter().any(overlaps) => Some("the register is taken"),
            None if region.size() != spec.size_bytes => Some("the region has another size"),
            None => None,
        };
        if let Some(reason) = fault {
            return Err(PciError::BadBar {
                name,
                index,
                size_bytes: spec.size_bytes,
                reason,
            });
        }
        spec.define(index, &mut state.registers);
        if spec.kind == BarKind::Io {
            let writable = Command::WRITABLE | Command::IO;
            let registers = &mut state.registers;
            registers.define(COMMAND, &[0; 2], &writable.to_le_bytes());
        }
        state.bars.push(Bar {
            index,
            spec,
            region,
            mapped: None,
            left: None,
        });
        state.bars.sort_by_key(|bar| bar.index);
        Ok(())
    }

    /// Appends a capability and returns its offset. `body` is what follows the id and the link, `writable` the bits of it
    /// a guest may write (missing bytes: none).
    ///
    /// # Errors
    /// [`PciError::CapabilitySpace`].
    pub fn add_capability(
        &mut self,
        id: u8,
        body: &[u8],
        writable: &[u8],
    ) -> Result<u16, PciError> {
        let name = self.gate.name().to_owned();
        let state = self.state_mut();
        let offset = state.next_capability;
        let end = usize::from(offset) + 2 + body.len();
        if end > usize::from(EXTENDED) {
            return Err(PciError::CapabilitySpace {
                name,
                bytes: body.len() + 2,
            });
        }
        state.registers.define(offset, &[id, 0], &[]);
        state.registers.define(offset + 2, body, writable);
        let [link, _] = offset.to_le_bytes();
        state.registers.define(state.capability_link, &[link], &[]);
        let [status, _] = STATUS_CAPABILITIES.to_le_bytes();
        state.registers.define(STATUS, &[status], &[]);
        state.capability_link = offset + 1;
        state.next_capability = end.next_multiple_of(4) as u16;
        Ok(offset)
    }

    /// Appends an extended capability (PCIe 5.0, 7.6.3) and returns its offset. `body` is what follows the header dword.
    ///
    /// # Errors
    /// [`PciError::CapabilitySpace`].
    pub fn add_extended_capability(
        &mut self,
        id: u16,
        version: u8,
        body: &[u8],
        writable: &[u8],
    ) -> Result<u16, PciError> {
        let name = self.gate.name().to_owned();
        let state = self.state_mut();
        let offset = state.next_extended;
        let end = usize::from(offset) + 4 + body.len();
        if end > usize::from(CONFIG_SIZE_BYTES) {
            return Err(PciError::CapabilitySpace {
                name,
                bytes: body.len() + 4,
            });
        }
        let header = u32::from(id) | u32::from(version & 0xf) << 16;
        state.registers.define(offset, &header.to_le_bytes(), &[]);
        state.registers.define(offset + 4, body, writable);
        if let Some(previous) = state.extended_link {
            let header = state.registers.read(previous, 4) & 0x000f_ffff | u32::from(offset) << 20;
            state.registers.define(previous, &header.to_le_bytes(), &[]);
        }
        state.extended_link = Some(offset);
        state.next_extended = end.next_multiple_of(4) as u16;
        Ok(offset)
    }

    /// Adds MSI-X: its capability, and BAR `index` (32 bits) that holds the table and the pending bits.
    ///
    /// # Errors
    /// The BAR or the capability does not fit.
    pub fn add_msix(&mut self, index: u8, msix: &Arc<Msix>) -> Result<(), PciError> {
        let name = self.gate.name().to_owned();
        let size_bytes = msix.bar_size_bytes();
        let registers = gated::behind(&self.gate, Arc::clone(msix) as _);
        let region = Region::mmio(format!("{name}-msix"), size_bytes, registers);
        self.add_bar(
            index,
            BarSpec {
                size_bytes,
                kind: BarKind::Mem32,
            },
            region,
        )?;
        let mut body = [0; 10];
        let table = u32::from(index);
        let pending = msix.pending_offset() | u32::from(index);
        let fields = (msix.vector_count() - 1)
            .to_le_bytes()
            .into_iter()
            .chain(table.to_le_bytes())
            .chain(pending.to_le_bytes());
        for (to, from) in body.iter_mut().zip(fields) {
            *to = from;
        }
        let writable = (CONTROL_ENABLE | CONTROL_FUNCTION_MASK).to_le_bytes();
        let offset = self.add_capability(CAPABILITY_MSIX, &body, &writable)?;
        self.msix = Some((Arc::clone(msix), offset + 2));
        Ok(())
    }

    /// Gives the function its interrupt pin, which the device drives.
    pub fn add_interrupt_pin(&mut self, pin: &Arc<InterruptPin>) {
        let registers = &mut self.state_mut().registers;
        registers.define(INTERRUPT_PIN, &[pin.register()], &[]);
        self.interrupt_pin = Some(Arc::clone(pin));
    }

    /// Says that the slot has more functions than this one, its function 0.
    pub fn set_multifunction(&mut self) {
        let registers = &mut self.state_mut().registers;
        let [kind, ..] = registers.read(HEADER_TYPE, 1).to_le_bytes();
        registers.define(HEADER_TYPE, &[kind | MULTIFUNCTION], &[]);
    }

    /// Makes bits of a capability's registers write-one-to-clear.
    pub(super) fn define_write_one_clears(&mut self, offset: u16, bits: &[u8]) {
        let registers = &mut self.state_mut().registers;
        registers.define_write_one_clears(offset, bits);
    }

    /// The device's gate.
    pub fn gate(&self) -> &Arc<Gate> {
        &self.gate
    }

    /// The function's MSI-X, if it has any.
    pub fn msix(&self) -> Option<&Arc<Msix>> {
        self.msix.as_ref().map(|(msix, _)| msix)
    }

    /// What is behind the function, if it is a bridge.
    pub fn bridge(&self) -> Option<&Bridge> {
        self.bridge.as_ref()
    }

    /// Whether a request of the function gets to memory: it is bus master, and so are all bridges on the way. False while
    /// it is on no bus.
    pub fn reaches_memory(&self) -> bool {
        let state = self.state();
        Command(state.registers.read_u16(COMMAND)).master()
            && state.space.as_ref().is_some_and(|it| it.upstream.is_open())
    }

    /// The COMMAND register.
    pub fn command(&self) -> Command {
        Command(self.state().registers.read_u16(COMMAND))
    }

    /// The BARs as they are now, by index.
    pub fn bars(&self) -> Vec<BarInfo> {
        let state = self.state();
        let info = |bar: &Bar| BarInfo {
            index: bar.index,
            spec: bar.spec,
            address: bar.address(&state.registers),
            mapped: bar.mapped.is_some(),
        };
        state.bars.iter().map(info).collect()
    }

    /// What a guest reads: 1, 2 or 4 bytes, little-endian. All ones outside of the space.
    pub fn read(&self, offset: u16, size: u8) -> u32 {
        let value = self.state().registers.read(offset, size);
        if let Some(pin) = &self.interrupt_pin
            && touches(offset, size, STATUS, 1)
            && offset <= STATUS
            && size <= 4
            && pin.is_asserted()
        {
            return value | u32::from(STATUS_INTERRUPT) << (8 * (STATUS - offset));
        }
        value
    }

    /// What a guest's write of 1, 2 or 4 bytes does.
    pub fn write(&self, offset: u16, size: u8, value: u32) {
        let mut state = self.state();
        state.registers.write(offset, size, value);
        if touches(offset, size, COMMAND, 2) || touches(offset, size, BAR0, ADDRESSES) {
            self.follow(&mut state);
        }
        if let Some(pin) = &self.interrupt_pin
            && touches(offset, size, COMMAND, 2)
        {
            pin.set_disabled(Command(state.registers.read_u16(COMMAND)).intx_disable());
        }
        if let Some((msix, control)) = &self.msix
            && touches(offset, size, *control, 2)
        {
            msix.set_control(state.registers.read_u16(*control));
        }
    }

    /// Changes what registers read as, read-only ones too: what the device itself does. Not for BARs, COMMAND or MSI-X.
    pub fn set(&self, offset: u16, bytes: &[u8]) {
        self.state().registers.set(offset, bytes);
    }

    /// Looks at registers and changes them in one step, as [`set`](Self::set) does.
    pub(super) fn change<T>(&self, change: impl FnOnce(&mut Registers) -> T) -> T {
        change(&mut self.state().registers)
    }

    /// Power-on state: BARs unmapped and zero, MSI-X off and masked. The interrupt pin is for the device to lower.
    pub fn reset(&self) {
        let mut state = self.state();
        state.registers.reset();
        self.follow(&mut state);
        if let Some(pin) = &self.interrupt_pin {
            pin.set_disabled(false);
        }
        if let Some((msix, _)) = &self.msix {
            msix.reset();
        }
    }

    /// Puts the function on a bus.
    pub(super) fn attach(&self, space: &BarSpace) -> Result<(), PciError> {
        let mut state = self.state();
        if space.windows.io.is_empty() && state.bars.iter().any(|bar| bar.spec.kind == BarKind::Io)
        {
            return Err(PciError::NoIoSpace {
                name: self.gate.name().to_owned(),
            });
        }
        let adopted = space.adopt(&mut state.bars);
        adopted.map_err(|source| PciError::Memory {
            name: self.gate.name().to_owned(),
            source,
        })?;
        state.space = Some(space.clone());
        if let Some(bridge) = &self.bridge {
            bridge.connect(Some(Arc::clone(&space.upstream)));
        }
        self.follow(&mut state);
        Ok(())
    }

    /// Whether a bus without interrupt wires is enough for the function and what is behind it.
    pub(super) fn check_unwired(&self) -> Result<(), PciError> {
        if self.interrupt_pin.is_some() {
            return Err(PciError::NoIntx {
                name: self.gate.name().to_owned(),
            });
        }
        let behind = self.bridge.iter().flat_map(|it| it.bus().functions());
        for (_, function) in behind {
            function.config().check_unwired()?;
        }
        Ok(())
    }

    /// Puts the interrupt pin, if there is one, on its wire of the bus, and says in the Interrupt Line register which
    /// input that is. What is behind a bridge is on the wires of its pins.
    pub(super) fn wire(&self, wires: Option<&IntxWires>, devfn: Devfn) {
        if let Some(bridge) = &self.bridge {
            let behind = wires.map(|wires| wires.behind(devfn.slot()));
            bridge.bus().wire(behind.as_ref());
        }
        if let (Some(pin), Some(wires)) = (&self.interrupt_pin, wires) {
            let [gsi, ..] = pin.connect(wires, devfn).to_le_bytes();
            let registers = &mut self.state().registers;
            registers.define(INTERRUPT_LINE, &[gsi], &[0xff]);
        }
    }

    /// Takes the BARs out of the memory map for good, and the interrupt pin off its wire: whatever a guest still writes
    /// has no effect on the map, whatever the device still drives reaches nobody.
    pub(super) fn release(&self) -> Result<(), PciError> {
        let mut state = self.state();
        let State { bars, space, .. } = &mut *state;
        if let Some(space) = space {
            let hidden = self.bridge.as_ref().map_or(Ok(()), |it| it.hide(space));
            let released = hidden.and_then(|()| space.release(bars));
            released.map_err(|source| PciError::Memory {
                name: self.gate.name().to_owned(),
                source,
            })?;
        }
        state.space = None;
        if let Some(bridge) = &self.bridge {
            bridge.connect(None);
        }
        if let Some(pin) = &self.interrupt_pin {
            pin.disconnect();
        }
        Ok(())
    }

    /// Has vendor and device id, the first dword, go on to be read when the gate is closed, until the function is detached.
    /// For one that is taken from a driver which was not told yet: Linux takes all ones there for a device that is gone,
    /// and sees no answer from it any more, also of what it then waits for without end.
    pub fn keep_identity(&self, keep: bool) {
        let ids = match keep {
            true => self.state().registers.read(VENDOR, 4),
            false => u32::MAX,
        };
        self.kept_identity.store(ids, Ordering::Release);
    }

    /// Set once a guest has written to BARs, which it does to learn their sizes when it finds the function on the bus.
    pub fn enumerated(&self) -> &Arc<AtomicBool> {
        &self.enumerated
    }

    /// A guest writes to these registers.
    pub(super) fn note_guest_write(&self, offset: u16, size: u8) {
        if touches(offset, size, BAR0, ADDRESSES) {
            self.enumerated.store(true, Ordering::Release);
        }
    }

    /// What the first dword reads as while the gate is closed.
    pub(super) fn kept_identity(&self) -> u32 {
        self.kept_identity.load(Ordering::Acquire)
    }

    /// Where BAR `index` was in the map when it was [released](Self::release); `None` if it was not there.
    pub(super) fn left_at(&self, index: u8) -> Option<u64> {
        let state = self.state();
        state.bars.iter().find(|bar| bar.index == index)?.left
    }

    /// Whether any BAR was in the map when it was released.
    pub(super) fn was_decoded(&self) -> bool {
        self.state().bars.iter().any(|bar| bar.left.is_some())
    }

    fn follow(&self, state: &mut State) {
        let command = Command(state.registers.read_u16(COMMAND));
        if let Some(bridge) = &self.bridge {
            bridge.route(&state.registers, command.master());
        }
        let State {
            registers,
            bars,
            space: Some(space),
            ..
        } = state
        else {
            return;
        };
        let windows = match &self.bridge {
            Some(bridge) => bridge.follow(space, registers, command.memory()),
            None => Ok(()),
        };
        for (what, result) in [
            ("a bar", space.follow(bars, registers, command)),
            ("a window", windows),
        ] {
            if let Err(error) = result
                && let Some(suppressed) = self.refused.allow()
            {
                tracing::warn!(device = self.gate.name(), %error, suppressed, "{what} stays unmapped");
            }
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn state_mut(&mut self) -> &mut State {
        self.state.get_mut().unwrap_or_else(PoisonError::into_inner)
    }
}
