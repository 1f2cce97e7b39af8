//! What listeners and connections count, published through the facade of the crate `metrics`.
//!
//! Nothing is called for a message, a read or a write: the counters that are always on are read, at most once a second, and
//! what they say is published as it is. Several sources of one name are published as their sum; one that has ended stays in
//! it, so that no counter ever falls. Numbers that belong together are read and published together.
//!
//! # Names
//!
//! Each has the labels `role`, which is `listener` or `connection`, and `name`: what [`ListenerBuilder::name`] or
//! [`ConnectionBuilder::name`] says, or else the address that is listened on, or dialled, or `a stream`. No label is made of
//! what a stranger says or of where he comes from. Where many addresses are dialled, one name for all bounds how many series
//! there are.
//!
//! | name | type | unit | roles | what |
//! |---|---|---|---|---|
//! | `buffstreams_connections_open` | gauge | connections | both | open now; of those dialled, connected now |
//! | `buffstreams_connections_opened_total` | counter | connections | both | accepted; sockets on which a dialled connection could send |
//! | `buffstreams_connections_down` | gauge | connections | connection | dialled, and not connected now |
//! | `buffstreams_connections_broken_total` | counter | connections | listener | ended otherwise than by the end of the stream or by this side closing, by `reason` |
//! | `buffstreams_connections_refused_total` | counter | connections | listener | not let in, by `reason` |
//! | `buffstreams_throttled_total` | counter | pauses | listener | a sender was made to wait because of the rate of its messages |
//! | `buffstreams_streams_forgotten_total` | counter | streams | listener | an acknowledged stream of use was forgotten, for there were too many |
//! | `buffstreams_connection_losses_total` | counter | connections | connection | sockets that were lost |
//! | `buffstreams_connect_failures_total` | counter | attempts | connection | attempts to connect anew that failed |
//! | `buffstreams_streams_refused_total` | counter | streams | connection | the peer refused the acknowledged stream |
//! | `buffstreams_streams_resumed_total` | counter | streams | connection | an acknowledged stream went on where it was |
//! | `buffstreams_streams_moved_total` | counter | streams | connection | an acknowledged stream went on at another endpoint |
//! | `buffstreams_stalled_connections` | gauge | connections | connection | nothing was settled for [so long](crate::ConnectionBuilder::stall_after) |
//! | `buffstreams_messages_received_total` | counter | messages | both | given to handlers |
//! | `buffstreams_received_bytes_total` | counter | bytes | both | of those messages, without prefixes |
//! | `buffstreams_handler_errors_total` | counter | errors | both | that handlers returned |
//! | `buffstreams_messages_recovered_total` | counter | messages | connection | taken over from a spool |
//! | `buffstreams_messages_accepted_total` | counter | messages | both | to be sent; on a listener, replies |
//! | `buffstreams_messages_settled_total` | counter | messages | both | that reached the promised level |
//! | `buffstreams_messages_failed_total` | counter | messages | both | that were given up, by `reason` |
//! | `buffstreams_messages_left_total` | counter | messages | connection | that a connection which has ended left in its spool |
//! | `buffstreams_messages_in_flight` | gauge | messages | both | none of these yet |
//! | `buffstreams_in_flight_bytes` | gauge | bytes | both | of their frames, without those that wait in a spool |
//! | `buffstreams_written_bytes_total` | counter | bytes | both | that sockets took; before TLS |
//! | `buffstreams_spool_bytes` | gauge | bytes | connection | of messages that wait in a spool; only with one, as the next two |
//! | `buffstreams_spool_failed_bytes` | gauge | bytes | connection | of messages that were rejected, and are kept in it |
//! | `buffstreams_spool_capacity_bytes` | gauge | bytes | connection | that it may hold |
//!
//! Always `recovered + accepted = settled + failed + left + in flight`. A `reason` of a message is one of
//! [`FailedReason::name`](crate::FailedReason::name); that of a connection is what follows `refused_` or `broken_` in the
//! counters of [`ReceivedStats`].
//!
//! [`ListenerBuilder::name`]: crate::ListenerBuilder::name
//! [`ConnectionBuilder::name`]: crate::ConnectionBuilder::name

use std::collections::BTreeMap;
use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use metrics::{Key, KeyName, Label, Level, Metadata, Recorder, SharedString, Unit};
use tokio::task::AbortHandle;

use crate::proto::outbox::FailedReason;
use crate::stats::{ReceivedStats, Stats};

/// How often everything is published by itself.
const PACE: Duration = Duration::from_secs(1);

/// Publishes what everything has counted by now; while the returned value lives nothing else is published.
///
/// For whoever is asked for the numbers: called before they are rendered, it makes them fresh, and all of one moment. Without
/// it they are those of the last second, and of two moments if they are read while they change.
///
/// ```
/// # fn render() -> String { String::new() }
/// let published = buffstreams::metrics::publish();
/// let text = render(); // such as PrometheusHandle::render
/// drop(published);
/// ```
pub fn publish() -> Published {
    metrics::with_recorder(describe);
    publish_all()
}

fn publish_all() -> Published {
    let published = Published(lock(&PUBLISHING));
    let groups: Vec<_> = lock(&GROUPS).values().cloned().collect();
    metrics::with_recorder(|recorder| groups.iter().for_each(|group| group.publish(recorder)));
    published
}

/// Not every second: a recorder may remember each time, until somebody asks for its numbers.
fn describe(recorder: &dyn Recorder) {
    METRICS.iter().for_each(|metric| metric.describe(recorder));
}

/// Everything was published, and nothing else is as long as this lives. Not to be held for long.
pub struct Published(#[expect(dead_code, reason = "it is held")] MutexGuard<'static, ()>);

impl fmt::Debug for Published {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Published")
    }
}

/// Held while values are published, so that nobody publishes older ones behind newer ones.
static PUBLISHING: Mutex<()> = Mutex::new(());

/// Every name that there was in this process.
static GROUPS: Mutex<BTreeMap<(Role, String), Arc<Group>>> = Mutex::new(BTreeMap::new());

fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Which side counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Role {
    Listener,
    Connection,
}

impl Role {
    fn label(self) -> &'static str {
        match self {
            Role::Listener => "listener",
            Role::Connection => "connection",
        }
    }
}

/// What one source has counted.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Totals {
    pub(crate) received: ReceivedStats,
    pub(crate) sent: Stats,
    /// Whether a dialled connection has a socket of use, and whether it is stalled.
    pub(crate) is_up: bool,
    pub(crate) is_stalled: bool,
}

/// Bytes of messages that wait in a spool, and of failed ones that it keeps; and how many it may hold.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct SpoolTotals {
    pub(crate) bytes: u64,
    pub(crate) failed: u64,
    pub(crate) capacity: u64,
}

/// A listener or a connection, for as long as it counts. Cheap to clone; it has ended with the last clone.
#[derive(Clone)]
pub(crate) struct Meter(Arc<Source>);

struct Source {
    group: Arc<Group>,
    counted: Arc<Counted>,
    publisher: AbortHandle,
}

/// How the numbers of one source are read.
struct Counted {
    totals: Box<dyn Fn() -> Totals + Send + Sync>,
    spool: OnceLock<Box<dyn Fn() -> SpoolTotals + Send + Sync>>,
}

impl fmt::Debug for Meter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Meter").field(&self.0.group.name).finish()
    }
}

impl Meter {
    /// From now on a source of this name counts. Within a tokio runtime.
    pub(crate) fn new(role: Role, name: &str, totals: impl Fn() -> Totals + Send + Sync + 'static) -> Meter {
        let group = {
            let mut groups = lock(&GROUPS);
            let group = groups.entry((role, name.to_owned())).or_insert_with(|| Arc::new(Group::new(role, name)));
            Arc::clone(group)
        };
        let counted = Arc::new(Counted { totals: Box::new(totals), spool: OnceLock::new() });
        lock(&group.sources).live.push(Arc::clone(&counted));
        // A task of its own, since that of a connection is woken too often to look at one more clock each time.
        let publisher = tokio::spawn(keep_publishing()).abort_handle();
        Meter(Arc::new(Source { group, counted, publisher }))
    }

    /// The messages of this connection come from a spool.
    #[cfg(feature = "spool")]
    pub(crate) fn watch_spool(&self, totals: impl Fn() -> SpoolTotals + Send + Sync + 'static) {
        let _ = self.0.counted.spool.set(Box::new(totals));
    }

    /// Publishes what the sources of its name have counted by now.
    pub(crate) fn publish(&self) {
        self.0.group.publish_now();
    }
}

/// Publishes everything once in a while, as one of all those who do.
async fn keep_publishing() {
    static PUBLISHED: Mutex<Option<Instant>> = Mutex::new(None);
    loop {
        tokio::time::sleep(PACE).await;
        {
            let mut published = lock(&PUBLISHED);
            if published.is_some_and(|published| published.elapsed() < PACE) {
                continue;
            }
            *published = Some(Instant::now());
        }
        drop(publish_all());
    }
}

impl Drop for Source {
    fn drop(&mut self) {
        self.publisher.abort();
        let is_last = {
            let mut sources = lock(&self.group.sources);
            sources.live.retain(|live| !Arc::ptr_eq(live, &self.counted));
            sources.ended.count_ended(&self.counted);
            sources.live.is_empty()
        };
        // With others of its name it is published with them: many that end at once must not each add up all of them.
        if is_last {
            self.group.publish_now();
        }
    }
}

/// The sources of one name.
struct Group {
    role: Role,
    name: SharedString,
    sources: Mutex<Sources>,
    is_described: AtomicBool,
}

#[derive(Default)]
struct Sources {
    live: Vec<Arc<Counted>>,
    ended: Sum,
}

/// What the sources of one name have counted together.
#[derive(Clone, Copy, Debug, Default)]
struct Sum {
    received: ReceivedStats,
    sent: Stats,
    up: u64,
    down: u64,
    stalled: u64,
    left: u64,
    spool: Option<SpoolTotals>,
}

impl Sum {
    fn count(&mut self, counted: &Counted) {
        let Totals { received, sent, is_up, is_stalled } = (counted.totals)();
        self.received.add(&received);
        self.sent.add(&sent);
        self.up += u64::from(is_up);
        self.down += u64::from(!is_up);
        self.stalled += u64::from(is_stalled);
        if let Some(spool) = counted.spool.get() {
            let SpoolTotals { bytes, failed, capacity } = spool();
            let sum = self.spool.get_or_insert_default();
            sum.bytes += bytes;
            sum.failed += failed;
            sum.capacity += capacity;
        }
    }

    /// Counts one that has ended: what it had in flight is left in its spool.
    fn count_ended(&mut self, counted: &Counted) {
        let Totals { mut received, mut sent, .. } = (counted.totals)();
        received.open = 0;
        self.left += std::mem::take(&mut sent.in_flight);
        sent.in_flight_bytes = 0;
        self.received.add(&received);
        self.sent.add(&sent);
        if counted.spool.get().is_some() {
            // Its gauges go back to zero.
            self.spool.get_or_insert_default();
        }
    }
}

impl Group {
    fn new(role: Role, name: &str) -> Group {
        Group { role, name: name.to_owned().into(), sources: Mutex::default(), is_described: AtomicBool::new(false) }
    }

    fn publish_now(&self) {
        let _publishing = lock(&PUBLISHING);
        metrics::with_recorder(|recorder| self.publish(recorder));
    }

    fn publish(&self, recorder: &dyn Recorder) {
        if !self.is_described.swap(true, Ordering::Relaxed) {
            describe(recorder);
        }
        let sum = {
            let sources = lock(&self.sources);
            let mut sum = sources.ended;
            sources.live.iter().for_each(|counted| sum.count(counted));
            sum
        };
        for metric in METRICS.iter().filter(|metric| metric.roles.contains(&self.role)) {
            match metric.value {
                Value::One(value) => self.put(recorder, metric, None, value(&sum)),
                Value::Maybe(value) => {
                    if let Some(value) = value(&sum) {
                        self.put(recorder, metric, None, value);
                    }
                }
                Value::Each(values) => values(&sum, &mut |reason, value| {
                    self.put(recorder, metric, Some(reason), value);
                }),
            }
        }
    }

    fn put(&self, recorder: &dyn Recorder, metric: &Metric, reason: Option<&'static str>, value: u64) {
        static METADATA: Metadata<'static> = Metadata::new("buffstreams", Level::INFO, None);
        let mut labels =
            vec![Label::from_static_parts("role", self.role.label()), Label::new("name", self.name.clone())];
        labels.extend(reason.map(|reason| Label::from_static_parts("reason", reason)));
        let key = Key::from_parts(metric.name, labels);
        match metric.kind {
            Kind::Counter => recorder.register_counter(&key, &METADATA).absolute(value),
            Kind::Gauge => recorder.register_gauge(&key, &METADATA).set(value as f64),
        }
    }
}

#[derive(Clone, Copy)]
enum Kind {
    Counter,
    Gauge,
}

/// What is published under one name.
struct Metric {
    name: &'static str,
    kind: Kind,
    unit: Unit,
    roles: &'static [Role],
    help: &'static str,
    value: Value,
}

enum Value {
    One(fn(&Sum) -> u64),
    /// Not everybody has it.
    Maybe(fn(&Sum) -> Option<u64>),
    /// One for each reason.
    Each(fn(&Sum, &mut dyn FnMut(&'static str, u64))),
}

impl Metric {
    const fn new(
        (name, kind, unit): (&'static str, Kind, Unit),
        roles: &'static [Role],
        help: &'static str,
        value: Value,
    ) -> Metric {
        Metric { name, kind, unit, roles, help, value }
    }

    fn describe(&self, recorder: &dyn Recorder) {
        let (name, unit, help) = (KeyName::from_const_str(self.name), Some(self.unit), self.help.into());
        match self.kind {
            Kind::Counter => recorder.describe_counter(name, unit, help),
            Kind::Gauge => recorder.describe_gauge(name, unit, help),
        }
    }
}

const BOTH: &[Role] = &[Role::Listener, Role::Connection];
const LISTENER: &[Role] = &[Role::Listener];
const CONNECTION: &[Role] = &[Role::Connection];

/// The table of the documentation, as it is published.
static METRICS: &[Metric] = {
    use Kind::{Counter, Gauge};
    use Unit::{Bytes, Count};
    &[
        Metric::new(
            ("buffstreams_connections_open", Gauge, Count),
            BOTH,
            "Connections that are open now; of those dialled, that are connected.",
            Value::One(|sum| sum.received.open + sum.up),
        ),
        Metric::new(
            ("buffstreams_connections_opened_total", Counter, Count),
            BOTH,
            "Connections that were accepted; sockets on which a dialled connection could send.",
            Value::One(|sum| sum.received.connected + sum.sent.connected),
        ),
        Metric::new(
            ("buffstreams_connections_down", Gauge, Count),
            CONNECTION,
            "Dialled connections that are not connected now.",
            Value::One(|sum| sum.down),
        ),
        Metric::new(
            ("buffstreams_connections_broken_total", Counter, Count),
            LISTENER,
            "Connections that ended otherwise than by the end of the stream or by this side closing, by reason.",
            Value::Each(|sum, put| sum.received.parts("broken", put)),
        ),
        Metric::new(
            ("buffstreams_connections_refused_total", Counter, Count),
            LISTENER,
            "Connections that were not let in, by reason.",
            Value::Each(|sum, put| sum.received.parts("refused", put)),
        ),
        Metric::new(
            ("buffstreams_throttled_total", Counter, Count),
            LISTENER,
            "How often a sender was made to wait because of the rate of its messages.",
            Value::One(|sum| sum.received.throttled),
        ),
        Metric::new(
            ("buffstreams_streams_forgotten_total", Counter, Count),
            LISTENER,
            "Acknowledged streams that were forgotten, though messages of theirs had been handled, for there were too many.",
            Value::One(|sum| sum.received.streams_forgotten),
        ),
        Metric::new(
            ("buffstreams_connection_losses_total", Counter, Count),
            CONNECTION,
            "Sockets of dialled connections that were lost.",
            Value::One(|sum| sum.sent.lost),
        ),
        Metric::new(
            ("buffstreams_connect_failures_total", Counter, Count),
            CONNECTION,
            "Attempts to connect anew that failed.",
            Value::One(|sum| sum.sent.failed_attempts),
        ),
        Metric::new(
            ("buffstreams_streams_refused_total", Counter, Count),
            CONNECTION,
            "How often a peer refused an acknowledged stream.",
            Value::One(|sum| sum.sent.refused),
        ),
        Metric::new(
            ("buffstreams_streams_resumed_total", Counter, Count),
            CONNECTION,
            "How often an acknowledged stream went on where it was, on another socket.",
            Value::One(|sum| sum.sent.resumed),
        ),
        Metric::new(
            ("buffstreams_streams_moved_total", Counter, Count),
            CONNECTION,
            "How often an acknowledged stream went on at another endpoint.",
            Value::One(|sum| sum.sent.moved),
        ),
        Metric::new(
            ("buffstreams_stalled_connections", Gauge, Count),
            CONNECTION,
            "Dialled connections with messages in flight of which none was settled for long.",
            Value::One(|sum| sum.stalled),
        ),
        Metric::new(
            ("buffstreams_messages_received_total", Counter, Count),
            BOTH,
            "Messages given to handlers.",
            Value::One(|sum| sum.received.messages),
        ),
        Metric::new(
            ("buffstreams_received_bytes_total", Counter, Bytes),
            BOTH,
            "Bytes of the messages given to handlers, without prefixes.",
            Value::One(|sum| sum.received.bytes),
        ),
        Metric::new(
            ("buffstreams_handler_errors_total", Counter, Count),
            BOTH,
            "Errors that handlers returned.",
            Value::One(|sum| sum.received.handler_errors),
        ),
        Metric::new(
            ("buffstreams_messages_recovered_total", Counter, Count),
            CONNECTION,
            "Messages taken over from a spool.",
            Value::One(|sum| sum.sent.recovered),
        ),
        Metric::new(
            ("buffstreams_messages_accepted_total", Counter, Count),
            BOTH,
            "Messages accepted to be sent; on a listener, replies.",
            Value::One(|sum| sum.sent.accepted),
        ),
        Metric::new(
            ("buffstreams_messages_settled_total", Counter, Count),
            BOTH,
            "Messages that reached the promised level.",
            Value::One(|sum| sum.sent.settled),
        ),
        Metric::new(
            ("buffstreams_messages_failed_total", Counter, Count),
            BOTH,
            "Messages that were given up, by reason.",
            Value::Each(|sum, put| {
                FailedReason::ALL.iter().for_each(|reason| put(reason.name(), sum.sent.failed_for(*reason)));
            }),
        ),
        Metric::new(
            ("buffstreams_messages_left_total", Counter, Count),
            CONNECTION,
            "Messages that a connection which has ended left in its spool.",
            Value::One(|sum| sum.left),
        ),
        Metric::new(
            ("buffstreams_messages_in_flight", Gauge, Count),
            BOTH,
            "Messages that are neither settled nor failed.",
            Value::One(|sum| sum.sent.in_flight),
        ),
        Metric::new(
            ("buffstreams_in_flight_bytes", Gauge, Bytes),
            BOTH,
            "Bytes of the frames in flight, without those that wait in a spool.",
            Value::One(|sum| sum.sent.in_flight_bytes as u64),
        ),
        Metric::new(
            ("buffstreams_written_bytes_total", Counter, Bytes),
            BOTH,
            "Bytes that sockets took, before TLS.",
            Value::One(|sum| sum.sent.written_bytes),
        ),
        Metric::new(
            ("buffstreams_spool_bytes", Gauge, Bytes),
            CONNECTION,
            "Bytes of messages that wait in a spool.",
            Value::Maybe(|sum| sum.spool.map(|spool| spool.bytes)),
        ),
        Metric::new(
            ("buffstreams_spool_failed_bytes", Gauge, Bytes),
            CONNECTION,
            "Bytes of messages that were rejected, and are kept in a spool.",
            Value::Maybe(|sum| sum.spool.map(|spool| spool.failed)),
        ),
        Metric::new(
            ("buffstreams_spool_capacity_bytes", Gauge, Bytes),
            CONNECTION,
            "Bytes that a spool may hold.",
            Value::Maybe(|sum| sum.spool.map(|spool| spool.capacity)),
        ),
    ]
};
