//! What `top` takes.

use std::time::Duration;

use clap::Args;

use super::host_port::HostPort;
use super::quantities::parse_interval;

/// Show live what a --metrics address tells: connections, rates, in flight, stalled, refused
///
/// `q` ends it. Where standard output is no terminal, or with --once, it prints the numbers once, as text.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  buffstreams top localhost:9100
  buffstreams top collector:9100 --every 5s
  buffstreams top localhost:9100 --once")]
pub(crate) struct TopArguments {
    /// What `listen` or `send` was given as --metrics, or another program that publishes the library's metrics
    #[arg(value_name = "METRICS-ADDRESS")]
    pub(crate) address: HostPort,

    /// How often to ask
    #[arg(long, value_name = "DURATION", default_value = "1s", value_parser = parse_interval)]
    pub(crate) every: Duration,

    /// Print the numbers once, and end
    #[arg(long)]
    pub(crate) once: bool,
}
