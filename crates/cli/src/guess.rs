//! Which framing the first bytes of a connection are of: guessed, with how sure that is. No sockets, no clock.
//!
//! Each framing is one way to tell what came: so many lengths, and between them messages. One that is right tells it with
//! the fewest bits, because it need not spell out prefixes byte by byte as if they were content; one that is wrong meets a
//! prefix that cannot be, or lengths that make no pattern. The bits of each telling are counted: lengths by how often they
//! came before, content by how often each byte did, and where reading paused (peers tend to write whole frames) by whether
//! that was between two messages. They are compared with each other, and with the telling that there are no frames at all.
//! A difference of ten bits means that the other is a thousand times less likely.
//!
//! That alone is not enough to be sure: content that is itself made of lengths and messages, or of zeros, is told well by a
//! framing that is not the connection's. So the prefixes themselves must be such as do not come by chance, and no other
//! framing may find such prefixes too. Messages that are all protobuf, or all JSON, are a sign as well.

use std::collections::HashMap;
use std::fmt;

use buffstreams::{Direction, Dissected, Dissector, Framing, Prefix};

use crate::fields;
use crate::report::counted;

/// A length beyond this is taken as a sign that it is none.
const LONGEST: usize = 64 << 20;

/// Differences in bits by which a guess is called sure, and likely.
const SURE: f64 = 64.0;
const LIKELY: f64 = 10.0;

/// A pattern needs some repetition before it is called sure.
const SURE_MESSAGES: usize = 8;

/// Prefixes of another framing that would come by chance with so few bits are no coincidence either.
const COINCIDENCE: f64 = 20.0;

/// How unlikely it is for bytes that were cut anywhere to be a protobuf message, or like JSON, in bits. All together they are
/// a sign, and never enough to be sure.
const PROTOBUF: f64 = 2.0;
const JSON: f64 = 4.0;
const MOST_CONTENT: f64 = 16.0;

/// Pauses that are weighed, in each direction: the first ones.
pub(crate) const MOST_STOPS: usize = 16;

/// How often a pause is where a message ends, if the framing is right; and how often the end of a stream is.
const STOPS_BETWEEN: f64 = 0.7;
const ENDS_BETWEEN: f64 = 0.99;

/// What came from one side.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Heard<'a> {
    pub(crate) bytes: &'a [u8],
    /// After how many bytes there was nothing more to read for a moment, in rising order.
    pub(crate) stops: &'a [usize],
    /// Nothing more will come.
    pub(crate) has_ended: bool,
}

/// A framing that may be the one.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Candidate {
    prefix: Prefix,
    /// The largest message that is believed, and for `buffstreams` what makes the prefix as wide as it is.
    max: usize,
    /// How unlikely it is before anything has come, in bits.
    rarity: u8,
}

/// Every framing there is, the usual ones first; `buffstreams` with every width up to five.
const CANDIDATES: [Candidate; 12] = [
    Candidate { prefix: Prefix::Buffstreams, max: u16::MAX as usize, rarity: 2 },
    Candidate { prefix: Prefix::Varint, max: LONGEST, rarity: 2 },
    Candidate { prefix: Prefix::U32Be, max: LONGEST, rarity: 2 },
    Candidate { prefix: Prefix::U32Le, max: LONGEST, rarity: 3 },
    Candidate { prefix: Prefix::Buffstreams, max: (1 << 24) - 1, rarity: 3 },
    Candidate { prefix: Prefix::Buffstreams, max: u8::MAX as usize, rarity: 4 },
    Candidate { prefix: Prefix::Buffstreams, max: LONGEST, rarity: 5 },
    Candidate { prefix: Prefix::U16Be, max: u16::MAX as usize, rarity: 4 },
    Candidate { prefix: Prefix::U16Le, max: u16::MAX as usize, rarity: 4 },
    Candidate { prefix: Prefix::U64Be, max: LONGEST, rarity: 5 },
    Candidate { prefix: Prefix::U64Le, max: LONGEST, rarity: 5 },
    Candidate { prefix: Prefix::U8, max: u8::MAX as usize, rarity: 5 },
];

/// How unlikely it is, before anything has come, that there are no frames, in bits.
const NO_FRAMES: f64 = 3.0;

/// What came of it.
#[derive(Clone, Debug)]
pub(crate) struct Guess {
    /// `None` if there seem to be no frames.
    pub(crate) best: Option<Candidate>,
    pub(crate) sureness: Sureness,
    /// Whole messages that it finds.
    messages: usize,
    bytes: usize,
    /// Framings that read everything so far in the very same way.
    same: Vec<Candidate>,
    /// What else it could be, and by how many bits that is less likely.
    next: (Option<Candidate>, f64),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Sureness {
    Unknown,
    Perhaps,
    Likely,
    Sure,
}

impl Candidate {
    /// The framing, with the largest maximum that it can have.
    pub(crate) fn framing(self) -> Framing {
        let max = match (self.prefix, self.max) {
            (Prefix::Buffstreams, LONGEST) => u32::MAX as usize,
            (Prefix::Buffstreams, max) => max,
            (prefix, _) => prefix.largest_max(),
        };
        Framing::with_max(self.prefix, max).expect("it fits its prefix")
    }

    /// Whether these bytes have no prefix that cannot be.
    pub(crate) fn may_be(self, bytes: &[u8]) -> bool {
        Parse::of(self, bytes).is_some()
    }

    fn width(self, length: usize) -> usize {
        match self.prefix {
            Prefix::Buffstreams => match self.max {
                255 => 2,
                65_535 => 3,
                LONGEST => 5,
                _ => 4,
            },
            Prefix::Varint => ((usize::BITS - (length | 1).leading_zeros()) as usize).div_ceil(7),
            Prefix::U8 => 1,
            Prefix::U16Be | Prefix::U16Le => 2,
            Prefix::U32Be | Prefix::U32Le => 4,
            _ => 8,
        }
    }
}

impl fmt::Display for Candidate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.prefix)?;
        if self.prefix == Prefix::Buffstreams {
            write!(f, " with a prefix of {} bytes", self.width(0))?;
        }
        Ok(())
    }
}

impl fmt::Debug for Candidate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl fmt::Display for Guess {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some(best) = self.best else {
            return write!(f, "framing unknown: {} bytes look like no framing; say --framing NAME", self.bytes);
        };
        let fit = counted(self.messages as u64, "message fits", "messages fit");
        match self.sureness {
            Sureness::Sure => write!(f, "framing: {best} (sure: {fit}, ")?,
            Sureness::Likely => write!(f, "framing: {best} (likely: {fit}, ")?,
            _ => write!(f, "framing: {best} (perhaps: {fit}, ")?,
        }
        if let [same, ..] = self.same[..] {
            write!(f, "and {same} would read them just so; ")?;
        }
        match self.next.0 {
            Some(next) => write!(f, "{next} ")?,
            None => write!(f, "no framing at all ")?,
        }
        match self.next.1 {
            bits @ ..1000.0 => write!(f, "is 2^{bits:.0} times less likely)")?,
            _ => write!(f, "is over 2^999 times less likely)")?,
        }
        if self.sureness == Sureness::Sure { Ok(()) } else { write!(f, "; if that is wrong, say --framing NAME") }
    }
}

/// Weighs every framing over what has come from both sides.
pub(crate) fn guess(heard: [Heard<'_>; 2]) -> Guess {
    let bytes = heard.iter().map(|heard| heard.bytes.len()).sum();
    let bits = Bits::up_to(bytes);
    let nothing = NO_FRAMES + heard.iter().map(|heard| bits.unframed(heard)).sum::<f64>();
    let mut tellings: Vec<(Candidate, [Parse; 2], f64)> = Vec::new();
    for candidate in CANDIDATES {
        let [Some(there), Some(back)] = heard.map(|heard| Parse::of(candidate, heard.bytes)) else { continue };
        let cost = f64::from(candidate.rarity) + bits.framed(&heard[0], &there) + bits.framed(&heard[1], &back);
        tellings.push((candidate, [there, back], cost));
    }
    tellings.sort_by(|one, other| one.2.total_cmp(&other.2));
    let messages = |parses: &[Parse; 2]| parses.iter().map(|parse| parse.whole).sum::<usize>();
    let unknown = |next| Guess { best: None, sureness: Sureness::Unknown, messages: 0, bytes, same: Vec::new(), next };
    let Some((best, parses, cost)) = tellings.first().filter(|(_, parses, _)| messages(parses) > 0) else {
        return unknown((None, 0.0));
    };
    if *cost >= nothing {
        return unknown((Some(*best), cost - nothing));
    }
    let (same, others): (Vec<_>, Vec<_>) = tellings[1..].iter().partition(|(_, other, _)| other == parses);
    let same: Vec<_> = same.into_iter().map(|(candidate, ..)| *candidate).collect();
    let mut next = (None, nothing - cost);
    if let Some((other, _, other_cost)) = others.first()
        && other_cost - cost < next.1
    {
        next = (Some(*other), other_cost - cost);
    }
    let messages = messages(parses);
    let order = |candidate: Candidate, parses: &[Parse; 2]| -> f64 {
        (0..2).map(|side| parses[side].order(candidate, &heard[side])).sum()
    };
    let evidence = next.1.min(order(*best, parses));
    let has_rival = || others.iter().any(|(other, parses, _)| order(*other, parses) >= COINCIDENCE);
    let sureness = match evidence {
        SURE.. if same.is_empty() && messages >= SURE_MESSAGES && !has_rival() => Sureness::Sure,
        LIKELY.. => Sureness::Likely,
        _ => Sureness::Perhaps,
    };
    Guess { best: Some(*best), sureness, messages, bytes, same, next }
}

/// One direction, cut into messages by a framing.
#[derive(Debug, PartialEq, Eq)]
struct Parse {
    /// Where each message begins and would end, that of an incomplete one behind the last byte.
    spans: Vec<(usize, usize)>,
    /// Of these are complete.
    whole: usize,
}

impl Parse {
    /// `None` if there is a prefix that cannot be.
    fn of(candidate: Candidate, bytes: &[u8]) -> Option<Parse> {
        let framing = Framing::with_max(candidate.prefix, candidate.max).expect("it fits its prefix");
        let mut parse = Parse { spans: Vec::new(), whole: 0 };
        let mut at = 0;
        let mut add = |length: usize| {
            let begin = at + candidate.width(length);
            at = begin + length;
            parse.spans.push((begin, at));
            parse.whole += usize::from(at <= bytes.len());
        };
        // Nothing is kept, so every length is told as soon as it is known. What goes back is plain.
        Dissector::new(framing, 0)
            .feed(Direction::Back, bytes, |found| match found {
                Dissected::Message { bytes, .. } => add(bytes.len()),
                Dissected::LongMessage { length, .. } => add(length as usize),
                _ => {}
            })
            .ok()?;
        Some(parse)
    }

    /// How unlikely it is that bytes which are something else would be cut like this, in bits. Whatever the content.
    fn order(&self, candidate: Candidate, heard: &Heard<'_>) -> f64 {
        let whole = &self.spans[..self.whole];
        let lengths = || whole.iter().map(|(begin, end)| end - begin);
        let empty = lengths().filter(|length| *length == 0).count();
        // Zeros are many empty messages to most framings, and a wide prefix is an empty message before a narrow one.
        if 5 * empty >= 2 * whole.len() {
            return 0.0;
        }
        // A length that comes to nothing counts too: lengths that may be anything are no pattern.
        let longest = self.spans.iter().map(|(begin, end)| end - begin).max().unwrap_or_default();
        // What repeats itself fits whatever has its period: a length that comes again and again tells no more than twice.
        let mut came = HashMap::new();
        let prefixes: f64 = lengths()
            .filter(|length| {
                let times = came.entry(*length).or_insert(0);
                *times += 1;
                *length > 0 && *times <= 2
            })
            .map(|length| match (candidate.prefix, candidate.width(length)) {
                // Any byte can be a length, and nearly any two.
                (_, 1) => 0.0,
                (Prefix::Varint, _) => 1.0,
                (_, width) => (8.0 * width as f64 - (longest as f64 + 1.0).log2() - 1.0).max(0.0),
            })
            .sum();
        let content = |is_well: fn(&[u8]) -> bool, bits: f64| {
            let mut messages = whole.iter().filter(|(begin, end)| end > begin);
            let all_well = messages.all(|(begin, end)| is_well(&heard.bytes[*begin..*end]));
            if all_well { (bits * (whole.len() - empty) as f64).min(MOST_CONTENT) } else { 0.0 }
        };
        let content = content(fields::may_be_message, PROTOBUF).max(content(is_like_json, JSON));
        let mean = (heard.bytes.len() as f64 / whole.len() as f64).log2();
        let stops = heard.stops.iter().take(MOST_STOPS).filter(|stop| **stop > 0);
        let stops: f64 = stops.map(|stop| if self.has_end(*stop) { mean } else { -2.0 }).sum();
        prefixes + content + stops
    }

    /// Whether a message ends after so many bytes.
    fn has_end(&self, at: usize) -> bool {
        self.spans.binary_search_by_key(&at, |(_, end)| *end).is_ok()
    }
}

/// Whether bytes begin and end as JSON does.
fn is_like_json(bytes: &[u8]) -> bool {
    matches!((bytes.first(), bytes.last()), (Some(b'{'), Some(b'}')) | (Some(b'['), Some(b']')))
}

/// Counts the bits that a telling takes.
struct Bits {
    /// What it takes to say each of so many things that came before, and to say anything at all.
    seen: Vec<f64>,
    any: Vec<f64>,
}

/// How often every byte is taken to have come already, before it has.
const HEAD_START: f64 = 0.5;

impl Bits {
    fn up_to(most: usize) -> Bits {
        let sums = |start: f64| {
            let mut sum = 0.0;
            let mut sums = Vec::with_capacity(most + 1);
            for index in 0..=most {
                sums.push(sum);
                sum += (index as f64 + start).log2();
            }
            sums
        };
        Bits { seen: sums(HEAD_START), any: sums(256.0 * HEAD_START) }
    }

    /// Content of which each byte came so often.
    fn content(&self, counts: &[usize; 256]) -> f64 {
        let all: usize = counts.iter().sum();
        self.any[all] - counts.iter().map(|count| self.seen[*count]).sum::<f64>()
    }

    fn unframed(&self, heard: &Heard<'_>) -> f64 {
        let mut counts = [0; 256];
        heard.bytes.iter().for_each(|byte| counts[usize::from(*byte)] += 1);
        let stops = heard.stops.len().min(MOST_STOPS) + usize::from(heard.has_ended);
        self.content(&counts) + stops as f64 * (heard.bytes.len() as f64 + 1.0).log2()
    }

    fn framed(&self, heard: &Heard<'_>, parse: &Parse) -> f64 {
        let (mut firsts, mut counts) = ([0; 256], [0; 256]);
        let mut lengths = Lengths::default();
        let mut bits = 0.0;
        let mut told = 0;
        for (begin, end) in &parse.spans {
            bits += lengths.next(end - begin);
            told = heard.bytes.len().min(*end);
            let content = &heard.bytes[(*begin).min(told)..told];
            if let Some((first, others)) = content.split_first() {
                firsts[usize::from(*first)] += 1;
                others.iter().for_each(|byte| counts[usize::from(*byte)] += 1);
            }
        }
        // The beginning of a prefix.
        bits += 8.0 * (heard.bytes.len() - told) as f64;
        bits += self.content(&firsts) + self.content(&counts);
        let places = (heard.bytes.len() as f64 + 1.0).log2();
        let ends = (parse.whole as f64 + 1.0).log2();
        let place = |at: usize, between: f64| match at == 0 || parse.has_end(at) {
            true => ends - between.log2(),
            false => places - (1.0 - between).log2(),
        };
        bits += heard.stops.iter().take(MOST_STOPS).map(|stop| place(*stop, STOPS_BETWEEN)).sum::<f64>();
        if heard.has_ended { bits + place(heard.bytes.len(), ENDS_BETWEEN) } else { bits }
    }
}

/// Lengths so far: the more often one has come, the fewer bits it takes; and the more often one of as many bits.
#[derive(Default)]
struct Lengths {
    counts: HashMap<usize, u32>,
    /// By how many bits a length has.
    sizes: [u32; SIZES],
    all: u32,
}

/// From no bits to those of [`LONGEST`].
const SIZES: usize = 28;

impl Lengths {
    fn next(&mut self, length: usize) -> f64 {
        let count = self.counts.entry(length).or_default();
        let size = (usize::BITS - length.leading_zeros()) as usize;
        let all = f64::from(self.all) + 1.0;
        let of_size = (f64::from(self.sizes[size]) + 1.0 / SIZES as f64) / all;
        let new = of_size * f64::exp2(-(size.saturating_sub(1) as f64));
        let bits = -((f64::from(*count) + new) / all).log2();
        *count += 1;
        self.sizes[size] += 1;
        self.all += 1;
        bits
    }
}

#[cfg(test)]
#[path = "guess_tests.rs"]
mod tests;
