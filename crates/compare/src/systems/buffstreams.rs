//! This project's own library, as its first page shows it: `send(..).await` for each message, a handler that reads
//! each.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use buffstreams::{
    Connection, Delivery, Framing, Handler, HandlerResult, Listener, Message, Peer, Prefix, Service, TlsClient,
    TlsServer, per_connection, typed,
};
use bytes::Bytes;
use futures_util::FutureExt;
use futures_util::future::{BoxFuture, join_all};
use hdrhistogram::Histogram;
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use crate::load::{Load, Work};
use crate::note::views::{self, NoteView};
use crate::note::{self, Note};
use crate::system::{Runner, System};
use crate::systems::raw_tls::{certificate_of, make_certificate, remove_certificate};
use crate::tally::{Counter, Tally};
use crate::worker::{Done, Gate, Receiving};
use crate::{Error, Result};

pub(crate) const SYSTEM: System = System {
    name: "buffstreams",
    about: "this project: one send for each message, a callback that reads each; protobuf as views (buffa)",
    version: || env!("VERSION_OF_BUFFSTREAMS").to_owned(),
    settings: "defaults; messages over 4 KiB: the maximum raised to their size on both sides; from 32 KiB on sent \
               with send_bytes, which does not copy; more than one connection: 256 KiB of memory for each, as \
               `ConnectionBuilder::memory` advises; \
               ping-pong: each side's handler answers with try_send",
    part: 1.0,
    reads_messages: true,
    runner: Some(&BuffStreams { kind: Kind::Views }),
    feature: "",
};

pub(crate) const PROST: System = System {
    name: "buffstreams-prost",
    about: "this project, with protobuf messages that the receiver owns (prost)",
    version: || format!("{} (prost {})", env!("VERSION_OF_BUFFSTREAMS"), env!("VERSION_OF_PROST")),
    settings: "as buffstreams",
    runner: Some(&BuffStreams { kind: Kind::Prost }),
    ..SYSTEM
};

pub(crate) const ACKED: System = System {
    name: "buffstreams-acked",
    about: "this project with Delivery::Acked: a message is settled when the receiver says that its handler has returned",
    settings: "as buffstreams, and a window of 4 MiB",
    runner: Some(&BuffStreams { kind: Kind::Acked }),
    ..SYSTEM
};

pub(crate) const TLS: System = System {
    name: "buffstreams-tls",
    about: "this project over TLS 1.3",
    settings: "as buffstreams; ring",
    runner: Some(&BuffStreams { kind: Kind::Tls }),
    ..SYSTEM
};

/// From this size on a message is handed over instead of copied.
const LARGE: usize = 32 * 1024;

/// Memory for messages in hand: of a connection alone, which is the default, and of one among many.
const MEMORY: usize = 4 * 1024 * 1024;
const MEMORY_AMONG_MANY: usize = 256 * 1024;

const CLOSING: Duration = Duration::from_secs(60);

/// How protobuf messages are encoded and decoded, and how messages are delivered.
#[derive(Clone, Copy)]
enum Kind {
    Views,
    Prost,
    /// Messages of bytes, acknowledged.
    Acked,
    /// Messages of bytes, over TLS.
    Tls,
}

impl Kind {
    fn delivery(self) -> Delivery {
        match self {
            Kind::Acked => Delivery::Acked,
            Kind::Views | Kind::Prost | Kind::Tls => Delivery::Sent,
        }
    }
}

struct BuffStreams {
    kind: Kind,
}

impl Runner for BuffStreams {
    fn receive(&self, load: Load, tally: Tally) -> BoxFuture<'static, Result<Receiving>> {
        let kind = self.kind;
        async move {
            match (load.work, kind) {
                (Work::Stream, Kind::Tls) => {
                    serve_tls(load, per_connection(move |_: &Peer| Count(tally.counter()))).await
                }
                (Work::Stream | Work::Idle, _) => {
                    serve(load, per_connection(move |_: &Peer| Count(tally.counter()))).await
                }
                (Work::PingPong, _) => {
                    let answer = move |peer: &Peer| Answer { counter: tally.counter(), peer: peer.clone() };
                    serve(load, per_connection(answer)).await
                }
                (Work::Notes, Kind::Views | Kind::Acked | Kind::Tls) => {
                    let service = typed::buffa::per_connection::<views::Note, _>(move |_: &Peer| {
                        let mut counter = tally.counter();
                        move |note: NoteView<'_>| {
                            let (length, touched) = note::seen(note.name, note.comment);
                            counter.count(length, touched);
                            Ok(())
                        }
                    });
                    serve(load, service).await
                }
                (Work::Notes, Kind::Prost) => {
                    let service = typed::prost::per_connection(move |_: &Peer| {
                        let mut counter = tally.counter();
                        move |note: Note| {
                            let (length, touched) = note::seen(&note.name, &note.comment);
                            counter.count(length, touched);
                            Ok(())
                        }
                    });
                    serve(load, service).await
                }
            }
        }
        .boxed()
    }

    fn send<'a>(&'a self, load: Load, receiver: SocketAddr, gate: &'a mut Gate) -> BoxFuture<'a, Result<Done>> {
        match load.work {
            Work::Stream => stream(self.kind, load, receiver, gate).boxed(),
            Work::Notes => notes(self.kind, load, receiver, gate).boxed(),
            Work::PingPong => ping(load, receiver, gate).boxed(),
            Work::Idle => idle(load, receiver, gate).boxed(),
        }
    }
}

/// The default maximum, unless the messages are larger.
fn max_message_size(load: &Load) -> usize {
    load.size.max(buffstreams::DEFAULT_MAX_MESSAGE_SIZE)
}

/// The bytes of a message with its prefix, as they are on the wire.
pub(crate) fn frame_length(load: &Load) -> Result<usize> {
    let mut frame = Vec::new();
    Framing::with_max(Prefix::Buffstreams, max_message_size(load))?.encode(&load.message(), &mut frame)?;
    Ok(frame.len())
}

async fn serve<S: Service>(load: Load, service: S) -> Result<Receiving> {
    let listener = Listener::builder().max_message_size(max_message_size(&load)).bind("127.0.0.1:0").await?;
    let server = listener.spawn(service);
    let address = server.local_address().to_string().parse()?;
    Ok(Receiving { address, at_work: Box::new(server) })
}

/// The certificate is named after the port, and the port is known only when somebody listens there.
async fn serve_tls<S: Service>(load: Load, service: S) -> Result<Receiving> {
    let address = std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?;
    let (chain, key) = make_certificate(address)?;
    let builder = Listener::builder().max_message_size(max_message_size(&load));
    let listener = builder.tls(TlsServer::from_pem_files(chain, key)?).bind(address).await?;
    Ok(Receiving { address, at_work: Box::new(listener.spawn(service)) })
}

struct Count(Counter);

impl Handler for Count {
    #[inline]
    fn message(&mut self, message: Message<'_>) -> HandlerResult {
        self.0.message(&message);
        Ok(())
    }
}

struct Answer {
    counter: Counter,
    peer: Peer,
}

impl Handler for Answer {
    fn message(&mut self, message: Message<'_>) -> HandlerResult {
        self.counter.message(&message);
        self.peer.sender().try_send(&message)?;
        Ok(())
    }
}

/// Connections that have not carried anything yet.
async fn dial(load: &Load, receiver: SocketAddr, count: usize, kind: Kind) -> Result<Vec<Connection>> {
    let mut connections = Vec::new();
    for _ in 0..count {
        // An empty queue takes any message; two of the largest let one be written while the next is made.
        let memory = if load.connections > 1 { MEMORY_AMONG_MANY } else { MEMORY }.max(2 * load.size);
        let builder = Connection::builder().max_message_size(max_message_size(load)).memory(memory);
        let builder = match kind {
            Kind::Tls => builder.tls(TlsClient::with_ca_file(certificate_of(receiver))?),
            _ => builder.delivery(kind.delivery()),
        };
        connections.push(builder.dial(receiver).await?);
    }
    if matches!(kind, Kind::Tls) {
        remove_certificate(receiver)?;
    }
    Ok(connections)
}

/// Everything that was sent is settled, or this is an error.
async fn close(connections: Vec<Connection>) -> Result<Done> {
    for stats in join_all(connections.iter().map(|connection| connection.close(CLOSING))).await {
        let stats = stats?;
        if stats.settled != stats.accepted {
            return Err(format!("not all messages are settled: {stats:?}").into());
        }
    }
    Ok(Done::default())
}

async fn stream(kind: Kind, load: Load, receiver: SocketAddr, gate: &mut Gate) -> Result<Done> {
    let message = Bytes::from(load.message());
    let connections = dial(&load, receiver, load.connections, kind).await?;
    for connection in &connections {
        connection.send_bytes(message.clone()).await?;
        connection.flush().await?;
    }
    gate.pass()?;
    let mut sending = JoinSet::new();
    for (index, connection) in connections.iter().enumerate() {
        for task in 0..load.tasks {
            let (connection, message) = (connection.clone(), message.clone());
            let share = load.task_share(index, task);
            sending.spawn(async move {
                if message.len() < LARGE {
                    for _ in 0..share {
                        connection.send(&message).await?;
                    }
                } else {
                    for _ in 0..share {
                        connection.send_bytes(message.clone()).await?;
                    }
                }
                Ok::<_, Error>(())
            });
        }
    }
    while let Some(sent) = sending.join_next().await {
        sent??;
    }
    close(connections).await
}

async fn notes(kind: Kind, load: Load, receiver: SocketAddr, gate: &mut Gate) -> Result<Done> {
    let connections = dial(&load, receiver, load.connections, Kind::Views).await?;
    for connection in &connections {
        connection.send_prost(&note::note()).await?;
        connection.flush().await?;
    }
    gate.pass()?;
    let mut sending = JoinSet::new();
    for (index, connection) in connections.iter().enumerate() {
        let connection = connection.clone();
        let share = load.sent_share(index);
        sending.spawn(async move {
            match kind {
                Kind::Views | Kind::Acked | Kind::Tls => {
                    let note =
                        NoteView { name: note::NAME, date: note::DATE, comment: note::COMMENT, ..NoteView::default() };
                    for _ in 0..share {
                        connection.send_buffa_view(&note).await?;
                    }
                }
                Kind::Prost => {
                    let note = note::note();
                    for _ in 0..share {
                        connection.send_prost(&note).await?;
                    }
                }
            }
            Ok::<_, Error>(())
        });
    }
    while let Some(sent) = sending.join_next().await {
        sent??;
    }
    close(connections).await
}

async fn idle(load: Load, receiver: SocketAddr, gate: &mut Gate) -> Result<Done> {
    let message = load.message();
    let mut connections = dial(&load, receiver, load.hello() as usize, Kind::Views).await?;
    for connection in &connections {
        connection.send(&message).await?;
        connection.flush().await?;
    }
    gate.pass()?;
    let rest = dial(&load, receiver, load.sent_messages() as usize, Kind::Views).await?;
    for connection in &rest {
        connection.send(&message).await?;
        connection.flush().await?;
    }
    connections.extend(rest);
    Ok(Done { connections: Some(Box::new(connections)), round_trips: None })
}

/// The sender of a ping-pong: each reply is answered with the next ping, from the handler.
struct Rounds {
    peer: Peer,
    message: Vec<u8>,
    sent_at: Instant,
    done: u64,
    /// The rounds before the clock starts. After them, and after all, it stops and tells whoever waits.
    hello: u64,
    all: u64,
    times: Histogram<u64>,
    stopped: mpsc::UnboundedSender<Histogram<u64>>,
}

impl Handler for Rounds {
    fn message(&mut self, _reply: Message<'_>) -> HandlerResult {
        if self.done > self.hello {
            self.times.record(self.sent_at.elapsed().as_nanos() as u64)?;
        }
        self.done += 1;
        if self.done == self.hello || self.done == self.all {
            self.stopped.send(self.times.clone())?;
        } else {
            self.sent_at = Instant::now();
            self.peer.sender().try_send(&self.message)?;
        }
        Ok(())
    }
}

async fn ping(load: Load, receiver: SocketAddr, gate: &mut Gate) -> Result<Done> {
    let message = load.message();
    let times = Histogram::new(3)?;
    let (stopped, mut stops) = mpsc::unbounded_channel();
    let service = per_connection({
        let message = message.clone();
        move |peer: &Peer| Rounds {
            peer: peer.clone(),
            message: message.clone(),
            sent_at: Instant::now(),
            done: 0,
            hello: load.hello(),
            all: load.hello() + load.sent_messages(),
            times: times.clone(),
            stopped: stopped.clone(),
        }
    });
    let connection = Connection::builder().handler(service).dial(receiver).await?;
    connection.send(&message).await?;
    stops.recv().await.ok_or("the connection ended early")?;
    gate.pass()?;
    connection.send(&message).await?;
    let times = stops.recv().await.ok_or("the connection ended early")?;
    Ok(Done { round_trips: Some(times), connections: None })
}
