//! How long a lost peer is waited for, and how long between two attempts.

use std::time::{Duration, Instant};

use backon::{BackoffBuilder, ExponentialBackoff, ExponentialBuilder};

/// How long a dialled connection tries to get its peer back.
///
/// Counted from the loss (or from the beginning, with [`dial_lazy`](crate::ConnectionBuilder::dial_lazy)). A socket that
/// settles a message, lives as long as the longest pause, or has nothing to send when it is lost, begins the count anew. Where
/// there are several [endpoints](crate::Endpoints), one attempt tries each of them; when one is lost, the others are tried once
/// whatever the policy.
/// When it runs out, everything in hand fails and the connection is closed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Retry {
    /// Not at all. A lazy connection tries once.
    Never,
    /// This many attempts.
    Attempts(u32),
    /// Attempts for this long.
    For(Duration),
    /// As long as the connection is wanted.
    #[default]
    Forever,
}

/// The time between two attempts: it doubles from `min` to `max`, and of each only a random part is waited ("full
/// jitter"), so that many clients do not come back at the same moment.
///
/// The doubling begins anew once a connection has lived for `max`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Backoff {
    /// The first time.
    pub min: Duration,
    /// The longest time; more than a day counts as a day.
    pub max: Duration,
}

impl Default for Backoff {
    /// From 100 ms to 10 s.
    fn default() -> Self {
        Backoff { min: Duration::from_millis(100), max: Duration::from_secs(10) }
    }
}

/// Before another place is tried instead of one that was lost, a random part of this is waited, or of the shortest pause if
/// that is less: a crowd that is lost together does not come down on the next place at one moment.
const FALL_BACK: Duration = Duration::from_millis(100);

/// Longer than anybody waits, and short enough to count with.
const LONGEST: Duration = Duration::from_secs(24 * 60 * 60);

/// The waiting times of one series of attempts. Endless.
pub(crate) struct Delays {
    backoff: Backoff,
    growing: ExponentialBackoff,
    random: fastrand::Rng,
}

impl Delays {
    pub(crate) fn new(backoff: Backoff, random: fastrand::Rng) -> Delays {
        Delays { backoff, growing: grow(backoff), random }
    }

    /// Begins anew with the shortest.
    pub(crate) fn reset(&mut self) {
        self.growing = grow(self.backoff);
    }

    pub(crate) fn next(&mut self) -> Duration {
        let full = self.growing.next().unwrap_or(self.backoff.max).min(LONGEST);
        full.mul_f64(self.random.f64())
    }

    /// Before another place has its turn. The series stays where it is.
    pub(crate) fn fall_back(&mut self) -> Duration {
        self.backoff.min.min(FALL_BACK).mul_f64(self.random.f64())
    }
}

fn grow(backoff: Backoff) -> ExponentialBackoff {
    ExponentialBuilder::default()
        .with_min_delay(backoff.min.min(backoff.max))
        .with_max_delay(backoff.max)
        .without_max_times()
        .build()
}

/// A peer that is away: since when, and how often it was tried.
pub(crate) struct Outage {
    since: Instant,
    attempts: u32,
}

impl Outage {
    pub(crate) fn begin(now: Instant) -> Outage {
        Outage { since: now, attempts: 0 }
    }

    /// An attempt failed.
    pub(crate) fn note_attempt(&mut self) {
        self.attempts = self.attempts.saturating_add(1);
    }

    /// How much longer a round of attempts may take that was begun: whatever the policy says of another.
    pub(crate) fn left_of_round(&self, retry: Retry, now: Instant) -> Duration {
        match retry {
            Retry::For(_) => self.left(retry, now).unwrap_or_default(),
            _ => Duration::MAX,
        }
    }

    /// How much longer attempts may go on; `None` if no more is to be made.
    pub(crate) fn left(&self, retry: Retry, now: Instant) -> Option<Duration> {
        match retry {
            Retry::Never => None,
            Retry::Attempts(most) => (self.attempts < most).then_some(Duration::MAX),
            Retry::For(allowed) => {
                let left = allowed.saturating_sub(now.saturating_duration_since(self.since));
                (!left.is_zero()).then_some(left)
            }
            Retry::Forever => Some(Duration::MAX),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn delays_are_random_parts_of_doubling_times_up_to_the_longest() {
        let backoff = Backoff { min: Duration::from_millis(100), max: Duration::from_secs(1) };
        let most = |attempt: u32| Duration::from_millis(100 * 2u64.pow(attempt)).min(backoff.max);
        let mut seen = Vec::new();
        for seed in 0..200 {
            let mut delays = Delays::new(backoff, fastrand::Rng::with_seed(seed));
            for attempt in 0..8 {
                let delay = delays.next();
                assert!(delay <= most(attempt), "attempt {attempt} waited {delay:?}");
                seen.push(delay.as_secs_f64() / most(attempt).as_secs_f64());
            }
            delays.reset();
            assert!(delays.next() <= backoff.min);
        }
        let mut endless = Delays::new(Backoff { min: Duration::MAX, max: Duration::MAX }, fastrand::Rng::with_seed(1));
        assert!((0..8).all(|_| endless.next() <= LONGEST), "a pause is never longer than a day");
        let low = seen.iter().filter(|part| **part < 0.25).count();
        let high = seen.iter().filter(|part| **part > 0.75).count();
        assert!(low > seen.len() / 8 && high > seen.len() / 8, "the jitter covers the whole range");
    }

    #[test]
    fn each_policy_ends_attempts_where_it_says() {
        let start = Instant::now();
        let later = start + Duration::from_secs(10);
        let mut outage = Outage::begin(start);
        assert!(outage.left(Retry::Never, start).is_none());
        assert!(outage.left(Retry::Forever, later).is_some());
        assert_eq!(outage.left(Retry::For(Duration::from_secs(15)), later), Some(Duration::from_secs(5)));
        assert!(outage.left(Retry::For(Duration::from_secs(10)), later).is_none());
        assert!(outage.left(Retry::Attempts(2), later).is_some());
        outage.note_attempt();
        outage.note_attempt();
        assert!(outage.left(Retry::Attempts(2), later).is_none());
    }
}
