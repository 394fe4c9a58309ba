// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! How far a removal has come: a line that is drawn anew on a terminal, else a line for each phase and now and then.

use std::io::{self, IsTerminal};
use std::time::{Duration, Instant};

use ebbtide_qmp::types::ebbtide::{Removal, RemovalPhase};
use indicatif::{ProgressBar, ProgressStyle};

use super::watch::standing;

const LINE_INTERVAL: Duration = Duration::from_secs(5);

pub(super) struct Progress {
    id: String,
    shape: Shape,
}

enum Shape {
    Spinner(ProgressBar),
    Lines {
        shown: Option<RemovalPhase>,
        next: Instant,
    },
    /// Somebody's program reads the JSON and does not look at standard error.
    Quiet,
}

impl Progress {
    pub(super) fn new(id: &str, json: bool) -> Self {
        let shape = if io::stderr().is_terminal() {
            Shape::Spinner(spinner())
        } else if json {
            Shape::Quiet
        } else {
            Shape::Lines {
                shown: None,
                next: Instant::now() + LINE_INTERVAL,
            }
        };
        Self {
            id: id.to_owned(),
            shape,
        }
    }

    pub(super) fn show(&mut self, removal: Option<&Removal>) {
        match &mut self.shape {
            Shape::Spinner(spinner) => {
                let standing = removal.map_or_else(|| "waiting".to_owned(), standing);
                spinner.set_message(format!("{}: {standing}", self.id));
                spinner.tick();
            }
            Shape::Lines { shown, next } => {
                let Some(removal) = removal else { return };
                if *shown != Some(removal.phase) || Instant::now() >= *next {
                    eprintln!("{}: {}", self.id, standing(removal));
                    *shown = Some(removal.phase);
                    *next = Instant::now() + LINE_INTERVAL;
                }
            }
            Shape::Quiet => {}
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Shape::Spinner(spinner) = &self.shape {
            spinner.finish_and_clear();
        }
    }
}

fn spinner() -> ProgressBar {
    let spinner = ProgressBar::new_spinner();
    if let Ok(style) = ProgressStyle::with_template("{spinner} {msg}") {
        spinner.set_style(style);
    }
    spinner
}
