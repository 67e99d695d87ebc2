//! Cuts a byte stream into JSON messages, in linear time and bounded memory.
//!
//! It only finds where a message ends and turns single quotes into double ones; whether the text
//! is JSON is decided when the message is parsed. Sources: QMP wire protocol (a control character
//! or 0xFF brings the parser into a known state) and trials on the reference daemon.
//!
//! Recovery after broken input, so that one mistake costs one error:
//! - a closing bracket closes the nearest opening one of its kind, or nothing;
//! - a line end inside a string, a control character and 0xFF drop the message and start afresh;
//! - a message past a limit is dropped up to the next line end.

use crate::limits::{MAX_DEPTH, MAX_MESSAGE, MAX_TOKENS};

/// What the lexer found in the stream.
#[derive(Debug, PartialEq, Eq)]
pub enum Frame {
    /// The text of one message, in double quotes only; not yet known to be valid JSON.
    Message(Vec<u8>),
    /// Input that can't be part of a message; says why. Lexing goes on after it.
    Broken(String),
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    /// Between two tokens.
    Between,
    /// In a number, a keyword, or something that wants to be one.
    Word,
    /// In a string that this quote closes.
    Text(u8),
    /// After a backslash in such a string.
    Escape(u8),
    /// Dropping the rest of a line after a limit was passed.
    Skip,
}

/// The framing state of one stream; see the module's head.
pub struct Lexer {
    state: State,
    /// The message so far.
    text: Vec<u8>,
    /// Open brackets, outermost first: true stands for `{`.
    open: Vec<bool>,
    /// How many of `open` are `{`.
    open_objects: usize,
    tokens: usize,
    /// The last byte was a reset: a run of them is reported once.
    after_reset: bool,
}

impl Default for Lexer {
    fn default() -> Self {
        Self::new()
    }
}

impl Lexer {
    /// A lexer at the start of a stream.
    pub fn new() -> Self {
        Lexer {
            state: State::Between,
            text: Vec::new(),
            open: Vec::new(),
            open_objects: 0,
            tokens: 0,
            after_reset: false,
        }
    }

    /// Takes bytes from the front of `input` up to the next message or error.
    ///
    /// `None` means that all input is taken and more is needed.
    pub fn next_frame(&mut self, input: &mut &[u8]) -> Option<Frame> {
        while let Some((&byte, rest)) = input.split_first() {
            if self.state == State::Word && ends_word(byte) {
                self.state = State::Between;
                if self.open.is_empty() {
                    return Some(self.take()); // the byte itself belongs to what follows
                }
            }
            *input = rest;
            if let Some(frame) = self.byte(byte) {
                return Some(frame);
            }
        }
        None
    }

    /// Says what the stream left unfinished at its end.
    pub fn finish(&mut self) -> Option<Frame> {
        let state = std::mem::replace(&mut self.state, State::Between);
        if state == State::Skip || (self.text.is_empty() && self.open.is_empty()) {
            return None;
        }
        if state == State::Word && self.open.is_empty() {
            return Some(self.take());
        }
        self.clear();
        Some(Frame::Broken("the input ends before the JSON message does".into()))
    }

    fn byte(&mut self, byte: u8) -> Option<Frame> {
        if is_reset(byte) {
            return self.reset(byte);
        }
        self.after_reset = false;
        match self.state {
            State::Skip => {
                if byte == b'\n' {
                    self.state = State::Between;
                }
                None
            }
            State::Text(_) | State::Escape(_) if byte == b'\n' => {
                self.clear();
                Some(Frame::Broken("a string is not closed before its line ends".into()))
            }
            State::Text(quote) => self.in_text(byte, quote),
            State::Escape(quote) => {
                // JSON knows no \' : the quote needs no escape in double quotes.
                if byte == b'\'' {
                    self.text.pop();
                }
                self.state = State::Text(quote);
                self.push(byte)
            }
            State::Word => self.push(byte),
            State::Between => self.between(byte),
        }
    }

    fn in_text(&mut self, byte: u8, quote: u8) -> Option<Frame> {
        if byte == quote {
            self.state = State::Between;
            return self.push(b'"').or_else(|| self.end_if_whole());
        }
        if byte == b'\\' {
            self.state = State::Escape(quote);
        } else if byte == b'"' {
            self.text.push(b'\\');
        }
        self.push(byte)
    }

    fn between(&mut self, byte: u8) -> Option<Frame> {
        if is_space(byte) {
            // White space outside of a message is nobody's; inside it separates.
            return if self.open.is_empty() { None } else { self.push(byte) };
        }
        self.tokens += 1;
        if self.tokens > MAX_TOKENS {
            return self.over(format!("a message has more than {MAX_TOKENS} tokens"));
        }
        match byte {
            b'{' | b'[' => {
                if self.open.len() == MAX_DEPTH {
                    return self.over(format!("a message nests deeper than {MAX_DEPTH} levels"));
                }
                self.open.push(byte == b'{');
                self.open_objects += usize::from(byte == b'{');
                self.push(byte)
            }
            b'}' | b']' => {
                self.close(byte == b'}');
                self.push(byte).or_else(|| self.end_if_whole())
            }
            b',' | b':' => self.push(byte).or_else(|| self.end_if_whole()),
            b'"' | b'\'' => {
                self.state = State::Text(byte);
                self.push(b'"')
            }
            _ => {
                self.state = State::Word;
                self.push(byte)
            }
        }
    }

    /// Closes the innermost open bracket of this kind and all inside it; none: changes nothing.
    fn close(&mut self, object: bool) {
        let of_kind = if object { self.open_objects } else { self.open.len() - self.open_objects };
        if of_kind == 0 {
            return;
        }
        while let Some(kind) = self.open.pop() {
            self.open_objects -= usize::from(kind);
            if kind == object {
                break;
            }
        }
    }

    fn push(&mut self, byte: u8) -> Option<Frame> {
        if self.text.len() >= MAX_MESSAGE {
            return self.over(format!("a message is longer than {MAX_MESSAGE} bytes"));
        }
        self.text.push(byte);
        None
    }

    fn end_if_whole(&mut self) -> Option<Frame> {
        self.open.is_empty().then(|| self.take())
    }

    fn take(&mut self) -> Frame {
        let text = std::mem::take(&mut self.text);
        self.clear();
        Frame::Message(text)
    }

    fn over(&mut self, why: String) -> Option<Frame> {
        self.clear();
        self.state = State::Skip;
        Some(Frame::Broken(format!("{why}; the rest of its line is dropped")))
    }

    fn reset(&mut self, byte: u8) -> Option<Frame> {
        self.clear();
        if std::mem::replace(&mut self.after_reset, true) {
            return None;
        }
        Some(Frame::Broken(format!(
            "byte 0x{byte:02x} can't stand in JSON: what came before it is dropped"
        )))
    }

    fn clear(&mut self) {
        self.state = State::Between;
        self.text = Vec::new();
        self.open.clear();
        self.open_objects = 0;
        self.tokens = 0;
    }
}

fn is_space(byte: u8) -> bool {
    matches!(byte, b' ' | b'\t' | b'\r' | b'\n')
}

/// Bytes that bring the lexer into a known state wherever they come.
fn is_reset(byte: u8) -> bool {
    (byte < 0x20 && !is_space(byte)) || byte == 0xff
}

fn ends_word(byte: u8) -> bool {
    is_space(byte)
        || is_reset(byte)
        || matches!(byte, b'{' | b'}' | b'[' | b']' | b',' | b':' | b'"' | b'\'')
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn lex(bytes: &[u8]) -> Vec<String> {
        lex_in_parts(&[bytes])
    }

    fn lex_in_parts(parts: &[&[u8]]) -> Vec<String> {
        let mut lexer = Lexer::new();
        let mut out = Vec::new();
        for part in parts {
            let mut input = *part;
            while let Some(f) = lexer.next_frame(&mut input) {
                out.push(show(f));
            }
        }
        out.extend(lexer.finish().map(show));
        out
    }

    fn show(f: Frame) -> String {
        match f {
            Frame::Message(m) => String::from_utf8_lossy(&m).into_owned(),
            Frame::Broken(why) => format!("! {why}"),
        }
    }

    #[test]
    fn frames_whole_messages() {
        assert_eq!(
            lex(b"{} {'a':1}\n[1,2]5 true\"x\"'y'"),
            ["{}", "{\"a\":1}", "[1,2]", "5", "true", "\"x\"", "\"y\""]
        );
        assert_eq!(lex(b"{\"a\": \"}\" }"), ["{\"a\": \"}\" }"]);
        assert_eq!(lex(br#"{'a"':'\'\\'}"#), [r#"{"a\"":"'\\"}"#]);
        assert!(lex(b" \n\t\r ").is_empty());
    }

    #[test]
    fn one_mistake_costs_one_error() {
        assert_eq!(lex(b"{\"a\":[}\n{}"), ["{\"a\":[}", "{}"]);
        assert_eq!(lex(b"{\"a\":]}{}"), ["{\"a\":]}", "{}"]);
        assert_eq!(lex(b"{\"id\":%d} {}"), ["{\"id\":%d}", "{}"]);
        assert_eq!(lex(b"} {}"), ["}", "{}"]);
        let unclosed = lex(b"{ \"abc \n{}");
        assert!(unclosed[0].contains("not closed") && unclosed[1] == "{}", "{unclosed:?}");
        let reset = lex(b"{\"a\": [\xff\xff\x01{}");
        assert!(reset[0].contains("0xff") && reset[1] == "{}" && reset.len() == 2, "{reset:?}");
    }

    #[test]
    fn limits_hold_and_the_next_line_is_heard() {
        let mut deep = vec![b'['; 1_000_000];
        deep.extend(b"\n{}");
        let got = lex(&deep);
        assert!(got[0].contains("1024") && got[1] == "{}" && got.len() == 2, "{got:?}");
        let mut long = b"\"".to_vec();
        long.resize(MAX_MESSAGE + 10, b'a');
        long.extend(b"\"\n{}");
        let got = lex(&long);
        assert!(got[0].contains("longer") && got[1] == "{}" && got.len() == 2);
        let mut many = b"[".to_vec();
        many.extend(b"1,".repeat(MAX_TOKENS));
        many.extend(b"]\n{}");
        let got = lex(&many);
        assert!(got[0].contains("tokens") && got[1] == "{}" && got.len() == 2);
    }

    proptest! {
        #[test]
        fn where_the_stream_is_cut_does_not_matter(
            bytes in proptest::collection::vec(
                proptest::sample::select(b"{}[]:,\"'\\ \n\t\xff\x01a1\xc3".to_vec()), 0..200),
            cut in 0usize..200, cut2 in 0usize..200,
        ) {
            let (a, b) = (cut.min(bytes.len()), cut2.min(bytes.len()));
            let (a, b) = (a.min(b), a.max(b));
            let parts = [&bytes[..a], &bytes[a..b], &bytes[b..]];
            prop_assert_eq!(lex(&bytes), lex_in_parts(&parts));
        }

        #[test]
        fn a_reset_always_brings_it_back(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let mut bytes = bytes;
            bytes.extend(b"\xff{'ok':1}");
            let got = lex(&bytes);
            prop_assert_eq!(got.last().unwrap(), "{\"ok\":1}");
        }
    }
}
