// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Standard input and output as a device sees them: sends back what is typed, until `q` or Ctrl-C; `p` panics, `a` aborts.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use ebbtide_devices::chardev::{Chardev, ChardevSpec, Wire};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let interrupted = Arc::new(AtomicBool::new(false));
    signal_hook::flag::register(signal_hook::consts::SIGINT, Arc::clone(&interrupted))?;
    let wire = Wire::new();
    let attached = Chardev::open(&ChardevSpec::Stdio)?.attach(&wire);
    wire.put(b"ready\n");
    ebbtide_iothread::run("stdio-echo", |local| async move {
        let served = local.spawn(attached.serve(local.clone()));
        while !interrupted.load(Ordering::SeqCst) {
            let mut bytes = [0; 64];
            let count = wire.get(&mut bytes);
            wire.put(&bytes[..count]);
            match bytes[..count].first() {
                Some(b'q') => break,
                Some(b'p') => panic!("asked to"),
                Some(b'a') => std::process::abort(),
                _ => local.sleep(Duration::from_millis(5)).await,
            }
        }
        wire.put(b"bye\n");
        wire.close();
        served.await;
    })?;
    Ok(())
}
