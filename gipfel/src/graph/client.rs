//! A QMP client for commands of people: one command after the other, events left aside.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use gipfel_base::{Error, ErrorKind, Result, ResultExt};
use serde_json::{Value, json};

/// How long an answer may take.
const PATIENCE: Duration = Duration::from_secs(60);

/// A connection to a monitor, ready for commands.
pub struct Qmp {
    lines: BufReader<UnixStream>,
}

impl Qmp {
    /// Connects to the monitor at `socket` and negotiates.
    pub fn connect(socket: &Path) -> Result<Qmp> {
        let at = || format!("QMP socket '{}'", socket.display());
        let stream = UnixStream::connect(socket).at(at)?;
        stream.set_read_timeout(Some(PATIENCE)).at(at)?;
        let mut qmp = Qmp { lines: BufReader::new(stream) };
        let greeting = qmp.line().at(at)?;
        if greeting.get("QMP").is_none() {
            return Err(Error::invalid("what answers there does not speak QMP").context(at()));
        }
        qmp.command("qmp_capabilities", json!({})).at(at)?;
        Ok(qmp)
    }

    /// Runs a command and gives its answer.
    pub fn command(&mut self, name: &str, arguments: Value) -> Result<Value> {
        let text = format!("{}\n", json!({ "execute": name, "arguments": arguments }));
        self.lines.get_mut().write_all(text.as_bytes())?;
        loop {
            let mut answer = self.line()?;
            if let Some(v) = answer.get_mut("return") {
                return Ok(v.take());
            }
            if let Some(e) = answer.get("error") {
                let text = e["desc"].as_str().unwrap_or_default().to_owned();
                let kind = match e["class"].as_str() {
                    Some("CommandNotFound") => ErrorKind::Unsupported,
                    _ => ErrorKind::InvalidInput,
                };
                return Err(Error::new(kind, text));
            }
        }
    }

    fn line(&mut self) -> Result<Value> {
        let mut text = String::new();
        if self.lines.read_line(&mut text)? == 0 {
            return Err(Error::new(ErrorKind::Disconnected, "the daemon closed the connection"));
        }
        serde_json::from_str(&text).map_err(|e| Error::invalid(format!("no JSON came back: {e}")))
    }
}
