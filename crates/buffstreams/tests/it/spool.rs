//! Messages on disk: what outlives a connection and a process, what is bounded, and what is said of damage.

use std::fs;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use buffstreams::{
    Bytes, Connection, ConnectionBuilder, ErrorKind, FailedMessage, Handler, HandlerError, HandlerResult, Listener,
    Message, Overflow, Peer, Retry, Server, Spool, SpooledConnection, per_connection,
};
use futures_util::{StreamExt, TryStreamExt, stream};

use crate::support::{APART, Recorder, bind_again, in_time, until};

const DEADLINE: Duration = Duration::from_secs(20);

async fn serve(recorder: &Recorder) -> Server {
    Listener::bind("127.0.0.1:0").await.unwrap().spawn(recorder.clone())
}

/// An address where nobody listens.
async fn nobody() -> String {
    let listener = tokio::net::TcpListener::bind(APART).await.unwrap();
    listener.local_addr().unwrap().to_string()
}

fn dial(address: impl ToString, directory: &Path) -> SpooledConnection {
    let spool = Spool::open(directory).unwrap();
    builder().dial_spooled(address.to_string().as_str(), spool).unwrap()
}

fn builder() -> ConnectionBuilder {
    Connection::builder().retry(Retry::Forever)
}

fn numbered(count: u64) -> Vec<Vec<u8>> {
    (0..count).map(|number| format!("message {number}").into_bytes()).collect()
}

/// Sends with many under way, in order.
async fn send_all(connection: &SpooledConnection, messages: &[Vec<u8>]) {
    let sends = stream::iter(messages).map(|message| connection.send(message)).buffered(1000);
    in_time("all are on disk", sends.try_for_each(|_| async { Ok(()) })).await.unwrap();
}

async fn close(connection: SpooledConnection, deadline: Duration) -> buffstreams::Stats {
    let stats = in_time("it is closed", connection.close(deadline)).await.unwrap();
    assert!(stats.is_conserved(), "{stats:?}");
    stats
}

#[tokio::test]
async fn messages_go_over_disk_and_are_settled() {
    let folder = tempfile::tempdir().unwrap();
    let recorder = Recorder::default();
    let server = serve(&recorder).await;
    let connection = dial(server.local_address(), folder.path());
    let messages = numbered(5_000);
    send_all(&connection, &messages).await;
    let last = connection.send(b"").await.unwrap();
    assert_eq!(last.number(), 5_001, "numbers are those of the stream");
    in_time("the last is settled", connection.settled(last)).await.unwrap();
    let flushed = in_time("it is flushed", connection.flush()).await.unwrap();
    assert_eq!(flushed.failed, 0);
    let stats = close(connection, DEADLINE).await;
    assert_eq!((stats.recovered, stats.accepted, stats.settled, stats.in_flight), (0, 5_001, 5_001, 0));
    let expected: Vec<_> = messages.into_iter().chain([Vec::new()]).collect();
    assert!(recorder.messages() == expected, "in order, none lost and none twice");
    assert_eq!(Spool::open(folder.path()).unwrap().recovered(), 0);
}

#[tokio::test]
async fn what_was_accepted_while_nobody_listened_is_sent_by_the_next_to_open_the_spool() {
    let folder = tempfile::tempdir().unwrap();
    let connection = dial(nobody().await, folder.path());
    let messages = numbered(3_000);
    send_all(&connection, &messages[..2_000]).await;
    let stream = connection.stream_id();
    let stats = close(connection, Duration::ZERO).await;
    assert_eq!((stats.accepted, stats.settled, stats.failed, stats.in_flight), (2_000, 0, 0, 2_000));

    let recorder = Recorder::default();
    let server = serve(&recorder).await;
    let spool = Spool::open(folder.path()).unwrap();
    assert_eq!((spool.recovered(), spool.next_number(), spool.stream_id()), (2_000, 2_001, stream));
    assert!(spool.damage().is_empty());
    let connection = builder().dial_spooled(server.local_address(), spool).unwrap();
    send_all(&connection, &messages[2_000..]).await;
    in_time("it is flushed", connection.flush()).await.unwrap();
    let stats = close(connection, DEADLINE).await;
    assert_eq!((stats.recovered, stats.accepted, stats.settled), (2_000, 1_000, 3_000));
    assert!(recorder.messages() == messages);
}

#[tokio::test]
async fn more_than_fits_into_memory_waits_on_disk() {
    let folder = tempfile::tempdir().unwrap();
    let connection = dial(nobody().await, folder.path());
    // Twelve times the least memory that an acknowledged connection has.
    let message = Bytes::from(vec![7_u8; 4_000]);
    let sends = stream::iter(0..24_000).map(|_| connection.send_bytes(message.clone())).buffered(2_000);
    in_time("all are on disk", sends.try_for_each(|_| async { Ok(()) })).await.unwrap();
    let stats = close(connection, Duration::ZERO).await;
    assert_eq!(stats.in_flight, 24_000);

    let recorder = Recorder::default();
    let server = serve(&recorder).await;
    let connection = dial(server.local_address(), folder.path());
    in_time("it is flushed", connection.flush()).await.unwrap();
    assert_eq!(close(connection, DEADLINE).await.settled, 24_000);
    assert_eq!(recorder.count(), 24_000);
}

#[tokio::test]
async fn messages_are_added_without_a_connection() {
    let folder = tempfile::tempdir().unwrap();
    let mut spool = Spool::builder().max_bytes(1_000).open(folder.path()).unwrap();
    assert_eq!(spool.append([&b"one"[..], b"two", &[0; 999], b"three"]).unwrap(), 2, "the third has no room");
    assert_eq!(spool.append::<&[u8]>([]).unwrap(), 0);
    assert_eq!((spool.recovered(), spool.next_number()), (2, 3));
    drop(spool);
    let recorder = Recorder::default();
    let server = serve(&recorder).await;
    let connection = dial(server.local_address(), folder.path());
    assert_eq!(in_time("it is flushed", connection.flush()).await.unwrap().settled, 2);
    close(connection, DEADLINE).await;
    assert_eq!(recorder.messages(), [b"one", b"two"]);
}

#[tokio::test]
async fn one_at_a_time_has_a_spool_open() {
    let folder = tempfile::tempdir().unwrap();
    let first = Spool::open(folder.path()).unwrap();
    let stream = first.stream_id();
    let error = Spool::open(folder.path()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Spool);
    assert!(error.to_string().contains("in use"), "{error}");
    drop(first);
    assert_eq!(Spool::open(folder.path()).unwrap().stream_id(), stream);
}

#[tokio::test]
async fn a_full_spool_lets_send_wait_or_fail_as_the_policy_says() {
    let folder = tempfile::tempdir().unwrap();
    let recorder = Recorder::default();
    let address = nobody().await;
    let small = Spool::builder().max_bytes(10_000);
    let message = [7_u8; 900];

    let failing = builder().overflow(Overflow::Fail);
    let connection = failing.dial_spooled(address.as_str(), small.open(folder.path()).unwrap()).unwrap();
    let mut accepted = 0;
    let error = loop {
        match connection.send(&message).await {
            Ok(_) => accepted += 1,
            Err(error) => break error,
        }
    };
    assert_eq!((accepted, error.kind()), (8, ErrorKind::Full), "{error}");
    assert!(error.to_string().contains("of 10000 bytes, messages that wait take 9264"), "{error}");
    close(connection, Duration::ZERO).await;

    let connection = builder().dial_spooled(address.as_str(), small.open(folder.path()).unwrap()).unwrap();
    let waiting = tokio::spawn({
        let connection = connection.clone();
        async move { connection.send(&message).await }
    });
    let listener = bind_again(Listener::builder(), &address).await;
    let server = listener.spawn(recorder.clone());
    in_time("acknowledgements make room", waiting).await.unwrap().unwrap();
    in_time("it is flushed", connection.flush()).await.unwrap();
    assert_eq!(close(connection, DEADLINE).await.settled, 9);
    server.shutdown(DEADLINE).await;
    assert_eq!(recorder.count(), 9);
}

/// Messages with their numbers in the stream.
type Numbered = Vec<(u64, Vec<u8>)>;

/// Rejects bad messages until it is told to accept them; notes the others with their numbers.
struct Judge {
    accepts: Arc<Mutex<bool>>,
    seen: Arc<Mutex<Numbered>>,
}

impl Handler for Judge {
    fn message(&mut self, message: Message<'_>) -> HandlerResult {
        if message.starts_with(b"bad") && !*self.accepts.lock().unwrap() {
            return Err(HandlerError::rejected(42, "it is bad"));
        }
        self.seen.lock().unwrap().push((message.number().unwrap(), message.to_vec()));
        Ok(())
    }
}

#[tokio::test]
async fn rejected_messages_are_kept_to_be_looked_at_and_sent_again() {
    let folder = tempfile::tempdir().unwrap();
    let accepts = Arc::new(Mutex::new(false));
    let seen = Arc::new(Mutex::new(Vec::new()));
    let service = per_connection({
        let (accepts, seen) = (Arc::clone(&accepts), Arc::clone(&seen));
        move |_: &Peer| Judge { accepts: Arc::clone(&accepts), seen: Arc::clone(&seen) }
    });
    let server = Listener::bind("127.0.0.1:0").await.unwrap().spawn(service);
    let told = Arc::new(Mutex::new(Vec::new()));
    let owner = {
        let told = Arc::clone(&told);
        move |failed: FailedMessage| told.lock().unwrap().push((failed.number, failed.rejection.unwrap().text))
    };
    let connection =
        builder().on_failed(owner).dial_spooled(server.local_address(), Spool::open(folder.path()).unwrap()).unwrap();
    for message in ["good 1", "bad 2", "good 3", "bad 4", "bad 5", "good 6"] {
        connection.send(message.as_bytes()).await.unwrap();
    }
    in_time("it is flushed", connection.flush()).await.unwrap();
    let stats = close(connection, DEADLINE).await;
    assert_eq!((stats.settled, stats.failed), (3, 3));
    let bad = |number| (number, "it is bad".to_owned());
    assert_eq!(*told.lock().unwrap(), [bad(2), bad(4), bad(5)]);

    let mut spool = Spool::open(folder.path()).unwrap();
    assert_eq!((spool.recovered(), spool.failed_count()), (0, 3));
    let failed: Vec<_> = spool.failed().map(Result::unwrap).collect();
    assert_eq!(failed.iter().map(|failed| failed.number).collect::<Vec<_>>(), [2, 4, 5]);
    assert_eq!((&failed[1].message[..], failed[1].rejection.code), (&b"bad 4"[..], 42));
    assert_eq!(spool.drop_failed(&[4, 99]).unwrap(), 1, "there is no 99");
    assert_eq!(spool.retry_failed(&[2, 5]).unwrap(), 2);
    assert_eq!((spool.recovered(), spool.failed_count()), (2, 0));
    drop(spool);

    *accepts.lock().unwrap() = true;
    let connection = dial(server.local_address(), folder.path());
    in_time("it is flushed", connection.flush()).await.unwrap();
    assert_eq!(close(connection, DEADLINE).await.settled, 2);
    let again: Vec<_> = seen.lock().unwrap().split_off(3);
    assert_eq!(again, [(7, b"bad 2".to_vec()), (8, b"bad 5".to_vec())]);
}

#[tokio::test]
async fn a_damaged_record_is_told_with_what_was_lost_and_the_others_arrive() {
    let folder = tempfile::tempdir().unwrap();
    let connection = dial(nobody().await, folder.path());
    // Each in a record of its own.
    for number in 1..=9 {
        connection.send(format!("the message with number {number}").as_bytes()).await.unwrap();
    }
    close(connection, Duration::ZERO).await;

    flip(folder.path(), b"the message with number 4");
    flip(folder.path(), b"the message with number 9");
    let spool = Spool::open(folder.path()).unwrap();
    let damage: Vec<_> = spool.damage().iter().map(|damage| (damage.from, damage.to)).collect();
    assert_eq!(damage, [(4, 4), (9, 9)]);
    assert!(spool.damage()[0].to_string().contains("checksum"), "{}", spool.damage()[0]);
    assert_eq!((spool.recovered(), spool.next_number()), (7, 10));

    let recorder = Recorder::default();
    let server = serve(&recorder).await;
    let connection = builder().dial_spooled(server.local_address(), spool).unwrap();
    in_time("nobody waits for what is lost", connection.flush()).await.unwrap();
    connection.send(b"the message with number 10").await.unwrap();
    in_time("it is flushed", connection.flush()).await.unwrap();
    assert_eq!(close(connection, DEADLINE).await.settled, 8);
    let numbers: Vec<_> = recorder.messages().iter().map(|message| message[24..].to_vec()).collect();
    assert_eq!(numbers, [b"1", &b"2"[..], b"3", b"5", b"6", b"7", b"8", b"10"]);
    assert!(Spool::open(folder.path()).unwrap().damage().is_empty(), "it was told, and the stream is past it");
}

/// Flips a bit of these bytes wherever they are in the spool.
fn flip(directory: &Path, bytes: &[u8]) {
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        let mut content = fs::read(&path).unwrap();
        let places: Vec<_> = (0..content.len()).filter(|at| content[*at..].starts_with(bytes)).collect();
        assert!(!places.is_empty(), "it is on disk");
        places.into_iter().for_each(|at| content[at] ^= 1);
        fs::write(path, content).unwrap();
    }
}

#[tokio::test]
async fn a_file_that_is_no_spool_is_an_error_and_no_panic() {
    for content in [&b"not a database at all"[..], &[0; 1 << 16], &[0xff; 1 << 16]] {
        let folder = tempfile::tempdir().unwrap();
        drop(Spool::open(folder.path()).unwrap());
        let path = fs::read_dir(folder.path()).unwrap().next().unwrap().unwrap().path();
        fs::write(&path, content).unwrap();
        let error = Spool::open(folder.path()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Spool, "{error}");
    }
}

#[tokio::test]
async fn what_cannot_be_kept_on_disk_is_refused_when_it_is_configured() {
    let folder = tempfile::tempdir().unwrap();
    for wrong in [builder().overflow(Overflow::FailOldest), builder().expiry(Duration::from_secs(1))] {
        let spool = Spool::open(folder.path()).unwrap();
        let error = wrong.dial_spooled("127.0.0.1:9", spool).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidConfiguration, "{error}");
    }
}

#[tokio::test]
async fn a_message_over_the_maximum_and_one_after_the_close_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let connection = dial(nobody().await, folder.path());
    let refused = connection.send_bytes(Bytes::from(vec![0; 4097])).await.unwrap_err();
    assert_eq!((refused.error.kind(), refused.message.len()), (ErrorKind::TooLarge, 4097));
    let clone = connection.clone();
    close(connection, Duration::ZERO).await;
    assert_eq!(clone.send(b"late").await.unwrap_err().kind(), ErrorKind::Closed);
    assert_eq!(clone.flush().await.unwrap().settled, 0);
}

#[tokio::test]
async fn a_dropped_connection_gives_its_spool_back() {
    let folder = tempfile::tempdir().unwrap();
    let recorder = Recorder::default();
    let server = serve(&recorder).await;
    let connection = dial(server.local_address(), folder.path());
    connection.send(b"hello").await.unwrap();
    drop(connection);
    until("the spool is free", || Spool::open(folder.path()).is_ok()).await;
    assert_eq!(recorder.messages(), [b"hello"]);
    assert_eq!(Spool::open(folder.path()).unwrap().recovered(), 0);
}

#[tokio::test]
async fn a_spool_with_larger_messages_than_the_maximum_is_refused_with_what_to_do() {
    let folder = tempfile::tempdir().unwrap();
    Spool::open(folder.path()).unwrap().append([vec![0; 9_000]]).unwrap();
    let recorder = Recorder::default();
    let server = serve(&recorder).await;
    let error = builder().dial_spooled(server.local_address(), Spool::open(folder.path()).unwrap()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidConfiguration);
    assert!(error.to_string().contains("9000 bytes, over the maximum of 4096"), "{error}");
}

#[tokio::test]
async fn a_copy_that_the_stream_has_overtaken_is_refused_and_stays_so() {
    let (folder, copy) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let recorder = Recorder::default();
    let server = serve(&recorder).await;
    let connection = dial(server.local_address(), folder.path());
    send_all(&connection, &numbered(10)).await;
    in_time("it is flushed", connection.flush()).await.unwrap();
    until("that is on disk", || {
        fs::copy(folder.path().join("spool.redb"), copy.path().join("spool.redb")).unwrap();
        Spool::open(copy.path()).is_ok_and(|copy| copy.recovered() == 0)
    })
    .await;
    send_all(&connection, &numbered(10)).await;
    in_time("it is flushed", connection.flush()).await.unwrap();
    // As a process that is killed: it has not said goodbye.
    let left = Box::leak(Box::new(connection));

    // One that knows nothing of the stream would take the copy.
    let other = serve(&recorder).await;
    for round in 0..2 {
        let mut spool = Spool::open(copy.path()).unwrap();
        if round == 0 {
            spool.append(numbered(5)).unwrap();
            let endpoints = [server.local_address(), other.local_address()];
            let restored = builder().dial_spooled(endpoints, spool).unwrap();
            in_time("it has given up", restored.closed()).await;
            assert_eq!(other.stats().connected, 0);
            assert!(restored.refusal().unwrap().contains("restored"), "{:?}", restored.refusal());
            assert_eq!(close(restored, DEADLINE).await.in_flight, 5, "nothing is called settled");
        } else {
            let error = builder().dial_spooled(server.local_address(), spool).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Spool);
            assert!(error.to_string().contains("up to message 20"), "{error}");
        }
    }
    assert_eq!(left.stats().settled, 20);
}

#[tokio::test]
async fn a_later_start_that_the_receiver_knows_of_shows_that_a_spool_is_a_copy() {
    let (folder, copy) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let recorder = Recorder::default();
    let server = serve(&recorder).await;
    close(dial(server.local_address(), folder.path()), Duration::ZERO).await;
    fs::copy(folder.path().join("spool.redb"), copy.path().join("spool.redb")).unwrap();
    close(dial(server.local_address(), folder.path()), Duration::ZERO).await;
    let connection = dial(server.local_address(), folder.path());
    connection.send(b"later").await.unwrap();
    in_time("it is flushed", connection.flush()).await.unwrap();

    let restored = dial(server.local_address(), copy.path());
    restored.send(b"other").await.unwrap();
    in_time("it has given up", restored.closed()).await;
    assert!(restored.refusal().unwrap().contains("restored"), "{:?}", restored.refusal());
    assert_eq!(recorder.messages(), [b"later"]);
    close(connection, DEADLINE).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn sends_of_many_threads_are_not_refused_while_there_is_room() {
    let folder = tempfile::tempdir().unwrap();
    let recorder = Recorder::default();
    let server = serve(&recorder).await;
    let spool = Spool::open(folder.path()).unwrap();
    let connection = builder().overflow(Overflow::Fail).dial_spooled(server.local_address(), spool).unwrap();
    let large = Bytes::from(vec![7; 4_000]);
    let senders: Vec<_> = (0..4)
        .map(|_| {
            let (connection, large) = (connection.clone(), large.clone());
            tokio::spawn(async move {
                // More at once than one write takes.
                let sends = stream::iter(0..2_000).map(|_| connection.send_bytes(large.clone())).buffered(2_000);
                sends.try_for_each(|_| async { Ok(()) }).await
            })
        })
        .collect();
    for sender in senders {
        in_time("all are sent", sender).await.unwrap().unwrap();
    }
    in_time("it is flushed", connection.flush()).await.unwrap();
    assert_eq!(close(connection, DEADLINE).await.settled, 8_000);
}

#[tokio::test]
async fn whoever_waits_for_messages_learns_that_the_connection_is_closed() {
    let folder = tempfile::tempdir().unwrap();
    let connection = dial(nobody().await, folder.path());
    let receipt = connection.send(b"hello").await.unwrap();
    let waiter = tokio::spawn({
        let connection = connection.clone();
        async move { connection.settled(receipt).await }
    });
    let another = tokio::spawn({
        let connection = connection.clone();
        async move { connection.flush().await }
    });
    close(connection, Duration::ZERO).await;
    let waited = in_time("it is told", waiter).await.unwrap();
    let flushed = in_time("it is told", another).await.unwrap();
    for error in [waited.unwrap_err(), flushed.unwrap_err()] {
        assert_eq!(error.kind(), ErrorKind::Closed);
        assert!(error.to_string().contains("in the spool"), "{error}");
    }
}

#[tokio::test]
async fn failed_messages_that_take_all_the_room_are_told_as_what_is_in_the_way() {
    let folder = tempfile::tempdir().unwrap();
    let server = Listener::bind("127.0.0.1:0").await.unwrap().spawn(|_: &[u8]| Err(HandlerError::rejected(1, "never")));
    let spool = Spool::builder().max_bytes(3_000).open(folder.path()).unwrap();
    let connection = builder().dial_spooled(server.local_address(), spool).unwrap();
    let error = loop {
        if let Err(error) = in_time("it does not wait", connection.send(&[7; 200])).await {
            break error;
        }
        in_time("it is flushed", connection.flush()).await.unwrap();
    };
    assert_eq!(error.kind(), ErrorKind::Full);
    assert!(error.to_string().contains("failed ones, which can be sent again or dropped"), "{error}");
    let stats = close(connection, DEADLINE).await;
    assert_eq!((stats.settled, stats.in_flight), (0, 0));
    let reopened = Spool::builder().max_bytes(3_000).open(folder.path()).unwrap();
    assert_eq!(reopened.failed_count(), stats.failed);
}
