//! How fast the messages of one connection may come. The limiter is governor's; this file asks it once for each batch.
//!
//! Messages are paid for after they were handled, so nothing is asked, and no clock is read, for a message. What is owed lets
//! the connection wait; nothing is refused.

use std::future::Future;
use std::num::NonZeroU32;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use governor::clock::Clock;
use governor::middleware::NoOpMiddleware;
use governor::state::{InMemoryState, NotKeyed};
use governor::{Quota, RateLimiter};
use tokio::time::{Instant, Sleep, sleep_until};

/// No batch is larger, so that slow handlers do not get a second's worth at once.
const LARGEST_BATCH: u32 = 256;

/// The pace of one connection.
#[derive(Debug)]
pub(crate) struct Pace {
    limiter: RateLimiter<NotKeyed, InMemoryState, Runtime, NoOpMiddleware<Duration>>,
    clock: Runtime,
    /// How many messages the limiter takes at once.
    burst: NonZeroU32,
    /// Messages that were handled and not paid for.
    owed: u32,
    wait: Option<Pin<Box<Sleep>>>,
}

/// The runtime's clock, as time since the connection began.
#[derive(Clone, Copy, Debug)]
struct Runtime {
    begun: Instant,
}

impl Clock for Runtime {
    type Instant = Duration;

    fn now(&self) -> Duration {
        self.begun.elapsed()
    }
}

impl Pace {
    /// So many messages a second; a tenth of that may come at once.
    pub(crate) fn new(rate: NonZeroU32) -> Pace {
        let clock = Runtime { begun: Instant::now() };
        let burst = NonZeroU32::new(rate.get() / 10).unwrap_or(NonZeroU32::MIN);
        let limiter = RateLimiter::direct_with_clock(Quota::per_second(rate).allow_burst(burst), clock);
        Pace { limiter, clock, burst, owed: 0, wait: None }
    }

    /// How many messages may be handled before this is asked again.
    pub(crate) fn batch(&self) -> u64 {
        u64::from(self.burst.get().min(LARGEST_BATCH))
    }

    /// So many messages were handled.
    pub(crate) fn handled(&mut self, messages: u64) {
        self.owed = self.owed.saturating_add(u32::try_from(messages).unwrap_or(u32::MAX));
    }

    /// Ready when more may be handled.
    pub(crate) fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        loop {
            if let Some(wait) = &mut self.wait {
                ready!(wait.as_mut().poll(cx));
                self.wait = None;
            }
            let Some(owed) = NonZeroU32::new(self.owed) else { return Poll::Ready(()) };
            let part = owed.min(self.burst);
            match self.limiter.check_n(part) {
                Ok(Ok(())) => self.owed -= part.get(),
                Ok(Err(until)) => {
                    let at = self.clock.begun + until.earliest_possible();
                    self.wait = Some(Box::pin(sleep_until(at)));
                }
                Err(_) => unreachable!("the limiter takes as many at once"),
            }
        }
    }

    /// Whether messages were handled since this was last asked.
    pub(crate) fn is_owed(&self) -> bool {
        self.owed > 0
    }

    pub(crate) fn is_waiting(&self) -> bool {
        self.wait.is_some()
    }
}
