//! How a length stands before a message: every framing's prefix, encoded and decoded, and the limits on both.
//!
//! A [`Framing`] is a [`Prefix`] together with a maximum message size that the prefix is known to be able to express.
//! Decoding is strict: there is one way to write a length, and every other way is an error that names what was seen.
//! Nothing in here allocates, and nothing holds state between two frames.

use std::fmt;
use std::str::FromStr;

/// The widest prefix there is: an unsigned varint of 64 bits.
pub(crate) const WIDEST_PREFIX: usize = 10;

/// The default maximum message size in bytes, the one of BuffStreams 2.0 for Go.
pub const DEFAULT_MAX_MESSAGE_SIZE: usize = 4096;

/// The largest maximum that any prefix of more than 32 bits accepts: a varint of eight bytes once doubled by zigzag.
const LARGEST_MAX: u64 = (1 << 55) - 1;

/// The longest control frame of a session, in bytes without its prefix.
pub(crate) const LONGEST_CONTROL: usize = 1024;

/// How the length of a message is written before it.
///
/// Both sides must use the same one; there is no handshake. The names are those of the command line's `--framing`.
///
/// ```
/// use buffstreams::Prefix;
/// assert_eq!("u16be".parse::<Prefix>().unwrap(), Prefix::U16Be);
/// assert_eq!(Prefix::default().name(), "buffstreams");
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Prefix {
    /// BuffStreams 2.0 for Go: the length as a zigzag varint, padded with zero bytes to a width that follows from the
    /// maximum message size. Both sides must therefore agree on the maximum.
    #[default]
    Buffstreams,
    /// An unsigned varint, as written by protobuf's `writeDelimitedTo` and prost's `encode_length_delimited`.
    Varint,
    /// One byte: messages of up to 255 bytes.
    U8,
    /// Two bytes, most significant first.
    U16Be,
    /// Two bytes, least significant first.
    U16Le,
    /// Four bytes, most significant first.
    U32Be,
    /// Four bytes, least significant first.
    U32Le,
    /// Eight bytes, most significant first.
    U64Be,
    /// Eight bytes, least significant first.
    U64Le,
}

impl Prefix {
    /// Every prefix, in the order of the documentation.
    pub const ALL: [Prefix; 9] = [
        Prefix::Buffstreams,
        Prefix::Varint,
        Prefix::U8,
        Prefix::U16Be,
        Prefix::U16Le,
        Prefix::U32Be,
        Prefix::U32Le,
        Prefix::U64Be,
        Prefix::U64Le,
    ];

    /// The name by which the command line and the documentation call it.
    pub fn name(self) -> &'static str {
        match self {
            Prefix::Buffstreams => "buffstreams",
            Prefix::Varint => "varint",
            Prefix::U8 => "u8",
            Prefix::U16Be => "u16be",
            Prefix::U16Le => "u16le",
            Prefix::U32Be => "u32be",
            Prefix::U32Le => "u32le",
            Prefix::U64Be => "u64be",
            Prefix::U64Le => "u64le",
        }
    }

    /// The largest message size in bytes that this prefix can be configured for.
    pub fn largest_max(self) -> usize {
        let largest = match self {
            Prefix::U8 => u64::from(u8::MAX),
            Prefix::U16Be | Prefix::U16Le => u64::from(u16::MAX),
            Prefix::U32Be | Prefix::U32Le => u64::from(u32::MAX),
            Prefix::Buffstreams | Prefix::Varint | Prefix::U64Be | Prefix::U64Le => LARGEST_MAX,
        };
        usize::try_from(largest).unwrap_or(usize::MAX)
    }
}

impl fmt::Display for Prefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for Prefix {
    type Err = FramingError;

    fn from_str(name: &str) -> Result<Self, FramingError> {
        Prefix::ALL
            .into_iter()
            .find(|prefix| prefix.name() == name)
            .ok_or_else(|| FramingError::UnknownPrefix(name.to_owned()))
    }
}

/// A [`Prefix`] and the maximum message size that goes with it, known to fit each other.
///
/// With the feature `codec` it is also a `tokio_util::codec` encoder and decoder.
///
/// ```
/// use buffstreams::{Framing, Prefix};
///
/// let framing = Framing::with_max(Prefix::Varint, 64 * 1024)?;
/// let mut frame = Vec::new();
/// framing.encode(b"hello", &mut frame)?;
/// assert_eq!(frame, b"\x05hello");
///
/// // 255 bytes are all that one byte of length can announce.
/// assert!(Framing::with_max(Prefix::U8, 256).is_err());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Framing {
    prefix: Prefix,
    /// Bytes of a prefix; for `Varint`, whose prefixes vary, the widest that a legal length needs.
    width: u8,
    max: usize,
}

/// A decoded prefix: its own width, and the length of the message behind it. Both in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) prefix: usize,
    pub(crate) message: usize,
}

impl Header {
    pub(crate) fn frame(self) -> usize {
        self.prefix + self.message
    }
}

impl Default for Framing {
    fn default() -> Self {
        Framing::new(Prefix::default())
    }
}

impl Framing {
    /// This prefix with its default maximum: 4096 bytes, or what the prefix can express where that is less.
    pub fn new(prefix: Prefix) -> Framing {
        Framing::sized(prefix, DEFAULT_MAX_MESSAGE_SIZE.min(prefix.largest_max()))
    }

    /// This prefix with a maximum message size in bytes; 0 stands for the default.
    ///
    /// # Errors
    ///
    /// [`FramingError::MaxTooLarge`] if the prefix cannot express the maximum.
    pub fn with_max(prefix: Prefix, max_message_size: usize) -> Result<Framing, FramingError> {
        match max_message_size {
            0 => Ok(Framing::new(prefix)),
            max if max > prefix.largest_max() => {
                Err(FramingError::MaxTooLarge { prefix, max, largest: prefix.largest_max() })
            }
            max => Ok(Framing::sized(prefix, max)),
        }
    }

    fn sized(prefix: Prefix, max: usize) -> Framing {
        let bits = (usize::BITS - max.leading_zeros()) as u8;
        let width = match prefix {
            // The rule of BuffStreams 2.0 for Go: the bytes that the maximum takes, and one more.
            Prefix::Buffstreams => bits.div_ceil(8) + 1,
            Prefix::Varint => bits.div_ceil(7),
            Prefix::U8 => 1,
            Prefix::U16Be | Prefix::U16Le => 2,
            Prefix::U32Be | Prefix::U32Le => 4,
            Prefix::U64Be | Prefix::U64Le => 8,
        };
        Framing { prefix, width, max }
    }

    /// What a session speaks whose largest message has so many bytes: `buffstreams`, with a prefix that is wide enough
    /// for control frames too.
    pub(crate) fn for_session(max_message_size: usize) -> Result<Framing, FramingError> {
        let Framing { prefix, max, .. } = Framing::with_max(Prefix::Buffstreams, max_message_size)?;
        Ok(Framing { max, ..Framing::sized(prefix, max.max(LONGEST_CONTROL)) })
    }

    /// How lengths are written.
    pub fn prefix(&self) -> Prefix {
        self.prefix
    }

    /// The largest message, in bytes, that may be sent or received.
    pub fn max_message_size(&self) -> usize {
        self.max
    }

    /// Appends one frame, prefix and message, to `out`.
    ///
    /// # Errors
    ///
    /// [`FrameError::TooLarge`] if the message is over the maximum; `out` is then unchanged.
    pub fn encode(&self, message: &[u8], out: &mut Vec<u8>) -> Result<(), FrameError> {
        self.check(message.len())?;
        self.put_prefix(message.len(), out);
        out.extend_from_slice(message);
        Ok(())
    }

    /// Finds the first frame in `bytes`: the message, and how many bytes the whole frame takes.
    ///
    /// `None` means that the frame is not complete yet.
    ///
    /// # Errors
    ///
    /// Any [`FrameError`] but the two of a stream's end: the prefix is not one that this framing allows.
    pub fn decode<'a>(&self, bytes: &'a [u8]) -> Result<Option<(&'a [u8], usize)>, FrameError> {
        let Some(header) = self.header(bytes)? else { return Ok(None) };
        Ok(bytes.get(header.prefix..header.frame()).map(|message| (message, header.frame())))
    }

    /// Whether a message of this length may be sent.
    #[inline]
    pub(crate) fn check(&self, length: usize) -> Result<(), FrameError> {
        if length > self.max {
            return Err(FrameError::TooLarge { declared: length as u64, max: self.max });
        }
        Ok(())
    }

    /// Bytes that the prefix of a message of this length takes.
    #[inline]
    pub(crate) fn prefix_width(&self, length: usize) -> usize {
        match self.prefix {
            Prefix::Varint => ((usize::BITS - (length | 1).leading_zeros()) as usize).div_ceil(7),
            _ => usize::from(self.width),
        }
    }

    /// Appends the prefix of a message of this length, which the caller has [checked](Self::check).
    #[inline]
    pub(crate) fn put_prefix(&self, length: usize, out: &mut Vec<u8>) {
        // A store of eight bytes and a cut are cheaper than a copy of a width that is known only at run time.
        let (bytes, width) = self.prefix_bytes(length);
        let end = out.len() + width;
        out.extend_from_slice(&bytes);
        out.truncate(end);
    }

    /// The prefix of a message of this length, which the caller has [checked](Self::check), and its width. The bytes
    /// behind it mean nothing.
    #[inline]
    pub(crate) fn prefix_bytes(&self, length: usize) -> ([u8; 8], usize) {
        debug_assert!(length <= self.max);
        let length = length as u64;
        let word = match self.prefix {
            Prefix::Buffstreams => spread(length << 1),
            Prefix::Varint => spread(length),
            Prefix::U8 | Prefix::U16Le | Prefix::U32Le | Prefix::U64Le => length,
            Prefix::U16Be => length.swap_bytes() >> 48,
            Prefix::U32Be => length.swap_bytes() >> 32,
            Prefix::U64Be => length.swap_bytes(),
        };
        (word.to_le_bytes(), self.prefix_width(length as usize))
    }

    /// Reads the prefix at the start of `bytes`; `None` if it is not complete yet.
    #[inline]
    pub(crate) fn header(&self, bytes: &[u8]) -> Result<Option<Header>, FrameError> {
        let word = bytes.first_chunk().map(|word| u64::from_le_bytes(*word));
        match word.and_then(|word| self.legal_header(word)) {
            Some(header) => Ok(Some(header)),
            None => self.unusual_header(bytes),
        }
    }

    /// The prefix in the low bytes of a word, if it is a legal one.
    #[inline(always)]
    fn legal_header(&self, word: u64) -> Option<Header> {
        let width = usize::from(self.width);
        let (prefix, length) = match self.prefix {
            Prefix::Buffstreams => {
                let word = keep(word, width);
                let zigzag = squeeze(word);
                if !is_shortest(word) || zigzag & 1 == 1 {
                    return None;
                }
                (width, zigzag >> 1)
            }
            Prefix::Varint => {
                let taken = ends_after(word)?;
                let word = keep(word, taken);
                if !is_shortest(word) {
                    return None;
                }
                (taken, squeeze(word))
            }
            Prefix::U8 | Prefix::U16Le | Prefix::U32Le | Prefix::U64Le => (width, keep(word, width)),
            Prefix::U16Be => (width, word.swap_bytes() >> 48),
            Prefix::U32Be => (width, word.swap_bytes() >> 32),
            Prefix::U64Be => (width, word.swap_bytes()),
        };
        (length <= self.max as u64).then_some(Header { prefix, message: length as usize })
    }

    /// The rest of [`header`](Self::header): few bytes, or a prefix that is torn or malformed.
    #[cold]
    fn unusual_header(&self, bytes: &[u8]) -> Result<Option<Header>, FrameError> {
        let word = first_word(bytes);
        if let Some(header) = self.legal_header(word).filter(|header| header.prefix <= bytes.len()) {
            return Ok(Some(header));
        }
        let width = usize::from(self.width);
        let declared = match self.prefix {
            Prefix::Varint => match ends_after(word) {
                None => return self.long_varint(bytes),
                Some(taken) if taken > bytes.len() => return Ok(None),
                Some(taken) if !is_shortest(keep(word, taken)) => {
                    return Err(self.malformed(bytes, PrefixFault::NotShortest));
                }
                Some(taken) => squeeze(keep(word, taken)),
            },
            _ if bytes.len() < width => return Ok(None),
            Prefix::Buffstreams => {
                let word = keep(word, width);
                match ends_after(word) {
                    Some(taken) if taken <= width => {
                        if taken > 1 && word >> (8 * (taken - 1)) & 0xff == 0 {
                            return Err(self.malformed(bytes, PrefixFault::NotShortest));
                        }
                        if !is_shortest(word) {
                            return Err(self.malformed(bytes, PrefixFault::Padding));
                        }
                    }
                    _ => return Err(self.malformed(bytes, PrefixFault::Unterminated)),
                }
                let zigzag = squeeze(word);
                if zigzag & 1 == 1 {
                    return Err(FrameError::Negative { declared: -((zigzag >> 1) as i64) - 1, max: self.max });
                }
                zigzag >> 1
            }
            Prefix::U8 | Prefix::U16Le | Prefix::U32Le | Prefix::U64Le => keep(word, width),
            Prefix::U16Be => word.swap_bytes() >> 48,
            Prefix::U32Be => word.swap_bytes() >> 32,
            Prefix::U64Be => word.swap_bytes(),
        };
        Err(FrameError::TooLarge { declared, max: self.max })
    }

    /// A varint whose first eight bytes do not end it can only be an error, or the beginning of one: no legal length
    /// takes more than eight. It is read to its end so that the error can name the length.
    #[cold]
    fn long_varint(&self, bytes: &[u8]) -> Result<Option<Header>, FrameError> {
        let mut declared: u64 = 0;
        for (index, &byte) in bytes.iter().take(WIDEST_PREFIX).enumerate() {
            if index == WIDEST_PREFIX - 1 && byte > 1 {
                return Err(self.malformed(bytes, PrefixFault::Unterminated));
            }
            declared |= u64::from(byte & 0x7f) << (7 * index);
            if byte & 0x80 == 0 {
                if byte == 0 && index > 0 {
                    return Err(self.malformed(bytes, PrefixFault::NotShortest));
                }
                return Err(FrameError::TooLarge { declared, max: self.max });
            }
        }
        Ok(None)
    }

    /// In a session, the measures of a control frame: one whose prefix [`header`](Self::header) refused as negative. Any
    /// other refusal stands.
    #[cold]
    pub(crate) fn control_header(&self, refused: FrameError) -> Result<Header, FrameError> {
        match refused {
            FrameError::Negative { declared, .. } if declared.unsigned_abs() <= LONGEST_CONTROL as u64 => {
                Ok(Header { prefix: usize::from(self.width), message: declared.unsigned_abs() as usize })
            }
            FrameError::Negative { declared, .. } => {
                Err(FrameError::ControlTooLarge { declared: declared.unsigned_abs(), max: LONGEST_CONTROL })
            }
            refused => Err(refused),
        }
    }

    /// Appends a control frame, of 1 to [`LONGEST_CONTROL`] bytes, in a framing [for sessions](Self::for_session).
    pub(crate) fn put_control(&self, control: &[u8], out: &mut Vec<u8>) {
        debug_assert!((1..=LONGEST_CONTROL).contains(&control.len()) && self.prefix == Prefix::Buffstreams);
        // The zigzag of a negative length.
        let word = spread(2 * control.len() as u64 - 1);
        out.extend_from_slice(&word.to_le_bytes()[..usize::from(self.width)]);
        out.extend_from_slice(control);
    }

    #[cold]
    fn malformed(&self, bytes: &[u8], fault: PrefixFault) -> FrameError {
        let width = match self.prefix {
            Prefix::Varint => bytes.iter().take_while(|byte| **byte & 0x80 != 0).count() + 1,
            _ => usize::from(self.width),
        };
        FrameError::MalformedPrefix { seen: PrefixBytes::new(&bytes[..width.min(bytes.len())]), fault, max: self.max }
    }

    /// What to call an end of stream that came with these bytes still waiting for their frame to be complete.
    pub(crate) fn truncated(&self, bytes: &[u8]) -> FrameError {
        match self.header(bytes).or_else(|refused| self.control_header(refused).map(Some)) {
            Ok(Some(header)) => FrameError::Truncated { got: bytes.len() - header.prefix, want: header.message },
            _ => FrameError::TruncatedPrefix { got: bytes.len() },
        }
    }
}

/// The first eight bytes as one little-endian word; zeros where there are fewer.
#[inline]
fn first_word(bytes: &[u8]) -> u64 {
    match bytes.first_chunk::<8>() {
        Some(word) => u64::from_le_bytes(*word),
        None => {
            let mut word = [0; 8];
            word[..bytes.len()].copy_from_slice(bytes);
            u64::from_le_bytes(word)
        }
    }
}

/// The low `bytes` bytes of a word. At most eight.
#[inline]
fn keep(word: u64, bytes: usize) -> u64 {
    debug_assert!((1..=8).contains(&bytes));
    word & (u64::MAX >> (64 - 8 * bytes))
}

/// The bits of a word that say of its bytes that more of a varint follows.
const MORE: u64 = 0x8080_8080_8080_8080;

/// Writes a number below 2^56 as a varint, least significant byte first in the word.
#[inline]
fn spread(number: u64) -> u64 {
    debug_assert!(number < 1 << 56);
    if number < 1 << 7 {
        return number;
    }
    if number < 1 << 14 {
        return 0x80 | (number & 0x7f) | (number << 1 & 0x7f00);
    }
    // Open the gaps by halves: 28 bits each, then 14, then 7.
    let word = (number & 0x0000_0000_0fff_ffff) | ((number & 0x00ff_ffff_f000_0000) << 4);
    let word = (word & 0x0000_3fff_0000_3fff) | ((word & 0x0fff_c000_0fff_c000) << 2);
    let word = (word & 0x007f_007f_007f_007f) | ((word & 0x3f80_3f80_3f80_3f80) << 1);
    word | below_last_byte(word)
}

/// The number of a varint that the word holds and nothing else.
#[inline]
fn squeeze(word: u64) -> u64 {
    if word < 1 << 16 {
        return (word & 0x7f) | (word >> 1 & 0x3f80);
    }
    // Close the gaps by doubling: 14 bits, then 28, then 56.
    let word = (word & 0x007f_007f_007f_007f) | ((word & 0x7f00_7f00_7f00_7f00) >> 1);
    let word = (word & 0x0000_3fff_0000_3fff) | ((word & 0x3fff_0000_3fff_0000) >> 2);
    (word & 0x0000_0000_0fff_ffff) | ((word & 0x0fff_ffff_0000_0000) >> 4)
}

/// How many bytes the varint at the low end of a word takes. `None` if all eight say that more follows.
#[inline]
fn ends_after(word: u64) -> Option<usize> {
    let ends = !word & MORE;
    (ends != 0).then(|| ends.trailing_zeros() as usize / 8 + 1)
}

/// Whether a word is one varint with zeros behind it, in its shortest form: then its last byte that is not zero is the
/// first that says that nothing follows.
#[inline]
fn is_shortest(word: u64) -> bool {
    word & MORE == below_last_byte(word)
}

/// [`MORE`], for every byte below the last one that is not zero.
#[inline]
fn below_last_byte(word: u64) -> u64 {
    let last = 63 - (word | 1).leading_zeros();
    MORE & ((1 << (last & !7)) - 1)
}

/// Why a framing cannot be built.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum FramingError {
    /// No prefix has this name.
    UnknownPrefix(String),
    /// The prefix cannot express the maximum that was asked for.
    MaxTooLarge {
        /// The prefix.
        prefix: Prefix,
        /// The maximum asked for, in bytes.
        max: usize,
        /// The largest maximum that the prefix can express, in bytes.
        largest: usize,
    },
}

impl fmt::Display for FramingError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            FramingError::UnknownPrefix(name) => {
                write!(f, "no framing is called {name:?}; there are")?;
                Prefix::ALL
                    .into_iter()
                    .enumerate()
                    .try_for_each(|(index, prefix)| write!(f, "{}{prefix}", if index == 0 { " " } else { ", " }))
            }
            FramingError::MaxTooLarge { prefix, max, largest } => {
                write!(f, "a maximum of {max} bytes does not fit the framing {prefix}, whose largest is {largest}")
            }
        }
    }
}

impl std::error::Error for FramingError {}

/// Bytes that are not a frame, as found by a receiver; or a message too large to become one.
///
/// On the receiving side it ends the connection that the bytes came from, and nothing else.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum FrameError {
    /// The length is over the maximum message size.
    TooLarge {
        /// The length declared, in bytes.
        declared: u64,
        /// The maximum allowed, in bytes.
        max: usize,
    },
    /// The length is below zero, which only the framing `buffstreams` can express.
    Negative {
        /// The length declared.
        declared: i64,
        /// The maximum allowed, in bytes.
        max: usize,
    },
    /// A control frame of a session is longer than they may be.
    ControlTooLarge {
        /// The length declared, in bytes.
        declared: u64,
        /// The maximum allowed, in bytes.
        max: usize,
    },
    /// The prefix is not the one way to write a length.
    MalformedPrefix {
        /// The prefix.
        seen: PrefixBytes,
        /// What is wrong with it.
        fault: PrefixFault,
        /// The maximum allowed, in bytes.
        max: usize,
    },
    /// The stream ended inside a message.
    Truncated {
        /// Bytes of the message that came.
        got: usize,
        /// Bytes that its prefix declared.
        want: usize,
    },
    /// The stream ended inside a prefix.
    TruncatedPrefix {
        /// Bytes of the prefix that came.
        got: usize,
    },
}

/// What is wrong with a prefix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum PrefixFault {
    /// A varint that does not end within the bytes that a prefix may take.
    Unterminated,
    /// A varint that fewer bytes could have expressed.
    NotShortest,
    /// A byte other than zero in the padding behind the length.
    Padding,
}

/// The bytes of a prefix, as they were received. At most ten.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct PrefixBytes {
    bytes: [u8; WIDEST_PREFIX],
    length: u8,
}

impl PrefixBytes {
    fn new(seen: &[u8]) -> PrefixBytes {
        let length = seen.len().min(WIDEST_PREFIX);
        let mut bytes = [0; WIDEST_PREFIX];
        bytes[..length].copy_from_slice(&seen[..length]);
        PrefixBytes { bytes, length: length as u8 }
    }

    /// The bytes themselves.
    pub fn as_slice(&self) -> &[u8] {
        &self.bytes[..usize::from(self.length)]
    }
}

impl fmt::Display for PrefixBytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.as_slice()
            .iter()
            .enumerate()
            .try_for_each(|(index, byte)| write!(f, "{}{byte:02x}", if index == 0 { "" } else { " " }))
    }
}

impl fmt::Debug for PrefixBytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "[{self}]")
    }
}

impl fmt::Display for FrameError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            FrameError::TooLarge { declared, max } => {
                write!(f, "a message of {declared} bytes was declared, and the maximum is {max}")
            }
            FrameError::Negative { declared, max } => {
                write!(f, "a message of {declared} bytes was declared, and a length is from 0 to {max}")
            }
            FrameError::ControlTooLarge { declared, max } => {
                write!(f, "a control frame of {declared} bytes was declared, and the maximum is {max}")
            }
            FrameError::MalformedPrefix { seen, fault, max } => {
                let fault = match fault {
                    PrefixFault::Unterminated => "its varint does not end",
                    PrefixFault::NotShortest => "fewer bytes could say the same",
                    PrefixFault::Padding => "the padding behind a length is of zero bytes",
                };
                write!(f, "malformed prefix {seen}: {fault} (lengths are from 0 to {max}; ")?;
                // Records of a handshake, and alerts, of any version.
                f.write_str(match &seen.bytes[..usize::from(seen.length)] {
                    [0x15 | 0x16, 3, ..] => "this looks like TLS, which the other side speaks and this one does not)",
                    _ => "do both sides use the same framing and maximum?)",
                })
            }
            FrameError::Truncated { got, want } => {
                write!(f, "the stream ended {got} bytes into a message of {want}")
            }
            FrameError::TruncatedPrefix { got } => {
                write!(f, "the stream ended {got} bytes into a prefix")
            }
        }
    }
}

impl std::error::Error for FrameError {}

#[cfg(test)]
#[path = "framing_tests.rs"]
mod tests;
