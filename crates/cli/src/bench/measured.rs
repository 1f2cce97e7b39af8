//! What a run of `bench` comes to, before it is told or drawn.

use std::time::Duration;

use hdrhistogram::Histogram;

use super::arguments::By;
use super::message::Sizes;

/// What was measured.
#[derive(Debug)]
pub(super) struct Measured {
    pub(super) address: String,
    pub(super) connections: u64,
    pub(super) sizes: Sizes,
    pub(super) is_acked: bool,
    pub(super) by: By,
    /// Messages a second.
    pub(super) asked: Option<f64>,
    pub(super) warm_up: Duration,
    /// The time that was measured: shorter than asked for if it was interrupted.
    pub(super) time: Duration,
    pub(super) interrupted: bool,
    /// Over the whole run, with the warm-up.
    pub(super) sent: u64,
    pub(super) answered: u64,
    /// Due, and not sent by the end.
    pub(super) unsent: u64,
    pub(super) wrong: u64,
    pub(super) repeated: u64,
    /// Messages and bytes answered in each part of the measured time.
    pub(super) parts: Vec<(u64, u64)>,
    pub(super) part: Duration,
    /// Nanoseconds from when a message was due to its answer; and to when it was sent. Without a rate there are none.
    pub(super) latency: Option<Histogram<u64>>,
    pub(super) late: Option<Histogram<u64>>,
}

impl Measured {
    pub(super) fn lost(&self) -> u64 {
        self.sent.saturating_sub(self.answered)
    }

    /// Messages and bytes answered a second.
    pub(super) fn rates(&self) -> (f64, f64) {
        let seconds = self.time.as_secs_f64().max(f64::MIN_POSITIVE);
        let (messages, bytes) = self.parts.iter().fold((0, 0), |sum, part| (sum.0 + part.0, sum.1 + part.1));
        (messages as f64 / seconds, bytes as f64 / seconds)
    }
}
