//! Exports: the NBD server. Exports know graph backends only.
