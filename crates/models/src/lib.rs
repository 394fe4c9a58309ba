// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Seeded bugs: deviations from a protocol that stand in its source, for its concurrency models to find.
//!
//! [`seeded!`] is the literal `false`, and nothing is left of the bug, unless the crate is built with `--cfg loom`. Then
//! it is true for the bug that the environment variable `EBBTIDE_SEEDED` names, so that one build serves them all. Each
//! crate lists its bugs in its `models.toml`; `cargo xtask models` runs them.

/// Whether the bug of this name, a string literal, is seeded. Its name is its own in the whole workspace.
#[cfg(not(loom))]
#[macro_export]
macro_rules! seeded {
    ($bug:literal) => {
        false
    };
}

/// Whether the bug of this name, a string literal, is seeded. Its name is its own in the whole workspace.
#[cfg(loom)]
#[macro_export]
macro_rules! seeded {
    ($bug:literal) => {
        $crate::is_seeded($bug)
    };
}

#[cfg(not(loom))]
const _: () = assert!(!seeded!("any"), "nothing is left to be decided at run time");

/// Whether `EBBTIDE_SEEDED` names `bug`. The first time it does, `SEEDED` and the name are printed: a model that fails
/// without that line has not found the bug, it never came to it.
#[cfg(loom)]
#[doc(hidden)]
pub fn is_seeded(bug: &str) -> bool {
    use std::sync::{Once, OnceLock};

    static CHOSEN: OnceLock<Option<String>> = OnceLock::new();
    static REACHED: Once = Once::new();

    let chosen = CHOSEN.get_or_init(|| std::env::var("EBBTIDE_SEEDED").ok());
    let is = chosen.as_deref() == Some(bug);
    if is {
        REACHED.call_once(|| println!("SEEDED {bug}"));
    }
    is
}
