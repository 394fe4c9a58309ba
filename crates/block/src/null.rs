// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A disk without a medium: it takes its time and forgets.

use std::io;
use std::time::Duration;

use ebbtide_iothread::Local;

use crate::buffer::Buffer;
use crate::error::Error;
use crate::image::SECTOR_BYTES;
use crate::op::Op;

/// The largest disk: offsets of images are signed in the host's interfaces, and so they are here.
const SIZE_MAX_BYTES: u64 = i64::MAX as u64 / SECTOR_BYTES as u64 * SECTOR_BYTES as u64;

/// What a disk without a medium is to be: the block driver `null-co`, property by property.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NullSpec {
    /// `size`, in bytes; rounded down to whole sectors.
    pub size_bytes: u64,
    /// `latency-ns`: how long every operation takes. It waits on a timer of its iothread: any number of operations
    /// wait at the cost of one each.
    pub latency: Duration,
    /// `read-zeroes`: reads give zeroes. Otherwise they leave the buffer as it is, which is faster and tells the reader
    /// nothing it did not know.
    pub read_zeroes: bool,
}

impl Default for NullSpec {
    /// 1 GiB, no latency, buffers left as they are.
    fn default() -> NullSpec {
        NullSpec {
            size_bytes: 1 << 30,
            latency: Duration::ZERO,
            read_zeroes: false,
        }
    }
}

/// The driver behind [`NullSpec`].
#[derive(Debug)]
pub(crate) struct NullBackend {
    latency: Duration,
    read_zeroes: bool,
}

impl NullBackend {
    /// The driver and the size it has.
    pub(crate) fn new(spec: &NullSpec) -> Result<(NullBackend, u64), Error> {
        if spec.size_bytes > SIZE_MAX_BYTES {
            return Err(Error::NullTooLarge {
                size_bytes: spec.size_bytes,
                max_bytes: SIZE_MAX_BYTES,
            });
        }
        Ok(NullBackend::clamped(spec))
    }

    /// As [`new`](Self::new), and never too large.
    pub(crate) fn clamped(spec: &NullSpec) -> (NullBackend, u64) {
        let NullSpec {
            size_bytes,
            latency,
            read_zeroes,
        } = *spec;
        let backend = NullBackend {
            latency,
            read_zeroes,
        };
        let sector = u64::from(SECTOR_BYTES);
        (backend, size_bytes.min(SIZE_MAX_BYTES) / sector * sector)
    }

    /// Waits, then does what little there is to do: memory is written at the end of the latency, as by a slow medium.
    pub(crate) async fn perform<B: Buffer>(
        &self,
        local: &Local,
        op: Op,
        mut buf: B,
    ) -> (io::Result<()>, B) {
        if !self.is_immediate() {
            local.sleep(self.latency).await;
        }
        (self.answer(op, &mut buf), buf)
    }

    /// Whether there is nothing to wait for.
    pub(crate) fn is_immediate(&self) -> bool {
        self.latency.is_zero()
    }

    /// The end of an operation.
    pub(crate) fn answer(&self, op: Op, buf: &mut impl Buffer) -> io::Result<()> {
        match op {
            Op::Read { .. } if self.read_zeroes => fill_with_zeroes(buf),
            _ => Ok(()),
        }
    }
}

fn fill_with_zeroes<B: Buffer>(buf: &mut B) -> io::Result<()> {
    const ZEROES: [u8; 4096] = [0; 4096];
    let total = buf.total_len();
    let mut done = 0;
    while done < total {
        let here = ZEROES.get(..total - done).unwrap_or(&ZEROES);
        buf.copy_from(done, here)?;
        done += here.len();
    }
    Ok(())
}
