//! Listeners and connections by address.

use std::future::Future;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::Poll;
use std::time::Duration;

use buffstreams::{Address, Connection, ErrorKind, HandlerResult, Listener, Manager, Prefix, Retry, State};
use tokio::sync::{Notify, mpsc};

use crate::support::{PATIENCE, in_time, until};

const ANYWHERE: &str = "127.0.0.1:0";

fn ignore(_: &[u8]) -> HandlerResult {
    Ok(())
}

fn kind<T>(result: buffstreams::Result<T>) -> ErrorKind {
    match result {
        Ok(_) => panic!("it should not have worked"),
        Err(error) => error.kind(),
    }
}

#[tokio::test]
async fn one_address_holds_a_listener_and_a_connection_and_messages_pass_between_them() {
    let manager = Manager::new();
    let (got, mut gotten) = mpsc::unbounded_channel();
    let service = move |message: &[u8]| Ok(got.send(message.to_vec())?);
    let address = manager.listen(ANYWHERE, service).await.unwrap();
    assert!(matches!(&address, Address::Tcp { host, port } if host == "127.0.0.1" && *port != 0));
    assert_eq!(kind(manager.send(&address, b"too early").await), ErrorKind::NotOpen);
    assert!(manager.connection(&address).is_none());

    manager.dial(&address).await.unwrap();
    manager.send(&address, b"one").await.unwrap();
    manager.connection(&address).unwrap().send(b"two").await.unwrap();
    assert_eq!(in_time("the first message", gotten.recv()).await.unwrap(), b"one");
    assert_eq!(in_time("the second message", gotten.recv()).await.unwrap(), b"two");

    // Either can go without the other.
    let stats = in_time("a close", manager.close_connection(&address, PATIENCE)).await.unwrap();
    assert_eq!((stats.accepted, stats.settled), (2, 2));
    assert_eq!(manager.listeners().len(), 1);
    manager.dial(&address).await.unwrap();
    let report = in_time("a shutdown", manager.close_listener(&address, PATIENCE)).await.unwrap();
    assert_eq!(report.received.messages, 2);
    assert!(manager.listeners().is_empty());
    assert_eq!(manager.connections().len(), 1);
}

#[tokio::test]
async fn an_address_is_listened_on_and_dialled_once() {
    let manager = Manager::new();
    let address = manager.listen(ANYWHERE, ignore).await.unwrap();
    assert_eq!(kind(manager.listen(&address, ignore).await), ErrorKind::AlreadyOpen);
    manager.dial(&address).await.unwrap();
    assert_eq!(kind(manager.dial(&address).await), ErrorKind::AlreadyOpen);
    let lazy = manager.dial_lazy_with(Connection::builder(), &address);
    assert_eq!(kind(lazy), ErrorKind::AlreadyOpen);
}

#[tokio::test]
async fn a_second_close_says_not_open() {
    let manager = Manager::new();
    let address = manager.listen(ANYWHERE, ignore).await.unwrap();
    manager.dial(&address).await.unwrap();
    in_time("a close", manager.close_connection(&address, PATIENCE)).await.unwrap();
    assert_eq!(kind(manager.close_connection(&address, PATIENCE).await), ErrorKind::NotOpen);
    in_time("a shutdown", manager.close_listener(&address, PATIENCE)).await.unwrap();
    assert_eq!(kind(manager.close_listener(&address, PATIENCE).await), ErrorKind::NotOpen);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_closed_address_can_be_opened_again_at_once() {
    let manager = Manager::new();
    let address = manager.listen(ANYWHERE, ignore).await.unwrap();
    for round in 0..50u32 {
        manager.dial(&address).await.unwrap();
        manager.send(&address, &round.to_be_bytes()).await.unwrap();
        // Now the listener goes first, and now the connection.
        if round % 2 == 0 {
            in_time("a close", manager.close_connection(&address, PATIENCE)).await.unwrap();
            in_time("a shutdown", manager.close_listener(&address, PATIENCE)).await.unwrap();
        } else {
            in_time("a shutdown", manager.close_listener(&address, PATIENCE)).await.unwrap();
            in_time("a close", manager.close_connection(&address, Duration::ZERO)).await.unwrap();
        }
        assert_eq!(manager.listen(&address, ignore).await.unwrap(), address);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_many_tasks_that_open_one_address_one_succeeds() {
    let manager = Manager::new();
    let listening = manager.listen(ANYWHERE, ignore).await.unwrap();
    for _ in 0..20 {
        in_time("a shutdown", manager.close_listener(&listening, PATIENCE)).await.unwrap();
        let mut tasks = tokio::task::JoinSet::new();
        for _ in 0..8 {
            let (manager, address) = (manager.clone(), listening.clone());
            tasks.spawn(async move { manager.listen(&address, ignore).await.map(drop) });
        }
        assert_eq!(successes(tasks).await, 1);

        let mut tasks = tokio::task::JoinSet::new();
        for _ in 0..8 {
            let (manager, address) = (manager.clone(), listening.clone());
            tasks.spawn(async move { manager.dial(&address).await.map(drop) });
        }
        assert_eq!(successes(tasks).await, 1);
        in_time("a close", manager.close_connection(&listening, PATIENCE)).await.unwrap();
    }
}

/// How many of them succeeded; the others must have been told that the address is open.
async fn successes(tasks: tokio::task::JoinSet<buffstreams::Result<()>>) -> usize {
    let results = in_time("all tasks", tasks.join_all()).await;
    let (well, ill): (Vec<_>, Vec<_>) = results.into_iter().partition(Result::is_ok);
    assert!(ill.into_iter().all(|result| kind(result) == ErrorKind::AlreadyOpen));
    well.len()
}

/// Polls an open once: it waits for the socket then, which a runtime of one thread has had no turn to look at.
async fn begin<T>(open: Pin<&mut impl Future<Output = T>>) {
    let mut open = Some(open);
    std::future::poll_fn(|cx| {
        assert!(open.take().expect("it is polled once").poll(cx).is_pending());
        Poll::Ready(())
    })
    .await;
}

#[tokio::test]
async fn an_address_is_reserved_while_it_is_being_dialled_and_released_when_the_dial_is_dropped() {
    let manager = Manager::new();
    let address = manager.listen(ANYWHERE, ignore).await.unwrap();
    {
        let mut dialling = pin!(manager.dial(&address));
        begin(dialling.as_mut()).await;
        assert_eq!(kind(manager.dial(&address).await), ErrorKind::AlreadyOpen);
        assert_eq!(kind(manager.send(&address, b"too early").await), ErrorKind::NotOpen);
        assert_eq!(kind(manager.close_connection(&address, PATIENCE).await), ErrorKind::NotOpen);
        assert!(manager.connections().is_empty());
    }
    manager.dial(&address).await.unwrap();
}

#[tokio::test]
async fn a_shutdown_gives_up_what_is_being_opened_and_the_next_open_succeeds() {
    let manager = Manager::new();
    let server = Listener::bind(ANYWHERE).await.unwrap().spawn(ignore);
    let address = server.local_address();
    let mut dialling = pin!(manager.dial(address));
    begin(dialling.as_mut()).await;
    let report = in_time("a shutdown", manager.shutdown(PATIENCE)).await;
    assert!(report.connections.is_empty());

    // What was begun before the shutdown does not disturb what was begun after it.
    let mut another = pin!(manager.dial(address));
    begin(another.as_mut()).await;
    assert_eq!(kind(in_time("the dial", dialling).await), ErrorKind::Closed);
    assert_eq!(kind(manager.dial(address).await), ErrorKind::AlreadyOpen);
    in_time("the other dial", another).await.unwrap();
    manager.send(address, b"hello").await.unwrap();
}

#[tokio::test]
async fn an_open_that_fails_leaves_the_address_free() {
    let manager = Manager::new();
    let occupied = Listener::bind(ANYWHERE).await.unwrap();
    let address = occupied.local_address().clone();
    assert_eq!(kind(manager.listen(&address, ignore).await), ErrorKind::Bind);
    drop(occupied);
    assert_eq!(kind(manager.dial(&address).await), ErrorKind::Connect);
    assert_eq!(kind(manager.dial(&address).await), ErrorKind::Connect);
    assert_eq!(kind(manager.listen("no port", ignore).await), ErrorKind::InvalidAddress);
    assert_eq!(manager.listen(&address, ignore).await.unwrap(), address);
    manager.dial(&address).await.unwrap();
}

#[tokio::test]
async fn a_connection_that_gave_up_can_be_dialled_again() {
    let manager = Manager::new();
    let address = manager.listen(ANYWHERE, ignore).await.unwrap();
    let connection = manager.dial_with(Connection::builder().retry(Retry::Never), &address).await.unwrap();
    in_time("a shutdown", manager.close_listener(&address, PATIENCE)).await.unwrap();
    in_time("the connection's end", connection.closed()).await;

    // It is held until then, and says what became of it.
    assert_eq!(manager.connection(&address).unwrap().state(), State::Closed);
    assert_eq!(kind(manager.send(&address, b"too late").await), ErrorKind::Closed);

    manager.listen(&address, ignore).await.unwrap();
    manager.dial(&address).await.unwrap();
    manager.send(&address, b"again").await.unwrap();
}

#[tokio::test]
async fn a_connection_that_gave_up_can_be_closed_for_its_last_account() {
    let manager = Manager::new();
    let address = manager.listen(ANYWHERE, ignore).await.unwrap();
    let connection = manager.dial_with(Connection::builder().retry(Retry::Never), &address).await.unwrap();
    manager.send(&address, b"one").await.unwrap();
    connection.flush().await.unwrap();
    in_time("a shutdown", manager.close_listener(&address, PATIENCE)).await.unwrap();
    in_time("the connection's end", connection.closed()).await;
    assert_eq!(manager.close_connection(&address, PATIENCE).await.unwrap().settled, 1);
    assert_eq!(kind(manager.close_connection(&address, PATIENCE).await), ErrorKind::NotOpen);
}

#[test]
fn a_listener_whose_runtime_is_gone_makes_way() {
    let manager = Manager::new();
    let gone = tokio::runtime::Runtime::new().unwrap();
    let address = gone.block_on(manager.listen(ANYWHERE, ignore)).unwrap();
    drop(gone);
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        assert_eq!(in_time("another listen", manager.listen(&address, ignore)).await.unwrap(), address);
        manager.dial(&address).await.unwrap();
    });
}

#[tokio::test]
async fn settings_are_those_of_the_builders() {
    let manager = Manager::new();
    let builder = Listener::builder().prefix(Prefix::U8);
    let address = manager.listen_with(builder, ANYWHERE, ignore).await.unwrap();
    let builder = Connection::builder().prefix(Prefix::U8);
    let connection = manager.dial_with(builder, &address).await.unwrap();
    assert_eq!(kind(manager.send(&address, &[0; 256]).await), ErrorKind::TooLarge);
    manager.send(&address, &[0; 255]).await.unwrap();
    connection.flush().await.unwrap();
    until("the message is there", || manager.listeners()[0].1.bytes == 255).await;
}

#[tokio::test]
async fn a_lazy_connection_is_held_before_its_peer_is_there() {
    let manager = Manager::new();
    let address = manager.listen(ANYWHERE, ignore).await.unwrap();
    in_time("a shutdown", manager.close_listener(&address, PATIENCE)).await.unwrap();
    manager.dial_lazy_with(Connection::builder(), &address).unwrap();
    manager.send(&address, b"early").await.unwrap();
    manager.listen(&address, ignore).await.unwrap();
    until("the message is there", || manager.listeners()[0].1.messages == 1).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_shutdown_ends_everything_and_accounts_for_it() {
    let manager = Manager::new();
    let mut addresses = Vec::new();
    for _ in 0..3 {
        let address = manager.listen(ANYWHERE, ignore).await.unwrap();
        let connection = manager.dial(&address).await.unwrap();
        for _ in 0..100 {
            manager.send(&address, b"message").await.unwrap();
        }
        connection.flush().await.unwrap();
        addresses.push(address);
    }
    until("all messages are there", || manager.listeners().iter().all(|(_, received)| received.messages == 100)).await;

    let report = in_time("a shutdown", manager.shutdown(PATIENCE)).await;
    addresses.sort();
    assert!(report.listeners.iter().map(|(address, _)| address).eq(&addresses));
    assert!(report.connections.iter().map(|(address, _)| address).eq(&addresses));
    assert!(report.listeners.iter().all(|(_, report)| report.received.messages == 100 && report.cut == 0));
    assert!(report.connections.iter().all(|(_, stats)| stats.settled == 100 && stats.in_flight == 0));
    assert!(manager.listeners().is_empty() && manager.connections().is_empty());

    // All ports are free, and the manager can be used again.
    for address in &addresses {
        manager.listen(address, ignore).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_handler_can_forward_to_the_end_of_a_shutdown() {
    let manager = Manager::new();
    let arrived = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&arrived);
    let sink = Listener::bind(ANYWHERE).await.unwrap().spawn(move |_: &[u8]| {
        count.fetch_add(1, Ordering::Relaxed);
        Ok(())
    });
    let onward = manager.dial(sink.local_address()).await.unwrap();
    let (begun, go_on) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
    let service = buffstreams::async_handler({
        let (begun, go_on) = (Arc::clone(&begun), Arc::clone(&go_on));
        move |message, _| {
            let (begun, go_on, onward) = (Arc::clone(&begun), Arc::clone(&go_on), onward.clone());
            async move {
                begun.notify_one();
                go_on.notified().await;
                onward.send_bytes(message).await?;
                Ok(())
            }
        }
    });
    let address = manager.listen(ANYWHERE, service).await.unwrap();
    let connection = Connection::dial(&address).await.unwrap();
    connection.send(b"to be forwarded").await.unwrap();
    in_time("the handler", begun.notified()).await;

    let shutdown = tokio::spawn({
        let manager = manager.clone();
        async move { manager.shutdown(PATIENCE).await }
    });
    until("the shutdown has begun", || manager.listeners().is_empty()).await;
    go_on.notify_one();
    let report = in_time("the shutdown", shutdown).await.unwrap();
    assert_eq!(report.listeners[0].1.received.handler_errors, 0);
    assert_eq!(report.connections[0].1.settled, 1);
    until("the message has arrived", || arrived.load(Ordering::Relaxed) == 1).await;
}

#[tokio::test]
async fn dropping_the_last_clone_frees_the_ports() {
    let manager = Manager::new();
    let address = manager.listen(ANYWHERE, ignore).await.unwrap();
    let other = manager.clone();
    drop(manager);
    assert_eq!(other.listeners().len(), 1);
    drop(other);
    let manager = Manager::new();
    in_time("the port is free", async {
        while manager.listen(&address, ignore).await.is_err() {
            tokio::task::yield_now().await;
        }
    })
    .await;
}

#[tokio::test]
async fn an_address_with_port_0_is_held_as_written_with_the_real_port() {
    let manager = Manager::new();
    let address = manager.listen("localhost:0", ignore).await.unwrap();
    assert!(matches!(&address, Address::Tcp { host, port } if host == "localhost" && *port != 0), "{address}");
    let other = manager.listen("localhost:0", ignore).await.unwrap();
    assert_ne!(address, other);
    manager.dial(&address).await.unwrap();
    in_time("a shutdown", manager.close_listener(&address, PATIENCE)).await.unwrap();
}
