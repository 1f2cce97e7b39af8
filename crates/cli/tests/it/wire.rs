//! The other side, by hand: a bare socket that sees, and sends, bytes and nothing else.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Instant;

use crate::program::DEADLINE;

/// The varint framing, written and read with as little cleverness as possible.
pub(crate) fn delimited<M: AsRef<[u8]>>(messages: impl IntoIterator<Item = M>) -> Vec<u8> {
    let mut out = Vec::new();
    for message in messages {
        let message = message.as_ref();
        let mut length = message.len();
        while length > 127 {
            out.push((length % 128) as u8 + 128);
            length /= 128;
        }
        out.push(length as u8);
        out.extend_from_slice(message);
    }
    out
}

pub(crate) fn undelimited(mut bytes: &[u8]) -> Vec<Vec<u8>> {
    let mut messages = Vec::new();
    while !bytes.is_empty() {
        let (mut length, mut scale) = (0, 1);
        loop {
            let byte = bytes[0] as usize;
            bytes = &bytes[1..];
            length += byte % 128 * scale;
            scale *= 128;
            if byte < 128 {
                break;
            }
        }
        let (message, rest) = bytes.split_at(length);
        messages.push(message.to_vec());
        bytes = rest;
    }
    messages
}

/// A frame with one byte of length, for `--framing u8`.
pub(crate) fn u8_frames<M: AsRef<[u8]>>(messages: impl IntoIterator<Item = M>) -> Vec<u8> {
    let mut out = Vec::new();
    for message in messages {
        out.push(u8::try_from(message.as_ref().len()).unwrap());
        out.extend_from_slice(message.as_ref());
    }
    out
}

pub(crate) fn connect(address: &str) -> TcpStream {
    let stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(DEADLINE)).unwrap();
    stream
}

/// Sends `bytes` on a connection of their own, ends it, and waits until the listener has ended it too.
pub(crate) fn deliver(address: &str, bytes: &[u8]) {
    let mut stream = connect(address);
    stream.write_all(bytes).unwrap();
    let _ = stream.shutdown(Shutdown::Write);
    wait_until_closed(&mut stream);
}

/// Waits for the other side to end or cut the connection, and says what it sent before.
pub(crate) fn wait_until_closed(stream: &mut TcpStream) -> Vec<u8> {
    let mut received = Vec::new();
    match stream.read_to_end(&mut received) {
        Ok(_) => received,
        Err(error) if error.kind() == ErrorKind::ConnectionReset => received,
        Err(error) => panic!("waiting for the end of the connection: {error}"),
    }
}

/// A bare listener, and where it listens.
pub(crate) fn bind() -> (TcpListener, String) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    (listener, address)
}

pub(crate) fn accept(listener: &TcpListener) -> TcpStream {
    listener.set_nonblocking(true).unwrap();
    let deadline = Instant::now() + DEADLINE;
    loop {
        match listener.accept() {
            Ok((stream, _)) => {
                stream.set_nonblocking(false).unwrap();
                stream.set_read_timeout(Some(DEADLINE)).unwrap();
                return stream;
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock && Instant::now() < deadline => {
                std::thread::sleep(std::time::Duration::from_millis(2));
            }
            Err(error) => panic!("nobody connected: {error}"),
        }
    }
}

/// Passes connections on to another address, and keeps every byte of them.
pub(crate) struct Witness {
    pub(crate) address: String,
    seen: Arc<Mutex<Vec<Arc<Mutex<Seen>>>>>,
}

/// What passed on one connection: there, and back.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Seen {
    pub(crate) there: Vec<u8>,
    pub(crate) back: Vec<u8>,
}

impl Witness {
    pub(crate) fn of(target: &str) -> Witness {
        let (listener, address) = bind();
        let seen = Arc::<Mutex<Vec<Arc<Mutex<Seen>>>>>::default();
        let (target, all) = (target.to_owned(), Arc::clone(&seen));
        thread::spawn(move || {
            for near in listener.incoming() {
                let (near, one) = (near.unwrap(), Arc::<Mutex<Seen>>::default());
                all.lock().unwrap().push(Arc::clone(&one));
                let Ok(far) = TcpStream::connect(&target) else { continue };
                let pass = |mut from: TcpStream, mut to: TcpStream, is_there: bool| {
                    let one = Arc::clone(&one);
                    thread::spawn(move || {
                        let mut buffer = [0; 64 * 1024];
                        while let Ok(read @ 1..) = from.read(&mut buffer) {
                            let mut one = one.lock().unwrap();
                            let bytes = if is_there { &mut one.there } else { &mut one.back };
                            bytes.extend_from_slice(&buffer[..read]);
                            drop(one);
                            if to.write_all(&buffer[..read]).is_err() {
                                break;
                            }
                        }
                        let _ = to.shutdown(Shutdown::Write);
                    })
                };
                pass(near.try_clone().unwrap(), far.try_clone().unwrap(), true);
                pass(far, near, false);
            }
        });
        Witness { address, seen }
    }

    pub(crate) fn seen(&self) -> Vec<Seen> {
        self.seen.lock().unwrap().iter().map(|one| one.lock().unwrap().clone()).collect()
    }
}
