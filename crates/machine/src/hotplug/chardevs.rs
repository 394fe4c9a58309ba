// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Character devices by name: where serial ports that come and go lead. One outlives the ports it serves, one after the
//! other; what a port has sent and its client has not read stays with it.

use std::cell::RefCell;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use ebbtide_devices::chardev::{Chardev, ChardevSpec, Wire};
use ebbtide_iothread::{Local, Task};
use ebbtide_qmp::types::chardev::{ChardevAdd, ChardevBackend, ChardevInfo};
use ebbtide_qmp::{Properties, QmpError};

use super::backends::Released;
use super::{Devices, Use};

/// Where the board's own serial port leads. It is there from the start to the end.
pub(crate) const BOARD_SERIAL: &str = "serial0";
/// How long the last output may take to be written.
const FLUSH: Duration = Duration::from_secs(1);

/// An open character device with the task that serves it.
pub(crate) struct CharNode {
    wire: Arc<Wire>,
    filename: String,
    /// Ends when the wire is closed.
    serving: RefCell<Option<Task<()>>>,
}

impl Released for CharNode {}

impl CharNode {
    /// The device's end of it.
    pub(crate) fn wire(&self) -> &Arc<Wire> {
        &self.wire
    }

    /// Ends it: what was sent is still written, as far as that takes no longer than [`FLUSH`].
    async fn close(&self, name: &str, local: &Local) {
        self.wire.close();
        let serving = self.serving.borrow_mut().take();
        if let Some(serving) = serving
            && local.timeout(FLUSH, serving).await.is_err()
        {
            tracing::warn!("chardev {name}: its last output could not be written");
        }
    }
}

impl Devices {
    /// Opens a character device.
    ///
    /// # Errors
    /// A name that is taken, a kind there is none of, what can't be opened; nothing was added.
    pub(crate) async fn add_chardev(&self, args: ChardevAdd) -> Result<(), QmpError> {
        let ChardevAdd { id, backend } = args;
        super::drivers::check_id(&id)?;
        self.check_chardev_name(&id)?;
        let spec = spec(backend)?;
        let opening = spec.clone();
        let path = match &spec {
            ChardevSpec::File(path) | ChardevSpec::Unix(path) => Some(path.clone()),
            _ => None,
        };
        let chardev = self
            .opener()
            .open(path, move || Chardev::open(&opening))
            .await?;
        // Another client may have taken the name meanwhile.
        self.check_chardev_name(&id)?;
        let wire = Wire::new();
        let serving = chardev.attach(&wire).serve(self.local.clone());
        let node = CharNode {
            wire,
            filename: filename(&spec),
            serving: RefCell::new(Some(self.local.spawn(serving))),
        };
        self.chardevs().add(&id, node)
    }

    fn check_chardev_name(&self, id: &str) -> Result<(), QmpError> {
        if id == BOARD_SERIAL || self.chardevs().get(id).is_some() {
            return Err(QmpError::duplicate_chardev(id));
        }
        Ok(())
    }

    /// Closes a character device that nothing uses.
    ///
    /// # Errors
    /// There is none of this name, or a device uses it.
    pub(crate) async fn remove_chardev(&self, id: &str) -> Result<(), QmpError> {
        if id == BOARD_SERIAL {
            return Err(QmpError::chardev_busy(id));
        }
        if self.chardevs().get(id).is_none() {
            return Err(QmpError::chardev_not_found(id));
        }
        let removed = self.chardevs().remove(id);
        let node = removed.map_err(|_| QmpError::chardev_busy(id))?;
        node.close(id, &self.local).await;
        Ok(())
    }

    /// Gives a character device to the device `user`, whose property `chardev` of model `driver` names it.
    ///
    /// # Errors
    /// There is none of this name, or another device has it.
    pub(crate) fn take_chardev(
        &self,
        driver: &str,
        id: &str,
        user: &str,
    ) -> Result<Use<CharNode>, QmpError> {
        if self.chardevs().get(id).is_none() {
            return Err(QmpError::no_such_backend(driver, "chardev", id));
        }
        let taken = self.chardevs().take(id, user);
        taken.map_err(|refused| {
            QmpError::generic(format!(
                "Property '{driver}.chardev' can't take value '{id}': {}",
                refused.desc
            ))
        })
    }

    /// As `query-chardev` tells them; that of the board's port, which leads to `board`, is the first.
    pub(crate) fn chardev_infos(&self, board: &ChardevSpec) -> Vec<ChardevInfo> {
        let board = ChardevInfo {
            label: BOARD_SERIAL.to_owned(),
            filename: filename(board),
            frontend_open: true,
        };
        let info = |(label, node, user): (String, Rc<CharNode>, Option<String>)| ChardevInfo {
            label,
            filename: node.filename.clone(),
            frontend_open: user.is_some(),
        };
        let others = self.chardevs().list().into_iter().map(info);
        std::iter::once(board).chain(others).collect()
    }

    /// The end of all character devices, with the machine: what was sent is still written. Their devices do nothing any
    /// more.
    pub(crate) async fn flush_chardevs(&self) {
        let nodes = self.chardevs().list();
        // All at once: what one of them takes is not added to another's.
        nodes.iter().for_each(|(_, node, _)| node.wire.close());
        for (name, node, _) in nodes {
            node.close(&name, &self.local).await;
        }
    }
}

/// What is to be opened.
fn spec(backend: ChardevBackend) -> Result<ChardevSpec, QmpError> {
    let ChardevBackend { kind, mut data } = backend;
    let spec = match kind.as_str() {
        "null" => ChardevSpec::Off,
        "file" => ChardevSpec::File(PathBuf::from(data.need_string("out")?)),
        "socket" => socket(&mut data)?,
        "stdio" => {
            return Err(QmpError::generic(
                "chardev type 'stdio' is not supported: the terminal is for the board's own port (--serial stdio)",
            ));
        }
        other => {
            return Err(QmpError::generic(format!(
                "chardev type '{other}' is not supported: null, file and socket are"
            )));
        }
    };
    data.finish()?;
    Ok(spec)
}

/// A Unix socket that is listened on.
fn socket(data: &mut Properties) -> Result<ChardevSpec, QmpError> {
    let mut address = data
        .take_object("addr")?
        .ok_or_else(|| data.missing("addr"))?;
    let kind = address.need_string("type")?;
    if kind != "unix" {
        return Err(QmpError::generic(format!(
            "sockets of type '{kind}' are not supported: unix ones are"
        )));
    }
    let mut place = address
        .take_object("data")?
        .ok_or_else(|| address.missing("data"))?;
    let path = place.need_string("path")?;
    place.finish()?;
    address.finish()?;
    if data.take_bool("server")? == Some(false) {
        return Err(QmpError::generic(
            "'server=off' is not supported: a socket is listened on, its client connects",
        ));
    }
    if data.take_bool("wait")? == Some(true) {
        return Err(QmpError::generic(
            "'wait=on' is not supported: nothing waits for a client",
        ));
    }
    Ok(ChardevSpec::Unix(PathBuf::from(path)))
}

/// As people read it.
fn filename(spec: &ChardevSpec) -> String {
    match spec {
        ChardevSpec::Off => "null".to_owned(),
        ChardevSpec::Stdio => "stdio".to_owned(),
        ChardevSpec::File(path) => format!("file:{}", path.display()),
        ChardevSpec::Unix(path) => format!("unix:{},server=on", path.display()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(option: &str) -> Result<ChardevSpec, String> {
        let option = Properties::parse(option, "backend").unwrap();
        let add = ChardevAdd::from_option(option).unwrap();
        spec(add.backend).map_err(|e| e.desc)
    }

    #[test]
    fn kinds_are_read_and_others_refused_by_name() {
        assert_eq!(of("null,id=a"), Ok(ChardevSpec::Off));
        assert_eq!(of("file,id=a,path=/x"), Ok(ChardevSpec::File("/x".into())));
        let unix = Ok(ChardevSpec::Unix("/s".into()));
        assert_eq!(of("socket,id=a,path=/s"), unix);
        assert_eq!(of("socket,id=a,path=/s,server=on,wait=off"), unix);
        for (option, part) in [
            ("pty,id=a", "'pty' is not supported"),
            ("stdio,id=a", "--serial stdio"),
            ("null,id=a,mux=on", "mux"),
            ("file,id=a", "out"),
            ("file,id=a,path=/x,append=on", "append"),
            ("socket,id=a", "addr"),
            ("socket,id=a,path=/s,server=off", "server=off"),
            ("socket,id=a,path=/s,wait=on", "wait=on"),
        ] {
            let refused = of(option).unwrap_err();
            assert!(refused.contains(part), "{option}: {refused}");
        }
    }

    #[test]
    fn sockets_of_other_families_are_refused() {
        let json = serde_json::json!({"type": "socket", "data":
            {"addr": {"type": "inet", "data": {"host": "h", "port": "1"}}}});
        let backend: ChardevBackend = serde_json::from_value(json).unwrap();
        assert!(spec(backend).unwrap_err().desc.contains("'inet'"));
    }
}
