//! A sender's spool: a model of the disk, of the thread that writes it and of the task that feeds from it, one step at a time.
//!
//! A step is what the real ones do between two moments at which the process may die: gather, look at what is settled and has
//! failed, commit, tell the Outbox and the session, feed a message. Only what was committed outlives the process.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use bytes::Bytes;

use super::super::sending::{Ask, Sending};
use super::super::wire::{Control, StreamId};
use super::{FailedReason, LABEL, Sender, World, payload, stream_id};
use crate::proto::outbox::{FailedMessage, Fate, Outbox, Rejection};

/// The disk, and what the process at hand knows beside its Outbox.
#[derive(Default)]
pub(super) struct Spool {
    // On disk, beside the messages: their lengths are in the sender. Message number n has receipt n - 1.
    starts: u64,
    done: u64,
    failed: BTreeMap<u64, Rejection>,
    damaged: BTreeSet<u64>,
    // Of the process at hand.
    /// Messages that wait for the next record.
    gathered: Vec<usize>,
    turn: Option<Turn>,
    /// The next number to be fed, and the number behind the last that may be.
    next: u64,
    noted: u64,
    recovered: u64,
    accepted: u64,
    /// Failed, and not taken from the Outbox.
    waiting: BTreeSet<u64>,
    was_welcomed: bool,
    /// It reads slowly, so that the receiver speaks of messages which have not come.
    is_slow: bool,
    /// It writes slowly, so that much happens before what was heard is on disk.
    writes_slowly: bool,
    // Of all processes.
    /// Up to here, a process that died was acknowledged.
    acked: u64,
}

/// One transaction.
struct Turn {
    add: Vec<usize>,
    done: u64,
    failed: Vec<FailedMessage>,
    is_committed: bool,
}

impl Spool {
    /// Another process begins, with what is on disk.
    pub(super) fn begin(&mut self, stream: StreamId, accepted: u64, ask: &Ask, memory: usize) -> (Outbox, Sending) {
        let Spool { starts, done, failed, damaged, acked, .. } = std::mem::take(self);
        let (starts, done, end) = (starts + 1, done.max(1), accepted + 1);
        let gone = |number: &u64| failed.contains_key(number) || damaged.contains(number);
        let recovered = (done..end).filter(|number| !gone(number)).count() as u64;
        *self = Spool { starts, done, failed, damaged, acked, next: done, noted: end, recovered, ..Spool::default() };
        let outbox = Outbox::spooled(ask.framing, memory, done, end, recovered);
        (outbox, Sending::new(stream, starts << 32, ask.clone()))
    }

    fn is_gone(&self, number: u64) -> bool {
        self.failed.contains_key(&number) || self.damaged.contains(&number)
    }

    /// Whether the disk has lost a message.
    pub(super) fn has_lost(&self, number: u64) -> bool {
        self.damaged.contains(&number)
    }

    /// Whether a process that died knew that this message is finished.
    pub(super) fn forgot(&self, number: u64) -> bool {
        number <= self.acked
    }

    /// Whether a process that is not the first hears for the first time how the receiver calls its state.
    pub(super) fn is_first_welcome(&mut self) -> bool {
        !std::mem::replace(&mut self.was_welcomed, true) && self.starts > 1
    }

    /// Whether nothing is left to be sent, or to be written.
    pub(super) fn is_over(&self, sender: &Sender) -> bool {
        self.done == sender.lengths.len() as u64 + 1 && self.gathered.is_empty() && self.turn.is_none()
    }

    /// What lets the receiver forget something is said only when it is on disk.
    pub(super) fn may_say(&self, control: &Control) {
        match control {
            Control::ConfirmReject(number) => {
                let is_stored = *number < self.done || self.is_gone(*number);
                assert!(is_stored, "that {number} is rejected is confirmed, and is not on disk");
            }
            Control::Goodbye => {
                assert_eq!(self.done, self.noted, "what the receiver is to forget is sent again by the next process");
            }
            _ => {}
        }
    }

    pub(super) fn check(&self, sender: &Sender) {
        let Sender { outbox, lengths, framing, .. } = sender;
        let tally = outbox.tally();
        assert_eq!((tally.recovered, tally.accepted), (self.recovered, self.accepted));
        assert_eq!(outbox.end(), self.noted);
        let frame = |number: u64| {
            let length = lengths[number as usize - 1];
            length + framing.prefix_width(length)
        };
        let come = || sender.unresolved.range(..self.next - 1).map(|receipt| receipt + 1);
        let known: usize = come().filter(|number| *number <= sender.dispatched).map(frame).sum();
        let in_window = outbox.in_window();
        assert!(in_window <= sender.window.max(known), "{in_window} bytes in a window of {}", sender.window);
        let bytes: usize = come().map(frame).sum();
        assert_eq!(bytes, tally.in_flight_bytes);
        assert!(bytes <= outbox.limit() || come().count() == 1);
        let unknown = sender.unresolved.first().map(|receipt| receipt + 1);
        let least = unknown.into_iter().chain(self.waiting.first().copied()).min().unwrap_or(self.noted);
        assert!(outbox.done_below() <= least, "the fate of {least} is not known to the disk");
    }
}

impl World {
    /// Messages for the next record.
    pub(super) fn gather(&mut self, index: usize) {
        let World { rng, senders, maximum, .. } = self;
        let Some(spool) = &mut senders[index].spool else { return };
        for _ in 0..rng.usize(1..6) {
            let most = if rng.u8(..8) == 0 { *maximum } else { (*maximum).min(200) };
            spool.gathered.push(rng.usize(LABEL..=most));
        }
        if rng.u8(..30) == 0 {
            senders[index].is_leaving = true;
            senders[index].sending.leave();
        }
    }

    /// The thread or the task of a spool comes a step further; in a quiet world, as far as it can.
    pub(super) fn spool(&mut self, index: usize) {
        let sender = &self.senders[index];
        let Some(spool) = &sender.spool else { return };
        if self.is_quiet {
            let is_stuck = sender.is_over && !sender.is_over();
            for _ in 0..3 {
                self.keep(index);
            }
            while self.feed(index) {}
            if is_stuck && self.senders[index].spool.as_ref().is_some_and(|spool| spool.turn.is_none()) {
                // It was closed in the middle of something; the next process ends that.
                self.die(index);
            }
            return;
        }
        if sender.is_over && spool.turn.is_none() && self.rng.u8(..8) == 0 {
            return self.die(index);
        }
        let Spool { is_slow, writes_slowly, .. } = *spool;
        match self.rng.u8(..24) {
            0 => self.keep(index),
            1..8 if !writes_slowly => self.keep(index),
            8 => {
                self.feed(index);
            }
            9.. if !is_slow => {
                for _ in 0..self.rng.usize(1..5) {
                    self.feed(index);
                }
            }
            _ => {}
        }
    }

    /// The thread's next step.
    fn keep(&mut self, index: usize) {
        let World { senders, truths, seen, .. } = self;
        let (sender, truth) = (&mut senders[index], &truths[index]);
        let spool = sender.spool.as_mut().expect("only asked of one with a spool");
        match &mut spool.turn {
            None => {
                let failed: Vec<_> = std::iter::from_fn(|| sender.outbox.take_failed()).collect();
                failed.iter().for_each(|failed| assert!(spool.waiting.remove(&failed.number)));
                let done = sender.outbox.done_below().max(spool.done);
                for number in spool.done..done {
                    let has_failed = spool.is_gone(number) || failed.iter().any(|failed| failed.number == number);
                    let is_settled =
                        !sender.unresolved.contains(&(number - 1)) && truth.finished.contains(&(number - 1));
                    assert!(has_failed || is_settled, "the fate of {number} is not known, and {done} is written");
                }
                let add = std::mem::take(&mut spool.gathered);
                if !add.is_empty() || !failed.is_empty() || done > spool.done {
                    spool.turn = Some(Turn { add, done, failed, is_committed: false });
                }
            }
            Some(turn) if !turn.is_committed => {
                turn.is_committed = true;
                spool.done = turn.done;
                for failed in &turn.failed {
                    let receipt = failed.number - 1;
                    assert_eq!(failed.reason, FailedReason::Rejected);
                    let message = payload(index, receipt, sender.lengths[receipt as usize]);
                    assert!(failed.message == message, "{receipt} came back other");
                    let rejection = failed.rejection.clone().expect("a rejected message says why");
                    truth.has_rejected(receipt, &rejection);
                    assert_eq!(spool.failed.insert(failed.number, rejection), None, "{receipt} fails twice");
                    sender.fates[receipt as usize] = Some(failed.reason);
                    seen.stored += 1;
                }
                for length in &turn.add {
                    sender.lengths.push(*length);
                    sender.fates.push(None);
                    sender.settled.push(false);
                }
            }
            Some(_) => {
                let turn = spool.turn.take().expect("it was just looked at");
                let count = turn.add.len() as u64;
                sender.unresolved.extend(spool.noted - 1..spool.noted - 1 + count);
                spool.noted += count;
                spool.accepted += count;
                sender.outbox.note_spooled(count);
                sender.outbox.note_done(turn.done);
                for failed in &turn.failed {
                    sender.sending.stored(failed.number, &mut sender.outbox);
                }
            }
        }
    }

    /// The next message comes from disk. Whether there was one, and room for it.
    fn feed(&mut self, index: usize) -> bool {
        let World { senders, now, seen, .. } = self;
        let sender = &mut senders[index];
        let spool = sender.spool.as_mut().expect("only asked of one with a spool");
        let next = (spool.next..spool.noted).find(|number| !spool.is_gone(*number));
        for refused in sender.outbox.pass_over(next.unwrap_or(spool.noted)) {
            sender.sending.stored(refused, &mut sender.outbox);
        }
        spool.next = next.unwrap_or(spool.noted);
        let Some(number) = next else { return false };
        let length = sender.lengths[number as usize - 1];
        if sender.outbox.admits(length, 0).is_err() {
            return false;
        }
        let message = Bytes::from(payload(index, number - 1, length));
        let before = sender.outbox.tally();
        let is_news = sender.outbox.push_spooled(message, *now);
        spool.next = number + 1;
        let after = sender.outbox.tally();
        assert_eq!(is_news, (before.settled, before.failed) == (after.settled, after.failed));
        seen.known_ahead += after.settled - before.settled;
        seen.refused_ahead += after.failed - before.failed;
        self.learn(index);
        true
    }

    /// What became of the messages that have come.
    pub(super) fn learn_spooled(&mut self, index: usize) {
        let World { senders, truths, seen, .. } = self;
        let (sender, truth) = (&mut senders[index], &truths[index]);
        let spool = sender.spool.as_mut().expect("only asked of one with a spool");
        let come = sender.unresolved.range(..spool.next - 1).copied();
        let over: Vec<_> = come
            .map(|receipt| (receipt, sender.outbox.fate(receipt + 1)))
            .filter(|(_, fate)| *fate != Fate::InFlight)
            .collect();
        for (receipt, fate) in over {
            sender.unresolved.remove(&receipt);
            if fate == Fate::Failed {
                seen.rejected += 1;
                spool.waiting.insert(receipt + 1);
                continue;
            }
            assert_eq!(fate, Fate::Settled);
            assert!(truth.finished.contains(&receipt), "message {receipt} is settled, and no handler has finished it");
            assert!(receipt < truth.acknowledged, "message {receipt} is released, and was not acknowledged");
            sender.settled[receipt as usize] = true;
            seen.settled += 1;
        }
    }

    /// The process of a sender dies, and another begins with what is on disk.
    pub(super) fn die(&mut self, index: usize) {
        let World { rng, senders, links, seen, is_quiet, maximum, .. } = self;
        let sender = &mut senders[index];
        if let Some(at) = sender.link.take().filter(|_| rng.bool()) {
            // The kernel says so, after a part of what it had; else its machine is gone, and nobody hears of it.
            let link = &mut links[at];
            link.is_cut = true;
            link.up.truncate(rng.usize(..=link.up.len()));
        }
        seen.died += 1;
        let end = sender.lengths.len() as u64 + 1;
        let spool = sender.spool.as_mut().expect("only asked of one with a spool");
        spool.acked = spool.acked.max(sender.outbox.flight().acked);
        if !*is_quiet && rng.u8(..20) == 0 && spool.done < end {
            let from = rng.u64(spool.done..end);
            let lost: Range<u64> = from..rng.u64(from..end.min(from + 10)) + 1;
            spool.damaged.extend(lost.filter(|number| !spool.failed.contains_key(number)));
            seen.damaged += 1;
        }
        let memory = rng.usize(0..6 * *maximum);
        let (outbox, sending) = spool.begin(stream_id(index), end - 1, &sender.ask, memory);
        (sender.outbox, sender.sending) = (outbox, sending);
        (spool.is_slow, spool.writes_slowly) = (rng.bool(), rng.bool());
        seen.recovered += spool.recovered;
        sender.buffers.clear();
        (sender.window, sender.resumed_with, sender.dispatched) = (0, 0, 0);
        (sender.is_leaving, sender.is_over) = (false, false);
        sender.unresolved =
            (spool.done..end).filter(|number| !spool.is_gone(*number)).map(|number| number - 1).collect();
    }
}
