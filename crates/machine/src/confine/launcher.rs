// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the process that starts passt can not do, and with it the passts that it starts.
//!
//! A list of what is refused, as passt inherits it: before it serves, passt makes itself name spaces and a file system,
//! and gives up its user and capabilities, each release by other calls. Then it allows itself the few it still needs, by a
//! filter of its own. Refused is what neither starting nor connecting takes: reading and tracing other processes, loading
//! code into the kernel, its clock, keys and accounting, rings, which filters do not see, and entering other name spaces. What
//! is refused is answered EPERM, and by another numbering than that of 64 bits there are no calls.

use std::io;

use seccompiler::{BpfProgram, SeccompAction, sock_filter};

use super::Seccomp;
use super::filter::{available, compile, install};

/// Of no use to who starts a program that connects a guest to a network, nor to that program.
const REFUSED: &[i64] = &[
    // Other processes.
    libc::SYS_ptrace,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_process_madvise,
    libc::SYS_pidfd_getfd,
    libc::SYS_kcmp,
    libc::SYS_migrate_pages,
    libc::SYS_move_pages,
    libc::SYS_setns,
    // Code in the kernel, and what has been a way to it.
    libc::SYS_init_module,
    libc::SYS_finit_module,
    libc::SYS_delete_module,
    libc::SYS_kexec_load,
    libc::SYS_kexec_file_load,
    libc::SYS_bpf,
    libc::SYS_perf_event_open,
    libc::SYS_userfaultfd,
    libc::SYS_io_uring_setup,
    libc::SYS_io_uring_enter,
    libc::SYS_io_uring_register,
    libc::SYS_add_key,
    libc::SYS_request_key,
    libc::SYS_keyctl,
    libc::SYS_modify_ldt,
    // The host.
    libc::SYS_iopl,
    libc::SYS_ioperm,
    libc::SYS_reboot,
    libc::SYS_settimeofday,
    libc::SYS_clock_settime,
    libc::SYS_adjtimex,
    libc::SYS_clock_adjtime,
    libc::SYS_swapon,
    libc::SYS_swapoff,
    libc::SYS_acct,
    libc::SYS_quotactl,
    libc::SYS_syslog,
    libc::SYS_vhangup,
    // Files past the paths to them.
    libc::SYS_name_to_handle_at,
    libc::SYS_open_by_handle_at,
    libc::SYS_fanotify_init,
];

/// Confines the calling thread, what it starts and executes for good.
///
/// # Errors
/// The kernel refuses; one without filters does not.
pub fn confine_launcher(mode: Seccomp) -> io::Result<()> {
    let (answer, other_numbers) = match mode {
        Seccomp::Off => return Ok(()),
        Seccomp::Log => (SeccompAction::Log, libc::SECCOMP_RET_LOG),
        Seccomp::On => (
            SeccompAction::Errno(libc::EPERM as u32),
            libc::SECCOMP_RET_ERRNO | libc::EPERM as u32,
        ),
    };
    if !available() {
        tracing::warn!("this kernel has no seccomp filters: the launcher of passt has none");
        return Ok(());
    }
    let refused = REFUSED.iter().map(|call| (*call, Vec::new())).collect();
    let refused = compile(refused, SeccompAction::Allow, answer).map_err(io::Error::other)?;
    install(&refused)?;
    install(&one_numbering(other_numbers))
}

/// A filter that gives `answer` to calls by the numbers of 32-bit programs, and of those with 32-bit addresses (x32): the
/// list is of other numbers, and would let all of them pass.
fn one_numbering(answer: u32) -> BpfProgram {
    /// AUDIT_ARCH_X86_64 (linux/audit.h).
    const X86_64: u32 = 0xc000_003e;
    /// The bit that calls of x32 have set (asm/unistd.h).
    const X32: u32 = 0x4000_0000;
    /// Of `struct seccomp_data`.
    const NUMBER: u32 = 0;
    const ARCHITECTURE: u32 = 4;
    let step = |code: u32, (jt, jf): (u8, u8), k| sock_filter {
        code: code as u16,
        jt,
        jf,
        k,
    };
    let load = libc::BPF_LD | libc::BPF_W | libc::BPF_ABS;
    let is = libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K;
    let has = libc::BPF_JMP | libc::BPF_JSET | libc::BPF_K;
    let (on, end) = ((0, 0), libc::BPF_RET | libc::BPF_K);
    vec![
        step(load, on, ARCHITECTURE),
        step(is, (0, 3), X86_64),
        step(load, on, NUMBER),
        step(has, (1, 0), X32),
        step(end, on, libc::SECCOMP_RET_ALLOW),
        step(end, on, answer),
    ]
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;
    use std::path::PathBuf;
    use std::process::{Command, Stdio};
    use std::time::{Duration, Instant};

    use ebbtide_net::{HEADER_BYTES, Launcher, MacAddress, Netdev, PasstSpec, serve_launcher};

    use super::*;

    const CHILD: &str = "EBBTIDE_TEST_CONFINED_LAUNCHER";

    /// The test `name` again, as a process that finds itself to be the child.
    fn child(name: &str) -> Command {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command
            .args(["--exact", &format!("confine::launcher::tests::{name}")])
            .args(["--nocapture", "--test-threads=1"])
            .env(CHILD, "child");
        command
    }

    fn is_child() -> bool {
        std::env::var_os(CHILD).is_some()
    }

    /// How the kernel answers a call with arguments that are wrong for every call but harmless.
    fn answer(number: i64) -> Option<i32> {
        // SAFETY: no argument is a pointer the kernel could follow or a descriptor that is open.
        let result = unsafe { libc::syscall(number, -1i64, 0i64, 0i64, -1i64, 0i64, 0i64) };
        (result < 0)
            .then(io::Error::last_os_error)
            .and_then(|error| error.raw_os_error())
    }

    #[test]
    fn what_is_refused_is_and_what_is_started_inherits_that() {
        if is_child() {
            confine_launcher(Seccomp::On).unwrap();
            for number in REFUSED {
                assert_eq!(answer(*number), Some(libc::EPERM), "{number}");
            }
            let x32 = 0x4000_0000;
            assert_eq!(answer(x32 | libc::SYS_getpid), Some(libc::EPERM));
            let ordinary = answer(libc::SYS_close_range);
            assert_eq!(ordinary, Some(libc::EINVAL));
            let status = Command::new("/bin/cat").arg("/proc/self/status").output();
            let status = String::from_utf8(status.unwrap().stdout).unwrap();
            assert!(status.contains("\nSeccomp:\t2\n"), "{status}");
            assert!(status.contains("\nNoNewPrivs:\t1\n"), "{status}");
            println!("done");
            return;
        }
        let name = "what_is_refused_is_and_what_is_started_inherits_that";
        let output = child(name).output().unwrap();
        assert!(output.status.success(), "{output:?}");
        assert!(String::from_utf8_lossy(&output.stdout).contains("done"));
    }

    #[test]
    fn passt_works_under_it() {
        let programs = || vec![PathBuf::from("passt")];
        if is_child() {
            confine_launcher(Seccomp::On).unwrap();
            let socket = std::io::stdin().as_fd().try_clone_to_owned().unwrap();
            return serve_launcher(socket, &programs()).unwrap();
        }
        let free = Launcher::thread(programs()).unwrap();
        if let Err(error) = Netdev::passt("net0", &free, &PasstSpec::default()) {
            eprintln!("SKIPPED: passt_works_under_it: passt does not run here: {error}");
            return;
        }
        let mut command = child("passt_works_under_it");
        let launcher = Launcher::start(command.stdout(Stdio::null()), programs()).unwrap();
        let netdev = Netdev::passt("net0", &launcher, &PasstSpec::default()).unwrap();
        let net = netdev.claim("card0").unwrap();
        // An ARP question "who has 10.0.0.1".
        let me = MacAddress::of_card(0).0;
        let mut packet = vec![0; HEADER_BYTES];
        packet.extend([&MacAddress::BROADCAST.0[..], &me, &[0x08, 0x06]].concat());
        packet.extend([0, 1, 8, 0, 6, 4, 0, 1]);
        packet.extend([&me[..], &[10, 0, 0, 2], &[0; 6], &[10, 0, 0, 1]].concat());
        net.send(&packet).unwrap();
        let (mut buffer, begun) = (vec![0; 1 << 16], Instant::now());
        let length = loop {
            match net.receive(&mut buffer) {
                Ok(length) => break length,
                Err(error) => assert_eq!(error.kind(), io::ErrorKind::WouldBlock, "{error}"),
            }
            assert!(begun.elapsed() < Duration::from_secs(60), "no answer");
            std::thread::sleep(Duration::from_millis(1));
        };
        assert_eq!(buffer[HEADER_BYTES..length][..6], me);
        drop((net, netdev, launcher));
        // Who does not see it gives up after five seconds; a busy host may need some of them once, but not always.
        let seen = (0..4).any(|_| {
            let mut command = child("passt_works_under_it");
            let launcher = Launcher::start(command.stdout(Stdio::null()), programs()).unwrap();
            let ends = Instant::now();
            drop(launcher);
            ends.elapsed() < Duration::from_secs(3)
        });
        assert!(seen, "its end was not seen");
    }
}
