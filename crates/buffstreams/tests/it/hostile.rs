//! What a stranger can do to a listener: end their own connection, and nothing else.

use std::io::{BufRead, BufReader, Read, Write};
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use buffstreams::{
    Connection, ErrorKind, Framing, HandlerResult, Listener, ListenerBuilder, Peer, Prefix, Server, Service,
    per_connection,
};
use tokio::io::AsyncWriteExt;

use crate::support::{
    Echo, Possessions, Recorder, alone, amount, closed, connect, frames, in_time, is_alone, passes_alone,
    read_messages, until,
};

async fn serve(builder: ListenerBuilder, service: impl Service) -> Server {
    builder.bind("127.0.0.1:0").await.expect("loopback can be listened on").spawn(service)
}

/// A stranger sends these bytes, and perhaps the end of the stream; the connection ends for a reason with these words,
/// and somebody else's goes on.
async fn only_the_stranger_is_cut_off(bytes: &[u8], end_of_stream: bool, words: &[&str]) {
    let record = Recorder::default();
    let server = serve(Listener::builder(), record.clone()).await;
    let bystander = Connection::dial(server.local_address()).await.unwrap();
    bystander.send(b"before").await.unwrap();
    record.has(1).await;

    let mut stranger = connect(server.local_address()).await;
    stranger.write_all(&frames(Framing::default(), [b"legal"])).await.unwrap();
    stranger.write_all(bytes).await.unwrap();
    if end_of_stream {
        stranger.shutdown().await.unwrap();
    }
    closed(&mut stranger).await;
    until("the connection has ended", || record.ends().len() == 1).await;
    let why = &record.ends()[0];
    assert!(words.iter().all(|word| why.contains(word)), "{why:?} has the words {words:?}");

    bystander.send(b"behind").await.unwrap();
    record.has(3).await;
    assert_eq!(record.messages(), [&b"before"[..], b"legal", b"behind"]);
    until("it is counted", || server.stats().broken == 1).await;
    assert_eq!(server.stats().open, 1);
}

#[tokio::test]
async fn a_length_over_the_maximum_ends_its_own_connection() {
    only_the_stranger_is_cut_off(b"\x82\x40\x00", false, &["4097", "4096"]).await;
}

#[tokio::test]
async fn a_negative_length_ends_its_own_connection() {
    only_the_stranger_is_cut_off(b"\x01\x00\x00", false, &["-1", "4096"]).await;
}

#[tokio::test]
async fn junk_in_the_padding_of_a_prefix_ends_its_own_connection() {
    only_the_stranger_is_cut_off(b"\x06\xff\xffabc", false, &["06 ff ff", "padding"]).await;
}

#[tokio::test]
async fn an_end_of_stream_inside_a_message_is_told_from_a_clean_one() {
    only_the_stranger_is_cut_off(b"\x14\x00\x00abc", true, &["3 bytes", "of 10"]).await;
}

#[tokio::test]
async fn an_end_of_stream_inside_a_prefix_is_told_from_a_clean_one() {
    only_the_stranger_is_cut_off(b"\x14\x00", true, &["2 bytes", "prefix"]).await;
}

#[tokio::test]
async fn a_client_with_another_maximum_is_cut_off_at_the_first_prefix_that_is_not_canonical() {
    let record = Recorder::default();
    let server = serve(Listener::builder().max_message_size(100), record.clone()).await;
    let mut client = connect(server.local_address()).await;
    client.write_all(&frames(Framing::default(), [b"HELLO"; 3])).await.unwrap();
    closed(&mut client).await;
    until("the connection has ended", || !record.ends().is_empty()).await;
    // The first three bytes of the client's five, and two of its padding, are a legal frame here.
    assert_eq!(record.messages(), [b"\0HELL"]);
    assert!(record.ends()[0].contains("malformed prefix 4f 0a"), "{:?}", record.ends());
    let other = Connection::builder().max_message_size(100).dial(server.local_address()).await.unwrap();
    other.send(b"HELLO").await.unwrap();
    record.has(2).await;
}

#[tokio::test]
async fn a_frame_that_does_not_come_to_its_end_is_cut_off_by_its_deadline() {
    let record = Recorder::default();
    let server = serve(Listener::builder().frame_deadline(Duration::from_millis(50)), record.clone()).await;
    for bytes in [&b"\x14"[..], b"\x14\0\0", b"\x14\0\0abc"] {
        let mut client = connect(server.local_address()).await;
        client.write_all(bytes).await.unwrap();
        closed(&mut client).await;
    }
    assert_eq!(record.ends().len(), 3);
    assert!(record.ends().iter().all(|why| why.contains("50ms")), "{:?}", record.ends());
    assert_eq!(record.count(), 0);
}

#[tokio::test]
async fn slow_bytes_do_not_extend_the_deadline_of_a_frame() {
    let record = Recorder::default();
    let server = serve(Listener::builder().frame_deadline(Duration::from_millis(200)), record.clone()).await;
    let client = connect(server.local_address()).await;
    let (mut reading, mut writing) = client.into_split();
    let trickle = tokio::spawn(async move {
        let frame = frames(Framing::default(), [[7; 4000]]);
        for byte in frame {
            if writing.write_all(&[byte]).await.is_err() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    });
    let begun = Instant::now();
    closed(&mut reading).await;
    assert!(begun.elapsed() < Duration::from_secs(20), "the whole frame would have taken 40 s");
    assert!(record.ends()[0].contains("200ms"));
    trickle.abort();
}

#[tokio::test]
async fn a_deadline_for_frames_leaves_idle_connections_alone() {
    let record = Recorder::default();
    let server = serve(Listener::builder().frame_deadline(Duration::from_millis(50)), record.clone()).await;
    let mut client = connect(server.local_address()).await;
    client.write_all(&frames(Framing::default(), [b"one"])).await.unwrap();
    record.has(1).await;
    tokio::time::sleep(Duration::from_millis(200)).await;
    client.write_all(&frames(Framing::default(), [b"two"])).await.unwrap();
    record.has(2).await;
    assert!(record.ends().is_empty());
}

#[tokio::test]
async fn a_deadline_for_frames_leaves_a_connection_alone_whose_last_read_took_more_than_one_turn() {
    let handled = Arc::new(AtomicUsize::new(0));
    let counter = Arc::clone(&handled);
    let server = serve(Listener::builder().frame_deadline(Duration::from_millis(100)), move |_: &[u8]| {
        std::thread::sleep(Duration::from_micros(20));
        counter.fetch_add(1, Ordering::Relaxed);
        Ok(())
    })
    .await;
    let mut client = connect(server.local_address()).await;
    client.write_all(&frames(Framing::default(), vec![b"x"; 2_000])).await.unwrap();
    until("all are handled", || handled.load(Ordering::Relaxed) == 2_000).await;
    tokio::time::sleep(Duration::from_millis(400)).await;
    assert_eq!(server.stats().open, 1, "nothing is unfinished on this connection");
    client.write_all(&frames(Framing::default(), [b"x"])).await.unwrap();
    until("one more is handled", || handled.load(Ordering::Relaxed) == 2_001).await;
}

#[tokio::test]
async fn a_silent_connection_is_cut_off_by_the_idle_deadline_and_a_talking_one_is_not() {
    let record = Recorder::default();
    let server = serve(Listener::builder().idle_deadline(Duration::from_millis(300)), record.clone()).await;
    let mut silent = connect(server.local_address()).await;
    let talking = Connection::dial(server.local_address()).await.unwrap();
    let talk = tokio::spawn(async move {
        loop {
            talking.send(b"still here").await.unwrap();
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    });
    closed(&mut silent).await;
    until("the end is recorded", || record.ends().len() == 1).await;
    assert!(record.ends()[0].contains("300ms"), "{:?}", record.ends());
    let so_far = record.count();
    record.has(so_far + 10).await;
    assert_eq!(record.ends().len(), 1);
    talk.abort();
}

#[tokio::test]
async fn deadlines_that_never_come_are_allowed() {
    let record = Recorder::default();
    let builder = Listener::builder().frame_deadline(Duration::MAX).idle_deadline(Duration::MAX);
    let server = serve(builder.keepalive(Duration::MAX).write_stall(Duration::MAX), record.clone()).await;
    let connection = Connection::builder()
        .keepalive(Duration::from_millis(1))
        .write_stall(Duration::from_nanos(1))
        .frame_deadline(Duration::MAX)
        .connect_deadline(Duration::MAX)
        .retry(buffstreams::Retry::For(Duration::MAX))
        .dial(server.local_address())
        .await
        .unwrap();
    connection.send_expiring(b"for ever", Duration::MAX).await.unwrap();
    record.has(1).await;
    let mut torn = connect(server.local_address()).await;
    torn.write_all(b"\x14\0\0abc").await.unwrap();
    until("it is accepted", || server.stats().open == 2).await;
    assert_eq!(connection.close(Duration::MAX).await.unwrap().settled, 1);
    drop(torn);
    server.shutdown(Duration::MAX).await;
}

#[tokio::test]
async fn a_flood_of_empty_frames_does_not_starve_the_other_connections_of_its_worker() {
    const FLOOD: usize = 100_000;
    let flooded = Arc::new(AtomicUsize::new(0));
    let seen_by_other = Arc::new(AtomicUsize::new(usize::MAX));
    let (flood, seen) = (Arc::clone(&flooded), Arc::clone(&seen_by_other));
    let server = serve(Listener::builder(), move |message: &[u8]| {
        if message.is_empty() {
            flood.fetch_add(1, Ordering::Relaxed);
            let begun = Instant::now();
            while begun.elapsed() < Duration::from_micros(10) {}
        } else {
            seen.store(flood.load(Ordering::Relaxed), Ordering::Relaxed);
        }
        Ok(())
    })
    .await;
    let other = Connection::dial(server.local_address()).await.unwrap();
    let mut flooding = connect(server.local_address()).await;
    let flood = tokio::spawn(async move {
        flooding.write_all(&vec![0; FLOOD * 3]).await.unwrap();
        flooding
    });
    until("the flood has begun", || flooded.load(Ordering::Relaxed) > 0).await;
    other.send(b"let me through").await.unwrap();
    until("the other is handled", || seen_by_other.load(Ordering::Relaxed) != usize::MAX).await;
    let handled_before = seen_by_other.load(Ordering::Relaxed);
    assert!(handled_before < FLOOD / 2, "{handled_before} of the flood came first");
    until("the flood is over", || flooded.load(Ordering::Relaxed) == FLOOD).await;
    flood.await.unwrap();
}

#[tokio::test]
async fn a_maximum_that_cannot_be_is_refused_when_it_is_configured_and_zero_is_the_default() {
    for (prefix, max) in [(Prefix::Buffstreams, usize::MAX), (Prefix::U8, 256), (Prefix::U16Le, 65_536)] {
        let refused = Listener::builder().prefix(prefix).max_message_size(max).bind("127.0.0.1:0").await.unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::InvalidConfiguration);
        assert!(refused.to_string().contains(&max.to_string()), "{refused}");
        let refused = Connection::builder().prefix(prefix).max_message_size(max).dial_lazy("127.0.0.1:1").unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::InvalidConfiguration);
    }
    let connection = Connection::builder().max_message_size(0).dial_lazy("127.0.0.1:1").unwrap();
    assert_eq!(connection.framing(), Framing::default());
}

#[tokio::test]
async fn unfinished_messages_of_all_connections_together_stay_within_the_memory_allowed() {
    const MAX: usize = 1 << 20;
    let record = Recorder::default();
    let builder = Listener::builder().prefix(Prefix::U32Be).max_message_size(MAX).receive_memory(3 << 20);
    let server = serve(builder, record.clone()).await;
    let framing = Framing::with_max(Prefix::U32Be, MAX).unwrap();
    let frame = frames(framing, [vec![9; MAX]]);
    // Ten begin a message of 1 MiB where there is room for three, in steps, so that none is there before the others.
    let mut clients = Vec::new();
    for _ in 0..10 {
        clients.push(connect(server.local_address()).await);
    }
    for step in frame[..frame.len() - 1].chunks(60_000) {
        for client in &mut clients {
            let _ = client.write_all(step).await;
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    until("some are cut off", || record.ends().len() >= 5).await;
    assert!(record.ends().iter().all(|why| why.contains("3145728")), "{:?}", record.ends());
    // Whoever is left can finish, and the room is there again for others.
    for client in &mut clients {
        let _ = client.write_all(&frame[frame.len() - 1..]).await;
    }
    let left = 10 - record.ends().len();
    until("those that are left are received", || record.count() + record.ends().len() >= 10).await;
    assert!(left > 0 || record.count() > 0, "not all are cut off");
    drop(clients);
    until("all are gone", || server.stats().open == 0).await;
    for _ in 0..3 {
        let mut client = connect(server.local_address()).await;
        let before = record.count();
        client.write_all(&frame).await.unwrap();
        record.has(before + 1).await;
    }
}

#[tokio::test]
async fn connections_that_only_declare_a_length_take_nothing_from_others() {
    let record = Recorder::default();
    let builder = Listener::builder().prefix(Prefix::U32Be).max_message_size(16 << 20).receive_memory(1 << 20);
    let server = serve(builder, record.clone()).await;
    let mut clients = Vec::new();
    for _ in 0..200 {
        let mut client = connect(server.local_address()).await;
        client.write_all(&[&[1, 0, 0, 0], &[7; 16][..]].concat()).await.unwrap();
        clients.push(client);
    }
    until("all are open", || server.stats().open == 200).await;
    // Had each been given even one step of 64 KiB, there would be no room left for this.
    let framing = Framing::with_max(Prefix::U32Be, 16 << 20).unwrap();
    let mut honest = connect(server.local_address()).await;
    honest.write_all(&frames(framing, [vec![9; 400_000]])).await.unwrap();
    record.has(1).await;
    assert_eq!(record.ends(), [""; 0], "nobody was cut off");
}

#[tokio::test]
async fn room_for_large_messages_that_have_only_begun_stays_within_the_memory_allowed() {
    let record = Recorder::default();
    let builder = Listener::builder().prefix(Prefix::U32Be).max_message_size(16 << 20).receive_memory(1 << 20);
    let server = serve(builder, record.clone()).await;
    let mut clients = Vec::new();
    for _ in 0..100 {
        let mut client = connect(server.local_address()).await;
        client.write_all(&[&[1, 0, 0, 0], &[7; 10_000][..]].concat()).await.unwrap();
        clients.push(client);
    }
    // What was received of all would fit. The room for the next 64 KiB of each does not: at most 16 have that.
    until("the others are cut off", || record.ends().len() >= 84).await;
    assert!(record.ends().iter().all(|why| why.contains("1048576")), "{:?}", record.ends());
    assert!(record.ends().len() < 100, "there is room for some");
}

#[tokio::test]
async fn connections_over_the_most_allowed_are_refused_and_room_is_made_by_each_that_ends() {
    let record = Recorder::default();
    let server = serve(Listener::builder().max_connections(2), record.clone()).await;
    let mut kept = Vec::new();
    let mut others = Vec::new();
    for index in 0..20 {
        let client = connect(server.local_address()).await;
        if index < 2 { kept.push(client) } else { others.push(client) }
    }
    for other in &mut others {
        closed(other).await;
    }
    let stats = server.stats();
    assert_eq!((stats.open, stats.refused, stats.refused_too_many), (2, 18, 18));
    for client in &mut kept {
        client.write_all(&frames(Framing::default(), [b"kept"])).await.unwrap();
    }
    record.has(2).await;
    drop(kept);
    until("there is room again", || server.stats().open == 0).await;
    Connection::dial(server.local_address()).await.unwrap().send(b"new").await.unwrap();
    record.has(3).await;
}

/// The server of the test below, in a process that may have 64 descriptors.
#[tokio::test]
#[ignore = "a part of another test, which runs it as a process of its own"]
async fn a_server_with_few_descriptors() {
    if !is_alone() {
        return;
    }
    rlimit::Resource::NOFILE.set(64, 64).unwrap();
    let server = serve(Listener::builder(), per_connection(|peer: &Peer| Echo(peer.clone()))).await;
    println!("\nlistens on {}", server.local_address());
    tokio::task::spawn_blocking(|| std::io::stdin().read(&mut [0])).await.unwrap().unwrap();
}

#[test]
fn a_listener_without_descriptors_left_serves_again_once_some_are_free() {
    let mut child = alone("hostile::a_server_with_few_descriptors").stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines().map_while(Result::ok);
    let address = lines.find_map(|line| line.strip_prefix("listens on ").map(str::to_owned)).unwrap();
    let framing = Framing::default();
    let ping = frames(framing, [b"ping"]);
    let connect = || {
        let client = std::net::TcpStream::connect(&address).unwrap();
        (&client).write_all(&ping).unwrap();
        client
    };
    let is_served = |client: &std::net::TcpStream, within: Duration| {
        client.set_read_timeout(Some(within)).unwrap();
        let mut answer = vec![0; ping.len()];
        (&*client).read_exact(&mut answer).is_ok() && answer == ping
    };
    assert!(is_served(&connect(), Duration::from_secs(60)));
    let mut clients: Vec<_> = (0..200).map(|_| connect()).collect();
    assert!(is_served(&clients[0], Duration::from_secs(60)));
    let waiting = clients.pop().unwrap();
    assert!(!is_served(&waiting, Duration::from_millis(500)), "64 descriptors are not enough for 200 connections");
    drop(clients);
    let begun = Instant::now();
    assert!(is_served(&waiting, Duration::from_secs(60)));
    let took = begun.elapsed();
    println!("figures: served again after {took:?}");
    assert!(took < Duration::from_secs(5), "it took {took:?} to serve again");
    assert!(is_served(&connect(), Duration::from_secs(60)));
    drop(child.stdin.take());
    let rest: Vec<_> = lines.collect();
    assert!(child.wait().unwrap().success(), "{rest:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn random_bytes_end_nothing_but_their_own_connections() {
    let seed = amount("BUFFSTREAMS_SEED", fastrand::usize(..)) as u64;
    let rounds = amount("BUFFSTREAMS_GARBAGE", 2_000);
    println!("BUFFSTREAMS_SEED={seed}");
    let mut random = fastrand::Rng::with_seed(seed);
    for (index, prefix) in Prefix::ALL.into_iter().enumerate() {
        let record = Recorder::default();
        let server = serve(Listener::builder().prefix(prefix), record.clone()).await;
        let mut garbage = Vec::new();
        let connections = rounds / Prefix::ALL.len() + usize::from(index < rounds % Prefix::ALL.len());
        for _ in 0..connections {
            let mut bytes = frames(Framing::new(prefix), vec![vec![1; random.usize(..200)]; random.usize(..3)]);
            let most = [3, 20, 6_000][random.usize(..3)];
            let junk = random.usize(..most);
            bytes.extend(std::iter::repeat_with(|| random.u8(..)).take(junk));
            let mut client = connect(server.local_address()).await;
            // The server may have closed already.
            let _ = client.write_all(&bytes).await;
            garbage.push(client);
            if garbage.len() == 50 {
                garbage.clear();
            }
        }
        drop(garbage);
        until("every connection has told of its end", || record.ends().len() == connections).await;
        until("all are gone", || server.stats().open == 0).await;
        let before = record.count();
        let connection = Connection::builder().prefix(prefix).dial(server.local_address()).await.unwrap();
        connection.send(b"still here").await.unwrap();
        record.has(before + 1).await;
    }
}

/// Rounds of connecting, sending and closing; then everything is as it was after the first of them.
async fn churn(rounds: usize) {
    let received = Arc::new(AtomicU64::new(0));
    let counter = Arc::clone(&received);
    let server = serve(Listener::builder().max_message_size(1 << 20), move |message: &[u8]| -> HandlerResult {
        counter.fetch_add(message.len() as u64, Ordering::Relaxed);
        Ok(())
    })
    .await;
    let round = |index: usize| {
        let address = server.local_address().clone();
        async move {
            let connection = Connection::builder().max_message_size(1 << 20).dial(&address).await.unwrap();
            let length = if index.is_multiple_of(50) { 300_000 } else { 100 };
            connection.send(&vec![1; length]).await.unwrap();
            let stats = connection.close(Duration::from_secs(60)).await.unwrap();
            assert_eq!((stats.settled, stats.failed), (1, 0));
            length as u64
        }
    };
    let mut sent = 0;
    let mut before = None;
    for index in 0..rounds + 200 {
        sent += in_time("the next round", round(index)).await;
        // Some only come and go, some leave in the middle of a frame.
        let mut passing = connect(server.local_address()).await;
        if index.is_multiple_of(2) {
            passing.write_all(b"\xff\xff\x7f").await.unwrap();
        }
        drop(passing);
        if index == 199 {
            until("the first rounds are over", || server.stats().open == 0).await;
            before = Some(Possessions::now());
        }
    }
    until("all is received", || received.load(Ordering::Relaxed) == sent && server.stats().open == 0).await;
    let before = before.expect("there were more than 200 rounds");
    until("tasks are gone", || Possessions::now().tasks <= before.tasks).await;
    let after = Possessions::now();
    println!("\nfigures: {rounds} rounds, before {before:?}, after {after:?}");
    assert!(after.descriptors <= before.descriptors, "descriptors: {before:?}, then {after:?}");
    assert!(after.memory <= before.memory + before.memory / 10 + (4 << 20), "memory: {before:?}, then {after:?}");
}

/// Its figures are those of a process of its own, see below.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "a part of another test, which runs it as a process of its own"]
async fn churn_alone() {
    if is_alone() {
        churn(amount("BUFFSTREAMS_CHURN", 20_000)).await;
    }
}

#[test]
fn connecting_sending_and_closing_over_and_over_leaves_no_descriptor_no_task_and_no_memory() {
    passes_alone("hostile::churn_alone");
}

#[tokio::test]
async fn every_length_around_the_maximum_is_taken_or_refused_by_every_framing() {
    for prefix in Prefix::ALL {
        let framing = Framing::with_max(prefix, 200).unwrap();
        let wider = Framing::with_max(prefix, 255).unwrap();
        let record = Recorder::default();
        let server = serve(Listener::builder().prefix(prefix).max_message_size(200), record.clone()).await;
        for length in [0, 1, 199, 200] {
            let mut client = connect(server.local_address()).await;
            client.write_all(&frames(framing, [vec![3; length]])).await.unwrap();
            client.shutdown().await.unwrap();
            assert!(closed(&mut client).await.is_empty());
        }
        until("four have ended", || record.ends().len() == 4).await;
        assert!(record.ends().iter().all(|why| why.contains("ended its stream")), "{prefix}: {:?}", record.ends());
        let mut client = connect(server.local_address()).await;
        client.write_all(&frames(wider, [vec![3; 201]])).await.unwrap();
        closed(&mut client).await;
        until("the fifth has ended", || record.ends().len() == 5).await;
        assert!(record.ends()[4].contains("201") && record.ends()[4].contains("200"), "{prefix}: {:?}", record.ends());
        let lengths: Vec<_> = record.messages().iter().map(Vec::len).collect();
        assert_eq!(lengths, [0, 1, 199, 200], "{prefix}");
    }
}

#[tokio::test]
async fn a_client_that_sends_byte_by_byte_is_understood() {
    let server = serve(Listener::builder(), per_connection(|peer: &Peer| Echo(peer.clone()))).await;
    let mut client = connect(server.local_address()).await;
    client.set_nodelay(true).unwrap();
    let messages = [&b""[..], b"a", b"hello", b"", b"world"];
    for byte in frames(Framing::default(), messages) {
        client.write_all(&[byte]).await.unwrap();
        tokio::task::yield_now().await;
    }
    assert_eq!(read_messages(&mut client, Framing::default(), messages.len()).await, messages);
}
