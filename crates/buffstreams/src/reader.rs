//! An open socket, inward: read loop, Inbox, handler.
//!
//! Bytes are read into a scratch buffer that belongs to the worker thread, so a connection at rest holds none. A poll
//! does a bounded amount of work and then lets other connections run. Reading pauses while the handler is busy or too
//! many replies wait, and no deadline of the peer's runs meanwhile.

use std::cell::Cell;
use std::future::Future;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, ReadBuf};
use tokio::time::{Instant, Sleep};
use tokio_util::io::poll_read_buf;

use crate::handler::{Ended, Handler, HandlerError};
use crate::log::Throttle;
use crate::proto::framing::{FrameError, Framing};
use crate::proto::inbox::{Delivered, Flow, Inbox, Room};
use crate::shared_outbox::SharedOutbox;
use crate::stats::Received;

/// Bytes of the scratch buffer of each worker thread: what one read can bring.
const SCRATCH: usize = 256 * 1024;

/// How long one connection may keep its worker busy before others get their turn.
pub(crate) const TURN: Duration = Duration::from_millis(1);

/// After how many messages the clock is read, at the latest, to see whether a turn is over.
const MESSAGES_PER_GLANCE: u64 = 256;

/// An unused buffer of more than this many bytes is kept for a second; a smaller one is given back at once.
const KEEP_BUFFER: usize = 16 * 1024;

/// How long a larger one is kept.
const KEEP_FOR: Duration = Duration::from_secs(1);

/// What a listener or a connection demands of what it receives.
#[derive(Debug)]
pub(crate) struct Demands {
    pub(crate) framing: Framing,
    pub(crate) frame_deadline: Option<Duration>,
    pub(crate) idle_deadline: Option<Duration>,
    pub(crate) close_on_handler_error: bool,
    /// Whether reading waits while many messages wait to be written: where those are replies to what is read.
    pub(crate) pause_when_congested: bool,
    /// Bytes that unfinished messages of all connections may take together, and do take.
    pub(crate) memory: usize,
    pub(crate) taken: AtomicUsize,
    pub(crate) received: Arc<Received>,
    pub(crate) handler_errors: Throttle,
}

/// The receiving half of an open socket.
pub(crate) struct Reader<H> {
    inbox: Inbox,
    handler: H,
    demands: Arc<Demands>,
    /// What this connection has taken of the shared memory, in bytes.
    charged: usize,
    /// Whole frames are left from the last turn.
    backlog: bool,
    /// Nothing new is to be read.
    stopping: bool,
    /// Reading waited for this side, so the peer's clocks begin anew.
    paused: bool,
    /// Since when the unfinished frame at hand has been coming.
    frame_since: Option<Instant>,
    last_read: Instant,
    timer: Option<Pin<Box<Sleep>>>,
}

impl<H> Drop for Reader<H> {
    fn drop(&mut self) {
        self.demands.taken.fetch_sub(self.charged, Ordering::Relaxed);
    }
}

impl<H: Handler> Reader<H> {
    pub(crate) fn new(handler: H, demands: Arc<Demands>) -> Reader<H> {
        Reader {
            inbox: Inbox::new(demands.framing),
            handler,
            demands,
            charged: 0,
            backlog: false,
            stopping: false,
            paused: false,
            frame_since: None,
            last_read: Instant::now(),
            timer: None,
        }
    }

    /// No new bytes are to be read; messages in hand are still delivered.
    pub(crate) fn stop(&mut self) {
        self.stopping = true;
    }

    /// Reads and delivers until nothing more can be done now. Ready when no more messages will come.
    pub(crate) fn poll(
        &mut self,
        cx: &mut Context<'_>,
        io: &mut (impl AsyncRead + Unpin),
        replies: &SharedOutbox,
    ) -> Poll<Ended> {
        let turn = Instant::now();
        loop {
            match guard(|| self.handler.poll_ready(cx)) {
                Ok(Poll::Ready(Ok(()))) => {}
                Ok(Poll::Ready(Err(error))) => {
                    if let Some(error) = self.demands.judge(error) {
                        return Poll::Ready(Ended::HandlerFailed(error));
                    }
                    // The error tells of one piece of work; only when the handler is ready may there be more of it.
                    if turn.elapsed() > TURN {
                        cx.waker().wake_by_ref();
                        return Poll::Pending;
                    }
                    continue;
                }
                Ok(Poll::Pending) => {
                    self.paused = true;
                    return Poll::Pending;
                }
                Err(panicked) => return Poll::Ready(panicked),
            }
            if self.demands.pause_when_congested && replies.is_congested() && (self.backlog || !self.stopping) {
                // The writer, which shares this task, will wake it.
                self.paused = true;
                return Poll::Pending;
            }
            if !self.backlog {
                if self.stopping {
                    return Poll::Ready(Ended::ShutDown);
                }
                if std::mem::take(&mut self.paused) {
                    self.last_read = turn;
                    self.frame_since = self.frame_since.map(|_| turn);
                }
            }
            match self.read_and_deliver(cx, io, replies, turn) {
                Poll::Ready(None) => {}
                Poll::Ready(Some(ended)) => return Poll::Ready(ended),
                Poll::Pending => return self.poll_deadlines(cx),
            }
            if turn.elapsed() > TURN {
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
        }
    }

    /// One read, unless whole frames are left from the last one, and its messages to the handler.
    fn read_and_deliver(
        &mut self,
        cx: &mut Context<'_>,
        io: &mut (impl AsyncRead + Unpin),
        replies: &SharedOutbox,
        turn: Instant,
    ) -> Poll<Option<Ended>> {
        let mut scratch = Scratch::take();
        let read = if self.backlog {
            0
        } else {
            match ready!(poll_read(cx, io, self.inbox.room(&mut scratch.bytes))) {
                Err(error) => return Poll::Ready(Some(Ended::Io(error))),
                Ok(0) => {
                    return Poll::Ready(Some(match self.inbox.end() {
                        Ok(()) => Ended::EndOfStream,
                        Err(error) => Ended::Malformed(error),
                    }));
                }
                Ok(read) => read,
            }
        };
        let outcome = self.deliver(&mut scratch.bytes, read, replies, turn);
        drop(scratch);
        Poll::Ready(match outcome {
            Err(panicked) => Some(panicked),
            Ok((Some(error), _)) => Some(Ended::HandlerFailed(error)),
            Ok((None, Err(malformed))) => Some(Ended::Malformed(malformed)),
            Ok((None, Ok(delivered))) => {
                self.backlog = delivered == Delivered::Paused;
                self.charge()
            }
        })
    }

    /// Lends the messages of one read to the handler, and counts them. `Err` is a panic.
    #[allow(clippy::type_complexity)]
    fn deliver(
        &mut self,
        scratch: &mut [u8],
        read: usize,
        replies: &SharedOutbox,
        turn: Instant,
    ) -> Result<(Option<HandlerError>, Result<Delivered, FrameError>), Ended> {
        let Reader { inbox, handler, demands, .. } = self;
        let (mut messages, mut bytes) = (0, 0);
        let mut fatal = None;
        let congested = || demands.pause_when_congested && replies.is_congested();
        let result = guard(|| {
            let result = inbox.deliver(scratch, read, usize::MAX, |message| {
                messages += 1;
                bytes += message.len() as u64;
                if let Err(error) = handler.message(message) {
                    fatal = demands.judge(error);
                }
                // Often at first, for a handler may be slow; then rarely, for it is not.
                let glance = messages % MESSAGES_PER_GLANCE == 0 || messages.is_power_of_two();
                let turn_is_over = || glance && turn.elapsed() > TURN;
                if fatal.is_some() || congested() || turn_is_over() { Flow::Pause } else { Flow::Continue }
            });
            if messages > 0
                && let Err(error) = handler.batch_end()
            {
                fatal = fatal.take().or(demands.judge(error));
            }
            result
        });
        demands.received.count(messages, bytes);
        let result = result?;
        let now = Instant::now();
        if read > 0 {
            self.last_read = now;
        }
        if self.inbox.held() == 0 {
            self.frame_since = None;
        } else if messages > 0 || self.frame_since.is_none() {
            self.frame_since = Some(now);
        }
        Ok((fatal, result))
    }

    /// Accounts for the memory that unfinished messages take.
    fn charge(&mut self) -> Option<Ended> {
        let memory = self.inbox.memory();
        if memory == self.charged {
            return None;
        }
        let Demands { taken, memory: limit, .. } = &*self.demands;
        let charged = std::mem::replace(&mut self.charged, memory);
        if memory < charged {
            taken.fetch_sub(charged - memory, Ordering::Relaxed);
            return None;
        }
        let total = taken.fetch_add(memory - charged, Ordering::Relaxed) + (memory - charged);
        (self.inbox.held() > 0 && total > *limit).then_some(Ended::Overloaded { limit: *limit })
    }

    /// Nothing can be read now. Looks at the clocks that run meanwhile, and gives back what is not needed.
    fn poll_deadlines(&mut self, cx: &mut Context<'_>) -> Poll<Ended> {
        let Demands { frame_deadline, idle_deadline, .. } = *self.demands;
        let mut keep_until = None;
        if self.inbox.held() == 0 && self.inbox.memory() > 0 {
            if self.inbox.memory() <= KEEP_BUFFER {
                self.inbox.release();
                self.charge();
            } else {
                keep_until = Some(self.last_read + KEEP_FOR);
            }
        }
        // The room for the next read may have grown since the last one.
        if let Some(overloaded) = self.charge() {
            return Poll::Ready(overloaded);
        }
        let frame_until = self.frame_since.zip(frame_deadline).and_then(|(since, allowed)| since.checked_add(allowed));
        let idle_until = idle_deadline.and_then(|allowed| self.last_read.checked_add(allowed));
        let Some(next) = [frame_until, idle_until, keep_until].into_iter().flatten().min() else {
            return Poll::Pending;
        };
        // The timer is set again only when it is too late, not with every read: it may ring early, and does no harm.
        let timer = self.timer.get_or_insert_with(|| Box::pin(tokio::time::sleep_until(next)));
        if timer.deadline() > next || timer.is_elapsed() {
            timer.as_mut().reset(next);
        }
        while timer.as_mut().poll(cx).is_ready() {
            let now = Instant::now();
            if let Some(allowed) = frame_deadline.filter(|_| frame_until.is_some_and(|until| until <= now)) {
                return Poll::Ready(Ended::FrameDeadline(allowed));
            }
            if let Some(allowed) = idle_deadline.filter(|_| idle_until.is_some_and(|until| until <= now)) {
                return Poll::Ready(Ended::Idle(allowed));
            }
            if keep_until.is_some_and(|until| until <= now) {
                self.inbox.release();
                keep_until = None;
            }
            let Some(next) = [frame_until, idle_until, keep_until].into_iter().flatten().min() else {
                self.timer = None;
                self.charge();
                return Poll::Pending;
            };
            timer.as_mut().reset(next);
        }
        self.charge();
        Poll::Pending
    }

    /// Waits for work that the handler has begun.
    pub(crate) fn poll_finished(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let turn = Instant::now();
        loop {
            match guard(|| self.handler.poll_finished(cx)) {
                Ok(Poll::Pending) => return Poll::Pending,
                Ok(Poll::Ready(Ok(()))) | Err(_) => return Poll::Ready(()),
                Ok(Poll::Ready(Err(error))) => drop(self.demands.judge(error)),
            }
            // There may be many errors; a handler that has no end of them is cut with its connection.
            if turn.elapsed() > TURN {
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
        }
    }

    /// Tells the handler that it is over.
    pub(crate) fn ended(&mut self, why: &Ended) {
        if !matches!(why, Ended::HandlerPanicked) {
            let _ = guard(|| self.handler.ended(why));
        }
    }
}

impl Demands {
    /// Counts and logs a handler's error; gives it back if the policy is to close.
    fn judge(&self, error: HandlerError) -> Option<HandlerError> {
        self.received.handler_errors.fetch_add(1, Ordering::Relaxed);
        if self.close_on_handler_error {
            return Some(error);
        }
        self.handler_errors
            .warn(|left_out| tracing::warn!(%error, left_out, "a handler failed; its connection goes on"));
        None
    }
}

/// Calls the user's code; a panic in it becomes a reason to end the connection.
fn guard<T>(call: impl FnOnce() -> T) -> Result<T, Ended> {
    catch_unwind(AssertUnwindSafe(call)).map_err(|_| Ended::HandlerPanicked)
}

fn poll_read(cx: &mut Context<'_>, io: &mut (impl AsyncRead + Unpin), room: Room<'_>) -> Poll<io::Result<usize>> {
    match room {
        Room::Scratch(bytes) => {
            let mut buffer = ReadBuf::new(bytes);
            ready!(Pin::new(io).poll_read(cx, &mut buffer))?;
            Poll::Ready(Ok(buffer.filled().len()))
        }
        Room::Own(mut buffer) => poll_read_buf(Pin::new(io), cx, &mut buffer),
    }
}

/// The scratch buffer of this worker thread, taken from its slot while in use: a handler that polls another reader
/// finds the slot empty and gets another.
struct Scratch {
    bytes: Box<[u8]>,
}

thread_local! {
    static SCRATCH_SLOT: Cell<Option<Box<[u8]>>> = const { Cell::new(None) };
}

impl Scratch {
    fn take() -> Scratch {
        let kept = SCRATCH_SLOT.try_with(Cell::take).ok().flatten();
        Scratch { bytes: kept.unwrap_or_else(|| vec![0; SCRATCH].into_boxed_slice()) }
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let bytes = std::mem::take(&mut self.bytes);
        let _ = SCRATCH_SLOT.try_with(|slot| slot.set(Some(bytes)));
    }
}
