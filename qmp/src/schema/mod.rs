//! The one definition of the control protocol, and what is asked of it.
//!
//! A [`Schema`] is read from text in our own language (`schema/parse.rs` describes it); validation,
//! introspection, option parsing and the reference page all follow from it. It holds plain facts
//! and knows no handler.

mod check;
mod help;
mod introspect;
mod markdown;
mod parse;
#[cfg(test)]
mod tests;
mod validate;

pub use validate::Form;

use std::collections::HashMap;
use std::sync::OnceLock;

use gipfel_base::{Error, ErrorKind, Result};

/// The commands, events and types of one control protocol.
#[derive(Debug, Default)]
pub struct Schema {
    types: Vec<Type>,
    type_index: HashMap<String, usize>,
    commands: Vec<Command>,
    command_index: HashMap<String, usize>,
    events: Vec<Event>,
    event_index: HashMap<String, usize>,
}

/// What is said of a definition or a member beside its shape.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Notes {
    /// What it is for, in our words; several lines are joined by `\n`.
    pub doc: String,
    /// Features as introspection shows them (`unstable`, `deprecated`, ...).
    pub features: Vec<String>,
    /// Ours: the reference daemon does not have it.
    pub ours: bool,
}

/// A command: name, arguments, what it returns.
#[derive(Debug)]
pub struct Command {
    /// The name on the wire.
    pub name: String,
    /// Documentation and features.
    pub notes: Notes,
    /// The object type of the arguments; `None`: it takes none.
    pub args: Option<usize>,
    /// What it returns; `None`: an empty object.
    pub returns: Option<TypeRef>,
    /// False when success is not answered at all.
    pub success_response: bool,
    /// The error class of [`ErrorKind::NotFound`] in this command.
    pub not_found: crate::ErrorClass,
}

/// An event: name and data.
#[derive(Debug)]
pub struct Event {
    /// The name on the wire.
    pub name: String,
    /// Documentation and features.
    pub notes: Notes,
    /// The object type of its data; `None`: it has none.
    pub data: Option<usize>,
}

/// A type with a name.
#[derive(Debug)]
pub struct Type {
    /// The name, unique in the schema.
    pub name: String,
    /// Documentation and features.
    pub notes: Notes,
    /// Its shape.
    pub kind: Kind,
}

/// The shape of a named type.
#[derive(Debug)]
pub enum Kind {
    /// One of several words.
    Enum(Vec<EnumValue>),
    /// An object with fixed members.
    Struct(Struct),
    /// An object whose further members depend on one of its own.
    Union(Union),
    /// A value told apart by its JSON type.
    Alternate(Vec<(String, TypeRef)>),
}

/// One word of an enum.
#[derive(Debug)]
pub struct EnumValue {
    /// The word on the wire.
    pub name: String,
    /// Documentation and features.
    pub notes: Notes,
}

/// An object with fixed members.
#[derive(Debug)]
pub struct Struct {
    /// Its members, those of a base first.
    pub members: Vec<Member>,
    /// Groups of optional members; of each group exactly one is given.
    pub one_of: Vec<Vec<String>>,
}

/// A flat union: common members, one of which says the branch.
#[derive(Debug)]
pub struct Union {
    /// The members that every branch has.
    pub members: Vec<Member>,
    /// Which of `members` is the discriminator; its type is an enum.
    pub tag: usize,
    /// Per enum value (same order) the object type of the branch; `None`: nothing further.
    pub branches: Vec<Option<usize>>,
}

/// One member of an object.
#[derive(Clone, Debug)]
pub struct Member {
    /// The key on the wire.
    pub name: String,
    /// What stands there.
    pub ty: TypeRef,
    /// May be left out.
    pub optional: bool,
    /// Documentation and features.
    pub notes: Notes,
}

/// A type as a member names it: an item, or a list of such items.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TypeRef {
    /// The type, or that of the elements.
    pub item: Item,
    /// A JSON array of `item`.
    pub list: bool,
}

/// A built-in or a named type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Item {
    /// See [`Builtin`].
    Builtin(Builtin),
    /// The position in the schema's types.
    Named(usize),
}

/// The types that need no definition.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the names say the width")]
pub enum Builtin {
    /// A string without NUL.
    Str,
    Bool,
    /// 64 bits, signed.
    Int,
    Int8,
    Int16,
    Int32,
    UInt8,
    UInt16,
    UInt32,
    UInt64,
    /// Bytes, 0 to 2^64 - 1; on command lines with a suffix k, M, G, T, P, E.
    Size,
    /// Any JSON number.
    Number,
    Null,
    /// Any JSON value.
    Any,
}

impl Builtin {
    /// The built-in type of this name in the schema language.
    pub fn from_name(name: &str) -> Option<Self> {
        Some(match name {
            "str" => Self::Str,
            "bool" => Self::Bool,
            "int" => Self::Int,
            "int8" => Self::Int8,
            "int16" => Self::Int16,
            "int32" => Self::Int32,
            "uint8" => Self::UInt8,
            "uint16" => Self::UInt16,
            "uint32" => Self::UInt32,
            "uint64" => Self::UInt64,
            "size" => Self::Size,
            "number" => Self::Number,
            "null" => Self::Null,
            "any" => Self::Any,
            _ => return None,
        })
    }

    /// The name in the schema language.
    pub fn name(self) -> &'static str {
        match self {
            Self::Str => "str",
            Self::Bool => "bool",
            Self::Int => "int",
            Self::Int8 => "int8",
            Self::Int16 => "int16",
            Self::Int32 => "int32",
            Self::UInt8 => "uint8",
            Self::UInt16 => "uint16",
            Self::UInt32 => "uint32",
            Self::UInt64 => "uint64",
            Self::Size => "size",
            Self::Number => "number",
            Self::Null => "null",
            Self::Any => "any",
        }
    }

    /// Smallest and largest value of an integer type.
    pub fn range(self) -> Option<(i128, i128)> {
        Some(match self {
            Self::Int => (i64::MIN.into(), i64::MAX.into()),
            Self::Int8 => (i8::MIN.into(), i8::MAX.into()),
            Self::Int16 => (i16::MIN.into(), i16::MAX.into()),
            Self::Int32 => (i32::MIN.into(), i32::MAX.into()),
            Self::UInt8 => (0, u8::MAX.into()),
            Self::UInt16 => (0, u16::MAX.into()),
            Self::UInt32 => (0, u32::MAX.into()),
            Self::UInt64 | Self::Size => (0, u64::MAX.into()),
            _ => return None,
        })
    }
}

/// The protocol's definition, in the order in which its files are read.
const SOURCES: &[(&str, &str)] = &[
    ("control.qmp", include_str!("../../schema/control.qmp")),
    ("common.qmp", include_str!("../../schema/common.qmp")),
    ("blockdev.qmp", include_str!("../../schema/blockdev.qmp")),
    ("block.qmp", include_str!("../../schema/block.qmp")),
    ("backend.qmp", include_str!("../../schema/backend.qmp")),
    ("job.qmp", include_str!("../../schema/job.qmp")),
    ("export.qmp", include_str!("../../schema/export.qmp")),
    ("object.qmp", include_str!("../../schema/object.qmp")),
    ("option.qmp", include_str!("../../schema/option.qmp")),
];

impl Schema {
    /// The schema of this program, read once.
    ///
    /// # Errors
    /// The built-in definition is wrong; a test of this crate keeps that from happening.
    pub fn builtin() -> Result<&'static Schema> {
        static SCHEMA: OnceLock<Result<Schema>> = OnceLock::new();
        SCHEMA.get_or_init(|| parse::read(SOURCES)).as_ref().map_err(Clone::clone)
    }

    /// Reads a schema from `(file name, text)` pairs.
    ///
    /// # Errors
    /// Says file, line and what is wrong.
    pub fn from_sources(sources: &[(&str, &str)]) -> Result<Schema> {
        parse::read(sources)
    }

    /// All commands, in the order of their definition.
    pub fn commands(&self) -> &[Command] {
        &self.commands
    }

    /// All events, in the order of their definition.
    pub fn events(&self) -> &[Event] {
        &self.events
    }

    /// The command of this name.
    pub fn command(&self, name: &str) -> Option<&Command> {
        self.command_index.get(name).map(|&i| &self.commands[i])
    }

    /// The event of this name.
    pub fn event(&self, name: &str) -> Option<&Event> {
        self.event_index.get(name).map(|&i| &self.events[i])
    }

    /// The named type at `id`, an index that the schema gave out.
    pub fn type_at(&self, id: usize) -> &Type {
        &self.types[id]
    }

    /// The named type called `name`.
    ///
    /// # Errors
    /// There is none.
    pub fn type_named(&self, name: &str) -> Result<usize> {
        self.type_index.get(name).copied().ok_or_else(|| {
            Error::new(ErrorKind::NotFound, format!("the schema has no type '{name}'"))
        })
    }

    /// How people read a type: `str`, `BlockdevRef`, `[JobInfo]`.
    pub fn type_text(&self, ty: TypeRef) -> String {
        let item = match ty.item {
            Item::Builtin(b) => b.name(),
            Item::Named(id) => &self.types[id].name,
        };
        if ty.list { format!("[{item}]") } else { item.to_owned() }
    }

    /// The members that an object type has in any case; `None`: it is no object type.
    fn members(&self, id: usize) -> Option<&[Member]> {
        match &self.types[id].kind {
            Kind::Struct(s) => Some(&s.members),
            Kind::Union(u) => Some(&u.members),
            Kind::Enum(_) | Kind::Alternate(_) => None,
        }
    }

    fn enum_values(&self, ty: TypeRef) -> Option<&[EnumValue]> {
        match ty {
            TypeRef { item: Item::Named(id), list: false } => match &self.types[id].kind {
                Kind::Enum(values) => Some(values),
                _ => None,
            },
            _ => None,
        }
    }
}

impl Union {
    /// The discriminating member.
    pub fn tag(&self) -> &Member {
        &self.members[self.tag]
    }
}
