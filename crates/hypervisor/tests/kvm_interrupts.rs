// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Messages and lines reach a guest on this machine's KVM.

mod flat;

use std::sync::Arc;
use std::thread;
use std::time::Duration;

use ebbtide_bus::irq::MsiMessage;
use ebbtide_hypervisor::{Error, Vm};
use flat::{Guest, kvm};

/// To the local APIC with id 0, fixed, edge.
fn message(vector: u8) -> MsiMessage {
    MsiMessage {
        address: 0xfee0_0000,
        data: vector.into(),
    }
}

// Vectors 0x50 to 0x5f report themselves. rbx: local APIC, r8: I/O APIC; its pin 10 is level-triggered, vector 0x5a;
// pin 5 edge-triggered, vector 0x55. Reports 1 when ready, then sleeps between interrupts.
program!(
    reports_interrupts,
    "mov edi, 0x100000",
    "mov ecx, 0x50",
    "lea rax, [rip + handlers]",
    "2: mov r9d, ecx",
    "shl r9d, 4",
    "add r9, rdi",
    "mov r10, rax",
    "and r10d, 0xffff",
    "mov word ptr [r9], r10w",
    "mov word ptr [r9 + 2], 0x10",
    "mov word ptr [r9 + 4], 0x8e00",
    "mov r10, rax",
    "shr r10, 16",
    "mov word ptr [r9 + 6], r10w",
    "mov qword ptr [r9 + 8], 0",
    "add rax, 16",
    "inc ecx",
    "cmp ecx, 0x60",
    "jne 2b",
    "sub rsp, 16",
    "mov word ptr [rsp], 0xfff",
    "mov qword ptr [rsp + 2], rdi",
    "lidt [rsp]",
    "mov ebx, 0xfee00000",
    "mov dword ptr [rbx + 0xf0], 0x1ff",
    "mov r8d, 0xfec00000",
    "mov dword ptr [r8], 0x10 + 10 * 2",
    "mov dword ptr [r8 + 0x10], 0x805a",
    "mov dword ptr [r8], 0x11 + 10 * 2",
    "mov dword ptr [r8 + 0x10], 0",
    "mov dword ptr [r8], 0x10 + 5 * 2",
    "mov dword ptr [r8 + 0x10], 0x55",
    "mov dword ptr [r8], 0x11 + 5 * 2",
    "mov dword ptr [r8 + 0x10], 0",
    "mov al, 1",
    "out 0xe0, al",
    "sti",
    "3: hlt",
    "jmp 3b",
    ".balign 16",
    "handlers:",
    ".set vector, 0x50",
    ".rept 16",
    "mov al, vector",
    "jmp 4f",
    ".balign 16",
    ".set vector, vector + 1",
    ".endr",
    "4: out 0xe0, al",
    "mov dword ptr [rbx + 0xb0], 0",
    "iretq",
);

#[test]
fn a_signal_delivers_the_programmed_message() {
    let Some(kvm) = kvm() else { return };
    let mut guest = Guest::new(&kvm, reports_interrupts());
    let msi = guest.vm.msi();
    let (a, b) = (msi.route().unwrap(), msi.route().unwrap());
    assert_eq!(guest.vm.routes_in_use(), 2);
    a.program(Some(message(0x51))).unwrap();
    b.program(Some(message(0x52))).unwrap();
    assert_eq!(guest.report(), 1);
    a.signal();
    assert_eq!(guest.report(), 0x51);
    b.signal();
    assert_eq!(guest.report(), 0x52);
    a.program(Some(message(0x53))).unwrap();
    a.signal();
    assert_eq!(guest.report(), 0x53);
    // Without a message, signals go nowhere, then and later.
    a.program(None).unwrap();
    a.signal();
    a.program(Some(message(0x54))).unwrap();
    b.signal();
    assert_eq!(guest.report(), 0x52);
    a.signal();
    assert_eq!(guest.report(), 0x54);
    drop((a, b));
    assert_eq!(guest.vm.routes_in_use(), 0);
}

#[test]
fn a_signal_from_another_thread_wakes_a_sleeping_guest() {
    let Some(kvm) = kvm() else { return };
    let mut guest = Guest::new(&kvm, reports_interrupts());
    let route = guest.vm.msi().route().unwrap();
    route.program(Some(message(0x58))).unwrap();
    assert_eq!(guest.report(), 1);
    for _ in 0..5 {
        let route = Arc::clone(&route);
        let device = thread::spawn(move || {
            thread::sleep(Duration::from_millis(20));
            route.signal();
        });
        assert_eq!(guest.report(), 0x58);
        device.join().unwrap();
    }
}

#[test]
fn routes_are_given_back() {
    let Some(kvm) = kvm() else { return };
    let guest = Guest::new(&kvm, reports_interrupts());
    let msi = guest.vm.msi();
    for _ in 0..3 {
        let routes: Vec<_> = (0..64).map(|_| msi.route().unwrap()).collect();
        for (vector, route) in (0..).zip(&routes) {
            route.program(Some(message(vector))).unwrap();
        }
        assert_eq!(guest.vm.routes_in_use(), 64);
        drop(routes);
        assert_eq!(guest.vm.routes_in_use(), 0);
    }
}

#[test]
fn an_edge_interrupts_once() {
    let Some(kvm) = kvm() else { return };
    let mut guest = Guest::new(&kvm, reports_interrupts());
    let line = guest.vm.irq_line(5).unwrap();
    let other = guest.vm.msi().route().unwrap();
    other.program(Some(message(0x51))).unwrap();
    assert_eq!(guest.report(), 1);
    ebbtide_bus::irq::pulse(line.as_ref());
    assert_eq!(guest.report(), 0x55);
    line.set(true);
    assert_eq!(guest.report(), 0x55);
    other.signal();
    assert_eq!(guest.report(), 0x51);
}

#[test]
fn a_level_interrupts_until_it_falls() {
    let Some(kvm) = kvm() else { return };
    let mut guest = Guest::new(&kvm, reports_interrupts());
    let line = guest.vm.irq_line(10).unwrap();
    let other = guest.vm.msi().route().unwrap();
    other.program(Some(message(0x51))).unwrap();
    assert_eq!(guest.report(), 1);
    line.set(true);
    for _ in 0..3 {
        assert_eq!(guest.report(), 0x5a);
    }
    line.set(false);
    other.signal();
    // One more may have been on its way.
    let next = guest.report();
    assert!(
        next == 0x51 || (next == 0x5a && guest.report() == 0x51),
        "{next:#x}"
    );
}

#[test]
fn a_line_has_one_holder() {
    let Some(kvm) = kvm() else { return };
    let mut guest = Guest::new(&kvm, reports_interrupts());
    let line = guest.vm.irq_line(10).unwrap();
    assert!(matches!(
        guest.vm.irq_line(10),
        Err(Error::LineTaken { gsi: 10 })
    ));
    assert!(matches!(
        guest.vm.irq_line(24),
        Err(Error::NoSuchLine { gsi: 24, last: 23 })
    ));
    assert_eq!(guest.report(), 1);
    // A holder that goes lets the line fall.
    line.set(true);
    drop(line);
    assert!(guest.vm.irq_line(10).is_ok());
    let other = guest.vm.msi().route().unwrap();
    other.program(Some(message(0x51))).unwrap();
    other.signal();
    let next = guest.report();
    assert!(
        next == 0x51 || (next == 0x5a && guest.report() == 0x51),
        "{next:#x}"
    );
}

#[test]
fn chips_go_back_to_their_state_at_power_on() {
    let Some(kvm) = kvm() else { return };
    let mut guest = Guest::new(&kvm, reports_interrupts());
    let chips = guest.vm.save_chips().unwrap();
    let cpu = guest.vcpu().save().unwrap();
    let line = guest.vm.irq_line(5).unwrap();
    assert_eq!(guest.report(), 1);
    line.set(true);
    assert_eq!(guest.report(), 0x55);
    // A reset with an interrupt in service and the line high.
    guest.vm.restore_chips(&chips).unwrap();
    guest.vcpu().restore(&cpu).unwrap();
    line.set(false);
    guest.load(reports_interrupts());
    assert_eq!(guest.report(), 1);
    line.set(true);
    assert_eq!(guest.report(), 0x55);
}
