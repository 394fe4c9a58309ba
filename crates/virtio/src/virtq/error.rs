// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What can be wrong with a virtqueue.

use ebbtide_memory::{AccessError, Gpa};

/// The parts of a split virtqueue in guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ring {
    /// The descriptor table.
    Descriptors,
    /// The available ring, which the driver writes.
    Available,
    /// The used ring, which the device writes.
    Used,
    /// An indirect descriptor table.
    Indirect,
}

impl std::fmt::Display for Ring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Ring::Descriptors => "descriptor table",
            Ring::Available => "available ring",
            Ring::Used => "used ring",
            Ring::Indirect => "indirect descriptor table",
        })
    }
}

/// Why a virtqueue cannot be used, or not any further.
#[derive(Debug, thiserror::Error)]
pub enum QueueError {
    /// The queue size is not a power of two from 1 to 32768 (2.7).
    #[error("queue size {size} is not a power of two up to 32768")]
    Size {
        /// What was asked for.
        size: u16,
    },
    /// A ring is not aligned as 2.7 demands.
    #[error("{ring} at {gpa} is not aligned to {alignment} bytes")]
    Misaligned {
        /// Which one.
        ring: Ring,
        /// Where it was put.
        gpa: Gpa,
        /// What it must be aligned to.
        alignment: u64,
    },
    /// A ring or table is not (or no longer) in guest RAM.
    #[error("{ring} at {gpa}: {source}")]
    Access {
        /// Which one.
        ring: Ring,
        /// Where it is.
        gpa: Gpa,
        /// What memory said.
        #[source]
        source: AccessError,
    },
    /// The features ask for a ring layout that is not implemented.
    #[error("the packed ring layout is not supported")]
    PackedRing,
    /// The driver says it made more chains available than the queue can hold.
    #[error("available index {index} is more than {size} ahead of {next}")]
    AvailIndexJump {
        /// The index the driver wrote.
        index: u16,
        /// The index of the next chain to take.
        next: u16,
        /// The queue size.
        size: u16,
    },
    /// The driver made chains available again before they were used.
    #[error("all {size} chains of the queue are in flight and the driver made another available")]
    TooManyInFlight {
        /// The queue size.
        size: u16,
    },
    /// The driver made a chain available that the device still has.
    #[error("chain {head} is in flight and the driver made it available again")]
    HeadInFlight {
        /// First descriptor of the chain.
        head: u16,
    },
    /// A chain's head or `next` lies outside its table.
    #[error("descriptor index {index} is outside a table of {entries} entries")]
    DescriptorIndex {
        /// The index.
        index: u16,
        /// Entries of the table it was used on.
        entries: u32,
    },
    /// A chain has more descriptors than allowed; it may be a loop.
    #[error("chain {head} has more than {limit} descriptors")]
    ChainTooLong {
        /// First descriptor of the chain.
        head: u16,
        /// How many there may be.
        limit: u32,
    },
    /// A device-readable buffer follows a device-writable one (2.7.4.2).
    #[error("chain {head} has a readable buffer behind a writable one")]
    ReadableAfterWritable {
        /// First descriptor of the chain.
        head: u16,
    },
    /// The buffers of a chain have more than `u32::MAX` bytes together (2.7.5).
    #[error("chain {head} is longer than 4 GiB")]
    LengthOverflow {
        /// First descriptor of the chain.
        head: u16,
    },
    /// A buffer ends behind the last guest-physical address.
    #[error("buffer of {length} bytes at {gpa} wraps around the address space")]
    AddressOverflow {
        /// Where the buffer starts.
        gpa: Gpa,
        /// Its bytes.
        length: u32,
    },
    /// An indirect descriptor without the feature having been negotiated.
    #[error("chain {head} has an indirect descriptor, which was not negotiated")]
    IndirectNotNegotiated {
        /// First descriptor of the chain.
        head: u16,
    },
    /// An indirect descriptor inside an indirect table.
    #[error("chain {head} has an indirect descriptor inside an indirect table")]
    IndirectNested {
        /// First descriptor of the chain.
        head: u16,
    },
    /// An indirect descriptor that also has a successor.
    #[error("chain {head} goes on behind an indirect descriptor")]
    IndirectWithNext {
        /// First descriptor of the chain.
        head: u16,
    },
    /// An indirect table whose length is no positive multiple of a descriptor's.
    #[error("indirect descriptor table of {length} bytes is not a positive multiple of 16")]
    IndirectLength {
        /// Its bytes.
        length: u32,
    },
    /// The device returned a chain that it has not got.
    #[error("chain {head} returned to a queue of size {size} with {in_flight} in flight")]
    NotInFlight {
        /// First descriptor of the chain.
        head: u16,
        /// The queue size.
        size: u16,
        /// How many chains the device has.
        in_flight: u16,
    },
    /// An earlier error broke the queue; only a reset mends it.
    #[error("the queue is broken by an earlier error")]
    Broken,
    /// Saved indices that no queue of this size can have had.
    #[error("saved indices {next_avail} and {next_used} do not fit a queue of size {size}")]
    State {
        /// Index of the next chain to take.
        next_avail: u16,
        /// Index of the next used entry.
        next_used: u16,
        /// The queue size.
        size: u16,
    },
}
