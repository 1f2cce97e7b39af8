//! What strangers can do to acknowledged streams: those who send rubbish at every step of one, and those who take their time.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use buffstreams::{
    Address, Backoff, Bytes, Connection, ConnectionBuilder, Delivery, Event, Handler, HandlerResult, Listener,
    MemoryBudget, Message, Peer, Server, State, async_handler, per_connection,
};
use fastrand::Rng;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Notify, mpsc};

use crate::by_hand::{
    ACK, CONFIRM_GOODBYE, CONFIRM_REJECT, GOODBYE, HEARTBEAT, PREFACE, REFUSE, REJECT, SKIP, control, hear, hello,
    message, numbered, welcome,
};
use crate::support::{Possessions, amount, connect, in_time, is_alone, passes_alone, until};

const DEADLINE: Duration = Duration::from_secs(20);

/// What the healthy sender says of itself.
const HEALTHY: &[u8] = b"healthy";

fn acked() -> ConnectionBuilder {
    Connection::builder().delivery(Delivery::Acked)
}

fn seed() -> u64 {
    let seed = amount("BUFFSTREAMS_SEED", fastrand::usize(..)) as u64;
    println!("BUFFSTREAMS_SEED={seed}");
    seed
}

/// Writes down the numbers of the healthy sender's messages.
struct Beside(Peer, Arc<Mutex<Vec<u64>>>);

impl Handler for Beside {
    fn message(&mut self, message: Message<'_>) -> HandlerResult {
        if self.0.token() == Some(HEALTHY) {
            self.1.lock().unwrap().push(u64::from_be_bytes(message[..8].try_into()?));
        }
        Ok(())
    }
}

/// A sender that has one message acknowledged after the other, while others do what they will.
struct Healthy {
    connection: Connection,
    is_over: Arc<AtomicBool>,
    sending: tokio::task::JoinHandle<Vec<Duration>>,
}

impl Healthy {
    async fn begin(address: &Address) -> Healthy {
        let connection = acked().token(HEALTHY).dial(address).await.unwrap();
        let is_over = Arc::new(AtomicBool::new(false));
        let sending = tokio::spawn({
            let (connection, is_over) = (connection.clone(), Arc::clone(&is_over));
            async move {
                let mut took = Vec::new();
                while !is_over.load(Ordering::Relaxed) {
                    let begun = Instant::now();
                    connection.send(&(took.len() as u64).to_be_bytes()).await.unwrap();
                    let flushed = in_time("it is acknowledged", connection.flush()).await.unwrap();
                    assert_eq!((flushed.settled, flushed.failed), (took.len() as u64 + 1, 0));
                    took.push(begun.elapsed());
                    tokio::time::sleep(Duration::from_micros(500)).await;
                }
                took
            }
        });
        Healthy { connection, is_over, sending }
    }

    /// How long each message took from `send` to its acknowledgement.
    async fn end(self) -> Vec<Duration> {
        self.is_over.store(true, Ordering::Relaxed);
        let took = in_time("the healthy sender", self.sending).await.unwrap();
        let stats = in_time("it is closed", self.connection.close(DEADLINE)).await.unwrap();
        assert!(stats.is_conserved() && stats.settled == took.len() as u64, "{stats:?}");
        took
    }
}

fn percentile(sorted: &[Duration], part: usize) -> Duration {
    sorted[(sorted.len() * part / 100).min(sorted.len() - 1)]
}

fn junk(random: &mut Rng, most: usize) -> Vec<u8> {
    let length = random.usize(..most);
    std::iter::repeat_with(|| random.u8(..)).take(length).collect()
}

/// Numbers that are likely to be wrong in an interesting way.
fn some_number(random: &mut Rng) -> u64 {
    match random.u8(..6) {
        0 => 0,
        1 => u64::MAX - random.u64(..3),
        2 => random.u64(..),
        3 => 1 << random.u8(..64),
        _ => random.u64(..20),
    }
}

/// Legal frames of any kind, not always in their place.
fn some_frames(random: &mut Rng) -> Vec<u8> {
    let mut bytes = Vec::new();
    for _ in 0..random.usize(..12) {
        let number = some_number(random);
        let next = match random.u8(..14) {
            0 => numbered(ACK, number),
            1 => control(REJECT, &[&number.to_be_bytes(), &[0, 0, 0, 7], b"no"]),
            2 => numbered(CONFIRM_REJECT, number),
            3 => control(HEARTBEAT, &[]),
            4 => control(GOODBYE, &[]),
            5 => control(CONFIRM_GOODBYE, &[]),
            6 => numbered(SKIP, number),
            7 => control(random.u8(..), &[&junk(random, 1000)]),
            8 => welcome([3; 16], number, number.min(some_number(random)), some_number(random), random.u32(..)),
            9 => control(REFUSE, &[&random.u16(..).to_be_bytes(), &number.to_be_bytes(), b"because"]),
            _ => message(&vec![7; random.usize(..4096)]),
        };
        bytes.extend(next);
    }
    bytes
}

/// Bytes are changed, left out or repeated; or the end is missing.
fn mutated(mut bytes: Vec<u8>, random: &mut Rng) -> Vec<u8> {
    for _ in 0..random.usize(..4) {
        if bytes.is_empty() {
            break;
        }
        let at = random.usize(..bytes.len());
        match random.u8(..5) {
            0 => bytes[at] = random.u8(..),
            1 => bytes[at] ^= 1 << random.u8(..8),
            2 => drop(bytes.remove(at)),
            3 => bytes.insert(at, bytes[at]),
            _ => bytes.truncate(at),
        }
    }
    bytes
}

/// A few streams, some of which come again and again: with higher epochs, or not.
fn some_hello(random: &mut Rng, epoch: u64) -> Vec<u8> {
    let epoch = if random.u8(..8) == 0 { some_number(random) } else { epoch };
    let first = if random.u8(..4) == 0 { some_number(random) } else { 1 };
    let window = if random.u8(..4) == 0 { some_number(random) } else { 8192 };
    hello([random.u8(..32); 16], epoch, first, window, random.u32(1..5_000))
}

/// What a stranger sends who asks for a session: rubbish behind the preface, behind HELLO, in HELLO, or in anything.
fn some_rubbish(random: &mut Rng, epoch: u64) -> Vec<u8> {
    let most = [3, 20, 6_000][random.usize(..3)];
    let greeting = some_hello(random, epoch);
    match random.u8(..5) {
        0 => [PREFACE, &junk(random, most)].concat(),
        1 => [PREFACE, &greeting, &junk(random, most)].concat(),
        2 => [PREFACE, &mutated(greeting, random)].concat(),
        3 => [PREFACE, &greeting, &some_frames(random)].concat(),
        _ => mutated([PREFACE, &greeting, &some_frames(random)].concat(), random),
    }
}

/// Its figures are those of a process of its own, see below.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "a part of another test, which runs it as a process of its own"]
async fn rubbish_alone() {
    if !is_alone() {
        return;
    }
    let panics = count_panics();
    let rounds = amount("BUFFSTREAMS_GARBAGE", 3_000);
    let mut random = Rng::with_seed(seed());
    let ledger = Arc::new(Mutex::new(Vec::new()));
    let service = {
        let ledger = Arc::clone(&ledger);
        per_connection(move |peer: &Peer| Beside(peer.clone(), Arc::clone(&ledger)))
    };
    let server = Listener::bind("127.0.0.1:0").await.unwrap().spawn(service);
    let healthy = Healthy::begin(server.local_address()).await;
    // The healthy sender needs no other connection than its first.
    let have_gone = |strangers: usize| {
        let stats = server.stats();
        (stats.connected, stats.open) == (strangers as u64 + 1, 1)
    };
    let mut before = None;
    let mut strangers: Vec<TcpStream> = Vec::new();
    let warm_up = 1_000;
    for round in 0..warm_up + rounds {
        let mut stranger = connect(server.local_address()).await;
        // The server may have closed already.
        let _ = stranger.write_all(&some_rubbish(&mut random, round as u64 + 1)).await;
        if random.u8(..8) == 0 {
            let _ = stranger.shutdown().await;
        }
        strangers.push(stranger);
        if strangers.len() == 50 {
            strangers.clear();
        }
        if round + 1 == warm_up {
            strangers.clear();
            until("the first strangers have come and gone", || have_gone(round + 1)).await;
            before = Some(Possessions::now());
        }
    }
    drop(strangers);
    until("the strangers have come and gone", || have_gone(warm_up + rounds)).await;
    let before = before.expect("the first rounds are over");
    until("their tasks too", || Possessions::now().tasks <= before.tasks).await;
    let after = Possessions::now();
    let took = healthy.end().await;
    println!("\nfigures: {rounds} strangers beside {} messages, before {before:?}, after {after:?}", took.len());
    assert!(ledger.lock().unwrap().iter().copied().eq(0..took.len() as u64));
    assert_eq!(panics.load(Ordering::Relaxed), 0);
    assert!(after.descriptors <= before.descriptors, "descriptors: {before:?}, then {after:?}");
    // Streams that never said goodbye are remembered, up to a number; the numbers of the healthy one are kept here.
    let remembered = rounds.min(65_536) * 512 + took.len() * 64;
    let allowed = before.memory + before.memory / 10 + (4 << 20) + remembered;
    assert!(after.memory <= allowed, "memory: {before:?}, then {after:?}");
}

/// Panics in this process from now on, those that somebody catches among them.
fn count_panics() -> Arc<AtomicUsize> {
    let panics = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&panics);
    let usual = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        count.fetch_add(1, Ordering::Relaxed);
        usual(panic);
    }));
    panics
}

#[test]
fn rubbish_at_any_step_of_a_session_ends_nothing_but_its_own_connection() {
    passes_alone("strangers::rubbish_alone");
}

/// A listener that answers every HELLO with something that is nearly right.
async fn nearly_a_listener(seed: u64, answered: Arc<AtomicUsize>) -> Address {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().into();
    tokio::spawn(async move {
        let mut random = Rng::with_seed(seed);
        loop {
            let (mut caller, _) = listener.accept().await.unwrap();
            let mut answer = Vec::new();
            if random.u8(..4) == 0 {
                answer.extend(control(REJECT, &[&some_number(&mut random).to_be_bytes(), &[0; 4], b"no"]));
            }
            let dispatched = random.u64(..4);
            answer.extend(welcome([9; 16], dispatched, dispatched.min(random.u64(..4)), 8192, 1_000));
            answer.extend(some_frames(&mut random));
            let answer = match random.u8(..4) {
                0 => answer,
                1 => junk(&mut random, 2_000),
                _ => mutated(answer, &mut random),
            };
            // If not, the caller waits until it takes this for dead.
            let hangs_up = random.u8(..8) > 0;
            let answered = Arc::clone(&answered);
            tokio::spawn(async move {
                let mut greeting = vec![0; PREFACE.len() + hello([0; 16], 1, 1, 1, 1).len()];
                let _ = caller.read_exact(&mut greeting).await;
                let _ = caller.write_all(&answer).await;
                answered.fetch_add(1, Ordering::Relaxed);
                let mut rest = [0; 4096];
                while !hangs_up && caller.read(&mut rest).await.is_ok_and(|read| read > 0) {}
            });
        }
    });
    address
}

/// See below.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "a part of another test, which runs it as a process of its own"]
async fn answers_alone() {
    if !is_alone() {
        return;
    }
    let panics = count_panics();
    let rounds = amount("BUFFSTREAMS_GARBAGE", 3_000) / 10;
    let answered = Arc::new(AtomicUsize::new(0));
    let address = nearly_a_listener(seed(), Arc::clone(&answered)).await;
    let pauses = Backoff { min: Duration::from_millis(1), max: Duration::from_millis(2) };
    let (mut senders, mut refused) = (0, 0);
    while answered.load(Ordering::Relaxed) < rounds {
        let before = answered.load(Ordering::Relaxed);
        let failed = Arc::new(AtomicUsize::new(0));
        let counter = Arc::clone(&failed);
        let builder = acked().backoff(pauses).window(8192).heartbeat(Duration::from_millis(50));
        let builder = builder.on_failed(move |_| _ = counter.fetch_add(1, Ordering::Relaxed));
        let connection = builder.dial_lazy(&address).unwrap();
        for _ in 0..5 {
            // It may have been refused for good.
            let _ = connection.send(&[1; 100]).await;
        }
        until("it has tried for a while", || {
            connection.state() == State::Closed
                || connection.stats().in_flight == 0
                || answered.load(Ordering::Relaxed) > before + 20
        })
        .await;
        refused += usize::from(connection.state() == State::Closed);
        let stats = in_time("it is closed", connection.close(Duration::from_millis(20))).await.unwrap();
        assert!(stats.is_conserved() && stats.in_flight == 0, "{stats:?}");
        assert_eq!(stats.failed, failed.load(Ordering::Relaxed) as u64, "whoever asked gets what failed");
        senders += 1;
    }
    println!("\nfigures: {senders} senders, {} answers, {refused} refused for good", answered.load(Ordering::Relaxed));
    assert_eq!(panics.load(Ordering::Relaxed), 0);
}

#[test]
fn a_sender_accounts_for_every_message_whatever_is_answered() {
    passes_alone("strangers::answers_alone");
}

/// Somebody who begins and does not come to an end: how they begin, and what they then send byte by byte.
fn some_slowness(index: usize) -> (Vec<u8>, Vec<u8>) {
    let mut stream = [1; 16];
    stream[..8].copy_from_slice(&(index as u64).to_be_bytes());
    let greeting = hello(stream, 1, 1, 8192, 1_000);
    match index % 6 {
        // A part of the preface; the whole of it, and no more; a part of HELLO; all of these, and then a trickle.
        0 => (PREFACE[..9].to_vec(), Vec::new()),
        1 => (PREFACE.to_vec(), Vec::new()),
        2 => ([PREFACE, &greeting[..40]].concat(), Vec::new()),
        3 => (PREFACE[..1].to_vec(), [&PREFACE[1..], &greeting].concat()),
        4 => (PREFACE.to_vec(), greeting),
        // In a session that was granted, a message.
        _ => ([PREFACE, &greeting].concat(), message(&[7; 4000])),
    }
}

/// Waits until the other side closes, as whoever trickles.
async fn trickling(address: Address, index: usize) {
    let (begins, trickles) = some_slowness(index);
    let (mut reading, mut writing) = connect(&address).await.into_split();
    writing.write_all(&begins).await.unwrap();
    let trickle = async {
        for byte in trickles {
            tokio::time::sleep(Duration::from_millis(100)).await;
            if writing.write_all(&[byte]).await.is_err() {
                break;
            }
        }
        std::future::pending::<()>().await;
    };
    let mut heard = vec![0; 1024];
    let closed = async { while reading.read(&mut heard).await.is_ok_and(|read| read > 0) {} };
    tokio::select! {
        () = in_time("a slow stranger is cut off", closed) => {}
        () = trickle => {}
    }
}

/// Its figures are those of a process of its own, see below.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "a part of another test, which runs it as a process of its own"]
async fn slowness_alone() {
    if !is_alone() {
        return;
    }
    let count = amount("BUFFSTREAMS_SLOW", 300);
    rlimit::increase_nofile_limit(2 * count as u64 + 1_000).unwrap();
    let ledger = Arc::new(Mutex::new(Vec::new()));
    let service = {
        let ledger = Arc::clone(&ledger);
        per_connection(move |peer: &Peer| Beside(peer.clone(), Arc::clone(&ledger)))
    };
    let allowed = Duration::from_secs(2);
    let builder = Listener::builder().frame_deadline(allowed).handshake_deadline(allowed);
    let listener = builder.bind("127.0.0.1:0").await.unwrap();
    let server: Server = listener.spawn(service);
    let healthy = Healthy::begin(server.local_address()).await;
    until("it has a while to itself", || ledger.lock().unwrap().len() > 500).await;
    let alone = ledger.lock().unwrap().len();
    let begun = Instant::now();
    let strangers: Vec<_> =
        (0..count).map(|index| tokio::spawn(trickling(server.local_address().clone(), index))).collect();
    until("all are there", || server.stats().connected == count as u64 + 1).await;
    let there = ledger.lock().unwrap().len();
    let most = server.stats().open;
    for stranger in strangers {
        stranger.await.unwrap();
    }
    let all_gone = begun.elapsed();
    let gone = ledger.lock().unwrap().len();
    until("they are gone", || server.stats().open == 1).await;
    let stats = server.stats();
    assert_eq!(stats.broken, count as u64);
    let late = (stats.broken_handshake_deadline, stats.broken_frame_deadline);
    assert_eq!(late, ((count - count / 6) as u64, (count / 6) as u64), "only a message is no handshake");
    let mut took = healthy.end().await;
    assert!(ledger.lock().unwrap().iter().copied().eq(0..took.len() as u64));
    for range in [0..alone, there..gone] {
        took[range].sort();
    }
    println!(
        "\nfigures: {count} slow strangers, at most {most} open, all cut off after {all_gone:.2?}; the healthy sender's p50 \
         and p99 {:.0?} {:.0?} before, {:.0?} {:.0?} beside them",
        percentile(&took[..alone], 50),
        percentile(&took[..alone], 99),
        percentile(&took[there..gone], 50),
        percentile(&took[there..gone], 99),
    );
}

#[test]
fn whoever_is_slow_at_any_step_of_a_session_is_cut_off_by_a_deadline() {
    passes_alone("strangers::slowness_alone");
}

#[tokio::test]
async fn a_preface_without_hello_is_cut_off_by_the_handshake_deadline() {
    let allowed = Duration::from_millis(200);
    let listener = Listener::builder().handshake_deadline(allowed).bind("127.0.0.1:0").await.unwrap();
    let server = listener.spawn(|_: &[u8]| Ok(()));
    let mut stranger = connect(server.local_address()).await;
    stranger.write_all(PREFACE).await.unwrap();
    assert_eq!(hear(&mut stranger).await, None, "it is closed");
    until("it is counted", || server.stats().broken_handshake_deadline == 1).await;
    assert_eq!(server.stats().broken, 1);
}

/// What the process takes tells what is kept, so it runs as one of its own.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "a part of another test, which runs it as a process of its own"]
async fn padding_alone() {
    if !is_alone() {
        return;
    }
    let service = async_handler(|_: Bytes, _: Peer| std::future::pending());
    let builder = Listener::builder().session_memory(1 << 20).session_window(64 << 10);
    let server = builder.bind("127.0.0.1:0").await.unwrap().spawn(service);
    let mut stranger = connect(server.local_address()).await;
    stranger.write_all(&[PREFACE, &hello([7; 16], 1, 1, 64 << 10, 60_000)].concat()).await.unwrap();
    hear(&mut stranger).await.expect("it is welcome");
    let bursts = [control(0x80, &[&[0; 1000]]).repeat(60), message(b"x")].concat();
    let (mut before, mut sent) = (Possessions::now().memory, 0);
    for round in 0..1_500 {
        if round == 500 {
            until("the handler has one in hand", || server.stats().messages > 0).await;
            before = Possessions::now().memory;
        }
        in_time("it goes on reading", stranger.write_all(&bursts)).await.unwrap();
        sent += bursts.len();
    }
    let grown = Possessions::now().memory.saturating_sub(before);
    println!("\nfigures: {} MiB sent, {} KiB grown", sent >> 20, grown >> 10);
    assert_eq!(server.stats().open, 1, "it holds little");
    assert!(grown < 16 << 20, "{} KiB are kept for a few bytes", grown >> 10);
}

#[test]
fn messages_that_wait_keep_nothing_alive_that_was_read_with_them() {
    passes_alone("strangers::padding_alone");
}

#[tokio::test]
async fn a_listener_that_sends_more_replies_than_may_wait_is_parted_from() {
    const WINDOW: usize = 100_000;
    let (go_on, mut goes_on) = mpsc::channel(1);
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = Address::from(listener.local_addr().unwrap());
    let replies = tokio::spawn(async move {
        let mut caller = listener.accept().await.unwrap().0;
        let mut greeting = vec![0; PREFACE.len() + hello([0; 16], 1, 1, 1, 1).len()];
        caller.read_exact(&mut greeting).await.unwrap();
        caller.write_all(&welcome([9; 16], 0, 0, 8192, 60_000)).await.unwrap();
        for count in [1, 60] {
            caller.write_all(&message(&[1; 997]).repeat(count)).await.unwrap();
            goes_on.recv().await.unwrap();
        }
        while caller.write_all(&message(&[1; 997])).await.is_ok() {}
    });
    let is_over = Arc::new(Notify::new());
    let busy = async_handler({
        let is_over = Arc::clone(&is_over);
        move |_: Bytes, _: Peer| {
            let is_over = Arc::clone(&is_over);
            async move {
                is_over.notified().await;
                Ok(())
            }
        }
    });
    let memory = MemoryBudget::new(2 * WINDOW);
    let builder = acked().handler(busy).receive_memory(memory.clone());
    let connection = builder.dial_lazy(&address).unwrap();
    let mut events = connection.events();
    until("the handler has one in hand", || connection.received().messages > 0).await;
    go_on.send(()).await.unwrap();
    until("those that wait are accounted for", || memory.taken() >= 60_000).await;
    go_on.send(()).await.unwrap();
    let lost = async {
        loop {
            if let Some(Event::Lost { why }) = events.next().await {
                return why;
            }
        }
    };
    let why = in_time("it is parted from", lost).await;
    assert!(why.contains(&format!("101000 bytes were sent ahead, and the window is {WINDOW}")), "{why}");
    in_time("nobody listens", replies).await.unwrap();
    is_over.notify_one();
    until("all is given back", || memory.taken() == 0).await;
}
