//! The thread that writes a spool: gathers what was sent since its last write into one record, and makes it, and what was
//! settled and failed meanwhile, one transaction.
//!
//! Invariants: a message is fed only after the transaction that holds it; it is removed only after it is settled, or in the
//! transaction that stores it as failed. When a write fails nothing more is written, and no send succeeds any more: what is
//! on disk then is known again only to the next process that opens it.

use std::collections::{BTreeSet, VecDeque};
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::pin;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use tokio::sync::Notify;

use super::store::{Change, Store};
use super::{Extent, RECORD_COST, Spool};
use crate::error::{Error, ErrorKind, Result};
use crate::failed::FailedTo;
use crate::log::Throttle;
use crate::metrics::SpoolTotals;
use crate::proto::outbox::{FailedMessage, Rejection};
use crate::proto::record::{Record, RecordWriter, RefusedRecord, SpoolState};
use crate::shared_outbox::{Overflow, Phase, SharedOutbox};

/// How long news of what is done waits for a message to share a write with.
const PATIENCE: Duration = Duration::from_millis(10);

/// Bytes of messages that may wait for the write under way to end.
const GATHERED: usize = 4 * 1024 * 1024;

/// Bytes of records that were just written, and are fed without being read from disk.
const FRESH: usize = 4 * 1024 * 1024;

/// What the senders, the thread and the feeding task of a spool share.
pub(super) struct Keeper {
    state: Mutex<Inside>,
    /// There is something for the thread to do.
    work: Condvar,
    /// A record was written, or nothing will be any more.
    written: Notify,
    /// There may be room, for the one whose turn it is.
    room: Notify,
    turn: tokio::sync::Mutex<()>,
    /// Taken away at the end: then the spool can be opened again, whoever still holds this.
    store: RwLock<Option<Store>>,
    outbox: Arc<SharedOutbox>,
    overflow: Overflow,
    max_bytes: u64,
}

struct Inside {
    gathered: RecordWriter,
    /// The number that the next message to be gathered gets.
    next: u64,
    /// As it is on disk.
    state: SpoolState,
    extents: VecDeque<Extent>,
    /// Bytes of the extents and of the record that is being written, and of the failed messages.
    live: u64,
    failed: u64,
    /// Numbers that are not to be fed.
    gone: BTreeSet<u64>,
    /// The latest records.
    fresh: VecDeque<(Record, usize)>,
    /// Something was settled or has failed.
    look: bool,
    /// Senders that wait for room, and so come before others.
    waiting: usize,
    stage: Stage,
    /// The store is closed: the spool can be opened again.
    is_released: bool,
}

/// What became of a message that was to be gathered.
enum Gathered {
    /// It has this number.
    As(u64),
    /// It comes with a later record.
    Later,
    /// The spool may hold no more.
    Full,
}

/// Waiting for room, for as long as it lives.
struct Waiting<'a>(&'a Keeper);

impl<'a> Waiting<'a> {
    fn begin(keeper: &'a Keeper) -> Waiting<'a> {
        keeper.lock().waiting += 1;
        keeper.work.notify_one();
        Waiting(keeper)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.lock().waiting -= 1;
    }
}

#[derive(Clone, Debug)]
enum Stage {
    Working,
    /// The connection is over: what is known is still to be written.
    Ending,
    Ended,
    /// A write or a read failed.
    Broken(String),
}

/// One transaction, and what follows from it.
struct Turn {
    change: Change,
    state: SpoolState,
    extent: Option<Extent>,
    is_last: bool,
}

impl fmt::Debug for Keeper {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Keeper").finish_non_exhaustive()
    }
}

impl Keeper {
    pub(super) fn new(spool: Spool, outbox: Arc<SharedOutbox>, overflow: Overflow) -> Arc<Keeper> {
        let live = spool.live_bytes();
        let Spool { store, state, extents, gone, failed: (_, failed), max_bytes, .. } = spool;
        let inside = Inside {
            gathered: RecordWriter::default(),
            next: state.end,
            state,
            extents,
            live,
            failed,
            gone,
            fresh: VecDeque::new(),
            look: false,
            waiting: 0,
            stage: Stage::Working,
            is_released: false,
        };
        Arc::new(Keeper {
            state: Mutex::new(inside),
            work: Condvar::new(),
            written: Notify::new(),
            room: Notify::new(),
            turn: tokio::sync::Mutex::new(()),
            store: RwLock::new(Some(store)),
            outbox,
            overflow,
            max_bytes,
        })
    }

    fn lock(&self) -> MutexGuard<'_, Inside> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What it holds now.
    pub(super) fn totals(&self) -> SpoolTotals {
        let inside = self.lock();
        let bytes = inside.live + inside.gathered.len() as u64;
        SpoolTotals { bytes, failed: inside.failed, capacity: self.max_bytes }
    }

    fn with_store<T>(&self, use_it: impl FnOnce(&Store) -> Result<T>) -> Result<T> {
        match &*self.store.read().unwrap_or_else(PoisonError::into_inner) {
            Some(store) => use_it(store),
            None => Err(Error::new(ErrorKind::Closed, "the spool was closed")),
        }
    }

    // What senders do.

    /// Gathers a message for the next record. Returns its number; it is accepted when it is [written](Self::written).
    ///
    /// Cancel safe.
    pub(super) async fn gather(&self, message: &[u8]) -> Result<u64> {
        self.outbox.check(message.len())?;
        match self.gather_now(message, 0)? {
            Gathered::As(number) => return Ok(number),
            Gathered::Full if self.overflow == Overflow::Fail => return Err(self.full(message.len())),
            Gathered::Later | Gathered::Full => {}
        }
        let _waiting = Waiting::begin(self);
        let _turn = self.turn.lock().await;
        loop {
            let mut room = pin!(self.room.notified());
            room.as_mut().enable();
            self.outbox.check(message.len())?;
            match self.gather_now(message, usize::MAX)? {
                Gathered::As(number) => return Ok(number),
                Gathered::Full if self.overflow == Overflow::Fail => return Err(self.full(message.len())),
                Gathered::Later | Gathered::Full => room.await,
            }
        }
    }

    /// Unless more senders than that wait for room.
    fn gather_now(&self, message: &[u8], waiting: usize) -> Result<Gathered> {
        let mut inside = self.lock();
        match &inside.stage {
            Stage::Working => {}
            Stage::Broken(why) => return Err(Error::new(ErrorKind::Spool, why.clone())),
            Stage::Ending | Stage::Ended => {
                return Err(Error::new(ErrorKind::Closed, "the connection takes no more messages: it was closed"));
            }
        }
        if inside.waiting > waiting {
            return Ok(Gathered::Later);
        }
        let cost = inside.gathered.cost(message.len());
        let gathered = inside.gathered.len();
        let others = inside.live + gathered as u64;
        if others + inside.failed + cost as u64 + RECORD_COST > self.max_bytes && others + inside.failed > 0 {
            if others == 0 {
                // Nothing will come of waiting.
                drop(inside);
                return Err(self.full(message.len()));
            }
            return Ok(Gathered::Full);
        }
        if gathered > 0 && gathered + cost > GATHERED {
            return Ok(Gathered::Later);
        }
        inside.gathered.push(message);
        let number = inside.next;
        inside.next += 1;
        let is_first = gathered == 0;
        drop(inside);
        if is_first {
            self.work.notify_one();
        }
        Ok(Gathered::As(number))
    }

    fn full(&self, length: usize) -> Error {
        let inside = self.lock();
        let (live, failed, max) = (inside.live, inside.failed, self.max_bytes);
        let text = format!(
            "the spool has no room for a message of {length} bytes: of {max} bytes, messages that wait take {live}, and failed \
             ones, which can be sent again or dropped, {failed}"
        );
        Error::new(ErrorKind::Full, text)
    }

    /// Waits until a message that was gathered is on disk.
    ///
    /// Cancel safe.
    pub(super) async fn written(&self, number: u64) -> Result<()> {
        loop {
            let mut written = pin!(self.written.notified());
            written.as_mut().enable();
            {
                let inside = self.lock();
                if number < inside.state.end {
                    return Ok(());
                }
                match &inside.stage {
                    Stage::Working | Stage::Ending => {}
                    Stage::Broken(why) => return Err(Error::new(ErrorKind::Spool, why.clone())),
                    Stage::Ended => unreachable!("what was gathered is written before the end"),
                }
            }
            written.await;
        }
    }

    /// Waits until nothing will be written any more.
    ///
    /// Cancel safe.
    pub(super) async fn ended(&self) -> Result<()> {
        loop {
            let mut written = pin!(self.written.notified());
            written.as_mut().enable();
            {
                let inside = self.lock();
                match &inside.stage {
                    Stage::Broken(why) if inside.is_released => return Err(Error::new(ErrorKind::Spool, why.clone())),
                    _ if inside.is_released => return Ok(()),
                    _ => {}
                }
            }
            written.await;
        }
    }

    /// Something was settled, or has failed.
    pub(super) fn look(&self) {
        let mut inside = self.lock();
        if !inside.look {
            inside.look = true;
            drop(inside);
            self.work.notify_one();
        }
    }

    /// Writes what is known once more, and ends.
    pub(super) fn end(&self) {
        let mut inside = self.lock();
        if matches!(inside.stage, Stage::Working) {
            inside.stage = Stage::Ending;
        }
        drop(inside);
        self.work.notify_one();
        self.room.notify_waiters();
    }

    // The thread.

    /// Writes until the end; tells the owner of failed messages once these are on disk.
    pub(super) fn run(&self, owner: &FailedTo) {
        if catch_unwind(AssertUnwindSafe(|| self.write_on(owner))).is_err() {
            self.broke(&Error::new(ErrorKind::Spool, "its thread has panicked"));
        }
        *self.store.write().unwrap_or_else(PoisonError::into_inner) = None;
        let mut inside = self.lock();
        inside.is_released = true;
        if matches!(inside.stage, Stage::Ending) {
            inside.stage = Stage::Ended;
        }
        drop(inside);
        self.written.notify_waiters();
    }

    fn write_on(&self, owner: &FailedTo) {
        let mut failed = Vec::new();
        let log = Throttle::default();
        while let Some(turn) = self.next_turn(&mut failed) {
            let is_news = !turn.change.is_empty() || turn.state != self.lock().state;
            if is_news && let Err(error) = self.with_store(|store| store.commit(&turn.change, turn.state)) {
                return self.broke(&error);
            }
            let (is_last, done) = (turn.is_last, turn.state.done);
            self.take_in(turn);
            if is_news {
                self.outbox.note_stored(&failed, done);
            }
            failed.drain(..).for_each(|failed| owner.tell(failed, &log));
            if is_last {
                return;
            }
        }
    }

    /// Waits for something to do, and says what that is: `None` if the spool is broken.
    fn next_turn(&self, failed: &mut Vec<FailedMessage>) -> Option<Turn> {
        let (add, extent, is_last) = {
            let mut inside = self.lock();
            while inside.gathered.count() == 0 && !inside.look && matches!(inside.stage, Stage::Working) {
                inside = self.work.wait(inside).unwrap_or_else(PoisonError::into_inner);
            }
            if inside.gathered.count() == 0 {
                let may_wait = |inside: &mut Inside| {
                    inside.gathered.count() == 0 && inside.waiting == 0 && matches!(inside.stage, Stage::Working)
                };
                let waited = self.work.wait_timeout_while(inside, PATIENCE, may_wait);
                inside = waited.unwrap_or_else(PoisonError::into_inner).0;
            }
            if matches!(inside.stage, Stage::Broken(_)) {
                return None;
            }
            inside.look = false;
            let is_last = matches!(inside.stage, Stage::Ending);
            let count = inside.gathered.count();
            if count == 0 {
                (None, None, is_last)
            } else {
                let first = inside.next - count;
                let bytes = inside.gathered.len() as u64 + RECORD_COST;
                let extent = Extent { first, end: inside.next, bytes };
                inside.live += extent.bytes;
                (Some((first, inside.gathered.finish(first))), Some(extent), is_last)
            }
        };
        // Others may gather on meanwhile.
        self.room.notify_waiters();
        let done = self.outbox.take_done(failed);
        let inside = self.lock();
        let done = done.max(inside.state.done);
        let remove = inside.extents.iter().take_while(|extent| extent.end <= done).map(|extent| extent.first).collect();
        let seconds = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        let refused = failed.iter().map(|failed| (failed.number, refused_record(failed, seconds))).collect();
        let unsent = self.outbox.unsent().unwrap_or(inside.state.unsent);
        let end = extent.map_or(inside.state.end, |extent| extent.end);
        let state = SpoolState { end, done, unsent, ..inside.state };
        Some(Turn { change: Change { add, remove, refused, ..Change::default() }, state, extent, is_last })
    }

    /// The change is on disk.
    fn take_in(&self, turn: Turn) {
        let Turn { change, state, extent, .. } = turn;
        let record = change.add.map(|(first, bytes)| {
            let size = bytes.len();
            (Record::read(first, bytes).expect("it was just made"), size)
        });
        let mut inside = self.lock();
        for _ in &change.remove {
            let removed = inside.extents.pop_front().expect("it was there a moment ago");
            inside.live -= removed.bytes;
        }
        inside.failed += change.refused.iter().map(|(_, refused)| refused.len() as u64).sum::<u64>();
        inside.gone = inside.gone.split_off(&state.done);
        inside.state = state;
        if let Some(extent) = extent {
            // Accepted before it can be fed.
            self.outbox.note_spooled(extent.end - extent.first);
            inside.extents.push_back(extent);
        }
        inside.fresh.extend(record);
        let mut bytes: usize = inside.fresh.iter().map(|(_, bytes)| bytes).sum();
        while bytes > FRESH
            && let Some((_, oldest)) = inside.fresh.pop_front()
        {
            bytes -= oldest;
        }
        drop(inside);
        self.written.notify_waiters();
        self.room.notify_waiters();
    }

    fn broke(&self, error: &Error) {
        let why = format!(
            "nothing more goes to or from the spool: {error}; what was accepted is on disk, for the next to open it"
        );
        tracing::error!("{why}");
        self.lock().stage = Stage::Broken(why);
        self.outbox.advance_phase(Phase::Cut);
        self.written.notify_waiters();
        self.room.notify_waiters();
        self.work.notify_one();
    }

    // The task that feeds the Outbox.

    /// Feeds messages in order until all is over.
    pub(super) async fn feed(self: &Arc<Self>) {
        let mut next = self.lock().state.done;
        loop {
            let record = match self.record_with(next).await {
                Ok(record) => record,
                Err(error) => return self.broke(&error),
            };
            let Some(record) = record else { return };
            let end = record.end();
            let gone = self.gone_below(end);
            for (number, message) in record {
                if number < next || gone.contains(&number) {
                    continue;
                }
                match self.outbox.feed(number, &message).await {
                    Ok(true) => {}
                    Ok(false) => return,
                    Err(error) => return self.broke(&error),
                }
            }
            self.outbox.pass_over(end);
            next = end;
        }
    }

    fn gone_below(&self, end: u64) -> BTreeSet<u64> {
        let inside = self.lock();
        if inside.gone.is_empty() { BTreeSet::new() } else { inside.gone.range(..end).copied().collect() }
    }

    /// Waits for the record with this message, or the first behind it.
    async fn record_with(self: &Arc<Self>, number: u64) -> Result<Option<Record>> {
        let first = loop {
            let mut written = pin!(self.written.notified());
            written.as_mut().enable();
            {
                let mut inside = self.lock();
                if matches!(inside.stage, Stage::Ended | Stage::Broken(_)) {
                    return Ok(None);
                }
                let index = inside.extents.partition_point(|extent| extent.end <= number);
                if let Some(extent) = inside.extents.get(index).copied() {
                    while inside.fresh.front().is_some_and(|(record, _)| record.end() <= number) {
                        inside.fresh.pop_front();
                    }
                    let fresh = inside.fresh.front().filter(|(record, _)| record.end() == extent.end);
                    if let Some((record, _)) = fresh {
                        return Ok(Some(record.clone()));
                    }
                    break extent.first;
                }
                if number < inside.state.end {
                    // The last ones were damaged on disk.
                    self.outbox.pass_over(inside.state.end);
                }
            }
            written.await;
        };
        let keeper = Arc::clone(self);
        let read = tokio::task::spawn_blocking(move || keeper.with_store(|store| store.record(first))).await;
        match read {
            Ok(record) => record.map(Some),
            // The runtime is going away.
            Err(_) => Ok(None),
        }
    }
}

fn refused_record(failed: &FailedMessage, seconds: u64) -> Vec<u8> {
    let rejection = failed.rejection.clone().unwrap_or_else(|| Rejection { code: 0, text: failed.reason.to_string() });
    RefusedRecord { rejection, seconds, message: Bytes::clone(&failed.message) }.write(failed.number)
}
