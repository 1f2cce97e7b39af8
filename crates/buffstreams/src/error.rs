//! The one error type of the library: opaque, with a kind to match on and a source to look into.

use std::convert::Infallible;
use std::error::Error as StdError;
use std::fmt;

use bytes::Bytes;

use crate::proto::framing::{FrameError, FramingError};

/// A result of this library.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong, and what is allowed or can be changed.
pub struct Error(Box<Inside>);

/// On the heap, so that a `Result` with an `Error` stays small where there is none.
struct Inside {
    kind: ErrorKind,
    message: String,
    source: Option<Box<dyn StdError + Send + Sync>>,
}

/// The kinds of [`Error`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The message is over the maximum message size.
    TooLarge,
    /// There is no room for the message now, and the call or the overflow policy does not wait.
    Full,
    /// The connection or server was closed, or has given up.
    Closed,
    /// The message was accepted, and given up later.
    Failed,
    /// What became of the message is not known: too many others have failed since, or it was sent on another connection.
    Forgotten,
    /// The address cannot be understood.
    InvalidAddress,
    /// The configuration contradicts itself.
    InvalidConfiguration,
    /// The peer cannot be reached.
    Connect,
    /// The address cannot be listened on.
    Bind,
    /// The manager holds this already.
    AlreadyOpen,
    /// The manager does not hold this.
    NotOpen,
    /// A certificate, a key or an authority cannot be read or used; or a TLS handshake failed, as with a peer whose
    /// certificate was refused, or that refused this side's.
    Tls,
    /// The spool cannot be opened, read or written.
    Spool,
    /// The operating system reported something else.
    Io,
}

impl Error {
    pub(crate) fn new(kind: ErrorKind, message: impl Into<String>) -> Error {
        Error(Box::new(Inside { kind, message: message.into(), source: None }))
    }

    pub(crate) fn because(mut self, source: impl Into<Box<dyn StdError + Send + Sync>>) -> Error {
        self.0.source = Some(source.into());
        self
    }

    /// What went wrong, to match on.
    pub fn kind(&self) -> ErrorKind {
        self.0.kind
    }

    /// Whether the connection or server no longer takes anything.
    pub fn is_closed(&self) -> bool {
        self.0.kind == ErrorKind::Closed
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.message)
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut debug = f.debug_struct("Error");
        debug.field("kind", &self.0.kind).field("message", &self.0.message);
        if let Some(source) = &self.0.source {
            debug.field("source", source);
        }
        debug.finish()
    }
}

impl StdError for Error {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.0.source.as_deref().map(|source| source as _)
    }
}

impl From<FramingError> for Error {
    fn from(error: FramingError) -> Error {
        Error::new(ErrorKind::InvalidConfiguration, error.to_string()).because(error)
    }
}

impl From<FrameError> for Error {
    fn from(error: FrameError) -> Error {
        let kind = match error {
            FrameError::TooLarge { .. } => ErrorKind::TooLarge,
            _ => ErrorKind::Io,
        };
        Error::new(kind, error.to_string()).because(error)
    }
}

impl From<Infallible> for Error {
    fn from(never: Infallible) -> Error {
        match never {}
    }
}

impl From<Error> for std::io::Error {
    fn from(error: Error) -> std::io::Error {
        let kind = match error.0.kind {
            ErrorKind::TooLarge | ErrorKind::InvalidAddress | ErrorKind::InvalidConfiguration => {
                std::io::ErrorKind::InvalidInput
            }
            ErrorKind::Full => std::io::ErrorKind::WouldBlock,
            ErrorKind::Closed | ErrorKind::Failed | ErrorKind::Forgotten => std::io::ErrorKind::BrokenPipe,
            ErrorKind::Connect => std::io::ErrorKind::NotConnected,
            ErrorKind::Bind | ErrorKind::AlreadyOpen => std::io::ErrorKind::AddrInUse,
            ErrorKind::NotOpen => std::io::ErrorKind::NotFound,
            ErrorKind::Tls | ErrorKind::Spool | ErrorKind::Io => std::io::ErrorKind::Other,
        };
        std::io::Error::new(kind, error)
    }
}

/// A message that was not accepted, back with its owner.
#[derive(Debug)]
#[non_exhaustive]
pub struct Refused {
    /// Why it was not accepted.
    pub error: Error,
    /// The message.
    pub message: Bytes,
}

impl Refused {
    pub(crate) fn new(error: Error, message: Bytes) -> Refused {
        Refused { error, message }
    }
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "message of {} bytes refused: {}", self.message.len(), self.error)
    }
}

impl StdError for Refused {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        Some(&self.error)
    }
}

impl From<Refused> for Error {
    fn from(refused: Refused) -> Error {
        refused.error
    }
}
