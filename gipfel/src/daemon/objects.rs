//! Objects beside the graph: I/O threads by name, throttle groups and secrets, and the paths and
//! properties by which QMP reaches them.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;

use gipfel_base::limits::MAX_NAME;
use gipfel_base::{Error, ErrorKind, Result, ResultExt};
use gipfel_filters::{Groups, Limits, ThrottleGroup};
use gipfel_node::Secrets;
use gipfel_qmp::Registry;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::Daemon;
use super::secret::{self, Facts};

/// Objects at once.
const MAX_OBJECTS: usize = 10_000;

/// The properties of an I/O thread and what they are unless set. All threads serve all nodes and
/// none polls, so that they are kept and shown, and nothing else.
const IOTHREAD: [(&str, u64); 6] = [
    ("poll-max-ns", 0),
    ("poll-grow", 0),
    ("poll-shrink", 0),
    ("aio-max-batch", 0),
    ("thread-pool-min", 0),
    ("thread-pool-max", 64),
];

/// One object.
enum Object {
    IoThread(BTreeMap<&'static str, u64>),
    ThrottleGroup(Arc<ThrottleGroup>),
    Secret(Facts),
}

/// The objects of a daemon.
#[derive(Default)]
pub struct Objects {
    list: RefCell<BTreeMap<String, Object>>,
    groups: Arc<Groups>,
    secrets: Arc<Secrets>,
}

impl Objects {
    /// The throttle groups, those that are no objects included.
    pub fn groups(&self) -> &Arc<Groups> {
        &self.groups
    }

    /// The secrets, for drivers.
    pub fn secrets(&self) -> &Arc<Secrets> {
        &self.secrets
    }

    /// Makes an object (ObjectOptions).
    pub fn add(&self, mut options: Map<String, Value>) -> Result<()> {
        let mut take = |key: &str| match options.remove(key) {
            Some(Value::String(s)) => s,
            _ => String::new(),
        };
        let (kind, id) = (take("qom-type"), take("id"));
        check_id(&id)?;
        let mut list = self.list.borrow_mut();
        if list.contains_key(&id) {
            let text = format!("there is an object '{id}' already");
            return Err(Error::new(ErrorKind::Exists, text));
        }
        if list.len() >= MAX_OBJECTS {
            let text = format!("there are {MAX_OBJECTS} objects already");
            return Err(Error::new(ErrorKind::Limit, text));
        }
        let object = match kind.as_str() {
            "throttle-group" => {
                let limits = group_limits(options).at(|| format!("throttle group '{id}'"))?;
                Object::ThrottleGroup(self.groups.create(&id, limits)?)
            }
            "iothread" => Object::IoThread(io_thread(options).at(|| format!("iothread '{id}'"))?),
            "secret" => {
                let (facts, s) =
                    secret::make(options, &self.secrets).at(|| format!("secret '{id}'"))?;
                self.secrets.insert(&id, s);
                Object::Secret(facts)
            }
            _ => return Err(Error::unsupported(format!("there are no objects of type '{kind}'"))),
        };
        list.insert(id, object);
        Ok(())
    }

    /// Removes an object that nothing uses.
    fn remove(&self, id: &str) -> Result<()> {
        let mut list = self.list.borrow_mut();
        match list.get(id) {
            None => return Err(no_object(id)),
            Some(Object::ThrottleGroup(_)) => self.groups.remove(id)?,
            Some(Object::Secret(_)) => self.secrets.remove(id),
            Some(Object::IoThread(_)) => {}
        }
        list.remove(id);
        Ok(())
    }

    /// Fails where no I/O thread object has that id.
    pub fn check_iothread(&self, id: &str) -> Result<()> {
        match self.list.borrow().get(id) {
            Some(Object::IoThread(_)) => Ok(()),
            _ => {
                let text = format!("there is no iothread object '{id}'");
                Err(Error::new(ErrorKind::NotFound, text))
            }
        }
    }

    /// Does something with the object at a path.
    fn at<T>(&self, path: &str, f: impl FnOnce(&mut Object) -> Result<T>) -> Result<T> {
        let id = path.strip_prefix("/objects/").unwrap_or(path);
        match self.list.borrow_mut().get_mut(id) {
            Some(o) => f(o).at(|| format!("object '{id}'")),
            None => Err(no_object(path)),
        }
    }

    /// qom-list: names and types of the properties at a path.
    fn properties(&self, path: &str) -> Result<Vec<(String, String)>> {
        let mut found = vec![("type".to_owned(), "string".to_owned())];
        match Container::of(path) {
            Some(Container::Root) => {
                found.push(("objects".to_owned(), "child<container>".to_owned()));
            }
            Some(Container::Objects) => found.extend(
                self.list.borrow().iter().map(|(i, o)| (i.clone(), format!("child<{}>", o.kind()))),
            ),
            None => self.at(path, |o| {
                let names: Vec<String> = match o {
                    Object::Secret(_) => {
                        found.extend(Facts::TYPES.map(|(n, t)| (n.to_owned(), t.to_owned())));
                        Vec::new()
                    }
                    Object::IoThread(_) => IOTHREAD.map(|(n, _)| n.to_owned()).into(),
                    Object::ThrottleGroup(_) => {
                        found.push(("limits".to_owned(), "ThrottleLimits".to_owned()));
                        Limits::names().map(|n| format!("x-{n}")).collect()
                    }
                };
                found.extend(names.into_iter().map(|n| (n, "int".to_owned())));
                Ok(())
            })?,
        }
        Ok(found)
    }

    /// qom-get.
    fn get(&self, path: &str, property: &str) -> Result<Value> {
        let inner = match Container::of(path) {
            None => return self.at(path, |o| o.get(property)),
            Some(_) if property == "type" => return Ok(json!("container")),
            Some(Container::Root) if property == "objects" => "/objects".to_owned(),
            Some(Container::Objects) if self.list.borrow().contains_key(property) => {
                format!("/objects/{property}")
            }
            Some(_) => return Err(no_property(property).context(format!("'{path}'"))),
        };
        Ok(json!(inner))
    }

    /// qom-set.
    fn set(&self, path: &str, property: &str, value: &Value) -> Result<()> {
        if Container::of(path).is_some() {
            return Err(Error::invalid(format!("'{path}' has no property that can be set")));
        }
        self.at(path, |o| o.set(property, value))
    }
}

/// The paths that hold objects and are none.
enum Container {
    Root,
    Objects,
}

impl Container {
    fn of(path: &str) -> Option<Container> {
        match path {
            "/" => Some(Container::Root),
            "/objects" | "objects" => Some(Container::Objects),
            _ => None,
        }
    }
}

impl Object {
    fn kind(&self) -> &'static str {
        match self {
            Object::IoThread(_) => "iothread",
            Object::ThrottleGroup(_) => "throttle-group",
            Object::Secret(_) => "secret",
        }
    }

    fn get(&self, property: &str) -> Result<Value> {
        if property == "type" {
            return Ok(json!(self.kind()));
        }
        let value = match self {
            Object::Secret(facts) => return facts.get(property),
            Object::IoThread(p) => p.get(property).copied(),
            Object::ThrottleGroup(g) if property == "limits" => {
                return Ok(Value::Object(g.limits().to_json()));
            }
            Object::ThrottleGroup(g) => {
                property.strip_prefix("x-").and_then(|name| g.limits().get(name))
            }
        };
        value.map(Value::from).ok_or_else(|| no_property(property))
    }

    fn set(&mut self, property: &str, value: &Value) -> Result<()> {
        // A property that is not there is refused as such.
        self.get(property)?;
        if property == "type" {
            return Err(Error::invalid("property 'type' cannot be set"));
        }
        match self {
            Object::Secret(_) => Err(Error::unsupported(
                "a secret stays as it was made: make another one, with an id of its own",
            )),
            Object::IoThread(p) => {
                let mut next = p.clone();
                set_io_thread(&mut next, property, value)?;
                check_io_thread(&next)?;
                *p = next;
                Ok(())
            }
            Object::ThrottleGroup(g) => {
                let mut limits = g.limits();
                match (property.strip_prefix("x-"), value) {
                    (Some(name), v) => {
                        limits.update(&Map::from_iter([(name.into(), v.clone())]))?
                    }
                    (None, Value::Object(m)) => limits.update(m)?,
                    (None, _) => return Err(Error::invalid("property 'limits' is an object")),
                }
                g.set_limits(limits)
            }
        }
    }
}

fn no_object(path: &str) -> Error {
    Error::new(ErrorKind::NotFound, format!("there is no object '{path}'"))
}

fn no_property(property: &str) -> Error {
    Error::invalid(format!("there is no property '{property}'"))
}

fn check_id(id: &str) -> Result<()> {
    let mut chars = id.chars();
    let ok = chars.next().is_some_and(|c| c.is_ascii_alphabetic())
        && chars.all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '_'));
    if ok && id.len() <= MAX_NAME {
        return Ok(());
    }
    Err(Error::invalid(format!(
        "'{id}' cannot be an object's id: it must begin with a letter, go on with letters, \
         digits, '-', '.' or '_', and have at most {MAX_NAME} characters"
    )))
}

/// ThrottleGroupProperties: single properties, then those in `limits`.
fn group_limits(options: Map<String, Value>) -> Result<Limits> {
    let mut limits = Limits::default();
    let single =
        options.iter().filter_map(|(k, v)| Some((k.strip_prefix("x-")?.into(), v.clone())));
    limits.update(&single.collect())?;
    if let Some(Value::Object(m)) = options.get("limits") {
        limits.update(m)?;
    }
    Ok(limits)
}

/// IothreadProperties.
fn io_thread(options: Map<String, Value>) -> Result<BTreeMap<&'static str, u64>> {
    let mut properties = BTreeMap::from(IOTHREAD);
    for (name, value) in &options {
        set_io_thread(&mut properties, name, value)?;
    }
    check_io_thread(&properties)?;
    Ok(properties)
}

fn set_io_thread(p: &mut BTreeMap<&'static str, u64>, name: &str, value: &Value) -> Result<()> {
    let place = p.get_mut(name).ok_or_else(|| no_property(name))?;
    let number = value.as_u64().filter(|n| i64::try_from(*n).is_ok());
    *place = number.ok_or_else(|| {
        Error::invalid(format!("'{name}' must be a number of at least 0: {value}"))
    })?;
    Ok(())
}

fn check_io_thread(p: &BTreeMap<&'static str, u64>) -> Result<()> {
    let (min, max) = (p["thread-pool-min"], p["thread-pool-max"]);
    if max == 0 || min > max {
        return Err(Error::invalid(format!(
            "'thread-pool-max' ({max}) must be at least 1 and at least 'thread-pool-min' ({min})"
        )));
    }
    Ok(())
}

#[derive(Deserialize)]
struct Property {
    path: String,
    property: String,
    #[serde(default)]
    value: Value,
}

/// Registers the commands for objects.
pub fn register(r: &mut Registry<Rc<Daemon>>) {
    r.add("object-add", |d: Rc<Daemon>, a: Map<String, Value>| async move { d.objects.add(a) });
    r.add("object-del", |d: Rc<Daemon>, a: Map<String, Value>| async move {
        d.objects.remove(a.get("id").and_then(Value::as_str).unwrap_or_default())
    });
    r.add("qom-list", |d: Rc<Daemon>, a: Map<String, Value>| async move {
        let path = a.get("path").and_then(Value::as_str).unwrap_or_default();
        let list = d.objects.properties(path)?.into_iter();
        Ok(list.map(|(n, t)| json!({ "name": n, "type": t })).collect::<Value>())
    });
    r.add(
        "qom-get",
        |d: Rc<Daemon>, a: Property| async move { d.objects.get(&a.path, &a.property) },
    );
    r.add("qom-set", |d: Rc<Daemon>, a: Property| async move {
        d.objects.set(&a.path, &a.property, &a.value)
    });
}
