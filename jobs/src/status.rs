//! Where a job stands, and where it may go from there (QMP reference, JobStatus).

/// Where a job stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// Not made yet.
    Undefined,
    /// Made, not started.
    Created,
    /// At work.
    Running,
    /// Done, waiting for others of its transaction.
    Waiting,
    /// Done, waiting to be finalized.
    Pending,
    /// Undoing its work.
    Aborting,
    /// Over, waiting to be dismissed.
    Concluded,
    /// Gone.
    Null,
}

impl Status {
    /// Its name in QMP.
    pub fn name(self) -> &'static str {
        match self {
            Status::Undefined => "undefined",
            Status::Created => "created",
            Status::Running => "running",
            Status::Waiting => "waiting",
            Status::Pending => "pending",
            Status::Aborting => "aborting",
            Status::Concluded => "concluded",
            Status::Null => "null",
        }
    }

    /// Whether a job may go from here to `to`.
    pub fn may_become(self, to: Status) -> bool {
        use Status::*;
        matches!(
            (self, to),
            (Undefined, Created)
                | (Created, Running | Aborting | Null)
                | (Running, Waiting | Aborting)
                | (Waiting, Pending | Aborting)
                | (Pending, Concluded | Aborting)
                | (Aborting, Concluded)
                | (Concluded, Null)
        )
    }
}
