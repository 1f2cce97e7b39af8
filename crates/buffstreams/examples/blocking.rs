//! Without an async runtime: plain threads send, and a closure that may block receives.
//!
//! `cargo run -p buffstreams --example blocking`

use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use buffstreams::blocking::{Connection, Listener};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let (results, incoming) = mpsc::sync_channel(16);
    let server = Listener::bind("127.0.0.1:0")?.spawn(move |message: &[u8]| {
        results.send(u64::from_be_bytes(message.try_into()?))?;
        Ok(())
    });

    let builder = buffstreams::Connection::builder().memory(64 * 1024);
    let connection = Connection::dial_with(builder, server.local_address())?;
    let senders: Vec<_> = (0..4)
        .map(|sender| {
            let connection = connection.clone();
            thread::spawn(move || {
                for number in 0..250u64 {
                    connection.send(&(sender * 250 + number).to_be_bytes())?;
                }
                connection.flush()
            })
        })
        .collect();

    let sum: u64 = incoming.iter().take(1000).sum();
    for sender in senders {
        sender.join().map_err(|_| "a sender panicked")??;
    }
    let stats = connection.close(Duration::from_secs(5))?;
    let report = server.shutdown(Duration::from_secs(5));
    println!("{} settled, {} received, and their sum is {sum}", stats.settled, report.received.messages);
    assert_eq!(sum, (0..1000).sum());
    Ok(())
}
