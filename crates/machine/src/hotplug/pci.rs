// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A PCI function as the lifecycle of devices sees it.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;

use ebbtide_bus::pci::{Bus, Devfn, Function, Port};
use ebbtide_device::{Draining, Holder, Model};
use ebbtide_devices::i6300esb::I6300Esb;
use ebbtide_devices::serial_pci::SerialPci;
use ebbtide_devices::testdev::TestDevice;
use ebbtide_gate::Gate;
use ebbtide_virtio::{InFlight, PinnedList, VirtioPci};

/// A PCI function that can be taken away while it works.
pub(crate) trait Removable: Function {
    /// Ends its work for good. Its gate is closed; the future is ready when nothing of it is in use any more.
    fn close(self: Arc<Self>) -> Draining;

    /// Ends its work for this guest, as at a reset of the machine; the future is ready when nothing is in flight and the
    /// registers are as at power-on. It does not keep the function alive.
    fn quiesce(&self) -> Pin<Box<dyn Future<Output = ()>>>;

    /// Who uses memory of it that is on its way out, for reports.
    fn pins(&self) -> Vec<Holder> {
        Vec::new()
    }

    /// The guest has ejected it: its driver asks for nothing more.
    fn guest_let_go(&self) {}

    /// The guest is another one, and what is in flight, or on its way out, has to do with the last one: no queue is touched
    /// and no answer written any more. Ready when none is being written.
    fn forget_guest(&self) -> Pin<Box<dyn Future<Output = ()>>> {
        Box::pin(std::future::ready(()))
    }

    /// The host addresses that its requests in flight have pinned.
    fn pinned(&self) -> Vec<PinnedList> {
        Vec::new()
    }

    /// Gives up what its requests wait for. False: there is nothing to give up.
    fn force(&self) -> bool {
        false
    }

    /// The requests that keep it from draining.
    fn requests(&self) -> Option<Holder> {
        None
    }

    /// The guest stands still, and so does what time the device measures for it.
    fn pause(&self) {}

    /// The guest goes on.
    fn resume(&self) {}
}

impl Removable for VirtioPci {
    fn close(self: Arc<Self>) -> Draining {
        Box::pin(VirtioPci::close(&self))
    }

    fn quiesce(&self) -> Pin<Box<dyn Future<Output = ()>>> {
        Box::pin(VirtioPci::quiesce(self))
    }

    fn guest_let_go(&self) {
        VirtioPci::guest_let_go(self);
    }

    fn forget_guest(&self) -> Pin<Box<dyn Future<Output = ()>>> {
        Box::pin(VirtioPci::forget_guest(self))
    }

    fn pinned(&self) -> Vec<PinnedList> {
        VirtioPci::pinned(self)
    }

    fn force(&self) -> bool {
        self.abandon()
    }

    fn requests(&self) -> Option<Holder> {
        let InFlight { requests, oldest } = self.in_flight();
        Holder::requests(requests, oldest)
    }
}

/// A port does nothing by itself: once nobody is in its registers, nothing is left.
impl Removable for Port {
    fn close(self: Arc<Self>) -> Draining {
        Box::pin(self.config().gate().drained())
    }

    fn quiesce(&self) -> Pin<Box<dyn Future<Output = ()>>> {
        Box::pin(std::future::ready(()))
    }
}

impl Removable for SerialPci {
    fn close(self: Arc<Self>) -> Draining {
        Box::pin(SerialPci::close(&self))
    }

    fn quiesce(&self) -> Pin<Box<dyn Future<Output = ()>>> {
        Box::pin(SerialPci::quiesce(self))
    }
}

impl Removable for I6300Esb {
    fn close(self: Arc<Self>) -> Draining {
        Box::pin(I6300Esb::close(&self))
    }

    fn quiesce(&self) -> Pin<Box<dyn Future<Output = ()>>> {
        Box::pin(I6300Esb::quiesce(self))
    }

    fn pause(&self) {
        I6300Esb::pause(self);
    }

    fn resume(&self) {
        I6300Esb::resume(self);
    }
}

/// Its registers are all there is.
impl Removable for TestDevice {
    fn close(self: Arc<Self>) -> Draining {
        Box::pin(self.config().gate().drained())
    }

    fn quiesce(&self) -> Pin<Box<dyn Future<Output = ()>>> {
        Box::pin(std::future::ready(()))
    }
}

/// A function on a bus.
pub(crate) struct PciModel {
    function: Arc<dyn Removable>,
    bus: Arc<Bus>,
    at: Devfn,
}

impl PciModel {
    /// The function at `at` of `bus`.
    pub(crate) fn new(function: Arc<dyn Removable>, bus: &Arc<Bus>, at: Devfn) -> PciModel {
        PciModel {
            function,
            bus: Arc::clone(bus),
            at,
        }
    }
}

impl Model for PciModel {
    fn gate(&self) -> &Arc<Gate> {
        self.function.config().gate()
    }

    fn drain(&mut self) -> Draining {
        // Its RAM and ioeventfds go with its BARs; registers that were entered before are waited for below.
        if let Err(e) = self.bus.unmap(self.at) {
            tracing::error!("{}: its BARs stay mapped: {e}", self.gate().name());
        }
        Arc::clone(&self.function).close()
    }

    fn holders(&self) -> Vec<Holder> {
        let mut holders = Holder::inside(self.gate());
        holders.extend(self.function.requests());
        holders.extend(self.function.pins());
        holders
    }

    fn force(&mut self) -> bool {
        self.function.force()
    }
}
