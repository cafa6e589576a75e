//! The client's side of the wire: a stream of JSON values with nothing between them.
//!
//! Clients send commands without a newline, several in one packet or one in several. So the bytes are framed here,
//! one by one, by the rules of QEMU's lexer (`qobject/json-lexer.c`, `json-streamer.c`), and each whole value is then
//! given to `serde_json`. What QMP accepts beyond JSON, strings in single quotes and the escape `\'`, is rewritten to
//! plain JSON on the way (`docs/interop/qmp-spec.rst`).

use serde_json::Value;

/// The longest value in bytes. QEMU takes 64 MiB; the longest command here is a transaction, with a bitmap and a backup of each
/// of some hundred disks. A parsed value may take some 90 times as much memory as its text, and every client may send one,
/// hence the modesty.
pub(crate) const MAX_LENGTH: usize = 64 << 10;

/// How deep braces and brackets may nest. QEMU takes 1024; `serde_json` itself refuses at 128.
pub(crate) const MAX_DEPTH: usize = 100;

/// Why no value came out of the stream.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub(crate) enum StreamError {
    /// A byte that no JSON text has at this place. What was read of the value is forgotten and the stream goes on
    /// after the next brace, bracket, comma, colon or control character.
    #[error("JSON parse error, stray '{}'", [*.0].escape_ascii())]
    Stray(u8),
    /// The value is whole but wrong. The stream goes on after it.
    #[error("JSON parse error, {0}")]
    Syntax(String),
    /// Longer than [`MAX_LENGTH`]. The stream cannot go on: the rest of a long string must not be taken for commands.
    #[error("JSON token size limit exceeded")]
    TooLong,
    /// Deeper than [`MAX_DEPTH`]. The stream cannot go on.
    #[error("JSON nesting depth limit exceeded")]
    TooDeep,
}

impl StreamError {
    /// Whether nothing that follows can be understood.
    pub(crate) fn is_fatal(&self) -> bool {
        matches!(self, Self::TooLong | Self::TooDeep)
    }
}

/// Bytes in, values out. Holds at most one incomplete value.
#[derive(Debug, Default)]
pub(crate) struct Stream {
    /// The value so far, as plain JSON.
    text: Vec<u8>,
    state: State,
    braces: usize,
    brackets: usize,
}

#[derive(Clone, Copy, Debug, Default)]
enum State {
    /// Between two values.
    #[default]
    Between,
    /// After a stray byte.
    Recovery,
    /// In a number or keyword that is a value of its own; the byte after it ends it.
    Scalar,
    /// In an object or array, outside of strings.
    Nested,
    /// In a string.
    Quoted { quote: u8, escaped: bool },
}

/// What a byte did.
enum Step {
    More,
    /// The value is whole.
    Whole,
    /// The value was whole before this byte, which has yet to be looked at.
    WholeBefore,
    Failed(StreamError),
}

impl Stream {
    /// Takes bytes off the front of `input` up to the end of the next value, or all of them if it has no end yet.
    pub(crate) fn next(&mut self, input: &mut &[u8]) -> Option<Result<Value, StreamError>> {
        while let Some((&byte, rest)) = input.split_first() {
            let step = self.step(byte);
            if !matches!(step, Step::WholeBefore) {
                *input = rest;
            }
            match step {
                Step::More => {}
                Step::Whole | Step::WholeBefore => return Some(self.finish()),
                Step::Failed(error) => {
                    let state =
                        if matches!(error, StreamError::Stray(_)) { State::Recovery } else { State::Between };
                    *self = Self { state, ..Self::default() };
                    return Some(Err(error));
                }
            }
        }
        None
    }

    fn finish(&mut self) -> Result<Value, StreamError> {
        let text = std::mem::take(self).text;
        serde_json::from_slice(&text).map_err(|error| StreamError::Syntax(error.to_string()))
    }

    fn step(&mut self, byte: u8) -> Step {
        if self.text.len() >= MAX_LENGTH {
            return Step::Failed(StreamError::TooLong);
        }
        match self.state {
            State::Recovery if resynchronizes(byte) => {
                self.state = State::Between;
                self.begin(byte)
            }
            State::Recovery => Step::More,
            State::Between => self.begin(byte),
            State::Scalar if is_scalar(byte) => self.keep(byte),
            State::Scalar => Step::WholeBefore,
            State::Nested => self.nested(byte),
            State::Quoted { quote, escaped } => self.quoted(byte, quote, escaped),
        }
    }

    fn begin(&mut self, byte: u8) -> Step {
        match byte {
            b' ' | b'\t' | b'\r' | b'\n' => Step::More,
            b'}' | b']' | b',' | b':' => Step::Failed(StreamError::Syntax("expecting value".to_owned())),
            _ if is_scalar(byte) => {
                self.state = State::Scalar;
                self.keep(byte)
            }
            _ => self.nested(byte),
        }
    }

    fn nested(&mut self, byte: u8) -> Step {
        self.state = State::Nested;
        match byte {
            b'"' | b'\'' => {
                self.state = State::Quoted { quote: byte, escaped: false };
                return self.keep(b'"');
            }
            b'{' => self.braces += 1,
            b'[' => self.brackets += 1,
            b'}' => return self.close(byte),
            b']' => return self.close(byte),
            b',' | b':' | b' ' | b'\t' | b'\r' | b'\n' => {}
            _ if is_scalar(byte) => {}
            _ => return Step::Failed(StreamError::Stray(byte)),
        }
        if self.braces + self.brackets > MAX_DEPTH {
            return Step::Failed(StreamError::TooDeep);
        }
        self.keep(byte)
    }

    /// As QEMU counts: the value ends where both counts are zero, or where one would go below.
    fn close(&mut self, byte: u8) -> Step {
        self.text.push(byte);
        let count = if byte == b'}' { &mut self.braces } else { &mut self.brackets };
        match count.checked_sub(1) {
            Some(left) => *count = left,
            None => return Step::Whole,
        }
        if self.braces + self.brackets == 0 { Step::Whole } else { Step::More }
    }

    fn quoted(&mut self, byte: u8, quote: u8, escaped: bool) -> Step {
        // UTF-8 never has 0xFE and 0xFF; whether the rest is UTF-8 is seen when the value is whole.
        if !(0x20..0xFE).contains(&byte) {
            return Step::Failed(StreamError::Stray(byte));
        }
        self.state = State::Quoted { quote, escaped: !escaped && byte == b'\\' };
        match byte {
            b'\'' if escaped => {}
            _ if escaped => self.text.push(b'\\'),
            b'\\' => return Step::More,
            _ if byte == quote => {
                self.text.push(b'"');
                self.state = State::Nested;
                return if self.braces + self.brackets == 0 { Step::Whole } else { Step::More };
            }
            b'"' => self.text.push(b'\\'),
            _ => {}
        }
        self.keep(byte)
    }

    fn keep(&mut self, byte: u8) -> Step {
        self.text.push(byte);
        Step::More
    }
}

fn is_scalar(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'+' | b'.')
}

/// QEMU: structural characters and line ends are promising places; other control characters and the impossible bytes
/// are what a client sends to force the parser into a known state.
fn resynchronizes(byte: u8) -> bool {
    matches!(byte, b'{' | b'}' | b'[' | b']' | b',' | b':' | 0xFE | 0xFF) || (byte < 0x20 && byte != b'\t')
}

#[cfg(test)]
mod tests;
