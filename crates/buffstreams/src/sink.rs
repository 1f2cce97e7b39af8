//! A connection as a `futures::Sink`: built on the sender, with room reserved before each message.

use std::fmt;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use futures_sink::Sink;
use tokio_util::sync::ReusableBoxFuture;

use crate::error::{Error, Result};
use crate::sender::Sender;

/// Sends `Bytes` over a connection, as a `futures::Sink`.
///
/// Ready means that room for the largest message is reserved, so nothing that was started is refused for want of room.
/// An item is flushed when the connection has accepted it, so `SinkExt::send` costs no round trip; closing the sink
/// waits until everything the connection accepted so far is settled or failed, and leaves the connection open.
pub struct MessageSink {
    sender: Sender,
    reserving: ReusableBoxFuture<'static, Result<()>>,
    closing: Option<ReusableBoxFuture<'static, Result<()>>>,
    room: Room,
}

#[derive(PartialEq, Eq)]
enum Room {
    None,
    Asked,
    Reserved,
}

impl MessageSink {
    pub(crate) fn new(sender: Sender) -> MessageSink {
        MessageSink { sender, reserving: ReusableBoxFuture::new(async { Ok(()) }), closing: None, room: Room::None }
    }

    fn give_back(&mut self) {
        if std::mem::replace(&mut self.room, Room::None) == Room::Reserved {
            self.sender.shared().unreserve_largest();
        }
    }
}

impl Drop for MessageSink {
    fn drop(&mut self) {
        self.give_back();
    }
}

impl fmt::Debug for MessageSink {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MessageSink").field("sender", &self.sender).finish_non_exhaustive()
    }
}

impl Sink<Bytes> for MessageSink {
    type Error = Error;

    fn poll_ready(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<()>> {
        if self.room == Room::None {
            let shared = std::sync::Arc::clone(self.sender.shared());
            self.reserving.set(async move { shared.reserve_largest().await });
            self.room = Room::Asked;
        }
        if self.room == Room::Asked {
            let result = ready!(self.reserving.poll(cx));
            self.room = if result.is_ok() { Room::Reserved } else { Room::None };
            return Poll::Ready(result);
        }
        Poll::Ready(Ok(()))
    }

    fn start_send(mut self: Pin<&mut Self>, message: Bytes) -> Result<()> {
        assert!(self.room == Room::Reserved, "a message may be started only when the sink was ready");
        self.sender.shared().send_promised(message)?;
        self.room = Room::None;
        Ok(())
    }

    fn poll_flush(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_close(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<()>> {
        self.give_back();
        let sender = self.sender.clone();
        let closing =
            self.closing.get_or_insert_with(|| ReusableBoxFuture::new(async move { sender.flush().await.map(|_| ()) }));
        closing.poll(cx)
    }
}
