// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A virtio device as a PCI function (virtio 1.3, 4.1), not transitional.
//!
//! ```text
//!                    ┌─ Config (bus): header, capabilities, BARs, MSI-X ── window.rs: 4.1.4.9
//! guest ── BAR 0 ──▶ VirtioPci ── gate ──▶ Transport ─┬─ registers.rs: common configuration
//!                                                     ├─ session.rs: features, activation, reset ──▶ VirtioDevice
//! device's thread ── TransportControl, QueueInterrupt ┴─ Link (control.rs) ──▶ vectors.rs ──▶ MSI-X
//! ```
//!
//! A function that was taken from its driver leaves a [`remnant`] of its registers.
//!
//! Locks, in the order they may be taken: the transport's state, the configuration lock of the [`Link`], then what the
//! device itself has. Below the transport's state also the memory map's writer lock. The device's threads never take the
//! transport's state.

mod layout;
mod registers;
mod remnant;
mod session;
mod transport;
mod vectors;
mod window;

use std::future::Future;
use std::sync::{Arc, OnceLock};

use ebbtide_bus::gated;
use ebbtide_bus::irq::MsiController;
use ebbtide_bus::log_limit::LogLimit;
use ebbtide_bus::pci::{BarKind, BarSpec, Config, Function, Ids, Msix, PciError, Remnant};
use ebbtide_gate::{Gate, Owned};
use ebbtide_iothread::Remote;
use ebbtide_memory::{AddressSpace, Region};

use self::layout::Kind;
use self::registers::Registers;
use self::remnant::Detached;
use self::session::Phase;
use self::transport::{State, Transport, Wiring};
use self::vectors::Vectors;
use self::window::Window;
use crate::control::Link;
use crate::device::{InFlight, PinnedList, VirtioDevice};
use crate::sync::{Mutex, lock};
use crate::virtq::MAX_SIZE;

/// PCI capability ID "vendor-specific".
const VENDOR_SPECIFIC: u8 = 0x09;

/// Why a device could not be given a transport.
#[derive(Debug, thiserror::Error)]
pub enum TransportError {
    /// It has no queue, or more than fit the notification structure.
    #[error("{name}: {count} queues, 1 to {max} are possible")]
    QueueCount {
        /// The device.
        name: String,
        /// How many it has.
        count: usize,
        /// How many there may be.
        max: usize,
    },
    /// A queue size is not a power of two up to 32768.
    #[error("{name}: queue size {size} is not a power of two up to 32768")]
    QueueSize {
        /// The device.
        name: String,
        /// The size.
        size: u16,
    },
    /// The PCI function could not be made.
    #[error(transparent)]
    Pci(#[from] PciError),
}

/// A virtio device on the PCI bus.
///
/// Its gate (the one of its [`Config`]) is closed by [`close`](Self::close) when the function is removed; each
/// activation has a gate of its own, closed by the reset that ends it.
pub struct VirtioPci {
    transport: Owned<Transport>,
    config: Config,
    window: Window,
}

impl VirtioPci {
    /// Puts `device` on a PCI function called `name`. It accesses memory through `space`, interrupts through
    /// `interrupts`, and resets that have to wait do that on `remote`.
    ///
    /// # Errors
    /// The device's queues are impossible, or the function cannot be made.
    pub fn new(
        name: impl Into<String>,
        device: Arc<dyn VirtioDevice>,
        space: &Arc<AddressSpace>,
        interrupts: &dyn MsiController,
        remote: &Remote,
    ) -> Result<Arc<VirtioPci>, TransportError> {
        let name = name.into();
        let queues = check_queues(&name, device.queue_sizes())?;
        let msix = Msix::new(queues + 1, interrupts)?;
        let vectors = Arc::new(Vectors::new(&msix, queues));
        let link = Link::new(Arc::clone(&vectors) as _);
        device.attach(link.control(None));
        let ids = ids(device.device_type());
        let state = State {
            registers: Registers::new(device.queue_sizes()),
            phase: Phase::Idle,
        };
        let transport = Transport {
            name: name.clone(),
            device,
            space: Arc::clone(space),
            remote: remote.clone(),
            link,
            vectors,
            state: Mutex::new(state),
            wiring: OnceLock::new(),
            complaints: LogLimit::default(),
        };
        let transport = Owned::new(name.clone(), transport);
        let region = Region::mmio(
            name,
            layout::BAR_BYTES,
            gated::registers(transport.handle()),
        );
        let wiring = Wiring {
            region: Arc::clone(&region),
            handle: transport.handle(),
        };
        let mut config = Config::new(transport.gate(), ids);
        let kind = BarKind::Mem64 { prefetchable: true };
        config.add_bar(
            layout::BAR,
            BarSpec {
                size_bytes: layout::BAR_BYTES,
                kind,
            },
            region,
        )?;
        config.add_msix(layout::MSIX_BAR, &msix)?;
        let window = add_capabilities(&mut config, queues)?;
        // Set once, here.
        let _ = transport.get().wiring.set(wiring);
        Ok(Arc::new(VirtioPci {
            transport,
            config,
            window,
        }))
    }

    /// The gate of the function; [`close`](Self::close) shuts it.
    pub fn gate(&self) -> &Arc<Gate> {
        self.transport.gate()
    }

    /// Ends the driver's use of the device as a reset does, at once; the future is ready when nothing is in flight any
    /// more and the registers are as at power-on. For a reset of the machine, with the vCPUs stopped.
    pub fn quiesce(&self) -> impl Future<Output = ()> + Send + 'static {
        let transport = self.transport.get();
        let reset = transport.begin_reset(&mut lock(&transport.state));
        let handle = self.transport.handle();
        async move {
            if let Some(reset) = reset {
                session::finish_when_drained(reset, handle).await;
            }
        }
    }

    /// Takes the function away from the guest: from now on its registers read all ones and take no writes. A driver that is
    /// alive gets an answer for all it has in the queues: what the backend has begun ends, the rest fails. The future is
    /// ready when nothing of the function is in use any more. Idempotent.
    pub fn close(self: &Arc<Self>) -> impl Future<Output = ()> + Send + 'static {
        self.transport.close();
        let transport = self.transport.get();
        // Closes the activation's gate now; what is left to do is found again below.
        let _ = transport.begin_removal(&mut lock(&transport.state));
        let this = Arc::clone(self);
        async move {
            this.gate().drained().await;
            // A register access that was admitted before the gate closed may have activated the device meanwhile.
            let transport = this.transport.get();
            let activation = transport.begin_removal(&mut lock(&transport.state));
            if let Some(gate) = activation {
                gate.drained().await;
            }
            let reset = transport.begin_reset(&mut lock(&transport.state));
            if let Some(reset) = reset {
                reset.drained().await;
                transport.finish_reset(&reset);
            }
        }
    }

    /// The guest has ejected the function or turned its slot off, before or while it is [closed](Self::close): what its
    /// driver has put into the queues is all there is, and is answered without waiting for more.
    pub fn guest_let_go(&self) {
        self.transport.get().link.set_let_go();
    }

    /// The guest is another one, and does not wait for what is in flight: no queue is touched any more, and no answer
    /// written to the guest's memory, for good. Ready when none is being written. What the host was asked to read may still
    /// come, to what is [`pinned`](Self::pinned).
    pub fn forget_guest(&self) -> impl Future<Output = ()> + Send + 'static {
        let transport = self.transport.get();
        // Whoever waits for what is in flight finds the reset begun.
        let _ = transport.begin_reset(&mut lock(&transport.state));
        transport.link.end_answers()
    }

    /// Gives up what the requests in flight wait for; see [`VirtioDevice::abandon`].
    pub fn abandon(&self) -> bool {
        self.transport.get().device.abandon()
    }

    /// The host addresses of guest memory that requests in flight have pinned; see [`VirtioDevice::pinned`].
    pub fn pinned(&self) -> Vec<PinnedList> {
        self.transport.get().device.pinned()
    }

    /// What keeps the function from draining besides register accesses: the requests the device counts or, where it has
    /// none or counts none, who is inside the activation. In a removal that is also a queue that is still answered.
    pub fn in_flight(&self) -> InFlight {
        let transport = self.transport.get();
        let counted = transport.device.in_flight();
        counted.filter(|it| it.requests > 0).unwrap_or_else(|| {
            let state = lock(&transport.state);
            let held = state.phase.gate().map_or(0, |gate| gate.held().io);
            InFlight {
                requests: held.into(),
                oldest: None,
            }
        })
    }
}

impl Function for VirtioPci {
    fn config(&self) -> &Config {
        &self.config
    }

    fn read_config(&self, offset: u16, size: u8) -> u32 {
        if self.window.is_hit(offset, size)
            && let Some(target) = self.window.target(|at, size| self.config.read(at, size))
        {
            let value = self.transport.get().read(target.offset, target.size);
            let bytes = value.to_le_bytes();
            self.config.set(
                self.window.data(),
                bytes.get(..usize::from(target.size)).unwrap_or_default(),
            );
        }
        self.config.read(offset, size)
    }

    fn write_config(&self, offset: u16, size: u8, value: u32) {
        self.config.write(offset, size, value);
        if self.window.is_hit(offset, size)
            && let Some(target) = self.window.target(|at, size| self.config.read(at, size))
        {
            let value = self.config.read(self.window.data(), target.size);
            self.transport
                .get()
                .write(target.offset, target.size, value.into());
        }
    }

    fn reset(&self) {
        let transport = self.transport.get();
        transport.reset_from_outside();
        self.config.reset();
    }

    fn remnant(&self) -> Option<Remnant> {
        let Transport { name, link, .. } = self.transport.get();
        link.may_be_awaited().then(|| Detached::remnant(name))
    }
}

impl Drop for VirtioPci {
    fn drop(&mut self) {
        // The device's threads learn that it is over; they do not need what is dropped here.
        let transport = self.transport.get();
        let _ = transport.begin_reset(&mut lock(&transport.state));
    }
}

fn check_queues(name: &str, sizes: &[u16]) -> Result<u16, TransportError> {
    let max = layout::MAX_QUEUES;
    let count = u16::try_from(sizes.len())
        .ok()
        .filter(|&count| count > 0 && usize::from(count) <= max);
    let count = count.ok_or_else(|| TransportError::QueueCount {
        name: name.to_owned(),
        count: sizes.len(),
        max,
    })?;
    match sizes
        .iter()
        .find(|size| !size.is_power_of_two() || **size > MAX_SIZE)
    {
        Some(&size) => Err(TransportError::QueueSize {
            name: name.to_owned(),
            size,
        }),
        None => Ok(count),
    }
}

fn ids(device_type: u16) -> Ids {
    // The PCI subsystem has no meaning for a device that is not transitional, save that it is not below 0x40 (4.1.2.1).
    let device = layout::DEVICE_BASE.wrapping_add(device_type);
    Ids {
        vendor: layout::VENDOR,
        device,
        revision: layout::REVISION,
        class: layout::class(device_type),
        subsystem_vendor: layout::VENDOR,
        subsystem: device,
    }
}

fn add_capabilities(config: &mut Config, queues: u16) -> Result<Window, PciError> {
    let notify = layout::NOTIFY..layout::notify_offset(queues);
    let structures = [
        layout::capability(Kind::Common, layout::COMMON, None),
        layout::capability(Kind::Notify, notify, Some(layout::NOTIFY_STRIDE)),
        layout::capability(Kind::Isr, layout::ISR, None),
        layout::capability(Kind::Device, layout::DEVICE, None),
    ];
    for structure in &structures {
        config.add_capability(VENDOR_SPECIFIC, structure, &[])?;
    }
    let window = layout::capability(Kind::PciConfig, 0..0, Some(0));
    config
        .add_capability(VENDOR_SPECIFIC, &window, &Window::WRITABLE)
        .map(Window::new)
}
