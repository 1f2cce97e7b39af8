//! Measures BuffStreams beside a raw socket and its peers: the same messages, the same counts, in turns.
//!
//! A run is two processes, a sender and a receiver, which are this program once more (`worker`). `run` starts them and
//! turns what they report into figures; `rounds` interleaves the systems; `report` and `page` show the outcome.
//! No figure comes from a run that lost or added a message.

mod args;
mod case;
mod goal;
mod load;
mod machine;
mod meter;
mod note;
mod page;
mod plot;
mod report;
mod rounds;
mod run;
mod sample;
mod system;
mod systems;
mod tally;
mod worker;

use std::process::ExitCode;

use crate::args::Command;

/// Whatever ends the program, or one of its workers.
type Error = Box<dyn std::error::Error + Send + Sync>;
type Result<T, E = Error> = std::result::Result<T, E>;

fn main() -> ExitCode {
    let outcome = match args::parse() {
        Command::Measure(measure) => rounds::measure(&measure),
        Command::Work(role) => worker::work(role).map(|()| ExitCode::SUCCESS),
        Command::List => {
            report::list();
            Ok(ExitCode::SUCCESS)
        }
    };
    outcome.unwrap_or_else(|error| {
        eprintln!("compare: {error}");
        ExitCode::FAILURE
    })
}
