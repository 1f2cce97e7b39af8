//! The receiver's count. Each connection has a counter of its own, so that counting costs a message a few
//! instructions.
//!
//! A counter hands in what it has at the connection's first message, at its last, and when the connection ends. So the
//! sum is exact when it matters: when all have said hello, when all is there, and when nothing more can come.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::load::{Load, Seen, Work};
use crate::meter::Moment;
use crate::worker::{Report, say};

/// What all counters of a receiver hand their counts to. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Tally {
    load: Load,
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    sum: Mutex<Sum>,
    ended: Condvar,
    finishing: AtomicBool,
}

#[derive(Debug, Default)]
struct Sum {
    seen: Seen,
    counters: usize,
    started: Option<Moment>,
    complete: bool,
}

impl Tally {
    pub(crate) fn new(load: Load) -> Tally {
        Tally { load, shared: Arc::default() }
    }

    /// A counter for one connection.
    pub(crate) fn counter(&self) -> Counter {
        let hello = if self.load.work == Work::PingPong { self.load.hello() } else { 1 };
        self.counter_of(hello, self.load.share())
    }

    /// A counter for all connections together, for those who cannot tell them apart.
    #[cfg_attr(not(feature = "zeromq"), expect(dead_code, reason = "only zeromq mixes its connections"))]
    pub(crate) fn counter_of_all(&self) -> Counter {
        self.counter_of(self.load.hello(), self.load.messages)
    }

    fn counter_of(&self, hello: u64, share: u64) -> Counter {
        self.sum().counters += 1;
        Counter {
            tally: self.clone(),
            size: self.load.size as u64,
            seen: Seen::default(),
            handed_in: Seen::default(),
            next: hello,
            last: hello + share,
        }
    }

    /// Whether nothing more is to be expected: for those who are not told when a connection ends.
    #[cfg_attr(not(feature = "zeromq"), expect(dead_code, reason = "only zeromq hides the end of a connection"))]
    pub(crate) fn is_finishing(&self) -> bool {
        self.shared.finishing.load(Ordering::Relaxed)
    }

    /// Waits until all connections have ended, at most so long; says what was seen.
    pub(crate) fn finish(&self, allowed: Duration) -> Seen {
        self.shared.finishing.store(true, Ordering::Relaxed);
        let sum = self.sum();
        let waited = self.shared.ended.wait_timeout_while(sum, allowed, |sum| sum.counters > 0);
        waited.unwrap_or_else(PoisonError::into_inner).0.seen
    }

    fn sum(&self) -> MutexGuard<'_, Sum> {
        self.shared.sum.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn hand_in(&self, new: Seen) {
        let mut sum = self.sum();
        sum.seen.messages += new.messages;
        sum.seen.bytes += new.bytes;
        sum.seen.touched += new.touched;
        let Load { messages, .. } = self.load;
        let hello = self.load.hello();
        if sum.started.is_none() && sum.seen.messages >= hello {
            sum.started = Moment::now().ok();
            say(&Report::Ready);
        }
        if !sum.complete && sum.seen.messages >= hello + messages {
            sum.complete = true;
            if let (Some(started), Ok(now)) = (sum.started, Moment::now()) {
                say(&Report::Complete { clock_ns: now.clock_ns, cpu_ns: now.cpu_ns - started.cpu_ns });
            }
        }
    }
}

/// Counts the messages of a connection.
#[derive(Debug)]
pub(crate) struct Counter {
    tally: Tally,
    size: u64,
    seen: Seen,
    handed_in: Seen,
    /// The number of messages at which the count is handed in next.
    next: u64,
    last: u64,
}

impl Counter {
    /// Counts a message, and reads its first and its last byte.
    #[inline]
    pub(crate) fn message(&mut self, message: &[u8]) {
        let first = message.first().copied().unwrap_or_default();
        let last = message.last().copied().unwrap_or_default();
        self.count(message.len(), u64::from(first) + u64::from(last));
    }

    /// Counts a message of which so much was seen.
    #[inline]
    pub(crate) fn count(&mut self, length: usize, touched: u64) {
        self.seen.messages += 1;
        self.seen.bytes += length as u64;
        self.seen.touched += touched;
        if self.seen.messages >= self.next {
            self.hand_in();
        }
    }

    /// So many messages have come, whose bytes nobody looks at.
    #[inline]
    pub(crate) fn reach(&mut self, messages: u64) {
        self.seen.messages = messages;
        self.seen.bytes = messages * self.size;
        if messages >= self.next {
            self.hand_in();
        }
    }

    #[cold]
    fn hand_in(&mut self) {
        self.next = if self.seen.messages < self.last { self.last } else { u64::MAX };
        let Seen { messages, bytes, touched } = self.handed_in;
        self.handed_in = self.seen;
        self.tally.hand_in(Seen {
            messages: self.seen.messages - messages,
            bytes: self.seen.bytes - bytes,
            touched: self.seen.touched - touched,
        });
    }
}

impl Drop for Counter {
    fn drop(&mut self) {
        self.hand_in();
        self.tally.sum().counters -= 1;
        self.tally.shared.ended.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_all_counters_saw_is_summed_when_they_end() {
        let load = Load { connections: 2, ..Load::stream(3, 10) };
        let tally = Tally::new(load);
        let mut counters = [tally.counter(), tally.counter()];
        for _ in 0..6 {
            counters[0].message(&load.message());
            counters[1].message(&load.message());
        }
        drop(counters);
        assert_eq!(tally.finish(Duration::ZERO), load.expected());
    }

    #[test]
    fn a_message_too_few_shows_in_the_sum() {
        let load = Load::stream(3, 10);
        let tally = Tally::new(load);
        let mut counter = tally.counter();
        for _ in 0..10 {
            counter.message(&load.message());
        }
        drop(counter);
        assert_eq!(tally.finish(Duration::ZERO).messages, load.expected().messages - 1);
    }
}
