//! An open socket, outward: Outbox, write loop.
//!
//! The only code that writes to a socket. What the Outbox hands out is written whole and in order; the Outbox hears of it
//! once it is out of this program's hands, and at once then: if the socket is lost later, that must not be sent again.

use std::collections::VecDeque;
use std::future::Future;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Buf, Bytes};
use tokio::io::AsyncWrite;
use tokio::time::{Instant, Sleep};

use crate::shared_outbox::SharedOutbox;
use crate::transport::Transport;

/// About how many bytes one write offers to the kernel. Larger writes take fewer system calls, but what is encoded for more
/// than this no longer lies in a core's cache when it is written. Of 256 KiB to 4 MiB this was the best in `crates/compare`.
const MOST: usize = 512 * 1024;

/// How many buffers one write offers.
const SLICES: usize = 64;

/// How many writes a poll may do before others get their turn.
const WRITES_PER_TURN: usize = 16;

/// How long after the last write unused queues are given back.
const KEEP_FOR: Duration = Duration::from_secs(1);

/// The sending half of an open socket.
#[derive(Debug, Default)]
pub(crate) struct Writer {
    /// Handed out, not yet taken by the kernel; the first may be half gone.
    buffers: VecDeque<Bytes>,
    /// Bytes that the stream took and may not have passed on yet.
    unflushed: usize,
    /// When the last write was, if there was any.
    last_write: Option<Instant>,
    idle: Option<Pin<Box<Sleep>>>,
}

impl Writer {
    /// Writes until there is nothing to write, or no room for it. Ready only with an error.
    pub(crate) fn poll(&mut self, cx: &mut Context<'_>, io: &mut Transport, outbox: &SharedOutbox) -> Poll<io::Error> {
        if let Some(error) = ready!(self.poll_flush(cx, io, outbox)) {
            return Poll::Ready(error);
        }
        for _ in 0..WRITES_PER_TURN {
            if self.buffers.is_empty() && !outbox.hand(MOST, &mut self.buffers) {
                return self.rest(cx, outbox);
            }
            match ready!(self.poll_write(cx, io)) {
                Ok(0) => return Poll::Ready(io::ErrorKind::WriteZero.into()),
                Ok(written) => self.took(written),
                Err(error) => return Poll::Ready(error),
            }
            // At once: if the socket is lost after this turn, what the kernel took must not be sent again.
            if let Some(error) = ready!(self.poll_flush(cx, io, outbox)) {
                return Poll::Ready(error);
            }
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    /// Passes on what the stream took, and tells the Outbox of what has gone. `Some` is an error.
    fn poll_flush(
        &mut self,
        cx: &mut Context<'_>,
        io: &mut Transport,
        outbox: &SharedOutbox,
    ) -> Poll<Option<io::Error>> {
        if self.unflushed == 0 {
            return Poll::Ready(None);
        }
        match Pin::new(&mut *io).poll_flush(cx) {
            Poll::Ready(Ok(())) => {
                outbox.wrote(std::mem::take(&mut self.unflushed), MOST, &mut self.buffers);
                Poll::Ready(None)
            }
            unfinished => {
                self.settle(io, outbox);
                unfinished.map(Result::err)
            }
        }
    }

    /// Tells the Outbox what has gone although not all was passed on.
    pub(crate) fn settle(&mut self, io: &mut Transport, outbox: &SharedOutbox) {
        if self.unflushed == 0 {
            return;
        }
        let held = io.held().min(self.unflushed);
        let gone = self.unflushed - held;
        if gone > 0 {
            self.unflushed = held;
            outbox.wrote(gone, MOST, &mut self.buffers);
        }
    }

    fn poll_write(&mut self, cx: &mut Context<'_>, io: &mut Transport) -> Poll<io::Result<usize>> {
        let io = Pin::new(io);
        if self.buffers.len() == 1 {
            return io.poll_write(cx, &self.buffers[0]);
        }
        let mut slices = [IoSlice::new(&[]); SLICES];
        let count = self.buffers.len().min(SLICES);
        for (slice, buffer) in slices.iter_mut().zip(&self.buffers) {
            *slice = IoSlice::new(buffer);
        }
        io.poll_write_vectored(cx, &slices[..count])
    }

    fn took(&mut self, written: usize) {
        self.last_write = Some(Instant::now());
        self.unflushed += written;
        let mut left = written;
        while left > 0 {
            let front = self.buffers.front_mut().expect("only what was offered can have been taken");
            if left < front.len() {
                front.advance(left);
                break;
            }
            left -= front.len();
            self.buffers.pop_front();
        }
    }

    /// Nothing to write: gives unused memory back, but not at once.
    fn rest(&mut self, cx: &mut Context<'_>, outbox: &SharedOutbox) -> Poll<io::Error> {
        let Some(keep_until) = self.last_write.map(|last| last + KEEP_FOR).filter(|_| self.buffers.capacity() > 0)
        else {
            return Poll::Pending;
        };
        // The timer is set again only when it rings too early, not with every write.
        let idle = self.idle.get_or_insert_with(|| Box::pin(tokio::time::sleep_until(keep_until)));
        while idle.as_mut().poll(cx).is_ready() {
            if keep_until <= Instant::now() {
                self.idle = None;
                self.buffers = VecDeque::new();
                outbox.release();
                break;
            }
            idle.as_mut().reset(keep_until);
        }
        Poll::Pending
    }

    /// Whether anything was ever written.
    pub(crate) fn has_written(&self) -> bool {
        self.last_write.is_some()
    }

    /// Whether everything that was handed out has gone.
    pub(crate) fn is_done(&self) -> bool {
        self.buffers.is_empty() && self.unflushed == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::framing::{Framing, Prefix};
    use crate::sender::Sender;
    use crate::shared_outbox::Overflow;

    /// Takes one byte at a time, at once.
    struct ByteByByte;

    impl AsyncWrite for ByteByByte {
        fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
            Poll::Ready(Ok(bytes.len().min(1)))
        }

        fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }

        fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }
    }

    #[test]
    fn what_was_written_in_a_turn_is_known_at_its_end() {
        let outbox = SharedOutbox::new(Framing::new(Prefix::U8), 1024, Overflow::Wait, None);
        let sender = Sender::new(&outbox);
        for _ in 0..2 * WRITES_PER_TURN {
            sender.try_send(b"").expect("there is room");
        }
        let mut writer = Writer::default();
        let mut io = Transport::Io(Box::new(tokio::io::join(tokio::io::empty(), ByteByByte)));
        let polled = writer.poll(&mut Context::from_waker(std::task::Waker::noop()), &mut io, &outbox);
        assert!(polled.is_pending());
        outbox.rewind();
        assert_eq!(outbox.settled(), WRITES_PER_TURN as u64, "none of them may be sent again");
    }
}
