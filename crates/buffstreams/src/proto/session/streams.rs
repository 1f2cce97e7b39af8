//! What a listener knows of every stream: one table, which belongs behind one lock.
//!
//! Connections come and go; what is known stays, by number and never by time, until the sender says goodbye or the stream
//! is the least recently used of too many; those of which nothing would be lost go before all others. Handlers run without the lock: a connection takes a [`Turn`], hands out
//! messages, and gives the turn back.
//!
//! Invariants: a stream has one turn at most, and none for a connection while the handler of another still has a message.
//! Only the newest connection gets turns and acknowledges; an older one is fenced by a newer one at once, however busy
//! its handler is. The committed number never goes down. No window is wider than an equal part of half the memory,
//! or the largest message: it is a promise to read on, and memory is counted where it is used.

use std::collections::{BTreeMap, HashMap};
use std::time::{Duration, Instant};

use super::super::framing::Framing;
use super::super::outbox::Rejection;
use super::ledger::{Ledger, Verdict};
use super::liveness::Liveness;
use super::receiving::{Key, Receiving, Turn};
use super::wire::{self, Control, Hello, Refuse, RefuseCode, StateId, StreamId, VERSION, Welcome};
use super::{MOST_REJECTS, SessionError};

/// How many streams without a connection are remembered.
pub(crate) const MOST_DETACHED: usize = 65_536;

/// How many bytes the texts of rejects may take that wait for a sender to come back.
const MOST_DETACHED_TEXT: usize = 16 * 1024 * 1024;

/// How long acknowledgements wait at most while handlers work.
pub(super) const ACK_DELAY: Duration = Duration::from_millis(100);

/// Once so many bytes came without an acknowledgement, others follow, and it can wait for them; so long at most.
pub(super) const STREAM: usize = 32 * 1024;
pub(super) const ACK_PACE: Duration = Duration::from_millis(5);

/// What a listener grants.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Terms {
    /// Bytes of the largest message.
    pub(crate) maximum: usize,
    /// Bytes of the largest window.
    pub(crate) window: usize,
    /// The least and the longest time between two signs of life.
    pub(crate) heartbeat: (Duration, Duration),
}

/// How far a stream has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Stand {
    /// Up to here, no message need be sent again.
    pub(crate) dispatched: u64,
    /// Up to here, every message is finished.
    pub(crate) committed: u64,
}

/// A session was granted.
#[derive(Debug)]
pub(crate) struct Opened<C> {
    pub(crate) receiving: Receiving,
    /// What to write first.
    pub(crate) greeting: Vec<u8>,
    /// The connection that was the stream's until now; it must be told to look at its next turn.
    pub(crate) fenced: Option<C>,
}

/// Whether a connection may hand messages to the handler.
#[derive(Debug)]
pub(crate) enum Begun {
    /// It may.
    Turn(Turn),
    /// Not now: the handler of an older connection still has messages, or too many rejects are not confirmed. It will
    /// be woken.
    Wait,
    /// Never again: a newer connection took over.
    Fenced,
    /// Never again: a message must be handled again that this connection has behind it. It must be closed, so that the
    /// sender begins there.
    Behind,
}

/// What became of one message.
#[derive(Clone, Debug)]
pub(crate) enum Outcome {
    Finished,
    /// For good.
    Refused(Rejection),
    /// For the moment, or by a panic. The text is for people.
    Failed(String),
}

/// What a control frame means for the connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Told {
    Nothing,
    /// There may be a turn now, where there was none.
    TryAgain,
    /// The peer has taken all replies up to this number.
    RepliesTaken(u64),
    /// The sender is done with the stream, or, if it was asked to, with the connection.
    Goodbye,
}

/// All streams of a listener. `C` is how the shell calls a connection: what it needs to wake it.
#[derive(Debug)]
pub(crate) struct Streams<C> {
    /// Random bytes of this table's lifetime, and a count: together they name what is known of one stream.
    lifetime: u64,
    known: u64,
    streams: HashMap<StreamId, Stream<C>>,
    detached: Detached,
    most_detached: usize,
    /// How many streams were forgotten of which something is lost by that.
    forgotten: u64,
    /// Bytes that all messages which wait for their handlers may take.
    memory: usize,
    /// Connections that were not closed.
    open: usize,
}

#[derive(Debug)]
struct Stream<C> {
    state: StateId,
    epoch: u64,
    /// What stands for who began it, if that was proved.
    owner: Option<u64>,
    /// The connection of this epoch.
    attached: Option<C>,
    /// Connections whose end was not reported.
    connections: usize,
    /// `None` while a connection has the turn.
    ledger: Option<Ledger>,
    /// What the ledger said when it was last here.
    stand: Stand,
    rejects: BTreeMap<u64, Reject>,
    /// The sender has said goodbye.
    leaving: bool,
    /// The lowest number that may still come.
    first: u64,
    /// Its place among those without a connection.
    place: Place,
}

/// Where a stream without a connection stands among those that are to be forgotten: first those of which nothing would be
/// lost, then in the order in which they lost their connection.
type Place = (bool, u64);

/// Streams without a connection.
#[derive(Debug, Default)]
struct Detached {
    places: BTreeMap<Place, StreamId>,
    /// Those of them that have rejects with a text, in the order in which they lost their connection.
    with_text: BTreeMap<u64, StreamId>,
    /// Bytes of these texts.
    text: usize,
    /// How many there ever were.
    count: u64,
}

#[derive(Debug)]
struct Reject {
    rejection: Rejection,
    /// The epoch in which the sender was last told; 0 if never.
    told: u64,
}

impl<C: Clone> Streams<C> {
    /// Knows nothing. `lifetime` is random, `memory` is what all messages that wait may take, in bytes.
    pub(crate) fn new(lifetime: u64, memory: usize) -> Streams<C> {
        Streams {
            lifetime,
            known: 0,
            streams: HashMap::new(),
            detached: Detached::default(),
            most_detached: MOST_DETACHED,
            forgotten: 0,
            memory,
            open: 0,
        }
    }

    /// A connection asks for a session. `stored` is the last message that the handler knows to have stored for good, of a
    /// stream that is not known (any more).
    ///
    /// # Errors
    ///
    /// The refusal to answer with, before the connection is closed.
    pub(crate) fn open(
        &mut self,
        hello: &Hello,
        stored: Option<u64>,
        terms: &Terms,
        connection: C,
        now: Instant,
    ) -> Result<Opened<C>, Refuse> {
        let refuse = |code, detail, text: String| Err(Refuse { code, detail, text });
        if !(hello.versions.0..=hello.versions.1).contains(&VERSION) {
            let text = format!("versions {} to {} asked, {VERSION} spoken", hello.versions.0, hello.versions.1);
            return refuse(RefuseCode::VERSION, u64::from(VERSION), text);
        }
        let framing = usize::try_from(hello.maximum).ok().filter(|maximum| *maximum <= terms.maximum);
        let Some(framing) = framing.and_then(|maximum| Framing::for_session(maximum).ok()) else {
            let text = format!("a maximum of {} bytes asked, {} allowed", hello.maximum, terms.maximum);
            return refuse(RefuseCode::MAXIMUM, terms.maximum as u64, text);
        };
        let known = self.streams.get(&hello.stream).map_or(0, |stream| stream.epoch);
        if hello.epoch <= known {
            let text = format!("epoch {} asked, {known} known", hello.epoch);
            return refuse(RefuseCode::EPOCH, known, text);
        }
        let least = least_window(&framing);
        if least > self.memory {
            let text = format!("a window of {least} bytes needed, {} is all there is", self.memory);
            return refuse(RefuseCode::BUSY, self.memory as u64, text);
        }
        self.open += 1;
        let wanted = usize::try_from(hello.window).unwrap_or(usize::MAX);
        let window = wanted.min(terms.window).min(self.part()).max(least);
        let stream = self.attach(hello, stored);
        let fenced = stream.attached.replace(connection);
        let heartbeat = hello.heartbeat.clamp(terms.heartbeat.0, terms.heartbeat.1);
        let welcome = Welcome {
            version: VERSION,
            state: stream.state,
            dispatched: stream.stand.dispatched,
            committed: stream.stand.committed,
            window: window as u64,
            heartbeat,
        };
        // Rejects go before the number that releases what they are about.
        let mut greeting = Vec::new();
        let handshake = wire::handshake_framing();
        for (number, reject) in &mut stream.rejects {
            Control::Reject(*number, reject.rejection.clone()).put(&handshake, &mut greeting);
            reject.told = hello.epoch;
        }
        Control::Welcome(welcome).put(&handshake, &mut greeting);
        let key = Key { stream: hello.stream, epoch: hello.epoch };
        let reply_window = usize::try_from(hello.reply_window).unwrap_or(usize::MAX);
        let liveness = Liveness::new(heartbeat, now);
        let receiving = Receiving::new(key, framing, stream.stand, window, reply_window, liveness, now);
        Ok(Opened { receiving, greeting, fenced })
    }

    /// Remembers fewer streams without a connection than [`MOST_DETACHED`].
    #[cfg(test)]
    pub(super) fn remember(&mut self, most: usize) {
        self.most_detached = most;
    }

    /// Whether anything is known of a stream.
    pub(crate) fn knows(&self, stream: StreamId) -> bool {
        self.streams.contains_key(&stream)
    }

    /// Whether a stream is known, and was begun by somebody else. `who` stands for who asks, if that is proved.
    pub(crate) fn is_of_another(&self, stream: StreamId, who: Option<u64>) -> bool {
        self.streams.get(&stream).is_some_and(|stream| stream.owner != who)
    }

    /// A stream that was opened is of nobody else from now on.
    pub(crate) fn give(&mut self, stream: StreamId, who: Option<u64>) {
        if let Some(stream) = self.streams.get_mut(&stream) {
            stream.owner = who;
        }
    }

    /// How many connections were not closed.
    #[cfg(test)]
    pub(super) fn open_connections(&self) -> usize {
        self.open
    }

    /// Bytes of messages that this connection may hold however much others do: an equal part of half of what there is, and
    /// the largest message always.
    pub(crate) fn part_of(&self, receiving: &Receiving) -> usize {
        self.part().max(least_window(&receiving.framing))
    }

    fn part(&self) -> usize {
        self.memory / 2 / self.open.max(1)
    }

    /// Finds the stream, or makes it, and gives it to a new epoch.
    fn attach(&mut self, hello: &Hello, stored: Option<u64>) -> &mut Stream<C> {
        let Streams { lifetime, known, streams, detached, .. } = self;
        let stream = streams.entry(hello.stream).or_insert_with(|| {
            *known += 1;
            let mut state = [0; 16];
            state[..8].copy_from_slice(&lifetime.to_be_bytes());
            state[8..].copy_from_slice(&known.to_be_bytes());
            let finished = stored.unwrap_or(0).max(hello.first - 1);
            Stream {
                state: StateId(state),
                epoch: 0,
                owner: None,
                attached: None,
                connections: 0,
                ledger: Some(Ledger::new(finished)),
                stand: Stand { dispatched: finished, committed: finished },
                rejects: BTreeMap::new(),
                leaving: false,
                first: 1,
                place: Place::default(),
            }
        });
        if stream.connections == 0 {
            detached.remove(stream.place, stream.text());
        }
        stream.connections += 1;
        stream.epoch = hello.epoch;
        stream.leaving = false;
        stream.first = stream.first.max(hello.first);
        match stream.ledger.take() {
            Some(ledger) => stream.take_in(ledger),
            None => stream.stand.dispatched = stream.stand.dispatched.max(stream.first - 1),
        }
        stream
    }

    /// Asks for the right to hand messages to the handler.
    pub(crate) fn begin(&mut self, receiving: &Receiving) -> Begun {
        let Key { stream, epoch } = receiving.key;
        let Some(stream) = self.streams.get_mut(&stream).filter(|stream| stream.epoch == epoch) else {
            return Begun::Fenced;
        };
        let Some(ledger) = &stream.ledger else { return Begun::Wait };
        if ledger.is_in_other_hands(epoch) || stream.rejects.len() >= MOST_REJECTS {
            return Begun::Wait;
        }
        if ledger.failed().is_some_and(|number| !receiving.brings(number)) {
            return Begun::Behind;
        }
        let rejects_left = MOST_REJECTS - stream.rejects.len();
        let ledger = stream.ledger.take().expect("it was just looked at");
        Begun::Turn(Turn { key: receiving.key, ledger, rejects_left })
    }

    /// Gives the right back. Returns a newer connection that waited for it.
    pub(crate) fn end(&mut self, turn: Turn) -> Option<C> {
        let Turn { key, ledger, .. } = turn;
        let stream = self.streams.get_mut(&key.stream).expect("a stream with a connection is not forgotten");
        stream.take_in(ledger);
        stream.other(key.epoch)
    }

    /// A handler is done with a message that it kept in hand beyond its turn. Returns whether the message must be handled
    /// again, and a newer connection that may have waited for this.
    ///
    /// Not while that connection has a turn, and not after its [end](Self::close).
    pub(crate) fn report(&mut self, key: Key, number: u64, outcome: Outcome) -> (bool, Option<C>) {
        let stream = self.streams.get_mut(&key.stream).expect("a stream with a connection is not forgotten");
        let mut ledger =
            stream.ledger.take().expect("no connection has a turn while the handler of another is at work");
        let mut again = false;
        match outcome {
            Outcome::Finished => ledger.finish(number),
            Outcome::Refused(rejection) => ledger.reject(number, rejection),
            Outcome::Failed(why) => again = ledger.fail(number, &why) == Verdict::TryAgain,
        }
        stream.take_in(ledger);
        (again, stream.other(key.epoch))
    }

    /// The handler of a connection has panicked outside its turn: see [`Ledger::blame`].
    pub(crate) fn blame(&mut self, key: Key) {
        let Some(stream) = self.streams.get_mut(&key.stream) else { return };
        // If another connection has the turn, nothing is in hand here.
        if let Some(mut ledger) = stream.ledger.take() {
            ledger.blame(key.epoch);
            stream.take_in(ledger);
        }
    }

    /// A control frame came.
    ///
    /// # Errors
    ///
    /// If it has no place here.
    pub(crate) fn control(&mut self, receiving: &mut Receiving, control: Control) -> Result<Told, SessionError> {
        let Key { stream, epoch } = receiving.key;
        let Some(stream) = self.streams.get_mut(&stream).filter(|stream| stream.epoch == epoch) else {
            return Ok(Told::Nothing);
        };
        match control {
            Control::ConfirmReject(number) => {
                let last = stream.ledger.as_ref().map_or(u64::MAX, Ledger::highest);
                if number > last {
                    return Err(SessionError::NeverRejected { number, last });
                }
                stream.rejects.remove(&number);
                receiving.confirmed(number);
                Ok(Told::TryAgain)
            }
            Control::Ack(number) => Ok(Told::RepliesTaken(number)),
            Control::Skip(number) if !receiving.is_last => receiving.skip(number).map(|()| Told::Nothing),
            Control::Goodbye if !receiving.is_last => {
                // It will ask for nothing again: not for rejects, and not for what it gave up.
                receiving.is_last = true;
                receiving.owes_confirmation = true;
                stream.leaving = true;
                stream.rejects.clear();
                Ok(Told::Goodbye)
            }
            Control::ConfirmGoodbye if receiving.said_goodbye && !receiving.is_last => {
                receiving.is_last = true;
                Ok(Told::Goodbye)
            }
            Control::Heartbeat | Control::Ignorable(_) => Ok(Told::Nothing),
            control => {
                let when = if receiving.is_last { "after GOODBYE" } else { "in a session, from the side that dialled" };
                Err(SessionError::OutOfPlace { frame: control.name(), when })
            }
        }
    }

    /// Appends the control frames that are to be written now. They go before replies that are handed out after this.
    pub(crate) fn controls(&mut self, receiving: &mut Receiving, now: Instant, out: &mut Vec<u8>) {
        if receiving.is_over {
            return;
        }
        let Key { stream, epoch } = receiving.key;
        let framing = receiving.framing;
        let before = out.len();
        let Some(stream) = self.streams.get_mut(&stream).filter(|known| known.epoch == epoch) else {
            let known = self.streams.get(&stream).map_or(epoch, |stream| stream.epoch);
            let text = format!("a newer connection of this stream has epoch {known}");
            Control::Refuse(Refuse { code: RefuseCode::EPOCH, detail: known, text }).put(&framing, out);
            receiving.is_over = true;
            return;
        };
        for (number, reject) in stream.rejects.iter_mut().filter(|(_, reject)| reject.told < epoch) {
            Control::Reject(*number, reject.rejection.clone()).put(&framing, out);
            reject.told = epoch;
            receiving.tell(*number);
        }
        let is_idle = stream.ledger.as_ref().is_some_and(|ledger| ledger.open() == 0);
        let committed = stream.stand.committed;
        receiving.ack_at = receiving.ack_due(committed, is_idle, now);
        if receiving.ack_at.is_some_and(|at| at <= now) {
            Control::Ack(committed).put(&framing, out);
            receiving.acknowledge(committed);
            (receiving.acked_at, receiving.since_ack, receiving.ack_at) = (now, 0, None);
        }
        if std::mem::take(&mut receiving.owes_confirmation) {
            Control::ConfirmGoodbye.put(&framing, out);
        }
        if receiving.wants_goodbye && !receiving.said_goodbye {
            Control::Goodbye.put(&framing, out);
            receiving.said_goodbye = true;
        }
        if out.len() == before && receiving.liveness.is_due(now) {
            Control::Heartbeat.put(&framing, out);
        }
        if out.len() > before {
            receiving.liveness.spoke(now);
        }
    }

    /// A connection is gone, its turn is ended, and its handler is gone too: what that still had in hand must be handled
    /// again. Returns another connection that may have waited for that.
    pub(crate) fn close(&mut self, receiving: &Receiving) -> Option<C> {
        self.open -= 1;
        let Key { stream: id, epoch } = receiving.key;
        let stream = self.streams.get_mut(&id).expect("a stream with a connection is not forgotten");
        // If another one has the turn, nothing is in hand here: it would not have got it.
        if let Some(mut ledger) = stream.ledger.take() {
            ledger.abandon(epoch);
            stream.take_in(ledger);
        }
        stream.connections -= 1;
        if stream.epoch == epoch {
            stream.attached = None;
        }
        let other = stream.other(epoch);
        if stream.connections == 0 {
            self.detach(id);
        }
        other
    }

    fn detach(&mut self, id: StreamId) {
        let stream = self.streams.get_mut(&id).expect("it has just lost its connection");
        if stream.leaving {
            self.streams.remove(&id);
            return;
        }
        stream.place = self.detached.insert(id, stream.is_of_use(), stream.text());
        while let Some(id) = self.detached.one_too_many(self.most_detached)
            && let Some(stream) = self.streams.remove(&id)
        {
            self.detached.remove(stream.place, stream.text());
            self.forgotten += u64::from(stream.is_of_use());
        }
    }

    /// How many streams were forgotten, since this was last asked, though something is lost by that.
    pub(crate) fn take_forgotten(&mut self) -> u64 {
        std::mem::take(&mut self.forgotten)
    }
}

impl Detached {
    fn insert(&mut self, stream: StreamId, is_of_use: bool, text: usize) -> Place {
        self.count += 1;
        let place = (is_of_use, self.count);
        self.places.insert(place, stream);
        if text > 0 {
            self.text += text;
            self.with_text.insert(self.count, stream);
        }
        place
    }

    fn remove(&mut self, place: Place, text: usize) {
        if self.places.remove(&place).is_some() && self.with_text.remove(&place.1).is_some() {
            self.text -= text;
        }
    }

    /// Which stream is to be forgotten, if one is.
    fn one_too_many(&self, most: usize) -> Option<StreamId> {
        if self.places.len() > most {
            self.places.values().next().copied()
        } else if self.text > MOST_DETACHED_TEXT {
            self.with_text.values().next().copied()
        } else {
            None
        }
    }
}

impl<C: Clone> Stream<C> {
    /// The ledger is back, or has changed.
    fn take_in(&mut self, mut ledger: Ledger) {
        for (number, rejection) in ledger.rejected.drain(..) {
            if !self.leaving {
                self.rejects.insert(number, Reject { rejection, told: 0 });
            }
        }
        ledger.skip_to(self.first);
        let stand = Stand::of(&ledger);
        debug_assert!(stand.committed >= self.stand.committed, "what is finished stays finished");
        self.stand = stand;
        self.ledger = Some(ledger);
    }

    /// The stream's connection, if it is another one.
    fn other(&self, epoch: u64) -> Option<C> {
        self.attached.clone().filter(|_| self.epoch != epoch)
    }

    /// Whether anything would be lost if it were forgotten: all else its sender says again.
    fn is_of_use(&self) -> bool {
        let Some(ledger) = &self.ledger else { return true };
        ledger.highest() >= self.first || ledger.open() > 0 || !self.rejects.is_empty()
    }

    fn text(&self) -> usize {
        self.rejects.values().map(|reject| reject.rejection.text.len()).sum()
    }
}

/// A window that takes the largest message.
fn least_window(framing: &Framing) -> usize {
    framing.max_message_size() + framing.prefix_width(0)
}

impl Stand {
    fn of(ledger: &Ledger) -> Stand {
        Stand { dispatched: ledger.dispatched(), committed: ledger.committed() }
    }
}
