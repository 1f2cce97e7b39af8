//! Acknowledged streams, without their sockets: what both ends of a session say, and what follows from what they hear.
//!
//! ```text
//! the side that dials                                             the side that listens
//!
//! Outbox ── flight.rs: keeps what is not acknowledged             Streams: what is known of every stream, under one lock
//! Sending: one stream over all of its connections      ◀──▶       Receiving: one connection; holds what cannot be handled yet
//!                                                                 Turn: the right to hand messages to the handler
//! ```
//!
//! Each end is driven from outside: bytes received become [`wire::Control`]s and messages by an Inbox; what is to be
//! written comes from `controls` and the Outbox, in this order; time is an argument. Nothing in here waits, queues output
//! or starts anything: what is to be said lies in slots, and is put into bytes when the writer asks.
//!
//! Invariants, asserted by the simulation after each step (`simulation_tests.rs`): acknowledged means that every message
//! up to there was handled, rejected or given up by its sender; a stream has at most one live handler; while a receiver
//! remembers a stream, none of its messages is handled twice, and none before an earlier one.
//!
//! It refuses to promise more: a receiver that forgot a stream is reported, and what was in flight then may be handled
//! twice.

pub(crate) mod held;
pub(crate) mod ledger;
pub(crate) mod liveness;
pub(crate) mod receiving;
pub(crate) mod sending;
pub(crate) mod streams;
pub(crate) mod wire;

use std::fmt;

use super::flight::Untrue;
use wire::{Refuse, RefuseCode, WireError};

/// How many rejects a receiver may have sent that were not confirmed.
pub(crate) const MOST_REJECTS: usize = 1024;

/// What a peer did that no peer may do. It ends the connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum SessionError {
    /// Bytes that are no control frame.
    Wire(WireError),
    /// A frame that has no place there.
    OutOfPlace { frame: &'static str, when: &'static str },
    /// The receiver says what cannot be.
    Untrue(Untrue),
    /// More was sent than the window allows.
    WindowExceeded { held: usize, window: usize },
    /// The window that was granted is too small for the largest message.
    WindowTooSmall { window: u64, least: u64 },
    /// More rejects came than may be unconfirmed.
    TooManyRejects,
    /// A reject was confirmed that was never sent.
    NeverRejected { number: u64, last: u64 },
    /// Numbers were left out that are not ahead.
    SkipsBack { number: u64, next: u64 },
    /// There is no number left.
    NumbersExhausted,
}

impl SessionError {
    /// What to tell the peer, before the connection is closed.
    pub(crate) fn refuse(&self) -> Refuse {
        Refuse { code: RefuseCode::PROTOCOL, detail: 0, text: wire::shortened(&self.to_string()).to_owned() }
    }
}

impl fmt::Display for SessionError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            SessionError::Wire(error) => error.fmt(f),
            SessionError::OutOfPlace { frame, when } => write!(f, "{frame} has no place {when}"),
            SessionError::Untrue(untrue) => untrue.fmt(f),
            SessionError::WindowExceeded { held, window } => {
                write!(f, "{held} bytes were sent ahead, and the window is {window}")
            }
            SessionError::WindowTooSmall { window, least } => {
                write!(f, "a window of {window} bytes was granted, and the largest message takes {least}")
            }
            SessionError::TooManyRejects => write!(f, "more than {MOST_REJECTS} rejects came before one was confirmed"),
            SessionError::NeverRejected { number, last } => {
                write!(f, "the reject of message {number} was confirmed, and the last one handled is {last}")
            }
            SessionError::SkipsBack { number, next } => {
                write!(f, "the next message was given number {number}, and should have had {next} or a higher one")
            }
            SessionError::NumbersExhausted => write!(f, "there are no numbers left for messages, or for connections"),
        }
    }
}

impl std::error::Error for SessionError {}

impl From<WireError> for SessionError {
    fn from(error: WireError) -> SessionError {
        SessionError::Wire(error)
    }
}

impl From<Untrue> for SessionError {
    fn from(untrue: Untrue) -> SessionError {
        SessionError::Untrue(untrue)
    }
}

#[cfg(test)]
mod rules_tests;
#[cfg(test)]
mod simulation_tests;
