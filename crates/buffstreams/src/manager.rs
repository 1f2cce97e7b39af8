//! Listeners and connections by address. A map, and no logic of its own.
//!
//! An address is reserved while an open is under way, so two tasks never open the same one; the lock is never held
//! across an await. Whatever ends an open early, dropping its future included, gives the reservation back.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::fmt;
use std::marker::PhantomData;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::connection::{Connection, ConnectionBuilder};
use crate::dialer::State;
use crate::error::{Error, ErrorKind, Result};
use crate::handler::Service;
use crate::listener::{ListenerBuilder, Server, ShutdownReport};
use crate::sender::Receipt;
use crate::shared_outbox::deadline_in;
use crate::stats::{ReceivedStats, Stats};
use crate::transport::{Address, Endpoints};

/// Holds listeners and connections by address. Cheap to clone, and safe to use from any task.
///
/// An address may have a listener and a connection at the same time. It is held as it was written, with the real port
/// in place of port 0: `localhost:5031` and `127.0.0.1:5031` are two addresses here.
///
/// When the last clone is dropped, all listeners shut down, and all connections that nobody else holds close, in the
/// background and with a deadline of 5 s. A service that holds a clone keeps its own listener alive: end it by
/// [`shutdown`](Manager::shutdown).
///
/// ```
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use std::time::Duration;
/// use buffstreams::Manager;
///
/// let manager = Manager::new();
/// let address = manager.listen("127.0.0.1:0", |message: &[u8]| {
///     println!("{} bytes", message.len());
///     Ok(())
/// }).await?;
///
/// manager.dial(&address).await?;
/// manager.send(&address, b"hello").await?;
///
/// let stats = manager.close_connection(&address, Duration::from_secs(5)).await?;
/// assert_eq!(stats.settled, 1);
/// let report = manager.close_listener(&address, Duration::from_secs(5)).await?;
/// assert_eq!(report.received.messages, 1);
/// # Ok(()) }
/// ```
#[derive(Clone, Debug, Default)]
pub struct Manager {
    held: Arc<Held>,
}

/// What became of everything that a [`Manager`] held, in the order of addresses.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct ManagerReport {
    /// How the shutdown of each listener went.
    pub listeners: Vec<(Address, ShutdownReport)>,
    /// What became of the messages of each connection.
    pub connections: Vec<(Address, Stats)>,
}

impl Manager {
    /// Holds nothing yet.
    pub fn new() -> Manager {
        Manager::default()
    }

    /// Listens on an address with the default settings, and serves in the background. Returns the address with the real
    /// port.
    ///
    /// # Errors
    ///
    /// As [`listen_with`](Manager::listen_with).
    ///
    /// # Cancel safety
    ///
    /// As [`listen_with`](Manager::listen_with).
    pub async fn listen<A>(&self, address: A, service: impl Service) -> Result<Address>
    where
        A: TryInto<Address>,
        Error: From<A::Error>,
    {
        self.listen_with(ListenerBuilder::default(), address, service).await
    }

    /// The same with other settings.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::AlreadyOpen`] if a listener is held under this address, or about to be; [`ErrorKind::Closed`] if the
    /// manager was shut down meanwhile; and those of [`ListenerBuilder::bind`].
    ///
    /// # Cancel safety
    ///
    /// If the future is dropped, there is no listener, and the address can be listened on.
    pub async fn listen_with<A>(&self, builder: ListenerBuilder, address: A, service: impl Service) -> Result<Address>
    where
        A: TryInto<Address>,
        Error: From<A::Error>,
    {
        let address = address.try_into()?;
        let reservation = self.held.listeners.reserve(&address)?;
        let listener = builder.bind::<&Address>(&address).await?;
        let address = with_port_of(address, listener.local_address());
        reservation.open(&address, || listener.spawn(service))?;
        Ok(address)
    }

    /// Connects to an address with the default settings; tries once. After that the connection keeps itself open. Of
    /// several [endpoints](Endpoints), the connection is held under the first.
    ///
    /// # Errors
    ///
    /// As [`dial_with`](Manager::dial_with).
    ///
    /// # Cancel safety
    ///
    /// As [`dial_with`](Manager::dial_with).
    pub async fn dial<A>(&self, address: A) -> Result<Connection>
    where
        A: TryInto<Endpoints>,
        Error: From<A::Error>,
    {
        self.dial_with(ConnectionBuilder::default(), address).await
    }

    /// The same with other settings.
    ///
    /// A connection that was closed, or that has given up, makes way for the new one.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::AlreadyOpen`] if a connection is held under this address, or about to be; [`ErrorKind::Closed`] if
    /// the manager was shut down meanwhile; and those of [`ConnectionBuilder::dial`].
    ///
    /// # Cancel safety
    ///
    /// If the future is dropped, there is no connection, and the address can be dialled.
    pub async fn dial_with<A>(&self, builder: ConnectionBuilder<impl Service>, address: A) -> Result<Connection>
    where
        A: TryInto<Endpoints>,
        Error: From<A::Error>,
    {
        let endpoints = address.try_into()?;
        let reservation = self.held.connections.reserve(endpoints.first())?;
        let connection = builder.dial::<&Endpoints>(&endpoints).await?;
        reservation.open(endpoints.first(), || connection.clone())?;
        Ok(connection)
    }

    /// Holds a connection that tries to reach its peer as its retry policy says; returns at once.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::AlreadyOpen`] as [`dial_with`](Manager::dial_with), and those of [`ConnectionBuilder::dial_lazy`].
    ///
    /// # Panics
    ///
    /// Outside a tokio runtime.
    pub fn dial_lazy_with<A>(&self, builder: ConnectionBuilder<impl Service>, address: A) -> Result<Connection>
    where
        A: TryInto<Endpoints>,
        Error: From<A::Error>,
    {
        let endpoints = address.try_into()?;
        let reservation = self.held.connections.reserve(endpoints.first())?;
        let connection = builder.dial_lazy::<&Endpoints>(&endpoints)?;
        reservation.open(endpoints.first(), || connection.clone())?;
        Ok(connection)
    }

    /// Sends a message over the connection that is held under an address. It does not dial.
    ///
    /// Whoever sends many messages to one address saves looking it up by keeping the
    /// [`connection`](Manager::connection).
    ///
    /// # Errors
    ///
    /// [`ErrorKind::NotOpen`], [`ErrorKind::InvalidAddress`], and those of [`Sender::send`](crate::Sender::send).
    ///
    /// # Cancel safety
    ///
    /// Cancel safe: if the future is dropped before it is ready, the message was not accepted.
    pub async fn send<A>(&self, address: A, message: &[u8]) -> Result<Receipt>
    where
        A: TryInto<Endpoints>,
        Error: From<A::Error>,
    {
        let endpoints = address.try_into()?;
        let address = endpoints.first();
        let connection = self.held.connections.find(address).ok_or_else(|| not_open::<Connection>(address))?;
        connection.send(message).await
    }

    /// The connection that is held under an address: open, or ended and not yet dialled again or closed.
    pub fn connection<A: TryInto<Endpoints>>(&self, address: A) -> Option<Connection> {
        self.held.connections.find(address.try_into().ok()?.first())
    }

    /// All connections that are held, in the order of addresses.
    pub fn connections(&self) -> Vec<(Address, Connection)> {
        self.held.connections.list(Connection::clone)
    }

    /// All listeners that are held, and what they have received so far, in the order of addresses.
    pub fn listeners(&self) -> Vec<(Address, ReceivedStats)> {
        self.held.listeners.list(Server::stats)
    }

    /// Shuts a listener down, as [`Server::shutdown`]: when this returns, its port is free.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::NotOpen`], also for all but the first of several calls, and [`ErrorKind::InvalidAddress`].
    ///
    /// # Cancel safety
    ///
    /// If the future is dropped after its first poll the shutdown goes on in the background.
    pub async fn close_listener<A>(&self, address: A, deadline: Duration) -> Result<ShutdownReport>
    where
        A: TryInto<Address>,
        Error: From<A::Error>,
    {
        let server = self.held.listeners.take(&address.try_into()?)?;
        Ok(server.shutdown(deadline).await)
    }

    /// Closes a connection for everybody who holds it, as [`Connection::close`]. One that has ended by itself counts as
    /// held, so that its last account can be had here.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::NotOpen`], also for all but the first of several calls, and [`ErrorKind::InvalidAddress`].
    ///
    /// # Cancel safety
    ///
    /// If the future is dropped after its first poll the close goes on in the background.
    pub async fn close_connection<A>(&self, address: A, deadline: Duration) -> Result<Stats>
    where
        A: TryInto<Endpoints>,
        Error: From<A::Error>,
    {
        let connection = self.held.connections.take(address.try_into()?.first())?;
        connection.close(deadline).await
    }

    /// Shuts everything down that is held: the listeners, and then, so that their handlers can send to the end, the
    /// connections in what is left of the time.
    ///
    /// What is being opened at that moment is given up. The manager can be used again afterwards.
    ///
    /// # Cancel safety
    ///
    /// If the future is dropped after its first poll everything goes on in the background; connections then close as
    /// when they are dropped.
    pub async fn shutdown(&self, deadline: Duration) -> ManagerReport {
        let until = deadline_in(deadline);
        let servers = self.held.listeners.take_all();
        let connections = self.held.connections.take_all();
        let mut report = ManagerReport::default();
        for (_, server) in &servers {
            server.stopper().stop(deadline);
        }
        for (address, server) in servers {
            report.listeners.push((address, server.stopped().await));
        }
        let left = until.saturating_duration_since(Instant::now());
        for (_, connection) in &connections {
            connection.begin_close(left);
        }
        for (address, connection) in connections {
            connection.closed().await;
            report.connections.push((address, connection.stats()));
        }
        report
    }
}

/// The address as it was written, with the port that it came to be.
fn with_port_of(written: Address, bound: &Address) -> Address {
    match (written, bound) {
        (Address::Tcp { host, .. }, Address::Tcp { port, .. }) => Address::Tcp { host, port: *port },
        (written, _) => written,
    }
}

#[derive(Debug, Default)]
struct Held {
    listeners: Shelf<Server>,
    connections: Shelf<Connection>,
}

/// What can be held under an address.
trait Holdable {
    const NAME: &'static str;

    /// Whether it is over, so that another may take its place.
    fn has_ended(&self) -> bool;
}

impl Holdable for Server {
    const NAME: &'static str = "listener";

    fn has_ended(&self) -> bool {
        Server::has_ended(self)
    }
}

impl Holdable for Connection {
    const NAME: &'static str = "connection";

    fn has_ended(&self) -> bool {
        self.state() == State::Closed
    }
}

fn not_open<T: Holdable>(address: &Address) -> Error {
    Error::new(ErrorKind::NotOpen, format!("no {} is open on {address}", T::NAME))
}

fn already_open<T: Holdable>(address: &Address) -> Error {
    Error::new(ErrorKind::AlreadyOpen, format!("a {} is already open on {address}; close it first", T::NAME))
}

/// All that is held of one kind.
struct Shelf<T> {
    state: Mutex<ShelfState<T>>,
}

struct ShelfState<T> {
    places: HashMap<Address, Place<T>>,
    /// How often everything was taken away. A reservation from before that is void.
    round: u64,
}

enum Place<T> {
    /// Reserved in this round.
    Reserved(u64),
    Taken(T),
}

impl<T> Default for Shelf<T> {
    fn default() -> Self {
        Shelf { state: Mutex::new(ShelfState { places: HashMap::new(), round: 0 }) }
    }
}

impl<T> fmt::Debug for Shelf<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.lock().places.keys()).finish()
    }
}

impl<T> Shelf<T> {
    fn lock(&self) -> MutexGuard<'_, ShelfState<T>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn find(&self, address: &Address) -> Option<T>
    where
        T: Clone,
    {
        match self.lock().places.get(address) {
            Some(Place::Taken(held)) => Some(held.clone()),
            _ => None,
        }
    }

    fn list<U>(&self, show: impl Fn(&T) -> U) -> Vec<(Address, U)> {
        let state = self.lock();
        let taken = state.places.iter().filter_map(|(address, place)| match place {
            Place::Taken(held) => Some((address.clone(), show(held))),
            Place::Reserved(_) => None,
        });
        let mut list: Vec<_> = taken.collect();
        list.sort_by(|(one, _), (other, _)| one.cmp(other));
        list
    }

    /// Takes everything away, and makes reservations void.
    fn take_all(&self) -> Vec<(Address, T)> {
        let mut state = self.lock();
        state.round += 1;
        let places = std::mem::take(&mut state.places);
        drop(state);
        let taken = places.into_iter().filter_map(|(address, place)| match place {
            Place::Taken(held) => Some((address, held)),
            Place::Reserved(_) => None,
        });
        let mut list: Vec<_> = taken.collect();
        list.sort_by(|(one, _), (other, _)| one.cmp(other));
        list
    }
}

impl<T: Holdable> Shelf<T> {
    /// Keeps the address for an open that begins. With port 0 there is nothing to keep: every open gets its own.
    fn reserve(&self, address: &Address) -> Result<Reservation<'_, T>> {
        let mut state = self.lock();
        let round = state.round;
        let mut ended = None;
        let address = match address {
            Address::Tcp { port: 0, .. } => None,
            _ => {
                match state.places.entry(address.clone()) {
                    Entry::Occupied(mut place) => match place.get() {
                        Place::Taken(held) if held.has_ended() => {
                            ended = Some(place.insert(Place::Reserved(round)));
                        }
                        _ => return Err(already_open::<T>(address)),
                    },
                    Entry::Vacant(place) => drop(place.insert(Place::Reserved(round))),
                }
                Some(address.clone())
            }
        };
        drop(state);
        drop(ended);
        Ok(Reservation { shelf: self, address, round, kind: PhantomData })
    }

    fn take(&self, address: &Address) -> Result<T> {
        match self.lock().places.entry(address.clone()) {
            Entry::Occupied(place) if matches!(place.get(), Place::Taken(_)) => match place.remove() {
                Place::Taken(held) => Ok(held),
                Place::Reserved(_) => unreachable!("it was just looked at"),
            },
            _ => Err(not_open::<T>(address)),
        }
    }
}

/// The right to open something, given back when it is dropped.
struct Reservation<'a, T> {
    shelf: &'a Shelf<T>,
    address: Option<Address>,
    round: u64,
    kind: PhantomData<T>,
}

impl<T: Holdable> Reservation<'_, T> {
    /// Puts what was opened into its place.
    fn open(self, address: &Address, open: impl FnOnce() -> T) -> Result<()> {
        let mut state = self.shelf.lock();
        if state.round != self.round {
            let text = format!("the manager was shut down while a {} was being opened on {address}", T::NAME);
            return Err(Error::new(ErrorKind::Closed, text));
        }
        // A free port may be one that another open has reserved, and cannot get any more.
        if matches!(state.places.get(address), Some(Place::Taken(held)) if !held.has_ended()) {
            return Err(already_open::<T>(address));
        }
        let before = state.places.insert(address.clone(), Place::Taken(open()));
        drop(state);
        drop(before);
        Ok(())
    }
}

impl<T> Drop for Reservation<'_, T> {
    fn drop(&mut self) {
        let Some(address) = &self.address else { return };
        let mut state = self.shelf.lock();
        if matches!(state.places.get(address), Some(Place::Reserved(round)) if *round == self.round) {
            state.places.remove(address);
        }
    }
}
