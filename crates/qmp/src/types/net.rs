// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Network backends.

use crate::schema::qapi_struct;

qapi_struct! {
    /// Arguments of `netdev_add`: those of every backend. The type's own are in `properties`.
    pub open struct NetdevAdd {
        /// What kind, such as `tap`.
        kind as "type": String,
        /// Its id.
        id as "id": String,
    }
}

qapi_struct! {
    /// Arguments of `netdev_del`.
    #[derive(Eq)]
    pub struct NetdevDel {
        /// The backend's id.
        id as "id": String,
    }
}

qapi_struct! {
    /// Data of `NETDEV_STREAM_DISCONNECTED`.
    #[derive(Eq)]
    pub struct NetdevId {
        /// The backend's id.
        netdev_id as "netdev-id": String,
    }
}

qapi_struct! {
    /// Arguments of `set_link`.
    #[derive(Eq)]
    pub struct SetLink {
        /// The id of a network device or backend.
        name as "name": String,
        /// Whether the cable is plugged in.
        up as "up": bool,
    }
}
