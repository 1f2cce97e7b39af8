//! What the messages of a bench say: their number, and bytes that follow from it, so that every byte of an answer is known.
//!
//! It is text of one line, so that a listener that prints it does no harm to a terminal.

use std::fmt;
use std::str::FromStr;

use crate::args::parse_size;

/// Bytes of the number, and so of the least message.
const NUMBER: usize = 16;

/// The stretch that follows the number begins at one of so many places.
const STARTS: usize = 64;

/// How many bytes messages have: always as many, or anything from the least to the most.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Sizes {
    pub(crate) least: usize,
    pub(crate) most: usize,
}

impl Sizes {
    /// The size of the message with this number.
    #[inline]
    pub(crate) fn of(&self, number: u64) -> usize {
        if self.least == self.most { self.least } else { self.least + mixed(number) as usize % self.span() }
    }

    pub(crate) fn mean(&self) -> f64 {
        (self.least + self.most) as f64 / 2.0
    }

    fn span(&self) -> usize {
        self.most - self.least + 1
    }
}

/// The finalizer of SplitMix64: neighbours become strangers.
fn mixed(number: u64) -> u64 {
    let number = (number ^ (number >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let number = (number ^ (number >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    (number ^ (number >> 31)) >> 1
}

impl FromStr for Sizes {
    type Err = String;

    fn from_str(text: &str) -> Result<Sizes, String> {
        let (least, most) = text.split_once("..").unwrap_or((text, text));
        let (least, most) = (parse_size(least)?, parse_size(most)?);
        match (least < NUMBER, least > most) {
            (true, _) => Err(format!("a message needs {NUMBER} bytes for its number")),
            (_, true) => Err("write the smaller size first: 64..4KiB".to_owned()),
            _ => Ok(Sizes { least, most }),
        }
    }
}

impl fmt::Display for Sizes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.least == self.most {
            true => write!(f, "{}", self.least),
            false => write!(f, "{} to {}", self.least, self.most),
        }
    }
}

/// Writes messages, and knows them again.
#[derive(Debug)]
pub(crate) struct Content {
    sizes: Sizes,
    /// What follows numbers, from any of the [`STARTS`].
    text: Vec<u8>,
}

impl Content {
    pub(crate) fn new(sizes: Sizes) -> Content {
        let letters = (0_u64..).map(|index| b"abcdefghijklmnopqrstuvwxyz012345"[mixed(index) as usize % 32]);
        Content { sizes, text: letters.take(sizes.most + STARTS).collect() }
    }

    pub(crate) fn sizes(&self) -> Sizes {
        self.sizes
    }

    /// The message with this number, in place of what `message` was.
    #[inline]
    pub(crate) fn write(&self, number: u64, message: &mut Vec<u8>) {
        message.resize(NUMBER, 0);
        const_hex::encode_to_slice(number.to_be_bytes(), message).expect("two digits a byte");
        message.extend_from_slice(self.rest(number));
    }

    /// The number of this message, if it is whole and unchanged.
    #[inline]
    pub(crate) fn read(&self, message: &[u8]) -> Option<u64> {
        let (digits, rest) = message.split_at_checked(NUMBER)?;
        let mut number = [0; NUMBER / 2];
        const_hex::decode_to_slice(digits, &mut number).ok()?;
        let number = u64::from_be_bytes(number);
        (rest == self.rest(number)).then_some(number)
    }

    fn rest(&self, number: u64) -> &[u8] {
        &self.text[number as usize % STARTS..][..self.sizes.of(number) - NUMBER]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_is_known_again_and_any_change_to_it_is_noticed() {
        for sizes in [Sizes { least: 16, most: 16 }, Sizes { least: 16, most: 300 }] {
            let content = Content::new(sizes);
            let mut message = Vec::new();
            for number in (0..500).chain([u64::MAX]) {
                content.write(number, &mut message);
                assert!((sizes.least..=sizes.most).contains(&message.len()));
                assert_eq!(content.read(&message), Some(number));
                assert_eq!(content.read(&message[1..]), None);
                let last = message.len() - 1;
                message[last] ^= 1;
                assert_ne!(content.read(&message), Some(number));
            }
        }
    }

    #[test]
    fn sizes_are_one_or_a_range() {
        assert_eq!("110".parse(), Ok(Sizes { least: 110, most: 110 }));
        assert_eq!("64..4KiB".parse(), Ok(Sizes { least: 64, most: 4096 }));
        for text in ["15", "4KiB..64", "64..", "..64", "64-128"] {
            assert!(text.parse::<Sizes>().is_err(), "{text}");
        }
        let sizes = Sizes { least: 16, most: 19 };
        let mut seen = (0..100).map(|number| sizes.of(number)).collect::<Vec<_>>();
        seen.sort_unstable();
        seen.dedup();
        assert_eq!(seen, [16, 17, 18, 19]);
    }
}
