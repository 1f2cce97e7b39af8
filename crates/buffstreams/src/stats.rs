//! Counters: what became of a connection's messages, and what a server has seen.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use crate::proto::outbox::{FailedFor, FailedReason, Tally};

/// What became of the messages of one connection, and of its sockets, read at one moment under one lock.
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
    /// Bytes that sockets took: frames, and what acknowledged streams say beside; before TLS. What was sent again counts
    /// again.
    pub written_bytes: u64,
    /// Sockets that were of use: messages could go. This and the following are of dialled connections.
    pub connected: u64,
    /// Sockets that were lost.
    pub lost: u64,
    /// Attempts to connect anew that failed.
    pub failed_attempts: u64,
    /// How often the peer refused the acknowledged stream.
    pub refused: u64,
    /// How often an acknowledged stream went on where it was, after a socket was lost.
    pub resumed: u64,
    /// How often an acknowledged stream went on at another [endpoint](crate::Endpoints), as [told](crate::Event::Moved).
    pub moved: u64,
    failed_for: FailedFor,
}

impl Stats {
    /// Whether the conservation law holds. It always does; tests say so too.
    pub fn is_conserved(&self) -> bool {
        self.recovered + self.accepted == self.settled + self.failed + self.in_flight
    }

    /// How many of the messages that [failed](Stats::failed) did so for this reason.
    pub fn failed_for(&self, reason: FailedReason) -> u64 {
        self.failed_for[reason as usize]
    }
}

impl Stats {
    pub(crate) fn new(tally: Tally, stalled: Duration, written_bytes: u64, sockets: Sockets) -> Stats {
        let Tally { recovered, accepted, settled, failed, failed_for, in_flight, in_flight_bytes } = tally;
        let Sockets { connected, lost, failed_attempts, refused, resumed, moved } = sockets;
        Stats {
            recovered,
            accepted,
            settled,
            failed,
            in_flight,
            in_flight_bytes,
            stalled,
            written_bytes,
            connected,
            lost,
            failed_attempts,
            refused,
            resumed,
            moved,
            failed_for,
        }
    }

    /// Adds the account of another connection; stalled is the one that is so for longer.
    pub(crate) fn add(&mut self, other: &Stats) {
        self.recovered += other.recovered;
        self.accepted += other.accepted;
        self.settled += other.settled;
        self.failed += other.failed;
        self.in_flight += other.in_flight;
        self.in_flight_bytes += other.in_flight_bytes;
        self.stalled = self.stalled.max(other.stalled);
        self.written_bytes += other.written_bytes;
        self.connected += other.connected;
        self.lost += other.lost;
        self.failed_attempts += other.failed_attempts;
        self.refused += other.refused;
        self.resumed += other.resumed;
        self.moved += other.moved;
        for (sum, count) in self.failed_for.iter_mut().zip(other.failed_for) {
            *sum += count;
        }
    }
}

/// What became of the sockets of a dialled connection.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Sockets {
    pub(crate) connected: u64,
    pub(crate) lost: u64,
    pub(crate) failed_attempts: u64,
    pub(crate) refused: u64,
    pub(crate) resumed: u64,
    pub(crate) moved: u64,
}

/// Counters that are kept live, and read into a snapshot of the same names.
macro_rules! counters {
    (
        $(#[$about:meta])* pub struct $Snapshot:ident; live: $Live:ident;
        $($(#[$what:meta])* $name:ident,)*
    ) => {
        $(#[$about])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        #[non_exhaustive]
        pub struct $Snapshot {
            $($(#[$what])* pub $name: u64,)*
            /// Replies accepted on connections that have ended, and what became of them.
            pub replies: Stats,
        }

        #[cfg(feature = "metrics")]
        impl $Snapshot {
            /// Adds what another has seen.
            pub(crate) fn add(&mut self, other: &Self) {
                $(self.$name += other.$name;)*
                self.replies.add(&other.replies);
            }

            /// The parts of a total by their reasons: the counters that begin with its name.
            pub(crate) fn parts(&self, total: &str, each: &mut dyn FnMut(&'static str, u64)) {
                let counters = [$((stringify!($name), self.$name),)*];
                for (name, count) in counters {
                    let part = name.strip_prefix(total).and_then(|part| part.strip_prefix('_'));
                    part.into_iter().for_each(|reason| each(reason, count));
                }
            }
        }

        /// The live counters behind the snapshot.
        #[derive(Debug, Default)]
        pub(crate) struct $Live {
            $(pub(crate) $name: AtomicU64,)*
            pub(crate) replies: Mutex<Stats>,
        }

        impl $Live {
            pub(crate) fn read(&self) -> $Snapshot {
                $Snapshot {
                    $($name: self.$name.load(Ordering::Relaxed),)*
                    replies: self.replies(),
                }
            }
        }
    };
}

counters! {
    /// What the receiving side has seen: of all connections of a server, or of all sockets of a dialled connection.
    ///
    /// A connection that is not wanted is *refused* before anything is read from it, or it is opened and then *broken* off:
    /// `refused` and `broken` are the totals, and each counter with that word at its start is a part of one of them. For a
    /// dialled connection all of these are 0.
    pub struct ReceivedStats;
    live: Received;

    /// Messages given to handlers.
    messages,
    /// Bytes of those messages, without prefixes.
    bytes,
    /// Errors that handlers returned.
    handler_errors,
    /// Connections that are open now.
    open,
    /// Connections that were opened.
    connected,
    /// Connections that were refused, for any of the five reasons that follow.
    refused,
    /// Because as many were open as [may be](crate::ListenerBuilder::max_connections).
    refused_too_many,
    /// Because as many were open from that address as [may be](crate::ListenerBuilder::max_connections_per_address).
    refused_from_address,
    /// Because their address is not [allowed](crate::ListenerBuilder::allow).
    refused_not_allowed,
    /// Because too many TLS handshakes were under way.
    refused_handshakes,
    /// Because the listener was shutting down: they waited to be accepted when that began.
    refused_stopping,
    /// Connections that ended otherwise than by the peer's end of stream or by this side closing, for any of the reasons that
    /// follow, or with replies that failed.
    broken,
    /// Their TLS handshake failed, or its place went to somebody whose address had fewer under way.
    broken_handshake,
    /// A handshake, of TLS or of a session, was not over [in time](crate::ListenerBuilder::handshake_deadline).
    broken_handshake_deadline,
    /// A frame was not whole [in time](crate::ListenerBuilder::frame_deadline).
    broken_frame_deadline,
    /// Nothing came [for too long](crate::ListenerBuilder::idle_deadline).
    broken_idle,
    /// What came were no frames, or the stream ended inside one.
    broken_malformed,
    /// The [memory](crate::ListenerBuilder::receive_memory) for unfinished messages, or [that](crate::ListenerBuilder::session_memory)
    /// for messages of acknowledged streams that wait for their handlers, was used up.
    broken_overloaded,
    /// They asked for an acknowledged stream, and it was not granted.
    broken_session_refused,
    /// They broke a rule of acknowledged streams.
    broken_violation,
    /// The peer gave no sign of life in an acknowledged stream.
    broken_silent,
    /// A newer connection of their acknowledged stream took over.
    broken_fenced,
    /// Their handler failed or panicked, or a message must be sent again.
    broken_handler,
    /// They were cut at the deadline of a shutdown.
    broken_cut,
    /// All was well, but replies to them failed.
    broken_unsent,
    /// The operating system reported an error, as when the peer was killed.
    broken_io,
    /// How often reading, or in acknowledged streams the handler, was made to wait by
    /// `max_message_rate`.
    throttled,
    /// Acknowledged streams that were forgotten because more than 65,536 had no connection, or their rejects had too long
    /// texts, though messages of theirs had been handled: if their senders come back, those in flight may be handled twice.
    streams_forgotten,
}

impl Received {
    /// Counts the messages of one read.
    pub(crate) fn count(&self, messages: u64, bytes: u64) {
        self.messages.fetch_add(messages, Ordering::Relaxed);
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Adds the final account of one connection's replies.
    pub(crate) fn add_replies(&self, stats: &Stats) {
        self.replies.lock().unwrap_or_else(PoisonError::into_inner).add(stats);
    }

    /// The sum of those accounts.
    pub(crate) fn replies(&self) -> Stats {
        *self.replies.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Counts one, for a total and for its reason.
pub(crate) fn count_both(total: &AtomicU64, reason: &AtomicU64) {
    total.fetch_add(1, Ordering::Relaxed);
    reason.fetch_add(1, Ordering::Relaxed);
}
