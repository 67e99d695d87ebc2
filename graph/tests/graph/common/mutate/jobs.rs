//! Filters of jobs: in, out, and completed.

use super::{Done, Mutator, disk, is_position, node};
use crate::common::jobs::{cbw, mirror, run};
use crate::common::notation::{JobSketch, Sketch, split};
use crate::common::oracle::{Refused, because, has_cycle, reaches, showing_below};
use crate::common::stage::Stage;

/// A job begins.
#[derive(Clone, Debug)]
pub struct JobStart {
    /// Its id.
    pub id: String,
    /// Whether it mirrors; else it is a backup.
    pub mirror: bool,
    /// The node or backend that it copies.
    pub disk: String,
    /// The node it copies to.
    pub target: String,
    /// The node whose place the target is to take.
    pub replaces: Option<String>,
}

fn check_replaced(s: &Sketch, disk: &str, replaced: &str) -> Result<(), Refused> {
    if showing_below(s, disk).contains(replaced) {
        return Ok(());
    }
    Err(because([replaced, "cannot be replaced by a copy of node", disk]))
}

impl JobStart {
    /// The edges that rest while it runs.
    fn rests(&self, s: &Sketch, disk: &str) -> Result<Vec<String>, Refused> {
        let Some(r) = &self.replaces else { return Ok(Vec::new()) };
        node(s, r)?;
        check_replaced(s, disk, r)?;
        let showing = showing_below(s, disk);
        let mut edges = s.users(r);
        edges.retain(|l| is_position(s, l) && showing.contains(split(l).0));
        match s.jobs().find(|j| edges.iter().any(|l| j.frozen.contains(l))) {
            Some(j) => Err(because(["is in use by job", &j.id])),
            None => Ok(edges),
        }
    }
}

impl Mutator for JobStart {
    fn next(&self, s: &mut Sketch) -> Result<(), Refused> {
        let n = disk(s, &self.disk)?;
        let t = self.target.as_str();
        node(s, t)?;
        if reaches(s, t, &n) {
            return Err(because(["target", t, "stands on node"]));
        }
        if s.size(t) < s.size(&n) {
            return Err(because(["target", t, "is smaller"]));
        }
        let frozen = self.rests(s, &n)?.into_iter().collect();
        let (id, target) = (self.id.clone(), self.target.clone());
        let job = JobSketch { id, mirror: self.mirror, target, frozen };
        s.nodes.get_mut(&n).unwrap().jobs.push(job);
        if has_cycle(s) { Err(because(["a cycle"])) } else { Ok(()) }
    }

    fn run<'a>(&'a self, stage: &'a Stage) -> Done<'a> {
        let (mut spec, shared) = match self.mirror {
            true => mirror(&self.id, &self.target),
            false => cbw(&self.id, &self.target),
        };
        spec.replaces = self.replaces.clone();
        Box::pin(async move {
            let filter = stage.graph.insert_job_filter(&self.disk, spec).await?;
            let job = (filter, shared, self.replaces.clone());
            stage.jobs.borrow_mut().insert(self.id.clone(), job);
            Ok(())
        })
    }
}

/// The node that a job is on; the job is taken out of it.
fn take(s: &mut Sketch, id: &str) -> Result<String, Refused> {
    let found = s.nodes.iter_mut().find_map(|(name, n)| {
        let at = n.jobs.iter().position(|j| j.id == id)?;
        n.jobs.remove(at);
        Some(name.clone())
    });
    found.ok_or_else(|| because(["there is no such job"]))
}

/// A job ends and leaves everything as it is.
#[derive(Clone, Debug)]
pub struct JobEnd(pub String);

impl Mutator for JobEnd {
    fn next(&self, s: &mut Sketch) -> Result<(), Refused> {
        take(s, &self.0).map(drop)
    }

    fn run<'a>(&'a self, stage: &'a Stage) -> Done<'a> {
        Box::pin(async move {
            let job = stage.job(&self.0)?;
            let done = stage.graph.remove_job_filter(&job.0).await;
            if done.is_err() {
                stage.jobs.borrow_mut().insert(self.0.clone(), job);
            }
            done
        })
    }
}

/// A mirror has copied everything and puts its target in the place of its disk, or of the node
/// that it replaces.
#[derive(Clone, Debug)]
pub struct JobComplete {
    /// Its id.
    pub id: String,
    /// Its target.
    pub target: String,
    /// What it was told to replace.
    pub replaces: Option<String>,
}

impl Mutator for JobComplete {
    fn next(&self, s: &mut Sketch) -> Result<(), Refused> {
        let t = self.target.as_str();
        node(s, t)?;
        let disk = take(s, &self.id)?;
        let old = self.replaces.as_deref().unwrap_or(&disk);
        check_replaced(s, &disk, old)?;
        if s.size(t) < s.size(old) {
            return Err(because([t, "less than the", old]));
        }
        for label in s.users(old) {
            if is_position(s, &label) {
                s.point(&label, Some(t));
            }
        }
        if has_cycle(s) { Err(because(["a cycle"])) } else { Ok(()) }
    }

    fn run<'a>(&'a self, stage: &'a Stage) -> Done<'a> {
        Box::pin(async move {
            let job = stage.job(&self.id)?;
            run(&job.1).await;
            let done = stage.graph.complete_job_filter(&job.0, &self.target).await;
            if done.is_err() {
                stage.jobs.borrow_mut().insert(self.id.clone(), job);
            }
            done
        })
    }
}
