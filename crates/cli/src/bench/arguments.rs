//! What `bench` takes.

use std::path::PathBuf;
use std::slice;
use std::time::Duration;

use buffstreams::{Address, Framing};
use clap::{Args, ValueEnum};

use super::message::Sizes;
use crate::args::{DeliveryLevel, SendTls, Unusable, WireArguments, parse_duration};

/// Put load on a listener, and measure how long answers take
///
/// Messages are due at a given rate whatever becomes of them, and latency counts from when they were due: a stall shows
/// in every message that it held up. The answer to a message is its echo, whose every byte is compared, or its
/// acknowledgement. Ends with 0 only if every message that was sent was answered.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  buffstreams listen :5031 --echo --output none
  buffstreams bench localhost:5031 --rate 100k
  buffstreams bench localhost:5031 --rate 10k --connections 50 --size 64..4KiB --html bench.html
  buffstreams bench localhost:5031 --by acks --rate 100k --json
  buffstreams bench localhost:5031 --duration 30s")]
pub(crate) struct BenchArguments {
    /// Whom to send to: `host:port`, `:port` (this machine), `unix:PATH`
    pub(super) address: Address,

    /// Messages a second, over all connections, such as `10000`, `10k` or `1.5M` [default: as fast as it goes]
    ///
    /// They are due at even intervals, whatever becomes of those before. Without it the connections are kept full: that
    /// shows the rate, and no latency, because that would be the time spent in the queue.
    #[arg(long, value_name = "N", value_parser = parse_rate)]
    pub(super) rate: Option<f64>,

    /// Bytes of a message, such as `110`, `4KiB`, or `64..4KiB` for anything between; at least 16
    #[arg(long, value_name = "SIZE", default_value = "110")]
    pub(super) size: Sizes,

    /// How long to measure
    #[arg(long, value_name = "DURATION", default_value = "10s", value_parser = parse_duration)]
    pub(super) duration: Duration,

    /// How long to send before that, without measuring
    #[arg(long, value_name = "DURATION", default_value = "1s", value_parser = parse_duration)]
    pub(super) warm_up: Duration,

    /// Connections that take turns
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=100_000))]
    pub(super) connections: u64,

    /// What counts as an answer
    #[arg(long, value_enum, default_value_t = By::Echo)]
    pub(super) by: By,

    /// How messages are sent [default: sent, or acked with --by acks]
    #[arg(long, value_enum)]
    pub(super) delivery: Option<DeliveryLevel>,

    /// How long to wait while no answer comes: for the first, and for the last
    #[arg(long, value_name = "DURATION", default_value = "3s", value_parser = parse_duration)]
    pub(super) wait: Duration,

    /// Print one JSON object in place of the table
    #[arg(long)]
    pub(super) json: bool,

    /// Draw the latencies by percentile and the rate over time, as a page for a browser
    #[arg(long, value_name = "FILE")]
    pub(super) html: Option<PathBuf>,

    /// The same as a picture alone
    #[arg(long, value_name = "FILE")]
    pub(super) svg: Option<PathBuf>,

    #[command(flatten)]
    wire: WireArguments,

    #[command(flatten)]
    pub(super) tls: SendTls,
}

/// What counts as an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum By {
    /// The message, sent back by `listen --echo`; every byte of it is compared
    Echo,
    /// The acknowledgement of any listener of this program
    Acks,
}

impl BenchArguments {
    pub(crate) fn check(&self) -> Result<(), Unusable> {
        if matches!((self.delivery, self.by), (Some(DeliveryLevel::Sent), By::Acks)) {
            return Err(Unusable::because("--by acks needs --delivery acked"));
        }
        self.framing()?;
        if self.duration.is_zero() {
            return Err(Unusable::because("--duration 0 measures nothing"));
        }
        self.tls.check(slice::from_ref(&self.address))
    }

    pub(super) fn is_acked(&self) -> bool {
        self.delivery.map_or(self.by == By::Acks, |level| level == DeliveryLevel::Acked)
    }

    pub(super) fn framing(&self) -> Result<Framing, Unusable> {
        let framing = self.wire.framing()?;
        if self.is_acked() {
            self.wire.check_acked()?;
        }
        let (most, allowed) = (self.size.most, framing.max_message_size());
        if most > allowed {
            return Err(Unusable::because(format_args!(
                "--size {most} is over the maximum of {allowed}: add --max-message-size {most} here and at the listener"
            )));
        }
        Ok(framing)
    }

    pub(super) fn whole_time(&self) -> Duration {
        self.warm_up + self.duration
    }
}

fn parse_rate(text: &str) -> Result<f64, String> {
    let (digits, unit) = match text.strip_suffix(['k', 'M']) {
        Some(digits) => (digits, if text.ends_with('k') { 1e3 } else { 1e6 }),
        None => (text, 1.0),
    };
    match digits.parse::<f64>() {
        Ok(number) if (1e-3..=1e9).contains(&(number * unit)) => Ok(number * unit),
        _ => Err("write messages a second: 500, 10k, 1.5M".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_numbers_thousands_or_millions() {
        for (text, rate) in [("500", 500.0), ("0.5", 0.5), ("10k", 1e4), ("1.5M", 1.5e6)] {
            assert_eq!(parse_rate(text), Ok(rate), "{text}");
        }
        for text in ["", "0", "-1", "0.0001", "k", "nan", "inf", "10 k", "10G", "9999M"] {
            assert!(parse_rate(text).is_err(), "{text}");
        }
    }
}
