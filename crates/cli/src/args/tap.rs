//! What `tap` takes.

use buffstreams::{Address, Framing};
use clap::Args;

use super::framing::ForeignWireArguments;
use super::output::{Output, OutputFormat};
use super::schema::TypeArguments;
use super::unusable::Unusable;

/// Stand between two sides, pass every byte through, and print the messages of both directions
///
/// Senders connect to LISTEN, and each is connected to TARGET. Each line that is printed is led by `> ` if the message
/// went to the target, or `< ` if it came back. Nothing that passes is changed or held back, but that bytes pass once
/// their messages are printed: who reads standard output slowly slows the connections down. Acknowledged streams are
/// recognised; TLS is passed through and not decoded. Without --framing it is guessed, and standard error says how
/// sure the guess is; sure means that it is no coincidence. A connection that is reset is reset on the other side too.
/// When tap ends, the connections that pass through it end with it.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  buffstreams tap :5032 localhost:5031
  buffstreams tap :5032 collector:5031 --output fields
  buffstreams tap :5032 collector:5031 --output none --control
  buffstreams tap unix:/run/tap.sock unix:/run/readings.sock --framing varint --output hex
  buffstreams tap :5032 collector:5031 --proto reading.proto --type plant.Reading")]
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

impl TapArguments {
    pub(super) fn check(&self) -> Result<(), Unusable> {
        self.framing()?;
        self.output().map(drop)
    }

    pub(crate) fn framing(&self) -> Result<Option<Framing>, Unusable> {
        self.wire.framing()
    }

    pub(crate) fn output(&self) -> Result<Output, Unusable> {
        if let Some(OutputFormat::Delimited) = self.output {
            return Err(Unusable::because(
                "--output delimited has no place for the direction of a message: use hex, or `buffstreams record`",
            ));
        }
        self.types.output(self.output, Output::Lines)
    }
}
