// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A QMP server without a virtual machine, to try clients on:
//!
//! ```text
//! cargo run -p ebbtide-qmp --example toy_server -- unix:/tmp/toy.qmp
//! ebbtide ctl --qmp /tmp/toy.qmp resize 4G --wait
//! ```
//! It ends with `quit`.

#![allow(missing_docs, dead_code)]

#[path = "../tests/toy/mod.rs"]
mod toy;

use std::rc::Rc;
use std::time::Duration;

use ebbtide_qmp::{EventSink, Server, SocketSpec};
use toy::{Toy, ToyConfig, ToyDevice};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let spec: SocketSpec = arguments
        .next()
        .ok_or("usage: toy_server unix:PATH [PACE-BYTES [FOLLOWS-UP-TO]]")?
        .parse()?;
    let mut config = ToyConfig::default();
    if let Some(pace) = arguments.next() {
        config.step_bytes = ebbtide_qmp::sizes::parse(&pace)?;
    }
    if let Some(limit) = arguments.next() {
        let follows_up_to = ebbtide_qmp::sizes::parse(&limit)?;
        config.devices = vec![ToyDevice {
            id: "vmem0".into(),
            max_bytes: 7680 << 20,
            follows_up_to,
        }];
    }
    ebbtide_iothread::run("control", |local| async move {
        let events = EventSink::new(&local);
        let toy = Toy::start(&local, events.clone(), config);
        let server = Server::new(&local, Rc::new(toy::commands(Rc::clone(&toy))), events);
        server.listen(&spec)?;
        println!("listening on {spec}");
        while toy.quit.borrow().is_none() {
            local.sleep(Duration::from_millis(20)).await;
        }
        server.close(Duration::from_secs(2)).await;
        Ok::<(), ebbtide_qmp::Error>(())
    })??;
    Ok(())
}
