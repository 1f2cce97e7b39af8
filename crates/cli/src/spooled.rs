//! `buffstreams failed`: the failed messages that a spool keeps.

use std::io::{self, BufWriter, Write};
use std::sync::Arc;

use buffstreams::{Spool, SpooledFailure};

use crate::args::{FailedAction, FailedArguments};
use crate::output::stdout_failed;
use crate::report::{Report, bytes, counted};
use crate::{Outcome, Status};

/// How much of a message a line shows, in bytes.
const SHOWN: usize = 60;

pub(crate) fn run(arguments: &FailedArguments, report: &Arc<Report>) -> Outcome {
    // To look is not to make one.
    if !Spool::is_in(&arguments.directory) {
        return Err(format!("{}: there is no spool", arguments.directory.display()).into());
    }
    let mut spool = Spool::open(&arguments.directory)?;
    let mut status = Status::Success;
    let chosen = choose(&spool, arguments, report, &mut status);
    let directory = arguments.directory.display();
    match arguments.action {
        FailedAction::List => list(&spool, &chosen).map_err(stdout_failed)?,
        FailedAction::Send => {
            let count = spool.retry_failed(&chosen)?;
            let go = counted(count, "message goes", "messages go");
            report.say(format_args!("{go} with the next send --delivery acked --spool {directory}"));
        }
        FailedAction::Drop => {
            let count = spool.drop_failed(&chosen)?;
            report.say(format_args!("{} dropped", counted(count, "message", "messages")));
        }
    }
    Ok(status)
}

/// The numbers of the messages that are meant. What is damaged, and what is not there, is told.
fn choose(spool: &Spool, arguments: &FailedArguments, report: &Report, status: &mut Status) -> Vec<u64> {
    let mut known = Vec::new();
    for failed in spool.failed() {
        match failed {
            Ok(failed) => known.push(failed.number),
            Err(error) => {
                report.error(error);
                *status = Status::Failure;
            }
        }
    }
    if arguments.numbers.is_empty() {
        return known;
    }
    let (mut there, missing): (Vec<_>, Vec<_>) =
        arguments.numbers.iter().copied().partition(|number| known.binary_search(number).is_ok());
    for number in missing {
        report.error(format_args!("there is no failed message {number}"));
        *status = Status::Failure;
    }
    there.sort_unstable();
    there.dedup();
    there
}

fn list(spool: &Spool, chosen: &[u64]) -> io::Result<()> {
    let mut out = BufWriter::new(io::stdout().lock());
    for failed in spool.failed().filter_map(Result::ok).filter(|failed| chosen.binary_search(&failed.number).is_ok()) {
        let SpooledFailure { number, message, rejection, at, .. } = failed;
        let (code, reason) = (rejection.code, rejection.text.escape_debug());
        let shown = message[..message.len().min(SHOWN)].escape_ascii();
        let more = if message.len() > SHOWN { "…" } else { "" };
        let at = humantime::format_rfc3339_seconds(at);
        writeln!(out, "{number}\t{at}\t{}\t{code}\t{reason}\t{shown}{more}", bytes(message.len()))?;
    }
    out.flush()
}
