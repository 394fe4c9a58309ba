// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What devices say from their threads, as events of management.

use std::cell::RefCell;
use std::rc::Weak;
use std::sync::Arc;
use std::time::Duration;

use ebbtide_block::{Failure, OpKind};
use ebbtide_iothread::{Local, Receiver, Sender, channel};
use ebbtide_qmp::EventSink;
use ebbtide_qmp::types::block::{BlockErrorAction, BlockIoError, IoOperationType};
use ebbtide_qmp::types::chardev::VserportChange;
use ebbtide_qmp::types::events::{
    BALLOON_CHANGE, BLOCK_IO_ERROR, NETDEV_STREAM_DISCONNECTED, VSERPORT_CHANGE,
};
use ebbtide_qmp::types::memory::BalloonInfo;
use ebbtide_qmp::types::net::NetdevId;
use ebbtide_virtio::balloon::BalloonEvent;
use ebbtide_virtio::console::ConsoleEvent;
use ebbtide_virtio::net::NetEvent;

use super::{Devices, Face};

/// How long a disk of which a failure was told tells no other.
const QUIET: Duration = Duration::from_millis(100);

/// Where devices of each kind say it. Belongs to the control thread.
pub(crate) struct News {
    pub(crate) balloon: Sender<BalloonEvent>,
    pub(crate) net: Sender<NetEvent>,
    pub(crate) console: Sender<ConsoleEvent>,
    pub(crate) disk: Sender<Failure>,
    /// Until [`News::serve`] takes them.
    heard: RefCell<Option<Heard>>,
}

struct Heard {
    balloon: Receiver<BalloonEvent>,
    net: Receiver<NetEvent>,
    console: Receiver<ConsoleEvent>,
    disk: Receiver<Failure>,
}

impl News {
    pub(super) fn new() -> News {
        let (balloon, balloon_heard) = channel();
        let (net, net_heard) = channel();
        let (console, console_heard) = channel();
        let (disk, disk_heard) = channel();
        News {
            balloon,
            net,
            console,
            disk,
            heard: RefCell::new(Some(Heard {
                balloon: balloon_heard,
                net: net_heard,
                console: console_heard,
                disk: disk_heard,
            })),
        }
    }

    /// Passes on what is said to `events` until the last device is gone.
    pub(super) fn serve(
        &self,
        local: &Local,
        events: &EventSink,
        ram_bytes: impl Fn() -> u64 + 'static,
        devices: &Weak<Devices>,
    ) {
        let Some(heard) = self.heard.borrow_mut().take() else {
            return;
        };
        let Heard {
            mut balloon,
            mut net,
            mut console,
            mut disk,
        } = heard;
        let sink = events.clone();
        let balloons = async move {
            while let Some(BalloonEvent::Changed {
                ballooned_bytes, ..
            }) = balloon.recv().await
            {
                let actual = ram_bytes().saturating_sub(ballooned_bytes);
                let actual = i64::try_from(actual).unwrap_or(i64::MAX);
                sink.emit(BALLOON_CHANGE.with(BalloonInfo { actual }));
            }
        };
        local.spawn(balloons).detach();
        let sink = events.clone();
        let owner = Weak::clone(devices);
        let cards = async move {
            while let Some(NetEvent::PeerGone { device, netdev }) = net.recv().await {
                let Some(devices) = owner.upgrade() else {
                    return;
                };
                devices.tell_of_peer(device, netdev.clone());
                sink.emit(NETDEV_STREAM_DISCONNECTED.with(NetdevId { netdev_id: netdev }));
            }
        };
        local.spawn(cards).detach();
        let sink = events.clone();
        let ports = async move {
            while let Some(ConsoleEvent::PortChange { id, open }) = console.recv().await {
                sink.emit(VSERPORT_CHANGE.with(VserportChange { id, open }));
            }
        };
        local.spawn(ports).detach();
        let (timer, devices) = (local.clone(), Weak::clone(devices));
        let failures = async move {
            while let Some(failure) = disk.recv().await {
                let Some(devices) = devices.upgrade() else {
                    return;
                };
                devices.tell_failure(&failure);
                // Meanwhile its disk tells nothing else.
                let timer = timer.clone();
                let quiet = async move {
                    timer.sleep(QUIET).await;
                    drop(failure);
                };
                devices.local.spawn(quiet).detach();
            }
        };
        local.spawn(failures).detach();
    }
}

impl Devices {
    /// Tells the log that the peer of a card is gone; of a program, how it ended, which may take a moment to be known.
    fn tell_of_peer(&self, device: String, netdev: String) {
        let backend = self.netdevs().get(&netdev).map(|it| Arc::clone(&it));
        let end = backend.map(|backend| self.blocking().run(move || backend.end_of_peer()));
        let told = async move {
            let end = match end {
                Some(end) => end.await,
                None => None,
            };
            let how = end.map(|end| format!(": {end}")).unwrap_or_default();
            tracing::warn!("{device}: the peer of netdev '{netdev}' is gone{how}");
        };
        self.local.spawn(told).detach();
    }

    /// Tells management of an operation that failed, as one of the device that has the disk.
    fn tell_failure(&self, failure: &Failure) {
        let Some(failed) = self.blocks().get(&failure.disk) else {
            return;
        };
        let tree = self.tree().borrow();
        let has_it = |face: &Face| match face {
            Face::Disk { node } => {
                let node = self.blocks().get(node);
                node.is_some_and(|node| Arc::ptr_eq(node.disk(), failed.disk()))
            }
            _ => false,
        };
        let mut nodes = tree.iter().map(|(_, node)| node);
        let Some(device) = nodes.find(|node| has_it(&node.info.face)) else {
            return;
        };
        self.emit(BLOCK_IO_ERROR.with(BlockIoError {
            qom_path: device.identity.path.clone(),
            device: String::new(),
            node_name: Some(failure.disk.to_string()),
            operation: match failure.kind {
                OpKind::Read => IoOperationType::Read,
                _ => IoOperationType::Write,
            },
            action: BlockErrorAction::Report,
            nospace: Some(failure.no_space),
            reason: failure.reason.clone(),
        }));
    }
}
