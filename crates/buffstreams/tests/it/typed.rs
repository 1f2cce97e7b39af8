//! Typed messages: both kinds, and one understands the other.
#![cfg(all(feature = "buffa", feature = "prost"))]

use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use buffstreams::{Bytes, Connection, Handler, HandlerResult, Listener, Message, Peer, async_handler, messages, typed};
use prost::Message as _;
use tokio::sync::mpsc;

use crate::support::{PATIENCE, in_time, until};

const ANYWHERE: &str = "127.0.0.1:0";

/// What buffa generates from `tests/trade/trade.proto`.
mod market {
    #![allow(clippy::all, elided_lifetimes_in_paths, missing_debug_implementations, unreachable_pub, unused_imports)]
    include!("../trade/market.rs");
}

use market::{Trade as View, TradeView};

/// The same message, for prost.
#[derive(Clone, PartialEq, prost::Message)]
struct Trade {
    #[prost(uint64, tag = "1")]
    id: u64,
    #[prost(string, tag = "2")]
    symbol: String,
    #[prost(double, tag = "3")]
    price: f64,
    #[prost(sint64, tag = "4")]
    quantity: i64,
    #[prost(bytes = "bytes", tag = "5")]
    note: Bytes,
    #[prost(message, repeated, tag = "6")]
    fills: Vec<Fill>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Fill {
    #[prost(string, tag = "1")]
    venue: String,
    #[prost(sint64, tag = "2")]
    quantity: i64,
}

fn trade(id: u64) -> Trade {
    let fill = |quantity| Fill { venue: "a venue".into(), quantity };
    Trade {
        id,
        symbol: "RUST".into(),
        price: 101.25,
        quantity: -7,
        note: Bytes::from_static(b"\x00\xff"),
        fills: (0..id as i64 % 20).map(fill).collect(),
    }
}

fn view_of(trade: &Trade) -> View {
    let fill = |fill: &Fill| market::Fill { venue: fill.venue.clone(), quantity: fill.quantity, ..Default::default() };
    View {
        id: trade.id,
        symbol: trade.symbol.clone(),
        price: trade.price,
        quantity: trade.quantity,
        note: trade.note.to_vec(),
        fills: trade.fills.iter().map(fill).collect(),
        ..View::default()
    }
}

fn same(view: &TradeView<'_>, trade: &Trade) -> bool {
    view.id == trade.id
        && view.symbol == trade.symbol
        && view.price == trade.price
        && view.quantity == trade.quantity
        && view.note == trade.note
        && view
            .fills
            .iter()
            .map(|fill| (fill.venue, fill.quantity))
            .eq(trade.fills.iter().map(|fill| (fill.venue.as_str(), fill.quantity)))
}

#[tokio::test]
async fn prost_messages_arrive_as_they_were_sent() {
    let (got, mut gotten) = mpsc::unbounded_channel();
    let service = typed::prost::handler(move |trade: Trade| Ok(got.send(trade)?));
    let server = Listener::bind(ANYWHERE).await.unwrap().spawn(service);
    let connection = Connection::dial(server.local_address()).await.unwrap();
    connection.send_prost(&trade(0)).await.unwrap();
    connection.send_prost(&trade(9)).await.unwrap();
    connection.try_send_prost(&Trade::default()).unwrap();
    for expected in [trade(0), trade(9), Trade::default()] {
        assert_eq!(in_time("a trade", gotten.recv()).await.unwrap(), expected);
    }
    assert_eq!(server.stats().handler_errors, 0);
}

#[tokio::test]
async fn prost_messages_are_seen_as_buffa_views() {
    let seen = Arc::new(AtomicU64::new(0));
    let count = Arc::clone(&seen);
    let service = typed::buffa::handler::<View>(move |view| {
        assert!(same(&view, &trade(view.id)));
        count.fetch_add(1, Ordering::Relaxed);
        Ok(())
    });
    let server = Listener::bind(ANYWHERE).await.unwrap().spawn(service);
    let connection = Connection::dial(server.local_address()).await.unwrap();
    for id in 0..100 {
        connection.send_prost(&trade(id)).await.unwrap();
    }
    until("all are seen", || seen.load(Ordering::Relaxed) == 100).await;
    assert_eq!(server.stats().handler_errors, 0);
}

#[tokio::test]
async fn buffa_messages_and_views_are_received_as_prost_messages() {
    let (got, mut gotten) = mpsc::unbounded_channel();
    let service = typed::prost::handler(move |trade: Trade| Ok(got.send(trade)?));
    let server = Listener::bind(ANYWHERE).await.unwrap().spawn(service);
    let connection = Connection::dial(server.local_address()).await.unwrap();
    // With more fills than a `SizeCache` holds without allocating, too.
    for id in [0, 1, 19] {
        connection.send_buffa(&view_of(&trade(id))).await.unwrap();
        connection.try_send_buffa(&view_of(&trade(id))).unwrap();
        let bytes = trade(id).encode_to_vec();
        let view = typed::buffa::decode::<View>(&bytes).unwrap();
        connection.send_buffa_view(&view).await.unwrap();
        connection.try_send_buffa_view(&view).unwrap();
        for _ in 0..4 {
            assert_eq!(in_time("a trade", gotten.recv()).await.unwrap(), trade(id));
        }
    }
}

#[tokio::test]
async fn a_closure_for_each_connection_keeps_its_state_and_replies() {
    let with_prost = typed::prost::per_connection(|peer: &Peer| {
        let (peer, mut sum) = (peer.clone(), 0);
        move |trade: Trade| {
            sum += trade.id;
            peer.sender().try_send_prost(&Trade { id: sum, ..trade })?;
            Ok(())
        }
    });
    let with_buffa = typed::buffa::per_connection::<View, _>(|peer: &Peer| {
        let (peer, mut sum) = (peer.clone(), 0);
        move |view: TradeView<'_>| {
            sum += view.id;
            peer.sender().try_send_buffa_view(&TradeView { id: sum, ..view })?;
            Ok(())
        }
    });
    let with_prost = Listener::bind(ANYWHERE).await.unwrap().spawn(with_prost);
    let with_buffa = Listener::bind(ANYWHERE).await.unwrap().spawn(with_buffa);
    for server in [&with_prost, &with_buffa] {
        for _ in 0..2 {
            let (service, mut answers) = messages();
            let connection = Connection::builder().handler(service).dial(server.local_address()).await.unwrap();
            let mut sum = 0;
            for id in 1..=10 {
                connection.send_prost(&trade(id)).await.unwrap();
                sum += id;
                let (answer, _) = in_time("an answer", answers.recv()).await.unwrap();
                let answer: Trade = typed::prost::decode(answer).unwrap();
                assert_eq!(answer, Trade { id: sum, ..trade(id) });
            }
        }
    }
}

#[tokio::test]
async fn handlers_of_ones_own_decode_for_themselves() {
    struct Highest(Arc<Mutex<Vec<Trade>>>);
    impl Handler for Highest {
        fn message(&mut self, message: Message<'_>) -> HandlerResult {
            self.0.lock().unwrap().push(typed::prost::decode(message.as_slice())?);
            Ok(())
        }
    }
    let seen = Arc::new(Mutex::new(Vec::new()));
    let service = buffstreams::per_connection({
        let seen = Arc::clone(&seen);
        move |_: &Peer| Highest(Arc::clone(&seen))
    });
    let own = Listener::bind(ANYWHERE).await.unwrap().spawn(service);
    let service = async_handler({
        let seen = Arc::clone(&seen);
        move |message: Bytes, _| {
            let seen = Arc::clone(&seen);
            async move {
                // A message of `Bytes` shares its own memory fields.
                let here = message.as_ptr() as usize..message.as_ptr() as usize + message.len();
                let trade: Trade = typed::prost::decode(message)?;
                assert!(here.contains(&(trade.note.as_ptr() as usize)));
                seen.lock().unwrap().push(trade);
                Ok(())
            }
        }
    });
    let with_async = Listener::bind(ANYWHERE).await.unwrap().spawn(service);
    for server in [own, with_async] {
        let connection = Connection::dial(server.local_address()).await.unwrap();
        connection.send_prost(&trade(3)).await.unwrap();
        until("it is there", || server.stats().messages == 1).await;
        assert_eq!(in_time("a shutdown", server.shutdown(PATIENCE)).await.received.handler_errors, 0);
    }
    assert_eq!(*seen.lock().unwrap(), [trade(3), trade(3)]);
}

#[test]
fn an_error_names_the_type_that_was_expected() {
    let error = typed::prost::decode::<Trade>(&b"\xff"[..]).unwrap_err();
    assert!(error.type_name().ends_with("Trade"));
    let text = error.to_string();
    assert!(text.starts_with("a message of 1 bytes is not a ") && text.contains("typed::Trade: "), "{text}");
    let error = typed::buffa::decode::<View>(b"\xff").unwrap_err();
    let text = error.to_string();
    assert!(text.starts_with("a message of 1 bytes is not a ") && text.contains("market::Trade: "), "{text}");
    assert!(std::error::Error::source(&error).is_some());
}

#[tokio::test]
async fn bytes_that_are_no_such_message_are_the_handlers_error_and_the_connection_goes_on() {
    let with_prost = typed::prost::handler(|_: Trade| Ok(()));
    let with_buffa = typed::buffa::handler::<View>(|_| Ok(()));
    let listener = || async { Listener::bind(ANYWHERE).await.unwrap() };
    for server in [listener().await.spawn(with_prost), listener().await.spawn(with_buffa)] {
        let connection = Connection::dial(server.local_address()).await.unwrap();
        connection.send(b"\xff\xff\xff").await.unwrap();
        connection.send_prost(&trade(1)).await.unwrap();
        until("both are there", || server.stats().messages == 2).await;
        let report = in_time("a shutdown", server.shutdown(PATIENCE)).await;
        let received = report.received;
        assert_eq!((received.messages, received.handler_errors, received.broken), (2, 1, 0));
    }
}

#[test]
fn a_message_over_the_maximum_is_refused_and_takes_nothing() {
    let server = buffstreams::blocking::Listener::bind(ANYWHERE).unwrap().spawn(|_| Ok(()));
    let connection = buffstreams::blocking::Connection::dial(server.local_address()).unwrap();
    let large = Trade { symbol: "x".repeat(5000), ..trade(1) };
    for refused in [
        connection.send_prost(&large),
        connection.try_send_prost(&large),
        connection.send_buffa(&view_of(&large)),
        connection.send_buffa_view(&typed::buffa::decode::<View>(&large.encode_to_vec()).unwrap()),
    ] {
        assert_eq!(refused.unwrap_err().kind(), buffstreams::ErrorKind::TooLarge);
    }
    assert_eq!(connection.stats().accepted, 0);
}

#[test]
fn code_without_a_runtime_sends_and_receives_the_same() {
    use buffstreams::blocking::{Connection, Listener};

    let seen = Arc::new(Mutex::new(Vec::new()));
    let service = typed::prost::handler({
        let seen = Arc::clone(&seen);
        move |trade: Trade| {
            seen.lock().unwrap().push(trade);
            Ok(())
        }
    });
    let server = Listener::bind(ANYWHERE).unwrap().spawn(service);
    let connection = Connection::dial(server.local_address()).unwrap();
    connection.send_prost(&trade(1)).unwrap();
    connection.try_send_prost(&trade(2)).unwrap();
    connection.send_buffa(&view_of(&trade(3))).unwrap();
    connection.try_send_buffa(&view_of(&trade(4))).unwrap();
    let bytes = trade(5).encode_to_vec();
    let view = typed::buffa::decode::<View>(&bytes).unwrap();
    connection.send_buffa_view(&view).unwrap();
    connection.try_send_buffa_view(&view).unwrap();
    let begun = Instant::now();
    while seen.lock().unwrap().len() < 6 {
        assert!(begun.elapsed() < PATIENCE, "not in time: all are there");
        std::thread::yield_now();
    }
    assert!(seen.lock().unwrap().iter().eq(&[trade(1), trade(2), trade(3), trade(4), trade(5), trade(5)]));
}

/// A hundred thousand messages are sent, received and looked at on this one thread.
#[test]
fn sending_and_receiving_views_allocates_nothing_for_a_message() {
    const MESSAGES: u64 = 100_000;

    let seen = Arc::new(AtomicU64::new(0));
    let service = typed::buffa::handler::<View>({
        let seen = Arc::clone(&seen);
        move |view| {
            assert_eq!((view.symbol, view.note), ("RUST", &b"a note"[..]));
            seen.fetch_add(1, Ordering::Relaxed);
            Ok(())
        }
    });
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let (_server, connection) = runtime.block_on(async {
        let server = Listener::bind(ANYWHERE).await.unwrap().spawn(service);
        let connection = Connection::dial(server.local_address()).await.unwrap();
        (server, connection)
    });
    let counted = allocation_counter::measure(|| {
        runtime.block_on(async {
            for id in 0..MESSAGES {
                let view = TradeView { id, symbol: "RUST", note: b"a note", ..TradeView::default() };
                connection.send_buffa_view(&view).await.unwrap();
            }
            until("all are seen", || seen.load(Ordering::Relaxed) == MESSAGES).await;
        });
    });
    assert!(counted.count_total < MESSAGES / 100, "{counted:?}");
}

/// `UPDATE_GENERATED=1 cargo test -p buffstreams --all-features generated_code` writes it anew.
#[test]
fn the_generated_code_is_what_the_generator_makes_of_the_schema() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/trade");
    let made = tempfile::tempdir().unwrap();
    let descriptors = made.path().join("descriptors");
    let schema = protox::compile(["trade.proto"], [&folder]).unwrap();
    std::fs::write(&descriptors, schema.encode_to_vec()).unwrap();
    buffa_build::Config::new()
        .descriptor_set(&descriptors)
        .files(&["trade.proto"])
        .file_per_package(true)
        .out_dir(made.path())
        .compile()
        .unwrap();
    let made = std::fs::read_to_string(made.path().join("market.rs")).unwrap();
    let committed = folder.join("market.rs");
    if std::env::var_os("UPDATE_GENERATED").is_some() {
        std::fs::write(&committed, made).unwrap();
    } else {
        let stale = "it has changed: run this test once with UPDATE_GENERATED=1";
        assert!(std::fs::read_to_string(&committed).unwrap() == made, "{stale}");
    }
}
