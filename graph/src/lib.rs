//! The block graph: backends, permissions, drained sections, transactions, mutators.
