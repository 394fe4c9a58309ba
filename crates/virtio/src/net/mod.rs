// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The network device (virtio 1.3, 5.1).
//!
//! ```text
//! driver ── transmit queue ──▶ transmit.rs ──▶ ebbtide_net ──▶ host
//!        ◀── receive queue ─── receive.rs ◀── filter.rs ◀──
//!        ── control queue ───▶ commands.rs ──▶ filter, offloads
//! ```
//!
//! * `header.rs` is what stands in front of each frame and which of it was negotiated; `config.rs` the configuration.
//! * `shared.rs` is what the tasks of the queues have in common: link, address and filter.
//!
//! Each frame is copied once, between the guest's buffers and memory of ours: nothing of the guest's is pinned, and a
//! backend that takes or gives nothing holds neither memory nor the activation's gate. A frame that is malformed, too
//! long, or in memory that is no RAM is dropped and counted; a device never wants a reset for what a frame says.

mod commands;
mod config;
mod filter;
mod header;
mod metrics;
mod receive;
mod shared;
mod transmit;

use std::sync::Arc;

use ebbtide_iothread::{Remote, Sender};
use ebbtide_net::{Claim, MacAddress, NetError, Netdev};

pub use self::metrics::NetMetrics;
use self::shared::{Served, Shared};
use crate::control::TransportControl;
use crate::device::{ActivateError, Activation, VirtioDevice};

/// The device type (5.1.1).
pub const DEVICE_TYPE: u16 = 1;

/// Feature bits (5.1.3).
pub mod feature {
    /// The driver may leave checksums out.
    pub const CSUM: u64 = 1 << 0;
    /// The device may.
    pub const GUEST_CSUM: u64 = 1 << 1;
    /// The driver may switch what the device leaves to it.
    pub const CTRL_GUEST_OFFLOADS: u64 = 1 << 2;
    /// The device says how long packets may be.
    pub const MTU: u64 = 1 << 3;
    /// The device has an address.
    pub const MAC: u64 = 1 << 5;
    /// The driver takes TCP over IPv4 of many segments.
    pub const GUEST_TSO4: u64 = 1 << 7;
    /// The driver takes TCP over IPv6 of many segments.
    pub const GUEST_TSO6: u64 = 1 << 8;
    /// ... with ECN bits.
    pub const GUEST_ECN: u64 = 1 << 9;
    /// The device takes TCP over IPv4 of many segments.
    pub const HOST_TSO4: u64 = 1 << 11;
    /// The device takes TCP over IPv6 of many segments.
    pub const HOST_TSO6: u64 = 1 << 12;
    /// ... with ECN bits.
    pub const HOST_ECN: u64 = 1 << 13;
    /// A frame may fill several chains.
    pub const MRG_RXBUF: u64 = 1 << 15;
    /// The device says whether the link is up.
    pub const STATUS: u64 = 1 << 16;
    /// There is a control queue.
    pub const CTRL_VQ: u64 = 1 << 17;
    /// It takes the commands of 5.1.6.5.1 and the address table.
    pub const CTRL_RX: u64 = 1 << 18;
    /// It takes those that filter by VLAN.
    pub const CTRL_VLAN: u64 = 1 << 19;
    /// It takes more of the first kind.
    pub const CTRL_RX_EXTRA: u64 = 1 << 20;
    /// It takes another address.
    pub const CTRL_MAC_ADDR: u64 = 1 << 23;

    /// What needs a backend with offloads.
    pub(super) const OFFLOADS: u64 =
        CSUM | HOST_TSO4 | HOST_TSO6 | HOST_ECN | GUEST_OFFLOADS | CTRL_GUEST_OFFLOADS;
    /// What the device may leave to the driver.
    pub(super) const GUEST_OFFLOADS: u64 = GUEST_CSUM | GUEST_TSO4 | GUEST_TSO6 | GUEST_ECN;
    /// Each of the first needs one of the second (5.1.3.1).
    pub(super) const NEEDS: [(u64, u64); 11] = [
        (HOST_TSO4, CSUM),
        (HOST_TSO6, CSUM),
        (HOST_ECN, HOST_TSO4 | HOST_TSO6),
        (GUEST_TSO4, GUEST_CSUM),
        (GUEST_TSO6, GUEST_CSUM),
        (GUEST_ECN, GUEST_TSO4 | GUEST_TSO6),
        (CTRL_RX, CTRL_VQ),
        (CTRL_VLAN, CTRL_VQ),
        (CTRL_RX_EXTRA, CTRL_RX),
        (CTRL_MAC_ADDR, CTRL_VQ),
        (CTRL_GUEST_OFFLOADS, CTRL_VQ),
    ];
}

/// Indices of the queues when there is one pair (5.1.2).
pub(crate) mod queue {
    pub(crate) const RECEIVE: u16 = 0;
    pub(crate) const TRANSMIT: u16 = 1;
    pub(crate) const CONTROL: u16 = 2;
}

/// Size of the control queue, as in QEMU.
const CONTROL_QUEUE_SIZE: u16 = 64;

/// What a network device is to be. The names in quotes are those of QEMU's properties; its `netdev` is an argument of
/// [`VirtioNet::new`].
#[derive(Debug, Clone)]
pub struct NetSpec {
    /// `id`: its name in logs.
    pub id: String,
    /// `mac`.
    pub mac: MacAddress,
    /// `host_mtu`: the longest packet the driver shall send, from 68; `None`: nothing is said.
    pub mtu: Option<u16>,
    /// `rx_queue_size`: a power of two.
    pub rx_queue_size: u16,
    /// `tx_queue_size`: a power of two.
    pub tx_queue_size: u16,
    /// `mrg_rxbuf`, `csum`, `guest_csum`, `host_tso4`, `host_tso6`, `host_ecn`, `guest_tso4`, `guest_tso6`, `guest_ecn`,
    /// `status`, `ctrl_vq`, `ctrl_rx`, `ctrl_vlan`, `ctrl_rx_extra`, `ctrl_mac_addr`, `ctrl_guest_offloads`: bits of
    /// [`feature`] that are not offered (`=off`). What depends on them is not offered either.
    pub features_off: u64,
    /// Where to say that the peer of the backend is gone.
    pub events: Option<Sender<NetEvent>>,
}

impl NetSpec {
    /// Everything on, queues of 256.
    pub fn new(id: impl Into<String>, mac: MacAddress) -> NetSpec {
        NetSpec {
            id: id.into(),
            mac,
            mtu: None,
            rx_queue_size: 256,
            tx_queue_size: 256,
            features_off: 0,
            events: None,
        }
    }
}

/// What management is told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NetEvent {
    /// The peer of the backend is gone for good, and the link is down: QEMU's NETDEV_STREAM_DISCONNECTED.
    PeerGone {
        /// The device.
        device: String,
        /// The backend: `netdev-id`.
        netdev: String,
    },
}

/// The smallest MTU IPv4 allows (RFC 791).
const MTU_MIN: u16 = 68;

/// Why there can be no such device.
#[derive(Debug, thiserror::Error)]
pub enum NetDeviceError {
    /// `host_mtu` is too small.
    #[error("{id}: host_mtu={value} is below 68")]
    Mtu {
        /// The device.
        id: String,
        /// What was asked for.
        value: u16,
    },
    /// The backend cannot be had.
    #[error("{id}: {source}")]
    Netdev {
        /// The device.
        id: String,
        /// Why.
        #[source]
        source: NetError,
    },
}

/// A virtio network device with one pair of queues, served by one iothread.
pub struct VirtioNet {
    shared: Arc<Shared>,
    features: u64,
    queue_sizes: [u16; 3],
    remote: Remote,
}

impl VirtioNet {
    /// A device on `netdev`, which is in use until the device and all its tasks are gone.
    ///
    /// # Errors
    /// [`NetDeviceError`]: the MTU is impossible; another device has the backend, or it was removed.
    pub fn new(
        spec: NetSpec,
        netdev: &Arc<Netdev>,
        remote: Remote,
    ) -> Result<Arc<VirtioNet>, NetDeviceError> {
        if let Some(value) = spec.mtu.filter(|mtu| *mtu < MTU_MIN) {
            return Err(NetDeviceError::Mtu { id: spec.id, value });
        }
        let claim = match netdev.claim(&spec.id) {
            Ok(claim) => claim,
            Err(source) => {
                let id = spec.id;
                return Err(NetDeviceError::Netdev { id, source });
            }
        };
        Ok(Arc::new(VirtioNet {
            features: offered(&spec, &claim),
            queue_sizes: [spec.rx_queue_size, spec.tx_queue_size, CONTROL_QUEUE_SIZE],
            shared: Shared::new(spec, claim),
            remote,
        }))
    }

    /// Plugs the cable in or pulls it out (QMP `set_link`). Frames are dropped, both ways, while the link is down.
    pub fn set_link(&self, up: bool) {
        self.shared.set_link(up);
    }

    /// Whether the link is up: it is not pulled, and the backend has its peer.
    pub fn link_is_up(&self) -> bool {
        self.shared.link_is_up()
    }

    /// The address frames are received at: the driver may have changed it.
    pub fn mac(&self) -> MacAddress {
        self.shared.mac()
    }

    /// What it has done so far.
    pub fn metrics(&self) -> NetMetrics {
        self.shared.counters.snapshot()
    }

    fn queue_count(&self) -> usize {
        if self.features & feature::CTRL_VQ != 0 {
            3
        } else {
            2
        }
    }
}

/// What a device offers on this backend.
fn offered(spec: &NetSpec, claim: &Claim) -> u64 {
    use feature::{
        CTRL_MAC_ADDR, CTRL_RX, CTRL_RX_EXTRA, CTRL_VLAN, CTRL_VQ, MAC, MRG_RXBUF, MTU, NEEDS,
        OFFLOADS, STATUS,
    };
    let when = |condition, bits| if condition { bits } else { 0 };
    let plain = MRG_RXBUF | STATUS | CTRL_VQ | CTRL_RX | CTRL_RX_EXTRA | CTRL_VLAN | CTRL_MAC_ADDR;
    let switched = (plain | when(claim.has_offloads(), OFFLOADS)) & !spec.features_off;
    // In the order of the table, for it names what others need first.
    let able = NEEDS.iter().fold(switched, |features, &(bit, needed)| {
        features & !when(features & needed == 0, bit)
    });
    able | MAC | when(spec.mtu.is_some(), MTU)
}

impl VirtioDevice for VirtioNet {
    fn device_type(&self) -> u16 {
        DEVICE_TYPE
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn queue_sizes(&self) -> &[u16] {
        self.queue_sizes
            .get(..self.queue_count())
            .unwrap_or_default()
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        self.shared.config().read(offset, data);
    }

    /// No field can be written: the address is set with a command.
    fn write_config(&self, _offset: u64, _data: &[u8]) {}

    /// Refuses a feature without one that it needs. A new driver finds address and filter as at power-on.
    fn accept_features(&self, driver: u64) -> bool {
        let complete = feature::NEEDS
            .iter()
            .all(|&(bit, needed)| driver & bit == 0 || driver & needed != 0);
        if complete {
            self.shared.new_driver(driver);
        }
        complete
    }

    fn activate(&self, activation: Activation) -> Result<(), ActivateError> {
        let Activation {
            features,
            queues,
            memory,
            gate,
            control,
        } = activation;
        for queue in queues {
            let index = queue.index;
            if index != queue::RECEIVE {
                // A driver waits for its commands with a lock held, and a sender for room that its frames take. Nobody
                // waits for a buffer to be received into.
                queue.removed.listen();
            }
            let served = Served {
                shared: Arc::clone(&self.shared),
                queue,
                features,
                gate: Arc::clone(&gate),
                space: Arc::clone(&memory),
                control: control.clone(),
            };
            let spawned = match index {
                queue::RECEIVE => self
                    .remote
                    .spawn(move |local| receive::serve(local, served)),
                queue::TRANSMIT => self
                    .remote
                    .spawn(move |local| transmit::serve(local, served)),
                queue::CONTROL if features & feature::CTRL_VQ != 0 => self
                    .remote
                    .spawn(move |local| commands::serve(local, served)),
                // Without the feature there is no such queue, whatever the driver enables.
                _ => Ok(()),
            };
            spawned.map_err(|_| ActivateError::ThreadStopped)?;
        }
        Ok(())
    }

    fn attach(&self, control: TransportControl) {
        self.shared.attach(control);
    }
}
