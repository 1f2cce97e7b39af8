//! An open socket and the one task that owns it: a reader and a writer, polled side by side.
//!
//! The same whichever side opened it. What a handler sends back during a read is written in the same turn.

use std::future::poll_fn;
use std::io;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::handler::{Ended, Handler, Peer, Service};
use crate::reader::{Demands, Reader};
use crate::shared_outbox::{Phase, SharedOutbox};
use crate::transport::Transport;
use crate::writer::Writer;

/// How long taking leave may take: ending this side's stream, and waiting for the peer to end its own.
const LINGER: Duration = Duration::from_secs(1);

/// How often reader and writer may take turns, each making work for the other, before other connections get theirs.
const TURNS: usize = 2;

/// An open socket.
pub(crate) struct Socket<H> {
    io: Transport,
    reader: Reader<H>,
    writer: Writer,
}

impl<H: Handler> Socket<H> {
    /// Makes the connection's handler; `None` if the service panicked.
    pub(crate) fn open<S>(io: Transport, service: &Arc<S>, peer: &Peer, demands: &Arc<Demands>) -> Option<Socket<H>>
    where
        S: Service<Handler = H>,
    {
        let make = || Arc::clone(service).connected(peer);
        let handler = std::panic::catch_unwind(std::panic::AssertUnwindSafe(make)).ok()?;
        let reader = Reader::new(handler, Arc::clone(demands), io.identity().cloned());
        Some(Socket { io, reader, writer: Writer::default() })
    }

    /// Reads, handles and writes, until input ends or either half breaks.
    pub(crate) fn poll(&mut self, cx: &mut Context<'_>, outbox: &Arc<SharedOutbox>) -> Poll<Ended> {
        for _ in 0..TURNS {
            let ended = self.reader.poll(cx, &mut self.io, outbox);
            self.reader.say();
            if let Poll::Ready(ended) = ended {
                // A last word to the peer about an error may have taken along what waited.
                self.writer.settle(&mut self.io, outbox);
                return Poll::Ready(ended);
            }
            let congested = outbox.is_congested();
            if let Poll::Ready(error) = self.writer.poll(cx, &mut self.io, outbox) {
                return Poll::Ready(Ended::Io(error));
            }
            // What was due while the writer had not said what came before.
            if self.reader.say() {
                continue;
            }
            if !congested || outbox.is_congested() {
                return self.reader.poll_session_clocks(cx, outbox);
            }
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    /// Whether everything accepted so far has gone.
    pub(crate) fn is_drained(&self, outbox: &Arc<SharedOutbox>) -> bool {
        self.writer.is_done() && outbox.is_resolved()
    }

    /// No new bytes are to be read; messages in hand are still handled.
    pub(crate) fn stop_reading(&mut self) {
        self.reader.stop();
    }

    /// Waits for work that the handler has begun, and tells it that it is over. Meanwhile messages go on being written;
    /// once that fails none are accepted any more, so that work which waits for room does not wait for ever. Returns whether
    /// it was finished, and not cut.
    pub(crate) async fn finish_handler(&mut self, why: &Ended, outbox: &Arc<SharedOutbox>) -> bool {
        let mut broken = matches!(why, Ended::Io(_));
        self.reader.part();
        let mut is_finished = true;
        if !matches!(why, Ended::HandlerPanicked) {
            is_finished = poll_fn(|cx| {
                let finished = self.reader.poll_finished(cx).map(|()| true);
                if outbox.poll_phase(cx) == Phase::Cut {
                    return Poll::Ready(finished.is_ready());
                }
                self.reader.say();
                if !broken {
                    broken = self.writer.poll(cx, &mut self.io, outbox).is_ready();
                }
                if broken {
                    // Wakes this task, if that changes anything for the handler.
                    outbox.close_by(Instant::now());
                }
                finished
            })
            .await;
            // What had to wait for the writer to say what came before.
            self.reader.say();
        }
        self.reader.ended(why);
        is_finished
    }

    /// How many messages were received whole, and will not be handled.
    pub(crate) fn unhandled(&mut self) -> u64 {
        self.reader.unhandled()
    }

    /// The socket is lost, or another is wanted: closes it, and waits for work that the handler has begun. No message is
    /// written any more: it is sent again on another socket.
    pub(crate) async fn leave(self, why: Ended, outbox: Arc<SharedOutbox>) {
        let Socket { mut io, mut reader, writer } = self;
        if matches!(why, Ended::Reopened) && writer.has_written() {
            part(&mut io, &outbox, true).await;
        }
        drop((io, writer));
        if !matches!(why, Ended::HandlerPanicked) {
            poll_fn(|cx| reader.poll_finished(cx)).await;
        }
        reader.ended(&why);
    }

    /// Lets go of the handler; what is left can still write.
    pub(crate) fn into_output(self) -> Output {
        Output { io: self.io, writer: self.writer }
    }

    /// Ends this side's stream, and goes on handling what comes until the peer has ended its own, or a second passes.
    pub(crate) async fn end_output(&mut self, outbox: &Arc<SharedOutbox>) -> Ended {
        let Socket { io, reader, .. } = self;
        let leave = async {
            if let Err(error) = io.shutdown().await {
                return Ended::Io(error);
            }
            poll_fn(|cx| reader.poll(cx, io, outbox)).await
        };
        briefly(outbox, leave).await.unwrap_or(Ended::ShutDown)
    }
}

/// What is left of a socket when no more input is wanted.
pub(crate) struct Output {
    io: Transport,
    writer: Writer,
}

impl Output {
    /// Writes; ready with an error, or when everything accepted has gone and `done` says that no more will come.
    pub(crate) async fn write_until(
        &mut self,
        outbox: &Arc<SharedOutbox>,
        done: impl Fn(Phase) -> bool,
    ) -> io::Result<()> {
        poll_fn(|cx| {
            let phase = outbox.poll_phase(cx);
            if phase == Phase::Cut {
                return Poll::Ready(Err(io::ErrorKind::ConnectionAborted.into()));
            }
            if let Poll::Ready(error) = self.writer.poll(cx, &mut self.io, outbox) {
                return Poll::Ready(Err(error));
            }
            if done(phase) && self.writer.is_done() && outbox.is_resolved() {
                return Poll::Ready(Ok(()));
            }
            Poll::Pending
        })
        .await
    }

    /// Takes leave of the peer.
    pub(crate) async fn end(mut self, outbox: &SharedOutbox) {
        let has_written = self.writer.has_written();
        part(&mut self.io, outbox, has_written).await;
    }
}

/// Ends this side's stream. If anything `was_written`, what the peer still sends is read and thrown away until it ends too:
/// closing with unread bytes would make the kernel reset the connection, and destroy what was just written.
pub(crate) async fn part(io: &mut Transport, outbox: &SharedOutbox, was_written: bool) {
    let leave = async {
        if io.shutdown().await.is_err() || !was_written {
            return;
        }
        let mut waste = vec![0; 4096];
        while io.read(&mut waste).await.is_ok_and(|read| read > 0) {}
    };
    briefly(outbox, leave).await;
}

/// Takes leave, if that takes no longer than a second, and until the connection is cut: a peer that reads nothing must not
/// keep this side, and even the end of a stream may have to wait until there is room for it.
async fn briefly<T>(outbox: &SharedOutbox, leave: impl Future<Output = T>) -> Option<T> {
    tokio::select! {
        left = tokio::time::timeout(LINGER, leave) => left.ok(),
        () = outbox.cut() => None,
    }
}

#[cfg(test)]
mod tests {
    use std::pin::Pin;

    use tokio::io::AsyncWrite;

    use super::*;
    use crate::proto::framing::{Framing, Prefix};
    use crate::shared_outbox::Overflow;

    /// Has no room for the end of the stream.
    struct Full;

    impl AsyncWrite for Full {
        fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, _: &[u8]) -> Poll<io::Result<usize>> {
            Poll::Pending
        }

        fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Pending
        }

        fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Pending
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_stream_that_cannot_be_ended_is_left_after_a_second_and_at_once_if_it_is_cut() {
        for cut_after in [LINGER / 10, 5 * LINGER] {
            let outbox = SharedOutbox::new(Framing::new(Prefix::U8), 1024, Overflow::Wait, None);
            let mut io = Transport::Io(Box::new(tokio::io::join(tokio::io::empty(), Full)));
            let leave = async {
                let begun = tokio::time::Instant::now();
                part(&mut io, &outbox, true).await;
                begun.elapsed()
            };
            let cut = async {
                tokio::time::sleep(cut_after).await;
                outbox.advance_phase(Phase::Cut);
            };
            let (took, ()) = tokio::join!(leave, cut);
            assert!(took < 2 * cut_after.min(LINGER), "{took:?}");
        }
    }
}
