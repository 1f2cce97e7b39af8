//! `buffstreams replay`: sends a recording again, and accounts for every message.

use std::collections::HashMap;
use std::io::{BufReader, Read};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use buffstreams::{Backoff, Connection, Delivery, Error, FailedMessage, Framing, Retry, State, Stats, TlsClient};
use futures_util::future::join_all;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::args::ReplayArguments;
use crate::pacer::Pacer;
use crate::progress::{self, Totals};
use crate::recording::{self, Event, Recording};
use crate::report::Report;
use crate::send::{End, Failures, LAST_WORK, LONGEST_PAUSE, last_work};
use crate::signals::Signals;
use crate::{Outcome, Status};

/// One read of the file.
const READ: usize = 256 * 1024;

/// To be later than this is worth a word.
const LATE: Duration = Duration::from_millis(100);

/// Connections that were closed when those of the recording were, and are not done yet, at the most.
const MOST_CLOSING: usize = 1024;

pub(crate) async fn run(arguments: ReplayArguments, report: &Arc<Report>) -> Outcome {
    let tls = arguments.tls.client()?;
    let name = arguments.file.display();
    let file = recording::open(&arguments.file)?;
    let length = file.metadata().ok().filter(std::fs::Metadata::is_file).map(|metadata| metadata.len());
    let sent = Arc::new(AtomicU64::new(0));
    let totals = {
        let sent = Arc::clone(&sent);
        move |position| Totals { messages: sent.load(Ordering::Relaxed), bytes: position }
    };
    let bar = progress::line(length, totals, || "");
    report.share_with(bar.clone());
    let source = BufReader::with_capacity(READ, bar.wrap_read(file));
    let mut recording = Recording::open(source).map_err(|error| format!("{name}: {error}"))?;
    let framing = arguments.framing(recording.framing())?;
    let is_acked = arguments.is_acked(framing)?;
    let failures = Failures::new(arguments.failed.as_deref(), report)?;
    let mut signals = Signals::watch_with(report, tls.as_ref(), TlsClient::reload)?;

    let mut replay = Replay {
        dial: Dial { arguments: &arguments, framing, is_acked, tls, failures: Arc::clone(&failures) },
        pacer: Pacer::new(arguments.speed),
        open: HashMap::new(),
        closing: JoinSet::new(),
        over: watch::Sender::default(),
        stats: Stats::default(),
        refusal: None,
        failures: Arc::clone(&failures),
        sent,
    };
    let end = replay.send_all(&mut recording, &mut signals).await;
    let end = match end {
        End::InputUsedUp | End::InputFailed(_) => tokio::select! {
            all = replay.flush() => if all { end } else { End::PeerAway },
            () = signals.first() => End::Interrupted,
        },
        end => end,
    };
    match end {
        End::Interrupted => last_work(replay.close(), report).await,
        _ => replay.close().await,
    }
    if matches!(end, End::PeerAway | End::Failed(_)) {
        leave_out(&mut recording, &failures);
    }
    report.finish();
    report.say_left_out();
    recording::say_torn(&recording, &name, report);
    let Replay { pacer, stats, refusal, .. } = replay;
    if pacer.latest() >= LATE {
        let late = humantime::format_duration(Duration::from_millis(pacer.latest().as_millis() as u64));
        report.say(format_args!("ran behind the recorded pace, by {late} at the worst"));
    }
    let unsendable = failures.unsendable();
    let (accepted, failed) = (stats.accepted + unsendable, stats.failed + unsendable);
    let refusal = refusal.filter(|_| stats.failed > 0 || matches!(end, End::PeerAway));
    if let Some(reason) = end.reason(refusal) {
        report.fail(reason);
    }
    if stats.connected == 0 && (stats.failed > 0 || matches!(end, End::PeerAway)) {
        report.advise();
    }
    report.say(format_args!("accepted {accepted}, settled {}, failed {failed}", stats.settled));
    let all_well = failed == 0 && matches!(end, End::InputUsedUp);
    Ok(if all_well { Status::Success } else { Status::Failure })
}

/// What was not sent any more has failed, too: whoever goes on from there has it in the file of failed messages.
fn leave_out<R: Read>(recording: &mut Recording<R>, failures: &Failures) {
    while let Ok(Some(event)) = recording.next() {
        if let Event::Received { message, .. } = event {
            failures.refused(&message, &"it was not sent any more");
        }
    }
}

/// A recording on its way.
struct Replay<'a> {
    dial: Dial<'a>,
    pacer: Pacer,
    /// By the number of the recorded connection.
    open: HashMap<u64, Connection>,
    closing: JoinSet<Gone>,
    /// Tells those that wait in vain that it is over.
    over: watch::Sender<()>,
    /// Of connections that are closed.
    stats: Stats,
    refusal: Option<String>,
    failures: Arc<Failures>,
    sent: Arc<AtomicU64>,
}

/// What is left of a connection.
type Gone = (Stats, Option<String>);

/// How connections are opened.
struct Dial<'a> {
    arguments: &'a ReplayArguments,
    framing: Framing,
    is_acked: bool,
    tls: Option<TlsClient>,
    failures: Arc<Failures>,
}

impl Dial<'_> {
    fn dial(&self) -> Result<Connection, Error> {
        let retry_for = self.arguments.retry_for;
        let mut builder = Connection::builder()
            .prefix(self.framing.prefix())
            .max_message_size(self.framing.max_message_size())
            .delivery(if self.is_acked { Delivery::Acked } else { Delivery::Sent })
            .retry(if retry_for.is_zero() { Retry::Never } else { Retry::For(retry_for) })
            .backoff(Backoff { max: LONGEST_PAUSE, ..Backoff::default() })
            .on_failed({
                let failures = Arc::clone(&self.failures);
                move |failed: FailedMessage| failures.given_up(&failed)
            });
        if let Some(tls) = &self.tls {
            builder = builder.tls(tls.clone());
        }
        builder.dial_lazy(self.arguments.address.clone())
    }
}

impl Replay<'_> {
    async fn send_all<R: Read>(&mut self, recording: &mut Recording<R>, signals: &mut Signals) -> End {
        loop {
            // A file is read where it is needed: what it takes to wait for a disk is less than to ask another thread.
            let (number, time, message) = match recording.next() {
                Ok(Some(Event::Received { connection, time, message })) => (connection, time, Some(message)),
                Ok(Some(Event::Closed { connection, time })) => (connection, time, None),
                Ok(Some(Event::Opened { .. })) => continue,
                Ok(None) => return End::InputUsedUp,
                Err(error) => return End::InputFailed(error),
            };
            let number = if self.dial.arguments.one_connection { 0 } else { number };
            let due = self.pacer.due(time, Instant::now());
            let pause = async {
                if let Some(due) = due {
                    tokio::time::sleep_until(due).await;
                }
            };
            tokio::select! {
                biased;
                // First, for messages that are all due leave it no turn.
                () = signals.first() => return End::Interrupted,
                () = pause => {}
            }
            let Some(message) = message else {
                if !self.dial.arguments.one_connection && !self.let_go(number, signals).await {
                    return End::Interrupted;
                }
                continue;
            };
            let connection = match self.connection(number) {
                Ok(connection) => connection,
                Err(error) => {
                    self.failures.refused(&message, &error);
                    return End::Failed(error);
                }
            };
            tokio::select! {
                biased;
                sent = connection.send(&message) => match sent {
                    Ok(_) => drop(self.sent.fetch_add(1, Ordering::Relaxed)),
                    Err(error) => {
                        self.failures.refused(&message, &error);
                        if error.is_closed() {
                            return End::PeerAway;
                        }
                    }
                },
                () = signals.first() => {
                    self.failures.refused(&message, &"there was no room for it before the interruption");
                    return End::Interrupted;
                }
            }
            self.pacer.done(due, Instant::now());
        }
    }

    fn connection(&mut self, number: u64) -> Result<Connection, Error> {
        if let Some(connection) = self.open.get(&number) {
            return Ok(connection.clone());
        }
        let connection = self.dial.dial()?;
        self.open.insert(number, connection.clone());
        Ok(connection)
    }

    /// The recorded connection was closed here. `false` if there was a signal before there was room to do the same.
    async fn let_go(&mut self, number: u64, signals: &mut Signals) -> bool {
        let Some(connection) = self.open.remove(&number) else { return true };
        while self.closing.len() >= MOST_CLOSING {
            tokio::select! {
                gone = self.closing.join_next() => self.count(gone),
                () = signals.first() => return false,
            }
        }
        let mut over = self.over.subscribe();
        self.closing.spawn(async move {
            tokio::select! {
                _ = connection.flush() => {}
                _ = over.changed() => {}
            }
            close(connection).await
        });
        while let Some(gone) = self.closing.try_join_next() {
            self.count(Some(gone));
        }
        true
    }

    fn count(&mut self, gone: Option<Result<Gone, tokio::task::JoinError>>) {
        let Some(Ok((stats, refusal))) = gone else { return };
        self.stats.accepted += stats.accepted;
        self.stats.settled += stats.settled;
        self.stats.failed += stats.failed;
        self.stats.connected += stats.connected;
        self.refusal = self.refusal.take().or(refusal);
    }

    /// Waits until everything is settled or failed; `false` if a connection has ended before.
    async fn flush(&mut self) -> bool {
        let flushed = join_all(self.open.values().map(|connection| connection.flush())).await;
        while let Some(gone) = self.closing.join_next().await {
            self.count(Some(gone));
        }
        flushed.iter().all(Result::is_ok)
    }

    async fn close(&mut self) {
        self.over.send_replace(());
        for (_, connection) in self.open.drain() {
            self.closing.spawn(close(connection));
        }
        let deadline = Instant::now() + 2 * LAST_WORK;
        while let Ok(Some(gone)) = tokio::time::timeout_at(deadline, self.closing.join_next()).await {
            self.count(Some(gone));
        }
    }
}

async fn close(connection: Connection) -> Gone {
    // Where nobody listens there is nothing to wait for.
    let is_connected = connection.state() == State::Connected;
    let stats = connection.close(if is_connected { LAST_WORK } else { Duration::ZERO }).await;
    (stats.unwrap_or_else(|_| connection.stats()), connection.refusal())
}
