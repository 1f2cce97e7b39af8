//! gRPC by tonic: a client stream for each connection; for the ping-pong a stream both ways.

use std::net::SocketAddr;
use std::time::Instant;

use bytes::Bytes;
use futures_util::future::{BoxFuture, join_all};
use futures_util::stream::{self, BoxStream};
use futures_util::{FutureExt, Stream, StreamExt};
use hdrhistogram::Histogram;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;
use tonic::transport::server::TcpIncoming;
use tonic::transport::{Channel, Endpoint, Server};
use tonic::{Request, Response, Status, Streaming};

use crate::Result;
use crate::load::{Load, Work};
use crate::note::{self, Note};
use crate::system::{Runner, System};
use crate::tally::Tally;
use crate::worker::{Done, Gate, Receiving};

pub(crate) const SYSTEM: System = System {
    name: "tonic",
    about: "gRPC by tonic: client streaming over HTTP/2, one stream for each connection",
    version: || env!("VERSION_OF_TONIC").to_owned(),
    settings: "client streaming (grpc.io/docs/guides/performance: streaming for a long-lived flow of data); HTTP/2 \
               windows of 1 MiB for a stream and a connection, the fastest of those tried, and frames of up to 1 MiB \
               (docs.rs/tonic/latest/tonic/transport/server/struct.Server.html); messages of any size; TCP_NODELAY; \
               the payload is a bytes field of type Bytes, which is not copied",
    part: 0.4,
    reads_messages: true,
    runner: Some(&Tonic),
    feature: "",
};

const WINDOW: u32 = 1024 * 1024;
const HTTP_FRAME: u32 = 1024 * 1024;

/// The client and the server that `build.rs` generates.
mod service {
    #![allow(clippy::all, elided_lifetimes_in_paths, missing_docs, missing_debug_implementations, unreachable_pub)]
    include!(concat!(env!("OUT_DIR"), "/compare.Sink.rs"));
}

use service::sink_client::SinkClient;
use service::sink_server::{Sink, SinkServer};

/// A message of bytes.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct Parcel {
    #[prost(bytes = "bytes", tag = "1")]
    data: Bytes,
}

/// The reply to all of them.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct Taken {
    #[prost(uint64, tag = "1")]
    messages: u64,
}

struct Tonic;

impl Runner for Tonic {
    fn receive(&self, load: Load, tally: Tally) -> BoxFuture<'static, Result<Receiving>> {
        let _ = load;
        async move {
            let incoming = TcpIncoming::bind("127.0.0.1:0".parse()?)?.with_nodelay(Some(true));
            let address = incoming.local_addr()?;
            let service = SinkServer::new(Counting { tally })
                .max_decoding_message_size(usize::MAX)
                .max_encoding_message_size(usize::MAX);
            let server = Server::builder()
                .initial_stream_window_size(WINDOW)
                .initial_connection_window_size(WINDOW)
                .max_frame_size(HTTP_FRAME)
                .add_service(service)
                .serve_with_incoming(incoming);
            Ok(Receiving { address, at_work: Box::new(tokio::spawn(server)) })
        }
        .boxed()
    }

    fn send<'a>(&'a self, load: Load, receiver: SocketAddr, gate: &'a mut Gate) -> BoxFuture<'a, Result<Done>> {
        match load.work {
            Work::Stream | Work::Notes => send(load, receiver, gate).boxed(),
            Work::PingPong => ping(load, receiver, gate).boxed(),
            Work::Idle => idle(load, receiver, gate).boxed(),
        }
    }
}

struct Counting {
    tally: Tally,
}

#[tonic::async_trait]
impl Sink for Counting {
    async fn take(&self, parcels: Request<Streaming<Parcel>>) -> Result<Response<Taken>, Status> {
        let mut parcels = parcels.into_inner();
        let mut counter = self.tally.counter();
        let mut messages = 0;
        while let Some(parcel) = parcels.message().await? {
            counter.message(&parcel.data);
            messages += 1;
        }
        Ok(Response::new(Taken { messages }))
    }

    async fn take_notes(&self, notes: Request<Streaming<Note>>) -> Result<Response<Taken>, Status> {
        let mut notes = notes.into_inner();
        let mut counter = self.tally.counter();
        let mut messages = 0;
        while let Some(note) = notes.message().await? {
            let (length, touched) = note::seen(&note.name, &note.comment);
            counter.count(length, touched);
            messages += 1;
        }
        Ok(Response::new(Taken { messages }))
    }

    type EchoStream = BoxStream<'static, Result<Parcel, Status>>;

    async fn echo(&self, parcels: Request<Streaming<Parcel>>) -> Result<Response<Self::EchoStream>, Status> {
        let mut counter = self.tally.counter();
        let answers = parcels.into_inner().inspect(move |parcel| {
            if let Ok(parcel) = parcel {
                counter.message(&parcel.data);
            }
        });
        Ok(Response::new(answers.boxed()))
    }
}

async fn connect(receiver: SocketAddr) -> Result<SinkClient<Channel>> {
    let endpoint = Endpoint::from_shared(format!("http://{receiver}"))?
        .tcp_nodelay(true)
        .initial_stream_window_size(WINDOW)
        .initial_connection_window_size(WINDOW);
    let client = SinkClient::new(endpoint.connect().await?);
    Ok(client.max_encoding_message_size(usize::MAX).max_decoding_message_size(usize::MAX))
}

/// A call under way: its first message is sent at once, the others after `go`.
struct Call {
    go: oneshot::Sender<()>,
    taken: JoinHandle<Result<Taken>>,
}

/// A message at once, and so many more when it is told to go.
fn messages<M: Clone + Send + 'static>(
    message: M,
    share: u64,
    go: oneshot::Receiver<()>,
) -> impl Stream<Item = M> + Send + 'static {
    let hello = stream::iter([message.clone()]);
    let rest = go.map(move |_| stream::iter(std::iter::repeat_n(message, share as usize))).flatten_stream();
    hello.chain(rest)
}

async fn call(load: Load, receiver: SocketAddr, share: u64) -> Result<Call> {
    let mut client = connect(receiver).await?;
    let (go, gone) = oneshot::channel();
    let taken = tokio::spawn(async move {
        let taken = match load.work {
            Work::Notes => client.take_notes(messages(note::note(), share, gone)).await?,
            _ => {
                let parcel = Parcel { data: Bytes::from_static(load.message().leak()) };
                client.take(messages(parcel, share, gone)).await?
            }
        };
        Ok(taken.into_inner())
    });
    Ok(Call { go, taken })
}

async fn send(load: Load, receiver: SocketAddr, gate: &mut Gate) -> Result<Done> {
    let mut calls = Vec::new();
    for index in 0..load.connections {
        calls.push(call(load, receiver, load.sent_share(index)).await?);
    }
    gate.pass()?;
    let taking: Vec<_> = calls
        .into_iter()
        .map(|Call { go, taken }| {
            let _ = go.send(());
            taken
        })
        .collect();
    for taken in join_all(taking).await {
        taken??;
    }
    Ok(Done::default())
}

async fn idle(load: Load, receiver: SocketAddr, gate: &mut Gate) -> Result<Done> {
    let mut calls = Vec::new();
    for _ in 0..load.hello() {
        calls.push(call(load, receiver, 0).await?);
    }
    gate.pass()?;
    for _ in 0..load.sent_messages() {
        calls.push(call(load, receiver, 0).await?);
    }
    Ok(Done { connections: Some(Box::new(calls)), round_trips: None })
}

async fn ping(load: Load, receiver: SocketAddr, gate: &mut Gate) -> Result<Done> {
    let mut client = connect(receiver).await?;
    let parcel = Parcel { data: Bytes::from(load.message()) };
    let (pings, pinged) = mpsc::channel(1);
    let outbound = stream::unfold(pinged, async |mut pinged| Some((pinged.recv().await?, pinged)));
    pings.send(parcel.clone()).await?;
    let mut answers = client.echo(outbound).await?.into_inner();
    answers.message().await?.ok_or("the receiver ended the call")?;
    let mut round = async || -> Result<()> {
        pings.send(parcel.clone()).await?;
        answers.message().await?.ok_or("the receiver ended the call")?;
        Ok(())
    };
    for _ in 1..load.hello() {
        round().await?;
    }
    gate.pass()?;
    let mut times = Histogram::new(3)?;
    for _ in 0..load.sent_messages() {
        let start = Instant::now();
        round().await?;
        times.record(start.elapsed().as_nanos() as u64)?;
    }
    Ok(Done { round_trips: Some(times), connections: None })
}
