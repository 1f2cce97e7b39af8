//! tokio-util's `LengthDelimitedCodec`, what one would take without this project: tuned, and as it is mostly used.

use std::net::SocketAddr;
use std::time::Instant;

use bytes::{Bytes, BytesMut};
use futures_util::future::BoxFuture;
use futures_util::{FutureExt, SinkExt, StreamExt};
use hdrhistogram::Histogram;
use prost::Message;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio_util::codec::{Framed, LengthDelimitedCodec};

use crate::load::{Load, Work};
use crate::note::{self, Note};
use crate::system::{Runner, System};
use crate::tally::{Counter, Tally};
use crate::worker::{Done, Gate, Receiving};
use crate::{Error, Result};

pub(crate) const SYSTEM: System = System {
    name: "tokio-codec",
    about: "tokio-util's LengthDelimitedCodec, tuned: messages are fed and written together",
    version: || env!("VERSION_OF_TOKIO_UTIL").to_owned(),
    settings: "Framed::with_capacity(256 KiB), which is also its backpressure boundary (more than 256 connections: 64 \
               MiB for all together); SinkExt::feed for each message, one flush at the end; messages are static \
               Bytes, whose clones cost nothing; \
               docs.rs/tokio-util/latest/tokio_util/codec/struct.Framed.html#method.with_capacity, \
               docs.rs/futures/latest/futures/sink/trait.SinkExt.html#method.feed",
    part: 1.0,
    reads_messages: true,
    runner: Some(&Codec { feed: true }),
    feature: "",
};

pub(crate) const EACH: System = System {
    name: "tokio-codec-send",
    about: "tokio-util's LengthDelimitedCodec as it is mostly used: send, and so a write, for each message",
    settings: "defaults; SinkExt::send for each message, as in \
               docs.rs/tokio-util/latest/tokio_util/codec/length_delimited/index.html",
    part: 0.04,
    runner: Some(&Codec { feed: false }),
    ..SYSTEM
};

/// What a connection's buffers hold before they are written; of one, and of all together.
const BOUNDARY: usize = 256 * 1024;
const BOUNDARY_OF_ALL: usize = 64 * 1024 * 1024;

/// Protobuf messages are encoded into pieces of a buffer of this size.
const ENCODED: usize = 64 * 1024;

type Stream = Framed<TcpStream, LengthDelimitedCodec>;

struct Codec {
    feed: bool,
}

impl Runner for Codec {
    fn receive(&self, load: Load, tally: Tally) -> BoxFuture<'static, Result<Receiving>> {
        let tuned = self.feed;
        async move {
            let listener = TcpListener::bind("127.0.0.1:0").await?;
            let address = listener.local_addr()?;
            let accepting = tokio::spawn(async move {
                while let Ok((stream, _)) = listener.accept().await {
                    if let Ok(stream) = framed(stream, &load, tuned) {
                        tokio::spawn(receive(stream, load, tally.counter()));
                    }
                }
            });
            Ok(Receiving { address, at_work: Box::new(accepting) })
        }
        .boxed()
    }

    fn send<'a>(&'a self, load: Load, receiver: SocketAddr, gate: &'a mut Gate) -> BoxFuture<'a, Result<Done>> {
        match load.work {
            Work::Stream | Work::Notes => send(self.feed, load, receiver, gate).boxed(),
            Work::PingPong => ping(self.feed, load, receiver, gate).boxed(),
            Work::Idle => idle(self.feed, load, receiver, gate).boxed(),
        }
    }
}

fn framed(stream: TcpStream, load: &Load, tuned: bool) -> Result<Stream> {
    stream.set_nodelay(true)?;
    let codec = LengthDelimitedCodec::builder().max_frame_length(load.size.max(8 * 1024 * 1024)).new_codec();
    Ok(match (tuned, load.work) {
        (true, Work::Stream | Work::Notes) => {
            Framed::with_capacity(stream, codec, BOUNDARY.min(BOUNDARY_OF_ALL / load.connections))
        }
        _ => Framed::new(stream, codec),
    })
}

async fn receive(mut stream: Stream, load: Load, mut counter: Counter) {
    while let Some(Ok(message)) = stream.next().await {
        if load.work == Work::Notes {
            let Ok(note) = Note::decode(message) else { break };
            let (length, touched) = note::seen(&note.name, &note.comment);
            counter.count(length, touched);
        } else {
            counter.message(&message);
            if load.work == Work::PingPong && stream.send(message.freeze()).await.is_err() {
                break;
            }
        }
    }
}

/// Connections that have carried one message each.
async fn connect(tuned: bool, load: &Load, receiver: SocketAddr, count: usize) -> Result<Vec<Stream>> {
    let hello = match load.work {
        Work::Notes => Bytes::from(note::note().encode_to_vec()),
        _ => Bytes::from(load.message()),
    };
    let mut streams = Vec::new();
    for _ in 0..count {
        let mut stream = framed(TcpStream::connect(receiver).await?, load, tuned)?;
        stream.send(hello.clone()).await?;
        streams.push(stream);
    }
    Ok(streams)
}

async fn send(feed: bool, load: Load, receiver: SocketAddr, gate: &mut Gate) -> Result<Done> {
    let message = Bytes::from_static(load.message().leak());
    let streams = connect(feed, &load, receiver, load.connections).await?;
    gate.pass()?;
    let mut sending = JoinSet::new();
    for (index, mut stream) in streams.into_iter().enumerate() {
        let (message, share) = (message.clone(), load.sent_share(index));
        sending.spawn(async move {
            if load.work == Work::Notes {
                let note = note::note();
                let mut encoded = BytesMut::with_capacity(ENCODED);
                for _ in 0..share {
                    note.encode(&mut encoded)?;
                    stream.feed(encoded.split().freeze()).await?;
                }
            } else if feed {
                for _ in 0..share {
                    stream.feed(message.clone()).await?;
                }
            } else {
                for _ in 0..share {
                    stream.send(message.clone()).await?;
                }
            }
            SinkExt::<Bytes>::flush(&mut stream).await?;
            Ok::<_, Error>(())
        });
    }
    while let Some(sent) = sending.join_next().await {
        sent??;
    }
    Ok(Done::default())
}

async fn idle(tuned: bool, load: Load, receiver: SocketAddr, gate: &mut Gate) -> Result<Done> {
    let mut streams = connect(tuned, &load, receiver, load.hello() as usize).await?;
    gate.pass()?;
    streams.extend(connect(tuned, &load, receiver, load.sent_messages() as usize).await?);
    Ok(Done { connections: Some(Box::new(streams)), round_trips: None })
}

async fn ping(tuned: bool, load: Load, receiver: SocketAddr, gate: &mut Gate) -> Result<Done> {
    let message = Bytes::from_static(load.message().leak());
    let mut stream = framed(TcpStream::connect(receiver).await?, &load, tuned)?;
    for _ in 0..load.hello() {
        round(&mut stream, &message).await?;
    }
    gate.pass()?;
    let rounds = load.sent_messages();
    let times = tokio::spawn(async move {
        let mut times = Histogram::new(3)?;
        for _ in 0..rounds {
            let start = Instant::now();
            round(&mut stream, &message).await?;
            times.record(start.elapsed().as_nanos() as u64)?;
        }
        Ok::<_, Error>(times)
    });
    Ok(Done { round_trips: Some(times.await??), connections: None })
}

async fn round(stream: &mut Stream, message: &Bytes) -> Result<()> {
    stream.send(message.clone()).await?;
    stream.next().await.ok_or("the receiver ended the connection")??;
    Ok(())
}
