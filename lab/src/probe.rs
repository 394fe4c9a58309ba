// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Chooses where VMMs run: on this machine's own KVM or in the capsule.

use std::env;
use std::fmt;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::capsule;

/// Overrides the choice: `host` or `capsule`.
pub const VARIABLE: &str = "EBBTIDE_KVM";

/// Where a KVM is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// This machine's own (or, inside a capsule, the capsule's).
    Host,
    /// In a capsule.
    Capsule,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Place::Host => "host",
            Place::Capsule => "capsule",
        })
    }
}

/// The choice and why it was made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Choice {
    /// Where.
    pub place: Place,
    /// One line for people.
    pub reason: String,
}

/// Chooses. `ebbtide` is the binary whose `doctor` tries the KVM out: opening
/// `/dev/kvm` proves nothing. Without one the capsule is the safe choice.
///
/// # Errors
/// The override is neither `host` nor `capsule`; the binary can't be run.
pub fn choose(ebbtide: Option<&Path>) -> Result<Choice> {
    let choice = |place, reason: String| Ok(Choice { place, reason });
    match env::var(VARIABLE).as_deref() {
        Ok("host") => return choice(Place::Host, format!("{VARIABLE}=host")),
        Ok("capsule") => return choice(Place::Capsule, format!("{VARIABLE}=capsule")),
        Ok("") | Err(_) => {}
        Ok(other) => bail!("{VARIABLE}={other:?}: either host or capsule"),
    }
    if capsule::is_inside() {
        return choice(Place::Host, "this is the capsule".to_owned());
    }
    if !Path::new("/dev/kvm").exists() {
        return choice(Place::Capsule, "this machine has no /dev/kvm".to_owned());
    }
    match ebbtide {
        None => choice(
            Place::Capsule,
            "this machine's KVM was not tried out".to_owned(),
        ),
        Some(ebbtide) => ask_doctor(ebbtide),
    }
}

fn ask_doctor(ebbtide: &Path) -> Result<Choice> {
    doctor(ebbtide, read_doctor)
}

/// Why this machine's own KVM can't run even a guest that is its own kernel, if it can't; `ebbtide` tries it out.
///
/// # Errors
/// The binary can't be run.
pub fn refuses_flat_guests(ebbtide: &Path) -> Result<Option<String>> {
    if env::var(VARIABLE).as_deref() == Ok("capsule") {
        return Ok(Some(format!("{VARIABLE}=capsule")));
    }
    doctor(ebbtide, read_flat)
}

/// What `read` makes of the doctor's report.
fn doctor<T>(ebbtide: &Path, read: fn(&[u8]) -> Result<T>) -> Result<T> {
    let mut command = Command::new(ebbtide);
    let output = command
        .args(["doctor", "--json"])
        .output()
        .with_context(|| format!("run {}", ebbtide.display()))?;
    // The exit code is for people: what counts is the field.
    read(&output.stdout).with_context(|| {
        format!(
            "{} doctor --json: {}",
            ebbtide.display(),
            String::from_utf8_lossy(&output.stderr).trim()
        )
    })
}

/// The doctor's own guest is a flat one: its speed is known if it ran.
fn read_flat(json: &[u8]) -> Result<Option<String>> {
    let report: Value = serde_json::from_slice(json).context("not JSON")?;
    let kvm = report.get("kvm").context("no field kvm")?;
    if kvm.get("guest_ns_per_loop").is_some_and(Value::is_number) {
        return Ok(None);
    }
    let reason = kvm.get("reason").and_then(Value::as_str);
    Ok(Some(reason.unwrap_or("no reason given").to_owned()))
}

fn read_doctor(json: &[u8]) -> Result<Choice> {
    let report: Value = serde_json::from_slice(json).context("not JSON")?;
    let can = report
        .pointer("/kvm/can_run_guest")
        .and_then(Value::as_bool)
        .context("no field kvm.can_run_guest")?;
    let reason = report
        .pointer("/kvm/reason")
        .and_then(Value::as_str)
        .unwrap_or("no reason given");
    Ok(match can {
        true => Choice {
            place: Place::Host,
            reason: "this machine's KVM has run a guest".to_owned(),
        },
        false => Choice {
            place: Place::Capsule,
            reason: reason.to_owned(),
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_doctors_word_decides() {
        let choice =
            read_doctor(br#"{"kvm":{"can_run_guest":false,"reason":"a PVM host"}}"#).unwrap();
        assert_eq!(
            (choice.place, choice.reason.as_str()),
            (Place::Capsule, "a PVM host")
        );
        assert_eq!(
            read_doctor(br#"{"kvm":{"can_run_guest":true}}"#)
                .unwrap()
                .place,
            Place::Host
        );
        let emulates =
            br#"{"kvm":{"can_run_guest":false,"guest_ns_per_loop":1270.0,"reason":"slow"}}"#;
        assert_eq!(read_flat(emulates).unwrap(), None);
        let absent = br#"{"kvm":{"guest_ns_per_loop":null,"reason":"no /dev/kvm"}}"#;
        assert_eq!(read_flat(absent).unwrap().unwrap(), "no /dev/kvm");
        assert!(read_flat(b"{}").is_err());
        assert!(read_doctor(b"{}").is_err());
        assert!(read_doctor(b"ebbtide: unknown command").is_err());
    }
}
