//! A unix or TCP connection with a time limit on every read, so that no test hangs.

use gipfel_base::{Error, ErrorKind, Result, ResultExt};
use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

/// Where a server listens.
#[derive(Clone, Debug)]
pub enum Address {
    /// A unix socket.
    Unix(PathBuf),
    /// `host:port`.
    Tcp(String),
}

impl Address {
    /// A unix socket at `path`.
    pub fn unix(path: impl Into<PathBuf>) -> Self {
        Self::Unix(path.into())
    }

    /// Connects.
    pub fn connect(&self) -> Result<Stream> {
        let stream = match self {
            Self::Unix(p) => {
                Stream::Unix(UnixStream::connect(p).at(|| format!("NBD socket {}", p.display()))?)
            }
            Self::Tcp(a) => {
                let s = TcpStream::connect(a).at(|| format!("NBD server {a}"))?;
                s.set_nodelay(true)?;
                Stream::Tcp(s)
            }
        };
        stream.set_timeout(Duration::from_secs(30))?;
        Ok(stream)
    }
}

/// A connection.
#[derive(Debug)]
pub enum Stream {
    /// Over a unix socket.
    Unix(UnixStream),
    /// Over TCP.
    Tcp(TcpStream),
}

impl Stream {
    /// Limits how long reads and writes wait.
    pub fn set_timeout(&self, limit: Duration) -> Result<()> {
        match self {
            Self::Unix(s) => {
                s.set_read_timeout(Some(limit))?;
                s.set_write_timeout(Some(limit))?;
            }
            Self::Tcp(s) => {
                s.set_read_timeout(Some(limit))?;
                s.set_write_timeout(Some(limit))?;
            }
        }
        Ok(())
    }

    /// A second handle to the same connection.
    pub fn try_clone(&self) -> Result<Self> {
        Ok(match self {
            Self::Unix(s) => Self::Unix(s.try_clone()?),
            Self::Tcp(s) => Self::Tcp(s.try_clone()?),
        })
    }

    /// Ends one or both directions.
    pub fn shutdown(&self, how: Shutdown) -> Result<()> {
        match self {
            Self::Unix(s) => s.shutdown(how)?,
            Self::Tcp(s) => s.shutdown(how)?,
        }
        Ok(())
    }

    /// Sends all of `bytes`.
    pub fn send(&mut self, bytes: &[u8]) -> Result<()> {
        self.write_all(bytes).at(|| "NBD send")
    }

    /// Receives exactly `n` bytes.
    pub fn receive(&mut self, n: usize) -> Result<Vec<u8>> {
        let mut buf = vec![0; n];
        read_exact(self, &mut buf)?;
        Ok(buf)
    }

    /// Receives until the server closes; at most `limit` bytes, then it gives up.
    pub fn receive_to_end(&mut self, limit: usize) -> Result<Vec<u8>> {
        let mut all = Vec::new();
        match self.take(limit as u64).read_to_end(&mut all) {
            Ok(_) => Ok(all),
            // A close with unread data resets the connection; that is an end too.
            Err(e) if e.kind() == std::io::ErrorKind::ConnectionReset => Ok(all),
            Err(e) => Err(Error::from(e).context("NBD receive to the end")),
        }
    }
}

/// Fills `buf`; an end of the stream before is [`ErrorKind::Disconnected`].
pub(super) fn read_exact(r: &mut impl Read, buf: &mut [u8]) -> Result<()> {
    r.read_exact(buf).map_err(|e| match e.kind() {
        std::io::ErrorKind::UnexpectedEof | std::io::ErrorKind::ConnectionReset => {
            Error::new(ErrorKind::Disconnected, "the NBD server closed the connection")
        }
        std::io::ErrorKind::WouldBlock => {
            Error::new(ErrorKind::Cancelled, "the NBD server did not answer in time")
        }
        _ => Error::from(e).context("NBD receive"),
    })
}

impl Read for Stream {
    fn read(&mut self, buf: &mut [u8]) -> std::io::Result<usize> {
        match self {
            Self::Unix(s) => s.read(buf),
            Self::Tcp(s) => s.read(buf),
        }
    }
}

impl Write for Stream {
    fn write(&mut self, buf: &[u8]) -> std::io::Result<usize> {
        match self {
            Self::Unix(s) => s.write(buf),
            Self::Tcp(s) => s.write(buf),
        }
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}
