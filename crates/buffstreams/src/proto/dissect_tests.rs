use proptest::prelude::*;
use std::time::Duration;

use super::super::framing::Prefix;
use super::super::outbox::Rejection;
use super::super::session::wire::{Hello, Refuse, StateId, StreamId, Welcome};
use super::*;
use Direction::{Back, There};

fn hello(maximum: u64) -> Control {
    Control::Hello(Hello {
        versions: (1, 1),
        stream: StreamId([7; 16]),
        epoch: 1,
        first: 1,
        maximum,
        window: 1 << 20,
        reply_window: 1 << 20,
        heartbeat: Duration::from_secs(5),
        token: b"who".to_vec(),
    })
}

fn welcome(dispatched: u64) -> Control {
    let heartbeat = Duration::from_secs(5);
    Control::Welcome(Welcome {
        version: 1,
        state: StateId([9; 16]),
        dispatched,
        committed: 2,
        window: 1 << 20,
        heartbeat,
    })
}

/// A connection as its peers write it, piece by piece.
#[derive(Default)]
struct Talk(Vec<(Direction, Vec<u8>)>);

impl Talk {
    fn control(mut self, direction: Direction, framing: &Framing, control: &Control) -> Talk {
        let mut bytes = Vec::new();
        control.put(framing, &mut bytes);
        self.0.push((direction, bytes));
        self
    }

    fn message(mut self, direction: Direction, framing: &Framing, message: &[u8]) -> Talk {
        let mut bytes = Vec::new();
        framing.encode(message, &mut bytes).unwrap();
        self.0.push((direction, bytes));
        self
    }

    fn raw(mut self, direction: Direction, bytes: &[u8]) -> Talk {
        self.0.push((direction, bytes.to_vec()));
        self
    }

    /// What is found in it, a line each, when it is given in pieces of at most so many bytes.
    fn read(&self, dissector: &mut Dissector, step: usize) -> Vec<String> {
        let mut lines = Vec::new();
        for (direction, bytes) in &self.0 {
            for piece in bytes.chunks(step) {
                let fed = dissector.feed(*direction, piece, |found| lines.push(line(*direction, found)));
                lines.extend(fed.err().map(|error| format!("{direction:?} {error}")));
            }
        }
        for direction in [There, Back] {
            lines.extend(dissector.end(direction).err().map(|error| format!("{direction:?} {error}")));
        }
        lines
    }
}

fn line(direction: Direction, found: Dissected<'_>) -> String {
    let number = |number: Option<u64>| number.map(|number| format!("{number} ")).unwrap_or_default();
    let said = match found {
        Dissected::Preface => "preface".to_owned(),
        Dissected::Message { bytes, number: n } => format!("{}{}", number(n), bytes.escape_ascii()),
        Dissected::LongMessage { length, number: n } => format!("{}{length} bytes", number(n)),
        Dissected::Control(frame) => format!("* {frame}"),
    };
    format!("{direction:?} {said}")
}

fn preface() -> Vec<u8> {
    let mut preface = Vec::new();
    Preface::put(&mut preface);
    preface
}

fn session() -> Talk {
    let (first, then) = (handshake_framing(), Framing::for_session(100_000).unwrap());
    let reject = Control::Reject(3, Rejection { code: 4, text: "no\n".into() });
    Talk::default()
        .raw(There, &preface())
        .control(There, &first, &hello(100_000))
        .control(Back, &first, &reject)
        .control(Back, &first, &welcome(5))
        .message(There, &then, b"six")
        .control(There, &then, &Control::ConfirmReject(3))
        .control(There, &then, &Control::Skip(9))
        .message(There, &then, b"nine")
        .message(There, &then, b"")
        .message(Back, &then, b"reply")
        .control(Back, &then, &Control::Ack(10))
        .control(There, &then, &Control::Heartbeat)
        .control(There, &then, &Control::Ignorable(200))
        .control(There, &then, &Control::Goodbye)
        .control(Back, &then, &Control::ConfirmGoodbye)
}

#[test]
fn a_session_is_read_along_with_the_numbers_of_its_messages_however_it_is_split() {
    let expected = [
        "There preface",
        "There * HELLO stream 07070707070707070707070707070707, epoch 1, first 1, maximum 100000, window 1048576, reply \
         window 1048576, heartbeat 5s, token of 3 bytes, versions 1 to 1",
        "Back * REJECT 3, code 4: no\\n",
        "Back * WELCOME dispatched 5, committed 2, window 1048576, heartbeat 5s, state \
         09090909090909090909090909090909, version 1",
        "There 6 six",
        "There * REJECT-CONFIRM 3",
        "There * SKIP 9",
        "There 9 nine",
        "There 10 ",
        "Back 1 reply",
        "Back * ACK 10",
        "There * HEARTBEAT",
        "There * an unknown frame of kind 200",
        "There * GOODBYE",
        "Back * GOODBYE-CONFIRM",
    ];
    for step in (1..100).chain([10_000]) {
        assert_eq!(session().read(&mut Dissector::new(Framing::default(), 4096), step), expected, "by {step}");
    }
}

#[test]
fn both_directions_of_a_plain_connection_are_read_along_whoever_speaks_first() {
    for prefix in Prefix::ALL {
        let framing = Framing::new(prefix);
        // In u8 and u16 the second message looks like the beginning of a preface.
        let talk = Talk::default()
            .message(Back, &framing, b"banner")
            .message(There, &framing, b"")
            .message(There, &framing, &[0xff; 200])
            .message(Back, &framing, b"reply");
        for step in [1, 2, 3, 7, 1000] {
            let found = talk.read(&mut Dissector::new(framing, 4096), step);
            let long = format!("There {}", "\\xff".repeat(200));
            assert_eq!(found, ["Back banner", "There ", &long, "Back reply"], "{prefix} by {step}");
        }
    }
}

#[test]
fn a_message_that_begins_like_a_preface_is_one() {
    let framing = Framing::new(Prefix::U8);
    let talk = Talk::default().message(There, &framing, &[0xff; 255]).message(There, &framing, b"x");
    for step in [1, 10, 11, 300] {
        assert_eq!(talk.read(&mut Dissector::new(framing, 4096), step).len(), 2);
    }
}

#[test]
fn a_message_that_is_too_long_to_keep_is_told_and_passed_over() {
    let framing = Framing::with_max(Prefix::U32Be, 1 << 30).unwrap();
    let long = vec![1; 100_000];
    let talk =
        Talk::default().message(There, &framing, b"a").message(There, &framing, &long).message(There, &framing, b"b");
    for step in [1, 1000, 200_000] {
        let mut dissector = Dissector::new(framing, 1000);
        assert_eq!(talk.read(&mut dissector, step), ["There a", "There 100000 bytes", "There b"]);
    }
    let cut = Talk(vec![(There, talk.0[1].1[..50_004].to_vec())]);
    let lines = cut.read(&mut Dissector::new(framing, 1000), 700);
    assert_eq!(lines[1], "There behind byte 50004: the stream ended 50000 bytes into a message of 100000");
}

#[test]
fn what_is_not_understood_is_told_once_and_the_other_direction_goes_on() {
    let (first, then) = (handshake_framing(), Framing::for_session(100).unwrap());
    let asked = || Talk::default().raw(There, &preface());
    let cases = [
        (Talk::default().raw(There, b"\x02\0\0a\x01\0\0rest"), "behind byte 4: a message of -1 bytes was declared"),
        (Talk::default().raw(There, b"\x06\xff\xff"), "behind byte 0: malformed prefix 06 ff ff"),
        (asked().control(There, &first, &Control::Heartbeat), "behind byte 16: HEARTBEAT has no place before HELLO"),
        (asked().message(There, &first, b"x"), "behind byte 16: a message has no place before HELLO"),
        (Talk::default().raw(There, b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xffBUFFS\x02"), "of version 2 is asked for"),
        (asked().control(Back, &first, &welcome(5)), "Back behind byte 0: WELCOME has no place before WELCOME"),
        (session().control(There, &Framing::for_session(100_000).unwrap(), &hello(1)), "HELLO has no place there"),
        (
            asked().control(There, &first, &hello(100)).raw(There, b"\x01\0\0\x0b"),
            "a control frame of kind 11; known are 1 to 10",
        ),
    ];
    for (talk, expected) in cases {
        for step in [1, 5, 1000] {
            let lines = talk.read(&mut Dissector::new(Framing::default(), 4096), step);
            let errors: Vec<_> = lines.iter().filter(|line| line.contains("behind byte")).collect();
            assert!(matches!(errors[..], [error] if error.contains(expected)), "{expected}: {lines:?}");
        }
    }
    let talk = Talk::default().raw(There, b"\x01\0\0").message(Back, &then, b"still here");
    assert_eq!(talk.read(&mut Dissector::new(Framing::default(), 4096), 2).last().unwrap(), "Back still here");
}

#[test]
fn refusals_are_named() {
    for (code, name) in [(1, "VERSION"), (2, "NO-SESSIONS"), (0x8002, "BUSY"), (0x1234, "1234")] {
        let refuse = Control::Refuse(Refuse { code: RefuseCode(code), detail: 8, text: "why".into() });
        assert_eq!(ControlFrame(refuse).to_string(), format!("REFUSE {name}, detail 8: why"));
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn whatever_bytes_come_a_split_changes_nothing(
        bytes in prop::collection::vec(prop_oneof![3 => 0u8..8, 1 => any::<u8>(), 1 => Just(0xff)], 0..300),
    ) {
        super::super::checks::dissect(&bytes);
    }

    #[test]
    fn whatever_is_flipped_in_a_session_a_split_changes_nothing(
        at in 0usize..400, with in 1u8.., step in 1usize..64, longest in 0usize..32,
    ) {
        let mut talk = session();
        let total: usize = talk.0.iter().map(|(_, bytes)| bytes.len()).sum();
        let byte = talk.0.iter_mut().flat_map(|(_, bytes)| bytes).nth(at % total).unwrap();
        *byte ^= with;
        let whole = talk.read(&mut Dissector::new(Framing::default(), longest), usize::MAX);
        prop_assert_eq!(talk.read(&mut Dissector::new(Framing::default(), longest), step), whole);
    }
}
