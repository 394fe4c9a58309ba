// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Management beside a hostile guest: devices come and go, and each that goes had to be allowed to.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use ebbtide_hostile::Random;
use serde_json::{Value, json};

use crate::qmp::QmpError;
use crate::stalls::Stalls;
use crate::vmm::Vmm;

/// In which every command is answered, whatever the guest does, also where its processors are emulated on one core.
const ANSWER: Duration = Duration::from_secs(10);
/// How long all devices may take to go, by force.
const CLEARED: Duration = Duration::from_secs(60);
/// Between two steps.
const PAUSE: Duration = Duration::from_millis(10);
/// Places for devices.
const DEVICES: usize = 16;
const DIMM: u64 = 128 << 20;

/// Questions asked at any time.
const QUESTIONS: &[&str] = &[
    "query-status",
    "query-block",
    "query-pci",
    "query-memory-devices",
    "query-named-block-nodes",
    "query-chardev",
    "query-acpi-ospm-status",
    "x-ebbtide-query-removals",
    "x-ebbtide-query-memory",
];
const LINES: &[&str] = &["info qtree", "info mtree -f", "info ramblock", "info pci"];
const POLICIES: [&str; 3] = ["on", "off", "requested"];
const BUSES: [&str; 6] = ["pcie.0", "pcie.0", "rp1", "rp2", "down0", "down1"];

/// A model with its backend.
struct Kind {
    driver: &'static str,
    /// What its bus belongs to, for one that is not in a slot.
    below: Option<&'static str>,
    more: fn(&str) -> Value,
    /// How its backend is made and removed, if it has one.
    backend: Option<Backend>,
}

struct Backend {
    add: &'static str,
    arguments: fn(&str) -> Value,
    del: &'static str,
    key: &'static str,
}

const NODE: fn(&str) -> Value =
    |id| json!({"driver": "null-co", "node-name": id, "size": 64 << 20, "latency-ns": 20_000_000});
const SLOW_NODE: fn(&str) -> Value =
    |id| json!({"driver": "null-co", "node-name": id, "size": 64 << 20, "latency-ns": 400_000_000});

const fn node(arguments: fn(&str) -> Value) -> Option<Backend> {
    Some(Backend {
        add: "blockdev-add",
        arguments,
        del: "blockdev-del",
        key: "node-name",
    })
}

const fn memory(arguments: fn(&str) -> Value) -> Option<Backend> {
    Some(Backend {
        add: "object-add",
        arguments,
        del: "object-del",
        key: "id",
    })
}

const fn chardev() -> Option<Backend> {
    Some(Backend {
        add: "chardev-add",
        arguments: |id| json!({"id": id, "backend": {"type": "null", "data": {}}}),
        del: "chardev-remove",
        key: "id",
    })
}

const KINDS: &[Kind] = &[
    Kind {
        driver: "virtio-blk-pci",
        below: None,
        more: |backend| json!({"drive": backend}),
        backend: node(NODE),
    },
    Kind {
        driver: "virtio-blk-pci",
        below: None,
        more: |backend| json!({"drive": backend, "num-queues": 2}),
        backend: node(SLOW_NODE),
    },
    Kind {
        driver: "virtio-scsi-pci",
        below: None,
        more: |_| json!({}),
        backend: None,
    },
    Kind {
        driver: "scsi-hd",
        below: Some("virtio-scsi-pci"),
        more: |backend| json!({"drive": backend}),
        backend: node(NODE),
    },
    Kind {
        driver: "virtio-serial-pci",
        below: None,
        more: |_| json!({}),
        backend: None,
    },
    Kind {
        driver: "virtio-rng-pci",
        below: None,
        more: |_| json!({}),
        backend: None,
    },
    Kind {
        driver: "virtio-balloon-pci",
        below: None,
        more: |_| json!({}),
        backend: None,
    },
    Kind {
        driver: "virtconsole",
        below: Some("virtio-serial-pci"),
        more: |backend| json!({"chardev": backend}),
        backend: chardev(),
    },
    Kind {
        driver: "pci-serial",
        below: None,
        more: |backend| json!({"chardev": backend}),
        backend: chardev(),
    },
    Kind {
        driver: "i6300esb",
        below: None,
        more: |_| json!({}),
        backend: None,
    },
    Kind {
        driver: "pci-testdev",
        below: None,
        more: |_| json!({"membar": "64K"}),
        backend: None,
    },
    Kind {
        driver: "pcie-root-port",
        below: None,
        more: |_| json!({}),
        backend: None,
    },
    Kind {
        driver: "ivshmem-plain",
        below: None,
        more: |backend| json!({"memdev": backend}),
        backend: memory(
            |id| json!({"qom-type": "memory-backend-memfd", "id": id, "size": 1 << 20, "share": true}),
        ),
    },
    Kind {
        driver: "pc-dimm",
        below: None,
        more: |backend| json!({"memdev": backend}),
        backend: memory(|id| json!({"qom-type": "memory-backend-ram", "id": id, "size": DIMM})),
    },
];

/// A device that is there.
struct Live {
    driver: &'static str,
    bus: String,
    /// The guest may eject it.
    ejectable: bool,
    /// Its removal was asked for.
    asked: bool,
}

/// What is known of the machine from outside.
pub struct Management {
    random: Random,
    live: BTreeMap<String, Live>,
    /// Backends, each with how it is removed.
    backends: BTreeMap<String, (&'static str, &'static str)>,
    /// Ids are not used again at once, to tell late news from new devices.
    next: u64,
    asked: u64,
    refused: u64,
    gone: u64,
    slowest: (String, Duration),
    longest_exit: Duration,
    stalls: Stalls,
}

impl Management {
    pub fn new(random: Random) -> Management {
        Management {
            random,
            live: BTreeMap::new(),
            backends: BTreeMap::new(),
            next: 0,
            asked: 0,
            refused: 0,
            gone: 0,
            slowest: (String::new(), Duration::ZERO),
            longest_exit: Duration::ZERO,
            stalls: Stalls::watch(),
        }
    }

    /// Asks; the inner error is a refusal. An answer that takes too long is an error.
    pub fn ask(
        &mut self,
        vmm: &mut Vmm,
        command: &str,
        arguments: Value,
    ) -> Result<Result<Value, QmpError>> {
        let shown = format!("{command} {arguments}");
        let (begun, stood) = (Instant::now(), self.stalls.so_far());
        let answer = vmm.qmp().execute(command, arguments);
        let stood = self.stalls.so_far().saturating_sub(stood);
        let took = begun.elapsed().saturating_sub(stood);
        self.asked += 1;
        if took > self.slowest.1 {
            self.slowest = (command.to_owned(), took);
        }
        ensure!(took < ANSWER, "{shown} was answered after {took:.2?}");
        let answer = match answer {
            Ok(answer) => Ok(answer),
            Err(error) => Err(error.downcast::<QmpError>().context(shown)?),
        };
        self.refused += u64::from(answer.is_err());
        self.hear(vmm)?;
        Ok(answer)
    }

    /// Takes note of what has gone, and that it was allowed to.
    fn hear(&mut self, vmm: &mut Vmm) -> Result<()> {
        for event in vmm.qmp().take_events()? {
            ensure!(event.name != "SHUTDOWN", "it ends: {}", event.data);
            if event.name == "DEVICE_DELETED" {
                let id = event.data["device"].as_str().unwrap_or_default();
                ensure!(self.may_go(id), "{id} has gone, and nobody asked for that");
                self.live.remove(id);
                self.gone += 1;
            }
        }
        Ok(())
    }

    fn may_go(&self, id: &str) -> bool {
        let Some(device) = self.live.get(id) else {
            return false;
        };
        // The bus of an adapter is its id with a number.
        let above = device.bus.strip_suffix(".0").unwrap_or(&device.bus);
        device.ejectable || device.asked || self.may_go(above)
    }

    /// One device of each kind; the guest stands still.
    pub fn furnish(&mut self, vmm: &mut Vmm) -> Result<()> {
        for kind in KINDS {
            self.add(vmm, kind)?.context(kind.driver)?;
        }
        Ok(())
    }

    fn add(&mut self, vmm: &mut Vmm, kind: &Kind) -> Result<Result<(), QmpError>> {
        let id = format!("d{}", self.next);
        let backend = format!("b{}", self.next);
        self.next += 1;
        if let Some(Backend {
            add,
            arguments,
            del,
            key,
        }) = kind.backend
        {
            if let Err(refusal) = self.ask(vmm, add, arguments(&backend))? {
                return Ok(Err(refusal));
            }
            self.backends.insert(backend.clone(), (del, key));
        }
        let Some(device) = self.describe(kind, &id, &backend) else {
            return self.drop_backend(vmm, &backend).map(Ok);
        };
        let (bus, policy) = (text(&device["bus"]), text(&device["guest-eject"]));
        let live = Live {
            driver: kind.driver,
            bus,
            ejectable: policy == "on",
            asked: false,
        };
        // The guest may have ejected it before the answer is here.
        self.live.insert(id.clone(), live);
        if let Err(refusal) = self.ask(vmm, "device_add", device)? {
            let never_was = self.live.remove(&id).is_some();
            ensure!(never_was, "{id} was refused, and has gone: {refusal}");
            self.drop_backend(vmm, &backend)?;
            return Ok(Err(refusal));
        }
        Ok(Ok(()))
    }

    /// What `device_add` is given; None when there is no adapter for it.
    fn describe(&mut self, kind: &Kind, id: &str, backend: &str) -> Option<Value> {
        let mut device = (kind.more)(backend);
        device["driver"] = json!(kind.driver);
        device["id"] = json!(id);
        if let Some(adapter) = kind.below {
            let (above, _) = self.live.iter().find(|(_, live)| live.driver == adapter)?;
            device["bus"] = json!(format!("{above}.0"));
            return Some(device);
        }
        device["guest-eject"] = json!(self.random.of(&POLICIES));
        if kind.driver != "pc-dimm" {
            // I/O ports and room for what comes behind are on bus 0 only.
            let root = ["pci-serial", "pcie-root-port"].contains(&kind.driver);
            let bus = if root { "pcie.0" } else { self.free_bus() };
            device["bus"] = json!(bus);
        }
        Some(device)
    }

    /// A bus that has a place for one more: behind a port there is one.
    fn free_bus(&mut self) -> &'static str {
        let bus = self.random.of(&BUSES);
        match self.live.values().any(|live| live.bus == bus) {
            true => "pcie.0",
            false => bus,
        }
    }

    fn drop_backend(&mut self, vmm: &mut Vmm, id: &str) -> Result<()> {
        if let Some((del, key)) = self.backends.remove(id) {
            let mut arguments = json!({});
            arguments[key] = json!(id);
            self.ask(vmm, del, arguments)??;
        }
        Ok(())
    }

    /// One thing at random.
    pub fn step(&mut self, vmm: &mut Vmm) -> Result<()> {
        match self.random.below(32) {
            0..=7 => {
                let kind = self.random.below(KINDS.len() as u64) as usize;
                if self.live.len() < DEVICES
                    && let Some(kind) = KINDS.get(kind)
                {
                    // There may be no place, or something of it is still on its way out.
                    let _ = self.add(vmm, kind)?;
                }
            }
            8..=13 => self.about_one(vmm, "device_del", Some(true))?,
            14 => self.about_one(vmm, "x-ebbtide-device-force", Some(true))?,
            15 | 16 => self.about_one(vmm, "x-ebbtide-device-cancel", Some(false))?,
            17..=24 => {
                let question = self.random.of(QUESTIONS);
                self.ask(vmm, question, Value::Null)??;
            }
            25..=27 => {
                let line = json!({"command-line": self.random.of(LINES)});
                self.ask(vmm, "human-monitor-command", line)??;
            }
            28 => {
                self.ask(vmm, "stop", Value::Null)??;
                self.go_on(vmm)?;
            }
            29 => self.resize(vmm)?,
            30 => self.drop_unused(vmm)?,
            _ if self.random.once_in(8) => {
                self.ask(vmm, "system_reset", Value::Null)??;
            }
            _ => {}
        }
        std::thread::sleep(PAUSE);
        self.hear(vmm)
    }

    fn about_one(&mut self, vmm: &mut Vmm, command: &str, asked: Option<bool>) -> Result<()> {
        let index = self.random.below(self.live.len() as u64) as usize;
        let Some(id) = self.live.keys().nth(index).cloned() else {
            return Ok(());
        };
        self.about(vmm, command, &id, asked)
    }

    /// A command about one device, which is asked to go from then on, or is not.
    fn about(&mut self, vmm: &mut Vmm, command: &str, id: &str, asked: Option<bool>) -> Result<()> {
        // It may go before the answer is here.
        let before = self.live.get(id).is_some_and(|live| live.asked);
        self.set_asked(id, asked.unwrap_or(before) || before);
        let answer = self.ask(vmm, command, json!({"id": id}))?;
        self.set_asked(
            id,
            if answer.is_ok() {
                asked.unwrap_or(before)
            } else {
                before
            },
        );
        Ok(())
    }

    fn set_asked(&mut self, id: &str, asked: bool) {
        if let Some(live) = self.live.get_mut(id) {
            live.asked = asked;
        }
    }

    fn resize(&mut self, vmm: &mut Vmm) -> Result<()> {
        let blocks = self.random.below(65);
        let arguments = json!({"path": "/machine/peripheral/vmem0", "property": "requested-size", "value": blocks << 21});
        self.ask(vmm, "qom-set", arguments)??;
        Ok(())
    }

    /// Tries to remove backends, whoever uses them.
    fn drop_unused(&mut self, vmm: &mut Vmm) -> Result<()> {
        let ids: Vec<String> = self.backends.keys().cloned().collect();
        for id in ids {
            let Some((del, key)) = self.backends.get(&id).copied() else {
                continue;
            };
            let mut arguments = json!({});
            arguments[key] = json!(id);
            if self.ask(vmm, del, arguments)?.is_ok() {
                self.backends.remove(&id);
            }
        }
        Ok(())
    }

    /// Whether the guest has been stopped by what it did.
    pub fn is_standing(&mut self, vmm: &mut Vmm) -> Result<bool> {
        let status = self.ask(vmm, "query-status", Value::Null)??;
        Ok(status["running"] != json!(true))
    }

    /// Lets the guest go on; what it did may need a reset first.
    pub fn go_on(&mut self, vmm: &mut Vmm) -> Result<()> {
        // Refused: it is to be reset, which the next look at it does.
        let _ = self.ask(vmm, "cont", Value::Null)?;
        Ok(())
    }

    /// Stops the guest and puts the machine to power-on.
    pub fn stand_still(&mut self, vmm: &mut Vmm) -> Result<()> {
        let begun = Instant::now();
        loop {
            self.ask(vmm, "stop", Value::Null)??;
            let status = self.ask(vmm, "query-status", Value::Null)??;
            if status["status"] == json!("paused") {
                break;
            }
            // What the guest did stopped it in a way that only a reset ends.
            ensure!(begun.elapsed() < CLEARED, "it does not pause: {status}");
            self.ask(vmm, "system_reset", Value::Null)??;
            std::thread::sleep(PAUSE);
        }
        let resize =
            json!({"path": "/machine/peripheral/vmem0", "property": "requested-size", "value": 0});
        self.ask(vmm, "qom-set", resize)??;
        self.ask(vmm, "system_reset", Value::Null)??;
        Ok(())
    }

    /// No access of the guest's has kept its processor for long.
    pub fn check_stays(&mut self, vmm: &mut Vmm) -> Result<()> {
        let stays = self.ask(vmm, "x-ebbtide-query-vcpus", Value::Null)??;
        let stays = stays.as_array().context("x-ebbtide-query-vcpus")?;
        for stay in stays {
            let longest = stay["longest-exit-us"]
                .as_u64()
                .context("longest-exit-us")?;
            let longest = Duration::from_micros(longest);
            self.stalls
                .within(ANSWER, longest, &format!("an exit, {stay},"))?;
            self.longest_exit = self.longest_exit.max(longest);
        }
        Ok(())
    }

    /// Takes everything away.
    pub fn clear(&mut self, vmm: &mut Vmm) -> Result<()> {
        let begun = Instant::now();
        while !self.live.is_empty() {
            let ids: Vec<String> = self.live.keys().cloned().collect();
            ensure!(
                begun.elapsed() < CLEARED,
                "{ids:?} do not go: {}",
                removals(vmm)?
            );
            for id in ids {
                self.about(vmm, "device_del", &id, Some(true))?;
                self.about(vmm, "x-ebbtide-device-force", &id, Some(true))?;
            }
            std::thread::sleep(PAUSE);
            self.hear(vmm)?;
        }
        let backends: BTreeSet<String> = self.backends.keys().cloned().collect();
        for id in backends {
            self.drop_backend(vmm, &id)?;
        }
        Ok(())
    }
}

impl fmt::Display for Management {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (command, took) = &self.slowest;
        write!(
            f,
            "{} commands, {} of them refused, the slowest {command} in {took:.1?}; the longest exit {:.1?}; {} devices went",
            self.asked, self.refused, self.longest_exit, self.gone
        )
    }
}

fn removals(vmm: &mut Vmm) -> Result<Value> {
    vmm.qmp().execute("x-ebbtide-query-removals", Value::Null)
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}
