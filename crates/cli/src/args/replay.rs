//! What `replay` takes.

use std::path::PathBuf;
use std::slice;
use std::time::Duration;

use buffstreams::{Address, Framing};
use clap::Args;

use super::delivery::{DeliveryLevel, check_acked};
use super::framing::RecordedWireArguments;
use super::quantities::parse_duration;
use super::tls::SendTls;
use super::unusable::Unusable;

/// Send a recording again, at the pace at which it came, or another
///
/// Opens a connection for each that was recorded, and closes it when that was. The messages of each are sent in their
/// order. The last line on standard error accounts for every message, as that of `send` does.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  buffstreams replay monday.rec localhost:5031
  buffstreams replay monday.rec localhost:5031 --speed 10x
  buffstreams replay monday.rec collector:5031 --speed max --one-connection --delivery acked")]
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
    wire: RecordedWireArguments,

    /// When a message counts as settled
    #[arg(long, value_enum, default_value_t = DeliveryLevel::Sent)]
    delivery: DeliveryLevel,

    /// How long the peer may be away before everything in hand fails; 0 is one attempt
    ///
    /// What keeps it from connecting is said at once, and then at growing pauses, with how many attempts were in vain.
    #[arg(long, value_name = "DURATION", default_value = "30s", value_parser = parse_duration)]
    pub(crate) retry_for: Duration,

    /// Where failed messages go, in delimited form; created, or emptied
    #[arg(long, value_name = "FAILED")]
    pub(crate) failed: Option<PathBuf>,

    #[command(flatten)]
    pub(crate) tls: SendTls,
}

impl ReplayArguments {
    pub(super) fn check(&self) -> Result<(), Unusable> {
        if let Some(framing) = self.wire.asked_for()? {
            self.is_acked(framing)?;
        }
        self.tls.check(slice::from_ref(&self.address))
    }

    /// How messages stand on the wire, if they were recorded in this framing.
    pub(crate) fn framing(&self, recorded: Framing) -> Result<Framing, Unusable> {
        self.wire.framing(recorded)
    }

    /// Whether messages are acknowledged, over connections of this framing.
    pub(crate) fn is_acked(&self, framing: Framing) -> Result<bool, Unusable> {
        let is_acked = matches!(self.delivery, DeliveryLevel::Acked);
        if is_acked {
            check_acked(framing.prefix())?;
        }
        Ok(is_acked)
    }
}

/// How fast a recording is sent again.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Speed {
    /// So many times as fast as it came.
    Times(f64),
    Max,
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

#[cfg(test)]
mod tests {
    use super::*;

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
}
