//! What a spool asks of the Outbox that it feeds, under its lock.

use std::pin::pin;
use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;

use super::{Claim, Head, Overflow, Phase, Refusing, SharedOutbox, State};
use crate::error::Result;
use crate::proto::outbox::{FailedMessage, Outbox};
use crate::proto::session::sending::Sending;

impl SharedOutbox {
    /// For messages that come from a spool: `recovered` of them are there, numbered from `first` to below `end`.
    pub(crate) fn spooled(sending: Sending, limit: usize, first: u64, end: u64, recovered: u64) -> Arc<Self> {
        let outbox = Outbox::spooled(sending.session_framing(), limit, first, end, recovered);
        SharedOutbox::build(outbox, Overflow::Wait, None, Some(Box::new(sending)), false)
    }

    /// That a message of this length may come into the spool.
    ///
    /// # Errors
    ///
    /// It is over the maximum, or the connection is closed.
    pub(crate) fn check(&self, length: usize) -> Result<()> {
        let refusing = {
            let state = self.lock();
            if state.outbox.framing().check(length).is_err() {
                Some(Refusing::TooLarge)
            } else if matches!(state.phase, Phase::Open | Phase::Draining) {
                None
            } else {
                Some(Refusing::Closed)
            }
        };
        refusing.map_or(Ok(()), |refusing| Err(self.error(refusing, length)))
    }

    /// So many more messages are on disk: from now on they are accepted.
    pub(crate) fn note_spooled(&self, count: u64) {
        self.lock().outbox.note_spooled(count);
    }

    /// Takes charge of a message from disk, when there is room for it in memory. `false` if all is over.
    ///
    /// Cancel safe.
    ///
    /// # Errors
    ///
    /// It is over the maximum.
    pub(crate) async fn feed(&self, number: u64, message: &Bytes) -> Result<bool> {
        self.pass_over(number);
        let _head = Head::take(self, self.framing().prefix_width(message.len()) + message.len());
        loop {
            let mut room = pin!(self.room.notified());
            room.as_mut().enable();
            let mut is_news = false;
            let push = |outbox: &mut Outbox, _| {
                is_news = outbox.push_spooled(message.clone(), Instant::now());
                number
            };
            match self.accept(message.len(), None, Claim::Spooled, push) {
                Ok(_) => {
                    if !is_news {
                        // Its fate was known, and somebody may wait for it.
                        self.announce(&self.lock(), true);
                        self.chores.notify_one();
                    }
                    return Ok(true);
                }
                Err(Refusing::Full) => room.await,
                Err(Refusing::Closed) => return Ok(false),
                Err(refusing) => return Err(self.error(refusing, message.len())),
            }
        }
    }

    /// Messages below this number that have not come from disk never will: their fate is known there.
    pub(crate) fn pass_over(&self, number: u64) {
        let mut state = self.lock();
        if number <= state.outbox.next_number() {
            return;
        }
        let State { sending, outbox, .. } = &mut *state;
        for refused in outbox.pass_over(number) {
            if let Some(sending) = sending {
                sending.stored(refused, outbox);
            }
        }
        // Whoever waits for all, may have waited for just these.
        self.announce(&state, true);
    }

    /// Takes the failed messages that wait; and says below which number nothing needs to be kept on disk, but for those.
    pub(crate) fn take_done(&self, failed: &mut Vec<FailedMessage>) -> u64 {
        while let Some(message) = self.take_failed() {
            failed.push(message);
        }
        self.lock().outbox.done_below()
    }

    /// That these messages have failed is on disk, and that nothing is unknown of any below this number.
    pub(crate) fn note_stored(&self, failed: &[FailedMessage], done: u64) {
        let mut state = self.lock();
        state.outbox.note_done(done);
        let State { sending, outbox, .. } = &mut *state;
        if let Some(sending) = sending {
            failed.iter().for_each(|failed| sending.stored(failed.number, outbox));
        }
        // There may be something to confirm, or the last goodbye to say.
        let is_worth_it = !failed.is_empty() || matches!(state.phase, Phase::Closing(_));
        let waker = state.task.clone().filter(|_| is_worth_it);
        drop(state);
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    /// A message that the receiver claims to have, and that was never sent from this spool.
    pub(crate) fn unsent(&self) -> Option<u64> {
        self.lock().outbox.unsent()
    }

    /// Waits until all is over.
    ///
    /// Cancel safe.
    pub(crate) async fn ended(&self) {
        let mut phase = self.phase_after(Phase::Open).await;
        while !matches!(phase, Phase::Ended(_)) {
            phase = self.phase_after(phase).await;
        }
    }
}
