//! A relay: a manager holds listeners and connections by address, and a handler forwards from one to the other.
//!
//! `cargo run -p buffstreams --example manager`

use std::time::Duration;

use buffstreams::{Bytes, Manager, Peer, async_handler};

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let manager = Manager::new();

    let target = manager.listen("127.0.0.1:0", |_: &[u8]| Ok(())).await?;
    let onward = manager.dial(&target).await?;
    let relay = async_handler(move |message: Bytes, _peer: Peer| {
        let onward = onward.clone();
        async move {
            onward.send_bytes(message).await?;
            Ok(())
        }
    });
    let relay = manager.listen("127.0.0.1:0", relay).await?;

    manager.dial(&relay).await?;
    for number in 0..1000u32 {
        manager.send(&relay, &number.to_be_bytes()).await?;
    }
    let stats = manager.close_connection(&relay, Duration::from_secs(5)).await?;
    println!("sent to the relay at {relay}: {} accepted, {} settled", stats.accepted, stats.settled);

    // Listeners first, then connections: what the relay has taken, it forwards.
    let report = manager.shutdown(Duration::from_secs(5)).await;
    for (address, listener) in &report.listeners {
        println!("{address} has received {} messages", listener.received.messages);
    }
    for (address, connection) in &report.connections {
        println!("the connection to {address} has settled {} messages", connection.settled);
        assert_eq!((connection.settled, connection.failed), (1000, 0));
    }
    Ok(())
}
