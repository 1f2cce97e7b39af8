//! The handle over a shared Outbox: send, flush, and what became of a message. A connection's and a reply's alike.
//!
//! `send` encodes into the Outbox under a short lock and wakes the socket's task only if that has nothing to write. It
//! never touches a socket itself, so a dropped `send` can tear no frame: a message is accepted whole, or not at all.

use std::cell::Cell;
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;

use crate::error::{Error, ErrorKind, Refused, Result};
use crate::proto::framing::Framing;
use crate::proto::outbox::{Fate, Outbox};
use crate::shared_outbox::{Claim, Refusing, SharedOutbox};
use crate::stats::Stats;

/// How many sends of a thread, those in the express lane not counted, make one unit of work in tokio's cooperative budget
/// (128 units a turn). A turn of small messages is then less than a millisecond; much shorter ones make smaller batches.
const SENDS_PER_UNIT: u32 = 4;

/// The number of an accepted message on its connection: counted from 0, in the order of acceptance. With a spool: its number
/// in the stream, counted from 1 over all processes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Receipt {
    number: u64,
}

impl Receipt {
    pub(crate) fn new(number: u64) -> Receipt {
        Receipt { number }
    }

    /// The number, the same as in [`FailedMessage::number`](crate::FailedMessage::number).
    pub fn number(&self) -> u64 {
        self.number
    }
}

/// What became of all messages that were accepted before a flush.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Flushed {
    /// How many reached the promised level.
    pub settled: u64,
    /// How many were given up, and went to where failed messages go. After more than a thousand separate runs of failures
    /// some later ones may be counted in.
    pub failed: u64,
}

/// Waits for its share of tokio's cooperative budget, so that a loop of sends that are always ready lets others run.
pub(crate) async fn cooperate() {
    thread_local! {
        static SENDS: Cell<u32> = const { Cell::new(0) };
    }
    let due = SENDS.with(|sends| {
        sends.set(sends.get().wrapping_add(1));
        sends.get().is_multiple_of(SENDS_PER_UNIT)
    });
    if due {
        tokio::task::coop::consume_budget().await;
    }
}

/// Sends messages over one connection. Cheap to clone; any number of tasks may use it at the same time.
///
/// A [`Connection`](crate::Connection) is one for the messages of a dialled connection, and
/// [`Peer::sender`](crate::Peer::sender) is one for replies.
pub struct Sender {
    shared: Arc<SharedOutbox>,
}

impl Clone for Sender {
    fn clone(&self) -> Sender {
        Sender::new(&self.shared)
    }
}

impl Drop for Sender {
    fn drop(&mut self) {
        self.shared.leave();
    }
}

impl fmt::Debug for Sender {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sender").field("stats", &self.stats()).finish_non_exhaustive()
    }
}

impl Sender {
    pub(crate) fn new(shared: &Arc<SharedOutbox>) -> Sender {
        shared.enter();
        Sender { shared: Arc::clone(shared) }
    }

    pub(crate) fn shared(&self) -> &Arc<SharedOutbox> {
        &self.shared
    }

    /// The framing that messages are sent in, with their maximum size.
    pub fn framing(&self) -> Framing {
        self.shared.framing()
    }

    /// Sends a message; returns when it is accepted into bounded memory.
    ///
    /// From then on it is the library's: it will be settled, or come back as failed. Messages sent one after the other
    /// arrive in that order. There is no need to batch them: what is sent while the socket is busy is written together.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::TooLarge`], [`ErrorKind::Closed`], and with [`Overflow::Fail`](crate::Overflow::Fail) also [`ErrorKind::Full`].
    ///
    /// # Cancel safety
    ///
    /// Cancel safe: if the future is dropped before it is ready, the message was not accepted.
    pub async fn send(&self, message: &[u8]) -> Result<Receipt> {
        match self.send_in_lane(message) {
            Some(receipt) => Ok(receipt),
            None => self.accept_slice(message, None).await,
        }
    }

    /// The same, for a message that is worth sending only for so long: if none of it was written by then, it fails with
    /// [`FailedReason::Expired`](crate::FailedReason::Expired). It may live up to a sixteenth longer; a reply on an
    /// accepted connection, until the next write is due.
    ///
    /// # Errors
    ///
    /// As [`send`](Sender::send).
    ///
    /// # Cancel safety
    ///
    /// As [`send`](Sender::send).
    pub async fn send_expiring(&self, message: &[u8], expires_in: Duration) -> Result<Receipt> {
        self.accept_slice(message, Some(expires_in)).await
    }

    /// Most messages go this way: a lock, one comparison, and a copy into the tail chunk.
    #[inline]
    fn send_in_lane(&self, message: &[u8]) -> Option<Receipt> {
        self.shared.accept_in_lane(message.len(), |outbox| outbox.push_in_lane(message)).map(Receipt::new)
    }

    async fn accept_slice(&self, message: &[u8], lives: Option<Duration>) -> Result<Receipt> {
        cooperate().await;
        let shared = &*self.shared;
        let push = |outbox: &mut Outbox, expires| outbox.push(message, expires, Instant::now);
        match shared.accept(message.len(), lives, Claim::None, push) {
            Ok(number) => Ok(Receipt::new(number)),
            Err(Refusing::Full) if shared.lets_wait() => {
                let waited = shared.accept_in_turn(message.len(), lives, push).await;
                waited.map(Receipt::new).map_err(|refusing| shared.error(refusing, message.len()))
            }
            Err(refusing) => Err(shared.error(refusing, message.len())),
        }
    }

    /// Sends a message that is owned already; one of 32 KiB or more without copying it.
    ///
    /// # Errors
    ///
    /// As [`send`](Sender::send); the message comes back with the error.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe: if the future is dropped before it is ready, the message was not accepted.
    pub async fn send_bytes(&self, message: Bytes) -> Result<Receipt, Refused> {
        if let Some(receipt) = self.send_in_lane(&message) {
            return Ok(receipt);
        }
        cooperate().await;
        let shared = &*self.shared;
        let length = message.len();
        let push = |outbox: &mut Outbox, expires| outbox.push_bytes(message.clone(), expires, Instant::now);
        let result = match shared.accept(length, None, Claim::None, push) {
            Err(Refusing::Full) if shared.lets_wait() => shared.accept_in_turn(length, None, push).await,
            result => result,
        };
        result.map(Receipt::new).map_err(|refusing| Refused::new(shared.error(refusing, length), message))
    }

    /// Sends a message if there is room at once.
    ///
    /// # Errors
    ///
    /// As [`send`](Sender::send), and [`ErrorKind::Full`] whatever the overflow policy.
    pub fn try_send(&self, message: &[u8]) -> Result<Receipt> {
        if let Some(receipt) = self.send_in_lane(message) {
            return Ok(receipt);
        }
        let push = |outbox: &mut Outbox, expires| outbox.push(message, expires, Instant::now);
        let result = self.shared.accept(message.len(), None, Claim::None, push);
        result.map(Receipt::new).map_err(|refusing| self.shared.error(refusing, message.len()))
    }

    /// Sends a message that is owned already, if there is room at once.
    ///
    /// # Errors
    ///
    /// As [`try_send`](Sender::try_send); the message comes back with the error.
    pub fn try_send_bytes(&self, message: Bytes) -> Result<Receipt, Refused> {
        if let Some(receipt) = self.send_in_lane(&message) {
            return Ok(receipt);
        }
        let push = |outbox: &mut Outbox, expires| outbox.push_bytes(message.clone(), expires, Instant::now);
        let result = self.shared.accept(message.len(), None, Claim::None, push);
        result.map(Receipt::new).map_err(|refusing| Refused::new(self.shared.error(refusing, message.len()), message))
    }

    /// Sends a message of `length` bytes that `encode` appends to the buffer that will be written: no copy, and no
    /// buffer of the caller's.
    ///
    /// `encode` must append exactly `length` bytes and change nothing before them. It runs under the connection's lock,
    /// so it should do nothing but encode, and it may run on another sender's turn: it is called at most once.
    ///
    /// # Errors
    ///
    /// As [`send`](Sender::send).
    ///
    /// # Panics
    ///
    /// If `encode` panics or appends another number of bytes; the message is then not accepted.
    ///
    /// # Cancel safety
    ///
    /// As [`send`](Sender::send).
    pub async fn send_with(&self, length: usize, mut encode: impl FnMut(&mut Vec<u8>)) -> Result<Receipt> {
        let shared = &*self.shared;
        let encode_in_lane = |outbox: &mut Outbox| outbox.push_with(length, None, Instant::now, &mut encode);
        if let Some(number) = shared.accept_in_lane(length, encode_in_lane) {
            return Ok(Receipt::new(number));
        }
        cooperate().await;
        let mut push = |outbox: &mut Outbox, expires| outbox.push_with(length, expires, Instant::now, &mut encode);
        let result = match shared.accept(length, None, Claim::None, &mut push) {
            Err(Refusing::Full) if shared.lets_wait() => shared.accept_in_turn(length, None, push).await,
            result => result,
        };
        result.map(Receipt::new).map_err(|refusing| shared.error(refusing, length))
    }

    /// The same, if there is room at once.
    ///
    /// # Errors
    ///
    /// As [`try_send`](Sender::try_send).
    ///
    /// # Panics
    ///
    /// As [`send_with`](Sender::send_with).
    pub fn try_send_with(&self, length: usize, encode: impl FnOnce(&mut Vec<u8>)) -> Result<Receipt> {
        let push = |outbox: &mut Outbox, expires| outbox.push_with(length, expires, Instant::now, encode);
        let result = self.shared.accept(length, None, Claim::None, push);
        result.map(Receipt::new).map_err(|refusing| self.shared.error(refusing, length))
    }

    /// Waits until the message with this receipt is settled. Every write wakes all who wait like this: to wait for many
    /// messages, [`flush`](Sender::flush).
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Failed`] if it was given up; [`ErrorKind::Forgotten`] if that cannot be told.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe.
    pub async fn settled(&self, receipt: Receipt) -> Result<()> {
        let number = receipt.number;
        match self.shared.fate_of(number).await {
            Fate::Failed => {
                let text = format!("message {number} failed; it went to where failed messages go");
                Err(Error::new(ErrorKind::Failed, text))
            }
            Fate::Forgotten => {
                let text =
                    format!("nothing is known of message {number}: it was sent elsewhere, or too many failed since");
                Err(Error::new(ErrorKind::Forgotten, text))
            }
            Fate::Settled => Ok(()),
            Fate::InFlight => unreachable!("that was waited for"),
        }
    }

    /// Waits until every message accepted so far is settled or failed; says how many, since the connection began.
    ///
    /// # Errors
    ///
    /// None at present.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe.
    pub async fn flush(&self) -> Result<Flushed> {
        let (messages, failed) = self.shared.flushed().await;
        Ok(Flushed { settled: messages - failed, failed })
    }

    /// What became of all messages of this connection, read at one moment.
    pub fn stats(&self) -> Stats {
        self.shared.stats()
    }
}
