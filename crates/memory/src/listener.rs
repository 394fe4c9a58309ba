// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Who follows the map of an address space.

use thiserror::Error;

use crate::{FlatCoalesced, FlatIoeventfd, FlatSection};

/// Why a listener refuses a change.
#[derive(Debug, Error)]
#[error("{what}: {reason}")]
pub struct ListenerError {
    /// The listener and the object.
    pub what: String,
    /// The reason, with the values.
    pub reason: String,
}

/// Follows the flat view of an address space: KVM slots, port dispatch, VFIO, vhost.
///
/// Called on the thread that changes the map, under the map's writer lock: a listener makes no
/// blocking call and must not change the map. Removals come first, in reverse order of
/// priority; additions follow, in order; both before the new view is published.
pub trait Listener: Send {
    /// A change begins.
    fn begin(&mut self) {}
    /// A section appears. An error takes the whole change back.
    fn region_add(&mut self, section: &FlatSection) -> Result<(), ListenerError>;
    /// A section goes. Also called to take back a `region_add` of a change that failed.
    fn region_del(&mut self, section: &FlatSection);
    /// An ioeventfd appears. An error takes the whole change back.
    fn ioeventfd_add(&mut self, _ioeventfd: &FlatIoeventfd) -> Result<(), ListenerError> {
        Ok(())
    }
    /// An ioeventfd goes.
    fn ioeventfd_del(&mut self, _ioeventfd: &FlatIoeventfd) {}
    /// A range whose writes may be kept back appears. An error takes the whole change back.
    fn coalesced_add(&mut self, _coalesced: &FlatCoalesced) -> Result<(), ListenerError> {
        Ok(())
    }
    /// A range whose writes may be kept back goes: those kept are to be handed over.
    fn coalesced_del(&mut self, _coalesced: &FlatCoalesced) {}
    /// The change is complete: published, or taken back.
    fn commit(&mut self) {}
    /// Somebody wants to know what changes in a section that was added before. An external
    /// tracker (KVM, vhost, VFIO) follows writes from here to `log_stop` or `region_del`. An
    /// error takes the start of the client back.
    ///
    /// A section that is added while its block is logged ([`crate::RamBlock::is_logged`]) is to
    /// be followed from the start, without this call. One that goes while it is followed must be
    /// merged into its block, or made dirty as a whole, before `region_del` returns.
    fn log_start(&mut self, _section: &FlatSection) -> Result<(), ListenerError> {
        Ok(())
    }
    /// Nobody wants to know any more. Also called to take back a `log_start`.
    fn log_stop(&mut self, _section: &FlatSection) {}
    /// Somebody is about to ask by `log_sync` for some of the sections, or for none. A tracker
    /// that has all it knows in one place merges it here, once.
    fn log_sync_begin(&mut self) {}
    /// Merge what is known of a section into its block ([`crate::RamBlock::merge_dirty`]), and
    /// forget it. What cannot be told must be taken for dirty.
    fn log_sync(&mut self, _section: &FlatSection) {}
}

/// Names a listener of one address space.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ListenerId(pub(crate) u64);
