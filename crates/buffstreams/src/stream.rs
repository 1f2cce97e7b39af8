//! Received messages as a `Stream`: a service that hands them, batch by batch, to whoever pulls.

use std::fmt;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use futures_core::Stream;
use tokio::sync::mpsc;
use tokio_util::sync::PollSender;

use crate::handler::{Handler, HandlerError, HandlerResult, Peer, Service};
use crate::proto::inbox::Message;

/// Batches that may wait to be pulled, over all connections.
const BATCHES: usize = 4;

/// A service and the stream of what it receives: for a listener, or for what comes back on a dialled connection.
///
/// While nobody pulls, reading waits, and the peers feel it. At most four batches wait, and one more on every
/// connection; a batch is what one read brought (up to 256 KiB, or one large message).
///
/// ```
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use buffstreams::{Connection, Listener, messages};
///
/// let (service, mut received) = messages();
/// let server = Listener::bind("127.0.0.1:0").await?.spawn(service);
/// let connection = Connection::dial(server.local_address()).await?;
/// connection.send(b"hello").await?;
/// let (message, _peer) = received.recv().await.expect("the server is still there");
/// assert_eq!(message, "hello");
/// # Ok(()) }
/// ```
pub fn messages() -> (MessagesService, Messages) {
    let (batches, receiver) = mpsc::channel(BATCHES);
    (MessagesService { batches }, Messages { batches: receiver, at_hand: None, last: None })
}

/// What one read of one connection brought.
struct Batch {
    peer: Peer,
    /// With their numbers in an acknowledged stream; 0 on other connections.
    messages: std::vec::IntoIter<(u64, Bytes)>,
    finished: Arc<Finished>,
}

/// Messages of an acknowledged stream whose owner has asked for the next one.
#[derive(Debug, Default)]
struct Finished(Mutex<Vec<u64>>);

impl Finished {
    fn numbers(&self) -> MutexGuard<'_, Vec<u64>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// See [`messages`].
#[derive(Clone)]
pub struct MessagesService {
    batches: mpsc::Sender<Batch>,
}

impl fmt::Debug for MessagesService {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("MessagesService")
    }
}

impl Service for MessagesService {
    type Handler = MessagesHandler;

    fn connected(self: Arc<Self>, peer: &Peer) -> MessagesHandler {
        MessagesHandler {
            peer: peer.clone(),
            batches: PollSender::new(self.batches.clone()),
            batch: Vec::new(),
            finished: Arc::default(),
        }
    }
}

/// The handler of a [`MessagesService`].
pub struct MessagesHandler {
    peer: Peer,
    batches: PollSender<Batch>,
    batch: Vec<(u64, Bytes)>,
    finished: Arc<Finished>,
}

impl fmt::Debug for MessagesHandler {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MessagesHandler").field("peer", &self.peer).finish_non_exhaustive()
    }
}

impl Handler for MessagesHandler {
    fn message(&mut self, message: Message<'_>) -> HandlerResult {
        self.batch.push((message.number().unwrap_or(0), message.to_bytes()));
        Ok(())
    }

    fn defers(&self) -> bool {
        true
    }

    fn take_outcomes(&mut self, each: &mut dyn FnMut(u64, HandlerResult)) {
        self.finished.numbers().drain(..).for_each(|number| each(number, Ok(())));
    }

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<HandlerResult> {
        if self.batch.is_empty() {
            return Poll::Ready(Ok(()));
        }
        let place = ready!(self.batches.poll_reserve(cx));
        let messages = std::mem::take(&mut self.batch).into_iter();
        let handed = place.and_then(|()| {
            self.batches.send_item(Batch { peer: self.peer.clone(), messages, finished: Arc::clone(&self.finished) })
        });
        Poll::Ready(handed.map_err(|_| HandlerError::new("nobody takes the messages: their stream was dropped")))
    }
}

/// The messages that a [`MessagesService`] received, to be pulled with [`recv`](Messages::recv) or as a `Stream`.
///
/// The messages of one connection come in order. One of an acknowledged stream counts as handled when the next one is asked
/// for. The stream ends when the listener or connection that has the service
/// has ended.
pub struct Messages {
    batches: mpsc::Receiver<Batch>,
    at_hand: Option<Batch>,
    /// The number of the message that was pulled last, if it is of an acknowledged stream.
    last: Option<u64>,
}

impl fmt::Debug for Messages {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Messages")
    }
}

impl Messages {
    /// The next message, and who sent it; `None` when no more will come.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe: no message is lost.
    pub async fn recv(&mut self) -> Option<(Bytes, Peer)> {
        std::future::poll_fn(|cx| self.poll_recv(cx)).await
    }

    fn poll_recv(&mut self, cx: &mut Context<'_>) -> Poll<Option<(Bytes, Peer)>> {
        loop {
            if let Some(batch) = &mut self.at_hand {
                // Whoever asks for the next message is done with the one before.
                if let Some(number) = self.last.take() {
                    batch.finished.numbers().push(number);
                    if batch.messages.len() == 0 {
                        batch.peer.sender().shared().wake();
                    }
                }
                if let Some((number, message)) = batch.messages.next() {
                    self.last = (number != 0).then_some(number);
                    return Poll::Ready(Some((message, batch.peer.clone())));
                }
                self.at_hand = None;
            }
            match ready!(self.batches.poll_recv(cx)) {
                Some(batch) => self.at_hand = Some(batch),
                None => return Poll::Ready(None),
            }
        }
    }
}

impl Stream for Messages {
    type Item = (Bytes, Peer);

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.get_mut().poll_recv(cx)
    }
}
