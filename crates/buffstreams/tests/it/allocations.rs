//! Neither path allocates for a message once traffic flows: counted on the one thread that does everything.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use allocation_counter::AllocationInfo;
use buffstreams::{Connection, Listener};
use bytes::Bytes;

use crate::support::until;

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

/// A chunk, which holds 2,000 messages, takes one small block to be shared with the writer; and more where tests that run
/// beside this one have its buffers.
fn assert_none_for_a_message(counted: AllocationInfo) {
    assert!(counted.count_total < MESSAGES / 100, "{counted:?}");
}

#[test]
fn sending_and_receiving_allocates_nothing_for_a_message() {
    let counted = steady_state(async |connection| {
        connection.send(&[7; 110]).await.unwrap();
    });
    assert_none_for_a_message(counted);
}

#[test]
fn handing_over_messages_that_are_owned_allocates_nothing_for_one() {
    let message = Bytes::from(vec![7; 110]);
    let counted = steady_state(async |connection| {
        connection.send_bytes(message.clone()).await.unwrap();
    });
    assert_none_for_a_message(counted);
}

#[test]
fn encoding_in_place_allocates_nothing_for_a_message() {
    let counted = steady_state(async |connection| {
        connection.send_with(110, |buffer| buffer.extend_from_slice(&[7; 110])).await.unwrap();
    });
    assert_none_for_a_message(counted);
}
