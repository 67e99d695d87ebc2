//! One monitor connection: bytes to commands, commands to answers, events in between.

use std::rc::Rc;

use gipfel_base::Result;
use gipfel_io::net::{Message, Stream};
use gipfel_io::{Buf, spawn_local};
use gipfel_qmp::{Incoming, Session};

use super::events::Outbox;
use super::{Daemon, version};

/// Bytes received at once.
const RECEIVE: usize = 16 << 10;

/// Serves one client to its end, once the daemon is set up.
pub async fn serve(daemon: Rc<Daemon>, stream: Stream, pretty: bool) {
    daemon.is_ready().await;
    let outbox = Rc::new(Outbox::new(stream.clone(), pretty));
    daemon.events.add(&outbox);
    outbox.push(&Session::greeting(&version()));
    let writer = spawn_local(write(stream.clone(), outbox.clone()));
    let read = read(&daemon, &stream, &outbox).await;
    // The client is told what its last commands came to, unless it is gone.
    outbox.close();
    writer.await;
    stream.shutdown();
    drop(read);
}

async fn write(stream: Stream, outbox: Rc<Outbox>) {
    let mut message = Message::new();
    while let Some(line) = outbox.next().await {
        message.push(Buf::from_slice(line.as_bytes()));
        let sent: Result<()>;
        (sent, message) = stream.send(message).await;
        if sent.is_err() {
            outbox.cut_off();
            return;
        }
    }
}

async fn read(daemon: &Rc<Daemon>, stream: &Stream, outbox: &Rc<Outbox>) -> Result<()> {
    let mut session = Session::new(daemon.schema);
    let buf = Buf::new(RECEIVE);
    loop {
        let n = stream.recv(buf.clone()).await?;
        if n == 0 {
            if let Some(Incoming::Answer(answer)) = session.finish() {
                outbox.push(&answer);
            }
            return Ok(());
        }
        let bytes = buf.slice(0..n).to_vec();
        let mut rest = &bytes[..];
        while let Some(incoming) = session.push(&mut rest) {
            match incoming {
                Incoming::Answer(answer) => {
                    outbox.push(&answer);
                    if session.negotiated() {
                        outbox.set_negotiated();
                    }
                }
                Incoming::Command(mut request) => {
                    let result = daemon.commands.run(daemon.clone(), &mut request).await;
                    if let Some(answer) = request.reply(daemon.schema, result) {
                        outbox.push(&answer);
                    }
                }
            }
            outbox.room().await;
            if outbox.is_closed() {
                return Ok(());
            }
        }
    }
}
