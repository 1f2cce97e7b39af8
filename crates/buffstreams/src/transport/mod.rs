//! TCP, Unix sockets and whatever the user brings, as one stream; how to connect and how to accept; and TLS over it.
//!
//! The only folder that knows socket options, name resolution and TLS.

pub(crate) mod endpoints;
mod identity;
#[cfg(feature = "__tls")]
mod tls;
#[cfg(not(feature = "__tls"))]
mod without_tls;

use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::pin::Pin;
use std::str::FromStr;
use std::task::{Context, Poll};
use std::time::Duration;

use socket2::{Domain, Protocol, SockRef, Socket, TcpKeepalive, Type};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
#[cfg(unix)]
use tokio::net::{UnixListener, UnixStream};

pub use endpoints::Endpoints;
pub(crate) use endpoints::Place;
pub use identity::PeerIdentity;
#[cfg(feature = "__tls")]
pub use tls::{TlsClient, TlsServer};
#[cfg(not(feature = "__tls"))]
pub(crate) use without_tls::{TlsClient, TlsServer};

use crate::error::{Error, ErrorKind};

/// How many connections may wait to be accepted.
const BACKLOG: i32 = 1024;

/// Where to listen, or whom to dial.
///
/// `host:port`, `[v6]:port`, `:port` (every interface of this machine to listen on, the loopback to dial), port 0 to
/// listen on a free one, or `unix:PATH`. A name is resolved anew at every attempt.
///
/// ```
/// use buffstreams::Address;
/// assert_eq!("[::1]:5031".parse::<Address>()?.to_string(), "[::1]:5031");
/// assert!("5031".parse::<Address>().is_err());
/// # Ok::<(), buffstreams::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Address {
    /// A TCP port of a host; an empty host means every interface.
    Tcp {
        /// A name or an IP address, without brackets.
        host: String,
        /// The port.
        port: u16,
    },
    /// A Unix socket.
    Unix(PathBuf),
}

impl FromStr for Address {
    type Err = Error;

    fn from_str(text: &str) -> Result<Address, Error> {
        let invalid = |what: &str| {
            let allowed = "allowed are host:port, [v6]:port, :port and unix:PATH";
            Error::new(ErrorKind::InvalidAddress, format!("the address {text:?} {what}; {allowed}"))
        };
        if let Some(path) = text.strip_prefix("unix:") {
            if path.is_empty() {
                return Err(invalid("names no path"));
            }
            return Ok(Address::Unix(PathBuf::from(path)));
        }
        if text.contains(',') {
            return Err(invalid("is more than one, and one is wanted"));
        }
        if let Some(end) = text.find("://") {
            return Err(invalid(&format!("is a URL: leave out {:?}", &text[..end + 3])));
        }
        if text.parse::<u16>().is_ok() {
            return Err(invalid(&format!("has no host: write \":{text}\"")));
        }
        let (host, port) = text.rsplit_once(':').ok_or_else(|| invalid("has no port"))?;
        let port = port.parse().map_err(|_| invalid("has a port that is not a number from 0 to 65535"))?;
        let host = match host.strip_prefix('[').and_then(|host| host.strip_suffix(']')) {
            Some(v6) => v6,
            None if host.contains([':', '[', ']']) => return Err(invalid("needs its IPv6 address in brackets")),
            None => host,
        };
        Ok(Address::Tcp { host: host.to_owned(), port })
    }
}

impl TryFrom<&str> for Address {
    type Error = Error;

    fn try_from(text: &str) -> Result<Address, Error> {
        text.parse()
    }
}

impl TryFrom<String> for Address {
    type Error = Error;

    fn try_from(text: String) -> Result<Address, Error> {
        text.parse()
    }
}

impl TryFrom<&String> for Address {
    type Error = Error;

    fn try_from(text: &String) -> Result<Address, Error> {
        text.parse()
    }
}

impl TryFrom<&Address> for Address {
    type Error = Error;

    fn try_from(address: &Address) -> Result<Address, Error> {
        Ok(address.clone())
    }
}

impl From<SocketAddr> for Address {
    fn from(address: SocketAddr) -> Address {
        let host = match address {
            // It is an address only of one of this machine's interfaces.
            SocketAddr::V6(v6) if v6.scope_id() != 0 => format!("{}%{}", v6.ip(), v6.scope_id()),
            _ => address.ip().to_string(),
        };
        Address::Tcp { host, port: address.port() }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Address::Tcp { host, port } if host.contains(':') => write!(f, "[{host}]:{port}"),
            Address::Tcp { host, port } => write!(f, "{host}:{port}"),
            Address::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

/// The other end of a connection.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum PeerAddress {
    /// A TCP peer.
    Tcp(SocketAddr),
    /// A process on this machine, by a Unix socket.
    Unix,
    /// The other end of a stream that the user brought.
    Io,
}

impl fmt::Display for PeerAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            PeerAddress::Tcp(address) => address.fmt(f),
            PeerAddress::Unix => f.write_str("a unix socket"),
            PeerAddress::Io => f.write_str("a stream"),
        }
    }
}

/// How TCP is to notice that the other end is gone.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Liveness {
    /// Silence after which the kernel asks the peer whether it is there; `None` for never.
    pub(crate) keepalive: Option<Duration>,
    /// How long bytes may stay unacknowledged, or the peer refuse to read, before the connection is broken.
    pub(crate) write_stall: Option<Duration>,
}

impl Default for Liveness {
    fn default() -> Self {
        Liveness { keepalive: Some(Duration::from_secs(30)), write_stall: Some(Duration::from_secs(120)) }
    }
}

impl Liveness {
    fn apply(self, stream: &TcpStream) -> io::Result<()> {
        stream.set_nodelay(true)?;
        let socket = SockRef::from(stream);
        if let Some(after) = self.keepalive {
            // Within what the kernel takes: whole seconds, and no more than it can count.
            let after = after.clamp(Duration::from_secs(1), Duration::from_secs(32_767));
            let keepalive = TcpKeepalive::new().with_time(after);
            #[cfg(not(target_os = "openbsd"))]
            let keepalive = keepalive.with_interval(Duration::from_secs(10));
            socket.set_tcp_keepalive(&keepalive)?;
        }
        #[cfg(any(target_os = "linux", target_os = "android"))]
        {
            let (least, most) = (Duration::from_millis(1), Duration::from_millis(i32::MAX as u64));
            socket.set_tcp_user_timeout(self.write_stall.map(|allowed| allowed.clamp(least, most)))?;
        }
        Ok(())
    }
}

/// A stream that a user may bring.
pub(crate) trait Io: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Io for T {}

/// An open stream of bytes.
pub(crate) enum Transport {
    Tcp(TcpStream),
    #[cfg(unix)]
    Unix(UnixStream),
    Io(Box<dyn Io>),
    #[cfg(feature = "__tls")]
    Tls(Box<tls::TlsStream>),
}

impl Transport {
    /// Who the peer has proved to be.
    pub(crate) fn identity(&self) -> Option<&PeerIdentity> {
        match self {
            #[cfg(feature = "__tls")]
            Transport::Tls(stream) => stream.identity(),
            _ => None,
        }
    }

    /// How many of the last bytes that it took may still be here: neither with the kernel nor on their way there without
    /// anybody's doing. Of a stream that was brought nobody knows before it is flushed.
    pub(crate) fn held(&mut self) -> usize {
        match self {
            Transport::Tcp(_) => 0,
            #[cfg(unix)]
            Transport::Unix(_) => 0,
            Transport::Io(_) => usize::MAX,
            #[cfg(feature = "__tls")]
            Transport::Tls(stream) => stream.held(),
        }
    }

    /// Connects to one place.
    pub(crate) async fn connect(place: &Place, liveness: Liveness) -> io::Result<(Transport, PeerAddress)> {
        match place {
            Place::Tcp(address) => {
                let stream = TcpStream::connect(address).await?;
                liveness.apply(&stream)?;
                let peer = stream.peer_addr()?;
                if stream.local_addr().is_ok_and(|local| local == peer) {
                    // On a port of this machine that nobody listens on, TCP can meet itself.
                    return Err(io::ErrorKind::ConnectionRefused.into());
                }
                Ok((Transport::Tcp(stream), PeerAddress::Tcp(peer)))
            }
            #[cfg(unix)]
            Place::Unix(path) => Ok((Transport::Unix(UnixStream::connect(path).await?), PeerAddress::Unix)),
            #[cfg(not(unix))]
            Place::Unix(_) => Err(io::ErrorKind::Unsupported.into()),
        }
    }
}

impl AsyncRead for Transport {
    #[inline]
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Transport::Tcp(stream) => Pin::new(stream).poll_read(cx, buffer),
            #[cfg(unix)]
            Transport::Unix(stream) => Pin::new(stream).poll_read(cx, buffer),
            Transport::Io(stream) => Pin::new(stream).poll_read(cx, buffer),
            #[cfg(feature = "__tls")]
            Transport::Tls(stream) => Pin::new(stream).poll_read(cx, buffer),
        }
    }
}

impl AsyncWrite for Transport {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Transport::Tcp(stream) => Pin::new(stream).poll_write(cx, bytes),
            #[cfg(unix)]
            Transport::Unix(stream) => Pin::new(stream).poll_write(cx, bytes),
            Transport::Io(stream) => Pin::new(stream).poll_write(cx, bytes),
            #[cfg(feature = "__tls")]
            Transport::Tls(stream) => Pin::new(stream).poll_write(cx, bytes),
        }
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Transport::Tcp(stream) => Pin::new(stream).poll_write_vectored(cx, slices),
            #[cfg(unix)]
            Transport::Unix(stream) => Pin::new(stream).poll_write_vectored(cx, slices),
            Transport::Io(stream) => Pin::new(stream).poll_write_vectored(cx, slices),
            #[cfg(feature = "__tls")]
            Transport::Tls(stream) => Pin::new(stream).poll_write_vectored(cx, slices),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Transport::Tcp(stream) => Pin::new(stream).poll_flush(cx),
            #[cfg(unix)]
            Transport::Unix(stream) => Pin::new(stream).poll_flush(cx),
            Transport::Io(stream) => Pin::new(stream).poll_flush(cx),
            #[cfg(feature = "__tls")]
            Transport::Tls(stream) => Pin::new(stream).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Transport::Tcp(stream) => Pin::new(stream).poll_shutdown(cx),
            #[cfg(unix)]
            Transport::Unix(stream) => Pin::new(stream).poll_shutdown(cx),
            Transport::Io(stream) => Pin::new(stream).poll_shutdown(cx),
            #[cfg(feature = "__tls")]
            Transport::Tls(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }
}

/// A listening socket. A Unix socket's file goes with it, and before it: whoever listens there next has its own.
#[derive(Debug)]
pub(crate) enum Acceptor {
    Tcp(TcpListener),
    #[cfg(unix)]
    Unix(SocketFile, UnixListener),
}

impl Acceptor {
    /// Listens; with port 0, on a free port.
    pub(crate) async fn bind(address: &Address) -> Result<Acceptor, Error> {
        let failed = |error: io::Error| {
            Error::new(ErrorKind::Bind, format!("cannot listen on {address}: {error}")).because(error)
        };
        match address {
            Address::Tcp { host, port } if host.is_empty() => {
                let every = listen_on_every_interface(*port).map_err(failed)?;
                Ok(Acceptor::Tcp(every))
            }
            Address::Tcp { host, port } => {
                let mut last = io::Error::new(io::ErrorKind::NotFound, "the name stands for no address");
                for candidate in tokio::net::lookup_host((host.as_str(), *port)).await.map_err(failed)? {
                    match listen(Domain::for_address(candidate), candidate, None) {
                        Ok(listener) => return Ok(Acceptor::Tcp(listener)),
                        Err(error) => last = error,
                    }
                }
                Err(failed(last))
            }
            #[cfg(unix)]
            Address::Unix(path) => {
                remove_if_stale(path).await.map_err(failed)?;
                let listener = UnixListener::bind(path).map_err(failed)?;
                Ok(Acceptor::Unix(SocketFile(path.clone()), listener))
            }
            #[cfg(not(unix))]
            Address::Unix(_) => Err(failed(io::ErrorKind::Unsupported.into())),
        }
    }

    /// The address as it came to be, with the real port.
    pub(crate) fn local_address(&self) -> io::Result<Address> {
        match self {
            Acceptor::Tcp(listener) => listener.local_addr().map(Address::from),
            #[cfg(unix)]
            Acceptor::Unix(file, _) => Ok(Address::Unix(file.0.clone())),
        }
    }

    /// The next connection.
    ///
    /// Cancel safe: a connection is either returned or still waiting.
    pub(crate) async fn accept(&self, liveness: Liveness) -> io::Result<(Transport, PeerAddress)> {
        match self {
            Acceptor::Tcp(listener) => {
                let (stream, peer) = listener.accept().await?;
                // A peer that has gone already makes this fail; reading will tell.
                let _ = liveness.apply(&stream);
                Ok((Transport::Tcp(stream), PeerAddress::Tcp(undisguised(peer))))
            }
            #[cfg(unix)]
            Acceptor::Unix(_, listener) => {
                let (stream, _) = listener.accept().await?;
                Ok((Transport::Unix(stream), PeerAddress::Unix))
            }
        }
    }

    /// Closes the socket, and those connections that wait to be accepted; returns how many those were.
    pub(crate) fn close(self) -> u64 {
        match self {
            Acceptor::Tcp(listener) => listener.into_std().map_or(0, |listener| waiting(|| listener.accept())),
            #[cfg(unix)]
            Acceptor::Unix(file, listener) => {
                // Whoever comes from now on finds nobody.
                drop(file);
                listener.into_std().map_or(0, |listener| waiting(|| listener.accept()))
            }
        }
    }
}

/// A socket of both families shows IPv4 peers in disguise.
fn undisguised(peer: SocketAddr) -> SocketAddr {
    match peer.ip().to_canonical() {
        IpAddr::V4(v4) => SocketAddr::from((v4, peer.port())),
        IpAddr::V6(_) => peer,
    }
}

/// How many are accepted, and dropped, until there are none; no more than can wait.
fn waiting<T>(accept: impl Fn() -> io::Result<T>) -> u64 {
    (0..BACKLOG).take_while(|_| accept().is_ok()).count() as u64
}

fn listen(domain: Domain, address: SocketAddr, only_v6: Option<bool>) -> io::Result<TcpListener> {
    let socket = Socket::new(domain, Type::STREAM, Some(Protocol::TCP))?;
    if let Some(only_v6) = only_v6 {
        socket.set_only_v6(only_v6)?;
    }
    // On Windows this option would let two listeners share a port.
    #[cfg(not(windows))]
    socket.set_reuse_address(true)?;
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    TcpListener::from_std(socket.into())
}

/// Both families by one socket where the machine has IPv6, and IPv4 alone where it has not.
fn listen_on_every_interface(port: u16) -> io::Result<TcpListener> {
    let v6 = SocketAddr::from((std::net::Ipv6Addr::UNSPECIFIED, port));
    let v4 = SocketAddr::from((std::net::Ipv4Addr::UNSPECIFIED, port));
    match listen(Domain::IPV6, v6, Some(false)) {
        Err(error) if error.kind() != io::ErrorKind::AddrInUse => listen(Domain::IPV4, v4, None),
        result => result,
    }
}

/// The file of a Unix socket, removed when nobody listens on it any more.
#[cfg(unix)]
#[derive(Debug)]
pub(crate) struct SocketFile(PathBuf);

#[cfg(unix)]
impl Drop for SocketFile {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// Removes a socket file that nobody answers on. Any other file is left alone, and binding will say so.
#[cfg(unix)]
async fn remove_if_stale(path: &std::path::Path) -> io::Result<()> {
    use std::os::unix::fs::FileTypeExt;

    let is_socket = std::fs::symlink_metadata(path).is_ok_and(|metadata| metadata.file_type().is_socket());
    if !is_socket {
        return Ok(());
    }
    match UnixStream::connect(path).await {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => std::fs::remove_file(path),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddrV6;

    use super::*;

    #[tokio::test]
    async fn an_address_keeps_the_interface_that_it_belongs_to() {
        let local = SocketAddr::V6(SocketAddrV6::new("fe80::1".parse().expect("an address"), 5031, 0, 3));
        let address = Address::from(local);
        assert_eq!(address.to_string(), "[fe80::1%3]:5031");
        assert_eq!(address.to_string().parse::<Address>().expect("an address"), address);
        assert_eq!(Place::all_of(&address).await.expect("it is an address already"), [Place::Tcp(local)]);
        assert_eq!(undisguised(local), local);
        let v4 = SocketAddr::from(([10, 0, 0, 1], 5031));
        assert_eq!(undisguised("[::ffff:10.0.0.1]:5031".parse().expect("an address")), v4);
    }

    #[tokio::test]
    async fn both_ends_of_a_connection_have_their_options_set() {
        let acceptor = Acceptor::bind(&"127.0.0.1:0".parse().expect("an address")).await.expect("a free port");
        let address = acceptor.local_address().expect("it is bound");
        let liveness = Liveness { keepalive: Some(Duration::from_secs(7)), write_stall: Some(Duration::from_secs(9)) };
        let place = Place::all_of(&address).await.expect("it is an address already").remove(0);
        let (dialled, accepted) = tokio::join!(Transport::connect(&place, liveness), acceptor.accept(liveness));
        let ends = [dialled.expect("it listens").0, accepted.expect("it was dialled").0];
        let endless = Liveness { keepalive: Some(Duration::MAX), write_stall: Some(Duration::MAX) };
        let (dialled, accepted) = tokio::join!(Transport::connect(&place, endless), acceptor.accept(endless));
        for end in [dialled.expect("more is allowed").0, accepted.expect("it was dialled").0] {
            let Transport::Tcp(stream) = end else { panic!("it is TCP") };
            let socket = SockRef::from(&stream);
            assert!(socket.keepalive().expect("an option"));
            #[cfg(target_os = "linux")]
            {
                let most = Duration::from_millis(i32::MAX as u64);
                assert_eq!(socket.tcp_user_timeout().expect("an option"), Some(most), "as much as can be counted");
            }
        }
        for end in &ends {
            let Transport::Tcp(stream) = end else { panic!("it is TCP") };
            let socket = SockRef::from(stream);
            assert!(socket.tcp_nodelay().expect("an option"));
            assert!(socket.keepalive().expect("an option"));
            #[cfg(target_os = "linux")]
            {
                assert_eq!(socket.tcp_keepalive_time().expect("an option"), Duration::from_secs(7));
                assert_eq!(socket.tcp_user_timeout().expect("an option"), Some(Duration::from_secs(9)));
            }
        }
    }
}
