// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Durations on the command line: seconds, with a fraction if need be.

use std::time::Duration;

/// A time to wait that may be no time at all.
///
/// # Errors
/// What is accepted, when `text` is not that.
pub fn from_zero(text: &str) -> Result<Duration, String> {
    parse(text).ok_or_else(|| "accepted is a number of seconds, such as 30 or 0.5".to_owned())
}

/// A time to wait.
///
/// # Errors
/// What is accepted, when `text` is not that.
pub fn above_zero(text: &str) -> Result<Duration, String> {
    parse(text)
        .filter(|time| !time.is_zero())
        .ok_or_else(|| "accepted is a number of seconds above 0, such as 30 or 0.5".to_owned())
}

fn parse(text: &str) -> Option<Duration> {
    Duration::try_from_secs_f64(text.trim().parse().ok()?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seconds_may_have_a_fraction() {
        assert_eq!(above_zero("0.5"), Ok(Duration::from_millis(500)));
        assert_eq!(from_zero("0"), Ok(Duration::ZERO));
        for text in ["0", "-1", "inf", "NaN", "x", "", "1e300"] {
            assert!(
                above_zero(text).unwrap_err().contains("such as 30"),
                "{text}"
            );
            assert!(text == "0" || from_zero(text).is_err(), "{text}");
        }
    }
}
