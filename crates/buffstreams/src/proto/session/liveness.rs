//! Heartbeats: when to give a sign of life, and when a peer that gives none is dead.
//!
//! Any byte is a sign of life. Heartbeats are one-way: each side says one when it has said nothing else for the interval,
//! and neither answers the other's. It knows no clock.

use std::time::{Duration, Instant};

/// A peer that has been silent for so many intervals is dead.
const SILENT_INTERVALS: u32 = 3;

/// The least and the longest time between two signs of life that is agreed on.
pub(crate) const INTERVALS: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(3600));

/// The signs of life of one connection, in both directions.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Liveness {
    interval: Duration,
    heard: Instant,
    spoke: Instant,
}

impl Liveness {
    pub(crate) fn new(interval: Duration, now: Instant) -> Liveness {
        Liveness { interval, heard: now, spoke: now }
    }

    /// The same with the interval that was agreed.
    pub(crate) fn with_interval(self, interval: Duration) -> Liveness {
        Liveness { interval, ..self }
    }

    /// Bytes came.
    pub(crate) fn heard(&mut self, now: Instant) {
        self.heard = self.heard.max(now);
    }

    /// Bytes went.
    pub(crate) fn spoke(&mut self, now: Instant) {
        self.spoke = self.spoke.max(now);
    }

    /// Whether it is time to say something.
    pub(crate) fn is_due(&self, now: Instant) -> bool {
        now.saturating_duration_since(self.spoke) >= self.interval
    }

    /// Whether the peer has been silent for too long.
    pub(crate) fn is_dead(&self, now: Instant) -> bool {
        now.saturating_duration_since(self.heard) >= self.interval * SILENT_INTERVALS
    }

    /// When the peer will have been silent for too long.
    pub(crate) fn dead_at(&self) -> Instant {
        self.heard + self.interval * SILENT_INTERVALS
    }

    /// When one of the two becomes true.
    pub(crate) fn next(&self) -> Instant {
        (self.spoke + self.interval).min(self.dead_at())
    }
}
