// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The machine's interrupt inputs: pins of the I/O APIC and message-signalled routes.
//!
//! KVM numbers both kinds alike (GSI). 0 to 23 are the pins, wired one to one; the rest is handed out to MSI routes, each
//! with an eventfd, so that signalling one takes no lock of ours and no ioctl.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ebbtide_bus::irq::{IrqError, IrqLine, MsiController, MsiMessage, MsiRoute};
use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_IOAPIC, KVM_MAX_IRQ_ROUTES,
    KvmIrqRouting, kvm_irq_routing_entry, kvm_irq_routing_entry__bindgen_ty_1,
    kvm_irq_routing_irqchip, kvm_irq_routing_msi,
};
use vmm_sys_util::eventfd::EventFd;

use super::vm::Machine;
use crate::Error;

/// Pins of the I/O APIC.
const PINS: u32 = 24;
/// What the table takes, less the entries of the pins; GSI numbers themselves end at the same limit.
const MSI_ROUTES: usize = KVM_MAX_IRQ_ROUTES - PINS as usize;

/// Hands out the machine's interrupt inputs.
pub(super) struct Interrupts {
    machine: Arc<Machine>,
    routes: Arc<Routes>,
    /// One bit per pin that somebody holds.
    taken: Arc<Mutex<u32>>,
}

impl Interrupts {
    pub(super) fn new(machine: Arc<Machine>, routes: Arc<Routes>) -> Arc<Self> {
        Arc::new(Self {
            machine,
            routes,
            taken: Arc::default(),
        })
    }

    pub(super) fn messages_in_kvm(&self) -> usize {
        self.routes.lock().published
    }

    pub(super) fn routes_in_use(&self) -> usize {
        self.routes.lock().gsis.len()
    }

    pub(super) fn line(&self, gsi: u32) -> Result<Arc<dyn IrqLine>, Error> {
        if gsi >= PINS {
            return Err(Error::NoSuchLine {
                gsi,
                last: PINS - 1,
            });
        }
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        if *taken & (1 << gsi) != 0 {
            return Err(Error::LineTaken { gsi });
        }
        *taken |= 1 << gsi;
        Ok(Arc::new(Line {
            machine: Arc::clone(&self.machine),
            taken: Arc::clone(&self.taken),
            gsi,
        }))
    }
}

impl MsiController for Interrupts {
    fn route(&self) -> Result<Arc<dyn MsiRoute>, IrqError> {
        Ok(Arc::new(Route::new(&self.routes)?))
    }
}

/// A pin.
struct Line {
    machine: Arc<Machine>,
    taken: Arc<Mutex<u32>>,
    gsi: u32,
}

impl IrqLine for Line {
    fn set(&self, high: bool) {
        // Cannot fail for a pin that exists.
        if let Err(errno) = self.machine.fd.set_irq_line(self.gsi, high) {
            tracing::error!(%errno, gsi = self.gsi, high, "interrupt line not driven");
        }
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        self.set(false);
        *self.taken.lock().unwrap_or_else(PoisonError::into_inner) &= !(1 << self.gsi);
    }
}

/// The machine's routing table. KVM takes it whole, so every change is made under one lock.
pub(super) struct Routes {
    machine: Arc<Machine>,
    table: Mutex<Table>,
}

#[derive(Default)]
struct Table {
    /// Given out.
    gsis: BTreeSet<u32>,
    /// Those of them that have a message.
    messages: BTreeMap<u32, MsiMessage>,
    /// How many messages the table has that KVM took last.
    published: usize,
}

impl Routes {
    pub(super) fn new(machine: Arc<Machine>) -> Result<Arc<Self>, Error> {
        let routes = Arc::new(Self {
            machine,
            table: Mutex::default(),
        });
        routes
            .publish(&mut routes.lock())
            .map_err(|error| Machine::refused("KVM_SET_GSI_ROUTING", error))?;
        Ok(routes)
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        // No code panics while it holds the lock.
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take(&self) -> Result<u32, IrqError> {
        let mut table = self.lock();
        if table.gsis.len() >= MSI_ROUTES {
            return Err(IrqError::Exhausted { limit: MSI_ROUTES });
        }
        let gsi = (PINS..)
            .find(|gsi| !table.gsis.contains(gsi))
            .unwrap_or(PINS);
        table.gsis.insert(gsi);
        Ok(gsi)
    }

    fn give_back(&self, gsi: u32) {
        let mut table = self.lock();
        table.gsis.remove(&gsi);
        // A guest that lost its device under its driver has not taken the message back.
        if table.messages.remove(&gsi).is_some()
            && let Err(error) = self.publish(&mut table)
        {
            // Nothing signals it any more; it goes with the next change of the table.
            tracing::warn!(%error, gsi, "kvm keeps the message of an interrupt that is gone");
        }
    }

    /// Sets the message of `gsi`, and whether it has one. On refusal it is left without.
    fn program(
        &self,
        gsi: u32,
        message: Option<MsiMessage>,
        programmed: &AtomicBool,
    ) -> io::Result<()> {
        let mut table = self.lock();
        if message.is_none() {
            programmed.store(false, Ordering::Release);
        }
        let before = match message {
            Some(message) => table.messages.insert(gsi, message),
            None => table.messages.remove(&gsi),
        };
        // Guests mask and unmask vectors, which gives the same message again.
        if before == message {
            return Ok(());
        }
        let published = self.publish(&mut table);
        if published.is_err() {
            table.messages.remove(&gsi);
        }
        programmed.store(message.is_some() && published.is_ok(), Ordering::Release);
        published
    }

    fn publish(&self, table: &mut Table) -> io::Result<()> {
        let mut entries = pins();
        entries.extend(
            table
                .messages
                .iter()
                .map(|(&gsi, message)| msi(gsi, message)),
        );
        let routing = KvmIrqRouting::from_entries(&entries)
            .map_err(|error| io::Error::other(format!("routing table: {error:?}")))?;
        self.machine.fd.set_gsi_routing(&routing)?;
        table.published = table.messages.len();
        Ok(())
    }
}

/// Every GSI below 24 to the I/O APIC's pin of that number. The 8259's get none: the guest is told of no such chips, so
/// never masks them, and they would deliver every line's interrupt a second time.
fn pins() -> Vec<kvm_irq_routing_entry> {
    let wire = |gsi| kvm_irq_routing_entry {
        gsi,
        type_: KVM_IRQ_ROUTING_IRQCHIP,
        u: kvm_irq_routing_entry__bindgen_ty_1 {
            irqchip: kvm_irq_routing_irqchip {
                irqchip: KVM_IRQCHIP_IOAPIC,
                pin: gsi,
            },
        },
        ..Default::default()
    };
    (0..PINS).map(wire).collect()
}

fn msi(gsi: u32, message: &MsiMessage) -> kvm_irq_routing_entry {
    kvm_irq_routing_entry {
        gsi,
        type_: KVM_IRQ_ROUTING_MSI,
        u: kvm_irq_routing_entry__bindgen_ty_1 {
            msi: kvm_irq_routing_msi {
                address_lo: message.address as u32,
                address_hi: (message.address >> 32) as u32,
                data: message.data,
                ..Default::default()
            },
        },
        ..Default::default()
    }
}

/// A message-signalled route: a GSI and the eventfd that fires it.
struct Route {
    routes: Arc<Routes>,
    gsi: u32,
    trigger: EventFd,
    programmed: AtomicBool,
}

impl Route {
    fn new(routes: &Arc<Routes>) -> Result<Self, IrqError> {
        let trigger = EventFd::new(libc::EFD_CLOEXEC | libc::EFD_NONBLOCK)
            .map_err(|error| IrqError::host("eventfd for an interrupt", error))?;
        let gsi = routes.take()?;
        if let Err(errno) = routes.machine.fd.register_irqfd(&trigger, gsi) {
            routes.give_back(gsi);
            return Err(IrqError::host("KVM_IRQFD", errno));
        }
        Ok(Self {
            routes: Arc::clone(routes),
            gsi,
            trigger,
            programmed: AtomicBool::new(false),
        })
    }
}

impl MsiRoute for Route {
    fn program(&self, message: Option<MsiMessage>) -> Result<(), IrqError> {
        self.routes
            .program(self.gsi, message, &self.programmed)
            .map_err(|error| IrqError::host("KVM_SET_GSI_ROUTING", error))
    }

    fn signal(&self) {
        // KVM would look the message up after it took the signal, and could find one that was programmed later.
        if !self.programmed.load(Ordering::Acquire) {
            return;
        }
        // Full is the only way to fail, and means that KVM has not taken the last signals: they are one.
        if let Err(error) = self.trigger.write(1) {
            tracing::debug!(%error, gsi = self.gsi, "interrupt merged with one still pending");
        }
    }
}

impl Drop for Route {
    fn drop(&mut self) {
        if let Err(errno) = self
            .routes
            .machine
            .fd
            .unregister_irqfd(&self.trigger, self.gsi)
        {
            // The number must not be given to somebody else while an eventfd of ours fires it.
            tracing::error!(%errno, gsi = self.gsi, "kvm keeps an irqfd; its number is lost");
            return;
        }
        self.routes.give_back(self.gsi);
    }
}
