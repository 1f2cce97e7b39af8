//! The shortest way to receive: a closure, which all connections share, gets every message.
//!
//! `cargo run -p buffstreams --example closure`

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use buffstreams::{Connection, Listener};

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let sum = Arc::new(AtomicU64::new(0));
    let adding = Arc::clone(&sum);
    let server = Listener::bind("127.0.0.1:0").await?.spawn(move |message: &[u8]| {
        adding.fetch_add(u64::from_be_bytes(message.try_into()?), Ordering::Relaxed);
        Ok(())
    });

    let connection = Connection::dial(server.local_address()).await?;
    for number in 1..=1000u64 {
        connection.send(&number.to_be_bytes()).await?;
    }
    connection.close(Duration::from_secs(5)).await?;

    let report = server.shutdown(Duration::from_secs(5)).await;
    println!("{} messages, and their sum is {}", report.received.messages, sum.load(Ordering::Relaxed));
    assert_eq!(sum.load(Ordering::Relaxed), 500_500);
    Ok(())
}
