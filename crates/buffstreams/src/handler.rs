//! What the user does with received messages: handlers, and the services that make one for every connection.
//!
//! There is one kind of handler. Closures are handlers by what is written here, async and blocking ones by the files of
//! those names, a stream of messages by `stream.rs`; the reader knows only the trait.

use std::fmt;
use std::io;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use crate::proto::framing::FrameError;
use crate::proto::inbox::Message;
use crate::proto::outbox::Rejection;
use crate::proto::session::wire::{StreamId, shortened};
use crate::sender::Sender;
use crate::transport::{PeerAddress, PeerIdentity};

/// What a handler says of a message.
pub type HandlerResult = Result<(), HandlerError>;

/// Why a handler could not handle a message. Any error converts into it, so `?` works in a handler.
pub struct HandlerError(Box<dyn std::error::Error + Send + Sync>);

impl HandlerError {
    /// An error with this text.
    pub fn new(text: impl Into<String>) -> HandlerError {
        HandlerError(Box::new(Said(text.into())))
    }

    /// Refuses this message for good: on an acknowledged stream its sender gets it back as
    /// [`FailedReason::Rejected`](crate::FailedReason::Rejected), with this code and up to 256 bytes of this text. Any
    /// other error means that the message could not be handled for the moment: it is tried three times, and then
    /// rejected with code 0.
    ///
    /// On other connections it is an error like any.
    pub fn rejected(code: u32, text: impl Into<String>) -> HandlerError {
        let text = text.into();
        HandlerError(Box::new(Rejected(Rejection { code, text: shortened(&text).to_owned() })))
    }

    /// The error that it was made of by `?` or `From`; `None` if there was only a text.
    ///
    /// ```
    /// use std::io;
    /// use buffstreams::HandlerError;
    ///
    /// let error = HandlerError::from(io::Error::from(io::ErrorKind::StorageFull));
    /// let source = error.source().and_then(|source| source.downcast_ref::<io::Error>()).expect("an error of I/O");
    /// assert_eq!(source.kind(), io::ErrorKind::StorageFull);
    /// assert!(HandlerError::new("the disk is full").source().is_none());
    /// ```
    pub fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        let is_text = self.0.is::<Said>() || self.0.is::<Rejected>();
        (!is_text).then_some(&*self.0)
    }

    pub(crate) fn rejection(&self) -> Option<&Rejection> {
        self.0.downcast_ref::<Rejected>().map(|rejected| &rejected.0)
    }
}

/// A text as an error.
#[derive(Debug)]
struct Said(String);

impl fmt::Display for Said {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Said {}

/// A rejection as an error.
#[derive(Debug)]
struct Rejected(Rejection);

impl fmt::Display for Rejected {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "rejected with code {}: {}", self.0.code, self.0.text)
    }
}

impl std::error::Error for Rejected {}

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
    /// The memory that connections share for what they received and not handled was used up. In bytes.
    Overloaded {
        /// What all connections may hold together.
        limit: usize,
    },
    /// The TLS handshake failed. There was no handler yet.
    Handshake(String),
    /// A handshake, of TLS or of an acknowledged stream, took longer than this.
    HandshakeDeadline(Duration),
    /// The peer gave no sign of life in an acknowledged stream, for this long.
    Silent(Duration),
    /// A newer connection of the same acknowledged stream took over.
    Fenced,
    /// A message of an acknowledged stream must be handled again, and its sender must send it again.
    SendAgain,
    /// The peer did in an acknowledged stream what no peer may do.
    Violated(String),
    /// The peer asked for an acknowledged stream, and was told why it gets none.
    NotGranted(String),
    /// The peer refused the acknowledged stream, or ended it. The flag says whether another attempt makes sense.
    Refused {
        /// What it said.
        why: String,
        /// Whether it may be otherwise at another time.
        is_temporary: bool,
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
                write!(f, "what all connections hold would exceed the {limit} bytes that are allowed")
            }
            Ended::Handshake(why) => write!(f, "the TLS handshake failed: {why}"),
            Ended::HandshakeDeadline(allowed) => {
                write!(f, "the handshake was not over within the {allowed:?} that are allowed")
            }
            Ended::Silent(allowed) => write!(f, "the peer gave no sign of life for {allowed:?}"),
            Ended::Fenced => f.write_str("a newer connection of the same stream took over"),
            Ended::SendAgain => f.write_str("a message must be handled again, and so be sent again"),
            Ended::Violated(what) | Ended::NotGranted(what) => f.write_str(what),
            Ended::Refused { why, .. } => f.write_str(why),
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
    identity: Option<PeerIdentity>,
    sender: Sender,
}

impl Peer {
    pub(crate) fn new(id: u64, address: PeerAddress, identity: Option<PeerIdentity>, sender: Sender) -> Peer {
        Peer { id, address, identity, sender }
    }

    /// A number that no other connection of this listener has; for a dialled connection, how many sockets it had before.
    pub fn id(&self) -> u64 {
        self.id
    }

    /// Where the peer is.
    pub fn address(&self) -> &PeerAddress {
        &self.address
    }

    /// Who the peer has proved to be, over TLS: the client, where the listener demands certificates; the server, on a dialled
    /// connection. `None` otherwise.
    pub fn identity(&self) -> Option<&PeerIdentity> {
        self.identity.as_ref()
    }

    /// The name of the acknowledged stream that this connection belongs to: the same on every connection of it. `None`
    /// on other connections, and before the stream has begun.
    pub fn stream_id(&self) -> Option<StreamId> {
        self.sender.shared().peer_stream().map(|(stream, _)| *stream)
    }

    /// What the sender of an acknowledged stream said of itself when it asked for it; see
    /// [`token`](crate::ConnectionBuilder::token). Nobody has checked it.
    pub fn token(&self) -> Option<&[u8]> {
        self.sender.shared().peer_stream().map(|(_, token)| &**token)
    }

    /// Sends to the peer on the same connection.
    ///
    /// In a handler use [`try_send`](Sender::try_send). On a listener, reading pauses while many replies wait, so that
    /// there is room for one of moderate size to each message; a reply that fails is counted, and lost with its
    /// connection; and a connection whose peer has ended its stream stays open for replies until the last clone of its
    /// sender is gone. On a dialled connection, replies are messages of that connection like all others, and wait behind
    /// them: `try_send` may find no room.
    ///
    /// On a listener, what is sent before anything was received goes out as a plain message, and rules out that the connection
    /// becomes one of an acknowledged stream: see [`Service::connected`].
    pub fn sender(&self) -> &Sender {
        &self.sender
    }
}

/// Takes the messages of one connection, one after the other.
///
/// Calls come from the connection's task and must not block it; see [`blocking_handler`](crate::blocking_handler) for work that does. What a
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
    /// An error is counted and logged; then the connection goes on or ends, by policy. In an acknowledged stream the
    /// message is handled again, three times in all, or goes back to its sender: see [`HandlerError::rejected`].
    fn message(&mut self, message: Message<'_>) -> HandlerResult;

    /// After the last message of one read: the place to flush what the messages were written to.
    ///
    /// # Errors
    ///
    /// As [`message`](Handler::message).
    fn batch_end(&mut self) -> HandlerResult {
        Ok(())
    }

    /// Whether messages are finished only some time after [`message`](Handler::message) has returned `Ok`. Such a handler
    /// says which through [`take_outcomes`](Handler::take_outcomes), and acknowledged streams wait for it.
    ///
    /// If such a handler panics outside `message`, its connection ends, and what it had in hand is handled again on the next;
    /// of that, the first message counts as the one over which it failed.
    fn defers(&self) -> bool {
        false
    }

    /// Gives what became of messages since the last call, by their [numbers](Message::number), in any order. Called after
    /// `poll_ready` and `poll_finished`, in acknowledged streams only, and only if the handler [defers](Handler::defers).
    fn take_outcomes(&mut self, _each: &mut dyn FnMut(u64, HandlerResult)) {}

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

    /// No more messages will come, and all work is finished. Called once, unless the handler panicked or its connection
    /// was cut off: at the deadline of a close, or with the runtime.
    fn ended(&mut self, _why: &Ended) {}
}

/// Makes the [`Handler`] of every connection.
///
/// Any `Fn(&[u8]) -> HandlerResult` is a service whose handlers all call it. The message is lent to it for the length of
/// the call, so keeping it without a copy does not compile:
///
/// ```compile_fail
/// use std::sync::Mutex;
/// use buffstreams::{HandlerResult, Service};
///
/// fn service(closure: impl Fn(&[u8]) -> HandlerResult + Send + Sync + 'static) -> impl Service {
///     closure
/// }
///
/// static KEPT: Mutex<Vec<&'static [u8]>> = Mutex::new(Vec::new());
/// service(|message: &[u8]| {
///     KEPT.lock().unwrap().push(message); // with Vec<Vec<u8>> and message.to_vec() it would
///     Ok(())
/// });
/// ```
pub trait Service: Send + Sync + 'static {
    /// What it makes.
    type Handler: Handler;

    /// A connection to this peer was opened.
    ///
    /// On a listener nobody knows yet what kind of connection it is: the peer's first bytes tell. A message that is sent
    /// [to it](Peer::sender) before goes out as a plain one, and then no acknowledged stream can begin: one that asks for it is
    /// closed, and dials again, for nothing. So a service that greets whoever connects is one for plain peers; for both kinds,
    /// greet at the first message.
    fn connected(self: Arc<Self>, peer: &Peer) -> Self::Handler;

    /// The number of the last message of an acknowledged stream that was stored for good, if anybody knows. Asked when a
    /// stream comes that this listener does not know (any more); what is up to there is not handled again.
    fn stored(&self, _stream: StreamId) -> Option<u64> {
        None
    }
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
pub struct Shared<F>(Arc<F>);

impl<F> fmt::Debug for Shared<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Shared")
    }
}

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
#[derive(Clone, Copy)]
#[must_use = "a service does nothing until a listener or a connection is given it"]
pub struct PerConnection<M>(M);

impl<M> fmt::Debug for PerConnection<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PerConnection")
    }
}

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
