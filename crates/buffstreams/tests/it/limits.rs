//! Each limit, hit by a real stranger: they are stopped, counted by their reason, and somebody healthy beside them goes on.

use std::net::SocketAddr;
use std::num::NonZeroU32;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use buffstreams::{
    Address, Connection, Delivery, Framing, Handler, HandlerResult, Listener, ListenerBuilder, MemoryBudget, Message,
    Peer, Prefix, ReceivedStats, Server, per_connection,
};
use tokio::io::AsyncWriteExt;
use tokio::net::{TcpListener, TcpSocket, TcpStream};

use crate::by_hand::{CONFIRM_GOODBYE, PREFACE, REFUSE, WELCOME, control, hear, hello, message};
use crate::support::{PATIENCE, Recorder, closed, connect, frames, in_time, until};

async fn serve(builder: ListenerBuilder, record: &Recorder) -> Server {
    builder.bind("127.0.0.1:0").await.expect("loopback can be listened on").spawn(record.clone())
}

/// Connects from another address of the loopback.
async fn connect_from(host: &str, server: &Address) -> TcpStream {
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind(SocketAddr::new(host.parse().unwrap(), 0)).unwrap();
    let to = server.to_string().parse().unwrap();
    in_time("connecting", socket.connect(to)).await.expect("the server listens")
}

async fn say(socket: &mut TcpStream, text: &str) {
    socket.write_all(&frames(Framing::default(), [text])).await.unwrap();
}

#[cfg(target_os = "linux")]
#[tokio::test]
async fn connections_over_the_most_from_one_address_are_refused_and_other_addresses_are_served() {
    let record = Recorder::default();
    let server = serve(Listener::builder().max_connections_per_address(2), &record).await;
    let mut kept = [connect(server.local_address()).await, connect(server.local_address()).await];
    let mut refused = [connect(server.local_address()).await, connect(server.local_address()).await];
    for stranger in &mut refused {
        closed(stranger).await;
    }
    let mut elsewhere = connect_from("127.0.0.2", server.local_address()).await;
    say(&mut elsewhere, "from elsewhere").await;
    say(&mut kept[0], "kept").await;
    record.has(2).await;
    let stats = server.stats();
    assert_eq!((stats.connected, stats.open, stats.refused, stats.refused_from_address), (3, 3, 2, 2));
    drop(kept);
    until("there is room again", || server.stats().open == 1).await;
    let mut again = connect(server.local_address()).await;
    say(&mut again, "again").await;
    record.has(3).await;
    assert_eq!(server.stats().refused, 2);
}

#[cfg(target_os = "linux")]
#[tokio::test]
async fn only_addresses_that_are_allowed_are_served() {
    let record = Recorder::default();
    let builder = Listener::builder().allow(["10.0.0.0/8".parse().unwrap()]).allow(["127.0.0.2/32".parse().unwrap()]);
    let server = serve(builder, &record).await;
    let mut stranger = connect(server.local_address()).await;
    closed(&mut stranger).await;
    let mut allowed = connect_from("127.0.0.2", server.local_address()).await;
    say(&mut allowed, "allowed").await;
    record.has(1).await;
    let stats = server.stats();
    assert_eq!((stats.connected, stats.refused, stats.refused_not_allowed), (1, 1, 1));
}

#[tokio::test]
async fn an_empty_list_of_addresses_lets_nobody_in_but_through_a_unix_socket() {
    let record = Recorder::default();
    let server = serve(Listener::builder().allow([]).max_connections_per_address(0), &record).await;
    closed(&mut connect(server.local_address()).await).await;
    assert_eq!(server.stats().refused_not_allowed, 1);
    let directory = tempfile::tempdir().unwrap();
    let path = Address::Unix(directory.path().join("socket"));
    let builder = Listener::builder().allow([]).max_connections_per_address(0);
    let by_path = builder.bind(&path).await.unwrap().spawn(record.clone());
    let connection = Connection::dial(by_path.local_address()).await.unwrap();
    connection.send(b"by the file's permissions").await.unwrap();
    record.has(1).await;
}

/// A stranger sends these bytes; the connection is broken off and counted in one place, and somebody else's goes on.
async fn breaks(builder: ListenerBuilder, bytes: &[u8], counted: fn(&ReceivedStats) -> u64) {
    let record = Recorder::default();
    let server = serve(builder, &record).await;
    let mut healthy = connect(server.local_address()).await;
    say(&mut healthy, "before").await;
    record.has(1).await;
    let mut stranger = connect(server.local_address()).await;
    stranger.write_all(bytes).await.unwrap();
    let end = async { closed(&mut stranger).await };
    let talk = async {
        loop {
            say(&mut healthy, "beside").await;
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::select! {
        _ = end => {}
        () = talk => {}
    }
    until("it is counted", || server.stats().broken == 1).await;
    let stats = server.stats();
    assert_eq!((counted(&stats), stats.refused, stats.open), (1, 0, 1), "{stats:?}");
    let before = record.count();
    say(&mut healthy, "behind").await;
    record.has(before + 1).await;
}

#[tokio::test]
async fn bytes_that_are_no_frames_are_counted_as_malformed() {
    breaks(Listener::builder(), b"\x82\x40\x00", |stats| stats.broken_malformed).await;
}

#[tokio::test]
async fn a_frame_that_is_late_is_counted_for_its_deadline() {
    let builder = Listener::builder().frame_deadline(Duration::from_millis(50)).handshake_deadline(None);
    breaks(builder, b"\x14\0\0abc", |stats| stats.broken_frame_deadline).await;
}

#[tokio::test]
async fn a_handshake_that_is_late_is_counted_for_its_deadline() {
    let builder = Listener::builder().handshake_deadline(Duration::from_millis(50)).frame_deadline(None);
    for begun in [&PREFACE[..3], PREFACE, &[PREFACE, &hello([1; 16], 1, 1, 8192, 1_000)[..20]].concat()] {
        breaks(builder.clone(), begun, |stats| stats.broken_handshake_deadline).await;
    }
}

#[tokio::test]
async fn who_never_says_anything_is_counted_as_idle_where_that_has_a_deadline() {
    breaks(Listener::builder().idle_deadline(Duration::from_millis(400)), b"", |stats| stats.broken_idle).await;
}

#[tokio::test]
async fn who_holds_too_much_is_counted_as_overloading() {
    let frame = frames(Framing::default(), [[7; 4000]]);
    breaks(Listener::builder().receive_memory(1_000), &frame[..3000], |stats| stats.broken_overloaded).await;
}

#[tokio::test]
async fn whoever_asks_for_a_session_where_there_are_none_is_counted() {
    breaks(Listener::builder().sessions(false), PREFACE, |stats| stats.broken_session_refused).await;
}

#[tokio::test]
async fn whoever_breaks_a_rule_of_sessions_is_counted() {
    let bytes = [PREFACE, &hello([1; 16], 1, 1, 8192, 1_000), &control(CONFIRM_GOODBYE, &[])].concat();
    breaks(Listener::builder(), &bytes, |stats| stats.broken_violation).await;
}

#[tokio::test]
async fn an_older_connection_of_a_stream_is_counted_as_fenced_and_a_silent_one_as_silent() {
    let record = Recorder::default();
    let server = serve(Listener::builder(), &record).await;
    let mut older = connect(server.local_address()).await;
    older.write_all(&[PREFACE, &hello([1; 16], 1, 1, 8192, 600_000)].concat()).await.unwrap();
    assert_eq!(in_time("it is welcome", hear(&mut older)).await.unwrap()[0], WELCOME);
    let mut newer = connect(server.local_address()).await;
    newer.write_all(&[PREFACE, &hello([1; 16], 2, 1, 8192, 50)].concat()).await.unwrap();
    assert_eq!(in_time("it is welcome", hear(&mut newer)).await.unwrap()[0], WELCOME);
    older.write_all(&message(b"too late")).await.unwrap();
    closed(&mut older).await;
    until("it is counted", || server.stats().broken_fenced == 1).await;
    closed(&mut newer).await;
    until("it is counted", || server.stats().broken_silent == 1).await;
    assert_eq!(server.stats().broken, 2);
}

#[tokio::test]
async fn listeners_and_connections_that_share_a_budget_are_bounded_together() {
    const HALF: usize = 300_000;
    // Buffers grow by doubling: two of these take more.
    let budget = MemoryBudget::new(1_000_000);
    let framing = Framing::with_max(Prefix::U32Be, 1 << 20).unwrap();
    let frame = frames(framing, [vec![9; 1 << 20]]);
    let record = Recorder::default();
    let builder = || Listener::builder().prefix(Prefix::U32Be).max_message_size(1 << 20).receive_memory(budget.clone());
    let (one, two) = (serve(builder(), &record).await, serve(builder(), &record).await);
    let mut first = connect(one.local_address()).await;
    first.write_all(&frame[..HALF]).await.unwrap();
    until("it holds what came", || budget.taken() >= HALF).await;
    let mut second = connect(two.local_address()).await;
    let _ = second.write_all(&frame[..HALF]).await;
    closed(&mut second).await;
    until("it is counted", || two.stats().broken_overloaded == 1).await;
    assert_eq!((one.stats().broken, two.stats().broken), (0, 1), "who came first is left alone");

    // A dialled connection is one of them, too: it is closed, and dials again.
    let peer = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = Address::from(peer.local_addr().unwrap());
    let dialling = Connection::builder().prefix(Prefix::U32Be).max_message_size(1 << 20).receive_memory(budget.clone());
    let connection = dialling.dial(&address).await.unwrap();
    let (mut other_end, _) = peer.accept().await.unwrap();
    let _ = other_end.write_all(&frame[..HALF]).await;
    closed(&mut other_end).await;
    in_time("it dials again", peer.accept()).await.unwrap();
    connection.close(Duration::ZERO).await.unwrap();

    drop(first);
    until("all is given back", || budget.taken() == 0).await;
}

/// Takes one message of a stranger's stream and then no more; everything of the healthy one, one message a turn.
struct Picky {
    peer: Peer,
    handled: Arc<AtomicUsize>,
    is_full: bool,
}

impl Handler for Picky {
    fn message(&mut self, _: Message<'_>) -> HandlerResult {
        self.is_full = true;
        if self.peer.token() == Some(b"healthy") {
            self.handled.fetch_add(1, Ordering::Relaxed);
        }
        Ok(())
    }

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<HandlerResult> {
        if self.is_full && self.peer.token() == Some(b"healthy") {
            // It takes a moment, in which more may come, that has to wait.
            self.is_full = false;
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        if self.is_full { Poll::Pending } else { Poll::Ready(Ok(())) }
    }

    fn poll_finished(&mut self, _: &mut Context<'_>) -> Poll<HandlerResult> {
        Poll::Ready(Ok(()))
    }
}

#[tokio::test]
async fn strangers_who_ask_for_windows_and_fill_them_take_no_memory_from_others_and_bound_themselves() {
    const STRANGERS: u8 = 100;
    let handled = Arc::new(AtomicUsize::new(0));
    let service = {
        let handled = Arc::clone(&handled);
        per_connection(move |peer: &Peer| Picky { peer: peer.clone(), handled: Arc::clone(&handled), is_full: false })
    };
    let builder = Listener::builder().session_memory(1 << 20).session_window(1 << 19);
    let server = builder.bind("127.0.0.1:0").await.unwrap().spawn(service);
    let mut strangers = Vec::new();
    let mut windows = Vec::new();
    for id in 0..STRANGERS {
        let (stranger, window) = ask(&server, id).await;
        windows.push(window);
        strangers.push(stranger);
    }
    assert_eq!(windows[..3], [1 << 19, 1 << 18, (1 << 19) / 3], "equal parts of half of it");
    let builder = Connection::builder().delivery(Delivery::Acked).token(*b"healthy");
    let healthy = builder.dial(server.local_address()).await.unwrap();
    healthy.send(b"before").await.unwrap();
    healthy.flush().await.unwrap();

    let mut rounds = 0;
    for (stranger, window) in strangers.iter_mut().zip(windows) {
        say_one(stranger, &server).await;
        let _ = stranger.write_all(&message(&[7; 1_000]).repeat(window / 1_003)).await;
        for number in 0..20_u64 {
            healthy.send(&number.to_be_bytes().repeat(100)).await.unwrap();
        }
        assert_eq!(in_time("it is acknowledged", healthy.flush()).await.unwrap().failed, 0);
        rounds += 1;
    }
    until("those who hold more than their part are cut", || server.stats().broken_overloaded > 0).await;
    let stats = server.stats();
    assert_eq!(stats.connected, u64::from(STRANGERS) + 1, "the healthy one never had to come back");
    assert_eq!(handled.load(Ordering::Relaxed), 1 + 20 * rounds);
    assert!(stats.broken_overloaded < u64::from(STRANGERS), "who holds little is left alone");
    assert_eq!(stats.broken, stats.broken_overloaded);
    // The first one has taken all that is anybody's. The second is told why it may have no more than its part.
    assert_eq!(last_word(&mut strangers[1]).await[..3], [REFUSE, 0x80, 0x02], "BUSY");
    // Whoever keeps within it is heard to the end, and ends by what it does wrong on purpose.
    let mut modest = ask(&server, STRANGERS).await.0;
    say_one(&mut modest, &server).await;
    modest.write_all(&message(&[7; 1_000]).repeat(4)).await.unwrap();
    // A moment in which it is not cut.
    tokio::time::sleep(Duration::from_millis(100)).await;
    modest.write_all(&control(CONFIRM_GOODBYE, &[])).await.unwrap();
    assert_eq!(last_word(&mut modest).await[..3], [REFUSE, 0, 5], "PROTOCOL");
    in_time("closing", healthy.close(PATIENCE)).await.unwrap();

    // Those who leave give back what they took: somebody may have that much again.
    drop((strangers, modest));
    until("all are gone", || server.stats().open == 0).await;
    let mut another = ask(&server, STRANGERS + 1).await.0;
    let _one_more = ask(&server, STRANGERS + 2).await;
    say_one(&mut another, &server).await;
    another.write_all(&message(&[7; 1_000]).repeat(400)).await.unwrap();
    another.write_all(&control(CONFIRM_GOODBYE, &[])).await.unwrap();
    assert_eq!(last_word(&mut another).await[..3], [REFUSE, 0, 5], "PROTOCOL");
}

/// Asks for a session with a window of any size; returns the socket, and the window granted.
async fn ask(server: &Server, id: u8) -> (TcpStream, usize) {
    let mut stranger = connect(server.local_address()).await;
    stranger.write_all(&[PREFACE, &hello([id; 16], 1, 1, 1 << 30, 600_000)].concat()).await.unwrap();
    let welcome = in_time("it is welcome", hear(&mut stranger)).await.unwrap();
    assert_eq!(welcome[0], WELCOME, "nobody is kept out by those who only ask");
    (stranger, u64::from_be_bytes(welcome[34..42].try_into().unwrap()) as usize)
}

/// Sends a message, after which the handler takes no more of this stream.
async fn say_one(stranger: &mut TcpStream, server: &Server) {
    let before = server.stats().messages;
    stranger.write_all(&message(b"one")).await.unwrap();
    until("it is handled", || server.stats().messages > before).await;
}

/// The last control frame before the end.
async fn last_word(stranger: &mut TcpStream) -> Vec<u8> {
    let mut last = Vec::new();
    while let Some(frame) = hear(stranger).await {
        last = frame;
    }
    last
}

#[tokio::test]
async fn what_comes_faster_than_allowed_waits_and_nothing_is_lost_or_held_up_beside_it() {
    const RATE: u32 = 200;
    const COUNT: usize = 400;
    for delivery in [Delivery::Sent, Delivery::Acked] {
        let record = Recorder::default();
        let server = serve(Listener::builder().max_message_rate(NonZeroU32::new(RATE)), &record).await;
        // A session that were not heard meanwhile would be given up after 0.9 s, which is half of what it takes.
        let builder = Connection::builder().delivery(delivery).heartbeat(Duration::from_millis(300));
        // Before its connection has a limiter, whose account begins then.
        let begun = Instant::now();
        let fast = builder.dial(server.local_address()).await.unwrap();
        for number in 0..COUNT {
            fast.send(format!("{number}").as_bytes()).await.unwrap();
        }
        until("it has begun", || record.count() > 0).await;
        let mut beside = connect(server.local_address()).await;
        say(&mut beside, "beside").await;
        until("somebody else is not held up", || record.messages().contains(&b"beside".to_vec())).await;
        assert!(record.count() < COUNT, "the fast one is");
        record.has(COUNT + 1).await;
        // At most 1.2 times as many in any second: a tenth may come at once, and is paid for afterwards.
        let least = Duration::from_secs_f64((COUNT as f64 - 0.2 * f64::from(RATE)) / f64::from(RATE));
        assert!(begun.elapsed() >= least, "{COUNT} came within {:?}", begun.elapsed());
        let of_fast = record.messages().into_iter().filter(|message| message != b"beside");
        assert!(of_fast.eq((0..COUNT).map(|number| number.to_string().into_bytes())), "all of them, in order");
        let stats = server.stats();
        assert!(stats.throttled > 0 && stats.broken == 0 && stats.connected == 2, "{stats:?}");
        in_time("closing", fast.close(PATIENCE)).await.unwrap();
    }
}

#[tokio::test]
async fn the_rate_does_not_hold_a_shutdown_up() {
    let record = Recorder::default();
    let server = serve(Listener::builder().max_message_rate(NonZeroU32::MIN), &record).await;
    let mut client = connect(server.local_address()).await;
    client.write_all(&frames(Framing::default(), vec![b"x"; 200])).await.unwrap();
    record.has(1).await;
    let report = in_time("the shutdown", server.shutdown(2 * PATIENCE)).await;
    assert_eq!((report.cut, report.received.messages), (0, 200), "what was received is finished");
}

/// Keeps every message in hand, so that nothing is acknowledged.
struct Keeping;

impl Handler for Keeping {
    fn message(&mut self, _: Message<'_>) -> HandlerResult {
        Ok(())
    }

    fn defers(&self) -> bool {
        true
    }

    fn poll_finished(&mut self, _: &mut Context<'_>) -> Poll<HandlerResult> {
        Poll::Ready(Ok(()))
    }
}

#[tokio::test]
async fn messages_that_wait_for_their_time_are_handled_then_though_nothing_else_happens() {
    let builder = Listener::builder().max_message_rate(NonZeroU32::new(20));
    let server = builder.bind("127.0.0.1:0").await.unwrap().spawn(per_connection(|_: &Peer| Keeping));
    let mut client = connect(server.local_address()).await;
    client.write_all(&[PREFACE, &hello([1; 16], 1, 1, 8192, 600_000)].concat()).await.unwrap();
    assert_eq!(hear(&mut client).await.unwrap()[0], WELCOME);
    client.write_all(&message(b"x").repeat(20)).await.unwrap();
    until("all are handled", || server.stats().messages == 20).await;
}
