//! What `listen` takes; most of it `record` takes, too.

use buffstreams::{Address, Framing};
use clap::Args;

use super::framing::WireArguments;
use super::host_port::HostPort;
use super::limits::ListenLimits;
use super::output::{Output, OutputFormat};
use super::schema::TypeArguments;
use super::tls::ListenTls;
use super::unusable::Unusable;

/// Print the messages that arrive
///
/// The first line on standard error says where it listens; only messages go to standard output. Senders of both
/// levels of --delivery may come to the same port; a message is acknowledged once it is written to standard output. One
/// that is not of the --type is reported, left out, and acknowledged too: whoever sends it again would change nothing.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  buffstreams listen :5031
  buffstreams listen 127.0.0.1:0 --framing varint --max-message-size 64KiB --output hex
  buffstreams listen unix:/run/readings.sock --count 10
  buffstreams listen :5031 --no-sessions >> readings.log
  buffstreams listen :5031 --echo --output none
  buffstreams listen :5031 --tls-cert server.pem --tls-key server.key --tls-ca senders.pem
  buffstreams listen :5031 --allow 10.0.0.0/8 --max-connections-per-address 20 --idle-deadline 5m
  buffstreams listen :5031 --output none --metrics localhost:9100
  buffstreams listen :5031 --proto reading.proto --type plant.Reading --output json")]
pub(crate) struct ListenArguments {
    #[command(flatten)]
    pub(crate) receive: ReceiveArguments,

    #[command(flatten)]
    types: TypeArguments,

    /// How messages are printed [default: json with --type, else lines]
    #[arg(long, value_enum, value_name = "FORMAT")]
    output: Option<OutputFormat>,

    // The last: its heading is over all that follows.
    #[command(flatten)]
    pub(crate) limits: ListenLimits,
}

impl ListenArguments {
    pub(super) fn check(&self) -> Result<(), Unusable> {
        self.receive.framing()?;
        self.output().map(drop)
    }

    pub(crate) fn output(&self) -> Result<Output, Unusable> {
        self.types.output(self.output, Output::Lines)
    }
}

/// What `listen` and `record` have in common: where messages come from, and how many.
#[derive(Debug, Args)]
pub(crate) struct ReceiveArguments {
    /// Where to listen: `host:port`, `:port` (all interfaces), port 0 for any free one, `unix:PATH`
    pub(crate) address: Address,

    #[command(flatten)]
    wire: WireArguments,

    /// Take exactly N messages, over all connections, and end
    #[arg(long, value_name = "N")]
    pub(crate) count: Option<u64>,

    /// Send every message back to its sender, on the same connection; while replies wait, no more is read
    #[arg(long)]
    pub(crate) echo: bool,

    /// Refuse senders that want their messages acknowledged
    #[arg(long)]
    pub(crate) no_sessions: bool,

    #[command(flatten)]
    pub(crate) tls: ListenTls,

    /// Serve what is counted to Prometheus, over HTTP at /metrics
    ///
    /// The second line on standard error says where. Port 0 is any free one; without a host it is open to everybody.
    #[arg(long, value_name = "HOST:PORT")]
    pub(crate) metrics: Option<HostPort>,
}

impl ReceiveArguments {
    pub(crate) fn framing(&self) -> Result<Framing, Unusable> {
        self.wire.framing()
    }
}
