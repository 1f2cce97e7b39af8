//! What `demo` takes.

use clap::Args;

/// Show the rate over loopback, and that every message arrives intact
///
/// A listener and a sender of protobuf messages in one process. Ends with 0 only if each message arrived, in order
/// and unchanged.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  buffstreams demo
  buffstreams demo --seconds 30")]
pub(crate) struct DemoArguments {
    /// How long to send
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) seconds: u64,
}
