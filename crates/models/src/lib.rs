// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What concurrency models share.
//!
//! *Seeded bugs* are deviations from a protocol that stand in its source, for its models to find. [`seeded!`] is the
//! literal `false`, and nothing is left of the bug, unless the crate is built with `--cfg loom`. Then it is true for the
//! bug that the environment variable `EBBTIDE_SEEDED` names, so that one build serves them all. Each crate lists its bugs
//! in its `models.toml`; `cargo xtask models` runs them.
//!
//! With `--cfg loom`, `explore` takes a model through its schedules. A search that needs no schedules says by [`holds`]
//! what it went through.

#[cfg(loom)]
mod explore;
#[cfg(loom)]
mod seeded;

#[cfg(loom)]
pub use explore::explore;
#[cfg(loom)]
#[doc(hidden)]
pub use seeded::is_seeded;

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

/// Says, for `cargo xtask models`, that `model` held in so many `schedules`.
///
/// # Panics
/// When there was only one, or when a bug was seeded that the model did not come to.
pub fn holds(model: &str, invariant: &str, schedules: u64) {
    assert!(schedules > 1, "{model}: nothing was interleaved");
    #[cfg(loom)]
    seeded::assert_reached(model);
    println!(r#"MODEL {{"model":"{model}","invariant":"{invariant}","schedules":{schedules}}}"#);
}
