//! Owned protobuf messages, of the crate `prost`.
//!
//! ```
//! # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! use std::time::Duration;
//! use buffstreams::{Connection, Listener, typed};
//!
//! #[derive(Clone, PartialEq, prost::Message)]
//! struct Trade {
//!     #[prost(uint64, tag = "1")]
//!     id: u64,
//!     #[prost(string, tag = "2")]
//!     symbol: String,
//! }
//!
//! let server = Listener::bind("127.0.0.1:0").await?.spawn(typed::prost::handler(|trade: Trade| {
//!     println!("{} of {}", trade.id, trade.symbol);
//!     Ok(())
//! }));
//!
//! let connection = Connection::dial(server.local_address()).await?;
//! connection.send_prost(&Trade { id: 1, symbol: "RUST".into() }).await?;
//! connection.close(Duration::from_secs(5)).await?;
//! assert_eq!(server.shutdown(Duration::from_secs(5)).await.received.handler_errors, 0);
//! # Ok(()) }
//! ```

use std::fmt;
use std::marker::PhantomData;

use bytes::Buf;
use prost::Message;

use super::DecodeError;
use crate::error::Result;
use crate::handler::{Handler, HandlerResult, Peer, PerConnection};
use crate::sender::{Receipt, Sender};

/// Decodes a message: from `&[u8]`, or from `Bytes`, whose memory fields of type `Bytes` then share.
///
/// For a handler of one's own; `?` turns the error into the handler's.
///
/// ```
/// use buffstreams::{Bytes, Peer, async_handler, typed};
/// # #[derive(Clone, PartialEq, prost::Message)]
/// # struct Trade { #[prost(uint64, tag = "1")] id: u64 }
///
/// let service = async_handler(|message: Bytes, _peer: Peer| async move {
///     let trade: Trade = typed::prost::decode(message)?;
///     println!("{}", trade.id);
///     Ok(())
/// });
/// # let _ = service;
/// ```
///
/// # Errors
///
/// The bytes are not a message of this type.
pub fn decode<M: Message + Default>(message: impl Buf) -> Result<M, DecodeError> {
    let length = message.remaining();
    M::decode(message).map_err(|error| DecodeError::new::<M>(length, error))
}

/// A service that decodes every message and gives it to a closure, which all connections share.
///
/// It is itself a closure over `&[u8]`, so it fits wherever one does.
pub fn handler<M>(
    work: impl Fn(M) -> HandlerResult + Send + Sync + 'static,
) -> impl Fn(&[u8]) -> HandlerResult + Send + Sync + 'static
where
    M: Message + Default + 'static,
{
    move |message: &[u8]| work(decode(message)?)
}

/// A service that makes a closure for every connection, and gives it that connection's messages: for state, or replies.
///
/// ```
/// use buffstreams::{Peer, typed};
/// # #[derive(Clone, PartialEq, prost::Message)]
/// # struct Trade { #[prost(uint64, tag = "1")] id: u64 }
///
/// let service = typed::prost::per_connection(|peer: &Peer| {
///     let peer = peer.clone();
///     let mut highest = 0;
///     move |trade: Trade| {
///         highest = highest.max(trade.id);
///         peer.sender().try_send_prost(&Trade { id: highest })?;
///         Ok(())
///     }
/// });
/// # let _: &dyn std::any::Any = &service;
/// ```
pub fn per_connection<M, W>(
    make: impl Fn(&Peer) -> W + Send + Sync + 'static,
) -> PerConnection<impl Fn(&Peer) -> Decoded<M, W> + Send + Sync + 'static>
where
    M: Message + Default + 'static,
    W: FnMut(M) -> HandlerResult + Send + 'static,
{
    crate::per_connection(move |peer: &Peer| Decoded { work: make(peer), message: PhantomData })
}

/// The handler of [`per_connection`].
#[must_use = "a service does nothing until a listener or a connection is given it"]
pub struct Decoded<M, W> {
    work: W,
    message: PhantomData<fn(M)>,
}

impl<M, W> fmt::Debug for Decoded<M, W> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Decoded").finish_non_exhaustive()
    }
}

impl<M, W> Handler for Decoded<M, W>
where
    M: Message + Default + 'static,
    W: FnMut(M) -> HandlerResult + Send + 'static,
{
    fn message(&mut self, message: crate::Message<'_>) -> HandlerResult {
        (self.work)(decode(message.as_slice())?)
    }
}

// `encode_raw` is what `encode` calls after computing the length and the room, which are known here, once more.

impl Sender {
    /// Sends a protobuf message (feature `prost`), encoded straight into the buffer that will be written.
    ///
    /// # Errors
    ///
    /// As [`send`](Sender::send).
    ///
    /// # Panics
    ///
    /// If the message is encoded to another length than it says; those that prost derives are not.
    ///
    /// # Cancel safety
    ///
    /// As [`send`](Sender::send).
    pub async fn send_prost(&self, message: &impl Message) -> Result<Receipt> {
        self.send_with(message.encoded_len(), |buffer| message.encode_raw(buffer)).await
    }

    /// Sends a protobuf message (feature `prost`) if there is room at once: for replies in a handler.
    ///
    /// # Errors
    ///
    /// As [`try_send`](Sender::try_send).
    ///
    /// # Panics
    ///
    /// As [`send_prost`](Sender::send_prost).
    pub fn try_send_prost(&self, message: &impl Message) -> Result<Receipt> {
        self.try_send_with(message.encoded_len(), |buffer| message.encode_raw(buffer))
    }
}

impl crate::blocking::Sender {
    /// Sends a protobuf message (feature `prost`), encoded straight into the buffer that will be written.
    ///
    /// # Errors
    ///
    /// As [`send`](Self::send).
    ///
    /// # Panics
    ///
    /// As the async [`send_prost`](Sender::send_prost).
    pub fn send_prost(&self, message: &impl Message) -> Result<Receipt> {
        self.send_with(message.encoded_len(), |buffer| message.encode_raw(buffer))
    }

    /// Sends a protobuf message (feature `prost`) if there is room at once. It never waits.
    ///
    /// # Errors
    ///
    /// As [`try_send`](Self::try_send).
    ///
    /// # Panics
    ///
    /// As the async [`send_prost`](Sender::send_prost).
    pub fn try_send_prost(&self, message: &impl Message) -> Result<Receipt> {
        self.beneath().try_send_prost(message)
    }
}
