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

/// How long a peer may take to end its stream after this side has ended its own.
pub(crate) const LINGER: Duration = Duration::from_secs(1);

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

    /// The socket is lost, or another is wanted: closes it, and waits for work that the handler has begun. Nothing is
    /// written any more: it would count as settled and never arrive.
    pub(crate) async fn leave(self, why: Ended) {
        let Socket { mut io, mut reader, writer } = self;
        if matches!(why, Ended::Reopened) && writer.has_written() && io.shutdown().await.is_ok() {
            drain(&mut io).await;
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
        if let Err(error) = self.io.shutdown().await {
            return Ended::Io(error);
        }
        let wait = poll_fn(|cx| self.reader.poll(cx, &mut self.io, outbox));
        tokio::time::timeout(LINGER, wait).await.unwrap_or(Ended::ShutDown)
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

    /// Ends this side's stream. If anything was written, what the peer still sends is read and thrown away until it
    /// ends too, or a second passes: closing with unread bytes would make the kernel reset the connection, and destroy
    /// what was just written.
    pub(crate) async fn end(mut self, outbox: &Arc<SharedOutbox>) {
        if self.io.shutdown().await.is_err() || !self.writer.has_written() {
            return;
        }
        let cut = poll_fn(|cx| match outbox.poll_phase(cx) {
            Phase::Cut => Poll::Ready(()),
            _ => Poll::Pending,
        });
        tokio::select! {
            () = drain(&mut self.io) => {}
            () = cut => {}
        }
    }
}

/// Reads and throws away what the peer still sends, until it ends its stream or a second passes.
pub(crate) async fn drain(io: &mut Transport) {
    let mut waste = vec![0; 4096];
    let read = async { while io.read(&mut waste).await.is_ok_and(|read| read > 0) {} };
    let _ = tokio::time::timeout(LINGER, read).await;
}
