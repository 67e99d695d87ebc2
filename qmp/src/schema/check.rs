//! Turns what the parser read into a [`Schema`]: looks up names and checks that it makes sense.

use std::collections::{HashMap, HashSet};

use gipfel_base::{Error, Result};

use super::parse::{DraftCall, DraftKind, DraftMember, DraftType, Place, TypeName};
use super::{
    Builtin, Command, Event, Item, Kind, Member, Notes, Schema, Struct, Type, TypeRef, Union,
};

/// All definitions of all files, by name only.
pub(super) struct Draft {
    files: Vec<String>,
    pub types: Vec<DraftType>,
    pub calls: Vec<DraftCall>,
}

impl Draft {
    pub(super) fn new(files: Vec<String>) -> Self {
        Draft { files, types: Vec::new(), calls: Vec::new() }
    }

    pub(super) fn finish(self) -> Result<Schema> {
        let mut schema = Schema::default();
        let mut names = HashSet::new();
        for (i, t) in self.types.iter().enumerate() {
            self.name_is_free(&mut names, &t.name, t.at)?;
            schema.type_index.insert(t.name.clone(), i);
        }
        for call in &self.calls {
            self.name_is_free(&mut names, &call.name, call.at)?;
        }
        let index = &schema.type_index;
        let mut types = Vec::new();
        for t in &self.types {
            let kind = self.kind(index, t).map_err(|e| e.context(format!("type '{}'", t.name)))?;
            types.push(Type { name: t.name.clone(), notes: t.notes.clone(), kind });
        }
        schema.types = types;
        for t in &self.types {
            self.check_kind(&schema, t)?;
        }
        for call in &self.calls {
            self.add_call(&mut schema, call)?;
        }
        Ok(schema)
    }

    fn add_call(&self, schema: &mut Schema, call: &DraftCall) -> Result<()> {
        let at = format!("'{}'", call.name);
        let args = match &call.args {
            None => None,
            Some(name) => Some(self.object_type(schema, name).map_err(|e| e.context(&at))?),
        };
        let (name, notes) = (call.name.clone(), call.notes.clone());
        if notes.doc.is_empty() {
            return Err(self.error(call.at, format!("{at} has no documentation")));
        }
        if call.event {
            schema.event_index.insert(name.clone(), schema.events.len());
            schema.events.push(Event { name, notes, data: args });
            return Ok(());
        }
        let returns = call.returns.as_ref().map(|r| self.look_up(&schema.type_index, r));
        schema.command_index.insert(name.clone(), schema.commands.len());
        schema.commands.push(Command {
            name,
            notes,
            args,
            returns: returns.transpose()?,
            success_response: call.success_response,
            not_found: call.not_found,
        });
        Ok(())
    }

    fn kind(&self, index: &HashMap<String, usize>, t: &DraftType) -> Result<Kind> {
        let resolve = |m: &DraftMember| -> Result<Member> {
            let ty = self.look_up(index, &m.ty)?;
            Ok(Member { name: m.name.clone(), ty, optional: m.optional, notes: m.notes.clone() })
        };
        Ok(match &t.kind {
            DraftKind::Enum(values) => {
                let mut seen = HashSet::new();
                if let Some(v) = values.iter().find(|v| !seen.insert(&v.name)) {
                    return Err(self.error(t.at, format!("value '{}' stands twice", v.name)));
                }
                Kind::Enum(values.iter().map(super::EnumValue::copy).collect())
            }
            DraftKind::Struct { base, members, one_of } => {
                let members = self.with_base(index, t, base.as_ref(), members, &resolve)?;
                let optional =
                    |name: &String| members.iter().any(|m| m.name == *name && m.optional);
                if let Some(name) = one_of.iter().flatten().find(|n| !optional(n)) {
                    return Err(self.error(t.at, format!("'{name}' is no optional member")));
                }
                Kind::Struct(Struct { members, one_of: one_of.clone() })
            }
            DraftKind::Union { base, tag, members, branches } => {
                let members = self.with_base(index, t, base.as_ref(), members, &resolve)?;
                let tag = members.iter().position(|m| m.name == *tag).ok_or_else(|| {
                    self.error(t.at, format!("discriminator '{tag}' is no member"))
                })?;
                let values = match members[tag].ty {
                    TypeRef { item: Item::Named(id), list: false } => &self.types[id].kind,
                    _ => return Err(self.error(t.at, "the discriminator is no enum")),
                };
                let DraftKind::Enum(values) = values else {
                    return Err(self.error(t.at, "the discriminator is no enum"));
                };
                let mut by_value = vec![None; values.len()];
                for (value, ty) in branches {
                    let i = values.iter().position(|v| v.name == *value).ok_or_else(|| {
                        self.error(ty.at, format!("'{value}' is no value of the discriminator"))
                    })?;
                    let Item::Named(id) = self.look_up(index, ty)?.item else {
                        return Err(self.error(ty.at, format!("'{}' is no object", ty.name)));
                    };
                    if by_value[i].replace(id).is_some() {
                        return Err(self.error(ty.at, format!("branch '{value}' stands twice")));
                    }
                }
                Kind::Union(Union { members, tag, branches: by_value })
            }
            DraftKind::Alternate(members) => {
                let mut kinds = Vec::new();
                for m in members {
                    kinds.push((m.name.clone(), self.look_up(index, &m.ty)?));
                }
                Kind::Alternate(kinds)
            }
        })
    }

    /// The members of the base, then those given; no name twice.
    fn with_base(
        &self,
        index: &HashMap<String, usize>,
        t: &DraftType,
        base: Option<&TypeName>,
        members: &[DraftMember],
        resolve: &dyn Fn(&DraftMember) -> Result<Member>,
    ) -> Result<Vec<Member>> {
        let mut all = Vec::new();
        if let Some(base) = base {
            let id = index.get(&base.name).map(|&i| &self.types[i].kind);
            // One level of inheritance is enough, and can't loop.
            let Some(DraftKind::Struct { base: None, members, .. }) = id else {
                return Err(self.error(
                    base.at,
                    format!("base '{}' is no struct without a base of its own", base.name),
                ));
            };
            for m in members {
                all.push(resolve(m)?);
            }
        }
        for m in members {
            all.push(resolve(m)?);
        }
        let mut seen = HashSet::new();
        if let Some(m) = all.iter().find(|m| !seen.insert(&m.name)) {
            return Err(self.error(t.at, format!("member '{}' stands twice", m.name)));
        }
        Ok(all)
    }

    /// Checks that need all types to be known.
    fn check_kind(&self, schema: &Schema, t: &DraftType) -> Result<()> {
        let fail = |what: String| self.error(t.at, format!("type '{}': {what}", t.name));
        match &schema.types[schema.type_index[&t.name]].kind {
            Kind::Union(u) => {
                for branch in u.branches.iter().flatten() {
                    let Some(members) = schema.members(*branch) else {
                        let name = &schema.types[*branch].name;
                        return Err(fail(format!("branch type '{name}' is no object")));
                    };
                    let common = |m: &&Member| u.members.iter().any(|c| c.name == m.name);
                    if let Some(m) = members.iter().find(common) {
                        return Err(fail(format!("a branch repeats member '{}'", m.name)));
                    }
                }
            }
            Kind::Alternate(kinds) => {
                let mut seen = HashSet::new();
                for (name, ty) in kinds {
                    let json = schema
                        .json_type(*ty)
                        .ok_or_else(|| fail(format!("'{name}' is of no single JSON type")))?;
                    if !seen.insert(json) {
                        return Err(fail(format!("two ways in are a JSON {json}")));
                    }
                }
            }
            Kind::Enum(_) | Kind::Struct(_) => {}
        }
        Ok(())
    }

    fn object_type(&self, schema: &Schema, name: &TypeName) -> Result<usize> {
        match self.look_up(&schema.type_index, name)? {
            TypeRef { item: Item::Named(id), list: false } if schema.members(id).is_some() => {
                Ok(id)
            }
            _ => Err(self.error(name.at, format!("'{}' is no object type", name.name))),
        }
    }

    fn look_up(&self, index: &HashMap<String, usize>, name: &TypeName) -> Result<TypeRef> {
        let item = match (Builtin::from_name(&name.name), index.get(&name.name)) {
            (Some(b), _) => Item::Builtin(b),
            (None, Some(&id)) => Item::Named(id),
            (None, None) => {
                return Err(self.error(name.at, format!("type '{}' is unknown", name.name)));
            }
        };
        Ok(TypeRef { item, list: name.list })
    }

    fn name_is_free<'a>(
        &self,
        names: &mut HashSet<&'a str>,
        name: &'a str,
        at: Place,
    ) -> Result<()> {
        if Builtin::from_name(name).is_some() || !names.insert(name) {
            return Err(self.error(at, format!("name '{name}' is taken")));
        }
        Ok(())
    }

    fn error(&self, at: Place, what: impl std::fmt::Display) -> Error {
        Error::invalid(format!("{}:{}: {what}", self.files[at.file], at.line))
    }
}

impl super::EnumValue {
    fn copy(&self) -> Self {
        super::EnumValue { name: self.name.clone(), notes: Notes::clone(&self.notes) }
    }
}
