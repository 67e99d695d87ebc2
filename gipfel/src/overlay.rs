//! Temporary overlays: what is written to a disk goes to a file that is gone with the process.

use std::path::Path;
use std::rc::Rc;
use std::sync::atomic::{AtomicU32, Ordering};

use gipfel_base::{Error, Result};
use gipfel_graph::{Graph, SnapshotSync};

/// Puts an overlay over the medium of the backend called `disk`. Its file lies in `TMPDIR`, or in
/// /var/tmp, and has no name any more once it is open.
pub async fn add(graph: &Rc<Graph>, disk: &str) -> Result<()> {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let dir = std::env::var_os("TMPDIR").unwrap_or_else(|| "/var/tmp".into());
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    let file = format!("gipfel-{}-overlay{number}", std::process::id());
    let path = Path::new(&dir).join(file).to_string_lossy().into_owned();
    let snapshot = SnapshotSync {
        disk: disk.to_owned(),
        file: path.clone(),
        node_name: None,
        format: "qcow2".into(),
        existing: false,
    };
    graph.blockdev_snapshot_sync(&snapshot).await?;
    std::fs::remove_file(&path)
        .map_err(|e| Error::from(e).context(format!("the temporary overlay '{path}'")))
}
