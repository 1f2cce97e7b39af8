//! Streams that the user brings, served as a listener serves those that it accepts: all of one host in one house.
//!
//! It accepts nothing and starts no task: what a stream does happens in the future that serves it.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite};

use crate::door::Crowd;
use crate::error::{Error, ErrorKind, Result};
use crate::handler::{Ended, Service};
use crate::house::{Cut, House};
use crate::listener::{ListenerBuilder, ShutdownReport};
use crate::shared_outbox::deadline_in;
use crate::stats::ReceivedStats;
use crate::transport::{PeerAddress, Transport};

impl ListenerBuilder {
    /// Serves any number of streams that are brought, instead of connections that it accepts: see [`Host`].
    ///
    /// How many there may be at a time, and whose, is up to who brings them; all other settings hold.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::InvalidConfiguration`], also if there is to be TLS: that of such a stream is made by who brings it.
    pub fn host<S: Service>(self, service: S) -> Result<Host<S>> {
        let framing = self.framing()?;
        if self.has_tls() {
            let text = "a stream that is brought is served as it is: bring one that TLS is spoken over already";
            return Err(Error::new(ErrorKind::InvalidConfiguration, text));
        }
        Ok(Host { house: self.house(service, framing, &PeerAddress::Io.to_string(), Crowd::unbounded()) })
    }

    /// Serves one open stream as if it had been accepted: a pipe, a socket that another process passed on, a tunnel.
    /// Returns why its input ended, when all work on it is finished and all replies are written.
    ///
    /// The stream has nothing in common with any other. An acknowledged stream whose sender dials again and is served by another
    /// call finds nobody who knows of it: what was in flight may be handled twice. For more than one connection make a
    /// [host](Self::host).
    ///
    /// # Errors
    ///
    /// As [`host`](Self::host).
    ///
    /// # Cancel safety
    ///
    /// Not cancel safe: if the future is dropped, the connection is cut.
    pub async fn serve_io<S: Service>(
        self,
        io: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
        service: S,
    ) -> Result<Ended> {
        Ok(self.host(service)?.serve(io).await)
    }
}

/// Serves streams that are brought to it: pipes, sockets that another process passed on, tunnels, connections that were
/// accepted elsewhere. Cheap to clone; made by [`ListenerBuilder::host`].
///
/// All its streams are to each other what the connections of one listener are: an acknowledged stream goes on where it was,
/// whichever connection brings it, and is handled once; limits on memory hold for all of them together.
///
/// ```
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use std::time::Duration;
/// use buffstreams::{Connection, Listener};
///
/// let host = Listener::builder().host(|message: &[u8]| {
///     println!("{} bytes", message.len());
///     Ok(())
/// })?;
///
/// let (near, far) = tokio::io::duplex(4096);
/// let serving = tokio::spawn({
///     let host = host.clone();
///     async move { host.serve(far).await }
/// });
///
/// let connection = Connection::builder().from_io(near)?;
/// connection.send(b"hello").await?;
/// connection.close(Duration::from_secs(5)).await?;
/// serving.await?;
/// assert_eq!(host.stats().messages, 1);
/// # Ok(()) }
/// ```
pub struct Host<S> {
    house: Arc<House<S>>,
}

impl<S> Clone for Host<S> {
    fn clone(&self) -> Host<S> {
        Host { house: Arc::clone(&self.house) }
    }
}

impl<S> fmt::Debug for Host<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Host")
    }
}

impl<S: Service> Host<S> {
    /// Serves one stream as if it had been accepted. Returns why its input ended, when all work on it is finished and all
    /// replies are written.
    ///
    /// # Cancel safety
    ///
    /// Not cancel safe: if the future is dropped, the connection is cut.
    pub async fn serve(&self, io: impl AsyncRead + AsyncWrite + Send + Unpin + 'static) -> Ended {
        self.house.admit(&PeerAddress::Io).expect("there is room for any number");
        Arc::clone(&self.house).serve(Transport::Io(Box::new(io)), PeerAddress::Io).await
    }

    /// What it has received so far, over all streams.
    pub fn stats(&self) -> ReceivedStats {
        self.house.received().read()
    }

    /// Closes idle streams at once, lets others finish what they have in hand, and cuts what is left when the deadline has
    /// passed, as [`Server::shutdown`](crate::Server::shutdown) does. One that is brought later is closed at once.
    ///
    /// # Cancel safety
    ///
    /// If the future is dropped, streams go on leaving, and none is cut.
    pub async fn shutdown(&self, deadline: Duration) -> ShutdownReport {
        let Cut { cut, blocked, unfinished, unhandled } = self.house.shut_down(deadline_in(deadline)).await;
        self.house.meter().publish();
        ShutdownReport { cut, blocked, unfinished, unhandled, received: self.stats() }
    }
}
