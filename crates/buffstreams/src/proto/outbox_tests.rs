use bytes::Buf;
use proptest::prelude::*;

use super::super::framing::Prefix;
use super::*;

/// What one run does to an Outbox.
#[derive(Clone, Debug)]
enum Step {
    Push {
        by: By,
        length: usize,
        expires_in: Option<u64>,
    },
    Hand {
        most: usize,
    },
    /// The kernel takes a part of what was handed out and not written yet.
    Write {
        part: f64,
    },
    /// The connection breaks, and another one is made.
    Break,
    /// An attempt to connect fails.
    Attempt,
    Wait {
        millis: u64,
    },
    Expire,
    FailOldestFor {
        length: usize,
    },
    FailAll {
        reason: FailedReason,
    },
    TakeFailed {
        most: usize,
    },
    Reserve {
        length: usize,
    },
    Unreserve,
    Release,
}

#[derive(Clone, Copy, Debug)]
enum By {
    Slice,
    Bytes,
    Encoder,
}

/// What is known of one message without asking the Outbox.
#[derive(Debug)]
struct Accepted {
    message: Vec<u8>,
    frame: usize,
    at: Instant,
    expires: Option<Instant>,
    attempts: u32,
    /// It was wholly written on one connection.
    written: bool,
    /// A part of it left on a connection that broke.
    torn: bool,
    failed: Option<FailedReason>,
    /// The Outbox says so; it may say it late, but not too early.
    settled: bool,
}

impl Accepted {
    fn is_in_flight(&self) -> bool {
        !self.settled && self.failed.is_none()
    }
}

/// An Outbox, the writer and the kernel around it, and what must be true of it.
struct Model {
    framing: Framing,
    limit: usize,
    outbox: Outbox,
    now: Instant,
    messages: Vec<Accepted>,
    /// What the writer has, and has not written.
    buffers: VecDeque<Bytes>,
    /// Numbers of the messages handed out on this connection, and how many bytes of them were written.
    handed: Vec<usize>,
    written: usize,
    /// In the order in which they failed, not taken yet.
    failed: VecDeque<(usize, Instant)>,
    reserved: Vec<usize>,
}

impl Model {
    fn new(framing: Framing, limit: usize) -> Model {
        Model {
            framing,
            limit,
            outbox: Outbox::new(framing, limit),
            now: Instant::now(),
            messages: Vec::new(),
            buffers: VecDeque::new(),
            handed: Vec::new(),
            written: 0,
            failed: VecDeque::new(),
            reserved: Vec::new(),
        }
    }

    fn run(&mut self, step: &Step) {
        match *step {
            Step::Push { by, length, expires_in } => self.push(by, length, expires_in),
            Step::Hand { most } => self.hand(most),
            Step::Write { part } => self.write(part),
            Step::Break => self.broken(),
            Step::Attempt => {
                self.outbox.note_attempt();
                self.note_attempt();
            }
            Step::Wait { millis } => self.now += Duration::from_millis(millis),
            Step::Expire => self.expire(),
            Step::FailOldestFor { length } => self.fail_oldest_for(length),
            Step::FailAll { reason } => self.fail_all(reason),
            Step::TakeFailed { most } => self.take_failed(most),
            Step::Reserve { length } => {
                if self.outbox.admits(length, 0).is_ok() {
                    self.outbox.reserve(length);
                    self.reserved.push(length);
                }
            }
            Step::Unreserve => {
                if let Some(length) = self.reserved.pop() {
                    self.outbox.unreserve(length);
                }
            }
            Step::Release => self.outbox.release(),
        }
        self.check();
    }

    fn push(&mut self, by: By, length: usize, expires_in: Option<u64>) {
        let frame = self.framing.prefix_width(length) + length;
        let taken = self.outbox.bytes();
        let in_lane = expires_in.is_none() && length <= self.framing.max_message_size() && frame <= self.outbox.lane();
        assert!(!in_lane || self.outbox.admits(length, 0).is_ok(), "the lane promises room that there is");
        match self.outbox.admits(length, 0) {
            Err(Refusal::TooLarge) => return assert!(length > self.framing.max_message_size()),
            Err(Refusal::Full) => return assert!(taken > 0 && taken + frame > self.limit),
            Ok(()) => assert!(taken == 0 || taken + frame <= self.limit),
        }
        let number = self.messages.len();
        let message: Vec<u8> = (0..length).map(|at| (at.wrapping_mul(7) ^ number.wrapping_mul(13)) as u8).collect();
        let expires = expires_in.map(|millis| self.now + Duration::from_millis(millis));
        let at = self.now;
        let accepted = match by {
            By::Slice if in_lane => self.outbox.push_in_lane(&message),
            By::Slice => self.outbox.push(&message, expires, || at),
            By::Bytes => self.outbox.push_bytes(Bytes::from(message.clone()), expires, || at),
            By::Encoder => self.outbox.push_with(length, expires, || at, |buffer| buffer.extend_from_slice(&message)),
        };
        assert_eq!(accepted, number as u64);
        self.messages.push(Accepted {
            message,
            frame,
            at,
            expires,
            attempts: 0,
            written: false,
            torn: false,
            failed: None,
            settled: false,
        });
    }

    /// What is in flight and was not handed out on this connection.
    fn unhanded(&self) -> Vec<usize> {
        let next = self.handed.last().map_or(0, |last| last + 1);
        (next..self.messages.len()).filter(|number| self.messages[*number].is_in_flight()).collect()
    }

    fn hand(&mut self, most: usize) {
        let mut more = VecDeque::new();
        let unhanded = self.unhanded();
        self.outbox.hand(most, &mut more);
        assert!(most == 0 || more.is_empty() == unhanded.is_empty(), "what is there is handed out");
        assert!(more.iter().all(|buffer| !buffer.is_empty()), "an empty buffer would look like a closed socket");
        let bytes: Vec<u8> = more.iter().flatten().copied().collect();
        let mut rest = &bytes[..];
        for number in unhanded {
            if rest.is_empty() {
                break;
            }
            let message = &self.messages[number];
            let (found, frame) = self
                .framing
                .decode(rest)
                .expect("frames are handed out")
                .unwrap_or_else(|| panic!("only a part of a frame was handed out, where {number} was to be"));
            assert!(found == message.message, "another message was handed out where {number} was to be");
            assert_eq!(frame, message.frame);
            rest = &rest[frame..];
            self.handed.push(number);
        }
        assert!(rest.is_empty(), "more was handed out than is in flight");
        self.buffers.extend(more);
    }

    fn write(&mut self, part: f64) {
        let offered: usize = self.buffers.iter().map(Bytes::len).sum();
        let took = ((offered as f64 * part).ceil() as usize).min(offered);
        let mut left = took;
        while left > 0 {
            let front = self.buffers.front_mut().expect("there is as much");
            let step = left.min(front.len());
            front.advance(step);
            left -= step;
            if front.is_empty() {
                self.buffers.pop_front();
            }
        }
        self.written += took;
        let mut end = 0;
        for number in &self.handed {
            end += self.messages[*number].frame;
            self.messages[*number].written = end <= self.written;
        }
        let before = self.outbox.tally().settled;
        assert_eq!(self.outbox.wrote(took), self.outbox.tally().settled != before);
        self.learn_settled();
        if self.buffers.is_empty() {
            let settled = self.handed.iter().all(|number| self.messages[*number].settled);
            assert!(settled, "all was written, so all is settled");
        }
    }

    /// Believes the Outbox that messages were settled, where that can be true.
    fn learn_settled(&mut self) {
        for number in 0..self.messages.len() {
            if self.outbox.fate(number as u64) == Fate::Settled {
                let message = &mut self.messages[number];
                assert!(message.written, "{number} is settled and was not wholly written");
                assert_eq!(message.failed, None, "{number} is settled, and has failed");
                message.settled = true;
            }
        }
    }

    /// Forgets the connection: what of its last frame was written is torn.
    fn part(&mut self) {
        let mut begin = 0;
        for number in std::mem::take(&mut self.handed) {
            let message = &mut self.messages[number];
            message.torn |= begin < self.written && self.written < begin + message.frame;
            begin += message.frame;
        }
        self.buffers.clear();
        self.written = 0;
    }

    fn broken(&mut self) {
        let before = self.outbox.tally().settled;
        assert_eq!(self.outbox.rewind(), self.outbox.tally().settled != before);
        self.learn_settled();
        for (number, message) in self.messages.iter().enumerate() {
            assert!(!(message.written && message.is_in_flight()), "{number} was written, and would be sent again");
        }
        self.part();
        self.outbox.note_attempt();
        self.note_attempt();
    }

    fn note_attempt(&mut self) {
        for message in self.messages.iter_mut().filter(|message| message.is_in_flight()) {
            message.attempts += 1;
        }
    }

    fn fail(&mut self, number: usize, reason: FailedReason) {
        let message = &mut self.messages[number];
        assert!(message.is_in_flight());
        message.failed = Some(reason);
        self.failed.push_back((number, self.now));
    }

    /// What may be dropped as never written, oldest first.
    fn droppable(&self) -> Vec<usize> {
        self.unhanded().into_iter().filter(|number| !self.messages[*number].torn).collect()
    }

    fn expire(&mut self) {
        let due = |message: &Accepted| message.expires.is_some_and(|expires| expires <= self.now);
        let expired: Vec<_> = self.droppable().into_iter().filter(|number| due(&self.messages[*number])).collect();
        let next = self.outbox.expire(self.now);
        for number in expired {
            self.fail(number, FailedReason::Expired);
        }
        let earliest = self.droppable().iter().filter_map(|number| self.messages[*number].expires).min();
        if let Some(earliest) = earliest {
            assert!(next.is_some_and(|next| next <= earliest), "the next expiry is at {earliest:?}, not at {next:?}");
        }
        assert!(next.is_none_or(|next| next > self.now), "an expiry that has passed would be waited for in a loop");
    }

    fn fail_oldest_for(&mut self, length: usize) {
        let frame = self.framing.prefix_width(length) + length;
        let kept = self.outbox.bytes() - self.outbox.failed_bytes;
        let droppable = self.droppable();
        let failed = self.outbox.tally().failed as usize;
        let made_room = self.outbox.fail_oldest_for(length, self.now);
        let failed = self.outbox.tally().failed as usize - failed;
        let had_room = kept == 0 || kept + frame <= self.limit;
        assert!(!had_room || failed == 0, "there was room, and {failed} were dropped");
        let mut last = 0;
        for number in droppable.iter().take(failed) {
            last = self.messages[*number].frame;
            self.fail(*number, FailedReason::Overflow);
        }
        let kept = self.outbox.bytes() - self.outbox.failed_bytes;
        let has_room = kept == 0 || kept + frame <= self.limit;
        assert!(failed == 0 || kept + last + size_of::<Chunk>() + frame > self.limit, "one less was enough");
        let full_of_failed = self.outbox.failed_bytes >= self.limit;
        assert_eq!(made_room, has_room);
        assert!(made_room || full_of_failed || failed == droppable.len(), "more could have been dropped");
    }

    fn fail_all(&mut self, reason: FailedReason) {
        // The way of all callers: what was written is settled, and the rest is given up.
        self.outbox.rewind();
        self.learn_settled();
        self.part();
        self.outbox.fail_all(reason, self.now);
        for number in 0..self.messages.len() {
            if self.messages[number].is_in_flight() {
                self.fail(number, reason);
            }
        }
    }

    fn take_failed(&mut self, most: usize) {
        for _ in 0..most {
            let expected = self.failed.pop_front();
            let Some(taken) = self.outbox.take_failed() else {
                assert_eq!(expected, None);
                return;
            };
            let (number, failed_at) = expected.expect("nothing else has failed");
            let message = &self.messages[number];
            assert_eq!(taken.number, number as u64);
            assert!(taken.message == message.message, "{number} came back otherwise than it was accepted");
            assert_eq!(Some(taken.reason), message.failed);
            assert_eq!(taken.attempts, message.attempts, "attempts of {number}");
            assert!(taken.age >= failed_at - message.at);
        }
    }

    fn in_flight_bytes(&self) -> usize {
        self.messages.iter().filter(|message| message.is_in_flight()).map(|message| message.frame).sum()
    }

    fn check(&self) {
        let count = |state: fn(&Accepted) -> bool| self.messages.iter().filter(|message| state(message)).count() as u64;
        let expected = Tally {
            recovered: 0,
            accepted: self.messages.len() as u64,
            settled: count(|message| message.settled),
            failed: count(|message| message.failed.is_some()),
            failed_for: std::array::from_fn(|index| {
                let reason = Some(FailedReason::ALL[index]);
                self.messages.iter().filter(|message| message.failed == reason).count() as u64
            }),
            in_flight: count(Accepted::is_in_flight),
            in_flight_bytes: self.in_flight_bytes(),
        };
        let tally = self.outbox.tally();
        assert_eq!(tally, expected);
        assert_eq!(tally.recovered + tally.accepted, tally.settled + tally.failed + tally.in_flight);

        assert_eq!(self.outbox.next_number(), expected.accepted);
        let first_in_flight = self.messages.iter().position(Accepted::is_in_flight);
        assert_eq!(self.outbox.resolved_to(), first_in_flight.map_or(expected.accepted, |number| number as u64));
        let mut failed = 0;
        for (number, message) in self.messages.iter().enumerate() {
            assert_eq!(self.outbox.failed_before(number as u64), failed);
            let fate = match message {
                Accepted { failed: Some(_), .. } => Fate::Failed,
                Accepted { settled: true, .. } => Fate::Settled,
                _ => Fate::InFlight,
            };
            assert_eq!(self.outbox.fate(number as u64), fate, "the fate of {number}");
            failed += u64::from(message.failed.is_some());
        }
        assert_eq!(self.outbox.failed_before(expected.accepted), failed);
        assert!(self.failed.is_empty() || self.outbox.has_failed());

        // One message alone may be as large as it likes; more than one stay within the limit.
        let bytes = expected.in_flight_bytes;
        assert!(bytes <= self.limit || expected.in_flight == 1, "{bytes} bytes where {} are allowed", self.limit);
        assert!(self.outbox.bytes() >= bytes);
    }

    /// Faults are over: everything in flight is written, and everything failed is taken.
    fn drain(&mut self) {
        while self.messages.iter().any(Accepted::is_in_flight) {
            self.run(&Step::Hand { most: usize::MAX });
            self.run(&Step::Write { part: 1.0 });
        }
        self.run(&Step::TakeFailed { most: usize::MAX });
        assert_eq!(self.outbox.failed_bytes, 0, "nothing is left of what was taken");
        while !self.reserved.is_empty() {
            self.run(&Step::Unreserve);
        }
        assert_eq!(self.outbox.bytes(), 0);
    }
}

fn step() -> impl Strategy<Value = Step> {
    let length = || {
        prop_oneof![
            2 => Just(0_usize),
            10 => 1..=200_usize,
            2 => 1_000..=9_000_usize,
            2 => LARGE_MESSAGE - 2..=LARGE_MESSAGE + 2,
            1 => 60_000..=280_000_usize,
        ]
    };
    let by = prop_oneof![3 => Just(By::Slice), 2 => Just(By::Bytes), 1 => Just(By::Encoder)];
    let expires_in = prop_oneof![4 => Just(None), 1 => (0..50_u64).prop_map(Some)];
    let part = prop_oneof![Just(1.0), 0.0..1.0_f64];
    let reason = prop_oneof![Just(FailedReason::Closed), Just(FailedReason::RetryExhausted)];
    prop_oneof![
        24 => (by, length(), expires_in).prop_map(|(by, length, expires_in)| Step::Push { by, length, expires_in }),
        8 => prop_oneof![0..3_usize, 1..400_usize, Just(1 << 20)].prop_map(|most| Step::Hand { most }),
        8 => part.prop_map(|part| Step::Write { part }),
        3 => Just(Step::Break),
        1 => Just(Step::Attempt),
        3 => (0..40_u64).prop_map(|millis| Step::Wait { millis }),
        3 => Just(Step::Expire),
        3 => length().prop_map(|length| Step::FailOldestFor { length }),
        1 => reason.prop_map(|reason| Step::FailAll { reason }),
        3 => (1..6_usize).prop_map(|most| Step::TakeFailed { most }),
        1 => length().prop_map(|length| Step::Reserve { length }),
        1 => Just(Step::Unreserve),
        1 => Just(Step::Release),
    ]
}

fn framing() -> impl Strategy<Value = Framing> {
    let prefixes = [Prefix::Buffstreams, Prefix::Varint, Prefix::U32Be, Prefix::U32Le, Prefix::U64Be];
    (prop::sample::select(prefixes.to_vec()), prop::sample::select(vec![5_000, 300_000]))
        .prop_map(|(prefix, max)| Framing::with_max(prefix, max).expect("the prefix can express it"))
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn every_message_is_settled_only_if_wholly_written_or_comes_back_whole_whatever_happens(
        framing in framing(),
        limit in prop::sample::select(vec![0, 300, 5_000, 100_000, 1_000_000]),
        steps in prop::collection::vec(step(), 0..120),
    ) {
        let mut model = Model::new(framing, limit);
        for step in &steps {
            model.run(step);
        }
        model.drain();
    }
}

/// How many cases a property test tries; more with `PROPTEST_CASES`.
fn config() -> ProptestConfig {
    let cases = std::env::var("PROPTEST_CASES").ok().and_then(|cases| cases.parse().ok()).unwrap_or(400);
    ProptestConfig { cases, failure_persistence: None, ..ProptestConfig::default() }
}

fn outbox(limit: usize) -> Outbox {
    Outbox::new(Framing::with_max(Prefix::U32Be, 1 << 20).unwrap(), limit)
}

fn handed(outbox: &mut Outbox) -> Vec<u8> {
    let mut buffers = VecDeque::new();
    outbox.hand(usize::MAX, &mut buffers);
    buffers.iter().flatten().copied().collect()
}

#[test]
fn an_empty_outbox_admits_any_legal_message_and_then_nothing_until_it_is_settled() {
    let mut outbox = outbox(100);
    assert_eq!(outbox.admits((1 << 20) + 1, 0), Err(Refusal::TooLarge));
    assert_eq!(outbox.admits(1 << 20, 0), Ok(()));
    outbox.push(&vec![1; 1 << 20], None, Instant::now);
    assert_eq!(outbox.admits(0, 0), Err(Refusal::Full));
    let bytes = handed(&mut outbox);
    outbox.wrote(bytes.len());
    assert_eq!(outbox.admits(1 << 20, 0), Ok(()));
    assert_eq!(outbox.admits(1 << 20, 1), Err(Refusal::Full), "room that somebody waits for is left alone");
    assert_eq!(outbox.admits(90, 6), Ok(()));
}

#[test]
fn a_large_message_is_handed_out_and_comes_back_without_a_copy() {
    let mut outbox = outbox(1 << 20);
    let message = Bytes::from(vec![5; LARGE_MESSAGE]);
    outbox.push(b"before", None, Instant::now);
    outbox.push_bytes(message.clone(), None, Instant::now);
    outbox.push(b"behind", None, Instant::now);
    let mut buffers = VecDeque::new();
    outbox.hand(usize::MAX, &mut buffers);
    assert!(buffers.iter().any(|buffer| buffer.as_ptr() == message.as_ptr()));
    drop(buffers);
    outbox.rewind();
    outbox.fail_all(FailedReason::Closed, Instant::now());
    let failed: Vec<_> = std::iter::from_fn(|| outbox.take_failed()).map(|failed| failed.message).collect();
    assert_eq!(failed, [Bytes::from_static(b"before"), message.clone(), Bytes::from_static(b"behind")]);
    assert_eq!(failed[1].as_ptr(), message.as_ptr());
}

#[test]
fn a_message_whose_encoder_panics_or_breaks_its_word_is_not_accepted_and_leaves_no_trace() {
    let mut outbox = outbox(1 << 20);
    let now = Instant::now();
    let expires = Some(now + Duration::from_millis(1));
    outbox.push(b"before", None, || now);
    for (length, encode) in [
        (3, (|buffer| buffer.extend_from_slice(b"four")) as fn(&mut Vec<u8>)),
        (5, |buffer| buffer.extend_from_slice(b"four")),
        (3, |_| panic!("the encoder's own")),
    ] {
        for expires in [None, expires] {
            let push = std::panic::AssertUnwindSafe(|| outbox.push_with(length, expires, || now, encode));
            assert!(std::panic::catch_unwind(push).is_err());
        }
    }
    assert_eq!(outbox.tally().accepted, 1);
    assert_eq!(outbox.expire(now + Duration::from_secs(1)), None, "nothing is left that could expire");
    assert_eq!(outbox.push(b"behind", None, || now), 1);
    assert_eq!(handed(&mut outbox), b"\0\0\0\x06before\0\0\0\x06behind");
}

#[test]
fn when_too_many_have_failed_in_between_no_failed_message_is_ever_called_settled() {
    let mut outbox = outbox(1 << 20);
    let now = Instant::now();
    let total = 4 * REMEMBERED_RUNS as u64;
    for number in 0..total {
        let expires = (number % 2 == 1).then_some(now);
        outbox.push(&number.to_be_bytes(), expires, || now);
    }
    // Every other message expires; then some of those before them fail, too, and the rest is settled.
    outbox.expire(now);
    let late = 100;
    for _ in 0..late {
        let oldest = outbox.chunks[0].split_first(&outbox.framing);
        outbox.chunks.pop_front();
        outbox.fail(oldest, FailedReason::Overflow, now);
    }
    let bytes = handed(&mut outbox).len();
    outbox.wrote(bytes);
    let mut failed = 0;
    for number in 0..total {
        let has_failed = number % 2 == 1 || number < 2 * late;
        let fate = outbox.fate(number);
        if has_failed {
            assert!(matches!(fate, Fate::Failed | Fate::Forgotten), "{number} has failed, and is called {fate:?}");
        } else {
            assert!(matches!(fate, Fate::Settled | Fate::Forgotten), "{number} is settled, and is called {fate:?}");
        }
        failed += u64::from(has_failed);
        assert!(outbox.failed_before(number + 1) <= number + 1, "more have failed before {number} than there were");
    }
    assert_eq!(outbox.fate(total - 1), Fate::Failed);
    assert_eq!(outbox.fate(total - 2), Fate::Settled);
    assert_eq!(outbox.failed_before(total), failed);
    assert_eq!(outbox.tally().failed, failed);
}

#[test]
fn small_messages_with_ever_other_expiries_take_little_more_memory_than_the_limit() {
    let limit = 100_000;
    let mut outbox = outbox(limit);
    let now = Instant::now();
    let mut expires_in = 1;
    while outbox.admits(8, 0).is_ok() {
        expires_in = 3 - expires_in;
        outbox.push(&[1; 8], Some(now + Duration::from_secs(expires_in)), || now);
    }
    let chunks = std::mem::take(&mut outbox.chunks).into_iter();
    let memory: usize =
        chunks.map(|chunk| size_of::<Chunk>() + chunk.frames.try_into_mut().map_or(0, |b| b.capacity())).sum();
    assert!(memory <= 2 * limit, "{memory} bytes of memory for a limit of {limit}");
}
