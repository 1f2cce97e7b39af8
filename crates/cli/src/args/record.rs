//! What `record` takes.

use std::path::PathBuf;

use clap::Args;

use crate::recording;

use super::limits::ListenLimits;
use super::listen::ReceiveArguments;
use super::unusable::Unusable;

const RECORD_EXAMPLES: &str = "\
Examples:
  buffstreams record :5031 monday.rec
  buffstreams record 127.0.0.1:0 sample.rec --count 1000 --framing varint
  buffstreams record unix:/run/readings.sock readings.rec --force
  buffstreams export monday.rec --output lines";

/// Keep the messages that arrive in a file, with times and senders
///
/// As `listen`, but into a file: a message is acknowledged once it is with the operating system. `replay` sends a
/// recording again, `export` makes plain messages of it, and any protobuf library reads it: `--help` has its schema.
#[derive(Debug, Args)]
#[command(after_help = RECORD_EXAMPLES, after_long_help = format!("{RECORD_EXAMPLES}\n\nThe file:\n\n{}", recording::SCHEMA))]
pub(crate) struct RecordArguments {
    #[command(flatten)]
    pub(crate) receive: ReceiveArguments,

    /// The recording; it must not exist yet
    #[arg(value_name = "FILE")]
    pub(crate) file: PathBuf,

    /// Replace FILE if it exists
    #[arg(long)]
    pub(crate) force: bool,

    // The last: its heading is over all that follows.
    #[command(flatten)]
    pub(crate) limits: ListenLimits,
}

impl RecordArguments {
    pub(super) fn check(&self) -> Result<(), Unusable> {
        self.receive.framing().map(drop)
    }
}
