//! A blocking QMP client over a unix socket: commands in, replies out, events kept in a queue.
//!
//! Source: the QMP wire protocol (docs/interop/qmp-spec.rst of qemu/qemu).

use gipfel_base::{Error, ErrorKind, Result, ResultExt};
use serde_json::{Value, json};
use std::collections::VecDeque;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

/// A reply that was an error, as the server put it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QmpError {
    /// `class` of the error.
    pub class: String,
    /// `desc` of the error.
    pub desc: String,
}

/// One monitor connection, past `qmp_capabilities`.
#[derive(Debug)]
pub struct Qmp {
    stream: UnixStream,
    reader: BufReader<UnixStream>,
    greeting: Value,
    events: VecDeque<Value>,
    next_id: u64,
}

impl Qmp {
    /// Connects, reads the greeting and negotiates capabilities.
    pub fn connect(path: impl AsRef<Path>) -> Result<Self> {
        let mut qmp = Self::connect_raw(path)?;
        qmp.try_command("qmp_capabilities", json!({}))?
            .map_err(|e| Error::unsupported(format!("qmp_capabilities: {}", e.desc)))?;
        Ok(qmp)
    }

    /// Connects and reads the greeting only.
    pub fn connect_raw(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let stream = UnixStream::connect(path).at(|| format!("QMP socket {}", path.display()))?;
        stream.set_read_timeout(Some(Duration::from_secs(60)))?;
        let reader = BufReader::new(stream.try_clone()?);
        let mut qmp =
            Self { stream, reader, greeting: Value::Null, events: VecDeque::new(), next_id: 0 };
        qmp.greeting = qmp.receive()?;
        Ok(qmp)
    }

    /// The server's greeting.
    pub fn greeting(&self) -> &Value {
        &self.greeting
    }

    /// Runs a command; panics with the server's error where it fails.
    #[track_caller]
    pub fn command(&mut self, name: &str, arguments: Value) -> Value {
        match self.try_command(name, arguments.clone()) {
            Ok(Ok(v)) => v,
            Ok(Err(e)) => panic!("{name} {arguments}: {}: {}", e.class, e.desc),
            Err(e) => panic!("{name} {arguments}: {e}"),
        }
    }

    /// Runs a command that should fail; panics where it does not.
    #[track_caller]
    pub fn refused(&mut self, name: &str, arguments: Value) -> QmpError {
        match self.try_command(name, arguments.clone()) {
            Ok(Err(e)) => e,
            Ok(Ok(v)) => panic!("{name} {arguments} should be refused but returned {v}"),
            Err(e) => panic!("{name} {arguments}: {e}"),
        }
    }

    /// Runs a command. The outer error is a broken connection, the inner one the server's.
    pub fn try_command(
        &mut self,
        name: &str,
        arguments: Value,
    ) -> Result<std::result::Result<Value, QmpError>> {
        self.next_id += 1;
        let id = json!(self.next_id);
        let request = json!({ "execute": name, "arguments": arguments, "id": id });
        self.send_raw(format!("{request}\n").as_bytes())?;
        loop {
            let mut reply = self.receive()?;
            if reply.get("event").is_some() {
                self.events.push_back(reply);
                continue;
            }
            if reply.get("id") != Some(&id) {
                let text = format!("reply to '{name}' carries another id: {reply}");
                return Err(Error::new(ErrorKind::Disconnected, text));
            }
            if let Some(error) = reply.get("error") {
                let field = |k: &str| error[k].as_str().unwrap_or_default().to_owned();
                return Ok(Err(QmpError { class: field("class"), desc: field("desc") }));
            }
            return Ok(Ok(reply["return"].take()));
        }
    }

    /// Sends bytes as they are, for tests of bad input.
    pub fn send_raw(&mut self, bytes: &[u8]) -> Result<()> {
        self.stream.write_all(bytes).at(|| "QMP send")
    }

    /// The next message, whatever it is, past the queue of events.
    pub fn receive(&mut self) -> Result<Value> {
        let mut line = String::new();
        let n = self.reader.read_line(&mut line).at(|| "QMP receive")?;
        if n == 0 {
            return Err(Error::new(ErrorKind::Disconnected, "QMP server closed the connection"));
        }
        serde_json::from_str(&line)
            .map_err(|e| Error::corrupt(format!("QMP message is no JSON: {e}: {line}")))
    }

    /// The next event of this name, waiting up to `limit`; other events stay in the queue.
    pub fn wait_event(&mut self, name: &str, limit: Duration) -> Result<Value> {
        let deadline = Instant::now() + limit;
        loop {
            if let Some(i) = self.events.iter().position(|e| e["event"] == name) {
                return Ok(self.events.remove(i).unwrap_or_default());
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let seen: Vec<_> = self.events.iter().map(|e| e["event"].to_string()).collect();
                let text = format!("no event {name} in time; came: {}", seen.join(", "));
                return Err(Error::new(ErrorKind::NotFound, text));
            }
            self.stream.set_read_timeout(Some(left))?;
            let message = self.receive();
            self.stream.set_read_timeout(Some(Duration::from_secs(60)))?;
            match message {
                Ok(m) if m.get("event").is_some() => self.events.push_back(m),
                Ok(m) => {
                    let text = format!("a reply without a command: {m}");
                    return Err(Error::new(ErrorKind::Disconnected, text));
                }
                Err(e) if e.errno() == 11 => {}
                Err(e) => return Err(e),
            }
        }
    }

    /// The events that came and nobody waited for yet.
    pub fn take_events(&mut self) -> Vec<Value> {
        self.events.drain(..).collect()
    }
}
