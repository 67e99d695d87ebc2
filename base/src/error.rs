//! One error type for all crates: what kind, what happened, where, and from which source.
//!
//! An error is one pointer wide, so that `Result<(), Error>` is cheap on the data path.
//! A message says what went wrong, where, and, where that helps, what to do about it.

use std::fmt;

/// What kind of failure it is; decides exit codes, QMP classes and NBD error numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// An argument, option or request is malformed or out of range.
    InvalidInput,
    /// The named thing does not exist.
    NotFound,
    /// The named thing exists already.
    Exists,
    /// Something is in use, frozen, or locked by another user.
    InUse,
    /// The operating system or the permission system of the graph refused.
    PermissionDenied,
    /// A write reached something read-only.
    ReadOnly,
    /// No space is left where the data should go.
    NoSpace,
    /// Stored data contradict their specification.
    Corrupt,
    /// Known, but not offered by this version or this object.
    Unsupported,
    /// A named limit would be passed.
    Limit,
    /// The backend has no medium.
    NoMedium,
    /// The work was cancelled before its end.
    Cancelled,
    /// The peer closed the connection or broke its protocol.
    Disconnected,
    /// The operating system reported this errno.
    Os(i32),
}

/// The error of every gipfel operation: kind, message, context (outermost last) and source.
pub struct Error(Box<Inner>);

#[derive(Clone)]
struct Inner {
    kind: ErrorKind,
    message: String,
    context: Vec<String>,
}

/// The result of every gipfel operation.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// A new error of `kind` that says `message`.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Error(Box::new(Inner { kind, message: message.into(), context: Vec::new() }))
    }

    /// An error for a positive `errno` that arose while doing `what`.
    pub fn os(errno: i32, what: impl fmt::Display) -> Self {
        let os = std::io::Error::from_raw_os_error(errno);
        let text = os.to_string();
        // std appends " (os error N)"; people know the name of the failure, not its number.
        let text = text.split(" (os error").next().unwrap_or(&text);
        Self::new(ErrorKind::from_errno(errno), format!("{what}: {text}"))
    }

    /// Shorthand for [`ErrorKind::InvalidInput`].
    pub fn invalid(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::InvalidInput, message)
    }

    /// Shorthand for [`ErrorKind::Unsupported`].
    pub fn unsupported(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Unsupported, message)
    }

    /// Shorthand for [`ErrorKind::Corrupt`].
    pub fn corrupt(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Corrupt, message)
    }

    /// What kind of failure it is.
    pub fn kind(&self) -> ErrorKind {
        self.0.kind
    }

    /// The same error, said to have happened `at` this place (put before the message).
    #[must_use]
    pub fn context(mut self, at: impl Into<String>) -> Self {
        self.0.context.push(at.into());
        self
    }

    /// The errno that stands for this error where only a number can be given (NBD, virtio).
    pub fn errno(&self) -> i32 {
        match self.0.kind {
            ErrorKind::InvalidInput | ErrorKind::Limit => libc_numbers::EINVAL,
            ErrorKind::NotFound => libc_numbers::ENOENT,
            ErrorKind::Exists => libc_numbers::EEXIST,
            ErrorKind::InUse => libc_numbers::EBUSY,
            ErrorKind::PermissionDenied | ErrorKind::ReadOnly => libc_numbers::EPERM,
            ErrorKind::NoSpace => libc_numbers::ENOSPC,
            ErrorKind::Unsupported => libc_numbers::EOPNOTSUPP,
            ErrorKind::NoMedium => libc_numbers::ENOMEDIUM,
            ErrorKind::Cancelled => libc_numbers::ECANCELED,
            ErrorKind::Corrupt | ErrorKind::Disconnected => libc_numbers::EIO,
            ErrorKind::Os(n) => n,
        }
    }
}

impl ErrorKind {
    /// The kind that a positive errno means.
    pub fn from_errno(errno: i32) -> Self {
        match errno {
            libc_numbers::ENOENT => Self::NotFound,
            libc_numbers::EEXIST => Self::Exists,
            libc_numbers::EACCES | libc_numbers::EPERM => Self::PermissionDenied,
            libc_numbers::EROFS => Self::ReadOnly,
            libc_numbers::ENOSPC => Self::NoSpace,
            libc_numbers::EOPNOTSUPP => Self::Unsupported,
            n => Self::Os(n),
        }
    }
}

/// The Linux error numbers this crate needs (base depends on nothing).
mod libc_numbers {
    pub const EPERM: i32 = 1;
    pub const ENOENT: i32 = 2;
    pub const EIO: i32 = 5;
    pub const EACCES: i32 = 13;
    pub const EBUSY: i32 = 16;
    pub const EEXIST: i32 = 17;
    pub const EINVAL: i32 = 22;
    pub const ENOSPC: i32 = 28;
    pub const EROFS: i32 = 30;
    pub const EOPNOTSUPP: i32 = 95;
    pub const ENOMEDIUM: i32 = 123;
    pub const ECANCELED: i32 = 125;
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for c in self.0.context.iter().rev() {
            write!(f, "{c}: ")?;
        }
        f.write_str(&self.0.message)
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: {self}", self.0.kind)
    }
}

impl std::error::Error for Error {}

impl Clone for Error {
    fn clone(&self) -> Self {
        Error(self.0.clone())
    }
}

impl From<std::io::Error> for Error {
    fn from(e: std::io::Error) -> Self {
        match e.raw_os_error() {
            Some(n) => Error::new(ErrorKind::from_errno(n), e.to_string()),
            None => Error::new(ErrorKind::Os(libc_numbers::EIO), e.to_string()),
        }
    }
}

/// Adds the place of a failure to a result.
pub trait ResultExt<T> {
    /// Puts `at()` before the message of an error.
    fn at<S: Into<String>>(self, at: impl FnOnce() -> S) -> Result<T>;
}

impl<T, E: Into<Error>> ResultExt<T> for Result<T, E> {
    fn at<S: Into<String>>(self, at: impl FnOnce() -> S) -> Result<T> {
        self.map_err(|e| e.into().context(at()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn context_reads_from_the_outside_in() {
        let e = Error::os(28, "write at 0x1000").context("file 'a.img'").context("node 'disk'");
        assert_eq!(
            e.to_string(),
            "node 'disk': file 'a.img': write at 0x1000: No space left on device"
        );
        assert_eq!(e.kind(), ErrorKind::NoSpace);
        assert_eq!(e.errno(), 28);
    }
}
