//! `buffstreams record`: keeps the messages that arrive in a file. It receives as `listen` does.

use std::fs;
use std::sync::Arc;

use crate::args::RecordArguments;
use crate::output::Output;
use crate::report::Report;
use crate::{Outcome, listen, recording};

pub(crate) async fn run(arguments: RecordArguments, report: &Arc<Report>) -> Outcome {
    let framing = arguments.receive.framing()?;
    let name = arguments.file.display().to_string();
    let (file, is_new) = recording::create(&arguments.file, arguments.force)?;
    let output = Output::recording(file, name, arguments.receive.count, Arc::clone(report))?;
    // Only once it listens is what was in the file given up.
    let begin = || output.begin(&recording::head(&framing));
    let outcome = listen::receive(arguments.receive, &arguments.limits, framing, &output, report, begin).await;
    if outcome.is_err() && is_new {
        // It could not begin, and would be in its own way the next time.
        drop(fs::remove_file(&arguments.file));
    }
    outcome
}
