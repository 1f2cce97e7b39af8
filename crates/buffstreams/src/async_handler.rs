//! Handlers that await: an async function for every message, on the connection's own task.
//!
//! What one read brings waits here for its turn; no more is read until it has had it.

use std::collections::VecDeque;
use std::fmt;
use std::future::Future;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Instant;

use bytes::Bytes;

use crate::handler::{Handler, HandlerError, HandlerResult, Peer, Service};
use crate::proto::inbox::Message;
use crate::reader::TURN;

/// After how many rounds of work the clock is read to see whether a turn is over.
const ROUNDS_PER_GLANCE: u64 = 16;

/// For how many waiting messages an idle connection keeps places. A read of tiny ones takes many more.
const KEPT_PLACES: usize = 64;

/// A service that runs an async function for every message, which it owns.
///
/// One message of a connection at a time, in order, unless [`concurrency`](AsyncService::concurrency) says more. The
/// futures run on the connection's task: other connections go on in parallel, and reading waits while they work. At most
/// the messages of one read wait for their turn (256 KiB, or one large message).
///
/// ```
/// use buffstreams::{Bytes, Peer, async_handler};
///
/// let service = async_handler(|message: Bytes, peer: Peer| async move {
///     peer.sender().send(&message).await?;
///     Ok(())
/// });
/// # let _ = service;
/// ```
pub fn async_handler<F, W>(work: F) -> AsyncService<F>
where
    F: Fn(Bytes, Peer) -> W + Send + Sync + 'static,
    W: Future<Output = HandlerResult> + Send + 'static,
{
    AsyncService { work: Arc::new(work), concurrency: 1 }
}

/// See [`async_handler`].
#[must_use = "a service does nothing until a listener or a connection is given it"]
pub struct AsyncService<F> {
    work: Arc<F>,
    concurrency: usize,
}

impl<F> fmt::Debug for AsyncService<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AsyncService").field("concurrency", &self.concurrency).finish_non_exhaustive()
    }
}

impl<F> AsyncService<F> {
    /// Lets up to `most` messages of a connection be in work at the same time (default and least 1). They begin in
    /// order, and end as they end.
    pub fn concurrency(mut self, most: usize) -> Self {
        self.concurrency = most.max(1);
        self
    }
}

impl<F, W> Service for AsyncService<F>
where
    F: Fn(Bytes, Peer) -> W + Send + Sync + 'static,
    W: Future<Output = HandlerResult> + Send + 'static,
{
    type Handler = AsyncHandler<F, W>;

    fn connected(self: Arc<Self>, peer: &Peer) -> AsyncHandler<F, W> {
        AsyncHandler {
            work: Arc::clone(&self.work),
            concurrency: self.concurrency,
            peer: peer.clone(),
            waiting: VecDeque::new(),
            running: Vec::new(),
            outcomes: Vec::new(),
        }
    }
}

/// The handler of an [`AsyncService`].
pub struct AsyncHandler<F, W> {
    work: Arc<F>,
    concurrency: usize,
    peer: Peer,
    /// With their numbers in an acknowledged stream; 0 on other connections.
    waiting: VecDeque<(u64, Bytes)>,
    running: Vec<(u64, Pin<Box<W>>)>,
    /// Of an acknowledged stream, not taken yet.
    outcomes: Vec<(u64, HandlerResult)>,
}

impl<F, W> fmt::Debug for AsyncHandler<F, W> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AsyncHandler")
            .field("peer", &self.peer)
            .field("waiting", &self.waiting.len())
            .field("running", &self.running.len())
            .finish_non_exhaustive()
    }
}

impl<F, W> AsyncHandler<F, W>
where
    F: Fn(Bytes, Peer) -> W + Send + Sync + 'static,
    W: Future<Output = HandlerResult> + Send + 'static,
{
    /// Polls what runs and begins what waits, until an error, or nothing more can be done now, or the turn is over.
    fn advance(&mut self, cx: &mut Context<'_>) -> HandlerResult {
        let turn = Instant::now();
        for round in 1_u64.. {
            if round.is_multiple_of(ROUNDS_PER_GLANCE) && turn.elapsed() > TURN {
                // What waits is always ready: it has its turn again after the other connections have had theirs.
                cx.waker().wake_by_ref();
                return Ok(());
            }
            let mut index = 0;
            while index < self.running.len() {
                let (number, work) = &mut self.running[index];
                let number = *number;
                let polled = match number {
                    0 => work.as_mut().poll(cx),
                    _ => guard(|| work.as_mut().poll(cx)).unwrap_or_else(|panicked| Poll::Ready(Err(panicked))),
                };
                match polled {
                    Poll::Pending => index += 1,
                    Poll::Ready(result) => {
                        drop(self.running.swap_remove(index));
                        match number {
                            0 => result?,
                            _ => self.outcomes.push((number, result)),
                        }
                    }
                }
            }
            let room = self.concurrency - self.running.len();
            let begin = room.min(self.waiting.len());
            if begin == 0 {
                return Ok(());
            }
            for (number, message) in self.waiting.drain(..begin) {
                let call = || Box::pin((self.work)(message, self.peer.clone()));
                let begun = if number == 0 { Ok(call()) } else { guard(call) };
                match begun {
                    Ok(work) => self.running.push((number, work)),
                    Err(panicked) => self.outcomes.push((number, Err(panicked))),
                }
            }
        }
        Ok(())
    }
}

impl<F, W> Handler for AsyncHandler<F, W>
where
    F: Fn(Bytes, Peer) -> W + Send + Sync + 'static,
    W: Future<Output = HandlerResult> + Send + 'static,
{
    fn message(&mut self, message: Message<'_>) -> HandlerResult {
        self.waiting.push_back((message.number().unwrap_or(0), message.to_bytes()));
        Ok(())
    }

    fn defers(&self) -> bool {
        true
    }

    fn take_outcomes(&mut self, each: &mut dyn FnMut(u64, HandlerResult)) {
        self.outcomes.drain(..).for_each(|(number, result)| each(number, result));
    }

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<HandlerResult> {
        self.advance(cx)?;
        if self.waiting.is_empty() && self.running.len() < self.concurrency {
            if self.waiting.capacity() > KEPT_PLACES {
                self.waiting = VecDeque::new();
            }
            Poll::Ready(Ok(()))
        } else {
            Poll::Pending
        }
    }

    fn poll_finished(&mut self, cx: &mut Context<'_>) -> Poll<HandlerResult> {
        ready!(self.poll_ready(cx))?;
        if self.running.is_empty() { Poll::Ready(Ok(())) } else { Poll::Pending }
    }
}

/// Calls the user's code for a message of an acknowledged stream. One over which it panics is tried again, and others are not
/// to suffer for it.
fn guard<T>(call: impl FnOnce() -> T) -> Result<T, HandlerError> {
    catch_unwind(AssertUnwindSafe(call)).map_err(|_| HandlerError::new("the handler panicked"))
}
