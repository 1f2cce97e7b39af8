//! Acknowledged streams between an open socket and its handler, on either side.
//!
//! What they say and what follows from what they hear is in `proto/session`; this file feeds it with what was read, hands
//! messages to the handler when it is their turn, and reports what became of them. A session's reader always keeps
//! reading, so that acknowledgements and heartbeats never wait behind messages that nobody takes: those are held, and the
//! window bounds them. No lock is held while a handler runs.

use std::fmt;
use std::hash::{BuildHasher, RandomState};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use crate::events::Event;
use crate::handler::{Ended, Handler, HandlerError};
use crate::memory::MemoryBudget;
use crate::proto::framing::Framing;
use crate::proto::inbox::{Delivered, Flow, Found, Inbox, Message};
use crate::proto::session::SessionError;
use crate::proto::session::held::Held;
use crate::proto::session::ledger::{Ledger, Offer, PANICKED, Verdict};
use crate::proto::session::receiving::{Receiving, Turn};
use crate::proto::session::sending::Heard;
use crate::proto::session::streams::{Begun, Opened, Outcome, Streams, Terms, Told};
use crate::proto::session::wire::{Control, Hello, Refuse, RefuseCode, StreamId, handshake_framing, printable};
use crate::shared_outbox::SharedOutbox;
use crate::stats::Received;
use crate::transport::PeerIdentity;

/// All acknowledged streams of a listener.
pub(crate) struct Sessions {
    streams: Mutex<Streams<Arc<SharedOutbox>>>,
    terms: Terms,
    /// Bytes of messages that wait for their handlers, with half of what there is as the limit.
    held: MemoryBudget,
    stored: Box<dyn Fn(StreamId) -> Option<u64> + Send + Sync>,
    /// What is counted here is what had to be forgotten.
    received: Arc<Received>,
    /// Makes numbers of identities that nobody can foresee.
    numbers: RandomState,
}

impl fmt::Debug for Sessions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sessions").field("terms", &self.terms).finish_non_exhaustive()
    }
}

impl Sessions {
    /// None yet. Messages that wait for their handlers take at most `memory` bytes, or one each.
    pub(crate) fn new(
        terms: Terms,
        memory: usize,
        received: Arc<Received>,
        stored: impl Fn(StreamId) -> Option<u64> + Send + Sync + 'static,
    ) -> Sessions {
        let streams = Mutex::new(Streams::new(fastrand::u64(..), memory));
        let held = MemoryBudget::new(memory / 2);
        Sessions { streams, terms, held, stored: Box::new(stored), received, numbers: RandomState::new() }
    }

    fn lock(&self) -> MutexGuard<'_, Streams<Arc<SharedOutbox>>> {
        self.streams.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Answers to what came first on a connection that asks for a session. If it is refused, that is said before the
    /// connection ends. A stream belongs to who began it, where peers prove who they are.
    pub(crate) fn open(
        self: &Arc<Self>,
        frame: &[u8],
        replies: &Arc<SharedOutbox>,
        identity: Option<&PeerIdentity>,
    ) -> Result<Accepted, Ended> {
        let refused = |refuse: Refuse| {
            let why = format!("a session was refused: {}", refuse.text);
            say_last(replies, refuse);
            Ended::NotGranted(why)
        };
        let hello = match Control::decode(frame) {
            Ok(Control::Hello(hello)) => hello,
            Ok(control) => {
                let error = SessionError::OutOfPlace { frame: control.name(), when: "before HELLO" };
                return Err(refused(error.refuse()));
            }
            Err(error) => return Err(refused(SessionError::from(error).refuse())),
        };
        let Hello { stream, ref token, .. } = hello;
        // Only asked for what nobody knows: user's code, which must not run under the lock.
        let stored = if self.lock().knows(stream) { None } else { (self.stored)(stream) };
        let who = identity.map(|identity| self.numbers.hash_one(identity.who()));
        let opened = {
            let mut streams = self.lock();
            if streams.is_of_another(stream, who) {
                let text = "the stream was begun by somebody with another certificate".to_owned();
                Err(Refuse { code: RefuseCode::UNAUTHORIZED, detail: 0, text })
            } else {
                let opened = streams.open(&hello, stored, &self.terms, Arc::clone(replies), Instant::now());
                streams.give(stream, who);
                opened
            }
        };
        let Opened { receiving, greeting, fenced } = opened.map_err(refused)?;
        let accepted = Accepted { sessions: Arc::clone(self), receiving, replies: Arc::clone(replies), charged: 0 };
        if let Some(older) = fenced {
            older.wake();
        }
        if !replies.enter_session(accepted.receiving.framing(), accepted.receiving.reply_window()) {
            let why = "a session was asked for after this side had sent a plain message: a service that greets, by sending before \
                       anything was received, takes only plain connections";
            return Err(Ended::NotGranted(why.into()));
        }
        replies.name_peer_stream(stream, token.clone());
        replies.say(|out| out.extend_from_slice(&greeting));
        // That of the connection, whose task this is.
        tracing::Span::current().record("stream", tracing::field::display(stream));
        tracing::debug!(%stream, epoch = hello.epoch, "a session was opened");
        Ok(accepted)
    }

    /// Refuses every session, as a listener without them does.
    pub(crate) fn refuse_all(replies: &Arc<SharedOutbox>) -> Ended {
        let text = "this listener takes no sessions".to_owned();
        say_last(replies, Refuse { code: RefuseCode::NO_SESSIONS, detail: 0, text });
        Ended::NotGranted("a session was asked for, and there are none here".into())
    }
}

/// A refusal before there is a session.
fn say_last(replies: &Arc<SharedOutbox>, refuse: Refuse) {
    if replies.enter_session(handshake_framing(), 0) {
        replies.say(|out| Control::Refuse(refuse).put(&handshake_framing(), out));
    }
}

/// One connection of a session, on the side that listens.
#[derive(Debug)]
pub(crate) struct Accepted {
    sessions: Arc<Sessions>,
    receiving: Receiving,
    replies: Arc<SharedOutbox>,
    /// What this connection has taken of the memory of all, in bytes.
    charged: usize,
}

impl Drop for Accepted {
    fn drop(&mut self) {
        self.sessions.held.charge(self.charged, 0);
        let mut streams = self.sessions.lock();
        let waiting = streams.close(&self.receiving);
        let forgotten = streams.take_forgotten();
        drop(streams);
        self.sessions.received.streams_forgotten.fetch_add(forgotten, Ordering::Relaxed);
        if let Some(newer) = waiting {
            newer.wake();
        }
    }
}

/// What one call of [`Accepted::deliver`] or [`Dialled::deliver`] came to.
#[derive(Debug, Default)]
pub(crate) struct Handled {
    /// Messages that the handler was given for the first time, whatever it said.
    pub(crate) messages: u64,
    pub(crate) bytes: u64,
    /// How often it was given one again.
    again: u64,
    pub(crate) handler_errors: u64,
    /// Whole frames that were found, control frames among them.
    pub(crate) frames: u64,
    /// A message must be handled again that this connection has behind it.
    pub(crate) must_be_sent_again: bool,
}

impl Handled {
    /// The handler is given a message for the first time.
    #[inline]
    fn count(&mut self, message: &Message<'_>) {
        self.messages += 1;
        self.bytes += message.len() as u64;
    }

    /// How often the handler was called.
    pub(crate) fn calls(&self) -> u64 {
        self.messages + self.again
    }
}

impl Accepted {
    pub(crate) fn framing(&self) -> Framing {
        self.receiving.framing()
    }

    pub(crate) fn heard(&mut self, bytes: usize) {
        self.receiving.heard(bytes, Instant::now());
    }

    /// Whether messages wait for the handler or for their turn.
    pub(crate) fn has_held(&self) -> bool {
        self.receiving.has_held()
    }

    /// How many messages wait for the handler or for their turn.
    pub(crate) fn held_messages(&self) -> u64 {
        self.receiving.held_messages()
    }

    /// Accounts for the memory of messages that wait for the handler. While half of what there is is taken by whomever,
    /// nobody may have more than an equal part of the other half: so those who have little always find room.
    pub(crate) fn charge(&mut self) -> Option<Ended> {
        let held = self.receiving.held_memory();
        if held == self.charged {
            return None;
        }
        let Accepted { sessions, receiving, replies, charged } = self;
        if !sessions.held.charge(std::mem::replace(charged, held), held) {
            return None;
        }
        let part = sessions.lock().part_of(receiving);
        if held <= part {
            return None;
        }
        let text = format!("{held} bytes wait for the handler, and {part} may while memory is short");
        let framing = receiving.framing();
        let refuse = Refuse { code: RefuseCode::BUSY, detail: part as u64, text };
        replies.say(|out| Control::Refuse(refuse).put(&framing, out));
        Some(Ended::Overloaded { limit: 2 * sessions.held.limit() })
    }

    /// The sender is to finish, and to leave.
    pub(crate) fn drain(&mut self) {
        self.receiving.drain();
    }

    /// Nothing is handled here any more.
    pub(crate) fn part(&mut self) {
        self.receiving.part();
    }

    pub(crate) fn is_drained(&self) -> bool {
        self.receiving.is_drained()
    }

    pub(crate) fn is_dead(&self, now: Instant) -> bool {
        self.receiving.is_dead(now)
    }

    pub(crate) fn wake_at(&self) -> Instant {
        self.receiving.wake_at()
    }

    /// Lets the writer say what is due, unless it has not said what was due before. Returns whether there is anything new.
    pub(crate) fn say(&mut self) -> bool {
        let Accepted { sessions, receiving, replies, .. } = self;
        let now = Instant::now();
        replies.say(|out| sessions.lock().controls(receiving, now, out))
    }

    /// What became of messages that the handler had kept in hand.
    pub(crate) fn report(&mut self, handler: &mut impl Handler) -> Handled {
        let mut handled = Handled::default();
        let mut outcomes = Vec::new();
        handler.take_outcomes(&mut |number, result| outcomes.push((number, result)));
        if outcomes.is_empty() {
            return handled;
        }
        let key = self.receiving.key();
        let mut waiting = None;
        let mut streams = self.sessions.lock();
        for (number, result) in outcomes {
            handled.handler_errors += u64::from(result.is_err());
            let outcome = match result {
                Ok(()) => Outcome::Finished,
                Err(error) => match error.rejection() {
                    Some(rejection) => Outcome::Refused(rejection.clone()),
                    None => Outcome::Failed(error.to_string()),
                },
            };
            let (again, newer) = streams.report(key, number, outcome);
            handled.must_be_sent_again |= again;
            waiting = waiting.or(newer);
        }
        drop(streams);
        if let Some(newer) = waiting {
            newer.wake();
        }
        handled
    }

    /// The handler has panicked while it was at work on messages that it had kept in hand.
    pub(crate) fn panicked(&mut self) {
        self.sessions.lock().blame(self.receiving.key());
    }

    /// Hands what was held and what was read to the handler, as far as it is its turn; the rest is held.
    pub(crate) fn deliver(
        &mut self,
        inbox: &mut Inbox,
        scratch: &mut [u8],
        read: usize,
        handler: Option<&mut impl Handler>,
        mut is_over: impl FnMut(u64) -> bool,
    ) -> (Handled, Result<Delivered, Ended>) {
        let mut batch = match self.begin(handler) {
            Ok(batch) => batch,
            Err(ended) => return (Handled::default(), Err(ended)),
        };
        let Accepted { sessions, receiving, replies, .. } = self;
        let mut ended = None;
        let delivered = catch_unwind(AssertUnwindSafe(|| {
            while batch.is_ready()
                && let Some((number, message)) = receiving.take_held()
            {
                if !Message::lend(&message, number, |lent| batch.handle(number, lent)) {
                    receiving.put_back(number, &message);
                    break;
                }
                if is_over(batch.handled.calls()) {
                    break;
                }
            }
            let delivered = inbox.deliver_in_session(scratch, read, usize::MAX, |found| {
                batch.handled.frames += 1;
                let result = match found {
                    Found::Control(frame) => told(sessions, receiving, replies, frame),
                    Found::Message(message) => receiving.number().and_then(|number| {
                        let goes_on = !receiving.has_held() && batch.is_ready();
                        if goes_on && batch.handle(number, message.numbered(number)) {
                            return Ok(());
                        }
                        receiving.hold(number, &message)
                    }),
                };
                match result {
                    Ok(()) if is_over(batch.handled.calls()) => Flow::Pause,
                    Ok(()) => Flow::Continue,
                    Err(error) => {
                        ended = Some(error);
                        Flow::Pause
                    }
                }
            });
            (delivered, batch.flush())
        }));
        let handled = std::mem::take(&mut batch.handled);
        let result = match delivered {
            Err(_) => {
                batch.panicked();
                Err(Ended::HandlerPanicked)
            }
            Ok((_, Err(error))) => {
                // Nothing of this batch was stored: none of it is finished.
                batch.forget();
                Err(Ended::HandlerFailed(error))
            }
            Ok((Err(malformed), Ok(()))) => Err(Ended::Malformed(malformed)),
            Ok((Ok(delivered), Ok(()))) => Ok(delivered),
        };
        let turn = batch.turn;
        let waiting = turn.and_then(|turn| sessions.lock().end(turn));
        if let Some(newer) = waiting {
            newer.wake();
        }
        match (ended, result) {
            (Some(error), Ok(_)) => {
                let framing = receiving.framing();
                replies.say(|out| Control::Refuse(error.refuse()).put(&framing, out));
                (handled, Err(Ended::Violated(error.to_string())))
            }
            (_, result) => (handled, result),
        }
    }

    /// Asks for a turn, if the handler is ready for one.
    fn begin<'h, H: Handler>(&mut self, handler: Option<&'h mut H>) -> Result<Batch<'h, H>, Ended> {
        let turn = match &handler {
            None => None,
            Some(_) => match self.sessions.lock().begin(&self.receiving) {
                Begun::Turn(turn) => Some(turn),
                Begun::Wait => None,
                Begun::Fenced => return Err(Ended::Fenced),
                Begun::Behind => return Err(Ended::SendAgain),
            },
        };
        let before = turn.as_ref().map(Turn::remembered);
        Ok(Batch { handler, turn, before, in_hand: None, handled: Handled::default() })
    }
}

/// A control frame came.
fn told(
    sessions: &Sessions,
    receiving: &mut Receiving,
    replies: &SharedOutbox,
    frame: &[u8],
) -> Result<(), SessionError> {
    let told = sessions.lock().control(receiving, Control::decode(frame)?)?;
    match told {
        Told::RepliesTaken(number) => replies.replies_taken(number),
        Told::TryAgain => {
            replies.wake();
            Ok(())
        }
        Told::Nothing | Told::Goodbye => Ok(()),
    }
}

/// Messages given to a handler in one turn.
struct Batch<'h, H> {
    handler: Option<&'h mut H>,
    turn: Option<Turn>,
    /// What was known before.
    before: Option<Ledger>,
    /// The message that the handler is at.
    in_hand: Option<u64>,
    handled: Handled,
}

impl<H: Handler> Batch<'_, H> {
    fn is_ready(&self) -> bool {
        self.turn.is_some() && self.handler.is_some()
    }

    /// Gives a message to the handler, again if it fails for the moment. `false` if it is not its turn.
    #[inline]
    fn handle(&mut self, number: u64, message: Message<'_>) -> bool {
        let (Some(turn), Some(handler)) = (&mut self.turn, &mut self.handler) else { return false };
        // Most messages come one after the other, and each is done with when the handler returns.
        if !turn.is_next(number) || handler.defers() {
            return self.handle_offered(number, message, None);
        }
        self.in_hand = Some(number);
        self.handled.count(&message);
        let result = handler.message(message);
        self.in_hand = None;
        match result {
            Ok(()) => {
                turn.pass(number);
                true
            }
            Err(error) => self.handle_offered(number, message, Some(error)),
        }
    }

    /// The same for a message of which there is something to remember. `failed` is how the handler failed over it just now.
    #[cold]
    fn handle_offered(&mut self, number: u64, message: Message<'_>, mut failed: Option<HandlerError>) -> bool {
        let (Some(turn), Some(handler)) = (&mut self.turn, &mut self.handler) else { return false };
        loop {
            let is_first = turn.is_first(number);
            match turn.offer(number) {
                Offer::Handle => {}
                Offer::Repeat => return true,
                Offer::Wait => return false,
            }
            let result = match failed.take() {
                Some(error) => Err(error),
                None => {
                    if is_first {
                        self.handled.count(&message);
                    } else {
                        self.handled.again += 1;
                    }
                    self.in_hand = Some(number);
                    let result = handler.message(message);
                    self.in_hand = None;
                    result
                }
            };
            match result {
                Ok(()) => {
                    if !handler.defers() {
                        turn.finish(number);
                    }
                    return true;
                }
                Err(error) => {
                    self.handled.handler_errors += 1;
                    if let Some(rejection) = error.rejection() {
                        turn.reject(number, rejection.clone());
                        return true;
                    }
                    if turn.fail(number, &error.to_string()) == Verdict::Rejected {
                        return true;
                    }
                }
            }
        }
    }

    fn flush(&mut self) -> Result<(), HandlerError> {
        match &mut self.handler {
            Some(handler) if self.handled.calls() > 0 => handler.batch_end(),
            _ => Ok(()),
        }
    }

    fn panicked(&mut self) {
        let (Some(number), Some(turn)) = (self.in_hand, &mut self.turn) else {
            // At the end of the batch: as if it had said that it could not store it.
            return self.forget();
        };
        // It may have been given to the handler before it was offered.
        turn.offer(number);
        turn.fail(number, PANICKED);
    }

    fn forget(&mut self) {
        if let (Some(before), Some(turn)) = (self.before.take(), &mut self.turn) {
            turn.restore(before);
        }
    }
}

/// One connection of a session, on the side that dials: what is heard about messages, and replies that come.
#[derive(Debug, Default)]
pub(crate) struct Dialled {
    /// Replies that wait for the handler, once one had to.
    held: Option<Held>,
    is_welcome: bool,
}

impl Dialled {
    pub(crate) fn has_held(&self) -> bool {
        self.held.as_ref().is_some_and(|held| !held.is_empty())
    }

    /// Bytes of memory that replies which wait for the handler are accounted for.
    pub(crate) fn held_memory(&self) -> usize {
        self.held.as_ref().map_or(0, Held::memory)
    }

    /// Hands replies to the handler if it is ready, as many as may be handled in one go, and tells the Outbox what was heard.
    pub(crate) fn deliver(
        &mut self,
        inbox: &mut Inbox,
        scratch: &mut [u8],
        read: usize,
        mut handler: Option<&mut impl Handler>,
        outbox: &SharedOutbox,
        mut is_over: impl FnMut(u64) -> bool,
    ) -> (Handled, Result<Delivered, Ended>) {
        let Dialled { held, is_welcome } = self;
        let mut handled = Handled::default();
        let mut ended = None;
        let mut welcomed = false;
        let delivered = catch_unwind(AssertUnwindSafe(|| {
            let mut take = |message: Message<'_>, handled: &mut Handled| {
                let Some(handler) = &mut handler else { return false };
                handled.count(&message);
                handled.handler_errors += u64::from(handler.message(message).is_err());
                true
            };
            while let Some((number, message)) = held.as_mut().and_then(Held::take) {
                if !Message::lend(&message, 0, |lent| take(lent, &mut handled)) {
                    held.as_mut().expect("it was just taken from").put_back(number, &message);
                    break;
                }
                if is_over(handled.messages) {
                    break;
                }
            }
            let delivered = inbox.deliver_in_session(scratch, read, usize::MAX, |found| {
                handled.frames += 1;
                let result = match found {
                    Found::Control(frame) => outbox.hear(frame),
                    Found::Message(message) => {
                        let number = outbox.with_sending(|sending, _| sending.reply()).expect("it is a session");
                        let goes_on = held.as_ref().is_none_or(Held::is_empty);
                        number.and_then(|number| {
                            if !(goes_on && take(message, &mut handled)) {
                                let room = || outbox.with_sending(|sending, _| sending.room_for_replies());
                                held.get_or_insert_with(|| room().expect("it is a session")).push(number, &message)?;
                            }
                            Ok(Heard::Nothing)
                        })
                    }
                };
                match result {
                    Ok(Heard::Nothing | Heard::Resolved) if is_over(handled.messages) => {}
                    Ok(Heard::Nothing | Heard::Resolved) => return Flow::Continue,
                    Ok(Heard::Welcomed { resumed, .. }) => {
                        welcomed = true;
                        if let Some(acknowledged) = resumed {
                            outbox.tell(Event::Resumed { acknowledged });
                            tracing::debug!(acknowledged, "the stream goes on where it was");
                        }
                    }
                    Ok(Heard::Refused(refuse)) => {
                        let Refuse { code, text, .. } = refuse;
                        ended = Some(Ended::Refused { why: printable(&text), is_temporary: code.is_temporary() });
                    }
                    Ok(Heard::Draining) => {
                        outbox.tell(Event::Draining);
                        tracing::info!("the receiver is about to leave");
                    }
                    Ok(Heard::Forgotten) => {}
                    Ok(Heard::Overtaken) => {
                        let why = "the receiver has heard more of this stream than this spool has sent: the spool is a copy, \
                                   or was restored from one, and would lose messages";
                        ended = Some(Ended::Refused { why: why.into(), is_temporary: false });
                    }
                    Err(error) => ended = Some(Ended::Violated(error.to_string())),
                }
                Flow::Pause
            });
            if handled.messages > 0
                && let Some(handler) = &mut handler
            {
                // As over a reply: the other side asks for no more than that it was taken.
                handled.handler_errors += u64::from(handler.batch_end().is_err());
            }
            delivered
        }));
        outbox.with_sending(|sending, _| sending.took_replies(handled.messages));
        if welcomed {
            *is_welcome = true;
            if let Some(framing) = outbox.with_sending(|sending, _| sending.framing()) {
                inbox.enter_session(framing, 0);
            }
        }
        let result = match (delivered, ended) {
            (Err(_), _) => Err(Ended::HandlerPanicked),
            (_, Some(ended)) => Err(ended),
            (Ok(Err(malformed)), None) => Err(Ended::Malformed(malformed)),
            (Ok(Ok(delivered)), None) => Ok(delivered),
        };
        (handled, result)
    }

    /// What an end of stream means: before the answer, that there are no sessions there.
    pub(crate) fn ended(&self, otherwise: Ended) -> Ended {
        if self.is_welcome {
            return otherwise;
        }
        let why = "the peer closed the connection when it was asked for a session: its listener has turned it away (a \
                   limit, or who is allowed; its log says which), or knows no sessions, as that of BuffStreams for Go";
        Ended::Refused { why: why.into(), is_temporary: true }
    }
}
