//! Both ends of sessions under simulated faults: the code that the shell drives, without sockets and without a clock.
//!
//! A world has a listener, some senders with a stream each, and links that lose, tear, delay and outlive their ends. Every
//! step is drawn from the seed. Beside the world stands the truth, which is learned from the messages themselves: each
//! carries its sender and its receipt. After each step it is compared with what both ends believe.
//!
//! Some senders have a spool, and die at any step: what of them is on disk, and how it gets there and back, is in `disk.rs`.

mod disk;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::{Duration, Instant};

use bytes::{BufMut, Bytes};
use fastrand::Rng;

use super::held::Held;
use super::ledger::{Offer, Verdict};
use super::receiving::{Key, Receiving, Turn};
use super::sending::{Ask, Heard, Sending, StateLost};
use super::streams::{Begun, Outcome, Streams, Terms, Told};
use super::wire::{self, Control, PREFACE, Preface, RefuseCode, StateId, StreamId};
use crate::proto::framing::Framing;
use crate::proto::inbox::{Delivered, Flow, Found, Inbox, Room};
use crate::proto::outbox::{FailedReason, Fate, Outbox, Rejection};
use disk::Spool;

/// Seeds that `cargo test` runs, and the least number of faults in each.
const SEEDS: u64 = 2_000;
const FAULTS: u32 = 20;

/// Steps with faults, at least; and rounds without, at most.
const STEPS: u32 = 250;
const ROUNDS: u32 = 3_000;

/// Bytes of a message that say what it is.
const LABEL: usize = 9;

/// The text of every refusal by a handler.
const REFUSED: &str = "refused by the handler";

/// What became of a message's last try while the receiver has known its stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Tried {
    InHand,
    Done,
    /// It must be handled again.
    Failed,
}

/// What is true of one stream, whatever its ends believe.
#[derive(Default)]
struct Truth {
    /// Numbers and receipts, as the handler learns of them.
    receipts: BTreeMap<u64, u64>,
    numbers: BTreeMap<u64, u64>,
    /// Ever handled, and ever refused, with the code.
    finished: BTreeSet<u64>,
    rejected: BTreeMap<u64, BTreeSet<u32>>,
    /// The highest number that was ever acknowledged, and whether that was true was checked up to there.
    acknowledged: u64,
    /// The lowest number that may still come.
    first: u64,
    window: usize,
    /// What holds while the receiver knows the stream under this name.
    state: Option<StateId>,
    tries: BTreeMap<u64, Tried>,
    /// Those that must be handled again.
    failed: BTreeSet<u64>,
    latest: Option<u64>,
    committed: u64,
    /// What the handler said it had stored, when this began.
    stored: u64,
    repeated_bytes: usize,
    past_repeats: bool,
    is_sequential: bool,
    /// Of the newest connection that was granted a session, and of the newest since the receiver last forgot the stream.
    newest: u64,
    epoch: u64,
    lost: Option<StateLost>,
    /// A process that had never heard of any state could not tell that one was lost.
    is_untold: bool,
    /// The connection whose handler has messages, and how many it has.
    holder: Option<usize>,
    in_hand: usize,
}

/// The side that dials.
struct Sender {
    /// What outlives it, if anything does.
    spool: Option<Spool>,
    ask: Ask,
    outbox: Outbox,
    sending: Sending,
    framing: Framing,
    inbox: Inbox,
    /// Handed out, not written.
    buffers: VecDeque<Bytes>,
    link: Option<usize>,
    /// By receipt; `None` while in flight.
    lengths: Vec<usize>,
    fates: Vec<Option<FailedReason>>,
    settled: Vec<bool>,
    unresolved: BTreeSet<u64>,
    replies: u64,
    replies_waiting: Held,
    resumed_with: usize,
    /// What the receiver had on the connection at hand when it began.
    dispatched: u64,
    window: usize,
    is_leaving: bool,
    is_over: bool,
}

enum Stage {
    Preface,
    Hello,
    Open(Receiving),
    /// The socket is gone; handlers may still be at work.
    Gone(Option<Receiving>),
    Closed,
}

/// A message's number, its receipt, and the message.
type InHand = (u64, u64, Bytes);

/// A connection on the side that listens.
struct Served {
    stage: Stage,
    inbox: Inbox,
    replies: Outbox,
    replied: u64,
    buffers: VecDeque<Bytes>,
    /// The handler is at work on one message, in its turn.
    turn: Option<(Turn, Option<InHand>)>,
    /// The handler has these in hand, beyond any turn.
    in_hand: Vec<InHand>,
    /// It was told to wait, and will be woken.
    asleep: bool,
    /// After what is in the buffers, the socket is closed.
    closing: bool,
}

/// The bytes between them.
struct Link {
    sender: usize,
    up: VecDeque<u8>,
    down: VecDeque<u8>,
    /// No byte gets through any more; what is on its way may.
    is_cut: bool,
    stalled: u32,
    served: Served,
}

struct World {
    rng: Rng,
    now: Instant,
    began: Instant,
    is_quiet: bool,
    /// Whether handlers work one message after the other.
    is_sequential: bool,
    concurrency: usize,
    keeps_store: bool,
    maximum: usize,
    terms: Terms,
    memory: usize,
    lifetime: u64,
    streams: Streams<usize>,
    senders: Vec<Sender>,
    truths: Vec<Truth>,
    links: Vec<Link>,
    scratch: Vec<u8>,
    faults: u32,
    trace: Vec<u64>,
    seen: Seen,
}

/// What happened at all, so that no run is quiet by mistake.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Seen {
    settled: u64,
    rejected: u64,
    unknown: u64,
    dropped: u64,
    repeats: u64,
    fenced: u64,
    stale: u64,
    behind: u64,
    waits: u64,
    lost: u64,
    drained: u64,
    forgotten: u64,
    dead: u64,
    replies: u64,
    partial_windows: u64,
    died: u64,
    stored: u64,
    recovered: u64,
    known_ahead: u64,
    refused_ahead: u64,
    untold: u64,
    damaged: u64,
}

impl Seen {
    fn plus(self, other: Seen) -> Seen {
        let mut sum = self;
        let add = |to: &mut u64, more: u64| *to += more;
        add(&mut sum.settled, other.settled);
        add(&mut sum.rejected, other.rejected);
        add(&mut sum.unknown, other.unknown);
        add(&mut sum.dropped, other.dropped);
        add(&mut sum.repeats, other.repeats);
        add(&mut sum.fenced, other.fenced);
        add(&mut sum.stale, other.stale);
        add(&mut sum.behind, other.behind);
        add(&mut sum.waits, other.waits);
        add(&mut sum.lost, other.lost);
        add(&mut sum.drained, other.drained);
        add(&mut sum.forgotten, other.forgotten);
        add(&mut sum.dead, other.dead);
        add(&mut sum.replies, other.replies);
        add(&mut sum.partial_windows, other.partial_windows);
        add(&mut sum.died, other.died);
        add(&mut sum.stored, other.stored);
        add(&mut sum.recovered, other.recovered);
        add(&mut sum.known_ahead, other.known_ahead);
        add(&mut sum.refused_ahead, other.refused_ahead);
        add(&mut sum.untold, other.untold);
        add(&mut sum.damaged, other.damaged);
        sum
    }

    fn fields(&self) -> [(&'static str, u64); 22] {
        [
            ("settled", self.settled),
            ("rejected", self.rejected),
            ("unknown", self.unknown),
            ("dropped", self.dropped),
            ("repeats", self.repeats),
            ("fenced", self.fenced),
            ("stale", self.stale),
            ("behind", self.behind),
            ("waits", self.waits),
            ("lost", self.lost),
            ("drained", self.drained),
            ("forgotten", self.forgotten),
            ("dead", self.dead),
            ("replies", self.replies),
            ("partial windows", self.partial_windows),
            ("died", self.died),
            ("stored", self.stored),
            ("recovered", self.recovered),
            ("known ahead", self.known_ahead),
            ("refused ahead", self.refused_ahead),
            ("untold", self.untold),
            ("damaged", self.damaged),
        ]
    }
}

fn payload(sender: usize, receipt: u64, length: usize) -> Vec<u8> {
    let mut bytes = vec![sender as u8];
    bytes.extend(receipt.to_be_bytes());
    bytes.extend((LABEL..length).map(|at| (at as u64 ^ receipt.wrapping_mul(31) ^ (sender as u64) << 3) as u8));
    bytes
}

fn stream_id(sender: usize) -> StreamId {
    StreamId([sender as u8 + 1; 16])
}

impl Sender {
    /// Whether it has nothing more to do, and nothing is left for another process.
    fn is_over(&self) -> bool {
        self.is_over && self.spool.as_ref().is_none_or(|spool| spool.is_over(self))
    }

    fn gave_up(&self, receipt: u64) -> bool {
        self.fates[receipt as usize].is_some() || self.spool.as_ref().is_some_and(|spool| spool.has_lost(receipt + 1))
    }
}

impl Truth {
    /// The handler of a connection begins with a message.
    fn begin(&mut self, sender: &Sender, connection: usize, number: u64, receipt: u64, seen: &mut Seen) {
        let length = sender.lengths[receipt as usize];
        assert!(sender.spool.is_none() || number == receipt + 1, "{number} is not the number on disk of {receipt}");
        assert_eq!(*self.receipts.entry(number).or_insert(receipt), receipt, "number {number} stands for two messages");
        assert_eq!(*self.numbers.entry(receipt).or_insert(number), number, "message {receipt} has two numbers");
        let never_sent = [FailedReason::Expired, FailedReason::Overflow, FailedReason::Closed];
        let fate = sender.fates[receipt as usize];
        assert!(fate.is_none_or(|fate| !never_sent.contains(&fate)), "{receipt} was dropped unwritten, and arrived");
        assert!(self.holder.is_none_or(|holder| holder == connection), "two handlers are at work on one stream");
        self.holder = Some(connection);
        self.in_hand += 1;
        match self.tries.insert(receipt, Tried::InHand) {
            Some(Tried::Failed) => assert!(self.failed.remove(&receipt)),
            Some(tried) => panic!("message {receipt} is handled twice while the receiver knows it ({tried:?})"),
            None => {
                let from = self.latest.map_or(0, |latest| latest + 1);
                assert!(receipt >= from, "message {receipt} comes behind {from}");
                for skipped in from..receipt {
                    let is_resolved = sender.gave_up(skipped) || sender.settled[skipped as usize];
                    let is_stored = self.numbers.get(&skipped).is_some_and(|number| *number <= self.stored);
                    let is_known = (self.latest.is_none() && is_resolved) || sender.gave_up(skipped) || is_stored;
                    assert!(is_known, "message {skipped} is left out");
                }
                let waits =
                    self.tries.iter().find(|(known, tried)| **tried == Tried::Failed && !sender.gave_up(**known));
                assert_eq!(waits, None, "{receipt} is begun before a failed message is handled again");
                self.latest = Some(receipt);
                let is_repeat = self.finished.contains(&receipt) || self.rejected.contains_key(&receipt);
                if is_repeat {
                    seen.repeats += 1;
                    assert!(!self.past_repeats || !self.is_sequential, "repeats are not one run");
                    // What a process was acknowledged, and did not write down before it died, comes on top.
                    if sender.spool.as_ref().is_none_or(|spool| !spool.forgot(number)) {
                        self.repeated_bytes += length + sender.framing.prefix_width(length);
                        assert!(self.repeated_bytes <= self.window, "more than a window is handled twice after a loss");
                    }
                    seen.untold += u64::from(self.is_untold);
                    if !self.is_untold {
                        let lost = self.lost.expect("a loss that lets messages be handled twice is reported");
                        assert!((lost.from..=lost.to).contains(&number), "{number} is handled twice, beyond {lost:?}");
                    }
                }
                self.past_repeats |= !is_repeat;
            }
        }
    }

    fn end(&mut self, receipt: u64, tried: Tried) {
        let before = self.tries.insert(receipt, tried);
        assert_eq!(before, Some(Tried::InHand));
        if tried == Tried::Failed {
            self.failed.insert(receipt);
        }
        self.in_hand -= 1;
        if self.in_hand == 0 {
            self.holder = None;
        }
    }

    /// The receiver says that everything up to here is finished.
    fn commit(&mut self, sender: &Sender, number: u64) {
        assert!(number >= self.committed, "the committed number went down from {} to {number}", self.committed);
        for committed in self.committed + 1..=number {
            match self.receipts.get(&committed) {
                None => {
                    let is_lost = sender.spool.as_ref().is_some_and(|spool| spool.has_lost(committed));
                    assert!(
                        committed < self.first || is_lost,
                        "{committed} is acknowledged, and no handler ever had it"
                    );
                }
                Some(receipt) => {
                    let is_done = self.finished.contains(receipt) || self.rejected.contains_key(receipt);
                    assert!(is_done || sender.gave_up(*receipt), "{committed} is acknowledged, and not finished");
                }
            }
        }
        self.committed = number;
        self.acknowledged = self.acknowledged.max(number);
    }

    /// The receiver knows the stream by another name: everything before is forgotten.
    fn forget(&mut self, state: StateId, stored: u64) {
        self.state = Some(state);
        self.tries.clear();
        self.failed.clear();
        (self.latest, self.holder, self.in_hand) = (None, None, 0);
        (self.lost, self.is_untold) = (None, false);
        // Whoever forgets everything cannot tell an older connection from a newer one.
        (self.committed, self.repeated_bytes, self.past_repeats, self.epoch) = (0, 0, false, 0);
        self.stored = stored;
    }

    /// A sender was told that a handler refused this message.
    fn has_rejected(&self, receipt: u64, rejection: &Rejection) {
        let codes = self.rejected.get(&receipt);
        assert!(codes.is_some_and(|codes| codes.contains(&rejection.code)), "{receipt} was rejected by nobody");
        assert_eq!(rejection.text, if rejection.code == 0 { "failed" } else { REFUSED });
    }

    /// What a handler that stores what it finishes can say after a crash.
    fn stored(&self) -> u64 {
        let done = |number: &u64| self.receipts.get(number).is_some_and(|receipt| self.finished.contains(receipt));
        (1..).take_while(done).last().unwrap_or(0)
    }
}

impl World {
    fn new(seed: u64) -> World {
        let mut rng = Rng::with_seed(seed);
        let began = Instant::now();
        let maximum = *rng.choice(&[40, 300, 300, 2_000, 2_000, 70_000]).unwrap_or(&300);
        let framing = Framing::for_session(maximum).unwrap();
        let largest = maximum + framing.prefix_width(0);
        let is_sequential = rng.bool();
        let count = rng.usize(1..4);
        let terms = Terms {
            maximum: maximum + rng.usize(0..2),
            window: largest * rng.usize(1..8),
            heartbeat: (Duration::from_millis(20), Duration::from_millis(400)),
        };
        let memory = largest * rng.usize(8..60);
        let mut streams = Streams::new(seed, memory);
        if rng.u8(..4) == 0 {
            streams.remember(1);
        }
        let senders: Vec<_> = (0..count)
            .map(|sender| {
                let reply_window = largest * rng.usize(1..4);
                let window = largest * rng.usize(1..12) + rng.usize(0..100);
                let heartbeat = Duration::from_millis(rng.u64(30..600));
                let token = vec![7; rng.usize(0..20)];
                let ask = Ask { framing, window, reply_window, heartbeat, token };
                let mut spool = rng.bool().then(Spool::default);
                let (outbox, sending) = match &mut spool {
                    Some(spool) => spool.begin(stream_id(sender), 0, &ask, rng.usize(0..6 * largest)),
                    None => {
                        let outbox = Outbox::in_session(framing, rng.usize(0..20 * largest));
                        (outbox, Sending::new(stream_id(sender), 0, ask.clone()))
                    }
                };
                Sender {
                    spool,
                    ask,
                    outbox,
                    replies_waiting: sending.room_for_replies(),
                    sending,
                    framing,
                    inbox: Inbox::new(framing),
                    buffers: VecDeque::new(),
                    link: None,
                    lengths: Vec::new(),
                    fates: Vec::new(),
                    settled: Vec::new(),
                    unresolved: BTreeSet::new(),
                    replies: 0,
                    resumed_with: 0,
                    dispatched: 0,
                    window: 0,
                    is_leaving: false,
                    is_over: false,
                }
            })
            .collect();
        let truths = (0..count).map(|_| Truth { first: 1, is_sequential, ..Truth::default() }).collect();
        World {
            now: began,
            began,
            is_quiet: false,
            is_sequential,
            concurrency: if is_sequential { 1 } else { rng.usize(1..8) },
            keeps_store: rng.u8(..3) == 0,
            maximum,
            terms,
            memory,
            lifetime: seed,
            streams,
            senders,
            truths,
            links: Vec::new(),
            scratch: vec![0; 64 * 1024],
            faults: 0,
            trace: Vec::new(),
            seen: Seen::default(),
            rng,
        }
    }

    /// A run from the first step to the last.
    fn run(seed: u64) -> World {
        let mut world = World::new(seed);
        let mut steps = 0;
        while steps < STEPS || world.faults < FAULTS {
            steps += 1;
            world.step();
            world.check();
        }
        world.drain();
        world
    }

    /// One chance in so many; never in a quiet world.
    fn chance(&mut self, of: u32) -> bool {
        !self.is_quiet && self.rng.u32(..of) == 0
    }

    fn note(&mut self, what: u64, whom: usize) {
        let elapsed = self.now.duration_since(self.began).as_millis() as u64;
        self.trace.push(what << 48 | (whom as u64) << 40 | elapsed);
    }

    fn step(&mut self) {
        let sender = self.rng.usize(..self.senders.len());
        let open: Vec<_> = (0..self.links.len()).filter(|at| !self.links[*at].is_closed()).collect();
        let link = self.rng.choice(open);
        let what = self.rng.u64(..100);
        self.note(what, sender);
        match (what, link) {
            (0..14, _) => self.push(sender),
            (14..60, _) => {
                if self.senders[sender].link.is_none() && self.rng.u8(..3) == 0 {
                    self.dial(sender);
                }
                if let Some(link) = self.senders[sender].link {
                    self.flow(sender, link);
                }
            }
            (60..78, Some(link)) => self.flow(self.links[link].sender, link),
            (78..82, _) => {
                self.now += Duration::from_millis(self.rng.u64(1..30));
                self.look_at_clocks();
            }
            (82..91, _) => self.fault(sender, link),
            (91..94, _) => {
                self.senders[sender].outbox.expire(self.now);
                self.learn(sender);
            }
            (94..100, Some(link)) => self.reply(link),
            _ => {}
        }
        self.spool(sender);
    }

    /// Things happen on one link, in any order.
    fn flow(&mut self, sender: usize, link: usize) {
        for _ in 0..self.rng.usize(1..8) {
            match self.rng.u8(..12) {
                0..2 => self.write(sender),
                2..4 => self.serve(link),
                4..7 => self.handle(link),
                7..9 => self.answer(link),
                9 => self.read(sender),
                _ => self.spool(sender),
            }
        }
    }

    // The side that dials.

    fn push(&mut self, index: usize) {
        let World { rng, senders, maximum, now, .. } = self;
        let sender = &mut senders[index];
        if sender.is_leaving {
            return;
        }
        if sender.spool.is_some() {
            return self.gather(index);
        }
        for _ in 0..rng.usize(1..5) {
            let length = match rng.u8(..8) {
                0 => *maximum,
                1..4 => LABEL,
                _ => rng.usize(LABEL..=(*maximum).min(200)),
            };
            if sender.outbox.admits(length, 0).is_err() {
                return;
            }
            let receipt = sender.lengths.len() as u64;
            let message = payload(index, receipt, length);
            let expires = (rng.u8(..10) == 0).then(|| *now + Duration::from_millis(rng.u64(0..50)));
            let accepted = match rng.u8(..2) {
                0 => sender.outbox.push(&message, expires, || *now),
                _ => sender.outbox.push_bytes(Bytes::from(message), expires, || *now),
            };
            assert_eq!(accepted, receipt);
            sender.lengths.push(length);
            sender.fates.push(None);
            sender.settled.push(false);
            sender.unresolved.insert(receipt);
        }
    }

    fn dial(&mut self, index: usize) {
        let sender = &mut self.senders[index];
        if sender.link.is_some() || sender.is_over {
            return;
        }
        sender.buffers.clear();
        let greeting = sender.sending.connect(&mut sender.outbox, self.now).expect("there are epochs");
        sender.outbox.hand_control(greeting, &mut sender.buffers);
        sender.inbox = Inbox::new(sender.framing);
        sender.inbox.enter_session(sender.sending.framing(), 0);
        sender.replies = 0;
        sender.replies_waiting = sender.sending.room_for_replies();
        sender.link = Some(self.links.len());
        let served = Served {
            stage: Stage::Preface,
            inbox: Inbox::new(Framing::default()),
            replies: Outbox::in_session(sender.framing, 100_000),
            replied: 0,
            buffers: VecDeque::new(),
            turn: None,
            in_hand: Vec::new(),
            asleep: false,
            closing: false,
        };
        let (up, down) = (VecDeque::new(), VecDeque::new());
        self.links.push(Link { sender: index, up, down, is_cut: false, stalled: 0, served });
    }

    /// The writer of a sender gets its turn.
    fn write(&mut self, index: usize) {
        let World { rng, senders, links, now, is_quiet, .. } = self;
        let sender = &mut senders[index];
        let Some(link) = sender.link else { return };
        let link = &mut links[link];
        if link.stalled > 0 {
            link.stalled -= 1;
            return;
        }
        if sender.buffers.is_empty() {
            while !sender.replies_waiting.is_empty() && (*is_quiet || rng.bool()) {
                sender.replies_waiting.take();
                sender.sending.took_replies(1);
            }
            let mut controls = Vec::new();
            sender.sending.controls(&mut sender.outbox, *now, &mut controls);
            if let Some(spool) = &sender.spool {
                decode_all(&sender.framing, &controls).iter().for_each(|control| spool.may_say(control));
            }
            let wakes = sender.sending.wake_at().is_some_and(|at| at > *now);
            assert!(wakes || sender.sending.is_dead(*now), "it would wake in a loop");
            sender.outbox.hand_control(controls, &mut sender.buffers);
            let most = if *is_quiet { 1 << 20 } else { rng.usize(..5_000) };
            sender.outbox.hand(most, &mut sender.buffers);
        }
        let total = transfer(rng, *is_quiet, &mut sender.buffers, &mut link.up, link.is_cut);
        if total > 0 {
            sender.sending.spoke(*now);
            sender.outbox.wrote(total);
        }
    }

    fn read(&mut self, index: usize) {
        let World { rng, senders, links, now, is_quiet, scratch, .. } = self;
        let sender = &mut senders[index];
        let Some(at) = sender.link else { return };
        let link = &mut links[at];
        if link.down.is_empty() {
            if link.is_cut {
                self.part(index);
            }
            return;
        }
        let mut read = receive(rng, *is_quiet, &mut link.down, &mut sender.inbox, scratch);
        sender.sending.heard(*now);
        loop {
            // One at a time, for the framing changes at WELCOME.
            let mut found = None;
            let delivered = sender
                .inbox
                .deliver_in_session(scratch, read, 1, |frame| {
                    found = Some(own(frame));
                    Flow::Continue
                })
                .expect("an honest peer");
            read = 0;
            match found {
                None => {}
                Some(Err(reply)) => {
                    let number = sender.sending.reply().expect("an honest peer");
                    assert!(reply == payload(at, sender.replies, reply.len()), "another reply came than was sent");
                    sender.replies += 1;
                    assert_eq!(number, sender.replies);
                    let held = sender.replies_waiting.push(sender.replies, &reply);
                    held.expect("no more replies come than there is room for");
                    self.seen.replies += 1;
                }
                Some(Ok(control)) => {
                    let welcome = match &control {
                        Control::Welcome(welcome) => Some((welcome.window as usize, welcome.dispatched)),
                        _ => None,
                    };
                    let heard = sender.sending.control(control, &mut sender.outbox, *now).expect("an honest peer");
                    sender.inbox.enter_session(sender.sending.framing(), 0);
                    if let Some((window, dispatched)) = welcome {
                        (sender.window, sender.dispatched) = (window, dispatched);
                        sender.resumed_with = sender.outbox.in_window();
                    }
                    match heard {
                        Heard::Nothing | Heard::Resolved => {}
                        Heard::Welcomed { lost, .. } => {
                            self.seen.lost += u64::from(lost.is_some());
                            let is_first = sender.spool.as_mut().is_some_and(Spool::is_first_welcome);
                            self.truths[index].is_untold |= is_first;
                            if lost.is_some() {
                                self.truths[index].lost = lost;
                            }
                        }
                        Heard::Refused(refuse) => {
                            assert!(refuse.code.is_temporary(), "{refuse:?}");
                            assert_ne!(refuse.code, RefuseCode::EPOCH, "the newest connection has the highest epoch");
                            self.learn(index);
                            return self.part(index);
                        }
                        Heard::Draining => self.seen.drained += 1,
                        Heard::Overtaken => panic!("only one process sends from what it keeps"),
                        Heard::Forgotten => {
                            self.seen.forgotten += 1;
                            sender.is_over = true;
                            break;
                        }
                    }
                }
            }
            if delivered == Delivered::All {
                break;
            }
        }
        self.learn(index);
        let sender = &self.senders[index];
        if sender.sending.is_done(&sender.outbox) && sender.buffers.is_empty() {
            // Both have said all that there is to say: the side that dialled ends its stream.
            let link = sender.link.expect("it was just read from");
            self.links[link].is_cut = true;
            self.part(index);
        }
    }

    /// A sender knows that its connection is lost, or gives it up.
    fn part(&mut self, index: usize) {
        let World { senders, now, .. } = self;
        let sender = &mut senders[index];
        sender.link = None;
        sender.buffers.clear();
        sender.sending.part(&mut sender.outbox);
        sender.outbox.note_attempt();
        sender.outbox.expire(*now);
        self.learn(index);
    }

    /// What became of a sender's messages, and whether that may be.
    fn learn(&mut self, index: usize) {
        if self.senders[index].spool.is_some() {
            return self.learn_spooled(index);
        }
        let World { senders, truths, seen, .. } = self;
        let (sender, truth) = (&mut senders[index], &truths[index]);
        while let Some(failed) = sender.outbox.take_failed() {
            let receipt = failed.number;
            assert!(
                failed.message == payload(index, receipt, sender.lengths[receipt as usize]),
                "{receipt} came back other"
            );
            assert!(sender.unresolved.remove(&receipt));
            sender.fates[receipt as usize] = Some(failed.reason);
            match failed.reason {
                FailedReason::Rejected => {
                    seen.rejected += 1;
                    let rejection = failed.rejection.expect("a rejected message says why");
                    truth.has_rejected(receipt, &rejection);
                }
                FailedReason::OutcomeUnknown => seen.unknown += 1,
                _ => {
                    seen.dropped += 1;
                    assert!(!truth.numbers.contains_key(&receipt), "{receipt} fails as unwritten, and arrived");
                }
            }
        }
        let resolved_to = sender.outbox.resolved_to();
        while let Some(receipt) = sender.unresolved.first().copied().filter(|receipt| *receipt < resolved_to) {
            assert_eq!(sender.outbox.fate(receipt), Fate::Settled);
            assert!(truth.finished.contains(&receipt), "message {receipt} is settled, and no handler has finished it");
            let number = truth.numbers[&receipt];
            assert!(number <= truth.acknowledged, "message {receipt} is released, and was not acknowledged");
            sender.settled[receipt as usize] = true;
            sender.unresolved.remove(&receipt);
            seen.settled += 1;
        }
    }

    // The side that listens.

    /// Reads from a link.
    fn serve(&mut self, at: usize) {
        let World { rng, links, scratch, is_quiet, now, .. } = self;
        let link = &mut links[at];
        if matches!(link.served.stage, Stage::Gone(_) | Stage::Closed) {
            return;
        }
        if link.up.is_empty() {
            if link.is_cut {
                self.lose(at);
            }
            return;
        }
        let mut read = receive(rng, *is_quiet, &mut link.up, &mut link.served.inbox, scratch);
        if let Stage::Open(receiving) = &mut link.served.stage {
            receiving.heard(read, *now);
        }
        if matches!(link.served.stage, Stage::Preface) {
            link.served.inbox.keep(scratch, read);
            read = 0;
            match Preface::of(link.served.inbox.unseen()) {
                Preface::Incomplete => return,
                Preface::Plain => panic!("it is a session"),
                Preface::Session { .. } => {}
            }
            link.served.inbox.enter_session(wire::handshake_framing(), PREFACE);
            link.served.stage = Stage::Hello;
        }
        let mut frames = Vec::new();
        loop {
            let served = &mut self.links[at].served;
            let in_handshake = matches!(served.stage, Stage::Hello);
            let most = if in_handshake { 1 } else { self.rng.usize(1..20) };
            let delivered = served
                .inbox
                .deliver_in_session(&mut self.scratch, read, most, |frame| {
                    frames.push(own(frame));
                    Flow::Continue
                })
                .expect("an honest peer");
            read = 0;
            if in_handshake {
                if let Some(frame) = frames.pop() {
                    let Ok(Control::Hello(hello)) = frame else { panic!("HELLO comes first") };
                    if !self.open(at, &hello) {
                        return;
                    }
                }
            } else {
                self.take(at, std::mem::take(&mut frames));
            }
            if delivered == Delivered::All || !matches!(self.links[at].served.stage, Stage::Open(_)) {
                return;
            }
        }
    }

    /// Whether the session was granted.
    fn open(&mut self, at: usize, hello: &wire::Hello) -> bool {
        let index = self.links[at].sender;
        let World { links, truths, senders, streams, terms, now, seen, keeps_store, .. } = self;
        let (truth, served) = (&mut truths[index], &mut links[at].served);
        let stored = if *keeps_store { truth.stored() } else { 0 };
        match streams.open(hello, Some(stored).filter(|stored| *stored > 0), terms, at, *now) {
            Err(refuse) => {
                assert!(matches!(refuse.code, RefuseCode::EPOCH | RefuseCode::BUSY), "{refuse:?}");
                seen.stale += u64::from(refuse.code == RefuseCode::EPOCH);
                let mut bytes = Vec::new();
                Control::Refuse(refuse).put(&wire::handshake_framing(), &mut bytes);
                served.replies.hand_control(bytes, &mut served.buffers);
                served.closing = true;
                false
            }
            Ok(opened) => {
                truth.first = truth.first.max(hello.first);
                let controls = decode_all(&wire::handshake_framing(), &opened.greeting);
                let Some(Control::Welcome(welcome)) = controls.last() else { panic!("WELCOME comes last") };
                if truth.state != Some(welcome.state) {
                    truth.forget(welcome.state, stored);
                }
                assert!(hello.epoch > truth.epoch, "an older connection of the stream takes over");
                truth.epoch = hello.epoch;
                truth.newest = truth.newest.max(hello.epoch);
                assert!(welcome.window <= hello.window.max(wire::largest_frame(hello.maximum)));
                truth.window = truth.window.max(welcome.window as usize);
                assert!(welcome.dispatched >= welcome.committed);
                truth.commit(&senders[index], welcome.committed);
                served.replies.hand_control(opened.greeting, &mut served.buffers);
                served.replies.resume(0, opened.receiving.reply_window()).expect("nothing was sent");
                served.inbox.enter_session(opened.receiving.framing(), 0);
                served.stage = Stage::Open(opened.receiving);
                if let Some(fenced) = opened.fenced {
                    seen.fenced += 1;
                    links[fenced].served.asleep = false;
                }
                true
            }
        }
    }

    /// What was read in a session.
    fn take(&mut self, at: usize, frames: Vec<Result<Control, Vec<u8>>>) {
        for frame in frames {
            let World { links, streams, rng, is_quiet, .. } = self;
            let served = &mut links[at].served;
            let Stage::Open(receiving) = &mut served.stage else { return };
            match frame {
                Ok(control) => match streams.control(receiving, control).expect("an honest peer") {
                    Told::Nothing | Told::Goodbye => {}
                    Told::TryAgain => served.asleep = false,
                    Told::RepliesTaken(number) => {
                        served.replies.acked(number).expect("an honest peer");
                    }
                },
                Err(message) => {
                    let number = receiving.number().expect("an honest peer");
                    receiving.hold(number, &message).expect("an honest peer");
                    if *is_quiet || rng.bool() {
                        self.begin_next(at);
                    }
                }
            }
        }
    }

    /// Gives held messages to the handler, if it may have them.
    fn begin_next(&mut self, at: usize) {
        let World { links, streams, rng, seen, concurrency, is_sequential, senders, truths, .. } = self;
        let index = links[at].sender;
        let served = &mut links[at].served;
        let Stage::Open(receiving) = &mut served.stage else { return };
        if served.asleep || served.in_hand.len() >= *concurrency {
            return;
        }
        let (mut turn, current) = match served.turn.take() {
            Some(turn) => turn,
            None => match streams.begin(receiving) {
                Begun::Turn(turn) => (turn, None),
                Begun::Wait => {
                    seen.waits += 1;
                    served.asleep = true;
                    return;
                }
                Begun::Fenced => {
                    served.closing = true;
                    return;
                }
                Begun::Behind => {
                    seen.behind += 1;
                    return self.hang_up(at);
                }
            },
        };
        if current.is_some() {
            served.turn = Some((turn, current));
            return;
        }
        while let Some((number, message)) = receiving.take_held() {
            match turn.offer(number) {
                Offer::Repeat => {}
                Offer::Wait => {
                    receiving.put_back(number, &message);
                    break;
                }
                Offer::Handle => {
                    let sender = &senders[index];
                    assert_eq!(usize::from(message[0]), index, "a message came to another stream");
                    let receipt = u64::from_be_bytes(message[1..LABEL].try_into().unwrap());
                    assert!(
                        message == payload(index, receipt, sender.lengths[receipt as usize]),
                        "{receipt} came other"
                    );
                    truths[index].begin(sender, at, number, receipt, seen);
                    if *is_sequential {
                        served.turn = Some((turn, Some((number, receipt, message))));
                        return;
                    }
                    served.in_hand.push((number, receipt, message));
                    if served.in_hand.len() >= *concurrency || rng.u8(..4) == 0 {
                        break;
                    }
                }
            }
        }
        let woken = streams.end(turn);
        self.wake(woken);
    }

    fn wake(&mut self, woken: Option<usize>) {
        if let Some(woken) = woken {
            self.links[woken].served.asleep = false;
        }
    }

    /// A handler finishes something, or gets something to do.
    fn handle(&mut self, at: usize) {
        let index = self.links[at].sender;
        let (refuses, fails) = (self.chance(12), self.chance(12));
        let World { links, truths, rng, streams, .. } = self;
        let (served, truth) = (&mut links[at].served, &mut truths[index]);
        let outcome = if refuses {
            Outcome::Refused(Rejection { code: rng.u32(1..5), text: REFUSED.to_owned() })
        } else if fails {
            Outcome::Failed("failed".to_owned())
        } else {
            Outcome::Finished
        };
        if let Some((mut turn, Some((number, receipt, message)))) = served.turn.take() {
            self.faults += u32::from(!matches!(outcome, Outcome::Finished));
            let mut again = false;
            match outcome {
                Outcome::Finished => turn.finish(number),
                Outcome::Refused(ref rejection) => turn.reject(number, rejection.clone()),
                Outcome::Failed(ref why) => again = turn.fail(number, why) == Verdict::TryAgain,
            }
            conclude(truth, receipt, &outcome, again);
            let panics = again && rng.bool();
            let goes_on = !panics && matches!(served.stage, Stage::Open(_)) && rng.bool();
            if let Stage::Open(receiving) = &mut served.stage
                && again
                && !panics
            {
                receiving.put_back(number, &message);
            }
            if goes_on {
                served.turn = Some((turn, None));
                self.begin_next(at);
            } else {
                let woken = streams.end(turn);
                self.wake(woken);
                if panics {
                    self.hang_up(at);
                }
            }
        } else if !served.in_hand.is_empty() && (self.is_quiet || rng.bool()) {
            let (number, receipt, message) = served.in_hand.swap_remove(rng.usize(..served.in_hand.len()));
            self.faults += u32::from(!matches!(outcome, Outcome::Finished));
            let key = Key { stream: stream_id(index), epoch: served.epoch() };
            let (again, woken) = streams.report(key, number, outcome.clone());
            conclude(truth, receipt, &outcome, again);
            if let Stage::Open(receiving) = &mut served.stage
                && again
                && receiving.next_to_begin() > number
                && rng.bool()
            {
                receiving.put_back(number, &message);
            }
            self.wake(woken);
        } else {
            self.begin_next(at);
        }
        let served = &self.links[at].served;
        if matches!(served.stage, Stage::Gone(_)) && served.turn.is_none() && served.in_hand.is_empty() {
            self.close(at);
        }
    }

    /// The writer of a served connection gets its turn.
    fn answer(&mut self, at: usize) {
        let World { rng, links, streams, now, is_quiet, truths, senders, .. } = self;
        let link = &mut links[at];
        let served = &mut link.served;
        if matches!(served.stage, Stage::Gone(_) | Stage::Closed) {
            return;
        }
        if link.stalled > 0 {
            link.stalled -= 1;
            return;
        }
        if let (true, Stage::Open(receiving)) = (served.buffers.is_empty(), &mut served.stage) {
            let mut controls = Vec::new();
            streams.controls(receiving, *now, &mut controls);
            let wakes = receiving.wake_at() > *now;
            assert!(wakes || receiving.is_dead(*now) || receiving.is_over(), "it would wake in a loop");
            // Nothing more will come: this side may close, too.
            served.closing |= receiving.is_drained() && rng.bool();
            for control in decode_all(&receiving.framing(), &controls) {
                if let Control::Ack(number) = control {
                    truths[link.sender].commit(&senders[link.sender], number);
                }
                if let Control::Refuse(refuse) = control {
                    assert_eq!(refuse.code, RefuseCode::EPOCH);
                    served.closing = true;
                }
            }
            served.replies.hand_control(controls, &mut served.buffers);
            served.replies.hand(usize::MAX, &mut served.buffers);
            assert!(served.replies.in_window() <= receiving.reply_window());
        }
        let total = transfer(rng, *is_quiet, &mut served.buffers, &mut link.down, link.is_cut);
        if total > 0 {
            served.replies.wrote(total);
            if let Stage::Open(receiving) = &mut served.stage {
                receiving.spoke(*now);
            }
        }
        if served.closing && served.buffers.is_empty() {
            self.hang_up(at);
        }
    }

    fn reply(&mut self, at: usize) {
        let Link { served, .. } = &mut self.links[at];
        if matches!(served.stage, Stage::Open(_)) {
            let message = payload(at, served.replied, LABEL + self.rng.usize(0..20));
            if served.replies.admits(message.len(), 0).is_ok() {
                served.replies.push(&message, None, || self.now);
                served.replied += 1;
            }
        }
    }

    /// The listener closes a connection.
    fn hang_up(&mut self, at: usize) {
        let link = &mut self.links[at];
        link.is_cut = true;
        link.up.clear();
        self.lose(at);
    }

    /// The listener knows that a connection is lost. Handlers finish what they have; or not.
    fn lose(&mut self, at: usize) {
        let abandons = self.chance(3);
        let served = &mut self.links[at].served;
        served.buffers.clear();
        served.stage = match std::mem::replace(&mut served.stage, Stage::Closed) {
            Stage::Open(receiving) => Stage::Gone(Some(receiving)),
            gone @ Stage::Gone(_) => gone,
            _ => Stage::Closed,
        };
        let replies = &mut served.replies;
        replies.fail_all(FailedReason::Disconnected, self.now);
        let tally = replies.tally();
        assert_eq!(tally.accepted, tally.settled + tally.failed);
        if let Some((turn, None)) = served.turn.take_if(|(_, current)| current.is_none()) {
            let woken = self.streams.end(turn);
            self.wake(woken);
        }
        let served = &mut self.links[at].served;
        if served.turn.is_none() && (served.in_hand.is_empty() || abandons) {
            self.close(at);
        }
    }

    /// The connection is gone, and its handler too.
    fn close(&mut self, at: usize) {
        let World { links, truths, streams, .. } = self;
        let link = &mut links[at];
        for (_, receipt, _) in link.served.in_hand.drain(..) {
            truths[link.sender].end(receipt, Tried::Failed);
        }
        if let Stage::Gone(Some(receiving)) = std::mem::replace(&mut link.served.stage, Stage::Closed) {
            let woken = streams.close(&receiving);
            self.wake(woken);
        }
    }

    /// Ends that hear nothing for too long give up.
    fn look_at_clocks(&mut self) {
        for index in 0..self.senders.len() {
            if self.senders[index].link.is_some() && self.senders[index].sending.is_dead(self.now) {
                self.seen.dead += 1;
                self.part(index);
            }
        }
        for at in 0..self.links.len() {
            if let Stage::Open(receiving) = &self.links[at].served.stage
                && receiving.is_dead(self.now)
            {
                self.seen.dead += 1;
                self.hang_up(at);
            }
        }
    }

    fn fault(&mut self, index: usize, link: Option<usize>) {
        self.faults += 1;
        match (self.rng.u8(..28), link) {
            // A cut, anywhere in what is on its way; either end hears of it sooner or later.
            (0..6, Some(at)) => {
                let link = &mut self.links[at];
                link.is_cut = true;
                link.up.truncate(self.rng.usize(..=link.up.len()));
                link.down.truncate(self.rng.usize(..=link.down.len()));
                let sender = link.sender;
                if self.senders[sender].link == Some(at) && self.rng.bool() {
                    self.part(sender);
                }
            }
            // The sender gives its connection up; the listener does not know, and still gets what is on its way.
            (6..10, _) => {
                if self.senders[index].link.is_some() {
                    self.part(index);
                    self.dial(index);
                }
            }
            (10..12, Some(at)) => self.links[at].stalled = self.rng.u32(1..40),
            // The listener hangs up.
            (12..14, Some(at)) => {
                if !matches!(self.links[at].served.stage, Stage::Closed) {
                    self.hang_up(at);
                }
            }
            (14, _) => self.restart(),
            // All connections are cut, and what is known stays.
            (15, _) => {
                for at in 0..self.links.len() {
                    if !matches!(self.links[at].served.stage, Stage::Closed) {
                        self.hang_up(at);
                    }
                }
            }
            // The sender gives up what it has.
            (16, _) => {
                self.part(index);
                self.senders[index].outbox.fail_all(FailedReason::Closed, self.now);
                self.learn(index);
            }
            (17, _) if self.senders[index].spool.is_none() => {
                let length = self.rng.usize(LABEL..=self.maximum);
                self.senders[index].outbox.fail_oldest_for(length, self.now);
                self.learn(index);
            }
            (18, Some(at)) => {
                if let Stage::Open(receiving) = &mut self.links[at].served.stage {
                    receiving.drain();
                }
            }
            (19, _) if self.rng.u8(..4) == 0 => {
                self.now += Duration::from_millis(self.rng.u64(1..1_500));
                self.look_at_clocks();
            }
            (24.., _) if self.senders[index].spool.is_some() => {
                self.die(index);
                if self.rng.u8(..4) == 0 {
                    self.restart();
                }
            }
            (20..24, Some(at)) => {
                // Everything on its way arrives, byte by byte, with nothing in between.
                for _ in 0..50 {
                    self.serve(at);
                }
            }
            _ => self.faults -= 1,
        }
    }

    /// The receiver is killed, and starts again with nothing.
    fn restart(&mut self) {
        for link in &mut self.links {
            let served = &mut link.served;
            link.is_cut = true;
            link.up.clear();
            served.stage = Stage::Closed;
            served.buffers.clear();
            served.in_hand.clear();
            served.turn = None;
        }
        self.lifetime = self.lifetime.wrapping_add(0x9e37_79b9);
        self.streams = Streams::new(self.lifetime, self.memory);
    }

    fn check(&mut self) {
        for sender in &self.senders {
            let tally = sender.outbox.tally();
            assert_eq!(tally.recovered + tally.accepted, tally.settled + tally.failed + tally.in_flight);
            assert_eq!(tally.in_flight, sender.unresolved.len() as u64);
            let in_window = sender.outbox.in_window();
            if let Some(spool) = &sender.spool {
                spool.check(sender);
                continue;
            }
            assert_eq!(tally.accepted, sender.lengths.len() as u64);
            assert!(
                in_window <= sender.window.max(sender.resumed_with),
                "{in_window} bytes in a window of {}",
                sender.window
            );
            let bytes = tally.in_flight_bytes;
            assert!(bytes <= sender.outbox.limit() || tally.in_flight == 1);
            if in_window > 0 && in_window < bytes {
                self.seen.partial_windows += 1;
            }
        }
        for link in &self.links {
            match &link.served.stage {
                Stage::Open(receiving) | Stage::Gone(Some(receiving)) => {
                    assert!(receiving.held_bytes() <= receiving.window());
                    let largest = self.maximum + Framing::for_session(self.maximum).unwrap().prefix_width(0);
                    assert!(receiving.window() <= (self.memory / 2).max(largest), "more was granted than half of it");
                }
                _ => {}
            }
        }
    }

    /// Faults are over: everything must come to an end within a bounded time.
    fn drain(&mut self) {
        self.is_quiet = true;
        for link in &mut self.links {
            link.stalled = 0;
        }
        for round in 0.. {
            assert!(round < ROUNDS, "it does not drain: {}", self.report());
            self.now += Duration::from_millis(7);
            self.look_at_clocks();
            for index in 0..self.senders.len() {
                self.senders[index].outbox.expire(self.now);
                self.learn(index);
                self.spool(index);
                if self.senders[index].unresolved.is_empty() {
                    self.senders[index].is_leaving = true;
                    self.senders[index].sending.leave();
                }
                self.dial(index);
                self.write(index);
                self.read(index);
            }
            for at in 0..self.links.len() {
                self.serve(at);
                self.handle(at);
                self.answer(at);
            }
            self.check();
            let is_over = self.senders.iter().all(Sender::is_over);
            // One that stays silent before HELLO is the business of the shell's handshake deadline.
            let closed = |link: &Link| matches!(link.served.stage, Stage::Closed | Stage::Preface | Stage::Hello);
            if is_over && self.links.iter().all(closed) {
                break;
            }
        }
        for (index, sender) in self.senders.iter().enumerate() {
            assert!(sender.unresolved.is_empty());
            let truth = &self.truths[index];
            for receipt in 0..sender.lengths.len() {
                if let Some(spool) = &sender.spool {
                    assert!(spool.is_over(sender));
                    let is_known = truth.finished.contains(&(receipt as u64)) || sender.gave_up(receipt as u64);
                    assert!(is_known, "{receipt} was accepted, and nobody has it");
                    continue;
                }
                let settled = sender.settled[receipt];
                assert!(settled != sender.fates[receipt].is_some());
                assert!(!settled || truth.finished.contains(&(receipt as u64)));
            }
            // A HELLO that was on its way for longer than its stream lasted begins it once more.
            let is_late = truth.epoch < truth.newest;
            assert!(is_late || !self.streams.knows(stream_id(index)), "a stream that said goodbye is remembered");
        }
        assert_eq!(self.streams.open_connections(), 0, "a part of the memory was not given back");
    }

    fn report(&self) -> String {
        let senders = self.senders.iter().map(|sender| {
            format!("{:?} {:?} in {} of {}; ", sender.link, sender.unresolved, sender.outbox.in_window(), sender.window)
        });
        senders.collect()
    }
}

impl Link {
    fn is_closed(&self) -> bool {
        matches!(self.served.stage, Stage::Closed)
    }
}

impl Served {
    fn epoch(&self) -> u64 {
        match &self.stage {
            Stage::Open(receiving) | Stage::Gone(Some(receiving)) => receiving.key().epoch,
            _ => panic!("it has a session"),
        }
    }
}

/// A try is over.
fn conclude(truth: &mut Truth, receipt: u64, outcome: &Outcome, again: bool) {
    match outcome {
        Outcome::Finished => {
            truth.finished.insert(receipt);
            truth.end(receipt, Tried::Done);
        }
        Outcome::Refused(rejection) => {
            truth.rejected.entry(receipt).or_default().insert(rejection.code);
            truth.end(receipt, Tried::Done);
        }
        Outcome::Failed(_) if again => truth.end(receipt, Tried::Failed),
        Outcome::Failed(_) => {
            truth.rejected.entry(receipt).or_default().insert(0);
            truth.end(receipt, Tried::Done);
        }
    }
}

/// Moves bytes from a writer's buffers into a link; returns how many. A link that is cut swallows them.
fn transfer(rng: &mut Rng, all: bool, buffers: &mut VecDeque<Bytes>, into: &mut VecDeque<u8>, is_cut: bool) -> usize {
    let offered: usize = buffers.iter().map(Bytes::len).sum();
    let most = if all || rng.u8(..3) == 0 { offered } else { rng.usize(..=offered) };
    let mut left = most;
    while left > 0 {
        let front = buffers.front_mut().expect("there is as much");
        let part = front.split_to(left.min(front.len()));
        left -= part.len();
        if front.is_empty() {
            buffers.pop_front();
        }
        if !is_cut {
            into.extend(&part[..]);
        }
    }
    most
}

/// Moves bytes from a link to where an Inbox wants them; returns how many.
fn receive(rng: &mut Rng, all: bool, from: &mut VecDeque<u8>, inbox: &mut Inbox, scratch: &mut [u8]) -> usize {
    let wanted = match rng.u8(..4) {
        _ if all => from.len(),
        0 => 1,
        1 => rng.usize(1..=from.len().min(30)),
        2 => rng.usize(1..=from.len()),
        _ => from.len(),
    };
    match inbox.room(scratch) {
        Room::Scratch(room) => {
            let read = wanted.min(room.len());
            room.iter_mut().zip(from.drain(..read)).for_each(|(to, byte)| *to = byte);
            read
        }
        Room::Own(mut room) => {
            let read = wanted.min(room.chunk_mut().len());
            from.drain(..read).for_each(|byte| room.put_u8(byte));
            read
        }
    }
}

fn own(frame: Found<'_>) -> Result<Control, Vec<u8>> {
    match frame {
        Found::Message(message) => Err(message.to_vec()),
        Found::Control(control) => Ok(Control::decode(control).expect("an honest peer")),
    }
}

fn decode_all(framing: &Framing, mut bytes: &[u8]) -> Vec<Control> {
    let mut controls = Vec::new();
    while !bytes.is_empty() {
        let refused = framing.header(bytes).expect_err("control frames are of negative length");
        let header = framing.control_header(refused).expect("they are short");
        controls.push(Control::decode(&bytes[header.prefix..header.frame()]).expect("they are well formed"));
        bytes = &bytes[header.frame()..];
    }
    controls
}

/// Says which seed it was, if it panics.
struct Seed(u64);

impl Drop for Seed {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("run this again with BUFFSTREAMS_SEED={}", self.0);
        }
    }
}

fn number_from(variable: &str) -> Option<u64> {
    std::env::var(variable).ok().and_then(|value| value.parse().ok())
}

#[test]
fn every_message_has_the_fate_that_its_sender_is_told_whatever_breaks() {
    let (first, count) = match number_from("BUFFSTREAMS_SEED") {
        Some(seed) => (seed, 1),
        None => (0, number_from("BUFFSTREAMS_SIMULATIONS").unwrap_or(SEEDS)),
    };
    let workers = std::thread::available_parallelism().map_or(1, |count| count.get() as u64);
    let runs: Vec<_> = std::thread::scope(|scope| {
        let begin = |worker: u64| {
            scope.spawn(move || {
                let mut all = Seen::default();
                for seed in (first..first + count).filter(|seed| seed % workers == worker) {
                    let printed = Seed(seed);
                    let world = World::run(seed);
                    std::mem::forget(printed);
                    all = all.plus(world.seen);
                }
                all
            })
        };
        let runs: Vec<_> = (0..workers).map(begin).collect();
        runs.into_iter().map(|run| run.join().expect("the seed is printed above")).collect()
    });
    let seen = runs.into_iter().fold(Seen::default(), Seen::plus);
    println!("{seen:?}");
    if count >= SEEDS {
        for (what, times) in seen.fields() {
            assert!(times > 0, "in all of these runs, this never happened: {what}");
        }
    }
}

#[test]
fn the_same_seed_gives_the_same_run() {
    for seed in [1, 2, 3, 1_000_003] {
        let (one, other) = (World::run(seed), World::run(seed));
        assert!(one.trace == other.trace && one.seen == other.seen, "seed {seed}");
        assert!(one.faults >= FAULTS && one.faults == other.faults);
    }
    assert!(World::run(1).trace != World::run(2).trace);
}
