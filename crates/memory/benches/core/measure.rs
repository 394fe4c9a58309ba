// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Timing, and the rows that come of it.

use std::hint::black_box;
use std::sync::mpsc::sync_channel;
use std::thread;
use std::time::{Duration, Instant};

/// What to measure, and for how long.
pub struct Plan {
    wanted: Vec<String>,
    pub rounds: usize,
    slice: Duration,
}

impl Plan {
    pub fn new(wanted: Vec<String>) -> Plan {
        Plan {
            wanted,
            rounds: 7,
            slice: Duration::from_millis(20),
        }
    }

    /// How long a stretch is.
    pub fn slice(&self) -> Duration {
        self.slice
    }

    pub fn wants(&self, id: &str) -> bool {
        self.wanted.is_empty()
            || self
                .wanted
                .iter()
                .any(|wanted| id.contains(wanted.as_str()))
    }

    /// Nanoseconds per operation of `f`, which does `operations`: the median of many short
    /// stretches, so that a neighbour's interruption of one of them does not count.
    pub fn time<T>(&self, operations: usize, mut f: impl FnMut() -> T) -> f64 {
        let warm = Instant::now();
        black_box(f());
        let once = warm.elapsed().max(Duration::from_nanos(20));
        let repeats =
            (Duration::from_micros(200).as_nanos() / once.as_nanos()).clamp(1, 10_000) as u32;
        let mut stretches = Vec::new();
        let end = Instant::now() + self.slice;
        while Instant::now() < end || stretches.len() < 3 {
            let start = Instant::now();
            for _ in 0..repeats {
                black_box(f());
            }
            stretches
                .push(start.elapsed().as_nanos() as f64 / f64::from(repeats) / operations as f64);
        }
        median(&mut stretches)
    }

    /// Nanoseconds per thing: making `things` of them here with `make`, and dropping them on
    /// another thread. Only the making and the dropping are timed, not the hand-over.
    pub fn time_handover<T: Send>(&self, things: usize, make: impl Fn() -> Vec<T>) -> f64 {
        let (send, receive) = sync_channel::<Vec<T>>(0);
        let (answer, took) = sync_channel::<Duration>(0);
        thread::scope(|scope| {
            scope.spawn(move || {
                for things in receive {
                    let start = Instant::now();
                    let mut things = things;
                    things.clear();
                    let took = start.elapsed();
                    drop(things);
                    if answer.send(took).is_err() {
                        break;
                    }
                }
            });
            let mut stretches = Vec::new();
            let end = Instant::now() + self.slice;
            while Instant::now() < end || stretches.len() < 3 {
                let start = Instant::now();
                let made = make();
                let making = start.elapsed();
                if send.send(made).is_err() {
                    break;
                }
                let dropping = took.recv().unwrap_or_default();
                stretches.push((making + dropping).as_nanos() as f64 / things as f64);
            }
            drop(send);
            median(&mut stretches)
        })
    }
}

/// Runs `f` and the threads it starts on one CPU.
pub fn on_one_cpu(f: impl FnOnce()) {
    // SAFETY: all zeroes is an empty set.
    let mut old: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    // SAFETY: as above.
    let mut one: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    let size = size_of::<libc::cpu_set_t>();
    // SAFETY: the sets are ours, and as large as said.
    unsafe {
        assert_eq!(libc::sched_getaffinity(0, size, &raw mut old), 0);
        libc::CPU_SET(libc::sched_getcpu() as usize, &mut one);
        assert_eq!(libc::sched_setaffinity(0, size, &raw const one), 0);
    }
    f();
    // SAFETY: as above.
    let restored = unsafe { libc::sched_setaffinity(0, size, &raw const old) };
    assert_eq!(restored, 0);
}

pub fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// 1024 random addresses, the regions equally often.
pub fn spread(regions: &[(u64, u64)]) -> Vec<u64> {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut random = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    (0..1024)
        .map(|_| {
            let (start, length) = regions[(random() % regions.len() as u64) as usize];
            start + (random() % (length - 64)) / 64 * 64
        })
        .collect()
}

/// Looks all addresses up, each only once the one before is answered.
pub fn dependent(addresses: &[u64], look: impl Fn(u64) -> u64) -> u64 {
    let mut last = 0;
    for address in addresses {
        // The top bit of a host address is 0, which the compiler cannot know.
        last = look(address + (last >> 63));
    }
    last
}

/// What every run of a row is to stay below, in the row's unit. What gives memory back is measured by its floor.
fn budget(id: &str, floor: f64) -> Option<f64> {
    let (kind, size) = id.rsplit_once('/').unwrap_or((id, ""));
    let budget = match (kind, size) {
        ("lookup", _) => 2.0,
        ("lookup_pc", _) => 4.0,
        ("pin/home" | "pin/home2", _) => 3.0,
        ("pin/remote" | "pin/remote2", _) => 8.0,
        ("publish" | "publish_beside", "512") => 5_000.0,
        ("publish" | "publish_beside", "4096") => 20_000.0,
        ("dirty_mark", _) => 0.6,
        ("dirty_harvest_1G", _) => 2_500.0,
        ("drained", _) => 1_000_000.0,
        ("destroy_1G", _) => 1.2 * floor,
        _ => return None,
    };
    Some(budget)
}

const VM_MEMORY: &str = "vm-memory 0.18";
/// Nothing is to take longer than that peer takes, by more than two runs of the same differ.
const RATIO_MAX: f64 = 1.05;

/// One line of the result.
pub struct Row {
    id: String,
    peer_name: &'static str,
    unit: &'static str,
    ours: Vec<f64>,
    peer: Vec<f64>,
    floor: Vec<f64>,
}

impl Row {
    pub fn new(id: &str) -> Row {
        Row::beside(id, VM_MEMORY)
    }

    /// A row with another peer.
    pub fn beside(id: &str, peer_name: &'static str) -> Row {
        Row {
            id: id.to_owned(),
            peer_name,
            unit: "ns",
            ours: Vec::new(),
            peer: Vec::new(),
            floor: Vec::new(),
        }
    }

    /// The row in another unit than nanoseconds.
    pub fn in_unit(mut self, unit: &'static str) -> Row {
        self.unit = unit;
        self
    }

    pub fn add(&mut self, ours: f64, peer: f64, floor: f64) {
        self.ours.push(ours);
        self.peer.push(peer);
        self.floor.push(floor);
    }

    /// Ours divided by the peer's, in the median of the rounds.
    fn ratio(&self) -> f64 {
        let pairs = self.ours.iter().zip(&self.peer);
        median(&mut pairs.map(|(ours, peer)| ours / peer).collect::<Vec<_>>())
    }

    pub fn print(mut self) {
        let n = self.ours.len();
        let mut limits = String::new();
        if self.peer_name == VM_MEMORY && self.unit == "ns" {
            limits = format!(",\"ratio\":{:.3},\"ratio_max\":{RATIO_MAX}", self.ratio());
        }
        let (ours, peer, floor) = (
            median(&mut self.ours),
            median(&mut self.peer),
            median(&mut self.floor),
        );
        let (min, max) = (self.ours[0], self.ours[n - 1]);
        if let Some(budget) = budget(&self.id, floor) {
            limits += &format!(",\"budget\":{budget:.1}");
        }
        println!(
            "{{\"id\":\"{}\",\"ours\":{ours:.2},\"peer\":{peer:.2},\"peer_name\":\"{}\",\
             \"floor\":{floor:.2},\"unit\":\"{}\",\"n\":{n},\"min\":{min:.2},\"max\":{max:.2}{limits}}}",
            self.id, self.peer_name, self.unit
        );
    }
}
