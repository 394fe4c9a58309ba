// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Making a ring on whatever kernel this is.

use std::io;

use io_uring::{Builder, IoUring};

use crate::config::{Config, Kernel};
use crate::error::Error;

/// A way to set up a ring, and the kernel that has it.
type Flavour = (Kernel, fn(&mut Builder));

/// Best first.
const FLAVOURS: [Flavour; 3] = [
    (Kernel::Newest, |ring| {
        ring.setup_single_issuer()
            .setup_defer_taskrun()
            .setup_taskrun_flag()
            .setup_submit_all();
    }),
    (Kernel::Linux5_19, |ring| {
        ring.setup_coop_taskrun()
            .setup_taskrun_flag()
            .setup_submit_all();
    }),
    (Kernel::Linux5_6, |_| ()),
];

/// Makes the best ring that this kernel has, or one as for `config.kernel`; to be used by this thread only.
pub(crate) fn new_ring(name: &str, config: &Config) -> Result<IoUring, Error> {
    let entries = config.entries.max(1);
    let mut refused = io::Error::from_raw_os_error(libc::EINVAL);
    for (flavour, switch_on) in FLAVOURS
        .iter()
        .skip_while(|(kernel, _)| *kernel != config.kernel)
    {
        let mut builder = IoUring::builder();
        builder.dontfork();
        switch_on(&mut builder);
        match builder.build(entries) {
            Ok(ring) => {
                check(name, &ring)?;
                tracing::debug!(name, ?flavour, entries, "io_uring is set up");
                return Ok(ring);
            }
            // This kernel does not know all of those.
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
