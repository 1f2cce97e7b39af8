//! The two ends of a run, as processes: what they are told and what they report, a line of text each.
//!
//! A receiver says where it listens, when every connection has said hello, when all is there, and at the end what it
//! saw. A sender connects and says hello, waits for `go`, and says when it has sent everything.

use std::any::Any;
use std::io::{BufRead, Write};
use std::net::SocketAddr;
use std::time::Duration;

use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};

use crate::Result;
use crate::load::{Load, Seen};
use crate::meter::{self, Moment};
use crate::system;
use crate::tally::Tally;

/// How long connections may take to end after their sender is gone.
const ENDING: Duration = Duration::from_secs(10);

/// What a worker is to be.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Role {
    pub(crate) system: String,
    pub(crate) load: Load,
    /// Where the receiver is. A worker without it is the receiver.
    pub(crate) receiver: Option<SocketAddr>,
}

/// What a worker says.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) enum Report {
    /// Receiver: here.
    Listening(SocketAddr),
    /// Both: all connections are open and have carried a message.
    Ready,
    /// Receiver: the last message is there. Processor time since `Ready`.
    Complete { clock_ns: u64, cpu_ns: u64 },
    /// Receiver: resident memory now.
    Weight { resident_kib: u64 },
    /// Sender: all is sent. Processor time since `go`.
    Sent { started_ns: u64, cpu_ns: u64, peak_kib: u64, round_trip: Option<RoundTrip> },
    /// Receiver: all connections have ended.
    Finished { seen: Seen, peak_kib: u64 },
}

/// Nanoseconds there and back.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) struct RoundTrip {
    pub(crate) p50_ns: u64,
    pub(crate) p99_ns: u64,
}

/// What a worker is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Order {
    /// To a sender that is ready.
    Go,
    /// To a receiver.
    Weigh,
    /// To both, when nothing more is wanted of them.
    Finish,
}

/// A receiver at work, for as long as this is held.
pub(crate) struct Receiving {
    pub(crate) address: SocketAddr,
    pub(crate) at_work: Box<dyn Any + Send>,
}

/// What a sender has done. Its connections stay open for as long as this is held.
#[derive(Default)]
pub(crate) struct Done {
    pub(crate) round_trips: Option<Histogram<u64>>,
    pub(crate) connections: Option<Box<dyn Any + Send>>,
}

/// Where a sender stops until the clock starts.
#[derive(Debug, Default)]
pub(crate) struct Gate {
    passed: Option<Moment>,
}

impl Gate {
    /// Says that all connections are open and have carried a message, and waits for `go`.
    ///
    /// Blocks the thread: nothing else is to be done then.
    pub(crate) fn pass(&mut self) -> Result<()> {
        say(&Report::Ready);
        match order()? {
            Order::Go => self.passed = Some(Moment::now()?),
            other => return Err(format!("told to {other:?} before the start").into()),
        }
        Ok(())
    }
}

/// Plays the role to its end.
pub(crate) fn work(role: Role) -> Result<()> {
    let Some(runner) = system::find(&role.system).and_then(|system| system.runner) else {
        return Err(format!("there is no system {}", role.system).into());
    };
    meter::raise_open_files()?;
    let runtime = tokio::runtime::Runtime::new()?;
    let load = role.load;
    match role.receiver {
        None => {
            let tally = Tally::new(load);
            let receiving = runtime.block_on(runner.receive(load, tally.clone()))?;
            say(&Report::Listening(receiving.address));
            let seen = loop {
                match order()? {
                    Order::Weigh => say(&Report::Weight { resident_kib: meter::resident_kib()? }),
                    Order::Finish => break tally.finish(ENDING),
                    Order::Go => return Err("told to go, but it is a receiver".into()),
                }
            };
            say(&Report::Finished { seen, peak_kib: meter::peak_resident_kib()? });
            drop(receiving.at_work);
        }
        Some(address) => {
            let mut gate = Gate::default();
            let done = runtime.block_on(runner.send(load, address, &mut gate))?;
            let now = Moment::now()?;
            let started = gate.passed.ok_or("the sender never waited for the start")?;
            let round_trip = done
                .round_trips
                .as_ref()
                .map(|times| RoundTrip { p50_ns: times.value_at_quantile(0.5), p99_ns: times.value_at_quantile(0.99) });
            say(&Report::Sent {
                started_ns: started.clock_ns,
                cpu_ns: now.cpu_ns - started.cpu_ns,
                peak_kib: meter::peak_resident_kib()?,
                round_trip,
            });
            if order()? != Order::Finish {
                return Err("told something else than to finish".into());
            }
            drop(done.connections);
        }
    }
    // Whatever the systems left running in the background has nothing more to do.
    runtime.shutdown_background();
    Ok(())
}

/// Writes a report to the process that started this one. If that is gone, so is this one.
pub(crate) fn say(report: &Report) {
    if cfg!(test) {
        return;
    }
    let told = serde_json::to_string(report).map(|line| writeln!(std::io::stdout().lock(), "{line}"));
    if !matches!(told, Ok(Ok(()))) {
        std::process::exit(1);
    }
}

fn order() -> Result<Order> {
    let mut line = String::new();
    if std::io::stdin().lock().read_line(&mut line)? == 0 {
        return Err("the process that started this one is gone".into());
    }
    Ok(serde_json::from_str(&line)?)
}
