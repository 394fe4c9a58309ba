// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Devices at a reset and at the end of the machine. The vCPUs are parked.

use std::sync::Arc;
use std::time::Duration;

use ebbtide_device::{NodeId, Phase};
use ebbtide_virtio::PinnedList;

use super::Devices;
use super::pci::Removable;

/// What is only amid a turn of its queue has ended that by then, and is not called stuck.
const TURN: Duration = Duration::from_secs(1);

/// A device whose requests did not end in time.
pub(crate) struct Stuck {
    pub(crate) node: NodeId,
    /// As reports call it.
    pub(crate) name: String,
}

impl Devices {
    /// Removes what the guest was asked to let go of: it cannot answer any more. Waits for that as long as a drain may
    /// take; what takes longer goes on by itself and is out of the guest's reach.
    pub(crate) async fn finish_requested(&self) {
        let requested: Vec<NodeId> = {
            let tree = self.tree.borrow();
            let nodes = tree.iter();
            let asked = nodes.filter(|(_, n)| n.eject().is_some_and(|e| e.is_requested()));
            asked.map(|(id, _)| id).collect()
        };
        let removals: Vec<_> = requested
            .into_iter()
            .map(|node| self.remove(node))
            .collect();
        let all = async {
            for removal in removals {
                removal.await;
            }
        };
        let late = self.local.timeout(self.drain_timeout, all).await.is_err();
        if late {
            tracing::error!("a removal did not end within {:?}", self.drain_timeout);
        }
    }

    /// Lets the time that devices measure for the guest stand still, or go on.
    pub(crate) fn stand_still(&self, still: bool) {
        let tree = self.tree.borrow();
        let functions = tree.iter().filter_map(|(_, n)| n.info.site.function());
        for function in functions {
            match still {
                true => function.pause(),
                false => function.resume(),
            }
        }
    }

    /// Ends all use of the devices by the guest; returns those with requests that did not end within the drain time-out.
    /// Neither they nor what is on its way out answer anything from then on.
    pub(crate) async fn quiesce(&self) -> Vec<Stuck> {
        let mut forgotten = Vec::new();
        let drains: Vec<_> = {
            let tree = self.tree.borrow();
            // All gates close before the first wait.
            let leaving = tree.iter().filter(|(_, n)| n.phase() >= Phase::Draining);
            let leaving = leaving.filter_map(|(_, n)| n.info.site.function());
            forgotten.extend(leaving.map(|function| {
                function.config().keep_identity(false);
                function.forget_guest()
            }));
            let working = tree.iter().filter(|(_, n)| n.phase() < Phase::Draining);
            let drain = |(node, entry): (NodeId, &ebbtide_device::Node<super::Info>)| {
                let function = entry.info.site.function()?;
                let name = entry.identity.name().to_owned();
                Some((Stuck { node, name }, function.quiesce()))
            };
            working.filter_map(drain).collect()
        };
        let deadline = self.local.now() + self.drain_timeout.max(TURN);
        let mut stuck = Vec::new();
        for (device, drained) in drains {
            let left = deadline.saturating_duration_since(self.local.now());
            if self.local.timeout(left, drained).await.is_err() {
                let function = self.function(device.node);
                forgotten.extend(function.map(|function| function.forget_guest()));
                stuck.push(device);
            }
        }
        for forgotten in forgotten {
            forgotten.await;
        }
        stuck
    }

    fn function(&self, node: NodeId) -> Option<Arc<dyn Removable>> {
        let tree = self.tree.borrow();
        tree.get(node)?.info.site.function()
    }

    /// The host addresses that requests in flight of any device have pinned.
    pub(crate) fn pinned(&self) -> Vec<PinnedList> {
        let tree = self.tree.borrow();
        let functions = tree.iter().filter_map(|(_, n)| n.info.site.function());
        functions.flat_map(|function| function.pinned()).collect()
    }

    /// Has a device begin nothing more at its backend, if it has one that can be given up.
    pub(crate) fn give_up(&self, node: NodeId) {
        if let Some(function) = self.function(node) {
            function.force();
        }
    }

    /// The end of all devices: their names that did not drain.
    pub(crate) async fn end(&self) -> Vec<String> {
        let deadline = self.local.now() + self.drain_timeout;
        let mut stuck: Vec<String> = self.quiesce().await.into_iter().map(|d| d.name).collect();
        let leaving: Vec<(NodeId, String)> = {
            let tree = self.tree.borrow();
            let nodes = tree.iter().filter(|(_, n)| n.phase() >= Phase::Draining);
            nodes
                .map(|(node, entry)| (node, entry.identity.name().to_owned()))
                .collect()
        };
        for (node, name) in leaving {
            let left = deadline.saturating_duration_since(self.local.now());
            let detached = self.when(node, |phase| {
                phase
                    .is_none_or(|phase| phase >= Phase::Detached)
                    .then_some(())
            });
            if self.local.timeout(left, detached).await.is_err() {
                stuck.push(name);
            }
        }
        stuck
    }
}
