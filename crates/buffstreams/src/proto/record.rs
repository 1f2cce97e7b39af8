//! What a spool keeps on disk: consecutive messages as one record, and a message that the receiver refused.
//!
//! A record is `crc32 | count | frames`, all integers little-endian and of four bytes; each frame is a varint length and
//! that many bytes. The checksum covers the number of the first message too, which is the record's name, so a record that
//! turns up under another name is found out. A refused message is `crc32 | code | seconds | length of text | text | message`.
//! It refuses to read anything that it would not have written.

use std::fmt;

use bytes::{Buf, BufMut, Bytes};

use super::framing::{Framing, Prefix};
use super::outbox::Rejection;

/// Bytes before the first frame.
const HEAD: usize = 8;

fn framing() -> Framing {
    Framing::with_max(Prefix::Varint, Prefix::Varint.largest_max()).expect("a prefix expresses its own largest maximum")
}

/// A record that is being written.
#[derive(Debug)]
pub(crate) struct RecordWriter {
    bytes: Vec<u8>,
    count: u32,
    framing: Framing,
}

impl Default for RecordWriter {
    fn default() -> RecordWriter {
        RecordWriter { bytes: Vec::new(), count: 0, framing: framing() }
    }
}

impl RecordWriter {
    /// Bytes that a message of this length takes.
    pub(crate) fn cost(&self, length: usize) -> usize {
        self.framing.prefix_width(length) + length
    }

    pub(crate) fn push(&mut self, message: &[u8]) {
        if self.bytes.is_empty() {
            self.bytes.resize(HEAD, 0);
        }
        self.framing.put_prefix(message.len(), &mut self.bytes);
        self.bytes.extend_from_slice(message);
        self.count += 1;
    }

    pub(crate) fn count(&self) -> u64 {
        u64::from(self.count)
    }

    /// Bytes of frames so far.
    pub(crate) fn len(&self) -> usize {
        self.bytes.len().saturating_sub(HEAD)
    }

    /// The record, whose first message has this number; the writer is empty again.
    pub(crate) fn finish(&mut self, first: u64) -> Bytes {
        let count = std::mem::take(&mut self.count);
        let mut bytes = std::mem::take(&mut self.bytes);
        bytes[4..HEAD].copy_from_slice(&count.to_le_bytes());
        let sum = checksum(first, &bytes[4..]);
        bytes[..4].copy_from_slice(&sum.to_le_bytes());
        Bytes::from(bytes)
    }
}

/// A record that was read.
#[derive(Clone, Debug)]
pub(crate) struct Record {
    /// The number of the first message that is left.
    first: u64,
    left: u64,
    frames: Bytes,
}

/// Why a record or a refused message cannot be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unreadable {
    Short(usize),
    Checksum {
        stored: u32,
        computed: u32,
    },
    /// The format of another version.
    Format(u32),
    /// The checksum is right, and still it cannot be: it was not written by this library.
    Malformed,
}

impl Record {
    /// Reads the record whose first message has this number.
    pub(crate) fn read(first: u64, mut bytes: Bytes) -> Result<Record, Unreadable> {
        if bytes.len() < HEAD {
            return Err(Unreadable::Short(bytes.len()));
        }
        check(first, &bytes)?;
        bytes.advance(4);
        let left = u64::from(bytes.get_u32_le());
        let record = Record { first, left, frames: bytes };
        let (framing, mut at) = (framing(), 0);
        for _ in 0..left {
            let header = framing.header(&record.frames[at..]).ok().flatten().ok_or(Unreadable::Malformed)?;
            at += header.frame();
            if at > record.frames.len() {
                return Err(Unreadable::Malformed);
            }
        }
        let is_whole = at == record.frames.len() && left > 0 && first.checked_add(left).is_some();
        if is_whole { Ok(record) } else { Err(Unreadable::Malformed) }
    }

    /// The number behind the last message.
    pub(crate) fn end(&self) -> u64 {
        self.first + self.left
    }

    /// Bytes of the frames that are left.
    pub(crate) fn len(&self) -> usize {
        self.frames.len()
    }
}

impl Iterator for Record {
    type Item = (u64, Bytes);

    fn next(&mut self) -> Option<(u64, Bytes)> {
        if self.left == 0 {
            return None;
        }
        let header = framing().header(&self.frames).ok().flatten().expect("it was checked when it was read");
        self.frames.advance(header.prefix);
        let message = self.frames.split_to(header.message);
        self.first += 1;
        self.left -= 1;
        Some((self.first - 1, message))
    }
}

/// A message that the receiver refused, as it is kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct RefusedRecord {
    pub(crate) rejection: Rejection,
    /// Seconds since 1970 when that was heard.
    pub(crate) seconds: u64,
    pub(crate) message: Bytes,
}

impl RefusedRecord {
    pub(crate) fn write(&self, number: u64) -> Vec<u8> {
        let text = self.rejection.text.as_bytes();
        let mut bytes = Vec::with_capacity(20 + text.len() + self.message.len());
        bytes.put_u32_le(0);
        bytes.put_u32_le(self.rejection.code);
        bytes.put_u64_le(self.seconds);
        bytes.put_u32_le(u32::try_from(text.len()).expect("a rejection's text is short"));
        bytes.put_slice(text);
        bytes.put_slice(&self.message);
        let sum = checksum(number, &bytes[4..]);
        bytes[..4].copy_from_slice(&sum.to_le_bytes());
        bytes
    }

    pub(crate) fn read(number: u64, mut bytes: Bytes) -> Result<RefusedRecord, Unreadable> {
        if bytes.len() < 20 {
            return Err(Unreadable::Short(bytes.len()));
        }
        check(number, &bytes)?;
        bytes.advance(4);
        let (code, seconds) = (bytes.get_u32_le(), bytes.get_u64_le());
        let length = bytes.get_u32_le() as usize;
        if length > bytes.len() {
            return Err(Unreadable::Malformed);
        }
        let text = String::from_utf8(bytes.split_to(length).into()).map_err(|_| Unreadable::Malformed)?;
        Ok(RefusedRecord { rejection: Rejection { code, text }, seconds, message: bytes })
    }
}

/// What a spool knows of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct SpoolState {
    pub(crate) stream: u128,
    /// How often it was opened to be sent from.
    pub(crate) starts: u64,
    /// The number of the next message, and the lowest whose fate is not known.
    pub(crate) end: u64,
    pub(crate) done: u64,
    /// A message that the receiver claimed to have, and that was never sent from here; 0 if it claimed none.
    pub(crate) unsent: u64,
}

/// Bytes of a state: checksum, format, stream, and four numbers.
const STATE: usize = 4 + 4 + 16 + 4 * 8;

impl SpoolState {
    /// The format of what is stored. Another one is refused.
    pub(crate) const FORMAT: u32 = 1;

    pub(crate) fn write(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(STATE);
        bytes.put_u32_le(0);
        bytes.put_u32_le(SpoolState::FORMAT);
        bytes.put_u128_le(self.stream);
        for number in [self.starts, self.end, self.done, self.unsent] {
            bytes.put_u64_le(number);
        }
        let sum = checksum(0, &bytes[4..]);
        bytes[..4].copy_from_slice(&sum.to_le_bytes());
        bytes
    }

    pub(crate) fn read(mut bytes: &[u8]) -> Result<SpoolState, Unreadable> {
        if bytes.len() != STATE {
            return Err(Unreadable::Short(bytes.len()));
        }
        check(0, bytes)?;
        bytes.advance(4);
        let format = bytes.get_u32_le();
        if format != SpoolState::FORMAT {
            return Err(Unreadable::Format(format));
        }
        let stream = bytes.get_u128_le();
        let [starts, end, done, unsent] = std::array::from_fn(|_| bytes.get_u64_le());
        let state = SpoolState { stream, starts, end, done, unsent };
        if (1..=end).contains(&done) { Ok(state) } else { Err(Unreadable::Malformed) }
    }
}

fn check(number: u64, bytes: &[u8]) -> Result<(), Unreadable> {
    let stored = (&bytes[..4]).get_u32_le();
    let computed = checksum(number, &bytes[4..]);
    if stored == computed { Ok(()) } else { Err(Unreadable::Checksum { stored, computed }) }
}

/// Puts the checksum of a record or a refused message right.
#[cfg(any(test, fuzzing))]
pub(crate) fn sign(number: u64, bytes: &mut [u8]) {
    if bytes.len() >= 4 {
        let sum = checksum(number, &bytes[4..]);
        bytes[..4].copy_from_slice(&sum.to_le_bytes());
    }
}

fn checksum(number: u64, bytes: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&number.to_le_bytes());
    hasher.update(bytes);
    hasher.finalize()
}

impl fmt::Display for Unreadable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Unreadable::Short(bytes) => write!(f, "only {bytes} bytes are left of it"),
            Unreadable::Checksum { stored, computed } => {
                write!(f, "its checksum is {computed:08x}, and {stored:08x} was stored")
            }
            Unreadable::Format(format) => {
                write!(f, "it has format {format}, and this version knows {}", SpoolState::FORMAT)
            }
            Unreadable::Malformed => f.write_str("it is not what this library writes"),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn write(first: u64, messages: &[Vec<u8>]) -> Bytes {
        let mut writer = RecordWriter::default();
        let mut expected = 0;
        for message in messages {
            expected += writer.cost(message.len());
            writer.push(message);
        }
        assert_eq!((writer.len(), writer.count()), (expected, messages.len() as u64));
        let record = writer.finish(first);
        assert_eq!((writer.len(), writer.count()), (0, 0));
        record
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(
            first in 1..u64::MAX / 2,
            messages in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..300), 1..40),
        ) {
            let record = Record::read(first, write(first, &messages)).expect("it was just written");
            prop_assert_eq!(record.end(), first + messages.len() as u64);
            let read: Vec<_> = record.collect();
            let expected: Vec<_> = (first..).zip(messages.into_iter().map(Bytes::from)).collect();
            prop_assert_eq!(read, expected);
        }

        #[test]
        fn one_flipped_bit_is_found(
            messages in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..30), 1..5),
            at in any::<prop::sample::Index>(),
            bit in 0..8,
        ) {
            let mut bytes = Vec::from(write(7, &messages));
            let at = at.index(bytes.len());
            bytes[at] ^= 1_u8 << bit;
            prop_assert!(Record::read(7, bytes.into()).is_err());
        }

        #[test]
        fn whatever_is_stored_reads_without_a_panic(number in any::<u64>(), bytes in prop::collection::vec(any::<u8>(), 0..80)) {
            let mut signed = bytes.clone();
            sign(number, &mut signed);
            for bytes in [bytes, signed] {
                if let Ok(record) = Record::read(number, bytes.clone().into()) {
                    prop_assert_eq!(record.end() - number, record.count() as u64, "every message that it counts is there");
                }
                let _ = SpoolState::read(&bytes);
                let _ = RefusedRecord::read(number, bytes.into());
            }
        }

        #[test]
        fn a_state_is_read_as_it_was_written(stream in any::<u128>(), starts in any::<u64>(), end in 1..u64::MAX, bit in 0..8 * STATE) {
            let state = SpoolState { stream, starts, end, done: end / 2 + 1, unsent: 0 };
            let mut bytes = state.write();
            prop_assert_eq!(SpoolState::read(&bytes), Ok(state));
            bytes[bit / 8] ^= 1 << (bit % 8);
            prop_assert!(SpoolState::read(&bytes).is_err());
        }

        #[test]
        fn a_state_of_another_format_or_that_cannot_be_is_refused(stream in any::<u128>(), end in 1..u64::MAX, format in any::<u32>()) {
            let state = SpoolState { stream, starts: 1, end, done: end, unsent: 0 };
            for impossible in [SpoolState { done: 0, ..state }, SpoolState { done: end + 1, ..state }] {
                prop_assert_eq!(SpoolState::read(&impossible.write()), Err(Unreadable::Malformed));
            }
            let mut bytes = state.write();
            bytes[4..8].copy_from_slice(&format.to_le_bytes());
            sign(0, &mut bytes);
            let expected = if format == SpoolState::FORMAT { Ok(state) } else { Err(Unreadable::Format(format)) };
            prop_assert_eq!(SpoolState::read(&bytes), expected);
        }

        #[test]
        fn a_refused_message_is_read_as_it_was_written(code in any::<u32>(), text in ".{0,80}", message in any::<Vec<u8>>(), number in any::<u64>()) {
            let refused = RefusedRecord { rejection: Rejection { code, text }, seconds: 1_800_000_000, message: message.into() };
            let bytes = Bytes::from(refused.write(number));
            prop_assert_eq!(RefusedRecord::read(number, bytes.clone()), Ok(refused));
            prop_assert!(RefusedRecord::read(number ^ 1, bytes).is_err(), "it stands under another number");
        }
    }
}
