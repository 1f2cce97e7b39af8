//! The connections of a listener: each in a task of its own, from its first byte to its last.
//!
//! A connection counts as open from its accept until its last reply is accounted for. Whatever one of them does, the
//! others go on.

use std::collections::HashMap;
use std::future::{Future, poll_fn};
use std::io;
use std::pin::pin;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::Poll;
use std::time::{Duration, Instant};

use tokio::sync::Notify;
use tracing::{Instrument as _, Span};

use crate::door::{Crowd, Full};
use crate::events::{ServerEvent, Watched};
use crate::handler::{Ended, Peer, Service};
use crate::handshake::Handshake;
use crate::log::Throttle;
use crate::metrics::{Meter, Role, Totals};
use crate::proto::outbox::FailedReason;
use crate::proto::session::streams::Terms;
use crate::proto::session::wire::takes_sessions;
use crate::reader::{Demands, Talk};
use crate::sender::Sender;
use crate::session::Sessions;
use crate::shared_outbox::{Phase, SharedOutbox};
use crate::socket::Socket;
use crate::stats::{Received, Stats, count_both};
use crate::transport::{PeerAddress, Transport};

/// How long a connection that broke a rule may take to get the replies it is still owed.
const PARTING: Duration = Duration::from_secs(1);

/// How long a connection that is cut may take to notice.
const LAST_WORD: Duration = Duration::from_millis(100);

/// What all connections of a listener share.
pub(crate) struct House<S> {
    service: Arc<S>,
    demands: Arc<Demands>,
    reply_memory: usize,
    tenants: Arc<Tenants>,
    /// Who is there, from the accept on.
    crowd: Crowd,
    ended_log: Throttle,
    /// What was in hand where connections were cut.
    unfinished: AtomicUsize,
    unhandled: AtomicU64,
    events: Arc<Watched<ServerEvent>>,
    /// What the user calls it.
    name: Option<String>,
    meter: Meter,
}

/// What a shutdown had to cut.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Cut {
    /// Connections.
    pub(crate) cut: usize,
    /// Those of them that are still there.
    pub(crate) blocked: usize,
    /// Those that had anything in hand.
    pub(crate) unfinished: usize,
    /// Messages that no handler was given.
    pub(crate) unhandled: u64,
}

impl<S: Service> House<S> {
    /// `grant` says on which terms, and in how much memory, sessions are granted; `None` if they are not. `name` is what the
    /// user calls it, if anything, and `address` where it listens.
    pub(crate) fn new(
        service: S,
        mut demands: Demands,
        reply_memory: usize,
        grant: Option<(Terms, usize)>,
        crowd: Crowd,
        name: Option<String>,
        address: &str,
    ) -> House<S> {
        let service = Arc::new(service);
        demands.sessions = match grant {
            _ if !takes_sessions(&demands.framing) => Talk::Plain,
            None => Talk::Refuse,
            Some((terms, memory)) => {
                let keeper = Arc::clone(&service);
                let received = Arc::clone(&demands.received);
                Talk::Answer(Arc::new(Sessions::new(terms, memory, received, move |stream| keeper.stored(stream))))
            }
        };
        let tenants = Arc::new(Tenants::default());
        let meter = Meter::new(Role::Listener, name.as_deref().unwrap_or(address), {
            let (tenants, received) = (Arc::clone(&tenants), Arc::clone(&demands.received));
            move || Totals { sent: tenants.replies(&received), received: received.read(), ..Totals::default() }
        });
        House {
            service,
            demands: Arc::new(demands),
            reply_memory,
            tenants,
            crowd,
            ended_log: Throttle::default(),
            unfinished: AtomicUsize::new(0),
            unhandled: AtomicU64::new(0),
            events: Arc::default(),
            name,
            meter,
        }
    }

    /// What happens to its connections.
    pub(crate) fn events(&self) -> &Arc<Watched<ServerEvent>> {
        &self.events
    }

    pub(crate) fn meter(&self) -> &Meter {
        &self.meter
    }

    /// Makes room for a connection, which then must be [served](Self::serve).
    pub(crate) fn admit(&self, peer: &PeerAddress) -> Result<(), Full> {
        self.crowd.enter(peer)
    }

    /// What all connections have received.
    pub(crate) fn received(&self) -> &Arc<Received> {
        &self.demands.received
    }

    /// One connection, from its first byte to its last. It counts as open from the call on.
    ///
    /// What an idle connection costs is mostly the size of this future: what it needs is captured, not moved within it.
    pub(crate) fn serve(self: Arc<Self>, io: Transport, address: PeerAddress) -> impl Future<Output = Ended> {
        Self::host(Tenants::enter(self, address), io)
    }

    /// The same, once it is secure.
    pub(crate) fn serve_secured(
        self: Arc<Self>,
        io: Transport,
        address: PeerAddress,
        handshake: Handshake,
    ) -> impl Future<Output = Ended> {
        let tenant = Tenants::enter(self, address);
        async move {
            // On the heap, where it does not outlast itself.
            match Box::pin(handshake.run(io, &tenant.outbox).instrument(tenant.span())).await {
                Ok(io) => Self::host(tenant, io).await,
                Err(ended) => {
                    tenant.within(|| tenant.leave(&ended, false));
                    ended
                }
            }
        }
    }

    #[expect(clippy::manual_async_fn, reason = "an async fn would hold what it is given twice")]
    fn host(tenant: Tenant<S>, io: Transport) -> impl Future<Output = Ended> {
        async move {
            let Tenant { house, outbox, .. } = &tenant;
            let mut socket = tenant.within(|| house.open(io, &tenant));
            let ended = poll_fn(|cx| {
                let _entered = tenant.span.as_deref().map(Span::enter);
                let Some(socket) = &mut socket else { return Poll::Ready(Ended::HandlerPanicked) };
                match outbox.poll_phase(cx) {
                    Phase::Open => {}
                    Phase::Draining | Phase::Closing(_) => socket.stop_reading(),
                    Phase::Cut | Phase::Ended(_) => return Poll::Ready(Ended::Cut),
                }
                socket.poll(cx, outbox)
            })
            .await;
            // On the heap, so that an idle connection does not carry the room for its own end.
            Box::pin(house.part(socket.take(), &ended, outbox).instrument(tenant.span())).await;
            tenant.within(|| tenant.leave(&ended, true));
            ended
        }
    }

    fn open(&self, io: Transport, tenant: &Tenant<S>) -> Option<Socket<S::Handler>> {
        let Tenant { id, address, outbox, .. } = tenant;
        tracing::debug!(peer = %address, id, "connected");
        let peer = Peer::new(*id, address.clone(), io.identity().cloned(), Sender::new(outbox));
        Socket::open(io, &self.service, &peer, &self.demands)
    }

    /// The input of a connection has ended: finishes what is in hand, writes the replies that are still owed, and notes what
    /// was left if it was cut.
    async fn part(&self, socket: Option<Socket<S::Handler>>, ended: &Ended, outbox: &Arc<SharedOutbox>) {
        let Some(mut socket) = socket else { return };
        let is_finished = socket.finish_handler(ended, outbox).await;
        let unhandled = socket.unhandled();
        self.write_rest(socket, ended, outbox).await;
        if outbox.is_cut() && (!is_finished || unhandled > 0 || outbox.stats().in_flight > 0) {
            self.unfinished.fetch_add(1, Ordering::Relaxed);
            self.unhandled.fetch_add(unhandled, Ordering::Relaxed);
        }
    }

    async fn write_rest(&self, socket: Socket<S::Handler>, ended: &Ended, outbox: &Arc<SharedOutbox>) {
        let mut output = socket.into_output();
        let written = match ended {
            Ended::Io(_) | Ended::Cut => return,
            // The peer may still read: replies go on as long as somebody can send them.
            Ended::EndOfStream if outbox.peer_stream().is_none() => {
                output.write_until(outbox, |phase| phase != Phase::Open || !outbox.has_senders()).await
            }
            Ended::ShutDown if outbox.peer_stream().is_none() => output.write_until(outbox, |_| true).await,
            _ => {
                let write = output.write_until(outbox, |_| true);
                tokio::time::timeout(PARTING, write).await.unwrap_or(Err(io::ErrorKind::TimedOut.into()))
            }
        };
        match written {
            Ok(()) => output.end(outbox).await,
            Err(error) => tracing::debug!(%error, "replies were cut off"),
        }
    }

    /// Lets every connection finish what it has in hand until then, and cuts the rest.
    pub(crate) async fn shut_down(&self, deadline: Instant) -> Cut {
        self.tenants.advance(Phase::Draining);
        if tokio::time::timeout_at(deadline.into(), self.tenants.gone()).await.is_ok() {
            return Cut::default();
        }
        let cut = self.tenants.count();
        self.tenants.advance(Phase::Cut);
        // A connection that does not even hear of it is in a handler that blocks.
        let _ = tokio::time::timeout(LAST_WORD, self.tenants.gone()).await;
        let blocked = self.tenants.count();
        let unfinished = self.unfinished.load(Ordering::Relaxed) + blocked;
        Cut { cut, blocked, unfinished, unhandled: self.unhandled.load(Ordering::Relaxed) }
    }
}

/// The connections that are open, so that they can be told to close.
#[derive(Default)]
struct Tenants {
    open: Mutex<OpenTenants>,
    left: Notify,
}

#[derive(Default)]
struct OpenTenants {
    next: u64,
    phase: Option<Phase>,
    outboxes: HashMap<u64, Arc<SharedOutbox>>,
}

impl Tenants {
    fn lock(&self) -> MutexGuard<'_, OpenTenants> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn enter<S>(house: Arc<House<S>>, address: PeerAddress) -> Tenant<S> {
        house.demands.received.connected.fetch_add(1, Ordering::Relaxed);
        house.demands.received.open.fetch_add(1, Ordering::Relaxed);
        let outbox = SharedOutbox::for_replies(house.demands.framing, house.reply_memory);
        let mut open = house.tenants.lock();
        let id = open.next;
        open.next += 1;
        open.outboxes.insert(id, Arc::clone(&outbox));
        let phase = open.phase;
        drop(open);
        if let Some(phase) = phase {
            outbox.advance_phase(phase);
        }
        house.events.tell(|| ServerEvent::Opened { peer: address.clone(), id });
        let span = {
            let name = house.name.as_deref();
            tracing::info_span!("connection", name, peer = %address, id, stream = tracing::field::Empty)
        };
        let span = (!span.is_disabled()).then(|| Box::new(span));
        Tenant { house, id, address, outbox, span, has_left: AtomicBool::new(false) }
    }

    /// What became of all replies: those of connections that have ended, and of those that are open.
    fn replies(&self, received: &Received) -> Stats {
        let open = self.lock();
        let mut sum = received.replies();
        open.outboxes.values().for_each(|outbox| sum.add(&outbox.stats()));
        sum
    }

    fn count(&self) -> usize {
        self.lock().outboxes.len()
    }

    fn advance(&self, phase: Phase) {
        let mut open = self.lock();
        open.phase = Some(phase);
        let outboxes: Vec<_> = open.outboxes.values().cloned().collect();
        drop(open);
        for outbox in outboxes {
            outbox.advance_phase(phase);
        }
    }

    async fn gone(&self) {
        loop {
            let mut left = pin!(self.left.notified());
            left.as_mut().enable();
            if self.count() == 0 {
                return;
            }
            left.await;
        }
    }
}

/// One open connection, for as long as it lives. Whatever ends it, its replies are accounted for.
struct Tenant<S> {
    house: Arc<House<S>>,
    id: u64,
    address: PeerAddress,
    outbox: Arc<SharedOutbox>,
    /// Where its log lines, and those of its handler, are found; the stream is known later, if there is one. On the heap, so
    /// that it takes little where nobody wants it.
    span: Option<Box<Span>>,
    has_left: AtomicBool,
}

impl<S> Tenant<S> {
    fn span(&self) -> Span {
        self.span.as_deref().cloned().unwrap_or_else(Span::none)
    }

    /// Does something in its span.
    fn within<T>(&self, work: impl FnOnce() -> T) -> T {
        match &self.span {
            Some(span) => span.in_scope(work),
            None => work(),
        }
    }

    /// Gives up the replies that are left, and counts, logs and tells the end. Where there was no handler yet, nobody else
    /// tells of it.
    fn leave(&self, ended: &Ended, has_handler: bool) {
        self.has_left.store(true, Ordering::Relaxed);
        self.outbox.advance_phase(Phase::Ended("its peer is gone"));
        self.outbox.fail_all(FailedReason::Disconnected);
        let replies = self.outbox.stats();
        let House { demands, ended_log, tenants, events, crowd, .. } = &*self.house;
        let (peer, unsent) = (&self.address, replies.failed);
        let reason = match broken_by(ended, &demands.received) {
            None if unsent > 0 => Some(&demands.received.broken_unsent),
            reason => reason,
        };
        match reason {
            None => tracing::debug!(%peer, "closed: {ended}"),
            Some(reason) => {
                count_both(&demands.received.broken, reason);
                ended_log.warn(|left_out| match has_handler {
                    true => tracing::warn!(%peer, unsent, left_out, "connection closed: {ended}"),
                    false => tracing::warn!(%peer, left_out, "connection refused: {ended}"),
                });
            }
        }
        let is_broken = reason.is_some();
        let told = || ServerEvent::Ended { peer: peer.clone(), id: self.id, why: ended.to_string(), is_broken };
        events.tell(told);
        demands.received.open.fetch_sub(1, Ordering::Relaxed);
        crowd.leave(peer);
        {
            // Its replies are in one of both sums, and never in none or in two.
            let mut open = tenants.lock();
            open.outboxes.remove(&self.id);
            demands.received.add_replies(&replies);
        }
        tenants.left.notify_waiters();
    }
}

/// The counter of what broke a connection off; `None` if nothing did.
fn broken_by<'r>(ended: &Ended, received: &'r Received) -> Option<&'r AtomicU64> {
    Some(match ended {
        Ended::EndOfStream | Ended::ShutDown => return None,
        Ended::Malformed(_) => &received.broken_malformed,
        Ended::HandlerFailed(_) | Ended::HandlerPanicked | Ended::SendAgain => &received.broken_handler,
        Ended::FrameDeadline(_) => &received.broken_frame_deadline,
        Ended::Idle(_) => &received.broken_idle,
        Ended::Overloaded { .. } => &received.broken_overloaded,
        Ended::Handshake(_) => &received.broken_handshake,
        Ended::HandshakeDeadline(_) => &received.broken_handshake_deadline,
        Ended::Silent(_) => &received.broken_silent,
        Ended::Fenced => &received.broken_fenced,
        Ended::Violated(_) => &received.broken_violation,
        Ended::NotGranted(_) => &received.broken_session_refused,
        Ended::Cut => &received.broken_cut,
        // The last two do not happen to connections that were accepted.
        Ended::Io(_) | Ended::Refused { .. } | Ended::Reopened => &received.broken_io,
    })
}

impl<S> Drop for Tenant<S> {
    fn drop(&mut self) {
        if !self.has_left.load(Ordering::Relaxed) {
            self.leave(&Ended::Cut, true);
        }
    }
}
