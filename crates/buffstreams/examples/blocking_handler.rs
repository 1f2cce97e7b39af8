//! A handler that blocks, here by writing to a file: it runs on a thread where it may, and its connection waits for it.
//!
//! `cargo run -p buffstreams --example blocking_handler`

use std::fs::File;
use std::io::Write;
use std::sync::Mutex;
use std::time::Duration;

use buffstreams::{Connection, Listener, Peer, blocking_handler};

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let path = std::env::temp_dir().join(format!("buffstreams-example-{}.log", std::process::id()));
    let file = Mutex::new(File::create(&path)?);
    let service = blocking_handler(move |message: &[u8], peer: &Peer| {
        let mut file = file.lock().map_err(|_| std::io::Error::other("another handler panicked"))?;
        writeln!(file, "{}: {}", peer.id(), String::from_utf8_lossy(message))?;
        file.sync_data()?;
        Ok(())
    });
    let server = Listener::bind("127.0.0.1:0").await?.spawn(service);

    let connection = Connection::dial(server.local_address()).await?;
    for line in ["written", "and on the disk", "before the next is read"] {
        connection.send(line.as_bytes()).await?;
    }
    connection.close(Duration::from_secs(5)).await?;
    // A handler that is at work is waited for.
    server.shutdown(Duration::from_secs(5)).await;

    let log = std::fs::read_to_string(&path)?;
    std::fs::remove_file(&path)?;
    print!("{log}");
    assert_eq!(log.lines().count(), 3);
    Ok(())
}
