//! What the user does with received messages: handlers, and the services that make one for every connection.
//!
//! There is one kind of handler. Closures, async handlers, blocking handlers and streams are handlers that are built
//! here and in `stream.rs`; the reader knows only the trait.

use std::collections::VecDeque;
use std::fmt;
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;

use crate::proto::framing::FrameError;
use crate::proto::inbox::Message;
use crate::sender::Sender;
use crate::transport::PeerAddress;

/// What a handler says of a message.
pub type HandlerResult = Result<(), HandlerError>;

/// Why a handler could not handle a message. Any error converts into it, so `?` works in a handler.
pub struct HandlerError(Box<dyn std::error::Error + Send + Sync>);

impl HandlerError {
    /// An error with this text.
    pub fn new(text: impl Into<String>) -> HandlerError {
        HandlerError(text.into().into())
    }
}

impl<E: std::error::Error + Send + Sync + 'static> From<E> for HandlerError {
    fn from(error: E) -> HandlerError {
        HandlerError(Box::new(error))
    }
}

impl fmt::Display for HandlerError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Debug for HandlerError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Why no more messages come from a connection.
#[derive(Debug)]
#[non_exhaustive]
pub enum Ended {
    /// The peer ended its stream, between two frames.
    EndOfStream,
    /// The peer sent bytes that are not frames, or ended its stream inside one.
    Malformed(FrameError),
    /// The operating system reported an error.
    Io(io::Error),
    /// The handler returned an error, and the policy is to close.
    HandlerFailed(HandlerError),
    /// The handler panicked.
    HandlerPanicked,
    /// A frame took longer from its first byte to its last than this.
    FrameDeadline(Duration),
    /// Nothing came for this long.
    Idle(Duration),
    /// The memory for received bytes, shared by all connections, was used up. In bytes.
    Overloaded {
        /// What all connections may hold together.
        limit: usize,
    },
    /// This side is closing.
    ShutDown,
    /// This side was closed without waiting any longer.
    Cut,
    /// This side wants another socket.
    Reopened,
}

impl fmt::Display for Ended {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Ended::EndOfStream => f.write_str("the peer ended its stream"),
            Ended::Malformed(error) => error.fmt(f),
            Ended::Io(error) => error.fmt(f),
            Ended::HandlerFailed(error) => write!(f, "the handler failed: {error}"),
            Ended::HandlerPanicked => f.write_str("the handler panicked"),
            Ended::FrameDeadline(allowed) => write!(f, "a frame took longer than the {allowed:?} that are allowed"),
            Ended::Idle(allowed) => write!(f, "nothing was received for the {allowed:?} that are allowed"),
            Ended::Overloaded { limit } => {
                write!(f, "unfinished messages of all connections would exceed the {limit} bytes that are allowed")
            }
            Ended::ShutDown => f.write_str("this side is shutting down"),
            Ended::Cut => f.write_str("this side closed without waiting any longer"),
            Ended::Reopened => f.write_str("a new socket was asked for"),
        }
    }
}

/// The other end of a connection, as its handler sees it. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Peer {
    id: u64,
    address: PeerAddress,
    sender: Sender,
}

impl Peer {
    pub(crate) fn new(id: u64, address: PeerAddress, sender: Sender) -> Peer {
        Peer { id, address, sender }
    }

    /// A number that no other connection of this listener has; for a dialled connection, how many sockets it had before.
    pub fn id(&self) -> u64 {
        self.id
    }

    /// Where the peer is.
    pub fn address(&self) -> &PeerAddress {
        &self.address
    }

    /// Sends to the peer on the same connection.
    ///
    /// In a handler use [`try_send`](Sender::try_send): reading pauses while many replies wait, so that there is room
    /// for one reply of moderate size to each message. A reply is lost with its connection. On a listener, a connection
    /// whose peer has ended its stream stays open for replies until the last clone of its sender is gone.
    pub fn sender(&self) -> &Sender {
        &self.sender
    }
}

/// Takes the messages of one connection, one after the other.
///
/// Calls come from the connection's task and must not block it; see [`blocking_handler`] for work that does. What a
/// handler keeps between messages is its own: it is made for one connection, by a [`Service`].
///
/// ```
/// use buffstreams::{Handler, HandlerResult, Message, Peer, per_connection};
///
/// struct Echo(Peer);
///
/// impl Handler for Echo {
///     fn message(&mut self, message: Message<'_>) -> HandlerResult {
///         self.0.sender().try_send(&message)?;
///         Ok(())
///     }
/// }
///
/// let service = per_connection(|peer: &Peer| Echo(peer.clone()));
/// # let _ = service;
/// ```
pub trait Handler: Send + 'static {
    /// One message, lent for the length of the call.
    ///
    /// # Errors
    ///
    /// An error is counted and logged; then the connection goes on or ends, by policy.
    fn message(&mut self, message: Message<'_>) -> HandlerResult;

    /// After the last message of one read: the place to flush what the messages were written to.
    ///
    /// # Errors
    ///
    /// As [`message`](Handler::message).
    fn batch_end(&mut self) -> HandlerResult {
        Ok(())
    }

    /// Whether more messages may come. While it is pending nothing is read, so the peer feels it.
    ///
    /// # Errors
    ///
    /// As [`message`](Handler::message), for work that was begun earlier.
    fn poll_ready(&mut self, _cx: &mut Context<'_>) -> Poll<HandlerResult> {
        Poll::Ready(Ok(()))
    }

    /// Whether all work that was begun is finished. Asked when no more messages will come.
    ///
    /// # Errors
    ///
    /// As [`message`](Handler::message), for work that was begun earlier.
    fn poll_finished(&mut self, cx: &mut Context<'_>) -> Poll<HandlerResult> {
        self.poll_ready(cx)
    }

    /// No more messages will come, and all work is finished. Called once, unless the handler panicked.
    fn ended(&mut self, _why: &Ended) {}
}

/// Makes the [`Handler`] of every connection.
///
/// Any `Fn(&[u8]) -> HandlerResult` is a service whose handlers all call it.
pub trait Service: Send + Sync + 'static {
    /// What it makes.
    type Handler: Handler;

    /// A connection to this peer was opened.
    fn connected(self: Arc<Self>, peer: &Peer) -> Self::Handler;
}

impl<F> Service for F
where
    F: Fn(&[u8]) -> HandlerResult + Send + Sync + 'static,
{
    type Handler = Shared<F>;

    fn connected(self: Arc<Self>, _peer: &Peer) -> Shared<F> {
        Shared(self)
    }
}

/// A closure that all connections share; see [`Service`].
#[derive(Debug)]
pub struct Shared<F>(Arc<F>);

impl<F> Handler for Shared<F>
where
    F: Fn(&[u8]) -> HandlerResult + Send + Sync + 'static,
{
    #[inline]
    fn message(&mut self, message: Message<'_>) -> HandlerResult {
        (self.0)(message.as_slice())
    }
}

/// A service that calls `make` for the handler of every connection: for handlers with state, or that reply.
pub fn per_connection<M, H>(make: M) -> PerConnection<M>
where
    M: Fn(&Peer) -> H + Send + Sync + 'static,
    H: Handler,
{
    PerConnection(make)
}

/// See [`per_connection`].
#[derive(Clone, Copy, Debug)]
pub struct PerConnection<M>(M);

impl<M, H> Service for PerConnection<M>
where
    M: Fn(&Peer) -> H + Send + Sync + 'static,
    H: Handler,
{
    type Handler = H;

    fn connected(self: Arc<Self>, peer: &Peer) -> H {
        (self.0)(peer)
    }
}

/// Counts nothing, keeps nothing: what a dialled connection does with messages that nobody asked for.
#[derive(Clone, Copy, Debug)]
pub struct Discard;

impl Service for Discard {
    type Handler = Discard;

    fn connected(self: Arc<Self>, _peer: &Peer) -> Discard {
        Discard
    }
}

impl Handler for Discard {
    fn message(&mut self, _message: Message<'_>) -> HandlerResult {
        Ok(())
    }
}

/// A service that runs an async function for every message, which it owns.
///
/// One message of a connection at a time, in order, unless [`concurrency`](AsyncService::concurrency) says more. The
/// futures run on the connection's task: other connections go on in parallel, and reading waits while they work. At most
/// the messages of one read wait for their turn (256 KiB, or one large message).
///
/// ```
/// use buffstreams::{Bytes, Peer, async_handler};
///
/// let service = async_handler(|message: Bytes, peer: Peer| async move {
///     peer.sender().send(&message).await?;
///     Ok(())
/// });
/// # let _ = service;
/// ```
pub fn async_handler<F, W>(work: F) -> AsyncService<F>
where
    F: Fn(Bytes, Peer) -> W + Send + Sync + 'static,
    W: Future<Output = HandlerResult> + Send + 'static,
{
    AsyncService { work: Arc::new(work), concurrency: 1 }
}

/// A message in work on a thread of the blocking pool.
pub type BlockingWork = Pin<Box<dyn Future<Output = HandlerResult> + Send>>;

/// A service that runs a function for every message on a thread where it may block.
///
/// The threads are tokio's blocking pool. One message of a connection at a time, in order, unless
/// [`concurrency`](AsyncService::concurrency) says more; a panic in the function ends the connection.
pub fn blocking_handler<F>(work: F) -> AsyncService<impl Fn(Bytes, Peer) -> BlockingWork + Send + Sync + 'static>
where
    F: Fn(&[u8], &Peer) -> HandlerResult + Send + Sync + 'static,
{
    let work = Arc::new(work);
    async_handler(move |message: Bytes, peer: Peer| {
        let work = Arc::clone(&work);
        let thread = tokio::task::spawn_blocking(move || work(&message, &peer));
        Box::pin(async move {
            match thread.await {
                Ok(result) => result,
                Err(error) => match error.try_into_panic() {
                    Ok(panic) => std::panic::resume_unwind(panic),
                    Err(cancelled) => Err(cancelled.into()),
                },
            }
        }) as BlockingWork
    })
}

/// See [`async_handler`] and [`blocking_handler`].
#[derive(Debug)]
pub struct AsyncService<F> {
    work: Arc<F>,
    concurrency: usize,
}

impl<F> AsyncService<F> {
    /// Lets up to `most` messages of a connection be in work at the same time (default and least 1). They begin in
    /// order, and end as they end.
    pub fn concurrency(mut self, most: usize) -> Self {
        self.concurrency = most.max(1);
        self
    }
}

impl<F, W> Service for AsyncService<F>
where
    F: Fn(Bytes, Peer) -> W + Send + Sync + 'static,
    W: Future<Output = HandlerResult> + Send + 'static,
{
    type Handler = AsyncHandler<F, W>;

    fn connected(self: Arc<Self>, peer: &Peer) -> AsyncHandler<F, W> {
        AsyncHandler {
            work: Arc::clone(&self.work),
            concurrency: self.concurrency,
            peer: peer.clone(),
            waiting: VecDeque::new(),
            running: Vec::new(),
        }
    }
}

/// The handler of an [`AsyncService`].
pub struct AsyncHandler<F, W> {
    work: Arc<F>,
    concurrency: usize,
    peer: Peer,
    waiting: VecDeque<Bytes>,
    running: Vec<Pin<Box<W>>>,
}

impl<F, W> fmt::Debug for AsyncHandler<F, W> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AsyncHandler")
            .field("peer", &self.peer)
            .field("waiting", &self.waiting.len())
            .field("running", &self.running.len())
            .finish_non_exhaustive()
    }
}

impl<F, W> AsyncHandler<F, W>
where
    F: Fn(Bytes, Peer) -> W + Send + Sync + 'static,
    W: Future<Output = HandlerResult> + Send + 'static,
{
    /// Polls what runs and begins what waits, until an error, or nothing more can be done now.
    fn advance(&mut self, cx: &mut Context<'_>) -> HandlerResult {
        loop {
            let mut index = 0;
            while index < self.running.len() {
                match self.running[index].as_mut().poll(cx) {
                    Poll::Pending => index += 1,
                    Poll::Ready(result) => {
                        drop(self.running.swap_remove(index));
                        result?;
                    }
                }
            }
            let room = self.concurrency - self.running.len();
            let begin = room.min(self.waiting.len());
            if begin == 0 {
                return Ok(());
            }
            for message in self.waiting.drain(..begin) {
                self.running.push(Box::pin((self.work)(message, self.peer.clone())));
            }
        }
    }
}

impl<F, W> Handler for AsyncHandler<F, W>
where
    F: Fn(Bytes, Peer) -> W + Send + Sync + 'static,
    W: Future<Output = HandlerResult> + Send + 'static,
{
    fn message(&mut self, message: Message<'_>) -> HandlerResult {
        self.waiting.push_back(message.to_bytes());
        Ok(())
    }

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<HandlerResult> {
        self.advance(cx)?;
        if self.waiting.is_empty() && self.running.len() < self.concurrency {
            Poll::Ready(Ok(()))
        } else {
            Poll::Pending
        }
    }

    fn poll_finished(&mut self, cx: &mut Context<'_>) -> Poll<HandlerResult> {
        ready!(self.poll_ready(cx))?;
        if self.running.is_empty() { Poll::Ready(Ok(())) } else { Poll::Pending }
    }
}
