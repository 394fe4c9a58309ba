// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What devices say from their threads, as events of management.

use std::cell::RefCell;

use ebbtide_iothread::{Local, Receiver, Sender, channel};
use ebbtide_qmp::EventSink;
use ebbtide_qmp::types::chardev::VserportChange;
use ebbtide_qmp::types::events::{BALLOON_CHANGE, NETDEV_STREAM_DISCONNECTED, VSERPORT_CHANGE};
use ebbtide_qmp::types::memory::BalloonInfo;
use ebbtide_qmp::types::net::NetdevId;
use ebbtide_virtio::balloon::BalloonEvent;
use ebbtide_virtio::console::ConsoleEvent;
use ebbtide_virtio::net::NetEvent;

/// Where devices of each kind say it. Belongs to the control thread.
pub(crate) struct News {
    pub(crate) balloon: Sender<BalloonEvent>,
    pub(crate) net: Sender<NetEvent>,
    pub(crate) console: Sender<ConsoleEvent>,
    /// Until [`News::serve`] takes them.
    heard: RefCell<Option<Heard>>,
}

struct Heard {
    balloon: Receiver<BalloonEvent>,
    net: Receiver<NetEvent>,
    console: Receiver<ConsoleEvent>,
}

impl News {
    pub(super) fn new() -> News {
        let (balloon, balloon_heard) = channel();
        let (net, net_heard) = channel();
        let (console, console_heard) = channel();
        News {
            balloon,
            net,
            console,
            heard: RefCell::new(Some(Heard {
                balloon: balloon_heard,
                net: net_heard,
                console: console_heard,
            })),
        }
    }

    /// Passes on what is said to `events` until the last device is gone.
    pub(super) fn serve(
        &self,
        local: &Local,
        events: &EventSink,
        ram_bytes: impl Fn() -> u64 + 'static,
    ) {
        let Some(heard) = self.heard.borrow_mut().take() else {
            return;
        };
        let Heard {
            mut balloon,
            mut net,
            mut console,
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
        let cards = async move {
            while let Some(NetEvent::PeerGone { device, netdev }) = net.recv().await {
                tracing::warn!("{device}: the peer of netdev '{netdev}' is gone");
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
    }
}
