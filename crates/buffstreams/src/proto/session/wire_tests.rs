use proptest::prelude::*;

use super::*;
use crate::proto::inbox::{Delivered, Flow, Found, Inbox, Room};

const PROTOCOL: &str = include_str!("../../../../../PROTOCOL.md");

fn config(cases: u32) -> ProptestConfig {
    let cases = std::env::var("PROPTEST_CASES").ok().and_then(|cases| cases.parse().ok()).unwrap_or(cases);
    ProptestConfig { cases, failure_persistence: None, ..ProptestConfig::default() }
}

fn hello() -> Hello {
    Hello {
        versions: (1, 1),
        stream: StreamId(*b"\x00\x11\x22\x33\x44\x55\x66\x77\x88\x99\xaa\xbb\xcc\xdd\xee\xff"),
        epoch: 3,
        first: 42,
        maximum: 4096,
        window: 4 << 20,
        reply_window: 65_536,
        heartbeat: Duration::from_secs(5),
        token: b"let me in".to_vec(),
    }
}

/// Every example of PROTOCOL.md, by its title there.
fn examples() -> Vec<(&'static str, Control)> {
    let welcome = Welcome {
        version: 1,
        state: StateId(*b"\x0f\x1e\x2d\x3c\x4b\x5a\x69\x78\x00\x00\x00\x00\x00\x00\x00\x07"),
        dispatched: 45,
        committed: 43,
        window: 1 << 20,
        heartbeat: Duration::from_secs(5),
    };
    let refuse = Refuse { code: RefuseCode::MAXIMUM, detail: 1024, text: "too large".to_owned() };
    let rejection = Rejection { code: 7, text: "no such account".to_owned() };
    vec![
        ("HELLO", Control::Hello(hello())),
        ("WELCOME", Control::Welcome(welcome)),
        ("REFUSE", Control::Refuse(refuse)),
        ("ACK", Control::Ack(515)),
        ("REJECT", Control::Reject(44, rejection)),
        ("REJECT-CONFIRM", Control::ConfirmReject(44)),
        ("HEARTBEAT", Control::Heartbeat),
        ("GOODBYE", Control::Goodbye),
        ("GOODBYE-CONFIRM", Control::ConfirmGoodbye),
        ("SKIP", Control::Skip(45)),
    ]
}

/// The bytes of the document's example with this title: the two-digit words at the start of each line of the code block
/// that begins with it.
fn documented(title: &str) -> Vec<u8> {
    let start = format!("```text\n{title}\n");
    let at = PROTOCOL.find(&start).unwrap_or_else(|| panic!("PROTOCOL.md has an example of {title}"));
    let block = &PROTOCOL[at + start.len()..];
    let block = &block[..block.find("```").expect("a block ends")];
    let hex = |word: &&str| word.len() == 2 && word.bytes().all(|byte| byte.is_ascii_hexdigit());
    let words = block.lines().flat_map(|line| line.split_whitespace().take_while(hex));
    words.map(|word| u8::from_str_radix(word, 16).expect("hex digits")).collect()
}

fn encoded(control: &Control, framing: &Framing) -> Vec<u8> {
    let mut out = Vec::new();
    control.put(framing, &mut out);
    out
}

/// A control frame without its prefix.
fn body(control: &Control) -> Vec<u8> {
    encoded(control, &handshake_framing()).split_off(3)
}

#[test]
fn the_bytes_in_the_document_are_those_that_are_written() {
    for (title, control) in examples() {
        let bytes = encoded(&control, &handshake_framing());
        assert_eq!(documented(title), bytes, "{title}");
        assert_eq!(Control::decode(&bytes[3..]), Ok(control));
    }
    let mut preface = Vec::new();
    Preface::put(&mut preface);
    assert_eq!(documented("the preface"), preface);
    assert_eq!(preface.len(), PREFACE);
    let wide = Framing::for_session(65_536).unwrap();
    assert_eq!(documented("HEARTBEAT, maximum 65536"), encoded(&Control::Heartbeat, &wide));
    let mut message = Vec::new();
    Framing::for_session(100).unwrap().encode(b"A", &mut message).unwrap();
    assert_eq!(documented("a message of one byte, maximum 100"), message);
    let blocks = PROTOCOL.matches("```text\n").count();
    assert_eq!(blocks, examples().len() + 3, "every example is checked");
}

#[test]
fn the_numbers_in_the_document_are_those_of_the_code() {
    for code in ["VERSION", "NO-SESSIONS", "MAXIMUM", "UNAUTHORIZED", "PROTOCOL", "EPOCH", "BUSY", "DRAINING"] {
        let known = match code {
            "VERSION" => RefuseCode::VERSION,
            "NO-SESSIONS" => RefuseCode::NO_SESSIONS,
            "MAXIMUM" => RefuseCode::MAXIMUM,
            "UNAUTHORIZED" => RefuseCode::UNAUTHORIZED,
            "PROTOCOL" => RefuseCode::PROTOCOL,
            "EPOCH" => RefuseCode::EPOCH,
            "BUSY" => RefuseCode::BUSY,
            _ => RefuseCode::DRAINING,
        };
        assert!(PROTOCOL.contains(&format!("| `{:04x}` | {code}", known.0)), "{code} is {known:?}");
        assert_eq!(known.is_temporary(), matches!(code, "EPOCH" | "BUSY" | "DRAINING"));
    }
    for text in [format!("at most {LONGEST_TOKEN} bytes"), format!("at most {LONGEST_TEXT} bytes of text")] {
        assert!(PROTOCOL.contains(&text), "{text}");
    }
}

#[test]
fn a_preface_is_told_from_plain_frames_at_the_first_byte_that_differs() {
    let mut preface = Vec::new();
    Preface::put(&mut preface);
    for length in 0..preface.len() {
        assert_eq!(Preface::of(&preface[..length]), Preface::Incomplete);
    }
    assert_eq!(Preface::of(&preface), Preface::Session { version: VERSION });
    preface.push(7);
    assert_eq!(Preface::of(&preface), Preface::Session { version: VERSION });
    for at in 0..OPENING.len() {
        for byte in 0..=255 {
            let mut other = preface.clone();
            other[at] = byte;
            let expected = if byte == preface[at] { Preface::Session { version: VERSION } } else { Preface::Plain };
            assert_eq!(Preface::of(&other), expected);
            let cut = if byte == preface[at] { Preface::Incomplete } else { Preface::Plain };
            assert_eq!(Preface::of(&other[..=at]), cut);
        }
    }
}

#[test]
fn no_framing_that_takes_sessions_has_a_frame_that_looks_like_a_preface() {
    for prefix in Prefix::ALL {
        for max in [100, 4096, 65_536, u32::MAX as usize, (1 << 55) - 1] {
            let Ok(framing) = Framing::with_max(prefix, max) else { continue };
            let narrow = matches!(prefix, Prefix::U8 | Prefix::U16Be | Prefix::U16Le);
            let full = matches!(prefix, Prefix::U32Be | Prefix::U32Le) && max == u32::MAX as usize;
            assert_eq!(takes_sessions(&framing), !narrow && !full, "{prefix} {max}");
        }
    }
}

#[test]
fn every_change_of_one_byte_is_an_error_or_says_something_else() {
    for (title, control) in examples() {
        let body = body(&control);
        for at in 0..body.len() {
            for byte in (0..=255).filter(|byte| *byte != body[at]) {
                let mut other = body.clone();
                other[at] = byte;
                match Control::decode(&other) {
                    Err(_) => {}
                    Ok(Control::Ignorable(_)) => assert!(at == 0 && byte >= 0x80),
                    Ok(decoded) => {
                        assert_ne!(decoded, control, "{title}: byte {at} as {byte} changes nothing");
                        assert_eq!(self::body(&decoded), other, "{title}: two ways to write one thing");
                    }
                }
            }
        }
    }
}

#[test]
fn every_frame_that_is_cut_short_or_goes_on_is_an_error_that_names_it() {
    assert_eq!(Control::decode(&[]), Err(WireError::Empty));
    for (title, control) in examples() {
        let body = body(&control);
        let text = match &control {
            Control::Refuse(refuse) => refuse.text.len(),
            Control::Reject(_, rejection) => rejection.text.len(),
            _ => 0,
        };
        for length in 1..body.len() - text {
            let error = Control::decode(&body[..length]).expect_err("it is cut short");
            assert!(matches!(error, WireError::TooShort { .. }), "{title}: {error}");
            assert!(error.to_string().contains(title), "{title}: {error}");
        }
        if text == 0 {
            let mut longer = body.clone();
            longer.push(0);
            assert!(matches!(Control::decode(&longer), Err(WireError::TooLong { extra: 1, .. })), "{title}");
        } else {
            let mut other = body.clone();
            *other.last_mut().unwrap() = 0xff;
            assert!(matches!(Control::decode(&other), Err(WireError::NotText { .. })), "{title}");
            let mut longer = body.clone();
            longer.resize(body.len() + LONGEST_TEXT, b'a');
            assert!(matches!(Control::decode(&longer), Err(WireError::OutOfRange { .. })), "{title}");
        }
    }
}

#[test]
fn numbers_that_a_field_may_not_have_are_refused() {
    let refused = |change: fn(&mut Hello)| {
        let mut hello = hello();
        change(&mut hello);
        let error = Control::decode(&body(&Control::Hello(hello))).expect_err("it may not have that");
        assert!(matches!(error, WireError::OutOfRange { frame: "HELLO", .. }), "{error}");
    };
    refused(|hello| hello.versions = (0, 1));
    refused(|hello| hello.versions = (2, 1));
    refused(|hello| hello.epoch = 0);
    refused(|hello| hello.first = 0);
    refused(|hello| hello.maximum = 0);
    refused(|hello| hello.maximum = 1 << 55);
    refused(|hello| hello.reply_window = 4098);
    let unknown = Control::decode(&[11]).expect_err("it is of no version that is known");
    assert!(matches!(unknown, WireError::Unknown { kind: 11 }));
    assert_eq!(Control::decode(&[0x80, 1, 2, 3]), Ok(Control::Ignorable(0x80)));
}

#[test]
fn a_later_version_may_have_more_to_say_in_hello() {
    let mut later = hello();
    later.versions = (1, 2);
    let mut longer = body(&Control::Hello(later.clone()));
    longer.extend(b"more");
    assert_eq!(Control::decode(&longer), Ok(Control::Hello(later)));
}

fn text() -> impl Strategy<Value = String> {
    prop_oneof![Just(String::new()), "[a-z é☃]{1,60}"]
}

fn control() -> impl Strategy<Value = Control> {
    let number = || prop_oneof![1..1000_u64, any::<u64>().prop_map(|number| number.max(1))];
    let heartbeat = || (1..=3_600_000_u64).prop_map(Duration::from_millis);
    let versions = (1..=255_u8, 1..=255_u8).prop_map(|(one, other)| (one.min(other), one.max(other)));
    let token = prop::collection::vec(any::<u8>(), 0..=LONGEST_TOKEN);
    let sizes = (1..LARGEST_MAX, any::<u64>(), any::<u64>());
    let hello = (versions, any::<[u8; 16]>(), number(), number(), sizes, heartbeat(), token).prop_map(
        |(versions, stream, epoch, first, (maximum, window, reply_window), heartbeat, token)| {
            let reply_window = reply_window.max(largest_frame(maximum));
            let stream = StreamId(stream);
            Control::Hello(Hello { versions, stream, epoch, first, maximum, window, reply_window, heartbeat, token })
        },
    );
    let welcome = (any::<[u8; 16]>(), any::<u64>(), any::<u64>(), any::<u64>(), heartbeat()).prop_map(
        |(state, one, other, window, heartbeat)| {
            let (dispatched, committed) = (one.max(other), one.min(other));
            Control::Welcome(Welcome { version: 1, state: StateId(state), dispatched, committed, window, heartbeat })
        },
    );
    let refuse = (any::<u16>(), any::<u64>(), text())
        .prop_map(|(code, detail, text)| Control::Refuse(Refuse { code: RefuseCode(code), detail, text }));
    let reject = (number(), any::<u32>(), text())
        .prop_map(|(number, code, text)| Control::Reject(number, Rejection { code, text }));
    prop_oneof![
        hello,
        welcome,
        refuse,
        reject,
        number().prop_map(Control::Ack),
        number().prop_map(Control::ConfirmReject),
        Just(Control::Heartbeat),
        Just(Control::Goodbye),
        Just(Control::ConfirmGoodbye),
        number().prop_map(Control::Skip),
        (0x80..=0xff_u8).prop_map(Control::Ignorable),
    ]
}

proptest! {
    #![proptest_config(config(300))]

    #[test]
    fn what_is_written_is_read_back(control in control()) {
        let bytes = encoded(&control, &handshake_framing());
        prop_assert!(bytes.len() <= 3 + LONGEST_CONTROL);
        prop_assert_eq!(Control::decode(&bytes[3..]), Ok(control));
    }

    #[test]
    fn what_is_read_is_what_would_be_written(mut bytes in prop::collection::vec(any::<u8>(), 0..200), kind in 0..12_u8) {
        if let Some(first) = bytes.first_mut() {
            *first = kind;
        }
        match Control::decode(&bytes) {
            Ok(Control::Hello(hello)) if hello.versions.1 > VERSION => {}
            Ok(control) => prop_assert_eq!(body(&control), bytes),
            Err(error) => prop_assert!(!error.to_string().is_empty()),
        }
    }

    #[test]
    fn messages_and_control_frames_come_in_order_whatever_the_reads(
        max in prop::sample::select(vec![1, 100, 4096, 100_000]),
        frames in prop::collection::vec(prop_oneof![control().prop_map(Ok), (0..40_000_usize).prop_map(Err)], 0..12),
        steps in prop::collection::vec(prop_oneof![1..30_usize, 1..30_000_usize], 1..20),
        pauses in prop::collection::vec(prop::bool::weighted(0.3), 1..8),
    ) {
        let framing = Framing::for_session(max).unwrap();
        let mut bytes = Vec::new();
        let mut sent = Vec::new();
        for frame in frames {
            match frame {
                Ok(control) => {
                    control.put(&framing, &mut bytes);
                    sent.push(Ok(control));
                }
                Err(length) => {
                    let message: Vec<u8> = (0..length.min(max)).map(|at| at as u8 ^ sent.len() as u8).collect();
                    framing.encode(&message, &mut bytes).unwrap();
                    sent.push(Err(message));
                }
            }
        }
        let (found, end) = receive(framing, &bytes, &steps, &pauses);
        prop_assert_eq!(end, None);
        prop_assert!(found == sent, "other frames came than were sent");
    }
}

type Frames = Vec<Result<Control, Vec<u8>>>;

/// Reads bytes in steps, with pauses, as a connection in a session does.
fn receive(framing: Framing, mut bytes: &[u8], steps: &[usize], pauses: &[bool]) -> (Frames, Option<String>) {
    let mut inbox = Inbox::new(Framing::default());
    inbox.enter_session(framing, 0);
    let mut scratch = vec![0xaa; 64 * 1024];
    let mut found = Vec::new();
    let mut steps = steps.iter().cycle();
    while !bytes.is_empty() {
        let step = (*steps.next().unwrap()).min(bytes.len());
        let mut read = match inbox.room(&mut scratch) {
            Room::Scratch(room) => {
                let read = step.min(room.len());
                room[..read].copy_from_slice(&bytes[..read]);
                read
            }
            Room::Own(mut room) => {
                use bytes::BufMut;
                let read = step.min(room.chunk_mut().len());
                room.put_slice(&bytes[..read]);
                read
            }
        };
        bytes = &bytes[read..];
        loop {
            let delivered = inbox.deliver_in_session(&mut scratch, read, usize::MAX, |frame| {
                found.push(match frame {
                    Found::Message(message) => Err(message.to_vec()),
                    Found::Control(control) => Ok(Control::decode(control).expect("it was encoded")),
                });
                if pauses[found.len() % pauses.len()] { Flow::Pause } else { Flow::Continue }
            });
            match delivered {
                Ok(Delivered::All) => break,
                Ok(Delivered::Paused) => read = 0,
                Err(error) => return (found, Some(error.to_string())),
            }
        }
    }
    (found, inbox.end().err().map(|error| error.to_string()))
}

#[test]
fn every_split_of_a_handshake_and_what_follows_gives_the_same_frames() {
    let framing = Framing::for_session(300).unwrap();
    let mut bytes = Vec::new();
    let mut expected = Vec::new();
    for (_, control) in examples() {
        control.put(&framing, &mut bytes);
        framing.encode(b"between", &mut bytes).unwrap();
        expected.extend([Ok(control), Err(b"between".to_vec())]);
    }
    for first in 1..bytes.len() {
        let (found, end) = receive(framing, &bytes, &[first, bytes.len()], &[false]);
        assert!(found == expected && end.is_none(), "split at {first}");
    }
    for pauses in [[false], [true]] {
        let (found, end) = receive(framing, &bytes, &[1], &pauses);
        assert!(found == expected && end.is_none());
    }
}

#[test]
fn a_control_frame_that_is_too_long_is_refused_by_its_prefix_alone() {
    let framing = Framing::for_session(4096).unwrap();
    // Lengths -1024 and -1025, as zigzag varints.
    let (longest, longer) = ([0xff, 0x0f, 0x00], [0x81, 0x10, 0x00]);
    let (_, end) = receive(framing, &longest, &[1], &[false]);
    assert_eq!(end.as_deref(), Some("the stream ended 0 bytes into a message of 1024"));
    let (_, end) = receive(framing, &longer, &[1], &[false]);
    assert_eq!(end.as_deref(), Some("a control frame of 1025 bytes was declared, and the maximum is 1024"));
}

#[test]
fn outside_of_a_session_a_negative_length_is_an_error_as_ever() {
    let mut inbox = Inbox::new(Framing::default());
    let mut scratch = vec![0; 64 * 1024];
    let Room::Scratch(room) = inbox.room(&mut scratch) else { panic!("nothing large is at hand") };
    room[..4].copy_from_slice(&[1, 0, 0, 7]);
    let error = inbox.deliver(&mut scratch, 4, usize::MAX, |_| Flow::Continue).expect_err("it is negative");
    assert_eq!(error.to_string(), "a message of -1 bytes was declared, and a length is from 0 to 4096");
}

#[test]
fn what_was_kept_before_a_session_was_entered_is_read_in_it_or_as_plain_frames() {
    let mut bytes = Vec::new();
    Preface::put(&mut bytes);
    Control::Heartbeat.put(&handshake_framing(), &mut bytes);
    let mut scratch = vec![0; 64 * 1024];
    for split in 1..bytes.len() {
        let mut inbox = Inbox::new(Framing::default());
        for part in [&bytes[..split], &bytes[split..]] {
            let Room::Scratch(room) = inbox.room(&mut scratch) else { panic!("nothing large is at hand") };
            room[..part.len()].copy_from_slice(part);
            inbox.keep(&scratch, part.len());
        }
        assert_eq!(Preface::of(inbox.unseen()), Preface::Session { version: VERSION });
        inbox.enter_session(handshake_framing(), PREFACE);
        let mut found = Vec::new();
        let delivered = inbox.deliver_in_session(&mut scratch, 0, usize::MAX, |frame| {
            let Found::Control(control) = frame else { panic!("there is no message") };
            found.push(Control::decode(control).unwrap());
            Flow::Continue
        });
        assert_eq!((delivered, found), (Ok(Delivered::All), vec![Control::Heartbeat]));
        assert_eq!(inbox.held(), 0);
    }
    let mut inbox = Inbox::new(Framing::default());
    let Room::Scratch(room) = inbox.room(&mut scratch) else { panic!("nothing large is at hand") };
    room[..4].copy_from_slice(b"\x02\0\0A");
    inbox.keep(&scratch, 2);
    scratch.copy_within(2..4, 0);
    assert_eq!(Preface::of(inbox.unseen()), Preface::Plain);
    assert_eq!(inbox.deliver(&mut scratch, 0, usize::MAX, |_| Flow::Continue), Ok(Delivered::All));
    let Room::Scratch(room) = inbox.room(&mut scratch) else { panic!("nothing large is at hand") };
    room[..2].copy_from_slice(b"\0A");
    let mut lent = Vec::new();
    let delivered = inbox.deliver(&mut scratch, 2, usize::MAX, |message| {
        lent.extend_from_slice(&message);
        Flow::Continue
    });
    assert_eq!((delivered, &lent[..]), (Ok(Delivered::All), &b"A"[..]));
}
