//! The program `buffstreams`: `listen`, `send`, `tap`, `record`, `bench`, `top` and others, on top of the library.
//!
//! Each subcommand has a file; what they share is how messages stand in text and files (`input`, `output`, `schema`), and
//! what a person or a script is told on standard error (`report`, `progress`).

mod args;
mod bench;
mod config;
mod demo;
mod echo;
mod export;
mod failed;
mod fields;
mod guess;
mod input;
mod line;
mod listen;
mod manual;
mod metrics;
mod output;
mod overheard;
mod pacer;
mod progress;
mod record;
mod recording;
mod refusals;
mod repeats;
mod replay;
mod report;
mod schema;
mod send;
mod shown;
mod signals;
mod socket;
mod spooled;
mod tap;
mod top;

use std::process;
use std::sync::Arc;

use tracing_subscriber::layer::SubscriberExt;

use crate::args::Command;
use crate::report::{LibraryEvents, Report};

/// How the program ends. Usage errors, with 2, have ended it before there is a status.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Status {
    Success = 0,
    Failure = 1,
}

/// What a subcommand comes to: a status, or an error that stands for [`Status::Failure`] and is still to be told.
type Outcome = Result<Status, Box<dyn std::error::Error + Send + Sync>>;

fn main() {
    let command = args::parse();
    let report = Report::new();
    let events = tracing_subscriber::registry().with(LibraryEvents(report.clone()));
    tracing::subscriber::set_global_default(events).expect("nobody else sets one");
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    let status = match &runtime {
        Ok(runtime) => runtime.block_on(run(command, &report)),
        Err(error) => Err(format!("cannot start: {error}").into()),
    };
    let status = status.unwrap_or_else(|error| {
        report.finish();
        report.fail(error);
        Status::Failure
    });
    // The runtime is still there: to drop it would be to wait for threads that are blocked in a read or a write, for ever.
    process::exit(status as i32)
}

async fn run(command: Command, report: &Arc<Report>) -> Outcome {
    match command {
        Command::Listen(arguments) => listen::run(arguments, report).await,
        Command::Send(arguments) => send::run(arguments, report).await,
        Command::Tap(arguments) => tap::run(arguments, report).await,
        Command::Record(arguments) => record::run(arguments, report).await,
        Command::Replay(arguments) => replay::run(arguments, report).await,
        Command::Export(arguments) => export::run(&arguments, report),
        Command::Failed(arguments) => spooled::run(&arguments, report),
        Command::Bench(arguments) => bench::run(arguments, report).await,
        Command::Top(arguments) => top::run(arguments, report).await,
        Command::Demo(arguments) => demo::run(arguments, report).await,
        Command::Completions { shell } => manual::completions(shell),
        Command::Man { directory } => manual::run(directory.as_deref()),
    }
}
