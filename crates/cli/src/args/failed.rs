//! What `failed` takes.

use std::path::PathBuf;

use clap::{Args, ValueEnum};

/// Look at the failed messages that a spool keeps, send them again, or drop them
///
/// They are those that the listener rejected while `send --spool DIR` ran. A listener of your own may reject messages;
/// `buffstreams listen` rejects none. Without numbers it is all of them.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  buffstreams failed outgoing list
  buffstreams failed outgoing send 17 18
  buffstreams failed outgoing drop")]
pub(crate) struct FailedArguments {
    /// The directory of the spool; no `send` may be running with it
    #[arg(value_name = "DIR")]
    pub(crate) directory: PathBuf,

    /// What to do with them
    #[arg(value_enum)]
    pub(crate) action: FailedAction,

    /// Only those with these numbers, the first of each line of `list`
    #[arg(value_name = "NUMBER")]
    pub(crate) numbers: Vec<u64>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum FailedAction {
    /// One line each: number, time, bytes, the listener's code and reason, and how the message begins
    List,
    /// Put them behind what waits in the spool, to go with the next `send --spool`
    Send,
    /// Forget them
    Drop,
}
