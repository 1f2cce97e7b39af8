//! One connection of a session, on the side that listens: numbers for what comes, room for what cannot be handled yet.
//!
//! Invariants: messages are numbered in the order of the stream, from where the sender was told to go on, and without gap
//! but where the sender says that there is one; those [held](Held) come before everything that is still to be read, and take
//! no more bytes than the window that was granted. What is known of the stream itself is not here but in
//! [`Streams`](super::streams::Streams).

use std::collections::BTreeSet;
use std::time::Instant;

use bytes::Bytes;

use super::super::framing::Framing;
use super::super::outbox::Rejection;
use super::SessionError;
use super::held::Held;
use super::ledger::{Ledger, Offer, Verdict};
use super::liveness::Liveness;
use super::streams::{ACK_DELAY, ACK_PACE, STREAM, Stand};
use super::wire::StreamId;

/// One connection of one stream: the name under which a handler reports what it has finished.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Key {
    pub(crate) stream: StreamId,
    pub(crate) epoch: u64,
}

/// One connection of a session, on the side that listens.
#[derive(Debug)]
pub(crate) struct Receiving {
    pub(super) key: Key,
    pub(super) framing: Framing,
    /// The number of the message that is read next.
    pub(super) next: u64,
    held: Held,
    /// Rejects that the peer was told of on this connection, and has not confirmed.
    told: BTreeSet<u64>,
    pub(super) window: usize,
    /// How many bytes of replies may be in flight.
    pub(super) reply_window: usize,
    /// The peer was told that everything up to here is finished.
    pub(super) acked: u64,
    pub(super) acked_at: Instant,
    /// Bytes that came since then.
    pub(super) since_ack: usize,
    /// When to tell it more, if more is finished.
    pub(super) ack_at: Option<Instant>,
    pub(super) liveness: Liveness,
    /// Nothing is handled here any more.
    is_parting: bool,
    /// This side is about to leave.
    pub(super) wants_goodbye: bool,
    pub(super) said_goodbye: bool,
    /// No message follows: the peer has said goodbye, or confirmed ours.
    pub(super) is_last: bool,
    pub(super) owes_confirmation: bool,
    pub(super) is_over: bool,
}

impl Receiving {
    pub(super) fn new(
        key: Key,
        framing: Framing,
        stand: Stand,
        window: usize,
        reply_window: usize,
        liveness: Liveness,
        now: Instant,
    ) -> Receiving {
        Receiving {
            key,
            framing,
            next: stand.dispatched.saturating_add(1),
            held: Held::new(framing, window),
            told: BTreeSet::new(),
            window,
            reply_window,
            acked: stand.committed,
            acked_at: now,
            since_ack: 0,
            ack_at: None,
            liveness,
            is_parting: false,
            wants_goodbye: false,
            said_goodbye: false,
            is_last: false,
            owes_confirmation: false,
            is_over: false,
        }
    }

    pub(crate) fn key(&self) -> Key {
        self.key
    }

    /// What both directions speak behind WELCOME.
    pub(crate) fn framing(&self) -> Framing {
        self.framing
    }

    /// Bytes of replies that may be in flight.
    pub(crate) fn reply_window(&self) -> usize {
        self.reply_window
    }

    /// A message was read: its number.
    ///
    /// # Errors
    ///
    /// If no message may follow, or no number is left.
    pub(crate) fn number(&mut self) -> Result<u64, SessionError> {
        if self.is_last {
            return Err(SessionError::OutOfPlace { frame: "a message", when: "after GOODBYE" });
        }
        let number = self.next;
        self.next = number.checked_add(1).ok_or(SessionError::NumbersExhausted)?;
        Ok(number)
    }

    /// The sender leaves numbers out: the next message that is read has this one.
    pub(super) fn skip(&mut self, number: u64) -> Result<(), SessionError> {
        if number <= self.next {
            return Err(SessionError::SkipsBack { number, next: self.next });
        }
        self.next = number;
        Ok(())
    }

    /// Holds a copy of a message that cannot be handled now, unless the peer knows that it is finished: it does not count it
    /// any more. They come back in order, by [`take_held`](Self::take_held).
    ///
    /// # Errors
    ///
    /// If more is held than the window allows: the peer has sent more than it may.
    pub(crate) fn hold(&mut self, number: u64, message: &[u8]) -> Result<(), SessionError> {
        if number <= self.acked || self.told.contains(&number) {
            return Ok(());
        }
        self.held.push(number, message)
    }

    /// The next message that was held: it comes before anything that is read.
    pub(crate) fn take_held(&mut self) -> Option<(u64, Bytes)> {
        self.held.take()
    }

    /// Puts a message back to where it was taken from, or read: before all that are held.
    pub(crate) fn put_back(&mut self, number: u64, message: &[u8]) {
        debug_assert!(number < self.next_to_begin());
        self.held.put_back(number, message);
    }

    /// The peer is told that everything up to `number` is finished. It may have sent some of it again: that room is the
    /// peer's from now on.
    pub(super) fn acknowledge(&mut self, number: u64) {
        self.acked = number;
        while self.held.first().is_some_and(|held| held <= number) {
            self.held.take();
        }
    }

    /// The peer is told of a reject. The same goes for that message.
    pub(super) fn tell(&mut self, number: u64) {
        self.told.insert(number);
        self.held.remove(number);
    }

    /// The peer has confirmed a reject: it sends that message no more.
    pub(super) fn confirmed(&mut self, number: u64) {
        self.told.remove(&number);
    }

    /// The number of the next message that is not begun: held, or still to be read.
    pub(crate) fn next_to_begin(&self) -> u64 {
        self.held.first().unwrap_or(self.next)
    }

    /// Bytes that the peer may have in flight.
    #[cfg(test)]
    pub(crate) fn window(&self) -> usize {
        self.window
    }

    /// Bytes of the frames that are held.
    #[cfg(test)]
    pub(crate) fn held_bytes(&self) -> usize {
        self.held.bytes()
    }

    /// Bytes of memory that these are accounted for.
    pub(crate) fn held_memory(&self) -> usize {
        self.held.memory()
    }

    /// Whether any message is held.
    pub(crate) fn has_held(&self) -> bool {
        !self.held.is_empty()
    }

    /// How many messages are held.
    pub(crate) fn held_messages(&self) -> u64 {
        self.held.messages()
    }

    /// Whether this message is held, or still to be read.
    pub(super) fn brings(&self, number: u64) -> bool {
        number >= self.next_to_begin()
    }

    /// Begins to leave: the sender is asked to stop, and to wait for what is in flight.
    pub(crate) fn drain(&mut self) {
        self.wants_goodbye = true;
    }

    /// Nothing is handled here any more, so what is finished is acknowledged without delay: there may be no later.
    pub(crate) fn part(&mut self) {
        self.is_parting = true;
    }

    /// Whether no message follows and all that came are acknowledged: this side may end its stream.
    pub(crate) fn is_drained(&self) -> bool {
        self.is_last && self.held.is_empty() && self.acked + 1 >= self.next && !self.owes_confirmation
    }

    /// Whether it was refused further service, and only has to be closed.
    #[cfg(test)]
    pub(crate) fn is_over(&self) -> bool {
        self.is_over
    }

    /// Bytes came.
    pub(crate) fn heard(&mut self, bytes: usize, now: Instant) {
        self.since_ack += bytes;
        self.liveness.heard(now);
    }

    /// Bytes went.
    #[cfg(test)]
    pub(crate) fn spoke(&mut self, now: Instant) {
        self.liveness.spoke(now);
    }

    /// Whether the peer has been silent for too long.
    pub(crate) fn is_dead(&self, now: Instant) -> bool {
        self.liveness.is_dead(now)
    }

    /// When to look again, if nothing happens before: to say something, to acknowledge, or because the peer is dead.
    pub(crate) fn wake_at(&self) -> Instant {
        self.ack_at.map_or(self.liveness.next(), |ack| ack.min(self.liveness.next()))
    }

    /// When what is finished should be acknowledged; `None` if nothing is new. While nothing is being worked on: at once if
    /// little came, since the sender may wait for it, and in a stream of messages for each eighth of the window, or every
    /// few milliseconds. While handlers work: when it is half of all that came, and otherwise ten times a second. And at
    /// once where there is no later.
    pub(super) fn ack_due(&self, committed: u64, is_idle: bool, now: Instant) -> Option<Instant> {
        let news = committed.saturating_sub(self.acked);
        let outstanding = (self.next - 1).saturating_sub(self.acked);
        let (at_once, wait) = if is_idle && self.held.is_empty() {
            (self.since_ack < STREAM || self.since_ack >= self.window / 8, ACK_PACE)
        } else {
            (news >= outstanding / 2, ACK_DELAY)
        };
        (news > 0).then(|| if at_once || self.is_parting { now } else { self.acked_at + wait })
    }
}

/// The right to hand messages of a stream to its handler, for one batch: taken from and given back to
/// [`Streams`](super::streams::Streams), so that no lock is held while user's code runs.
#[derive(Debug)]
#[must_use = "a turn that is not ended leaves its stream without one for ever"]
pub(crate) struct Turn {
    pub(super) key: Key,
    pub(super) ledger: Ledger,
    /// How many more may be rejected, or be open, before some are confirmed.
    pub(super) rejects_left: usize,
}

impl Turn {
    /// What was known when the turn began, to [go back](Self::restore) to it.
    pub(crate) fn remembered(&self) -> Ledger {
        self.ledger.clone()
    }

    /// Nothing of this turn has happened: the handler could not store it.
    pub(crate) fn restore(&mut self, before: Ledger) {
        self.ledger = before;
    }

    /// Asks what to do with the next message.
    pub(crate) fn offer(&mut self, number: u64) -> Offer {
        if self.ledger.open() + self.ledger.rejected.len() >= self.rejects_left && number > self.ledger.highest() {
            return Offer::Wait;
        }
        self.ledger.offer(number, self.key.epoch)
    }

    /// Whether the handler may be given a message before it is [offered](Self::offer): then it is [passed](Self::pass) when
    /// the handler is done with it, and offered if not.
    #[inline]
    pub(crate) fn is_next(&self, number: u64) -> bool {
        self.ledger.is_next(number) && self.ledger.rejected.len() < self.rejects_left
    }

    /// Whether no handler was ever given this message.
    pub(crate) fn is_first(&self, number: u64) -> bool {
        number > self.ledger.highest()
    }

    /// A message was next, and the handler is done with it.
    #[inline]
    pub(crate) fn pass(&mut self, number: u64) {
        self.ledger.pass(number);
    }

    /// The handler is done with a message. One that is not reported in its turn is in the handler's hands, and
    /// [reported later](super::streams::Streams::report).
    pub(crate) fn finish(&mut self, number: u64) {
        self.ledger.finish(number);
    }

    /// The handler refuses a message for good.
    pub(crate) fn reject(&mut self, number: u64, rejection: Rejection) {
        self.ledger.reject(number, rejection);
    }

    /// The handler has failed over a message, or panicked.
    pub(crate) fn fail(&mut self, number: u64, why: &str) -> Verdict {
        self.ledger.fail(number, why)
    }
}
