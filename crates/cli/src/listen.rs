//! `buffstreams listen`: prints the messages that arrive.

use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use buffstreams::{
    Ended, Handler, HandlerError, HandlerResult, Listener, Message, OnHandlerError, Peer, PeerAddress, ShutdownReport,
    per_connection,
};

use crate::args::ListenArguments;
use crate::output::{Batch, Output, Over, Received};
use crate::progress::{self, Totals};
use crate::report::Report;
use crate::signals::Signals;
use crate::{Outcome, Status};

/// How long what is in hand may take to finish.
const LAST_WORK: Duration = Duration::from_secs(5);

pub(crate) async fn run(arguments: ListenArguments, report: &Arc<Report>) -> Outcome {
    let framing = arguments.framing();
    let output = Output::new(arguments.output(), arguments.count, Arc::clone(report))?;
    let mut signals = Signals::watch()?;
    let listener = Listener::builder()
        .prefix(framing.prefix())
        .max_message_size(framing.max_message_size())
        .on_handler_error(OnHandlerError::Close)
        .sessions(false)
        .bind(arguments.address)
        .await?;
    report.say(format_args!("listening on {}", listener.local_address()));
    watch(&output, report);

    let server = listener.spawn(per_connection({
        let (output, report) = (Arc::clone(&output), Arc::clone(report));
        move |peer: &Peer| Printer {
            peer: peer.address().clone(),
            batch: Batch::new(Arc::clone(&output)),
            report: Arc::clone(&report),
        }
    }));
    let mut status = loop {
        tokio::select! {
            over = output.over() => break match over {
                Over::CountReached => Status::Success,
                Over::Failed(error) => {
                    report.fail(format_args!("standard output: {error}"));
                    Status::Failure
                }
            },
            () = signals.first() => break Status::Success,
            () = tokio::time::sleep(Duration::from_secs(1)) => report.say_left_out(),
        }
    };
    output.close();
    let ShutdownReport { cut, .. } = server.shutdown(LAST_WORK).await;
    report.finish();
    report.say_left_out();
    let Received { messages, bytes, undecodable } = output.received();
    if cut > 0 {
        report.fail(format_args!("{cut} connections had more in hand than could be printed within {LAST_WORK:?}"));
        status = Status::Failure;
    }
    if undecodable > 0 {
        report.say(format_args!("{undecodable} messages could not be decoded"));
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
    batch: Batch,
    report: Arc<Report>,
}

impl Handler for Printer {
    fn message(&mut self, message: Message<'_>) -> HandlerResult {
        self.batch.add(&message, &self.peer).map_err(HandlerError::from)
    }

    fn batch_end(&mut self) -> HandlerResult {
        self.batch.end().map_err(HandlerError::from)
    }

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<HandlerResult> {
        // What would not be printed is not even read, until the program ends.
        if self.batch.output().takes_no_more() { Poll::Pending } else { Poll::Ready(Ok(())) }
    }

    fn poll_finished(&mut self, _: &mut Context<'_>) -> Poll<HandlerResult> {
        Poll::Ready(Ok(()))
    }

    fn ended(&mut self, why: &Ended) {
        match why {
            Ended::EndOfStream | Ended::ShutDown => {}
            // Told once, for the whole program.
            Ended::Cut | Ended::HandlerFailed(_) => {}
            why => self.report.error(format_args!("connection from {} closed: {why}", self.peer)),
        }
    }
}
