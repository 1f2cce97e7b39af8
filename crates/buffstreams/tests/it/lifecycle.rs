//! Beginnings and ends: binding, shutting down, ports and socket files, runtimes of one thread.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use buffstreams::{
    Address, Backoff, Bytes, Connection, Delivery, Ended, ErrorKind, Framing, Handler, HandlerResult, Listener,
    Message, Peer, PeerAddress, async_handler, blocking_handler, messages, per_connection,
};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::sync::Semaphore;

use crate::by_hand::{PREFACE, WELCOME, hear, hello, message};
use crate::support::{
    APART, Echo, PATIENCE, Recorder, bind_again, closed, connect, frames, in_time, is_alone, passes_alone,
    read_messages, until,
};

fn numbered(number: usize) -> Vec<u8> {
    format!("message {number}").into_bytes()
}

#[tokio::test]
async fn port_zero_is_a_free_port_and_the_real_one_is_told() {
    let listener = Listener::bind("127.0.0.1:0").await.unwrap();
    let Address::Tcp { host, port } = listener.local_address() else { panic!("a TCP address was asked for") };
    assert_eq!(host, "127.0.0.1");
    assert_ne!(*port, 0);
}

#[tokio::test]
async fn an_empty_host_listens_on_every_interface() {
    let record = Recorder::default();
    let server = Listener::bind(":0").await.unwrap().spawn(record.clone());
    let Address::Tcp { port, .. } = *server.local_address() else { panic!("a TCP address was asked for") };
    for (index, host) in ["127.0.0.1", "127.0.0.8", "localhost", ""].into_iter().enumerate() {
        let connection = Connection::dial(format!("{host}:{port}")).await.unwrap();
        connection.send(host.as_bytes()).await.unwrap();
        record.has(index + 1).await;
    }
    if std::net::TcpListener::bind("[::1]:0").is_ok() {
        Connection::dial(format!("[::1]:{port}")).await.unwrap().send(b"v6").await.unwrap();
        record.has(5).await;
    }
}

#[tokio::test]
async fn an_address_in_use_is_refused_by_name() {
    let listener = Listener::bind("127.0.0.1:0").await.unwrap();
    let error = Listener::bind(listener.local_address()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Bind);
    assert!(error.to_string().contains(&listener.local_address().to_string()), "{error}");
}

#[test]
fn the_port_is_free_when_shutdown_returns_also_after_connections() {
    passes_alone("lifecycle::freedom_alone");
}

/// In a process of its own: processes that other tests start have copies of its sockets for a moment.
#[tokio::test]
#[ignore = "a part of another test, which runs it as a process of its own"]
async fn freedom_alone() {
    if !is_alone() {
        return;
    }
    let mut address: Address = APART.parse().unwrap();
    for _ in 0..20 {
        let record = Recorder::default();
        let server = Listener::bind(&address).await.unwrap().spawn(record.clone());
        address = server.local_address().clone();
        let mut client = connect(&address).await;
        client.write_all(&frames(Framing::default(), [b"x"])).await.unwrap();
        record.has(1).await;
        let report = in_time("the shutdown", server.shutdown(PATIENCE)).await;
        assert_eq!((report.cut, report.blocked, report.received.messages), (0, 0, 1));
        assert!(tokio::net::TcpStream::connect(address.to_string()).await.is_err(), "nobody listens any more");
        closed(&mut client).await;
    }
}

#[tokio::test]
async fn a_unix_socket_passes_messages_and_its_file_goes_with_its_listener() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    let address = Address::Unix(path.clone());
    for _ in 0..2 {
        let server = Listener::bind(&address).await.unwrap().spawn(per_connection(|peer: &Peer| {
            assert_eq!(*peer.address(), PeerAddress::Unix);
            Echo(peer.clone())
        }));
        assert_eq!(*server.local_address(), address);
        let record = Recorder::default();
        let connection = Connection::builder().handler(record.clone()).dial(format!("unix:{}", path.display())).await;
        let connection = connection.unwrap();
        connection.send(b"there and back").await.unwrap();
        record.has(1).await;
        connection.close(PATIENCE).await.unwrap();
        server.shutdown(PATIENCE).await;
        assert!(!path.exists());
    }
}

#[tokio::test]
async fn a_stale_socket_file_is_replaced_and_any_other_file_is_not() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    let address = Address::Unix(path.clone());
    // As a killed process leaves it: the file without the socket.
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    assert!(path.exists());
    let listener = Listener::bind(&address).await.unwrap();
    let error = Listener::bind(&address).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Bind, "somebody answers there");
    drop(listener);
    std::fs::write(&path, "precious").unwrap();
    assert_eq!(Listener::bind(&address).await.unwrap_err().kind(), ErrorKind::Bind);
    assert_eq!(std::fs::read(&path).unwrap(), b"precious");
}

#[tokio::test]
async fn at_shutdown_idle_connections_close_at_once() {
    let server = Listener::bind("127.0.0.1:0").await.unwrap().spawn(Recorder::default());
    let mut clients = Vec::new();
    for _ in 0..20 {
        clients.push(connect(server.local_address()).await);
    }
    until("all are accepted", || server.stats().open == 20).await;
    let begun = Instant::now();
    let report = server.shutdown(PATIENCE).await;
    assert!(begun.elapsed() < Duration::from_secs(20));
    assert_eq!((report.cut, report.received.open, report.received.broken), (0, 0, 0));
    for client in &mut clients {
        assert!(closed(client).await.is_empty());
    }
}

#[tokio::test]
async fn at_shutdown_a_message_in_hand_is_finished_and_answered() {
    let gate = Arc::new(Semaphore::new(0));
    let begun = Arc::new(AtomicUsize::new(0));
    let (opened, counter) = (Arc::clone(&gate), Arc::clone(&begun));
    let service = async_handler(move |message: Bytes, peer: Peer| {
        counter.fetch_add(1, Ordering::Relaxed);
        let opened = Arc::clone(&opened);
        async move {
            opened.acquire().await?.forget();
            peer.sender().send_bytes(message).await?;
            Ok(())
        }
    });
    let server = Listener::bind("127.0.0.1:0").await.unwrap().spawn(service);
    let mut client = connect(server.local_address()).await;
    client.write_all(&frames(Framing::default(), (0..3).map(numbered))).await.unwrap();
    until("one is in hand", || begun.load(Ordering::Relaxed) == 1).await;
    let stopper = server.stopper();
    let shutdown = tokio::spawn(server.shutdown(PATIENCE));
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert!(!shutdown.is_finished(), "a message is in hand");
    stopper.stop(Duration::ZERO);
    assert!(!shutdown.is_finished(), "the first deadline counts");
    gate.add_permits(3);
    let received = closed(&mut client).await;
    assert!(received == frames(Framing::default(), (0..3).map(numbered)), "all that were received are answered");
    let report = in_time("the shutdown", shutdown).await.unwrap();
    assert_eq!((report.cut, report.received.messages, report.received.replies.settled), (0, 3, 3));
}

#[tokio::test]
async fn at_shutdown_everything_received_is_answered_also_to_a_client_that_reads_late() {
    const COUNT: usize = 5_000;
    let builder = Listener::builder().reply_memory(10_000);
    let server = builder.bind("127.0.0.1:0").await.unwrap().spawn(per_connection(|peer: &Peer| Echo(peer.clone())));
    let (mut reading, mut writing) = connect(server.local_address()).await.into_split();
    let writing = tokio::spawn(async move {
        // It may be closed before all is written.
        let _ = writing.write_all(&frames(Framing::default(), vec![[1; 4_000]; COUNT])).await;
        writing
    });
    in_time("replies are stuck", async {
        let mut before = 0;
        loop {
            tokio::time::sleep(Duration::from_millis(100)).await;
            let handled = server.stats().messages;
            if handled == before && handled > 0 {
                return;
            }
            before = handled;
        }
    })
    .await;
    let shutdown = tokio::spawn(server.shutdown(PATIENCE));
    tokio::time::sleep(Duration::from_millis(20)).await;
    let received = closed(&mut reading).await;
    let report = in_time("the shutdown", shutdown).await.unwrap();
    let replies = report.received.replies;
    assert_eq!((report.cut, report.received.handler_errors), (0, 0));
    assert_eq!((replies.settled, replies.failed), (report.received.messages, 0));
    assert_eq!(received.len() as u64, replies.settled * 4_003);
    writing.abort();
}

#[tokio::test]
async fn at_the_deadline_of_a_shutdown_what_is_left_is_cut_and_reported() {
    let server = Listener::bind("127.0.0.1:0").await.unwrap().spawn(async_handler(|_: Bytes, _: Peer| async {
        std::future::pending::<()>().await;
        Ok(())
    }));
    let mut clients = Vec::new();
    for _ in 0..3 {
        let mut client = connect(server.local_address()).await;
        client.write_all(&frames(Framing::default(), [b"for ever"])).await.unwrap();
        clients.push(client);
    }
    until("all are in hand", || server.stats().messages == 3).await;
    let report = in_time("the shutdown", server.shutdown(Duration::from_millis(50))).await;
    assert_eq!((report.cut, report.blocked, report.unfinished, report.received.open), (3, 0, 3, 0));
    for client in &mut clients {
        closed(client).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_handler_that_blocks_its_thread_does_not_hold_up_the_end_of_a_shutdown() {
    /// Lets the handler go, also if the test fails: otherwise its runtime would never end.
    struct Release(Arc<AtomicBool>);
    impl Drop for Release {
        fn drop(&mut self) {
            self.0.store(true, Ordering::Relaxed);
        }
    }
    // Keeps the other thread awake, for tokio's timers may have been left to the one that is blocked.
    tokio::spawn(async {
        loop {
            tokio::task::yield_now().await;
        }
    });
    let released = Arc::new(AtomicBool::new(false));
    let release = Release(Arc::clone(&released));
    let server = Listener::bind("127.0.0.1:0").await.unwrap().spawn(move |_: &[u8]| {
        while !released.load(Ordering::Relaxed) {
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    });
    let mut client = connect(server.local_address()).await;
    client.write_all(&frames(Framing::default(), [b"block"])).await.unwrap();
    until("it is accepted", || server.stats().open == 1).await;
    tokio::time::sleep(Duration::from_millis(50)).await;
    let report = in_time("the shutdown", server.shutdown(Duration::from_millis(50))).await;
    assert_eq!((report.cut, report.blocked, report.unfinished), (1, 1, 1));
    drop(release);
    closed(&mut client).await;
}

#[tokio::test]
async fn a_client_that_stays_after_its_replies_is_not_waited_for_beyond_the_deadline() {
    let server = Listener::bind("127.0.0.1:0").await.unwrap().spawn(per_connection(|peer: &Peer| Echo(peer.clone())));
    let mut client = connect(server.local_address()).await;
    client.write_all(&frames(Framing::default(), [b"x"])).await.unwrap();
    assert_eq!(read_messages(&mut client, Framing::default(), 1).await, [b"x"]);
    let report = in_time("the shutdown", server.shutdown(Duration::from_millis(100))).await;
    assert_eq!((report.blocked, report.received.open), (0, 0), "no handler blocks");
}

#[tokio::test]
async fn a_connection_accepted_before_the_shutdown_is_part_of_it() {
    for _ in 0..20 {
        let server = Listener::bind("127.0.0.1:0").await.unwrap().spawn(Recorder::default());
        let mut client = connect(server.local_address()).await;
        // One turn of the one thread: the socket may have been accepted, its task has hardly begun.
        tokio::task::yield_now().await;
        let report = in_time("the shutdown", server.shutdown(PATIENCE)).await;
        assert_eq!((report.received.open, report.cut), (0, 0));
        closed(&mut client).await;
    }
}

#[tokio::test]
async fn a_blocking_handler_is_waited_for() {
    let done = Arc::new(AtomicUsize::new(0));
    let counter = Arc::clone(&done);
    let server = Listener::bind("127.0.0.1:0").await.unwrap().spawn(blocking_handler(move |_: &[u8], _: &Peer| {
        std::thread::sleep(Duration::from_millis(20));
        counter.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }));
    let connection = Connection::dial(server.local_address()).await.unwrap();
    for number in 0..5 {
        connection.send(&numbered(number)).await.unwrap();
    }
    until("they are received", || server.stats().messages == 5).await;
    let report = in_time("the shutdown", server.shutdown(PATIENCE)).await;
    assert_eq!((report.cut, done.load(Ordering::Relaxed)), (0, 5));
}

#[tokio::test]
async fn messages_that_were_received_reach_the_stream_before_it_ends() {
    let (service, mut received) = messages();
    let server = Listener::bind("127.0.0.1:0").await.unwrap().spawn(service);
    let connection = Connection::dial(server.local_address()).await.unwrap();
    for number in 0..100 {
        connection.send(&numbered(number)).await.unwrap();
    }
    until("they are received", || server.stats().messages == 100).await;
    let shutdown = tokio::spawn(server.shutdown(PATIENCE));
    for number in 0..100 {
        let (message, _) = in_time("a message", received.recv()).await.unwrap();
        assert_eq!(message, numbered(number));
    }
    assert!(in_time("the end", received.recv()).await.is_none());
    assert_eq!(in_time("the shutdown", shutdown).await.unwrap().cut, 0);
}

#[tokio::test]
async fn dropping_a_server_shuts_it_down() {
    let record = Recorder::default();
    let server = Listener::bind(APART).await.unwrap().spawn(record.clone());
    let address = server.local_address().clone();
    let mut client = connect(&address).await;
    until("it is accepted", || server.stats().open == 1).await;
    drop(server);
    closed(&mut client).await;
    in_time("the port is free", async {
        while Listener::bind(&address).await.is_err() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    })
    .await;
    assert_eq!(record.ends().len(), 1);
}

#[test]
fn everything_works_on_a_runtime_of_one_thread_and_after_it() {
    let runtime = || tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let first = runtime();
    let record = Recorder::default();
    let (connection, address) = first.block_on(async {
        let server = Listener::bind(APART).await.unwrap().spawn(record.clone());
        let connection = Connection::dial(server.local_address()).await.unwrap();
        for number in 0..1_000 {
            connection.send(&numbered(number)).await.unwrap();
        }
        record.has(1_000).await;
        let address = server.local_address().clone();
        (connection, address)
    });
    drop(first);
    runtime().block_on(async {
        assert!(connection.send(b"x").await.unwrap_err().is_closed());
        in_time("a close", connection.close(PATIENCE)).await.unwrap();
        let again = bind_again(Listener::builder(), &address).await.spawn(record.clone());
        Connection::dial(again.local_address()).await.unwrap().send(b"again").await.unwrap();
        record.has(1_001).await;
    });
}

#[tokio::test]
async fn two_listeners_do_not_share_limits_or_counts() {
    let one = Listener::bind("127.0.0.1:0").await.unwrap().spawn(Recorder::default());
    let two = Listener::bind("127.0.0.1:0").await.unwrap().spawn(Recorder::default());
    let connection = Connection::dial(one.local_address()).await.unwrap();
    connection.send(b"x").await.unwrap();
    until("it is received", || one.stats().messages == 1).await;
    assert_eq!(two.stats(), buffstreams::ReceivedStats::default());
}

#[tokio::test]
async fn serving_ends_with_a_report_when_it_is_stopped_from_elsewhere() {
    let listener = Listener::bind("127.0.0.1:0").await.unwrap();
    let (address, stopper) = (listener.local_address().clone(), listener.stopper());
    let record = Recorder::default();
    let serving = tokio::spawn(listener.serve(record.clone()));
    let connection = Connection::dial(&address).await.unwrap();
    connection.send(b"x").await.unwrap();
    record.has(1).await;
    stopper.stop(PATIENCE);
    let report = in_time("the report", serving).await.unwrap().unwrap();
    assert_eq!((report.cut, report.received.messages), (0, 1));
}

#[tokio::test]
async fn dropping_the_future_that_serves_shuts_down() {
    let listener = Listener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_address().clone();
    let serving = tokio::spawn(listener.serve(Recorder::default()));
    let mut client = connect(&address).await;
    client.write_all(&frames(Framing::default(), [b"x"])).await.unwrap();
    serving.abort();
    closed(&mut client).await;
}

#[tokio::test]
async fn a_sender_that_goes_on_during_a_shutdown_keeps_its_messages_for_the_next_listener() {
    let mut address: Address = APART.parse().unwrap();
    let record = Recorder::default();
    let mut handled = 0;
    let mut sender = None;
    for round in 0..5 {
        let server = bind_again(Listener::builder(), &address).await.spawn(record.clone());
        address = server.local_address().clone();
        if sender.is_none() {
            let pauses = Backoff { min: Duration::from_millis(1), max: Duration::from_millis(5) };
            let builder = Connection::builder().delivery(Delivery::Acked).window(20_000).backoff(pauses);
            let connection = builder.dial(&address).await.unwrap();
            let sending = connection.clone();
            let task = tokio::spawn(async move {
                for number in 0.. {
                    if sending.send(&numbered(number)).await.is_err() {
                        return;
                    }
                    if number % 64 == 0 {
                        tokio::task::yield_now().await;
                    }
                }
            });
            sender = Some((connection, task));
        }
        let so_far = record.count();
        record.has(so_far + 1_000).await;
        let report = in_time("the shutdown", server.shutdown(PATIENCE)).await;
        assert_eq!((report.cut, report.unfinished, report.unhandled), (0, 0, 0), "round {round}: {report:?}");
        handled += report.received.messages;
        assert_eq!(handled, record.count() as u64, "what was handled is reported");
    }
    let (connection, task) = sender.expect("it was dialled");
    let server = bind_again(Listener::builder(), &address).await.spawn(record.clone());
    let stats = in_time("the close", connection.close(PATIENCE)).await.unwrap();
    in_time("the sender", task).await.unwrap();
    assert_eq!((stats.failed, stats.settled), (0, record.count() as u64));
    assert!(record.messages().into_iter().eq((0..record.count()).map(numbered)), "none is lost, and none twice");
    server.shutdown(PATIENCE).await;
}

/// Takes one message, and is at work on it for ever, or done with it.
struct One {
    is_at_work: bool,
    taken: bool,
}

impl Handler for One {
    fn message(&mut self, _: Message<'_>) -> HandlerResult {
        self.taken = true;
        Ok(())
    }

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<HandlerResult> {
        if self.taken { Poll::Pending } else { Poll::Ready(Ok(())) }
    }

    fn poll_finished(&mut self, _: &mut Context<'_>) -> Poll<HandlerResult> {
        if self.is_at_work { Poll::Pending } else { Poll::Ready(Ok(())) }
    }
}

#[tokio::test]
async fn what_was_in_hand_where_a_shutdown_cut_is_reported_and_a_peer_that_only_hangs_has_nothing_there() {
    for (handler, messages, unfinished) in
        [(None, 3, 0), (Some(false), 1, 0), (Some(true), 1, 1), (Some(false), 5, 1), (Some(true), 5, 1)]
    {
        let builder = Listener::builder();
        let listener = builder.bind("127.0.0.1:0").await.unwrap();
        let server = match handler {
            None => listener.spawn(Recorder::default()),
            Some(is_at_work) => listener.spawn(per_connection(move |_: &Peer| One { is_at_work, taken: false })),
        };
        // It hears GOODBYE, and does not say that it has.
        let mut hung = connect(server.local_address()).await;
        hung.write_all(&[PREFACE, &hello([1; 16], 1, 1, 8192, 600_000)].concat()).await.unwrap();
        assert_eq!(hear(&mut hung).await.unwrap()[0], WELCOME);
        hung.write_all(&message(b"x")).await.unwrap();
        until("one is handled", || server.stats().messages == 1).await;
        hung.write_all(&message(b"x").repeat(messages - 1)).await.unwrap();
        let shutdown = tokio::spawn(server.shutdown(Duration::from_millis(300)));
        let report = in_time("the shutdown", shutdown).await.unwrap();
        let held = messages as u64 - report.received.messages;
        let case = format!("{handler:?}, {messages} messages: {report:?}");
        assert_eq!((report.cut, report.blocked, report.unfinished), (1, 0, unfinished), "{case}");
        assert_eq!((report.unhandled, report.received.broken_cut), (held, 1), "{case}");
        assert_eq!(held, if handler.is_some() { messages as u64 - 1 } else { 0 }, "{case}");
    }
}

#[tokio::test]
async fn messages_that_were_received_and_are_cut_before_they_are_handled_are_counted() {
    const COUNT: u64 = 500;
    let server = Listener::bind("127.0.0.1:0").await.unwrap().spawn(|_: &[u8]| {
        std::thread::sleep(Duration::from_millis(2));
        Ok(())
    });
    let mut client = connect(server.local_address()).await;
    client.write_all(&frames(Framing::default(), vec![b"x"; COUNT as usize])).await.unwrap();
    until("it has begun", || server.stats().messages > 0).await;
    let report = in_time("the shutdown", server.shutdown(Duration::from_millis(50))).await;
    assert_eq!((report.cut, report.unfinished), (1, 1));
    assert_eq!(report.received.messages + report.unhandled, COUNT, "{report:?}");
}

#[tokio::test]
async fn connections_that_wait_to_be_accepted_when_a_shutdown_begins_are_refused_and_counted() {
    let server = Listener::bind("127.0.0.1:0").await.unwrap().spawn(Recorder::default());
    let address = server.local_address().to_string();
    // Without a turn for the one thread of this runtime, which would accept them.
    let waiting: Vec<_> = (0..5).map(|_| std::net::TcpStream::connect(&address).unwrap()).collect();
    let received = in_time("the shutdown", server.shutdown(PATIENCE)).await.received;
    assert_eq!((received.connected + received.refused_stopping, received.refused), (5, received.refused_stopping));
    assert!(received.refused_stopping > 0);
    drop(waiting);
}

/// A stream of whom nobody ever makes room for the end.
struct NeverEnds(tokio::io::DuplexStream);

impl AsyncRead for NeverEnds {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(cx, buffer)
    }
}

impl AsyncWrite for NeverEnds {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Pending
    }
}

#[tokio::test(start_paused = true)]
async fn a_peer_that_does_not_let_the_stream_end_does_not_keep_its_connection() {
    let (here, mut there) = tokio::io::duplex(4096);
    let serving = Listener::builder().serve_io(NeverEnds(here), |_: &[u8]| Ok(()));
    there.shutdown().await.unwrap();
    let ended = in_time("the end", serving).await.unwrap();
    assert!(matches!(ended, Ended::EndOfStream), "{ended}");
}
