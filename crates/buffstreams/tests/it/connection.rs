//! What the user dials: sending, room, expiry, failed messages, and what becomes of them when sockets come and go.

use std::pin::pin;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use buffstreams::{
    Backoff, Bytes, Connection, ConnectionBuilder, Delivery, ErrorKind, FailedMessage, FailedReason, Framing, Listener,
    ListenerBuilder, Overflow, Peer, Prefix, Retry, Server, State, async_handler, messages, per_connection,
};
use futures_util::{FutureExt, SinkExt, StreamExt, stream};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, oneshot};

use crate::support::{
    APART, Echo, PATIENCE, Recorder, amount, bind_again, closed, frames, in_time, read_messages, until,
};
use crate::tls::authority;

/// Attempts follow each other quickly, so that tests do.
const QUICK: Backoff = Backoff { min: Duration::from_millis(1), max: Duration::from_millis(20) };

const DEADLINE: Duration = Duration::from_secs(20);

/// A port that nobody listens on now, and nobody else will: it is held by a socket that does not listen.
struct Nobody(socket2::Socket);

impl Nobody {
    fn new() -> Nobody {
        let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
        socket.set_reuse_address(true).unwrap();
        socket.bind(&"127.0.0.1:0".parse::<std::net::SocketAddr>().unwrap().into()).unwrap();
        Nobody(socket)
    }

    fn address(&self) -> String {
        self.0.local_addr().unwrap().as_socket().unwrap().to_string()
    }

    /// From now on somebody listens there.
    fn listen(self) -> TcpListener {
        self.0.listen(128).unwrap();
        self.0.set_nonblocking(true).unwrap();
        TcpListener::from_std(self.0.into()).unwrap()
    }
}

/// A listener without the library, and a connection to it that comes from a builder.
async fn plain_listener() -> (TcpListener, String) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    (listener, address)
}

async fn accept(listener: &TcpListener) -> TcpStream {
    in_time("a connection comes", listener.accept()).await.unwrap().0
}

/// An owner of failed messages who keeps them.
#[derive(Clone, Default)]
struct Failed(Arc<Mutex<Vec<FailedMessage>>>);

impl Failed {
    fn owner(&self) -> impl Fn(FailedMessage) + Send + Sync + 'static {
        let kept = Arc::clone(&self.0);
        move |failed| kept.lock().unwrap().push(failed)
    }

    fn all(&self) -> Vec<FailedMessage> {
        self.0.lock().unwrap().clone()
    }
}

async fn record(builder: buffstreams::ListenerBuilder) -> (Server, Recorder) {
    let record = Recorder::default();
    (builder.bind(APART).await.unwrap().spawn(record.clone()), record)
}

fn builder() -> ConnectionBuilder {
    Connection::builder().backoff(QUICK)
}

fn numbered(number: usize) -> Vec<u8> {
    format!("message {number}").into_bytes()
}

#[tokio::test]
async fn a_failed_dial_names_the_address_and_the_reason() {
    let nobody = Nobody::new();
    let error = Connection::dial(nobody.address()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Connect);
    let text = error.to_string();
    assert!(text.contains(&nobody.address()) && text.to_lowercase().contains("refused"), "{text}");

    for (address, what) in [
        ("5031", "has no host: write \":5031\""),
        ("localhost", "no port"),
        ("localhost:http", "not a number"),
        ("::1:80", "brackets"),
        ("http://localhost:80", "is a URL: leave out \"http://\""),
        ("unix:", "no path"),
    ] {
        let error = Connection::dial(address).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidAddress);
        assert!(error.to_string().contains(what) && error.to_string().contains("host:port"), "{error}");
    }
    let error = Connection::dial("unix:/does/not/exist").await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Connect);
}

#[tokio::test]
async fn what_stands_on_the_socket_is_prefix_and_message_in_every_framing() {
    for prefix in Prefix::ALL {
        let (listener, address) = plain_listener().await;
        let connection = builder().prefix(prefix).dial(&address).await.unwrap();
        let max = connection.framing().max_message_size();
        let messages = [vec![], vec![1], vec![2; max - 1], vec![3; max]];
        for message in &messages {
            connection.send(message).await.unwrap();
        }
        for message in &messages {
            connection.send_bytes(Bytes::from(message.clone())).await.unwrap();
            connection.send_with(message.len(), |buffer| buffer.extend_from_slice(message)).await.unwrap();
        }
        let refused = connection.send(&vec![4; max + 1]).await.unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::TooLarge);
        let text = refused.to_string();
        assert!(text.contains(&(max + 1).to_string()) && text.contains(&max.to_string()), "{text}");
        let mut socket = accept(&listener).await;
        connection.flush().await.unwrap();
        drop(connection);
        let twice = messages.iter().flat_map(|message| [message, message]);
        assert!(closed(&mut socket).await == frames(Framing::new(prefix), messages.iter().chain(twice)), "{prefix}");
    }
}

/// A hundred messages pass in both directions, and are settled.
async fn echoes(listener: ListenerBuilder, builder: ConnectionBuilder) {
    let server = listener.bind("127.0.0.1:0").await.unwrap().spawn(per_connection(|peer: &Peer| Echo(peer.clone())));
    for delivery in [Delivery::Sent, Delivery::Acked] {
        let connection = builder.clone().delivery(delivery).dial_lazy(server.local_address()).unwrap();
        for _ in 0..100 {
            in_time("there is room", connection.send(b"hello")).await.unwrap();
            // One reply at a time has room, however little there is.
            let echoed = connection.stats().accepted;
            until("it is echoed", || connection.received().messages == echoed).await;
        }
        let stats = in_time("it is closed", connection.close(DEADLINE)).await.unwrap();
        assert_eq!((stats.settled, stats.failed), (100, 0), "{delivery:?}");
    }
}

#[tokio::test]
async fn settings_at_their_extremes_are_taken_for_the_nearest_that_can_be() {
    let (most, long) = (usize::MAX, Duration::MAX);
    let listener = Listener::builder()
        .max_message_size((1 << 55) - 1)
        .session_window(most)
        .session_memory(most)
        .reply_memory(most)
        .receive_memory(most)
        .max_connections(most)
        .max_connections_per_address(most)
        .handshake_deadline(long)
        .write_stall(long);
    let builder = Connection::builder()
        .max_message_size((1 << 55) - 1)
        .memory(most)
        .receive_memory(most)
        .window(most)
        .heartbeat(long)
        .expiry(long)
        .endpoint_patience(long)
        .connect_deadline(long)
        .stall_after(long)
        .write_stall(long)
        .backoff(Backoff { min: long, max: long });
    in_time("they pass with the most", echoes(listener, builder)).await;

    let (least, short) = (0, Duration::ZERO);
    let listener = Listener::builder().session_window(least).reply_memory(least);
    let builder = Connection::builder()
        .memory(least)
        .window(least)
        .heartbeat(short)
        .endpoint_patience(short)
        .stall_after(short)
        .backoff(Backoff { min: short, max: short });
    in_time("they pass with the least", echoes(listener, builder)).await;
}

#[tokio::test]
async fn a_message_over_the_maximum_comes_back_and_the_connection_goes_on() {
    let (server, record) = record(Listener::builder()).await;
    let connection = Connection::dial(server.local_address()).await.unwrap();
    for size in [4097, 1 << 20] {
        let message = Bytes::from(vec![5; size]);
        let refused = connection.send_bytes(message.clone()).await.unwrap_err();
        assert_eq!((refused.error.kind(), refused.message.as_ptr()), (ErrorKind::TooLarge, message.as_ptr()));
        let refused = connection.try_send_bytes(message.clone()).unwrap_err();
        assert_eq!((refused.error.kind(), refused.message.as_ptr()), (ErrorKind::TooLarge, message.as_ptr()));
        assert_eq!(connection.send(&message).await.unwrap_err().kind(), ErrorKind::TooLarge);
        assert_eq!(connection.try_send(&message).unwrap_err().kind(), ErrorKind::TooLarge);
    }
    connection.send(b"legal").await.unwrap();
    record.has(1).await;
    assert_eq!(connection.stats().accepted, 1);
    assert!(record.ends().is_empty());
}

#[tokio::test]
async fn a_lazy_connection_delivers_once_its_peer_is_there() {
    let nobody = Nobody::new();
    let connection = builder().dial_lazy(nobody.address()).unwrap();
    for number in 0..10 {
        connection.send(&numbered(number)).await.unwrap();
    }
    assert_ne!(connection.state(), State::Connected);
    let listener = nobody.listen();
    let mut socket = accept(&listener).await;
    let received = read_messages(&mut socket, Framing::default(), 10).await;
    assert_eq!(received, (0..10).map(numbered).collect::<Vec<_>>());
    assert_eq!(in_time("a flush", connection.flush()).await.unwrap().settled, 10);
}

#[tokio::test]
async fn a_peer_that_goes_and_comes_back_gets_what_was_sent_meanwhile_in_order() {
    let (server, before) = record(Listener::builder()).await;
    let address = server.local_address().clone();
    let connection = builder().dial(&address).await.unwrap();
    let mut states = connection.states();
    for number in 0..100 {
        connection.send(&numbered(number)).await.unwrap();
    }
    before.has(100).await;
    server.shutdown(PATIENCE).await;
    in_time("the loss is seen", states.wait_for(|state| *state != State::Connected)).await.unwrap();
    for number in 100..200 {
        connection.send(&numbered(number)).await.unwrap();
    }
    assert_eq!(connection.stats().in_flight, 100);
    let behind = Recorder::default();
    let server = bind_again(Listener::builder(), &address).await.spawn(behind.clone());
    behind.has(100).await;
    let received = [before.messages(), behind.messages()].concat();
    assert_eq!(received, (0..200).map(numbered).collect::<Vec<_>>());
    let stats = connection.close(PATIENCE).await.unwrap();
    assert_eq!((stats.accepted, stats.settled, stats.failed), (200, 200, 0));
    server.shutdown(PATIENCE).await;
}

#[tokio::test]
async fn the_close_of_a_peer_is_seen_while_nothing_is_sent() {
    let (listener, address) = plain_listener().await;
    let connection = builder().dial(&address).await.unwrap();
    let mut states = connection.states();
    drop(accept(&listener).await);
    in_time("the loss is seen", states.wait_for(|state| *state != State::Connected)).await.unwrap();
    connection.send(b"for the next").await.unwrap();
    let mut next = accept(&listener).await;
    assert_eq!(read_messages(&mut next, Framing::default(), 1).await, [b"for the next"]);
}

#[tokio::test]
async fn nothing_is_written_to_a_socket_whose_close_was_seen() {
    let (listener, address) = plain_listener().await;
    let connection = builder().dial(&address).await.unwrap();
    // Blocks the one thread there is: when the runtime looks at sockets and timers again, the end of stream is there and
    // the nap is over, and this test runs before the connection's task.
    let mut nap = pin!(tokio::time::sleep(Duration::from_millis(1)));
    drop(accept(&listener).await);
    assert!(nap.as_mut().now_or_never().is_none());
    std::thread::sleep(Duration::from_millis(50));
    nap.await;
    connection.try_send(b"for the next").unwrap();
    let mut next = accept(&listener).await;
    assert_eq!(read_messages(&mut next, Framing::default(), 1).await, [b"for the next"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_frame_that_a_loss_cut_is_sent_again_from_its_start_on_the_next_socket() {
    const SIZE: usize = 48 << 20;
    let (listener, address) = plain_listener().await;
    let connection =
        builder().prefix(Prefix::U32Be).max_message_size(SIZE).memory(2 * SIZE).dial(&address).await.unwrap();
    let large = Bytes::from((0..SIZE).map(|at| ((at * 7) >> 3) as u8).collect::<Vec<_>>());
    connection.send_bytes(large.clone()).await.unwrap();
    connection.send(b"behind").await.unwrap();
    let framing = connection.framing();
    for cut in [3, 4, 1_000_000] {
        let mut socket = accept(&listener).await;
        socket.read_exact(&mut vec![0; cut]).await.unwrap();
        assert_eq!(connection.stats().in_flight, 2);
        drop(socket);
    }
    let mut socket = accept(&listener).await;
    let received = read_messages(&mut socket, framing, 2).await;
    assert!(received[0] == large, "it came whole");
    assert_eq!(received[1], b"behind");
    assert_eq!(in_time("a flush", connection.flush()).await.unwrap().settled, 2);
}

#[tokio::test]
async fn what_was_written_whole_is_not_sent_again() {
    let (listener, address) = plain_listener().await;
    let connection = builder().dial(&address).await.unwrap();
    let mut first = accept(&listener).await;
    for number in 0..1_000 {
        connection.send(&numbered(number)).await.unwrap();
    }
    assert_eq!(in_time("a flush", connection.flush()).await.unwrap().settled, 1_000);
    let before = read_messages(&mut first, Framing::default(), 1_000).await;
    assert_eq!(before.len(), 1_000);
    connection.reopen();
    let mut second = accept(&listener).await;
    connection.send(b"behind").await.unwrap();
    assert_eq!(read_messages(&mut second, Framing::default(), 1).await, [b"behind"]);
    assert!(closed(&mut first).await.is_empty());
}

#[tokio::test]
async fn each_retry_policy_gives_up_where_it_says_and_failed_messages_come_back_whole() {
    for (policy, least, most) in [
        (Retry::Never, 1, 1),
        (Retry::Attempts(1), 1, 1),
        (Retry::Attempts(3), 3, 3),
        (Retry::For(Duration::ZERO), 1, 1),
        (Retry::For(Duration::from_millis(100)), 2, u32::MAX),
    ] {
        let nobody = Nobody::new();
        let failed = Failed::default();
        let connection = builder().retry(policy).on_failed(failed.owner()).dial_lazy(nobody.address()).unwrap();
        let large = Bytes::from(vec![7; 4096]);
        connection.try_send(b"small").unwrap();
        let receipt = connection.try_send_bytes(large.clone()).unwrap();
        connection.try_send(b"").unwrap();
        in_time("it gives up", connection.closed()).await;
        let failed = failed.all();
        let came_back: Vec<_> = failed.iter().map(|failed| (failed.number, failed.message.clone())).collect();
        assert_eq!(came_back, [(0, Bytes::from_static(b"small")), (1, large), (2, Bytes::new())], "{policy:?}");
        for failed in failed {
            assert_eq!(failed.reason, FailedReason::RetryExhausted, "{policy:?}");
            assert!((least..=most).contains(&failed.attempts), "{policy:?}: {} attempts", failed.attempts);
        }
        assert_eq!(connection.state(), State::Closed);
        let refused = connection.send(b"too late").await.unwrap_err();
        assert!(refused.is_closed() && refused.to_string().contains("retry policy"), "{refused}");
        assert_eq!(connection.settled(receipt).await.unwrap_err().kind(), ErrorKind::Failed);
        assert_eq!(connection.flush().await.unwrap().failed, 3);
        assert_eq!(connection.close(PATIENCE).await.unwrap().failed, 3);
    }
}

#[tokio::test]
async fn retry_never_gives_up_at_the_first_loss() {
    let (listener, address) = plain_listener().await;
    let connection = builder().retry(Retry::Never).dial(&address).await.unwrap();
    drop(accept(&listener).await);
    in_time("it gives up", connection.closed()).await;
    assert!(connection.send(b"x").await.unwrap_err().is_closed());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_peer_that_accepts_and_breaks_every_time_uses_up_the_attempts() {
    const SIZE: usize = 48 << 20;
    let (listener, address) = plain_listener().await;
    let failed = Failed::default();
    // A socket that lives for as long as the longest pause would count as a good one.
    let connection = Connection::builder()
        .backoff(Backoff { min: Duration::from_millis(1), max: Duration::from_secs(100) })
        .prefix(Prefix::U32Be)
        .max_message_size(SIZE)
        .retry(Retry::Attempts(3))
        .on_failed(failed.owner())
        .dial(&address)
        .await
        .unwrap();
    connection.send_bytes(vec![1; SIZE].into()).await.unwrap();
    let breaking = tokio::spawn(async move {
        loop {
            let mut socket = accept(&listener).await;
            let _ = socket.read_exact(&mut [0; 10]).await;
        }
    });
    in_time("it gives up", connection.closed()).await;
    let failed = failed.all();
    assert_eq!(failed.len(), 1);
    assert_eq!(failed[0].attempts, 1 + 3, "the socket that was dialled, and three more");
    breaking.abort();
}

#[tokio::test]
async fn progress_renews_the_attempts() {
    let (listener, address) = plain_listener().await;
    let connection = builder().retry(Retry::Attempts(2)).dial(&address).await.unwrap();
    for number in 0..10 {
        let mut socket = accept(&listener).await;
        connection.send(&numbered(number)).await.unwrap();
        assert_eq!(read_messages(&mut socket, Framing::default(), 1).await, [numbered(number)]);
        drop(socket);
    }
    assert_eq!(in_time("a flush", connection.flush()).await.unwrap().settled, 10);
}

#[tokio::test]
async fn a_full_connection_lets_senders_wait_until_there_is_room() {
    let (listener, address) = plain_listener().await;
    let connection = builder().memory(100_000).dial(&address).await.unwrap();
    let mut socket = accept(&listener).await;
    let sender = connection.clone();
    let sending = tokio::spawn(async move {
        for number in 0..20_000_u32 {
            let mut message = vec![0; 1_000];
            message[..4].copy_from_slice(&number.to_be_bytes());
            sender.send(&message).await.unwrap();
        }
    });
    // Socket buffers take some megabytes, then it waits.
    let mut before = 0;
    in_time("the sender waits", async {
        loop {
            tokio::time::sleep(Duration::from_millis(100)).await;
            let accepted = connection.stats().accepted;
            if accepted == before && accepted > 0 {
                return;
            }
            before = accepted;
        }
    })
    .await;
    assert!(!sending.is_finished());
    let stats = connection.stats();
    assert!(stats.in_flight_bytes <= 100_000 && stats.in_flight_bytes > 90_000, "{stats:?}");
    assert_eq!(connection.try_send(&[0; 1_000]).unwrap_err().kind(), ErrorKind::Full);
    let received = read_messages(&mut socket, Framing::default(), 20_000).await;
    for (number, message) in (0_u32..).zip(&received) {
        assert_eq!(message[..4], number.to_be_bytes());
    }
    in_time("the sender ends", sending).await.unwrap();
}

#[tokio::test]
async fn a_full_connection_refuses_where_the_policy_is_to_fail() {
    let nobody = Nobody::new();
    let connection = builder().memory(10_000).overflow(Overflow::Fail).dial_lazy(nobody.address()).unwrap();
    let mut accepted = 0;
    let refused = loop {
        match connection.send(&[1; 100]).await {
            Ok(_) => accepted += 1,
            Err(refused) => break refused,
        }
    };
    assert_eq!(refused.kind(), ErrorKind::Full);
    assert!(refused.to_string().contains("10000"), "{refused}");
    assert!((90..=97).contains(&accepted), "{accepted}");
    let message = Bytes::from_static(&[2; 100]);
    assert_eq!(connection.send_bytes(message.clone()).await.unwrap_err().message, message);
    let mut socket = accept(&nobody.listen()).await;
    assert_eq!(read_messages(&mut socket, Framing::default(), accepted).await.len(), accepted);
}

#[tokio::test]
async fn a_full_connection_gives_up_the_oldest_where_the_policy_says_so() {
    let nobody = Nobody::new();
    let failed = Failed::default();
    let connection = builder()
        .memory(10_000)
        .overflow(Overflow::FailOldest)
        .on_failed(failed.owner())
        .dial_lazy(nobody.address())
        .unwrap();
    for number in 0..1_000 {
        in_time("it does not wait for ever", connection.send(&[numbered(number), vec![0; 100]].concat()))
            .await
            .unwrap();
    }
    until("failed ones are handed over", || failed.all().len() == connection.stats().failed as usize).await;
    let failed = failed.all();
    assert!(failed.len() > 850 && failed.len() < 1_000, "{}", failed.len());
    for (number, failed) in failed.iter().enumerate() {
        assert_eq!((failed.number, failed.reason), (number as u64, FailedReason::Overflow));
        assert!(failed.message.starts_with(&numbered(number)));
    }
    let mut socket = accept(&nobody.listen()).await;
    let left = 1_000 - failed.len();
    let received = read_messages(&mut socket, Framing::default(), left).await;
    for (number, message) in (failed.len()..).zip(received) {
        assert!(message.starts_with(&numbered(number)));
    }
    let flushed = in_time("a flush", connection.flush()).await.unwrap();
    assert_eq!((flushed.settled, flushed.failed), (left as u64, failed.len() as u64));
}

#[tokio::test]
async fn failed_messages_that_nobody_takes_do_not_block_a_sender_for_ever() {
    let (listener, address) = plain_listener().await;
    // Room for one, and never taken.
    let (owner, _never_taken) = tokio::sync::mpsc::channel(1);
    let connection =
        builder().memory(100_000).overflow(Overflow::FailOldest).failed_to(owner).dial(&address).await.unwrap();
    let mut socket = accept(&listener).await;
    let sender = connection.clone();
    let sending = tokio::spawn(async move {
        while connection.stats().failed < 60 {
            connection.send(&[1; 1_000]).await.unwrap();
        }
        for _ in 0..10_000 {
            connection.send(&[2; 1_000]).await.unwrap();
        }
    });
    until("some have failed", || sender.stats().failed >= 60 || sending.is_finished()).await;
    let mut bytes = vec![0; 1 << 20];
    in_time("the sender ends", async {
        while !sending.is_finished() {
            let _ = tokio::time::timeout(Duration::from_millis(10), socket.read(&mut bytes)).await;
        }
    })
    .await;
    sending.await.unwrap();
}

#[tokio::test]
async fn a_message_expires_if_none_of_it_was_written() {
    let nobody = Nobody::new();
    let failed = Failed::default();
    let connection = builder().on_failed(failed.owner()).dial_lazy(nobody.address()).unwrap();
    connection.send(b"stays").await.unwrap();
    let begun = Instant::now();
    let receipt = connection.send_expiring(b"expires", Duration::from_millis(100)).await.unwrap();
    connection.send_expiring(b"stays, too", Duration::from_secs(1_000)).await.unwrap();
    let refused = in_time("it expires", connection.settled(receipt)).await.unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Failed);
    assert!(begun.elapsed() >= Duration::from_millis(100));
    until("its owner has it", || failed.all().len() == 1).await;
    let failed = &failed.all()[0];
    assert_eq!((failed.number, failed.reason, &failed.message[..]), (1, FailedReason::Expired, &b"expires"[..]));
    assert!(failed.age >= Duration::from_millis(100) && failed.age < PATIENCE);
    let mut socket = accept(&nobody.listen()).await;
    assert_eq!(read_messages(&mut socket, Framing::default(), 2).await, [&b"stays"[..], b"stays, too"]);
}

#[tokio::test]
async fn the_expiry_of_a_connection_is_that_of_every_message() {
    let nobody = Nobody::new();
    let connection = builder().expiry(Duration::from_millis(20)).dial_lazy(nobody.address()).unwrap();
    for number in 0..100 {
        connection.send(&numbered(number)).await.unwrap();
    }
    let flushed = in_time("all expire", connection.flush()).await.unwrap();
    assert_eq!((flushed.settled, flushed.failed), (0, 100));
}

#[tokio::test]
async fn whoever_waits_learns_of_an_expiry_that_the_writer_finds() {
    // The expiry passes while the one thread is blocked, and then the socket is there: writer and clock race for it.
    for _ in 0..50 {
        let nobody = Nobody::new();
        let connection = builder().dial_lazy(nobody.address()).unwrap();
        let receipt = connection.send_expiring(b"x", Duration::from_millis(2)).await.unwrap();
        let listener = nobody.listen();
        std::thread::sleep(Duration::from_millis(4));
        let _ = in_time("the outcome is told", connection.settled(receipt)).await;
        in_time("a flush", connection.flush()).await.unwrap();
        drop(listener);
    }
}

#[tokio::test]
async fn a_close_ends_as_soon_as_the_last_message_has_expired() {
    for _ in 0..10 {
        let nobody = Nobody::new();
        let backoff = Backoff { min: Duration::from_secs(1_000), max: Duration::from_secs(1_000) };
        let connection = Connection::builder().backoff(backoff).dial_lazy(nobody.address()).unwrap();
        connection.send_expiring(b"x", Duration::from_millis(30)).await.unwrap();
        let stats = in_time("the close", connection.close(Duration::from_secs(1_000))).await.unwrap();
        assert_eq!(stats.failed, 1);
    }
}

#[tokio::test]
async fn failed_messages_go_into_a_channel_and_wait_while_it_is_full() {
    let nobody = Nobody::new();
    let (owner, mut channel) = tokio::sync::mpsc::channel(2);
    let connection = builder().retry(Retry::Attempts(1)).failed_to(owner).dial_lazy(nobody.address()).unwrap();
    for number in 0..10 {
        connection.try_send(&numbered(number)).unwrap();
    }
    in_time("it gives up", connection.closed()).await;
    for number in 0..10 {
        let failed: FailedMessage = in_time("a failed message", channel.recv()).await.unwrap();
        assert_eq!((failed.number, &failed.message[..]), (number as u64, &numbered(number)[..]));
    }
    assert!(in_time("the end", channel.recv()).await.is_none(), "the connection's task is over");
}

#[tokio::test]
async fn failed_messages_are_counted_where_nobody_takes_them() {
    for channel_is_gone in [true, false] {
        let nobody = Nobody::new();
        let builder = builder().retry(Retry::Never);
        let builder = if channel_is_gone { builder.failed_to(tokio::sync::mpsc::channel(1).0) } else { builder };
        let connection = builder.dial_lazy(nobody.address()).unwrap();
        connection.try_send(b"x").unwrap();
        in_time("it gives up", connection.closed()).await;
        assert_eq!(connection.stats().failed, 1);
    }
}

#[tokio::test]
async fn an_owner_who_panics_does_not_stop_the_connection() {
    let nobody = Nobody::new();
    let called = Arc::new(AtomicUsize::new(0));
    let counter = Arc::clone(&called);
    let connection = builder()
        .retry(Retry::Never)
        .on_failed(move |_| {
            counter.fetch_add(1, Ordering::Relaxed);
            panic!("the owner's own");
        })
        .dial_lazy(nobody.address())
        .unwrap();
    connection.try_send(b"one").unwrap();
    connection.try_send(b"two").unwrap();
    in_time("it gives up", connection.closed()).await;
    assert_eq!(called.load(Ordering::Relaxed), 2);
}

#[tokio::test]
async fn reopen_makes_another_socket() {
    let (server, record) = record(Listener::builder()).await;
    let connection = builder().dial(server.local_address()).await.unwrap();
    for round in 1..5 {
        connection.send(b"x").await.unwrap();
        record.has(round).await;
        connection.reopen();
        until("another socket is there", || record.peers().len() == round + 1).await;
    }
    until("the others are closed", || server.stats().open == 1).await;
    assert_eq!(connection.close(PATIENCE).await.unwrap().settled, 4);
    connection.reopen();
    assert_eq!(connection.state(), State::Closed);
}

/// A connection whose peer does not read, with more in hand than socket buffers take.
async fn stuck(failed: &Failed) -> (Connection, TcpStream) {
    let (listener, address) = plain_listener().await;
    let connection = builder().memory(64 << 20).on_failed(failed.owner()).dial(&address).await.unwrap();
    let socket = accept(&listener).await;
    for number in 0..8_000 {
        connection.send(&[numbered(number), vec![0; 4_000]].concat()).await.unwrap();
    }
    (connection, socket)
}

#[tokio::test]
async fn a_close_gives_up_what_is_not_settled_by_its_deadline() {
    let failed = Failed::default();
    let (connection, mut socket) = stuck(&failed).await;
    let stats = in_time("the close", connection.close(Duration::from_millis(50))).await.unwrap();
    assert_eq!(stats.accepted, 8_000);
    assert_eq!(stats.settled + stats.failed, 8_000);
    let failed = failed.all();
    assert_eq!(failed.len() as u64, stats.failed);
    assert!(failed.iter().all(|failed| failed.reason == FailedReason::Closed));
    assert_eq!(failed[0].number, stats.settled, "what failed comes behind what is settled");
    // Whole frames, and at most one torn one behind them, are what the peer can still read.
    let bytes = closed(&mut socket).await;
    let (mut at, mut count) = (0, 0);
    while let Some((message, frame)) = Framing::default().decode(&bytes[at..]).unwrap() {
        assert!(message.starts_with(&numbered(count)));
        (at, count) = (at + frame, count + 1);
    }
    assert_eq!(count as u64, stats.settled);
}

#[tokio::test]
async fn of_two_closes_the_sooner_deadline_counts() {
    let (connection, _socket) = stuck(&Failed::default()).await;
    let first = connection.clone();
    let first = tokio::spawn(async move { first.close(Duration::from_secs(1_000)).await.unwrap() });
    until("the first close has begun", || connection.try_send(b"x").is_err()).await;
    let second = in_time("the second close", connection.close(Duration::from_millis(10))).await.unwrap();
    assert_eq!(in_time("the first close", first).await.unwrap(), second);
    assert!(connection.send(b"x").await.unwrap_err().is_closed());
}

#[tokio::test]
async fn dropping_the_last_clone_delivers_in_the_background() {
    let (server, record) = record(Listener::builder()).await;
    let connection = builder().dial(server.local_address()).await.unwrap();
    for number in 0..1_000 {
        connection.send(&numbered(number)).await.unwrap();
    }
    drop(connection.clone());
    drop(connection);
    record.has(1_000).await;
    until("the socket is closed", || server.stats().open == 0).await;
    assert!(record.ends()[0].contains("ended its stream"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_conservation_law_holds_at_every_moment_under_fire() {
    let (server, record) = record(Listener::builder()).await;
    let failed = Failed::default();
    let connection = builder()
        .memory(200_000)
        .overflow(Overflow::FailOldest)
        .on_failed(failed.owner())
        .dial(server.local_address())
        .await
        .unwrap();
    let done = Arc::new(AtomicBool::new(false));
    let (watched, stop) = (connection.clone(), Arc::clone(&done));
    let watcher = tokio::task::spawn_blocking(move || {
        let mut samples = 0;
        while !stop.load(Ordering::Relaxed) {
            let stats = watched.stats();
            assert!(stats.is_conserved(), "{stats:?}");
            assert_eq!(stats.recovered + stats.accepted, stats.settled + stats.failed + stats.in_flight);
            assert!(stats.in_flight_bytes <= 200_000);
            samples += 1;
        }
        samples
    });
    let senders = (0..8).map(|sender| {
        let connection = connection.clone();
        tokio::spawn(async move {
            for number in 0..2_000 {
                let message = vec![sender; (number * 37) % 2_000];
                match number % 4 {
                    0 => connection.send_expiring(&message, Duration::from_millis(5)).await.map(drop).unwrap(),
                    1 => connection.send_bytes(message.into()).await.map(drop).unwrap(),
                    _ => connection.send(&message).await.map(drop).unwrap(),
                }
                if number % 500 == 0 {
                    connection.reopen();
                }
            }
        })
    });
    for sender in senders.collect::<Vec<_>>() {
        in_time("a sender", sender).await.unwrap();
    }
    let stats = in_time("the close", connection.close(PATIENCE)).await.unwrap();
    done.store(true, Ordering::Relaxed);
    assert!(watcher.await.unwrap() > 0);
    assert_eq!((stats.accepted, stats.in_flight), (16_000, 0));
    assert_eq!(stats.failed as usize, failed.all().len());
    assert!(record.count() <= stats.settled as usize);
}

#[tokio::test]
async fn a_flush_counts_all_messages_so_far_and_a_receipt_tells_of_its_own() {
    let (server, record) = record(Listener::builder()).await;
    let connection = builder().dial(server.local_address()).await.unwrap();
    assert_eq!(connection.flush().await.unwrap().settled, 0);
    for round in 1..4 {
        let first = connection.send(b"one").await.unwrap();
        let second = connection.send(b"two").await.unwrap();
        assert_eq!(second.number(), first.number() + 1);
        in_time("it is settled", connection.settled(second)).await.unwrap();
        in_time("it is settled", connection.settled(first)).await.unwrap();
        let flushed = in_time("a flush", connection.flush()).await.unwrap();
        assert_eq!((flushed.settled, flushed.failed), (2 * round, 0));
    }
    record.has(6).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn any_number_of_tasks_may_send_and_each_keeps_its_order() {
    const EACH: u32 = 2_000;
    let (server, record) = record(Listener::builder()).await;
    let connection = builder().memory(20_000).dial(server.local_address()).await.unwrap();
    let senders: Vec<_> = (0..16_u32)
        .map(|sender| {
            let connection = connection.clone();
            tokio::spawn(async move {
                for number in 0..EACH {
                    let message = [sender.to_be_bytes(), number.to_be_bytes()].concat();
                    connection.send(&message).await.unwrap();
                }
            })
        })
        .collect();
    for sender in senders {
        in_time("a sender", sender).await.unwrap();
    }
    let stats = connection.close(PATIENCE).await.unwrap();
    assert_eq!(stats.settled, 16 * u64::from(EACH));
    record.has(16 * EACH as usize).await;
    let mut next = [0; 16];
    for message in record.messages() {
        let (sender, number) = message.split_at(4);
        let sender = u32::from_be_bytes(sender.try_into().unwrap()) as usize;
        assert_eq!(number, u32::to_be_bytes(next[sender]));
        next[sender] += 1;
    }
    assert_eq!(next, [EACH; 16]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dropped_send_was_not_accepted_and_an_accepted_one_is_delivered() {
    let (server, record) = record(Listener::builder()).await;
    let connection = builder().memory(3_000).dial(server.local_address()).await.unwrap();
    let senders: Vec<_> = (0..6_u32)
        .map(|sender| {
            let connection = connection.clone();
            tokio::spawn(async move {
                let mut random = fastrand::Rng::with_seed(u64::from(sender));
                let mut accepted = Vec::new();
                for number in 0..3_000_u32 {
                    let mut message = [sender.to_be_bytes(), number.to_be_bytes()].concat();
                    message.resize(8 + random.usize(..1_000), 0);
                    let mut sending = pin!(connection.send(&message));
                    // Polled some times, and then dropped if it is not ready.
                    for _ in 0..random.usize(1..4) {
                        if sending.as_mut().now_or_never().is_some() {
                            accepted.push(message.clone());
                            break;
                        }
                        tokio::task::yield_now().await;
                    }
                }
                accepted
            })
        })
        .collect();
    let mut accepted = Vec::new();
    for sender in senders {
        accepted.extend(in_time("a sender", sender).await.unwrap());
    }
    let stats = in_time("the close", connection.close(PATIENCE)).await.unwrap();
    assert_eq!((stats.accepted as usize, stats.failed), (accepted.len(), 0));
    assert!(accepted.len() < 18_000, "some sends were dropped");
    record.has(accepted.len()).await;
    let mut received = record.messages();
    received.sort();
    accepted.sort();
    assert!(received == accepted, "what was delivered is what was accepted");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_large_message_that_waits_for_room_is_not_starved_by_small_ones() {
    const LARGE: usize = 1 << 20;
    let framing = |builder: ConnectionBuilder| builder.prefix(Prefix::U32Be).max_message_size(LARGE);
    let listener = Listener::builder().prefix(Prefix::U32Be).max_message_size(LARGE);
    let server = listener.bind("127.0.0.1:0").await.unwrap().spawn(|_: &[u8]| Ok(()));
    let connection = framing(builder()).memory(LARGE + 100_000).dial(server.local_address()).await.unwrap();
    let done = Arc::new(AtomicBool::new(false));
    let small: Vec<_> = (0..4)
        .map(|_| {
            let (connection, done) = (connection.clone(), Arc::clone(&done));
            tokio::spawn(async move {
                while !done.load(Ordering::Relaxed) {
                    connection.send(&[1; 500]).await.unwrap();
                }
            })
        })
        .collect();
    let large = Bytes::from(vec![2; LARGE]);
    for _ in 0..20 {
        in_time("a large message has its turn", connection.send_bytes(large.clone())).await.unwrap();
    }
    done.store(true, Ordering::Relaxed);
    for sender in small {
        in_time("a small sender", sender).await.unwrap();
    }
}

#[test]
fn when_the_runtime_is_dropped_messages_in_hand_go_to_their_owner() {
    for channel_is_full in [false, true] {
        let nobody = Nobody::new();
        let failed = Failed::default();
        let (owner, mut channel) = tokio::sync::mpsc::channel(3);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let connection = runtime.block_on(async {
            let builder =
                if channel_is_full { builder().failed_to(owner) } else { builder().on_failed(failed.owner()) };
            let connection = builder.dial_lazy(nobody.address()).unwrap();
            for number in 0..10 {
                connection.send(&numbered(number)).await.unwrap();
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
            connection
        });
        drop(runtime);
        if channel_is_full {
            let taken: Vec<_> = std::iter::from_fn(|| channel.try_recv().ok()).map(|failed| failed.number).collect();
            assert_eq!(taken, [0, 1, 2], "as many as there is room for; the others are logged");
        } else {
            let numbers: Vec<_> = failed.all().iter().map(|failed| failed.number).collect();
            assert_eq!(numbers, (0..10).collect::<Vec<_>>());
            assert!(failed.all().iter().all(|failed| failed.reason == FailedReason::Closed));
        }
        assert_eq!((connection.stats().failed, connection.state()), (10, State::Closed));
        let error = connection.try_send(b"x").unwrap_err();
        assert!(error.is_closed() && error.to_string().contains("runtime"), "{error}");
    }
}

#[tokio::test]
async fn what_the_other_side_sends_goes_to_the_handler_of_a_dialled_connection() {
    let server = Listener::bind("127.0.0.1:0").await.unwrap().spawn(per_connection(|peer: &Peer| Echo(peer.clone())));
    let record = Recorder::default();
    let connection = builder().handler(record.clone()).dial(server.local_address()).await.unwrap();
    for number in 0..100 {
        connection.send(&numbered(number)).await.unwrap();
    }
    record.has(100).await;
    assert_eq!(record.messages(), (0..100).map(numbered).collect::<Vec<_>>());
    assert_eq!(connection.received().messages, 100);
    connection.reopen();
    until("another handler is made", || record.peers().len() == 2).await;
    assert_eq!(record.peers(), [0, 1], "how many sockets there were before");
    connection.send(b"again").await.unwrap();
    record.has(101).await;
    connection.close(PATIENCE).await.unwrap();
    assert_eq!(record.ends().len(), 2);
}

#[tokio::test]
async fn what_the_other_side_sends_can_be_pulled_from_a_stream_that_ends_with_the_connection() {
    let server = Listener::bind("127.0.0.1:0").await.unwrap().spawn(per_connection(|peer: &Peer| Echo(peer.clone())));
    let (service, mut received) = messages();
    let connection = builder().handler(service).dial(server.local_address()).await.unwrap();
    connection.send(b"there and back").await.unwrap();
    let (message, _) = in_time("the answer", received.recv()).await.unwrap();
    assert_eq!(message, "there and back");
    connection.close(PATIENCE).await.unwrap();
    assert!(in_time("the end", received.recv()).await.is_none());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn much_traffic_in_both_directions_at_once_does_not_lock_up() {
    const COUNT: usize = 10_000;
    let echo = async_handler(|message: Bytes, peer: Peer| async move {
        peer.sender().send_bytes(message).await?;
        Ok(())
    });
    let server = Listener::builder().reply_memory(50_000).bind("127.0.0.1:0").await.unwrap().spawn(echo);
    let record = Recorder::default();
    let connection = builder().memory(50_000).handler(record.clone()).dial(server.local_address()).await.unwrap();
    for number in 0..COUNT {
        let message = [numbered(number), vec![0; 2_000]].concat();
        in_time("the next message", connection.send(&message)).await.unwrap();
    }
    record.has(COUNT).await;
    for (number, message) in record.messages().iter().enumerate() {
        assert!(message.starts_with(&numbered(number)));
    }
}

#[tokio::test]
async fn a_handler_that_waits_for_room_does_not_hinder_the_next_socket() {
    let (listener, address) = plain_listener().await;
    let reply = async_handler(|message: Bytes, peer: Peer| async move {
        peer.sender().send_bytes(message).await?;
        Ok(())
    });
    let connection = builder().memory(10_000).handler(reply).dial(&address).await.unwrap();
    let mut first = accept(&listener).await;
    // The other side reads nothing, so that in the end there is no room for the handler's reply.
    let question = frames(Framing::default(), [[5; 4_000]]);
    in_time("everything is full", async {
        let mut last = (0, Instant::now());
        while last.1.elapsed() < Duration::from_millis(200) {
            let _ = tokio::time::timeout(Duration::from_millis(20), first.write(&question)).await;
            let accepted = connection.stats().accepted;
            if accepted != last.0 {
                last = (accepted, Instant::now());
            }
        }
    })
    .await;
    assert!(connection.stats().in_flight > 0);
    drop(first);
    let mut next = accept(&listener).await;
    let left = connection.stats().in_flight as usize;
    let received = read_messages_at_least(&mut next, left).await;
    assert!(received >= left);
    in_time("everything is settled", async {
        while connection.stats().in_flight > 0 {
            let _ = tokio::time::timeout(Duration::from_millis(10), next.read(&mut [0; 65_536])).await;
        }
    })
    .await;
}

async fn read_messages_at_least(socket: &mut TcpStream, count: usize) -> usize {
    let mut bytes = Vec::new();
    let mut messages = 0;
    while messages < count {
        let read = in_time("more frames", socket.read_buf(&mut bytes)).await.unwrap();
        assert_ne!(read, 0);
        let mut at = 0;
        while let Some((_, frame)) = Framing::default().decode(&bytes[at..]).unwrap() {
            (at, messages) = (at + frame, messages + 1);
        }
        bytes.drain(..at);
    }
    messages
}

#[tokio::test]
async fn a_sink_takes_a_forwarded_stream_in_order() {
    let (server, record) = record(Listener::builder()).await;
    let connection = builder().memory(10_000).dial(server.local_address()).await.unwrap();
    let numbers = (0..5_000).map(|number| Ok(Bytes::from(numbered(number))));
    in_time("the stream", stream::iter(numbers).forward(connection.sink())).await.unwrap();
    assert_eq!(connection.stats().settled, 5_000, "closing the sink waits until all is settled");
    record.has(5_000).await;
    assert_eq!(record.messages(), (0..5_000).map(numbered).collect::<Vec<_>>());
    connection.send(b"the connection is still open").await.unwrap();
}

#[tokio::test]
async fn a_sink_that_is_ready_has_room_also_if_somebody_else_waits() {
    let nobody = Nobody::new();
    let connection = builder().memory(5_000).dial_lazy(nobody.address()).unwrap();
    let mut sink = connection.sink();
    in_time("room for the largest", std::future::poll_fn(|cx| sink.poll_ready_unpin(cx))).await.unwrap();
    assert_eq!(connection.try_send(&[0; 2_000]).unwrap_err().kind(), ErrorKind::Full);
    let other = connection.clone();
    let other = tokio::spawn(async move { other.send(&[1; 4_000]).await });
    tokio::task::yield_now().await;
    sink.start_send_unpin(Bytes::from_static(&[2; 4_096])).unwrap();
    assert!(!other.is_finished());
    let mut socket = accept(&nobody.listen()).await;
    let received = read_messages(&mut socket, Framing::default(), 2).await;
    assert_eq!((received[0].len(), received[1].len()), (4_096, 4_000));
    in_time("the other", other).await.unwrap().unwrap();
    let mut abandoned = connection.sink();
    in_time("room for the largest", std::future::poll_fn(|cx| abandoned.poll_ready_unpin(cx))).await.unwrap();
    drop(abandoned);
    connection.try_send(&[0; 2_000]).expect("a sink that is gone gives its room back");
}

#[tokio::test]
async fn a_closed_connection_refuses_whoever_waits_for_room() {
    let nobody = Nobody::new();
    let connection = builder().memory(1_000).dial_lazy(nobody.address()).unwrap();
    connection.send(&[0; 800]).await.unwrap();
    let waiting: Vec<_> = (0..3)
        .map(|_| {
            let connection = connection.clone();
            tokio::spawn(async move { connection.send(&[1; 800]).await })
        })
        .collect();
    let mut sink = connection.sink();
    let waiting_sink = tokio::spawn(async move { sink.send(Bytes::from_static(b"x")).await });
    tokio::task::yield_now().await;
    let stats = in_time("the close", connection.close(Duration::from_millis(10))).await.unwrap();
    assert_eq!((stats.accepted, stats.failed), (1, 1));
    for waiting in waiting {
        assert!(in_time("a refusal", waiting).await.unwrap().unwrap_err().is_closed());
    }
    assert!(in_time("a refusal", waiting_sink).await.unwrap().unwrap_err().is_closed());
}

#[tokio::test]
async fn a_stream_that_the_user_brings_is_used_until_its_end_and_not_dialled_again() {
    let (ours, mut theirs) = tokio::io::duplex(1_000);
    let record = Recorder::default();
    let failed = Failed::default();
    let connection = builder().handler(record.clone()).on_failed(failed.owner()).from_io(ours).unwrap();
    connection.send(b"there").await.unwrap();
    assert_eq!(read_messages(&mut theirs, Framing::default(), 1).await, [b"there"]);
    theirs.write_all(&frames(Framing::default(), [b"and back"])).await.unwrap();
    record.has(1).await;
    for number in 0..100 {
        connection.send(&[numbered(number), vec![0; 100]].concat()).await.unwrap();
    }
    drop(theirs);
    in_time("it ends with its stream", connection.closed()).await;
    let stats = connection.stats();
    assert_eq!((stats.accepted, stats.failed as usize), (101, failed.all().len()));
    assert!(stats.failed > 80, "the pipe takes 1000 bytes");
    assert!(failed.all().iter().all(|failed| failed.reason == FailedReason::Disconnected));
    let refused = connection.send(b"x").await.unwrap_err();
    assert!(refused.is_closed() && refused.to_string().contains("stream"), "{refused}");
}

#[tokio::test]
async fn a_loop_of_sends_that_are_always_ready_lets_others_run() {
    let (server, _record) = record(Listener::builder()).await;
    let connection = builder().memory(1 << 30).dial(server.local_address()).await.unwrap();
    let ran = Arc::new(AtomicBool::new(false));
    let flag = Arc::clone(&ran);
    tokio::spawn(async move { flag.store(true, Ordering::Relaxed) });
    for number in 0..1_000_000 {
        if ran.load(Ordering::Relaxed) {
            return;
        }
        connection.send(&numbered(number)).await.unwrap();
    }
    panic!("nobody else ran");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn wherever_sockets_break_messages_arrive_whole_in_order_and_none_twice() {
    const MESSAGES: u64 = 20_000;
    let seed = amount("BUFFSTREAMS_SEED", fastrand::usize(..)) as u64;
    println!("BUFFSTREAMS_SEED={seed}");
    let resets = amount("BUFFSTREAMS_RESETS", 200);
    let nobody = Nobody::new();
    // So that few bytes are under way, and many sockets have their share.
    nobody.0.set_recv_buffer_size(4_096).unwrap();
    let (address, listener) = (nobody.address(), nobody.listen());
    let connection = builder().memory(30_000).dial(&address).await.unwrap();
    let receiving = tokio::spawn(async move {
        let mut random = fastrand::Rng::with_seed(seed);
        let (mut numbers, mut sockets) = (Vec::new(), 0);
        for count in 0.. {
            let (mut socket, last) = (accept(&listener).await, count >= resets);
            let most = if last { usize::MAX } else { random.usize(..[10, 5_000, 300_000][count % 3]) };
            let mut bytes = Vec::new();
            while bytes.len() < most {
                // Unread bytes are left behind at times, so that the close is a reset.
                match socket.read_buf(&mut bytes).await {
                    Ok(read) if read > 0 => {}
                    _ => break,
                }
            }
            let mut at = 0;
            sockets += usize::from(!bytes.is_empty());
            while let Some((message, frame)) = Framing::default().decode(&bytes[at..]).expect("nothing else comes") {
                numbers.push(u64::from_be_bytes(message[..8].try_into().unwrap()));
                assert!(message[8..].iter().all(|byte| *byte == message[7]), "it is whole");
                at += frame;
            }
            if last {
                return (numbers, sockets);
            }
        }
        unreachable!("the loop is left")
    });
    let mut random = fastrand::Rng::with_seed(!seed);
    for number in 0..MESSAGES {
        let mut message = number.to_be_bytes().to_vec();
        message.resize(8 + random.usize(..3_000), message[7]);
        in_time("the next send", connection.send(&message)).await.unwrap();
    }
    while connection.stats().in_flight > 0 {
        in_time("a flush", connection.flush()).await.unwrap();
    }
    // If there were fewer losses than planned, the rest are empty sockets.
    let closing = tokio::spawn(async move {
        while !receiving.is_finished() {
            connection.reopen();
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        (connection.close(PATIENCE).await.unwrap(), receiving.await.unwrap())
    });
    let (stats, (numbers, sockets)) = in_time("the end", closing).await.unwrap();
    assert_eq!((stats.accepted, stats.settled, stats.failed), (MESSAGES, MESSAGES, 0));
    assert!(numbers.is_sorted_by(|one, next| one < next), "in order, and none twice");
    println!("figures: {} of {MESSAGES} arrived over {sockets} sockets", numbers.len());
    assert!(sockets > resets / 10);
}

/// What a way does that has stopped passing on.
enum Step {
    /// Ends the stream towards the sender.
    HangUp,
    /// Passes on all that was under way, and takes the next socket when the server has finished with this one.
    PassOn,
}

/// A way to a server for one socket after the other. Each stops after some bytes, until it is told what to do; the last passes
/// everything.
fn way_with_stops(to: &Server, stops: usize, mut steps: mpsc::Receiver<Step>) -> String {
    let nobody = Nobody::new();
    // So that soon there is no room on it.
    nobody.0.set_recv_buffer_size(4_096).unwrap();
    let (address, listener, to) = (nobody.address(), nobody.listen(), to.local_address().to_string());
    tokio::spawn(async move {
        for count in 0.. {
            let (from_sender, mut to_sender) = accept(&listener).await.into_split();
            let (mut from_server, mut to_server) = TcpStream::connect(&to).await.unwrap().into_split();
            let (hang_up, hung_up) = oneshot::channel();
            let there = async {
                let mut begin = from_sender.take(if count < stops { 10_000 * count as u64 + 5_000 } else { u64::MAX });
                tokio::io::copy(&mut begin, &mut to_server).await.unwrap();
                if count < stops {
                    if let Some(Step::HangUp) = steps.recv().await {
                        hang_up.send(()).unwrap();
                        steps.recv().await;
                    }
                    tokio::io::copy(begin.get_mut(), &mut to_server).await.unwrap();
                }
                to_server.shutdown().await.unwrap();
            };
            let back = async {
                tokio::select! {
                    _ = tokio::io::copy(&mut from_server, &mut to_sender) => {}
                    Ok(()) = hung_up => {}
                }
                let _ = to_sender.shutdown().await;
                let _ = tokio::io::copy(&mut from_server, &mut tokio::io::sink()).await;
            };
            tokio::join!(there, back);
        }
    });
    address
}

/// Leaves sockets while there is no room on them, by a loss and by choice in turn. Nothing is destroyed on the way, so what
/// the kernel has taken arrives, and the rest comes over the next socket.
async fn leave_full_sockets(listener: ListenerBuilder, builder: ConnectionBuilder) {
    const STOPS: usize = 10;
    let record = Recorder::default();
    let server = listener.bind("127.0.0.1:0").await.unwrap().spawn(record.clone());
    let (step, steps) = mpsc::channel(1);
    let address = way_with_stops(&server, STOPS, steps);
    // More than TLS encrypts at a time.
    let connection = in_time("dialling", builder.memory(200_000).dial(&address)).await.unwrap();
    let mut count = 0;
    for stop in 0..STOPS {
        until("another socket", || connection.stats().connected == stop as u64 + 1).await;
        let mut settled = None;
        // Until nothing has gone for a moment.
        while settled != Some(connection.stats().settled) {
            settled = Some(connection.stats().settled);
            while connection.try_send(&[count as u8; 1_000]).is_ok() {
                count += 1;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        match stop % 2 {
            0 => connection.reopen(),
            _ => step.send(Step::HangUp).await.unwrap(),
        }
        // Without TLS there is another at once: that waits in the kernel.
        let has_another = || connection.stats().connected > stop as u64 + 1;
        until("the socket is left", || has_another() || connection.state() != State::Connected).await;
        step.send(Step::PassOn).await.unwrap();
    }
    let stats = in_time("closing", connection.close(PATIENCE)).await.unwrap();
    assert_eq!((stats.settled, stats.failed), (count, 0));
    in_time("the shutdown", server.shutdown(PATIENCE)).await;
    let messages = record.messages();
    assert_eq!(messages.len() as u64, count, "none is lost, and none comes twice");
    assert!(messages.iter().zip(0..count).all(|(message, number)| *message == [number as u8; 1_000]), "in order");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_the_kernel_had_taken_of_a_socket_that_is_left_arrives_once() {
    leave_full_sockets(Listener::builder(), builder()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_the_kernel_had_taken_of_a_socket_that_is_left_arrives_once_over_tls_too() {
    let authority = authority();
    let listener = Listener::builder().tls(authority.server("server"));
    leave_full_sockets(listener, builder().tls(authority.client())).await;
}
