//! Messages that came and cannot be handled yet, on either side of a session.
//!
//! Invariants: they are in the order of their numbers, their frames take no more bytes than the window, and they are copies:
//! nothing keeps alive what else was read with them. They lie frame behind frame in blocks, so that the smallest message
//! takes no more than its frame, and the room of a block is given back once all in it is taken. It refuses whatever goes
//! beyond the window.

use std::collections::BTreeMap;

use bytes::Bytes;

use super::super::framing::Framing;
use super::SessionError;

/// Bytes that a block takes at most, unless one frame is larger. A message that was taken keeps its block alive.
const BLOCK: usize = 4 * 1024;

/// Bytes that a gap between two numbers is accounted for: behind it a new block begins, however empty the last one is.
const GAP: usize = 128;

/// What is held of one direction of one connection.
#[derive(Debug)]
pub(crate) struct Held {
    framing: Framing,
    window: usize,
    /// The number of the first message in the block that is being taken from, and what is left of that.
    first: u64,
    front: Bytes,
    /// The others, by the number of their first message.
    blocks: BTreeMap<u64, Block>,
    /// The number that goes into the last block; 0 if none does.
    next: u64,
    bytes: usize,
    messages: u64,
    gaps: usize,
}

/// Frames whose numbers have no gap.
#[derive(Debug)]
struct Block {
    frames: Vec<u8>,
    behind_gap: bool,
}

impl Held {
    /// Nothing yet, and never more than `window` bytes of frames.
    pub(crate) fn new(framing: Framing, window: usize) -> Held {
        Held {
            framing,
            window,
            first: 0,
            front: Bytes::new(),
            blocks: BTreeMap::new(),
            next: 0,
            bytes: 0,
            messages: 0,
            gaps: 0,
        }
    }

    /// Holds a copy of a message that comes behind all that are held.
    ///
    /// # Errors
    ///
    /// If that is more than the window allows: then it is not held.
    pub(crate) fn push(&mut self, number: u64, message: &[u8]) -> Result<(), SessionError> {
        debug_assert!(self.is_empty() || number >= self.next);
        let frame = self.framing.prefix_width(message.len()) + message.len();
        let held = self.bytes + frame;
        if held > self.window {
            return Err(SessionError::WindowExceeded { held, window: self.window });
        }
        let behind_gap = number != self.next && !self.is_empty();
        let last = self.blocks.last_entry().map(|last| &mut last.into_mut().frames);
        match last {
            Some(frames) if !behind_gap && frames.len() + frame <= BLOCK => {
                if frames.capacity() < frames.len() + frame {
                    let room = (2 * frames.capacity()).clamp(frames.len() + frame, BLOCK);
                    frames.reserve_exact(room - frames.len());
                }
                put(&self.framing, message, frames);
            }
            last => {
                // Nothing more goes into it.
                last.into_iter().for_each(Vec::shrink_to_fit);
                self.begin(number, message, behind_gap);
            }
        }
        self.next = number.saturating_add(1);
        self.bytes = held;
        self.messages += 1;
        Ok(())
    }

    /// Puts a message back that was taken, or never held: before all that are.
    pub(crate) fn put_back(&mut self, number: u64, message: &[u8]) {
        debug_assert!(self.first().is_none_or(|first| number < first));
        self.close_front();
        if self.is_empty() {
            self.next = number.saturating_add(1);
        }
        self.begin(number, message, false);
        self.bytes += self.framing.prefix_width(message.len()) + message.len();
        self.messages += 1;
    }

    /// The first message, with its number.
    pub(crate) fn take(&mut self) -> Option<(u64, Bytes)> {
        if self.front.is_empty() {
            let (number, block) = self.blocks.pop_first()?;
            self.gaps -= usize::from(block.behind_gap);
            (self.first, self.front) = (number, Bytes::from(block.frames));
        }
        let (prefix, frame) = self.measure(&self.front);
        let message = self.front.split_to(frame).slice(prefix..);
        let number = self.first;
        self.first += 1;
        self.bytes -= frame;
        self.messages -= 1;
        Some((number, message))
    }

    /// Drops the message of this number, if it is held.
    pub(crate) fn remove(&mut self, number: u64) {
        self.close_front();
        let Some((first, block)) = self.blocks.range(..=number).next_back() else { return };
        let mut at = 0;
        for _ in *first..number {
            if at < block.frames.len() {
                at += self.measure(&block.frames[at..]).1;
            }
        }
        if at == block.frames.len() {
            return;
        }
        let (first, frame) = (*first, self.measure(&block.frames[at..]).1);
        let Block { mut frames, behind_gap } = self.blocks.remove(&first).expect("it was just looked at");
        self.gaps -= usize::from(behind_gap);
        let behind = frames.split_off(at + frame);
        frames.truncate(at);
        if number + 1 == self.next {
            self.next = 0;
        }
        for (first, frames, behind_gap) in [(first, frames, behind_gap), (number + 1, behind, true)] {
            if !frames.is_empty() {
                self.gaps += usize::from(behind_gap);
                let frames = frames.into_boxed_slice().into_vec();
                self.blocks.insert(first, Block { frames, behind_gap });
            }
        }
        self.bytes -= frame;
        self.messages -= 1;
    }

    /// The number of the first message.
    pub(crate) fn first(&self) -> Option<u64> {
        if self.front.is_empty() { self.blocks.keys().next().copied() } else { Some(self.first) }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.messages == 0
    }

    /// How many messages are held.
    pub(crate) fn messages(&self) -> u64 {
        self.messages
    }

    /// Bytes of their frames.
    #[cfg(test)]
    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Bytes of memory that are accounted for: their frames, and what gaps take. Beside that, the first and the last block
    /// may have some room that is not used.
    pub(crate) fn memory(&self) -> usize {
        self.bytes + self.gaps * GAP
    }

    fn begin(&mut self, number: u64, message: &[u8], behind_gap: bool) {
        let mut frames = Vec::with_capacity(self.framing.prefix_width(message.len()) + message.len());
        put(&self.framing, message, &mut frames);
        self.gaps += usize::from(behind_gap);
        self.blocks.insert(number, Block { frames, behind_gap });
    }

    /// What is left of the block that is being taken from becomes one like the others.
    fn close_front(&mut self) {
        if !self.front.is_empty() {
            let frames = std::mem::take(&mut self.front).to_vec();
            self.blocks.insert(self.first, Block { frames, behind_gap: false });
        }
    }

    /// The width of the prefix at the start of these bytes, and of the frame.
    fn measure(&self, frames: &[u8]) -> (usize, usize) {
        let header = self.framing.header(frames).ok().flatten().expect("only whole frames were put here");
        (header.prefix, header.frame())
    }
}

fn put(framing: &Framing, message: &[u8], frames: &mut Vec<u8>) {
    let (prefix, width) = framing.prefix_bytes(message.len());
    frames.extend_from_slice(&prefix[..width]);
    frames.extend_from_slice(message);
}

#[cfg(test)]
#[path = "held_tests.rs"]
mod tests;
