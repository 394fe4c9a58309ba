// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Zeroes to be written where the host cannot zero a range by itself.

use std::io;

use smallvec::SmallVec;

use crate::buffer::Buffer;

/// What is written at once.
pub(crate) const BATCH_BYTES: u64 = 1 << 20;

const SOURCE_BYTES: usize = 64 << 10;

#[repr(align(4096))]
struct Source([u8; SOURCE_BYTES]);

static SOURCE: Source = Source([0; SOURCE_BYTES]);

/// A buffer of zeroes that costs no memory. Only for writing from.
pub(crate) struct Zeroes {
    iovecs: SmallVec<[libc::iovec; 16]>,
    len: usize,
}

impl Zeroes {
    pub(crate) fn new(len: usize) -> Zeroes {
        let iovecs = (0..len)
            .step_by(SOURCE_BYTES)
            .map(|start| libc::iovec {
                iov_base: SOURCE.0.as_ptr().cast_mut().cast(),
                iov_len: SOURCE_BYTES.min(len - start),
            })
            .collect();
        Zeroes { iovecs, len }
    }
}

// SAFETY: a static is never freed. It must not be written: a `Zeroes` is given to write operations only, inside this crate.
unsafe impl Buffer for Zeroes {
    fn iovecs(&self) -> &[libc::iovec] {
        &self.iovecs
    }

    fn total_len(&self) -> usize {
        self.len
    }

    fn copy_to(&self, _offset: usize, bytes: &mut [u8]) -> io::Result<()> {
        bytes.fill(0);
        Ok(())
    }

    fn copy_from(&mut self, _offset: usize, _bytes: &[u8]) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_add_up() {
        for len in [0, 1, SOURCE_BYTES, SOURCE_BYTES + 512, BATCH_BYTES as usize] {
            let zeroes = Zeroes::new(len);
            assert_eq!(
                zeroes
                    .iovecs()
                    .iter()
                    .map(|piece| piece.iov_len)
                    .sum::<usize>(),
                len
            );
        }
    }
}
