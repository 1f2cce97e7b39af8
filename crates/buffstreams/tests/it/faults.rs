//! A bad network between the ends of acknowledged streams: it resets, stalls without a word, and tears everything into
//! single bytes. Both ends must have the same account of every message in the end.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use buffstreams::{
    Backoff, Connection, ConnectionBuilder, Delivery, FailedMessage, Handler, HandlerError, HandlerResult, Listener,
    Message, Peer, Retry, Server, State, per_connection,
};
use fastrand::Rng;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use crate::support::{amount, in_time, until};

const DEADLINE: Duration = Duration::from_secs(20);

/// What a proxy does to a connection.
#[derive(Clone, Copy, Debug)]
enum Fate {
    /// It lives.
    Lives,
    /// After so many bytes both sides get a reset, and what is under way is destroyed.
    Resets(usize),
    /// After so many bytes nothing passes any more, and nobody is told.
    Stalls(usize),
}

/// What a proxy has done so far.
#[derive(Debug, Default)]
struct Done {
    resets: AtomicUsize,
    stalls: AtomicUsize,
}

/// A way to an address that does to each connection what `fate` says; the flag: byte by byte.
async fn proxy(target: &Server, done: Arc<Done>, mut fate: impl FnMut() -> (Fate, bool) + Send + 'static) -> String {
    let target = target.local_address().to_string();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    tokio::spawn(async move {
        loop {
            let (near, _) = listener.accept().await.unwrap();
            let far = TcpStream::connect(&target).await.unwrap();
            let (fate, in_bytes) = fate();
            tokio::spawn(pass_on(near, far, fate, in_bytes, Arc::clone(&done)));
        }
    });
    address
}

async fn pass_on(mut near: TcpStream, mut far: TcpStream, fate: Fate, in_bytes: bool, done: Arc<Done>) {
    for socket in [&near, &far] {
        socket.set_nodelay(true).unwrap();
    }
    let mut left = match fate {
        Fate::Lives => usize::MAX,
        Fate::Resets(most) | Fate::Stalls(most) => most,
    };
    let (mut there, mut back) = (vec![0; 16 * 1024], vec![0; 16 * 1024]);
    while left > 0 {
        let take = if in_bytes { 1 } else { 16 * 1024 }.min(left);
        let (read, bytes, to) = tokio::select! {
            read = near.read(&mut there[..take]) => (read, &there, &mut far),
            read = far.read(&mut back[..take]) => (read, &back, &mut near),
        };
        // One of them has ended the stream: so does the other.
        let Ok(read @ 1..) = read else { break };
        left -= read;
        if to.write_all(&bytes[..read]).await.is_err() {
            break;
        }
    }
    match fate {
        Fate::Resets(_) if left == 0 => {
            done.resets.fetch_add(1, Ordering::Relaxed);
            for socket in [near, far] {
                let _ = socket2::SockRef::from(&socket).set_linger(Some(Duration::ZERO));
            }
        }
        Fate::Stalls(_) if left == 0 => {
            done.stalls.fetch_add(1, Ordering::Relaxed);
            // Both ends stay open, until the runtime ends.
            std::future::pending::<()>().await;
        }
        _ => {}
    }
}

fn acked() -> ConnectionBuilder {
    let pauses = Backoff { min: Duration::from_millis(1), max: Duration::from_millis(5) };
    Connection::builder().delivery(Delivery::Acked).backoff(pauses).retry(Retry::Forever)
}

fn number(message: &[u8]) -> u64 {
    u64::from_be_bytes(message[..8].try_into().unwrap())
}

/// What the receiver has seen: all messages in order, and those that it refused.
#[derive(Debug, Default)]
struct Account {
    handled: Mutex<Vec<u64>>,
    rejected: Mutex<BTreeSet<u64>>,
}

/// Refuses some messages for good, and answers others.
struct Keeper(Peer, Arc<Account>);

impl Handler for Keeper {
    fn message(&mut self, message: Message<'_>) -> HandlerResult {
        let number = number(&message);
        self.1.handled.lock().unwrap().push(number);
        if number % 13 == 7 {
            self.1.rejected.lock().unwrap().insert(number);
            return Err(HandlerError::rejected(13, "unlucky"));
        }
        if number.is_multiple_of(5) {
            // There may be no room. Replies are lost with their connection in any case.
            let _ = self.0.sender().try_send(&message);
        }
        Ok(())
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_resets_and_stalls_anywhere_both_ends_account_for_the_same_messages() {
    let seed = amount("BUFFSTREAMS_SEED", fastrand::usize(..)) as u64;
    println!("BUFFSTREAMS_SEED={seed}");
    let resets = amount("BUFFSTREAMS_RESETS", 500);
    let stalls = resets / 25;
    let account = Arc::new(Account::default());
    let service = {
        let account = Arc::clone(&account);
        per_connection(move |peer: &Peer| Keeper(peer.clone(), Arc::clone(&account)))
    };
    // Who stalls before HELLO is whole has no heartbeat yet.
    let listener = Listener::builder().frame_deadline(Duration::from_secs(1)).bind("127.0.0.1:0").await.unwrap();
    let server = listener.spawn(service);
    let done = Arc::new(Done::default());
    let mut random = Rng::with_seed(seed);
    let fate = {
        let done = Arc::clone(&done);
        let mut count = 0;
        move || {
            count += 1;
            let in_bytes = random.u8(..4) == 0;
            // Within the preface, HELLO or WELCOME; soon after; or some time after.
            let most = [100, 3_000, if in_bytes { 1_000 } else { 40_000 }][count % 3];
            // Not before the first: a connection that never says anything is an idle one, and allowed.
            let at = 1 + random.usize(..most);
            let (reset, stalled) = (done.resets.load(Ordering::Relaxed), done.stalls.load(Ordering::Relaxed));
            let fate = match count % 25 {
                0 if stalled < stalls => Fate::Stalls(at),
                _ if reset < resets => Fate::Resets(at),
                _ if stalled < stalls => Fate::Stalls(at),
                _ => Fate::Lives,
            };
            (fate, in_bytes && !matches!(fate, Fate::Lives))
        }
    };
    let address = proxy(&server, Arc::clone(&done), fate).await;
    let failed = Arc::new(Mutex::new(Vec::new()));
    let replies = Arc::new(AtomicU64::new(0));
    let connection = acked()
        .window(32 * 1024)
        .heartbeat(Duration::from_millis(50))
        .on_failed({
            let failed = Arc::clone(&failed);
            move |message: FailedMessage| failed.lock().unwrap().push((number(&message.message), message.rejection))
        })
        .handler({
            let replies = Arc::clone(&replies);
            move |reply: &[u8]| {
                assert!(number(reply).is_multiple_of(5));
                replies.fetch_add(1, Ordering::Relaxed);
                Ok(())
            }
        })
        .dial_lazy(address.as_str())
        .unwrap();
    let begun = Instant::now();
    let mut random = Rng::with_seed(!seed);
    let mut sent = 0_u64;
    while done.resets.load(Ordering::Relaxed) < resets || done.stalls.load(Ordering::Relaxed) < stalls {
        let mut message = vec![7; 8 + random.usize(..2_000)];
        message[..8].copy_from_slice(&sent.to_be_bytes());
        in_time("there is room", connection.send(&message)).await.unwrap();
        assert!(connection.stats().is_conserved());
        sent += 1;
    }
    let flushed = in_time("it is flushed", connection.flush()).await.unwrap();
    let stats = in_time("it is closed", connection.close(DEADLINE)).await.unwrap();
    assert!(stats.is_conserved() && stats.in_flight == 0 && stats.accepted == sent, "{stats:?}");
    assert_eq!((flushed.settled, flushed.failed), (stats.settled, stats.failed));
    assert!(account.handled.lock().unwrap().iter().copied().eq(0..sent), "in order, none missing and none twice");

    until("what stalled is found dead there, too", || server.stats().open == 0).await;
    let rejected = account.rejected.lock().unwrap();
    let failed = failed.lock().unwrap();
    assert!(failed.iter().all(|(_, rejection)| rejection.as_ref().is_some_and(|rejection| rejection.code == 13)));
    assert!(failed.iter().map(|(number, _)| *number).eq(rejected.iter().copied()), "each once, in order");
    assert_eq!(stats.settled, sent - rejected.len() as u64);
    let received = server.stats();
    assert!(received.replies.is_conserved() && received.replies.in_flight == 0, "{:?}", received.replies);
    let replies = replies.load(Ordering::Relaxed);
    assert!(replies <= received.replies.accepted);
    println!(
        "figures: {} resets and {} stalls over {} connections in {:.1?}; {sent} messages, {} settled and {} rejected; \
         {replies} of {} replies arrived",
        done.resets.load(Ordering::Relaxed),
        done.stalls.load(Ordering::Relaxed),
        received.connected,
        begun.elapsed(),
        stats.settled,
        stats.failed,
        received.replies.accepted,
    );
}

#[tokio::test]
async fn a_session_that_comes_in_single_bytes_is_understood_by_both_ends() {
    let account = Arc::new(Account::default());
    let service = {
        let account = Arc::clone(&account);
        per_connection(move |peer: &Peer| Keeper(peer.clone(), Arc::clone(&account)))
    };
    let server = Listener::bind("127.0.0.1:0").await.unwrap().spawn(service);
    let address = proxy(&server, Arc::default(), || (Fate::Lives, true)).await;
    let replies = Arc::new(AtomicU64::new(0));
    let counter = Arc::clone(&replies);
    let builder = acked().handler(move |_: &[u8]| {
        counter.fetch_add(1, Ordering::Relaxed);
        Ok(())
    });
    let connection = builder.dial(address.as_str()).await.unwrap();
    for number in 0..100_u64 {
        connection.send(&[&number.to_be_bytes()[..], &[7; 50]].concat()).await.unwrap();
    }
    let flushed = in_time("it is flushed", connection.flush()).await.unwrap();
    assert_eq!((flushed.settled, flushed.failed), (92, 8));
    until("replies come", || replies.load(Ordering::Relaxed) == 18).await;
    assert!(account.handled.lock().unwrap().iter().copied().eq(0..100));
    in_time("it is closed", connection.close(DEADLINE)).await.unwrap();
    assert_eq!(server.stats().connected, 1);
}

#[tokio::test]
async fn a_stalled_connection_is_given_up_by_both_ends_after_three_heartbeats() {
    let heartbeat = Duration::from_millis(500);
    let account = Arc::new(Account::default());
    let service = {
        let account = Arc::clone(&account);
        per_connection(move |peer: &Peer| Keeper(peer.clone(), Arc::clone(&account)))
    };
    let server = Listener::bind("127.0.0.1:0").await.unwrap().spawn(service);
    let done = Arc::<Done>::default();
    let mut fates = [Fate::Stalls(20_000)].into_iter();
    let address = proxy(&server, Arc::clone(&done), move || (fates.next().unwrap_or(Fate::Lives), false)).await;
    let connection = acked().heartbeat(heartbeat).dial(address.as_str()).await.unwrap();
    let mut states = connection.states();
    for number in 0..1_000_u64 {
        // Numbers of which none is rejected.
        connection.send(&[&(number * 13).to_be_bytes()[..], &[7; 100]].concat()).await.unwrap();
    }
    until("it stalls", || done.stalls.load(Ordering::Relaxed) == 1).await;
    let stalled = Instant::now();
    in_time("it is noticed", states.wait_for(|state| *state != State::Connected)).await.unwrap();
    let noticed = stalled.elapsed();
    assert_eq!(in_time("it is flushed", connection.flush()).await.unwrap().settled, 1_000);
    until("the other end notices, too", || server.stats().open == 1).await;
    println!("figures: a stall was noticed after {noticed:.2?}, by both ends after {:.2?}", stalled.elapsed());
    assert!(noticed < 30 * heartbeat, "it took {noticed:?}");
    assert!(account.handled.lock().unwrap().iter().copied().eq((0..1_000).map(|number| number * 13)));
    in_time("it is closed", connection.close(DEADLINE)).await.unwrap();
}
