//! Used buffers of chunks, kept for the whole process, so that whoever opens a chunk gets the one that was in use last.
//!
//! That one is still in the processor's cache, whichever connection used it; and a connection at rest holds no buffer.
//!
//! Invariants: what is kept takes at most 16 MiB, and no buffer of it is larger than a chunk; a closed chunk that is not
//! being written takes at most eight times the memory of its frames. No buffer is made here but to fit a chunk that would waste its own.

use std::sync::{Mutex, PoisonError};

/// A chunk is closed, and the next one opened, when it would grow beyond this many bytes.
pub(crate) const CHUNK: usize = 256 * 1024;

/// A smaller buffer than this, in bytes, is not worth keeping.
pub(super) const LEAST: usize = 1024;

/// Bytes of buffers that are kept.
const MOST: usize = 16 * 1024 * 1024;

/// A buffer that is filled to less than one part in so many goes to somebody who needs it more.
const WASTE: usize = 8;

static USED: Mutex<Buffers> = Mutex::new(Buffers { kept: Vec::new(), bytes: 0 });

/// An empty buffer that was in use, the last one first.
pub(super) fn take() -> Option<Vec<u8>> {
    with(Buffers::take)
}

/// Keeps a buffer for the next chunk, if there is room for it. What it holds is forgotten.
pub(super) fn give(buffer: Vec<u8>) {
    if (LEAST..=CHUNK).contains(&buffer.capacity()) {
        with(|used| used.give(buffer));
    }
}

/// The frames of a chunk that is closed, in a buffer of about their size.
pub(super) fn fit(frames: Vec<u8>) -> Vec<u8> {
    if frames.len() >= frames.capacity() / WASTE {
        return frames;
    }
    let fitting = frames.as_slice().to_vec();
    give(frames);
    fitting
}

fn with<T>(ask: impl FnOnce(&mut Buffers) -> T) -> T {
    ask(&mut USED.lock().unwrap_or_else(PoisonError::into_inner))
}

#[derive(Debug)]
struct Buffers {
    kept: Vec<Vec<u8>>,
    bytes: usize,
}

impl Buffers {
    fn take(&mut self) -> Option<Vec<u8>> {
        let buffer = self.kept.pop()?;
        self.bytes -= buffer.capacity();
        Some(buffer)
    }

    fn give(&mut self, mut buffer: Vec<u8>) {
        if self.bytes + buffer.capacity() <= MOST {
            buffer.clear();
            self.bytes += buffer.capacity();
            self.kept.push(buffer);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_buffer_that_was_used_last_comes_first_and_comes_empty() {
        let mut buffers = Buffers { kept: Vec::new(), bytes: 0 };
        buffers.give(vec![1; 2000]);
        let last = vec![2; 3000];
        let place = last.as_ptr();
        buffers.give(last);
        let taken = buffers.take().unwrap();
        assert_eq!((taken.as_ptr(), taken.len(), taken.capacity()), (place, 0, 3000));
        assert_eq!(buffers.bytes, 2000);
        assert!(buffers.take().is_some() && buffers.take().is_none());
        assert_eq!(buffers.bytes, 0);
    }

    #[test]
    fn no_more_is_kept_than_the_bound() {
        let mut buffers = Buffers { kept: Vec::new(), bytes: 0 };
        for _ in 0..100 {
            buffers.give(Vec::with_capacity(CHUNK));
        }
        assert_eq!(buffers.bytes, MOST);
        assert_eq!(buffers.kept.iter().map(Vec::capacity).sum::<usize>(), MOST);
    }

    #[test]
    fn neither_a_tiny_buffer_nor_one_larger_than_a_chunk_is_kept_for_the_next() {
        for capacity in [LEAST - 1, CHUNK + 1] {
            give(Vec::with_capacity(capacity));
            assert!(take().is_none_or(|buffer| (LEAST..=CHUNK).contains(&buffer.capacity())));
        }
    }

    #[test]
    fn a_closed_chunk_fills_an_eighth_of_its_buffer_at_least() {
        for length in [1, 1000, CHUNK / 9, CHUNK / 8, CHUNK] {
            let mut frames = Vec::with_capacity(CHUNK);
            frames.resize(length, 7);
            let fitted = fit(frames);
            assert_eq!(fitted, vec![7; length]);
            assert!(fitted.capacity() <= WASTE * length);
        }
    }
}
