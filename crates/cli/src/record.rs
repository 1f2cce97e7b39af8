//! `buffstreams record`: keeps the messages that arrive in a file. It receives as `listen` does.

use std::fs::{self, File};
use std::io::{self, Write};
use std::sync::Arc;

use crate::args::RecordArguments;
use crate::output::Output;
use crate::report::Report;
use crate::{Outcome, listen, recording};

pub(crate) async fn run(arguments: RecordArguments, report: &Arc<Report>) -> Outcome {
    let framing = arguments.receive.framing()?;
    let name = arguments.file.display().to_string();
    let (file, is_new) = recording::create(&arguments.file, arguments.force)?;
    let head = recording::head(&framing);
    let begin = {
        let (file, name) = (file.try_clone()?, name.clone());
        move || begin(file, &head).map_err(|error| io::Error::new(error.kind(), format!("{name}: {error}")))
    };
    let output = Output::recording(file, name, arguments.receive.count, Arc::clone(report))?;
    let outcome = listen::receive(arguments.receive, framing, &output, report, begin).await;
    if outcome.is_err() && is_new {
        // It could not begin, and would be in its own way the next time.
        drop(fs::remove_file(&arguments.file));
    }
    outcome
}

/// Only now that it listens is what was in the file given up.
fn begin(mut file: File, head: &[u8]) -> io::Result<()> {
    if file.metadata()?.is_file() {
        file.set_len(0)?;
    }
    file.write_all(head)
}
