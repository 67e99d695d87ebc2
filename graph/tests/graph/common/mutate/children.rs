//! Children that come and go, and sizes.

use gipfel_graph::ChildChange;

use super::{Done, Mutator, disk, node};
use crate::common::notation::{Door, LEAST, Sketch};
use crate::common::oracle::{Refused, because, data_of, has_cycle, permissions, writers};
use crate::common::stage::Stage;

/// x-blockdev-change.
#[derive(Clone, Debug)]
pub struct ChangeChild {
    /// The node or backend whose children change.
    pub parent: String,
    /// The change.
    pub change: ChildChange,
}

impl Mutator for ChangeChild {
    fn next(&self, s: &mut Sketch) -> Result<(), Refused> {
        let q = disk(s, &self.parent)?;
        let fixed = because([q.as_str(), "has a fixed set of children"]);
        let n = s.nodes[&q].clone();
        match &self.change {
            ChildChange::Add(m) => {
                node(s, m)?;
                if n.driver != "fan" {
                    return Err(fixed);
                }
                if let Some((c, _)) = n.children.iter().find(|c| c.1.as_ref() == Some(m)) {
                    return Err(because([m.as_str(), "is the child", c, q.as_str(), "already"]));
                }
                if s.size(m) < s.size(&q) {
                    return Err(because([m.as_str(), "is smaller than node", q.as_str()]));
                }
                s.point(&format!("{q}.children.{}", n.next), Some(m));
                if has_cycle(s) { Err(because(["a cycle"])) } else { Ok(()) }
            }
            ChildChange::Remove(child) => {
                if n.children.iter().all(|c| c.0 != *child) {
                    return Err(because([q.as_str(), "has no child", child]));
                }
                if n.driver != "fan" {
                    return Err(fixed);
                }
                if n.children.len() <= LEAST {
                    return Err(because([q.as_str(), "children are too few"]));
                }
                let n = s.nodes.get_mut(&q).unwrap();
                n.children.retain(|c| c.0 != *child);
                n.next -= usize::from(*child == format!("children.{}", n.next - 1));
                Ok(())
            }
        }
    }

    fn run<'a>(&'a self, stage: &'a Stage) -> Done<'a> {
        Box::pin(stage.graph.blockdev_change(&self.parent, &self.change))
    }
}

/// block_resize.
#[derive(Clone, Debug)]
pub struct Resize {
    /// The node or backend.
    pub disk: String,
    /// Its new size, in bytes.
    pub size: u64,
    /// Whether it may become smaller.
    pub shrink: bool,
}

impl Mutator for Resize {
    fn next(&self, s: &mut Sketch) -> Result<(), Refused> {
        let n = disk(s, &self.disk)?;
        let data = data_of(s, &n).to_owned();
        let showing = |x: &str| data_of(s, x) == data;
        let mut jobs = s.nodes.iter().filter(|(x, _)| showing(x)).flat_map(|(_, x)| &x.jobs);
        if jobs.next().is_some() {
            return Err(because(["is being copied by job"]));
        }
        let follows = |d: &Door| d.follows_node && d.client && d.to.as_deref().is_some_and(showing);
        if s.doors.values().any(follows) {
            return Err(because(["follows node", "keeps its size"]));
        }
        if self.size < s.size(&n) && !self.shrink {
            return Err(because(["say shrink=true"]));
        }
        let mut resized = s.clone();
        let door = Door { to: Some(n), resizes: true, ..super::NO_DOOR };
        resized.doors.insert("b/resize".into(), door);
        permissions(&resized)?;
        let mut at = Some(data);
        while let Some(x) = at {
            let n = s.nodes.get_mut(&x).unwrap();
            n.size = self.size;
            let file = n.child("file").cloned();
            at = file.map(|f| data_of(s, &f).to_owned());
        }
        Ok(())
    }

    fn run<'a>(&'a self, stage: &'a Stage) -> Done<'a> {
        Box::pin(stage.graph.block_resize(&self.disk, self.size, self.shrink))
    }

    fn quiesces(&self, before: &Sketch) -> Vec<String> {
        writers(before, &disk(before, &self.disk).expect("it was resized"))
    }
}
