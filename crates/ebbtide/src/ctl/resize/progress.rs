// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! How far the guest has come: a bar on a terminal, else a line now and then.

use std::io::{self, IsTerminal};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

use super::super::human;

const LINE_INTERVAL: Duration = Duration::from_secs(1);

pub(super) struct Progress {
    from: u64,
    target: u64,
    shape: Shape,
}

enum Shape {
    Bar(ProgressBar),
    Lines {
        shown: u64,
        next: Instant,
    },
    /// Somebody's program reads the JSON and does not look at standard error.
    Quiet,
}

impl Progress {
    pub(super) fn new(from: u64, target: u64, json: bool) -> Self {
        let shape = if io::stderr().is_terminal() {
            Shape::Bar(bar(from, target))
        } else if json {
            Shape::Quiet
        } else {
            Shape::Lines {
                shown: from,
                next: Instant::now() + LINE_INTERVAL,
            }
        };
        Self {
            from,
            target,
            shape,
        }
    }

    pub(super) fn show(&mut self, total: u64) {
        match &mut self.shape {
            Shape::Bar(bar) => {
                bar.set_position(done(self.from, self.target, total));
                bar.set_message(human(total));
            }
            Shape::Lines { shown, next } => {
                if total != *shown && Instant::now() >= *next {
                    eprintln!("{} of {}", human(total), human(self.target));
                    *shown = total;
                    *next = Instant::now() + LINE_INTERVAL;
                }
            }
            Shape::Quiet => {}
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Shape::Bar(bar) = &self.shape {
            bar.finish_and_clear();
        }
    }
}

fn bar(from: u64, target: u64) -> ProgressBar {
    let bar = ProgressBar::new(from.abs_diff(target));
    let template = format!(
        "{} {{bar:40}} {} {{msg}} {{elapsed}}",
        human(from),
        human(target)
    );
    if let Ok(style) = ProgressStyle::with_template(&template) {
        bar.set_style(style);
    }
    bar
}

/// How much of the way is done; the guest may begin on the wrong side of it.
fn done(from: u64, target: u64, total: u64) -> u64 {
    let (low, high) = (from.min(target), from.max(target));
    total.clamp(low, high).abs_diff(from)
}

#[cfg(test)]
mod tests {
    use super::done;

    #[test]
    fn the_way_has_a_beginning_and_an_end_in_both_directions() {
        assert_eq!(
            [100, 150, 200, 250, 50].map(|total| done(100, 200, total)),
            [0, 50, 100, 100, 0]
        );
        assert_eq!(
            [200, 150, 100, 50, 250].map(|total| done(200, 100, total)),
            [0, 50, 100, 100, 0]
        );
    }
}
