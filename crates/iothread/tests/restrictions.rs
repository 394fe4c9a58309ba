// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A ring that is restricted to operations on open files.
#![cfg(not(loom))]

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use ebbtide_iothread::{Config, Kernel, Local, Operations, run_with};
use io_uring::{opcode, squeue, types};

fn restricted(kernel: Kernel, operations: Operations) -> Config {
    Config {
        kernel,
        operations,
        ..Config::default()
    }
}

/// The answer to an entry that points to static memory only.
async fn answer(local: &Local, entry: squeue::Entry) -> i32 {
    // SAFETY: the callers' entries point to statics and name descriptors that outlive the call.
    unsafe { local.submit(entry, ()) }.await.0
}

fn open_null() -> squeue::Entry {
    opcode::OpenAt::new(types::Fd(libc::AT_FDCWD), c"/dev/null".as_ptr())
        .flags(libc::O_RDONLY | libc::O_CLOEXEC)
        .build()
}

#[test]
fn what_is_not_registered_is_refused_and_what_is_works() {
    for kernel in [Kernel::Newest, Kernel::Linux5_19, Kernel::Linux5_6] {
        let config = restricted(kernel, Operations::OpenFiles);
        run_with("restricted", config, |local| async move {
            let (near, _far) = UnixStream::pair().unwrap();
            let fd = types::Fd(near.as_raw_fd());
            static BYTES: [u8; 1] = [0];
            for (name, entry) in [
                ("openat", open_null()),
                (
                    "socket",
                    opcode::Socket::new(libc::AF_UNIX, libc::SOCK_STREAM, 0).build(),
                ),
                ("close", opcode::Close::new(fd).build()),
                ("send", opcode::Send::new(fd, BYTES.as_ptr(), 1).build()),
                (
                    "accept",
                    opcode::Accept::new(fd, std::ptr::null_mut(), std::ptr::null_mut()).build(),
                ),
                (
                    "unlinkat",
                    opcode::UnlinkAt::new(types::Fd(libc::AT_FDCWD), c"/nonexistent".as_ptr())
                        .build(),
                ),
            ] {
                assert_eq!(
                    answer(&local, entry).await,
                    -libc::EACCES,
                    "{kernel:?}: {name}"
                );
            }
            // It goes on afterwards.
            let zero = Arc::new(std::fs::File::open("/dev/zero").unwrap());
            let (read, buffer) = local.read_at(&zero, vec![7; 16], 0).await;
            assert_eq!((read.unwrap(), buffer), (16, vec![0; 16]));
        })
        .unwrap();
    }
}

/// Without it the test above could pass for another reason.
#[test]
fn an_unrestricted_ring_opens_files() {
    run_with(
        "all",
        restricted(Kernel::Newest, Operations::All),
        |local| async move {
            let opened = answer(&local, open_null()).await;
            assert!(opened >= 0, "{opened}");
            // SAFETY: the kernel just made it, for us alone.
            drop(unsafe { OwnedFd::from_raw_fd(opened) });
        },
    )
    .unwrap();
}
