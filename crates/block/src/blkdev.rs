// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The ioctls of host block devices (linux/fs.h).

use std::os::fd::BorrowedFd;

use rustix::io;
use rustix::ioctl::{self, Getter, Setter, opcode};

const GROUP: u8 = 0x12;
const BLKROGET: ioctl::Opcode = opcode::none(GROUP, 94);
const BLKGETSIZE64: ioctl::Opcode = opcode::read::<usize>(GROUP, 114);
const BLKDISCARD: ioctl::Opcode = opcode::none(GROUP, 119);

/// Size of the device in bytes.
pub(crate) fn size_bytes(fd: BorrowedFd<'_>) -> io::Result<u64> {
    // SAFETY: BLKGETSIZE64 writes one u64.
    unsafe { ioctl::ioctl(fd, Getter::<BLKGETSIZE64, u64>::new()) }
}

/// Whether the device refuses writes.
pub(crate) fn is_readonly(fd: BorrowedFd<'_>) -> io::Result<bool> {
    // SAFETY: BLKROGET writes one int.
    let flag = unsafe { ioctl::ioctl(fd, Getter::<BLKROGET, libc::c_int>::new()) }?;
    Ok(flag != 0)
}

/// Tells the device that `len` bytes from `offset` are not needed any more. Blocks until it has answered.
pub(crate) fn discard(fd: BorrowedFd<'_>, offset: u64, len: u64) -> io::Result<()> {
    // SAFETY: BLKDISCARD reads two u64: start and length in bytes.
    unsafe { ioctl::ioctl(fd, Setter::<BLKDISCARD, [u64; 2]>::new([offset, len])) }
}
