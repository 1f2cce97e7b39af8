use std::future::Future;

use super::*;
use crate::proto::framing::Prefix;

fn push(outbox: &SharedOutbox, length: usize, lives: Option<Duration>) -> Result<u64, Refusing> {
    let message = vec![7; length];
    if let Some(number) =
        lives.is_none().then(|| outbox.accept_in_lane(length, |outbox| outbox.push_in_lane(&message))).flatten()
    {
        return Ok(number);
    }
    outbox.accept(length, lives, Claim::None, |outbox, expires| outbox.push(&message, expires, Instant::now))
}

#[test]
fn what_was_handed_to_a_socket_that_broke_can_expire_again() {
    let outbox = SharedOutbox::new(Framing::new(Prefix::U8), 1024, Overflow::Wait, None);
    assert!(push(&outbox, 10, Some(Duration::from_millis(1))).is_ok());
    assert!(outbox.hand(usize::MAX, &mut VecDeque::new()));
    assert_eq!(outbox.expire(), None, "it was handed out, so it does not expire");
    outbox.rewind();
    while outbox.expire().is_some() {
        std::thread::yield_now();
    }
    assert!(outbox.has_failed(), "none of it was written, and its time is over");
}

/// An Outbox whose lane was opened by a first message.
fn with_open_lane(limit: usize) -> Arc<SharedOutbox> {
    let outbox = SharedOutbox::new(Framing::default(), limit, Overflow::Wait, None);
    assert!(push(&outbox, 100, None).is_ok());
    assert!(lane(&outbox) > 0);
    outbox
}

fn lane(outbox: &SharedOutbox) -> usize {
    outbox.state.lock().expect("no thread panicked").lane
}

#[test]
fn whatever_else_takes_the_lock_closes_the_lane() {
    let context = &mut Context::from_waker(Waker::noop());
    type Other<'a> = &'a dyn Fn(&SharedOutbox);
    let others: [(&str, Other<'_>); 8] = [
        ("closing", &|outbox| outbox.close_by(Instant::now())),
        ("handing out", &|outbox| assert!(outbox.hand(usize::MAX, &mut VecDeque::new()))),
        ("a look at the phase", &|outbox| {
            assert_eq!(outbox.poll_phase(&mut Context::from_waker(Waker::noop())), Phase::Open);
        }),
        ("a promise of room", &|outbox| {
            assert!(pin!(outbox.reserve_largest()).poll(&mut Context::from_waker(Waker::noop())).is_ready());
        }),
        ("an expiring message", &|outbox| assert!(push(outbox, 1, Some(Duration::from_secs(9))).is_ok())),
        ("rewinding", &|outbox| outbox.rewind()),
        ("an attempt", &|outbox| outbox.note_attempt()),
        ("giving up", &|outbox| outbox.fail_all(FailedReason::Closed)),
    ];
    for (what, other) in others {
        let outbox = with_open_lane(1 << 20);
        other(&outbox);
        assert_eq!(lane(&outbox), 0, "{what}");
    }

    let outbox = with_open_lane(8_000);
    let largest = [7; 4_000];
    let push_largest = |outbox: &mut Outbox, expires| outbox.push(&largest, expires, Instant::now);
    assert!(push(&outbox, 4_000, None).is_ok());
    let mut head = pin!(outbox.accept_in_turn(4_000, None, push_largest));
    assert!(head.as_mut().poll(context).is_pending(), "it waits for room");
    assert_eq!(push(&outbox, 3_000, None), Err(Refusing::Full), "its room may not be taken");
    assert!(push(&outbox, 1, None).is_err() || lane(&outbox) == 0, "nobody passes by one who waits");
}

#[test]
fn the_lane_lets_nothing_in_that_would_be_refused() {
    let outbox = with_open_lane(1 << 20);
    assert_eq!(push(&outbox, 4_097, None), Err(Refusing::TooLarge));

    // Through the lane or not, what is in hand stays within the limit, and congestion begins at half of it.
    let outbox = with_open_lane(20_000);
    let mut accepted = 1;
    while push(&outbox, 100, None).is_ok() {
        accepted += 1;
        let bytes = accepted * 103;
        assert!(bytes <= 20_000);
        assert_eq!(outbox.is_congested(), bytes > 10_000, "with {bytes} bytes");
    }
    assert_eq!(accepted, 20_000 / 103);
}

#[test]
fn empty_messages_do_not_make_the_lane_endless() {
    let outbox = with_open_lane(1 << 20);
    let mut pushed = 0;
    let mut before = lane(&outbox);
    loop {
        assert!(push(&outbox, 0, None).is_ok());
        pushed += 1;
        if lane(&outbox) > before {
            break;
        }
        before = lane(&outbox);
    }
    assert!(pushed <= LANE / LANE_COST + 1, "{pushed} messages before anybody looked again");
}

#[test]
fn where_messages_expire_there_is_no_lane() {
    let outbox = SharedOutbox::new(Framing::default(), 1 << 20, Overflow::Wait, Some(Duration::from_secs(9)));
    assert!(push(&outbox, 100, None).is_ok());
    assert_eq!(lane(&outbox), 0);
}

#[test]
fn room_that_is_promised_to_one_does_not_hide_room_from_another() {
    let framing = Framing::with_max(Prefix::Buffstreams, 4096).expect("it fits");
    let outbox = SharedOutbox::new(framing, 8_000, Overflow::Wait, None);
    let context = &mut Context::from_waker(Waker::noop());
    assert!(pin!(outbox.reserve_largest()).poll(context).is_ready());
    assert!(push(&outbox, 3_000, None).is_ok());
    let mut waiter =
        pin!(outbox.accept_in_turn(3_000, None, |outbox, expires| { outbox.push(&[7; 3_000], expires, Instant::now) }));
    assert!(waiter.as_mut().poll(context).is_pending());
    let woken = Arc::new(Woken(AtomicBool::new(false)));
    let waker = Waker::from(Arc::clone(&woken));
    assert!(waiter.as_mut().poll(&mut Context::from_waker(&waker)).is_pending());

    let mut buffers = VecDeque::new();
    assert!(outbox.hand(usize::MAX, &mut buffers));
    buffers.clear();
    outbox.wrote(3_003, usize::MAX, &mut buffers);
    assert!(woken.0.load(Ordering::Relaxed), "there is room, and nobody says so");
    assert!(waiter.poll(context).is_ready());
}

#[test]
fn a_task_is_woken_for_a_message_only_while_it_sleeps() {
    let outbox = SharedOutbox::new(Framing::new(Prefix::U8), 1024, Overflow::Wait, None);
    let woken = Arc::new(Woken(AtomicBool::new(false)));
    let waker = Waker::from(Arc::clone(&woken));
    let mut buffers = VecDeque::new();
    outbox.poll_phase(&mut Context::from_waker(&waker));
    assert!(!outbox.hand(usize::MAX, &mut buffers), "there is nothing, so it sleeps");
    assert!(push(&outbox, 1, None).is_ok());
    assert!(woken.0.swap(false, Ordering::Relaxed));

    outbox.poll_phase(&mut Context::from_waker(&waker));
    assert!(push(&outbox, 1, None).is_ok());
    assert!(!woken.0.load(Ordering::Relaxed), "it is awake, and will look");
    assert!(outbox.hand(usize::MAX, &mut buffers));
}

#[test]
fn a_receipt_learns_of_an_overflow_that_made_no_room() {
    let outbox = SharedOutbox::new(Framing::new(Prefix::U8), 300, Overflow::FailOldest, None);
    while !outbox.has_failed() || push(&outbox, 100, None).is_ok() {
        assert!(push(&outbox, 100, None).is_ok() || outbox.has_failed());
    }
    let context = &mut Context::from_waker(Waker::noop());
    assert!(matches!(pin!(outbox.fate_of(0)).poll(context), std::task::Poll::Ready(Fate::Failed)));
}

struct Woken(AtomicBool);

impl std::task::Wake for Woken {
    fn wake(self: Arc<Self>) {
        self.0.store(true, Ordering::Relaxed);
    }
}
