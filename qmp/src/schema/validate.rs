//! Compares a value with the schema, and gives option text its types.
//!
//! One walk serves both: JSON is only looked at; text from `key=value` lists, whose leaves are all
//! strings, is turned into integers, booleans and so on in place. An error names the member by its
//! full path, list elements by their index: `arguments.options.0.driver`.

use gipfel_base::{Error, Result, units};
use serde_json::{Map, Value};

use super::{Builtin, Command, Event, Item, Kind, Member, Schema, TypeRef, Union};
use crate::limits::MAX_DEPTH;

/// Where a value comes from.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Form {
    /// JSON: the types are as they stand.
    Json,
    /// A `key=value` list: every leaf is a string that is read as its type demands.
    Text,
    /// The same, and integers may have a suffix as sizes do (`4k`): the options of image tools.
    Sizes,
}

/// Why a value does not fit, and where inside it; the innermost step of the path comes first.
struct Misfit {
    path: Vec<String>,
    what: String,
}

impl Misfit {
    fn new(what: impl Into<String>) -> Self {
        Misfit { path: Vec::new(), what: what.into() }
    }

    fn under(mut self, step: &str) -> Self {
        self.path.push(step.to_owned());
        self
    }

    fn into_error(self, root: &str) -> Error {
        let mut path = String::from(root);
        for step in self.path.iter().rev() {
            if !path.is_empty() {
                path.push('.');
            }
            path.push_str(step);
        }
        if path.is_empty() {
            return Error::invalid(self.what);
        }
        Error::invalid(format!("'{path}' {}", self.what))
    }
}

type Fit = Result<(), Misfit>;

impl Schema {
    /// Checks the arguments of a command.
    ///
    /// # Errors
    /// The first member that does not fit, by its path from `arguments`.
    pub fn check_arguments(&self, command: &Command, args: &mut Value) -> Result<()> {
        self.check_call(command.args, args, "arguments")
    }

    /// Checks the data of an event.
    ///
    /// # Errors
    /// The first member that does not fit, by its path from `data`.
    pub fn check_event(&self, event: &Event, data: &mut Value) -> Result<()> {
        self.check_call(event.data, data, "data")
    }

    /// Checks what a command returned: a test's guard against answers that differ from the schema.
    ///
    /// # Errors
    /// The first member that does not fit, by its path from `return`.
    pub fn check_return(&self, command: &Command, value: &mut Value) -> Result<()> {
        match command.returns {
            Some(ty) => self.value(ty, value, Form::Json, 0).map_err(|m| m.into_error("return")),
            None => self.check_call(None, value, "return"),
        }
    }

    /// Checks a value against the type called `name`; `root` starts the paths of errors.
    ///
    /// # Errors
    /// The type is unknown, or the first member that does not fit.
    pub fn check_type(&self, name: &str, value: &mut Value, form: Form, root: &str) -> Result<()> {
        let ty = TypeRef { item: Item::Named(self.type_named(name)?), list: false };
        self.value(ty, value, form, 0).map_err(|m| m.into_error(root))
    }

    fn check_call(&self, ty: Option<usize>, value: &mut Value, root: &str) -> Result<()> {
        let fit = match (ty, &*value) {
            (Some(id), _) => {
                let ty = TypeRef { item: Item::Named(id), list: false };
                self.value(ty, value, Form::Json, 0)
            }
            (None, Value::Object(map)) => match map.keys().next() {
                Some(key) => {
                    let shown: String = key.chars().take(64).collect();
                    Err(Misfit::new("is not known: nothing is taken here").under(&shown))
                }
                None => Ok(()),
            },
            (None, other) => Err(wrong_type("an object", other)),
        };
        fit.map_err(|m| m.into_error(root))
    }

    fn value(&self, ty: TypeRef, value: &mut Value, form: Form, depth: usize) -> Fit {
        if depth > MAX_DEPTH {
            return Err(Misfit::new(format!("nests deeper than {MAX_DEPTH} levels")));
        }
        if !ty.list {
            return self.item(ty.item, value, form, depth);
        }
        let Value::Array(items) = value else {
            return Err(wrong_type("a list", value));
        };
        for (i, item) in items.iter_mut().enumerate() {
            self.item(ty.item, item, form, depth + 1).map_err(|m| m.under(&i.to_string()))?;
        }
        Ok(())
    }

    fn item(&self, item: Item, value: &mut Value, form: Form, depth: usize) -> Fit {
        let id = match item {
            Item::Builtin(b) if form == Form::Json => return builtin(b, value),
            Item::Builtin(b) => return builtin_from_text(b, value, form),
            Item::Named(id) => id,
        };
        match &self.types[id].kind {
            Kind::Enum(values) => {
                let Value::String(word) = &*value else {
                    return Err(wrong_type("a string", value));
                };
                if values.iter().any(|v| v.name == *word) {
                    return Ok(());
                }
                Err(Misfit::new(unknown_word(word, values.iter().map(|v| v.name.as_str()))))
            }
            Kind::Struct(_) | Kind::Union(_) => self.object(id, value, form, depth),
            Kind::Alternate(ways) => self.alternate(ways, value, form, depth),
        }
    }

    fn object(&self, id: usize, value: &mut Value, form: Form, depth: usize) -> Fit {
        let Value::Object(map) = value else {
            return Err(wrong_type("an object", value));
        };
        // The type and the branches it takes, outermost first.
        let mut layers = vec![id];
        let mut next = Some(id);
        while let Some(Kind::Union(u)) = next.take().map(|id| &self.types[id].kind) {
            // The tag decides which other members are known, so it is looked at first.
            self.member(u.tag(), map, form, depth)?;
            next = self.branch(u, map);
            layers.extend(next);
        }
        let members = || layers.iter().flat_map(|id| self.members(*id).unwrap_or_default());
        if let Some(key) = map.keys().find(|k| !members().any(|m| m.name == **k)) {
            let shown: String = key.chars().take(64).collect();
            let names = members().map(|m| m.name.as_str());
            let what = match nearest(key, names) {
                Some(near) => {
                    format!("is not known{}: did you mean '{near}'?", self.place(id, map))
                }
                None => format!("is not known{}", self.place(id, map)),
            };
            return Err(Misfit::new(what).under(&shown));
        }
        for m in members() {
            self.member(m, map, form, depth)?;
        }
        layers.iter().try_for_each(|id| self.one_of(*id, map))
    }

    /// The object type that a union takes on by what its tag says.
    fn branch(&self, u: &Union, map: &Map<String, Value>) -> Option<usize> {
        let word = map.get(&u.tag().name)?.as_str()?;
        let values = self.enum_values(u.tag().ty)?;
        u.branches[values.iter().position(|v| v.name == word)?]
    }

    /// In which branch a key is not known, in words.
    fn place(&self, id: usize, map: &Map<String, Value>) -> String {
        let Kind::Union(u) = &self.types[id].kind else {
            return String::new();
        };
        let tag = &u.tag().name;
        let word = map.get(tag).and_then(Value::as_str);
        word.map_or(String::new(), |word| format!(" where {tag} is '{word}'"))
    }

    /// Of each group of members exactly one is given.
    fn one_of(&self, id: usize, map: &Map<String, Value>) -> Fit {
        let Kind::Struct(s) = &self.types[id].kind else {
            return Ok(());
        };
        for group in &s.one_of {
            let mut given = group.iter().filter(|name| map.contains_key(*name));
            let names: Vec<_> = group.iter().map(|n| format!("'{n}'")).collect();
            let names = names.join(" or ");
            match (given.next(), given.next()) {
                (Some(_), None) => {}
                (None, _) => {
                    return Err(Misfit::new(format!("is missing: give {names}")).under(&group[0]));
                }
                (Some(a), Some(b)) => {
                    let what = format!("is given together with '{a}': give only {names}");
                    return Err(Misfit::new(what).under(b));
                }
            }
        }
        Ok(())
    }

    /// Checks that a member is there if it must be, and what stands in it.
    fn member(&self, m: &Member, map: &mut Map<String, Value>, form: Form, depth: usize) -> Fit {
        match map.get_mut(&m.name) {
            // A tag is seen twice; in text form it is a word both times.
            Some(value) => self.value(m.ty, value, form, depth + 1).map_err(|e| e.under(&m.name)),
            None if m.optional => Ok(()),
            None => {
                let ty = self.describe(m.ty);
                Err(Misfit::new(format!("is missing: give {ty}")).under(&m.name))
            }
        }
    }

    fn alternate(
        &self,
        ways: &[(String, TypeRef)],
        value: &mut Value,
        form: Form,
        depth: usize,
    ) -> Fit {
        let given = json_type_of(value);
        let exact = ways.iter().find(|(_, ty)| self.json_type(*ty) == Some(given));
        // An empty string says "nothing" where that is a way in: option text has no other way to,
        // and old clients use it in JSON.
        let null = ways.iter().any(|(_, ty)| self.json_type(*ty) == Some("null"));
        if null && value.as_str() == Some("") {
            *value = Value::Null;
            return Ok(());
        }
        let scalar = || {
            let is_text = form != Form::Json && given == "string";
            ways.iter().find(|(_, ty)| {
                is_text && matches!(self.json_type(*ty), Some("number" | "boolean"))
            })
        };
        if let Some((_, ty)) = exact.or_else(scalar) {
            return self.value(*ty, value, form, depth);
        }
        let all: Vec<_> = ways.iter().map(|(_, ty)| self.describe(*ty)).collect();
        Err(wrong_type(&all.join(" or "), value))
    }

    /// The JSON type all values of `ty` have; `None` where there are several.
    pub(super) fn json_type(&self, ty: TypeRef) -> Option<&'static str> {
        if ty.list {
            return Some("array");
        }
        Some(match ty.item {
            Item::Builtin(Builtin::Str) => "string",
            Item::Builtin(Builtin::Bool) => "boolean",
            Item::Builtin(Builtin::Null) => "null",
            Item::Builtin(Builtin::Any) => return None,
            Item::Builtin(_) => "number",
            Item::Named(id) => match &self.types[id].kind {
                Kind::Enum(_) => "string",
                Kind::Struct(_) | Kind::Union(_) => "object",
                Kind::Alternate(_) => return None,
            },
        })
    }

    /// What to give for a type, in words.
    fn describe(&self, ty: TypeRef) -> String {
        if ty.list {
            return "a list".into();
        }
        match ty.item {
            Item::Builtin(b) => describe_builtin(b).into(),
            Item::Named(id) => match &self.types[id].kind {
                Kind::Enum(values) if values.len() <= 8 => {
                    let words: Vec<_> = values.iter().map(|v| format!("'{}'", v.name)).collect();
                    words.join(" or ")
                }
                Kind::Enum(_) => format!("a word of {}", self.types[id].name),
                Kind::Struct(_) | Kind::Union(_) => {
                    format!("an object ({})", self.types[id].name)
                }
                Kind::Alternate(ways) => {
                    let all: Vec<_> = ways.iter().map(|(_, ty)| self.describe(*ty)).collect();
                    all.join(" or ")
                }
            },
        }
    }
}

fn describe_builtin(b: Builtin) -> &'static str {
    match b {
        Builtin::Str => "a string",
        Builtin::Bool => "a boolean",
        Builtin::Number => "a number",
        Builtin::Null => "null",
        Builtin::Any => "a value",
        Builtin::Size => "a size in bytes",
        _ => "an integer",
    }
}

fn builtin(b: Builtin, value: &Value) -> Fit {
    let fits = match b {
        Builtin::Any => true,
        Builtin::Null => value.is_null(),
        Builtin::Bool => value.is_boolean(),
        Builtin::Number => value.is_number(),
        Builtin::Str => {
            if value.as_str().is_some_and(|s| s.contains('\0')) {
                return Err(Misfit::new("holds a NUL character, which no name or path can"));
            }
            value.is_string()
        }
        _ => return integer(b, value),
    };
    if fits { Ok(()) } else { Err(wrong_type(describe_builtin(b), value)) }
}

fn integer(b: Builtin, value: &Value) -> Fit {
    let number = value.as_u64().map(i128::from).or_else(|| value.as_i64().map(i128::from));
    let Some(number) = number else {
        let hint = if value.is_f64() {
            Misfit::new(format!("must be an integer, without fraction or exponent, not {value}"))
        } else {
            wrong_type(describe_builtin(b), value)
        };
        return Err(hint);
    };
    in_range(b, number)
}

fn in_range(b: Builtin, number: i128) -> Fit {
    match b.range() {
        Some((low, high)) if !(low..=high).contains(&number) => {
            Err(Misfit::new(format!("must lie between {low} and {high}, not {number}")))
        }
        _ => Ok(()),
    }
}

/// Reads the text in `value` as the type demands, and puts the typed value there.
fn builtin_from_text(b: Builtin, value: &mut Value, form: Form) -> Fit {
    let Value::String(text) = &*value else {
        // Values that are typed already come from an inner JSON text.
        return if matches!(value, Value::Object(_) | Value::Array(_)) && b != Builtin::Any {
            Err(Misfit::new(format!("takes {}, and has no members", describe_builtin(b))))
        } else {
            builtin(b, value)
        };
    };
    let typed = match b {
        Builtin::Str => return builtin(b, value),
        Builtin::Any => return Ok(()),
        Builtin::Bool => match text.as_str() {
            "on" | "yes" | "true" | "y" => Value::Bool(true),
            "off" | "no" | "false" | "n" => Value::Bool(false),
            _ => return Err(Misfit::new(format!("must be 'on' or 'off', not '{text}'"))),
        },
        Builtin::Null if text.is_empty() => Value::Null,
        Builtin::Null => return Err(Misfit::new("must be empty")),
        Builtin::Number => match text.parse::<f64>().ok().and_then(serde_json::Number::from_f64) {
            Some(n) => Value::Number(n),
            None => return Err(Misfit::new(format!("must be a number, not '{text}'"))),
        },
        Builtin::Size => {
            units::parse_size(text).map_err(|e| Misfit::new(format!("is wrong: {e}")))?.into()
        }
        _ => {
            let size = || units::parse_size(text).ok().filter(|_| form == Form::Sizes);
            let number = parse_integer(text)
                .or_else(|| size().map(i128::from))
                .ok_or_else(|| Misfit::new(format!("must be an integer, not '{text}'")))?;
            in_range(b, number)?;
            match u64::try_from(number) {
                Ok(n) => n.into(),
                Err(_) => i64::try_from(number).map_err(|_| Misfit::new("is too small"))?.into(),
            }
        }
    };
    *value = typed;
    Ok(())
}

/// Decimal, `0x` hexadecimal, with an optional sign.
fn parse_integer(text: &str) -> Option<i128> {
    let (negative, digits) = match text.strip_prefix('-') {
        Some(rest) => (true, rest),
        None => (false, text.strip_prefix('+').unwrap_or(text)),
    };
    let number = match digits.strip_prefix("0x").or_else(|| digits.strip_prefix("0X")) {
        Some(hex) if hex.bytes().all(|b| b.is_ascii_hexdigit()) => i128::from_str_radix(hex, 16),
        // A leading zero means octal to some and nothing to others: refused.
        None if digits.len() > 1 && digits.starts_with('0') => return None,
        None if digits.bytes().all(|b| b.is_ascii_digit()) => digits.parse(),
        _ => return None,
    };
    number.ok().map(|n| if negative { -n } else { n })
}

fn json_type_of(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "boolean",
        Value::Number(_) => "number",
        Value::String(_) => "string",
        Value::Array(_) => "array",
        Value::Object(_) => "object",
    }
}

fn wrong_type(wanted: &str, value: &Value) -> Misfit {
    let given = match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    };
    Misfit::new(format!("must be {wanted}, not {given}"))
}

pub(super) fn unknown_word<'a>(word: &str, known: impl Iterator<Item = &'a str>) -> String {
    let known: Vec<&str> = known.collect();
    let shown: String = word.chars().take(64).collect();
    match nearest(word, known.iter().copied()) {
        Some(near) => format!("must not be '{shown}': did you mean '{near}'?"),
        None => format!("must not be '{shown}': it is one of {}", known.join(", ")),
    }
}

/// The one word that is at most two edits away, for a hint.
fn nearest<'a>(word: &str, known: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    if word.len() > 64 {
        return None;
    }
    let (distance, best) =
        known.map(|k| (edit_distance(word.as_bytes(), k.as_bytes()), k)).min_by_key(|d| d.0)?;
    (distance <= 2 && distance < word.len()).then_some(best)
}

/// Levenshtein distance, one row at a time.
fn edit_distance(a: &[u8], b: &[u8]) -> usize {
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.iter().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let change = diagonal + usize::from(x != y);
            diagonal = row[j + 1];
            row[j + 1] = change.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}
