//! An Outbox behind a spool, whatever its receiver says and in whatever order messages come from disk.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Instant;

use bytes::Bytes;
use proptest::prelude::*;

use super::super::outbox::Fate;
use super::super::session::wire::Control;
use super::*;

#[derive(Clone, Debug)]
enum Step {
    /// So many more are on disk.
    Note(u64),
    /// So many come, as far as there is room.
    Feed(usize),
    /// What comes next, and does not: it is known to the disk, or damaged there.
    Gap(u64),
    /// The connection breaks, and the receiver says on the next one where it stands, somewhere from the first number on.
    Connect {
        dispatched: f64,
        window: usize,
    },
    Hand(usize),
    Ack(f64),
    Reject(f64),
    TakeFailed(usize),
    /// The oldest of those that were taken are on disk.
    Store(usize),
}

/// What is known of a number that has come without asking the Outbox; nothing for one that was passed over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Known {
    InFlight,
    Settled,
    Failed,
    Taken,
}

struct Model {
    outbox: Outbox,
    framing: Framing,
    limit: usize,
    now: Instant,
    first: u64,
    recovered: u64,
    noted: u64,
    /// Numbers below `next` that are not in here were passed over.
    come: BTreeMap<u64, Known>,
    next: u64,
    end: u64,
    /// What the receiver may claim to have.
    last: u64,
    acked: u64,
    refused: BTreeSet<u64>,
    taken: VecDeque<u64>,
    unstored: BTreeSet<u64>,
    /// The connection at hand: what the receiver had, what it expects next, and what was handed out.
    window: Option<usize>,
    dispatched: u64,
    expected: u64,
    handed: BTreeSet<u64>,
}

/// One of the numbers below `count`, that far along.
fn pick(part: f64, count: u64) -> u64 {
    ((count as f64 * part) as u64).min(count.saturating_sub(1))
}

fn length(number: u64) -> usize {
    if number.is_multiple_of(31) { 33_000 } else { 8 + number as usize * 37 % 50 }
}

fn message(number: u64) -> Bytes {
    let mut bytes = vec![number as u8; length(number)];
    bytes[..8].copy_from_slice(&number.to_le_bytes());
    bytes.into()
}

fn rejection(number: u64) -> Rejection {
    Rejection { code: number as u32, text: "refused".to_owned() }
}

impl Model {
    /// Of the numbers on disk, some at the start, in the middle and at the end never come.
    fn new(limit: usize, first: u64, count: u64, missing: u64) -> Model {
        let framing = Framing::for_session(40_000).expect("it is allowed");
        let (end, recovered) = (first + count, count.saturating_sub(missing));
        Model {
            outbox: Outbox::spooled(framing, limit, first, end, recovered),
            framing,
            limit,
            now: Instant::now(),
            first,
            recovered,
            noted: 0,
            come: BTreeMap::new(),
            next: first,
            end,
            last: end - 1,
            acked: 0,
            refused: BTreeSet::new(),
            taken: VecDeque::new(),
            unstored: BTreeSet::new(),
            window: None,
            dispatched: 0,
            expected: 1,
            handed: BTreeSet::new(),
        }
    }

    fn frame(&self, number: u64) -> usize {
        let length = length(number);
        length + self.framing.prefix_width(length)
    }

    fn in_flight(&self) -> impl Iterator<Item = u64> {
        self.come.iter().filter(|(_, known)| **known == Known::InFlight).map(|(number, _)| *number)
    }

    /// How many of the recovered ones are missing, and were not passed over yet.
    fn gaps_left(&self) -> u64 {
        let first_end = self.end - self.noted;
        if self.next < first_end { first_end - self.next - (self.recovered - self.come.len() as u64) } else { 0 }
    }

    fn run(&mut self, step: &Step) {
        match *step {
            Step::Note(count) => {
                self.outbox.note_spooled(count);
                self.noted += count;
                self.end += count;
            }
            Step::Feed(count) => (0..count).for_each(|_| self.feed()),
            Step::Gap(count) => {
                let to = self.next + count.min(self.gaps_left());
                let refused = self.outbox.pass_over(to);
                let expected: Vec<_> = self.refused.range(self.next..to.max(self.next)).copied().collect();
                assert_eq!(refused, expected);
                for number in refused {
                    self.refused.remove(&number);
                    self.store(number);
                }
                self.next = to;
            }
            Step::Connect { dispatched, window } => {
                self.outbox.rewind();
                self.handed.clear();
                let first = self.outbox.first_number();
                assert!(self.unstored.first().is_none_or(|unstored| first <= *unstored));
                assert!(self.in_flight().next().is_none_or(|open| first <= open), "it would never be sent");
                self.dispatched = first - 1 + pick(dispatched, self.last + 2 - first);
                assert!(self.outbox.resume(self.last + 1, window).is_err());
                self.outbox.resume(self.dispatched, window).expect("it was sent as much");
                (self.expected, self.window) = (self.dispatched + 1, Some(window));
            }
            Step::Hand(most) => self.hand(most),
            Step::Ack(part) => {
                let number = self.acked + pick(part, self.last + 1 - self.acked);
                let settles = self.in_flight().any(|open| open <= number);
                assert_eq!(self.outbox.acked(number), Ok(settles));
                self.acked = number;
                for (_, known) in self.come.range_mut(..=number).filter(|(_, known)| **known == Known::InFlight) {
                    *known = Known::Settled;
                }
                assert!(self.outbox.acked(self.last + 1).is_err());
                assert!(number == 0 || self.outbox.acked(number - 1).is_err());
            }
            Step::Reject(part) => {
                let number = 1 + pick(part, self.last.max(1));
                if number > self.last {
                    return;
                }
                let is_ahead = number >= self.next;
                let is_open = self.come.get(&number) == Some(&Known::InFlight);
                let is_news = self.outbox.rejected(number, rejection(number), self.now);
                assert_eq!(is_news, Ok(is_open || is_ahead), "whether {number} was to be failed");
                if is_open {
                    self.come.insert(number, Known::Failed);
                } else if is_ahead {
                    self.refused.insert(number);
                }
                if is_open || is_ahead {
                    self.unstored.insert(number);
                }
            }
            Step::TakeFailed(most) => (0..most).for_each(|_| self.take_failed()),
            Step::Store(most) => {
                for _ in 0..most {
                    if let Some(number) = self.taken.pop_front() {
                        self.store(number);
                    }
                }
            }
        }
        self.check();
    }

    fn store(&mut self, number: u64) {
        self.outbox.note_stored(number);
        self.unstored.remove(&number);
    }

    fn feed(&mut self) {
        let number = self.next;
        let is_missing = number < self.end - self.noted && self.come.len() as u64 == self.recovered;
        if number == self.end || is_missing {
            return;
        }
        let message = message(number);
        if self.outbox.admits(message.len(), 0).is_err() {
            return;
        }
        let is_news = self.outbox.push_spooled(message, self.now);
        let known = if self.refused.remove(&number) {
            Known::Failed
        } else if number <= self.acked {
            Known::Settled
        } else {
            Known::InFlight
        };
        assert_eq!(is_news, known == Known::InFlight);
        self.come.insert(number, known);
        self.next += 1;
    }

    fn hand(&mut self, most: usize) {
        let mut buffers = VecDeque::new();
        let window_before = self.outbox.in_window();
        self.outbox.hand(most, &mut buffers);
        let bytes: Vec<u8> = buffers.iter().flatten().copied().collect();
        assert!(self.window.is_some() || bytes.is_empty(), "the receiver has not said where it stands");
        let mut rest = &bytes[..];
        let mut messages = 0;
        while !rest.is_empty() {
            let wanted = self.in_flight().find(|number| *number >= self.expected);
            let next = wanted.expect("only what is in flight, and not known to the receiver, is handed out");
            if next != self.expected {
                assert_eq!(self.unstored.range(self.expected..next).next(), None, "it is skipped, and not on disk");
                let refused = self.framing.header(rest).expect_err("a gap is declared");
                let header = self.framing.control_header(refused).expect("by a control frame");
                assert_eq!(Control::decode(&rest[header.prefix..header.frame()]), Ok(Control::Skip(next)));
                rest = &rest[header.frame()..];
            }
            let (found, frame) = self.framing.decode(rest).expect("it is a frame").expect("it is whole");
            assert!(found == message(next), "another message comes where {next} is expected");
            rest = &rest[frame..];
            messages += frame;
            self.handed.insert(next);
            self.expected = next + 1;
        }
        self.outbox.wrote(bytes.len());
        self.last = self.last.max(self.expected - 1);
        let in_window = self.outbox.in_window();
        assert!(
            messages == 0 || in_window <= self.window.unwrap_or(0),
            "more is handed out than the window has room for"
        );
        assert!(in_window >= window_before);
    }

    fn take_failed(&mut self) {
        let Some(failed) = self.outbox.take_failed() else {
            return assert!(!self.come.values().any(|known| *known == Known::Failed));
        };
        assert_eq!(self.come.insert(failed.number, Known::Taken), Some(Known::Failed));
        assert!(failed.message == message(failed.number), "{} comes back other", failed.number);
        assert_eq!(failed.rejection, Some(rejection(failed.number)));
        self.taken.push_back(failed.number);
    }

    fn check(&self) {
        let count = |of: &[Known]| self.come.values().filter(|known| of.contains(known)).count() as u64;
        let tally = self.outbox.tally();
        assert_eq!((tally.recovered, tally.accepted), (self.recovered, self.noted));
        assert_eq!((tally.settled, tally.failed), (count(&[Known::Settled]), count(&[Known::Failed, Known::Taken])));
        assert_eq!(tally.recovered + tally.accepted, tally.settled + tally.failed + tally.in_flight);
        assert_eq!(tally.in_flight_bytes, self.in_flight().map(|number| self.frame(number)).sum::<usize>());
        assert!(tally.in_flight_bytes <= self.limit || count(&[Known::InFlight]) == 1);
        assert_eq!(self.outbox.end(), self.end);
        assert_eq!(self.outbox.last_number(), self.last);

        let open = self.in_flight().next().unwrap_or(self.next);
        assert_eq!(self.outbox.resolved_to(), open);
        let untaken = self.come.iter().find(|(_, known)| **known == Known::Failed).map(|(number, _)| *number);
        assert_eq!(self.outbox.done_below(), untaken.map_or(open, |untaken| untaken.min(open)));
        let mut failed = 0;
        for number in self.first..self.end + 2 {
            let fate = match self.come.get(&number) {
                _ if number >= self.end => Fate::Forgotten,
                Some(Known::Failed | Known::Taken) => Fate::Failed,
                Some(Known::Settled) if number < open => Fate::Settled,
                None if number < open => Fate::Settled,
                _ => Fate::InFlight,
            };
            assert_eq!(self.outbox.fate(number), fate, "the fate of {number}");
            assert_eq!(self.outbox.failed_before(number), failed);
            failed += u64::from(fate == Fate::Failed);
        }
        let known = self.in_flight().filter(|number| *number <= self.dispatched).map(|number| self.frame(number));
        let sent = self.in_flight().filter(|number| self.handed.contains(number)).map(|number| self.frame(number));
        let (known, sent) = (known.sum::<usize>(), sent.sum::<usize>());
        let in_window = self.outbox.in_window();
        assert!(in_window >= sent && in_window <= sent + known, "{in_window} of {sent} bytes sent and {known} known");
    }

    /// Everything comes, is handed out, and is acknowledged.
    fn drain(&mut self) {
        self.run(&Step::Gap(u64::MAX / 2));
        while self.next < self.end || self.in_flight().next().is_some() {
            self.run(&Step::TakeFailed(1000));
            self.run(&Step::Store(1000));
            self.run(&Step::Feed(9));
            self.run(&Step::Connect { dispatched: 0.0, window: 1 << 20 });
            self.run(&Step::Hand(usize::MAX));
            let last = self.last;
            self.outbox.acked(last).expect("it was sent");
            self.acked = last;
            // What lies behind a reject that is not on disk was not handed out.
            for (_, known) in self.come.range_mut(..=last).filter(|(_, known)| **known == Known::InFlight) {
                *known = Known::Settled;
            }
            self.check();
            self.run(&Step::Gap(u64::MAX / 2));
        }
        self.run(&Step::TakeFailed(1000));
        self.run(&Step::Store(1000));
        assert_eq!((self.outbox.done_below(), self.outbox.tally().in_flight), (self.end, 0));
        assert!(!self.outbox.is_resolved() || self.first == self.end, "the disk does not know");
        self.outbox.note_done(self.end);
        assert!(self.outbox.is_resolved());
    }
}

fn step() -> impl Strategy<Value = Step> {
    // Where something is said of the last ones, it matters most.
    let part = || prop_oneof![Just(0.0), Just(1.0), 0.0..1.0_f64];
    let window = prop_oneof![Just(0), 50..400_usize, Just(70_000)];
    prop_oneof![
        2 => (1..6_u64).prop_map(Step::Note),
        8 => (1..6_usize).prop_map(Step::Feed),
        3 => (1..4_u64).prop_map(Step::Gap),
        4 => (part(), window).prop_map(|(dispatched, window)| Step::Connect { dispatched, window }),
        6 => prop_oneof![1..200_usize, Just(1 << 20)].prop_map(Step::Hand),
        3 => part().prop_map(Step::Ack),
        5 => part().prop_map(Step::Reject),
        2 => (1..4_usize).prop_map(Step::TakeFailed),
        2 => (1..4_usize).prop_map(Step::Store),
    ]
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn what_comes_from_disk_has_the_fate_that_was_heard_of_it_before_or_after_it_came(
        limit in prop::sample::select(vec![0, 400, 5_000, 100_000]),
        (first, count) in (1..50_u64, 0..40_u64),
        missing in 0..12_u64,
        steps in prop::collection::vec(step(), 0..80),
    ) {
        let mut model = Model::new(limit, first, count, missing);
        for step in &steps {
            model.run(step);
        }
        model.drain();
    }
}

fn config() -> ProptestConfig {
    let cases = std::env::var("PROPTEST_CASES").ok().and_then(|cases| cases.parse().ok()).unwrap_or(400);
    ProptestConfig { cases, failure_persistence: None, ..ProptestConfig::default() }
}
