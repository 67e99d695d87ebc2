//! Sockets: accepting, receiving into owned buffers, gathered sends. How they are named: `address`.

use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;

use gipfel_base::{Error, ErrorKind, Result};
use io_uring::{opcode, types::Fd};

use crate::buf::Buf;
use crate::op::{Keep, Op, check};
use crate::sim;

/// A listening socket.
pub struct Listener {
    fd: Arc<OwnedFd>,
    unlink: Option<PathBuf>,
}

impl Listener {
    pub(crate) fn new(fd: OwnedFd, unlink: Option<PathBuf>) -> Listener {
        Listener { fd: Arc::new(fd), unlink }
    }

    pub(crate) fn fd(&self) -> &OwnedFd {
        &self.fd
    }

    /// Takes over a socket that listens already.
    pub fn from_fd(fd: OwnedFd) -> Listener {
        Listener { fd: Arc::new(fd), unlink: None }
    }

    /// The TCP address it listens on, if it is one.
    pub fn tcp_address(&self) -> Option<SocketAddr> {
        let l = TcpListener::from(self.fd.try_clone().ok()?);
        l.local_addr().ok()
    }

    /// Waits for the next connection.
    pub async fn accept(&self) -> Result<Stream> {
        let entry = opcode::Accept::new(
            Fd(self.fd.as_raw_fd()),
            std::ptr::null_mut(),
            std::ptr::null_mut(),
        )
        .flags(libc::SOCK_CLOEXEC)
        .build();
        let keep = Keep::Socket { _fd: self.fd.clone(), _buf: None };
        let (res, _) = Op::submit(entry, keep).await;
        let fd = check(res, || "accept".to_owned())?;
        // SAFETY: the descriptor was just made by accept and nobody else owns it.
        Ok(Stream::from_socket(unsafe { OwnedFd::from_raw_fd(fd as i32) }))
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Some(p) = &self.unlink {
            // Gone already is as good.
            let _ = std::fs::remove_file(p);
        }
    }
}

/// A connection, or a pair of pipes such as standard input and output. Clones share it.
#[derive(Clone)]
pub struct Stream(Inner);

#[derive(Clone)]
enum Inner {
    Socket(Arc<OwnedFd>, Family),
    Pipes(Arc<OwnedFd>, Arc<OwnedFd>),
    Sim(Arc<sim::PipeEnd>),
}

#[derive(Clone, Copy)]
enum Family {
    Unix,
    Tcp,
}

impl Stream {
    fn from_socket(fd: OwnedFd) -> Stream {
        // Replies are gathered by us, so the kernel must not hold back the last piece. A unix
        // socket refuses the option, and needs none.
        let s = TcpStream::from(fd);
        let family = if s.set_nodelay(true).is_ok() { Family::Tcp } else { Family::Unix };
        Stream(Inner::Socket(Arc::new(s.into()), family))
    }

    /// Takes over a connected socket.
    pub fn from_fd(fd: OwnedFd) -> Stream {
        Self::from_socket(fd)
    }

    /// A descriptor that is read (or written) as it comes: a pipe, a signalfd.
    pub(crate) fn from_pipe(fd: OwnedFd) -> Stream {
        let fd = Arc::new(fd);
        Stream(Inner::Pipes(fd.clone(), fd))
    }

    /// Standard input and standard output.
    pub fn stdio() -> Result<Stream> {
        let dup = |fd| -> Result<OwnedFd> {
            // SAFETY: dup takes no pointers.
            let n = unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 3) };
            if n < 0 {
                return Err(Error::from(std::io::Error::last_os_error()).context("stdio"));
            }
            // SAFETY: the descriptor was just made and nobody else owns it.
            Ok(unsafe { OwnedFd::from_raw_fd(n) })
        };
        Ok(Stream(Inner::Pipes(Arc::new(dup(0)?), Arc::new(dup(1)?))))
    }

    /// Two ends of a simulated connection.
    pub fn simulated_pair() -> (Stream, Stream) {
        let (a, b) = sim::PipeEnd::pair();
        (Stream(Inner::Sim(Arc::new(a))), Stream(Inner::Sim(Arc::new(b))))
    }

    /// Receives at least one byte into `buf` and says how many; zero at the end of the stream.
    pub async fn recv(&self, buf: Buf) -> Result<usize> {
        self.receive(buf, 0).await
    }

    async fn receive(&self, buf: Buf, flags: i32) -> Result<usize> {
        if buf.is_empty() {
            return Ok(0);
        }
        let (fd, socket) = match &self.0 {
            Inner::Socket(fd, _) => (fd, true),
            Inner::Pipes(fd, _) => (fd, false),
            Inner::Sim(p) => return Ok(p.recv(&buf).await),
        };
        if socket {
            // What is there is taken by this thread; the ring is for waiting (decision 0006). An
            // error is met there again.
            // SAFETY: the memory is the buffer's own and outlives the call.
            let n = unsafe {
                libc::recv(fd.as_raw_fd(), buf.ptr().cast(), buf.len(), libc::MSG_DONTWAIT)
            };
            if let Ok(n) = usize::try_from(n) {
                return Ok(n);
            }
        }
        loop {
            let (f, p, n) = (Fd(fd.as_raw_fd()), buf.ptr(), buf.len().min(1 << 30) as u32);
            let entry = if socket {
                opcode::Recv::new(f, p, n).flags(flags).build()
            } else {
                opcode::Read::new(f, p, n).offset(u64::MAX).build()
            };
            let keep = Keep::Socket { _fd: fd.clone(), _buf: Some(buf.clone()) };
            let (res, _keep) = Op::submit(entry, keep).await;
            if res != -libc::EINTR && res != -libc::EAGAIN {
                return check(res, || "receive".to_owned()).map(|n| n as usize);
            }
        }
    }

    /// Bytes sent that the peer has not read yet, the system's own overhead included. Only a unix
    /// socket knows; others say zero.
    pub fn unread(&self) -> usize {
        let Inner::Socket(fd, Family::Unix) = &self.0 else { return 0 };
        let mut n: libc::c_int = 0;
        // SAFETY: the number is written to a live local.
        unsafe { libc::ioctl(fd.as_raw_fd(), libc::TIOCOUTQ, &raw mut n) };
        usize::try_from(n).unwrap_or(0)
    }

    /// Receives all of `buf`; [`ErrorKind::Disconnected`] where the stream ends before.
    pub async fn recv_exact(&self, buf: Buf) -> Result<()> {
        let mut at = 0;
        while at < buf.len() {
            match self.receive(buf.slice(at..buf.len()), libc::MSG_WAITALL).await? {
                0 => {
                    return Err(Error::new(
                        ErrorKind::Disconnected,
                        "the peer closed the connection in the middle of a message",
                    ));
                }
                n => at += n,
            }
        }
        Ok(())
    }

    /// Sends all that is gathered in `message` and gives it back, emptied.
    pub async fn send(&self, mut message: Box<Message>) -> (Result<()>, Box<Message>) {
        let (fd, socket) = match &self.0 {
            Inner::Socket(fd, _) => (fd, true),
            Inner::Pipes(_, fd) => (fd, false),
            Inner::Sim(p) => {
                let r = p.send(&message.parts).await;
                message.clear();
                return (r, message);
            }
        };
        let mut left = message.prepare();
        if socket {
            let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
            // SAFETY: the header points to the message's own vector, and that to its buffers.
            let n = unsafe { libc::sendmsg(fd.as_raw_fd(), &raw const message.header, flags) };
            // What does not fit, and an error, are left to the ring.
            if let Ok(n) = usize::try_from(n) {
                left -= n;
                message.advance(n);
            }
        }
        while left > 0 {
            let f = Fd(fd.as_raw_fd());
            let entry = if socket {
                opcode::SendMsg::new(f, &raw const message.header)
                    .flags((libc::MSG_NOSIGNAL | libc::MSG_WAITALL) as u32)
                    .build()
            } else {
                let (p, n) = (message.header.msg_iov, message.header.msg_iovlen);
                opcode::Writev::new(f, p, n as u32).offset(u64::MAX).build()
            };
            let keep = Keep::Message { _fd: fd.clone(), message };
            let (res, keep) = Op::submit(entry, keep).await;
            let Keep::Message { message: m, .. } = keep else {
                unreachable!("an operation gives back what it kept")
            };
            message = m;
            if res == -libc::EINTR || res == -libc::EAGAIN {
                continue;
            }
            match check(res, || "send".to_owned()) {
                Ok(n) => {
                    left -= n as usize;
                    message.advance(n as usize);
                }
                Err(e) => {
                    message.clear();
                    return (Err(e), message);
                }
            }
        }
        message.clear();
        (Ok(()), message)
    }

    /// Ends the connection for both directions; who waits on it gets an end or an error.
    pub fn shutdown(&self) {
        match &self.0 {
            Inner::Socket(fd, _) => {
                // SAFETY: shutdown takes no pointers; an already closed peer is no problem here.
                unsafe { libc::shutdown(fd.as_raw_fd(), libc::SHUT_RDWR) };
            }
            Inner::Pipes(..) => {}
            Inner::Sim(p) => p.close(),
        }
    }
}

/// Buffers to be sent one after the other in one system call; reused from send to send.
pub struct Message {
    parts: Vec<Buf>,
    iov: Vec<libc::iovec>,
    first: usize,
    header: libc::msghdr,
}

// SAFETY: the raw pointers in `iov` and `header` point into `parts` and `iov`, which move along.
unsafe impl Send for Message {}

impl Message {
    /// The most buffers one message holds (the kernel takes 1024).
    pub const MAX_PARTS: usize = 512;

    /// An empty message.
    pub fn new() -> Box<Message> {
        // SAFETY: msghdr is plain data for which all zeros is a value.
        let header = unsafe { std::mem::zeroed() };
        Box::new(Message { parts: Vec::new(), iov: Vec::new(), first: 0, header })
    }

    /// Adds a buffer. Panics past [`Message::MAX_PARTS`]: callers ask [`Message::is_full`].
    pub fn push(&mut self, part: Buf) {
        assert!(!self.is_full(), "a message holds at most {} parts", Self::MAX_PARTS);
        if !part.is_empty() {
            self.parts.push(part);
        }
    }

    /// Whether no (or only one) more buffer fits.
    pub fn is_full(&self) -> bool {
        self.parts.len() >= Self::MAX_PARTS
    }

    /// Number of buffers in it.
    pub fn parts(&self) -> usize {
        self.parts.len()
    }

    /// Whether nothing is in it.
    pub fn is_empty(&self) -> bool {
        self.parts.is_empty()
    }

    /// Forgets all buffers.
    pub fn clear(&mut self) {
        self.parts.clear();
        self.iov.clear();
    }

    fn prepare(&mut self) -> usize {
        self.iov.clear();
        self.first = 0;
        self.iov.extend(
            self.parts.iter().map(|b| libc::iovec { iov_base: b.ptr().cast(), iov_len: b.len() }),
        );
        self.point();
        self.parts.iter().map(Buf::len).sum()
    }

    fn point(&mut self) {
        self.header.msg_iov = self.iov[self.first..].as_mut_ptr();
        self.header.msg_iovlen = self.iov.len() - self.first;
    }

    fn advance(&mut self, mut n: usize) {
        while n > 0 {
            let v = &mut self.iov[self.first];
            if n < v.iov_len {
                v.iov_base = v.iov_base.cast::<u8>().wrapping_add(n).cast();
                v.iov_len -= n;
                break;
            }
            n -= v.iov_len;
            self.first += 1;
        }
        self.point();
    }
}

/// Two connected real sockets, for tests.
pub fn socket_pair() -> Result<(Stream, Stream)> {
    let (a, b) = UnixStream::pair()?;
    // SAFETY: both descriptors were just made and are owned by nobody else.
    let own = |s: UnixStream| unsafe { OwnedFd::from_raw_fd(s.into_raw_fd()) };
    Ok((Stream::from_socket(own(a)), Stream::from_socket(own(b))))
}
