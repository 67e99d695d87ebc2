//! Which code runs which command: filled by the program, checked against the schema at start.

use std::any::Any;
use std::collections::BTreeMap;
use std::future::Future;
use std::pin::Pin;

use gipfel_base::{Error, Result};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use crate::schema::Schema;
use crate::session::{Request, Version};

/// A boxed future that stays on its thread.
pub type LocalBoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + 'a>>;

type Handler<C> = Box<dyn Fn(C, Value) -> LocalBoxFuture<'static, Result<Value>>>;

/// Handlers by command name; `C` is what every handler is given (often an `Rc` of the daemon).
pub struct Registry<C> {
    schema: &'static Schema,
    handlers: BTreeMap<String, Handler<C>>,
    /// A name was given twice; told by [`Registry::check`].
    doubled: Vec<String>,
}

impl<C: 'static> Registry<C> {
    /// A registry with the commands that need the schema alone: `query-commands`,
    /// `query-qmp-schema`, `query-version`. (`qmp_capabilities` is the session's.)
    pub fn new(schema: &'static Schema, version: Version) -> Self {
        let mut registry = Registry { schema, handlers: BTreeMap::new(), doubled: Vec::new() };
        registry.add_raw("query-commands", move |_, _| async move { Ok(schema.command_list()) });
        registry.add_raw("query-qmp-schema", move |_, _| async move { Ok(schema.introspection()) });
        let version = version.to_value();
        registry.add_raw("query-version", move |_, _| {
            let version = version.clone();
            async move { Ok(version) }
        });
        registry
    }

    /// Registers a handler of plain JSON values.
    pub fn add_raw<F, Fut>(&mut self, name: &str, handler: F)
    where
        F: Fn(C, Value) -> Fut + 'static,
        Fut: Future<Output = Result<Value>> + 'static,
    {
        let boxed: Handler<C> = Box::new(move |cx, args| Box::pin(handler(cx, args)));
        if self.handlers.insert(name.to_owned(), boxed).is_some() {
            self.doubled.push(name.to_owned());
        }
    }

    /// Registers a handler of typed arguments and a typed result.
    ///
    /// Arguments are valid by the schema before `A` is made of them, so a failure to make it means
    /// that `A` and the schema differ; it is answered as an error that says so.
    pub fn add<A, R, F, Fut>(&mut self, name: &str, handler: F)
    where
        A: DeserializeOwned + 'static,
        R: Serialize + 'static,
        F: Fn(C, A) -> Fut + 'static,
        Fut: Future<Output = Result<R>> + 'static,
    {
        let command = name.to_owned();
        let empty = self.schema.command(name).is_some_and(|c| c.returns.is_none());
        self.add_raw(name, move |cx, args| {
            let started = from_value::<A>(&command, args).map(|args| handler(cx, args));
            let command = command.clone();
            async move {
                let result = to_value(&command, started?.await?)?;
                // A handler that returns nothing returns (); the protocol shows that as {}.
                Ok(if empty && result.is_null() { Value::Object(Map::new()) } else { result })
            }
        });
    }

    /// Checks at start that exactly the declared commands have handlers.
    ///
    /// # Errors
    /// Names every command that is declared and not handled, the reverse, and what came twice.
    pub fn check(&self) -> Result<()> {
        let declared = |name: &str| self.schema.command(name).is_some();
        let mut wrong: Vec<String> =
            self.doubled.iter().map(|n| format!("'{n}' has two handlers")).collect();
        for command in self.schema.commands() {
            let session = command.name == "qmp_capabilities";
            if !session && !self.handlers.contains_key(&command.name) {
                wrong.push(format!("'{}' is declared and has no handler", command.name));
            }
        }
        for name in self.handlers.keys().filter(|n| !declared(n)) {
            wrong.push(format!("'{name}' has a handler and is not declared"));
        }
        if wrong.is_empty() {
            return Ok(());
        }
        Err(Error::invalid(format!("the commands do not match their schema: {}", wrong.join("; "))))
    }

    /// Runs a request that a session let through; takes its arguments out of it.
    pub fn run(&self, context: C, request: &mut Request) -> LocalBoxFuture<'static, Result<Value>> {
        match self.handlers.get(&request.name) {
            Some(handler) => handler(context, request.args.take()),
            None => {
                let what = format!("command '{}' has no handler", request.name);
                Box::pin(async move { Err(Error::unsupported(what)) })
            }
        }
    }
}

fn from_value<A: DeserializeOwned>(command: &str, args: Value) -> Result<A> {
    serde_json::from_value(args)
        .map_err(|e| Error::unsupported(format!("'{command}' can't take these arguments: {e}")))
}

fn to_value<R: Serialize + 'static>(command: &str, mut result: R) -> Result<Value> {
    // What is a value already need not be written once more: query results can be large.
    if let Some(v) = (&mut result as &mut dyn Any).downcast_mut::<Value>() {
        return Ok(v.take());
    }
    serde_json::to_value(result)
        .map_err(|e| Error::unsupported(format!("'{command}' can't show its result: {e}")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::rc::Rc;
    use std::task::{Context, Poll, Waker};

    fn now<T>(mut future: LocalBoxFuture<'static, T>) -> T {
        match future.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(value) => value,
            Poll::Pending => panic!("the test's handlers never wait"),
        }
    }

    fn registry() -> Registry<Rc<str>> {
        let version = Version { major: 10, minor: 0, micro: 0, package: String::new() };
        Registry::new(Schema::builtin().unwrap(), version)
    }

    #[derive(serde::Deserialize)]
    #[serde(rename_all = "kebab-case")]
    struct Del {
        node_name: String,
    }

    #[test]
    fn handlers_are_typed() {
        let mut r = registry();
        r.add("blockdev-del", |cx: Rc<str>, a: Del| async move {
            if *a.node_name == *cx { Ok(()) } else { Err(Error::invalid("other")) }
        });
        let request = |node: &str| Request {
            name: "blockdev-del".into(),
            args: serde_json::json!({ "node-name": node }),
            id: None,
        };
        assert_eq!(now(r.run("a".into(), &mut request("a"))).unwrap(), serde_json::json!({}));
        assert!(now(r.run("a".into(), &mut request("b"))).is_err());
        let mut version = Request { name: "query-version".into(), args: Value::Null, id: None };
        assert_eq!(now(r.run("a".into(), &mut version)).unwrap()["qemu"]["major"], 10);
        version.name = "quit".into();
        assert!(now(r.run("a".into(), &mut version)).is_err());
    }

    #[test]
    fn the_check_names_what_differs() {
        let mut r = registry();
        r.add_raw("no-such", |_, v| async { Ok(v) });
        r.add_raw("quit", |_, v| async { Ok(v) });
        r.add_raw("quit", |_, v| async { Ok(v) });
        let e = r.check().unwrap_err().to_string();
        for want in [
            "'quit' has two handlers",
            "'no-such' has a handler and is not declared",
            "'blockdev-add' is declared and has no handler",
        ] {
            assert!(e.contains(want), "{e}");
        }
        let mut r = registry();
        for c in Schema::builtin().unwrap().commands() {
            let own = ["query-version", "query-commands", "query-qmp-schema", "qmp_capabilities"];
            if !own.contains(&c.name.as_str()) {
                r.add_raw(&c.name, |_, v| async { Ok(v) });
            }
        }
        r.check().unwrap();
    }
}
