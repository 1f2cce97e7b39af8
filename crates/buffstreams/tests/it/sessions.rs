//! Acknowledged streams over real sockets: what the ladder of promises says of them.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use buffstreams::{
    Backoff, Bytes, Connection, ConnectionBuilder, Delivery, Discard, ErrorKind, FailedMessage, FailedReason, Handler,
    HandlerError, HandlerResult, Listener, Message, Peer, Prefix, Retry, Server, ServerEvent, Service, async_handler,
    blocking_handler, messages, per_connection,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinHandle;

use crate::support::{APART, Echo, amount, bind_again, in_time, until};

const DEADLINE: Duration = Duration::from_secs(20);

/// Longer than a test may take.
const ENDLESS: Backoff = Backoff { min: Duration::from_secs(600), max: Duration::from_secs(600) };

fn acked() -> ConnectionBuilder {
    Connection::builder().delivery(Delivery::Acked)
}

async fn serve(service: impl Service) -> Server {
    Listener::bind(APART).await.unwrap().spawn(service)
}

/// Writes down the numbers that messages bring, in the order in which they come.
#[derive(Clone, Default)]
struct Ledger(Arc<Mutex<Vec<u64>>>);

impl Ledger {
    fn write(&self, message: &[u8]) {
        self.0.lock().unwrap().push(number(message));
    }

    fn numbers(&self) -> Vec<u64> {
        self.0.lock().unwrap().clone()
    }

    fn len(&self) -> usize {
        self.0.lock().unwrap().len()
    }
}

fn number(message: &[u8]) -> u64 {
    u64::from_be_bytes(message[..8].try_into().unwrap())
}

#[tokio::test]
async fn messages_are_settled_when_the_handler_has_returned_and_not_before() {
    let may_return = Arc::new(AtomicBool::new(false));
    let seen = Arc::new(AtomicU64::new(0));
    let service = async_handler({
        let (may_return, seen) = (Arc::clone(&may_return), Arc::clone(&seen));
        move |_message: Bytes, _peer: Peer| {
            let may_return = Arc::clone(&may_return);
            seen.fetch_add(1, Ordering::Relaxed);
            async move {
                until("it may return", || may_return.load(Ordering::Relaxed)).await;
                Ok(())
            }
        }
    });
    let server = serve(service).await;
    let connection = acked().dial(server.local_address()).await.unwrap();
    for number in 0..10_u64 {
        connection.send(&number.to_be_bytes()).await.unwrap();
    }
    until("the first is in hand", || seen.load(Ordering::Relaxed) == 1).await;
    assert_eq!((connection.stats().settled, connection.stats().in_flight), (0, 10));
    may_return.store(true, Ordering::Relaxed);
    let flushed = in_time("it is flushed", connection.flush()).await.unwrap();
    assert_eq!((flushed.settled, flushed.failed), (10, 0));
    let stats = in_time("it is closed", connection.close(DEADLINE)).await.unwrap();
    assert_eq!((stats.accepted, stats.settled), (10, 10));
    assert!(stats.is_conserved());
}

#[tokio::test]
async fn what_is_finished_is_acknowledged_while_others_are_still_in_work() {
    // Nothing wakes the connection but what the session itself has to do.
    let permits = Arc::new(Semaphore::new(0));
    let service = async_handler({
        let permits = Arc::clone(&permits);
        move |message: Bytes, _peer: Peer| {
            let permits = Arc::clone(&permits);
            async move {
                if number(&message) > 0 {
                    drop(permits.acquire().await.unwrap());
                }
                Ok(())
            }
        }
    });
    let server = serve(service.concurrency(8)).await;
    // A heartbeat would bring the acknowledgement along: there is none for long.
    let connection = acked().heartbeat(Duration::from_secs(600)).dial(server.local_address()).await.unwrap();
    for number in 0..8_u64 {
        connection.send(&number.to_be_bytes()).await.unwrap();
    }
    until("the first is settled", || connection.stats().settled == 1).await;
    permits.add_permits(7);
    assert_eq!(in_time("it is flushed", connection.flush()).await.unwrap().settled, 8);
    in_time("it is closed", connection.close(DEADLINE)).await.unwrap();
}

#[tokio::test]
async fn nothing_is_lost_and_nothing_twice_however_often_the_socket_is_replaced() {
    const MESSAGES: u64 = 100_000;
    let ledger = Ledger::default();
    let server = serve({
        let ledger = ledger.clone();
        move |message: &[u8]| {
            ledger.write(message);
            Ok(())
        }
    })
    .await;
    let connection = acked().window(64 * 1024).dial(server.local_address()).await.unwrap();
    for number in 0..MESSAGES {
        connection.send(&number.to_be_bytes()).await.unwrap();
        if number % 5_000 == 4_999 {
            connection.reopen();
        }
    }
    let flushed = in_time("it is flushed", connection.flush()).await.unwrap();
    assert_eq!((flushed.settled, flushed.failed), (MESSAGES, 0));
    assert!(ledger.numbers().into_iter().eq(0..MESSAGES), "in order, none missing and none twice");
    assert!(server.stats().connected > 1);
    in_time("it is closed", connection.close(DEADLINE)).await.unwrap();
}

#[tokio::test]
async fn plain_clients_are_served_beside_sessions_on_the_same_port() {
    for prefix in [Prefix::Buffstreams, Prefix::Varint, Prefix::U32Be, Prefix::U64Le] {
        let seen = Arc::new(AtomicU64::new(0));
        let counter = Arc::clone(&seen);
        let service = move |message: &[u8]| {
            counter.fetch_add(message.len() as u64, Ordering::Relaxed);
            Ok(())
        };
        let server = Listener::builder().prefix(prefix).bind("127.0.0.1:0").await.unwrap().spawn(service);
        let plain = Connection::builder().prefix(prefix).dial(server.local_address()).await.unwrap();
        let session = acked().prefix(prefix).dial(server.local_address()).await.unwrap();
        // 255 bytes: their prefix begins with ff in some framings.
        plain.send(&[7; 255]).await.unwrap();
        session.send(&[7; 1000]).await.unwrap();
        in_time("it is flushed", session.flush()).await.unwrap();
        until("both are there", || seen.load(Ordering::Relaxed) == 1255).await;
        in_time("it is closed", plain.close(DEADLINE)).await.unwrap();
        in_time("it is closed", session.close(DEADLINE)).await.unwrap();
    }
}

#[tokio::test]
async fn what_a_handler_rejects_comes_back_with_its_reason() {
    let service = |message: &[u8]| match message {
        b"bad" => Err(HandlerError::rejected(42, "this one never")),
        _ => Ok(()),
    };
    let server = serve(service).await;
    let (owner, mut failed) = mpsc::channel(8);
    let connection = acked().failed_to(owner).dial(server.local_address()).await.unwrap();
    for message in [&b"good"[..], b"bad", b"good"] {
        connection.send(message).await.unwrap();
    }
    let flushed = in_time("it is flushed", connection.flush()).await.unwrap();
    assert_eq!((flushed.settled, flushed.failed), (2, 1));
    let FailedMessage { number, message, reason, rejection, .. } = in_time("one comes", failed.recv()).await.unwrap();
    assert_eq!((number, &message[..], reason), (1, &b"bad"[..], FailedReason::Rejected));
    let rejection = rejection.unwrap();
    assert_eq!((rejection.code, &rejection.text[..]), (42, "this one never"));
    in_time("it is closed", connection.close(DEADLINE)).await.unwrap();
}

/// Fails over the message "poison", by an error or a panic; counts how often.
async fn poisoned(service: impl FnOnce(Arc<AtomicU64>) -> Server) {
    let tries = Arc::new(AtomicU64::new(0));
    let server = service(Arc::clone(&tries));
    let (owner, mut failed) = mpsc::channel(8);
    let connection = acked().failed_to(owner).dial(server.local_address()).await.unwrap();
    for message in [&b"good"[..], b"poison", b"good"] {
        connection.send(message).await.unwrap();
    }
    let flushed = in_time("it is flushed", connection.flush()).await.unwrap();
    assert_eq!((flushed.settled, flushed.failed), (2, 1));
    let failed = in_time("one comes", failed.recv()).await.unwrap();
    assert_eq!((&failed.message[..], failed.reason), (&b"poison"[..], FailedReason::Rejected));
    assert_eq!(tries.load(Ordering::Relaxed), 3);
    in_time("it is closed", connection.close(DEADLINE)).await.unwrap();
}

fn fails(message: &[u8], tries: &AtomicU64) -> HandlerResult {
    if message == b"poison" {
        tries.fetch_add(1, Ordering::Relaxed);
        return Err(HandlerError::new("not now"));
    }
    Ok(())
}

#[tokio::test]
async fn a_message_that_cannot_be_handled_is_tried_three_times_whatever_the_kind_of_handler() {
    let listener = Listener::bind("127.0.0.1:0").await.unwrap();
    poisoned(|tries| listener.spawn(move |message: &[u8]| fails(message, &tries))).await;
    let listener = Listener::bind("127.0.0.1:0").await.unwrap();
    poisoned(|tries| {
        listener.spawn(async_handler(move |message: Bytes, _| {
            let result = fails(&message, &tries);
            async move { result }
        }))
    })
    .await;
    let listener = Listener::bind("127.0.0.1:0").await.unwrap();
    poisoned(|tries| listener.spawn(blocking_handler(move |message: &[u8], _: &Peer| fails(message, &tries)))).await;
}

#[tokio::test]
async fn a_message_over_which_the_handler_panics_is_tried_three_times_too() {
    let panics = |message: &[u8], tries: &AtomicU64| {
        if fails(message, tries).is_err() {
            std::panic::panic_any("poison");
        }
        Ok(())
    };
    let listener = Listener::bind("127.0.0.1:0").await.unwrap();
    poisoned(|tries| listener.spawn(move |message: &[u8]| panics(message, &tries))).await;
    let listener = Listener::bind("127.0.0.1:0").await.unwrap();
    poisoned(|tries| listener.spawn(blocking_handler(move |message: &[u8], _: &Peer| panics(message, &tries)))).await;
    // In the call of the closure, before there is anything to await; and behind that.
    let listener = Listener::bind("127.0.0.1:0").await.unwrap();
    poisoned(|tries| {
        listener.spawn(async_handler(move |message: Bytes, _| {
            let result = panics(&message, &tries);
            async move { result }
        }))
    })
    .await;
    let listener = Listener::bind("127.0.0.1:0").await.unwrap();
    poisoned(|tries| {
        listener.spawn(async_handler(move |message: Bytes, _| {
            let tries = Arc::clone(&tries);
            async move { panics(&message, &tries) }
        }))
    })
    .await;
}

/// Cannot store the first batch, and says so by an error or a panic.
struct Storing {
    failures: Arc<AtomicU64>,
    seen: Arc<AtomicU64>,
    panics: bool,
}

impl Handler for Storing {
    fn message(&mut self, _: Message<'_>) -> HandlerResult {
        self.seen.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    fn batch_end(&mut self) -> HandlerResult {
        if self.failures.fetch_add(1, Ordering::Relaxed) > 0 {
            return Ok(());
        }
        if self.panics {
            std::panic::panic_any("the disk is full");
        }
        Err(HandlerError::new("the disk is full"))
    }
}

#[tokio::test]
async fn a_batch_that_could_not_be_stored_is_handled_again() {
    for panics in [false, true] {
        let (failures, seen) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
        let storing = {
            let (failures, seen) = (Arc::clone(&failures), Arc::clone(&seen));
            move |_: &Peer| Storing { failures: Arc::clone(&failures), seen: Arc::clone(&seen), panics }
        };
        let server = Listener::bind("127.0.0.1:0").await.unwrap().spawn(per_connection(storing));
        let connection = acked().dial(server.local_address()).await.unwrap();
        connection.send(b"store this").await.unwrap();
        let flushed = in_time("it is flushed", connection.flush()).await.unwrap();
        assert_eq!((flushed.settled, seen.load(Ordering::Relaxed)), (1, 2), "panics: {panics}");
    }
}

/// Keeps messages in hand until it is asked whether it is ready, or has finished. Panics over "poison".
struct Late {
    given: Arc<AtomicU64>,
    tries: Arc<AtomicU64>,
    in_hand: Vec<(u64, Vec<u8>)>,
    finished: Vec<u64>,
    only_at_the_end: bool,
}

impl Handler for Late {
    fn message(&mut self, message: Message<'_>) -> HandlerResult {
        self.in_hand.push((message.number().unwrap(), message.to_vec()));
        self.given.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    fn defers(&self) -> bool {
        true
    }

    fn take_outcomes(&mut self, each: &mut dyn FnMut(u64, HandlerResult)) {
        self.finished.drain(..).for_each(|number| each(number, Ok(())));
    }

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<HandlerResult> {
        if self.only_at_the_end && self.in_hand.iter().any(|(_, message)| message == b"poison") {
            return Poll::Pending;
        }
        self.poll_finished(cx)
    }

    fn poll_finished(&mut self, _: &mut Context<'_>) -> Poll<HandlerResult> {
        for (number, message) in self.in_hand.drain(..) {
            if fails(&message, &self.tries).is_err() {
                std::panic::panic_any("poison");
            }
            self.finished.push(number);
        }
        Poll::Ready(Ok(()))
    }
}

#[tokio::test]
async fn a_handler_that_panics_over_what_it_kept_in_hand_gets_it_three_times() {
    let given = Arc::new(AtomicU64::new(0));
    let late = |tries: &Arc<AtomicU64>, only_at_the_end| {
        let (given, tries) = (Arc::clone(&given), Arc::clone(tries));
        per_connection(move |_: &Peer| Late {
            given: Arc::clone(&given),
            tries: Arc::clone(&tries),
            in_hand: Vec::new(),
            finished: Vec::new(),
            only_at_the_end,
        })
    };
    let listener = Listener::bind("127.0.0.1:0").await.unwrap();
    poisoned(|tries| listener.spawn(late(&tries, false))).await;
    // Where connections come to an end over it: somebody else has to end them.
    let tries = Arc::new(AtomicU64::new(0));
    given.store(0, Ordering::Relaxed);
    let server = Listener::bind("127.0.0.1:0").await.unwrap().spawn(late(&tries, true));
    let connection = acked().dial(server.local_address()).await.unwrap();
    connection.send(b"poison").await.unwrap();
    for before in 0..3 {
        until("it is in hand", || given.load(Ordering::Relaxed) == before + 1).await;
        connection.reopen();
    }
    let flushed = in_time("it is flushed", connection.flush()).await.unwrap();
    assert_eq!((flushed.failed, tries.load(Ordering::Relaxed)), (1, 3));
    assert_eq!(server.stats().messages, 1, "once, however often it was given");
}

#[tokio::test]
async fn a_stream_of_messages_acknowledges_one_when_the_next_is_asked_for() {
    let (service, mut received) = messages();
    let server = serve(service).await;
    let connection = acked().dial(server.local_address()).await.unwrap();
    for number in 0..3_u64 {
        connection.send(&number.to_be_bytes()).await.unwrap();
    }
    let pulled = tokio::spawn(async move {
        for expected in 0..3 {
            let (message, peer) = received.recv().await.unwrap();
            assert_eq!(number(&message), expected);
            assert!(peer.stream_id().is_some());
        }
        received.recv().await
    });
    let flushed = in_time("it is flushed", connection.flush()).await.unwrap();
    assert_eq!(flushed.settled, 3);
    in_time("it is closed", connection.close(DEADLINE)).await.unwrap();
    drop(server);
    assert!(in_time("the stream ends", pulled).await.unwrap().is_none());
}

#[tokio::test]
async fn what_waits_to_be_pulled_does_not_come_again_on_the_next_socket() {
    let (service, mut received) = messages();
    let server = serve(service).await;
    let connection = acked().dial(server.local_address()).await.unwrap();
    for number in 0..3_u64 {
        connection.send(&number.to_be_bytes()).await.unwrap();
        until("it was read", || server.stats().messages == number + 1).await;
    }
    let (message, _) = in_time("one comes", received.recv()).await.unwrap();
    assert_eq!(number(&message), 0);
    connection.reopen();
    until("there is another socket", || connection.stats().connected == 2).await;
    connection.send(&3_u64.to_be_bytes()).await.unwrap();
    for expected in 1..4 {
        let (message, _) = in_time("the next comes", received.recv()).await.unwrap();
        assert_eq!(number(&message), expected);
    }
    let (flushed, _) = tokio::join!(in_time("it is flushed", connection.flush()), async {
        tokio::time::timeout(DEADLINE, received.recv()).await
    });
    assert_eq!(flushed.unwrap().settled, 4);
}

#[tokio::test]
async fn a_stream_of_messages_that_is_dropped_gives_back_what_it_did_not_finish() {
    let (service, mut received) = messages();
    let server = serve(service).await;
    let backoff = Backoff { min: Duration::from_millis(1), max: Duration::from_millis(5) };
    let (owner, mut failed) = mpsc::channel(8);
    let connection = acked().backoff(backoff).failed_to(owner).dial(server.local_address()).await.unwrap();
    for number in 0..3_u64 {
        connection.send(&number.to_be_bytes()).await.unwrap();
        until("it was read", || server.stats().messages == number + 1).await;
    }
    // One is finished, one pulled, and one waits; one more comes when nobody is there.
    in_time("one comes", received.recv()).await.unwrap();
    in_time("another comes", received.recv()).await.unwrap();
    drop(received);
    connection.send(&3_u64.to_be_bytes()).await.unwrap();
    let flushed = in_time("it is flushed", connection.flush()).await.unwrap();
    assert_eq!((flushed.settled, flushed.failed), (1, 3));
    for expected in 1..4 {
        let failed = in_time("one failed", failed.recv()).await.unwrap();
        assert_eq!((number(&failed.message), failed.reason), (expected, FailedReason::Rejected));
        let said = failed.rejection.unwrap().text;
        assert_eq!(said, "nobody takes the messages: their stream was dropped");
    }
}

/// A message's stream, its number, and what its sender said of itself.
type Named = (Option<[u8; 16]>, Option<u64>, Option<Vec<u8>>);

struct Names(Peer, mpsc::UnboundedSender<Named>);

impl Handler for Names {
    fn message(&mut self, message: Message<'_>) -> HandlerResult {
        let stream = self.0.stream_id().map(|stream| *stream.as_bytes());
        let _ = self.1.send((stream, message.number(), self.0.token().map(<[u8]>::to_vec)));
        self.0.sender().try_send(&message)?;
        Ok(())
    }
}

#[tokio::test]
async fn handlers_know_the_stream_and_the_number_and_their_replies_arrive() {
    let (names, mut named) = mpsc::unbounded_channel();
    let server = serve(per_connection(move |peer: &Peer| Names(peer.clone(), names.clone()))).await;
    let (service, mut replies) = messages();
    let connection = acked().token("who I am").handler(service).dial(server.local_address()).await.unwrap();
    for text in ["one", "two"] {
        connection.send(text.as_bytes()).await.unwrap();
        let (reply, _) = in_time("one comes", replies.recv()).await.unwrap();
        assert_eq!(reply, text);
    }
    let first = in_time("one comes", named.recv()).await.unwrap();
    connection.reopen();
    connection.send(b"three").await.unwrap();
    in_time("one comes", named.recv()).await.unwrap();
    let third = in_time("one comes", named.recv()).await.unwrap();
    assert_eq!((first.1, third.1), (Some(1), Some(3)));
    assert!(first.0.is_some() && first.0 == third.0, "it is the same stream on another socket");
    assert_eq!(third.2.unwrap(), b"who I am");
    in_time("it is flushed", connection.flush()).await.unwrap();
    in_time("it is closed", connection.close(DEADLINE)).await.unwrap();
}

#[tokio::test]
async fn a_listener_without_sessions_says_so() {
    let listener = Listener::builder().sessions(false).bind("127.0.0.1:0").await.unwrap();
    let server = listener.spawn(|_: &[u8]| Ok(()));
    let error = in_time("an answer comes", acked().dial(server.local_address())).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Connect);
    assert!(error.to_string().contains("takes no sessions"), "{error}");

    // And goes on serving plain clients.
    let plain = Connection::dial(server.local_address()).await.unwrap();
    plain.send(b"hello").await.unwrap();
    in_time("it is closed", plain.close(DEADLINE)).await.unwrap();
    until("it is there", || server.stats().messages == 1).await;
}

#[tokio::test]
async fn a_listener_that_closes_when_asked_is_reported_as_one_that_may_not_know_sessions() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let closing = tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut seen = [0; 16];
        stream.read_exact(&mut seen).await.unwrap();
        seen
    });
    let error = in_time("an answer comes", acked().dial(address.as_str())).await.unwrap_err();
    assert!(error.to_string().contains("turned it away") && error.to_string().contains("knows no sessions"), "{error}");
    assert!(closing.await.unwrap().starts_with(&[0xff; 10]));
}

#[tokio::test]
async fn where_a_service_greets_the_error_names_it_as_the_cause() {
    let greeting = per_connection(|peer: &Peer| {
        peer.sender().try_send(b"welcome").unwrap();
        Discard
    });
    let server = serve(greeting).await;
    let mut events = server.events();
    let error = in_time("an answer comes", acked().dial(server.local_address())).await.unwrap_err();
    assert!(error.to_string().contains("a service that greets"), "{error}");
    let why = loop {
        if let ServerEvent::Ended { why, .. } = in_time("it ends", events.next()).await.unwrap() {
            break why;
        }
    };
    assert!(why.contains("a service that greets"), "{why}");
    assert_eq!(server.stats().broken_session_refused, 1);
    let connection = acked().backoff(ENDLESS).dial_lazy(server.local_address()).unwrap();
    until("it is refused", || connection.refusal().is_some()).await;
    assert!(connection.refusal().unwrap().contains("a service that greets"));
}

#[tokio::test]
async fn a_lazy_connection_that_is_refused_ends_and_says_why() {
    let listener = Listener::builder().sessions(false).bind("127.0.0.1:0").await.unwrap();
    let server = listener.spawn(|_: &[u8]| Ok(()));
    let connection = acked().dial_lazy(server.local_address()).unwrap();
    assert_eq!(connection.refusal(), None);
    connection.send(b"hello").await.unwrap();
    in_time("it has given up", connection.closed()).await;
    assert_eq!(connection.refusal().as_deref(), Some("this listener takes no sessions"));
    assert_eq!((connection.stats().settled, connection.stats().failed), (0, 1));
}

/// Accepts connections and closes them, as listeners do that know no sessions.
async fn closing_listener() -> (String, JoinHandle<()>) {
    let listener = TcpListener::bind(APART).await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let closing = async move {
        loop {
            drop(listener.accept().await.unwrap());
        }
    };
    (address, tokio::spawn(closing))
}

#[tokio::test]
async fn a_peer_that_never_grants_the_stream_is_away_even_if_there_is_nothing_to_send() {
    let (address, _closing) = closing_listener().await;
    let pauses = Backoff { min: Duration::from_millis(1), max: Duration::from_millis(5) };
    let retry = Retry::For(Duration::from_millis(100));
    let connection = acked().backoff(pauses).retry(retry).dial_lazy(address.as_str()).unwrap();
    in_time("it has given up", connection.closed()).await;
    let refusal = connection.refusal().unwrap();
    assert!(refusal.contains("turned it away"), "{refusal}");
}

#[tokio::test]
async fn a_refusal_is_forgotten_once_the_stream_is_granted() {
    let (address, closing) = closing_listener().await;
    let connection = acked().dial_lazy(address.as_str()).unwrap();
    connection.send(b"hello").await.unwrap();
    until("it is refused", || connection.refusal().is_some()).await;
    closing.abort();
    assert!(closing.await.unwrap_err().is_cancelled());
    let _server = bind_again(Listener::builder(), &address).await.spawn(|_: &[u8]| Ok(()));
    assert_eq!(in_time("it is flushed", connection.flush()).await.unwrap().settled, 1);
    assert_eq!(connection.refusal(), None);
    in_time("it is closed", connection.close(DEADLINE)).await.unwrap();
}

#[tokio::test]
async fn a_session_cannot_be_asked_for_where_its_preface_would_be_a_frame() {
    for prefix in [Prefix::U8, Prefix::U16Be, Prefix::U16Le] {
        let error = acked().prefix(prefix).dial_lazy("127.0.0.1:9").unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidConfiguration, "{prefix}");
    }
}

#[tokio::test]
async fn a_peer_that_gives_no_sign_of_life_is_given_up() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let silent = tokio::spawn(async move { listener.accept().await.unwrap() });
    let heartbeat = Duration::from_millis(50);
    let error = in_time("an answer comes", acked().heartbeat(heartbeat).dial(address.as_str())).await.unwrap_err();
    assert!(error.to_string().contains("no sign of life"), "{error}");
    drop(silent);

    // The other way round: a client that asked, and then says nothing.
    let server = serve(|_: &[u8]| Ok(())).await;
    let connection = acked().heartbeat(heartbeat).dial(server.local_address()).await.unwrap();
    tokio::time::sleep(heartbeat * 10).await;
    assert_eq!(server.stats().open, 1, "heartbeats keep an idle session");
    in_time("it is closed", connection.close(DEADLINE)).await.unwrap();
}

#[tokio::test]
async fn strangers_who_begin_like_a_session_end_only_their_own_connection() {
    let server = serve(|_: &[u8]| Ok(())).await;
    let connection = acked().dial(server.local_address()).await.unwrap();
    let address = server.local_address().to_string();
    let preface = b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xffBUFFS\x01";
    for garbage in [&b"\xff\xff\xff\xffjunk"[..], b"\x06\x00\x00junk", &[0; 64], &[0xff; 64]] {
        let mut stream = TcpStream::connect(&address).await.unwrap();
        stream.write_all(preface).await.unwrap();
        stream.write_all(garbage).await.unwrap();
        let mut answer = Vec::new();
        in_time("it is closed", stream.read_to_end(&mut answer)).await.ok();
    }
    connection.send(b"still here").await.unwrap();
    assert_eq!(in_time("it is flushed", connection.flush()).await.unwrap().settled, 1);
    in_time("it is closed", connection.close(DEADLINE)).await.unwrap();
}

#[tokio::test]
async fn a_server_that_shuts_down_finishes_what_it_was_sent_and_the_sender_waits_for_the_next() {
    let ledger = Ledger::default();
    let count = |ledger: Ledger| {
        move |message: &[u8]| {
            ledger.write(message);
            Ok(())
        }
    };
    let server = serve(count(ledger.clone())).await;
    let address = server.local_address().to_string();
    let connection = acked().dial(address.as_str()).await.unwrap();
    for number in 0..1_000_u64 {
        connection.send(&number.to_be_bytes()).await.unwrap();
    }
    until("some have come", || ledger.len() > 0).await;
    let report = in_time("it is shut down", server.shutdown(DEADLINE)).await;
    assert_eq!(report.cut, 0);
    for number in 1_000..2_000_u64 {
        connection.send(&number.to_be_bytes()).await.unwrap();
    }
    let server = bind_again(Listener::builder(), &address).await.spawn(count(ledger.clone()));
    let flushed = in_time("it is flushed", connection.flush()).await.unwrap();
    assert_eq!((flushed.settled, flushed.failed), (2_000, 0));
    assert!(ledger.numbers().into_iter().eq(0..2_000), "what was acknowledged is not sent to the next");
    in_time("it is closed", connection.close(DEADLINE)).await.unwrap();
    drop(server);
}

/// Passes bytes on, both ways; what goes there lacks its last byte until more comes, while `withholds` says so.
async fn withholding_proxy(target: String, withholds: Arc<AtomicBool>) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    tokio::spawn(async move {
        let (mut near, mut far) = (listener.accept().await.unwrap().0, TcpStream::connect(&target).await.unwrap());
        let (mut there, mut back) = (Vec::new(), vec![0; 16 * 1024]);
        loop {
            tokio::select! {
                read = near.read_buf(&mut there) => {
                    let Ok(1..) = read else { return };
                    let kept = there.split_off(there.len() - usize::from(withholds.load(Ordering::Relaxed)));
                    far.write_all(&there).await.unwrap();
                    there = kept;
                }
                read = far.read(&mut back) => {
                    let Ok(read @ 1..) = read else { return };
                    near.write_all(&back[..read]).await.unwrap();
                }
            }
        }
    });
    address
}

#[tokio::test]
async fn a_frame_deadline_begins_anew_with_every_frame() {
    let deadline = Duration::from_secs(1);
    let listener = Listener::builder().frame_deadline(deadline).bind("127.0.0.1:0").await.unwrap();
    let server = listener.spawn(|_: &[u8]| Ok(()));
    let withholds = Arc::new(AtomicBool::new(false));
    let address = withholding_proxy(server.local_address().to_string(), Arc::clone(&withholds)).await;
    let connection = acked().dial(address.as_str()).await.unwrap();
    withholds.store(true, Ordering::Relaxed);
    let began = Instant::now();
    while began.elapsed() < deadline + deadline / 2 {
        connection.send(&[7; 1_000]).await.unwrap();
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    withholds.store(false, Ordering::Relaxed);
    connection.send(b"the last").await.unwrap();
    in_time("it is flushed", connection.flush()).await.unwrap();
    assert_eq!(server.stats().connected, 1);
    in_time("it is closed", connection.close(DEADLINE)).await.unwrap();
}

/// Passes bytes on, both ways, until so many have gone or the given number of connections was cut: then it lets them live.
async fn cutting_proxy(target: String, seed: u64, cuts: usize) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    tokio::spawn(async move {
        let mut random = fastrand::Rng::with_seed(seed);
        for count in 0.. {
            let Ok((near, _)) = listener.accept().await else { return };
            let Ok(far) = TcpStream::connect(&target).await else { continue };
            let most = if count < cuts { random.usize(..[20, 3_000, 200_000][count % 3]) } else { usize::MAX };
            let in_bits = count < cuts && random.u8(..4) == 0;
            tokio::spawn(pass_on(near, far, most, in_bits));
        }
    });
    address
}

async fn pass_on(mut near: TcpStream, mut far: TcpStream, mut most: usize, in_bits: bool) {
    let (mut there, mut back) = (vec![0; 16 * 1024], vec![0; 16 * 1024]);
    while most > 0 {
        let take = if in_bits { 1 + most % 7 } else { 16 * 1024 }.min(most);
        let (read, bytes, to) = tokio::select! {
            read = near.read(&mut there[..take]) => (read, &there, &mut far),
            read = far.read(&mut back[..take]) => (read, &back, &mut near),
        };
        let Ok(read @ 1..) = read else { break };
        most -= read;
        if to.write_all(&bytes[..read]).await.is_err() {
            break;
        }
    }
    // What is under way is destroyed, not delivered.
    for socket in [near, far] {
        let _ = socket2::SockRef::from(&socket).set_linger(Some(Duration::ZERO));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn wherever_connections_are_cut_every_message_is_handled_once_and_in_order() {
    const MESSAGES: u64 = 20_000;
    let seed = amount("BUFFSTREAMS_SEED", fastrand::usize(..)) as u64;
    println!("BUFFSTREAMS_SEED={seed}");
    let ledger = Ledger::default();
    let server = serve({
        let ledger = ledger.clone();
        move |message: &[u8]| {
            ledger.write(message);
            Ok(())
        }
    })
    .await;
    let cuts = amount("BUFFSTREAMS_RESETS", 200);
    let address = cutting_proxy(server.local_address().to_string(), seed, cuts).await;
    let pauses = Backoff { min: Duration::from_millis(1), max: Duration::from_millis(5) };
    let builder = acked().window(100_000).memory(200_000).backoff(pauses).retry(Retry::Forever);
    let connection = builder.dial_lazy(address.as_str()).unwrap();
    let mut random = fastrand::Rng::with_seed(!seed);
    for number in 0..MESSAGES {
        let mut message = number.to_be_bytes().to_vec();
        message.resize(8 + random.usize(..2_000), 7);
        in_time("there is room", connection.send(&message)).await.unwrap();
    }
    let flushed = in_time("it is flushed", connection.flush()).await.unwrap();
    assert_eq!((flushed.settled, flushed.failed), (MESSAGES, 0));
    assert!(ledger.numbers().into_iter().eq(0..MESSAGES), "in order, none missing and none twice");
    assert!(server.stats().connected > 20, "{:?}", server.stats());
    in_time("it is closed", connection.close(DEADLINE)).await.unwrap();
}

/// Counts replies and the ends of their batches, and fails at each of these.
struct Unstored {
    replies: Arc<AtomicU64>,
    batches: Arc<AtomicU64>,
}

impl Handler for Unstored {
    fn message(&mut self, _: Message<'_>) -> HandlerResult {
        self.replies.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    fn batch_end(&mut self) -> HandlerResult {
        self.batches.fetch_add(1, Ordering::Relaxed);
        Err(HandlerError::new("the disk is full"))
    }
}

/// Sends five messages, one after the other, over one socket, and waits for as many replies to each; returns how many
/// replies, batches and errors there were.
async fn unstored(delivery: Delivery, service: impl Service, answers: u64) -> (u64, u64, u64) {
    let server = serve(service).await;
    let (replies, batches) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
    let handler = per_connection({
        let (replies, batches) = (Arc::clone(&replies), Arc::clone(&batches));
        move |_: &Peer| Unstored { replies: Arc::clone(&replies), batches: Arc::clone(&batches) }
    });
    let builder = Connection::builder().delivery(delivery).handler(handler);
    let connection = builder.dial(server.local_address()).await.unwrap();
    for sent in 1..=5 {
        connection.send(b"hello").await.unwrap();
        in_time("it is settled", connection.flush()).await.unwrap();
        until("it is handled", || server.stats().messages == sent).await;
        until("it is answered", || replies.load(Ordering::Relaxed) == sent * answers).await;
    }
    let stats = in_time("closing", connection.close(DEADLINE)).await.unwrap();
    assert_eq!((stats.connected, stats.lost, stats.settled), (1, 0, 5), "{delivery:?}");
    let errors = connection.received().handler_errors;
    (replies.load(Ordering::Relaxed), batches.load(Ordering::Relaxed), errors)
}

#[tokio::test]
async fn an_error_at_the_end_of_a_batch_of_replies_is_counted_and_the_connection_goes_on() {
    for delivery in [Delivery::Sent, Delivery::Acked] {
        let (replies, batches, errors) = unstored(delivery, per_connection(|peer: &Peer| Echo(peer.clone())), 1).await;
        assert_eq!((replies, batches, errors), (5, 5, 5), "{delivery:?}");
    }
}

#[tokio::test]
async fn a_batch_ends_only_behind_replies() {
    for delivery in [Delivery::Sent, Delivery::Acked] {
        assert_eq!(unstored(delivery, |_: &[u8]| Ok(()), 0).await, (0, 0, 0), "{delivery:?}");
    }
}

#[tokio::test]
async fn slow_replies_leave_others_their_turn() {
    const COUNT: usize = 200;
    for delivery in [Delivery::Sent, Delivery::Acked] {
        let server = serve(per_connection(|peer: &Peer| Echo(peer.clone()))).await;
        // How many turns another task has had when each reply is handled.
        let turns = Arc::new(AtomicU64::new(0));
        let seen: Arc<Mutex<Vec<u64>>> = Arc::default();
        let slow = {
            let (turns, seen) = (Arc::clone(&turns), Arc::clone(&seen));
            move |_: &[u8]| {
                std::thread::sleep(Duration::from_millis(1));
                seen.lock().unwrap().push(turns.load(Ordering::Relaxed));
                Ok(())
            }
        };
        let builder = Connection::builder().delivery(delivery).handler(slow);
        let connection = builder.dial(server.local_address()).await.unwrap();
        for _ in 0..COUNT {
            connection.send(b"hello").await.unwrap();
        }
        let other = tokio::spawn(std::future::poll_fn(move |cx| {
            turns.fetch_add(1, Ordering::Relaxed);
            cx.waker().wake_by_ref();
            Poll::<()>::Pending
        }));
        until("all are answered", || seen.lock().unwrap().len() == COUNT).await;
        other.abort();
        let mut seen = std::mem::take(&mut *seen.lock().unwrap());
        seen.dedup();
        assert!(seen.len() > COUNT / 4, "{} turns beside {COUNT} replies, {delivery:?}", seen.len());
    }
}

#[tokio::test]
async fn a_message_that_was_given_to_a_handler_is_counted_once_whatever_it_said() {
    for delivery in [Delivery::Sent, Delivery::Acked] {
        let tries = AtomicU64::new(0);
        let server = serve(move |message: &[u8]| match message {
            b"never" => Err(HandlerError::rejected(7, "no")),
            b"later" if tries.fetch_add(1, Ordering::Relaxed) == 0 => Err(HandlerError::new("not yet")),
            _ => Ok(()),
        })
        .await;
        let connection = Connection::builder().delivery(delivery).dial(server.local_address()).await.unwrap();
        for message in [&b"good"[..], b"never", b"later", b"good"] {
            connection.send(message).await.unwrap();
        }
        in_time("closing", connection.close(DEADLINE)).await.unwrap();
        let received = in_time("a shutdown", server.shutdown(DEADLINE)).await.received;
        assert_eq!((received.messages, received.bytes, received.handler_errors), (4, 18, 2), "{delivery:?}");
    }
}
