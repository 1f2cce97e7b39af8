//! What either end does on its own: answers to a peer that breaks the rules, bounds, and times.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use bytes::Bytes;

use super::ledger::{Offer, Verdict};
use super::receiving::Receiving;
use super::sending::{Ask, Heard, Sending};
use super::streams::{Begun, Outcome, Streams, Terms};
use super::wire::{Control, Hello, Refuse, RefuseCode, StateId, StreamId, Welcome, handshake_framing};
use super::{MOST_REJECTS, SessionError};
use crate::proto::flight::Untrue;
use crate::proto::framing::Framing;
use crate::proto::outbox::{FailedReason, Outbox, Rejection};

fn framing() -> Framing {
    Framing::for_session(100).unwrap()
}

fn welcome(dispatched: u64, committed: u64) -> Control {
    welcome_as(StateId([1; 16]), dispatched, committed)
}

/// Of a receiver that has lost its state.
fn welcome_anew(dispatched: u64, committed: u64) -> Control {
    welcome_as(StateId([2; 16]), dispatched, committed)
}

fn welcome_as(state: StateId, dispatched: u64, committed: u64) -> Control {
    let heartbeat = Duration::from_secs(1);
    Control::Welcome(Welcome { version: 1, state, dispatched, committed, window: 1_000, heartbeat })
}

fn rejection() -> Rejection {
    Rejection { code: 7, text: "no".to_owned() }
}

/// A sender with three messages, of which it has written `written`, if it was welcomed at all.
struct Dialled {
    sending: Sending,
    outbox: Outbox,
    now: Instant,
}

impl Dialled {
    fn greeting() -> Dialled {
        let now = Instant::now();
        let heartbeat = Duration::from_secs(1);
        let ask = Ask { framing: framing(), window: 1_000, reply_window: 1_000, heartbeat, token: Vec::new() };
        let mut outbox = Outbox::in_session(framing(), 1_000);
        for message in [b"one", b"two", b"six"] {
            outbox.push(message, None, || now);
        }
        let mut sending = Sending::new(StreamId([7; 16]), 4, ask);
        sending.connect(&mut outbox, now).unwrap();
        Dialled { sending, outbox, now }
    }

    /// A sender whose messages come from a spool; those on disk have numbers from `first` to below `end`.
    fn spooled(first: u64, end: u64) -> Dialled {
        let now = Instant::now();
        let mut outbox = Outbox::spooled(framing(), 1_000, first, end, end - first);
        let mut sending = Sending::new(StreamId([7; 16]), 4, dialled_ask());
        sending.connect(&mut outbox, now).unwrap();
        Dialled { sending, outbox, now }
    }

    fn feed(&mut self, messages: &[&'static [u8]]) {
        for message in messages {
            self.outbox.push_spooled(Bytes::from_static(message), self.now);
        }
    }

    /// Everything that may be is written; returns it.
    fn write(&mut self) -> Vec<u8> {
        let mut out = Vec::new();
        self.sending.controls(&mut self.outbox, self.now, &mut out);
        let mut buffers = VecDeque::new();
        self.outbox.hand_control(out, &mut buffers);
        self.outbox.hand(usize::MAX, &mut buffers);
        self.outbox.wrote(buffers.iter().map(Bytes::len).sum());
        buffers.iter().flatten().copied().collect()
    }

    fn reconnect(&mut self) {
        self.sending.part(&mut self.outbox);
        self.sending.connect(&mut self.outbox, self.now).unwrap();
    }

    fn welcomed(written: usize) -> Dialled {
        let mut dialled = Dialled::greeting();
        dialled.hear(welcome(0, 0)).unwrap();
        for _ in 0..written {
            dialled.outbox.hand_one();
        }
        dialled
    }

    fn hear(&mut self, control: Control) -> Result<Heard, SessionError> {
        self.sending.control(control, &mut self.outbox, self.now)
    }
}

impl Outbox {
    /// The writer takes one frame of the four-byte messages here, and writes it.
    fn hand_one(&mut self) {
        let mut buffers = VecDeque::new();
        self.resume_window(self.in_window() + 6);
        self.hand(1, &mut buffers);
        self.wrote(buffers.iter().map(Bytes::len).sum());
    }
}

#[test]
fn a_receiver_that_claims_what_cannot_be_is_not_believed_and_nothing_changes() {
    let mut dialled = Dialled::welcomed(2);
    assert_eq!(dialled.hear(Control::Ack(1)), Ok(Heard::Resolved));
    let before = dialled.outbox.tally();
    let never = Untrue::NeverSent { number: 3, last: 2 };
    assert_eq!(dialled.hear(Control::Ack(3)), Err(never.into()));
    assert_eq!(dialled.hear(Control::Reject(3, rejection())), Err(never.into()));
    assert_eq!(dialled.outbox.acked(0), Err(Untrue::TakenBack { number: 0, acked: 1 }));
    assert_eq!(dialled.hear(Control::Ack(1)), Ok(Heard::Nothing), "once more is harmless");
    assert_eq!(dialled.outbox.tally(), before);

    dialled.sending.part(&mut dialled.outbox);
    for (answer, untrue) in [
        (welcome(3, 1), Untrue::NeverSent { number: 3, last: 2 }),
        (welcome(0, 0), Untrue::Behind { number: 0, first: 2 }),
        (welcome(1, 0), Untrue::TakenBack { number: 0, acked: 1 }),
    ] {
        dialled.sending.connect(&mut dialled.outbox, dialled.now).unwrap();
        assert_eq!(dialled.hear(answer), Err(untrue.into()));
        assert_eq!(dialled.outbox.tally(), before);
    }
    dialled.sending.connect(&mut dialled.outbox, dialled.now).unwrap();
    assert_eq!(dialled.hear(welcome(2, 2)), Ok(Heard::Welcomed { lost: None, resumed: Some(1) }));
    assert_eq!(dialled.outbox.tally().settled, 2);
}

#[test]
fn frames_have_their_place() {
    let mut greeting = Dialled::greeting();
    for control in [Control::Ack(1), Control::Heartbeat, Control::Goodbye, Control::ConfirmGoodbye, Control::Skip(2)] {
        let error = greeting.hear(control.clone()).expect_err("WELCOME comes first");
        assert!(error.to_string().starts_with(control.name()), "{error}");
        assert_eq!(error.refuse().code, RefuseCode::PROTOCOL);
    }
    assert!(greeting.sending.reply().is_err(), "a message before WELCOME");
    assert_eq!(greeting.hear(Control::Ignorable(200)), Ok(Heard::Nothing));
    let mut open = Dialled::welcomed(0);
    for control in [welcome(0, 0), Control::ConfirmReject(1), Control::ConfirmGoodbye, Control::Skip(1)] {
        assert!(open.hear(control).is_err());
    }
    assert_eq!(open.hear(Control::Goodbye), Ok(Heard::Draining));
    assert!(open.hear(Control::Goodbye).is_err(), "once");
}

#[test]
fn a_receiver_that_lost_its_state_may_acknowledge_again_what_was_and_takes_back_nothing_of_that() {
    let mut dialled = Dialled::welcomed(3);
    dialled.hear(Control::Ack(3)).unwrap();
    dialled.sending.part(&mut dialled.outbox);
    dialled.sending.connect(&mut dialled.outbox, dialled.now).unwrap();
    // It was told that nothing before 4 comes, and a handler still has what came before that.
    assert!(matches!(dialled.hear(welcome_anew(3, 0)), Ok(Heard::Welcomed { lost: Some(_), .. })));
    assert_eq!(dialled.hear(Control::Ack(2)), Ok(Heard::Nothing));
    assert_eq!(dialled.hear(Control::Ack(1)), Err(Untrue::TakenBack { number: 1, acked: 2 }.into()));
    assert_eq!((dialled.outbox.tally().settled, dialled.outbox.tally().in_flight), (3, 0));
}

#[test]
fn replies_behind_the_last_word_of_a_receiver_are_no_error_and_those_where_there_is_no_session_are() {
    let mut dialled = Dialled::greeting();
    assert!(dialled.sending.reply().is_err(), "before WELCOME");
    dialled.hear(welcome(0, 0)).unwrap();
    dialled.sending.reply().unwrap();
    dialled.write();
    dialled.hear(Control::Ack(3)).unwrap();
    dialled.sending.leave();
    dialled.write();
    assert_eq!(dialled.hear(Control::ConfirmGoodbye), Ok(Heard::Forgotten));
    dialled.sending.reply().unwrap();

    let mut refused = Dialled::greeting();
    let refuse = Refuse { code: RefuseCode::BUSY, detail: 0, text: String::new() };
    refused.hear(Control::Refuse(refuse)).unwrap();
    assert!(refused.sending.reply().is_err(), "it was refused");
}

#[test]
fn replies_that_wait_take_no_more_than_the_window_that_was_asked_for() {
    let mut room = Dialled::greeting().sending.room_for_replies();
    for number in 1..=10 {
        room.push(number, &[0; 97]).expect("it was asked for 1,000 bytes");
    }
    assert_eq!(room.push(11, b""), Err(SessionError::WindowExceeded { held: 1_003, window: 1_000 }));
}

#[test]
fn a_window_that_holds_no_message_is_refused() {
    let mut dialled = Dialled::greeting();
    let Control::Welcome(mut granted) = welcome(0, 0) else { unreachable!() };
    granted.window = 102;
    let error = SessionError::WindowTooSmall { window: 102, least: 103 };
    assert_eq!(dialled.hear(Control::Welcome(granted)), Err(error));
}

#[test]
fn a_rejected_message_comes_back_with_the_words_of_the_handler_also_when_the_reject_is_repeated_after_a_break() {
    let mut dialled = Dialled::welcomed(3);
    dialled.sending.part(&mut dialled.outbox);
    dialled.sending.connect(&mut dialled.outbox, dialled.now).unwrap();
    assert_eq!(dialled.hear(Control::Reject(2, rejection())), Ok(Heard::Resolved));
    assert_eq!(dialled.hear(Control::Reject(2, rejection())), Ok(Heard::Nothing));
    assert!(matches!(dialled.hear(welcome(3, 3)), Ok(Heard::Welcomed { lost: None, .. })));
    let failed = dialled.outbox.take_failed().expect("it was rejected");
    assert_eq!((failed.number, failed.reason), (1, FailedReason::Rejected));
    assert_eq!((&failed.message[..], failed.rejection), (&b"two"[..], Some(rejection())));
    let tally = dialled.outbox.tally();
    assert_eq!((tally.settled, tally.failed, tally.in_flight), (2, 1, 0));
    let mut out = Vec::new();
    dialled.sending.controls(&mut dialled.outbox, dialled.now, &mut out);
    let mut confirm = Vec::new();
    Control::ConfirmReject(2).put(&framing(), &mut confirm);
    assert_eq!(out, confirm, "once, however often it came");
}

#[test]
fn what_lies_behind_a_rejected_message_keeps_its_number_when_it_is_sent_again() {
    let mut dialled = Dialled::welcomed(3);
    dialled.hear(Control::Reject(2, rejection())).unwrap();
    dialled.sending.part(&mut dialled.outbox);
    dialled.sending.connect(&mut dialled.outbox, dialled.now).unwrap();
    dialled.hear(welcome(0, 0)).unwrap();
    let mut buffers = VecDeque::new();
    dialled.outbox.hand(usize::MAX, &mut buffers);
    let written: Vec<u8> = buffers.iter().flatten().copied().collect();
    let mut expected = Vec::new();
    framing().encode(b"one", &mut expected).unwrap();
    Control::Skip(3).put(&framing(), &mut expected);
    framing().encode(b"six", &mut expected).unwrap();
    assert_eq!(written, expected);
}

#[test]
fn a_receiver_may_stand_before_messages_that_were_rejected_when_its_last_word_is_another_reject() {
    let mut dialled = Dialled::welcomed(3);
    dialled.hear(Control::Reject(2, rejection())).unwrap();
    dialled.sending.part(&mut dialled.outbox);
    dialled.sending.connect(&mut dialled.outbox, dialled.now).unwrap();
    // A receiver that has forgotten the second, and rejects the first.
    dialled.hear(Control::Reject(1, rejection())).unwrap();
    assert!(matches!(dialled.hear(welcome(1, 1)), Ok(Heard::Welcomed { lost: None, .. })));
    let mut buffers = VecDeque::new();
    dialled.outbox.hand(usize::MAX, &mut buffers);
    let mut expected = Vec::new();
    Control::Skip(3).put(&framing(), &mut expected);
    framing().encode(b"six", &mut expected).unwrap();
    assert_eq!(buffers.iter().flatten().copied().collect::<Vec<_>>(), expected);
}

#[test]
fn a_message_of_which_a_part_was_written_keeps_its_number_and_is_not_dropped_and_one_behind_it_may_be() {
    let now = Instant::now();
    let expires = Some(now + Duration::from_millis(1));
    let mut outbox = Outbox::in_session(framing(), 1_000);
    for message in [b"one", b"two"] {
        outbox.push(message, expires, || now);
    }
    outbox.resume(0, 1_000).unwrap();
    outbox.hand(usize::MAX, &mut VecDeque::new());
    outbox.wrote(1);
    outbox.rewind();
    assert_eq!((outbox.first_number(), outbox.last_number()), (1, 1));
    outbox.expire(now + Duration::from_secs(1));
    let failed = outbox.take_failed().expect("it was never begun");
    assert_eq!((failed.number, failed.reason), (1, FailedReason::Expired));
    outbox.fail_all(FailedReason::Closed, now);
    let failed = outbox.take_failed().expect("it was given up");
    assert_eq!((failed.number, failed.reason), (0, FailedReason::OutcomeUnknown));
    assert_eq!((outbox.first_number(), outbox.last_number()), (2, 1));
}

#[test]
fn an_epoch_that_was_refused_is_passed_over() {
    let mut dialled = Dialled::greeting();
    assert_eq!(dialled.sending.epoch(), 5);
    let refuse = super::wire::Refuse { code: RefuseCode::EPOCH, detail: 90, text: String::new() };
    assert_eq!(dialled.hear(Control::Refuse(refuse.clone())), Ok(Heard::Refused(refuse)));
    dialled.sending.connect(&mut dialled.outbox, dialled.now).unwrap();
    assert_eq!(dialled.sending.epoch(), 91);
    let mut last = Sending::new(StreamId([7; 16]), u64::MAX, dialled_ask());
    assert_eq!(last.connect(&mut dialled.outbox, dialled.now), Err(SessionError::NumbersExhausted));
}

fn dialled_ask() -> Ask {
    let heartbeat = Duration::from_secs(1);
    Ask { framing: framing(), window: 1_000, reply_window: 1_000, heartbeat, token: Vec::new() }
}

fn hello(epoch: u64) -> Hello {
    Hello {
        versions: (1, 1),
        stream: StreamId([7; 16]),
        epoch,
        first: 1,
        maximum: 100,
        window: 200,
        reply_window: 1_000,
        heartbeat: Duration::from_secs(1),
        token: Vec::new(),
    }
}

fn terms() -> Terms {
    Terms { maximum: 100, window: 1_000, heartbeat: (Duration::from_millis(10), Duration::from_secs(60)) }
}

fn open(streams: &mut Streams<u64>, epoch: u64) -> Receiving {
    streams.open(&hello(epoch), None, &terms(), epoch, Instant::now()).expect("it may").receiving
}

#[test]
fn a_listener_refuses_what_it_cannot_grant() {
    let mut streams = Streams::new(1, 250);
    let refusal = |streams: &mut Streams<u64>, change: fn(&mut Hello)| {
        let mut hello = hello(9);
        change(&mut hello);
        let refuse = streams.open(&hello, None, &terms(), 0, Instant::now()).expect_err("it may not");
        (refuse.code, refuse.detail)
    };
    assert_eq!(refusal(&mut streams, |hello| hello.versions = (2, 9)), (RefuseCode::VERSION, 1));
    assert_eq!(refusal(&mut streams, |hello| hello.maximum = 101), (RefuseCode::MAXIMUM, 100));
    let older = open(&mut streams, 9);
    assert_eq!(refusal(&mut streams, |_| {}), (RefuseCode::EPOCH, 9));
    assert_eq!(refusal(&mut streams, |hello| hello.epoch = 8), (RefuseCode::EPOCH, 9));
    streams.close(&older);
    open(&mut streams, 10);
    let mut narrow = Streams::new(1, 102);
    assert_eq!(refusal(&mut narrow, |_| {}), (RefuseCode::BUSY, 102), "the largest message does not fit");
}

#[test]
fn a_window_is_an_equal_part_of_half_the_memory_at_most_and_no_number_of_connections_uses_it_up() {
    let mut streams = Streams::new(1, 1_000);
    let mut ask = |id: u8| {
        let hello = Hello { stream: StreamId([id; 16]), ..hello(1) };
        streams.open(&hello, None, &terms(), 0, Instant::now()).expect("there is room for everybody").receiving
    };
    let open: Vec<_> = (1..=100).map(&mut ask).collect();
    let windows: Vec<_> = open.iter().map(Receiving::window).collect();
    assert_eq!(windows[..5], [200, 200, 166, 125, 103], "the smallest takes the largest message");
    assert!(windows[5..].iter().all(|window| *window == 103));
    assert_eq!(streams.part_of(&open[0]), 103);
    for receiving in &open[1..] {
        streams.close(receiving);
    }
    assert_eq!(streams.part_of(&open[0]), 500, "those who left make room");
}

#[test]
fn a_sender_that_breaks_a_rule_is_found_out() {
    let mut streams = Streams::new(1, 10_000);
    let mut receiving = open(&mut streams, 1);
    let last = 0;
    assert_eq!(
        streams.control(&mut receiving, Control::ConfirmReject(1)),
        Err(SessionError::NeverRejected { number: 1, last })
    );
    assert!(streams.control(&mut receiving, Control::ConfirmGoodbye).is_err(), "nobody said GOODBYE");
    assert!(streams.control(&mut receiving, Control::Hello(hello(2))).is_err());
    assert!(streams.control(&mut receiving, Control::Reject(1, rejection())).is_err());
    let skips = SessionError::SkipsBack { number: 1, next: 1 };
    assert_eq!(streams.control(&mut receiving, Control::Skip(1)), Err(skips));
    let message = [0; 97];
    for _ in 0..2 {
        let number = receiving.number().unwrap();
        receiving.hold(number, &message).expect("the window is 200");
    }
    let number = receiving.number().unwrap();
    let exceeded = SessionError::WindowExceeded { held: 203, window: 200 };
    assert_eq!(receiving.hold(number, b""), Err(exceeded));
    streams.control(&mut receiving, Control::Goodbye).unwrap();
    assert!(receiving.number().is_err(), "no message follows GOODBYE");
    assert!(streams.control(&mut receiving, Control::Goodbye).is_err());
}

#[test]
fn a_message_over_which_a_handler_fails_three_times_is_rejected_also_over_several_connections() {
    let mut streams = Streams::new(1, 10_000);
    for epoch in 1..=3 {
        let mut receiving = open(&mut streams, epoch);
        let Begun::Turn(mut turn) = streams.begin(&receiving) else { panic!("nobody else has it") };
        assert_eq!(receiving.number(), Ok(1), "it is sent again");
        assert_eq!(turn.offer(1), Offer::Handle);
        let verdict = turn.fail(1, "it panicked");
        assert_eq!(verdict, if epoch < 3 { Verdict::TryAgain } else { Verdict::Rejected });
        streams.end(turn);
        streams.close(&receiving);
    }
    let opened = streams.open(&hello(4), None, &terms(), 4, Instant::now()).expect("it may");
    let mut expected = Vec::new();
    let rejection = Rejection { code: 0, text: "it panicked".to_owned() };
    Control::Reject(1, rejection).put(&handshake_framing(), &mut expected);
    assert!(opened.greeting.starts_with(&expected), "and the sender is told when it comes back");
}

#[test]
fn of_streams_without_a_connection_the_least_recently_used_beyond_a_bound_are_forgotten() {
    let mut streams = Streams::new(1, 10_000);
    streams.remember(2);
    let stream = |id: u8| Hello { stream: StreamId([id; 16]), ..hello(1) };
    let mut visit = |id: u8, epoch: u64| {
        let hello = Hello { epoch, ..stream(id) };
        let receiving = streams.open(&hello, None, &terms(), 0, Instant::now()).expect("it may").receiving;
        streams.close(&receiving);
        [1, 2, 3].map(|id| streams.knows(StreamId([id; 16])))
    };
    assert_eq!(visit(1, 1), [true, false, false]);
    assert_eq!(visit(2, 1), [true, true, false]);
    assert_eq!(visit(1, 2), [true, true, false]);
    assert_eq!(visit(3, 1), [true, false, true], "the second was not used for longest");
}

/// A stream comes, has so many messages handled and one rejected with a text of so many bytes, and leaves.
fn visit(streams: &mut Streams<u64>, id: u8, epoch: u64, handled: u64, text: usize) {
    let hello = Hello { stream: StreamId([id; 16]), ..hello(epoch) };
    let mut receiving = streams.open(&hello, None, &terms(), 0, Instant::now()).expect("it may").receiving;
    let Begun::Turn(mut turn) = streams.begin(&receiving) else { panic!("nobody else has it") };
    for _ in 0..handled {
        let number = receiving.number().unwrap();
        assert_eq!(turn.offer(number), Offer::Handle);
        turn.finish(number);
    }
    if text > 0 {
        let number = receiving.number().unwrap();
        assert_eq!(turn.offer(number), Offer::Handle);
        turn.reject(number, Rejection { code: 7, text: "x".repeat(text) });
    }
    streams.end(turn);
    streams.close(&receiving);
}

#[test]
fn streams_of_which_nothing_would_be_lost_are_forgotten_before_all_others() {
    let mut streams = Streams::new(1, 10_000);
    streams.remember(2);
    visit(&mut streams, 1, 1, 1, 0);
    for stranger in 10..20 {
        visit(&mut streams, stranger, 1, 0, 0);
    }
    assert!(streams.knows(StreamId([1; 16])));
    visit(&mut streams, 1, 2, 0, 0);
    visit(&mut streams, 2, 1, 0, 1);
    for stranger in 20..30 {
        visit(&mut streams, stranger, 1, 0, 0);
    }
    let knows = |streams: &Streams<u64>| [1, 2, 3].map(|id| streams.knows(StreamId([id; 16])));
    assert_eq!((knows(&streams), streams.take_forgotten()), ([true, true, false], 0));
    visit(&mut streams, 3, 1, 1, 0);
    assert_eq!((knows(&streams), streams.take_forgotten()), ([false, true, true], 1));
}

#[test]
fn long_texts_of_rejects_are_forgotten_and_streams_without_them_stay() {
    let mut streams = Streams::new(1, 10_000);
    visit(&mut streams, 1, 1, 1, 0);
    for id in 2..=4 {
        visit(&mut streams, id, 1, 1, 6 << 20);
    }
    let knows = [1, 2, 3, 4].map(|id| streams.knows(StreamId([id; 16])));
    assert_eq!((knows, streams.take_forgotten()), ([true, false, true, true], 1));
}

#[test]
fn whoever_has_nothing_to_say_gives_a_sign_of_life_and_whoever_gives_none_is_dead_after_three_intervals() {
    let mut dialled = Dialled::welcomed(0);
    let mut streams = Streams::new(1, 10_000);
    let began = Instant::now().max(dialled.now);
    let mut receiving = open(&mut streams, 1);
    let mut beat = Vec::new();
    Control::Heartbeat.put(&framing(), &mut beat);
    for second in 1..=4 {
        let now = began + Duration::from_millis(1_001 * second);
        let (mut one, mut other) = (Vec::new(), Vec::new());
        dialled.sending.controls(&mut dialled.outbox, now, &mut one);
        streams.controls(&mut receiving, now, &mut other);
        assert_eq!((&one, &other), (&beat, &beat));
        let (mut one, mut other) = (Vec::new(), Vec::new());
        dialled.sending.controls(&mut dialled.outbox, now, &mut one);
        streams.controls(&mut receiving, now, &mut other);
        assert!(one.is_empty() && other.is_empty(), "one is enough");
        assert_eq!((dialled.sending.is_dead(now), receiving.is_dead(now)), (second >= 3, second >= 3));
        assert!(second >= 3 || (dialled.sending.wake_at() > Some(now) && receiving.wake_at() > now));
    }
    let now = began + Duration::from_secs(5);
    receiving.heard(1, now);
    dialled.sending.heard(now);
    assert!(!dialled.sending.is_dead(now) && !receiving.is_dead(now));
}

#[test]
fn acknowledgements_are_one_for_a_batch_and_ten_a_second_while_handlers_work() {
    let mut streams = Streams::new(1, 10_000);
    let began = Instant::now();
    let mut receiving = open(&mut streams, 1);
    let acks = |streams: &mut Streams<u64>, receiving: &mut Receiving, millis: u64| {
        let mut out = Vec::new();
        streams.controls(receiving, began + Duration::from_millis(millis), &mut out);
        out
    };
    let ack = |number: u64| {
        let mut out = Vec::new();
        Control::Ack(number).put(&framing(), &mut out);
        out
    };
    let Begun::Turn(mut turn) = streams.begin(&receiving) else { panic!("nobody else has it") };
    for _ in 0..10 {
        let number = receiving.number().unwrap();
        assert_eq!(turn.offer(number), Offer::Handle);
    }
    turn.finish(1);
    streams.end(turn);
    assert!(acks(&mut streams, &mut receiving, 50).is_empty(), "one of ten, while the others are at work");
    assert_eq!(receiving.wake_at().duration_since(began).as_millis() / 10, 10);
    assert_eq!(acks(&mut streams, &mut receiving, 150), ack(1));
    for number in 3..=10 {
        streams.report(receiving.key(), number, Outcome::Finished);
    }
    assert!(acks(&mut streams, &mut receiving, 400).is_empty(), "the second is not finished");
    streams.report(receiving.key(), 2, Outcome::Finished);
    assert_eq!(acks(&mut streams, &mut receiving, 401), ack(10));
}

#[test]
fn the_last_words_acknowledge_whatever_is_finished() {
    let mut streams = Streams::new(1, 10_000);
    let mut receiving = open(&mut streams, 1);
    let Begun::Turn(mut turn) = streams.begin(&receiving) else { panic!("nobody else has it") };
    for _ in 0..10 {
        let number = receiving.number().unwrap();
        assert_eq!(turn.offer(number), Offer::Handle);
    }
    turn.finish(1);
    streams.end(turn);
    let mut expected = Vec::new();
    Control::Ack(1).put(&framing(), &mut expected);
    receiving.part();
    let mut said = Vec::new();
    streams.controls(&mut receiving, Instant::now(), &mut said);
    assert_eq!(said, expected, "though the other nine are still at work");
}

#[test]
fn a_repeat_takes_no_room_once_the_sender_knows_that_it_is_finished() {
    let mut streams = Streams::new(1, 10_000);
    let older = open(&mut streams, 1);
    let Begun::Turn(mut turn) = streams.begin(&older) else { panic!("nobody else has it") };
    for number in 1..=4 {
        assert_eq!(turn.offer(number), Offer::Handle);
    }
    assert_eq!(turn.fail(1, "for the moment"), Verdict::TryAgain);
    turn.finish(2);
    turn.finish(4);
    streams.end(turn);
    // The first must come again, and so all of them do. The third is still in hand.
    let mut newer = open(&mut streams, 2);
    let read = |newer: &mut Receiving| {
        let number = newer.number().unwrap();
        newer.hold(number, b"message").unwrap();
        newer.held_bytes()
    };
    assert_eq!((read(&mut newer), read(&mut newer)), (10, 20));
    assert!(matches!(streams.begin(&newer), Begun::Wait));
    let (again, woken) = streams.report(older.key(), 3, Outcome::Refused(rejection()));
    assert_eq!((again, woken), (false, Some(2)));
    let mut out = Vec::new();
    streams.controls(&mut newer, Instant::now(), &mut out);
    assert_eq!(read(&mut newer), 20, "the third was rejected, and the sender knows");
    let Begun::Turn(mut turn) = streams.begin(&newer) else { panic!("nobody else has it") };
    assert_eq!(newer.take_held().map(|(number, _)| turn.offer(number)), Some(Offer::Handle));
    turn.finish(1);
    streams.end(turn);
    streams.controls(&mut newer, Instant::now(), &mut out);
    assert_eq!(newer.held_bytes(), 0, "all are acknowledged");
    assert_eq!(read(&mut newer), 0, "also one that was on its way");
    let mut expected = Vec::new();
    Control::Reject(3, rejection()).put(&framing(), &mut expected);
    Control::Ack(4).put(&framing(), &mut expected);
    assert_eq!(out, expected);
}

#[test]
fn a_repeat_that_is_held_when_its_message_is_rejected_makes_room() {
    let mut streams = Streams::new(1, 10_000);
    let older = open(&mut streams, 1);
    let Begun::Turn(mut turn) = streams.begin(&older) else { panic!("nobody else has it") };
    assert_eq!((turn.offer(1), turn.offer(2)), (Offer::Handle, Offer::Handle));
    assert_eq!(turn.fail(1, "for the moment"), Verdict::TryAgain);
    streams.end(turn);
    let mut newer = open(&mut streams, 2);
    for _ in 0..2 {
        let number = newer.number().unwrap();
        newer.hold(number, b"message").unwrap();
    }
    streams.report(older.key(), 2, Outcome::Refused(rejection()));
    streams.controls(&mut newer, Instant::now(), &mut Vec::new());
    assert_eq!(newer.held_bytes(), 10);
    assert_eq!(newer.take_held().map(|(number, _)| number), Some(1));
}

#[test]
fn no_more_messages_are_begun_than_may_be_rejected_without_a_confirmation() {
    let mut streams = Streams::new(1, 10_000);
    let mut receiving = open(&mut streams, 1);
    let Begun::Turn(mut turn) = streams.begin(&receiving) else { panic!("nobody else has it") };
    for number in 1..=MOST_REJECTS as u64 {
        assert_eq!(turn.offer(number), Offer::Handle);
        turn.reject(number, rejection());
    }
    assert_eq!(turn.offer(MOST_REJECTS as u64 + 1), Offer::Wait);
    streams.end(turn);
    assert!(matches!(streams.begin(&receiving), Begun::Wait));
    let mut out = Vec::new();
    streams.controls(&mut receiving, Instant::now(), &mut out);
    streams.control(&mut receiving, Control::ConfirmReject(5)).unwrap();
    let Begun::Turn(turn) = streams.begin(&receiving) else { panic!("there is room for one") };
    streams.end(turn);
}

fn frames(controls: &[Control], messages: &[&[u8]]) -> Vec<u8> {
    let mut bytes = Vec::new();
    controls.iter().for_each(|control| control.put(&framing(), &mut bytes));
    messages.iter().for_each(|message| framing().encode(message, &mut bytes).unwrap());
    bytes
}

#[test]
fn a_receiver_is_not_asked_to_forget_a_stream_before_the_disk_knows_that_all_is_done() {
    let mut dialled = Dialled::spooled(1, 2);
    dialled.hear(welcome(0, 0)).unwrap();
    dialled.feed(&[b"one"]);
    assert_eq!(dialled.write(), frames(&[], &[b"one"]));
    dialled.hear(Control::Ack(1)).unwrap();
    dialled.sending.leave();
    assert_eq!(dialled.write(), [], "a process that begins now would send it again");
    dialled.outbox.note_done(2);
    assert_eq!(dialled.write(), frames(&[Control::Goodbye], &[]));
}

#[test]
fn a_message_that_was_rejected_before_it_came_from_disk_has_failed_also_when_an_acknowledgement_stands_for_it() {
    let mut dialled = Dialled::spooled(1, 4);
    dialled.hear(Control::Reject(2, rejection())).unwrap();
    dialled.hear(welcome(3, 3)).unwrap();
    dialled.feed(&[b"one", b"two", b"six"]);
    let tally = dialled.outbox.tally();
    assert_eq!((tally.settled, tally.failed, tally.in_flight), (2, 1, 0));
    assert_eq!(dialled.outbox.done_below(), 2, "nobody has taken it");
    let failed = dialled.outbox.take_failed().expect("it was rejected");
    assert_eq!((failed.number, &failed.message[..], failed.rejection), (2, &b"two"[..], Some(rejection())));
    assert_eq!(dialled.outbox.done_below(), 4);
}

#[test]
fn a_process_that_begins_takes_nothing_as_acknowledged_that_it_has_not_heard() {
    // The fourth to the seventh are damaged on disk, and the handler of an older connection still has them.
    let mut dialled = Dialled::spooled(8, 9);
    assert!(matches!(dialled.hear(welcome(7, 3)), Ok(Heard::Welcomed { lost: None, .. })));
    dialled.feed(&[b"one"]);
    assert_eq!(dialled.write(), frames(&[], &[b"one"]));
    assert_eq!(dialled.hear(Control::Ack(5)), Ok(Heard::Nothing));
    assert_eq!(dialled.hear(Control::Ack(8)), Ok(Heard::Resolved));
}

#[test]
fn a_reject_is_confirmed_when_it_is_on_disk_and_only_to_a_receiver_that_still_knows_of_it() {
    let mut dialled = Dialled::spooled(1, 2);
    dialled.feed(&[b"one"]);
    dialled.hear(welcome(0, 0)).unwrap();
    assert_eq!(dialled.write(), frames(&[], &[b"one"]));
    assert_eq!(dialled.hear(Control::Reject(1, rejection())), Ok(Heard::Resolved));
    assert_eq!(dialled.write(), []);
    for knows in [true, false] {
        dialled.reconnect();
        if knows {
            assert_eq!(dialled.hear(Control::Reject(1, rejection())), Ok(Heard::Nothing));
        }
        dialled.hear(welcome(1, 1)).unwrap();
        assert_eq!(dialled.write(), [], "a process that begins now must hear of it again");
    }
    dialled.sending.stored(1, &mut dialled.outbox);
    assert_eq!(dialled.write(), [], "it would not know what is confirmed");
    dialled.reconnect();
    dialled.hear(Control::Reject(1, rejection())).unwrap();
    dialled.hear(welcome(1, 1)).unwrap();
    assert_eq!(dialled.write(), frames(&[Control::ConfirmReject(1)], &[]));
}

#[test]
fn a_receiver_is_not_told_to_pass_over_a_rejected_message_before_that_is_on_disk() {
    let mut dialled = Dialled::spooled(1, 4);
    dialled.feed(&[b"one", b"two", b"six"]);
    dialled.hear(welcome(0, 0)).unwrap();
    dialled.write();
    dialled.hear(Control::Reject(2, rejection())).unwrap();
    dialled.hear(Control::Ack(2)).unwrap();
    dialled.reconnect();
    assert_eq!(dialled.outbox.first_number(), 2, "this process may be the last to know that it was rejected");
    // The receiver was restarted, and knows nothing.
    assert!(matches!(dialled.hear(welcome_anew(1, 1)), Ok(Heard::Welcomed { lost: Some(_), .. })));
    assert_eq!(dialled.write(), []);
    dialled.sending.stored(2, &mut dialled.outbox);
    assert_eq!(dialled.write(), frames(&[Control::Skip(3)], &[b"six"]));
    dialled.hear(Control::Ack(3)).unwrap();
    let tally = dialled.outbox.tally();
    assert_eq!((tally.settled, tally.failed), (2, 1));
    dialled.reconnect();
    assert_eq!(dialled.outbox.first_number(), 4);
}
