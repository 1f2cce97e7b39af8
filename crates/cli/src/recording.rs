//! A recording: messages with the time at which each came, and whose it was; written, and read again.
//!
//! The whole file is one stream of `buffstreams.recording.Entry`, each behind its length as an unsigned varint, so that
//! any protobuf library reads it. `recording.proto` says what is in it. A recorder that is killed leaves a part of an entry
//! at the end at most, and the reader says so.

use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use buffstreams::{Framing, Prefix};
use prost::Message;
use prost::encoding::encode_varint;

use crate::report::Report;

/// The schema of recordings.
pub(crate) const SCHEMA: &str = include_str!("recording.proto");

/// The first word of a recording.
const MAGIC: &str = "buffstreams recording";

/// The version that is written, and the only one that is read.
const VERSION: u32 = 1;

/// The longest entry that is read, in bytes; a length beyond is taken for damage.
const LONGEST: u64 = 1 << 31;

#[derive(Clone, PartialEq, Message)]
struct Entry {
    #[prost(oneof = "Kind", tags = "1, 2, 3, 4")]
    kind: Option<Kind>,
}

#[derive(Clone, PartialEq, prost::Oneof)]
enum Kind {
    #[prost(message, tag = "1")]
    Head(Head),
    #[prost(message, tag = "2")]
    Opened(Opened),
    #[prost(message, tag = "3")]
    Received(Received),
    #[prost(message, tag = "4")]
    Closed(Closed),
}

#[derive(Clone, PartialEq, Message)]
struct Head {
    #[prost(string, tag = "1")]
    magic: String,
    #[prost(uint32, tag = "2")]
    version: u32,
    #[prost(string, tag = "3")]
    framing: String,
    #[prost(uint64, tag = "4")]
    max_message_size: u64,
}

#[derive(Clone, PartialEq, Message)]
struct Opened {
    #[prost(uint64, tag = "1")]
    connection: u64,
    #[prost(fixed64, tag = "2")]
    time: u64,
    #[prost(string, tag = "3")]
    peer: String,
}

#[derive(Clone, PartialEq, Message)]
struct Received {
    #[prost(uint64, tag = "1")]
    connection: u64,
    #[prost(fixed64, tag = "2")]
    time: u64,
    #[prost(bytes = "vec", tag = "3")]
    message: Vec<u8>,
}

#[derive(Clone, PartialEq, Message)]
struct Closed {
    #[prost(uint64, tag = "1")]
    connection: u64,
    #[prost(fixed64, tag = "2")]
    time: u64,
}

fn put(kind: Kind, out: &mut Vec<u8>) {
    Entry { kind: Some(kind) }.encode_length_delimited(out).expect("a Vec grows");
}

/// Nanoseconds since the epoch.
fn nanoseconds(time: SystemTime) -> u64 {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

/// The beginning of a recording of messages in this framing.
pub(crate) fn head(framing: &Framing) -> Vec<u8> {
    let mut out = Vec::new();
    let (framing, max_message_size) = (framing.prefix().name().to_owned(), framing.max_message_size() as u64);
    put(Kind::Head(Head { magic: MAGIC.to_owned(), version: VERSION, framing, max_message_size }), &mut out);
    out
}

/// Whose messages are recorded.
#[derive(Debug, Default)]
pub(crate) struct Source {
    connection: u64,
    peer: String,
    has_messages: bool,
}

impl Source {
    pub(crate) fn new(connection: u64, peer: String) -> Source {
        Source { connection, peer, has_messages: false }
    }

    pub(crate) fn has_messages(&self) -> bool {
        self.has_messages
    }

    /// Appends a message, and before the first one who its sender is.
    pub(crate) fn put_message(&mut self, at: SystemTime, message: &[u8], out: &mut Vec<u8>) {
        let (connection, time) = (self.connection, nanoseconds(at));
        if !self.has_messages {
            self.has_messages = true;
            put(Kind::Opened(Opened { connection, time, peer: std::mem::take(&mut self.peer) }), out);
        }
        // As prost would write it, without a message of its own for each.
        let empty = Received { connection, time, message: Vec::new() };
        let fields = empty.encoded_len() + message_field(message.len());
        encode_varint((1 + varint(fields) + fields) as u64, out);
        out.push(3 << 3 | 2);
        encode_varint(fields as u64, out);
        empty.encode(out).expect("a Vec grows");
        if !message.is_empty() {
            out.push(3 << 3 | 2);
            encode_varint(message.len() as u64, out);
            out.extend_from_slice(message);
        }
    }

    pub(crate) fn put_end(&self, at: SystemTime, out: &mut Vec<u8>) {
        put(Kind::Closed(Closed { connection: self.connection, time: nanoseconds(at) }), out);
    }
}

/// Bytes of the field with a message.
fn message_field(length: usize) -> usize {
    if length == 0 { 0 } else { 1 + varint(length) + length }
}

/// Bytes of a varint.
fn varint(number: usize) -> usize {
    prost::encoding::encoded_len_varint(number as u64)
}

/// What a recording tells, in the order in which it happened. Times are since the epoch.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Event {
    Opened { connection: u64 },
    Received { connection: u64, time: Duration, message: Vec<u8> },
    Closed { connection: u64, time: Duration },
}

/// A recording that is read.
pub(crate) struct Recording<R> {
    source: R,
    framing: Framing,
    /// Bytes that were whole entries.
    whole: u64,
    /// Bytes behind them, once they are known to be none.
    torn: u64,
}

impl<R: Read> Recording<R> {
    /// Reads the head.
    ///
    /// # Errors
    ///
    /// It cannot be read, or is no recording, or one of a later version.
    pub(crate) fn open(source: R) -> io::Result<Recording<R>> {
        let mut recording = Recording { source, framing: Framing::default(), whole: 0, torn: 0 };
        let not_one = || io::Error::new(io::ErrorKind::InvalidData, "not a recording of `buffstreams record`");
        // Whatever else it is may begin with any length, so the head is known to be short before it is believed.
        let entry = recording.entry(1024).map_err(|error| match error.kind() {
            io::ErrorKind::InvalidData => not_one(),
            _ => error,
        })?;
        let head = match entry {
            Some(Entry { kind: Some(Kind::Head(head)) }) if head.magic == MAGIC => head,
            _ => return Err(not_one()),
        };
        if head.version != VERSION {
            let text = format!("a recording of version {}; this program reads version {VERSION}", head.version);
            return Err(io::Error::new(io::ErrorKind::InvalidData, text));
        }
        let prefix = head.framing.parse::<Prefix>().map_err(|_| not_one())?;
        let max = usize::try_from(head.max_message_size).map_err(|_| not_one())?;
        recording.framing = Framing::with_max(prefix, max).map_err(|_| not_one())?;
        Ok(recording)
    }

    /// What the recorded connections spoke.
    pub(crate) fn framing(&self) -> Framing {
        self.framing
    }

    /// Bytes at the end that are a part of an entry; known when [`next`](Self::next) has returned `None`.
    pub(crate) fn torn(&self) -> u64 {
        self.torn
    }

    /// The next event; `None` at the end.
    ///
    /// # Errors
    ///
    /// It cannot be read, or is damaged.
    pub(crate) fn next(&mut self) -> io::Result<Option<Event>> {
        loop {
            let before = self.whole;
            let Some(entry) = self.entry(LONGEST)? else { return Ok(None) };
            return Ok(Some(match entry.kind {
                Some(Kind::Opened(Opened { connection, .. })) => Event::Opened { connection },
                Some(Kind::Received(Received { connection, time, message })) => {
                    Event::Received { connection, time: Duration::from_nanos(time), message }
                }
                Some(Kind::Closed(Closed { connection, time })) => {
                    Event::Closed { connection, time: Duration::from_nanos(time) }
                }
                Some(Kind::Head(_)) => return Err(damaged(before)),
                // Of a later program.
                None => continue,
            }));
        }
    }

    fn entry(&mut self, longest: u64) -> io::Result<Option<Entry>> {
        let mut prefix = Vec::new();
        let length = loop {
            let mut byte = [0];
            if self.source.read(&mut byte)? == 0 {
                self.torn = prefix.len() as u64;
                return Ok(None);
            }
            prefix.push(byte[0]);
            if byte[0] & 0x80 == 0 {
                break prost::encoding::decode_varint(&mut &prefix[..]).map_err(|_| damaged(self.whole))?;
            }
            if prefix.len() == 10 {
                return Err(damaged(self.whole));
            }
        };
        if length > longest {
            return Err(damaged(self.whole));
        }
        // Grows with what is there, and not with what is declared.
        let mut bytes = Vec::new();
        let read = (&mut self.source).take(length).read_to_end(&mut bytes)? as u64;
        let all = prefix.len() as u64 + read;
        if read < length {
            self.torn = all;
            return Ok(None);
        }
        let entry = Entry::decode(&bytes[..]).map_err(|_| damaged(self.whole))?;
        self.whole += all;
        Ok(Some(entry))
    }
}

fn damaged(at: u64) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("the recording is damaged behind byte {at}"))
}

/// Opens a file to read.
///
/// # Errors
///
/// As the operating system says, with the name.
pub(crate) fn open(path: &Path) -> io::Result<File> {
    File::open(path).map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", path.display())))
}

/// Says that a recording ends in a part of an entry, if it does.
pub(crate) fn say_torn<R: Read>(recording: &Recording<R>, name: &dyn fmt::Display, report: &Report) {
    if recording.torn() > 0 {
        let torn = recording.torn();
        report.say(format_args!(
            "{name}: the last {torn} bytes are a part of an entry and were left out; the recorder was cut off"
        ));
    }
}

/// Opens a file for a new recording, and says whether it was not there before. What is in it stays for now.
///
/// # Errors
///
/// There is a file of this name, unless it may be replaced; or it cannot be created.
pub(crate) fn create(path: &Path, may_replace: bool) -> io::Result<(File, bool)> {
    let opened = match File::options().write(true).create_new(true).open(path) {
        Err(error) if may_replace && error.kind() == io::ErrorKind::AlreadyExists => {
            File::options().write(true).open(path).map(|file| (file, false))
        }
        created => created.map(|file| (file, true)),
    };
    opened.map_err(|error| match error.kind() {
        io::ErrorKind::AlreadyExists => {
            let text = format!("{}: the file exists; name another one, or replace it with --force", path.display());
            io::Error::new(error.kind(), text)
        }
        kind => io::Error::new(kind, format!("{}: {error}", path.display())),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn recorded() -> Vec<u8> {
        let at = |nanoseconds| UNIX_EPOCH + Duration::from_nanos(nanoseconds);
        let mut file = head(&Framing::with_max(Prefix::Varint, 1 << 20).unwrap());
        let (mut one, mut two) = (Source::new(1, "127.0.0.1:4000".into()), Source::new(2, "a unix socket".into()));
        one.put_message(at(10), b"hello", &mut file);
        two.put_message(at(20), b"", &mut file);
        one.put_message(at(1_700_000_000_000_000_001), &[7; 300], &mut file);
        one.put_end(at(40), &mut file);
        file
    }

    fn read(file: &[u8]) -> io::Result<(Vec<Event>, u64)> {
        let mut recording = Recording::open(file)?;
        let mut events = Vec::new();
        while let Some(event) = recording.next()? {
            events.push(event);
        }
        Ok((events, recording.torn()))
    }

    #[test]
    fn what_is_written_is_read_again() {
        let received = |connection, time, message: &[u8]| Event::Received {
            connection,
            time: Duration::from_nanos(time),
            message: message.to_vec(),
        };
        let file = recorded();
        let (events, torn) = read(&file).unwrap();
        assert_eq!(torn, 0);
        assert_eq!(
            events,
            [
                Event::Opened { connection: 1 },
                received(1, 10, b"hello"),
                Event::Opened { connection: 2 },
                received(2, 20, b""),
                received(1, 1_700_000_000_000_000_001, &[7; 300]),
                Event::Closed { connection: 1, time: Duration::from_nanos(40) },
            ]
        );
        assert_eq!(Recording::open(&file[..]).unwrap().framing(), Framing::with_max(Prefix::Varint, 1 << 20).unwrap());
    }

    #[test]
    fn wherever_it_is_cut_what_is_whole_is_read_and_the_rest_is_told() {
        let file = recorded();
        let (all, _) = read(&file).unwrap();
        let head = head(&Framing::with_max(Prefix::Varint, 1 << 20).unwrap()).len();
        let mut ends = 0;
        for length in head..file.len() {
            let (events, torn) = read(&file[..length]).unwrap();
            assert_eq!(events[..], all[..events.len()]);
            ends += usize::from(torn == 0);
        }
        assert_eq!(ends, all.len(), "each event ends in one place");
        for length in 0..head {
            assert!(read(&file[..length]).unwrap_err().to_string().contains("not a recording"));
        }
    }

    #[test]
    fn what_is_no_recording_or_a_later_one_is_refused() {
        for bytes in [&b"hello"[..], b"\x05hello", b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff", b"\x00"] {
            assert!(read(bytes).unwrap_err().to_string().contains("not a recording"), "{bytes:?}");
        }
        let mut later = Vec::new();
        let magic = MAGIC.to_owned();
        put(Kind::Head(Head { magic, version: 2, framing: "varint".into(), max_message_size: 1 }), &mut later);
        assert!(read(&later).unwrap_err().to_string().contains("version 2"));
        let mut damaged = recorded();
        let head = head(&Framing::with_max(Prefix::Varint, 1 << 20).unwrap()).len();
        damaged.truncate(head);
        damaged.extend([0x02, 0xff, 0xff]);
        assert_eq!(read(&damaged).unwrap_err().to_string(), format!("the recording is damaged behind byte {head}"));
    }

    #[test]
    fn the_schema_describes_what_is_written() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("recording.proto");
        std::fs::write(&path, SCHEMA).unwrap();
        let schema = crate::schema::Schema::load(&[path], &[], "buffstreams.recording.Entry").unwrap();
        let file = recorded();
        let mut rest = &file[..];
        let mut lines = Vec::new();
        while !rest.is_empty() {
            let length = prost::encoding::decode_varint(&mut rest).unwrap() as usize;
            let mut json = Vec::new();
            schema.decode(&rest[..length], &mut json).unwrap();
            rest = &rest[length..];
            lines.push(String::from_utf8(json).unwrap());
        }
        assert_eq!(
            lines[..3],
            [
                "{\"head\":{\"magic\":\"buffstreams recording\",\"version\":1,\"framing\":\"varint\",\
                 \"maxMessageSize\":\"1048576\"}}",
                "{\"opened\":{\"connection\":\"1\",\"time\":\"10\",\"peer\":\"127.0.0.1:4000\"}}",
                "{\"received\":{\"connection\":\"1\",\"time\":\"10\",\"message\":\"aGVsbG8=\"}}",
            ]
        );
        assert_eq!(lines.len(), 7);
    }

    #[test]
    fn a_message_is_written_as_prost_would() {
        for length in [0, 1, 110, 127, 128, 16_384] {
            let message = vec![1; length];
            let mut source = Source { connection: 300, peer: String::new(), has_messages: true };
            let (mut ours, mut theirs) = (Vec::new(), Vec::new());
            source.put_message(UNIX_EPOCH + Duration::from_nanos(99), &message, &mut ours);
            put(Kind::Received(Received { connection: 300, time: 99, message }), &mut theirs);
            assert_eq!(ours, theirs);
        }
    }
}
