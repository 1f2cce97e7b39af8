//! What happens to a dialled connection, to be watched.

use std::time::Duration;

use tokio::sync::broadcast;

use crate::transport::{Address, PeerAddress};

/// Events that wait for a watcher who is slow; then the oldest are missed.
pub(crate) const KEPT: usize = 64;

/// Something that happened to a dialled connection.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Event {
    /// There is a socket, and messages go: with [`Delivery::Acked`](crate::Delivery::Acked), the peer has granted the stream.
    Connected {
        /// To whom.
        peer: PeerAddress,
    },
    /// The socket is lost. What was not settled is sent again on the next.
    Lost {
        /// What happened, for people.
        why: String,
    },
    /// The peer refused the acknowledged stream.
    Refused {
        /// Its reason, for people.
        why: String,
    },
    /// The acknowledged stream goes on at another endpoint than where it was granted before.
    ///
    /// With messages in flight it does so only if it [could not stay](crate::ConnectionBuilder::endpoint_patience); then
    /// [`ReceiverStateLost`](Event::ReceiverStateLost) follows, with their numbers.
    Moved {
        /// Where it was.
        from: Address,
        /// Where it is now.
        to: Address,
        /// How many messages were in flight there, and may be handled at both; 0 also if both are the same receiver.
        in_flight: u64,
    },
    /// The receiver does not know the acknowledged stream (any more), as one that was restarted, or is another than before:
    /// these messages may be handled twice.
    ReceiverStateLost {
        /// The number of the first message that was not acknowledged; one more than `to` if all were.
        from: u64,
        /// The number of the last message that was ever begun to be written.
        to: u64,
    },
    /// The receiver is about to leave. What is in flight is finished there; the rest goes to whoever answers next.
    Draining,
    /// Messages are in flight, and none was settled or has failed for [so long](crate::ConnectionBuilder::stall_after).
    Stalled {
        /// How many are in flight.
        in_flight: u64,
        /// Since when none was settled.
        stalled: Duration,
    },
    /// The connection was closed or has given up. This is the last event.
    Closed {
        /// Why, for people.
        why: &'static str,
    },
    /// So many events were missed here, because this watcher was slow.
    Missed(u64),
}

/// The events of a connection from now on. Made by [`Connection::events`](crate::Connection::events).
#[derive(Debug)]
pub struct Events {
    receiver: broadcast::Receiver<Event>,
    is_over: bool,
}

impl Events {
    /// `is_over` if nothing happens any more.
    pub(crate) fn new(receiver: broadcast::Receiver<Event>, is_over: bool) -> Events {
        let is_over = is_over && receiver.is_empty();
        Events { receiver, is_over }
    }

    /// Waits for the next event; `None` after [`Event::Closed`].
    ///
    /// # Cancel safety
    ///
    /// Cancel safe: no event is lost.
    pub async fn next(&mut self) -> Option<Event> {
        if self.is_over {
            return None;
        }
        match self.receiver.recv().await {
            Ok(event) => {
                self.is_over = matches!(event, Event::Closed { .. });
                Some(event)
            }
            Err(broadcast::error::RecvError::Lagged(missed)) => Some(Event::Missed(missed)),
            Err(broadcast::error::RecvError::Closed) => None,
        }
    }
}
