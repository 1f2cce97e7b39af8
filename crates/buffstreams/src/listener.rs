//! Bind, accept, limit, shut down. What happens on an accepted socket is the matter of `house.rs`.
//!
//! A stranger's bytes can end their own connection and nothing else. When the server is gone its port is free.

use std::fmt;
use std::io;
use std::num::NonZeroU32;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use ipnet::IpNet;
use tokio::sync::watch;

use crate::door::{self, Crowd, FromOne, Full};
use crate::error::{Error, ErrorKind, Result};
use crate::events::{ServerEvent, ServerEvents, Watched};
use crate::handler::Service;
use crate::handshake::{Gate, Handshake};
use crate::house::{Cut, House};
use crate::log::Throttle;
use crate::memory::MemoryBudget;
use crate::proto::framing::{Framing, Prefix};
use crate::proto::session::liveness::INTERVALS;
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
///
#[doc = include_str!("../limits.md")]
#[derive(Clone, Debug)]
#[must_use = "a builder does nothing until it is told to bind or to serve"]
pub struct ListenerBuilder {
    prefix: Prefix,
    max_message_size: usize,
    max_connections: usize,
    max_connections_per_address: FromOne,
    allowed: Option<Vec<IpNet>>,
    max_handshakes: usize,
    handshake_deadline: Option<Duration>,
    frame_deadline: Option<Duration>,
    idle_deadline: Option<Duration>,
    reply_memory: usize,
    receive_memory: MemoryBudget,
    max_message_rate: Option<NonZeroU32>,
    on_handler_error: OnHandlerError,
    liveness: Liveness,
    sessions: bool,
    session_window: usize,
    session_memory: usize,
    tls: Option<TlsServer>,
    name: Option<String>,
}

impl Default for ListenerBuilder {
    fn default() -> Self {
        ListenerBuilder {
            prefix: Prefix::default(),
            max_message_size: 0,
            max_connections: 65_536,
            max_connections_per_address: FromOne { most: Some(1024), counts_loopback: false },
            allowed: None,
            max_handshakes: 256,
            handshake_deadline: Some(Duration::from_secs(10)),
            frame_deadline: Some(Duration::from_secs(30)),
            idle_deadline: None,
            reply_memory: 1024 * 1024,
            receive_memory: MemoryBudget::of_process(),
            max_message_rate: None,
            on_handler_error: OnHandlerError::default(),
            liveness: Liveness::default(),
            sessions: true,
            session_window: 4 * 1024 * 1024,
            session_memory: 256 * 1024 * 1024,
            tls: None,
            name: None,
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
    ///
    /// Each takes a file descriptor: where the process may have fewer, connections wait to be accepted until there are some.
    pub fn max_connections(mut self, most: usize) -> Self {
        self.max_connections = most;
        self
    }

    /// How many connections from one address may be open at a time; further ones are closed at once. Default 1,024, and any
    /// number from loopback addresses, which are this machine. A number that is set holds for these, too; `None` is no limit.
    ///
    /// An IPv6 address counts as its /64: that is the least that a customer is given, so whoever has one address there has
    /// all of them. Behind a proxy or a NAT, all who come through it are one address. Unix sockets are not counted.
    pub fn max_connections_per_address(mut self, most: impl Into<Option<usize>>) -> Self {
        self.max_connections_per_address = FromOne { most: most.into(), counts_loopback: true };
        self
    }

    /// Lets in who comes from one of these networks, or from one that an earlier call named; everybody else is closed at
    /// once. Default: everybody may come. With an empty list, nobody may.
    ///
    /// Unix sockets are no matter of networks: who may use one is said by the permissions of its file.
    ///
    /// ```
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// use buffstreams::Listener;
    ///
    /// let builder = Listener::builder().allow(["10.0.0.0/8".parse()?, "2001:db8::/32".parse()?]);
    /// # Ok(()) }
    /// ```
    pub fn allow(mut self, networks: impl IntoIterator<Item = IpNet>) -> Self {
        self.allowed.get_or_insert_default().extend(networks);
        self
    }

    /// How long a peer may take to come to terms: with TLS, from the accept until that handshake is over; in an acknowledged
    /// stream, from its first byte until it has said which one it is. Default 10 s; `None` for as long as it likes.
    ///
    /// A plain peer without TLS has no handshake, and may be silent from the start: there is the
    /// [idle deadline](Self::idle_deadline) for that.
    pub fn handshake_deadline(mut self, allowed: impl Into<Option<Duration>>) -> Self {
        self.handshake_deadline = allowed.into();
        self
    }

    /// How many TLS handshakes may be under way at a time, and a quarter as many with one address that is not of this
    /// machine; who comes beyond that is closed at once. Default 256.
    ///
    /// Who comes when all places are taken, and has fewer of them than another address, gets the place of that one's oldest
    /// handshake, which counts as failed. So silent strangers keep others out only if they come from about as many addresses
    /// as there are places; an IPv6 address counts as its /64 here, too.
    #[cfg(feature = "__tls")]
    pub fn max_handshakes(mut self, most: usize) -> Self {
        self.max_handshakes = most;
        self
    }

    /// How long a frame may take from its first byte to its last; slow bytes do not extend it. Default 30 s; `None` for
    /// as long as it likes.
    pub fn frame_deadline(mut self, allowed: impl Into<Option<Duration>>) -> Self {
        self.frame_deadline = allowed.into();
        self
    }

    /// How long a connection may send nothing at all, also from its start on. Default `None`: as long as it likes.
    ///
    /// There is none by default, because many honest clients are silent: those that listen more than they speak, and those
    /// that have something to say once a day. To close on such a client can cost it a message that was on its way. A silent
    /// connection costs 1.9 KiB and a descriptor, and how many a stranger may have is bounded; one whose peer has vanished
    /// is found by [keepalive](Self::keepalive), and acknowledged streams have heartbeats.
    pub fn idle_deadline(mut self, allowed: impl Into<Option<Duration>>) -> Self {
        self.idle_deadline = allowed.into();
        self
    }

    /// How long a peer may vanish, or refuse to read replies, before its connection is broken (on Linux, by
    /// `TCP_USER_TIMEOUT`, which counts up to 24 days). Default 2 minutes; `None` for the system's own time.
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

    /// Bytes that unfinished messages of all connections may take together; also those of other listeners and connections,
    /// if the budget is shared. Who would exceed it is closed. Default [`MemoryBudget::of_process`], 1 GiB.
    pub fn receive_memory(mut self, memory: impl Into<MemoryBudget>) -> Self {
        self.receive_memory = memory.into();
        self
    }

    /// How many messages of one connection are handled in a second, at most; a tenth of it at once. Default `None`: as many
    /// as there are.
    ///
    /// Nothing is refused or lost for it. A connection that sends faster is not read for a while, so that its sender waits;
    /// in an acknowledged stream messages wait for their turn within the window, and acknowledgements and heartbeats do not.
    /// What is in hand at a shutdown is finished without waiting.
    #[cfg(feature = "rate-limit")]
    pub fn max_message_rate(mut self, per_second: impl Into<Option<NonZeroU32>>) -> Self {
        self.max_message_rate = per_second.into();
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
    /// 4 MiB, and less where very many are connected: no more than an equal part of half the
    /// [memory](Self::session_memory). A message of the largest size always may.
    pub fn session_window(mut self, bytes: usize) -> Self {
        self.session_window = bytes;
        self
    }

    /// Bytes that messages of all acknowledged streams may take which were received and wait for their handlers. Default
    /// 256 MiB.
    ///
    /// To ask for a window takes nothing of it. While half of it is taken, a connection that comes to hold more than an equal
    /// part of the other half is closed, and its sender comes back later with what was not handled; so those who flood their handlers
    /// keep nobody else out. Beyond this memory goes only the largest message of each connection, if that is more than its
    /// part.
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

    /// What spans of `tracing` and metrics call the listener. Default: spans nothing, and metrics the address.
    pub fn name(mut self, name: impl Into<String>) -> Self {
        self.name = Some(name.into());
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

    /// Whether it speaks TLS.
    pub(crate) fn has_tls(&self) -> bool {
        self.tls.is_some()
    }

    /// Everything but who is let in.
    pub(crate) fn house<S: Service>(&self, service: S, framing: Framing, address: &str, crowd: Crowd) -> Arc<House<S>> {
        let (demands, grant) = (self.demands(framing), self.grant(framing));
        Arc::new(House::new(service, demands, self.reply_memory, grant, crowd, self.name.clone(), address))
    }

    fn demands(&self, framing: Framing) -> Demands {
        Demands {
            framing,
            frame_deadline: self.frame_deadline,
            idle_deadline: self.idle_deadline,
            handshake_deadline: self.handshake_deadline,
            max_message_rate: self.max_message_rate,
            close_on_handler_error: self.on_handler_error == OnHandlerError::Close,
            pause_when_congested: true,
            memory: self.receive_memory.clone(),
            received: Arc::default(),
            handler_errors: Throttle::default(),
            sessions: Talk::Plain,
        }
    }

    /// On which terms sessions are granted, and in how much memory.
    fn grant(&self, framing: Framing) -> Option<(Terms, usize)> {
        let terms = Terms { maximum: framing.max_message_size(), window: self.session_window, heartbeat: INTERVALS };
        self.sessions.then_some((terms, self.session_memory))
    }

    pub(crate) fn framing(&self) -> Result<Framing> {
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
#[must_use = "a listener does nothing until it is served"]
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
        let crowd = Crowd::new(settings.max_connections, settings.max_connections_per_address);
        let house = settings.house(service, framing, &address.to_string(), crowd);
        let deadline = settings.handshake_deadline.unwrap_or(Duration::MAX);
        let gate = settings.tls.map(|tls| Arc::new(Gate::new(tls, deadline, settings.max_handshakes)));
        let porter =
            Porter { house: Arc::clone(&house), allowed: settings.allowed, gate, refused_log: Throttle::default() };
        let liveness = settings.liveness;
        let watching = stopper.phase.subscribe();
        let (report, reported) = watch::channel(None);
        let received = Arc::clone(house.received());
        let events = Arc::clone(house.events());
        tokio::spawn(async move {
            let deadline = accept_until_stopped(acceptor, liveness, &porter, watching).await;
            let Cut { cut, blocked, unfinished, unhandled } = house.shut_down(deadline).await;
            house.meter().publish();
            house.events().tell(|| ServerEvent::Closed);
            let received = house.received().read();
            let _ = report.send(Some(ShutdownReport { cut, blocked, unfinished, unhandled, received }));
        });
        Server { address, stopper, reported, received, events }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ServerPhase {
    Serving,
    Stopping(Instant),
}

/// Decides who is served.
struct Porter<S> {
    house: Arc<House<S>>,
    allowed: Option<Vec<IpNet>>,
    gate: Option<Arc<Gate>>,
    refused_log: Throttle,
}

impl<S: Service> Porter<S> {
    /// Serves a connection, or closes it and says why.
    fn receive(&self, io: Transport, peer: PeerAddress) {
        let Porter { house, allowed, gate, refused_log } = self;
        let received = house.received();
        let refuse = |reason, why: &dyn fmt::Display| {
            count_both(&received.refused, reason);
            house.events().tell(|| ServerEvent::Refused { peer: peer.clone(), why: why.to_string() });
            refused_log.warn(|left_out| tracing::warn!(%peer, left_out, "connection refused: {why}"));
        };
        if allowed.as_ref().is_some_and(|allowed| !door::is_in(allowed, &peer)) {
            return refuse(&received.refused_not_allowed, &"its address is not one of those allowed");
        }
        let handshake: Option<Handshake> = match gate.as_ref().map(|gate| gate.enter(&peer)).transpose() {
            Ok(handshake) => handshake,
            Err(full) => {
                return refuse(&received.refused_handshakes, &format_args!("of TLS handshakes, {full}"));
            }
        };
        match house.admit(&peer) {
            Err(full @ Full::InAll(_)) => return refuse(&received.refused_too_many, &full),
            Err(full @ Full::FromOne(_)) => return refuse(&received.refused_from_address, &full),
            Ok(()) => {}
        }
        let house = Arc::clone(house);
        match handshake {
            None => drop(tokio::spawn(house.serve(io, peer))),
            Some(handshake) => drop(tokio::spawn(house.serve_secured(io, peer, handshake))),
        }
    }

    /// Closes the socket.
    fn close(&self, acceptor: Acceptor) {
        let waiting = acceptor.close();
        let received = self.house.received();
        received.refused.fetch_add(waiting, Ordering::Relaxed);
        received.refused_stopping.fetch_add(waiting, Ordering::Relaxed);
    }
}

/// Returns the deadline of the shutdown. The socket is closed then.
async fn accept_until_stopped<S: Service>(
    acceptor: Acceptor,
    liveness: Liveness,
    porter: &Porter<S>,
    mut phase: watch::Receiver<ServerPhase>,
) -> Instant {
    let mut starved = STARVED.0;
    let starved_log = Throttle::new(1, STARVED_LOG);
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
    let deadline = loop {
        let accepted = tokio::select! {
            deadline = &mut stopped => break deadline,
            accepted = acceptor.accept(liveness) => accepted,
        };
        match accepted {
            Ok((io, peer)) => {
                starved = STARVED.0;
                porter.receive(io, peer);
            }
            Err(error) if is_about_one_connection(&error) => {}
            Err(error) => {
                starved_log.warn(|left_out| tracing::warn!(%error, left_out, "cannot accept connections; trying on"));
                tokio::select! {
                    deadline = &mut stopped => break deadline,
                    () = tokio::time::sleep(starved) => starved = (starved * 2).min(STARVED.1),
                }
            }
        }
    };
    porter.close(acceptor);
    deadline
}

/// Whether an error of accept is the fate of the connection that was to be accepted.
fn is_about_one_connection(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset, Interrupted};
    matches!(error.kind(), ConnectionAborted | ConnectionRefused | ConnectionReset | Interrupted)
}

/// A listener that is being served in the background.
///
/// Dropping it shuts it down in the background, with a deadline of 5 s.
#[must_use = "a server that is dropped shuts down: keep it, or wait until it has `stopped`"]
pub struct Server {
    address: Address,
    stopper: Stopper,
    reported: watch::Receiver<Option<ShutdownReport>>,
    received: Arc<Received>,
    events: Arc<Watched<ServerEvent>>,
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

    /// What happens to its connections from now on. A slow watcher misses the oldest of more than 64 events, and is told.
    /// While nobody watches, nothing is done for it.
    pub fn events(&self) -> ServerEvents {
        ServerEvents::new(self.events.watch(|| self.has_ended()))
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
    /// In hand is what was received whole. What a plain peer has sent that was not received yet is lost, as in any stop of a
    /// plain receiver. The sender of an acknowledged stream is told (GOODBYE): it sends no further message, waits until those
    /// on their way are handled and acknowledged, and keeps all others for the next listener.
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
        report.unwrap_or_else(|| ShutdownReport { received: self.received.read(), ..ShutdownReport::default() })
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

/// How a shutdown went: what was handled, refused and cut.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct ShutdownReport {
    /// Connections that had not finished by the deadline, and were cut.
    pub cut: usize,
    /// Those of them whose handlers block their thread and are still there.
    pub blocked: usize,
    /// Those of the cut ones that had something in hand: a message that was received whole and not handled, a handler at
    /// work, or a reply to be written. The others only waited for a peer who said nothing more.
    pub unfinished: usize,
    /// Messages that were received whole on connections that were cut, and not given to a handler. In acknowledged streams
    /// their senders still have them. What blocked handlers leave is not known.
    pub unhandled: u64,
    /// What was received, from start to end: [handled](ReceivedStats::messages), and
    /// [refused](ReceivedStats::refused), among them who [came too late](ReceivedStats::refused_stopping).
    pub received: ReceivedStats,
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The limits of the table, with their defaults.
    fn table() -> Vec<(&'static str, &'static str)> {
        let rows = include_str!("../limits.md").lines().filter(|line| line.starts_with("| `"));
        let cells = rows.map(|row| row.split(" | ").collect::<Vec<_>>());
        cells.map(|cells| (cells[0].trim_start_matches("| `").trim_end_matches('`'), cells[1])).collect()
    }

    fn bytes(number: usize) -> String {
        match number {
            _ if number.is_multiple_of(1 << 30) => format!("{} GiB", number >> 30),
            _ if number.is_multiple_of(1 << 20) => format!("{} MiB", number >> 20),
            _ => format!("{} bytes", count(number)),
        }
    }

    fn count(number: usize) -> String {
        if number < 1000 { number.to_string() } else { format!("{},{:03}", number / 1000, number % 1000) }
    }

    fn time(duration: Option<Duration>) -> String {
        duration.map_or("none".to_owned(), |duration| format!("{duration:?}").replace('s', " s"))
    }

    #[test]
    fn the_table_of_limits_says_the_defaults() {
        let ListenerBuilder {
            prefix: _,
            max_message_size: _,
            max_connections,
            max_connections_per_address,
            allowed,
            max_handshakes,
            handshake_deadline,
            frame_deadline,
            idle_deadline,
            reply_memory,
            receive_memory,
            max_message_rate,
            on_handler_error: _,
            liveness,
            sessions: _,
            session_window,
            session_memory,
            tls: _,
            name: _,
        } = Listener::builder();
        assert!(allowed.is_none() && max_message_rate.is_none() && !max_connections_per_address.counts_loopback);
        let from_one = max_connections_per_address.most.expect("a limit");
        let expected = [
            ("allow", "everybody".to_owned()),
            ("max_connections", count(max_connections)),
            ("max_connections_per_address", format!("{}; loopback as many as it likes", count(from_one))),
            ("max_handshakes", format!("{}; a quarter of them one address", count(max_handshakes))),
            ("handshake_deadline", time(handshake_deadline)),
            ("frame_deadline", time(frame_deadline)),
            ("idle_deadline", time(idle_deadline)),
            ("max_message_size", bytes(Framing::default().max_message_size())),
            ("receive_memory", format!("{} for the process", bytes(receive_memory.limit()))),
            ("session_memory", bytes(session_memory)),
            ("session_window", bytes(session_window)),
            ("max_message_rate", "none".to_owned()),
            ("reply_memory", bytes(reply_memory)),
            ("write_stall", time(liveness.write_stall)),
            ("keepalive", time(liveness.keepalive)),
        ];
        assert!(
            table().iter().map(|(name, default)| (*name, (*default).to_owned())).eq(expected.clone()),
            "{expected:?}"
        );
    }
}
