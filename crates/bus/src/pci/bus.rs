// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A bus: slots, the functions in them, and the way of configuration requests to these and to the buses behind them.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use ebbtide_gate::Entry;
use ebbtide_memory::Region;

use super::bar::{BarSpace, Windows};
use super::bridge::Upstream;
use super::placement::Placement;
use super::registers::EXTENDED;
use super::remnant::Remnants;
use super::{CONFIG_SIZE_BYTES, Devfn, Entered, Function, IntxWires, PciError};

const DEVFNS: usize = 256;
/// Vendor and device id.
const IDENTITY_BYTES: u16 = 4;

/// What a bus is, which says what can be on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BusKind {
    /// Bus 0.
    Root,
    /// The link behind a root port or a downstream port. It leads to one device.
    Link,
    /// Inside a switch, behind its upstream port: downstream ports only.
    Switch,
    /// Conventional PCI behind a bridge: extended configuration space is out of reach.
    Conventional,
}

impl BusKind {
    /// How many slots it has.
    pub fn slots(self) -> u8 {
        match self {
            Self::Link => 1,
            Self::Root | Self::Switch | Self::Conventional => 32,
        }
    }
}

/// One PCI bus: the root of the hierarchy or what is behind a bridge.
///
/// Its BARs appear in a container of its own; see [`Bridge`](super::Bridge) for how that is shown further up.
pub struct Bus {
    name: Arc<str>,
    kind: BusKind,
    space: BarSpace,
    functions: RwLock<Table>,
    placement: Mutex<Placement>,
    /// What is left of functions that are gone.
    remnants: Mutex<Remnants>,
    /// The wires that interrupt pins on it are on; none before they lead to an interrupt controller.
    intx: Mutex<Option<IntxWires>>,
}

/// The functions of a bus.
struct Table {
    /// By [`Devfn`].
    functions: Box<[Option<Arc<dyn Function>>]>,
    /// Those that lead further, in order.
    bridges: Vec<Devfn>,
    /// Those a guest does not see yet.
    hidden: Vec<Devfn>,
}

impl Bus {
    pub(super) fn new(name: &str, kind: BusKind, space: BarSpace) -> Arc<Self> {
        Arc::new(Self {
            name: name.into(),
            kind,
            space,
            functions: RwLock::new(Table {
                functions: vec![None; DEVFNS].into_boxed_slice(),
                bridges: Vec::new(),
                hidden: Vec::new(),
            }),
            placement: Mutex::default(),
            remnants: Mutex::default(),
            intx: Mutex::default(),
        })
    }

    /// An empty bus for a bridge somewhere below `self`, with a map of its own and no ports. The bridge is not bus master
    /// yet.
    pub(super) fn behind(&self, name: &str, kind: BusKind) -> Arc<Self> {
        let space = BarSpace {
            memory: Arc::clone(&self.space.memory),
            container: Region::container(format!("{name}-bus"), 1 << 64),
            root: Arc::clone(&self.space.root),
            io_container: Arc::clone(&self.space.io_container),
            windows: Windows {
                io: 0..0,
                ..self.space.windows.clone()
            },
            upstream: Upstream::new(),
        };
        Self::new(name, kind, space)
    }

    /// Its name: that of the bridge it is behind, or the root's.
    pub fn name(&self) -> &Arc<str> {
        &self.name
    }

    /// What it is.
    pub fn kind(&self) -> BusKind {
        self.kind
    }

    /// Puts a function into slot `slot` as its function 0, or into the lowest free slot. Returns the slot.
    ///
    /// # Errors
    /// No such slot, or it is taken, or the function can't be on this bus, or it (or what is behind it) needs ports or
    /// interrupt wires that the bus does not have, or the memory map refused a BAR's region.
    pub fn attach(&self, slot: Option<u8>, function: Arc<dyn Function>) -> Result<u8, PciError> {
        let devfn = match slot {
            Some(slot) => Devfn::new(slot, 0).ok_or(PciError::NoSuchSlot(slot))?,
            None => self.free_slot().ok_or(PciError::Full)?,
        };
        self.attach_at(devfn, function)?;
        Ok(devfn.slot())
    }

    /// Puts a function at `devfn`. Function 0 of a slot with several says so
    /// ([`Config::set_multifunction`](super::Config::set_multifunction)); a guest that scans sees the others only through
    /// it. Nobody is told: a slot that can is told by its [`HotplugSlot`](super::HotplugSlot).
    ///
    /// # Errors
    /// As [`attach`](Self::attach).
    pub fn attach_at(&self, devfn: Devfn, function: Arc<dyn Function>) -> Result<(), PciError> {
        self.attach_shown(devfn, function, true)
    }

    /// As [`attach_at`](Self::attach_at), but a guest sees neither the function nor what is behind it until it is
    /// [shown](Self::show): a bridge to which more is added first. Firmware leaves it out.
    ///
    /// # Errors
    /// As [`attach`](Self::attach).
    pub fn attach_hidden_at(
        &self,
        devfn: Devfn,
        function: Arc<dyn Function>,
    ) -> Result<(), PciError> {
        self.attach_shown(devfn, function, false)
    }

    /// Lets a guest see the function at `devfn` and all that is behind it, at once. Without effect when it does already.
    pub fn show(&self, devfn: Devfn) {
        self.write().hidden.retain(|hidden| *hidden != devfn);
    }

    fn attach_shown(
        &self,
        devfn: Devfn,
        function: Arc<dyn Function>,
        shown: bool,
    ) -> Result<(), PciError> {
        if !function.fits(self.kind) {
            return Err(PciError::WrongBus {
                name: function.config().gate().name().to_owned(),
                bus: self.name.to_string(),
                kind: self.kind,
            });
        }
        if devfn.slot() >= self.kind.slots() {
            return Err(PciError::SingleSlot {
                bus: self.name.to_string(),
                slot: devfn.slot(),
            });
        }
        // Held to the end: it is also what serialises changes of the bus.
        let _placement = self.placement();
        if self.function(devfn).is_some() {
            return Err(PciError::InUse(devfn));
        }
        let (config, wires) = (function.config(), self.wires());
        if wires.is_none() && self.space.upstream.is_connected() {
            config.check_unwired()?;
        }
        config.attach(&self.space)?;
        config.wire(wires.as_ref(), devfn);
        let is_bridge = config.bridge().is_some();
        let mut table = self.write();
        if let Some(entry) = table.functions.get_mut(devfn.index()) {
            *entry = Some(function);
        }
        if !shown {
            table.hidden.push(devfn);
        }
        if is_bridge {
            table.bridges.push(devfn);
            table.bridges.sort_unstable();
        }
        Ok(())
    }

    /// Takes the BARs (and windows) of the function at `devfn` out of the memory map for good. Part of the drain of a
    /// device whose gate is closed.
    ///
    /// # Errors
    /// Nothing is there, or the memory map refused.
    pub fn unmap(&self, devfn: Devfn) -> Result<(), PciError> {
        self.function(devfn)
            .ok_or(PciError::Empty(devfn))?
            .config()
            .release()
    }

    /// Takes the function at `devfn` off the bus, BARs included. From now on the guest sees nothing there but the function's
    /// [`Remnant`], if it leaves one: until another one that the guest has used leaves this place, or a
    /// [reset](super::HostBridge::reset). The bus keeps no reference to the function. What is behind a bridge is detached
    /// first.
    ///
    /// # Errors
    /// Nothing is there; its gate is open or has not drained; it is a bridge with something behind it; the memory map
    /// refused.
    pub fn detach_at(&self, devfn: Devfn) -> Result<Arc<dyn Function>, PciError> {
        let mut placement = self.placement();
        let function = self.function(devfn).ok_or(PciError::Empty(devfn))?;
        let gate = function.config().gate();
        if !gate.is_closed() || !gate.is_drained() {
            return Err(PciError::NotDrained {
                name: gate.name().to_owned(),
                devfn,
            });
        }
        if let Some(bridge) = function.config().bridge()
            && !bridge.bus().is_empty()
        {
            return Err(PciError::NotEmpty {
                name: gate.name().to_owned(),
                devfn,
            });
        }
        function.config().release()?;
        let mut table = self.write();
        if let Some(entry) = table.functions.get_mut(devfn.index()) {
            *entry = None;
        }
        table.bridges.retain(|bridge| *bridge != devfn);
        table.hidden.retain(|hidden| *hidden != devfn);
        drop(table);
        function.config().wire(None, devfn);
        placement.forget(devfn);
        self.leave_remnants(devfn, &*function);
        Ok(function)
    }

    /// Has what is left of a function that was detached answer where it was.
    fn leave_remnants(&self, devfn: Devfn, function: &dyn Function) {
        let bridge = function.config().bridge();
        let behind = bridge.map(|bridge| std::mem::take(&mut *lock(&bridge.bus().remnants)));
        let behind = behind.unwrap_or_default();
        let config = function.config();
        if !config.was_decoded() && behind.is_empty() {
            // The guest has not used it: it may be busy with the one before.
            return;
        }
        let own = function.remnant().and_then(|remnant| {
            let address = config.left_at(remnant.bar)?;
            Some((remnant, address))
        });
        lock(&self.remnants).replace(&self.space, devfn, own, behind);
    }

    /// Takes away what is left of functions that are gone, here and behind all bridges.
    pub(super) fn forget_remnants(&self) {
        lock(&self.remnants).clear();
        for (_, function) in self.functions() {
            if let Some(bridge) = function.config().bridge() {
                bridge.bus().forget_remnants();
            }
        }
    }

    /// The function at `devfn`.
    pub fn function(&self, devfn: Devfn) -> Option<Arc<dyn Function>> {
        self.read().functions.get(devfn.index())?.clone()
    }

    /// The functions on the bus itself, in order of their addresses.
    pub fn functions(&self) -> Vec<(Devfn, Arc<dyn Function>)> {
        let all = (0..=u8::MAX).map(Devfn::from_bits);
        all.zip(self.read().functions.iter())
            .filter_map(|(devfn, function)| Some((devfn, function.clone()?)))
            .collect()
    }

    /// Those of them a guest can see.
    pub fn shown(&self) -> Vec<(Devfn, Arc<dyn Function>)> {
        let mut functions = self.functions();
        let table = self.read();
        functions.retain(|(devfn, _)| !table.is_hidden(*devfn));
        functions
    }

    /// The functions in `slot`.
    pub fn functions_in(&self, slot: u8) -> Vec<(Devfn, Arc<dyn Function>)> {
        let mut functions = self.functions();
        functions.retain(|(devfn, _)| devfn.slot() == slot);
        functions
    }

    /// Every function on the bus and behind its bridges, what is behind a bridge before the bridge itself: the order in
    /// which they are detached. Their gates are all that has to be closed for the bus to be silent.
    pub fn functions_below(&self) -> Vec<Arc<dyn Function>> {
        let mut below = Vec::new();
        for (_, function) in self.functions() {
            if let Some(bridge) = function.config().bridge() {
                below.extend(bridge.bus().functions_below());
            }
            below.push(function);
        }
        below
    }

    /// Puts what is in `slot` and behind it into the state of something that has just been plugged: slots of ports among it
    /// are on if something is in them, and nothing has happened to them.
    pub(crate) fn settle(&self, slot: u8) {
        for (_, function) in self.functions_in(slot) {
            if let Some(bridge) = function.config().bridge() {
                let below = bridge.bus().functions_below();
                below.iter().for_each(|function| function.settle());
            }
            function.settle();
        }
    }

    /// Puts the interrupt pins of what is on the bus, now and later, and behind its bridges on these wires.
    pub(super) fn wire(&self, wires: Option<&IntxWires>) {
        *lock(&self.intx) = wires.cloned();
        for (devfn, function) in self.functions() {
            function.config().wire(wires, devfn);
        }
    }

    fn wires(&self) -> Option<IntxWires> {
        lock(&self.intx).clone()
    }

    /// Whether nothing is on it.
    pub fn is_empty(&self) -> bool {
        self.read().functions.iter().all(Option::is_none)
    }

    /// Whether something is in `slot`, as the guest sees it: what is on its way out is not, nor what is hidden. From any
    /// thread.
    pub fn is_occupied(&self, slot: u8) -> bool {
        let table = self.read();
        // No reference is taken: on a vCPU's thread it could become the last one.
        let open = |function: &Arc<dyn Function>| !function.config().gate().is_closed();
        (0..8)
            .filter_map(|function| Devfn::new(slot, function))
            .filter(|devfn| !table.is_hidden(*devfn))
            .filter_map(|devfn| table.functions.get(devfn.index())?.as_ref())
            .any(open)
    }

    pub(super) fn space(&self) -> &BarSpace {
        &self.space
    }

    pub(super) fn placement(&self) -> MutexGuard<'_, Placement> {
        lock(&self.placement)
    }

    /// What a guest reads from the function at `devfn` of bus `number`, this bus having the number `own`.
    pub(super) fn read_config(&self, own: u8, target: (u8, Devfn), offset: u16, size: u8) -> u32 {
        if !within_dword(offset, size) {
            return u32::MAX;
        }
        let read = self.with(own, target, offset, |function| {
            function.read_config(offset, size)
        });
        read.unwrap_or_else(|| match offset {
            0..IDENTITY_BYTES => self.kept_identity(own, target) >> (8 * offset),
            _ => u32::MAX,
        })
    }

    /// The first dword of a function that requests don't get to, if it has [kept](super::Config::keep_identity) that; all
    /// ones otherwise.
    fn kept_identity(&self, own: u8, target: (u8, Devfn)) -> u32 {
        let (number, devfn) = target;
        // No reference is taken, as in `is_occupied`.
        let table = self.read();
        if number == own {
            let function = table.visible(devfn);
            return function.map_or(u32::MAX, |it| it.config().kept_identity());
        }
        let mut bridges = table.bridges.iter().filter_map(|at| {
            let config = table.visible(*at)?.config();
            let is_there = !config.gate().is_closed() || config.kept_identity() != u32::MAX;
            config.bridge().filter(|_| is_there)
        });
        let on_the_way = bridges.find(|bridge| bridge.leads_to(number));
        on_the_way.map_or(u32::MAX, |bridge| {
            bridge.bus().kept_identity(bridge.secondary(), target)
        })
    }

    /// As [`read_config`](Self::read_config), for a write.
    pub(super) fn write_config(
        &self,
        own: u8,
        target: (u8, Devfn),
        offset: u16,
        size: u8,
        value: u32,
    ) {
        if within_dword(offset, size) {
            self.with(own, target, offset, |function| {
                function.config().note_guest_write(offset, size);
                function.write_config(offset, size, value);
            });
        }
    }

    /// Calls `f` with the function at `target` (bus number, place) if requests for `register` get there: every bridge on
    /// the way and the function itself have open gates, and their leases are held meanwhile.
    pub(super) fn with<R>(
        &self,
        own: u8,
        target: (u8, Devfn),
        register: u16,
        f: impl FnOnce(&dyn Function) -> R,
    ) -> Option<R> {
        if self.kind == BusKind::Conventional && register >= EXTENDED {
            return None;
        }
        let (number, devfn) = target;
        if number == own {
            let entered = self.enter(devfn)?;
            return Some(f(&*entered.function));
        }
        let entered = self.enter_bridge_to(number)?;
        let bridge = entered.function.config().bridge()?;
        if bridge.secondary() == number {
            entered.function.reach_behind();
        }
        bridge.bus().with(bridge.secondary(), target, register, f)
    }

    /// The function at `devfn`, if there is one, a guest may see it and its gate is open. The reference is taken while a
    /// lease is held, so that it is never the last one.
    pub(super) fn enter(&self, devfn: Devfn) -> Option<Entered> {
        self.read().enter(devfn)
    }

    /// The first bridge that answers for bus `number`.
    pub(super) fn enter_bridge_to(&self, number: u8) -> Option<Entered> {
        let table = self.read();
        let leads_to = |devfn: &Devfn| {
            let function = table.functions.get(devfn.index())?.as_ref()?;
            let bridge = function.config().bridge()?;
            bridge.leads_to(number).then_some(*devfn)
        };
        table.enter(table.bridges.iter().find_map(leads_to)?)
    }

    /// The lowest free slot, as its function 0.
    pub fn free_slot(&self) -> Option<Devfn> {
        let table = self.read();
        let empty = |devfn: &Devfn| {
            table
                .functions
                .get(devfn.index()..devfn.index() + 8)
                .is_some_and(|f| f.iter().all(Option::is_none))
        };
        (0..self.kind.slots())
            .filter_map(|slot| Devfn::new(slot, 0))
            .find(empty)
    }

    fn read(&self) -> RwLockReadGuard<'_, Table> {
        self.functions
            .read()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Table> {
        self.functions
            .write()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

impl Table {
    fn is_hidden(&self, devfn: Devfn) -> bool {
        self.hidden.contains(&devfn)
    }

    fn visible(&self, devfn: Devfn) -> Option<&Arc<dyn Function>> {
        if self.is_hidden(devfn) {
            return None;
        }
        self.functions.get(devfn.index())?.as_ref()
    }

    fn enter(&self, devfn: Devfn) -> Option<Entered> {
        let function = self.visible(devfn)?;
        let lease = function.config().gate().enter(Entry::Mmio)?;
        Some(Entered {
            function: Arc::clone(function),
            _lease: lease,
        })
    }
}

/// Configuration requests are for 1, 2 or 4 bytes of one dword.
fn within_dword(offset: u16, size: u8) -> bool {
    matches!(size, 1 | 2 | 4) && offset % 4 + u16::from(size) <= 4 && offset < CONFIG_SIZE_BYTES
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
