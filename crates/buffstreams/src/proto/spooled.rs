//! The Outbox behind a spool: messages come from disk, each with the number that it got there.
//!
//! The numbers are those of the session, so they outlive the process: a receiver may say that it has, has finished or
//! refuses a message that an earlier process sent, and that this one has not read from disk yet. What is said of such a
//! message is remembered, and applied when it comes. What is not settled when all is over stays on disk; it does not fail.
//!
//! Invariants: messages come in the order of their numbers, and a number that is passed over never comes. A message is
//! counted as accepted when it is on disk, and as in flight from then on, also while it has not come.

#![cfg_attr(not(feature = "spool"), allow(dead_code))]

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::time::Instant;

use bytes::Bytes;

use super::framing::Framing;
use super::outbox::{FailedReason, Outbox, Rejection, Tally};

/// What an Outbox knows of the spool that it is fed from.
#[derive(Debug)]
pub(super) struct Spooled {
    /// Messages that were on disk at the start, and those that came there since.
    recovered: u64,
    accepted: u64,
    /// The number that the next message on disk will get.
    end: u64,
    /// Below this number the disk knows that everything is settled or has failed.
    done: u64,
    /// How much of the Outbox's own count are numbers that were passed over.
    passed_over: u64,
    /// What the receiver refuses, and has not come.
    refused: BTreeMap<u64, Rejection>,
    /// What the receiver refuses, come or not, while the disk does not know that.
    unstored: BTreeSet<u64>,
    /// The receiver claims to have this message, which was never sent from here.
    unsent: Option<u64>,
}

impl Outbox {
    /// An empty Outbox whose messages come from a spool: `recovered` of them are there, with numbers from `first` to below
    /// `end`, and any of these may have been sent before.
    pub(crate) fn spooled(framing: Framing, limit: usize, first: u64, end: u64, recovered: u64) -> Outbox {
        debug_assert!(1 <= first && first <= end && recovered <= end - first);
        let mut outbox = Outbox::in_session(framing, limit);
        outbox.accepted = first;
        let flight = outbox.flight_mut();
        flight.next = end;
        let spooled = Spooled {
            recovered,
            accepted: 0,
            end,
            done: first,
            passed_over: first,
            refused: BTreeMap::new(),
            unstored: BTreeSet::new(),
            unsent: None,
        };
        flight.spooled = Some(Box::new(spooled));
        outbox
    }

    pub(crate) fn is_spooled(&self) -> bool {
        self.flight.as_ref().is_some_and(|flight| flight.spooled.is_some())
    }

    fn spool(&self) -> Option<&Spooled> {
        self.flight.as_ref()?.spooled.as_deref()
    }

    fn spool_mut(&mut self) -> &mut Spooled {
        self.flight_mut().spooled.as_mut().expect("only asked behind a spool")
    }

    /// So many more messages are on disk.
    pub(crate) fn note_spooled(&mut self, count: u64) {
        let spooled = self.spool_mut();
        spooled.accepted += count;
        spooled.end += count;
    }

    /// The receiver claims to have a message that was never sent from here.
    pub(crate) fn note_unsent(&mut self, number: u64) {
        if self.is_spooled() {
            self.spool_mut().unsent = Some(number);
        }
    }

    /// That message, if there is one: what is on disk is older than the stream.
    pub(crate) fn unsent(&self) -> Option<u64> {
        self.spool()?.unsent
    }

    /// Takes charge of the next message that has come from disk. `false` if its fate is known already.
    pub(crate) fn push_spooled(&mut self, message: Bytes, now: Instant) -> bool {
        let number = self.accepted;
        debug_assert!(number < self.end(), "only what was noted can come");
        let rejection = self.spool_mut().refused.remove(&number);
        // An acknowledgement stands for rejects, too.
        if rejection.is_none() && number <= self.flight().acked {
            self.accepted += 1;
            self.settled_count += 1;
            return false;
        }
        self.push_bytes(message, None, || now);
        let Some(rejection) = rejection else { return true };
        self.close_tail();
        let mut before = self.chunks.pop_back().expect("it was just pushed");
        let refused = before.split_last(&self.framing);
        if before.count > 0 {
            self.chunks.push_back(before);
        }
        self.fail_as(refused, FailedReason::Rejected, Some(rejection), now);
        false
    }

    /// What comes next has this number: those before it that have not come never will. Returns the refused ones among
    /// these, whose failure is on disk.
    pub(crate) fn pass_over(&mut self, number: u64) -> Vec<u64> {
        if number <= self.accepted {
            return Vec::new();
        }
        self.close_tail();
        let spooled =
            self.flight.as_mut().and_then(|flight| flight.spooled.as_mut()).expect("only asked behind a spool");
        spooled.passed_over += number - self.accepted;
        self.accepted = number;
        let still = spooled.refused.split_off(&number);
        std::mem::replace(&mut spooled.refused, still).into_keys().collect()
    }

    /// The receiver refuses a message whose fate was not known; the disk does not know yet.
    pub(super) fn note_refused(&mut self, number: u64) {
        if self.is_spooled() {
            self.spool_mut().unstored.insert(number);
        }
    }

    /// That a message was refused is on disk.
    pub(super) fn note_stored(&mut self, number: u64) {
        self.spool_mut().unstored.remove(&number);
    }

    /// Whether the receiver has refused this message, and the disk does not know.
    pub(super) fn is_unstored(&self, number: u64) -> bool {
        self.spool().is_some_and(|spooled| spooled.unstored.contains(&number))
    }

    /// The lowest number that the receiver must not think of as never to come. `open` is the first in the queue.
    ///
    /// If it forgot a reject that is not on disk and this process died, the next one would send that message again: the
    /// receiver must not then count it as finished.
    pub(super) fn first_spooled(&self, open: u64) -> u64 {
        let unstored = self.spool().and_then(|spooled| spooled.unstored.first().copied());
        unstored.map_or(open, |unstored| unstored.min(open))
    }

    /// Whether what lies before a message may be skipped: all that was refused of it is on disk.
    pub(super) fn may_skip(&self, numbers: Range<u64>) -> bool {
        self.spool().is_none_or(|spooled| spooled.unstored.range(numbers).next().is_none())
    }

    /// The receiver refuses a message that is not in the queue. Returns whether it is still to come.
    pub(super) fn refused_ahead(&mut self, number: u64, rejection: Rejection) -> bool {
        let is_to_come = self.is_spooled() && number >= self.accepted;
        if is_to_come {
            self.spool_mut().refused.insert(number, rejection);
            self.note_refused(number);
        }
        is_to_come
    }

    /// The number behind the last message that was accepted, come or not.
    pub(crate) fn end(&self) -> u64 {
        self.spool().map_or(self.accepted, |spooled| spooled.end.max(self.accepted))
    }

    /// That everything [below this number](Self::done_below) is settled or has failed is on disk.
    pub(crate) fn note_done(&mut self, number: u64) {
        self.spool_mut().done = number;
    }

    /// Whether the disk knows what became of everything. Until then, another process may send some of it again, so the
    /// receiver must not forget it.
    pub(super) fn is_done_on_disk(&self) -> bool {
        self.spool().is_none_or(|spooled| spooled.done == spooled.end)
    }

    /// Everything below this number is settled, or was taken from here as failed: the spool need not keep it.
    pub(crate) fn done_below(&self) -> u64 {
        self.lowest_failed().map_or(self.resolved_to(), |failed| failed.min(self.resolved_to()))
    }

    /// Whether what is to be handed out next is known to the receiver, which has everything before `expected`.
    pub(super) fn is_known_next(&self, expected: u64) -> bool {
        let waiting = self.chunks.get(self.handed).map_or(self.accepted - self.tail_count(), |chunk| chunk.first);
        self.is_spooled() && waiting < expected.min(self.accepted)
    }

    /// The account, where messages are accepted on disk. `count` is what has come of them.
    pub(super) fn account_spooled(&self, tally: Tally) -> Tally {
        let Some(spooled) = self.spool() else { return tally };
        let Spooled { recovered, accepted, passed_over, .. } = *spooled;
        let come = self.accepted - passed_over;
        Tally { recovered, accepted, in_flight: tally.in_flight + (recovered + accepted - come), ..tally }
    }
}

#[cfg(test)]
#[path = "spooled_tests.rs"]
mod tests;
