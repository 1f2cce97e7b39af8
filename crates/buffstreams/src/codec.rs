//! A framing as an encoder and decoder of tokio-util, for code that has its own `Framed`.
//!
//! The same bytes and the same errors as everywhere else. A message is cut out of the buffer that it was read into,
//! without a copy; that buffer grows with bytes received, and never with the length declared.

use std::io;

use bytes::{Buf, Bytes, BytesMut};
use tokio_util::codec::{Decoder, Encoder};

use crate::proto::framing::{FrameError, Framing};

/// The least by which the buffer grows for an incomplete message, in bytes; from there on it doubles.
const GROWTH: usize = 64 * 1024;

/// With the feature `codec`. Errors are `io::Error`s of the kind `InvalidInput`, around a [`FrameError`].
///
/// ```
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> std::io::Result<()> {
/// use buffstreams::{Framing, Prefix};
/// use futures_util::{SinkExt, StreamExt};
/// use tokio_util::codec::Framed;
///
/// let framing = Framing::new(Prefix::Varint);
/// let (near, far) = tokio::io::duplex(1024);
/// let (mut near, mut far) = (Framed::new(near, framing), Framed::new(far, framing));
/// near.send(b"hello").await?;
/// assert_eq!(far.next().await.unwrap()?, "hello");
/// # Ok(()) }
/// ```
impl<B: AsRef<[u8]>> Encoder<B> for Framing {
    type Error = io::Error;

    fn encode(&mut self, message: B, out: &mut BytesMut) -> io::Result<()> {
        let message = message.as_ref();
        self.check(message.len()).map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error))?;
        let (prefix, width) = self.prefix_bytes(message.len());
        out.reserve(width + message.len());
        out.extend_from_slice(&prefix[..width]);
        out.extend_from_slice(message);
        Ok(())
    }
}

/// With the feature `codec`. Errors are `io::Error`s around a [`FrameError`]: of the kind `UnexpectedEof` if the stream
/// ended inside a frame, else `InvalidData`. After either, the stream cannot be read any further.
impl Decoder for Framing {
    type Item = Bytes;
    type Error = io::Error;

    fn decode(&mut self, buffer: &mut BytesMut) -> io::Result<Option<Bytes>> {
        let header = match self.header(buffer) {
            Ok(Some(header)) => header,
            Ok(None) => return Ok(None),
            Err(error) => return Err(malformed(error)),
        };
        if buffer.len() < header.frame() {
            let missing = header.frame() - buffer.len();
            buffer.reserve(missing.min(buffer.len().max(GROWTH)));
            return Ok(None);
        }
        buffer.advance(header.prefix);
        Ok(Some(buffer.split_to(header.message).freeze()))
    }

    fn decode_eof(&mut self, buffer: &mut BytesMut) -> io::Result<Option<Bytes>> {
        match Decoder::decode(self, buffer)? {
            None if !buffer.is_empty() => Err(malformed(self.truncated(buffer))),
            next => Ok(next),
        }
    }
}

fn malformed(error: FrameError) -> io::Error {
    let kind = match error {
        FrameError::Truncated { .. } | FrameError::TruncatedPrefix { .. } => io::ErrorKind::UnexpectedEof,
        _ => io::ErrorKind::InvalidData,
    };
    io::Error::new(kind, error)
}
