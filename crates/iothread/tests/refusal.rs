// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A machine that has no io_uring to give, and a thread whose task panics.
#![cfg(not(loom))]

use std::io;
use std::process::Command;
use std::thread;

use ebbtide_iothread::{Error, IoThread, run};

/// Lets io_uring_setup fail with `errno` for the calling thread and those it starts, as a container does.
fn forbid_io_uring(errno: i32) {
    let statement = |code: u32, k: u32, jt: u8, jf: u8| libc::sock_filter {
        code: code as u16,
        jt,
        jf,
        k,
    };
    let number = libc::SYS_io_uring_setup as u32;
    let mut program = [
        // The system call's number is the first word of seccomp_data.
        statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, 0),
        statement(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, number, 0, 1),
        statement(
            libc::BPF_RET | libc::BPF_K,
            libc::SECCOMP_RET_ERRNO | errno as u32,
            0,
            0,
        ),
        statement(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ALLOW, 0, 0),
    ];
    let program = libc::sock_fprog {
        len: program.len() as u16,
        filter: program.as_mut_ptr(),
    };
    // SAFETY: plain integers.
    let no_new_privileges = unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) };
    assert_eq!(no_new_privileges, 0, "{}", io::Error::last_os_error());
    // SAFETY: the program outlives the call, which copies it; it binds this thread only.
    let filtered = unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            0,
            &raw const program,
        )
    };
    assert_eq!(filtered, 0, "{}", io::Error::last_os_error());
}

fn refused_with(errno: i32) -> (Error, Error) {
    let refused = thread::spawn(move || {
        forbid_io_uring(errno);
        let here = run("control", |_| async {}).unwrap_err();
        (here, IoThread::spawn("disk").unwrap_err())
    });
    refused.join().unwrap()
}

#[test]
fn a_refused_io_uring_is_one_clear_line() {
    let (control, disk) = refused_with(libc::EPERM);
    for (error, name) in [(&control, "`control`"), (&disk, "`disk`")] {
        let text = error.to_string();
        assert!(matches!(error, Error::Refused { .. }), "{text}");
        assert!(text.starts_with("io_uring is refused to "), "{text}");
        for word in [name, "seccomp", "container", "io_uring_setup"] {
            assert!(text.contains(word), "`{word}` is missing: {text}");
        }
        assert_eq!(text.lines().count(), 1, "{text}");
    }
    let (absent, _) = refused_with(libc::ENOSYS);
    let text = absent.to_string();
    assert!(
        text.contains("built without io_uring") && text.lines().count() == 1,
        "{text}"
    );
}

#[test]
fn out_of_memory_is_not_taken_for_a_refusal() {
    let (error, _) = refused_with(libc::ENOMEM);
    assert!(matches!(error, Error::Ring { entries: 256, .. }), "{error}");
}

/// Set in the child that is to die.
const VICTIM: &str = "EBBTIDE_TEST_PANIC_IN_IOTHREAD";

#[test]
fn a_panic_in_an_iothread_ends_the_process_with_a_message() {
    if std::env::var_os(VICTIM).is_some() {
        let iothread = IoThread::spawn("disk").unwrap();
        iothread
            .remote()
            .spawn(|_| async { panic!("on purpose") })
            .unwrap();
        thread::park();
    }
    let output = Command::new(std::env::current_exe().unwrap())
        .args([
            "--exact",
            "a_panic_in_an_iothread_ends_the_process_with_a_message",
            "--nocapture",
        ])
        .env(VICTIM, "1")
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    use std::os::unix::process::ExitStatusExt;
    assert_eq!(output.status.signal(), Some(libc::SIGABRT), "{text}");
    assert!(text.contains("on purpose"), "{text}");
    assert!(
        text.contains("a task of iothread `disk` panicked: aborting"),
        "{text}"
    );
}
