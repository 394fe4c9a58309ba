// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Character devices: where serial ports and consoles lead.

use crate::Properties;
use crate::error::QmpError;
use crate::schema::qapi_struct;

qapi_struct! {
    /// What a character device is: `{"type": …, "data": {…}}`.
    pub struct ChardevBackend {
        /// What kind, such as `file` or `socket`.
        kind as "type": String,
        /// The kind's own properties. A socket's `addr` is `{"type": "unix", "data": {"path": …}}`.
        data as "data": Properties,
    }
}

qapi_struct! {
    /// Arguments of `chardev-add`.
    pub struct ChardevAdd {
        /// Its id.
        id as "id": String,
        /// What it is.
        backend as "backend": ChardevBackend,
    }
}

impl ChardevAdd {
    /// From the option `KIND,id=ID,path=PATH,...`: what QMP nests is flat on a command line. A `path` is where a socket
    /// listens or connects, and the `out` of a file.
    ///
    /// # Errors
    /// When the kind or the id is missing or no text.
    pub fn from_option(mut option: Properties) -> Result<Self, QmpError> {
        let kind = option.need_string("backend")?;
        let id = option.need_string("id")?;
        if let Some(path) = option.take_string("path")? {
            match kind.as_str() {
                "socket" => option.set(
                    "addr",
                    serde_json::json!({"type": "unix", "data": {"path": path}}),
                ),
                "file" => option.set("out", path),
                _ => option.set("path", path),
            }
        }
        Ok(Self {
            id,
            backend: ChardevBackend { kind, data: option },
        })
    }
}

qapi_struct! {
    /// The answer to `chardev-add`.
    #[derive(Eq)]
    pub struct ChardevReturn {
        /// The terminal that was opened, for the kind `pty`.
        pty as "pty": Option<String>,
    }
}

qapi_struct! {
    /// Arguments of `chardev-remove`.
    #[derive(Eq)]
    pub struct ChardevRemove {
        /// Its id.
        id as "id": String,
    }
}

qapi_struct! {
    /// Data of `VSERPORT_CHANGE`.
    #[derive(Eq)]
    pub struct VserportChange {
        /// The id of the port of a console device.
        id as "id": String,
        /// Whether the guest has it open now.
        open as "open": bool,
    }
}

qapi_struct! {
    /// One item of `query-chardev`.
    #[derive(Eq)]
    pub struct ChardevInfo {
        /// Its id.
        label as "label": String,
        /// What it is and where it leads, for people.
        filename as "filename": String,
        /// Whether the device it serves is listening.
        frontend_open as "frontend-open": bool,
    }
}
