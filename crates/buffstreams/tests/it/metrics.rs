//! What is published through the facade of `metrics`: the table of the documentation, no more and no less, and true.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use buffstreams::{
    Backoff, Connection, Delivery, FailedReason, Framing, HandlerError, Listener, Message, Peer, Prefix, Retry, Spool,
    per_connection,
};
use metrics::{Counter, Gauge, Histogram, Key, KeyName, Metadata, SharedString, Unit};
use tokio::io::AsyncWriteExt;

use crate::support::{Echo, Recorder, closed, connect, frames, in_time, is_alone, passes_alone, read_messages, until};

const DEADLINE: Duration = Duration::from_secs(20);

/// What was published, and how it was described.
#[derive(Clone, Default)]
struct Board(Arc<Mutex<Inside>>);

#[derive(Default)]
struct Inside {
    described: BTreeMap<String, (&'static str, Unit)>,
    values: BTreeMap<String, Series>,
}

struct Series {
    kind: &'static str,
    name: String,
    labels: BTreeMap<String, String>,
    value: Arc<AtomicU64>,
}

impl Board {
    /// What there is now.
    fn now() -> Board {
        let board = Board::default();
        metrics::with_local_recorder(&board, || drop(buffstreams::metrics::publish()));
        board
    }

    fn series(&self, kind: &'static str, key: &Key) -> Arc<AtomicU64> {
        let labels = key.labels().map(|label| (label.key().to_owned(), label.value().to_owned())).collect();
        let series = Series { kind, name: key.name().to_owned(), labels, value: Arc::default() };
        let mut inside = self.0.lock().unwrap();
        Arc::clone(&inside.values.entry(key.to_string()).or_insert(series).value)
    }

    /// The sum over all reasons of what a source of this name has published; `None` if it has not.
    fn get(&self, source: &str, metric: &str) -> Option<u64> {
        let inside = self.0.lock().unwrap();
        let of_source = |series: &&Series| series.name == metric && series.labels["name"] == source;
        let values = inside.values.values().filter(of_source).map(|series| match series.kind {
            "gauge" => f64::from_bits(series.value.load(Ordering::Relaxed)) as u64,
            _ => series.value.load(Ordering::Relaxed),
        });
        values.reduce(|sum, value| sum + value)
    }

    #[track_caller]
    fn assert(&self, source: &str, expected: &[(&str, u64)]) {
        for (metric, value) in expected {
            assert_eq!(self.get(source, &format!("buffstreams_{metric}")), Some(*value), "{metric} of {source}");
        }
        self.assert_conserved(source);
    }

    #[track_caller]
    fn assert_conserved(&self, source: &str) {
        let get = |what: &str| self.get(source, &format!("buffstreams_messages_{what}")).unwrap_or_default();
        let came = get("recovered_total") + get("accepted_total");
        let went = get("settled_total") + get("failed_total") + get("left_total") + get("in_flight");
        assert_eq!(came, went, "the messages of {source}");
    }
}

impl metrics::Recorder for Board {
    fn describe_counter(&self, name: KeyName, unit: Option<Unit>, help: SharedString) {
        assert!(help.ends_with('.'), "{help}");
        self.0.lock().unwrap().described.insert(name.as_str().to_owned(), ("counter", unit.unwrap()));
    }

    fn describe_gauge(&self, name: KeyName, unit: Option<Unit>, help: SharedString) {
        assert!(help.ends_with('.'), "{help}");
        self.0.lock().unwrap().described.insert(name.as_str().to_owned(), ("gauge", unit.unwrap()));
    }

    fn describe_histogram(&self, _: KeyName, _: Option<Unit>, _: SharedString) {
        panic!("there is none");
    }

    fn register_counter(&self, key: &Key, _: &Metadata<'_>) -> Counter {
        Counter::from_arc(self.series("counter", key))
    }

    fn register_gauge(&self, key: &Key, _: &Metadata<'_>) -> Gauge {
        Gauge::from_arc(self.series("gauge", key))
    }

    fn register_histogram(&self, _: &Key, _: &Metadata<'_>) -> Histogram {
        panic!("there is none");
    }
}

fn quick() -> Backoff {
    Backoff { min: Duration::from_millis(1), max: Duration::from_millis(20) }
}

fn plain_frames(messages: &[&str]) -> Vec<u8> {
    frames(Framing::new(Prefix::Buffstreams), messages)
}

#[tokio::test]
async fn a_listener_tells_what_it_received_refused_and_sent_back() {
    let listener = Listener::builder().name("listener-of-metrics").max_connections(2);
    let server = listener.bind("127.0.0.1:0").await.unwrap().spawn(per_connection(|peer: &Peer| {
        let mut echo = Echo(peer.clone());
        Choosy(move |message: Message<'_>| match message.as_slice() {
            b"bad" => Err(HandlerError::new("it is bad")),
            _ => buffstreams::Handler::message(&mut echo, message),
        })
    }));
    let mut first = connect(server.local_address()).await;
    first.write_all(&plain_frames(&["one", "bad", "three"])).await.unwrap();
    assert_eq!(read_messages(&mut first, Framing::new(Prefix::Buffstreams), 2).await.len(), 2);
    let mut second = connect(server.local_address()).await;
    second.write_all(&[0xff; 16]).await.unwrap();
    closed(&mut second).await;
    let mut third = connect(server.local_address()).await;
    until("two are open", || server.stats().open == 2).await;
    closed(&mut connect(server.local_address()).await).await;
    until("one was refused", || server.stats().refused == 1).await;
    let expected = [
        ("connections_open", 2),
        ("connections_opened_total", 3),
        ("connections_broken_total", 1),
        ("connections_refused_total", 1),
        ("throttled_total", 0),
        ("streams_forgotten_total", 0),
        ("messages_received_total", 3),
        ("received_bytes_total", 11),
        ("handler_errors_total", 1),
        // Replies: also those of connections that are open.
        ("messages_accepted_total", 2),
        ("messages_settled_total", 2),
        ("messages_failed_total", 0),
        ("messages_in_flight", 0),
        ("written_bytes_total", 14),
    ];
    Board::now().assert("listener-of-metrics", &expected);
    first.shutdown().await.unwrap();
    third.shutdown().await.unwrap();
    in_time("it is shut down", server.shutdown(DEADLINE)).await;
    Board::now().assert("listener-of-metrics", &[("connections_open", 0), ("messages_settled_total", 2)]);
}

struct Choosy<F>(F);

impl<F: FnMut(Message<'_>) -> buffstreams::HandlerResult + Send + 'static> buffstreams::Handler for Choosy<F> {
    fn message(&mut self, message: Message<'_>) -> buffstreams::HandlerResult {
        (self.0)(message)
    }
}

#[tokio::test]
async fn a_stream_that_goes_on_elsewhere_is_counted_as_moved() {
    let name = "moved-of-metrics";
    let one = Listener::bind("127.0.0.1:0").await.unwrap().spawn(|_: &[u8]| Ok(()));
    let two = Listener::bind("127.0.0.1:0").await.unwrap().spawn(|_: &[u8]| Ok(()));
    let builder = Connection::builder().delivery(Delivery::Acked).name(name).backoff(quick());
    let connection = builder.dial([one.local_address(), two.local_address()]).await.unwrap();
    Board::now().assert(name, &[("streams_moved_total", 0)]);
    in_time("one is shut down", one.shutdown(DEADLINE)).await;
    until("it goes on elsewhere", || connection.stats().moved == 1).await;
    Board::now().assert(name, &[("streams_moved_total", 1), ("streams_resumed_total", 0)]);
}

#[tokio::test]
async fn connections_tell_what_became_of_their_messages_as_long_as_they_live_and_after() {
    let name = "connections-of-metrics";
    let dial = || Connection::builder().delivery(Delivery::Acked).name(name).backoff(quick());
    let server = Listener::bind("127.0.0.1:0").await.unwrap().spawn(|message: &[u8]| match message {
        b"bad" => Err(HandlerError::rejected(7, "it is bad")),
        _ => Ok(()),
    });
    let first = dial().dial(server.local_address()).await.unwrap();
    let second = dial().stall_after(Duration::from_millis(1)).dial_lazy("unix:/nobody/is/here").unwrap();
    for message in ["one", "bad", "three"] {
        first.send(message.as_bytes()).await.unwrap();
    }
    in_time("it is flushed", first.flush()).await.unwrap();
    second.send(b"waits").await.unwrap();
    until("some attempts have failed", || second.stats().failed_attempts > 2).await;
    let board = Board::now();
    let expected = [
        ("connections_open", 1),
        ("connections_down", 1),
        ("connections_opened_total", 1),
        ("stalled_connections", 1),
        ("messages_accepted_total", 4),
        ("messages_settled_total", 2),
        ("messages_failed_total", 1),
        ("messages_in_flight", 1),
    ];
    board.assert(name, &expected);
    assert!(board.get(name, "buffstreams_connect_failures_total") > Some(2));
    assert!(board.get(name, "buffstreams_in_flight_bytes") > Some(5));
    assert!(board.get(name, "buffstreams_written_bytes_total") > Some(11));
    assert_eq!(board.get(name, "buffstreams_connections_broken_total"), None, "that is for listeners");
    first.reopen();
    until("it goes on", || first.stats().resumed == 1).await;
    Board::now().assert(name, &[("connection_losses_total", 1), ("streams_resumed_total", 1)]);

    in_time("it is closed", second.close(Duration::ZERO)).await.unwrap();
    in_time("it is closed", first.close(DEADLINE)).await.unwrap();
    let expected = [
        ("connections_open", 0),
        ("connections_down", 0),
        ("stalled_connections", 0),
        ("messages_accepted_total", 4),
        ("messages_failed_total", 2),
        ("messages_in_flight", 0),
        ("in_flight_bytes", 0),
    ];
    until("both have ended", || Board::now().get(name, "buffstreams_connections_down") == Some(0)).await;
    Board::now().assert(name, &expected);
}

#[tokio::test]
async fn every_reason_of_failure_is_published_apart() {
    let name = "reasons-of-metrics";
    let connection = Connection::builder().name(name).retry(Retry::Never).dial_lazy("unix:/nobody/is/here").unwrap();
    for _ in 0..3 {
        let _ = connection.send(b"lost").await;
    }
    in_time("it gives up", connection.closed()).await;
    let stats = connection.stats();
    let board = Board::now();
    let inside = board.0.lock().unwrap();
    let of_reason = |reason: FailedReason| {
        let is_it = |series: &&Series| {
            series.name == "buffstreams_messages_failed_total"
                && series.labels["name"] == name
                && series.labels["reason"] == reason.name()
        };
        inside.values.values().find(is_it).expect("there is one for each").value.load(Ordering::Relaxed)
    };
    for &reason in FailedReason::ALL {
        assert_eq!(of_reason(reason), stats.failed_for(reason), "{reason}");
    }
    assert_eq!(stats.failed_for(FailedReason::RetryExhausted), stats.failed);
}

#[tokio::test]
async fn a_spool_tells_what_it_holds_and_what_was_left_in_it() {
    let name = "spool-of-metrics";
    let folder = tempfile::tempdir().unwrap();
    let dial = |address: &str| {
        let spool = Spool::builder().max_bytes(1 << 20).open(folder.path()).unwrap();
        Connection::builder().name(name).backoff(quick()).dial_spooled(address, spool).unwrap()
    };
    let connection = dial("unix:/nobody/is/here");
    for _ in 0..3 {
        connection.send(b"waits").await.unwrap();
    }
    let board = Board::now();
    board.assert(name, &[("messages_accepted_total", 3), ("messages_in_flight", 3), ("spool_capacity_bytes", 1 << 20)]);
    assert!(board.get(name, "buffstreams_spool_bytes") > Some(15));
    in_time("it is closed", connection.close(Duration::ZERO)).await.unwrap();
    until("it has ended", || Board::now().get(name, "buffstreams_messages_left_total") == Some(3)).await;
    Board::now().assert(name, &[("messages_in_flight", 0), ("spool_bytes", 0), ("spool_capacity_bytes", 0)]);

    let server = Listener::bind("127.0.0.1:0").await.unwrap().spawn(|_: &[u8]| Err(HandlerError::rejected(1, "never")));
    let connection = dial(&server.local_address().to_string());
    Board::now().assert(name, &[("messages_recovered_total", 3), ("messages_in_flight", 3)]);
    in_time("it is flushed", connection.flush()).await.unwrap();
    until("that is on disk", || Board::now().get(name, "buffstreams_spool_failed_bytes") > Some(15)).await;
    Board::now().assert(name, &[("messages_failed_total", 3), ("messages_in_flight", 0)]);
    in_time("it is closed", connection.close(DEADLINE)).await.unwrap();
}

/// The table of the documentation: name, type, unit, roles.
fn documented() -> Vec<[String; 4]> {
    let source = include_str!("../../src/metrics.rs");
    let rows = source.lines().filter_map(|line| line.strip_prefix("//! | `")).map(|row| {
        let cells: Vec<_> = row.split('|').map(|cell| cell.trim().trim_matches('`').to_owned()).collect();
        [0, 1, 2, 3].map(|index| cells[index].clone())
    });
    rows.collect()
}

#[tokio::test]
async fn what_is_published_is_what_is_documented_under_conventional_names() {
    let folder = tempfile::tempdir().unwrap();
    let spool = Spool::open(folder.path()).unwrap();
    let server = Listener::builder().name("all").bind("127.0.0.1:0").await.unwrap().spawn(Recorder::default());
    let connection = Connection::builder().name("all").dial_spooled(server.local_address(), spool).unwrap();
    connection.send(b"hello").await.unwrap();
    in_time("it is flushed", connection.flush()).await.unwrap();
    let board = Board::now();
    let inside = board.0.lock().unwrap();
    let mut published: BTreeMap<&str, (&str, BTreeSet<&str>)> = BTreeMap::new();
    for series in inside.values.values() {
        let labels: BTreeSet<_> = series.labels.keys().map(String::as_str).collect();
        let has_reason = ["connections_broken", "connections_refused", "messages_failed"];
        let expected: BTreeSet<_> = match has_reason.iter().any(|part| series.name.contains(part)) {
            true => ["name", "reason", "role"].into(),
            false => ["name", "role"].into(),
        };
        assert_eq!(labels, expected, "{}", series.name);
        let (kind, roles) = published.entry(&series.name).or_default();
        *kind = series.kind;
        roles.insert(&series.labels["role"]);
    }
    let documented = documented();
    assert!(documented.len() > 20, "the table was not found");
    let names: BTreeSet<_> = documented.iter().map(|row| row[0].as_str()).collect();
    assert_eq!(names, published.keys().copied().collect(), "documented, and published");
    for [name, kind, unit, roles] in &documented {
        let (published_kind, published_roles) = &published[name.as_str()];
        assert_eq!(kind, published_kind, "{name}");
        let both = ["connection", "listener"];
        let roles: BTreeSet<_> = if roles == "both" { both.into() } else { [roles.as_str()].into() };
        assert_eq!(roles, *published_roles, "{name}");
        let (described_kind, described_unit) = inside.described[name.as_str()];
        assert_eq!((described_kind, described_unit == Unit::Bytes), (kind.as_str(), unit == "bytes"), "{name}");

        // https://prometheus.io/docs/practices/naming
        let is_plain = name.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'_');
        assert!(is_plain && name.starts_with("buffstreams_"), "{name}");
        assert_eq!(name.ends_with("_total"), kind == "counter", "{name}");
        assert_eq!(name.trim_end_matches("_total").ends_with("_bytes"), unit == "bytes", "{name}");
    }
}

/// With a recorder that belongs to the whole process, which other tests must not meet.
#[tokio::test]
#[ignore = "a part of another test, which runs it as a process of its own"]
async fn by_themselves_alone() {
    if !is_alone() {
        return;
    }
    let board = Board::default();
    metrics::set_global_recorder(board.clone()).unwrap();
    let server = Listener::builder().name("in").bind("127.0.0.1:0").await.unwrap().spawn(Recorder::default());
    let connection = Connection::builder().name("out").dial(server.local_address()).await.unwrap();
    for _ in 0..1000 {
        connection.send(b"hello").await.unwrap();
    }
    // Nobody asks for anything: within a second or so it is there.
    until("it is published", || board.get("in", "buffstreams_messages_received_total") == Some(1000)).await;
    connection.send(b"hello").await.unwrap();
    in_time("it is closed", connection.close(DEADLINE)).await.unwrap();
    board
        .assert("out", &[("messages_accepted_total", 1001), ("messages_settled_total", 1001), ("connections_open", 0)]);
    in_time("it is shut down", server.shutdown(DEADLINE)).await;
    board.assert("in", &[("messages_received_total", 1001), ("received_bytes_total", 5005), ("connections_open", 0)]);
}

#[test]
fn by_themselves_they_are_published_every_second_and_are_exact_at_the_end() {
    passes_alone("metrics::by_themselves_alone");
}
