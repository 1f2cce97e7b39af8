//! TLS handshakes of accepted connections: how many at a time, how long each, and how a failed one ends.
//!
//! Each runs in its connection's own task. Whatever a stranger does in one, accepting goes on.

use std::future::poll_fn;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use tokio::io::AsyncWriteExt;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::handler::Ended;
use crate::shared_outbox::{Phase, SharedOutbox};
use crate::socket::drain;
use crate::transport::{TlsServer, Transport};

/// Where connections become secure, a bounded number at a time.
#[derive(Debug)]
pub(crate) struct Gate {
    tls: TlsServer,
    deadline: Duration,
    room: Arc<Semaphore>,
}

impl Gate {
    pub(crate) fn new(tls: TlsServer) -> Gate {
        let (deadline, most) = tls.limits();
        Gate { tls, deadline, room: Arc::new(Semaphore::new(most.min(Semaphore::MAX_PERMITS))) }
    }

    /// `None` if too many are under way.
    pub(crate) fn enter(self: &Arc<Self>) -> Option<Handshake> {
        let room = Arc::clone(&self.room).try_acquire_owned().ok()?;
        Some(Handshake { gate: Arc::clone(self), _room: room })
    }
}

/// A handshake to be made.
#[derive(Debug)]
pub(crate) struct Handshake {
    gate: Arc<Gate>,
    _room: OwnedSemaphorePermit,
}

impl Handshake {
    /// Makes the connection secure; gives up at the deadline, and when the listener shuts down.
    pub(crate) async fn run(self, io: Transport, outbox: &SharedOutbox) -> Result<Transport, Ended> {
        let closing = poll_fn(|cx| match outbox.poll_phase(cx) {
            Phase::Open => Poll::Pending,
            _ => Poll::Ready(()),
        });
        let Gate { tls, deadline, .. } = &*self.gate;
        let in_time = tokio::time::timeout(*deadline, tls.accept(io));
        let (why, mut io) = tokio::select! {
            () = closing => return Err(Ended::ShutDown),
            accepted = in_time => match accepted {
                Ok(Ok(io)) => return Ok(io),
                Ok(Err(failed)) => failed,
                Err(_) => return Err(Ended::HandshakeDeadline(*deadline)),
            },
        };
        // Closed with something unread, the socket would take the alert back that tells the peer why.
        if io.shutdown().await.is_ok() {
            drain(&mut io).await;
        }
        Err(Ended::Handshake(why))
    }
}
