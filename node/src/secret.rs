//! Passphrases and keys by name, as drivers reach them: the text itself never appears in options,
//! queries or messages.
//!
//! Whoever makes secrets (the binary, from its objects) puts them here; a driver asks for one by
//! the id that its option names, when it opens.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use gipfel_base::{Error, ErrorKind, Result};
use zeroize::Zeroizing;

/// A passphrase or key. Its memory is zeroed when the last holder lets go of it.
pub struct Secret(Zeroizing<Vec<u8>>);

impl Secret {
    /// A secret of these bytes, whose memory it takes over.
    pub fn new(bytes: Zeroizing<Vec<u8>>) -> Secret {
        Secret(bytes)
    }

    /// The bytes. Whoever copies them sees to it that the copy is zeroed too.
    pub fn bytes(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret")
    }
}

/// The secrets of a process, by id.
#[derive(Debug, Default)]
pub struct Secrets {
    list: Mutex<BTreeMap<String, Arc<Secret>>>,
}

impl Secrets {
    fn list(&self) -> MutexGuard<'_, BTreeMap<String, Arc<Secret>>> {
        self.list.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes `secret` known as `id`, in place of what was known by it before.
    pub fn insert(&self, id: &str, secret: Secret) {
        self.list().insert(id.to_owned(), Arc::new(secret));
    }

    /// Forgets the secret `id`. Nodes that were opened with it stay open.
    pub fn remove(&self, id: &str) {
        self.list().remove(id);
    }

    /// The secret called `id`.
    pub fn get(&self, id: &str) -> Result<Arc<Secret>> {
        self.list().get(id).cloned().ok_or_else(|| {
            let text = format!(
                "there is no secret '{id}': make it with object-add or --object (qom-type secret)"
            );
            Error::new(ErrorKind::NotFound, text)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_secret_is_found_by_its_id_and_not_printed() {
        let secrets = Secrets::default();
        secrets.insert("a", Secret::new(b"hunter2".to_vec().into()));
        assert_eq!(secrets.get("a").unwrap().bytes(), b"hunter2");
        assert!(!format!("{secrets:?}").contains("hunter2"));
        secrets.remove("a");
        let e = secrets.get("a").unwrap_err();
        assert!(e.kind() == ErrorKind::NotFound && e.to_string().contains("'a'"), "{e}");
    }
}
