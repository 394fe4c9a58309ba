// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The crate's error type.

use std::io;
use std::path::PathBuf;

/// Why a device or the host side of one could not be made.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Not a character device specification.
    #[error("character device \"{0}\": expected stdio, file:PATH, unix:PATH or off")]
    Spec(String),
    /// A file could not be opened for output.
    #[error("character device file {}: {source}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// The host's answer.
        source: io::Error,
    },
    /// Somebody listens there already.
    #[error("socket {} is in use: this process or another listens there", .0.display())]
    SocketInUse(PathBuf),
    /// Something that is not a socket is there.
    #[error("{} exists and is not a socket", .0.display())]
    NotASocket(PathBuf),
    /// The socket could not be made.
    #[error("socket {}: {source}", path.display())]
    Socket {
        /// Its path.
        path: PathBuf,
        /// The host's answer.
        source: io::Error,
    },
    /// A watchdog cannot do that.
    #[error("watchdog action \"{0}\": expected reset, shutdown, poweroff, pause, debug or none")]
    WatchdogAction(String),
    /// Nor that, though other machines can.
    #[error(
        "watchdog action inject-nmi is not supported: this machine cannot raise an NMI in a guest"
    )]
    WatchdogNmi,
    /// Memory that cannot be shared with a guest by ivshmem.
    #[error("{name}: memdev {memdev}: {reason}")]
    SharedMemory {
        /// The device.
        name: String,
        /// The RAM block.
        memdev: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A kind of device there is none of.
    #[error("device {driver} is not supported: {reason}")]
    Unsupported {
        /// What it is called.
        driver: String,
        /// Why not, and what there is instead.
        reason: &'static str,
    },
    /// The thread a device needs is ending.
    #[error("{name}: thread {thread}: {source}")]
    Stopped {
        /// The device.
        name: String,
        /// The thread.
        thread: String,
        /// What it said.
        source: ebbtide_iothread::Stopped,
    },
    /// A PCI function could not be made.
    #[error(transparent)]
    Pci(#[from] ebbtide_bus::pci::PciError),
    /// An eventfd could not be made.
    #[error("{name}: eventfd: {source}")]
    Eventfd {
        /// The device.
        name: String,
        /// The host's answer.
        source: io::Error,
    },
    /// Standard input or output could not be used.
    #[error("standard input and output: {0}")]
    Stdio(io::Error),
}
