// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Cards, consoles and entropy: what waits at their other end may never come.

use std::future::poll_fn;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::rc::Rc;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Poll, Waker};
use std::time::{Duration, Instant};

use ebbtide_devices::chardev::Wire;
use ebbtide_iothread::Local;
use ebbtide_lab_driver::{GuestRam, Random};
use ebbtide_net::{MacAddress, Netdev};
use ebbtide_virtio::VirtioPci;
use ebbtide_virtio::console::{ConsoleSpec, PortKind, PortSpec, VirtioConsole};
use ebbtide_virtio::net::{NetSpec, VirtioNet};
use ebbtide_virtio::rng::{EntropySource, Reading, RngBackend, RngSpec, VirtioRng};

use crate::cycle::{Behaviour, DELAY};
use crate::storage::{Image, Room};
use crate::virtio::{Backend, Made, Request};
use crate::world::World;

/// A buffer to receive into, which nobody waits for.
fn room(ram: &GuestRam, queue: u16, len: usize) -> Request {
    let room = Room::writable(ram, len, 4);
    Request {
        queue,
        parts: vec![room.part],
        owed: false,
        check: Box::new(move |_| {
            let _ = &room;
            Ok(())
        }),
    }
}

/// Bytes to send, which the driver waits to be rid of.
fn bytes(ram: &GuestRam, queue: u16, bytes: &[u8]) -> Request {
    let room = Room::readable(ram, bytes);
    Request {
        queue,
        parts: vec![room.part],
        owed: true,
        check: Box::new(move |_| {
            let _ = &room;
            Ok(())
        }),
    }
}

/// When a host that is slow takes what it is given.
struct Host {
    behaviour: Behaviour,
    world: Rc<World>,
    from: Instant,
}

impl Host {
    fn new(world: &Rc<World>, behaviour: Behaviour) -> Host {
        let from = world.clock.now() + DELAY;
        let world = Rc::clone(world);
        Host {
            behaviour,
            world,
            from,
        }
    }

    fn takes(&self) -> bool {
        match self.behaviour {
            Behaviour::Prompt | Behaviour::Fail => true,
            // By and by.
            Behaviour::Delay | Behaviour::Reorder => self.world.clock.now() >= self.from,
            Behaviour::Never => false,
        }
    }

    fn let_go(&mut self) {
        self.behaviour = match self.behaviour {
            Behaviour::Never => Behaviour::Prompt,
            other => other,
        };
    }
}

struct Peer {
    host: Host,
    netdev: Arc<Netdev>,
    stream: Option<UnixStream>,
}

/// virtio-net on a stream whose socket takes a few frames.
pub fn net(world: &Rc<World>, _: &Image, behaviour: Behaviour, _: &mut Random) -> Made {
    let (ours, theirs) = UnixStream::pair().expect("a socket");
    theirs.set_nonblocking(true).expect("a socket");
    rustix::net::sockopt::set_socket_send_buffer_size(&ours, 4608).expect("a socket");
    let netdev = Netdev::stream_of("net0", ours.into()).expect("a backend");
    let spec = NetSpec::new("card0", MacAddress::of_card(0));
    let device = VirtioNet::new(spec, &netdev, world.board.remote());
    Made {
        device: device.expect("a device"),
        queues: 3,
        backend: Box::new(Peer {
            host: Host::new(world, behaviour),
            netdev,
            // One that is gone is the card's failure.
            stream: (behaviour != Behaviour::Fail).then_some(theirs),
        }),
    }
}

impl Backend for Peer {
    fn requests(&mut self, ram: &GuestRam, random: &mut Random) -> Vec<Request> {
        let mut requests = Vec::new();
        for _ in 0..random.below(4) {
            requests.push(room(ram, 0, 2048));
        }
        for _ in 0..6 {
            let frame = [&[0; 12][..], &[0xff; 6], &[2; 6], &[8, 0], &[7; 1400]].concat();
            requests.push(bytes(ram, 1, &frame));
        }
        // Promiscuous: a driver has a lock while it waits.
        let (command, ack) = (Room::readable(ram, &[0, 0, 1]), Room::writable(ram, 1, 1));
        ram.write(ack.part.gpa, &[0xee]);
        let world = Rc::clone(&self.host.world);
        requests.push(Request {
            queue: 2,
            parts: vec![command.part, ack.part],
            owed: true,
            check: Box::new(move |written| {
                let _ = &command;
                match ack.bytes(written)[..] {
                    [0] => Ok(()),
                    [1] if world.story.leaving.get() => Ok(()),
                    ref other => Err(format!("ack {other:?}")),
                }
            }),
        });
        requests
    }

    /// A frame is kept: those behind it wait.
    fn is_busy(&self, _: &VirtioPci) -> bool {
        !self.host.takes()
    }

    fn turn(&mut self) {
        if self.host.takes()
            && let Some(stream) = &mut self.stream
        {
            let mut bytes = [0; 4096];
            while stream.read(&mut bytes).is_ok_and(|count| count > 0) {}
        }
        if self.host.behaviour == Behaviour::Reorder {
            self.late();
        }
    }

    fn let_go(&mut self) {
        self.host.let_go();
        self.turn();
    }

    /// A frame for the driver.
    fn late(&mut self) {
        let frame = [&[0, 0, 0, 64][..], &[0xff; 12], &[8, 0], &[9; 50]].concat();
        if let Some(stream) = &mut self.stream {
            // Nobody reads it, maybe.
            let _ = stream.write(&frame);
        }
    }

    fn is_free(&self) -> bool {
        self.netdev.user().is_none() && Arc::strong_count(&self.netdev) == 1
    }
}

struct Wires {
    host: Host,
    wires: Vec<Arc<Wire>>,
}

/// virtio-console: a console and a port.
pub fn console(world: &Rc<World>, _: &Image, behaviour: Behaviour, _: &mut Random) -> Made {
    let spec = ConsoleSpec {
        max_ports: 2,
        ..ConsoleSpec::new("serial0")
    };
    let console = VirtioConsole::new(spec, world.board.remote()).expect("a device");
    let wires = [PortKind::Console, PortKind::Serial].map(|kind| {
        let wire = full_wire(behaviour);
        let spec = PortSpec {
            id: "port".into(),
            kind,
            number: None,
            name: None,
        };
        console.add_port(spec, &wire).expect("a port");
        wire
    });
    Made {
        device: console,
        queues: 6,
        backend: Box::new(Wires {
            host: Host::new(world, behaviour),
            wires: wires.into(),
        }),
    }
}

/// A wire with a host that is slow, or with none.
pub fn full_wire(behaviour: Behaviour) -> Arc<Wire> {
    let wire = Wire::new();
    wire.listen(behaviour != Behaviour::Fail);
    if !matches!(behaviour, Behaviour::Prompt | Behaviour::Fail) {
        wire.put(&vec![b'.'; 256 << 10]);
    }
    wire
}

impl Backend for Wires {
    fn requests(&mut self, ram: &GuestRam, random: &mut Random) -> Vec<Request> {
        let ready = [0, 0, 0, 0, 0, 0, 1, 0];
        let mut requests = vec![bytes(ram, 3, &ready)];
        for queue in [0, 2, 4] {
            requests.push(room(ram, queue, 64));
        }
        for _ in 0..1 + random.below(3) {
            requests.push(bytes(ram, 1, &[b'x'; 5000]));
            requests.push(bytes(ram, 5, b"y"));
        }
        requests
    }

    fn is_busy(&self, _: &VirtioPci) -> bool {
        !self.host.takes()
    }

    fn turn(&mut self) {
        if self.host.takes() {
            self.wires.iter().for_each(|wire| drop(wire.take()));
        }
        if self.host.behaviour == Behaviour::Reorder {
            self.late();
        }
    }

    fn let_go(&mut self) {
        self.host.let_go();
        self.turn();
    }

    fn late(&mut self) {
        for wire in &self.wires {
            wire.receive(b"typed");
            wire.take();
        }
    }

    fn is_free(&self) -> bool {
        self.wires.iter().all(|wire| Arc::strong_count(wire) == 1)
    }
}

/// A source as slow as one likes.
#[derive(Clone)]
struct Source {
    behaviour: Behaviour,
    gate: Arc<Mutex<(bool, Vec<Waker>)>>,
}

impl Source {
    fn open(&self) {
        let mut gate = self.gate.lock().unwrap_or_else(PoisonError::into_inner);
        gate.0 = true;
        let wakers = std::mem::take(&mut gate.1);
        drop(gate);
        wakers.into_iter().for_each(Waker::wake);
    }

    async fn opened(&self) {
        poll_fn(|cx| {
            let mut gate = self.gate.lock().unwrap_or_else(PoisonError::into_inner);
            if gate.0 {
                return Poll::Ready(());
            }
            gate.1.clear();
            gate.1.push(cx.waker().clone());
            Poll::Pending
        })
        .await;
    }
}

impl EntropySource for Source {
    fn read<'a>(&'a self, local: &'a Local, max: usize) -> Reading<'a> {
        Box::pin(async move {
            match self.behaviour {
                Behaviour::Prompt => {}
                Behaviour::Delay => local.sleep(DELAY).await,
                Behaviour::Reorder => local.sleep(Duration::from_millis(max as u64)).await,
                Behaviour::Fail => return Err(std::io::Error::from_raw_os_error(5)),
                Behaviour::Never => self.opened().await,
            }
            Ok(vec![0x5a; max])
        })
    }
}

struct Entropy {
    source: Source,
    backend: Arc<RngBackend>,
}

/// virtio-rng
pub fn rng(world: &Rc<World>, _: &Image, behaviour: Behaviour, _: &mut Random) -> Made {
    let gate = Arc::default();
    let source = Source { behaviour, gate };
    let backend = RngBackend::new("source0", source.clone());
    let rng = VirtioRng::new(RngSpec::new("rng0"), &backend, world.board.remote());
    Made {
        device: rng.expect("a device"),
        queues: 1,
        backend: Box::new(Entropy { source, backend }),
    }
}

impl Backend for Entropy {
    fn requests(&mut self, ram: &GuestRam, random: &mut Random) -> Vec<Request> {
        let one = |random: &mut Random| {
            let room = Room::writable(ram, 1 + random.below(64) as usize, 1);
            Request {
                queue: 0,
                parts: vec![room.part],
                owed: true,
                check: Box::new(move |written| {
                    let bytes = room.bytes(written);
                    match bytes.iter().all(|byte| *byte == 0x5a) {
                        true => Ok(()),
                        false => Err(format!("{bytes:x?}")),
                    }
                }),
            }
        };
        (0..1 + random.below(4)).map(|_| one(random)).collect()
    }

    fn is_busy(&self, _: &VirtioPci) -> bool {
        !matches!(self.source.behaviour, Behaviour::Prompt)
    }

    fn answers(&self) -> bool {
        self.source.behaviour != Behaviour::Fail
    }

    fn let_go(&mut self) {
        self.source.open();
    }

    fn is_free(&self) -> bool {
        self.backend.users() == 0
    }
}
