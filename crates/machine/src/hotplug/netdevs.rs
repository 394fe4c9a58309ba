// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Network backends: from `netdev_add` to an open tap interface, connection, or process of passt.

use std::ffi::OsString;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;

use ebbtide_net::{NetError, Netdev, PasstSpec, TapSpec};
use ebbtide_qmp::types::net::NetdevAdd;
use ebbtide_qmp::{Properties, QmpError};
use serde_json::Value;

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
    let name = id.clone();
    let netdev = match source {
        Source::Passt(_) if devices.confinement().limits_programs() => {
            program(devices, name, &source)?
        }
        Source::Stream(ref path) => {
            let path = Some(path.clone());
            devices
                .opener()
                .open(path, move || open(name, &source))
                .await?
        }
        Source::Tap(_) | Source::Passt(_) => {
            devices
                .opener()
                .open(None, move || open(name, &source))
                .await?
        }
    };
    // Another client may have taken the id meanwhile.
    devices.netdevs().add(&id, netdev).map_err(taken)
}

/// Starts a backend that is a program. It would inherit the limits of the thread that starts it: so it is this one, and
/// only before this one has any.
fn program(devices: &Devices, id: String, source: &Source) -> Result<Arc<Netdev>, QmpError> {
    if devices.confinement().is_sealed() {
        return Err(refused(
            "type",
            "passt",
            "a confined process starts no programs: name it with --netdev at the start, connect to one with stream, or start with --seccomp off --landlock off",
        ));
    }
    open(id, source).map_err(|e| QmpError::generic(e.to_string()))
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

fn open(id: String, source: &Source) -> Result<Arc<Netdev>, NetError> {
    match source {
        Source::Tap(spec) => Netdev::tap(id, spec),
        Source::Stream(path) => Netdev::stream(id, path),
        Source::Passt(spec) => Netdev::passt(id, spec),
    }
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

fn passt(properties: &mut Properties) -> Result<PasstSpec, QmpError> {
    let mut spec = PasstSpec::default();
    if let Some(path) = properties.take_string("path")? {
        spec.program = path.into();
    }
    // As QEMU has it: a list of texts, or of objects with the text in `str`.
    let texts = match properties.take_value("param") {
        None => Vec::new(),
        Some(Value::Array(items)) => items,
        Some(one) => vec![one],
    };
    for text in texts {
        let text = match &text {
            Value::Object(members) => members.get("str"),
            other => Some(other),
        };
        let text = text
            .and_then(Value::as_str)
            .ok_or_else(|| QmpError::invalid_type("param", "array of strings"))?;
        spec.arguments.push(OsString::from(text));
    }
    Ok(spec)
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
            program: "/bin/passt".into(),
            arguments: vec!["-4".into(), "-q".into()],
        };
        let passt = json!({"path": "/bin/passt", "param": [{"str": "-4"}, "-q"]});
        assert_eq!(of("passt", passt).unwrap(), Source::Passt(expected));
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
        ] {
            let error = of(kind, value).unwrap_err().desc;
            assert!(error.contains(part), "{error}");
        }
    }
}
