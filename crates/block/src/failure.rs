// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Operations that failed, as told to whoever owns the disk.
//!
//! ```text
//!   quiet ──an operation fails──▶ told, pending ──the owner drops the Failure──▶ quiet
//! ```
//!
//! While one failure is pending others are not told: however many a guest causes, each disk has one message under way.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use ebbtide_iothread::Sender;

use crate::op::OpKind;

/// An operation that failed. Until it is dropped, its disk tells of no other.
#[derive(Debug)]
pub struct Failure {
    /// What the disk is called, as given to [`Disk::tell_failures`](crate::Disk::tell_failures).
    pub disk: Arc<str>,
    /// What failed.
    pub kind: OpKind,
    /// Whether there was no space.
    pub no_space: bool,
    /// What the host said.
    pub reason: String,
    _pending: Pending,
}

#[derive(Debug)]
struct Pending(Arc<AtomicBool>);

impl Drop for Pending {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Release);
    }
}

/// Where a disk tells of failures, if anywhere.
#[derive(Debug, Default)]
pub(crate) struct Teller(OnceLock<To>);

struct To {
    disk: Arc<str>,
    sender: Sender<Failure>,
    pending: Arc<AtomicBool>,
}

impl std::fmt::Debug for To {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("To")
            .field("disk", &self.disk)
            .finish_non_exhaustive()
    }
}

impl Teller {
    /// False: it tells somebody already.
    pub(crate) fn set(&self, disk: &str, sender: Sender<Failure>) -> bool {
        let to = To {
            disk: disk.into(),
            sender,
            pending: Arc::default(),
        };
        self.0.set(to).is_ok()
    }

    /// Tells of a failure, unless one is pending. That the host does not offer an operation is no failure: the guest can
    /// do without. Nor is what was asked for and cannot be: a guest could hide failures behind those.
    pub(crate) fn tell(&self, kind: OpKind, error: &io::Error) {
        let Some(to) = self.0.get() else { return };
        if error.kind() == io::ErrorKind::Unsupported
            || is_impossible(error)
            || to.pending.swap(true, Ordering::AcqRel)
        {
            return;
        }
        // Nobody may be listening any more: then it is dropped here.
        let _ = to.sender.send(Failure {
            disk: Arc::clone(&to.disk),
            kind,
            no_space: error.kind() == io::ErrorKind::StorageFull,
            reason: error.to_string(),
            _pending: Pending(Arc::clone(&to.pending)),
        });
    }
}

/// Refused here, not by the host: outside of the disk, no whole blocks of it, or it is read-only.
fn is_impossible(error: &io::Error) -> bool {
    use io::ErrorKind::{InvalidInput, PermissionDenied};
    error.raw_os_error().is_none() && matches!(error.kind(), InvalidInput | PermissionDenied)
}

#[cfg(test)]
mod tests {
    use super::*;
    use ebbtide_iothread::channel;

    #[test]
    fn one_at_a_time() {
        let (sender, mut heard) = channel();
        let teller = Teller::default();
        let full = io::Error::from(io::ErrorKind::StorageFull);
        teller.tell(OpKind::Write, &full);
        assert!(teller.set("n0", sender.clone()) && !teller.set("n1", sender));
        teller.tell(OpKind::Discard, &io::ErrorKind::Unsupported.into());
        teller.tell(OpKind::Read, &io::ErrorKind::InvalidInput.into());
        let outside = io::Error::new(io::ErrorKind::InvalidInput, "outside");
        teller.tell(OpKind::Read, &outside);
        teller.tell(OpKind::Write, &io::ErrorKind::PermissionDenied.into());
        assert!(heard.try_recv().is_none());
        teller.tell(OpKind::Write, &full);
        teller.tell(OpKind::Read, &full);
        let failure = heard.try_recv().unwrap();
        assert!(failure.no_space && &*failure.disk == "n0" && failure.kind == OpKind::Write);
        assert!(heard.try_recv().is_none());
        drop(failure);
        teller.tell(OpKind::Read, &io::Error::other("broken"));
        let failure = heard.try_recv().unwrap();
        assert_eq!((failure.kind, &*failure.reason), (OpKind::Read, "broken"));
        assert!(!failure.no_space);
        drop(failure);
        // The host says that it is impossible, which it is not.
        teller.tell(OpKind::Read, &io::Error::from_raw_os_error(libc::EINVAL));
        assert!(heard.try_recv().is_some());
    }
}
