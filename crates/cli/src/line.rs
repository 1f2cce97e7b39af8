//! The way to the peers: a connection with its messages in memory, or one with a spool on disk, or a connection to each.

use std::path::Path;
use std::pin::pin;
use std::time::{Duration, Instant};

use buffstreams::{Connection, ConnectionBuilder, Error, Refused, Spool, SpooledConnection, Spread, State, Stats};
use bytes::Bytes;
use futures_util::StreamExt;
use futures_util::stream::FuturesOrdered;

use crate::args::SendArguments;
use crate::input::{Item, Messages};
use crate::report::{Report, counted};
use crate::send::{End, Failures};
use crate::signals::Signals;

/// Messages that wait together for the disk, and their bytes.
const WRITING: usize = 4096;
const WRITING_BYTES: usize = 8 * 1024 * 1024;

/// How long input is still taken into the spool once the peer was away for too long, and how long a pause in it ends that.
const REST: Duration = Duration::from_secs(5);
const IDLE: Duration = Duration::from_millis(100);

#[derive(Clone, Debug)]
pub(crate) enum Line {
    Memory(Connection),
    Disk(SpooledConnection),
    Spread(Spread),
}

impl Line {
    /// Opens the line; with a spool, says what waits there. Returns how many messages are damaged in it.
    pub(crate) async fn open(
        builder: ConnectionBuilder,
        arguments: &SendArguments,
        report: &Report,
    ) -> Result<(Line, u64), Error> {
        let endpoints = &arguments.endpoints;
        if arguments.spread {
            return Ok((Line::Spread(builder.dial_spread(endpoints).await?), 0));
        }
        let Some(directory) = &arguments.spool else { return Ok((Line::Memory(builder.dial_lazy(endpoints)?), 0)) };
        let spool = open_spool(directory, arguments)?;
        report.say(format_args!("spool: {} to resume", counted(spool.recovered(), "message", "messages")));
        let mut damaged = 0;
        for damage in spool.damage() {
            damaged += damage.messages();
            report.error(format_args!("spool {}: {damage}", directory.display()));
        }
        Ok((Line::Disk(builder.dial_spooled(endpoints, spool)?), damaged))
    }

    pub(crate) fn stats(&self) -> Stats {
        match self {
            Line::Memory(connection) => connection.stats(),
            Line::Disk(connection) => connection.stats(),
            Line::Spread(spread) => spread.stats(),
        }
    }

    /// How many connections are so now, and how many there are.
    pub(crate) fn connected(&self) -> (usize, usize) {
        let are_connected =
            |states: &[State]| (states.iter().filter(|state| **state == State::Connected).count(), states.len());
        match self {
            Line::Memory(connection) => are_connected(&[connection.state()]),
            Line::Disk(connection) => are_connected(&[connection.state()]),
            Line::Spread(spread) => {
                are_connected(&spread.connections().iter().map(|connection| connection.state()).collect::<Vec<_>>())
            }
        }
    }

    pub(crate) fn refusal(&self) -> Option<String> {
        match self {
            Line::Memory(connection) => connection.refusal(),
            Line::Disk(connection) => connection.refusal(),
            Line::Spread(spread) => spread.connections().iter().find_map(|connection| connection.refusal()),
        }
    }

    /// Waits until everything is settled or failed; `false` if the line has ended before.
    pub(crate) async fn flush(&self) -> bool {
        match self {
            Line::Memory(connection) => connection.flush().await.is_ok(),
            Line::Disk(connection) => connection.flush().await.is_ok(),
            Line::Spread(spread) => spread.flush().await.is_ok(),
        }
    }

    pub(crate) async fn close(&self, deadline: Duration) -> Result<Stats, Error> {
        match self {
            Line::Memory(connection) => connection.close(deadline).await,
            Line::Disk(connection) => connection.close(deadline).await,
            Line::Spread(spread) => spread.close(deadline).await,
        }
    }

    /// Sends until there is a reason not to. What was read by then is accounted for, whatever the reason; or it is `left`
    /// for the spool, which the line had given up when it came.
    pub(crate) async fn send_all(
        &self,
        messages: &mut Messages,
        failures: &Failures,
        signals: &mut Signals,
        left: &mut Vec<Bytes>,
    ) -> End {
        match self {
            Line::Memory(connection) => {
                let send = async |message: &[u8]| connection.send(message).await.map(drop);
                send_all(messages, send, connection.closed(), failures, signals).await
            }
            Line::Spread(spread) => {
                let send = async |message: &[u8]| spread.send(message).await;
                send_all(messages, send, spread.closed(), failures, signals).await
            }
            Line::Disk(connection) => spool_all(messages, connection, failures, signals, left).await,
        }
    }
}

fn open_spool(directory: &Path, arguments: &SendArguments) -> Result<Spool, Error> {
    match arguments.spool_size() {
        Some(size) => Spool::builder().max_bytes(size).open(directory),
        None => Spool::open(directory),
    }
}

/// Puts what is left, and the input that is at hand if it is given, into the spool of a line that was closed, for the next.
/// Returns how many messages that were.
pub(crate) async fn keep_rest(
    left: Vec<Bytes>,
    mut messages: Option<&mut Messages>,
    directory: &Path,
    arguments: &SendArguments,
    failures: &Failures,
) -> Result<u64, Error> {
    let mut spool = open_spool(directory, arguments)?;
    let mut kept = 0;
    let until = Instant::now() + REST;
    let mut is_last = false;
    let mut batch = left;
    while !is_last && Instant::now() < until {
        while batch.len() < WRITING && batch.iter().map(Bytes::len).sum::<usize>() < WRITING_BYTES {
            let Some(messages) = &mut messages else {
                is_last = true;
                break;
            };
            match tokio::time::timeout(IDLE, messages.next()).await {
                Ok(Ok(Some(Item::Message(message)))) => batch.push(Bytes::copy_from_slice(message)),
                Ok(Ok(Some(Item::Unsendable(unsendable)))) => {
                    failures.not_sendable(unsendable.to_string(), unsendable.content);
                }
                // There is no more, or not soon.
                Ok(Ok(None) | Err(_)) | Err(_) => {
                    is_last = true;
                    break;
                }
            }
        }
        let taken = spool.append(&batch)?;
        for message in batch.drain(..).skip(taken as usize) {
            failures.refused(&message, &"the spool is full");
            is_last = true;
        }
        kept += taken;
    }
    Ok(kept)
}

/// `send` accepts a message into memory; `closed` is ready once nothing is accepted any more.
async fn send_all(
    messages: &mut Messages,
    send: impl AsyncFn(&[u8]) -> Result<(), Error>,
    closed: impl Future<Output = ()>,
    failures: &Failures,
    signals: &mut Signals,
) -> End {
    let mut closed = pin!(closed);
    loop {
        let next = tokio::select! {
            biased;
            // First, for an input that never pauses leaves the others no turn.
            () = signals.first() => return End::Interrupted,
            next = messages.next() => next,
            () = &mut closed => return End::PeerAway,
        };
        let message = match next {
            Ok(Some(Item::Message(message))) => message,
            Ok(Some(Item::Unsendable(unsendable))) => {
                failures.not_sendable(unsendable.to_string(), unsendable.content);
                continue;
            }
            Ok(None) => return End::InputUsedUp,
            Err(error) => return End::InputFailed(error),
        };
        tokio::select! {
            biased;
            sent = send(message) => if let Err(error) = sent {
                failures.refused(message, &error);
                return End::PeerAway;
            },
            () = signals.first() => {
                failures.refused(message, &"there was no room for it before the interruption");
                return End::Interrupted;
            }
        }
    }
}

/// The same with many under way, since each waits for the disk and all that do so together wait once.
async fn spool_all(
    messages: &mut Messages,
    connection: &SpooledConnection,
    failures: &Failures,
    signals: &mut Signals,
    left: &mut Vec<Bytes>,
) -> End {
    let mut writing = FuturesOrdered::new();
    let mut bytes = 0;
    let mut broken = None;
    let mut written = |bytes: &mut usize, (length, sent): (usize, Result<_, Refused>)| {
        *bytes -= length;
        match sent {
            Ok(_) => true,
            Err(Refused { message, error, .. }) if error.is_closed() => {
                left.push(message);
                false
            }
            Err(Refused { message, error, .. }) => {
                failures.refused(&message, &error);
                broken.get_or_insert(error);
                false
            }
        }
    };
    let mut end = loop {
        // Kept until it is ready: a line that was begun would be lost with it.
        let mut next = pin!(messages.next());
        let next = loop {
            tokio::select! {
                biased;
                // First, as above.
                () = signals.first() => break Err(End::Interrupted),
                next = &mut next, if writing.len() < WRITING && bytes < WRITING_BYTES => break Ok(next),
                Some(sent) = writing.next(), if !writing.is_empty() => if !written(&mut bytes, sent) {
                    break Err(End::PeerAway);
                },
                () = connection.closed() => break Err(End::PeerAway),
            }
        };
        match next {
            Ok(Ok(Some(Item::Message(message)))) => {
                let message = Bytes::copy_from_slice(message);
                bytes += message.len();
                writing.push_back(async { (message.len(), connection.send_bytes(message).await) });
            }
            Ok(Ok(Some(Item::Unsendable(unsendable)))) => {
                failures.not_sendable(unsendable.to_string(), unsendable.content);
            }
            Ok(Ok(None)) => break End::InputUsedUp,
            Ok(Err(error)) => break End::InputFailed(error),
            Err(end) => break end,
        }
    };
    // Where there is no room, an interruption ends the waiting for it: what is on its way to the disk still gets there.
    let mut closing = pin!(connection.close(Duration::ZERO));
    let mut is_closed = false;
    while !writing.is_empty() {
        tokio::select! {
            biased;
            Some(sent) = writing.next() => {
                written(&mut bytes, sent);
            }
            () = signals.first(), if !matches!(end, End::Interrupted) => end = End::Interrupted,
            _ = &mut closing, if matches!(end, End::Interrupted) && !is_closed => is_closed = true,
        }
    }
    if let Some(error) = broken {
        end = End::Failed(error);
    } else if !left.is_empty() && !matches!(end, End::Interrupted) {
        // The line ended while they were on their way to the disk.
        end = End::PeerAway;
    }
    end
}

#[cfg(test)]
mod tests {
    use tokio::sync::mpsc;

    use super::*;
    use crate::args;

    #[tokio::test]
    async fn a_signal_goes_before_input_that_never_pauses() {
        let folder = tempfile::tempdir().unwrap();
        let nowhere = || "unix:/nowhere".parse::<buffstreams::Address>().unwrap();
        let spool = Spool::open(folder.path()).unwrap();
        let acked = Connection::builder().delivery(buffstreams::Delivery::Acked);
        let lines = [
            Line::Memory(Connection::builder().dial_lazy(nowhere()).unwrap()),
            Line::Disk(acked.dial_spooled(nowhere(), spool).unwrap()),
            Line::Spread(Connection::builder().dial_spread([nowhere(), nowhere()]).await.unwrap()),
        ];
        for line in lines {
            let (chunks, receiver) = mpsc::channel(1);
            chunks.try_send(Ok(Bytes::from("line\n".repeat(1000)))).unwrap();
            drop(chunks);
            let mut messages = Messages::new(receiver, args::Input::Lines, 4096, false);
            let failures = Failures::new(None, &Report::new()).unwrap();
            let end = line.send_all(&mut messages, &failures, &mut Signals::raised(), &mut Vec::new()).await;
            assert!(matches!(end, End::Interrupted), "{end:?}");
            assert_eq!(line.stats().accepted, 0);
            line.close(Duration::ZERO).await.unwrap();
        }
    }
}
