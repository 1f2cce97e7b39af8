//! The Outbox in a session: written chunks are kept until they are acknowledged.
//!
//! Nothing is copied and nothing is queued twice: a chunk stays where it is, gets the session's numbers when it is first
//! handed out, and leaves when an acknowledgement covers it. After a break, writing goes on behind what the receiver
//! says it has; what was never begun loses its numbers again, so dropping it leaves no gap.
//!
//! Invariants: numbers are given in the order of the queue, without gap, and never again for another message. Handed out
//! and not acknowledged are never more bytes than the window. What is released is acknowledged, rejected or given up.
//! It refuses to believe an acknowledgement of what it never handed out, or one lower than before.

use std::collections::VecDeque;
use std::fmt;
use std::time::Instant;

use bytes::Bytes;

use super::framing::Framing;
use super::outbox::{FailedReason, Outbox, Rejection, keep_buffer};
use super::session::wire::Control;
use super::spooled::Spooled;

/// What an Outbox knows of its session beside its chunks.
#[derive(Debug)]
pub(super) struct Flight {
    /// The number that the next message gets; behind a spool, the one after the highest that was ever handed out.
    pub(super) next: u64,
    /// Everything up to this number was acknowledged.
    pub(super) acked: u64,
    /// Bytes that may be handed out and not acknowledged.
    window: usize,
    /// Bytes that are.
    in_window: usize,
    /// Whether the receiver has said where it stands, on the connection at hand.
    resumed: bool,
    /// The number that it gives to the next message that comes.
    expected: u64,
    /// Bytes handed out on the connection at hand, control frames and all.
    position: u64,
    /// How many of them the kernel took, as far as is known.
    written: u64,
    /// How many of them must have gone, for the receiver has answered to them.
    answered: u64,
    /// The spool that messages come from, if there is one.
    pub(super) spooled: Option<Box<Spooled>>,
}

/// What a receiver says that cannot be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Untrue {
    /// It has a message that it was never sent.
    NeverSent { number: u64, last: u64 },
    /// It lacks a message of which it had said that it was finished.
    TakenBack { number: u64, acked: u64 },
    /// It lacks a message that was declared never to come again.
    Behind { number: u64, first: u64 },
}

impl Outbox {
    /// An empty Outbox that keeps messages until they are acknowledged; at most `limit` bytes of frames, or one message
    /// if that is larger.
    pub(crate) fn in_session(framing: Framing, limit: usize) -> Outbox {
        let mut outbox = Outbox::new(framing, limit);
        outbox.flight = Some(Box::new(Flight {
            next: 1,
            acked: 0,
            window: 0,
            in_window: 0,
            resumed: false,
            expected: 1,
            position: 0,
            written: 0,
            answered: 0,
            spooled: None,
        }));
        outbox
    }

    pub(super) fn flight(&self) -> &Flight {
        self.flight.as_ref().expect("only asked in a session")
    }

    pub(super) fn flight_mut(&mut self) -> &mut Flight {
        self.flight.as_mut().expect("only asked in a session")
    }

    /// The lowest number that may still be written: everything before is acknowledged, rejected or given up.
    pub(crate) fn first_number(&self) -> u64 {
        if self.is_spooled() {
            return self.first_spooled(self.resolved_to());
        }
        let unnumbered = self.flight().next;
        self.chunks.front().map(|chunk| chunk.session).filter(|number| *number != 0).unwrap_or(unnumbered)
    }

    /// Up to here, everything was acknowledged.
    pub(super) fn acked_to(&self) -> u64 {
        self.flight().acked
    }

    /// The highest number that was given to a message, or 0.
    pub(crate) fn last_number(&self) -> u64 {
        self.flight().next - 1
    }

    /// Bytes handed out and not acknowledged.
    pub(crate) fn in_window(&self) -> usize {
        self.flight().in_window
    }

    /// Gives the writer control frames, which go before anything that is handed out after them.
    pub(crate) fn hand_control(&mut self, frames: Vec<u8>, into: &mut VecDeque<Bytes>) {
        if !frames.is_empty() {
            self.flight_mut().position += frames.len() as u64;
            into.push_back(Bytes::from(frames));
        }
    }

    /// As [`hand`](Outbox::hand): as much as the window allows, and nothing before the receiver has said where it stands.
    pub(super) fn hand_in_session(&mut self, most: usize, into: &mut VecDeque<Bytes>) {
        let framing = self.framing;
        let mut total = 0;
        while total < most {
            let Flight { window, in_window, resumed, expected, .. } = *self.flight();
            let room = window.saturating_sub(in_window);
            let is_known = self.is_known_next(expected);
            if !resumed || (room == 0 && !is_known) {
                return;
            }
            if self.handed == self.chunks.len() {
                self.close_tail();
            }
            let handed = self.handed;
            if is_known {
                // It came from disk after the receiver had said that it has it.
                self.keep_known(expected - 1);
                continue;
            }
            let Some(chunk) = self.chunks.get_mut(handed) else { return };
            let first = chunk.session;
            if first > expected && !self.may_skip(expected..first) {
                return;
            }
            let chunk = &mut self.chunks[handed];
            if chunk.len() > room {
                let (count, bytes) = chunk.front(&framing, |_, place| place.end <= room);
                if count == 0 {
                    return;
                }
                let front = chunk.split(count, bytes);
                self.chunks.insert(handed, front);
            }
            let flight = self.flight.as_mut().expect("only asked in a session");
            let chunk = &mut self.chunks[handed];
            if chunk.session == 0 {
                chunk.session = flight.next;
            }
            let end = chunk.session.checked_add(chunk.count).expect("2^64 messages take longer than there is time");
            flight.next = flight.next.max(end);
            if chunk.session != flight.expected {
                // What lay between was rejected, while what is sent here is sent again.
                let mut skip = Vec::new();
                Control::Skip(chunk.session).put(&framing, &mut skip);
                flight.position += skip.len() as u64;
                into.push_back(Bytes::from(skip));
            }
            flight.expected = chunk.session_end();
            chunk.at = Some(flight.position);
            flight.position += chunk.len() as u64;
            flight.in_window += chunk.len();
            total += chunk.len();
            into.push_back(chunk.frames.clone());
            if !chunk.payload.is_empty() {
                into.push_back(chunk.payload.clone());
            }
            self.handed += 1;
        }
    }

    /// Whether messages wait that the window, or the lack of an answer, holds back.
    pub(crate) fn is_held_back(&self) -> bool {
        self.flight.is_some() && (self.handed < self.chunks.len() || self.has_tail())
    }

    /// Hands out no more messages on the connection at hand.
    pub(crate) fn stop(&mut self) {
        self.flight_mut().window = 0;
    }

    /// Another window than the one that was granted.
    #[cfg(test)]
    pub(super) fn resume_window(&mut self, window: usize) {
        self.flight_mut().window = window;
    }

    /// Whether every message is settled or failed, and will not be sent again by another process.
    pub(crate) fn is_resolved(&self) -> bool {
        self.chunks.is_empty() && !self.has_tail() && self.is_done_on_disk()
    }

    /// As [`wrote`](Outbox::wrote); it settles nothing, and must be told as soon as the stream has taken the bytes, flushed
    /// or not: what is not known to have begun may be dropped, and its number given to another message.
    pub(super) fn wrote_in_session(&mut self, bytes: usize) -> bool {
        let flight = self.flight_mut();
        flight.written += bytes as u64;
        debug_assert!(flight.written <= flight.position, "only what was handed out can have been written");
        false
    }

    /// As [`rewind`](Outbox::rewind): everything waits for the receiver to say where it stands. What was never begun has
    /// no number any more.
    pub(super) fn rewind_in_session(&mut self) -> bool {
        let framing = self.framing;
        let flight = self.flight_mut();
        let begun = flight.written.max(flight.answered);
        flight.resumed = false;
        flight.in_window = 0;
        (flight.position, flight.written, flight.answered) = (0, 0, 0);
        self.handed = 0;
        let mut index = 0;
        while index < self.chunks.len() && self.chunks[index].session != 0 {
            let chunk = &mut self.chunks[index];
            if let Some(at) = chunk.at.take() {
                let (count, bytes) = chunk.front(&framing, |_, place| at + (place.start as u64) < begun);
                if count == chunk.count {
                    chunk.touched = true;
                } else if count > 0 {
                    let mut front = chunk.split(count, bytes);
                    front.touched = true;
                    self.chunks.insert(index, front);
                }
            }
            let is_spooled = self.is_spooled();
            let chunk = &mut self.chunks[index];
            if !chunk.touched && !is_spooled {
                chunk.session = 0;
                let count = chunk.count;
                self.flight_mut().next -= count;
            }
            index += 1;
        }
        false
    }

    /// The receiver says where it stands: nothing up to `dispatched` is written again, and so many bytes may be in flight
    /// from now on.
    ///
    /// # Errors
    ///
    /// If it cannot stand there; nothing is changed then.
    pub(crate) fn resume(&mut self, dispatched: u64, window: usize) -> Result<(), Untrue> {
        let last = self.last_number();
        if dispatched > last {
            return Err(Untrue::NeverSent { number: dispatched, last });
        }
        debug_assert!(!self.flight().resumed && self.handed == 0, "once for each connection");
        self.keep_known(dispatched);
        let flight = self.flight_mut();
        (flight.resumed, flight.window) = (true, window);
        flight.expected = dispatched + 1;
        Ok(())
    }

    /// The receiver has everything up to `dispatched`: what is next in the queue of that waits for acknowledgement only.
    fn keep_known(&mut self, dispatched: u64) {
        let framing = self.framing;
        while let Some(chunk) = self.chunks.get_mut(self.handed) {
            if chunk.session == 0 || chunk.session > dispatched {
                break;
            }
            let known = dispatched - chunk.session + 1;
            if known < chunk.count {
                let (count, bytes) = chunk.front(&framing, |index, _| index < known);
                let front = chunk.split(count, bytes);
                self.chunks.insert(self.handed, front);
            }
            let bytes = self.chunks[self.handed].len();
            self.flight_mut().in_window += bytes;
            self.handed += 1;
        }
    }

    /// The receiver has finished everything up to `number`. Returns whether anything was settled by that.
    ///
    /// # Errors
    ///
    /// If that cannot be; nothing is changed then.
    pub(crate) fn acked(&mut self, number: u64) -> Result<bool, Untrue> {
        let last = self.last_number();
        if number > last {
            return Err(Untrue::NeverSent { number, last });
        }
        let acked = self.flight().acked;
        if number < acked {
            return Err(Untrue::TakenBack { number, acked });
        }
        self.flight_mut().acked = number;
        if self.is_spooled() && number >= self.next_number() - self.tail_count() {
            self.close_tail();
        }
        let framing = self.framing;
        let before = self.settled_count;
        while let Some(chunk) = self.chunks.front_mut() {
            if chunk.session == 0 || chunk.session > number {
                break;
            }
            let finished = number - chunk.session + 1;
            if finished < chunk.count {
                let (count, bytes) = chunk.front(&framing, |index, _| index < finished);
                let front = chunk.split(count, bytes);
                self.settle(front.len(), front.count, front.at, self.handed > 0);
                break;
            }
            let was_handed = self.handed > 0;
            let chunk = self.chunks.pop_front().expect("it is the front");
            self.handed -= usize::from(was_handed);
            self.settle(chunk.len(), chunk.count, chunk.at, was_handed);
            keep_buffer(chunk.frames);
        }
        Ok(self.settled_count != before)
    }

    fn settle(&mut self, bytes: usize, count: u64, at: Option<u64>, was_handed: bool) {
        self.bytes -= bytes;
        self.settled_count += count;
        self.leave_window(bytes, at, was_handed);
    }

    /// The receiver has answered to these bytes: they have gone, and the window is free of them.
    fn leave_window(&mut self, bytes: usize, at: Option<u64>, was_handed: bool) {
        let flight = self.flight_mut();
        if was_handed {
            flight.in_window -= bytes;
        }
        if let Some(at) = at {
            flight.answered = flight.answered.max(at + bytes as u64);
        }
    }

    /// The receiver's handler has refused a message. Returns whether it was in flight, or is still to come from a spool: if
    /// not, its fate was known before.
    ///
    /// # Errors
    ///
    /// If that cannot be; nothing is changed then.
    pub(crate) fn rejected(&mut self, number: u64, rejection: Rejection, now: Instant) -> Result<bool, Untrue> {
        let last = self.last_number();
        if number > last {
            return Err(Untrue::NeverSent { number, last });
        }
        if self.is_spooled() {
            self.close_tail();
        }
        let framing = self.framing;
        let index = self.chunks.partition_point(|chunk| chunk.session != 0 && chunk.session_end() <= number);
        let Some(chunk) = self.chunks.get_mut(index).filter(|chunk| (1..=number).contains(&chunk.session)) else {
            return Ok(self.refused_ahead(number, rejection));
        };
        let was_handed = index < self.handed;
        let ahead = number - chunk.session;
        let (count, bytes) = chunk.front(&framing, |index, _| index < ahead);
        let front = (count > 0).then(|| chunk.split(count, bytes));
        let refused = chunk.split_first(&framing);
        let mut pieces = 0;
        if chunk.count == 0 {
            self.chunks.remove(index);
        } else {
            pieces += 1;
        }
        if let Some(front) = front {
            self.chunks.insert(index, front);
            pieces += 1;
        }
        if was_handed {
            self.handed = self.handed - 1 + pieces;
        }
        self.leave_window(refused.len(), refused.at, was_handed);
        self.note_refused(number);
        self.fail_as(refused, FailedReason::Rejected, Some(rejection), now);
        Ok(true)
    }
}

impl fmt::Display for Untrue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Untrue::NeverSent { number, last } => {
                write!(f, "the receiver claims to have message {number}, and the last one sent is {last}")
            }
            Untrue::TakenBack { number, acked } => {
                write!(f, "the receiver has finished {number} messages, and said before that it had finished {acked}")
            }
            Untrue::Behind { number, first } => {
                write!(f, "the receiver stands at message {number}, and was told that the next to come is {first}")
            }
        }
    }
}

impl std::error::Error for Untrue {}
