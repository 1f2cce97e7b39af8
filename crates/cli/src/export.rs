//! `buffstreams export`: the messages of a recording, written to standard output.

use std::io::BufReader;
use std::sync::Arc;

use crate::args::ExportArguments;
use crate::output::{Batch, Output, Over};
use crate::recording::{self, Event, Recording};
use crate::report::Report;
use crate::{Outcome, Status};

pub(crate) fn run(arguments: &ExportArguments, report: &Arc<Report>) -> Outcome {
    let output = Output::new(arguments.output()?, None, Arc::clone(report))?;
    let name = arguments.file.display();
    let file = recording::open(&arguments.file)?;
    let named = |error: std::io::Error| format!("{name}: {error}");
    let mut recording = Recording::open(BufReader::new(file)).map_err(named)?;
    let mut batch = Batch::new(Arc::clone(&output));
    let mut failure = None;
    loop {
        match recording.next() {
            Ok(Some(Event::Received { message, .. })) => {
                batch.add(&message, &name);
            }
            Ok(Some(_)) => {}
            Ok(None) => break,
            Err(error) => {
                failure = Some(named(error));
                break;
            }
        }
        if output.is_over().is_some() {
            break;
        }
    }
    let _ = batch.end();
    report.say_left_out();
    recording::say_torn(&recording, &name, report);
    if let Some(Over::Failed(error)) = output.is_over() {
        return Err(format!("{}: {error}", output.name()).into());
    }
    if let Some(failure) = failure {
        return Err(failure.into());
    }
    let received = output.received();
    if received.undecodable > 0 {
        report.say(format_args!("{} messages could not be decoded", received.undecodable));
        return Ok(Status::Failure);
    }
    Ok(Status::Success)
}
