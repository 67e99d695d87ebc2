//! Block jobs: one state machine for all, and the list of those that run.
//!
//! What a job does is a future; this crate knows when it may change its state, and tells whoever
//! listens. States and their order are those of the QMP reference (JobStatus). So far there is one
//! kind, `create`.

mod status;

use std::cell::{Cell, RefCell};
use std::future::Future;
use std::rc::Rc;

use gipfel_base::limits::MAX_NAME;
use gipfel_base::{Error, ErrorKind, Result};
use gipfel_io::spawn_local;

pub use status::Status;

/// Jobs that may be there at once, concluded ones included.
pub const MAX_JOBS: usize = 1024;

/// What a job is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Makes an image.
    Create,
}

impl Kind {
    /// Its name in QMP.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Create => "create",
        }
    }
}

/// What is known of a job (JobInfo).
#[derive(Clone, Debug)]
pub struct Info {
    /// Its id.
    pub id: String,
    /// Its kind.
    pub kind: Kind,
    /// Where it stands.
    pub status: Status,
    /// Work done, in a unit of its own.
    pub current: u64,
    /// Work done and left, in the same unit.
    pub total: u64,
    /// Why it failed.
    pub error: Option<String>,
}

struct Job {
    id: String,
    kind: Kind,
    status: Cell<Status>,
    current: Cell<u64>,
    error: RefCell<Option<Error>>,
}

/// What is told of every change of state: id and new state.
pub type OnChange = Box<dyn Fn(&str, Status)>;

/// All jobs of a process. Lives on the control thread.
pub struct Jobs {
    list: RefCell<Vec<Rc<Job>>>,
    on_change: OnChange,
}

impl Jobs {
    /// No jobs yet.
    pub fn new(on_change: OnChange) -> Rc<Jobs> {
        Rc::new(Jobs { list: RefCell::default(), on_change })
    }

    fn go(&self, job: &Job, to: Status) {
        let from = job.status.replace(to);
        assert!(from.may_become(to), "job '{}' cannot go from {from:?} to {to:?}", job.id);
        (self.on_change)(&job.id, to);
    }

    /// Starts a job that does `work` and is then concluded, until it is dismissed.
    pub fn start(
        self: &Rc<Self>,
        id: &str,
        kind: Kind,
        work: impl Future<Output = Result<()>> + 'static,
    ) -> Result<()> {
        if id.is_empty() || id.len() > MAX_NAME {
            return Err(Error::invalid(format!("a job id has 1 to {MAX_NAME} characters")));
        }
        let mut list = self.list.borrow_mut();
        if list.iter().any(|j| j.id == id) {
            let text = format!("there is a job with id '{id}' already");
            return Err(Error::new(ErrorKind::Exists, text));
        }
        if list.len() >= MAX_JOBS {
            let text = format!("there are {MAX_JOBS} jobs already: dismiss concluded ones first");
            return Err(Error::new(ErrorKind::Limit, text));
        }
        let job = Rc::new(Job {
            id: id.to_owned(),
            kind,
            status: Cell::new(Status::Undefined),
            current: Cell::new(0),
            error: RefCell::new(None),
        });
        list.push(job.clone());
        drop(list);
        self.go(&job, Status::Created);
        self.go(&job, Status::Running);
        let me = self.clone();
        spawn_local(async move {
            match work.await {
                Ok(()) => {
                    job.current.set(1);
                    me.go(&job, Status::Waiting);
                    me.go(&job, Status::Pending);
                }
                Err(e) => {
                    *job.error.borrow_mut() = Some(e);
                    me.go(&job, Status::Aborting);
                }
            }
            me.go(&job, Status::Concluded);
        })
        .detach();
        Ok(())
    }

    /// All jobs, oldest first.
    pub fn query(&self) -> Vec<Info> {
        let info = |j: &Rc<Job>| Info {
            id: j.id.clone(),
            kind: j.kind,
            status: j.status.get(),
            current: j.current.get(),
            total: 1,
            error: j.error.borrow().as_ref().map(ToString::to_string),
        };
        self.list.borrow().iter().map(info).collect()
    }

    /// Forgets a concluded job.
    pub fn dismiss(&self, id: &str) -> Result<()> {
        let job = self.list.borrow().iter().find(|j| j.id == id).cloned().ok_or_else(|| {
            Error::new(ErrorKind::NotFound, format!("there is no job with id '{id}'"))
        })?;
        if job.status.get() != Status::Concluded {
            return Err(Error::new(
                ErrorKind::InUse,
                format!(
                    "job '{id}' is {}: only a concluded job can be dismissed",
                    job.status.get().name()
                ),
            ));
        }
        self.list.borrow_mut().retain(|j| !Rc::ptr_eq(j, &job));
        self.go(&job, Status::Null);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use gipfel_io::sim::World;
    use gipfel_io::yield_now;

    fn run(outcome: Result<()>) -> (Vec<Status>, Option<String>) {
        let seen = Rc::new(RefCell::new(Vec::new()));
        let s = seen.clone();
        let error = World::new(1).run(async move {
            let jobs = Jobs::new(Box::new(move |_, st| s.borrow_mut().push(st)));
            jobs.start("j", Kind::Create, async move { outcome }).unwrap();
            assert!(jobs.start("j", Kind::Create, async { Ok(()) }).is_err(), "ids are unique");
            assert!(jobs.dismiss("j").is_err(), "a running job stays");
            while jobs.query()[0].status != Status::Concluded {
                yield_now().await;
            }
            let error = jobs.query()[0].error.clone();
            jobs.dismiss("j").unwrap();
            assert!(jobs.query().is_empty() && jobs.dismiss("j").is_err());
            error
        });
        let seen = seen.borrow().clone();
        (seen, error)
    }

    #[test]
    fn a_job_passes_its_states_in_order() {
        use Status::*;
        assert_eq!(run(Ok(())).0, [Created, Running, Waiting, Pending, Concluded, Null]);
        let (states, error) = run(Err(Error::invalid("no")));
        assert_eq!(states, [Created, Running, Aborting, Concluded, Null]);
        assert_eq!(error.unwrap(), "no");
    }
}
