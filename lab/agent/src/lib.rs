// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Ebbtide's guest agent, and the messages it speaks.
//!
//! Two static programs are built from this crate, each PID 1 of its machine:
//! `ebbtide-agent` in a test guest (commands over a serial line) and
//! `ebbtide-capsule-init` in the capsule (runs one command of the host).
//! The lab uses this library for [`protocol`] and [`capsule_protocol`].

pub mod boot;
pub mod capsule_protocol;
pub mod disk;
pub mod exec;
pub mod kernel_log;
pub mod load;
pub mod pattern;
pub mod pipes;
pub mod placed;
pub mod ports;
pub mod protocol;
pub mod report;
pub mod serve;
pub mod tty;
