//! The command line as typed: what each subcommand takes, and how sizes and durations are written.
//!
//! Parsing is also checking: what leaves this file names a prefix, a maximum and a message type that fit together, or
//! the program has already ended with exit status 2 and a sentence that says what to write instead.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use buffstreams::{Address, Endpoints, Framing, Prefix};
use clap::builder::{PossibleValuesParser, TypedValueParser};
use clap::error::ErrorKind;
use clap::{Args, CommandFactory, Parser, Subcommand, ValueEnum};
use clap_complete::Shell;

use crate::bench::BenchArguments;
use crate::config;
use crate::limits::ListenLimits;
use crate::recording;
use crate::schema::Schema;
use crate::tls::{ListenTls, SendTls};

/// Streams length-prefixed messages over TCP: listens for them, sends them, shows how fast that goes.
#[derive(Debug, Parser)]
#[command(name = "buffstreams", version, max_term_width = 100, after_help = EXIT_STATUS)]
struct CommandLine {
    /// Take options from this file too; those that are typed go before
    ///
    /// TOML, with the names of the options: `max-message-size = "64KiB"`, `no-sessions = true`, `proto = ["a.proto", "b.proto"]`.
    /// What stands in `[listen]` is for `buffstreams listen`; what stands above all tables, for every command that has such
    /// an option. Paths are as on the command line.
    #[arg(long, global = true, value_name = "FILE")]
    config: Option<PathBuf>,

    #[command(subcommand)]
    command: Command,
}

const EXIT_STATUS: &str = "\
Exit status: 0 when everything went through, 1 when something failed, 2 when the command line cannot be used.";

const RECORD_EXAMPLES: &str = "\
Examples:
  buffstreams record :5031 monday.rec
  buffstreams record 127.0.0.1:0 sample.rec --count 1000 --framing varint
  buffstreams record unix:/run/readings.sock readings.rec --force
  buffstreams export monday.rec --output lines";

/// What the program is asked to do.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Print the messages that arrive
    ///
    /// The first line on standard error says where it listens; only messages go to standard output. Senders of both
    /// levels of --delivery may come to the same port; a message is acknowledged once it is written to standard output.
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
    Listen(ListenArguments),

    /// Send messages read from a file or from standard input
    ///
    /// Reconnects by itself. The last line on standard error accounts for every message. With --delivery acked, what the
    /// listener has not acknowledged when it is lost is sent to it again, or to the one that takes its place.
    #[command(after_help = "\
Examples:
  buffstreams send localhost:5031 access.log
  journalctl -f | buffstreams send collector:5031 --failed unsent.bin --retry-for 2m
  journalctl -f | buffstreams send collector:5031 --delivery acked --spool outgoing --retry-for 30d
  buffstreams send localhost:5031 unsent.bin --input delimited
  buffstreams send collector:5031 orders.txt --delivery acked --window 1MiB
  buffstreams send collector:5031,standby:5031 orders.txt --delivery acked --patience 1m
  buffstreams send collector:5031 orders.txt --tls-ca authority.pem
  echo '{\"celsius\": 21.5}' |
    buffstreams send localhost:5031 --proto reading.proto --type plant.Reading --input json")]
    Send(SendArguments),

    /// Stand between two sides, pass every byte through, and print the messages of both directions
    ///
    /// Senders connect to LISTEN, and each is connected to TARGET. Each line that is printed is led by `> ` if the message
    /// went to the target, or `< ` if it came back. Nothing that passes is changed or held back, but that bytes pass once
    /// their messages are printed: who reads standard output slowly slows the connections down. Acknowledged streams are
    /// recognised; TLS is passed through and not decoded. Without --framing it is guessed, and standard error says how
    /// sure the guess is; sure means that it is no coincidence. A connection that is reset is reset on the other side too.
    /// When tap ends, the connections that pass through it end with it.
    #[command(after_help = "\
Examples:
  buffstreams tap :5032 localhost:5031
  buffstreams tap :5032 collector:5031 --output fields
  buffstreams tap :5032 collector:5031 --output none --control
  buffstreams tap unix:/run/tap.sock unix:/run/readings.sock --framing varint --output hex
  buffstreams tap :5032 collector:5031 --proto reading.proto --type plant.Reading")]
    Tap(TapArguments),

    /// Keep the messages that arrive in a file, with times and senders
    ///
    /// As `listen`, but into a file: a message is acknowledged once it is with the operating system. `replay` sends a
    /// recording again, `export` makes plain messages of it, and any protobuf library reads it: `--help` has its schema.
    #[command(after_help = RECORD_EXAMPLES, after_long_help = format!("{RECORD_EXAMPLES}\n\nThe file:\n\n{}", recording::SCHEMA))]
    Record(RecordArguments),

    /// Send a recording again, at the pace at which it came, or another
    ///
    /// Opens a connection for each that was recorded, and closes it when that was. The messages of each are sent in their
    /// order. The last line on standard error accounts for every message, as that of `send` does.
    #[command(after_help = "\
Examples:
  buffstreams replay monday.rec localhost:5031
  buffstreams replay monday.rec localhost:5031 --speed 10x
  buffstreams replay monday.rec collector:5031 --speed max --one-connection --delivery acked")]
    Replay(ReplayArguments),

    /// Write the messages of a recording to standard output, delimited or in any form in which `listen` prints them
    #[command(after_help = "\
Examples:
  buffstreams export monday.rec > monday.delimited
  buffstreams export monday.rec --output fields
  buffstreams export monday.rec --proto reading.proto --type plant.Reading --output json
  buffstreams export monday.rec | buffstreams send localhost:5031 --input delimited")]
    Export(ExportArguments),

    /// Look at the failed messages that a spool keeps, send them again, or drop them
    ///
    /// They are those that the listener refused while `send --spool DIR` ran. Without numbers it is all of them.
    #[command(after_help = "\
Examples:
  buffstreams failed outgoing list
  buffstreams failed outgoing send 17 18
  buffstreams failed outgoing drop")]
    Failed(FailedArguments),

    /// Put load on a listener, and measure how long answers take
    ///
    /// Messages are due at a given rate whatever becomes of them, and latency counts from when they were due: a stall shows
    /// in every message that it held up. The answer to a message is its echo, whose every byte is compared, or its
    /// acknowledgement. Ends with 0 only if every message that was sent was answered.
    #[command(after_help = "\
Examples:
  buffstreams listen :5031 --echo --output none
  buffstreams bench localhost:5031 --rate 100k
  buffstreams bench localhost:5031 --rate 10k --connections 50 --size 64..4KiB --html bench.html
  buffstreams bench localhost:5031 --by acks --rate 100k --json
  buffstreams bench localhost:5031 --duration 30s")]
    Bench(BenchArguments),

    /// Show live what a --metrics address tells: connections, rates, in flight, stalled, refused
    ///
    /// `q` ends it. Where standard output is no terminal, or with --once, it prints the numbers once, as text.
    #[command(after_help = "\
Examples:
  buffstreams top localhost:9100
  buffstreams top collector:9100 --every 5s
  buffstreams top localhost:9100 --once")]
    Top(TopArguments),

    /// Show the rate over loopback, and that every message arrives intact
    ///
    /// A listener and a sender of protobuf messages in one process. Ends with 0 only if each message arrived, in order
    /// and unchanged.
    #[command(after_help = "\
Examples:
  buffstreams demo
  buffstreams demo --seconds 30")]
    Demo(DemoArguments),

    /// Print what a shell needs to complete the command line
    #[command(after_help = "\
Examples:
  buffstreams completions bash > ~/.local/share/bash-completion/completions/buffstreams
  buffstreams completions zsh > ~/.zfunc/_buffstreams
  buffstreams completions fish > ~/.config/fish/completions/buffstreams.fish")]
    Completions {
        /// The shell
        shell: Shell,
    },

    /// Print the manual page, or write those of all commands into a directory
    #[command(after_help = "\
Examples:
  buffstreams man | man -l -
  buffstreams man ~/.local/share/man/man1")]
    Man {
        /// Where to write the pages; created if it is not there
        #[arg(value_name = "DIR")]
        directory: Option<PathBuf>,
    },
}

#[derive(Debug, Args)]
pub(crate) struct ListenArguments {
    #[command(flatten)]
    pub(crate) receive: ReceiveArguments,

    #[command(flatten)]
    types: TypeArguments,

    /// How messages are printed [default: json with --type, else lines]
    #[arg(long, value_enum, value_name = "FORMAT")]
    output: Option<OutputFormat>,
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

    #[command(flatten)]
    pub(crate) limits: ListenLimits,

    /// Serve what is counted to Prometheus, over HTTP at /metrics
    ///
    /// The second line on standard error says where. Port 0 is any free one; without a host it is open to everybody.
    #[arg(long, value_name = "HOST:PORT")]
    pub(crate) metrics: Option<HostPort>,
}

#[derive(Debug, Args)]
pub(crate) struct TapArguments {
    /// Where senders connect: `host:port`, `:port` (all interfaces), port 0 for any free one, `unix:PATH`
    pub(crate) listen: Address,

    /// Where they are connected to: `host:port`, `:port` (this machine), `unix:PATH`
    pub(crate) target: Address,

    #[command(flatten)]
    wire: ForeignWireArguments,

    #[command(flatten)]
    types: TypeArguments,

    /// How messages are printed; not `delimited`, which has no place for a direction [default: json with --type, else
    /// lines]
    #[arg(long, value_enum, value_name = "FORMAT")]
    output: Option<OutputFormat>,

    /// Print the control frames of acknowledged streams too, led by `>*` and `<*`
    #[arg(long)]
    pub(crate) control: bool,
}

#[derive(Debug, Args)]
pub(crate) struct RecordArguments {
    #[command(flatten)]
    pub(crate) receive: ReceiveArguments,

    /// The recording; it must not exist yet
    #[arg(value_name = "FILE")]
    pub(crate) file: PathBuf,

    /// Replace FILE if it exists
    #[arg(long)]
    pub(crate) force: bool,
}

#[derive(Debug, Args)]
pub(crate) struct ReplayArguments {
    /// A recording of `buffstreams record`
    #[arg(value_name = "FILE")]
    pub(crate) file: PathBuf,

    /// Where to send: `host:port`, `:port` (this machine), `unix:PATH`
    pub(crate) address: Address,

    /// The pace: `2x` is twice as fast as it came, `0.5x` half as fast, `max` as fast as it goes
    #[arg(long, value_name = "SPEED", default_value = "1x", value_parser = parse_speed)]
    pub(crate) speed: Speed,

    /// Send everything over one connection, in the order in which it came
    #[arg(long)]
    pub(crate) one_connection: bool,

    #[command(flatten)]
    wire: ForeignWireArguments,

    /// When a message counts as settled
    #[arg(long, value_enum, default_value_t = DeliveryLevel::Sent)]
    delivery: DeliveryLevel,

    /// How long the peer may be away before everything in hand fails; 0 is one attempt
    #[arg(long, value_name = "DURATION", default_value = "30s", value_parser = parse_duration)]
    pub(crate) retry_for: Duration,

    /// Where failed messages go, in delimited form; created, or emptied
    #[arg(long, value_name = "FAILED")]
    pub(crate) failed: Option<PathBuf>,

    #[command(flatten)]
    pub(crate) tls: SendTls,
}

#[derive(Debug, Args)]
pub(crate) struct ExportArguments {
    /// A recording of `buffstreams record`
    #[arg(value_name = "FILE")]
    pub(crate) file: PathBuf,

    #[command(flatten)]
    types: TypeArguments,

    /// How messages are written [default: json with --type, else delimited]
    #[arg(long, value_enum, value_name = "FORMAT")]
    output: Option<OutputFormat>,
}

/// How fast a recording is sent again.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Speed {
    /// So many times as fast as it came.
    Times(f64),
    Max,
}

#[derive(Debug, Args)]
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

#[derive(Debug, Args)]
pub(crate) struct SendArguments {
    /// Where to send: `host:port`, `:port` (this machine), `unix:PATH`; or several with commas between
    ///
    /// Of several, and of the addresses that a name stands for, the first that answers is used. When it is lost, the others
    /// are tried at once, in order.
    #[arg(value_name = "ADDRESS")]
    pub(crate) endpoints: Endpoints,

    /// What to read; `-` is standard input
    #[arg(value_name = "FILE", default_value = "-")]
    pub(crate) file: PathBuf,

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
    /// it is read, also while nobody listens. Messages that the listener refuses stay there: see `buffstreams failed`.
    #[arg(long, value_name = "DIR")]
    pub(crate) spool: Option<PathBuf>,

    /// With --spool, how much it may hold; then the input waits [default: 1GiB]
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    spool_size: Option<usize>,

    /// How long the peer may be away before everything in hand fails; 0 is one attempt
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

#[derive(Debug, Args)]
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

#[derive(Debug, Args)]
pub(crate) struct DemoArguments {
    /// How long to send
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) seconds: u64,
}

/// How messages stand on the wire; both sides must say the same.
#[derive(Debug, Args)]
pub(crate) struct WireArguments {
    /// How the length stands before each message
    #[arg(
        long,
        value_name = "NAME",
        default_value = Prefix::Buffstreams.name(),
        value_parser = prefix_parser(),
    )]
    framing: Prefix,

    /// Largest message, such as `4096`, `64KiB` or `1MiB` [default: 4096, or 255 for u8]
    #[arg(long, value_name = "SIZE", default_value = "0", hide_default_value = true, value_parser = parse_size)]
    max_message_size: usize,
}

/// How messages stand on a wire that somebody else has chosen.
#[derive(Debug, Args)]
struct ForeignWireArguments {
    /// How the length stands before each message [default: what is guessed, or was recorded]
    #[arg(long, value_name = "NAME", value_parser = prefix_parser())]
    framing: Option<Prefix>,

    /// Largest message [default: the largest that the framing can express with a prefix of the usual width]
    #[arg(long, value_name = "SIZE", requires = "framing", value_parser = parse_size)]
    max_message_size: Option<usize>,
}

/// What the messages mean, for the `json` formats.
#[derive(Debug, Args)]
struct TypeArguments {
    /// The schema that has the message type; may be repeated
    #[arg(long, value_name = "FILE", requires = "message_type")]
    proto: Vec<PathBuf>,

    /// Where the schema's imports are looked for; may be repeated [default: beside the schema]
    #[arg(long, value_name = "DIR", requires = "proto")]
    include: Vec<PathBuf>,

    /// The message type, with its package
    #[arg(id = "message_type", long = "type", value_name = "pkg.Message", requires = "proto")]
    message_type: Option<String>,
}

/// How `listen` prints messages.
#[derive(Copy, Clone, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum OutputFormat {
    /// The message and a newline
    Lines,
    /// Lower-case hex, one line each
    Hex,
    /// Protobuf's JSON mapping, one object per line; needs --type
    Json,
    /// Any protobuf message, by the numbers of its fields, in protoscope's notation; one line each
    Fields,
    /// An unsigned varint length before each, as protobuf's writeDelimitedTo
    Delimited,
    /// Not at all; they are only counted
    None,
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

/// When a message counts as settled.
#[derive(Copy, Clone, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum DeliveryLevel {
    /// The kernel took it
    Sent,
    /// The listener is done with it, and has said so
    Acked,
}

/// Where metrics are: a host, or none, and a port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct HostPort {
    /// Empty for every interface, or for this machine.
    pub(crate) host: String,
    pub(crate) port: u16,
}

impl FromStr for HostPort {
    type Err = String;

    fn from_str(text: &str) -> Result<HostPort, String> {
        // As it is written in a browser.
        let text = text.strip_prefix("http://").unwrap_or(text).trim_end_matches("/metrics").trim_end_matches('/');
        match text.parse::<Address>() {
            Ok(Address::Tcp { host, port }) => Ok(HostPort { host, port }),
            Ok(_) => Err("metrics are served over TCP: write host:port, or :port".to_owned()),
            Err(error) => Err(error.to_string()),
        }
    }
}

impl fmt::Display for HostPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let HostPort { host, port } = self;
        if host.contains(':') { write!(f, "[{host}]:{port}") } else { write!(f, "{host}:{port}") }
    }
}

/// The whole command line of the program, for those who describe it.
pub(crate) fn program() -> clap::Command {
    CommandLine::command()
}

/// Reads the program's own command line, and the file that it names; ends the program when they cannot be used, or when it
/// only asks for help.
pub(crate) fn parse() -> Command {
    let mut program = program();
    let line = match config::complete(&program, std::env::args_os().collect()) {
        Ok(line) => line,
        Err(error) => program.error(ErrorKind::ValueValidation, error).exit(),
    };
    match CommandLine::try_parse_from(&line.arguments) {
        Ok(read) => read.command,
        Err(error) => line.explain(error).exit(),
    }
}

impl ListenArguments {
    pub(crate) fn output(&self) -> Output {
        self.types.output("listen", self.output, Output::Lines)
    }
}

impl ReceiveArguments {
    pub(crate) fn framing(&self, subcommand: &str) -> Framing {
        self.wire.framing(subcommand)
    }
}

impl TapArguments {
    pub(crate) fn framing(&self) -> Option<Framing> {
        self.wire.framing("tap")
    }

    pub(crate) fn output(&self) -> Output {
        if let Some(OutputFormat::Delimited) = self.output {
            let reason =
                "--output delimited has no place for the direction of a message: use hex, or `buffstreams record`";
            unusable("tap", reason);
        }
        self.types.output("tap", self.output, Output::Lines)
    }
}

impl ReplayArguments {
    /// The framing that was asked for, if one was.
    pub(crate) fn framing(&self) -> Option<Framing> {
        self.wire.framing("replay")
    }

    /// Whether messages are acknowledged, over connections of this framing.
    pub(crate) fn is_acked(&self, framing: Framing) -> bool {
        let is_acked = matches!(self.delivery, DeliveryLevel::Acked);
        if is_acked {
            check_acked("replay", framing.prefix());
        }
        is_acked
    }
}

impl ExportArguments {
    pub(crate) fn output(&self) -> Output {
        self.types.output("export", self.output, Output::Delimited)
    }
}

impl SendArguments {
    pub(crate) fn framing(&self) -> Framing {
        self.wire.framing("send")
    }

    pub(crate) fn input(&self) -> Input {
        let schema = self.types.schema("send");
        match (self.input, schema) {
            (None, None) | (Some(InputFormat::Lines), _) => Input::Lines,
            (Some(InputFormat::Hex), _) => Input::Hex,
            (Some(InputFormat::Delimited), _) => Input::Delimited,
            (None | Some(InputFormat::Json), Some(schema)) => Input::Json(schema),
            (Some(InputFormat::Json), None) => unusable("send", JSON_NEEDS_TYPE),
        }
    }

    /// Bytes that the spool may hold.
    pub(crate) fn spool_size(&self) -> Option<u64> {
        self.spool_size.map(|size| size as u64)
    }

    pub(crate) fn delivery(&self) -> Delivery {
        if self.spool.is_some() && matches!(self.delivery, DeliveryLevel::Sent) {
            unusable("send", "--spool keeps messages until they are acknowledged: add --delivery acked");
        }
        if self.spool.is_none() && self.spool_size.is_some() {
            unusable("send", "--spool-size is for a spool: add --spool DIR");
        }
        if self.patience.is_some() && matches!(self.delivery, DeliveryLevel::Sent) {
            unusable("send", "--patience is for what waits to be acknowledged: add --delivery acked");
        }
        match (self.delivery, self.window) {
            (DeliveryLevel::Sent, None) => Delivery::Sent,
            (DeliveryLevel::Sent, Some(_)) => {
                unusable("send", "--window is for acknowledgements: add --delivery acked")
            }
            (DeliveryLevel::Acked, window) => {
                self.wire.check_acked("send");
                Delivery::Acked { window: window.unwrap_or(WINDOW), patience: self.patience.unwrap_or(PATIENCE) }
            }
        }
    }
}

/// Ends the program if there is no way to ask for acknowledgements with this prefix.
fn check_acked(subcommand: &str, prefix: Prefix) {
    if matches!(prefix, Prefix::U8 | Prefix::U16Be | Prefix::U16Le) {
        unusable(
            subcommand,
            format_args!(
                "--framing {prefix} leaves no way to ask for --delivery acked: use buffstreams, varint, u32* or u64*"
            ),
        );
    }
}

/// What `send` has in flight unless it is told otherwise, in bytes.
const WINDOW: usize = 4 << 20;

/// How long `send` waits for a lost listener that has messages in flight, where there is another, unless it is told otherwise.
const PATIENCE: Duration = Duration::from_secs(10);

const JSON_NEEDS_TYPE: &str = "json needs a message type: add --proto FILE --type pkg.Message";

/// How messages are printed, with what that takes.
#[derive(Clone, Debug)]
pub(crate) enum Output {
    Lines,
    Hex,
    Json(Schema),
    Fields,
    Delimited,
    /// With times and senders.
    Recording,
    None,
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

impl WireArguments {
    pub(crate) fn framing(&self, subcommand: &str) -> Framing {
        Framing::with_max(self.framing, self.max_message_size).unwrap_or_else(|error| unusable(subcommand, error))
    }

    /// Whether acknowledgements can be asked for; ends the program if not.
    pub(crate) fn check_acked(&self, subcommand: &str) {
        check_acked(subcommand, self.framing);
    }
}

impl ForeignWireArguments {
    fn framing(&self, subcommand: &str) -> Option<Framing> {
        let prefix = self.framing?;
        let max = self.max_message_size.unwrap_or(match prefix {
            // All maxima with a prefix as wide as that of the default.
            Prefix::Buffstreams => usize::from(u16::MAX),
            prefix => prefix.largest_max(),
        });
        Some(Framing::with_max(prefix, max).unwrap_or_else(|error| unusable(subcommand, error)))
    }
}

impl TypeArguments {
    fn output(&self, subcommand: &str, format: Option<OutputFormat>, default: Output) -> Output {
        match (format, self.schema(subcommand)) {
            (None, None) => default,
            (Some(OutputFormat::Lines), _) => Output::Lines,
            (Some(OutputFormat::Hex), _) => Output::Hex,
            (Some(OutputFormat::Fields), _) => Output::Fields,
            (Some(OutputFormat::Delimited), _) => Output::Delimited,
            (Some(OutputFormat::None), _) => Output::None,
            (None | Some(OutputFormat::Json), Some(schema)) => Output::Json(schema),
            (Some(OutputFormat::Json), None) => unusable(subcommand, JSON_NEEDS_TYPE),
        }
    }

    fn schema(&self, subcommand: &str) -> Option<Schema> {
        let message_type = self.message_type.as_deref()?;
        match Schema::load(&self.proto, &self.include, message_type) {
            Ok(schema) => Some(schema),
            Err(error) => unusable(subcommand, error),
        }
    }
}

/// Ends the program as clap does for what clap itself cannot see.
pub(crate) fn unusable(subcommand: &str, reason: impl std::fmt::Display) -> ! {
    let mut command_line = CommandLine::command();
    command_line.build();
    let command = command_line.find_subcommand_mut(subcommand).expect("a subcommand of this program");
    command.error(ErrorKind::ValueValidation, reason).exit()
}

fn prefix_parser() -> impl TypedValueParser<Value = Prefix> {
    PossibleValuesParser::new(Prefix::ALL.map(Prefix::name))
        .map(|name| name.parse::<Prefix>().expect("the names of all prefixes are parsed"))
}

pub(crate) fn parse_size(text: &str) -> Result<usize, String> {
    let digits = text.trim_end_matches(|c: char| !c.is_ascii_digit());
    let unit = match &text[digits.len()..] {
        "" => Some(1),
        "KiB" => Some(1 << 10),
        "MiB" => Some(1 << 20),
        "GiB" => Some(1 << 30),
        _ => None,
    };
    digits
        .parse::<usize>()
        .ok()
        .zip(unit)
        .ok_or("write bytes, or a whole number of KiB, MiB or GiB: 4096, 64KiB, 1MiB")
        .and_then(|(number, unit): (usize, usize)| number.checked_mul(unit).ok_or("larger than this machine can hold"))
        .map_err(String::from)
}

fn parse_speed(text: &str) -> Result<Speed, String> {
    if text == "max" {
        return Ok(Speed::Max);
    }
    let times = text.strip_suffix('x').unwrap_or(text).parse::<f64>().ok();
    times
        .filter(|times| (1e-6..=1e9).contains(times))
        .map(Speed::Times)
        .ok_or_else(|| String::from("write how many times as fast as it came, or max: 1x, 2x, 0.5x"))
}

fn parse_interval(text: &str) -> Result<Duration, String> {
    match parse_duration(text)? {
        Duration::ZERO => Err("write how long to wait, such as 1s".to_owned()),
        interval => Ok(interval),
    }
}

pub(crate) fn parse_duration(text: &str) -> Result<Duration, String> {
    if text == "0" {
        return Ok(Duration::ZERO);
    }
    humantime::parse_duration(text).map_err(|_| String::from("write a number and its unit: 500ms, 30s, 2m"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_sound() {
        CommandLine::command().debug_assert();
    }

    /// The command lines of this program in the examples of a command's help.
    fn examples(command: &clap::Command) -> Vec<Vec<String>> {
        let help = command.get_after_help().map(ToString::to_string).unwrap_or_default();
        let Some((_, examples)) = help.split_once("Examples:\n") else { return Vec::new() };
        let lines = examples.replace("|\n", "| ");
        let parts = lines.lines().flat_map(|line| line.split(" | ")).map(|part| part.trim());
        let own = parts.filter(|part| part.starts_with("buffstreams "));
        own.map(|part| {
            let words = shlex::split(part).unwrap_or_else(|| panic!("a shell takes {part}"));
            words.into_iter().take_while(|word| !word.starts_with('>')).collect()
        })
        .collect()
    }

    #[test]
    fn every_command_has_examples_and_every_example_can_be_typed() {
        for command in program().get_subcommands() {
            let examples = examples(command);
            assert!(examples.iter().any(|words| words[1] == command.get_name()), "{}", command.get_name());
            for words in examples {
                if let Err(error) = CommandLine::try_parse_from(&words) {
                    panic!("{words:?}: {error}");
                }
            }
        }
    }

    #[test]
    fn sizes_are_bytes_or_whole_binary_units() {
        let sizes = [("0", 0), ("4096", 4096), ("64KiB", 64 << 10), ("1MiB", 1 << 20), ("2GiB", 2 << 30)];
        for (text, bytes) in sizes {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
        for text in
            ["", "KiB", "-1", "64KB", "64K", "64 KiB", "1.5MiB", "1MiB1", "99999999999999999999", "17179869184GiB"]
        {
            assert!(parse_size(text).is_err(), "{text}");
        }
    }

    #[test]
    fn durations_carry_their_unit_except_zero() {
        let durations = [("0", 0), ("0s", 0), ("500ms", 500), ("30s", 30_000), ("2m", 120_000)];
        for (text, milliseconds) in durations {
            assert_eq!(parse_duration(text), Ok(Duration::from_millis(milliseconds)), "{text}");
        }
        for text in ["", "30", "-1s", "s", "soon"] {
            assert!(parse_duration(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_speed_is_a_factor_or_as_fast_as_it_goes() {
        let speeds = [("1x", 1.0), ("2x", 2.0), ("0.5x", 0.5), ("0.5", 0.5), ("100", 100.0)];
        for (text, times) in speeds {
            assert_eq!(parse_speed(text), Ok(Speed::Times(times)), "{text}");
        }
        assert_eq!(parse_speed("max"), Ok(Speed::Max));
        for text in ["", "x", "0", "0x", "-1x", "fast", "nan", "inf"] {
            assert!(parse_speed(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_type_says_json_unless_another_format_is_named() {
        let parse = |extra: &[&str]| {
            let proto = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/gtfs-realtime/gtfs-realtime.proto");
            let base = ["buffstreams", "listen", ":0", "--proto", proto, "--type", "transit_realtime.FeedMessage"];
            let line = CommandLine::try_parse_from(base.iter().chain(extra)).unwrap();
            match line.command {
                Command::Listen(arguments) => arguments.output(),
                _ => unreachable!("listen was asked for"),
            }
        };
        assert!(matches!(parse(&[]), Output::Json(_)));
        assert!(matches!(parse(&["--output", "json"]), Output::Json(_)));
        assert!(matches!(parse(&["--output", "hex"]), Output::Hex));
    }
}
