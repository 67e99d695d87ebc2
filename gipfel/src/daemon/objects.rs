//! Objects beside the graph: I/O threads by name.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;

use gipfel_base::{Error, ErrorKind, Result};
use gipfel_qmp::Registry;
use serde_json::{Map, Value, json};

use super::Daemon;

/// Objects at once.
const MAX_OBJECTS: usize = 10_000;

/// The objects of a daemon.
#[derive(Default)]
pub struct Objects {
    list: RefCell<BTreeMap<String, Map<String, Value>>>,
}

impl Objects {
    /// Makes an object (ObjectOptions).
    pub fn add(&self, mut options: Map<String, Value>) -> Result<()> {
        let mut take = |key: &str| match options.remove(key) {
            Some(Value::String(s)) => s,
            _ => String::new(),
        };
        let (kind, id) = (take("qom-type"), take("id"));
        let mut list = self.list.borrow_mut();
        if list.contains_key(&id) {
            let text = format!("there is an object '{id}' already");
            return Err(Error::new(ErrorKind::Exists, text));
        }
        if list.len() >= MAX_OBJECTS {
            let text = format!("there are {MAX_OBJECTS} objects already");
            return Err(Error::new(ErrorKind::Limit, text));
        }
        options.insert("type".into(), json!(kind));
        list.insert(id, options);
        Ok(())
    }

    /// Fails where no I/O thread object has that id.
    pub fn check_iothread(&self, id: &str) -> Result<()> {
        match self.list.borrow().get(id) {
            Some(o) if o.get("type") == Some(&json!("iothread")) => Ok(()),
            _ => {
                let text = format!("there is no iothread object '{id}'");
                Err(Error::new(ErrorKind::NotFound, text))
            }
        }
    }
}

/// Registers the commands for objects.
pub fn register(r: &mut Registry<Rc<Daemon>>) {
    for c in ["qom-list", "qom-get", "qom-set", "object-del", "block_set_io_throttle"] {
        r.add_raw(c, |_, _| async { Err(Error::unsupported("not offered yet")) });
    }
    r.add_raw("object-add", |d: Rc<Daemon>, v| async move {
        let Value::Object(m) = v else { return Err(Error::invalid("no object")) };
        d.objects.add(m)?;
        Ok(json!({}))
    });
}
