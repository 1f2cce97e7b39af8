//! `buffstreams send`: sends what it reads, and accounts for every message.

use std::fmt;
use std::io::{self, IsTerminal};
use std::path::Path;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use buffstreams::{Backoff, Connection, FailedMessage, Rejection, Retry, TlsClient};
use indicatif::{HumanCount, ProgressBar};

use crate::args::{Delivery, SendArguments};
use crate::failed::FailedFile;
use crate::input::{self, Content, Messages};
use crate::line::{self, Line};
use crate::metrics::Metrics;
use crate::progress::{self, Totals};
use crate::report::{Report, bytes, counted};
use crate::signals::Signals;
use crate::{Outcome, Status};

/// The longest pause between two attempts to connect.
pub(crate) const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// How long what is in hand may take after a signal, and the last goodbyes after everything is settled.
pub(crate) const LAST_WORK: Duration = Duration::from_secs(5);

/// What takes longer after a signal is worth a word.
const MOMENT: Duration = Duration::from_secs(1);

pub(crate) async fn run(arguments: SendArguments, report: &Arc<Report>) -> Outcome {
    let delivery = arguments.delivery()?;
    let framing = arguments.framing()?;
    let format = arguments.input()?;
    let tls = arguments.tls.client()?;
    let (source, length) = input::open(&arguments.file)?;
    if let Some(failed) = &arguments.failed
        && are_the_same(&arguments.file, failed)
    {
        return Err(format!("{}: to keep failed messages there would empty the input", failed.display()).into());
    }
    let failures = Failures::new(arguments.failed.as_deref(), report)?;
    let mut signals = Signals::watch_with(report, tls.as_ref(), TlsClient::reload)?;
    let metrics = Metrics::bind(arguments.metrics.as_ref()).await?;
    let mut builder = match delivery {
        Delivery::Sent => Connection::builder(),
        Delivery::Acked { window, patience } => {
            let acked = Connection::builder().delivery(buffstreams::Delivery::Acked);
            acked.window(window).endpoint_patience(patience)
        }
    };
    if let Some(tls) = tls {
        builder = builder.tls(tls);
    }
    let builder = builder
        .prefix(framing.prefix())
        .max_message_size(framing.max_message_size())
        .retry(if arguments.retry_for.is_zero() { Retry::Never } else { Retry::For(arguments.retry_for) })
        .backoff(Backoff { max: LONGEST_PAUSE, ..Backoff::default() })
        .on_failed({
            let failures = Arc::clone(&failures);
            move |failed: FailedMessage| failures.given_up(&failed)
        });
    let (line, damaged) = tokio::select! {
        opened = Line::open(builder, &arguments, report) => opened?,
        () = signals.first() => return Err("interrupted before the first connection".into()),
    };
    if let Some(metrics) = metrics {
        metrics.announce(report)?;
        metrics.serve()?;
    }
    // A line that is drawn again and again would erase what is being typed.
    let is_typed = arguments.file == Path::new("-") && io::stdin().is_terminal();
    let read = ProgressBar::hidden();
    if !is_typed {
        watch(&line, length, &read, report);
    }
    let chunks = input::read(read.wrap_read(source));
    let mut messages = Messages::new(chunks, format, framing.max_message_size(), failures.has_file());

    let mut left = Vec::new();
    let end = line.send_all(&mut messages, &failures, &mut signals, &mut left).await;
    let end = match end {
        End::InputUsedUp | End::InputFailed(_) => tokio::select! {
            all = line.flush() => if all { end } else { End::PeerAway },
            () = signals.first() => End::Interrupted,
        },
        End::PeerAway | End::Interrupted | End::Failed(_) => end,
    };
    // Where nobody listens there is nothing to wait for.
    let closing = line.close(if line.connected().0 == 0 { Duration::ZERO } else { LAST_WORK });
    let closed = match end {
        End::Interrupted => last_work(closing, report).await,
        _ => closing.await,
    };
    let mut end = end;
    let mut stats = match closed {
        Ok(stats) => stats,
        Err(error) => {
            end = End::Failed(error);
            line.stats()
        }
    };
    if let (Some(directory), End::PeerAway | End::Interrupted) = (&arguments.spool, &end) {
        let is_all = matches!(end, End::Interrupted);
        match line::keep_rest(left, (!is_all).then_some(&mut messages), directory, &arguments, &failures).await {
            Ok(kept) => {
                stats.accepted += kept;
                stats.in_flight += kept;
            }
            Err(error) => end = End::Failed(error),
        }
    }
    report.finish();
    let unsendable = failures.unsendable();
    let (accepted, failed) = (stats.recovered + stats.accepted + unsendable, stats.failed + unsendable);
    report.say_left_out();
    let refusal = line.refusal().filter(|_| stats.failed > 0 || matches!(end, End::PeerAway));
    if let Some(reason) = end.reason(refusal) {
        report.fail(reason);
    }
    if stats.connected == 0 && (stats.failed > 0 || matches!(end, End::PeerAway)) {
        report.advise();
    }
    if let Some(directory) = arguments.spool.as_deref().map(Path::display) {
        if stats.in_flight > 0 {
            let kept = counted(stats.in_flight, "message is kept", "messages are kept");
            report.say(format_args!("spool: {kept} for the next send --spool {directory}"));
        }
        if stats.failed > 0 {
            let kept = counted(stats.failed, "failed message is kept", "failed messages are kept");
            report.say(format_args!("spool: {kept}: buffstreams failed {directory} list"));
        }
    }
    report.say(format_args!("accepted {accepted}, settled {}, failed {failed}", stats.settled));
    let all_well = failed == 0 && damaged == 0 && matches!(end, End::InputUsedUp);
    Ok(if all_well { Status::Success } else { Status::Failure })
}

/// Waits for what is left to do after a signal, and says so unless it takes only a moment.
pub(crate) async fn last_work<T>(work: impl Future<Output = T>, report: &Report) -> T {
    let mut work = pin!(work);
    if let Ok(done) = tokio::time::timeout(MOMENT, &mut work).await {
        return done;
    }
    report.say(format_args!("finishing what is in hand, for {LAST_WORK:?} at most; Ctrl-C again ends it at once"));
    work.await
}

/// Why no more is sent.
#[derive(Debug)]
pub(crate) enum End {
    InputUsedUp,
    InputFailed(io::Error),
    PeerAway,
    Interrupted,
    Failed(buffstreams::Error),
}

impl End {
    /// What there is to say of it. `refusal` is why the peer does not grant acknowledged messages, if it does not.
    pub(crate) fn reason(&self, refusal: Option<String>) -> Option<String> {
        match (self, refusal) {
            (End::InputFailed(error), _) => Some(format!("cannot read the input any further: {error}")),
            (End::Failed(error), _) => Some(error.to_string()),
            (End::Interrupted, _) => Some("interrupted; the input was read no further".to_owned()),
            (End::InputUsedUp | End::PeerAway, Some(why)) => Some(format!("--delivery acked was not granted: {why}")),
            (End::InputUsedUp, None) => None,
            (End::PeerAway, None) => {
                Some("the peer was away for longer than --retry-for allows; the warnings say what was tried".to_owned())
            }
        }
    }
}

fn are_the_same(one: &Path, other: &Path) -> bool {
    one.canonicalize().ok().zip(other.canonicalize().ok()).is_some_and(|(one, other)| one == other)
}

/// Shows how far it is, where somebody can see it: what is settled, and not what was `read`.
fn watch(line: &Line, length: Option<u64>, read: &ProgressBar, report: &Report) {
    let totals = {
        let line = line.clone();
        move |position| Totals { messages: line.stats().settled, bytes: position }
    };
    let state = {
        let line = line.clone();
        move || {
            let in_hand = match line.stats().in_flight {
                0 => String::new(),
                messages => format!("  ({} in hand)", HumanCount(messages)),
            };
            match line.connected() {
                (0, _) => in_hand + "  (not connected)",
                (some, all) if some < all => in_hand + "  (not all connected)",
                _ => in_hand,
            }
        }
    };
    let bar = progress::line(length, totals, state);
    report.share_with(bar.clone());
    let (line, read) = (line.clone(), read.clone());
    // Messages stand for equal parts of what was read: where one ends in the input is not kept.
    progress::follow(&bar, move || {
        let stats = line.stats();
        let taken = (stats.recovered + stats.accepted).max(1);
        (u128::from(read.position()) * u128::from(stats.settled) / u128::from(taken)) as u64
    });
}

/// Where everything goes that is not sent: to standard error, to the file if there is one, and into the account.
#[derive(Debug)]
pub(crate) struct Failures {
    file: Option<FailedFile>,
    /// Messages that the connection never accepted; its own account has the others.
    unsendable: AtomicU64,
    report: Arc<Report>,
}

impl Failures {
    pub(crate) fn new(file: Option<&Path>, report: &Arc<Report>) -> io::Result<Arc<Failures>> {
        let file = file.map(|path| FailedFile::create(path, report)).transpose()?;
        Ok(Arc::new(Failures { file, unsendable: AtomicU64::new(0), report: Arc::clone(report) }))
    }

    fn has_file(&self) -> bool {
        self.file.is_some()
    }

    pub(crate) fn unsendable(&self) -> u64 {
        self.unsendable.load(Ordering::Relaxed)
    }

    /// The connection gave an accepted message up.
    pub(crate) fn given_up(&self, failed: &FailedMessage) {
        let (length, reason) = (bytes(failed.message.len()), &failed.reason);
        match &failed.rejection {
            None => self.report.error(format_args!("a message of {length} failed: {reason}")),
            Some(Rejection { code, text, .. }) => {
                self.report.error(format_args!("a message of {length} failed: {reason} with code {code}: {text}"));
            }
        }
        if let Some(file) = &self.file {
            file.add(&failed.message);
        }
    }

    /// The connection did not accept a message.
    pub(crate) fn refused(&self, message: &[u8], why: &dyn fmt::Display) {
        self.unsendable.fetch_add(1, Ordering::Relaxed);
        self.report.error(format_args!("a message of {} failed: {why}", bytes(message.len())));
        if let Some(file) = &self.file {
            file.add(message);
        }
    }

    /// The input has no message here.
    pub(crate) fn not_sendable(&self, why: impl fmt::Display, content: Content) {
        self.unsendable.fetch_add(1, Ordering::Relaxed);
        self.report.error(why);
        if let Some(file) = &self.file {
            file.add_content(content);
        }
    }
}
