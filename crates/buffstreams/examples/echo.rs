//! A handler of one's own: made for every connection, with state and replies.
//!
//! `cargo run -p buffstreams --example echo`

use std::time::Duration;

use buffstreams::{Connection, Ended, Handler, HandlerResult, Listener, Message, Peer, messages, per_connection};

/// Sends every message back, with its number on the connection before it.
struct Echo {
    peer: Peer,
    count: u32,
}

impl Handler for Echo {
    fn message(&mut self, message: Message<'_>) -> HandlerResult {
        self.count += 1;
        let reply = [&self.count.to_be_bytes()[..], &message].concat();
        self.peer.sender().try_send(&reply)?;
        Ok(())
    }

    fn ended(&mut self, why: &Ended) {
        println!("echoed {} messages to {}: {why}", self.count, self.peer.address());
    }
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let service = per_connection(|peer: &Peer| Echo { peer: peer.clone(), count: 0 });
    let server = Listener::bind("127.0.0.1:0").await?.spawn(service);

    let (service, mut answers) = messages();
    let connection = Connection::builder().handler(service).dial(server.local_address()).await?;
    for word in ["one", "two", "three"] {
        connection.send(word.as_bytes()).await?;
        let (answer, _) = answers.recv().await.ok_or("the connection has ended")?;
        let (number, echo) = answer.split_at(4);
        println!("{} {}", u32::from_be_bytes(number.try_into()?), String::from_utf8_lossy(echo));
        assert_eq!(echo, word.as_bytes());
    }
    connection.close(Duration::from_secs(5)).await?;
    server.shutdown(Duration::from_secs(5)).await;
    Ok(())
}
