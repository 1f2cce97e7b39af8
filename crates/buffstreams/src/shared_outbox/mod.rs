//! An Outbox under its lock, and all that its users and its socket's task share.
//!
//! The lock is held for a few instructions at a time, never across an await and never while user's code runs (but for the
//! encoding of a typed message). Most messages take an express lane: under the lock one number is compared, and that is
//! all. Whoever waits for room does so in a fair queue, of which only the head watches for it: the room that the head needs
//! is left alone by everybody else, so a large message is not starved by small ones.

mod in_session;
#[cfg(feature = "spool")]
mod spooled;

use std::cell::Cell;
use std::collections::VecDeque;
use std::fmt;
use std::pin::pin;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, OnceLock, PoisonError};
use std::task::{Context, Waker};
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::sync::Notify;

use crate::error::{Error, ErrorKind, Result};
use crate::events::{Event, Events, Watched};
use crate::log::Throttle;
use crate::proto::framing::Framing;
use crate::proto::outbox::{FailedMessage, FailedReason, Fate, Outbox, Refusal};
use crate::proto::session::sending::{Sending, StateLost};
use crate::proto::session::wire::StreamId;
use crate::stats::{Sockets, Stats};

/// Messages with expiries this fraction of their time apart share a chunk, and live as long as the last of them.
const EXPIRY_GRAIN: u32 = 16;

/// The express lane is open for so many bytes at a time: enough that opening it costs nothing by comparison.
const LANE: usize = 8 * 1024;

/// What a message takes of the lane beside its own bytes: more than any prefix, so that empty ones do not make it endless.
const LANE_COST: usize = 64;

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
    overflow: Overflow,
    expiry: Option<Duration>,
    /// Whether nobody takes failed messages: they are replies, and go with their connection.
    is_for_replies: bool,
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
    /// The acknowledged stream that these replies go back on, and what its sender said of itself.
    peer_stream: OnceLock<Box<(StreamId, Vec<u8>)>>,
    /// Who watches a dialled connection.
    events: Watched<Event>,
    /// What can be seen of it without the lock, by who has several connections to choose from; on the side that dials.
    seen: Option<Box<Seen>>,
}

/// What can be seen of an Outbox without its lock.
#[derive(Default)]
struct Seen {
    /// Bytes that messages take; those in the express lane may not be counted yet.
    bytes: AtomicUsize,
    /// There is no socket.
    is_away: AtomicBool,
    /// No messages are accepted any more.
    is_over: AtomicBool,
    /// Who is told when any of that may make a difference.
    watcher: OnceLock<Arc<Notify>>,
}

struct State {
    outbox: Outbox,
    /// The express lane: for this many bytes nothing has to be asked but a message's length. Whoever takes the lock for
    /// anything else closes it, so it can promise nothing that has changed since.
    lane: usize,
    phase: Phase,
    /// The task of the socket, and whether it waits for something to write.
    task: Option<Waker>,
    asleep: bool,
    /// Room that the head of the queue waits for. Others leave it alone.
    head: usize,
    next_expiry: Option<Instant>,
    /// The session of these messages, on the side that dials.
    sending: Option<Box<Sending>>,
    /// Control frames that go before anything else that is to be written.
    to_say: Vec<u8>,
    /// What a receiver has lost that knows nothing of what was sent before, and nobody has told yet.
    state_lost: Option<Box<StateLost>>,
    /// When something was settled or failed last.
    progressed: Cell<Instant>,
    /// Bytes that sockets took.
    written: u64,
    /// On the side that dials.
    sockets: Option<Box<Sockets>>,
}

impl State {
    /// For how long messages have been in flight without any being settled.
    fn stalled(&self, now: Instant) -> Duration {
        if self.outbox.resolved_to() == self.outbox.end() {
            return Duration::ZERO;
        }
        let progressed = self.progressed.get();
        let since = self.outbox.begun().map_or(progressed, |begun| begun.max(progressed));
        now.saturating_duration_since(since)
    }
}

impl fmt::Debug for SharedOutbox {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SharedOutbox").field("overflow", &self.overflow).finish_non_exhaustive()
    }
}

impl SharedOutbox {
    /// For the messages of a dialled connection.
    pub(crate) fn new(framing: Framing, limit: usize, overflow: Overflow, expiry: Option<Duration>) -> Arc<Self> {
        SharedOutbox::build(Outbox::new(framing, limit), overflow, expiry, None, false)
    }

    /// For the messages of a dialled connection that are to be acknowledged.
    pub(crate) fn in_session(
        sending: Sending,
        limit: usize,
        overflow: Overflow,
        expiry: Option<Duration>,
    ) -> Arc<Self> {
        let outbox = Outbox::in_session(sending.session_framing(), limit);
        SharedOutbox::build(outbox, overflow, expiry, Some(Box::new(sending)), false)
    }

    /// For the replies on an accepted connection.
    pub(crate) fn for_replies(framing: Framing, limit: usize) -> Arc<Self> {
        SharedOutbox::build(Outbox::new(framing, limit), Overflow::Wait, None, None, true)
    }

    fn build(
        outbox: Outbox,
        overflow: Overflow,
        expiry: Option<Duration>,
        sending: Option<Box<Sending>>,
        is_for_replies: bool,
    ) -> Arc<Self> {
        Arc::new(SharedOutbox {
            state: Mutex::new(State {
                outbox,
                lane: 0,
                phase: Phase::Open,
                task: None,
                asleep: false,
                head: 0,
                next_expiry: None,
                sending,
                to_say: Vec::new(),
                state_lost: None,
                progressed: Cell::new(Instant::now()),
                written: 0,
                sockets: (!is_for_replies).then(Box::default),
            }),
            overflow,
            expiry,
            is_for_replies,
            congested: AtomicBool::new(false),
            handles: AtomicUsize::new(0),
            room: Notify::new(),
            turn: tokio::sync::Mutex::new(()),
            progress: Notify::new(),
            phase_changed: Notify::new(),
            chores: Notify::new(),
            has_failed: AtomicBool::new(false),
            reopen: AtomicBool::new(false),
            peer_stream: OnceLock::new(),
            events: Watched::default(),
            seen: (!is_for_replies).then(Box::default),
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.lane = 0;
        state
    }

    /// A handle was made.
    pub(crate) fn enter(&self) {
        self.handles.fetch_add(1, Ordering::Relaxed);
    }

    /// A handle is gone. With the last, a peer that has ended its stream gets no more replies.
    pub(crate) fn leave(&self) {
        if self.handles.fetch_sub(1, Ordering::AcqRel) == 1 {
            let waker = self.lock().task.clone();
            if let Some(waker) = waker {
                waker.wake();
            }
        }
    }

    pub(crate) fn has_senders(&self) -> bool {
        self.handles.load(Ordering::Acquire) > 0
    }

    /// The framing that messages are sent in. A session may change it, before the first message.
    pub(crate) fn framing(&self) -> Framing {
        self.lock().outbox.framing()
    }

    /// Whether a message for which there is no room waits for it.
    pub(crate) fn lets_wait(&self) -> bool {
        self.overflow != Overflow::Fail
    }

    #[inline]
    pub(crate) fn is_congested(&self) -> bool {
        self.congested.load(Ordering::Relaxed)
    }

    // What users do.

    /// Takes charge of a message of `length` bytes if the express lane is open for it; otherwise it must be
    /// [accepted](Self::accept) like any. Returns its number.
    #[inline]
    pub(crate) fn accept_in_lane(&self, length: usize, push: impl FnOnce(&mut Outbox) -> u64) -> Option<u64> {
        let cost = length.saturating_add(LANE_COST);
        if cost > LANE || self.expiry.is_some() {
            return None;
        }
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if cost > state.lane || length > state.outbox.max_message_size() {
            return None;
        }
        state.lane -= cost;
        Some(push(&mut state.outbox))
    }

    /// Takes charge of a message of `length` bytes, if there is room; opens the lane for those that follow. Returns its
    /// number.
    pub(crate) fn accept(
        &self,
        length: usize,
        lives: Option<Duration>,
        claim: Claim,
        push: impl FnOnce(&mut Outbox, Option<Instant>) -> u64,
    ) -> Result<u64, Refusing> {
        let mut state = self.lock();
        let State { outbox, phase, head, .. } = &mut *state;
        let takes = match claim {
            Claim::Spooled => !matches!(phase, Phase::Cut | Phase::Ended(_)),
            _ => matches!(phase, Phase::Open | Phase::Draining),
        };
        if !takes {
            return Err(Refusing::Closed);
        }
        let admitted = match claim {
            _ if outbox.is_spooled() && claim != Claim::Spooled => return Err(Refusing::Spooled),
            Claim::None => outbox.admits(length, *head),
            Claim::Head | Claim::Spooled => outbox.admits(length, 0),
            Claim::Promised => outbox.framing().check(length).map_err(|_| Refusal::TooLarge),
        };
        match admitted {
            Ok(()) => {}
            Err(Refusal::Full) if self.overflow == Overflow::FailOldest => {
                // The dialer hands over what is given up here.
                self.has_failed.store(true, Ordering::Relaxed);
                self.chores.notify_one();
                let has_room = outbox.fail_oldest_for(length, Instant::now());
                self.progress.notify_waiters();
                if !has_room {
                    self.congested.store(true, Ordering::Relaxed);
                    return Err(Refusing::Full);
                }
            }
            Err(Refusal::Full) => {
                // Who waits for room anywhere is told when there is some here.
                self.congested.store(true, Ordering::Relaxed);
                return Err(Refusing::Full);
            }
            Err(Refusal::TooLarge) => return Err(Refusing::TooLarge),
        }
        if claim == Claim::Promised {
            let largest = outbox.max_message_size();
            outbox.unreserve(largest);
        }
        let number = if lives.is_none() && self.expiry.is_none() {
            push(outbox, None)
        } else {
            self.push_expiring(&mut state, lives, push)
        };
        let (bytes, half) = (state.outbox.bytes(), state.outbox.limit() / 2);
        if let Some(seen) = &self.seen {
            seen.bytes.store(bytes, Ordering::Relaxed);
        }
        if bytes > half {
            self.congested.store(true, Ordering::Relaxed);
        }
        // Nothing is asked in the lane: so it is shut while somebody waits for room, or where messages expire; and it ends
        // where the Outbox becomes congested, which is found out here.
        if state.head == 0 && self.expiry.is_none() && claim != Claim::Spooled {
            let uncongested = half.checked_sub(bytes).unwrap_or(usize::MAX);
            state.lane = LANE.min(state.outbox.lane()).min(uncongested);
        }
        if state.asleep {
            state.asleep = false;
            let waker = state.task.clone();
            drop(state);
            if let Some(waker) = waker {
                waker.wake();
            }
        }
        Ok(number)
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
    pub(crate) async fn accept_in_turn(
        &self,
        length: usize,
        lives: Option<Duration>,
        mut push: impl FnMut(&mut Outbox, Option<Instant>) -> u64,
    ) -> Result<u64, Refusing> {
        let _turn = self.turn.lock().await;
        let _head = Head::take(self, self.framing().prefix_width(length) + length);
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
    pub(crate) fn error(&self, refusing: Refusing, length: usize) -> Error {
        let state = self.lock();
        match refusing {
            Refusing::TooLarge => {
                let max = state.outbox.max_message_size();
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
            Refusing::Spooled => Error::new(
                ErrorKind::Closed,
                "the connection takes messages only from its spool; handlers cannot send on it",
            ),
        }
    }

    /// Promises room for the largest message to somebody, when there is some.
    pub(crate) async fn reserve_largest(&self) -> Result<()> {
        let framing = self.framing();
        let length = framing.max_message_size();
        let _turn = self.turn.lock().await;
        let _head = Head::take(self, framing.prefix_width(length) + length);
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
    pub(crate) fn send_promised(&self, message: Bytes) -> Result<u64> {
        let push = |outbox: &mut Outbox, expires| outbox.push_bytes(message.clone(), expires, Instant::now);
        self.accept(message.len(), None, Claim::Promised, push).map_err(|refusing| self.error(refusing, message.len()))
    }

    /// Waits until a message is no longer in flight.
    ///
    /// Cancel safe.
    pub(crate) async fn fate_of(&self, number: u64) -> Fate {
        loop {
            let mut progress = pin!(self.progress.notified());
            progress.as_mut().enable();
            match self.lock().outbox.fate(number) {
                Fate::InFlight => {}
                fate => return fate,
            }
            progress.await;
        }
    }

    /// Waits until everything accepted so far is settled or failed; returns how many messages that were, and how many of
    /// them failed.
    ///
    /// Cancel safe.
    pub(crate) async fn flushed(&self) -> (u64, u64) {
        let number = self.lock().outbox.end();
        loop {
            let mut progress = pin!(self.progress.notified());
            progress.as_mut().enable();
            {
                let state = self.lock();
                if state.outbox.resolved_to() >= number {
                    return (number, state.outbox.failed_before(number));
                }
            }
            progress.await;
        }
    }

    /// Takes a promise of room back.
    pub(crate) fn unreserve_largest(&self) {
        let mut state = self.lock();
        let largest = state.outbox.max_message_size();
        state.outbox.unreserve(largest);
        self.announce(&state, false);
    }

    // What the socket's task and the dialer do.

    /// The phase, registering the task to be woken when it changes. The task looks for something to write before it
    /// sleeps again, so until then nobody needs to wake it: not a handler on that very task either.
    pub(crate) fn poll_phase(&self, cx: &mut Context<'_>) -> Phase {
        let mut state = self.lock();
        state.asleep = false;
        match &mut state.task {
            Some(task) => task.clone_from(cx.waker()),
            none => *none = Some(cx.waker().clone()),
        }
        state.phase
    }

    /// Whether nothing more is waited for.
    pub(crate) fn is_cut(&self) -> bool {
        self.lock().phase == Phase::Cut
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

    /// Waits until nothing more is waited for.
    ///
    /// Cancel safe.
    pub(crate) async fn cut(&self) {
        let mut phase = self.lock().phase;
        while phase != Phase::Cut {
            phase = self.phase_after(phase).await;
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
            if let Some(seen) = &self.seen
                && !matches!(to, Phase::Open | Phase::Draining)
            {
                seen.is_over.store(true, Ordering::Relaxed);
            }
            let waker = state.task.clone();
            drop(state);
            if let Some(waker) = waker {
                waker.wake();
            }
            self.phase_changed.notify_waiters();
            self.progress.notify_waiters();
            self.tell_room();
        }
    }

    /// Whether there is a socket, has changed.
    pub(crate) fn note_away(&self, is_away: bool) {
        if let Some(seen) = &self.seen {
            seen.is_away.store(is_away, Ordering::Relaxed);
        }
        self.tell_watcher();
    }

    /// From now on this one is told when there is room where there was none, or a socket, or no longer one.
    pub(crate) fn watch_room(&self, watcher: Arc<Notify>) {
        if let Some(seen) = &self.seen {
            let _ = seen.watcher.set(watcher);
        }
    }

    /// There may be room, for who waits for it here, and for who waits for it anywhere.
    fn tell_room(&self) {
        self.room.notify_waiters();
        self.tell_watcher();
    }

    fn tell_watcher(&self) {
        if let Some(watcher) = self.seen.as_deref().and_then(|seen| seen.watcher.get()) {
            watcher.notify_waiters();
        }
    }

    /// How bad a choice it is among several that a message could go to: worse without a socket, and then by bytes in hand.
    /// `None` if it takes no messages.
    pub(crate) fn burden(&self) -> Option<(bool, usize)> {
        let Seen { bytes, is_away, is_over, .. } = self.seen.as_deref()?;
        (!is_over.load(Ordering::Relaxed)).then(|| (is_away.load(Ordering::Relaxed), bytes.load(Ordering::Relaxed)))
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

    /// What happens from now on; nothing more if it `is_over`.
    pub(crate) fn watch(&self, is_over: impl FnOnce() -> bool) -> Events {
        Events::new(self.events.watch(is_over))
    }

    /// Counts an event, and tells those who watch.
    pub(crate) fn tell(&self, event: Event) {
        self.note_sockets(|sockets| match event {
            Event::Connected { .. } => sockets.connected += 1,
            Event::Lost { .. } => sockets.lost += 1,
            Event::Refused { .. } => sockets.refused += 1,
            Event::Resumed { .. } => sockets.resumed += 1,
            Event::Moved { .. } => sockets.moved += 1,
            _ => {}
        });
        self.events.tell(|| event);
    }

    /// An attempt to connect has failed.
    pub(crate) fn note_failed_attempt(&self) {
        self.note_sockets(|sockets| sockets.failed_attempts += 1);
    }

    fn note_sockets(&self, note: impl FnOnce(&mut Sockets)) {
        if let Some(sockets) = &mut self.lock().sockets {
            note(sockets);
        }
    }

    /// Waits for a failed message or an earlier expiry.
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
                if self.is_for_replies {
                    forget_failed(&mut state.outbox);
                }
                self.announce(state, true);
                self.chores.notify_one();
            }
        }
        if state.sending.is_some() || !state.to_say.is_empty() {
            in_session::hand_controls(state, into);
        }
        state.outbox.hand(most, into);
        // Where the window is full it is the receiver who wakes the writer, and not each further message.
        state.asleep = into.is_empty() && !state.outbox.is_held_back();
        !into.is_empty()
    }

    /// The kernel took this many bytes. If the writer has nothing left, it is given more under the same lock.
    pub(crate) fn wrote(&self, bytes: usize, most: usize, into: &mut VecDeque<Bytes>) {
        let mut state = self.lock();
        state.written += bytes as u64;
        let settled = state.outbox.wrote(bytes);
        if let Some(sending) = &mut state.sending {
            sending.spoke(Instant::now());
        }
        if into.is_empty() {
            self.hand_locked(&mut state, most, into);
        }
        self.announce(&state, settled);
    }

    /// Tells those who wait for room or for an outcome.
    fn announce(&self, state: &State, resolved: bool) {
        let bytes = state.outbox.bytes();
        let limit = state.outbox.limit();
        if let Some(seen) = &self.seen {
            seen.bytes.store(bytes, Ordering::Relaxed);
        }
        if bytes <= limit / 2 && self.is_congested() {
            self.congested.store(false, Ordering::Relaxed);
            self.tell_watcher();
        }
        // Not at the first byte of room, but when the queue is half empty: then the head is followed by others. Where the
        // oldest make room, failed messages that nobody takes do not stand in the way of new ones.
        let fits = bytes == 0 || bytes + state.head <= limit;
        let is_worth_it = state.outbox.in_flight_bytes() <= limit / 2 || state.head > limit / 2;
        if state.head > 0 && (self.overflow == Overflow::FailOldest || (fits && is_worth_it)) {
            self.tell_room();
        }
        if resolved {
            state.progressed.set(Instant::now());
            self.has_failed.store(state.outbox.has_failed(), Ordering::Relaxed);
            self.progress.notify_waiters();
            if state.outbox.is_spooled() {
                self.chores.notify_one();
            }
        }
    }

    /// Whether every message is settled or failed.
    pub(crate) fn is_resolved(&self) -> bool {
        let state = self.lock();
        state.to_say.is_empty() && state.outbox.resolved_to() == state.outbox.end()
    }

    /// Gives the memory of unused queues back.
    pub(crate) fn release(&self) {
        self.lock().outbox.release();
    }

    /// The connection broke: everything unsettled is to be written again.
    pub(crate) fn rewind(&self) {
        let mut state = self.lock();
        let settled = state.outbox.rewind();
        state.asleep = false;
        state.to_say.clear();
        let State { sending, outbox, .. } = &mut *state;
        if let Some(sending) = sending {
            sending.part(outbox);
        }
        // What had been handed out and was not begun can expire again.
        state.next_expiry = state.outbox.expire(Instant::now());
        self.announce(&state, settled || state.outbox.has_failed());
        self.chores.notify_one();
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
        state.to_say.clear();
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
            self.tell_room();
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
        let state = self.lock();
        let sockets = state.sockets.as_deref().copied().unwrap_or_default();
        Stats::new(state.outbox.tally(), state.stalled(Instant::now()), state.written, sockets)
    }
}

/// What right to room a message comes with.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Claim {
    None,
    /// It is at the head of the queue, and does not wait behind itself.
    Head,
    /// Room for the largest message was promised. Once accepted, the promise is kept.
    Promised,
    /// It comes from the spool, where it was accepted before; so it comes also while the connection is being closed.
    #[cfg_attr(not(feature = "spool"), allow(dead_code))]
    Spooled,
}

/// Why a message was not accepted, before it is put into words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Refusing {
    TooLarge,
    Full,
    Closed,
    /// There is a spool, and messages go there.
    Spooled,
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

/// Drops failed replies, which have no owner but the account of their connection.
fn forget_failed(outbox: &mut Outbox) {
    static LOG: LazyLock<Throttle> = LazyLock::new(Throttle::default);
    while let Some(FailedMessage { number, reason, .. }) = outbox.take_failed() {
        LOG.warn(|left_out| tracing::warn!(number, left_out, "a reply failed: {reason}"));
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

#[cfg(test)]
mod tests;
