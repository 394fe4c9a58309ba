// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The bug that is seeded, in a build of the models.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

static REACHED: AtomicBool = AtomicBool::new(false);

fn chosen() -> Option<&'static str> {
    static CHOSEN: OnceLock<Option<String>> = OnceLock::new();
    CHOSEN
        .get_or_init(|| std::env::var("EBBTIDE_SEEDED").ok())
        .as_deref()
}

/// Whether `EBBTIDE_SEEDED` names `bug`. The first time it does, `SEEDED` and the name are printed: a model that fails
/// without that line has not found the bug, it never came to it.
pub fn is_seeded(bug: &str) -> bool {
    let is = chosen() == Some(bug);
    if is && !REACHED.swap(true, Relaxed) {
        println!("SEEDED {bug}");
    }
    is
}

/// Panics if a bug is seeded that was not come to.
pub(crate) fn assert_reached(model: &str) {
    if let Some(bug) = chosen() {
        assert!(
            REACHED.load(Relaxed),
            "{model} does not come to a seeded bug {bug}"
        );
    }
}
