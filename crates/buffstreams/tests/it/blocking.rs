//! Code without a runtime: plain threads against the blocking side.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::RecvTimeoutError;
use std::sync::{Arc, Condvar, Mutex, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use buffstreams::blocking::{Connection, Listener, Messages, Sender, Server};
use buffstreams::{
    Backoff, Bytes, ErrorKind, HandlerError, HandlerResult, OnHandlerError, Overflow, Peer, Prefix, Retry,
    ShutdownReport, State, blocking_handler, messages, per_connection,
};

use crate::support::{APART, PATIENCE};

const ANYWHERE: &str = "127.0.0.1:0";

fn ignore(_: &[u8]) -> HandlerResult {
    Ok(())
}

/// Waits until a condition holds that nothing announces.
fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !holds() {
        assert!(begun.elapsed() < PATIENCE, "not in time: {what}");
        thread::sleep(Duration::from_millis(1));
    }
}

/// Shuts a server down when it has received so many messages: what is still in the kernel then would be lost.
fn shut_down(server: Server, after: u64) -> ShutdownReport {
    until("all messages are there", || server.stats().messages >= after);
    server.shutdown(PATIENCE)
}

/// Something that threads wait behind until it is opened.
#[derive(Clone, Default)]
struct Gate(Arc<(Mutex<bool>, Condvar)>);

impl Gate {
    fn open(&self) {
        *self.0.0.lock().unwrap() = true;
        self.0.1.notify_all();
    }

    fn pass(&self) {
        let shut = self.0.0.lock().unwrap();
        let (_open, timeout) = self.0.1.wait_timeout_while(shut, PATIENCE, |open| !*open).unwrap();
        assert!(!timeout.timed_out(), "the gate was never opened");
    }
}

#[test]
fn messages_arrive_in_order_and_everything_is_accounted_for() {
    let seen = Arc::new(Mutex::new(Vec::new()));
    let server = Listener::bind(ANYWHERE).unwrap().spawn({
        let seen = Arc::clone(&seen);
        move |message: &[u8]| {
            seen.lock().unwrap().push(u32::from_be_bytes(message.try_into()?));
            Ok(())
        }
    });
    let connection = Connection::dial(server.local_address()).unwrap();
    assert_eq!(connection.state(), State::Connected);
    for number in 1..10_000u32 {
        connection.send(&number.to_be_bytes()).unwrap();
    }
    let last = connection.send(&10_000u32.to_be_bytes()).unwrap();
    connection.settled(last).unwrap();
    let flushed = connection.flush().unwrap();
    assert_eq!((flushed.settled, flushed.failed), (10_000, 0));
    let stats = connection.close(PATIENCE).unwrap();
    assert_eq!((stats.accepted, stats.settled), (10_000, 10_000));
    assert_eq!(connection.state(), State::Closed);
    assert_eq!(connection.send(b"late").unwrap_err().kind(), ErrorKind::Closed);
    connection.closed();

    let report = shut_down(server, 10_000);
    assert_eq!((report.received.messages, report.cut), (10_000, 0));
    assert!(seen.lock().unwrap().iter().copied().eq(1..=10_000));
}

#[test]
fn any_number_of_threads_may_send_over_one_connection() {
    let sum = Arc::new(AtomicU64::new(0));
    let server = Listener::bind(ANYWHERE).unwrap().spawn({
        let sum = Arc::clone(&sum);
        move |message: &[u8]| {
            sum.fetch_add(u64::from_be_bytes(message.try_into()?), Ordering::Relaxed);
            Ok(())
        }
    });
    // So little memory that the threads must wait for each other's room.
    let builder = buffstreams::Connection::builder().memory(1024);
    let connection = Connection::dial_with(builder, server.local_address()).unwrap();
    thread::scope(|scope| {
        for _ in 0..8 {
            let connection = connection.clone();
            scope.spawn(move || {
                for number in 1..=1000u64 {
                    connection.send(&number.to_be_bytes()).unwrap();
                }
            });
        }
    });
    assert_eq!(connection.close(PATIENCE).unwrap().settled, 8000);
    assert_eq!(shut_down(server, 8000).received.messages, 8000);
    assert_eq!(sum.load(Ordering::Relaxed), 8 * 500_500);
}

#[test]
fn every_way_to_send_waits_for_room_and_the_trying_ones_do_not() {
    // Nobody is there yet, so nothing is written; and one message takes all the memory.
    let address = Listener::bind(APART).unwrap().local_address().clone();
    let backoff = Backoff { min: Duration::from_millis(1), max: Duration::from_millis(10) };
    let builder = buffstreams::Connection::builder().memory(1).backoff(backoff);
    let connection = Connection::dial_lazy_with(builder, &address).unwrap();
    let message = Bytes::from_static(b"message");
    connection.send(&message).unwrap();
    assert_eq!(connection.try_send(&message).unwrap_err().kind(), ErrorKind::Full);
    let refused = connection.try_send_bytes(message.clone()).unwrap_err();
    assert_eq!((refused.error.kind(), &refused.message), (ErrorKind::Full, &message));

    let server = thread::scope(|scope| {
        let (connection, message) = (&connection, &message);
        scope.spawn(move || connection.send(message).unwrap());
        scope.spawn(move || connection.send_bytes(message.clone()).unwrap());
        scope.spawn(move || connection.send_expiring(message, PATIENCE).unwrap());
        scope.spawn(move || connection.send_with(message.len(), |buffer| buffer.extend_from_slice(message)).unwrap());
        assert_eq!(connection.stats().accepted, 1);
        // A process that another test is starting may have a copy of the socket for a moment.
        let again = (0..1_000).find_map(|_| {
            thread::sleep(Duration::from_millis(1));
            Listener::bind(&address).ok()
        });
        again.unwrap().spawn(ignore)
    });
    assert_eq!(connection.close(PATIENCE).unwrap().settled, 5);
    let report = shut_down(server, 5);
    assert_eq!((report.received.messages, report.received.bytes), (5, 5 * message.len() as u64));
}

#[test]
fn a_connection_that_shall_fail_when_full_does() {
    let builder = buffstreams::Connection::builder().memory(1).overflow(Overflow::Fail);
    let connection = Connection::dial_lazy_with(builder, "127.0.0.1:1").unwrap();
    connection.send(b"one").unwrap();
    assert_eq!(connection.send(b"two").unwrap_err().kind(), ErrorKind::Full);
    assert_eq!(connection.send_bytes(Bytes::from_static(b"two")).unwrap_err().error.kind(), ErrorKind::Full);
    let stats = connection.close(Duration::ZERO).unwrap();
    assert_eq!((stats.accepted, stats.failed), (1, 1));
}

#[test]
fn a_closure_may_block_and_call_this_side() {
    let (got, gotten) = mpsc::channel();
    let onward = Listener::bind(ANYWHERE).unwrap().spawn(move |message: &[u8]| Ok(got.send(message.to_vec())?));
    let connection = Connection::dial(onward.local_address()).unwrap();
    let server = Listener::bind(ANYWHERE).unwrap().spawn(move |message: &[u8]| {
        connection.send(message)?;
        connection.flush()?;
        Ok(())
    });
    let connection = Connection::dial(server.local_address()).unwrap();
    connection.send(b"forwarded").unwrap();
    assert_eq!(gotten.recv_timeout(PATIENCE).unwrap(), b"forwarded");
}

#[test]
fn a_closure_that_blocks_holds_up_its_own_connection_alone() {
    let (gate, blocked) = (Gate::default(), Arc::new(AtomicBool::new(false)));
    let server = Listener::bind(ANYWHERE).unwrap().spawn({
        let (gate, blocked) = (gate.clone(), Arc::clone(&blocked));
        move |message: &[u8]| {
            if message == b"block" {
                blocked.store(true, Ordering::Release);
                gate.pass();
            }
            Ok(())
        }
    });
    // More of them than the runtime has threads for sockets.
    let stuck: Vec<_> = (0..16)
        .map(|_| {
            let connection = Connection::dial(server.local_address()).unwrap();
            connection.send(b"block").unwrap();
            connection
        })
        .collect();
    until("a closure blocks", || blocked.load(Ordering::Acquire));
    let connection = Connection::dial(server.local_address()).unwrap();
    let before = server.stats().messages;
    connection.send(b"pass").unwrap();
    until("the message is there", || server.stats().messages > before);
    connection.close(PATIENCE).unwrap();
    gate.open();
    for connection in stuck {
        connection.close(PATIENCE).unwrap();
    }
    assert_eq!(shut_down(server, 17).received.messages, 17);
}

#[test]
fn errors_of_a_closure_are_counted_one_by_one() {
    let server = Listener::bind(ANYWHERE).unwrap().spawn(|message: &[u8]| match message {
        b"bad" => Err(HandlerError::new("bad")),
        _ => Ok(()),
    });
    let connection = Connection::dial(server.local_address()).unwrap();
    for _ in 0..1000 {
        connection.send(b"bad").unwrap();
        connection.send(b"good").unwrap();
    }
    connection.close(PATIENCE).unwrap();
    let report = shut_down(server, 2000);
    assert_eq!((report.received.messages, report.received.handler_errors, report.received.broken), (2000, 1000, 0));
}

#[test]
fn a_closure_that_fails_all_the_time_does_not_let_messages_pile_up() {
    // One read brings 256 KiB at most: of empty messages, with a prefix of one byte, that many.
    const ONE_READ: u64 = 256 * 1024;
    const MESSAGES: u64 = 8 * ONE_READ;

    let server: Arc<Mutex<Option<Server>>> = Arc::default();
    let most = Arc::new(AtomicU64::new(0));
    let handled = AtomicU64::new(0);
    let builder = buffstreams::Listener::builder().prefix(Prefix::Varint);
    let running = Listener::bind_with(builder, ANYWHERE).unwrap().spawn({
        let (server, most) = (Arc::clone(&server), Arc::clone(&most));
        move |_: &[u8]| {
            let handled = handled.fetch_add(1, Ordering::Relaxed);
            if handled.is_multiple_of(64) {
                let read = server.lock().unwrap().as_ref().map_or(0, |server| server.stats().messages);
                most.fetch_max(read.saturating_sub(handled), Ordering::Relaxed);
            }
            Err(HandlerError::new("never content"))
        }
    });
    let address = running.local_address().clone();
    *server.lock().unwrap() = Some(running);

    let builder = buffstreams::Connection::builder().prefix(Prefix::Varint);
    let connection = Connection::dial_with(builder, &address).unwrap();
    for _ in 0..MESSAGES {
        connection.send(b"").unwrap();
    }
    connection.close(PATIENCE).unwrap();
    let server = server.lock().unwrap().take().unwrap();
    let report = shut_down(server, MESSAGES);
    assert_eq!((report.received.messages, report.received.handler_errors), (MESSAGES, MESSAGES));
    let most = most.load(Ordering::Relaxed);
    assert!(most <= ONE_READ, "{most} messages were read and not handled");
}

#[test]
fn by_policy_an_error_of_a_closure_ends_its_connection() {
    let builder = buffstreams::Listener::builder().on_handler_error(OnHandlerError::Close);
    let server = Listener::bind_with(builder, ANYWHERE).unwrap().spawn(|_: &[u8]| Err(HandlerError::new("bad")));
    let builder = buffstreams::Connection::builder().retry(Retry::Never);
    let connection = Connection::dial_with(builder, server.local_address()).unwrap();
    connection.send(b"message").unwrap();
    connection.closed();
    assert_eq!(server.shutdown(PATIENCE).received.broken, 1);
}

#[test]
fn a_closure_that_panics_ends_its_own_connection_alone() {
    let server = Listener::bind(ANYWHERE).unwrap().spawn(|message: &[u8]| {
        assert!(message != b"panic", "as the test demands");
        Ok(())
    });
    let builder = buffstreams::Connection::builder().retry(Retry::Never);
    let fine = Connection::dial(server.local_address()).unwrap();
    let panicking = Connection::dial_with(builder, server.local_address()).unwrap();
    panicking.send(b"panic").unwrap();
    panicking.closed();
    fine.send(b"hello").unwrap();
    assert_eq!(fine.close(PATIENCE).unwrap().settled, 1);
    let report = shut_down(server, 2);
    assert_eq!((report.received.messages, report.received.broken), (2, 1));
}

#[test]
fn answers_are_pulled_and_waiting_for_them_can_end() {
    let service = per_connection(|peer: &Peer| Echo(peer.clone()));
    let server = Listener::bind(ANYWHERE).unwrap().spawn_service(service);
    let (service, received) = messages();
    let mut received = Messages::from(received);
    let builder = buffstreams::Connection::builder().handler(service);
    let connection = Connection::dial_with(builder, server.local_address()).unwrap();

    assert_eq!(received.recv_timeout(Duration::ZERO).unwrap_err(), RecvTimeoutError::Timeout);
    for number in 0..100u32 {
        connection.send(&number.to_be_bytes()).unwrap();
    }
    assert_eq!(received.recv().unwrap().0, 0u32.to_be_bytes()[..]);
    assert_eq!(received.recv_timeout(PATIENCE).unwrap().0, 1u32.to_be_bytes()[..]);
    let rest: Vec<_> = received.by_ref().take(98).map(|(message, _)| message).collect();
    assert_eq!(rest.last().unwrap(), &99u32.to_be_bytes()[..]);
    assert_eq!(connection.received().messages, 100);

    connection.close(PATIENCE).unwrap();
    assert!(received.recv().is_none());
    assert_eq!(received.recv_timeout(PATIENCE).unwrap_err(), RecvTimeoutError::Disconnected);
}

struct Echo(Peer);

impl buffstreams::Handler for Echo {
    fn message(&mut self, message: buffstreams::Message<'_>) -> HandlerResult {
        self.0.sender().try_send(&message)?;
        Ok(())
    }
}

#[test]
fn replies_can_be_sent_from_code_that_blocks() {
    let service = blocking_handler(|message: &[u8], peer: &Peer| {
        Sender::from(peer.sender().clone()).send(message)?;
        Ok(())
    });
    let server = Listener::bind(ANYWHERE).unwrap().spawn_service(service);
    let (service, received) = messages();
    let builder = buffstreams::Connection::builder().handler(service);
    let connection = Connection::dial_with(builder, server.local_address()).unwrap();
    connection.send(b"question").unwrap();
    assert_eq!(Messages::from(received).recv_timeout(PATIENCE).unwrap().0, "question");
}

#[test]
fn a_listener_hands_messages_to_whoever_pulls() {
    let (service, received) = messages();
    let server = Listener::bind(ANYWHERE).unwrap().spawn_service(service);
    let connection = Connection::dial(server.local_address()).unwrap();
    connection.send(b"message").unwrap();
    let mut received = Messages::from(received);
    assert_eq!(received.recv_timeout(PATIENCE).unwrap().0, "message");
    let stopper = server.stopper();
    let stopping = thread::spawn(move || stopper.stop(PATIENCE));
    assert_eq!(server.stopped().received.messages, 1);
    stopping.join().unwrap();
    assert!(received.next().is_none());
}

#[test]
fn a_connection_dialled_on_the_async_side_can_be_used_from_a_thread() {
    let server = Listener::bind(ANYWHERE).unwrap().spawn(ignore);
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let connection = runtime.block_on(buffstreams::Connection::dial(server.local_address())).unwrap();
    let connection = Connection::from(connection);
    connection.send(b"message").unwrap();
    assert_eq!(connection.flush().unwrap().settled, 1);
    drop(runtime);
    connection.closed();
    assert_eq!(connection.send(b"message").unwrap_err().kind(), ErrorKind::Closed);
}

#[test]
fn a_new_socket_can_be_asked_for() {
    let server = Listener::bind(ANYWHERE).unwrap().spawn(ignore);
    let connection = Connection::dial(server.local_address()).unwrap();
    connection.reopen();
    until("there was a second socket", || server.stats().connected == 2);
    connection.send(b"message").unwrap();
    connection.flush().unwrap();
    until("the message is there", || server.stats().messages == 1);
}

#[test]
fn a_call_that_waits_panics_in_async_code() {
    let server = Listener::bind(ANYWHERE).unwrap().spawn(ignore);
    let connection = Connection::dial(server.local_address()).unwrap();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let flush = {
        let connection = connection.clone();
        runtime.spawn(async move { connection.flush().map(drop) })
    };
    assert!(runtime.block_on(flush).unwrap_err().is_panic());
    let allowed = runtime.spawn_blocking(move || connection.flush().map(drop));
    runtime.block_on(allowed).unwrap().unwrap();
}

#[cfg(target_os = "linux")]
#[test]
fn dropped_handles_leave_no_thread_behind() {
    let threads = || {
        let tasks = std::fs::read_dir("/proc/self/task").unwrap();
        let names = tasks.filter_map(|task| std::fs::read_to_string(task.ok()?.path().join("comm")).ok());
        names.filter(|name| name.trim() == "buffstreams").count()
    };
    for _ in 0..100 {
        let server = Listener::bind(ANYWHERE).unwrap().spawn_service(|_: &[u8]| Ok(()));
        let connection = Connection::dial(server.local_address()).unwrap();
        connection.send(b"message").unwrap();
    }
    // Four for sockets, at most, and those that the closures of other tests are on.
    until("no more than are documented", || threads() <= 4 + 40);
}
