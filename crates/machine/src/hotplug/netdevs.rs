// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Network backends: from `netdev_add` to an open tap interface, connection, or process of passt.

use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;

use ebbtide_net::{Launcher, Netdev, PasstSpec, TapSpec};
use ebbtide_qmp::types::net::NetdevAdd;
use ebbtide_qmp::{Properties, QmpError};
use serde_json::{Map, Value};

use super::Devices;
use super::backends::Released;
use super::drivers::check_id;

/// A card's tasks have it until each of them has ended.
impl Released for Arc<Netdev> {
    fn is_released(&self) -> bool {
        self.user().is_none()
    }
}

/// What to open.
#[derive(Debug, PartialEq)]
enum Source {
    Tap(TapSpec),
    Stream(PathBuf),
    Passt(PasstSpec),
}

/// Opens the backend that `args` describe.
///
/// # Errors
/// What is not supported, an id that is impossible or taken, what the host refuses; nothing was added.
pub(crate) async fn add(devices: &Devices, args: NetdevAdd) -> Result<(), QmpError> {
    let NetdevAdd {
        kind,
        id,
        properties,
    } = args;
    check_id(&id)?;
    let taken = |_| QmpError::duplicate_netdev(&id);
    devices.netdevs().check_name(&id).map_err(taken)?;
    let source = source(&kind, properties)?;
    let (name, opener) = (id.clone(), devices.opener());
    let netdev = match source {
        Source::Tap(spec) => opener.open(None, move || Netdev::tap(name, &spec)).await?,
        Source::Stream(path) => {
            let open = {
                let path = path.clone();
                move || Netdev::stream(name, &path)
            };
            opener.open(Some(path), open).await?
        }
        Source::Passt(spec) => {
            let launcher = launcher(devices)?;
            let start = move || Netdev::passt(name, &launcher, &spec);
            opener.open(None, start).await?
        }
    };
    // Another client may have taken the id meanwhile.
    if let Err(error) = devices.netdevs().check_name(&id) {
        // Closing may block: a process is waited for.
        devices.blocking().run(move || drop(netdev)).await;
        return Err(taken(error));
    }
    devices.netdevs().add(&id, netdev).map_err(taken)
}

/// Who starts programs: no thread of a machine may.
fn launcher(devices: &Devices) -> Result<Arc<Launcher>, QmpError> {
    let launcher = devices.launcher().cloned();
    launcher.ok_or_else(|| {
        let why = "there was no launcher of programs at the start (--passt off)";
        refused("type", "passt", why)
    })
}

/// Closes a backend that nothing uses.
///
/// # Errors
/// There is none, or a device has it.
pub(crate) async fn remove(devices: &Devices, id: &str) -> Result<(), QmpError> {
    if devices.netdevs().get(id).is_none() {
        return Err(match devices.tree().borrow().by_id(id) {
            Some(_) => QmpError::not_a_netdev(id),
            None => QmpError::device_not_found(id),
        });
    }
    let netdev = devices.netdevs().remove(id)?;
    if let Some(netdev) = Rc::into_inner(netdev) {
        // Closing may block: a process is waited for.
        devices.blocking().run(move || drop(netdev)).await;
    }
    Ok(())
}

fn source(kind: &str, mut properties: Properties) -> Result<Source, QmpError> {
    let source = match kind {
        "tap" => Source::Tap(tap(&mut properties)?),
        "stream" => Source::Stream(stream(&mut properties)?),
        "passt" => Source::Passt(passt(&mut properties)?),
        "user" => {
            return Err(refused(
                "type",
                kind,
                "use passt, which needs no privileges",
            ));
        }
        other => {
            return Err(refused("type", other, "tap, stream and passt are accepted"));
        }
    };
    properties.finish()?;
    Ok(source)
}

fn refused(property: &str, value: &str, why: &str) -> QmpError {
    QmpError::generic(format!(
        "Parameter '{property}' does not accept value '{value}': {why}"
    ))
}

fn tap(properties: &mut Properties) -> Result<TapSpec, QmpError> {
    for property in ["fd", "fds"] {
        if let Some(value) = properties.take_string(property)? {
            return Err(refused(
                property,
                &value,
                "descriptors cannot be handed over, use ifname",
            ));
        }
    }
    for property in ["script", "downscript"] {
        match properties.take_string(property)?.as_deref() {
            None | Some("no" | "") => {}
            Some(other) => {
                return Err(refused(
                    property,
                    other,
                    "no script is run, 'no' is accepted",
                ));
            }
        }
    }
    if properties.take_bool("vhost")? == Some(true) {
        return Err(refused("vhost", "on", "the device itself moves packets"));
    }
    Ok(TapSpec {
        interface: properties.take_string("ifname")?,
        offloads: properties.take_bool("vnet_hdr")?.unwrap_or(true),
    })
}

fn stream(properties: &mut Properties) -> Result<PathBuf, QmpError> {
    if properties.take_bool("server")? == Some(true) {
        return Err(refused("server", "on", "connecting is what is supported"));
    }
    let mut address = properties.take_object("addr")?.unwrap_or_default();
    let kind = address
        .take_string("type")?
        .ok_or_else(|| QmpError::missing_parameter("addr.type"))?;
    if kind != "unix" {
        return Err(refused("addr.type", &kind, "unix is accepted"));
    }
    let path = address
        .take_string("path")?
        .ok_or_else(|| QmpError::missing_parameter("addr.path"))?;
    address.finish()?;
    Ok(path.into())
}

/// QEMU's names of passt's options that have a value.
const PASST_VALUES: &[(&str, &str)] = &[
    ("mtu", "mtu"),
    ("address", "address"),
    ("netmask", "netmask"),
    ("mac", "mac-addr"),
    ("gateway", "gateway"),
    ("interface", "interface"),
    ("outbound", "outbound"),
    ("outbound-if4", "outbound-if4"),
    ("outbound-if6", "outbound-if6"),
    ("dns", "dns"),
    ("fqdn", "fqdn"),
    ("map-host-loopback", "map-host-loopback"),
    ("map-guest-addr", "map-guest-addr"),
    ("dns-forward", "dns-forward"),
    ("dns-host", "dns-host"),
];
/// Those that may come several times.
const PASST_LISTS: &[(&str, &str)] = &[
    ("search", "search"),
    ("tcp-ports", "tcp-ports"),
    ("udp-ports", "udp-ports"),
];
/// What is on unless it is switched off, with the option that does.
const PASST_SWITCHES: &[(&str, &str)] = &[
    ("dhcp-dns", "no-dhcp-dns"),
    ("dhcp-search", "no-dhcp-search"),
    ("tcp", "no-tcp"),
    ("udp", "no-udp"),
    ("icmp", "no-icmp"),
    ("dhcp", "no-dhcp"),
    ("ndp", "no-ndp"),
    ("dhcpv6", "no-dhcpv6"),
    ("ra", "no-ra"),
    ("ipv4", "ipv6-only"),
    ("ipv6", "ipv4-only"),
];

fn passt(properties: &mut Properties) -> Result<PasstSpec, QmpError> {
    if properties.take_bool("vhost-user")? == Some(true) {
        return Err(refused(
            "vhost-user",
            "on",
            "passt is connected by a socket",
        ));
    }
    let program = properties.take_string("path")?.map(PathBuf::from);
    let mut arguments = Vec::new();
    for (property, option) in PASST_VALUES {
        let value = match properties.get(property) {
            Some(Value::Number(_)) => properties
                .take_uint::<u64>(property)?
                .map(|n| n.to_string()),
            _ => properties.take_string(property)?,
        };
        arguments.extend(value.map(|value| format!("--{option}={value}")));
    }
    for (property, option) in PASST_LISTS {
        let texts = texts(properties, property)?;
        arguments.extend(texts.iter().map(|text| format!("--{option}={text}")));
    }
    for (property, option) in PASST_SWITCHES {
        if properties.take_bool(property)? == Some(false) {
            arguments.push(format!("--{option}"));
        }
    }
    if properties.take_bool("freebind")? == Some(true) {
        arguments.push("--freebind".to_owned());
    }
    // What it says goes nowhere but into the message when it ends.
    properties.take_bool("quiet")?;
    arguments.extend(texts(properties, "param")?);
    Ok(PasstSpec { program, arguments })
}

/// As QEMU has them: a list of texts, or of objects with the text in `str`. A command line writes a list as one text, or
/// with the numbers of its items: `param.0.str=TEXT`.
fn texts(properties: &mut Properties, name: &str) -> Result<Vec<String>, QmpError> {
    let items = match properties.take_value(name) {
        None => Vec::new(),
        Some(Value::Array(items)) => items,
        Some(Value::Object(members)) if !members.contains_key("str") => {
            numbered(members).ok_or_else(|| QmpError::invalid_type(name, "array of strings"))?
        }
        Some(one) => vec![one],
    };
    let text = |item: &Value| {
        let text = match item {
            Value::Object(members) => members.get("str"),
            other => Some(other),
        };
        let text = text.and_then(Value::as_str).map(str::to_owned);
        text.ok_or_else(|| QmpError::invalid_type(name, "array of strings"))
    };
    items.iter().map(text).collect()
}

/// The items 0, 1, ... if that is what the members are.
fn numbered(mut members: Map<String, Value>) -> Option<Vec<Value>> {
    let count = members.len();
    (0..count).map(|n| members.remove(&n.to_string())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn of(kind: &str, value: Value) -> Result<Source, QmpError> {
        let mut properties = Properties::new();
        for (name, value) in value.as_object().into_iter().flatten() {
            properties.set(name.clone(), value.clone());
        }
        source(kind, properties)
    }

    #[test]
    fn spellings() {
        let stream = Source::Stream("/run/s".into());
        let nested = json!({"server": false, "addr": {"type": "unix", "path": "/run/s"}});
        assert_eq!(of("stream", nested).unwrap(), stream);
        let text = "stream,addr.type=unix,addr.path=/run/s";
        let mut option = Properties::parse(text, "type").unwrap().nested().unwrap();
        option.take_string("type").unwrap();
        assert_eq!(source("stream", option).unwrap(), stream);
        let tap = json!({"ifname": "t0", "script": "no", "downscript": "no", "vhost": "off"});
        let expected = TapSpec {
            interface: Some("t0".into()),
            offloads: true,
        };
        assert_eq!(of("tap", tap).unwrap(), Source::Tap(expected));
        let expected = PasstSpec {
            program: Some("/bin/passt".into()),
            arguments: vec!["-4".into(), "-q".into()],
        };
        let passt = json!({"path": "/bin/passt", "param": [{"str": "-4"}, "-q"]});
        assert_eq!(of("passt", passt).unwrap(), Source::Passt(expected));
        assert_eq!(
            of("passt", json!({})).unwrap(),
            Source::Passt(PasstSpec::default())
        );
    }

    #[test]
    fn the_options_of_passt_by_qemus_names() {
        let words = |words: &[&str]| {
            Source::Passt(PasstSpec {
                program: None,
                arguments: words.iter().map(|word| (*word).to_owned()).collect(),
            })
        };
        let json = json!({
            "mtu": 1400, "address": "10.0.2.15", "mac": "52:54:00:00:00:01", "dhcp": true, "icmp": false, "ipv6": false,
            "tcp-ports": [{"str": "8080:80"}, {"str": "22"}], "freebind": true, "quiet": false, "param": [{"str": "-1"}],
        });
        let expected = words(&[
            "--mtu=1400",
            "--address=10.0.2.15",
            "--mac-addr=52:54:00:00:00:01",
            "--tcp-ports=8080:80",
            "--tcp-ports=22",
            "--no-icmp",
            "--ipv4-only",
            "--freebind",
            "-1",
        ]);
        assert_eq!(of("passt", json).unwrap(), expected);
        let typed = |text: &str| {
            let mut option = Properties::parse(text, "type").unwrap().nested().unwrap();
            option.take_string("type").unwrap();
            source("passt", option)
        };
        let text = "passt,mtu=1400,tcp=off,param.0.str=-4,param.1.str=-1,search=a.example";
        let expected = words(&["--mtu=1400", "--search=a.example", "--no-tcp", "-4", "-1"]);
        assert_eq!(typed(text).unwrap(), expected);
        assert!(
            typed("passt,param.1.str=-4")
                .unwrap_err()
                .desc
                .contains("param")
        );
    }

    #[test]
    fn what_is_not_there_is_refused_by_name() {
        for (kind, value, part) in [
            ("user", json!({}), "'user'"),
            ("vde", json!({}), "'vde'"),
            ("tap", json!({"fd": "7"}), "'fd'"),
            ("tap", json!({"fds": "7:8"}), "'fds'"),
            ("tap", json!({"script": "/etc/ifup"}), "/etc/ifup"),
            ("tap", json!({"vhost": true}), "'vhost'"),
            ("tap", json!({"queues": 2}), "queues"),
            ("stream", json!({}), "addr.type"),
            (
                "stream",
                json!({"addr": {"type": "inet", "host": "a"}}),
                "'inet'",
            ),
            ("stream", json!({"addr": {"type": "unix"}}), "addr.path"),
            ("stream", json!({"server": true}), "'server'"),
            ("passt", json!({"param": [{"nope": 1}]}), "param"),
            ("passt", json!({"param": {"1": "-4"}}), "param"),
            ("passt", json!({"vhost-user": true}), "vhost-user"),
            ("passt", json!({"pcap": "/x"}), "pcap"),
            ("passt", json!({"mtu": -1}), "mtu"),
        ] {
            let error = of(kind, value).unwrap_err().desc;
            assert!(error.contains(part), "{error}");
        }
    }
}
