// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! JSON values out of a byte stream: any cutting, any white space, bounded memory, errors that leave
//! the stream usable.
//!
//! `framing` finds where a value begins and ends, `value` turns its bytes into a [`Value`].

pub(crate) mod framing;
pub(crate) mod value;

use std::fmt;

use serde_json::Value;

use framing::{Frame, Framing};

/// How much of a value is accepted.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Bytes of one value, white space within it included.
    pub value_bytes: usize,
    /// Levels of nested arrays and objects.
    pub depth: u32,
}

impl Limits {
    /// What a server accepts in one request. QEMU has 1024 levels too, and 64 MiB a token.
    pub const REQUEST: Limits = Limits {
        value_bytes: 1 << 20,
        depth: 1024,
    };
    /// What a client accepts in one answer.
    pub const ANSWER: Limits = Limits {
        value_bytes: 64 << 20,
        depth: 1024,
    };
}

/// Why bytes are not a value. The message is what goes on the wire.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ParseError {
    /// Text outside any value, or a byte that may not be there.
    Stray(String),
    /// A bare word that is not `true`, `false` or `null`.
    Keyword(String),
    /// More levels than [`Limits::depth`].
    TooDeep(u32),
    /// More bytes than [`Limits::value_bytes`].
    TooLong(usize),
    /// Brackets match and what is between them is not JSON.
    Syntax(String),
}

impl fmt::Display for ParseError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JSON parse error, ")?;
        match self {
            ParseError::Stray(text) => write!(f, "stray '{text}'"),
            ParseError::Keyword(word) => write!(f, "invalid keyword '{word}'"),
            ParseError::TooDeep(limit) => {
                write!(f, "nesting depth limit exceeded ({limit} levels)")
            }
            ParseError::TooLong(limit) => write!(f, "size limit exceeded ({limit} bytes)"),
            ParseError::Syntax(message) => f.write_str(message),
        }
    }
}

/// Takes bytes as they come and yields values.
///
/// JSON as RFC 8259 has it, plus QEMU's extension: strings may stand in single quotes, and `\'` is an escape.
/// Between values white space may stand or nothing.
///
/// After an error the stream goes on as follows:
/// - brackets matched: with the next byte;
/// - a limit was exceeded: with the byte after the value's last bracket, or after the line, when the
///   value was on one line;
/// - an ASCII control character other than tab, carriage return and newline, or the byte 0xFF, drops
///   whatever was begun and answers with one error. A client whose state is unknown can send one.
#[derive(Debug)]
pub struct Stream {
    framing: Framing,
}

impl Stream {
    /// A stream at its beginning.
    pub fn new(limits: Limits) -> Self {
        Self {
            framing: Framing::new(limits),
        }
    }

    /// Takes bytes off the front of `input` until a value or an error is complete; `None` when all are taken.
    pub fn next(&mut self, input: &mut &[u8]) -> Option<Result<Value, ParseError>> {
        let frame = self.framing.next(input)?;
        Some(Self::finish(frame))
    }

    /// To be called at the end of the stream: what stands there unfinished and is complete by that.
    pub fn end(&mut self) -> Option<Result<Value, ParseError>> {
        self.framing.end().map(Self::finish)
    }

    /// True when nothing but white space came since the last value.
    pub fn is_idle(&self) -> bool {
        self.framing.is_idle()
    }

    fn finish(frame: Frame) -> Result<Value, ParseError> {
        match frame {
            Frame::Value(bytes) => value::parse(&bytes),
            Frame::Bare(text) => value::parse_bare(&text),
            Frame::Bad(error) => Err(error),
        }
    }
}

/// Reads a text that is exactly one value.
///
/// # Errors
/// As a [`Stream`] would report it; also when something follows the value, or it has no end.
pub fn parse_one(text: &str) -> Result<Value, ParseError> {
    let mut stream = Stream::new(Limits::ANSWER);
    // A bare number ends with its line.
    let text = format!("{text}\n");
    let mut rest = text.as_bytes();
    let value = stream
        .next(&mut rest)
        .unwrap_or_else(|| Err(ParseError::Syntax("the text has no end".to_owned())))?;
    match std::str::from_utf8(rest).unwrap_or_default().trim() {
        "" => Ok(value),
        more => Err(ParseError::Stray(excerpt(more))),
    }
}

/// The beginning of a text, for a message.
pub(crate) fn excerpt(text: &str) -> String {
    let mut text = text.to_owned();
    framing::shorten(&mut text);
    text
}

#[cfg(test)]
mod tests;
