//! Received messages as a `Stream`: a service that hands them, batch by batch, to whoever pulls.
//!
//! Invariant: of every message of an acknowledged stream it is said once what became of it, wherever it is when the stream is
//! dropped: pulled, waiting, or on its way.

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

/// What becomes of messages that nobody will pull.
const DROPPED: &str = "nobody takes the messages: their stream was dropped";

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
    (MessagesService { batches }, Messages { batches: receiver, at_hand: None })
}

/// What one read of one connection brought. Whoever drops it says that what is left of it was not handled.
struct Batch {
    peer: Peer,
    /// With their numbers in an acknowledged stream; 0 on other connections.
    messages: std::vec::IntoIter<(u64, Bytes)>,
    /// The number of the message that was pulled last, if it is of an acknowledged stream and the next was not asked for.
    last: Option<u64>,
    finished: Arc<Finished>,
}

impl Batch {
    fn is_acknowledged(&self) -> bool {
        self.messages.as_slice().first().is_some_and(|(number, _)| *number != 0)
    }

    /// The next message. Whoever asks for it is done with the one before.
    fn next(&mut self) -> Option<Bytes> {
        if let Some(number) = self.last.take() {
            self.finished.outcomes().push((number, true));
            if self.messages.len() == 0 {
                self.peer.sender().shared().wake();
            }
        }
        let (number, message) = self.messages.next()?;
        self.last = (number != 0).then_some(number);
        Some(message)
    }
}

impl Drop for Batch {
    fn drop(&mut self) {
        let waiting = self.messages.by_ref().map(|(number, _)| number).filter(|number| *number != 0);
        let left: Vec<_> = self.last.take().into_iter().chain(waiting).map(|number| (number, false)).collect();
        if !left.is_empty() {
            self.finished.outcomes().extend(left);
            self.peer.sender().shared().wake();
        }
    }
}

/// A batch on its way, which is theirs who take it first: what is put into a channel while its receiver is dropped may stay in
/// there for ever.
type Parcel = Arc<Mutex<Option<Batch>>>;

fn take(parcel: &Parcel) -> Option<Batch> {
    parcel.lock().unwrap_or_else(PoisonError::into_inner).take()
}

/// Messages of an acknowledged stream whose owner has asked for the next one, or will not.
#[derive(Debug, Default)]
struct Finished(Mutex<Vec<(u64, bool)>>);

impl Finished {
    fn outcomes(&self) -> MutexGuard<'_, Vec<(u64, bool)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// See [`messages`].
#[derive(Clone)]
#[must_use = "a service does nothing until a listener or a connection is given it"]
pub struct MessagesService {
    batches: mpsc::Sender<Parcel>,
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
            open: 0,
            finished: Arc::default(),
        }
    }
}

/// The handler of a [`MessagesService`].
pub struct MessagesHandler {
    peer: Peer,
    batches: PollSender<Parcel>,
    batch: Vec<(u64, Bytes)>,
    /// Messages of an acknowledged stream of which nobody has taken the outcome yet.
    open: usize,
    finished: Arc<Finished>,
}

impl fmt::Debug for MessagesHandler {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MessagesHandler").field("peer", &self.peer).finish_non_exhaustive()
    }
}

impl Handler for MessagesHandler {
    fn message(&mut self, message: Message<'_>) -> HandlerResult {
        self.open += usize::from(message.number().is_some());
        self.batch.push((message.number().unwrap_or(0), message.to_bytes()));
        Ok(())
    }

    fn defers(&self) -> bool {
        true
    }

    fn take_outcomes(&mut self, each: &mut dyn FnMut(u64, HandlerResult)) {
        for (number, is_handled) in self.finished.outcomes().drain(..) {
            self.open -= 1;
            each(number, if is_handled { Ok(()) } else { Err(HandlerError::new(DROPPED)) });
        }
    }

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<HandlerResult> {
        if self.batch.is_empty() {
            return Poll::Ready(Ok(()));
        }
        let place = ready!(self.batches.poll_reserve(cx));
        let messages = std::mem::take(&mut self.batch).into_iter();
        let batch = Batch { peer: self.peer.clone(), messages, last: None, finished: Arc::clone(&self.finished) };
        let parcel = Arc::new(Mutex::new(Some(batch)));
        let sent = place.and_then(|()| self.batches.send_item(Arc::clone(&parcel)));
        let is_taken = sent.is_ok() && self.batches.get_ref().is_some_and(|batches| !batches.is_closed());
        match if is_taken { None } else { take(&parcel) } {
            // Of these it is said one by one.
            Some(batch) if batch.is_acknowledged() => Poll::Ready(Ok(())),
            Some(_) => Poll::Ready(Err(HandlerError::new(DROPPED))),
            None => Poll::Ready(Ok(())),
        }
    }

    fn poll_finished(&mut self, cx: &mut Context<'_>) -> Poll<HandlerResult> {
        ready!(self.poll_ready(cx))?;
        // What is still to be pulled is in the hands of this connection: the next one of its stream must not bring it again.
        if self.open == self.finished.outcomes().len() { Poll::Ready(Ok(())) } else { Poll::Pending }
    }
}

/// The messages that a [`MessagesService`] received, to be pulled with [`recv`](Messages::recv) or as a `Stream`.
///
/// The messages of one connection come in order. One of an acknowledged stream counts as handled when the next one is asked
/// for. The stream ends when the listener or connection that has the service has ended.
///
/// If it is dropped before, each message that comes is an error of its handler, as is in an acknowledged stream each that was not
/// finished by then, the last one that was pulled among them: it is tried three times and goes back to its sender. If
/// the listener is shut down at once, senders keep their messages for the next one.
pub struct Messages {
    batches: mpsc::Receiver<Parcel>,
    at_hand: Option<Batch>,
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
                if let Some(message) = batch.next() {
                    return Poll::Ready(Some((message, batch.peer.clone())));
                }
                self.at_hand = None;
            }
            match ready!(self.batches.poll_recv(cx)) {
                Some(parcel) => self.at_hand = take(&parcel),
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
