use proptest::prelude::*;

use super::*;

const GO_HEADERS: &str = include_str!("../../tests/vectors/go-buffstreams-2.0-headers.csv");

/// Maxima around every width of every prefix that can express them.
fn framings() -> Vec<Framing> {
    let mut maxima = vec![1, 2, 100, 255, 256, 4095, 4096, 65_535, 65_536];
    maxima.extend((7..=49).step_by(7).flat_map(|bits| [(1 << bits) - 1, 1 << bits]));
    maxima.extend((8..=48).step_by(8).flat_map(|bits| [(1 << bits) - 1, 1 << bits]));
    maxima.extend([(1 << 32) - 1, (1 << 55) - 1]);
    let pairs = Prefix::ALL.into_iter().flat_map(|prefix| maxima.iter().map(move |max| (prefix, *max)));
    pairs.filter_map(|(prefix, max)| Framing::with_max(prefix, max).ok()).collect()
}

fn framing(prefix: Prefix, max: usize) -> Framing {
    Framing::with_max(prefix, max).expect("the prefix can express it")
}

fn prefix_of(framing: Framing, length: usize) -> Vec<u8> {
    let mut out = Vec::new();
    framing.put_prefix(length, &mut out);
    out
}

fn hex(text: &str) -> Vec<u8> {
    assert_eq!(text.len() % 2, 0, "{text}");
    (0..text.len()).step_by(2).map(|at| u8::from_str_radix(&text[at..at + 2], 16).expect("hex digits")).collect()
}

/// What a prefix is, said by the slowest decoder there is: one rule after the other, in 128 bits, byte by byte.
#[derive(Debug, PartialEq, Eq)]
enum Naive {
    Incomplete,
    Length { prefix: usize, message: usize },
    Negative(i64),
    TooLarge(u64),
    Malformed(Vec<u8>, PrefixFault),
}

fn naive(framing: Framing, bytes: &[u8]) -> Naive {
    let max = framing.max_message_size() as u128;
    let fixed = |width: usize, big_end_first: bool| {
        let Some(prefix) = bytes.get(..width) else { return Naive::Incomplete };
        let digit = |sum: u128, byte: &u8| sum * 256 + u128::from(*byte);
        let length = if big_end_first { prefix.iter().fold(0, digit) } else { prefix.iter().rev().fold(0, digit) };
        naive_length(width, length, max)
    };
    match framing.prefix() {
        Prefix::U8 => fixed(1, true),
        Prefix::U16Be => fixed(2, true),
        Prefix::U16Le => fixed(2, false),
        Prefix::U32Be => fixed(4, true),
        Prefix::U32Le => fixed(4, false),
        Prefix::U64Be => fixed(8, true),
        Prefix::U64Le => fixed(8, false),
        Prefix::Varint => {
            for (index, byte) in bytes.iter().take(10).enumerate() {
                let seen = bytes[..=index].to_vec();
                if index == 9 && *byte > 1 {
                    // Ten bytes hold 64 bits and no more.
                    return Naive::Malformed(seen, PrefixFault::Unterminated);
                }
                if *byte < 0x80 {
                    if *byte == 0 && index > 0 {
                        return Naive::Malformed(seen, PrefixFault::NotShortest);
                    }
                    return naive_length(index + 1, naive_varint(&seen), max);
                }
            }
            Naive::Incomplete
        }
        Prefix::Buffstreams => {
            let mut width = 1;
            let mut left = framing.max_message_size();
            while left > 0 {
                width += 1;
                left /= 256;
            }
            let Some(prefix) = bytes.get(..width) else { return Naive::Incomplete };
            let malformed = |fault| Naive::Malformed(prefix.to_vec(), fault);
            let Some(last) = prefix.iter().position(|byte| *byte < 0x80) else {
                return malformed(PrefixFault::Unterminated);
            };
            if last > 0 && prefix[last] == 0 {
                return malformed(PrefixFault::NotShortest);
            }
            if prefix[last + 1..].iter().any(|byte| *byte != 0) {
                return malformed(PrefixFault::Padding);
            }
            let zigzag = naive_varint(&prefix[..=last]);
            if zigzag % 2 == 1 {
                return Naive::Negative(-(zigzag.div_ceil(2) as i64));
            }
            naive_length(width, zigzag / 2, max)
        }
    }
}

fn naive_varint(bytes: &[u8]) -> u128 {
    bytes.iter().rev().fold(0, |sum, byte| sum * 128 + u128::from(byte % 128))
}

fn naive_length(prefix: usize, length: u128, max: u128) -> Naive {
    if length > max { Naive::TooLarge(length as u64) } else { Naive::Length { prefix, message: length as usize } }
}

/// What `header` says, in the same words.
fn told(framing: Framing, bytes: &[u8]) -> Naive {
    let checked = |max| assert_eq!(max, framing.max_message_size());
    match framing.header(bytes) {
        Ok(None) => Naive::Incomplete,
        Ok(Some(Header { prefix, message })) => Naive::Length { prefix, message },
        Err(FrameError::Negative { declared, max }) => {
            checked(max);
            Naive::Negative(declared)
        }
        Err(FrameError::TooLarge { declared, max }) => {
            checked(max);
            Naive::TooLarge(declared)
        }
        Err(FrameError::MalformedPrefix { seen, fault, max }) => {
            checked(max);
            Naive::Malformed(seen.as_slice().to_vec(), fault)
        }
        Err(other) => panic!("not an error of a prefix: {other}"),
    }
}

#[test]
fn every_recorded_header_of_go_buffstreams_is_written_and_read_to_the_byte() {
    let mut rows = 0;
    for row in GO_HEADERS.lines().skip(1) {
        let [max, length, header] = row.split(',').collect::<Vec<_>>()[..] else { panic!("row {row:?}") };
        let (max, length, header) = (max.parse().unwrap(), length.parse().unwrap(), hex(header));
        let framing = framing(Prefix::Buffstreams, max);
        assert_eq!(prefix_of(framing, length), header, "written: {row}");
        assert_eq!(framing.header(&header), Ok(Some(Header { prefix: header.len(), message: length })), "read: {row}");
        for short in 0..header.len() {
            assert_eq!(framing.header(&header[..short]), Ok(None), "the first {short} bytes of {row}");
        }
        rows += 1;
    }
    assert_eq!(rows, 94);
}

#[test]
fn the_width_of_a_go_prefix_follows_from_the_maximum() {
    for (max, width) in
        [(1, 2), (255, 2), (256, 3), (4096, 3), (65_535, 3), (65_536, 4), ((1 << 24) - 1, 4), (1 << 24, 5)]
    {
        assert_eq!(prefix_of(framing(Prefix::Buffstreams, max), 0).len(), width, "maximum {max}");
    }
}

#[test]
fn every_framing_passes_lengths_up_to_its_maximum_and_refuses_one_more() {
    for framing in framings() {
        let max = framing.max_message_size();
        for length in [0, 1, max - 1, max] {
            let prefix = prefix_of(framing, length);
            assert_eq!(prefix.len(), framing.prefix_width(length), "{framing:?} {length}");
            let header = Header { prefix: prefix.len(), message: length };
            assert_eq!(framing.header(&prefix), Ok(Some(header)), "{framing:?} {length}");
            assert_eq!(framing.check(length), Ok(()));
        }
        let refused = FrameError::TooLarge { declared: max as u64 + 1, max };
        assert_eq!(framing.check(max + 1), Err(refused));
    }
}

#[test]
fn one_more_than_the_maximum_is_refused_on_receive_by_every_framing_that_can_say_it() {
    for framing in framings() {
        let max = framing.max_message_size();
        // A framing of the same width that allows more writes the prefix that this one must refuse.
        let Ok(wider) = Framing::with_max(framing.prefix(), max + 1) else { continue };
        let prefix = prefix_of(wider, max + 1);
        if framing.prefix() == Prefix::Buffstreams && prefix.len() != framing.prefix_width(0) {
            continue;
        }
        let refused = FrameError::TooLarge { declared: max as u64 + 1, max };
        assert_eq!(framing.header(&prefix), Err(refused), "{framing:?}");
    }
}

#[test]
fn whole_frames_pass_every_framing_and_its_public_methods() {
    for prefix in Prefix::ALL {
        for max in [0, 1, 200, 255, 4096, 65_535, 70_000] {
            let Ok(framing) = Framing::with_max(prefix, max) else { continue };
            let max = framing.max_message_size();
            for length in [0, 1, max - 1, max] {
                let message: Vec<u8> = (0..length).map(|at| (at * 7) as u8).collect();
                let mut frame = b"before".to_vec();
                framing.encode(&message, &mut frame).unwrap();
                let frame = frame.strip_prefix(b"before").expect("what was there stays");
                let found = framing.decode(frame).unwrap();
                assert_eq!(found, Some((&message[..], frame.len())));
                assert_eq!(framing.decode(&frame[..frame.len() - 1]).unwrap(), None);
                let followed = [frame, b"\xff\xff\xff"].concat();
                assert_eq!(framing.decode(&followed).unwrap(), Some((&message[..], frame.len())));
            }
            let mut out = b"before".to_vec();
            let refused = framing.encode(&vec![0; max + 1], &mut out);
            assert_eq!(refused, Err(FrameError::TooLarge { declared: max as u64 + 1, max }));
            assert_eq!(out, b"before");
        }
    }
}

#[test]
fn a_varint_prefix_is_the_one_of_protobuf() {
    let framing = framing(Prefix::Varint, 1 << 40);
    for (length, header) in
        [(0, "00"), (1, "01"), (127, "7f"), (128, "8001"), (300, "ac02"), (16_383, "ff7f"), (16_384, "808001")]
    {
        assert_eq!(prefix_of(framing, length), hex(header));
    }
}

#[test]
fn fixed_prefixes_are_the_bytes_of_the_length() {
    for (prefix, header) in [
        (Prefix::U8, "7b"),
        (Prefix::U16Be, "007b"),
        (Prefix::U16Le, "7b00"),
        (Prefix::U32Be, "0000007b"),
        (Prefix::U32Le, "7b000000"),
        (Prefix::U64Be, "000000000000007b"),
        (Prefix::U64Le, "7b00000000000000"),
    ] {
        assert_eq!(prefix_of(Framing::new(prefix), 123), hex(header), "{prefix}");
    }
}

#[test]
fn malformed_prefixes_are_named_for_what_they_are() {
    use PrefixFault::{NotShortest, Padding, Unterminated};
    let go = Framing::default();
    let varint = Framing::new(Prefix::Varint);
    let malformed = |seen: &str, fault| Naive::Malformed(hex(seen), fault);
    for (framing, bytes, expected) in [
        // Lists of what breaks the original: over the maximum, negative, junk behind the length.
        (go, "824000", Naive::TooLarge(4097)),
        (go, "010000", Naive::Negative(-1)),
        (go, "06ffff616263", malformed("06ffff", Padding)),
        (go, "030000", Naive::Negative(-2)),
        (go, "ffff7f", Naive::Negative(-(1 << 20))),
        (go, "feff7f", Naive::TooLarge((1 << 20) - 1)),
        (go, "800000", malformed("800000", NotShortest)),
        (go, "808000", malformed("808000", NotShortest)),
        (go, "868000", malformed("868000", NotShortest)),
        (go, "808080", malformed("808080", Unterminated)),
        (go, "80808000", malformed("808080", Unterminated)),
        (go, "ffffffffffffffffffff", malformed("ffffff", Unterminated)),
        (go, "060001", malformed("060001", Padding)),
        (go, "060100", malformed("060100", Padding)),
        (go, "060080", malformed("060080", Padding)),
        (varint, "8120", Naive::TooLarge(4097)),
        (varint, "8000", malformed("8000", NotShortest)),
        (varint, "858000", malformed("858000", NotShortest)),
        (varint, "80808080808080808000", malformed("80808080808080808000", NotShortest)),
        (varint, "808080808080808000", malformed("808080808080808000", NotShortest)),
        (varint, "ffffffffffffffffff01", Naive::TooLarge(u64::MAX)),
        (varint, "ffffffffffffffffff02", malformed("ffffffffffffffffff02", Unterminated)),
        (varint, "ffffffffffffffffffff", malformed("ffffffffffffffffffff", Unterminated)),
        (varint, "ffffffffffffffffff", Naive::Incomplete),
        (Framing::new(Prefix::U16Be), "1001", Naive::TooLarge(4097)),
        (Framing::new(Prefix::U16Le), "0110", Naive::TooLarge(4097)),
        (Framing::new(Prefix::U32Be), "ffffffff", Naive::TooLarge(u64::from(u32::MAX))),
        (Framing::new(Prefix::U32Le), "01100000", Naive::TooLarge(4097)),
        (Framing::new(Prefix::U64Be), "ffffffffffffffff", Naive::TooLarge(u64::MAX)),
        (Framing::new(Prefix::U64Le), "0000000000000080", Naive::TooLarge(1 << 63)),
        (framing(Prefix::U8, 100), "65", Naive::TooLarge(101)),
    ] {
        let bytes = hex(bytes);
        assert_eq!(naive(framing, &bytes), expected, "the reference on {bytes:02x?} as {framing:?}");
        assert_eq!(told(framing, &bytes), expected, "{bytes:02x?} as {framing:?}");
    }
}

#[test]
fn decoding_agrees_with_the_reference_on_every_three_bytes() {
    for framing in [framing(Prefix::Buffstreams, 100), Framing::default(), framing(Prefix::Varint, 20_000)] {
        for word in 0..1_u32 << 24 {
            // Every value of the first and third byte, and the telling ones of the second.
            if !matches!(word >> 8 & 0xff, 0 | 1 | 0x7f | 0x80 | 0x81 | 0xff) {
                continue;
            }
            let bytes = &word.to_le_bytes()[..3];
            assert_eq!(told(framing, bytes), naive(framing, bytes), "{bytes:02x?} as {framing:?}");
        }
    }
}

/// Bytes that come close to being prefixes: small numbers, continuation bits, zeros and ones at every place.
fn almost_prefixes() -> impl Strategy<Value = Vec<u8>> {
    let byte = prop_oneof![
        3 => any::<u8>(),
        2 => Just(0x80_u8),
        1 => Just(0xff),
        3 => Just(0),
        1 => Just(1),
        2 => 0x80_u8..,
    ];
    prop::collection::vec(byte, 0..=13)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: cases(), failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn decoding_agrees_with_the_reference_on_any_bytes_and_every_beginning_of_them(bytes in almost_prefixes()) {
        for framing in framings() {
            for end in 0..=bytes.len() {
                let bytes = &bytes[..end];
                prop_assert_eq!(told(framing, bytes), naive(framing, bytes), "{:02x?} as {:?}", bytes, framing);
            }
        }
    }

    #[test]
    fn decoding_agrees_with_the_reference_on_lengths_with_one_bit_wrong(
        which in any::<prop::sample::Index>(),
        part in 0.0..=1.0_f64,
        flip in any::<prop::sample::Index>(),
    ) {
        let framings = framings();
        let framing = framings[which.index(framings.len())];
        let max = framing.max_message_size();
        let length = ((max as f64 * part) as usize).min(max);
        let mut prefix = prefix_of(framing, length);
        let right = Naive::Length { prefix: prefix.len(), message: length };
        prop_assert_eq!(told(framing, &prefix), right);
        let bit = flip.index(prefix.len() * 8);
        prefix[bit / 8] ^= 1 << (bit % 8);
        prefix.extend([0x80, 0]);
        prop_assert_eq!(told(framing, &prefix), naive(framing, &prefix), "{:02x?} as {:?}", prefix, framing);
    }
}

/// How many cases a property test tries; more with `PROPTEST_CASES`.
fn cases() -> u32 {
    std::env::var("PROPTEST_CASES").ok().and_then(|cases| cases.parse().ok()).unwrap_or(2_000)
}

#[test]
fn a_maximum_that_the_prefix_cannot_express_is_refused_and_zero_is_the_default() {
    for (prefix, largest) in [
        (Prefix::U8, 255),
        (Prefix::U16Be, 65_535),
        (Prefix::U16Le, 65_535),
        (Prefix::U32Be, (1 << 32) - 1),
        (Prefix::U32Le, (1 << 32) - 1),
        (Prefix::U64Be, (1 << 55) - 1),
        (Prefix::U64Le, (1 << 55) - 1),
        (Prefix::Varint, (1 << 55) - 1),
        (Prefix::Buffstreams, (1 << 55) - 1),
    ] {
        assert_eq!(prefix.largest_max(), largest);
        assert_eq!(Framing::with_max(prefix, largest).unwrap().max_message_size(), largest);
        for absurd in [largest + 1, usize::MAX] {
            let refused = FramingError::MaxTooLarge { prefix, max: absurd, largest };
            assert_eq!(Framing::with_max(prefix, absurd), Err(refused));
        }
        assert_eq!(Framing::with_max(prefix, 0), Ok(Framing::new(prefix)));
        assert_eq!(Framing::new(prefix).max_message_size(), largest.min(4096));
    }
    assert_eq!(Framing::default(), Framing::new(Prefix::Buffstreams));
}

#[test]
fn errors_name_what_was_declared_and_what_is_allowed() {
    let go = Framing::default();
    for (bytes, words) in [
        ("824000", vec!["4097", "4096"]),
        ("010000", vec!["-1", "4096"]),
        ("06ffff", vec!["06 ff ff", "padding", "4096", "framing"]),
        ("800000", vec!["80 00 00", "fewer bytes", "4096"]),
        ("808080", vec!["80 80 80", "does not end", "4096"]),
    ] {
        let text = go.header(&hex(bytes)).unwrap_err().to_string();
        for word in words {
            assert!(text.contains(word), "{text:?} names {word}");
        }
    }
    let text = Framing::with_max(Prefix::U8, 256).unwrap_err().to_string();
    assert!(["256", "u8", "255"].iter().all(|word| text.contains(word)), "{text}");
    let text = "u24be".parse::<Prefix>().unwrap_err().to_string();
    assert!(text.contains("u24be"), "{text}");
    assert!(Prefix::ALL.iter().all(|prefix| text.contains(prefix.name())), "{text}");
}

#[test]
fn the_end_of_a_stream_inside_a_frame_tells_how_far_it_came() {
    let go = Framing::default();
    assert_eq!(go.truncated(b"\x14\0\0abc"), FrameError::Truncated { got: 3, want: 10 });
    assert_eq!(go.truncated(b"\x14\0\0"), FrameError::Truncated { got: 0, want: 10 });
    assert_eq!(go.truncated(b"\x14\0"), FrameError::TruncatedPrefix { got: 2 });
    let text = FrameError::Truncated { got: 3, want: 10 }.to_string();
    assert!(text.contains('3') && text.contains("10"), "{text}");
}

#[test]
fn names_are_parsed_back() {
    for prefix in Prefix::ALL {
        assert_eq!(prefix.to_string().parse(), Ok(prefix));
    }
}
