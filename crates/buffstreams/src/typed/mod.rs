//! Protobuf messages instead of bytes: sent without a buffer in between, and decoded before a handler sees them.
//!
//! Two kinds, with the same few names:
//!
//! | | `typed::prost` (feature `prost`) | `typed::buffa` (feature `buffa`) |
//! |---|---|---|
//! | a handler gets | an owned message | a view: its strings and bytes lie where they were received |
//! | to send | `send_prost`, `try_send_prost` | `send_buffa`, `try_send_buffa`; `_view` for views |
//! | to receive | `handler`, `per_connection` | `handler`, `per_connection` |
//! | to decode in a handler of one's own | `decode` | `decode` |
//!
//! The methods to send are those of [`Sender`](crate::Sender), and so of a [`Connection`](crate::Connection) and a
//! [`Peer`](crate::Peer)'s sender, and of their counterparts in [`blocking`](crate::blocking). What is on the wire is
//! the message and nothing else, so the two kinds understand each other, and both sides must know which type is sent.

use std::any::type_name;
use std::error::Error;
use std::fmt;

#[cfg(feature = "buffa")]
pub mod buffa;
#[cfg(feature = "prost")]
pub mod prost;

/// A message that is not of the type that was expected.
///
/// In the handlers of this module it counts as an error of the handler: the connection goes on or ends, by policy.
#[derive(Debug)]
pub struct DecodeError {
    type_name: &'static str,
    length: usize,
    source: Box<dyn Error + Send + Sync>,
}

impl DecodeError {
    fn new<M>(length: usize, source: impl Error + Send + Sync + 'static) -> DecodeError {
        DecodeError { type_name: type_name::<M>(), length, source: Box::new(source) }
    }

    /// The type that was expected, as Rust calls it.
    pub fn type_name(&self) -> &'static str {
        self.type_name
    }
}

impl fmt::Display for DecodeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a message of {} bytes is not a {}: {}", self.length, self.type_name, self.source)
    }
}

impl Error for DecodeError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        Some(&*self.source)
    }
}
