//! An open TLS stream that knows how much of what it took has gone.
//!
//! rustls encrypts more than the kernel takes, and keeps the rest. A message counts as settled once the kernel has all of its
//! ciphertext, and not before: so messages are encrypted record by record, and of each record that may wait its ciphertext is
//! counted. A record of which the kernel took only a part never arrives, for it is authenticated as a whole.

use std::io::{self, IoSlice, Write};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use rustls::{ConnectionCommon, SideData};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::{identity, refusal};
use crate::transport::{PeerIdentity, Transport};

/// The most plaintext that one record has, in bytes.
const RECORD: usize = 16 * 1024;

/// How many records are encrypted before they are passed on together.
const RECORDS: usize = 4;

/// An open stream whose handshake is over.
pub(crate) struct TlsStream {
    io: tokio_rustls::TlsStream<Transport>,
    identity: Option<PeerIdentity>,
    /// Records that were encrypted and may not be passed on yet, in their order.
    sealed: Vec<Sealed>,
    /// Bytes of ciphertext that wait to be passed on.
    waiting: usize,
}

#[derive(Clone, Copy)]
struct Sealed {
    plaintext: usize,
    ciphertext: usize,
}

impl TlsStream {
    pub(super) fn new(io: impl Into<tokio_rustls::TlsStream<Transport>>) -> Box<TlsStream> {
        let io = io.into();
        let (_, connection) = io.get_ref();
        let identity = connection.peer_certificates().and_then(|chain| identity(chain.first()?));
        let mut stream = Box::new(TlsStream { io, identity, sealed: Vec::new(), waiting: 0 });
        let (_, session) = stream.parts();
        // How much waits is bounded here, by whole records.
        session.lift_limit();
        stream.waiting = session.waiting();
        stream
    }

    /// Whom the peer has proved to be.
    pub(crate) fn identity(&self) -> Option<&PeerIdentity> {
        self.identity.as_ref()
    }

    /// How many of the last bytes that were taken are in records that have not wholly gone.
    pub(crate) fn held(&mut self) -> usize {
        if self.sealed.is_empty() {
            return 0;
        }
        let mut waiting = self.parts().1.waiting();
        let held = self.sealed.iter().rev().take_while(|record| {
            let is_held = waiting > 0;
            waiting = waiting.saturating_sub(record.ciphertext);
            is_held
        });
        held.map(|record| record.plaintext).sum()
    }

    fn parts(&mut self) -> (&mut Transport, &mut dyn Session) {
        match &mut self.io {
            tokio_rustls::TlsStream::Client(stream) => {
                let (io, session) = stream.get_mut();
                (io, &mut **session)
            }
            tokio_rustls::TlsStream::Server(stream) => {
                let (io, session) = stream.get_mut();
                (io, &mut **session)
            }
        }
    }

    /// Encrypts a record; returns how many bytes are in it.
    fn seal(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let (_, session) = self.parts();
        let plaintext = session.seal(&bytes[..bytes.len().min(RECORD)])?;
        let waiting = session.waiting();
        self.sealed.push(Sealed { plaintext, ciphertext: waiting.saturating_sub(self.waiting) });
        self.waiting = waiting;
        Ok(plaintext)
    }

    /// Passes on what is encrypted; ready when all of it has gone.
    fn poll_pass_on(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        loop {
            let (io, session) = self.parts();
            if !session.wants_write() {
                break;
            }
            match session.write_tls(&mut Onward { io, cx }) {
                Ok(0) => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                // Reading may have put an alert behind it, which was not counted.
                Ok(written) => self.waiting = self.waiting.saturating_sub(written),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Poll::Pending,
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
        self.waiting = 0;
        self.sealed.clear();
        Poll::Ready(Ok(()))
    }
}

impl AsyncRead for TlsStream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().io).poll_read(cx, buffer).map_err(|error| match error.kind() {
            // Anybody on the way can end the TCP stream; only the peer can end the TLS stream.
            io::ErrorKind::UnexpectedEof => {
                let text = "truncated: the TCP stream ended before the TLS stream (no close_notify came)";
                io::Error::new(io::ErrorKind::UnexpectedEof, text)
            }
            io::ErrorKind::InvalidData => io::Error::new(io::ErrorKind::InvalidData, refusal::words(&error)),
            _ => error,
        })
    }
}

impl AsyncWrite for TlsStream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(cx, &[IoSlice::new(bytes)])
    }

    /// What was taken is passed on by the next call, of whichever function.
    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let stream = self.get_mut();
        ready!(stream.poll_pass_on(cx))?;
        let mut taken = 0;
        for slice in slices {
            let mut rest = &slice[..];
            while !rest.is_empty() {
                if stream.sealed.len() == RECORDS && !matches!(stream.poll_pass_on(cx), Poll::Ready(Ok(()))) {
                    // If it failed, the next call fails, too.
                    return Poll::Ready(Ok(taken));
                }
                let sealed = stream.seal(rest)?;
                taken += sealed;
                rest = &rest[sealed..];
            }
        }
        Poll::Ready(Ok(taken))
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let stream = self.get_mut();
        ready!(stream.poll_pass_on(cx))?;
        Pin::new(stream.parts().0).poll_flush(cx)
    }

    /// Ends the stream. What is held is not passed on any more: whoever leaves it behind sends it again elsewhere. Then the
    /// peer misses the end of the TLS stream, too, and knows that something is missing.
    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let stream = self.get_mut();
        match stream.held() {
            0 => Pin::new(&mut stream.io).poll_shutdown(cx),
            _ => Pin::new(stream.parts().0).poll_shutdown(cx),
        }
    }
}

/// What rustls does for either side.
trait Session {
    fn lift_limit(&mut self);
    fn seal(&mut self, bytes: &[u8]) -> io::Result<usize>;
    fn wants_write(&self) -> bool;
    fn write_tls(&mut self, to: &mut dyn Write) -> io::Result<usize>;

    /// How many bytes of ciphertext wait to be written.
    fn waiting(&mut self) -> usize {
        let mut scale = Scale(0);
        // Nothing is written there, so nothing is gone.
        let _ = self.write_tls(&mut scale);
        scale.0
    }
}

impl<Side: SideData> Session for ConnectionCommon<Side> {
    fn lift_limit(&mut self) {
        self.set_buffer_limit(None);
    }

    fn seal(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self.writer().write(bytes)? {
            0 => Err(io::ErrorKind::WriteZero.into()),
            taken => Ok(taken),
        }
    }

    fn wants_write(&self) -> bool {
        rustls::CommonState::wants_write(self)
    }

    fn write_tls(&mut self, to: &mut dyn Write) -> io::Result<usize> {
        ConnectionCommon::write_tls(self, to)
    }
}

/// Sees how much there is to be written, and takes none of it.
struct Scale(usize);

impl Write for Scale {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.write_vectored(&[IoSlice::new(bytes)])
    }

    fn write_vectored(&mut self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        self.0 = slices.iter().map(|slice| slice.len()).sum();
        Err(io::ErrorKind::WouldBlock.into())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Passes on to a transport what it takes at once.
struct Onward<'a, 'c> {
    io: &'a mut Transport,
    cx: &'a mut Context<'c>,
}

impl Onward<'_, '_> {
    fn at_once(polled: Poll<io::Result<usize>>) -> io::Result<usize> {
        match polled {
            Poll::Ready(result) => result,
            Poll::Pending => Err(io::ErrorKind::WouldBlock.into()),
        }
    }
}

impl Write for Onward<'_, '_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        Self::at_once(Pin::new(&mut *self.io).poll_write(self.cx, bytes))
    }

    fn write_vectored(&mut self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        Self::at_once(Pin::new(&mut *self.io).poll_write_vectored(self.cx, slices))
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
