//! A folder of one test's own that goes when the test ends.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

/// The folder. Kept where the test panics and `GIPFEL_KEEP` is set.
#[derive(Debug)]
pub struct Scratch {
    dir: PathBuf,
}

impl Scratch {
    /// A new folder under `GIPFEL_SCRATCH` or the system's folder for temporary files. `name` is
    /// for people; it stays short because paths of sockets end at 107 bytes.
    pub fn new(name: &str) -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let root =
            std::env::var_os("GIPFEL_SCRATCH").map_or_else(std::env::temp_dir, PathBuf::from);
        loop {
            let n = NEXT.fetch_add(1, Ordering::Relaxed);
            let dir = root.join(format!("gipfel-{name}-{}-{n}", std::process::id()));
            match std::fs::create_dir(&dir) {
                Ok(()) => return Self { dir },
                Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => {}
                Err(e) => panic!("scratch folder {}: {e}", dir.display()),
            }
        }
    }

    /// The folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The path of `name` in the folder.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// The path of `name` in the folder, as text for command lines.
    pub fn arg(&self, name: &str) -> String {
        self.path(name).to_str().expect("scratch paths are UTF-8").to_owned()
    }

    /// Writes a file in the folder and returns its path as text.
    pub fn file(&self, name: &str, data: &[u8]) -> String {
        let path = self.arg(name);
        std::fs::write(&path, data).unwrap_or_else(|e| panic!("{path}: {e}"));
        path
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if std::thread::panicking() && std::env::var_os("GIPFEL_KEEP").is_some() {
            eprintln!("scratch folder kept: {}", self.dir.display());
            return;
        }
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}
