// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The process that starts passt for `ebbtide run`: what it has, and when it ends.

use std::collections::BTreeSet;
use std::fs::{self, File, Permissions};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::io::{FdFlags, fcntl_setfd};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

const LIMIT: Duration = Duration::from_secs(60);

/// An ordinary user.
const NOBODY: u32 = 65534;

const PROGRAM: &str = env!("CARGO_BIN_EXE_ebbtide");

fn start(mut command: Command) -> (OwnedFd, Child) {
    let (family, kind) = (AddressFamily::UNIX, SocketType::SEQPACKET);
    let (ours, theirs) = socketpair(family, kind, SocketFlags::CLOEXEC, None).unwrap();
    command
        .args(["passt-launcher", "--seccomp", "on", "--", "/bin/true"])
        .stdin(theirs)
        .stderr(Stdio::null());
    (ours, command.spawn().unwrap())
}

/// Waits until the process has made itself what it is to be.
fn status(pid: u32) -> String {
    let begun = Instant::now();
    loop {
        let text = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        if text.contains("Name:\tpasst-launcher") && text.contains("Seccomp:\t2") {
            assert!(text.contains("NoNewPrivs:\t1"), "{text}");
            return text;
        }
        assert!(begun.elapsed() < LIMIT, "{text}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn descriptors(pid: u32) -> BTreeSet<String> {
    let entries = fs::read_dir(format!("/proc/{pid}/fd")).unwrap();
    let target = |entry: fs::DirEntry| fs::read_link(entry.path()).ok();
    let targets = entries.filter_map(|entry| target(entry.unwrap()));
    targets
        .map(|it| it.to_string_lossy().into_owned())
        .collect()
}

#[test]
fn it_has_nothing_but_its_socket_and_ends_with_that() {
    let inherited = tempfile::tempfile().unwrap();
    fcntl_setfd(&inherited, FdFlags::empty()).unwrap();
    assert!(inherited.as_raw_fd() > 2);
    let (ours, mut child) = start(Command::new(PROGRAM));
    drop(inherited);
    let pid = child.id();
    status(pid);
    let session = rustix::process::getsid(Some(rustix::process::Pid::from_child(&child)));
    assert_eq!(session.unwrap(), rustix::process::Pid::from_child(&child));
    // Seen by root even though the process lets nobody look.
    let begun = Instant::now();
    loop {
        let has = descriptors(pid);
        let mut kinds = has
            .iter()
            .map(|it| it.split(':').next().unwrap_or_default());
        // The last is the process that it ends with.
        let own = ["/dev/null", "socket", "anon_inode", "pidfd"];
        if has.len() == 3 && kinds.all(|kind| own.contains(&kind)) {
            break;
        }
        assert!(begun.elapsed() < LIMIT, "{has:?}");
        std::thread::sleep(Duration::from_millis(5));
    }
    drop(ours);
    assert!(child.wait().unwrap().success());
}

/// The program in `folder`: what is built may lie where an ordinary user gets to nothing, as in root's home.
fn as_nobody(folder: &Path) -> Command {
    fs::set_permissions(folder, Permissions::from_mode(0o755)).unwrap();
    let program = folder.join("ebbtide");
    // By another process: a child of this one, started meanwhile, would have it open for writing.
    let copy = Command::new("cp").arg(PROGRAM).arg(&program).status();
    assert!(copy.unwrap().success());
    let mut command = Command::new(program);
    command.uid(NOBODY).gid(NOBODY);
    command
}

/// Whoever has the same user reads nothing of it: what there is to read is root's.
#[test]
fn an_ordinary_users_other_processes_do_not_look_into_it() {
    let folder = tempfile::tempdir().unwrap();
    let (ours, mut child) = if rustix::process::geteuid().is_root() {
        start(as_nobody(folder.path()))
    } else {
        start(Command::new(PROGRAM))
    };
    status(child.id());
    let memory = fs::metadata(format!("/proc/{}/mem", child.id())).unwrap();
    assert_eq!(memory.uid(), 0);
    drop(ours);
    assert!(child.wait().unwrap().success());
}

#[test]
fn it_takes_no_other_standard_input_for_a_socket() {
    let output = Command::new(PROGRAM)
        .args(["passt-launcher", "--", "/bin/true"])
        .stdin(File::open("/dev/null").unwrap())
        .output()
        .unwrap();
    assert_eq!(output.status.signal(), None);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.starts_with("ebbtide passt-launcher: "), "{said}");
}
