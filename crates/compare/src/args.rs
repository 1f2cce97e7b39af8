//! The command line: what to measure, how often, and where the report goes. And the hidden line that starts a worker.

use std::path::PathBuf;

use clap::{Parser, Subcommand};

use crate::worker::Role;

/// Measures BuffStreams beside a raw socket and its peers.
///
/// The sender and the receiver of a run are processes of their own; the systems take turns; every message is counted.
#[derive(Debug, Parser)]
#[command(name = "compare", version, max_term_width = 100, args_conflicts_with_subcommands = true)]
struct CommandLine {
    #[command(subcommand)]
    command: Option<Subcommands>,
    #[command(flatten)]
    measure: Measure,
}

#[derive(Debug, Subcommand)]
enum Subcommands {
    /// One end of a run; started by this program itself.
    #[command(hide = true)]
    Worker {
        /// The role as JSON.
        role: String,
    },
}

/// What to measure.
#[derive(Clone, Debug, Default, clap::Args)]
pub(crate) struct Measure {
    /// The main cases only, with fewer messages and 3 counted runs instead of 5: within two minutes
    #[arg(long)]
    pub(crate) quick: bool,
    /// Measure this case, or group of cases (repeatable); --list shows them
    #[arg(long = "case", value_name = "NAME")]
    pub(crate) cases: Vec<String>,
    /// Measure this system (repeatable); --list shows them
    #[arg(long = "system", value_name = "NAME")]
    pub(crate) systems: Vec<String>,
    /// Counted runs of each system, after one that is not counted
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) runs: Option<u32>,
    /// Multiply the number of messages of every case
    #[arg(long, value_name = "FACTOR", default_value_t = 1.0, value_parser = factor)]
    pub(crate) scale: f64,
    /// Write the figures as JSON
    #[arg(long, value_name = "FILE")]
    pub(crate) json: Option<PathBuf>,
    /// Write a page with figures that a browser shows
    #[arg(long, value_name = "FILE")]
    pub(crate) html: Option<PathBuf>,
    /// Write the curves as pictures of their own, sizes.svg and connections.svg, into this folder
    #[arg(long, value_name = "FOLDER")]
    pub(crate) pictures: Option<PathBuf>,
    /// Show the cases and the systems, with their settings, and measure nothing
    #[arg(long)]
    list: bool,
    /// Send so many messages more than are expected (fewer, if negative), to see that it is noticed
    #[arg(long, value_name = "N", default_value_t = 0, allow_negative_numbers = true, hide = true)]
    pub(crate) miscount: i64,
}

/// What this process is to do.
#[derive(Debug)]
pub(crate) enum Command {
    Measure(Measure),
    List,
    Work(Role),
}

/// Reads the command line, or ends the program with status 2 and a sentence that says why.
pub(crate) fn parse() -> Command {
    let line = CommandLine::parse();
    match line.command {
        Some(Subcommands::Worker { role }) => match serde_json::from_str(&role) {
            Ok(role) => Command::Work(role),
            Err(error) => clap::Error::raw(clap::error::ErrorKind::InvalidValue, format!("{error}\n")).exit(),
        },
        None if line.measure.list => Command::List,
        None => Command::Measure(line.measure),
    }
}

fn factor(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(factor) if factor.is_finite() && factor > 0.0 => Ok(factor),
        _ => Err("a number above 0 is wanted".into()),
    }
}
