// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Where Ebbtide is tried out.
//!
//! - [`packages`], [`kernel`], [`modules`], [`initramfs`], [`image`]: guest
//!   images from Debian's packages;
//! - [`capsule`]: a machine with KVM where there is none; [`probe`] chooses;
//! - [`vmm`], [`qmp`], [`guest`]: a VMM under test, from outside and from inside;
//! - [`demo`], [`system`], [`bench`]: what is done with it.

mod apt;
mod ejects;
mod elf;
mod resident;
mod scheduled;
mod stalls;

pub mod agent;
pub mod bench;
pub mod capsule;
pub mod delay;
pub mod demo;
pub mod deny;
pub mod guest;
pub mod host_log;
pub mod image;
pub mod initramfs;
pub mod kernel;
pub mod modules;
pub mod packages;
pub mod places;
pub mod probe;
pub mod process;
pub mod python;
pub mod qmp;
pub mod selftest;
pub mod system;
pub mod vmm;
