// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What only views know that readers still use.
#![cfg(not(loom))]

use std::sync::Arc;

use ebbtide_memory::{Gpa, Memory, MemoryConfig, Mmio, Region};

/// Registers whose destructor says so.
struct Loud(std::sync::mpsc::Sender<std::thread::ThreadId>);

impl Mmio for Loud {
    fn read(&self, _: u64, _: u8) -> u64 {
        0
    }
    fn write(&self, _: u64, _: u8, _: u64) {}
}

impl Drop for Loud {
    fn drop(&mut self) {
        let _ = self.0.send(std::thread::current().id());
    }
}

#[test]
fn a_device_known_to_old_views_only_is_dropped_in_the_end() {
    let (sender, dropped) = std::sync::mpsc::channel();
    let memory = Memory::new(MemoryConfig {
        arena_bytes: 1 << 30,
    })
    .unwrap();
    let root = Region::container("root", 0x10000);
    let space = memory.address_space("memory", &root).unwrap();
    let device = Region::mmio("device", 0x1000, Arc::new(Loud(sender)));
    memory.update(|t| t.add(&root, &device, 0, 0)).unwrap();
    let reader = memory.register();
    let guard = space.read(&reader);
    memory.update(|t| t.remove(&device)).unwrap();
    drop(device);
    std::thread::sleep(std::time::Duration::from_millis(30));
    assert!(guard.lookup(Gpa(0)).is_some());
    assert!(dropped.try_recv().is_err());
    drop(guard);
    assert!(
        dropped
            .recv_timeout(std::time::Duration::from_secs(60))
            .is_ok()
    );
}

/// Registers in which an access stays until it is let go on.
struct Slow {
    loud: Loud,
    entered: std::sync::mpsc::SyncSender<()>,
    go_on: std::sync::Mutex<std::sync::mpsc::Receiver<()>>,
}

impl Mmio for Slow {
    fn read(&self, offset: u64, size: u8) -> u64 {
        self.entered.send(()).unwrap();
        self.go_on.lock().unwrap().recv().unwrap();
        self.loud.read(offset, size)
    }
    fn write(&self, _: u64, _: u8, _: u64) {}
}

/// A device goes while a vCPU is in its registers, and the vCPU is the last to come out of them: it must not be the one that
/// drops it, for it may not close files.
#[test]
fn whoever_leaves_registers_last_drops_nothing() {
    let (sender, dropped) = std::sync::mpsc::channel();
    let (entered, inside) = std::sync::mpsc::sync_channel(1);
    let (go_on, held) = std::sync::mpsc::channel();
    let memory = Memory::new(MemoryConfig {
        arena_bytes: 1 << 30,
    })
    .unwrap();
    let root = Region::container("root", 0x10000);
    let space = memory.address_space("memory", &root).unwrap();
    let slow = Slow {
        loud: Loud(sender),
        entered,
        go_on: held.into(),
    };
    let device = Region::mmio("device", 0x1000, Arc::new(slow));
    memory.update(|t| t.add(&root, &device, 0, 0)).unwrap();
    let vcpu = std::thread::spawn(move || {
        let reader = space.memory().register();
        space.load(&reader, 0x10, 4)
    });
    inside.recv().unwrap();
    memory.update(|t| t.remove(&device)).unwrap();
    drop(device);
    memory.synchronize();
    // What old views knew is given up on other threads.
    std::thread::sleep(std::time::Duration::from_millis(100));
    assert!(dropped.try_recv().is_err(), "dropped under an access");
    let id = vcpu.thread().id();
    go_on.send(()).unwrap();
    let by = dropped.recv_timeout(std::time::Duration::from_secs(60));
    assert_ne!(by.expect("it is dropped in the end"), id);
    assert_eq!(vcpu.join().unwrap(), 0);
}
