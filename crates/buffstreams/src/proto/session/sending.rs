//! One stream on the side that dials, over all of its connections: asks for the session, learns where the receiver stands,
//! and turns what the receiver says into what becomes of messages.
//!
//! The messages themselves are in the Outbox, which is lent to each call. Invariants: nothing is written before the
//! receiver has said where it stands; rejects are known before anything is released that they stand for; every epoch is
//! higher than the one before. It refuses whatever a receiver says that cannot be, and the connection with it.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use super::super::flight::Untrue;
use super::super::framing::Framing;
use super::super::outbox::Outbox;
use super::held::Held;
use super::liveness::Liveness;
use super::wire::{self, Control, Hello, Preface, Refuse, RefuseCode, StateId, StreamId, VERSION, Welcome};
use super::{MOST_REJECTS, SessionError};

/// What the side that dials asks for.
#[derive(Clone, Debug)]
pub(crate) struct Ask {
    /// The framing [of the session](Framing::for_session), with the largest message in both directions.
    pub(crate) framing: Framing,
    /// Bytes that it would like to have in flight.
    pub(crate) window: usize,
    /// Bytes of replies that it takes ahead of its handler; the largest one fits.
    pub(crate) reply_window: usize,
    pub(crate) heartbeat: Duration,
    /// At most [`wire::LONGEST_TOKEN`] bytes.
    pub(crate) token: Vec<u8>,
}

/// How far the connection at hand has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// There is none.
    Apart,
    /// HELLO was said.
    Greeting,
    Open,
    /// It was refused, or all is said.
    Over,
}

/// A receiver that no longer knew the stream: what was in flight may be handled twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct StateLost {
    /// The first message that was not acknowledged. One more than `to` if all were.
    pub(crate) from: u64,
    /// The last message that was ever begun to be written.
    pub(crate) to: u64,
}

/// What was heard, as far as it matters to whoever owns the connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Heard {
    Nothing,
    /// Messages were settled, or have failed.
    Resolved,
    /// The session stands, and writing may go on.
    Welcomed {
        lost: Option<StateLost>,
        /// The stream goes on where it was: so many messages had been finished that this side did not know of.
        resumed: Option<u64>,
    },
    /// The session is refused, or ended; the code says whether another attempt makes sense.
    Refused(Refuse),
    /// The receiver is about to leave: what is in flight is waited for, and nothing more is handed out.
    Draining,
    /// The receiver has forgotten the stream, as it was asked to.
    Forgotten,
    /// The receiver has heard more of the stream than what is on disk can have sent.
    Overtaken,
}

/// Connections of one process have epochs below those of the next, where a stream outlives its process: so many are left
/// between two.
pub(crate) const EPOCHS: u64 = 1 << 32;

/// One stream on the side that dials.
#[derive(Debug)]
pub(crate) struct Sending {
    stream: StreamId,
    epoch: u64,
    ask: Ask,
    /// What the receiver called its knowledge of the stream, when it was last asked.
    state: Option<StateId>,
    /// How far it said then, or since, that all is finished. That may be less than what another, or the same before it lost
    /// its state, has acknowledged.
    committed: u64,
    phase: Phase,
    /// The first number of the last HELLO.
    first: u64,
    /// Rejects to confirm.
    confirms: BTreeSet<u64>,
    /// Rejects that were heard on the connection at hand, to confirm when they are [on disk](Self::stored).
    unstored: BTreeSet<u64>,
    /// Replies that came, that were handled, and that the receiver was told of, on the connection at hand.
    replies: u64,
    replies_taken: u64,
    replies_acked: u64,
    /// All is sent, and the receiver may forget the stream once it is acknowledged.
    is_leaving: bool,
    said_goodbye: bool,
    heard_goodbye: bool,
    owes_confirmation: bool,
    liveness: Option<Liveness>,
}

impl Sending {
    /// A stream whose last connection had this epoch; 0 if there was none.
    pub(crate) fn new(stream: StreamId, epoch: u64, ask: Ask) -> Sending {
        debug_assert!(ask.token.len() <= wire::LONGEST_TOKEN);
        Sending {
            stream,
            epoch,
            ask,
            state: None,
            committed: 0,
            phase: Phase::Apart,
            first: 1,
            confirms: BTreeSet::new(),
            unstored: BTreeSet::new(),
            replies: 0,
            replies_taken: 0,
            replies_acked: 0,
            is_leaving: false,
            said_goodbye: false,
            heard_goodbye: false,
            owes_confirmation: false,
            liveness: None,
        }
    }

    /// That this message was rejected is on disk, and may be confirmed.
    #[cfg_attr(not(feature = "spool"), allow(dead_code))]
    pub(crate) fn stored(&mut self, number: u64, outbox: &mut Outbox) {
        outbox.note_stored(number);
        if self.unstored.remove(&number) {
            self.confirms.insert(number);
        }
    }

    /// What the receiver knows it as.
    pub(crate) fn stream(&self) -> StreamId {
        self.stream
    }

    /// The epoch of the last connection.
    #[cfg(test)]
    pub(crate) fn epoch(&self) -> u64 {
        self.epoch
    }

    /// A connection was made: what to write first. Everything unsettled waits for the receiver's answer.
    ///
    /// # Errors
    ///
    /// If there is no epoch left.
    pub(crate) fn connect(&mut self, outbox: &mut Outbox, now: Instant) -> Result<Vec<u8>, SessionError> {
        outbox.rewind();
        self.epoch = self.epoch.checked_add(1).ok_or(SessionError::NumbersExhausted)?;
        self.phase = Phase::Greeting;
        self.first = outbox.first_number();
        self.confirms.clear();
        // A receiver that still knows of these says so again.
        self.unstored.clear();
        (self.replies, self.replies_taken, self.replies_acked) = (0, 0, 0);
        (self.said_goodbye, self.heard_goodbye, self.owes_confirmation) = (false, false, false);
        self.liveness = Some(Liveness::new(self.ask.heartbeat, now));
        let Ask { framing, window, reply_window, heartbeat, token } = &self.ask;
        let hello = Hello {
            versions: (VERSION, VERSION),
            stream: self.stream,
            epoch: self.epoch,
            first: self.first,
            maximum: framing.max_message_size() as u64,
            window: *window as u64,
            reply_window: *reply_window as u64,
            heartbeat: *heartbeat,
            token: token.clone(),
        };
        let mut greeting = Vec::new();
        Preface::put(&mut greeting);
        Control::Hello(hello).put(&wire::handshake_framing(), &mut greeting);
        Ok(greeting)
    }

    /// The connection is lost, or was given up.
    pub(crate) fn part(&mut self, outbox: &mut Outbox) {
        self.phase = Phase::Apart;
        self.liveness = None;
        outbox.rewind();
    }

    /// What the Inbox must expect: the handshake's framing, or the session's.
    pub(crate) fn framing(&self) -> Framing {
        if self.phase == Phase::Greeting { wire::handshake_framing() } else { self.ask.framing }
    }

    /// What a session speaks, once it stands.
    pub(crate) fn session_framing(&self) -> Framing {
        self.ask.framing
    }

    /// Whether the session stands, on the connection at hand.
    pub(crate) fn is_open(&self) -> bool {
        self.phase == Phase::Open
    }

    /// A control frame came. After [`Heard::Welcomed`], the [framing](Self::framing) is another one.
    ///
    /// # Errors
    ///
    /// If it has no place here, or says what cannot be.
    pub(crate) fn control(
        &mut self,
        control: Control,
        outbox: &mut Outbox,
        now: Instant,
    ) -> Result<Heard, SessionError> {
        match (self.phase, control) {
            (Phase::Greeting, Control::Welcome(welcome)) => self.welcomed(welcome, outbox),
            (Phase::Greeting | Phase::Open, Control::Reject(number, rejection)) => {
                let is_news = outbox.rejected(number, rejection, now)?;
                let waiting = if outbox.is_unstored(number) { &mut self.unstored } else { &mut self.confirms };
                waiting.insert(number);
                if self.confirms.len() + self.unstored.len() > MOST_REJECTS {
                    return Err(SessionError::TooManyRejects);
                }
                Ok(if is_news { Heard::Resolved } else { Heard::Nothing })
            }
            (Phase::Greeting | Phase::Open, Control::Refuse(refuse)) => {
                self.phase = Phase::Over;
                if refuse.code != RefuseCode::EPOCH {
                    return Ok(Heard::Refused(refuse));
                }
                if outbox.is_spooled() && refuse.detail / EPOCHS > self.epoch / EPOCHS {
                    // A later process has sent from a later state of what is on disk.
                    outbox.note_unsent(outbox.last_number() + 1);
                    return Ok(Heard::Overtaken);
                }
                // The next one shall be higher than whatever the receiver has seen.
                self.epoch = self.epoch.max(refuse.detail);
                Ok(Heard::Refused(refuse))
            }
            (Phase::Open, Control::Ack(number)) => {
                Ok(if self.acked(number, self.committed, outbox)? { Heard::Resolved } else { Heard::Nothing })
            }
            (Phase::Open, Control::Goodbye) if !self.heard_goodbye => {
                self.heard_goodbye = true;
                if self.said_goodbye {
                    return Ok(Heard::Nothing);
                }
                self.owes_confirmation = true;
                outbox.stop();
                Ok(Heard::Draining)
            }
            (Phase::Open, Control::ConfirmGoodbye) if self.said_goodbye => {
                self.phase = Phase::Over;
                Ok(Heard::Forgotten)
            }
            // Both sides may have said goodbye at the same time.
            (Phase::Over, Control::Goodbye | Control::Heartbeat) if self.said_goodbye => Ok(Heard::Nothing),
            (Phase::Open, Control::Heartbeat) | (_, Control::Ignorable(_)) => Ok(Heard::Nothing),
            (phase, control) => {
                let when = match phase {
                    Phase::Greeting => "before WELCOME",
                    Phase::Open => "in a session, from the side that listens",
                    Phase::Apart | Phase::Over => "where there is no session",
                };
                Err(SessionError::OutOfPlace { frame: control.name(), when })
            }
        }
    }

    fn welcomed(&mut self, welcome: Welcome, outbox: &mut Outbox) -> Result<Heard, SessionError> {
        let least = wire::largest_frame(self.ask.framing.max_message_size() as u64);
        if welcome.window < least {
            return Err(SessionError::WindowTooSmall { window: welcome.window, least });
        }
        if welcome.dispatched < self.first - 1 {
            return Err(Untrue::Behind { number: welcome.dispatched, first: self.first }.into());
        }
        let (from, to) = (outbox.first_number(), outbox.last_number());
        if outbox.is_spooled() && welcome.dispatched > to {
            outbox.note_unsent(welcome.dispatched);
            return Ok(Heard::Overtaken);
        }
        let before = if self.state == Some(welcome.state) { self.committed } else { 0 };
        Self::check_committed(welcome.committed, before)?;
        outbox.resume(welcome.dispatched, usize::try_from(welcome.window).unwrap_or(usize::MAX))?;
        let settled = outbox.tally().settled;
        self.acked(welcome.committed, before, outbox)?;
        let known = self.state.replace(welcome.state);
        let lost = known.filter(|known| *known != welcome.state).map(|_| StateLost { from, to });
        let resumed = (known.is_some() && lost.is_none()).then(|| outbox.tally().settled - settled);
        self.phase = Phase::Open;
        self.liveness = self.liveness.map(|liveness| liveness.with_interval(welcome.heartbeat));
        Ok(Heard::Welcomed { lost, resumed })
    }

    /// The receiver has finished everything up to here, and had before up to there. Returns whether that is news.
    fn acked(&mut self, committed: u64, before: u64, outbox: &mut Outbox) -> Result<bool, SessionError> {
        Self::check_committed(committed, before)?;
        // Old news where it lost its state, or where a handler still has a message that never comes again.
        let is_news = outbox.acked(committed.max(outbox.acked_to()))?;
        self.committed = committed;
        Ok(is_news)
    }

    fn check_committed(committed: u64, before: u64) -> Result<(), SessionError> {
        if committed < before {
            return Err(Untrue::TakenBack { number: committed, acked: before }.into());
        }
        Ok(())
    }

    /// Room for replies that cannot be handled yet, on a connection that begins: as much as the receiver was told.
    pub(crate) fn room_for_replies(&self) -> Held {
        Held::new(self.ask.framing, self.ask.reply_window)
    }

    /// A reply was read: its number. Those behind the receiver's last word are taken for as long as this side has not ended
    /// its stream.
    ///
    /// # Errors
    ///
    /// If there is no session yet, or it was refused.
    pub(crate) fn reply(&mut self) -> Result<u64, SessionError> {
        let is_forgotten = self.phase == Phase::Over && self.said_goodbye;
        if self.phase != Phase::Open && !is_forgotten {
            return Err(SessionError::OutOfPlace { frame: "a message", when: "where there is no session" });
        }
        self.replies = self.replies.checked_add(1).ok_or(SessionError::NumbersExhausted)?;
        Ok(self.replies)
    }

    /// The handler has taken so many more replies: the window is free of them.
    pub(crate) fn took_replies(&mut self, count: u64) {
        self.replies_taken += count;
        debug_assert!(self.replies_taken <= self.replies);
    }

    /// All is accepted that ever will be: once it is settled or has failed, the receiver is told to forget the stream.
    pub(crate) fn leave(&mut self) {
        self.is_leaving = true;
    }

    /// Whether nothing is left to do on the connection at hand: the receiver has forgotten the stream, or is about to
    /// leave and has acknowledged what it was sent.
    pub(crate) fn is_done(&self, outbox: &Outbox) -> bool {
        self.phase == Phase::Over || (self.heard_goodbye && !self.owes_confirmation && outbox.in_window() == 0)
    }

    /// Appends the control frames that are to be written now. They go before messages that are handed out after this.
    pub(crate) fn controls(&mut self, outbox: &mut Outbox, now: Instant, out: &mut Vec<u8>) {
        if self.phase != Phase::Open {
            return;
        }
        let before = out.len();
        let framing = self.ask.framing;
        while let Some(number) = self.confirms.pop_first() {
            Control::ConfirmReject(number).put(&framing, out);
        }
        if self.replies_taken > self.replies_acked {
            self.replies_acked = self.replies_taken;
            Control::Ack(self.replies_acked).put(&framing, out);
        }
        if std::mem::take(&mut self.owes_confirmation) {
            Control::ConfirmGoodbye.put(&framing, out);
        } else if self.is_leaving && !self.said_goodbye && !self.heard_goodbye && outbox.is_resolved() {
            self.said_goodbye = true;
            outbox.stop();
            Control::Goodbye.put(&framing, out);
        }
        if out.len() == before && self.liveness.is_some_and(|liveness| liveness.is_due(now)) {
            Control::Heartbeat.put(&framing, out);
        }
        if out.len() > before {
            self.spoke(now);
        }
    }

    /// Bytes came.
    pub(crate) fn heard(&mut self, now: Instant) {
        if let Some(liveness) = &mut self.liveness {
            liveness.heard(now);
        }
    }

    /// Bytes went.
    pub(crate) fn spoke(&mut self, now: Instant) {
        if let Some(liveness) = &mut self.liveness {
            liveness.spoke(now);
        }
    }

    /// Whether nothing may be written before the receiver has answered.
    pub(crate) fn awaits_welcome(&self) -> bool {
        self.phase == Phase::Greeting
    }

    /// Whether the peer has been silent for too long.
    pub(crate) fn is_dead(&self, now: Instant) -> bool {
        self.liveness.is_some_and(|liveness| liveness.is_dead(now))
    }

    /// When to look again, if nothing happens before: to say something, or because the peer is dead. Before WELCOME, only
    /// the latter.
    pub(crate) fn wake_at(&self) -> Option<Instant> {
        let awaits_welcome = self.awaits_welcome();
        self.liveness.map(|liveness| if awaits_welcome { liveness.dead_at() } else { liveness.next() })
    }
}
