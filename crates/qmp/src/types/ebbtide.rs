// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What Ebbtide adds to QMP. Bytes and milliseconds throughout.

use crate::schema::{qapi_enum, qapi_struct};
use crate::types::run_state::{RunState, ShutdownCause};

qapi_enum! {
    /// What a reset is at.
    pub enum ResetStep {
        /// Removals that were asked for are completed, and requests of the last guest waited for.
        Draining = "draining",
        /// Memory that the host still uses for the last guest is replaced, or waited for.
        Memory = "memory",
        /// Registers are set to what they are at power-on, and the kernel is loaded.
        Loading = "loading",
    }
}

qapi_struct! {
    /// A reset that is under way.
    #[derive(Eq)]
    pub struct Reset {
        /// Why the machine is reset.
        cause as "cause": ShutdownCause,
        /// What it is at.
        step as "step": ResetStep,
        /// Since it began, milliseconds.
        age_ms as "age-ms": u64,
        /// The memory that it waits for, by name, as nothing can be put into its place.
        memory as "memory": Vec<String>,
    }
}

qapi_struct! {
    /// The answer to `x-ebbtide-query-status`.
    #[derive(Eq)]
    pub struct Status {
        /// What the machine is doing.
        status as "status": RunState,
        /// The reset that is under way; the guest does not run meanwhile, whatever `status` was before.
        reset as "reset": Option<Reset>,
        /// How many vCPUs it has.
        vcpus as "vcpus": u64,
        /// The process id of the VMM.
        pid as "pid": u64,
        /// The VMM's version.
        version as "version": String,
    }
}

qapi_struct! {
    /// One vCPU: an item of the answer to `x-ebbtide-query-vcpus`.
    #[derive(Copy, Eq)]
    pub struct VcpuStay {
        /// Its index.
        index as "index": u64,
        /// The longest that one exit has kept it out of the guest since this was last asked, microseconds, rounded up:
        /// from the return of KVM_RUN to its next call. Time in which the machine was stopped does not count.
        longest_exit_us as "longest-exit-us": u64,
        /// The most of its thread's processor time that one exit took, microseconds, rounded up: without what the thread
        /// spent waiting for a processor. Measured from the first time that this is asked for.
        longest_exit_cpu_us as "longest-exit-cpu-us": u64,
    }
}

qapi_struct! {
    /// The answer to `x-ebbtide-query-kvm`: how much of what devices and memory need the hypervisor has, as it has
    /// confirmed.
    #[derive(Copy, Eq)]
    pub struct Holdings {
        /// Memory slots.
        slots as "slots": u64,
        /// Eventfds that it signals for the guest's writes.
        ioeventfds as "ioeventfds": u64,
        /// Eventfds that make it interrupt the guest.
        irqfds as "irqfds": u64,
        /// Messages in its interrupt routing table.
        messages as "messages": u64,
    }
}

qapi_struct! {
    /// Pins of a RAM block: an item of the answer to `x-ebbtide-query-pins`.
    #[derive(Eq)]
    pub struct Pins {
        /// The block's name.
        block as "block": String,
        /// The thread that took them.
        thread as "thread": String,
        /// How many.
        count as "count": u64,
    }
}

qapi_struct! {
    /// Arguments of `x-ebbtide-fault-release`.
    #[derive(Eq)]
    pub struct FaultRelease {
        /// The node `x-ebbtide-fault`, or one on top of it.
        node_name as "node-name": String,
        /// How many to let go, those held longest first; all without it.
        count as "count": Option<u64>,
        /// Whether the rules are forgotten as well, so that nothing more is held.
        forget as "forget": Option<bool>,
    }
}

qapi_struct! {
    /// The answer to `x-ebbtide-fault-release`.
    #[derive(Copy, Eq)]
    pub struct FaultReleased {
        /// How many operations were let go.
        released as "released": u64,
        /// How many are held still.
        held as "held": u64,
    }
}

qapi_struct! {
    /// The answer to `x-ebbtide-query-memory`.
    #[derive(Eq)]
    pub struct Memory {
        /// What the machine booted with.
        boot as "boot": u64,
        /// What memory devices provide now.
        plugged as "plugged": u64,
        /// Both together: what the guest can use.
        total as "total": u64,
        /// The most that `total` can become.
        max as "max": u64,
        /// What the VMM process holds of the host's memory (VmRSS).
        rss as "rss": u64,
        /// The memory devices, by id.
        devices as "devices": Vec<MemoryDevice>,
    }
}

qapi_struct! {
    /// One memory device.
    #[derive(Eq)]
    pub struct MemoryDevice {
        /// Its id.
        id as "id": String,
        /// Its kind, such as `virtio-mem`.
        kind as "type": String,
        /// Its NUMA node.
        node as "node": u64,
        /// Where it lies in guest physical memory.
        memaddr as "memaddr": u64,
        /// What its sizes are multiples of.
        block_size as "block_size": u64,
        /// How much the guest is asked to use.
        requested as "requested": u64,
        /// How much the guest uses.
        size as "size": u64,
        /// The most it can provide.
        max as "max": u64,
    }
}

qapi_struct! {
    /// Arguments of `x-ebbtide-query-resize`.
    #[derive(Eq)]
    pub struct QueryResize {
        /// The memory device's id.
        id as "id": String,
    }
}

qapi_enum! {
    /// How far a resize has come.
    pub enum ResizeState {
        /// The guest is following.
        Working = "working",
        /// The guest has what was asked for.
        Reached = "reached",
        /// The guest has followed a part of the way and stopped.
        Partial = "partial",
        /// The guest does not follow.
        Stalled = "stalled",
    }
}

qapi_struct! {
    /// The answer to `x-ebbtide-query-resize`.
    #[derive(Eq)]
    pub struct Resize {
        /// The device's id.
        id as "id": String,
        /// How much the guest is asked to use.
        target as "target": u64,
        /// How much it uses.
        plugged as "plugged": u64,
        /// How far it has come.
        state as "state": ResizeState,
        /// Why it goes no further, or what a guest that is working waits for.
        reason as "reason": Option<String>,
        /// Since the target was set, milliseconds.
        since_ms as "since-ms": u64,
    }
}

qapi_enum! {
    /// How far a device is on its way out.
    pub enum RemovalPhase {
        /// Working; nobody has asked for it back, or the guest keeps it.
        Plugged = "plugged",
        /// The guest was asked to let go.
        Requested = "requested",
        /// The guest says that it is working on that.
        GuestOfflining = "guest-offlining",
        /// The guest has let go; what was under way is waited for.
        Draining = "draining",
        /// Given up: it was forced and does not drain all the same. Its memory is kept.
        Quarantined = "quarantined",
        /// The bus has forgotten it; it is being destroyed.
        Detached = "detached",
    }
}

qapi_struct! {
    /// What keeps a device from going.
    #[derive(Eq)]
    pub struct RemovalHolder {
        /// What it is, for people: a request, a mapping, a thread.
        what as "what": String,
        /// For how long, milliseconds, where that is known.
        age_ms as "age-ms": Option<u64>,
    }
}

qapi_struct! {
    /// One step of a removal.
    #[derive(Copy, Eq)]
    pub struct RemovalStep {
        /// The phase that began.
        phase as "phase": RemovalPhase,
        /// When, milliseconds after the removal was asked for.
        ms as "ms": u64,
    }
}

qapi_struct! {
    /// One device that is on its way out: an item of `x-ebbtide-query-removals`.
    #[derive(Eq)]
    pub struct Removal {
        /// Its id, if it has one.
        id as "id": Option<String>,
        /// Its path in the object tree.
        path as "path": String,
        /// How far it is.
        phase as "phase": RemovalPhase,
        /// Since the removal was asked for, milliseconds.
        age_ms as "age-ms": u64,
        /// What it waits for; none when it waits for the guest.
        holders as "holders": Vec<RemovalHolder>,
        /// The phases so far, the first one first.
        history as "history": Vec<RemovalStep>,
    }
}

qapi_enum! {
    /// What to wait for; each includes those before it.
    pub enum WaitPhase {
        /// The guest has let go: no access of its reaches the device any more.
        Isolated = "isolated",
        /// Nothing of the device is under way any more.
        Drained = "drained",
        /// The guest sees the slot empty.
        Detached = "detached",
        /// Nothing of it is left; `DEVICE_DELETED` has been sent.
        Deleted = "deleted",
    }
}

qapi_struct! {
    /// Arguments of `x-ebbtide-wait`.
    pub struct Wait {
        /// The device's id.
        id as "id": String,
        /// What to wait for.
        phase as "phase": WaitPhase,
        /// Seconds after which the command fails; without it, it waits until the removal has ended one way or another.
        timeout as "timeout": Option<f64>,
    }
}

qapi_struct! {
    /// The answer to `x-ebbtide-wait`.
    #[derive(Copy, Eq)]
    pub struct Waited {
        /// How far the device has come; it may have come further than was waited for.
        phase as "phase": WaitPhase,
        /// How long the wait took, milliseconds.
        elapsed_ms as "elapsed-ms": u64,
    }
}

qapi_struct! {
    /// Arguments of `x-ebbtide-device-force`, `x-ebbtide-device-cancel` and `x-ebbtide-device-announce`.
    #[derive(Eq)]
    pub struct DeviceId {
        /// The device's id or path.
        id as "id": String,
    }
}
