//! Permissions: what an edge needs of the node below it, and what it lets other edges do.
//!
//! Pure functions on plain values. The four permissions are those of the QMP reference
//! (BlockPermission).

use std::fmt;
use std::ops::{BitAnd, BitOr, Not};

/// A set of permissions.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Perm(u8);

impl Perm {
    /// No permission.
    pub const NONE: Perm = Perm(0);
    /// To read and rely on the data being a consistent view of the disk.
    pub const CONSISTENT_READ: Perm = Perm(1);
    /// To change the visible data.
    pub const WRITE: Perm = Perm(2);
    /// To write what does not change the visible data (copy-on-read, stream).
    pub const WRITE_UNCHANGED: Perm = Perm(4);
    /// To change the size.
    pub const RESIZE: Perm = Perm(8);
    /// All of them.
    pub const ALL: Perm = Perm(15);

    const NAMES: [(Perm, &str); 4] = [
        (Perm::CONSISTENT_READ, "consistent-read"),
        (Perm::WRITE, "write"),
        (Perm::WRITE_UNCHANGED, "write-unchanged"),
        (Perm::RESIZE, "resize"),
    ];

    /// Whether every permission of `other` is in it.
    pub fn contains(self, other: Perm) -> bool {
        self.0 & other.0 == other.0
    }

    /// Whether it holds nothing.
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }

    pub(crate) fn mask(self) -> u8 {
        self.0
    }

    pub(crate) fn from_mask(mask: u8) -> Perm {
        Perm(mask & Perm::ALL.0)
    }

    /// The names of those in it, as QMP writes them.
    pub fn names(self) -> impl Iterator<Item = &'static str> {
        Self::NAMES.iter().filter(move |(p, _)| self.contains(*p)).map(|(_, n)| *n)
    }

    /// The single permissions in it, with their bit numbers (0 to 3), as the file lock scheme
    /// counts them.
    pub fn bits(self) -> impl Iterator<Item = u64> {
        (0..4).filter(move |b| self.0 & (1 << b) != 0)
    }
}

impl BitOr for Perm {
    type Output = Perm;
    fn bitor(self, o: Perm) -> Perm {
        Perm(self.0 | o.0)
    }
}

impl BitAnd for Perm {
    type Output = Perm;
    fn bitand(self, o: Perm) -> Perm {
        Perm(self.0 & o.0)
    }
}

impl Not for Perm {
    type Output = Perm;
    fn not(self) -> Perm {
        Perm(!self.0 & Perm::ALL.0)
    }
}

impl fmt::Debug for Perm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.names().collect::<Vec<_>>().join("+"))
    }
}

/// What an edge uses, and what it lets the other edges of the same node use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Perms {
    /// Needed by this edge.
    pub used: Perm,
    /// Allowed to others.
    pub shared: Perm,
}

impl Perms {
    /// Nothing needed, everything allowed.
    pub const IDLE: Perms = Perms { used: Perm::NONE, shared: Perm::ALL };

    /// What several edges together use and allow.
    #[must_use]
    pub fn join(self, o: Perms) -> Perms {
        Perms { used: self.used | o.used, shared: self.shared & o.shared }
    }

    /// Whether an edge of these permissions is going to write: data, also unchanged, or a size.
    pub fn writes(self) -> bool {
        !(self.used & (Perm::WRITE | Perm::WRITE_UNCHANGED | Perm::RESIZE)).is_empty()
    }
}

/// What a child is to its parent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// The filtered child of a filter: shows exactly the parent's data.
    Filtered,
    /// Data and metadata of a format in one image.
    Image,
    /// Data only (an external data file).
    Data,
    /// Where reads of unallocated ranges go.
    Backing,
    /// One of any number of children that are to hold the same data (quorum). The option is a
    /// list; the edges are called `NAME.0`, `NAME.1` and so on, and come and go: the driver keeps
    /// them as [`Copies`](crate::Copies).
    Copy,
}

/// Whether an edge means "the disk that is here" or "these very bytes" (mutators.md, rule 3).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Binding {
    /// Moves when the node is overlaid or replaced.
    Position,
    /// Stays on its node.
    Content,
}

/// What a node whose parents together have `above` needs of a child in `role`.
/// `writable` says whether the node itself is not read-only.
pub fn child_perms(role: Role, above: Perms, writable: bool) -> Perms {
    match role {
        // A filter passes on what is asked of it.
        Role::Filtered => above,
        Role::Image | Role::Data => {
            let mut used = Perm::CONSISTENT_READ;
            if writable && above.writes() {
                used = used | Perm::WRITE | Perm::RESIZE;
            }
            // Cached metadata would go stale under another writer, so others may only read,
            // or write what is there already.
            let mut shared = Perm::CONSISTENT_READ | Perm::WRITE_UNCHANGED;
            if role == Role::Data && above.shared.contains(Perm::WRITE) {
                shared = shared | Perm::WRITE;
            }
            Perms { used, shared }
        }
        // Nobody reads the overlay, or only what it has written to it itself (fleecing).
        Role::Backing if !above.used.contains(Perm::CONSISTENT_READ) => Perms::IDLE,
        // Overlays rely on the bytes below: nobody may change what is read there.
        Role::Backing => Perms {
            used: Perm::CONSISTENT_READ,
            shared: Perm::CONSISTENT_READ | Perm::WRITE_UNCHANGED,
        },
        // What reaches one copy reaches all of them, and nobody else may make them differ.
        Role::Copy => {
            let writes = Perm::WRITE | Perm::WRITE_UNCHANGED;
            let passed = Perm::CONSISTENT_READ | if writable { writes } else { Perm::NONE };
            Perms {
                used: above.used & passed,
                shared: Perm::CONSISTENT_READ | Perm::WRITE_UNCHANGED,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_bits() {
        let p = Perm::WRITE | Perm::RESIZE;
        assert_eq!(p.names().collect::<Vec<_>>(), ["write", "resize"]);
        assert_eq!(p.bits().collect::<Vec<_>>(), [1, 3]);
        assert_eq!(format!("{:?}", !p), "consistent-read+write-unchanged");
    }

    #[test]
    fn a_backing_node_may_change_while_nobody_relies_on_it() {
        let perms = |used| child_perms(Role::Backing, Perms { used, shared: Perm::ALL }, true);
        assert_eq!(perms(Perm::NONE), Perms::IDLE);
        assert_eq!(perms(Perm::WRITE), Perms::IDLE);
        let p = perms(Perm::WRITE | Perm::CONSISTENT_READ);
        assert!(p.used == Perm::CONSISTENT_READ && !p.shared.contains(Perm::WRITE));
    }

    #[test]
    fn a_format_without_writers_takes_no_write_permission() {
        let reader = Perms { used: Perm::CONSISTENT_READ, shared: Perm::ALL };
        let p = child_perms(Role::Image, reader, true);
        assert_eq!(p.used, Perm::CONSISTENT_READ);
        assert!(!p.shared.contains(Perm::WRITE));
        let resizer = Perms { used: Perm::RESIZE, shared: Perm::ALL };
        let p = child_perms(Role::Image, resizer, true);
        assert!(p.used.contains(Perm::WRITE | Perm::RESIZE), "a size is written, too");
    }
}
