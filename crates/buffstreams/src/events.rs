//! What happens to a dialled connection, or to a server's, to be watched. Nothing is done for those whom nobody watches.

use std::sync::OnceLock;
use std::time::Duration;

use tokio::sync::broadcast;

use crate::proto::outbox::FailedReason;
use crate::transport::{Address, PeerAddress};

/// Events that wait for a watcher who is slow; then the oldest are missed.
const KEPT: usize = 64;

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
    /// The acknowledged stream goes on where it was, on another socket. Told before [`Connected`](Event::Connected).
    Resumed {
        /// Messages that the receiver had finished, and had not said so before. Of the others, those that it has not
        /// received are sent again.
        acknowledged: u64,
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
    /// Messages were given up. Told at most ten times a second, with what has come together by then.
    Failed {
        /// Why.
        reason: FailedReason,
        /// How many, since this was told last for the same reason.
        count: u64,
    },
    /// The connection was closed or has given up. This is the last event.
    Closed {
        /// Why, for people.
        why: &'static str,
    },
    /// So many events were missed here, because this watcher was slow.
    Missed(u64),
}

/// Something that happened to a connection of a [`Server`](crate::Server).
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ServerEvent {
    /// A connection was accepted; over TLS, its handshake is still to come.
    Opened {
        /// Who dialled.
        peer: PeerAddress,
        /// Its [`Peer::id`](crate::Peer::id).
        id: u64,
    },
    /// A connection has ended, and its last reply is accounted for.
    Ended {
        /// Who had dialled.
        peer: PeerAddress,
        /// Its [`Peer::id`](crate::Peer::id).
        id: u64,
        /// What happened, for people.
        why: String,
        /// Whether it counts as [broken](crate::ReceivedStats::broken).
        is_broken: bool,
    },
    /// A connection was not let in.
    Refused {
        /// Who dialled.
        peer: PeerAddress,
        /// Why, for people.
        why: String,
    },
    /// The server has shut down. This is the last event.
    Closed,
    /// So many events were missed here, because this watcher was slow.
    Missed(u64),
}

/// The events of a connection from now on. Made by [`Connection::events`](crate::Connection::events).
#[derive(Debug)]
pub struct Events(Watcher<Event>);

impl Events {
    pub(crate) fn new(watcher: Watcher<Event>) -> Events {
        Events(watcher)
    }

    /// Waits for the next event; `None` after [`Event::Closed`].
    ///
    /// # Cancel safety
    ///
    /// Cancel safe: no event is lost.
    pub async fn next(&mut self) -> Option<Event> {
        self.0.next(|event| matches!(event, Event::Closed { .. }), Event::Missed).await
    }
}

/// The events of a server from now on. Made by [`Server::events`](crate::Server::events).
#[derive(Debug)]
pub struct ServerEvents(Watcher<ServerEvent>);

impl ServerEvents {
    pub(crate) fn new(watcher: Watcher<ServerEvent>) -> ServerEvents {
        ServerEvents(watcher)
    }

    /// Waits for the next event; `None` after [`ServerEvent::Closed`].
    ///
    /// # Cancel safety
    ///
    /// Cancel safe: no event is lost.
    pub async fn next(&mut self) -> Option<ServerEvent> {
        self.0.next(|event| matches!(event, ServerEvent::Closed), ServerEvent::Missed).await
    }
}

/// What may be watched, and may have no watcher.
#[derive(Debug)]
pub(crate) struct Watched<E>(OnceLock<broadcast::Sender<E>>);

impl<E> Default for Watched<E> {
    fn default() -> Self {
        Watched(OnceLock::new())
    }
}

impl<E: Clone> Watched<E> {
    /// What happens from now on; nothing more if it `is_over`.
    pub(crate) fn watch(&self, is_over: impl FnOnce() -> bool) -> Watcher<E> {
        let receiver = self.0.get_or_init(|| broadcast::Sender::new(KEPT)).subscribe();
        let is_over = is_over() && receiver.is_empty();
        Watcher { receiver, is_over }
    }

    /// Tells those who watch; asks what there is to tell only if there is somebody.
    pub(crate) fn tell(&self, event: impl FnOnce() -> E) {
        if let Some(watchers) = self.0.get().filter(|watchers| watchers.receiver_count() > 0) {
            // The last one may have gone meanwhile.
            let _ = watchers.send(event());
        }
    }
}

/// One who watches.
#[derive(Debug)]
pub(crate) struct Watcher<E> {
    receiver: broadcast::Receiver<E>,
    is_over: bool,
}

impl<E: Clone> Watcher<E> {
    async fn next(&mut self, is_last: impl FnOnce(&E) -> bool, missed: impl FnOnce(u64) -> E) -> Option<E> {
        if self.is_over {
            return None;
        }
        match self.receiver.recv().await {
            Ok(event) => {
                self.is_over = is_last(&event);
                Some(event)
            }
            Err(broadcast::error::RecvError::Lagged(count)) => Some(missed(count)),
            Err(broadcast::error::RecvError::Closed) => None,
        }
    }
}
