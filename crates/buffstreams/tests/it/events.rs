//! What a connection tells of itself: events in their order, and streams that do not get on.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use buffstreams::{
    Backoff, Bytes, Connection, ConnectionBuilder, Delivery, Event, Events, Listener, Peer, Retry, StreamId,
    async_handler,
};
use tokio::sync::Semaphore;

use crate::support::{Recorder, in_time, until};

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
        assert!(matches!(next(&mut quick).await, Some(Event::Connected { .. })));
    }
    assert_eq!(next(&mut slow).await, Some(Event::Missed(80 - 64)));
    assert!(matches!(next(&mut slow).await, Some(Event::Lost { .. })));
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
    let first = Listener::bind("127.0.0.1:0").await.unwrap().spawn(service());
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
    let _second = Listener::bind(&address.to_string()[..]).await.unwrap().spawn(service());
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
