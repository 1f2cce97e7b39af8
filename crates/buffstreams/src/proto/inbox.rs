//! Received bytes become complete messages, lent where they lie.
//!
//! The Inbox belongs to one connection and holds what that connection must keep between two reads: usually nothing, or
//! the torn front of one frame. The bytes of a read lie in a scratch buffer that belongs to somebody else. Only a frame
//! that is large gets a buffer of its own, which grows with the bytes received and never with the length declared.
//!
//! Invariant: every received byte is either lent as part of exactly one message, or held, or behind a malformed prefix.

use std::cell::OnceCell;
use std::fmt;
use std::ops::Deref;

use bytes::buf::Limit;
use bytes::{BufMut, Bytes, BytesMut};

use super::framing::{FrameError, Framing};

/// An incomplete frame of at least this many bytes is read straight into a buffer of its own.
const LARGE_FRAME: usize = 16 * 1024;

/// But only when this many bytes of it have come: a prefix alone costs nothing.
const BEGINNING: usize = 8 * 1024;

/// The least by which that buffer grows at a time, in bytes; from there on it doubles.
const GROWTH: usize = 64 * 1024;

/// A received message, lent to a handler for the length of a call.
///
/// It dereferences to the message's bytes. A handler that needs them for longer takes them
/// [as `Bytes`](Message::to_bytes).
#[derive(Clone, Copy)]
pub struct Message<'a> {
    bytes: &'a [u8],
    read: &'a Read<'a>,
    /// 0 outside of acknowledged streams.
    number: u64,
}

impl<'a> Message<'a> {
    /// The message, for as long as it is lent.
    #[inline]
    pub fn as_slice(&self) -> &'a [u8] {
        self.bytes
    }

    /// Its number in an acknowledged stream, counted from 1; the same when it is sent again. Together with
    /// [`Peer::stream_id`](crate::Peer::stream_id) it names the message for good: a handler that stores both beside
    /// what it does can tell a repeat. `None` on other connections.
    #[inline]
    pub fn number(&self) -> Option<u64> {
        (self.number != 0).then_some(self.number)
    }

    /// The same message with its number.
    #[inline]
    pub(crate) fn numbered(self, number: u64) -> Message<'a> {
        Message { number, ..self }
    }

    /// Lends a message that was kept.
    pub(crate) fn lend<T>(message: &Bytes, number: u64, to: impl FnOnce(Message<'_>) -> T) -> T {
        let read = Read { all: message, shared: OnceCell::from(message.clone()) };
        to(Message { bytes: message, read: &read, number })
    }

    /// The message, to keep.
    ///
    /// All messages of one read share one copy of it, made at the first call: cheap when most messages are kept. While
    /// any of them lives, so does the whole copy (up to 256 KiB); whoever keeps one message in many, and for long, is
    /// better off with `Bytes::copy_from_slice`. A large message is handed over without any copy.
    pub fn to_bytes(&self) -> Bytes {
        if self.bytes.is_empty() {
            return Bytes::new();
        }
        let whole = self.read.shared.get_or_init(|| Bytes::copy_from_slice(self.read.all));
        let start = self.bytes.as_ptr() as usize - self.read.all.as_ptr() as usize;
        whole.slice(start..start + self.bytes.len())
    }
}

impl Deref for Message<'_> {
    type Target = [u8];

    #[inline]
    fn deref(&self) -> &[u8] {
        self.bytes
    }
}

impl AsRef<[u8]> for Message<'_> {
    fn as_ref(&self) -> &[u8] {
        self.bytes
    }
}

impl fmt::Debug for Message<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Message({} bytes)", self.bytes.len())
    }
}

/// The bytes of one read, and the copy that those share who want to keep messages from it.
struct Read<'a> {
    all: &'a [u8],
    shared: OnceCell<Bytes>,
}

/// What the receiver of a message wants next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Flow {
    /// The next message.
    Continue,
    /// A pause: what is left is held.
    Pause,
}

/// Why [`Inbox::deliver`] returned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Delivered {
    /// No whole frame is left.
    All,
    /// There may be whole frames left: the bound was reached, or the receiver asked for a pause.
    Paused,
}

/// What is found in a session, in the order of the stream.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Found<'a> {
    Message(Message<'a>),
    /// A control frame, without its prefix.
    Control(&'a [u8]),
}

/// Where the next bytes from the connection belong.
pub(crate) enum Room<'a> {
    /// Into the scratch buffer, from this offset on.
    Scratch(&'a mut [u8]),
    /// Into the large frame at hand, and no further than its end.
    Own(Limit<&'a mut BytesMut>),
}

/// What one connection keeps between two reads.
#[derive(Debug)]
pub(crate) struct Inbox {
    framing: Framing,
    held: BytesMut,
    /// What of `held` was lent between two pauses. It is cut off with the last whole frame, and counted until then.
    lent: usize,
    /// Whether `held` begins with an incomplete large frame, of this many bytes in all.
    large: Option<usize>,
    /// Whether control frames may stand between messages.
    in_session: bool,
}

impl Inbox {
    pub(crate) fn new(framing: Framing) -> Inbox {
        Inbox { framing, held: BytesMut::new(), lent: 0, large: None, in_session: false }
    }

    /// Bytes received that no handler has seen.
    pub(crate) fn held(&self) -> usize {
        self.held.len() - self.lent
    }

    /// Bytes of memory that this connection's buffer takes.
    pub(crate) fn memory(&self) -> usize {
        self.held.capacity()
    }

    /// Gives the memory of an unused buffer back.
    pub(crate) fn release(&mut self) {
        if self.held.is_empty() {
            self.held = BytesMut::new();
        }
    }

    /// Where to put what is read next. `scratch` is at least twice a [`LARGE_FRAME`].
    pub(crate) fn room<'a>(&'a mut self, scratch: &'a mut [u8]) -> Room<'a> {
        match self.large {
            Some(frame) => {
                let missing = frame - self.held.len();
                if self.held.capacity() == self.held.len() {
                    self.held.reserve(missing.min(self.held.len().max(GROWTH)));
                }
                Room::Own((&mut self.held).limit(missing))
            }
            None => Room::Scratch(&mut scratch[self.held.len()..]),
        }
    }

    /// Lends every whole frame to `each`, at most `most` of them, after `read` bytes were put where
    /// [`room`](Self::room) said. With `read` 0 it goes on with what a pause left.
    ///
    /// # Errors
    ///
    /// A prefix that is not allowed. Every message before it was lent.
    pub(crate) fn deliver(
        &mut self,
        scratch: &mut [u8],
        read: usize,
        most: usize,
        mut each: impl FnMut(Message<'_>) -> Flow,
    ) -> Result<Delivered, FrameError> {
        debug_assert!(!self.in_session, "control frames have no place to go");
        self.deliver_found::<false>(scratch, read, most, &mut |found| match found {
            Found::Message(message) => each(message),
            Found::Control(_) => unreachable!("outside of a session a control frame is an error"),
        })
    }

    /// The same [in a session](Self::enter_session): messages and control frames, in the order in which they came.
    ///
    /// # Errors
    ///
    /// A prefix that is not allowed. Everything before it was lent.
    pub(crate) fn deliver_in_session(
        &mut self,
        scratch: &mut [u8],
        read: usize,
        most: usize,
        mut each: impl FnMut(Found<'_>) -> Flow,
    ) -> Result<Delivered, FrameError> {
        debug_assert!(self.in_session);
        self.deliver_found::<true>(scratch, read, most, &mut each)
    }

    /// Keeps what was read for later, unseen: until it is known what it is.
    pub(crate) fn keep(&mut self, scratch: &[u8], read: usize) {
        debug_assert!(self.large.is_none() && self.lent == 0);
        let kept = self.held.len();
        self.held.extend_from_slice(&scratch[kept..kept + read]);
    }

    /// What was received and not seen by any handler.
    pub(crate) fn unseen(&self) -> &[u8] {
        &self.held[self.lent..]
    }

    /// From here on the stream is of this framing, with control frames; `skipped` bytes of what was kept come before.
    /// Only after a pause, or before anything was delivered.
    pub(crate) fn enter_session(&mut self, framing: Framing, skipped: usize) {
        debug_assert!(self.large.is_none() && skipped <= self.held());
        self.lent += skipped;
        self.cut_lent();
        self.framing = framing;
        self.in_session = true;
    }

    #[inline]
    fn deliver_found<const IN_SESSION: bool>(
        &mut self,
        scratch: &mut [u8],
        read: usize,
        most: usize,
        each: &mut impl FnMut(Found<'_>) -> Flow,
    ) -> Result<Delivered, FrameError> {
        if let Some(frame) = self.large {
            if self.held.len() < frame {
                return Ok(Delivered::All);
            }
            return Ok(self.deliver_large(each));
        }
        if read == 0 {
            let (taken, result) = scan::<IN_SESSION>(self.framing, &self.held[self.lent..], most, each);
            self.lent += taken;
            if result != Ok(Delivered::Paused) || self.held() == 0 {
                self.cut_lent();
            }
            return self.settle(result);
        }
        debug_assert_eq!(self.lent, 0, "what a pause left is lent before anything is read");
        let torn = self.held.len();
        scratch[..torn].copy_from_slice(&self.held);
        self.held.clear();
        let bytes = &scratch[..torn + read];
        let (taken, result) = scan::<IN_SESSION>(self.framing, bytes, most, each);
        self.held.extend_from_slice(&bytes[taken..]);
        self.settle(result)
    }

    fn cut_lent(&mut self) {
        self.held.copy_within(self.lent.., 0);
        self.held.truncate(self.held.len() - self.lent);
        self.lent = 0;
    }

    /// After a scan: finds out whether what is held is the front of a large frame.
    fn settle(&mut self, result: Result<Delivered, FrameError>) -> Result<Delivered, FrameError> {
        if result == Ok(Delivered::All) && !self.held.is_empty() {
            let header = match self.framing.header(&self.held) {
                Err(refused) if self.in_session => Some(self.framing.control_header(refused)?),
                header => header?,
            };
            let frame = header.map(|header| header.frame()).filter(|frame| *frame >= LARGE_FRAME);
            self.large = frame.filter(|_| self.held.len() >= BEGINNING);
        }
        result
    }

    /// The large frame is whole, and nothing is behind it. Its buffer is used again unless the receiver kept it.
    fn deliver_large(&mut self, each: &mut impl FnMut(Found<'_>) -> Flow) -> Delivered {
        self.large = None;
        let whole = std::mem::take(&mut self.held).freeze();
        let header = self.framing.header(&whole).ok().flatten().expect("checked when the frame began");
        let read = Read { all: &whole, shared: OnceCell::from(whole.clone()) };
        let flow = each(Found::Message(Message { bytes: &whole[header.prefix..], read: &read, number: 0 }));
        drop(read);
        if let Ok(mut buffer) = whole.try_into_mut() {
            buffer.clear();
            self.held = buffer;
        }
        match flow {
            Flow::Continue => Delivered::All,
            Flow::Pause => Delivered::Paused,
        }
    }

    /// The stream has ended: cleanly, or inside a frame.
    pub(crate) fn end(&self) -> Result<(), FrameError> {
        if self.held.is_empty() { Ok(()) } else { Err(self.framing.truncated(&self.held)) }
    }
}

/// Lends the whole frames at the start of `bytes`; says how many bytes they took and why it stopped.
#[inline]
fn scan<const IN_SESSION: bool>(
    framing: Framing,
    bytes: &[u8],
    most: usize,
    each: &mut impl FnMut(Found<'_>) -> Flow,
) -> (usize, Result<Delivered, FrameError>) {
    let read = Read { all: bytes, shared: OnceCell::new() };
    let mut at = 0;
    for _ in 0..most {
        let rest = &bytes[at..];
        let header = match framing.header(rest) {
            Ok(Some(header)) if header.frame() <= rest.len() => header,
            Ok(_) => return (at, Ok(Delivered::All)),
            Err(refused) if IN_SESSION => match framing.control_header(refused) {
                Ok(header) if header.frame() > rest.len() => return (at, Ok(Delivered::All)),
                Ok(header) => {
                    at += header.frame();
                    if each(Found::Control(&rest[header.prefix..header.frame()])) == Flow::Pause {
                        return (at, Ok(Delivered::Paused));
                    }
                    continue;
                }
                Err(error) => return (at, Err(error)),
            },
            Err(error) => return (at, Err(error)),
        };
        at += header.frame();
        let message = Message { bytes: &rest[header.prefix..header.frame()], read: &read, number: 0 };
        if each(Found::Message(message)) == Flow::Pause {
            return (at, Ok(Delivered::Paused));
        }
    }
    (at, Ok(Delivered::Paused))
}

#[cfg(test)]
#[path = "inbox_tests.rs"]
mod tests;
