//! The handle over a shared Outbox: send, flush, and what became of a message. A connection's and a reply's alike.
//!
//! `send` encodes into the Outbox under a short lock and wakes the socket's task only if that has nothing to write. It
//! never touches a socket itself, so a dropped `send` can tear no frame: a message is accepted whole, or not at all.

use std::cell::Cell;
use std::collections::VecDeque;
use std::fmt;
use std::pin::pin;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Waker};
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::sync::Notify;

use crate::error::{Error, ErrorKind, Refused, Result};
use crate::proto::framing::Framing;
use crate::proto::outbox::{FailedMessage, FailedReason, Fate, Outbox, Refusal};
use crate::stats::Stats;

/// How many sends of a thread count as one unit of work in tokio's cooperative budget (128 units a turn).
const SENDS_PER_UNIT: u32 = 32;

/// Messages with expiries this fraction of their time apart share a chunk, and live as long as the last of them.
const EXPIRY_GRAIN: u32 = 16;

/// What to do with a message for which there is no room.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Overflow {
    /// `send` waits until there is room.
    #[default]
    Wait,
    /// `send` fails with [`ErrorKind::Full`].
    Fail,
    /// The oldest messages that were never written fail, with [`FailedReason::Overflow`].
    FailOldest,
}

/// The number of an accepted message on its connection: counted from 0, in the order of acceptance.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Receipt {
    number: u64,
}

impl Receipt {
    /// The number, the same as in [`FailedMessage::number`].
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
    /// How many were given up, and went to where failed messages go.
    pub failed: u64,
}

/// How far a connection is from its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    /// Messages are accepted.
    Open,
    /// The same, for as long as messages that were received are still being handled.
    Draining,
    /// None are accepted any more; those in hand have until then.
    Closing(Instant),
    /// Everything in hand is given up.
    Cut,
    /// All is over. The text says why.
    Ended(&'static str),
}

impl Phase {
    fn rank(self) -> u8 {
        match self {
            Phase::Open => 0,
            Phase::Draining => 1,
            Phase::Closing(_) => 2,
            Phase::Cut => 3,
            Phase::Ended(_) => 4,
        }
    }
}

/// The end of the time that is allowed from now on; far away if it cannot be counted.
pub(crate) fn deadline_in(allowed: Duration) -> Instant {
    const FAR: Duration = Duration::from_secs(30 * 365 * 24 * 60 * 60);
    let now = Instant::now();
    now.checked_add(allowed).unwrap_or_else(|| now + FAR)
}

/// An Outbox, and all that its users and its socket's task share.
pub(crate) struct SharedOutbox {
    state: Mutex<State>,
    framing: Framing,
    overflow: Overflow,
    expiry: Option<Duration>,
    /// Whether so much waits to be written that no more should be provoked by reading.
    congested: AtomicBool,
    /// Senders that exist.
    handles: AtomicUsize,
    /// Room may have come, for the one that is at the head of the queue.
    room: Notify,
    /// Whose turn it is to wait for room. Fair, so nobody starves.
    turn: tokio::sync::Mutex<()>,
    /// Something was settled or failed, or all is over.
    progress: Notify,
    phase_changed: Notify,
    /// Failed messages wait, or an earlier expiry came: for the dialer.
    chores: Notify,
    /// Failed messages wait for their owner.
    has_failed: AtomicBool,
    /// Another socket is wanted.
    reopen: AtomicBool,
}

struct State {
    outbox: Outbox,
    phase: Phase,
    /// The task of the socket, and whether it waits for something to write.
    task: Option<Waker>,
    asleep: bool,
    /// Room that the head of the queue waits for. Others leave it alone.
    head: usize,
    next_expiry: Option<Instant>,
}

impl fmt::Debug for SharedOutbox {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SharedOutbox").field("framing", &self.framing).finish_non_exhaustive()
    }
}

impl SharedOutbox {
    pub(crate) fn new(framing: Framing, limit: usize, overflow: Overflow, expiry: Option<Duration>) -> Arc<Self> {
        Arc::new(SharedOutbox {
            state: Mutex::new(State {
                outbox: Outbox::new(framing, limit),
                phase: Phase::Open,
                task: None,
                asleep: false,
                head: 0,
                next_expiry: None,
            }),
            framing,
            overflow,
            expiry,
            congested: AtomicBool::new(false),
            handles: AtomicUsize::new(0),
            room: Notify::new(),
            turn: tokio::sync::Mutex::new(()),
            progress: Notify::new(),
            phase_changed: Notify::new(),
            chores: Notify::new(),
            has_failed: AtomicBool::new(false),
            reopen: AtomicBool::new(false),
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A handle for the user.
    pub(crate) fn sender(self: &Arc<Self>) -> Sender {
        self.handles.fetch_add(1, Ordering::Relaxed);
        Sender { shared: Arc::clone(self) }
    }

    pub(crate) fn has_senders(&self) -> bool {
        self.handles.load(Ordering::Acquire) > 0
    }

    #[inline]
    pub(crate) fn is_congested(&self) -> bool {
        self.congested.load(Ordering::Relaxed)
    }

    // What users do.

    /// Takes charge of a message of `length` bytes, if there is room. Returns its number.
    #[inline]
    fn accept(
        &self,
        length: usize,
        lives: Option<Duration>,
        claim: Claim,
        push: impl FnOnce(&mut Outbox, Option<Instant>) -> u64,
    ) -> Result<Receipt, Refusing> {
        let mut state = self.lock();
        let State { outbox, phase, head, .. } = &mut *state;
        if !matches!(phase, Phase::Open | Phase::Draining) {
            return Err(Refusing::Closed);
        }
        let admitted = match claim {
            Claim::None => outbox.admits(length, *head),
            Claim::Head => outbox.admits(length, 0),
            Claim::Promised => self.framing.check(length).map_err(|_| Refusal::TooLarge),
        };
        match admitted {
            Ok(()) => {}
            Err(Refusal::Full) if self.overflow == Overflow::FailOldest => {
                // The dialer hands over what is given up here.
                self.has_failed.store(true, Ordering::Relaxed);
                self.chores.notify_one();
                if !outbox.fail_oldest_for(length, Instant::now()) {
                    return Err(Refusing::Full);
                }
                self.progress.notify_waiters();
            }
            Err(Refusal::Full) => return Err(Refusing::Full),
            Err(Refusal::TooLarge) => return Err(Refusing::TooLarge),
        }
        if claim == Claim::Promised {
            outbox.unreserve(self.framing.max_message_size());
        }
        let number = if lives.is_none() && self.expiry.is_none() {
            push(outbox, None)
        } else {
            self.push_expiring(&mut state, lives, push)
        };
        if state.outbox.bytes() > state.outbox.limit() / 2 {
            self.congested.store(true, Ordering::Relaxed);
        }
        if state.asleep {
            state.asleep = false;
            let waker = state.task.clone();
            drop(state);
            if let Some(waker) = waker {
                waker.wake();
            }
        }
        Ok(Receipt { number })
    }

    #[cold]
    fn push_expiring(
        &self,
        state: &mut State,
        lives: Option<Duration>,
        push: impl FnOnce(&mut Outbox, Option<Instant>) -> u64,
    ) -> u64 {
        let expires = lives.or(self.expiry).map(coarse_expiry);
        if state.next_expiry.is_none() || expires < state.next_expiry {
            state.next_expiry = expires;
            self.chores.notify_one();
        }
        push(&mut state.outbox, expires)
    }

    /// Waits until a message of this length has room, and accepts it then.
    ///
    /// Cancel safe: nothing is accepted if this is dropped before it returns.
    async fn accept_in_turn(
        &self,
        length: usize,
        lives: Option<Duration>,
        mut push: impl FnMut(&mut Outbox, Option<Instant>) -> u64,
    ) -> Result<Receipt, Refusing> {
        let _turn = self.turn.lock().await;
        let _head = Head::take(self, self.framing.prefix_width(length) + length);
        loop {
            let mut room = pin!(self.room.notified());
            room.as_mut().enable();
            match self.accept(length, lives, Claim::Head, &mut push) {
                Err(Refusing::Full) => room.await,
                result => return result,
            }
        }
    }

    #[cold]
    fn error(&self, refusing: Refusing, length: usize) -> Error {
        let state = self.lock();
        match refusing {
            Refusing::TooLarge => {
                let max = self.framing.max_message_size();
                let text = format!("a message of {length} bytes is over the maximum of {max}; raise it on both sides");
                Error::new(ErrorKind::TooLarge, text)
            }
            Refusing::Full => {
                let (bytes, limit) = (state.outbox.bytes(), state.outbox.limit());
                let text = format!("no room for a message of {length} bytes: {bytes} of {limit} bytes are taken");
                Error::new(ErrorKind::Full, text)
            }
            Refusing::Closed => {
                let why = match state.phase {
                    Phase::Ended(why) => why,
                    _ => "it is being closed",
                };
                Error::new(ErrorKind::Closed, format!("the connection takes no more messages: {why}"))
            }
        }
    }

    /// Promises room for the largest message to somebody, when there is some.
    pub(crate) async fn reserve_largest(&self) -> Result<()> {
        let length = self.framing.max_message_size();
        let _turn = self.turn.lock().await;
        let _head = Head::take(self, self.framing.prefix_width(length) + length);
        loop {
            let mut room = pin!(self.room.notified());
            room.as_mut().enable();
            {
                let mut state = self.lock();
                if state.phase != Phase::Open {
                    drop(state);
                    return Err(self.error(Refusing::Closed, length));
                }
                if state.outbox.admits(length, 0).is_ok() {
                    state.outbox.reserve(length);
                    return Ok(());
                }
            }
            room.await;
        }
    }

    /// Sends a message into room that was promised. If it is refused, the promise stands.
    pub(crate) fn send_promised(&self, message: Bytes) -> Result<Receipt> {
        let push = |outbox: &mut Outbox, expires| outbox.push_bytes(message.clone(), expires, Instant::now);
        self.accept(message.len(), None, Claim::Promised, push).map_err(|refusing| self.error(refusing, message.len()))
    }

    /// Takes such a promise back.
    pub(crate) fn unreserve_largest(&self) {
        let mut state = self.lock();
        state.outbox.unreserve(self.framing.max_message_size());
        self.announce(&state, false);
    }

    // What the socket's task and the dialer do.

    /// The phase, registering the task to be woken when it changes.
    pub(crate) fn poll_phase(&self, cx: &mut Context<'_>) -> Phase {
        let mut state = self.lock();
        match &mut state.task {
            Some(task) => task.clone_from(cx.waker()),
            none => *none = Some(cx.waker().clone()),
        }
        state.phase
    }

    /// Waits for another phase than the one that is known, and returns it.
    ///
    /// Cancel safe.
    pub(crate) async fn phase_after(&self, known: Phase) -> Phase {
        loop {
            let mut changed = pin!(self.phase_changed.notified());
            changed.as_mut().enable();
            let phase = self.lock().phase;
            if phase != known {
                return phase;
            }
            changed.await;
        }
    }

    /// Begins to close, unless that was done before with a deadline of its own.
    pub(crate) fn close_by(&self, until: Instant) {
        let phase = self.lock().phase;
        if matches!(phase, Phase::Open | Phase::Draining) {
            self.advance_phase(Phase::Closing(until));
        }
    }

    /// Goes on to a later phase; an earlier one changes nothing.
    pub(crate) fn advance_phase(&self, to: Phase) {
        let mut state = self.lock();
        let later = match (state.phase, to) {
            (Phase::Closing(until), Phase::Closing(sooner)) => sooner < until,
            (now, to) => now.rank() < to.rank(),
        };
        if later {
            state.phase = to;
            let waker = state.task.clone();
            drop(state);
            if let Some(waker) = waker {
                waker.wake();
            }
            self.phase_changed.notify_waiters();
            self.room.notify_waiters();
            self.progress.notify_waiters();
        }
    }

    /// Asks for another socket.
    pub(crate) fn ask_reopen(&self) {
        self.reopen.store(true, Ordering::Release);
        let waker = self.lock().task.clone();
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    /// Whether another socket was asked for since the last time.
    pub(crate) fn take_reopen(&self) -> bool {
        self.reopen.load(Ordering::Relaxed) && self.reopen.swap(false, Ordering::AcqRel)
    }

    /// Waits for a phase, a failed message or an earlier expiry.
    ///
    /// Cancel safe.
    pub(crate) async fn chores(&self) {
        self.chores.notified().await;
    }

    /// Gives the writer what comes next; `false`, and a wake-up later, if there is nothing.
    pub(crate) fn hand(&self, most: usize, into: &mut VecDeque<Bytes>) -> bool {
        let mut state = self.lock();
        self.hand_locked(&mut state, most, into)
    }

    fn hand_locked(&self, state: &mut State, most: usize, into: &mut VecDeque<Bytes>) -> bool {
        if state.next_expiry.is_some() {
            state.next_expiry = state.outbox.expire(Instant::now());
            if state.outbox.has_failed() {
                self.announce(state, true);
                self.chores.notify_one();
            }
        }
        state.outbox.hand(most, into);
        state.asleep = into.is_empty();
        !state.asleep
    }

    /// The kernel took this many bytes. If the writer has nothing left, it is given more under the same lock.
    pub(crate) fn wrote(&self, bytes: usize, most: usize, into: &mut VecDeque<Bytes>) {
        let mut state = self.lock();
        let settled = state.outbox.wrote(bytes);
        if into.is_empty() {
            self.hand_locked(&mut state, most, into);
        }
        self.announce(&state, settled);
    }

    /// Tells those who wait for room or for an outcome.
    fn announce(&self, state: &State, resolved: bool) {
        let bytes = state.outbox.bytes();
        let limit = state.outbox.limit();
        if bytes <= limit / 2 && self.is_congested() {
            self.congested.store(false, Ordering::Relaxed);
        }
        // Where the oldest make room, failed messages that nobody takes do not stand in the way of new ones.
        let has_room = || bytes <= (limit / 2).min(limit.saturating_sub(state.head));
        if state.head > 0 && (self.overflow == Overflow::FailOldest || has_room()) {
            self.room.notify_waiters();
        }
        if resolved {
            self.has_failed.store(state.outbox.has_failed(), Ordering::Relaxed);
            self.progress.notify_waiters();
        }
    }

    /// Whether every message is settled or failed.
    pub(crate) fn is_resolved(&self) -> bool {
        let state = self.lock();
        state.outbox.resolved_to() == state.outbox.next_number()
    }

    /// Gives the memory of unused buffers back, if there is any.
    pub(crate) fn release(&self) {
        self.lock().outbox.release();
    }

    pub(crate) fn spare_bytes(&self) -> usize {
        self.lock().outbox.spare_bytes()
    }

    /// The connection broke: everything unsettled is to be written again.
    pub(crate) fn rewind(&self) {
        let mut state = self.lock();
        let settled = state.outbox.rewind();
        state.asleep = false;
        self.announce(&state, settled);
    }

    /// A connection was tried, and failed or broke.
    pub(crate) fn note_attempt(&self) {
        self.lock().outbox.note_attempt();
    }

    /// Gives up all messages in flight.
    pub(crate) fn fail_all(&self, reason: FailedReason) {
        let mut state = self.lock();
        state.outbox.rewind();
        state.outbox.fail_all(reason, Instant::now());
        self.announce(&state, true);
    }

    /// Gives up what has expired; says when the next message will.
    pub(crate) fn expire(&self) -> Option<Instant> {
        let mut state = self.lock();
        if state.next_expiry.is_some() {
            let failed = state.outbox.tally().failed;
            state.next_expiry = state.outbox.expire(Instant::now());
            if state.outbox.tally().failed != failed {
                self.announce(&state, true);
                // A close may have waited for just that.
                if let Some(task) = &state.task {
                    task.wake_by_ref();
                }
            }
        }
        state.next_expiry
    }

    /// The next failed message for its owner.
    pub(crate) fn take_failed(&self) -> Option<FailedMessage> {
        let mut state = self.lock();
        if !state.outbox.has_failed() {
            return None;
        }
        let failed = state.outbox.take_failed();
        self.has_failed.store(state.outbox.has_failed(), Ordering::Relaxed);
        self.announce(&state, false);
        if self.overflow == Overflow::FailOldest {
            // Its room comes from here, while the queue itself stays as full as it is.
            self.room.notify_waiters();
        }
        failed
    }

    pub(crate) fn has_failed(&self) -> bool {
        self.has_failed.load(Ordering::Relaxed) && self.lock().outbox.has_failed()
    }

    /// How many messages were settled so far.
    pub(crate) fn settled(&self) -> u64 {
        self.lock().outbox.tally().settled
    }

    pub(crate) fn stats(&self) -> Stats {
        Stats::from(self.lock().outbox.tally())
    }
}

/// What right to room a message comes with.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Claim {
    None,
    /// It is at the head of the queue, and does not wait behind itself.
    Head,
    /// Room for the largest message was promised. Once accepted, the promise is kept.
    Promised,
}

/// Why a message was not accepted, before it is put into words.
#[derive(Clone, Copy)]
enum Refusing {
    TooLarge,
    Full,
    Closed,
}

/// Being first in the queue for room, for as long as it lives.
struct Head<'a>(&'a SharedOutbox);

impl<'a> Head<'a> {
    fn take(shared: &'a SharedOutbox, frame: usize) -> Head<'a> {
        shared.lock().head = frame;
        Head(shared)
    }
}

impl Drop for Head<'_> {
    fn drop(&mut self) {
        self.0.lock().head = 0;
    }
}

/// An expiry on a grid, so that messages sent shortly after each other share a chunk.
fn coarse_expiry(lives: Duration) -> Instant {
    static ORIGIN: LazyLock<Instant> = LazyLock::new(Instant::now);
    let grain = (lives / EXPIRY_GRAIN).max(Duration::from_millis(1)).as_nanos();
    let steps = ORIGIN.elapsed().saturating_add(lives).as_nanos().div_ceil(grain);
    let until = Duration::from_nanos(u64::try_from(steps * grain).unwrap_or(u64::MAX));
    ORIGIN.checked_add(until).unwrap_or_else(|| deadline_in(lives))
}

/// Waits for its share of tokio's cooperative budget, so that a loop of sends that are always ready lets others run.
#[inline]
async fn cooperate() {
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
        self.shared.sender()
    }
}

impl Drop for Sender {
    fn drop(&mut self) {
        if self.shared.handles.fetch_sub(1, Ordering::AcqRel) == 1 {
            let waker = self.shared.lock().task.clone();
            if let Some(waker) = waker {
                waker.wake();
            }
        }
    }
}

impl fmt::Debug for Sender {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sender").field("stats", &self.stats()).finish_non_exhaustive()
    }
}

impl Sender {
    pub(crate) fn shared(&self) -> &Arc<SharedOutbox> {
        &self.shared
    }

    /// The framing that messages are sent in, with their maximum size.
    pub fn framing(&self) -> Framing {
        self.shared.framing
    }

    /// Sends a message; returns when it is accepted into bounded memory.
    ///
    /// From then on it is the library's: it will be settled, or come back as failed. Messages sent one after the other
    /// arrive in that order. There is no need to batch them: what is sent while the socket is busy is written together.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::TooLarge`], [`ErrorKind::Closed`], and with [`Overflow::Fail`] also [`ErrorKind::Full`].
    ///
    /// # Cancel safety
    ///
    /// Cancel safe: if the future is dropped before it is ready, the message was not accepted.
    pub async fn send(&self, message: &[u8]) -> Result<Receipt> {
        self.accept_slice(message, None).await
    }

    /// The same, for a message that is worth sending only for so long: if none of it was written by then, it fails with
    /// [`FailedReason::Expired`]. It may live up to a sixteenth longer.
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

    #[inline]
    async fn accept_slice(&self, message: &[u8], lives: Option<Duration>) -> Result<Receipt> {
        cooperate().await;
        let shared = &*self.shared;
        let push = |outbox: &mut Outbox, expires| outbox.push(message, expires, Instant::now);
        match shared.accept(message.len(), lives, Claim::None, push) {
            Ok(receipt) => Ok(receipt),
            Err(Refusing::Full) if shared.overflow != Overflow::Fail => {
                let waited = shared.accept_in_turn(message.len(), lives, push).await;
                waited.map_err(|refusing| shared.error(refusing, message.len()))
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
        cooperate().await;
        let shared = &*self.shared;
        let length = message.len();
        let push = |outbox: &mut Outbox, expires| outbox.push_bytes(message.clone(), expires, Instant::now);
        let result = match shared.accept(length, None, Claim::None, push) {
            Err(Refusing::Full) if shared.overflow != Overflow::Fail => shared.accept_in_turn(length, None, push).await,
            result => result,
        };
        result.map_err(|refusing| Refused::new(shared.error(refusing, length), message))
    }

    /// Sends a message if there is room at once.
    ///
    /// # Errors
    ///
    /// As [`send`](Sender::send), and [`ErrorKind::Full`] whatever the overflow policy.
    pub fn try_send(&self, message: &[u8]) -> Result<Receipt> {
        let push = |outbox: &mut Outbox, expires| outbox.push(message, expires, Instant::now);
        let result = self.shared.accept(message.len(), None, Claim::None, push);
        result.map_err(|refusing| self.shared.error(refusing, message.len()))
    }

    /// Sends a message that is owned already, if there is room at once.
    ///
    /// # Errors
    ///
    /// As [`try_send`](Sender::try_send); the message comes back with the error.
    pub fn try_send_bytes(&self, message: Bytes) -> Result<Receipt, Refused> {
        let push = |outbox: &mut Outbox, expires| outbox.push_bytes(message.clone(), expires, Instant::now);
        let result = self.shared.accept(message.len(), None, Claim::None, push);
        result.map_err(|refusing| Refused::new(self.shared.error(refusing, message.len()), message))
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
        cooperate().await;
        let shared = &*self.shared;
        let mut push = |outbox: &mut Outbox, expires| outbox.push_with(length, expires, Instant::now, &mut encode);
        let result = match shared.accept(length, None, Claim::None, &mut push) {
            Err(Refusing::Full) if shared.overflow != Overflow::Fail => shared.accept_in_turn(length, None, push).await,
            result => result,
        };
        result.map_err(|refusing| shared.error(refusing, length))
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
        result.map_err(|refusing| self.shared.error(refusing, length))
    }

    /// Waits until the message with this receipt is settled.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Failed`] if it was given up; [`ErrorKind::Forgotten`] if that can no longer be told.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe.
    pub async fn settled(&self, receipt: Receipt) -> Result<()> {
        let number = receipt.number;
        loop {
            let mut progress = pin!(self.shared.progress.notified());
            progress.as_mut().enable();
            let fate = self.shared.lock().outbox.fate(number);
            match fate {
                Fate::Settled => return Ok(()),
                Fate::Failed => {
                    let text = format!("message {number} failed; it went to where failed messages go");
                    return Err(Error::new(ErrorKind::Failed, text));
                }
                Fate::Forgotten => {
                    let text = format!("too many messages have failed since to tell what became of message {number}");
                    return Err(Error::new(ErrorKind::Forgotten, text));
                }
                Fate::InFlight => progress.await,
            }
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
        let number = self.shared.lock().outbox.next_number();
        loop {
            let mut progress = pin!(self.shared.progress.notified());
            progress.as_mut().enable();
            {
                let state = self.shared.lock();
                if state.outbox.resolved_to() >= number {
                    let failed = state.outbox.failed_before(number);
                    return Ok(Flushed { settled: number - failed, failed });
                }
            }
            progress.await;
        }
    }

    /// What became of all messages of this connection, read at one moment.
    pub fn stats(&self) -> Stats {
        self.shared.stats()
    }
}
