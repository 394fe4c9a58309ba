// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Which frames a card takes (virtio 1.3, 5.1.6.5.1 to 5.1.6.5.3).

use std::collections::HashSet;

use ebbtide_net::MacAddress;

/// Most addresses of each kind that are compared one by one; with more, all of the kind are taken.
const TABLE_ENTRIES_MAX: usize = 64;
/// Number of VLANs.
const VLANS: u16 = 4096;
/// EtherType of a VLAN tag (IEEE 802.1Q).
const VLAN_TAG: [u8; 2] = [0x81, 0x00];

/// Addresses of one kind.
#[derive(Debug, Clone, Default)]
pub(super) struct Table(Option<HashSet<[u8; 6]>>);

impl Table {
    /// A table of these; of more than are compared one by one it takes all.
    pub(super) fn new(addresses: &[[u8; 6]]) -> Table {
        let few = addresses.len() <= TABLE_ENTRIES_MAX;
        Table(few.then(|| addresses.iter().copied().collect()))
    }

    fn contains(&self, address: &[u8; 6]) -> bool {
        self.0.as_ref().is_none_or(|few| few.contains(address))
    }
}

/// What the driver can switch with a command that has one byte.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Switch {
    Promiscuous,
    AllMulticast,
    AllUnicast,
    NoMulticast,
    NoUnicast,
    NoBroadcast,
}

/// The filter of one driver.
#[derive(Debug, Clone)]
pub(super) struct Filter {
    mac: MacAddress,
    promiscuous: bool,
    all_multicast: bool,
    all_unicast: bool,
    no_multicast: bool,
    no_unicast: bool,
    no_broadcast: bool,
    unicast: Table,
    multicast: Table,
    /// The VLANs whose frames are taken; `None`: of all.
    vlans: Option<HashSet<u16>>,
}

impl Filter {
    /// As a driver finds it: everything passes until it says what it wants, except that with `by_vlan` a driver that is
    /// not promiscuous any more has to name its VLANs.
    pub(super) fn new(mac: MacAddress, by_vlan: bool) -> Filter {
        Filter {
            mac,
            promiscuous: true,
            all_multicast: false,
            all_unicast: false,
            no_multicast: false,
            no_unicast: false,
            no_broadcast: false,
            unicast: Table::new(&[]),
            multicast: Table::new(&[]),
            vlans: by_vlan.then(HashSet::new),
        }
    }

    pub(super) fn mac(&self) -> MacAddress {
        self.mac
    }

    pub(super) fn set_mac(&mut self, mac: MacAddress) {
        self.mac = mac;
    }

    pub(super) fn switch(&mut self, what: Switch, on: bool) {
        *match what {
            Switch::Promiscuous => &mut self.promiscuous,
            Switch::AllMulticast => &mut self.all_multicast,
            Switch::AllUnicast => &mut self.all_unicast,
            Switch::NoMulticast => &mut self.no_multicast,
            Switch::NoUnicast => &mut self.no_unicast,
            Switch::NoBroadcast => &mut self.no_broadcast,
        } = on;
    }

    pub(super) fn set_tables(&mut self, unicast: Table, multicast: Table) {
        self.unicast = unicast;
        self.multicast = multicast;
    }

    /// False: there is no such VLAN, or no filter by VLAN.
    pub(super) fn set_vlan(&mut self, vlan: u16, taken: bool) -> bool {
        let Some(vlans) = self.vlans.as_mut().filter(|_| vlan < VLANS) else {
            return false;
        };
        if taken {
            vlans.insert(vlan);
        } else {
            vlans.remove(&vlan);
        }
        true
    }

    /// Whether the driver gets the frame. One shorter than its header nobody gets.
    pub(super) fn takes(&self, frame: &[u8]) -> bool {
        let Some((destination, rest)) = frame.split_first_chunk::<6>() else {
            return false;
        };
        // Source address and EtherType, then perhaps the tag.
        let [_, _, _, _, _, _, t0, t1, behind @ ..] = rest else {
            return false;
        };
        if self.promiscuous {
            return true;
        }
        if [*t0, *t1] == VLAN_TAG && !self.takes_tag(behind) {
            return false;
        }
        if *destination == MacAddress::BROADCAST.0 {
            return !self.no_broadcast;
        }
        if MacAddress(*destination).is_group() {
            return !self.no_multicast
                && (self.all_multicast || self.multicast.contains(destination));
        }
        !self.no_unicast
            && (self.all_unicast
                || *destination == self.mac.0
                || self.unicast.contains(destination))
    }

    fn takes_tag(&self, tag: &[u8]) -> bool {
        let (Some(vlans), [high, low, ..]) = (&self.vlans, tag) else {
            return self.vlans.is_none();
        };
        vlans.contains(&(u16::from_be_bytes([*high, *low]) % VLANS))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ME: [u8; 6] = [0x52, 0x54, 0, 0, 0, 1];
    const OTHER: [u8; 6] = [0x52, 0x54, 0, 0, 0, 2];
    const GROUP: [u8; 6] = [0x01, 0, 0x5e, 0, 0, 1];
    const GROUP6: [u8; 6] = [0x33, 0x33, 0, 0, 0, 1];
    const ALL: [u8; 6] = [0xff; 6];

    fn frame(to: [u8; 6], behind: &[u8]) -> Vec<u8> {
        [&to[..], &OTHER, behind].concat()
    }

    fn filter(by_vlan: bool) -> Filter {
        let mut filter = Filter::new(MacAddress(ME), by_vlan);
        filter.switch(Switch::Promiscuous, false);
        filter
    }

    fn taken(filter: &Filter) -> [bool; 5] {
        [ME, OTHER, GROUP, GROUP6, ALL].map(|to| filter.takes(&frame(to, &[8, 0])))
    }

    #[test]
    fn everything_until_the_driver_says_something() {
        assert_eq!(taken(&Filter::new(MacAddress(ME), true)), [true; 5]);
        assert_eq!(taken(&filter(true)), [true, false, false, false, true]);
    }

    #[test]
    fn switches() {
        let with = |switches: &[Switch]| {
            let mut filter = filter(false);
            for switch in switches {
                filter.switch(*switch, true);
            }
            taken(&filter)
        };
        use Switch::*;
        assert_eq!(with(&[Promiscuous]), [true; 5]);
        assert_eq!(with(&[AllMulticast]), [true, false, true, true, true]);
        assert_eq!(with(&[AllUnicast]), [true, true, false, false, true]);
        assert_eq!(
            with(&[AllMulticast, NoMulticast]),
            [true, false, false, false, true]
        );
        assert_eq!(
            with(&[AllUnicast, NoUnicast]),
            [false, false, false, false, true]
        );
        assert_eq!(with(&[NoBroadcast]), [true, false, false, false, false]);
    }

    #[test]
    fn tables() {
        let mut filter = filter(false);
        filter.set_tables(Table::new(&[OTHER]), Table::new(&[GROUP]));
        assert_eq!(taken(&filter), [true, true, true, false, true]);
        let many = [[0x11; 6]; TABLE_ENTRIES_MAX + 1];
        filter.set_tables(Table::new(&[]), Table::new(&many));
        assert_eq!(taken(&filter), [true, false, true, true, true]);
        filter.set_tables(Table::new(&many), Table::new(&many[1..]));
        assert_eq!(taken(&filter), [true, true, false, false, true]);
        filter.set_mac(MacAddress(OTHER));
        filter.set_tables(Table::new(&[]), Table::new(&[]));
        assert_eq!(taken(&filter), [false, true, false, false, true]);
    }

    #[test]
    fn vlans() {
        let tagged = |vlan: u16| {
            let [high, low] = vlan.to_be_bytes();
            frame(ME, &[0x81, 0, high, low, 8, 0])
        };
        assert!(filter(false).takes(&tagged(5)));
        assert!(!filter(false).set_vlan(5, true));
        let mut filter = filter(true);
        assert!(!filter.takes(&tagged(5)));
        assert!(filter.set_vlan(5, true) && filter.set_vlan(4095, true));
        assert!(!filter.set_vlan(4096, true));
        // The other bits of the tag are priority.
        assert!(filter.takes(&tagged(0xe005)) && filter.takes(&tagged(4095)));
        assert!(!filter.takes(&tagged(6)) && !filter.takes(&frame(ME, &[0x81, 0, 0])));
        assert!(filter.set_vlan(5, false));
        assert!(!filter.takes(&tagged(5)));
        filter.switch(Switch::Promiscuous, true);
        assert!(filter.takes(&tagged(5)));
    }

    #[test]
    fn what_is_no_frame() {
        let filter = Filter::new(MacAddress(ME), false);
        for len in 0..14 {
            assert!(!filter.takes(&[0; 14][..len]));
        }
        assert!(filter.takes(&[0; 14]));
    }
}
