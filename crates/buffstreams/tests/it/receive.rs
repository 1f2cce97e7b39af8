//! Handlers of every kind: what they are given, in which order, what they may do, and what their errors and panics cost.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use buffstreams::{
    Address, Bytes, Connection, Delivery, Ended, Framing, Handler, HandlerError, HandlerResult, Listener, Message,
    OnHandlerError, Peer, PeerAddress, Prefix, Server, Service, async_handler, blocking_handler, messages,
    per_connection,
};
use futures_util::{FutureExt, StreamExt};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::Semaphore;

use crate::support::{Echo, PATIENCE, Recorder, closed, connect, frames, in_time, read_messages, until};

async fn serve(service: impl Service) -> Server {
    Listener::bind("127.0.0.1:0").await.unwrap().spawn(service)
}

fn numbered(number: usize) -> Vec<u8> {
    format!("message {number}").into_bytes()
}

#[tokio::test]
async fn a_closure_is_lent_every_message_of_every_connection() {
    let total = Arc::new(AtomicUsize::new(0));
    let sum = Arc::clone(&total);
    let server = serve(move |message: &[u8]| {
        sum.fetch_add(message.len(), Ordering::Relaxed);
        Ok(())
    })
    .await;
    for size in [1, 10, 100] {
        let connection = Connection::dial(server.local_address()).await.unwrap();
        connection.send(&vec![0; size]).await.unwrap();
        connection.close(PATIENCE).await.unwrap();
    }
    until("all are handled", || total.load(Ordering::Relaxed) == 111).await;
    let stats = server.stats();
    assert_eq!((stats.messages, stats.bytes, stats.connected, stats.broken), (3, 111, 3, 0));
}

#[tokio::test]
async fn a_handler_per_connection_has_state_a_peer_replies_and_an_end() {
    struct Counting {
        peer: Peer,
        count: u64,
        ends: Arc<Mutex<Vec<(u64, bool)>>>,
    }
    impl Handler for Counting {
        fn message(&mut self, _: Message<'_>) -> HandlerResult {
            self.count += 1;
            self.peer.sender().try_send(self.count.to_string().as_bytes())?;
            Ok(())
        }
        fn ended(&mut self, why: &Ended) {
            self.ends.lock().unwrap().push((self.count, matches!(why, Ended::EndOfStream)));
        }
    }
    let ends = Arc::new(Mutex::new(Vec::new()));
    let seen = Arc::clone(&ends);
    let server = serve(per_connection(move |peer: &Peer| {
        assert!(matches!(peer.address(), PeerAddress::Tcp(address) if address.ip().is_loopback()));
        Counting { peer: peer.clone(), count: 0, ends: Arc::clone(&seen) }
    }))
    .await;
    for count in [3, 5] {
        let mut client = connect(server.local_address()).await;
        client.write_all(&frames(Framing::default(), vec![b"x"; count])).await.unwrap();
        let replies = read_messages(&mut client, Framing::default(), count).await;
        assert_eq!(replies, (1..=count).map(|number| number.to_string().into_bytes()).collect::<Vec<_>>());
        drop(client);
        until("the end is told", || ends.lock().unwrap().last() == Some(&(count as u64, true))).await;
    }
}

#[tokio::test]
async fn the_end_of_a_batch_comes_after_its_messages_and_before_more_is_read() {
    #[derive(Default)]
    struct Batches {
        open: usize,
        closed: Arc<Mutex<Vec<usize>>>,
    }
    impl Handler for Batches {
        fn message(&mut self, _: Message<'_>) -> HandlerResult {
            self.open += 1;
            Ok(())
        }
        fn batch_end(&mut self) -> HandlerResult {
            self.closed.lock().unwrap().push(std::mem::take(&mut self.open));
            Ok(())
        }
        fn ended(&mut self, _: &Ended) {
            assert_eq!(self.open, 0);
        }
    }
    let closed = Arc::new(Mutex::new(Vec::new()));
    let seen = Arc::clone(&closed);
    let server = serve(per_connection(move |_: &Peer| Batches { open: 0, closed: Arc::clone(&seen) })).await;
    let mut client = connect(server.local_address()).await;
    client.write_all(&frames(Framing::default(), [b"x"; 100])).await.unwrap();
    let total = || closed.lock().unwrap().iter().sum::<usize>();
    until("all batches are closed", || total() == 100).await;
    assert!(closed.lock().unwrap().iter().all(|messages| *messages > 0));
    assert!(closed.lock().unwrap().len() < 20, "what is read together is a batch");
}

/// An async service that works on a message until it is let go; and how many it works on, at most at a time.
fn gated(concurrency: usize) -> (impl Service, Arc<Semaphore>, Arc<Mutex<Vec<String>>>) {
    let (gate, log) = (Arc::new(Semaphore::new(0)), Arc::new(Mutex::new(Vec::new())));
    let (opened, events) = (Arc::clone(&gate), Arc::clone(&log));
    let service = async_handler(move |message: Bytes, _: Peer| {
        let (opened, events) = (Arc::clone(&opened), Arc::clone(&events));
        async move {
            let name = String::from_utf8_lossy(&message).into_owned();
            events.lock().unwrap().push(format!("begin {name}"));
            opened.acquire().await.expect("it is not closed").forget();
            events.lock().unwrap().push(format!("end {name}"));
            Ok(())
        }
    });
    (service.concurrency(concurrency), gate, log)
}

#[tokio::test]
async fn an_async_handler_takes_one_message_at_a_time_in_order() {
    let (service, gate, log) = gated(1);
    let server = serve(service).await;
    let connection = Connection::dial(server.local_address()).await.unwrap();
    for name in ["a", "b", "c"] {
        connection.send(name.as_bytes()).await.unwrap();
    }
    until("the first is in work", || !log.lock().unwrap().is_empty()).await;
    tokio::time::sleep(Duration::from_millis(20)).await;
    assert_eq!(*log.lock().unwrap(), ["begin a"]);
    gate.add_permits(3);
    until("all are done", || log.lock().unwrap().len() == 6).await;
    assert_eq!(*log.lock().unwrap(), ["begin a", "end a", "begin b", "end b", "begin c", "end c"]);
}

#[tokio::test]
async fn an_async_handler_works_on_as_many_messages_as_allowed_and_begins_them_in_order() {
    let (service, gate, log) = gated(3);
    let server = serve(service).await;
    let connection = Connection::dial(server.local_address()).await.unwrap();
    for name in ["a", "b", "c", "d", "e"] {
        connection.send(name.as_bytes()).await.unwrap();
    }
    until("three are in work", || log.lock().unwrap().len() == 3).await;
    tokio::time::sleep(Duration::from_millis(20)).await;
    assert_eq!(*log.lock().unwrap(), ["begin a", "begin b", "begin c"]);
    gate.add_permits(1);
    until("one ends and the next begins", || log.lock().unwrap().len() == 5).await;
    assert_eq!(log.lock().unwrap()[4], "begin d");
    gate.add_permits(10);
    until("all are done", || log.lock().unwrap().len() == 10).await;
}

#[tokio::test]
async fn the_errors_of_an_async_handler_do_not_keep_the_next_message_waiting() {
    for concurrency in [1, 3] {
        let count = Arc::new(AtomicUsize::new(0));
        let counter = Arc::clone(&count);
        let service = async_handler(move |_: Bytes, _: Peer| {
            counter.fetch_add(1, Ordering::Relaxed);
            async { Err(HandlerError::new("no")) }
        });
        let server = serve(service.concurrency(concurrency)).await;
        let mut client = connect(server.local_address()).await;
        client.write_all(&frames(Framing::default(), [b"x"; 50])).await.unwrap();
        until("all are handled", || count.load(Ordering::Relaxed) == 50).await;
        until("all errors are counted", || server.stats().handler_errors == 50).await;
        assert_eq!(server.stats().open, 1);
    }
}

#[tokio::test]
async fn an_async_handler_that_is_always_ready_does_not_starve_the_other_connections_of_its_worker() {
    const FLOOD: usize = 50_000;
    let flooded = Arc::new(AtomicUsize::new(0));
    let seen_by_other = Arc::new(AtomicUsize::new(usize::MAX));
    let (flood, seen) = (Arc::clone(&flooded), Arc::clone(&seen_by_other));
    let server = serve(async_handler(move |message: Bytes, _: Peer| {
        let (flood, seen) = (Arc::clone(&flood), Arc::clone(&seen));
        async move {
            if message.is_empty() {
                flood.fetch_add(1, Ordering::Relaxed);
                let begun = Instant::now();
                while begun.elapsed() < Duration::from_micros(10) {}
            } else {
                seen.store(flood.load(Ordering::Relaxed), Ordering::Relaxed);
            }
            Ok(())
        }
    }))
    .await;
    let other = Connection::dial(server.local_address()).await.unwrap();
    let mut flooding = connect(server.local_address()).await;
    flooding.write_all(&vec![0; FLOOD * 3]).await.unwrap();
    until("the flood has begun", || flooded.load(Ordering::Relaxed) > 0).await;
    other.send(b"let me through").await.unwrap();
    until("the other is handled", || seen_by_other.load(Ordering::Relaxed) != usize::MAX).await;
    let handled_before = seen_by_other.load(Ordering::Relaxed);
    assert!(handled_before < FLOOD / 2, "{handled_before} of the flood came first");
    until("the flood is over", || flooded.load(Ordering::Relaxed) == FLOOD).await;
}

#[tokio::test]
async fn a_blocking_handler_may_block_and_keeps_the_order() {
    let log = Arc::new(Mutex::new(Vec::new()));
    let seen = Arc::clone(&log);
    let server = serve(blocking_handler(move |message: &[u8], peer: &Peer| {
        std::thread::sleep(Duration::from_millis(1));
        seen.lock().unwrap().push(message.to_vec());
        peer.sender().try_send(message)?;
        Ok(())
    }))
    .await;
    let mut client = connect(server.local_address()).await;
    let all: Vec<_> = (0..50).map(numbered).collect();
    client.write_all(&frames(Framing::default(), &all)).await.unwrap();
    assert_eq!(read_messages(&mut client, Framing::default(), 50).await, all);
    assert_eq!(*log.lock().unwrap(), all);
}

#[tokio::test]
async fn a_panic_in_any_kind_of_handler_ends_its_own_connection_and_no_other() {
    fn judge(message: &[u8]) -> HandlerResult {
        assert_ne!(message, b"panic", "the handler's own");
        Ok(())
    }
    struct Judge;
    impl Handler for Judge {
        fn message(&mut self, message: Message<'_>) -> HandlerResult {
            judge(&message)
        }
    }
    async fn check(service: impl Service) {
        let server = serve(service).await;
        let bystander = Connection::dial(server.local_address()).await.unwrap();
        let mut client = connect(server.local_address()).await;
        client.write_all(&frames(Framing::default(), [&b"fine"[..], b"panic", b"never"])).await.unwrap();
        closed(&mut client).await;
        until("it is counted", || server.stats().broken == 1).await;
        bystander.send(b"fine").await.unwrap();
        until("the bystander is heard", || server.stats().messages >= 3).await;
        assert_eq!(server.stats().open, 1);
        bystander.close(PATIENCE).await.unwrap();
        let report = server.shutdown(PATIENCE).await;
        assert_eq!(report.cut, 0);
    }
    check(judge).await;
    check(per_connection(|_: &Peer| Judge)).await;
    check(async_handler(|message: Bytes, _: Peer| async move { judge(&message) })).await;
    check(blocking_handler(|message: &[u8], _: &Peer| judge(message))).await;
}

#[tokio::test]
async fn a_service_that_panics_for_a_connection_ends_that_connection() {
    let first = AtomicBool::new(true);
    let server = serve(per_connection(move |peer: &Peer| {
        assert!(!first.swap(false, Ordering::Relaxed), "the service's own");
        Echo(peer.clone())
    }))
    .await;
    closed(&mut connect(server.local_address()).await).await;
    let mut client = connect(server.local_address()).await;
    client.write_all(&frames(Framing::default(), [b"x"])).await.unwrap();
    assert_eq!(read_messages(&mut client, Framing::default(), 1).await, [b"x"]);
    assert_eq!(server.stats().broken, 1);
}

#[tokio::test]
async fn an_error_of_a_handler_is_counted_and_the_connection_goes_on_or_ends_by_policy() {
    fn picky(message: &[u8]) -> HandlerResult {
        if message == b"bad" { Err(io::Error::other("a bad one").into()) } else { Ok(()) }
    }
    for policy in [OnHandlerError::Continue, OnHandlerError::Close] {
        let server = Listener::builder().on_handler_error(policy).bind("127.0.0.1:0").await.unwrap().spawn(picky);
        let mut client = connect(server.local_address()).await;
        client.write_all(&frames(Framing::default(), [&b"good"[..], b"bad", b"good"])).await.unwrap();
        if policy == OnHandlerError::Close {
            closed(&mut client).await;
            until("it is counted", || server.stats().broken == 1).await;
            assert_eq!(server.stats().messages, 2);
        } else {
            until("all are handled", || server.stats().messages == 3).await;
            assert_eq!(server.stats().open, 1);
        }
        assert_eq!(server.stats().handler_errors, 1);
    }
}

#[tokio::test]
async fn an_async_handler_whose_error_closes_its_connection_does_so() {
    let service = async_handler(|_: Bytes, _: Peer| async { Err(HandlerError::new("no")) });
    let server = Listener::builder().on_handler_error(OnHandlerError::Close).bind("127.0.0.1:0").await.unwrap();
    let server = server.spawn(service);
    let mut client = connect(server.local_address()).await;
    client.write_all(&frames(Framing::default(), [b"x"; 5])).await.unwrap();
    closed(&mut client).await;
    until("it is counted", || server.stats().broken == 1).await;
}

#[tokio::test]
async fn a_handler_that_never_stops_failing_is_cut_at_the_deadline_and_harms_no_other() {
    struct Failing;
    impl Handler for Failing {
        fn message(&mut self, _: Message<'_>) -> HandlerResult {
            Ok(())
        }
        fn poll_finished(&mut self, _: &mut Context<'_>) -> Poll<HandlerResult> {
            Poll::Ready(Err(HandlerError::new("never finished")))
        }
    }
    let server = serve(per_connection(|_: &Peer| Failing)).await;
    drop(connect(server.local_address()).await);
    let other = Connection::dial(server.local_address()).await.unwrap();
    other.send(b"x").await.unwrap();
    until("the other is heard", || server.stats().messages == 1).await;
    drop(other);
    let report = in_time("the shutdown", server.shutdown(Duration::from_millis(50))).await;
    assert_eq!((report.cut, report.blocked), (2, 0));
}

#[tokio::test]
async fn a_stream_gives_the_messages_of_all_connections_each_in_order() {
    const EACH: usize = 20_000;
    let (service, mut received) = messages();
    let server = serve(service).await;
    let senders: Vec<_> = (0..3_usize)
        .map(|sender| {
            let address = server.local_address().clone();
            tokio::spawn(async move {
                let connection = Connection::dial(&address).await.unwrap();
                for number in 0..EACH {
                    connection.send(format!("{sender} {number}").as_bytes()).await.unwrap();
                }
                connection.close(PATIENCE).await.unwrap();
            })
        })
        .collect();
    let mut next = [0; 3];
    for _ in 0..3 * EACH {
        let (message, _peer) = in_time("a message", received.next()).await.unwrap();
        let text = String::from_utf8(message.to_vec()).unwrap();
        let (sender, number) = text.split_once(' ').unwrap();
        let sender: usize = sender.parse().unwrap();
        assert_eq!(number, next[sender].to_string());
        next[sender] += 1;
    }
    for sender in senders {
        in_time("a sender", sender).await.unwrap();
    }
    server.shutdown(PATIENCE).await;
    assert!(in_time("the end", received.next()).await.is_none());
}

#[tokio::test]
async fn while_nobody_pulls_the_sender_waits_and_memory_is_bounded() {
    let (service, mut received) = messages();
    let server = serve(service).await;
    let connection = Connection::builder().memory(100_000).dial(server.local_address()).await.unwrap();
    let sender = connection.clone();
    let sending = tokio::spawn(async move {
        for number in 0..30_000_u32 {
            let mut message = vec![0; 1_000];
            message[..4].copy_from_slice(&number.to_be_bytes());
            sender.send(&message).await.unwrap();
        }
    });
    in_time("the sender waits", async {
        let mut before = 0;
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
    for number in 0..30_000_u32 {
        let (message, _) = in_time("a message", received.recv()).await.unwrap();
        assert_eq!(message[..4], number.to_be_bytes());
    }
    sending.await.unwrap();
}

#[tokio::test]
async fn a_stream_that_nobody_has_any_more_makes_errors_and_ends_no_connection() {
    let (service, received) = messages();
    let server = serve(service).await;
    drop(received);
    let connection = Connection::dial(server.local_address()).await.unwrap();
    connection.send(b"x").await.unwrap();
    until("an error is counted", || server.stats().handler_errors == 1).await;
    connection.send(b"x").await.unwrap();
    until("another error is counted", || server.stats().handler_errors == 2).await;
    assert_eq!(server.stats().open, 1);
}

#[tokio::test]
async fn reading_waits_while_a_client_does_not_read_its_replies_and_goes_on_when_it_does() {
    const COUNT: usize = 20_000;
    let builder = Listener::builder().reply_memory(50_000);
    let server = builder.bind("127.0.0.1:0").await.unwrap().spawn(per_connection(|peer: &Peer| Echo(peer.clone())));
    let (mut reading, mut writing) = connect(server.local_address()).await.into_split();
    let message = |number: usize| [numbered(number), vec![0; 1_000]].concat();
    let all: Vec<_> = (0..COUNT).map(message).collect();
    let bytes = frames(Framing::default(), &all);
    let writing = tokio::spawn(async move {
        writing.write_all(&bytes).await.unwrap();
        writing
    });
    in_time("reading waits", async {
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
    assert!(!writing.is_finished() && (server.stats().messages as usize) < COUNT);
    let replies = read_messages(&mut reading, Framing::default(), COUNT).await;
    assert!(replies == all);
    assert_eq!(server.stats().handler_errors, 0, "there was room for every reply");
    drop(in_time("all is written", writing).await.unwrap());
    until("it is closed", || server.stats().open == 0).await;
    assert_eq!(server.stats().replies.settled, COUNT as u64);
    assert!(server.stats().replies.is_conserved());
}

#[tokio::test]
async fn replies_that_expired_take_no_room_from_later_ones() {
    let server = Listener::builder().reply_memory(20_000).bind("127.0.0.1:0").await.unwrap().spawn(async_handler(
        |message: Bytes, peer: Peer| async move {
            // Expired before anything can be written, for this runs on the task that writes.
            peer.sender().send_expiring(&message, Duration::ZERO).await?;
            std::thread::sleep(Duration::from_millis(3));
            if message.starts_with(b"last") {
                peer.sender().send(b"still here").await?;
            }
            Ok(())
        },
    ));
    let mut client = connect(server.local_address()).await;
    for _ in 0..20 {
        client.write_all(&frames(Framing::default(), [[1; 2_000]])).await.unwrap();
    }
    client.write_all(&frames(Framing::default(), [b"last"])).await.unwrap();
    let mut bytes = Vec::new();
    let last = frames(Framing::default(), [b"still here"]);
    in_time("the last reply", async {
        while !bytes.ends_with(&last) {
            assert_ne!(client.read_buf(&mut bytes).await.unwrap(), 0);
        }
    })
    .await;
}

#[test]
fn every_service_can_be_shown_and_builders_with_it_be_cloned_whatever_it_captures() {
    fn shown(service: impl std::fmt::Debug) -> String {
        format!("{service:?}")
    }
    let record = Recorder::default();
    let captured = record.clone();
    let work = async_handler(move |_: Bytes, _: Peer| std::future::ready(captured.count()).map(|_| Ok(())));
    assert_eq!(shown(work), "AsyncService { concurrency: 1, .. }");
    let captured = record.clone();
    assert_eq!(shown(per_connection(move |peer: &Peer| Arc::new(captured.clone()).connected(peer))), "PerConnection");
    let builder = Connection::builder().handler(move |_: &[u8]| {
        drop(record.clone());
        Ok(())
    });
    assert!(shown(builder.clone()).starts_with("ConnectionBuilder { settings: "));
}

#[tokio::test]
async fn a_client_that_has_ended_its_stream_still_gets_its_replies() {
    let service = async_handler(|message: Bytes, peer: Peer| async move {
        tokio::time::sleep(Duration::from_millis(5)).await;
        peer.sender().send_bytes(message).await?;
        Ok(())
    });
    let server = serve(service).await;
    let mut client = connect(server.local_address()).await;
    let all: Vec<_> = (0..10).map(numbered).collect();
    client.write_all(&frames(Framing::default(), &all)).await.unwrap();
    client.shutdown().await.unwrap();
    assert!(closed(&mut client).await == frames(Framing::default(), &all));
    until("it ends well", || server.stats().open == 0).await;
    assert_eq!((server.stats().broken, server.stats().replies.settled), (0, 10));
}

#[tokio::test]
async fn a_client_that_is_cut_off_for_its_bytes_first_gets_the_replies_it_is_owed() {
    let server = serve(per_connection(|peer: &Peer| Echo(peer.clone()))).await;
    let mut client = connect(server.local_address()).await;
    let legal = frames(Framing::default(), (0..100).map(numbered));
    client.write_all(&[&legal[..], b"\x01\0\0"].concat()).await.unwrap();
    assert!(closed(&mut client).await == legal);
}

#[tokio::test]
async fn work_that_waits_to_reply_ends_when_its_client_is_gone() {
    // Replies that nobody reads fill every buffer; then the client resets the connection.
    let work = Arc::new(AtomicUsize::new(0));
    let counter = Arc::clone(&work);
    let service = async_handler(move |_: Bytes, peer: Peer| {
        let counter = Arc::clone(&counter);
        async move {
            counter.fetch_add(1, Ordering::Relaxed);
            let mut result = Ok(());
            while result.is_ok() {
                result = peer.sender().send(&[7; 4_000]).await.map(drop);
            }
            counter.fetch_sub(1, Ordering::Relaxed);
            Ok(result?)
        }
    });
    let server = serve(service.concurrency(2)).await;
    for end_of_stream_first in [false, true] {
        let mut client = connect(server.local_address()).await;
        client.write_all(&frames(Framing::default(), [b"go"; 3])).await.unwrap();
        until("two work", || work.load(Ordering::Relaxed) == 2).await;
        tokio::time::sleep(Duration::from_millis(200)).await;
        if end_of_stream_first {
            client.shutdown().await.unwrap();
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        client.set_zero_linger().unwrap();
        drop(client);
        until("no work is left", || work.load(Ordering::Relaxed) == 0).await;
        until("the connection is gone", || server.stats().open == 0).await;
    }
}

#[tokio::test]
async fn replies_may_come_from_anywhere_for_as_long_as_somebody_has_the_sender() {
    let peers = Arc::new(Mutex::new(Vec::new()));
    let kept = Arc::clone(&peers);
    let server = serve(per_connection(move |peer: &Peer| {
        kept.lock().unwrap().push(peer.sender().clone());
        Echo(peer.clone())
    }))
    .await;
    let mut client = connect(server.local_address()).await;
    until("the peer is there", || !peers.lock().unwrap().is_empty()).await;
    client.shutdown().await.unwrap();
    let sender = peers.lock().unwrap().pop().unwrap();
    tokio::time::sleep(Duration::from_millis(20)).await;
    let receipt = sender.send(b"unasked").await.unwrap();
    assert_eq!(read_messages(&mut client, Framing::default(), 1).await, [b"unasked"]);
    in_time("it is settled", sender.settled(receipt)).await.unwrap();
    assert_eq!(server.stats().open, 1);
    drop(sender);
    assert!(closed(&mut client).await.is_empty());
    until("it is closed", || server.stats().open == 0).await;
}

#[tokio::test]
async fn large_messages_pass_and_the_memory_for_them_is_given_back() {
    const SIZE: usize = 5 << 20;
    let record = Recorder::default();
    let builder = Listener::builder().prefix(Prefix::Varint).max_message_size(SIZE);
    let server = builder.bind("127.0.0.1:0").await.unwrap().spawn(record.clone());
    let builder = Connection::builder().prefix(Prefix::Varint).max_message_size(SIZE);
    let connection = builder.dial(server.local_address()).await.unwrap();
    let message = |size: usize| (0..size).map(|at| (at ^ (at >> 9)) as u8).collect::<Vec<_>>();
    let sizes = [SIZE, 16 * 1024, 16 * 1024 - 3, 256 * 1024, 256 * 1024 + 1, 0, SIZE - 1, 1];
    for size in sizes {
        connection.send_bytes(message(size).into()).await.unwrap();
    }
    record.has(sizes.len()).await;
    assert!(record.messages() == sizes.map(message));
}

#[tokio::test]
async fn an_open_stream_can_be_served_and_tells_why_it_ended() {
    let record = Recorder::default();
    let (mut ours, theirs) = tokio::io::duplex(64);
    let serving = tokio::spawn(Listener::builder().serve_io(theirs, record.clone()));
    let all: Vec<_> = (0..100).map(numbered).collect();
    ours.write_all(&frames(Framing::default(), &all)).await.unwrap();
    drop(ours);
    let ended = in_time("it ends", serving).await.unwrap().unwrap();
    assert!(matches!(ended, Ended::EndOfStream), "{ended:?}");
    assert_eq!(record.messages(), all);

    let (mut ours, theirs) = tokio::io::duplex(64);
    let serving = tokio::spawn(Listener::builder().serve_io(theirs, per_connection(|peer: &Peer| Echo(peer.clone()))));
    ours.write_all(&frames(Framing::default(), [b"there and back"])).await.unwrap();
    assert_eq!(read_messages(&mut ours, Framing::default(), 1).await, [b"there and back"]);
    ours.write_all(b"\x01\0\0").await.unwrap();
    let ended = in_time("it ends", serving).await.unwrap().unwrap();
    assert!(matches!(ended, Ended::Malformed(_)), "{ended:?}");
}

#[tokio::test]
async fn streams_that_are_brought_to_one_host_know_of_each_other() {
    let (permits, begun) = (Arc::new(Semaphore::new(0)), Arc::new(AtomicU64::new(0)));
    let service = async_handler({
        let (permits, begun) = (Arc::clone(&permits), Arc::clone(&begun));
        move |_: Bytes, _: Peer| {
            begun.fetch_add(1, Ordering::Relaxed);
            let permits = Arc::clone(&permits);
            async move {
                permits.acquire().await?.forget();
                Ok(())
            }
        }
    });
    let host = Listener::builder().host(service).unwrap();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn({
        let host = host.clone();
        async move {
            while let Ok((socket, _)) = listener.accept().await {
                let host = host.clone();
                tokio::spawn(async move { host.serve(socket).await });
            }
        }
    });
    let connection = Connection::builder().delivery(Delivery::Acked).dial(Address::from(address)).await.unwrap();
    connection.send(b"once").await.unwrap();
    until("it is in hand", || begun.load(Ordering::Relaxed) == 1).await;
    connection.reopen();
    until("there is another socket", || connection.stats().connected == 2).await;
    permits.add_permits(2);
    let flushed = in_time("it is flushed", connection.flush()).await.unwrap();
    assert_eq!((flushed.settled, begun.load(Ordering::Relaxed)), (1, 1), "it is handled once");
    let report = in_time("it leaves", host.shutdown(Duration::from_secs(20))).await;
    assert_eq!((report.received.messages, report.cut), (1, 0));
}

#[tokio::test(start_paused = true)]
async fn deadlines_follow_the_clock_to_the_moment() {
    let begun = tokio::time::Instant::now();
    let (mut ours, theirs) = tokio::io::duplex(64);
    let builder = Listener::builder().frame_deadline(Duration::from_secs(30)).idle_deadline(Duration::from_secs(100));
    let serving = tokio::spawn(builder.clone().serve_io(theirs, Recorder::default()));
    // A byte every ten seconds: the frame's time counts from the first.
    tokio::time::sleep(Duration::from_secs(60)).await;
    for byte in [0x14, 0, 0, 1] {
        ours.write_all(&[byte]).await.unwrap();
        tokio::time::sleep(Duration::from_secs(9)).await;
    }
    let ended = serving.await.unwrap().unwrap();
    assert!(matches!(ended, Ended::FrameDeadline(_)), "{ended:?}");
    assert_eq!(begun.elapsed().as_secs(), 60 + 4 * 9);

    let begun = tokio::time::Instant::now();
    let (mut ours, theirs) = tokio::io::duplex(64);
    let serving = tokio::spawn(builder.serve_io(theirs, Recorder::default()));
    tokio::time::sleep(Duration::from_secs(90)).await;
    ours.write_all(&frames(Framing::default(), [b"x"])).await.unwrap();
    let ended = serving.await.unwrap().unwrap();
    assert!(matches!(ended, Ended::Idle(_)), "{ended:?}");
    assert_eq!(begun.elapsed().as_secs(), 190);
}

#[tokio::test(start_paused = true)]
async fn no_deadline_of_the_peer_runs_while_the_handler_is_busy() {
    let (mut ours, theirs) = tokio::io::duplex(1 << 20);
    let builder = Listener::builder().frame_deadline(Duration::from_secs(10)).idle_deadline(Duration::from_secs(10));
    let service = async_handler(|_: Bytes, _: Peer| async {
        tokio::time::sleep(Duration::from_secs(60)).await;
        Ok(())
    });
    let begun = tokio::time::Instant::now();
    let serving = tokio::spawn(builder.serve_io(theirs, service));
    let bytes = frames(Framing::default(), [b"one", b"two", b"end"]);
    ours.write_all(&bytes[..bytes.len() - 1]).await.unwrap();
    tokio::time::sleep(Duration::from_secs(125)).await;
    ours.write_all(&bytes[bytes.len() - 1..]).await.unwrap();
    drop(ours);
    let ended = serving.await.unwrap().unwrap();
    assert!(matches!(ended, Ended::EndOfStream), "{ended:?}");
    assert_eq!(begun.elapsed().as_secs(), 125 + 60);
}

#[tokio::test]
async fn a_stream_whose_serving_is_dropped_leaves_no_reply_in_flight() {
    let (near, _far) = tokio::io::duplex(16);
    let (kept, mut keeps) = tokio::sync::mpsc::unbounded_channel();
    let service = per_connection(move |peer: &Peer| {
        kept.send(peer.sender().clone()).unwrap();
        Echo(peer.clone())
    });
    let serving = tokio::spawn(Listener::builder().serve_io(near, service));
    let sender = in_time("it is connected", keeps.recv()).await.unwrap();
    for _ in 0..10 {
        sender.try_send(b"more than the pipe takes").unwrap();
    }
    serving.abort();
    let flushed = in_time("the replies are given up", sender.flush()).await.unwrap();
    assert_eq!(flushed.settled + flushed.failed, 10);
    assert!(flushed.failed > 0);
    assert!(sender.try_send(b"late").unwrap_err().is_closed());
}
