//! Streams length-prefixed messages, Protocol Buffers or any bytes, over TCP and Unix sockets.
//!
//! The boring and dangerous parts are in here: framing, batching, back-pressure, reconnecting, retrying, draining, limits,
//! and an account of every message. You bring bytes and a callback.
//!
//! ```
//! # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! use std::time::Duration;
//! use buffstreams::{Connection, Listener};
//!
//! // Receive: each message is lent to the closure, without a copy.
//! let listener = Listener::bind("127.0.0.1:0").await?;
//! let server = listener.spawn(|message: &[u8]| {
//!     println!("received {} bytes", message.len());
//!     Ok(())
//! });
//!
//! // Send: returns when the message is accepted into bounded memory. Batches form by themselves.
//! let connection = Connection::dial(server.local_address()).await?;
//! connection.send(b"hello").await?;
//! connection.flush().await?; // everything accepted so far is settled, or failed
//! let stats = connection.close(Duration::from_secs(5)).await?;
//! assert_eq!(stats.accepted, stats.settled + stats.failed);
//!
//! let report = server.shutdown(Duration::from_secs(5)).await;
//! assert_eq!(report.received.messages, 1);
//! # Ok(()) }
//! ```
//!
//! # Two straight lines
//!
//! ```text
//! receive:  socket -> worker's scratch buffer -> Inbox (finds frames) -> Handler (messages lent as &[u8])
//! send:     send(&[u8]) -> Outbox (encodes into the tail chunk) -> writer -> socket
//! ```
//!
//! # Words
//!
//! A *message* is your bytes; a *frame* is prefix and message, as on the wire. A message is *accepted* when `send` returns
//! `Ok`: from then on the library has charge of it. It is *settled* when the kernel took its whole frame, or *failed* when the
//! library gave it up: then it goes back to you, with a reason. At every moment, for every connection,
//! `recovered + accepted = settled + failed + in flight`; see [`Stats`].
//!
//! # What is promised, and what is not
//!
//! Messages of one connection arrive in the order of their acceptance. A lost peer is dialled again, as [`Retry`] says, and
//! what is not settled is sent again. Memory is bounded: by [`ConnectionBuilder::memory`] on the way out, by
//! [`ListenerBuilder::receive_memory`], [`ListenerBuilder::session_memory`] and one read for each connection on the way in;
//! and at most 16 MiB of used buffers are kept for all of them together.
//!
//! **Settled is not received**, unless the connection was dialled with [`Delivery::Acked`]. When a connection breaks, bytes that the kernel had taken may be lost on their way or in the
//! peer's buffers, and nobody learns of it. A frame that was half taken is sent again from its start, on the next connection;
//! so nothing arrives torn, and nothing twice. Whoever needs to know that a message was handled asks for [`Delivery::Acked`]:
//! then it is settled when the receiver's handler has returned `Ok` and the receiver has said so, and what is not is sent again
//! on the next connection; handled at least once, and at most once while the receiver lives.
//!
//! # Where to go from here
//!
//! | you want | look at |
//! |---|---|
//! | state for each connection, replies | [`per_connection`], [`Handler`], [`Peer::sender`] |
//! | to await, or to block, in a handler | [`async_handler`], [`blocking_handler`] |
//! | a `Stream` of messages, or `recv()` | [`messages`] |
//! | a `Sink` | [`Connection::sink`] |
//! | what the other side sends back | [`ConnectionBuilder::handler`] |
//! | to know that messages were handled | [`Delivery::Acked`], [`HandlerError::rejected`], [`Message::number`] |
//! | messages that outlive the process | the feature `spool`, and `Spool` |
//! | TLS, and to know who the other side is | the feature `tls` (by ring), or `tls-aws-lc` (by AWS-LC, also where both are on): `TlsServer`, `TlsClient`; [`Peer::identity`] |
//! | to limit what strangers may have | [the table](ListenerBuilder#limits), [`MemoryBudget`], [`ReceivedStats`] |
//! | to stop in good order | [`Server::shutdown`], [`ShutdownReport`], [`Connection::close`] |
//! | several receivers: one after the other, or all at once | [`Endpoints`], [`ConnectionBuilder::dial_spread`] |
//! | failed messages | [`ConnectionBuilder::on_failed`], [`ConnectionBuilder::failed_to`] |
//! | to watch what happens to a connection, or to those of a server | [`Connection::events`], [`Stats`]; [`Server::events`], [`ReceivedStats`] |
//! | numbers for Prometheus and its like | the feature `metrics`: `buffstreams::metrics` has the table of names |
//! | another wire format | [`Prefix`], [`Framing`] |
//! | listeners and connections by address | [`Manager`] |
//! | no async runtime of your own | [`blocking`] |
//! | typed messages | the features `prost` and `buffa`, module `typed` |
//! | only the framing, as a tokio codec | the feature `codec` and [`Framing`] |
//! | to read somebody else's connection along | the feature `dissect`, and `Dissector` |
//! | your own streams | [`ConnectionBuilder::from_io`], [`ListenerBuilder::serve_io`]; many of them: [`Host`] |
//!
//! # Runtime
//!
//! The library runs on tokio, with one worker or many, and starts one task for each open socket. Callbacks run on those
//! tasks. If the runtime is dropped, messages in hand fail and go to their owner. A panic in a handler ends its connection
//! and nothing else; in a program built with `panic = "abort"` it ends the program, as everywhere.
//!
//! Events worth a log line (connected, lost, retried, refused) are `tracing` events, never one per message, and at a bounded
//! rate where a stranger can provoke them: a burst of 20, then 20 a second, with a count of those left out. The task of a
//! connection runs in a span of level INFO, so that all that is logged there, by your handlers too, tells which it is:
//! `connection{name, peer, id, stream}`. The name is given by [`ListenerBuilder::name`] or [`ConnectionBuilder::name`], the id is
//! [`Peer::id`] (only on the side that listens), and the stream is that of acknowledged messages.

mod proto;

mod async_handler;
pub mod blocking;
mod blocking_handler;
#[cfg(feature = "codec")]
mod codec;
mod connection;
mod dialer;
mod door;
mod error;
mod events;
mod failed;
mod handler;
mod handshake;
mod host;
mod house;
mod listener;
mod log;
mod manager;
mod memory;
#[cfg(feature = "metrics")]
pub mod metrics;
#[cfg(not(feature = "metrics"))]
#[path = "without_metrics.rs"]
mod metrics;
#[cfg_attr(not(feature = "rate-limit"), path = "without_pace.rs")]
mod pace;
mod reader;
mod retry;
mod route;
mod sender;
mod session;
mod shared_outbox;
mod sink;
mod socket;
#[cfg(feature = "spool")]
mod spool;
mod spread;
mod stats;
mod stream;
mod transport;
#[cfg(any(feature = "buffa", feature = "prost"))]
pub mod typed;
mod writer;

pub use bytes::Bytes;

pub use async_handler::{AsyncHandler, AsyncService, async_handler};
pub use blocking_handler::{BlockingHandler, BlockingService, blocking_handler};
pub use connection::{Connection, ConnectionBuilder, Delivery};
pub use dialer::State;
pub use error::{Error, ErrorKind, Refused, Result};
pub use events::{Event, Events, ServerEvent, ServerEvents};
pub use handler::{
    Discard, Ended, Handler, HandlerError, HandlerResult, Peer, PerConnection, Service, Shared, per_connection,
};
pub use host::Host;
pub use ipnet::IpNet;
pub use listener::{Listener, ListenerBuilder, OnHandlerError, Server, ShutdownReport, Stopper};
pub use manager::{Manager, ManagerReport};
pub use memory::MemoryBudget;
#[cfg(feature = "dissect")]
pub use proto::dissect::{ControlFrame, Direction, DissectError, Dissected, Dissector};
pub use proto::framing::{
    DEFAULT_MAX_MESSAGE_SIZE, FrameError, Framing, FramingError, Prefix, PrefixBytes, PrefixFault,
};
pub use proto::inbox::Message;
pub use proto::outbox::{FailedMessage, FailedReason, Rejection};
pub use proto::session::wire::StreamId;
pub use retry::{Backoff, Retry};
pub use sender::{Flushed, Receipt, Sender};
pub use shared_outbox::Overflow;
pub use sink::MessageSink;
#[cfg(feature = "spool")]
pub use spool::{Spool, SpoolBuilder, SpoolDamage, SpooledConnection, SpooledFailure};
pub use spread::Spread;
pub use stats::{ReceivedStats, Stats};
pub use stream::{Messages, MessagesHandler, MessagesService, messages};
pub use transport::{Address, Endpoints, PeerAddress, PeerIdentity};
#[cfg(feature = "__tls")]
pub use transport::{TlsClient, TlsServer};

/// The code in the README compiles.
#[cfg(doctest)]
#[doc = include_str!("../../../README.md")]
struct Readme;
