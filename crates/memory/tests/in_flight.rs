// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! RAM is unplugged while the kernel is to write to it: a request that io_uring holds, and buffers
//! that are registered with it.
#![cfg(not(loom))]

mod setup;

use std::io::{PipeReader, Write, pipe};
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use ebbtide_memory::{
    Access, FlatSection, Gpa, Listener, ListenerError, Phase, Pin, RegionHold, Ticket,
};
use io_uring::{IoUring, opcode, types::Fd};
use setup::Map;

const AT: u64 = 1 << 30;
const SIZE: u64 = 2 << 20;
const BYTES: usize = 8192;

fn reach(ticket: &Ticket, phase: Phase) {
    let end = Instant::now() + Duration::from_secs(60);
    while ticket.phase() < phase {
        assert!(Instant::now() < end, "{}", ticket.report());
        thread::yield_now();
    }
}

/// Has the kernel read from a pipe into the pin's memory; the pipe is empty, so it waits.
fn submit_read(ring: &mut IoUring, pipe: &PipeReader, pin: &Pin) {
    let read = opcode::Read::new(Fd(pipe.as_raw_fd()), pin.as_ptr(), pin.len() as u32);
    // SAFETY: the caller keeps the pin until the request is over.
    unsafe { ring.submission().push(&read.build()).unwrap() };
    assert_eq!(ring.submit().unwrap(), 1);
}

fn completed(ring: &mut IoUring) -> i32 {
    ring.submit_and_wait(1).unwrap();
    ring.completion().next().unwrap().result()
}

/// What went wrong in Cloud Hypervisor's issue 7955: memory was unplugged under a request, and
/// what came to its address was written to.
#[test]
fn a_read_in_flight_ends_in_the_memory_it_was_given() {
    let map = Map::new();
    let dimm = map.ram("dimm0", SIZE);
    map.add(&dimm, AT);
    let reader = map.memory.register();
    let mut ring = IoUring::new(8).unwrap();
    let (from, mut to) = pipe().unwrap();
    let pin = map.space.read(&reader).pin(Gpa(AT), BYTES, Access::Write);
    let pin = pin.unwrap();
    submit_read(&mut ring, &from, &pin);

    let ticket = map.change(|t| t.unplug(&dimm));
    reach(&ticket, Phase::Draining);
    let host = ticket.block().host().as_ptr() as usize;
    // The address belongs to another DIMM by now.
    let next = map.ram("dimm1", SIZE);
    map.add(&next, AT);
    let next_host = next.ram_block().unwrap().host().as_ptr() as usize;
    assert!(next_host.abs_diff(host) >= SIZE as usize);
    let (ticket, error) = ticket.destroy().unwrap_err();
    assert!(error.to_string().contains("pins of"), "{error}");

    to.write_all(&[0xa5; BYTES]).unwrap();
    assert_eq!(completed(&mut ring), BYTES as i32);
    let mut bytes = [0; BYTES];
    pin.read_at(0, &mut bytes).unwrap();
    assert_eq!(bytes, [0xa5; BYTES]);
    assert_eq!(ticket.phase(), Phase::Draining);
    drop(pin);
    reach(&ticket, Phase::Drained);
    ticket.destroy().map_err(|(_, error)| error).unwrap();
    assert_eq!(
        map.space.load(&reader, AT, 8),
        0,
        "the new DIMM was written to"
    );

    // A kernel that is told the old address by mistake gets an error, and writes nowhere.
    to.write_all(&[0x5a; 16]).unwrap();
    let read = opcode::Read::new(Fd(from.as_raw_fd()), host as *mut u8, 16);
    // SAFETY: nothing is mapped there any more, and never will be.
    unsafe { ring.submission().push(&read.build()).unwrap() };
    assert_eq!(completed(&mut ring), -libc::EFAULT);
}

/// Buffers registered with the kernel: an external mapper that acknowledges later.
struct Fixed(Arc<Mutex<Vec<(usize, RegionHold)>>>);

impl Listener for Fixed {
    fn region_add(&mut self, section: &FlatSection) -> Result<(), ListenerError> {
        let host = section.host().unwrap().as_ptr() as usize;
        let hold = section.hold_as("io_uring buffers");
        self.0.lock().unwrap().push((host, hold));
        Ok(())
    }

    fn region_del(&mut self, _: &FlatSection) {}
}

#[test]
fn registered_buffers_hold_memory_until_they_are_gone() {
    let map = Map::new();
    let held = Arc::new(Mutex::new(Vec::new()));
    let listener = Box::new(Fixed(Arc::clone(&held)));
    map.space.add_listener(listener, 0).unwrap();
    let dimm = map.ram("dimm0", SIZE);
    map.add(&dimm, AT);
    let mut ring = IoUring::new(8).unwrap();
    let host = held.lock().unwrap()[0].0;
    let buffer = libc::iovec {
        iov_base: host as *mut _,
        iov_len: BYTES,
    };
    // SAFETY: the hold keeps it mapped until the buffers are unregistered.
    unsafe { ring.submitter().register_buffers(&[buffer]).unwrap() };

    let ticket = map.change(|t| t.unplug(&dimm));
    reach(&ticket, Phase::Draining);
    assert_eq!(ticket.holders()[0].what, "io_uring buffers");
    // The device goes on with its buffer.
    let (from, mut to) = pipe().unwrap();
    to.write_all(&[0xa5; BYTES]).unwrap();
    let read = opcode::ReadFixed::new(Fd(from.as_raw_fd()), host as *mut u8, BYTES as u32, 0);
    // SAFETY: the buffer is registered and held.
    unsafe { ring.submission().push(&read.build()).unwrap() };
    assert_eq!(completed(&mut ring), BYTES as i32);
    // SAFETY: the hold keeps it mapped.
    let last = unsafe { (host as *const u8).add(BYTES - 1).read_volatile() };
    assert_eq!((last, ticket.phase()), (0xa5, Phase::Draining));

    ring.submitter().unregister_buffers().unwrap();
    held.lock().unwrap().clear();
    reach(&ticket, Phase::Drained);
    ticket.destroy().map_err(|(_, error)| error).unwrap();
}
