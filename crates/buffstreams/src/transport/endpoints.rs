//! Whom to dial, where there may be more than one: addresses in their order, and the places that they stand for.

use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::str::FromStr;

use super::Address;
use crate::error::{Error, ErrorKind};

/// Whom to dial: one address, or several in the order in which they are tried.
///
/// Made from an [`Address`] or whatever converts into one; from an array, a slice or a `Vec` of these; or from text with
/// commas between. A path with a comma in it is given as an [`Address`].
///
/// ```
/// use buffstreams::Endpoints;
/// let endpoints: Endpoints = "collector:5031,standby:5031".parse()?;
/// assert_eq!(endpoints, Endpoints::try_from(["collector:5031", "standby:5031"])?);
/// assert_eq!(endpoints.to_string(), "collector:5031,standby:5031");
/// assert!("collector:5031,".parse::<Endpoints>().is_err());
/// # Ok::<(), buffstreams::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Endpoints(Vec<Address>);

impl Endpoints {
    /// The addresses, in their order; at least one.
    pub fn addresses(&self) -> &[Address] {
        &self.0
    }

    /// The one that is tried first.
    pub fn first(&self) -> &Address {
        &self.0[0]
    }

    /// Whether there can be no more than one place to dial, however names are resolved.
    pub(crate) fn is_one_place(&self) -> bool {
        match &self.0[..] {
            [Address::Unix(_)] => true,
            // In no name is a colon; an IPv6 address may say its interface behind it.
            [Address::Tcp { host, .. }] => host.contains(':') || host.parse::<IpAddr>().is_ok(),
            _ => false,
        }
    }
}

impl FromStr for Endpoints {
    type Err = Error;

    fn from_str(text: &str) -> Result<Endpoints, Error> {
        if !text.contains(',') {
            return text.parse().map(|address| Endpoints(vec![address]));
        }
        text.split(',').map(|part| part.trim().parse()).collect::<Result<_, Error>>().map(Endpoints)
    }
}

impl TryFrom<&str> for Endpoints {
    type Error = Error;

    fn try_from(text: &str) -> Result<Endpoints, Error> {
        text.parse()
    }
}

impl TryFrom<String> for Endpoints {
    type Error = Error;

    fn try_from(text: String) -> Result<Endpoints, Error> {
        text.parse()
    }
}

impl TryFrom<&String> for Endpoints {
    type Error = Error;

    fn try_from(text: &String) -> Result<Endpoints, Error> {
        text.parse()
    }
}

impl From<Address> for Endpoints {
    fn from(address: Address) -> Endpoints {
        Endpoints(vec![address])
    }
}

impl From<&Address> for Endpoints {
    fn from(address: &Address) -> Endpoints {
        Endpoints(vec![address.clone()])
    }
}

impl From<SocketAddr> for Endpoints {
    fn from(address: SocketAddr) -> Endpoints {
        Endpoints(vec![address.into()])
    }
}

impl From<&Endpoints> for Endpoints {
    fn from(endpoints: &Endpoints) -> Endpoints {
        endpoints.clone()
    }
}

impl<A> TryFrom<Vec<A>> for Endpoints
where
    A: TryInto<Address>,
    Error: From<A::Error>,
{
    type Error = Error;

    fn try_from(addresses: Vec<A>) -> Result<Endpoints, Error> {
        gather(addresses)
    }
}

impl<A, const N: usize> TryFrom<[A; N]> for Endpoints
where
    A: TryInto<Address>,
    Error: From<A::Error>,
{
    type Error = Error;

    fn try_from(addresses: [A; N]) -> Result<Endpoints, Error> {
        gather(addresses)
    }
}

impl<'a, A> TryFrom<&'a [A]> for Endpoints
where
    &'a A: TryInto<Address>,
    Error: From<<&'a A as TryInto<Address>>::Error>,
{
    type Error = Error;

    fn try_from(addresses: &'a [A]) -> Result<Endpoints, Error> {
        gather(addresses)
    }
}

fn gather<A>(addresses: impl IntoIterator<Item = A>) -> Result<Endpoints, Error>
where
    A: TryInto<Address>,
    Error: From<A::Error>,
{
    let addresses: Vec<_> = addresses.into_iter().map(TryInto::try_into).collect::<Result<_, _>>()?;
    if addresses.is_empty() {
        return Err(Error::new(ErrorKind::InvalidAddress, "there is no address in the list"));
    }
    Ok(Endpoints(addresses))
}

impl fmt::Display for Endpoints {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, address) in self.0.iter().enumerate() {
            f.write_str(if index == 0 { "" } else { "," })?;
            address.fmt(f)?;
        }
        Ok(())
    }
}

/// One place that an address stands for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    Tcp(SocketAddr),
    Unix(PathBuf),
}

impl Place {
    /// All places that an address stands for at this moment; at least one.
    pub(crate) async fn all_of(address: &Address) -> io::Result<Vec<Place>> {
        let (host, port) = match address {
            Address::Unix(path) => return Ok(vec![Place::Unix(path.clone())]),
            Address::Tcp { host, port } if host.is_empty() => ("localhost", *port),
            Address::Tcp { host, port } => (host.as_str(), *port),
        };
        let places: Vec<_> = look_up(host, port).await?.into_iter().map(Place::Tcp).collect();
        if places.is_empty() {
            return Err(io::Error::new(io::ErrorKind::NotFound, "the name stands for no address"));
        }
        Ok(places)
    }
}

impl From<Place> for Address {
    fn from(place: Place) -> Address {
        match place {
            Place::Tcp(address) => Address::from(address),
            Place::Unix(path) => Address::Unix(path),
        }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Place::Tcp(address) => address.fmt(f),
            Place::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

#[cfg(not(test))]
async fn look_up(host: &str, port: u16) -> io::Result<impl IntoIterator<Item = SocketAddr>> {
    tokio::net::lookup_host((host, port)).await
}

#[cfg(test)]
use scripted::look_up;
#[cfg(test)]
pub(crate) use scripted::stands_for;

/// Names that stand for what a test says.
#[cfg(test)]
mod scripted {
    use std::collections::HashMap;
    use std::io;
    use std::net::SocketAddr;
    use std::sync::Mutex;

    static NAMES: Mutex<Option<HashMap<String, Vec<SocketAddr>>>> = Mutex::new(None);

    /// From now on this name stands for these, whatever the port that is asked for.
    pub(crate) fn stands_for(name: &str, addresses: &[SocketAddr]) {
        NAMES.lock().unwrap().get_or_insert_default().insert(name.to_owned(), addresses.to_vec());
    }

    pub(super) async fn look_up(host: &str, port: u16) -> io::Result<Vec<SocketAddr>> {
        let scripted = NAMES.lock().unwrap().as_ref().and_then(|names| names.get(host).cloned());
        match scripted {
            Some(addresses) => Ok(addresses),
            None => Ok(tokio::net::lookup_host((host, port)).await?.collect()),
        }
    }
}
