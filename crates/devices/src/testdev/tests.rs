// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The device as kvm-unit-tests uses it, without and with ioeventfds that work.

use std::sync::Mutex;
use std::time::{Duration, Instant};

use ebbtide_bus::pci::{HostBridge, Windows};
use ebbtide_memory::{
    AddressSpace, FlatIoeventfd, FlatSection, Listener, ListenerError, MemoryConfig,
};

use super::*;

/// A hypervisor's table of ioeventfds.
#[derive(Clone, Default)]
struct Table(Arc<Mutex<Vec<FlatIoeventfd>>>);

impl Listener for Table {
    fn region_add(&mut self, _section: &FlatSection) -> Result<(), ListenerError> {
        Ok(())
    }
    fn region_del(&mut self, _section: &FlatSection) {}
    fn ioeventfd_add(&mut self, ioeventfd: &FlatIoeventfd) -> Result<(), ListenerError> {
        self.0.lock().unwrap().push(ioeventfd.clone());
        Ok(())
    }
    fn ioeventfd_del(&mut self, gone: &FlatIoeventfd) {
        let mut table = self.0.lock().unwrap();
        let at = table
            .iter()
            .position(|it| (it.addr, it.datamatch) == (gone.addr, gone.datamatch));
        table.remove(at.unwrap());
    }
}

struct Rig {
    memory: Arc<Memory>,
    space: Arc<AddressSpace>,
    host: Arc<HostBridge>,
    device: Arc<TestDevice>,
    table: Table,
    /// Whether the table is looked at before the registers are.
    kvm: bool,
}

fn rig(kvm: bool) -> Rig {
    let memory = Memory::new(MemoryConfig {
        arena_bytes: 1 << 20,
    })
    .unwrap();
    let windows = Windows {
        mmio32: 0xc000_0000..0xe000_0000,
        mmio64: 1 << 36..1 << 37,
        io: 0xc000..0x1_0000,
    };
    let host = HostBridge::new(&memory, windows).unwrap();
    let space = memory.address_space("memory", host.container()).unwrap();
    let table = Table::default();
    space.add_listener(Box::new(table.clone()), 0).unwrap();
    let device = TestDevice::new("test0", &memory, Some(1 << 30)).unwrap();
    host.attach(Some(1), device.clone()).unwrap();
    host.assign_bars().unwrap();
    Rig {
        memory,
        space,
        host,
        device,
        table,
        kvm,
    }
}

impl Rig {
    fn bar(&self, index: usize) -> u64 {
        self.device.config().bars()[index].address
    }

    fn load(&self, address: u64, size: u8) -> u64 {
        self.space.load(&self.memory.register(), address, size)
    }

    fn store(&self, address: u64, size: u8, value: u64) {
        let table = self.table.0.lock().unwrap();
        let hit = table.iter().find(|it| {
            it.addr == address && it.size == size && it.datamatch.is_none_or(|it| it == value)
        });
        if let Some(hit) = hit.filter(|_| self.kvm) {
            rustix::io::write(&*hit.fd, &1u64.to_ne_bytes()).unwrap();
            return;
        }
        drop(table);
        self.space
            .store(&self.memory.register(), address, size, value);
    }

    /// One test as kvm-unit-tests carries it out. Returns its name if there is such a test.
    fn run(&self, bar: u64, test: u64) -> Option<String> {
        self.store(bar, 1, test);
        assert_eq!(self.load(bar + 0xc, 4), 0);
        let width = self.load(bar + 1, 1) as u8;
        if !matches!(width, 1 | 2 | 4) {
            return None;
        }
        let (data, offset) = (self.load(bar + 8, 4), self.load(bar + 4, 4));
        for _ in 0..16 {
            self.store(bar + offset, width, data);
        }
        assert_eq!(self.load(bar + 0xc, 4), 16);
        // Another value, another width, another place.
        self.store(bar + offset + 4, width, data);
        self.store(bar + offset, 4, data);
        assert_eq!(self.load(bar + 0xc, 4), 16);
        let name = (0..).map(|at| self.load(bar + 0x10 + at, 1) as u8);
        Some(name.take_while(|it| *it != 0).map(char::from).collect())
    }
}

#[test]
fn every_test_counts_its_writes() {
    for kvm in [false, true] {
        let rig = rig(kvm);
        for bar in [rig.bar(0), rig.bar(1)] {
            let names: Vec<_> = (0..).map_while(|test| rig.run(bar, test)).collect();
            let expected = [
                "no-eventfd:pci-mem",
                "wildcard-eventfd:pci-mem",
                "datamatch-eventfd:pci-mem",
            ];
            assert_eq!(names, expected);
        }
        assert!(
            rig.table.0.lock().unwrap().is_empty(),
            "the last test was none"
        );
    }
}

#[test]
fn an_ioeventfd_follows_the_bar_and_ends_with_the_test() {
    let rig = rig(true);
    let place = || {
        rig.table
            .0
            .lock()
            .unwrap()
            .first()
            .map(|it| (it.addr, it.datamatch))
    };
    rig.store(rig.bar(0), 1, 1);
    assert_eq!(place(), Some((rig.bar(0) + 0x48, None)));
    rig.device.config().write(0x10, 4, 0xd000_0000);
    assert_eq!(place(), Some((0xd000_0048, None)));
    rig.store(0xd000_0000, 1, 2);
    assert_eq!(place(), Some((0xd000_0050, Some(0xfa))));
    rig.host.reset();
    assert_eq!(place(), None);
    rig.host.assign_bars().unwrap();
    assert_eq!(rig.load(rig.bar(0) + 1, 1), 0, "no test");
}

#[test]
fn nothing_is_left_of_it() {
    let rig = rig(true);
    rig.store(rig.bar(1), 1, 1);
    let bar = rig.bar(0);
    rig.device.config().gate().close();
    assert_eq!(rig.load(bar, 4), 0xffff_ffff);
    rig.host.detach(1).unwrap();
    assert!(rig.table.0.lock().unwrap().is_empty());
    let Rig { device, .. } = rig;
    assert_eq!(Arc::strong_count(&device), 1);
    let bar = Arc::downgrade(&device.bars[1]);
    drop(device);
    // The last view of the map that showed it goes when its readers have.
    let limit = Instant::now() + Duration::from_secs(60);
    while bar.upgrade().is_some() {
        assert!(Instant::now() < limit, "a cycle");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn the_empty_bar_is_as_large_as_asked_for() {
    let rig = rig(false);
    let bars = rig.device.config().bars();
    assert_eq!((bars[2].index, bars[2].spec.size_bytes), (2, 1 << 30));
    rig.store(bars[2].address + 0x3fff_fff8, 8, 1);
    assert_eq!(rig.load(bars[2].address + 0x3fff_fff8, 8), 0);
    assert!(TestDevice::new("t", &rig.memory, Some(5000)).is_err());
    assert_eq!(
        TestDevice::new("t", &rig.memory, None)
            .unwrap()
            .config()
            .bars()
            .len(),
        2
    );
}

#[test]
fn any_access_is_harmless() {
    let rig = rig(false);
    let bar = &rig.device.bars[0];
    for offset in (0..0x100).chain([4095, 4096, u64::MAX]) {
        for size in [0, 1, 2, 3, 4, 8, 255] {
            for value in [0, 1, 2, 3, 0xfa, u64::MAX] {
                bar.write(offset, size, value);
                bar.read(offset, size);
            }
        }
    }
}
