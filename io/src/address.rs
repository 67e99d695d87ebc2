//! Where sockets listen and connect to: paths, abstract names, TCP, descriptors passed on.

use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{SocketAddr as UnixAddr, UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use gipfel_base::{Error, ErrorKind, Result, ResultExt};

use crate::blocking::call;
use crate::net::{Listener, Stream};
use crate::process::take_passed;

/// Longest abstract name, in bytes (unix(7): `sun_path` without its first, zero byte).
const MAX_ABSTRACT: usize = 107;

/// An address of a socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// A unix socket at a path.
    Unix(PathBuf),
    /// A unix socket in Linux's abstract name space (unix(7)), without the leading zero byte.
    Abstract(Vec<u8>),
    /// TCP addresses (a name can stand for several); the first that works is taken.
    Tcp {
        /// The addresses, in order.
        list: Vec<SocketAddr>,
        /// Watch over idle connections (SO_KEEPALIVE).
        keep_alive: bool,
    },
    /// A descriptor that the process was started with: listening or connected.
    Passed(i32),
}

impl Address {
    /// The abstract name `name`. Unless `tight`, zero bytes fill it to its greatest length.
    pub fn abstract_name(name: &[u8], tight: bool) -> Result<Address> {
        if name.len() > MAX_ABSTRACT {
            let text = format!("an abstract socket name has at most {MAX_ABSTRACT} bytes");
            return Err(Error::invalid(text));
        }
        let mut name = name.to_vec();
        if !tight {
            name.resize(MAX_ABSTRACT, 0);
        }
        Ok(Address::Abstract(name))
    }
}

impl Listener {
    /// Listens on `address`.
    pub async fn bind(address: &Address) -> Result<Listener> {
        match address {
            Address::Unix(path) => Self::unix(path).await,
            Address::Abstract(name) => {
                let a = UnixAddr::from_abstract_name(name)?;
                let l = UnixListener::bind_addr(&a).at(|| format!("unix socket {a:?}"))?;
                Ok(Listener::new(l.into(), None))
            }
            Address::Tcp { list, keep_alive } => {
                let mut found = Err(Error::invalid("the address names no host"));
                for a in list {
                    found = Self::tcp(*a).await;
                    if found.is_ok() {
                        break;
                    }
                }
                let found = found?;
                if *keep_alive {
                    // Accepted connections take it over.
                    set_keep_alive(found.fd())?;
                }
                Ok(found)
            }
            Address::Passed(n) => {
                let fd = take_passed(*n, |fd| match listens(fd) {
                    true => Ok(()),
                    false => Err(Error::invalid(format!("descriptor {n} is no listening socket"))),
                })?;
                Ok(Listener::new(fd, None))
            }
        }
    }

    /// Listens on a unix socket at `path`; one left there by a dead server is replaced. The path
    /// is removed when the listener goes.
    pub async fn unix(path: &Path) -> Result<Listener> {
        let p = path.to_owned();
        call(move || {
            let at = || format!("unix socket '{}'", p.display());
            let l = match UnixListener::bind(&p) {
                Err(e) if e.kind() == std::io::ErrorKind::AddrInUse => {
                    let kind = std::fs::symlink_metadata(&p).at(at)?.file_type();
                    if !kind.is_socket() {
                        let text = "there is a file of that name that is no socket: it is kept";
                        return Err(Error::new(ErrorKind::Exists, text).context(at()));
                    }
                    if UnixStream::connect(&p).is_ok() {
                        return Err(Error::new(ErrorKind::InUse, "a server listens there already")
                            .context(at()));
                    }
                    let _ = std::fs::remove_file(&p);
                    UnixListener::bind(&p).at(at)?
                }
                r => r.at(at)?,
            };
            // The process may change its folder before the path is removed.
            let unlink = std::path::absolute(&p).at(at)?;
            Ok(Listener::new(l.into(), Some(unlink)))
        })
        .await
    }

    /// Listens on a TCP address.
    pub async fn tcp(addr: SocketAddr) -> Result<Listener> {
        call(move || {
            let l = TcpListener::bind(addr).at(|| format!("TCP address {addr}"))?;
            Ok(Listener::new(l.into(), None))
        })
        .await
    }
}

impl Stream {
    /// Connects to `address`.
    pub async fn connect(address: &Address) -> Result<Stream> {
        match address {
            Address::Unix(path) => Self::connect_unix(path).await,
            Address::Abstract(name) => {
                let a = UnixAddr::from_abstract_name(name)?;
                call(move || {
                    let s = UnixStream::connect_addr(&a).at(|| format!("unix socket {a:?}"))?;
                    Ok(Self::from_fd(s.into()))
                })
                .await
            }
            Address::Tcp { list, keep_alive } => {
                let mut found = Err(Error::invalid("the address names no host"));
                for a in list {
                    found = Self::connect_tcp(*a, *keep_alive).await;
                    if found.is_ok() {
                        break;
                    }
                }
                found
            }
            Address::Passed(n) => Ok(Self::from_fd(take_passed(*n, |_| Ok(()))?)),
        }
    }

    /// Connects to a unix socket.
    pub async fn connect_unix(path: &Path) -> Result<Stream> {
        let p = path.to_owned();
        call(move || {
            let s = UnixStream::connect(&p).at(|| format!("unix socket '{}'", p.display()))?;
            Ok(Self::from_fd(s.into()))
        })
        .await
    }

    async fn connect_tcp(addr: SocketAddr, keep_alive: bool) -> Result<Stream> {
        call(move || {
            let s = TcpStream::connect(addr).at(|| format!("TCP address {addr}"))?;
            let fd = OwnedFd::from(s);
            if keep_alive {
                set_keep_alive(&fd)?;
            }
            Ok(Self::from_fd(fd))
        })
        .await
    }
}

fn set_keep_alive(socket: &impl AsFd) -> Result<()> {
    let on: libc::c_int = 1;
    let len = size_of_val(&on) as libc::socklen_t;
    let fd = socket.as_fd().as_raw_fd();
    // SAFETY: the value is a live local of that length.
    let r = unsafe {
        libc::setsockopt(fd, libc::SOL_SOCKET, libc::SO_KEEPALIVE, (&raw const on).cast(), len)
    };
    if r < 0 {
        return Err(Error::from(std::io::Error::last_os_error()).context("SO_KEEPALIVE"));
    }
    Ok(())
}

/// Whether that is a socket that listens.
fn listens(fd: BorrowedFd<'_>) -> bool {
    let mut yes: libc::c_int = 0;
    let mut len = size_of_val(&yes) as libc::socklen_t;
    // SAFETY: value and length are live locals; a descriptor that is none gives an error.
    let r = unsafe {
        libc::getsockopt(
            fd.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_ACCEPTCONN,
            (&raw mut yes).cast(),
            &raw mut len,
        )
    };
    r == 0 && yes != 0
}

/// The TCP addresses that a host (name or number; empty: all of this machine) and a port stand
/// for. With `numeric` the host must be a number: no name service is asked.
pub async fn resolve(host: &str, port: &str, numeric: bool) -> Result<Vec<SocketAddr>> {
    use std::net::ToSocketAddrs;
    let at = format!("TCP address {host}:{port}");
    let port: u16 = port
        .parse()
        .map_err(|_| Error::invalid("the port must be a number from 0 to 65535").context(&*at))?;
    if host.is_empty() {
        return Ok(vec![SocketAddr::new(IpAddr::from([0u16; 8]), port)]);
    }
    if let Ok(ip) = host.parse::<IpAddr>() {
        return Ok(vec![SocketAddr::new(ip, port)]);
    }
    if numeric {
        return Err(Error::invalid("numeric=on, and the host is no number").context(at));
    }
    let host = host.to_owned();
    call(move || Ok((host.as_str(), port).to_socket_addrs().at(|| at)?.collect())).await
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Runtime;

    #[test]
    fn a_file_in_the_way_of_a_socket_is_kept() {
        let dir = std::env::temp_dir().join(format!("gipfel-addr-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let (file, socket) = (dir.join("disk.raw"), dir.join("sock"));
        std::fs::write(&file, "precious").unwrap();
        Runtime::new(0)
            .unwrap()
            .block_on(async {
                let e = Listener::unix(&file).await.err().unwrap();
                assert_eq!(e.kind(), ErrorKind::Exists, "{e}");
                assert_eq!(std::fs::read_to_string(&file).unwrap(), "precious");
                let first = Listener::unix(&socket).await.unwrap();
                assert_eq!(Listener::unix(&socket).await.err().unwrap().kind(), ErrorKind::InUse);
                drop(first);
                assert!(!socket.exists());
                // One that a server left behind.
                drop(UnixListener::bind(&socket).unwrap());
                drop(Listener::unix(&socket).await.unwrap());
            })
            .unwrap();
        std::fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn abstract_names_are_padded_unless_tight() {
        let name = format!("gipfel-{}", std::process::id());
        let address = |tight| Address::abstract_name(name.as_bytes(), tight).unwrap();
        Runtime::new(0)
            .unwrap()
            .block_on(async {
                let listener = Listener::bind(&address(true)).await.unwrap();
                let (a, b) = (Stream::connect(&address(true)).await, listener.accept().await);
                assert!(a.is_ok() && b.is_ok());
                assert!(Stream::connect(&address(false)).await.is_err());
                let _padded = Listener::bind(&address(false)).await.unwrap();
                Stream::connect(&address(false)).await.unwrap();
            })
            .unwrap();
        assert!(Address::abstract_name(&[b'a'; 108], true).is_err());
    }

    #[test]
    fn hosts_and_ports() {
        Runtime::new(0)
            .unwrap()
            .block_on(async {
                let all = resolve("", "10809", true).await.unwrap();
                assert_eq!(all[0].to_string(), "[::]:10809");
                let one = resolve("127.0.0.1", "1", true).await.unwrap();
                assert_eq!(one[0].to_string(), "127.0.0.1:1");
                assert!(!resolve("localhost", "1", false).await.unwrap().is_empty());
                for (host, port, numeric) in
                    [("localhost", "1", true), ("::1", "65536", false), ("::1", "nbd", false)]
                {
                    let e = resolve(host, port, numeric).await.unwrap_err();
                    assert_eq!(e.kind(), ErrorKind::InvalidInput, "{e}");
                }
            })
            .unwrap();
    }
}
