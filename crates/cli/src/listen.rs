//! `buffstreams listen`: prints the messages that arrive. `record` receives them in the same way.
//!
//! A message of an acknowledged stream is finished once its batch is written. One for which `--count` has left no place
//! is never finished, so that its sender keeps it for another listener.

use std::io;
use std::sync::Arc;
use std::task::{Context, Poll, Waker, ready};
use std::time::Duration;

use buffstreams::{
    Ended, Framing, Handler, HandlerError, HandlerResult, Listener, Message, OnHandlerError, Peer, PeerAddress,
    ShutdownReport, TlsServer, per_connection,
};

use crate::args::{ListenArguments, ListenLimits, ReceiveArguments};
use crate::echo::Echo;
use crate::metrics::Metrics;
use crate::output::{Batch, Output, Over, Received};
use crate::progress::{self, Totals};
use crate::recording::Source;
use crate::refusals::Refusals;
use crate::report::{Report, counted};
use crate::signals::Signals;
use crate::{Outcome, Status};

/// How long what is in hand may take to finish.
const LAST_WORK: Duration = Duration::from_secs(5);

pub(crate) async fn run(arguments: ListenArguments, report: &Arc<Report>) -> Outcome {
    let framing = arguments.receive.framing()?;
    let output = Output::new(arguments.output()?, arguments.receive.count, Arc::clone(report))?;
    receive(arguments.receive, &arguments.limits, framing, &output, report, || Ok(())).await
}

/// Puts what arrives into `output`, until there is a reason not to. `begin` is called when it listens, before anything arrives.
pub(crate) async fn receive(
    arguments: ReceiveArguments,
    limits: &ListenLimits,
    framing: Framing,
    output: &Arc<Output>,
    report: &Arc<Report>,
    begin: impl FnOnce() -> io::Result<()>,
) -> Outcome {
    let tls = arguments.tls.server()?;
    let mut signals = Signals::watch_with(report, tls.as_ref(), TlsServer::reload)?;
    let metrics = Metrics::bind(arguments.metrics.as_ref()).await?;
    let mut builder = Listener::builder();
    if let Some(tls) = tls {
        builder = builder.tls(tls);
    }
    let listener = limits
        .apply(builder)
        .prefix(framing.prefix())
        .max_message_size(framing.max_message_size())
        .on_handler_error(OnHandlerError::Close)
        .sessions(!arguments.no_sessions)
        .bind(arguments.address)
        .await?;
    begin()?;
    report.say(format_args!("listening on {}", listener.local_address()));
    if let Some(metrics) = &metrics {
        metrics.announce(report)?;
    }
    watch(output, report);

    let server = listener.spawn(per_connection({
        let (output, report) = (Arc::clone(output), Arc::clone(report));
        move |peer: &Peer| Printer {
            peer: peer.address().clone(),
            echo: arguments.echo.then(|| Echo::new(peer)),
            batch: Batch::of(Source::new(peer.id() + 1, peer.address().to_string()), Arc::clone(&output)),
            report: Arc::clone(&report),
            taken: Vec::new(),
            written: 0,
            has_left_out: false,
            waker: Waker::noop().clone(),
        }
    }));
    if let Some(metrics) = metrics {
        metrics.serve()?;
    }
    let mut status = loop {
        tokio::select! {
            over = output.over() => break match over {
                Over::CountReached => Status::Success,
                Over::Failed(error) => {
                    report.fail(format_args!("{}: {error}", output.name()));
                    Status::Failure
                }
            },
            () = signals.first() => break Status::Success,
            () = tokio::time::sleep(Duration::from_secs(1)) => report.say_left_out(),
        }
    };
    output.close();
    let ShutdownReport { cut, unfinished, received, .. } = server.shutdown(LAST_WORK).await;
    report.finish();
    report.say_left_out();
    let Received { messages, bytes, undecodable } = output.received();
    if unfinished > 0 {
        report.fail(format_args!(
            "{} had more in hand than could be printed within {LAST_WORK:?}",
            counted(unfinished as u64, "connection", "connections")
        ));
        status = Status::Failure;
    }
    if cut > unfinished {
        let hung = counted((cut - unfinished) as u64, "sender", "senders");
        report.say(format_args!("{hung} did not answer within {LAST_WORK:?}; nothing of theirs was in hand"));
    }
    let refusals = Refusals(received);
    if refusals.are_any() {
        report.say(&refusals);
    }
    if undecodable > 0 {
        report.say(format_args!("{} could not be decoded", counted(undecodable, "message", "messages")));
    }
    report.say(format_args!("received {messages} messages, {bytes} bytes"));
    Ok(status)
}

/// Shows the rate, where somebody can see it.
fn watch(output: &Arc<Output>, report: &Report) {
    let output = Arc::clone(output);
    let totals = move |_| {
        let Received { messages, bytes, .. } = output.received();
        Totals { messages, bytes }
    };
    report.share_with(progress::line(None, totals, || ""));
}

/// Prints the messages of one connection.
struct Printer {
    peer: PeerAddress,
    /// Sends back what had a place.
    echo: Option<Echo>,
    batch: Batch,
    report: Arc<Report>,
    /// With a `--count`, the numbers in their stream of the messages that had a place; the first `written` of them are in
    /// batches that were written.
    taken: Vec<u64>,
    written: usize,
    /// There was no place for a message.
    has_left_out: bool,
    waker: Waker,
}

impl Handler for Printer {
    fn message(&mut self, message: Message<'_>) -> HandlerResult {
        if !self.batch.add(&message, &self.peer) {
            self.has_left_out = true;
            return Ok(());
        }
        if self.defers()
            && let Some(number) = message.number()
        {
            self.taken.push(number);
        }
        match &mut self.echo {
            Some(echo) => Ok(echo.send(&message)?),
            None => Ok(()),
        }
    }

    fn batch_end(&mut self) -> HandlerResult {
        if let Err(failed) = self.batch.end() {
            self.taken.truncate(self.written);
            return Err(failed.into());
        }
        self.written = self.taken.len();
        if self.written > 0 {
            self.waker.wake_by_ref();
        }
        Ok(())
    }

    /// Only with a `--count`: without one, every message of a batch that was written is finished.
    fn defers(&self) -> bool {
        self.batch.output().has_count()
    }

    fn take_outcomes(&mut self, each: &mut dyn FnMut(u64, HandlerResult)) {
        self.taken.drain(..self.written).for_each(|number| each(number, Ok(())));
        self.written = 0;
    }

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<HandlerResult> {
        self.waker.clone_from(cx.waker());
        if let Some(echo) = &mut self.echo {
            ready!(echo.poll_ready(cx))?;
        }
        let output = self.batch.output();
        match (output.is_full(), output.is_closing()) {
            (false, _) => Poll::Ready(Ok(())),
            // What would not be printed is not even read, until the program ends.
            (true, false) => Poll::Pending,
            (true, true) if self.has_left_out => Poll::Ready(Err(HandlerError::new("--count is reached"))),
            (true, true) => Poll::Ready(Ok(())),
        }
    }

    fn poll_finished(&mut self, cx: &mut Context<'_>) -> Poll<HandlerResult> {
        self.echo.as_mut().map_or(Poll::Ready(Ok(())), |echo| echo.poll_ready(cx))
    }

    fn ended(&mut self, why: &Ended) {
        self.batch.add_end();
        // That it failed is told by whoever waits for the output.
        let _ = self.batch.end();
        match why {
            Ended::EndOfStream | Ended::ShutDown => {}
            // Told once, for the whole program.
            Ended::Cut | Ended::HandlerFailed(_) => {}
            why => self.report.error(format_args!("connection from {} closed: {why}", self.peer)),
        }
    }
}
