// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `ctl net add`

use clap::Args;
use ebbtide_qmp::Properties;
use ebbtide_qmp::commands::NETDEV_ADD;
use ebbtide_qmp::types::net::NetdevAdd;

use super::super::backend::Backend;
use super::super::{Failure, Outcome, Session};
use super::Plan;

/// The options of `ctl net add`.
#[derive(Args)]
pub(in crate::ctl) struct NetAddArgs {
    /// KIND[,name=value]...: what is at the other end, such as passt or tap,ifname=tap0; or JSON
    #[arg(value_name = "NETWORK", value_parser = network)]
    network: Network,
    /// The device's id; by default the first free one of nic0, nic1, ...
    #[arg(long, value_name = "ID")]
    id: Option<String>,
    /// The device's MAC address, such as 52:54:00:12:34:56
    #[arg(long, value_name = "MAC")]
    mac: Option<String>,
}

/// A kind of network backend with its properties.
#[derive(Debug, Clone)]
struct Network {
    kind: String,
    properties: Properties,
}

fn network(text: &str) -> Result<Network, String> {
    let read = || {
        let mut properties = Properties::parse(text, "type")?.nested()?;
        if properties.contains("id") {
            return Err(ebbtide_qmp::QmpError::generic(
                "the backend is named after the device: use --id",
            ));
        }
        let kind = properties.need_string("type")?;
        Ok(Network { kind, properties })
    };
    read().map_err(|error| error.desc)
}

pub(in crate::ctl) fn add(
    session: &mut Session<'_>,
    args: &NetAddArgs,
) -> Result<Outcome, Failure> {
    let plan = |id: &str| {
        let backend = Backend::network(id);
        let mut properties = Properties::new();
        properties.set("netdev", backend.name());
        if let Some(mac) = &args.mac {
            properties.set("mac", mac.as_str());
        }
        let Network {
            kind,
            properties: network,
        } = args.network.clone();
        Plan {
            make: NETDEV_ADD,
            arguments: NetdevAdd {
                kind,
                id: backend.name().to_owned(),
                properties: network,
            },
            backend,
            driver: "virtio-net-pci",
            id: id.to_owned(),
            properties,
        }
    };
    let what = format!("a network device on {}", args.network.kind);
    super::add(session, (args.id.as_deref(), "nic"), &what, plan)
}
