//! Who may come in: addresses that are allowed, and how many at a time, in all and from one of them.
//!
//! Refusing costs one look under a short lock, and nothing is read from whoever is refused. Who was let in is counted until
//! they [leave](Crowd::leave); what is kept for an address goes with the last connection from it.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::{Mutex, MutexGuard, PoisonError};

use ipnet::IpNet;

use crate::transport::PeerAddress;

/// So many at a time, and so many of them from one address.
///
/// An IPv6 address stands for its /64, which is the least that one customer is given: whoever has one address there has all
/// 18 quintillion. Peers without an address, on Unix sockets and streams that were brought, count only in all.
#[derive(Debug)]
pub(crate) struct Crowd {
    most: usize,
    from_one: FromOne,
    inside: Mutex<Inside>,
}

/// How many may come from one address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct FromOne {
    pub(crate) most: Option<usize>,
    /// Whether that holds for addresses of this machine, too.
    pub(crate) counts_loopback: bool,
}

#[derive(Debug, Default)]
struct Inside {
    in_all: usize,
    from: HashMap<Origin, usize>,
}

/// What counts as one address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Origin {
    V4(Ipv4Addr),
    V6([u8; 8]),
}

/// Why somebody may not come in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Full {
    /// So many are there.
    InAll(usize),
    /// So many are there from that address.
    FromOne(usize),
}

impl Crowd {
    pub(crate) fn new(most: usize, from_one: FromOne) -> Crowd {
        Crowd { most, from_one, inside: Mutex::default() }
    }

    /// As many as like to.
    pub(crate) fn unbounded() -> Crowd {
        Crowd::new(usize::MAX, FromOne { most: None, counts_loopback: false })
    }

    fn lock(&self) -> MutexGuard<'_, Inside> {
        self.inside.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets somebody in, who then must [leave](Self::leave) once.
    pub(crate) fn enter(&self, peer: &PeerAddress) -> Result<(), Full> {
        let mut inside = self.lock();
        if inside.in_all >= self.most {
            return Err(Full::InAll(self.most));
        }
        if let Some((origin, most)) = self.counted(peer) {
            let from_there = inside.from.entry(origin).or_insert(0);
            if *from_there >= most {
                if *from_there == 0 {
                    inside.from.remove(&origin);
                }
                return Err(Full::FromOne(most));
            }
            *from_there += 1;
        }
        inside.in_all += 1;
        Ok(())
    }

    pub(crate) fn leave(&self, peer: &PeerAddress) {
        let mut inside = self.lock();
        inside.in_all -= 1;
        if let Some((origin, _)) = self.counted(peer)
            && let Entry::Occupied(mut from_there) = inside.from.entry(origin)
        {
            *from_there.get_mut() -= 1;
            if *from_there.get() == 0 {
                from_there.remove();
            }
        }
    }

    /// As what somebody is counted, and how many of those there may be.
    fn counted(&self, peer: &PeerAddress) -> Option<(Origin, usize)> {
        let PeerAddress::Tcp(address) = peer else { return None };
        let FromOne { most, counts_loopback } = self.from_one;
        let is_counted = counts_loopback || !address.ip().is_loopback();
        Origin::of_peer(peer).zip(most.filter(|_| is_counted))
    }
}

impl Origin {
    /// `None` for peers without an address.
    pub(crate) fn of_peer(peer: &PeerAddress) -> Option<Origin> {
        match peer {
            PeerAddress::Tcp(address) => Some(Origin::of(address.ip())),
            PeerAddress::Unix | PeerAddress::Io => None,
        }
    }

    fn of(address: IpAddr) -> Origin {
        match address.to_canonical() {
            IpAddr::V4(address) => Origin::V4(address),
            IpAddr::V6(address) => {
                let [a, b, c, d, e, f, g, h, ..] = address.octets();
                Origin::V6([a, b, c, d, e, f, g, h])
            }
        }
    }
}

impl fmt::Display for Full {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Full::InAll(most) => write!(f, "{most} are open, and that is the most allowed"),
            Full::FromOne(most) => write!(f, "{most} are open from that address, and that is the most allowed"),
        }
    }
}

/// Whether an address is in one of these networks. Peers without an address are no matter of networks.
pub(crate) fn is_in(networks: &[IpNet], peer: &PeerAddress) -> bool {
    match peer {
        PeerAddress::Tcp(address) => networks.iter().any(|network| network.contains(&address.ip().to_canonical())),
        PeerAddress::Unix | PeerAddress::Io => true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peer(address: &str) -> PeerAddress {
        PeerAddress::Tcp(format!("{address}:7").parse().unwrap())
    }

    fn crowd(most: usize, counts_loopback: bool) -> Crowd {
        Crowd::new(usize::MAX, FromOne { most: Some(most), counts_loopback })
    }

    #[test]
    fn an_ipv6_address_stands_for_its_64_bits_of_network_and_a_disguised_ipv4_for_itself() {
        let crowd = crowd(1, false);
        assert_eq!(crowd.enter(&peer("[2001:db8:0:1::1]")), Ok(()));
        assert_eq!(crowd.enter(&peer("[2001:db8:0:1:ffff::9]")), Err(Full::FromOne(1)));
        assert_eq!(crowd.enter(&peer("[2001:db8:0:2::1]")), Ok(()));
        assert_eq!(crowd.enter(&peer("192.0.2.1")), Ok(()));
        assert_eq!(crowd.enter(&peer("[::ffff:192.0.2.1]")), Err(Full::FromOne(1)));
        assert_eq!(crowd.enter(&peer("[::ffff:192.0.2.2]")), Ok(()));
    }

    #[test]
    fn loopback_is_counted_only_where_that_is_wanted_and_unix_sockets_never() {
        for counts_loopback in [false, true] {
            let crowd = crowd(1, counts_loopback);
            for address in ["127.0.0.1", "[::1]"] {
                crowd.enter(&peer(address)).unwrap();
                assert_eq!(crowd.enter(&peer(address)).is_err(), counts_loopback, "{address}");
            }
            for address in [PeerAddress::Unix, PeerAddress::Io] {
                crowd.enter(&address).unwrap();
                crowd.enter(&address).unwrap();
            }
        }
    }

    #[test]
    fn nothing_is_kept_of_an_address_that_nobody_is_from() {
        let crowd = crowd(2, true);
        for _ in 0..3 {
            crowd.enter(&peer("192.0.2.1")).unwrap();
            crowd.enter(&peer("192.0.2.1")).unwrap();
            crowd.enter(&peer("192.0.2.1")).unwrap_err();
            crowd.leave(&peer("192.0.2.1"));
            crowd.leave(&peer("192.0.2.1"));
        }
        let nobody = Crowd::new(9, FromOne { most: Some(0), counts_loopback: true });
        nobody.enter(&peer("192.0.2.1")).unwrap_err();
        for crowd in [crowd, nobody] {
            assert!(crowd.lock().from.is_empty() && crowd.lock().in_all == 0);
        }
    }

    #[test]
    fn networks_of_either_family_have_their_own_addresses_and_no_others() {
        let networks: Vec<IpNet> = ["10.0.0.0/8", "2001:db8::/32"].map(|text| text.parse().unwrap()).into();
        for inside in ["10.1.2.3", "[::ffff:10.1.2.3]", "[2001:db8::1]"] {
            assert!(is_in(&networks, &peer(inside)), "{inside}");
        }
        for outside in ["11.1.2.3", "[2001:db9::1]", "[::1]", "127.0.0.1"] {
            assert!(!is_in(&networks, &peer(outside)), "{outside}");
        }
        assert!(is_in(&[], &PeerAddress::Unix) && !is_in(&[], &peer("10.0.0.1")));
    }
}
