// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Memory shared with other processes.

use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ebbtide_bus::pci::{Config, Function};
use ebbtide_device::{Draining, Holder};
use ebbtide_devices::ivshmem::IvshmemPlain;
use ebbtide_memory::Ticket;
use ebbtide_qmp::{Properties, QmpError};

use super::{Driver, Made, Make};
use crate::hotplug::objects::IdleBlock;
use crate::hotplug::{Devices, Removable};

pub(super) const DRIVER: Driver = Driver {
    name: "ivshmem-plain",
    aliases: &[],
    hotpluggable: true,
    properties: &[("memdev", "link<memory-backend>")],
    make: Make::Pci(make),
};

fn make(devices: &Devices, name: &str, properties: &mut Properties) -> Result<Made, QmpError> {
    let memdev = properties
        .take_string("memdev")?
        .ok_or_else(|| QmpError::generic("You must specify a 'memdev'"))?;
    let object = devices.memory_objects().take(&memdev, name)?;
    let idle = object.value().idle();
    let block = idle
        .take()
        .ok_or_else(|| QmpError::generic(format!("memory backend '{memdev}' has no memory")))?;
    let memory = devices.system().memory();
    let function = IvshmemPlain::new(name, memory, &block).map_err(|e| {
        idle.put_back(Arc::clone(&block));
        QmpError::generic(e.to_string())
    })?;
    let function = SharedMemory {
        function,
        idle,
        ticket: Mutex::default(),
    };
    Ok(Made {
        face: super::Face::Plain,
        function: Arc::new(function),
        port: None,
        uses: vec![Box::new(object)],
    })
}

/// The function with the end of its memory. Dropping it gives memory back that was retired, and may block.
struct SharedMemory {
    function: Arc<IvshmemPlain>,
    idle: IdleBlock,
    ticket: Mutex<Option<Ticket>>,
}

impl SharedMemory {
    fn ticket(&self) -> MutexGuard<'_, Option<Ticket>> {
        self.ticket.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Function for SharedMemory {
    fn config(&self) -> &Config {
        self.function.config()
    }
}

impl Removable for SharedMemory {
    /// The guest's vCPUs lost the memory with the BAR; requests of other devices may still read or write it.
    fn close(self: Arc<Self>) -> Draining {
        let closed = self.function.close();
        let ticket = match self.function.retire() {
            Ok(ticket) => ticket,
            Err(error) => {
                // Something shows the memory: it can't go under it.
                tracing::error!("{}: {error}", self.function.gate().name());
                return Box::pin(std::future::pending());
            }
        };
        let drained = ticket.drained();
        *self.ticket() = Some(ticket);
        Box::pin(async move {
            closed.await;
            drained.await;
        })
    }

    fn quiesce(&self) -> Pin<Box<dyn Future<Output = ()>>> {
        Box::pin(self.function.quiesce())
    }

    fn pins(&self) -> Vec<Holder> {
        let holder = |holder: ebbtide_memory::Holder| Holder {
            what: format!("{} ({})", holder.what, holder.count),
            age: Some(holder.age),
        };
        let ticket = self.ticket();
        let holders = ticket.iter().flat_map(Ticket::holders);
        holders.map(holder).collect()
    }
}

impl Drop for SharedMemory {
    fn drop(&mut self) {
        match self.ticket().take() {
            Some(ticket) => {
                if let Err((_kept, error)) = ticket.destroy() {
                    tracing::error!("{error}");
                }
            }
            // It never was on a bus, or goes with the whole machine.
            None => self.idle.put_back(Arc::clone(self.function.block())),
        }
    }
}
