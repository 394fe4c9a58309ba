// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Compiles in the seeded bug that `EBBTIDE_SEEDED` names, for the models to find.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-env-changed=EBBTIDE_SEEDED");
    if let Ok(bug) = std::env::var("EBBTIDE_SEEDED") {
        println!("cargo::rustc-cfg=seeded=\"{bug}\"");
    }
}
