//! TLS handshakes of accepted connections: how many at a time, how long each, and how a failed one ends.
//!
//! Each runs in its connection's own task. Whatever a stranger does in one, accepting goes on.

use std::future::poll_fn;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use crate::door::{Crowd, FromOne, Full};
use crate::handler::Ended;
use crate::shared_outbox::{Phase, SharedOutbox};
use crate::socket::part;
use crate::transport::{PeerAddress, TlsServer, Transport};

/// One address may have so large a part of the handshakes under way: then it takes as many to keep others out.
const PART_OF_ONE: usize = 4;

/// Where connections become secure, a bounded number at a time.
#[derive(Debug)]
pub(crate) struct Gate {
    tls: TlsServer,
    deadline: Duration,
    under_way: Crowd,
}

impl Gate {
    pub(crate) fn new(tls: TlsServer, deadline: Duration, most: usize) -> Gate {
        Gate { tls, deadline, under_way: places(most) }
    }

    /// A handshake with this peer, unless too many are under way.
    pub(crate) fn enter(self: &Arc<Self>, peer: &PeerAddress) -> Result<Handshake, Full> {
        self.under_way.enter(peer)?;
        Ok(Handshake { gate: Arc::clone(self), peer: peer.clone() })
    }
}

fn places(most: usize) -> Crowd {
    Crowd::new(most, FromOne { most: Some(most.div_ceil(PART_OF_ONE)), counts_loopback: false })
}

/// A handshake to be made.
#[derive(Debug)]
pub(crate) struct Handshake {
    gate: Arc<Gate>,
    peer: PeerAddress,
}

impl Drop for Handshake {
    fn drop(&mut self) {
        self.gate.under_way.leave(&self.peer);
    }
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
        part(&mut io, outbox, true).await;
        Err(Ended::Handshake(why))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_address_has_a_quarter_of_the_handshakes_under_way_at_most_and_this_machine_any() {
        let peer = |host: &str| PeerAddress::Tcp(format!("{host}:7").parse().unwrap());
        let places = places(8);
        for _ in 0..2 {
            assert_eq!(places.enter(&peer("192.0.2.1")), Ok(()));
        }
        assert_eq!(places.enter(&peer("192.0.2.1")), Err(Full::FromOne(2)));
        for _ in 0..6 {
            assert_eq!(places.enter(&peer("127.0.0.1")), Ok(()));
        }
        assert_eq!(places.enter(&peer("192.0.2.2")), Err(Full::InAll(8)));
    }
}
