//! What `listen --echo` sends back: every message, in order, on the connection that it came on.
//!
//! A reply for which there is no room is kept, with those that come in the same turn, and nothing more is read until they
//! have gone: no reply is left out, and the sender feels it when nobody reads them.

use std::fmt;
use std::task::{Context, Poll, ready};

use buffstreams::{Error, ErrorKind, HandlerResult, Message, Peer, Refused, Sender};
use bytes::Bytes;
use futures_util::future::{BoxFuture, FutureExt};

pub(crate) struct Echo {
    sender: Sender,
    /// There was no room for these.
    kept: Vec<Bytes>,
    /// Sends what was kept before.
    sending: Option<BoxFuture<'static, Result<(), Refused>>>,
}

impl fmt::Debug for Echo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Echo").field("kept", &self.kept.len()).finish_non_exhaustive()
    }
}

impl Echo {
    pub(crate) fn new(peer: &Peer) -> Echo {
        Echo { sender: peer.sender().clone(), kept: Vec::new(), sending: None }
    }

    /// Sends this back, now or before anything else is read.
    ///
    /// # Errors
    ///
    /// Nothing can be sent there any more.
    pub(crate) fn send(&mut self, message: &Message<'_>) -> Result<(), Error> {
        if self.kept.is_empty() && self.sending.is_none() {
            match self.sender.try_send(message) {
                Err(error) if error.kind() == ErrorKind::Full => {}
                sent => return sent.map(drop),
            }
        }
        self.kept.push(message.to_bytes());
        Ok(())
    }

    /// Whether nothing is kept.
    pub(crate) fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<HandlerResult> {
        loop {
            if let Some(sending) = &mut self.sending {
                let sent = ready!(sending.poll_unpin(cx));
                self.sending = None;
                sent.map_err(|refused| refused.error)?;
            }
            if self.kept.is_empty() {
                return Poll::Ready(Ok(()));
            }
            let (sender, kept) = (self.sender.clone(), std::mem::take(&mut self.kept));
            self.sending = Some(Box::pin(async move {
                for message in kept {
                    sender.send_bytes(message).await?;
                }
                Ok(())
            }));
        }
    }
}
