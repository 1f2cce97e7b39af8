//! A bound on log lines that a stranger can provoke: a burst, then a steady rate, and a count of those left out.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Lines that may be logged at once after a quiet time.
const BURST: u32 = 20;

/// Lines for every second from then on.
const PER_SECOND: u32 = 20;

/// Lets a bounded number of events through.
#[derive(Debug)]
pub(crate) struct Throttle {
    burst: u32,
    every: Duration,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    /// When the allowance will be whole again.
    whole_at: Instant,
    left_out: u64,
}

impl Default for Throttle {
    fn default() -> Self {
        Throttle::new(BURST, Duration::from_secs(1) / PER_SECOND)
    }
}

impl Throttle {
    /// At most `burst` events at once, and one `every` so long.
    pub(crate) fn new(burst: u32, every: Duration) -> Throttle {
        Throttle { burst, every, state: Mutex::new(State { whole_at: Instant::now(), left_out: 0 }) }
    }

    /// Calls `log` with the number of events left out since the last one, unless it is this one's turn to be left out.
    pub(crate) fn warn(&self, log: impl FnOnce(u64)) {
        if let Some(left_out) = self.admit(Instant::now()) {
            log(left_out);
        }
    }

    fn admit(&self, now: Instant) -> Option<u64> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let whole_at = state.whole_at.max(now) + self.every;
        if whole_at > now + self.every * self.burst {
            state.left_out += 1;
            return None;
        }
        state.whole_at = whole_at;
        Some(std::mem::take(&mut state.left_out))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_passes_then_a_steady_rate_and_the_rest_is_counted() {
        let throttle = Throttle::new(3, Duration::from_millis(10));
        let now = Instant::now() + Duration::from_secs(1);
        let passed = (0..10).filter(|_| throttle.admit(now).is_some()).count();
        assert_eq!(passed, 3);
        assert_eq!(throttle.admit(now + Duration::from_millis(10)), Some(7));
        assert_eq!(throttle.admit(now + Duration::from_millis(10)), None);
    }
}
