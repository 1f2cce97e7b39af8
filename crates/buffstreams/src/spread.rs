//! One sender over several connections: each message goes to the one with the least in hand.
//!
//! Each connection keeps its own order, account and retries, and its messages: none is moved to another. It holds no
//! queue of its own, and no lock: what is looked at of each connection are two flags and a number.

use std::fmt;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::Notify;

use crate::connection::{Connection, ConnectionBuilder};
use crate::error::{Error, ErrorKind, Refused, Result};
use crate::handler::Service;
use crate::route::Home;
use crate::sender::{Flushed, cooperate};
use crate::stats::Stats;
use crate::transport::{Endpoints, Place};

impl<S: Service> ConnectionBuilder<S> {
    /// Holds a connection to every one of several [endpoints](Endpoints), and of a name to every address that it stands for
    /// now; messages are spread over them by who has the least in hand. Each tries to reach its peer as the retry policy
    /// says, and has the [memory](Self::memory) of one.
    ///
    /// A name is resolved anew before each attempt; a connection whose address it stands for no longer takes another of
    /// those that it does.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::InvalidAddress`], [`ErrorKind::InvalidConfiguration`], and [`ErrorKind::Connect`] if a name cannot be
    /// resolved.
    ///
    /// # Cancel safety
    ///
    /// If the future is dropped, there are no connections.
    pub async fn dial_spread<A>(self, endpoints: A) -> Result<Spread>
    where
        A: TryInto<Endpoints>,
        Error: From<A::Error>,
    {
        let endpoints = endpoints.try_into()?;
        let mut homes = Vec::new();
        for address in endpoints.addresses() {
            let places = Place::all_of(address).await.map_err(|error| {
                Error::new(ErrorKind::Connect, format!("cannot connect to {address}: {error}")).because(error)
            })?;
            let numbered = places.into_iter().enumerate();
            homes.extend(numbered.map(|(number, place)| (address.clone(), Home { place, number })));
        }
        let room = Arc::new(Notify::new());
        let start = |(address, home)| {
            let connection = self.start_at(address, home)?;
            connection.shared().watch_room(Arc::clone(&room));
            Ok(connection)
        };
        let connections: Vec<_> = homes.into_iter().map(start).collect::<Result<_>>()?;
        Ok(Spread { connections: connections.into(), room, lets_wait: self.lets_wait() })
    }
}

/// Connections to several endpoints, over which messages are spread: each goes to the one that has the fewest bytes in
/// hand, of those that are connected. Cheap to clone; made by [`ConnectionBuilder::dial_spread`].
///
/// Messages keep their order on each connection, and none across them. A message stays with the connection that accepted
/// it: if its peer is lost it waits for that one to come back, and if the connection gives up, by its retry policy or the
/// message's expiry, it goes to where failed messages go. A connection that has given up gets no more; the others go on.
///
/// When the last clone is dropped all connections close in the background, with a deadline of 5 s.
///
/// ```
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # use buffstreams::{Connection, Listener};
/// # let one = Listener::bind("127.0.0.1:0").await?.spawn(|_: &[u8]| Ok(()));
/// # let other = Listener::bind("127.0.0.1:0").await?.spawn(|_: &[u8]| Ok(()));
/// # let (one, other) = (one.local_address(), other.local_address());
/// use std::time::Duration;
///
/// let spread = Connection::builder().dial_spread([one, other]).await?;
/// for number in 0..1000u32 {
///     spread.send(&number.to_be_bytes()).await?;
/// }
/// let stats = spread.close(Duration::from_secs(5)).await?;
/// assert_eq!((stats.accepted, stats.settled), (1000, 1000));
/// # Ok(()) }
/// ```
#[derive(Clone)]
pub struct Spread {
    connections: Arc<[Connection]>,
    /// There may be room, or a socket, where there was none.
    room: Arc<Notify>,
    lets_wait: bool,
}

impl fmt::Debug for Spread {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Spread").field("connections", &self.connections).finish_non_exhaustive()
    }
}

impl Spread {
    /// Sends a message over one of the connections; returns when that has accepted it into its memory. Where the least
    /// burdened has no room, it waits for the first that has, if the overflow policy lets it.
    ///
    /// # Errors
    ///
    /// As [`Sender::send`](crate::Sender::send); [`ErrorKind::Closed`] when all connections are.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe: if the future is dropped before it is ready, the message was not accepted.
    pub async fn send(&self, message: &[u8]) -> Result<()> {
        cooperate().await;
        match self.try_send(message) {
            Err(error) if error.kind() == ErrorKind::Full && self.lets_wait => {}
            result => return result,
        }
        loop {
            let mut room = pin!(self.room.notified());
            room.as_mut().enable();
            match self.try_send(message) {
                Err(error) if error.kind() == ErrorKind::Full => room.await,
                result => return result,
            }
        }
    }

    /// The same for a message that is owned; one of 32 KiB or more is not copied.
    ///
    /// # Errors
    ///
    /// As [`send`](Self::send); the message comes back with the error.
    ///
    /// # Cancel safety
    ///
    /// As [`send`](Self::send).
    pub async fn send_bytes(&self, message: Bytes) -> Result<(), Refused> {
        cooperate().await;
        let mut message = match self.try_send_bytes(message) {
            Err(refused) if refused.error.kind() == ErrorKind::Full && self.lets_wait => refused.message,
            result => return result,
        };
        loop {
            let mut room = pin!(self.room.notified());
            room.as_mut().enable();
            match self.try_send_bytes(message) {
                Err(refused) if refused.error.kind() == ErrorKind::Full => message = refused.message,
                result => return result,
            }
            room.await;
        }
    }

    /// Sends a message if the least burdened connection has room at once.
    ///
    /// # Errors
    ///
    /// As [`send`](Self::send), and [`ErrorKind::Full`] whatever the overflow policy.
    pub fn try_send(&self, message: &[u8]) -> Result<()> {
        while let Some(connection) = self.least() {
            match connection.try_send(message) {
                // It has just ended: the next look does not find it.
                Err(error) if error.is_closed() => {}
                result => return result.map(drop),
            }
        }
        Err(closed())
    }

    /// The same for a message that is owned.
    ///
    /// # Errors
    ///
    /// As [`try_send`](Self::try_send); the message comes back with the error.
    pub fn try_send_bytes(&self, mut message: Bytes) -> Result<(), Refused> {
        while let Some(connection) = self.least() {
            match connection.try_send_bytes(message) {
                Err(refused) if refused.error.is_closed() => message = refused.message,
                result => return result.map(drop),
            }
        }
        Err(Refused::new(closed(), message))
    }

    /// The connection that is to have the next message; one of several that have equally little, at random.
    fn least(&self) -> Option<&Connection> {
        let (behind, before) = self.connections.split_at(fastrand::usize(..self.connections.len()));
        let all = before.iter().chain(behind);
        let burdened = all.filter_map(|connection| Some((connection.shared().burden()?, connection)));
        burdened.min_by_key(|(burden, _)| *burden).map(|(_, connection)| connection)
    }

    /// Waits until every message accepted so far is settled or failed; says how many, since the beginning.
    ///
    /// # Errors
    ///
    /// None at present.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe.
    pub async fn flush(&self) -> Result<Flushed> {
        let mut all = Flushed { settled: 0, failed: 0 };
        for connection in &*self.connections {
            let Flushed { settled, failed } = connection.flush().await?;
            all.settled += settled;
            all.failed += failed;
        }
        Ok(all)
    }

    /// What became of all messages: the sum of all connections, each read at one moment. It is
    /// [conserved](Stats::is_conserved) as each of them is.
    pub fn stats(&self) -> Stats {
        let mut all = Stats::default();
        for connection in &*self.connections {
            all.add(&connection.stats());
        }
        all
    }

    /// The connections, in the order of the endpoints: to look at, or to close one.
    pub fn connections(&self) -> &[Connection] {
        &self.connections
    }

    /// Waits until all connections are closed, or have given up: until then, messages are accepted.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe.
    pub async fn closed(&self) {
        for connection in &*self.connections {
            connection.closed().await;
        }
    }

    /// Closes all connections at the same time, as [`Connection::close`]; says what became of everything.
    ///
    /// # Errors
    ///
    /// None at present. A second close returns the same.
    ///
    /// # Cancel safety
    ///
    /// If the future is dropped after its first poll the close goes on in the background.
    pub async fn close(&self, deadline: Duration) -> Result<Stats> {
        for connection in &*self.connections {
            connection.begin_close(deadline);
        }
        self.closed().await;
        Ok(self.stats())
    }
}

fn closed() -> Error {
    Error::new(ErrorKind::Closed, "no connection takes messages any more: all were closed, or have given up")
}
