//! ZeroMQ, the C++ library: PUSH to PULL, as its guide has it for a stream of work; PAIR for the ping-pong.

use std::net::SocketAddr;
use std::time::Instant;

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use hdrhistogram::Histogram;
use prost::Message;

use crate::load::{Load, Work};
use crate::note::{self, Note};
use crate::system::{Runner, System};
use crate::tally::{Counter, Tally};
use crate::worker::{Done, Gate, Receiving};
use crate::{Error, Result};

pub(crate) const SYSTEM: System = System {
    name: "zeromq",
    about: "ZeroMQ: a PUSH socket and a thread for each connection, one PULL socket",
    version: || {
        let (major, minor, patch) = zmq::version();
        format!("{major}.{minor}.{patch} (zmq {})", env!("VERSION_OF_ZMQ"))
    },
    settings: "one I/O thread a process (zguide.zeromq.org/docs/chapter2/#I-O-Threads: one for each GB/s); high-water \
               marks of 64 MiB worth of messages, and no less than the default of 1,000 or more than 10,000, which \
               was the fastest of those tried (zguide.zeromq.org/docs/chapter2/#High-Water-Marks); zmq_send, \
               which copies a message",
    part: 0.2,
    reads_messages: true,
    runner: Some(&ZeroMq),
    feature: "",
};

/// Bytes of messages that may wait on each side of a connection.
const WAITING: usize = 64 * 1024 * 1024;

/// Milliseconds after which a receiver looks whether more can come.
const QUIET_MS: i32 = 100;

struct ZeroMq;

impl Runner for ZeroMq {
    fn receive(&self, load: Load, tally: Tally) -> BoxFuture<'static, Result<Receiving>> {
        async move {
            let kind = if load.work == Work::PingPong { zmq::PAIR } else { zmq::PULL };
            let socket = socket(&zmq::Context::new(), kind, &load)?;
            socket.set_rcvtimeo(QUIET_MS)?;
            socket.bind("tcp://127.0.0.1:*")?;
            let endpoint = socket.get_last_endpoint()?.map_err(|_| "an endpoint that is no text")?;
            let address = endpoint.trim_start_matches("tcp://").parse()?;
            let counter = tally.counter_of_all();
            let receiving = std::thread::spawn(move || receive(&socket, &load, &tally, counter));
            Ok(Receiving { address, at_work: Box::new(receiving) })
        }
        .boxed()
    }

    fn send<'a>(&'a self, load: Load, receiver: SocketAddr, gate: &'a mut Gate) -> BoxFuture<'a, Result<Done>> {
        async move {
            match load.work {
                Work::PingPong => ping(&load, receiver, gate),
                Work::Stream | Work::Notes => send(&load, receiver, gate),
                Work::Idle => Err("a PULL socket does not say what a connection costs".into()),
            }
        }
        .boxed()
    }
}

fn socket(context: &zmq::Context, kind: zmq::SocketType, load: &Load) -> Result<zmq::Socket> {
    let socket = context.socket(kind)?;
    let mark = if load.size * 1_000 > WAITING { 64 } else { (WAITING / load.size).clamp(1_000, 10_000) };
    socket.set_sndhwm(mark as i32)?;
    socket.set_rcvhwm(mark as i32)?;
    Ok(socket)
}

fn receive(socket: &zmq::Socket, load: &Load, tally: &Tally, mut counter: Counter) -> Result<()> {
    let mut message = zmq::Message::new();
    loop {
        match socket.recv(&mut message, 0) {
            Ok(()) => {}
            Err(zmq::Error::EAGAIN) if tally.is_finishing() => return Ok(()),
            Err(zmq::Error::EAGAIN) => continue,
            Err(error) => return Err(error.into()),
        }
        match load.work {
            Work::Notes => {
                let note = Note::decode(&*message)?;
                let (length, touched) = note::seen(&note.name, &note.comment);
                counter.count(length, touched);
            }
            Work::PingPong => {
                counter.message(&message);
                socket.send(&*message, 0)?;
            }
            _ => counter.message(&message),
        }
    }
}

fn send(load: &Load, receiver: SocketAddr, gate: &mut Gate) -> Result<Done> {
    let message = load.message();
    let hello = if load.work == Work::Notes { note::note().encode_to_vec() } else { message.clone() };
    let context = zmq::Context::new();
    let mut sockets = Vec::new();
    for _ in 0..load.connections {
        let socket = socket(&context, zmq::PUSH, load)?;
        socket.connect(&format!("tcp://{receiver}"))?;
        socket.send(&hello, 0)?;
        sockets.push(socket);
    }
    gate.pass()?;
    std::thread::scope(|scope| {
        let sending: Vec<_> = sockets
            .into_iter()
            .enumerate()
            .map(|(index, socket)| {
                let message = &message;
                scope.spawn(move || {
                    let note = note::note();
                    for _ in 0..load.sent_share(index) {
                        if load.work == Work::Notes {
                            socket.send(note.encode_to_vec(), 0)?;
                        } else {
                            socket.send(message.as_slice(), 0)?;
                        }
                    }
                    Ok::<_, Error>(())
                })
            })
            .collect();
        for thread in sending {
            thread.join().map_err(|_| "a sending thread panicked")??;
        }
        Ok::<_, Error>(())
    })?;
    // Waits until everything is with the kernel.
    drop(context);
    Ok(Done::default())
}

fn ping(load: &Load, receiver: SocketAddr, gate: &mut Gate) -> Result<Done> {
    let message = load.message();
    let socket = socket(&zmq::Context::new(), zmq::PAIR, load)?;
    socket.connect(&format!("tcp://{receiver}"))?;
    let mut reply = zmq::Message::new();
    let mut round = || -> Result<()> {
        socket.send(message.as_slice(), 0)?;
        Ok(socket.recv(&mut reply, 0)?)
    };
    for _ in 0..load.hello() {
        round()?;
    }
    gate.pass()?;
    let mut times = Histogram::new(3)?;
    for _ in 0..load.sent_messages() {
        let start = Instant::now();
        round()?;
        times.record(start.elapsed().as_nanos() as u64)?;
    }
    Ok(Done { round_trips: Some(times), connections: None })
}
