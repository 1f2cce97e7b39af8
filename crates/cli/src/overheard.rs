//! What passes through `tap`, read along: bytes of both directions in, lines out.
//!
//! Nothing in here touches a socket, and nothing that goes wrong in here changes a byte that passes. What cannot be
//! understood is told once, and the connection is then no longer read along. Until it is known what a connection speaks,
//! its first bytes are kept, and never more than [`MOST_KEPT`] and one read of them.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use buffstreams::{Direction, Dissected, Dissector, Framing};

use crate::guess::{Candidate, Guess, Heard, MOST_STOPS, Sureness, guess};
use crate::output::{Batch, Output};
use crate::report::Report;

/// Bytes over which a guess is made, at the most.
const MOST_KEPT: usize = 64 * 1024;

/// The first bytes after which a guess is tried; from there on whenever they have doubled.
const FIRST_LOOK: usize = 256;

/// How long a silence makes do with a guess that is likely; and how long with any.
const QUIET: Duration = Duration::from_millis(500);
const LONG_QUIET: Duration = Duration::from_secs(2);

/// The longest message that is shown, in bytes.
const LONGEST_SHOWN: usize = 16 << 20;

/// What a session begins with, but for its version.
const PREFACE: &[u8] = b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xffBUFFS";

/// What all connections of a tap have in common.
#[derive(Debug)]
pub(crate) struct Tap {
    /// `None` to guess it.
    pub(crate) framing: Option<Framing>,
    /// Whether control frames are shown too.
    pub(crate) shows_control: bool,
    pub(crate) target: String,
    pub(crate) output: Arc<Output>,
    pub(crate) report: Arc<Report>,
    pub(crate) known: Mutex<Known>,
}

/// What one connection has taught about the others, and what was said of it.
#[derive(Debug, Default)]
pub(crate) struct Known {
    /// A framing of which there was no doubt.
    framing: Option<Candidate>,
    said: Option<(Candidate, Sureness)>,
    has_said_tls: bool,
    has_said_session: bool,
}

impl Tap {
    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Says a guess, unless the last thing said was the same.
    fn say(&self, guess: &Guess) {
        let new = guess.best.map(|best| (best, guess.sureness));
        let mut known = self.known();
        if guess.sureness == Sureness::Sure {
            known.framing = guess.best;
        }
        if new.is_none() || known.said != new {
            known.said = new;
            drop(known);
            self.report.note(guess);
        }
    }
}

/// One connection, read along.
pub(crate) struct Overheard {
    tap: Arc<Tap>,
    peer: String,
    batch: Batch,
    state: State,
    has_ended: [bool; 2],
    was_guessed: bool,
}

enum State {
    /// It is not known yet what this is.
    Collecting(Backlog),
    Decoding(Box<Dissector>),
    /// Nothing is decoded any more.
    Passing,
}

/// What has come so far.
struct Backlog {
    bytes: [Vec<u8>; 2],
    stops: [Vec<usize>; 2],
    /// Whose bytes came, how many, in this order.
    order: Vec<(Direction, usize)>,
    /// With how many bytes a guess is tried next.
    next_look: usize,
    /// When the last came.
    last: Instant,
    silence: Silence,
    has_said_unknown: bool,
}

/// How long nothing has come, and so how good a guess must be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Silence {
    None,
    Quiet,
    LongQuiet,
    /// Nothing will ever come.
    Over,
}

fn side(direction: Direction) -> usize {
    match direction {
        Direction::There => 0,
        Direction::Back => 1,
    }
}

impl Overheard {
    pub(crate) fn new(tap: Arc<Tap>, peer: String, now: Instant) -> Overheard {
        let batch = Batch::new(Arc::clone(&tap.output));
        let backlog = Backlog {
            bytes: Default::default(),
            stops: Default::default(),
            order: Vec::new(),
            next_look: FIRST_LOOK,
            last: now,
            silence: Silence::None,
            has_said_unknown: false,
        };
        let state = State::Collecting(backlog);
        Overheard { tap, peer, batch, state, has_ended: [false; 2], was_guessed: false }
    }

    /// These bytes came. When it returns, what they complete is printed.
    pub(crate) fn heard(&mut self, direction: Direction, bytes: &[u8], now: Instant) {
        match &mut self.state {
            State::Passing => return,
            State::Decoding(_) => self.feed(direction, bytes),
            State::Collecting(backlog) => {
                backlog.bytes[side(direction)].extend_from_slice(bytes);
                match backlog.order.last_mut() {
                    Some((last, length)) if *last == direction => *length += bytes.len(),
                    _ => backlog.order.push((direction, bytes.len())),
                }
                (backlog.last, backlog.silence) = (now, Silence::None);
                self.consider();
            }
        }
        self.print();
    }

    /// There is nothing more to read in this direction, for the moment.
    pub(crate) fn stopped(&mut self, direction: Direction) {
        let State::Collecting(backlog) = &mut self.state else { return };
        let (here, stops) = (backlog.bytes[side(direction)].len(), &mut backlog.stops[side(direction)]);
        if here > 0 && stops.len() < MOST_STOPS && stops.last() != Some(&here) {
            stops.push(here);
        }
    }

    /// The direction has ended.
    pub(crate) fn ended(&mut self, direction: Direction) {
        self.has_ended[side(direction)] = true;
        match &mut self.state {
            State::Passing => return,
            State::Decoding(dissector) => {
                if let Err(error) = dissector.end(direction) {
                    self.tell(direction, &error);
                }
            }
            State::Collecting(backlog) => {
                if self.has_ended == [true; 2] {
                    backlog.silence = Silence::Over;
                }
                self.consider();
            }
        }
        self.print();
    }

    /// The connection is gone, in whatever way.
    pub(crate) fn over(&mut self) {
        if let State::Collecting(backlog) = &mut self.state {
            backlog.silence = Silence::Over;
            self.consider();
            self.print();
        }
    }

    /// When to call [`quiet`](Self::quiet) if nothing comes.
    pub(crate) fn quiet_at(&self) -> Option<Instant> {
        let State::Collecting(backlog) = &self.state else { return None };
        if backlog.order.is_empty() {
            return None;
        }
        match backlog.silence {
            Silence::None => Some(backlog.last + QUIET),
            Silence::Quiet => Some(backlog.last + LONG_QUIET),
            Silence::LongQuiet | Silence::Over => None,
        }
    }

    /// Nothing has come for a while.
    pub(crate) fn quiet(&mut self, now: Instant) {
        if self.quiet_at().is_none_or(|at| now < at) {
            return;
        }
        if let State::Collecting(backlog) = &mut self.state {
            backlog.silence = if backlog.silence == Silence::None { Silence::Quiet } else { Silence::LongQuiet };
        }
        self.consider();
        self.print();
    }

    /// Finds out what this is, as far as what has come allows.
    fn consider(&mut self) {
        let State::Collecting(backlog) = &mut self.state else { return };
        let there = &backlog.bytes[0];
        let total = there.len() + backlog.bytes[1].len();
        let may_wait = backlog.silence < Silence::LongQuiet;
        match is_tls(there) {
            Some(true) => return self.pass_tls(),
            None if may_wait && !there.is_empty() => return,
            _ => {}
        }
        if let Some(framing) = self.tap.framing {
            return self.decode(framing);
        }
        if there.starts_with(PREFACE) {
            if !std::mem::replace(&mut self.tap.known().has_said_session, true) {
                self.tap.report.note("framing: a session of BuffStreams (sure: it began with the preface)");
            }
            // What plain connections speak does not matter in it.
            return self.decode(Framing::default());
        }
        if may_wait && !there.is_empty() && PREFACE.starts_with(there) {
            return;
        }
        let known = self.tap.known().framing;
        if let Some(known) = known.filter(|known| backlog.bytes.iter().all(|bytes| known.may_be(bytes))) {
            self.was_guessed = true;
            return self.decode(known.framing());
        }
        let has_one_ended = self.has_ended.contains(&true);
        if backlog.silence == Silence::None && !has_one_ended && total < backlog.next_look {
            return;
        }
        backlog.next_look = 2 * total;
        let heard = [0, 1].map(|side| Heard {
            bytes: &backlog.bytes[side],
            stops: &backlog.stops[side],
            has_ended: self.has_ended[side],
        });
        let guess = guess(heard);
        let enough = match backlog.silence {
            _ if total >= MOST_KEPT => Sureness::Perhaps,
            Silence::None if !has_one_ended => Sureness::Sure,
            Silence::None | Silence::Quiet => Sureness::Likely,
            Silence::LongQuiet | Silence::Over => Sureness::Perhaps,
        };
        match guess.best {
            Some(best) if guess.sureness >= enough => {
                self.tap.say(&guess);
                self.was_guessed = true;
                self.decode(best.framing());
            }
            None if total >= MOST_KEPT || backlog.silence == Silence::Over && total > 0 => {
                self.tap.say(&guess);
                self.state = State::Passing;
            }
            None if backlog.silence == Silence::LongQuiet && !backlog.has_said_unknown => {
                backlog.has_said_unknown = true;
                self.tap
                    .report
                    .note(format_args!("framing unknown after {total} bytes, more may tell; or say --framing NAME"));
            }
            _ => {}
        }
    }

    fn pass_tls(&mut self) {
        self.state = State::Passing;
        if !std::mem::replace(&mut self.tap.known().has_said_tls, true) {
            self.tap.report.note(format_args!("TLS from {}: it is passed through, and cannot be decoded", self.peer));
        }
    }

    /// From here on it is known what this is.
    fn decode(&mut self, framing: Framing) {
        let dissector = Box::new(Dissector::new(framing, LONGEST_SHOWN));
        let State::Collecting(backlog) = std::mem::replace(&mut self.state, State::Decoding(dissector)) else { return };
        let mut at = [0; 2];
        for (direction, length) in backlog.order {
            let side = side(direction);
            self.feed(direction, &backlog.bytes[side][at[side]..][..length]);
            at[side] += length;
        }
        for direction in [Direction::There, Direction::Back] {
            if self.has_ended[side(direction)] {
                self.ended(direction);
            }
        }
    }

    fn feed(&mut self, direction: Direction, bytes: &[u8]) {
        let Overheard { tap, peer, batch, state: State::Decoding(dissector), .. } = self else { return };
        let (lead, control, from) = match direction {
            Direction::There => ("> ", ">*", &*peer),
            Direction::Back => ("< ", "<*", &tap.target),
        };
        let fed = dissector.feed(direction, bytes, |found| match found {
            // Without a count there is a place for each.
            Dissected::Message { bytes, .. } => {
                batch.add_led(lead, bytes, from);
            }
            Dissected::LongMessage { length, .. } => tap.report.error(format_args!(
                "a message of {length} bytes from {from} was passed through and not shown; the most is {LONGEST_SHOWN}"
            )),
            Dissected::Control(frame) if tap.shows_control => batch.add_line(format_args!("{control} {frame}")),
            Dissected::Preface if tap.shows_control => batch.add_line(format_args!("{control} PREFACE")),
            _ => {}
        });
        if let Err(error) = fed {
            self.tell(direction, &error);
        }
    }

    fn tell(&self, direction: Direction, error: &dyn std::fmt::Display) {
        let way = match direction {
            Direction::There => "to the target",
            Direction::Back => "back from the target",
        };
        let advice =
            if self.was_guessed { "; the framing was guessed: say --framing NAME if it is another" } else { "" };
        let peer = &self.peer;
        self.tap.report.error(format_args!(
            "connection from {peer}: what goes {way} cannot be decoded any further, and is passed through: {error}{advice}"
        ));
        // It may be another one after all.
        self.tap.known().framing = None;
    }

    fn print(&mut self) {
        // If that failed, the program is about to end, and says why.
        drop(self.batch.end());
    }
}

/// Whether these bytes begin the first record of a TLS client; `None` if there are too few to tell.
fn is_tls(bytes: &[u8]) -> Option<bool> {
    // The kind of record, a version that no client leaves, a length that no record exceeds, and ClientHello.
    let is_well =
        [|byte| byte == 22, |byte| byte == 3, |byte| byte <= 4, |byte| byte <= 0x40, |_| true, |byte: u8| byte == 1];
    if !bytes.iter().zip(is_well).all(|(byte, is_well)| is_well(*byte)) {
        return Some(false);
    }
    // It says its length twice, and an old version for old servers: messages that begin like this are no accident.
    let &[_, _, _, r1, r0, _, h2, h1, h0, 3, 3, ..] = bytes else {
        return (bytes.len() >= 11).then_some(false);
    };
    Some(u32::from_be_bytes([0, 0, r1, r0]) == u32::from_be_bytes([0, h2, h1, h0]) + 4)
}

#[cfg(test)]
mod tests {
    use super::is_tls;

    #[test]
    fn a_client_hello_is_known_by_its_first_bytes_and_nothing_else_is_one() {
        let hello = [22, 3, 1, 2, 0, 1, 0, 1, 252, 3, 3];
        for length in 0..=hello.len() {
            assert_eq!(is_tls(&hello[..length]), (length >= 11).then_some(true));
        }
        for (at, byte) in [(0, 23), (1, 2), (2, 5), (3, 0x41), (4, 1), (5, 2), (8, 253), (9, 2), (10, 4)] {
            let mut other = hello;
            other[at] = byte;
            assert_eq!(is_tls(&other), Some(false), "{byte} at {at}");
            if [0, 1, 2, 3, 5].contains(&at) {
                assert_eq!(is_tls(&other[..=at]), Some(false), "{byte} at {at}, at once");
            }
        }
    }
}
