use proptest::prelude::*;

use super::super::framing::{Prefix, PrefixFault};
use super::*;

/// The smallest scratch buffer that an Inbox can work with.
const SMALL_SCRATCH: usize = 2 * LARGE_FRAME;

/// A connection's receiving side: an Inbox, a scratch buffer, and everything that was lent so far.
struct Receiver {
    inbox: Inbox,
    scratch: Vec<u8>,
    lent: Vec<Vec<u8>>,
    ended: Option<FrameError>,
}

/// How a run pauses: after which messages, and how many it takes at a time.
#[derive(Clone, Debug)]
struct Pauses {
    after: Vec<bool>,
    most: Vec<usize>,
}

impl Pauses {
    fn none() -> Pauses {
        Pauses { after: vec![false], most: vec![usize::MAX] }
    }

    fn after(&self, message: usize) -> bool {
        self.after[message % self.after.len()]
    }

    fn most(&self, call: usize) -> usize {
        self.most[call % self.most.len()]
    }
}

impl Receiver {
    fn new(framing: Framing, scratch: usize) -> Receiver {
        Receiver { inbox: Inbox::new(framing), scratch: vec![0xaa; scratch], lent: Vec::new(), ended: None }
    }

    /// Puts bytes where they belong, at most `step` at a time, as a socket would; takes whole frames as they come.
    /// Ends early at a malformed prefix.
    fn receive(&mut self, mut bytes: &[u8], step: impl IntoIterator<Item = usize>, pauses: &Pauses) {
        let mut steps = step.into_iter();
        while !bytes.is_empty() && self.ended.is_none() {
            let step = steps.next().expect("endless").clamp(1, bytes.len());
            // What a previous connection left in the worker's buffer must not matter.
            self.scratch.fill(0xaa);
            let read = match self.inbox.room(&mut self.scratch) {
                Room::Scratch(room) => {
                    assert!(!room.is_empty(), "no room is an end of stream to whoever reads");
                    let read = step.min(room.len());
                    room[..read].copy_from_slice(&bytes[..read]);
                    read
                }
                Room::Own(mut room) => {
                    let read = step.min(room.chunk_mut().len());
                    assert_ne!(read, 0, "no room is an end of stream to whoever reads");
                    room.put_slice(&bytes[..read]);
                    read
                }
            };
            bytes = &bytes[read..];
            self.deliver(read, pauses);
        }
    }

    fn deliver(&mut self, mut read: usize, pauses: &Pauses) {
        for call in self.lent.len().. {
            let lent = &mut self.lent;
            let before = lent.len();
            let most = pauses.most(call);
            let delivered = self.inbox.deliver(&mut self.scratch, read, most, |message| {
                let kept = message.to_bytes();
                assert_eq!(kept, message.as_slice());
                assert_eq!(message.len(), message.as_ref().len());
                lent.push(kept.to_vec());
                if pauses.after(lent.len()) { Flow::Pause } else { Flow::Continue }
            });
            assert!(self.lent.len() - before <= most, "no more than asked for");
            match delivered {
                Ok(Delivered::All) => return,
                Ok(Delivered::Paused) => read = 0,
                Err(error) => {
                    self.ended = Some(error);
                    return;
                }
            }
        }
    }
}

fn encode(framing: Framing, messages: &[Vec<u8>]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for message in messages {
        framing.encode(message, &mut bytes).expect("within the maximum");
    }
    bytes
}

/// A message of this length whose bytes tell it from its neighbours.
fn message(length: usize, seed: usize) -> Vec<u8> {
    (0..length).map(|at| (at.wrapping_mul(31) ^ (at >> 8) ^ seed.wrapping_mul(97)) as u8).collect()
}

/// All sizes that matter: empty, tiny, around the width of a prefix, around a large frame, over any scratch buffer.
fn size() -> impl Strategy<Value = usize> {
    prop_oneof![
        3 => Just(0),
        8 => 1..=300_usize,
        4 => 1_000..=5_000_usize,
        3 => LARGE_FRAME - 12..=LARGE_FRAME + 12,
        2 => SMALL_SCRATCH - 12..=SMALL_SCRATCH + 12,
        1 => 70_000..=300_000_usize,
    ]
}

fn framing() -> impl Strategy<Value = Framing> {
    let widths = prop::sample::select(vec![300_000, 65_535 * 5, 1 << 24, 1 << 40]);
    (prop::sample::select(Prefix::ALL.to_vec()), widths).prop_map(|(prefix, max): (Prefix, usize)| {
        Framing::with_max(prefix, max.min(prefix.largest_max())).expect("within what the prefix can express")
    })
}

fn pauses() -> impl Strategy<Value = Pauses> {
    let after = prop::collection::vec(prop::bool::weighted(0.2), 1..8);
    let most = prop::collection::vec(prop_oneof![1..4_usize, Just(usize::MAX)], 1..5);
    prop_oneof![Just(Pauses::none()), (after, most).prop_map(|(after, most)| Pauses { after, most })]
}

/// Lengths of reads: from single bytes to more than any buffer.
fn steps() -> impl Strategy<Value = Vec<usize>> {
    prop_oneof![
        2 => prop::collection::vec(1..=20_usize, 1..20),
        3 => prop::collection::vec(1..=40_000_usize, 1..20),
        1 => Just(vec![usize::MAX]),
    ]
}

/// How many cases a property test tries; more with `PROPTEST_CASES`.
fn config(cases: u32) -> ProptestConfig {
    let cases = std::env::var("PROPTEST_CASES").ok().and_then(|cases| cases.parse().ok()).unwrap_or(cases);
    ProptestConfig { cases, failure_persistence: None, ..ProptestConfig::default() }
}

proptest! {
    #![proptest_config(config(300))]

    #[test]
    fn what_was_sent_is_lent_in_order_without_gap_whatever_the_reads_and_pauses(
        framing in framing(),
        sizes in prop::collection::vec(size(), 0..12),
        steps in steps(),
        pauses in pauses(),
        scratch in prop::sample::select(vec![SMALL_SCRATCH, SMALL_SCRATCH + 1, 256 * 1024]),
    ) {
        let messages: Vec<_> = sizes.into_iter().map(|size| size.min(framing.max_message_size())).enumerate()
            .map(|(seed, size)| message(size, seed)).collect();
        let bytes = encode(framing, &messages);
        let mut receiver = Receiver::new(framing, scratch);
        receiver.receive(&bytes, steps.into_iter().cycle(), &pauses);
        prop_assert_eq!(receiver.ended, None);
        prop_assert_eq!(receiver.inbox.held(), 0);
        prop_assert!(receiver.inbox.end().is_ok());
        // Not `assert_eq`: a difference would print megabytes.
        prop_assert_eq!(receiver.lent.len(), messages.len());
        prop_assert!(receiver.lent == messages, "a message came otherwise than it was sent");
    }

    #[test]
    fn before_a_malformed_prefix_everything_is_lent_and_behind_it_nothing(
        framing in framing(),
        sizes in prop::collection::vec(0..20_000_usize, 0..6),
        steps in steps(),
        pauses in pauses(),
        junk in prop::collection::vec(any::<u8>(), 0..40),
    ) {
        let messages: Vec<_> = sizes.into_iter().map(|size| size.min(framing.max_message_size())).enumerate()
            .map(|(seed, size)| message(size, seed)).collect();
        let mut bytes = encode(framing, &messages);
        bytes.extend(junk);
        let (expected, remains) = naive(framing, &bytes);
        let mut receiver = Receiver::new(framing, SMALL_SCRATCH);
        receiver.receive(&bytes, steps.into_iter().cycle(), &pauses);
        prop_assert!(receiver.lent == expected, "other messages than the reference finds");
        match remains {
            Remains::Malformed(error) => prop_assert_eq!(receiver.ended, Some(error)),
            Remains::Torn(torn) => {
                prop_assert_eq!(&receiver.ended, &None);
                prop_assert_eq!(receiver.inbox.held(), torn.len());
                prop_assert_eq!(receiver.inbox.end().is_ok(), torn.is_empty());
            }
        }
    }
}

/// What is left behind the last whole frame.
enum Remains {
    Torn(Vec<u8>),
    Malformed(FrameError),
}

/// The reference: all bytes at once, one frame after the other.
fn naive(framing: Framing, mut bytes: &[u8]) -> (Vec<Vec<u8>>, Remains) {
    let mut messages = Vec::new();
    loop {
        match framing.decode(bytes) {
            Ok(Some((message, frame))) => {
                messages.push(message.to_vec());
                bytes = &bytes[frame..];
            }
            Ok(None) => return (messages, Remains::Torn(bytes.to_vec())),
            Err(error) => return (messages, Remains::Malformed(error)),
        }
    }
}

#[test]
fn every_split_of_the_same_bytes_in_two_and_in_three_gives_the_same_messages() {
    for prefix in Prefix::ALL {
        let framing = Framing::new(prefix);
        let messages: Vec<_> = [0, 1, 5, 0, 130, 0, 2].into_iter().enumerate().map(|(s, n)| message(n, s)).collect();
        let bytes = encode(framing, &messages);
        for first in 1..bytes.len() {
            for second in [1, 2, 7, bytes.len()] {
                let mut receiver = Receiver::new(framing, SMALL_SCRATCH);
                receiver.receive(&bytes, [first, second, usize::MAX], &Pauses::none());
                assert!(receiver.lent == messages && receiver.inbox.held() == 0, "{prefix}: {first}, {second}");
            }
        }
    }
}

#[test]
fn one_byte_a_read_gives_the_same_messages_also_for_large_ones() {
    for prefix in [Prefix::Buffstreams, Prefix::Varint, Prefix::U32Be] {
        let framing = Framing::with_max(prefix, 1 << 20).unwrap();
        let sizes = [3, LARGE_FRAME - 4, LARGE_FRAME, 0, 40_000];
        let messages: Vec<_> = sizes.into_iter().enumerate().map(|(s, n)| message(n, s)).collect();
        let bytes = encode(framing, &messages);
        let mut inbox = Inbox::new(framing);
        let mut scratch = vec![0; SMALL_SCRATCH];
        let mut lent = Vec::new();
        for byte in bytes {
            match inbox.room(&mut scratch) {
                Room::Scratch(room) => room[0] = byte,
                Room::Own(mut room) => room.put_u8(byte),
            }
            inbox
                .deliver(&mut scratch, 1, usize::MAX, |message| {
                    lent.push(message.to_vec());
                    Flow::Continue
                })
                .unwrap();
        }
        assert!(lent == messages, "{prefix}");
    }
}

#[test]
fn a_stream_that_ends_inside_a_frame_tells_how_far_it_came() {
    let framing = Framing::with_max(Prefix::Buffstreams, 1 << 20).unwrap();
    for (want, got) in [(10, 3), (10, 0), (20_000, 19_999), (700_000, 0), (700_000, 300_000)] {
        let bytes = encode(framing, &[b"before".to_vec(), message(want, 1)]);
        let cut = bytes.len() - want + got;
        let mut receiver = Receiver::new(framing, SMALL_SCRATCH);
        receiver.receive(&bytes[..cut], [usize::MAX].into_iter().cycle(), &Pauses::none());
        assert_eq!(receiver.lent, [b"before"]);
        assert_eq!(receiver.inbox.end(), Err(FrameError::Truncated { got, want }));
    }
    let mut receiver = Receiver::new(framing, SMALL_SCRATCH);
    receiver.receive(&[0x14, 0], [1].into_iter().cycle(), &Pauses::none());
    assert_eq!(receiver.inbox.end(), Err(FrameError::TruncatedPrefix { got: 2 }));
}

#[test]
fn after_a_malformed_prefix_all_earlier_messages_were_lent_in_whatever_reads_it_came() {
    let framing = Framing::default();
    let messages: Vec<_> = (0..5).map(|seed| message(seed * 100, seed)).collect();
    let mut bytes = encode(framing, &messages);
    bytes.extend(b"\x06\xff\xffabc");
    for step in [1, 2, 3, 100, usize::MAX] {
        let mut receiver = Receiver::new(framing, SMALL_SCRATCH);
        receiver.receive(&bytes, [step].into_iter().cycle(), &Pauses::none());
        assert_eq!(receiver.lent, messages);
        let ended = receiver.ended.expect("the prefix is malformed");
        assert!(matches!(ended, FrameError::MalformedPrefix { fault: PrefixFault::Padding, .. }), "{ended:?}");
    }
}

#[test]
fn memory_grows_with_the_bytes_received_and_not_with_the_length_declared() {
    let framing = Framing::with_max(Prefix::U32Be, 16 << 20).unwrap();
    let mut scratch = vec![0; 256 * 1024];
    let mut receive = |inbox: &mut Inbox, mut bytes: usize, value: u8| {
        while bytes > 0 {
            let read = match inbox.room(&mut scratch) {
                Room::Scratch(room) => {
                    let read = bytes.min(room.len());
                    room[..read].fill(value);
                    read
                }
                Room::Own(mut room) => {
                    let read = bytes.min(room.chunk_mut().len());
                    room.put_bytes(value, read);
                    read
                }
            };
            inbox.deliver(&mut scratch, read, usize::MAX, |_| Flow::Continue).unwrap();
            bytes -= read;
        }
    };
    let mut inboxes: Vec<_> = (0..1_000).map(|_| Inbox::new(framing)).collect();
    for inbox in &mut inboxes {
        // 16 MiB, declared in four bytes.
        for byte in [1, 0, 0, 0] {
            receive(inbox, 1, byte);
        }
    }
    for inbox in &mut inboxes {
        receive(inbox, 1, 7);
        // What a reader does next, whatever comes of it.
        inbox.room(&mut vec![0; 256 * 1024]);
    }
    let begun: usize = inboxes.iter().map(Inbox::memory).sum();
    assert!(begun <= 1_000 * 64, "{begun} bytes for a prefix of four and a first byte each");

    let inbox = &mut inboxes[0];
    let mut received = 5;
    for step in [100, 100_000, 1_000_000, 4_000_000] {
        receive(inbox, step, 7);
        received += step;
        assert!(inbox.memory() <= 2 * received + 128 * 1024, "{} bytes after {received}", inbox.memory());
    }
}

#[test]
fn a_message_that_is_kept_equals_what_was_lent_and_a_large_one_is_not_copied() {
    let framing = Framing::with_max(Prefix::Buffstreams, 1 << 20).unwrap();
    let bytes = encode(framing, &[b"small".to_vec(), message(500_000, 1), b"next".to_vec()]);
    let mut inbox = Inbox::new(framing);
    let mut scratch = vec![0; SMALL_SCRATCH];
    let (mut at, mut kept, mut shared) = (0, Vec::new(), Vec::new());
    while at < bytes.len() {
        let read = match inbox.room(&mut scratch) {
            Room::Scratch(room) => {
                let read = room.len().min(bytes.len() - at);
                room[..read].copy_from_slice(&bytes[at..at + read]);
                read
            }
            Room::Own(mut room) => {
                let read = room.chunk_mut().len().min(bytes.len() - at);
                room.put_slice(&bytes[at..at + read]);
                read
            }
        };
        at += read;
        inbox
            .deliver(&mut scratch, read, usize::MAX, |message| {
                let (one, two) = (message.to_bytes(), message.to_bytes());
                assert_eq!(one.as_ptr(), two.as_ptr(), "all keepers of one read share one copy");
                shared.push(one.as_ptr() == message.as_ptr());
                kept.push(one);
                Flow::Continue
            })
            .unwrap();
    }
    assert_eq!(shared, [false, true, false], "only the large one is handed over where it lies");
    assert_eq!(kept[0], "small");
    assert!(kept[1] == message(500_000, 1));
    assert_eq!(kept[2], "next");
    assert_eq!(inbox.held(), 0);
}

#[test]
fn the_buffer_of_a_large_message_is_used_again_and_given_back_on_release() {
    let framing = Framing::with_max(Prefix::U32Le, 1 << 20).unwrap();
    let mut receiver = Receiver::new(framing, SMALL_SCRATCH);
    let bytes = encode(framing, &[message(600_000, 1)]);
    let mut scratch = vec![0; SMALL_SCRATCH];
    let mut buffers = Vec::new();
    for _ in 0..3 {
        let mut at = 0;
        while at < bytes.len() {
            let read = match receiver.inbox.room(&mut scratch) {
                Room::Scratch(room) => {
                    let read = room.len().min(bytes.len() - at);
                    room[..read].copy_from_slice(&bytes[at..at + read]);
                    read
                }
                Room::Own(mut room) => {
                    let read = room.chunk_mut().len().min(bytes.len() - at);
                    room.put_slice(&bytes[at..at + read]);
                    read
                }
            };
            at += read;
            receiver
                .inbox
                .deliver(&mut scratch, read, usize::MAX, |message| {
                    buffers.push(message.as_ptr());
                    Flow::Continue
                })
                .unwrap();
        }
    }
    assert_eq!(buffers[1], buffers[2]);
    assert!(receiver.inbox.memory() >= 600_000);
    receiver.inbox.release();
    assert_eq!(receiver.inbox.memory(), 0);
}

#[test]
fn a_release_takes_nothing_from_an_unfinished_frame() {
    let framing = Framing::default();
    let bytes = encode(framing, &[message(1_000, 3)]);
    let mut receiver = Receiver::new(framing, SMALL_SCRATCH);
    receiver.receive(&bytes[..400], [usize::MAX], &Pauses::none());
    receiver.inbox.release();
    assert_eq!(receiver.inbox.held(), 400);
    receiver.receive(&bytes[400..], [usize::MAX], &Pauses::none());
    assert_eq!(receiver.lent, [message(1_000, 3)]);
}

#[test]
fn memory_left_over_from_a_pause_is_counted_while_it_is_held_and_can_be_released() {
    let framing = Framing::default();
    let messages: Vec<_> = (0..100).map(|seed| message(2_000, seed)).collect();
    let bytes = encode(framing, &messages);
    let mut inbox = Inbox::new(framing);
    let mut scratch = vec![0; 256 * 1024];
    let Room::Scratch(room) = inbox.room(&mut scratch) else { panic!("nothing large is at hand") };
    room[..bytes.len()].copy_from_slice(&bytes);
    let mut read = bytes.len();
    let mut lent = Vec::new();
    loop {
        let delivered = inbox.deliver(&mut scratch, read, 1, |message| {
            lent.push(message.to_vec());
            Flow::Continue
        });
        read = 0;
        assert!(inbox.memory() >= inbox.held());
        if delivered == Ok(Delivered::All) {
            break;
        }
        assert!(
            inbox.held() == 0 || inbox.memory() >= bytes.len() - 2_003,
            "the buffer that holds {} bytes is as large as it was, not {}",
            inbox.held(),
            inbox.memory()
        );
    }
    assert!(lent == messages);
    assert_ne!(inbox.memory(), 0, "what is still allocated is still counted");
    inbox.release();
    assert_eq!(inbox.memory(), 0);
}

#[test]
fn a_message_hides_its_bytes_from_logs() {
    let mut receiver = Receiver::new(Framing::default(), SMALL_SCRATCH);
    let mut text = String::new();
    receiver.scratch[..9].copy_from_slice(b"\x0c\0\0secret");
    receiver
        .inbox
        .deliver(&mut receiver.scratch, 9, 1, |message| {
            text = format!("{message:?}");
            Flow::Continue
        })
        .unwrap();
    assert_eq!(text, "Message(6 bytes)");
}
