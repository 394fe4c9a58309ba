// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `key=value,key=value` option texts, as QEMU spells them.

use std::fmt;

/// What is wrong with an option; names the option, the value and what is accepted.
#[derive(Debug, PartialEq, Eq)]
pub struct OptionError(String);

impl OptionError {
    /// An error in the value of `option`.
    pub fn new(option: &str, text: impl fmt::Display) -> OptionError {
        OptionError(format!("{option}: {text}"))
    }
}

impl fmt::Display for OptionError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for OptionError {}

/// The keys and values of one option.
#[derive(Debug)]
pub struct KeyValues {
    option: String,
    pairs: Vec<(String, String)>,
}

impl KeyValues {
    /// Splits `text`. A first part without `=` is the value of `first_key`, if there is one. Two
    /// commas stand for one within a value.
    ///
    /// # Errors
    /// A part without a key, and a key that comes twice.
    pub fn parse(
        option: &str,
        text: &str,
        first_key: Option<&str>,
    ) -> Result<KeyValues, OptionError> {
        let mut pairs: Vec<(String, String)> = Vec::new();
        for (index, part) in split(text).into_iter().enumerate() {
            let (key, value) = match (part.split_once('='), first_key) {
                (Some((key, value)), _) => (key.to_owned(), value.to_owned()),
                (None, Some(first)) if index == 0 => (first.to_owned(), part),
                (None, _) => {
                    return Err(OptionError::new(
                        option,
                        format!("{part:?} is not of the form key=value"),
                    ));
                }
            };
            if pairs.iter().any(|(k, _)| *k == key) {
                return Err(OptionError::new(option, format!("{key} is given twice")));
            }
            pairs.push((key, value));
        }
        Ok(KeyValues {
            option: option.to_owned(),
            pairs,
        })
    }

    /// Takes the value of `key`, if it is there.
    pub fn take(&mut self, key: &str) -> Option<String> {
        let at = self.pairs.iter().position(|(k, _)| k == key)?;
        Some(self.pairs.remove(at).1)
    }

    /// Takes the value of `key`.
    ///
    /// # Errors
    /// When it is missing.
    pub fn need(&mut self, key: &str) -> Result<String, OptionError> {
        self.take(key)
            .ok_or_else(|| self.error(format!("{key}= is missing")))
    }

    /// Takes a size.
    ///
    /// # Errors
    /// A value that is not a size.
    pub fn size(&mut self, key: &str) -> Result<Option<u64>, OptionError> {
        let Some(value) = self.take(key) else {
            return Ok(None);
        };
        ebbtide_qmp::sizes::parse(&value)
            .map(Some)
            .map_err(|e| self.error(format!("{key}={value}: {e}")))
    }

    /// Takes an `on`/`off` value.
    ///
    /// # Errors
    /// Any other value.
    pub fn switch(&mut self, key: &str, default: bool) -> Result<bool, OptionError> {
        match self.take(key).as_deref() {
            None => Ok(default),
            Some("on" | "yes" | "true") => Ok(true),
            Some("off" | "no" | "false") => Ok(false),
            Some(other) => Err(self.error(format!("{key}={other}: on or off are accepted"))),
        }
    }

    /// Ends the reading: what is left over is unknown.
    ///
    /// # Errors
    /// Names the first unknown key and, if one is close, the key that may be meant.
    pub fn finish(self, known: &[&str]) -> Result<(), OptionError> {
        let stranger = self
            .pairs
            .iter()
            .find(|(k, _)| !known.contains(&k.as_str()));
        match stranger {
            None => Ok(()),
            Some((key, _)) => Err(self.error(unknown("property", key, known))),
        }
    }

    /// An error in this option.
    pub fn error(&self, text: impl fmt::Display) -> OptionError {
        OptionError::new(&self.option, text)
    }
}

/// "unknown WHAT NAME", with the nearest of `known` if one is near and all of them otherwise.
pub fn unknown(what: &str, name: &str, known: &[&str]) -> String {
    match nearest(name, known) {
        Some(near) => format!("unknown {what} {name:?}; is {near:?} meant?"),
        None => format!("unknown {what} {name:?}; there are: {}", known.join(", ")),
    }
}

fn nearest<'a>(name: &str, known: &[&'a str]) -> Option<&'a str> {
    known
        .iter()
        .map(|k| (distance(name, k), *k))
        .min()
        .filter(|(d, k)| *d <= k.len().div_ceil(2).clamp(1, 3))
        .map(|(_, k)| k)
}

/// Edit distance (insert, delete, replace).
fn distance(a: &str, b: &str) -> usize {
    let mut row: Vec<usize> = (0..=b.chars().count()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.chars().enumerate() {
            let replace = diagonal + usize::from(x != y);
            diagonal = row[j + 1];
            row[j + 1] = replace.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row.last().copied().unwrap_or(0)
}

/// Splits at single commas; two commas are one that belongs to the value.
fn split(text: &str) -> Vec<String> {
    let mut parts = vec![String::new()];
    let mut letters = text.chars().peekable();
    while let Some(c) = letters.next() {
        if c == ',' && letters.peek() != Some(&',') {
            parts.push(String::new());
            continue;
        }
        if c == ',' {
            letters.next();
        }
        if let Some(last) = parts.last_mut() {
            last.push(c);
        }
    }
    parts.retain(|p| !p.is_empty());
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> KeyValues {
        KeyValues::parse("--disk", text, Some("path")).unwrap()
    }

    #[test]
    fn values_and_defaults() {
        let mut kv = parse("a,,b.img,readonly=on,id=d0");
        assert_eq!(kv.take("path").as_deref(), Some("a,b.img"));
        assert!(kv.switch("readonly", false).unwrap());
        assert!(!kv.switch("direct", false).unwrap());
        assert_eq!(kv.need("id").unwrap(), "d0");
        kv.finish(&["path"]).unwrap();
    }

    #[test]
    fn mistakes_are_named() {
        let e = parse("x,readonyl=on").finish(&["path", "readonly"]);
        assert_eq!(
            e.unwrap_err().to_string(),
            "--disk: unknown property \"readonyl\"; is \"readonly\" meant?"
        );
        let e = parse("x,qqq=on").finish(&["path", "readonly"]).unwrap_err();
        assert!(e.to_string().contains("there are: path, readonly"));
        let e = parse("x,readonly=maybe").switch("readonly", true);
        assert!(e.unwrap_err().to_string().contains("readonly=maybe"));
        let e = KeyValues::parse("--disk", "id=a,id=b", None).unwrap_err();
        assert!(e.to_string().contains("twice"));
        let e = KeyValues::parse("--disk", "id=a,b", None).unwrap_err();
        assert!(e.to_string().contains("\"b\" is not of the form"));
        assert!(parse("readonly=on").need("path").is_err());
        let e = parse("size=many").size("size").unwrap_err().to_string();
        assert!(e.contains("size=many"), "{e}");
    }

    #[test]
    fn distances() {
        assert_eq!(distance("kitten", "sitting"), 3);
        assert_eq!(
            nearest("requsted-size", &["requested-size", "size"]),
            Some("requested-size")
        );
        assert_eq!(nearest("maks", &["size", "max", "path"]), Some("max"));
        assert_eq!(nearest("zzz", &["requested-size", "size"]), None);
    }
}
