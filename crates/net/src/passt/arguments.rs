// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Which of passt's options may be asked for (passt(1)).
//!
//! Those that shape the network. Not those that name files to write, processes, users or name spaces, nor those that
//! decide how passt meets us: who can ask for a network is not to gain more by it.
//!
//! What was asked for is written anew, each option as one word with its long name. So a value is never taken for an
//! option, whatever a release of passt makes of it: an option that takes no value refuses one in the same word.

/// An option's long name and its letter.
type Names = (&'static str, Option<char>);

/// Options with a value, and without. Some are of later releases: an older passt says that it does not know them.
const VALUED: &[Names] = &[
    ("mtu", Some('m')),
    ("address", Some('a')),
    ("netmask", Some('n')),
    ("mac-addr", Some('M')),
    ("gateway", Some('g')),
    ("interface", Some('i')),
    ("outbound", Some('o')),
    ("outbound-if4", None),
    ("outbound-if6", None),
    ("dns", Some('D')),
    ("dns-forward", None),
    ("dns-host", None),
    ("search", Some('S')),
    ("hostname", Some('H')),
    ("fqdn", None),
    ("map-host-loopback", None),
    ("map-guest-addr", None),
    ("tcp-ports", Some('t')),
    ("udp-ports", Some('u')),
];
const FLAGS: &[Names] = &[
    ("quiet", Some('q')),
    ("no-dhcp-dns", None),
    ("no-dhcp-search", None),
    ("no-tcp", None),
    ("no-udp", None),
    ("no-icmp", None),
    ("no-dhcp", None),
    ("no-ndp", None),
    ("no-dhcpv6", None),
    ("no-ra", None),
    ("no-map-gw", None),
    ("freebind", None),
    ("ipv4-only", Some('4')),
    ("ipv6-only", Some('6')),
    ("one-off", Some('1')),
];

/// More nobody needs.
const COUNT_MAX: usize = 64;

/// Reads `words` as passt would and writes them anew.
///
/// # Errors
/// What is not accepted, for a person.
pub(super) fn checked(words: &[String]) -> Result<Vec<String>, String> {
    if words.len() > COUNT_MAX {
        return Err(format!("{} words, at most {COUNT_MAX}", words.len()));
    }
    if words.iter().any(|word| word.contains('\0')) {
        return Err("a zero byte".to_owned());
    }
    let mut words = words.iter();
    let mut written = Vec::new();
    while let Some(word) = words.next() {
        let (name, takes_value, attached) = option(word).ok_or_else(|| refusal(word))?;
        let value = match (takes_value, attached) {
            (true, Some(value)) => Some(value),
            (true, None) => {
                let next = words.next().map(String::as_str);
                Some(next.ok_or_else(|| format!("--{name} without its value"))?)
            }
            (false, Some(value)) => return Err(format!("--{name} takes no value, not {value:?}")),
            (false, None) => None,
        };
        written.push(match value {
            Some(value) => format!("--{name}={value}"),
            None => format!("--{name}"),
        });
    }
    Ok(written)
}

/// The option that a word begins: its name, whether it takes a value, and the value in the same word.
fn option(word: &str) -> Option<(&'static str, bool, Option<&str>)> {
    if let Some(long) = word.strip_prefix("--") {
        let (name, attached) = match long.split_once('=') {
            Some((name, value)) => (name, Some(value)),
            None => (long, None),
        };
        let (name, takes_value) = known(|it| it.0 == name)?;
        return Some((name, takes_value, attached));
    }
    let mut letters = word.strip_prefix('-')?.chars();
    let letter = letters.next()?;
    let rest = Some(letters.as_str()).filter(|rest| !rest.is_empty());
    let (name, takes_value) = known(|it| it.1 == Some(letter))?;
    Some((name, takes_value, rest))
}

/// The name of the option that matches, and whether it takes a value.
fn known(matches: impl Fn(&Names) -> bool) -> Option<(&'static str, bool)> {
    let valued = VALUED.iter().map(|it| (it, true));
    let mut all = valued.chain(FLAGS.iter().map(|it| (it, false)));
    let (names, takes_value) = all.find(|(names, _)| matches(names))?;
    Some((names.0, takes_value))
}

fn refusal(word: &str) -> String {
    let all = VALUED.iter().chain(FLAGS);
    let names: Vec<&str> = all.map(|it| it.0).collect();
    format!("{word:?}, accepted are --{}", names.join(" --"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(text: &str) -> Result<Vec<String>, String> {
        let words: Vec<String> = text.split(' ').map(str::to_owned).collect();
        checked(&words)
    }

    #[test]
    fn every_spelling_becomes_one_word_with_the_long_name() {
        let expected = ["--mtu=1500", "--ipv4-only", "--tcp-ports=8080:80"];
        for text in [
            "--mtu 1500 -4 -t 8080:80",
            "-m 1500 --ipv4-only --tcp-ports=8080:80",
            "-m1500 -4 -t8080:80",
        ] {
            assert_eq!(of(text).unwrap(), expected, "{text}");
        }
        assert_eq!(of("--dns=").unwrap(), ["--dns="]);
        assert_eq!(of("--search a=b").unwrap(), ["--search=a=b"]);
        assert_eq!(checked(&[]).unwrap(), [""; 0]);
    }

    #[test]
    fn a_value_stays_one() {
        assert_eq!(of("--dns --pcap=/x").unwrap(), ["--dns=--pcap=/x"]);
        assert_eq!(of("-D -p").unwrap(), ["--dns=-p"]);
    }

    #[test]
    fn what_writes_files_or_leads_elsewhere_is_refused() {
        for text in [
            "--log-file=/x",
            "--log-file /x",
            "-l /x",
            "--pcap /x",
            "-p/x",
            "--pid /x",
            "-P /x",
            "--runas root",
            "--netns /x",
            "--userns /x",
            "--netns-only",
            "--config-net",
            "--socket /x",
            "-s /x",
            "--fd 1",
            "-F 1",
            "--vhost-user",
            "--repair-path /x",
            "--foreground",
            "--debug",
            "--trace",
            "--stderr",
            // Abbreviations, clusters, a command or a process of pasta's, the end of the options.
            "--lo /x",
            "--mt 1500",
            "-4p/x",
            "-q4",
            "/bin/sh",
            "1234",
            "-",
            "--",
            "",
            "--mtu",
            "--no-tcp=1",
        ] {
            let refused = of(text).unwrap_err();
            assert!(!refused.is_empty(), "{text}");
        }
        assert!(checked(&["--dns=a\0--pcap=/x".to_owned()]).is_err());
        assert!(checked(&vec!["-4".to_owned(); COUNT_MAX + 1]).is_err());
        assert!(of("--pcap /x").unwrap_err().contains("\"--pcap\""));
    }
}
