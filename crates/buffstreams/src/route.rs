//! Whom a connection dials next, where there is more than one it could dial.
//!
//! Attempts come in *rounds*: each place is tried once, in order, without a pause between two; names are resolved anew.
//! The dialer pauses between rounds, so that no place is tried twice without a pause, and none waits for the pause of
//! another. An acknowledged stream that has messages in flight stays where it is for a while: this file knows where that
//! is. It holds no socket, and decides nothing about pauses.

use std::fmt;
use std::time::{Duration, Instant};

use tokio::time::timeout;

use crate::error::{Error, ErrorKind};
use crate::shared_outbox::deadline_in;
use crate::transport::{Address, Endpoints, Liveness, PeerAddress, Place, TlsClient, Transport};

/// Whom to dial, and how.
#[derive(Clone, Debug)]
pub(crate) struct Target {
    pub(crate) endpoints: Endpoints,
    pub(crate) liveness: Liveness,
    /// For one round.
    pub(crate) connect_deadline: Duration,
    /// How long a stream with messages in flight stays with a place that does not answer.
    pub(crate) patience: Duration,
    pub(crate) tls: Option<TlsClient>,
    /// The one place that is dialled, as long as the first address stands for it.
    pub(crate) home: Option<Home>,
}

/// One of the places of an address. Which one, where the address stands for it no longer, is said by a number.
#[derive(Clone, Debug)]
pub(crate) struct Home {
    pub(crate) place: Place,
    pub(crate) number: usize,
}

/// One place of one address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Endpoint {
    pub(crate) address: Address,
    pub(crate) place: Place,
}

/// A socket, and where it leads.
pub(crate) struct Connected {
    pub(crate) io: Transport,
    pub(crate) peer: PeerAddress,
    /// `None` for a stream that the user brought.
    pub(crate) at: Option<Endpoint>,
    /// When the share of time of this place ends, and how long it was: by then it has granted an acknowledged stream.
    pub(crate) share: Option<(Instant, Duration)>,
}

/// Whether a stream may go on elsewhere.
#[derive(Clone, Copy, Debug)]
enum Bond {
    /// It may.
    None,
    /// Not before then.
    Until(Instant),
    /// It has waited for long enough.
    Given,
}

/// The places of a target, as they are tried.
#[derive(Debug)]
pub(crate) struct Route {
    target: Target,
    /// Where was tried in this round.
    tried: Vec<Endpoint>,
    /// Whether the last place of this round was tried.
    is_exhausted: bool,
    /// Whether a place of this round has anything against it but that it refused the stream for good.
    is_hopeful: bool,
    /// Why places of this round were of no use.
    failures: Vec<String>,
    /// Where the stream was granted last, or plain messages went.
    stands_at: Option<Endpoint>,
    bond: Bond,
}

impl Route {
    pub(crate) fn new(target: Target) -> Route {
        Route {
            target,
            tried: Vec::new(),
            is_exhausted: false,
            is_hopeful: false,
            failures: Vec::new(),
            stands_at: None,
            bond: Bond::None,
        }
    }

    /// Every place may be tried again.
    pub(crate) fn begin_round(&mut self) {
        self.tried.clear();
        self.failures.clear();
        (self.is_exhausted, self.is_hopeful) = (false, false);
    }

    /// The socket at a place was lost, with so many messages in flight in its stream. One that was in good health begins a
    /// round, in which its own place has had its turn.
    pub(crate) fn lost(&mut self, at: Endpoint, was_healthy: bool, in_flight: u64) {
        if was_healthy {
            self.begin_round();
            self.tried.push(at);
            (self.is_exhausted, self.is_hopeful) = (self.target.is_one_place(), true);
        }
        if in_flight > 0 && matches!(self.bond, Bond::None) {
            self.bond = Bond::Until(deadline_in(self.target.patience));
        }
    }

    /// A place refused the stream for good. Whether others are left to ask.
    pub(crate) fn refused(&mut self, at: &Endpoint) -> bool {
        if self.stands_at.as_ref() == Some(at) {
            self.release();
        }
        self.is_hopeful || self.may_go_on(Instant::now())
    }

    /// A place may be better at another time.
    pub(crate) fn note_hope(&mut self) {
        self.is_hopeful = true;
    }

    /// Notes why a place, or several, were of no use in this round, for who waits for the first that is.
    pub(crate) fn note_failure(&mut self, why: String) {
        self.failures.push(why);
    }

    /// Why nothing came of this round.
    pub(crate) fn failures(&self) -> String {
        self.failures.join("; ")
    }

    /// A socket leads there already.
    pub(crate) fn note_tried(&mut self, at: &Endpoint) {
        self.tried.push(at.clone());
        self.is_exhausted = self.target.is_one_place();
    }

    /// Messages go, at this place. Returns the one where they went before, if that is another.
    pub(crate) fn granted(&mut self, at: &Endpoint) -> Option<Endpoint> {
        self.bond = Bond::None;
        self.stands_at.replace(at.clone()).filter(|before| before != at)
    }

    /// How much longer the stream stays where it is.
    pub(crate) fn stays_for(&self, now: Instant) -> Option<Duration> {
        let Bond::Until(until) = self.bond else { return None };
        let left = until.saturating_duration_since(now);
        (!left.is_zero() && self.stands_at.is_some() && !self.target.is_one_place()).then_some(left)
    }

    /// The stream need not stay any longer. Whether it did.
    pub(crate) fn release(&mut self) -> bool {
        let stayed = self.stays_for(Instant::now()).is_some();
        if matches!(self.bond, Bond::Until(_)) {
            self.bond = Bond::Given;
        }
        stayed
    }

    /// Whether there may be a place that was not tried in this round.
    pub(crate) fn may_go_on(&self, now: Instant) -> bool {
        !self.is_exhausted && self.stays_for(now).is_none()
    }

    /// Whether every place has refused the stream for good.
    pub(crate) fn is_hopeless(&self) -> bool {
        self.is_exhausted && !self.is_hopeful
    }

    /// Tries the places that were not tried in this round, in order, or only the one where the stream stays; for so long at
    /// most. `None` if there is none.
    ///
    /// # Errors
    ///
    /// What each of them had against it.
    pub(crate) async fn connect(&mut self, most: Duration) -> Result<Option<Connected>, Error> {
        let until = deadline_in(self.target.connect_deadline.min(most));
        let mut failures = Vec::new();
        let addresses = self.target.endpoints.addresses().to_vec();
        if self.stays_for(Instant::now()).is_some()
            && let Some(stays_at) = self.stands_at.clone()
        {
            let mut is_there = true;
            let connected = self.try_address(&stays_at.address, Some(&stays_at), until, &mut failures, &mut is_there);
            if let Some(connected) = connected.await {
                return Ok(Some(connected));
            }
            if is_there {
                return none_of(failures);
            }
            tracing::warn!(address = %stays_at.address, "no longer stands for {}", stays_at.place);
            self.release();
        }
        for (index, address) in addresses.iter().enumerate() {
            let share = share(until, addresses.len() - index);
            if let Some(connected) = self.try_address(address, None, share, &mut failures, &mut false).await {
                return Ok(Some(connected));
            }
        }
        self.is_exhausted = true;
        none_of(failures)
    }

    /// Tries the places of one address, or only one of them; says whether that `is_there`.
    async fn try_address(
        &mut self,
        address: &Address,
        only: Option<&Endpoint>,
        until: Instant,
        failures: &mut Vec<Error>,
        is_there: &mut bool,
    ) -> Option<Connected> {
        let places = match timeout(left(until), Place::all_of(address)).await {
            Ok(Ok(places)) => places,
            Ok(Err(error)) => {
                self.is_hopeful = true;
                failures.push(cannot_connect(address, None, &error).because(error));
                return None;
            }
            Err(_) => {
                self.is_hopeful = true;
                failures.push(cannot_connect(address, None, &"the name was not resolved in time"));
                return None;
            }
        };
        let is_one_of_many = places.len() > 1;
        let places = match &self.target.home {
            Some(home) if places.contains(&home.place) => vec![home.place.clone()],
            Some(home) => vec![places[home.number % places.len()].clone()],
            None => places,
        };
        let all = places.into_iter().map(|place| Endpoint { address: address.clone(), place });
        let untried: Vec<_> = match only {
            Some(only) => all.filter(|endpoint| endpoint == only).collect(),
            None => all.filter(|endpoint| !self.tried.contains(endpoint)).collect(),
        };
        *is_there = !untried.is_empty();
        let is_last = self.target.endpoints.addresses().last() == Some(address);
        let count = untried.len();
        for (index, endpoint) in untried.into_iter().enumerate() {
            self.tried.push(endpoint.clone());
            let until = share(until, count - index);
            let allowed = left(until);
            let named = is_one_of_many.then_some(&endpoint.place);
            let error = match timeout(allowed, self.target.open(&endpoint, named)).await {
                Ok(Ok((io, peer))) => {
                    self.is_exhausted = is_last && index + 1 == count && only.is_none();
                    let share = Some((until, rounded(allowed)));
                    return Some(Connected { io, peer, at: Some(endpoint), share });
                }
                Ok(Err(error)) => error,
                Err(_) => cannot_connect(address, named, &format_args!("no answer within {:?}", rounded(allowed))),
            };
            self.is_hopeful = true;
            failures.push(error);
        }
        None
    }
}

impl Target {
    fn is_one_place(&self) -> bool {
        self.home.is_some() || self.endpoints.is_one_place()
    }

    /// One attempt at one place, that is `named` if its address has others.
    async fn open(&self, endpoint: &Endpoint, named: Option<&Place>) -> Result<(Transport, PeerAddress), Error> {
        let Endpoint { address, place } = endpoint;
        let connected = Transport::connect(place, self.liveness).await;
        let (io, peer) = connected.map_err(|error| cannot_connect(address, named, &error).because(error))?;
        match &self.tls {
            Some(tls) => Ok((tls.connect(io, address).await?, peer)),
            None => Ok((io, peer)),
        }
    }
}

fn cannot_connect(address: &Address, named: Option<&Place>, why: &dyn fmt::Display) -> Error {
    let text = match named {
        Some(place) => format!("cannot connect to {address} at {place}: {why}"),
        None => format!("cannot connect to {address}: {why}"),
    };
    Error::new(ErrorKind::Connect, text)
}

/// One error of many, with the words of all.
fn none_of<T>(mut failures: Vec<Error>) -> Result<Option<T>, Error> {
    let Some(last) = failures.pop() else { return Ok(None) };
    if failures.is_empty() {
        return Err(last);
    }
    let kind = if failures.iter().all(|error| error.kind() == last.kind()) { last.kind() } else { ErrorKind::Connect };
    let words: Vec<_> = failures.iter().chain([&last]).map(ToString::to_string).collect();
    Err(Error::new(kind, words.join("; ")).because(last))
}

fn left(until: Instant) -> Duration {
    until.saturating_duration_since(Instant::now())
}

/// When the first of so many must be done, for each to have as much time as the others.
fn share(until: Instant, count: usize) -> Instant {
    deadline_in(left(until) / u32::try_from(count).unwrap_or(u32::MAX).max(1))
}

/// For people.
fn rounded(time: Duration) -> Duration {
    let grain = if time < Duration::from_secs(1) { 1 } else { 100 };
    let milliseconds = (time.as_secs_f64() * 1e3 / f64::from(grain)).round() * f64::from(grain);
    Duration::from_secs_f64(milliseconds / 1e3)
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use super::*;
    use crate::connection::{Connection, ConnectionBuilder};
    use crate::events::{Event, Events};
    use crate::listener::{Listener, Server};
    use crate::retry::Backoff;
    use crate::transport::endpoints::stands_for;

    /// No pause between attempts ends within a test.
    fn builder() -> ConnectionBuilder {
        let endless = Duration::from_secs(600);
        Connection::builder().backoff(Backoff { min: endless, max: endless }).endpoint_patience(endless)
    }

    async fn serve() -> (Server, SocketAddr) {
        let server = Listener::bind("127.0.0.1:0").await.unwrap().spawn(|_: &[u8]| Ok(()));
        let address = server.local_address().to_string().parse().unwrap();
        (server, address)
    }

    async fn nobody() -> SocketAddr {
        let (server, address) = serve().await;
        server.shutdown(Duration::ZERO).await;
        address
    }

    async fn connected(events: &mut Events) -> PeerAddress {
        let next = async {
            loop {
                if let Event::Connected { peer } = events.next().await.expect("it is not over") {
                    return peer;
                }
            }
        };
        timeout(Duration::from_secs(60), next).await.expect("it connects")
    }

    #[tokio::test]
    async fn a_name_is_as_a_list_of_all_that_it_stands_for_and_is_resolved_anew_after_a_loss() {
        let down = nobody().await;
        let (one, first) = serve().await;
        let (_two, second) = serve().await;
        stands_for("a-name.test", &[down, first]);
        let connection = builder().dial("a-name.test:1").await.unwrap();
        let mut events = connection.events();
        assert_eq!(connected(&mut events).await, PeerAddress::Tcp(first));
        stands_for("a-name.test", &[down, second]);
        one.shutdown(Duration::ZERO).await;
        assert_eq!(connected(&mut events).await, PeerAddress::Tcp(second));
    }

    #[tokio::test]
    async fn a_failed_dial_names_every_address_that_a_name_stands_for() {
        let (one, two) = (nobody().await, nobody().await);
        stands_for("two-that-are-down.test", &[one, two]);
        let text = builder().dial("two-that-are-down.test:1").await.unwrap_err().to_string();
        for place in [one, two] {
            let named = format!("cannot connect to two-that-are-down.test:1 at {place}: Connection refused");
            assert!(text.contains(&named), "{text}");
        }
        stands_for("one-that-is-down.test", &[one]);
        let text = builder().dial("one-that-is-down.test:1").await.unwrap_err().to_string();
        assert!(text.starts_with("cannot connect to one-that-is-down.test:1: Connection refused"), "{text}");
        let text = builder().dial("name.invalid:1,127.0.0.1:0").await.unwrap_err().to_string();
        assert!(
            text.contains("name.invalid:1: failed to lookup") && text.contains("; cannot connect to 127"),
            "{text}"
        );
    }

    #[cfg(target_os = "linux")]
    #[tokio::test]
    async fn an_address_of_a_name_that_swallows_everything_takes_only_its_share_of_the_time() {
        let hole = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
        hole.bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into()).unwrap();
        hole.listen(0).unwrap();
        let place = hole.local_addr().unwrap().as_socket().unwrap();
        let fill = move || std::net::TcpStream::connect_timeout(&place, Duration::from_millis(200)).ok();
        let _queued: Vec<_> = std::iter::from_fn(fill).take(100).collect();
        let (server, good) = serve().await;
        stands_for("swallows.test", &[place, good]);
        let builder = builder().connect_deadline(Duration::from_secs(2));
        builder.clone().dial("swallows.test:1").await.unwrap();
        server.shutdown(Duration::ZERO).await;
        let text = builder.dial("swallows.test:1").await.unwrap_err().to_string();
        assert!(text.contains(&format!("at {place}: no answer within 1s")), "{text}");
    }

    #[tokio::test]
    async fn a_stream_does_not_wait_for_a_place_that_its_name_stands_for_no_longer() {
        let (one, first) = serve().await;
        let (_two, second) = serve().await;
        stands_for("goes-elsewhere.test", &[first]);
        let route = |target: &str| Target {
            endpoints: target.parse().unwrap(),
            liveness: Liveness::default(),
            connect_deadline: Duration::from_secs(10),
            patience: Duration::from_secs(600),
            tls: None,
            home: None,
        };
        let mut route = Route::new(route("goes-elsewhere.test:1,127.0.0.1:1"));
        let at = route.connect(Duration::MAX).await.unwrap().unwrap().at.unwrap();
        assert_eq!(route.granted(&at), None);
        one.shutdown(Duration::ZERO).await;
        route.lost(at.clone(), false, 1);
        assert!(!route.may_go_on(Instant::now()));
        route.begin_round();
        let error = route.connect(Duration::MAX).await.err().unwrap().to_string();
        assert!(!error.contains("127.0.0.1:1"), "it stays: {error}");
        stands_for("goes-elsewhere.test", &[second]);
        route.begin_round();
        let there = route.connect(Duration::MAX).await.unwrap().unwrap().at.unwrap();
        assert_eq!(there.place, Place::Tcp(second));
        assert!(!route.release(), "it stays there no more");
        assert_eq!(route.granted(&there), Some(at));
    }

    #[tokio::test]
    async fn a_spread_has_a_connection_for_each_place_of_a_name_which_keeps_to_it_while_it_is_one() {
        let ((one, first), (_two, second), (_three, third)) = (serve().await, serve().await, serve().await);
        stands_for("several.test", &[first, second]);
        let spread = builder().dial_spread("several.test:1").await.unwrap();
        let [one_of, two_of] = spread.connections() else { panic!("one for each") };
        let (mut events, mut other) = (one_of.events(), two_of.events());
        assert_eq!(connected(&mut events).await, PeerAddress::Tcp(first));
        assert_eq!(connected(&mut other).await, PeerAddress::Tcp(second));
        stands_for("several.test", &[third, second]);
        two_of.reopen();
        assert_eq!(connected(&mut other).await, PeerAddress::Tcp(second));
        drop(one);
        one_of.reopen();
        assert_eq!(connected(&mut events).await, PeerAddress::Tcp(third));
        let error = builder().dial_spread("name.invalid:1").await.unwrap_err();
        assert!(error.to_string().starts_with("cannot connect to name.invalid:1: "), "{error}");
    }
}
