//! Used buffers of chunks, kept for the whole process, so that whoever opens a chunk gets the one that was in use last.
//!
//! That one is still in the processor's cache, whichever connection used it: with hundreds of busy connections this
//! doubles what they carry together. It also means that a connection at rest holds no buffer.
//!
//! At most 16 MiB are kept. No buffer is ever made here.

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Bytes of buffers that are kept.
const MOST: usize = 16 * 1024 * 1024;

static KEPT: Mutex<Kept> = Mutex::new(Kept { buffers: Vec::new(), bytes: 0 });

struct Kept {
    buffers: Vec<Vec<u8>>,
    bytes: usize,
}

fn kept() -> MutexGuard<'static, Kept> {
    KEPT.lock().unwrap_or_else(PoisonError::into_inner)
}

/// An empty buffer that was in use, the last one first.
pub(crate) fn take() -> Option<Vec<u8>> {
    let mut kept = kept();
    let buffer = kept.buffers.pop()?;
    kept.bytes -= buffer.capacity();
    Some(buffer)
}

/// Keeps a buffer for the next chunk, if there is room for it. What it holds is forgotten.
pub(crate) fn give(mut buffer: Vec<u8>) {
    buffer.clear();
    let mut kept = kept();
    if kept.bytes + buffer.capacity() <= MOST {
        kept.bytes += buffer.capacity();
        kept.buffers.push(buffer);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_more_is_kept_than_the_bound() {
        for _ in 0..100 {
            give(Vec::with_capacity(1024 * 1024));
        }
        let kept = kept();
        assert!(kept.bytes <= MOST);
        assert_eq!(kept.bytes, kept.buffers.iter().map(Vec::capacity).sum::<usize>());
        assert!(kept.buffers.iter().all(Vec::is_empty));
    }
}
