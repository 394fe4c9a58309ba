// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Memory backends by name: from `object-add` to a RAM block, and back.

use std::path::PathBuf;
use std::rc::Rc;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ebbtide_memory::{Backing, Memory, NumaPolicy, RamBlock, RamPolicy, RamSpec};
use ebbtide_qmp::types::memory::{HostMemPolicy, Memdev};
use ebbtide_qmp::types::qom::ObjectAdd;
use ebbtide_qmp::{Properties, QmpError};

use super::Devices;
use super::backends::Released;
use super::opener::Opener;

/// The types of memory backends.
pub const MEMORY_BACKENDS: &[&str] = &[
    "memory-backend-ram",
    "memory-backend-memfd",
    "memory-backend-file",
];
/// The huge pages there are without being asked for others.
const HUGE_PAGE: u64 = 2 << 20;

/// A memory backend. Its memory is there from the start; a device that has used it takes it along when it goes, and the
/// next one gets new memory.
pub(crate) struct MemoryObject {
    memory: Arc<Memory>,
    qom_type: String,
    spec: RamSpec,
    policy: RamPolicy,
    idle: IdleBlock,
}

/// The memory of a backend that no device has, if there is any now.
#[derive(Clone)]
pub(crate) struct IdleBlock(Arc<Mutex<Option<Arc<RamBlock>>>>);

impl IdleBlock {
    /// The memory, for its user.
    pub(crate) fn take(&self) -> Option<Arc<RamBlock>> {
        self.lock().take()
    }

    /// A user that could not use it gives it back.
    pub(crate) fn put_back(&self, block: Arc<RamBlock>) {
        *self.lock() = Some(block);
    }

    fn lock(&self) -> MutexGuard<'_, Option<Arc<RamBlock>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Released for MemoryObject {}

impl MemoryObject {
    /// Its QOM type.
    pub(crate) fn qom_type(&self) -> &str {
        &self.qom_type
    }

    /// Bytes.
    pub(crate) fn size_bytes(&self) -> u64 {
        self.spec.size_bytes
    }

    /// The memory, for its user.
    pub(crate) async fn block(
        object: &Rc<MemoryObject>,
        opener: Opener<'_>,
    ) -> Result<Arc<RamBlock>, QmpError> {
        if let Some(block) = object.idle.take() {
            return Ok(block);
        }
        allocate(&object.memory, &object.spec, &object.policy, opener).await
    }

    /// A user that could not use it gives it back.
    pub(crate) fn put_back(&self, block: Arc<RamBlock>) {
        self.idle.put_back(block);
    }

    /// Where its memory is while no device has it.
    pub(crate) fn idle(&self) -> IdleBlock {
        self.idle.clone()
    }

    /// As `query-memdev` tells it.
    pub(crate) fn describe(&self, id: &str) -> Memdev {
        let (policy, nodes) = match &self.policy.numa {
            None => (HostMemPolicy::Default, Vec::new()),
            Some(NumaPolicy::Preferred(node)) => (HostMemPolicy::Preferred, vec![*node]),
            Some(NumaPolicy::Bind(nodes)) => (HostMemPolicy::Bind, nodes.clone()),
            Some(NumaPolicy::Interleave(nodes)) => (HostMemPolicy::Interleave, nodes.clone()),
        };
        Memdev {
            id: Some(id.to_owned()),
            size: self.spec.size_bytes,
            merge: self.policy.merge,
            dump: self.policy.dump,
            prealloc: self.spec.prefault,
            share: !matches!(
                self.spec.backing,
                Backing::Anon { .. } | Backing::File { share: false, .. }
            ),
            reserve: None,
            host_nodes: nodes,
            policy,
        }
    }
}

async fn allocate(
    memory: &Arc<Memory>,
    spec: &RamSpec,
    policy: &RamPolicy,
    opener: Opener<'_>,
) -> Result<Arc<RamBlock>, QmpError> {
    let (memory, spec, policy) = (Arc::clone(memory), spec.clone(), policy.clone());
    let path = match &spec.backing {
        Backing::File { path, .. } => Some(path.clone()),
        _ => None,
    };
    opener
        .open(path, move || memory.ram().add_with(spec, &policy))
        .await
}

impl Devices {
    /// Makes a memory backend.
    ///
    /// # Errors
    /// What is wrong with its properties, or why the host can't; nothing was made.
    pub(crate) async fn add_memory_object(&self, args: ObjectAdd) -> Result<(), QmpError> {
        let ObjectAdd {
            qom_type,
            id,
            mut properties,
        } = args;
        let policy = policy(&mut properties)?;
        let spec = spec(&qom_type, &id, &mut properties)?;
        properties.finish()?;
        let memory = self.system().memory();
        let block = allocate(memory, &spec, &policy, self.opener()).await?;
        let object = MemoryObject {
            memory: Arc::clone(memory),
            qom_type,
            spec,
            policy,
            idle: IdleBlock(Arc::new(Mutex::new(Some(block)))),
        };
        self.memory_objects().add(&id, object)
    }

    /// Sees to it that a memory backend which no device has, and which the property `memdev` names, has memory: a device
    /// that had it may have taken that along. What does not exist is for its user to refuse.
    ///
    /// # Errors
    /// A device has it, or the host has no memory.
    pub(crate) async fn back_memory(
        &self,
        properties: &Properties,
        user: &str,
    ) -> Result<(), QmpError> {
        let named = properties.get("memdev").and_then(|name| name.as_str());
        let Some(name) = named.filter(|name| self.memory_objects().get(name).is_some()) else {
            return Ok(());
        };
        let object = self.memory_objects().take(name, user)?;
        let block = MemoryObject::block(object.value(), self.opener()).await?;
        object.value().put_back(block);
        Ok(())
    }

    /// Takes a memory backend away, with its memory.
    ///
    /// # Errors
    /// There is none, or a device uses it.
    pub(crate) async fn remove_memory_object(&self, id: &str) -> Result<(), QmpError> {
        let object = self.memory_objects().remove(id)?;
        let Some(block) = object.idle.take() else {
            return Ok(());
        };
        let memory = Arc::clone(&object.memory);
        let ticket = memory
            .update(|t| t.retire(&block))
            .map_err(|e| QmpError::generic(e.to_string()))?;
        drop(block);
        ticket.drained().await;
        let destroyed = self.blocking().run(move || ticket.destroy()).await;
        destroyed.map_err(|(_, e)| QmpError::generic(e.to_string()))
    }
}

/// Where the memory of an object of this type comes from; takes the properties that say so. `None`: there is no such type.
///
/// # Errors
/// A property of another type, one that is missing, one that the type can't have.
pub fn memory_backing(
    qom_type: &str,
    properties: &mut Properties,
) -> Result<Option<Backing>, QmpError> {
    Ok(Some(match qom_type {
        // What other processes are to see change has to be a file, with or without a name.
        "memory-backend-ram" if properties.take_bool("share")? == Some(true) => {
            Backing::Memfd { thp: true }
        }
        "memory-backend-ram" => Backing::Anon { thp: true },
        "memory-backend-memfd" if properties.take_bool("share")? == Some(false) => {
            return Err(QmpError::property_value(qom_type, "share", "off"));
        }
        "memory-backend-memfd" if properties.take_bool("hugetlb")? == Some(true) => {
            Backing::Hugetlb {
                page_size_bytes: HUGE_PAGE,
            }
        }
        "memory-backend-memfd" => Backing::Memfd { thp: true },
        "memory-backend-file" => Backing::File {
            path: PathBuf::from(properties.need_string("mem-path")?),
            share: properties.take_bool("share")?.unwrap_or(false),
            readonly: false,
        },
        _ => return Ok(None),
    }))
}

fn spec(qom_type: &str, id: &str, properties: &mut Properties) -> Result<RamSpec, QmpError> {
    let size_bytes = properties.need_size("size")?;
    let mut backing = memory_backing(qom_type, properties)?
        .ok_or_else(|| QmpError::invalid_object_type(qom_type))?;
    match &mut backing {
        Backing::Hugetlb { page_size_bytes } => {
            if let Some(bytes) = properties.take_size("hugetlbsize")? {
                *page_size_bytes = bytes;
            }
        }
        Backing::File { readonly, .. } => {
            *readonly = properties.take_bool("readonly")?.unwrap_or(false);
        }
        Backing::Anon { .. } | Backing::Memfd { .. } => {}
    }
    Ok(RamSpec {
        name: id.to_owned(),
        size_bytes,
        max_size_bytes: size_bytes,
        backing,
        prefault: properties.take_bool("prealloc")?.unwrap_or(false),
        block_size_bytes: None,
    })
}

fn policy(properties: &mut Properties) -> Result<RamPolicy, QmpError> {
    let nodes = match properties.take_strings("host-nodes")? {
        None => Vec::new(),
        Some(nodes) => nodes
            .iter()
            .map(|node| node.parse())
            .collect::<Result<Vec<u32>, _>>()
            .map_err(|_| QmpError::invalid_value("host-nodes", &nodes.join(",")))?,
    };
    let numa = match (properties.take_enum::<HostMemPolicy>("policy")?, &*nodes) {
        (None | Some(HostMemPolicy::Default), []) => None,
        (Some(HostMemPolicy::Preferred), [node]) => Some(NumaPolicy::Preferred(*node)),
        (Some(HostMemPolicy::Bind), [_, ..]) => Some(NumaPolicy::Bind(nodes)),
        (Some(HostMemPolicy::Interleave), [_, ..]) => Some(NumaPolicy::Interleave(nodes)),
        (policy, nodes) => {
            return Err(QmpError::generic(format!(
                "policy {} does not go with {} host-nodes",
                policy.map_or("default".to_owned(), |p| p.to_string()),
                nodes.len()
            )));
        }
    };
    Ok(RamPolicy {
        numa,
        merge: properties.take_bool("merge")?.unwrap_or(false),
        dump: properties.take_bool("dump")?.unwrap_or(true),
        prefault_threads: properties
            .take_uint::<u32>("prealloc-threads")?
            .map_or(0, |n| n as usize),
    })
}
