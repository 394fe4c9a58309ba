// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Which iothreads serve a device's queues.

use ebbtide_iothread::Remote;
use ebbtide_qmp::{Properties, QmpError};
use serde_json::Value;

use crate::hotplug::{AnyUse, Devices, Object};

/// The property that spreads request queues over iothreads.
pub(super) const MAPPING: &str = "iothread-vq-mapping";

/// The threads that serve a device's queues: at least one.
pub(super) struct Serving {
    pub(super) first: Remote,
    pub(super) more: Vec<Remote>,
    pub(super) uses: Vec<Box<dyn AnyUse>>,
}

/// Takes the property `iothread`: the id of an iothread, or a list of ids over which queues are spread. Without it the
/// thread called `default` serves all.
pub(super) fn serving(
    devices: &Devices,
    driver: &str,
    name: &str,
    default: &str,
    properties: &mut Properties,
) -> Result<Serving, QmpError> {
    let ids = properties.take_strings("iothread")?.unwrap_or_default();
    let (mut remotes, mut uses) = (Vec::new(), Vec::<Box<dyn AnyUse>>::new());
    for id in ids {
        let object = devices
            .objects()
            .share(&id, name)
            .map_err(|_| QmpError::no_such_backend(driver, "iothread", &id))?;
        let Object::Iothread(iothread) = &**object.value() else {
            return Err(QmpError::property_value(driver, "iothread", &id));
        };
        remotes.push(iothread.remote());
        uses.push(Box::new(object));
    }
    let mut remotes = remotes.into_iter();
    let first = match remotes.next() {
        Some(first) => first,
        None => devices.thread(default)?,
    };
    Ok(Serving {
        first,
        more: remotes.collect(),
        uses,
    })
}

/// The same for a device with `queues` request queues, which may have [`MAPPING`] instead: a list of iothreads, or of
/// iothreads with their queues where these are spread evenly, as they are without.
pub(super) fn serving_queues(
    devices: &Devices,
    driver: &str,
    name: &str,
    default: &str,
    queues: u16,
    properties: &mut Properties,
) -> Result<Serving, QmpError> {
    if let Some(mapping) = properties.take_value(MAPPING) {
        if properties.contains("iothread") {
            return Err(QmpError::generic(format!(
                "iothread and {MAPPING} properties cannot be set at the same time"
            )));
        }
        let ids = mapped(&mapping, queues)
            .map_err(|why| QmpError::generic(format!("Parameter '{MAPPING}' {why}")))?;
        properties.set("iothread", ids);
    }
    serving(devices, driver, name, default, properties)
}

/// The iothreads of a mapping, in order: queue i is served by the (i mod n)-th of n.
fn mapped(mapping: &Value, queues: u16) -> Result<Vec<String>, String> {
    let entries = mapping.as_array().filter(|entries| !entries.is_empty());
    let entries = entries.ok_or("expects a list of iothreads")?;
    let mut ids = Vec::new();
    for (place, entry) in entries.iter().enumerate() {
        let members = entry.as_object().ok_or("expects a list of objects")?;
        if let Some(other) = members
            .keys()
            .find(|key| *key != "iothread" && *key != "vqs")
        {
            return Err(format!("has an unexpected member '{other}'"));
        }
        let id = members.get("iothread").and_then(Value::as_str);
        let id = id.ok_or("needs an iothread in each entry")?;
        if ids.iter().any(|its| its == id) {
            return Err(format!("names iothread '{id}' twice"));
        }
        ids.push(id.to_owned());
        let Some(given) = members.get("vqs") else {
            continue;
        };
        let even: Vec<u16> = (0..queues).skip(place).step_by(entries.len()).collect();
        let mut given: Vec<u64> = given
            .as_array()
            .and_then(|vqs| vqs.iter().map(Value::as_u64).collect())
            .ok_or("expects a list of numbers as vqs")?;
        given.sort_unstable();
        if given != even.iter().map(|vq| u64::from(*vq)).collect::<Vec<_>>() {
            return Err(format!(
                "gives iothread '{id}' the queues {given:?}: only an even spread is supported, in which they are {even:?}"
            ));
        }
    }
    Ok(ids)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn queues_are_spread_evenly() {
        let pair = json!([{"iothread": "a"}, {"iothread": "b"}]);
        assert_eq!(mapped(&pair, 4).unwrap(), ["a", "b"]);
        let even = json!([{"iothread": "a", "vqs": [2, 0]}, {"iothread": "b", "vqs": [1, 3]}]);
        assert_eq!(mapped(&even, 4).unwrap(), ["a", "b"]);
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (mapping, why) in [
            (json!([]), "expects a list of iothreads"),
            (json!("a"), "expects a list of iothreads"),
            (json!(["a"]), "expects a list of objects"),
            (json!([{"vqs": [0]}]), "needs an iothread"),
            (
                json!([{"iothread": "a", "cpu": 1}]),
                "unexpected member 'cpu'",
            ),
            (json!([{"iothread": "a"}, {"iothread": "a"}]), "'a' twice"),
            (json!([{"iothread": "a", "vqs": ["0"]}]), "list of numbers"),
            (
                json!([{"iothread": "a", "vqs": [1]}, {"iothread": "b", "vqs": [0]}]),
                "gives iothread 'a' the queues [1]: only an even spread is supported, in which they are [0]",
            ),
            (
                json!([{"iothread": "a", "vqs": [0, 1, 2]}]),
                "they are [0, 1]",
            ),
        ] {
            let error = mapped(&mapping, 2).unwrap_err();
            assert!(error.contains(why), "{mapping}: {error}");
        }
    }
}
