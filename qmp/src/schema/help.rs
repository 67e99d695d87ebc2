//! What an option of the command line takes, for people at a terminal.

use std::fmt::Write;

use gipfel_base::{Error, Result};

use super::validate::unknown_word;
use super::{Kind, Member, Schema, Union};

impl Schema {
    /// The help that `text`, the value of an option of union type `type_name`, asks for: `help`
    /// lists the kinds there are, `KIND,help` what one of them takes. `None`: it asks for none.
    ///
    /// # Errors
    /// There is no such union, or no such kind.
    pub fn option_help(&self, type_name: &str, text: &str) -> Result<Option<String>> {
        let kind = match text.split_once(',') {
            _ if text == "help" || text == "?" => None,
            Some((kind, "help" | "?")) => Some(kind),
            _ => return Ok(None),
        };
        let ty = self.type_at(self.type_named(type_name)?);
        let Kind::Union(union) = &ty.kind else { return Ok(None) };
        let kinds = self.enum_values(union.tag().ty).unwrap_or_default();
        let Some(kind) = kind else {
            let mut out = format!("{}, one of:\n", union.tag().name);
            for k in kinds {
                item(&mut out, &k.name, &k.notes.doc);
            }
            let _ = writeln!(out, "KIND,help tells what one of them takes.");
            return Ok(Some(out));
        };
        // Some people write the key as well.
        let kind = kind.strip_prefix(&format!("{}=", union.tag().name)).unwrap_or(kind);
        let Some(at) = kinds.iter().position(|k| k.name == kind) else {
            let names = kinds.iter().map(|k| k.name.as_str());
            let tag = &union.tag().name;
            return Err(Error::invalid(format!("'{tag}' {}", unknown_word(kind, names))));
        };
        Ok(Some(self.kind_help(union, kind, at)))
    }

    fn kind_help(&self, union: &Union, kind: &str, at: usize) -> String {
        let mut out = format!("{kind} takes:\n");
        let common = union.members.iter().enumerate().filter(|(i, _)| *i != union.tag);
        let common: Vec<&Member> = common.map(|(_, m)| m).collect();
        let own = union.branches.get(at).copied().flatten();
        let own = own.and_then(|id| self.members(id)).unwrap_or_default();
        for m in common.into_iter().chain(own) {
            let name = format!("{}=<{}>", m.name, self.type_text(m.ty));
            item(&mut out, &if m.optional { format!("[{name}]") } else { name }, &m.notes.doc);
        }
        out
    }
}

fn item(out: &mut String, name: &str, doc: &str) {
    let doc = doc.replace('\n', &format!("\n{:30}", ""));
    if name.len() > 26 {
        let _ = writeln!(out, "  {name}\n{:30}{doc}", "");
    } else {
        let _ = writeln!(out, "  {name:26}  {doc}");
    }
}
