//! One run: starts a receiver and a sender, lets them begin together, and turns what they say into figures.
//!
//! A run that lost or added a message, or whose messages are not what was sent, is an error.

use std::io::{BufRead, BufReader, Write};
use std::net::SocketAddr;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use crate::case::{Lane, Unit};
use crate::load::{Load, Seen, Work};
use crate::system::System;
use crate::worker::{Order, Report, Role};
use crate::{Error, Result};

/// Silence of a worker after which a run has failed.
const PATIENCE: Duration = Duration::from_secs(60);

/// What a process needs to come to rest before its memory is weighed.
const REST: Duration = Duration::from_millis(300);

/// What a run measured.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Figures {
    /// In the unit of the case.
    pub(crate) value: f64,
    /// Of round trips, the 99th percentile.
    pub(crate) p99: Option<f64>,
    /// Nanoseconds of processor time for each message.
    pub(crate) sender_cpu_ns: f64,
    pub(crate) receiver_cpu_ns: f64,
    /// The most resident memory.
    pub(crate) sender_kib: u64,
    pub(crate) receiver_kib: u64,
}

/// Makes one run; the sender sends `miscount` messages too many.
pub(crate) fn run(lane: &Lane, unit: Unit, miscount: i64) -> Result<Figures> {
    let Lane { system, load, .. } = lane;
    let mut receiver = Worker::start(Role { system: system.name.into(), load: *load, receiver: None })?;
    let address = receiver.listening()?;
    let load_of_sender = Load { miscount, ..*load };
    let mut sender = Worker::start(Role { system: system.name.into(), load: load_of_sender, receiver: Some(address) })?;
    sender.ready()?;
    receiver.ready()?;

    let idle = load.work == Work::Idle;
    let before = if idle { receiver.weigh_at_rest()? } else { 0 };
    sender.order(Order::Go)?;
    let sent = sender.sent()?;
    let grown = if idle {
        receiver.complete()?;
        receiver.weigh_at_rest()?.saturating_sub(before)
    } else {
        0
    };
    sender.order(Order::Finish)?;
    sender.end()?;
    receiver.order(Order::Finish)?;
    let (seen, receiver_kib) = receiver.finished()?;
    check(system, load, seen)?;
    let complete = receiver.complete()?;
    receiver.end()?;

    let messages = load.messages as f64;
    let seconds = complete.clock_ns.saturating_sub(sent.started_ns) as f64 / 1e9;
    let micros = |ns: u64| ns as f64 / 1e3;
    let value = match unit {
        Unit::MessagesPerSecond => messages / seconds,
        Unit::BytesPerSecond => messages * load.size as f64 / seconds,
        Unit::Microseconds => micros(sent.p50_ns.ok_or("the sender measured no round trips")?),
        Unit::BytesPerConnection => grown as f64 * 1024.0 / messages,
    };
    Ok(Figures {
        value,
        p99: sent.p99_ns.map(micros),
        sender_cpu_ns: sent.cpu_ns as f64 / messages,
        receiver_cpu_ns: complete.cpu_ns as f64 / messages,
        sender_kib: sent.peak_kib,
        receiver_kib,
    })
}

/// Whether the receiver saw what was to be sent, no more and no less.
fn check(system: &System, load: &Load, seen: Seen) -> Result<()> {
    let expected = load.expected();
    let Seen { messages, bytes, touched } = expected;
    if seen.messages != messages {
        return Err(format!("{messages} messages were expected, and {} received", seen.messages).into());
    }
    if seen.bytes != bytes {
        return Err(format!("{bytes} bytes of messages were expected, and {} received", seen.bytes).into());
    }
    if system.reads_messages && seen.touched != touched {
        return Err("the messages that were received are not those that were sent".into());
    }
    Ok(())
}

struct Sent {
    started_ns: u64,
    cpu_ns: u64,
    peak_kib: u64,
    p50_ns: Option<u64>,
    p99_ns: Option<u64>,
}

#[derive(Clone, Copy)]
struct Complete {
    clock_ns: u64,
    cpu_ns: u64,
}

/// A worker process. It is killed if this is dropped before its end.
struct Worker {
    name: &'static str,
    child: Child,
    orders: ChildStdin,
    reports: mpsc::Receiver<Result<Report>>,
    /// That the last message is there is said unasked, and kept here.
    complete: Option<Complete>,
}

impl Worker {
    fn start(role: Role) -> Result<Worker> {
        let name = if role.receiver.is_some() { "sender" } else { "receiver" };
        let mut child = Command::new(std::env::current_exe()?)
            .arg("worker")
            .arg(serde_json::to_string(&role)?)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let (Some(orders), Some(output)) = (child.stdin.take(), child.stdout.take()) else {
            return Err("a worker without input or output".into());
        };
        let (told, reports) = mpsc::channel();
        std::thread::spawn(move || {
            for line in BufReader::new(output).lines() {
                let report = line.map_err(Error::from).and_then(|line| Ok(serde_json::from_str(&line)?));
                if told.send(report).is_err() {
                    break;
                }
            }
        });
        Ok(Worker { name, child, orders, reports, complete: None })
    }

    fn order(&mut self, order: Order) -> Result<()> {
        let line = serde_json::to_string(&order)?;
        writeln!(self.orders, "{line}").map_err(|error| format!("the {} takes no orders: {error}", self.name).into())
    }

    /// The next report, other than that the last message is there.
    fn report(&mut self) -> Result<Report> {
        loop {
            match self.reports.recv_timeout(PATIENCE) {
                Ok(Ok(Report::Complete { clock_ns, cpu_ns })) => self.complete = Some(Complete { clock_ns, cpu_ns }),
                Ok(report) => return report,
                Err(mpsc::RecvTimeoutError::Timeout) => {
                    return Err(format!("the {} said nothing for {PATIENCE:?}", self.name).into());
                }
                Err(mpsc::RecvTimeoutError::Disconnected) => {
                    return Err(format!("the {} ended early", self.name).into());
                }
            }
        }
    }

    fn unexpected<T>(&self, report: Report) -> Result<T> {
        Err(format!("the {} said out of turn: {report:?}", self.name).into())
    }

    fn listening(&mut self) -> Result<SocketAddr> {
        match self.report()? {
            Report::Listening(address) => Ok(address),
            report => self.unexpected(report),
        }
    }

    fn ready(&mut self) -> Result<()> {
        match self.report()? {
            Report::Ready => Ok(()),
            report => self.unexpected(report),
        }
    }

    fn sent(&mut self) -> Result<Sent> {
        match self.report()? {
            Report::Sent { started_ns, cpu_ns, peak_kib, round_trip } => Ok(Sent {
                started_ns,
                cpu_ns,
                peak_kib,
                p50_ns: round_trip.map(|times| times.p50_ns),
                p99_ns: round_trip.map(|times| times.p99_ns),
            }),
            report => self.unexpected(report),
        }
    }

    fn weigh_at_rest(&mut self) -> Result<u64> {
        std::thread::sleep(REST);
        self.order(Order::Weigh)?;
        match self.report()? {
            Report::Weight { resident_kib } => Ok(resident_kib),
            report => self.unexpected(report),
        }
    }

    fn finished(&mut self) -> Result<(Seen, u64)> {
        match self.report()? {
            Report::Finished { seen, peak_kib } => Ok((seen, peak_kib)),
            report => self.unexpected(report),
        }
    }

    fn complete(&mut self) -> Result<Complete> {
        if let Some(complete) = self.complete {
            return Ok(complete);
        }
        match self.reports.recv_timeout(PATIENCE) {
            Ok(Ok(Report::Complete { clock_ns, cpu_ns })) => Ok(*self.complete.insert(Complete { clock_ns, cpu_ns })),
            Ok(Ok(report)) => self.unexpected(report),
            Ok(Err(error)) => Err(error),
            Err(_) => Err("the receiver never had all messages".into()),
        }
    }

    fn end(&mut self) -> Result<()> {
        let status = self.child.wait()?;
        if status.success() { Ok(()) } else { Err(format!("the {} ended with {status}", self.name).into()) }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        // Both fail, as they should, if it has ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
