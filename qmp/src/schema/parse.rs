//! Reads the schema language.
//!
//! ```text
//! # A comment.
//! -- What follows is for; such lines belong to the next definition.
//! enum Mode {
//!     off            -- What the word means.
//!     on @deprecated -- Attributes: @deprecated @unstable @ours @feature(NAME).
//! }
//! struct Base { id: str -- What it names. }
//! struct Point: Base {            # members of Base come first
//!     x: int                      -- A member that must be there.
//!     tags?: [str]                -- A list that may be left out.
//! }
//! union Options on driver {       # `driver` is a member of enum type
//!     driver: Driver
//!     file => FileOptions         # further members where driver is "file"
//! }
//! alternate Ref { name: str inline: Options nothing: null }
//! command do-it @not-found(DeviceNotFound) { id: str } -> [Point]
//! command do-that (Options)       # a named type holds the arguments
//! event DONE { id: str }
//! ```
//! `@silent` on a command: success is not answered. `@one-of(a b)` on a struct, or on a command
//! with members of its own: exactly one of these optional members is given.
//! Definitions may stand in any order.

use gipfel_base::{Error, Result};

use super::check::Draft;
use super::{EnumValue, Notes, Schema};
use crate::ErrorClass;

/// A type as the text names it, not yet looked up.
#[derive(Clone, Debug)]
pub(super) struct TypeName {
    pub name: String,
    pub list: bool,
    pub at: Place,
}

/// Where a word stands, for errors.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place {
    pub file: usize,
    pub line: usize,
}

#[derive(Debug)]
pub(super) struct DraftMember {
    pub name: String,
    pub ty: TypeName,
    pub optional: bool,
    pub notes: Notes,
}

/// Of a union: values of the discriminator and their types.
type Branches = Vec<(String, TypeName)>;

#[derive(Debug)]
pub(super) enum DraftKind {
    Enum(Vec<EnumValue>),
    Struct { base: Option<TypeName>, members: Vec<DraftMember>, one_of: Vec<Vec<String>> },
    Union { base: Option<TypeName>, tag: String, members: Vec<DraftMember>, branches: Branches },
    Alternate(Vec<DraftMember>),
}

#[derive(Debug)]
pub(super) struct DraftType {
    pub name: String,
    pub notes: Notes,
    pub at: Place,
    pub kind: DraftKind,
}

/// A command (`returns` and below count) or an event.
#[derive(Debug)]
pub(super) struct DraftCall {
    pub name: String,
    pub notes: Notes,
    pub at: Place,
    pub event: bool,
    pub args: Option<TypeName>,
    pub returns: Option<TypeName>,
    pub success_response: bool,
    pub not_found: ErrorClass,
}

/// Reads and checks a schema from `(file name, text)` pairs.
pub(super) fn read(sources: &[(&str, &str)]) -> Result<Schema> {
    let mut draft = Draft::new(sources.iter().map(|s| s.0.to_owned()).collect());
    for (file, (name, text)) in sources.iter().enumerate() {
        let tokens = tokenize(name, file, text)?;
        Parser { name, tokens: &tokens, next: 0, draft: &mut draft }.file()?;
    }
    draft.finish()
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Token {
    Word(String),
    /// One of `{ } ( ) [ ] : ? @ ->  =>`.
    Sign(&'static str),
    /// The text after `--`.
    Doc(String),
}

const SIGNS: [&str; 11] = ["->", "=>", "{", "}", "(", ")", "[", "]", ":", "?", "@"];

fn tokenize(name: &str, file: usize, text: &str) -> Result<Vec<(Token, Place)>> {
    let mut tokens = Vec::new();
    for (number, line) in text.lines().enumerate() {
        let at = Place { file, line: number + 1 };
        let mut rest = line.trim();
        while !rest.is_empty() && !rest.starts_with('#') {
            if let Some(doc) = rest.strip_prefix("--") {
                tokens.push((Token::Doc(doc.trim().to_owned()), at));
                break;
            }
            if let Some(sign) = SIGNS.iter().find(|s| rest.starts_with(**s)) {
                tokens.push((Token::Sign(sign), at));
                rest = rest[sign.len()..].trim_start();
            } else {
                let end = rest.find(|c: char| !is_word(c)).unwrap_or(rest.len());
                // A word ends before "->" and "--" as before any other sign.
                let end =
                    [rest.find("->"), rest.find("--")].into_iter().flatten().fold(end, usize::min);
                if end == 0 {
                    let c = rest.chars().next().unwrap_or(' ');
                    return Err(Error::invalid(format!(
                        "{name}:{}: character '{c}' means nothing here",
                        at.line
                    )));
                }
                tokens.push((Token::Word(rest[..end].to_owned()), at));
                rest = rest[end..].trim_start();
            }
        }
    }
    Ok(tokens)
}

fn is_word(c: char) -> bool {
    c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.')
}

/// What the attributes of a definition say.
struct Attributes {
    notes: Notes,
    silent: bool,
    not_found: Option<ErrorClass>,
    one_of: Vec<Vec<String>>,
}

struct Parser<'a> {
    name: &'a str,
    tokens: &'a [(Token, Place)],
    next: usize,
    draft: &'a mut Draft,
}

impl Parser<'_> {
    fn file(&mut self) -> Result<()> {
        let mut doc = String::new();
        while let Some((token, _)) = self.tokens.get(self.next) {
            match token {
                Token::Doc(text) => {
                    add_line(&mut doc, text);
                    self.next += 1;
                }
                Token::Word(_) => self.definition(std::mem::take(&mut doc))?,
                Token::Sign(s) => return Err(self.error(format!("'{s}' starts no definition"))),
            }
        }
        if doc.is_empty() {
            return Ok(());
        }
        Err(self.error("documentation stands at the end, before no definition"))
    }

    fn definition(&mut self, doc: String) -> Result<()> {
        let keyword = self.word("a definition")?;
        let at = self.place();
        let name = self.word("a name")?;
        match keyword.as_str() {
            "enum" => {
                let a = self.type_attributes(doc)?;
                let values = self.enum_body()?;
                self.add_type(name, a.notes, at, DraftKind::Enum(values));
            }
            "struct" => {
                let base = self.base()?;
                let a = self.attributes(doc)?;
                self.no_command_attributes(&a)?;
                let (members, _) = self.body(false)?;
                let kind = DraftKind::Struct { base, members, one_of: a.one_of };
                self.add_type(name, a.notes, at, kind);
            }
            "union" => {
                let base = self.base()?;
                if self.word("'on'")? != "on" {
                    return Err(self.error("a union says 'on' and the name of its discriminator"));
                }
                let tag = self.word("the discriminator")?;
                let a = self.type_attributes(doc)?;
                let (members, branches) = self.body(true)?;
                let kind = DraftKind::Union { base, tag, members, branches };
                self.add_type(name, a.notes, at, kind);
            }
            "alternate" => {
                let a = self.type_attributes(doc)?;
                let (members, _) = self.body(false)?;
                self.add_type(name, a.notes, at, DraftKind::Alternate(members));
            }
            "command" => self.call(name, at, doc, false)?,
            "event" => self.call(name, at, doc, true)?,
            other => {
                return Err(self.error(format!(
                    "'{other}' is no kind of definition: \
                     use enum, struct, union, alternate, command or event"
                )));
            }
        }
        Ok(())
    }

    fn call(&mut self, name: String, at: Place, doc: String, event: bool) -> Result<()> {
        let mut a = self.attributes(doc)?;
        if event {
            self.no_command_attributes(&a)?;
        }
        if !a.one_of.is_empty() && !self.peek_sign("{") {
            return Err(self.error("@one-of is for structs, and commands with members"));
        }
        let args = if self.sign("(") {
            let ty = self.type_name()?;
            self.expect(")")?;
            Some(ty)
        } else if self.peek_sign("{") {
            let (members, _) = self.body(false)?;
            let ty = format!("{name}-{}", if event { "data" } else { "arguments" });
            let one_of = std::mem::take(&mut a.one_of);
            let kind = DraftKind::Struct { base: None, members, one_of };
            self.add_type(ty.clone(), Notes::default(), at, kind);
            Some(TypeName { name: ty, list: false, at })
        } else {
            None
        };
        let returns = if !event && self.sign("->") { Some(self.type_name()?) } else { None };
        self.draft.calls.push(DraftCall {
            name,
            notes: a.notes,
            at,
            event,
            args,
            returns,
            success_response: !a.silent,
            not_found: a.not_found.unwrap_or(ErrorClass::GenericError),
        });
        Ok(())
    }

    fn add_type(&mut self, name: String, notes: Notes, at: Place, kind: DraftKind) {
        self.draft.types.push(DraftType { name, notes, at, kind });
    }

    fn base(&mut self) -> Result<Option<TypeName>> {
        if self.sign(":") { self.type_name().map(Some) } else { Ok(None) }
    }

    fn enum_body(&mut self) -> Result<Vec<EnumValue>> {
        self.expect("{")?;
        let mut values: Vec<EnumValue> = Vec::new();
        loop {
            if let Some(doc) = self.doc() {
                match values.last_mut() {
                    Some(v) => add_line(&mut v.notes.doc, &doc),
                    None => return Err(self.error("documentation before the first value")),
                }
            } else if self.sign("}") {
                return Ok(values);
            } else {
                let name = self.word("a value or '}'")?;
                let a = self.type_attributes(String::new())?;
                values.push(EnumValue { name, notes: a.notes });
            }
        }
    }

    /// Members and, in a union, branches.
    fn body(&mut self, union: bool) -> Result<(Vec<DraftMember>, Branches)> {
        self.expect("{")?;
        let mut members: Vec<DraftMember> = Vec::new();
        let mut branches = Vec::new();
        loop {
            if let Some(doc) = self.doc() {
                match members.last_mut() {
                    Some(m) if branches.is_empty() => add_line(&mut m.notes.doc, &doc),
                    _ => return Err(self.error("documentation that belongs to no member")),
                }
                continue;
            }
            if self.sign("}") {
                return Ok((members, branches));
            }
            let name = self.word("a member or '}'")?;
            if union && self.sign("=>") {
                branches.push((name, self.type_name()?));
                continue;
            }
            let optional = self.sign("?");
            self.expect(":")?;
            let ty = self.type_name()?;
            let a = self.type_attributes(String::new())?;
            members.push(DraftMember { name, ty, optional, notes: a.notes });
        }
    }

    fn type_name(&mut self) -> Result<TypeName> {
        let list = self.sign("[");
        let at = self.place();
        let name = self.word("a type")?;
        if list {
            self.expect("]")?;
        }
        Ok(TypeName { name, list, at })
    }

    fn type_attributes(&mut self, doc: String) -> Result<Attributes> {
        let a = self.attributes(doc)?;
        self.no_command_attributes(&a)?;
        if !a.one_of.is_empty() {
            return Err(self.error("@one-of is for structs, and commands with members"));
        }
        Ok(a)
    }

    fn no_command_attributes(&self, a: &Attributes) -> Result<()> {
        if a.silent || a.not_found.is_some() {
            return Err(self.error("@silent and @not-found are for commands"));
        }
        Ok(())
    }

    fn attributes(&mut self, doc: String) -> Result<Attributes> {
        let notes = Notes { doc, ..Notes::default() };
        let mut a = Attributes { notes, silent: false, not_found: None, one_of: Vec::new() };
        while self.sign("@") {
            match self.word("an attribute")?.as_str() {
                "ours" => a.notes.ours = true,
                "silent" => a.silent = true,
                "feature" => {
                    let feature = self.argument()?;
                    a.notes.features.push(feature);
                }
                "not-found" => {
                    let class = self.argument()?;
                    let known = ErrorClass::from_name(&class);
                    a.not_found = Some(
                        known.ok_or_else(|| self.error(format!("'{class}' is no error class")))?,
                    );
                }
                "one-of" => {
                    self.expect("(")?;
                    let mut group = Vec::new();
                    while !self.sign(")") {
                        group.push(self.word("a member or ')'")?);
                    }
                    a.one_of.push(group);
                }
                known @ ("deprecated" | "unstable") => a.notes.features.push(known.to_owned()),
                other => return Err(self.error(format!("attribute '@{other}' is unknown"))),
            }
        }
        Ok(a)
    }

    fn argument(&mut self) -> Result<String> {
        self.expect("(")?;
        let word = self.word("a word in parentheses")?;
        self.expect(")")?;
        Ok(word)
    }

    fn doc(&mut self) -> Option<String> {
        match self.tokens.get(self.next) {
            Some((Token::Doc(text), _)) => {
                self.next += 1;
                Some(text.clone())
            }
            _ => None,
        }
    }

    fn peek_sign(&self, sign: &str) -> bool {
        matches!(self.tokens.get(self.next), Some((Token::Sign(s), _)) if *s == sign)
    }

    fn sign(&mut self, sign: &str) -> bool {
        let is = self.peek_sign(sign);
        self.next += usize::from(is);
        is
    }

    fn expect(&mut self, sign: &str) -> Result<()> {
        if self.sign(sign) { Ok(()) } else { Err(self.error(format!("'{sign}' is missing here"))) }
    }

    fn word(&mut self, what: &str) -> Result<String> {
        match self.tokens.get(self.next) {
            Some((Token::Word(w), _)) => {
                self.next += 1;
                Ok(w.clone())
            }
            _ => Err(self.error(format!("{what} is missing here"))),
        }
    }

    fn place(&self) -> Place {
        let last = self.tokens.len().saturating_sub(1);
        self.tokens.get(self.next.min(last)).map_or(Place { file: 0, line: 0 }, |t| t.1)
    }

    fn error(&self, what: impl std::fmt::Display) -> Error {
        Error::invalid(format!("{}:{}: {what}", self.name, self.place().line))
    }
}

fn add_line(doc: &mut String, line: &str) {
    if !doc.is_empty() {
        doc.push('\n');
    }
    doc.push_str(line);
}
