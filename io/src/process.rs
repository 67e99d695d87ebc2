//! What the process is to the system: its way to the background, its pid file, the descriptors
//! that its starter passed on, how many it may have.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use gipfel_base::{Error, ErrorKind, Result, ResultExt};

fn last(what: &str) -> Error {
    Error::from(std::io::Error::last_os_error()).context(what)
}

/// A process in the background whose starter still waits to hear whether all is well.
pub struct Background {
    tell: File,
}

impl Background {
    /// Goes on in a child process, in a session of its own. The process that called does not
    /// return from here: it ends with 0 once [`Background::ready`] is called, and with 1 where the
    /// child ends before.
    ///
    /// To be called before any other thread is started, since none comes along; fails otherwise.
    pub fn start() -> Result<Background> {
        let threads = std::fs::read_dir("/proc/self/task").at(|| "counting threads")?.count();
        if threads != 1 {
            return Err(Error::invalid("a process of several threads cannot go to the background"));
        }
        let (mut hear, tell) = std::io::pipe().at(|| "a pipe to the background")?;
        if fork()? {
            drop(tell);
            let mut said = [0];
            let well = hear.read(&mut said).is_ok_and(|n| n == 1);
            std::process::exit(if well { 0 } else { 1 });
        }
        drop(hear);
        // SAFETY: setsid takes no pointers; it cannot fail in a fresh child.
        unsafe { libc::setsid() };
        // The leader of a session could be given a terminal: what remains is not the leader.
        if fork()? {
            std::process::exit(0);
        }
        Ok(Background { tell: File::from(OwnedFd::from(tell)) })
    }

    /// Lets go of the starter: its folder, its terminal; then tells it that all is well.
    pub fn ready(mut self) -> Result<()> {
        std::env::set_current_dir("/").at(|| "leaving the folder")?;
        let null = OpenOptions::new().read(true).write(true).open("/dev/null");
        let null = null.at(|| "opening /dev/null")?;
        for fd in 0..3 {
            // SAFETY: dup2 takes no pointers; 0 to 2 belong to the whole process, and what was
            // behind them is only closed.
            if unsafe { libc::dup2(null.as_raw_fd(), fd) } < 0 {
                return Err(last("letting go of the terminal"));
            }
        }
        // A starter that did not wait is none of our business.
        let _ = self.tell.write_all(b"+");
        Ok(())
    }
}

/// Whether this is the parent.
fn fork() -> Result<bool> {
    // SAFETY: there is one thread (`Background::start` has looked), so the child is whole.
    match unsafe { libc::fork() } {
        -1 => Err(last("fork")),
        child => Ok(child > 0),
    }
}

/// A file with the process id, locked while this lives and then removed.
pub struct PidFile {
    path: PathBuf,
    file: File,
}

impl PidFile {
    /// Writes the file. [`ErrorKind::InUse`] where another running process holds it.
    pub fn write(path: &Path) -> Result<PidFile> {
        let at = || format!("pid file '{}'", path.display());
        loop {
            let mut how = OpenOptions::new();
            how.read(true).write(true).create(true).truncate(false).mode(0o600);
            let file = how.open(path).at(at)?;
            lock(&file).at(at)?;
            // Its owner before us may have removed it between the opening and the lock.
            let inode = file.metadata().at(at)?.ino();
            if std::fs::metadata(path).is_ok_and(|now| now.ino() == inode) {
                file.set_len(0).at(at)?;
                let mut this = PidFile { path: std::path::absolute(path)?, file };
                writeln!(this.file, "{}", std::process::id()).at(at)?;
                return Ok(this);
            }
        }
    }
}

impl Drop for PidFile {
    fn drop(&mut self) {
        // Gone already is as good. It is still locked: no other can have taken it.
        let _ = std::fs::remove_file(&self.path);
    }
}

/// The lock that the reference uses too: exclusive, on the whole file.
fn lock(file: &File) -> Result<()> {
    // SAFETY: flock is plain data for which all zeros is a value: from 0 to the end.
    let mut l: libc::flock = unsafe { std::mem::zeroed() };
    l.l_type = libc::F_WRLCK as i16;
    l.l_whence = libc::SEEK_SET as i16;
    // SAFETY: the flock outlives the call.
    if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw mut l) } == 0 {
        return Ok(());
    }
    let e = last("locking");
    Err(match e.errno() {
        libc::EAGAIN | libc::EACCES => {
            Error::new(ErrorKind::InUse, "a running process has written it: end that one first")
        }
        _ => e,
    })
}

/// Fails unless descriptor `fd` was passed on by the starter of this process and is not taken yet;
/// gives its flags.
///
/// Whatever this process opens itself is marked to be closed at exec (as all of this crate and the
/// standard library is), and what came through an exec is not: that mark tells them apart.
fn passed(fd: RawFd) -> Result<i32> {
    // SAFETY: fcntl F_GETFD takes no pointers.
    let flags = unsafe { libc::fcntl(fd, libc::F_GETFD) };
    if fd < 3 || flags < 0 || flags & libc::FD_CLOEXEC != 0 {
        return Err(Error::new(
            ErrorKind::NotFound,
            format!("descriptor {fd} was not passed on to this process, or is taken already"),
        ));
    }
    Ok(flags)
}

/// Takes over descriptor `fd`, which the starter of this process passed on, if it also passes
/// `check`. Each can be taken once.
pub(crate) fn take_passed(
    fd: RawFd,
    check: impl FnOnce(BorrowedFd<'_>) -> Result<()>,
) -> Result<OwnedFd> {
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let _one = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let flags = passed(fd)?;
    // SAFETY: it is open and stays so: nothing in this process owns it (see `passed`).
    check(unsafe { BorrowedFd::borrow_raw(fd) })?;
    // SAFETY: fcntl F_SETFD takes no pointers.
    if unsafe { libc::fcntl(fd, libc::F_SETFD, flags | libc::FD_CLOEXEC) } < 0 {
        return Err(last("taking over a descriptor"));
    }
    // SAFETY: as above; from here on the mark says that it is owned.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Lets the process have as many descriptors as the system's hard limit says: each client is one.
pub fn raise_descriptor_limit() {
    let mut l = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the struct outlives both calls. A refusal leaves the limit as it is.
    unsafe {
        if libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut l) == 0 {
            l.rlim_cur = l.rlim_max;
            libc::setrlimit(libc::RLIMIT_NOFILE, &raw const l);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pid_file_has_one_owner_at_a_time() {
        let dir = std::env::temp_dir().join(format!("gipfel-pid-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let path = dir.join("pid");
        let first = PidFile::write(&path).unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        assert_eq!(text, format!("{}\n", std::process::id()));
        assert_eq!(PidFile::write(&path).err().unwrap().kind(), ErrorKind::InUse);
        drop(first);
        assert!(!path.exists());
        // One left behind by a process that was killed is taken over.
        std::fs::write(&path, "4000000000000\n").unwrap();
        let next = PidFile::write(&path).unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), text);
        drop(next);
        std::fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn what_this_process_opened_itself_was_not_passed_on() {
        let (a, _b) = std::io::pipe().unwrap();
        for fd in [a.as_raw_fd(), 0, 1, 2, -1, 1_000_000] {
            assert_eq!(
                take_passed(fd, |_| Ok(())).unwrap_err().kind(),
                ErrorKind::NotFound,
                "{fd}"
            );
        }
        // SAFETY: fcntl F_DUPFD takes no pointers; the copy is as an exec would leave it.
        let passed = unsafe { libc::fcntl(a.as_raw_fd(), libc::F_DUPFD, 3) };
        let picky = take_passed(passed, |_| Err(Error::invalid("no socket")));
        assert_eq!(picky.unwrap_err().kind(), ErrorKind::InvalidInput);
        let owned = take_passed(passed, |_| Ok(())).unwrap();
        let again = take_passed(passed, |_| Ok(()));
        assert_eq!(again.unwrap_err().kind(), ErrorKind::NotFound, "only once");
        drop(owned);
    }
}
