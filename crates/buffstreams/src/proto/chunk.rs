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

    /// Moves the first frame into a chunk of its own.
    pub(super) fn split_first(&mut self, framing: &Framing) -> Chunk {
        let frame = self.first_frame(framing).expect("a chunk in the queue has a frame").frame();
        let frames = self.frames.split_to(frame.min(self.frames.len()));
        let payload = if self.count == 1 { std::mem::take(&mut self.payload) } else { Bytes::new() };
        let first = Chunk { frames, payload, count: 1, ..*self };
        self.first += 1;
        self.count -= 1;
        first
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
