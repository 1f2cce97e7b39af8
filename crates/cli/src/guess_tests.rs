use std::collections::BTreeMap;

use super::*;

/// Numbers that look random, and are the same every time.
struct Seeded(u64);

impl Seeded {
    fn next(&mut self) -> u64 {
        // splitmix64.
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound as u64) as usize
    }

    fn of<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.below(choices.len())]
    }
}

/// What messages hold.
#[derive(Clone, Copy, Debug)]
enum Content {
    Random,
    Zeros,
    Text,
    Json,
    Protobuf,
    CountersBe,
    CountersLe,
    Delimited,
    DelimitedProtobuf,
    Ones,
}

const CONTENTS: [Content; 10] = [
    Content::Random,
    Content::Zeros,
    Content::Text,
    Content::Json,
    Content::Protobuf,
    Content::CountersBe,
    Content::CountersLe,
    Content::Delimited,
    Content::DelimitedProtobuf,
    Content::Ones,
];

/// How long messages are.
#[derive(Clone, Copy, Debug)]
enum Sizes {
    Same(usize),
    UpTo(usize),
    Mixed,
    OftenEmpty,
}

const SIZES: [Sizes; 9] = [
    Sizes::Same(5),
    Sizes::Same(32),
    Sizes::Same(110),
    Sizes::Same(300),
    Sizes::UpTo(20),
    Sizes::UpTo(127),
    Sizes::UpTo(2000),
    Sizes::Mixed,
    Sizes::OftenEmpty,
];

fn length(sizes: Sizes, random: &mut Seeded) -> usize {
    match sizes {
        Sizes::Same(length) => length,
        Sizes::UpTo(most) => random.below(most + 1),
        Sizes::Mixed => 1 << random.below(11),
        Sizes::OftenEmpty => random.below(3) * random.below(30),
    }
}

fn message(content: Content, length: usize, number: u64, random: &mut Seeded) -> Vec<u8> {
    const WORDS: [&str; 8] = ["stream ", "of ", "messages ", "accepted, ", "settled. ", "The ", "frame\n", "GET / "];
    let mut out = Vec::new();
    while out.len() < length {
        match content {
            Content::Random => out.push(random.next() as u8),
            Content::Zeros => out.push(0),
            Content::Ones => out.push(1),
            Content::Text => out.extend_from_slice(random.of(&WORDS).as_bytes()),
            Content::Json => {
                out.extend_from_slice(format!("{{\"id\":{},\"celsius\":{}}}", number, random.below(400)).as_bytes());
            }
            Content::Protobuf => {
                out.extend_from_slice(&[0x08, (number % 128) as u8, 0x12, 0x07]);
                out.extend_from_slice(&random.next().to_le_bytes()[..7]);
                out.extend_from_slice(&[0x1d, 0, 0, random.below(256) as u8, 0x41]);
            }
            Content::CountersBe => out.extend_from_slice(&(number + random.below(3) as u64).to_be_bytes()),
            Content::CountersLe => out.extend_from_slice(&(number + random.below(3) as u64).to_le_bytes()),
            Content::DelimitedProtobuf => {
                out.extend_from_slice(&[5, 0x08, (number % 128) as u8, 0x12, 1, b'a' + random.below(26) as u8]);
            }
            Content::Delimited => {
                let inner = random.below(20);
                out.push(inner as u8);
                (0..inner).for_each(|_| out.push(b'a' + random.below(26) as u8));
            }
        }
    }
    out.truncate(length);
    out
}

/// So many messages in this framing, and where reading would pause if there was a pause before each.
fn stream(of: Candidate, content: Content, sizes: Sizes, count: usize, random: &mut Seeded) -> (Vec<u8>, Vec<usize>) {
    let (mut bytes, mut stops) = (Vec::new(), Vec::new());
    let framing = of.framing();
    for number in 0..count as u64 {
        let length = length(sizes, random).min(framing.max_message_size());
        framing.encode(&message(content, length, number, random), &mut bytes).unwrap();
        stops.push(bytes.len());
    }
    (bytes, stops)
}

fn heard<'a>(bytes: &'a [u8], stops: &'a [usize]) -> [Heard<'a>; 2] {
    [Heard { bytes, stops, has_ended: false }, Heard::default()]
}

#[test]
fn every_framing_is_known_by_a_hundred_messages() {
    for candidate in CANDIDATES {
        for content in [Content::Text, Content::Json, Content::Protobuf, Content::Random] {
            for sizes in [Sizes::UpTo(200), Sizes::Mixed, Sizes::Same(150)] {
                let (bytes, _) = stream(candidate, content, sizes, 100, &mut Seeded(1));
                let guess = guess(heard(&bytes, &[]));
                // Prefixes of one byte look like anything else.
                let wanted = match (candidate.prefix, content) {
                    (Prefix::U8, _) | (Prefix::Varint, Content::Random) => Sureness::Unknown,
                    (Prefix::Varint, _) => Sureness::Perhaps,
                    // What repeats itself has a period, and many things fit that.
                    _ if matches!(sizes, Sizes::Same(_)) => Sureness::Likely,
                    _ => Sureness::Sure,
                };
                let what = format!("{candidate} {content:?} {sizes:?}: {guess}");
                assert!(guess.best == Some(candidate) || wanted == Sureness::Unknown, "{what}");
                assert!(guess.sureness >= wanted, "{what}");
            }
        }
    }
}

#[test]
fn what_two_framings_read_in_the_same_way_is_never_called_sure() {
    let varint = CANDIDATES[1];
    for count in [1, 3, 1000] {
        let (bytes, stops) = stream(varint, Content::Text, Sizes::UpTo(100), count, &mut Seeded(2));
        let guess = guess(heard(&bytes, &stops));
        assert_eq!(guess.best, Some(varint), "{guess}");
        assert!(guess.sureness < Sureness::Sure, "{guess}");
        assert!(guess.to_string().contains("u8 would read them just so"), "{guess}");
    }
}

#[test]
fn one_message_between_two_pauses_is_a_guess_and_says_so() {
    for candidate in CANDIDATES {
        let mut bytes = Vec::new();
        candidate.framing().encode(b"hello, world", &mut bytes).unwrap();
        let stops = [bytes.len()];
        let guess = guess(heard(&bytes, &stops));
        // What another framing reads in much the same way may come first, and then it is named.
        assert!(guess.to_string().contains(&candidate.to_string()), "{candidate}: {guess}");
        assert!(guess.sureness < Sureness::Sure, "{candidate}: {guess}");
    }
}

#[test]
fn both_directions_are_weighed_together() {
    let framing = CANDIDATES[2];
    let random = &mut Seeded(3);
    let (there, stops) = stream(framing, Content::Random, Sizes::Same(8), 1, random);
    let (back, _) = stream(framing, Content::Protobuf, Sizes::UpTo(300), 40, random);
    let there = Heard { bytes: &there, stops: &stops, has_ended: false };
    let alone = guess([there, Heard::default()]);
    let both = guess([there, Heard { bytes: &back, stops: &[], has_ended: false }]);
    assert!(alone.sureness < Sureness::Sure, "{alone}");
    assert_eq!((both.best, both.sureness), (Some(framing), Sureness::Sure), "{both}");
}

#[test]
fn what_has_no_frames_is_not_given_any() {
    let random = &mut Seeded(4);
    let http = b"GET /index.html HTTP/1.1\r\nHost: example.com\r\nAccept: */*\r\n\r\n".repeat(20);
    let lines = b"2026-11-23 03:26:36 accepted 1, settled 1, failed 0\n".repeat(50);
    let noise: Vec<u8> = (0..20_000).map(|_| random.next() as u8).collect();
    for (name, bytes) in [("http", &http), ("lines", &lines), ("noise", &noise), ("nothing", &Vec::new())] {
        let guess = guess(heard(bytes, &[]));
        assert!(guess.sureness < Sureness::Likely, "{name}: {guess}");
        assert!(guess.best.is_some() || guess.to_string().contains("--framing NAME"), "{guess}");
    }
    for length in [1, 100, 10_000] {
        for byte in [0, 1, b'a', 0x80, 0xff] {
            let guess = guess(heard(&vec![byte; length], &[]));
            assert!(guess.sureness < Sureness::Sure, "{length} times {byte}: {guess}");
        }
    }
}

#[test]
fn it_is_never_sure_and_wrong() {
    let corpora = std::env::var("BUFFSTREAMS_GUESSES").ok().and_then(|text| text.parse().ok()).unwrap_or(3000);
    let mut table: BTreeMap<String, BTreeMap<String, [usize; 4]>> = BTreeMap::new();
    let mut wrong = Vec::new();
    for seed in 0..corpora {
        let random = &mut Seeded(seed);
        let (content, sizes) = (random.of(&CONTENTS), random.of(&SIZES));
        let (candidate, count) = (random.of(&CANDIDATES), random.of(&[1, 2, 4, 10, 30, 100]));
        let (mut bytes, mut stops) = stream(candidate, content, sizes, count, random);
        match random.below(4) {
            // As it comes from a busy writer: cut off anywhere, and paused anywhere.
            0 => {
                bytes.truncate(random.below(bytes.len() + 1).max(1).min(bytes.len()));
                stops = (0..random.below(5)).map(|_| random.below(bytes.len() + 1)).collect();
                stops.sort_unstable();
            }
            1 => stops.clear(),
            _ => {}
        }
        let is_framed = random.below(20) > 0;
        if !is_framed {
            bytes = message(content, bytes.len(), 7, random);
        }
        bytes.truncate(64 << 10);
        stops.retain(|stop| *stop <= bytes.len());
        let guess = guess(heard(&bytes, &stops));
        let truth = if is_framed { candidate.to_string() } else { "none".to_owned() };
        let said = guess.best.map_or("none".to_owned(), |best| best.to_string());
        table.entry(truth.clone()).or_default().entry(said.clone()).or_default()[guess.sureness as usize] += 1;
        if guess.sureness == Sureness::Sure && said != truth {
            wrong.push(format!("seed {seed}: {count} times {content:?} {sizes:?} in {truth}: {guess}"));
        }
    }
    for (truth, row) in &table {
        println!("{truth}");
        for (said, [unknown, perhaps, likely, sure]) in row {
            println!("    {said:40} unknown {unknown:4}  perhaps {perhaps:4}  likely {likely:4}  sure {sure:4}");
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    let right =
        |level: usize| table.iter().map(|(truth, row)| row.get(truth).map_or(0, |counts| counts[level])).sum::<usize>();
    assert!(right(3) * 8 > corpora as usize, "sure of {} in {corpora}", right(3));
}
