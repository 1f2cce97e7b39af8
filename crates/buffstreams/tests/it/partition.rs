//! A network that comes apart for a while without telling anybody: no byte passes, and no reset comes.
//!
//! Sender and receiver are processes of their own, each in a network namespace, with a pair of virtual interfaces between
//! them. The namespaces have no names and end with their processes, however those end.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use buffstreams::{Backoff, Connection, Delivery, Listener, Retry, State, Stats};

use crate::support::{alone_within, amount, in_time, is_alone, passes, until};

const HEARTBEAT: Duration = Duration::from_secs(1);

/// What runs a program in a network of its own.
const OWN_NETWORK: [&str; 3] = ["unshare", "--net", "--"];

/// The same for somebody who is not root, where the system lets them.
const OWN_NETWORK_AS_ROOT: [&str; 4] = ["unshare", "--map-root-user", "--net", "--"];

/// Runs a program to its end; what it says if it fails.
fn run(command: &[&str]) -> Result<(), String> {
    let [program, arguments @ ..] = command else { return Err("no command".into()) };
    match Command::new(program).args(arguments).stdin(Stdio::null()).output() {
        Ok(output) if output.status.success() => Ok(()),
        Ok(output) => Err(format!("{}: {}", command.join(" "), String::from_utf8_lossy(&output.stderr).trim())),
        Err(error) => Err(format!("{program}: {error}")),
    }
}

fn ip(arguments: &str) -> Result<(), String> {
    let words: Vec<_> = std::iter::once("ip").chain(arguments.split_whitespace()).collect();
    run(&words)
}

#[test]
fn a_partition_is_noticed_and_loses_nothing_of_an_acknowledged_stream() {
    // What is made here is gone with the process that made it.
    let pair = ["ip", "link", "add", "near", "type", "veth", "peer", "name", "far"];
    let mut refusals = Vec::new();
    for network in [&OWN_NETWORK[..], &OWN_NETWORK_AS_ROOT] {
        match run(&[network, &pair].concat()) {
            Ok(()) => return passes(alone_within(network, "partition::the_sender_of_a_partition")),
            Err(why) => refusals.push(why),
        }
    }
    eprintln!("skipped: no networks can be made here, which takes `ip`, `unshare` and root: {}", refusals.join("; "));
}

/// The receiver: does as it is told on its standard input, line by line, until that ends.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "a part of another test, which runs it as a process of its own"]
async fn the_receiver_of_a_partition() {
    if !is_alone() {
        return;
    }
    let ledger = Arc::new(Mutex::new(Vec::<u64>::new()));
    let writing = Arc::clone(&ledger);
    let service = move |message: &[u8]| {
        writing.lock().unwrap().push(u64::from_be_bytes(message[..8].try_into()?));
        Ok(())
    };
    let (told, mut lines) = tokio::sync::mpsc::unbounded_channel();
    std::thread::spawn(move || std::io::stdin().lines().map_while(Result::ok).try_for_each(|line| told.send(line)));
    let mut service = Some(service);
    let mut server = None;
    println!();
    while let Some(line) = lines.recv().await {
        match line.split_once(' ').unwrap_or((&line, "")) {
            ("ip", arguments) => ip(arguments).unwrap(),
            ("listen", address) => {
                let listener = Listener::bind(address).await.unwrap();
                println!("answer: {}", listener.local_address());
                server = Some(listener.spawn(service.take().unwrap()));
                continue;
            }
            ("report", _) => {
                let ledger = ledger.lock().unwrap();
                let in_order = ledger.iter().copied().eq(0..ledger.len() as u64);
                let stats = server.as_ref().unwrap().stats();
                println!("answer: {} {in_order} {} {}", ledger.len(), stats.connected, stats.broken);
                continue;
            }
            (other, _) => panic!("what is {other}?"),
        }
        println!("answer: done");
    }
}

/// The receiver, as its sender sees it.
struct Receiver {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Receiver {
    fn start() -> Receiver {
        let mut command = alone_within(&OWN_NETWORK, "partition::the_receiver_of_a_partition");
        let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
        let (input, output) = (child.stdin.take().unwrap(), BufReader::new(child.stdout.take().unwrap()));
        Receiver { child, input, output }
    }

    fn tell(&mut self, line: &str) -> String {
        writeln!(self.input, "{line}").unwrap();
        loop {
            let mut answer = String::new();
            assert_ne!(self.output.read_line(&mut answer).unwrap(), 0, "the receiver is gone at {line:?}");
            if let Some(answer) = answer.strip_prefix("answer: ") {
                return answer.trim().to_owned();
            }
        }
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Bytes that the interface of this process has received and sent, of the whole network that it is in.
fn passed() -> (u64, u64) {
    let table = std::fs::read_to_string("/proc/self/net/dev").unwrap();
    let line = table.lines().find_map(|line| line.trim().strip_prefix("near:")).unwrap();
    let columns: Vec<u64> = line.split_whitespace().map(|column| column.parse().unwrap()).collect();
    (columns[0], columns[8])
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "a part of another test, which runs it as a process of its own"]
async fn the_sender_of_a_partition() {
    if !is_alone() {
        return;
    }
    let partition = Duration::from_secs(amount("BUFFSTREAMS_PARTITION", 4) as u64);
    let mut receiver = Receiver::start();
    // Whoever answers is in its own network already.
    receiver.tell("ip link set lo up");
    ip(&format!("link add near type veth peer name far netns {}", receiver.child.id())).unwrap();
    ip("address add 10.0.0.1/30 dev near").unwrap();
    ip("link set near up").unwrap();
    receiver.tell("ip address add 10.0.0.2/30 dev far");
    receiver.tell("ip link set far up");
    let address = receiver.tell("listen 10.0.0.2:0");

    let connection = Connection::builder()
        .delivery(Delivery::Acked)
        .heartbeat(HEARTBEAT)
        .connect_deadline(Duration::from_secs(1))
        .backoff(Backoff { min: Duration::from_millis(50), max: Duration::from_millis(500) })
        .retry(Retry::Forever)
        .dial_lazy(address.as_str())
        .unwrap();
    let conserved = |connection: &Connection| -> Stats {
        let stats = connection.stats();
        assert!(stats.is_conserved() && stats.failed == 0, "{stats:?}");
        stats
    };
    let (is_over, attempts) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let mut states = connection.states();
    let counting = tokio::spawn({
        let attempts = Arc::clone(&attempts);
        async move {
            while states.changed().await.is_ok() {
                // An attempt that fails at once is seen by its end only.
                let has_failed = *states.borrow_and_update() == State::Disconnected;
                attempts.fetch_add(u64::from(has_failed), Ordering::Relaxed);
            }
        }
    });
    let sending = tokio::spawn({
        let (connection, is_over) = (connection.clone(), Arc::clone(&is_over));
        async move {
            let mut count = 0_u64;
            while !is_over.load(Ordering::Relaxed) {
                let mut message = [7; 100];
                message[..8].copy_from_slice(&count.to_be_bytes());
                connection.send(&message).await.unwrap();
                assert!(connection.stats().is_conserved());
                count += 1;
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            count
        }
    });
    for end in ["near", "far"] {
        let mut link = |state: &str| match end {
            "near" => ip(&format!("link set near {state}")).unwrap(),
            _ => drop(receiver.tell(&format!("ip link set far {state}"))),
        };
        let before = conserved(&connection).settled;
        until("messages flow", || connection.stats().settled > before + 100).await;
        let tried = attempts.load(Ordering::Relaxed);
        link("down");
        let cut = Instant::now();
        let bytes = passed();
        let mut states = connection.states();
        in_time("it is noticed", states.wait_for(|state| *state != State::Connected)).await.unwrap();
        let noticed = cut.elapsed();
        // Until then it may have been reading what had come before the cut.
        let settled = conserved(&connection).settled;
        tokio::time::sleep_until((cut + partition).into()).await;
        let during = conserved(&connection);
        assert_eq!(passed().0, bytes.0, "no byte comes through");
        assert_eq!(during.settled, settled, "and so nothing is settled");
        assert!(during.accepted > during.settled, "messages are taken on");
        // The first was the loss.
        let attempts = (attempts.load(Ordering::Relaxed) - tried).saturating_sub(1);
        link("up");
        let up = Instant::now();
        until("messages flow again", || connection.stats().settled > during.accepted).await;
        println!(
            "\nfigures: {:?} without the {end} end: noticed after {noticed:.2?} of {:?} allowed, {attempts} failed \
             attempts, all {} that waited settled {:.2?} after it was back",
            cut.elapsed() - up.elapsed(),
            3 * HEARTBEAT,
            during.in_flight,
            up.elapsed(),
        );
        // A heartbeat may just have come; and this machine may be slow.
        assert!(noticed < 30 * HEARTBEAT, "it took {noticed:?} to notice");
    }
    is_over.store(true, Ordering::Relaxed);
    let count = sending.await.unwrap();
    let flushed = in_time("it is flushed", connection.flush()).await.unwrap();
    assert_eq!((flushed.settled, flushed.failed), (count, 0));
    let stats = in_time("it is closed", connection.close(Duration::from_secs(20))).await.unwrap();
    assert!(stats.is_conserved() && stats.settled == count, "{stats:?}");
    counting.abort();
    let report = receiver.tell("report");
    println!("figures: {count} sent; received, in order without gap or repeat, connections, broken: {report}");
    assert!(report.starts_with(&format!("{count} true ")), "{count} were sent; {report}");
}
