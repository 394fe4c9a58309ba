// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The interrupt controllers that belong to no processor, and the guest's clock.

use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_clock_data, kvm_irqchip,
};
use kvm_ioctls::VmFd;

use super::vm::Machine;
use crate::{ChipState, Error};

const CHIPS: [u32; 3] = [
    KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE,
    KVM_IRQCHIP_IOAPIC,
];

struct Chips(Vec<kvm_irqchip>);

pub(super) fn save(fd: &VmFd) -> Result<ChipState, Error> {
    let mut chips = Vec::with_capacity(CHIPS.len());
    for chip_id in CHIPS {
        let mut chip = kvm_irqchip {
            chip_id,
            ..Default::default()
        };
        fd.get_irqchip(&mut chip)
            .map_err(|errno| Machine::refused("KVM_GET_IRQCHIP", errno))?;
        chips.push(chip);
    }
    Ok(ChipState(Box::new(Chips(chips))))
}

pub(super) fn restore(fd: &VmFd, state: &ChipState) -> Result<(), Error> {
    let Some(Chips(chips)) = state.0.downcast_ref() else {
        return Err(Error::ForeignState {
            object: "the interrupt controllers".to_owned(),
        });
    };
    for chip in chips {
        fd.set_irqchip(chip)
            .map_err(|errno| Machine::refused("KVM_SET_IRQCHIP", errno))?;
    }
    Ok(())
}

pub(super) fn clock_ns(fd: &VmFd) -> Result<u64, Error> {
    let clock = fd
        .get_clock()
        .map_err(|errno| Machine::refused("KVM_GET_CLOCK", errno))?;
    Ok(clock.clock)
}

pub(super) fn set_clock_ns(fd: &VmFd, clock_ns: u64) -> Result<(), Error> {
    let clock = kvm_clock_data {
        clock: clock_ns,
        ..Default::default()
    };
    fd.set_clock(&clock)
        .map_err(|errno| Machine::refused("KVM_SET_CLOCK", errno))
}
