//! The pure core: bytes in, messages out, and back again.
//!
//! Nothing in here knows a socket, a clock or a runtime. Time, where it matters, is an argument; received bytes are a
//! slice; what is to be written is a list of buffers. So everything in here can be tested at every split of its input.

mod buffers;
#[cfg(any(test, fuzzing))]
pub(crate) mod checks;
mod chunk;
#[cfg(feature = "dissect")]
pub(crate) mod dissect;
mod flight;
pub(crate) mod framing;
pub(crate) mod inbox;
pub(crate) mod outbox;
#[cfg(feature = "spool")]
pub(crate) mod record;
pub(crate) mod session;
mod spooled;
