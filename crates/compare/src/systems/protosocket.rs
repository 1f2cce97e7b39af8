//! protosocket: messages of bytes with a codec after its own example, protobuf messages with `protosocket-prost`.

use std::io::Cursor;
use std::net::SocketAddr;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Instant;

use bytes::buf::Chain;
use bytes::{Buf, Bytes};
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use hdrhistogram::Histogram;
use protosocket::{
    Codec, Connection, Decoder, DeserializeError, Encoder, MessageReactor, PooledEncoder, ReactorStatus, SendBudget,
    Serialize,
};
use protosocket_prost::{ProstDecoder, ProstSerializer};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;

use crate::load::{Load, Work};
use crate::note::{self, Note};
use crate::system::{Runner, System};
use crate::tally::{Counter, Tally};
use crate::worker::{Done, Gate, Receiving};
use crate::{Error, Result};

pub(crate) const SYSTEM: System = System {
    name: "protosocket",
    about: "protosocket: a reactor makes messages as the socket takes them; another is called with each",
    version: || env!("VERSION_OF_PROTOSOCKET").to_owned(),
    settings: "a buffer of 4 MiB that grows by 1 MiB, and up to 512 queued messages, as in its \
               example-proto/src/server.rs (larger messages: a buffer for four; idle connections: 4 KiB at a time); \
               PooledEncoder, which docs.rs/protosocket asks for, with a pool as long as the queue; messages of 32 \
               KiB and more are not copied on the way out; the sender produces messages in poll_outbound_many, which \
               docs.rs/protosocket/latest/protosocket/trait.MessageReactor.html advises where writing must hold the \
               producer back: nothing is handed from task to task; TCP_NODELAY",
    part: 1.0,
    reads_messages: true,
    runner: Some(&Protosocket { channel: false }),
    feature: "",
};

pub(crate) const CHANNEL: System = System {
    name: "protosocket-channel",
    about: "protosocket as its first page draws it: the application sends messages into a channel",
    settings: "as protosocket, but a task sends each message into the connection's channel, which has no bound \
               (docs.rs/protosocket)",
    part: 0.2,
    runner: Some(&Protosocket { channel: true }),
    ..SYSTEM
};

const BUFFER: usize = 4 << 20;
const BUFFER_STEP: usize = 1 << 20;
/// For many idle connections; with the larger step each would take a MiB.
const IDLE_BUFFER_STEP: usize = 4 << 10;

const QUEUE: usize = 512;

/// From this size on a message is not copied behind its prefix.
const LARGE: usize = 32 * 1024;

struct Protosocket {
    /// Whether messages reach the connection by its channel.
    channel: bool,
}

impl Runner for Protosocket {
    fn receive(&self, load: Load, tally: Tally) -> BoxFuture<'static, Result<Receiving>> {
        match load.work {
            Work::Notes => receive::<Notes>(load, tally).boxed(),
            _ => receive::<Parcels>(load, tally).boxed(),
        }
    }

    fn send<'a>(&'a self, load: Load, receiver: SocketAddr, gate: &'a mut Gate) -> BoxFuture<'a, Result<Done>> {
        match load.work {
            Work::Notes => send::<Notes>(self.channel, load, receiver, gate).boxed(),
            Work::Stream if load.size >= LARGE => send::<LargeParcels>(self.channel, load, receiver, gate).boxed(),
            Work::Stream => send::<Parcels>(self.channel, load, receiver, gate).boxed(),
            Work::PingPong => ping(load, receiver, gate).boxed(),
            Work::Idle => idle(load, receiver, gate).boxed(),
        }
    }
}

/// What is sent: how it is encoded and decoded, and what is counted of it.
trait Kind: Send + Unpin + 'static {
    type Message: Clone + Send + Unpin + 'static;
    type Codec: Codec
        + Encoder<Message = Self::Message, Serialized: Send>
        + Decoder<Message = Self::Message>
        + Send
        + Unpin
        + 'static;

    fn codec() -> Self::Codec;
    fn message(load: &Load) -> Self::Message;
    fn count(message: &Self::Message, counter: &mut Counter);
}

/// A length of four bytes, and the message.
#[derive(Default)]
struct LengthPrefixed;

impl Serialize for LengthPrefixed {
    type Message = Bytes;

    fn serialize_into_buffer(&mut self, message: Bytes, buffer: &mut Vec<u8>) {
        buffer.extend_from_slice(&(message.len() as u32).to_be_bytes());
        buffer.extend_from_slice(&message);
    }
}

impl Decoder for LengthPrefixed {
    type Message = Bytes;

    fn decode(&mut self, mut buffer: impl Buf) -> Result<(usize, Bytes), DeserializeError> {
        const PREFIX: usize = 4;
        let Ok(length) = buffer.try_get_u32() else {
            return Err(DeserializeError::IncompleteBuffer { next_message_size: PREFIX });
        };
        let length = length as usize;
        if buffer.remaining() < length {
            return Err(DeserializeError::IncompleteBuffer { next_message_size: PREFIX + length });
        }
        Ok((PREFIX + length, buffer.copy_to_bytes(length)))
    }
}

struct Parcels;

impl Kind for Parcels {
    type Message = Bytes;
    type Codec = (PooledEncoder<LengthPrefixed>, LengthPrefixed);

    fn codec() -> Self::Codec {
        (PooledEncoder::new_with_pool_size(QUEUE, LengthPrefixed), LengthPrefixed)
    }

    fn message(load: &Load) -> Bytes {
        Bytes::from_static(load.message().leak())
    }

    fn count(message: &Bytes, counter: &mut Counter) {
        counter.message(message);
    }
}

/// The same bytes on the wire, without a copy of the message.
struct Uncopied;

impl Encoder for Uncopied {
    type Message = Bytes;
    type Serialized = Chain<Cursor<[u8; 4]>, Bytes>;

    fn encode(&mut self, message: Bytes) -> Self::Serialized {
        Cursor::new((message.len() as u32).to_be_bytes()).chain(message)
    }
}

struct LargeParcels;

impl Kind for LargeParcels {
    type Message = Bytes;
    type Codec = (Uncopied, LengthPrefixed);

    fn codec() -> Self::Codec {
        (Uncopied, LengthPrefixed)
    }

    fn message(load: &Load) -> Bytes {
        Parcels::message(load)
    }

    fn count(message: &Bytes, counter: &mut Counter) {
        counter.message(message);
    }
}

struct Notes;

impl Kind for Notes {
    type Message = Note;
    type Codec = (PooledEncoder<ProstSerializer<Note>>, ProstDecoder<Note>);

    fn codec() -> Self::Codec {
        (PooledEncoder::new_with_pool_size(QUEUE, ProstSerializer::default()), ProstDecoder::default())
    }

    fn message(_load: &Load) -> Note {
        note::note()
    }

    fn count(note: &Note, counter: &mut Counter) {
        let (length, touched) = note::seen(&note.name, &note.comment);
        counter.count(length, touched);
    }
}

fn connection<R: MessageReactor>(
    load: &Load,
    stream: TcpStream,
    codec: R::Codec,
    outbound: spillway::Receiver<R::LogicalOutbound>,
    reactor: R,
) -> Connection<TcpStream, R> {
    let step = if load.work == Work::Idle { IDLE_BUFFER_STEP } else { BUFFER_STEP };
    Connection::new(stream, codec, BUFFER.max(4 * load.size), step, QUEUE, outbound, reactor)
}

/// Counts what comes; answers it, in a ping-pong.
struct Receive<K: Kind> {
    counter: Counter,
    answers: bool,
    /// A connection lasts as long as something can be sent over it.
    outbound: spillway::Sender<K::Message>,
}

impl<K: Kind> MessageReactor for Receive<K> {
    type Codec = K::Codec;
    type Inbound = K::Message;
    type Outbound = K::Message;
    type LogicalOutbound = K::Message;

    fn on_inbound_message(&mut self, message: K::Message) -> ReactorStatus {
        K::count(&message, &mut self.counter);
        if self.answers && self.outbound.send(message).is_err() {
            return ReactorStatus::Disconnect;
        }
        ReactorStatus::Continue
    }

    fn on_outbound_message(&mut self, message: K::Message) -> K::Message {
        message
    }
}

async fn receive<K: Kind>(load: Load, tally: Tally) -> Result<Receiving> {
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let address = listener.local_addr()?;
    let accepting = tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let _ = stream.set_nodelay(true);
            let (outbound, queue) = spillway::channel();
            let answers = load.work == Work::PingPong;
            let reactor = Receive::<K> { counter: tally.counter(), answers, outbound };
            tokio::spawn(connection(&load, stream, K::codec(), queue, reactor));
        }
    });
    Ok(Receiving { address, at_work: Box::new(accepting) })
}

/// A codec that tells when the last of a number of messages was written.
struct Watched<C> {
    codec: C,
    left: u64,
    written: Option<oneshot::Sender<()>>,
}

impl<C: Encoder> Encoder for Watched<C> {
    type Message = C::Message;
    type Serialized = C::Serialized;

    fn encode(&mut self, message: C::Message) -> C::Serialized {
        self.codec.encode(message)
    }

    fn return_buffer(&mut self, buffer: C::Serialized) {
        self.codec.return_buffer(buffer);
        self.left -= 1;
        if self.left == 0
            && let Some(written) = self.written.take()
        {
            let _ = written.send(());
        }
    }
}

impl<C: Decoder> Decoder for Watched<C> {
    type Message = C::Message;

    fn decode(&mut self, buffer: impl Buf) -> Result<(usize, C::Message), DeserializeError> {
        self.codec.decode(buffer)
    }
}

impl<C: Codec> Codec for Watched<C> {}

/// Produces messages: one at once, and so many more when it is told to go.
struct Produce<K: Kind> {
    message: K::Message,
    hello: bool,
    go: Option<oneshot::Receiver<()>>,
    left: u64,
}

impl<K: Kind> MessageReactor for Produce<K> {
    type Codec = Watched<K::Codec>;
    type Inbound = K::Message;
    type Outbound = K::Message;
    type LogicalOutbound = K::Message;

    fn on_inbound_message(&mut self, _message: K::Message) -> ReactorStatus {
        ReactorStatus::Disconnect
    }

    fn on_outbound_message(&mut self, message: K::Message) -> K::Message {
        message
    }

    fn poll_outbound_many(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        outbound: &mut SendBudget<'_, Self::Codec>,
    ) -> Poll<Option<()>> {
        if self.hello
            && let Some(permit) = outbound.reserve()
        {
            permit.send(self.message.clone());
            self.hello = false;
        }
        if let Some(go) = &mut self.go {
            match go.poll_unpin(context) {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(_) => self.go = None,
            }
        }
        while self.left > 0
            && let Some(permit) = outbound.reserve()
        {
            permit.send(self.message.clone());
            self.left -= 1;
        }
        // With `Ready(None)` the connection would end before all is written.
        if self.left > 0 { Poll::Ready(Some(())) } else { Poll::Pending }
    }
}

/// A connection that has been told to carry its first message.
struct Sending<M> {
    /// For the reactor that makes the messages.
    go: oneshot::Sender<()>,
    /// For a task that does. The connection lasts as long as this, too.
    outbound: spillway::Sender<M>,
    written: oneshot::Receiver<()>,
}

/// Connects; after the first message `share` more will be sent, of which the reactor makes `produced`.
async fn connect<K: Kind>(load: &Load, receiver: SocketAddr, share: u64, produced: u64) -> Result<Sending<K::Message>> {
    let stream = TcpStream::connect(receiver).await?;
    stream.set_nodelay(true)?;
    let (outbound, queue) = spillway::channel();
    let (go, gone) = oneshot::channel();
    let (all_written, written) = oneshot::channel();
    let codec = Watched { codec: K::codec(), left: 1 + share, written: Some(all_written) };
    let reactor = Produce::<K> { message: K::message(load), hello: true, go: Some(gone), left: produced };
    tokio::spawn(connection(load, stream, codec, queue, reactor));
    Ok(Sending { go, outbound, written })
}

async fn send<K: Kind>(channel: bool, load: Load, receiver: SocketAddr, gate: &mut Gate) -> Result<Done> {
    let mut connections = Vec::new();
    for index in 0..load.connections {
        let share = load.sent_share(index);
        let produced = if channel { 0 } else { share };
        connections.push(connect::<K>(&load, receiver, share, produced).await?);
    }
    gate.pass()?;
    let mut sending = JoinSet::new();
    for (index, Sending { go, outbound, written }) in connections.into_iter().enumerate() {
        let message = K::message(&load);
        sending.spawn(async move {
            let _ = go.send(());
            if channel {
                for _ in 0..load.sent_share(index) {
                    outbound.send(message.clone()).map_err(|_| "the connection ended early")?;
                    tokio::task::coop::consume_budget().await;
                }
            }
            written.await?;
            Ok::<_, Error>(())
        });
    }
    while let Some(sent) = sending.join_next().await {
        sent??;
    }
    Ok(Done::default())
}

async fn idle(load: Load, receiver: SocketAddr, gate: &mut Gate) -> Result<Done> {
    let mut connections = Vec::new();
    for _ in 0..load.hello() {
        connections.push(connect::<Parcels>(&load, receiver, 0, 0).await?);
    }
    gate.pass()?;
    for _ in 0..load.sent_messages() {
        connections.push(connect::<Parcels>(&load, receiver, 0, 0).await?);
    }
    Ok(Done { connections: Some(Box::new(connections)), round_trips: None })
}

/// The sender of a ping-pong: each reply is answered with the next ping, from the reactor.
struct Rounds {
    message: Bytes,
    outbound: spillway::Sender<Bytes>,
    sent_at: Instant,
    done: u64,
    hello: u64,
    all: u64,
    times: Histogram<u64>,
    stopped: mpsc::UnboundedSender<Histogram<u64>>,
}

impl MessageReactor for Rounds {
    type Codec = <Parcels as Kind>::Codec;
    type Inbound = Bytes;
    type Outbound = Bytes;
    type LogicalOutbound = Bytes;

    fn on_inbound_message(&mut self, _reply: Bytes) -> ReactorStatus {
        if self.done > self.hello {
            let _ = self.times.record(self.sent_at.elapsed().as_nanos() as u64);
        }
        self.done += 1;
        let gone = if self.done == self.hello || self.done == self.all {
            self.stopped.send(self.times.clone()).is_err()
        } else {
            self.sent_at = Instant::now();
            self.outbound.send(self.message.clone()).is_err()
        };
        if gone { ReactorStatus::Disconnect } else { ReactorStatus::Continue }
    }

    fn on_outbound_message(&mut self, message: Bytes) -> Bytes {
        message
    }
}

async fn ping(load: Load, receiver: SocketAddr, gate: &mut Gate) -> Result<Done> {
    let stream = TcpStream::connect(receiver).await?;
    stream.set_nodelay(true)?;
    let message = Parcels::message(&load);
    let (outbound, queue) = spillway::channel();
    let (stopped, mut stops) = mpsc::unbounded_channel();
    let reactor = Rounds {
        message: message.clone(),
        outbound: outbound.clone(),
        sent_at: Instant::now(),
        done: 0,
        hello: load.hello(),
        all: load.hello() + load.sent_messages(),
        times: Histogram::new(3)?,
        stopped,
    };
    tokio::spawn(connection(&load, stream, Parcels::codec(), queue, reactor));
    outbound.send(message.clone()).map_err(|_| "the connection ended early")?;
    stops.recv().await.ok_or("the connection ended early")?;
    gate.pass()?;
    outbound.send(message).map_err(|_| "the connection ended early")?;
    let times = stops.recv().await.ok_or("the connection ended early")?;
    Ok(Done { round_trips: Some(times), connections: None })
}
