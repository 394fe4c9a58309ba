// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The ways to set up an executor that its tests go through.

use ebbtide_iothread::{Config, Kernel, Operations};

/// Runs `test` with each generation of io_uring that this kernel has, with all operations and restricted to those on
/// open files, and each of them again with a ring that is always full.
pub fn each_setup(test: impl Fn(Config)) {
    for kernel in [Kernel::Newest, Kernel::Linux5_19, Kernel::Linux5_6] {
        for operations in [Operations::All, Operations::OpenFiles] {
            for entries in [Config::default().entries, 1] {
                test(Config {
                    kernel,
                    operations,
                    entries,
                    ..Config::default()
                });
            }
        }
    }
}
