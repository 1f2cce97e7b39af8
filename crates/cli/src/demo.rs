//! `buffstreams demo`: a sender and a listener of protobuf messages in one process, over loopback.
//!
//! The listener decodes every message and checks its number; both sides hash every byte in order. It is a success only if
//! count, order and hash agree, so the rate that is shown is that of messages that really arrived.

use std::fmt;
use std::io::{self, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use buffstreams::{Connection, Ended, Handler, HandlerResult, Listener, Message, Peer, per_connection};
use prost::Message as _;
use tokio::sync::mpsc;
use xxhash_rust::xxh3::Xxh3;

use crate::args::DemoArguments;
use crate::progress::{Amount, Rate, Totals};
use crate::report::Report;
use crate::{Outcome, Status};

/// How long the last messages may take to arrive once the sender has stopped.
const ARRIVAL: Duration = Duration::from_secs(10);

/// The clock is read once in so many messages.
const MESSAGES_PER_GLANCE: u64 = 64;

/// What is sent: a reading of a made-up instrument, about 110 bytes of protobuf.
///
/// ```proto
/// message Reading {
///   uint64 number = 1;
///   fixed64 nanoseconds = 2;
///   string instrument = 3;
///   Position position = 4;
///   repeated double samples = 5;
///   optional string remark = 6;
/// }
/// message Position { double latitude = 1; double longitude = 2; }
/// ```
#[derive(Clone, PartialEq, prost::Message)]
struct Reading {
    #[prost(uint64, tag = "1")]
    number: u64,
    #[prost(fixed64, tag = "2")]
    nanoseconds: u64,
    #[prost(string, tag = "3")]
    instrument: String,
    #[prost(message, optional, tag = "4")]
    position: Option<Position>,
    #[prost(double, repeated, tag = "5")]
    samples: Vec<f64>,
    #[prost(string, optional, tag = "6")]
    remark: Option<String>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Position {
    #[prost(double, tag = "1")]
    latitude: f64,
    #[prost(double, tag = "2")]
    longitude: f64,
}

const INSTRUMENTS: [&str; 4] = ["seismometer-nord", "seismometer-süd", "tide-gauge-7", "barometer"];

impl Reading {
    /// Turns this into the reading of that number; every field follows from the number.
    fn become_numbered(&mut self, number: u64) {
        let noise = number.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        self.number = number;
        self.nanoseconds = number * 1_000_003;
        self.instrument.clear();
        self.instrument.push_str(INSTRUMENTS[(noise >> 62) as usize]);
        let fraction = (noise >> 11) as f64 / (1_u64 << 53) as f64;
        self.position = Some(Position { latitude: 46.0 + fraction, longitude: 7.0 + fraction * 2.0 });
        self.samples.clear();
        self.samples.extend((0..8).map(|index| fraction * f64::from(index) - 3.0));
        self.remark = number.is_multiple_of(1000).then(|| format!("calibrated before reading {number}"));
    }
}

/// What one side has seen.
#[derive(Clone, Default)]
struct Account {
    totals: Totals,
    hash: Xxh3,
}

impl Account {
    fn add(&mut self, message: &[u8]) {
        self.totals.messages += 1;
        self.totals.bytes += message.len() as u64;
        // With its length, so that bytes cannot move from one message to the next unseen.
        self.hash.update(&(message.len() as u32).to_le_bytes());
        self.hash.update(message);
    }
}

pub(crate) async fn run(arguments: DemoArguments, report: &Arc<Report>) -> Outcome {
    let arrived = Arc::new(AtomicTotals::default());
    let (verdicts, mut verdict) = mpsc::channel(1);
    let listener = Listener::bind("127.0.0.1:0").await?;
    say(format_args!("{} bytes a message, protobuf, over {}", example_length(), listener.local_address()));
    let server = listener.spawn(per_connection({
        let arrived = Arc::clone(&arrived);
        move |_: &Peer| Checker::new(Arc::clone(&arrived), verdicts.clone())
    }));
    let connection = Connection::dial(server.local_address()).await?;

    let time = Duration::from_secs(arguments.seconds);
    let begun = Instant::now();
    let sender = tokio::spawn(send(connection.clone(), begun + time));
    let show = tokio::spawn(show_rate(Arc::clone(&arrived), begun));
    let sent = sender.await??;
    connection.close(ARRIVAL).await?;
    let received = tokio::time::timeout(ARRIVAL, verdict.recv()).await.ok().flatten();
    let took = begun.elapsed();
    show.abort();
    server.shutdown(Duration::from_secs(1)).await;

    let Some(received) = received else {
        return Err("the messages did not all arrive in time".into());
    };
    say(format_args!(
        "{} in {:.2} s: {}",
        Amount(sent.totals),
        took.as_secs_f64(),
        Rate::over(received.account.totals, took)
    ));
    match received.compare(&sent) {
        None => {
            say(format_args!(
                "every message arrived intact: count, order and content (xxh3 {:016x})",
                sent.hash.digest()
            ));
            Ok(Status::Success)
        }
        Some(difference) => {
            report.fail(difference);
            Ok(Status::Failure)
        }
    }
}

async fn send(connection: Connection, until: Instant) -> Result<Account, buffstreams::Error> {
    let mut account = Account::default();
    let mut reading = Reading::default();
    let mut encoded = Vec::new();
    while !account.totals.messages.is_multiple_of(MESSAGES_PER_GLANCE) || Instant::now() < until {
        reading.become_numbered(account.totals.messages);
        encoded.clear();
        reading.encode(&mut encoded).expect("a Vec grows");
        account.add(&encoded);
        let _ = connection.send(&encoded).await?;
    }
    Ok(account)
}

/// Prints a line a second.
async fn show_rate(arrived: Arc<AtomicTotals>, begun: Instant) {
    let second = Duration::from_secs(1);
    let mut ticks = tokio::time::interval_at((begun + second).into(), second);
    let mut before = Totals::default();
    for elapsed in 1_u64.. {
        ticks.tick().await;
        let now = arrived.read();
        let grown = Totals { messages: now.messages - before.messages, bytes: now.bytes - before.bytes };
        say(format_args!("{elapsed:4} s  {}", Rate::over(grown, second)));
        before = now;
    }
}

/// Prints a line; nobody has to read it.
fn say(line: fmt::Arguments<'_>) {
    let _ = writeln!(io::stdout(), "{line}");
}

fn example_length() -> usize {
    let mut reading = Reading::default();
    reading.become_numbered(1);
    reading.encoded_len()
}

/// What has arrived so far, for those who watch.
#[derive(Debug, Default)]
struct AtomicTotals {
    messages: AtomicU64,
    bytes: AtomicU64,
}

impl AtomicTotals {
    fn write(&self, totals: Totals) {
        self.messages.store(totals.messages, Ordering::Relaxed);
        self.bytes.store(totals.bytes, Ordering::Relaxed);
    }

    fn read(&self) -> Totals {
        Totals { messages: self.messages.load(Ordering::Relaxed), bytes: self.bytes.load(Ordering::Relaxed) }
    }
}

/// What the listener has to say when no more messages come.
struct Verdict {
    account: Account,
    ended: String,
    fault: Option<String>,
}

impl Verdict {
    /// How what arrived differs from what was sent; `None` if not at all.
    fn compare(&self, sent: &Account) -> Option<String> {
        let (sent_count, count) = (sent.totals.messages, self.account.totals.messages);
        if let Some(fault) = &self.fault {
            return Some(fault.clone());
        }
        if sent_count != count {
            return Some(format!("{sent_count} messages were sent and {count} arrived; {}", self.ended));
        }
        let (sent_hash, hash) = (sent.hash.digest(), self.account.hash.digest());
        (sent_hash != hash).then(|| format!("what was sent hashes to {sent_hash:016x}, what arrived to {hash:016x}"))
    }
}

/// Decodes every message, and checks that it is the next one.
struct Checker {
    account: Account,
    reading: Reading,
    fault: Option<String>,
    arrived: Arc<AtomicTotals>,
    verdicts: mpsc::Sender<Verdict>,
}

impl Checker {
    fn new(arrived: Arc<AtomicTotals>, verdicts: mpsc::Sender<Verdict>) -> Checker {
        Checker { account: Account::default(), reading: Reading::default(), fault: None, arrived, verdicts }
    }

    fn fault(&mut self, fault: impl fmt::Display) {
        self.fault.get_or_insert_with(|| fault.to_string());
    }
}

impl Handler for Checker {
    fn message(&mut self, message: Message<'_>) -> HandlerResult {
        let expected = self.account.totals.messages;
        self.account.add(&message);
        self.reading.clear();
        match self.reading.merge(&*message) {
            Err(error) => self.fault(format_args!("message {expected} does not decode: {error}")),
            Ok(()) if self.reading.number != expected => {
                let number = self.reading.number;
                self.fault(format_args!("message {number} arrived where {expected} was due"));
            }
            Ok(()) => {}
        }
        Ok(())
    }

    fn batch_end(&mut self) -> HandlerResult {
        self.arrived.write(self.account.totals);
        Ok(())
    }

    fn ended(&mut self, why: &Ended) {
        let verdict = Verdict { account: self.account.clone(), ended: why.to_string(), fault: self.fault.take() };
        let _ = self.verdicts.try_send(verdict);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reading_takes_about_110_bytes_and_follows_from_its_number() {
        let mut reading = Reading::default();
        for number in 1..1000 {
            reading.become_numbered(number);
            assert!((90..=130).contains(&reading.encoded_len()), "{number}: {}", reading.encoded_len());
            let mut again = Reading::default();
            again.become_numbered(number);
            assert_eq!(reading, again);
        }
    }

    #[test]
    fn a_lost_a_changed_and_a_moved_byte_are_each_noticed() {
        let account = |messages: &[&[u8]]| {
            let mut account = Account::default();
            messages.iter().for_each(|message| account.add(message));
            account
        };
        let compare = |arrived: Account| {
            let verdict = Verdict { account: arrived, ended: "the end".into(), fault: None };
            verdict.compare(&account(&[b"one", b"two"]))
        };
        assert_eq!(compare(account(&[b"one", b"two"])), None);
        assert!(compare(account(&[b"one"])).unwrap().contains("2 messages were sent and 1 arrived"));
        assert!(compare(account(&[b"one", b"twO"])).is_some());
        assert!(compare(account(&[b"onet", b"wo"])).is_some());
        assert!(compare(account(&[b"two", b"one"])).is_some());
    }
}
