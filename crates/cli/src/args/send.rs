//! What `send` takes.

use std::path::PathBuf;
use std::time::Duration;

use buffstreams::{Endpoints, Framing};
use clap::{Args, ValueEnum};

use crate::schema::Schema;

use super::delivery::DeliveryLevel;
use super::framing::WireArguments;
use super::host_port::HostPort;
use super::quantities::{parse_duration, parse_size};
use super::schema::{JSON_NEEDS_TYPE, TypeArguments};
use super::tls::SendTls;
use super::unusable::Unusable;

/// What `send` has in flight unless it is told otherwise, in bytes.
const WINDOW: usize = 4 << 20;

/// How long `send` waits for a lost listener that has messages in flight, where there is another, unless it is told otherwise.
const PATIENCE: Duration = Duration::from_secs(10);

/// Send messages read from a file or from standard input
///
/// Reconnects by itself. The last line on standard error accounts for every message. With --delivery acked, what the
/// listener has not acknowledged when it is lost is sent to it again, or to the one that takes its place.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  buffstreams send localhost:5031 access.log
  journalctl -f | buffstreams send collector:5031 --failed unsent.bin --retry-for 2m
  journalctl -f | buffstreams send collector:5031 --delivery acked --spool outgoing --retry-for 30d
  buffstreams send localhost:5031 unsent.bin --input delimited
  buffstreams send collector:5031 orders.txt --delivery acked --window 1MiB
  buffstreams send collector:5031,standby:5031 orders.txt --delivery acked --patience 1m
  buffstreams send workers.internal:5031 orders.txt --spread --delivery acked
  buffstreams send collector:5031 orders.txt --tls-ca authority.pem
  echo '{\"celsius\": 21.5}' |
    buffstreams send localhost:5031 --proto reading.proto --type plant.Reading --input json")]
pub(crate) struct SendArguments {
    /// Where to send: `host:port`, `:port` (this machine), `unix:PATH`; or several with commas between
    ///
    /// Of several, and of the addresses that a name stands for, the first that answers is used. When it is lost, the others
    /// are tried at once, in order. With --spread all of them are used.
    #[arg(value_name = "ADDRESS")]
    pub(crate) endpoints: Endpoints,

    /// What to read; `-` is standard input
    #[arg(value_name = "FILE", default_value = "-")]
    pub(crate) file: PathBuf,

    /// Hold a connection to every address, and send each message over the one that has the least in hand
    ///
    /// Also to every address that a name stands for. Messages keep their order on each connection, and none across them. One
    /// that a connection has taken stays with it: where its listener is away, it waits for it as long as --retry-for says,
    /// and what comes meanwhile goes to the others. It ends early only when all are given up, or if a name cannot be resolved
    /// at the beginning.
    #[arg(long)]
    pub(crate) spread: bool,

    #[command(flatten)]
    wire: WireArguments,

    #[command(flatten)]
    types: TypeArguments,

    /// How messages stand in the input [default: json with --type, else lines]
    #[arg(long, value_enum, value_name = "FORMAT")]
    input: Option<InputFormat>,

    /// When a message counts as settled
    #[arg(long, value_enum, default_value_t = DeliveryLevel::Sent)]
    delivery: DeliveryLevel,

    /// With --delivery acked, how much is sent ahead of acknowledgements, if the listener allows as much [default: 4MiB]
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    window: Option<usize>,

    /// With --delivery acked and several addresses, how long one that is lost with messages in flight is waited for before
    /// the next one gets them, too [default: 10s]
    #[arg(long, value_name = "DURATION", value_parser = parse_duration)]
    patience: Option<Duration>,

    /// With --delivery acked, keep messages in this directory until they are acknowledged, over crashes and restarts
    ///
    /// What an earlier run left there is sent first; the first line on standard error says how much. Input goes to disk as
    /// it is read, also while nobody listens. Messages that the listener rejects stay there: see `buffstreams failed`.
    #[arg(long, value_name = "DIR")]
    pub(crate) spool: Option<PathBuf>,

    /// With --spool, how much it may hold; then the input waits [default: 1GiB]
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    spool_size: Option<usize>,

    /// How long the peer may be away before everything in hand fails; 0 is one attempt
    ///
    /// What keeps it from connecting is said at once, and then at growing pauses, with how many attempts were in vain.
    #[arg(long, value_name = "DURATION", default_value = "30s", value_parser = parse_duration)]
    pub(crate) retry_for: Duration,

    /// Where failed messages go, in delimited form; created, or emptied
    #[arg(long, value_name = "FILE")]
    pub(crate) failed: Option<PathBuf>,

    #[command(flatten)]
    pub(crate) tls: SendTls,

    /// Serve what is counted to Prometheus, over HTTP at /metrics, for as long as it sends
    ///
    /// A line on standard error says where. Port 0 is any free one; without a host it is open to everybody.
    #[arg(long, value_name = "HOST:PORT")]
    pub(crate) metrics: Option<HostPort>,
}

impl SendArguments {
    pub(super) fn check(&self) -> Result<(), Unusable> {
        if self.spread && self.spool.is_some() {
            return Err(Unusable::because(
                "--spool keeps the messages of one connection, and --spread holds several: leave one of them out",
            ));
        }
        if self.spread && self.patience.is_some() {
            return Err(Unusable::because(
                "--patience is for a connection that goes to another address, and with --spread none does: leave one of them out",
            ));
        }
        self.delivery()?;
        self.framing()?;
        self.input()?;
        self.tls.check(self.endpoints.addresses())
    }

    pub(crate) fn framing(&self) -> Result<Framing, Unusable> {
        self.wire.framing()
    }

    pub(crate) fn input(&self) -> Result<Input, Unusable> {
        Ok(match (self.input, self.types.schema()?) {
            (None, None) | (Some(InputFormat::Lines), _) => Input::Lines,
            (Some(InputFormat::Hex), _) => Input::Hex,
            (Some(InputFormat::Delimited), _) => Input::Delimited,
            (None | Some(InputFormat::Json), Some(schema)) => Input::Json(schema),
            (Some(InputFormat::Json), None) => return Err(Unusable::because(JSON_NEEDS_TYPE)),
        })
    }

    /// Bytes that the spool may hold.
    pub(crate) fn spool_size(&self) -> Option<u64> {
        self.spool_size.map(|size| size as u64)
    }

    pub(crate) fn delivery(&self) -> Result<Delivery, Unusable> {
        if self.spool_size.is_some() && self.spool.is_none() {
            return Err(Unusable::lacking(&["spool-size"], "--spool-size is for a spool: add --spool DIR"));
        }
        if matches!(self.delivery, DeliveryLevel::Acked) {
            self.wire.check_acked()?;
            let (window, patience) = (self.window.unwrap_or(WINDOW), self.patience.unwrap_or(PATIENCE));
            return Ok(Delivery::Acked { window, patience });
        }
        if self.spool.is_some() {
            // Never left out: messages would not be kept.
            return Err(Unusable::because("--spool keeps messages until they are acknowledged: add --delivery acked"));
        }
        if self.patience.is_some() {
            let reason = "--patience is for what waits to be acknowledged: add --delivery acked";
            return Err(Unusable::lacking(&["patience"], reason));
        }
        if self.window.is_some() {
            let reason = "--window is for acknowledgements: add --delivery acked";
            return Err(Unusable::lacking(&["window"], reason));
        }
        Ok(Delivery::Sent)
    }
}

/// How messages stand in what `send` reads.
#[derive(Copy, Clone, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum InputFormat {
    /// One message a line; an empty line is an empty message
    Lines,
    /// One message a line, in hex
    Hex,
    /// One object a line, by protobuf's JSON mapping; needs --type
    Json,
    /// An unsigned varint length before each, as protobuf's writeDelimitedTo
    Delimited,
}

/// How messages are read, with what that takes.
#[derive(Clone, Debug)]
pub(crate) enum Input {
    Lines,
    Hex,
    Json(Schema),
    Delimited,
}

/// When a message counts as settled, with what that takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Delivery {
    Sent,
    /// `window` is in bytes; `patience` is with a lost listener, where there is another.
    Acked {
        window: usize,
        patience: Duration,
    },
}
