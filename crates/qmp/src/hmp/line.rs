// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! One line: its name, options and words, and what is said when they do not fit.

/// A single-letter option.
#[derive(Debug, Clone, Copy)]
pub(super) struct Flag {
    pub(super) letter: char,
    pub(super) help: &'static str,
}

/// What follows the options. The texts are for the help.
#[derive(Debug, Clone, Copy)]
pub(super) enum Words {
    /// These, and nothing else.
    Exactly(&'static [&'static str]),
    /// This one, or none.
    AtMostOne(&'static str),
    /// Whatever there is, as one text.
    Rest(&'static str),
    /// These, and then whatever there is, which must be something.
    ThenRest(&'static [&'static str], &'static str),
}

/// One command.
#[derive(Debug)]
pub(super) struct Spec {
    pub(super) names: &'static [&'static str],
    pub(super) options: &'static [Flag],
    pub(super) words: Words,
    pub(super) help: &'static str,
}

/// What was found in a line.
#[derive(Debug, Default)]
pub(super) struct Found {
    pub(super) options: Vec<char>,
    pub(super) words: Vec<String>,
}

pub(super) fn find<'a>(specs: &'a [Spec], name: &str) -> Option<&'a Spec> {
    specs.iter().find(|spec| spec.names.contains(&name))
}

pub(super) fn unknown(name: &str) -> String {
    format!("unknown command: '{}'\r\n", crate::json::excerpt(name))
}

/// The first word and what follows it.
pub(super) fn split_name(line: &str) -> (&str, &str) {
    match line.split_once(char::is_whitespace) {
        Some((name, rest)) => (name, rest.trim_start()),
        None => (line, ""),
    }
}

/// Reads what follows the name. `prefix` is `info ` for its subcommands.
pub(super) fn read(spec: &Spec, prefix: &str, rest: &str) -> Result<Found, String> {
    let full = spec.names.join("|");
    let short = spec.names.first().copied().unwrap_or_default();
    let fail = |what: String| {
        format!("{full}: {what}\r\nTry \"help {prefix}{short}\" for more information\r\n")
    };
    let mut found = Found::default();
    let mut rest = if matches!(spec.words, Words::Rest(_)) {
        rest
    } else {
        read_options(spec, rest, &mut found).map_err(fail)?
    };
    let next = |rest: &mut &str| word(rest).map_err(|message| fail(message.to_owned()));
    match spec.words {
        Words::Rest(_) => {
            found.words.push(rest.to_owned());
            return Ok(found);
        }
        Words::AtMostOne(_) => found.words.extend(next(&mut rest)?),
        Words::Exactly(names) | Words::ThenRest(names, _) => {
            for _ in names {
                let word = next(&mut rest)?.ok_or_else(|| fail("string expected".to_owned()))?;
                found.words.push(word);
            }
        }
    }
    match (spec.words, rest.trim()) {
        (Words::ThenRest(..), "") => Err(fail("string expected".to_owned())),
        (Words::ThenRest(..), text) => {
            found.words.push(text.to_owned());
            Ok(found)
        }
        (_, "") => Ok(found),
        _ => Err(fail("extraneous characters at the end of line".to_owned())),
    }
}

/// Takes `-x` and `-xy` off the front.
fn read_options<'a>(spec: &Spec, mut rest: &'a str, found: &mut Found) -> Result<&'a str, String> {
    while !spec.options.is_empty() && rest.starts_with('-') {
        let (options, after) = split_name(rest);
        for letter in options.chars().skip(1) {
            if !spec.options.iter().any(|option| option.letter == letter) {
                return Err(format!("unsupported option -{letter}"));
            }
            found.options.push(letter);
        }
        rest = after;
    }
    Ok(rest)
}

/// Takes one word off the front; it may stand in double quotes, with `\"`, `\\`, `\n` and `\t` in them.
fn word(rest: &mut &str) -> Result<Option<String>, &'static str> {
    let line = rest.trim_start();
    let Some(quoted) = line.strip_prefix('"') else {
        let (word, after) = split_name(line);
        *rest = after;
        return Ok(Some(word.to_owned()).filter(|word| !word.is_empty()));
    };
    let mut word = String::new();
    let mut letters = quoted.char_indices();
    while let Some((at, letter)) = letters.next() {
        match letter {
            '"' => {
                *rest = quoted.get(at + 1..).unwrap_or_default();
                return Ok(Some(word));
            }
            '\\' => match letters.next() {
                Some((_, escaped @ ('"' | '\\' | '\''))) => word.push(escaped),
                Some((_, 'n')) => word.push('\n'),
                Some((_, 't')) => word.push('\t'),
                _ => return Err("unsupported escape code"),
            },
            _ => word.push(letter),
        }
    }
    Err("unterminated string")
}

/// The help of all commands of a kind.
pub(super) fn help_all(specs: &[Spec], prefix: &str) -> String {
    specs.iter().map(|spec| help_one(spec, prefix)).collect()
}

/// `name [-x] words  -- help`
pub(super) fn help_one(spec: &Spec, prefix: &str) -> String {
    let mut usage = format!("{prefix}{}", spec.names.join("|"));
    for option in spec.options {
        usage.push_str(&format!(" [-{}]", option.letter));
    }
    let words: Vec<String> = match spec.words {
        Words::Exactly(names) => names.iter().map(|name| (*name).to_owned()).collect(),
        Words::AtMostOne(name) => vec![format!("[{name}]")],
        Words::Rest(name) => vec![name.to_owned()],
        Words::ThenRest(names, last) => names
            .iter()
            .chain([&last])
            .map(|name| (*name).to_owned())
            .collect(),
    };
    for word in words {
        usage.push(' ');
        usage.push_str(&word);
    }
    let options: Vec<String> = spec
        .options
        .iter()
        .map(|option| format!("-{}: {}", option.letter, option.help))
        .collect();
    let options = if options.is_empty() {
        String::new()
    } else {
        format!(" ({})", options.join("; "))
    };
    format!("{usage}  -- {}{options}\r\n", spec.help)
}
