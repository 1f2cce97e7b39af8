//! TLS handshakes of accepted connections: how many at a time, how long each, and how a failed one ends.
//!
//! Each runs in its connection's own task. Whatever a stranger does in one, accepting goes on. Where all places are taken, who
//! has the most of them gives one up to who would have fewer.

use std::collections::HashMap;
use std::future::poll_fn;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::Poll;
use std::time::Duration;

use tokio::sync::oneshot;

use crate::door::{Full, Origin};
use crate::handler::Ended;
use crate::shared_outbox::{Phase, SharedOutbox};
use crate::socket::part;
use crate::transport::{PeerAddress, TlsServer, Transport};

/// One address may have so large a part of the handshakes under way: then it takes as many to fill all places.
const PART_OF_ONE: usize = 4;

/// Where connections become secure, a bounded number at a time.
#[derive(Debug)]
pub(crate) struct Gate {
    tls: TlsServer,
    deadline: Duration,
    places: Mutex<Places>,
}

impl Gate {
    pub(crate) fn new(tls: TlsServer, deadline: Duration, most: usize) -> Gate {
        Gate { tls, deadline, places: Mutex::new(Places::new(most)) }
    }

    /// A handshake with this peer, unless too many are under way.
    pub(crate) fn enter(self: &Arc<Self>, peer: &PeerAddress) -> Result<Handshake, Full> {
        let (number, displaced) = self.lock().enter(peer)?;
        Ok(Handshake { gate: Arc::clone(self), number, displaced })
    }

    fn lock(&self) -> MutexGuard<'_, Places> {
        self.places.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The handshakes under way, and whose they are.
#[derive(Debug)]
struct Places {
    most: usize,
    next: u64,
    /// From the oldest to the newest.
    taken: Vec<Place>,
}

#[derive(Debug)]
struct Place {
    number: u64,
    /// `None` for a peer without an address.
    origin: Option<Origin>,
    displace: oneshot::Sender<()>,
}

impl Places {
    fn new(most: usize) -> Places {
        Places { most, next: 0, taken: Vec::new() }
    }

    /// Takes a place, which must be [left](Self::leave). Whoever has it is told if another is to have it instead.
    fn enter(&mut self, peer: &PeerAddress) -> Result<(u64, oneshot::Receiver<()>), Full> {
        let origin = Origin::of_peer(peer);
        let with_this = 1 + self.taken.iter().filter(|place| place.origin == origin).count();
        let part = self.most.div_ceil(PART_OF_ONE);
        let is_of_this_machine = !matches!(peer, PeerAddress::Tcp(address) if !address.ip().is_loopback());
        if with_this > part && !is_of_this_machine {
            return Err(Full::FromOne(part));
        }
        if self.taken.len() >= self.most {
            let oldest = self.oldest_of_the_most(with_this).ok_or(Full::InAll(self.most))?;
            // It may have finished at this very moment, and then does not mind.
            let _ = self.taken.remove(oldest).displace.send(());
        }
        let (displace, displaced) = oneshot::channel();
        let number = self.next;
        self.next += 1;
        self.taken.push(Place { number, origin, displace });
        Ok((number, displaced))
    }

    /// Where the oldest handshake is of the origin that has the most of them, if those are more than so many.
    fn oldest_of_the_most(&self, than: usize) -> Option<usize> {
        let mut origins: HashMap<_, (usize, usize)> = HashMap::new();
        for (at, place) in self.taken.iter().enumerate() {
            origins.entry(place.origin).or_insert((0, at)).0 += 1;
        }
        let most = origins.into_values().max_by_key(|(count, oldest)| (*count, usize::MAX - oldest));
        most.filter(|(count, _)| *count > than).map(|(_, oldest)| oldest)
    }

    fn leave(&mut self, number: u64) {
        if let Ok(at) = self.taken.binary_search_by_key(&number, |place| place.number) {
            self.taken.remove(at);
        }
    }
}

/// A handshake to be made.
#[derive(Debug)]
pub(crate) struct Handshake {
    gate: Arc<Gate>,
    number: u64,
    displaced: oneshot::Receiver<()>,
}

impl Drop for Handshake {
    fn drop(&mut self) {
        self.gate.lock().leave(self.number);
    }
}

impl Handshake {
    /// Makes the connection secure; gives up at the deadline, when another is to have its place, and when the listener shuts
    /// down.
    pub(crate) async fn run(mut self, io: Transport, outbox: &SharedOutbox) -> Result<Transport, Ended> {
        let closing = poll_fn(|cx| match outbox.poll_phase(cx) {
            Phase::Open => Poll::Pending,
            _ => Poll::Ready(()),
        });
        let Gate { tls, deadline, .. } = &*self.gate;
        let in_time = tokio::time::timeout(*deadline, tls.accept(io));
        let (why, mut io) = tokio::select! {
            () = closing => return Err(Ended::ShutDown),
            Ok(()) = &mut self.displaced => {
                let why = "all places were taken, most of them by its address, and this was the oldest of those";
                return Err(Ended::Handshake(why.into()));
            }
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

    fn peer(host: &str) -> PeerAddress {
        PeerAddress::Tcp(format!("{host}:7").parse().unwrap())
    }

    #[test]
    fn one_address_has_a_quarter_of_the_handshakes_under_way_at_most_and_this_machine_any() {
        let mut places = Places::new(8);
        for _ in 0..2 {
            places.enter(&peer("192.0.2.1")).unwrap();
        }
        assert_eq!(places.enter(&peer("192.0.2.1")).unwrap_err(), Full::FromOne(2));
        for _ in 0..6 {
            places.enter(&peer("127.0.0.1")).unwrap();
        }
        assert_eq!(places.enter(&peer("127.0.0.1")).unwrap_err(), Full::InAll(8));
    }

    #[test]
    fn who_has_the_most_handshakes_under_way_gives_the_oldest_up_to_who_would_have_fewer() {
        let mut places = Places::new(8);
        let mut enter = |host: &str| places.enter(&peer(host)).map(|(_, displaced)| displaced);
        // Two of each: of those that have as many, the one gives whose oldest is older.
        let mut old: Vec<_> = [1, 2, 1, 2, 3, 3, 4, 4].map(|host| enter(&format!("192.0.2.{host}")).unwrap()).into();
        for (newcomer, at) in [(5, 0), (6, 1), (7, 4), (8, 6)] {
            enter(&format!("192.0.2.{newcomer}")).unwrap();
            assert!(old[at].try_recv().is_ok(), "{at} is the oldest of those");
        }
        assert!([2, 3, 5, 7].iter().all(|at| old[*at].try_recv() == Err(oneshot::error::TryRecvError::Empty)));
        // Now each has one: nobody has more than another would have.
        assert_eq!(enter("192.0.2.9").unwrap_err(), Full::InAll(8));
        assert_eq!(enter("192.0.2.1").unwrap_err(), Full::InAll(8));
    }

    #[test]
    fn a_place_that_is_left_is_free_and_one_that_was_given_up_is_left_only_once() {
        let mut places = Places::new(2);
        let (first, _) = places.enter(&peer("127.0.0.1")).unwrap();
        places.enter(&peer("127.0.0.1")).unwrap();
        let (newcomer, _) = places.enter(&peer("127.0.0.2")).unwrap();
        places.leave(first);
        assert_eq!(places.enter(&peer("127.0.0.1")).unwrap_err(), Full::InAll(2));
        places.leave(newcomer);
        places.enter(&peer("127.0.0.1")).unwrap();
    }
}
