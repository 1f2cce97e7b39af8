//! Several endpoints for one connection: which is dialled when, and what a stream that moves says of it.
//!
//! Where the pause between attempts is a minute, a test that passes has needed none.

use std::collections::BTreeSet;
use std::net::{SocketAddr, TcpStream as Blocking};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use buffstreams::{
    Address, Backoff, Bytes, Connection, ConnectionBuilder, Delivery, Discard, Endpoints, ErrorKind, Event, Events,
    FailedMessage, FailedReason, Listener, Manager, Peer, PeerAddress, Retry, Server, Service, Spool, async_handler,
    blocking, per_connection,
};
use socket2::{Domain, Socket, Type};
use tokio::io::{AsyncReadExt, copy_bidirectional};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, mpsc, watch};

use crate::support::{APART, PATIENCE, Recorder, bind_again, in_time, until};

const DEADLINE: Duration = Duration::from_secs(20);

/// Longer than a test may take.
const ENDLESS: Backoff = Backoff { min: Duration::from_secs(600), max: Duration::from_secs(600) };

const QUICK: Backoff = Backoff { min: Duration::from_millis(1), max: Duration::from_millis(20) };

fn builder() -> ConnectionBuilder {
    Connection::builder().backoff(ENDLESS)
}

fn acked() -> ConnectionBuilder {
    builder().delivery(Delivery::Acked).endpoint_patience(ENDLESS.min)
}

async fn serve(service: impl Service) -> (Server, String) {
    let server = Listener::bind(APART).await.unwrap().spawn(service);
    let address = server.local_address().to_string();
    (server, address)
}

fn list(addresses: &[&str]) -> String {
    addresses.join(",")
}

/// A port that nobody listens on, held so that nobody else will.
fn nobody() -> (Socket, String) {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    socket.set_reuse_address(true).unwrap();
    socket.bind(&"127.0.0.1:0".parse::<SocketAddr>().unwrap().into()).unwrap();
    let address = socket.local_addr().unwrap().as_socket().unwrap().to_string();
    (socket, address)
}

/// A port whose queue is full and never emptied: the kernel drops whatever else comes, as a firewall does.
fn black_hole() -> (Socket, Vec<Blocking>, String) {
    let (socket, address) = nobody();
    socket.listen(0).unwrap();
    let address_of_it: SocketAddr = address.parse().unwrap();
    let mut queued = Vec::new();
    while let Ok(stream) = Blocking::connect_timeout(&address_of_it, Duration::from_millis(200)) {
        queued.push(stream);
        assert!(queued.len() < 100, "the queue does not fill");
    }
    (socket, queued, address)
}

async fn next(events: &mut Events) -> Event {
    in_time("an event", events.next()).await.expect("it is not over")
}

/// The next move, and what follows it up to the connection.
async fn moved(events: &mut Events) -> (Event, Option<(u64, u64)>) {
    let mut found = None;
    let mut lost = None;
    loop {
        match next(events).await {
            event @ Event::Moved { .. } => found = Some(event),
            Event::ReceiverStateLost { from, to } => lost = Some((from, to)),
            Event::Connected { .. } if found.is_some() => return (found.unwrap(), lost),
            Event::Closed { why } => panic!("{why}"),
            _ => {}
        }
    }
}

fn address(text: &str) -> Address {
    text.parse().unwrap()
}

fn numbered(number: usize) -> Vec<u8> {
    format!("message {number}").into_bytes()
}

/// A service that finishes only as many messages as it is permitted to.
fn permitted(permits: &Arc<Semaphore>, seen: &Arc<AtomicU64>) -> impl Service {
    let (permits, seen) = (Arc::clone(permits), Arc::clone(seen));
    async_handler(move |_message: Bytes, _peer: Peer| {
        let (permits, seen) = (Arc::clone(&permits), Arc::clone(&seen));
        async move {
            seen.fetch_add(1, Ordering::Relaxed);
            permits.acquire().await.unwrap().forget();
            Ok(())
        }
    })
}

#[test]
fn endpoints_are_one_address_or_several_whatever_they_are_given_as() {
    let two = Endpoints::try_from(["a:1", "b:2"]).unwrap();
    assert_eq!(two.addresses(), [address("a:1"), address("b:2")]);
    assert_eq!(two.first(), &address("a:1"));
    let socket: SocketAddr = "127.0.0.1:1".parse().unwrap();
    for same in [
        Endpoints::try_from("a:1,b:2"),
        Endpoints::try_from(String::from("a:1, b:2")),
        Endpoints::try_from(vec![address("a:1"), address("b:2")]),
        Endpoints::try_from(&["a:1", "b:2"].map(address)[..]),
        two.to_string().parse(),
    ] {
        assert_eq!(same.unwrap(), two);
    }
    for (text, addresses) in [
        ("a:1", vec!["a:1"]),
        ("[::1]:5,unix:/run/b.sock,:7", vec!["[::1]:5", "unix:/run/b.sock", ":7"]),
        ("unix:/run/a.sock", vec!["unix:/run/a.sock"]),
        ("a:1,a:1", vec!["a:1", "a:1"]),
    ] {
        let endpoints: Endpoints = text.parse().unwrap();
        assert_eq!(endpoints.addresses(), addresses.into_iter().map(address).collect::<Vec<_>>(), "{text}");
        assert_eq!(endpoints.to_string(), text);
    }
    assert_eq!(Endpoints::from(socket).to_string(), "127.0.0.1:1");
    let with_comma = Address::Unix("/run/a,b".into());
    assert_eq!(Endpoints::from(&with_comma).addresses(), [with_comma]);
    for (text, what) in [
        ("", "no port"),
        ("a:1,", "\"\" has no port"),
        ("a:1,,b:2", "no port"),
        ("a:1,b", "\"b\""),
        ("a:1,::1:5", "brackets"),
    ] {
        let error = text.parse::<Endpoints>().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidAddress);
        assert!(error.to_string().contains(what), "{text}: {error}");
    }
    assert_eq!(Endpoints::try_from(Vec::<Address>::new()).unwrap_err().kind(), ErrorKind::InvalidAddress);
}

#[tokio::test]
async fn a_dial_takes_the_first_that_answers_in_their_order() {
    let (_held, down) = nobody();
    let (first, second) = (Recorder::default(), Recorder::default());
    let (one, one_address) = serve(first.clone()).await;
    let (other, other_address) = serve(second.clone()).await;
    for delivery in [Delivery::Sent, Delivery::Acked] {
        let builder = builder().delivery(delivery);
        let connection = builder.dial(list(&[&down, &one_address, &other_address])).await.unwrap();
        connection.send(b"x").await.unwrap();
        assert_eq!(in_time("closing", connection.close(DEADLINE)).await.unwrap().settled, 1);
    }
    let lazy = builder().dial_lazy([&down, &one_address]).unwrap();
    lazy.send(b"x").await.unwrap();
    assert_eq!(in_time("closing", lazy.close(DEADLINE)).await.unwrap().settled, 1);
    first.has(3).await;
    assert_eq!((one.stats().connected, other.stats().connected), (3, 0));
}

#[tokio::test]
async fn a_failed_dial_names_every_address_and_what_each_had_against_it() {
    let ((_one, one), (_two, two)) = (nobody(), nobody());
    let missing = "unix:/does/not/exist";
    let error = Connection::dial([&one, &two, missing]).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Connect);
    let text = error.to_string();
    for address in [&one, &two, missing] {
        assert!(text.contains(&format!("cannot connect to {address}: ")), "{text}");
    }
    assert_eq!(text.matches("Connection refused").count(), 2, "{text}");

    let (_server, plain) = serve_without_sessions(Recorder::default()).await;
    let error = in_time("the refusals", acked().dial([&plain, &one])).await.unwrap_err();
    let text = error.to_string();
    assert_eq!(error.kind(), ErrorKind::Connect);
    assert!(text.contains(&format!("cannot open a session with {plain}: this listener takes no sessions")), "{text}");
    assert!(text.contains(&format!("cannot connect to {one}: ")), "{text}");
}

async fn serve_without_sessions(service: impl Service) -> (Server, String) {
    let listener = Listener::builder().sessions(false).bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_address().to_string();
    (listener.spawn(service), address)
}

#[tokio::test]
async fn a_stream_goes_to_the_next_where_the_first_refuses_it_for_good() {
    let recorder = Recorder::default();
    let (refusing, plain) = serve_without_sessions(Recorder::default()).await;
    let (_server, good) = serve(recorder.clone()).await;
    let dialled = in_time("the second grants it", acked().dial([&plain, &good])).await.unwrap();
    let lazy = acked().dial_lazy([&plain, &good]).unwrap();
    for connection in [dialled, lazy] {
        connection.send(b"x").await.unwrap();
        assert_eq!(in_time("closing", connection.close(DEADLINE)).await.unwrap().settled, 1);
    }
    assert_eq!((recorder.count(), refusing.stats().messages), (2, 0));
}

#[tokio::test]
async fn a_stream_that_all_refuse_for_good_is_given_up() {
    let (_one, one) = serve_without_sessions(Recorder::default()).await;
    let (_two, two) = serve_without_sessions(Recorder::default()).await;
    let (owner, mut failed) = mpsc::channel(8);
    let connection = acked().failed_to(owner).dial_lazy([&one, &two]).unwrap();
    connection.send(b"x").await.unwrap();
    let FailedMessage { reason, attempts, .. } = in_time("it comes back", failed.recv()).await.unwrap();
    assert_eq!((reason, attempts), (FailedReason::Refused, 1));
    in_time("it gives up", connection.closed()).await;

    // One that only does not answer may still grant it.
    let (_held, down) = nobody();
    let connection = acked().backoff(QUICK).dial_lazy([&one, &down]).unwrap();
    let mut events = connection.events();
    for _ in 0..3 {
        while !matches!(next(&mut events).await, Event::Refused { .. }) {}
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn when_the_first_dies_under_load_the_second_has_the_rest_in_order_and_without_a_pause() {
    const MESSAGES: usize = 50_000;
    // More of them than any buffer of the kernel holds.
    let large = |number| [numbered(number), vec![b' '; 1_000]].concat();
    for delivery in [Delivery::Sent, Delivery::Acked] {
        let (first, second) = (Recorder::default(), Recorder::default());
        let (one, one_address) = serve(first.clone()).await;
        let (_other, other_address) = serve(second.clone()).await;
        let builder = builder().delivery(delivery).endpoint_patience(Duration::ZERO);
        let connection = builder.dial([&one_address, &other_address]).await.unwrap();
        let sending = tokio::spawn({
            let connection = connection.clone();
            async move {
                for number in 0..MESSAGES {
                    connection.send(&large(number)).await.unwrap();
                }
            }
        });
        first.has(MESSAGES / 10).await;
        one.shutdown(Duration::ZERO).await;
        in_time("all are sent", sending).await.unwrap();
        let stats = in_time("closing", connection.close(DEADLINE)).await.unwrap();
        assert_eq!((stats.accepted, stats.settled, stats.failed), (MESSAGES as u64, MESSAGES as u64, 0));
        until("the last is there", || second.messages().last() == Some(&large(MESSAGES - 1))).await;
        let (before, after) = (first.messages(), second.messages());
        let sent: Vec<_> = (0..MESSAGES).map(large).collect();
        assert!(!after.is_empty() && sent.starts_with(&before) && sent.ends_with(&after), "whole, and in order");
        if delivery == Delivery::Acked {
            assert!(before.len() + after.len() >= MESSAGES, "nothing is lost");
        }
    }
}

#[tokio::test]
async fn after_the_loss_of_the_second_the_first_has_its_turn_again_but_a_good_connection_stays() {
    let (one, one_address) = serve(Recorder::default()).await;
    let (two, two_address) = serve(Recorder::default()).await;
    // So that every socket counts as a healthy one.
    let backoff = Backoff { min: Duration::ZERO, max: Duration::ZERO };
    let connection = Connection::builder().backoff(backoff).dial([&one_address, &two_address]).await.unwrap();
    let mut events = connection.events();
    let at = |text: &str| Event::Connected { peer: PeerAddress::Tcp(text.parse().unwrap()) };
    assert_eq!(next(&mut events).await, at(&one_address));
    one.shutdown(Duration::ZERO).await;
    assert!(matches!(next(&mut events).await, Event::Lost { .. }));
    assert_eq!(next(&mut events).await, at(&two_address));
    let one = bind_again(Listener::builder(), &one_address).await.spawn(Recorder::default());
    connection.send(b"x").await.unwrap();
    until("the second has it", || two.stats().messages == 1).await;
    assert_eq!(one.stats().connected, 0, "nobody leaves a good connection");
    two.shutdown(Duration::ZERO).await;
    assert!(matches!(next(&mut events).await, Event::Lost { .. }));
    assert_eq!(next(&mut events).await, at(&one_address));
    let two = bind_again(Listener::builder(), &two_address).await.spawn(Recorder::default());
    connection.reopen();
    assert!(matches!(next(&mut events).await, Event::Lost { .. }));
    assert_eq!(next(&mut events).await, at(&one_address), "in their order");
    assert_eq!(two.stats().connected, 0);
}

#[tokio::test]
async fn a_crowd_that_is_lost_together_does_not_fall_back_at_one_moment() {
    // Where the machine does much else, all their moments may be over before the first of them has its turn.
    let mut spreads = Vec::new();
    while spreads.last().is_none_or(|spread| *spread < Duration::from_millis(30)) {
        assert!(spreads.len() < 20, "each time all within {spreads:?}");
        spreads.push(fall_back_together().await);
    }
}

/// How long it takes a crowd of 40 to arrive at its second place.
async fn fall_back_together() -> Duration {
    let (one, one_address) = serve(Recorder::default()).await;
    let arrivals = Arc::new(Mutex::new(Vec::new()));
    let (_two, two_address) = serve({
        let arrivals = Arc::clone(&arrivals);
        per_connection(move |_: &Peer| {
            arrivals.lock().unwrap().push(Instant::now());
            Discard
        })
    })
    .await;
    let mut crowd = Vec::new();
    for _ in 0..40 {
        crowd.push(builder().dial([&one_address, &two_address]).await.unwrap());
    }
    one.shutdown(Duration::ZERO).await;
    until("all are there", || arrivals.lock().unwrap().len() == crowd.len()).await;
    let arrivals = arrivals.lock().unwrap();
    *arrivals.last().unwrap() - arrivals[0]
}

/// Accepts every connection, and closes it at once.
async fn slams() -> (Arc<AtomicU64>, String) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let count = Arc::new(AtomicU64::new(0));
    let counter = Arc::clone(&count);
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            counter.fetch_add(1, Ordering::Relaxed);
            let _ = stream.read(&mut [0; 16]).await;
        }
    });
    (count, address)
}

#[tokio::test]
async fn places_that_accept_and_close_are_tried_once_a_round_and_then_there_is_a_pause() {
    let ((one, one_address), (two, two_address)) = (slams().await, slams().await);
    let connection = acked().dial_lazy([&one_address, &two_address]).unwrap();
    until("each was tried", || two.load(Ordering::Relaxed) == 1).await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_eq!((one.load(Ordering::Relaxed), two.load(Ordering::Relaxed)), (1, 1));
    drop(connection);

    let (three, three_address) = slams().await;
    let connection =
        acked().backoff(QUICK).retry(Retry::Attempts(3)).dial_lazy([&one_address, &three_address]).unwrap();
    in_time("it gives up", connection.closed()).await;
    assert_eq!((one.load(Ordering::Relaxed), three.load(Ordering::Relaxed)), (4, 3), "an attempt is a round");
}

#[tokio::test]
async fn a_place_that_was_lost_in_good_health_has_its_turn_after_the_others() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let one = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            // Longer than the longest pause: that is good health.
            tokio::time::sleep(3 * QUICK.max).await;
            drop(stream);
        }
    });
    let (_server, two) = serve(Recorder::default()).await;
    let connection = Connection::builder().backoff(QUICK).dial([&one.to_string(), &two]).await.unwrap();
    let mut events = connection.events();
    assert_eq!(next(&mut events).await, Event::Connected { peer: PeerAddress::Tcp(one) });
    assert!(matches!(next(&mut events).await, Event::Lost { .. }));
    assert_eq!(next(&mut events).await, Event::Connected { peer: PeerAddress::Tcp(two.parse().unwrap()) });
}

#[tokio::test]
async fn without_a_retry_the_others_are_still_tried_once() {
    let recorder = Recorder::default();
    let (one, one_address) = serve(Recorder::default()).await;
    let (two, two_address) = serve(recorder.clone()).await;
    let connection = builder().retry(Retry::Never).dial([&one_address, &two_address]).await.unwrap();
    one.shutdown(Duration::ZERO).await;
    connection.send(b"x").await.unwrap();
    recorder.has(1).await;
    two.shutdown(Duration::ZERO).await;
    in_time("it gives up", connection.closed()).await;
}

#[cfg(target_os = "linux")]
#[tokio::test]
async fn an_address_that_swallows_everything_takes_only_its_share_of_the_time() {
    let (_socket, _queued, hole) = tokio::task::spawn_blocking(black_hole).await.unwrap();
    let recorder = Recorder::default();
    let (server, good) = serve(recorder.clone()).await;
    let builder = builder().connect_deadline(Duration::from_secs(2));
    let connection = builder.clone().dial([&hole, &good]).await.unwrap();
    connection.send(b"x").await.unwrap();
    recorder.has(1).await;
    drop(connection);

    server.shutdown(DEADLINE).await;
    let error = builder.dial([&hole, &good]).await.unwrap_err();
    let text = error.to_string();
    assert!(text.contains(&format!("cannot connect to {hole}: no answer within 1s")), "{text}");
    assert!(text.contains(&format!("cannot connect to {good}: Connection refused")), "{text}");
}

#[tokio::test]
async fn one_that_accepts_and_says_nothing_takes_only_its_share_of_the_time() {
    let hole = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let silent = hole.local_addr().unwrap().to_string();
    let recorder = Recorder::default();
    let (server, good) = serve(recorder.clone()).await;
    // A silence would be noticed only after half an hour.
    let builder = acked().connect_deadline(Duration::from_secs(2)).heartbeat(ENDLESS.min);
    let connection = in_time("the other answers", builder.clone().dial([&silent, &good])).await.unwrap();
    connection.send(b"x").await.unwrap();
    recorder.has(1).await;
    in_time("it is closed", connection.close(DEADLINE)).await.unwrap();

    server.shutdown(DEADLINE).await;
    let error = in_time("none answers", builder.dial([&silent, &good])).await.unwrap_err();
    let text = error.to_string();
    assert!(text.contains(&format!("cannot open a session with {silent}: no answer within 1s")), "{text}");
    assert!(text.contains(&format!("cannot connect to {good}: Connection refused")), "{text}");
}

#[tokio::test]
async fn a_stream_stays_where_its_messages_in_flight_are() {
    let (permits, seen) = (Arc::new(Semaphore::new(3)), Arc::new(AtomicU64::new(0)));
    let (one, one_address) = serve(permitted(&permits, &seen)).await;
    let (two, two_address) = serve(Recorder::default()).await;
    let connection = acked().backoff(QUICK).dial([&one_address, &two_address]).await.unwrap();
    let mut events = connection.events();
    for number in 0..10 {
        connection.send(&numbered(number)).await.unwrap();
    }
    until("three are settled, and the fourth is in hand", || {
        connection.stats().settled == 3 && seen.load(Ordering::Relaxed) == 4
    })
    .await;
    one.shutdown(Duration::ZERO).await;
    while !matches!(next(&mut events).await, Event::Lost { .. }) {}
    // Many attempts would fit into this.
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_eq!(two.stats().connected, 0, "it stays");

    let back = Recorder::default();
    let _one = bind_again(Listener::builder(), &one_address).await.spawn(back.clone());
    in_time("it is flushed", connection.flush()).await.unwrap();
    assert_eq!(back.messages(), (3..10).map(numbered).collect::<Vec<_>>());
    assert_eq!(two.stats().connected, 0);
    let lost = loop {
        match next(&mut events).await {
            Event::ReceiverStateLost { from, to } => break (from, to),
            Event::Connected { .. } | Event::Moved { .. } => panic!("it is the same endpoint, and has lost its state"),
            _ => {}
        }
    };
    assert_eq!(lost, (4, 10));
}

/// A stream with three messages settled and seven in flight at the first of two endpoints, which then dies.
async fn bereft(builder: ConnectionBuilder) -> (Connection, Events, Recorder, Server, [String; 2]) {
    let (permits, seen) = (Arc::new(Semaphore::new(3)), Arc::new(AtomicU64::new(0)));
    let (one, one_address) = serve(permitted(&permits, &seen)).await;
    let second = Recorder::default();
    let (two, two_address) = serve(second.clone()).await;
    let connection = builder.dial([&one_address, &two_address]).await.unwrap();
    for number in 0..10 {
        connection.send(&numbered(number)).await.unwrap();
    }
    until("three are settled, and the fourth is in hand", || {
        connection.stats().settled == 3 && seen.load(Ordering::Relaxed) == 4
    })
    .await;
    let events = connection.events();
    one.shutdown(Duration::ZERO).await;
    (connection, events, second, two, [one_address, two_address])
}

#[tokio::test]
async fn a_stream_that_cannot_stay_moves_and_says_what_may_be_handled_twice() {
    for builder in [
        // Its patience is at an end, in the middle of a pause.
        acked().endpoint_patience(Duration::from_millis(100)),
        // The retry policy allows nothing more.
        acked().retry(Retry::Never),
        acked().backoff(QUICK).retry(Retry::Attempts(2)),
        acked().backoff(QUICK).retry(Retry::For(Duration::from_millis(100))),
    ] {
        let (connection, mut events, second, _two, [one, two]) = bereft(builder).await;
        let (event, lost) = moved(&mut events).await;
        assert_eq!(event, Event::Moved { from: address(&one), to: address(&two), in_flight: 7 });
        assert_eq!(lost, Some((4, 10)));
        in_time("it is flushed", connection.flush()).await.unwrap();
        assert_eq!(second.messages(), (3..10).map(numbered).collect::<Vec<_>>(), "and nothing is lost");
        let stats = in_time("closing", connection.close(DEADLINE)).await.unwrap();
        assert_eq!((stats.accepted, stats.settled, stats.failed), (10, 10, 0));
        assert_eq!((stats.moved, stats.resumed), (1, 0));
    }
}

#[tokio::test]
async fn a_stream_that_its_endpoint_refuses_for_good_does_not_wait_for_it() {
    let (connection, mut events, second, _two, [one, _]) = bereft(acked().backoff(QUICK)).await;
    let listener = bind_again(Listener::builder().sessions(false), &one).await;
    let _one = listener.spawn(Recorder::default());
    let (event, lost) = moved(&mut events).await;
    assert!(matches!(event, Event::Moved { in_flight: 7, .. }) && lost == Some((4, 10)), "{event:?} {lost:?}");
    in_time("it is flushed", connection.flush()).await.unwrap();
    assert_eq!(second.count(), 7);
}

#[tokio::test]
async fn a_stream_with_nothing_in_flight_moves_at_once_and_nothing_is_at_risk() {
    let (first, second) = (Recorder::default(), Recorder::default());
    let (one, one_address) = serve(first.clone()).await;
    let (_two, two_address) = serve(second.clone()).await;
    let connection = acked().dial([&one_address, &two_address]).await.unwrap();
    let mut events = connection.events();
    for number in 0..10 {
        connection.send(&numbered(number)).await.unwrap();
    }
    in_time("it is flushed", connection.flush()).await.unwrap();
    one.shutdown(DEADLINE).await;
    for number in 10..20 {
        connection.send(&numbered(number)).await.unwrap();
    }
    in_time("it is flushed", connection.flush()).await.unwrap();
    let (event, lost) = moved(&mut events).await;
    assert_eq!(event, Event::Moved { from: address(&one_address), to: address(&two_address), in_flight: 0 });
    assert_eq!(lost, None);
    assert_eq!(first.messages(), (0..10).map(numbered).collect::<Vec<_>>());
    assert_eq!(second.messages(), (10..20).map(numbered).collect::<Vec<_>>());
}

/// The way to a server, which can be shut: then connections break, and new ones are closed.
struct Door {
    is_open: watch::Sender<bool>,
    address: String,
}

impl Door {
    async fn to(server: String) -> Door {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let (is_open, watched) = watch::channel(true);
        tokio::spawn(async move {
            while let Ok((mut outside, _)) = listener.accept().await {
                let (server, mut watched) = (server.clone(), watched.clone());
                tokio::spawn(async move {
                    let mut inside = TcpStream::connect(server).await.unwrap();
                    tokio::select! {
                        biased;
                        _ = watched.wait_for(|is_open| !is_open) => {}
                        _ = copy_bidirectional(&mut outside, &mut inside) => {}
                    }
                });
            }
        });
        Door { is_open, address }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn however_often_a_stream_moves_between_receivers_that_live_none_misses_what_the_other_has_not() {
    let receivers = [Recorder::default(), Recorder::default()];
    let (_one, one) = serve(receivers[0].clone()).await;
    let (_two, two) = serve(receivers[1].clone()).await;
    let doors = [Door::to(one).await, Door::to(two).await];
    let builder = acked().backoff(QUICK).window(64 * 1024).endpoint_patience(Duration::ZERO);
    let connection = builder.dial([&doors[0].address, &doors[1].address]).await.unwrap();
    let mut events = connection.events();
    let stop = Arc::new(AtomicBool::new(false));
    let sending = tokio::spawn({
        let (connection, stop) = (connection.clone(), Arc::clone(&stop));
        async move {
            let mut sent = 0_u64;
            while !stop.load(Ordering::Relaxed) {
                connection.send(&sent.to_be_bytes()).await.unwrap();
                sent += 1;
            }
            sent
        }
    });
    let (mut here, mut at_risk) = (0, 0);
    for _ in 0..20 {
        let some = receivers[here].count() + 1_000;
        until("the stream gets on", || receivers[here].count() >= some).await;
        doors[here].is_open.send_replace(false);
        let (Event::Moved { to, in_flight, .. }, lost) = moved(&mut events).await else { unreachable!("it is a move") };
        assert_eq!(to, address(&doors[1 - here].address));
        assert_eq!(lost.map_or(0, |(from, to)| to + 1 - from), in_flight);
        at_risk += in_flight;
        doors[here].is_open.send_replace(true);
        here = 1 - here;
    }
    stop.store(true, Ordering::Relaxed);
    let sent = sending.await.unwrap();
    let stats = in_time("closing", connection.close(DEADLINE)).await.unwrap();
    assert_eq!((stats.accepted, stats.settled, stats.failed), (sent, sent, 0));
    let numbers = receivers.map(|receiver| {
        let number = |message: Vec<u8>| u64::from_be_bytes(message.try_into().unwrap());
        receiver.messages().into_iter().map(number).collect::<Vec<_>>()
    });
    for numbers in &numbers {
        assert!(numbers.is_sorted_by(|one, next| one < next), "in order, and none twice at one receiver");
    }
    let all: BTreeSet<_> = numbers.iter().flatten().collect();
    assert_eq!(all.len() as u64, sent, "none is lost");
    let twice = numbers[0].len() + numbers[1].len() - all.len();
    assert!(twice as u64 <= at_risk, "{twice} were handled at both, and {at_risk} were told");
}

#[tokio::test]
async fn a_spooled_stream_stays_and_moves_like_any() {
    let folder = tempfile::tempdir().unwrap();
    let (permits, seen) = (Arc::new(Semaphore::new(3)), Arc::new(AtomicU64::new(0)));
    let (one, one_address) = serve(permitted(&permits, &seen)).await;
    let second = Recorder::default();
    let (two, two_address) = serve(second.clone()).await;
    let builder = acked().backoff(QUICK).endpoint_patience(Duration::from_millis(500));
    let spool = Spool::open(folder.path()).unwrap();
    let connection = builder.dial_spooled([&one_address, &two_address], spool).unwrap();
    let mut events = connection.events();
    for number in 0..10 {
        connection.send(&numbered(number)).await.unwrap();
    }
    until("three are settled, and the fourth is in hand", || {
        connection.stats().settled == 3 && seen.load(Ordering::Relaxed) == 4
    })
    .await;
    one.shutdown(Duration::ZERO).await;
    while !matches!(next(&mut events).await, Event::Lost { .. }) {}
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert_eq!(two.stats().connected, 0, "it stays");
    let (event, lost) = moved(&mut events).await;
    let Event::Moved { from, to, in_flight } = event else { unreachable!("it is a move") };
    assert_eq!((from, to), (address(&one_address), address(&two_address)));
    // What was still on its way from the disk was not written there.
    assert!((1..=7).contains(&in_flight) && lost == Some((4, 3 + in_flight)), "{in_flight} {lost:?}");
    in_time("it is flushed", connection.flush()).await.unwrap();
    assert_eq!(second.messages(), (3..10).map(numbered).collect::<Vec<_>>());
    let stats = in_time("closing", connection.close(DEADLINE)).await.unwrap();
    assert_eq!((stats.accepted, stats.settled, stats.in_flight), (10, 10, 0));
}

#[tokio::test]
async fn a_manager_holds_a_connection_with_several_endpoints_under_the_first() {
    let (_held, down) = nobody();
    let recorder = Recorder::default();
    let (_server, good) = serve(recorder.clone()).await;
    let manager = Manager::new();
    manager.dial([&down, &good]).await.unwrap();
    assert_eq!(manager.dial(&down).await.unwrap_err().kind(), ErrorKind::AlreadyOpen);
    manager.send(&down, b"one").await.unwrap();
    manager.send([&down, &good], b"two").await.unwrap();
    assert_eq!(manager.send(&good, b"x").await.unwrap_err().kind(), ErrorKind::NotOpen);
    recorder.has(2).await;
    assert!(manager.connection(&down).is_some());
    assert_eq!(manager.connections()[0].0, address(&down));
    assert_eq!(manager.close_connection(&down, DEADLINE).await.unwrap().settled, 2);
}

#[test]
fn code_that_blocks_dials_several_endpoints_too() {
    let (_held, down) = nobody();
    let server = blocking::Listener::bind("127.0.0.1:0").unwrap().spawn(|_: &[u8]| Ok(()));
    let good = server.local_address().to_string();
    let connection = blocking::Connection::dial([&down, &good]).unwrap();
    connection.send(b"x").unwrap();
    assert_eq!(connection.close(PATIENCE).unwrap().settled, 1);
    assert_eq!(server.shutdown(PATIENCE).received.messages, 1);
}
