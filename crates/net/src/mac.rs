// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! MAC addresses.

use std::fmt;
use std::str::FromStr;

/// The address of a network card, as text `52:54:00:12:34:56`.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct MacAddress(pub [u8; 6]);

/// A text that is no address of a network card.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "MAC address `{0}`: expected six bytes in hexadecimal such as 52:54:00:12:34:56, not of a group and not zero"
)]
pub struct MacError(String);

impl MacAddress {
    /// All stations.
    pub const BROADCAST: MacAddress = MacAddress([0xff; 6]);

    /// The address QEMU gives to card number `card` of a machine, from 0 on.
    pub fn of_card(card: u8) -> MacAddress {
        MacAddress([0x52, 0x54, 0x00, 0x12, 0x34, 0x56_u8.wrapping_add(card)])
    }

    /// Whether it names a group of stations.
    pub fn is_group(&self) -> bool {
        let [first, ..] = self.0;
        first & 1 != 0
    }
}

impl FromStr for MacAddress {
    type Err = MacError;

    fn from_str(text: &str) -> Result<MacAddress, MacError> {
        let error = || MacError(text.to_owned());
        let mut address = [0; 6];
        let mut parts = text.split([':', '-']);
        for byte in &mut address {
            let part = parts.next().ok_or_else(error)?;
            let digits = (1..=2).contains(&part.len()) && !part.starts_with('+');
            let parsed = u8::from_str_radix(part, 16).ok().filter(|_| digits);
            *byte = parsed.ok_or_else(error)?;
        }
        let address = MacAddress(address);
        if parts.next().is_some() || address.is_group() || address.0 == [0; 6] {
            return Err(error());
        }
        Ok(address)
    }
}

impl fmt::Display for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl fmt::Debug for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_as_text() {
        let address: MacAddress = "52:54:0:Ab:CD:ef".parse().unwrap();
        assert_eq!(address, MacAddress([0x52, 0x54, 0, 0xab, 0xcd, 0xef]));
        assert_eq!(address.to_string(), "52:54:00:ab:cd:ef");
        assert_eq!(address.to_string().parse(), Ok(address));
        for text in [
            "",
            "52:54:00:12:34",
            "52:54:00:12:34:56:78",
            "52:54:00:12:34:5g",
            "52:54:00:12:34:+5",
            "52:54:00:12:34:",
            "52:54:00:12:34:567",
            "01:00:5e:00:00:01",
            "00:00:00:00:00:00",
            "ff:ff:ff:ff:ff:ff",
        ] {
            let error = text.parse::<MacAddress>().unwrap_err().to_string();
            assert!(error.contains(&format!("`{text}`")), "{error}");
        }
    }

    #[test]
    fn cards_differ() {
        assert_eq!(MacAddress::of_card(0).to_string(), "52:54:00:12:34:56");
        assert_eq!(MacAddress::of_card(1).to_string(), "52:54:00:12:34:57");
        assert!(!MacAddress::of_card(255).is_group() && MacAddress::BROADCAST.is_group());
    }
}
