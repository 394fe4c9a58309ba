// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A connection as raw as a test wants it: bytes out, lines in.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use serde_json::Value;

/// How long a test waits for what must come.
pub const PATIENCE: Duration = Duration::from_secs(60);

pub struct Wire {
    pub socket: UnixStream,
    lines: BufReader<UnixStream>,
}

impl Wire {
    /// Connects and reads the greeting.
    pub fn connect(path: &Path) -> (Wire, Value) {
        let socket = UnixStream::connect(path).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        socket.set_write_timeout(Some(PATIENCE)).unwrap();
        let lines = BufReader::new(socket.try_clone().unwrap());
        let mut wire = Wire { socket, lines };
        let greeting = wire.line();
        (wire, greeting)
    }

    /// Connects and negotiates.
    pub fn negotiated(path: &Path) -> Wire {
        let (mut wire, _) = Wire::connect(path);
        assert_eq!(
            wire.ask(r#"{"execute": "qmp_capabilities"}"#),
            serde_json::json!({"return": {}})
        );
        wire
    }

    pub fn send(&mut self, bytes: impl AsRef<[u8]>) {
        self.socket.write_all(bytes.as_ref()).unwrap();
    }

    /// One message.
    pub fn line(&mut self) -> Value {
        let mut line = String::new();
        self.lines.read_line(&mut line).expect("a line in time");
        assert!(line.ends_with("\r\n"), "{line:?}");
        // serde_json's own depth limit is lower than QMP's.
        ebbtide_qmp::json::parse_one(&line).unwrap()
    }

    pub fn ask(&mut self, bytes: impl AsRef<[u8]>) -> Value {
        self.send(bytes);
        self.line()
    }

    /// The description of an error answer.
    pub fn refused(&mut self, bytes: impl AsRef<[u8]>) -> String {
        let answer = self.ask(bytes);
        assert!(answer.get("return").is_none(), "{answer}");
        answer["error"]["desc"].as_str().unwrap().to_owned()
    }

    /// Checks that the server still understands this connection, and that nothing else was on its way.
    pub fn assert_usable(&mut self) {
        assert_eq!(
            self.ask(r#"{"execute": "x-toy-sleep", "arguments": {"value": 0}, "id": "usable"}"#)["id"],
            "usable"
        );
    }

    /// Reads to the end of the connection.
    pub fn rest(mut self) -> Vec<u8> {
        let mut rest = Vec::new();
        // A reset is an end too.
        let _ = self.lines.read_to_end(&mut rest);
        rest
    }
}
