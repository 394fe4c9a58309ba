// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Objects that devices share: sources of random bytes, iothreads.

use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;

use ebbtide_iothread::{IoThread, Remote, oneshot};
use ebbtide_qmp::types::qom::ObjectAdd;
use ebbtide_qmp::{ErrorClass, Properties, QmpError};
use ebbtide_virtio::rng::{Builtin, File, RngBackend};

use super::Devices;
use super::backends::Released;

/// The types of `object-add` with their properties.
pub(crate) const TYPES: &[(&str, &[(&str, &str)])] = &[
    ("iothread", &[("poll-max-ns", "int")]),
    ("rng-builtin", &[]),
    ("rng-random", &[("filename", "string")]),
];

/// An object.
pub(crate) enum Object {
    /// Random bytes.
    Rng(Arc<RngBackend>),
    /// A thread that serves queues.
    Iothread(Iothread),
}

impl Released for Object {}

/// A thread that serves queues.
pub(crate) struct Iothread {
    thread: IoThread,
    /// The host's number of the thread.
    pub(crate) thread_id: i64,
}

impl Iothread {
    /// Where to start tasks on it.
    pub(crate) fn remote(&self) -> Remote {
        self.thread.remote()
    }
}

/// Makes an object.
///
/// # Errors
/// The type is unknown, a property is wrong, the id is taken, the host refuses; nothing was added.
pub(crate) async fn add(devices: &Devices, args: ObjectAdd) -> Result<(), QmpError> {
    let ObjectAdd {
        qom_type,
        id,
        properties,
    } = args;
    let taken = |_| QmpError::duplicate_object_id(&id);
    let object = match qom_type.as_str() {
        "iothread" => iothread(devices, &id, properties).await?,
        "rng-builtin" => {
            properties.finish()?;
            Object::Rng(RngBackend::new(&id, Builtin))
        }
        "rng-random" => rng_random(devices, &id, properties).await?,
        other => return Err(QmpError::invalid_object_type(other)),
    };
    // Another client may have taken the id meanwhile.
    devices.objects().add(&id, object).map_err(taken)
}

/// Destroys an object that nothing uses.
///
/// # Errors
/// There is none, or it is used.
pub(crate) async fn remove(devices: &Devices, id: &str) -> Result<(), QmpError> {
    if devices.objects().get(id).is_none() {
        return Err(QmpError::object_not_found(id));
    }
    let removed = devices.objects().remove(id);
    let object = removed.map_err(|e| {
        QmpError::new(
            ErrorClass::GenericError,
            format!("{}: {}", QmpError::object_in_use(id).desc, e.desc),
        )
    })?;
    // A thread is waited for, closing a file may block.
    if let Some(object) = Rc::into_inner(object) {
        devices.blocking().run(move || drop(object)).await;
    }
    Ok(())
}

async fn iothread(
    devices: &Devices,
    id: &str,
    mut properties: Properties,
) -> Result<Object, QmpError> {
    let polling = properties.take_uint::<u64>("poll-max-ns")?.unwrap_or(0);
    properties.finish()?;
    if polling != 0 {
        return Err(QmpError::generic(format!(
            "Parameter 'poll-max-ns' does not accept value '{polling}': iothreads do not poll, 0 is accepted"
        )));
    }
    let failed = |e: String| QmpError::generic(format!("iothread '{id}': {e}"));
    let thread = devices
        .confinement()
        .iothread(id)
        .map_err(|e| failed(e.to_string()))?;
    let (tell, told) = oneshot::channel();
    thread
        .remote()
        .spawn(move |_| {
            let number = rustix::thread::gettid().as_raw_nonzero().get();
            // Whoever asked waits for it.
            let _ = tell.send(number);
            std::future::ready(())
        })
        .map_err(|e| failed(e.to_string()))?;
    let thread_id = told
        .await
        .ok_or_else(|| failed("its thread has ended".to_owned()))?;
    Ok(Object::Iothread(Iothread {
        thread,
        thread_id: thread_id.into(),
    }))
}

async fn rng_random(
    devices: &Devices,
    id: &str,
    mut properties: Properties,
) -> Result<Object, QmpError> {
    let path = properties.take_string("filename")?;
    properties.finish()?;
    let path = PathBuf::from(path.unwrap_or_else(|| File::DEFAULT_PATH.to_owned()));
    let opening = path.clone();
    let file = devices
        .opener()
        .open(Some(path), move || File::open(&opening))
        .await
        .map_err(|e| QmpError::generic(format!("object '{id}': {}", e.desc)))?;
    Ok(Object::Rng(RngBackend::new(id, file)))
}
