// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The direction of dependencies: a crate names only crates of the layers above it.

use anyhow::{Result, bail};
use serde_json::Value;

use crate::build;

/// Every crate may depend on it: outside of the models there is nothing in it.
const ANYWHERE: &str = "ebbtide-models";

/// Each crate with the crates of ours that it may depend on. The hypervisor and the monitor are
/// side branches: they implement or serve what others define, and no device names them.
const ALLOWED: &[(&str, &[&str])] = &[
    (ANYWHERE, &[]),
    ("ebbtide-gate", &[]),
    ("ebbtide-iothread", &[]),
    ("ebbtide-memory", &["gate"]),
    ("ebbtide-device", &["gate", "iothread"]),
    ("ebbtide-bus", &["gate", "memory"]),
    ("ebbtide-block", &["gate", "iothread", "memory"]),
    ("ebbtide-net", &[]),
    ("ebbtide-devices", &["gate", "iothread", "memory", "bus"]),
    ("ebbtide-scsi", &[]),
    (
        "ebbtide-virtio",
        &[
            "gate", "iothread", "memory", "bus", "block", "net", "scsi", "devices",
        ],
    ),
    ("ebbtide-hypervisor", &["gate", "memory", "bus"]),
    ("ebbtide-qmp", &["gate", "iothread"]),
    (
        "ebbtide-machine",
        &[
            "gate",
            "iothread",
            "memory",
            "device",
            "bus",
            "block",
            "net",
            "scsi",
            "devices",
            "virtio",
            "hypervisor",
            "qmp",
        ],
    ),
    ("ebbtide", &["machine", "qmp", "hypervisor", "iothread"]),
    (
        "ebbtide-lab-driver",
        &[
            "gate", "iothread", "memory", "device", "bus", "block", "net", "scsi", "devices",
            "virtio",
        ],
    ),
    ("ebbtide-lab", &["agent", "hostile"]),
    ("ebbtide-agent", &[]),
    ("ebbtide-hostile", &[]),
    ("xtask", &["lab"]),
];

/// Checks every crate of the workspace.
///
/// # Errors
/// Names each dependency that points the wrong way, and each crate without a layer.
pub fn run() -> Result<()> {
    let text = build::output(&mut build::cargo(&[
        "metadata",
        "--no-deps",
        "--format-version",
        "1",
    ]))?;
    let metadata: Value = serde_json::from_str(&text)?;
    let wrong = check(&metadata);
    if !wrong.is_empty() {
        bail!("layers:\n  {}", wrong.join("\n  "));
    }
    println!("layers: every dependency points upwards");
    Ok(())
}

fn check(metadata: &Value) -> Vec<String> {
    let empty = Vec::new();
    let packages = metadata["packages"].as_array().unwrap_or(&empty);
    let mut wrong = Vec::new();
    for package in packages {
        let name = package["name"].as_str().unwrap_or_default();
        let Some((_, allowed)) = ALLOWED.iter().find(|(n, _)| *n == name) else {
            wrong.push(format!(
                "{name} has no layer: add it to xtask/src/layers.rs"
            ));
            continue;
        };
        for dependency in package["dependencies"].as_array().unwrap_or(&empty) {
            let to = dependency["name"].as_str().unwrap_or_default();
            let ours = ALLOWED.iter().any(|(n, _)| *n == to);
            // Tests may use anything.
            let dev = dependency["kind"].as_str() == Some("dev");
            let fine = allowed
                .iter()
                .any(|a| to.strip_prefix("ebbtide-") == Some(*a));
            if ours && !dev && !fine && to != ANYWHERE {
                wrong.push(format!("{name} must not depend on {to}"));
            }
        }
    }
    wrong
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn package(name: &str, dependency: &str, kind: Value) -> Value {
        json!({"packages": [{"name": name, "dependencies": [{"name": dependency, "kind": kind}]}]})
    }

    #[test]
    fn upward_is_fine_and_downward_is_named() {
        let null = Value::Null;
        assert!(check(&package("ebbtide-memory", "ebbtide-gate", null.clone())).is_empty());
        assert!(check(&package("ebbtide-memory", "libc", null.clone())).is_empty());
        assert_eq!(
            check(&package("ebbtide-gate", "ebbtide-memory", null.clone())),
            ["ebbtide-gate must not depend on ebbtide-memory"]
        );
        assert!(check(&package("ebbtide-gate", "ebbtide-memory", json!("dev"))).is_empty());
        assert_eq!(check(&package("ebbtide-new", "libc", null)).len(), 1);
    }
}
