//! Views of protobuf messages, of the crate `buffa`: strings and bytes are lent from where they were received.
//!
//! Receiving allocates nothing for a message of scalars, strings and bytes. Repeated and map fields take a vector each,
//! nested messages a box, and unknown fields, if the generated code keeps them, a vector.
//!
//! ```
//! # mod market { include!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/trade/market.rs")); }
//! # use market::{Trade, TradeView};
//! # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! use std::time::Duration;
//! use buffstreams::{Connection, Listener, typed};
//!
//! let server = Listener::bind("127.0.0.1:0").await?.spawn(typed::buffa::handler::<Trade>(|trade: TradeView<'_>| {
//!     println!("{} of {}", trade.id, trade.symbol);
//!     Ok(())
//! }));
//!
//! let connection = Connection::dial(server.local_address()).await?;
//! connection.send_buffa(&Trade { id: 1, symbol: "RUST".into(), ..Trade::default() }).await?;
//! // A view over what is at hand needs no owned strings to be sent.
//! connection.send_buffa_view(&TradeView { id: 2, symbol: "RUST", ..TradeView::default() }).await?;
//! connection.close(Duration::from_secs(5)).await?;
//! assert_eq!(server.shutdown(Duration::from_secs(5)).await.received.handler_errors, 0);
//! # Ok(()) }
//! ```

use std::fmt;
use std::marker::PhantomData;

use buffa::{HasMessageView, Message, SizeCache, ViewEncode, checked_encode_size};

use super::DecodeError;
use crate::error::{Error, ErrorKind, Result};
use crate::handler::{Handler, HandlerResult, Peer, PerConnection};
use crate::sender::{Receipt, Sender};

/// Decodes a message to a view over its bytes.
///
/// For a handler of one's own; `?` turns the error into the handler's.
///
/// ```
/// # mod market { include!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/trade/market.rs")); }
/// # use market::Trade;
/// use buffstreams::{Bytes, Peer, async_handler, typed};
///
/// let service = async_handler(|message: Bytes, _peer: Peer| async move {
///     let trade = typed::buffa::decode::<Trade>(&message)?;
///     println!("{}", trade.symbol);
///     Ok(())
/// });
/// # let _ = service;
/// ```
///
/// # Errors
///
/// The bytes are not a message of this type, or exceed one of buffa's limits on depth and memory.
pub fn decode<M: HasMessageView>(message: &[u8]) -> Result<M::View<'_>, DecodeError> {
    M::decode_view(message).map_err(|error| DecodeError::new::<M>(message.len(), error))
}

/// A service that decodes every message and lends the view to a closure, which all connections share.
///
/// It is itself a closure over `&[u8]`, so it fits wherever one does.
pub fn handler<M>(
    work: impl Fn(M::View<'_>) -> HandlerResult + Send + Sync + 'static,
) -> impl Fn(&[u8]) -> HandlerResult + Send + Sync + 'static
where
    M: HasMessageView + 'static,
{
    move |message: &[u8]| work(decode::<M>(message)?)
}

/// A service that makes a closure for every connection, and lends it that connection's messages: for state, or replies.
///
/// ```
/// # mod market { include!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/trade/market.rs")); }
/// # use market::{Trade, TradeView};
/// use buffstreams::{Peer, typed};
///
/// let service = typed::buffa::per_connection::<Trade, _>(|peer: &Peer| {
///     let peer = peer.clone();
///     let mut highest = 0;
///     move |trade: TradeView<'_>| {
///         highest = highest.max(trade.id);
///         peer.sender().try_send_buffa_view(&TradeView { id: highest, ..trade })?;
///         Ok(())
///     }
/// });
/// # let _: &dyn std::any::Any = &service;
/// ```
pub fn per_connection<M, W>(
    make: impl Fn(&Peer) -> W + Send + Sync + 'static,
) -> PerConnection<impl Fn(&Peer) -> Decoded<M, W> + Send + Sync + 'static>
where
    M: HasMessageView + 'static,
    W: FnMut(M::View<'_>) -> HandlerResult + Send + 'static,
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
    M: HasMessageView + 'static,
    W: FnMut(M::View<'_>) -> HandlerResult + Send + 'static,
{
    fn message(&mut self, message: crate::Message<'_>) -> HandlerResult {
        (self.work)(decode::<M>(message.as_slice())?)
    }
}

/// The length of a message, and the lengths inside it that encoding will need.
fn measure(compute: impl FnOnce(&mut SizeCache) -> u32) -> Result<(usize, SizeCache)> {
    let mut sizes = SizeCache::new();
    let length = checked_encode_size(compute(&mut sizes)).map_err(|error| {
        let text = format!("the message cannot be encoded: {error}");
        Error::new(ErrorKind::TooLarge, text).because(error)
    })?;
    Ok((length as usize, sizes))
}

impl Sender {
    /// Sends a protobuf message (feature `buffa`), encoded straight into the buffer that will be written.
    ///
    /// # Errors
    ///
    /// As [`send`](Sender::send).
    ///
    /// # Panics
    ///
    /// If the message is encoded to another length than it says; those that buffa generates are not.
    ///
    /// # Cancel safety
    ///
    /// As [`send`](Sender::send).
    pub async fn send_buffa(&self, message: &impl Message) -> Result<Receipt> {
        let (length, mut sizes) = measure(|sizes| message.compute_size(sizes))?;
        self.send_with(length, |buffer| message.write_to(&mut sizes, buffer)).await
    }

    /// Sends a protobuf message (feature `buffa`) if there is room at once: for replies in a handler.
    ///
    /// # Errors
    ///
    /// As [`try_send`](Sender::try_send).
    ///
    /// # Panics
    ///
    /// As [`send_buffa`](Sender::send_buffa).
    pub fn try_send_buffa(&self, message: &impl Message) -> Result<Receipt> {
        let (length, mut sizes) = measure(|sizes| message.compute_size(sizes))?;
        self.try_send_with(length, |buffer| message.write_to(&mut sizes, buffer))
    }

    /// Sends a view (feature `buffa`): one that was received, or one over what is at hand.
    ///
    /// # Errors
    ///
    /// As [`send`](Sender::send).
    ///
    /// # Panics
    ///
    /// As [`send_buffa`](Sender::send_buffa).
    ///
    /// # Cancel safety
    ///
    /// As [`send`](Sender::send).
    pub async fn send_buffa_view<'v>(&self, view: &impl ViewEncode<'v>) -> Result<Receipt> {
        let (length, mut sizes) = measure(|sizes| view.compute_size(sizes))?;
        self.send_with(length, |buffer| view.write_to(&mut sizes, buffer)).await
    }

    /// Sends a view (feature `buffa`) if there is room at once: for replies in a handler.
    ///
    /// # Errors
    ///
    /// As [`try_send`](Sender::try_send).
    ///
    /// # Panics
    ///
    /// As [`send_buffa`](Sender::send_buffa).
    pub fn try_send_buffa_view<'v>(&self, view: &impl ViewEncode<'v>) -> Result<Receipt> {
        let (length, mut sizes) = measure(|sizes| view.compute_size(sizes))?;
        self.try_send_with(length, |buffer| view.write_to(&mut sizes, buffer))
    }
}

impl crate::blocking::Sender {
    /// Sends a protobuf message (feature `buffa`), encoded straight into the buffer that will be written.
    ///
    /// # Errors
    ///
    /// As [`send`](Self::send).
    ///
    /// # Panics
    ///
    /// As the async [`send_buffa`](Sender::send_buffa).
    pub fn send_buffa(&self, message: &impl Message) -> Result<Receipt> {
        let (length, mut sizes) = measure(|sizes| message.compute_size(sizes))?;
        self.send_with(length, |buffer| message.write_to(&mut sizes, buffer))
    }

    /// Sends a protobuf message (feature `buffa`) if there is room at once. It never waits.
    ///
    /// # Errors
    ///
    /// As [`try_send`](Self::try_send).
    ///
    /// # Panics
    ///
    /// As the async [`send_buffa`](Sender::send_buffa).
    pub fn try_send_buffa(&self, message: &impl Message) -> Result<Receipt> {
        self.beneath().try_send_buffa(message)
    }

    /// Sends a view (feature `buffa`): one that was received, or one over what is at hand.
    ///
    /// # Errors
    ///
    /// As [`send`](Self::send).
    ///
    /// # Panics
    ///
    /// As the async [`send_buffa`](Sender::send_buffa).
    pub fn send_buffa_view<'v>(&self, view: &impl ViewEncode<'v>) -> Result<Receipt> {
        let (length, mut sizes) = measure(|sizes| view.compute_size(sizes))?;
        self.send_with(length, |buffer| view.write_to(&mut sizes, buffer))
    }

    /// Sends a view (feature `buffa`) if there is room at once. It never waits.
    ///
    /// # Errors
    ///
    /// As [`try_send`](Self::try_send).
    ///
    /// # Panics
    ///
    /// As the async [`send_buffa`](Sender::send_buffa).
    pub fn try_send_buffa_view<'v>(&self, view: &impl ViewEncode<'v>) -> Result<Receipt> {
        self.beneath().try_send_buffa_view(view)
    }
}
