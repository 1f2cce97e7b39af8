//! Messages that are on disk before `send` returns: they survive the end of the process.
//!
//! `send` puts a message into the record that is being gathered; a thread writes that record with one fsync, and only then
//! are the sends of it ready; a task reads records in order and feeds the Outbox of an acknowledged stream, which gives
//! messages the numbers that they have on disk. What is acknowledged is removed.

mod connection;
mod keeper;
mod store;

use std::collections::{BTreeSet, VecDeque};
use std::fmt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use bytes::Bytes;

use crate::error::{Error, ErrorKind, Result};
use crate::proto::outbox::Rejection;
use crate::proto::record::{RecordWriter, SpoolState};
use crate::proto::session::wire::StreamId;

pub use connection::SpooledConnection;
use store::{Change, Store};

/// How much goes into one record where messages are put into the spool without a connection.
const RECORD: usize = 1024 * 1024;

/// What a record costs beside its messages, on disk and in memory.
const RECORD_COST: u64 = 256;

/// How to open a spool. Made by [`Spool::builder`].
#[derive(Clone, Copy, Debug)]
#[must_use = "a builder does nothing until it is told to open"]
pub struct SpoolBuilder {
    max_bytes: u64,
}

impl SpoolBuilder {
    /// Bytes that messages in the spool may take together, those that wait and those that failed, with 256 more for each
    /// write; the file is somewhat larger. Default 1 GiB. At the limit `send` waits, or fails if the connection's overflow
    /// policy says so; it fails where nothing but failed messages takes the room.
    pub fn max_bytes(mut self, bytes: u64) -> Self {
        self.max_bytes = bytes;
        self
    }

    /// Opens the spool in this directory; makes both if they are not there. Reads all that is in it, to know that it can be
    /// sent: about a second for a gigabyte. Blocks meanwhile.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Spool`]: another process has it open, the directory cannot be used, or the file is damaged as a whole.
    /// Single records that are damaged are no error; see [`Spool::damage`].
    pub fn open(self, directory: impl AsRef<Path>) -> Result<Spool> {
        Spool::open_with(directory.as_ref(), self.max_bytes)
    }
}

/// A record on disk.
#[derive(Clone, Copy, Debug)]
struct Extent {
    first: u64,
    end: u64,
    /// With [`RECORD_COST`].
    bytes: u64,
}

/// Messages of an acknowledged stream, on disk: those that wait to be sent or acknowledged, and those that failed.
///
/// One process at a time has a spool open. It must not be copied, or restored from a copy: the receiver has then heard more of
/// the stream than the copy knows, and where that shows, the connection is refused. To send from it and into it, give it to
/// [`dial_spooled`](crate::ConnectionBuilder::dial_spooled).
///
/// ```
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let folder = tempfile::tempdir()?;
/// # let directory = folder.path().join("outgoing");
/// # let server = buffstreams::Listener::bind("127.0.0.1:0").await?.spawn(|_: &[u8]| Ok(()));
/// # let address = server.local_address();
/// use std::time::Duration;
/// use buffstreams::{Connection, Spool};
///
/// let spool = Spool::open(&directory)?;
/// println!("{} messages to resume", spool.recovered());
/// let connection = Connection::builder().dial_spooled(address, spool)?;
/// connection.send(b"on disk when this returns").await?;
/// connection.flush().await?; // acknowledged
/// let stats = connection.close(Duration::from_secs(5)).await?;
/// assert_eq!(stats.settled, 1);
/// # Ok(()) }
/// ```
pub struct Spool {
    directory: PathBuf,
    store: Store,
    state: SpoolState,
    extents: VecDeque<Extent>,
    gone: BTreeSet<u64>,
    damage: Vec<SpoolDamage>,
    max_bytes: u64,
    /// How many messages failed, and the bytes they take.
    failed: (u64, u64),
    /// Bytes of the largest message that waits.
    largest: usize,
}

impl fmt::Debug for Spool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Spool")
            .field("directory", &self.directory)
            .field("state", &self.state)
            .field("damage", &self.damage)
            .finish_non_exhaustive()
    }
}

/// Messages of a spool that cannot be read any more.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct SpoolDamage {
    /// The number of the first of them.
    pub from: u64,
    /// The number of the last of them.
    pub to: u64,
    /// What is wrong.
    pub why: String,
}

impl SpoolDamage {
    /// How many messages are lost.
    pub fn messages(&self) -> u64 {
        self.to - self.from + 1
    }
}

impl fmt::Display for SpoolDamage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let SpoolDamage { from, to, why } = self;
        write!(f, "messages {from} to {to} are damaged on disk, and lost: {why}")
    }
}

/// A failed message that a spool keeps.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct SpooledFailure {
    /// Its number in the stream.
    pub number: u64,
    /// Its bytes.
    pub message: Bytes,
    /// What the receiver said of it.
    pub rejection: Rejection,
    /// When that was heard.
    pub at: SystemTime,
}

impl Spool {
    /// Opens the spool in this directory with the default limit of 1 GiB.
    ///
    /// # Errors
    ///
    /// As [`SpoolBuilder::open`].
    pub fn open(directory: impl AsRef<Path>) -> Result<Spool> {
        Spool::builder().open(directory)
    }

    /// Whether there is a spool in this directory.
    pub fn is_in(directory: impl AsRef<Path>) -> bool {
        Store::is_in(directory.as_ref())
    }

    /// Another limit.
    pub fn builder() -> SpoolBuilder {
        SpoolBuilder { max_bytes: 1024 * 1024 * 1024 }
    }

    fn open_with(directory: &Path, max_bytes: u64) -> Result<Spool> {
        Spool::look_through(Store::open(directory)?, directory, max_bytes)
    }

    fn look_through(store: Store, directory: &Path, max_bytes: u64) -> Result<Spool> {
        let state = store.state()?;
        let gone = store.gone()?.into_iter().collect();
        let mut found = Vec::new();
        let mut largest = 0;
        store.records(|first, record| {
            let measured = record.map(|record| (record.end(), record.len() as u64 + RECORD_COST, record));
            found.push((
                first,
                measured.map(|(end, bytes, record)| {
                    largest = record.map(|(_, message)| message.len()).fold(largest, usize::max);
                    (end, bytes)
                }),
            ));
        })?;
        let (mut extents, mut damage, mut remove) = (VecDeque::new(), Vec::new(), Vec::new());
        // What is missing lies between what is known to be done, or the record before, and the next record.
        let mut expected = state.done;
        let mut why = None;
        let mut missing = |from: u64, below: u64, why: Option<String>| {
            if from < below {
                let why = why.unwrap_or_else(|| "nothing is left of them".into());
                damage.push(SpoolDamage { from, to: below - 1, why });
            }
        };
        for (first, record) in found {
            match record {
                Ok((end, bytes)) if end > state.done => {
                    missing(expected, first, why.take());
                    extents.push_back(Extent { first, end, bytes });
                    expected = end;
                }
                Ok(_) => remove.push(first),
                Err(unreadable) => {
                    // Not even its name can be believed: what it had is what lies between its neighbours.
                    why.get_or_insert(unreadable);
                    remove.push(first);
                }
            }
        }
        missing(expected, state.end, why);
        store.find(extents.iter().map(|extent: &Extent| extent.first))?;
        let mut state = state;
        state.end = state.end.max(expected);
        let failed = store.failed_size()?;
        if !remove.is_empty() {
            store.commit(&Change { remove, ..Change::default() }, state)?;
        }
        Ok(Spool { directory: directory.to_owned(), store, state, extents, gone, damage, max_bytes, failed, largest })
    }

    /// The directory.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Under which name receivers know the stream of these messages.
    pub fn stream_id(&self) -> StreamId {
        StreamId::from_bytes(self.state.stream.to_be_bytes())
    }

    /// How many messages wait, from an earlier process, to be sent or acknowledged.
    pub fn recovered(&self) -> u64 {
        let lost = self.extents.front().map_or(0, |front| self.state.done.saturating_sub(front.first));
        let held: u64 = self.extents.iter().map(|extent| extent.end - extent.first).sum();
        held - lost - self.gone.iter().filter(|number| self.holds(**number)).count() as u64
    }

    fn holds(&self, number: u64) -> bool {
        let index = self.extents.partition_point(|extent| extent.end <= number);
        self.extents.get(index).is_some_and(|extent| extent.first <= number)
    }

    /// The number that the next message will get: one more than were ever accepted into this spool. After a crash it tells
    /// which of one's messages was the last to get here.
    pub fn next_number(&self) -> u64 {
        self.state.end
    }

    /// What was found to be damaged when the spool was opened: those messages are lost. They are missed again, with nothing
    /// left of them, whenever it is opened before all earlier ones are settled.
    pub fn damage(&self) -> &[SpoolDamage] {
        &self.damage
    }

    /// Puts messages behind those that wait, while there is no connection: they are sent by the next. On disk when this
    /// returns. Says how many of them there was room for; the others are not taken.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Spool`].
    pub fn append<M: AsRef<[u8]>>(&mut self, messages: impl IntoIterator<Item = M>) -> Result<u64> {
        let (mut writer, mut count) = (RecordWriter::default(), 0);
        for message in messages {
            let message = message.as_ref();
            let taken = self.live_bytes() + self.failed.1 + writer.len() as u64 + RECORD_COST;
            if taken + writer.cost(message.len()) as u64 > self.max_bytes {
                break;
            }
            writer.push(message);
            self.largest = self.largest.max(message.len());
            count += 1;
            if writer.len() >= RECORD {
                self.put_back(&mut writer, &mut Vec::new())?;
            }
        }
        if writer.count() > 0 {
            self.put_back(&mut writer, &mut Vec::new())?;
        }
        Ok(count)
    }

    /// How many failed messages it keeps.
    pub fn failed_count(&self) -> u64 {
        self.failed.0
    }

    /// The failed messages, by ascending number. One that cannot be read is an error, and those behind it follow.
    pub fn failed(&self) -> impl Iterator<Item = Result<SpooledFailure>> {
        let mut from = Some(0);
        std::iter::from_fn(move || {
            let (number, refused) = match self.store.failed_from(from?) {
                Ok(found) => found?,
                Err(error) => {
                    from = None;
                    return Some(Err(error));
                }
            };
            from = number.checked_add(1);
            Some(match refused {
                Ok(refused) => Ok(SpooledFailure {
                    number,
                    message: refused.message,
                    rejection: refused.rejection,
                    at: SystemTime::UNIX_EPOCH + Duration::from_secs(refused.seconds),
                }),
                Err(unreadable) => {
                    let text = format!("failed message {number} is damaged on disk: {unreadable}");
                    Err(Error::new(ErrorKind::Spool, text))
                }
            })
        })
    }

    /// Forgets these failed messages. Returns how many of them there were.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Spool`].
    pub fn drop_failed(&mut self, numbers: &[u64]) -> Result<u64> {
        let forget: Vec<u64> = self.known_failures(numbers)?;
        let count = forget.len() as u64;
        self.store.commit(&Change { forget, ..Change::default() }, self.state)?;
        self.failed = self.store.failed_size()?;
        Ok(count)
    }

    /// Puts these failed messages at the end of those that wait to be sent, under new numbers. Returns how many there were.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Spool`]; those before the one that cannot be read are done.
    pub fn retry_failed(&mut self, numbers: &[u64]) -> Result<u64> {
        let (mut writer, mut forget, mut count) = (RecordWriter::default(), Vec::new(), 0);
        for number in self.known_failures(numbers)? {
            let Some((_, refused)) = self.store.failed_from(number)? else { continue };
            let refused = refused.map_err(|unreadable| {
                Error::new(ErrorKind::Spool, format!("failed message {number} is damaged on disk: {unreadable}"))
            })?;
            writer.push(&refused.message);
            self.largest = self.largest.max(refused.message.len());
            forget.push(number);
            count += 1;
            if writer.len() >= RECORD {
                self.put_back(&mut writer, &mut forget)?;
            }
        }
        if writer.count() > 0 {
            self.put_back(&mut writer, &mut forget)?;
        }
        self.failed = self.store.failed_size()?;
        Ok(count)
    }

    fn put_back(&mut self, writer: &mut RecordWriter, forget: &mut Vec<u64>) -> Result<()> {
        let first = self.state.end;
        let extent = Extent { first, end: first + writer.count(), bytes: writer.len() as u64 + RECORD_COST };
        let state = SpoolState { end: extent.end, ..self.state };
        let change =
            Change { add: Some((first, writer.finish(first))), forget: std::mem::take(forget), ..Change::default() };
        self.store.commit(&change, state)?;
        self.state = state;
        self.extents.push_back(extent);
        Ok(())
    }

    fn known_failures(&self, numbers: &[u64]) -> Result<Vec<u64>> {
        let mut known = Vec::new();
        for number in numbers {
            if self.store.failed_from(*number)?.is_some_and(|(found, _)| found == *number) {
                known.push(*number);
            }
        }
        Ok(known)
    }

    /// That what waits can be sent where no message is longer than `max`.
    fn may_be_sent(&self, max: usize) -> Result<()> {
        let directory = self.directory.display();
        if self.state.unsent > 0 {
            let text = format!(
                "the spool {directory}: the receiver has heard more of its stream than it has sent, up to message {}; it is a \
                 copy, or was restored from one. Send from the spool that went on, or begin another in an empty directory",
                self.state.unsent
            );
            return Err(Error::new(ErrorKind::Spool, text));
        }
        if self.largest > max {
            let largest = self.largest;
            let text = format!(
                "the spool {directory} holds a message of {largest} bytes, over the maximum of {max}: raise it"
            );
            return Err(Error::new(ErrorKind::InvalidConfiguration, text));
        }
        Ok(())
    }

    fn live_bytes(&self) -> u64 {
        self.extents.iter().map(|extent| extent.bytes).sum()
    }
}

#[cfg(test)]
mod keeper_tests;
#[cfg(test)]
mod tests;
