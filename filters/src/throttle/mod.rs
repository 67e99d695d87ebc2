//! Filter throttle: lets requests through at the rate of a group that many nodes may share.
//!
//! The limits are those of the QMP reference (ThrottleLimits): bytes and requests per second, for
//! both directions together or each by itself, with bursts. Writes of zeros and discards count as
//! writes of their length; flushes are not limited. Groups have names: see [`Groups`].

mod bucket;
mod group;
mod limits;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use gipfel_base::{ByteRange, Error, ErrorKind, Result};
use gipfel_io::Buf;
use gipfel_node::{
    Access, Child, Driver, DriverDef, IoFuture, Kind, Mapping, OpenArgs, Opened, WriteFlags,
    ZeroFlags,
};
use serde::Deserialize;
use serde_json::Value;

pub use group::ThrottleGroup;
use group::{Member, Way};
pub use limits::Limits;

use crate::filter::{Below, FILE, Filter, Filtered, parse};

/// The filter throttle. A process with throttle groups opens it through [`Groups::open`].
pub static THROTTLE: DriverDef = DriverDef {
    name: "throttle",
    kind: Kind::Filter,
    children: FILE,
    open: |_| {
        Box::pin(async {
            Err(Error::unsupported("driver 'throttle' needs throttle groups: there are none here"))
        })
    },
    create: None,
    probe: None,
    check: None,
};

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct Options {
    throttle_group: String,
}

/// The throttle groups of a process, by name.
///
/// Those made with [`Groups::create`] stay until they are removed; those made for a backend go
/// with their last member.
#[derive(Default)]
pub struct Groups {
    list: Mutex<BTreeMap<String, Entry>>,
}

struct Entry {
    group: Arc<ThrottleGroup>,
    kept: bool,
}

impl Groups {
    /// No groups yet.
    pub fn new() -> Arc<Groups> {
        Arc::default()
    }

    /// The table, without groups that went with their last member.
    fn list(&self) -> MutexGuard<'_, BTreeMap<String, Entry>> {
        let mut list = self.list.lock().unwrap_or_else(PoisonError::into_inner);
        list.retain(|_, e| e.kept || !e.group.members().is_empty());
        list
    }

    /// Makes the group `name`. Fails where there is one of that name, or where limits contradict
    /// each other.
    pub fn create(&self, name: &str, limits: Limits) -> Result<Arc<ThrottleGroup>> {
        let mut list = self.list();
        if list.contains_key(name) {
            let text = format!("there is a throttle group '{name}' already");
            return Err(Error::new(ErrorKind::Exists, text));
        }
        let group = ThrottleGroup::new(name.to_owned(), limits)?;
        list.insert(name.to_owned(), Entry { group: group.clone(), kept: true });
        Ok(group)
    }

    /// The group of that name.
    pub fn get(&self, name: &str) -> Result<Arc<ThrottleGroup>> {
        self.list().get(name).map(|e| e.group.clone()).ok_or_else(|| {
            let text = format!("there is no throttle group '{name}': make it with object-add");
            Error::new(ErrorKind::NotFound, text)
        })
    }

    /// Removes the group `name`. Fails, naming them, while it has members.
    pub fn remove(&self, name: &str) -> Result<()> {
        let group = self.get(name)?;
        let members = group.members();
        if !members.is_empty() {
            return Err(Error::new(
                ErrorKind::InUse,
                format!("throttle group '{name}' is in use by {}", members.join(", ")),
            ));
        }
        self.list().remove(name);
        Ok(())
    }

    /// Opens a `throttle` node in the group that its option `throttle-group` names.
    pub fn open(self: &Arc<Self>, args: OpenArgs) -> IoFuture<'static, Opened> {
        let groups = self.clone();
        Box::pin(async move {
            let options: Options = parse(THROTTLE.name, args.options)?;
            let member =
                groups.get(&options.throttle_group)?.join(&format!("node '{}'", args.node_name));
            let driver = Filtered::open(args.children, Throttle { member }).await?;
            Ok(Opened { driver, implicit: Vec::new() })
        })
    }

    /// The implicit filter over `child` of the client `owner`, in the group `name`. A group that
    /// is not there yet is made without limits.
    pub fn make(&self, child: Arc<Child>, name: &str, owner: &str) -> Result<Box<dyn Driver>> {
        let mut list = self.list();
        let group = match list.get(name) {
            Some(e) => e.group.clone(),
            None => ThrottleGroup::new(name.to_owned(), Limits::default())?,
        };
        let member = group.join(owner);
        list.entry(name.to_owned()).or_insert(Entry { group, kept: false });
        Ok(Filtered::implicit(child, Throttle { member }))
    }
}

struct Throttle {
    member: Member,
}

impl Throttle {
    async fn pass(&self, way: Way, bytes: u64) {
        if !self.member.is_open(way) {
            self.member.admit(way, bytes).await;
        }
    }
}

impl Filter for Throttle {
    fn map<'a>(&'a self, below: &'a Below, access: Access, range: ByteRange) -> Mapping<'a> {
        let way = match access {
            Access::Read => Way::Read,
            Access::Write => Way::Write,
        };
        if self.member.is_open(way) {
            below.straight(range)
        } else {
            Mapping::Work { len: range.len() }
        }
    }

    fn read<'a>(&'a self, below: &'a Below, offset: u64, buf: Buf) -> IoFuture<'a> {
        Box::pin(async move {
            self.pass(Way::Read, buf.len() as u64).await;
            below.child().read(offset, buf).await
        })
    }

    fn write<'a>(
        &'a self,
        below: &'a Below,
        offset: u64,
        buf: Buf,
        flags: WriteFlags,
    ) -> IoFuture<'a> {
        Box::pin(async move {
            self.pass(Way::Write, buf.len() as u64).await;
            below.child().write(offset, buf, flags).await
        })
    }

    fn write_zeroes<'a>(
        &'a self,
        below: &'a Below,
        range: ByteRange,
        flags: ZeroFlags,
    ) -> IoFuture<'a> {
        Box::pin(async move {
            self.pass(Way::Write, range.len()).await;
            below.child().write_zeroes(range, flags).await
        })
    }

    fn discard<'a>(&'a self, below: &'a Below, range: ByteRange) -> IoFuture<'a> {
        Box::pin(async move {
            self.pass(Way::Write, range.len()).await;
            below.child().discard(range).await
        })
    }

    fn expedite(&self, on: bool) {
        self.member.hurry(on);
    }

    fn same_options(&self, options: Value) -> Result<()> {
        let wanted = parse::<Options>(THROTTLE.name, options)?.throttle_group;
        let group = self.member.group().name();
        if wanted == group {
            return Ok(());
        }
        Err(Error::unsupported(format!(
            "the node is in throttle group '{group}' and cannot change to '{wanted}' while it is \
             open: add another throttle node and put it in its place with blockdev-replace"
        )))
    }

    fn close<'a>(&'a self, _: &'a Below) -> IoFuture<'a> {
        self.member.leave();
        Box::pin(async { Ok(()) })
    }
}
