//! `buffstreams export`: the messages of a recording, written to standard output.

use std::io::BufReader;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, UNIX_EPOCH};

use crate::args::{self, ExportArguments};
use crate::input;
use crate::output::{Batch, Output, Over};
use crate::recording::{self, Event, Recording};
use crate::report::{Report, counted};
use crate::{Outcome, Status};

pub(crate) fn run(arguments: &ExportArguments, report: &Arc<Report>) -> Outcome {
    let format = arguments.output()?;
    let is_counted = matches!(format, args::Output::None);
    let output = Output::new(format, None, Arc::clone(report))?;
    let (file, _) = input::open(&arguments.file)?;
    let name =
        if arguments.file == Path::new("-") { "standard input".into() } else { arguments.file.to_string_lossy() };
    let named = |error: std::io::Error| format!("{name}: {error}");
    let mut recording = Recording::open(BufReader::new(file)).map_err(named)?;
    let mut batch = Batch::new(Arc::clone(&output));
    let mut failure = None;
    let (mut senders, mut first, mut last) = (0, None, Duration::ZERO);
    loop {
        match recording.next() {
            Ok(Some(Event::Received { message, time, .. })) => {
                batch.add(&message, &name);
                last = last.max(time);
                first.get_or_insert(time);
            }
            Ok(Some(Event::Opened { .. })) => senders += 1,
            Ok(Some(Event::Closed { .. })) => {}
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
    let received = output.received();
    if is_counted {
        let when = first.map(|first| {
            let length = Duration::from_millis(last.saturating_sub(first).as_millis() as u64);
            let begin = humantime::format_rfc3339_millis(UNIX_EPOCH + first);
            let senders = counted(senders, "sender", "senders");
            format!(" from {senders} within {}, beginning at {begin}", humantime::format_duration(length))
        });
        let messages = counted(received.messages, "message", "messages");
        let bytes = counted(received.bytes, "byte", "bytes");
        report.say(format_args!("{messages}, {bytes}{}", when.unwrap_or_default()));
    }
    if let Some(failure) = failure {
        return Err(failure.into());
    }
    if received.undecodable > 0 {
        report.say(format_args!("{} could not be decoded", counted(received.undecodable, "message", "messages")));
        return Ok(Status::Failure);
    }
    Ok(Status::Success)
}
