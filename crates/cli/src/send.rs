//! `buffstreams send`: sends what it reads, and accounts for every message.

use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use buffstreams::{Backoff, Connection, FailedMessage, Rejection, Retry, State};
use indicatif::ProgressBar;

use crate::args::{Delivery, SendArguments};
use crate::failed::FailedFile;
use crate::input::{self, Content, Item, Messages};
use crate::progress::{self, Totals};
use crate::report::Report;
use crate::signals::Signals;
use crate::{Outcome, Status};

/// The longest pause between two attempts to connect.
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// How long what is in hand may take after a signal, and the last goodbyes after everything is settled.
const LAST_WORK: Duration = Duration::from_secs(5);

pub(crate) async fn run(arguments: SendArguments, report: &Arc<Report>) -> Outcome {
    let delivery = arguments.delivery();
    let framing = arguments.framing();
    let format = arguments.input();
    let (source, length) = open(&arguments.file)?;
    if let Some(failed) = &arguments.failed
        && are_the_same(&arguments.file, failed)
    {
        return Err(format!("{}: to keep failed messages there would empty the input", failed.display()).into());
    }
    let failures = Failures::new(arguments.failed.as_deref(), report)?;
    let mut signals = Signals::watch()?;
    let builder = match delivery {
        Delivery::Sent => Connection::builder(),
        Delivery::Acked { window } => Connection::builder().delivery(buffstreams::Delivery::Acked).window(window),
    };
    let connection = builder
        .prefix(framing.prefix())
        .max_message_size(framing.max_message_size())
        .retry(if arguments.retry_for.is_zero() { Retry::Never } else { Retry::For(arguments.retry_for) })
        .backoff(Backoff { max: LONGEST_PAUSE, ..Backoff::default() })
        .on_failed({
            let failures = Arc::clone(&failures);
            move |failed: FailedMessage| failures.given_up(&failed)
        })
        .dial_lazy(arguments.address)?;
    let bar = watch(&connection, length, report);
    let chunks = input::read(bar.wrap_read(source));
    let mut messages = Messages::new(chunks, format, framing.max_message_size(), failures.has_file());

    let end = send_all(&mut messages, &connection, &failures, &mut signals).await;
    let end = match end {
        End::InputUsedUp | End::InputFailed(_) => tokio::select! {
            _ = connection.flush() => end,
            () = signals.first() => End::Interrupted,
        },
        End::PeerAway | End::Interrupted => end,
    };
    let stats = connection.close(LAST_WORK).await?;
    report.finish();
    let unsendable = failures.unsendable();
    let (accepted, failed) = (stats.accepted + unsendable, stats.failed + unsendable);
    report.say_left_out();
    let refusal = connection.refusal().filter(|_| stats.failed > 0 || matches!(end, End::PeerAway));
    if let Some(reason) = end.reason(refusal) {
        report.fail(reason);
    }
    report.say(format_args!("accepted {accepted}, settled {}, failed {failed}", stats.settled));
    Ok(if failed == 0 && matches!(end, End::InputUsedUp) { Status::Success } else { Status::Failure })
}

/// Why no more is sent.
enum End {
    InputUsedUp,
    InputFailed(io::Error),
    PeerAway,
    Interrupted,
}

impl End {
    /// What there is to say of it. `refusal` is why the peer refuses to acknowledge messages, if it does.
    fn reason(&self, refusal: Option<String>) -> Option<String> {
        match (self, refusal) {
            (End::InputFailed(error), _) => Some(format!("cannot read the input any further: {error}")),
            (End::Interrupted, _) => Some("interrupted; the input was read no further".to_owned()),
            (End::InputUsedUp | End::PeerAway, Some(why)) => Some(format!("--delivery acked was refused: {why}")),
            (End::InputUsedUp, None) => None,
            (End::PeerAway, None) => Some("the peer was away for longer than --retry-for allows".to_owned()),
        }
    }
}

/// Sends until there is a reason not to. What was read by then is accounted for, whatever the reason.
async fn send_all(messages: &mut Messages, connection: &Connection, failures: &Failures, signals: &mut Signals) -> End {
    loop {
        let next = tokio::select! {
            biased;
            next = messages.next() => next,
            () = connection.closed() => return End::PeerAway,
            () = signals.first() => return End::Interrupted,
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
            sent = connection.send(message) => if let Err(error) = sent {
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

/// The input, and its length where that is known.
fn open(path: &Path) -> io::Result<(Box<dyn Read + Send>, Option<u64>)> {
    if path == Path::new("-") {
        return Ok((Box::new(io::stdin()), None));
    }
    let named = |error: io::Error| io::Error::new(error.kind(), format!("{}: {error}", path.display()));
    let file = File::open(path).map_err(named)?;
    let metadata = file.metadata().map_err(named)?;
    let length = metadata.is_file().then_some(metadata.len());
    Ok((Box::new(file), length))
}

fn are_the_same(one: &Path, other: &Path) -> bool {
    one.canonicalize().ok().zip(other.canonicalize().ok()).is_some_and(|(one, other)| one == other)
}

/// Shows how far it is, where somebody can see it.
fn watch(connection: &Connection, length: Option<u64>, report: &Report) -> ProgressBar {
    let totals = {
        let connection = connection.clone();
        move |position| Totals { messages: connection.stats().accepted, bytes: position }
    };
    let state = {
        let connection = connection.clone();
        move || match connection.state() {
            State::Connected => "",
            _ => "  (not connected)",
        }
    };
    let bar = progress::line(length, totals, state);
    report.share_with(bar.clone());
    bar
}

/// Where everything goes that is not sent: to standard error, to the file if there is one, and into the account.
#[derive(Debug)]
struct Failures {
    file: Option<FailedFile>,
    /// Messages that the connection never accepted; its own account has the others.
    unsendable: AtomicU64,
    report: Arc<Report>,
}

impl Failures {
    fn new(file: Option<&Path>, report: &Arc<Report>) -> io::Result<Arc<Failures>> {
        let file = file.map(|path| FailedFile::create(path, report)).transpose()?;
        Ok(Arc::new(Failures { file, unsendable: AtomicU64::new(0), report: Arc::clone(report) }))
    }

    fn has_file(&self) -> bool {
        self.file.is_some()
    }

    fn unsendable(&self) -> u64 {
        self.unsendable.load(Ordering::Relaxed)
    }

    /// The connection gave an accepted message up.
    fn given_up(&self, failed: &FailedMessage) {
        let (length, reason) = (failed.message.len(), &failed.reason);
        match &failed.rejection {
            None => self.report.error(format_args!("a message of {length} bytes failed: {reason}")),
            Some(Rejection { code, text, .. }) => {
                self.report
                    .error(format_args!("a message of {length} bytes failed: {reason} with code {code}: {text}"));
            }
        }
        if let Some(file) = &self.file {
            file.add(&failed.message);
        }
    }

    /// The connection did not accept a message.
    fn refused(&self, message: &[u8], why: &dyn fmt::Display) {
        self.unsendable.fetch_add(1, Ordering::Relaxed);
        self.report.error(format_args!("a message of {} bytes failed: {why}", message.len()));
        if let Some(file) = &self.file {
            file.add(message);
        }
    }

    /// The input has no message here.
    fn not_sendable(&self, why: impl fmt::Display, content: Content) {
        self.unsendable.fetch_add(1, Ordering::Relaxed);
        self.report.error(why);
        if let Some(file) = &self.file {
            file.add_content(content);
        }
    }
}
