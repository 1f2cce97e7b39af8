//! A connection whose messages are on disk before they are accepted.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::watch;

use super::Spool;
use super::keeper::Keeper;
use super::store::Change;
use crate::connection::{Connection, ConnectionBuilder};
use crate::dialer::State;
use crate::error::{Error, ErrorKind, Refused, Result};
use crate::events::Events;
use crate::failed::FailedTo;
use crate::handler::Service;
use crate::metrics::SpoolTotals;
use crate::proto::session::sending::{EPOCHS, Sending};
use crate::proto::session::wire::StreamId;
use crate::sender::{Flushed, Receipt};
use crate::shared_outbox::SharedOutbox;
use crate::stats::{ReceivedStats, Stats};
use crate::transport::Endpoints;

impl<S: Service> ConnectionBuilder<S> {
    /// Sends what is in the spool and what will be, as one [acknowledged](crate::Delivery::Acked) stream that goes on from
    /// one process to the next. Returns at once; the connection tries to reach its peer as its retry policy says, and
    /// messages wait on disk meanwhile.
    ///
    /// Of several [endpoints](Endpoints), each process begins at the first: at which one an earlier process was is not kept, so
    /// what that had in flight elsewhere may be handled twice.
    ///
    /// A failed message is kept by the spool, and its owner is told after that; a channel only as far as it has room.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::InvalidAddress`]; [`ErrorKind::InvalidConfiguration`], also for an expiry or
    /// [`Overflow::FailOldest`](crate::Overflow::FailOldest), since what is on disk is not dropped; [`ErrorKind::Spool`] if it cannot be written.
    ///
    /// # Panics
    ///
    /// Outside a tokio runtime.
    pub fn dial_spooled<A>(self, address: A, spool: Spool) -> Result<SpooledConnection>
    where
        A: TryInto<Endpoints>,
        Error: From<A::Error>,
    {
        let (mut builder, mut spool) = (self, spool);
        let endpoints = address.try_into()?;
        let (ask, memory, overflow) = builder.for_spool()?;
        spool.may_be_sent(ask.framing.max_message_size())?;
        spool.state.starts += 1;
        spool.store.commit(&Change::default(), spool.state)?;
        let (stream, recovered, state) = (spool.stream_id(), spool.recovered(), spool.state);
        let sending = Sending::new(stream, state.starts.saturating_mul(EPOCHS), ask);
        let outbox = SharedOutbox::spooled(sending, memory, state.done, state.end, recovered);
        let keeper = Keeper::new(spool, Arc::clone(&outbox), overflow);
        let told = {
            let keeper = Arc::clone(&keeper);
            FailedTo::Spool(Arc::new(move || keeper.look()))
        };
        let (connection, owner, meter) = builder.start_spooled(Arc::clone(&outbox), endpoints, told)?;
        meter.watch_spool({
            let keeper = Arc::downgrade(&keeper);
            move || keeper.upgrade().map_or_else(SpoolTotals::default, |keeper| keeper.totals())
        });
        let thread = {
            let keeper = Arc::clone(&keeper);
            move || {
                keeper.run(&owner);
                // What was settled last was not known before.
                drop(meter);
            }
        };
        std::thread::Builder::new()
            .name("buffstreams-spool".into())
            .spawn(thread)
            .map_err(|error| Error::new(ErrorKind::Io, format!("no thread for the spool: {error}")).because(error))?;
        tokio::spawn({
            let ending = Ending(Arc::clone(&keeper));
            async move {
                tokio::select! {
                    () = ending.0.feed() => {}
                    () = outbox.ended() => {}
                }
                outbox.ended().await;
                drop(ending);
            }
        });
        Ok(SpooledConnection { connection, keeper, stream })
    }
}

/// Ends the keeper's thread with the task that it feeds, however that ends.
struct Ending(Arc<Keeper>);

impl Drop for Ending {
    fn drop(&mut self) {
        self.0.end();
    }
}

/// A dialled connection whose messages are on disk when `send` returns, and survive the end of the process. Cheap to clone.
///
/// An awaited `send` costs the time of one fsync. All that are sent meanwhile share the next one, so the way to be fast is
/// to have many under way; `send` futures that are polled in order keep their order:
///
/// ```
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let folder = tempfile::tempdir()?;
/// # let server = buffstreams::Listener::bind("127.0.0.1:0").await?.spawn(|_: &[u8]| Ok(()));
/// # let address = server.local_address();
/// use buffstreams::{Bytes, Connection, Spool};
/// use futures_util::{StreamExt, TryStreamExt, stream};
///
/// let connection = Connection::builder().dial_spooled(address, Spool::open(folder.path())?)?;
/// let messages = (0..10_000u32).map(|number| Bytes::copy_from_slice(&number.to_be_bytes()));
/// stream::iter(messages)
///     .map(|message| connection.send_bytes(message))
///     .buffered(1000) // up to so many wait for an fsync together
///     .try_for_each(|_receipt| async { Ok(()) })
///     .await?;
/// # assert_eq!(connection.stats().accepted, 10_000);
/// # connection.close(std::time::Duration::from_secs(5)).await?;
/// # Ok(()) }
/// ```
///
/// When the last clone is dropped the connection closes in the background, with a deadline of 5 s; what is not settled by
/// then stays in the spool.
#[derive(Clone)]
pub struct SpooledConnection {
    connection: Connection,
    keeper: Arc<Keeper>,
    stream: StreamId,
}

impl fmt::Debug for SpooledConnection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SpooledConnection")
            .field("state", &self.state())
            .field("stats", &self.stats())
            .finish_non_exhaustive()
    }
}

impl SpooledConnection {
    /// Sends a message: returns when it is on disk. Waits while the spool is full. The receipt has its number in the
    /// stream, the one that the receiver's [`Message::number`](crate::Message::number) gives.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::TooLarge`], [`ErrorKind::Closed`], [`ErrorKind::Full`] if the overflow policy does not wait, and
    /// [`ErrorKind::Spool`] if it could not be written: from then on nothing is accepted, and whether this message is on
    /// disk shows when the spool is opened again.
    ///
    /// # Cancel safety
    ///
    /// If the future is dropped before it is ready, the message was accepted whole or not at all.
    pub async fn send(&self, message: &[u8]) -> Result<Receipt> {
        let number = self.keeper.gather(message).await?;
        self.keeper.written(number).await?;
        Ok(Receipt::new(number))
    }

    /// The same for a message that is owned, and comes back with an error.
    ///
    /// # Errors
    ///
    /// As [`send`](Self::send).
    ///
    /// # Cancel safety
    ///
    /// As [`send`](Self::send).
    pub async fn send_bytes(&self, message: Bytes) -> Result<Receipt, Refused> {
        match self.send(&message).await {
            Ok(receipt) => Ok(receipt),
            Err(error) => Err(Refused::new(error, message)),
        }
    }

    /// Waits until the message with this receipt is acknowledged. Every acknowledgement wakes all who wait like this: to
    /// wait for many messages, [`flush`](Self::flush).
    ///
    /// # Errors
    ///
    /// As [`Sender::settled`](crate::Sender::settled), and [`ErrorKind::Closed`] if the connection ended before that: the
    /// message is still in the spool.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe.
    pub async fn settled(&self, receipt: Receipt) -> Result<()> {
        tokio::select! {
            biased;
            settled = self.connection.settled(receipt) => settled,
            () = self.connection.closed() => Err(self.left()),
        }
    }

    /// What it means that the connection is closed before all is settled.
    fn left(&self) -> Error {
        let left = self.stats().in_flight;
        let text = format!("the connection was closed with {left} messages unsettled; they are in the spool");
        Error::new(ErrorKind::Closed, text)
    }

    /// Waits until every message that is in the spool now is acknowledged or failed; says how many were, by then, since the
    /// spool was opened.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Closed`] if the connection ended before that: what was not settled is still in the spool.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe.
    pub async fn flush(&self) -> Result<Flushed> {
        tokio::select! {
            biased;
            flushed = self.connection.flush() => {
                flushed?;
                let Stats { settled, failed, .. } = self.stats();
                Ok(Flushed { settled, failed })
            }
            () = self.connection.closed() => Err(self.left()),
        }
    }

    /// What became of all messages, read at one moment: those that the spool [had](Stats::recovered) when it was opened,
    /// and those accepted since.
    pub fn stats(&self) -> Stats {
        self.connection.stats()
    }

    /// Under which name receivers know the stream of these messages.
    pub fn stream_id(&self) -> StreamId {
        self.stream
    }

    /// Where it stands now.
    pub fn state(&self) -> State {
        self.connection.state()
    }

    /// Where it stands, to be watched. A slow watcher sees the latest state, not every one.
    pub fn states(&self) -> watch::Receiver<State> {
        self.connection.states()
    }

    /// What happens to the connection from now on; see [`Connection::events`].
    pub fn events(&self) -> Events {
        self.connection.events()
    }

    /// Why the peer refused the stream; see [`Connection::refusal`].
    pub fn refusal(&self) -> Option<String> {
        self.connection.refusal()
    }

    /// What came back from the other side, over all sockets.
    pub fn received(&self) -> ReceivedStats {
        self.connection.received()
    }

    /// Gives up the socket at hand and connects anew at once.
    pub fn reopen(&self) {
        self.connection.reopen();
    }

    /// Accepts no more messages, and waits until what is in the spool is acknowledged, or the deadline has come: what is
    /// left then stays in the spool, in flight. The spool can be opened again when this returns.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Spool`] if what was settled could not be written: some of it will be sent again.
    ///
    /// # Cancel safety
    ///
    /// If the future is dropped the close goes on in the background.
    pub async fn close(&self, deadline: Duration) -> Result<Stats> {
        self.connection.close(deadline).await?;
        self.keeper.ended().await?;
        Ok(self.stats())
    }

    /// Waits until the connection is closed, or has given up.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe.
    pub async fn closed(&self) {
        self.connection.closed().await;
    }
}
