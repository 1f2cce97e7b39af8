//! When messages are due, and the thread that sends them then.
//!
//! The load is open: a message is due at its time whatever became of those before it. Whoever is late, the thread because
//! it woke late or a connection because it takes no more, sends at once all that is due by then; each message keeps the time
//! at which it was due, and what is measured counts from there. So a stall shows in every message that it held up, and not
//! only in the one that was under way (which is called coordinated omission).

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use buffstreams::{Connection, ErrorKind, Receipt};
use hdrhistogram::Histogram;
use tokio::sync::mpsc::UnboundedSender;

use super::account::histogram;
use super::message::Content;

/// How soon a connection that took no more is asked again.
const AGAIN: Duration = Duration::from_micros(500);

/// A thread that sleeps wakes some tens of microseconds late. So the last stretch before a message is due is waited for awake:
/// this part of the time between two messages, and no more than this.
const AWAKE_PART: f64 = 0.2;
const LONGEST_AWAKE: Duration = Duration::from_micros(250);

/// Messages sent between two looks at whether to stop.
const BURST: u64 = 1024;

/// When which message is due. Message `n` goes over connection `n` modulo their number.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Schedule {
    pub(crate) start: Instant,
    /// Messages a second.
    pub(crate) rate: f64,
    pub(crate) messages: u64,
}

impl Schedule {
    pub(crate) fn new(start: Instant, rate: f64, time: Duration) -> Schedule {
        Schedule { start, rate, messages: (rate * time.as_secs_f64()).ceil() as u64 }
    }

    /// When this message is due, from the start.
    #[inline]
    pub(crate) fn due(&self, number: u64) -> Duration {
        Duration::from_nanos((number as f64 / self.rate * 1e9) as u64)
    }

    /// How many messages are due by then.
    fn due_by(&self, elapsed: Duration) -> u64 {
        // The first is due at once.
        ((elapsed.as_secs_f64() * self.rate) as u64 + 1).min(self.messages)
    }
}

/// A connection that is sent on, and who wants the receipts.
#[derive(Debug)]
pub(crate) struct Lane {
    pub(crate) connection: Connection,
    pub(crate) receipts: Option<UnboundedSender<(Receipt, u64)>>,
}

/// What there is to say when the last message is sent, or no more can be.
#[derive(Debug)]
pub(crate) struct Paced {
    /// Messages that were due and were not sent.
    pub(crate) unsent: u64,
    /// By how many nanoseconds each of the others was sent after it was due, those of the warm-up left out.
    pub(crate) late: Histogram<u64>,
}

/// Sends what is due when it is due, until the last message is sent or `until`, when what is left is left unsent; or until it
/// is told to stop, when only what is due by then counts. Blocks its thread.
pub(crate) fn pace(
    mut lanes: Vec<Lane>,
    schedule: Schedule,
    content: &Content,
    (warm_up, until): (Duration, Duration),
    stop: &AtomicBool,
) -> Paced {
    sleep_exactly();
    let awake = LONGEST_AWAKE.min(Duration::from_secs_f64(AWAKE_PART / schedule.rate));
    let connections = lanes.len() as u64;
    let mut next: Vec<u64> = (0..connections).collect();
    // The lanes that have not sent all that was due.
    let mut behind = Vec::new();
    let mut message = Vec::new();
    let mut late = histogram();
    let mut due_next = 0;
    let mut send_due = |lane: usize, next: &mut u64, due: u64| {
        while *next < due {
            content.write(*next, &mut message);
            // Before the message is on its way, so that no answer is sooner.
            let sent_at = schedule.start.elapsed();
            let Lane { connection, receipts } = &mut lanes[lane];
            match connection.try_send(&message) {
                Ok(receipt) => {
                    let due_at = schedule.due(*next);
                    if due_at >= warm_up {
                        late += sent_at.saturating_sub(due_at).as_nanos() as u64;
                    }
                    if let Some(receipts) = receipts {
                        let _ = receipts.send((receipt, *next));
                    }
                    *next += connections;
                }
                Err(error) if error.kind() == ErrorKind::Full => return Gone::Behind,
                Err(_) => return Gone::Closed,
            }
        }
        Gone::All
    };
    let mut closed = 0;
    let due = loop {
        let elapsed = schedule.start.elapsed();
        let due = schedule.due_by(elapsed);
        behind.retain(|&lane: &usize| {
            let next = &mut next[lane];
            let burst_end = due.min(*next + BURST * connections);
            match send_due(lane, next, burst_end) {
                Gone::All => *next < due,
                Gone::Behind => true,
                Gone::Closed => {
                    closed += 1;
                    false
                }
            }
        });
        let due_now = due.min(due_next + BURST);
        for number in due_next..due_now {
            let lane = (number % connections) as usize;
            if next[lane] != number {
                continue;
            }
            match send_due(lane, &mut next[lane], number + 1) {
                Gone::All => {}
                Gone::Behind => behind.push(lane),
                Gone::Closed => closed += 1,
            }
        }
        due_next = due_now;
        let is_all = due_next == schedule.messages && behind.is_empty();
        if is_all || stop.load(Ordering::Relaxed) || elapsed >= until || closed == connections {
            break due;
        }
        if due_next < due {
            continue;
        }
        let due_at = if due_next < schedule.messages { schedule.due(due_next) } else { Duration::MAX };
        let again_at = if behind.is_empty() { Duration::MAX } else { elapsed + AGAIN };
        wait(&schedule, due_at.min(again_at).min(until), awake);
    };
    let unsent = (0..connections).zip(&next).map(|(lane, &next)| share(due, lane, connections) - next / connections);
    Paced { unsent: unsent.sum(), late }
}

/// Returns at this time after the start, or when the thread is unparked.
fn wait(schedule: &Schedule, until: Duration, awake: Duration) {
    let asleep = until.saturating_sub(awake).saturating_sub(schedule.start.elapsed());
    if !asleep.is_zero() {
        thread::park_timeout(asleep);
        if schedule.start.elapsed() + awake < until {
            return;
        }
    }
    while schedule.start.elapsed() < until {
        std::hint::spin_loop();
    }
}

/// What has become of what was due on a connection.
enum Gone {
    All,
    /// It takes no more for now.
    Behind,
    /// It never will.
    Closed,
}

/// How many of so many messages go over this connection.
fn share(messages: u64, connection: u64, connections: u64) -> u64 {
    (messages + connections - 1 - connection) / connections
}

/// Has this thread woken when it asked to be, as nearly as the system can.
fn sleep_exactly() {
    // Otherwise the kernel takes 50 µs of leeway. Where it cannot be told, messages are late by that, and it shows.
    #[cfg(target_os = "linux")]
    let _ = rustix::thread::set_current_timer_slack(std::num::NonZero::new(1));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_due_evenly_and_the_last_before_the_end() {
        let schedule = Schedule::new(Instant::now(), 1000.0, Duration::from_millis(10));
        assert_eq!(schedule.messages, 10);
        assert_eq!(schedule.due(0), Duration::ZERO);
        assert_eq!(schedule.due(9), Duration::from_millis(9));
        for (milliseconds, due) in [(0, 1), (1, 2), (5, 6), (9, 10), (100, 10)] {
            assert_eq!(schedule.due_by(Duration::from_millis(milliseconds)), due, "{milliseconds}");
        }
    }

    #[test]
    fn connections_share_messages_in_turn() {
        assert_eq!([0, 1, 2].map(|connection| share(7, connection, 3)), [3, 2, 2]);
        assert_eq!([0, 1, 2].map(|connection| share(1, connection, 3)), [1, 0, 0]);
    }
}
