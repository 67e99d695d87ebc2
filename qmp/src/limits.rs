//! Named limits of the control protocol: what one client can make the process hold.
//!
//! The reference daemon bounds the same three things (bytes, nesting, tokens); the figures here are
//! our own, chosen so that the worst message costs tens of megabytes while it is handled.

/// Longest message of a client, in bytes (after quotes are normalised).
pub const MAX_MESSAGE: usize = 16 << 20;
/// Deepest nesting of objects and arrays in one message or option text.
pub const MAX_DEPTH: usize = 1024;
/// Most tokens (brackets, commas, colons, scalars) in one message.
pub const MAX_TOKENS: usize = 1 << 20;
/// Longest `key=value,...` text of a command line option, in bytes.
pub const MAX_OPTION_TEXT: usize = 1 << 20;
/// Most elements that list indices in a `key=value,...` text can make.
pub const MAX_OPTION_LIST: usize = 65536;
