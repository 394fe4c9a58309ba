// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Starting, stopping, saving and restoring processors on this machine's KVM.

mod flat;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use ebbtide_hypervisor::{Error, Exit, Vm, sim};
use flat::{Guest, LIMIT, kvm, report_of};

program!(faults_without_a_table, "ud2");

#[test]
fn a_triple_fault_is_a_shutdown() {
    let Some(kvm) = kvm() else { return };
    let mut guest = Guest::new(&kvm, faults_without_a_table());
    assert_eq!(guest.exit(), Exit::Shutdown);
}

program!(spins, "2: jmp 2b");

#[test]
fn a_kick_before_the_run_ends_it() {
    let Some(kvm) = kvm() else { return };
    let mut guest = Guest::new(&kvm, spins());
    guest.vcpu().bind_thread().unwrap();
    let kicker = guest.vcpu().kicker();
    for _ in 0..3 {
        kicker.kick();
        kicker.kick();
        assert_eq!(guest.vcpu().run().unwrap(), Exit::Interrupted);
    }
}

#[test]
fn a_kick_reaches_a_guest_that_never_exits() {
    let Some(kvm) = kvm() else { return };
    let mut guest = Guest::new(&kvm, spins());
    guest.vcpu().bind_thread().unwrap();
    let kicker = guest.vcpu().kicker();
    let other = thread::spawn(move || {
        thread::sleep(Duration::from_millis(50));
        kicker.kick();
    });
    assert_eq!(guest.vcpu().run().unwrap(), Exit::Interrupted);
    other.join().unwrap();
}

#[test]
fn no_kick_is_lost_whenever_it_comes() {
    const KICKS: u64 = 500;
    let Some(kvm) = kvm() else { return };
    let mut guest = Guest::new(&kvm, spins());
    let asked = Arc::new(AtomicU64::new(0));
    let done = Arc::new(AtomicU64::new(0));
    let kicker = guest.vcpu().kicker();
    let other = {
        let (asked, done) = (Arc::clone(&asked), Arc::clone(&done));
        thread::spawn(move || {
            for n in 1..=KICKS {
                asked.store(n, Ordering::SeqCst);
                kicker.kick();
                let began = Instant::now();
                while done.load(Ordering::SeqCst) < n {
                    assert!(began.elapsed() < LIMIT, "kick {n} was lost");
                    // Comes at another point of the loop every time.
                    (0..n % 50).for_each(|_| std::hint::spin_loop());
                }
            }
        })
    };
    guest.vcpu().bind_thread().unwrap();
    loop {
        let n = asked.load(Ordering::SeqCst);
        done.store(n, Ordering::SeqCst);
        if n == KICKS {
            break;
        }
        assert_eq!(guest.vcpu().run().unwrap(), Exit::Interrupted);
        if other.is_finished() {
            break;
        }
    }
    other.join().unwrap();
}

#[test]
fn a_kicker_may_outlive_its_vcpu() {
    let Some(kvm) = kvm() else { return };
    let mut guest = Guest::new(&kvm, spins());
    guest.vcpu().bind_thread().unwrap();
    let kicker = guest.vcpu().kicker();
    guest.vcpus.clear();
    kicker.kick();
}

program!(
    counts,
    "mov al, 1",
    "2: out 0xe0, al",
    "inc al",
    "in al, 0xe1",
    "jmp 2b",
);

/// Serves one report and the answer to the read after it.
fn step(guest: &mut Guest, answer: u8) -> u8 {
    let report = guest.report();
    match guest.exit() {
        Exit::PortIn {
            port: 0xe1, data, ..
        } => data.fill(answer),
        other => panic!("{other:x?}"),
    }
    report
}

/// Lets the guest take its answer without running on.
fn settle(guest: &mut Guest) {
    let vcpu = guest.vcpu();
    vcpu.bind_thread().unwrap();
    vcpu.kicker().kick();
    assert_eq!(vcpu.run().unwrap(), Exit::Interrupted);
}

#[test]
fn a_saved_state_is_gone_back_to() {
    let Some(kvm) = kvm() else { return };
    let mut guest = Guest::new(&kvm, counts());
    assert_eq!(step(&mut guest, 20), 1);
    assert!(
        matches!(guest.vcpu().save(), Err(Error::AnswerDue { vcpu: 0 })),
        "in the middle of an instruction"
    );
    settle(&mut guest);
    let saved = guest.vcpu().save().unwrap();
    for answer in [30, 40, 50] {
        step(&mut guest, answer);
    }
    guest.vcpu().restore(&saved).unwrap();
    // The answer to the exit that was being served is not mistaken for one of the restored guest's.
    assert_eq!(guest.report(), 20);
}

#[test]
fn power_on_state_starts_the_guest_anew() {
    let Some(kvm) = kvm() else { return };
    let mut guest = Guest::new(&kvm, counts());
    let power_on = guest.vcpu().save().unwrap();
    for round in 0..3 {
        guest.vcpu().restore(&power_on).unwrap();
        guest.load(counts());
        assert_eq!(guest.report(), 1, "round {round}");
        assert!(matches!(guest.exit(), Exit::PortIn { .. }));
    }
}

program!(
    keeps_things_in_registers,
    "mov ecx, 0xc0000102", // KERNEL_GS_BASE
    "mov eax, 0x1111",
    "xor edx, edx",
    "wrmsr",
    "mov eax, 0x2222",
    "mov dr0, rax",
    "mov al, 1",
    "out 0xe0, al",
    "mov ecx, 0xc0000102",
    "mov eax, 0x3333",
    "wrmsr",
    "mov eax, 0x4444",
    "mov dr0, rax",
    "mov al, 2",
    "out 0xe0, al",
    "mov ecx, 0xc0000102",
    "rdmsr",
    "cmp eax, 0x1111",
    "jne 2f",
    "mov rax, dr0",
    "cmp eax, 0x2222",
    "jne 2f",
    "mov al, 3",
    "out 0xe0, al",
    "2: mov al, 0xff",
    "out 0xe0, al",
);

#[test]
fn model_specific_and_debug_registers_are_part_of_the_state() {
    let Some(kvm) = kvm() else { return };
    let mut guest = Guest::new(&kvm, keeps_things_in_registers());
    assert_eq!(guest.report(), 1);
    settle(&mut guest);
    let saved = guest.vcpu().save().unwrap();
    assert_eq!(guest.report(), 2);
    settle(&mut guest);
    guest.vcpu().restore(&saved).unwrap();
    // Goes through the changes again.
    assert_eq!(guest.report(), 2);
    assert_eq!(guest.report(), 0xff);
    // Back, and past the changes: only the state can have undone them.
    guest.vcpu().restore(&saved).unwrap();
    let skip = find(keeps_things_in_registers(), 2);
    let mut boot = guest.boot.clone();
    boot.rip = flat::PROGRAM + skip as u64;
    guest.vcpu().set_boot_state(&boot).unwrap();
    assert_eq!(guest.report(), 3);
}

/// Behind the report of `number`: `mov al, number; out 0xe0, al`.
fn find(program: &[u8], number: u8) -> usize {
    let report = [0xb0, number, 0xe6, 0xe0];
    program
        .windows(4)
        .position(|bytes| bytes == report)
        .unwrap()
        + 4
}

#[test]
fn a_kick_before_a_restore_is_served_after_it() {
    let Some(kvm) = kvm() else { return };
    let mut guest = Guest::new(&kvm, counts());
    let power_on = guest.vcpu().save().unwrap();
    assert_eq!(guest.report(), 1);
    guest.vcpu().kicker().kick();
    guest.vcpu().restore(&power_on).unwrap();
    guest.load(counts());
    assert_eq!(guest.exit(), Exit::Interrupted);
    assert_eq!(guest.report(), 1);
}

#[test]
fn a_foreign_state_is_refused() {
    let Some(kvm) = kvm() else { return };
    let mut guest = Guest::new(&kvm, spins());
    let sim = sim::SimVm::new();
    let foreign = sim.create_vcpu(0, 1).unwrap().save().unwrap();
    assert!(matches!(
        guest.vcpu().restore(&foreign),
        Err(Error::ForeignState { .. })
    ));
    let chips = sim.save_chips().unwrap();
    assert!(matches!(
        guest.vm.restore_chips(&chips),
        Err(Error::ForeignState { .. })
    ));
}

// The second processor starts in real mode at 0x8000, where this puts `mov al, 2; out 0xe0, al; hlt`.
program!(
    starts_another,
    "mov dword ptr [0x8000], 0xe0e602b0",
    "mov word ptr [0x8004], 0xf4f4",
    "mov ebx, 0xfee00000",
    "mov dword ptr [rbx + 0xf0], 0x1ff",
    "mov dword ptr [rbx + 0x310], 0x01000000",
    "mov dword ptr [rbx + 0x300], 0x4500",
    "mov dword ptr [rbx + 0x310], 0x01000000",
    "mov dword ptr [rbx + 0x300], 0x4608",
    "mov al, 1",
    "out 0xe0, al",
    "2: jmp 2b",
);

#[test]
fn a_second_processor_waits_to_be_started() {
    let Some(kvm) = kvm() else { return };
    let mut guest = Guest::with_cpus(&kvm, starts_another(), 2);
    let power_on: Vec<_> = guest
        .vcpus
        .iter()
        .map(|vcpu| vcpu.save().unwrap())
        .collect();
    for round in 0..2 {
        let mut second = guest.vcpus.pop().unwrap();
        assert_eq!(second.index(), 1);
        // Nothing but a kick gets it out before it is started.
        let kicker = second.kicker();
        let waiting = thread::spawn(move || {
            second.bind_thread().unwrap();
            let first = matches!(second.run().unwrap(), Exit::Interrupted);
            (first, second)
        });
        thread::sleep(Duration::from_millis(50));
        assert!(!waiting.is_finished(), "round {round}");
        kicker.kick();
        let (interrupted, mut second) = waiting.join().unwrap();
        assert!(interrupted);

        let started = thread::spawn(move || {
            let report = report_of(second.as_mut());
            (report, second)
        });
        assert_eq!(guest.report(), 1, "round {round}");
        let (report, second) = started.join().unwrap();
        assert_eq!(report, 2, "round {round}");
        guest.vcpus.push(second);

        for (vcpu, state) in guest.vcpus.iter_mut().zip(&power_on) {
            vcpu.restore(state).unwrap();
        }
        guest.load(starts_another());
    }
}

#[test]
fn what_cannot_be_emulated_is_told_with_its_bytes() {
    let Some(kvm) = kvm() else { return };
    // Runs into memory without a slot: nothing can be fetched there.
    let mut guest = Guest::new(&kvm, &[0xb8, 0, 0, 0, 0x20, 0xff, 0xe0]);
    match guest.exit() {
        Exit::InternalError {
            suberror: 1,
            detail,
        } => {
            assert!(detail.contains("rip 0x20000000"), "{detail}");
        }
        other => panic!("{other:x?}"),
    }
}

#[test]
fn the_clock_can_be_stopped_and_set() {
    let Some(kvm) = kvm() else { return };
    let mut guest = Guest::new(&kvm, spins());
    let then = guest.vm.clock_ns().unwrap();
    thread::sleep(Duration::from_millis(30));
    let setting = Instant::now();
    guest.vm.set_clock_ns(then).unwrap();
    let now = guest.vm.clock_ns().unwrap();
    // It runs from then on.
    let runs = u64::try_from(setting.elapsed().as_nanos()).unwrap();
    assert!(
        now >= then && now < then + runs + 25_000_000,
        "{then} {now}"
    );
    // A guest without a clock takes no notice.
    guest.vcpu().mark_paused().unwrap();
    assert!(guest.vm.limits().tsc_khz.is_some_and(|khz| khz > 1000));
}
