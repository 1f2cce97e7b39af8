//! Protobuf messages instead of bytes: requests and answers of the crate `prost`.
//!
//! `cargo run -p buffstreams --features prost --example typed`

use std::time::Duration;

use buffstreams::{Connection, Listener, Peer, messages, typed};

#[derive(Clone, PartialEq, prost::Message)]
struct Order {
    #[prost(string, tag = "1")]
    symbol: String,
    #[prost(sint64, tag = "2")]
    quantity: i64,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Position {
    #[prost(sint64, tag = "1")]
    quantity: i64,
    #[prost(uint32, tag = "2")]
    orders: u32,
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    // Each connection has a position of its own.
    let service = typed::prost::per_connection(|peer: &Peer| {
        let peer = peer.clone();
        let mut position = Position::default();
        move |order: Order| {
            position.quantity += order.quantity;
            position.orders += 1;
            peer.sender().try_send_prost(&position)?;
            Ok(())
        }
    });
    let server = Listener::bind("127.0.0.1:0").await?.spawn(service);

    let (service, mut answers) = messages();
    let connection = Connection::builder().handler(service).dial(server.local_address()).await?;
    for quantity in [100, -30, -70] {
        connection.send_prost(&Order { symbol: "RUST".into(), quantity }).await?;
        let (answer, _) = answers.recv().await.ok_or("the connection has ended")?;
        let position: Position = typed::prost::decode(answer)?;
        println!("after {} orders the position is {}", position.orders, position.quantity);
    }

    // What is no order is an error of the handler, counted and logged; the connection goes on.
    connection.send(b"\xff").await?;
    connection.close(Duration::from_secs(5)).await?;
    let report = server.shutdown(Duration::from_secs(5)).await;
    assert_eq!((report.received.messages, report.received.handler_errors), (4, 1));
    Ok(())
}
