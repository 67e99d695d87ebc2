//! The schema as the protocol shows it to clients: `query-qmp-schema` and `query-commands`.
//!
//! The format is that of the QMP reference, "QMP introspection": one entry for each command and
//! event, then one for each type that can be reached from them. Types carry their names here;
//! clients must not rest on them, only on what the entries say.

use serde_json::{Map, Value, json};

use super::{Builtin, Item, Kind, Member, Notes, Schema, TypeRef};

/// The name of the object type without members.
const EMPTY: &str = "empty";

impl Schema {
    /// The answer of `query-commands`.
    pub fn command_list(&self) -> Value {
        self.commands.iter().map(|c| json!({"name": c.name})).collect()
    }

    /// The answer of `query-qmp-schema`.
    pub fn introspection(&self) -> Value {
        let mut out = Entries {
            schema: self,
            entries: Vec::new(),
            named: vec![false; self.types.len()],
            others: Vec::new(),
            queue: Vec::new(),
        };
        for c in &self.commands {
            let args = out.object_or_empty(c.args);
            let returns = match c.returns {
                Some(ty) => out.reference(ty),
                None => out.object_or_empty(None),
            };
            let entry = json!({
                "name": c.name, "meta-type": "command", "arg-type": args, "ret-type": returns,
            });
            out.add(entry, &c.notes);
        }
        for e in &self.events {
            let data = out.object_or_empty(e.data);
            let entry = json!({"name": e.name, "meta-type": "event", "arg-type": data});
            out.add(entry, &e.notes);
        }
        while let Some(id) = out.queue.pop() {
            out.named_type(id);
        }
        Value::Array(out.entries)
    }
}

struct Entries<'a> {
    schema: &'a Schema,
    entries: Vec<Value>,
    /// Named types that are in `queue` or in `entries` already.
    named: Vec<bool>,
    /// Built-in and list types that are in `entries`.
    others: Vec<String>,
    queue: Vec<usize>,
}

impl Entries<'_> {
    fn add(&mut self, mut entry: Value, notes: &Notes) {
        if let Value::Object(map) = &mut entry {
            put_features(map, notes);
        }
        self.entries.push(entry);
    }

    fn object_or_empty(&mut self, id: Option<usize>) -> String {
        match id {
            Some(id) => self.reference(TypeRef { item: Item::Named(id), list: false }),
            None => {
                self.once(EMPTY, json!({"meta-type": "object", "members": []}));
                EMPTY.into()
            }
        }
    }

    /// The name under which entries speak of a type; sees to it that the type gets an entry.
    fn reference(&mut self, ty: TypeRef) -> String {
        let item = match ty.item {
            Item::Builtin(b) => {
                let (name, json_type) = shown(b);
                self.once(name, json!({"meta-type": "builtin", "json-type": json_type}));
                name.to_owned()
            }
            Item::Named(id) => {
                if !std::mem::replace(&mut self.named[id], true) {
                    self.queue.push(id);
                }
                self.schema.types[id].name.clone()
            }
        };
        if !ty.list {
            return item;
        }
        let name = format!("[{item}]");
        self.once(&name, json!({"meta-type": "array", "element-type": item}));
        name
    }

    fn once(&mut self, name: &str, mut entry: Value) {
        if self.others.iter().any(|n| n == name) {
            return;
        }
        self.others.push(name.to_owned());
        if let Value::Object(map) = &mut entry {
            map.insert("name".into(), name.into());
        }
        self.entries.push(entry);
    }

    fn named_type(&mut self, id: usize) {
        let schema = self.schema;
        let ty = &schema.types[id];
        let entry = match &ty.kind {
            Kind::Enum(values) => {
                let names: Vec<_> = values.iter().map(|v| v.name.as_str()).collect();
                let members = values.iter().map(|v| {
                    let mut map = Map::new();
                    map.insert("name".into(), v.name.as_str().into());
                    put_features(&mut map, &v.notes);
                    Value::Object(map)
                });
                let members: Value = members.collect();
                json!({"meta-type": "enum", "members": members, "values": names})
            }
            Kind::Struct(s) => {
                json!({"meta-type": "object", "members": self.members(&s.members)})
            }
            Kind::Union(u) => {
                let mut variants = Vec::new();
                let values = schema.enum_values(u.tag().ty).unwrap_or_default();
                for (value, branch) in values.iter().zip(&u.branches) {
                    let ty = self.object_or_empty(*branch);
                    variants.push(json!({"case": value.name, "type": ty}));
                }
                json!({
                    "meta-type": "object", "members": self.members(&u.members),
                    "tag": u.tag().name, "variants": variants,
                })
            }
            Kind::Alternate(ways) => {
                let ways = ways.iter().map(|(_, ty)| json!({"type": self.reference(*ty)}));
                let ways: Value = ways.collect();
                json!({"meta-type": "alternate", "members": ways})
            }
        };
        let mut entry = entry;
        if let Value::Object(map) = &mut entry {
            map.insert("name".into(), ty.name.as_str().into());
        }
        self.add(entry, &ty.notes);
    }

    fn members(&mut self, members: &[Member]) -> Value {
        let mut out = Vec::new();
        for m in members {
            let mut map = Map::new();
            map.insert("name".into(), m.name.as_str().into());
            map.insert("type".into(), self.reference(m.ty).into());
            if m.optional {
                map.insert("default".into(), Value::Null);
            }
            put_features(&mut map, &m.notes);
            out.push(Value::Object(map));
        }
        Value::Array(out)
    }
}

/// Features as given; what is ours says so by one of its own.
fn put_features(map: &mut Map<String, Value>, notes: &Notes) {
    let mut features: Vec<Value> = notes.features.iter().map(|f| f.as_str().into()).collect();
    if notes.ours {
        features.push("gipfel-extension".into());
    }
    if !features.is_empty() {
        map.insert("features".into(), Value::Array(features));
    }
}

/// Introspection knows one integer type.
fn shown(b: Builtin) -> (&'static str, &'static str) {
    match b {
        Builtin::Str => ("str", "string"),
        Builtin::Bool => ("bool", "boolean"),
        Builtin::Number => ("number", "number"),
        Builtin::Null => ("null", "null"),
        Builtin::Any => ("any", "value"),
        _ => ("int", "int"),
    }
}
