//! An async handler: it owns its message, may wait, and up to eight of each connection are in work at a time.
//!
//! `cargo run -p buffstreams --example async_handler`

use std::time::{Duration, Instant};

use buffstreams::{Bytes, Connection, Listener, Peer, async_handler, messages};

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let service = async_handler(|message: Bytes, peer: Peer| async move {
        // A question to somebody else, say.
        tokio::time::sleep(Duration::from_millis(20)).await;
        peer.sender().send(&message).await?;
        Ok(())
    });
    let server = Listener::bind("127.0.0.1:0").await?.spawn(service.concurrency(8));

    let (service, mut answers) = messages();
    let connection = Connection::builder().handler(service).dial(server.local_address()).await?;
    let begun = Instant::now();
    for number in 0..80u8 {
        connection.send(&[number]).await?;
    }
    let mut answered = Vec::new();
    while answered.len() < 80 {
        let (answer, _) = answers.recv().await.ok_or("the connection has ended")?;
        answered.push(answer[0]);
    }
    println!("80 answers that take 20 ms each came within {:?}", begun.elapsed());
    answered.sort();
    assert!(answered.into_iter().eq(0..80));

    connection.close(Duration::from_secs(5)).await?;
    server.shutdown(Duration::from_secs(5)).await;
    Ok(())
}
