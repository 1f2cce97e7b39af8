//! Handlers that block: what a read brings goes to a thread where it may, all of it at once.
//!
//! A thread is not woken for every message, and no more is read while threads are at work.

use std::collections::VecDeque;
use std::fmt;
use std::future::Future;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::Bytes;
use tokio::task::{JoinError, JoinHandle};

use crate::handler::{Handler, HandlerError, HandlerResult, Peer, Service};
use crate::proto::inbox::Message;

/// A service that runs a function for every message on a thread where it may block.
///
/// The threads are those of tokio's blocking pool. The messages of a connection are handled one at a time, in order,
/// unless [`concurrency`](BlockingService::concurrency) says more. What one read has brought (up to 256 KiB, or one large
/// message) is handed over together; while it is in work, the connection is not read. A panic in the function ends the
/// connection.
///
/// ```
/// use buffstreams::{Peer, blocking_handler};
///
/// let service = blocking_handler(|message: &[u8], _peer: &Peer| {
///     std::fs::write("/dev/null", message)?;
///     Ok(())
/// });
/// # let _ = service;
/// ```
pub fn blocking_handler<F>(work: F) -> BlockingService<F>
where
    F: Fn(&[u8], &Peer) -> HandlerResult + Send + Sync + 'static,
{
    BlockingService { work: Arc::new(work), concurrency: 1 }
}

/// See [`blocking_handler`].
#[must_use = "a service does nothing until a listener or a connection is given it"]
pub struct BlockingService<F> {
    work: Arc<F>,
    concurrency: usize,
}

impl<F> fmt::Debug for BlockingService<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BlockingService").field("concurrency", &self.concurrency).finish_non_exhaustive()
    }
}

impl<F> BlockingService<F> {
    /// Lets up to `most` threads work for a connection at the same time (default and least 1). What one read has brought
    /// is shared out among them, so its messages are no longer handled in order.
    pub fn concurrency(mut self, most: usize) -> Self {
        self.concurrency = most.max(1);
        self
    }
}

impl<F> Service for BlockingService<F>
where
    F: Fn(&[u8], &Peer) -> HandlerResult + Send + Sync + 'static,
{
    type Handler = BlockingHandler<F>;

    fn connected(self: Arc<Self>, peer: &Peer) -> BlockingHandler<F> {
        BlockingHandler {
            service: self,
            peer: peer.clone(),
            waiting: Vec::new(),
            running: Vec::new(),
            errors: VecDeque::new(),
            outcomes: Vec::new(),
        }
    }
}

/// The handler of a [`BlockingService`].
pub struct BlockingHandler<F> {
    service: Arc<BlockingService<F>>,
    peer: Peer,
    /// With their numbers in an acknowledged stream; 0 on other connections.
    waiting: Vec<(u64, Bytes)>,
    /// Threads at work; each returns the errors of its messages, and in an acknowledged stream what became of every one.
    running: Vec<JoinHandle<Vec<(u64, HandlerResult)>>>,
    /// Errors that were not reported yet.
    errors: VecDeque<HandlerError>,
    /// Of an acknowledged stream, not taken yet.
    outcomes: Vec<(u64, HandlerResult)>,
}

impl<F> fmt::Debug for BlockingHandler<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BlockingHandler")
            .field("peer", &self.peer)
            .field("waiting", &self.waiting.len())
            .field("running", &self.running.len())
            .finish_non_exhaustive()
    }
}

impl<F> BlockingHandler<F>
where
    F: Fn(&[u8], &Peer) -> HandlerResult + Send + Sync + 'static,
{
    /// Shares out what waits among as many threads as may work.
    fn begin(&mut self) {
        let share = self.waiting.len().div_ceil(self.service.concurrency);
        let mut waiting = std::mem::take(&mut self.waiting).into_iter();
        while waiting.len() > 0 {
            let batch: Vec<(u64, Bytes)> = waiting.by_ref().take(share).collect();
            let (work, peer) = (Arc::clone(&self.service.work), self.peer.clone());
            self.running.push(tokio::task::spawn_blocking(move || {
                let handle = |(number, message): &(u64, Bytes)| match number {
                    0 => work(message, &peer),
                    // Such a message is tried again, and another one is not to suffer for it.
                    _ => catch_unwind(AssertUnwindSafe(|| work(message, &peer)))
                        .unwrap_or_else(|_| Err(HandlerError::new("the handler panicked"))),
                };
                let results = batch.iter().map(|message| (message.0, handle(message)));
                results.filter(|(number, result)| *number != 0 || result.is_err()).collect()
            }));
        }
    }
}

impl<F> Handler for BlockingHandler<F>
where
    F: Fn(&[u8], &Peer) -> HandlerResult + Send + Sync + 'static,
{
    fn message(&mut self, message: Message<'_>) -> HandlerResult {
        self.waiting.push((message.number().unwrap_or(0), message.to_bytes()));
        Ok(())
    }

    fn defers(&self) -> bool {
        true
    }

    fn take_outcomes(&mut self, each: &mut dyn FnMut(u64, HandlerResult)) {
        self.outcomes.drain(..).for_each(|(number, result)| each(number, result));
    }

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<HandlerResult> {
        loop {
            let BlockingHandler { running, errors, outcomes, .. } = self;
            running.retain_mut(|thread| match Pin::new(thread).poll(cx) {
                Poll::Pending => true,
                Poll::Ready(ended) => {
                    for (number, result) in ended.unwrap_or_else(errors_of_an_end) {
                        match (number, result) {
                            (0, result) => errors.extend(result.err()),
                            known => outcomes.push(known),
                        }
                    }
                    false
                }
            });
            if let Some(error) = errors.pop_front() {
                return Poll::Ready(Err(error));
            }
            if !running.is_empty() {
                return Poll::Pending;
            }
            if self.waiting.is_empty() {
                return Poll::Ready(Ok(()));
            }
            self.begin();
        }
    }
}

/// A thread that ended otherwise: a panic goes on, and ends the connection.
fn errors_of_an_end(error: JoinError) -> Vec<(u64, HandlerResult)> {
    match error.try_into_panic() {
        Ok(panic) => std::panic::resume_unwind(panic),
        Err(cancelled) => vec![(0, Err(cancelled.into()))],
    }
}
