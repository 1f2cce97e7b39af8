//! Somebody else's connection, read along: the messages of both directions, and what is said between them.
//!
//! The Dissector belongs to whoever passes bytes on between two peers and wants to know what they are. It demands only
//! what it needs to find the next frame; whether a peer may say what it says is for the other peer to judge.
//!
//! Invariant: for each direction it holds the torn front of one frame at most, of no more bytes than it was allowed to
//! keep, and of no more than have come.

use std::fmt;

use super::framing::{FrameError, Framing, Header};
use super::session::SessionError;
use super::session::wire::{Control, PREFACE, Preface, RefuseCode, VERSION, WireError, handshake_framing};

/// An empty buffer of more than this many bytes is given back.
const KEEP: usize = 64 * 1024;

/// Which way bytes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Direction {
    /// From the side that dialled to the one that listens.
    There,
    /// From the side that listens to the one that dialled.
    Back,
}

/// What is found on a connection, in the order of its direction.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub enum Dissected<'a> {
    /// The side that dialled asks for an acknowledged stream: from here on both directions are a session.
    Preface,
    /// A message.
    Message {
        /// Its bytes, lent for the length of the call.
        bytes: &'a [u8],
        /// Its number in an acknowledged stream; for a message back, on this connection. `None` outside of sessions.
        number: Option<u64>,
    },
    /// A message that is longer than what may be kept. It is told when it begins, and its bytes are passed over.
    LongMessage {
        /// Bytes that it takes.
        length: u64,
        /// As of [`Message`](Dissected::Message).
        number: Option<u64>,
    },
    /// A control frame of a session.
    Control(&'a ControlFrame),
}

/// A control frame of a session. Its `Display` is one line that names every field, as PROTOCOL.md does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ControlFrame(Control);

impl ControlFrame {
    /// What PROTOCOL.md calls it: `HELLO`, `ACK`.
    pub fn name(&self) -> &'static str {
        self.0.name()
    }
}

impl fmt::Display for ControlFrame {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())?;
        match &self.0 {
            Control::Hello(hello) => write!(
                f,
                " stream {}, epoch {}, first {}, maximum {}, window {}, reply window {}, heartbeat {:?}, token of {} \
                 bytes, versions {} to {}",
                hello.stream,
                hello.epoch,
                hello.first,
                hello.maximum,
                hello.window,
                hello.reply_window,
                hello.heartbeat,
                hello.token.len(),
                hello.versions.0,
                hello.versions.1,
            ),
            Control::Welcome(welcome) => write!(
                f,
                " dispatched {}, committed {}, window {}, heartbeat {:?}, state {:032x}, version {}",
                welcome.dispatched,
                welcome.committed,
                welcome.window,
                welcome.heartbeat,
                u128::from_be_bytes(welcome.state.0),
                welcome.version,
            ),
            Control::Refuse(refuse) => {
                match refuse_name(refuse.code) {
                    Some(name) => write!(f, " {name}")?,
                    None => write!(f, " {:04x}", refuse.code.0)?,
                }
                write!(f, ", detail {}: {}", refuse.detail, refuse.text.escape_debug())
            }
            Control::Reject(number, rejection) => {
                write!(f, " {number}, code {}: {}", rejection.code, rejection.text.escape_debug())
            }
            Control::Ack(number) | Control::ConfirmReject(number) | Control::Skip(number) => write!(f, " {number}"),
            Control::Heartbeat | Control::Goodbye | Control::ConfirmGoodbye => Ok(()),
            Control::Ignorable(kind) => write!(f, " of kind {kind}"),
        }
    }
}

fn refuse_name(code: RefuseCode) -> Option<&'static str> {
    Some(match code.0 {
        0x0001 => "VERSION",
        0x0002 => "NO-SESSIONS",
        0x0003 => "MAXIMUM",
        0x0004 => "UNAUTHORIZED",
        0x0005 => "PROTOCOL",
        0x8001 => "EPOCH",
        0x8002 => "BUSY",
        0x8003 => "DRAINING",
        _ => return None,
    })
}

/// Reads both directions of one connection along, plain or an acknowledged stream.
///
/// Bytes are given to it as they pass, in any pieces; it lends what it finds. What one side says must come to it before
/// whatever the other side says in answer: whoever passes bytes on gives them to the Dissector first.
///
/// ```
/// use buffstreams::{Direction, Dissected, Dissector, Framing, Prefix};
///
/// let mut dissector = Dissector::new(Framing::new(Prefix::Varint), 1 << 20);
/// let mut found = Vec::new();
/// for piece in [&b"\x05he"[..], b"llo\x01"] {
///     dissector.feed(Direction::There, piece, |what| {
///         if let Dissected::Message { bytes, .. } = what {
///             found.push(bytes.to_vec());
///         }
///     })?;
/// }
/// assert_eq!(found, [b"hello"]);
/// assert_eq!(
///     dissector.end(Direction::There).unwrap_err().to_string(),
///     "behind byte 6: the stream ended 0 bytes into a message of 1",
/// );
/// # Ok::<(), buffstreams::DissectError>(())
/// ```
#[derive(Debug)]
pub struct Dissector {
    plain: Framing,
    longest: usize,
    there: Half,
    back: Half,
    /// The preface has come.
    in_session: bool,
    /// What is spoken behind the handshake, by HELLO.
    agreed: Option<Framing>,
    /// The number of the next message, where it is known.
    next_there: Option<u64>,
    next_back: Option<u64>,
}

/// One direction.
#[derive(Debug)]
struct Half {
    mode: Mode,
    held: Vec<u8>,
    /// What is left of a message that is passed over.
    passing: Option<Passing>,
    /// Bytes that were understood.
    at: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    /// The first bytes will tell.
    Undecided,
    Plain,
    /// The session's first frames, and then the others.
    Greeting,
    Session(Framing),
    /// It was not understood.
    Over,
}

#[derive(Clone, Copy, Debug)]
struct Passing {
    left: u64,
    length: u64,
}

/// What the bytes at hand begin with.
enum Begins {
    /// Nothing whole. So many bytes in all, if that is known.
    Torn(Option<usize>),
    Preface,
    Decided(Mode),
    Frame(Header, bool),
    Long(Header),
}

impl Dissector {
    /// Reads a connection along whose plain frames are of this framing; a session says of itself what it is. A message
    /// of more than `longest` bytes is not kept, but told as [`Dissected::LongMessage`].
    pub fn new(plain: Framing, longest: usize) -> Dissector {
        let half = || Half { mode: Mode::Undecided, held: Vec::new(), passing: None, at: 0 };
        let (next_there, next_back) = (None, Some(1));
        Dissector {
            plain,
            longest,
            there: half(),
            back: half(),
            in_session: false,
            agreed: None,
            next_there,
            next_back,
        }
    }

    /// Bytes that are kept at the moment, of both directions.
    pub fn held(&self) -> usize {
        self.there.held.len() + self.back.held.len()
    }

    /// Takes the next bytes of a direction, and calls `each` with everything that they complete.
    ///
    /// # Errors
    ///
    /// Once, when bytes come that cannot be understood; everything before them was found. Nothing is found in this
    /// direction any more, and whatever else comes is passed over.
    pub fn feed(
        &mut self,
        direction: Direction,
        bytes: &[u8],
        mut each: impl FnMut(Dissected<'_>),
    ) -> Result<(), DissectError> {
        let mut held = std::mem::take(&mut self.half(direction).held);
        let result = self.feed_held(direction, &mut held, bytes, &mut each);
        if result.is_err() {
            self.half(direction).mode = Mode::Over;
            held = Vec::new();
        }
        if held.is_empty() && held.capacity() > KEEP {
            held = Vec::new();
        }
        self.half(direction).held = held;
        result
    }

    /// The direction has ended.
    ///
    /// # Errors
    ///
    /// It ended inside a frame.
    pub fn end(&mut self, direction: Direction) -> Result<(), DissectError> {
        let plain = self.plain;
        let half = self.half(direction);
        let what = match (half.passing.take(), half.mode) {
            (_, Mode::Over) => return Ok(()),
            (Some(Passing { left, length }), _) => {
                let size = |bytes: u64| usize::try_from(bytes).unwrap_or(usize::MAX);
                FrameError::Truncated { got: size(length - left), want: size(length) }
            }
            (None, _) if half.held.is_empty() => return Ok(()),
            (None, Mode::Greeting) => handshake_framing().truncated(&half.held),
            (None, Mode::Session(framing)) => framing.truncated(&half.held),
            (None, Mode::Undecided | Mode::Plain) => plain.truncated(&half.held),
        };
        half.mode = Mode::Over;
        half.held = Vec::new();
        Err(DissectError { at: half.at, fault: Fault::Frame(what) })
    }

    fn half(&mut self, direction: Direction) -> &mut Half {
        match direction {
            Direction::There => &mut self.there,
            Direction::Back => &mut self.back,
        }
    }

    fn feed_held(
        &mut self,
        direction: Direction,
        held: &mut Vec<u8>,
        mut rest: &[u8],
        each: &mut impl FnMut(Dissected<'_>),
    ) -> Result<(), DissectError> {
        while self.half(direction).mode != Mode::Over {
            let half = self.half(direction);
            if let Some(Passing { left, .. }) = &mut half.passing {
                let passed = (*left).min(rest.len() as u64);
                *left -= passed;
                half.at += passed;
                rest = &rest[passed as usize..];
                if *left > 0 {
                    return Ok(());
                }
                half.passing = None;
            }
            if held.is_empty() && rest.is_empty() {
                return Ok(());
            }
            let is_held = !held.is_empty();
            let bytes = if is_held { &held[..] } else { rest };
            let taken = match self.begins(direction, bytes)? {
                Begins::Decided(mode) => {
                    self.half(direction).mode = mode;
                    continue;
                }
                Begins::Torn(_) if !is_held => {
                    held.extend_from_slice(rest);
                    return Ok(());
                }
                Begins::Torn(whole) => {
                    // As much as is missing; where that is not known, the next byte will tell more.
                    let missing = whole.map_or(1, |whole| whole - held.len()).min(rest.len());
                    if missing == 0 {
                        return Ok(());
                    }
                    held.extend_from_slice(&rest[..missing]);
                    rest = &rest[missing..];
                    continue;
                }
                Begins::Preface => {
                    self.in_session = true;
                    self.half(direction).mode = Mode::Greeting;
                    each(Dissected::Preface);
                    PREFACE
                }
                Begins::Long(header) => {
                    let number = self.number(direction)?;
                    let length = header.message as u64;
                    each(Dissected::LongMessage { length, number });
                    let come = bytes.len().min(header.frame());
                    let left = (header.frame() - come) as u64;
                    self.half(direction).passing = (left > 0).then_some(Passing { left, length });
                    come
                }
                Begins::Frame(header, false) => {
                    let number = self.number(direction)?;
                    each(Dissected::Message { bytes: &bytes[header.prefix..header.frame()], number });
                    header.frame()
                }
                Begins::Frame(header, true) => {
                    let frame = &bytes[header.prefix..header.frame()];
                    let control = Control::decode(frame).map_err(|error| self.fault(direction, error))?;
                    self.heard(direction, &control)?;
                    each(Dissected::Control(&ControlFrame(control)));
                    header.frame()
                }
            };
            self.half(direction).at += taken as u64;
            if is_held {
                held.drain(..taken);
            } else {
                rest = &rest[taken..];
            }
        }
        Ok(())
    }

    /// What the bytes of a direction begin with. There is at least one.
    fn begins(&mut self, direction: Direction, bytes: &[u8]) -> Result<Begins, DissectError> {
        let (framing, in_session) = match (self.half(direction).mode, direction) {
            (Mode::Undecided, Direction::Back) => {
                // The side that listens answers to a session only once it has been asked for one.
                let mode = if self.in_session { Mode::Greeting } else { Mode::Plain };
                return Ok(Begins::Decided(mode));
            }
            (Mode::Undecided, Direction::There) => match Preface::of(bytes) {
                Preface::Incomplete => return Ok(Begins::Torn(None)),
                Preface::Plain => return Ok(Begins::Decided(Mode::Plain)),
                Preface::Session { version: VERSION } => return Ok(Begins::Preface),
                Preface::Session { version } => return Err(self.fault(direction, Fault::Preface(version))),
            },
            (Mode::Plain | Mode::Over, _) => (self.plain, false),
            (Mode::Greeting, _) => (handshake_framing(), true),
            (Mode::Session(framing), _) => (framing, true),
        };
        let (header, is_control) = match framing.header(bytes) {
            Ok(None) => return Ok(Begins::Torn(None)),
            Ok(Some(header)) => (header, false),
            Err(refused) if in_session => match framing.control_header(refused) {
                Ok(header) => (header, true),
                Err(error) => return Err(self.fault(direction, error)),
            },
            Err(error) => return Err(self.fault(direction, error)),
        };
        // A prefix may declare more than there are addresses.
        let Some(whole) = header.prefix.checked_add(header.message) else {
            let declared = header.message as u64;
            return Err(self.fault(direction, FrameError::TooLarge { declared, max: self.longest }));
        };
        Ok(match is_control {
            false if header.message > self.longest => Begins::Long(header),
            _ if whole <= bytes.len() => Begins::Frame(header, is_control),
            _ => Begins::Torn(Some(whole)),
        })
    }

    /// The number of a message that comes now.
    fn number(&mut self, direction: Direction) -> Result<Option<u64>, DissectError> {
        match self.half(direction).mode {
            Mode::Greeting => Err(self.out_of_place(direction, "a message")),
            Mode::Session(_) => {
                let next = match direction {
                    Direction::There => &mut self.next_there,
                    Direction::Back => &mut self.next_back,
                };
                let number = *next;
                *next = number.and_then(|number| number.checked_add(1));
                Ok(number)
            }
            _ => Ok(None),
        }
    }

    /// What follows from a control frame for the frames behind it.
    fn heard(&mut self, direction: Direction, control: &Control) -> Result<(), DissectError> {
        match (self.half(direction).mode, direction, control) {
            (Mode::Greeting, Direction::There, Control::Hello(hello)) => {
                let maximum = usize::try_from(hello.maximum).unwrap_or(usize::MAX);
                let framing = Framing::for_session(maximum).map_err(|_| {
                    self.fault(direction, FrameError::TooLarge { declared: hello.maximum, max: maximum })
                })?;
                self.agreed = Some(framing);
                self.there.mode = Mode::Session(framing);
            }
            (Mode::Greeting, Direction::Back, Control::Welcome(welcome)) => {
                let Some(framing) = self.agreed else { return Err(self.out_of_place(direction, control.name())) };
                self.next_there = welcome.dispatched.checked_add(1);
                self.back.mode = Mode::Session(framing);
            }
            (_, Direction::There, Control::Skip(number)) => self.next_there = Some(*number),
            (_, _, Control::Hello(_) | Control::Welcome(_)) | (Mode::Greeting, Direction::There, _) => {
                return Err(self.out_of_place(direction, control.name()));
            }
            _ => {}
        }
        Ok(())
    }

    fn out_of_place(&mut self, direction: Direction, frame: &'static str) -> DissectError {
        let when = match (self.half(direction).mode, direction) {
            (Mode::Greeting, Direction::There) => "before HELLO",
            (Mode::Greeting, Direction::Back) => "before WELCOME",
            _ => "there",
        };
        self.fault(direction, SessionError::OutOfPlace { frame, when })
    }

    fn fault(&mut self, direction: Direction, fault: impl Into<Fault>) -> DissectError {
        DissectError { at: self.half(direction).at, fault: fault.into() }
    }
}

/// Bytes that could not be understood, and where in their direction they stand.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DissectError {
    at: u64,
    fault: Fault,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Fault {
    Frame(FrameError),
    Session(SessionError),
    Preface(u8),
}

impl DissectError {
    /// How many bytes of the direction came before.
    pub fn offset(&self) -> u64 {
        self.at
    }
}

impl From<SessionError> for Fault {
    fn from(error: SessionError) -> Fault {
        Fault::Session(error)
    }
}

impl From<WireError> for Fault {
    fn from(error: WireError) -> Fault {
        Fault::Session(error.into())
    }
}

impl From<FrameError> for Fault {
    fn from(error: FrameError) -> Fault {
        Fault::Frame(error)
    }
}

impl fmt::Display for DissectError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "behind byte {}: ", self.at)?;
        match &self.fault {
            Fault::Frame(error) => error.fmt(f),
            Fault::Session(error) => error.fmt(f),
            Fault::Preface(version) => write!(f, "a session of version {version} is asked for; known is {VERSION}"),
        }
    }
}

impl std::error::Error for DissectError {}

#[cfg(test)]
#[path = "dissect_tests.rs"]
mod tests;
