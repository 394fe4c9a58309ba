// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Memory shared with other processes and guests (ivshmem device specification, revision 1), without interrupts.
//!
//! | BAR | what |
//! |---|---|
//! | 0 | registers: interrupt mask and status, IVPosition, doorbell; all of them read as 0 and do nothing here |
//! | 2 | the shared memory, 64 bits, prefetchable |
//!
//! The memory is a RAM block, mapped into the guest like its own: an access to it is no exit, and devices reach it by
//! DMA. So the removal has an end of its own: the guest and the requests of other devices may use it after the gate is
//! shut, and it is theirs until the BAR is out of the map and the last pin is gone.
//!
//! ```text
//! gate shut ──▶ HostBridge::unmap: no new user ──▶ close() ready ──▶ detached
//!                                            └──▶ retire(): Ticket ──last pin──▶ drained ──▶ destroy
//! ```
//!
//! Linux has no driver for it: `uio_pci_generic`, or `resource2` in sysfs.

use std::future::Future;
use std::sync::Arc;

use ebbtide_bus::gated;
use ebbtide_bus::pci::{BarKind, BarSpec, Config, Function, Ids};
use ebbtide_gate::{Gate, Owned};
use ebbtide_memory::{Memory, Mmio, RamBlock, Region, Ticket};

use crate::Error;

const IDS: Ids = Ids {
    vendor: 0x1af4,
    device: 0x1110,
    revision: 1,
    class: 0x05_00_00,
    subsystem_vendor: 0x1af4,
    subsystem: 0x1100,
};
const REGISTERS_BAR: u8 = 0;
/// The registers are the first 256 bytes; a BAR is a page.
const REGISTERS_BAR_BYTES: u64 = 4096;
const MEMORY_BAR: u8 = 2;
/// The smallest BAR.
const MIN_BYTES: u64 = 4096;

/// Says of the name of an ivshmem device whether there is one.
///
/// # Errors
/// [`Error::Unsupported`] for every name but `ivshmem-plain`.
pub fn check_driver(driver: &str) -> Result<(), Error> {
    let reason = match driver {
        "ivshmem-plain" => return Ok(()),
        "ivshmem-doorbell" => {
            "there is no ivshmem server to exchange interrupts through; ivshmem-plain shares memory without them"
        }
        _ => "the only ivshmem device is ivshmem-plain",
    };
    Err(Error::Unsupported {
        driver: driver.to_owned(),
        reason,
    })
}

/// Shared memory on the PCI bus (QEMU's `ivshmem-plain`).
///
/// [`close`](Self::close) shuts its gate, which is the one of its [`Config`].
pub struct IvshmemPlain {
    registers: Owned<Registers>,
    config: Config,
    memory: Arc<Memory>,
    block: Arc<RamBlock>,
}

/// Nothing of the registers works without a server. They answer all the same: reserved bits are zero.
struct Registers;

impl Mmio for Registers {
    fn read(&self, _offset: u64, _size: u8) -> u64 {
        0
    }

    fn write(&self, _offset: u64, _size: u8, _value: u64) {}
}

impl IvshmemPlain {
    /// Shows `block`, a block of `memory`, to the guest on a function called `name`. The block is for nobody else in
    /// this machine.
    ///
    /// # Errors
    /// [`Error::SharedMemory`] names the block and what is wrong with it: nobody else could map it, or a BAR cannot be
    /// of its size; or the function cannot be made.
    pub fn new(
        name: &str,
        memory: &Arc<Memory>,
        block: &Arc<RamBlock>,
    ) -> Result<Arc<IvshmemPlain>, Error> {
        if let Some(reason) = fault(block) {
            return Err(Error::SharedMemory {
                name: name.to_owned(),
                memdev: block.name().to_owned(),
                reason,
            });
        }
        let registers = Owned::new(name, Registers);
        let mut config = Config::new(registers.gate(), IDS);
        let handle = gated::registers(registers.handle());
        let region = Region::mmio(name, REGISTERS_BAR_BYTES, handle);
        let spec = BarSpec {
            size_bytes: REGISTERS_BAR_BYTES,
            kind: BarKind::Mem32,
        };
        config.add_bar(REGISTERS_BAR, spec, region)?;
        let spec = BarSpec {
            size_bytes: block.size_bytes(),
            kind: BarKind::Mem64 { prefetchable: true },
        };
        let region = Region::ram_device(block.name(), block);
        config.add_bar(MEMORY_BAR, spec, region)?;
        Ok(Arc::new(IvshmemPlain {
            registers,
            config,
            memory: Arc::clone(memory),
            block: Arc::clone(block),
        }))
    }

    /// The gate of the function; [`close`](Self::close) shuts it.
    pub fn gate(&self) -> &Arc<Gate> {
        self.registers.gate()
    }

    /// The shared memory.
    pub fn block(&self) -> &Arc<RamBlock> {
        &self.block
    }

    /// Ends the driver's use of the device as a reset does: there is nothing to end, the memory keeps what it holds. For a
    /// reset of the machine, with the vCPUs stopped.
    pub fn quiesce(&self) -> impl Future<Output = ()> + Send + 'static {
        std::future::ready(())
    }

    /// Takes the function away from the guest: from now on its registers read all ones and take no writes. The future is
    /// ready when nothing of the function is in use any more; of the shared memory that is for [`retire`](Self::retire)
    /// to say. Idempotent.
    pub fn close(self: &Arc<Self>) -> impl Future<Output = ()> + Send + 'static {
        self.registers.close();
        self.gate().drained()
    }

    /// Begins the end of the shared memory: the ticket tells when the last request that reads or writes it is through,
    /// and gives it back to the host then. After [`unmap`](ebbtide_bus::pci::HostBridge::unmap) has taken the BAR out of
    /// the map. Not for memory that is to be shown again.
    ///
    /// # Errors
    /// `StillMapped` while the BAR is in the map; `Unplugged` the second time.
    pub fn retire(&self) -> Result<Ticket, ebbtide_memory::Error> {
        self.memory.update(|change| change.retire(&self.block))
    }
}

impl Function for IvshmemPlain {
    fn config(&self) -> &Config {
        &self.config
    }
}

/// Why a block cannot be shared.
fn fault(block: &RamBlock) -> Option<String> {
    let size_bytes = block.size_bytes();
    if !block.is_shared() {
        Some("it is private: nobody else could see it (share=on is needed)".to_owned())
    } else if block.block_size_bytes().is_some() {
        Some("it is sparse: what is unplugged cannot be shared".to_owned())
    } else if !size_bytes.is_power_of_two() || size_bytes < MIN_BYTES {
        Some(format!(
            "its size {size_bytes} is not a power of two of at least {MIN_BYTES} bytes, as a BAR is"
        ))
    } else {
        None
    }
}
