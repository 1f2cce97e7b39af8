//! Accepted messages become chunks to write; every one of them ends as settled or as failed.
//!
//! Messages are encoded into the open chunk at the tail. The writer takes what is there, chunk by chunk, and reports
//! how many bytes the kernel took. When a connection breaks, the Outbox rewinds to the first frame that is not settled;
//! only then is a chunk walked frame by frame. A frame begun on one connection is never continued on another.
//!
//! In a session, written chunks are kept until they are acknowledged: that half of the Outbox is in `flight.rs`.
//!
//! Invariant, checked by [`Outbox::tally`]: `recovered + accepted = settled + failed + in flight`, at every moment.

use std::collections::VecDeque;
use std::ops::Range;
use std::time::{Duration, Instant};

use bytes::Bytes;

use super::buffers::{self, CHUNK};
use super::chunk::Chunk;
use super::flight::Flight;
use super::framing::Framing;

/// From this many bytes on a message that is given as `Bytes` is not copied into a chunk.
const LARGE_MESSAGE: usize = 32 * 1024;

/// A prefix is stored as eight bytes and then cut, so a chunk needs that much room behind its last frame.
const PREFIX_STORE: usize = 8;

/// How many separate runs of failed messages are remembered for receipts.
const REMEMBERED_RUNS: usize = 1024;

/// Why a message was given up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum FailedReason {
    /// The peer stayed away for longer, or for more attempts, than the retry policy allows.
    RetryExhausted,
    /// The connection was lost, and cannot be dialled again: a listener accepted it, or the user brought its stream.
    Disconnected,
    /// The message's expiry passed before any of it was written.
    Expired,
    /// Newer messages needed its room, and the overflow policy is to fail the oldest.
    Overflow,
    /// The connection was closed, and its deadline passed before the message was settled.
    Closed,
    /// The receiver refused the acknowledged stream that the message was for.
    Refused,
    /// In a session: the message was given up after it was written, and before it was acknowledged. It may have been
    /// handled.
    OutcomeUnknown,
    /// In a session: the receiver's handler refused the message, or failed three times over it. The failed message's
    /// [`rejection`](FailedMessage::rejection) says why.
    Rejected,
}

impl FailedReason {
    /// Every reason.
    pub const ALL: &'static [FailedReason] = &[
        FailedReason::RetryExhausted,
        FailedReason::Disconnected,
        FailedReason::Expired,
        FailedReason::Overflow,
        FailedReason::Closed,
        FailedReason::Refused,
        FailedReason::OutcomeUnknown,
        FailedReason::Rejected,
    ];

    /// What metrics call it, such as `retry_exhausted`.
    pub fn name(self) -> &'static str {
        match self {
            FailedReason::RetryExhausted => "retry_exhausted",
            FailedReason::Disconnected => "disconnected",
            FailedReason::Expired => "expired",
            FailedReason::Overflow => "overflow",
            FailedReason::Closed => "closed",
            FailedReason::Refused => "refused",
            FailedReason::OutcomeUnknown => "outcome_unknown",
            FailedReason::Rejected => "rejected",
        }
    }
}

/// How many messages have failed for each [reason](FailedReason::ALL).
pub(crate) type FailedFor = [u64; FailedReason::ALL.len()];

impl std::fmt::Display for FailedReason {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            FailedReason::RetryExhausted => "the peer stayed away for longer than the retry policy allows",
            FailedReason::Disconnected => "the connection was lost",
            FailedReason::Expired => "it expired before it could be written",
            FailedReason::Overflow => "newer messages needed its room",
            FailedReason::Closed => "the connection was closed before it could be written",
            FailedReason::Refused => "the receiver refused the acknowledged stream",
            FailedReason::OutcomeUnknown => "it was written and not acknowledged, so it may have been handled",
            FailedReason::Rejected => "the receiver's handler refused it",
        })
    }
}

/// What a receiver's handler said of a message that it refused.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct Rejection {
    /// The handler's own code; 0 if it gave none, and failed three times.
    pub code: u32,
    /// For people; at most 256 bytes.
    pub text: String,
}

/// A message that was accepted and then given up, back with its owner.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct FailedMessage {
    /// Its number on the connection, the one in its receipt.
    pub number: u64,
    /// Its bytes, without a prefix.
    pub message: Bytes,
    /// Why it was given up.
    pub reason: FailedReason,
    /// What the receiver's handler said, if the reason is [`FailedReason::Rejected`].
    pub rejection: Option<Rejection>,
    /// How many connections were tried, and failed or broke, while it was in hand.
    pub attempts: u32,
    /// How long it was in hand, counted from when the chunk that it rode in was begun: up to the time that chunk stayed
    /// open (usually microseconds) more than the truth.
    pub age: Duration,
}

/// The state of the conservation law, read at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Tally {
    pub(crate) recovered: u64,
    pub(crate) accepted: u64,
    pub(crate) settled: u64,
    pub(crate) failed: u64,
    pub(crate) failed_for: FailedFor,
    pub(crate) in_flight: u64,
    pub(crate) in_flight_bytes: usize,
}

/// Why a message was not accepted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Refusal {
    /// Over the maximum message size.
    TooLarge,
    /// No room until something is settled or given up.
    Full,
}

/// What became of one message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fate {
    InFlight,
    Settled,
    Failed,
    /// Its run of failures was forgotten: it may have failed, or been settled among failed ones.
    Forgotten,
}

/// The chunk that messages are being encoded into.
#[derive(Debug)]
struct Tail {
    frames: Vec<u8>,
    count: u64,
    begun: Option<Instant>,
    expires: Option<Instant>,
}

/// A frame being encoded by the user's code: cut off again if that panics.
struct Begun<'a> {
    frames: &'a mut Vec<u8>,
    start: usize,
}

impl Drop for Begun<'_> {
    fn drop(&mut self) {
        self.frames.truncate(self.start);
    }
}

/// Messages given up, and not yet taken by their owner.
#[derive(Debug)]
struct Failed {
    chunk: Chunk,
    reason: FailedReason,
    rejection: Option<Rejection>,
    at: Instant,
}

/// The sending side of one connection, without its socket.
#[derive(Debug)]
pub(crate) struct Outbox {
    pub(super) framing: Framing,
    limit: usize,
    /// Closed chunks, oldest first; those before `handed` were given to the writer.
    pub(super) chunks: VecDeque<Chunk>,
    pub(super) handed: usize,
    tail: Tail,
    failed: VecDeque<Failed>,
    /// Bytes of frames in `chunks` and `tail`.
    pub(super) bytes: usize,
    /// Bytes of memory in `failed`.
    failed_bytes: usize,
    /// Bytes of room promised to messages that are still to come.
    reserved: usize,
    /// The number of the next message. So many were accepted, unless they come from a spool.
    pub(super) accepted: u64,
    pub(super) settled_count: u64,
    /// `None` as long as none has: most connections never need it.
    failed_for: Option<Box<FailedFor>>,
    /// What is known beside of chunks that are kept until they are acknowledged; `None` if nothing is.
    pub(super) flight: Option<Box<Flight>>,
    /// Runs of failed numbers, ascending; `forgotten` failures lie before number `known_from`.
    runs: VecDeque<Range<u64>>,
    forgotten: u64,
    known_from: u64,
}

impl Outbox {
    /// An empty Outbox that holds at most `limit` bytes of frames, or one message if that is larger.
    pub(crate) fn new(framing: Framing, limit: usize) -> Outbox {
        Outbox {
            framing,
            limit,
            chunks: VecDeque::new(),
            handed: 0,
            tail: Tail { frames: Vec::new(), count: 0, begun: None, expires: None },
            failed: VecDeque::new(),
            bytes: 0,
            failed_bytes: 0,
            reserved: 0,
            accepted: 0,
            settled_count: 0,
            failed_for: None,
            flight: None,
            runs: VecDeque::new(),
            forgotten: 0,
            known_from: 0,
        }
    }

    /// Whether a message of this length would be taken now, with `beside` bytes of the room left for somebody else.
    #[inline]
    pub(crate) fn admits(&self, length: usize, beside: usize) -> Result<(), Refusal> {
        if self.framing.check(length).is_err() {
            return Err(Refusal::TooLarge);
        }
        let taken = self.bytes() + beside;
        if taken != 0 && taken + self.frame_size(length) > self.limit {
            return Err(Refusal::Full);
        }
        Ok(())
    }

    #[inline]
    fn frame_size(&self, length: usize) -> usize {
        self.framing.prefix_width(length) + length
    }

    /// Promises room for a message of this length, which is [admitted](Self::admits).
    pub(crate) fn reserve(&mut self, length: usize) {
        self.reserved += self.frame_size(length);
    }

    /// Takes the promise back.
    pub(crate) fn unreserve(&mut self, length: usize) {
        self.reserved -= self.frame_size(length);
    }

    /// Takes charge of a message that is [admitted](Self::admits), by copy. Returns its number.
    #[inline]
    pub(crate) fn push(&mut self, message: &[u8], expires: Option<Instant>, now: impl FnOnce() -> Instant) -> u64 {
        let frame = self.frame_size(message.len());
        self.open(frame, expires, now);
        self.framing.put_prefix(message.len(), &mut self.tail.frames);
        self.tail.frames.extend_from_slice(message);
        self.count_in(frame)
    }

    /// The same for a message that `encode` appends; exactly `length` bytes.
    ///
    /// # Panics
    ///
    /// If `encode` panics or appends another number of bytes. The message is then not accepted.
    pub(crate) fn push_with(
        &mut self,
        length: usize,
        expires: Option<Instant>,
        now: impl FnOnce() -> Instant,
        encode: impl FnOnce(&mut Vec<u8>),
    ) -> u64 {
        let frame = self.frame_size(length);
        self.open(frame, expires, now);
        let start = self.tail.frames.len();
        self.framing.put_prefix(length, &mut self.tail.frames);
        let mut begun = Begun { frames: &mut self.tail.frames, start };
        encode(begun.frames);
        let encoded = begun.frames.len() - begun.start;
        assert_eq!(encoded, frame, "a message must be encoded to the length it announced");
        begun.start = begun.frames.len();
        drop(begun);
        self.count_in(frame)
    }

    /// Takes charge of a message that is [admitted](Self::admits); a large one without a copy. Returns its number.
    pub(crate) fn push_bytes(
        &mut self,
        message: Bytes,
        expires: Option<Instant>,
        now: impl FnOnce() -> Instant,
    ) -> u64 {
        if message.len() < LARGE_MESSAGE {
            return self.push(&message, expires, now);
        }
        let prefix = self.framing.prefix_width(message.len());
        self.open(prefix, expires, now);
        self.framing.put_prefix(message.len(), &mut self.tail.frames);
        let number = self.count_in(prefix + message.len());
        self.seal_to_keep(message);
        number
    }

    /// How many bytes of frames that do not expire are [admitted](Self::admits) as things are, and go into the open chunk.
    pub(crate) fn lane(&self) -> usize {
        if self.tail.count == 0 || self.tail.expires.is_some() {
            return 0;
        }
        let memory = self.limit.saturating_sub(self.bytes());
        memory.min(CHUNK.saturating_sub(self.tail.frames.len() + PREFIX_STORE))
    }

    /// [`push`](Self::push) for a message that fits into the [lane](Self::lane).
    #[inline]
    pub(crate) fn push_in_lane(&mut self, message: &[u8]) -> u64 {
        let start = self.tail.frames.len();
        self.framing.put_prefix(message.len(), &mut self.tail.frames);
        self.tail.frames.extend_from_slice(message);
        self.count_in(self.tail.frames.len() - start)
    }

    #[inline]
    fn count_in(&mut self, frame: usize) -> u64 {
        self.tail.count += 1;
        self.bytes += frame;
        self.accepted += 1;
        self.accepted - 1
    }

    /// Makes the tail chunk fit for `more` bytes that expire then.
    #[inline]
    fn open(&mut self, more: usize, expires: Option<Instant>, now: impl FnOnce() -> Instant) {
        let fits = self.tail.frames.len() + more + PREFIX_STORE <= CHUNK && self.tail.expires == expires;
        if self.tail.count == 0 || !fits {
            self.open_another(more, expires, now());
        }
    }

    #[cold]
    fn open_another(&mut self, more: usize, expires: Option<Instant>, now: Instant) {
        self.seal_to_keep(Bytes::new());
        if self.tail.frames.capacity() == 0 {
            let fresh = || Vec::with_capacity((more + PREFIX_STORE).max(buffers::LEAST));
            self.tail.frames = buffers::take().unwrap_or_else(fresh);
        }
        self.tail.begun = Some(now);
        self.tail.expires = expires;
    }

    /// Closes the tail chunk, which may have to be kept for long: so it must not waste its buffer.
    fn seal_to_keep(&mut self, payload: Bytes) {
        self.tail.frames = buffers::fit(std::mem::take(&mut self.tail.frames));
        self.seal(payload);
    }

    /// Closes the tail chunk. `payload` is the message of its last frame, if that is not in the chunk itself.
    fn seal(&mut self, payload: Bytes) {
        if self.tail.count == 0 {
            return;
        }
        let frames = std::mem::take(&mut self.tail.frames);
        let count = std::mem::take(&mut self.tail.count);
        let is_spooled = self.is_spooled();
        self.chunks.push_back(Chunk {
            frames: Bytes::from(frames),
            payload,
            first: self.accepted - count,
            count,
            begun: self.tail.begun.take().expect("a chunk with messages was begun at some time"),
            expires: self.tail.expires.take(),
            attempts: 0,
            written: 0,
            touched: false,
            session: if is_spooled { self.accepted - count } else { 0 },
            at: None,
        });
    }

    /// Whether messages are in the tail, and not in a chunk yet.
    pub(super) fn has_tail(&self) -> bool {
        self.tail.count > 0
    }

    pub(super) fn tail_count(&self) -> u64 {
        self.tail.count
    }

    /// Closes the tail chunk, and opens none.
    pub(super) fn close_tail(&mut self) {
        self.seal_to_keep(Bytes::new());
    }

    /// Gives the writer what is to be written next, up to about `most` bytes, in order, and remembers that it has it.
    pub(crate) fn hand(&mut self, most: usize, into: &mut VecDeque<Bytes>) {
        if self.flight.is_some() {
            return self.hand_in_session(most, into);
        }
        let mut total = 0;
        while total < most {
            if self.handed == self.chunks.len() {
                self.seal(Bytes::new());
            }
            let Some(chunk) = self.chunks.get_mut(self.handed) else { return };
            debug_assert_eq!(chunk.written, 0, "a chunk begins on the connection that it ends on");
            total += chunk.len();
            into.push_back(chunk.frames.clone());
            if !chunk.payload.is_empty() {
                into.push_back(chunk.payload.clone());
            }
            self.handed += 1;
        }
    }

    /// The kernel took the next `bytes` of what was handed out; the writer has let go of buffers that are done.
    /// Returns whether anything was settled by that.
    pub(crate) fn wrote(&mut self, mut bytes: usize) -> bool {
        if self.flight.is_some() {
            return self.wrote_in_session(bytes);
        }
        let before = self.settled_count;
        while bytes > 0 {
            let chunk = self.chunks.front_mut().expect("only what was handed out can have been written");
            let step = bytes.min(chunk.len() - chunk.written);
            chunk.written += step;
            bytes -= step;
            if chunk.written == chunk.len() {
                debug_assert!(self.handed > 0);
                self.handed -= 1;
                let chunk = self.chunks.pop_front().expect("it is the front");
                self.bytes -= chunk.len();
                self.settled_count += chunk.count;
                keep_buffer(chunk.frames);
            }
        }
        self.settled_count != before
    }

    /// Gives the memory of unused queues back.
    pub(crate) fn release(&mut self) {
        if self.tail.count == 0 {
            self.tail.frames = Vec::new();
        }
        if self.chunks.is_empty() {
            self.chunks = VecDeque::new();
        }
    }

    /// The connection broke: goes back to the first frame that is not settled. Returns whether anything turned out to
    /// be settled.
    pub(crate) fn rewind(&mut self) -> bool {
        if self.flight.is_some() {
            return self.rewind_in_session();
        }
        // The last chunk that was handed out may fill little of its buffer, and is kept from here on.
        if let Some(last) = self.handed.checked_sub(1).and_then(|last| self.chunks.get_mut(last)) {
            last.frames = Bytes::from(buffers::fit(Vec::from(std::mem::take(&mut last.frames))));
        }
        self.handed = 0;
        let before = self.settled_count;
        if let Some(mut chunk) = self.chunks.pop_front() {
            let mut written = std::mem::take(&mut chunk.written);
            while let Some(header) = chunk.first_frame(&self.framing).filter(|header| header.frame() <= written) {
                written -= header.frame();
                self.bytes -= header.frame();
                self.settled_count += 1;
                chunk.pop(&self.framing);
            }
            // Only the torn frame was begun: what lies behind it may still expire, or make room.
            let torn = (written > 0).then(|| Chunk { touched: true, ..chunk.split_first(&self.framing) });
            if chunk.count > 0 {
                self.chunks.push_front(chunk);
            }
            if let Some(torn) = torn {
                self.chunks.push_front(torn);
            }
        }
        self.settled_count != before
    }

    /// A connection was tried, and failed or broke: counts it for everything in hand.
    pub(crate) fn note_attempt(&mut self) {
        self.seal_to_keep(Bytes::new());
        for chunk in &mut self.chunks {
            chunk.attempts = chunk.attempts.saturating_add(1);
        }
    }

    /// Gives up everything that is in flight. In a session, what was begun to be written may have arrived. Behind a spool nothing is given up: it stays on disk.
    pub(crate) fn fail_all(&mut self, reason: FailedReason, now: Instant) {
        let in_session = self.flight.is_some();
        if in_session {
            self.rewind_in_session();
        }
        if self.is_spooled() {
            return;
        }
        self.seal_to_keep(Bytes::new());
        self.handed = 0;
        while let Some(chunk) = self.chunks.pop_front() {
            let is_unknown = in_session && chunk.touched;
            self.fail(chunk, if is_unknown { FailedReason::OutcomeUnknown } else { reason }, now);
        }
    }

    /// Gives up what has expired and was never written. Returns when the next message expires.
    pub(crate) fn expire(&mut self, now: Instant) -> Option<Instant> {
        if self.tail.expires.is_some_and(|expires| expires <= now) {
            self.seal_to_keep(Bytes::new());
        }
        let mut index = self.handed;
        let mut next = if self.tail.count > 0 { self.tail.expires } else { None };
        while let Some(chunk) = self.chunks.get(index) {
            match chunk.expires {
                Some(expires) if expires <= now && !chunk.touched => {
                    let chunk = self.chunks.remove(index).expect("it was just looked at");
                    self.fail(chunk, FailedReason::Expired, now);
                }
                Some(expires) if expires > now => {
                    next = Some(next.map_or(expires, |next| next.min(expires)));
                    index += 1;
                }
                _ => index += 1,
            }
        }
        next
    }

    /// Gives up the oldest messages that were never written until there is room for one of `length` bytes. Whether
    /// there is: not if all that is left was begun to be written, or if nobody takes the failed messages.
    pub(crate) fn fail_oldest_for(&mut self, length: usize, now: Instant) -> bool {
        let frame = self.frame_size(length);
        while self.kept() != 0 && self.kept() + frame > self.limit {
            let mut index = self.handed;
            while self.chunks.get(index).is_some_and(|chunk| chunk.touched) {
                index += 1;
            }
            if index == self.chunks.len() {
                self.seal_to_keep(Bytes::new());
            }
            if self.failed_bytes >= self.limit || index == self.chunks.len() {
                return false;
            }
            let chunk = &mut self.chunks[index];
            let oldest = chunk.split_first(&self.framing);
            if chunk.count == 0 {
                self.chunks.remove(index);
            }
            self.fail(oldest, FailedReason::Overflow, now);
        }
        true
    }

    fn fail(&mut self, chunk: Chunk, reason: FailedReason, now: Instant) {
        self.fail_as(chunk, reason, None, now);
    }

    pub(super) fn fail_as(&mut self, chunk: Chunk, reason: FailedReason, rejection: Option<Rejection>, at: Instant) {
        self.bytes -= chunk.len();
        let failed = Failed { chunk, reason, rejection, at };
        self.failed_bytes += failed.chunk.len() + failed.overhead();
        self.failed_for.get_or_insert_default()[reason as usize] += failed.chunk.count;
        self.remember(failed.chunk.numbers());
        self.failed.push_back(failed);
    }

    fn remember(&mut self, run: Range<u64>) {
        let index = self.runs.partition_point(|known| known.start < run.start);
        self.runs.insert(index, run);
        if index + 1 < self.runs.len() && self.runs[index].end == self.runs[index + 1].start {
            self.runs[index].end = self.runs[index + 1].end;
            self.runs.remove(index + 1);
        }
        if index > 0 && self.runs[index - 1].end == self.runs[index].start {
            self.runs[index - 1].end = self.runs[index].end;
            self.runs.remove(index);
        }
        if self.runs.len() > REMEMBERED_RUNS {
            let oldest = self.runs.pop_front().expect("there are many");
            self.forgotten += oldest.end - oldest.start;
            self.known_from = self.known_from.max(oldest.end);
        }
    }

    /// The lowest number of the failed messages that wait for their owner.
    pub(super) fn lowest_failed(&self) -> Option<u64> {
        self.failed.iter().map(|failed| failed.chunk.first).min()
    }

    /// The next failed message for its owner. Its bytes no longer count from here on.
    pub(crate) fn take_failed(&mut self) -> Option<FailedMessage> {
        let failed = self.failed.front_mut()?;
        let Failed { chunk, reason, at, .. } = failed;
        let (attempts, age, reason) = (chunk.attempts, at.saturating_duration_since(chunk.begun), *reason);
        let (number, message, frame) = chunk.pop(&self.framing)?;
        self.failed_bytes -= frame;
        let mut rejection = None;
        if chunk.count == 0 {
            // A rejected message has a chunk of its own.
            self.failed_bytes -= failed.overhead();
            rejection = self.failed.pop_front().and_then(|failed| failed.rejection);
        }
        Some(FailedMessage { number, message, reason, rejection, attempts, age })
    }

    /// Whether failed messages wait for their owner.
    pub(crate) fn has_failed(&self) -> bool {
        !self.failed.is_empty()
    }

    /// Bytes of memory that messages take: those in flight, those failed and not yet taken, and promised room.
    #[inline]
    pub(crate) fn bytes(&self) -> usize {
        self.kept() + self.failed_bytes
    }

    /// The same without those that failed.
    #[inline]
    fn kept(&self) -> usize {
        self.bytes + self.chunks.len() * size_of::<Chunk>() + self.reserved
    }

    /// Bytes of the frames in flight.
    pub(crate) fn in_flight_bytes(&self) -> usize {
        self.bytes
    }

    /// How messages are framed.
    pub(crate) fn framing(&self) -> Framing {
        self.framing
    }

    /// Bytes of the largest message.
    #[inline]
    pub(crate) fn max_message_size(&self) -> usize {
        self.framing.max_message_size()
    }

    /// Bytes that it may hold.
    pub(crate) fn limit(&self) -> usize {
        self.limit
    }

    /// The number that the next message will get.
    pub(crate) fn next_number(&self) -> u64 {
        self.accepted
    }

    /// When the oldest message in the queue was accepted, or came from disk; about so, as for [`FailedMessage::age`].
    pub(crate) fn begun(&self) -> Option<Instant> {
        self.chunks.front().map(|chunk| chunk.begun).or(self.tail.begun)
    }

    /// All messages before this number are settled or failed.
    pub(crate) fn resolved_to(&self) -> u64 {
        self.chunks.front().map_or(self.accepted - self.tail.count, |chunk| chunk.first)
    }

    /// What became of the message with this number.
    pub(crate) fn fate(&self, number: u64) -> Fate {
        if number >= self.end() {
            // No message of this Outbox: nothing is known of it, or ever will be by waiting.
            Fate::Forgotten
        } else if self.runs.iter().any(|run| run.contains(&number)) {
            Fate::Failed
        } else if number >= self.resolved_to() {
            // Unsettled ones are consecutive but for those that failed.
            Fate::InFlight
        } else if number < self.known_from {
            Fate::Forgotten
        } else {
            Fate::Settled
        }
    }

    /// How many messages with numbers below this one have failed. Where failures were forgotten that lie behind it,
    /// this may be more than there were.
    pub(crate) fn failed_before(&self, number: u64) -> u64 {
        let remembered = self.runs.iter().map(|run| run.end.min(number).saturating_sub(run.start)).sum::<u64>();
        number.min(self.forgotten + remembered)
    }

    /// Counters and queue, read together. What is in flight is counted from the queue itself.
    pub(crate) fn tally(&self) -> Tally {
        let failed_for = self.failed_for.as_deref().copied().unwrap_or_default();
        self.account_spooled(Tally {
            recovered: 0,
            accepted: self.accepted,
            settled: self.settled_count,
            failed: failed_for.iter().sum(),
            failed_for,
            in_flight: self.chunks.iter().map(|chunk| chunk.count).sum::<u64>() + self.tail.count,
            in_flight_bytes: self.bytes,
        })
    }
}

impl Failed {
    /// Bytes of memory that it takes beside its frames.
    fn overhead(&self) -> usize {
        size_of::<Chunk>() + self.rejection.as_ref().map_or(0, |rejection| rejection.text.len())
    }
}

/// A chunk's buffer that nobody else holds is used again.
pub(super) fn keep_buffer(frames: Bytes) {
    if let Ok(mut buffer) = frames.try_into_mut() {
        buffer.clear();
        buffers::give(Vec::from(buffer));
    }
}

#[cfg(test)]
#[path = "outbox_tests.rs"]
mod tests;
