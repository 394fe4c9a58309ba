// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Where a JSON value begins and ends in a stream of bytes, without recursion and without looking
//! further into it than brackets and strings.
//!
//! ```text
//!            { [                    "                      last } ]
//!   Between ─────▶ Nested ◀────────────────▶ Text          ────────▶ Between, yields Value
//!      │  "                                   │ " at depth 0 ──────▶ Between, yields Value
//!      ├──▶ Text at depth 0                   │ newline, control ──▶ Between, yields Bad
//!      │ else
//!      └──▶ Bare ── newline, {, [, " ──▶ Between, yields Bare
//!
//!   limit exceeded in Nested or Text: yields Bad once, then counts brackets without keeping bytes
//! ```

use super::{Limits, ParseError};

/// How many bytes of bare text are kept, for the message.
const BARE_KEPT: usize = 64;
/// A buffer larger than this is not kept for the next value.
const BUFFER_KEPT: usize = 64 << 10;

/// What the framing found.
#[derive(Debug)]
pub(crate) enum Frame {
    /// A bracketed value or a string, in double quotes throughout.
    Value(Vec<u8>),
    /// Text that is neither.
    Bare(Vec<u8>),
    /// Something that cannot become a value.
    Bad(ParseError),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Between,
    Nested,
    Text { quote: u8, escaped: bool },
    Bare,
}

#[derive(Debug)]
pub(crate) struct Framing {
    limits: Limits,
    state: State,
    /// The value so far, rewritten to double quotes; empty while skipping.
    buffer: Vec<u8>,
    depth: u64,
    /// Bytes of the value as they came.
    taken: usize,
    /// A limit was exceeded and reported: the rest of this value is dropped.
    skipping: bool,
    /// The value spans lines, so that a newline does not end the skipping.
    multiline: bool,
}

impl Framing {
    pub(crate) fn new(limits: Limits) -> Self {
        Self {
            limits,
            state: State::Between,
            buffer: Vec::new(),
            depth: 0,
            taken: 0,
            skipping: false,
            multiline: false,
        }
    }

    pub(crate) fn is_idle(&self) -> bool {
        self.state == State::Between
    }

    /// How much memory the value so far takes.
    #[cfg(test)]
    pub(crate) fn held_bytes(&self) -> usize {
        self.buffer.capacity()
    }

    pub(crate) fn next(&mut self, input: &mut &[u8]) -> Option<Frame> {
        loop {
            self.take_plain_text(input);
            let (&byte, rest) = input.split_first()?;
            let (consumed, frame) = self.step(byte);
            if consumed {
                *input = rest;
            }
            if frame.is_some() {
                return frame;
            }
        }
    }

    /// Takes what is plain inside a string all at once, as far as the limit allows: the same as
    /// [`Framing::step`] for each byte, and much faster where most bytes of long requests are.
    fn take_plain_text(&mut self, input: &mut &[u8]) {
        let State::Text {
            quote,
            escaped: false,
        } = self.state
        else {
            return;
        };
        let allowed = if self.skipping {
            input.len()
        } else {
            self.limits.value_bytes.saturating_sub(self.taken)
        };
        let within = input.get(..allowed).unwrap_or(input);
        let ends = |&byte: &u8| {
            byte < 0x20 || byte == 0xff || byte == quote || byte == b'"' || byte == b'\\'
        };
        let length = within.iter().position(ends).unwrap_or(within.len());
        let (plain, rest) = input.split_at(length);
        self.keep(plain);
        self.taken = self.taken.saturating_add(length);
        *input = rest;
    }

    pub(crate) fn end(&mut self) -> Option<Frame> {
        match self.state {
            State::Bare => Some(self.finish_bare()),
            State::Between | State::Nested | State::Text { .. } => None,
        }
    }

    /// Looks at one byte; false when it must be looked at again in the new state.
    fn step(&mut self, byte: u8) -> (bool, Option<Frame>) {
        if is_resync(byte) {
            self.reset();
            return (
                true,
                Some(Frame::Bad(ParseError::Stray(
                    String::from_utf8_lossy(&[byte]).into_owned(),
                ))),
            );
        }
        match self.state {
            State::Between => (self.begin(byte), None),
            State::Bare => self.bare(byte),
            State::Nested => (true, self.nested(byte)),
            State::Text { quote, escaped } => (true, self.text(byte, quote, escaped)),
        }
    }

    fn begin(&mut self, byte: u8) -> bool {
        match byte {
            b' ' | b'\t' | b'\r' | b'\n' => return true,
            b'{' | b'[' => self.state = State::Nested,
            b'"' | b'\'' => {
                self.state = State::Text {
                    quote: byte,
                    escaped: false,
                };
                self.keep(b"\"");
                self.taken = 1;
                return true;
            }
            _ => self.state = State::Bare,
        }
        false
    }

    fn bare(&mut self, byte: u8) -> (bool, Option<Frame>) {
        if matches!(byte, b'\n' | b'{' | b'[' | b'"' | b'\'') {
            return (false, Some(self.finish_bare()));
        }
        if self.buffer.len() < BARE_KEPT {
            self.buffer.push(byte);
        }
        (true, None)
    }

    fn nested(&mut self, byte: u8) -> Option<Frame> {
        match byte {
            b'{' | b'[' => self.depth += 1,
            b'}' | b']' => self.depth -= 1,
            b'"' | b'\'' => {
                self.state = State::Text {
                    quote: byte,
                    escaped: false,
                }
            }
            b'\n' if self.skipping && !self.multiline => {
                self.reset();
                return None;
            }
            b'\n' => self.multiline = true,
            _ => {}
        }
        self.keep(if byte == b'\'' {
            b"\""
        } else {
            std::slice::from_ref(&byte)
        });
        self.after_byte()
    }

    fn text(&mut self, byte: u8, quote: u8, escaped: bool) -> Option<Frame> {
        if byte == b'\n' || (byte == b'\r' && !self.skipping) {
            return self.broken_text(byte);
        }
        let (kept, escaped): (&[u8], bool) = match byte {
            b'\'' if escaped => (b"'", false),
            _ if escaped => (&[b'\\', byte], false),
            b'\\' => (b"", true),
            _ if byte == quote => {
                self.keep(b"\"");
                self.state = State::Nested;
                return self.after_byte();
            }
            b'"' => (b"\\\"", false),
            _ => (std::slice::from_ref(&byte), false),
        };
        self.keep(kept);
        self.state = State::Text { quote, escaped };
        self.after_byte()
    }

    /// A string may not span lines: whoever sends this has lost a quote.
    fn broken_text(&mut self, byte: u8) -> Option<Frame> {
        let reported = self.skipping;
        let tail = self.buffer.iter().rposition(|&b| b == b'"').unwrap_or(0);
        let mut text =
            String::from_utf8_lossy(self.buffer.get(tail..).unwrap_or_default()).into_owned();
        shorten(&mut text);
        text.push(byte.into());
        self.reset();
        if reported {
            None
        } else {
            Some(Frame::Bad(ParseError::Stray(text)))
        }
    }

    /// Limits, and whether the value is complete.
    fn after_byte(&mut self) -> Option<Frame> {
        self.taken = self.taken.saturating_add(1);
        let complete = self.depth == 0 && self.state == State::Nested;
        let error = if self.depth > u64::from(self.limits.depth) {
            Some(ParseError::TooDeep(self.limits.depth))
        } else if self.taken > self.limits.value_bytes {
            Some(ParseError::TooLong(self.limits.value_bytes))
        } else {
            None
        };
        let found = match error {
            _ if self.skipping => None,
            Some(error) => Some(Frame::Bad(error)),
            None if complete => Some(Frame::Value(std::mem::take(&mut self.buffer))),
            None => return None,
        };
        if complete {
            self.reset();
            return found;
        }
        self.skipping = true;
        self.buffer = Vec::new();
        found
    }

    fn finish_bare(&mut self) -> Frame {
        let text = std::mem::take(&mut self.buffer);
        self.reset();
        Frame::Bare(text)
    }

    fn keep(&mut self, bytes: &[u8]) {
        if !self.skipping {
            self.buffer.extend_from_slice(bytes);
        }
    }

    fn reset(&mut self) {
        self.state = State::Between;
        self.buffer.clear();
        self.buffer.shrink_to(BUFFER_KEPT);
        self.depth = 0;
        self.taken = 0;
        self.skipping = false;
        self.multiline = false;
    }
}

/// Bytes that JSON and UTF-8 have no use for anywhere; QMP's way to bring a parser into a known state.
fn is_resync(byte: u8) -> bool {
    byte == 0xff || (byte < 0x20 && !matches!(byte, b'\t' | b'\r' | b'\n'))
}

/// Cuts a text for a message.
pub(crate) fn shorten(text: &mut String) {
    if let Some((at, _)) = text.char_indices().nth(BARE_KEPT) {
        text.truncate(at);
        text.push('…');
    }
}
