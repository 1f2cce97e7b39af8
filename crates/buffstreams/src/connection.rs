//! What the user dials: a sender whose socket the dialer keeps open, with reopen, state and close.

use std::fmt;
use std::ops::Deref;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{mpsc, oneshot, watch};
use tracing::Instrument as _;

use crate::dialer::{Answer, Dialer, State, ToldFailures};
use crate::error::{Error, ErrorKind, Result};
use crate::events::Events;
use crate::failed::FailedTo;
use crate::handler::{Discard, Service};
use crate::log::Throttle;
use crate::memory::MemoryBudget;
use crate::metrics::{Meter, Role, Totals};
use crate::proto::framing::{Framing, Prefix};
use crate::proto::outbox::FailedMessage;
use crate::proto::session::liveness::INTERVALS;
use crate::proto::session::sending::{Ask, Sending};
use crate::proto::session::wire::{LONGEST_TOKEN, StreamId, takes_sessions};
use crate::reader::{Demands, Talk};
use crate::retry::{Backoff, Retry};
use crate::route::{Connected, Home, Route, Target};
use crate::sender::Sender;
use crate::shared_outbox::{Overflow, Phase, SharedOutbox, deadline_in};
use crate::sink::MessageSink;
use crate::stats::{Received, ReceivedStats, Stats};
use crate::transport::{Address, Endpoints, Liveness, PeerAddress, TlsClient, Transport};

/// Bytes of replies that an acknowledged stream takes ahead of its handler, or half of the memory for what is received.
const REPLY_WINDOW: usize = 1024 * 1024;

/// The deadline when the last clone of a connection is dropped without a [`close`](Connection::close).
const DROPPED: Duration = Duration::from_secs(5);

/// When a message counts as settled, and so what survives what.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Delivery {
    /// When the kernel has taken the whole frame: on the plain wire, which any listener of the same framing understands.
    /// What the kernel had taken when a connection breaks can be lost.
    #[default]
    Sent,
    /// When the receiver's handler has returned `Ok` and the receiver has said so. What is not settled when a connection
    /// breaks is sent again on the next, and while the receiver lives, nothing is handled twice. The listener must be one
    /// of this library; any other refuses, or closes the connection.
    Acked,
}

/// How to dial. Made by [`Connection::builder`].
#[must_use = "a builder does nothing until it is told to dial"]
pub struct ConnectionBuilder<S = Discard> {
    service: Arc<S>,
    settings: Settings,
}

impl<S> Clone for ConnectionBuilder<S> {
    fn clone(&self) -> ConnectionBuilder<S> {
        ConnectionBuilder { service: Arc::clone(&self.service), settings: self.settings.clone() }
    }
}

impl<S> fmt::Debug for ConnectionBuilder<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ConnectionBuilder").field("settings", &self.settings).finish_non_exhaustive()
    }
}

#[derive(Clone, Debug)]
struct Settings {
    prefix: Prefix,
    max_message_size: usize,
    memory: usize,
    overflow: Overflow,
    expiry: Option<Duration>,
    retry: Retry,
    backoff: Backoff,
    connect_deadline: Duration,
    endpoint_patience: Duration,
    frame_deadline: Option<Duration>,
    receive_memory: MemoryBudget,
    failed_to: FailedTo,
    liveness: Liveness,
    delivery: Delivery,
    window: usize,
    heartbeat: Duration,
    token: Vec<u8>,
    stall_after: Duration,
    tls: Option<TlsClient>,
    name: Option<String>,
}

impl Default for ConnectionBuilder {
    fn default() -> Self {
        ConnectionBuilder { service: Arc::new(Discard), settings: Settings::default() }
    }
}

impl Default for Settings {
    fn default() -> Self {
        Settings {
            prefix: Prefix::default(),
            max_message_size: 0,
            memory: 4 * 1024 * 1024,
            overflow: Overflow::default(),
            expiry: None,
            retry: Retry::default(),
            backoff: Backoff::default(),
            connect_deadline: Duration::from_secs(10),
            endpoint_patience: Duration::from_secs(10),
            frame_deadline: Some(Duration::from_secs(30)),
            receive_memory: MemoryBudget::of_process(),
            failed_to: FailedTo::default(),
            liveness: Liveness::default(),
            delivery: Delivery::default(),
            window: 4 * 1024 * 1024,
            heartbeat: Duration::from_secs(10),
            token: Vec::new(),
            stall_after: Duration::from_secs(30),
            tls: None,
            name: None,
        }
    }
}

impl<S: Service> ConnectionBuilder<S> {
    /// How a length stands before a message. Default [`Prefix::Buffstreams`].
    pub fn prefix(mut self, prefix: Prefix) -> Self {
        self.settings.prefix = prefix;
        self
    }

    /// The largest message, in bytes; 0 stands for the default of 4096 bytes, or 255 for [`Prefix::U8`].
    ///
    /// With [`Prefix::Buffstreams`] the width of the prefix follows from it, so both sides must use the same.
    pub fn max_message_size(mut self, bytes: usize) -> Self {
        self.settings.max_message_size = bytes;
        self
    }

    /// Bytes that messages in hand may take, with their prefixes. Default 4 MiB. An empty queue takes any legal message.
    ///
    /// More lets senders run on for longer while the peer is slow or away. Where many connections are busy at once,
    /// 256 KiB for each is faster: what waits to be written then stays in the processor's cache.
    pub fn memory(mut self, bytes: usize) -> Self {
        self.settings.memory = bytes;
        self
    }

    /// What happens to a message for which there is no room. Default [`Overflow::Wait`].
    ///
    /// With [`Overflow::FailOldest`], failed messages that nobody has taken yet may take as much memory again.
    pub fn overflow(mut self, policy: Overflow) -> Self {
        self.settings.overflow = policy;
        self
    }

    /// How long a message may wait: if none of it was written by then, it fails. Default `None`: as long as it takes.
    pub fn expiry(mut self, allowed: impl Into<Option<Duration>>) -> Self {
        self.settings.expiry = allowed.into();
        self
    }

    /// How long a lost peer is waited for. Default [`Retry::Forever`].
    pub fn retry(mut self, policy: Retry) -> Self {
        self.settings.retry = policy;
        self
    }

    /// The time between attempts. Default: random parts of 100 ms, 200 ms, 400 ms … up to 10 s.
    pub fn backoff(mut self, backoff: Backoff) -> Self {
        self.settings.backoff = backoff;
        self
    }

    /// How long one attempt to connect may take. Default 10 s.
    ///
    /// One attempt tries every [endpoint](Endpoints), and of a name every address that it stands for: each has an equal
    /// share of the time that is left. With [`Delivery::Acked`] it must have granted the stream by then, too, however long a
    /// [heartbeat](Self::heartbeat) may be awaited later.
    pub fn connect_deadline(mut self, allowed: Duration) -> Self {
        self.settings.connect_deadline = allowed;
        self
    }

    /// With [`Delivery::Acked`] and more than one [endpoint](Endpoints), how long one that has messages in flight is waited
    /// for before the stream goes on at another, where they may be handled once more. Default 10 s. It does so sooner if the
    /// retry policy allows no more attempts, if its name stands for it no longer, or if it refuses the stream for good. The
    /// move is an [event](crate::Event::Moved).
    pub fn endpoint_patience(mut self, allowed: Duration) -> Self {
        self.settings.endpoint_patience = allowed;
        self
    }

    /// How long a frame from the other side may take from its first byte to its last. Default 30 s; `None` for as long
    /// as it likes.
    pub fn frame_deadline(mut self, allowed: impl Into<Option<Duration>>) -> Self {
        self.settings.frame_deadline = allowed.into();
        self
    }

    /// Bytes that unfinished messages from the other side may take, and replies in acknowledged streams that wait for the
    /// handler; for several connections together, if the budget is shared. Who would exceed it is closed, and dialled again. Default [`MemoryBudget::of_process`].
    pub fn receive_memory(mut self, memory: impl Into<MemoryBudget>) -> Self {
        self.settings.receive_memory = memory.into();
        self
    }

    /// How long the peer may vanish, or refuse to read, before the socket is given up (on Linux, by
    /// `TCP_USER_TIMEOUT`, which counts up to 24 days). Default 2 minutes; `None` for the system's own time.
    pub fn write_stall(mut self, allowed: impl Into<Option<Duration>>) -> Self {
        self.settings.liveness.write_stall = allowed.into();
        self
    }

    /// Silence after which the kernel asks whether the peer is still there. Default 30 s; `None` for never.
    pub fn keepalive(mut self, after: impl Into<Option<Duration>>) -> Self {
        self.settings.liveness.keepalive = after.into();
        self
    }

    /// When a message counts as settled. Default [`Delivery::Sent`].
    pub fn delivery(mut self, delivery: Delivery) -> Self {
        self.settings.delivery = delivery;
        self
    }

    /// With [`Delivery::Acked`], the bytes that are sent ahead of their acknowledgement, if the listener allows as many.
    /// Default 4 MiB. The connection's [memory](Self::memory) is at least twice that.
    pub fn window(mut self, bytes: usize) -> Self {
        self.settings.window = bytes;
        self
    }

    /// With [`Delivery::Acked`], how long at most between two signs of life from either side; a peer that has given none
    /// for three times as long is dead. Default 10 s; at least 50 ms, and at most an hour.
    pub fn heartbeat(mut self, interval: Duration) -> Self {
        self.settings.heartbeat = interval;
        self
    }

    /// With [`Delivery::Acked`], what to tell the receiver of this sender; its handlers see it as
    /// [`Peer::token`](crate::Peer::token). At most 512 bytes.
    pub fn token(mut self, token: impl Into<Vec<u8>>) -> Self {
        self.settings.token = token.into();
        self
    }

    /// How long messages may be in flight without any being settled before that is an [event](crate::Event::Stalled), and
    /// logged. Default 30 s. Nothing else follows from it; [`Stats::stalled`] always has the time.
    pub fn stall_after(mut self, allowed: Duration) -> Self {
        self.settings.stall_after = allowed;
        self
    }

    /// Speaks TLS with the peer, whatever the delivery. Default: not.
    #[cfg(feature = "__tls")]
    pub fn tls(mut self, tls: TlsClient) -> Self {
        self.settings.tls = Some(tls);
        self
    }

    /// What spans of `tracing` and metrics call the connection. Default: spans tell only whom it dials, and metrics take that
    /// for its name.
    pub fn name(mut self, name: impl Into<String>) -> Self {
        self.settings.name = Some(name.into());
        self
    }

    /// Who gets failed messages: a closure, called by the connection's task. It must not block.
    ///
    /// With neither this nor [`failed_to`](Self::failed_to), failed messages are counted, and logged at a bounded rate.
    pub fn on_failed(mut self, owner: impl Fn(FailedMessage) + Send + Sync + 'static) -> Self {
        self.settings.failed_to = FailedTo::Call(Arc::new(owner));
        self
    }

    /// Who gets failed messages: a channel. While it is full they take room in the connection's memory.
    pub fn failed_to(mut self, channel: mpsc::Sender<FailedMessage>) -> Self {
        self.settings.failed_to = FailedTo::Channel(channel);
        self
    }

    /// Who gets what the other side sends. Default: it is counted and dropped.
    ///
    /// A handler is made for every socket that the connection has in its life.
    pub fn handler<T: Service>(self, service: T) -> ConnectionBuilder<T> {
        ConnectionBuilder { service: Arc::new(service), settings: self.settings }
    }

    /// Connects, once; after that the connection keeps itself open.
    ///
    /// Of several [endpoints](Endpoints), or several addresses that a name stands for, the first that answers is used.
    /// When that is lost, the others are tried at once (within a tenth of a second), in order; only when each was tried is
    /// there a pause, and names are resolved anew each time. A connection in good health stays where it is;
    /// [`reopen`](Connection::reopen) begins at the first again. An acknowledged stream with messages in flight
    /// [stays for a while](Self::endpoint_patience) with an endpoint that is lost.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::InvalidAddress`], [`ErrorKind::InvalidConfiguration`], [`ErrorKind::Connect`] with what failed at each
    /// address that was tried, and [`ErrorKind::Tls`] with which certificate was not accepted, and why.
    ///
    /// # Cancel safety
    ///
    /// If the future is dropped, there is no connection.
    pub async fn dial<A>(self, address: A) -> Result<Connection>
    where
        A: TryInto<Endpoints>,
        Error: From<A::Error>,
    {
        let framing = self.framing()?;
        let target = self.target(address.try_into()?)?;
        let first = Route::new(target.clone()).connect(Duration::MAX).await?.expect("there is a place to try");
        if self.settings.delivery == Delivery::Sent {
            return Ok(self.start(framing, Some(target), Some(first), None));
        }
        let (answer, answered) = oneshot::channel();
        let connection = self.start(framing, Some(target), Some(first), Some(answer));
        if let Ok(Err(why)) = answered.await {
            connection.begin_close(Duration::ZERO);
            return Err(Error::new(ErrorKind::Connect, why));
        }
        Ok(connection)
    }

    /// Returns at once; the connection tries to reach its peer as its retry policy says, and messages wait meanwhile.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::InvalidAddress`] and [`ErrorKind::InvalidConfiguration`].
    ///
    /// # Panics
    ///
    /// Outside a tokio runtime.
    pub fn dial_lazy<A>(self, address: A) -> Result<Connection>
    where
        A: TryInto<Endpoints>,
        Error: From<A::Error>,
    {
        let framing = self.framing()?;
        let target = self.target(address.try_into()?)?;
        Ok(self.start(framing, Some(target), None, None))
    }

    /// Uses an open stream. When it ends, so does the connection: it cannot be dialled again.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::InvalidConfiguration`], also if there is to be TLS: that of such a stream is made by who brings it.
    ///
    /// # Panics
    ///
    /// Outside a tokio runtime.
    pub fn from_io(self, io: impl AsyncRead + AsyncWrite + Send + Unpin + 'static) -> Result<Connection> {
        let framing = self.framing()?;
        if self.settings.tls.is_some() {
            let text = "a stream that is brought is used as it is: bring one that TLS is spoken over already";
            return Err(Error::new(ErrorKind::InvalidConfiguration, text));
        }
        let connected = Connected { io: Transport::Io(Box::new(io)), peer: PeerAddress::Io, at: None, share: None };
        Ok(self.start(framing, None, Some(connected), None))
    }

    fn framing(&self) -> Result<Framing> {
        if self.settings.backoff.min > self.settings.backoff.max {
            let Backoff { min, max } = self.settings.backoff;
            let text = format!("a backoff from {min:?} to {max:?} has its least above its most");
            return Err(Error::new(ErrorKind::InvalidConfiguration, text));
        }
        let framing = Framing::with_max(self.settings.prefix, self.settings.max_message_size)?;
        if self.settings.delivery == Delivery::Sent {
            return Ok(framing);
        }
        if !takes_sessions(&framing) {
            let text = format!("an acknowledged stream cannot be asked for where lengths are {}", framing.prefix());
            return Err(Error::new(ErrorKind::InvalidConfiguration, text));
        }
        if self.settings.token.len() > LONGEST_TOKEN {
            let text = format!("a token of {} bytes is over the {LONGEST_TOKEN} allowed", self.settings.token.len());
            return Err(Error::new(ErrorKind::InvalidConfiguration, text));
        }
        Ok(Framing::for_session(framing.max_message_size())?)
    }

    fn target(&self, endpoints: Endpoints) -> Result<Target> {
        let Settings { liveness, connect_deadline, endpoint_patience: patience, ref tls, .. } = self.settings;
        if let Some(tls) = tls {
            endpoints.addresses().iter().try_for_each(|address| tls.check(address))?;
        }
        Ok(Target { endpoints, liveness, connect_deadline, patience, tls: tls.clone(), home: None })
    }

    /// A connection that dials one place of an address. Others with the same settings can be started after it.
    pub(crate) fn start_at(&self, address: Address, home: Home) -> Result<Connection> {
        let framing = self.framing()?;
        let target = Target { home: Some(home), ..self.target(address.into())? };
        Ok(self.clone().start(framing, Some(target), None, None))
    }

    /// Whether a message for which there is no room waits for it.
    pub(crate) fn lets_wait(&self) -> bool {
        self.settings.overflow != Overflow::Fail
    }

    /// `answer` hears how the first attempt to open a session went.
    fn start(
        self,
        framing: Framing,
        target: Option<Target>,
        first: Option<Connected>,
        answer: Option<Answer>,
    ) -> Connection {
        let Settings { memory, overflow, expiry, delivery, .. } = self.settings;
        let outbox = match delivery {
            Delivery::Sent => SharedOutbox::new(framing, memory, overflow, expiry),
            Delivery::Acked => {
                let stream = StreamId::from_bytes(fastrand::u128(..).to_be_bytes());
                let ask = self.ask(framing);
                let memory = memory.max(ask.window.saturating_mul(2));
                SharedOutbox::in_session(Sending::new(stream, 0, ask), memory, overflow, expiry)
            }
        };
        self.start_on(outbox, framing, target, first, answer).0
    }

    /// What to ask of the listener.
    fn ask(&self, framing: Framing) -> Ask {
        let largest = framing.prefix_width(0) + framing.max_message_size();
        Ask {
            framing,
            window: self.settings.window.max(largest),
            reply_window: REPLY_WINDOW.min(self.settings.receive_memory.limit() / 2).max(largest),
            heartbeat: self.settings.heartbeat.clamp(INTERVALS.0, INTERVALS.1),
            token: self.settings.token.clone(),
        }
    }

    /// The parts of an acknowledged connection whose messages come from a spool: what to ask of the listener, and the
    /// memory for messages on their way.
    #[cfg(feature = "spool")]
    pub(crate) fn for_spool(&mut self) -> Result<(Ask, usize, Overflow)> {
        let Settings { overflow, expiry, .. } = self.settings;
        if overflow == Overflow::FailOldest || expiry.is_some() {
            let text = "messages in a spool do not expire, and do not make room for newer ones";
            return Err(Error::new(ErrorKind::InvalidConfiguration, text));
        }
        self.settings.delivery = Delivery::Acked;
        let ask = self.ask(self.framing()?);
        let memory = self.settings.memory.max(ask.window.saturating_mul(2));
        Ok((ask, memory, overflow))
    }

    /// Starts with messages that come from a spool, which is `told` of what is done with them. Returns the owner of failed
    /// messages, which then is the spool's to tell.
    #[cfg(feature = "spool")]
    pub(crate) fn start_spooled(
        mut self,
        outbox: Arc<SharedOutbox>,
        endpoints: Endpoints,
        told: FailedTo,
    ) -> Result<(Connection, FailedTo, Meter)> {
        let framing = outbox.framing();
        let target = self.target(endpoints)?;
        let owner = std::mem::replace(&mut self.settings.failed_to, told);
        let (connection, meter) = self.start_on(outbox, framing, Some(target), None, None);
        Ok((connection, owner, meter))
    }

    fn start_on(
        self,
        outbox: Arc<SharedOutbox>,
        framing: Framing,
        target: Option<Target>,
        first: Option<Connected>,
        answer: Option<Answer>,
    ) -> (Connection, Meter) {
        let ConnectionBuilder { service, settings } = self;
        let received = Arc::new(Received::default());
        let state = if first.is_some() { State::Connected } else { State::Connecting };
        let (state, states) = watch::channel(state);
        let refusal = Arc::default();
        let connection = Connection {
            sender: Sender::new(&outbox),
            states,
            received: Arc::clone(&received),
            refusal: Arc::clone(&refusal),
            _last: Arc::new(Last(Arc::clone(&outbox))),
        };
        let address =
            target.as_ref().map_or_else(|| PeerAddress::Io.to_string(), |target| target.endpoints.to_string());
        let span = tracing::info_span!(
            "connection",
            name = settings.name.as_deref(),
            peer = address,
            stream = outbox.with_sending(|sending, _| tracing::field::display(sending.stream())),
        );
        let meter = Meter::new(Role::Connection, settings.name.as_deref().unwrap_or(&address), {
            let (outbox, received) = (Arc::clone(&outbox), Arc::clone(&received));
            let (states, stall_after) = (connection.states.clone(), settings.stall_after);
            move || {
                let sent = outbox.stats();
                let is_stalled = sent.in_flight > 0 && sent.stalled >= stall_after;
                Totals { received: received.read(), sent, is_up: *states.borrow() == State::Connected, is_stalled }
            }
        });
        let dialer = Dialer {
            target,
            retry: settings.retry,
            backoff: settings.backoff,
            service,
            demands: Arc::new(Demands {
                framing,
                frame_deadline: settings.frame_deadline,
                idle_deadline: None,
                handshake_deadline: None,
                close_on_handler_error: false,
                pause_when_congested: false,
                max_message_rate: None,
                memory: settings.receive_memory,
                received,
                handler_errors: Throttle::default(),
                sessions: if settings.delivery == Delivery::Acked { Talk::Ask } else { Talk::Plain },
            }),
            answer: Mutex::new(answer),
            outbox,
            failed_to: settings.failed_to,
            stall_after: settings.stall_after,
            state,
            refusal,
            told: Mutex::new(ToldFailures::default()),
            meter: Mutex::new(Some(meter.clone())),
        };
        tokio::spawn(dialer.run(first).instrument(span));
        (connection, meter)
    }
}

/// A dialled connection: survives the loss of its sockets, until it is closed. Cheap to clone.
///
/// It is a [`Sender`]; see there for `send` and its kin. When the last clone is dropped it closes in the background,
/// with a deadline of 5 s.
///
/// ```
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # use buffstreams::{Connection, Listener};
/// # let server = Listener::bind("127.0.0.1:0").await?.spawn(|_: &[u8]| Ok(()));
/// # let address = server.local_address();
/// use std::time::Duration;
///
/// let connection = Connection::dial(address).await?;
/// for number in 0..1000u32 {
///     connection.send(&number.to_be_bytes()).await?;
/// }
/// let flushed = connection.flush().await?;
/// assert_eq!((flushed.settled, flushed.failed), (1000, 0));
/// let stats = connection.close(Duration::from_secs(5)).await?;
/// assert_eq!(stats.accepted, stats.settled);
/// # Ok(()) }
/// ```
#[derive(Clone)]
pub struct Connection {
    sender: Sender,
    states: watch::Receiver<State>,
    received: Arc<Received>,
    refusal: Arc<Mutex<Option<String>>>,
    _last: Arc<Last>,
}

/// Closes the connection when the last clone of it goes.
struct Last(Arc<SharedOutbox>);

impl Drop for Last {
    fn drop(&mut self) {
        self.0.close_by(Instant::now() + DROPPED);
    }
}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connection").field("state", &self.state()).field("stats", &self.stats()).finish_non_exhaustive()
    }
}

impl Deref for Connection {
    type Target = Sender;

    fn deref(&self) -> &Sender {
        &self.sender
    }
}

impl Connection {
    /// Connects with the default settings; tries once.
    ///
    /// # Errors
    ///
    /// As [`ConnectionBuilder::dial`].
    pub async fn dial<A>(address: A) -> Result<Connection>
    where
        A: TryInto<Endpoints>,
        Error: From<A::Error>,
    {
        Connection::builder().dial(address).await
    }

    /// Other settings.
    pub fn builder() -> ConnectionBuilder {
        ConnectionBuilder::default()
    }

    /// Where it stands now.
    pub fn state(&self) -> State {
        *self.states.borrow()
    }

    /// Where it stands, to be watched. A slow watcher sees the latest state, not every one.
    pub fn states(&self) -> watch::Receiver<State> {
        self.states.clone()
    }

    /// What happens to the connection from now on. A slow watcher misses the oldest of more than 64 events, and is told.
    pub fn events(&self) -> Events {
        self.sender.shared().watch(|| self.state() == State::Closed)
    }

    /// With [`Delivery::Acked`], why the peer refused the stream when it was last asked for, in words for people; `None` if
    /// it has granted it since, or was not reached yet. A peer that closes the connection instead of an answer, as one does
    /// that knows no acknowledged streams, has refused too.
    pub fn refusal(&self) -> Option<String> {
        self.refusal.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// What came back from the other side, over all sockets.
    pub fn received(&self) -> ReceivedStats {
        self.received.read()
    }

    /// Gives up the socket at hand and connects anew at once; what is not settled is sent again there. On a closed
    /// connection it does nothing; one made [from a stream](ConnectionBuilder::from_io) has no other, and ends.
    pub fn reopen(&self) {
        self.sender.shared().ask_reopen();
    }

    /// A `futures::Sink` that sends over this connection. It does not keep the connection open: hold on to a clone.
    pub fn sink(&self) -> MessageSink {
        MessageSink::new(self.sender.clone())
    }

    /// Accepts no more messages, settles what is in hand, ends the stream and waits up to a second for the peer to end
    /// its own. What is not settled by the deadline fails. For all clones; says what became of everything.
    ///
    /// # Errors
    ///
    /// None at present. A second close returns the same.
    ///
    /// # Cancel safety
    ///
    /// If the future is dropped the close goes on in the background.
    pub async fn close(&self, deadline: Duration) -> Result<Stats> {
        self.begin_close(deadline);
        self.closed().await;
        Ok(self.stats())
    }

    /// What [`close`](Self::close) does before it waits.
    pub(crate) fn begin_close(&self, deadline: Duration) {
        self.sender.shared().advance_phase(Phase::Closing(deadline_in(deadline)));
    }

    /// Waits until the connection is closed, or has given up.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe.
    pub async fn closed(&self) {
        let mut states = self.states.clone();
        // The task behind the connection has the last word, or is gone with its runtime.
        let _ = states.wait_for(|state| *state == State::Closed).await;
    }
}
