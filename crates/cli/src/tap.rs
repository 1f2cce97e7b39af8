//! `buffstreams tap`: a proxy that changes no byte, and prints the messages that pass.
//!
//! One task has both sockets of a connection. What is read is first read along and printed, and then passed on: whatever
//! the other side has got was printed, and what one side says is printed before the answer to it. So a reader of standard
//! output who takes his time slows the connection down; nothing is left out. While it is being found out what a connection
//! speaks, its bytes pass and only the printing waits.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use buffstreams::{Address, Direction};
use tokio::sync::Notify;

use crate::args::TapArguments;
use crate::output::{Output, Over};
use crate::overheard::{Overheard, Tap};
use crate::report::{Report, counted};
use crate::signals::Signals;
use crate::socket::{Listener, Stream};
use crate::{Outcome, Status};

/// Bytes that are on their way in each direction of a connection, at the most, beside what the kernel holds.
const BUFFER: usize = 64 * 1024;

/// How long to wait before accepting again where that has failed.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

#[derive(Debug, Default)]
struct Passed {
    connections: AtomicU64,
    there: AtomicU64,
    back: AtomicU64,
}

pub(crate) async fn run(arguments: TapArguments, report: &Arc<Report>) -> Outcome {
    let framing = arguments.framing()?;
    let output = Output::new(arguments.output()?, None, Arc::clone(report))?;
    let mut signals = Signals::watch(report)?;
    let listener = Listener::bind(&arguments.listen).await?;
    report.say(format_args!("listening on {}", listener.local_address()?));
    let tap = Arc::new(Tap {
        framing,
        shows_control: arguments.control,
        target: arguments.target.to_string(),
        output: Arc::clone(&output),
        report: Arc::clone(report),
        known: Mutex::default(),
    });
    let passed = Arc::new(Passed::default());
    let mut status = Status::Success;
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((near, peer)) => {
                    passed.connections.fetch_add(1, Ordering::Relaxed);
                    let (tap, target, passed) = (Arc::clone(&tap), arguments.target.clone(), Arc::clone(&passed));
                    tokio::spawn(pass(tap, near, peer, target, passed));
                }
                Err(error) => {
                    report.error(format_args!("a connection could not be accepted: {error}"));
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            },
            over = output.over() => {
                if let Over::Failed(error) = over {
                    report.fail(format_args!("{}: {error}", output.name()));
                    status = Status::Failure;
                }
                break;
            }
            () = signals.first() => break,
            () = tokio::time::sleep(Duration::from_secs(1)) => report.say_left_out(),
        }
    }
    report.say_left_out();
    let Passed { connections, there, back } = &*passed;
    let [connections, there, back] = [connections, there, back].map(|count| count.load(Ordering::Relaxed));
    let received = output.received();
    if received.undecodable > 0 {
        report.say(format_args!("{} could not be decoded", counted(received.undecodable, "message", "messages")));
    }
    let there = counted(there, "byte", "bytes");
    let connections = counted(connections, "connection", "connections");
    let messages = counted(received.messages - received.undecodable, "message", "messages");
    report.say(format_args!("passed {there} to the target and {back} back over {connections}, printed {messages}"));
    Ok(status)
}

/// Passes one connection through, to its end.
async fn pass(tap: Arc<Tap>, near: Stream, peer: String, target: Address, passed: Arc<Passed>) {
    let far = match Stream::connect(&target).await {
        Ok(far) => far,
        Err(error) => {
            tap.report.error(format_args!("{error}; the connection from {peer} is reset"));
            return near.reset();
        }
    };
    let report = Arc::clone(&tap.report);
    let overheard = Mutex::new(Overheard::new(tap, peer.clone(), Instant::now()));
    let something_came = Notify::new();
    let both = async {
        tokio::try_join!(
            copy(Direction::There, &near, &far, &overheard, &something_came, &passed.there),
            copy(Direction::Back, &far, &near, &overheard, &something_came, &passed.back),
        )
    };
    let result = tokio::select! {
        result = both => result,
        () = watch_silence(&overheard, &something_came) => unreachable!("it watches for ever"),
    };
    lock(&overheard).over();
    if let Err(error) = result {
        report.error(format_args!("connection from {peer} was broken off, and so is its other side: {error}"));
        near.reset();
        far.reset();
    }
}

async fn copy(
    direction: Direction,
    from: &Stream,
    to: &Stream,
    overheard: &Mutex<Overheard>,
    something_came: &Notify,
    passed: &AtomicU64,
) -> io::Result<()> {
    let (source, sink) = match direction {
        Direction::There => ("the sender", "the target"),
        Direction::Back => ("the target", "the sender"),
    };
    let of = |side: &str, error: io::Error| io::Error::new(error.kind(), format!("{side}: {error}"));
    let mut buffer = vec![0; BUFFER];
    loop {
        // Neither direction may keep the other, nor other connections, from their turn.
        tokio::task::consume_budget().await;
        from.readable().await.map_err(|error| of(source, error))?;
        let read = match from.try_read(&mut buffer) {
            Ok(read) => read,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                lock(overheard).stopped(direction);
                continue;
            }
            Err(error) => return Err(of(source, error)),
        };
        if read == 0 {
            lock(overheard).ended(direction);
            to.end();
            return Ok(());
        }
        lock(overheard).heard(direction, &buffer[..read], Instant::now());
        something_came.notify_one();
        to.write_all(&buffer[..read]).await.map_err(|error| of(sink, error))?;
        passed.fetch_add(read as u64, Ordering::Relaxed);
    }
}

/// Lets the guess be made with what there is when nothing more comes.
async fn watch_silence(overheard: &Mutex<Overheard>, something_came: &Notify) {
    loop {
        let quiet_at = lock(overheard).quiet_at();
        match quiet_at {
            Some(at) => tokio::time::sleep_until(at.into()).await,
            None => something_came.notified().await,
        }
        lock(overheard).quiet(Instant::now());
    }
}

fn lock(overheard: &Mutex<Overheard>) -> MutexGuard<'_, Overheard> {
    overheard.lock().unwrap_or_else(PoisonError::into_inner)
}
