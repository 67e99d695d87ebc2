//! A monitor on standard input and output that offers introspection and nothing else: how a
//! program drives the state machine, and a quick look at what is declared.
//!
//! `cargo run -p gipfel-qmp --example monitor`; options are taken and ignored, so that tools which
//! start a storage daemon can be pointed at it.

use std::io::{Read, Write};
use std::task::{Context, Poll, Waker};

use gipfel_base::{Error, Result};
use gipfel_qmp::{Incoming, Outgoing, Registry, Schema, Session, Version};

fn main() -> Result<()> {
    let schema = Schema::builtin()?;
    let version = Version { major: 10, minor: 0, micro: 0, package: "monitor example".into() };
    let mut registry = Registry::<()>::new(schema, version.clone());
    registry.add_raw("quit", |(), _| async { Ok(serde_json::json!({})) });
    let mut session = Session::new(schema);
    write(&Session::greeting(&version))?;
    let mut buffer = vec![0; 65536];
    loop {
        let taken = std::io::stdin().read(&mut buffer)?;
        let mut input = &buffer[..taken];
        while let Some(incoming) = session.push(&mut input) {
            let mut request = match incoming {
                Incoming::Answer(answer) => {
                    write(&answer)?;
                    continue;
                }
                Incoming::Command(request) => request,
            };
            let mut run = registry.run((), &mut request);
            let result = match run.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
                Poll::Ready(result) => result,
                Poll::Pending => Err(Error::unsupported("this example can't wait")),
            };
            if let Some(answer) = request.reply(schema, result) {
                write(&answer)?;
            }
            if request.name == "quit" {
                return Ok(());
            }
        }
        if taken == 0 {
            return Ok(());
        }
    }
}

fn write(message: &Outgoing) -> Result<()> {
    let mut out = std::io::stdout();
    out.write_all(message.text(false).as_bytes())?;
    Ok(out.flush()?)
}
