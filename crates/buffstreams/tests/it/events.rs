//! What a connection tells of itself: events in their order, and streams that do not get on.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use buffstreams::{
    Backoff, Bytes, Connection, ConnectionBuilder, Delivery, Event, Events, FailedReason, HandlerError, Listener, Peer,
    PeerAddress, Retry, ServerEvent, ServerEvents, State, StreamId, async_handler,
};
use tokio::io::AsyncWriteExt;
use tokio::sync::Semaphore;

use crate::support::{APART, Recorder, bind_again, closed, connect, in_time, until};

const DEADLINE: Duration = Duration::from_secs(20);

fn acked() -> ConnectionBuilder {
    let backoff = Backoff { min: Duration::from_millis(1), max: Duration::from_millis(20) };
    Connection::builder().delivery(Delivery::Acked).backoff(backoff)
}

async fn next(events: &mut Events) -> Option<Event> {
    in_time("an event", events.next()).await
}

#[tokio::test]
async fn a_connection_tells_when_it_is_connected_lost_and_closed() {
    let recorder = Recorder::default();
    let server = Listener::bind("127.0.0.1:0").await.unwrap().spawn(recorder.clone());
    let connection = acked().dial_lazy(server.local_address()).unwrap();
    let mut events = connection.events();
    assert!(matches!(next(&mut events).await, Some(Event::Connected { .. })));
    connection.reopen();
    assert!(matches!(next(&mut events).await, Some(Event::Lost { .. })));
    assert_eq!(next(&mut events).await, Some(Event::Resumed { acknowledged: 0 }));
    assert!(matches!(next(&mut events).await, Some(Event::Connected { .. })));
    in_time("it is closed", connection.close(DEADLINE)).await.unwrap();
    assert!(matches!(next(&mut events).await, Some(Event::Closed { why: "it was closed" })));
    assert_eq!(next(&mut events).await, None);
    assert_eq!(next(&mut connection.events()).await, None, "nothing happens any more");
}

#[tokio::test]
async fn a_watcher_who_is_slow_learns_how_much_he_missed() {
    let recorder = Recorder::default();
    let server = Listener::bind("127.0.0.1:0").await.unwrap().spawn(recorder.clone());
    let connection = acked().dial(server.local_address()).await.unwrap();
    let (mut slow, mut quick) = (connection.events(), connection.events());
    for _ in 0..40 {
        connection.reopen();
        assert!(matches!(next(&mut quick).await, Some(Event::Lost { .. })));
        assert!(matches!(next(&mut quick).await, Some(Event::Resumed { .. })));
        assert!(matches!(next(&mut quick).await, Some(Event::Connected { .. })));
    }
    assert_eq!(next(&mut slow).await, Some(Event::Missed(120 - 64)));
    assert!(matches!(next(&mut slow).await, Some(Event::Connected { .. })));
    let stats = connection.stats();
    assert_eq!((stats.connected, stats.lost, stats.resumed), (41, 40, 40));
}

#[tokio::test]
async fn a_receiver_that_lost_its_state_is_told_with_what_may_be_handled_twice() {
    let permits = Arc::new(Semaphore::new(3));
    let seen = Arc::new(AtomicU64::new(0));
    let service = || {
        let (permits, seen) = (Arc::clone(&permits), Arc::clone(&seen));
        async_handler(move |_message: Bytes, _peer: Peer| {
            let (permits, seen) = (Arc::clone(&permits), Arc::clone(&seen));
            async move {
                seen.fetch_add(1, Ordering::Relaxed);
                permits.acquire().await.unwrap().forget();
                Ok(())
            }
        })
    };
    let first = Listener::bind(APART).await.unwrap().spawn(service());
    let address = first.local_address().clone();
    let connection = acked().dial(&address.to_string()[..]).await.unwrap();
    let mut events = connection.events();
    for number in 0..10_u64 {
        connection.send(&number.to_be_bytes()).await.unwrap();
    }
    until("three are settled, and the fourth is in hand", || {
        connection.stats().settled == 3 && seen.load(Ordering::Relaxed) == 4
    })
    .await;
    first.shutdown(Duration::ZERO).await;
    permits.add_permits(100);
    let _second = bind_again(Listener::builder(), &address).await.spawn(service());
    in_time("it is flushed", connection.flush()).await.unwrap();
    let lost = loop {
        match next(&mut events).await.unwrap() {
            Event::ReceiverStateLost { from, to } => break (from, to),
            Event::Closed { why } => panic!("{why}"),
            _ => {}
        }
    };
    assert_eq!(lost, (4, 10));
}

#[tokio::test]
async fn what_has_nothing_in_flight_is_never_stalled() {
    let server = Listener::bind("127.0.0.1:0").await.unwrap().spawn(Recorder::default());
    let connection = acked().stall_after(Duration::ZERO).dial_lazy(server.local_address()).unwrap();
    let mut events = connection.events();
    until("it is connected", || connection.state() == State::Connected).await;
    in_time("it is closed", connection.close(DEADLINE)).await.unwrap();
    while let Some(event) = next(&mut events).await {
        assert!(!matches!(event, Event::Stalled { in_flight: 0, .. }), "{event:?}");
    }
}

#[tokio::test]
async fn a_stream_that_gets_on_no_more_is_stalled_and_then_is_not() {
    let permits = Arc::new(Semaphore::new(1));
    let service = async_handler({
        let permits = Arc::clone(&permits);
        move |_message: Bytes, _peer: Peer| {
            let permits = Arc::clone(&permits);
            async move {
                permits.acquire().await.unwrap().forget();
                Ok(())
            }
        }
    });
    let server = Listener::bind("127.0.0.1:0").await.unwrap().spawn(service);
    let connection = acked().stall_after(Duration::from_millis(200)).dial(server.local_address()).await.unwrap();
    let mut events = connection.events();
    assert_eq!(connection.stats().stalled, Duration::ZERO);
    for number in 0..5_u64 {
        connection.send(&number.to_be_bytes()).await.unwrap();
    }
    let Some(Event::Stalled { in_flight, stalled }) = next(&mut events).await else { panic!("it is stalled") };
    assert_eq!(in_flight, 4);
    assert!(stalled >= Duration::from_millis(200));
    assert!(connection.stats().stalled >= stalled, "it goes on");
    permits.add_permits(4);
    in_time("it is flushed", connection.flush()).await.unwrap();
    assert_eq!(connection.stats().stalled, Duration::ZERO);
    in_time("it is closed", connection.close(DEADLINE)).await.unwrap();
    assert!(matches!(next(&mut events).await, Some(Event::Closed { .. })), "told once");
}

#[tokio::test]
async fn a_claim_to_have_stored_what_was_never_sent_is_refused_and_told() {
    struct Claims;
    impl buffstreams::Service for Claims {
        type Handler = buffstreams::Discard;
        fn connected(self: Arc<Self>, _: &Peer) -> buffstreams::Discard {
            buffstreams::Discard
        }
        fn stored(&self, _: StreamId) -> Option<u64> {
            Some(1_000)
        }
    }
    let server = Listener::bind("127.0.0.1:0").await.unwrap().spawn(Claims);
    let connection = acked().retry(Retry::Forever).dial_lazy(server.local_address()).unwrap();
    let mut events = connection.events();
    assert!(matches!(next(&mut events).await, Some(Event::Lost { .. })));
    let Some(Event::Refused { why }) = next(&mut events).await else { panic!("it is refused") };
    assert!(why.contains("1000") && why.contains("last one sent is 0"), "{why}");
    assert_eq!(connection.refusal(), Some(why));
}

#[tokio::test]
async fn a_stream_that_goes_on_is_told_as_resumed_with_what_was_finished_meanwhile() {
    // The handler finishes two messages, and is at the third, when the connection is lost.
    let permits = Arc::new(Semaphore::new(0));
    let seen = Arc::new(AtomicU64::new(0));
    let service = async_handler({
        let (permits, seen) = (Arc::clone(&permits), Arc::clone(&seen));
        move |_message: Bytes, _peer: Peer| {
            let (permits, seen) = (Arc::clone(&permits), Arc::clone(&seen));
            async move {
                seen.fetch_add(1, Ordering::Relaxed);
                permits.acquire().await.unwrap().forget();
                Ok(())
            }
        }
    });
    let server = Listener::bind("127.0.0.1:0").await.unwrap().spawn(service);
    let connection = acked().dial(server.local_address()).await.unwrap();
    let mut events = connection.events();
    for number in 0..5_u64 {
        connection.send(&number.to_be_bytes()).await.unwrap();
    }
    until("the first is in hand", || seen.load(Ordering::Relaxed) == 1).await;
    let settled = connection.stats().settled;
    connection.reopen();
    permits.add_permits(5);
    assert!(matches!(next(&mut events).await, Some(Event::Lost { .. })));
    let Some(Event::Resumed { acknowledged }) = next(&mut events).await else { panic!("it goes on") };
    assert!(settled + acknowledged <= 5, "{acknowledged} beside {settled}");
    assert!(matches!(next(&mut events).await, Some(Event::Connected { .. })));
    in_time("it is flushed", connection.flush()).await.unwrap();
    assert_eq!(seen.load(Ordering::Relaxed), 5, "none was handled twice");
    assert_eq!(connection.stats().resumed, 1);
}

#[tokio::test]
async fn failed_messages_are_told_by_reason_and_not_one_by_one() {
    let server = Listener::bind("127.0.0.1:0").await.unwrap().spawn(|_: &[u8]| Err(HandlerError::rejected(1, "never")));
    let connection = acked().on_failed(drop).dial(server.local_address()).await.unwrap();
    let mut events = connection.events();
    for _ in 0..1000 {
        connection.send(b"refused").await.unwrap();
    }
    in_time("it is flushed", connection.flush()).await.unwrap();
    connection.close(DEADLINE).await.unwrap();
    let (mut told, mut times) = (0, 0);
    while let Some(event) = next(&mut events).await {
        match event {
            Event::Failed { reason, count } => {
                assert_eq!(reason, FailedReason::Rejected);
                told += count;
                times += 1;
            }
            Event::Missed(_) => panic!("too many events"),
            _ => {}
        }
    }
    assert_eq!(told, 1000, "also the last ones, before the end");
    assert!(times < 1000, "{times}");
    assert_eq!(connection.stats().failed_for(FailedReason::Rejected), 1000);
}

async fn next_of_server(events: &mut ServerEvents) -> Option<ServerEvent> {
    in_time("an event", events.next()).await
}

#[tokio::test]
async fn a_server_tells_who_comes_who_goes_and_who_is_not_let_in() {
    let listener = Listener::builder().max_connections(1).bind("127.0.0.1:0").await.unwrap();
    let server = listener.spawn(Recorder::default());
    let mut events = server.events();
    let mut first = connect(server.local_address()).await;
    let peer = PeerAddress::Tcp(first.local_addr().unwrap());
    assert_eq!(next_of_server(&mut events).await, Some(ServerEvent::Opened { peer: peer.clone(), id: 0 }));
    let mut second = connect(server.local_address()).await;
    let stranger = PeerAddress::Tcp(second.local_addr().unwrap());
    closed(&mut second).await;
    let Some(ServerEvent::Refused { peer: refused, why }) = next_of_server(&mut events).await else {
        panic!("refused")
    };
    assert_eq!(refused, stranger);
    assert!(why.contains('1'), "{why}");
    first.write_all(&[0xff; 16]).await.unwrap();
    closed(&mut first).await;
    let Some(ServerEvent::Ended { peer: gone, id: 0, why, is_broken: true }) = next_of_server(&mut events).await else {
        panic!("it has ended")
    };
    assert_eq!(gone, peer);
    assert!(why.contains("maximum"), "{why}");
    drop(connect(server.local_address()).await);
    assert!(matches!(next_of_server(&mut events).await, Some(ServerEvent::Opened { id: 1, .. })));
    let ended = next_of_server(&mut events).await;
    assert!(matches!(ended, Some(ServerEvent::Ended { id: 1, is_broken: false, .. })), "{ended:?}");
    in_time("it is shut down", server.shutdown(DEADLINE)).await;
    assert_eq!(next_of_server(&mut events).await, Some(ServerEvent::Closed));
    assert_eq!(next_of_server(&mut events).await, None);
}

#[tokio::test]
async fn a_watcher_of_a_server_who_is_slow_learns_how_much_he_missed() {
    let server = Listener::bind("127.0.0.1:0").await.unwrap().spawn(Recorder::default());
    let mut events = server.events();
    for _ in 0..100 {
        drop(connect(server.local_address()).await);
    }
    until("all have come and gone", || server.stats().connected == 100 && server.stats().open == 0).await;
    assert_eq!(next_of_server(&mut events).await, Some(ServerEvent::Missed(200 - 64)));
}
