//! What a receiver knows of one stream's messages: which a handler was given, and which are finished.
//!
//! Invariant: every number up to `dispatched` is finished, or in hand, or failed for the moment and to be handled again;
//! none beyond it was ever given to a handler. It knows numbers only: no bytes, no connections but for their epochs.

use std::collections::VecDeque;

use super::super::outbox::Rejection;

/// A message over which its handler has failed so often is rejected.
pub(crate) const TRIES: u32 = 3;

/// Why a message was rejected over which its handler has panicked.
pub(crate) const PANICKED: &str = "the handler panicked";

/// What to do with a message that came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Offer {
    /// Give it to the handler, now.
    Handle,
    /// Drop it: a handler has it, or has finished it.
    Repeat,
    /// Hold it, and offer it again later: an earlier one must be handled again before it.
    Wait,
}

/// What becomes of a message over which a handler has failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// It is to be handled again: offered again on this connection, or sent again on the next.
    TryAgain,
    /// It has failed often enough.
    Rejected,
}

/// A message that is not finished.
#[derive(Clone, Copy, Debug)]
struct Open {
    number: u64,
    failures: u32,
    /// The epoch of the connection whose handler has it; `None` if it must be handled again.
    holder: Option<u64>,
}

/// One stream's messages, as far as they came.
#[derive(Clone, Debug)]
pub(crate) struct Ledger {
    dispatched: u64,
    /// Unfinished messages up to `dispatched`, in order.
    open: VecDeque<Open>,
    /// Rejected, and not yet known to the stream.
    pub(super) rejected: Vec<(u64, Rejection)>,
}

impl Ledger {
    /// Everything up to `finished` is finished, or never comes.
    pub(crate) fn new(finished: u64) -> Ledger {
        Ledger { dispatched: finished, open: VecDeque::new(), rejected: Vec::new() }
    }

    /// The highest number that a handler was ever given.
    pub(crate) fn highest(&self) -> u64 {
        self.dispatched
    }

    /// Up to here, no message need be sent again.
    pub(crate) fn dispatched(&self) -> u64 {
        self.failed().map_or(self.dispatched, |number| number - 1)
    }

    /// Up to here, every message is finished.
    pub(crate) fn committed(&self) -> u64 {
        self.open.front().map_or(self.dispatched, |open| open.number - 1)
    }

    /// The lowest number that must be handled again.
    pub(crate) fn failed(&self) -> Option<u64> {
        self.open.iter().find(|open| open.holder.is_none()).map(|open| open.number)
    }

    /// How many messages are not finished.
    pub(crate) fn open(&self) -> usize {
        self.open.len()
    }

    /// Whether the handler of another connection still has a message.
    pub(crate) fn is_in_other_hands(&self, epoch: u64) -> bool {
        self.open.iter().any(|open| open.holder.is_some_and(|holder| holder != epoch))
    }

    /// Messages before `first` will never be sent (again).
    pub(crate) fn skip_to(&mut self, first: u64) {
        self.dispatched = self.dispatched.max(first.saturating_sub(1));
        self.open.retain(|open| open.number >= first || open.holder.is_some());
    }

    /// A message came, on the connection of this epoch. Those that it leaves out never come.
    pub(crate) fn offer(&mut self, number: u64, epoch: u64) -> Offer {
        let again = self.failed();
        if again.is_some_and(|again| again < number) {
            return Offer::Wait;
        }
        if number <= self.dispatched {
            let Some(index) = self.index(number).filter(|_| again == Some(number)) else { return Offer::Repeat };
            self.open[index].holder = Some(epoch);
            return Offer::Handle;
        }
        self.dispatched = number;
        self.open.push_back(Open { number, failures: 0, holder: Some(epoch) });
        Offer::Handle
    }

    /// Whether a message that comes is news, and nothing before it is open.
    #[inline]
    pub(crate) fn is_next(&self, number: u64) -> bool {
        number > self.dispatched && self.open.is_empty()
    }

    /// A message that [was next](Self::is_next) came, and the handler is done with it.
    #[inline]
    pub(crate) fn pass(&mut self, number: u64) {
        debug_assert!(self.is_next(number));
        self.dispatched = number;
    }

    /// The handler is done with a message.
    pub(crate) fn finish(&mut self, number: u64) {
        if let Some(index) = self.index(number) {
            self.open.remove(index);
        }
    }

    /// The handler has refused a message for good.
    pub(crate) fn reject(&mut self, number: u64, rejection: Rejection) {
        if let Some(index) = self.index(number) {
            self.open.remove(index);
            self.rejected.push((number, rejection));
        }
    }

    /// The handler has failed over a message, or panicked.
    pub(crate) fn fail(&mut self, number: u64, why: &str) -> Verdict {
        let Some(index) = self.index(number) else { return Verdict::TryAgain };
        let open = &mut self.open[index];
        open.failures += 1;
        open.holder = None;
        if open.failures < TRIES {
            return Verdict::TryAgain;
        }
        self.reject(number, Rejection { code: 0, text: super::wire::shortened(why).to_owned() });
        Verdict::Rejected
    }

    /// The handler of this epoch's connection has panicked, and nobody knows over which of the messages that it has in hand.
    /// The first is as if it had failed over that: so one that always makes it panic is rejected once nothing is before it.
    pub(crate) fn blame(&mut self, epoch: u64) {
        if let Some(first) = self.open.iter().find(|open| open.holder == Some(epoch)).map(|open| open.number) {
            self.fail(first, PANICKED);
        }
    }

    /// The handler of this epoch's connection is gone, and what it had in hand with it.
    pub(crate) fn abandon(&mut self, epoch: u64) {
        for open in self.open.iter_mut().filter(|open| open.holder == Some(epoch)) {
            open.holder = None;
        }
    }

    fn index(&self, number: u64) -> Option<usize> {
        // Mostly the only one, or the last.
        if self.open.back().is_some_and(|open| open.number == number) {
            return Some(self.open.len() - 1);
        }
        self.open.binary_search_by_key(&number, |open| open.number).ok()
    }
}
