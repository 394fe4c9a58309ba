// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Each kind of thread in a process of its own, as what confines it stays for good.

use std::ffi::CStr;
use std::os::unix::fs::MetadataExt;
use std::process::{Command, Output};
use std::thread;
use std::time::Duration;

use ebbtide_hypervisor::Vm;
use ebbtide_hypervisor::sim::SimVm;
use ebbtide_iothread::{Local, channel, run};
use ebbtide_memory::{Memory, MemoryConfig, Region};

use super::*;
use crate::boot::BootSpec;
use crate::config::{RamConfig, SerialConfig};
use crate::cpus::Cpus;
use crate::lifecycle::Requests;

/// What the child of a test is to do.
const CHILD: &str = "EBBTIDE_TEST_CONFINED";
/// The directory of the child's files.
const PLACE: &str = "EBBTIDE_TEST_CONFINED_PLACE";
const KINDS: [Kind; 5] = [
    Kind::Vcpu,
    Kind::Iothread,
    Kind::Grace,
    Kind::Blocking,
    Kind::Control,
];
const ENDED: i32 = 128 + libc::SIGSYS;

/// Of no thread.
const NOBODY: [(&str, i64); 13] = [
    ("execve", libc::SYS_execve),
    ("execveat", libc::SYS_execveat),
    ("kill", libc::SYS_kill),
    ("pidfd_send_signal", libc::SYS_pidfd_send_signal),
    ("wait4", libc::SYS_wait4),
    ("waitid", libc::SYS_waitid),
    ("ptrace", libc::SYS_ptrace),
    ("process_vm_writev", libc::SYS_process_vm_writev),
    ("mount", libc::SYS_mount),
    ("unshare", libc::SYS_unshare),
    ("setuid", libc::SYS_setuid),
    ("bpf", libc::SYS_bpf),
    ("finit_module", libc::SYS_finit_module),
];
/// Of no thread that a guest drives.
const NOT_DRIVEN: [(&str, i64); 10] = [
    ("open", libc::SYS_open),
    ("openat", libc::SYS_openat),
    ("openat2", libc::SYS_openat2),
    ("socket", libc::SYS_socket),
    ("connect", libc::SYS_connect),
    ("io_uring_setup", libc::SYS_io_uring_setup),
    ("io_uring_register", libc::SYS_io_uring_register),
    ("unlinkat", libc::SYS_unlinkat),
    ("fsync", libc::SYS_fsync),
    ("seccomp", libc::SYS_seccomp),
];
/// Of vCPU threads and iothreads neither.
const NO_THREADS: [(&str, i64); 3] = [
    ("clone", libc::SYS_clone),
    ("clone3", libc::SYS_clone3),
    ("unlink", libc::SYS_unlink),
];
const NOT_VCPU: [(&str, i64); 5] = [
    ("fallocate", libc::SYS_fallocate),
    ("sendto", libc::SYS_sendto),
    ("poll", libc::SYS_poll),
    ("io_uring_enter", libc::SYS_io_uring_enter),
    ("pwrite64", libc::SYS_pwrite64),
];

fn forbidden(kind: Kind) -> Vec<(&'static str, i64)> {
    let mut calls = NOBODY.to_vec();
    if matches!(kind, Kind::Vcpu | Kind::Iothread | Kind::Grace) {
        calls.extend(NOT_DRIVEN);
    }
    if matches!(kind, Kind::Vcpu | Kind::Iothread) {
        calls.extend(NO_THREADS);
    }
    if kind == Kind::Vcpu {
        calls.extend(NOT_VCPU);
    }
    calls
}

fn config(confinement: ConfinementConfig) -> MachineConfig {
    MachineConfig {
        boot: BootSpec {
            kernel: "/nonexistent/kernel".into(),
            initrd: None,
            cmdline: String::new(),
        },
        cpus: 1,
        ram: RamConfig {
            size_bytes: 512 << 20,
            backing: ebbtide_memory::Backing::Anon { thp: false },
            prefault: false,
            dimm_slots: 0,
        },
        memory_devices: vec![],
        disks: vec![],
        objects: vec![],
        chardevs: vec![],
        netdevs: vec![],
        block_nodes: vec![],
        devices: vec![],
        serial: SerialConfig::Off,
        qmp: vec![],
        no_reboot: false,
        drain_timeout: Duration::from_secs(1),
        confinement,
    }
}

fn filtered() -> Arc<Confinement> {
    let confinement = ConfinementConfig {
        seccomp: Seccomp::On,
        ..ConfinementConfig::default()
    };
    Confinement::new(&config(confinement)).unwrap()
}

/// Runs the test `name` of this file again, as a child that finds `task`.
fn child(name: &str, task: &str, place: &Path) -> Output {
    Command::new(std::env::current_exe().unwrap())
        .args([
            "--exact",
            &format!("confine::tests::{name}"),
            "--nocapture",
            "--test-threads=1",
        ])
        .env(CHILD, task)
        .env(PLACE, place)
        .output()
        .unwrap()
}

fn task() -> Option<String> {
    std::env::var(CHILD).ok()
}

/// Makes a system call with arguments that are wrong for every call but harmless.
fn call(number: i64) -> i64 {
    // SAFETY: no argument is a pointer the kernel could follow or a descriptor that is open.
    unsafe { libc::syscall(number, -1i64, 0i64, 0i64, -1i64, 0i64, 0i64) }
}

/// On a thread of `kind`, whatever it is called.
fn on(kind: Kind, job: impl FnOnce() + Send + 'static) {
    let confinement = filtered();
    let thread = thread::Builder::new().name("tested".into()).spawn(move || {
        confinement.enter(kind).unwrap();
        // The last reference stays elsewhere.
        std::mem::forget(confinement);
        job();
    });
    thread.unwrap().join().unwrap();
}

fn kind_named(name: &str) -> Kind {
    *KINDS
        .iter()
        .find(|kind| format!("{kind:?}") == name)
        .unwrap()
}

#[test]
fn forbidden_calls_end_the_process() {
    if let Some(task) = task() {
        let (kind, number) = task.split_once(' ').unwrap();
        let number = number.parse().unwrap();
        on(kind_named(kind), move || {
            call(number);
        });
        return;
    }
    for kind in KINDS {
        for (name, number) in forbidden(kind) {
            let task = format!("{kind:?} {number}");
            let output = child("forbidden_calls_end_the_process", &task, Path::new("/"));
            let said = String::from_utf8_lossy(&output.stderr);
            assert_eq!(output.status.code(), Some(ENDED), "{kind:?} {name}: {said}");
            let expected = format!("ebbtide: thread `tested` made system call {number} (");
            assert!(said.contains(&expected), "{kind:?} {name}: {said}");
        }
    }
}

/// A system call as it must not be made.
type Made = fn() -> i64;

#[test]
fn arguments_count() {
    // SAFETY: numbers only, and addresses of the kernel's choice.
    let calls: [(&str, Made); 6] = [
        ("ioctl TCGETS", || unsafe {
            libc::syscall(libc::SYS_ioctl, -1, libc::TCGETS, 0)
        }),
        ("fcntl F_DUPFD", || unsafe {
            libc::syscall(libc::SYS_fcntl, -1, libc::F_DUPFD, 0)
        }),
        ("executable mmap", || unsafe {
            let protection = libc::PROT_READ | libc::PROT_EXEC;
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
            libc::syscall(libc::SYS_mmap, 0, 4096, protection, flags, -1, 0)
        }),
        ("executable mprotect", || unsafe {
            libc::syscall(libc::SYS_mprotect, 0, 4096, libc::PROT_EXEC)
        }),
        ("mmap of a file", || unsafe {
            libc::syscall(
                libc::SYS_mmap,
                0,
                4096,
                libc::PROT_READ,
                libc::MAP_SHARED,
                -1,
                0,
            )
        }),
        ("tgkill of a stranger", || unsafe {
            libc::syscall(libc::SYS_tgkill, libc::getppid(), 1, 0)
        }),
    ];
    if let Some(task) = task() {
        let (_, made) = calls.into_iter().find(|(name, _)| *name == task).unwrap();
        on(Kind::Vcpu, move || {
            made();
        });
        return;
    }
    for (name, _) in calls {
        let output = child("arguments_count", name, Path::new("/"));
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(ENDED), "{name}: {said}");
    }
}

/// A thread of each kind does what all do, and ends in order.
#[test]
fn ordinary_life_goes_on() {
    if let Some(task) = task() {
        let kind = kind_named(&task);
        on(kind, move || {
            // Beyond what the allocator keeps: mapped, grown, and given back.
            let mut large = vec![1u8; 64 << 20];
            large.extend_from_slice(&[2; 64 << 20]);
            drop(large);
            // From heaps, which the allocator makes shorter then.
            let pieces: Vec<Vec<u8>> = (0..256).map(|_| vec![1; 64 << 10]).collect();
            drop(std::hint::black_box(pieces));
            thread::sleep(Duration::from_millis(1));
            // As a vCPU's stay outside of the guest is measured.
            let _ = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
            let map: std::collections::HashMap<u32, u32> = (0..10_000).map(|n| (n, n)).collect();
            assert_eq!(map.len(), 10_000);
            tracing::info!("said");
            if kind == Kind::Vcpu {
                for number in calls::VCPU_REFUSED.iter().chain(&[calls::VCPU_TOLD]) {
                    assert_eq!(call(*number), -1);
                    let error = io::Error::last_os_error();
                    assert_eq!(error.raw_os_error(), Some(libc::EPERM), "{number}");
                }
            }
        });
        println!("done");
        return;
    }
    for kind in KINDS {
        let output = child(
            "ordinary_life_goes_on",
            &format!("{kind:?}"),
            Path::new("/"),
        );
        assert!(output.status.success(), "{kind:?}: {output:?}");
        assert!(
            String::from_utf8_lossy(&output.stdout).contains("done"),
            "{kind:?}"
        );
        let told = String::from_utf8_lossy(&output.stderr).contains("it stays open");
        assert_eq!(told, kind == Kind::Vcpu, "{kind:?}: {output:?}");
    }
}

/// More threads at once than the allocator has arenas for without a look at how many processors there are.
#[test]
fn many_threads_allocate() {
    const THREADS: usize = 24;
    if task().is_some() {
        on(Kind::Grace, || {
            let together = Arc::new(Barrier::new(THREADS));
            let work = |_| {
                let together = Arc::clone(&together);
                thread::spawn(move || {
                    let block = vec![1u8; 1000];
                    together.wait();
                    block.len()
                })
            };
            let threads: Vec<_> = (0..THREADS).map(work).collect();
            for thread in threads {
                assert_eq!(thread.join().unwrap(), 1000);
            }
        });
        println!("done");
        return;
    }
    let output = child("many_threads_allocate", "all", Path::new("/"));
    assert!(output.status.success(), "{output:?}");
    assert!(String::from_utf8_lossy(&output.stdout).contains("done"));
}

fn open(path: &CStr) -> i32 {
    // SAFETY: a path with its end.
    unsafe { libc::open(path.as_ptr(), libc::O_RDONLY | libc::O_CLOEXEC) }
}

fn cpus(confinement: &Arc<Confinement>, memory: &Arc<Memory>) -> Cpus {
    let space = |name, bytes| {
        memory
            .address_space(name, &Region::container(name, bytes))
            .unwrap()
    };
    let (system, ports) = (space("memory", 1 << 64), space("I/O", 1 << 16));
    let vcpu = SimVm::new().create_vcpu(0, 1).unwrap();
    let (sender, _requests) = channel();
    Cpus::start(
        vec![vcpu],
        &system,
        &ports,
        &Requests::new(sender),
        confinement,
    )
    .unwrap()
}

/// The machine's own threads: made, used, sealed and ended; or, each on its turn, doing what it must not.
#[test]
fn the_threads_of_a_machine() {
    let Some(task) = task() else {
        let run = |task: &str| child("the_threads_of_a_machine", task, Path::new("/"));
        let output = run("nothing");
        assert!(output.status.success(), "{output:?}");
        assert!(String::from_utf8_lossy(&output.stdout).contains("all ended"));
        for (task, thread) in [("vcpu", "vcpu0"), ("iothread", "io-test")] {
            let output = run(task);
            let said = String::from_utf8_lossy(&output.stderr);
            assert_eq!(output.status.code(), Some(ENDED), "{task}: {said}");
            assert!(
                said.contains(&format!("thread `{thread}` made system call 257")),
                "{said}"
            );
        }
        return;
    };
    let lived = run("control", |local: Local| async move {
        let confinement = filtered();
        let arena_bytes = 1 << 40;
        let memory = confinement.within(Kind::Grace, || {
            Memory::new(MemoryConfig { arena_bytes }).map_err(|e| Error::part("memory", e))
        });
        let memory = memory.unwrap();
        let pool = confinement.within(Kind::Blocking, || {
            Blocking::new("blocking", 2).map_err(|e| Error::part("threads", e))
        });
        let pool = pool.unwrap();
        let io = confinement.iothread("io-test").unwrap();
        let cpus = cpus(&confinement, &memory);
        let thread = format!("/proc/self/task/{}/comm", cpus.thread_ids()[0]);
        assert_eq!(std::fs::read_to_string(thread).unwrap(), "vcpu0\n");
        confinement.seal(&pool, 2).await.unwrap();
        assert!(confinement.is_sealed());
        cpus.park().await;
        let forbidden = task == "vcpu";
        cpus.each(move |_, _| if forbidden { open(c"/dev/null") } else { 0 })
            .await;
        let (tell, mut told) = channel();
        let forbidden = task == "iothread";
        let job = move |local: Local| async move {
            local.sleep(Duration::from_millis(1)).await;
            tell.send(if forbidden { open(c"/dev/null") } else { 0 });
        };
        io.remote().spawn(job).unwrap();
        assert_eq!(told.recv().await, Some(0));
        // What the control thread starts from now on is under both.
        let later = confinement.iothread("io-later").unwrap();
        let opened = pool.run(|| open(c"/dev/null")).await;
        assert!(opened >= 0);
        local.sleep(Duration::from_millis(1)).await;
        drop((cpus, io, later, pool, memory));
    });
    lived.unwrap();
    println!("all ended");
}

#[test]
fn files_beyond_those_named_are_out_of_reach() {
    let name = "files_beyond_those_named_are_out_of_reach";
    if task().is_none() {
        let directory = tempfile::tempdir().unwrap();
        for part in ["named", "allowed", "beyond"] {
            std::fs::create_dir(directory.path().join(part)).unwrap();
            std::fs::write(directory.path().join(part).join("file"), part).unwrap();
        }
        let output = child(name, "open", directory.path());
        assert!(output.status.success(), "{output:?}");
        assert!(String::from_utf8_lossy(&output.stdout).contains("tried all"));
        return;
    }
    let place = PathBuf::from(std::env::var_os(PLACE).unwrap());
    let mut config = config(ConfinementConfig {
        seccomp: Seccomp::Off,
        landlock: true,
        allow: vec![place.join("allowed")],
    });
    config.qmp = vec![place.join("named/socket")];
    let confinement = Confinement::new(&config).unwrap();
    if paths::version().is_none() {
        // What is promised then: a warning, and files are opened.
        assert!(confinement.paths.is_none());
        println!("tried all there is without landlock");
        return;
    }
    let sealed = run("control", |_| async move {
        let pool = Blocking::new("blocking", 2).unwrap();
        let beyond = place.join("beyond/file");
        assert!(std::fs::read(&beyond).is_ok());
        confinement.seal(&pool, 2).await.unwrap();
        let tried = move || {
            assert_eq!(std::fs::read(place.join("named/file")).unwrap(), b"named");
            std::fs::write(place.join("named/new"), "new").unwrap();
            std::fs::remove_file(place.join("named/new")).unwrap();
            std::fs::write(place.join("allowed/file"), "changed").unwrap();
            assert!(std::fs::metadata("/dev/urandom").unwrap().rdev() != 0);
            std::fs::File::open("/dev/urandom").unwrap();
            let refused = std::fs::read(&beyond).unwrap_err();
            assert_eq!(refused.kind(), io::ErrorKind::PermissionDenied);
            confinement.check(&place.join("named/later")).unwrap();
            let said = confinement.check(&beyond).unwrap_err();
            assert!(
                said.contains("beyond/file") && said.contains("--allow"),
                "{said}"
            );
        };
        tried();
        pool.run(tried).await;
    });
    sealed.unwrap();
    println!("tried all");
}

#[test]
fn what_is_allowed_has_to_exist() {
    if paths::version().is_none() {
        return assert!(Confinement::new(&config(ConfinementConfig::default())).is_ok());
    }
    let confinement = ConfinementConfig {
        landlock: true,
        allow: vec!["/nonexistent/place".into()],
        ..ConfinementConfig::default()
    };
    let said = Confinement::new(&config(confinement))
        .err()
        .unwrap()
        .to_string();
    assert!(said.contains("--allow /nonexistent/place"), "{said}");
}
