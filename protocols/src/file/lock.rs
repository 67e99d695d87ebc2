//! Locks against other processes, the way the reference locks images, so that both refuse each
//! other's (its manual, "Disk image file locking"; the bytes were read off the running tools).
//!
//! A permission that is used holds a shared lock on byte 100 + its number, one that is not shared
//! on byte 200 + its number. Locks are taken first and then it is looked whether anybody holds
//! the opposite byte: of two who come at once at least one sees the other.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use gipfel_base::{ByteRange, Error, ErrorKind, Result, ResultExt};
use gipfel_io::{File, RangeLock};
use gipfel_node::{Perm, Perms};
use serde::Deserialize;

const USED: u64 = 100;
const NOT_SHARED: u64 = 200;

/// Whether locks are used (option `locking`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Use {
    /// Where the file system has them.
    #[default]
    Auto,
    /// In any case: without them the permission is refused.
    On,
    /// Not at all.
    Off,
}

/// The locks that a node holds on its file.
pub(super) struct Locks {
    use_: Use,
    /// The file system turned out to have no locks.
    missing: AtomicBool,
    /// Permissions used and not shared, as they are locked now.
    held: Mutex<(Perm, Perm)>,
    turn: RangeLock,
}

impl Locks {
    pub(super) fn new(use_: Use) -> Locks {
        Locks {
            use_,
            missing: AtomicBool::new(false),
            held: Mutex::default(),
            turn: RangeLock::new(),
        }
    }

    /// Takes what `perms` need and then gives up what they do not. Fails where another process
    /// stands against it, with nothing changed; if nothing new is needed it does not fail.
    pub(super) async fn set(&self, file: &File, name: &str, perms: Perms) -> Result<()> {
        if self.use_ == Use::Off || self.missing.load(Ordering::Relaxed) {
            return Ok(());
        }
        let _turn = self.turn.lock(ByteRange::new(0, 1)).await;
        let held = || self.held.lock().unwrap_or_else(PoisonError::into_inner);
        let had = *held();
        let want = (perms.used, !perms.shared);
        let new = (want.0 & !had.0, want.1 & !had.1);
        if let Err(e) = take(file, new).await {
            give_up(file, new).await;
            let no_locks = matches!(e.kind(), ErrorKind::Unsupported | ErrorKind::Os(_));
            if no_locks && self.use_ == Use::Auto && had == (Perm::NONE, Perm::NONE) {
                self.missing.store(true, Ordering::Relaxed);
                return Ok(());
            }
            return Err(e).at(|| format!("locking '{name}'"));
        }
        if let Err(e) = look(file, name, new).await {
            give_up(file, new).await;
            return Err(e);
        }
        *held() = want;
        give_up(file, (had.0 & !want.0, had.1 & !want.1)).await;
        Ok(())
    }
}

async fn take(file: &File, new: (Perm, Perm)) -> Result<()> {
    for b in bytes(new) {
        file.lock_byte(b).await?;
    }
    Ok(())
}

/// The bytes that stand for permissions used and not shared.
fn bytes((used, not_shared): (Perm, Perm)) -> impl Iterator<Item = u64> {
    used.bits().map(|b| USED + b).chain(not_shared.bits().map(|b| NOT_SHARED + b))
}

async fn look(file: &File, name: &str, (used, not_shared): (Perm, Perm)) -> Result<()> {
    for p in singles(used) {
        if held_by_others(file, NOT_SHARED, p).await? {
            return Err(conflict(name, format!("it does not let others use '{p:?}'")));
        }
    }
    for p in singles(not_shared) {
        if held_by_others(file, USED, p).await? {
            return Err(conflict(name, format!("it uses '{p:?}', which this use excludes")));
        }
    }
    Ok(())
}

fn singles(set: Perm) -> impl Iterator<Item = Perm> {
    [Perm::CONSISTENT_READ, Perm::WRITE, Perm::WRITE_UNCHANGED, Perm::RESIZE]
        .into_iter()
        .filter(move |p| set.contains(*p))
}

async fn held_by_others(file: &File, base: u64, p: Perm) -> Result<bool> {
    for b in p.bits() {
        if file.is_byte_locked(base + b).await? {
            return Ok(true);
        }
    }
    Ok(false)
}

fn conflict(name: &str, why: String) -> Error {
    Error::new(
        ErrorKind::InUse,
        format!(
            "'{name}' is in use by another process or node, and {why}; end that use, or look at \
             the image as it is with read-only=on and force-share=on"
        ),
    )
}

async fn give_up(file: &File, old: (Perm, Perm)) {
    for b in bytes(old) {
        // Nothing can be done about a failure, and whoever gives up must not fail; the lock goes
        // with the open file at the latest.
        let _ = file.unlock_byte(b).await;
    }
}
