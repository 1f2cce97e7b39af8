//! Streams length-prefixed messages over TCP.

mod proto;

mod connection;
mod dialer;
mod error;
mod failed;
mod handler;
mod listener;
mod log;
mod reader;
mod retry;
mod sender;
mod sink;
mod socket;
mod stats;
mod stream;
mod transport;
mod writer;

pub use bytes::Bytes;

pub use connection::{Connection, ConnectionBuilder, State};
pub use error::{Error, ErrorKind, Refused, Result};
pub use handler::{
    AsyncHandler, AsyncService, BlockingWork, Discard, Ended, Handler, HandlerError, HandlerResult, Peer,
    PerConnection, Service, Shared, async_handler, blocking_handler, per_connection,
};
pub use listener::{Listener, ListenerBuilder, OnHandlerError, Server, ShutdownReport, Stopper};
pub use proto::framing::{
    DEFAULT_MAX_MESSAGE_SIZE, FrameError, Framing, FramingError, Prefix, PrefixBytes, PrefixFault,
};
pub use proto::inbox::Message;
pub use proto::outbox::{FailedMessage, FailedReason};
pub use retry::{Backoff, Retry};
pub use sender::{Flushed, Overflow, Receipt, Sender};
pub use sink::MessageSink;
pub use stats::{ReceivedStats, Stats};
pub use stream::{Messages, MessagesHandler, MessagesService, messages};
pub use transport::{Address, PeerAddress};
