//! What came back: how many answers, when, and how long each took.
//!
//! Connections keep their own answers while a batch lasts and hand them in under one short lock, so that a message costs no
//! lock. What was due in the warm-up is counted, but neither its latency nor the rate of that time is kept.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;

/// In how many parts the measured time is divided for the rate over time, and the shortest of them.
const PARTS: u32 = 100;
const SHORTEST_PART: Duration = Duration::from_millis(10);

/// Nanoseconds with three figures, however many they are.
pub(crate) fn histogram() -> Histogram<u64> {
    Histogram::new(3).expect("three figures are few enough")
}

/// The measured time: what lies between the warm-up and the end, from the start of the load.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Window {
    pub(crate) start: Instant,
    pub(crate) from: Duration,
    pub(crate) to: Duration,
}

impl Window {
    pub(crate) fn length(&self) -> Duration {
        self.to.saturating_sub(self.from)
    }

    /// Of one part.
    pub(crate) fn part(&self) -> Duration {
        (self.length() / PARTS).max(SHORTEST_PART)
    }
}

/// The answers of all connections.
#[derive(Debug)]
pub(crate) struct Account {
    window: Window,
    answers: Mutex<Answers>,
}

/// What was answered so far.
#[derive(Clone, Debug)]
pub(crate) struct Answers {
    /// Messages that were answered, with those of the warm-up.
    pub(crate) answered: u64,
    pub(crate) bytes: u64,
    /// Answers that are no message of ours, or are not whole.
    pub(crate) wrong: u64,
    /// Answers that had come before.
    pub(crate) repeated: u64,
    /// Nanoseconds from when a message was due to its answer.
    pub(crate) latency: Histogram<u64>,
    /// Messages and bytes answered in each part of the measured time.
    pub(crate) parts: Vec<(u64, u64)>,
}

/// What a connection hands in.
#[derive(Debug, Default)]
pub(crate) struct Batch {
    pub(crate) answered: u64,
    pub(crate) bytes: u64,
    pub(crate) wrong: u64,
    pub(crate) repeated: u64,
    /// Nanoseconds.
    pub(crate) latencies: Vec<u64>,
}

impl Account {
    pub(crate) fn new(window: Window) -> Account {
        let parts = window.length().as_nanos().div_ceil(window.part().as_nanos().max(1)) as usize;
        let answers =
            Answers { answered: 0, bytes: 0, wrong: 0, repeated: 0, latency: histogram(), parts: vec![(0, 0); parts] };
        Account { window, answers: Mutex::new(answers) }
    }

    /// Takes what came at this moment, and leaves the batch empty.
    pub(crate) fn add(&self, batch: &mut Batch, at: Instant) {
        let mut answers = self.answers();
        answers.answered += batch.answered;
        answers.bytes += batch.bytes;
        answers.wrong += batch.wrong;
        answers.repeated += batch.repeated;
        let elapsed = at.saturating_duration_since(self.window.start);
        if let Some(into) = elapsed.checked_sub(self.window.from)
            && elapsed < self.window.to
        {
            let part = (into.as_nanos() / self.window.part().as_nanos().max(1)) as usize;
            if let Some((messages, bytes)) = answers.parts.get_mut(part) {
                *messages += batch.answered;
                *bytes += batch.bytes;
            }
        }
        for latency in batch.latencies.drain(..) {
            answers.latency += latency;
        }
        let latencies = std::mem::take(&mut batch.latencies);
        *batch = Batch { latencies, ..Batch::default() };
    }

    pub(crate) fn answers(&self) -> MutexGuard<'_, Answers> {
        self.answers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_comes_in_the_warm_up_or_after_the_end_is_in_no_part() {
        let start = Instant::now();
        let window = Window { start, from: Duration::from_secs(1), to: Duration::from_secs(3) };
        let account = Account::new(window);
        for milliseconds in [0, 999, 1000, 1019, 1020, 2999, 3000, 9999] {
            let mut batch = Batch { answered: 1, bytes: 10, latencies: vec![7], ..Batch::default() };
            account.add(&mut batch, start + Duration::from_millis(milliseconds));
            assert!(batch.latencies.is_empty() && batch.answered == 0);
        }
        let answers = account.answers();
        assert_eq!((answers.answered, answers.bytes, answers.latency.len(), answers.latency.max()), (8, 80, 8, 7));
        assert_eq!(answers.parts.len(), 100);
        assert_eq!([0, 1, 99].map(|part| answers.parts[part]), [(2, 20), (1, 10), (1, 10)]);
        assert_eq!(answers.parts.iter().map(|part| part.0).sum::<u64>(), 4);
    }
}
