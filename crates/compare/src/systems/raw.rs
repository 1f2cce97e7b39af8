//! The yardstick: the bytes that BuffStreams puts on the wire, over plain sockets, in blocks of 256 KiB, without
//! framing.
//!
//! Nobody looks at the bytes; the number of messages is the number of bytes that came, divided. Other blocks are other
//! yardsticks: larger ones move more, until they no longer fit into the cache. Ping-pong and idle connections are what one would write with tokio and nothing else.

use std::cell::RefCell;
use std::hint::black_box;
use std::io::{self, Read, Write};
use std::net::SocketAddr;
use std::time::Instant;

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use hdrhistogram::Histogram;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;

use crate::load::{Load, Work};
use crate::system::{Runner, System};
use crate::systems::buffstreams::frame_length;
use crate::tally::{Counter, Tally};
use crate::worker::{Done, Gate, Receiving};
use crate::{Error, Result};

pub(crate) const SYSTEM: System = System {
    name: "raw",
    about: "the same bytes over a plain socket in blocks of 256 KiB, without messages: the yardstick",
    version: || env!("VERSION_OF_RUSTC").to_owned(),
    settings: "std sockets, writes and reads of 256 KiB, TCP_NODELAY; more than one connection: the same in a tokio \
               task for each, which is as fast as a thread for each or faster; ping-pong: tokio, one write and one \
               read_exact each way; idle: a tokio task with a 4 KiB read buffer for each connection",
    part: 1.0,
    reads_messages: false,
    runner: Some(&Raw),
    feature: "",
};

/// Bytes of a write and of a read.
const BLOCK: usize = 256 * 1024;

/// What a connection that may be idle keeps to read into.
const IDLE_BUFFER: usize = 4 * 1024;

struct Raw;

impl Runner for Raw {
    fn receive(&self, load: Load, tally: Tally) -> BoxFuture<'static, Result<Receiving>> {
        async move {
            let listener = TcpListener::bind("127.0.0.1:0").await?;
            let address = listener.local_addr()?;
            let frame = frame_length(&load)?;
            let accepting = tokio::spawn(async move {
                while let Ok((stream, _)) = listener.accept().await {
                    let counter = tally.counter();
                    match load.work {
                        Work::PingPong => drop(tokio::spawn(answer(stream, frame, counter))),
                        Work::Idle => drop(tokio::spawn(wait(stream, frame, counter))),
                        _ if load.connections > 1 => drop(tokio::spawn(drain(stream, frame, counter))),
                        _ => {
                            if let Ok(stream) = blocking(stream) {
                                std::thread::spawn(move || drain_blocking(stream, frame, counter));
                            }
                        }
                    }
                }
            });
            Ok(Receiving { address, at_work: Box::new(accepting) })
        }
        .boxed()
    }

    fn send<'a>(&'a self, load: Load, receiver: SocketAddr, gate: &'a mut Gate) -> BoxFuture<'a, Result<Done>> {
        match load.work {
            Work::PingPong => ping(load, receiver, gate).boxed(),
            Work::Idle => idle(load, receiver, gate).boxed(),
            _ if load.connections > 1 => pour(load, receiver, gate).boxed(),
            _ => async move { pour_blocking(load, receiver, gate) }.boxed(),
        }
    }
}

fn blocking(stream: TcpStream) -> io::Result<std::net::TcpStream> {
    let stream = stream.into_std()?;
    stream.set_nonblocking(false)?;
    Ok(stream)
}

fn drain_blocking(mut stream: std::net::TcpStream, frame: usize, mut counter: Counter) {
    let mut block = vec![0; BLOCK];
    let mut received = 0;
    while let Ok(read @ 1..) = stream.read(&mut block) {
        received += black_box(&block[..read]).len();
        counter.reach((received / frame) as u64);
    }
}

/// The same without a thread and a block of its own: the block belongs to the worker thread.
async fn drain(stream: TcpStream, frame: usize, mut counter: Counter) {
    thread_local! {
        static BUFFER: RefCell<Vec<u8>> = RefCell::new(vec![0; BLOCK]);
    }
    let mut received = 0;
    while stream.readable().await.is_ok() {
        let result = BUFFER.with_borrow_mut(|block| stream.try_read(block).map(|read| black_box(&block[..read]).len()));
        match result {
            Ok(0) => break,
            Ok(read) => received += read,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(_) => break,
        }
        counter.reach((received / frame) as u64);
    }
}

async fn wait(mut stream: TcpStream, frame: usize, mut counter: Counter) {
    let mut buffer = vec![0; IDLE_BUFFER];
    let mut received = 0;
    while let Ok(read @ 1..) = stream.read(&mut buffer).await {
        received += read;
        counter.reach((received / frame) as u64);
    }
}

fn pour_blocking(load: Load, receiver: SocketAddr, gate: &mut Gate) -> Result<Done> {
    let frame = frame_length(&load)?;
    let mut stream = std::net::TcpStream::connect(receiver)?;
    stream.set_nodelay(true)?;
    stream.write_all(&vec![7; frame])?;
    let block = vec![7; BLOCK];
    gate.pass()?;
    let mut left = load.sent_share(0) * frame as u64;
    while left > 0 {
        let step = left.min(BLOCK as u64);
        stream.write_all(&block[..step as usize])?;
        left -= step;
    }
    Ok(Done::default())
}

async fn pour(load: Load, receiver: SocketAddr, gate: &mut Gate) -> Result<Done> {
    static BLOCK_OF_ALL: [u8; BLOCK] = [7; BLOCK];
    let frame = frame_length(&load)?;
    let mut streams = Vec::new();
    for _ in 0..load.connections {
        streams.push(greet(receiver, frame).await?);
    }
    gate.pass()?;
    let mut pouring = JoinSet::new();
    for (index, mut stream) in streams.into_iter().enumerate() {
        pouring.spawn(async move {
            let mut left = load.sent_share(index) * frame as u64;
            while left > 0 {
                let step = left.min(BLOCK as u64);
                stream.write_all(&BLOCK_OF_ALL[..step as usize]).await?;
                left -= step;
            }
            io::Result::Ok(())
        });
    }
    while let Some(poured) = pouring.join_next().await {
        poured??;
    }
    Ok(Done::default())
}

/// A connection that has carried one message.
async fn greet(receiver: SocketAddr, frame: usize) -> Result<TcpStream> {
    let mut stream = TcpStream::connect(receiver).await?;
    stream.set_nodelay(true)?;
    stream.write_all(&vec![7; frame]).await?;
    Ok(stream)
}

async fn idle(load: Load, receiver: SocketAddr, gate: &mut Gate) -> Result<Done> {
    let frame = frame_length(&load)?;
    let mut streams = Vec::new();
    for _ in 0..load.hello() {
        streams.push(greet(receiver, frame).await?);
    }
    gate.pass()?;
    for _ in 0..load.sent_messages() {
        streams.push(greet(receiver, frame).await?);
    }
    Ok(Done { connections: Some(Box::new(streams)), round_trips: None })
}

async fn answer(mut stream: TcpStream, frame: usize, mut counter: Counter) {
    let _ = stream.set_nodelay(true);
    let mut buffer = vec![0; frame];
    let mut received = 0;
    while stream.read_exact(&mut buffer).await.is_ok() {
        received += 1;
        counter.reach(received);
        if stream.write_all(&buffer).await.is_err() {
            break;
        }
    }
}

async fn ping(load: Load, receiver: SocketAddr, gate: &mut Gate) -> Result<Done> {
    let mut stream = TcpStream::connect(receiver).await?;
    stream.set_nodelay(true)?;
    let message = vec![7; frame_length(&load)?];
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

async fn round(stream: &mut TcpStream, message: &[u8]) -> Result<()> {
    let mut reply = [0; 512];
    let reply = reply.get_mut(..message.len()).ok_or("a ping of more than 512 bytes")?;
    stream.write_all(message).await?;
    stream.read_exact(reply).await?;
    Ok(())
}
