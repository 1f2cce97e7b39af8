//! The library for code without an async runtime: the same handles, and calls that block the thread.
//!
//! Everything here wraps its async counterpart and adds no queue and no thread of its own to it. The sockets belong to
//! one runtime in the background, which all of this module shares:
//!
//! * It starts with the first listener or connection, and lives as long as the process. It has a thread for each core,
//!   four at most, named `buffstreams`.
//! * The closures of a [`Listener`] run on further threads of that name, where they may block: one for each connection
//!   that has messages at that moment, up to 512. A thread that is no longer needed ends after 10 s.
//! * Dropping a handle ends what it stands for, and leaves no thread behind but those.
//!
//! Any number of threads may call at the same time. Settings come from the async side:
//! [`Connection::builder`](crate::Connection::builder) and [`Listener::builder`](crate::Listener::builder).
//!
//! # Panics
//!
//! Nothing here may be called from async code: a call that has to wait panics there, with the message of tokio's
//! `block_on` ("Cannot start a runtime from within a runtime"), rather than hold up the runtime's thread. A call that
//! need not wait (a `send` with room, for one) may go well, so do not count on the panic. Use the async side there; or
//! tokio's `spawn_blocking`, in which all of this works.
//!
//! The first call panics if the operating system has no threads left for the runtime.
//!
//! ```
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! use std::time::Duration;
//! use buffstreams::blocking::{Connection, Listener};
//!
//! let server = Listener::bind("127.0.0.1:0")?.spawn(|message: &[u8]| {
//!     println!("{} bytes", message.len());
//!     Ok(())
//! });
//!
//! let connection = Connection::dial(server.local_address())?;
//! connection.send(b"hello")?;
//! let stats = connection.close(Duration::from_secs(5))?;
//! assert_eq!(stats.settled, 1);
//!
//! let report = server.shutdown(Duration::from_secs(5));
//! assert_eq!(report.received.messages, 1);
//! # Ok(()) }
//! ```

use std::future::Future;
use std::ops::Deref;
use std::sync::LazyLock;
use std::sync::mpsc::RecvTimeoutError;
use std::thread::available_parallelism;
use std::time::Duration;

use bytes::Bytes;
use tokio::runtime::Runtime;

use crate::blocking_handler::blocking_handler;
use crate::connection::ConnectionBuilder;
use crate::dialer::State;
use crate::error::{Error, ErrorKind, Refused, Result};
use crate::handler::{HandlerResult, Peer, Service};
use crate::listener::{ListenerBuilder, ShutdownReport, Stopper};
use crate::proto::framing::Framing;
use crate::sender::{Flushed, Receipt};
use crate::stats::{ReceivedStats, Stats};
use crate::transport::{Address, Endpoints};

/// The most threads for sockets. One moves more bytes than most programs that block can produce.
const MOST_WORKERS: usize = 4;

static RUNTIME: LazyLock<Runtime> = LazyLock::new(|| {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(available_parallelism().map_or(1, usize::from).min(MOST_WORKERS))
        .thread_name("buffstreams")
        .enable_all()
        .build()
        .expect("the operating system gives threads for the runtime")
});

fn wait<T>(future: impl Future<Output = T>) -> T {
    RUNTIME.block_on(future)
}

/// Sends messages over one connection. Cheap to clone; any number of threads may use it at the same time.
///
/// Made from the async [`Sender`](crate::Sender) by `From`, so it also sends replies to a [`Peer`].
#[derive(Clone, Debug)]
pub struct Sender {
    sender: crate::Sender,
}

impl From<crate::Sender> for Sender {
    fn from(sender: crate::Sender) -> Sender {
        Sender { sender }
    }
}

impl Sender {
    /// The async one beneath.
    #[cfg(any(feature = "buffa", feature = "prost"))]
    pub(crate) fn beneath(&self) -> &crate::Sender {
        &self.sender
    }

    /// The framing that messages are sent in, with their maximum size.
    pub fn framing(&self) -> Framing {
        self.sender.framing()
    }

    /// Sends a message; returns when it is accepted into bounded memory.
    ///
    /// It waits only if there is no room. There is no need to batch: what is sent while the socket is busy is written
    /// together.
    ///
    /// # Errors
    ///
    /// As the async [`send`](crate::Sender::send).
    pub fn send(&self, message: &[u8]) -> Result<Receipt> {
        match self.sender.try_send(message) {
            Err(error) if error.kind() == ErrorKind::Full => wait(self.sender.send(message)),
            result => result,
        }
    }

    /// The same, for a message that is worth sending only for so long.
    ///
    /// # Errors
    ///
    /// As the async [`send_expiring`](crate::Sender::send_expiring).
    pub fn send_expiring(&self, message: &[u8], expires_in: Duration) -> Result<Receipt> {
        wait(self.sender.send_expiring(message, expires_in))
    }

    /// Sends a message that is owned already; one of 32 KiB or more without copying it.
    ///
    /// # Errors
    ///
    /// As the async [`send_bytes`](crate::Sender::send_bytes); the message comes back with the error.
    pub fn send_bytes(&self, message: Bytes) -> Result<Receipt, Refused> {
        match self.sender.try_send_bytes(message) {
            Err(refused) if refused.error.kind() == ErrorKind::Full => wait(self.sender.send_bytes(refused.message)),
            result => result,
        }
    }

    /// Sends a message of `length` bytes that `encode` appends to the buffer that will be written.
    ///
    /// # Errors
    ///
    /// As the async [`send_with`](crate::Sender::send_with).
    ///
    /// # Panics
    ///
    /// As the async [`send_with`](crate::Sender::send_with).
    pub fn send_with(&self, length: usize, mut encode: impl FnMut(&mut Vec<u8>)) -> Result<Receipt> {
        match self.sender.try_send_with(length, &mut encode) {
            Err(error) if error.kind() == ErrorKind::Full => wait(self.sender.send_with(length, encode)),
            result => result,
        }
    }

    /// Sends a message if there is room at once. It never waits.
    ///
    /// # Errors
    ///
    /// As the async [`try_send`](crate::Sender::try_send).
    pub fn try_send(&self, message: &[u8]) -> Result<Receipt> {
        self.sender.try_send(message)
    }

    /// Sends a message that is owned already, if there is room at once. It never waits.
    ///
    /// # Errors
    ///
    /// As the async [`try_send_bytes`](crate::Sender::try_send_bytes); the message comes back with the error.
    pub fn try_send_bytes(&self, message: Bytes) -> Result<Receipt, Refused> {
        self.sender.try_send_bytes(message)
    }

    /// Waits until the message with this receipt is settled.
    ///
    /// # Errors
    ///
    /// As the async [`settled`](crate::Sender::settled).
    pub fn settled(&self, receipt: Receipt) -> Result<()> {
        wait(self.sender.settled(receipt))
    }

    /// Waits until every message accepted so far is settled or failed; says how many, since the connection began.
    ///
    /// # Errors
    ///
    /// None at present.
    pub fn flush(&self) -> Result<Flushed> {
        wait(self.sender.flush())
    }

    /// What became of all messages of this connection, read at one moment.
    pub fn stats(&self) -> Stats {
        self.sender.stats()
    }
}

/// A dialled connection: survives the loss of its sockets, until it is closed. Cheap to clone.
///
/// It is a [`Sender`]; see there for `send` and its kin. When the last clone is dropped it closes in the background,
/// with a deadline of 5 s.
///
/// ```
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let service = buffstreams::blocking_handler(|message, peer| Ok(drop(peer.sender().try_send(message)?)));
/// # let server = buffstreams::blocking::Listener::bind("127.0.0.1:0")?.spawn_service(service);
/// # let address = server.local_address();
/// use buffstreams::{blocking, messages};
///
/// let (service, received) = messages();
/// let builder = buffstreams::Connection::builder().max_message_size(4096).handler(service);
/// let connection = blocking::Connection::dial_with(builder, address)?;
/// let mut received = blocking::Messages::from(received);
///
/// connection.send(b"echo")?;
/// let (answer, _peer) = received.recv().expect("the connection is open");
/// assert_eq!(answer, "echo");
/// # Ok(()) }
/// ```
#[derive(Clone, Debug)]
pub struct Connection {
    connection: crate::Connection,
    sender: Sender,
}

impl From<crate::Connection> for Connection {
    fn from(connection: crate::Connection) -> Connection {
        let sender = Sender::from(crate::Sender::clone(&connection));
        Connection { connection, sender }
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
    pub fn dial<A>(address: A) -> Result<Connection>
    where
        A: TryInto<Endpoints>,
        Error: From<A::Error>,
    {
        Connection::dial_with(ConnectionBuilder::default(), address)
    }

    /// The same with other settings.
    ///
    /// The builder's handler and its [`on_failed`](ConnectionBuilder::on_failed) run on the runtime's threads, and must
    /// not block them.
    ///
    /// # Errors
    ///
    /// As [`ConnectionBuilder::dial`].
    pub fn dial_with<A>(builder: ConnectionBuilder<impl Service>, address: A) -> Result<Connection>
    where
        A: TryInto<Endpoints>,
        Error: From<A::Error>,
    {
        wait(builder.dial(address)).map(Connection::from)
    }

    /// Returns at once; the connection tries to reach its peer as its retry policy says, and messages wait meanwhile.
    ///
    /// # Errors
    ///
    /// As [`ConnectionBuilder::dial_lazy`].
    pub fn dial_lazy_with<A>(builder: ConnectionBuilder<impl Service>, address: A) -> Result<Connection>
    where
        A: TryInto<Endpoints>,
        Error: From<A::Error>,
    {
        let _inside = RUNTIME.enter();
        builder.dial_lazy(address).map(Connection::from)
    }

    /// Where it stands now.
    pub fn state(&self) -> State {
        self.connection.state()
    }

    /// Why the peer refused an acknowledged stream; see [`Connection::refusal`](crate::Connection::refusal).
    pub fn refusal(&self) -> Option<String> {
        self.connection.refusal()
    }

    /// What came back from the other side, over all sockets.
    pub fn received(&self) -> ReceivedStats {
        self.connection.received()
    }

    /// Gives up the socket at hand and connects anew at once; what is not settled is sent again there.
    pub fn reopen(&self) {
        self.connection.reopen();
    }

    /// Accepts no more messages, settles what is in hand, and ends the stream, as the async
    /// [`close`](crate::Connection::close). What is not settled by the deadline fails. For all clones.
    ///
    /// # Errors
    ///
    /// None at present. A second close returns the same.
    pub fn close(&self, deadline: Duration) -> Result<Stats> {
        wait(self.connection.close(deadline))
    }

    /// Waits until the connection is closed, or has given up.
    pub fn closed(&self) {
        wait(self.connection.closed());
    }
}

/// The messages that a [`MessagesService`](crate::MessagesService) received, to be pulled, or iterated over.
///
/// Made by `From` out of what [`messages`](crate::messages) returns; its service is for
/// [`Listener::spawn_service`], or for the [`handler`](ConnectionBuilder::handler) of a connection.
#[derive(Debug)]
pub struct Messages {
    messages: crate::Messages,
}

impl From<crate::Messages> for Messages {
    fn from(messages: crate::Messages) -> Messages {
        Messages { messages }
    }
}

impl Messages {
    /// Waits for the next message, and who sent it; `None` when no more will come.
    pub fn recv(&mut self) -> Option<(Bytes, Peer)> {
        wait(self.messages.recv())
    }

    /// The same, for no longer than this.
    ///
    /// # Errors
    ///
    /// [`RecvTimeoutError::Timeout`] if none came, [`RecvTimeoutError::Disconnected`] when no more will come.
    pub fn recv_timeout(&mut self, most: Duration) -> Result<(Bytes, Peer), RecvTimeoutError> {
        match wait(async { tokio::time::timeout(most, self.messages.recv()).await }) {
            Ok(next) => next.ok_or(RecvTimeoutError::Disconnected),
            Err(_) => Err(RecvTimeoutError::Timeout),
        }
    }
}

impl Iterator for Messages {
    type Item = (Bytes, Peer);

    fn next(&mut self) -> Option<(Bytes, Peer)> {
        self.recv()
    }
}

/// A bound socket. Connections wait in the kernel until it is served.
#[derive(Debug)]
#[must_use = "a listener does nothing until it is served"]
pub struct Listener {
    listener: crate::Listener,
}

impl Listener {
    /// Listens on an address with the default settings.
    ///
    /// # Errors
    ///
    /// As [`ListenerBuilder::bind`].
    pub fn bind<A>(address: A) -> Result<Listener>
    where
        A: TryInto<Address>,
        Error: From<A::Error>,
    {
        Listener::bind_with(ListenerBuilder::default(), address)
    }

    /// The same with other settings.
    ///
    /// # Errors
    ///
    /// As [`ListenerBuilder::bind`].
    pub fn bind_with<A>(builder: ListenerBuilder, address: A) -> Result<Listener>
    where
        A: TryInto<Address>,
        Error: From<A::Error>,
    {
        wait(builder.bind(address)).map(|listener| Listener { listener })
    }

    /// Where it listens, with the real port.
    pub fn local_address(&self) -> &Address {
        self.listener.local_address()
    }

    /// Serves in the background: the closure gets every message, on a thread where it may block.
    ///
    /// The messages of a connection come one at a time and in order. While the closure works on what one read has
    /// brought (up to 256 KiB, or one large message), that connection is not read.
    pub fn spawn<F>(self, work: F) -> Server
    where
        F: Fn(&[u8]) -> HandlerResult + Send + Sync + 'static,
    {
        self.spawn_service(blocking_handler(move |message: &[u8], _: &Peer| work(message)))
    }

    /// Serves in the background with any service of the async side. Its handlers run on the runtime's threads and must
    /// not block them, nor call this module; for replies from code that blocks there is
    /// [`blocking_handler`](crate::blocking_handler).
    pub fn spawn_service(self, service: impl Service) -> Server {
        let _inside = RUNTIME.enter();
        Server { server: self.listener.spawn(service) }
    }
}

/// A listener that is being served in the background.
///
/// Dropping it shuts it down in the background, with a deadline of 5 s.
#[derive(Debug)]
#[must_use = "a server that is dropped shuts down: keep it, or shut it down"]
pub struct Server {
    server: crate::Server,
}

impl Server {
    /// Where it listens, with the real port.
    pub fn local_address(&self) -> &Address {
        self.server.local_address()
    }

    /// What it has received so far.
    pub fn stats(&self) -> ReceivedStats {
        self.server.stats()
    }

    /// Something that stops it from elsewhere.
    pub fn stopper(&self) -> Stopper {
        self.server.stopper()
    }

    /// Stops it, as the async [`shutdown`](crate::Server::shutdown). When it returns the port is free.
    pub fn shutdown(self, deadline: Duration) -> ShutdownReport {
        wait(self.server.shutdown(deadline))
    }

    /// Waits until somebody has [stopped](Stopper::stop) it, and it has ended.
    pub fn stopped(self) -> ShutdownReport {
        wait(self.server.stopped())
    }
}
