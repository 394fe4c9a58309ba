// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Can this machine's KVM carry a kernel?
//!
//! That `/dev/kvm` opens proves nothing: a host may emulate every instruction of a guest's kernel mode, a thousand times
//! slower than the processor and without half of its instructions. So the probe runs a guest that does what a kernel
//! does, with a time limit, and compares a loop of known length with the same loop outside: a ratio, so that a KVM which
//! is itself emulated (in a machine emulator) passes.

mod flavour;
mod guest;

use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use ebbtide_memory::FlatIoeventfd;
use vmm_sys_util::eventfd::EventFd;

pub use flavour::Flavour;

use crate::kvm::{self, KvmVm};
use crate::{BootState, Error, Exit, Vcpu, Vm};
use guest::Mark;

/// Rounds of the guest's loop: long against an exit, short against a second.
const LOOP_ROUNDS: u64 = 200_000;
/// Above this ratio the guest is being emulated: hardware measures 1, the emulators known 1,000 and more.
const SLOWEST_RATIO: f64 = 32.0;
/// What the guest reads from its register.
const REGISTER_VALUE: u32 = 0x5eed_0001;

/// What the probe found.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct ProbeReport {
    /// The device node exists.
    pub present: bool,
    /// It opened, as a KVM this crate can speak to.
    pub opens: bool,
    /// The kernel module behind it, where that is known.
    pub flavour: Option<Flavour>,
    /// A kernel will run.
    pub can_run_guest: bool,
    /// Why, or why not: one sentence for the user.
    pub reason: String,
    /// Nanoseconds per round of the guest's loop, the best of several; `None` if the guest did not get there.
    pub guest_ns_per_loop: Option<f64>,
    /// Nanoseconds per round of the same loop outside.
    pub host_ns_per_loop: Option<f64>,
    /// How long the probe took, in milliseconds.
    pub elapsed_ms: u64,
}

/// Probes the KVM at `path`; takes no longer than about `limit` (2 s are plenty).
pub fn run(path: impl AsRef<Path>, limit: Duration) -> ProbeReport {
    let path = path.as_ref();
    let began = Instant::now();
    let mut report = ProbeReport {
        present: path.exists(),
        opens: false,
        flavour: Flavour::detect(Path::new("/sys/module")),
        can_run_guest: false,
        reason: String::new(),
        guest_ns_per_loop: None,
        host_ns_per_loop: None,
        elapsed_ms: 0,
    };
    let verdict = if report.present {
        attempt(path, limit, &mut report)
    } else {
        Err(format!("there is no {}", path.display()))
    };
    report.can_run_guest = verdict.is_ok();
    report.reason = verdict.unwrap_or_else(|reason| reason);
    report.elapsed_ms = u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX);
    report
}

/// The verdict with its reason.
fn attempt(path: &Path, limit: Duration, report: &mut ProbeReport) -> Result<String, String> {
    let say = |error: Error| error.to_string();
    let kvm = kvm::open(path).map_err(say)?;
    report.opens = true;
    let vm = kvm.create_vm().map_err(say)?;
    let image = guest::Image::new().map_err(|error| format!("no memory for a guest: {error}"))?;
    // SAFETY: `image` is declared after `vm`, but the slot is gone when the vCPU and the machine are: nothing runs after
    // this function, and KVM drops its mappings when the host memory goes.
    unsafe { vm.back(0, image.host(), guest::SIZE_BYTES as u64) }.map_err(say)?;
    let doorbell = Doorbell::new(&vm)?;
    let mut vcpu = vm.create_vcpu(0, 1).map_err(say)?;
    let boot = BootState::long_mode(
        guest::ENTRY,
        LOOP_ROUNDS,
        guest::STACK,
        guest::TOP_TABLE,
        guest::DESCRIPTORS,
    );
    vcpu.set_boot_state(&boot).map_err(say)?;
    vcpu.bind_thread().map_err(say)?;

    let host_ns = host_ns_per_loop();
    report.host_ns_per_loop = Some(host_ns);
    let mut course = Course::new(report.flavour, host_ns);
    let outcome = with_time_limit(vcpu.as_mut(), limit, |vcpu, deadline| {
        course.follow(vcpu, deadline)
    });
    report.guest_ns_per_loop = course.best_ns;
    outcome?;
    if !doorbell.rang() {
        return Err("a doorbell the guest rang was not heard".to_owned());
    }
    Ok(format!(
        "a test guest ran page faults, system calls, interrupts and devices at {:.1} times the time this processor takes",
        course.ratio().unwrap_or(1.0),
    ))
}

/// Runs `body` while another thread waits to kick `vcpu` when `limit` is over.
fn with_time_limit<T>(
    vcpu: &mut dyn Vcpu,
    limit: Duration,
    body: impl FnOnce(&mut dyn Vcpu, Instant) -> T,
) -> T {
    let kicker = vcpu.kicker();
    let (done, over) = mpsc::channel::<()>();
    thread::scope(|scope| {
        scope.spawn(move || {
            if over.recv_timeout(limit) == Err(mpsc::RecvTimeoutError::Timeout) {
                kicker.kick();
            }
        });
        let result = body(vcpu, Instant::now() + limit);
        drop(done);
        result
    })
}

/// The guest's way through its steps.
struct Course {
    flavour: Option<Flavour>,
    host_ns: f64,
    last: Option<Mark>,
    loop_began: Option<Instant>,
    loops: usize,
    best_ns: Option<f64>,
    echoed: bool,
}

impl Course {
    fn new(flavour: Option<Flavour>, host_ns: f64) -> Self {
        Self {
            flavour,
            host_ns,
            last: None,
            loop_began: None,
            loops: 0,
            best_ns: None,
            echoed: false,
        }
    }

    fn ratio(&self) -> Option<f64> {
        self.best_ns.map(|guest_ns| guest_ns / self.host_ns)
    }

    /// Runs the guest until it has done everything, or says what it could not do.
    fn follow(&mut self, vcpu: &mut dyn Vcpu, deadline: Instant) -> Result<(), String> {
        loop {
            let exit = vcpu
                .run()
                .map_err(|error| format!("{error}, {}", self.place()))?;
            match exit {
                Exit::PortOut {
                    port: guest::PORT,
                    data: &[byte],
                    ..
                } => {
                    if self.arrive(byte)? == Mark::Doorbell {
                        return Ok(());
                    }
                }
                Exit::MmioRead {
                    gpa: guest::REGISTER,
                    data,
                } => {
                    let value = REGISTER_VALUE.to_le_bytes();
                    data.iter_mut().zip(value).for_each(|(to, from)| *to = from);
                }
                Exit::MmioWrite {
                    gpa: guest::ECHO,
                    data,
                } => {
                    self.echoed = data == (REGISTER_VALUE + 1).to_le_bytes();
                }
                Exit::Interrupted if Instant::now() < deadline => {}
                Exit::Interrupted => {
                    return Err(format!(
                        "the test guest did not end in time, {}{}",
                        self.place(),
                        self.blame()
                    ));
                }
                Exit::InternalError { detail, .. } => {
                    return Err(format!("KVM {detail}, {}{}", self.place(), self.blame()));
                }
                other => {
                    return Err(format!(
                        "unexpected {other:x?}, {}{}",
                        self.place(),
                        self.blame()
                    ));
                }
            }
        }
    }

    fn arrive(&mut self, byte: u8) -> Result<Mark, String> {
        let mark = Mark::from_byte(byte)
            .ok_or_else(|| format!("the guest computed wrongly, {}", self.place()))?;
        match mark {
            Mark::LoopBegins => self.loop_began = Some(Instant::now()),
            Mark::LoopEnds => self.time_loop()?,
            Mark::Registers if !self.echoed => {
                return Err(
                    "a device's register read or written by the guest went wrong".to_owned(),
                );
            }
            _ => {}
        }
        self.last = Some(mark);
        Ok(mark)
    }

    fn time_loop(&mut self) -> Result<(), String> {
        let Some(began) = self.loop_began.take() else {
            return Err("the guest ends a loop it has not begun".to_owned());
        };
        let ns = began.elapsed().as_nanos() as f64 / LOOP_ROUNDS as f64;
        self.best_ns = Some(self.best_ns.map_or(ns, |best| best.min(ns)));
        self.loops += 1;
        let ratio = self.ratio().unwrap_or_default();
        if self.loops == guest::LOOPS && ratio > SLOWEST_RATIO {
            return Err(format!(
                "a guest kernel's code runs {ratio:.0} times slower than this processor{}",
                self.blame()
            ));
        }
        Ok(())
    }

    /// Where the guest is.
    fn place(&self) -> String {
        match self.last {
            None => "entering the guest".to_owned(),
            Some(Mark::LoopBegins | Mark::LoopEnds | Mark::Entered)
                if self.loops < guest::LOOPS =>
            {
                format!("while {}", Mark::LoopBegins.next_step())
            }
            Some(mark) => format!("while {}", mark.next_step()),
        }
    }

    /// What is known to be the cause.
    fn blame(&self) -> &'static str {
        match self.flavour {
            Some(Flavour::Pvm) => {
                ": this KVM is a PVM host, which emulates ordinary kernels instruction by instruction"
            }
            _ => "",
        }
    }
}

/// The guest's loop, outside.
fn host_ns_per_loop() -> f64 {
    let best = (0..guest::LOOPS)
        .map(|_| {
            let began = Instant::now();
            // SAFETY: counts a register down; touches neither memory nor stack.
            unsafe {
                std::arch::asm!(
                    "2: dec {rounds}",
                    "jnz 2b",
                    rounds = inout(reg) LOOP_ROUNDS => _,
                    options(nomem, nostack),
                );
            }
            began.elapsed()
        })
        .min()
        .unwrap_or_default();
    // A clock too coarse to see it must not make the guest look slow.
    (best.as_nanos().max(1) as f64) / LOOP_ROUNDS as f64
}

/// An ioeventfd the guest writes.
struct Doorbell {
    event: EventFd,
}

impl Doorbell {
    fn new(vm: &KvmVm) -> Result<Self, String> {
        let failed = |error: std::io::Error| format!("no eventfd: {error}");
        let event = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(failed)?;
        let ours = event.try_clone().map_err(failed)?;
        let ioeventfd = FlatIoeventfd {
            addr: guest::DOORBELL,
            size: 4,
            datamatch: None,
            fd: Arc::new(owned(ours)),
        };
        vm.add_doorbell(&ioeventfd)
            .map_err(|error| error.to_string())?;
        Ok(Self { event })
    }

    fn rang(&self) -> bool {
        self.event.read().is_ok_and(|count| count == 1)
    }
}

fn owned(event: EventFd) -> OwnedFd {
    use std::os::fd::{FromRawFd, IntoRawFd};
    // SAFETY: the descriptor was just given up by its owner.
    unsafe { OwnedFd::from_raw_fd(event.into_raw_fd()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sim::{SimVm, Step};

    /// What the probe says of a guest that goes through `marks` and then does `end`.
    fn verdict(
        flavour: Option<Flavour>,
        host_ns: f64,
        marks: &[u8],
        end: &[Step],
    ) -> Result<(), String> {
        let vm = SimVm::new();
        let mut vcpu = vm.create_vcpu(0, 1).unwrap();
        let script = vm.script(0);
        for &mark in marks {
            script.push(Step::Out {
                port: guest::PORT,
                size: 1,
                data: vec![mark],
            });
        }
        end.iter().for_each(|step| script.push(step.clone()));
        let limit = Duration::from_millis(200);
        let mut course = Course::new(flavour, host_ns);
        with_time_limit(vcpu.as_mut(), limit, |vcpu, deadline| {
            course.follow(vcpu, deadline)
        })
    }

    /// Slow enough for any loop that is only a script to look fast.
    const SLOW_HOST_NS: f64 = 1e6;
    const LOOPS: [u8; 7] = [1, 2, 3, 2, 3, 2, 3];

    #[test]
    fn an_instruction_that_is_not_emulated_is_named() {
        let error = Step::InternalError {
            detail: "cannot emulate the instruction [0f, 28]".to_owned(),
        };
        let reason = verdict(Some(Flavour::Pvm), SLOW_HOST_NS, &LOOPS, &[error]).unwrap_err();
        for part in [
            "[0f, 28]",
            "while using vector registers",
            "PVM host, which emulates",
        ] {
            assert!(reason.contains(part), "{part} in {reason}");
        }
    }

    #[test]
    fn a_slow_loop_is_told_with_its_ratio() {
        let reason = verdict(None, 1e-6, &LOOPS, &[]).unwrap_err();
        assert!(
            reason.contains("times slower than this processor"),
            "{reason}"
        );
    }

    #[test]
    fn a_guest_that_hangs_is_told_with_its_place() {
        let reason = verdict(None, SLOW_HOST_NS, &LOOPS[..2], &[]).unwrap_err();
        assert!(
            reason.contains("did not end in time, while counting in a loop"),
            "{reason}"
        );
        let marks = [&LOOPS[..], &[4, 5, 6, 7]].concat();
        let reason = verdict(None, SLOW_HOST_NS, &marks, &[]).unwrap_err();
        assert!(
            reason.contains("while waiting for its timer's interrupt"),
            "{reason}"
        );
    }

    #[test]
    fn a_guest_that_computes_wrongly_does_not_pass() {
        let marks = [&LOOPS[..], &[4, 0xff]].concat();
        let reason = verdict(None, SLOW_HOST_NS, &marks, &[]).unwrap_err();
        assert!(reason.contains("computed wrongly"), "{reason}");
        let marks = [&LOOPS[..], &[4, 5, 6]].concat();
        let reason = verdict(None, SLOW_HOST_NS, &marks, &[Step::Shutdown]).unwrap_err();
        assert!(
            reason.contains("Shutdown, while running user code"),
            "{reason}"
        );
    }

    #[test]
    fn a_register_must_carry_what_the_monitor_put_there() {
        let marks = [&LOOPS[..], &[4, 5, 6, 7, 8]].concat();
        let mark = |byte| Step::Out {
            port: guest::PORT,
            size: 1,
            data: vec![byte],
        };
        let load = Step::Load {
            gpa: guest::REGISTER,
            size: 4,
        };
        let echo = |value: u32| Step::Store {
            gpa: guest::ECHO,
            data: value.to_le_bytes().to_vec(),
        };
        let end = [load.clone(), echo(REGISTER_VALUE + 1), mark(9), mark(10)];
        assert_eq!(verdict(None, SLOW_HOST_NS, &marks, &end), Ok(()));
        let end = [load, echo(REGISTER_VALUE), mark(9), mark(10)];
        let reason = verdict(None, SLOW_HOST_NS, &marks, &end).unwrap_err();
        assert!(reason.contains("register"), "{reason}");
    }
}
