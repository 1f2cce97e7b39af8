//! Messages as a stream: pulled when there is time for them, from all connections of a listener.
//!
//! `cargo run -p buffstreams --example messages`

use std::time::Duration;

use buffstreams::{Connection, Listener, messages};

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let (service, mut received) = messages();
    let server = Listener::bind("127.0.0.1:0").await?.spawn(service);

    let address = server.local_address().clone();
    let senders = (0..3).map(|sender| {
        let address = address.clone();
        tokio::spawn(async move {
            let connection = Connection::dial(address).await?;
            for number in 0..10 {
                connection.send(format!("message {number} of sender {sender}").as_bytes()).await?;
            }
            connection.close(Duration::from_secs(5)).await
        })
    });
    let senders: Vec<_> = senders.collect();

    for _ in 0..30 {
        let (message, peer) = received.recv().await.ok_or("the listener has ended")?;
        println!("{}: {}", peer.address(), String::from_utf8_lossy(&message));
    }
    for sender in senders {
        sender.await??;
    }
    server.shutdown(Duration::from_secs(5)).await;
    // When no more can come, the stream ends.
    assert!(received.recv().await.is_none());
    Ok(())
}
