//! What stands in a session beside messages: the preface, and control frames; encoded, and strictly decoded.
//!
//! PROTOCOL.md says what each of them means; this file knows only their bytes. Every value has one encoding, and every
//! other input is an error that names what was seen and what is allowed. Nothing is allocated but for bytes that came.

use std::fmt;
use std::str;
use std::time::Duration;

use super::super::framing::{Framing, LONGEST_CONTROL, Prefix};
use super::super::outbox::Rejection;

/// What a session begins with. No plain frame does: ten bytes of `ff` are no length in any framing that
/// [takes sessions](takes_sessions). Behind it comes a byte with the version of the preface itself.
const OPENING: [u8; 15] = *b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xffBUFFS";

/// The preface of this version, in bytes.
pub(crate) const PREFACE: usize = OPENING.len() + 1;

/// The only version of sessions that there is.
pub(crate) const VERSION: u8 = 1;

/// The longest token of an application, in bytes.
pub(crate) const LONGEST_TOKEN: usize = 512;

/// The longest text of a refusal or a reject, in bytes. It is cut there when it is sent.
pub(crate) const LONGEST_TEXT: usize = 256;

/// The least and the longest time between two signs of life, in milliseconds.
const HEARTBEATS: (u64, u64) = (1, 3_600_000);

/// The largest maximum message size, in bytes.
const LARGEST_MAX: u64 = (1 << 55) - 1;

/// The framing of everything before WELCOME, and of WELCOME: whatever is agreed, it is the same.
pub(crate) fn handshake_framing() -> Framing {
    Framing::for_session(LONGEST_CONTROL).expect("it is what sessions are made for")
}

/// Whether sessions can be asked for on a port that speaks this framing: whether the preface is no frame in it.
pub(crate) fn takes_sessions(framing: &Framing) -> bool {
    let is_narrow = matches!(framing.prefix(), Prefix::U8 | Prefix::U16Be | Prefix::U16Le);
    !is_narrow && framing.header(&OPENING).is_err()
}

/// What the first bytes of a connection are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Preface {
    /// No session: plain frames, from the first byte on.
    Plain,
    /// Too few bytes to tell.
    Incomplete,
    /// A session, in this version of the preface; what follows stands [`PREFACE`] bytes from the start.
    Session { version: u8 },
}

impl Preface {
    pub(crate) fn of(bytes: &[u8]) -> Preface {
        let known = bytes.len().min(OPENING.len());
        if bytes[..known] != OPENING[..known] {
            return Preface::Plain;
        }
        match bytes.get(OPENING.len()) {
            Some(&version) => Preface::Session { version },
            None => Preface::Incomplete,
        }
    }

    pub(crate) fn put(out: &mut Vec<u8>) {
        out.extend_from_slice(&OPENING);
        out.push(VERSION);
    }
}

/// The name of an acknowledged stream: 128 random bits, chosen by the side that dials.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct StreamId(pub(crate) [u8; 16]);

impl StreamId {
    /// The name that these bytes are.
    pub fn from_bytes(bytes: [u8; 16]) -> StreamId {
        StreamId(bytes)
    }

    /// Its bytes.
    pub fn as_bytes(&self) -> &[u8; 16] {
        &self.0
    }
}

impl fmt::Display for StreamId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", u128::from_be_bytes(self.0))
    }
}

/// The name of what a receiver knows of one stream: 128 bits that are other ones once it has forgotten the stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct StateId(pub(crate) [u8; 16]);

/// Asks for a session.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Hello {
    /// The oldest and the newest version of sessions that the sender speaks.
    pub(crate) versions: (u8, u8),
    pub(crate) stream: StreamId,
    /// Grows with every connection of the stream. From 1.
    pub(crate) epoch: u64,
    /// The number of the oldest message that may still come. Numbers begin at 1; earlier ones never come (again).
    pub(crate) first: u64,
    /// Bytes of the largest message, in both directions.
    pub(crate) maximum: u64,
    /// How many bytes of frames the sender would like to have in flight.
    pub(crate) window: u64,
    /// How many bytes of frames it lets replies have in flight; the largest one fits.
    pub(crate) reply_window: u64,
    pub(crate) heartbeat: Duration,
    /// Whatever the application has to say to the other side's.
    pub(crate) token: Vec<u8>,
}

/// Grants a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Welcome {
    pub(crate) version: u8,
    pub(crate) state: StateId,
    /// No message up to this one need be sent again.
    pub(crate) dispatched: u64,
    /// Every message up to this one is finished.
    pub(crate) committed: u64,
    pub(crate) window: u64,
    pub(crate) heartbeat: Duration,
}

/// Refuses a session, or ends one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Refuse {
    pub(crate) code: RefuseCode,
    /// A number that belongs to the code, or 0.
    pub(crate) detail: u64,
    /// For people.
    pub(crate) text: String,
}

/// Why a session is refused. Codes from 8000 (hexadecimal) on may be different at another attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RefuseCode(pub(crate) u16);

impl RefuseCode {
    /// No common version; the detail is the newest one spoken.
    pub(crate) const VERSION: RefuseCode = RefuseCode(1);
    /// The listener takes no sessions.
    pub(crate) const NO_SESSIONS: RefuseCode = RefuseCode(2);
    /// The maximum is over the listener's, which is the detail.
    pub(crate) const MAXIMUM: RefuseCode = RefuseCode(3);
    /// The application refuses the token, or the stream.
    pub(crate) const UNAUTHORIZED: RefuseCode = RefuseCode(4);
    /// The peer broke a rule.
    pub(crate) const PROTOCOL: RefuseCode = RefuseCode(5);
    /// Another connection of the stream came with the same epoch, or a higher one: the detail is the highest one known.
    pub(crate) const EPOCH: RefuseCode = RefuseCode(0x8001);
    /// There is no memory for a window.
    pub(crate) const BUSY: RefuseCode = RefuseCode(0x8002);
    /// The listener is shutting down.
    #[cfg_attr(not(test), expect(dead_code, reason = "a part of the protocol that nothing here says yet"))]
    pub(crate) const DRAINING: RefuseCode = RefuseCode(0x8003);

    /// Whether another attempt may find another answer.
    pub(crate) fn is_temporary(self) -> bool {
        self.0 >= 0x8000
    }
}

/// A control frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Control {
    Hello(Hello),
    Welcome(Welcome),
    Refuse(Refuse),
    /// Every message up to this number is finished.
    Ack(u64),
    /// This message was refused by the handler, for good.
    Reject(u64, Rejection),
    /// The reject of this message is known, and need not be repeated.
    ConfirmReject(u64),
    /// A sign of life.
    Heartbeat,
    /// From the side that dialled: everything is finished, forget the stream. From the other: it is about to leave.
    Goodbye,
    /// The answer to it. No message follows from the side that dialled.
    ConfirmGoodbye,
    /// The next message has this number: those left out were rejected or given up, and never come.
    Skip(u64),
    /// A frame of a later version that may be ignored.
    Ignorable(u8),
}

mod kind {
    pub(super) const HELLO: u8 = 1;
    pub(super) const WELCOME: u8 = 2;
    pub(super) const REFUSE: u8 = 3;
    pub(super) const ACK: u8 = 4;
    pub(super) const REJECT: u8 = 5;
    pub(super) const CONFIRM_REJECT: u8 = 6;
    pub(super) const HEARTBEAT: u8 = 7;
    pub(super) const GOODBYE: u8 = 8;
    pub(super) const CONFIRM_GOODBYE: u8 = 9;
    pub(super) const SKIP: u8 = 10;
    /// From here on, whoever does not know a frame ignores it.
    pub(super) const IGNORABLE: u8 = 0x80;
}

impl Control {
    /// What PROTOCOL.md calls it.
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Control::Hello(_) => "HELLO",
            Control::Welcome(_) => "WELCOME",
            Control::Refuse(_) => "REFUSE",
            Control::Ack(_) => "ACK",
            Control::Reject(..) => "REJECT",
            Control::ConfirmReject(_) => "REJECT-CONFIRM",
            Control::Heartbeat => "HEARTBEAT",
            Control::Goodbye => "GOODBYE",
            Control::ConfirmGoodbye => "GOODBYE-CONFIRM",
            Control::Skip(_) => "SKIP",
            Control::Ignorable(_) => "an unknown frame",
        }
    }

    /// Appends the frame, prefix and all.
    pub(crate) fn put(&self, framing: &Framing, out: &mut Vec<u8>) {
        let mut frame = Vec::with_capacity(32);
        match self {
            Control::Hello(hello) => hello.put(&mut frame),
            Control::Welcome(welcome) => welcome.put(&mut frame),
            Control::Refuse(Refuse { code, detail, text }) => {
                frame.push(kind::REFUSE);
                frame.extend(code.0.to_be_bytes());
                frame.extend(detail.to_be_bytes());
                frame.extend(shortened(text).as_bytes());
            }
            Control::Ack(number) => put_number(kind::ACK, *number, &mut frame),
            Control::Reject(number, Rejection { code, text }) => {
                put_number(kind::REJECT, *number, &mut frame);
                frame.extend(code.to_be_bytes());
                frame.extend(shortened(text).as_bytes());
            }
            Control::ConfirmReject(number) => put_number(kind::CONFIRM_REJECT, *number, &mut frame),
            Control::Heartbeat => frame.push(kind::HEARTBEAT),
            Control::Goodbye => frame.push(kind::GOODBYE),
            Control::ConfirmGoodbye => frame.push(kind::CONFIRM_GOODBYE),
            Control::Skip(number) => put_number(kind::SKIP, *number, &mut frame),
            Control::Ignorable(kind) => frame.push(*kind),
        }
        framing.put_control(&frame, out);
    }

    /// Reads a control frame, without its prefix.
    ///
    /// # Errors
    ///
    /// Anything but the one encoding of a frame of this version, and of a frame that may be ignored.
    pub(crate) fn decode(frame: &[u8]) -> Result<Control, WireError> {
        let Some((&kind, rest)) = frame.split_first() else { return Err(WireError::Empty) };
        match kind {
            kind::HELLO => Hello::decode(Fields { frame: "HELLO", rest }).map(Control::Hello),
            kind::WELCOME => Welcome::decode(Fields { frame: "WELCOME", rest }).map(Control::Welcome),
            kind::REFUSE => {
                let mut fields = Fields { frame: "REFUSE", rest };
                let code = RefuseCode(u16::from_be_bytes(fields.take("code")?));
                let detail = fields.u64("detail")?;
                Ok(Control::Refuse(Refuse { code, detail, text: fields.text()? }))
            }
            kind::ACK => {
                let mut fields = Fields { frame: "ACK", rest };
                // Nothing is acknowledged before there is something.
                let number = fields.within("number", 1, u64::MAX)?;
                fields.end()?;
                Ok(Control::Ack(number))
            }
            kind::REJECT => {
                let mut fields = Fields { frame: "REJECT", rest };
                let number = fields.within("number", 1, u64::MAX)?;
                let code = u32::from_be_bytes(fields.take("code")?);
                Ok(Control::Reject(number, Rejection { code, text: fields.text()? }))
            }
            kind::CONFIRM_REJECT => {
                let mut fields = Fields { frame: "REJECT-CONFIRM", rest };
                let number = fields.within("number", 1, u64::MAX)?;
                fields.end()?;
                Ok(Control::ConfirmReject(number))
            }
            kind::HEARTBEAT => Fields { frame: "HEARTBEAT", rest }.end().map(|()| Control::Heartbeat),
            kind::GOODBYE => Fields { frame: "GOODBYE", rest }.end().map(|()| Control::Goodbye),
            kind::CONFIRM_GOODBYE => Fields { frame: "GOODBYE-CONFIRM", rest }.end().map(|()| Control::ConfirmGoodbye),
            kind::SKIP => {
                let mut fields = Fields { frame: "SKIP", rest };
                let number = fields.within("number", 1, u64::MAX)?;
                fields.end()?;
                Ok(Control::Skip(number))
            }
            kind::IGNORABLE.. => Ok(Control::Ignorable(kind)),
            kind => Err(WireError::Unknown { kind }),
        }
    }
}

impl Hello {
    fn put(&self, frame: &mut Vec<u8>) {
        frame.extend([kind::HELLO, self.versions.0, self.versions.1]);
        frame.extend(self.stream.0);
        for number in [self.epoch, self.first, self.maximum, self.window, self.reply_window] {
            frame.extend(number.to_be_bytes());
        }
        frame.extend(millis(self.heartbeat).to_be_bytes());
        debug_assert!(self.token.len() <= LONGEST_TOKEN);
        frame.extend((self.token.len() as u16).to_be_bytes());
        frame.extend(&self.token);
    }

    fn decode(mut fields: Fields<'_>) -> Result<Hello, WireError> {
        let [oldest] = fields.take("oldest version")?;
        let oldest = fields.check("oldest version", u64::from(oldest), 1, u64::from(u8::MAX))?;
        let [newest] = fields.take("newest version")?;
        fields.check("newest version", u64::from(newest), oldest, u64::from(u8::MAX))?;
        let stream = StreamId(fields.take("stream id")?);
        let epoch = fields.within("epoch", 1, u64::MAX)?;
        let first = fields.within("first number", 1, u64::MAX)?;
        let maximum = fields.within("maximum", 1, LARGEST_MAX)?;
        let window = fields.u64("window")?;
        let reply_window = fields.within("reply window", largest_frame(maximum), u64::MAX)?;
        let heartbeat = fields.heartbeat()?;
        let length = u16::from_be_bytes(fields.take("token length")?);
        let length = fields.check("token length", u64::from(length), 0, LONGEST_TOKEN as u64)?;
        let token = fields.bytes("token", length as usize)?.to_vec();
        if newest == VERSION {
            // Later versions may have more to say.
            fields.end()?;
        }
        let versions = (oldest as u8, newest);
        Ok(Hello { versions, stream, epoch, first, maximum, window, reply_window, heartbeat, token })
    }
}

impl Welcome {
    fn put(&self, frame: &mut Vec<u8>) {
        frame.extend([kind::WELCOME, self.version]);
        frame.extend(self.state.0);
        for number in [self.dispatched, self.committed, self.window] {
            frame.extend(number.to_be_bytes());
        }
        frame.extend(millis(self.heartbeat).to_be_bytes());
    }

    fn decode(mut fields: Fields<'_>) -> Result<Welcome, WireError> {
        let [version] = fields.take("version")?;
        fields.check("version", u64::from(version), u64::from(VERSION), u64::from(VERSION))?;
        let state = StateId(fields.take("state id")?);
        let dispatched = fields.u64("dispatched")?;
        let committed = fields.within("committed", 0, dispatched)?;
        let window = fields.u64("window")?;
        let heartbeat = fields.heartbeat()?;
        fields.end()?;
        Ok(Welcome { version, state, dispatched, committed, window, heartbeat })
    }
}

/// Bytes of the largest frame in a session with this maximum.
pub(crate) fn largest_frame(maximum: u64) -> u64 {
    let framing = usize::try_from(maximum).ok().and_then(|maximum| Framing::for_session(maximum).ok());
    framing.map_or(u64::MAX, |framing| maximum + framing.prefix_width(0) as u64)
}

fn put_number(kind: u8, number: u64, frame: &mut Vec<u8>) {
    frame.push(kind);
    frame.extend(number.to_be_bytes());
}

fn millis(time: Duration) -> u32 {
    time.as_millis().clamp(u128::from(HEARTBEATS.0), u128::from(HEARTBEATS.1)) as u32
}

/// A peer's text as it may stand in a log: what controls a terminal is replaced.
pub(crate) fn printable(text: &str) -> String {
    text.replace(char::is_control, "\u{fffd}")
}

/// As much of a text as is sent.
pub(crate) fn shortened(text: &str) -> &str {
    let mut end = text.len().min(LONGEST_TEXT);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}

/// What is left of a frame that is being decoded.
struct Fields<'a> {
    frame: &'static str,
    rest: &'a [u8],
}

impl<'a> Fields<'a> {
    fn bytes(&mut self, field: &'static str, length: usize) -> Result<&'a [u8], WireError> {
        let Some((bytes, rest)) = self.rest.split_at_checked(length) else {
            return Err(WireError::TooShort { frame: self.frame, field, got: self.rest.len(), want: length });
        };
        self.rest = rest;
        Ok(bytes)
    }

    fn take<const N: usize>(&mut self, field: &'static str) -> Result<[u8; N], WireError> {
        self.bytes(field, N).map(|bytes| bytes.try_into().expect("it has this length"))
    }

    fn u64(&mut self, field: &'static str) -> Result<u64, WireError> {
        self.take(field).map(u64::from_be_bytes)
    }

    fn within(&mut self, field: &'static str, least: u64, most: u64) -> Result<u64, WireError> {
        let seen = self.u64(field)?;
        self.check(field, seen, least, most)
    }

    fn check(&self, field: &'static str, seen: u64, least: u64, most: u64) -> Result<u64, WireError> {
        if seen < least || seen > most {
            return Err(WireError::OutOfRange { frame: self.frame, field, seen, least, most });
        }
        Ok(seen)
    }

    fn heartbeat(&mut self) -> Result<Duration, WireError> {
        let millis = u64::from(u32::from_be_bytes(self.take("heartbeat")?));
        self.check("heartbeat", millis, HEARTBEATS.0, HEARTBEATS.1).map(Duration::from_millis)
    }

    /// All that is left, as text.
    fn text(self) -> Result<String, WireError> {
        self.check("text length", self.rest.len() as u64, 0, LONGEST_TEXT as u64)?;
        match str::from_utf8(self.rest) {
            Ok(text) => Ok(text.to_owned()),
            Err(error) => Err(WireError::NotText { frame: self.frame, at: error.valid_up_to() }),
        }
    }

    fn end(self) -> Result<(), WireError> {
        match self.rest.len() {
            0 => Ok(()),
            extra => Err(WireError::TooLong { frame: self.frame, extra }),
        }
    }
}

/// Bytes that are not a control frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum WireError {
    /// Not even a kind.
    Empty,
    /// No version that is spoken here has this kind of frame, and it is not one that may be ignored.
    Unknown { kind: u8 },
    /// The frame ends inside a field.
    TooShort { frame: &'static str, field: &'static str, got: usize, want: usize },
    /// The frame goes on behind its last field.
    TooLong { frame: &'static str, extra: usize },
    /// A number that the field may not have.
    OutOfRange { frame: &'static str, field: &'static str, seen: u64, least: u64, most: u64 },
    /// A text is not UTF-8 from this byte on.
    NotText { frame: &'static str, at: usize },
}

impl fmt::Display for WireError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            WireError::Empty => write!(f, "a control frame of no bytes; the first byte says its kind"),
            WireError::Unknown { kind } => {
                let (first, last) = (kind::HELLO, kind::SKIP);
                write!(f, "a control frame of kind {kind}; known are {first} to {last}, from 128 on they are ignored")
            }
            WireError::TooShort { frame, field, got, want } => {
                write!(f, "{frame} ends {got} bytes into its {field} of {want}")
            }
            WireError::TooLong { frame, extra } => write!(f, "{frame} has {extra} bytes behind its last field"),
            WireError::OutOfRange { frame, field, seen, least, most } => {
                write!(f, "the {field} of {frame} is {seen}, and may be from {least} to {most}")
            }
            WireError::NotText { frame, at } => write!(f, "the text of {frame} is not UTF-8 from byte {at} on"),
        }
    }
}

impl std::error::Error for WireError {}

#[cfg(test)]
#[path = "wire_tests.rs"]
mod tests;
