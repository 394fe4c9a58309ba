// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The task that serves the queue from DRIVER_OK to the next reset, one request at a time.
//!
//! ```text
//!   kick ─▶ take a request ─▶ wait: allowance, source ─▶ give the bytes ─┐
//!                ▲                  (no lease)                           │
//!                └───────────────────────────────────────────────────────┘
//! ```
//!
//! Taking and giving happen under a lease each. In between there is none: of the request only addresses are known,
//! nothing of the guest's is touched, and the end of the activation drops the wait with its read.
//!
//! When the device is removed under its driver, requests are given back without a byte. 5.4.6.2 knows no such answer; a
//! Linux driver wakes its reader for it, who held the lock of all others, and asks for nothing more.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use ebbtide_bus::log_limit::LogLimit;
use ebbtide_gate::{Entry, Gate};
use ebbtide_iothread::Local;
use ebbtide_memory::{AddressSpace, Reader};

use super::limit::{Grant, Limit};
use super::source::RngClaim;
use super::{Counters, EntropySource};
use crate::control::TransportControl;
use crate::device::ActiveQueue;
use crate::removal::rest::{Place, refuse_rest};
use crate::select;
use crate::virtq::{Chain, QueueError};

/// What one answer has at most. A driver asks again (5.4.6.1), and the host allocates no more than this for it.
const ANSWER_BYTES: u32 = 64 << 10;
/// How long a source that failed is left alone.
const PAUSE: Duration = Duration::from_secs(1);

/// Everything the queue needs to be served.
pub(super) struct Setup {
    pub name: Arc<str>,
    pub queue: ActiveQueue,
    pub gate: Arc<Gate>,
    pub space: Arc<AddressSpace>,
    pub control: TransportControl,
    pub backend: Arc<RngClaim>,
    pub limit: Arc<Mutex<Limit>>,
    pub counters: Arc<Counters>,
    pub complaints: Arc<LogLimit>,
    pub source_complaints: Arc<LogLimit>,
}

/// Serves the queue until the gate closes or the driver breaks the queue.
pub(super) async fn serve(local: Local, setup: Setup) {
    let Setup {
        name,
        mut queue,
        gate,
        space,
        control,
        backend,
        limit,
        counters,
        complaints,
        source_complaints,
    } = setup;
    let service = Service {
        reader: space.memory().register(),
        space,
        counters: Arc::clone(&counters),
    };
    let fetch = Fetch {
        name: Arc::clone(&name),
        local: local.clone(),
        source: backend.source(),
        limit,
        counters,
        complaints: source_complaints,
    };
    let mut end = gate.drained();
    let mut waiting = None;
    loop {
        // Also before the first kick: what was made available before DRIVER_OK may come without one.
        let taken = match gate.enter(Entry::Io) {
            Some(_lease) => service.take(&mut queue),
            None => break,
        };
        let served = match taken {
            Ok(Some(chain)) => {
                let wanted = chain.writable.total_len();
                let end = queue.removed.ended(&mut end);
                let bytes = select::first(fetch.bytes(wanted), end).await;
                let (Some(bytes), Some(_lease)) = (bytes, gate.enter(Entry::Io)) else {
                    waiting = Some(chain);
                    break;
                };
                service.give(&mut queue, &chain, &bytes)
            }
            Ok(None) => match queue.kicked(&local, &gate).await {
                Some(_lease) => continue,
                None => break,
            },
            Err(fault) => Err(fault),
        };
        if let Err(fault) = served {
            if let Some(_lease) = gate.enter(Entry::Io) {
                if let Some(suppressed) = complaints.allow() {
                    tracing::warn!(device = &*name, suppressed, %fault, "the driver's queue is unusable");
                }
                control.needs_reset();
            }
            return;
        }
        // A driver that always has another request must not keep the thread's other tasks out.
        local.yield_now().await;
    }
    let place = Place {
        local: &local,
        space: &service.space,
        reader: &service.reader,
    };
    // A driver that breaks the queue now is not told: its device is on its way out.
    let _ = refuse_rest(place, &mut queue, waiting, |_, _| 0).await;
}

struct Service {
    space: Arc<AddressSpace>,
    reader: Reader,
    counters: Arc<Counters>,
}

impl Service {
    /// The next request that has room for bytes; `None` when there is none and a kick will announce the next.
    fn take(&self, queue: &mut ActiveQueue) -> Result<Option<Chain>, QueueError> {
        let guard = self.space.read(&self.reader);
        loop {
            match queue.queue.pop(&guard)? {
                Some(chain) if chain.writable.total_len() > 0 => return Ok(Some(chain)),
                // Not what 5.4.6 allows, and easily answered.
                Some(chain) => {
                    queue.queue.push_used(&guard, chain.head, 0)?;
                    queue.notify(&guard)?;
                }
                None if queue.queue.enable_kick(&guard)? => {}
                None => return Ok(None),
            }
        }
    }

    fn give(&self, queue: &mut ActiveQueue, chain: &Chain, bytes: &[u8]) -> Result<(), QueueError> {
        let guard = self.space.read(&self.reader);
        let written = match chain.writable.copy_from(&guard, bytes) {
            Ok(written) => written,
            Err(_) => {
                add(&self.counters.bad_memory, 1);
                0
            }
        };
        add(&self.counters.requests, 1);
        add(&self.counters.bytes, written as u64);
        let written = u32::try_from(written).unwrap_or(0);
        queue.queue.push_used(&guard, chain.head, written)?;
        queue.notify(&guard)
    }
}

/// Gets bytes from the source.
struct Fetch<'a> {
    name: Arc<str>,
    local: Local,
    source: &'a dyn EntropySource,
    limit: Arc<Mutex<Limit>>,
    counters: Arc<Counters>,
    complaints: Arc<LogLimit>,
}

impl Fetch<'_> {
    /// At least one and at most `wanted` bytes, however long that takes.
    async fn bytes(&self, wanted: u32) -> Vec<u8> {
        let wanted = wanted.min(ANSWER_BYTES).into();
        loop {
            let grant = self.limit().take(self.local.now(), wanted);
            let granted = match grant {
                Grant::Bytes(granted) => granted,
                Grant::Until(time) => {
                    self.local.sleep_until(time).await;
                    continue;
                }
            };
            let max = usize::try_from(granted).unwrap_or(0);
            let read = self.source.read(&self.local, max).await;
            let mut bytes = read.unwrap_or_else(|error| {
                self.complain(&error);
                Vec::new()
            });
            bytes.truncate(max);
            self.limit()
                .put_back(granted.saturating_sub(bytes.len() as u64));
            if !bytes.is_empty() {
                return bytes;
            }
            add(&self.counters.source_failures, 1);
            self.local.sleep(PAUSE).await;
        }
    }

    fn limit(&self) -> std::sync::MutexGuard<'_, Limit> {
        self.limit.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn complain(&self, error: &std::io::Error) {
        if let Some(suppressed) = self.complaints.allow() {
            tracing::warn!(device = &*self.name, suppressed, %error, "the entropy source fails");
        }
    }
}

fn add(counter: &AtomicU64, count: u64) {
    counter.fetch_add(count, Ordering::Relaxed);
}
