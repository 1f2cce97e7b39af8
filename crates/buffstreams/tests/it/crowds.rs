//! Many acknowledged streams: one after the other, all at once, and more than there are descriptors. Afterwards nothing is
//! left of those that are done.

use std::collections::{BTreeSet, HashMap};
use std::io::{BufRead, BufReader};
use std::process::Stdio;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use buffstreams::{
    Address, Backoff, Connection, ConnectionBuilder, Delivery, Ended, Handler, HandlerResult, Listener, Message, Peer,
    Retry, Server, per_connection,
};
use tokio::io::AsyncWriteExt;
use tokio::sync::Semaphore;

use crate::by_hand::{ACK, CONFIRM_GOODBYE};
use crate::by_hand::{EPOCH, GOODBYE, PREFACE, REFUSE, WELCOME, control, hear, hello, message, numbered, stand};
use crate::support::{APART, Possessions, alone, amount, connect, in_time, is_alone, passes_alone, until};

const DEADLINE: Duration = Duration::from_secs(60);

fn acked() -> ConnectionBuilder {
    Connection::builder().delivery(Delivery::Acked)
}

/// What a listener says to HELLO: the kind of the frame, and the frame.
async fn ask(address: &Address, stream: [u8; 16], epoch: u64) -> (tokio::net::TcpStream, Vec<u8>) {
    let mut socket = connect(address).await;
    socket.write_all(&[PREFACE, &hello(stream, epoch, 1, 8192, 10_000)].concat()).await.unwrap();
    let answer = hear(&mut socket).await.expect("there is an answer");
    (socket, answer)
}

#[tokio::test]
async fn a_stream_is_remembered_until_its_sender_says_goodbye_and_not_longer() {
    let server = Listener::bind("127.0.0.1:0").await.unwrap().spawn(|_: &[u8]| Ok(()));
    let address = server.local_address();
    let stream = [5; 16];
    for round in 0..2 {
        let (mut socket, answer) = ask(address, stream, 1).await;
        assert_eq!((answer[0], stand(&answer)), (WELCOME, (0, 0)), "round {round}: nothing is known of it");
        socket.write_all(&message(b"one")).await.unwrap();
        assert_eq!(hear(&mut socket).await.unwrap(), numbered(ACK, 1)[3..]);
        drop(socket);
        until("the connection is gone", || server.stats().open == 0).await;

        // Without a goodbye it is remembered: the epoch, and the number.
        let (socket, answer) = ask(address, stream, 1).await;
        assert_eq!((answer[0], &answer[1..3]), (REFUSE, &EPOCH.to_be_bytes()[..]));
        drop(socket);
        let (mut socket, answer) = ask(address, stream, 2).await;
        assert_eq!((answer[0], stand(&answer)), (WELCOME, (1, 1)));
        socket.write_all(&control(GOODBYE, &[])).await.unwrap();
        assert_eq!(hear(&mut socket).await.unwrap(), [CONFIRM_GOODBYE]);
        drop(socket);
        until("the connection is gone", || server.stats().open == 0).await;
    }
}

/// Notes the stream of every connection, and counts messages.
struct Noting(Peer, Arc<Mutex<Vec<[u8; 16]>>>, Arc<AtomicU64>);

impl Handler for Noting {
    fn message(&mut self, _message: Message<'_>) -> HandlerResult {
        self.2.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    fn ended(&mut self, _why: &Ended) {
        self.1.lock().unwrap().extend(self.0.stream_id().map(|stream| *stream.as_bytes()));
    }
}

/// Its figures are those of a process of its own, see below.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "a part of another test, which runs it as a process of its own"]
async fn churn_alone() {
    if !is_alone() {
        return;
    }
    let rounds = amount("BUFFSTREAMS_CHURN", 2_000);
    let streams = Arc::new(Mutex::new(Vec::with_capacity(2 * rounds + 1_000)));
    let handled = Arc::new(AtomicU64::new(0));
    let service = {
        let (streams, handled) = (Arc::clone(&streams), Arc::clone(&handled));
        per_connection(move |peer: &Peer| Noting(peer.clone(), Arc::clone(&streams), Arc::clone(&handled)))
    };
    let server = Listener::bind("127.0.0.1:0").await.unwrap().spawn(service);
    let Address::Tcp { port, .. } = *server.local_address() else { unreachable!("it is bound to one") };
    let (mut before, mut sent) = (None, 0);
    let begun = Instant::now();
    for round in 0..rounds + 200 {
        let connection = acked().dial(format!("127.0.0.1:{port}").as_str()).await.unwrap();
        for _ in 0..round % 4 {
            connection.send(&[7; 100]).await.unwrap();
        }
        if round.is_multiple_of(10) {
            // Some of them on more than one socket: what is sent now goes by the next.
            connection.flush().await.unwrap();
            connection.reopen();
            connection.send(&[7; 100]).await.unwrap();
        }
        let stats = in_time("the next round", connection.close(DEADLINE)).await.unwrap();
        assert_eq!((stats.settled, stats.failed), (stats.accepted, 0));
        sent += stats.accepted;
        if round == 199 {
            until("the first rounds are over", || server.stats().open == 0).await;
            before = Some(Possessions::now());
        }
    }
    until("all are gone", || server.stats().open == 0).await;
    let before = before.expect("there were more than 200 rounds");
    until("tasks are gone", || Possessions::now().tasks <= before.tasks).await;
    let after = Possessions::now();
    let took = begun.elapsed();
    assert_eq!(handled.load(Ordering::Relaxed), sent);
    println!("\nfigures: {rounds} rounds in {took:.1?}, before {before:?}, after {after:?}");
    assert!(after.descriptors <= before.descriptors, "descriptors: {before:?}, then {after:?}");
    assert!(after.memory <= before.memory + before.memory / 10 + (4 << 20), "memory: {before:?}, then {after:?}");

    // The listener knows none of them any more: whoever comes by one of their names, is new.
    let streams: BTreeSet<_> = std::mem::take(&mut *streams.lock().unwrap()).into_iter().collect();
    assert_eq!(streams.len(), rounds + 200);
    for stream in streams.iter().step_by(streams.len() / 500) {
        let (_, answer) = ask(server.local_address(), *stream, 1).await;
        assert_eq!(answer[0], WELCOME, "it was not forgotten: {}", String::from_utf8_lossy(&answer));
        assert_eq!(stand(&answer), (0, 0));
    }
}

#[test]
fn streams_that_come_and_go_over_and_over_leave_no_descriptor_no_task_no_memory_and_no_stream() {
    passes_alone("crowds::churn_alone");
}

/// The numbers of every stream's messages; and when each came back to the listener at hand.
#[derive(Debug, Default)]
struct Arrivals {
    ledgers: Mutex<HashMap<Vec<u8>, Vec<u64>>>,
    came: Mutex<Vec<Instant>>,
}

struct Arriving(Peer, Arc<Arrivals>);

impl Handler for Arriving {
    fn message(&mut self, message: Message<'_>) -> HandlerResult {
        let sender = self.0.token().unwrap_or_default();
        let number = u64::from_be_bytes(message[..8].try_into()?);
        let mut ledgers = self.1.ledgers.lock().unwrap();
        match ledgers.get_mut(sender) {
            Some(ledger) => ledger.push(number),
            None => drop(ledgers.insert(sender.to_vec(), vec![number])),
        }
        Ok(())
    }
}

/// Its descriptors are those of a process of its own, see below.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "a part of another test, which runs it as a process of its own"]
async fn herd_alone() {
    if !is_alone() {
        return;
    }
    let count = amount("BUFFSTREAMS_HERD", 500);
    rlimit::increase_nofile_limit(4 * count as u64 + 1_000).unwrap();
    let arrivals = Arc::new(Arrivals::default());
    let serve = async |address: &str| -> Server {
        let arrivals = Arc::clone(&arrivals);
        let builder = Listener::builder().session_window(64 * 1024);
        let listener = builder.bind(address).await.unwrap();
        listener.spawn(per_connection(move |peer: &Peer| {
            arrivals.came.lock().unwrap().push(Instant::now());
            Arriving(peer.clone(), Arc::clone(&arrivals))
        }))
    };
    let mut server = serve(APART).await;
    let address = server.local_address().to_string();
    let is_over = Arc::new(AtomicBool::new(false));
    let senders: Vec<_> = (0..count)
        .map(|sender| {
            let backoff = Backoff { min: Duration::from_millis(100), max: Duration::from_secs(2) };
            let builder = acked().token(sender.to_string()).retry(Retry::Forever).backoff(backoff);
            let connection = builder.dial_lazy(address.as_str()).unwrap();
            let is_over = Arc::clone(&is_over);
            tokio::spawn(async move {
                let mut sent = 0_u64;
                while !is_over.load(Ordering::Relaxed) {
                    connection.send(&sent.to_be_bytes()).await.unwrap();
                    sent += 1;
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
                let flushed = in_time("it is flushed", connection.flush()).await.unwrap();
                assert_eq!((flushed.settled, flushed.failed), (sent, 0));
                let stats = in_time("it is closed", connection.close(DEADLINE)).await.unwrap();
                assert!(stats.is_conserved(), "{stats:?}");
                sent
            })
        })
        .collect();
    for away in [Duration::ZERO, Duration::from_secs(1)] {
        until("all are there", || server.stats().open == count as u64).await;
        until("all have sent", || arrivals.ledgers.lock().unwrap().len() == count).await;
        let report = in_time("it shuts down", server.shutdown(DEADLINE)).await;
        assert_eq!(report.cut, 0);
        arrivals.came.lock().unwrap().clear();
        tokio::time::sleep(away).await;
        server = serve(&address).await;
        let back = Instant::now();
        until("all are back", || server.stats().open == count as u64).await;
        let mut came: Vec<_> =
            arrivals.came.lock().unwrap().iter().map(|at| at.saturating_duration_since(back)).collect();
        came.sort();
        let busiest = came.iter().map(|from| {
            let until = *from + Duration::from_millis(10);
            came.iter().filter(|at| *at >= from && **at < until).count()
        });
        println!(
            "\nfigures: {count} streams back after {away:?}: {} connections, the first after {:.0?}, half after {:.0?}, 99 % \
             after {:.0?}, the last after {:.0?}; at most {} within 10 ms",
            came.len(),
            came[0],
            came[came.len() / 2],
            came[came.len() * 99 / 100],
            came[came.len() - 1],
            busiest.max().unwrap_or(0),
        );
    }
    is_over.store(true, Ordering::Relaxed);
    for (sender, sending) in senders.into_iter().enumerate() {
        let sent = sending.await.unwrap();
        let ledgers = arrivals.ledgers.lock().unwrap();
        let ledger = &ledgers[sender.to_string().as_bytes()];
        assert!(ledger.iter().copied().eq(0..sent), "sender {sender}: in order, none missing and none twice");
    }
    until("all are gone", || server.stats().open == 0).await;
}

#[test]
fn a_herd_of_streams_survives_restarts_of_its_listener_and_loses_nothing() {
    passes_alone("crowds::herd_alone");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn streams_wait_for_a_listener_without_descriptors_and_lose_nothing() {
    const SENDERS: usize = 200;
    let mut child = alone("hostile::a_server_with_few_descriptors").stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines().map_while(Result::ok);
    let address = lines.find_map(|line| line.strip_prefix("listens on ").map(str::to_owned)).unwrap();
    let settled = Arc::new(AtomicU64::new(0));
    let may_leave = Arc::new(Semaphore::new(0));
    let senders: Vec<_> = (0..SENDERS)
        .map(|_| {
            let builder = acked().heartbeat(Duration::from_secs(1)).window(64 * 1024);
            let connection = builder.dial_lazy(address.as_str()).unwrap();
            let (settled, may_leave) = (Arc::clone(&settled), Arc::clone(&may_leave));
            tokio::spawn(async move {
                connection.send(b"ping").await.unwrap();
                let flushed = in_time("it is acknowledged", connection.flush()).await.unwrap();
                assert_eq!((flushed.settled, flushed.failed), (1, 0));
                settled.fetch_add(1, Ordering::Relaxed);
                may_leave.acquire().await.unwrap().forget();
                in_time("it is closed", connection.close(DEADLINE)).await.unwrap()
            })
        })
        .collect();
    until("as many are served as there are descriptors for", || settled.load(Ordering::Relaxed) >= 32).await;
    tokio::time::sleep(Duration::from_millis(500)).await;
    let served = settled.load(Ordering::Relaxed);
    assert!(served < 64, "64 descriptors are not enough for {served} connections");
    let begun = Instant::now();
    may_leave.add_permits(SENDERS);
    for sender in senders {
        let stats = in_time("all have left", sender).await.unwrap();
        assert!(stats.is_conserved() && stats.settled == 1, "{stats:?}");
    }
    println!("figures: {served} served at first, the other {} within {:.1?}", SENDERS as u64 - served, begun.elapsed());
    drop(child.stdin.take());
    let rest: Vec<_> = lines.collect();
    assert!(child.wait().unwrap().success(), "{rest:?}");
}
