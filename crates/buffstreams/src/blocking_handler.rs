//! Handlers that block: what a read brings goes to a thread where it may, all of it at once.
//!
//! A thread is not woken for every message, and no more is read while threads are at work.

use std::collections::VecDeque;
use std::fmt;
use std::future::Future;
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
        }
    }
}

/// The handler of a [`BlockingService`].
pub struct BlockingHandler<F> {
    service: Arc<BlockingService<F>>,
    peer: Peer,
    waiting: Vec<Bytes>,
    /// Threads at work; each returns the errors of its messages.
    running: Vec<JoinHandle<Vec<HandlerError>>>,
    /// Errors that were not reported yet.
    errors: VecDeque<HandlerError>,
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
            let batch: Vec<Bytes> = waiting.by_ref().take(share).collect();
            let (work, peer) = (Arc::clone(&self.service.work), self.peer.clone());
            self.running.push(tokio::task::spawn_blocking(move || {
                batch.iter().filter_map(|message| work(message, &peer).err()).collect()
            }));
        }
    }
}

impl<F> Handler for BlockingHandler<F>
where
    F: Fn(&[u8], &Peer) -> HandlerResult + Send + Sync + 'static,
{
    fn message(&mut self, message: Message<'_>) -> HandlerResult {
        self.waiting.push(message.to_bytes());
        Ok(())
    }

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<HandlerResult> {
        loop {
            let BlockingHandler { running, errors, .. } = self;
            running.retain_mut(|thread| match Pin::new(thread).poll(cx) {
                Poll::Pending => true,
                Poll::Ready(ended) => {
                    errors.extend(ended.unwrap_or_else(errors_of_an_end));
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
fn errors_of_an_end(error: JoinError) -> Vec<HandlerError> {
    match error.try_into_panic() {
        Ok(panic) => std::panic::resume_unwind(panic),
        Err(cancelled) => vec![cancelled.into()],
    }
}
