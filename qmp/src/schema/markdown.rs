//! The reference page, written from the schema.

use std::fmt::Write;

use super::{Item, Kind, Member, Notes, Schema, TypeRef};

impl Schema {
    /// The text of docs/qmp-reference.md: every command, event and type with its documentation.
    pub fn reference_markdown(&self) -> String {
        let mut out = String::from(
            "# QMP reference\n\n\
             Written by the program from its own protocol definition; edit `qmp/schema/*.qmp`, \
             not this page.\nNames, types and optionality follow the QMP reference; what is marked \
             *ours* exists only here.\nA `?` after a name says that it may be left out; `[T]` is a \
             list of `T`. A `size` counts bytes;\non command lines it takes a suffix k, M, G, T, P \
             or E.\n",
        );
        out.push_str("\n## Commands\n");
        for c in &self.commands {
            heading(&mut out, &c.name, &c.notes);
            self.call(&mut out, "Arguments", c.args);
            if let Some(ty) = c.returns {
                let _ = writeln!(out, "\nReturns: {}", self.link(ty));
            }
            if !c.success_response {
                out.push_str("\nSuccess is not answered.\n");
            }
            if c.not_found != crate::ErrorClass::GenericError {
                let class = c.not_found.name();
                let _ = writeln!(out, "\nWhat is named and not there: error class `{class}`.");
            }
        }
        out.push_str("\n## Events\n");
        for e in &self.events {
            heading(&mut out, &e.name, &e.notes);
            self.call(&mut out, "Data", e.data);
        }
        out.push_str("\n## Types\n");
        for (id, ty) in self.types.iter().enumerate() {
            if self.is_inline(id) {
                continue;
            }
            heading(&mut out, &ty.name, &ty.notes);
            self.shape(&mut out, &ty.kind);
        }
        out
    }

    /// Arguments written with their command have no name of their own to be looked up by.
    fn is_inline(&self, id: usize) -> bool {
        let inline = |name: &str, what: &str| self.types[id].name == format!("{name}-{what}");
        self.commands.iter().any(|c| c.args == Some(id) && inline(&c.name, "arguments"))
            || self.events.iter().any(|e| e.data == Some(id) && inline(&e.name, "data"))
    }

    fn call(&self, out: &mut String, what: &str, id: Option<usize>) {
        match id {
            None => {}
            Some(id) if self.is_inline(id) => {
                let _ = writeln!(out, "\n{what}:");
                self.shape(out, &self.types[id].kind);
            }
            Some(id) => {
                let ty = TypeRef { item: Item::Named(id), list: false };
                let _ = writeln!(out, "\n{what}: {}", self.link(ty));
            }
        }
    }

    fn shape(&self, out: &mut String, kind: &Kind) {
        match kind {
            Kind::Enum(values) => {
                out.push('\n');
                for v in values {
                    let _ = writeln!(out, "- `{}`{}{}", v.name, flags(&v.notes), tail(&v.notes));
                }
            }
            Kind::Struct(s) => {
                self.members_list(out, &s.members);
                for group in &s.one_of {
                    let names: Vec<_> = group.iter().map(|n| format!("`{n}`")).collect();
                    let _ = writeln!(out, "\nExactly one of {} is given.", names.join(", "));
                }
            }
            Kind::Union(u) => {
                self.members_list(out, &u.members);
                let tag = u.tag();
                let values = self.enum_values(tag.ty).unwrap_or_default();
                for (value, branch) in values.iter().zip(&u.branches) {
                    if let Some(id) = branch {
                        let ty = self.link(TypeRef { item: Item::Named(*id), list: false });
                        let _ = writeln!(out, "- `{}` = `{}`: also {ty}", tag.name, value.name);
                    }
                }
            }
            Kind::Alternate(ways) => {
                out.push_str("\nOne of:\n");
                for (name, ty) in ways {
                    let _ = writeln!(out, "- {} ({name})", self.link(*ty));
                }
            }
        }
    }

    fn members_list(&self, out: &mut String, members: &[Member]) {
        out.push('\n');
        for m in members {
            let mark = if m.optional { "?" } else { "" };
            let _ = writeln!(
                out,
                "- `{}`{mark}: {}{}{}",
                m.name,
                self.link(m.ty),
                flags(&m.notes),
                tail(&m.notes)
            );
        }
    }

    fn link(&self, ty: TypeRef) -> String {
        let Item::Named(id) = ty.item else {
            return format!("`{}`", self.type_text(ty));
        };
        let name = &self.types[id].name;
        let link = format!("[{name}](#{})", name.to_lowercase());
        if ty.list { format!("list of {link}") } else { link }
    }
}

fn heading(out: &mut String, name: &str, notes: &Notes) {
    let _ = writeln!(out, "\n### {name}");
    if !notes.doc.is_empty() || notes.ours || !notes.features.is_empty() {
        let _ = writeln!(out, "\n{}{}", notes.doc, flags(notes));
    }
}

fn flags(notes: &Notes) -> String {
    let mut all: Vec<String> = notes.features.iter().map(|f| format!("`{f}`")).collect();
    if notes.ours {
        all.push("*ours*".into());
    }
    if all.is_empty() { String::new() } else { format!(" ({})", all.join(", ")) }
}

fn tail(notes: &Notes) -> String {
    if notes.doc.is_empty() {
        return String::new();
    }
    format!(": {}", notes.doc.replace('\n', " "))
}
