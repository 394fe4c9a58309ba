// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Port accesses and their ioeventfds on this machine's KVM.

mod flat;

use std::sync::Arc;

use ebbtide_hypervisor::Exit;
use ebbtide_memory::{Ioeventfd, Mmio, Region};
use flat::{Guest, kvm};

program!(
    uses_ports_of_every_width,
    "mov dx, 0x510",
    "in al, dx",
    "in ax, dx",
    "in eax, dx",
    "out dx, eax",
    "out dx, ax",
    "out dx, al",
    "hlt",
);

#[test]
fn port_accesses_exit_with_port_and_width() {
    let Some(kvm) = kvm() else { return };
    let mut guest = Guest::new(&kvm, uses_ports_of_every_width());
    let value = 0x4433_2211u32.to_le_bytes();
    for width in [1, 2, 4] {
        match guest.exit() {
            Exit::PortIn {
                port: 0x510,
                data,
                size,
            } => {
                assert_eq!((data.len(), usize::from(size)), (width, width));
                data.copy_from_slice(&value[..width]);
            }
            other => panic!("{other:x?}"),
        }
    }
    for width in [4, 2, 1] {
        match guest.exit() {
            Exit::PortOut {
                port: 0x510,
                data,
                size,
            } => {
                assert_eq!((data, usize::from(size)), (&value[..width], width));
            }
            other => panic!("{other:x?}"),
        }
    }
}

program!(
    uses_string_instructions,
    "cld",
    "mov edi, 0x100000",
    "mov ecx, 100",
    "mov dx, 0x510",
    "rep insw",
    "mov esi, 0x100000",
    "mov ecx, 100",
    "rep outsw",
    "mov al, 1",
    "out 0xe0, al",
    "hlt",
);

#[test]
fn string_instructions_carry_several_units() {
    let Some(kvm) = kvm() else { return };
    let mut guest = Guest::new(&kvm, uses_string_instructions());
    let (mut given, mut taken) = (Vec::new(), Vec::new());
    loop {
        match guest.exit() {
            Exit::PortIn {
                port: 0x510,
                data,
                size: 2,
            } => {
                for unit in data.chunks_exact_mut(2) {
                    let value = 1000 + given.len() as u16;
                    unit.copy_from_slice(&value.to_le_bytes());
                    given.push(value);
                }
            }
            Exit::PortOut {
                port: 0x510,
                data,
                size: 2,
            } => {
                assert_eq!(data.len() % 2, 0);
                taken.extend(
                    data.chunks_exact(2)
                        .map(|unit| u16::from_le_bytes([unit[0], unit[1]])),
                );
            }
            Exit::PortOut {
                port: flat::PORT,
                data: &[1],
                ..
            } => break,
            other => panic!("{other:x?}"),
        }
    }
    // KVM may read ahead of what the guest asked for, but never hands out more.
    assert_eq!(given[..100], (1000..1100).collect::<Vec<u16>>());
    assert_eq!(taken, given[..100]);
}

/// Registers that nobody asks: the tests look at the exits.
struct Nobody;

impl Mmio for Nobody {
    fn read(&self, _offset: u64, _size: u8) -> u64 {
        0
    }
    fn write(&self, _offset: u64, _size: u8, _value: u64) {}
}

program!(
    rings_a_port,
    "mov dx, 0x510",
    "mov eax, 7",
    "out dx, ax",
    "out dx, eax",
    "mov al, 1",
    "out 0xe0, al",
    "mov dx, 0x510",
    "out dx, ax",
    "hlt",
);

#[test]
fn a_port_ioeventfd_takes_exactly_its_writes() {
    let Some(kvm) = kvm() else { return };
    let mut guest = Guest::new(&kvm, rings_a_port());
    let registers = Region::mmio("registers", 0x10, Arc::new(Nobody));
    let (event, fd) = flat::event();
    let ioeventfd = Ioeventfd {
        offset: 0,
        size: 2,
        datamatch: None,
        fd,
    };
    guest
        .memory
        .update(|t| {
            t.add(&guest.ports, &registers, 0x510, 0)?;
            t.add_ioeventfd(&registers, ioeventfd.clone())
        })
        .unwrap();
    assert_eq!(
        guest.exit(),
        Exit::PortOut {
            port: 0x510,
            data: &[7, 0, 0, 0],
            size: 4
        },
        "another width"
    );
    assert_eq!(event.read().unwrap(), 1);
    assert_eq!(guest.report(), 1);
    // A region that goes takes its ioeventfd along.
    guest.memory.update(|t| t.remove(&registers)).unwrap();
    assert_eq!(
        guest.exit(),
        Exit::PortOut {
            port: 0x510,
            data: &[1, 0],
            size: 2
        },
        "removed"
    );
    assert!(event.read().is_err());
}
