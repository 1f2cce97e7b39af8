//! What the tests share: a deadline for everything, waiting for a condition, and servers that remember.

use std::future::Future;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use buffstreams::{
    Address, Ended, ErrorKind, Framing, Handler, HandlerResult, Listener, ListenerBuilder, Message, Peer, Service,
};
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::net::TcpStream;

/// Longer than anything here takes on a slow machine.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// A free port for who will leave it and come back. Whoever dials on this machine comes from 127.0.0.1, as most that listen here do,
/// so nobody else takes the port meanwhile.
pub(crate) const APART: &str = "127.0.0.9:0";

/// Listens where somebody has just left. A process that another test is starting has copies of all sockets of this one for a moment,
/// and so the port may not be free at once.
pub(crate) async fn bind_again(builder: ListenerBuilder, address: impl ToString) -> Listener {
    let address = address.to_string();
    in_time("the port is free", async {
        loop {
            match builder.clone().bind(&address).await {
                Ok(listener) => return listener,
                Err(error) => assert_eq!(error.kind(), ErrorKind::Bind, "{error}"),
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    })
    .await
}

/// Fails the test, with its name for it, if something does not come to pass.
pub(crate) async fn in_time<T>(what: &str, future: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, future).await.unwrap_or_else(|_| panic!("not in time: {what}"))
}

/// Waits until a condition holds that nothing announces.
pub(crate) async fn until(what: &str, mut holds: impl FnMut() -> bool) {
    in_time(what, async {
        while !holds() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    })
    .await;
}

/// A service that remembers every message, every connection and every end of one.
#[derive(Clone, Default)]
pub(crate) struct Recorder(Arc<Record>);

#[derive(Default)]
struct Record {
    messages: Mutex<Vec<(u64, Vec<u8>)>>,
    peers: Mutex<Vec<u64>>,
    ends: Mutex<Vec<String>>,
}

impl Recorder {
    /// The messages of all connections, in the order of their arrival.
    pub(crate) fn messages(&self) -> Vec<Vec<u8>> {
        self.0.messages.lock().unwrap().iter().map(|(_, message)| message.clone()).collect()
    }

    pub(crate) fn count(&self) -> usize {
        self.0.messages.lock().unwrap().len()
    }

    /// The ids of the peers that connected, in order.
    pub(crate) fn peers(&self) -> Vec<u64> {
        self.0.peers.lock().unwrap().clone()
    }

    /// Why connections ended, in order.
    pub(crate) fn ends(&self) -> Vec<String> {
        self.0.ends.lock().unwrap().clone()
    }

    pub(crate) async fn has(&self, count: usize) {
        until(&format!("{count} messages"), || self.count() >= count).await;
    }
}

impl Service for Recorder {
    type Handler = Recording;

    fn connected(self: Arc<Self>, peer: &Peer) -> Recording {
        self.0.peers.lock().unwrap().push(peer.id());
        Recording { record: Arc::clone(&self.0), peer: peer.id() }
    }
}

pub(crate) struct Recording {
    record: Arc<Record>,
    peer: u64,
}

impl Handler for Recording {
    fn message(&mut self, message: Message<'_>) -> HandlerResult {
        self.record.messages.lock().unwrap().push((self.peer, message.to_vec()));
        Ok(())
    }

    fn ended(&mut self, why: &Ended) {
        self.record.ends.lock().unwrap().push(why.to_string());
    }
}

/// Sends every message back.
pub(crate) struct Echo(pub(crate) Peer);

impl Handler for Echo {
    fn message(&mut self, message: Message<'_>) -> HandlerResult {
        self.0.sender().try_send(&message)?;
        Ok(())
    }
}

/// A plain socket to a server.
pub(crate) async fn connect(address: &Address) -> TcpStream {
    in_time("connecting", TcpStream::connect(address.to_string())).await.expect("the server listens")
}

/// Waits until the other side has closed, by an end of stream or a reset; returns what it sent before.
pub(crate) async fn closed(socket: &mut (impl AsyncRead + Unpin)) -> Vec<u8> {
    let mut bytes = Vec::new();
    // A reset is a close, too, of somebody who had not read everything.
    let _ = in_time("the other side closes", socket.read_to_end(&mut bytes)).await;
    bytes
}

/// Reads frames from a plain socket until there are so many messages.
pub(crate) async fn read_messages(
    socket: &mut (impl AsyncRead + Unpin),
    framing: Framing,
    count: usize,
) -> Vec<Vec<u8>> {
    let mut messages = Vec::new();
    let mut bytes = Vec::new();
    while messages.len() < count {
        let mut at = 0;
        while let Some((message, frame)) = framing.decode(&bytes[at..]).expect("frames come") {
            messages.push(message.to_vec());
            at += frame;
        }
        bytes.drain(..at);
        if messages.len() < count {
            let read = in_time("more frames", socket.read_buf(&mut bytes)).await.expect("the socket is open");
            assert_ne!(read, 0, "the stream ended after {} of {count} messages", messages.len());
        }
    }
    assert!(bytes.is_empty(), "more came than was waited for");
    messages
}

/// The frames of these messages, one after the other.
pub(crate) fn frames<M: AsRef<[u8]>>(framing: Framing, messages: impl IntoIterator<Item = M>) -> Vec<u8> {
    let mut bytes = Vec::new();
    for message in messages {
        framing.encode(message.as_ref(), &mut bytes).expect("within the maximum");
    }
    bytes
}

/// Set in a child process that runs one test of this program by itself.
const ALONE: &str = "BUFFSTREAMS_TEST_ALONE";

/// Whether this process runs nothing but one test: then descriptors and memory are that test's own.
pub(crate) fn is_alone() -> bool {
    std::env::var_os(ALONE).is_some()
}

/// A process that runs one test of this program by itself.
pub(crate) fn alone(test: &str) -> Command {
    alone_within(&[], test)
}

/// The same, started by another program that is given its command line.
pub(crate) fn alone_within(wrapper: &[&str], test: &str) -> Command {
    let program = std::env::current_exe().expect("this program has a path");
    let mut command = match wrapper {
        [] => Command::new(program),
        [first, rest @ ..] => {
            let mut command = Command::new(first);
            command.args(rest).arg(program);
            command
        }
    };
    command.args([test, "--exact", "--nocapture", "--include-ignored"]).env(ALONE, "1").stdin(Stdio::piped());
    command
}

/// Runs a test in a process of its own; it fails here if it fails there.
pub(crate) fn passes_alone(test: &str) {
    passes(alone(test));
}

/// Waits for such a process, and shows its figures.
pub(crate) fn passes(mut command: Command) {
    let output = command.output().expect("a process can be started");
    let text = String::from_utf8_lossy(&output.stdout);
    let report: Vec<_> = text.lines().filter(|line| line.starts_with("figures:") || line.contains("_SEED=")).collect();
    println!("{}", report.join("\n"));
    assert!(text.contains("1 passed"), "{text}\n{}", String::from_utf8_lossy(&output.stderr));
}

/// How much of something a test does: so much, or as an environment variable says.
pub(crate) fn amount(variable: &str, default: usize) -> usize {
    std::env::var(variable).map_or(default, |text| text.parse().expect("a number"))
}

/// What a process has of things that can leak.
#[derive(Debug)]
pub(crate) struct Possessions {
    pub(crate) descriptors: usize,
    pub(crate) memory: usize,
    pub(crate) tasks: usize,
}

impl Possessions {
    pub(crate) fn now() -> Possessions {
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
        let kib: usize = line.trim().trim_end_matches(" kB").parse().unwrap();
        Possessions {
            descriptors: std::fs::read_dir("/proc/self/fd").unwrap().count(),
            memory: kib * 1024,
            tasks: tokio::runtime::Handle::current().metrics().num_alive_tasks(),
        }
    }
}
