//! What a session asks of an Outbox under its lock, on either side, and what it has to say there.

use std::collections::VecDeque;
use std::time::Instant;

use bytes::Bytes;

use super::{SharedOutbox, State};
use crate::proto::framing::Framing;
use crate::proto::outbox::Outbox;
use crate::proto::session::SessionError;
use crate::proto::session::sending::{Heard, Sending, StateLost};
use crate::proto::session::wire::{Control, StreamId};

impl SharedOutbox {
    /// Wakes the task of the socket.
    pub(crate) fn wake(&self) {
        let waker = self.lock().task.clone();
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    /// Whether these messages are in no session.
    pub(crate) fn is_plain(&self) -> bool {
        self.lock().sending.is_none()
    }

    /// Calls `ask` with the session of these messages, if there is one.
    pub(crate) fn with_sending<T>(&self, ask: impl FnOnce(&mut Sending, &mut Outbox) -> T) -> Option<T> {
        let mut state = self.lock();
        let State { sending, outbox, .. } = &mut *state;
        sending.as_mut().map(|sending| ask(sending, outbox))
    }

    /// A socket was opened: asks for the session there. `false` if no further one can be asked for.
    pub(crate) fn greet(&self) -> bool {
        let mut state = self.lock();
        let State { sending, outbox, to_say, .. } = &mut *state;
        match sending.as_mut().map(|sending| sending.connect(outbox, Instant::now())) {
            None => true,
            Some(Ok(greeting)) => {
                *to_say = greeting;
                true
            }
            Some(Err(_)) => false,
        }
    }

    /// A control frame came for the session of these messages.
    pub(crate) fn hear(&self, frame: &[u8]) -> Result<Heard, SessionError> {
        let control = Control::decode(frame)?;
        let mut state = self.lock();
        let State { sending, outbox, .. } = &mut *state;
        let Some(sending) = sending else { return Ok(Heard::Nothing) };
        let heard = sending.control(control, outbox, Instant::now())?;
        if let Heard::Welcomed { lost: Some(lost), .. } = heard {
            let from = state.state_lost.as_deref().map_or(lost.from, |before| before.from);
            state.state_lost = Some(Box::new(StateLost { from, ..lost }));
        }
        if matches!(heard, Heard::Resolved | Heard::Welcomed { .. }) {
            self.announce(&state, true);
            if state.outbox.has_failed() {
                self.chores.notify_one();
            }
        }
        Ok(heard)
    }

    /// What a receiver has lost, if one has, and nobody was told yet.
    pub(crate) fn take_state_lost(&self) -> Option<StateLost> {
        self.lock().state_lost.take().map(|lost| *lost)
    }

    /// How many messages may have been written, and are not acknowledged: the receiver may have these. Not while there is a
    /// connection.
    pub(crate) fn unacknowledged(&self) -> u64 {
        let unacknowledged =
            |_: &mut Sending, outbox: &mut Outbox| (outbox.last_number() + 1).saturating_sub(outbox.first_number());
        self.with_sending(unacknowledged).unwrap_or(0)
    }

    /// Whether the receiver has heard more of the stream than what is on disk can have sent.
    pub(crate) fn is_overtaken(&self) -> bool {
        self.with_sending(|_, outbox| outbox.unsent().is_some()).unwrap_or(false)
    }

    /// From now on these replies belong to a session, and so many bytes of them may be in flight. `false` if some were
    /// sent before.
    pub(crate) fn enter_session(&self, framing: Framing, window: usize) -> bool {
        let mut state = self.lock();
        if state.outbox.next_number() > 0 {
            return false;
        }
        let limit = state.outbox.limit();
        state.outbox = Outbox::in_session(framing, limit);
        state.outbox.resume(0, window).is_ok()
    }

    /// The acknowledged stream that these replies go back on.
    pub(crate) fn peer_stream(&self) -> Option<(&StreamId, &Vec<u8>)> {
        self.peer_stream.get().map(|known| (&known.0, &known.1))
    }

    pub(crate) fn name_peer_stream(&self, stream: StreamId, token: Vec<u8>) {
        let _ = self.peer_stream.set(Box::new((stream, token)));
    }

    /// Control frames to write before anything else; only as long as none wait. Returns whether there are some now that
    /// were not there.
    pub(crate) fn say(&self, put: impl FnOnce(&mut Vec<u8>)) -> bool {
        let mut state = self.lock();
        let is_free = state.to_say.is_empty();
        if is_free {
            put(&mut state.to_say);
        }
        is_free && !state.to_say.is_empty()
    }

    /// The peer has taken the replies up to this number.
    pub(crate) fn replies_taken(&self, number: u64) -> Result<(), SessionError> {
        let mut state = self.lock();
        let settled = state.outbox.acked(number)?;
        self.announce(&state, settled);
        Ok(())
    }
}

/// Gives the writer what the session has to say, before any message.
#[cold]
pub(super) fn hand_controls(state: &mut State, into: &mut VecDeque<Bytes>) {
    let State { sending, outbox, to_say, .. } = state;
    if let Some(sending) = sending {
        sending.controls(outbox, Instant::now(), to_say);
    }
    outbox.hand_control(std::mem::take(to_say), into);
}
