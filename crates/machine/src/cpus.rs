// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! vCPU threads: run, park, do a job while parked, exit.
//!
//! ```text
//!            run()                     park() + kick
//!  parked ─────────▶ in the guest ───────────────────▶ parked ── Exit ──▶ gone
//!    ▲  │ jobs (restore state)            │
//!    │  ▼                                 │ triple fault, inaccessible memory, KVM error
//!    └── held (only a reset lets it run) ◀┘
//! ```
//!
//! The control thread asks; a vCPU answers when it next leaves the guest. A kick is never lost:
//! it makes the *next* entry into the guest return at once if it comes between the check of the
//! request and the entry.

use std::future::poll_fn;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, mpsc};
use std::task::{Poll, Waker};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use ebbtide_hypervisor::{Exit, Kicker, Vcpu};
use ebbtide_memory::{AddressSpace, Reader};

use crate::Error;
use crate::confine::{Confinement, Kind};
use crate::lifecycle::{Request, Requests};

/// What a vCPU has to tell the control thread.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CpuEvent {
    /// The guest shut the processor down (triple fault).
    TripleFault {
        /// Index of the vCPU.
        cpu: usize,
    },
    /// The guest touched memory that it has no right to: an unplugged block behind a slot.
    MemoryFault {
        /// Index of the vCPU.
        cpu: usize,
        /// Guest-physical address, where KVM tells it.
        gpa: Option<u64>,
        /// Instruction pointer of the guest.
        rip: u64,
    },
    /// The hypervisor can't go on with this vCPU.
    Failed {
        /// Index of the vCPU.
        cpu: usize,
        /// What it said.
        reason: String,
    },
    /// The hypervisor reports that the guest asked for reset or power-off.
    System {
        /// Reset if true, power-off if false.
        reset: bool,
    },
}

impl CpuEvent {
    /// Writes what is wrong into the log.
    pub fn log(&self) {
        match self {
            CpuEvent::TripleFault { cpu } => tracing::warn!("vcpu{cpu}: triple fault"),
            CpuEvent::MemoryFault { cpu, gpa, rip } => {
                let at = gpa.map_or_else(|| "an unknown address".into(), |a| format!("{a:#x}"));
                tracing::error!(
                    "vcpu{cpu}: the guest touched memory that the host can't give it, at {at}, rip {rip:#x}: an unplugged block, or the host is out of memory"
                );
            }
            CpuEvent::Failed { cpu, reason } => tracing::error!("vcpu{cpu}: {reason}"),
            CpuEvent::System { .. } => {}
        }
    }
}

/// Something to do with a parked vCPU, on its own thread.
type Job = Box<dyn FnOnce(&mut dyn Vcpu) + Send>;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Want {
    Run,
    Park,
    Exit,
}

struct State {
    want: Want,
    parked: Vec<bool>,
    jobs: Vec<Option<Job>>,
    /// Stopped by an event of its own; a job lets it run again.
    held: Vec<bool>,
    waiters: Vec<Waker>,
}

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    /// Read before each entry into the guest, without the lock.
    attention: AtomicBool,
    /// For each vCPU the longest that a register access has kept it out of the guest.
    longest: Vec<Longest>,
    /// Somebody asks for that: processor time is measured, too, which takes system calls.
    metered: AtomicBool,
}

/// What one thread notes and another takes, in nanoseconds.
#[derive(Default)]
struct Longest {
    stay: AtomicU64,
    processor: AtomicU64,
}

/// How long register accesses have kept a vCPU out of the guest, at most.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stay {
    /// From the return of KVM_RUN to its next call.
    pub longest: Duration,
    /// The most of its thread's processor time that one took: without what the thread spent waiting for a processor.
    /// Measured from the first time that this is asked for.
    pub processor: Duration,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // A thread that panicked aborts the process (profile), so poison carries no news.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The vCPU threads of one machine.
pub struct Cpus {
    shared: Arc<Shared>,
    kickers: Vec<Kicker>,
    /// They hand back what may take system calls to free that they are not allowed.
    threads: Vec<JoinHandle<Box<dyn Vcpu>>>,
    thread_ids: Vec<i32>,
}

impl Cpus {
    /// Starts one thread for each of `vcpus`, confined and parked.
    ///
    /// # Errors
    /// When a thread can't be started or confined.
    pub fn start(
        vcpus: Vec<Box<dyn Vcpu>>,
        system: &Arc<AddressSpace>,
        ports: &Arc<AddressSpace>,
        requests: &Requests,
        confinement: &Arc<Confinement>,
    ) -> Result<Cpus, Error> {
        let count = vcpus.len();
        let shared = Arc::new(Shared {
            state: Mutex::new(State {
                want: Want::Park,
                parked: vec![false; count],
                jobs: (0..count).map(|_| None).collect(),
                held: vec![false; count],
                waiters: Vec::new(),
            }),
            changed: Condvar::new(),
            attention: AtomicBool::new(true),
            longest: (0..count).map(|_| Longest::default()).collect(),
            metered: AtomicBool::new(false),
        });
        let mut cpus = Cpus {
            shared: Arc::clone(&shared),
            kickers: vcpus.iter().map(|v| v.kicker()).collect(),
            threads: Vec::with_capacity(count),
            thread_ids: Vec::with_capacity(count),
        };
        for (index, vcpu) in vcpus.into_iter().enumerate() {
            let cpu = Cpu {
                index,
                vcpu,
                shared: Arc::clone(&shared),
                system: Arc::clone(system),
                ports: Arc::clone(ports),
                requests: requests.clone(),
            };
            let confinement = Arc::clone(confinement);
            let (tell, told) = mpsc::channel();
            let thread = std::thread::Builder::new()
                .name(format!("vcpu{index}"))
                .spawn(move || cpu.begin(confinement, tell))
                .map_err(|e| Error::part(format!("vcpu{index} thread"), e))?;
            cpus.threads.push(thread);
            let failed = |e: String| Error::part(format!("vcpu{index} thread: confinement"), e);
            let confined = told.recv().map_err(|e| failed(e.to_string()))?;
            cpus.thread_ids
                .push(confined.map_err(|e| failed(e.to_string()))?);
        }
        Ok(cpus)
    }

    /// Number of vCPUs.
    pub fn count(&self) -> usize {
        self.kickers.len()
    }

    /// The host's numbers of the threads, by the vCPUs' indices.
    pub fn thread_ids(&self) -> &[i32] {
        &self.thread_ids
    }

    /// For each vCPU the longest that a register access has kept it out of the guest since this was last asked.
    pub fn take_longest_stays(&self) -> Vec<Stay> {
        self.shared.metered.store(true, Ordering::Relaxed);
        let take = |ns: &AtomicU64| Duration::from_nanos(ns.swap(0, Ordering::Relaxed));
        let stay = |longest: &Longest| Stay {
            longest: take(&longest.stay),
            processor: take(&longest.processor),
        };
        self.shared.longest.iter().map(stay).collect()
    }

    /// Lets all vCPUs that are not held run.
    pub fn run(&self) {
        self.request(Want::Run);
    }

    /// Takes all vCPUs out of the guest; ready when the last one is out.
    pub async fn park(&self) {
        self.request(Want::Park);
        self.all_parked().await;
    }

    fn request(&self, want: Want) {
        let mut state = self.shared.lock();
        if state.want != Want::Exit {
            state.want = want;
        }
        self.shared
            .attention
            .store(want != Want::Run, Ordering::SeqCst);
        self.shared.changed.notify_all();
        drop(state);
        if want != Want::Run {
            for kicker in &self.kickers {
                kicker.kick();
            }
        }
    }

    async fn all_parked(&self) {
        poll_fn(|cx| {
            let mut state = self.shared.lock();
            if state.parked.iter().all(|p| *p) {
                return Poll::Ready(());
            }
            state.waiters.push(cx.waker().clone());
            Poll::Pending
        })
        .await;
    }

    /// Runs `job` on each vCPU's thread; they must be parked. A held vCPU is held no longer.
    pub async fn each<T: Send + 'static>(
        &self,
        job: impl Fn(usize, &mut dyn Vcpu) -> T + Send + Sync + 'static,
    ) -> Vec<T> {
        let job = Arc::new(job);
        let mut answers = Vec::with_capacity(self.count());
        {
            let mut state = self.shared.lock();
            debug_assert!(state.want != Want::Run, "a job needs parked vCPUs");
            let State { jobs, held, .. } = &mut *state;
            for (index, (slot, held)) in jobs.iter_mut().zip(held).enumerate() {
                let (answer, done) = ebbtide_iothread::oneshot::channel();
                let job = Arc::clone(&job);
                *slot = Some(Box::new(move |vcpu| {
                    // Nobody waits any more when the control thread gave up.
                    let _ = answer.send(job(index, vcpu));
                }));
                *held = false;
                answers.push(done);
            }
            self.shared.changed.notify_all();
        }
        let mut results = Vec::with_capacity(answers.len());
        for done in answers {
            // None only while the threads exit.
            if let Some(result) = done.await {
                results.push(result);
            }
        }
        results
    }
}

impl Drop for Cpus {
    /// Takes the vCPUs out of the guest and joins their threads.
    fn drop(&mut self) {
        self.request(Want::Exit);
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                tracing::error!("a vCPU thread panicked");
            }
        }
    }
}

/// One vCPU with what its thread needs.
struct Cpu {
    index: usize,
    vcpu: Box<dyn Vcpu>,
    shared: Arc<Shared>,
    system: Arc<AddressSpace>,
    ports: Arc<AddressSpace>,
    requests: Requests,
}

impl Cpu {
    /// The life of the thread; `tell` hears whether it is confined.
    fn begin(
        mut self,
        confinement: Arc<Confinement>,
        tell: mpsc::Sender<std::io::Result<i32>>,
    ) -> Box<dyn Vcpu> {
        // Before it is confined: it takes signals to be received.
        if let Err(e) = self.vcpu.bind_thread() {
            self.fail(&e.to_string());
        }
        let thread = rustix::thread::gettid().as_raw_nonzero().get();
        let confined = confinement.enter(Kind::Vcpu).map(|()| thread);
        drop(confinement);
        let goes_on = confined.is_ok();
        // Whoever starts it waits for this.
        let _ = tell.send(confined);
        if goes_on {
            self.main();
        }
        self.vcpu
    }

    fn main(&mut self) {
        let reader = self.system.memory().register();
        loop {
            if self.shared.attention.load(Ordering::SeqCst) && !self.parked() {
                return;
            }
            if let Some(event) = self.step(&reader) {
                self.shared.lock().held[self.index] = true;
                self.requests.send(Request::Cpu(event));
                if !self.parked() {
                    return;
                }
            }
        }
    }

    /// Holds this vCPU because of an error of the host.
    fn fail(&self, reason: &str) {
        self.shared.lock().held[self.index] = true;
        self.requests.send(Request::Cpu(CpuEvent::Failed {
            cpu: self.index,
            reason: reason.to_owned(),
        }));
    }

    /// Stays out of the guest as long as the control thread wants; false: exit.
    fn parked(&mut self) -> bool {
        let shared = Arc::clone(&self.shared);
        let mut state = shared.lock();
        let index = self.index;
        loop {
            if let Some(job) = state.jobs[index].take() {
                drop(state);
                job(self.vcpu.as_mut());
                state = shared.lock();
                continue;
            }
            match state.want {
                Want::Exit => return false,
                Want::Run if !state.held[index] => {
                    state.parked[index] = false;
                    return true;
                }
                Want::Run | Want::Park => {}
            }
            state.parked[index] = true;
            for waker in state.waiters.drain(..) {
                waker.wake();
            }
            state = shared
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Enters the guest once and answers what it left for.
    fn step(&mut self, reader: &Reader) -> Option<CpuEvent> {
        let cpu = self.index;
        let exit = self.vcpu.run();
        let left = Instant::now();
        let metered = self.shared.metered.load(Ordering::Relaxed);
        let spent = metered.then(processor_time);
        let event = match exit {
            Ok(Exit::MmioRead { gpa, data }) => {
                load(&self.system, reader, gpa, data);
                None
            }
            Ok(Exit::MmioWrite { gpa, data }) => {
                store(&self.system, reader, gpa, data);
                None
            }
            Ok(Exit::PortIn { port, data, size }) => {
                for unit in data.chunks_mut(usize::from(size.max(1))) {
                    load(&self.ports, reader, u64::from(port), unit);
                }
                None
            }
            Ok(Exit::PortOut { port, data, size }) => {
                for unit in data.chunks(usize::from(size.max(1))) {
                    store(&self.ports, reader, u64::from(port), unit);
                }
                None
            }
            Ok(Exit::Halt | Exit::Interrupted) => None,
            Ok(Exit::Shutdown) => Some(CpuEvent::TripleFault { cpu }),
            Ok(Exit::MemoryFault { gpa, rip }) => Some(CpuEvent::MemoryFault { cpu, gpa, rip }),
            Ok(Exit::SystemEvent { kind }) => system_event(cpu, kind),
            Ok(Exit::InternalError { suberror, detail }) => Some(CpuEvent::Failed {
                cpu,
                reason: format!("KVM internal error {suberror}: {detail}"),
            }),
            Err(e) => Some(CpuEvent::Failed {
                cpu,
                reason: e.to_string(),
            }),
        };
        let processor = spent.map_or(Duration::ZERO, |spent| {
            processor_time().saturating_sub(spent)
        });
        self.note_stay(left.elapsed(), processor);
        event
    }

    fn note_stay(&self, stay: Duration, processor: Duration) {
        if let Some(longest) = self.shared.longest.get(self.index) {
            note(&longest.stay, stay);
            note(&longest.processor, processor);
        }
    }
}

/// Only one thread writes; who asks takes.
fn note(longest: &AtomicU64, time: Duration) {
    let time = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
    if time > longest.load(Ordering::Relaxed) {
        longest.store(time, Ordering::Relaxed);
    }
}

/// Of this thread, since it began.
fn processor_time() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    Duration::try_from(time).unwrap_or_default()
}

fn system_event(cpu: usize, kind: ebbtide_hypervisor::SystemEventKind) -> Option<CpuEvent> {
    use ebbtide_hypervisor::SystemEventKind as Kind;
    match kind {
        Kind::Shutdown => Some(CpuEvent::System { reset: false }),
        Kind::Reset => Some(CpuEvent::System { reset: true }),
        other => Some(CpuEvent::Failed {
            cpu,
            reason: format!("unexpected system event {other:?}"),
        }),
    }
}

/// An access of 1 to 8 bytes; others, which the architecture does not make, go byte by byte.
fn load(space: &AddressSpace, reader: &Reader, at: u64, data: &mut [u8]) {
    if let size @ (1 | 2 | 4 | 8) = data.len() {
        let value = space.load(reader, at, size as u8).to_le_bytes();
        data.iter_mut().zip(value).for_each(|(d, v)| *d = v);
        return;
    }
    for (offset, byte) in (0u64..).zip(data.iter_mut()) {
        *byte = space.load(reader, at.wrapping_add(offset), 1) as u8;
    }
}

fn store(space: &AddressSpace, reader: &Reader, at: u64, data: &[u8]) {
    if let size @ (1 | 2 | 4 | 8) = data.len() {
        let mut value = [0u8; 8];
        value.iter_mut().zip(data).for_each(|(v, d)| *v = *d);
        space.store(reader, at, size as u8, u64::from_le_bytes(value));
        return;
    }
    for (offset, byte) in (0u64..).zip(data) {
        space.store(reader, at.wrapping_add(offset), 1, u64::from(*byte));
    }
}
