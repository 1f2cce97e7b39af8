//! Messages spread over several connections: who gets them, and what becomes of them where one is slow or dies.

use std::collections::BTreeSet;
use std::pin::pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use buffstreams::{
    Backoff, Bytes, Connection, ConnectionBuilder, Delivery, ErrorKind, FailedMessage, FailedReason, Listener,
    Overflow, Peer, Prefix, Retry, Server, Service, State, async_handler,
};
use futures_util::FutureExt;
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, mpsc};

use crate::support::{APART, PATIENCE, Recorder, bind_again, in_time, until};

const DEADLINE: Duration = Duration::from_secs(20);

fn builder() -> ConnectionBuilder {
    Connection::builder().backoff(Backoff { min: Duration::from_millis(1), max: Duration::from_millis(20) })
}

/// Each connection has room for few messages, and all that are not acknowledged are in hand.
fn acked() -> ConnectionBuilder {
    builder().delivery(Delivery::Acked).window(8 * 1024).memory(16 * 1024)
}

async fn serve(service: impl Service) -> (Server, String) {
    let server = Listener::bind(APART).await.unwrap().spawn(service);
    let address = server.local_address().to_string();
    (server, address)
}

/// A service that finishes messages as it is permitted to, and notes their numbers.
#[derive(Clone)]
struct Valve {
    permits: Arc<Semaphore>,
    numbers: Arc<Mutex<Vec<u64>>>,
}

impl Valve {
    fn shut() -> Valve {
        Valve { permits: Arc::new(Semaphore::new(0)), numbers: Arc::default() }
    }

    fn open(&self) {
        self.permits.close();
    }

    fn service(&self) -> impl Service + use<> {
        let Valve { permits, numbers } = self.clone();
        async_handler(move |message: Bytes, _: Peer| {
            let (permits, numbers) = (Arc::clone(&permits), Arc::clone(&numbers));
            async move {
                // Open, there are no permits any more, and none is needed.
                let _ = permits.acquire().await;
                numbers.lock().unwrap().push(number(&message));
                Ok(())
            }
        })
    }

    fn numbers(&self) -> Vec<u64> {
        self.numbers.lock().unwrap().clone()
    }
}

/// A message of about a kilobyte.
fn message(number: u64) -> Vec<u8> {
    [&number.to_be_bytes()[..], &[0; 1000]].concat()
}

fn number(message: &[u8]) -> u64 {
    u64::from_be_bytes(message[..8].try_into().unwrap())
}

#[tokio::test]
async fn those_who_have_nothing_in_hand_share_evenly() {
    let receivers = [Recorder::default(), Recorder::default(), Recorder::default()];
    let mut servers = Vec::new();
    for receiver in &receivers {
        servers.push(serve(receiver.clone()).await);
    }
    let spread = builder().dial_spread([&servers[0].1, &servers[1].1, &servers[2].1]).await.unwrap();
    let are_connected = || spread.connections().iter().all(|connection| connection.state() == State::Connected);
    until("all are connected", are_connected).await;
    for number in 0..3_000 {
        spread.send(&message(number)).await.unwrap();
        tokio::task::yield_now().await;
    }
    assert_eq!(in_time("a flush", spread.flush()).await.unwrap().settled, 3_000);
    let stats = in_time("closing", spread.close(DEADLINE)).await.unwrap();
    assert_eq!((stats.accepted, stats.settled, stats.failed), (3_000, 3_000, 0));
    let shares = receivers.map(|receiver| receiver.count());
    assert_eq!(shares.iter().sum::<usize>(), 3_000);
    assert!(shares.iter().all(|share| *share > 500), "{shares:?}");
    assert_eq!(spread.send(b"x").await.unwrap_err().kind(), ErrorKind::Closed);
    let refused = spread.send_bytes(Bytes::from_static(b"x")).await.unwrap_err();
    assert_eq!((refused.error.kind(), &refused.message[..]), (ErrorKind::Closed, &b"x"[..]));
}

#[tokio::test]
async fn one_that_is_stalled_gets_no_more_than_it_has_room_for_and_the_others_get_the_rest() {
    const MESSAGES: u64 = 2_000;
    let valves = [Valve::shut(), Valve::shut(), Valve::shut()];
    let [(_one, one), (_two, two), (_three, three)] =
        [serve(valves[0].service()).await, serve(valves[1].service()).await, serve(valves[2].service()).await];
    valves[1].open();
    valves[2].open();
    let spread = acked().dial_spread([one, two, three]).await.unwrap();
    for number in 0..MESSAGES {
        in_time("it is accepted", spread.send(&message(number))).await.unwrap();
    }
    until("the others are done", || spread.stats().in_flight == spread.connections()[0].stats().in_flight).await;
    let stalled = spread.connections()[0].stats();
    assert!((1..=16).contains(&stalled.in_flight), "{stalled:?}");
    let stats = spread.stats();
    assert!(stats.is_conserved());
    assert_eq!((stats.accepted, stats.settled), (MESSAGES, MESSAGES - stalled.in_flight));
    assert_eq!(stats.in_flight_bytes, stalled.in_flight_bytes);

    valves[0].open();
    assert_eq!(in_time("a flush", spread.flush()).await.unwrap().settled, MESSAGES);
    in_time("closing", spread.close(DEADLINE)).await.unwrap();
    let all: Vec<_> = valves.iter().flat_map(Valve::numbers).collect();
    assert_eq!(all.len() as u64, MESSAGES);
    assert!(all.into_iter().collect::<BTreeSet<_>>().into_iter().eq(0..MESSAGES), "each once");
    assert!(valves.iter().all(|valve| valve.numbers().is_sorted()), "in order on each connection");
}

#[tokio::test]
async fn where_all_are_full_a_message_waits_for_the_first_that_has_room() {
    for last in 0..2 {
        let valves = [Valve::shut(), Valve::shut()];
        let [(_one, one), (_two, two)] = [serve(valves[0].service()).await, serve(valves[1].service()).await];
        let spread = acked().dial_spread([one, two]).await.unwrap();
        until("both are connected", || spread.connections().iter().all(|one| one.state() == State::Connected)).await;
        let mut sent = 0;
        while spread.try_send(&message(sent)).is_ok() {
            sent += 1;
        }
        let error = spread.try_send(&message(0)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Full);
        let waiting = tokio::spawn({
            let spread = spread.clone();
            async move {
                spread.send(&message(sent)).await.unwrap();
                spread.send_bytes(message(sent + 1).into()).await.unwrap();
            }
        });
        tokio::task::yield_now().await;
        valves[last].open();
        in_time("there is room", waiting).await.unwrap();
        assert_eq!(valves[1 - last].numbers(), [] as [u64; 0]);
        valves[1 - last].open();
        assert_eq!(in_time("closing", spread.close(DEADLINE)).await.unwrap().settled, sent + 2);
    }
    let valve = Valve::shut();
    let (_server, address) = serve(valve.service()).await;
    let spread = acked().overflow(Overflow::Fail).dial_spread([address]).await.unwrap();
    let mut sent = 0;
    while spread.send(&message(sent)).await.is_ok() {
        sent += 1;
    }
    assert_eq!(spread.send(&message(0)).await.unwrap_err().kind(), ErrorKind::Full, "if the policy does not wait");
}

#[tokio::test]
async fn where_the_oldest_make_room_a_message_waits_until_failed_ones_are_taken() {
    let (server, nobody) = serve(Recorder::default()).await;
    server.shutdown(DEADLINE).await;
    let (owner, mut failed) = mpsc::channel(1);
    // Each attempt to connect would wake who waits, too.
    let endless = Duration::from_secs(600);
    let builder = builder().backoff(Backoff { min: endless, max: endless }).failed_to(owner);
    let builder = builder.overflow(Overflow::FailOldest).memory(16 * 1024);
    let spread = builder.dial_spread(nobody).await.unwrap();
    while spread.try_send(&message(0)).is_ok() {}
    let waiting = tokio::spawn(async move {
        for number in 0..100 {
            spread.send(&message(number)).await.unwrap();
            spread.send_bytes(message(number).into()).await.unwrap();
        }
    });
    tokio::task::yield_now().await;
    assert!(!waiting.is_finished(), "failed messages take the room");
    let taking = tokio::spawn(async move { while failed.recv().await.is_some() {} });
    in_time("there is room", waiting).await.unwrap();
    in_time("all are taken", taking).await.unwrap();
}

#[tokio::test]
async fn a_message_that_needs_all_the_room_of_a_connection_waits_for_it() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let builder = builder().prefix(Prefix::U32Be).max_message_size(64 * 1024).memory(16 * 1024);
    let spread = builder.dial_spread(address).await.unwrap();
    let (mut peer, _) = in_time("it connects", listener.accept()).await.unwrap();
    // Until the kernel takes no more, and a little is left here.
    let is_drained = || async {
        while spread.stats().in_flight > 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    loop {
        spread.try_send(&[0; 4_000]).unwrap();
        if tokio::time::timeout(Duration::from_millis(200), is_drained()).await.is_err() {
            break;
        }
    }
    let waiting = tokio::spawn({
        let spread = spread.clone();
        async move { spread.send(&[0; 60_000]).await }
    });
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert!(!waiting.is_finished());
    let reading = tokio::spawn(async move { tokio::io::copy(&mut peer, &mut tokio::io::sink()).await });
    in_time("there is room", waiting).await.unwrap().unwrap();
    in_time("closing", spread.close(DEADLINE)).await.unwrap();
    reading.abort();
}

#[tokio::test]
async fn one_that_is_lost_gets_nothing_until_it_is_back_and_then_its_share() {
    let (first, second) = (Recorder::default(), Recorder::default());
    let (one, one_address) = serve(first.clone()).await;
    let (_two, two_address) = serve(second.clone()).await;
    let spread = builder().dial_spread([&one_address, &two_address]).await.unwrap();
    let [one_of, two_of] = spread.connections() else { panic!("one for each") };
    until("both are connected", || [one_of, two_of].iter().all(|of| of.state() == State::Connected)).await;
    one.shutdown(DEADLINE).await;
    until("the loss is seen", || one_of.state() != State::Connected).await;
    for number in 0..500 {
        spread.send(&message(number)).await.unwrap();
    }
    assert_eq!(one_of.stats().accepted, 0);
    let _one = bind_again(Listener::builder(), &one_address).await.spawn(first.clone());
    until("it is back", || one_of.state() == State::Connected).await;
    let mut number = 500;
    in_time("it gets some", async {
        while one_of.stats().accepted == 0 {
            spread.send(&message(number)).await.unwrap();
            number += 1;
        }
    })
    .await;
    let stats = in_time("closing", spread.close(DEADLINE)).await.unwrap();
    assert_eq!((stats.accepted, stats.settled), (number, number));
    assert_eq!(first.count() + second.count(), number as usize);
}

#[tokio::test]
async fn of_one_that_dies_every_message_is_accounted_for_and_the_others_go_on() {
    const MESSAGES: u64 = 1_000;
    let valves = [Valve::shut(), Valve::shut()];
    let [(one, one_address), (_two, two_address)] =
        [serve(valves[0].service()).await, serve(valves[1].service()).await];
    valves[1].open();
    let (owner, mut failed) = mpsc::channel(2_000);
    let builder = acked().retry(Retry::Attempts(2)).failed_to(owner);
    let spread = builder.dial_spread([&one_address, &two_address]).await.unwrap();
    let sent = Arc::new(AtomicU64::new(0));
    let sending = tokio::spawn({
        let (spread, sent) = (spread.clone(), Arc::clone(&sent));
        async move {
            for number in 0..MESSAGES {
                spread.send(&message(number)).await.unwrap();
                sent.fetch_add(1, Ordering::Relaxed);
                tokio::task::yield_now().await;
            }
        }
    });
    until("some are sent", || sent.load(Ordering::Relaxed) > MESSAGES / 2).await;
    assert!(spread.connections()[0].stats().in_flight > 0);
    one.shutdown(Duration::ZERO).await;
    in_time("all are accepted", sending).await.unwrap();
    in_time("it gives up", spread.connections()[0].closed()).await;
    let flushed = in_time("a flush", spread.flush()).await.unwrap();
    let stats = spread.stats();
    assert!(stats.is_conserved() && stats.in_flight == 0 && flushed.failed > 0, "{stats:?}");
    assert_eq!((stats.accepted, stats.settled, stats.failed), (MESSAGES, flushed.settled, flushed.failed));
    assert_eq!(FailedReason::ALL.iter().map(|reason| stats.failed_for(*reason)).sum::<u64>(), stats.failed);
    assert!(stats.connected >= 2 && stats.lost > 0 && stats.written_bytes > 0, "{stats:?}");
    let mut all: BTreeSet<u64> = valves.iter().flat_map(Valve::numbers).collect();
    for _ in 0..flushed.failed {
        let FailedMessage { message, .. } = in_time("a failed one", failed.recv()).await.unwrap();
        all.insert(number(&message));
    }
    assert!(all.into_iter().eq(0..MESSAGES), "handled, or handed back");
    assert_eq!(spread.connections()[0].state(), State::Closed);
    spread.send(&message(0)).await.unwrap();
    in_time("closing", spread.close(PATIENCE)).await.unwrap();
}

#[tokio::test]
async fn it_is_closed_when_the_last_connection_has_given_up() {
    let [(one, one_address), (two, two_address)] = [serve(Recorder::default()).await, serve(Recorder::default()).await];
    let spread = builder().retry(Retry::Never).dial_spread([&one_address, &two_address]).await.unwrap();
    until("both are connected", || spread.stats().connected == 2).await;
    let mut closed = pin!(spread.closed());
    one.shutdown(Duration::ZERO).await;
    in_time("one gives up", spread.connections()[0].closed()).await;
    assert!(closed.as_mut().now_or_never().is_none(), "the other one takes messages");
    spread.send(&message(0)).await.unwrap();
    two.shutdown(Duration::ZERO).await;
    in_time("both have given up", closed).await;
    assert_eq!(spread.send(&message(1)).await.unwrap_err().kind(), ErrorKind::Closed);
}
