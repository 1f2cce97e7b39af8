//! What `send` reads: bytes from a file or a pipe in, messages out, one at a time and lent. `export` opens its file here, too.
//!
//! Memory is bounded whatever comes in: a message over the maximum is passed over byte by byte (to a temporary file where
//! the bytes are still wanted), never gathered. What cannot become a message is handed out as [`Unsendable`] with its
//! place and the reason, and reading goes on behind it. Nothing in here reports, counts or sends.

use std::fmt;
use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::ops::Range;
use std::path::Path;
use std::thread;

use bytes::Bytes;
use memchr::memchr;
use tokio::sync::mpsc;

use crate::args;
use crate::schema::Schema;

/// One read's worth.
const CHUNK: usize = 256 * 1024;

/// A read that fills less than this is copied out, so that a slow pipe does not cost a whole chunk each time.
const SMALL_READ: usize = 16 * 1024;

/// How much text may stand for one message in JSON: names, spaces and escapes make it longer than what it stands for.
const JSON_TEXT_PER_BYTE: usize = 64;
const JSON_TEXT_AT_LEAST: usize = 1024 * 1024;

/// A file, or standard input where it is called `-`, and its length where that is known.
///
/// # Errors
///
/// As the operating system says, with the name.
pub(crate) fn open(path: &Path) -> io::Result<(Box<dyn Read + Send>, Option<u64>)> {
    if path == Path::new("-") {
        return Ok((Box::new(io::stdin()), None));
    }
    let named = |error: io::Error| io::Error::new(error.kind(), format!("{}: {error}", path.display()));
    let file = File::open(path).map_err(named)?;
    let metadata = file.metadata().map_err(named)?;
    let length = metadata.is_file().then_some(metadata.len());
    Ok((Box::new(file), length))
}

/// Reads `source` to its end on a thread of its own.
///
/// The thread may stay blocked in a read for ever (a terminal, an idle pipe); nothing waits for it, and the end of the
/// program takes it along.
pub(crate) fn read(source: impl Read + Send + 'static) -> mpsc::Receiver<io::Result<Bytes>> {
    let (chunks, receiver) = mpsc::channel(2);
    let mut source = source;
    thread::spawn(move || {
        let mut buffer = vec![0; CHUNK];
        loop {
            let chunk = match source.read(&mut buffer) {
                Ok(0) => return,
                Ok(length) if length < SMALL_READ => Ok(Bytes::copy_from_slice(&buffer[..length])),
                Ok(length) => {
                    let mut full = std::mem::replace(&mut buffer, vec![0; CHUNK]);
                    full.truncate(length);
                    Ok(Bytes::from(full))
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => Err(error),
            };
            let last = chunk.is_err();
            if chunks.blocking_send(chunk).is_err() || last {
                return;
            }
        }
    });
    receiver
}

/// The messages of an input.
#[derive(Debug)]
pub(crate) struct Messages {
    format: Format,
    max_message_size: usize,
    keep_unsendable: bool,
    bytes: Chunks,
    /// A line or message that began in an earlier chunk, as far as it is known.
    carry: Vec<u8>,
    /// What the text of the last line stands for, where that is not the text itself.
    encoded: Vec<u8>,
    /// The line or message that was begun last, counted from 1.
    number: u64,
    lost: bool,
}

#[derive(Debug)]
enum Format {
    Lines,
    Hex,
    Json(Schema),
    Delimited,
}

/// One thing read.
#[derive(Debug)]
pub(crate) enum Item<'a> {
    Message(&'a [u8]),
    Unsendable(Unsendable),
}

/// An input that is not a message that may be sent.
#[derive(Debug)]
pub(crate) struct Unsendable {
    unit: &'static str,
    number: u64,
    reason: String,
    /// The message that it would have been, where it is one.
    pub(crate) content: Content,
}

impl fmt::Display for Unsendable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}: {}", self.unit, self.number, self.reason)
    }
}

/// The bytes of what cannot be sent.
#[derive(Debug)]
pub(crate) enum Content {
    /// There are none, or they are not wanted.
    None,
    Held(Vec<u8>),
    Spilled(File, u64),
}

/// A line or message of the input, or what there is in its place.
enum Piece {
    At(Place),
    Overlong(Overlong),
    /// The input ends inside it.
    Torn(String),
    /// Nothing behind it can be understood.
    Lost(String),
}

/// Where bytes are, until the next piece is looked for.
enum Place {
    Chunk(Range<usize>),
    Carry,
    Encoded,
}

impl Messages {
    /// The messages in `chunks`. With `keep_unsendable`, those over the maximum keep their bytes.
    pub(crate) fn new(
        chunks: mpsc::Receiver<io::Result<Bytes>>,
        format: args::Input,
        max_message_size: usize,
        keep_unsendable: bool,
    ) -> Messages {
        let format = match format {
            args::Input::Lines => Format::Lines,
            args::Input::Hex => Format::Hex,
            args::Input::Json(schema) => Format::Json(schema),
            args::Input::Delimited => Format::Delimited,
        };
        Messages {
            format,
            max_message_size,
            keep_unsendable,
            bytes: Chunks { source: chunks, chunk: Bytes::new(), at: 0 },
            carry: Vec::new(),
            encoded: Vec::new(),
            number: 0,
            lost: false,
        }
    }

    /// The next message, or what stands in its place; `None` at the end.
    ///
    /// Not cancel-safe: a line that was begun is lost with a future that is dropped.
    ///
    /// # Errors
    ///
    /// What reading the input, or keeping an unsendable message in a temporary file, met.
    pub(crate) async fn next(&mut self) -> io::Result<Option<Item<'_>>> {
        if self.lost {
            return Ok(None);
        }
        let piece = loop {
            let piece = match self.format {
                Format::Delimited => self.next_delimited().await?,
                _ => self.next_line().await?,
            };
            let Some(piece) = piece else { return Ok(None) };
            self.number += 1;
            if !self.is_blank_json(&piece) {
                break piece;
            }
        };
        Ok(Some(match self.understand(piece)? {
            Ok(place) => Item::Message(self.at(&place)),
            Err((reason, content)) => {
                let unit = if matches!(self.format, Format::Delimited) { "message" } else { "line" };
                Item::Unsendable(Unsendable { unit, number: self.number, reason, content })
            }
        }))
    }

    /// Where the message is that a piece of input stands for, or why it stands for none.
    fn understand(&mut self, piece: Piece) -> io::Result<Result<Place, (String, Content)>> {
        let place = match piece {
            Piece::At(place) => place,
            Piece::Overlong(overlong) => return overlong.judge(self.max_message_size).map(Err),
            Piece::Torn(reason) => return Ok(Err((reason, Content::None))),
            Piece::Lost(reason) => {
                self.lost = true;
                return Ok(Err((reason, Content::None)));
            }
        };
        let text = match &place {
            Place::Chunk(range) => &self.bytes.chunk[range.clone()],
            _ => &self.carry,
        };
        Ok(match &self.format {
            Format::Lines | Format::Delimited => Ok(place),
            Format::Hex => {
                self.encoded.resize(text.len() / 2, 0);
                match const_hex::decode_to_slice(text, &mut self.encoded) {
                    Ok(()) => Ok(Place::Encoded),
                    Err(error) => Err((hex_fault(text, error), Content::None)),
                }
            }
            Format::Json(schema) => match schema.encode(text, &mut self.encoded) {
                Ok(()) if self.encoded.len() <= self.max_message_size => Ok(Place::Encoded),
                Ok(()) => {
                    let message = std::mem::take(&mut self.encoded);
                    let reason = over(message.len() as u64, self.max_message_size);
                    Err((reason, if self.keep_unsendable { Content::Held(message) } else { Content::None }))
                }
                Err(error) => Err((format!("not a {}: {error}", schema.name()), Content::None)),
            },
        })
    }

    fn at(&self, place: &Place) -> &[u8] {
        match place {
            Place::Chunk(range) => &self.bytes.chunk[range.clone()],
            Place::Carry => &self.carry,
            Place::Encoded => &self.encoded,
        }
    }

    fn is_blank_json(&self, piece: &Piece) -> bool {
        match (&self.format, piece) {
            (Format::Json(_), Piece::At(place)) => self.at(place).iter().all(u8::is_ascii_whitespace),
            _ => false,
        }
    }

    /// The longest line that can still be a message.
    fn longest_line(&self) -> usize {
        match self.format {
            Format::Lines | Format::Delimited => self.max_message_size,
            Format::Hex => self.max_message_size.saturating_mul(2),
            Format::Json(_) => self.max_message_size.saturating_mul(JSON_TEXT_PER_BYTE).max(JSON_TEXT_AT_LEAST),
        }
    }

    fn overlong(&self) -> io::Result<Overlong> {
        let meaning = match self.format {
            Format::Lines | Format::Delimited => Meaning::Itself,
            Format::Hex => Meaning::Hex { half: None, fault: None },
            Format::Json(_) => Meaning::Json { allowed: self.longest_line() },
        };
        let spill = match meaning {
            Meaning::Itself | Meaning::Hex { .. } if self.keep_unsendable => Some(tempfile::tempfile()?),
            _ => None,
        };
        Ok(Overlong { meaning, length: 0, spill })
    }

    async fn next_line(&mut self) -> io::Result<Option<Piece>> {
        let longest = self.longest_line();
        self.carry.clear();
        let mut overlong: Option<Overlong> = None;
        loop {
            if self.bytes.rest().is_empty() && !self.bytes.more().await? {
                // Only a last line without a newline is still open here; nothing at all is not a line.
                return Ok(match overlong {
                    Some(overlong) => Some(Piece::Overlong(overlong)),
                    None if self.carry.is_empty() => None,
                    None => Some(Piece::At(Place::Carry)),
                });
            }
            let newline = memchr(b'\n', self.bytes.rest());
            let part = self.bytes.take(newline.unwrap_or(self.bytes.rest().len()));
            if newline.is_some() {
                self.bytes.take(1);
            }
            if overlong.is_none() && self.carry.len() + part.len() > longest {
                let mut begun = self.overlong()?;
                begun.pass(&self.carry)?;
                self.carry.clear();
                overlong = Some(begun);
            }
            match (&mut overlong, newline) {
                (Some(overlong), _) => overlong.pass(&self.bytes.chunk[part])?,
                (None, Some(_)) if self.carry.is_empty() => return Ok(Some(Piece::At(Place::Chunk(part)))),
                (None, _) => self.carry.extend_from_slice(&self.bytes.chunk[part]),
            }
            if newline.is_some() {
                return Ok(Some(overlong.map_or(Piece::At(Place::Carry), Piece::Overlong)));
            }
        }
    }

    async fn next_delimited(&mut self) -> io::Result<Option<Piece>> {
        self.carry.clear();
        let want = match self.next_length().await? {
            Length::Whole(length) => length,
            Length::End => return Ok(None),
            Length::Torn => return Ok(Some(Piece::Torn("the input ends inside the length before it".into()))),
            Length::Malformed => {
                let reason = "the length before it is not a varint in its shortest form; nothing behind it is read";
                return Ok(Some(Piece::Lost(reason.into())));
            }
        };
        if want <= self.bytes.rest().len().min(self.max_message_size) as u64 {
            return Ok(Some(Piece::At(Place::Chunk(self.bytes.take(want as usize)))));
        }
        let mut overlong = if want > self.max_message_size as u64 { Some(self.overlong()?) } else { None };
        let mut got = 0;
        while got < want {
            if self.bytes.rest().is_empty() && !self.bytes.more().await? {
                return Ok(Some(Piece::Torn(format!("the input ends {got} bytes into a message of {want}"))));
            }
            let part = self.bytes.take((self.bytes.rest().len() as u64).min(want - got) as usize);
            got += part.len() as u64;
            match &mut overlong {
                Some(overlong) => overlong.pass(&self.bytes.chunk[part])?,
                None => self.carry.extend_from_slice(&self.bytes.chunk[part]),
            }
        }
        Ok(Some(overlong.map_or(Piece::At(Place::Carry), Piece::Overlong)))
    }

    /// The varint before a message, as strictly as one is read from the wire.
    async fn next_length(&mut self) -> io::Result<Length> {
        let mut length: u64 = 0;
        for index in 0..10 {
            if self.bytes.rest().is_empty() && !self.bytes.more().await? {
                return Ok(if index == 0 { Length::End } else { Length::Torn });
            }
            let place = self.bytes.take(1).start;
            let byte = self.bytes.chunk[place];
            if index == 9 && byte > 1 {
                break;
            }
            length |= u64::from(byte & 0x7f) << (7 * index);
            if byte & 0x80 == 0 {
                return Ok(if byte == 0 && index > 0 { Length::Malformed } else { Length::Whole(length) });
            }
        }
        Ok(Length::Malformed)
    }
}

enum Length {
    Whole(u64),
    End,
    Torn,
    Malformed,
}

/// The input as it comes, and how far it is used up.
#[derive(Debug)]
struct Chunks {
    source: mpsc::Receiver<io::Result<Bytes>>,
    chunk: Bytes,
    at: usize,
}

impl Chunks {
    fn rest(&self) -> &[u8] {
        &self.chunk[self.at..]
    }

    /// Uses up `length` bytes of the rest and says where in the chunk they stand.
    fn take(&mut self, length: usize) -> Range<usize> {
        let start = self.at;
        self.at += length;
        start..self.at
    }

    /// Goes on to the next chunk; `false` at the end of the input.
    async fn more(&mut self) -> io::Result<bool> {
        loop {
            match self.source.recv().await {
                None => return Ok(false),
                Some(Ok(chunk)) if chunk.is_empty() => continue,
                Some(Ok(chunk)) => {
                    self.chunk = chunk;
                    self.at = 0;
                    return Ok(true);
                }
                Some(Err(error)) => return Err(error),
            }
        }
    }
}

/// A line or message over the maximum, of which only the length is known, and the bytes in a file if they are wanted.
struct Overlong {
    meaning: Meaning,
    /// Bytes of input passed over, or of the message they stand for if the input is hex.
    length: u64,
    spill: Option<File>,
}

enum Meaning {
    Itself,
    Hex { half: Option<u8>, fault: Option<u8> },
    Json { allowed: usize },
}

impl Overlong {
    fn pass(&mut self, part: &[u8]) -> io::Result<()> {
        let Meaning::Hex { half, fault } = &mut self.meaning else {
            self.length += part.len() as u64;
            return self.spill.as_mut().map_or(Ok(()), |file| file.write_all(part));
        };
        let mut decoded = Vec::new();
        for &digit in part {
            if fault.is_some() {
                return Ok(());
            }
            match ((digit as char).to_digit(16), half.take()) {
                (None, _) => *fault = Some(digit),
                (Some(high), None) => *half = Some(high as u8),
                (Some(low), Some(high)) => decoded.push(high << 4 | low as u8),
            }
        }
        self.length += decoded.len() as u64;
        self.spill.as_mut().map_or(Ok(()), |file| file.write_all(&decoded))
    }

    fn judge(self, max_message_size: usize) -> io::Result<(String, Content)> {
        let reason = match self.meaning {
            Meaning::Hex { fault: Some(byte), .. } => return Ok((bad_digit(byte), Content::None)),
            Meaning::Hex { half: Some(_), .. } => return Ok((ODD_DIGITS.into(), Content::None)),
            Meaning::Itself | Meaning::Hex { .. } => over(self.length, max_message_size),
            Meaning::Json { allowed } => format!(
                "{} bytes of JSON; with a maximum of {max_message_size} for the message (--max-message-size), {allowed} \
                 are read",
                self.length
            ),
        };
        let content = match self.spill {
            Some(mut file) => {
                file.rewind()?;
                Content::Spilled(file, self.length)
            }
            None => Content::None,
        };
        Ok((reason, content))
    }
}

fn over(length: u64, max_message_size: usize) -> String {
    format!("a message of {length} bytes; the maximum is {max_message_size} (--max-message-size)")
}

const ODD_DIGITS: &str = "not hex: an odd number of digits";

fn bad_digit(byte: u8) -> String {
    format!("not hex: byte '{}' is no digit", byte.escape_ascii())
}

fn hex_fault(text: &[u8], error: const_hex::FromHexError) -> String {
    match text.iter().find(|byte| !byte.is_ascii_hexdigit()) {
        Some(byte) => bad_digit(*byte),
        None if text.len() % 2 == 1 => ODD_DIGITS.into(),
        None => format!("not hex: {error}"),
    }
}

#[cfg(test)]
#[path = "input_tests.rs"]
mod tests;
