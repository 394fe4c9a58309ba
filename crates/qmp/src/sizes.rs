// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Sizes as people write and read them: `512M`, `8G`, `2MiB`, plain bytes. Units are powers of 1024.
//!
//! ```
//! use ebbtide_qmp::sizes;
//! assert_eq!(sizes::parse("512M").unwrap(), 512 << 20);
//! assert_eq!(sizes::parse("1.5 GiB").unwrap(), 1536 << 20);
//! assert_eq!(sizes::human(1536 << 20), "1.5 GiB");
//! assert_eq!(sizes::exact(1536 << 20), "1536M");
//! assert!(sizes::parse_option("--memory size", "12Q").unwrap_err().to_string().starts_with("--memory size: '12Q'"));
//! ```

use std::fmt;
use std::str::FromStr;

/// What the parser accepts, for messages.
pub const ACCEPTED: &str =
    "bytes, or a number with K, M, G, T, P or E (powers of 1024), such as 512M, 8G or 2MiB";

const UNITS: [(char, u32); 6] = [
    ('K', 10),
    ('M', 20),
    ('G', 30),
    ('T', 40),
    ('P', 50),
    ('E', 60),
];

/// Why a text is not a size.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub struct SizeError {
    option: Option<String>,
    value: String,
    reason: &'static str,
}

impl SizeError {
    fn new(value: &str, reason: &'static str) -> Self {
        Self {
            option: None,
            value: value.to_owned(),
            reason,
        }
    }

    /// The same error, naming the option the value was given for.
    #[must_use]
    pub fn for_option(mut self, option: &str) -> Self {
        self.option = Some(option.to_owned());
        self
    }
}

impl fmt::Display for SizeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(option) = &self.option {
            write!(f, "{option}: ")?;
        }
        write!(
            f,
            "'{}' is not a size: {}; accepted are {ACCEPTED}",
            self.value.escape_debug(),
            self.reason
        )
    }
}

/// Reads a size in bytes. Case does not matter, one `i` and `B` may follow the unit, a space may precede it.
///
/// # Errors
/// When the text is not a size, is not a whole number of bytes, or does not fit 64 bits.
/// `KB`, `MB`… are refused, for they mean powers of 1000 to some and of 1024 to others.
pub fn parse(text: &str) -> Result<u64, SizeError> {
    let fail = |reason| SizeError::new(text, reason);
    let body = text.trim();
    if body.is_empty() {
        return Err(fail("it is empty"));
    }
    if body.starts_with('-') {
        return Err(fail("it is negative"));
    }
    if let Some(hex) = body.strip_prefix("0x").or_else(|| body.strip_prefix("0X")) {
        return parse_hex(hex).ok_or_else(|| fail("it is not a hexadecimal number of 64 bits"));
    }
    let split = body
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(body.len());
    let (number, unit) = body.split_at(split);
    if number.is_empty() {
        return Err(fail("it does not begin with a number"));
    }
    let shift = unit_shift(unit.trim_start()).map_err(fail)?;
    scale(number, shift).map_err(fail)
}

/// [`parse`], with `option` named in the error.
///
/// # Errors
/// As [`parse`].
pub fn parse_option(option: &str, text: &str) -> Result<u64, SizeError> {
    parse(text).map_err(|error| error.for_option(option))
}

fn parse_hex(digits: &str) -> Option<u64> {
    // from_str_radix would take a sign.
    if digits.starts_with('+') {
        None
    } else {
        u64::from_str_radix(digits, 16).ok()
    }
}

fn unit_shift(unit: &str) -> Result<u32, &'static str> {
    let lower = unit.to_ascii_lowercase();
    if lower.is_empty() || lower == "b" {
        return Ok(0);
    }
    let mut rest = lower.chars();
    let letter = rest.next().unwrap_or_default().to_ascii_uppercase();
    let shift = UNITS
        .iter()
        .find(|(name, _)| *name == letter)
        .map(|(_, shift)| *shift);
    match (shift, rest.as_str()) {
        (Some(shift), "" | "i" | "ib") => Ok(shift),
        (Some(_), "b") => {
            Err("its unit could mean powers of 1000 or of 1024 (leave out the B, or write iB)")
        }
        _ => Err("its unit is not known"),
    }
}

/// `number` x 2^`shift`, exactly: 1.5G is a whole number of bytes, 0.3 is not.
fn scale(number: &str, shift: u32) -> Result<u64, &'static str> {
    const TOO_LARGE: &str = "it does not fit 64 bits";
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if (number.contains('.') && fraction.is_empty()) || fraction.contains('.') || whole.is_empty() {
        return Err("its number is malformed");
    }
    let whole: u128 = whole.parse().map_err(|_| TOO_LARGE)?;
    let mut bytes = whole
        .checked_shl(shift)
        .filter(|b| b >> shift == whole)
        .ok_or(TOO_LARGE)?;
    let fraction = fraction.trim_end_matches('0');
    if !fraction.is_empty() {
        // 60 bits of unit and 18 digits stay far below 128 bits; more digits cannot come out whole anyway
        // below 2^-60.
        if fraction.len() > 18 {
            return Err("it is not a whole number of bytes");
        }
        let digits: u128 = fraction.parse().map_err(|_| "its number is malformed")?;
        let ten_power = 10u128.pow(fraction.len() as u32);
        let scaled = digits << shift;
        if !scaled.is_multiple_of(ten_power) {
            return Err("it is not a whole number of bytes");
        }
        bytes = bytes.checked_add(scaled / ten_power).ok_or(TOO_LARGE)?;
    }
    u64::try_from(bytes).map_err(|_| TOO_LARGE)
}

/// For people: `512 MiB`, `1.5 GiB`, `1.99 GiB`, `0 B`; at most two decimals, rounded down so that
/// something that is not complete never looks complete.
pub fn human(bytes: u64) -> String {
    let Some((letter, shift)) = UNITS.iter().rev().find(|(_, shift)| bytes >> shift != 0) else {
        return format!("{bytes} B");
    };
    let hundredths = (u128::from(bytes) * 100) >> shift;
    let (whole, fraction) = (hundredths / 100, hundredths % 100);
    match (fraction, fraction % 10) {
        (0, _) => format!("{whole} {letter}iB"),
        (_, 0) => format!("{whole}.{} {letter}iB", fraction / 10),
        _ => format!("{whole}.{fraction:02} {letter}iB"),
    }
}

/// The shortest text that [`parse`] reads back as the same number: `512M`, `1536M`, `4097`.
pub fn exact(bytes: u64) -> String {
    let unit = UNITS
        .iter()
        .rev()
        .find(|(_, shift)| bytes != 0 && bytes.trailing_zeros() >= *shift);
    match unit {
        Some((letter, shift)) => format!("{}{letter}", bytes >> shift),
        None => bytes.to_string(),
    }
}

/// A size in bytes that reads and prints as this module does; for command line options.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Size(pub u64);

impl FromStr for Size {
    type Err = SizeError;

    fn from_str(text: &str) -> Result<Self, SizeError> {
        parse(text).map(Size)
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&human(self.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn reads_what_people_write() {
        for (text, bytes) in [
            ("0", 0),
            ("4096", 4096),
            ("4096B", 4096),
            ("1K", 1 << 10),
            ("512M", 512 << 20),
            ("512m", 512 << 20),
            (" 8G ", 8 << 30),
            ("2MiB", 2 << 20),
            ("2Mi", 2 << 20),
            ("2 mib", 2 << 20),
            ("1.5G", 1536 << 20),
            ("0.5K", 512),
            ("1T", 1 << 40),
            ("15.9375E", 0xff << 56),
            ("0x200000", 2 << 20),
            ("18446744073709551615", u64::MAX),
        ] {
            assert_eq!(parse(text), Ok(bytes), "{text}");
        }
    }

    #[test]
    fn refuses_the_rest_and_says_why() {
        for (text, reason) in [
            ("", "empty"),
            ("-1G", "negative"),
            ("G", "begin with a number"),
            ("12Q", "unit is not known"),
            ("1GG", "unit is not known"),
            ("512MB", "powers of 1000"),
            ("16E", "64 bits"),
            ("18446744073709551616", "64 bits"),
            ("999999999999999999999999999999999999999999", "64 bits"),
            ("1.", "malformed"),
            (".5G", "malformed"),
            ("1.2.3G", "malformed"),
            ("0.3", "whole number of bytes"),
            ("1.3K", "whole number of bytes"),
            ("0.1234567890123456789E", "whole number of bytes"),
            ("0x", "hexadecimal"),
            ("0x+1", "hexadecimal"),
            ("1e3", "unit is not known"),
            ("½G", "begin with a number"),
        ] {
            let error = parse(text).unwrap_err().to_string();
            assert!(error.contains(reason), "{text}: {error}");
            assert!(error.contains("512M"), "{error}");
        }
        let error = parse_option("--memory size", "5 bananas")
            .unwrap_err()
            .to_string();
        assert!(
            error.starts_with("--memory size: '5 bananas' is not a size"),
            "{error}"
        );
    }

    #[test]
    fn prints_for_people() {
        for (bytes, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1 << 10, "1 KiB"),
            (512 << 20, "512 MiB"),
            (1536 << 20, "1.5 GiB"),
            ((2 << 30) - 1, "1.99 GiB"),
            ((1 << 30) + (1 << 20), "1 GiB"),
            ((1 << 30) + (52 << 20), "1.05 GiB"),
            (u64::MAX, "15.99 EiB"),
        ] {
            assert_eq!(human(bytes), text);
        }
        assert_eq!(format!("{:>9}|", Size(1 << 30)), "    1 GiB|");
    }

    proptest! {
        #[test]
        fn exact_reads_back(bytes in any::<u64>(), shift in 0u32..64) {
            let bytes = bytes >> shift << shift;
            prop_assert_eq!(parse(&exact(bytes)), Ok(bytes));
        }

        #[test]
        fn any_text_gets_an_answer(text in ".{0,24}") {
            let _ = parse(&text);
            let _ = human(text.len() as u64);
        }
    }
}
