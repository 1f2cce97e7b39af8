//! A framing in somebody else's `Framed`.
#![cfg(feature = "codec")]

use std::io::ErrorKind;

use buffstreams::{Bytes, Connection, FrameError, Framing, HandlerResult, Listener, Message, Peer, Prefix};
use futures_util::{SinkExt, StreamExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_util::bytes::BytesMut;
use tokio_util::codec::{Decoder, Encoder, Framed};

use crate::support::{PATIENCE, in_time};

fn every_framing() -> impl Iterator<Item = Framing> {
    Prefix::ALL.into_iter().flat_map(|prefix| {
        [1, 255, 256, 300, 65_535, 65_536, 100_000]
            .into_iter()
            .filter_map(move |max| Framing::with_max(prefix, max).ok())
    })
}

fn encoded(framing: Framing, message: &[u8]) -> BytesMut {
    let mut out = BytesMut::new();
    Encoder::encode(&mut { framing }, message, &mut out).unwrap();
    out
}

fn decode(mut framing: Framing, bytes: &mut BytesMut) -> std::io::Result<Option<Bytes>> {
    Decoder::decode(&mut framing, bytes)
}

fn frame_error(error: &std::io::Error) -> &FrameError {
    error.get_ref().unwrap().downcast_ref().unwrap()
}

#[test]
fn it_writes_the_same_bytes_as_everything_else_here() {
    for framing in every_framing() {
        for length in [0, 1, 127, 128, framing.max_message_size()] {
            let message = vec![7; length.min(framing.max_message_size())];
            let mut expected = Vec::new();
            framing.encode(&message, &mut expected).unwrap();
            assert_eq!(encoded(framing, &message), expected, "{framing:?} {length}");
        }
    }
}

#[test]
fn messages_come_out_whole_wherever_the_reads_are_split() {
    for framing in every_framing() {
        let messages = [&b""[..], b"a", &vec![3; framing.max_message_size().min(300)], b""];
        let mut bytes = BytesMut::new();
        for message in messages {
            bytes.extend_from_slice(&encoded(framing, message));
        }
        for step in [1, 2, 3, 7, bytes.len()] {
            let mut received = Vec::new();
            let mut buffer = BytesMut::new();
            for read in bytes.chunks(step) {
                buffer.extend_from_slice(read);
                while let Some(message) = decode(framing, &mut buffer).unwrap() {
                    received.push(message);
                }
            }
            assert_eq!(received, messages, "{framing:?} in steps of {step}");
            assert!(Decoder::decode_eof(&mut { framing }, &mut buffer).unwrap().is_none());
        }
    }
}

#[test]
fn a_message_over_the_maximum_is_refused_on_both_sides() {
    for framing in every_framing() {
        let max = framing.max_message_size();
        let mut out = BytesMut::new();
        let error = Encoder::encode(&mut { framing }, vec![0; max + 1], &mut out).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidInput);
        assert_eq!(frame_error(&error), &FrameError::TooLarge { declared: max as u64 + 1, max });
        assert!(out.is_empty());
    }
    let framing = Framing::with_max(Prefix::U32Be, 10).unwrap();
    let error = decode(framing, &mut BytesMut::from(&[0, 0, 0, 11][..])).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidData);
    assert_eq!(frame_error(&error), &FrameError::TooLarge { declared: 11, max: 10 });
}

#[test]
fn the_end_of_a_stream_inside_a_frame_is_an_error() {
    let framing = Framing::new(Prefix::Varint);
    let mut whole = encoded(framing, b"hello");
    let mut torn = whole.split_to(3);
    let error = Decoder::decode_eof(&mut { framing }, &mut torn).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::UnexpectedEof);
    assert_eq!(frame_error(&error), &FrameError::Truncated { got: 2, want: 5 });

    let framing = Framing::new(Prefix::U32Be);
    let error = Decoder::decode_eof(&mut { framing }, &mut BytesMut::from(&[0, 0][..])).unwrap_err();
    assert_eq!(frame_error(&error), &FrameError::TruncatedPrefix { got: 2 });
}

#[test]
fn a_message_is_not_copied_out_of_its_buffer() {
    let framing = Framing::default();
    let mut buffer = encoded(framing, &[1; 1000]);
    let there = buffer.as_ptr() as usize..buffer.as_ptr() as usize + buffer.len();
    let message = decode(framing, &mut buffer).unwrap().unwrap();
    assert!(there.contains(&(message.as_ptr() as usize)));
}

#[test]
fn memory_grows_with_what_was_received_and_not_with_what_was_declared() {
    let framing = Framing::with_max(Prefix::U32Be, u32::MAX as usize).unwrap();
    let mut buffer = BytesMut::from(&u32::MAX.to_be_bytes()[..]);
    let mut received = buffer.len();
    for _ in 0..20 {
        assert!(decode(framing, &mut buffer).unwrap().is_none());
        let room = buffer.capacity();
        assert!(room <= 256 * 1024 + 4 * received, "{room} bytes are held for {received} received");
        let read = (room - buffer.len()).min(100_000);
        assert!(read > 0, "there is room to read into");
        buffer.extend_from_slice(&vec![0; read]);
        received += read;
    }
}

#[tokio::test]
async fn framed_understands_a_listener_and_a_connection() {
    // A Framed asks, and a listener answers.
    let service = buffstreams::per_connection(|peer: &Peer| Echo(peer.clone()));
    let server = Listener::bind("127.0.0.1:0").await.unwrap().spawn(service);
    let stream = TcpStream::connect(server.local_address().to_string()).await.unwrap();
    let mut framed = Framed::new(stream, Framing::default());
    framed.send(&b"hello"[..]).await.unwrap();
    framed.send(&b""[..]).await.unwrap();
    assert_eq!(in_time("an answer", framed.next()).await.unwrap().unwrap(), "hello");
    assert_eq!(in_time("an answer", framed.next()).await.unwrap().unwrap(), "");
    SinkExt::<Bytes>::close(&mut framed).await.unwrap();
    assert!(in_time("the end", framed.next()).await.is_none());
    let report = in_time("a shutdown", server.shutdown(PATIENCE)).await;
    assert_eq!((report.received.messages, report.received.broken), (2, 0));

    // A connection sends, and a Framed listens.
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let connection = Connection::dial(listener.local_addr().unwrap()).await.unwrap();
    let mut framed = Framed::new(listener.accept().await.unwrap().0, Framing::default());
    connection.send(&[9; 4096]).await.unwrap();
    assert_eq!(in_time("a message", framed.next()).await.unwrap().unwrap(), vec![9; 4096]);
}

struct Echo(Peer);

impl buffstreams::Handler for Echo {
    fn message(&mut self, message: Message<'_>) -> HandlerResult {
        self.0.sender().try_send(&message)?;
        Ok(())
    }
}
