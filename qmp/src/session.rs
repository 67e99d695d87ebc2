//! One monitor connection as a state machine: bytes in, commands and ready answers out.
//!
//! It does no I/O and runs no command. Source: QMP wire protocol (greeting, capabilities
//! negotiation, commands, responses, events), and trials on the reference daemon.
//! Out-of-band execution is not offered, so `exec-oob` is refused.

use gipfel_base::{Error, Result};
use serde_json::{Map, Value, json};

use crate::lexer::{Frame, Lexer};
use crate::schema::Schema;
use crate::{ErrorClass, json};

/// The version that the greeting and `query-version` give.
#[derive(Clone, Debug)]
pub struct Version {
    /// Of the protocol that we speak: clients compare these numbers with the reference's.
    pub major: u32,
    /// See `major`.
    pub minor: u32,
    /// See `major`.
    pub micro: u32,
    /// Free text: our own name and version.
    pub package: String,
}

impl Version {
    /// The answer of `query-version`.
    pub fn to_value(&self) -> Value {
        json!({
            "qemu": {"micro": self.micro, "minor": self.minor, "major": self.major},
            "package": self.package,
        })
    }
}

/// A point in time as events carry it: since 1970-01-01 UTC.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Timestamp {
    /// Whole seconds.
    pub seconds: i64,
    /// The rest, 0 to 999,999.
    pub microseconds: u32,
}

/// A command that passed all checks of its form; run it, then answer.
#[derive(Debug, PartialEq)]
pub struct Request {
    /// The name of a declared command.
    pub name: String,
    /// Arguments that fit the schema; an object.
    pub args: Value,
    /// What the client wants echoed in the answer.
    pub id: Option<Value>,
}

/// What came in.
#[derive(Debug, PartialEq)]
pub enum Incoming {
    /// Run this command.
    Command(Request),
    /// Write this: the answer to something that is no command to run.
    Answer(Outgoing),
}

/// A message to a client: greeting, answer or event.
#[derive(Clone, Debug, PartialEq)]
pub struct Outgoing(Value);

impl Outgoing {
    /// The text to write, line end included: one line, or indented for people.
    pub fn text(&self, pretty: bool) -> String {
        let text = if pretty { json::to_pretty(&self.0) } else { json::to_line(&self.0) };
        // Lines end as the reference daemon ends them.
        text + "\r\n"
    }
}

/// One connection of one client.
pub struct Session {
    schema: &'static Schema,
    lexer: Lexer,
    negotiated: bool,
}

impl Session {
    /// A connection on which nothing has been said yet.
    pub fn new(schema: &'static Schema) -> Self {
        Session { schema, lexer: Lexer::new(), negotiated: false }
    }

    /// The first message to write.
    pub fn greeting(version: &Version) -> Outgoing {
        Outgoing(json!({"QMP": {"version": version.to_value(), "capabilities": []}}))
    }

    /// True once the client has negotiated: from then on it gets events.
    pub fn negotiated(&self) -> bool {
        self.negotiated
    }

    /// Takes bytes from the front of `input` up to the next command or answer.
    ///
    /// `None` means that all of `input` is taken. Answer in the order in which things come.
    /// Bytes not yet taken are the caller's, so a client that floods is held by not reading on.
    pub fn push(&mut self, input: &mut &[u8]) -> Option<Incoming> {
        self.lexer.next_frame(input).map(|frame| self.frame(frame))
    }

    /// What is left to say when the client's stream has ended.
    pub fn finish(&mut self) -> Option<Incoming> {
        self.lexer.finish().map(|frame| self.frame(frame))
    }

    fn frame(&mut self, frame: Frame) -> Incoming {
        let parsed = match frame {
            Frame::Message(text) => json::parse_frame(&text),
            Frame::Broken(why) => Err(Error::invalid(format!("this is not valid JSON: {why}"))),
        };
        let mut id = None;
        match parsed.map_err(generic).and_then(|message| self.message(message, &mut id)) {
            Ok(Some((name, args))) => Incoming::Command(Request { name, args, id }),
            Ok(None) => Incoming::Answer(success(json!({}), id.as_ref())),
            Err((class, what)) => Incoming::Answer(failure(class, &what, id.as_ref())),
        }
    }

    /// A command to run; `None`: negotiation, done here.
    fn message(
        &mut self,
        message: Value,
        id: &mut Option<Value>,
    ) -> Result<Option<(String, Value)>, (ErrorClass, String)> {
        let Value::Object(mut message) = message else {
            return Err(generic(Error::invalid("a message must be a JSON object")));
        };
        *id = message.shift_remove("id");
        let (name, mut args) = members(message).map_err(generic)?;
        let not_found = |what: String| (ErrorClass::CommandNotFound, what);
        let Some(command) = self.schema.command(&name) else {
            let shown: String = name.chars().take(64).collect();
            return Err(not_found(format!("command '{shown}' is unknown")));
        };
        if name == "qmp_capabilities" {
            if self.negotiated {
                return Err(not_found("capabilities are negotiated already".into()));
            }
            self.schema.check_arguments(command, &mut args).map_err(generic)?;
            negotiate(&args).map_err(generic)?;
            self.negotiated = true;
            return Ok(None);
        }
        if !self.negotiated {
            return Err(not_found(format!(
                "'{name}' comes too early: negotiate with 'qmp_capabilities' first"
            )));
        }
        self.schema.check_arguments(command, &mut args).map_err(generic)?;
        Ok(Some((name, args)))
    }
}

/// Takes a message apart: the command's name and its arguments.
fn members(message: Map<String, Value>) -> Result<(String, Value)> {
    let mut name = None;
    let mut args = Value::Object(Map::new());
    for (key, value) in message {
        match (key.as_str(), value) {
            ("execute", Value::String(text)) => name = Some(text),
            ("execute", _) => return Err(Error::invalid("'execute' must be a string")),
            ("arguments", object @ Value::Object(_)) => args = object,
            ("arguments", _) => return Err(Error::invalid("'arguments' must be an object")),
            ("exec-oob", _) => {
                return Err(Error::invalid(
                    "'exec-oob' is not offered: the greeting lists no capability 'oob'",
                ));
            }
            (other, _) => {
                let shown: String = other.chars().take(64).collect();
                return Err(Error::invalid(format!(
                    "'{shown}' is no member of a message: use 'execute', 'arguments' and 'id'"
                )));
            }
        }
    }
    match name {
        Some(name) => Ok((name, args)),
        None => Err(Error::invalid("'execute' is missing: give the name of a command")),
    }
}

/// None of the capabilities that exist is offered.
fn negotiate(args: &Value) -> Result<()> {
    let first = args.get("enable").and_then(Value::as_array).and_then(|list| list.first());
    match first.and_then(Value::as_str) {
        None => Ok(()),
        Some(name) => Err(Error::unsupported(format!(
            "capability '{name}' is not offered: enable only what the greeting lists"
        ))),
    }
}

fn generic(e: Error) -> (ErrorClass, String) {
    (ErrorClass::GenericError, e.to_string())
}

impl Request {
    /// The answer to this request; `None` where success is not answered.
    pub fn reply(&self, schema: &Schema, result: Result<Value>) -> Option<Outgoing> {
        let command = schema.command(&self.name);
        match result {
            Ok(_) if command.is_some_and(|c| !c.success_response) => None,
            Ok(value) => Some(success(value, self.id.as_ref())),
            Err(e) => {
                let class = ErrorClass::of(e.kind(), command);
                Some(failure(class, &e.to_string(), self.id.as_ref()))
            }
        }
    }
}

impl Schema {
    /// The message that tells clients of an event.
    ///
    /// # Errors
    /// The event is not declared, or its data do not fit the declaration: a mistake of the caller.
    pub fn event_message(&self, name: &str, mut data: Value, at: Timestamp) -> Result<Outgoing> {
        let event = self
            .event(name)
            .ok_or_else(|| Error::invalid(format!("event '{name}' is not declared")))?;
        self.check_event(event, &mut data).map_err(|e| e.context(format!("event '{name}'")))?;
        let timestamp = json!({"seconds": at.seconds, "microseconds": at.microseconds});
        let mut message = Map::new();
        message.insert("timestamp".into(), timestamp);
        message.insert("event".into(), name.into());
        if event.data.is_some() {
            message.insert("data".into(), data);
        }
        Ok(Outgoing(Value::Object(message)))
    }
}

fn success(value: Value, id: Option<&Value>) -> Outgoing {
    let mut message = Map::new();
    message.insert("return".into(), value);
    if let Some(id) = id {
        message.insert("id".into(), id.clone());
    }
    Outgoing(Value::Object(message))
}

fn failure(class: ErrorClass, what: &str, id: Option<&Value>) -> Outgoing {
    let mut message = Map::new();
    if let Some(id) = id {
        message.insert("id".into(), id.clone());
    }
    message.insert("error".into(), json!({"class": class.name(), "desc": what}));
    Outgoing(Value::Object(message))
}

#[cfg(test)]
mod tests;
