//! The node contract: drivers, edges, requests, mappings, permissions and the runner.
