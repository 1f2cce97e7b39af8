//! A chunk: consecutive messages as they go to a socket, and the only code that walks one frame by frame.
//!
//! A chunk is closed: nothing is added to it any more. It gets shorter at its front, never in its middle. It knows the
//! numbers of its messages, and what became of it on the connection at hand; what follows from that is the Outbox's.

use std::ops::Range;
use std::time::Instant;

use bytes::{Buf, Bytes};

use super::framing::{Framing, Header};

/// Consecutive messages in encoded form: whole frames, the last of which may have its message in `payload`.
#[derive(Debug)]
pub(super) struct Chunk {
    pub(super) frames: Bytes,
    pub(super) payload: Bytes,
    pub(super) first: u64,
    pub(super) count: u64,
    pub(super) begun: Instant,
    pub(super) expires: Option<Instant>,
    pub(super) attempts: u32,
    /// Bytes of it that a kernel took on the connection at hand.
    pub(super) written: usize,
    /// A part of it left on an earlier connection, so it may no longer be dropped as unwritten.
    pub(super) touched: bool,
    /// In a session, the number of the first message there; 0 until it is written. Those behind it count on.
    pub(super) session: u64,
    /// In a session, where the chunk begins among all bytes of the connection at hand, if it was handed out on it.
    pub(super) at: Option<u64>,
}

impl Chunk {
    pub(super) fn len(&self) -> usize {
        self.frames.len() + self.payload.len()
    }

    pub(super) fn numbers(&self) -> Range<u64> {
        self.first..self.first + self.count
    }

    /// The first frame's measures.
    pub(super) fn first_frame(&self, framing: &Framing) -> Option<Header> {
        (self.count > 0).then(|| framing.header(&self.frames).ok().flatten().expect("the Outbox encoded this frame"))
    }

    /// How many frames at the front go on being `wanted`, and their bytes. `wanted` gets a frame's place in the chunk:
    /// its index, and its first and last byte.
    pub(super) fn front(&self, framing: &Framing, wanted: impl Fn(u64, Range<usize>) -> bool) -> (u64, usize) {
        let (mut count, mut bytes) = (0, 0);
        while count < self.count {
            let header = framing.header(&self.frames[bytes..]).ok().flatten().expect("the Outbox encoded this frame");
            if !wanted(count, bytes..bytes + header.frame()) {
                break;
            }
            bytes += header.frame();
            count += 1;
        }
        (count, bytes)
    }

    /// Moves the first `count` frames, of so many `bytes`, into a chunk of their own.
    pub(super) fn split(&mut self, count: u64, bytes: usize) -> Chunk {
        let frames = self.frames.split_to(bytes.min(self.frames.len()));
        let payload = if self.count == count { std::mem::take(&mut self.payload) } else { Bytes::new() };
        let front = Chunk { frames, payload, count, ..*self };
        self.first += count;
        self.count -= count;
        if self.session != 0 {
            self.session += count;
        }
        self.at = self.at.map(|at| at + bytes as u64);
        front
    }

    /// Moves the first frame into a chunk of its own.
    pub(super) fn split_first(&mut self, framing: &Framing) -> Chunk {
        let frame = self.first_frame(framing).expect("a chunk in the queue has a frame").frame();
        self.split(1, frame)
    }

    /// Moves the last frame into a chunk of its own.
    pub(super) fn split_last(&mut self, framing: &Framing) -> Chunk {
        let (count, bytes) = self.front(framing, |index, _| index + 1 < self.count);
        let front = self.split(count, bytes);
        std::mem::replace(self, front)
    }

    /// In a session, the number behind that of the last message; 0 if they have none yet.
    pub(super) fn session_end(&self) -> u64 {
        if self.session == 0 { 0 } else { self.session + self.count }
    }

    /// Cuts the first frame off: its message, and the bytes the frame took.
    pub(super) fn pop(&mut self, framing: &Framing) -> Option<(u64, Bytes, usize)> {
        let header = self.first_frame(framing)?;
        let number = self.first;
        self.first += 1;
        self.count -= 1;
        self.frames.advance(header.prefix);
        let message = if self.count == 0 && !self.payload.is_empty() {
            std::mem::take(&mut self.payload)
        } else {
            self.frames.split_to(header.message)
        };
        Some((number, message, header.frame()))
    }
}
