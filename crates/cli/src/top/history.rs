//! What was told before: for the rate of each counter now, and its course.

use std::collections::VecDeque;
use std::time::Instant;

use super::scrape::{Role, Sample};

/// Rates that are kept of each counter: more than a terminal is wide.
const KEPT: usize = 512;

/// Samples over which processor time is looked at: it comes in whole seconds.
const LOOKED_AT: usize = 10;

/// The counters whose rates are shown.
pub(super) const RATES: [(Role, &str); 4] = [
    (Role::Listener, "messages_received_total"),
    (Role::Listener, "received_bytes_total"),
    (Role::Connection, "messages_settled_total"),
    (Role::Connection, "written_bytes_total"),
];

/// The last sample, and how it came to that.
#[derive(Debug, Default)]
pub(super) struct History {
    last: Option<(Sample, Instant)>,
    rates: [VecDeque<u64>; RATES.len()],
    /// When, and how many seconds of processor time had been used by then.
    processor: VecDeque<(Instant, f64)>,
}

impl History {
    pub(super) fn last(&self) -> Option<&Sample> {
        self.last.as_ref().map(|(sample, _)| sample)
    }

    /// How long ago the last sample came.
    pub(super) fn age(&self, now: Instant) -> Option<std::time::Duration> {
        self.last.as_ref().map(|(_, at)| now.saturating_duration_since(*at))
    }

    /// A second rates of this counter can be shown of, the oldest first.
    pub(super) fn rates(&self, role: Role, metric: &str) -> &VecDeque<u64> {
        let index = RATES.iter().position(|known| *known == (role, metric)).expect("one of those that are kept");
        &self.rates[index]
    }

    /// Processor time for each second of time, of late.
    pub(super) fn processor(&self) -> Option<f64> {
        let ((from, before), (to, used)) = (self.processor.front()?, self.processor.back()?);
        let seconds = to.saturating_duration_since(*from).as_secs_f64();
        (seconds > 0.0).then(|| (used - before).max(0.0) / seconds)
    }

    pub(super) fn add(&mut self, sample: Sample, now: Instant) {
        if let Some((before, at)) = &self.last {
            let seconds = now.saturating_duration_since(*at).as_secs_f64();
            if seconds <= 0.0 {
                return;
            }
            for ((role, metric), rates) in RATES.iter().zip(&mut self.rates) {
                let grown = |sample: &Sample| sample.get(*role, metric).unwrap_or_default();
                // Less than before is another process that counts anew.
                let grown = grown(&sample).saturating_sub(grown(before));
                if rates.len() == KEPT {
                    rates.pop_front();
                }
                rates.push_back((grown as f64 / seconds).round() as u64);
            }
        }
        if let Some(used) = sample.process("cpu_seconds_total") {
            if self.processor.len() > LOOKED_AT {
                self.processor.pop_front();
            }
            self.processor.push_back((now, used));
        }
        self.last = Some((sample, now));
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn received(count: u64) -> Sample {
        let name = r#"buffstreams_messages_received_total{role="listener",name="a"}"#;
        Sample::read(&format!("# TYPE buffstreams_messages_received_total counter\n{name} {count}\n")).unwrap()
    }

    #[test]
    fn a_rate_is_what_was_counted_in_a_second_and_none_over_a_restart() {
        let mut history = History::default();
        let start = Instant::now();
        for (count, after) in [(100, 0), (300, 1000), (400, 1500), (50, 2500), (60, 3500)] {
            history.add(received(count), start + Duration::from_millis(after));
        }
        let rates = history.rates(Role::Listener, "messages_received_total");
        assert_eq!(rates.iter().copied().collect::<Vec<_>>(), [200, 200, 0, 10]);
        assert_eq!(history.last().unwrap().get(Role::Listener, "messages_received_total"), Some(60));
    }
}
