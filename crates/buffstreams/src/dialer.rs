//! Keeps a Connection's socket open: connect, back off, rewind, go on. One task for each connection. Where there is more
//! than one place to dial, `route.rs` says which is next; here is when.
//!
//! Whatever happens to sockets, every accepted message stays in the Outbox until it is settled or given up; and what is
//! given up is handed to its owner before the task ends.

use std::future::{Future, pending, poll_fn};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::Poll;
use std::time::Duration;

use tokio::sync::{oneshot, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until};
use tracing::Instrument as _;

use crate::events::Event;
use crate::failed::FailedTo;
use crate::handler::{Ended, Peer, Service};
use crate::log::Throttle;
use crate::metrics::Meter;
use crate::proto::outbox::FailedReason;
use crate::proto::session::sending::StateLost;
use crate::reader::Demands;
use crate::retry::{Backoff, Delays, Outage, Retry};
use crate::route::{Connected, Endpoint, Route, Target};
use crate::sender::Sender;
use crate::shared_outbox::{Phase, SharedOutbox, deadline_in};
use crate::socket::Socket;
use crate::stats::Stats;
use crate::transport::Address;

/// How often, at most, it is looked at whether messages are stalled, and told that some have failed.
const STALL_GRAIN: Duration = Duration::from_millis(100);

/// Why a connection ended that its user closed.
const CLOSED: &str = "it was closed";

/// Where a connection stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum State {
    /// An attempt is under way.
    Connecting,
    /// There is a socket.
    Connected,
    /// There is none; another attempt will be made.
    Disconnected,
    /// It was closed, or has given up. This is the last state.
    Closed,
}

/// The task behind a dialled connection.
pub(crate) struct Dialer<S> {
    /// `None` if the stream was brought by the user and cannot be had again.
    pub(crate) target: Option<Target>,
    pub(crate) retry: Retry,
    pub(crate) backoff: Backoff,
    pub(crate) service: Arc<S>,
    pub(crate) demands: Arc<Demands>,
    pub(crate) outbox: Arc<SharedOutbox>,
    pub(crate) failed_to: FailedTo,
    pub(crate) state: watch::Sender<State>,
    /// Without progress for so long, messages in flight are called stalled.
    pub(crate) stall_after: Duration,
    /// Why the peer refused the acknowledged stream; `None` once it has granted it.
    pub(crate) refusal: Arc<Mutex<Option<String>>>,
    /// Who waits for the first socket to be of use.
    pub(crate) answer: Mutex<Option<Answer>>,
    /// What was told of failed messages.
    pub(crate) told: Mutex<ToldFailures>,
    /// `None` once its numbers are final.
    pub(crate) meter: Mutex<Option<Meter>>,
}

/// How many failed messages were told of, and when last.
#[derive(Debug, Default)]
pub(crate) struct ToldFailures {
    stats: Stats,
    at: Option<Instant>,
}

/// Hears how the first round of attempts went: of use, or why not.
pub(crate) type Answer = oneshot::Sender<Result<(), String>>;

/// Why a socket is no longer used.
enum Parted {
    /// All is done.
    Finished,
    /// It broke. An acknowledged stream may not have been granted on it: then it was of no use.
    Lost { was_of_use: bool },
    /// Another was asked for.
    Reopened,
    /// The peer refuses to speak, and will not think better of it.
    Refused,
}

impl<S: Service> Dialer<S> {
    /// Runs until the connection is closed or has given up.
    pub(crate) async fn run(self, first: Option<Connected>) {
        self.outbox.note_away(first.is_none());
        // If the runtime drops this task, what is in hand still goes to its owner.
        let last_will = LastWill(&self);
        let failed_log = Throttle::default();
        let why = tokio::select! {
            why = self.keep_open(first) => why,
            () = self.closing_deadline_passed() => CLOSED,
            never = self.do_chores(&failed_log) => never,
        };
        last_will.end(why, &failed_log);
        self.failed_to.hand_over(&self.outbox, &failed_log).await;
        std::mem::forget(last_will);
    }

    /// Uses one socket after the other. Returns why there is no next.
    async fn keep_open(&self, first: Option<Connected>) -> &'static str {
        let mut delays = Delays::new(self.backoff, fastrand::Rng::new());
        let mut outage = Outage::begin(std::time::Instant::now());
        let mut at_once = true;
        let mut route = self.target.clone().map(Route::new);
        if let (Some(route), Some(Connected { at: Some(at), .. })) = (&mut route, &first) {
            route.note_tried(at);
        }
        let mut next = first;
        // Handlers of lost sockets that still work. They may wait for room, which only the next socket can make.
        let mut leaving = JoinSet::new();
        for sockets in 0.. {
            let was_dialled = next.is_some();
            let connected = match next.take() {
                Some(connected) => connected,
                None => {
                    let connected = tokio::select! {
                        connected = self.reconnect(route.as_mut(), &mut delays, &mut outage, at_once) => connected,
                        () = self.nothing_left() => break,
                    };
                    // This is the other socket that somebody may have asked for meanwhile.
                    self.outbox.take_reopen();
                    match connected {
                        Ok(connected) => connected,
                        Err(reason) => {
                            leaving.detach_all();
                            return self.give_up(reason);
                        }
                    }
                }
            };
            let at = connected.at.clone();
            let settled_before = self.outbox.settled();
            let connected_at = Instant::now();
            let parted = self.use_socket(connected, route.as_mut(), sockets, &mut leaving).await;
            if matches!(parted, Parted::Finished) {
                break;
            }
            if matches!(parted, Parted::Refused) {
                leaving.detach_all();
                return self.give_up(FailedReason::Refused);
            }
            self.outbox.rewind();
            self.outbox.note_attempt();
            self.stand(State::Disconnected);
            at_once = matches!(parted, Parted::Reopened);
            let was_of_use = !matches!(parted, Parted::Lost { was_of_use: false });
            let healthy = was_of_use && connected_at.elapsed() >= self.backoff.max;
            if healthy {
                delays.reset();
            }
            let progress = was_of_use && (self.outbox.settled() > settled_before || self.outbox.is_resolved());
            if healthy || progress || at_once || was_dialled {
                outage = Outage::begin(std::time::Instant::now());
            }
            if let (Some(route), Some(at)) = (&mut route, at) {
                route.lost(at, healthy, self.outbox.unacknowledged());
            }
        }
        while leaving.join_next().await.is_some() {}
        CLOSED
    }

    /// Ready when the connection is being closed and nothing is in hand.
    async fn nothing_left(&self) {
        poll_fn(|cx| match self.outbox.poll_phase(cx) {
            Phase::Closing(_) if self.outbox.is_resolved() => Poll::Ready(()),
            _ => Poll::Pending,
        })
        .await;
    }

    /// One socket, from its first byte to its last.
    async fn use_socket(
        &self,
        connected: Connected,
        mut route: Option<&mut Route>,
        number: u64,
        leaving: &mut JoinSet<()>,
    ) -> Parted {
        if !self.outbox.greet() {
            return Parted::Refused;
        }
        let Connected { io, peer: address, at, share } = connected;
        let share = share.filter(|_| !self.outbox.is_plain());
        let mut share = share.map(|(until, allowed)| (Box::pin(sleep_until(until.into())), allowed));
        tracing::info!(peer = %address, "connected");
        let mut is_of_use = false;
        let peer = Peer::new(number, address.clone(), io.identity().cloned(), Sender::new(&self.outbox));
        let Some(mut socket) = Socket::open(io, &self.service, &peer, &self.demands) else {
            self.lost(&Ended::HandlerPanicked);
            if let Some(route) = route {
                route.note_hope();
            }
            return Parted::Lost { was_of_use: true };
        };
        drop(peer);
        let outbox = &self.outbox;
        let ended = poll_fn(|cx| {
            let phase = outbox.poll_phase(cx);
            if outbox.take_reopen() {
                return Poll::Ready(Ended::Reopened);
            }
            let closing = matches!(phase, Phase::Closing(_));
            if closing {
                outbox.with_sending(|sending, _| sending.leave());
            }
            let polled = socket.poll(cx, outbox);
            if !is_of_use && outbox.with_sending(|sending, _| sending.is_open()).unwrap_or(true) {
                is_of_use = true;
                self.note_refusal(None);
                self.stand(State::Connected);
                let before = route.as_deref_mut().zip(at.as_ref()).and_then(|(route, at)| route.granted(at));
                self.tell_where(before, at.as_ref());
                self.outbox.tell(Event::Connected { peer: address.clone() });
                self.answer(Ok(()));
                share = None;
            }
            match polled {
                // The peer may end its stream right behind its last word.
                Poll::Pending | Poll::Ready(Ended::EndOfStream)
                    if outbox.with_sending(|sending, outbox| sending.is_done(outbox)).unwrap_or(false) =>
                {
                    // Not closing, it is the receiver who leaves: the next one takes what is still to come.
                    Poll::Ready(if closing { Ended::ShutDown } else { Ended::EndOfStream })
                }
                Poll::Pending if closing && outbox.is_plain() && socket.is_drained(outbox) => {
                    Poll::Ready(Ended::ShutDown)
                }
                Poll::Pending => match &mut share {
                    Some((until, allowed)) => until.as_mut().poll(cx).map(|()| Ended::HandshakeDeadline(*allowed)),
                    None => Poll::Pending,
                },
                ended => ended,
            }
        })
        .await;
        if matches!(ended, Ended::ShutDown) {
            let ended = socket.end_output(outbox).await;
            socket.finish_handler(&ended, outbox).await;
            return Parted::Finished;
        }
        self.lost(&ended);
        match &ended {
            Ended::Refused { why, .. } => self.refused(why),
            Ended::Violated(_) | Ended::Malformed(_) if !is_of_use => self.refused(&why_not_granted(&ended)),
            _ => {}
        }
        let is_for_good = matches!(ended, Ended::Refused { is_temporary: false, .. });
        let mut is_refused = is_for_good;
        if let Some((route, at)) = route.zip(at.as_ref()) {
            if !is_of_use {
                route.note_failure(format!("cannot open a session with {}: {}", at.address, why_not_granted(&ended)));
            }
            if is_for_good {
                // Another place may want the stream. Not if it is this side that has forgotten too much of it.
                is_refused = self.outbox.is_overtaken() || !route.refused(at);
            } else {
                route.note_hope();
            }
            if self.is_awaited() && (is_refused || !route.may_go_on(now())) {
                self.answer(Err(route.failures()));
                is_refused = true;
            }
        }
        let parted = match &ended {
            Ended::Reopened => Parted::Reopened,
            _ if is_refused => Parted::Refused,
            _ => Parted::Lost { was_of_use: is_of_use },
        };
        while leaving.try_join_next().is_some() {}
        leaving.spawn(socket.leave(ended, Arc::clone(&self.outbox)).in_current_span());
        parted
    }

    /// Tells whoever waits for the first socket.
    fn answer(&self, answer: Result<(), String>) {
        let waiting = lock(&self.answer).take();
        waiting.map(|waiting| waiting.send(answer));
    }

    /// Whether somebody waits for the first socket.
    fn is_awaited(&self) -> bool {
        lock(&self.answer).is_some()
    }

    /// An acknowledged stream was granted: tells what that means for what is in flight, and whether it was elsewhere `before`.
    fn tell_where(&self, before: Option<Endpoint>, at: Option<&Endpoint>) {
        let lost = self.outbox.take_state_lost();
        let at_risk = lost.map_or(0, |StateLost { from, to }| (to + 1).saturating_sub(from));
        if let Some((before, at)) = before.as_ref().zip(at).filter(|_| !self.outbox.is_plain()) {
            let (from, to) = (Address::from(before.place.clone()), Address::from(at.place.clone()));
            match at_risk {
                0 => tracing::info!(%from, %to, "the stream moved"),
                in_flight => {
                    tracing::warn!(%from, %to, in_flight, "the stream moved: both may handle what was in flight");
                }
            }
            self.outbox.tell(Event::Moved { from, to, in_flight: at_risk });
            if at_risk == 0 {
                return;
            }
        }
        if let Some(StateLost { from, to }) = lost {
            if before.is_none() {
                tracing::warn!(from, to, "the receiver lost its state: these may be handled twice");
            }
            self.outbox.tell(Event::ReceiverStateLost { from, to });
        }
    }

    fn lost(&self, ended: &Ended) {
        tracing::warn!("connection lost: {ended}");
        self.outbox.tell(Event::Lost { why: ended.to_string() });
    }

    /// The stream was not granted on a socket.
    fn refused(&self, why: &str) {
        self.note_refusal(Some(why.to_owned()));
        self.outbox.tell(Event::Refused { why: why.to_owned() });
    }

    fn stand(&self, state: State) {
        self.state.send_replace(state);
        self.outbox.note_away(state != State::Connected);
    }

    fn note_refusal(&self, why: Option<String>) {
        *lock(&self.refusal) = why;
    }

    /// Tries until there is a socket, or the policy says that it is enough.
    async fn reconnect(
        &self,
        route: Option<&mut Route>,
        delays: &mut Delays,
        outage: &mut Outage,
        at_once: bool,
    ) -> Result<Connected, FailedReason> {
        let route = route.ok_or(FailedReason::Disconnected)?;
        // What is to be done at once, is done whatever the policy says of further attempts.
        if at_once && let Some(connected) = self.begin_round(route, outage, Duration::MAX).await {
            return Ok(connected);
        }
        let mut was_released = false;
        loop {
            let mut waited = Duration::ZERO;
            if route.may_go_on(now()) {
                let left = if was_released { Duration::MAX } else { outage.left_of_round(self.retry, now()) };
                waited = delays.fall_back().min(left);
                self.wait(waited).await;
                let left = left.saturating_sub(waited);
                if !left.is_zero()
                    && let Some(connected) = self.go_on(route, left).await
                {
                    return Ok(connected);
                }
            }
            if self.is_awaited() {
                self.answer(Err(route.failures()));
                return Err(FailedReason::Refused);
            }
            if route.is_hopeless() {
                return Err(FailedReason::Refused);
            }
            if let Some(mut left) = outage.left(self.retry, now()) {
                let begun = Instant::now();
                let stays_for = route.stays_for(now());
                let pause = delays.next().saturating_sub(waited).min(left);
                self.wait(pause.min(stays_for.unwrap_or(Duration::MAX))).await;
                if stays_for.is_some() && route.stays_for(now()).is_none() {
                    // The stream has waited here for long enough: others have their turn without the rest of the pause.
                    continue;
                }
                left = left.saturating_sub(begun.elapsed());
                if !left.is_zero() {
                    if let Some(connected) = self.begin_round(route, outage, left).await {
                        return Ok(connected);
                    }
                    continue;
                }
            }
            // A stream that has stayed for its messages in flight can still go elsewhere.
            if !route.release() {
                return Err(FailedReason::RetryExhausted);
            }
            was_released = true;
        }
    }

    /// Tries every place.
    async fn begin_round(&self, route: &mut Route, outage: &mut Outage, left: Duration) -> Option<Connected> {
        route.begin_round();
        // Also one that succeeds counts, until its socket has done any good.
        outage.note_attempt();
        self.go_on(route, left).await
    }

    /// Tries every place that is left of a round.
    async fn go_on(&self, route: &mut Route, left: Duration) -> Option<Connected> {
        self.stand(State::Connecting);
        match route.connect(left).await {
            Ok(Some(connected)) => return Some(connected),
            Ok(None) => {}
            Err(error) => {
                self.outbox.note_attempt();
                self.outbox.note_failed_attempt();
                tracing::warn!(kind = ?error.kind(), "{error}");
                route.note_failure(error.to_string());
            }
        }
        self.stand(State::Disconnected);
        None
    }

    /// Waits before an attempt; not if another socket is asked for meanwhile.
    async fn wait(&self, delay: Duration) {
        let until = deadline_in(delay);
        tokio::select! {
            () = sleep_until(until.into()) => {}
            () = poll_fn(|cx| {
                self.outbox.poll_phase(cx);
                if self.outbox.take_reopen() { Poll::Ready(()) } else { Poll::Pending }
            }) => {}
        }
    }

    fn give_up(&self, reason: FailedReason) -> &'static str {
        let why = match reason {
            FailedReason::Refused => "its peer refused the acknowledged stream",
            FailedReason::Disconnected => "its stream has ended, and cannot be opened again",
            _ => "its peer stayed away for longer than the retry policy allows",
        };
        tracing::warn!("giving up the connection: {why}");
        self.outbox.fail_all(reason);
        why
    }

    /// Ready when a close is under way and its deadline has passed.
    async fn closing_deadline_passed(&self) {
        let mut phase = self.outbox.phase_after(Phase::Open).await;
        while let Phase::Closing(until) = phase {
            tokio::select! {
                () = sleep_until(until.into()) => return,
                sooner = self.outbox.phase_after(phase) => phase = sooner,
            }
        }
    }

    /// Tells how many messages have failed since this was told last, unless that is not so long ago. Returns whether all is
    /// told.
    fn tell_failures(&self, stats: &Stats, pace: Duration) -> bool {
        let mut told = lock(&self.told);
        if told.stats.failed == stats.failed {
            return true;
        }
        if told.at.is_some_and(|at| at.elapsed() < pace) {
            return false;
        }
        for &reason in FailedReason::ALL {
            let count = stats.failed_for(reason) - told.stats.failed_for(reason);
            if count > 0 {
                self.outbox.tell(Event::Failed { reason, count });
            }
        }
        *told = ToldFailures { stats: *stats, at: Some(Instant::now()) };
        true
    }

    /// Hands failed messages over as they come, lets messages expire on time, and tells when they are stalled.
    async fn do_chores(&self, log: &Throttle) -> &'static str {
        let mut is_stalled = false;
        loop {
            let stats = self.outbox.stats();
            let has_untold = !self.tell_failures(&stats, STALL_GRAIN);
            let Stats { in_flight, stalled, .. } = stats;
            if in_flight == 0 || stalled < self.stall_after {
                is_stalled = false;
            } else if !std::mem::replace(&mut is_stalled, true) {
                tracing::warn!(in_flight, ?stalled, "stalled: messages are in flight, and none is settled");
                self.outbox.tell(Event::Stalled { in_flight, stalled });
            }
            if self.failed_to.is_told() {
                self.failed_to.hand_over_now(&self.outbox, log);
            }
            let look_again = self.stall_after.saturating_sub(stalled).max(STALL_GRAIN);
            let expiry = self.outbox.expire();
            let expired = async {
                match expiry {
                    Some(at) => sleep_until(at.into()).await,
                    None => pending().await,
                }
            };
            // Side by side: messages expire on time, however slowly failed ones are taken.
            tokio::select! {
                () = self.failed_to.hand_over(&self.outbox, log), if self.outbox.has_failed() && !self.failed_to.is_told() => {}
                () = self.outbox.chores() => {}
                () = expired => {}
                () = tokio::time::sleep(if has_untold { STALL_GRAIN } else { look_again }) => {}
            }
        }
    }
}

/// Why a stream was not granted, for who wants it.
fn why_not_granted(ended: &Ended) -> String {
    match ended {
        Ended::HandshakeDeadline(allowed) => format!("no answer within {allowed:?}"),
        // What it has sent is no answer, and it had heard nothing before.
        Ended::Violated(_) | Ended::Malformed(_) => format!(
            "{ended}: the listener may have a service that greets, by sending before anything was received; such a one grants no \
             acknowledged stream"
        ),
        _ => ended.to_string(),
    }
}

fn now() -> std::time::Instant {
    Instant::now().into_std()
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Ends the connection for its users, also when the task is dropped.
struct LastWill<'a, S: Service>(&'a Dialer<S>);

impl<S: Service> LastWill<'_, S> {
    fn end(&self, why: &'static str, log: &Throttle) {
        let dialer = self.0;
        dialer.outbox.advance_phase(Phase::Ended(why));
        dialer.outbox.fail_all(FailedReason::Closed);
        dialer.failed_to.hand_over_now(&dialer.outbox, log);
        dialer.tell_failures(&dialer.outbox.stats(), Duration::ZERO);
        *lock(&dialer.meter) = None;
        dialer.state.send_replace(State::Closed);
        dialer.outbox.tell(Event::Closed { why });
    }
}

impl<S: Service> Drop for LastWill<'_, S> {
    fn drop(&mut self) {
        let log = Throttle::default();
        self.end("its runtime is gone", &log);
        // What a full channel did not take is at least logged.
        FailedTo::Log.hand_over_now(&self.0.outbox, &log);
    }
}
