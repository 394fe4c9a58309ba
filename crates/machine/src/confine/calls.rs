// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The system calls of each kind of thread.
//!
//! What the allocator, locks, clocks, panics and the log need is everybody's. vCPU threads and iothreads, which do what
//! a guest tells them, get little beyond it: open files are theirs to use, not to make. The threads that carry out what
//! management asks for get what work with files takes. No list has what starts programs, signals or waits for
//! others, loads code into the kernel, reads other processes, or changes privileges, mounts and name spaces.

use std::collections::BTreeMap;

use seccompiler::{
    BackendError, SeccompCmpArgLen::Dword, SeccompCmpArgLen::Qword, SeccompCmpOp::Eq,
    SeccompCmpOp::MaskedEq, SeccompCondition as Condition, SeccompRule,
};

use super::Kind;

/// For each system call under which conditions it is let pass: any of them, or always if there is none.
pub(super) type Rules = BTreeMap<i64, Vec<SeccompRule>>;

/// ioctl numbers carry their subsystem in bits 8 to 15.
const IOCTL_TYPE: u64 = 0xff00;
const KVM: u64 = 0xae00;
/// Tap interfaces, for a NIC's offloads.
const TUN: u64 = 0x5400;

/// Of every thread.
const EVERYBODY: &[i64] = &[
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_writev,
    libc::SYS_futex,
    libc::SYS_membarrier,
    libc::SYS_brk,
    libc::SYS_munmap,
    libc::SYS_madvise,
    libc::SYS_mremap,
    libc::SYS_getrandom,
    // Clocks: most are read without a call, but not on every host.
    libc::SYS_clock_gettime,
    libc::SYS_clock_getres,
    libc::SYS_gettimeofday,
    libc::SYS_time,
    libc::SYS_clock_nanosleep,
    libc::SYS_nanosleep,
    libc::SYS_sched_yield,
    libc::SYS_getcpu,
    libc::SYS_gettid,
    libc::SYS_getpid,
    libc::SYS_rt_sigreturn,
    libc::SYS_rt_sigprocmask,
    libc::SYS_restart_syscall,
    libc::SYS_sigaltstack,
    libc::SYS_rseq,
    libc::SYS_set_robust_list,
    // The end of the thread. What it hands back and frees then is listed above.
    libc::SYS_exit,
    libc::SYS_exit_group,
    // The last of a vCPU's devices may go with it.
    libc::SYS_close,
];

/// vCPU threads are let go on without these: the allocator may make them at any time and copes.
pub(super) const VCPU_REFUSED: &[i64] = &[libc::SYS_munmap, libc::SYS_madvise, libc::SYS_mremap];

/// And without this, but it is told of: the descriptor stays open until the process ends. No other filter forbids it.
pub(super) const VCPU_TOLD: i64 = libc::SYS_close;

/// Of threads that serve queues: data through open files, and memory that comes and goes.
const IOTHREAD: &[i64] = &[
    libc::SYS_io_uring_enter,
    libc::SYS_readv,
    libc::SYS_pread64,
    libc::SYS_pwrite64,
    libc::SYS_preadv,
    libc::SYS_pwritev,
    libc::SYS_recvfrom,
    libc::SYS_sendto,
    libc::SYS_recvmsg,
    libc::SYS_sendmsg,
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_lseek,
    libc::SYS_fstat,
    libc::SYS_fallocate,
    libc::SYS_fadvise64,
    libc::SYS_mincore,
    libc::SYS_shutdown,
];

/// Of who makes threads.
const THREADS: &[i64] = &[
    libc::SYS_clone,
    libc::SYS_clone3,
    libc::SYS_sched_getaffinity,
    libc::SYS_prlimit64,
];

/// Of the grace worker and the thread it hands to what may block: closing what devices leave.
const GRACE: &[i64] = &[
    libc::SYS_rt_sigaction,
    libc::SYS_fstat,
    libc::SYS_fallocate,
    libc::SYS_msync,
    libc::SYS_unlink,
    libc::SYS_shutdown,
];

/// Of who carries out what management asks for: the control thread and the blocking pool.
const SERVANTS: &[i64] = &[
    libc::SYS_open,
    libc::SYS_openat,
    libc::SYS_openat2,
    libc::SYS_creat,
    libc::SYS_stat,
    libc::SYS_lstat,
    libc::SYS_newfstatat,
    libc::SYS_statx,
    libc::SYS_statfs,
    libc::SYS_fstatfs,
    libc::SYS_access,
    libc::SYS_faccessat,
    libc::SYS_faccessat2,
    libc::SYS_readlink,
    libc::SYS_readlinkat,
    libc::SYS_getcwd,
    libc::SYS_getdents64,
    libc::SYS_unlink,
    libc::SYS_unlinkat,
    libc::SYS_rename,
    libc::SYS_renameat,
    libc::SYS_renameat2,
    libc::SYS_mkdir,
    libc::SYS_mkdirat,
    libc::SYS_rmdir,
    libc::SYS_chmod,
    libc::SYS_fchmod,
    libc::SYS_fchmodat,
    libc::SYS_umask,
    libc::SYS_truncate,
    libc::SYS_ftruncate,
    libc::SYS_fsync,
    libc::SYS_fdatasync,
    libc::SYS_sync_file_range,
    libc::SYS_copy_file_range,
    libc::SYS_preadv2,
    libc::SYS_pwritev2,
    libc::SYS_flock,
    libc::SYS_fcntl,
    libc::SYS_dup,
    libc::SYS_dup2,
    libc::SYS_dup3,
    libc::SYS_pipe,
    libc::SYS_pipe2,
    libc::SYS_eventfd2,
    libc::SYS_timerfd_create,
    libc::SYS_timerfd_settime,
    libc::SYS_timerfd_gettime,
    libc::SYS_signalfd4,
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_wait,
    libc::SYS_epoll_pwait,
    libc::SYS_memfd_create,
    libc::SYS_userfaultfd,
    libc::SYS_ioctl,
    libc::SYS_io_uring_setup,
    libc::SYS_io_uring_register,
    libc::SYS_socket,
    libc::SYS_socketpair,
    libc::SYS_connect,
    libc::SYS_bind,
    libc::SYS_listen,
    libc::SYS_accept,
    libc::SYS_accept4,
    libc::SYS_getsockopt,
    libc::SYS_setsockopt,
    libc::SYS_getsockname,
    libc::SYS_getpeername,
    libc::SYS_mbind,
    libc::SYS_set_mempolicy,
    libc::SYS_get_mempolicy,
    libc::SYS_mlock,
    libc::SYS_mlock2,
    libc::SYS_munlock,
    libc::SYS_msync,
    libc::SYS_readahead,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigtimedwait,
    libc::SYS_tkill,
    libc::SYS_getrlimit,
    libc::SYS_sched_setaffinity,
    libc::SYS_sysinfo,
    libc::SYS_uname,
    libc::SYS_getrusage,
    libc::SYS_times,
    libc::SYS_getuid,
    libc::SYS_geteuid,
    libc::SYS_getgid,
    libc::SYS_getegid,
    libc::SYS_getppid,
    // Threads that are started later restrict themselves further.
    libc::SYS_prctl,
    libc::SYS_seccomp,
    libc::SYS_landlock_restrict_self,
];

/// What a thread of `kind` in the process `pid` is allowed.
pub(super) fn rules(kind: Kind, pid: u32) -> Result<Rules, BackendError> {
    let lists: &[&[i64]] = match kind {
        Kind::Vcpu => &[EVERYBODY],
        Kind::Iothread => &[EVERYBODY, IOTHREAD],
        Kind::Grace => &[EVERYBODY, THREADS, GRACE],
        Kind::Blocking | Kind::Control => &[EVERYBODY, IOTHREAD, THREADS, SERVANTS],
    };
    let mut rules: Rules = lists
        .iter()
        .copied()
        .flatten()
        .map(|call| (*call, Vec::new()))
        .collect();
    // Signals go to threads of this process only.
    let own = Condition::new(0, Dword, Eq, pid.into())?;
    rules.insert(libc::SYS_tgkill, vec![SeccompRule::new(vec![own])?]);
    // Memory is never made executable. Flag bits of `mmap` and `mprotect` are in the low half.
    let plain = || Condition::new(2, Qword, MaskedEq(libc::PROT_EXEC as u64), 0);
    rules.insert(libc::SYS_mprotect, vec![SeccompRule::new(vec![plain()?])?]);
    let mut mapping = vec![plain()?];
    if kind == Kind::Vcpu {
        // A driver that is ready gets an eventfd for each queue.
        rules.insert(libc::SYS_eventfd2, Vec::new());
        // An eject is announced by a timer.
        rules.insert(libc::SYS_timerfd_settime, Vec::new());
        // New memory for the allocator, of no file and over nothing that is there.
        let (anonymous, fixed) = (libc::MAP_ANONYMOUS as u64, libc::MAP_FIXED as u64);
        mapping.push(Condition::new(
            3,
            Qword,
            MaskedEq(anonymous | fixed),
            anonymous,
        )?);
    }
    rules.insert(libc::SYS_mmap, vec![SeccompRule::new(mapping)?]);
    let ioctl =
        |of: u64| SeccompRule::new(vec![Condition::new(1, Dword, MaskedEq(IOCTL_TYPE), of)?]);
    match kind {
        Kind::Vcpu => rules.insert(libc::SYS_ioctl, vec![ioctl(KVM)?]),
        Kind::Iothread | Kind::Grace => {
            rules.insert(libc::SYS_ioctl, vec![ioctl(KVM)?, ioctl(TUN)?])
        }
        Kind::Blocking | Kind::Control => None,
    };
    if matches!(kind, Kind::Vcpu | Kind::Iothread | Kind::Grace) {
        let only = |argument: u8, value: libc::c_int| {
            SeccompRule::new(vec![Condition::new(argument, Dword, Eq, value as u64)?])
        };
        let names = vec![only(0, libc::PR_GET_NAME)?, only(0, libc::PR_SET_NAME)?];
        rules.insert(libc::SYS_prctl, names);
        // What is built to find mistakes looks whether a descriptor is open before it closes it.
        rules.insert(libc::SYS_fcntl, vec![only(1, libc::F_GETFD)?]);
    }
    Ok(rules)
}
