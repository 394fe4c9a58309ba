// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Reading and writing files with buffers that are handed over for the time of the operation.

use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;

use io_uring::{opcode, types};

use crate::local::Local;

/// What one operation may move at most: the kernel's own limit, below which a length fits its fields.
const MAX_BYTES: usize = 0x7fff_f000;

fn length(buffer: &[u8]) -> u32 {
    buffer.len().min(MAX_BYTES) as u32
}

fn answer(result: i32) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::from_raw_os_error(-result))
}

impl Local {
    /// Reads up to `buffer.len()` bytes at `offset_bytes` into `buffer`, in one operation: the answer may be
    /// fewer, and is 0 at the end of the file. The length of `buffer` does not change.
    ///
    /// # Errors
    /// Those of pread(2); `ECANCELED` when the executor is stopping.
    pub async fn read_at<F: AsFd + 'static>(
        &self,
        file: &Arc<F>,
        mut buffer: Vec<u8>,
        offset_bytes: u64,
    ) -> (io::Result<usize>, Vec<u8>) {
        let fd = types::Fd(file.as_fd().as_raw_fd());
        let entry = opcode::Read::new(fd, buffer.as_mut_ptr(), length(&buffer))
            .offset(offset_bytes)
            .build();
        // SAFETY: the vector's heap memory and the file stay as they are as long as both are kept, and nobody
        // else can reach the vector.
        let (result, (buffer, _)) = unsafe { self.submit(entry, (buffer, Arc::clone(file))) }.await;
        (answer(result), buffer)
    }

    /// Writes up to `buffer.len()` bytes of `buffer` at `offset_bytes`, in one operation.
    ///
    /// # Errors
    /// Those of pwrite(2); `ECANCELED` when the executor is stopping.
    pub async fn write_at<F: AsFd + 'static>(
        &self,
        file: &Arc<F>,
        buffer: Vec<u8>,
        offset_bytes: u64,
    ) -> (io::Result<usize>, Vec<u8>) {
        let fd = types::Fd(file.as_fd().as_raw_fd());
        let entry = opcode::Write::new(fd, buffer.as_ptr(), length(&buffer))
            .offset(offset_bytes)
            .build();
        // SAFETY: as in `read_at`.
        let (result, (buffer, _)) = unsafe { self.submit(entry, (buffer, Arc::clone(file))) }.await;
        (answer(result), buffer)
    }

    /// Makes what was written durable (fsync(2)).
    ///
    /// # Errors
    /// Those of fsync(2); `ECANCELED` when the executor is stopping.
    pub async fn fsync<F: AsFd + 'static>(&self, file: &Arc<F>) -> io::Result<()> {
        let entry = opcode::Fsync::new(types::Fd(file.as_fd().as_raw_fd())).build();
        // SAFETY: the entry points to no memory, and the file is kept open.
        let (result, _) = unsafe { self.submit(entry, Arc::clone(file)) }.await;
        answer(result).map(drop)
    }
}
