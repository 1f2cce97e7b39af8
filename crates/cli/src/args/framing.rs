//! How messages stand on the wire: options of all commands that have to do with one.

use buffstreams::{Framing, Prefix};
use clap::Args;
use clap::builder::{PossibleValuesParser, TypedValueParser};

use super::delivery::check_acked;
use super::quantities::parse_size;
use super::unusable::Unusable;

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

impl WireArguments {
    pub(crate) fn framing(&self) -> Result<Framing, Unusable> {
        Framing::with_max(self.framing, self.max_message_size).map_err(Unusable::because)
    }

    /// # Errors
    ///
    /// Acknowledgements cannot be asked for.
    pub(crate) fn check_acked(&self) -> Result<(), Unusable> {
        check_acked(self.framing)
    }
}

/// How messages stand on a wire that is read along.
#[derive(Debug, Args)]
pub(crate) struct ForeignWireArguments {
    /// How the length stands before each message [default: what is guessed]
    #[arg(long, value_name = "NAME", value_parser = prefix_parser())]
    framing: Option<Prefix>,

    /// Largest message [default: the largest that the framing can express with a prefix of the usual width]
    #[arg(long, value_name = "SIZE", requires = "framing", value_parser = parse_size)]
    max_message_size: Option<usize>,
}

impl ForeignWireArguments {
    /// The framing that was asked for, if one was.
    pub(super) fn framing(&self) -> Result<Option<Framing>, Unusable> {
        let Some(prefix) = self.framing else { return Ok(None) };
        let max = self.max_message_size.unwrap_or(match prefix {
            // All maxima with a prefix as wide as that of the default.
            Prefix::Buffstreams => usize::from(u16::MAX),
            prefix => prefix.largest_max(),
        });
        Framing::with_max(prefix, max).map(Some).map_err(Unusable::because)
    }
}

/// How messages stand on the wire, where they were recorded on another.
#[derive(Debug, Args)]
pub(crate) struct RecordedWireArguments {
    /// How the length stands before each message [default: as it was recorded]
    #[arg(long, value_name = "NAME", value_parser = prefix_parser())]
    framing: Option<Prefix>,

    /// Largest message, as the listener has it [default: as it was recorded, if the framing can express it]
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    max_message_size: Option<usize>,
}

impl RecordedWireArguments {
    /// What was asked for; the rest is as in this framing.
    pub(super) fn framing(&self, recorded: Framing) -> Result<Framing, Unusable> {
        let prefix = self.framing.unwrap_or(recorded.prefix());
        let max = self.max_message_size.unwrap_or(recorded.max_message_size().min(prefix.largest_max()));
        Framing::with_max(prefix, max).map_err(Unusable::because)
    }

    /// What is known before the recording is read: whether the two fit together, if both were asked for.
    pub(super) fn asked_for(&self) -> Result<Option<Framing>, Unusable> {
        self.framing.map(|prefix| self.framing(Framing::new(prefix))).transpose()
    }
}

fn prefix_parser() -> impl TypedValueParser<Value = Prefix> {
    PossibleValuesParser::new(Prefix::ALL.map(Prefix::name))
        .map(|name| name.parse::<Prefix>().expect("the names of all prefixes are parsed"))
}
