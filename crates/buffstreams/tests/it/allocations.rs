//! Neither path allocates for a message once traffic flows: counted on the one thread that does everything.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use allocation_counter::AllocationInfo;
use buffstreams::{Connection, Listener};
use bytes::Bytes;

use crate::support::{is_alone, passes_alone, until};

const ANYWHERE: &str = "127.0.0.1:0";

const MESSAGES: u64 = 100_000;

/// What is allocated while so many messages go through, after as many have gone before.
fn steady_state(send: impl AsyncFn(&Connection)) -> AllocationInfo {
    let seen = Arc::new(AtomicU64::new(0));
    let counter = Arc::clone(&seen);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let (_server, connection) = runtime.block_on(async {
        let count = move |message: &[u8]| {
            counter.fetch_add(u64::from(message[0] == 7), Ordering::Relaxed);
            Ok(())
        };
        let server = Listener::bind(ANYWHERE).await.unwrap().spawn(count);
        let connection = Connection::dial(server.local_address()).await.unwrap();
        (server, connection)
    });
    let pass = |upto: u64| {
        runtime.block_on(async {
            for _ in 0..MESSAGES {
                send(&connection).await;
            }
            until("all are seen", || seen.load(Ordering::Relaxed) == upto).await;
        });
    };
    pass(MESSAGES);
    allocation_counter::measure(|| pass(2 * MESSAGES))
}

/// A chunk takes one small block to be shared with the writer. There is nothing else. It holds 2,000 messages, or fewer where the
/// socket has room for them before: how often depends on what else the machine does.
fn assert_none_for_a_message(counted: AllocationInfo) {
    assert!(counted.count_total <= MESSAGES / 100, "{counted:?} for {MESSAGES} messages");
}

/// In a process of its own, so that tests which run beside it do not take its buffers.
#[test]
#[ignore = "a part of another test, which runs it as a process of its own"]
fn steady_state_alone() {
    if !is_alone() {
        return;
    }
    assert_none_for_a_message(steady_state(async |connection| {
        connection.send(&[7; 110]).await.unwrap();
    }));
    let message = Bytes::from(vec![7; 110]);
    assert_none_for_a_message(steady_state(async |connection| {
        connection.send_bytes(message.clone()).await.unwrap();
    }));
    assert_none_for_a_message(steady_state(async |connection| {
        connection.send_with(110, |buffer| buffer.extend_from_slice(&[7; 110])).await.unwrap();
    }));
}

#[test]
fn once_traffic_flows_no_message_is_allocated_for_on_either_path() {
    passes_alone("allocations::steady_state_alone");
}
