//! When each message of a recording is due, so that the times between them are as they were, or a multiple of that.

use std::time::Duration;

use tokio::time::Instant;

use crate::args::Speed;

/// A recording against the clock. It begins with the first message, and never waits to make up for lost time.
#[derive(Debug)]
pub(crate) struct Pacer {
    speed: Speed,
    /// When it began, and what time it was then in the recording.
    begun: Option<(Instant, Duration)>,
    latest: Duration,
}

impl Pacer {
    pub(crate) fn new(speed: Speed) -> Pacer {
        Pacer { speed, begun: None, latest: Duration::ZERO }
    }

    /// When what was recorded at this time is due; `None` if it is not waited for. Times that go back are due at once.
    pub(crate) fn due(&mut self, recorded: Duration, now: Instant) -> Option<Instant> {
        let Speed::Times(times) = self.speed else { return None };
        let (begin, first) = *self.begun.get_or_insert((now, recorded));
        let after = Duration::try_from_secs_f64(recorded.saturating_sub(first).as_secs_f64() / times);
        // What lies beyond the end of time is waited for until somebody loses patience.
        after.ok().and_then(|after| begin.checked_add(after)).or_else(|| now.checked_add(Duration::from_secs(1 << 32)))
    }

    /// What was due has been done.
    pub(crate) fn done(&mut self, due: Option<Instant>, now: Instant) {
        if let Some(due) = due {
            self.latest = self.latest.max(now.saturating_duration_since(due));
        }
    }

    /// How late it was, at the worst.
    pub(crate) fn latest(&self) -> Duration {
        self.latest
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Milliseconds after the beginning at which messages recorded at these are sent, each taking so long.
    async fn sent(speed: Speed, recorded: &[u64], taking: u64) -> (Vec<u128>, Duration) {
        let (mut pacer, begin) = (Pacer::new(speed), Instant::now());
        let mut sent = Vec::new();
        for milliseconds in recorded {
            let due =
                pacer.due(Duration::from_secs(1_700_000_000) + Duration::from_millis(*milliseconds), Instant::now());
            if let Some(due) = due {
                tokio::time::sleep_until(due).await;
            }
            sent.push(begin.elapsed().as_millis());
            tokio::time::sleep(Duration::from_millis(taking)).await;
            pacer.done(due, Instant::now());
        }
        (sent, pacer.latest())
    }

    #[tokio::test(start_paused = true)]
    async fn messages_are_due_as_far_apart_as_they_came_or_a_multiple_of_it() {
        let recorded = [5, 5, 105, 305];
        assert_eq!(sent(Speed::Times(1.0), &recorded, 0).await.0, [0, 0, 100, 300]);
        assert_eq!(sent(Speed::Times(2.0), &recorded, 0).await.0, [0, 0, 50, 150]);
        assert_eq!(sent(Speed::Times(0.5), &recorded, 0).await.0, [0, 0, 200, 600]);
        assert_eq!(sent(Speed::Max, &recorded, 0).await.0, [0, 0, 0, 0]);
    }

    #[tokio::test(start_paused = true)]
    async fn what_takes_too_long_is_told_and_caught_up_with() {
        let (at, latest) = sent(Speed::Times(1.0), &[0, 10, 20, 500], 100).await;
        assert_eq!(at, [0, 100, 200, 500]);
        assert_eq!(latest, Duration::from_millis(280));
        assert_eq!(sent(Speed::Max, &[0, 10], 100).await.1, Duration::ZERO);
    }

    #[tokio::test(start_paused = true)]
    async fn a_clock_that_was_set_back_makes_nobody_wait() {
        assert_eq!(sent(Speed::Times(1.0), &[1000, 0, 1010], 0).await.0, [0, 0, 10]);
    }
}
