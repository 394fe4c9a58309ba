// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Making a ring on whatever kernel this is.

use std::io;

use io_uring::{Builder, IoUring};

use crate::error::Error;

/// Ways to set up a ring, best first: (name, kernel, what to switch on).
type Flavour = (&'static str, fn(&mut Builder));

const FLAVOURS: [Flavour; 3] = [
    // Linux 6.1: completions are posted when this thread asks for them, without interrupting it.
    ("deferred", |ring| {
        ring.setup_single_issuer()
            .setup_defer_taskrun()
            .setup_taskrun_flag()
            .setup_submit_all();
    }),
    // Linux 5.19: posted at the next system call, without an interrupt.
    ("cooperative", |ring| {
        ring.setup_coop_taskrun()
            .setup_taskrun_flag()
            .setup_submit_all();
    }),
    ("plain", |_| ()),
];

/// Makes the best ring that this kernel has; to be used by this thread only.
pub(crate) fn new_ring(name: &str, entries: u32, old_kernel: bool) -> Result<IoUring, Error> {
    let flavours = if old_kernel {
        &FLAVOURS[2..]
    } else {
        &FLAVOURS[..]
    };
    let mut refused = io::Error::from_raw_os_error(libc::EINVAL);
    for (flavour, switch_on) in flavours {
        let mut builder = IoUring::builder();
        builder.dontfork();
        switch_on(&mut builder);
        match builder.build(entries.max(1)) {
            Ok(ring) => {
                check(name, &ring)?;
                tracing::debug!(name, flavour, entries, "io_uring is set up");
                return Ok(ring);
            }
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => refused = error,
            Err(error) => return Err(Error::from_setup(name, entries, error)),
        }
    }
    Err(Error::from_setup(name, entries, refused))
}

/// What nothing here works without.
fn check(name: &str, ring: &IoUring) -> Result<(), Error> {
    let features = ring.params();
    let lacks = if !features.is_feature_nodrop() {
        "lossless completions"
    } else if !features.is_feature_submit_stable() {
        "stable submission"
    } else if !features.is_feature_rw_cur_pos() {
        // Not used itself: it tells Linux 5.6, the first with plain READ and WRITE.
        "read and write operations"
    } else {
        return Ok(());
    };
    Err(Error::TooOld {
        name: name.to_owned(),
        lacks,
    })
}
