//! `buffstreams record`: keeps the messages that arrive in a file. It receives as `listen` does.

use std::fs;
use std::io::Write;
use std::sync::Arc;

use crate::args::RecordArguments;
use crate::output::Output;
use crate::report::Report;
use crate::{Outcome, listen, recording};

pub(crate) async fn run(arguments: RecordArguments, report: &Arc<Report>) -> Outcome {
    let framing = arguments.receive.framing("record");
    let name = arguments.file.display().to_string();
    let mut file = recording::create(&arguments.file, arguments.force)?;
    file.write_all(&recording::head(&framing)).map_err(|error| format!("{name}: {error}"))?;
    let output = Output::recording(file, name, arguments.receive.count, Arc::clone(report))?;
    let outcome = listen::receive(arguments.receive, framing, &output, report).await;
    if outcome.is_err() {
        // It could not begin, and would be in its own way the next time.
        drop(fs::remove_file(&arguments.file));
    }
    outcome
}
