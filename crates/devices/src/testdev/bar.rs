// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! One BAR of the test device: its header and the test under way.

use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};

use ebbtide_bus::gated::all_ones;
use ebbtide_bus::log_limit::LogLimit;
use ebbtide_memory::{Ioeventfd, Memory, Mmio, Region};
use rustix::event::{EventfdFlags, eventfd};

use crate::Error;

/// Offsets in the header.
const TEST: u64 = 0x00;
const WIDTH: usize = 0x01;
const OFFSET: usize = 0x04;
const DATA: usize = 0x08;
const COUNT: usize = 0x0c;
const NAME: usize = 0x10;
/// Bytes of it, the name included.
const HEADER_BYTES: usize = 0x40;

/// Where tests write: each at a place of its own behind the header, as far apart as any access is wide.
const FIRST_TARGET: u64 = HEADER_BYTES as u64;
const TARGET_STRIDE: u64 = 8;
/// What they write, and how wide.
const VALUE: u8 = 0xfa;
const VALUE_BYTES: u8 = 1;

/// What signals the writes of a test.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Signal {
    /// The registers.
    None,
    /// An ioeventfd for every value.
    AnyValue,
    /// One for the value to write.
    ThisValue,
}

const TESTS: [(&str, Signal); 3] = [
    ("no-eventfd", Signal::None),
    ("wildcard-eventfd", Signal::AnyValue),
    ("datamatch-eventfd", Signal::ThisValue),
];

/// A BAR with its test.
pub(super) struct TestBar {
    name: String,
    /// What kind of BAR it is, for the tests' names.
    kind: &'static str,
    memory: Arc<Memory>,
    /// The region that shows it, which holds this.
    region: OnceLock<Weak<Region>>,
    eventfd: Arc<OwnedFd>,
    /// Held while the map changes: a test is started as a whole.
    state: Mutex<State>,
    refused: LogLimit,
}

#[derive(Default)]
struct State {
    test: Option<usize>,
    count: u32,
    ioeventfd: Option<Ioeventfd>,
}

impl TestBar {
    pub(super) fn new(
        name: &str,
        memory: &Arc<Memory>,
        kind: &'static str,
    ) -> Result<Arc<Self>, Error> {
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        let eventfd = eventfd(0, flags).map_err(|source| Error::Eventfd {
            name: name.to_owned(),
            source: source.into(),
        })?;
        Ok(Arc::new(Self {
            name: name.to_owned(),
            kind,
            memory: Arc::clone(memory),
            region: OnceLock::new(),
            eventfd: Arc::new(eventfd),
            state: Mutex::default(),
            refused: LogLimit::default(),
        }))
    }

    /// Says which region shows the BAR. Once.
    pub(super) fn set_region(&self, region: &Arc<Region>) {
        let _ = self.region.set(Arc::downgrade(region));
    }

    /// Ends the test under way.
    pub(super) fn stop(&self) {
        self.start(None);
    }

    /// Starts a test, or none. One whose ioeventfd the host refuses goes on with plain registers: every write is counted
    /// in any case.
    fn start(&self, test: Option<usize>) {
        let mut state = self.state();
        let old = state.ioeventfd.take();
        let new = test.and_then(|test| self.ioeventfd(test));
        if let Some(region) = self.region.get().and_then(Weak::upgrade)
            && (old.is_some() || new.is_some())
        {
            let changed = self.memory.update(|change| {
                if let Some(old) = &old {
                    change.remove_ioeventfd(&region, old)?;
                }
                match &new {
                    Some(new) => change.add_ioeventfd(&region, new.clone()),
                    None => Ok(()),
                }
            });
            state.ioeventfd = match changed {
                Ok(()) => new,
                Err(error) => {
                    if let Some(suppressed) = self.refused.allow() {
                        tracing::warn!(device = self.name, %error, suppressed, "no ioeventfd for a test");
                    }
                    // The change was taken back as a whole.
                    old
                }
            };
        }
        self.take_signals();
        state.test = test;
        state.count = 0;
    }

    fn ioeventfd(&self, test: usize) -> Option<Ioeventfd> {
        let (_, signal) = TESTS.get(test)?;
        let datamatch = match signal {
            Signal::None => return None,
            Signal::AnyValue => None,
            Signal::ThisValue => Some(VALUE.into()),
        };
        Some(Ioeventfd {
            offset: target(test),
            size: VALUE_BYTES,
            datamatch,
            fd: Arc::clone(&self.eventfd),
        })
    }

    /// How often the eventfd was signalled since the last call.
    fn take_signals(&self) -> u64 {
        let mut count = [0; 8];
        match rustix::io::read(&*self.eventfd, &mut count) {
            Ok(8) => u64::from_ne_bytes(count),
            // Never signalled.
            _ => 0,
        }
    }

    /// The header as it is now.
    fn header(&self) -> [u8; HEADER_BYTES] {
        let mut state = self.state();
        let signals = u32::try_from(self.take_signals()).unwrap_or(u32::MAX);
        state.count = state.count.saturating_add(signals);
        let mut header = [0; HEADER_BYTES];
        let mut put = |at: usize, bytes: &[u8]| {
            for (to, from) in header.iter_mut().skip(at).zip(bytes) {
                *to = *from;
            }
        };
        if let Some((test, (name, _))) = state.test.and_then(|it| Some((it, TESTS.get(it)?))) {
            put(WIDTH, &[VALUE_BYTES]);
            put(OFFSET, &(target(test) as u32).to_le_bytes());
            put(DATA, &u32::from(VALUE).to_le_bytes());
            put(COUNT, &state.count.to_le_bytes());
            put(NAME, format!("{name}:pci-{}", self.kind).as_bytes());
        }
        header
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Where a test writes.
fn target(test: usize) -> u64 {
    FIRST_TARGET + TARGET_STRIDE * test as u64
}

impl Mmio for TestBar {
    fn read(&self, offset: u64, size: u8) -> u64 {
        if size > 8 {
            return all_ones(size);
        }
        // Behind the header there is nothing to read.
        let header = self.header();
        let bytes = usize::try_from(offset)
            .ok()
            .and_then(|offset| header.get(offset..))
            .unwrap_or_default();
        bytes
            .iter()
            .take(size.into())
            .rev()
            .fold(0, |value, byte| value << 8 | u64::from(*byte))
    }

    fn write(&self, offset: u64, size: u8, value: u64) {
        if offset == TEST && size == 1 {
            return self.start(Some(value as usize & 0xff));
        }
        let mut state = self.state();
        let wanted = state.test.filter(|test| *test < TESTS.len()).map(target);
        if wanted == Some(offset) && size == VALUE_BYTES && value as u8 == VALUE {
            state.count = state.count.saturating_add(1);
        }
    }
}
