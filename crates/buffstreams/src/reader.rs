//! An open socket, inward: read loop, Inbox, handler.
//!
//! Bytes are read into a scratch buffer that belongs to the worker thread, so a connection at rest holds none. A poll
//! does a bounded amount of work and then lets other connections run. Reading pauses while the handler is busy or too
//! many replies wait, and no deadline of the peer's runs meanwhile. The first bytes tell whether a connection is a session;
//! what is read in one goes through `session.rs` on its way to the handler, and there is no pause.

use std::cell::Cell;
use std::future::Future;
use std::io;
use std::num::NonZeroU32;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, ReadBuf};
use tokio::time::{Instant, Sleep};
use tokio_util::io::poll_read_buf;

use crate::handler::{Ended, Handler, HandlerError};
use crate::log::Throttle;
use crate::memory::MemoryBudget;
use crate::pace::Pace;
use crate::proto::framing::Framing;
use crate::proto::inbox::{Delivered, Flow, Found, Inbox, Room};
use crate::proto::session::wire::{PREFACE, Preface, handshake_framing};
use crate::session::{Accepted, Dialled, Handled, Sessions};
use crate::shared_outbox::SharedOutbox;
use crate::stats::Received;
use crate::transport::PeerIdentity;

/// Bytes of the scratch buffer of each worker thread: what one read can bring.
const SCRATCH: usize = 256 * 1024;

/// How long one connection may keep its worker busy before others get their turn.
pub(crate) const TURN: Duration = Duration::from_millis(1);

/// After how many messages the clock is read, at the latest, to see whether a turn is over.
const MESSAGES_PER_GLANCE: u64 = 256;

/// An unused buffer of more than this many bytes is kept for a second; a smaller one is given back at once.
const KEEP_BUFFER: usize = 16 * 1024;

/// How often a session may wake its connection.
const SESSION_GRAIN: Duration = Duration::from_millis(5);

/// How long a larger one is kept.
const KEEP_FOR: Duration = Duration::from_secs(1);

/// What a listener or a connection demands of what it receives.
#[derive(Debug)]
pub(crate) struct Demands {
    pub(crate) framing: Framing,
    pub(crate) frame_deadline: Option<Duration>,
    pub(crate) idle_deadline: Option<Duration>,
    /// How long a peer may take to ask for a session once it has begun to.
    pub(crate) handshake_deadline: Option<Duration>,
    /// How many messages of one connection are handled in a second, at most.
    pub(crate) max_message_rate: Option<NonZeroU32>,
    pub(crate) close_on_handler_error: bool,
    /// Whether reading waits while many messages wait to be written: where those are replies to what is read.
    pub(crate) pause_when_congested: bool,
    /// Bytes that unfinished messages of all connections may take together.
    pub(crate) memory: MemoryBudget,
    pub(crate) received: Arc<Received>,
    pub(crate) handler_errors: Throttle,
    pub(crate) sessions: Talk,
}

/// What is to be said of acknowledged streams.
#[derive(Clone, Debug)]
pub(crate) enum Talk {
    /// Nothing: plain frames only.
    Plain,
    /// A listener: who asks for a session is answered.
    Answer(Arc<Sessions>),
    /// A listener that takes none, and says so.
    Refuse,
    /// The side that dials asks for one.
    Ask,
}

/// How what comes is to be understood.
#[derive(Debug)]
enum Mode {
    /// Plain frames.
    Plain,
    /// A connection whose first bytes will tell.
    Undecided,
    /// A session was asked for, and HELLO is to come.
    Greeting,
    Accepted(Box<Accepted>),
    Dialled(Box<Dialled>),
}

/// The receiving half of an open socket.
pub(crate) struct Reader<H> {
    inbox: Inbox,
    mode: Mode,
    handler: H,
    demands: Arc<Demands>,
    /// Who the peer has proved to be.
    identity: Option<PeerIdentity>,
    /// What this connection has taken of the shared memory, in bytes.
    charged: usize,
    /// Whole frames are left from the last turn.
    backlog: bool,
    /// Nothing new is to be read.
    stopping: bool,
    /// What is in hand is to be finished, however fast.
    draining: bool,
    /// How fast messages may be handled.
    pace: Option<Box<Pace>>,
    /// Reading waited for this side, so the peer's clocks begin anew.
    paused: bool,
    /// Since when the unfinished frame at hand has been coming.
    frame_since: Option<Instant>,
    last_read: Instant,
    timer: Option<Pin<Box<Sleep>>>,
}

impl<H> Drop for Reader<H> {
    fn drop(&mut self) {
        self.demands.memory.charge(self.charged, 0);
    }
}

impl<H: Handler> Reader<H> {
    pub(crate) fn new(handler: H, demands: Arc<Demands>, identity: Option<PeerIdentity>) -> Reader<H> {
        let mut inbox = Inbox::new(demands.framing);
        let mode = match demands.sessions {
            Talk::Plain => Mode::Plain,
            Talk::Answer(_) | Talk::Refuse => Mode::Undecided,
            Talk::Ask => {
                inbox.enter_session(handshake_framing(), 0);
                Mode::Dialled(Box::default())
            }
        };
        let pace = demands.max_message_rate.map(|rate| Box::new(Pace::new(rate)));
        Reader {
            inbox,
            mode,
            handler,
            demands,
            identity,
            charged: 0,
            backlog: false,
            stopping: false,
            draining: false,
            pace,
            paused: false,
            frame_since: None,
            last_read: Instant::now(),
            timer: None,
        }
    }

    /// No new bytes are to be read; messages in hand are still delivered. In a session the sender is asked to finish, and
    /// what it still sends is read.
    pub(crate) fn stop(&mut self) {
        self.draining = true;
        match &mut self.mode {
            Mode::Accepted(session) => session.drain(),
            _ => self.stopping = true,
        }
    }

    /// Looks at the clocks of a session again, after it was asked what it has to say: that may set them.
    pub(crate) fn poll_session_clocks(&mut self, cx: &mut Context<'_>, replies: &SharedOutbox) -> Poll<Ended> {
        if matches!(self.mode, Mode::Accepted(_)) { self.poll_deadlines(cx, replies) } else { Poll::Pending }
    }

    /// Lets the writer say what is due in a session. Returns whether there is anything new to say.
    pub(crate) fn say(&mut self) -> bool {
        match &mut self.mode {
            Mode::Accepted(session) => session.say(),
            _ => false,
        }
    }

    /// Reads and delivers until nothing more can be done now. Ready when no more messages will come.
    pub(crate) fn poll(
        &mut self,
        cx: &mut Context<'_>,
        io: &mut (impl AsyncRead + Unpin),
        replies: &Arc<SharedOutbox>,
    ) -> Poll<Ended> {
        let turn = Instant::now();
        loop {
            let mut is_ready = true;
            let polled = guard(|| self.handler.poll_ready(cx));
            let must_be_sent_again = self.report();
            match polled {
                Err(panicked) => {
                    self.blame();
                    return Poll::Ready(panicked);
                }
                Ok(_) if must_be_sent_again => return Poll::Ready(Ended::SendAgain),
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
                Ok(Poll::Pending) if self.in_session() => is_ready = false,
                Ok(Poll::Pending) => {
                    self.paused = true;
                    return Poll::Pending;
                }
            }
            if is_ready && self.is_too_fast(cx) {
                if !self.in_session() {
                    self.paused = true;
                    return Poll::Pending;
                }
                is_ready = false;
            }
            if self.in_session() {
                if matches!(&self.mode, Mode::Accepted(session) if session.is_drained()) {
                    return Poll::Ready(Ended::ShutDown);
                }
            } else if self.demands.pause_when_congested && replies.is_congested() && (self.backlog || !self.stopping) {
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
            match self.read_and_deliver(cx, io, replies, is_ready, turn) {
                Poll::Ready(None) => {}
                Poll::Ready(Some(ended)) => return Poll::Ready(ended),
                Poll::Pending if is_ready && self.has_held() && self.goes_on(cx, turn) => {}
                Poll::Pending => return self.poll_deadlines(cx, replies),
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
        replies: &Arc<SharedOutbox>,
        is_ready: bool,
        turn: Instant,
    ) -> Poll<Option<Ended>> {
        let mut scratch = Scratch::take();
        if is_ready && self.has_held() {
            // What was held comes before what is still to be read.
            let outcome = self.deliver_in_session(&mut scratch.bytes, 0, true, replies, turn);
            if let Err(ended) = outcome {
                return Poll::Ready(Some(ended));
            }
        }
        let read = if self.backlog {
            0
        } else {
            match ready!(poll_read(cx, io, self.inbox.room(&mut scratch.bytes))) {
                Err(error) => {
                    return Poll::Ready(Some(match &self.mode {
                        Mode::Dialled(session) => session.ended(Ended::Io(error)),
                        _ => Ended::Io(error),
                    }));
                }
                Ok(0) => {
                    return Poll::Ready(Some(match (&self.mode, self.inbox.end()) {
                        (Mode::Dialled(session), Ok(())) => session.ended(Ended::EndOfStream),
                        (_, Ok(())) => Ended::EndOfStream,
                        (_, Err(error)) => Ended::Malformed(error),
                    }));
                }
                Ok(read) => read,
            }
        };
        let bytes = &mut scratch.bytes;
        let outcome = match self.mode {
            Mode::Plain => self.deliver(bytes, read, replies, turn),
            Mode::Undecided => self.decide(bytes, read, replies),
            Mode::Greeting | Mode::Accepted(_) | Mode::Dialled(_) => {
                self.deliver_in_session(bytes, read, is_ready, replies, turn)
            }
        };
        drop(scratch);
        Poll::Ready(match outcome {
            Err(ended) => Some(ended),
            Ok(delivered) => {
                self.backlog = delivered == Delivered::Paused;
                self.charge()
            }
        })
    }

    /// Whether the handler must wait, because so many messages came. While this side is leaving, it need not: what is in
    /// hand has a bound.
    fn is_too_fast(&mut self, cx: &mut Context<'_>) -> bool {
        let Some(pace) = self.pace.as_mut().filter(|_| !self.draining) else { return false };
        let was_waiting = pace.is_waiting();
        let is_waiting = pace.poll_ready(cx).is_pending();
        if is_waiting && !was_waiting {
            self.demands.received.throttled.fetch_add(1, Ordering::Relaxed);
        }
        is_waiting
    }

    /// Nothing can be read, and messages are held that nothing else will wake this for: because enough were handled for
    /// now. Returns whether more may be at once.
    fn goes_on(&mut self, cx: &mut Context<'_>, turn: Instant) -> bool {
        if self.pace.as_ref().is_some_and(|pace| pace.is_owed()) {
            return !self.is_too_fast(cx);
        }
        if turn.elapsed() > TURN {
            cx.waker().wake_by_ref();
        }
        false
    }

    /// How many messages may be handled before that is asked again.
    fn batch(&self) -> u64 {
        self.pace.as_ref().map_or(u64::MAX, |pace| pace.batch())
    }

    fn in_session(&self) -> bool {
        matches!(self.mode, Mode::Greeting | Mode::Accepted(_) | Mode::Dialled(_))
    }

    fn has_held(&self) -> bool {
        match &self.mode {
            Mode::Accepted(session) => session.has_held(),
            Mode::Dialled(session) => session.has_held(),
            _ => false,
        }
    }

    /// In a session: what became of messages that the handler had kept in hand. Returns whether one of them must be sent
    /// again.
    fn report(&mut self) -> bool {
        let Mode::Accepted(session) = &mut self.mode else { return false };
        if !self.handler.defers() {
            return false;
        }
        let handled = session.report(&mut self.handler);
        self.demands.note_errors(handled.handler_errors);
        handled.must_be_sent_again
    }

    /// In a session: the handler has panicked over one of the messages that it had kept in hand.
    fn blame(&mut self) {
        if let Mode::Accepted(session) = &mut self.mode {
            session.panicked();
        }
    }

    /// One read of a connection of which is not known yet whether it is plain. Once that is known, what was read is
    /// delivered like what a pause left.
    fn decide(&mut self, scratch: &[u8], read: usize, replies: &Arc<SharedOutbox>) -> Result<Delivered, Ended> {
        self.inbox.keep(scratch, read);
        self.heard(true, false);
        match Preface::of(self.inbox.unseen()) {
            Preface::Incomplete => Ok(Delivered::All),
            Preface::Plain => {
                self.mode = Mode::Plain;
                Ok(Delivered::Paused)
            }
            Preface::Session { .. } if matches!(self.demands.sessions, Talk::Answer(_)) => {
                self.inbox.enter_session(handshake_framing(), PREFACE);
                self.mode = Mode::Greeting;
                Ok(Delivered::Paused)
            }
            Preface::Session { .. } => Err(Sessions::refuse_all(replies)),
        }
    }

    /// One read in a session.
    fn deliver_in_session(
        &mut self,
        scratch: &mut [u8],
        read: usize,
        is_ready: bool,
        replies: &Arc<SharedOutbox>,
        turn: Instant,
    ) -> Result<Delivered, Ended> {
        let batch = self.batch();
        let Reader { inbox, handler, demands, mode, identity, .. } = self;
        let handler = is_ready.then_some(handler);
        let is_over = |messages: u64| messages >= batch || (is_glance(messages) && turn.elapsed() > TURN);
        let (handled, result) = match mode {
            Mode::Accepted(session) => {
                if read > 0 {
                    session.heard(read);
                }
                session.deliver(inbox, scratch, read, handler, is_over)
            }
            Mode::Dialled(session) => {
                if read > 0 {
                    replies.with_sending(|sending, _| sending.heard(Instant::now().into_std()));
                }
                session.deliver(inbox, scratch, read, handler, replies, is_over)
            }
            Mode::Greeting => {
                let Talk::Answer(sessions) = &demands.sessions else { unreachable!("others are not greeted") };
                let mut opened = None;
                let result = inbox.deliver_in_session(scratch, read, usize::MAX, |found| {
                    opened = Some(match found {
                        Found::Control(frame) => sessions.open(frame, replies, identity.as_ref()),
                        Found::Message(_) => Err(Ended::Violated("a message came before HELLO".into())),
                    });
                    Flow::Pause
                });
                let result = result.map_err(Ended::Malformed);
                let result = match opened {
                    Some(Ok(session)) => {
                        inbox.enter_session(session.framing(), 0);
                        *mode = Mode::Accepted(Box::new(session));
                        result
                    }
                    Some(Err(ended)) => Err(ended),
                    None => result,
                };
                (Handled::default(), result)
            }
            Mode::Plain | Mode::Undecided => unreachable!("there is no session"),
        };
        demands.received.count(handled.messages, handled.bytes);
        demands.note_errors(handled.handler_errors);
        if let Some(pace) = &mut self.pace {
            pace.handled(handled.calls());
        }
        self.heard(read > 0, handled.frames > 0);
        result
    }

    /// Sets the clocks of the peer: whether anything came, and whether any frame was whole. HELLO begins with the preface:
    /// who has sent that alone owes the rest.
    fn heard(&mut self, anything: bool, whole: bool) {
        let now = Instant::now();
        if anything {
            self.last_read = now;
        }
        if self.inbox.held() == 0 && !matches!(self.mode, Mode::Greeting) {
            self.frame_since = None;
        } else if whole || self.frame_since.is_none() {
            self.frame_since = Some(now);
        }
    }

    /// Lends the messages of one read to the handler, and counts them.
    fn deliver(
        &mut self,
        scratch: &mut [u8],
        read: usize,
        replies: &SharedOutbox,
        turn: Instant,
    ) -> Result<Delivered, Ended> {
        let batch = usize::try_from(self.batch()).unwrap_or(usize::MAX);
        let Reader { inbox, handler, demands, .. } = self;
        let (mut messages, mut bytes) = (0, 0);
        let mut fatal = None;
        let congested = || demands.pause_when_congested && replies.is_congested();
        let result = guard(|| {
            let result = inbox.deliver(scratch, read, batch, |message| {
                messages += 1;
                bytes += message.len() as u64;
                if let Err(error) = handler.message(message) {
                    fatal = demands.judge(error);
                }
                let turn_is_over = || is_glance(messages) && turn.elapsed() > TURN;
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
        if let Some(pace) = &mut self.pace {
            pace.handled(messages);
        }
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
        match fatal {
            Some(error) => Err(Ended::HandlerFailed(error)),
            None => result.map_err(Ended::Malformed),
        }
    }

    /// Accounts for the memory that unfinished messages take, and in a session those that wait: on the side that listens
    /// there is other memory for them.
    fn charge(&mut self) -> Option<Ended> {
        if let Mode::Accepted(session) = &mut self.mode
            && let Some(overloaded) = session.charge()
        {
            return Some(overloaded);
        }
        let waiting = if let Mode::Dialled(session) = &self.mode { session.held_memory() } else { 0 };
        let memory = self.inbox.memory() + waiting;
        if memory == self.charged {
            return None;
        }
        let budget = &self.demands.memory;
        let is_too_much = budget.charge(std::mem::replace(&mut self.charged, memory), memory);
        (is_too_much && self.inbox.held() + waiting > 0).then_some(Ended::Overloaded { limit: budget.limit() })
    }

    /// Nothing can be read now. Looks at the clocks that run meanwhile, and gives back what is not needed.
    fn poll_deadlines(&mut self, cx: &mut Context<'_>, replies: &SharedOutbox) -> Poll<Ended> {
        if self.is_silent(replies) {
            return Poll::Ready(Ended::Silent(self.last_read.elapsed()));
        }
        let Demands { idle_deadline, .. } = *self.demands;
        let is_greeting = matches!(self.mode, Mode::Undecided | Mode::Greeting);
        let frame_deadline = if is_greeting { self.demands.handshake_deadline } else { self.demands.frame_deadline };
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
        let session_until = self.session_wakes_at(replies);
        let Some(next) = [frame_until, idle_until, keep_until, session_until].into_iter().flatten().min() else {
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
                let late = if is_greeting { Ended::HandshakeDeadline } else { Ended::FrameDeadline };
                return Poll::Ready(late(allowed));
            }
            if let Some(allowed) = idle_deadline.filter(|_| idle_until.is_some_and(|until| until <= now)) {
                return Poll::Ready(Ended::Idle(allowed));
            }
            if keep_until.is_some_and(|until| until <= now) {
                self.inbox.release();
                keep_until = None;
            }
            if session_until.is_some_and(|until| until <= now) {
                // The writer, which has its turn next, says what is due; then the clock is set anew.
                cx.waker().wake_by_ref();
                self.timer = None;
                return Poll::Pending;
            }
            let Some(next) = [frame_until, idle_until, keep_until, session_until].into_iter().flatten().min() else {
                self.timer = None;
                self.charge();
                return Poll::Pending;
            };
            timer.as_mut().reset(next);
        }
        self.charge();
        Poll::Pending
    }

    fn is_silent(&self, replies: &SharedOutbox) -> bool {
        let now = Instant::now().into_std();
        match &self.mode {
            Mode::Accepted(session) => session.is_dead(now),
            Mode::Dialled(_) => replies.with_sending(|sending, _| sending.is_dead(now)).unwrap_or(false),
            _ => false,
        }
    }

    /// When a session has something to say, or to find the peer dead; not at once, for the writer may be stuck.
    fn session_wakes_at(&self, replies: &SharedOutbox) -> Option<Instant> {
        let at = match &self.mode {
            Mode::Accepted(session) => Some(session.wake_at()),
            Mode::Dialled(_) => replies.with_sending(|sending, _| sending.wake_at()).flatten(),
            _ => None,
        };
        at.map(|at| Instant::from_std(at).max(Instant::now() + SESSION_GRAIN))
    }

    /// No more messages are handed out.
    pub(crate) fn part(&mut self) {
        if let Mode::Accepted(session) = &mut self.mode {
            session.part();
        }
    }

    /// Waits for work that the handler has begun.
    pub(crate) fn poll_finished(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let turn = Instant::now();
        loop {
            let polled = guard(|| self.handler.poll_finished(cx));
            self.report();
            match polled {
                Ok(Poll::Pending) => return Poll::Pending,
                Ok(Poll::Ready(Ok(()))) => return Poll::Ready(()),
                Err(_) => {
                    self.blame();
                    return Poll::Ready(());
                }
                Ok(Poll::Ready(Err(error))) => drop(self.demands.judge(error)),
            }
            // There may be many errors; a handler that has no end of them is cut with its connection.
            if turn.elapsed() > TURN {
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
        }
    }

    /// Takes the messages that were received whole and not handled; returns how many they are.
    pub(crate) fn unhandled(&mut self) -> u64 {
        let mut messages = 0;
        let Reader { inbox, mode, .. } = self;
        match mode {
            Mode::Accepted(session) => {
                messages += session.held_messages();
                let _ = inbox.deliver_in_session(&mut [], 0, usize::MAX, |found| {
                    messages += u64::from(matches!(found, Found::Message(_)));
                    Flow::Continue
                });
            }
            Mode::Plain | Mode::Undecided => {
                let _ = inbox.deliver(&mut [], 0, usize::MAX, |_| {
                    messages += 1;
                    Flow::Continue
                });
            }
            Mode::Greeting | Mode::Dialled(_) => {}
        }
        messages
    }

    /// Tells the handler that it is over.
    pub(crate) fn ended(&mut self, why: &Ended) {
        if !matches!(why, Ended::HandlerPanicked) {
            let _ = guard(|| self.handler.ended(why));
        }
    }
}

impl Demands {
    /// Counts and logs errors over messages of an acknowledged stream, whose senders hear of them if they last.
    fn note_errors(&self, errors: u64) {
        if errors > 0 {
            self.received.handler_errors.fetch_add(errors, Ordering::Relaxed);
            let log =
                |left_out| tracing::warn!(errors, left_out, "a handler failed over messages of an acknowledged stream");
            self.handler_errors.warn(log);
        }
    }

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

/// Whether to look at the clock after so many messages: often at first, for a handler may be slow; then rarely, for it is not.
#[inline]
fn is_glance(messages: u64) -> bool {
    messages.is_multiple_of(MESSAGES_PER_GLANCE) || messages.is_power_of_two()
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
