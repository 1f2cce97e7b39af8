//! Counters: what became of a connection's messages, and what a server has seen.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::proto::outbox::Tally;

/// What became of the messages of one connection, read at one moment under one lock.
///
/// Always `recovered + accepted = settled + failed + in_flight`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Stats {
    /// Messages taken over from a spool at start; 0 without one.
    pub recovered: u64,
    /// Messages that the library took charge of.
    pub accepted: u64,
    /// Messages that reached the promised level: for `Sent`, the kernel took the whole frame; for `Acked`, the
    /// receiver said that its handler has returned `Ok`. Replies in an acknowledged stream: the other side has taken them.
    pub settled: u64,
    /// Messages that were given up and went to where failed messages go.
    pub failed: u64,
    /// Messages that are neither settled nor failed.
    pub in_flight: u64,
    /// Bytes of the frames in flight: those messages with their prefixes. Without those that wait in a spool.
    pub in_flight_bytes: usize,
    /// How long nothing was settled or has failed, though messages were in flight; zero while none are. A stream whose
    /// receiver takes messages and finishes none shows here.
    pub stalled: Duration,
}

impl Stats {
    /// Whether the conservation law holds. It always does; tests say so too.
    pub fn is_conserved(&self) -> bool {
        self.recovered + self.accepted == self.settled + self.failed + self.in_flight
    }
}

impl Stats {
    pub(crate) fn new(tally: Tally, stalled: Duration) -> Stats {
        let Tally { recovered, accepted, settled, failed, in_flight, in_flight_bytes } = tally;
        Stats { recovered, accepted, settled, failed, in_flight, in_flight_bytes, stalled }
    }
}

/// What the receiving side has seen: of all connections of a server, or of all sockets of a dialled connection.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct ReceivedStats {
    /// Messages given to handlers.
    pub messages: u64,
    /// Bytes of those messages, without prefixes.
    pub bytes: u64,
    /// Errors that handlers returned.
    pub handler_errors: u64,
    /// Connections that are open now.
    pub open: u64,
    /// Connections that were opened.
    pub connected: u64,
    /// Connections that were refused because there were too many.
    pub refused: u64,
    /// Connections that ended otherwise than by the peer's end of stream or by this side closing, or with replies that
    /// failed.
    pub broken: u64,
    /// Those of them whose TLS handshake failed, or was not over in time.
    pub handshakes_failed: u64,
    /// Replies accepted on connections that have ended, and what became of them.
    pub replies: Stats,
}

/// The live counters behind [`ReceivedStats`].
#[derive(Debug, Default)]
pub(crate) struct Received {
    pub(crate) messages: AtomicU64,
    pub(crate) bytes: AtomicU64,
    pub(crate) handler_errors: AtomicU64,
    pub(crate) open: AtomicU64,
    pub(crate) connected: AtomicU64,
    pub(crate) refused: AtomicU64,
    pub(crate) broken: AtomicU64,
    pub(crate) handshakes_failed: AtomicU64,
    pub(crate) replies: std::sync::Mutex<Stats>,
}

impl Received {
    /// Counts the messages of one read.
    pub(crate) fn count(&self, messages: u64, bytes: u64) {
        self.messages.fetch_add(messages, Ordering::Relaxed);
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Adds the final account of one connection's replies.
    pub(crate) fn add_replies(&self, stats: Stats) {
        if stats.accepted == 0 {
            return;
        }
        let mut sum = self.replies.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        sum.accepted += stats.accepted;
        sum.settled += stats.settled;
        sum.failed += stats.failed;
        sum.in_flight += stats.in_flight;
    }

    pub(crate) fn read(&self) -> ReceivedStats {
        ReceivedStats {
            messages: self.messages.load(Ordering::Relaxed),
            bytes: self.bytes.load(Ordering::Relaxed),
            handler_errors: self.handler_errors.load(Ordering::Relaxed),
            open: self.open.load(Ordering::Relaxed),
            connected: self.connected.load(Ordering::Relaxed),
            refused: self.refused.load(Ordering::Relaxed),
            broken: self.broken.load(Ordering::Relaxed),
            handshakes_failed: self.handshakes_failed.load(Ordering::Relaxed),
            replies: *self.replies.lock().unwrap_or_else(std::sync::PoisonError::into_inner),
        }
    }
}
