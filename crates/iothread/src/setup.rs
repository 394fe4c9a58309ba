// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Making a ring on whatever kernel this is.

use std::io;

use io_uring::register::Restriction;
use io_uring::{Builder, IoUring, opcode};

use crate::config::{Config, Kernel, Operations};
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

/// What [`Operations::OpenFiles`] names.
const OPEN_FILES: [u8; 10] = [
    opcode::Nop::CODE,
    opcode::Read::CODE,
    opcode::Write::CODE,
    opcode::Readv::CODE,
    opcode::Writev::CODE,
    opcode::Fsync::CODE,
    opcode::Fallocate::CODE,
    opcode::PollAdd::CODE,
    opcode::Timeout::CODE,
    opcode::AsyncCancel::CODE,
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
        if config.operations != Operations::All {
            // It takes nothing until it is restricted and switched on.
            builder.setup_r_disabled();
        }
        match builder.build(entries) {
            Ok(ring) => {
                check(name, &ring)?;
                restrict(name, &ring, config)?;
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

/// Limits the ring to `config.operations` and switches it on. What can be registered with it later is nothing.
fn restrict(name: &str, ring: &IoUring, config: &Config) -> Result<(), Error> {
    match config.operations {
        Operations::All => return Ok(()),
        Operations::OpenFiles => {}
    }
    let submitter = ring.submitter();
    let mut allowed: Vec<Restriction> = OPEN_FILES.into_iter().map(Restriction::sqe_op).collect();
    submitter
        .register_restrictions(&mut allowed)
        .and_then(|()| submitter.register_enable_rings())
        .map_err(|source| Error::Restrict {
            name: name.to_owned(),
            source,
        })
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
