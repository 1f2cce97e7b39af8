//! Bare sockets, for `tap`: bytes as they are, half-closed and reset as the other side did it.
//!
//! The library's own sockets speak messages and keep these matters to themselves.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr};
#[cfg(unix)]
use std::path::PathBuf;
use std::time::Duration;

use buffstreams::Address;
use socket2::{Domain, Protocol, SockRef, Socket, Type};
use tokio::net::{TcpListener, TcpStream};
#[cfg(unix)]
use tokio::net::{UnixListener, UnixStream};

/// How many connections may wait to be accepted.
const BACKLOG: i32 = 1024;

/// A listening socket. The file of a Unix socket goes with it.
#[derive(Debug)]
pub(crate) enum Listener {
    Tcp(TcpListener),
    #[cfg(unix)]
    Unix(PathBuf, UnixListener),
}

impl Listener {
    /// Listens; with port 0, on a free port. A socket file that nobody answers on is replaced.
    ///
    /// # Errors
    ///
    /// As the operating system says, with the address.
    pub(crate) async fn bind(address: &Address) -> io::Result<Listener> {
        let failed = |error: io::Error| io::Error::new(error.kind(), format!("cannot listen on {address}: {error}"));
        match address {
            Address::Tcp { host, port } if host.is_empty() => {
                let (v6, v4) = (Ipv6Addr::UNSPECIFIED, Ipv4Addr::UNSPECIFIED);
                let every = match listen(Domain::IPV6, (v6, *port).into(), true) {
                    Err(error) if error.kind() != io::ErrorKind::AddrInUse => {
                        listen(Domain::IPV4, (v4, *port).into(), false)
                    }
                    result => result,
                };
                every.map(Listener::Tcp).map_err(failed)
            }
            Address::Tcp { host, port } => {
                TcpListener::bind((host.as_str(), *port)).await.map(Listener::Tcp).map_err(failed)
            }
            #[cfg(unix)]
            Address::Unix(path) => {
                use std::os::unix::fs::FileTypeExt;
                let is_socket = std::fs::symlink_metadata(path).is_ok_and(|metadata| metadata.file_type().is_socket());
                if is_socket
                    && let Err(error) = UnixStream::connect(path).await
                    && error.kind() == io::ErrorKind::ConnectionRefused
                {
                    std::fs::remove_file(path).map_err(failed)?;
                }
                UnixListener::bind(path).map(|listener| Listener::Unix(path.clone(), listener)).map_err(failed)
            }
            #[cfg(not(unix))]
            Address::Unix(_) => Err(failed(io::ErrorKind::Unsupported.into())),
        }
    }

    /// The address as it came to be, with the real port.
    pub(crate) fn local_address(&self) -> io::Result<Address> {
        match self {
            Listener::Tcp(listener) => listener.local_addr().map(Address::from),
            #[cfg(unix)]
            Listener::Unix(path, _) => Ok(Address::Unix(path.clone())),
        }
    }

    /// The next connection, and what its other end is called.
    ///
    /// Cancel safe.
    ///
    /// # Errors
    ///
    /// As the operating system says; the next connection may be well.
    pub(crate) async fn accept(&self) -> io::Result<(Stream, String)> {
        match self {
            Listener::Tcp(listener) => {
                let (stream, peer) = listener.accept().await?;
                // A socket of both families shows IPv4 peers in disguise.
                let peer = SocketAddr::new(peer.ip().to_canonical(), peer.port());
                Ok((Stream::tcp(stream), peer.to_string()))
            }
            #[cfg(unix)]
            Listener::Unix(_, listener) => {
                let (stream, _) = listener.accept().await?;
                Ok((Stream::Unix(stream), "a unix socket".to_owned()))
            }
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        #[cfg(unix)]
        if let Listener::Unix(path, _) = self {
            let _ = std::fs::remove_file(path);
        }
    }
}

fn listen(domain: Domain, address: SocketAddr, both_families: bool) -> io::Result<TcpListener> {
    let socket = Socket::new(domain, Type::STREAM, Some(Protocol::TCP))?;
    if both_families {
        socket.set_only_v6(false)?;
    }
    #[cfg(not(windows))]
    socket.set_reuse_address(true)?;
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    TcpListener::from_std(socket.into())
}

/// An open socket. Both directions can be used at the same time.
#[derive(Debug)]
pub(crate) enum Stream {
    Tcp(TcpStream),
    #[cfg(unix)]
    Unix(UnixStream),
}

impl Stream {
    /// Connects, trying every address that the name stands for.
    ///
    /// # Errors
    ///
    /// As the operating system says, with the address.
    pub(crate) async fn connect(address: &Address) -> io::Result<Stream> {
        match address {
            Address::Tcp { host, port } => {
                let host = if host.is_empty() { "localhost" } else { host };
                TcpStream::connect((host, *port)).await.map(Stream::tcp)
            }
            #[cfg(unix)]
            Address::Unix(path) => UnixStream::connect(path).await.map(Stream::Unix),
            #[cfg(not(unix))]
            Address::Unix(_) => Err(io::ErrorKind::Unsupported.into()),
        }
        .map_err(|error| io::Error::new(error.kind(), format!("cannot connect to {address}: {error}")))
    }

    fn tcp(stream: TcpStream) -> Stream {
        // A peer that has gone already makes this fail; reading will tell.
        let _ = stream.set_nodelay(true);
        Stream::Tcp(stream)
    }

    /// Waits until there is something to read, or the end.
    pub(crate) async fn readable(&self) -> io::Result<()> {
        match self {
            Stream::Tcp(stream) => stream.readable().await,
            #[cfg(unix)]
            Stream::Unix(stream) => stream.readable().await,
        }
    }

    /// Reads what is there; 0 is the end of the stream.
    ///
    /// # Errors
    ///
    /// `WouldBlock` if there is nothing at the moment.
    pub(crate) fn try_read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Stream::Tcp(stream) => stream.try_read(buffer),
            #[cfg(unix)]
            Stream::Unix(stream) => stream.try_read(buffer),
        }
    }

    /// Writes everything; not cancel safe.
    pub(crate) async fn write_all(&self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let written = match self {
                Stream::Tcp(stream) => {
                    stream.writable().await?;
                    stream.try_write(bytes)
                }
                #[cfg(unix)]
                Stream::Unix(stream) => {
                    stream.writable().await?;
                    stream.try_write(bytes)
                }
            };
            match written {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(written) => bytes = &bytes[written..],
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Ends the stream outward; the other direction goes on.
    pub(crate) fn end(&self) {
        // If the other side has gone meanwhile, there is nothing to end.
        let _ = match self {
            Stream::Tcp(stream) => SockRef::from(stream).shutdown(Shutdown::Write),
            #[cfg(unix)]
            Stream::Unix(stream) => SockRef::from(stream).shutdown(Shutdown::Write),
        };
    }

    /// Closes it so that the other side sees a reset, where there is such a thing.
    pub(crate) fn reset(self) {
        if let Stream::Tcp(stream) = &self {
            let _ = SockRef::from(stream).set_linger(Some(Duration::ZERO));
        }
    }
}
