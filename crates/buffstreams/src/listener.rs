//! Bind, accept, limit, shut down. What happens on an accepted socket is the matter of `house.rs`.
//!
//! A stranger's bytes can end their own connection and nothing else. When the server is gone its port is free.

use std::fmt;
use std::io;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::time::{Duration, Instant};

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::watch;

use crate::error::{Error, ErrorKind, Result};
use crate::handler::{Ended, Service};
use crate::handshake::Gate;
use crate::house::House;
use crate::log::Throttle;
use crate::proto::framing::{Framing, Prefix};
use crate::proto::session::streams::Terms;
use crate::reader::{Demands, Talk};
use crate::shared_outbox::deadline_in;
use crate::stats::{Received, ReceivedStats, count_both};
use crate::transport::{Acceptor, Address, Liveness, PeerAddress, TlsServer, Transport};

/// Waiting times when the machine has no file descriptor left: from the first to the last, doubling.
const STARVED: (Duration, Duration) = (Duration::from_millis(10), Duration::from_millis(500));

/// At most one log line about that in this time.
const STARVED_LOG: Duration = Duration::from_secs(5);

/// The deadline when a server is dropped without a [`shutdown`](Server::shutdown).
const DROPPED: Duration = Duration::from_secs(5);

/// The times between two signs of life that a peer may ask for in a session.
const LEAST_HEARTBEAT: Duration = Duration::from_millis(50);
const LONGEST_HEARTBEAT: Duration = Duration::from_secs(3600);

/// What happens to a connection whose handler returns an error.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum OnHandlerError {
    /// The error is counted, and logged at a bounded rate; the connection goes on.
    #[default]
    Continue,
    /// The connection is closed.
    Close,
}

/// How to listen. Made by [`Listener::builder`].
#[derive(Clone, Debug)]
pub struct ListenerBuilder {
    prefix: Prefix,
    max_message_size: usize,
    max_connections: usize,
    frame_deadline: Option<Duration>,
    idle_deadline: Option<Duration>,
    reply_memory: usize,
    receive_memory: usize,
    on_handler_error: OnHandlerError,
    liveness: Liveness,
    sessions: bool,
    session_window: usize,
    session_memory: usize,
    tls: Option<TlsServer>,
}

impl Default for ListenerBuilder {
    fn default() -> Self {
        ListenerBuilder {
            prefix: Prefix::default(),
            max_message_size: 0,
            max_connections: 65_536,
            frame_deadline: Some(Duration::from_secs(30)),
            idle_deadline: None,
            reply_memory: 1024 * 1024,
            receive_memory: 1024 * 1024 * 1024,
            on_handler_error: OnHandlerError::default(),
            liveness: Liveness::default(),
            sessions: true,
            session_window: 4 * 1024 * 1024,
            session_memory: 256 * 1024 * 1024,
            tls: None,
        }
    }
}

impl ListenerBuilder {
    /// How a length stands before a message. Default [`Prefix::Buffstreams`].
    pub fn prefix(mut self, prefix: Prefix) -> Self {
        self.prefix = prefix;
        self
    }

    /// The largest message, in bytes; 0 stands for the default of 4096 bytes, or 255 for [`Prefix::U8`].
    ///
    /// With [`Prefix::Buffstreams`] the width of the prefix follows from it, so both sides must use the same.
    pub fn max_message_size(mut self, bytes: usize) -> Self {
        self.max_message_size = bytes;
        self
    }

    /// How many connections may be open at a time; further ones are closed at once. Default 65,536.
    pub fn max_connections(mut self, most: usize) -> Self {
        self.max_connections = most;
        self
    }

    /// How long a frame may take from its first byte to its last; slow bytes do not extend it. Default 30 s; `None` for
    /// as long as it likes.
    pub fn frame_deadline(mut self, allowed: impl Into<Option<Duration>>) -> Self {
        self.frame_deadline = allowed.into();
        self
    }

    /// How long a connection may send nothing at all. Default `None`: as long as it likes.
    pub fn idle_deadline(mut self, allowed: impl Into<Option<Duration>>) -> Self {
        self.idle_deadline = allowed.into();
        self
    }

    /// How long a peer may vanish, or refuse to read replies, before its connection is broken (on Linux, by
    /// `TCP_USER_TIMEOUT`). Default 2 minutes; `None` for the system's own time.
    pub fn write_stall(mut self, allowed: impl Into<Option<Duration>>) -> Self {
        self.liveness.write_stall = allowed.into();
        self
    }

    /// Silence after which the kernel asks whether the peer is still there. Default 30 s; `None` for never.
    pub fn keepalive(mut self, after: impl Into<Option<Duration>>) -> Self {
        self.liveness.keepalive = after.into();
        self
    }

    /// Bytes of replies that may wait on one connection. Reading pauses while more than half is taken. Default 1 MiB.
    pub fn reply_memory(mut self, bytes: usize) -> Self {
        self.reply_memory = bytes;
        self
    }

    /// Bytes that unfinished messages of all connections may take together. Who would exceed it is closed. Default 1 GiB.
    pub fn receive_memory(mut self, bytes: usize) -> Self {
        self.receive_memory = bytes;
        self
    }

    /// What happens to a connection whose handler returns an error. Default [`OnHandlerError::Continue`]. On acknowledged
    /// streams the message is tried again whatever this says, and rejected after three times.
    pub fn on_handler_error(mut self, policy: OnHandlerError) -> Self {
        self.on_handler_error = policy;
        self
    }

    /// Whether peers may ask for acknowledged streams ([`Delivery::Acked`](crate::Delivery::Acked)), beside plain ones on
    /// the same port. Default `true`. With prefixes of one or two bytes nobody can ask.
    pub fn sessions(mut self, allowed: bool) -> Self {
        self.sessions = allowed;
        self
    }

    /// Bytes that the sender of an acknowledged stream may have in flight at most: sent, and not acknowledged. Default
    /// 4 MiB. A message of the largest size always may.
    pub fn session_window(mut self, bytes: usize) -> Self {
        self.session_window = bytes;
        self
    }

    /// Bytes of the windows of all acknowledged streams together, which are reserved while they are connected. When they
    /// are used up, further streams get smaller windows, and in the end none. Default 256 MiB.
    pub fn session_memory(mut self, bytes: usize) -> Self {
        self.session_memory = bytes;
        self
    }

    /// Speaks TLS with every peer, plain ones and acknowledged streams alike. Default: with none.
    #[cfg(feature = "__tls")]
    pub fn tls(mut self, tls: TlsServer) -> Self {
        self.tls = Some(tls);
        self
    }

    /// Listens on an address; see [`Address`] for how one is written.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::InvalidAddress`], [`ErrorKind::InvalidConfiguration`] if the prefix cannot express the maximum, and
    /// [`ErrorKind::Bind`].
    pub async fn bind<A>(self, address: A) -> Result<Listener>
    where
        A: TryInto<Address>,
        Error: From<A::Error>,
    {
        let framing = self.framing()?;
        let acceptor = Acceptor::bind(&address.try_into()?).await?;
        let address = acceptor
            .local_address()
            .map_err(|error| Error::new(ErrorKind::Io, format!("the socket has no address: {error}")).because(error))?;
        let (phase, _) = watch::channel(ServerPhase::Serving);
        Ok(Listener { acceptor, address, framing, settings: self, stopper: Stopper { phase: Arc::new(phase) } })
    }

    /// Serves one open stream as if it had been accepted: a pipe, a socket that another process passed on, a tunnel.
    /// Returns why its input ended, when all work on it is finished and all replies are written.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::InvalidConfiguration`], also if there is to be TLS: that of such a stream is made by who brings it.
    ///
    /// # Cancel safety
    ///
    /// Not cancel safe: if the future is dropped, the connection is cut.
    pub async fn serve_io<S: Service>(
        self,
        io: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
        service: S,
    ) -> Result<Ended> {
        let framing = self.framing()?;
        if self.tls.is_some() {
            let text = "a stream that is brought is served as it is: bring one that TLS is spoken over already";
            return Err(Error::new(ErrorKind::InvalidConfiguration, text));
        }
        let house = Arc::new(House::new(service, self.demands(framing), self.reply_memory, self.grant(framing)));
        Ok(house.serve(Transport::Io(Box::new(io)), PeerAddress::Io).await)
    }

    fn demands(&self, framing: Framing) -> Demands {
        Demands {
            framing,
            frame_deadline: self.frame_deadline,
            idle_deadline: self.idle_deadline,
            close_on_handler_error: self.on_handler_error == OnHandlerError::Close,
            pause_when_congested: true,
            memory: self.receive_memory,
            taken: AtomicUsize::new(0),
            received: Arc::default(),
            handler_errors: Throttle::default(),
            sessions: Talk::Plain,
        }
    }

    /// On which terms sessions are granted, and in how much memory.
    fn grant(&self, framing: Framing) -> Option<(Terms, usize)> {
        let terms = Terms {
            maximum: framing.max_message_size(),
            window: self.session_window,
            heartbeat: (LEAST_HEARTBEAT, LONGEST_HEARTBEAT),
        };
        self.sessions.then_some((terms, self.session_memory))
    }

    fn framing(&self) -> Result<Framing> {
        Ok(Framing::with_max(self.prefix, self.max_message_size)?)
    }
}

/// A bound socket. Connections wait in the kernel until it is served.
///
/// ```
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use std::time::Duration;
/// use buffstreams::{Connection, Listener};
///
/// let listener = Listener::bind("127.0.0.1:0").await?;
/// let server = listener.spawn(|message: &[u8]| {
///     println!("{} bytes", message.len());
///     Ok(())
/// });
///
/// let connection = Connection::dial(server.local_address()).await?;
/// connection.send(b"hello").await?;
/// connection.close(Duration::from_secs(5)).await?;
///
/// let report = server.shutdown(Duration::from_secs(5)).await;
/// assert_eq!(report.received.messages, 1);
/// # Ok(()) }
/// ```
#[derive(Debug)]
pub struct Listener {
    acceptor: Acceptor,
    address: Address,
    framing: Framing,
    settings: ListenerBuilder,
    stopper: Stopper,
}

impl Listener {
    /// Listens on an address with the default settings.
    ///
    /// # Errors
    ///
    /// As [`ListenerBuilder::bind`].
    pub async fn bind<A>(address: A) -> Result<Listener>
    where
        A: TryInto<Address>,
        Error: From<A::Error>,
    {
        Listener::builder().bind(address).await
    }

    /// Other settings.
    pub fn builder() -> ListenerBuilder {
        ListenerBuilder::default()
    }

    /// Where it listens, with the real port.
    pub fn local_address(&self) -> &Address {
        &self.address
    }

    /// Something that stops it from elsewhere, once it is served.
    pub fn stopper(&self) -> Stopper {
        self.stopper.clone()
    }

    /// Serves until its [`stopper`](Listener::stopper) is used, or the returned future is dropped.
    ///
    /// # Errors
    ///
    /// None at present: errors of single connections, and of accepting them, are logged and counted.
    ///
    /// # Cancel safety
    ///
    /// If the future is dropped the server shuts down in the background, with a deadline of 5 s.
    pub async fn serve<S: Service>(self, service: S) -> Result<ShutdownReport> {
        Ok(self.spawn(service).stopped().await)
    }

    /// Serves in the background.
    ///
    /// # Panics
    ///
    /// Outside a tokio runtime.
    pub fn spawn<S: Service>(self, service: S) -> Server {
        let Listener { acceptor, address, framing, settings, stopper } = self;
        let liveness = settings.liveness;
        let most = settings.max_connections;
        let gate = settings.tls.clone().map(|tls| Arc::new(Gate::new(tls)));
        let house =
            Arc::new(House::new(service, settings.demands(framing), settings.reply_memory, settings.grant(framing)));
        let watching = stopper.phase.subscribe();
        let (report, reported) = watch::channel(None);
        let received = Arc::clone(house.received());
        tokio::spawn(async move {
            let deadline = accept_until_stopped(acceptor, liveness, most, gate, &house, watching).await;
            let (cut, blocked) = house.shut_down(deadline).await;
            let _ = report.send(Some(ShutdownReport { cut, blocked, received: house.received().read() }));
        });
        Server { address, stopper, reported, received }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ServerPhase {
    Serving,
    Stopping(Instant),
}

/// Returns the deadline of the shutdown. The socket is closed then.
async fn accept_until_stopped<S: Service>(
    acceptor: Acceptor,
    liveness: Liveness,
    most: usize,
    gate: Option<Arc<Gate>>,
    house: &Arc<House<S>>,
    mut phase: watch::Receiver<ServerPhase>,
) -> Instant {
    let mut starved = STARVED.0;
    let starved_log = Throttle::new(1, STARVED_LOG);
    let refused_log = Throttle::default();
    let mut stopped = pin!(async move {
        loop {
            if let ServerPhase::Stopping(deadline) = *phase.borrow_and_update() {
                return deadline;
            }
            if phase.changed().await.is_err() {
                return Instant::now() + DROPPED;
            }
        }
    });
    loop {
        let accepted = tokio::select! {
            deadline = &mut stopped => return deadline,
            accepted = acceptor.accept(liveness) => accepted,
        };
        match accepted {
            Ok((_, peer)) if house.open_connections() >= most => {
                count_both(&house.received().refused, &house.received().refused_too_many);
                refused_log
                    .warn(|left_out| tracing::warn!(%peer, most, left_out, "connection refused: too many are open"));
            }
            Ok((io, peer)) => {
                starved = STARVED.0;
                let house = Arc::clone(house);
                match gate.as_ref().map(Gate::enter) {
                    None => drop(tokio::spawn(house.serve(io, peer))),
                    Some(Some(handshake)) => drop(tokio::spawn(house.serve_secured(io, peer, handshake))),
                    Some(None) => {
                        count_both(&house.received().refused, &house.received().refused_handshakes);
                        refused_log.warn(|left_out| {
                            tracing::warn!(%peer, left_out, "connection refused: too many TLS handshakes are under way");
                        });
                    }
                }
            }
            Err(error) if is_about_one_connection(&error) => {}
            Err(error) => {
                starved_log.warn(|left_out| tracing::warn!(%error, left_out, "cannot accept connections; trying on"));
                tokio::select! {
                    deadline = &mut stopped => return deadline,
                    () = tokio::time::sleep(starved) => starved = (starved * 2).min(STARVED.1),
                }
            }
        }
    }
}

/// Whether an error of accept is the fate of the connection that was to be accepted.
fn is_about_one_connection(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset, Interrupted};
    matches!(error.kind(), ConnectionAborted | ConnectionRefused | ConnectionReset | Interrupted)
}

/// A listener that is being served in the background.
///
/// Dropping it shuts it down in the background, with a deadline of 5 s.
pub struct Server {
    address: Address,
    stopper: Stopper,
    reported: watch::Receiver<Option<ShutdownReport>>,
    received: Arc<Received>,
}

impl fmt::Debug for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Server").field("address", &self.address).finish_non_exhaustive()
    }
}

impl Server {
    /// Where it listens, with the real port.
    pub fn local_address(&self) -> &Address {
        &self.address
    }

    /// What it has received so far.
    pub fn stats(&self) -> ReceivedStats {
        self.received.read()
    }

    /// Whether it has shut down, or is gone with its runtime.
    pub(crate) fn has_ended(&self) -> bool {
        self.reported.has_changed().is_err()
    }

    /// Something that stops it from elsewhere.
    pub fn stopper(&self) -> Stopper {
        self.stopper.clone()
    }

    /// Accepts no more connections, closes idle ones at once, lets others finish what they have in hand, and cuts what
    /// is left when the deadline has passed. When it returns the port is free.
    ///
    /// In hand is what was received whole. What a peer has sent that was not received yet is lost, as in any stop of a
    /// plain receiver.
    ///
    /// # Cancel safety
    ///
    /// If the future is dropped the shutdown goes on in the background.
    pub async fn shutdown(self, deadline: Duration) -> ShutdownReport {
        self.stopper.stop(deadline);
        self.stopped().await
    }

    /// Waits until somebody has [stopped](Stopper::stop) it, and it has ended.
    ///
    /// # Cancel safety
    ///
    /// If the future is dropped, the server is, too.
    pub async fn stopped(mut self) -> ShutdownReport {
        let report = self.reported.wait_for(Option::is_some).await.ok().and_then(|report| *report);
        // Without a report the runtime is going down, and nothing more can be said than what was counted.
        report.unwrap_or_else(|| ShutdownReport { cut: 0, blocked: 0, received: self.received.read() })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stopper.stop(DROPPED);
    }
}

/// Stops a [`Server`] from elsewhere. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Stopper {
    phase: Arc<watch::Sender<ServerPhase>>,
}

impl Stopper {
    /// Begins the shutdown; see [`Server::shutdown`]. The first call decides the deadline.
    pub fn stop(&self, deadline: Duration) {
        self.phase.send_if_modified(|phase| {
            let serving = *phase == ServerPhase::Serving;
            if serving {
                *phase = ServerPhase::Stopping(deadline_in(deadline));
            }
            serving
        });
    }
}

/// How a shutdown went.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct ShutdownReport {
    /// Connections that had not finished by the deadline, and were cut.
    pub cut: usize,
    /// Those of them whose handlers block their thread and are still there.
    pub blocked: usize,
    /// What was received, from start to end.
    pub received: ReceivedStats,
}
