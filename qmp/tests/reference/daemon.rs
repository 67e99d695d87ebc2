//! A running reference daemon to ask.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use serde_json::{Value, json};

const PROGRAM: &str = "qemu-storage-daemon";

pub struct Daemon {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
    marks: u64,
}

/// Says that a test does nothing here, or goes on.
pub fn installed() -> bool {
    let found = Command::new(PROGRAM).arg("--version").output().is_ok_and(|o| o.status.success());
    if !found {
        eprintln!("skipped: {PROGRAM} is not installed, so there is nothing to compare with");
    }
    found
}

impl Daemon {
    /// A daemon after negotiation.
    pub fn start() -> Daemon {
        let mut child = Command::new(PROGRAM)
            .args(["--chardev", "stdio,id=c", "--monitor", "chardev=c"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let input = child.stdin.take().unwrap();
        let output = BufReader::new(child.stdout.take().unwrap());
        let mut daemon = Daemon { child, input, output, marks: 0 };
        daemon.line();
        assert!(daemon.ask("qmp_capabilities", json!({})).get("return").is_some());
        daemon
    }

    /// The answer to one command.
    pub fn ask(&mut self, command: &str, args: Value) -> Value {
        let message = json!({"execute": command, "arguments": args});
        self.input.write_all(format!("{message}\n").as_bytes()).unwrap();
        self.line()
    }

    /// All answers to raw bytes; the daemon's parser is brought into a known state afterwards.
    pub fn say(&mut self, bytes: &[u8]) -> Vec<Value> {
        self.marks += 1;
        let mark = json!(format!("mark {}", self.marks));
        let last = json!({"execute": "query-version", "id": mark});
        self.input.write_all(bytes).unwrap();
        self.input.write_all(format!("\n\u{1}{last}\n").as_bytes()).unwrap();
        let mut answers = Vec::new();
        loop {
            let answer = self.line();
            if answer.get("id") == Some(&mark) {
                return answers;
            }
            answers.push(answer);
        }
    }

    fn line(&mut self) -> Value {
        let mut line = String::new();
        assert!(self.output.read_line(&mut line).unwrap() > 0, "the reference daemon is gone");
        // What it writes is not always JSON: it knows "inf".
        let unreadable = json!({"return": {}, "id": "unreadable"});
        gipfel_qmp::json::parse(line.trim_end()).unwrap_or(unreadable)
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // Ending it is a courtesy; that it is gone already is no failure of the test.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What the daemon says about option text that makes it refuse to start.
pub fn refusal(args: &[&str]) -> String {
    let output = Command::new(PROGRAM).args(args).stdin(Stdio::null()).output().unwrap();
    String::from_utf8_lossy(&output.stderr).into_owned()
}
